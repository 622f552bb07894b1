"""Norms of a decoder.

B rows, T columns, H head width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from promptkd_jax.models.config import DecoderConfig


def make_norm(config: DecoderConfig, name: str) -> nn.Module:
    """A norm over the last axis, of the model's kind."""
    how = {"epsilon": config.norm_eps, "dtype": config.dtype, "param_dtype": config.param_dtype}
    if config.norm_offset:
        return RMSNorm(config, name=name)
    if config.norm == "rms":
        return nn.RMSNorm(name=name, **how)
    # E[x²] - E[x]² in float32 loses what large means leave.
    return nn.LayerNorm(use_fast_variance=False, name=name, **how)


class RMSNorm(nn.Module):
    """An RMS norm whose scale is `norm_offset` more than its parameter: over the last axis, or with
    `heads` over the heads and the width of `[B, T, heads, H]`, of which so many are no padding."""

    config: DecoderConfig
    heads: int = 0

    @nn.compact
    def __call__(self, x):
        config = self.config
        axes, size = ((-2, -1), self.heads * x.shape[-1]) if self.heads else (-1, x.shape[-1])
        initial = nn.initializers.constant(1.0 - config.norm_offset)
        shape = x.shape[-2:] if self.heads else x.shape[-1:]
        scale = self.param("scale", initial, shape, config.param_dtype)
        wide = x.astype(jnp.float32)
        mean = jnp.sum(wide**2, axis=axes, keepdims=True) / size
        normed = wide * jax.lax.rsqrt(mean + config.norm_eps)
        return (normed * (config.norm_offset + scale.astype(jnp.float32))).astype(config.dtype)
