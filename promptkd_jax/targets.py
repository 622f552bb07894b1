"""Where target rows come from: a batch of data, or the student's own continuation of its requests.

A batch has one layout everywhere: every row starts at column 0 and ends at its length, and which
positions count follows from lengths alone, never from token values.

B rows, T columns, R response positions.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from promptkd_jax.models.decoder import Decoder
from promptkd_jax.sampler import Sampling, row_keys, sample


class Batch(NamedTuple):
    """`tokens` `[B, T]` request then response (its EOS included), `prompt_lengths` and `lengths`
    `[B]`: where the response begins and where the row ends."""

    tokens: jax.Array
    prompt_lengths: jax.Array
    lengths: jax.Array


class Responses(NamedTuple):
    """Where a batch's response tokens are predicted, gathered to R columns.

    `positions` `[B, R]` are the columns whose hidden state predicts a response token, `labels`
    `[B, R]` those tokens, `mask` `[B, R]` 1 where there is one. The EOS is among them.
    """

    positions: jax.Array
    labels: jax.Array
    mask: jax.Array


def responses(batch: Batch, capacity: int) -> Responses:
    """The supervised positions of `batch`; no row may have more than `capacity` response tokens."""
    positions = batch.prompt_lengths[:, None] - 1 + jnp.arange(capacity)
    mask = positions < batch.lengths[:, None] - 1
    positions = jnp.clip(positions, 0, batch.tokens.shape[1] - 2)
    labels = jnp.take_along_axis(batch.tokens, positions + 1, axis=1)
    return Responses(positions, labels, mask.astype(jnp.float32))


def gather(hidden: jax.Array, where: Responses) -> jax.Array:
    """The hidden states `[B, T, D]` at the supervised positions, `[B, R, D]`."""
    return jnp.take_along_axis(hidden, where.positions[:, :, None], axis=1)


def rollout(
    decoder: Decoder,
    params: Any,
    batch: Batch,
    key: jax.Array,
    *,
    prompt_capacity: int,
    max_new_tokens: int,
    sampling: Sampling,
    vocab_size: int,
    force_eos: bool,
) -> tuple[Batch, jax.Array]:
    """The model's own continuation of the batch's requests: on-policy targets.

    Requests are the first `prompt_lengths` tokens of each row, at most `prompt_capacity`.
    `force_eos` overwrites the last token of a row that ran to the limit, as the published code
    does; otherwise such a row has no EOS.

    Returns:
      The batch `[B, prompt_capacity + max_new_tokens]`, and per row whether it ended by itself.
    """
    requests = batch.tokens[:, :prompt_capacity]
    keys = row_keys(key, jnp.arange(requests.shape[0]))
    out = sample(
        decoder,
        params,
        requests,
        batch.prompt_lengths,
        keys,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        vocab_size=vocab_size,
    )
    tokens = out.tokens
    if force_eos:
        last = jnp.arange(tokens.shape[1]) == out.lengths[:, None] - 1
        tokens = jnp.where(last & ~out.ended[:, None], sampling.eos_ids[0], tokens)
    return Batch(tokens, batch.prompt_lengths, out.lengths), out.ended
