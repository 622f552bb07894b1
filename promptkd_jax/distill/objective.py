"""The loss of a micro-batch and its gradients: of the soft prompt, the student, an online teacher.

Each of the three is one function, `prompt_gradients`, `student_gradients`, `teacher_gradients`:
forward, loss at the response positions, and the gradient carried back to the parameters. A loss is
a weighted sum of terms, which `grad_and_loss` computes in one pass over the vocabulary, together
with sums that are only measured.

    dL/dθ = (dh/dθ)ᵀ · dL/dh        h: hidden states [B, R, D] and head [V, D] of the learner

`dL/dh` comes from the chunked loss, which makes no [B, R, V] array; the pullback `(dh/dθ)ᵀ` from
`jax.vjp` of the forward pass. The prompt's and the student's update can share that of the student
and that of the prompted teacher.

B rows of a micro-batch, R response positions, M soft-prompt tokens, D width, V vocabulary,
G micro-batches of one update.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from promptkd_jax.data.batch import Batch, responses
from promptkd_jax.distill.losses import hidden_loss, losses
from promptkd_jax.distill.losses.chunked_loss import linear_loss
from promptkd_jax.distill.losses.divergence import mark_needs_whole
from promptkd_jax.distill.methods.method import Method
from promptkd_jax.distill.methods.method_fields import CROSS_ENTROPY
from promptkd_jax.distill.optimizer import Gradients
from promptkd_jax.distill.teacher import (
    PromptedForward,
    StepModels,
    StudentForward,
    lazy_logits,
)
from promptkd_jax.distill.terms import (
    MicroBatch,
    Observations,
    Term,
    Terms,
    student_observations,
    student_terms,
    teacher_term,
)
from promptkd_jax.models.language_model import LazyLogits


def grad_and_loss(
    terms: Terms,
    observations: Observations,
    mask: jax.Array,
    logits_of: Callable[[Any], LazyLogits],
    at: Any,
    *observed: Any,
) -> tuple[Any, jax.Array, dict[str, jax.Array]]:
    """Returns the gradient, the value and the measured sums of a weighted sum of terms.

    Args:
      terms: the summands, by name.
      observations: functions of (targets, learner logits) whose sums are measured, by name.
      mask: `[B, R]`, 1 where a position counts.
      logits_of: a function that gives the learner's distributions.
      at: its argument, for which the gradient is.
      observed: further targets, which only the observations see, behind those of the terms.

    Returns:
      (gradient, loss, sums): of the shape of `at`; the weighted sum; and by name the masked sum of
      every term, unweighted, and observation.
    """

    # One pass over V for all terms: the head is multiplied once per chunk, whatever is summed.
    def loss(at):
        return linear_loss(
            [term.function for term in terms.values()],
            logits_of(at),
            [*(term.target for term in terms.values()), *observed],
            mask,
            jnp.stack([term.weight for term in terms.values()]),
            observe=tuple(observations.values()),
        )

    # The gradient has the shape of `at`: hidden [B, R, D], or hidden and head [V, D].
    (total, sums), gradient = jax.value_and_grad(loss, has_aux=True)(at)
    return gradient, total, dict(zip([*terms, *observations], sums))


# The gradients of a micro-batch. A loss is a sum over tokens times `scale`, so that those of all
# micro-batches add up to the mean; the loss that is reported is the sum itself.


def prompt_gradients(
    params: Mapping[str, Any],
    micro_batch: MicroBatch,
    scale: jax.Array,
    kd_weight: jax.Array,
    coefficient: jax.Array,
    step_models: StepModels,
    student_forward: StudentForward | None = None,
    prompted_forward: PromptedForward | None = None,
) -> Gradients:
    """Returns the gradient of L_kd + alpha_k L_reg for the soft prompt (paper, eq. 1 to 3).

    Args:
      params: the groups of a train state.
      scale: `[]`, the factor that makes this micro-batch's sum its share of the mean.
      kd_weight, coefficient: `[]` each, the weight of L_kd, and alpha_k.
      student_forward: `step_models.student_vjp` of these rows, if it was computed already.
      prompted_forward: `step_models.prompted_vjp` of them, likewise.
    """
    rows = micro_batch.rows
    (teacher, _), pullback = prompted_forward or step_models.prompted_vjp(params, rows)
    (student, _), _ = student_forward or step_models.student_vjp(params["student"], rows)
    # The plain teacher is a constant of L_reg; without L_reg its forward pass is not made.
    plain = step_models.teacher(params, rows)[0] if step_models.method.regularization else None
    weights = scale * kd_weight, scale * coefficient
    terms, observations = prompt_terms(step_models.method, student, plain, *weights)
    mask = step_models.where(rows).mask
    # dL/dh [B, R, D] of the prompted teacher's hidden states, then (dh/dP)^T dL/dh.
    d_hidden, loss, sums = grad_and_loss(
        terms, observations, mask, lambda h: teacher.replace(hidden=h), teacher.hidden
    )
    return Gradients({"soft_prompt": pullback(d_hidden)[0]}, loss / scale, sums)


def teacher_gradients(
    params: Mapping[str, Any],
    micro_batch: MicroBatch,
    scale: jax.Array,
    step_models: StepModels,
    student_forward: StudentForward | None = None,
) -> Gradients:
    """Returns the gradient of an "online" teacher's terms for its parameters.

    Args:
      params: the groups of a train state.
      scale: `[]`, the factor that makes this micro-batch's sum its share of the mean.
      student_forward: as for `prompt_gradients`.
    """
    rows = micro_batch.rows

    def teacher(teacher_params):
        return step_models.teacher({"teacher": teacher_params}, rows)[0]

    # Unlike the prompt's, this pullback reaches all of the teacher, its head included.
    learner, pullback = jax.vjp(teacher, params["teacher"])
    (student, _), _ = student_forward or step_models.student_vjp(params["student"], rows)
    terms = {
        f"teacher_{name}": teacher_term(name, weight * scale, micro_batch, student, step_models)
        for name, weight in step_models.method.teacher_terms
    }
    mask = step_models.where(rows).mask
    d_learner, loss, sums = grad_and_loss(terms, {}, mask, lambda x: x, learner)
    return Gradients({"teacher": pullback(d_learner)[0]}, loss / scale, sums)


def student_gradients(
    params: Mapping[str, Any],
    micro_batch: MicroBatch,
    scale: jax.Array,
    corpus_scale: jax.Array,
    step_models: StepModels,
    student_forward: StudentForward | None = None,
    prompted_forward: PromptedForward | None = None,
) -> Gradients:
    """Returns the gradient of all losses of the student, for it and for its projections.

    Args:
      params: the groups of a train state.
      scale: `[]`, the factor that makes this micro-batch's sum its share of the mean.
      corpus_scale: `[]`, the same of the sum over the tokens of plain text.
      student_forward, prompted_forward: as for `prompt_gradients`; the latter in place of the
        teacher behind `micro_batch.soft_prompt`.
    """
    method, rows = step_models.method, micro_batch.rows
    where = step_models.where(rows)
    if student_forward is None:
        keys = micro_batch.dropout_keys and micro_batch.dropout_keys.rows
        student_forward = step_models.student_vjp(params["student"], rows, keys)
    (student, states), pullback = student_forward
    # Nothing looks at the teacher where only tokens or plain text are learned from.
    teacher, teacher_states = None, {}
    if prompted_forward is not None:
        (teacher, teacher_states), _ = prompted_forward
    elif method.student_needs_teacher:
        view = rows, micro_batch.soft_prompt, micro_batch.plain_rows
        teacher, teacher_states = step_models.teacher(params, *view)
    terms = student_terms(scale, micro_batch, teacher, step_models)
    observations = student_observations(method)
    d_student, loss, sums = _student_grad_and_loss(
        terms, observations, where.mask, student, step_models, teacher
    )
    # Hidden states have a gradient of their own, and join the logits' in one backward pass.
    by_group, d_states = {}, jax.tree.map(jnp.zeros_like, states)
    if hidden_terms := step_models.hidden_terms:
        projections = params.get("projection", {})
        d_states, d_projections, hidden_total, hidden_sums = hidden_loss.hidden_gradient(
            hidden_terms, states, teacher_states, projections, where, scale
        )
        if projections:
            by_group["projection"] = d_projections
        loss, sums = loss + hidden_total, sums | hidden_sums
    if taps := step_models.router_taps:
        per_token = step_models.models.student.config.experts.num_experts_per_tok
        scores = {tap: states[tap] for tap in taps}
        d_scores, balance = hidden_loss.balance_gradient(scores, rows.has_token, per_token)
        # A mean over the micro-batch, which counts as much as the micro-batch's tokens do.
        tokens = jnp.sum(where.mask)
        weight = method.router_balance * scale * tokens
        d_states |= jax.tree.map(lambda x: weight * x, d_scores)
        loss, sums = loss + weight * balance, sums | {"router_balance": balance * tokens}
    # One backward pass of the student for all terms on its rows.
    by_group["student"] = pullback((d_student, d_states))[0]
    # Plain text is another forward: rows of another shape, without a teacher as a rule.
    if micro_batch.corpus is not None:
        keys = micro_batch.dropout_keys and micro_batch.dropout_keys.corpus
        gradient, corpus_total = corpus_gradient(
            params, micro_batch.corpus, corpus_scale, step_models, keys
        )
        by_group["student"] = jax.tree.map(jnp.add, by_group["student"], gradient)
        # A share of the mean over tokens of text already. Divided by `scale`, it comes out as that
        # mean where `summarize` divides all sums by the response tokens.
        loss, sums = loss + corpus_total, sums | {"corpus_loss": corpus_total / scale}
    return Gradients(by_group, loss / scale, sums)


def _student_grad_and_loss(
    terms: Terms,
    observations: Observations,
    mask: jax.Array,
    student: LazyLogits,
    step_models: StepModels,
    *observed: Any,
) -> tuple[LazyLogits, jax.Array, dict[str, jax.Array]]:
    """`grad_and_loss` for the student's distributions."""
    if step_models.frozen_student is None:
        return grad_and_loss(terms, observations, mask, lambda x: x, student, *observed)
    # The head is frozen, and its gradient, as large as it is, not computed. The pullback wants one:
    # zeros, which it takes nowhere.
    d_hidden, loss, sums = grad_and_loss(
        terms, observations, mask, lambda h: student.replace(hidden=h), student.hidden, *observed
    )
    return jax.tree.map(jnp.zeros_like, student).replace(hidden=d_hidden), loss, sums


# The soft prompt's terms


def prompt_terms(
    method: Method,
    student: LazyLogits,
    plain: LazyLogits | None,
    kd_weight: jax.Array,
    regularizer_weight: jax.Array,
) -> tuple[Terms, Observations]:
    """Returns the terms of L_kd + alpha_k L_reg, and what is measured beside them.

    Args:
      student: the student's distributions.
      plain: those of the teacher without the soft prompt; None where there is no L_reg.
      kd_weight, regularizer_weight: of the two terms.
    """
    entropy_free = method.conventions.entropy_free
    divergence = _prompt_divergence(method.prompt_divergence, entropy_free=entropy_free)
    divergence = _from_fitted_student(divergence, method)
    terms = {"prompt_kd": Term(divergence, student, kd_weight)}
    observations = {"kl_prompted": _student_to_learner}
    if plain is not None:
        # The adaptive schedule compares the value of L_reg with its target, a KL divergence: with
        # the entropy of the plain teacher in it, no coefficient would bring it there.
        entropy_free &= method.regularization_schedule != "adaptive"
        divergence = _prompt_divergence(method.prompt_regularizer, entropy_free=entropy_free)
        terms["prompt_regularizer"] = Term(divergence, plain, regularizer_weight)
        observations["kl_plain"] = _student_to_plain
    return terms, observations


def _prompt_divergence(name: str, *, entropy_free: bool) -> losses.Divergence:
    if name == "forward_kl" and entropy_free:
        name = "soft_cross_entropy"
    return losses.divergence(name)


def _from_fitted_student(divergence: losses.Divergence, method: Method) -> losses.Divergence:
    """`divergence` of the prompted teacher from the student as the student's loss compares both: at
    a temperature of its own, a student that fits is q with q^(1 / temperature) ~ p_P, and a prompt
    that went after q itself would sharpen the teacher again with every update of the student."""
    temperature = (method.student_temperature or method.temperature) / method.temperature
    if temperature == 1:
        return divergence
    return mark_needs_whole(lambda student, prompted: divergence(student / temperature, prompted))


def _student_to_learner(targets, prompted):
    """KL(q || p_P): the student is the first target of the prompt's loss."""
    return losses.forward_kl(targets[0], prompted)


def _student_to_plain(targets, prompted):
    """KL(q || p): the plain teacher is the second target of the prompt's loss."""
    return losses.forward_kl(targets[0], targets[1])


# The student's loss on plain text


def corpus_gradient(
    params: Mapping[str, Any],
    corpus: Batch,
    weight: jax.Array,
    step_models: StepModels,
    dropout_keys: jax.Array | None = None,
) -> tuple[Any, jax.Array]:
    """Returns the gradient of the method's `corpus_terms` on every token of plain text but the
    first of a row.

    Args:
      params: the groups of a train state.
      dropout_keys: one for each row of the corpus; None: no dropout.

    Returns:
      (gradient for the student's parameters, the loss times `weight`).
    """
    method = step_models.method
    # Rows of text have a "prompt" of one token: each of the others is predicted.
    where = responses(corpus, corpus.tokens.shape[1] - 1)

    def student(trained):
        params = step_models.student_params(trained)
        view = step_models.models.student, params, corpus, where, method.vocab_size
        return lazy_logits(*view, dropout_keys=dropout_keys)

    learner, pullback = jax.vjp(student, params["student"])
    terms = {}
    for name, share in method.corpus_terms:
        if name == CROSS_ENTROPY:
            terms[name] = Term(losses.cross_entropy, where.labels, share * weight)
        else:
            teacher_params = step_models.teacher_params(params)
            target = lazy_logits(
                step_models.models.teacher, teacher_params, corpus, where, method.vocab_size
            )
            terms[name] = Term(losses.divergence(name), target, share * weight)
    d_learner, total, _ = _student_grad_and_loss(terms, {}, where.mask, learner, step_models)
    return pullback(d_learner)[0], total
