"""Linear maps of a decoder, quantised ones too, with the low-rank change of an adapter where there
is one.

B rows, T columns, r rank of an adapter.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from promptkd_jax.infra.sharding import axis_size, num_row_shards, platform, unshard_kernel
from promptkd_jax.models.config import DecoderConfig, Quantization
from promptkd_jax.models.layers.cache import SUBLANES
from promptkd_jax.models.layers.lora import A, B, keep_inputs
from promptkd_jax.models.layers.quantization import (
    axes_of,
    dequantize_kernels,
    quantized_kernel,
    unpacked,
)


def project(
    config: DecoderConfig, features: int | tuple[int, ...], use_bias: bool, name: str, inputs=1
) -> nn.Module:
    """A `Projection` of the last `inputs` axes."""
    features = features if isinstance(features, tuple) else (features,)
    return Projection(config, features, use_bias, inputs, name=name)


TRANSPOSED = "kernel_transposed"  # in place of a kernel [*in, *out]: [*out, *in]


class Projection(nn.Module):
    """x W + b over the last axes of x, in the dtype of computation.

    Where the parameters have an adapter beside the kernel, s (x A) B is added, see `lora`: the
    parameters alone say whether it is on, and whether the kernel is `transposed`.
    """

    config: DecoderConfig
    features: tuple[int, ...]
    use_bias: bool
    inputs: int  # axes of x that are summed over

    # x             [B, T, *in], `inputs` axes of it
    # dropout_keys  [B], or None: of the adapter's input
    @nn.compact
    def __call__(self, x, dropout_keys=None):
        config, axes = self.config, self.inputs
        shape = (*x.shape[-axes:], *self.features)
        x = x.astype(config.dtype)
        if self.has_variable("params", TRANSPOSED):
            kernel = self.get_variable("params", TRANSPOSED)
            y = product_of_few_rows(kernel.astype(config.dtype), x, axes)
        elif config.quantization:
            kernel = quantized_kernel(self, config.quantization, shape, inputs=axes)
            y = _quantized_product(x, *kernel, axes, config.quantization, self.path)
        else:
            initial = nn.initializers.lecun_normal(range(axes), range(axes, len(shape)))
            kernel = self.param("kernel", initial, shape, config.param_dtype)
            if axis_size("fsdp") > 1:
                y = _gathered_product(x, kernel, axes, self.path)
            else:
                y = _product(x, kernel.astype(config.dtype), axes)
        if self.use_bias:
            zeros = nn.initializers.zeros_init()
            bias = self.param("bias", zeros, self.features, config.param_dtype)
            y += bias.astype(config.dtype).reshape((1,) * (x.ndim - axes) + self.features)
        if self.has_variable("params", A):
            a, b = (self.get_variable("params", name).astype(config.dtype) for name in (A, B))
            if dropout_keys is not None and config.lora.dropout:
                x = x * keep_inputs(dropout_keys, config.lora.dropout, x.shape[1:], self.name)
            change = _product(_product(x.astype(config.dtype), a, axes), b, 1)  # through [B, T, r]
            y += change * jnp.asarray(config.lora.scale, config.dtype)
        return y


def _product(x: jax.Array, kernel: jax.Array, axes: int) -> jax.Array:
    """The product over the last `axes` of x, the first of the kernel."""

    def product(x):
        over = tuple(range(x.ndim - axes, x.ndim)), tuple(range(axes))
        return jax.lax.dot_general(x, kernel, (over, ((), ())))

    return in_matrix_units(product, x, axes)


# For the gradient of x the kernel is gathered again: kept from the forward pass, those of all
# layers would be the whole model on every device.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(2, 3))
def _gathered_product(
    x: jax.Array, kernel: jax.Array, axes: int, path: tuple[str, ...]
) -> jax.Array:
    """`_product` with a kernel that `fsdp` cuts, that of the projection at `path`."""
    return _product(x, unshard_kernel(kernel.astype(x.dtype), path), axes)


def in_matrix_units(
    product: Callable[[jax.Array], jax.Array], x: jax.Array, axes: int = 1
) -> jax.Array:
    """`product(x)`, over the last `axes` of x; on a TPU in its matrix units where a device has but
    one row, too.

    XLA multiplies a single row elsewhere, and by its own estimate reads the matrix at less than
    half the speed: eight equal rows are multiplied in its place.
    """
    rows = x.shape[: x.ndim - axes]
    if platform() != "tpu" or math.prod(rows) != num_row_shards(rows[0]):
        return product(x)
    x = jnp.broadcast_to(jnp.expand_dims(x, len(rows)), (*rows, SUBLANES, *x.shape[len(rows) :]))
    # Without barriers XLA would see that the rows are equal.
    y = jax.lax.optimization_barrier(product(jax.lax.optimization_barrier(x)))
    return jnp.take(y, 0, axis=len(rows))


def transposed(layer: Mapping[str, Any]) -> Any:
    """A layer's parameters with the kernels of its projections as `product_of_few_rows` reads
    them."""
    flat = traverse_util.flatten_dict(layer, sep="/")
    for path in [x for x in flat if x.endswith("/kernel") and not x.startswith("experts/")]:
        kernel, inputs = flat.pop(path), axes_of(path)["inputs"]
        order = *range(inputs, kernel.ndim), *range(inputs)
        flat[path.removesuffix("kernel") + TRANSPOSED] = kernel.transpose(order)
    return traverse_util.unflatten_dict(flat, sep="/")


def product_of_few_rows(
    kernel: jax.Array, x: jax.Array, axes: int = 1, dtype: Any = None
) -> jax.Array:
    """The product of a kernel `[*out, *in]` and x `[…, *in]`, `axes` of them: `[…, *out]`.

    As a CPU computes it the fastest: XLA's code for the product of 4 to 32 rows with a matrix, in
    this order, reads the matrix about half as fast.

    Args:
      dtype: of the product; None: that of the operands.
    """
    over = tuple(range(kernel.ndim - axes, kernel.ndim)), tuple(range(x.ndim - axes, x.ndim))
    y = jax.lax.dot_general(kernel, x, (over, ((), ())), preferred_element_type=dtype)
    # Without a barrier XLA would turn the operands round, since what follows turns the result.
    y, outputs = jax.lax.optimization_barrier(y), kernel.ndim - axes
    return y.transpose(*range(outputs, y.ndim), *range(outputs))


# For the gradient of x the kernel is made again from its whole numbers: kept from the forward pass,
# those of all layers would be the full copy that is to be spared. No iteration of the scan over
# layers could share it with another.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(3, 4, 5))
def _quantized_product(
    x: jax.Array,
    values: jax.Array,
    scale: jax.Array,
    axes: int,
    how: Quantization,
    path: tuple[str, ...],
) -> jax.Array:
    """`_product` with a quantised kernel, that of the projection at `path`."""
    values = unshard_kernel(values, path)
    if how.group:
        return _product(x, dequantize_kernels(values, scale, how, x.dtype, inputs=axes), axes)
    # In half precision, int8 is exact and its product with a scale is not: of that of x, there are
    # fewer.
    y = _product(x, unpacked(values, how, axes).astype(x.dtype), axes)
    return y * scale[0].astype(x.dtype)
