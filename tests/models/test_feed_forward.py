"""Products of rows with the matrix of their group, and the experts that a token is sent to."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.models import CONFIGS, logits, random_model

from promptkd_jax.models.families.registry import from_hugging_face
from promptkd_jax.models.layers import feed_forward, layer_params
from promptkd_jax.models.layers.feed_forward import grouped_dot, route
from promptkd_jax.models.layers.quantization import QUANTIZE, quantize_kernels

SIZES = {  # rows of each group, and rows behind the last
    "even": ([3, 3, 3], 0),
    "some are empty": ([0, 5, 0, 0, 9, 0], 3),
    "one has all": ([0, 23, 0], 0),
    "none has any": ([0, 0], 4),
    "many small ones": ([1, 2, 1, 1, 3, 1, 1, 1], 5),
}


def problem(name):
    sizes, behind = SIZES[name]
    rng = np.random.default_rng(0)
    x = rng.normal(size=(sum(sizes) + behind, 6)).astype(np.float32)
    kernel = rng.normal(size=(len(sizes), 6, 10)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(kernel), jnp.asarray(sizes)


@pytest.mark.parametrize("tile", [1, 4, 256])
@pytest.mark.parametrize("name", SIZES)
def test_every_row_is_multiplied_with_the_matrix_of_its_group(monkeypatch, name, tile):
    """In value and in both gradients; JAX's own product is the definition."""
    monkeypatch.setattr(feed_forward, "MIN_TILE", tile)
    monkeypatch.setattr(feed_forward, "MAX_TILE", tile)
    x, kernel, sizes = problem(name)
    counts = jnp.arange(len(x))[:, None] < sizes.sum()  # those behind have no meaning
    cotangent = jnp.where(counts, jnp.cos(jnp.arange(len(x) * 10.0)).reshape(-1, 10), 0)

    def run(product):
        def masked(x, kernel):
            return jnp.where(counts, product(x, kernel, sizes), 0)

        value, back = jax.vjp(masked, x, kernel)
        return value, *back(cotangent)

    for found, expected in zip(run(grouped_dot), run(jax.lax.ragged_dot), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_rows_behind_the_last_group_reach_nothing():
    x, kernel, sizes = problem("some are empty")
    spoilt = x.at[-3:].set(jnp.nan)

    def loss(kernel, x):
        return jnp.sum(grouped_dot(x, kernel, sizes)[:-3] ** 2)

    for found, right in zip(*(jax.value_and_grad(loss)(kernel, y) for y in (spoilt, x))):
        np.testing.assert_array_equal(found, right)


def test_frozen_experts_have_no_gradient_computed():
    """Of a teacher behind a soft prompt only the input's gradient is asked for."""
    x, kernel, sizes = problem("even")

    def loss(x, kernel):
        return jnp.sum(grouped_dot(x, kernel, sizes) ** 2)

    def text(argnums) -> str:
        gradient = jax.jit(jax.grad(loss, argnums))
        return gradient.lower(x, kernel).compile().as_text()

    sum_of_products = "f32[3,6,10]{2,1,0} broadcast"  # where it would begin, as zeros
    assert sum_of_products in text((0, 1)) and sum_of_products not in text(0)


@pytest.mark.parametrize("rows, groups", [(1, 8), (64, 128), (4096, 8), (10**6, 4)])
def test_tiles_are_about_as_large_as_a_group(rows, groups):
    tile = feed_forward._tile(rows, groups)
    assert 8 <= tile <= 256 and tile & (tile - 1) == 0
    assert tile > rows // groups or tile == 256


def test_weights_are_shares_of_all_experts_or_of_the_chosen_ones():
    scores = jnp.log(jnp.asarray([[[0.1, 0.4, 0.2, 0.3]]])) + 7.0
    for renormalized, expected in ((False, [0.4, 0.3]), (True, [4 / 7, 3 / 7])):
        weights, chosen = route(scores, 2, renormalized)
        np.testing.assert_array_equal(chosen, [[[1, 3]]])
        np.testing.assert_allclose(weights, [[expected]], rtol=1e-6)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_the_instruction_of_a_tpu_gives_the_same(monkeypatch, name):
    model = random_model(name)
    expected = logits(model)
    monkeypatch.setattr(feed_forward, "grouped_dot", jax.lax.ragged_dot)
    renamed = model.decoder.config.replace(max_positions=65)  # compiled anew
    found = logits(model.replace(decoder=model.decoder.clone(config=renamed)))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_what_lies_behind_the_last_group_reaches_nothing_of_a_model(monkeypatch):
    """As a device has it whose experts are not asked for; neither in value nor in gradient."""
    model = random_model("gpt_oss")
    config, first = model.decoder.config, 3
    params = jax.tree.map(lambda x: jnp.asarray(x[0]), model.params["layers"]["experts"])
    own = [
        feed_forward.Linear(params[x]["kernel"][first:], params[x]["bias"][first:])
        for x in ("gate_up", "down")
    ]
    networks = feed_forward.Networks((own[0],), own[1])
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, config.width)), jnp.float32)
    weights, chosen = route(x[..., :6], 3, True)

    def gradients():
        def loss(x, weights, networks):
            how = networks, None, first
            mixed = feed_forward._mixed_on_device(config, x, weights, chosen, *how)
            return jnp.sum(mixed**2)

        return jax.value_and_grad(loss, argnums=(0, 1, 2))(x, weights, networks)

    right = gradients()
    plain = feed_forward.grouped_dot

    def without_group(x, sizes):
        return jnp.arange(len(x))[:, None] >= sizes.sum()

    @jax.custom_vjp
    def spoilt(x, kernel, sizes):
        return jnp.where(without_group(x, sizes), jnp.nan, plain(x, kernel, sizes))

    def forward(x, kernel, sizes):
        return spoilt(x, kernel, sizes), (x, kernel, sizes)

    def backward(residuals, d_y):
        x, kernel, sizes = residuals
        d_x, d_kernel = jax.vjp(lambda x, kernel: plain(x, kernel, sizes), x, kernel)[1](d_y)
        return jnp.where(without_group(x, sizes), jnp.nan, d_x), d_kernel, None

    spoilt.defvjp(forward, backward)
    monkeypatch.setattr(feed_forward, "grouped_dot", spoilt)
    jax.tree.map(np.testing.assert_array_equal, gradients(), right)
    assert not jnp.isnan(right[0])
    monkeypatch.setattr(feed_forward, "FEW", 8)
    monkeypatch.setattr(feed_forward, "MAX_TILE", 8)
    monkeypatch.setattr(feed_forward, "SPARE", 0.5)
    assert feed_forward.pairs_at_once(chosen.size, len(own[0].kernel) / 6) == 8
    assert np.count_nonzero(chosen >= first) > 8  # several turns
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(close, gradients(), right)


def networks_of(config, kind) -> feed_forward.Networks:
    rng = np.random.default_rng(0)
    number, width, inner = config.experts.num_experts, config.width, config.mlp_width

    def linear(*shape):
        kernel = jnp.asarray(rng.normal(0, 0.2, (number, *shape)), jnp.float32)
        bias = jnp.asarray(rng.normal(size=(number, shape[1])), jnp.float32)
        scale = None
        if kind:
            kernel, scale = quantize_kernels(kernel, QUANTIZE[kind], stacks=1)
        return feed_forward.Linear(kernel, bias if config.experts.bias else None, scale)

    widths = [2 * inner] if config.experts.interleaved else [inner, inner]
    networks = tuple(linear(width, each) for each in widths), linear(inner, width)
    return feed_forward.Networks(*networks)


@pytest.mark.parametrize(("spare", "turns"), [(1.25, {1, 2}), (0.5, {0, 1, 2, 4})])
@pytest.mark.parametrize("kind", [None, "int8"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_devices_say_together_what_one_says_that_has_all_experts(
    monkeypatch, name, kind, spare, turns
):
    """In value and in gradients, of 8 experts on 4 devices: of 90 pairs each has places for 32, or
    16, and those of the first expert, which every token has chosen, do not fit into one turn."""
    for constant, value in {"MAX_TILE": 8, "FEW": 8, "SPARE": spare}.items():
        monkeypatch.setattr(feed_forward, constant, value)
    hf_config = CONFIGS[name] | {"num_local_experts": 8, "num_experts_per_tok": 3}
    config = from_hugging_face(hf_config).replace(quantization=QUANTIZE[kind or "none"])
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(2, 15, config.width)), jnp.float32)
    scores = jnp.asarray(rng.normal(size=(2, 15, 8)), jnp.float32).at[..., 0].add(9)
    preferred = {1.25: 1, 0.5: 9}[spare]  # the second expert, and nobody chooses the last
    scores = scores.at[..., 1].add(preferred).at[..., 6:].add(1 - preferred)
    weights, chosen = route(scores, 3, True)
    places = feed_forward.pairs_at_once(chosen.size, 1 / 4)
    counts = [np.count_nonzero(chosen // 2 == device) for device in range(4)]
    assert {-(-count // places) for count in counts} == turns, counts
    networks = networks_of(config, kind)
    leaves, structure = jax.tree.flatten(networks)
    floats = [x for x in leaves if x.dtype != jnp.int8]

    def loss(inputs, number):
        x, weights, floats = inputs
        of = iter(floats)
        whole = structure.unflatten([x if x.dtype == jnp.int8 else next(of) for x in leaves])

        def said(first):
            own = jax.tree.map(lambda x: x[first : first + number], whole)
            return feed_forward._mixed_on_device(config, x, weights, chosen, own, None, first)

        return jnp.sum(jnp.sin(sum(said(first) for first in range(0, 8, number))))

    def run(number):
        return jax.jit(jax.value_and_grad(loss), static_argnums=1)((x, weights, floats), number)

    def close(found, right):
        rounding = 1e-4 if right.dtype == jnp.float32 else 2e-2  # of scales, in bfloat16
        top = np.abs(right).max()
        np.testing.assert_allclose(found, right, rtol=rounding, atol=rounding / 10 * top)

    jax.tree.map(close, run(2), run(8))


@pytest.mark.parametrize(
    ("pairs", "share", "places"),
    [
        (65_536, 1 / 4, 1.25 * 65_536 / 4),
        (66_432, 1 / 4, 82 * 256),  # 20,760 and what fills the last tile
        (65_536, 7 / 8, 65_536),
        (65_536, 1.0, 65_536),  # on one device
        (4_096, 1 / 16, 2_048),
        (512, 1 / 16, 512),
    ],
)
def test_a_device_has_places_for_its_share_of_the_pairs_and_a_quarter_more(pairs, share, places):
    assert feed_forward.pairs_at_once(pairs, share) == places


def test_gradients_of_biases_are_summed_in_float32():
    """In bfloat16, 256 + 1 is 256."""
    hf_config = CONFIGS["gpt_oss"] | {"num_local_experts": 2, "num_experts_per_tok": 1}
    config = from_hugging_face(hf_config | {"hidden_size": 8, "intermediate_size": 8})
    module = feed_forward.MixtureOfExperts(config)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 1024, 8)), jnp.float32)
    params = module.init(jax.random.key(0), x)["params"]

    def gradient(dtype):
        half = feed_forward.MixtureOfExperts(config.replace(dtype=dtype))

        def loss(params):
            return jnp.sum(half.apply({"params": params}, x.astype(dtype)).astype(jnp.float32))

        return jax.grad(loss)(params)["down"]["bias"]

    np.testing.assert_allclose(gradient("bfloat16"), gradient("float32"), rtol=0.02)


def test_rollouts_choose_experts_as_training_does():
    model = random_model("mixtral")
    half = model.decoder.clone(config=model.decoder.config.replace(dtype="bfloat16"))
    found = half.for_sampling(jax.tree.map(jnp.asarray, model.params))["layers"]["experts"]
    router = model.params["layers"]["experts"]["router"]["kernel"]
    np.testing.assert_array_equal(found["router"]["kernel"], router)
    assert found["gate"]["kernel"].dtype == jnp.bfloat16


@pytest.mark.parametrize("mlp_bias", [False, True])
def test_a_rollout_on_a_tpu_has_gate_and_up_as_one_kernel(monkeypatch, mlp_bias):
    """Where its parameters are a copy anyway; and computes the same. With the scan over layers for
    the prompt, and without it for a token."""
    model = random_model("llama", mlp_bias=mlp_bias)
    decoder = model.decoder.clone(config=model.decoder.config.replace(param_dtype="bfloat16"))
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), model.params)
    prompts, lengths = jnp.asarray([[1, 2, 3], [4, 5, 0]]), jnp.array([3, 2])

    def hidden(params):
        of_prompts, cache = decoder.prefill(params, prompts, lengths, None, 3, 2)
        return of_prompts, decoder.decode(params, prompts[:, 0], None, lengths, cache)[0]

    plain = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    monkeypatch.setattr(layer_params, "platform", lambda: "tpu")
    joined = decoder.for_sampling(params)
    kernel = joined["layers"]["mlp"]["gate_up"]["kernel"]
    assert joined["layers"]["mlp"].keys() == {"gate_up", "down"}
    config = decoder.config
    assert kernel.shape == (config.num_layers, config.width, 2, config.mlp_width)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
        *map(jax.jit(hidden), (joined, plain)),
    )
    whole = model.decoder.for_sampling(plain)  # float32, as it is kept: nothing is copied
    assert whole["layers"]["mlp"].keys() == {"gate", "up", "down"}


def test_experts_that_pad_others_have_no_share(monkeypatch):
    """Of 6 experts on 4 devices each has 2 places, and a third of them has all that are chosen."""
    config = from_hugging_face(CONFIGS["gpt_oss"] | {"num_local_experts": 6})
    config, shares = config.replace(tensor_parts=4), []
    assert config.padded.experts.num_experts == 8

    def pairs_at_once(pairs, share):
        shares.append(share)
        return pairs

    monkeypatch.setattr(feed_forward, "pairs_at_once", pairs_at_once)
    own = jax.tree.map(lambda x: x[:2], networks_of(config, None))
    x = jnp.ones((1, 4, config.width))
    weights, chosen = route(jnp.ones((1, 4, 6)), 2, True)
    feed_forward._mixed_on_device(config, x, weights, chosen, own, None, 0)
    assert shares == [2 / 6]


def test_answers_of_a_turn_are_added_up_in_float32(monkeypatch):
    """In bfloat16, 256 + 1 - 256 is 0."""
    monkeypatch.setattr(feed_forward, "MAX_TILE", 8)
    monkeypatch.setattr(feed_forward, "FEW", 8)
    hf_config = CONFIGS["mixtral"] | {"num_local_experts": 12, "num_experts_per_tok": 3}
    config = from_hugging_face(hf_config)
    answers = jnp.asarray([256, 1, -256], jnp.bfloat16)

    def answers_of(config, layer, k, pairs, inputs):
        order, expert = pairs
        return jnp.where(expert < 3, answers[order % k], 0)[:, None]

    monkeypatch.setattr(feed_forward, "_answers", answers_of)
    chosen = jnp.broadcast_to(jnp.arange(3), (1, 5, 3))
    x, weights = jnp.ones((1, 5, 1), jnp.bfloat16), jnp.ones((1, 5, 3), jnp.bfloat16)
    own = feed_forward.Linear(jnp.zeros((3, 1, 1)), None)
    networks = feed_forward.Networks((own, own), own)
    found = feed_forward._mixed_on_device(config, x, weights, chosen, networks, None, 0)
    np.testing.assert_array_equal(found, 1)


@pytest.mark.parametrize("changed", ["gate", "up", "gate up"])
@pytest.mark.parametrize("others", [("lora_a", "lora_b"), ("kernel_scale",)])
def test_gate_and_up_with_adapters_or_in_8_bits_stay_two(changed, others):
    mlp = {name: {"kernel": 0} for name in ("gate", "up", "down")}
    for name in changed.split():
        mlp[name] = dict.fromkeys(("kernel", *others), 0)
    assert feed_forward.with_gate_beside_up({"mlp": mlp}) == {"mlp": mlp}


def test_other_networks_stay_as_they_are():
    plain = {"mlp": {name: {"kernel": 0} for name in ("up", "down")}}
    assert feed_forward.with_gate_beside_up(plain) == plain
    assert feed_forward.with_gate_beside_up({"experts": {}}) == {"experts": {}}


def test_experts_are_read_out_of_those_of_all_layers():
    """Kernels of four layers, and the layer's own bias: as with the third layer's kernels."""
    config = from_hugging_face(CONFIGS["gpt_oss"])
    number, rng = config.experts.num_experts, np.random.default_rng(0)
    shapes = (config.width, 2 * config.mlp_width), (config.mlp_width, config.width)
    stacks = [jnp.asarray(rng.normal(size=(4, number, *shape)), jnp.float32) for shape in shapes]
    biases = [jnp.asarray(rng.normal(size=(number, out)), jnp.float32) for _, out in shapes]
    x = jnp.asarray(rng.normal(size=(3, 1, config.width)), jnp.float32)
    weights, chosen = route(x[..., :number], 2, True)

    def mixed(kernels, layer):
        inner, down = (feed_forward.Linear(*pair) for pair in zip(kernels, biases, strict=True))
        networks = feed_forward.Networks((inner,), down)
        return feed_forward._mixed(config, x, weights, chosen, networks, layer)

    expected = mixed([stack[2] for stack in stacks], None)
    np.testing.assert_allclose(mixed(stacks, 2), expected, rtol=1e-5, atol=1e-5)
    assert np.abs(mixed(stacks, 1) - expected).max() > 0.1
