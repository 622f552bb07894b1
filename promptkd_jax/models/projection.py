"""Linear maps of a decoder, with the low-rank change of an adapter where there is one.

B rows, T columns, r rank of an adapter.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from promptkd_jax.models.config import DecoderConfig
from promptkd_jax.models.lora import A, B, keep_inputs


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
        initial = nn.initializers.lecun_normal(range(axes), range(axes, len(shape)))
        kernel = self.param("kernel", initial, shape, config.param_dtype)
        x = x.astype(config.dtype)
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
