"""The distribution of the next token where two models write a row together.

Q rows, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    Logits = Float[Array, "Q V"]


def mixed(first: Logits, second: Logits, share: float) -> Logits:
    """log((1 - share) q + share p), q and p of the first and second model (MiniLLM, arXiv
    2306.08543, eq. 4)."""
    log_q, log_p = jax.nn.log_softmax(first), jax.nn.log_softmax(second)
    return jnp.logaddexp(log_q + jnp.log1p(-share), log_p + jnp.log(share))


def interleaved(first: Logits, second: Logits, top_k: int) -> Logits:
    """The logarithm of the distribution of a token that the first model draws and, where that is
    not among the `top_k` likeliest tokens S of the second, the second draws instead:

        q(v) [v in S] + (1 - q(S)) p(v)

    Speculative knowledge distillation (arXiv 2410.11325), in one draw. Tokens as likely for the
    second model as the last of S are in it. With all tokens in S it is the first model alone.
    """
    log_q, log_p = jax.nn.log_softmax(first), jax.nn.log_softmax(second)
    # S by a threshold, the last of the top_k log-probabilities [Q, 1].
    last = jax.lax.top_k(log_p, min(top_k, log_p.shape[-1]))[0][..., -1:]
    accepted = log_p >= last
    # log(1 - q(S)) as the sum of what is outside: 1 - q(S) would be 0 by rounding where q(S) is
    # near 1. Of all tokens in S it is -inf, and the second summand vanishes.
    log_rejected = jax.nn.logsumexp(jnp.where(accepted, -jnp.inf, log_q), axis=-1, keepdims=True)
    return jnp.logaddexp(jnp.where(accepted, log_q, -jnp.inf), log_rejected + log_p)
