"""A step on packed rows is the step on the rows by themselves, up to rounding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.methods import begin, update
from helpers.steps import STUDENT, TEACHER, VOCABULARY, assert_close, batch, method

from promptkd_jax.data.batch import Batch, responses, truncate
from promptkd_jax.data.packing import pack_batch
from promptkd_jax.distill.losses.hidden_loss import HiddenTerm, init_projections, resolve_terms
from promptkd_jax.distill.state import summarize
from promptkd_jax.distill.teacher import lazy_logits
from promptkd_jax.models.language_model import LanguageModel
from promptkd_jax.models.layers.segments import packed_columns

COLUMNS, M = 24, 3


def rows() -> Batch:
    """Rows of 12, 2, 9 and 7 tokens, in more columns than the longest needs."""
    return batch()._replace(tokens=np.pad(batch().tokens, ((0, 0), (0, COLUMNS - 12))))


def test_segments_have_positions_of_their_own_behind_a_prefix_of_their_own():
    ids = jnp.array([[1, 1, 1, 0, 0, 2, 2, 0], [1, 0, 0, 2, 0, 0, 3, 3]])
    positions, segments = packed_columns(ids, 2)
    assert positions.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4], [0, 1, 2, 0, 1, 2, 0, 1, 2, 3]]
    assert segments.tolist() == [[1, 1, 1, 1, 1, 2, 2, 2, 2, 2], [1, 1, 1, 2, 2, 2, 3, 3, 3, 3]]
    positions, _ = packed_columns(ids, 0)
    assert positions[0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2]


def test_an_update_on_packed_rows_is_that_on_the_rows():
    """Of the student, the soft prompt and projections; all metrics too."""
    term = HiddenTerm("cosine", 2.0, ((1, 1), (0, 0)), projection=True)
    whole = method(
        student_terms=(("cross_entropy", 0.5), ("reverse_kl", 1.0)),
        hidden_terms=(term,),
        prompt_lag=1,  # fewer forward passes to compile
        response_capacity=COLUMNS - 1,
    )
    execution = dataclasses.replace(whole.execution, packed_rows=2, gradient_accumulation_steps=2)
    of_packed_rows = dataclasses.replace(whole, execution=execution)
    groups = {
        "soft_prompt": jnp.asarray(np.random.default_rng(2).normal(0, 0.5, (M, 32)), jnp.float32),
        "projection": init_projections(
            resolve_terms((term,), STUDENT.config, TEACHER.config), 24, 32, jax.random.key(1)
        ),
    }
    packed = pack_batch(rows(), 2, gap=M)
    assert packed.num_segments.tolist() == [2, 2]
    expected, measured = update(whole, begin(**groups), rows())
    found, of_packed = update(of_packed_rows, begin(**groups), packed)
    assert_close(found.optimizers, expected.optimizers)  # momentum of SGD: the gradients
    assert_close(found.params, expected.params)
    summary, right = summarize(of_packed), summarize(measured)
    assert summary.keys() == right.keys() and right["response_length"] == 5
    for name, value in right.items():
        np.testing.assert_allclose(summary[name], value, rtol=2e-5, err_msg=name)


def test_no_loss_sees_the_first_token_of_a_segment_or_a_gap():
    """The column before predicts another row's."""
    everything = rows()._replace(supervised=np.ones((4, COLUMNS), bool))
    packed = pack_batch(everything, 2, gap=M)
    where = responses(packed, COLUMNS - 1)
    alone = responses(everything, COLUMNS - 1)
    assert where.mask.sum() == alone.mask.sum() == 11 + 1 + 8 + 6
    for found, place in ((0, [0, 1]), (1, [2, 3])):  # rows of 12 and 2, of 9 and 7 tokens
        labels = where.labels[found][where.mask[found] > 0]
        expected = [alone.labels[index][alone.mask[index] > 0] for index in place]
        np.testing.assert_array_equal(labels, np.concatenate(expected))


def test_columns_behind_all_packed_rows_are_cut_off():
    short = truncate(pack_batch(rows(), 2, gap=M), 19)
    assert short.segment_ids.shape == short.supervised.shape == short.tokens.shape == (2, 19)
    assert short.has_token.sum() == short.segment_ids.astype(bool).sum() == 30


def test_functions_of_other_libraries_cannot_keep_segments_apart():
    packed = pack_batch(rows(), 2)
    model = LanguageModel(lambda *_: None, lambda _: None)
    with pytest.raises(ValueError, match="packed rows, and a LanguageModel"):
        lazy_logits(model, {}, packed, responses(packed, 5), VOCABULARY)
