"""Which implementation attention takes, and that they compute the same.

TPU's kernel runs interpreted here, JAX's side of cuDNN is only lowered, and where libtpu is
installed its compiler says whether a TPU would take the kernel.
"""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import devices, environment
from helpers.models import VOCAB, random_model

from promptkd_jax.infra import sharding
from promptkd_jax.models.layers import attention
from promptkd_jax.models.layers.attention import attend, implementation


def force(monkeypatch, chosen: str) -> None:
    monkeypatch.setattr(attention, "implementation", lambda **_: chosen)


def random(*shapes) -> list:
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes)]


def segments(columns: int) -> jax.Array:
    """Of two packed rows, some of one column, none at the borders of blocks or parts."""
    ends = np.array([[0.2, 0.21, 0.6], [0.5, 0.9, 0.9]]) * columns
    return 1 + jnp.sum(jnp.arange(columns) >= ends[..., None], axis=1)


def output_and_gradients(inputs, sliding_window, soft_cap=None, sinks=None, segment_ids=None):
    """What attention gives and what it hands back, compiled afresh."""

    def run(query, key, value, cotangent, sinks):
        def attended(query, key, value, sinks):
            how = {"sliding_window": sliding_window, "soft_cap": soft_cap, "sinks": sinks}
            return attend(query, key, value, **how, segment_ids=segment_ids)

        out, back = jax.vjp(attended, query, key, value, sinks)
        return [out, *(x for x in back(cotangent) if x is not None)]

    return jax.jit(run)(*inputs, sinks)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "columns", "sliding_window", "soft_cap"),
    [
        (4, 2, 64, 263, None, None),  # three blocks and 121 columns of padding
        (2, 2, 128, 128, None, 2.0),  # one block, no padding
        (3, 1, 80, 300, 40, None),  # a window shorter than a block
    ],
)
@pytest.mark.parametrize("with_more", [False, True])
def test_splash_agrees_with_xla(
    monkeypatch, num_heads, num_kv_heads, head_dim, columns, sliding_window, soft_cap, with_more
):
    """In value and in all gradients, with more: of packed rows and with sinks."""
    monkeypatch.setattr(attention, "MAX_BLOCK", 128)
    one, few = (2, columns, num_heads, head_dim), (2, columns, num_kv_heads, head_dim)
    *inputs, sinks = random(one, few, few, one, (num_heads,))
    more = (3 * sinks, segments(columns)) if with_more else ()
    how = inputs, sliding_window, soft_cap, *more
    expected = output_and_gradients(*how)
    force(monkeypatch, "splash")
    for ours, theirs in zip(output_and_gradients(*how), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("columns", [7, 131])  # one part of a row, two
def test_caps_and_sinks_are_those_of_the_definition(columns):
    """softmax([c tanh(s / c), sink]) without its last share, in float64."""
    query, key, value, sinks = random(*[(2, columns, 2, 8)] * 3, (2,))
    found = attend(4 * query, key, value, soft_cap=1.5, sinks=sinks)
    query, key, value, sinks = (np.asarray(x, np.float64) for x in (query, key, value, sinks))
    scores = np.einsum("bqnh,bknh->bnqk", 4 * query, key) / 8**0.5
    scores = np.exp(1.5 * np.tanh(scores / 1.5)) * np.tri(columns)
    total = scores.sum(-1, keepdims=True) + np.exp(sinks)[:, None, None]
    expected = np.einsum("bnqk,bknh->bqnh", scores / total, value)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("columns", [1, 128, 131, 600])  # one part, one, two, four
@pytest.mark.parametrize("sliding_window, packed", [(None, False), (40, False), (40, True)])
def test_parts_of_a_row_agree_with_whole_rows(columns, sliding_window, packed):
    """Without a kernel; in value and in all three gradients, against JAX's own."""
    one, few = (2, columns, 4, 8), (2, columns, 2, 8)
    *inputs, cotangent = random(one, few, few, one)
    ids = segments(columns) if packed else None
    mask = (ids[:, None, :, None] == ids[:, None, None, :]) if packed else None

    def whole(query, key, value):
        local = None if sliding_window is None else (sliding_window - 1, 0)
        return jax.nn.dot_product_attention(
            query, key, value, mask=mask, is_causal=True, local_window_size=local
        )

    expected, back = jax.vjp(jax.jit(whole), *inputs)
    for ours, theirs in zip(
        output_and_gradients([*inputs, cotangent], sliding_window, segment_ids=ids),
        (expected, *back(cotangent)),
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_blocks_are_few_and_little_is_padded():
    """Multiples of 128 that never exceed 512."""
    blocks = {1: 128, 128: 128, 129: 256, 263: 384, 512: 512, 519: 384, 1024: 512, 1031: 384}
    assert {columns: attention._block(columns) for columns in blocks} == blocks


FITS = {
    "dtype": "bfloat16",
    "rows": 8,
    "columns": 263,
    "num_heads": 8,
    "num_kv_heads": 2,
    "head_dim": 64,
    "row_parts": 4,
    "head_parts": 2,
}


@pytest.mark.parametrize(
    ("changes", "tpu", "gpu"),
    [
        ({}, "splash", "cudnn"),
        ({"row_parts": 1, "head_parts": 1}, "splash", "cudnn"),
        ({"dtype": "float32"}, "splash", "xla"),
        ({"dtype": "float16"}, "xla", "cudnn"),
        ({"columns": 128}, "splash", "cudnn"),
        ({"columns": 127}, "xla", "cudnn"),
        ({"rows": 6}, "xla", "cudnn"),
        ({"head_parts": 8}, "splash", "xla"),  # fewer key/value heads than devices
        ({"num_heads": 25, "num_kv_heads": 25}, "xla", "xla"),
        ({"num_heads": 25, "num_kv_heads": 25, "head_parts": 1}, "splash", "cudnn"),
        ({"plain": False}, "splash", "xla"),
        ({"head_dim": 36}, "splash", "xla"),
        ({"head_dim": 128}, "splash", "cudnn"),
        ({"head_dim": 256}, "splash", "xla"),
        ({"capability": 7.5}, "splash", "xla"),  # Turing
        ({"capability": 0.0}, "splash", "xla"),  # AMD's
        ({"capability": 8.9}, "splash", "cudnn"),
    ],
)
def test_which_implementation_is_taken(changes, tpu, gpu):
    fits = FITS | changes
    assert implementation(platform="tpu", **fits) == tpu
    assert implementation(platform="gpu", **fits) == gpu
    assert implementation(platform="cpu", **fits) == "xla"


def test_attention_asks_for_what_it_has(monkeypatch):
    asked = {}
    monkeypatch.setattr(sharding, "platform", lambda: "gpu")
    monkeypatch.setattr(attention, "implementation", lambda **each: asked.update(each) or "xla")
    with jax.set_mesh(sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1})):
        one, few = (jax.ShapeDtypeStruct((3, 5, n, 8), jnp.bfloat16) for n in (4, 2))
        assert jax.eval_shape(attend, one, few, few).shape == one.shape
    expected = {"platform": "gpu", "rows": 3, "columns": 5, "num_heads": 4, "num_kv_heads": 2}
    expected |= {"dtype": "bfloat16", "head_dim": 8, "row_parts": 1, "head_parts": 1, "plain": True}
    assert asked == expected | {"capability": 0.0}


@pytest.mark.parametrize("columns", [46, 47])
@pytest.mark.parametrize("sliding_window, packed", [(None, False), (9, False), (None, True)])
def test_jax_takes_cudnn_in_training(monkeypatch, columns, sliding_window, packed):
    """JAX checks shapes when it lowers, which needs no GPU; odd columns it would refuse."""
    cudnn = "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version"
    monkeypatch.setattr(cudnn, lambda: 91000)
    monkeypatch.setattr(sharding, "platform", lambda: "gpu")
    monkeypatch.setattr(sharding, "compute_capability", lambda: 8.0)
    one, few = (
        jax.ShapeDtypeStruct((2, columns, num_heads, 64), jnp.bfloat16) for num_heads in (4, 2)
    )

    def run(query, key, value, cotangent):
        how = {"sliding_window": sliding_window}
        how |= {"segment_ids": segments(columns)} if packed else {}
        out, back = jax.vjp(lambda *a: attend(*a, **how), query, key, value)
        assert out.shape == query.shape
        return back(cotangent)

    traced = jax.jit(run).trace(one, few, few, one)
    lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
    bias = "ScaleBias" if packed else ""  # what a mask is made into
    assert f"__cudnn$fmha{bias}Softmax(" in lowered
    assert f"__cudnn$fmha{bias}SoftmaxBackward(" in lowered


def run_script(script: str, **variables: str) -> str:
    """The standard output of Python code in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment(**variables),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


ON_EIGHT_DEVICES = '''
from functools import partial
import jax, jax.numpy as jnp, numpy as np
from promptkd_jax.infra import sharding
from promptkd_jax.models.layers import attention
from promptkd_jax.models.families.registry import from_hugging_face
from promptkd_jax.models.decoder import Decoder
from promptkd_jax.models.io.params import abstract_params

choose = attention.implementation

def on(sizes):
    return jax.set_mesh(sharding.make_mesh(dict(zip(sharding.AXES, sizes))))

def both(function, sizes, inputs, place):
    """By XLA on one device, and by splash on the mesh."""
    attention.implementation = choose
    expected = jax.jit(function)(*inputs)
    attention.implementation = lambda **_: "splash"
    with on(sizes):
        found = jax.jit(function)(*place(inputs, jax.sharding.get_mesh()))
    close = partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5, err_msg=str(sizes))
    jax.tree.map(close, found, expected)
    return found

def run(*inputs):
    out, back = jax.vjp(attention.attend, *inputs[:3])
    return out, *back(inputs[3])

rng = np.random.default_rng(0)
inputs = [rng.normal(size=(4, 131, heads, 64)).astype("float32") for heads in (4, 2, 2, 4)]
out, *_ = both(run, (2, 2, 2), inputs, lambda inputs, _: inputs)
assert out.sharding.shard_shape(out.shape) == (1, 131, 2, 64), out.sharding

# A decoder of rematerialised layers, a soft prompt, and 3 key/value heads for 8 devices.
config = from_hugging_face({
    "model_type": "llama", "vocab_size": 32, "hidden_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 24, "num_key_value_heads": 3, "intermediate_size": 64,
    "max_position_embeddings": 256,
}).replace(remat="full")
tokens = rng.integers(0, 32, (2, 125))
params = jax.tree.map(
    lambda x: rng.normal(0.1, 0.1, x.shape).astype("float32"), abstract_params(config)
)
prefix = rng.normal(size=(7, 192)).astype("float32")

def loss(params, prefix):
    hidden = Decoder(config).apply({"params": params}, tokens, prefix=prefix)
    return jnp.mean(jnp.square(hidden[:, :, :99]))

def place(inputs, mesh):
    return jax.device_put(inputs[0], sharding.shardings(inputs[0], mesh)), inputs[1]

both(jax.value_and_grad(loss, argnums=(0, 1)), (1, 1, 8), (params, prefix), place)

# cuDNN wants query, key and value cut alike, wherever they come from.
attention.implementation = lambda **_: "cudnn"
jax.nn.dot_product_attention = lambda query, key, value, **_: query + key.sum() + value.sum()
with on((2, 2, 2)):
    shapes = [jax.ShapeDtypeStruct((4, 47, heads, 8), jnp.bfloat16) for heads in (4, 2, 2)]
    lowered = jax.jit(attention.attend).lower(*shapes).as_text()
cut = 'sharding_constraint %'
alike = '<@mesh, [{"data", "fsdp"}, {}, {"tensor"}, {}]>'
lines = [line for line in lowered.splitlines() if cut in line]
assert len(lines) >= 3 and all(alike in line for line in lines), lines
print("same on every mesh")
'''


def test_eight_devices_attend_as_one():
    assert run_script(ON_EIGHT_DEVICES, XLA_FLAGS=devices(8)) == "same on every mesh\n"


FOR_TPU = """
import re
import jax, jax.numpy as jnp, numpy as np
from jax.experimental.topologies import get_topology_desc
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from promptkd_jax.infra import sharding
from promptkd_jax.models.layers.attention import attend

def run(query, key, value):
    out, back = jax.vjp(lambda *a: attend(*a, window=200), query, key, value)
    return back(out)

for topology, sizes, head_dim in (("v5e:2x4", (2, 2, 2), 64), ("v6e:2x4", (1, 1, 8), 128)):
    devices = get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = Mesh(np.array(devices).reshape(sizes), sharding.AXES, axis_types=(AxisType.Auto,) * 3)
    one, few = (
        jax.ShapeDtypeStruct(
            (8, 263, heads, head_dim),
            jnp.bfloat16,
            sharding=NamedSharding(mesh, P(("data", "fsdp"), None, cut, None)),
        )
        for heads, cut in ((8, "tensor"), (2, None))
    )
    with jax.set_mesh(mesh):
        compiled = jax.jit(run).lower(one, few, few).compile().as_text()
    kernels = re.findall(r'%(\\w+)[.\\d]* = .*custom_call_target="tpu_custom_call"', compiled)
    print(topology, *sorted(kernels))
"""
KERNELS = "splash_mha_dkv_no_residuals splash_mha_dq_no_residuals splash_mha_fwd_residuals"


def test_a_tpu_compiles_splash_forward_and_backward():
    pytest.importorskip("libtpu", reason="compiling for a TPU needs libtpu: jax[tpu]")
    done = run_script(FOR_TPU, TPU_SKIP_MDS_QUERY="1")
    assert done == f"v5e:2x4 {KERNELS}\nv6e:2x4 {KERNELS}\n"


def test_layers_of_two_kinds_run_the_kernel_each_with_its_own_window(monkeypatch):
    """Inside of the scan over layers, gradients included."""
    model = random_model("gemma3")
    tokens = np.random.default_rng(0).integers(0, VOCAB, (2, 140), dtype=np.int32)

    def gradient():
        def loss(params):
            return jnp.sum(jnp.sin(model.decoder.apply({"params": params}, tokens)))

        with jax.default_matmul_precision("highest"):
            return jax.jit(jax.value_and_grad(loss))(model.params)

    expected = gradient()
    force(monkeypatch, "splash")
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-3), gradient(), expected
    )
