"""The inputs of the chunked loss, and checks that they belong together.

JAX itself would broadcast, clip or take from the end where shapes do not fit, and a number would
come out; the checks say which argument has which shape, and what was expected.

B rows, T positions, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from promptkd_jax.data.top_k import TopK
from promptkd_jax.distill.losses.divergence import Divergence
from promptkd_jax.distill.losses.losses import cross_entropy
from promptkd_jax.distill.losses.transport import TokenKernel
from promptkd_jax.models.language_model import LazyLogits


def is_distribution(target: Any) -> bool:
    """Whether this part of a target is a distribution, which the loss makes logits of."""
    return isinstance(target, LazyLogits | TopK)


def is_part(target: Any) -> bool:
    """Whether this part of a target is looked at as one: a distribution, or a kernel, which is the
    same at every position."""
    return is_distribution(target) or isinstance(target, TokenKernel)


def check_inputs(learner: LazyLogits, targets: Sequence[Any]) -> None:
    """Raises ValueError where shapes do not belong together."""
    if not isinstance(learner, LazyLogits):
        raise ValueError(f"learner: {type(learner).__name__}; expected LazyLogits(hidden, head)")
    bare = "array" if hasattr(targets, "shape") else type(targets).__name__
    if bare == "array" or is_distribution(targets):
        raise ValueError(f"targets: a bare {bare}; expected a sequence, one per term: [target]")
    _check_linear("learner", learner)
    for number, target in enumerate(targets):
        for part in jax.tree.leaves(target, is_leaf=is_part):
            _check_part(f"targets[{number}]", part, learner)


def _check_part(name: str, part: Any, learner: LazyLogits) -> None:
    if isinstance(part, TokenKernel):
        if part.vocab_size != learner.head.shape[0]:
            raise ValueError(
                f"{name}: a kernel of {part.vocab_size} tokens, the learner has "
                f"{learner.head.shape[0]}; expected that of the tokens that both models share"
            )
        return
    if isinstance(part, LazyLogits):
        _check_linear(name, part)
        if part.head.shape[0] != learner.head.shape[0]:
            raise ValueError(
                f"{name}: a vocabulary of {part.head.shape[0]}, the learner's has "
                f"{learner.head.shape[0]}; expected the tokens that both share, without the "
                "padding of either: head[:vocab_size]"
            )
        part = part.hidden
    if isinstance(part, TopK):
        _check_top_k(name, part, learner.head.shape[0])
    for array in jax.tree.leaves(part):
        if jnp.shape(array)[:2] != learner.hidden.shape[:2]:
            raise ValueError(shape_error(name, jnp.shape(array), learner))


def shape_error(name: str, shape: tuple[int, ...], learner: LazyLogits) -> str:
    rows, positions = learner.hidden.shape[:2]
    return (
        f"{name}: {list(shape)}, but the learner's hidden states are of {rows} rows and "
        f"{positions} positions; expected [{rows}, {positions}{', …' if len(shape) > 2 else ''}]"
    )


def _check_linear(name: str, model: LazyLogits) -> None:
    hidden, head = jnp.shape(model.hidden), jnp.shape(model.head)
    if len(hidden) != 3 or len(head) != 2:
        raise ValueError(
            f"{name}: hidden {list(hidden)} and head {list(head)}; expected [B, T, D] and [V, D]"
        )
    if head[1] != hidden[2]:
        stored = "; it is stored [D, V]: transpose it" if head[0] == hidden[2] else ""
        raise ValueError(
            f"{name}: hidden states of width {hidden[2]} and a head {list(head)}; expected "
            f"[V, {hidden[2]}]{stored}"
        )


def _check_top_k(name: str, target: TopK, vocab_size: int) -> None:
    ids, log_probs = jnp.shape(target.ids), jnp.shape(target.log_probs)
    if len(ids) != 3 or ids != log_probs or ids[2] > vocab_size:
        raise ValueError(
            f"{name}: ids {list(ids)} and log_probs {list(log_probs)}; expected both [B, T, k], "
            f"with k at most {vocab_size}, the learner's vocabulary"
        )
    if target.tail is not None and jnp.shape(target.tail) != ids[:2]:
        raise ValueError(
            f"{name}: a tail {list(jnp.shape(target.tail))} beside ids {list(ids)}; expected "
            f"{list(ids[:2])}, one per position"
        )


def check_values(
    terms: Sequence[Divergence], targets: Sequence[Any], mask: Any, vocab_size: int
) -> None:
    """Raises ValueError for a TopK of logits and for tokens that are not in the vocabulary, where
    values can be seen: not those that are traced."""
    # Within a jit shapes are known and values are not; a `Tracer` is looked at no further.
    for number, target in enumerate(targets):
        if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((target, mask))):
            continue
        name = f"targets[{number}]"
        # What is constant can be seen within a `jax.jit` too, which would trace its sum.
        with jax.ensure_compile_time_eval():
            if isinstance(target, TopK):
                # Filler of -inf stands for no token, and its id may be anything.
                counts, log_probs = jnp.asarray(mask) != 0, jnp.asarray(target.log_probs)
                _check_log_probs(name, log_probs.astype(jnp.float32), counts)
                listed = counts[..., None] & ~jnp.isneginf(log_probs)
                _check_tokens(name, target.ids, listed, vocab_size)
            elif cross_entropy in terms[number : number + 1] and hasattr(target, "shape"):
                _check_tokens(name, target, jnp.asarray(mask) != 0, vocab_size)


def _check_log_probs(name: str, log_probs: jax.Array, counts: jax.Array) -> None:
    sums = jax.nn.logsumexp(log_probs, axis=-1)
    most = float(jnp.max(jnp.where(counts, sums, -jnp.inf)))
    if most > 0.05:  # log-probabilities in half precision may be a little above
        raise ValueError(
            f"{name}: a TopK whose probabilities add up to exp({most:.4g}); expected "
            "log-probabilities: where these are logits, take their log_softmax over all tokens "
            "before the k largest"
        )


def _check_tokens(name: str, tokens: jax.Array, counts: jax.Array, vocab_size: int) -> None:
    tokens = jnp.asarray(tokens).astype(jnp.int32)  # of few bits, they cannot be compared with V
    wrong = counts & ((tokens < 0) | (tokens >= vocab_size))
    if wrong.any():
        place = tuple(int(i) for i in jnp.argwhere(wrong)[0])
        raise ValueError(
            f"{name}: token {tokens[place]} at row {place[0]}, position {place[1]}, where the mask "
            f"is not 0; expected tokens in [0, {vocab_size}), or a mask of 0 there"
        )
