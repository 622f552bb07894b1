"""Linear maps of a decoder, quantised ones too, with the low-rank change of an adapter where there
is one.

B rows, T columns, r rank of an adapter.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from promptkd_jax.models.config import DecoderConfig, Quantization
from promptkd_jax.models.lora import A, B, keep_inputs
from promptkd_jax.models.quantization import dequantize_kernels, quantized_kernel, unpacked


def project(
    config: DecoderConfig, features: int | tuple[int, ...], use_bias: bool, name: str, inputs=1
) -> nn.Module:
    """A `Projection` of the last `inputs` axes."""
    features = features if isinstance(features, tuple) else (features,)
    return Projection(config, features, use_bias, inputs, name=name)


class Projection(nn.Module):
    """x W + b over the last axes of x, in the dtype of computation.

    Where the parameters have an adapter beside the kernel, s (x A) B is added, see `lora`: the
    parameters alone say whether it is on.
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
        if config.quantization:
            kernel = quantized_kernel(self, config.quantization, shape, inputs=axes)
            y = _quantized_product(x, *kernel, axes, config.quantization)
        else:
            initial = nn.initializers.lecun_normal(range(axes), range(axes, len(shape)))
            kernel = self.param("kernel", initial, shape, config.param_dtype)
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
    over = tuple(range(x.ndim - axes, x.ndim)), tuple(range(axes))
    return jax.lax.dot_general(x, kernel, (over, ((), ())))


# For the gradient of x the kernel is made again from its whole numbers: kept from the forward pass,
# those of all layers would be the full copy that is to be spared. No iteration of the scan over
# layers could share it with another.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(3, 4))
def _quantized_product(
    x: jax.Array, values: jax.Array, scale: jax.Array, axes: int, how: Quantization
) -> jax.Array:
    """`_product` with a quantised kernel."""
    if how.group:
        return _product(x, dequantize_kernels(values, scale, how, x.dtype, inputs=axes), axes)
    # In half precision, int8 is exact and its product with a scale is not: of that of x, there are
    # fewer.
    y = _product(x, unpacked(values, how, axes).astype(x.dtype), axes)
    return y * scale[0].astype(x.dtype)
