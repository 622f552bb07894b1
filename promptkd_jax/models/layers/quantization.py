"""Kernels of a frozen model in 8 or 4 bits: whole numbers, of which several share a scale.

    W ≈ q s        s = -W' / m, where W' is the W of the largest magnitude     m = 128 (int8),
                   q = round(W / s), within -m … m - 1                             8 (int4)

W' itself becomes -m, the one number that has no opposite: so all 2 m of them are used (as llama.cpp
does in Q4_0). A search for the s of the least squared error gives int4 no better a model.

In place of a kernel `[*in, *out]` stand its numbers, int8 of the same shape, and beside it their
scales `kernel_scale` `[G, *out]` in bfloat16: one for each output and each of the G groups that its
inputs, all their axes end to end, are cut into; the last may be shorter. Numbers of 4 bits lie in
pairs along the last axis of the inputs, the even one in the low bits.

Numbers are the nearest for the scale as it is rounded. Neither depends on how a mesh cuts the
kernel, nor on heads and units that are padding, whose zeros stay zeros.
"""

import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from promptkd_jax.infra.errors import ModelError
from promptkd_jax.models.config import Quantization
from promptkd_jax.models.layers.lora import MODULES

SCALE = "kernel_scale"
QUANTIZE = {  # by their names in a config
    "none": None,
    "int8": Quantization(bits=8),
    "int4": Quantization(bits=4, group=32),
}


def is_quantized(path: str) -> bool:
    """Whether a quantised model keeps the parameter at `path` so: kernels, but for those of
    routers, which would choose other experts."""
    return path.endswith("/kernel") and not path.endswith("router/kernel")


def scale_path(path: str) -> str:
    """The path of the scales of the kernel at `path`."""
    return path.removesuffix("kernel") + SCALE


def axes_of(path: str) -> dict[str, int]:
    """The axes of the kernel at `path`, by their names in `quantize_kernels`."""
    layer, mixture, module = re.fullmatch(r"(layers/)?((?:experts/)?)(.*)/kernel", path).groups()
    return {"inputs": MODULES.get(module, 1), "stacks": bool(layer) + bool(mixture)}


def quantize_params(params: Mapping[str, Any], how: Quantization) -> Any:
    """The parameters of a model with its kernels quantised."""
    flat = traverse_util.flatten_dict(params, sep="/")
    for path in filter(is_quantized, tuple(flat)):
        flat[path], flat[scale_path(path)] = quantize_kernels(flat[path], how, **axes_of(path))
    return traverse_util.unflatten_dict(flat, sep="/")


def dequantize_params(params: Mapping[str, Any], how: Quantization, dtype: Any) -> Any:
    """The same the other way round, the kernels in `dtype`."""
    flat = traverse_util.flatten_dict(params, sep="/")
    for path in filter(is_quantized, tuple(flat)):
        kernel = flat[path], flat.pop(scale_path(path))
        flat[path] = dequantize_kernels(*kernel, how, dtype, **axes_of(path))
    return traverse_util.unflatten_dict(flat, sep="/")


def quantized_kernel(
    module: nn.Module, how: Quantization, shape: tuple[int, ...], **axes: int
) -> tuple[jax.Array, jax.Array]:
    """The parameters (values, scales) of a module for kernels of this shape; zeros, until they are
    made of others.

    Args:
      axes: of the shape, as `quantize_kernels` has them.
    """
    kernel = jax.ShapeDtypeStruct(shape, jnp.float32)
    values, scale = jax.eval_shape(lambda x: quantize_kernels(x, how, **axes), kernel)

    def zeros(name, x):
        return module.param(name, lambda _: jnp.zeros(x.shape, x.dtype))

    return zeros("kernel", values), zeros(SCALE, scale)


def quantize_kernels(
    kernel: jax.Array, how: Quantization, *, inputs: int = 1, stacks: int = 0
) -> tuple[jax.Array, jax.Array]:
    """Rounds kernels `[…, *in, *out]`.

    Args:
      inputs: number of axes that are summed over.
      stacks: of axes before them, along which each kernel is one by itself.

    Returns:
      (values, scales): int8 `[…, *in, *out]`, in 4 bits half as many along the last axis of `*in`,
      and bfloat16 `[…, G, *out]`.

    Raises:
      ModelError: an odd number of inputs in 4 bits, which lie in pairs.
    """
    if stacks:
        one = functools.partial(quantize_kernels, how=how, inputs=inputs, stacks=stacks - 1)
        return jax.vmap(one)(kernel)
    shape, size, most = kernel.shape, math.prod(kernel.shape[:inputs]), 2 ** (how.bits - 1)
    group = how.group or size
    flat = kernel.astype(jnp.float32).reshape(size, *shape[inputs:])
    flat = jnp.pad(flat, [(0, -size % group)] + [(0, 0)] * (flat.ndim - 1))
    groups = flat.reshape(-1, group, *shape[inputs:])  # [G, group, *out]
    # W' of each group and output, [G, *out].
    greatest, least = jnp.max(groups, axis=1), jnp.min(groups, axis=1)
    largest = jnp.where(greatest >= -least, greatest, least)
    scale = (-largest / most).astype(jnp.bfloat16)
    # All zeros have no scale: 0 of any.
    divisor = jnp.where(scale == 0, 1, scale.astype(jnp.float32))[:, None]
    values = jnp.clip(jnp.round(groups / divisor), -most, most - 1).astype(jnp.int8)
    values = values.reshape(flat.shape)[:size].reshape(shape)
    return (_in_pairs(values, inputs - 1) if how.bits == 4 else values), scale


def dequantize_kernels(
    values: jax.Array,
    scale: jax.Array,
    how: Quantization,
    dtype: Any,
    *,
    inputs: int = 1,
    stacks: int = 0,
) -> jax.Array:
    """The kernels `[…, *in, *out]` in `dtype`, of what `quantize_kernels` gave."""
    if stacks:
        one = functools.partial(
            dequantize_kernels, how=how, dtype=dtype, inputs=inputs, stacks=stacks - 1
        )
        return jax.vmap(one)(values, scale)
    values = unpacked(values, how, inputs).astype(dtype)
    size = math.prod(values.shape[:inputs])
    # [G, *out] -> [size, *out], the last group cut where the inputs end.
    scale = jnp.repeat(scale.astype(dtype), how.group or size, axis=0)[:size]
    return values * scale.reshape(values.shape)


def unpacked(values: jax.Array, how: Quantization, inputs: int) -> jax.Array:
    """The whole numbers of a kernel `[*in, *out]`, one in each int8."""
    if how.bits == 8:
        return values
    axis = inputs - 1
    # A shift to the right brings the sign along.
    pairs = jnp.stack([(values << 4) >> 4, values >> 4], axis=axis + 1)
    return pairs.reshape(*values.shape[:axis], -1, *values.shape[axis + 1 :])


def _in_pairs(values: jax.Array, axis: int) -> jax.Array:
    if values.shape[axis] % 2:
        raise ModelError(
            f"int4: a kernel of {values.shape} has an odd number of inputs ({values.shape[axis]} "
            "along its axis), and two of them share a byte; expected 'int8'"
        )
    # Both int8 of the range of 4 bits: of the low one the sign bits above are cut off.
    low, high = (jax.lax.slice_in_dim(values, i, None, 2, axis) for i in (0, 1))
    return (high << 4) | (low & 15)
