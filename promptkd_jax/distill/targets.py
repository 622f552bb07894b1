"""Sources of target rows: the data, the student's own continuation of its prompts, a mixture of
both, or rows that the student wrote before.

B rows, n of each prompt, T columns.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from promptkd_jax.data.batch import Batch, choose_rows, pad_to
from promptkd_jax.distill.methods.method import Method
from promptkd_jax.distill.replay import Replay, draw, empty_rows, push
from promptkd_jax.infra.sharding import ROWS, axis_size, mesh_is_external
from promptkd_jax.models.config import matrix_parameters
from promptkd_jax.models.decoder import Decoder
from promptkd_jax.models.language_model import LanguageModel
from promptkd_jax.models.layers.quantization import QUANTIZE, quantize_params
from promptkd_jax.models.sampler import SamplingModel, row_keys, sample
from promptkd_jax.models.sampling_rules import Sampling

# Folded into a step's key for the draws between sources; its rows use 0, 1, …
_DRAW = np.uint32(2**32 - 1)
MANY_ROWS, MANY_READINGS = 1024, 6  # see `rows_at_once`


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
    second_top_k: int = 0,
    slots: int = 0,
    prompt_buckets: int = 1,
    rollouts_per_prompt: int = 1,
) -> tuple[Batch, jax.Array]:
    """Samples the model's own continuation of the batch's prompts: on-policy targets.

    Args:
      batch: rows `[B / n, T]`, of which the first `prompt_lengths` tokens are the prompt.
      key: of all rows.
      prompt_capacity: the most tokens of a prompt.
      force_eos: whether the last token of a row that ran to the limit is overwritten by EOS, as in
        the published code; otherwise such a row has no EOS.

    All others: see `sample`.

    Returns:
      The batch `[B, prompt_capacity + max_new_tokens]`, and per row whether it ended by itself.
    """
    # Responses of the data are cut off: the new tokens begin behind the prompt.
    prompts = batch.tokens[:, :prompt_capacity]  # [B / n, X]
    keys = row_keys(key, jnp.arange(prompts.shape[0] * rollouts_per_prompt))
    out = sample(
        model,
        params,
        prompts,
        batch.prompt_lengths,
        keys,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        vocab_size=vocab_size,
        active=active,
        second=second,
        second_share=second_share,
        second_top_k=second_top_k,
        slots=slots,
        prompt_buckets=prompt_buckets,
        rollouts_per_prompt=rollouts_per_prompt,
    )
    tokens, prompt_lengths = out.tokens, jnp.repeat(batch.prompt_lengths, rollouts_per_prompt)
    if force_eos:
        # [B, T]: True at the last token of each row.
        last = jnp.arange(tokens.shape[1]) == out.lengths[:, None] - 1
        tokens = jnp.where(last & ~out.ended[:, None], sampling.eos_ids[0], tokens)
    return Batch(tokens, prompt_lengths, out.lengths), out.ended


class TargetBatch(NamedTuple):
    """The rows of one step `[B, T]`; `is_student` `[B]`, whether the student wrote the row;
    `hit_eos` `[B]`, whether it ended by itself (not computed for "replay" targets)."""

    rows: Batch
    is_student: jax.Array
    hit_eos: jax.Array


def empty_target_batch(number: int, columns: int) -> TargetBatch:
    """A place for `number` rows of `columns` tokens that are still to be written."""
    nobody = jnp.zeros(number, bool)
    return TargetBatch(empty_rows(number, columns), nobody, nobody)


def rows_at_once(
    method: Method, student: Decoder | LanguageModel, rows: int, row_parts: int
) -> int:
    """Rows of a step that are written at once, the others following where some end (continuous
    batching): as many as the method says. Where it leaves that open (0), all; or half, where
    that pays whether rows end early or not, or nearly so (docs/performance.md): where a device has
    `MANY_ROWS`, whose cache weighs `MANY_READINGS` times what the weights do that each turn reads.

    Args:
      rows: of the step; row_parts: devices that these are dealt out to.
    """
    if asked := method.execution.max_concurrent_rollouts:
        return min(asked, rows)
    can_end = method.sampling.eos_ids and isinstance(student, Decoder)
    # One reading of a prompt serves the rows that share it, side by side. On somebody else's mesh
    # nobody knows where rows lie.
    apart = method.rollouts_per_prompt == 1 and not mesh_is_external()
    if not (can_end and apart) or rows % (2 * row_parts):
        return rows
    config, columns = student.config, method.prompt_capacity + method.rollout_length
    of_row = 2 * config.num_layers * config.num_kv_heads * config.head_dim * columns
    least = max(MANY_ROWS, MANY_READINGS * matrix_parameters(config) / of_row)
    return rows // 2 if rows / row_parts >= least else rows


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
    """Returns the rows that a step of `method` trains on, and the replay buffer after it.

    Every random number is drawn from `key`, so that all processes have the same.

    Args:
      student, params: the model that writes.
      batch: rows of the data, of which the student writes `method.rollouts_per_prompt` each.
      replay: the buffer of "replay" targets.
      step: number of the step in its stage, from 0.
      teacher: the model that writes with the student, where `method.teacher_writes_along`.
    """
    # Rows of the data, or that the teacher wrote before training, are the batch itself.
    if not method.source.on_policy:
        nobody = jnp.zeros(batch.lengths.shape[0], bool)
        return TargetBatch(batch, nobody, nobody), replay
    rows = batch.tokens.shape[0] * method.rollouts_per_prompt
    write = functools.partial(
        _rollout_rounded,
        method.execution.rollout_quantize,
        student,
        params,
        batch,
        key,
        prompt_capacity=method.prompt_capacity,
        max_new_tokens=method.rollout_length,
        sampling=method.sampling,
        vocab_size=method.vocab_size,
        # The policy gradient values sampled tokens: one that was not sampled has no value.
        force_eos=method.conventions.force_eos and not method.has_policy_gradient,
        second=teacher,
        second_share=method.teacher_share,
        second_top_k=method.teacher_top_k,
        slots=rows_at_once(method, student, rows, axis_size(ROWS)),
        prompt_buckets=method.execution.length_buckets,
        rollouts_per_prompt=method.rollouts_per_prompt,
    )
    # The rollout's keys are those of its rows; draws between sources have one of their own.
    draw_key = jax.random.fold_in(key, _DRAW)
    return WRITERS[method.targets](method, write, batch, replay, draw_key, step)


def _rollout_rounded(
    quantize: str, student: Decoder | LanguageModel, params: Any, *inputs: Any, **how: Any
) -> tuple[Batch, jax.Array]:
    """The `rollout` of a student whose kernels are in `quantize`, one of `QUANTIZE`."""
    if quantize == "none":
        return rollout(student, params, *inputs, **how)
    if not isinstance(student, Decoder) or student.config.quantization:
        raise ValueError(
            f"rollout_quantize: {quantize!r} is for a Decoder with whole kernels; expected 'none'"
        )
    # Here, in whatever branch of a step writes, and not before: rows of the data or of the replay
    # buffer need no rounded copy. What learns from the rows are the parameters as they are.
    rounded = Decoder(student.config.replace(quantization=QUANTIZE[quantize]))
    return rollout(rounded, quantize_params(params, QUANTIZE[quantize]), *inputs, **how)


def row_statistics(
    method: Method, written: TargetBatch, replay: Replay | None
) -> dict[str, jax.Array]:
    """Means and counts of the rows that a step trains on; the threshold of the buffer after it."""
    rows, is_student, hit_eos = written
    length = jnp.sum(rows.num_supervised) / jnp.sum(rows.num_segments)
    statistics = {"response_length": length, "tokens": jnp.sum(rows.has_token)}
    source = method.source
    if source.on_policy and (source.reads_responses or source.teacher_writes):
        statistics["on_policy_share"] = is_student.mean()
    if method.source.on_policy and not method.source.keeps_replay:
        statistics["eos_rate"] = jnp.sum(hit_eos) / jnp.maximum(jnp.sum(is_student), 1)
    if method.source.keeps_replay:
        statistics["replay_threshold"] = replay.threshold
    return statistics


# The rows of each on-policy source: (method, write, batch, replay buffer, key of its draws, step of
# the stage) -> (rows, replay buffer). `write(active=…)` is a `rollout` of the batch.


def _student_rows(method: Method, write: Callable, batch: Batch, replay, draw_key, step):
    rows, ended = write()
    return TargetBatch(rows, jnp.ones_like(ended), ended), replay


def _mixed_rows(method: Method, write: Callable, batch: Batch, replay, draw_key, step):
    """GKD's lambda, row by row; rows of the data are not sampled at all."""
    # [B]. Drawn before anything is written: rows that are not wanted take no turn of the rollout.
    is_student = jax.random.uniform(draw_key, batch.lengths.shape) < method.on_policy_share
    rows, ended = write(active=is_student)
    return TargetBatch(choose_rows(is_student, rows, batch), is_student, ended), replay


def _replayed_rows(method: Method, write: Callable, batch: Batch, replay, draw_key, step):
    """DistiLLM's choice for a whole batch: the data, the buffer, or new rows, which go into it."""
    if replay is None:
        raise ValueError("targets = 'replay' needs init_state(…, replay=empty_replay(…))")
    columns, number = replay.rows.tokens.shape[1], batch.lengths.shape[0]
    # One u ~ U(0, 1) decides for the whole batch, as published; the share of new rows fades:
    #
    #     u < threshold · (1 - step / total_steps)    new rows
    #     u < threshold                               rows of the buffer, new ones until it is full
    #     else                                        rows of the data
    u = jax.random.uniform(draw_key)
    share_of_new = replay.threshold * jnp.maximum(1 - step / method.total_steps, 0.0)
    new = (u < share_of_new) | ((u < replay.threshold) & ~replay.full)
    old = ~new & (u < replay.threshold)

    def of_data():
        return pad_to(batch, columns), replay

    def of_buffer():
        return draw(replay, jax.random.fold_in(draw_key, 1), number), replay

    def written_now():
        rows = pad_to(write()[0], columns)
        return rows, push(replay, rows)

    # A switch, so that only what was chosen is computed.
    case = jnp.where(new, 2, jnp.where(old, 1, 0))
    rows, replay = jax.lax.switch(case, [of_data, of_buffer, written_now])
    is_student = jnp.broadcast_to(case > 0, (number,))
    return TargetBatch(rows, is_student, jnp.zeros(number, bool)), replay


WRITERS = {
    "student": _student_rows,
    "mixed": _mixed_rows,
    "teacher_and_student": _mixed_rows,
    "replay": _replayed_rows,
}
