"""What only a GPU shows; elsewhere these skip."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from promptkd_jax.models import decoder
from promptkd_jax.models.config import from_hugging_face
from promptkd_jax.models.decoder import Decoder

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "gpu", reason="needs a GPU (JAX_PLATFORMS=cuda)"
)


def config(**changes):
    hf_config = tiny.llama_config(width=256, depth=2, vocab_size=128)
    return from_hugging_face(hf_config).replace(dtype="bfloat16", **changes)


def loss_and_gradient(one, tokens, prefix, params):
    def loss(params, prefix):
        hidden = Decoder(one).apply({"params": params}, tokens, prefix=prefix)
        return jnp.mean(jnp.square(hidden.astype(jnp.float32)[:, :, :7]))

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, prefix)


@pytest.mark.parametrize("changes", [{}, {"window": 9}, {"remat": "full"}])
def test_cudnn_attention_agrees_with_xla(monkeypatch, changes):
    one = config(**changes)
    assert decoder._implementation(one) == "cudnn"
    tokens = np.random.default_rng(0).integers(0, 128, (2, 40))
    prefix = jax.random.normal(jax.random.key(1), (7, 256))  # 47 columns: odd
    params = Decoder(one).init(jax.random.key(0), tokens)["params"]
    fast, fast_gradient = loss_and_gradient(one, tokens, prefix, params)
    monkeypatch.setattr(decoder, "_implementation", lambda _: "xla")
    slow, slow_gradient = loss_and_gradient(one, tokens, prefix, params)
    np.testing.assert_allclose(fast, slow, rtol=2e-2)
    for ours, theirs in zip(jax.tree.leaves(fast_gradient), jax.tree.leaves(slow_gradient)):
        scale = float(jnp.abs(theirs).max())
        np.testing.assert_allclose(ours, theirs, atol=0.05 * scale)


def test_cudnn_is_for_half_precision_and_fitting_heads():
    assert decoder._implementation(config()) == "cudnn"
    assert decoder._implementation(config().replace(dtype="float32")) == "xla"
    assert decoder._implementation(config().replace(head_width=36)) == "xla"
    assert decoder._implementation(config().replace(head_width=256)) == "xla"
