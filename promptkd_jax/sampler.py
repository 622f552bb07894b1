"""Sampling from a decoder: prefill, then one token a row at a time, all in one compiled call.

Rows start at column 0 and row b's next token goes to column `lengths[b]`, so what comes out already
is a training batch. Every row has its own key: its tokens do not depend on the rows beside it.

B batch, T columns, M soft-prompt tokens, V vocabulary.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from promptkd_jax.models.decoder import Cache, Decoder, empty_cache, head
from promptkd_jax.sharding import ROWS, constrain, gathered


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; hashable, a static argument of `jax.jit`.

    temperature 0 is greedy. `top_k` 0 and `top_p` 1 switch those filters off. With
    `no_repeat_ngram_size` n no row writes an n-gram that it already contains, its request
    included. A row ends with any of `eos_ids`.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    no_repeat_ngram_size: int = 0
    eos_ids: tuple[int, ...] = ()


class Rollout(NamedTuple):
    """`tokens` `[B, T]` and `lengths` `[B]`; `ended` `[B]`: by an EOS rather than by the limit."""

    tokens: jax.Array
    lengths: jax.Array
    ended: jax.Array


class Voice(NamedTuple):
    """A model that writes: what it is, and the soft prompt `[M, D]` in front of its rows."""

    decoder: Decoder
    params: Any
    prefix: jax.Array | None = None

    @property
    def shift(self) -> int:
        """M: how many columns its rows stand further to the right than their tokens."""
        return 0 if self.prefix is None else self.prefix.shape[0]

    def resident(self) -> "Voice":
        """With parameters as every step reads them: in the dtype of computation, not cut along
        `fsdp`. Else each written token would gather and round all of them."""
        dtype = self.decoder.config.dtype
        return self._replace(params=gathered(jax.tree.map(lambda x: x.astype(dtype), self.params)))


class _Loop(NamedTuple):
    step: jax.Array
    tokens: jax.Array
    lengths: jax.Array
    ended: jax.Array
    logits: jax.Array  # [B, V] for the token to be written next
    caches: tuple[Cache, ...]


def row_keys(key: jax.Array, rows: jax.Array) -> jax.Array:
    """One key for each of the row numbers `rows` `[B]`, whatever the others are."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, rows)


def sample(
    decoder: Decoder,
    params: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    keys: jax.Array,
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    prefix: jax.Array | None = None,
    vocab_size: int | None = None,
    active: jax.Array | None = None,
    second: Voice | None = None,
    second_share: float = 0.0,
) -> Rollout:
    """Continues every row until an EOS or by `max_new_tokens` tokens. Pure; jit it.

    Args:
      decoder, params: the model.
      tokens: `[B, P]` requests, each from column 0 on; lengths: `[B]`, each at least 1.
      keys: `[B]` typed PRNG keys, see `row_keys`.
      prefix: `[M, D]` soft prompt in front of every row.
      vocab_size: tokens from here on are never written (padding of the vocabulary).
      active: `[B]`, the rows to continue (all, where absent); others keep their request alone.
      second: a model that decodes jointly: each token is drawn from (1 - second_share) times the
        first's distribution plus second_share times the second's (MiniLLM, arXiv 2306.08543, eq. 4:
        the teacher, at a share of 0.2).

    Returns:
      A Rollout over `[B, P + max_new_tokens]` columns; what stands behind a row's length is 0.
    """
    voices = [Voice(decoder, params, prefix), *([second] if second_share else [])]
    voices = [voice.resident() for voice in voices]
    rows, width = tokens.shape
    heads = [head(voice.params)[:vocab_size] for voice in voices]
    logits = functools.partial(_logits, heads, second_share)
    prefilled = [_prefill(voice, tokens, lengths, width + max_new_tokens) for voice in voices]
    in_request = jnp.arange(width) < lengths[:, None]
    start = _Loop(
        step=jnp.zeros((), jnp.int32),
        tokens=jnp.pad(jnp.where(in_request, tokens, 0), ((0, 0), (0, max_new_tokens))),
        lengths=lengths,
        ended=jnp.zeros(rows, bool) if active is None else ~active,
        logits=logits([hidden for hidden, _ in prefilled]),
        caches=tuple(cache for _, cache in prefilled),
    )

    def unfinished(loop: _Loop):
        return (loop.step < max_new_tokens) & ~jnp.all(loop.ended)

    def write_one(loop: _Loop) -> _Loop:
        allowed = _forbid_repeats(loop, sampling.no_repeat_ngram_size)
        chosen = choose(allowed, _at_step(keys, loop.step), sampling)  # [B]
        here = (jnp.arange(loop.tokens.shape[1]) == loop.lengths[:, None]) & ~loop.ended[:, None]
        seen = [
            _decode(voice, chosen, loop.lengths, cache) for voice, cache in zip(voices, loop.caches)
        ]
        return _Loop(
            step=loop.step + 1,
            tokens=jnp.where(here, chosen[:, None], loop.tokens),
            lengths=loop.lengths + ~loop.ended,
            ended=loop.ended | jnp.isin(chosen, jnp.array(sampling.eos_ids, jnp.int32)),
            logits=logits([hidden for hidden, _ in seen]),
            caches=tuple(cache for _, cache in seen),
        )

    end = jax.lax.while_loop(unfinished, write_one, start)
    ended = end.ended if active is None else end.ended & active
    return Rollout(end.tokens, end.lengths, ended)


def _prefill(voice: Voice, tokens, lengths, columns: int) -> tuple[jax.Array, Cache]:
    """The hidden state `[B, D]` at the end of every request, and the cache of all of them."""
    cache = empty_cache(voice.decoder.config, tokens.shape[0], voice.shift + columns)
    hidden, cache = voice.decoder.apply(
        {"params": voice.params}, tokens, prefix=voice.prefix, cache=cache
    )
    return jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0], cache


def _decode(voice: Voice, chosen, column, cache: Cache) -> tuple[jax.Array, Cache]:
    """The hidden state `[B, D]` of the tokens just written into `column` `[B]`."""
    hidden, cache = voice.decoder.apply(
        {"params": voice.params}, chosen[:, None], cache=cache, column=voice.shift + column
    )
    return hidden[:, 0], cache


def _logits(heads: list[jax.Array], share: float, hidden: list[jax.Array]) -> jax.Array:
    """`[B, V]` from each voice's head `[V, D]` and hidden states `[B, D]`."""
    # Rounded to half precision, logits would tie, and top-k keeps ties.
    each = [
        constrain(
            jnp.einsum("bd,vd->bv", h, kernel, preferred_element_type=jnp.float32), ROWS, "tensor"
        )
        for h, kernel in zip(hidden, heads)
    ]
    return each[0] if len(each) == 1 else _mixed(*each, share)


def _mixed(first: jax.Array, second: jax.Array, share: float) -> jax.Array:
    """The logarithm of (1 - share) softmax(first) + share softmax(second)."""
    log_q, log_p = jax.nn.log_softmax(first), jax.nn.log_softmax(second)
    return jnp.logaddexp(log_q + jnp.log1p(-share), log_p + jnp.log(share))


def choose(logits: jax.Array, keys: jax.Array, sampling: Sampling) -> jax.Array:
    """The next token of every row, `[B]`, from `[B, V]` float32 logits."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_k:
        logits = _keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = _keep_top_p(logits, sampling.top_p)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _at_step(keys: jax.Array, step: jax.Array) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (0, None))(keys, step)


def _keep_top_k(logits: jax.Array, k: int) -> jax.Array:
    """-inf below the k-th largest logit of a row."""
    threshold = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][:, -1:]
    return jnp.where(logits < threshold, -jnp.inf, logits)


def _keep_top_p(logits: jax.Array, p: float) -> jax.Array:
    """-inf outside of the smallest set of tokens whose probability reaches p."""
    descending = -jnp.sort(-logits, axis=-1)
    probability = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    threshold = jnp.min(jnp.where(before < p, descending, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < threshold, -jnp.inf, logits)


def _forbid_repeats(loop: _Loop, n: int) -> jax.Array:
    """-inf for every token that would complete an n-gram which the row already contains."""
    if n == 0:
        return loop.logits
    width = loop.tokens.shape[1]
    if width < n:
        return loop.logits
    starts = jnp.arange(width - n + 1)
    tail = loop.lengths[:, None] - (n - 1) + jnp.arange(n - 1)  # columns of the last n - 1 tokens
    tail = jnp.take_along_axis(loop.tokens, jnp.maximum(tail, 0), axis=1)  # [B, n - 1]
    same = starts + n <= loop.lengths[:, None]  # the n-gram lies inside of the row
    for i in range(n - 1):
        same &= loop.tokens[:, i : width - n + 1 + i] == tail[:, i : i + 1]
    rows = jnp.arange(loop.tokens.shape[0])[:, None]
    banned = jnp.zeros(loop.logits.shape, bool)
    banned = banned.at[rows, loop.tokens[:, n - 1 :]].max(same, mode="drop")
    return jnp.where(banned, -jnp.inf, loop.logits)
