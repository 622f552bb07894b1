"""Where target rows come from: the data, the student's own continuation of its requests, a mixture
of both, or what the student wrote before.

B rows, T columns, C rows of a replay buffer.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from promptkd_jax.data.batch import Batch, choose_rows, pad_to
from promptkd_jax.distill.method import POLICY_GRADIENT, Method
from promptkd_jax.distill.replay import Replay, draw, empty_rows, push
from promptkd_jax.models.decoder import Decoder
from promptkd_jax.models.language_model import LanguageModel
from promptkd_jax.models.sampler import Sampling, SamplingModel, row_keys, sample

# Folded into a step's key for its coins; its rows use 0, 1, …
_COIN = np.uint32(2**32 - 1)


def rollout(
    model: Decoder | LanguageModel,
    params: Any,
    batch: Batch,
    key: jax.Array,
    *,
    prompt_capacity: int,
    max_new_tokens: int,
    sampling: Sampling,
    vocab_size: int,
    force_eos: bool,
    active: jax.Array | None = None,
    second: SamplingModel | None = None,
    second_share: float = 0.0,
    slots: int = 0,
    request_lengths: int = 1,
) -> tuple[Batch, jax.Array]:
    """The model's own continuation of the batch's requests: on-policy targets.

    Requests are the first `prompt_lengths` tokens of each row, at most `prompt_capacity`.
    `force_eos` overwrites the last token of a row that ran to the limit, as the published code
    does; otherwise such a row has no EOS. All else: see `sample`.

    Returns:
      The batch `[B, prompt_capacity + max_new_tokens]`, and per row whether it ended by itself.
    """
    # Responses that the data has are cut off: what is sampled begins behind the prompt.
    requests = batch.tokens[:, :prompt_capacity]
    keys = row_keys(key, jnp.arange(requests.shape[0]))
    out = sample(
        model,
        params,
        requests,
        batch.prompt_lengths,
        keys,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        vocab_size=vocab_size,
        active=active,
        second=second,
        second_share=second_share,
        slots=slots,
        request_lengths=request_lengths,
    )
    tokens = out.tokens
    if force_eos:
        # [B, T]: the last token of each row.
        last = jnp.arange(tokens.shape[1]) == out.lengths[:, None] - 1
        tokens = jnp.where(last & ~out.ended[:, None], sampling.eos_ids[0], tokens)
    return Batch(tokens, batch.prompt_lengths, out.lengths), out.ended


class TargetBatch(NamedTuple):
    """The rows of one step `[B, T]`; `is_student` `[B]`, whether the student wrote the row;
    `hit_eos` `[B]`, whether it ended by itself (not computed for "replay" targets)."""

    rows: Batch
    is_student: jax.Array
    hit_eos: jax.Array


def empty_target_batch(number: int, columns: int) -> TargetBatch:
    """The place of `number` rows of `columns` tokens that are still to be written."""
    nobody = jnp.zeros(number, bool)
    return TargetBatch(empty_rows(number, columns), nobody, nobody)


def target_rows(
    method: Method,
    student: Decoder | LanguageModel,
    params: Any,
    batch: Batch,
    replay: Replay | None,
    key: jax.Array,
    *,
    step: jax.Array,
    teacher: SamplingModel | None,
) -> tuple[TargetBatch, Replay | None]:
    """The rows that a step of `method` trains on, and the buffer after it.

    Every coin is drawn from `key`, so that all hosts see the same.

    Args:
      student, params: who writes; teacher: who writes with it, at `method.teacher_share`.
      batch: the data's rows.
      replay: the buffer of "replay" targets.
      step: of the stage, from 0.
    """
    # Rows of the data, or that the teacher wrote before training, are the batch itself.
    if not method.source.on_policy:
        nobody = jnp.zeros(batch.lengths.shape[0], bool)
        return TargetBatch(batch, nobody, nobody), replay
    values_samples = any(name == POLICY_GRADIENT for name, _ in method.student_terms)
    write = functools.partial(
        rollout,
        student,
        params,
        batch,
        key,
        prompt_capacity=method.prompt_capacity,
        max_new_tokens=method.rollout_length,
        sampling=method.sampling,
        vocab_size=method.vocab_size,
        # What was not sampled has no worth as a sample.
        force_eos=method.conventions.force_eos and not values_samples,
        second=teacher,
        second_share=method.teacher_share,
        slots=method.execution.max_concurrent_rollouts,
        request_lengths=method.execution.length_buckets,
    )
    # The rollout's keys are those of its rows; coins are drawn from a stream of their own.
    coin = jax.random.fold_in(key, _COIN)
    return WRITERS[method.targets](method, write, batch, replay, coin, step)


def row_statistics(
    method: Method, written: TargetBatch, replay: Replay | None
) -> dict[str, jax.Array]:
    """What there is to say of the rows that a step trains on; of the buffer, as it is now."""
    rows, is_student, hit_eos = written
    # [B]; what a step says of them are means over rows, and counts.
    lengths = rows.num_supervised.astype(jnp.float32)
    found = {"response_length": jnp.mean(lengths), "tokens": jnp.sum(rows.lengths)}
    if method.source.on_policy and method.source.reads_responses:
        found["on_policy_share"] = is_student.mean()
    if method.source.on_policy and not method.source.keeps_replay:
        found["eos_rate"] = jnp.sum(hit_eos) / jnp.maximum(jnp.sum(is_student), 1)
    if method.source.keeps_replay:
        found["replay_threshold"] = replay.threshold
    return found


# How each source makes its rows: (method, write, batch, replay buffer, key of its coins, step of
# the stage) -> (rows, replay buffer). `write(active=…)` is a `rollout` of the batch.


def _student_rows(method: Method, write: Callable, batch: Batch, replay, coin, step):
    rows, ended = write()
    return TargetBatch(rows, jnp.ones_like(ended), ended), replay


def _mixed_rows(method: Method, write: Callable, batch: Batch, replay, coin, step):
    """GKD's lambda, row by row; rows of the data are not sampled at all."""
    own = jax.random.uniform(coin, batch.lengths.shape) < method.on_policy_share
    rows, ended = write(active=own)
    return TargetBatch(choose_rows(own, rows, batch), own, ended), replay


def _replayed_rows(method: Method, write: Callable, batch: Batch, replay, coin, step):
    """DistiLLM's choice for a whole batch: the data, the buffer, or new rows, which go into it."""
    if replay is None:
        raise ValueError("targets = 'replay' needs init_state(…, replay=empty_replay(…))")
    columns, number = replay.rows.tokens.shape[1], batch.lengths.shape[0]
    # luck in [0, threshold · (1 - step / K)): new rows   the share of new rows fades, since those
    #         up to threshold: from the buffer            that are there grow better as well
    #         beyond: the data's
    # One coin for the whole batch, as published.
    luck = jax.random.uniform(coin)
    fading = replay.threshold * jnp.maximum(1 - step / method.total_steps, 0.0)
    # On-policy with probability `threshold`; of these ever more come from the buffer.
    new = (luck < fading) | ((luck < replay.threshold) & ~replay.full)
    old = ~new & (luck < replay.threshold)

    def of_data():
        return pad_to(batch, columns), replay

    def of_buffer():
        return draw(replay, jax.random.fold_in(coin, 1), number), replay

    def written_now():
        rows = pad_to(write()[0], columns)
        return rows, push(replay, rows)

    # A switch, so that only what was chosen is computed.
    case = jnp.where(new, 2, jnp.where(old, 1, 0))
    rows, replay = jax.lax.switch(case, [of_data, of_buffer, written_now])
    is_student = jnp.broadcast_to(case > 0, (number,))
    return TargetBatch(rows, is_student, jnp.zeros(number, bool)), replay


WRITERS = {"student": _student_rows, "mixed": _mixed_rows, "replay": _replayed_rows}
