"""The checksums of a checkpoint's files, and what is wrong with them."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor

from etils import epath

CHECKSUMS = "checksums.json"


def checksums(folder: epath.Path) -> dict[str, str]:
    """SHA-256 of the files of both items; Orbax's own notes beside them change later."""
    paths = [path for item in ("state", "meta") for path in _all_files(folder / item)]
    with ThreadPoolExecutor() as pool:
        names = [path.relative_to(folder).as_posix() for path in paths]
        return dict(zip(names, pool.map(_sha256, paths)))


def _all_files(folder: epath.Path) -> list[epath.Path]:
    parents = list(folder.walk())  # in a bucket, whose names lack the "gs://"
    return [
        folder / parent.relative_to(parents[0][0]) / file
        for parent, _, files in parents
        for file in files
    ]


def _sha256(path: epath.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_damage(folder: epath.Path) -> str:
    """What is wrong with the files of a checkpoint; empty where all are as they were written."""
    if not (folder / CHECKSUMS).exists():
        return f"{CHECKSUMS} is missing"
    try:
        written = json.loads((folder / CHECKSUMS).read_text())
    except ValueError as error:
        return f"{CHECKSUMS} is unreadable: {error}"
    found = checksums(folder)
    problems = [
        f"{name} is not as it was written" if name in found else f"{name} is missing"
        for name in sorted(written)
        if found.get(name) != written[name]
    ]
    more = [f"and {len(problems) - 3} more"] if len(problems) > 3 else []
    return ", ".join(problems[:3] + more)
