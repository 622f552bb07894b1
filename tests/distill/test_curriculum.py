"""The student's loss from step to step: TAID's moving target, and weights of rows by who wrote
them, against dense losses by `jax.grad`."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.methods import begin, dense_student, gradient, in_parts, plain, seen, update
from helpers.steps import (
    STEPS,
    STUDENT,
    TEACHER,
    assert_close,
    batch,
    student_rows,
    teacher_params,
)

from promptkd_jax.distill.methods.curriculum import (
    Interpolation,
    first_interpolation,
    linear_share,
    next_interpolation,
)
from promptkd_jax.distill.state import curriculum, summarize
from promptkd_jax.distill.targets import target_rows

# TAID


def published(losses, *, start=0.4, end=1.0, rate=5e-4, momentum=0.99, total=8):
    """The shares of the steps behind `losses`, in plain Python."""
    share, fall, before, shares = start, 0.0, math.inf, []
    for step, loss in enumerate(losses, start=1):
        floor, delta = start + (end - start) * step / total, 0.0
        if before != math.inf:
            fall = momentum * fall + (1 - momentum) * (before - loss) / before
            delta = rate / (1 + math.exp(-fall)) * (1 - share)
        share, before = min(end, max(floor, share + delta)), loss
        shares.append(share)
    return shares


@pytest.mark.parametrize("rate, momentum", [(5e-4, 0.99), (0.5, 0.5), (0.0, 0.9)])
def test_the_adaptive_share_is_that_of_the_paper(rate, momentum):
    settings = Interpolation(schedule="adaptive", rate=rate, momentum=momentum)
    state, found = first_interpolation(settings), []
    losses = [2.0, 1.0, 3.0, 0.5, 0.4, 0.3, 0.2, 0.1]
    assert state.share == np.float32(0.4)
    for step, loss in enumerate(losses, start=1):
        floor = linear_share(settings, step / 8)
        state = next_interpolation(settings, state, jnp.float32(loss), floor)
        found.append(float(state.share))
    np.testing.assert_allclose(found, published(losses, rate=rate, momentum=momentum), rtol=1e-5)
    assert found == sorted(found) and found[-1] == 1
    linear = [linear_share(settings, step / 8) for step in range(1, 9)]
    assert (np.array(found) >= np.float32(linear)).all()
    if rate == 0:  # then it is the linear schedule
        np.testing.assert_allclose(found, linear, rtol=1e-6)


def mixed(student, share: float):
    """TAID's target, `[B, T - 1, V]` log-probabilities."""
    own, teacher = (
        seen(decoder, params, batch().tokens)
        for decoder, params in ((STUDENT, student), (TEACHER, teacher_params()))
    )
    return jax.nn.log_softmax((1 - share) * own + share * teacher)


LINEAR = dict(interpolation=Interpolation(schedule="linear", start=0.2, end=0.8))
FORWARD = dict(student_terms=(("forward_kl", 1.0),))


@pytest.mark.parametrize("parts", [1, 2])
def test_the_target_is_a_geometric_mixture_that_is_held(parts):
    """In step 1 of 4, so that the share is 0.35."""
    before = begin(step=1)
    after, metrics = update(in_parts(plain(**LINEAR, **FORWARD), parts), before)
    target = mixed(before.student, 0.2 + 0.6 / STEPS)
    (value, _), expected = dense_student(before.student, target=target, forward=1)
    assert_close(gradient(after), expected)
    assert_close(summarize(metrics)["student_loss"], value)


def test_at_the_end_the_target_is_the_teacher():
    before = begin(step=STEPS)
    settings = Interpolation(schedule="linear", start=0.2)
    after, _ = update(plain(interpolation=settings, **FORWARD), before)
    _, expected = dense_student(before.student, forward=1)
    assert_close(gradient(after), expected)


def test_the_schedule_is_part_of_the_state():
    settings = Interpolation(schedule="adaptive", start=0.3, rate=0.5, momentum=0.0)
    method = plain(interpolation=settings, student_terms=(("soft_cross_entropy", 1.0),))
    with pytest.raises(ValueError, match="needs init_state"):
        curriculum(method, begin())
    state, losses, shares = begin().replace(interpolation=first_interpolation(settings)), [], []
    for _ in range(2):
        state, metrics = update(method, state)
        losses.append(summarize(metrics)["student_loss"])
        shares.append(float(metrics.scalars["interpolation_share"]))
    expected = published(losses, start=0.3, rate=0.5, momentum=0.0, total=STEPS)
    np.testing.assert_allclose([*shares, state.interpolation.share], [0.3, *expected], rtol=1e-5)
    assert state.interpolation.loss == pytest.approx(losses[1])


def test_a_skipped_step_leaves_the_schedule_as_it_was():
    settings = Interpolation(schedule="adaptive")
    method = plain(interpolation=settings, student_terms=(("soft_cross_entropy", 1.0),))
    before = begin().replace(interpolation=first_interpolation(settings))
    broken = jax.tree.map(lambda x: jnp.full_like(x, np.nan), teacher_params())
    after, _ = update(method, before, teacher=broken)
    jax.tree.map(np.testing.assert_array_equal, after.interpolation, before.interpolation)


# DistiLLM-2


@pytest.mark.parametrize("step, own", [(0, 1.0), (1, 1.25), (2, 1.5), (3, 1.5)])
def test_the_weight_of_the_students_rows_rises_over_half_of_the_steps(step, own):
    method = plain(targets="mixed", off_policy_terms=(("forward_kl", 1.0),), row_weights="rising")
    found = curriculum(in_parts(method, 2), begin(step=step))
    np.testing.assert_allclose(found.own_rows, [own] * 2)


@pytest.mark.parametrize("targets", ["mixed", "teacher_and_student"])
def test_rows_of_either_have_terms_of_their_own(targets):
    """Cross-entropy and forward KL on those of others, reverse KL on the student's own."""
    method = plain(
        targets=targets,
        student_terms=(("reverse_kl", 0.6),),
        off_policy_terms=(("forward_kl", 0.4), ("cross_entropy", 0.3)),
        row_weights="rising",
    )
    before = begin(step=1)
    key = jax.random.fold_in(before.key, 1)
    (rows, own, _), _ = target_rows(
        method, STUDENT, before.student, batch(), None, key, step=1, teacher=None
    )
    assert 0 < own.sum() < 4
    written, _ = student_rows(before.student, key)
    assert rows.lengths[own].tolist() == np.asarray(written.lengths)[own].tolist()
    after, metrics = update(in_parts(method, 2), before)
    (value, sums), expected = dense_student(
        before.student,
        rows,
        reverse=1.25 * 0.6 * own,
        forward=0.75 * 0.4 * ~own,
        gold=0.75 * 0.3 * ~own,
    )
    assert_close(gradient(after), expected)
    assert_close(summarize(metrics)["student_loss"], value)
    assert_close(metrics.sums["off_policy_forward_kl"].sum(), (sums[1] * ~own).sum())
    assert_close(metrics.sums["reverse_kl"].sum(), (sums[2] * own).sum())
