"""A teacher's log-probabilities, read from the cache that `promptkd cache` wrote."""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np
from etils import epath

from promptkd_jax.data.top_k import TopK
from promptkd_jax.infra.errors import DataError
from promptkd_jax.infra.files import is_remote

ARRAYS = tuple(f"{name}.npy" for name in TopK._fields)


@dataclasses.dataclass(frozen=True, eq=False)
class Cached:
    """A finished cache, made by `write_cache` or `open_cache`. It holds no open file: threads may
    share it, and it can be sent to other processes."""

    folder: pathlib.Path
    offsets: np.ndarray  # [rows + 1]
    vocab_size: int

    def rows(self, indices: Sequence[int], capacity: int) -> TopK:
        """What the teacher gave at the response positions of the rows at `indices`, in NumPy.

        Args:
          capacity: R; column r of a row is the position that predicts its response token r, as in
            `batch.responses`. Columns behind a row's last token hold the uniform distribution.

        Returns:
          TopK `[B, R, k]`, the largest first, with its tail.

        Raises:
          DataError: a row has more than `capacity` response tokens, or a file is damaged.
        """
        stored = [open_array(self.folder / name) for name in ARRAYS]
        places, top_k = (len(indices), capacity), stored[0].shape[1]
        ids = np.tile(np.arange(top_k, dtype=np.int32), (*places, 1))
        values = np.full((*places, top_k), -np.log(self.vocab_size), np.float32)
        with np.errstate(divide="ignore"):  # where all tokens are kept, none are left
            tail = np.full(places, np.log1p(-top_k / self.vocab_size), np.float32)
        for b, index in enumerate(indices):
            start, end = self.offsets[index], self.offsets[index + 1]
            if end - start > capacity:
                raise DataError(
                    f"{self.folder}: row {index} has {end - start} response tokens, the batch has "
                    f"room for {capacity}"
                )
            for array, column in zip((ids, values, tail), stored):
                array[b, : end - start] = column[start:end]
        return TopK(ids, values, tail)


def open_array(file: pathlib.Path) -> np.ndarray:
    try:
        return np.load(file, mmap_mode="r")
    except (OSError, EOFError, ValueError) as error:
        raise DataError(
            f"{file}: damaged or missing: {error}; remove {file.parent}, and write it anew"
        ) from error


def on_a_file_system(folder: epath.PathLike) -> pathlib.Path:
    """The same folder. Raises DataError for one in a bucket."""
    if is_remote(folder):
        raise DataError(
            f"{folder}: a cache is read at random through memory maps, which a bucket does not "
            "have; expected a folder of a disk or of a shared file system"
        )
    return pathlib.Path(folder)
