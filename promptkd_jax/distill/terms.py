"""The terms of a loss: of the student, and of a teacher that learns. `objective` computes them.

B rows of a micro-batch, R response positions, M soft-prompt tokens, D width, V vocabulary.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from promptkd_jax.data.batch import Batch
from promptkd_jax.data.top_k import TopK
from promptkd_jax.distill.losses import losses, policy_gradient
from promptkd_jax.distill.losses.chunked_loss import Observation, apply_divergence
from promptkd_jax.distill.losses.divergence import mark_needs_whole, needs_whole
from promptkd_jax.distill.losses.policy_gradient import PolicyTarget
from promptkd_jax.distill.losses.transport import transport
from promptkd_jax.distill.methods.curriculum import Curriculum, interpolated
from promptkd_jax.distill.methods.method import Method
from promptkd_jax.distill.methods.method_fields import CROSS_ENTROPY, POLICY_GRADIENT, TRANSPORT
from promptkd_jax.distill.teacher import DropoutKeys, StepModels
from promptkd_jax.models.language_model import LazyLogits
from promptkd_jax.models.layers.gated_prefix import GatedPrefix


class MicroBatch(NamedTuple):
    """The inputs of the losses of one micro-batch.

    `is_student` `[B]` says which rows the student wrote, `corpus` are rows of plain text,
    `references` the data's own rows to the same prompts, `soft_prompt`, `[M, D]` or gated, the one
    of the student's loss, `plain_rows` `[B]` the rows that are learned without it, `policy` the
    advantages of sampled tokens, `dropout_keys` `[B]` those of the student's own update, of the
    rows and of the corpus, `curriculum` what changes in the student's loss from step to step, `[]`
    each.
    """

    rows: Batch
    is_student: jax.Array
    corpus: Batch | None
    references: Batch | None = None
    soft_prompt: jax.Array | GatedPrefix | None = None
    plain_rows: jax.Array | None = None
    policy: PolicyTarget | None = None
    dropout_keys: DropoutKeys | None = None
    curriculum: Curriculum | None = None


class Term(NamedTuple):
    """One summand of a loss: a function of (target, learner logits), its target, its weight."""

    function: losses.Divergence
    target: Any
    weight: jax.Array


Terms = dict[str, Term]
Observations = dict[str, Observation]


def student_terms(
    scale: jax.Array,
    micro_batch: MicroBatch,
    teacher: LazyLogits | TopK | None,
    step_models: StepModels,
) -> Terms:
    """Returns all terms of the student, weighted by `scale`; divergences are from `teacher`."""
    method = step_models.method

    def term(name, weight):
        return _student_term(name, weight * scale, micro_batch, teacher, step_models)

    if not method.off_policy_terms:
        return {name: term(name, weight) for name, weight in method.student_terms}
    # A kind of rows has terms of its own, and none of the other's.
    own, of_own = micro_batch.is_student, micro_batch.curriculum.own_rows
    shape = step_models.where(micro_batch.rows).mask.shape
    terms = {}
    for prefix, counts, share, named in (
        ("", own, of_own, method.student_terms),
        ("off_policy_", ~own, 2 - of_own, method.off_policy_terms),
    ):
        # [B] -> [B, R]: the chunked loss cuts by position, and so whatever a term reads.
        counts = jnp.broadcast_to(counts[:, None], shape)
        for name, weight in named:
            function, target, weight = term(name, weight * share)
            terms[prefix + name] = Term(_on_rows(function), (target, counts), weight)
    return terms


def _on_rows(function: losses.Divergence) -> losses.Divergence:
    """`function` where its target's second part, `[B, R]`, is True, else 0."""

    def on_rows(target, learner):
        target, counts = target
        return jnp.where(counts, function(target, learner), 0.0)

    on_rows.needs_whole = needs_whole(function)
    return on_rows


def _student_term(
    name: str,
    weight: jax.Array,
    micro_batch: MicroBatch,
    teacher: LazyLogits | TopK | None,
    step_models: StepModels,
) -> Term:
    method = step_models.method
    if name == CROSS_ENTROPY:
        return _cross_entropy_term(weight, micro_batch, step_models)
    if name == POLICY_GRADIENT:
        clip = method.policy_gradient.ratio_clip
        function = functools.partial(policy_gradient.clipped_policy_gradient, ratio_clip=clip)
        return Term(function, micro_batch.policy, weight)
    temperatures = method.temperature, method.student_temperature
    if name == TRANSPORT:
        return Term(_transport(method), (teacher, step_models.token_kernel), weight)
    # From the inside out: the divergence at its temperatures, the weight of a position, the moving
    # target. So weights are of logits at no temperature, and of the mixture where there is one.
    function = losses.tempered(losses.divergence(name), *temperatures)
    function = losses.weighted(function, method.token_weighting)
    if method.interpolation.schedule == "none":
        return Term(function, teacher, weight)
    shape = step_models.where(micro_batch.rows).mask.shape
    share = jnp.broadcast_to(micro_batch.curriculum.interpolation, shape)
    return Term(interpolated(function), (teacher, share), weight)


def _transport(method: Method) -> losses.Divergence:
    """WASD's loss, of (target, kernel of its tokens)."""

    def with_kernel(target, learner):
        target, kernel = target
        if kernel is None:
            raise ValueError(
                f"{TRANSPORT}: train_step needs token_kernel=token_kernel(embeddings, "
                "method.transport), of the teacher's input embeddings"
            )
        function = functools.partial(transport, kernel=kernel, settings=method.transport)
        function = losses.tempered(function, method.temperature, method.student_temperature)
        return losses.weighted(function, method.token_weighting)(target, learner)

    return mark_needs_whole(with_kernel)


def teacher_term(
    name: str,
    weight: jax.Array,
    micro_batch: MicroBatch,
    student: LazyLogits,
    step_models: StepModels,
) -> Term:
    """Returns an online teacher's term `name`; its divergences are from `student`."""
    if name == CROSS_ENTROPY:
        return _cross_entropy_term(weight, micro_batch, step_models)
    return Term(losses.divergence(name), student, weight)


def _cross_entropy_term(
    weight: jax.Array, micro_batch: MicroBatch, step_models: StepModels
) -> Term:
    labels = step_models.where(micro_batch.rows).labels
    if not step_models.method.source.on_policy:
        return Term(losses.cross_entropy, labels, weight)
    # [B] -> [B, R]: cross-entropy counts only rows that the student did not write itself.
    written_by_others = jnp.broadcast_to(~micro_batch.is_student[:, None], labels.shape)
    return Term(_cross_entropy_of_others, (labels, written_by_others), weight)


def _cross_entropy_of_others(target, logits):
    """Cross-entropy on rows that the student did not write: on its own, it would only sharpen the
    student's distributions."""
    labels, counts = target
    return losses.cross_entropy(labels, logits) * counts


def student_observations(method: Method) -> Observations:
    """Functions that are measured beside the student's loss; the last of their targets is the
    teacher in the method's view."""
    observations = {"student_entropy": _entropy}
    if method.student_needs_teacher:
        observations["agreement"] = _agreement
        if not method.prompted:
            observations[f"kl_{method.teacher_view}"] = _learner_to_teacher
    return observations


def _learner_to_teacher(targets, student):
    """KL(q || p)."""
    return apply_divergence(losses.reverse_kl, targets[-1], student)


def _agreement(targets, student):
    teacher = targets[-1]
    if isinstance(teacher, TopK):  # of which the first token is the likeliest
        # [B, R]: the student's logit of the teacher's likeliest token, against its own largest.
        there = jnp.take_along_axis(student, teacher.ids[..., :1], axis=-1)[..., 0]
        return (there == jnp.max(student, axis=-1)).astype(jnp.float32)
    return losses.agreement(teacher, student)


def _entropy(targets, student):
    return losses.entropy(student)
