"""The one train step: rollout, teacher update and student update in a single pure function.

`Method` describes a distillation method; this module executes one step of it, `train_step`.

    y ~ q(.|x)                                                    `target_rows`: a rollout
    P <- P - eta_P d/dP [KL(p_P || q) + alpha_k KL(p_P || p)]     `_update_teacher`
    theta <- theta - eta d/dtheta KL(q || p_P)                    `_update_student`

Gradients are accumulated over `micro_batches`, which `objective` computes one at a time. Where both
updates may see the same forward passes, they do: `_update_together`.

B rows, T columns, R response positions, M soft-prompt tokens, D width, V vocabulary,
G micro-batches of one update, UG of a whole step: the student has an update for each of U
minibatches.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from promptkd_jax.data.batch import Batch, responses
from promptkd_jax.distill import objective
from promptkd_jax.distill.losses import losses, policy_gradient
from promptkd_jax.distill.losses.chunked_loss import linear_values
from promptkd_jax.distill.losses.transport import TokenKernel
from promptkd_jax.distill.methods.method import Method
from promptkd_jax.distill.micro_batches import (
    corpus_scale,
    deal_out,
    in_smallest_bucket,
    token_scales,
)
from promptkd_jax.distill.optimizer import Gradients, accumulate, gradient_norm
from promptkd_jax.distill.prompt_update import (
    PromptWeights,
    adapted,
    prompt_scalars,
    prompt_weights,
    with_prompt,
)
from promptkd_jax.distill.state import (
    Metrics,
    Optimizers,
    TrainState,
    advance,
    apply_gradients,
    curriculum,
)
from promptkd_jax.distill.targets import TargetBatch, row_statistics, target_rows
from promptkd_jax.distill.teacher import Models, PromptedForward, StepModels, StudentForward
from promptkd_jax.distill.terms import MicroBatch


def write_ahead(
    state: TrainState,
    teacher: Any,
    batch: Batch,
    frozen_student: Any = None,
    *,
    method: Method,
    models: Models,
) -> TrainState:
    """Begins a stage of a `one_step_off_policy` method, of which every step writes the next's rows.

    Args:
      state, teacher, frozen_student, method, models: as for `train_step`.
      batch: the first step's, of which `train_step` gets the second's.

    Returns:
      The state with the rows of its next step in `pending`.
    """
    step_models = StepModels(method, models, teacher, frozen_student)
    pending, replay = _write(state, batch, step_models, state.step)
    return state.replace(pending=pending, replay=replay)


def train_step(
    state: TrainState,
    teacher: Any,
    batch: Batch,
    corpus: Batch | None = None,
    frozen_student: Any = None,
    token_kernel: TokenKernel | None = None,
    *,
    method: Method,
    models: Models,
    optimizers: Optimizers,
) -> tuple[TrainState, Metrics]:
    """Makes one step. Pure: jit it with the keyword arguments bound and the state donated.

    Algorithm 1 of the paper, see the top of this module; the student learns from the P just
    updated, with `prompt_lag` from that before. Without a soft prompt there is only the last line,
    with the terms that `method` names.

    With `one_step_off_policy` the rows trained on are `state.pending`, and the student before the
    update writes those of the next step: neither needs the other's result.

    Args:
      state: see `TrainState`.
      teacher: the teacher's parameters (None where `method.needs_teacher` is False or it learns).
      batch: B rows, B divisible by `method.num_micro_batches`; B / n, where the student writes n =
        `method.rollouts_per_prompt` to each; with `one_step_off_policy` those of the next step.
      corpus: rows of text for `method.corpus_terms`, a multiple of `method.num_micro_batches`.
      frozen_student: the parameters beside an adapter that alone is trained, see `lora.split`.
      token_kernel: `transport.token_kernel` of the teacher, where `method.needs_token_kernel`.
      method; models: student and teacher; optimizers: of each group in `state.params`.

    Returns:
      The new state, and the Metrics of the rows trained on. A step whose loss or gradient is not
      finite changes nothing but `step`, the counters and what is written ahead.
    """
    step_models = StepModels(method, models, teacher, frozen_student, token_kernel)
    if method.execution.one_step_off_policy:
        if state.pending is None:
            raise ValueError("one_step_off_policy = True needs a state that write_ahead(…) began")
        targets = state.pending
        pending, replay = _write(state, batch, step_models, state.step + 1)
        state = state.replace(pending=pending, replay=replay)  # kept if the step is skipped
        new = state
    else:
        targets, replay = _write(state, batch, step_models, state.step)
        new = state.replace(replay=replay)
    # [B, T] -> [UG, B / UG, T]; everything below maps or scans over UG.
    corpus = corpus if method.corpus_terms else None
    keys = step_models.dropout_keys(jax.random.fold_in(state.key, state.step), targets.rows, corpus)
    references = batch if method.prompt_fallback else None
    micro_batches = deal_out(targets, corpus, method, keys, references)
    metrics = _measure_rows(targets, micro_batches, new, method)
    micro_batches = micro_batches._replace(curriculum=curriculum(method, state))
    # `state` is kept as it was, for a step that is skipped, and for the soft prompt.
    if method.updates_together:
        new, metrics = _update_together(new, micro_batches, metrics, step_models, optimizers)
        return _skip_if_not_finite(state, *advance(new, metrics, method))
    if method.prompted or method.teacher_view == "online":
        new, metrics = _update_teacher(new, micro_batches, metrics, step_models, optimizers)
    if method.prompted:
        # The student learns from the prompt that was just updated, or from the plain teacher.
        micro_batches, metrics = with_prompt(state, new, micro_batches, metrics, step_models)
    if method.has_policy_gradient:
        # [UG, B / UG, R] each, under the student as it sampled: later updates of the step, of other
        # minibatches and passes, are measured against it.
        log_probs = functools.partial(_log_probs, state=new, step_models=step_models)
        log_probs = jax.lax.map(in_smallest_bucket(log_probs, method), micro_batches)
        micro_batches = micro_batches._replace(policy=_policy_targets(log_probs, method))
    new, metrics = _update_student(new, micro_batches, metrics, step_models, optimizers)
    return _skip_if_not_finite(state, *advance(new, metrics, method))


def _write(state: TrainState, batch: Batch, step_models: StepModels, step: jax.Array):
    """The target rows of `step`, written by the student before its update, and the replay buffer
    after them."""
    return target_rows(
        step_models.method,
        step_models.models.student,
        step_models.student_params(state.params["student"]),
        batch,
        state.replay,
        jax.random.fold_in(state.key, step),
        step=step,
        teacher=step_models.mixture_model(state.params),
    )


def _skip_if_not_finite(
    state: TrainState, new: TrainState, metrics: Metrics
) -> tuple[TrainState, Metrics]:
    """The new state if losses and gradients are finite, else the old one; its step and counters
    move on in either case."""
    # A NaN in any gradient makes its norm NaN, so that the norms tell of all of them.
    norms = jnp.stack(list(metrics.grad_norms.values()))  # [learners]
    finite = jnp.all(jnp.isfinite(metrics.losses["student"])) & jnp.all(jnp.isfinite(norms))
    # A select, not a branch: both states exist already, and a branch would wait for the CPU.
    next_state = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, state)
    in_a_row = jnp.where(finite, 0, state.skipped_in_a_row + 1)
    next_state = next_state.replace(
        step=state.step + 1, skipped=state.skipped + ~finite, skipped_in_a_row=in_a_row
    )
    return next_state, metrics._replace(scalars=metrics.scalars | {"skipped_in_a_row": in_a_row})


def _measure_rows(
    targets: TargetBatch, micro_batches: MicroBatch, state: TrainState, method: Method
) -> Metrics:
    """Counts the response tokens that losses see, by micro-batch, and those that they do not."""
    capacity = method.response_capacity
    # mask [UG, B / UG, R]; counts [UG]: response tokens of each micro-batch.
    where = jax.vmap(lambda rows: responses(rows, capacity))(micro_batches.rows)
    scalars = row_statistics(method, targets, state.replay)
    scalars["tokens_beyond"] = jnp.sum(where.beyond)
    return Metrics({}, {}, {}, jnp.sum(where.mask, axis=(1, 2)), scalars)


# Both updates at once


def _update_together(
    state: TrainState,
    micro_batches: MicroBatch,
    metrics: Metrics,
    step_models: StepModels,
    optimizers: Optimizers,
) -> tuple[TrainState, Metrics]:
    """The teacher's update, if it has one, and the student's, a micro-batch at a time in one bucket
    and of the same forward passes: that of the student, and with `prompt_lag` that of the prompted
    teacher as well. `Method.updates_together` says when.
    """
    method, text_scale = step_models.method, corpus_scale(micro_batches)

    def gradients_of(micro_batch: MicroBatch, scale, weights: PromptWeights) -> Gradients:
        params, after, student = state.params, state, None
        if not step_models.drops:  # in its own update alone, which then has another forward
            student = step_models.student_vjp(params["student"], micro_batch.rows)
        prompted = step_models.prompted_vjp(params, micro_batch.rows) if method.prompted else None
        found = _teacher_gradients(
            params, micro_batch, scale, weights, step_models, student, prompted
        )
        # With `prompt_lag` the student sees the prompt before its update, whose forward is there.
        if not method.prompt_lag:
            # There is one micro-batch, and so the teacher's whole gradient. It is applied here for
            # the student to see, and again below, which XLA may do but once.
            for gradients in found.values():
                after = apply_gradients(after, gradients.by_group, optimizers)
            micro_batch, prompted = micro_batch._replace(soft_prompt=after.soft_prompt), None
        if method.has_policy_gradient:
            log_probs = _log_probs(micro_batch, after, step_models, student)
            policy = _policy_targets(jax.tree.map(lambda x: x[None], log_probs), method)
            micro_batch = micro_batch._replace(policy=jax.tree.map(lambda x: x[0], policy))
        found["student"] = objective.student_gradients(
            after.params, micro_batch, scale, text_scale, step_models, student, prompted
        )
        return found

    found = _accumulated(gradients_of, state, micro_batches, metrics, method)
    return _learn(found, state, metrics, method, optimizers)


def _accumulated(
    gradients_of: Callable[..., dict[str, Gradients]],
    state: TrainState,
    micro_batches: MicroBatch,
    metrics: Metrics,
    method: Method,
) -> dict[str, Gradients]:
    """What `gradients_of` gives, by who learns, over all micro-batches, each in its bucket."""

    # {who: Gradients} is turned to Gradients of {who: part}, which is what `accumulate` sums and
    # stacks by its fields, and turned back behind it.
    def by_part(*inputs) -> Gradients:
        found = gradients_of(*inputs)
        return Gradients(*({name: x[i] for name, x in found.items()} for i in range(3)))

    weights = prompt_weights(state, method)
    scales = token_scales(metrics.counts, method.conventions)
    inputs = micro_batches, scales, weights
    parts = accumulate(in_smallest_bucket(by_part, method), inputs)
    return {name: Gradients(*(part[name] for part in parts)) for name in parts.by_group}


def _learn(
    found: dict[str, Gradients],
    state: TrainState,
    metrics: Metrics,
    method: Method,
    optimizers: Optimizers,
) -> tuple[TrainState, Metrics]:
    """The state and metrics after the updates of all learners, "prompt", "teacher", "student"."""
    for learner, gradients in found.items():
        state, metrics = _learn_one(learner, gradients, state, metrics, method, optimizers)
    return state, metrics


def _learn_one(
    learner: str,
    gradients: Gradients,
    state: TrainState,
    metrics: Metrics,
    method: Method,
    optimizers: Optimizers,
) -> tuple[TrainState, Metrics]:
    new = apply_gradients(state, gradients.by_group, optimizers)
    norm = gradient_norm(gradients.by_group["soft_prompt" if learner == "prompt" else learner])
    new_metrics = metrics.add(learner, gradients.loss, gradients.sums, norm)
    if learner != "prompt":
        return new, new_metrics
    # The rest is of the prompt alone: its coefficient, and figures of its update.
    if method.regularization and method.regularization_schedule == "adaptive":
        kl = jnp.sum(gradients.sums["prompt_regularizer"]) / jnp.sum(metrics.counts)
        # In a warm-up on L_reg alone its value says nothing of what it costs to keep it there.
        warming = state.step < method.prompt_warmup_steps
        coefficient = adapted(state.regularization, kl / method.target_kl)
        coefficient = jnp.where(warming, state.regularization, coefficient)
        new = new.replace(regularization=coefficient)
    scalars = prompt_scalars(state, new, method)
    return new, new_metrics._replace(scalars=metrics.scalars | scalars)


# The teacher's update: its soft prompt, or all of it


def _update_teacher(
    state: TrainState,
    micro_batches: MicroBatch,
    metrics: Metrics,
    step_models: StepModels,
    optimizers: Optimizers,
) -> tuple[TrainState, Metrics]:
    """P <- P - eta grad [L_kd + alpha_k L_reg]; or mutual learning (Zhang et al. 2018, arXiv
    1706.00384): the teacher learns from the student, which then learns from what the teacher has
    become.

    With `prompt_updates` the metrics are means over these."""
    method = step_models.method

    # The carry of the scan is the whole state, so that momentum and an adaptive coefficient move
    # with each update; the rows, and the student on them, are the same in all.
    def update(state: TrainState, _=None):
        def gradients_of(micro_batch: MicroBatch, scale, weights: PromptWeights):
            return _teacher_gradients(state.params, micro_batch, scale, weights, step_models)

        found = _accumulated(gradients_of, state, micro_batches, metrics, method)
        return _learn(found, state, metrics, method, optimizers)

    if method.prompt_updates == 1:
        return update(state)
    new, measured = jax.lax.scan(update, state, length=method.prompt_updates)
    return new, jax.tree.map(lambda x: x.mean(axis=0), measured)


def _teacher_gradients(
    params: dict[str, Any],
    micro_batch: MicroBatch,
    scale: jax.Array,
    weights: PromptWeights,
    step_models: StepModels,
    student: StudentForward | None = None,
    prompted: PromptedForward | None = None,
) -> dict[str, Gradients]:
    """Those of the teacher's update, by who learns: the "prompt", the "teacher", or nobody."""
    if step_models.method.prompted:
        how = scale, *weights, step_models, student, prompted
        return {"prompt": objective.prompt_gradients(params, micro_batch, *how)}
    if step_models.method.teacher_view == "online":
        how = scale, step_models, student
        return {"teacher": objective.teacher_gradients(params, micro_batch, *how)}
    return {}


# The student's update


def _log_probs(
    micro_batch: MicroBatch,
    state: TrainState,
    step_models: StepModels,
    student_forward: StudentForward | None = None,
) -> tuple[jax.Array, ...]:
    """The sampled tokens of a micro-batch, which of them count, and their log-probabilities by
    student and teacher, `[B / UG, R]` each."""

    def log_prob_of_labels(labels, logits):
        return -losses.cross_entropy(labels, logits)

    rows = micro_batch.rows
    where = step_models.where(rows)
    (student, _), _ = student_forward or step_models.student_vjp(state.params["student"], rows)
    teacher, _ = step_models.teacher(
        state.params, rows, micro_batch.soft_prompt, micro_batch.plain_rows
    )
    both = [
        linear_values([log_prob_of_labels], model, [where.labels])[0]
        for model in (student, teacher)
    ]
    return where.labels, where.mask, *both


def _policy_targets(
    by_micro_batch: tuple[jax.Array, ...], method: Method
) -> policy_gradient.PolicyTarget:
    """The advantages of the sampled tokens, valued over the whole step, `[UG, B / UG, R]` each, of
    `_log_probs` of all micro-batches."""
    # Whitening needs the mean and variance of all rows of the step, not of a micro-batch.
    whole = [x.reshape(-1, x.shape[-1]) for x in by_micro_batch]  # [B, R]
    target = policy_gradient.policy_target(*whole, method.teacher_share, method.policy_gradient)
    return jax.tree.map(lambda x: x.reshape(by_micro_batch[0].shape), target)


def _update_student(
    state: TrainState,
    micro_batches: MicroBatch,
    metrics: Metrics,
    step_models: StepModels,
    optimizers: Optimizers,
) -> tuple[TrainState, Metrics]:
    """theta <- theta - eta grad of the student's terms, `method.updates_per_step` times.

    With several updates a step, each of `method.passes` goes through all minibatches in turn; the
    metrics are means over the passes.
    """
    method = step_models.method

    def update(state: TrainState, xs):
        micro_batches, counts = xs
        text_scale = corpus_scale(micro_batches)

        def gradients_of(micro_batch: MicroBatch, scale):
            scales = scale, text_scale
            return objective.student_gradients(state.params, micro_batch, *scales, step_models)

        scales = token_scales(counts, method.conventions)
        gradients = accumulate(in_smallest_bucket(gradients_of, method), (micro_batches, scales))
        norm = gradient_norm(gradients.by_group["student"])
        new = apply_gradients(state, gradients.by_group, optimizers)
        return new, (gradients.loss, gradients.sums, norm)

    # Micro-batch u G + g of a step is the g-th of its minibatch u.
    def split(x):  # [UG, …] -> [U, G, …]
        return x.reshape(
            method.minibatches, method.execution.gradient_accumulation_steps, *x.shape[1:]
        )

    def one_pass(state, number):
        each = micro_batches
        if each.dropout_keys is not None:  # [UG, B / UG]: every pass draws anew
            fold = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))
            keys = jax.tree.map(lambda keys: fold(keys, number), each.dropout_keys)
            each = each._replace(dropout_keys=keys)
        return jax.lax.scan(update, state, jax.tree.map(split, (each, metrics.counts)))

    if method.updates_per_step == 1:
        state, (loss, sums, norm) = update(state, (micro_batches, metrics.counts))
    else:
        # [passes, U, …]: later passes are off-policy by the updates before them.
        state, measured = jax.lax.scan(one_pass, state, jnp.arange(method.passes))
        loss, sums, norm = jax.tree.map(lambda x: x.mean(axis=0), measured)
        loss, sums = jax.tree.map(lambda x: x.reshape(-1), (loss, sums))  # [UG]
        norm = norm.mean()
    return state, metrics.add("student", loss, sums, norm)
