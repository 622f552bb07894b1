"""How the rows of a step are dealt out to micro-batches, in how many columns each is computed, and
how their sums add up to means.

Row i of B is in micro-batch i mod UG, so that each device keeps its own rows of every micro-batch:
`[B, ...]` is seen as `[UG, B / UG, ...]`.

B rows, T columns, G micro-batches of one update, UG of a whole step.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from promptkd_jax.data.batch import Batch, truncate
from promptkd_jax.distill.methods.method import Conventions, Method
from promptkd_jax.distill.targets import TargetBatch
from promptkd_jax.distill.teacher import DropoutKeys
from promptkd_jax.distill.terms import MicroBatch
from promptkd_jax.infra import sharding
from promptkd_jax.infra.buckets import run_in_smallest_bucket


def deal_out(
    targets: TargetBatch,
    corpus: Batch | None,
    method: Method,
    dropout_keys: DropoutKeys | None,
    references: Batch | None = None,
) -> MicroBatch:
    """All `[B, …]` as `[UG, B / UG, …]`, row i in micro-batch i mod UG: devices keep their rows.

    Args:
      references: the data's own rows to the prompts of the target rows, where they are looked at.
    """

    def split(x):
        return jnp.swapaxes(x.reshape(-1, method.num_micro_batches, *x.shape[1:]), 0, 1)

    rows = targets.rows, targets.is_student, references, dropout_keys and dropout_keys.rows
    # Rows of like length together, so that a short micro-batch takes a small bucket.
    if method.sorts_rows:
        rows = _sort_by_length(rows, targets.rows.lengths, method.num_micro_batches)
    rows, is_student, references, keys = rows
    dropout_keys = dropout_keys and dropout_keys._replace(rows=keys)
    micro_batches = MicroBatch(rows, is_student, corpus, references, dropout_keys=dropout_keys)
    return jax.tree.map(split, micro_batches)


def _sort_by_length(rows: Any, lengths: jax.Array, number: int) -> Any:
    """A tree of `[B, …]`, each device's rows in such an order that `deal_out` gives the shortest to
    the first of `number` micro-batches, the longest to the last."""
    devices = sharding.num_row_shards(lengths.shape[0] // number)
    # One device with six rows, and two micro-batches:
    #
    #     lengths            9 4 7 2 8 3     [devices, B / devices]
    #     shortest_first     3 5 1 2 4 0     rows of lengths 2 3 4 7 8 9
    #     by micro-batch     3 5 1 | 2 4 0   [devices, number, B / devices / number]
    #     order              3 2 5 4 1 0     [devices, B / devices]: one row of each in turn
    #
    # `deal_out` puts places 0, 2, 4 of `order` into micro-batch 0: the rows 3, 5, 1.
    shortest_first = jnp.argsort(lengths.reshape(devices, -1), axis=1, stable=True)
    by_micro_batch = shortest_first.reshape(devices, number, -1)
    order = by_micro_batch.swapaxes(1, 2).reshape(devices, -1)
    return jax.tree.map(lambda x: sharding.take_local_rows(x, order).reshape(x.shape), rows)


def in_smallest_bucket(function: Callable, method: Method) -> Callable:
    """`function`, called with its micro-batch's rows in the smallest bucket that holds them."""

    def bucketed(micro_batch: MicroBatch, *others):
        def in_width(width: int):
            rows = truncate(micro_batch.rows, width)
            return function(micro_batch._replace(rows=rows), *others)

        columns = micro_batch.rows.tokens.shape[-1]
        lengths = micro_batch.rows.lengths
        return run_in_smallest_bucket(in_width, lengths, columns, method.execution.length_buckets)

    return bucketed


def token_scales(counts: jax.Array, conventions: Conventions) -> jax.Array:
    """Factors `[G]` with which sums over response tokens add up to the mean of an update.

    Args:
      counts: `[G]`, response tokens of each micro-batch of one update (the teacher's has all UG).
    """
    # As published, the mean over micro-batches of their means; else the mean over all tokens.
    if conventions.mean_of_means:
        return 1 / (counts * counts.shape[0])
    return jnp.broadcast_to(1 / jnp.sum(counts), counts.shape)


def corpus_scale(micro_batches: MicroBatch) -> jax.Array | float:
    """The same factor of sums over the tokens of plain text, for all micro-batches of an update."""
    if micro_batches.corpus is None:
        return 0.0
    return 1 / jnp.sum(micro_batches.corpus.lengths - 1)
