"""Columns of packed rows: several segments in a row, each with positions and a prefix of its own.

B rows, T columns, M prefix columns.
"""

import jax
import jax.numpy as jnp


def packed_columns(segment_ids: jax.Array, prefix: int) -> tuple[jax.Array, jax.Array]:
    """Positions and segments of the columns of packed rows behind M = `prefix` more columns.

    Of each segment the first M positions are those of its prefix. The M columns in front of the row
    have that of the first segment, and the M empty ones in front of each other segment its own:

        segment_ids       1 1 1 0 0 2 2 0       M = 2, a b the prefix
        columns       a b x x x a b y y .
        positions     0 1 2 3 4 0 1 2 3 4       a segment goes on until the next one begins: no
        segments      1 1 1 1 1 2 2 2 2 2       token sees what stands behind its segment's end

    Args:
      segment_ids: `[B, T]`, the number of each token's segment, from 1; 0 where there is no token.

    Returns:
      (positions, segments), `[B, M + T]` each.
    """
    # The segment of the column before; in front of column 0 none, so that a row begins one there.
    before = jnp.pad(segment_ids, ((0, 0), (1, 0)))[:, :-1]
    # A token in column c of T is in column M + c, and the first column of its prefix M before.
    begins = (segment_ids != before) & (segment_ids > 0)
    begins = jnp.pad(begins, ((0, 0), (0, prefix)))
    columns = jnp.arange(begins.shape[1])
    # [B, M + T]: of every column the first column of the segment that it is in, the latest begun.
    first = jax.lax.cummax(jnp.where(begins, columns, 0), axis=1)
    return columns - first, jnp.cumsum(begins, axis=1)
