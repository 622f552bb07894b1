"""MiniLLM's objective: the reverse KL of whole responses, by policy gradient (arXiv 2306.08543).

The student q is rewarded for responses that the teacher p finds likelier than it does itself. Of a
sampled response y the reward of a token is r_t = log p(y_t) - log q(y_t); its advantage A_t is what
is still to come of it, so that the gradient knows the future that a token leads to; the loss is
-A_t * ratio_t, with ratio_t the probability of y_t under the trained student over that under the
policy that wrote it. MiniLLM adds two more terms, which are divergences of `losses`: `reverse_kl`
on the same rows (its single-step term) and `cross_entropy` on plain text.

With gamma = 0, no whitening and no length normalisation this is on-policy distillation with the
reverse KL of sampled tokens: A_t = r_t / reward_scaling, and over y_t ~ q the expected gradient
is that of `losses.reverse_kl` at that position, divided by `reward_scaling`. What it saves is
the teacher's distribution, of which it asks for one number a token; what it pays is variance.

All functions are pure and take `[B, R]` float32 arrays: B rows, R response positions, the mask 1
where there is a response token, V vocabulary. Rewards, weights and advantages are constants of the
loss; only `clipped_policy_gradient` has a gradient.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from promptkd_jax.distill.losses import losses
from promptkd_jax.infra import specs

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

WHITEN = {
    "response": "response tokens",
    "none": "advantages stay as they are",
    "padded": "all B * R entries, as published",
}


@dataclasses.dataclass(frozen=True)
class PolicyGradient:
    """The value of a sampled response; hashable, a static argument of `jax.jit`.

    The defaults are those published, except `whiten`: the published code whitens "padded", where
    the zeros behind the responses' ends count, so that advantages depend on the capacity R and, the
    more the shorter the responses, are pulled to one side.

    Raises:
      ValueError: a value out of its range.
    """

    gamma: float = specs.field(
        0.95,
        specs.Float(low=0.0, high=1.0),
        "discount of later rewards; 0: the token alone",
    )
    reward_scaling: float = specs.field(
        0.5, specs.Float(low=0.0, open_low=True), "divides rewards, before they are clipped"
    )
    reward_clip: float = specs.field(
        100.0, specs.Float(low=0.0, open_low=True), "bound of a reward's size"
    )
    ratio_clip: float | None = specs.field(
        0.2,
        specs.Optional(specs.Float(low=0.0, open_low=True)),
        "c of PPO: beyond 1 - c and 1 + c a ratio pushes no further; None: no clipping",
    )
    length_normalize: bool = specs.field(
        True, specs.Bool(), "divide what is to come by the number of tokens that are to come"
    )
    whiten: str = specs.field(
        "response", specs.Choice(WHITEN), "entries over which advantages get mean 0 and variance 1"
    )

    def __post_init__(self):
        specs.validate(self)


class PolicyTarget(NamedTuple):
    """The target of `clipped_policy_gradient`, each `[B, R]`: the sampled tokens `labels`, their
    `log_prob` under the student that was sampled from, their `advantage`, and `importance`, that
    student's probability over the sampling policy's (1 where it sampled alone)."""

    labels: Int[Array, "B R"]
    log_prob: Float[Array, "B R"]
    advantage: Float[Array, "B R"]
    importance: Float[Array, "B R"]


def rewards(
    student_log_prob: jax.Array,
    teacher_log_prob: jax.Array,
    mask: jax.Array,
    settings: PolicyGradient,
) -> jax.Array:
    """clip((log p - log q) / reward_scaling) of the sampled tokens, `[B, R]`, 0 where masked."""
    reward = (teacher_log_prob - student_log_prob) / settings.reward_scaling
    reward = jnp.clip(reward, -settings.reward_clip, settings.reward_clip)
    return jnp.where(mask > 0, reward, 0.0)


def importance_weights(
    student_log_prob: jax.Array, teacher_log_prob: jax.Array, teacher_share: float
) -> jax.Array:
    """w = q / ((1 - a) q + a p) of tokens sampled from that mixture, `[B, R]`, at most 1 / (1 - a).

    `teacher_share` is a, 0 <= a < 1. The log-probabilities must be those that were mixed, with the
    sampling temperature and whatever tokens were forbidden.
    """
    # log((1 - a) q + a p), without leaving the logarithm.
    mixed = jnp.logaddexp(
        jnp.log1p(-teacher_share) + student_log_prob, jnp.log(teacher_share) + teacher_log_prob
    )
    return jnp.exp(student_log_prob - mixed)


def advantages(reward: jax.Array, mask: jax.Array, settings: PolicyGradient) -> jax.Array:
    """A_t = sum_{t' >= t} gamma^(t' - t) r_t' / remaining length, whitened, `[B, R]`.

    MiniLLM, section 2.2. Whitening takes its mean and (biased) variance from the rows given here:
    give it all rows of an update, not those of one micro-batch.
    """

    # With n_t the tokens from t to the row's end, t included:
    #     A_t = (r_t + gamma r_{t+1} + gamma^2 r_{t+2} + ...) / n_t,   then (A - mean) / std
    # The division keeps early tokens, which have more rewards to come, from weighing more.
    def backwards(later, now):
        total = now + settings.gamma * later
        return total, total

    # Over R from the end: A_t = r_t + gamma A_{t+1}; [R, B] for the scan.
    _, advantage = jax.lax.scan(backwards, jnp.zeros(reward.shape[0]), reward.T, reverse=True)
    advantage = advantage.T
    if settings.length_normalize:
        # [B, R]: response tokens from t on, t included.
        remaining = jnp.cumsum(mask[:, ::-1], axis=1)[:, ::-1]
        advantage = advantage / jnp.maximum(remaining, 1)
    if settings.whiten == "none":
        return advantage
    if settings.whiten == "padded":
        return _whiten(advantage, jnp.ones_like(mask))
    return _whiten(advantage, mask) * mask


def _whiten(x: jax.Array, mask: jax.Array) -> jax.Array:
    """`x` with mean 0 and variance 1 over the entries where the mask is 1."""
    count = jnp.maximum(jnp.sum(mask), 1)
    mean = jnp.sum(x * mask) / count
    variance = jnp.sum(jnp.square(x - mean) * mask) / count
    return (x - mean) * jax.lax.rsqrt(variance + 1e-8)


def policy_target(
    labels: jax.Array,
    mask: jax.Array,
    student_log_prob: jax.Array,
    teacher_log_prob: jax.Array,
    teacher_share: float,
    settings: PolicyGradient,
) -> PolicyTarget:
    """Values the sampled responses.

    Args:
      labels: `[B, R]` the sampled tokens.
      mask: `[B, R]` 1 where there is one; what stands elsewhere in the other arrays is ignored.
      student_log_prob: `[B, R]` of the labels under the student they were sampled from.
      teacher_log_prob: `[B, R]` of the labels under the teacher. The published code rewards with
        the teacher at temperature 1 and no token forbidden, even where the student's numbers have
        a temperature, and weights with the teacher as it was sampled from; where these differ,
        give the former here and replace `importance` in what is returned.
      teacher_share: a of the sampling policy (1 - a) q + a p; 0 if the student sampled alone.
      settings: see `PolicyGradient`.
    """
    # A select, not a product: behind a row's end there may be NaN, and 0 * NaN is NaN.
    student_log_prob = jnp.where(mask > 0, student_log_prob, 0.0)
    teacher_log_prob = jnp.where(mask > 0, teacher_log_prob, 0.0)
    reward = rewards(student_log_prob, teacher_log_prob, mask, settings)
    return PolicyTarget(
        labels=labels,
        log_prob=student_log_prob,
        advantage=advantages(reward, mask, settings),
        importance=importance_weights(student_log_prob, teacher_log_prob, teacher_share),
    )


def clipped_policy_gradient(
    target: PolicyTarget, learner: jax.Array, ratio_clip: float | None
) -> jax.Array:
    """-min(A ratio, A clip(ratio, 1 - c, 1 + c)), `[B, R]`: a term for `chunked_loss.linear_loss`.

    ratio = importance * q_new(label) / q_old(label). As published, the importance is part of what
    is clipped: a token written by a mixture whose importance alone is beyond the bounds, on the
    side towards which its advantage pushes, has no gradient even at q_new = q_old. Without a future
    and whitening (gamma = 0) there is none such, and without clipping the gradient is unbiased.

    Args:
      target: see `PolicyTarget`; a constant.
      learner: `[B, R, V]` logits of the trained student, divided by the temperature and with the
        forbidden tokens at -inf where `log_prob` is of such a distribution.
      ratio_clip: c; None: no clipping.
    """
    # Of the label alone: the learner's distribution is [B, R, V] a block of positions at a time.
    log_prob = -losses.cross_entropy(target.labels, learner)
    # [B, R]: 1 in the first update of a rollout, up to the importance of a mixture.
    ratio = jnp.exp(log_prob - target.log_prob) * target.importance
    gain = target.advantage * ratio
    if ratio_clip is not None:
        clipped = jnp.clip(ratio, 1 - ratio_clip, 1 + ratio_clip)
        # The smaller of both: no gain for moving further than the bound, all of the loss.
        gain = jnp.minimum(gain, target.advantage * clipped)
    return -gain
