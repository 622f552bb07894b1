"""Sampling from a decoder: prefill, then one token a row at a time, all in one compiled call.

Rows start at column 0 and row b's next token goes to column `lengths[b]`, so what comes out already
is a training batch. Every row has its own key: its tokens do not depend on the rows beside it.

B batch, n rows of each prompt, X prompt columns, T columns of prompt and new tokens, M soft-prompt
tokens, D width, V vocabulary, L layers, Q slots.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from promptkd_jax.infra.buckets import run_in_smallest_bucket
from promptkd_jax.infra.sharding import ROWS, axis_size
from promptkd_jax.models.decoder import Decoder
from promptkd_jax.models.joint_sampling import interleaved, mixed
from promptkd_jax.models.language_model import LanguageModel, LazyLogits
from promptkd_jax.models.layers.cache import Cache
from promptkd_jax.models.layers.gated_prefix import GatedPrefix
from promptkd_jax.models.sampling_rules import (
    Sampling,
    choose,
    forbid_repeats,
    penalize_repeats,
)

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int, Key


class Rollout(NamedTuple):
    """`tokens` `[B, T]` and `lengths` `[B]`; `ended` `[B]`: by an EOS rather than by the limit."""

    tokens: Int[Array, "B T"]
    lengths: Int[Array, " B"]
    ended: Bool[Array, " B"]


class SamplingModel(NamedTuple):
    """A model that writes, its parameters, and the soft prompt `[M, D]` in front of its rows."""

    model: Decoder | LanguageModel
    params: Any
    prefix: Float[Array, "M D"] | GatedPrefix | None = None


def row_keys(key: Key[Array, ""], rows: Int[Array, " B"]) -> Key[Array, " B"]:
    """One key for each of the row numbers `rows` `[B]`, which depends on no other row number."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, rows)


def sample(
    model: Decoder | LanguageModel,
    params: Any,
    tokens: Int[Array, "prompts X"],
    lengths: Int[Array, " prompts"],
    keys: Key[Array, " B"],
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    prefix: Float[Array, "M D"] | GatedPrefix | None = None,
    vocab_size: int | None = None,
    active: Bool[Array, " B"] | None = None,
    second: SamplingModel | None = None,
    second_share: float = 0.0,
    second_top_k: int = 0,
    slots: int = 0,
    prompt_buckets: int = 1,
    rollouts_per_prompt: int = 1,
) -> Rollout:
    """Continues every row until an EOS or by `max_new_tokens` tokens. Pure; jit it.

    Args:
      model, params: the model that writes.
      tokens: `[B / n, X]` prompts, each from column 0 on; lengths: `[B / n]`, each at least 1.
      keys: `[B]` typed PRNG keys, see `row_keys`.
      prefix: `[M, D]` soft prompt in front of every row, or a gated one.
      vocab_size: tokens from here on are never written (padding of the vocabulary); by default the
        model's own.
      active: `[B]`, the rows to continue (all, where absent); others keep their prompt alone.
      second: a model that decodes jointly, in one of two ways: each token is drawn from the mixture
        of both with `second_share` of the second (MiniLLM: the teacher, at a share of 0.2), or by
        the first, and where its token is not among the `second_top_k` likeliest of the second, by
        that (speculative KD); see `joint_sampling`. Without either it does nothing.
      slots: rows that are written at once; 0: all. When a quarter of them have ended, others take
        their places, so that no row waits for the longest, and the cache is that of `slots` rows.
        What is written is the same, where rounding does not turn a token.
      prompt_buckets: number of prompt widths that are compiled, in even steps up to X; prompts are
        read in the smallest that holds the longest active one.
      rollouts_per_prompt: n, the rows that continue each prompt, one behind the other. It is read
        once for all of them; with `slots` once for each.

    Returns:
      A Rollout of T = X + `max_new_tokens` columns; tokens behind a row's length are 0.

    Raises:
      ValueError: the mesh does not divide the slots; keys are more or fewer than n a prompt.
    """
    if keys.shape[0] != (rows := tokens.shape[0] * rollouts_per_prompt):
        each = f"{rollouts_per_prompt} of each prompt"
        raise ValueError(f"{keys.shape[0]} keys for {rows} rows, {each}; expected one for each")
    jointly = second_share or second_top_k
    models = [SamplingModel(model, params, prefix), *([second] if jointly else [])]
    models = [x._replace(params=x.model.for_sampling(x.params)) for x in models]
    writer = _Writer(
        models=models,
        heads=[x.model.output_head(x.params)[:vocab_size] for x in models],
        share=second_share,
        top_k=second_top_k,
        sampling=sampling,
        limit=max_new_tokens,
        prompts=jnp.where(jnp.arange(tokens.shape[1]) < lengths[:, None], tokens, 0),
        lengths=lengths,
        keys=keys,
        prompt_buckets=prompt_buckets,
        copies=rollouts_per_prompt,
    )
    if not 0 < slots < keys.shape[0]:
        return writer.write(writer.begin(active=active)).written
    return _write_in_turn(writer, slots, active)


class _Slots(NamedTuple):
    """Rows that are being written, `[Q, …]` each."""

    row: jax.Array | None  # number of the row in each slot, B for no row; None: all B in order
    keys: jax.Array
    tokens: jax.Array
    lengths: jax.Array
    left: jax.Array  # tokens that may still be written
    ended: jax.Array  # by an EOS
    logits: jax.Array  # [Q, V] for the token to be written next
    caches: list[Any]  # of each model: a Cache, or the tokens [Q, T] themselves

    @property
    def running(self) -> jax.Array:
        return ~self.ended & (self.left > 0)

    @property
    def written(self) -> Rollout:
        return Rollout(self.tokens, self.lengths, self.ended)


@dataclasses.dataclass(frozen=True)
class _Writer:
    """The arguments of `sample` that stay the same from token to token."""

    models: list[SamplingModel]
    heads: list[jax.Array]  # [V, D] of each model
    share: float  # of the second model
    top_k: int  # of the second model, among which the first's tokens are kept
    sampling: Sampling
    limit: int  # new tokens of a row
    prompts: jax.Array  # [B / n, X]
    lengths: jax.Array  # [B / n]
    keys: jax.Array  # [B]
    prompt_buckets: int
    copies: int  # n

    def begin(self, row: jax.Array | None = None, active: jax.Array | None = None) -> _Slots:
        """Reads the prompts of the rows `row` `[Q]`, or of all; only those `active` will run."""
        prompts, lengths, keys, copies = self.prompts, self.lengths, self.keys, self.copies
        if row is not None:
            # A row number of B names no row. JAX reads the last row in its place; the slot is not
            # active, and `_collect` drops it.
            prompts, lengths, keys = prompts[row // copies], lengths[row // copies], keys[row]
            copies = 1
        # A prompt without an active row needs no width: its first token is read.
        read_lengths = lengths
        if active is not None:
            read_lengths = jnp.where(active.reshape(-1, copies).any(axis=1), lengths, 1)

        def read_in(width: int):
            columns = prompts.shape[1], self.limit
            return [_prefill(x, prompts[:, :width], read_lengths, *columns) for x in self.models]

        read = run_in_smallest_bucket(read_in, read_lengths, prompts.shape[1], self.prompt_buckets)
        hidden, caches = zip(*read)
        of_prompts = prompts, lengths, self._logits(list(hidden)), list(caches)
        prompts, lengths, logits, caches = _repeated(of_prompts, copies)
        left = jnp.full_like(lengths, self.limit)
        return _Slots(
            row=row,
            keys=keys,
            tokens=jnp.pad(prompts, ((0, 0), (0, self.limit))),
            lengths=lengths,
            left=left if active is None else jnp.where(active, left, 0),
            ended=jnp.zeros(lengths.shape, bool),
            logits=logits,
            caches=list(map(_placed, caches)),
        )

    def write(self, slots: _Slots, enough=lambda slots: False) -> _Slots:
        """Writes token by token, until all rows are written or `enough(slots)`."""

        def unfinished(slots: _Slots):
            return jnp.any(slots.running) & ~jnp.asarray(enough(slots))

        return jax.lax.while_loop(unfinished, self._write_one, slots)

    # One turn of the loop. `logits` [Q, V] belong to the column that is to be written next, which
    # is the row's length, since columns count from 0:
    #
    #     column   0  1  2  3  4  5        a row of length 4, of which 2 were its prompt
    #     tokens   p  p  a  b  .  .        logits: after b, so for column 4
    #
    # The token c is chosen from them, written into column 4, and read by the decoder at position 4
    # (a soft prompt shifts that by M), which gives the logits for column 5. Every row does this in
    # every turn, for shapes are static; of one that no longer runs, tokens and length are kept, and
    # its cache is not read any more. The key of a token depends on the row and on how many it has
    # written alone: neither rows beside it nor slots change it.

    def _write_one(self, slots: _Slots) -> _Slots:
        so_far, rules = (slots.tokens, slots.lengths), self.sampling
        allowed = penalize_repeats(slots.logits, *so_far, rules.repetition_penalty)
        allowed = forbid_repeats(allowed, *so_far, rules.no_repeat_ngram_size)
        keys = jax.vmap(jax.random.fold_in)(slots.keys, self.limit - slots.left)
        chosen = choose(allowed, keys, rules)  # [Q]
        running = slots.running
        here = (jnp.arange(slots.tokens.shape[1]) == slots.lengths[:, None]) & running[:, None]
        seen = [
            x.model.decode(x.params, chosen, x.prefix, slots.lengths, cache)
            for x, cache in zip(self.models, slots.caches)
        ]
        is_end = jnp.isin(chosen, jnp.array(rules.eos_ids, jnp.int32))
        return slots._replace(
            tokens=jnp.where(here, chosen[:, None], slots.tokens),
            lengths=slots.lengths + running,
            left=slots.left - running,
            ended=slots.ended | (is_end & running),
            logits=self._logits([hidden for hidden, _ in seen]),
            caches=[cache for _, cache in seen],
        )

    def _logits(self, hidden: list[jax.Array]) -> jax.Array:
        """Logits `[Q, V]` from the hidden states `[Q, D]` of each model."""
        each = [
            LazyLogits(h, head, x.model.logit_soft_cap).logits()
            for h, head, x in zip(hidden, self.heads, self.models)
        ]
        if len(each) == 1:
            return each[0]
        return interleaved(*each, self.top_k) if self.top_k else mixed(*each, self.share)


# Continuous batching: Q slots decode, the other rows wait in a queue.
#
#     queue  r0 r1 r2 r3 | r4 r5 r6 …    `next_turn` points behind the last row that was let in
#     slots  r0 r1 r2 r3                 Q = 4
#     slots  r0 r4 r2 r3                 r1 has ended and is collected; r4 is prefilled in its place
#
# One round is: decode until on some device a quarter of its slots have ended (a prefill of fewer
# rows is not worth its reading of the weights), collect all slots into the output, prefill as many
# rows of the queue as there are free places, put them into these. Shapes are static: `least` rows
# are prefilled in every round; those that `can` not (no place, or the queue is empty) have the row
# number B, which is dropped where they are collected and put.


def rows_of_a_round(slots: int) -> int:
    """How many of a device's slots have to be free to be worth a prefill."""
    return max(slots // 4, 1)


def _write_in_turn(writer: _Writer, slots: int, active: jax.Array | None) -> Rollout:
    """Writes all rows, `slots` (Q) of them at a time.

    On a mesh the slots are dealt out as rows are, and every device lets rows into its own: what is
    sent between devices are tokens, not caches.
    """
    number, devices = writer.keys.shape[0], axis_size(ROWS)
    if slots % devices:
        raise ValueError(f"{slots} slots are not divisible by the {devices} devices of the rows")
    least = rows_of_a_round(slots // devices)
    queue = jnp.arange(number) if active is None else jnp.argsort(~active, stable=True)
    waiting = number if active is None else jnp.sum(active)

    def begin(turns, can):
        can &= turns < waiting
        row = jnp.where(can, queue[jnp.minimum(turns, number - 1)], number)
        return writer.begin(row, can), can

    def write(now, next_turn):
        def enough(now):
            free = jnp.sum(~now.running.reshape(devices, -1), axis=1)
            return (next_turn < waiting) & (jnp.max(free) >= least)

        return writer.write(now, enough)

    def let_in(state):
        next_turn, now, out = state
        out = _collect(out, now)
        free = ~now.running.reshape(devices, -1)  # [devices, Q / devices]
        # The places of the first `least` free slots of each device; not all need be free.
        places = jnp.argsort(~free, axis=1, stable=True)[:, :least]  # [devices, least]
        can = jnp.take_along_axis(free, places, axis=1)  # [devices, least]
        turns = next_turn + jnp.cumsum(can.reshape(-1)) - 1  # [devices · least], of the queue
        new, can = begin(turns, can.reshape(-1))
        places = jnp.where(can.reshape(places.shape), places, free.shape[1])
        next_turn += jnp.sum(can)
        return next_turn, write(_put(now, new, places), next_turn), out

    first, _ = begin(jnp.arange(slots), jnp.ones(slots, bool))
    prompts, lengths = _repeated((writer.prompts, writer.lengths), writer.copies)
    prompts = jnp.pad(prompts, ((0, 0), (0, writer.limit)))
    out = Rollout(prompts, lengths, jnp.zeros(number, bool))
    next_turn = jnp.minimum(slots, waiting)
    state = next_turn, write(first, next_turn), out
    with jax.named_scope("queue"):  # by which `plan` knows the loop in a compiled program
        _, last, out = jax.lax.while_loop(lambda state: state[0] < waiting, let_in, state)
    return _collect(out, last)


def _collect(out: Rollout, slots: _Slots) -> Rollout:
    """The rollout of all rows with the rows of the slots in it; a slot of no row is dropped."""
    return jax.tree.map(lambda x, y: x.at[slots.row].set(y, mode="drop"), out, slots.written)


def _put(slots: _Slots, new: _Slots, places: jax.Array) -> _Slots:
    """The slots with `new` in the places `[devices, least]` of each device's own; what is put
    beyond its last slot is dropped."""
    devices = places.shape[0]

    def put(x, y):
        if not x.ndim:  # of all places alike
            return x

        def split(x):  # [Q, …] as [devices, Q / devices, …]
            return x.reshape(devices, -1, *x.shape[1:])

        def on_device(x, y, places):
            return x.at[places].set(y, mode="drop")

        return jax.vmap(on_device)(split(x), split(y), places).reshape(x.shape)

    slots = jax.tree.map(put, slots, new)
    return slots._replace(caches=list(map(_placed, slots.caches)))


def _placed(cache: Any) -> Any:
    """The cache with rows and heads where they belong; tokens, if these are all there is."""
    return cache.placed() if isinstance(cache, Cache) else cache


# Several rows of each prompt, n = 3:
#
#     prompts   p0           p1            read once, with one pass through the model
#     rows      p0  p0  p0   p1  p1  p1    each with a copy of the prompt's keys and values
#     keys      k0  k1  k2   k3  k4  k5    so that they differ from the first token on
#
# A device that has a prompt has all of its rows, so that nothing is sent. Rows that wait for a slot
# are let in one by one, and each reads its prompt.


def _repeated(tree: Any, copies: int) -> Any:
    """Arrays `[B / n, …]` as `[B, …]`, each row n times behind one another; `[]` as they are."""
    if copies == 1:
        return tree
    return jax.tree.map(lambda x: jnp.repeat(x, copies, axis=0) if x.ndim else x, tree)


def _prefill(
    writing: SamplingModel, tokens, lengths, prompt_columns: int, new_columns: int
) -> tuple[jax.Array, Any]:
    """The hidden state `[Q, D]` at the end of every prompt, and the cache of all of them."""
    columns = prompt_columns, new_columns
    hidden, cache = writing.model.prefill(writing.params, tokens, lengths, writing.prefix, *columns)
    return jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0], cache
