"""Every parameter has its place on the mesh, and where it lies does not change the numbers."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import traverse_util
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from promptkd_jax.models.config import from_hugging_face
from promptkd_jax.models.load import abstract_params
from promptkd_jax.sharding import AXES, make_mesh, shardings, spec
from promptkd_jax.step import Optimizers, init_state

P = PartitionSpec
LLAMA = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
}
GPT2 = {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}
FAMILIES = {
    "gpt2": GPT2 | {"model_type": "gpt2"},
    "opt": LLAMA | {"model_type": "opt", "ffn_dim": 24},
    "llama": LLAMA | {"model_type": "llama"},
    "llama_tied": LLAMA | {"model_type": "llama", "tie_word_embeddings": True},
    "llama_biases": LLAMA | {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": LLAMA | {"model_type": "mistral"},
    "qwen2": LLAMA | {"model_type": "qwen2"},
    "qwen3": LLAMA | {"model_type": "qwen3"},
    "qwen3_biases": LLAMA | {"model_type": "qwen3", "attention_bias": True},
}


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
        if path.endswith("kernel") or path in ("embed/embedding", "lm_head"):
            assert sorted(filter(None, found)) == ["fsdp", "tensor"], path
        if path.startswith("layers/") and len(found):
            assert found[0] is None, path
        if path.endswith(("scale", "out/bias", "down/bias")):
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
        ),
        params("llama"),
    )
    placed = shardings(state, mesh(1, 2, 2))
    moments = placed.optimizers["student"][1][0]
    for tree in (moments.mu, moments.nu):
        assert flat(tree) == flat(placed.student)
    assert placed.soft_prompt.spec == placed.optimizers["soft_prompt"][1][0].mu.spec == P()
    assert placed.key.spec == placed.step.spec == moments.count.spec == P()


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
        r"parameter layers/attention/key/kernel \(2, 16, 2, 4\): 2 is not divisible by the 4 "
        "devices of mesh axis 'tensor'"
    )
    with pytest.raises(ValueError, match=says):
        shardings(params("llama"), mesh(1, 1, 4))
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


ON_EIGHT_DEVICES = """
import dataclasses, functools, json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from promptkd_jax import optimizer, sharding
from promptkd_jax.models.config import from_hugging_face
from promptkd_jax.models.decoder import Decoder
from promptkd_jax.models.load import abstract_params
from promptkd_jax.sampler import Sampling
from promptkd_jax.batch import Batch
from promptkd_jax.method import Method
from promptkd_jax.step import Optimizers, init_state, summarise, train_step
from promptkd_jax.targets import empty_replay, target_rows
from promptkd_jax.teacher import Models

config = json.loads(sys.argv[1])
teacher, student = (from_hugging_face(config | {"num_hidden_layers": n}) for n in (3, 2))

def random(config, seed):
    rng = np.random.default_rng(seed)
    shapes = abstract_params(config)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0.1, 0.4, x.shape), x.dtype), shapes)

adamw = optimizer.adamw(lambda step: 1e-2, weight_decay=0.1, clip=1.0)
optimizers = Optimizers(adamw, adamw)
method = Method(
    targets="student", student_terms=(("reverse_kl", 1.0), ("forward_kl", 0.1)), total_steps=4,
    response_capacity=6, prompt_capacity=4, vocab_size=30, teacher_view="prompted", micro_batches=1,
    sampling=Sampling(eos_ids=(3, 4)),
)
models = Models(Decoder(student), Decoder(teacher))
step = functools.partial(train_step, method=method, models=models, optimizers=optimizers)
rng = np.random.default_rng(0)
lengths = rng.integers(1, 5, 8).astype(np.int32)
batch = Batch(rng.integers(0, 30, (8, 10)).astype(np.int32), lengths, lengths + 2)
soft_prompt = jnp.asarray(rng.normal(0, 0.4, (3, 16)), jnp.float32)
begin = init_state(
    {"student": random(student, 1), "soft_prompt": soft_prompt}, optimizers, jax.random.key(2)
)
fast = {"xla_backend_optimization_level": 0}

def run(sizes):
    state, frozen, rows, place = begin, random(teacher, 3), batch, None
    if sizes:
        mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes)))
        place = sharding.shardings(state, mesh)
        state = jax.device_put(state, place)
        frozen = jax.device_put(frozen, sharding.shardings(frozen, mesh))
        rows = jax.device_put(batch, sharding.rows_sharding(mesh))
        place = (place, None)
    jitted = jax.jit(step, out_shardings=place, compiler_options=fast)
    measured = []
    for _ in range(2):
        state, metrics = jitted(state, frozen, rows)
        measured.append(summarise(metrics))
    return state, measured

def assert_close(found, expected, what):
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5, err_msg=str(what))

one, expected = run(None)
assert 0 < expected[0]["eos_rate"] < 1
moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), one.student, begin.student)
assert min(jax.tree.leaves(moved)) > 0.005
for sizes, cut in (((8, 1, 1), (1, 1)), ((2, -1, 2), (2, 2))):
    state, measured = run(sizes)
    for found, right in zip(measured, expected):
        for name in ("response_length", "eos_rate", "tokens"):
            assert found[name] == right[name], (sizes, name, found[name], right[name])
        for name in right:  # the cross entropy is that of the sampled tokens
            assert_close(found[name], right[name], (sizes, name))
    jax.tree.map(lambda a, b: assert_close(a, b, sizes), state.student, one.student)
    assert_close(state.soft_prompt, one.soft_prompt, sizes)
    for leaf in (state.student["lm_head"], state.optimizers["student"][1][0].mu["lm_head"]):
        rows, width = leaf.addressable_shards[0].data.shape
        assert (rows * cut[0], width * cut[1]) == leaf.shape, (sizes, rows, width)
    assert len(state.student["lm_head"].addressable_shards) == 8

def written(targets, sizes):
    # rows of two updates: of the first they are new, of the second from the buffer
    each = dataclasses.replace(
        method, targets=targets, teacher_view="plain", response_capacity=9, max_new_tokens=6
    )
    replay = empty_replay(8, 10, threshold=1.0) if targets == "replay" else None
    before, rows, place = begin.replace(replay=replay), batch, None
    if sizes:
        mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes)))
        place = sharding.shardings(before, mesh)
        before = jax.device_put(before, place)
        rows = jax.device_put(batch, sharding.rows_sharding(mesh))

    def two(state, rows):
        replay, found = state.replay, []
        for step in (0, each.total_steps):
            key = jax.random.fold_in(state.key, step)
            *made, replay, _ = target_rows(
                each, models.student, state.student, rows, replay, key, step=step, teacher=None
            )
            found.append(made)
        return found, replay

    return jax.device_get(jax.jit(two, compiler_options=fast)(before, rows))

for targets in ("mixed", "replay"):
    here, there = written(targets, None), written(targets, (2, 2, 2))
    jax.tree.map(np.testing.assert_array_equal, here, there)
    own = [own for _, own in here[0]]
    if targets == "mixed":
        assert 0 < np.mean(own) < 1 and (own[0] != own[1]).any(), own
    else:
        assert np.all(own) and here[1].count == 8

sizes = {"data": -1, "fsdp": 2, "tensor": 2}
assert dict(sharding.make_mesh(sizes).shape) == sizes | {"data": 2}
try:
    sharding.make_mesh({"data": -1, "fsdp": 3, "tensor": 1})
except ValueError as error:
    assert "fsdp=3 x tensor=1 does not make 8 devices" in str(error)
else:
    raise AssertionError("a mesh that leaves out devices was made")
print("same on every mesh")
"""


def test_eight_devices_give_the_update_of_one():
    """Two PromptKD updates, rollouts included, on pure data parallelism and on all three axes; and
    the rows of mixed targets and of a replay buffer."""
    root = pathlib.Path(__file__).parents[1]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": str(root),
    }
    done = subprocess.run(
        [sys.executable, "-c", ON_EIGHT_DEVICES, json.dumps(FAMILIES["llama"])],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.endswith("same on every mesh\n")
