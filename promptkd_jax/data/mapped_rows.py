"""Rows in files that are mapped into memory, so that they may be larger than it.

Records are tokenised once: what made the files stands in their manifest, by content, and names
their folder. A writing that is stopped leaves nothing that is taken for whole.

    FOLDER/DIGEST/tokens.bin       int32: the tokens of all rows, one row after the other
                  supervised.bin   bool: for each token whether a student learns from it
                  rows.bin         [rows, 2] int64: up to where each row goes, where its prompt ends
                  manifest.json    what made it, and the other fields of `Rows`
"""

import contextlib
import hashlib
import json
import os
import pathlib
import platform
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from promptkd_jax.data.reading.records import Record
from promptkd_jax.data.rows import Rows, RowSink
from promptkd_jax.infra.errors import DataError

FORMAT = 1
_DTYPES = {"tokens": np.dtype("<i4"), "supervised": np.dtype(bool), "rows": np.dtype("<i8")}
_BUFFER = 2**20  # bytes of a file that wait to be written


class RowFiles:
    """A `RowSink` in the files of a folder, which keeps no records."""

    def __init__(self, folder: pathlib.Path, stack: contextlib.ExitStack):
        self._files = {}
        for name in _DTYPES:
            file = (folder / f"{name}.bin").open("wb", buffering=_BUFFER)
            self._files[name] = stack.enter_context(file)
        self._folder, self._end, self._count = folder, 0, 0

    def append(
        self, tokens: np.ndarray, prompt_length: int, supervised: np.ndarray, record: Record | None
    ) -> None:
        self._end, self._count = self._end + len(tokens), self._count + 1
        values = dict(tokens=tokens, supervised=supervised, rows=[self._end, prompt_length])
        for name, value in values.items():
            self._files[name].write(np.asarray(value, _DTYPES[name]).tobytes())

    def finish(self, masked: bool, **facts: Any) -> Rows:
        for file in self._files.values():
            file.close()
        if not masked:  # as long as the responses, which need no file
            (self._folder / "supervised.bin").unlink()
        return _open(self._folder, masked, facts, dict(rows=self._count, tokens=self._end))


class _Slices(Sequence[np.ndarray]):
    """Rows of a flat array."""

    def __init__(self, flat: np.ndarray, ends: np.ndarray):
        self._flat, self._ends = flat, ends

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> np.ndarray:
        index = range(len(self))[index]
        return self._flat[self._ends[index - 1] if index else 0 : self._ends[index]]


def mapped_rows(
    folder: pathlib.Path | None,
    made_from: Mapping[str, Any],
    write: Callable[[RowSink], tuple[Rows, Mapping[str, int]]],
) -> Rows:
    """Opens the rows in `folder` that were made from the same, or has them written.

    Every process of a run may do so by itself: the first one whose files are whole wins.

    Args:
      folder: for any number of such rows; None: one that no other run sees, and that is gone as
        soon as it is mapped.
      made_from: what decides the rows, by content, of JSON's types.
      write: given where they go, tokenises them, and returns them with `Rows.left_out`.

    Raises:
      DataError: files are damaged.
    """
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="promptkd-rows-") as scratch:
            return mapped_rows(pathlib.Path(scratch), made_from, write)
    made_from = json.loads(json.dumps({"format": FORMAT, **made_from}))
    digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]
    place = folder / digest
    if not (place / "manifest.json").exists():
        with _unfinished(folder, digest) as unfinished:
            with contextlib.ExitStack() as stack:
                rows, left_out = write(RowFiles(unfinished, stack))
            facts = {name: getattr(rows, name) for name in ("dropped", "cut", "date", "shortened")}
            manifest = {
                "made_from": made_from,
                "rows": len(rows.tokens),
                "tokens": int(sum(map(len, rows.tokens))),
                "masked": rows.supervised is not None,
                "facts": {**facts, "left_out": dict(left_out)},
            }
            (unfinished / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
            try:
                os.rename(unfinished, place)
            except OSError:
                if not (place / "manifest.json").exists():  # else another process has been faster
                    raise
    try:
        manifest = json.loads((place / "manifest.json").read_text())
        return _open(place, manifest["masked"], manifest["facts"], manifest)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{place}: damaged: {error}; remove it, it is written anew") from error


def _open(
    folder: pathlib.Path, masked: bool, facts: Mapping[str, Any], sizes: Mapping[str, int]
) -> Rows:
    counts = {"rows": 2 * sizes["rows"], "tokens": sizes["tokens"], "supervised": sizes["tokens"]}

    def read(name: str) -> np.ndarray:
        file = folder / f"{name}.bin"
        found, expected = os.stat(file).st_size, counts[name] * _DTYPES[name].itemsize
        if found != expected:
            raise ValueError(f"{file.name} has {found} bytes, expected {expected}")
        return np.asarray(np.memmap(file, _DTYPES[name], "r"))

    ends, prompt_lengths = read("rows").reshape(-1, 2).T
    ends = np.ascontiguousarray(ends)
    return Rows(
        _Slices(read("tokens"), ends),
        prompt_lengths.astype(np.int32),
        (),
        supervised=_Slices(read("supervised"), ends) if masked else None,
        **facts,
    )


@contextlib.contextmanager
def _unfinished(folder: pathlib.Path, digest: str) -> Iterator[pathlib.Path]:
    """A new folder for files that are not whole; removes those that killed processes of this
    machine have left."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".unfinished-*"):
        process, _, node = left.name.removeprefix(".unfinished-").partition("@")
        if node == platform.node() and not _is_alive(int(process.partition("-")[0])):
            shutil.rmtree(left, ignore_errors=True)
    name = f".unfinished-{os.getpid()}-{secrets.token_hex(4)}@{platform.node()}"
    unfinished = folder / name
    unfinished.mkdir()
    try:
        yield unfinished
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
