"""Responses of a model to rows of prompts, batch by batch."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from promptkd_jax.data.batches import eval_batches
from promptkd_jax.data.rows import Rows
from promptkd_jax.data.templates import PromptFormat, turn_end
from promptkd_jax.infra import sharding
from promptkd_jax.models.decoder import Decoder
from promptkd_jax.models.layers.gated_prefix import GatedPrefix, prefix_columns
from promptkd_jax.models.model import Model, check_positions
from promptkd_jax.models.sampler import row_keys, sample
from promptkd_jax.models.sampling_rules import Sampling


def with_turn_end(model: Model, prompt_format: PromptFormat, tokenizer: Any = None) -> Model:
    """The model, whose responses end also, and its rows first of all, with the token by which its
    chat template ends a turn.

    Args:
      tokenizer: of the prompts; None: the model's own.

    Raises:
      DataError: as `templates.turn_end`.
    """
    tokenizer = tokenizer or model.tokenizer
    end = turn_end(prompt_format, tokenizer)
    ends = () if end is None else (tokenizer.convert_tokens_to_ids(end),)
    return model.replace(eos_ids=tuple(dict.fromkeys(ends + model.eos_ids)))


def generate_responses(
    model: Model,
    rows: Rows,
    *,
    sampling: Sampling,
    prompt_capacity: int,
    max_new_tokens: int,
    batch_size: int,
    key: jax.Array,
    vocab_size: int | None = None,
    first: int = 0,
    soft_prompt: jax.Array | GatedPrefix | None = None,
) -> Iterator[np.ndarray]:
    """The model's response to every row's prompt from row `first` on, in order.

    Yields:
      Response tokens, an EOS included where the response ended with one. Row i's response depends
      on `key`, i and its prompt only.
    """
    longest = int(max(rows.prompt_lengths)) + max_new_tokens
    check_positions(model, prefix_columns(soft_prompt) + longest)
    batch_size = round_up_to_devices(batch_size)
    compiled = _sampler(model.decoder, sampling, max_new_tokens, vocab_size)
    length = max(prompt_capacity, *map(len, rows.tokens))
    batches = eval_batches(rows, batch_size=batch_size, length=length, first=first)
    for index, (batch, real) in enumerate(batches):
        numbers = np.arange(batch_size, dtype=np.int32) + first + index * batch_size
        prompts = batch.tokens[:, :prompt_capacity], batch.prompt_lengths, numbers
        out = compiled(model.params, *sharding.place_rows(prompts), key, soft_prompt)
        tokens, lengths = sharding.to_host((out.tokens, out.lengths))
        for row in range(real):
            yield tokens[row, batch.prompt_lengths[row] : lengths[row]]


@functools.lru_cache(maxsize=8)
def _sampler(decoder: Decoder, sampling: Sampling, max_new_tokens: int, vocab_size: int | None):
    """One compilation for all sets and seeds."""

    @jax.jit
    def compiled(params, prompts, lengths, numbers, key, prefix):
        return sample(
            decoder,
            params,
            prompts,
            lengths,
            row_keys(key, numbers),
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            prefix=prefix,
            vocab_size=vocab_size,
        )

    return compiled


def round_up_to_devices(batch_size: int) -> int:
    """Rounds a number of rows up so that each device has as many."""
    devices = sharding.axis_size(sharding.ROWS)
    return -(-batch_size // devices) * devices


def decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    """The text of a response, without special tokens and outer white space."""
    return tokenizer.decode(np.asarray(tokens).tolist(), skip_special_tokens=True).strip()
