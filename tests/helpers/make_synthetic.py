"""Writes the files of `synthetic:` data and models: requests and responses of a small grammar, and
a tokenizer that has a token for each of its words.

    python tests/helpers/make_synthetic.py
"""

import functools
import json
import pathlib
import random
from collections.abc import Callable, Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

PACKAGE = pathlib.Path(__file__).parents[2] / "promptkd_jax"
SIZES = {"test": 96, "dev": 32, "train": 2048, "longer": 48}  # records of each split
REFERENCES = 4  # at most, of a request that has several right answers
END = "<end>"

NOUNS = {
    "fox": "foxes",
    "child": "children",
    "mouse": "mice",
    "leaf": "leaves",
    "city": "cities",
    "box": "boxes",
    "tree": "trees",
    "boat": "boats",
    "bird": "birds",
    "stone": "stones",
    "horse": "horses",
    "wolf": "wolves",
    "berry": "berries",
    "house": "houses",
    "river": "rivers",
    "dish": "dishes",
    "goose": "geese",
    "foot": "feet",
    "knife": "knives",
    "baby": "babies",
    "church": "churches",
    "road": "roads",
    "flower": "flowers",
    "tooth": "teeth",
}
COLOURS = {
    "grass": ("green",),
    "snow": ("white",),
    "coal": ("black",),
    "sky": ("blue", "grey"),
    "sea": ("blue", "green"),
    "apple": ("red", "green", "yellow"),
    "rose": ("red", "white", "yellow"),
    "lemon": ("yellow",),
    "blood": ("red",),
    "cat": ("black", "white", "grey"),
    "wine": ("red", "white"),
    "smoke": ("grey", "black"),
    "cloud": ("white", "grey"),
    "pepper": ("red", "green", "yellow", "black"),
    "milk": ("white",),
    "frog": ("green", "brown"),
    "bear": ("brown", "black", "white"),
    "carrot": ("orange",),
    "gold": ("yellow",),
    "ink": ("blue", "black"),
    "brick": ("red", "brown"),
    "plum": ("blue", "red"),
}
ADJECTIVES = (
    *("small", "old", "quick", "quiet", "brave", "young", "wild", "happy", "tired", "cold"),
    *("big", "loud", "clever", "strange", "kind", "proud", "lazy", "wet"),
)
VERBS = ("sleeps", "waits", "stands", "hides", "rests")
PLACES = ("by the river", "under a tree", "near the house", "in the city", "on a stone")
NUMBERS = tuple(map(str, range(41)))
OTHER_WORDS = (
    *("Say", "these", "words", "again", "from", "last", "to", "first", "Sort", "How", "many"),
    *("are", "What", "is", "plus", "minus", "colour", "the", "and", "plural", "of", "Write", "a"),
    *("sentence", "about", "The", "A", "by", "under", "near", "in", "on"),
)


# Tasks: each draws a request and all its right answers, the lists of words of the given lengths.

Drawn = tuple[str, str, tuple[str, ...]]  # instruction, input, answers


def _words(draw: random.Random, lengths: range) -> list[str]:
    return draw.sample(sorted(NOUNS), draw.choice(lengths))


def _repeat(draw: random.Random, lengths: range) -> Drawn:
    words = " ".join(_words(draw, lengths))
    return "Say these words again", words, (words,)


def _reverse(draw: random.Random, lengths: range) -> Drawn:
    words = _words(draw, lengths)
    return "Say these words from last to first", " ".join(words), (" ".join(reversed(words)),)


def _sort(draw: random.Random, lengths: range) -> Drawn:
    words = _words(draw, lengths)
    return "Sort these words", " ".join(words), (" ".join(sorted(words)),)


def _count(draw: random.Random, lengths: range) -> Drawn:
    words = _words(draw, lengths)
    return "How many words are these", " ".join(words), (str(len(words)),)


def _calculate(draw: random.Random, lengths: range) -> Drawn:
    one, other = draw.randrange(21), draw.randrange(21)
    sign, result = draw.choice((("plus", one + other), ("minus", one)))
    first = one + other if sign == "minus" else one
    return f"What is {first} {sign} {other}", "", (f"{first} {sign} {other} is {result}",)


def _colour(draw: random.Random, lengths: range) -> Drawn:
    one, other = draw.sample(sorted(COLOURS), 2)
    answers = tuple(
        f"The {one} is {first} and the {other} is {second}"
        for first in COLOURS[one]
        for second in COLOURS[other]
    )
    return f"What colour are the {one} and the {other}", "", answers


def _pluralise(draw: random.Random, lengths: range) -> Drawn:
    words = _words(draw, lengths)
    plurals = " and ".join(NOUNS[word] for word in words)
    return f"What is the plural of {' and '.join(words)}", "", (plurals,)


def _describe(draw: random.Random, lengths: range) -> Drawn:
    subject = f"{draw.choice(ADJECTIVES)} {draw.choice(sorted(NOUNS))}"
    answers = tuple(
        f"{article} {subject} {verb} {place}"
        for article in ("The", "A")
        for verb in VERBS
        for place in PLACES
    )
    return f"Write a sentence about the {subject}", "", answers


LISTS = (_repeat, _reverse, _sort, _count)  # their requests can be made longer
TASKS = (*LISTS, _calculate, _colour, _pluralise, _describe)


@functools.cache
def splits() -> dict[str, tuple[Drawn, ...]]:
    """The records of "train", "dev", "test" and "longer".

    No request is in two splits, or twice in one. "longer" asks about longer lists of words than
    any other split. A training record has one answer, drawn from all right ones; the others have
    up to REFERENCES of them.
    """
    draw = random.Random(0)
    short, long = _requests(draw, TASKS, range(2, 5)), _requests(draw, LISTS, range(5, 7))
    sources = {"test": short, "dev": short, "train": short, "longer": long}
    return {
        name: tuple(
            _record(draw, next(source), 1 if name == "train" else REFERENCES)
            for _ in range(SIZES[name])
        )
        for name, source in sources.items()
    }


def _requests(
    draw: random.Random, tasks: tuple[Callable[[random.Random, range], Drawn], ...], lengths: range
) -> Iterator[Drawn]:
    """Endless, no request twice, the tasks in turn."""
    seen = set()
    while True:
        for task in tasks:
            drawn = task(draw, lengths)
            while drawn[:2] in seen:
                drawn = task(draw, lengths)
            seen.add(drawn[:2])
            yield drawn


def _record(draw: random.Random, drawn: Drawn, most: int) -> Drawn:
    instruction, words, answers = drawn
    return instruction, words, tuple(draw.sample(answers, min(most, len(answers))))


@functools.cache
def vocabulary() -> dict[str, int]:
    """Token to id: `<end>`, all bytes, and every word of the grammar, alone and after a space."""
    words = {*NOUNS, *NOUNS.values(), *COLOURS, *ADJECTIVES, *VERBS, *NUMBERS, *OTHER_WORDS}
    words |= {colour for colours in COLOURS.values() for colour in colours}
    words |= {word for place in PLACES for word in place.split()}
    whole = [f"{space}{word}" for word in sorted(words) for space in ("", "Ġ")]
    tokens = [END, *sorted(pre_tokenizers.ByteLevel.alphabet()), *whole]
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}


def tokenizer() -> Tokenizer:
    """One token a word of the grammar, one a byte of anything else; `<end>` is EOS and padding."""
    backend = Tokenizer(models.BPE(vocabulary(), merges=[], ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END])
    return backend


def files() -> dict[pathlib.Path, str]:
    """The text of each file, by its path below the package."""
    found = {pathlib.Path("models/assets/synthetic_tokenizer.json"): tokenizer().to_str()}
    for name, records in splits().items():
        lines = [
            json.dumps({"instruction": instruction, "input": words, "output": answers})
            for instruction, words, answers in records
        ]
        found[pathlib.Path(f"data/assets/synthetic/{name}.jsonl")] = "\n".join(lines) + "\n"
    return found


if __name__ == "__main__":
    for path, text in files().items():
        (PACKAGE / path).parent.mkdir(parents=True, exist_ok=True)
        (PACKAGE / path).write_text(text, "utf-8")
