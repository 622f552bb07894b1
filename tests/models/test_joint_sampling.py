"""Two models that write a row together: the distribution of the next token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.methods import begin, plain
from helpers.steps import STUDENT, TEACHER, VOCABULARY, batch, jit, student_rows, teacher_params

from promptkd_jax.distill.targets import target_rows
from promptkd_jax.models.joint_sampling import interleaved, mixed
from promptkd_jax.models.sampler import SamplingModel


def pair():
    """Logits of both models, `[1, 6]`; the second's three likeliest tokens are 1, 4 and 5."""
    first = jnp.array([[1.0, 0.5, 2.0, 0.0, -1.0, 0.3]])
    return first, jnp.array([[-1.0, 2.0, 0.0, -2.0, 3.0, 0.5]])


def test_a_rejected_token_is_drawn_again_from_the_second_model():
    """As it is published, with two draws; frequencies within five standard deviations."""
    rng, (q, p) = np.random.default_rng(0), (np.asarray(jax.nn.softmax(x))[0] for x in pair())
    drawn = rng.choice(6, 40_000, p=q / q.sum())
    again = rng.choice(6, 40_000, p=p / p.sum())
    tokens = np.where(np.isin(drawn, [1, 4, 5]), drawn, again)
    expected = np.exp(interleaved(*pair(), 3))[0]
    assert expected.sum() == pytest.approx(1, rel=1e-6)
    found = np.bincount(tokens, minlength=6) / 40_000
    assert (np.abs(found - expected) < 5 * np.sqrt(expected / 40_000)).all()


def test_limits():
    first, second = pair()
    for top_k in (6, 99):  # the second accepts all
        np.testing.assert_allclose(interleaved(first, second, top_k), jax.nn.log_softmax(first))
    first = first.at[0, 4].set(-jnp.inf)  # the first never draws what alone is accepted
    np.testing.assert_allclose(interleaved(first, second, 1), jax.nn.log_softmax(second), rtol=1e-6)
    first = jnp.full((1, 6), -jnp.inf).at[0, 4].set(0)  # and always
    np.testing.assert_array_equal(np.exp(interleaved(first, second, 1)), np.eye(6)[[4]])
    shares = sum(w * jax.nn.softmax(x) for w, x in zip((0.75, 0.25), pair()))
    np.testing.assert_allclose(np.exp(mixed(*pair(), 0.25)), shares, rtol=1e-6)


@functools.partial(jit, static_argnums=0)
def written(method, student, teacher, key):
    second = SamplingModel(TEACHER, teacher)
    return target_rows(method, STUDENT, student, batch(), None, key, step=0, teacher=second)[0].rows


def rows(top_k: int, key):
    method = plain(targets="student", teacher_top_k=top_k)
    return written(method, begin().student, teacher_params(), key)


def test_rows_with_a_teacher_that_accepts_all_are_the_students_own():
    key = jax.random.key(5)
    expected, _ = student_rows(begin().student, key)
    jax.tree.map(np.testing.assert_array_equal, rows(VOCABULARY, key), expected)
    assert (rows(1, key).tokens != expected.tokens).any()
