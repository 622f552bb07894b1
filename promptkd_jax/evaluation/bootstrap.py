"""What a few seeds allow to say: mean and spread, and paired differences with an interval.

Pure functions of scores; S seeds, R rows (requests) of a test set.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Spread(NamedTuple):
    """Mean and sample standard deviation (0 for one value) of one number per seed."""

    mean: float
    std: float


class Difference(NamedTuple):
    """A mean of paired differences, and the interval from `low` to `high` that is to cover it."""

    mean: float
    low: float
    high: float


def mean_and_std(values: Sequence[float]) -> Spread:
    """Mean and sample standard deviation of one number per seed, in any order.

    Raises:
      ValueError: no value.
    """
    if not len(values):
        raise ValueError("no value to take a mean of; expected one per seed")
    ordered = np.sort(np.asarray(values, np.float64))  # the sum does not depend on the order
    std = ordered.std(ddof=1) if len(ordered) > 1 else 0.0
    return Spread(float(ordered.mean()), float(std))


def paired_difference(
    ours: Sequence[np.ndarray],
    theirs: Sequence[np.ndarray],
    *,
    draws: int,
    seed: int,
    confidence: float = 0.95,
) -> Difference:
    """Mean over test sets of the mean of `ours - theirs`, with a percentile bootstrap interval.

    A score is paired with that of the same seed for the same request. A draw takes as many seeds
    and, of each set, as many requests as there are, with replacement, all seeds crossed with all
    requests (the "pigeonhole" bootstrap of Owen, Annals of Applied Statistics 2007), so that both
    other seeds and other requests are allowed for. Two or three seeds say little about the spread
    over seeds: take the interval as a rough one then. It does not depend on the order of the seeds.

    Args:
      ours, theirs: the scores of each test set, `[S, R]`, R its own in each; S the same in all.
      draws: how many; seed: of the draws.
      confidence: share of the draws that lie within the interval.

    Raises:
      ValueError: no test set, or shapes that cannot be paired.
    """
    _check_pairs(ours, theirs)
    differences = [
        np.asarray(a, np.float64) - np.asarray(b, np.float64) for a, b in zip(ours, theirs)
    ]
    order = np.lexsort(np.concatenate(differences, axis=1).T)
    differences = [one[order] for one in differences]
    random = np.random.default_rng(seed)

    def shares(count: int) -> np.ndarray:  # of each in a draw of `count` out of `count`
        return random.multinomial(count, np.full(count, 1 / count), size=draws) / count

    seeds, total = shares(len(order)), np.zeros(draws)  # [draws, S], the same in all sets
    for one in differences:
        total += np.sum((seeds @ one) * shares(one.shape[1]), axis=1)
    means = total / len(differences)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    mean = np.mean([one.mean() for one in differences])
    return Difference(float(mean), float(low), float(high))


def _check_pairs(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> None:
    shapes, others = [np.shape(x) for x in ours], [np.shape(x) for x in theirs]
    if not shapes or shapes != others or any(len(shape) != 2 or 0 in shape for shape in shapes):
        raise ValueError(
            f"scores of shapes {shapes} and {others} cannot be paired; expected the same "
            "[seeds, requests] for each test set on both sides"
        )
    if len({seeds for seeds, _ in shapes}) > 1:
        raise ValueError(f"scores of shapes {shapes}: expected the same number of seeds in all")
