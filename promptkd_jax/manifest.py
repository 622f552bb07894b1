"""Manifests: what made a file that took long to make, so that nothing else's is taken for it."""

import functools
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
from etils import epath

from promptkd_jax import hosts
from promptkd_jax.data import DataError
from promptkd_jax.files import make_folder, read_text, write_json
from promptkd_jax.models.load import Model, resolve
from promptkd_jax.synthetic import PREFIX

_END = 2**20  # bytes
FORMAT = 1


def claim(
    manifest: epath.Path,
    made_from: dict[str, Any],
    teacher: Model,
    *,
    file: epath.Path | None = None,
    state: Mapping[str, Any] | None = None,
) -> None:
    """Compares `manifest` with `made_from`, or writes it where there is none.

    All processes of a run call this alike; the first looks and writes, then all go on.

    Args:
      file: must not be there without its manifest.
      state: what a new manifest says besides, such as how far the writing has come; not compared.

    Raises:
      DataError: as `compare`; or there is `file` alone.
    """
    hosts.on_first(lambda: _compare_or_write(manifest, made_from, teacher, file, state))


def _compare_or_write(manifest, made_from, teacher, file, state) -> None:
    if manifest.exists():
        compare(manifest, made_from)
    elif file is not None and file.exists():
        raise DataError(f"{file}: {manifest.name}, which says what made it, is missing; remove it")
    else:
        make_folder(manifest.parent)
        write_json(manifest, made_from | dict(state or {}) | made_by(teacher))


def compare(manifest: epath.Path, made_from: dict[str, Any]) -> None:
    """Raises DataError where `manifest` says anything else than `made_from`, with all that
    differs."""
    found, wanted = read_json(manifest), json.loads(json.dumps(made_from))
    lines = [
        f"  {name}: there {found.get(name)!r}, now {value!r}"
        for name, value in wanted.items()
        if found.get(name) != value
    ]
    if lines:
        raise DataError(
            f"{manifest}: was made (by teacher {found.get('made_by')}) from something else; take "
            "another place for it, or set back\n" + "\n".join(lines)
        )


def made_by(teacher: Model) -> dict[str, str]:
    """For the reader; a teacher may move, and a newer package reads what an older one wrote."""
    return {"made_by": teacher.name, "promptkd_jax": version("promptkd_jax")}


def of_files(path: str, dtype: str, param_dtype: str) -> dict[str, str]:
    """What tells a teacher from others: its files, and what it is computed in.

    A `synthetic:` one has no files, and its name decides every parameter. The files are read by the
    first process of a run, which tells the others.
    """
    return {
        "teacher": path if path.startswith(PREFIX) else hosts.on_first(lambda: _digest(path)),
        "dtype": f"{dtype}, parameters {param_dtype}",
    }


def _digest(path: str) -> str:
    digests = (_file_digest(file, *_version_of(file)) for file in _files(path))
    return "sha256 " + hashlib.sha256(b"".join(digests)).hexdigest()


def _files(path: str) -> list[pathlib.Path]:
    file = resolve(path)
    if file.is_file():
        return [file]
    return [file / "config.json", *sorted(file.glob("*.safetensors"))]


def glimpse(path: str) -> str:
    """A digest of the ends of a model's files, quickly read, which differs where the files do."""
    if path.startswith(PREFIX):
        return path
    whole = hashlib.sha256()
    for file in _files(path):
        with file.open("rb") as opened:
            whole.update(opened.read(_END))
            opened.seek(max(0, file.stat().st_size - _END))
            whole.update(opened.read())
    return whole.hexdigest()


def of_model(teacher: Model) -> dict[str, str]:
    """`of_files` of a loaded model."""
    config = teacher.decoder.config
    return of_files(teacher.name, config.dtype, config.param_dtype)


def _version_of(file: pathlib.Path) -> tuple[int, int]:
    """What changes when the file does."""
    found = file.stat()
    return found.st_size, found.st_mtime_ns


@functools.lru_cache(maxsize=64)
def _file_digest(file: pathlib.Path, size: int, changed: int) -> bytes:
    """Read once, though a run compares several manifests with the same gigabytes."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").digest()


def of_tokenizer(tokenizer: Any) -> str:
    """A tokenizer's size, and a digest of its sorted vocabulary."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    digest = hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()
    return f"{len(vocabulary)} tokens, sha256 {digest}"


def of_rows(rows: Sequence[Sequence[int]]) -> str:
    """How many rows of integers, and a digest of them and of where each ends."""
    whole = hashlib.sha256()
    for row in rows:
        whole.update(len(row).to_bytes(8, "little"))
        whole.update(np.asarray(row, "<i8").tobytes())
    return f"{len(rows)} rows, sha256 {whole.hexdigest()}"


def read_json(file: epath.Path) -> dict[str, Any]:
    """What a manifest says. Raises DataError where it is no JSON."""
    try:
        return json.loads(read_text(file))
    except ValueError as error:
        raise DataError(
            f"{file}: damaged: {error}; remove it and what lies beside it, it is written anew"
        ) from error
