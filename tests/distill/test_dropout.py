"""Dropout: the masks, where a model has them, and the update that they belong to."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.methods import begin, compiled, gradient, in_parts, moved, plain, update
from helpers.models import TOKENS, make_pair
from helpers.steps import (
    STUDENT,
    TEACHER,
    VOCABULARY,
    assert_close,
    batch,
    jit,
    log_probs,
    method,
    supervised,
    teacher_params,
)

from promptkd_jax.data.batch import Batch
from promptkd_jax.distill.state import Optimizers, init_state, summarize
from promptkd_jax.distill.step import train_step
from promptkd_jax.distill.teacher import Models, StepModels
from promptkd_jax.models.config import Dropout
from promptkd_jax.models.decoder import REMAT, Decoder, head
from promptkd_jax.models.families.registry import from_hugging_face
from promptkd_jax.models.language_model import LazyLogits
from promptkd_jax.models.layers.attention import attend, dropped, keep_mask, keep_weights
from promptkd_jax.models.sampler import row_keys

KEYS = row_keys(jax.random.key(8), np.arange(len(TOKENS)))

# The masks


def test_a_mask_keeps_its_share_and_the_mean():
    found = np.asarray(keep_mask(KEYS, 0.2, (50, 40), 3))
    assert found.shape == (3, 50, 40)
    np.testing.assert_allclose(np.unique(found), [0, 1.25])
    assert found.mean() == pytest.approx(1, abs=0.03)


def test_a_mask_is_that_of_its_row_and_place():
    found = keep_mask(KEYS, 0.5, (8, 8), 3)
    np.testing.assert_array_equal(keep_mask(KEYS[1:], 0.5, (8, 8), 3), found[1:])
    np.testing.assert_array_equal(keep_mask(KEYS, 0.5, (11, 8), 3)[:, :8], found)
    assert (found[0] != found[1]).any() and (found != keep_mask(KEYS, 0.5, (8, 8), 4)).any()


def test_dropped_weights_do_not_depend_on_columns_or_heads_beside_them():
    whole = keep_weights(KEYS, 0.5, 4, 0, 9)
    assert whole.shape == (3, 4, 9, 9)
    np.testing.assert_array_equal(keep_weights(KEYS, 0.5, 2, 3, 6), whole[:, :2, 3:6, :6])
    assert all((whole[:, 0] != other).any() for other in (whole[:, 1], whole[:, 0, ::-1]))
    # A row in four stripes with a window, against one that is shorter and one stripe.
    query, key, value = np.random.default_rng(0).normal(size=(3, 3, 300, 2, 8)).astype(np.float32)
    how = dict(sliding_window=40, dropout=0.5, dropout_keys=KEYS)
    attended = jax.jit(functools.partial(attend, **how))
    found = attended(query, key, value)[:, :90]
    expected = attended(query[:, :90], key[:, :90], value[:, :90])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


# Where a model has them


def masks_of_gpt2(dropout: Dropout, depth: int, heads: int, width: int):
    """In the order in which transformers asks for them."""
    length = TOKENS.shape[1]
    yield keep_mask(KEYS, dropout.embedding, (length, width), 0)
    yield from masks_of_opt(dropout, depth, heads, width)


def masks_of_opt(dropout: Dropout, depth: int, heads: int, width: int):
    length = TOKENS.shape[1]
    for layer in range(depth):
        keys = jax.vmap(jax.random.fold_in, (0, None))(KEYS, 1 + layer)
        yield keep_weights(keys, dropout.attention, heads, 0, length)
        yield keep_mask(keys, dropout.residual, (length, width), 0)
        yield keep_mask(keys, dropout.residual, (length, width), 1)


@pytest.mark.parametrize("name, masks", [("gpt2", masks_of_gpt2), ("opt", masks_of_opt)])
def test_dropout_is_where_transformers_has_it(name, masks, tmp_path, monkeypatch):
    """Given our masks, transformers computes the same in training."""
    reference, _, model = make_pair(name, tmp_path)
    import torch

    rates = Dropout(embedding=0.1 if name == "gpt2" else 0.0, residual=0.1, attention=0.3)
    config = model.decoder.config
    assert config.dropout.residual == 0.1 and config.dropout.embedding == rates.embedding
    for module in reference.modules():  # attention's own, which differs from the others
        for field in ("attn_dropout", "dropout"):
            if "Attention" in type(module).__name__ and hasattr(module, field):
                dropout = getattr(module, field)
                setattr(module, field, torch.nn.Dropout(0.3) if callable(dropout) else 0.3)
    asked = masks(rates, config.num_layers, config.num_heads, config.width)

    def drop(x, p=0.5, training=True, inplace=False):
        if not (p and training):
            return x
        return x * torch.tensor(np.asarray(next(asked))).reshape(x.shape)

    monkeypatch.setattr(torch.nn.functional, "dropout", drop)
    reference.set_attn_implementation("eager")
    reference.train()
    with torch.no_grad():
        expected = reference(torch.tensor(TOKENS), use_cache=False).logits.numpy()
    assert next(asked, None) is None, "fewer places than ours"
    decoder = Decoder(config.replace(dropout=rates))

    @jax.jit
    def logits(keys):
        hidden = decoder.hidden_states(model.params, TOKENS, dropout_keys=keys)
        return LazyLogits(hidden, head(model.params)).logits()

    with jax.default_matmul_precision("highest"):
        found = logits(KEYS)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    without = logits(None)
    assert np.abs(found - without).max() > 0.5


@pytest.mark.parametrize(
    "family, fields, expected",
    [
        ("gpt2", {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8}, (0.1, 0.1, 0.1)),
        ("gpt2", {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8, "resid_pdrop": 0.0},
         (0.1, 0.0, 0.1)),
        ("llama", {"attention_dropout": 0.2}, (0.0, 0.0, 0.2)),
        ("llama", {}, (0.0, 0.0, 0.0)),
        ("phi3", {"resid_pdrop": 0.3}, (0.0, 0.3, 0.0)),
    ],
)  # fmt: skip
def test_rates_are_those_of_the_config(family, fields, expected):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 8, "max_position_embeddings": 8, "vocab_size": 9}
    found = from_hugging_face({"model_type": family, **sizes, **fields})
    assert found.dropout == Dropout(*expected)


def test_layers_that_are_computed_again_drop_the_same():
    params, keys = begin().student, row_keys(jax.random.key(1), np.arange(4))

    def loss(params, decoder):
        return jnp.mean(decoder.hidden_states(params, batch().tokens, dropout_keys=keys) ** 2)

    gradients = [
        jax.jit(jax.grad(loss), static_argnums=1)(
            params, Decoder(STUDENT.config.replace(remat=policy))
        )
        for policy in REMAT
    ]
    for other in gradients[1:]:
        assert_close(other, gradients[0])


# The update that they belong to


@functools.partial(jit, static_argnums=2)
@jax.value_and_grad
def dense_dropped(student, keys, decoder):
    """Reverse KL of the student with dropout, on the rows of the batch."""
    rows = batch()
    hidden = decoder.hidden_states(student, rows.tokens, dropout_keys=keys)
    q = jax.nn.log_softmax((hidden @ head(student).T)[:, :-1, :VOCABULARY])
    p = log_probs(TEACHER, teacher_params(), rows.tokens)
    mask = supervised(rows)
    return (mask * (jnp.exp(q) * (q - p)).sum(-1)).sum() / mask.sum()


@pytest.mark.parametrize("parts", [1, 2])
def test_the_students_own_update_has_dropout(parts):
    """The same masks in one micro-batch and in two."""
    before, method = begin(step=3), in_parts(plain(dropout=True), parts)
    after, metrics = update(method, before)
    views = StepModels(method, Models(STUDENT, TEACHER), teacher_params())
    keys = views.dropout_keys(jax.random.fold_in(before.key, 3), batch()).rows
    value, expected = dense_dropped(before.student, keys, STUDENT)
    assert_close(gradient(after), expected)
    without, _ = update(plain(), before)
    assert moved(gradient(without), expected) > 1e-2
    assert_close(summarize(metrics)["student_loss"], value)


def test_the_soft_prompt_and_rollouts_see_the_student_without_dropout():
    before = begin(soft_prompt=jnp.full((3, 32), 0.1))
    how = dict(response_capacity=8, regularization=0.0)
    with_it, without = (
        compiled(method(targets="student", dropout=dropout, **how))(
            before, teacher_params(), batch(), None
        )
        for dropout in (True, False)
    )
    assert_close(gradient(with_it[0], "soft_prompt"), gradient(without[0], "soft_prompt"))
    np.testing.assert_array_equal(with_it[1].counts, without[1].counts)
    assert moved(gradient(with_it[0]), gradient(without[0])) > 1e-3


def test_a_corpus_has_masks_of_its_own_rows_in_any_number_of_micro_batches():
    rows = batch()
    text = Batch(rows.tokens, np.ones(4, np.int32), rows.lengths)
    terms = (("cross_entropy", 0.5),)
    one, two, without = (
        update(in_parts(plain(dropout=drops, corpus_terms=terms), parts), begin(), corpus=text)
        for drops, parts in ((True, 1), (True, 2), (False, 1))
    )
    assert_close(gradient(two[0]), gradient(one[0]))
    found, other = (summarize(x[1])["corpus_loss"] for x in (one, without))
    assert abs(found - other) > 1e-3


def test_a_mask_keeps_the_mean_in_half_precision_too():
    """1 / 0.9 itself, rounded to bfloat16, is 0.2 % less."""
    x = jax.random.normal(jax.random.key(0), (3, 64, 64), jnp.bfloat16)
    found = np.asarray(dropped(x, 0.1, KEYS, 0), np.float64)
    kept, x = found != 0, np.asarray(x, np.float64)
    assert (found[kept] * x[kept]).sum() / (x[kept] ** 2).sum() == pytest.approx(1 / 0.9, rel=5e-4)


def test_every_step_and_every_pass_draws_anew():
    views = StepModels(plain(dropout=True), Models(STUDENT, TEACHER), None)
    keys = [
        views.dropout_keys(jax.random.fold_in(begin().key, step), batch()).rows for step in (0, 1)
    ]
    assert (jax.random.key_data(keys[0]) != jax.random.key_data(keys[1])).all()
    still = Optimizers(student=optax.sgd(0.0), soft_prompt=optax.sgd(0.0))

    def mean_loss(passes):
        each = plain(dropout=True, passes=passes)
        fixed = dict(method=each, models=Models(STUDENT, TEACHER), optimizers=still)
        state = init_state({"student": begin().student}, still, jax.random.key(4))
        step = jit(functools.partial(train_step, **fixed))
        return step(state, teacher_params(), batch())[1].losses["student"]

    assert abs(mean_loss(2) - mean_loss(3)) > 1e-3  # of the same parameters
