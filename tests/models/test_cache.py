"""The cache of a rollout against its definition, on a TPU's layout too, and in 8 bits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.models import LENGTHS, PREFIX, TOKENS, random_model

from promptkd_jax.models.decoder import Decoder
from promptkd_jax.models.language_model import LazyLogits
from promptkd_jax.models.layers import cache as caches
from promptkd_jax.models.layers.cache import Cache, LayerCache, make_cache

PROMPTS, RING = 5, 4


@pytest.mark.parametrize("window", [None, 3])
def test_a_row_sees_its_prompt_and_what_it_wrote_itself(window):
    """Rows that begin at different turns of one ring, as in continuous batching."""
    prompt_lengths, begins = np.array([5, 2, 3]), np.array([0, 3, 6])
    column = LayerCache(*(np.zeros((3, 1, PROMPTS + RING, 2)),) * 2)
    positions = np.full((3, PROMPTS + RING), -1)  # of what a row has in a column
    for row, length in enumerate(prompt_lengths):
        positions[row, :length] = np.arange(length)
    for turn in range(8):
        cache = Cache((column,), prompt_lengths, jnp.array(turn), PROMPTS)
        assert cache.column == PROMPTS + turn % RING
        written = np.clip(turn - begins, 0, RING - 1)
        query = prompt_lengths + written
        begun = (begins <= turn) & (turn - begins < RING)
        positions[begun, PROMPTS + turn % RING] = query[begun]
        expected = (positions >= 0) & (positions <= query[:, None])
        if window:
            expected &= positions > query[:, None] - window
        found = cache.seen(jnp.asarray(query), window)
        np.testing.assert_array_equal(found[begun], expected[begun])


@functools.partial(jax.jit, static_argnums=0)
def _logits(decoder: Decoder, params):
    """Logits `[B, 4, V]` of tokens that are written one by one behind prompts of LENGTHS."""
    new = 4
    _, cache = decoder.prefill(params, TOKENS, LENGTHS, PREFIX, TOKENS.shape[1], new)

    def step(cache, index):
        tokens = jnp.asarray(TOKENS)[:, index]
        return decoder.decode(params, tokens, PREFIX, LENGTHS + index, cache)[::-1]

    _, hidden = jax.lax.scan(step, cache, jnp.arange(new))
    head = decoder.output_head(params)
    return LazyLogits(hidden, head, decoder.logit_soft_cap).logits().swapaxes(0, 1)


def _with(model, **how) -> Decoder:
    return Decoder(model.decoder.config.replace(**how))


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "gpt_oss"])
@pytest.mark.parametrize("dtype", ["auto", "int8"])
def test_heads_beside_one_another_attend_as_apart(name, dtype, monkeypatch):
    model = random_model(name)
    decoder = _with(model, kv_cache_dtype=dtype)
    expected = _logits(decoder, model.params)
    monkeypatch.setattr(caches, "_heads_per_group", lambda num_heads, num_kv_heads, width: 2)
    found = jax.jit(functools.partial(_logits.__wrapped__, decoder))(model.params)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "num_heads, num_kv_heads, width, group",
    [
        (32, 8, 64, 2),  # two fill the lanes, and have 8 queries
        (32, 8, 128, 2),  # one fills the lanes, and has 4 queries
        (16, 1, 256, 1),
        (12, 12, 64, 12),  # of 2, 4 and 6 the queries are too few
        (25, 25, 64, 25),
        (64, 64, 64, 8),
    ],
)
def test_groups_fill_the_registers_of_a_tpu(num_heads, num_kv_heads, width, group, monkeypatch):
    assert caches._heads_per_group(num_heads, num_kv_heads, width) == 1
    monkeypatch.setattr(caches, "platform", lambda: "tpu")
    assert caches._heads_per_group(num_heads, num_kv_heads, width) == group


def test_eight_bits_are_off_by_half_a_step_and_take_half_the_memory():
    config = random_model("llama").decoder.config.replace(dtype="bfloat16", kv_cache_dtype="int8")
    heads, width = config.num_kv_heads, config.head_dim
    shape = (config.num_layers, 2, 3, heads, width)
    keys, values = (jax.random.normal(jax.random.key(i), shape) for i in range(2))
    keys = keys.at[:, 0, 1].set(0)  # a key of zeros stays one
    how = dict(prompt_columns=3, new_columns=2)
    made = make_cache(config, keys, values, np.array([3, 3]), **how)
    for layer, exact in zip(made.layers, keys, strict=True):
        assert layer.key.dtype == layer.value.dtype == jnp.int8
        scale = np.asarray(layer.key_scale, np.float32)  # [B, K, S, 1]
        found = np.asarray(layer.key, np.float32)[:, :, :3] * scale[:, :, :3]
        error = np.abs(found - np.swapaxes(exact, 1, 2))
        # Rounded to bfloat16, a scale can make the largest number 127.5 steps: 2 ** -9 of it more.
        assert (error <= scale[:, :, :3] * (0.5 + 127 * 2**-8)).all()
        assert (found[0, :, 1] == 0).all()
    plain = make_cache(
        config.replace(kv_cache_dtype="auto"), *(keys, values), np.array([3, 3]), **how
    )
    assert _bytes(made) * config.head_dim == _bytes(plain) // 4 * (config.head_dim + 2)


def _bytes(cache: Cache) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(cache.layers))


def test_a_cache_in_eight_bits_is_near_the_exact_one():
    model = random_model("llama")
    exact, found = (
        jax.nn.log_softmax(_logits(_with(model, kv_cache_dtype=x), model.params))
        for x in ("auto", "int8")
    )
    kl = jnp.sum(jnp.exp(exact) * (exact - found), axis=-1)
    assert 0 < kl.mean() < 1e-3
