"""Spread over seeds and paired differences: exact where a closed fact says so, and calibrated."""

import numpy as np
import pytest

from promptkd_jax.evaluation.bootstrap import mean_and_std, paired_difference


def scores(seeds=3, rows=(40, 25), seed=0):
    random = np.random.default_rng(seed)
    return [random.normal(20, 5, (seeds, count)) for count in rows]


def shifted(given, by):
    return [one + by for one in given]


def test_spread_is_mean_and_sample_deviation():
    assert mean_and_std([1.0, 2.0, 6.0]) == (3.0, np.sqrt(7.0))
    assert mean_and_std([4.5]) == (4.5, 0.0)
    with pytest.raises(ValueError, match="one per seed"):
        mean_and_std([])


def test_identical_runs_differ_by_exactly_nothing():
    ours = scores()
    assert paired_difference(ours, ours, draws=200, seed=0) == (0.0, 0.0, 0.0)


def test_a_constant_difference_has_no_width():
    ours = [np.round(one) for one in scores()]
    found = paired_difference(shifted(ours, 2.0), ours, draws=200, seed=0)
    np.testing.assert_allclose(found, (2.0, 2.0, 2.0), rtol=1e-12)


def test_the_mean_is_that_of_the_sets_whatever_their_sizes():
    ours = [np.full((2, 10), 3.0), np.full((2, 1000), 1.0)]
    theirs = [np.zeros((2, 10)), np.zeros((2, 1000))]
    assert paired_difference(ours, theirs, draws=10, seed=0).mean == 2.0


def test_the_interval_is_around_the_mean_and_turns_with_the_sides():
    ours, theirs = scores(seed=1), scores(seed=2)
    there = paired_difference(ours, theirs, draws=4000, seed=0)
    back = paired_difference(theirs, ours, draws=4000, seed=0)
    assert there.low < there.mean < there.high
    assert back.mean == pytest.approx(-there.mean)
    assert back.low == pytest.approx(-there.high, abs=0.15 * (there.high - there.low))
    narrow = paired_difference(ours, theirs, draws=4000, seed=0, confidence=0.5)
    assert there.low < narrow.low < narrow.high < there.high


def test_pairing_takes_out_what_both_sides_share():
    """Requests differ by far more than the methods do; the same shift on all of them is certain."""
    random = np.random.default_rng(0)
    hard = random.normal(0, 30, (1, 200))
    ours = [hard + random.normal(1, 0.1, (3, 200))]
    theirs = [hard + random.normal(0, 0.1, (3, 200))]
    found = paired_difference(ours, theirs, draws=500, seed=0)
    assert 0.95 < found.low < found.high < 1.05


def test_the_order_of_seeds_does_not_matter():
    ours, theirs = scores(seeds=4, seed=1), scores(seeds=4, seed=2)
    order = [2, 0, 3, 1]
    moved = [one[order] for one in ours], [one[order] for one in theirs]
    assert paired_difference(ours, theirs, draws=300, seed=5) == paired_difference(
        *moved, draws=300, seed=5
    )
    values = list(np.random.default_rng(0).normal(size=7))
    assert mean_and_std(values) == mean_and_std(values[::-1])


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    """Seeds that differ by their luck alone: 95 % nominally, more with the seeds drawn as well."""
    random = np.random.default_rng(0)
    covered = []
    for _ in range(200):
        ours, theirs = random.normal(0.3, 1, (5, 60)), random.normal(0, 1, (5, 60))
        found = paired_difference([ours], [theirs], draws=300, seed=1)
        covered.append(found.low <= 0.3 <= found.high)
    assert 0.93 <= np.mean(covered) <= 1.0
    narrow = paired_difference([ours], [theirs], draws=300, seed=1)
    assert narrow.high - narrow.low < 0.8, "an interval that says nothing covers everything"


def test_a_seed_that_differs_widens_the_interval():
    rows = np.zeros((3, 500))
    bad = rows.copy()
    bad[0] = 9.0
    found = paired_difference([bad], [rows], draws=1000, seed=0)
    assert found.mean == 3.0 and found.low == 0.0 and found.high >= 6.0


@pytest.mark.parametrize(
    "ours, theirs",
    [
        ([], []),
        ([np.zeros((2, 3))], [np.zeros((2, 4))]),
        ([np.zeros((2, 3))], [np.zeros((3, 3))]),
        ([np.zeros(3)], [np.zeros(3)]),
        ([np.zeros((2, 0))], [np.zeros((2, 0))]),
        ([np.zeros((2, 3)), np.zeros((3, 3))], [np.zeros((2, 3)), np.zeros((3, 3))]),
    ],
)
def test_what_cannot_be_paired_is_refused(ours, theirs):
    with pytest.raises(ValueError, match="expected the same"):
        paired_difference(ours, theirs, draws=10, seed=0)
