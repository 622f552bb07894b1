"""Rules that keep a soft prompt from harm: each is what its formula says, in one train step.

Models are tiny and random, those of `helpers.methods`; gradients are the first traces of momentum.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import methods
from helpers.methods import gradient, update
from helpers.steps import (
    ON_POLICY,
    STUDENT,
    TEACHER,
    assert_close,
    batch,
    changed,
    jit,
    kl,
    log_probs,
    method,
    supervised,
    teacher_params,
)

from promptkd_jax.distill.losses import losses
from promptkd_jax.distill.objective import prompt_terms
from promptkd_jax.distill.soft_prompt import zero_gated
from promptkd_jax.distill.state import TrainState, summarize
from promptkd_jax.distill.teacher import lazy_logits
from promptkd_jax.models.language_model import LanguageModel
from promptkd_jax.models.layers.gated_prefix import GatedPrefix

RATE, MOMENTUM = 0.5, 0.9  # of the prompt's updates
VECTORS = np.random.default_rng(2).normal(0, 0.5, (3, 32)).astype(np.float32)


def begin(soft_prompt=VECTORS, step: int = 0) -> TrainState:
    return methods.begin(step, soft_prompt=jax.tree.map(jnp.asarray, soft_prompt))


# The dense definitions


@jit
def dense_teacher(prefix):
    """log p_P, or log p: `[B, T - 1, V]`."""
    return log_probs(TEACHER, teacher_params(), batch().tokens, prefix)


def dense_student(student, teacher):
    """The gradient of KL(q || teacher), the mean over response tokens."""
    return methods.dense_student(student, target=teacher, reverse=1)[1]


@jit
@jax.grad
def dense_prompt(prefix, student, kd_weight, alpha):
    """The gradient of kd_weight KL(p_P || q) + alpha KL(p_P || p)."""
    prompted, plain = (
        log_probs(TEACHER, teacher_params(), batch().tokens, x) for x in (prefix, None)
    )
    learner = log_probs(STUDENT, student, batch().tokens)
    each = kd_weight * kl(prompted, learner) + alpha * kl(prompted, plain)
    return (supervised(batch()) * each).sum() / supervised(batch()).sum()


def likelihoods(prefix) -> np.ndarray:
    """Of the data's own responses, `[B]`."""
    labels = batch().tokens[:, 1:, None]
    each = np.take_along_axis(np.asarray(dense_teacher(prefix)), labels, axis=-1)[..., 0]
    return (supervised(batch()) * each).sum(-1)


# What it goes after


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_prompt_rests_where_the_students_loss_does(temperature):
    """A student that fits the prompted teacher at temperatures of their own leaves both at rest."""
    changes = dict(teacher_view="prompted", temperature=temperature, student_temperature=3.0)
    how = dataclasses.replace(ON_POLICY, **changes)
    teacher = jnp.asarray(np.random.default_rng(5).normal(0, 2, (4, 30)), jnp.float32)
    student = 3 / temperature * teacher
    of_student = losses.tempered(losses.reverse_kl, temperature, 3.0)
    of_prompt = prompt_terms(how, None, None, 1.0, 0.0)[0]["prompt_kd"].function
    for loss, target, learner in ((of_student, teacher, student), (of_prompt, student, teacher)):
        gradient = jax.grad(lambda x, loss=loss, target=target: loss(target, x).sum())
        assert np.abs(gradient(learner)).max() < 1e-5
        assert np.abs(gradient(1.1 * learner)).max() > 1e-2


# A gate


def test_gates_of_0_are_the_plain_teacher_and_open_where_that_helps():
    before = begin(zero_gated(TEACHER, jnp.asarray(VECTORS)))
    after, metrics = update(method(), before)
    assert abs(metrics.sums["prompt_regularizer"]).max() < 1e-5
    assert_close(metrics.sums["kl_prompted"], metrics.sums["kl_plain"])
    # At 0 only gates have a gradient, and they do not become negative.
    expected = dense_prompt(before.soft_prompt, before.student, 1.0, 0.75)
    assert_close(after.soft_prompt.vectors, VECTORS, 0)
    assert_close(after.soft_prompt.gates, jnp.maximum(-RATE * expected.gates, 0))
    assert (expected.gates > 0).any() and (expected.gates < 0).any()
    assert_close(summarize(metrics)["prompt_gate"], after.soft_prompt.gates.mean())
    again = dense_prompt(after.soft_prompt, before.student, 1.0, 0.5)
    assert jnp.abs(again.vectors).max() > 1e-4, "open gates, and the vectors move"


def test_a_model_of_functions_has_no_gates():
    model = LanguageModel(lambda params, tokens, prefix: tokens, lambda params: params)
    prefix = GatedPrefix(VECTORS, np.zeros((2, 4), np.float32))
    with pytest.raises(ValueError, match="prefix: a GatedPrefix, but the model is a LanguageModel"):
        lazy_logits(model, {}, batch(), None, 61, prefix)
    with pytest.raises(ValueError, match="prefix: a GatedPrefix, but the model is a LanguageModel"):
        model.prefill({}, batch().tokens, None, prefix, 4, 2)


# A warm-up


def test_a_prompt_warms_up_on_the_regularizer_while_the_student_has_the_plain_teacher():
    warm = method(prompt_warmup_steps=2)
    before = begin(step=1)
    after, metrics = update(warm, before)
    expected = dense_prompt(VECTORS, before.student, 0.0, 1.0)
    assert_close(gradient(after, "soft_prompt"), expected)
    plain = dense_student(before.student, dense_teacher(None))
    assert_close(gradient(after), plain)
    assert summarize(metrics)["plain_share"] == 1

    before = begin(step=2)  # the first of the two behind it: alpha = 1 - 1 / 2
    after, metrics = update(warm, before)
    expected = dense_prompt(VECTORS, before.student, 1.0, 0.5)
    assert_close(gradient(after, "soft_prompt"), expected)
    prompted = dense_student(before.student, dense_teacher(after.soft_prompt))
    assert_close(gradient(after), prompted)
    found = summarize(metrics)
    assert (found["plain_share"], found["regularization_weight"]) == (0, 0.5)


def test_an_adaptive_coefficient_rests_while_the_prompt_warms_up():
    """Else a loss of L_reg alone, which falls below the target, would have worn it away."""
    warm = method(prompt_warmup_steps=2, regularization_schedule="adaptive", target_kl=100.0)
    for step, expected in [(1, 1.0), (2, 0.98)]:  # far below the target: as low as it may fall
        after, _ = update(warm, begin(step=step))
        assert_close(after.regularization, expected)


# Several updates of the prompt


def test_the_student_learns_behind_the_last_of_several_updates():
    before = begin()
    after, metrics = update(method(prompt_updates=3), before)
    expected, trace = VECTORS, 0
    for _ in range(3):
        trace = MOMENTUM * trace + dense_prompt(expected, before.student, 1.0, 0.75)
        expected = expected - RATE * trace
    assert_close(after.soft_prompt, expected, 1e-5)
    prompted = dense_student(before.student, dense_teacher(after.soft_prompt))
    assert_close(gradient(after), prompted, 1e-5)
    assert metrics.losses["prompt"].shape == (1,)


# The plain teacher where the prompted one is worse


def test_rows_of_which_the_prompt_makes_the_answer_less_likely_have_the_plain_teacher():
    falls_back = method(prompt_fallback=True, gradient_accumulation_steps=2)
    before = begin()
    after, metrics = update(falls_back, before)
    worse = likelihoods(after.soft_prompt) < likelihoods(None)
    assert 0 < worse.sum() < 4, "there are rows of both kinds"
    teacher = jnp.where(worse[:, None, None], dense_teacher(None), dense_teacher(after.soft_prompt))
    assert_close(gradient(after), dense_student(before.student, teacher))
    assert_close(summarize(metrics)["plain_share"], worse.mean())


def test_what_the_student_wrote_is_judged_by_the_answer_to_its_prompt():
    after, metrics = update(changed(ON_POLICY, prompt_fallback=True, response_capacity=11), begin())
    worse = likelihoods(after.soft_prompt) < likelihoods(None)
    assert_close(summarize(metrics)["plain_share"], worse.mean())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(teacher_view="plain", prompt_updates=2), "prompt_updates: 2 is for a soft prompt"),
        (dict(prompt_warmup_steps=1, regularization=0.0), "prompt_warmup_steps: .* on L_reg"),
        (dict(prompt_warmup_steps=4), "prompt_warmup_steps: 4 of 4 steps leave none"),
        (dict(targets="replay", prompt_fallback=True), "with targets = 'replay' its rows are of"),
        (
            dict(targets="student", prompt_fallback=True, one_step_off_policy=True),
            "with one_step_off_policy its rows are of other prompts",
        ),
    ],
)
def test_rules_that_mean_nothing_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        method(**changes)
