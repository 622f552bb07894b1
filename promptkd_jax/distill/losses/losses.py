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

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from promptkd_jax.distill.losses.adaptive_kl import akl as akl
from promptkd_jax.distill.losses.adaptive_kl import csd as csd
from promptkd_jax.distill.losses.adaptive_kl import todi as todi
from promptkd_jax.distill.losses.divergence import (
    SHARE,
    Divergence,
    DivergenceName,
    declare,
    expected,
    finite_log,
    kl,
    log_mixture,
    log_pair,
    log_probs,
    log_ratio,
    mark_needs_whole,
    needs_whole,
)
from promptkd_jax.distill.losses.divergence import (
    divergence as divergence,
)
from promptkd_jax.infra import specs

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

    Logits = Float[Array, "*B V"]
    PerPosition = Float[Array, "*B"]


def _power(log_p: jax.Array, exponent: float) -> jax.Array:
    """p ** exponent; 0 ** exponent is 0."""
    if exponent > 0:
        return jnp.exp(exponent * log_p)
    return jnp.where(jnp.isneginf(log_p), 0.0, jnp.exp(exponent * finite_log(log_p)))


@declare()
def forward_kl(target: Logits, learner: Logits) -> PerPosition:
    """KL(target || learner): mass-covering. Word-level KD, Kim & Rush 2016 (arXiv 1606.07947)."""
    return kl(*log_pair(target, learner))


@declare()
def reverse_kl(target: Logits, learner: Logits) -> PerPosition:
    """KL(learner || target): mode-seeking. PromptKD eq. 1 and 4 (arXiv 2402.12842)."""
    log_p, log_q = log_pair(target, learner)
    return kl(log_q, log_p)


@declare()
def soft_cross_entropy(target: Logits, learner: Logits) -> PerPosition:
    """-sum_v target_v log learner_v: `forward_kl` plus the target's entropy, the same gradient.

    The published PromptKD code reports this number for its "forward" losses.
    """
    log_p, log_q = log_pair(target, learner)
    return -expected(jnp.exp(log_p), finite_log(log_q))


@declare(skew=SHARE)
def skew_forward_kl(target: Logits, learner: Logits, skew: float = 0.1) -> PerPosition:
    """KL(target || skew * target + (1 - skew) * learner). DistiLLM (arXiv 2402.03898), eq. 3.

    skew -> 0 gives `forward_kl`; at most log(1 / skew).
    """
    log_p, log_q = log_pair(target, learner)
    return kl(log_p, log_mixture(log_p, log_q, skew))


@declare(skew=SHARE)
def skew_reverse_kl(target: Logits, learner: Logits, skew: float = 0.1) -> PerPosition:
    """KL(learner || (1 - skew) * target + skew * learner). DistiLLM (arXiv 2402.03898), eq. 5.

    skew -> 0 gives `reverse_kl`; at most log(1 / skew).
    """
    log_p, log_q = log_pair(target, learner)
    return kl(log_q, log_mixture(log_p, log_q, 1 - skew))


@declare(beta=SHARE)
def jensen_shannon(target: Logits, learner: Logits, beta: float = 0.5) -> PerPosition:
    """beta KL(target || m) + (1 - beta) KL(learner || m), m = beta target + (1 - beta) learner.

    GKD (arXiv 2306.13649), eq. 1, with its beta: divided by beta it tends to `forward_kl` for
    beta -> 0, divided by 1 - beta to `reverse_kl` for beta -> 1.
    """
    log_p, log_q = log_pair(target, learner)
    log_m = log_mixture(log_p, log_q, beta)
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


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
    log_p, log_q = log_pair(target, learner)
    ratio = log_ratio(log_p, log_q)  # log(p / q)
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
    p, q = (jnp.exp(x) for x in log_pair(target, learner))
    return 0.5 * jnp.sum(jnp.abs(p - q), axis=-1)


# The mixture of both in the place of one


def _mixed_needs_whole(
    outer: Divergence = alpha_beta, alpha: float = 0.5, share: float = 0.5, held: bool = False
) -> bool:
    # Arithmetic mixtures add up: of sums of probabilities they are the sums of the mixture.
    return alpha != -1 or needs_whole(outer)


_MIXTURE = dict(outer=DivergenceName(), alpha=specs.Float(), share=SHARE)


@declare(whole=_mixed_needs_whole, **_MIXTURE)
def mixed_learner(
    target: Logits,
    learner: Logits,
    outer: Divergence = alpha_beta,
    alpha: float = 0.5,
    share: float = 0.5,
) -> PerPosition:
    """The outer divergence of the target from a mixture of both, D(p, r): AMiD (arXiv 2510.15982).

    The mixture is `log_mixture`, which weighs the target by `share`, and the gradient flows through
    it. The defaults are those of AMiD's scripts for GPT-2. At alpha = -1 this is for `forward_kl`
    `skew_forward_kl(share)`; share -> 0 gives the outer divergence itself.
    """
    log_p, log_q = log_pair(target, learner)
    return outer(log_p, log_mixture(log_p, log_q, share, alpha))


@declare(whole=_mixed_needs_whole, **_MIXTURE, held=specs.Bool())
def mixed_target(
    target: Logits,
    learner: Logits,
    outer: Divergence = alpha_beta,
    alpha: float = 0.5,
    share: float = 0.5,
    held: bool = False,
) -> PerPosition:
    """The outer divergence of a mixture of both from the learner, D(r, q): AMiD, too.

    The mixture is `log_mixture`, which weighs the target by `share`; the gradient flows through it,
    unless it is `held`. At alpha = -1 this is for `reverse_kl` `skew_reverse_kl(1 - share)`, held
    that of DistiLLM-2; share -> 1 gives the outer divergence itself.
    """
    log_p, log_q = log_pair(target, learner)
    mixture = log_mixture(log_p, log_q, share, alpha)
    return outer(jax.lax.stop_gradient(mixture) if held else mixture, log_q)


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
    return -expected(jnp.exp(log_p), finite_log(log_p))


def confidence(logits: Logits) -> PerPosition:
    """1 - entropy / log V: 0 for the uniform distribution, 1 where one token has all mass."""
    return 1 - entropy(logits) / jnp.log(logits.shape[-1])


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

    return mark_needs_whole(weighted_divergence)


def tempered(
    function: Divergence, temperature: float, learner_temperature: float | None = None
) -> Divergence:
    """`function` of target and learner, each at its temperature, times the product of these; the
    learner's is by default the target's.

    For one temperature that is its square (Hinton et al. 2015), which keeps the gradient's size:
    for high temperatures it no longer depends on it. Where only the learner's is above 1 (WASD), a
    learner that fits is sharper than the target when it is sampled at temperature 1.
    """
    own = learner_temperature or temperature
    if temperature == own == 1:
        return function

    def tempered_divergence(target, learner):
        return temperature * own * function(target / temperature, learner / own)

    return mark_needs_whole(tempered_divergence)
