"""The Sinkhorn divergence of the teacher from a mixture of both, over costs between tokens: WASD
(arXiv 2610.07706).

Mass moves between tokens whose embeddings are near. With the mixture r (`log_mixture`), the costs C
and K = exp(-C / epsilon), the potentials f, g of entropic transport between r and p satisfy

    f = -epsilon log K (p e^(g / epsilon)),      g = -epsilon log K (r e^(f / epsilon))

and the divergence is S(r, p) = r.(f - f_rr) + p.(g - f_pp), f_rr and f_pp those of r and p to
themselves. Its derivative by r is f - f_rr (envelope theorem): only r is differentiated.

V vocabulary, k neighbours of a token, E pairs of neighbours.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from promptkd_jax.distill.divergence import SHARE, finite_log, log_mixture, log_pair, log_probs
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


@flax.struct.dataclass
class TokenKernel:
    """K as its entries beside the diagonal, which is 1, in order of their rows: `rows` and
    `columns` `[E]`, `log_entries` `[E]`. Symmetric."""

    rows: Ints[Array, " E"]
    columns: Ints[Array, " E"]
    log_entries: Floats[Array, " E"]
    vocab_size: int = flax.struct.field(pytree_node=False)


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
    number = min(settings.neighbours, vocab_size - 1)

    @jax.jit
    def nearest(first):  # [block] -> ([block, number], [block, number])
        ids = first + jnp.arange(block)
        near = jax.lax.dynamic_slice_in_dim(x, first, block) @ x.T
        near = near.at[jnp.arange(block), ids].set(-jnp.inf)
        return jax.lax.top_k(near, number)

    block = min(512, vocab_size)
    starts = [min(i, vocab_size - block) for i in range(0, vocab_size, block)]
    found = {}
    for first in starts:  # the last block may overlap the one before it
        cosines, ids = map(np.asarray, nearest(first))
        log_entries = (cosines.astype(np.float64) - 1) / settings.epsilon
        live = log_entries > np.log(np.finfo(np.float32).smallest_subnormal)
        for row, column in zip(*np.nonzero(live)):
            pair = first + int(row), int(ids[row, column])
            value = min(float(log_entries[row, column]), 0.0)
            found[pair] = found[pair[::-1]] = max(value, found.get(pair, -np.inf))
    edges = np.array(sorted(found), np.int32).reshape(-1, 2)
    values = np.array([found[tuple(edge)] for edge in edges.tolist()], np.float32)
    return TokenKernel(*map(jnp.asarray, (edges[:, 0], edges[:, 1], values)), vocab_size)


def transport(
    target: Floats[Array, "*B V"],
    learner: Floats[Array, "*B V"],
    kernel: TokenKernel,
    settings: Transport,
) -> Floats[Array, "*B"]:
    """WASD's loss of two distributions, `[...]`, in `settings.form`; not yet times its weight.

    "released": r.(f - f_rr), with f epsilon log r more than the potential. Without any neighbours
    its gradient is that of n KL(r || p) + sum r log r / 2, times epsilon, after n iterations; that
    of "debiased" is (n + 1) / 4 KL(r || p).

    Args:
      target, learner: logits `[..., V]`; the gradient is for the learner, through the mixture.
    """
    log_p, log_q = log_pair(target, learner)
    log_r = log_probs(log_mixture(log_p, log_q, settings.share, settings.alpha))
    p, r = jax.lax.stop_gradient((log_p, log_r))
    apply = functools.partial(_log_product, kernel)
    of_r = _self_potential(apply, r, settings.iterations)
    if settings.form == "released":
        f = _alternating(apply, p, r, settings.iterations) + finite_log(r)
        constant = 0.0
    else:
        f, g = _averaged(apply, p, r, settings.iterations)
        of_p = _self_potential(apply, p, settings.iterations)
        constant = _sum(p, g - of_p)
    return settings.epsilon * (_sum(log_r, f - of_r) + constant)


def _sum(log_p: jax.Array, x: jax.Array) -> jax.Array:
    """sum_v p_v x_v, where tokens of no probability count nothing."""
    return jnp.sum(jnp.exp(log_p) * jnp.where(jnp.isneginf(log_p), 0.0, x), axis=-1)


# Potentials are in units of epsilon. Each loop is one fixed number of turns, so that every
# position costs the same.


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
    """log(K e^x) `[..., V]` of x `[..., V]`, where the logarithm of 0 counts as 0."""
    if not kernel.rows.shape[0]:
        return finite_log(x)
    # Each token's largest summand is taken out, so that nothing over- or underflows.
    of_edges = x[..., kernel.columns] + kernel.log_entries
    sorted_rows = dict(indices_are_sorted=True)
    largest = x.at[..., kernel.rows].max(of_edges, **sorted_rows)
    largest = finite_log(largest)
    of_edges = jnp.exp(of_edges - largest[..., kernel.rows])
    total = jnp.exp(x - largest).at[..., kernel.rows].add(of_edges, **sorted_rows)
    return largest + finite_log(jnp.log(total))
