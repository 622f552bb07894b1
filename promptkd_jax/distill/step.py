"""The one train step: rollout, teacher update and student update in a single pure function.

`Method` describes a distillation method; this module executes one step of it, `train_step`.

    y ~ q(.|x)                                                    `target_rows`: a rollout
    P <- P - eta_P d/dP [KL(p_P || q) + alpha_k KL(p_P || p)]     `_update_prompt`
    theta <- theta - eta d/dtheta KL(q || p_P)                    `_update_student`

Gradients are accumulated over micro-batches, one at a time (`objective`). Row i of B is in number
i mod UG, so that each device keeps its own rows of each: `[B, ...]` is seen as `[UG, B / UG, ...]`.

B rows, T columns, R response positions, M soft-prompt tokens, D width, V vocabulary,
G micro-batches of one update, UG of a whole step: the student has an update for each of U
minibatches.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from promptkd_jax.data.batch import Batch, responses, truncate
from promptkd_jax.distill import losses, objective, policy_gradient
from promptkd_jax.distill.chunked_loss import linear_values
from promptkd_jax.distill.curriculum import curriculum
from promptkd_jax.distill.method import Conventions, Method
from promptkd_jax.distill.method_fields import POLICY_GRADIENT
from promptkd_jax.distill.optimizer import accumulate, gradient_norm
from promptkd_jax.distill.state import Metrics, Optimizers, TrainState, advance
from promptkd_jax.distill.targets import TargetBatch, row_statistics, target_rows
from promptkd_jax.distill.teacher import DropoutKeys, Models, StepModels, StudentForward
from promptkd_jax.distill.terms import MicroBatch
from promptkd_jax.distill.transport import TokenKernel
from promptkd_jax.infra import sharding
from promptkd_jax.infra.buckets import run_in_smallest_bucket


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
    updated. Without a soft prompt there is only the last line, with the terms that `method` names.

    With `one_step_off_policy` the rows trained on are `state.pending`, and the student before the
    update writes those of the next step: neither needs the other's result.

    Args:
      state: see `TrainState`.
      teacher: the teacher's parameters (None where `method.needs_teacher` is False or it learns).
      batch: B rows, B divisible by `method.num_micro_batches`; with `one_step_off_policy` those of
        the next step.
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
    keys = step_models.dropout_keys(jax.random.fold_in(state.key, state.step), batch, corpus)
    micro_batches = _split(targets, corpus, method, keys)
    metrics = _measure_rows(targets, micro_batches, new, method)
    micro_batches = micro_batches._replace(curriculum=curriculum(method, state))
    student_forward = _shared_forward(state, micro_batches, step_models)
    if method.prompted:
        new, metrics = _update_prompt(
            new, micro_batches, metrics, step_models, optimizers, student_forward
        )
        # [UG, M, D]: the student learns from the prompt that was just updated.
        soft_prompt = _prompt_of_student_loss(state, new, method)
        micro_batches = micro_batches._replace(soft_prompt=soft_prompt)
    elif method.teacher_view == "online":
        new, metrics = _update_teacher(
            new, micro_batches, metrics, step_models, optimizers, student_forward
        )
    if any(name == POLICY_GRADIENT for name, _ in method.student_terms):
        policy = _policy_targets(new, micro_batches, step_models, student_forward)
        micro_batches = micro_batches._replace(policy=policy)
    new, metrics = _update_student(
        new, micro_batches, metrics, step_models, optimizers, student_forward
    )
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
    norms = jnp.stack(list(metrics.grad_norms.values()))
    finite = jnp.all(jnp.isfinite(metrics.losses["student"])) & jnp.all(jnp.isfinite(norms))
    # A select, not a branch: both states exist already, and a branch would wait for the CPU.
    next_state = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, state)
    in_a_row = jnp.where(finite, 0, state.skipped_in_a_row + 1)
    next_state = next_state.replace(
        step=state.step + 1, skipped=state.skipped + ~finite, skipped_in_a_row=in_a_row
    )
    return next_state, metrics._replace(scalars=metrics.scalars | {"skipped_in_a_row": in_a_row})


# How rows are split into micro-batches


def _split(
    targets: TargetBatch, corpus: Batch | None, method: Method, dropout_keys: DropoutKeys | None
) -> MicroBatch:
    """All `[B, …]` as `[UG, B / UG, …]`, row i in micro-batch i mod UG: devices keep their rows."""

    def split(x):
        return jnp.swapaxes(x.reshape(-1, method.num_micro_batches, *x.shape[1:]), 0, 1)

    rows = targets.rows, targets.is_student, dropout_keys and dropout_keys.rows
    # Rows of like length together, so that a short micro-batch takes a small bucket.
    if method.sorts_rows:
        rows = _sort_by_length(rows, targets.rows.lengths, method.num_micro_batches)
    rows, is_student, keys = rows
    dropout_keys = dropout_keys and dropout_keys._replace(rows=keys)
    micro_batches = MicroBatch(rows, is_student, corpus, dropout_keys=dropout_keys)
    return jax.tree.map(split, micro_batches)


def _sort_by_length(rows: Any, lengths: jax.Array, number: int) -> Any:
    """A tree of `[B, …]`, every device's rows in such an order that `_split` deals the shortest out
    to the first of `number` micro-batches, the longest to the last."""
    devices = sharding.num_row_shards(lengths.shape[0] // number)
    # One device with six rows, and two micro-batches:
    #
    #     lengths            9 4 7 2 8 3     [devices, B / devices]
    #     shortest_first     3 5 1 2 4 0     rows of lengths 2 3 4 7 8 9
    #     by micro-batch     3 5 1 | 2 4 0   [devices, number, B / devices / number]
    #     order              3 2 5 4 1 0     [devices, B / devices]: one row of each in turn
    #
    # `_split` puts places 0, 2, 4 of `order` into micro-batch 0: the rows 3, 5, 1.
    shortest_first = jnp.argsort(lengths.reshape(devices, -1), axis=1, stable=True)
    by_micro_batch = shortest_first.reshape(devices, number, -1)
    order = by_micro_batch.swapaxes(1, 2).reshape(devices, -1)
    return jax.tree.map(lambda x: sharding.take_local_rows(x, order).reshape(x.shape), rows)


def _bucketed(gradients_of: Callable, method: Method) -> Callable:
    """`gradients_of`, called with its micro-batch's rows in the smallest bucket that holds them."""

    def bucketed(micro_batch: MicroBatch, *others):
        def in_width(width: int):
            rows = truncate(micro_batch.rows, width)
            return gradients_of(micro_batch._replace(rows=rows), *others)

        columns = micro_batch.rows.tokens.shape[-1]
        lengths = micro_batch.rows.lengths
        return run_in_smallest_bucket(in_width, lengths, columns, method.execution.length_buckets)

    return bucketed


def _shared_forward(
    state: TrainState, micro_batches: MicroBatch, step_models: StepModels
) -> StudentForward | None:
    """The student's forward pass and pullback, if one can serve both updates, else None.

    It can if both see the same parameters on the same columns: with one micro-batch a step, one
    pass, rows that are not truncated to buckets, and no dropout.
    """
    method = step_models.method
    shared = method.num_micro_batches * method.passes * method.execution.length_buckets == 1
    if not shared or step_models.drops:
        return None
    rows = jax.tree.map(lambda x: x[0], micro_batches.rows)
    return step_models.student_vjp(state.params["student"], rows)


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


def _scales(counts: jax.Array, conventions: Conventions) -> jax.Array:
    """Factors `[G]` with which the micro-batches' sums over tokens add up to the mean of an update;
    `counts` `[G]` are the response tokens of each (the teacher's update has all UG)."""
    # As published, the mean over micro-batches of their means; else the mean over all tokens.
    if conventions.mean_of_means:
        return 1 / (counts * counts.shape[0])
    return jnp.broadcast_to(1 / jnp.sum(counts), counts.shape)


# The teacher's update: its soft prompt, or all of it


def _update_prompt(
    state: TrainState,
    micro_batches: MicroBatch,
    metrics: Metrics,
    step_models: StepModels,
    optimizers: Optimizers,
    student_forward: StudentForward | None,
) -> tuple[TrainState, Metrics]:
    """P <- P - eta grad [L_kd + alpha_k L_reg]."""
    method = step_models.method

    def gradients_of(micro_batch: MicroBatch, scale, coefficient):
        return objective.prompt_gradients(
            state.params, micro_batch, scale, coefficient, step_models, student_forward
        )

    coefficients = _coefficients(state, method)
    scales = _scales(metrics.counts, method.conventions)
    gradients = accumulate(_bucketed(gradients_of, method), (micro_batches, scales, coefficients))
    new = _apply(state, gradients.by_group, optimizers)
    if method.regularization and method.regularization_schedule == "adaptive":
        kl = jnp.sum(gradients.sums["prompt_regularizer"]) / jnp.sum(metrics.counts)
        new = new.replace(regularization=_adapted(state.regularization, kl / method.target_kl))
    scalars = {
        "prompt_norm": jnp.linalg.norm(new.params["soft_prompt"]),
        "regularization_weight": coefficients[0],
    }
    norm = gradient_norm(gradients.by_group)
    metrics = metrics.add("prompt", gradients.loss, gradients.sums, norm)
    return new, metrics._replace(scalars=metrics.scalars | scalars)


def _coefficients(state: TrainState, method: Method) -> jax.Array:
    """The coefficient alpha_k of L_reg for each micro-batch, `[UG]`, in step k, counted from 1.

    "constant": `method.regularization`. "linear": that times 1 - k / total_steps (eq. 3).
    "adaptive": `state.regularization`, which `_update_prompt` moves.
    """
    number = method.num_micro_batches
    if method.regularization_schedule == "adaptive":
        return jnp.broadcast_to(state.regularization, (number,))
    if method.regularization_schedule == "constant":
        return jnp.full(number, method.regularization)
    # Counted from 1: in the last step the coefficient is 0.
    k = jnp.broadcast_to(state.step + 1, (number,))
    if method.conventions.early_clock and number > 1:
        k = k + (jnp.arange(number) == number - 1)
    return method.regularization * jnp.maximum(1 - k / method.total_steps, 0.0)


def _adapted(coefficient: jax.Array, ratio: jax.Array) -> jax.Array:
    """The coefficient, moved by at most 2 % (Ziegler et al. 2019, arXiv 1909.08593, section 2.2).

    Args:
      ratio: the measured KL over the target; above 1 the coefficient rises.
    """
    return coefficient * (1 + 0.1 * jnp.clip(ratio - 1, -0.2, 0.2))


def _prompt_of_student_loss(before: TrainState, after: TrainState, method: Method) -> jax.Array:
    """The soft prompt of the student's loss of each micro-batch, `[UG, M, D]`."""
    is_last = jnp.arange(method.num_micro_batches) == method.num_micro_batches - 1
    fresh = is_last | (not method.conventions.stale_prompt)
    return jnp.where(fresh[:, None, None], after.soft_prompt, before.soft_prompt)


def _update_teacher(
    state: TrainState,
    micro_batches: MicroBatch,
    metrics: Metrics,
    step_models: StepModels,
    optimizers: Optimizers,
    student_forward: StudentForward | None,
) -> tuple[TrainState, Metrics]:
    """Mutual learning (Zhang et al. 2018, arXiv 1706.00384): the teacher learns from the student,
    which then learns from what the teacher has become."""

    def gradients_of(micro_batch: MicroBatch, scale):
        return objective.teacher_gradients(
            state.params, micro_batch, scale, step_models, student_forward
        )

    method = step_models.method
    scales = _scales(metrics.counts, method.conventions)
    gradients = accumulate(_bucketed(gradients_of, method), (micro_batches, scales))
    norm = gradient_norm(gradients.by_group)
    metrics = metrics.add("teacher", gradients.loss, gradients.sums, norm)
    return _apply(state, gradients.by_group, optimizers), metrics


# The student's update


def _policy_targets(
    state: TrainState,
    micro_batches: MicroBatch,
    step_models: StepModels,
    student_forward: StudentForward | None,
) -> policy_gradient.PolicyTarget:
    """The advantages of the sampled tokens, valued over the whole step, `[UG, B / UG, R]` each."""

    def log_prob_of_labels(labels, logits):
        return -losses.cross_entropy(labels, logits)

    def log_probs(micro_batch: MicroBatch):  # [B / UG, R] of student and teacher
        rows = micro_batch.rows
        where = step_models.where(rows)
        (student, _), _ = student_forward or step_models.student_vjp(state.params["student"], rows)
        teacher, _ = step_models.teacher(state.params, rows, micro_batch.soft_prompt)
        both = [
            linear_values([log_prob_of_labels], model, [where.labels])[0]
            for model in (student, teacher)
        ]
        return where.labels, where.mask, *both

    method = step_models.method
    # Labels, mask, and the labels' log-probabilities of student and teacher: [UG, B / UG, R].
    by_micro_batch = jax.lax.map(_bucketed(log_probs, method), micro_batches)
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
    student_forward: StudentForward | None,
) -> tuple[TrainState, Metrics]:
    """theta <- theta - eta grad of the student's terms, `method.updates_per_step` times.

    With several updates a step, each of `method.passes` goes through all minibatches in turn; the
    metrics are means over the passes.
    """
    method = step_models.method

    def update(state: TrainState, xs):
        micro_batches, counts = xs
        corpus_scale = 0.0
        if micro_batches.corpus is not None:
            corpus_scale = 1 / jnp.sum(micro_batches.corpus.lengths - 1)

        def gradients_of(micro_batch: MicroBatch, scale):
            return objective.student_gradients(
                state.params, micro_batch, scale, corpus_scale, step_models, student_forward
            )

        scales = _scales(counts, method.conventions)
        gradients = accumulate(_bucketed(gradients_of, method), (micro_batches, scales))
        norm = gradient_norm(gradients.by_group["student"])
        new = _apply(state, gradients.by_group, optimizers)
        return new, (gradients.loss, gradients.sums, norm)

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


def _apply(state: TrainState, gradients: dict[str, Any], optimizers: Optimizers) -> TrainState:
    """The state after one update of every group of parameters that has a gradient."""
    params, states = dict(state.params), dict(state.optimizers)
    for name, gradient in gradients.items():
        optimizer = getattr(optimizers, name)
        updates, states[name] = optimizer.update(gradient, states[name], params[name])
        params[name] = optax.apply_updates(params[name], updates)
    return state.replace(params=params, optimizers=states)
