"""The choice of every row's next token: rules, and what they make of its logits.

B rows, T columns of prompt and new tokens, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp

from promptkd_jax.infra import specs


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Rules for the choice of the next token; hashable, a static argument of `jax.jit`.

    A row ends with any of `eos_ids`.

    Raises:
      ValueError: a value out of its range.
    """

    temperature: float = specs.field(1.0, specs.Float(low=0.0), "divides logits; 0 is greedy")
    top_k: int = specs.field(0, specs.Int(low=0), "only the k likeliest tokens; 0: all")
    top_p: float = specs.field(
        1.0,
        specs.Float(low=0.0, high=1.0, open_low=True),
        "only the likeliest tokens that together have this probability; 1: all",
    )
    min_p: float = specs.field(
        0.0,
        specs.Float(low=0.0, high=1.0),
        "only tokens at least this times as probable as the likeliest; 0: all",
    )
    repetition_penalty: float = specs.field(
        1.0,
        specs.Float(low=0.0, open_low=True),
        "makes tokens less likely that a row, prompt included, already contains; 1: none",
    )
    no_repeat_ngram_size: int = specs.field(
        0,
        specs.Int(low=0),
        "no row writes an n-gram of this size that it, prompt included, already contains; 0: any",
    )
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self):
        specs.validate(self)


def choose(logits: jax.Array, keys: jax.Array, sampling: Sampling) -> jax.Array:
    """The next token of every row, `[B]`, from `[B, V]` float32 logits."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # In the order of transformers' warpers: each rule sees what the one before has left, so that
    # top_p and min_p go by probabilities that add up to 1 among these.
    logits = logits / sampling.temperature
    if sampling.top_k:
        logits = _keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p:
        logits = _keep_min_p(logits, sampling.min_p)
    # By Gumbel noise, which a rounding error seldom turns to another token. By inversion of the
    # cumulated probabilities, faster on a CPU, every rounding before a token would move it.
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _keep_top_k(logits: jax.Array, k: int) -> jax.Array:
    """-inf below the k-th largest logit of a row."""
    threshold = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][:, -1:]
    return jnp.where(logits < threshold, -jnp.inf, logits)


def keep_top_p(logits: jax.Array, p: float) -> jax.Array:
    """-inf outside of the smallest set of tokens whose probability reaches p, of logits
    `[..., V]`; tokens that are equally probable stay together."""
    # The set is {probability >= t} for the largest t whose sum reaches p. Sorting [B, V] would find
    # it; bisecting for t does in a few passes. The bits of a positive float32, read as an integer,
    # are in the order of the floats, so that 31 halvings of an interval of integers are exact.
    probability = jax.nn.softmax(logits, axis=-1)
    rank = jax.lax.bitcast_convert_type(probability, jnp.int32)  # in the same order

    def halve(_, bounds):
        """Tokens from rank `low` on reach p, or are all; those from `high` on do not."""
        low, high = bounds
        middle = low + (high - low) // 2
        reached = jnp.sum(jnp.where(rank >= middle, probability, 0), axis=-1, keepdims=True) >= p
        return jnp.where(reached, middle, low), jnp.where(reached, high, middle)

    none = jax.lax.bitcast_convert_type(jnp.float32(2), jnp.int32)
    bounds = jnp.zeros_like(rank[..., :1]), jnp.full_like(rank[..., :1], none)
    low, _ = jax.lax.fori_loop(0, 31, halve, bounds)
    return jnp.where(rank < low, -jnp.inf, logits)


def _keep_min_p(logits: jax.Array, p: float) -> jax.Array:
    """-inf where the probability is below p times that of the likeliest token."""
    threshold = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(p)
    return jnp.where(logits < threshold, -jnp.inf, logits)


def penalize_repeats(
    logits: jax.Array, tokens: jax.Array, lengths: jax.Array, penalty: float
) -> jax.Array:
    """Logits `[B, V]`, those of the tokens `[B, T]` that a row has within its length `[B]`
    penalized (CTRL, Keskar et al. 2019, arXiv 1909.05858)."""
    if penalty == 1:
        return logits
    rows, columns = jnp.indices(tokens.shape)
    there = columns < lengths[:, None]
    seen = jnp.zeros(logits.shape, bool).at[rows, tokens].max(there, mode="drop")
    penalized = jnp.where(logits < 0, logits * penalty, logits / penalty)
    return jnp.where(seen, penalized, logits)


def forbid_repeats(logits: jax.Array, tokens: jax.Array, lengths: jax.Array, n: int) -> jax.Array:
    """Logits `[B, V]`, -inf for every token that would complete an n-gram which the tokens
    `[B, T]` of its row, within their length `[B]`, already contain."""
    if n == 0:
        return logits
    width = tokens.shape[1]
    if width < n:
        return logits
    # Of every n-gram of the row: if its first n - 1 tokens are the row's last n - 1, its nth must
    # not be next. With n = 3 and the row  a b c d a b:
    #
    #     at column 0: a b | c   is the tail a b, so c is banned;   at 3: d a | b   is not
    starts = jnp.arange(width - n + 1)
    tail = lengths[:, None] - (n - 1) + jnp.arange(n - 1)  # columns of the last n - 1 tokens
    tail = jnp.take_along_axis(tokens, jnp.maximum(tail, 0), axis=1)  # [B, n - 1]
    same = starts + n <= lengths[:, None]  # the n-gram lies inside of the row
    for i in range(n - 1):
        same &= tokens[:, i : width - n + 1 + i] == tail[:, i : i + 1]
    rows = jnp.arange(tokens.shape[0])[:, None]
    banned = jnp.zeros(logits.shape, bool)
    banned = banned.at[rows, tokens[:, n - 1 :]].max(same, mode="drop")
    return jnp.where(banned, -jnp.inf, logits)
