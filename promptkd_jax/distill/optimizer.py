"""The published learning-rate schedules; AdamW and optimizers of less memory, with clipping and a
decay mask, which are right for parameters in half precision too; the sum of gradients over
micro-batches.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from promptkd_jax.distill.preconditioners import (
    scale_by_adafactor,
    scale_by_adam,
    scale_by_adam_8bit,
    scale_by_muon,
)

SCHEDULES = ("constant", "cosine", "noam")
OPTIMIZERS = {  # and the state that each of them keeps
    "adamw": "8 bytes a parameter",
    "adamw_8bit": "AdamW, its moments in 8 bits, 2 bytes",
    "adafactor": "a factored second moment and no first, next to none",
    "muon": "orthogonalized momentum for the matrices of the layers, 4 bytes, with updates of "
    "AdamW's size; AdamW for the rest",
}


def schedule(
    style: str,
    learning_rate: float,
    *,
    total_steps: int,
    warmup_steps: int = 0,
    min_lr: float = 1e-7,
    cosine_ignores_warmup: bool = False,
) -> optax.Schedule:
    """Returns the learning rate as a function of the update, counted from 0.

    All warm up linearly from 0 over `warmup_steps` (the first update of a warm-up has rate 0). Then
    "constant" stays; "cosine" falls to `min_lr` at `total_steps` (and follows the cosine beyond);
    "noam" falls with the square root of the remaining share to `min_lr`, where it stays.

    Args:
      cosine_ignores_warmup: as in the published code, "cosine" has its whole rate from the start.
    """
    span = learning_rate - min_lr

    def ramp(step):
        return jnp.minimum(1.0, step / warmup_steps) if warmup_steps else 1.0

    def cosine(step):
        warmup = 1.0 if cosine_ignores_warmup else ramp(step)
        return warmup * (min_lr + span * 0.5 * (1 + jnp.cos(math.pi * step / total_steps)))

    # Of "noam" only the warm-up is Vaswani et al.'s; the published code takes the root of what is
    # left of the run in place of the inverse root of the step.
    def noam(step):
        done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        decayed = min_lr + span * jnp.sqrt(jnp.clip(1 - done, 0.0, 1.0))
        return jnp.where(step < warmup_steps, learning_rate * ramp(step), decayed)

    styles = {"constant": lambda step: learning_rate * ramp(step), "cosine": cosine, "noam": noam}
    return styles[style]


def adamw(
    learning_rate: optax.Schedule,
    *,
    weight_decay: float,
    max_grad_norm: float,
    decay_mask: Any = None,
    b2: float = 0.999,
    seed: int = 0,
) -> optax.GradientTransformation:
    """Clips the global norm to `max_grad_norm`, then AdamW (0.9, b2, 1e-8), decoupled decay.

    The arguments are those of `make_optimizer`.
    """
    return make_optimizer(
        "adamw",
        learning_rate,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        decay_mask=decay_mask,
        b2=b2,
        seed=seed,
    )


def make_optimizer(
    name: str,
    learning_rate: optax.Schedule,
    *,
    weight_decay: float,
    max_grad_norm: float,
    decay_mask: Any = None,
    b2: float = 0.999,
    seed: int = 0,
    unpadded: Any = None,
) -> optax.GradientTransformation:
    """One of `OPTIMIZERS`. All clip the global norm of gradients to `max_grad_norm` first, and
    decay parameters, decoupled, by the learning rate.

    Of parameters in half precision the gradients are read, the moments kept and the updates made in
    float32, and the new parameters are rounded stochastically: an update that is smaller than the
    distance to the next number takes place with the probability that makes it right on average.

    Args:
      learning_rate: a function of the number of updates made; see `schedule`.
      decay_mask: tree of bools as the parameters, True where they decay; None: all of them.
      b2: decay rate of Adam's second moment.
      seed: of the stochastic rounding.
      unpadded: tree of arrays or shapes as the parameters, without the zeros that a mesh ends them
        with; None: they have none. AdamW does not need it.
    """
    preconditioners = {
        "adamw": lambda: scale_by_adam(0.9, b2),
        "adamw_8bit": lambda: scale_by_adam_8bit(0.9, b2, unpadded),
        "adafactor": lambda: scale_by_adafactor(unpadded),
        "muon": lambda: scale_by_muon(b2, unpadded),
    }
    # The order matters: gradients are clipped before Adam sees them, and the decay is multiplied by
    # the learning rate but not divided by the second moment (decoupled, arXiv 1711.05101).
    return optax.chain(
        optax.stateless(lambda gradients, _: optax.tree.cast(gradients, jnp.float32)),
        optax.clip_by_global_norm(max_grad_norm),
        preconditioners[name](),
        optax.add_decayed_weights(np.float32(weight_decay), decay_mask),  # times a float32
        optax.scale_by_learning_rate(learning_rate),
        round_stochastically(seed),
    )


class RoundingState(NamedTuple):
    """`count`: updates made, which decide the random numbers of the next."""

    count: jax.Array


def round_stochastically(seed: int) -> optax.GradientTransformation:
    """Updates after which a parameter in half precision is one of its two neighbours there, each
    with the probability that makes the mean exact. Other parameters' updates are as they were.

    The last of a chain: it looks at the parameters, and `optax.apply_updates` adds what it returns.
    The same count gives the same random numbers on any mesh on which a parameter has the same
    shape. They depend on the shape: a parameter that the tensor axis of a mesh pads (see
    `DecoderConfig.padded`) is rounded by other numbers, which leave the mean exact.
    """

    def init(params):
        return RoundingState(jnp.zeros((), jnp.int32))

    def update(updates, state, params):
        # From seed and count alone, so that a resumed run rounds as one that never stopped.
        key = jax.random.fold_in(jax.random.key(seed), state.count)
        leaves, structure = jax.tree.flatten(updates)
        current = structure.flatten_up_to(params)
        rounded = [
            change if param.dtype.itemsize >= 4 else _rounded(change, param, leaf_key)
            for change, param, leaf_key in zip(leaves, current, jax.random.split(key, len(leaves)))
        ]
        return structure.unflatten(rounded), RoundingState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


def _rounded(change: jax.Array, param: jax.Array, key: jax.Array) -> jax.Array:
    """The float32 distance from `param` to a neighbour, in its dtype, of `param + change`."""
    exact = param.astype(jnp.float32) + change.astype(jnp.float32)
    near = exact.astype(param.dtype)
    rest = exact - near.astype(jnp.float32)
    # The neighbour on the other side of the exact value.
    far = jnp.nextafter(near, jnp.where(rest > 0, jnp.inf, -jnp.inf).astype(param.dtype))
    gap = jnp.abs(far.astype(jnp.float32) - near.astype(jnp.float32))
    # P(far) = |exact - near| / gap, so that the mean is exact.
    further = jax.random.uniform(key, exact.shape) * gap < jnp.abs(rest)
    return jnp.where(further, far, near).astype(jnp.float32) - param.astype(jnp.float32)


def decay_mask(params: Any, *, decay_norms: bool = False) -> Any:
    """True where weight decay applies: matrices and embeddings, not biases, not norm scales.

    The published code lists its exceptions by GPT-2's names, so that the norm scales of other
    families are decayed: `decay_norms` says so.
    """

    def decayed(path, _):
        # A dict's key, or the attribute of a module that is a pytree itself.
        name = getattr(path[-1], "key", getattr(path[-1], "name", None))
        return name != "bias" and (decay_norms or name != "scale")

    return jax.tree_util.tree_map_with_path(decayed, params)


# Gradients of the micro-batches of an update, summed.


class Gradients(NamedTuple):
    """Gradients and sums of one micro-batch, or gradients summed over several.

    `by_group` has the gradient of every group of a train state's parameters that is trained; `loss`
    and `sums` are sums over the response tokens of each micro-batch: `[]`, stacked `[G]`.
    """

    by_group: dict[str, Any]
    loss: jax.Array
    sums: dict[str, jax.Array]


def accumulate(gradients_of: Callable[..., Gradients], micro_batches: Any) -> Gradients:
    """Sums gradients over micro-batches, one after the other (gradient accumulation).

    Gradients in half precision are summed in float32 and rounded once.

    Args:
      gradients_of: a function of one slice of every element of `micro_batches`.
      micro_batches: a tuple of pytrees with a leading axis G.

    Returns:
      Gradients with `loss` and `sums` stacked, `[G]`.
    """
    first = jax.tree.map(lambda x: x[0], micro_batches)  # without the axis G
    # G = 1: no loop, so that XLA may fuse the backward pass with the update.
    if jax.tree.leaves(micro_batches)[0].shape[0] == 1:
        gradients = gradients_of(*first)
        return gradients._replace(**jax.tree.map(lambda x: x[None], _measured(gradients)))

    # Traced once, for the shapes and for the loop.
    gradients_of = jax.jit(gradients_of, inline=True)

    def body(total, micro_batch):
        gradients = gradients_of(*micro_batch)
        return jax.tree.map(jnp.add, total, gradients.by_group), _measured(gradients)

    # float32 zeros: 256 + 1 is 256 in bfloat16, and many small gradients would be lost.
    shapes = jax.eval_shape(gradients_of, *first).by_group
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
    total, measured = jax.lax.scan(body, zeros, micro_batches)
    return Gradients(jax.tree.map(lambda x, like: x.astype(like.dtype), total, shapes), **measured)


def _measured(gradients: Gradients) -> dict[str, Any]:
    return {"loss": gradients.loss, "sums": gradients.sums}


def gradient_norm(gradients: Any) -> jax.Array:
    """The L2 norm of all gradients together, its squares summed in float32."""
    return optax.tree.norm(optax.tree.cast(gradients, jnp.float32))
