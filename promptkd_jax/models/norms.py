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
    """An RMS norm over the last axis, its scale `norm_offset` more than the parameter."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x):
        config = self.config
        scale = self.param("scale", nn.initializers.zeros, x.shape[-1:], config.param_dtype)
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + config.norm_eps)
        return (normed * (config.norm_offset + scale.astype(jnp.float32))).astype(config.dtype)


class HeadsNorm(nn.Module):
    """An RMS norm over the heads and the width of `[B, T, heads, H]`, of which the first `number`
    heads are no padding."""

    config: DecoderConfig
    number: int

    @nn.compact
    def __call__(self, x):
        config = self.config
        scale = self.param("scale", nn.initializers.ones, x.shape[-2:], config.param_dtype)
        wide = x.astype(jnp.float32)
        mean = jnp.sum(wide**2, axis=(-2, -1), keepdims=True) / (self.number * config.head_dim)
        normed = wide * jax.lax.rsqrt(mean + config.norm_eps)
        return (normed * scale.astype(jnp.float32)).astype(config.dtype)
