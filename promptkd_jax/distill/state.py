"""The state that a train step changes, and the metrics that it measures.

M soft-prompt tokens, D width, G micro-batches of one update, UG of a whole step, which has U
minibatches.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from promptkd_jax.distill.methods.curriculum import (
    Curriculum,
    InterpolationState,
    linear_share,
    next_interpolation,
)
from promptkd_jax.distill.methods.method import PRESETS, Conventions, Method
from promptkd_jax.distill.replay import Replay
from promptkd_jax.distill.targets import TargetBatch
from promptkd_jax.models.layers.gated_prefix import GatedPrefix


class Optimizers(NamedTuple):
    """An optimizer for each group of parameters that is trained.

    `projection` is for the matrices between hidden states of different models, `teacher` for the
    "online" view.
    """

    student: optax.GradientTransformation
    soft_prompt: optax.GradientTransformation | None = None
    teacher: optax.GradientTransformation | None = None
    projection: optax.GradientTransformation | None = None


# Every leaf has a fixed shape and dtype from the first step on: a jitted step takes the state over
# (donation) and gives one back into the same memory, and a checkpoint is restored by its structure.
# Counters are arrays for that reason, and None stands for what a method does not have.


@flax.struct.dataclass
class TrainState:
    """All arrays that a step changes; a frozen teacher is not among them.

    `params` and `optimizers` have the groups of `Optimizers`: "student", and where they are trained
    "soft_prompt" `[M, D]` or a `GatedPrefix`, "teacher", "projection". `step` counts the steps of
    this stage, `regularization` is the coefficient of L_reg where that adapts, `interpolation` the
    schedule of a moving target where that does, `replay` the buffer of "replay" targets, `pending`
    the rows of this step where rows are written a step ahead, see `write_ahead`. `skipped` counts
    the non-finite steps in all, `skipped_in_a_row` the latest of them.
    """

    step: jax.Array
    key: jax.Array
    params: dict[str, Any]
    optimizers: dict[str, Any]
    regularization: jax.Array
    replay: Replay | None
    pending: TargetBatch | None
    skipped: jax.Array
    skipped_in_a_row: jax.Array
    interpolation: InterpolationState | None = None

    @property
    def student(self) -> Any:
        """The student's parameters."""
        return self.params["student"]

    @property
    def soft_prompt(self) -> jax.Array | GatedPrefix | None:
        """`[M, D]` or a `GatedPrefix`, None where there is none."""
        return self.params.get("soft_prompt")


class Metrics(NamedTuple):
    """Sums and counts of one step; `summarize` divides sums by counts.

    `losses` by who learns ("student", "prompt", "teacher") and `sums` by name are sums over the
    response tokens of each micro-batch `[UG]`, `counts` `[UG]` the number of these tokens;
    `grad_norms` are by who learns, `scalars` by name.
    """

    losses: dict[str, jax.Array]
    grad_norms: dict[str, jax.Array]
    sums: dict[str, jax.Array]
    counts: jax.Array
    scalars: dict[str, jax.Array]

    def add(self, learner: str, loss: jax.Array, sums: dict, grad_norm: jax.Array) -> "Metrics":
        """Adds the loss, sums and gradient norm of one learner's update."""
        return self._replace(
            losses=self.losses | {learner: loss},
            grad_norms=self.grad_norms | {learner: grad_norm},
            sums=self.sums | sums,
        )


def init_state(
    params: Mapping[str, Any],
    optimizers: Optimizers,
    key: jax.Array,
    *,
    regularization: float = 1.0,
    replay: Replay | None = None,
    pending: TargetBatch | None = None,
    interpolation: InterpolationState | None = None,
) -> TrainState:
    """A state at step 0.

    Args:
      params: by group, see `TrainState`; at least {"student": …}.
      optimizers: one for every group in `params`.
      regularization: first coefficient of an "adaptive" L_reg.
      replay: `empty_replay(…)` where a method has "replay" targets.
      pending: an `empty_target_batch` for the rows of `write_ahead`, so that states of several
        methods have one structure.
      interpolation: `first_interpolation(…)` where a method's `interpolation` is "adaptive".
    """
    # A group that nothing trains is not there at all: no optimizer state, no checkpoint of it.
    params = {name: group for name, group in params.items() if group is not None}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        key=key,
        params=params,
        optimizers={name: getattr(optimizers, name).init(params[name]) for name in params},
        regularization=jnp.full((), regularization, jnp.float32),
        replay=replay,
        pending=pending,
        skipped=jnp.zeros((), jnp.int32),
        skipped_in_a_row=jnp.zeros((), jnp.int32),
        interpolation=interpolation,
    )


def curriculum(method: Method, state: TrainState) -> Curriculum:
    """What changes in the student's loss from step to step, in the step after `state`.

    Raises:
      ValueError: an "adaptive" schedule without its state.
    """
    settings, share, own_rows = method.interpolation, None, jnp.ones(())
    if settings.schedule == "linear":
        share = linear_share(settings, state.step / method.total_steps)
    elif settings.schedule == "adaptive":
        if state.interpolation is None:
            raise ValueError(
                "interpolation.schedule = 'adaptive' needs init_state(…, "
                "interpolation=first_interpolation(method.interpolation))"
            )
        share = state.interpolation.share
    if method.row_weights == "rising":
        own_rows = 1 + 0.5 * jnp.minimum(1.0, 2 * state.step / method.total_steps)
    # [] -> [UG]: micro-batches are mapped and scanned over, and each has its own.
    of_each = functools.partial(jnp.broadcast_to, shape=(method.num_micro_batches,))
    return jax.tree.map(of_each, Curriculum(share, own_rows))


def advance(state: TrainState, metrics: Metrics, method: Method) -> tuple[TrainState, Metrics]:
    """The state with the moving target of its next step, where that adapts to the loss of this."""
    settings = method.interpolation
    if settings.schedule != "adaptive":
        return state, metrics
    # Of the whole step, all micro-batches and devices: every process comes to the same share.
    loss = jnp.sum(metrics.losses["student"]) / jnp.sum(metrics.counts)
    floor = linear_share(settings, (state.step + 1) / method.total_steps)
    after = next_interpolation(settings, state.interpolation, loss, floor)
    scalars = metrics.scalars | {"interpolation_share": state.interpolation.share}
    return state.replace(interpolation=after), metrics._replace(scalars=scalars)


def apply_gradients(
    state: TrainState, gradients: Mapping[str, Any], optimizers: Optimizers
) -> TrainState:
    """The state after one update of every group of parameters that has a gradient."""
    params, states = dict(state.params), dict(state.optimizers)
    for name, gradient in gradients.items():
        optimizer = getattr(optimizers, name)
        updates, states[name] = optimizer.update(gradient, states[name], params[name])
        params[name] = optax.apply_updates(params[name], updates)
        if isinstance(params[name], GatedPrefix):  # 0 <= g <= 1, which the optimizer does not know
            params[name] = params[name].projected()
    return state.replace(params=params, optimizers=states)


def summarize(metrics: Metrics, conventions: Conventions = PRESETS["default"]) -> dict[str, float]:
    """Means over response tokens (or of micro-batch means) and the scalars, as Python floats."""
    metrics = jax.device_get(metrics)
    # [UG] sums over tokens; the one division of a step's metrics comes last, on the CPU.
    sums = metrics.sums | {f"{name}_loss": total for name, total in metrics.losses.items()}
    if conventions.mean_of_means:
        means = {name: (total / metrics.counts).mean() for name, total in sums.items()}
    else:
        means = {name: total.sum() / metrics.counts.sum() for name, total in sums.items()}
    norms = {f"{name}_grad_norm": norm for name, norm in metrics.grad_norms.items()}
    return {name: float(value) for name, value in (means | norms | metrics.scalars).items()}
