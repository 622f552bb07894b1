"""The topics that the teacher is asked to write about, and what a written prompt looks like.

A bank of topic prompts is a bandit: a softmax policy with one logit per topic draws topics, and is
reinforced towards those whose prompts were rewarded. What the teacher writes to a topic prompt is
cleaned to one prompt, and compared with those before it. `data_free` is the process around this.

K topics, N draws of a round.
"""

import collections
import itertools
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from promptkd_jax.data.reading.record_stream import read_records
from promptkd_jax.data.reading.records import Record
from promptkd_jax.distill.losses.losses import entropy
from promptkd_jax.infra.errors import DataError

# The policy over the bank


class Policy(NamedTuple):
    """One logit per topic, `[K]` float32, and the state of Adam."""

    logits: jax.Array
    optimizer: optax.OptState


def init_policy(topics: int, learning_rate: float) -> Policy:
    """Every topic is equally likely."""
    logits = jnp.zeros(topics, jnp.float32)
    return Policy(logits, _adam(learning_rate).init(logits))


def _adam(learning_rate: float) -> optax.GradientTransformation:
    # A topic that was not drawn has no gradient but rounding errors: the usual eps of 1e-8 would
    # blow them up to whole steps. Those of drawn topics are about 1 / round_size.
    return optax.adam(learning_rate, eps=1e-4)


@jax.jit
def policy_gradient(
    logits: jax.Array, drawn: jax.Array, advantages: jax.Array, entropy_weight: float = 0.0
) -> jax.Array:
    """Which way to move the logits `[K]`: REINFORCE (Williams 1992) for a categorical.

    Args:
      logits: of the policy pi from which the topics `drawn` `[N]` were drawn.
      advantages: `[N]`, of each draw.
      entropy_weight: of the policy's entropy.

    Returns:
      The gradient of mean_n advantages[n] log pi(drawn[n]) + entropy_weight * entropy(pi), whose
      expectation over the draws is that of the expected advantage plus the bonus.
    """

    def objective(logits):
        chosen = jnp.asarray(advantages) * jax.nn.log_softmax(logits)[drawn]
        return jnp.mean(chosen) + entropy_weight * entropy(logits)

    return jax.grad(objective)(logits)


def reinforce(
    policy: Policy,
    drawn: jax.Array,
    rewards: Sequence[float],
    learning_rate: float,
    entropy_weight: float,
) -> Policy:
    """The policy after one step of Adam towards a round's better topics.

    Args:
      drawn: the topics of the round, `[N]`; rewards: theirs.
      entropy_weight: of the bonus, see `policy_gradient`; the rewards are normalised before.
    """
    gradient = policy_gradient(policy.logits, drawn, normalised(rewards), float(entropy_weight))
    descent, optimizer = _adam(learning_rate).update(-gradient, policy.optimizer)
    return Policy(optax.apply_updates(policy.logits, descent), optimizer)


def normalised(rewards: Sequence[float]) -> np.ndarray:
    """Mean 0 and standard deviation 1 within the round; 0 where all are the same."""
    rewards = np.asarray(rewards, np.float64)
    spread = rewards.std()
    if spread < 1e-6:  # rounding errors, which Adam would blow up
        return np.zeros(len(rewards), np.float32)
    return ((rewards - rewards.mean()) / spread).astype(np.float32)


# The bank


def read_bank(source: str) -> list[Record]:
    """Topic prompts: JSON lines whose "instruction" has one prompt written, as `data` reads them.

    Raises:
      DataError: a line cannot be read, there is only one, or two are the same.
    """
    bank = read_records(source)
    counts = collections.Counter(record.prompt_text for record in bank)
    if repeated := [text for text, count in counts.items() if count > 1]:
        raise DataError(f"{source}: expected distinct topic prompts, found twice: {repeated[0]!r}")
    if len(bank) == 1:
        raise DataError(f"{source}: one topic prompt leaves nothing to choose; give at least two")
    return bank


# What the teacher writes

_ANNOUNCEMENT = re.compile(r"(sure|here|certainly|of course)\b.*:", re.IGNORECASE)
_NUMBER = r"[-*•]\s+|\(?\d+[.):]\s+"
_NAME = r"(question|instruction|request|q)(\s*\d+)?\s*:"
_LABEL = re.compile(rf"({_NUMBER}|{_NAME}|\*\*{_NAME}\*\*)\s*", re.IGNORECASE)
_MARKS = (("**", "**"), ("*", "*"), ("`", "`"), ('"', '"'), ("'", "'"), ("“", "”"), ("‘", "’"))


def clean_prompt(text: str) -> str:
    """The prompt within what the teacher wrote: its first line that says anything.

    A line that only announces it ("Here is a question:") is passed over; list markers, numbers,
    labels ("Question:") and quotation or emphasis marks around the whole line are removed.
    """
    lines = [line for line in map(str.strip, text.splitlines()) if line]
    if len(lines) > 1 and _ANNOUNCEMENT.fullmatch(lines[0]):
        lines = lines[1:]
    line, before = "".join(lines[:1]), None
    while line != before:
        before = line
        line = _LABEL.sub("", _unquoted(line), count=1) if _LABEL.match(line) else _unquoted(line)
    return line


def _unquoted(line: str) -> str:
    """Without a pair of marks around all of it, or an opening one that is never closed."""
    for opening, closing in _MARKS:
        inner = line.removeprefix(opening)
        if inner != line and closing not in inner.removesuffix(closing):
            return inner.removesuffix(closing).strip()
    return line


def words(text: str) -> tuple[str, ...]:
    """Runs of letters and digits, lower-cased: prompts with the same words are the same."""
    return tuple(re.findall(r"\w+", text.lower()))


def similarities(prompts: Sequence[str], earlier: Sequence[str]) -> list[float]:
    """The largest overlap (intersection over union) of each prompt's pairs of neighbouring words
    with those of an earlier one, in [0, 1]; the prompts before it count as earlier ones."""
    overlaps, known = [], [_word_pairs(text) for text in earlier]
    for pairs in map(_word_pairs, prompts):
        overlaps.append(max((len(pairs & x) / len(pairs | x) for x in known), default=0.0))
        known.append(pairs)
    return overlaps


def _word_pairs(text: str) -> frozenset[tuple[str, str]]:
    return frozenset(itertools.pairwise(words(text)))


def faults(texts: Sequence[str], earlier: Sequence[str], fits: Callable[[str], bool]) -> list[str]:
    """Why each text is no new prompt, "" if it is one; the texts before it count as earlier ones.

    Args:
      fits: whether a text that would be a prompt is short enough to be one.
    """
    known, found = set(map(words, earlier)), []
    for text in texts:
        its_words = words(text)
        if len(its_words) < 2:
            found.append("one word" if its_words else "empty")
        elif its_words in known:
            found.append("duplicate")
        elif not fits(text):
            found.append("too long")
        else:
            found.append("")
            known.add(its_words)
    return found
