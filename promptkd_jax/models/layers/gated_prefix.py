"""A prefix behind gates: in each layer and head its columns weigh g times what they would, g >= 0.

A column of the text sees columns j of the text, with scores s_j and values v_j, and columns i of
the prefix, with scores u_i and values w_i, in one joint softmax:

    o = (sum_j e^{s_j} v_j + g sum_i e^{u_i} w_i) / (sum_j e^{s_j} + g sum_i e^{u_i})

The text keeps the positions that it has without a prefix, which stands before them, at -M … -1. So
g = 0 is the model without the prefix, and with rotary positions g = 1 is an ordinary prefix. Zero
gates as in LLaMA-Adapter (Zhang et al. 2024, arXiv 2303.16199), there in a softmax of their own.

B rows, T columns of the text, M of the prefix, D width, N heads, K key/value heads, H head width,
L layers, S columns of the cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import struct

from promptkd_jax.infra.errors import ModelError
from promptkd_jax.models.layers.attention import attend

if TYPE_CHECKING:
    from jaxtyping import Array, Float


@struct.dataclass
class GatedPrefix:
    """A prefix of `vectors` `[M, D]`, and the `gates` g of its layers and heads, `[L, N]`.

    It can stand where a decoder takes a prefix `[M, D]`; a model without such gates refuses it.
    """

    vectors: Float[Array, "M D"]
    gates: Float[Array, "L N"]

    def projected(self) -> GatedPrefix:
        """The nearest prefix whose gates are not negative.

        Parameters are the gates themselves, not their logarithms: do/dg at g = 0 is that of
        the formula above, sum_i e^{u_i} (w_i - o) / sum_j e^{s_j}, while log g, g^2 or |g| have
        none there. What remains is to cut off what an update makes negative.
        """
        return self.replace(gates=jnp.maximum(self.gates, 0))


def prefix_vectors(prefix: Float[Array, "M D"] | GatedPrefix | None) -> Float[Array, "M D"] | None:
    """The embeddings `[M, D]` of a prefix with gates or without."""
    return prefix.vectors if isinstance(prefix, GatedPrefix) else prefix


def prefix_columns(prefix: Float[Array, "M D"] | GatedPrefix | None) -> int:
    """M, 0 without a prefix."""
    return 0 if prefix is None else prefix_vectors(prefix).shape[0]


@struct.dataclass
class Gate:
    """The gate of a layer, `weights` `[N]`, or of all layers, `[L, N]`, over the first `columns`
    (M) of its rows."""

    weights: jax.Array
    columns: int = struct.field(pytree_node=False)

    def log_weights(self, columns: int) -> jax.Array:
        """What it adds to scores over S = `columns` columns, `[N, S]`; without a gradient at 0."""
        # Added to a score, log g multiplies its exponential by g, and -inf leaves the column out.
        gated = jnp.arange(columns) < self.columns
        return jnp.where(gated, jnp.log(self.weights)[:, None], 0.0)


def gate_of(
    prefix: Float[Array, "M D"] | GatedPrefix | None, num_heads: int, segment_ids: Any = None
) -> Gate | None:
    """The gate of a prefix in all layers, None where it has none.

    Args:
      num_heads: that a mesh pads the heads to.
      segment_ids: of packed rows, or None.

    Raises:
      ModelError: packed rows, of which the prefix would stand in front of every segment.
    """
    if not isinstance(prefix, GatedPrefix):
        return None
    if segment_ids is not None:
        raise ModelError("packed rows behind a gated prefix; expected one without gates")
    # Of heads that a mesh adds the output projection has zeros, whatever their gates are.
    padding = num_heads - prefix.gates.shape[1]
    return Gate(jnp.pad(prefix.gates, ((0, 0), (0, padding))), prefix_columns(prefix))


# With the shares of an ordinary joint softmax, a of the prefix's columns and b of the text's, the
# prefix's part y = sum_i share_i w_i of its mean, and o_0, the attention without a prefix,
#
#     o = o_0 + g / (b + g a) · (y - a o_0)
#
# `attend` computes all four, with whichever kernel: o_0 of the text alone; y with values that are 0
# in the text; a and b with values that count columns. So g = 0 is o_0 exactly, and nobody has to
# know the logarithm of a denominator.


def attend_gated(
    query: jax.Array, key: jax.Array, value: jax.Array, *, gate: Gate, **how: Any
) -> jax.Array:
    """`attend`, of rows that begin with a gated prefix, `[B, M + T, N, H]`.

    Columns of the prefix attend to one another as without a gate.

    Args:
      query, key, value: `[B, M + T, N or K, H]`.
      gate: of the layer.
      how: `attend`'s, but for dropout, which gates have none of.
    """
    length = gate.columns  # M
    # Two of the H channels of the values count columns: channel 0 those of the prefix, 1 those of
    # the text. Their attention is the sum of the shares, a and b.
    is_prefix = (jnp.arange(query.shape[1]) < length)[:, None, None]
    channel = jnp.arange(value.shape[3])
    counts = jnp.where(is_prefix, channel == 0, channel == 1).astype(value.dtype)
    # [B, M + T, N, H]: y where the text is the query; of the prefix's own columns, which see no
    # text, their whole attention to one another.
    part = attend(query, key, jnp.where(is_prefix, value, 0), **how)
    shares = attend(query, key, jnp.broadcast_to(counts, value.shape), **how)[:, length:]
    plain = attend(*(x[:, length:] for x in (query, key, value)), **how)
    shares = shares.astype(jnp.float32)
    of_prefix, of_text = shares[..., :1], shares[..., 1:2]  # a and b, [B, T, N, 1]
    if how.get("sinks") is not None:  # which belong to the text, and have no values to count
        of_text = 1 - of_prefix
    gates = gate.weights.astype(jnp.float32)[:, None]  # [N, 1]
    # A prefix that outweighs the text by more than float32 can say counts as if by just so much.
    total = jnp.maximum(of_text, jnp.finfo(jnp.float32).eps) + gates * of_prefix
    change = gates / total * (part[:, length:] - of_prefix * plain)
    gated = (plain + change).astype(plain.dtype)
    return jnp.concatenate([part[:, :length], gated], axis=1)
