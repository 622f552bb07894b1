"""Manifests: what made a file that took long to make, so that nothing else's is taken for it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
from etils import epath

from promptkd_jax.infra import distributed
from promptkd_jax.infra.errors import DataError
from promptkd_jax.infra.files import make_folder, read_text, write_json

FORMAT = 1


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
    distributed.run_on_primary(lambda: _compare_or_write(manifest, made_from, made_by, file, state))


def _compare_or_write(manifest, made_from, made_by, file, state) -> None:
    if manifest.exists():
        verify(manifest, made_from)
    elif file is not None and file.exists():
        raise DataError(f"{file}: {manifest.name}, which says what made it, is missing; remove it")
    else:
        make_folder(manifest.parent)
        # For the reader: a teacher may move, and a newer package reads what an older one wrote.
        producer = {"made_by": made_by, "promptkd_jax": version("promptkd_jax")}
        write_json(manifest, made_from | dict(state or {}) | producer)


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
        file = workdir / "inputs.json"
        if not file.exists():
            make_folder(workdir)
            write_json(file, inputs)
        elif lines := _differences(read_manifest(file), inputs):
            raise DataError(
                f"{workdir} belongs to a run whose inputs were others; take another --workdir, or "
                "set back\n" + "\n".join(lines)
            )

    distributed.run_on_primary(compare_or_write)


def fingerprint_rows(rows: Sequence[Sequence[int]]) -> str:
    """How many rows of integers, and a digest of them and of where each ends."""
    whole = hashlib.sha256()
    for row in rows:
        whole.update(len(row).to_bytes(8, "little"))
        whole.update(np.asarray(row, "<i8").tobytes())
    return f"{len(rows)} rows, sha256 {whole.hexdigest()}"


def read_manifest(file: epath.Path) -> dict[str, Any]:
    """Reads a manifest. Raises DataError where it is no JSON."""
    try:
        return json.loads(read_text(file))
    except ValueError as error:
        raise DataError(
            f"{file}: damaged: {error}; remove it and what lies beside it, it is written anew"
        ) from error
