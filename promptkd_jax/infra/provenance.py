"""Manifests: what made a file that took long to make, so that nothing else's is taken for it."""

import functools
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import Any

import numpy as np
from etils import epath

from promptkd_jax.data.records import DataError, Rows
from promptkd_jax.infra import distributed
from promptkd_jax.infra.files import make_folder, read_text, write_json
from promptkd_jax.models.io.hub import resolve
from promptkd_jax.models.load import Model
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
    distributed.on_first(lambda: _compare_or_write(manifest, made_from, teacher, file, state))


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
    found = read_manifest(manifest)
    if lines := _differences(found, made_from):
        raise DataError(
            f"{manifest}: was made (by teacher {found.get('made_by')}) from something else; take "
            "another place for it, or set back\n" + "\n".join(lines)
        )


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    wanted = json.loads(json.dumps(wanted))
    return [
        f"  {name}: there {found.get(name)!r}, now {value!r}"
        for name, value in wanted.items()
        if found.get(name) != value
    ]


def claim_inputs(workdir: epath.Path, inputs: dict[str, Any]) -> None:
    """Makes `inputs.json` say what a run learns from, by content: paths say nothing of it.

    Raises:
      DataError: the run that the folder belongs to was started with other inputs; says which.
    """

    def compare_or_write():
        file = workdir / "inputs.json"
        if not file.exists():
            make_folder(workdir)
            write_json(file, inputs)
        elif lines := _differences(read_manifest(file), inputs):
            raise DataError(
                f"{workdir} belongs to a run whose inputs were others; take another --workdir, or "
                "set back\n" + "\n".join(lines)
            )

    distributed.on_first(compare_or_write)


def made_by(teacher: Model) -> dict[str, str]:
    """For the reader; a teacher may move, and a newer package reads what an older one wrote."""
    return {"made_by": teacher.name, "promptkd_jax": version("promptkd_jax")}


def of_files(path: str, dtype: str, param_dtype: str) -> dict[str, str]:
    """What tells a teacher from others: its files, and what it is computed in.

    A `synthetic:` one has no files, and its name decides every parameter. The files are read by the
    first process of a run, which tells the others.
    """
    return {"teacher": of_weights(path), "dtype": f"{dtype}, parameters {param_dtype}"}


def of_weights(path: str) -> str:
    """A digest of a model's files, or its name where it has none."""
    return path if path.startswith(PREFIX) else distributed.on_first(lambda: _digest(path))


def _digest(path: str) -> str:
    files = _files(path)
    with ThreadPoolExecutor() as pool:
        digests = pool.map(lambda file: _file_digest(file, *_version_of(file)), files)
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
    """A tokenizer's size, and a digest of its sorted vocabulary. (Rows tell how it splits text.)"""
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


def of_records(rows: Rows) -> str:
    """`of_rows` with where each prompt ends, and all references."""
    tokens = [np.append(start, row) for start, row in zip(rows.prompt_lengths, rows.tokens)]
    outputs = json.dumps([record.outputs for record in rows.records]).encode()
    return f"{of_rows(tokens)}, references {hashlib.sha256(outputs).hexdigest()[:16]}"


def read_manifest(file: epath.Path) -> dict[str, Any]:
    """Reads a manifest. Raises DataError where it is no JSON."""
    try:
        return json.loads(read_text(file))
    except ValueError as error:
        raise DataError(
            f"{file}: damaged: {error}; remove it and what lies beside it, it is written anew"
        ) from error
