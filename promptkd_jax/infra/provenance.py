"""Manifests: what made a file that took long to make, so that nothing else's is taken for it."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
from etils import epath

from promptkd_jax.infra import distributed
from promptkd_jax.infra.errors import DataError
from promptkd_jax.infra.files import make_folder, read_text, write_json, write_text

FORMAT = 1
INPUTS = "inputs.json"  # of a run, in its workdir


def verify_or_write(
    manifest: epath.Path,
    made_from: dict[str, Any],
    made_by: str,
    *,
    file: epath.Path | None = None,
    state: Mapping[str, Any] | None = None,
) -> None:
    """Compares `manifest` with `made_from`, or writes it where there is none.

    All processes of a run call this alike; the first looks and writes, then all go on.

    Args:
      made_by: the name of the teacher.
      file: must not be there without its manifest.
      state: what a new manifest says besides, such as how far the writing has come; not compared.

    Raises:
      DataError: as `verify`; or there is `file` alone.
    """

    def compare_or_write():
        if manifest.exists():
            verify(manifest, made_from)
        elif file is not None and file.exists():
            raise DataError(
                f"{file}: {manifest.name}, which says what made it, is missing; remove it"
            )
        else:
            make_folder(manifest.parent)
            # For the reader: a teacher may move, and a newer package reads what an older one wrote.
            producer = {"made_by": made_by, "promptkd_jax": version("promptkd_jax")}
            write_json(manifest, made_from | dict(state or {}) | producer)

    distributed.run_on_primary(compare_or_write)


def resume_lines(
    file: epath.Path,
    made_from: dict[str, Any],
    made_by: str,
    *,
    batch_size: int,
    total: int | None = None,
) -> list[Any]:
    """Reads JSON lines that are written in batches, as far as the writing has come.

    What made the file stands beside it in `NAME.manifest.json`. The end of a stopped writing is cut
    off down to a whole batch, so that what is still to be written is computed in the same batches
    as if it had never been stopped. All processes of a run get the lines of the first.

    Args:
      made_by: the name of the teacher.
      batch_size: lines that are written together.
      total: lines of a finished file, whose last batch may be smaller; None if all are alike.

    Raises:
      DataError: something else made `file`, or a line of it is no JSON.
    """
    manifest = file.with_suffix(".manifest.json")
    verify_or_write(manifest, made_from, made_by, file=file)

    def read_whole_batches():
        lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
        count = sum(line.endswith(b"\n") for line in lines)  # all but a torn last one
        if count != total:
            count -= count % batch_size
        if count < len(lines):
            write_text(file, b"".join(lines[:count]).decode())
        return [_parse(f"{file}:{i}", line) for i, line in enumerate(lines[:count], start=1)]

    return distributed.run_on_primary(read_whole_batches)


def _parse(where: str, line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise DataError(
            f"{where}: damaged: {error}; remove this line and those after it, they are written anew"
        ) from error


def verify(manifest: epath.Path, made_from: dict[str, Any]) -> None:
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


def verify_inputs(workdir: epath.Path, inputs: dict[str, Any]) -> None:
    """Makes `inputs.json` say what a run learns from, by content: paths say nothing of it.

    Raises:
      DataError: the run that the folder belongs to was started with other inputs; says which.
    """

    def compare_or_write():
        file = workdir / INPUTS
        if not file.exists():
            make_folder(workdir)
            write_json(file, inputs)
        elif lines := _differences(read_manifest(file), inputs):
            raise DataError(
                f"{workdir} belongs to a run whose inputs were others; take another --workdir, or "
                "set back\n" + "\n".join(lines)
            )

    distributed.run_on_primary(compare_or_write)


def fingerprint_rows(rows: Iterable[Sequence[int]]) -> str:
    """How many rows of integers, and a digest of them and of where each ends."""
    whole, count = hashlib.sha256(), 0
    for row in rows:
        count += 1
        whole.update(len(row).to_bytes(8, "little"))
        whole.update(np.asarray(row, "<i8").tobytes())
    return f"{count} rows, sha256 {whole.hexdigest()}"


def read_manifest(file: epath.Path) -> dict[str, Any]:
    """Reads a manifest. Raises DataError where it is no JSON."""
    try:
        return json.loads(read_text(file))
    except ValueError as error:
        raise DataError(
            f"{file}: damaged: {error}; remove it and what lies beside it, it is written anew"
        ) from error
