"""A prefix behind gates: each head of each layer sees so much of it, from nothing to all of it.

With o_0 what a column of the text attends to without a prefix, and o_1 with it, as an ordinary
prefix, in one softmax, a head's attention is

    o = (1 - g) o_0 + g o_1,    0 <= g <= 1

The text keeps the positions that it has without a prefix, which stands before them, at -M … -1. So
g = 0 is the model without the prefix, and g = 1 an ordinary prefix, where positions are rotary and
do not depend on the length of the rows. A gate changes o by at most g times what the prefix does to
it. A weight of g within the softmax has no such bound: the first column of a text attends to itself
alone, whatever its score, which a prefix can exceed by any factor, and all later columns look at
the first. Gates of 0 to begin with are LLaMA-Adapter's (Zhang et al. 2024, arXiv 2303.16199), who
add a softmax over the prefix alone.

B rows, T columns of the text, M of the prefix, D width, N heads, K key/value heads, H head width,
L layers, S columns of the cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import struct

from promptkd_jax.infra.errors import ModelError
from promptkd_jax.models.layers.attention import attend, attend_to_cache
from promptkd_jax.models.layers.cache import LayerCache

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    from promptkd_jax.models.config import DecoderConfig


@struct.dataclass
class GatedPrefix:
    """A prefix of `vectors` `[M, D]`, and the `gates` g of its layers and heads, `[L, N]`.

    It can stand where a decoder takes a prefix `[M, D]`; a model without such gates refuses it.
    """

    vectors: Float[Array, "M D"]
    gates: Float[Array, "L N"]

    def projected(self) -> GatedPrefix:
        """The nearest prefix whose gates are from 0 to 1.

        Parameters are the gates themselves, not their logits: do/dg = o_1 - o_0 also at g = 0,
        where a sigmoid, g^2 or |g| have none. What remains is to cut off what an update makes
        negative or more than 1.
        """
        return self.replace(gates=jnp.clip(self.gates, 0, 1))


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

    def mean(self, plain: jax.Array, behind: jax.Array) -> jax.Array:
        """(1 - g) plain + g behind, `[…, N, H]`."""
        gates = self.weights.astype(jnp.float32)[:, None]  # [N, 1]
        return ((1 - gates) * plain + gates * behind).astype(plain.dtype)


def gate_of(
    prefix: Float[Array, "M D"] | GatedPrefix | None,
    config: DecoderConfig,
    segment_ids: Any = None,
    dropout_keys: Any = None,
) -> Gate | None:
    """The gate of a prefix in all layers, None where it has none.

    Args:
      config: of the model.
      segment_ids: of packed rows, or None; dropout_keys: of the rows, or None.

    Raises:
      ModelError: gates of another model; packed rows, of which the prefix would stand in front of
        every segment; dropout of attention, which would have to be the same in both.
    """
    if not isinstance(prefix, GatedPrefix):
        return None
    expected = config.num_layers, config.num_heads
    if prefix.gates.shape != expected:
        raise ModelError(
            f"a prefix with gates {list(prefix.gates.shape)}; expected [layers, heads] of this "
            f"{config.family} model, {list(expected)}"
        )
    if segment_ids is not None:
        raise ModelError("packed rows behind a gated prefix; expected one without gates")
    if dropout_keys is not None and config.dropout.attention:
        raise ModelError("dropout of attention behind a gated prefix; expected one without gates")
    # Of heads that a mesh adds the output projection has zeros, whatever their gates are.
    padding = config.padded.num_heads - config.num_heads
    return Gate(jnp.pad(prefix.gates, ((0, 0), (0, padding))), prefix_columns(prefix))


def attend_gated(
    query: jax.Array, key: jax.Array, value: jax.Array, *, gate: Gate, **how: Any
) -> jax.Array:
    """`attend`, of rows that begin with a gated prefix, `[B, M + T, N, H]`.

    Columns of the prefix attend to one another as without a gate.

    Args:
      query, key, value: `[B, M + T, N or K, H]`.
      gate: of the layer.
      how: `attend`'s, but for segments and dropout, which `gate_of` refuses.
    """
    length = gate.columns  # M
    behind = attend(query, key, value, **how)
    plain = attend(*(x[:, length:] for x in (query, key, value)), **how)
    gated = gate.mean(plain, behind[:, length:])
    return jnp.concatenate([behind[:, :length], gated], axis=1)


def attend_gated_to_cache(
    query: jax.Array, cache: LayerCache, seen: jax.Array, *, gate: Gate, **how: Any
) -> jax.Array:
    """`attend_to_cache`, whose first columns are a gated prefix, `[B, 1, N, H]`."""
    text = seen & (jnp.arange(seen.shape[1]) >= gate.columns)  # [B, S]
    plain, behind = (attend_to_cache(query, cache, columns, **how) for columns in (text, seen))
    return gate.mean(plain, behind)
