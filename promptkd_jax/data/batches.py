"""Batches of rows, with a position that a checkpoint can hold.

The position of a run in its data is one integer, the index of the next batch; it is global, so that
the number of processes and devices may change between a save and a restore.
"""

import itertools
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from promptkd_jax.data.batch import Batch
from promptkd_jax.data.logprobs import Cached
from promptkd_jax.data.packing import Packing, check_packing, pack_batch
from promptkd_jax.data.rows import Rows
from promptkd_jax.infra.errors import DataError


def collate(rows: Rows, indices: Sequence[int], *, length: int, pad_id: int = 0) -> Batch:
    """The rows at `indices` as one batch of width T = length: each from column 0, then pad_id.

    Raises:
      DataError: a row is longer than `length`.
    """
    tokens = np.full((len(indices), length), pad_id, np.int32)
    supervised = None if rows.supervised is None else np.zeros((len(indices), length), bool)
    lengths = np.array([len(rows.tokens[i]) for i in indices], np.int32)
    for b, i in enumerate(indices):
        if lengths[b] > length:
            raise DataError(
                f"row {i} has {lengths[b]} tokens, the batch has room for {length}; "
                "expected length >= the max_length given to tokenize"
            )
        tokens[b, : lengths[b]] = rows.tokens[i]
        if supervised is not None:
            supervised[b, : lengths[b]] = rows.supervised[i]
    prompt_lengths = rows.prompt_lengths[np.asarray(indices)]
    return Batch(tokens, prompt_lengths, lengths, supervised=supervised)


def train_batches(
    rows: Rows,
    *,
    batch_size: int,
    length: int,
    seed: int,
    cached: Cached | None = None,
    capacity: int | None = None,
    packing: Packing | None = None,
) -> grain.MapDataset:
    """An endless data set: element i is the Batch of step i, a pure function of (rows, seed, i).

    An epoch is len(rows.tokens) // batch_size batches; each is shuffled anew over all rows, and
    leaves out the remainder. Of rows of several sources (`Rows.shares`) each source is shuffled
    anew when all of its rows were seen, and has its share of every stretch of batches.

    Args:
      cached: what the teacher wrote down about these rows, to go with each batch.
      capacity: R, the response positions of a batch; for `cached`, and as large as the longest
        response where it is not given.
      packing: of the rows of each batch, which are the same as without it; None: not packed.

    Raises:
      DataError: there are fewer rows than batch_size, a row is longer than `length` or than
        `capacity`, or those of a step do not fit into its packed rows.
    """
    count = len(rows.tokens)
    if batch_size > count:
        raise DataError(
            f"batch_size {batch_size} is larger than the {count} rows ({rows.dropped} records "
            f"were dropped for long prompts); expected at most {count}"
        )
    responses = rows.num_supervised
    capacity = capacity or int(max(responses))

    def make(indices: Sequence[int]) -> Batch:
        batch = collate(rows, indices, length=length)
        if cached is None:
            return batch
        return batch._replace(cached=cached.rows(indices, capacity))

    def make_packed(indices: Sequence[int]) -> Batch:
        return pack_batch(make(indices), packing.rows, gap=packing.gap, capacity=capacity)

    lengths = np.array(list(map(len, rows.tokens)))
    for each in (lengths, responses):
        make([int(np.argmax(each))])  # a row that is too long stops the run here

    # Grain shuffles epoch e with seed + e: unspread, epoch 1 of seed 0 would be epoch 0 of seed 1.
    def spread(*seed: int) -> int:
        return int(np.random.SeedSequence(seed).generate_state(1)[0])

    batch = dict(batch_size=batch_size, drop_remainder=True, batch_fn=list)
    if not rows.shares:
        order = grain.MapDataset.range(count).shuffle(spread(seed)).batch(**batch).repeat()
    else:
        counts, shares = zip(*rows.shares)
        ends = itertools.accumulate(counts)
        sources = [
            grain.MapDataset.range(end - count, end).shuffle(spread(seed, place)).repeat()
            for place, (count, end) in enumerate(zip(counts, ends))
        ]
        order = grain.MapDataset.mix(sources, shares).batch(**batch)
    if packing is None:
        return order.map(make)
    check_packing(lengths, order, packing, length)
    return order.map(make_packed)


def stream(dataset: grain.MapDataset, start: int) -> Iterator[Batch]:
    """Yields dataset[start], dataset[start + 1], …, preparing the next few in a thread.

    However far it has read ahead, the position to save is the index of the next batch to train on:
    start plus the number of batches taken.

    Raises:
      IndexError: `start` is negative or past the end of the data set.
    """
    # One thread: a row is a copy, more of them would only compete for the interpreter.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    batches = iter(dataset.to_iter_dataset(options))
    batches.set_state({"next_index": start})
    return batches


def eval_batches(
    rows: Rows, *, batch_size: int, length: int, first: int = 0
) -> Iterator[tuple[Batch, int]]:
    """Yields all rows from row `first` on, in batches of one shape, each with how many of its rows
    are real.

    The last batch is filled up by repeating the last row.

    Raises:
      DataError: a row is longer than `length`.
    """
    count = len(rows.tokens)
    for start in range(first, count, batch_size):
        indices = np.minimum(np.arange(start, start + batch_size), count - 1)
        yield collate(rows, indices, length=length), min(batch_size, count - start)
