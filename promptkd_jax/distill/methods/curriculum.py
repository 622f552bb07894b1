"""What changes in the student's loss from step to step: TAID's target, which moves from the student
to the teacher, and DistiLLM-2's weights of the rows that either wrote.

V vocabulary, B rows, R response positions, UG micro-batches of a step.
"""

import dataclasses
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from promptkd_jax.distill.losses.divergence import (
    Divergence,
    log_mixture,
    log_pair,
    mark_needs_whole,
)
from promptkd_jax.infra.specs import Choice, Float, field, validate

INTERPOLATIONS = {
    "none": "the target is the teacher",
    "linear": "the teacher's share rises from start to end over the steps",
    "adaptive": "it rises faster where the loss falls (TAID), and part of the state",
}
ROW_WEIGHTS = {
    "even": "1 of both",
    "rising": "in step k of K 1 + min(1, 2 k / K) / 2 of the student's rows, of the others the rest"
    " to 2 (DistiLLM-2)",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interpolation:
    """TAID's moving target (arXiv 2501.16937): the geometric mixture of teacher and student, held,
    as the target of every divergence. Defaults as released."""

    schedule: str = field("none", Choice(INTERPOLATIONS), "of the teacher's share")
    start: float = field(0.4, Float(low=0.0, high=1.0, open_high=True), "share in the first step")
    end: float = field(1.0, Float(low=0.0, high=1.0, open_low=True), "the largest share")
    rate: float = field(5e-4, Float(low=0.0, high=1.0), "of 'adaptive': of what is left to 1")
    momentum: float = field(
        0.99, Float(low=0.0, high=1.0, open_high=True), "of 'adaptive': of the loss's relative fall"
    )

    def __post_init__(self):
        validate(self)


@flax.struct.dataclass
class InterpolationState:
    """The "adaptive" schedule after some steps, each `[]`: the teacher's `share` in the next one,
    the mean of the loss's relative `fall`, the `loss` of the last, inf before any."""

    share: jax.Array
    fall: jax.Array
    loss: jax.Array


def first_interpolation(settings: Interpolation) -> InterpolationState:
    """The state of the "adaptive" schedule before the first step."""
    zero = jnp.zeros((), jnp.float32)
    return InterpolationState(zero + settings.start, zero, zero + jnp.inf)


def next_interpolation(
    settings: Interpolation, state: InterpolationState, loss: jax.Array, floor: jax.Array
) -> InterpolationState:
    """The schedule after a step.

    Args:
      loss: `[]`, the student's mean loss in that step, of all micro-batches and devices.
      floor: `[]`, the share of the "linear" schedule in the next step, below which it never is.
    """
    fall = (state.loss - loss) / (state.loss + 1e-15)
    fall = settings.momentum * state.fall + (1 - settings.momentum) * fall
    # Of the first step inf: NaN above, selected away here, as is what it would have moved.
    fall = jnp.where(jnp.isinf(state.loss), state.fall, fall)  # nothing yet to compare with
    step = settings.rate * jax.nn.sigmoid(fall) * (1 - state.share)
    step = jnp.where(jnp.isinf(state.loss), 0.0, step)
    share = jnp.minimum(settings.end, jnp.maximum(floor, state.share + step))
    return InterpolationState(share, fall, loss.astype(jnp.float32))


class Curriculum(NamedTuple):
    """The values of a step, for each of its micro-batches `[UG]`: the teacher's share in the moving
    target, `interpolation` (None: there is none), and the weight of rows that the student wrote,
    `own_rows`. See `state.curriculum`."""

    interpolation: jax.Array | None
    own_rows: jax.Array


def linear_share(settings: Interpolation, progress: jax.Array) -> jax.Array:
    """The teacher's share when `progress` of all steps is done."""
    return settings.start + (settings.end - settings.start) * progress


def interpolated(function: Divergence) -> Divergence:
    """`function` of the geometric mixture of target and learner, held, from the learner; its target
    is (target `[..., V]`, the target's share `[...]`)."""

    def interpolated_divergence(target, learner):
        target, share = target
        log_p, log_q = log_pair(target, learner)  # [..., V]; the share is one number a position
        mixture = log_mixture(log_p, log_q, share[..., None], 1)
        return function(jax.lax.stop_gradient(mixture), learner)

    return mark_needs_whole(interpolated_divergence)
