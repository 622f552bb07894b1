"""Near-duplicates: held-out prompts that stand among those of the training, but for a few words.

Two prompts are compared by the Jaccard similarity of their shingles, runs of three words (Broder
1997). All pairs above a threshold are found, none by chance: of two sets that are so similar, each
has one of its rarest shingles in the other ("prefix filtering": Chaudhuri et al. 2006; Bayardo et
al. 2007), so that only pairs with such a shingle in common are compared. No hash, no seed.
"""

import collections
import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import NamedTuple

SHINGLE = 3  # words
THRESHOLD = 0.7  # one word of twenty may be another

# Letters and digits; where scripts put no spaces between words (Thai to Khmer, kana, Han), each
# character is a word.
_ALONE = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_ALONE}]|[^\W{_ALONE}]+")

Shingles = frozenset[tuple[str, ...]]


class Duplicate(NamedTuple):
    """A held-out prompt and the training prompt most like it, by their places, and how like."""

    held_out: int
    train: int
    similarity: float  # 1.0: the same words
    text: str  # of the training prompt


def near_duplicates(
    train: Iterable[str], held_out: Sequence[str], threshold: float = THRESHOLD
) -> list[Duplicate]:
    """Finds the held-out prompts whose shingles are like those of a training prompt.

    Takes time in proportion to the text of `train`, which is read once, and memory for `held_out`.

    Args:
      threshold: the least Jaccard similarity, above 0.

    Returns:
      One for each such prompt, in their order, with the most similar of `train`, the first of equal
      ones.
    """
    places = collections.defaultdict(list)  # of the held-out prompts with the same shingles
    for place, text in enumerate(held_out):
        places[shingles(text)].append(place)
    counts = collections.Counter(shingle for one in places for shingle in one)
    order = sorted(counts, key=lambda shingle: (counts[shingle], shingle))
    ranks = {shingle: rank for rank, shingle in enumerate(order)}  # the rarest first
    index = collections.defaultdict(list)  # of the held-out sets, by each of their rarest shingles
    for one in places:
        for rank in sorted(map(ranks.__getitem__, one))[: _prefix(len(one), threshold)]:
            index[rank].append(one)

    best: dict[Shingles, Duplicate] = {}
    for number, text in enumerate(train):
        one = shingles(text)
        known = one & ranks.keys()
        # The others are in no held-out prompt, and so the rarest of all.
        length = _prefix(len(one), threshold) - (len(one) - len(known))
        if length <= 0:
            continue
        rarest = sorted(map(ranks.__getitem__, known))[:length]
        for other in {other for rank in rarest for other in index.get(rank, ())}:
            common = len(known & other)
            similarity = common / (len(one) + len(other) - common)
            before = best[other].similarity if other in best else 0.0
            if similarity >= threshold and similarity > before:
                best[other] = Duplicate(-1, number, similarity, text)
    found = [one._replace(held_out=place) for other, one in best.items() for place in places[other]]
    return sorted(found)


def shingles(text: str) -> Shingles:
    """The runs of three words of a text, without case, punctuation and compatibility forms; of a
    shorter one all that it has."""
    text = unicodedata.normalize("NFKC", text).casefold()
    words = _WORD.findall(text) or [text.strip()]
    if len(words) <= SHINGLE:
        return frozenset([tuple(words)])
    return frozenset(zip(*(words[start:] for start in range(SHINGLE))))


def _prefix(size: int, threshold: float) -> int:
    """How many of the rarest shingles of a set are such that one is in every set as similar."""
    return size - math.ceil(threshold * size - 1e-9) + 1  # 0.7 · 10 may be a little above 7
