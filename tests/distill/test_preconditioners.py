"""Adafactor, Adam in 8 bits and Muon: against published code, NumPy, and AdamW in float32; stacks
of layers against each layer alone, parameters that a mesh pads against those that it does not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from helpers.families import FAMILIES

from promptkd_jax.distill import optimizer as optimizer_module
from promptkd_jax.distill import preconditioners
from promptkd_jax.distill.optimizer import OPTIMIZERS, make_optimizer
from promptkd_jax.distill.preconditioners import (
    BLOCK,
    dequantize,
    matrices,
    orthogonalize,
    quantize,
)
from promptkd_jax.models.families.registry import from_hugging_face
from promptkd_jax.models.io.params import abstract_params

SHAPES = {
    "embed/embedding": (7, 6),
    "layers/attention/query/kernel": (2, 6, 3, 4),
    "layers/attention/query/bias": (2, 3, 4),
    "layers/attention/out/kernel": (2, 3, 4, 6),
    "layers/mlp/up/kernel": (2, 6, 40),
    "layers/experts/down/kernel": (2, 3, 4, 6),
    "layers/norm/scale": (2, 6),
}


def tree(leaves: dict):
    return traverse_util.unflatten_dict(leaves, sep="/")


def random_tree(seed: int, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return tree({path: rng.normal(size=s).astype(np.float32) for path, s in shapes.items()})


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 16, and 8 bits for all but the smallest parameters."""
    monkeypatch.setattr(preconditioners, "BLOCK", 16)
    monkeypatch.setattr(preconditioners, "MIN_SIZE", 30)


def directions(name, gradients, unpadded=None):
    """Of each gradient in turn, without clip, rate and decay, and the state after the last."""
    optimizer = make_optimizer(
        name, lambda _: -1.0, weight_decay=0.0, max_grad_norm=np.inf, unpadded=unpadded
    )
    update, state, found = jax.jit(optimizer.update), optimizer.init(gradients[0]), []
    for gradient in gradients:
        direction, state = update(gradient, state, gradient)
        found.append(direction)
    return found, state


def assert_close(found, expected, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), found, expected)


# Parameters as matrices


@pytest.mark.parametrize("family", FAMILIES)
def test_a_matrix_reads_what_its_layer_reads(family):
    """Width, heads or feed-forward units, whatever axes they are stored along."""
    config = from_hugging_face(FAMILIES[family])
    found = traverse_util.flatten_dict(matrices(abstract_params(config)), sep="/")
    heads, keys = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
    inner = config.mlp_width
    shapes = {
        "attention/query/kernel": (config.width, heads),
        "attention/key/kernel": (config.width, keys),
        "attention/out/kernel": (heads, config.width),
        "mlp/up/kernel": (config.width, inner),
        "mlp/down/kernel": (inner, config.width),
        "experts/down/kernel": (inner, config.width),
    }
    seen = 0
    for path, one in found.items():
        stack = (config.num_layers,) if path.startswith("layers/") else ()
        if "/experts/" in path and "router" not in path:
            stack += (config.experts.num_experts,)
        assert one.stack == stack, path
        assert one.is_vector == path.endswith(("bias", "scale", "sinks")), path
        assert one.own == one.shape, path
        if expected := shapes.get(path.removeprefix("layers/")):
            assert one.shape == expected, path
            seen += 1
    assert seen >= 4


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_stack_of_layers_is_each_layer_alone(name, small_blocks):
    def layer(parameters, index):
        return jax.tree.map(lambda x: x[index : index + 1], parameters["layers"])

    gradients = [random_tree(seed) for seed in range(3)]
    together, _ = directions(name, gradients)
    for index in range(2):
        own = [{"layers": layer(gradient, index)} for gradient in gradients]
        alone, _ = directions(name, own)
        for found, expected in zip(alone, together):
            assert_close(found["layers"], layer(expected, index), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_padding_changes_nothing_and_stays_0(name, small_blocks):
    """As a mesh with three devices along `tensor` would pad (see `DecoderConfig.padded`)."""
    padded = SHAPES | {
        "embed/embedding": (9, 6),
        "layers/attention/query/kernel": (2, 6, 6, 4),
        "layers/attention/query/bias": (2, 6, 4),
        "layers/attention/out/kernel": (2, 6, 4, 6),
        "layers/mlp/up/kernel": (2, 6, 50),
        "layers/experts/down/kernel": (2, 6, 4, 6),
    }

    def pad(path, x):
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        return np.pad(x, [(0, more - own) for own, more in zip(x.shape, padded[path])])

    def cut(found, expected):
        assert all(more >= own for more, own in zip(found.shape, expected.shape))
        inside = tuple(map(slice, expected.shape))
        assert not np.any(np.asarray(found.at[inside].set(0)))
        return found[inside]

    gradients = [random_tree(seed) for seed in range(3)]
    expected = directions(name, gradients, gradients[0])
    longer = [jax.tree.map_with_path(pad, gradient) for gradient in gradients]
    found = directions(name, longer, gradients[0])
    found = jax.tree.map(cut, found, expected)
    assert_close(found, expected, rtol=2e-5, atol=1e-6)


# Adafactor


def test_adafactor_of_a_matrix_is_that_of_optax():
    gradients = [{"embed": {"embedding": 3**seed * x}} for seed, x in enumerate(random_matrices())]
    found, _ = directions("adafactor", gradients)
    reference = optax.chain(
        optax.scale_by_factored_rms(min_dim_size_to_factor=1), optax.clip_by_block_rms(1.0)
    )
    state = reference.init(gradients[0])
    for gradient, ours in zip(gradients, found):
        theirs, state = reference.update(gradient, state, gradient)
        assert_close(ours, theirs, rtol=1e-5)
    assert np.sqrt(np.mean(np.square(found[-1]["embed"]["embedding"]))) == pytest.approx(
        1
    )  # clipped


def random_matrices(count: int = 4, shape=(5, 9)):
    rng = np.random.default_rng(1)
    return rng.normal(size=(count, *shape)).astype(np.float32)


def test_the_second_moment_of_a_gradient_of_rank_1_is_exact():
    """Where squares are an outer product, factors lose nothing: the first update is the sign."""
    gradient = np.outer([1.0, -2.0, 30.0], [0.1, 5.0]).astype(np.float32)
    (found,), _ = directions("adafactor", [{"lm_head": gradient}])
    np.testing.assert_allclose(found["lm_head"], np.sign(gradient), rtol=1e-5)


def test_adafactor_leaves_what_has_no_gradient():
    gradients = [{"lm_head": jnp.zeros((3, 4)), "norm": {"scale": jnp.zeros(4)}}] * 2
    found, _ = directions("adafactor", gradients)
    assert not any(map(np.any, jax.tree.leaves(found)))


# Muon


def test_orthogonalize_keeps_singular_vectors_and_makes_their_values_one():
    rng = np.random.default_rng(2)
    left, right = (np.linalg.qr(rng.normal(size=(n, 6)))[0] for n in (6, 9))
    values = np.array([5.0, 2.0, 1.0, 0.5, 0.3, 0.1])
    for x in ((left * values) @ right.T, ((left * values) @ right.T).T):
        u, _, v = np.linalg.svd(x, full_matrices=False)
        found = u.T @ np.asarray(orthogonalize(jnp.asarray(x, jnp.float32))) @ v.T
        np.testing.assert_allclose(found, np.diag(np.diag(found)), atol=1e-4)
        assert (np.diag(found) > 0.68).all() and (np.diag(found) < 1.2).all()


def test_muon_is_that_of_pytorch():
    """Whose iteration computes in bfloat16."""
    torch = pytest.importorskip("torch", reason="Muon is compared with PyTorch's")
    shape = (2, 12, 20)
    gradients = random_matrices(5, shape)
    theirs = [torch.nn.Parameter(torch.zeros(shape[1:])) for _ in range(2)]
    reference = torch.optim.Muon(
        theirs, lr=1.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw", momentum=0.95
    )
    as_kernels = [{"layers": {"mlp": {"up": {"kernel": g}}}} for g in gradients]
    found, _ = directions("muon", as_kernels)
    for gradient, ours in zip(gradients, found):
        before = torch.stack([x.detach().clone() for x in theirs])
        for parameter, own in zip(theirs, gradient):
            parameter.grad = torch.from_numpy(own)
        reference.step()
        moved = before - torch.stack([x.detach() for x in theirs])
        ours = ours["layers"]["mlp"]["up"]["kernel"]
        assert np.linalg.norm(ours - moved.numpy()) < 0.03 * np.linalg.norm(ours)


def test_muon_leaves_embeddings_norms_and_biases_to_adam():
    gradients = [random_tree(seed) for seed in range(3)]
    found, _ = directions("muon", gradients)
    adam, _ = directions("adamw", gradients)
    for ours, theirs in zip(found, adam):
        ours, theirs = (traverse_util.flatten_dict(x, sep="/") for x in (ours, theirs))
        same = {path for path in ours if np.array_equal(ours[path], theirs[path])}
        hidden = {path for path in SHAPES if path.startswith("layers/") and "kernel" in path}
        assert same == set(SHAPES) - hidden


# 8 bits


def numpy_codes(x: np.ndarray, top: int, octaves: int, threshold: float):
    """Codes and scales by a table of all values of a code, in float64."""
    table = np.concatenate([[0], 2 ** (octaves * (np.arange(1, top + 1) - top) / (top - 1))])
    codes, scales = np.zeros(x.shape, int), np.zeros((*x.shape[:-1], -(-x.shape[-1] // BLOCK)))
    for start in range(0, x.shape[-1], BLOCK):
        block = x[..., start : start + BLOCK].astype(np.float64)
        scale = np.abs(block).max(-1)
        ratio = np.abs(block) / scale[..., None]
        below = np.clip(np.searchsorted(table, ratio, side="right") - 1, 0, top - 1)
        way = (ratio - table[below]) / (table[below + 1] - table[below])
        code = below + (way > threshold)
        if top == 255:
            code = np.where(block > 0, np.maximum(code, 1), 0)
        codes[..., start : start + BLOCK] = code * np.sign(block)
        scales[..., start // BLOCK] = scale
    return codes, scales, table


@pytest.mark.parametrize("dtype, top, octaves", [(jnp.int8, 127, 16), (jnp.uint8, 255, 32)])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.9])
def test_codes_are_those_of_a_table(dtype, top, octaves, threshold):
    rng = np.random.default_rng(3)
    x = (rng.normal(size=(3, 600)) * 10.0 ** rng.uniform(-6, 0, (3, 600))).astype(np.float32)
    x[0, :7] = 0
    x = x if dtype == jnp.int8 else np.square(x)
    codes, scales, table = numpy_codes(x, top, octaves, threshold)
    found = quantize(jnp.asarray(x), dtype, threshold)
    assert found.codes.dtype == dtype
    np.testing.assert_allclose(found.scales, scales, rtol=1e-7)
    apart = np.abs(np.asarray(found.codes, int) - codes)  # float32 may fall on the other side
    assert apart.max() <= 1 and apart.mean() < 2e-3
    values = np.sign(codes) * table[np.abs(codes)] * np.repeat(scales, BLOCK, -1)[:, :600]
    np.testing.assert_allclose(np.asarray(dequantize(found))[apart == 0], values[apart == 0], 1e-5)
    again = quantize(dequantize(found), dtype, 0.5)  # values of codes stay
    jax.tree.map(np.testing.assert_array_equal, again.codes, found.codes)


def test_a_small_second_moment_beside_a_large_one_is_not_0():
    v = jnp.asarray([1.0, 1e-30, 1e-12, 0.0])
    found = np.asarray(dequantize(quantize(v, jnp.uint8, 0.99)))
    assert (found[1:3] > 0).all() and found[3] == 0


def test_rounding_of_a_moment_is_right_over_many_updates():
    """A moment that moves by a hundredth of the distance between two codes an update."""
    optimizer = make_optimizer("adamw_8bit", lambda _: 0.0, weight_decay=0.0, max_grad_norm=np.inf)
    shape = (16, 256)
    gradient = {"lm_head": jnp.full(shape, 0.5).at[:, 0].set(100.0)}
    start = {"lm_head": jnp.full(shape, 1.0).at[:, 0].set(100.0)}
    state = optimizer.init(gradient)
    state = state._replace(
        mu=jax.tree.map(lambda x: quantize(x, jnp.int8), start),
        nu=jax.tree.map(lambda x: quantize(x**2, jnp.uint8), start),
    )

    @jax.jit
    def after(state, updates):
        return jax.lax.fori_loop(
            0, updates, lambda _, s: optimizer.update(gradient, s, gradient)[1], state
        )

    for updates in (300, 1500):
        found = dequantize(after(state, updates).nu["lm_head"])[:, 1:]
        exact = 0.25 + 0.75 * 0.999**updates
        np.testing.assert_allclose(found, exact, rtol=0.1)  # about the distance of two codes
        nearest = dequantize(state.nu["lm_head"])[:, 1:]  # where rounding to nearest would stay
        assert np.all(np.abs(nearest / exact - 1) > 0.2)


def test_8_bits_learn_like_float32():
    """A regression on outputs that differ in size by 100, as gradients of a block then do."""
    rng = np.random.default_rng(4)
    sizes = 10.0 ** rng.uniform(-2, 0, 80)
    inputs = jnp.asarray(rng.normal(size=(512, 64)), jnp.float32)
    teacher = jnp.asarray(rng.normal(size=(64, 80)) * 4, jnp.float32)
    batches, start = rng.integers(0, 512, (300, 32)), {"lm_head": jnp.zeros((64, 80))}

    def loss(params, rows):
        return jnp.mean((sizes * (inputs[rows] @ (params["lm_head"] - teacher))) ** 2)

    @functools.partial(jax.jit, static_argnums=0)
    def curve(name):
        optimizer = make_optimizer(name, lambda _: 0.03, weight_decay=0.0, max_grad_norm=1e9)

        def update(carry, rows):
            params, state = carry
            value, gradient = jax.value_and_grad(loss)(params, rows)
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(update, (start, optimizer.init(start)), batches)[1]

    exact, found = (
        np.asarray(curve(name)).reshape(-1, 20).mean(1) for name in ("adamw", "adamw_8bit")
    )
    assert exact[-1] < 0.1 * exact[0]  # there is something to learn
    np.testing.assert_allclose(found, exact, rtol=0.05)
    assert np.all(found != exact)


# In slices


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_update_in_slices_is_that_of_whole_parameters(name, dtype, small_blocks, monkeypatch):
    """A layer at a time, and three rows of seven, where a preconditioner is not elementwise and
    allows it; random numbers of the rounding included."""
    params = optax.tree.cast(random_tree(9), dtype)
    gradients = [optax.tree.cast(random_tree(seed), dtype) for seed in range(2)]

    def after(params):
        optimizer = make_optimizer(name, lambda _: 1e-2, weight_decay=0.1, max_grad_norm=1.0)
        state, update = optimizer.init(params), jax.jit(optimizer.update)
        for gradient in gradients:
            updates, state = update(gradient, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    sizes, slice_size = set(), optimizer_module._slice_size

    def recorded(*arguments):
        sizes.add(slice_size(*arguments))
        return slice_size(*arguments)

    monkeypatch.setattr(optimizer_module, "_slice_size", recorded)
    expected = after(params)
    assert sizes == {None}
    sizes.clear()
    monkeypatch.setattr(optimizer_module, "SLICE", 20)
    found = after(params)
    expected_sizes = {"adamw": {None}, "adamw_8bit": {None, 1, 3}}.get(name, {None, 1})
    assert sizes == expected_sizes
    # Products in another order may round to the other neighbour, and to another code.
    for one, other in zip(*map(jax.tree.leaves, (found, expected))):
        apart = ~np.isclose(*(np.asarray(x, np.float32) for x in (one, other)), 1e-5, 1e-6)
        assert apart.mean() < 0.02


def test_an_update_in_slices_needs_less_memory(monkeypatch):
    """Whole, moments of 8 bits cost 21 bytes a parameter in float32."""
    monkeypatch.setattr(optimizer_module, "SLICE", 2**12)
    kernel = jax.ShapeDtypeStruct((32, 64, 128), jnp.float32)
    params = {"layers": {"mlp": {name: {"kernel": kernel} for name in ("up", "gate")}}}
    params["embed"] = {"embedding": jax.ShapeDtypeStruct((2000, 128), jnp.float32)}
    optimizer = make_optimizer("adamw_8bit", lambda _: 1e-2, weight_decay=0.1, max_grad_norm=1.0)

    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    shapes = params, jax.eval_shape(optimizer.init, params), params
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*shapes).compile()
    size = sum(x.size for x in jax.tree.leaves(params))
    assert compiled.memory_analysis().temp_size_in_bytes < 10 * size


# What each of them keeps, and what all share


BYTES = {
    "adamw": 8,
    "adamw_8bit": 2 + 2 * 4 / BLOCK,
    "muon": 4,
    "adafactor": 4 * (1 / 256 + 1 / 512),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_states_have_their_bytes_and_keep_their_shapes(name, dtype):
    kernel = jax.ShapeDtypeStruct((3, 256, 512), dtype)
    params = {"layers": {"mlp": {"up": {"kernel": kernel}, "down": {"bias": kernel}}}}
    params["layers"]["mlp"]["down"]["bias"] = jax.ShapeDtypeStruct((3, 256), dtype)
    optimizer = make_optimizer(name, lambda _: 1.0, weight_decay=0.1, max_grad_norm=1.0)
    before = jax.eval_shape(optimizer.init, params)
    _, after = jax.eval_shape(optimizer.update, params, before, params)
    assert jax.tree.structure(before) == jax.tree.structure(after)
    assert jax.tree.leaves(before) == jax.tree.leaves(after)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(before))
    vectors = 3 * 256 * (4 if name == "adafactor" else 8)
    assert size == BYTES[name] * kernel.size + vectors + 4  # and the count


LAYER = {"layers/mlp/up/kernel": (1, 64, 80), "layers/norm/scale": (1, 80)}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_clip_rate_and_decay_mean_the_same_for_all(name):
    params, gradients = random_tree(0, LAYER), random_tree(1, LAYER)
    mask = {"layers": {"mlp": {"up": {"kernel": True}}, "norm": {"scale": False}}}
    optimizer = make_optimizer(
        name,
        lambda count: jnp.where(count == 0, 0.0, 0.1),
        weight_decay=0.5,
        max_grad_norm=1.0,
        decay_mask=mask,
    )
    update = jax.jit(optimizer.update)
    still, state = update(gradients, optimizer.init(params), params)
    assert not any(map(np.any, jax.tree.leaves(still)))  # the first rate is 0
    moved, _ = update(gradients, state, params)
    ten_times, _ = update(jax.tree.map(lambda x: 10 * x, gradients), state, params)
    assert_close(ten_times, moved, rtol=1e-4, atol=1e-6)  # both are clipped to a norm of 1
    _, state = update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    decayed, _ = update(jax.tree.map(jnp.zeros_like, params), state, params)
    decayed = decayed["layers"]
    kernel = params["layers"]["mlp"]["up"]["kernel"]
    np.testing.assert_allclose(decayed["mlp"]["up"]["kernel"], -0.1 * 0.5 * kernel, rtol=1e-6)
    assert not np.any(decayed["norm"]["scale"])


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "adamw"])
def test_small_updates_move_bfloat16_as_far_as_float32(name):
    """Each is less than a hundredth of the distance between two numbers at 1."""
    gradient = random_tree(2, LAYER)
    optimizer = make_optimizer(name, lambda _: 1e-5, weight_decay=0.0, max_grad_norm=1.0)

    def moved(dtype):
        start = jax.tree.map(lambda x: jnp.ones(x.shape, dtype), gradient)
        slope = optax.tree.cast(gradient, dtype)

        def update(_, carry):
            params, state = carry
            updates, state = optimizer.update(slope, state, params)
            return optax.apply_updates(params, updates), state

        carry = start, optimizer.init(start)
        params, _ = jax.jit(lambda carry: jax.lax.fori_loop(0, 100, update, carry))(carry)
        return np.asarray(params["layers"]["mlp"]["up"]["kernel"], np.float64) - 1

    exact, found = moved(jnp.float32), moved(jnp.bfloat16)
    share = np.sum(found * exact) / np.sum(exact**2)
    error = found.std() / np.sqrt(np.sum(exact**2))
    assert abs(share - 1) < 4 * error < 0.5
    assert np.mean(found != 0) > 0.02
