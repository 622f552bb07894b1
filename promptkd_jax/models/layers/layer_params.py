"""Parameters as a rollout reads them, and those of one layer out of the stack of all."""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp

from promptkd_jax.infra.sharding import axis_size, platform, to_device, unshard_fsdp
from promptkd_jax.models.config import DecoderConfig
from promptkd_jax.models.layers.feed_forward import with_gate_beside_up
from promptkd_jax.models.layers.projection import transposed
from promptkd_jax.models.layers.quantization import SCALE

UNSTACKED = "unstacked"  # beside a rollout's parameters, those of every layer by themselves


def rollout_params(config: DecoderConfig, params: Any) -> Any:
    """Parameters as every step of a rollout reads them, see `Decoder.for_sampling`."""
    if config.offload:  # brought to the device layer by layer, for every token
        return params

    def rounded(path, x):
        stays = {"router", SCALE}.intersection(getattr(key, "key", None) for key in path)
        return x if stays or x.dtype == jnp.int8 else x.astype(config.dtype)

    params = unshard_fsdp(jax.tree.map_with_path(rounded, params))
    is_copy = axis_size("fsdp") > 1 or config.dtype != config.param_dtype
    if platform() == "tpu" and is_copy:  # else a copy would be made for this alone
        return {**params, "layers": with_gate_beside_up(params["layers"])}
    if platform() != "cpu" or config.quantization:
        return params
    # XLA for CPUs would copy a layer out of the stack for every token; so it does once. Of
    # quantised kernels it would keep the whole ones that it makes of them.
    layers = range(config.num_layers)
    unstacked = [jax.tree.map(operator.itemgetter(i), params["layers"]) for i in layers]
    return {**params, UNSTACKED: [transposed(layer) for layer in unstacked]}


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
