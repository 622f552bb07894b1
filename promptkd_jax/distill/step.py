"""The one train step: rollout, teacher update and student update in a single pure function.

A method is data, see `Method`; this is what is done with it.

B rows, T columns, R response positions, M soft-prompt tokens, D width, V vocabulary,
G micro-batches of one update, N parts of a step (the micro-batches of all its minibatches).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from promptkd_jax.data.batch import Batch, responses, truncate
from promptkd_jax.distill import losses, objective, policy_gradient
from promptkd_jax.distill.chunked_loss import LazyLogits, linear_values
from promptkd_jax.distill.method import POLICY_GRADIENT, PRESETS, Conventions, Method
from promptkd_jax.distill.objective import MicroBatch
from promptkd_jax.distill.replay import Replay
from promptkd_jax.distill.targets import TargetBatch, row_statistics, target_rows
from promptkd_jax.distill.teacher import Models, StepModels
from promptkd_jax.infra import sharding
from promptkd_jax.models.sampler import run_in_smallest_bucket


class Optimizers(NamedTuple):
    """One for each group of parameters that is trained.

    `projection` is for the matrices between hidden states of different models, `teacher` for the
    "online" view.
    """

    student: optax.GradientTransformation
    soft_prompt: optax.GradientTransformation | None = None
    teacher: optax.GradientTransformation | None = None
    projection: optax.GradientTransformation | None = None


@flax.struct.dataclass
class TrainState:
    """Everything that changes; a frozen teacher is not in it.

    `params` and `optimizers` have the groups of `Optimizers`: "student", and where they are trained
    "soft_prompt" `[M, D]`, "teacher", "projection". `step` counts the steps of this stage,
    `regularisation` is the coefficient of L_reg where that adapts, `replay` the buffer of "replay"
    targets, `pending` the rows of this step where rows are written a step ahead, see `write_ahead`.
    `skipped` counts the non-finite steps in all, `skipped_in_a_row` the latest of them.
    """

    step: jax.Array
    key: jax.Array
    params: dict[str, Any]
    optimizers: dict[str, Any]
    regularisation: jax.Array
    replay: Replay | None
    pending: TargetBatch | None
    skipped: jax.Array
    skipped_in_a_row: jax.Array

    @property
    def student(self) -> Any:
        """The student's parameters."""
        return self.params["student"]

    @property
    def soft_prompt(self) -> jax.Array | None:
        """`[M, D]`, None where there is none."""
        return self.params.get("soft_prompt")


class Metrics(NamedTuple):
    """`sums` over response tokens of each part `[N]`, `counts` `[N]` tokens, plain `scalars`.
    `summarize` divides."""

    sums: dict[str, jax.Array]
    counts: jax.Array
    scalars: dict[str, jax.Array]


def init_state(
    params: Mapping[str, Any],
    optimizers: Optimizers,
    key: jax.Array,
    *,
    regularisation: float = 1.0,
    replay: Replay | None = None,
    pending: TargetBatch | None = None,
) -> TrainState:
    """A state at step 0.

    Args:
      params: by group, see `TrainState`; at least {"student": …}.
      optimizers: one for every group in `params`.
      regularisation: where the coefficient of an "adaptive" L_reg starts.
      replay: `empty_replay(…)` where a method has "replay" targets.
      pending: a place for what `write_ahead` will write, where states of several methods shall
        have one structure.
    """
    params = {name: group for name, group in params.items() if group is not None}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        key=key,
        params=params,
        optimizers={name: getattr(optimizers, name).init(params[name]) for name in params},
        regularisation=jnp.full((), regularisation, jnp.float32),
        replay=replay,
        pending=pending,
        skipped=jnp.zeros((), jnp.int32),
        skipped_in_a_row=jnp.zeros((), jnp.int32),
    )


def write_ahead(
    state: TrainState, teacher: Any, batch: Batch, *, method: Method, models: Models
) -> TrainState:
    """The state with the rows of its next step in `pending`, written from that step's `batch`.

    Where a method has `stale_rollouts`, this begins a stage; from then on every step writes the
    rows of the next.
    """
    see = StepModels(method, models, teacher)
    pending, replay = _write(state, batch, see, state.step)
    return state.replace(pending=pending, replay=replay)


def train_step(
    state: TrainState,
    teacher: Any,
    batch: Batch,
    corpus: Batch | None = None,
    *,
    method: Method,
    models: Models,
    optimizers: Optimizers,
) -> tuple[TrainState, Metrics]:
    """One step. Pure: jit it with the keyword arguments bound and the state donated.

    Algorithm 1 of the paper: rows y ~ q(.|x); P <- P - eta grad [KL(p_P || q) + alpha_k
    KL(p_P || p)]; theta <- theta - eta grad KL(q || p_P) with the P just updated. Without a prompt
    only the last of these, with whichever terms `method` names.

    With `method.stale_rollouts` the rows trained on are `state.pending`, and the student as it is
    before the update writes those of the next step: neither needs the other's result.

    Args:
      state: see `TrainState`.
      teacher: the teacher's parameters (None where `method.needs_teacher` is False or it learns).
      batch: B rows, B divisible by `method.parts`; with `method.stale_rollouts` the next step's.
      corpus: rows of plain text for `method.corpus_terms`, as many or another multiple of them.

    Returns:
      The new state and Metrics, of the rows trained on. A step whose loss or gradient is not finite
      changes nothing but `step`, the counters and what is written ahead.
    """
    see = StepModels(method, models, teacher)
    if method.stale_rollouts:
        if state.pending is None:
            raise ValueError("stale_rollouts = True needs a state that write_ahead(…) began")
        written, ahead = state.pending, _write(state, batch, see, state.step + 1)
        state = state.replace(pending=ahead[0], replay=ahead[1])
        new = state
    else:
        written, replay = _write(state, batch, see, state.step)
        new = state.replace(replay=replay)
    statistics = row_statistics(method, written, new.replay)
    parts = _deal_parts(written.rows, written.own, corpus, method)
    counts, beyond = _counts(parts.rows, method.response_capacity)
    statistics["tokens_beyond"] = beyond
    # One forward of the student serves both updates, unless each trims the rows.
    if method.parts * method.passes == method.length_buckets == 1:
        see = see.sharing(state.params["student"], _first(parts).rows)
    sums = {}
    if method.prompted:
        new, sums, more = _update_prompt(new, parts, counts, see, optimizers)
        parts = parts._replace(soft_prompt=_prompt_in_turn(state, new, method))
        statistics |= more
    elif method.teacher_view == "online":
        new, sums, more = _update_teacher(new, parts, counts, see, optimizers)
        statistics |= more
    if any(name == POLICY_GRADIENT for name, _ in method.student_terms):
        parts = parts._replace(policy=_policy_targets(new, parts, see))
    new, student_sums, more = _update_student_in_turn(new, parts, counts, see, optimizers)
    return _unless_not_finite(state, new, sums | student_sums, counts, statistics | more)


def _write(state: TrainState, batch: Batch, see: StepModels, step: jax.Array):
    """The rows of `step`, written by the student as it is, and the replay buffer after them."""
    return target_rows(
        see.method,
        see.models.student,
        state.params["student"],
        batch,
        state.replay,
        jax.random.fold_in(state.key, step),
        step=step,
        teacher=see.second_voice(state.params),
    )


def _unless_not_finite(state, new, sums, counts, scalars) -> tuple[TrainState, Metrics]:
    """The new state, or the old one with its clock and counters moved on."""
    norms = [value for name, value in scalars.items() if name.endswith("grad_norm")]
    finite = jnp.all(jnp.isfinite(jnp.stack([*sums["student_loss"], *norms])))
    kept = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, state)
    in_a_row = jnp.where(finite, 0, state.skipped_in_a_row + 1)
    kept = kept.replace(
        step=state.step + 1, skipped=state.skipped + ~finite, skipped_in_a_row=in_a_row
    )
    return kept, Metrics(sums, counts, scalars | {"skipped_in_a_row": in_a_row})


def summarize(metrics: Metrics, conventions: Conventions = PRESETS["default"]) -> dict[str, float]:
    """Means over response tokens (or of micro-batch means) and the scalars, as Python floats."""
    metrics = jax.device_get(metrics)
    if conventions.mean_of_means:
        means = {name: (total / metrics.counts).mean() for name, total in metrics.sums.items()}
    else:
        means = {name: total.sum() / metrics.counts.sum() for name, total in metrics.sums.items()}
    return {name: float(value) for name, value in (means | metrics.scalars).items()}


# How rows are dealt out


def _deal_parts(rows: Batch, own: jax.Array, corpus: Batch | None, method: Method) -> MicroBatch:
    """`[B, …]` as `[N, B / N, …]`, row i in part i mod N: every device keeps its own rows."""

    def deal(x):
        return jnp.swapaxes(x.reshape(-1, method.parts, *x.shape[1:]), 0, 1)

    if method.sorts_rows:
        rows, own = _by_length(rows, own, method.parts)
    corpus = corpus if method.corpus_terms else None
    return jax.tree.map(deal, MicroBatch(rows, own, corpus))


def _by_length(rows: Batch, own: jax.Array, number: int) -> tuple[Batch, jax.Array]:
    """Every device's rows in such an order that the shortest are dealt to the first part."""
    devices = sharding.num_row_shards(own.shape[0] // number)
    shortest_first = jnp.argsort(rows.lengths.reshape(devices, -1), axis=1, stable=True)
    order = shortest_first.reshape(devices, number, -1).swapaxes(1, 2).reshape(devices, -1)
    return jax.tree.map(lambda x: sharding.take_local_rows(x, order).reshape(x.shape), (rows, own))


def _trimmed(part: Callable, method: Method) -> Callable:
    """`part`, a function of a Part and more, with rows in the least of the compiled lengths."""

    def trimmed(x: MicroBatch, *others):
        def in_width(width: int):
            return part(x._replace(rows=truncate(x.rows, width)), *others)

        columns = x.rows.tokens.shape[-1]
        return run_in_smallest_bucket(in_width, x.rows.lengths, columns, method.length_buckets)

    return trimmed


def _first(parts: MicroBatch) -> MicroBatch:
    return jax.tree.map(lambda x: x[0], parts)


def _counts(rows: Batch, capacity: int) -> tuple[jax.Array, jax.Array]:
    """(Response tokens of each part that losses see, `[N]`; how many they do not see, a scalar)."""
    where = jax.vmap(lambda part: responses(part, capacity))(rows)
    return jnp.sum(where.mask, axis=(1, 2)), jnp.sum(where.beyond)


def _scales(counts: jax.Array, conventions: Conventions) -> jax.Array:
    """What each part's sum is multiplied by, `[G]`, so that the sum of all is the mean."""
    if conventions.mean_of_means:
        return 1 / (counts * counts.shape[0])
    return jnp.broadcast_to(1 / jnp.sum(counts), counts.shape)


# The teacher's update: its soft prompt, or all of it


def _update_prompt(
    state: TrainState, parts: MicroBatch, counts, see: StepModels, optimizers: Optimizers
):
    """P <- P - eta grad [L_kd + alpha_k L_reg]: (state, sums, scalars)."""
    method = see.method

    def part(x: MicroBatch, scale, coefficient):
        def prompted(soft_prompt):
            seen, _ = see.teacher(state.params, x.rows, soft_prompt)
            return seen.hidden, seen.head

        hidden_states, pullback, kernel = jax.vjp(
            prompted, state.params["soft_prompt"], has_aux=True
        )
        student = see.student(state.params["student"], x.rows)
        plain = see.teacher(state.params, x.rows)[0] if method.regularisation else None
        terms, observations = objective.prompt_terms(method, student, plain, scale, coefficient)
        mask = see.where(x.rows).mask
        gradient, total, sums = objective.gradient(
            terms, observations, mask, lambda h: LazyLogits(h, kernel), hidden_states
        )
        return {"soft_prompt": pullback(gradient)[0]}, sums | {"prompt_loss": total / scale}

    coefficients = _coefficients(state, method)
    scales = _scales(counts, method.conventions)
    gradients, sums = objective.accumulate(_trimmed(part, method), (parts, scales, coefficients))
    new = _apply(state, gradients, optimizers)
    if method.regularisation and method.regularisation_schedule == "adaptive":
        found = jnp.sum(sums["prompt_regulariser"]) / jnp.sum(counts)
        new = new.replace(regularisation=_adapted(state.regularisation, found / method.target_kl))
    scalars = {
        "prompt_grad_norm": objective.norm(gradients),
        "prompt_norm": jnp.linalg.norm(new.params["soft_prompt"]),
        "regularisation_weight": coefficients[0],
    }
    return new, sums, scalars


def _coefficients(state: TrainState, method: Method) -> jax.Array:
    """alpha_k = (K - k) / K with k = 1 in the first update, for each part, `[N]`."""
    parts = method.parts
    if method.regularisation_schedule == "adaptive":
        return jnp.broadcast_to(state.regularisation, (parts,))
    if method.regularisation_schedule == "constant":
        return jnp.full(parts, method.regularisation)
    k = jnp.broadcast_to(state.step + 1, (parts,))
    if method.conventions.early_clock and parts > 1:
        k = k + (jnp.arange(parts) == parts - 1)
    return method.regularisation * jnp.maximum(1 - k / method.total_steps, 0.0)


def _adapted(coefficient: jax.Array, ratio: jax.Array) -> jax.Array:
    """Moved by at most 2 % towards the target: the controller of Ziegler et al. 2019 (1909.08593),
    section 2.2."""
    return coefficient * (1 + 0.1 * jnp.clip(ratio - 1, -0.2, 0.2))


def _prompt_in_turn(before: TrainState, after: TrainState, method: Method) -> jax.Array:
    """The soft prompt that each part's student loss sees, `[N, M, D]`."""
    is_last = jnp.arange(method.parts) == method.parts - 1
    fresh = is_last | (not method.conventions.stale_prompt)
    return jnp.where(fresh[:, None, None], after.soft_prompt, before.soft_prompt)


def _update_teacher(
    state: TrainState, parts: MicroBatch, counts, see: StepModels, optimizers: Optimizers
):
    """Mutual learning (Zhang et al. 2018, arXiv 1706.00384): the teacher learns from the student,
    which then learns from what the teacher has become."""

    def part(x: MicroBatch, scale):
        learner, pullback = jax.vjp(
            lambda p: see.teacher({"teacher": p}, x.rows)[0],
            state.params["teacher"],
        )
        student = see.student(state.params["student"], x.rows)
        terms = {
            f"teacher_{name}": objective.teacher_term(name, weight * scale, x, student, see)
            for name, weight in see.method.teacher_terms
        }
        mask = see.where(x.rows).mask
        gradient, total, sums = objective.gradient(terms, {}, mask, lambda x: x, learner)
        return {"teacher": pullback(gradient)[0]}, sums | {"teacher_loss": total / scale}

    scales = _scales(counts, see.method.conventions)
    gradients, sums = objective.accumulate(_trimmed(part, see.method), (parts, scales))
    scalars = {"teacher_grad_norm": objective.norm(gradients)}
    return _apply(state, gradients, optimizers), sums, scalars


# The student's update


def _policy_targets(
    state: TrainState, parts: MicroBatch, see: StepModels
) -> policy_gradient.PolicyTarget:
    """What the sampled rows are worth, valued over the whole step, `[N, B / N, R]` each."""

    def of_labels(labels, logits):
        return -losses.cross_entropy(labels, logits)

    def part(x: MicroBatch):
        where = see.where(x.rows)
        seen = see.student(state.params["student"], x.rows), _teacher(state, x, see)[0]
        log_probs = [linear_values([of_labels], one, [where.labels])[0] for one in seen]
        return where.labels, where.mask, *log_probs

    method = see.method
    found = jax.lax.map(_trimmed(part, method), parts)
    flat = [x.reshape(-1, x.shape[-1]) for x in found]
    target = policy_gradient.policy_target(*flat, method.teacher_share, method.policy_gradient)
    return jax.tree.map(lambda x: x.reshape(found[0].shape), target)


def _teacher(state: TrainState, x: MicroBatch, see: StepModels):
    return see.teacher(state.params, x.rows, x.soft_prompt)


def _update_student_in_turn(
    state, parts: MicroBatch, counts, see: StepModels, optimizers: Optimizers
):
    """`passes` times each minibatch's update: (state, sums, scalars), means over the passes."""
    method = see.method
    if method.updates == 1:
        return _update_student(state, parts, counts, see, optimizers)

    def split(x):  # [N, …] -> [minibatches, G, …]
        return x.reshape(method.minibatches, method.micro_batches, *x.shape[1:])

    def update(state, xs):
        state, *measured = _update_student(state, *xs, see, optimizers)
        return state, measured

    def one_pass(state, _):
        return jax.lax.scan(update, state, jax.tree.map(split, (parts, counts)))

    state, (sums, scalars) = jax.lax.scan(one_pass, state, None, length=method.passes)
    sums = {name: x.mean(axis=0).reshape(-1) for name, x in sums.items()}
    return state, sums, {name: x.mean() for name, x in scalars.items()}


def _update_student(
    state: TrainState, parts: MicroBatch, counts, see: StepModels, optimizers: Optimizers
):
    """theta <- theta - eta grad of the student's terms: (state, sums, scalars)."""
    method = see.method
    scales = _scales(counts, method.conventions)
    observations = objective.student_observations(method)
    if parts.corpus is not None:
        corpus_scale = 1 / jnp.sum(parts.corpus.lengths - 1)

    def part(x: MicroBatch, scale):
        where = see.where(x.rows)
        (student, states), pullback = see.student_vjp(state.params["student"], x.rows)
        seen, teacher_states = _teacher(state, x, see) if method.needs_view else (None, {})
        terms = {
            name: objective.student_term(name, weight * scale, x, seen, see)
            for name, weight in method.student_terms
        }
        d_student, total, sums = objective.gradient(
            terms, observations, where.mask, lambda x: x, student, seen
        )
        gradients, d_states = {}, jax.tree.map(jnp.zeros_like, states)
        if see.hidden_terms:
            d_states, gradients, hidden_total, more = objective.hidden_gradient(
                states, teacher_states, state.params.get("projection", {}), where, scale, see
            )
            total, sums = total + hidden_total, sums | more
        gradients["student"] = pullback((d_student, d_states))[0]
        if x.corpus is not None:
            gradient, corpus_total = objective.corpus_gradient(
                state.params, x.corpus, corpus_scale, see
            )
            gradients["student"] = jax.tree.map(jnp.add, gradients["student"], gradient)
            total, sums = total + corpus_total, sums | {"corpus_loss": corpus_total / scale}
        if len(sums) == 1 + len(observations):  # the only term is the loss itself
            del sums[method.student_terms[0][0]]
        return gradients, sums | {"student_loss": total / scale}

    gradients, sums = objective.accumulate(_trimmed(part, method), (parts, scales))
    scalars = {"student_grad_norm": objective.norm(gradients["student"])}
    return _apply(state, gradients, optimizers), sums, scalars


def _apply(state: TrainState, gradients: dict[str, Any], optimizers: Optimizers) -> TrainState:
    """One update of every group that has a gradient."""
    params, states = dict(state.params), dict(state.optimizers)
    for name, gradient in gradients.items():
        optimizer = getattr(optimizers, name)
        updates, states[name] = optimizer.update(gradient, states[name], params[name])
        params[name] = optax.apply_updates(params[name], updates)
    return state.replace(params=params, optimizers=states)
