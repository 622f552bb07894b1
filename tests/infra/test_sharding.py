"""Every parameter has its place on the mesh, and where it lies does not change the numbers."""

import dataclasses
import functools
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import devices, environment
from flax import traverse_util
from helpers.families import FAMILIES, GPT2
from helpers.tiny import equations
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from promptkd_jax.data.batch import Batch, Responses
from promptkd_jax.distill.losses.chunked_loss import linear_loss
from promptkd_jax.distill.losses.losses import cross_entropy
from promptkd_jax.distill.optimizer import adamw, make_optimizer
from promptkd_jax.distill.state import Optimizers, init_state
from promptkd_jax.distill.targets import empty_target_batch
from promptkd_jax.distill.teacher import lazy_logits_and_states
from promptkd_jax.infra.errors import ConfigError
from promptkd_jax.infra.sharding import (
    AXES,
    ROWS,
    axis_size,
    constrain,
    make_mesh,
    platform,
    shardings,
    spec,
)
from promptkd_jax.models.decoder import REMAT, Decoder
from promptkd_jax.models.families.registry import from_hugging_face
from promptkd_jax.models.io.export import to_hugging_face
from promptkd_jax.models.io.params import abstract_params, pad
from promptkd_jax.models.language_model import LazyLogits
from promptkd_jax.models.layers.quantization import QUANTIZE
from promptkd_jax.models.sampler import row_keys, sample
from promptkd_jax.models.sampling_rules import Sampling

P = PartitionSpec


def flat(tree) -> dict:
    return traverse_util.flatten_dict(tree, sep="/")


def params(family: str):
    return abstract_params(from_hugging_face(FAMILIES[family]))


def mesh(*sizes: int) -> AbstractMesh:
    """A mesh of devices that nobody has."""
    return AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_of_every_family_has_a_rule(family):
    """Matrices are cut along `fsdp` and `tensor`, layers and single vectors along nothing."""
    for path, leaf in flat(params(family)).items():
        found = spec(path)
        assert len(found) <= leaf.ndim, path
        if "router" in path or path.startswith("project_"):
            assert found == P(), path
        elif path.endswith("kernel") or path in ("embed/embedding", "lm_head"):
            assert sorted(filter(None, found)) == ["fsdp", "tensor"], path
        if path.startswith("layers/") and len(found):
            assert found[0] is None, path
        if path.endswith(("scale", "out/bias", "mlp/down/bias")):
            assert found == P(), path
    placed = flat(shardings(params(family), mesh(2, 2, 2)))
    assert {path: where.spec for path, where in placed.items()} == {
        path: spec(path) for path in placed
    }


def test_optimizer_moments_lie_where_their_parameters_do():
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = jax.eval_shape(
        lambda student: init_state(
            {"student": student, "soft_prompt": jnp.zeros((3, 16))},
            Optimizers(optimizer, optimizer),
            jax.random.key(0),
            pending=empty_target_batch(4, 6),
        ),
        params("llama"),
    )
    placed = shardings(state, mesh(1, 2, 2))
    moments = placed.optimizers["student"][1][0]
    for tree in (moments.mu, moments.nu):
        assert flat(tree) == flat(placed.student)
    assert placed.soft_prompt.spec == placed.optimizers["soft_prompt"][1][0].mu.spec == P()
    assert {place.spec for place in jax.tree.leaves(placed.pending)} == {P(ROWS)}
    assert placed.key.spec == placed.step.spec == moments.count.spec == P()


def test_codes_lie_where_their_parameters_do_and_scales_where_blocks_divide():
    params = {"layers": {"mlp": {"up": {"kernel": jnp.zeros((2, 64, 768))}}}}
    params["layers"]["mlp"]["down"] = {"kernel": jnp.zeros((2, 768, 1024))}

    def placed(name):
        optimizer = make_optimizer(name, lambda _: 1.0, weight_decay=0.1, max_grad_norm=1.0)
        return shardings(jax.eval_shape(optimizer.init, params), mesh(1, 2, 2))

    moments = placed("adamw_8bit").mu
    up, down = (moments["layers"]["mlp"][name]["kernel"] for name in ("up", "down"))
    assert up.codes.spec == P(None, "fsdp", "tensor")
    assert up.scales.spec == P(None, "fsdp", None)  # 3 blocks
    assert down.codes.spec == down.scales.spec == P(None, "tensor", "fsdp")
    factors = placed("adafactor").nu
    assert {place.spec for place in jax.tree.leaves(factors)} == {P()}


def test_a_parameter_without_a_rule_stops_the_run():
    with pytest.raises(ValueError, match="no sharding rule covers the parameter 'layers/gate'"):
        spec("layers/gate")
    with pytest.raises(ValueError, match="'student/adapter/kernel'"):
        shardings({"student": {"adapter": {"kernel": jnp.zeros((2, 2))}}}, mesh(1, 1, 1))


def test_a_rule_ends_where_the_path_ends():
    for path in ("lm_head/scale2", "xlm_head", "embed/embedding/extra", "layers/mlp/upper/kernel"):
        with pytest.raises(ValueError, match=path):
            spec(path)


def test_an_axis_that_does_not_divide_is_named():
    says = (
        r"parameter layers/attention/out/kernel \(2, 4, 4, 16\): 4 is not divisible by the 8 "
        "devices of mesh axis 'tensor'"
    )
    with pytest.raises(ValueError, match=says):
        shardings(params("llama"), mesh(1, 1, 8))
    with pytest.raises(ValueError, match=r"embed/embedding .*: 16 is not .* 3 .* axis 'fsdp'"):
        shardings(params("gpt2"), mesh(1, 3, 1))


def test_mesh_of_one_device():
    found = make_mesh({"data": -1, "fsdp": 1, "tensor": 1})
    assert dict(found.shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    assert found.axis_types == (AxisType.Auto,) * 3


@pytest.mark.parametrize("sizes", [(2, 1, 1), (-1, 1, 2), (-1, -1, 1), (0, 1, 1), (-1, 0, 1)])
def test_sizes_that_do_not_make_the_devices(sizes):
    says = f"config.mesh: data={sizes[0]} x fsdp={sizes[1]} x tensor={sizes[2]} does not make 1 dev"
    with pytest.raises(ValueError, match=says):
        make_mesh(dict(zip(AXES, sizes)))


@dataclasses.dataclass(frozen=True)
class Chip:
    """What `make_mesh` looks at; TPU chips of two slices are not to be had here."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "cpu"
    device_kind: str = "chip"


def test_slices_are_joined_along_data():
    chips = [Chip(i, i // 4) for i in range(8)]
    for sizes in ((2, 4, 1), (4, 1, 2), (-1, 2, 2)):
        found = make_mesh(dict(zip(AXES, sizes)), chips)
        for along_data in np.array_split(found.devices, 2):
            assert len({chip.slice_index for chip in along_data.flat}) == 1, sizes
    with pytest.raises(ConfigError, match="config.mesh.data: 1 is not a multiple of the 2 slices"):
        make_mesh({"data": 1, "fsdp": 8, "tensor": 1}, chips)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("cpu", "cpu"), ("TPU v5 lite", "tpu"), ("TPU7x", "tpu"), ("NVIDIA H100 80GB HBM3", "gpu")],
)
def test_the_platform_is_that_of_the_mesh_in_context(kind, expected):
    chips = [Chip(i, 0, platform=expected, device_kind=kind) for i in range(2)]
    mesh = jax.sharding.Mesh(np.array(chips).reshape(1, 2, 1), AXES)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        assert platform() == expected
    assert platform() == jax.default_backend()


def test_devices_of_a_node_are_neighbours():
    chips = [Chip(i, 0, process_index=i // 4) for i in range(8)]
    found = make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, chips)
    for along_data in found.devices:
        assert len({chip.process_index for chip in along_data.flat}) == 1


def traced_update(config, *, trained: bool = True):
    """The equations of the gradient of all parameters, or of a soft prompt alone, on a mesh of
    1 x 4 x 2 devices."""
    chips = [Chip(i, 0, device_kind="cpu") for i in range(8)]
    mesh = make_mesh({"data": 1, "fsdp": 4, "tensor": 2}, chips)
    tokens = jax.ShapeDtypeStruct((8, 16), jnp.int32)

    prefix = jax.ShapeDtypeStruct((2, config.embedding_width), jnp.float32)

    def loss(params, prefix, tokens):
        return jnp.sum(Decoder(config).hidden_states(params, tokens, prefix).astype(jnp.float32))

    gradient = jax.grad(loss, argnums=0 if trained else 1)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.make_jaxpr(gradient)(abstract_params(config), prefix, tokens)
    return [equation for equation, _ in equations(traced)]


def layer_kernels(config) -> dict[str, tuple[int, ...]]:
    """Shapes of the kernels of all projections in layers, by their paths."""
    found = flat(abstract_params(config))
    projections = [x for x in found if x.startswith("layers/") and x.endswith("/kernel")]
    return {x: found[x].shape for x in projections if "/experts/" not in x}


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_multiply_with_kernels_that_fsdp_does_not_cut(family):
    config = from_hugging_face(FAMILIES[family]).replace(tensor_parts=2)
    said = {
        (one.invars[0].aval.shape, tuple(one.params["sharding"].spec))
        for one in traced_update(config)
        if one.primitive.name == "sharding_constraint"
    }
    for path, shape in layer_kernels(config).items():
        whole = [None if axis == "fsdp" else axis for axis in spec(path)[1:]]
        whole = [a if a and shape[1 + i] % 2 == 0 else None for i, a in enumerate(whole)]
        assert any(s == shape[1:] and [*p, *[None] * 9][: len(s)] == whole for s, p in said), path


@pytest.mark.parametrize("remat", REMAT)
@pytest.mark.parametrize("quantize", [None, *QUANTIZE])
def test_no_gathered_kernel_is_kept_for_the_backward_pass(quantize, remat):
    """Kept, those of all layers would be the whole model on every device."""
    config = from_hugging_face(FAMILIES["llama"])
    config = config.replace(tensor_parts=2, remat=remat, dtype="bfloat16")
    kernels = set(layer_kernels(config).values())
    if quantize:  # or "none", of a frozen model
        config = config.replace(quantization=QUANTIZE[quantize])
    update = traced_update(config, trained=quantize is None)
    forward, *_ = (x for x in update if x.primitive.name == "scan")
    kept = {x.aval.shape for x in forward.outvars}
    assert kept  # of every layer, its input at least
    assert not kept & kernels


@pytest.mark.parametrize(
    ("kind", "vocabulary", "cut"),
    [
        ("TPU v5 lite", 34, (None, "tensor")),
        ("TPU v5 lite", 33, ("tensor", None)),
        ("cpu", 33, (None, "tensor")),
    ],
)
def test_on_a_tpu_a_loss_deals_out_positions_where_tensor_does_not_divide_the_vocabulary(
    kind, vocabulary, cut
):
    """Of an uneven vocabulary its compiler would gather all logits of every block."""
    chips = [Chip(i, 0, platform=kind[:3].lower(), device_kind=kind) for i in range(8)]
    mesh = make_mesh({"data": 1, "fsdp": 4, "tensor": 2}, chips)
    shapes = (4, 9, 4), (vocabulary, 4), (4, 9)  # 9 positions on each device, one block
    hidden, head, mask = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)

    def loss(hidden, head, mask):
        labels = jnp.zeros(mask.shape, jnp.int32)
        return linear_loss([cross_entropy], LazyLogits(hidden, head), [labels], mask)[0]

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(hidden, head, mask)
    said = {
        (one.invars[0].aval.shape[-1], tuple(one.params["sharding"].spec))
        for one, _ in equations(traced)
        if one.primitive.name == "sharding_constraint"
    }
    assert (vocabulary, (ROWS, *cut)) in said  # logits
    heads = {spec for width, spec in said if width == 4 and len(spec) == 2}
    assert heads == {(cut[1], None)}  # the head, and its gradient


def test_fewer_grouped_heads_than_devices_stay_whole():
    few = mesh(1, 1, 4)
    placed = flat(shardings(params("llama_biases"), few))
    for name in ("key", "value"):
        assert placed[f"layers/attention/{name}/kernel"].spec == P(None, "fsdp", None, None)
        assert placed[f"layers/attention/{name}/bias"].spec == P(None, None, None)
    assert placed["layers/attention/query/kernel"].spec == spec("layers/attention/query/kernel")


PADDED = {  # their own sizes, and those for `tensor` = 4
    "gpt2": (
        GPT2 | {"model_type": "gpt2", "vocab_size": 33, "n_head": 1, "n_inner": 21},
        (36, 4, 4, 24),
    ),
    "llama_biases": (
        FAMILIES["llama_biases"]
        | {"vocab_size": 31, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 4},
        (32, 8, 4, 24),
    ),
    "qwen3": (
        FAMILIES["qwen3"]
        | {
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "tie_word_embeddings": True,
        },
        (32, 12, 4, 24),
    ),
    "gpt_oss": (
        FAMILIES["gpt_oss"]
        | {"num_attention_heads": 6, "num_key_value_heads": 3, "vocab_size": 31}
        | {"num_local_experts": 6},
        (32, 8, 4, 24),
    ),
    "olmo2": (
        FAMILIES["olmo2"] | {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 4},
        (32, 8, 4, 24),
    ),
}


@pytest.mark.parametrize("family", PADDED)
def test_padding_computes_what_the_model_does_and_stays_zero(family):
    """Hidden states, what is seen on the way, samples, files, and an update with weight decay."""
    hf_config, sizes = PADDED[family]
    config = from_hugging_face(hf_config)
    assert config.padded == config and config.padding == ""
    wide = config.replace(tensor_parts=4)
    found = wide.padded
    assert (found.vocab_size, found.num_heads, found.num_kv_heads, found.mlp_width) == sizes
    assert f"heads {config.num_heads} to {sizes[1]}" in wide.padding
    assert shardings(abstract_params(wide), mesh(1, 1, 4))
    rng = np.random.default_rng(0)
    own = jax.tree.map(
        lambda x: np.asarray(rng.normal(0.1, 0.3, x.shape), x.dtype), abstract_params(config)
    )
    tokens = jnp.asarray(rng.integers(0, config.vocab_size, (2, 7)))
    lengths = jnp.array([7, 4])
    where = Responses(jnp.array([[2, 3], [1, 2]]), tokens[:, :2], jnp.ones((2, 2)))
    taps = [("queries", 1), ("keys", 0), ("values", 1), ("hidden", 0)]

    def loss(params, config):
        see = Batch(tokens, lengths, lengths)
        linear, states = lazy_logits_and_states(
            Decoder(config), params, see, where, config.vocab_size, taps=taps
        )
        target = jnp.ones((2, 2), jnp.int32)
        total, _ = linear_loss([cross_entropy], linear, [target], jnp.ones((2, 2)))
        return total + sum(jnp.sum(x**2) for x in jax.tree.leaves(states)), (linear, states)

    optimizer = adamw(lambda step: 1e-2, weight_decay=0.1, max_grad_norm=1.0)

    @functools.partial(jax.jit, static_argnums=1)
    def computed(params, config):
        """What is seen, what is sampled, and the parameters after two updates."""

        def update(params_and_state, _):
            params, state = params_and_state
            gradients, saw = jax.grad(loss, has_aux=True)(params, config)
            updates, state = optimizer.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), saw

        (after, _), saw = jax.lax.scan(update, (params, optimizer.init(params)), length=2)
        sampled = sample(
            Decoder(config),
            params,
            tokens,
            lengths,
            row_keys(jax.random.key(0), jnp.arange(2)),
            max_new_tokens=12,
            sampling=Sampling(temperature=9.0),
        )
        return jax.tree.map(lambda x: x[0], saw), sampled.tokens, after

    def close(one, other):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), one, other
        )

    padded = jax.jit(pad, static_argnums=1)(own, wide)
    (saw, ids, after), (saw_padded, ids_padded, after_padded) = (
        jax.device_get(computed(own, config)),
        jax.device_get(computed(padded, wide)),
    )
    close(saw_padded, saw)
    np.testing.assert_array_equal(ids_padded, ids)
    stored, stored_padded = to_hugging_face(after, config), to_hugging_face(after_padded, wide)
    assert stored.keys() == stored_padded.keys()
    for name in stored:
        assert stored[name].shape == stored_padded[name].shape
    assert_zeros_outside(after_padded, own)


def assert_zeros_outside(padded, own) -> None:
    """Of the shapes of `own`."""

    def check(x, like):
        outside = np.array(x)
        outside[tuple(map(slice, like.shape))] = 0
        assert not outside.any()

    jax.tree.map(check, padded, own)


def test_without_a_mesh_nothing_is_constrained():
    x = jnp.ones((4, 2))
    assert constrain(x, ROWS, "tensor") is x
    assert axis_size(ROWS) == axis_size("tensor") == 1


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_oss"])  # the last of a Gemma 3
def test_eight_devices_give_the_update_of_one(family):
    """Two PromptKD updates with their rollouts on meshes along each axis and all three, of GPT-2
    behind gates; the rows of mixed targets and of a replay buffer; packed rows; and meshes that are
    none of ours."""
    folder = pathlib.Path(__file__).parents[1] / "helpers"
    done = subprocess.run(
        [sys.executable, folder / "on_eight_devices.py", family],
        env=environment(XLA_FLAGS=devices(8)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.endswith("same on every mesh\n")
    assert "rematerialization" not in done.stderr  # XLA says so where it copies an array to all
