"""Packed rows: nothing is lost, moved to another step, or longer than a row."""

import jax
import numpy as np
import pytest

from promptkd_jax.data.batch import responses
from promptkd_jax.data.batches import collate, stream, train_batches
from promptkd_jax.data.packing import Packing, pack_batch, packed_places
from promptkd_jax.data.rows import Rows
from promptkd_jax.data.top_k import TopK
from promptkd_jax.infra.errors import DataError


def rows(lengths) -> Rows:
    """Row i is the token 100 i + 1, 100 i + 2, …; its first two are its prompt."""
    tokens = [100 * i + 1 + np.arange(length, dtype=np.int32) for i, length in enumerate(lengths)]
    return Rows(tokens, np.full(len(tokens), 2, np.int32), [], dropped=0)


@pytest.mark.parametrize("gap", [0, 3])
def test_every_row_is_in_one_place_and_none_is_overfull(gap):
    """Nor much fuller than another: the longest come first."""
    lengths = np.random.default_rng(0).integers(3, 40, 30)
    number = 20
    places = packed_places(lengths, number, 64, gap)
    assert sorted(sum(places, [])) == list(range(30))
    filled = [lengths[place].sum() + gap * (len(place) - 1) for place in places]
    assert max(filled) <= 64 and max(filled) - min(filled) <= lengths.max() + gap
    assert packed_places(lengths, 30, 40, gap) == [[i] for i in np.argsort(-lengths, kind="stable")]
    assert packed_places(lengths, 4, 64, gap) == []  # 5 rows' worth of tokens and more


def test_segments_are_the_rows_with_what_is_said_of_them():
    """Their tokens, which of them are supervised, and what a teacher wrote down of them."""
    batch = collate(rows([7, 4, 9, 3]), [0, 1, 2, 3], length=16)
    ids = np.arange(4 * 10 * 2, dtype=np.int32).reshape(4, 10, 2)
    batch = batch._replace(cached=TopK(ids, ids.astype(np.float32), ids[..., 0] / 7))
    packed = pack_batch(batch, 2, gap=2, capacity=15)
    assert packed.segment_ids.tolist() == [
        [1] * 9 + [0] * 2 + [2] * 3 + [0] * 2,
        [1] * 7 + [0] * 2 + [2] * 4 + [0] * 3,
    ]
    assert packed.lengths.tolist() == [14, 13]
    for place, indices in enumerate(([2, 3], [0, 1])):
        begins = []
        for segment, index in enumerate(indices, start=1):
            here = packed.segment_ids[place] == segment
            length = batch.lengths[index]
            np.testing.assert_array_equal(packed.tokens[place][here], batch.tokens[index, :length])
            assert packed.supervised[place][here].tolist() == [False] * 2 + [True] * (length - 2)
            begins += [batch.cached.ids[index, : length - 2]]
        together = np.concatenate(begins)
        np.testing.assert_array_equal(packed.cached.ids[place, : len(together)], together)
    assert packed.cached.tail.shape == (2, 15)


def test_what_is_cached_stays_with_its_token_where_whole_rows_are_supervised():
    """Of a row's first token, which nothing predicts, nothing is cached."""
    batch = collate(rows([7, 4, 9, 3]), [0, 1, 2, 3], length=16)
    batch = batch._replace(supervised=np.ones((4, 16), bool))
    ids = np.asarray(responses(batch, 15).labels)[..., None]  # the label itself is kept
    packed = pack_batch(batch._replace(cached=TopK(ids, 0.0 * ids)), 2, capacity=15)
    where = responses(packed, 15)
    counts = np.asarray(where.mask) > 0
    assert counts.sum() == 6 + 3 + 8 + 2
    np.testing.assert_array_equal(packed.cached.ids[counts][:, 0], where.labels[counts])


def test_a_step_has_the_rows_that_it_has_unpacked():
    """From any position on, which is all that a checkpoint holds of the data."""
    data, how = rows([3 + i % 7 for i in range(20)]), dict(batch_size=6, length=16, seed=3)
    plain = train_batches(data, **how)
    packed = train_batches(data, **how, packing=Packing(4, 1, 9))
    resumed = stream(packed, 4)
    for step in range(9):
        expected = pack_batch(plain[step], 4, gap=1, capacity=14)
        found = next(resumed) if step >= 4 else packed[step]
        jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_rows_that_do_not_fit_are_an_error_before_the_first_step():
    """It says how many packed rows do."""
    data, how = rows([3 + i % 7 for i in range(20)]), dict(batch_size=6, length=16, seed=3)
    with pytest.raises(DataError, match=r"2 rows of 16 columns .* expected at least 3") as error:
        train_batches(data, **how, packing=Packing(2, 1, 9))
    assert "with 1 columns between two" in str(error.value)
    train_batches(data, **how, packing=Packing(3, 1, 9))
