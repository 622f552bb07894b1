"""WASD's loss against Sinkhorn's algorithm on whole matrices, in plain NumPy and float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.methods import begin, gradient, in_parts, plain, seen, update
from helpers.steps import STUDENT, TEACHER, VOCABULARY, assert_close, batch, supervised
from helpers.steps import teacher_params as params_of_teacher

from promptkd_jax.distill.losses import losses
from promptkd_jax.distill.losses.chunked_loss import linear_loss
from promptkd_jax.distill.losses.transport import Transport, token_kernel, transport
from promptkd_jax.models.language_model import LazyLogits

TOKENS = 23
WIDE = Transport(epsilon=0.3, neighbours=5)  # so that mass moves


@functools.cache
def embeddings() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 1, (TOKENS, 4)).astype(np.float32)


def dense_kernel(x, settings: Transport) -> np.ndarray:
    x = np.asarray(x, np.float64)
    x = x / np.linalg.norm(x, axis=-1, keepdims=True)
    costs = 1 - x @ x.T
    np.fill_diagonal(costs, np.inf)
    kernel = np.zeros_like(costs)
    for i, row in enumerate(costs):
        near = np.argsort(row)[: settings.neighbours]
        kernel[i, near] = np.exp(-row[near] / settings.epsilon)
    kernel = np.maximum(kernel, kernel.T)
    np.fill_diagonal(kernel, 1)
    return kernel


def pair(scale: float = 2.0):
    rng = np.random.default_rng(1)
    return [rng.normal(0, scale, (3, TOKENS)).astype(np.float32) for _ in range(2)]


def probabilities(x):
    x = np.exp(np.asarray(x, np.float64))
    return x / x.sum(axis=-1, keepdims=True)


def mixture(p, q, settings: Transport):
    e = (1 - settings.alpha) / 2
    r = (settings.share * p**e + (1 - settings.share) * q**e) ** (1 / e)
    return r / r.sum(axis=-1, keepdims=True)


def derivative(p, r, kernel, settings: Transport):
    """That of the loss by r, as the released code has it: scalings u of r, v of p, a of r to r."""
    u, v, a = r, p, np.ones_like(r)
    for _ in range(settings.iterations):
        u = r / (v @ kernel)
        v = p / (u @ kernel)
        a = np.sqrt(a / ((r * a) @ kernel))
    return settings.epsilon * (np.log(u) - np.log(a))


def test_the_kernel_is_that_of_the_nearest_tokens():
    found = token_kernel(jnp.asarray(embeddings()), WIDE)
    dense = np.eye(TOKENS)
    for ids, columns, log_entries in found.groups:
        assert (np.diff(np.asarray(ids)) > 0).all()
        for i, places, values in zip(ids, columns, np.exp(log_entries)):
            dense[i, places[values > 0]] = values[values > 0]
    np.testing.assert_allclose(dense, dense_kernel(embeddings(), WIDE), rtol=1e-4)
    assert len(found.groups) > 1 and found.num_tokens == TOKENS
    assert token_kernel(jnp.eye(4), Transport()).num_tokens == 0  # nothing is near


def test_the_released_loss_is_that_of_scalings():
    """Its value, and through the mixture alone its gradient."""
    target, learner = pair()
    kernel = token_kernel(jnp.asarray(embeddings()), WIDE)
    p, q = map(probabilities, (target, learner))
    slope = derivative(p, mixture(p, q, WIDE), dense_kernel(embeddings(), WIDE), WIDE)
    expected = (mixture(p, q, WIDE) * slope).sum(-1)
    found = transport(target, learner, kernel, WIDE)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    way, step = pair()[0][::-1].astype(np.float64), 1e-5
    there, back = (
        (mixture(p, probabilities(learner + x * way), WIDE) * slope).sum() for x in (step, -step)
    )
    found = jax.grad(lambda x: transport(target, x, kernel, WIDE).sum())(learner)
    np.testing.assert_allclose((found * way).sum(), (there - back) / 2e-5, rtol=1e-3)


def test_the_debiased_loss_is_the_divergence_where_mass_can_go_anywhere():
    """Its value, and through the mixture the gradient of that value."""
    settings = Transport(
        form="debiased", epsilon=0.3, neighbours=TOKENS - 1, alpha=-1, iterations=200
    )
    kernel = token_kernel(jnp.asarray(embeddings()), settings)
    dense = dense_kernel(embeddings(), settings)
    (target, learner), p = pair(), probabilities(pair()[0])

    def expected(learner):
        r = mixture(p, probabilities(learner), settings)
        u = v = of_r = of_p = np.ones_like(p)
        for _ in range(500):
            u, of_r = 1 / ((p * v) @ dense), np.sqrt(of_r / ((r * of_r) @ dense))
            v, of_p = 1 / ((r * u) @ dense), np.sqrt(of_p / ((p * of_p) @ dense))
        both = r * np.log(u / of_r) + p * np.log(v / of_p)
        return settings.epsilon * both.sum(-1)

    found = transport(target, learner, kernel, settings)
    np.testing.assert_allclose(found, expected(learner), rtol=2e-3)
    way = pair()[0][::-1].astype(np.float64)
    there, back = (expected(learner + x * way).sum() for x in (1e-4, -1e-4))
    found = jax.grad(lambda x: transport(target, x, kernel, settings).sum())(learner)
    np.testing.assert_allclose((found * way).sum(), (there - back) / 2e-4, rtol=2e-3)


@pytest.mark.parametrize("form, factor, entropy", [("released", 10, 0.5), ("debiased", 2.75, 0)])
def test_without_neighbours_its_gradient_is_that_of_reverse_kl_and_perhaps_entropy(
    form, factor, entropy
):
    """With share -> 0, so that the mixture is the learner."""
    settings = Transport(form=form, alpha=1.0, share=1e-7)
    kernel, (target, learner) = token_kernel(jnp.eye(TOKENS), settings), pair()

    def expected(x):
        negative = -losses.entropy(x)
        return 0.001 * (factor * losses.reverse_kl(target, x) + entropy * negative).sum()

    found = jax.grad(lambda x: transport(target, x, kernel, settings).sum())(learner)
    np.testing.assert_allclose(found, jax.grad(expected)(learner), atol=2e-6)


def test_the_debiased_divergence_is_least_where_both_are_equal():
    settings = Transport(form="debiased", epsilon=0.3, neighbours=5)
    kernel, (target, learner) = token_kernel(jnp.asarray(embeddings()), settings), pair()
    whole = jax.value_and_grad(lambda x: transport(target, x, kernel, settings).sum())
    value, slope = whole(jnp.asarray(target))
    assert abs(value) < 1e-6 and np.abs(slope).max() < 1e-6
    assert (transport(target, learner, kernel, settings) > 1e-3).all()
    released = jax.grad(lambda x: transport(target, x, kernel, WIDE).sum())(jnp.asarray(target))
    assert np.abs(released).max() > 1e-3  # the extra term has its gradient there


@pytest.mark.parametrize("form", ["released", "debiased"])
def test_nearer_tokens_cost_less(form):
    """The student's mass on a token beside the teacher's, and on one far from it."""
    settings = Transport(form=form, epsilon=0.1, neighbours=1, alpha=-1.0, iterations=50)
    x = jnp.array([[1, 0], [0.99, 0.1], [-1, 0], [-0.99, 0.1]], jnp.float32)
    kernel = token_kernel(x, settings)
    target = jnp.log(jnp.array([0.97, 0.01, 0.01, 0.01]))
    near, far = (
        jnp.log(jnp.array(q)) for q in ([0.01, 0.97, 0.01, 0.01], [0.01, 0.01, 0.97, 0.01])
    )
    assert 5 * transport(target, near, kernel, settings) < transport(target, far, kernel, settings)


@pytest.mark.parametrize("form", ["released", "debiased"])
def test_impossible_tokens_give_finite_values_and_gradients(form):
    settings = Transport(form=form, epsilon=0.3, neighbours=5)
    kernel, (target, learner) = token_kernel(jnp.asarray(embeddings()), settings), pair(30.0)
    target[:, 1] = learner[:, 1] = target[:, 2] = learner[:, 3] = -np.inf
    whole = jax.value_and_grad(lambda x: transport(target, x, kernel, settings).sum())
    value, slope = whole(learner)
    assert np.isfinite(value) and np.isfinite(slope).all()
    assert (slope[np.isneginf(learner)] == 0).all()


def test_the_chunked_loss_is_the_dense_one():
    rng = np.random.default_rng(2)

    def linear(width):
        return LazyLogits(
            *(
                jnp.asarray(rng.normal(0, 1, s), jnp.float32)
                for s in ((2, 5, width), (TOKENS, width))
            )
        )

    q, p, mask = linear(3), linear(4), jnp.array([[1, 1, 0, 1, 1], [0, 1, 1, 0, 0]])
    kernel = token_kernel(jnp.asarray(embeddings()), WIDE)

    def term(target, learner):
        return transport(*target[:1], learner, target[1], WIDE)

    def chunked(q):
        return linear_loss([term, losses.reverse_kl], q, [(p, kernel), p], mask, chunk=2)[0]

    def dense(q):
        both = (
            transport(p.logits(), q.logits(), kernel, WIDE),
            losses.reverse_kl(p.logits(), q.logits()),
        )
        return (mask * sum(both)).sum()

    found, right = (jax.value_and_grad(f)(q) for f in (chunked, dense))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, right)
    with pytest.raises(ValueError, match=r"a kernel of 4 tokens, the learner has 23"):
        linear_loss([term], q, [(p, token_kernel(jnp.eye(4), WIDE))], mask)


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.grad, argnums=1)
def dense_step(settings, student, teacher, kernel, rows):
    logits = seen.__wrapped__  # whose compiler options are of a program by itself
    q, p = logits(STUDENT, student, rows.tokens), logits(TEACHER, teacher, rows.tokens)
    mask = supervised(rows)
    return 2 * (mask * transport(p, q / 2, kernel, settings)).sum() / mask.sum()


def test_a_step_with_the_students_temperature():
    settings = Transport(epsilon=0.5, neighbours=3)
    method = plain(student_terms=(("transport", 1.0),), student_temperature=2.0, transport=settings)
    table = TEACHER.input_embeddings(params_of_teacher(), np.arange(VOCABULARY))
    kernel, before = token_kernel(table, settings), begin()
    assert kernel.num_tokens == VOCABULARY
    after, _ = update(in_parts(method, 2), before, kernel=kernel)
    expected = dense_step(settings, before.student, params_of_teacher(), kernel, batch())
    assert_close(gradient(after), expected)
    with pytest.raises(ValueError, match=r"transport: train_step needs token_kernel="):
        update(method, before)
