"""Divergences are what their formulas say, and the chunked loss is the dense one."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny import equations

from promptkd_jax.data.top_k import TopK, log_sum_of_others
from promptkd_jax.distill.losses import chunked_loss, losses
from promptkd_jax.distill.losses import divergence as names
from promptkd_jax.distill.losses.chunked_loss import linear_loss, linear_values
from promptkd_jax.distill.losses.divergence import (
    DIVERGENCES,
    DivergenceName,
    divergence,
    needs_whole,
)
from promptkd_jax.infra.specs import Float
from promptkd_jax.models.language_model import LazyLogits

SHAPE = (3, 5, 13)
SPECS = (
    *DIVERGENCES,
    "skew_forward_kl(0.7)",
    "skew_reverse_kl(0.7)",
    "jensen_shannon(0.2)",
    "alpha_beta(1, 0)",
    "alpha_beta(0.5, 0)",
    "alpha_beta(0, 1)",
    "alpha_beta(0, 0.5)",
    "alpha_beta(0, 0)",
    "alpha_beta(0.6, -0.6)",
    "alpha_beta(1.5, -0.4)",
)
# With other parameters, for the tests of formulas alone.
FORMULAS = (
    *SPECS,
    "mixed_learner(reverse_kl, 3, 0.3)",
    "mixed_learner(forward_kl, 1, 0.3)",
    "mixed_target(reverse_kl, -5, 0.3, True)",
    "akl(0.9)",
    "csd(target, learner, 1)",
    "csd(uniform, learner)",
)
MIXTURE = "mixed_learner(forward_kl, -1, 0.3)"
# Those that a cached teacher goes with.
BUCKETED = [x for x in (*SPECS, MIXTURE) if not needs_whole(divergence(x))]


def logits(seed: int, shape=SHAPE, scale: float = 3.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


@functools.cache
def pair() -> tuple[np.ndarray, np.ndarray]:
    """Logits of a target and of a learner."""
    return logits(0), logits(1)


def gentle_pair() -> tuple[np.ndarray, np.ndarray]:
    """Without very small probabilities, at which limits are approached slowly."""
    return logits(0, scale=1.0), logits(1, scale=1.0)


# Plain definitions in float64


def probabilities(x) -> np.ndarray:
    x = np.asarray(x, np.float64)
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def kl(p, q):
    return (p * np.log(p / q)).sum(axis=-1)


def skew_forward(p, q, skew=0.1):
    return kl(p, skew * p + (1 - skew) * q)


def skew_reverse(p, q, skew=0.1):
    return kl(q, (1 - skew) * p + skew * q)


def jensen_shannon(p, q, beta=0.5):
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def alpha_beta(p, q, alpha=0.2, beta=0.7):
    order, ratio = alpha + beta, p / q
    if alpha == 0 and beta == 0:
        terms = np.log(ratio) ** 2 / 2
    elif beta == 0:
        terms = (p**alpha * np.log(ratio**alpha) - p**alpha + q**alpha) / alpha**2
    elif alpha == 0:
        terms = (q**beta * np.log(ratio**-beta) - q**beta + p**beta) / beta**2
    elif order == 0:
        terms = (np.log(ratio**-alpha) + ratio**alpha - 1) / alpha**2
    else:
        terms = -(p**alpha * q**beta - alpha / order * p**order - beta / order * q**order)
        terms = terms / (alpha * beta)
    return terms.sum(axis=-1)


def mixture(p, q, alpha, share):
    """AMiD's assistant; at alpha = 1 the geometric mean is the limit of power means."""
    e = (1 - alpha) / 2
    m = p**share * q ** (1 - share)
    if e:
        m = (share * p**e + (1 - share) * q**e) ** (1 / e)
    return m / m.sum(axis=-1, keepdims=True)


def mixed_learner(p, q, outer="alpha_beta", alpha=0.5, share=0.5):
    return DEFINITIONS[outer](p, mixture(p, q, alpha, share))


def mixed_target(p, q, outer="alpha_beta", alpha=0.5, share=0.5, held=False, at=None):
    """Here and below, `at` is the learner that what is held was made of."""
    return DEFINITIONS[outer](mixture(p, q if at is None or not held else at, alpha, share), q)


def todi(p, q, at=None):
    s = 1 / (1 + np.exp(-np.log(p / (q if at is None else at))))
    return (s * p * np.log(p / q) + (1 - s) * q * np.log(q / p)).sum(axis=-1)


def akl(p, q, mass=0.5, at=None):
    """Token by token, as in the published code: the likeliest until they reach the mass."""
    values = np.empty(p.shape[:-1])
    for place in np.ndindex(p.shape[:-1]):
        order = np.argsort(-p[place])
        number = 1 + int(np.sum(np.cumsum(p[place][order]) < mass))
        gap = np.abs(p - (q if at is None else at))[place][order]
        h = gap[:number].sum() / gap.sum()
        values[place] = h * kl(p, q)[place] + (1 - h) * kl(q, p)[place]
    return values


def csd(p, q, first="learner", second="learner", temperature=1.5, at=None):
    def weights(name):
        w = {"learner": q if at is None else at, "target": p, "uniform": np.ones_like(q)}[name] ** (
            1 / temperature
        )
        return w / w.sum(axis=-1, keepdims=True)

    d = np.log(q / p)
    pairs = (d[..., :, None] - d[..., None, :]) ** 2
    return np.einsum("...x,...y,...xy->...", weights(first), weights(second), pairs) / 4


DEFINITIONS = {
    "forward_kl": kl,
    "reverse_kl": lambda p, q: kl(q, p),
    "soft_cross_entropy": lambda p, q: -(p * np.log(q)).sum(axis=-1),
    "skew_forward_kl": skew_forward,
    "skew_reverse_kl": skew_reverse,
    "jensen_shannon": jensen_shannon,
    "alpha_beta": alpha_beta,
    "total_variation": lambda p, q: np.abs(p - q).sum(axis=-1) / 2,
    "todi": todi,
    "akl": akl,
    "csd": csd,
    "mixed_learner": mixed_learner,
    "mixed_target": mixed_target,
}


def test_every_divergence_has_a_definition_here():
    assert DEFINITIONS.keys() == DIVERGENCES.keys()


def definition(spec: str):
    """The definition at the parameters that `spec` names."""
    name, _, rest = spec.partition("(")
    given = [x.strip() for x in rest.rstrip(")").split(",")] if rest else []
    given = [{"True": True}.get(x, x) if x[0].isalpha() else float(x) for x in given]
    return lambda p, q, **held: DEFINITIONS[name](p, q, *given, **held)


@pytest.mark.parametrize("spec", FORMULAS)
@pytest.mark.parametrize("shape", [SHAPE, (1, 2), (7,)])
def test_divergence_equals_its_definition(spec, shape):
    target, learner = logits(2, shape), logits(3, shape)
    expected = definition(spec)(probabilities(target), probabilities(learner))
    found = divergence(spec)(target, learner)
    assert found.shape == shape[:-1] and found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)


def test_cross_entropy_entropy_and_agreement_equal_their_definitions():
    target, learner = pair()
    p, q = probabilities(target), probabilities(learner)
    labels = np.random.default_rng(4).integers(0, SHAPE[-1], SHAPE[:-1])
    expected = -np.log(np.take_along_axis(q, labels[..., None], axis=-1)[..., 0])
    np.testing.assert_allclose(losses.cross_entropy(labels, learner), expected, rtol=1e-5)
    np.testing.assert_allclose(losses.entropy(target), -(p * np.log(p)).sum(-1), rtol=1e-5)
    both = target + learner
    same = p.argmax(-1) == both.argmax(-1)
    assert 0 < same.mean() < 1
    np.testing.assert_array_equal(losses.agreement(target, both), same)


def test_a_token_that_is_among_the_largest_of_both_is_agreed_on():
    target = jnp.array([[1.0, 1.0, 0.0]] * 3)
    learner = jnp.array([[0.0, 2.0, 0.0], [0.0, 0.0, 2.0], [1.0, 0.0, 1.0]])
    np.testing.assert_array_equal(losses.agreement(target, learner), [1, 0, 1])


# Limits and relations


@pytest.mark.parametrize("name, limit", [("skew_forward_kl", 0), ("skew_reverse_kl", 1)])
def test_no_skew_is_the_kl(name, limit):
    target, learner = gentle_pair()
    kl = (losses.forward_kl, losses.reverse_kl)[limit](target, learner)
    for skew, tolerance in ((0.0, 1e-6), (1e-5, 1e-3)):
        found = DIVERGENCES[name](target, learner, skew=skew)
        np.testing.assert_allclose(found, kl, rtol=tolerance, atol=1e-6)
    assert np.abs(DIVERGENCES[name](target, learner, skew=1.0)).max() < 1e-6


def test_jensen_shannon_tends_to_both_kls():
    target, learner = gentle_pair()
    forward, reverse = losses.forward_kl(target, learner), losses.reverse_kl(target, learner)
    assert np.abs(forward - reverse).max() > 0.2  # else the two limits could not be told apart
    small = 1e-4
    first = losses.jensen_shannon(target, learner, beta=small) / small
    last = losses.jensen_shannon(target, learner, beta=1 - small) / small
    np.testing.assert_allclose(first, forward, rtol=2e-2)
    np.testing.assert_allclose(last, reverse, rtol=2e-2)


def test_jensen_shannon_is_symmetric_and_at_most_ln_2():
    target, learner = pair()
    there, back = (losses.jensen_shannon(*x) for x in ((target, learner), (learner, target)))
    np.testing.assert_allclose(there, back, rtol=1e-5)
    apart = losses.jensen_shannon(np.array([0.0, 40.0]), np.array([40.0, 0.0]))
    assert there.max() <= math.log(2)
    np.testing.assert_allclose(apart, math.log(2), rtol=1e-6)


def test_alpha_beta_has_the_kls_at_its_corners():
    target, learner = pair()
    found = losses.alpha_beta(target, learner, 1, 0)
    np.testing.assert_allclose(found, losses.forward_kl(target, learner), rtol=1e-5)
    found = losses.alpha_beta(target, learner, 0, 1)
    np.testing.assert_allclose(found, losses.reverse_kl(target, learner), rtol=1e-5)


@pytest.mark.parametrize("at", [(1, 0), (0.5, 0), (0, 1), (0, 0.5), (0.5, -0.5), (0, 0)])
def test_alpha_beta_is_continuous_at_its_special_cases(at):
    """From all four sides, as near as float32 can tell the difference of its two sums."""
    target, learner = pair()
    exact = losses.alpha_beta(target, learner, *at)
    step = 0.02 if at == (0, 0) else 1e-3
    for sides in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
        alpha, beta = (x + step * side * d for x, side, d in zip(at, sides, (0.9, 1.1)))
        near = losses.alpha_beta(target, learner, alpha, beta)
        np.testing.assert_allclose(near, exact, rtol=20 * step)


@pytest.mark.parametrize("spec", FORMULAS)
def test_gradients_are_differences_of_the_definition(spec):
    """Along one direction, in float64, with what is held as it was."""
    (target, learner), way = gentle_pair(), logits(4, scale=1.0).astype(np.float64)
    p, q = probabilities(target), probabilities(learner)
    held = {"at": q} if spec.startswith(("todi", "akl", "csd", "mixed_target")) else {}
    there, back = (
        definition(spec)(p, probabilities(learner + step * way), **held).sum()
        for step in (1e-5, -1e-5)
    )
    slope = jax.grad(lambda x: divergence(spec)(target, x).sum())(learner)
    np.testing.assert_allclose((slope * way).sum(), (there - back) / 2e-5, rtol=2e-4)


def test_mixtures_are_the_skew_divergences():
    target, learner = pair()
    for mixed, skewed in (
        ("mixed_learner(forward_kl, -1, 0.1)", losses.skew_forward_kl),
        ("mixed_target(reverse_kl, -1, 0.9)", losses.skew_reverse_kl),
    ):
        found, right = (
            jax.value_and_grad(lambda x, f=f: f(target, x).sum())(learner)
            for f in (divergence(mixed), skewed)
        )
        np.testing.assert_allclose(found[0], right[0], rtol=1e-5)
        np.testing.assert_allclose(found[1], right[1], atol=1e-5)


@pytest.mark.parametrize("alpha", [-5, -1, 0.5, 1, 3])
def test_a_mixture_of_one_alone_is_that_one(alpha):
    target, learner = gentle_pair()
    for outer in (losses.reverse_kl, losses.alpha_beta):
        right = outer(target, learner)
        for f, of_learner in ((losses.mixed_learner, 0), (losses.mixed_target, 1)):
            for share, value in ((1e-6, of_learner == 0), (1 - 1e-6, of_learner == 1)):
                found = f(target, learner, outer, alpha, share)
                np.testing.assert_allclose(found, right * value, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("alpha", [1.0, 0.8, 1.2])  # the geometric mean, and another formula beyond
def test_mixtures_are_continuous_in_alpha(alpha):
    target, learner = pair()
    below, at, above = (
        losses.mixed_learner(target, learner, losses.forward_kl, alpha + step, 0.3)
        for step in (-1e-5, 0, 1e-5)
    )
    np.testing.assert_allclose(below, at, rtol=1e-3)
    np.testing.assert_allclose(above, at, rtol=1e-3)


def test_a_mixture_is_possible_where_either_is_or_both_are():
    half, none = np.log(0.5), -np.inf
    log_p, log_q = np.array([[half, half, none, none], [none, half, half, none]], np.float32)
    for alpha, possible in ((-1, 3), (0.9, 3), (1, 1), (1.1, 1), (3, 1)):
        found = names.log_mixture(log_p, log_q, 0.5, alpha)
        assert np.isfinite(found).sum() == possible and np.isneginf(found).sum() == 4 - possible
        assert np.isfinite(found[1])
        for share, right in ((0.0, log_q), (1.0, log_p)):  # TAID's target, in the end
            found = names.log_mixture(log_p, log_q, share, alpha)
            np.testing.assert_allclose(found, right, atol=1e-6)


def test_todi_has_the_value_of_both_kls_and_csd_the_gradient_of_one():
    target, learner = pair()
    both = losses.forward_kl(target, learner) + losses.reverse_kl(target, learner)
    np.testing.assert_allclose(losses.todi(target, learner), both, rtol=1e-5)
    slopes = [
        jax.grad(lambda x, spec=spec: divergence(spec)(target, x).sum())(learner)
        for spec in ("csd(learner, learner, 1)", "reverse_kl", "csd")
    ]
    np.testing.assert_allclose(slopes[0], slopes[1], atol=1e-5)
    assert np.abs(slopes[2] - slopes[1]).max() > 0.1  # at another temperature it is another one


def test_akl_is_forward_kl_where_the_head_is_wrong_and_reverse_kl_where_the_tail_is():
    target = np.log(np.array([0.6, 0.2, 0.2]))
    for learner, right in (([0.6, 0.1, 0.3], losses.reverse_kl), ([0.4, 0.2, 0.4], None)):
        learner = np.log(np.array(learner))
        both = [f(target, learner) for f in (losses.forward_kl, losses.reverse_kl)]
        expected = both[1] if right else 0.5 * sum(both)
        np.testing.assert_allclose(losses.akl(target, learner), expected, rtol=1e-5)


def test_each_of_both_may_have_a_temperature_of_its_own():
    target, learner = pair()
    found = losses.tempered(losses.forward_kl, 1.0, 2.0)(target, learner)
    np.testing.assert_allclose(found, 2 * losses.forward_kl(target, learner / 2), rtol=1e-6)
    found = losses.tempered(losses.forward_kl, 2.0)(target, learner)
    np.testing.assert_allclose(found, 4 * losses.forward_kl(target / 2, learner / 2), rtol=1e-6)
    assert losses.tempered(losses.forward_kl, 1.0) is losses.forward_kl


def test_soft_cross_entropy_is_forward_kl_plus_entropy_with_the_same_gradient():
    target, learner = pair()
    expected = losses.forward_kl(target, learner) + losses.entropy(target)
    np.testing.assert_allclose(losses.soft_cross_entropy(target, learner), expected, rtol=1e-5)
    gradients = [
        jax.grad(lambda x, f=f: f(target, x).sum())(learner)
        for f in (losses.soft_cross_entropy, losses.forward_kl)
    ]
    np.testing.assert_allclose(*gradients, atol=1e-6)


def test_bounds():
    target, learner = pair()
    target, learner = 10 * target, 10 * learner
    variation = losses.total_variation(target, learner)
    assert variation.min() >= 0 and 0.99 < variation.max() <= 1 + 1e-6
    for name in ("skew_forward_kl", "skew_reverse_kl"):
        for skew in (0.05, 0.1, 0.5):
            found = DIVERGENCES[name](target, learner, skew=skew)
            assert 0.99 * math.log(1 / skew) < found.max() <= math.log(1 / skew) + 1e-5


@pytest.mark.parametrize("spec", SPECS)
def test_no_divergence_from_itself(spec):
    target, _ = pair()
    value, gradient = jax.value_and_grad(lambda x: divergence(spec)(target, x).sum())(target)
    if spec == "soft_cross_entropy":
        np.testing.assert_allclose(value, losses.entropy(target).sum(), rtol=1e-6)
    else:
        assert abs(value) < 1e-5
    assert np.abs(gradient).max() < 1e-6


@pytest.mark.parametrize("spec", SPECS)
def test_not_negative_and_unmoved_by_constants(spec):
    target, learner = pair()
    found = divergence(spec)(target, learner)
    assert found.min() > 0
    shift = logits(5, (*SHAPE[:-1], 1))
    moved = divergence(spec)(target + shift, learner - 2 * shift)
    np.testing.assert_allclose(moved, found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spec", SPECS)
def test_half_precision_logits_are_computed_in_float32(spec):
    target, learner = (jnp.asarray(x, jnp.bfloat16) for x in pair())
    found = divergence(spec)(target, learner)
    exact = divergence(spec)(target.astype(jnp.float32), learner.astype(jnp.float32))
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, exact)


# Impossible tokens and broken models


def with_holes() -> tuple[np.ndarray, np.ndarray]:
    """-inf in the target, in the learner and in both."""
    target, learner = (x.copy() for x in pair())
    target[0, :, 1] = learner[0, :, 1] = -np.inf
    target[1, :, 2] = -np.inf
    learner[2, :, 3] = -np.inf
    return target, learner


@pytest.mark.parametrize("spec", [*FORMULAS, "skew_forward_kl(0.001)", "jensen_shannon(0.001)"])
def test_impossible_tokens_give_finite_values_and_gradients(spec):
    target, learner = with_holes()
    value, gradient = jax.value_and_grad(lambda x: divergence(spec)(target, x).sum())(learner)
    assert np.isfinite(value) and np.isfinite(gradient).all()
    assert (gradient[np.isneginf(learner)] == 0).all()


@pytest.mark.parametrize("spec", [s for s in SPECS if s != "soft_cross_entropy"])
def test_a_token_impossible_for_both_does_not_count(spec):
    target, learner = (x[0] for x in with_holes())
    without = [np.delete(x, 1, axis=-1) for x in (target, learner)]
    found = divergence(spec)(target, learner)
    np.testing.assert_allclose(found, divergence(spec)(*without), rtol=1e-5, atol=1e-6)
    assert np.abs(divergence(spec)(target, target)).max() < 1e-5


def test_alpha_beta_has_the_kls_at_its_corners_with_impossible_tokens_too():
    target, learner = with_holes()
    for corner, kl in (((1, 0), losses.forward_kl), ((0, 1), losses.reverse_kl)):
        found = losses.alpha_beta(target, learner, *corner)
        np.testing.assert_allclose(found, kl(target, learner), rtol=1e-4)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("broken", [0, 1])
def test_nan_logits_do_not_look_like_a_finite_loss(spec, broken):
    arrays = [x.copy() for x in pair()]
    arrays[broken][0, 0, 0] = np.nan
    found = divergence(spec)(*arrays)
    assert np.isnan(found[0, 0]) and np.isfinite(found[0, 1:]).all()


# Names


def test_divergence_by_name():
    target, learner = pair()
    assert divergence("reverse_kl") is losses.reverse_kl
    spec = "alpha_beta(0.3, 0.9)"
    assert divergence(spec) is divergence(spec)  # or jax.jit would compile anew
    found = divergence(spec)(target, learner)
    np.testing.assert_array_equal(found, losses.alpha_beta(target, learner, 0.3, 0.9))
    found = divergence("alpha_beta(0.3)")(target, learner)
    np.testing.assert_array_equal(found, losses.alpha_beta(target, learner, alpha=0.3))


@pytest.mark.parametrize(
    "spec, says",
    [
        ("kl", "unknown divergence 'kl'; there are: .*, forward_kl, reverse_kl"),
        ("", "unknown divergence ''"),
        ("cross_entropy", "unknown divergence"),
        ("reverse_kl(1)", r"its parameters are \(\), got \(1,\)"),
        ("alpha_beta(1, 2, 3)", r"its parameters are \(alpha, beta\), got \(1, 2, 3\)"),
        ("alpha_beta('x')", "alpha: 'x' is not a number"),
        ("alpha_beta()", r"its parameters are \(alpha, beta\), got \(\)"),
        ("jensen_shannon(beta)", "expected jensen_shannon"),
        ("jensen_shannon(0.5", "expected jensen_shannon"),
        ("jensen_shannon(0.5))", "expected jensen_shannon"),
        ("jensen_shannon(1.5)", "beta: 1.5 is not < 1"),
        ("skew_forward_kl(-0.1)", "skew: -0.1 is not > 0"),
        ("reverse_kl(", "expected reverse_kl"),
        ("reverse_kl() + todi()", "expected reverse_kl"),
        (
            "mixed_learner(kl, 1)",
            "outer: 'kl' is not a divergence such as .*unknown divergence 'kl'",
        ),
        ("mixed_learner(alpha_beta('x'))", "outer: .*alpha: 'x' is not a number"),
        ("mixed_learner(reverse_kl, shares=1)", "its parameters are .*and {'shares': 1}"),
        ("mixed_learner(reverse_kl, outer=todi)", "its parameters are"),
        ("mixed_target(reverse_kl, 1, 1)", "share: 1 is not < 1"),
        ("csd(teacher)", "first: 'teacher' is not one of 'learner', 'target', 'uniform'"),
    ],
)
def test_wrong_names_are_told_what_would_be_right(spec, says):
    with pytest.raises(ValueError, match=says) as error:
        divergence(spec)
    assert repr(spec) in str(error.value)


# The chunked loss

ROWS, LENGTH, VOCABULARY, WIDTH, TEACHER_WIDTH = 2, 7, 29, 6, 9
TERMS = (*DIVERGENCES.values(), losses.cross_entropy)


@functools.cache
def problem():
    """A learner, a teacher, labels and a mask with holes."""
    rng = np.random.default_rng(6)

    def linear(width):
        hidden = rng.normal(0, 1, (ROWS, LENGTH, width))
        head = rng.normal(0, 1, (VOCABULARY, width))
        return LazyLogits(jnp.asarray(hidden, jnp.float32), jnp.asarray(head, jnp.float32))

    labels = rng.integers(0, VOCABULARY, (ROWS, LENGTH))
    mask = np.array([[1, 1, 0, 1, 0.5, 0, 1], [0, 0, 1, 1, 1, 0, 0]], np.float32)
    return linear(WIDTH), linear(TEACHER_WIDTH), labels, mask


def targets():
    _, teacher, labels, _ = problem()
    return [teacher] * len(DIVERGENCES) + [labels]


def observations(references, learner):
    return losses.forward_kl(references[0].astype(jnp.float32), learner)


def dense(learner, weights):
    """The definition: `(loss, sums)` from whole arrays of logits."""
    _, teacher, labels, mask = problem()
    references = [teacher.logits()] * len(DIVERGENCES) + [labels]
    own = learner.logits()
    sums = jnp.stack([(mask * f(t, own)).sum() for f, t in zip(TERMS, references)])
    observed = jnp.stack([(mask * observations(references, own)).sum()])
    return sums @ weights, jnp.concatenate([sums, observed])


def each_term(loss):
    """`loss` with every term alone, then with all of them: values, sums and gradients."""
    weights = jnp.concatenate([jnp.eye(len(TERMS)), jnp.linspace(0.3, 2, len(TERMS))[None]])
    one = jax.value_and_grad(loss, has_aux=True)
    return jax.jit(lambda learner: jax.lax.map(lambda w: one(learner, w), weights))(problem()[0])


@functools.cache
def expected():
    return each_term(dense)


@pytest.mark.parametrize("chunk", [1, 3, LENGTH, 100, None])
def test_linear_loss_is_the_dense_loss(chunk):
    """For every divergence; under jit, inside of a scan, with traced weights."""

    def chunked(learner, weights):
        return linear_loss(
            TERMS, learner, targets(), problem()[3], weights, observe=[observations], chunk=chunk
        )

    (value, sums), gradient = each_term(chunked)
    (right_value, right_sums), right_gradient = expected()
    np.testing.assert_allclose(value, right_value, rtol=1e-5)
    np.testing.assert_allclose(sums, right_sums, rtol=1e-5)
    assert np.abs(right_gradient.hidden).max(axis=(1, 2, 3)).min() > 1e-2
    np.testing.assert_allclose(gradient.hidden, right_gradient.hidden, atol=1e-5)
    np.testing.assert_allclose(gradient.head, right_gradient.head, atol=1e-5)


def test_soft_caps_bound_the_logits_of_both_models():
    learner, teacher, _, mask = problem()

    def capped(model, cap):
        return cap * jnp.tanh(jnp.einsum("btd,vd->btv", model.hidden, model.head) / cap)

    def dense(learner):
        return (mask * losses.reverse_kl(capped(teacher, 3.0), capped(learner, 1.5))).sum()

    def chunked(learner):
        target = teacher.replace(soft_cap=3.0)
        return linear_loss([losses.reverse_kl], learner.replace(soft_cap=1.5), [target], mask)[0]

    expected, right = jax.jit(jax.value_and_grad(dense))(learner)
    found, gradient = jax.jit(jax.value_and_grad(chunked))(learner)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), gradient, right)
    likeliest = chunked_loss.top_k(teacher.replace(soft_cap=3.0), 1).log_probs
    expected = jax.nn.log_softmax(capped(teacher, 3.0)).max(-1, keepdims=True)
    np.testing.assert_allclose(likeliest, expected, rtol=1e-5)


def kl_loss(learner, **more):
    _, teacher, _, mask = problem()
    return linear_loss([losses.reverse_kl], learner, [teacher], mask, chunk=3, **more)


def test_the_loss_without_a_gradient_is_the_same_and_weights_default_to_1():
    value, sums = kl_loss(problem()[0])
    term = TERMS.index(losses.reverse_kl)
    np.testing.assert_allclose(value, expected()[0][0][term], rtol=1e-5)
    np.testing.assert_allclose(sums, [value], rtol=1e-6)


def test_gradients_follow_what_the_loss_is_multiplied_with():
    gradient = jax.jit(jax.grad(lambda x, times: times * kl_loss(x)[0]))
    once, thrice = (gradient(problem()[0], times) for times in (1.0, 3.0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(3 * a, b, rtol=1e-6), once, thrice)


def test_sums_targets_mask_and_weights_carry_no_gradient():
    learner, teacher, _, mask = problem()

    def loss(learner, teacher, mask, weights):
        return linear_loss([losses.reverse_kl], learner, [teacher], mask, weights, chunk=3)

    constants = jax.grad(lambda *c: loss(learner, *c)[0], argnums=(0, 1, 2))(
        teacher, jnp.asarray(mask), jnp.ones(1)
    )
    assert all((x == 0).all() for x in jax.tree.leaves(constants))
    through_sums = jax.grad(lambda x: loss(x, teacher, mask, jnp.ones(1))[1].sum())(learner)
    assert all((x == 0).all() for x in jax.tree.leaves(through_sums))


def test_observations_do_not_change_the_gradient():
    learner, teacher, _, mask = problem()

    def loss(learner, observe):
        terms = [losses.reverse_kl, losses.forward_kl]
        return linear_loss(terms, learner, [teacher] * 2, mask, observe=observe, chunk=3)

    def observe(references, own):
        return losses.total_variation(references[1], own)

    gradient, sums = jax.grad(loss, has_aux=True)(learner, [observe])
    plain, _ = jax.grad(loss, has_aux=True)(learner, [])
    jax.tree.map(np.testing.assert_array_equal, gradient, plain)
    found = (losses.total_variation(teacher.logits(), learner.logits()) * mask).sum()
    np.testing.assert_allclose(sums[2], found, rtol=1e-5)


def test_a_tied_embedding_gets_the_gradients_of_both_uses():
    _, teacher, labels, mask = problem()

    def hidden(embedding):
        return jnp.tanh(embedding[labels])

    def chunked(embedding):
        learner = LazyLogits(hidden(embedding), embedding)
        return linear_loss([losses.reverse_kl], learner, [teacher], mask, chunk=3)[0]

    def whole(hidden, head):
        own = LazyLogits(hidden, head).logits()
        return (mask * losses.reverse_kl(teacher.logits(), own)).sum()

    embedding = problem()[0].head
    found = jax.jit(jax.grad(chunked))(embedding)
    expected = jax.jit(jax.grad(lambda e: whole(hidden(e), e)))(embedding)
    as_head_only = jax.jit(jax.grad(lambda e: whole(hidden(embedding), e)))(embedding)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(expected - as_head_only).max() > 0.1


def test_half_precision_gradients_have_the_dtypes_of_what_they_belong_to():
    learner = problem()[0]
    half = LazyLogits(learner.hidden.astype(jnp.bfloat16), learner.head)
    of_kl = jax.jit(jax.grad(lambda x: kl_loss(x)[0]))
    gradient, exact = of_kl(half), of_kl(learner)
    assert (gradient.hidden.dtype, gradient.head.dtype) == (jnp.bfloat16, jnp.float32)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=0.1), gradient, exact)


def test_terms_and_targets_must_be_as_many():
    learner, teacher, _, mask = problem()
    with pytest.raises(ValueError, match="2 terms need as many targets, got 1"):
        linear_loss([losses.reverse_kl] * 2, learner, [teacher], mask)
    with pytest.raises(ValueError, match="no terms; expected at least one"):
        linear_loss([], learner, [teacher], mask, observe=[lambda targets, logits: logits[..., 0]])
    with pytest.raises(ValueError, match="2 functions need as many targets, got 1"):
        linear_values([losses.reverse_kl] * 2, learner, [teacher])


# What does not belong together


def shortened(x, axis: int):
    """The same without the last row (0) or position (1)."""
    return x[:-1] if axis == 0 else x[:, :-1]


def top_k(k: int = 4) -> TopK:
    """The teacher's k largest log-probabilities, and its tail."""
    everything = losses.log_probs(problem()[1].logits())
    values, ids = jax.lax.top_k(everything, k)
    tail = np.log1p(-np.exp(np.asarray(values, np.float64)).sum(-1))
    return TopK(ids, values, jnp.asarray(tail, jnp.float32))


def mismatches() -> dict:
    """Arguments of `linear_loss` beside the terms, and what is said of them."""
    learner, teacher, labels, mask = problem()
    transposed = learner.replace(head=learner.head.T)
    wider = teacher.replace(head=jnp.pad(teacher.head, ((0, 3), (0, 0))))
    cases = {
        "head [D, V]": ((transposed, [teacher], mask), r"learner: .*\[V, 6\]; it is stored"),
        "head of another width": (
            (learner.replace(head=teacher.head), [teacher], mask),
            r"learner: hidden states of width 6 and a head \[29, 9\]; expected \[V, 6\]",
        ),
        "teacher's head [D, V]": (
            (learner, [teacher.replace(head=teacher.head.T)], mask),
            r"targets\[0\]: .* transpose it",
        ),
        "padded vocabulary": (
            (learner, [teacher, wider], mask),
            r"targets\[1\]: a vocabulary of 32, the learner's has 29; .* head\[:vocab_size\]",
        ),
        "bare target": ((learner, teacher, mask), r"targets: a bare LazyLogits; .* \[target\]"),
        "bare labels": ((learner, labels, mask), "targets: a bare array"),
        "bare cache": ((learner, top_k(), mask), "targets: a bare TopK"),
        "logits": ((teacher.logits(), [teacher], mask), r"expected LazyLogits\(hidden, head\)"),
        "no rows": (
            (learner.replace(hidden=learner.hidden[0]), [teacher], mask),
            r"hidden \[7, 6\] and head \[29, 6\]; expected \[B, T, D\]",
        ),
        "tail": (
            (learner, [top_k()._replace(tail=top_k().tail[..., None])], mask),
            r"a tail \[2, 7, 1\] beside ids \[2, 7, 4\]; expected \[2, 7\]",
        ),
        "more are kept than there are": (
            (learner, [TopK(*(jnp.zeros((2, 7, 30), d) for d in (int, float)))], mask),
            "k at most 29",
        ),
        "weights": ((learner, [teacher], mask, [1.0, 2.0]), r"weights: \[2\]; .* \[1\]"),
    }
    for axis, found in ((0, r"\[1, 7"), (1, r"\[2, 6")):
        says = rf"{found}.* of 2 rows and 7 positions; expected \[2, 7"
        less = teacher.replace(hidden=shortened(teacher.hidden, axis))
        kept = jax.tree.map(functools.partial(shortened, axis=axis), top_k())
        for name, arguments, where in (
            ("mask", (learner, [teacher], shortened(mask, axis)), "mask"),
            ("teacher", (learner, [teacher, less], mask), r"targets\[1\]"),
            ("labels", (learner, [shortened(labels, axis)], mask), r"targets\[0\]"),
            ("cache", (learner, [kept], mask), r"targets\[0\]"),
            ("tree", (learner, [(labels, shortened(mask, axis))], mask), r"targets\[0\]"),
        ):
            cases[f"{name}, axis {axis}"] = arguments, f"{where}: {says}"
    return cases


@pytest.mark.parametrize("name", mismatches())
def test_shapes_that_do_not_belong_together_are_refused_when_traced(name):
    (learner, targets, mask, *weights), says = mismatches()[name]

    def traced(learner, targets, mask):
        return linear_loss([losses.reverse_kl], learner, targets, mask, *weights)

    with pytest.raises(ValueError, match=says):
        jax.eval_shape(traced, learner, targets, mask)
    number = len(targets) if isinstance(targets, list) else 1
    if not name.startswith(("mask", "weights")):
        with pytest.raises(ValueError, match=says):
            linear_values([losses.reverse_kl] * number, learner, targets)


def test_a_function_gives_one_number_for_each_position():
    learner, teacher, _, mask = problem()
    for wrong, found in (
        (lambda t, q: losses.reverse_kl(t, q).mean(), r"\[\]"),
        (lambda t, q: losses.reverse_kl(t, q)[..., None], r"\[2, 7, 1\]"),
    ):
        says = f"gave {found} for 2 rows of 7 positions"
        with pytest.raises(ValueError, match=says):
            linear_values([wrong], learner, [teacher])
        with pytest.raises(ValueError, match="a function gave"):
            linear_loss([wrong], learner, [teacher], mask)
        with pytest.raises(ValueError, match="a function gave"):
            observe = [lambda targets, q, wrong=wrong: wrong(targets[0], q)]
            linear_loss([losses.reverse_kl], learner, [teacher], mask, observe=observe)


@pytest.mark.parametrize("spec", DIVERGENCES)
def test_logits_of_different_vocabularies_are_refused(spec):
    target, learner = pair()
    with pytest.raises(ValueError, match=r"of 13 and 12 tokens; .* \[..., :vocab_size\]"):
        divergence(spec)(target, learner[..., :-1])


def test_logits_in_the_place_of_cached_log_probabilities_are_refused_where_they_can_be_seen():
    learner, teacher, _, mask = problem()
    values, ids = jax.lax.top_k(teacher.logits(), 4)
    with pytest.raises(ValueError, match=r"targets\[0\]: a TopK whose .* log_softmax"):
        linear_loss([losses.forward_kl], learner, [TopK(ids, values)], mask)
    unused = jnp.where(mask[..., None] != 0, top_k().log_probs, 0.0)  # what nothing looks at
    linear_loss([losses.forward_kl], learner, [TopK(ids, unused)], mask)


@pytest.mark.parametrize("array", [jnp.asarray, np.asarray])
@pytest.mark.parametrize("transform", [jax.jit, lambda f: jax.jit(jax.grad(f))])
def test_constants_of_a_compiled_function_are_looked_at_too(transform, array):
    learner, teacher, labels, mask = problem()
    kept, labels, mask = jax.tree.map(array, (top_k(), labels, mask))
    values, ids = jax.tree.map(array, jax.lax.top_k(teacher.logits(), 4))

    def loss(hidden, cached, labels):
        terms = [losses.forward_kl, losses.cross_entropy]
        return linear_loss(terms, LazyLogits(hidden, learner.head), [cached, labels], mask)[0]

    def compiled(cached, labels):
        return transform(lambda hidden: loss(hidden, cached, labels))(learner.hidden)

    right = jax.grad(loss)(learner.hidden, kept, labels)
    if transform is jax.jit:
        right = loss(learner.hidden, kept, labels)
    np.testing.assert_allclose(compiled(kept, labels), right, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="log_softmax"):
        compiled(TopK(ids, values), labels)
    with pytest.raises(ValueError, match=r"targets\[1\]: token 29"):
        compiled(kept, array(labels * 0 + VOCABULARY))


@pytest.mark.parametrize("token", [-100, -7, -1, VOCABULARY])
def test_tokens_that_are_not_in_the_vocabulary_are_refused_where_the_mask_counts_them(token):
    learner, _, labels, mask = problem()
    row, position = 0, 4  # where the mask is 0.5
    says = rf"token {token} at row 0, position 4, .* \[0, 29\), or a mask of 0 there"
    wrong = labels.copy()
    wrong[row, position] = token
    wrong_ids = top_k().ids.at[row, position, 2].set(token)
    for term, target in (
        (losses.cross_entropy, wrong),
        (losses.reverse_kl, top_k()._replace(ids=wrong_ids)),
    ):
        with pytest.raises(ValueError, match=rf"targets\[1\]: {says}"):
            linear_loss([losses.cross_entropy, term], learner, [labels, target], mask)
        mask_without = mask.copy()
        mask_without[row, position] = 0
        linear_loss([term], learner, [target], mask_without)
    linear_loss([lambda t, q: t * q[..., 0]], learner, [wrong], mask)  # are no labels


def test_tokens_of_few_bits_are_as_good():
    learner, _, labels, mask = problem()
    learner = learner.replace(head=jnp.tile(learner.head, (9, 1)))  # V is 261
    terms, cached = [losses.cross_entropy, losses.reverse_kl], top_k()
    cached = cached._replace(log_probs=cached.log_probs.at[..., -1].set(-jnp.inf))  # filler
    few = [labels.astype(np.uint8), cached._replace(ids=cached.ids.astype(np.uint8))]
    found = linear_loss(terms, learner, few, mask)[0]
    assert found == linear_loss(terms, learner, [labels, cached], mask)[0]


def test_a_mask_may_be_a_list():
    learner, _, labels, mask = problem()
    found, right = (
        linear_loss([losses.cross_entropy], learner, [labels], mask)[0]
        for mask in (mask.tolist(), mask)
    )
    assert found == right
    says = r"mask: \[2, 6\]"
    with pytest.raises(ValueError, match=says):
        linear_loss([losses.cross_entropy], learner, [labels], mask[:, 1:].tolist())


@pytest.mark.parametrize(
    "function",
    [
        losses.tempered(losses.forward_kl, 2.0),
        losses.weighted(losses.reverse_kl, "teacher_confidence"),
        losses.weighted(losses.tempered(losses.reverse_kl, 1.0, 2.0), "student_uncertainty"),
    ],
)
def test_a_function_of_whole_distributions_needs_whole_distributions(function):
    learner, teacher, _, mask = problem()
    says = "a TopK of 4 of 29 tokens: it needs the whole distribution"
    assert needs_whole(function)
    with pytest.raises(ValueError, match=says):
        linear_loss([function], learner, [top_k()], mask)
    with pytest.raises(ValueError, match=says):
        linear_values([function], learner, [top_k()])
    found = linear_loss([function], learner, [top_k(VOCABULARY)], mask)[0]
    right = linear_loss([function], learner, [teacher], mask)[0]
    np.testing.assert_allclose(found, right, rtol=1e-4)


# The tail of a cached teacher


SURE = (1, 3, 8)  # kept tokens
TAIL = -40.0  # log-probability of every other one


def sure(kept: int) -> tuple[TopK, np.ndarray]:
    """(cache without its tail, all log-probabilities) of a teacher whose tail float32 cannot tell
    from 0: beside 1, nothing else is larger than e^-30."""
    top = np.array([0.0, *(-30.0 - np.arange(kept - 1))], np.float32)
    whole = np.full(200, TAIL, np.float32)
    whole[:kept] = top
    return TopK(jnp.arange(kept)[None, None], jnp.asarray(top)[None, None]), whole


@functools.partial(jax.jit, static_argnums=0)
def defined(spec: str, whole: np.ndarray, student: np.ndarray):
    """(value, gradient for the student's logits) of the definition."""
    return jax.value_and_grad(divergence(spec), argnums=1)(whole, student)


@functools.partial(jax.jit, static_argnums=0)
def of_one_position(spec: str, target: TopK, student: np.ndarray):
    """(value, gradient for the student's logits), which are a head for hidden states of width 1."""

    def loss(student):
        learner = LazyLogits(jnp.ones((1, 1, 1)), student[:, None])
        return linear_loss([divergence(spec)], learner, [target], jnp.ones((1, 1)))[0]

    return jax.value_and_grad(loss)(student)


@pytest.mark.parametrize("kept", SURE)
@pytest.mark.parametrize("spec", BUCKETED)
def test_a_sure_teacher_whose_tail_is_cached_is_the_dense_one(spec, kept):
    """Teacher and student are uniform within the tail: then its sum says all."""
    cached, whole = sure(kept)
    cached = cached._replace(tail=jnp.full((1, 1), TAIL + np.log(200 - kept), jnp.float32))
    student = np.zeros(200, np.float32)
    value, gradient = of_one_position(spec, cached, student)
    right, slope = defined(spec, whole, student)
    np.testing.assert_allclose(value, right, rtol=1e-5)
    np.testing.assert_allclose(gradient, slope, rtol=1e-3, atol=2e-6 * np.abs(slope).max())


@pytest.mark.parametrize("kept", SURE)
@pytest.mark.parametrize("spec", BUCKETED)
def test_a_sure_teacher_whose_tail_is_not_cached_is_near_the_dense_one(spec, kept):
    """Never with another sign: mass in the tail has to leave it."""
    cached, whole = sure(kept)
    student = np.zeros(200, np.float32)
    value, gradient = of_one_position(spec, cached, student)
    right, slope = defined(spec, whole, student)
    assert (np.sign(gradient[kept:]) == np.sign(slope[kept:])).all()
    assert 0.2 * right < value < 1.001 * right  # the tail stands for more than there is
    if spec == "reverse_kl":
        assert value > 10


@pytest.mark.parametrize("kept", SURE)
@pytest.mark.parametrize("spec", BUCKETED)
def test_a_tail_that_a_user_rounds_to_nothing_is_as_if_not_given(spec, kept):
    cached, _ = sure(kept)
    tail = jnp.log1p(-jnp.exp(jax.nn.logsumexp(cached.log_probs, axis=-1)))
    assert jnp.isneginf(tail).all()
    student = np.zeros(200, np.float32)
    found = of_one_position(spec, cached._replace(tail=tail), student)
    right = of_one_position(spec, cached, student)
    jax.tree.map(np.testing.assert_array_equal, found, right)


@pytest.mark.parametrize("spec", BUCKETED)
def test_no_learner_is_told_to_put_more_into_a_tail_that_rounds_to_nothing(spec):
    """Students from surer than their teacher to less sure: the slope of a tail token is not
    negative. The value is at most the whole one, if that is a sum of q f(p / q)."""
    cached, whole = sure(3)
    cached = cached._replace(tail=jnp.full((1, 1), -jnp.inf))
    for tail in (-90.0, -60.0, -41.0, -35.0, -20.0, -15.0, -5.0):
        student = np.where(np.arange(200) < 3, whole, tail).astype(np.float32)
        value, gradient = of_one_position(spec, cached, student)
        right, slope = defined(spec, whole, student)
        assert gradient[3:].min() >= -1e-7 * max(1.0, np.abs(slope).max()), tail
        if not spec.startswith("alpha_beta"):
            assert value <= right * (1 + 1e-4) + 2e-6, tail


# Not of a power, and not of the target's own entropy, see docs/methods.md.
@pytest.mark.parametrize(
    "spec", [x for x in BUCKETED if not x.startswith(("alpha_beta", "soft_cross_entropy"))]
)
def test_what_is_kept_bounds_the_whole_from_below(spec):
    """Of a teacher that is not sure, and of one whose tail is lost in rounding."""
    for scale, seed in ((1.0, 0), (3.0, 1), (9.0, 2)):
        teacher, student = logits(seed, (200,), scale), logits(seed + 9, (200,), 3.0)
        log_p = losses.log_probs(jnp.asarray(teacher))
        values, ids = jax.lax.top_k(log_p, 4)
        for tail in (None, log_sum_of_others(log_p, ids)[None, None]):
            kept = TopK(ids[None, None], values[None, None], tail)
            found, _ = of_one_position(spec, kept, student)
            right, _ = defined(spec, teacher, student)
            assert found <= right + 1e-5 * max(1.0, abs(right)), (scale, tail)


@pytest.mark.parametrize("filler", [0, 3, 6])
@pytest.mark.parametrize("tail", [None, np.log(0.1)])
def test_filler_of_a_short_list_stands_for_no_token(filler, tail):
    """Whether its id is that of a token that is kept (0 and 3) or not (6), which is of the tail."""
    ids = jnp.array([0, 3, filler, filler])
    log_probs = jnp.array([*np.log([0.7, 0.2]), -np.inf, -np.inf], jnp.float32)
    own = np.random.default_rng(0).normal(0, 1, 7).astype(np.float32)
    right = np.exp(own, dtype=np.float64)
    right[[0, 3]] = 0
    right *= 0.1 / right.sum()
    right[[0, 3]] = 0.7, 0.2
    found = TopK(ids, log_probs, None if tail is None else jnp.float32(tail)).logits(own)
    np.testing.assert_allclose(np.exp(found), right, rtol=1e-5)
    nothing = np.where(np.isin(np.arange(7), [0, 3]), own, -np.inf)
    found = TopK(ids, log_probs, jnp.log(0.1)).logits(nothing)
    np.testing.assert_allclose(np.exp(found), [0.7, *[0.02] * 2, 0.2, *[0.02] * 3], rtol=1e-5)


def test_of_a_short_list_that_could_hold_all_tokens_the_others_have_no_probability():
    log_probs = jnp.array([*np.log([0.7, 0.3]), -np.inf, -np.inf], jnp.float32)
    found = TopK(jnp.array([0, 3, 0, 0]), log_probs).logits(jnp.ones(4))
    np.testing.assert_allclose(np.exp(found), [0.7, 0, 0, 0.3], rtol=1e-6)


@pytest.mark.parametrize("spec", BUCKETED)
def test_the_tail_is_divided_as_the_learner_divides_its_own(spec):
    """So a cached teacher is the dense one whose tail has the student's proportions."""
    learner, _, _, mask = problem()
    cached = top_k(6)
    own = np.asarray(losses.log_probs(learner.logits()), np.float64)
    ids = np.asarray(cached.ids)
    others = own.copy()
    np.put_along_axis(others, ids, -np.inf, axis=-1)
    inside = np.log(np.exp(others).sum(-1, keepdims=True))
    whole = np.asarray(cached.tail, np.float64)[..., None] + own - inside
    np.put_along_axis(whole, ids, np.asarray(cached.log_probs, np.float64), axis=-1)

    def chunked(hidden):
        return linear_loss([divergence(spec)], LazyLogits(hidden, learner.head), [cached], mask)[0]

    def dense(hidden):
        logits = LazyLogits(hidden, learner.head).logits()
        return (mask * divergence(spec)(jnp.asarray(whole, jnp.float32), logits)).sum()

    found, right = (jax.jit(jax.value_and_grad(f))(learner.hidden) for f in (chunked, dense))
    np.testing.assert_allclose(found[0], right[0], rtol=1e-5)
    np.testing.assert_allclose(found[1], right[1], atol=1e-4)


@pytest.mark.parametrize("spec", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_nothing_is_learned_about_the_inside_of_the_tail(spec):
    """A step moves its tokens' probabilities all by the same factor."""
    student, cached = problem()[0].logits()[0, 0], jax.tree.map(lambda x: x[0, 0], top_k(6))
    slope = jax.grad(lambda q: divergence(spec)(cached.logits(q), q))(student)
    by_probability = np.delete(slope / jax.nn.softmax(student), np.asarray(cached.ids))
    np.testing.assert_allclose(by_probability, by_probability[0], rtol=1e-3)
    assert abs(by_probability[0]) > 1e-2


def test_a_student_without_a_tail_leaves_the_teachers_to_all_alike():
    target = TopK(jnp.arange(2), jnp.log(jnp.array([0.5, 0.25])), jnp.log(0.25))
    found = target.logits(jnp.array([1.0, 2.0, *[-jnp.inf] * 5]))
    np.testing.assert_allclose(np.exp(found), [0.5, 0.25, *[0.05] * 5], rtol=1e-6)


def test_the_tail_of_an_unsure_teacher_is_what_the_kept_leave():
    """Here float32 tells it well, and giving it or not is the same."""
    learner, _, _, mask = problem()

    @jax.jit
    def of_every_divergence(target):
        return [
            linear_loss([divergence(x)], learner, [target], mask)[0]
            for x in DIVERGENCES
            if x in BUCKETED
        ]

    given, derived = map(of_every_divergence, (top_k(), top_k()._replace(tail=None)))
    np.testing.assert_allclose(given, derived, rtol=1e-5)


@pytest.mark.parametrize(
    "log_probs, tail",
    [
        (np.log([0.5, 0.25]), np.log(0.25)),
        ([0.0, -30.0], -30 + np.log(198)),  # no other token is likelier than the second
        ([0.0, -1.0], np.log(np.finfo(np.float32).eps)),  # rounded: the sum is above 1
        ([*np.log([0.5, 0.25]), -np.inf, -np.inf], np.log(0.25)),  # a short list, filled up
        ([0.0, -30.0, -np.inf, -np.inf], -30 + np.log(198)),
        ([0.0], np.log(np.finfo(np.float32).eps)),
    ],
)
def test_the_tail_where_it_is_not_given(log_probs, tail):
    target = TopK(jnp.arange(len(log_probs)), jnp.asarray(log_probs, jnp.float32))
    np.testing.assert_allclose(target.tail_below(200), tail, rtol=1e-6)


def test_a_position_outside_of_the_mask_changes_nothing():
    learner, teacher, labels, mask = problem()

    @jax.jit
    @jax.value_and_grad
    def loss(learner):
        return linear_loss(
            [losses.reverse_kl, losses.cross_entropy], learner, [teacher, labels], mask, chunk=3
        )[0]

    other = jnp.where(mask[..., None] > 0, learner.hidden, 100.0)
    value, gradient = loss(learner.replace(hidden=other))
    right, right_gradient = loss(learner)
    np.testing.assert_allclose(value, right, rtol=1e-6)
    assert (gradient.hidden[mask == 0] == 0).all()
    np.testing.assert_allclose(gradient.head, right_gradient.head, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])  # with 7 and 100, a block has both
def test_nan_and_labels_of_minus_100_outside_of_the_mask_change_nothing(chunk):
    learner, teacher, labels, mask = problem()

    def found(broken: bool):
        def marked(x, mark):
            out = np.array(x)
            if broken:
                out[mask == 0] = mark
            return jnp.asarray(out)

        references = [
            teacher.replace(hidden=marked(teacher.hidden, np.nan)),
            marked(labels, -100),
            TopK(marked(top_k().ids, -1), *(marked(x, np.nan) for x in top_k()[1:])),
        ]

        def loss(learner):
            terms = [losses.reverse_kl, losses.cross_entropy, losses.alpha_beta]
            observe = [lambda targets, q: losses.agreement(targets[0], q)]
            return linear_loss(terms, learner, references, mask, observe=observe, chunk=chunk)

        hidden = marked(learner.hidden, np.nan)
        return jax.value_and_grad(loss, has_aux=True)(learner.replace(hidden=hidden))

    jax.tree.map(np.testing.assert_array_equal, found(True), found(False))


# What is not computed


def products(function, *arguments) -> list[tuple[int, ...]]:
    """The sorted shapes of all matrix products in `function`; vectors are not matrices."""

    def of_matrices(equation) -> bool:
        if equation.primitive.name != "dot_general":
            return False
        (summed, _), (batch, _) = equation.params["dimension_numbers"]
        return len(summed) > 0 and equation.outvars[0].aval.ndim > max(len(batch), 1)

    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    found = (equation for equation, _ in equations(jaxpr) if of_matrices(equation))
    return [tuple(sorted(equation.outvars[0].aval.shape)) for equation in found]


def test_no_gradient_of_the_head_where_nobody_asks_for_it():
    learner = problem()[0]

    def loss(hidden, head):
        return kl_loss(LazyLogits(hidden, head))[0]

    of_head = (WIDTH, VOCABULARY)
    assert of_head not in products(jax.grad(loss), learner.hidden, learner.head)
    assert of_head in products(jax.grad(loss, argnums=(0, 1)), learner.hidden, learner.head)
    # Logits of both, and the gradient for the hidden states:
    assert len(products(jax.grad(loss), learner.hidden, learner.head)) == 3


@pytest.mark.parametrize("chunk, blocks", [(1, 8), (2, 4), (6, 2), (7, 2), (8, 1), (None, 1)])
def test_positions_that_do_not_count_fill_no_blocks(chunk, blocks):
    """Of the 14, 8 count."""
    learner, teacher, _, mask = problem()
    seen = []

    def counted(target, logits):
        jax.debug.callback(seen.append, logits.shape[1])
        return losses.reverse_kl(target, logits)

    jax.jit(jax.grad(lambda x: linear_loss([counted], x, [teacher], mask, chunk=chunk)[0]))(learner)
    jax.effects_barrier()
    assert seen == [min(chunk or mask.size, mask.size)] * blocks


def test_nothing_counts():
    learner, teacher, _, mask = problem()
    loss = jax.value_and_grad(lambda x: linear_loss([losses.reverse_kl], x, [teacher], 0 * mask)[0])
    value, gradient = loss(learner)
    assert value == 0 and all(jnp.all(x == 0) for x in jax.tree.leaves(gradient))


def test_no_array_of_all_logits():
    """Temporary memory of value and gradients at 2,048 positions of a vocabulary of 49,152."""
    shape = jax.ShapeDtypeStruct
    rows, length, vocabulary = 4, 512, 49152
    learner, teacher = (
        LazyLogits(
            shape((rows, length, width), jnp.float32), shape((vocabulary, width), jnp.float32)
        )
        for width in (576, 960)
    )
    mask = shape((rows, length), jnp.float32)

    def chunked(learner, teacher, mask):
        return linear_loss([losses.reverse_kl], learner, [teacher], mask)[0]

    def whole(learner, teacher, mask):
        return (mask * losses.reverse_kl(teacher.logits(), learner.logits())).sum()

    def mebibytes(loss):
        compiled = jax.jit(jax.value_and_grad(loss)).lower(learner, teacher, mask).compile()
        return compiled.memory_analysis().temp_size_in_bytes / 2**20

    assert mebibytes(chunked) <= 220
    assert mebibytes(whole) > 1000


@pytest.mark.parametrize(
    "spec",
    ["jensen_shannon(0.0)", "jensen_shannon(1)", "skew_forward_kl(1.0)", "skew_reverse_kl(0)"],
)
def test_a_share_at_its_limit_is_refused_with_the_names_of_the_limits(spec):
    with pytest.raises(ValueError, match="its limits are forward_kl and reverse_kl, by name"):
        losses.divergence(spec)


def test_numbers_of_a_divergence_are_finite():
    with pytest.raises(ValueError, match="finite"):
        losses.divergence("alpha_beta(1e400, 1)")


def test_a_function_that_declares_itself_is_a_divergence(monkeypatch):
    """As CONTRIBUTING says: one function, and configs and chunked losses take its name."""
    monkeypatch.setattr(names, "DIVERGENCES", dict(names.DIVERGENCES))
    monkeypatch.setattr(names, "PARAMETERS", dict(names.PARAMETERS))

    @names.declare(order=Float(low=1.0))
    def power_distance(target, learner, order=2.0):
        p, q = (jnp.exp(losses.log_probs(x)) for x in (target, learner))
        return jnp.sum(jnp.abs(p - q) ** order, axis=-1)

    learner, teacher, _, mask = problem()
    found = linear_loss([losses.divergence("power_distance(1.0)")], learner, [teacher], mask)[0]
    twice = linear_loss([losses.total_variation], learner, [teacher], mask)[0]
    np.testing.assert_allclose(found, 2 * twice, rtol=1e-5)
    with pytest.raises(ValueError, match="order: 0.5 is not >= 1"):
        losses.divergence("power_distance(0.5)")
    assert not DivergenceName().fault("power_distance")
