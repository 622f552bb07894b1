"""Divergences that weigh both directions of KL, or token against token, by where p and q differ.

The weights are constants: no gradient goes through them, so that the gradient is not that of the
value. Definitions as in `losses`: `(target, learner)` logits `[..., V]` -> nats `[...]`.

V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from promptkd_jax.distill.losses.divergence import (
    SHARE,
    declare,
    expected,
    kl,
    log_pair,
    log_probs,
    log_ratio,
)
from promptkd_jax.infra import specs
from promptkd_jax.models.sampling_rules import keep_top_p

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    Logits = Float[Array, "*B V"]
    PerPosition = Float[Array, "*B"]


@declare()
def todi(target: Logits, learner: Logits) -> PerPosition:
    """Token-wise forward and reverse KL, ToDi (arXiv 2505.16297), with p target and q learner:

        sum_v s_v p_v log(p_v / q_v) + (1 - s_v) q_v log(q_v / p_v),   s = p / (p + q), held

    Where the target has more, the learner is pulled up as by `forward_kl`, elsewhere pushed down as
    by `reverse_kl`. The value is that of both together, KL(p || q) + KL(q || p), since
    s p - (1 - s) q = p - q; the gradient is not, since s is held.
    """
    log_p, log_q = log_pair(target, learner)
    ratio = log_ratio(log_p, log_q)
    # Of what is impossible for one alone, the other's log-probability is the ratio; its weight is 1
    # where that is the target, else 0, as of p / (p + q).
    s = jax.lax.stop_gradient(jax.nn.sigmoid(_log_odds(log_p, log_q)))
    return expected(s * jnp.exp(log_p) - (1 - s) * jnp.exp(log_q), ratio)


def _log_odds(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """log(p / q), infinite where one is 0, 0 where both are."""
    both = jnp.isneginf(log_p) & jnp.isneginf(log_q)
    return jnp.where(both, 0.0, log_p - jnp.where(both, 0.0, log_q))


@declare(whole=True, mass=SHARE)
def akl(target: Logits, learner: Logits, mass: float = 0.5) -> PerPosition:
    """Forward and reverse KL, weighed by where the learner is wrong: AKL (arXiv 2404.02657).

        h KL(target || learner) + (1 - h) KL(learner || target),   h = g_head / (g_head + g_tail)

    g is the sum of |p - q| over the head, the fewest tokens with which the target reaches `mass`
    (equally likely ones together), and over all others. h is held, and 1/2 where both are equal,
    where the published code is NaN.
    """
    log_p, log_q = log_pair(target, learner)
    head = ~jnp.isneginf(keep_top_p(jax.lax.stop_gradient(log_p), mass))
    gap = jnp.abs(jnp.exp(log_p) - jnp.exp(log_q))
    of_head, of_all = jnp.sum(jnp.where(head, gap, 0), axis=-1), jnp.sum(gap, axis=-1)
    # The gap is 0 only where both are equal: then both directions are 0 too, whatever h is.
    h = jnp.where(of_all == 0, 0.5, of_head / jnp.where(of_all == 0, 1.0, of_all))
    h = jax.lax.stop_gradient(h)
    return h * kl(log_p, log_q) + (1 - h) * kl(log_q, log_p)


CSD_WEIGHTS = specs.Choice("learner", "target", "uniform")


@declare(
    whole=True,
    first=CSD_WEIGHTS,
    second=CSD_WEIGHTS,
    temperature=specs.Float(low=0.0, open_low=True),
)
def csd(
    target: Logits,
    learner: Logits,
    first: str = "learner",
    second: str = "learner",
    temperature: float = 1.5,
) -> PerPosition:
    """The squared differences of log-ratios between all pairs of tokens: concrete score
    distillation, CSD (arXiv 2509.25837), with d = log(learner / target) and weights that are held:

        1/4 sum_x sum_y w1(x) w2(y) (d_x - d_y)^2

    The weights are probabilities of the learner or the target at a temperature, or the same of all
    tokens. The factor makes the gradient that of the released code, in which only the weights have
    the temperature. **csd(learner, learner, 1) has the gradient of `reverse_kl`: it is no other
    objective.** Published are (learner, learner), (uniform, learner) and (target, learner).
    """
    log_p, log_q = log_pair(target, learner)
    d = log_ratio(log_q, log_p)
    possible = ~(jnp.isneginf(log_p) & jnp.isneginf(log_q))
    # log-weights [..., V], up to a constant; a token that neither can say has none of the uniform.
    of = {
        "learner": log_q / temperature,
        "target": log_p / temperature,
        "uniform": jnp.where(possible, 0.0, -jnp.inf),
    }
    w1, w2 = (jax.lax.stop_gradient(jnp.exp(log_probs(of[name]))) for name in (first, second))
    # In sum_x sum_y (d_x - d_y)^2, around a constant, so that the two sums differ in what counts.
    d = d - jax.lax.stop_gradient(expected(w1, d))[..., None]
    return (expected(w1, d**2) + expected(w2, d**2)) / 4 - expected(w1, d) * expected(w2, d) / 2
