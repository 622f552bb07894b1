"""The Sinkhorn divergence of the teacher from a mixture of both, over costs between tokens: WASD
(arXiv 2610.07706).

Mass moves between tokens whose embeddings are near. With the mixture r (`log_mixture`), the costs C
and K = exp(-C / epsilon), the potentials f, g of entropic transport between r and p satisfy

    f = -epsilon log K (p e^(g / epsilon)),      g = -epsilon log K (r e^(f / epsilon))

and the divergence is S(r, p) = r.(f - f_rr) + p.(g - f_pp), f_rr and f_pp those of r and p to
themselves. Its derivative by r is f - f_rr (envelope theorem): only r is differentiated.

V vocabulary, n tokens that have up to w neighbours.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from promptkd_jax.distill.losses.divergence import (
    SHARE,
    finite_log,
    log_mixture,
    log_pair,
    log_probs,
)
from promptkd_jax.infra.specs import Choice, Float, Int, field, validate

if TYPE_CHECKING:
    from jaxtyping import Array
    from jaxtyping import Float as Floats
    from jaxtyping import Int as Ints

FORMS = {
    "released": "as in the released code, where f has an extra epsilon log r: the divergence less "
    "epsilon times the entropy of r, and so not least at r = p",
    "debiased": "the divergence itself, both sides treated alike: 0 and least at r = p",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transport:
    """WASD's settings, as released for GPT-2."""

    form: str = field("released", Choice(FORMS), "which of the two losses")
    epsilon: float = field(0.001, Float(low=0.0, open_low=True), "of the entropy, cosine distance")
    neighbours: int = field(8, Int(low=1), "nearest tokens that a token's mass can go to")
    iterations: int = field(10, Int(low=1, high=1000), "of Sinkhorn's algorithm")
    alpha: float = field(-5.0, Float(), "of the mixture r, see divergence.log_mixture")
    share: float = field(0.5, SHARE, "of the teacher in the mixture")

    def __post_init__(self):
        validate(self)


class Neighbours(NamedTuple):
    """Tokens `ids` `[n]` and the entries of K in their rows, beside the diagonal: the logarithms
    `log_entries` `[n, w]` in `columns` `[n, w]`, filled up with -inf."""

    ids: Ints[Array, " n"]
    columns: Ints[Array, "n w"]
    log_entries: Floats[Array, "n w"]


@flax.struct.dataclass
class TokenKernel:
    """K, symmetric, 1 on the diagonal: the tokens that have neighbours, in groups of about as many,
    so that little is filled up. A token that is in none is alone."""

    groups: tuple[Neighbours, ...]
    vocab_size: int = flax.struct.field(pytree_node=False)

    @property
    def num_tokens(self) -> int:
        """Of those that have neighbours."""
        return sum(len(group.ids) for group in self.groups)


def token_kernel(embeddings: Floats[Array, "V D"], settings: Transport) -> TokenKernel:
    """Returns exp(-C / epsilon) of the nearest tokens by C, 1 - the cosine of their embeddings.

    A pair counts if one of both is among the other's `settings.neighbours`. Entries below the
    smallest float32 (C > 103 epsilon) are left out, as they are 0 in the released code.

    Args:
      embeddings: `[V, D]`, the teacher's input embeddings of the shared vocabulary.
    """
    x = embeddings.astype(jnp.float32)
    x = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
    vocab_size = x.shape[0]
    number, block = min(settings.neighbours, vocab_size - 1), min(512, vocab_size)

    entries: list[dict[int, float]] = [{} for _ in range(vocab_size)]  # of each row, by column
    for first in range(0, vocab_size, block):
        first = min(first, vocab_size - block)  # the last block may overlap the one before it
        cosines, ids = map(np.asarray, _nearest(x, first, block, number))  # [block, number]
        values = np.minimum((cosines.astype(np.float64) - 1) / settings.epsilon, 0)
        # Either of a pair may have the other among its nearest: the larger entry of both counts, so
        # that K is symmetric, as potentials of r to p and of p to r must have one K.
        live = values > np.log(np.finfo(np.float32).smallest_subnormal)
        for row, place in zip(*np.nonzero(live)):
            i, j, value = first + int(row), int(ids[row, place]), float(values[row, place])
            entries[i][j] = entries[j][i] = max(value, entries[i].get(j, -np.inf))
    return TokenKernel(_grouped(entries), vocab_size)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _nearest(x: jax.Array, first: int, block: int, number: int) -> tuple[jax.Array, jax.Array]:
    """The cosines and ids `[block, number]` of the tokens nearest to each of those from `first` on,
    without itself; x `[V, D]`, of length 1 each."""
    # In all digits of float32. By default a GPU multiplies in TF32 and a TPU in bfloat16, with
    # errors of 1e-3 and more: at epsilon 0.001, a factor of e in the kernel.
    rows = jax.lax.dynamic_slice_in_dim(x, first, block)
    near = jnp.matmul(rows, x.T, precision="highest")
    own = first + jnp.arange(block)
    return jax.lax.top_k(near.at[jnp.arange(block), own].set(-jnp.inf), number)


def _grouped(entries: Sequence[Mapping[int, float]]) -> tuple[Neighbours, ...]:
    """The rows of a kernel that have entries, up to 1, 2, 4, … of them in one group."""
    groups = {}
    for i, row in enumerate(entries):
        if row:
            # 1, 2, 3 to 4, 5 to 8, …: filled up, at most half of a row is empty.
            groups.setdefault(1 << (len(row) - 1).bit_length(), []).append(i)
    made = []
    for width, ids in sorted(groups.items()):
        columns = np.zeros((len(ids), width), np.int32)
        values = np.full((len(ids), width), -np.inf, np.float32)
        for place, i in enumerate(ids):
            columns[place, : len(entries[i])] = list(entries[i])
            values[place, : len(entries[i])] = list(entries[i].values())
        arrays = np.array(ids, np.int32), columns, values
        made.append(Neighbours(*map(jnp.asarray, arrays)))
    return tuple(made)


def transport(
    target: Floats[Array, "*B V"],
    learner: Floats[Array, "*B V"],
    kernel: TokenKernel,
    settings: Transport,
) -> Floats[Array, "*B"]:
    """WASD's loss of two distributions, `[...]`, in `settings.form`; not yet times its weight.

    "released": r.(f - f_rr), with f epsilon log r more than the potential. Without any neighbours
    its gradient is that of n KL(r || p) + sum r log r / 2, times epsilon, after n iterations; that
    of "debiased" is that of (n + 1) / 4 KL(r || p). Where no neighbours lead from r to p,
    potentials grow with n, and the gradient is not that of the value that is returned.

    Args:
      target, learner: logits `[..., V]`; the gradient is for the learner, through the mixture.
    """
    log_p, log_q = log_pair(target, learner)
    log_r = log_probs(log_mixture(log_p, log_q, settings.share, settings.alpha))
    # Logarithms from here on, and potentials are constants: by the envelope theorem the derivative
    # by r is f - f_rr as if neither depended on r, so that nothing is kept of the iterations.
    constants = jax.lax.stop_gradient((log_p, log_r))
    p, r = (jnp.moveaxis(x, -1, 0) for x in constants)  # [V, ...]
    apply = functools.partial(_log_product, kernel)
    of_r = _self_potential(apply, r, settings.iterations)
    if settings.form == "released":
        # The scaling of the released code is u = r e^f, and its logarithm is taken for f.
        f = _alternating(apply, p, r, settings.iterations) + finite_log(r)
        constant = 0.0
    else:
        f, g = _averaged(apply, p, r, settings.iterations)
        of_p = _self_potential(apply, p, settings.iterations)
        constant = _sum(constants[0], jnp.moveaxis(g - of_p, 0, -1))
    return settings.epsilon * (_sum(log_r, jnp.moveaxis(f - of_r, 0, -1)) + constant)


def _sum(log_p: jax.Array, x: jax.Array) -> jax.Array:
    """sum_v p_v x_v, where tokens of no probability count nothing."""
    return jnp.sum(jnp.exp(log_p) * jnp.where(jnp.isneginf(log_p), 0.0, x), axis=-1)


# Potentials are in units of epsilon; p, r and g are logarithms or potentials [V, ...], with tokens
# first, so that a neighbour's entries of all positions lie side by side:
#
#     f = -log K (p e^g)    is    -apply(p + g)        g = -log K (r e^f)    is    -apply(r + f)
#
# Each loop is one fixed number of turns, so that every position costs the same, and `_averaged`
# moves half a step, since f and g that are replaced at once go round in circles of two.


def _alternating(apply: Any, p: jax.Array, r: jax.Array, iterations: int) -> jax.Array:
    """f of r to p, from g = 0 and f before g."""

    def turn(_, state):
        g = state[1]
        f = -apply(p + g)
        return f, -apply(r + f)

    return jax.lax.fori_loop(0, iterations, turn, (jnp.zeros_like(p),) * 2)[0]


def _averaged(apply: Any, p: jax.Array, r: jax.Array, iterations: int):
    """(f, g) of r to p, both half a step at a time: for r = p they are `_self_potential`."""

    def turn(_, state):
        f, g = state
        return (f - apply(p + g)) / 2, (g - apply(r + f)) / 2

    return jax.lax.fori_loop(0, iterations, turn, (jnp.zeros_like(p),) * 2)


def _self_potential(apply: Any, p: jax.Array, iterations: int) -> jax.Array:
    """f of p to itself."""
    start = jnp.zeros_like(p)
    return jax.lax.fori_loop(0, iterations, lambda _, f: (f - apply(p + f)) / 2, start)


def _log_product(kernel: TokenKernel, x: jax.Array) -> jax.Array:
    """log(K e^x) `[V, ...]` of x `[V, ...]`, where the logarithm of 0 counts as 0."""
    # (K e^x)_i = e^x_i + sum_j K_ij e^x_j, the diagonal being 1; of tokens alone the first summand.
    product = x
    for ids, columns, log_entries in kernel.groups:
        own = x[ids]  # [n, ...]
        others = x[columns] + jnp.expand_dims(log_entries, range(2, x.ndim + 1))  # [n, w, ...]
        # Every sum's largest summand is taken out, so that nothing over- or underflows.
        largest = finite_log(jnp.maximum(own, jnp.max(others, axis=1)))
        total = jnp.exp(own - largest) + jnp.sum(jnp.exp(others - largest[:, None]), axis=1)
        total = jnp.log(total) + largest
        product = product.at[ids].set(total, indices_are_sorted=True, unique_indices=True)
    return finite_log(product)
