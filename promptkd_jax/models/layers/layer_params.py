"""The parameters of one layer in the pass of a token, out of the stack of all layers."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from promptkd_jax.infra.sharding import to_device
from promptkd_jax.models.config import DecoderConfig

UNSTACKED = "unstacked"  # beside a rollout's parameters, those of every layer by themselves


def layer_params(config: DecoderConfig, params: Any, index: int, before: jax.Array) -> Any:
    """A layer's parameters in the pass of a token; `before` is what goes into the layer before."""
    if UNSTACKED in params:
        return params[UNSTACKED][index]
    if config.offload or config.quantization:
        # A layer is fetched, or dequantised, while that computes; all at once, else.
        place = _known_with(before, index)
        take = functools.partial(jax.lax.dynamic_index_in_dim, index=place, keepdims=False)
        own = jax.tree.map(take, params["layers"])
        return to_device(own) if config.offload else own

    def take(path, x):
        of_all = path[0].key == "experts" and x.ndim == 4  # kernels
        return x if of_all else x[index]

    return jax.tree.map_with_path(take, params["layers"])


def has_experts_of_all(config: DecoderConfig, params: Any) -> bool:
    """Whether `layer_params` gives the kernels of the experts of all layers."""
    copied = UNSTACKED in params or config.offload or config.quantization
    return config.experts is not None and not copied


def _known_with(x: jax.Array, number: int) -> jax.Array:
    """A number that XLA knows when x is there, and not before."""
    return number + jnp.minimum(jnp.sum(jnp.isnan(x), dtype=jnp.int32), 0)
