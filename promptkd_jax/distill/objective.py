"""One loss and its gradient: the terms of a learner, weighted, and what is measured beside them.

A learner is the student, the teacher of the "online" view, or the teacher behind its soft prompt.
Gradients are for what the learner says at the response positions; `step` takes them further back.

B rows of a micro-batch, R response positions, M soft-prompt tokens, D width, V vocabulary,
G micro-batches of one update.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from promptkd_jax.data.batch import Batch, Responses, responses
from promptkd_jax.data.top_k import TopK
from promptkd_jax.distill import hidden_loss, losses, policy_gradient
from promptkd_jax.distill.chunked_loss import LazyLogits, Observation, apply_divergence, linear_loss
from promptkd_jax.distill.method import CROSS_ENTROPY, ON_POLICY, POLICY_GRADIENT, Method
from promptkd_jax.distill.policy_gradient import PolicyTarget
from promptkd_jax.distill.teacher import StepModels, lazy_logits


class MicroBatch(NamedTuple):
    """What the losses of one micro-batch are made of.

    `own` `[B]` says which rows the student wrote, `corpus` are rows of plain text, `soft_prompt`
    `[M, D]` is the one that the student's loss sees, `policy` what sampled tokens are worth.
    """

    rows: Batch
    own: jax.Array
    corpus: Batch | None
    soft_prompt: jax.Array | None = None
    policy: PolicyTarget | None = None


class Term(NamedTuple):
    """One summand of a loss: a function of (target, learner logits), its target, its weight."""

    function: losses.Divergence
    target: Any
    weight: jax.Array


Terms = dict[str, Term]
Observations = dict[str, Observation]


def gradient(
    terms: Terms,
    observations: Observations,
    mask: jax.Array,
    learner: Callable[[Any], LazyLogits],
    at: Any,
    *observed: Any,
) -> tuple[Any, jax.Array, dict[str, jax.Array]]:
    """The gradient of a loss.

    Args:
      terms: what is summed, by name.
      observations: what is measured of (targets, learner logits) beside it, by name.
      mask: `[B, R]`, 1 where a position counts.
      learner: gives the learner's distributions; the gradient is for its argument, at `at`.
      observed: further targets, which only the observations see, behind those of the terms.

    Returns:
      (gradient, loss, sums): of the shape of `at`, a scalar, and by name the masked sum of every
      term, unweighted, and observation.
    """

    def loss(at):
        return linear_loss(
            [term.function for term in terms.values()],
            learner(at),
            [*(term.target for term in terms.values()), *observed],
            mask,
            jnp.stack([term.weight for term in terms.values()]),
            observe=tuple(observations.values()),
        )

    (total, sums), found = jax.value_and_grad(loss, has_aux=True)(at)
    return found, total, dict(zip([*terms, *observations], sums))


def accumulate(part: Callable, xs: Any) -> tuple[Any, dict[str, jax.Array]]:
    """Sum of `part`'s gradients over the leading axis G of `xs`, and its sums stacked, `[G]`.

    Gradients in half precision are summed in float32 and rounded once.

    Args:
      part: a function of one slice of every element of `xs`, to (gradients, sums).
      xs: a tuple of pytrees.
    """
    first = jax.tree.map(lambda x: x[0], xs)
    if jax.tree.leaves(xs)[0].shape[0] == 1:
        gradients, sums = part(*first)
        return gradients, jax.tree.map(lambda x: x[None], sums)

    def body(total, x):
        gradients, sums = part(*x)
        return jax.tree.map(jnp.add, total, gradients), sums

    shapes = jax.eval_shape(part, *first)[0]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
    total, sums = jax.lax.scan(body, zeros, xs)
    return jax.tree.map(lambda x, like: x.astype(like.dtype), total, shapes), sums


def norm(gradients: Any) -> jax.Array:
    """The L2 norm of all gradients together, its squares summed in float32."""
    return optax.tree.norm(optax.tree.cast(gradients, jnp.float32))


# The student's terms, and those of a teacher that learns


def student_term(
    name: str, weight: jax.Array, part: MicroBatch, seen: LazyLogits | TopK | None, see: StepModels
) -> Term:
    """What the student's term `name` compares with, where the teacher says `seen`."""
    method = see.method
    if name == CROSS_ENTROPY:
        return _gold_term(weight, part, see)
    if name == POLICY_GRADIENT:
        clip = method.policy_gradient.ratio_clip
        function = functools.partial(policy_gradient.clipped_policy_gradient, ratio_clip=clip)
        return Term(function, part.policy, weight)
    function = losses.tempered(losses.divergence(name), method.temperature)
    return Term(losses.weighted(function, method.token_weighting), seen, weight)


def teacher_term(
    name: str, weight: jax.Array, part: MicroBatch, student: LazyLogits, see: StepModels
) -> Term:
    """What an online teacher's term `name` compares with."""
    if name == CROSS_ENTROPY:
        return _gold_term(weight, part, see)
    return Term(losses.divergence(name), student, weight)


def _gold_term(weight: jax.Array, part: MicroBatch, see: StepModels) -> Term:
    labels = see.where(part.rows).labels
    if see.method.targets not in ON_POLICY:
        return Term(losses.cross_entropy, labels, weight)
    written_by_others = jnp.broadcast_to(~part.own[:, None], labels.shape)
    return Term(_gold_cross_entropy, (labels, written_by_others), weight)


def _gold_cross_entropy(target, logits):
    """On the student's own rows it would only make it surer of what it says."""
    labels, counts = target
    return losses.cross_entropy(labels, logits) * counts


def student_observations(method: Method) -> Observations:
    """What is measured beside the student's loss; the last target is the teacher as it is seen."""
    observations = {"student_entropy": _entropy}
    if method.needs_view:
        observations["agreement"] = _agreement
        if not method.prompted:
            observations[f"kl_{method.teacher_view}"] = _learner_to_teacher
    return observations


def _learner_to_teacher(targets, student):
    """KL(q || p)."""
    return apply_divergence(losses.reverse_kl, targets[-1], student)


def _agreement(targets, student):
    teacher = targets[-1]
    if isinstance(teacher, TopK):  # the largest is kept, and kept first
        there = jnp.take_along_axis(student, teacher.ids[..., :1], axis=-1)[..., 0]
        return (there == jnp.max(student, axis=-1)).astype(jnp.float32)
    return losses.agreement(teacher, student)


def _entropy(targets, student):
    return losses.entropy(student)


# The soft prompt's terms


def prompt_terms(
    method: Method,
    student: LazyLogits,
    plain: LazyLogits | None,
    weight: jax.Array,
    coefficient: jax.Array,
) -> tuple[Terms, Observations]:
    """L_kd + alpha_k L_reg of the paper, and what is measured beside them.

    Args:
      student: what the student says.
      plain: what the teacher says without the soft prompt; None where there is no L_reg.
      weight: of both terms; coefficient: alpha_k.
    """
    free = method.conventions.entropy_free
    divergence = _prompt_divergence(method.prompt_divergence, entropy_free=free)
    terms = {"prompt_kd": Term(divergence, student, weight)}
    observations = {"kl_prompted": _student_to_learner}
    if plain is not None:
        free &= method.regularisation_schedule != "adaptive"  # that goes by the value
        divergence = _prompt_divergence(method.prompt_regulariser, entropy_free=free)
        terms["prompt_regulariser"] = Term(divergence, plain, weight * coefficient)
        observations["kl_plain"] = _student_to_plain
    return terms, observations


def _prompt_divergence(name: str, *, entropy_free: bool) -> losses.Divergence:
    if name == "forward_kl" and entropy_free:
        name = "soft_cross_entropy"
    return losses.divergence(name)


def _student_to_learner(targets, prompted):
    """KL(q || p_P): the student is the first target of the prompt's loss."""
    return losses.forward_kl(targets[0], prompted)


def _student_to_plain(targets, prompted):
    """KL(q || p): the plain teacher is the second target of the prompt's loss."""
    return losses.forward_kl(targets[0], targets[1])


# What else the student minimises


def hidden_gradient(
    states: hidden_loss.States,
    teacher_states: hidden_loss.States,
    projections: hidden_loss.Projections,
    where: Responses,
    weight: jax.Array,
    see: StepModels,
) -> tuple[hidden_loss.States, dict[str, Any], jax.Array, dict[str, jax.Array]]:
    """Of the losses between hidden states, see `hidden.hidden_loss`.

    Returns:
      (gradient for `states`, {"projection": that for the projections} where there are any, the
      loss times `weight`, the unweighted masked sum of every term by name).
    """

    def loss(states, projections):
        total, sums = hidden_loss.hidden_loss(
            see.hidden_terms, states, teacher_states, projections, where
        )
        return weight * total, sums

    (total, sums), (d_states, d_projections) = jax.value_and_grad(
        loss, argnums=(0, 1), has_aux=True
    )(states, projections)
    return d_states, {"projection": d_projections} if projections else {}, total, sums


def corpus_gradient(
    params: Mapping[str, Any], corpus: Batch, weight: jax.Array, see: StepModels
) -> tuple[Any, jax.Array]:
    """Of the method's `corpus_terms` on plain text, every token but the first counting.

    Args:
      params: the groups of a train state.

    Returns:
      (gradient for the student's parameters, the loss times `weight`).
    """
    method = see.method
    where = responses(corpus, corpus.tokens.shape[1] - 1)

    def student(params):
        return lazy_logits(see.models.student, params, corpus, where, method.vocab_size)

    learner, pullback = jax.vjp(student, params["student"])
    terms = {}
    for name, share in method.corpus_terms:
        if name == CROSS_ENTROPY:
            terms[name] = Term(losses.cross_entropy, where.labels, share * weight)
        else:
            teacher = see.teacher_params(params)
            seen = lazy_logits(see.models.teacher, teacher, corpus, where, method.vocab_size)
            terms[name] = Term(losses.divergence(name), seen, share * weight)
    d_learner, total, _ = gradient(terms, {}, where.mask, lambda x: x, learner)
    return pullback(d_learner)[0], total
