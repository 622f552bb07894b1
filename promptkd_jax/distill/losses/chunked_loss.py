"""The divergences of `losses` without logits, on hidden states and heads.

`linear_loss` multiplies hidden states `[B, T, D]` with heads `[V, D]` a few positions at a time and
makes the gradients in the same pass, so that no `[B, T, V]` array exists. Dense losses are its
definition.

B batch, T positions, D width, V vocabulary, k kept tokens of a cached teacher.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from promptkd_jax.data.top_k import TopK, log_sum_of_others
from promptkd_jax.distill.losses.divergence import Divergence, log_probs, needs_whole
from promptkd_jax.distill.losses.loss_inputs import (
    check_inputs,
    check_values,
    is_part,
    shape_error,
)
from promptkd_jax.distill.losses.losses import cross_entropy
from promptkd_jax.distill.losses.transport import TokenKernel
from promptkd_jax.infra import sharding
from promptkd_jax.infra.sharding import constrain
from promptkd_jax.models.language_model import LazyLogits

if TYPE_CHECKING:
    from jaxtyping import Array, ArrayLike, Float, Int, Num

Observation = Callable[[Sequence[jax.Array], jax.Array], jax.Array]


def chunk_elements(platform: str) -> int:
    """Elements of one [B, chunk, V] block of logits on one device: 32 MiB in float32 on a CPU; 128
    where reading the head for every block takes as long as multiplying some hundred positions."""
    return 2**23 if platform == "cpu" else 2**25


def apply_divergence(function: Divergence, target: Any, logits: jax.Array) -> jax.Array:
    """Returns `function(target, logits)` per position; each `TopK` of the target becomes logits
    first, with its tail divided as the learner's (`TopK.logits`).

    Raises:
      ValueError: a function that needs the whole distribution, and a `TopK` that has not got it.
    """

    def whole(part):
        if not isinstance(part, TopK):
            return part
        k, vocab_size = part.ids.shape[-1], logits.shape[-1]
        if not needs_whole(function) or k == vocab_size:
            return part.logits(logits)
        raise ValueError(
            f"a divergence at a temperature, with a token weighting, of a mixture with alpha other "
            f"than -1, or that weighs tokens, and a TopK of {k} of {vocab_size} tokens: it needs "
            "the whole distribution; expected another divergence, or LazyLogits"
        )

    return function(jax.tree.map(whole, target, is_leaf=lambda x: isinstance(x, TopK)), logits)


def linear_loss(
    terms: Sequence[Divergence],
    learner: LazyLogits,
    targets: Sequence[Any],
    mask: Num[ArrayLike, "B T"] | Sequence[Sequence[float]],
    weights: Float[Array, " terms"] | Sequence[float] | None = None,
    *,
    observe: Sequence[Observation] = (),
    chunk: int | None = None,
) -> tuple[Float[Array, ""], Float[Array, " sums"]]:
    """Sums weighted per-position losses over the masked positions, `chunk` positions at a time.

    Equals `sum_i weights[i] * (mask * terms[i](targets[i], learner.logits())).sum()` in value and
    in gradient with respect to the learner's hidden states and, only where it is asked for, the
    learner's head. The targets are constants. Where the mask is 0 nothing is looked at: NaN there,
    or a label of -100, changes neither value nor gradient.

    Args:
      terms: functions of (target, learner logits), each `[B, T]`; see `DIVERGENCES`.
      learner: hidden states and head of the model that is trained.
      targets: one per term, then any that `observe` alone reads; each a `LazyLogits`, a `TopK`,
        integer labels `[B, T]` for `cross_entropy`, or any tree of these and of arrays
        `[B, T, …]` that the term knows how to read. The same LazyLogits given twice is multiplied
        out once.
      mask: `[B, T]`, an array or lists; positions that count, possibly weighted.
      weights: `[len(terms)]`; 1 for each where absent. May be traced.
      observe: functions of (targets, learner logits), each `[B, T]`, of which only the masked sum
        is wanted; they get the same logits as the terms (and a `TopK` itself).
      chunk: positions in one block of a device; by default as many as keep its logits below
        `chunk_elements`. Positions with mask 0 cost nothing: each device has those of its own rows
        that count in as few blocks as they fill.

    Returns:
      (loss, sums): the scalar loss, and the unweighted masked sum of each term, then of each
      observation, `[len(terms) + len(observe)]`, which carry no gradient. All are sums: divide by
      `mask.sum()` (over all devices and micro-batches) for a mean.

    Raises:
      ValueError: shapes that do not belong together (also when traced); fewer targets than terms;
        a `TopK` where the whole distribution is needed; untraced, where the mask is not 0:
        `log_probs` of a `TopK` that are no log-probabilities, its ids or labels of
        `cross_entropy` outside [0, V).
    """
    if not terms:
        raise ValueError("no terms; expected at least one (linear_values measures without a loss)")
    check_inputs(learner, targets)
    if len(terms) > len(targets):
        raise ValueError(f"{len(terms)} terms need as many targets, got {len(targets)}")
    if np.shape(mask) != learner.hidden.shape[:2]:
        raise ValueError(shape_error("mask", np.shape(mask), learner))
    check_values(terms, targets, mask, learner.head.shape[0])
    weights = jnp.ones(len(terms)) if weights is None else jnp.asarray(weights, jnp.float32)
    if weights.shape != (len(terms),):
        raise ValueError(f"weights: {list(weights.shape)}; expected one per term, [{len(terms)}]")
    # By identity: the teacher of several terms is one object, whose head is multiplied once. Equal
    # arrays in two objects are not compared, and traced ones could not be.
    leaves, tree = jax.tree.flatten(list(targets), is_leaf=is_part)
    different = {id(leaf): leaf for leaf in leaves}
    order = tuple(list(different).index(id(leaf)) for leaf in leaves)
    learner, *targets = _gathered([learner, *different.values()])
    # From here on B are the devices of the rows, and T the positions of all rows of a device; on an
    # external mesh, where `_packed` changes nothing, rows and positions as before.
    learner, targets, mask = _packed(learner, targets, jnp.asarray(mask, jnp.float32))
    chunk = _block_size(chunk, mask.shape, learner.head.shape[0])
    constants = jax.lax.stop_gradient((tuple(targets), mask, weights))
    functions = _Functions(tuple(terms), tuple(observe), order, tree)
    # Of sums no gradient is wanted: so the backward pass has one cotangent, a scalar.
    loss, sums = _linear_loss(functions, chunk, learner, *constants)
    return loss, jax.lax.stop_gradient(sums)


def linear_values(
    functions: Sequence[Divergence],
    learner: LazyLogits,
    targets: Sequence[Any],
    *,
    chunk: int | None = None,
) -> tuple[Float[Array, "B T"], ...]:
    """Returns each function's value at every position, `[B, T]`, a block of positions at a time.

    Args:
      functions, learner, targets, chunk: as for `linear_loss`.

    Returns:
      One array per function. They carry no gradient.

    Raises:
      ValueError: as `linear_loss`.
    """
    check_inputs(learner, targets)
    if len(functions) != len(targets):
        raise ValueError(f"{len(functions)} functions need as many targets, got {len(targets)}")
    leaves, tree = jax.tree.flatten(list(targets), is_leaf=is_part)
    learner, *leaves = _gathered(jax.lax.stop_gradient([learner, *leaves]))
    shape = learner.hidden.shape[:2]
    chunk = _block_size(chunk, shape, learner.head.shape[0])
    parts, join = _sequences(leaves)

    def body(_, block):
        hidden, parts = block
        logits = learner.replace(hidden=hidden).logits()
        references = tree.unflatten(_references(join(parts)))
        values = [apply_divergence(f, t, logits) for f, t in zip(functions, references)]
        return None, [_per_position(value, hidden.shape[:2]) for value in values]

    _, values = jax.lax.scan(body, None, _blocks((learner.hidden, parts), chunk))
    return tuple(_unblocked(value, shape[1]) for value in values)


def label_log_probs(
    model: LazyLogits, labels: Int[Array, "B T"], *, chunk: int | None = None
) -> Float[Array, "B T"]:
    """Returns the log-probability of every label, without a gradient.

    Args:
      model: distributions at `[B, T]` positions; labels: `[B, T]`; chunk: as for `linear_loss`.
    """
    (values,) = linear_values([cross_entropy], model, [labels], chunk=chunk)
    return -values


def top_k(model: LazyLogits, k: int) -> TopK:
    """Returns the k most likely tokens at every position `[B, T, k]`, the likeliest first: a
    teacher's distributions in the form that is kept on disk, or sent.

    Log-probabilities are computed in float32 over all V tokens, and that of the tail is summed
    before anything is rounded to 1, a few positions at a time: no `[B, T, V]` array exists.

    Raises:
      ValueError: k is not in [1, V].
    """
    check_inputs(model, [])
    rows, vocab_size = model.hidden.shape[0], model.head.shape[0]
    if not 1 <= k <= vocab_size:
        raise ValueError(f"k: {k}; expected 1 to {vocab_size}, the model's vocabulary")
    (model,) = _gathered([model])

    def body(_, hidden):  # [B, chunk, D]
        everything = log_probs(model.replace(hidden=hidden).logits())
        values, ids = jax.lax.top_k(everything, k)
        return None, TopK(ids, values, log_sum_of_others(everything, ids))

    length = model.hidden.shape[1]
    blocks = _blocks(model.hidden, _block_size(None, (rows, length), vocab_size))
    return jax.tree.map(lambda x: _unblocked(x, length), jax.lax.scan(body, None, blocks)[1])


def _block_size(chunk: int | None, shape: tuple[int, int], vocab_size: int) -> int:
    """The positions of a block, of `shape` `[B, T]`: `chunk`, or as many as `chunk_elements`
    allows, in blocks of even size; a multiple of `tensor` where that cuts positions."""
    (rows, length), tensor = shape, sharding.axis_size("tensor")
    parts = sharding.num_row_shards(rows) * tensor
    most = max(chunk_elements(sharding.platform()) // max(rows * vocab_size // parts, 1), 1)
    size = -(-length // -(-length // most))
    size = size if sharding.vocabulary_axis(vocab_size) else -(-size // tensor) * tensor
    return min(max(chunk, 1), length) if chunk else size


class _Functions(NamedTuple):
    """The static arguments of a loss; `order` has for each leaf of the given targets its place
    among the different ones, `tree` their structure."""

    terms: tuple[Divergence, ...]
    observe: tuple[Observation, ...]
    order: tuple[int, ...]
    tree: Any

    @property
    def num_sums(self) -> int:
        return len(self.terms) + len(self.observe)


def _block_loss(functions: _Functions, learner: LazyLogits, targets, mask, weights):
    """Loss and sums of one block of positions.

    Positions that do not count are selected away twice: from the arguments of the functions, since
    0 times the gradient of a NaN is NaN, and from their values.
    """
    terms, observe, order, tree = functions
    counts = mask != 0

    def counted(x):
        return jnp.where(jnp.expand_dims(counts, range(2, x.ndim)), x, 0)

    def total(values):
        return jnp.sum(counted(_per_position(values, mask.shape)) * mask)

    # Each different target once, [B, chunk, V]; `order` and `tree` put it where it was given.
    parts, join = _sequences(targets)
    logits = learner.replace(hidden=counted(learner.hidden)).logits()
    different = _references(join(jax.tree.map(counted, parts)))
    references = tree.unflatten([different[i] for i in order])
    sums = jnp.stack([total(apply_divergence(f, t, logits)) for f, t in zip(terms, references)])
    constant = jax.lax.stop_gradient(logits)
    observed = [total(f(references, constant)) for f in observe]
    return sums @ weights, jnp.stack([*sums, *observed])


def _per_position(values: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """`values` themselves. Raises ValueError where they are not one number for each position of
    `shape`, `[B, T]`."""
    if values.shape != shape:
        raise ValueError(
            f"a function gave {list(values.shape)} for {shape[0]} rows of {shape[1]} positions; "
            f"expected one number for each, {list(shape)}, not summed and not averaged"
        )
    return values


def _gathered(models):
    """Heads not cut along their width, so that not every block of positions has to gather them."""
    return [
        m.replace(head=_placed_head(m.head)) if isinstance(m, LazyLogits) else m for m in models
    ]


def _placed_head(head: jax.Array) -> jax.Array:
    """A head `[V, D]`, or its gradient, where the logits want it."""
    return constrain(head, sharding.vocabulary_axis(head.shape[0]), None)


def _packed(learner: LazyLogits, targets: Sequence[Any], mask: jax.Array):
    """All `[B, T, …]` as `[devices, B T / devices, …]`, positions that count before all others; on
    a mesh that is not the package's own as they are."""
    if sharding.mesh_is_external():
        return learner, targets, mask
    # Responses end early in most rows: with all positions of a device's rows in one sequence, those
    # that count first, `_scan_filled` stops at the last one instead of at the longest row.
    devices = sharding.num_row_shards(mask.shape[0])
    counts = mask.reshape(devices, -1) != 0  # [devices, B T / devices]
    order = jnp.argsort(~counts, axis=1, stable=True)

    def pack(x):
        return sharding.take_local_rows(x.reshape(-1, *x.shape[2:]), order)

    parts, join = _sequences(targets)
    hidden, parts, mask = jax.tree.map(pack, (learner.hidden, parts, mask))
    return learner.replace(hidden=hidden), join(parts), mask


def _references(targets):
    return [t.logits() if isinstance(t, LazyLogits) else t for t in targets]


def _blocks(tree: Any, chunk: int) -> Any:
    """Every `[B, T, …]` as `[ceil(T / chunk), B, chunk, …]`, filled up with zeros."""

    def split(x):
        x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % chunk)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

    return jax.tree.map(split, tree)


def _unblocked(blocks: jax.Array, length: int) -> jax.Array:
    """The inverse of `_blocks`: `[blocks, B, chunk, …]` as `[B, length, …]`."""
    whole = jnp.moveaxis(blocks, 0, 1)
    return whole.reshape(whole.shape[0], -1, *whole.shape[3:])[:, :length]


def _sequences(targets):
    """The arrays of the targets that run along T, and a function that makes targets of such arrays
    again, with the same heads and kernels."""

    def part_of(target):
        if isinstance(target, TokenKernel):
            return None
        return target.hidden if isinstance(target, LazyLogits) else target

    def joined(target, part):
        if isinstance(target, TokenKernel):
            return target
        return target.replace(hidden=part) if isinstance(target, LazyLogits) else part

    return list(map(part_of, targets)), lambda parts: list(map(joined, targets, parts))


def _scan_filled(body, carry, xs: tuple, chunk: int, like: jax.Array | None = None):
    """`jax.lax.scan` over the blocks of `xs`, whose last is the mask, up to the last position that
    counts.

    Args:
      like: an array of the shape and dtype of all blocks' outputs; None where `body` has none.

    Returns:
      (carry, the outputs of all blocks put together, with zeros behind the last).
    """
    *_, mask = xs
    # [], of the fullest device: all go through as many blocks. It is known at run time alone, so
    # that this is no `scan`, and outputs are written into `whole` block by block.
    filled = jnp.max(jnp.where(mask != 0, jnp.arange(1, mask.shape[1] + 1), 0))
    blocks = _blocks(xs, chunk)
    whole = None if like is None else _blocks(jnp.zeros_like(like), chunk)

    def turn(i, state):
        carry, whole = state
        block = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), blocks)
        carry, output = body(carry, block)
        if whole is not None:
            whole = jax.lax.dynamic_update_index_in_dim(whole, output, i, 0)
        return carry, whole

    carry, whole = jax.lax.fori_loop(0, -(-filled // chunk), turn, (carry, whole))
    return carry, None if whole is None else _unblocked(whole, mask.shape[1])


# The chunked loss. Of one block of `chunk` of the T positions, with hidden states h [B, chunk, D],
# a head W [V, D] and logits z = h Wᵀ [B, chunk, V] (capped, where a model caps them), targets t, a
# mask m and weights w:
#
#     loss += Σ m · Σ_j w_j f_j(t, z)        dz = ∂loss/∂z   [B, chunk, V]
#     dh    = dz W    [B, chunk, D]          dW += dzᵀ h     [V, D]
#
# dz can only be computed while z is there, and z is what must not be kept. So the forward pass of
# the custom VJP computes dh and dW in the same scan as the loss and keeps these two in place of any
# logits; the backward pass multiplies them by the cotangent of the loss, which is a scalar. The
# weights are inside of the sum, so that several terms cost one pass.
#
# `symbolic_zeros` tells the forward pass, by `head.perturbed`, whether anybody will ask for dW: for
# the soft prompt's loss the head is a constant, and there is no [V, D] array of its gradient.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _linear_loss(functions: _Functions, chunk: int, learner, targets, mask, weights):
    parts, join = _sequences(targets)

    def body(total, block):
        hidden, parts, mask = block
        block = learner.replace(hidden=hidden)
        loss, sums = _block_loss(functions, block, join(parts), mask, weights)
        return (total[0] + loss, total[1] + sums), None

    zero = (jnp.zeros(()), jnp.zeros(functions.num_sums))
    return _scan_filled(body, zero, (learner.hidden, parts, mask), chunk)[0]


def _linear_loss_fwd(functions: _Functions, chunk: int, learner, targets, mask, weights):
    """Values and, in the same scan, the gradients that the backward pass will need."""
    with_head = learner.head.perturbed
    learner, targets, mask, weights = jax.tree.map(
        lambda x: x.value, (learner, targets, mask, weights), is_leaf=lambda x: hasattr(x, "value")
    )
    parts, join = _sequences(targets)

    def body(carry, block):
        total, sums, head_gradient = carry  # [], [terms + observations], [V, D] or None
        hidden, parts, mask = block  # [B, chunk, D], [B, chunk, …], [B, chunk]

        def loss(hidden, head):
            block = learner.replace(hidden=hidden, head=head)
            return _block_loss(functions, block, join(parts), mask, weights)

        if with_head:
            gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
            (value, block_sums), (d_hidden, d_head) = gradient(hidden, learner.head)
            head_gradient = head_gradient + d_head.astype(jnp.float32)
            head_gradient = _placed_head(head_gradient)
        else:
            gradient = jax.value_and_grad(loss, has_aux=True)
            (value, block_sums), d_hidden = gradient(hidden, learner.head)
        return (total + value, sums + block_sums, head_gradient), d_hidden

    zero_head = jnp.zeros(learner.head.shape, jnp.float32) if with_head else None
    carry = (jnp.zeros(()), jnp.zeros(functions.num_sums), zero_head)
    (total, sums, d_head), d_hidden = _scan_filled(
        body, carry, (learner.hidden, parts, mask), chunk, like=learner.hidden
    )
    like_head = jnp.zeros((0,), learner.head.dtype)  # residuals are arrays: this one is a dtype
    return (total, sums), (learner.replace(hidden=d_hidden, head=d_head), like_head)


def _linear_loss_bwd(functions, chunk, residuals, cotangents):
    gradient, like_head = residuals
    # Of (loss, sums): `linear_loss` stops the gradient of the sums, whose cotangent is 0.
    scale = cotangents[0]
    d_hidden, d_head = gradient.hidden, gradient.head
    d_hidden = (d_hidden * scale).astype(d_hidden.dtype)
    d_head = None if d_head is None else (d_head * scale).astype(like_head.dtype)
    return gradient.replace(hidden=d_hidden, head=d_head), None, None, None


_linear_loss.defvjp(_linear_loss_fwd, _linear_loss_bwd, symbolic_zeros=True)
