"""The published learning-rate schedules; AdamW and optimizers of less memory, with clipping and a
decay mask, which are right for parameters in half precision too; the sum of gradients over
micro-batches.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from promptkd_jax.distill.preconditioners import (
    Matrices,
    Preconditioner,
    adafactor,
    adam,
    adam_8bit,
    matrices,
    muon,
)
from promptkd_jax.infra import sharding

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


class OptimizerState(NamedTuple):
    """`count` of the updates made; `mu` and `nu`, the first and second moments: trees like the
    parameters, with None where a preconditioner keeps none."""

    count: jax.Array
    mu: Any
    nu: Any


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
    preconditioner = {
        "adamw": lambda: adam(0.9, b2),
        "adamw_8bit": lambda: adam_8bit(0.9, b2),
        "adafactor": adafactor,
        "muon": lambda: muon(b2),
    }[name]()

    def init(params):
        moments = jax.tree.map(preconditioner.init, params, matrices(params, unpadded))
        return OptimizerState(jnp.zeros((), jnp.int32), *_unzip(moments, params))

    def update(gradients, state, params):
        count = optax.safe_increment(state.count)
        norm, rate = gradient_norm(gradients), learning_rate(state.count)
        # From seed and count alone, so that a resumed run rounds as one that never stopped.
        key = jax.random.fold_in(jax.random.key(seed), state.count)

        def of_parameter(gradient, param, mu, nu, seen, decays, key):
            # The order matters: gradients are clipped before Adam sees them, and the decay is
            # multiplied by the learning rate but not divided by the second moment (decoupled, arXiv
            # 1711.05101).
            def of_slice(gradient, param, mu, nu, keys):
                gradient = gradient.astype(jnp.float32)
                clipped = gradient / norm * max_grad_norm
                gradient = jnp.where(norm < max_grad_norm, gradient, clipped)
                change, mu, nu = preconditioner.update(gradient, mu, nu, seen, count)
                if decays:
                    change += weight_decay * param.astype(jnp.float32)
                change *= -rate
                return change if keys is None else round_change(change, param, keys), mu, nu

            keys = rounding_keys(key, param)
            size = _slice_size(param, seen, preconditioner)
            return in_slices(of_slice, size, gradient, param, mu, nu, keys)

        leaves, structure = jax.tree.flatten(gradients)
        decays = jax.tree.map(lambda _: True, params) if decay_mask is None else decay_mask
        trees = params, state.mu, state.nu, matrices(gradients, unpadded), decays
        keys = jax.random.split(key, len(leaves))
        inputs = zip(leaves, *map(structure.flatten_up_to, trees), keys)
        updates, mu, nu = map(structure.unflatten, zip(*(of_parameter(*each) for each in inputs)))
        return updates, OptimizerState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _unzip(results: Any, like: Any) -> tuple[Any, ...]:
    """A tree like `like` of tuples as a tuple of trees."""
    structure = jax.tree.structure(like)
    return tuple(map(structure.unflatten, zip(*structure.flatten_up_to(results))))


# A parameter slice by slice. Where parameters and moments are of few bits, float32 of all of them
# would be most of what an update needs: XLA keeps gradients, moments, directions and changes of
# many parameters at once. Of an elementwise update it makes one kernel, which needs none of that.

SLICE = 2**24  # entries of the whole parameter, on all devices: 64 MB in float32


def _slice_size(param: jax.Array, seen: Matrices, preconditioner: Preconditioner) -> int | None:
    """Rows of the first axis, layers of a stack, that an update takes at a time; None: all."""
    # Of a mesh that is somebody else's nobody knows here which axes it cuts.
    if param.size <= SLICE or preconditioner.elementwise or sharding.mesh_is_external():
        return None
    # Of a parameter that is no stack, a mesh may cut the rows themselves.
    cut = sharding.axis_size("tensor") > 1 or not preconditioner.row_wise or param.ndim < 2
    if not seen.stack and cut:
        return None
    return max(1, SLICE * param.shape[0] // param.size)


def in_slices(function: Callable, size: int | None, *arrays: Any) -> Any:
    """Returns `function(*arrays)`, computed for some rows of the first axis at a time.

    Args:
      function: one of whose results no row depends on another row.
      size: rows at a time; None: all of them at once.
      arrays: pytrees of arrays with one first axis.
    """
    if size is None:
        return function(*arrays)
    total = jax.tree.leaves(arrays)[0].shape[0]

    # The last slice may overlap the one before it: both read the inputs alone, and agree.
    def body(index, results):
        start = jnp.minimum(index * size, total - size)
        own = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size), arrays)
        return jax.tree.map(
            lambda whole, part: jax.lax.dynamic_update_slice_in_dim(whole, part, start, 0),
            results,
            function(*own),
        )

    shapes = jax.eval_shape(function, *arrays)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.fori_loop(0, -(-total // size), body, zeros)


# Stochastic rounding


def rounding_keys(key: jax.Array, param: jax.Array) -> jax.Array | None:
    """A key for each row of the first axis of a parameter in half precision; None for others, which
    are not rounded.

    A parameter is rounded by the same random numbers whole, in slices, and on any mesh on which it
    has the same shape (with JAX's default generator); one that a mesh pads may be by others, which
    leave the mean exact.
    """
    if param.dtype.itemsize >= 4:
        return None
    return jax.random.split(key, param.shape[:1])


def round_change(change: jax.Array, param: jax.Array, keys: jax.Array) -> jax.Array:
    """The float32 distance from `param`, in half precision, to one of the two neighbours there of
    `param + change`, each with the probability that makes the mean exact.

    Args:
      keys: as `rounding_keys` makes them.
    """
    exact = param.astype(jnp.float32) + change
    near = exact.astype(param.dtype)
    rest = exact - near.astype(jnp.float32)
    # The neighbour on the other side of the exact value.
    far = jnp.nextafter(near, jnp.where(rest > 0, jnp.inf, -jnp.inf).astype(param.dtype))
    gap = jnp.abs(far.astype(jnp.float32) - near.astype(jnp.float32))
    # P(far) = |exact - near| / gap, so that the mean is exact.
    draw = functools.partial(jax.random.uniform, shape=exact.shape[1:])
    uniform = jax.vmap(draw)(keys) if exact.ndim else draw(keys)
    rounded = jnp.where(uniform * gap < jnp.abs(rest), far, near)
    return rounded.astype(jnp.float32) - param.astype(jnp.float32)


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
