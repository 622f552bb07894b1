"""What only a GPU shows; elsewhere these skip."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from promptkd_jax import sharding
from promptkd_jax.models import attention
from promptkd_jax.models.config import from_hugging_face
from promptkd_jax.models.decoder import Decoder

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "gpu", reason="needs a GPU (JAX_PLATFORMS=cuda)"
)


def config(**changes):
    hf_config = tiny.llama_config(width=256, depth=2, vocab_size=128)
    return from_hugging_face(hf_config).replace(dtype="bfloat16", **changes)


def loss_and_gradient(one, tokens, prefix, params):
    """Both, and whether it was cuDNN that attended."""

    def loss(params, prefix):
        hidden = Decoder(one).apply({"params": params}, tokens, prefix=prefix)
        return jnp.mean(jnp.square(hidden.astype(jnp.float32)[:, :, :7]))

    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(params, prefix).compile()
    return *compiled(params, prefix), "__cudnn$fmhaSoftmaxBackward" in compiled.as_text()


def assert_cudnn_agrees_with_xla(monkeypatch, one, columns):
    rng = np.random.default_rng(0)
    tokens = sharding.place_rows(rng.integers(0, 128, (2 * jax.device_count(), columns - 7)))
    prefix = jnp.asarray(rng.normal(size=(7, 256)), jnp.float32)
    params = Decoder(one).init(jax.random.key(0), tokens)["params"]
    fast, fast_gradient, is_cudnn = loss_and_gradient(one, tokens, prefix, params)
    assert is_cudnn
    monkeypatch.setattr(attention, "implementation", lambda **_: "xla")
    slow, slow_gradient, is_cudnn = loss_and_gradient(one, tokens, prefix, params)
    assert not is_cudnn
    np.testing.assert_allclose(fast, slow, rtol=2e-2)
    for ours, theirs in zip(jax.tree.leaves(fast_gradient), jax.tree.leaves(slow_gradient)):
        scale = float(jnp.abs(theirs).max())
        np.testing.assert_allclose(ours, theirs, atol=0.05 * scale)


@pytest.mark.parametrize("changes", [{}, {"window": 9}, {"remat": "full"}])
@pytest.mark.parametrize("columns", [46, 47])
def test_cudnn_attention_agrees_with_xla(monkeypatch, changes, columns):
    """An odd number of columns too, as a soft prompt makes it."""
    assert_cudnn_agrees_with_xla(monkeypatch, config(**changes), columns)


def test_cudnn_attention_agrees_with_xla_on_a_mesh(monkeypatch):
    """Of all GPUs here; with two or more, heads are dealt out too."""
    tensor = 2 if jax.device_count() % 2 == 0 else 1
    with jax.set_mesh(sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": tensor})):
        assert_cudnn_agrees_with_xla(monkeypatch, config(), 47)


def test_full_precision_is_for_xla():
    one = config().replace(dtype="float32")
    lowered = jax.jit(Decoder(one).init).lower(jax.random.key(0), jnp.zeros((2, 8), jnp.int32))
    assert "__cudnn" not in lowered.as_text()
