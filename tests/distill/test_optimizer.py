"""AdamW with clipping against a few lines of NumPy and against PyTorch's; parameters in half
precision; what is decayed; where the rates go."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from promptkd_jax.distill.methods.method import PRESETS
from promptkd_jax.distill.optimizer import (
    SCHEDULES,
    adamw,
    decay_mask,
    in_slices,
    round_change,
    rounding_keys,
    schedule,
)
from promptkd_jax.models.families.registry import from_hugging_face
from promptkd_jax.models.io.params import abstract_params
from promptkd_jax.training import build
from promptkd_jax.training.recipes import stage_config


def numpy_adamw(params, gradients, rates, *, weight_decay, max_grad_norm, decayed):
    """The parameters after each update, in float64."""
    first = {name: np.zeros_like(p) for name, p in params.items()}
    second = {name: np.zeros_like(p) for name, p in params.items()}
    for step, (gradient, rate) in enumerate(zip(gradients, rates), start=1):
        norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
        for name, g in gradient.items():
            g = g * min(1, max_grad_norm / norm)
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
    optimizer = adamw(rates, weight_decay=0.3, max_grad_norm=1.0, decay_mask=decayed)
    expected = numpy_adamw(
        params,
        gradients,
        [0, 0.02 / 3, 0.04 / 3, 0.02, 0.02],
        weight_decay=0.3,
        max_grad_norm=1.0,
        decayed=decayed,
    )
    found = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    state = optimizer.init(found)
    for gradient, right in zip(gradients, expected):
        gradient = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), gradient)
        updates, state = optimizer.update(gradient, state, found)
        found = optax.apply_updates(found, updates)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, right)


@pytest.mark.parametrize("b2", [0.999, 0.95, 0.0])
def test_the_first_updates_are_those_of_pytorch(b2):
    """From 0, where float32 hides nothing: a bias correction from a rounded b2 is off by 6e-6."""
    torch = pytest.importorskip("torch", reason="AdamW is compared with PyTorch's")
    gradients = np.random.default_rng(1).normal(size=(8, 64)).astype(np.float32)
    theirs = torch.nn.Parameter(torch.zeros(64))
    reference = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, b2), weight_decay=0.1)
    ours, optimizer = (
        jnp.zeros(64),
        adamw(lambda _: 0.01, weight_decay=0.1, max_grad_norm=1e9, b2=b2),
    )
    state = optimizer.init(ours)
    for number, gradient in enumerate(gradients, start=1):
        theirs.grad = torch.from_numpy(gradient)
        reference.step()
        updates, state = optimizer.update(jnp.asarray(gradient), state, ours)
        ours = optax.apply_updates(ours, updates)
        np.testing.assert_allclose(ours, theirs.detach(), rtol=1e-6, atol=1e-6 * 0.01 * number)


# Parameters in half precision


HALF = [jnp.bfloat16, jnp.float16]


def rounded(exact: float, start: float, dtype, number: int = 2**16) -> np.ndarray:
    """So many parameters at `start`, after an update to `exact`."""
    params = jnp.full(number, start, dtype)
    change = jnp.full(number, jnp.float32(exact) - params.astype(jnp.float32)[0])
    change = round_change(change, params, rounding_keys(jax.random.key(3), params))
    found = optax.apply_updates(params, change)
    assert found.dtype == dtype
    return np.asarray(found, np.float64)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    "start, exact",
    [(1.0, 1.0001), (1.0, 0.9999), (-0.1, -0.10003), (0.5, 0.4999), (3.0, 100.3), (0.0, 1e-3)],
)
def test_rounding_is_right_on_average(dtype, start, exact):
    """One of the two neighbours, with a mean within four standard errors of the exact number."""
    found, exact = rounded(exact, start, dtype), float(np.float32(exact))
    below, above = np.unique(found)
    assert below < exact < above
    assert jnp.nextafter(dtype(below), dtype(above)) == dtype(above)
    share = (exact - below) / (above - below)
    error = (above - below) * np.sqrt(share * (1 - share) / found.size)
    assert abs(found.mean() - exact) < 4 * error


@pytest.mark.parametrize("dtype", HALF)
def test_a_number_that_half_precision_has_is_not_rounded(dtype):
    for exact in (0.0, 1.0, -0.375, 2.0**-10):
        np.testing.assert_array_equal(rounded(exact, 1.0, dtype, number=256), exact)


@pytest.mark.parametrize("dtype", HALF)
def test_numbers_that_are_not_finite_stay_so(dtype):
    assert np.isnan(rounded(np.nan, 1.0, dtype, number=256)).all()
    np.testing.assert_array_equal(rounded(-np.inf, 1.0, dtype, number=256), -np.inf)


def test_float32_beside_bfloat16_is_updated_as_alone():
    params = {"float32": jnp.ones(8), "bfloat16": jnp.ones(8, jnp.bfloat16)}
    gradients = jax.tree.map(lambda x: -jnp.ones_like(x), params)
    optimizer = adamw(lambda _: 1e-3, weight_decay=0.0, max_grad_norm=1e9)
    updates, state = optimizer.update(gradients, optimizer.init(params), params)
    one = {"float32": params["float32"]}
    alone, _ = optimizer.update({"float32": gradients["float32"]}, optimizer.init(one), one)
    np.testing.assert_array_equal(updates["float32"], alone["float32"])
    assert set(np.asarray(updates["bfloat16"])) <= {0, 2.0**-7}
    again, after = optimizer.update(gradients, state, params)
    assert (np.asarray(again["bfloat16"]) != np.asarray(updates["bfloat16"])).any()
    repeated, _ = optimizer.update(gradients, state, params)  # a state decides what comes next
    jax.tree.map(np.testing.assert_array_equal, again, repeated)
    assert int(after.count) == 2


def test_parameters_rows_and_seeds_have_random_numbers_of_their_own():
    params = {name: jnp.ones((2, 256), jnp.bfloat16) for name in ("a", "b")}
    gradients = jax.tree.map(lambda x: -jnp.ones_like(x), params)
    rows = []
    for seed in (0, 1):
        optimizer = adamw(lambda _: 2e-3, weight_decay=0.0, max_grad_norm=1e9, seed=seed)
        updates, _ = optimizer.update(gradients, optimizer.init(params), params)
        rows += [np.asarray(row, np.float32) for name in "ab" for row in updates[name]]
    assert len({row.tobytes() for row in rows}) == 8


def test_a_parameter_without_axes_is_rounded_too():
    param = jnp.ones((), jnp.bfloat16)
    optimizer = adamw(lambda _: 1e-3, weight_decay=0.0, max_grad_norm=1e9)
    updates, _ = optimizer.update(-param, optimizer.init(param), param)
    assert float(updates) in (0, 2.0**-7)


@pytest.mark.parametrize("size", [1, 2, 3, 7, None])
def test_slices_are_what_the_whole_is(size):
    """Also where they do not divide it, so that the last overlaps the one before."""
    x = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    seen = []

    def function(x, scale):
        seen.append(x.shape[0])
        return {"rows": x * scale[:, None], "sums": jnp.sum(x, axis=1)}

    found = jax.jit(lambda *arrays: in_slices(function, size, *arrays))(x, jnp.arange(7.0))
    np.testing.assert_allclose(found["rows"], x * np.arange(7.0)[:, None], rtol=1e-6)
    np.testing.assert_allclose(found["sums"], x.sum(1), rtol=1e-6)
    assert (size or 7) in seen


def test_small_updates_move_bfloat16_as_far_as_float32():
    """An update is a thousandth of the distance between two numbers at 1."""
    rng = np.random.default_rng(2)
    start, slope = np.ones(4096, np.float32), rng.choice([-1.0, 1.0], 4096).astype(np.float32)
    optimizer = adamw(lambda _: 4e-6, weight_decay=0.0, max_grad_norm=1.0)

    def moved(dtype):
        params = jnp.asarray(start, dtype)

        def update(_, carry):
            params, state = carry
            updates, state = optimizer.update(jnp.asarray(slope, dtype), state, params)
            return optax.apply_updates(params, updates), state

        carry = params, optimizer.init(params)
        params, state = jax.jit(lambda carry: jax.lax.fori_loop(0, 200, update, carry))(carry)
        assert params.dtype == dtype
        assert state.mu.dtype == state.nu.dtype == jnp.float32
        return -slope * (np.asarray(params, np.float32) - start)

    exact, found = moved(jnp.float32), moved(jnp.bfloat16)
    np.testing.assert_allclose(exact, 200 * 4e-6, rtol=3e-2)  # as float32 rounds at 1
    assert abs(found.mean() - exact.mean()) < 4 * found.std() / np.sqrt(found.size)


def test_gradients_in_half_precision_are_clipped_by_their_norm_in_float32():
    """Added up in bfloat16, 2,048 squares are another number."""
    gradient = jnp.full(2048, 0.11, jnp.bfloat16)
    optimizer = adamw(lambda _: 1.0, weight_decay=0.0, max_grad_norm=1.0)
    _, state = optimizer.update(gradient, optimizer.init(gradient), gradient)
    np.testing.assert_allclose(state.mu, 0.1 / np.sqrt(2048), rtol=1e-5)


def test_weight_decay_of_half_precision_is_right_on_average():
    """0.1 times 3 is 0.3008 in bfloat16."""
    params = jnp.full(2**16, 3.0, jnp.bfloat16)
    optimizer = adamw(lambda _: 1.0, weight_decay=0.1, max_grad_norm=1.0)
    updates, _ = optimizer.update(jnp.zeros_like(params), optimizer.init(params), params)
    error = float(updates.std()) / 256
    assert 0 < error < 1e-4 and abs(float(updates.mean()) + 0.3) < 4 * error


# Weight decay


def test_the_soft_prompt_is_decayed_where_no_mask_is_given():
    prompt = jnp.ones((2, 3))
    optimizer = adamw(lambda step: 0.1, weight_decay=0.5, max_grad_norm=1.0)
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


# Schedules


@pytest.mark.parametrize("style", SCHEDULES)
def test_warm_up_starts_at_0_and_is_linear(style):
    rates = schedule(style, 1e-3, total_steps=10**6, warmup_steps=10, min_lr=0.0)
    found = np.array([rates(step) for step in range(11)])
    np.testing.assert_allclose(found, 1e-4 * np.arange(11), rtol=1e-4)


@pytest.mark.parametrize("style", SCHEDULES)
def test_without_warm_up_the_first_update_has_the_whole_rate(style):
    np.testing.assert_allclose(schedule(style, 1e-3, total_steps=10)(0), 1e-3, rtol=1e-6)


def test_constant_stays_and_the_others_fall_to_the_least_rate():
    more = dict(total_steps=40, warmup_steps=4, min_lr=1e-5)
    steps = np.arange(4, 41)
    constant, cosine, noam = (jax.vmap(schedule(s, 1e-3, **more))(steps) for s in SCHEDULES)
    np.testing.assert_allclose(constant, 1e-3, rtol=1e-6)
    for falling in (cosine, noam):
        assert (np.diff(falling) < 0).all()
        np.testing.assert_allclose(falling[-1], 1e-5, rtol=1e-3)
    half = 1e-5 + (1e-3 - 1e-5) * np.array([0.5, np.sqrt(0.5)])
    np.testing.assert_allclose([cosine[20 - 4], noam[22 - 4]], half, rtol=1e-5)


def test_noam_stays_at_the_least_rate():
    rates = schedule("noam", 1e-3, total_steps=10, min_lr=1e-5)
    np.testing.assert_allclose([rates(10), rates(1000)], 1e-5, rtol=1e-5)


@pytest.mark.parametrize("preset, first", [("default", 0.0), ("faithful", 1e-3)])
def test_the_published_cosine_ignores_the_warm_up(preset, first):
    config = stage_config("kd", schedule="cosine", warmup_steps=5, learning_rate=1e-3, min_lr=1e-5)
    rates = build.learning_rate(config, 1e-3, 20, PRESETS[preset])
    np.testing.assert_allclose(rates(0), first, rtol=1e-6)
    cosine = schedule("cosine", 1e-3, total_steps=20, min_lr=1e-5)
    steps = np.arange(5, 21)  # after the warm-up all is as without
    np.testing.assert_allclose(jax.vmap(rates)(steps), jax.vmap(cosine)(steps), rtol=1e-6)
