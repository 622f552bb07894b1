"""What is in a checkpoint: files by their checksums, arrays by their shapes; what is kept."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
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


def describe_leaves(tree: Any) -> dict[str, str]:
    """{path: "float32[64,32]" or "int"} of a concrete or abstract tree; None has no entry."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            f"{leaf.dtype}{list(leaf.shape)}" if hasattr(leaf, "shape") else type(leaf).__name__
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def shape_of(leaf: str) -> jax.ShapeDtypeStruct:
    """The array of a description such as "float32[64, 32]"."""
    dtype, sizes = leaf.removesuffix("]").split("[")
    return jax.ShapeDtypeStruct(tuple(map(int, filter(None, sizes.split(",")))), dtype)


def leaf_differences(saved: dict[str, str], wanted: dict[str, str]) -> list[str]:
    return [
        f"{path}: {saved.get(path, 'nothing')} in it, {wanted.get(path, 'nothing')} asked for"
        for path in sorted(saved.keys() | wanted.keys())
        if saved.get(path) != wanted.get(path)
    ]


def numpy_scalars_to_arrays(tree: Any) -> Any:
    """Orbax saves np.int64(3) but cannot restore it; an array of shape () it can."""
    return jax.tree.map(lambda x: np.asarray(x) if isinstance(x, np.generic) else x, tree)


def arrays_to_numpy_scalars(tree: Any, like: Any) -> Any:
    return jax.tree.map(lambda was, x: x[()] if isinstance(was, np.generic) else x, like, tree)


@dataclasses.dataclass
class LatestAndBest:
    """Orbax preservation policy: the last `keep` checkpoints and the one with the highest score."""

    keep: int
    scores: dict[int, float]

    def best(self, steps: Sequence[int]) -> int | None:
        scored = [step for step in steps if step in self.scores]
        return max(scored, key=lambda step: (self.scores[step], step), default=None)

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*steps[-self.keep :], self.best(steps)}
        return [step in kept for step in steps]
