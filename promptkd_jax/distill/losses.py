"""Divergences between next-token distributions, on logits: the definitions.

`divergence(target, learner)` takes two arrays of logits `[..., V]` and returns one number in nats
per position `[...]`, computed in float32. *Target* is the distribution that is held fixed,
*learner* the one that is trained; "forward" has the target first, "reverse" the learner first. In
the student's update the teacher p is the target and the student q the learner; in the prompt's
update it is the other way round.

A logit of -inf removes a token from the support of its distribution: the logarithm of that
probability counts as 0, in values and gradients, as in the published implementation.

`chunked_loss` has the same on hidden states, where no `[B, T, V]` array exists.

V vocabulary.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from promptkd_jax.infra import specs

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

    Logits = Float[Array, "*B V"]
    PerPosition = Float[Array, "*B"]

Divergence = Callable[[jax.Array, jax.Array], jax.Array]

DIVERGENCES: dict[str, Divergence] = {}  # by name, as `declare` puts them there
PARAMETERS: dict[str, dict[str, specs.Float]] = {}  # of each, with what their values may be


class _Share(specs.Float):
    """A number between 0 and 1."""

    def fault(self, value: Any) -> str:
        fault = super().fault(value)
        return fault and f"{fault}: its limits are forward_kl and reverse_kl, by name"


SHARE = _Share(low=0.0, high=1.0, open_low=True, open_high=True)


def declare(**parameters: specs.Float) -> Callable[[Divergence], Divergence]:
    """Makes a function a divergence that configs can name, "function" or "function(number, …)".

    Args:
      parameters: the function's numbers behind its two logits, in order, with their ranges.
    """

    def declared(function: Divergence) -> Divergence:
        DIVERGENCES[function.__name__] = function
        PARAMETERS[function.__name__] = parameters
        return function

    return declared


def log_probs(logits: Logits) -> Logits:
    """Log-softmax in float32 over the last axis."""
    return jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)


def _pair(target: Logits, learner: Logits) -> tuple[jax.Array, jax.Array]:
    """The log-probabilities of both. Raises ValueError for different vocabularies."""
    if target.shape[-1] != learner.shape[-1]:
        raise ValueError(
            f"a target {list(target.shape)} and a learner {list(learner.shape)}: of "
            f"{target.shape[-1]} and {learner.shape[-1]} tokens; expected logits of the tokens "
            "that both share, without the padding of either: [..., :vocab_size]"
        )
    return log_probs(target), log_probs(learner)


def _finite(log_p: jax.Array) -> jax.Array:
    """0 for the logarithm of 0. NaN stays: a broken model must not look like a finite loss."""
    return jnp.where(jnp.isneginf(log_p), 0.0, log_p)


def _power(log_p: jax.Array, exponent: float) -> jax.Array:
    """p ** exponent; 0 ** exponent is 0."""
    if exponent > 0:
        return jnp.exp(exponent * log_p)
    return jnp.where(jnp.isneginf(log_p), 0.0, jnp.exp(exponent * _finite(log_p)))


def _expected(p: jax.Array, x: jax.Array) -> jax.Array:
    """sum_v p_v x_v: a product of vectors, which XLA's CPU compiler can do 20 times as fast as it
    adds up what is multiplied."""
    return jnp.einsum("...v,...v->...", p, x, precision="highest")


def _kl(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    return _expected(jnp.exp(log_p), _finite(log_p) - _finite(log_q))


def _mixture(log_p: jax.Array, log_q: jax.Array, weight_p: float) -> jax.Array:
    """log(weight_p * p + (1 - weight_p) * q)."""
    # In logarithms throughout: p and q themselves are 0 in float32 from log-probability -104 on.
    left, right = log_p + jnp.log(weight_p), log_q + jnp.log1p(-weight_p)
    empty = jnp.isneginf(left) & jnp.isneginf(right)  # where the gradient of logaddexp is NaN
    left, right = jnp.where(empty, 0.0, left), jnp.where(empty, 0.0, right)
    return jnp.where(empty, -jnp.inf, jnp.logaddexp(left, right))


@declare()
def forward_kl(target: Logits, learner: Logits) -> PerPosition:
    """KL(target || learner): mass-covering. Word-level KD, Kim & Rush 2016 (arXiv 1606.07947)."""
    return _kl(*_pair(target, learner))


@declare()
def reverse_kl(target: Logits, learner: Logits) -> PerPosition:
    """KL(learner || target): mode-seeking. PromptKD eq. 1 and 4 (arXiv 2402.12842)."""
    log_p, log_q = _pair(target, learner)
    return _kl(log_q, log_p)


@declare()
def soft_cross_entropy(target: Logits, learner: Logits) -> PerPosition:
    """-sum_v target_v log learner_v: `forward_kl` plus the target's entropy, the same gradient.

    The published PromptKD code reports this number for its "forward" losses.
    """
    log_p, log_q = _pair(target, learner)
    return -_expected(jnp.exp(log_p), _finite(log_q))


@declare(skew=SHARE)
def skew_forward_kl(target: Logits, learner: Logits, skew: float = 0.1) -> PerPosition:
    """KL(target || skew * target + (1 - skew) * learner). DistiLLM (arXiv 2402.03898), eq. 3.

    skew -> 0 gives `forward_kl`; at most log(1 / skew).
    """
    log_p, log_q = _pair(target, learner)
    return _kl(log_p, _mixture(log_p, log_q, skew))


@declare(skew=SHARE)
def skew_reverse_kl(target: Logits, learner: Logits, skew: float = 0.1) -> PerPosition:
    """KL(learner || (1 - skew) * target + skew * learner). DistiLLM (arXiv 2402.03898), eq. 5.

    skew -> 0 gives `reverse_kl`; at most log(1 / skew).
    """
    log_p, log_q = _pair(target, learner)
    return _kl(log_q, _mixture(log_p, log_q, 1 - skew))


@declare(beta=SHARE)
def jensen_shannon(target: Logits, learner: Logits, beta: float = 0.5) -> PerPosition:
    """beta KL(target || m) + (1 - beta) KL(learner || m), m = beta target + (1 - beta) learner.

    GKD (arXiv 2306.13649), eq. 1, with its beta: divided by beta it tends to `forward_kl` for
    beta -> 0, divided by 1 - beta to `reverse_kl` for beta -> 1.
    """
    log_p, log_q = _pair(target, learner)
    log_m = _mixture(log_p, log_q, beta)
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


@declare(alpha=specs.Float(), beta=specs.Float())
def alpha_beta(
    target: Logits, learner: Logits, alpha: float = 0.2, beta: float = 0.7
) -> PerPosition:
    """The alpha-beta divergence of target from learner. ABKD (arXiv 2505.04560), eq. 6.

    (1, 0) is `forward_kl`, (0, 1) is `reverse_kl`. The limits at alpha = 0, beta = 0 and
    alpha + beta = 0 are those of Cichocki, Cruces & Amari 2011.
    """
    # With a = alpha and b = beta, of one token:
    #     D = (a / (a + b) p^(a+b) + b / (a + b) q^(a+b) - p^a q^b) / (a b)
    # Each limit below is the Taylor expansion of this where its denominator goes to 0.
    log_p, log_q = _pair(target, learner)
    ratio = _finite(log_p) - _finite(log_q)  # log(p / q)
    p_a, q_b = _power(log_p, alpha), _power(log_q, beta)
    if alpha == 0 and beta == 0:
        terms = 0.5 * ratio**2
    elif beta == 0:
        terms = (p_a * alpha * ratio - p_a + _power(log_q, alpha)) / alpha**2
    elif alpha == 0:
        terms = (-q_b * beta * ratio - q_b + _power(log_p, beta)) / beta**2
    elif alpha + beta == 0:
        terms = (jnp.exp(alpha * ratio) - alpha * ratio - 1) / alpha**2
    else:
        order = alpha + beta
        p_sum, q_sum = _power(log_p, order), _power(log_q, order)
        terms = (alpha / order * p_sum + beta / order * q_sum - p_a * q_b) / (alpha * beta)
    return jnp.sum(terms, axis=-1)


@declare()
def total_variation(target: Logits, learner: Logits) -> PerPosition:
    """Half the L1 distance of the two distributions, in [0, 1]."""
    p, q = (jnp.exp(x) for x in _pair(target, learner))
    return 0.5 * jnp.sum(jnp.abs(p - q), axis=-1)


def cross_entropy(labels: Int[Array, "*B"], learner: Logits) -> PerPosition:
    """-log learner[label]: labels `[...]` integers, learner `[..., V]` logits."""
    return -jnp.take_along_axis(log_probs(learner), labels[..., None], axis=-1)[..., 0]


def agreement(target: Logits, learner: Logits) -> PerPosition:
    """1 where some token has the largest probability of both, else 0. No gradient."""
    # By the maxima, not by argmax: the softmax needs them anyway, and an argmax over V takes a CPU
    # as long as the product with the head.
    largest = [x == jnp.max(x, axis=-1, keepdims=True) for x in (target, learner)]
    return jnp.any(largest[0] & largest[1], axis=-1).astype(jnp.float32)


def entropy(logits: Logits) -> PerPosition:
    """The entropy of the distribution, in nats."""
    log_p = log_probs(logits)
    return -_expected(jnp.exp(log_p), _finite(log_p))


def confidence(logits: Logits) -> PerPosition:
    """1 - entropy / log V: 0 for the uniform distribution, 1 where one token has all mass."""
    return 1 - entropy(logits) / jnp.log(logits.shape[-1])


@functools.cache
def divergence(text: str) -> Divergence:
    """Returns the divergence that a config names, such as "reverse_kl" or "alpha_beta(0.2, 0.7)".

    Equal texts give the identical function, so that it can be a static argument of `jax.jit`.

    Raises:
      ValueError: an unknown name or numbers that cannot be read.
    """
    name, bracket, rest = text.partition("(")
    if name not in DIVERGENCES:
        raise ValueError(f"unknown divergence {text!r}; there are: {', '.join(DIVERGENCES)}")
    if not bracket:
        return DIVERGENCES[name]
    try:
        numbers = ast.literal_eval(bracket + rest)
        numbers = numbers if isinstance(numbers, tuple) else (numbers,)
        return _with_numbers(name, numbers)
    except (SyntaxError, TypeError, ValueError) as error:
        raise ValueError(f"divergence {text!r}: expected {name}(number, …): {error}") from error


def _with_numbers(name: str, numbers: tuple[float, ...]) -> Divergence:
    """The divergence of that name at these parameters, the first of those it has."""
    parameters = PARAMETERS[name]
    if not 0 < len(numbers) <= len(parameters):
        raise TypeError(f"its parameters are ({', '.join(parameters)}), got {numbers}")
    chosen = dict(zip(parameters, numbers))
    for parameter, number in chosen.items():
        if fault := parameters[parameter].fault(number):
            raise ValueError(f"{parameter}: {number!r} is not {fault}")
    return functools.partial(DIVERGENCES[name], **chosen)


# How much a position counts, from (target, learner); a constant, no gradient goes through it.
WEIGHTINGS: dict[str, Divergence] = {
    "teacher_confidence": lambda target, learner: confidence(target),
    "student_uncertainty": lambda target, learner: 1 - confidence(learner),
}


def weighted(function: Divergence, weighting: str) -> Divergence:
    """`function` times a weight per position in [0, 1], one of `WEIGHTINGS`, or "uniform"."""
    # The function itself: what is static in a jitted step must be the identical object each time.
    if weighting == "uniform":
        return function
    weight = WEIGHTINGS[weighting]

    def weighted_divergence(target, learner):
        return jax.lax.stop_gradient(weight(target, learner)) * function(target, learner)

    return _mark_needs_whole(weighted_divergence)


def tempered(function: Divergence, temperature: float) -> Divergence:
    """`function` of both distributions at a temperature, times its square (Hinton et al. 2015).

    The square keeps the gradient's size: for high temperatures it no longer depends on it.
    """
    if temperature == 1:
        return function

    def tempered_divergence(target, learner):
        return temperature**2 * function(target / temperature, learner / temperature)

    return _mark_needs_whole(tempered_divergence)


def _mark_needs_whole(function: Divergence) -> Divergence:
    """Marks a divergence for `needs_whole`."""
    function.needs_whole = True
    return function


def needs_whole(function: Divergence) -> bool:
    """Whether `function` needs every probability of its target: a divergence at a temperature or
    with a weighting means nothing where the probabilities of the tail are known only as a sum."""
    return getattr(function, "needs_whole", False)
