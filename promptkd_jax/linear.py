"""The divergences of `losses` without logits, on hidden states and heads.

`linear_loss` multiplies hidden states `[B, T, D]` with heads `[V, D]` a few positions at a time and
makes the gradients in the same pass, so that no `[B, T, V]` array exists. Dense losses are its
definition.

B batch, T positions, D width, V vocabulary, k kept tokens of a cached teacher.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from promptkd_jax import sharding
from promptkd_jax.losses import Divergence
from promptkd_jax.sharding import ROWS, constrain

Observation = Callable[[Sequence[jax.Array], jax.Array], jax.Array]


def chunk_elements(platform: str) -> int:
    """Elements of one [B, chunk, V] block of logits on one device: 32 MiB in float32, 128 on a GPU,
    where reading the head for every block takes as long as multiplying some hundred positions."""
    return 2**25 if platform == "gpu" else 2**23


class Linear(NamedTuple):
    """Logits not yet multiplied out: hidden `[B, T, D]` and head `[V, D]`."""

    hidden: jax.Array
    head: jax.Array

    def logits(self) -> jax.Array:
        """hidden @ head^T, `[B, T, V]`."""
        head = self.head.astype(self.hidden.dtype)
        # Rounded to half precision, logits would be off by more than a soft prompt moves them.
        logits = jnp.einsum("btd,vd->btv", self.hidden, head, preferred_element_type=jnp.float32)
        # Changes nothing, but XLA's CPU compiler does not make one kernel of the product and what
        # reads it, which for some shapes takes three times as long as the two.
        logits = jax.lax.reduce_precision(logits, exponent_bits=8, mantissa_bits=23)
        return constrain(logits, ROWS, None, "tensor")


class TopK(NamedTuple):
    """A distribution as a cache keeps it: its k largest `log_probs` and their `ids`, `[B, T, k]`,
    the largest first.

    All other tokens are one bucket, the tail. Distributions are compared in these k + 1 buckets,
    which bounds their KL divergence from below; with k = V nothing is lost.
    """

    ids: jax.Array
    log_probs: jax.Array

    def buckets(self, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        """This distribution and that of `logits` `[..., V]`, both as logits of the buckets."""
        kept = jnp.take_along_axis(logits, self.ids, axis=-1)
        if self.ids.shape[-1] == logits.shape[-1]:
            return self.log_probs, kept
        left = 1 - jnp.sum(jnp.exp(self.log_probs), axis=-1, keepdims=True)
        tail = jnp.where(left > 0, jnp.log(jnp.where(left > 0, left, 1.0)), -jnp.inf)
        rest = jnp.put_along_axis(logits, self.ids, -jnp.inf, axis=-1, inplace=False)
        rest = jax.nn.logsumexp(rest, axis=-1, keepdims=True)
        return jnp.concatenate([self.log_probs, tail], -1), jnp.concatenate([kept, rest], -1)


def compare(function: Divergence, target: Any, logits: jax.Array) -> jax.Array:
    """`function(target, logits)` per position; with a `TopK` target in its buckets."""
    if isinstance(target, TopK):
        return function(*target.buckets(logits))
    return function(target, logits)


def linear_loss(
    terms: Sequence[Divergence],
    learner: Linear,
    targets: Sequence[Any],
    mask: jax.Array,
    weights: jax.Array | Sequence[float] | None = None,
    *,
    observe: Sequence[Observation] = (),
    chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Weighted sum of per-position losses over the masked positions, `chunk` positions at a time.

    Equals `sum_i weights[i] * (mask * terms[i](targets[i], learner.logits())).sum()` in value and
    in gradient with respect to the learner's hidden states and, only where it is asked for, the
    learner's head. The targets are constants.

    Args:
      terms: functions of (target, learner logits), each `[B, T]`; see `DIVERGENCES`.
      learner: hidden states and head of the model that is trained.
      targets: one per term: a `Linear`, a `TopK`, integer labels `[B, T]` for `cross_entropy`, or
        any tree of arrays `[B, T, …]` that the term knows how to read. More than there are terms:
        for the observations alone. One that stands there twice is multiplied out once.
      mask: `[B, T]`; positions that count, possibly weighted.
      weights: `[len(terms)]`; 1 for each where absent. May be traced.
      observe: functions of (targets, learner logits), each `[B, T]`, of which only the masked sum
        is wanted; they see the same logits that the terms see (and a `TopK` as it is).
      chunk: positions in one block of a device; by default as many as keep its logits below
        `chunk_elements`. Positions with mask 0 cost nothing: each device has those of its own rows
        that count in as few blocks as they fill.

    Returns:
      (loss, sums): the scalar loss, and the unweighted masked sum of each term, then of each
      observation, `[len(terms) + len(observe)]`, which carry no gradient. All are sums: divide by
      `mask.sum()` (over all devices and micro-batches) for a mean.
    """
    if not terms:
        raise ValueError("no terms; expected at least one (linear_values measures without a loss)")
    if len(terms) > len(targets):
        raise ValueError(f"{len(terms)} terms need as many targets, got {len(targets)}")
    weights = jnp.ones(len(terms)) if weights is None else jnp.asarray(weights, jnp.float32)
    different = {id(target): target for target in targets}
    order = tuple(list(different).index(id(target)) for target in targets)
    learner, *targets = _gathered([learner, *different.values()])
    learner, targets, mask = _packed(learner, targets, mask.astype(jnp.float32))
    chunk = chunk or _default_chunk(mask.shape, learner.head.shape[0])
    chunk = min(max(chunk, 1), mask.shape[1])
    constants = jax.lax.stop_gradient((tuple(targets), mask, weights))
    functions = (tuple(terms), tuple(observe), order)
    loss, sums = _linear_loss(functions, chunk, learner, *constants)
    return loss, jax.lax.stop_gradient(sums)


def linear_values(
    functions: Sequence[Divergence],
    learner: Linear,
    targets: Sequence[Any],
    *,
    chunk: int | None = None,
) -> tuple[jax.Array, ...]:
    """Each function's value at every position, `[B, T]`, a block of positions at a time.

    Args:
      functions, learner, targets, chunk: as for `linear_loss`.

    Returns:
      One array per function. They carry no gradient.
    """
    learner, *targets = _gathered(jax.lax.stop_gradient([learner, *targets]))
    shape = learner.hidden.shape[:2]
    chunk = min(chunk or _default_chunk(shape, learner.head.shape[0]), shape[1])
    parts, join = _sequences(targets)

    def body(_, block):
        hidden, parts = block
        logits = Linear(hidden, learner.head).logits()
        references = _references(join(parts))
        return None, [compare(f, t, logits) for f, t in zip(functions, references)]

    _, values = jax.lax.scan(body, None, _blocks((learner.hidden, parts), chunk))
    return tuple(_unblocked(value, shape[1]) for value in values)


def _default_chunk(shape: tuple[int, int], vocab_size: int) -> int:
    """As many positions as `chunk_elements` allows, in blocks of even size: little is filled up."""
    rows, length = shape
    parts = sharding.row_parts(rows) * sharding.parts("tensor")
    most = max(chunk_elements(sharding.platform()) // max(rows * vocab_size // parts, 1), 1)
    blocks = -(-length // most)
    return -(-length // blocks)


def _block_loss(functions, learner: Linear, targets, mask, weights):
    """Loss and sums of one block of positions."""
    terms, observe, order = functions
    logits = learner.logits()
    different = _references(targets)
    references = [different[i] for i in order]
    sums = jnp.stack([jnp.sum(compare(f, t, logits) * mask) for f, t in zip(terms, references)])
    constant = jax.lax.stop_gradient(logits)
    observed = [jnp.sum(f(references, constant) * mask) for f in observe]
    return sums @ weights, jnp.stack([*sums, *observed])


def _gathered(models):
    """Heads not cut along their width, so that not every block of positions has to gather them."""
    return [
        m._replace(head=constrain(m.head, "tensor", None)) if isinstance(m, Linear) else m
        for m in models
    ]


def _packed(learner: Linear, targets: Sequence[Any], mask: jax.Array):
    """All `[B, T, …]` as `[devices, B / devices * T, …]`, what counts before all else. On somebody
    else's mesh they stay as they are."""
    if sharding.is_foreign():
        return learner, targets, mask
    counts = mask.reshape(sharding.row_parts(mask.shape[0]), -1) != 0
    order = jnp.argsort(~counts, axis=1, stable=True)

    def pack(x):
        return sharding.take_own(x.reshape(-1, *x.shape[2:]), order)

    parts, join = _sequences(targets)
    hidden, parts, mask = jax.tree.map(pack, (learner.hidden, parts, mask))
    return Linear(hidden, learner.head), join(parts), mask


def _references(targets):
    return [t.logits() if isinstance(t, Linear) else t for t in targets]


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
    """What of the targets runs along T, and how to put a target together again."""
    parts = [t.hidden if isinstance(t, Linear) else t for t in targets]

    def join(parts):
        return [
            Linear(part, t.head) if isinstance(t, Linear) else part
            for part, t in zip(parts, targets)
        ]

    return parts, join


def _scan_filled(body, carry, xs: tuple, chunk: int, like: jax.Array | None = None):
    """`jax.lax.scan` over the blocks of `xs`, whose last is the mask, up to the last position that
    counts: (carry, what `body` says of each block put together, zeros behind it).

    Args:
      like: of the shape and dtype of what is put together; None where that is nothing.
    """
    *_, mask = xs
    filled = jnp.max(jnp.where(mask != 0, jnp.arange(1, mask.shape[1] + 1), 0))
    blocks = _blocks(xs, chunk)
    whole = None if like is None else _blocks(jnp.zeros_like(like), chunk)

    def turn(i, state):
        carry, whole = state
        block = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), blocks)
        carry, found = body(carry, block)
        if whole is not None:
            whole = jax.lax.dynamic_update_index_in_dim(whole, found, i, 0)
        return carry, whole

    carry, whole = jax.lax.fori_loop(0, -(-filled // chunk), turn, (carry, whole))
    return carry, None if whole is None else _unblocked(whole, mask.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _linear_loss(functions, chunk, learner, targets, mask, weights):
    parts, join = _sequences(targets)

    def body(total, block):
        hidden, parts, mask = block
        loss, sums = _block_loss(
            functions, Linear(hidden, learner.head), join(parts), mask, weights
        )
        return (total[0] + loss, total[1] + sums), None

    zero = (jnp.zeros(()), jnp.zeros(len(functions[0]) + len(functions[1])))
    return _scan_filled(body, zero, (learner.hidden, parts, mask), chunk)[0]


def _linear_loss_fwd(functions, chunk, learner, targets, mask, weights):
    """Values and, in the same scan, the gradients that somebody will ask for."""
    with_head = learner.head.perturbed
    learner, targets, mask, weights = jax.tree.map(
        lambda x: x.value, (learner, targets, mask, weights), is_leaf=lambda x: hasattr(x, "value")
    )
    parts, join = _sequences(targets)

    def body(carry, block):
        total, sums, head_gradient = carry
        hidden, parts, mask = block

        def loss(hidden, head):
            return _block_loss(functions, Linear(hidden, head), join(parts), mask, weights)

        if with_head:
            gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
            (value, block_sums), (d_hidden, d_head) = gradient(hidden, learner.head)
            head_gradient = head_gradient + d_head.astype(jnp.float32)
            head_gradient = constrain(head_gradient, "tensor", None)
        else:
            gradient = jax.value_and_grad(loss, has_aux=True)
            (value, block_sums), d_hidden = gradient(hidden, learner.head)
        return (total + value, sums + block_sums, head_gradient), d_hidden

    zero_head = jnp.zeros(learner.head.shape, jnp.float32) if with_head else None
    carry = (jnp.zeros(()), jnp.zeros(len(functions[0]) + len(functions[1])), zero_head)
    (total, sums, d_head), d_hidden = _scan_filled(
        body, carry, (learner.hidden, parts, mask), chunk, like=learner.hidden
    )
    like_head = jnp.zeros((0,), learner.head.dtype)  # a residual can carry a dtype only so
    return (total, sums), (d_hidden, d_head, like_head)


def _linear_loss_bwd(functions, chunk, residuals, cotangents):
    d_hidden, d_head, like_head = residuals
    scale = cotangents[0]
    d_hidden = (d_hidden * scale).astype(d_hidden.dtype)
    d_head = None if d_head is None else (d_head * scale).astype(like_head.dtype)
    return Linear(d_hidden, d_head), None, None, None


_linear_loss.defvjp(_linear_loss_fwd, _linear_loss_bwd, symbolic_zeros=True)
