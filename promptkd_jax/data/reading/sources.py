"""Sources: the fields of examples, each with its place, from files, folders of shards and the hub.

Examples come one after the other, so that no file has to fit into memory. Only fields of JSON,
tables and data sets are known here; `formats` says what they mean.
"""

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from etils import epath

from promptkd_jax.data.reading.parsers import (
    READ,
    File,
    Located,
    file_kind,
    read_file,
    without_absent,
)
from promptkd_jax.infra.errors import DataError, Faults
from promptkd_jax.infra.files import address_fault, io_errors, is_remote, to_path

ASSETS = {"package:": "data/assets", "synthetic:": "data/assets/synthetic"}
_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_SPLIT = re.compile(
    r"(^|[^a-z])(train|training|valid|validation|val|dev|test|testing|eval|evaluation)([^a-z]|$)"
)
_READ_BYTES = 2**20
_HUB = re.compile(r"(?P<path>[^:@]+)(:(?P<name>[^@]+))?(@(?P<revision>.+))?")


def read_fields(source: str, faults: Faults, *, split: str = "train") -> Iterator[Located]:
    """Yields the fields of every example, with its place for messages: file:line, or the row (from
    0) of a .parquet file or a data set. A line of a .txt file is an example {"text": line}.

    Args:
      source: a file (see `READ`), a folder of such files of one kind, or a pattern such as
        "data/part-*.jsonl"; "package:NAME" for a file in promptkd_jax/data/assets; "synthetic:NAME"
        for one of the texts of a small grammar there ("train", "dev", "test" or "longer"); or a
        data set of the Hugging Face hub, owner/name[:configuration][@revision], or a folder laid
        out like one, with files named by splits.
      faults: gets the examples that cannot be read, which are left out.
      split: the split of a data set, or an expression such as "train[:1000]"; files have none.

    Raises:
      DataError: there is no such source, or a file is of another kind; says of which.
    """
    files = _find_files(source)
    if files is None:
        yield from _read_data_set(source, split)
        return
    for name, file in files:
        try:
            yield from read_file(name, file, faults)
        except io_errors(source) as error:
            raise DataError(f"{name}: cannot be read: {error}") from error


def is_files(source: str) -> bool:
    """Whether `source` means files, and not a data set; the hub is not asked.

    Raises:
      DataError: it is plainly not there.
    """
    return _find_files(source) is not None


def source_digest(source: str, *, split: str = "train") -> str:
    """A digest of all that `read_fields` would read, and of its order.

    Raises:
      DataError: as `read_fields`; not where the examples are broken.
    """
    whole, files = hashlib.sha256(), _find_files(source)
    if files is None:
        for _, fields in _read_data_set(source, split):
            whole.update(json.dumps(fields, default=str).encode() + b"\n")
    for name, file in files or ():
        try:
            with file.open("rb") as stream:
                while some := stream.read(_READ_BYTES):
                    whole.update(some)
        except io_errors(source) as error:
            raise DataError(f"{name}: cannot be read: {error}") from error
        whole.update(file_kind(name).encode() + b"\n")
    return f"sha256 {whole.hexdigest()}"


# Which files


def _find_files(source: str) -> list[tuple[str, File]] | None:
    """The files that `source` means, each with its name for messages; None for a data set."""
    for prefix, folder in ASSETS.items():
        if source.startswith(prefix):
            return [(source, _find_asset(source, source.removeprefix(prefix), folder))]
    if fault := address_fault(source):
        raise DataError(f"{source} is not {fault}")
    path = to_path(source)
    try:
        if path.is_file():
            return [(source, path)]
        if is_pattern := glob.has_magic(source):
            found = _match(path)
        else:
            found = list(_walk(path)) if path.is_dir() else []
    except io_errors(source) as error:
        raise DataError(f"{source}: cannot be read: {error}") from error
    if is_pattern and not found:
        raise DataError(f"{source}: no file matches this (looked from {Path.cwd()})")
    if found and not is_pattern:
        found = _shards(source, path, found)
    if found:
        return [(os.fspath(file), file) for file in found]
    if not is_remote(source) and path.is_dir():
        return None
    if file_kind(source) or is_remote(source) or not _HUB.fullmatch(source):
        raise DataError(f"{source}: no such file (looked from {Path.cwd()})")
    return None


def _find_asset(source: str, name: str, folder: str) -> Traversable:
    place = resources.files("promptkd_jax") / folder
    files = {file.name: file for file in place.iterdir() if file.name.endswith(".jsonl")}
    for known in (name, f"{name}.jsonl"):
        if known in files:
            return files[known]
    raise DataError(f"{source}: promptkd_jax/{folder} has no {name!r}; it has {sorted(files)}")


def _match(pattern: epath.Path) -> list[epath.Path]:
    """The files of a pattern, sorted; on a disk `**` stands for any folders."""
    if not is_remote(pattern):
        found = map(to_path, glob.glob(os.fspath(pattern), recursive=True))
    elif "**" in pattern.parts:
        raise DataError(f"{pattern}: in a bucket a pattern has no **, which asks for every object")
    else:
        fixed = next(parent for parent in pattern.parents if not glob.has_magic(os.fspath(parent)))
        found = fixed.glob(_below(pattern, fixed))
    return sorted((file for file in found if file.is_file()), key=os.fspath)


def _walk(folder: epath.Path) -> Iterator[epath.Path]:
    """Yields the files of a folder and of those in it, sorted, without hidden ones."""
    for entry in sorted(folder.iterdir(), key=os.fspath):
        if not entry.name.startswith("."):
            if entry.is_dir():
                yield from _walk(entry)
            else:
                yield entry


def _below(file: epath.Path, folder: epath.Path) -> str:
    return file.relative_to(folder).as_posix()


def _shards(source: str, folder: epath.Path, found: list[epath.Path]) -> list[epath.Path]:
    """Those of a folder's files that are its data; none where they are named by splits, of which
    `datasets` chooses."""
    found = [file for file in found if file_kind(file.name) and file.name not in _METADATA]
    kinds = sorted({file_kind(file.name) for file in found})
    others = [x for x in found if not _SPLIT.search(_below(x, folder).lower())]
    if len(others) < len(found):
        if others:
            split = next(file for file in found if file not in others)
            raise DataError(
                f"{source}: has files named by splits, such as {_below(split, folder)}, beside "
                f"others, such as {_below(others[0], folder)}; say which are meant by a pattern "
                f"such as {source.rstrip('/')}/*{file_kind(split.name)}"
            )
        if is_remote(source):
            raise DataError(
                f"{source}: has files of splits; say which are meant by a pattern such as "
                f"{source.rstrip('/')}/train*"
            )
        return []
    if len(kinds) > 1:
        raise DataError(
            f"{source}: has files of several kinds ({', '.join(kinds)}); say which are meant by a "
            f"pattern such as {source.rstrip('/')}/*{kinds[0]}"
        )
    if not found and is_remote(source):
        raise DataError(f"{source}: no data in this folder; what is read: {READ}")
    return found


# Data sets


def _read_data_set(source: str, split: str) -> Iterator[Located]:
    import datasets  # takes a second to import, and a run on local files needs none of it

    if to_path(source).is_dir():
        named, absent = dict(path=os.fspath(to_path(source))), ""
    else:
        absent = "no such file, and "
        named = {k: v for k, v in _HUB.fullmatch(source).groupdict().items() if v is not None}
    failures = (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError)
    try:
        rows = datasets.load_dataset(**named, split=split)
    except failures as error:
        raise DataError(
            f"{source}: {absent}reading split {split!r} of a Hugging Face data set of this name "
            f"failed: {error}"
        ) from error
    for number, fields in enumerate(rows):
        yield f"{source} (split {split!r}) row {number}", without_absent(fields)
