"""AdamW with clipping against a few lines of NumPy; what is decayed; where the rates go."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from promptkd_jax.models.config import from_hugging_face
from promptkd_jax.models.streaming import abstract_params
from promptkd_jax.optimizer import SCHEDULES, adamw, decay_mask, schedule


def numpy_adamw(params, gradients, rates, *, weight_decay, clip, decayed):
    """The parameters after each update, in float64."""
    first = {name: np.zeros_like(p) for name, p in params.items()}
    second = {name: np.zeros_like(p) for name, p in params.items()}
    for step, (gradient, rate) in enumerate(zip(gradients, rates), start=1):
        norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
        for name, g in gradient.items():
            g = g * min(1, clip / norm)
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.999 * second[name] + 0.001 * g**2
            direction = (first[name] / (1 - 0.9**step)) / (
                np.sqrt(second[name] / (1 - 0.999**step)) + 1e-8
            )
            decay = weight_decay * params[name] if decayed[name] else 0
            params = params | {name: params[name] - rate * (direction + decay)}
        yield params


def test_adamw_is_adamw_with_one_clip_for_all_parameters():
    rng = np.random.default_rng(0)
    shapes = {"kernel": (3, 5), "bias": (5,)}
    params = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    scales = (0.01, 10, 1, 0.01, 3)  # below and above the clip
    gradients = [{n: s * rng.normal(size=shape) for n, shape in shapes.items()} for s in scales]
    norms = [optax.tree.norm(g) for g in gradients]
    assert min(norms) < 1 < max(norms)
    decayed = {"kernel": True, "bias": False}
    rates = schedule("constant", 0.02, total_steps=9, warmup_steps=3)
    optimizer = adamw(rates, weight_decay=0.3, clip=1.0, decay_mask=decayed)
    expected = numpy_adamw(
        params,
        gradients,
        [0, 0.02 / 3, 0.04 / 3, 0.02, 0.02],
        weight_decay=0.3,
        clip=1.0,
        decayed=decayed,
    )
    found = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    state = optimizer.init(found)
    for gradient, right in zip(gradients, expected):
        gradient = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), gradient)
        updates, state = optimizer.update(gradient, state, found)
        found = optax.apply_updates(found, updates)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, right)


def test_the_soft_prompt_is_decayed_where_no_mask_is_given():
    prompt = jnp.ones((2, 3))
    optimizer = adamw(lambda step: 0.1, weight_decay=0.5, clip=1.0)
    updates, _ = optimizer.update(jnp.zeros((2, 3)), optimizer.init(prompt), prompt)
    np.testing.assert_allclose(updates, -0.1 * 0.5 * prompt)


GPT2 = {"model_type": "gpt2", "vocab_size": 11, "n_embd": 8, "n_layer": 2, "n_head": 2}
QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 11,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
}


@pytest.mark.parametrize("family", [GPT2 | {"n_positions": 16}, QWEN3])
@pytest.mark.parametrize("decay_norms", [False, True])
def test_what_is_decayed(family, decay_norms):
    """Matrices and embeddings always, biases never, scales of norms if asked for."""
    params = abstract_params(from_hugging_face(family | {"max_position_embeddings": 16}))
    found = traverse_util.flatten_dict(decay_mask(params, decay_norms=decay_norms), sep="/")
    assert found.keys() == traverse_util.flatten_dict(params, sep="/").keys()
    kinds = {"kernel": True, "embedding": True, "lm_head": True, "bias": False}
    kinds["scale"] = decay_norms
    assert {path.split("/")[-1] for path in found} <= kinds.keys()
    for path, decayed in found.items():
        assert decayed == kinds[path.split("/")[-1]], path
    norms = {path for path in found if path.endswith("norm/scale")}
    assert len(norms) == (5 if family is QWEN3 else 3)  # the heads' norms are among them


@pytest.mark.parametrize("style", SCHEDULES)
def test_warm_up_starts_at_0_and_is_linear(style):
    rates = schedule(style, 1e-3, total_steps=10**6, warmup_steps=10, lr_min=0.0)
    found = np.array([rates(step) for step in range(11)])
    np.testing.assert_allclose(found, 1e-4 * np.arange(11), rtol=1e-4)


@pytest.mark.parametrize("style", SCHEDULES)
def test_without_warm_up_the_first_update_has_the_whole_rate(style):
    np.testing.assert_allclose(schedule(style, 1e-3, total_steps=10)(0), 1e-3, rtol=1e-6)


def test_constant_stays_and_the_others_fall_to_the_least_rate():
    more = dict(total_steps=40, warmup_steps=4, lr_min=1e-5)
    steps = np.arange(4, 41)
    constant, cosine, noam = (jax.vmap(schedule(s, 1e-3, **more))(steps) for s in SCHEDULES)
    np.testing.assert_allclose(constant, 1e-3, rtol=1e-6)
    for falling in (cosine, noam):
        assert (np.diff(falling) < 0).all()
        np.testing.assert_allclose(falling[-1], 1e-5, rtol=1e-3)
    half = 1e-5 + (1e-3 - 1e-5) * np.array([0.5, np.sqrt(0.5)])
    np.testing.assert_allclose([cosine[20 - 4], noam[22 - 4]], half, rtol=1e-5)


def test_noam_stays_at_the_least_rate():
    rates = schedule("noam", 1e-3, total_steps=10, lr_min=1e-5)
    np.testing.assert_allclose([rates(10), rates(1000)], 1e-5, rtol=1e-5)
