"""A gated prefix is the plain model at g = 0, an ordinary one at g = 1, and the formula between."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.models import PREFIX, TOKENS, logits, random_model

from promptkd_jax.infra.errors import ModelError
from promptkd_jax.models.config import Dropout
from promptkd_jax.models.decoder import Decoder
from promptkd_jax.models.layers.gated_prefix import Gate, GatedPrefix, attend_gated
from promptkd_jax.models.sampler import row_keys, sample
from promptkd_jax.models.sampling_rules import Sampling


def gated(model, gates) -> GatedPrefix:
    config = model.decoder.config
    return GatedPrefix(PREFIX, jnp.full((config.num_layers, config.num_heads), gates, jnp.float32))


# Learned positions; rotary ones that depend on the rows' length; sinks, and windows of some layers.
@pytest.mark.parametrize("name", ["gpt2", "llama_dynamic", "gpt_oss"])
def test_without_weight_it_is_the_plain_model(name):
    model = random_model(name)
    plain = logits(model)
    np.testing.assert_allclose(logits(model, prefix=gated(model, 0.0)), plain, rtol=0, atol=1e-4)
    assert np.abs(logits(model, prefix=gated(model, 0.1)) - plain).max() > 0.01


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_with_the_weight_of_text_and_rotary_positions_it_is_an_ordinary_prefix(name):
    model = random_model(name)
    found, expected = logits(model, prefix=gated(model, 1.0)), logits(model, prefix=PREFIX)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_attention_and_its_gradients_are_those_of_the_formula(window, with_sinks):
    """For gates of 0, of 1 and between, in value and in all gradients."""
    length, columns = 3, 9
    keys = iter(jax.random.split(jax.random.key(0), 5))
    query = jax.random.normal(next(keys), (2, columns, 4, 8))
    key, value = (jax.random.normal(next(keys), (2, columns, 2, 8)) for _ in range(2))
    sinks = jax.random.normal(next(keys), (4,)) if with_sinks else None
    cotangent = jax.random.normal(next(keys), query.shape)
    gates = jnp.array([0.0, 0.3, 0.8, 1.0])
    row, column = np.mgrid[:columns, :columns]
    seen = (column <= row) & (column > row - (window or columns))

    def formula(gates, query, key, value):
        key, value = (jnp.repeat(x, 2, axis=2) for x in (key, value))
        weights = seen * jnp.exp(jnp.einsum("bqnh,bknh->bnqk", query, key) / 8**0.5)

        def shares(weights):
            total = weights.sum(-1, keepdims=True)
            return weights / (total if sinks is None else total + jnp.exp(sinks)[:, None, None])

        hidden = (column < length) & (row >= length)  # of the text, all of the prefix
        gates = gates[:, None, None]
        mixed = (1 - gates) * shares(jnp.where(hidden, 0, weights)) + gates * shares(weights)
        return jnp.einsum("bnqk,bknh->bqnh", mixed, value)

    def ours(gates, query, key, value):
        gate = Gate(gates, length)
        return attend_gated(query, key, value, gate=gate, sliding_window=window, sinks=sinks)

    inputs = gates, query, key, value
    expected, back = jax.vjp(formula, *inputs)
    found, back_of_ours = jax.vjp(jax.jit(ours), *inputs)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    gradients = back_of_ours(cotangent), back(cotangent)
    assert abs(gradients[0][0][0]) > 0.01, "a gate of 0 has a gradient"
    for one, other in zip(*gradients, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


def test_a_gate_bounds_what_a_prefix_can_do():
    """However far its scores exceed those of the text, as the first column's own may well be."""
    query = jnp.full((1, 3, 1, 8), 30.0)
    key = query.at[:, 1:].multiply(-1)  # the prefix's score is 300 above those of the text
    value = query.at[:, 0].set(-30.0)

    def out(gate):
        return attend_gated(query, key, value, gate=Gate(gate[None], 1))[:, 1:]

    found, slope = jax.jvp(out, (jnp.float32(0),), (jnp.float32(1),))
    np.testing.assert_array_equal(found, value[:, 1:])
    np.testing.assert_allclose(slope, -60)  # from 30 to -30
    np.testing.assert_allclose(out(jnp.float32(0.01)), 30 - 0.6, rtol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "mistral"])
def test_a_rollout_sees_what_whole_rows_see(name):
    model = random_model(name)
    prompts, lengths = TOKENS[:, :6], np.array([2, 6, 4], np.int32)
    gates = np.random.default_rng(3).uniform(0, 1, gated(model, 0).gates.shape)
    prefix = gated(model, 0).replace(gates=jnp.asarray(gates, jnp.float32).at[0, 0].set(0))
    out = sample(
        model.decoder,
        model.params,
        prompts,
        lengths,
        row_keys(jax.random.key(0), jnp.arange(3)),
        max_new_tokens=5,
        sampling=Sampling(temperature=0.0),
        prefix=prefix,
    )
    likeliest = logits(model, np.asarray(out.tokens), prefix).argmax(-1)
    plain = logits(model, np.asarray(out.tokens)).argmax(-1)
    for row, (begin, end) in enumerate(zip(lengths, np.asarray(out.lengths))):
        np.testing.assert_array_equal(
            out.tokens[row, begin:end], likeliest[row, begin - 1 : end - 1]
        )
    written = (np.arange(11) >= lengths[:, None] - 1) & (np.arange(11) < out.lengths[:, None] - 1)
    assert (likeliest != plain)[written].any(), "the prefix is unseen"


def test_gates_of_another_model_packed_rows_and_dropout_of_attention_are_refused():
    model = random_model("gpt2")
    for gates in ((3, 3), (2, 4), (3, 1)):
        with pytest.raises(ModelError, match=r"gates \[., .\]; expected .* gpt2 model, \[3, 4\]"):
            logits(model, prefix=GatedPrefix(PREFIX, jnp.zeros(gates)))

    def states(config=model.decoder.config, **more):
        variables = {"params": model.params}
        return Decoder(config).apply(variables, TOKENS, prefix=gated(model, 0.5), **more)

    with pytest.raises(ModelError, match="packed rows behind a gated prefix"):
        states(segment_ids=np.ones_like(TOKENS))
    keys = row_keys(jax.random.key(0), jnp.arange(len(TOKENS)))
    states(model.decoder.config.replace(dropout=Dropout(residual=0.1)), dropout_keys=keys)
    with pytest.raises(ModelError, match="dropout of attention behind a gated prefix"):
        states(model.decoder.config.replace(dropout=Dropout(attention=0.1)), dropout_keys=keys)


def test_a_gated_prefix_longer_than_the_table_of_positions_is_refused():
    """Its columns have the table's positions from 0 on, though the text's are not moved."""
    model = random_model("gpt2")
    number = model.decoder.config.max_positions
    prefix = gated(model, 0.0).replace(vectors=jnp.zeros((number, PREFIX.shape[1])))
    assert np.isfinite(logits(model, prefix=prefix)).all()
    longer = prefix.replace(vectors=jnp.zeros((number + 1, PREFIX.shape[1])))
    with pytest.raises(ModelError, match=f"{number + 1} columns .* of {number} positions"):
        logits(model, prefix=longer)


def test_gates_stay_between_0_and_1_after_an_update():
    prefix = GatedPrefix(-jnp.ones((1, 2)), jnp.array([[-0.5, 0.0, 0.5, 2.0]]))
    found = prefix.projected()
    np.testing.assert_array_equal(found.gates, [[0.0, 0.0, 0.5, 1.0]])
    np.testing.assert_array_equal(found.vectors, prefix.vectors)
