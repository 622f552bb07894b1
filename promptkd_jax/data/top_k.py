"""A teacher's distributions by their most likely tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


class TopK(NamedTuple):
    """A distribution as a cache keeps it: its k largest `log_probs` and their `ids`, `[B, T, k]`,
    the largest first, and `tail` `[B, T]`, the log-probability of all other tokens together.

    Where it is compared with a learner, its tail is divided among the other tokens as the learner
    divides its own. So KL divergences, and all others that are sums of q f(p / q), compare k + 1
    probabilities, which bounds them from below, and nothing is learned about the inside of the
    tail; with k = V nothing is lost. (An alpha-beta divergence is such a sum if alpha + beta = 1.)

    Where the tail is not given (None, or rounded to -inf), it is what the k largest leave of 1, and
    at most what so many tokens that are no likelier than the k-th can have. Of a sure teacher that
    is lost in rounding: it may be as much as can just not be told from 1 in the dtype of
    `log_probs` (its machine epsilon), or nothing. Of what it may be, the tail is then what is
    nearest to the learner's: no learner is told to put more into the tail than it has.

    A log-probability of -inf fills up a list of fewer than k tokens, and its id says nothing: a
    token that stands nowhere else is one of the tail or, with k = V, has probability 0.
    """

    ids: Int[Array, "B T k"]
    log_probs: Float[Array, "B T k"]
    tail: Float[Array, "B T"] | None = None

    def logits(self, learner: Float[Array, "B T V"]) -> Float[Array, "B T V"]:
        """This distribution as logits `[..., V]`, compared with a learner of logits `[..., V]`. A
        constant, also where it comes from the learner."""
        whole, vocab_size = jax.lax.stop_gradient(learner.astype(jnp.float32)), learner.shape[-1]
        log_probs = self.log_probs.astype(jnp.float32)
        # Behind the last token nothing is written: filler must not stand for the token it names.
        ids = jnp.where(jnp.isneginf(log_probs), vocab_size, self.ids.astype(jnp.int32))
        if ids.shape[-1] == vocab_size:
            whole = jnp.full_like(whole, -jnp.inf)
        else:
            sum_of_others = log_sum_of_others(whole, ids)[..., None]
            # A learner that has nothing there divides nothing: all tokens alike.
            nothing = jnp.isneginf(sum_of_others)
            others = self._others(vocab_size)[..., None]  # [B, T, 1], V - k or more
            # [B, T, V]: the log of a token's share in the tail; of kept tokens it means nothing and
            # is overwritten below.
            shares = jnp.where(nothing, -jnp.log(others), whole - sum_of_others)
            # log-probability of the tail under the learner, [B, T].
            own = sum_of_others[..., 0] - jax.nn.logsumexp(whole, axis=-1)
            whole = self.tail_below(vocab_size, own)[..., None] + shares
        return jnp.put_along_axis(whole, ids, log_probs, axis=-1, inplace=False, mode="drop")

    def tail_below(
        self, vocab_size: int, learner: Float[Array, "B T"] | float = jnp.inf
    ) -> Float[Array, "B T"]:
        """The log-probability of the tokens of `vocab_size` > k that are not kept, `[B, T]`: where
        it is not given, as near to the `learner`'s as rounding leaves open."""
        kept = self.log_probs.astype(jnp.float32)
        epsilon = jnp.finfo(self.log_probs.dtype).eps
        # The kept ones are rounded: the tail is something from left - epsilon to left (or epsilon).
        left = 1 - jnp.sum(jnp.exp(kept), axis=-1)
        # None of the others is likelier than the last that is kept.
        last = jnp.min(jnp.where(jnp.isneginf(kept), jnp.inf, kept), axis=-1)
        most = jnp.log(jnp.maximum(left, epsilon))
        most = jnp.minimum(most, last + jnp.log(self._others(vocab_size)))
        least = jnp.minimum(jnp.log(jnp.maximum(left - epsilon, 0)), most)
        derived = jnp.clip(learner, least, most)
        if self.tail is None:
            return derived
        return jnp.where(jnp.isneginf(self.tail), derived, self.tail)

    def _others(self, vocab_size: int) -> jax.Array:
        """How many tokens are not kept, `[B, T]`."""
        return vocab_size - jnp.sum(~jnp.isneginf(self.log_probs), axis=-1)


def log_sum_of_others(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """logsumexp of `logits` `[..., V]` over the tokens that are not among `ids` `[..., k]`,
    of which those of V and above name no token."""
    others = jnp.put_along_axis(logits, ids, -jnp.inf, axis=-1, inplace=False, mode="drop")
    return jax.nn.logsumexp(others, axis=-1)
