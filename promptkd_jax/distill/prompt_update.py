"""The soft prompt's part of a step: the weights of its loss, and the rows that do without it.

Three rules keep a prompt from harm; each is a field of the method:

    gates from 0           p_P = p at the start, see `models.layers.gated_prefix`
    prompt_warmup_steps    first L_reg alone, while the student learns from p
    prompt_fallback        p where p_P finds the data's own response less likely

B rows, R response positions, M soft-prompt tokens, D width, UG micro-batches of a step.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from promptkd_jax.data.batch import responses
from promptkd_jax.distill.losses.chunked_loss import label_log_probs
from promptkd_jax.distill.methods.method import Method
from promptkd_jax.distill.state import Metrics, TrainState
from promptkd_jax.distill.teacher import StepModels, lazy_logits
from promptkd_jax.distill.terms import MicroBatch
from promptkd_jax.models.layers.gated_prefix import GatedPrefix, prefix_vectors


class PromptWeights(NamedTuple):
    """The weights of L_kd and L_reg in each micro-batch of an update of the prompt, `[UG]`."""

    kd: jax.Array
    regularizer: jax.Array


def prompt_scalars(before: TrainState, after: TrainState, method: Method) -> dict[str, jax.Array]:
    """Figures of an update of the prompt, for `Metrics.scalars`."""
    scalars = {
        "prompt_norm": jnp.linalg.norm(prefix_vectors(after.soft_prompt)),
        "regularization_weight": prompt_weights(before, method).regularizer[0],
    }
    if isinstance(after.soft_prompt, GatedPrefix):
        scalars["prompt_gate"] = jnp.mean(after.soft_prompt.gates)
    return scalars


def prompt_weights(state: TrainState, method: Method) -> PromptWeights:
    """Returns the weights of L_kd, 1, and L_reg, alpha_k, in step k, counted from 1.

    "constant": `method.regularization`. "linear": that times 1 - k / total_steps (eq. 3).
    "adaptive": `state.regularization`, which an update moves, see `adapted`. In the steps of the
    prompt's warm-up L_kd has none, "adaptive" rests, and k and total_steps count from its end.
    """
    number, warmup = method.num_micro_batches, method.prompt_warmup_steps
    kd = jnp.broadcast_to(jnp.where(state.step < warmup, 0.0, 1.0), (number,))
    if method.regularization_schedule == "adaptive":
        return PromptWeights(kd, jnp.broadcast_to(state.regularization, (number,)))
    if method.regularization_schedule == "constant":
        return PromptWeights(kd, jnp.full(number, method.regularization))
    # Counted from 1: in the last step the coefficient is 0.
    k = jnp.broadcast_to(state.step + 1 - warmup, (number,))
    if method.conventions.early_clock and number > 1:
        k = k + (jnp.arange(number) == number - 1)
    falling = jnp.clip(1 - k / (method.total_steps - warmup), 0.0, 1.0)
    return PromptWeights(kd, method.regularization * falling)


def adapted(coefficient: jax.Array, ratio: jax.Array) -> jax.Array:
    """The coefficient, moved by at most 2 % (Ziegler et al. 2019, arXiv 1909.08593, section 2.2).

    Args:
      ratio: the measured KL over the target; above 1 the coefficient rises.
    """
    return coefficient * (1 + 0.1 * jnp.clip(ratio - 1, -0.2, 0.2))


# How the student sees the teacher


def with_prompt(
    before: TrainState,
    after: TrainState,
    micro_batches: MicroBatch,
    metrics: Metrics,
    step_models: StepModels,
) -> tuple[MicroBatch, Metrics]:
    """The micro-batches with the soft prompt of the student's loss, and the rows without it."""
    soft_prompt = _prompt_of_student_loss(before, after, step_models.method)
    micro_batches = micro_batches._replace(soft_prompt=soft_prompt)
    if (plain := _plain_rows(after, micro_batches, step_models)) is None:
        return micro_batches, metrics
    scalars = metrics.scalars | {"plain_share": jnp.mean(plain)}
    return micro_batches._replace(plain_rows=plain), metrics._replace(scalars=scalars)


def _prompt_of_student_loss(before: TrainState, after: TrainState, method: Method):
    """The soft prompt of the student's loss of each micro-batch, `[UG, M, D]`."""
    # [UG]: published, each micro-batch trains the prompt and then the student, but the prompt moves
    # when the last one has; so all others see the one before.
    is_last = jnp.arange(method.num_micro_batches) == method.num_micro_batches - 1
    fresh = is_last | (not method.conventions.stale_prompt)

    def of_each(new, old):
        return jnp.where(fresh.reshape(-1, *(1,) * new.ndim), new, old)

    return jax.tree.map(of_each, after.soft_prompt, before.soft_prompt)


def _plain_rows(
    state: TrainState, micro_batches: MicroBatch, step_models: StepModels
) -> jax.Array | None:
    """Rows that the student learns from the plain teacher, `[UG, B / UG]`; None: never any.

    In the prompt's warm-up all of them. With `prompt_fallback` those to whose prompt the data have
    a response that is less likely behind the soft prompt than without: what the student wrote
    itself has no right answer token by token, but its prompt has one.
    """
    method = step_models.method
    if not method.prompt_warmup_steps and not method.prompt_fallback:
        return None
    # A value, not a branch of Python: the step is traced. `StepModels.teacher` runs no teacher that
    # none of the rows wants.
    warming = state.step < method.prompt_warmup_steps
    if not method.prompt_fallback:
        return jnp.broadcast_to(warming, micro_batches.is_student.shape)

    def is_worse(micro_batch: MicroBatch):  # [B / UG]
        rows = micro_batch.references
        where = responses(rows, method.response_capacity)
        teacher = step_models.models.teacher, step_models.teacher_params(state.params)
        # [B / UG, R] each: log p of the response's tokens.
        prompted, plain = (
            label_log_probs(
                lazy_logits(*teacher, rows, where, method.vocab_size, prefix), where.labels
            )
            for prefix in (micro_batch.soft_prompt, None)
        )
        return jnp.sum((prompted - plain) * where.mask, axis=1) < 0

    return warming | jax.lax.map(is_worse, micro_batches)
