"""Embeddings: of tokens, behind those of a soft prompt, and of learned positions.

B rows, T tokens, M soft-prompt tokens, D width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from promptkd_jax.infra.errors import ModelError
from promptkd_jax.infra.sharding import constrain
from promptkd_jax.models.config import DecoderConfig
from promptkd_jax.models.layers.projection import project


class Embedding(nn.Module):
    """A table of `rows` embeddings, looked up by `[...]` ids: `[..., width]`."""

    config: DecoderConfig
    rows: int
    width: int

    @nn.compact
    def __call__(self, ids):
        shape = (self.rows, self.width)
        initial = nn.initializers.normal(0.02)
        table = self.param("embedding", initial, shape, self.config.param_dtype)
        # Cut along the width as well, a row would have to be put together after it is looked up.
        table = constrain(table, "tensor", None)
        return jnp.take(table, ids, axis=0).astype(self.config.dtype)


def embedded(
    config: DecoderConfig,
    tokens: jax.Array,
    prefix: jax.Array | None,
    packed_positions: jax.Array | None = None,
) -> jax.Array:
    """The prefix `[M, D]` in front of every row, and the embeddings of the tokens `[B, T]`.

    Args:
      packed_positions: `[B, M + T]`, of packed rows, where the prefix is in front of every segment,
        see `segments.packed_columns`; None: rows are not packed.

    Returns:
      `[B, M + T, D]`.
    """
    embed = Embedding(config, config.padded.vocab_size, config.embedding_width, name="embed")
    x = scaled(embed(tokens), config.embedding_scale)
    if prefix is not None:
        rows = jnp.broadcast_to(prefix.astype(x.dtype), (x.shape[0], *prefix.shape))
        x = jnp.concatenate([rows, x], axis=1)
    if prefix is not None and packed_positions is not None:
        # [B, M + T, D]: position m < M of any segment has vector m of the prefix, in place of the
        # embedding of the empty column there. Other positions take any vector, and drop it.
        last = prefix.shape[0] - 1
        own = jnp.take(prefix.astype(x.dtype), jnp.minimum(packed_positions, last), axis=0)
        x = jnp.where((packed_positions <= last)[..., None], own, x)
    return project(config, config.width, False, "project_in")(x) if config.projected_width else x


def learned_positions(
    config: DecoderConfig, positions: jax.Array, columns: int, unmoved: int = 0
) -> jax.Array:
    """The embeddings of `positions`, of rows that have room for `columns`; of a gated prefix, whose
    `unmoved` columns stand at negative positions, those of an ordinary prefix.

    Raises:
      ModelError: the model has fewer positions than columns.
    """
    # Beyond the table a position would be NaN, and NaN behind a row's end spoils the row.
    if (longest := max(columns - unmoved, unmoved)) > config.max_positions:
        raise ModelError(
            f"{longest} columns (soft prompt and new tokens included) in a {config.family} model "
            f"of {config.max_positions} positions; shorten the rows or the soft prompt"
        )
    table = Embedding(
        config, config.max_positions + config.position_offset, config.width, name="positions"
    )
    rows = jnp.where(positions < 0, positions + unmoved, positions)
    return table(rows + config.position_offset)


def scaled(x: jax.Array, scale: float) -> jax.Array:
    """The array by a number that is rounded to its dtype first, as `transformers` has it."""
    return x if scale == 1.0 else x * jnp.asarray(scale, x.dtype)
