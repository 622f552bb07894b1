"""The one train step: rollout, prompt update and student update in a single pure function.

A method is data (`Method`): where the target rows come from, how the teacher is seen, which
divergences are minimised. PromptKD, its warm-up, SFT and KD are values of it.

B rows, T columns, R response positions, M soft-prompt tokens, D width, V vocabulary,
G micro-batches of one update.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from promptkd_jax import losses
from promptkd_jax.losses import Linear, linear_loss
from promptkd_jax.models.decoder import Decoder
from promptkd_jax.sampler import Sampling
from promptkd_jax.targets import Batch, responses, rollout
from promptkd_jax.teacher import view

GOLD = "cross_entropy"  # the student term that looks at the tokens instead of the teacher


@dataclasses.dataclass(frozen=True)
class Conventions:
    """Where the published code and its paper, or good practice, differ.

    Attributes:
      mean_of_means: average each micro-batch over its tokens, then the micro-batches; otherwise
        one mean over all tokens of the update, which does not depend on how it was cut.
      stale_prompt: only the last micro-batch of an update sees the just-updated prompt.
      early_clock: the regularisation coefficient moves on one micro-batch before the update does.
      force_eos: a rollout that ran to its limit gets its last token overwritten by EOS.
      decay_norms: weight decay on norm scales, except GPT-2's.
      entropy_free: a forward KL is reported without the target's entropy (same gradient).
    """

    mean_of_means: bool = False
    stale_prompt: bool = False
    early_clock: bool = False
    force_eos: bool = False
    decay_norms: bool = False
    entropy_free: bool = False


PRESETS = {"default": Conventions(), "faithful": Conventions(*[True] * 6)}


@dataclasses.dataclass(frozen=True)
class Method:
    """A distillation method; hashable, a static argument of `jax.jit`.

    Attributes:
      targets: "gold" or "teacher" (the rows of the batch as they are, whoever wrote them) or
        "student" (its own rollout from their requests).
      student_terms: ((divergence, weight), …); "cross_entropy" is on the tokens, all others are
        against the teacher. See `losses.divergence` for the names.
      prompted: the teacher is seen behind a soft prompt, which is trained as well.
      prompt_divergence: L_kd, of the prompted teacher from the student (paper eq. 1).
      prompt_regulariser: L_reg, of the prompted teacher from the plain one (eq. 2).
      regularisation: coefficient of L_reg, times (K - k) / K (eq. 3); 0 drops the plain forward.
      total_steps: K.
      response_capacity: R, the most response tokens of a row; max_new_tokens of a rollout.
      prompt_capacity: columns of the longest request.
      micro_batches: G; rows are dealt out to micro-batches in turn.
      vocab_size: what teacher and student share.
    """

    targets: str
    student_terms: tuple[tuple[str, float], ...]
    total_steps: int
    response_capacity: int
    prompt_capacity: int
    vocab_size: int
    prompted: bool = False
    prompt_divergence: str = "reverse_kl"
    prompt_regulariser: str = "reverse_kl"
    regularisation: float = 1.0
    sampling: Sampling = Sampling()
    micro_batches: int = 1
    conventions: Conventions = Conventions()

    def __post_init__(self):
        names = [name for name, _ in self.student_terms]
        if len(set(names)) < len(names):
            raise ValueError(f"student_terms: {', '.join(names)}: expected each name once")
        if self.targets not in ("gold", "teacher", "student"):
            raise ValueError(f"targets: {self.targets!r} is not gold, teacher or student")
        if self.prompted and set(names) <= {GOLD}:
            raise ValueError(f"prompted: no term of {names} looks at the teacher")

    @property
    def needs_teacher(self) -> bool:
        """Whether any term looks at the teacher."""
        return self.prompted or any(name != GOLD for name, _ in self.student_terms)


@dataclasses.dataclass(frozen=True)
class Models:
    """The two decoders; `teacher` is None for supervised fine-tuning."""

    student: Decoder
    teacher: Decoder | None = None


class Optimizers(NamedTuple):
    """One for the student's parameters, one for the soft prompt."""

    student: optax.GradientTransformation
    soft_prompt: optax.GradientTransformation


@flax.struct.dataclass
class TrainState:
    """Everything that changes; the frozen teacher is not in it.

    `step` counts updates of this stage, `skipped` the non-finite ones in all, `skipped_in_a_row`
    the latest run of them. `soft_prompt` `[M, D]` and its optimizer are None without a prompt.
    """

    step: jax.Array
    key: jax.Array
    student: Any
    student_optimizer: Any
    soft_prompt: jax.Array | None
    prompt_optimizer: Any
    skipped: jax.Array
    skipped_in_a_row: jax.Array


class Metrics(NamedTuple):
    """`sums` over response tokens of each micro-batch `[G]`, `counts` `[G]` tokens, plain
    `scalars`. `summarise` divides."""

    sums: dict[str, jax.Array]
    counts: jax.Array
    scalars: dict[str, jax.Array]


def init_state(
    student: Any, soft_prompt: jax.Array | None, optimizers: Optimizers, key: jax.Array
) -> TrainState:
    """A state at step 0 of `student` parameters and an optional soft prompt `[M, D]`."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        key=key,
        student=student,
        student_optimizer=optimizers.student.init(student),
        soft_prompt=soft_prompt,
        prompt_optimizer=None if soft_prompt is None else optimizers.soft_prompt.init(soft_prompt),
        skipped=jnp.zeros((), jnp.int32),
        skipped_in_a_row=jnp.zeros((), jnp.int32),
    )


def train_step(
    state: TrainState,
    teacher: Any,
    batch: Batch,
    *,
    method: Method,
    models: Models,
    optimizers: Optimizers,
) -> tuple[TrainState, Metrics]:
    """One update. Pure: jit it with the keyword arguments bound and the state donated.

    Algorithm 1 of the paper: rows y ~ q(.|x); P <- P - eta grad [KL(p_P || q) + alpha_k
    KL(p_P || p)]; theta <- theta - eta grad KL(q || p_P) with the P just updated. Without a prompt
    only the last of these, with whichever terms `method` names.

    Args:
      state: see `TrainState`.
      teacher: the teacher's parameters (None where `method.needs_teacher` is False).
      batch: B rows, B divisible by `method.micro_batches`.

    Returns:
      The new state and Metrics. An update whose loss or gradient is not finite changes nothing but
      `step` and the counters.
    """
    key = jax.random.fold_in(state.key, state.step)
    rows, ended = _target_rows(state, batch, method, models, key)
    micro = _deal(rows, method.micro_batches)
    supervised = jnp.minimum(micro.lengths - micro.prompt_lengths, method.response_capacity)
    counts = jnp.sum(supervised, axis=1).astype(jnp.float32)  # [G]
    scales = _scales(counts, method)
    views = _make_views(state, teacher, micro, method, models)
    new, sums, scalars, prompts = state, {}, _row_statistics(rows, ended), None
    if method.prompted:
        soft_prompt, optimizer_state, sums, more = _update_prompt(
            state, micro, scales, views, method, optimizers.soft_prompt
        )
        new = new.replace(soft_prompt=soft_prompt, prompt_optimizer=optimizer_state)
        prompts = _prompt_in_turn(state.soft_prompt, soft_prompt, method)
        scalars |= more
    student, optimizer_state, student_sums, more = _update_student(
        state, micro, scales, prompts, views, method, optimizers.student
    )
    new = new.replace(student=student, student_optimizer=optimizer_state)
    sums, scalars = sums | student_sums, scalars | more
    return _unless_not_finite(state, new, sums, counts, scalars)


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


def summarise(metrics: Metrics, conventions: Conventions = Conventions()) -> dict[str, float]:
    """Means over response tokens (or of micro-batch means) and the scalars, as Python floats."""
    metrics = jax.device_get(metrics)
    if conventions.mean_of_means:
        means = {name: (total / metrics.counts).mean() for name, total in metrics.sums.items()}
    else:
        means = {name: total.sum() / metrics.counts.sum() for name, total in metrics.sums.items()}
    return {name: float(value) for name, value in (means | metrics.scalars).items()}


def _target_rows(state: TrainState, batch: Batch, method: Method, models: Models, key):
    if method.targets != "student":
        return batch, None
    return rollout(
        models.student,
        state.student,
        batch,
        key,
        prompt_capacity=method.prompt_capacity,
        max_new_tokens=method.response_capacity,
        sampling=method.sampling,
        vocab_size=method.vocab_size,
        force_eos=method.conventions.force_eos,
    )


def _deal(batch: Batch, parts: int) -> Batch:
    """`[B, …]` as `[G, B / G, …]`, row i in part i mod G: every device keeps its own rows."""
    return jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1), batch)


def _scales(counts: jax.Array, method: Method) -> jax.Array:
    """What each micro-batch's sum is multiplied by, `[G]`, so that the sum of all is the mean."""
    if method.conventions.mean_of_means:
        return 1 / (counts * method.micro_batches)
    return jnp.broadcast_to(1 / jnp.sum(counts), counts.shape)


def _coefficients(step: jax.Array, method: Method) -> jax.Array:
    """alpha_k = (K - k) / K with k = 1 in the first update, for each micro-batch, `[G]`."""
    parts = method.micro_batches
    k = jnp.broadcast_to(step + 1, (parts,))
    if method.conventions.early_clock and parts > 1:
        k = k + (jnp.arange(parts) == parts - 1)
    return method.regularisation * jnp.maximum(1 - k / method.total_steps, 0.0)


class _Views(NamedTuple):
    """How rows are seen at their response positions, for the parameters of this update."""

    teacher: Callable[..., Linear]  # (rows, soft_prompt or None)
    student: Callable[[Batch], Linear]
    student_vjp: Callable[[Batch], tuple[Linear, Callable]]  # with the pullback to its parameters


def _make_views(state, teacher, micro: Batch, method: Method, models: Models) -> _Views:
    def seen(decoder, params, rows, soft_prompt=None):
        where = responses(rows, method.response_capacity)
        return view(decoder, params, rows, where, method.vocab_size, soft_prompt)

    def teacher_view(rows, soft_prompt=None):
        return seen(models.teacher, teacher, rows, soft_prompt)

    def student_vjp(rows):
        return jax.vjp(lambda params: seen(models.student, params, rows), state.student)

    if method.micro_batches > 1:
        return _Views(
            teacher_view, lambda rows: seen(models.student, state.student, rows), student_vjp
        )
    # One forward of the student serves both updates.
    shared = student_vjp(jax.tree.map(lambda x: x[0], micro))
    return _Views(teacher_view, lambda rows: shared[0], lambda rows: shared)


def _update_prompt(state, micro, scales, views: _Views, method: Method, optimizer):
    """P <- P - eta grad [L_kd + alpha_k L_reg]: (P, its optimizer, sums, scalars)."""

    def part(rows, scale, coefficient):
        where = responses(rows, method.response_capacity)
        hidden, pullback, kernel = jax.vjp(
            lambda prompt: views.teacher(rows, prompt), state.soft_prompt, has_aux=True
        )
        terms = {"prompt_kd": Term(method.prompt_divergence, views.student(rows), scale)}
        observe = {"kl_prompted": _student_to_learner}
        if method.regularisation:
            plain = views.teacher(rows)
            weight = scale * coefficient
            terms["prompt_regulariser"] = Term(method.prompt_regulariser, plain, weight)
            observe["kl_plain"] = _student_to_plain
        d_hidden, total, sums = _gradient(
            terms, observe, where.mask, lambda h: Linear(h, kernel), hidden, method.conventions
        )
        return pullback(d_hidden)[0], sums | {"prompt_loss": total / scale}

    coefficients = _coefficients(state.step, method)
    gradient, sums = _accumulate(part, (micro, scales, coefficients))
    soft_prompt, optimizer_state = _apply(
        optimizer, gradient, state.prompt_optimizer, state.soft_prompt
    )
    scalars = {
        "prompt_grad_norm": optax.tree.norm(gradient),
        "prompt_norm": jnp.linalg.norm(soft_prompt),
        "regularisation_weight": coefficients[0],
    }
    return soft_prompt, optimizer_state, sums, scalars


def _update_student(state, micro, scales, prompts, views: _Views, method: Method, optimizer):
    """theta <- theta - eta grad of the student's terms: (theta, its optimizer, sums, scalars)."""

    def part(rows, scale, soft_prompt):
        where = responses(rows, method.response_capacity)
        student, pullback = views.student_vjp(rows)
        terms, observe = {}, {"student_entropy": _entropy}
        if method.needs_teacher:
            seen = views.teacher(rows, soft_prompt)
            observe["agreement"] = _agreement
            if not method.prompted:
                observe["kl_plain"] = _learner_to_teacher
        # Terms against the teacher first: the observations look at the first target.
        for name, weight in sorted(method.student_terms, key=lambda term: term[0] == GOLD):
            terms[name] = Term(name, where.labels if name == GOLD else seen, scale * weight)
        d_student, total, sums = _gradient(
            terms, observe, where.mask, lambda x: x, student, Conventions()
        )
        if len(terms) == 1:  # then it is the loss
            del sums[name]
        return pullback(d_student)[0], sums | {"student_loss": total / scale}

    gradient, sums = _accumulate(part, (micro, scales, prompts))
    student, optimizer_state = _apply(optimizer, gradient, state.student_optimizer, state.student)
    return student, optimizer_state, sums, {"student_grad_norm": optax.tree.norm(gradient)}


class Term(NamedTuple):
    """One summand of a loss: divergence by name, what it compares with, and its weight."""

    name: str
    target: Linear | jax.Array
    weight: jax.Array


def _gradient(terms: dict[str, Term], observe, mask, learner, at, conventions: Conventions):
    """Gradient of the weighted terms for `learner(at)`, their sum, and every masked sum by name."""

    def loss(at):
        return linear_loss(
            [_divergence(term.name, conventions) for term in terms.values()],
            learner(at),
            [term.target for term in terms.values()],
            mask,
            jnp.stack([term.weight for term in terms.values()]),
            observe=tuple(observe.values()),
        )

    (total, sums), gradient = jax.value_and_grad(loss, has_aux=True)(at)
    return gradient, total, dict(zip([*terms, *observe], sums))


def _divergence(name: str, conventions: Conventions) -> losses.Divergence:
    if name == GOLD:
        return losses.cross_entropy
    if name == "forward_kl" and conventions.entropy_free:
        name = "soft_cross_entropy"
    return losses.divergence(name)


def _student_to_learner(targets, prompted):
    """KL(q || p_P): the student is the first target of the prompt's loss."""
    return losses.forward_kl(targets[0], prompted)


def _student_to_plain(targets, prompted):
    """KL(q || p): the plain teacher is the second target of the prompt's loss."""
    return losses.forward_kl(targets[0], targets[1])


def _learner_to_teacher(targets, student):
    """KL(q || p): the teacher is the first target of the student's loss."""
    return losses.reverse_kl(targets[0], student)


def _agreement(targets, student):
    return losses.agreement(targets[0], student)


def _entropy(targets, student):
    return losses.entropy(student)


def _accumulate(part: Callable, xs: Any) -> tuple[Any, dict[str, jax.Array]]:
    """Sum of `part`'s gradients over the leading axis G of `xs`, and its sums stacked, `[G]`."""
    first = jax.tree.map(lambda x: x[0], xs)
    if jax.tree.leaves(xs)[0].shape[0] == 1:
        gradient, sums = part(*first)
        return gradient, jax.tree.map(lambda x: x[None], sums)

    def body(total, x):
        gradient, sums = part(*x)
        return jax.tree.map(jnp.add, total, gradient), sums

    shapes = jax.eval_shape(part, *first)[0]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(body, zeros, xs)


def _apply(optimizer: optax.GradientTransformation, gradient, optimizer_state, params):
    updates, optimizer_state = optimizer.update(gradient, optimizer_state, params)
    return optax.apply_updates(params, updates), optimizer_state


def _prompt_in_turn(before: jax.Array, after: jax.Array, method: Method) -> jax.Array:
    """The soft prompt that each micro-batch's student loss sees, `[G, M, D]`."""
    parts = method.micro_batches
    is_last = jnp.arange(parts) == parts - 1
    fresh = is_last | (not method.conventions.stale_prompt)
    return jnp.where(fresh[:, None, None], after, before)


def _row_statistics(rows: Batch, ended: jax.Array | None) -> dict[str, jax.Array]:
    lengths = (rows.lengths - rows.prompt_lengths).astype(jnp.float32)
    statistics = {"response_length": jnp.mean(lengths), "tokens": jnp.sum(rows.lengths)}
    if ended is not None:
        statistics["eos_rate"] = jnp.mean(ended.astype(jnp.float32))
    return statistics
