"""Causal attention of whole rows, by the fastest implementation that the chip and the shapes allow.

"splash" is JAX's flash kernel for TPU, "cudnn" NVIDIA's, "xla" plain array operations; all three
compute the same.

B rows, T columns, N heads, K key/value heads, H head width, S columns of the cache.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from promptkd_jax.infra import sharding
from promptkd_jax.models.layers.cache import LANES, LayerCache

BTNH_SPEC = (sharding.ROWS, None, "tensor", None)  # how rows and heads lie on the mesh
MAX_BLOCK = 512  # columns; the scores of a block then take 1 MiB on the chip
AMPERE = 8.0  # the first compute capability that cuDNN has the kernel for
MAX_PARTS = 4  # of a row, without a kernel: then 5/8 of the scores are computed, 1/2 are needed


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    dropout: float = 0.0,
    dropout_keys: jax.Array | None = None,
) -> jax.Array:
    """Lets every column attend to itself and those before it; scores are scaled by H ** -0.5.

    Rows start at column 0, so there is no padding mask. Differentiable once.

    Args:
      query: `[B, T, N, H]`.
      key, value: `[B, T, K, H]`; query head n reads key/value head n * K // N.
      sliding_window: columns that a column sees, itself and those before it; None: all of them.
      soft_cap: c, where scores s become c tanh(s / c); None: they stay as they are.
      sinks: `[N]`, a score of every head that takes part in the softmax and has no value; or None.
      segment_ids: `[B, T]`, of packed rows: a column sees those of its own segment alone; or None.
      dropout: the share of the weights that are 0, the others being so much larger.
      dropout_keys: `[B]`, a key of each row, which says the weights; None: no dropout.

    Returns:
      `[B, T, N, H]` in the dtype of `query`.
    """
    rows, columns, num_heads, head_dim = query.shape
    key, value = (repeat_kv(x, num_heads) for x in (key, value))  # [B, T, K, H], K may have grown
    if dropout and dropout_keys is not None:  # no kernel draws what is the same on every mesh
        drop = functools.partial(keep_weights, dropout_keys, dropout, num_heads)
        return _in_parts(query, key, value, sinks, segment_ids, sliding_window, soft_cap, drop)
    chosen = implementation(
        platform=sharding.platform(),
        dtype=query.dtype.name,
        rows=rows,
        columns=columns,
        num_heads=num_heads,
        num_kv_heads=key.shape[2],
        head_dim=head_dim,
        row_parts=sharding.axis_size(sharding.ROWS),
        head_parts=sharding.axis_size("tensor"),
        plain=soft_cap is None and sinks is None,
        capability=sharding.compute_capability(),
    )
    if chosen == "splash":
        return _splash(query, key, value, sinks, segment_ids, sliding_window, soft_cap)
    if chosen == "cudnn":
        return _cudnn(query, key, value, segment_ids, sliding_window)
    return _in_parts(query, key, value, sinks, segment_ids, sliding_window, soft_cap)


def keep_mask(
    keys: jax.Array, rate: float, shape: tuple[int, ...], place: jax.Array | int
) -> jax.Array:
    """Returns the factors of dropout, `[B, *shape]`: 0 for a share of `rate`, else 1 / (1 - rate).

    A row's depends on its own key and on no other row. Of a shape that is longer along its first
    dimension (padded heads, more columns) the beginning is the same.

    Args:
      keys: `[B]`, of the rows.
      place: a number of the place in a layer: 0 and 1, or 0 of the embeddings; 2 is attention's.
    """

    def of_row(key):
        return jax.random.bernoulli(jax.random.fold_in(key, place), 1 - rate, shape)

    return jax.vmap(of_row)(keys).astype(jnp.float32) / (1 - rate)


def dropped(x: jax.Array, rate: float, keys: jax.Array | None, place: int) -> jax.Array:
    """`[B, T, D]` after dropout, if there are keys `[B]`."""
    if not rate or keys is None:
        return x
    return (x * keep_mask(keys, rate, x.shape[1:], place)).astype(x.dtype)  # 1.11 has no bfloat16


def keep_weights(keys: jax.Array, rate: float, num_heads: int, begin: int, end: int) -> jax.Array:
    """Returns the factors of dropout, as `keep_mask`, for the weights that the queries `begin` to
    `end` give the columns up to `end`: `[B, N, end - begin, end]`. Those of a query and a head
    depend on their numbers alone, not on how many others there are.

    Args:
      keys: `[B]`, of the rows in a layer.
    """

    def of_row(key, query, head):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, 2), query), head)
        return jax.random.bernoulli(key, 1 - rate, (end,))

    of_heads = jax.vmap(of_row, (None, None, 0))  # [N, end]
    of_queries = jax.vmap(of_heads, (None, 0, None), 1)  # [N, queries, end]
    of_rows = jax.vmap(of_queries, (0, None, None))
    kept = of_rows(keys, jnp.arange(begin, end), jnp.arange(num_heads))
    return kept.astype(jnp.float32) / (1 - rate)


# Devices along `tensor` share out query heads. Query head n reads key/value head n * K // N, so a
# device with N / t of the queries needs K / t of the keys, if t divides K. Where it does not, each
# key/value head is repeated, beside itself, until t does: with N = 8, K = 2 and t = 4,
#
#     queries     0 1 | 2 3 | 4 5 | 6 7
#     key/value    0  |  0  |  1  |  1       kv_repeats = 2, and n * 4 // 8 finds the same head
#
# Repeating all of them N / K times would do as well, but the cache would be that much larger.


def kv_repeats(num_heads: int, num_kv_heads: int) -> int:
    """The number of copies of each key/value head with which the devices of `tensor` share out all
    heads evenly, and each has those of its own query heads."""
    least = math.lcm(num_kv_heads, sharding.axis_size("tensor"))
    return least // num_kv_heads if num_heads % least == 0 else 1


def repeat_kv(x: jax.Array, num_heads: int) -> jax.Array:
    """Keys or values `[B, T, K, H]` with their `kv_repeats` for `num_heads` query heads."""
    if kv_repeats(num_heads, x.shape[2]) == 1:
        return x
    return sharding.constrain(jnp.repeat(x, kv_repeats(num_heads, x.shape[2]), axis=2), *BTNH_SPEC)


def attend_to_cache(
    query: jax.Array,
    cache: LayerCache,
    seen: jax.Array,
    *,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Lets one query a row attend to the cache: `[B, 1, N, H]`.

    Args:
      query: `[B, 1, N, H]`.
      cache: of the layer.
      seen: `[B, S]`, True for the columns that a row's query sees.
      soft_cap, sinks: as for `attend`.
    """
    # G heads lie beside one another, C = K / G times. A query of one of them is 0 for the others,
    # so that one product is that of all, and of what comes out its own part is taken:
    #
    #     queries of head 0    q q . .      q is [N / K, H], . are zeros
    #     queries of head 1    . . q q
    rows, _, num_heads, head_dim = query.shape
    groups, width = cache.key.shape[1], cache.key.shape[3]
    query = query.reshape(rows, groups, -1, head_dim)  # [B, C, G N / K, H]
    beside = width // head_dim  # G
    head_of_query = jnp.arange(query.shape[2]) // (query.shape[2] // beside)
    own = head_of_query[:, None] == jnp.arange(width) // head_dim  # [G N / K, G H]
    query = jnp.where(own, jnp.concatenate([query] * beside, axis=-1), 0)
    key, value = (x.astype(query.dtype) for x in (cache.key, cache.value))
    scores = jnp.einsum("bcnj,bcsj->bcns", query, key, preferred_element_type=jnp.float32)
    # A scale belongs to all H numbers of a key: it multiplies the product, not the key. Likewise
    # below, where the values' scales multiply the shares that weigh them.
    scores = _times(scores * head_dim**-0.5, cache.key_scale)
    shares = _shares(scores, seen[:, None, None], sinks, soft_cap)
    shares = _times(shares, cache.value_scale)
    out = jnp.einsum("bcns,bcsj->bcnj", shares.astype(value.dtype), value)
    out = sum(jnp.split(jnp.where(own, out, 0), beside, axis=-1))
    return out.reshape(rows, 1, num_heads, head_dim)


def _times(scores: jax.Array, scales: jax.Array | None) -> jax.Array:
    """Scores `[B, C, G N / K, S]` by the scales `[B, C, S, G]` of the heads that they are of."""
    if scales is None:
        return scores
    by_head = scales.swapaxes(2, 3)[:, :, :, None].astype(scores.dtype)  # [B, C, G, 1, S]
    scaled = scores.reshape(*scores.shape[:2], by_head.shape[2], -1, scores.shape[3]) * by_head
    return scaled.reshape(scores.shape)


def implementation(
    *,
    platform: str,
    dtype: str,
    rows: int,
    columns: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    row_parts: int,
    head_parts: int,
    plain: bool = True,
    capability: float = 9.0,
) -> str:
    """Chooses the implementation of `attend`: "splash", "cudnn" or "xla".

    splash, on "tpu": bfloat16 or float32; at least 128 columns, since it pads to that; rows and
    query heads that divide among the devices, since each device runs the kernel on its own.
    Key/value heads divide too, with their copies.

    cudnn, on "gpu": bfloat16 or float16; heads of at most 128 in multiples of 8; key/value heads
    that divide among the devices, since it wants query, key and value cut alike; neither soft caps
    nor sinks; NVIDIA's Ampere or later.

    Args:
      platform: of the devices, as `sharding.platform` says it.
      dtype: of query, key and value.
      rows, columns, num_heads, num_kv_heads, head_dim: B, T, N, K, H, of all devices together.
      row_parts: over how many devices the rows are dealt out (`data` times `fsdp`).
      head_parts: over how many the heads are (`tensor`).
      plain: whether there are neither a soft cap nor sinks.
      capability: of a GPU, as `sharding.compute_capability` says it.
    """
    if platform == "tpu":
        divides = rows % row_parts == 0 and num_heads % head_parts == 0
        fits = dtype in ("bfloat16", "float32") and columns >= LANES
        return "splash" if divides and fits else "xla"
    if platform == "gpu":
        fits = dtype in ("bfloat16", "float16") and head_dim % 8 == 0 and head_dim <= 128
        fits &= plain and num_kv_heads % head_parts == 0 and capability >= AMPERE
        return "cudnn" if fits else "xla"
    return "xla"


# Without a kernel: the [T, T] scores of a head are computed in at most MAX_PARTS stripes of
# queries, each against the keys up to its own end (# computed, . skipped; with a window also from
# the left):
#
#     keys →    # . . .
#     queries   # # . .        5/8 of the square where a kernel computes 1/2
#        ↓      # # # .
#               # # # #


def _in_parts(
    query,
    key,
    value,
    sinks,
    segment_ids,
    sliding_window: int | None,
    soft_cap: float | None,
    drop: Callable[[int, int], jax.Array] | None = None,
) -> jax.Array:
    """A few columns of queries at a time, against no keys but those that one of them sees."""
    rows, columns, num_heads, head_dim = query.shape
    # By the key/value head that is read: [B, T, K, N / K, H] as [B, K, N / K, T, H].
    query = jnp.moveaxis(query.reshape(rows, columns, key.shape[2], -1, head_dim), 1, 3)
    key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)  # [B, K, T, H]
    size = math.ceil(columns / min(MAX_PARTS, math.ceil(columns / LANES)))
    parts = []  # [B, K, N / K, size, H] each
    for begin in range(0, columns, size):
        end = min(begin + size, columns)
        # The first query of a stripe sees the fewest: whatever is before its window, no other sees.
        first = 0 if sliding_window is None else max(0, begin + 1 - sliding_window)
        seen = _seen(jnp.arange(begin, end), jnp.arange(first, end), sliding_window)
        if segment_ids is not None:  # [B, size, S] as [B, 1, 1, size, S]
            same = segment_ids[:, begin:end, None] == segment_ids[:, None, first:end]
            seen = (seen & same)[:, None, None]
        seen_keys = key[:, :, first:end], value[:, :, first:end]
        queries = query[:, :, :, begin:end]
        # [B, N, size, end] as the scores are, [B, K, N / K, size, end - first].
        kept = drop and drop(begin, end)[..., first:].reshape(*queries.shape[:4], -1)
        parts.append(_weigh(queries, *seen_keys, seen, sinks, soft_cap, kept))
    attended = jnp.moveaxis(jnp.concatenate(parts, axis=3), 3, 1)  # [B, T, K, N / K, H]
    return attended.reshape(rows, columns, num_heads, head_dim)


def _seen(columns, others, sliding_window: int | None) -> jax.Array:
    """True where a column of `columns` `[…, T]` sees one of `others` `[S]`: `[…, T, S]`."""
    # A query sees itself, so that no row of scores is -inf throughout, whose softmax would be NaN.
    seen = others <= columns[..., None]
    return seen if sliding_window is None else seen & (others > columns[..., None] - sliding_window)


def _weigh(query, key, value, seen, sinks, soft_cap: float | None, kept=None) -> jax.Array:
    """The mean of the values that are `seen`, weighted by the softmax of the scores: `[B, K, …, H]`
    of queries `[B, K, N / K, …, H]` and of keys and values `[B, K, S, H]`."""
    # With heads before columns XLA's CPU compiler transposes no scores.
    scores = jnp.einsum("bk...h,bksh->bk...s", query, key, preferred_element_type=jnp.float32)
    shares = _shares(scores * query.shape[-1] ** -0.5, seen, sinks, soft_cap)
    if kept is not None:
        shares = shares * kept
    return jnp.einsum("bk...s,bksh->bk...h", shares.astype(value.dtype), value)


def _shares(scores, seen, sinks, soft_cap: float | None) -> jax.Array:
    """The softmax of scores `[B, K, N / K, …, S]` over the columns that are `seen`."""
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    scores = jnp.where(seen, scores, -jnp.inf)
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    # One more summand of the denominator: the shares of the values add up to less than 1.
    every = (*scores.shape[1:3], *(1,) * (scores.ndim - 3))  # [K, N / K, …, 1]
    total = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
    return jnp.exp(scores - jnp.logaddexp(total, sinks.astype(jnp.float32).reshape(every)))


def _cudnn(query, key, value, segment_ids, sliding_window: int | None) -> jax.Array:
    """JAX refuses cuDNN's gradient of an odd number of columns, and wants all three cut alike."""
    columns, same = query.shape[1], None
    if segment_ids is not None:  # JAX adds it to the scores, as [B, 1, T, T] in half precision
        ids = jnp.pad(segment_ids, ((0, 0), (0, columns % 2)), mode="edge")
        same = ids[:, None, :, None] == ids[:, None, None, :]
        same = sharding.constrain(same, sharding.ROWS, None, None, None)
    query, key, value = (
        sharding.constrain(_pad(x, columns % 2), *BTNH_SPEC) for x in (query, key, value)
    )
    attended = jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=same,
        is_causal=True,
        local_window_size=None if sliding_window is None else (sliding_window - 1, 0),
        implementation="cudnn",
    )
    return attended[:, :columns]


def _pad(x: jax.Array, columns: int) -> jax.Array:
    """More columns, of zeros, behind all others: no query sees them, what they see is cut off."""
    return jnp.pad(x, ((0, 0), (0, columns), (0, 0), (0, 0)))


def _splash(
    query, key, value, sinks, segment_ids, sliding_window: int | None, soft_cap: float | None
) -> jax.Array:
    """The kernel on each device's own rows and heads."""
    kernel = functools.partial(_splash_on_device, sliding_window=sliding_window, soft_cap=soft_cap)
    if jax.sharding.get_abstract_mesh().empty:
        return kernel(query, key, value, sinks, segment_ids)
    # check_vma: the kernel does not say along which axes its outputs vary.
    cut = jax.shard_map(
        kernel,
        in_specs=(*(P(*BTNH_SPEC),) * 3, P("tensor"), P(sharding.ROWS)),
        out_specs=P(*BTNH_SPEC),
        check_vma=False,
    )
    return cut(query, key, value, sinks, segment_ids)


def _splash_on_device(
    query, key, value, sinks, segment_ids, *, sliding_window: int | None, soft_cap: float | None
) -> jax.Array:
    """The kernel wants `[N, T, H]`, scaled queries, and columns that are whole blocks."""
    # Padded columns come behind all others: as keys no query of the row sees them, as queries they
    # are cut off, and with that their gradients are zero.
    _, columns, num_heads, head_dim = query.shape
    block = _block(columns)
    padded = block * math.ceil(columns / block)
    query = (query * head_dim**-0.5).astype(query.dtype)
    query, key, value = (_pad(x, padded - columns).swapaxes(1, 2) for x in (query, key, value))
    kernel, segments = _kernel(padded, num_heads, block, sliding_window, soft_cap), None
    if segment_ids is not None:
        from jax.experimental.pallas.ops.tpu import splash_attention

        ids = jnp.pad(segment_ids, ((0, 0), (0, padded - columns)), mode="edge")
        segments = splash_attention.SegmentIds(ids, ids)  # of queries, of keys

    def attend_row(query, key, value, segments):
        return kernel(query, key, value, segments, sinks=sinks)

    return jax.vmap(attend_row)(query, key, value, segments).swapaxes(1, 2)[:, :columns]


def _block(columns: int) -> int:
    """Columns of a block: as few blocks of at most MAX_BLOCK as can be, with little padding."""
    blocks = math.ceil(columns / MAX_BLOCK)
    return LANES * math.ceil(columns / blocks / LANES)


def _kernel(
    columns: int, num_heads: int, block: int, sliding_window: int | None, soft_cap: float | None
) -> Any:
    """The kernel for `[N, T, H]`; on CPU, where only tests run it, interpreted."""
    # Here, since only a TPU needs it and it is a tenth of a second to import.
    from jax.experimental.pallas.ops.tpu import splash_attention

    shape = (columns, columns)
    if sliding_window is None:
        mask = splash_attention.CausalMask(shape)
    else:
        mask = splash_attention.LocalMask(shape, (sliding_window - 1, 0), offset=0)
    # Of the forward pass, of the gradients of keys and values, and of that of queries.
    sizes = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    return splash_attention.make_splash_mha_single_device(
        splash_attention.MultiHeadMask([mask] * num_heads),
        block_sizes=splash_attention.BlockSizes(**dict.fromkeys(sizes, block)),
        attn_logits_soft_cap=soft_cap,
        interpret=sharding.platform() == "cpu",
    )
