"""Packed rows: several rows of a batch one behind the other in one, each a segment that sees itself
alone.

The batch stays what it is: the same rows in the same step, in fewer columns. It is packed as a
whole, so that a step is still a function of its number alone. Grain's `FirstFitPackIterDataset`
carries open rows from batch to batch: where a run stands would be more than one number, and how
many rows a step has would be luck.

B rows of a batch, T columns, R response positions, k kept tokens of a cached teacher.
"""

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from promptkd_jax.data.batch import Batch
from promptkd_jax.infra.errors import DataError


class Packing(NamedTuple):
    """How the rows of a step are packed: into `rows` rows, with `gap` empty columns between two
    segments, for a prefix that the teacher sees in front of each; `steps` have to fit."""

    rows: int
    gap: int
    steps: int


def packed_places(lengths: Sequence[int], number: int, columns: int, gap: int) -> list[list[int]]:
    """Returns for each of `number` packed rows which rows are in it; [] where they do not fit.

    The longest row first, each to where the most room is (Graham 1969, "longest processing time"),
    so that all packed rows get about as long, and all fit into a smaller length bucket.

    Args:
      lengths: `[B]`; columns: T, of a packed row; gap: columns between two rows.
    """
    # A heap, of which the first is the least: so the room of each packed row is negative.
    room, places = [(-columns, place) for place in range(number)], [[] for _ in range(number)]
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        most, place = room[0]
        if -most < lengths[index]:
            return []
        heapq.heapreplace(room, (most + int(lengths[index]) + gap, place))
        places[place].append(index)
    return [sorted(place) for place in places]


def check_packing(
    lengths: np.ndarray, order: Sequence[Sequence[int]], packing: Packing, columns: int
) -> None:
    """Raises DataError where the rows of a step do not fit into its packed rows.

    Args:
      lengths: of all rows; order: by step, the rows that it has; columns: T.
    """
    most, where = packing.rows, 0
    for step in range(packing.steps):
        of_step = lengths[np.asarray(order[step])]
        while not packed_places(of_step, most, columns, packing.gap):
            most, where = most + 1, step
    if most > packing.rows:
        between = f" with {packing.gap} columns between two" if packing.gap else ""
        raise DataError(
            f"packed_rows: {packing.rows} rows of {columns} columns do not hold the "
            f"{len(of_step)} rows of every step{between}: step {where} (from 0) needs {most}; "
            f"expected at least {most}, or 0 for rows that are not packed"
        )


def pack_batch(batch: Batch, rows: int, *, gap: int = 0, capacity: int = 0) -> Batch:
    """Returns the batch, NumPy arrays, in `rows` packed rows of as many columns.

    Each row is a segment, in the order of the batch; between two are `gap` columns of no token,
    where a model that sees the rows behind a prefix `[gap, D]` puts the prefix of the latter (see
    `Decoder`). Losses and their gradients are those of the rows by themselves.

    Args:
      capacity: R, the response positions of a packed row; for what is cached.

    Raises:
      ValueError: the rows do not fit, or are fewer than `rows`.
    """
    tokens, lengths = np.asarray(batch.tokens), np.asarray(batch.lengths)
    places = packed_places(lengths, rows, tokens.shape[1], gap)
    if not all(places) or not places:
        raise ValueError(
            f"{len(lengths)} rows of {lengths.sum()} tokens, with {gap} columns between two, do "
            f"not fit into {rows} rows of {tokens.shape[1]} columns"
        )
    columns = np.arange(tokens.shape[1])
    supervised = batch.supervised
    if supervised is None:
        supervised = columns >= batch.prompt_lengths[:, None]
    supervised = np.asarray(supervised) & (columns < lengths[:, None])
    # From here on `rows` packed rows of T columns: [rows, T], and [rows] of their lengths.
    new_tokens, segment_ids = (np.zeros((rows, len(columns)), np.int32) for _ in range(2))
    new_supervised = np.zeros((rows, len(columns)), bool)
    new_lengths, nothing = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
    for place, indices in enumerate(places):
        # Columns [begin, end) of packed row `place`; then `gap` empty ones, and the next segment.
        begin = 0
        for segment, index in enumerate(indices, start=1):
            end = begin + lengths[index]
            new_tokens[place, begin:end] = tokens[index, : lengths[index]]
            new_supervised[place, begin:end] = supervised[index, : lengths[index]]
            segment_ids[place, begin:end] = segment
            new_lengths[place], begin = end, end + gap
    cached = batch.cached
    if cached is not None:
        # A row's first token is predicted by nothing: it has no position, and nothing cached.
        counts = supervised[:, 1:].sum(axis=1)
        cached = jax.tree.map(lambda x: _pack_responses(x, counts, places, capacity), cached)
    return Batch(new_tokens, nothing, new_lengths, cached, new_supervised, segment_ids)


def _pack_responses(
    x: np.ndarray, counts: np.ndarray, places: list[list[int]], capacity: int
) -> np.ndarray:
    """The first `counts` `[B]` of `[B, R, …]`, those of the rows of a packed row one behind the
    other: `[rows, capacity, …]`, 0 behind them."""
    # `responses` finds the supervised tokens of a packed row in the order of its columns, which is
    # that of its segments: so position r of the packed row is where these parts put it.
    packed = np.zeros((len(places), capacity, *x.shape[2:]), x.dtype)
    for place, indices in enumerate(places):
        parts = np.concatenate([x[index, : counts[index]] for index in indices])
        packed[place, : len(parts)] = parts
    return packed
