"""One layout of a batch, everywhere: every row starts at column 0 and ends at its length.

Which positions count follows from lengths alone, never from token values: padding is often EOS.

B rows, T columns, R response positions, D width, k kept tokens of a cached teacher.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from promptkd_jax.data.top_k import TopK

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int


class Batch(NamedTuple):
    """`tokens` `[B, T]` request then response (its EOS included), `prompt_lengths` and `lengths`
    `[B]`: where the response begins and where the row ends. `cached` `[B, R, k]`: what the teacher
    said of every response position, where it was written down beforehand. `supervised` `[B, T]`:
    the tokens that a student learns from, such as all turns of the assistant in a conversation;
    None: those of the response. `segment_ids` `[B, T]`: of packed rows, which have several rows of
    the data in each, the number of each token's within its row, from 1, and 0 where there is no
    token; these have `supervised`, and their `prompt_lengths` mean nothing. See `packing`."""

    tokens: Int[Array, "B T"]
    prompt_lengths: Int[Array, " B"]
    lengths: Int[Array, " B"]
    cached: TopK | None = None
    supervised: Bool[Array, "B T"] | None = None
    segment_ids: Int[Array, "B T"] | None = None

    @property
    def num_supervised(self) -> Int[Array, " B"]:
        """How many tokens of each row a student learns from."""
        if self.supervised is None:
            return self.lengths - self.prompt_lengths
        return jnp.sum(self.supervised, axis=1)

    @property
    def has_token(self) -> Bool[Array, "B T"]:
        """Whether there is a token in a column."""
        if self.segment_ids is None:
            return jnp.arange(self.tokens.shape[1]) < self.lengths[:, None]
        return self.segment_ids > 0

    @property
    def num_segments(self) -> Int[Array, " B"]:
        """How many rows of the data are in each row: 1, but for packed rows."""
        if self.segment_ids is None:
            return jnp.ones_like(self.lengths)
        return jnp.max(self.segment_ids, axis=1)


class Responses(NamedTuple):
    """Where a batch's response tokens are predicted, gathered to R columns.

    `positions` `[B, R]` are the columns whose hidden state predicts a response token, `labels`
    `[B, R]` those tokens, `mask` `[B, R]` 1 where there is one. The EOS is among them. `beyond`
    `[B]` counts each row's response tokens that have no position here.
    """

    positions: Int[Array, "B R"]
    labels: Int[Array, "B R"]
    mask: Float[Array, "B R"]
    beyond: Int[Array, " B"] | None = None


def responses(batch: Batch, capacity: int) -> Responses:
    """The positions of `batch` that predict supervised tokens, R = `capacity` for each row.

    A supervised token has none, and no loss sees it, where it is beyond the capacity or the columns
    of the batch, or the first of its row, or of its segment in a packed one. `beyond` counts them,
    `train_step` as `tokens_beyond`.

    Raises:
      ValueError: arrays of shapes that do not belong together, or no position at all.
    """
    tokens, *ends = (jnp.shape(x) for x in (batch.tokens, batch.prompt_lengths, batch.lengths))
    if len(tokens) != 2 or tokens[1] < 2 or any(end != tokens[:1] for end in ends):
        raise ValueError(
            f"tokens {list(tokens)}, prompt_lengths {list(ends[0])} and lengths {list(ends[1])}; "
            "expected [B, T] with T at least 2, [B] and [B]"
        )
    if capacity < 1:
        raise ValueError(f"capacity: {capacity}; expected at least 1 response token")
    if batch.segment_ids is not None and batch.supervised is None:
        raise ValueError("segment_ids without supervised: expected both, as pack_batch gives them")
    if batch.supervised is None:
        positions = batch.prompt_lengths[:, None] - 1 + jnp.arange(capacity)
        ends_at = jnp.minimum(batch.lengths, tokens[1])[:, None] - 1
        mask = (positions >= 0) & (positions < ends_at)
    else:
        columns = jnp.arange(tokens[1])
        there = batch.supervised & (columns > 0) & (columns < batch.lengths[:, None])
        if batch.segment_ids is not None:  # what predicts a token is in its segment, right before
            there &= batch.segment_ids == jnp.roll(batch.segment_ids, 1, axis=1)
        # [B, R]: the columns of supervised tokens in their order, then others, which do not count.
        first = jnp.argsort(~there, axis=1, stable=True)[:, :capacity]
        first = jnp.pad(first, ((0, 0), (0, max(capacity - tokens[1], 0))))
        counts = jnp.minimum(jnp.sum(there, axis=1), capacity)
        positions, mask = first - 1, jnp.arange(capacity) < counts[:, None]
    positions = jnp.clip(positions, 0, tokens[1] - 2)
    labels = jnp.take_along_axis(batch.tokens, positions + 1, axis=1)
    beyond = jnp.maximum(batch.num_supervised - jnp.sum(mask, axis=1), 0)
    return Responses(positions, labels, mask.astype(jnp.float32), beyond)


def gather(hidden: Float[Array, "B T D"], where: Responses) -> Float[Array, "B R D"]:
    """The hidden states `[B, T, D]` at the supervised positions, `[B, R, D]`."""
    return jnp.take_along_axis(hidden, where.positions[:, :, None], axis=1)


def choose_rows(chosen: jax.Array, one: Batch, other: Batch) -> Batch:
    """Row b of `one` where `chosen[b]`, else of `other`, in as many columns as the wider has."""
    width = max(one.tokens.shape[1], other.tokens.shape[1])
    one, other = pad_to(one, width), pad_to(other, width)
    tokens = jnp.where(chosen[:, None], one.tokens, other.tokens)
    prompt_lengths = jnp.where(chosen, one.prompt_lengths, other.prompt_lengths)
    return Batch(tokens, prompt_lengths, jnp.where(chosen, one.lengths, other.lengths))


def truncate(batch: Batch, width: int) -> Batch:
    """The first `width` columns, of rows that are no longer."""

    def cut(x):
        return None if x is None else x[..., :width]

    wide = {name: cut(getattr(batch, name)) for name in ("tokens", "supervised", "segment_ids")}
    return batch._replace(**wide)


def pad_to(batch: Batch, width: int) -> Batch:
    """The rows in `width` columns, with nothing cached.

    Raises:
      ValueError: they are wider, or say which tokens are supervised, which beside rows that a
        student wrote would be lost.
    """
    if batch.supervised is not None:
        raise ValueError(
            "rows with `supervised` tokens, beside rows of a student or of a replay buffer; "
            "expected a row for each turn of the assistant, its prompt the turns before it"
        )
    more = width - batch.tokens.shape[1]
    if more < 0:
        raise ValueError(f"rows of {batch.tokens.shape[1]} columns do not fit into {width}")
    return Batch(jnp.pad(batch.tokens, ((0, 0), (0, more))), batch.prompt_lengths, batch.lengths)
