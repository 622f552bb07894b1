"""The keys and values of a rollout: written by slices, read without a copy.

Prompts stand from column 0 on, the soft prompt included. Behind all of them is a ring of columns,
of which every row writes the same one in a turn: one slice of an array, and no scatter.

    column     0  1  2  3 | 4  5  6        4 columns for prompts, a ring of 3
    row 0      p  p  p  p | a  b  .        turn 2 writes column 4 + 2 % 3 = 6,
    row 1      p  p  .  . | a  b  .        which is position 6 of row 0, position 4 of row 1

Column c of the ring was written last `(turn - c) % size` turns ago, its age. A row that has written
w tokens before this one sees the ages 0 … w: older ones are of the row that had its place before
(continuous batching). No row writes more tokens than the ring has columns, so that none is
overwritten while it is seen.

Keys and values of a layer are `[B, K / G, S, G H]`: the columns that a head reads lie together, and
G heads beside one another. In 8 bits (`DecoderConfig.kv_cache_dtype`) a head's key, or value, is
rounded to multiples of its largest number over 127.

B rows, X prompt columns, S columns, N heads, K key/value heads, G of them in a group, H head width,
L layers.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from promptkd_jax.infra.sharding import ROWS, axis_size, constrain, platform
from promptkd_jax.models.config import DecoderConfig

# Of a TPU's registers.
SUBLANES = 8
LANES = 128


class LayerCache(NamedTuple):
    """Keys and values of one layer, `[B, K / G, S, G H]` each. K includes the copies of
    `attention.kv_repeats`. In 8 bits their scales are `[B, K / G, S, G]`, else None."""

    key: jax.Array
    value: jax.Array
    key_scale: jax.Array | None = None
    value_scale: jax.Array | None = None

    def write(self, key: jax.Array, value: jax.Array, column: jax.Array | int) -> LayerCache:
        """With keys and values `[B, T, K, H]` of all rows from `column` on."""
        scales = None, None  # leaves that are None are no leaves: the maps below skip them
        if self.key_scale is not None:
            (key, value), scales = zip(*(_rounded(x) for x in (key, value)))
        new = jax.tree.map(self._grouped, LayerCache(key, value, *scales))
        return jax.tree.map(
            lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, column, axis=2), self, new
        ).placed()

    def _grouped(self, x: jax.Array) -> jax.Array:
        """`[B, T, K, …]` as `[B, K / G, T, G …]`."""
        return x.reshape(*x.shape[:2], self.key.shape[1], -1).swapaxes(1, 2)

    def placed(self) -> LayerCache:
        """The cache with its rows and heads on the devices that have those of the queries."""
        return jax.tree.map(lambda x: constrain(x, ROWS, "tensor", None, None), self)


@struct.dataclass
class Cache:
    """The cache of all layers.

    Attributes:
      layers: of each.
      prompt_lengths: `[B]`, columns of each row's prompt, its soft prompt included.
      turn: `[]`, how many tokens were written into each row's place.
      prompt_columns: static, in front of the ring.
    """

    layers: tuple[LayerCache, ...]
    prompt_lengths: jax.Array
    turn: jax.Array
    prompt_columns: int = struct.field(pytree_node=False)

    @property
    def columns(self) -> int:
        """S."""
        return self.layers[0].key.shape[2]

    @property
    def column(self) -> jax.Array:
        """The column that this turn writes, `[]`."""
        return self.prompt_columns + self.turn % self._ring_columns

    @property
    def _ring_columns(self) -> int:
        return self.columns - self.prompt_columns

    def seen(self, position: jax.Array, sliding_window: int | None = None) -> jax.Array:
        """True where the token that a row writes in this turn sees a column: `[B, S]`.

        Args:
          position: `[B]`, of these tokens, the soft prompt included.
          sliding_window: positions that one sees, itself included; None: all before.
        """
        position, begin = position[:, None], self.prompt_lengths[:, None]  # [B, 1]
        # In front of the ring a column is a position. In it only the age says how far before this
        # token another stands: rows of one turn are of different positions, and all write one
        # column.
        column = jnp.arange(self.prompt_columns)
        age = (self.turn - jnp.arange(self._ring_columns)) % self._ring_columns
        # [B, S] in two parts; position - begin is w of the module's docstring.
        prompt, written = column < begin, age <= position - begin
        if sliding_window is not None:
            prompt &= column > position - sliding_window
            written &= age < sliding_window
        return jnp.concatenate([prompt, written], axis=1)

    def placed(self) -> Cache:
        """The cache with every layer's rows and heads where they belong."""
        return self.replace(layers=tuple(layer.placed() for layer in self.layers))


def make_cache(
    config: DecoderConfig,
    keys: jax.Array,
    values: jax.Array,
    prompt_lengths: jax.Array,
    *,
    prompt_columns: int,
    new_columns: int,
) -> Cache:
    """Returns a cache that begins with the keys and values of prompts.

    Args:
      keys, values: `[L, B, X, K, H]`, X at most `prompt_columns`.
      prompt_lengths: `[B]`, the soft prompt included.
      new_columns: the most tokens that a row writes.
    """
    # The prefill's keys have the columns of its bucket, X; the cache those of the widest prompt.
    _, rows, _, heads, width = keys.shape
    groups = heads // _heads_per_group(config.padded.num_heads, heads, width)
    shape = (rows, groups, prompt_columns + new_columns, heads // groups)
    if config.kv_cache_dtype == "int8":
        numbers = jnp.zeros((*shape[:3], shape[3] * width), jnp.int8)
        scales = jnp.zeros(shape, jnp.bfloat16)
        empty = LayerCache(numbers, numbers, scales, scales)
    else:
        numbers = jnp.zeros((*shape[:3], shape[3] * width), keys.dtype)
        empty = LayerCache(numbers, numbers)
    # An array for each layer: a stack of all would be copied in every turn that writes one of them.
    layers = tuple(empty.write(key, value, 0) for key, value in zip(keys, values))
    return Cache(layers, prompt_lengths, jnp.zeros((), jnp.int32), prompt_columns)


def _heads_per_group(num_heads: int, num_kv_heads: int, width: int) -> int:
    """G. On a TPU the fewest heads that fill the lanes of a register, and whose queries fill its
    sublanes; or all heads of a device."""
    if platform() != "tpu":
        return 1
    parts = axis_size("tensor")  # devices that share out the heads; a group is of one device
    own = num_kv_heads // parts if num_kv_heads % parts == 0 else num_kv_heads
    queries = num_heads // num_kv_heads
    for group in range(1, own):
        full = group * width % LANES == 0 and group * queries >= SUBLANES
        if own % group == 0 and full:
            return group
    return own


def _rounded(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`[B, T, K, H]` as int8, and the scales of the heads, `[B, T, K]`."""
    exact = x.astype(jnp.float32)
    scale = (jnp.max(jnp.abs(exact), axis=-1) / 127).astype(jnp.bfloat16)
    # By the rounded scale, with which they are read again: so they may pass 127 by a little.
    divisor = jnp.where(scale == 0, 1, scale).astype(jnp.float32)[..., None]
    return jnp.clip(jnp.round(exact / divisor), -127, 127).astype(jnp.int8), scale
