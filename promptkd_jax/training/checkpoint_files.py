"""What is in a checkpoint: files by their checksums, arrays by their shapes; what is kept."""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.future import ChainedFuture

from promptkd_jax.infra import distributed

CHECKSUMS = "checksums.json"
_SHA256 = 64  # hexadecimal digits; XXH3 has 32


# Bytes. Arrays and files are cut into parts of this size, which are written, hashed and read side
# by side; Orbax would write files of 2 GB.
PART = 64 * 2**20


class HashingHandler(ocp.PyTreeCheckpointHandler):
    """Orbax's handler of a state, and then every process hashes the arrays that it has written.

    A process writes its parts of the arrays into an OCDBT store of its own, `ocdbt.process_N`. Its
    checksums wait in `checksums.process_N.json` until `write_checksums` joins them. Nothing is
    compressed: of float32 weights that would save 8 % of the bytes, for most of the time.
    """

    folder: epath.Path  # of the checkpoint that is being written, with its temporary name

    def __init__(self):
        super().__init__(use_compression=False)

    async def async_save(self, directory: epath.Path, *args, **kwargs) -> list[ChainedFuture]:
        self.folder = directory.parent
        writes = await super().async_save(directory, *args, **kwargs)
        return [ChainedFuture(writes, functools.partial(_write_own_checksums, directory))]


# Orbax finds the handler of an item by the exact class of its arguments.
@ocp.args.register_with_handler(HashingHandler, for_save=True)
class HashingSave(ocp.args.PyTreeSave):
    """Arguments of a save by `HashingHandler`."""


@ocp.args.register_with_handler(HashingHandler, for_restore=True)
class HashingRestore(ocp.args.PyTreeRestore):
    """Arguments of a restore by `HashingHandler`."""


def _write_own_checksums(directory: epath.Path) -> None:
    """Runs on every process when its arrays are written, and before the stores are merged."""
    process = jax.process_index()
    own = checksums(directory, _all_files(directory, f"ocdbt.process_{process}"))
    _part(directory.parent, process).write_text(json.dumps(own))


def write_checksums(folder: epath.Path) -> None:
    """Joins the checksums of all processes, and hashes what is in no store of theirs: the index
    into which process 0 merges the stores, the tree, and the meta data, which are small."""
    parts = [_part(folder, process) for process in range(jax.process_count())]
    own = [json.loads(part.read_text()) for part in parts]
    joined = {f"state/{name}": checksum for part in own for name, checksum in part.items()}
    # Not Orbax's own notes beside the two items: they change later.
    names = _all_files(folder, "state") + _all_files(folder, "meta")
    joined |= checksums(folder, [name for name in names if name not in joined])
    (folder / CHECKSUMS).write_text(json.dumps(joined, indent=1))
    for part in parts:
        part.unlink()


def _part(folder: epath.Path, process: int) -> epath.Path:
    return folder / f"checksums.process_{process}.json"


def checksums(folder: epath.Path, names: Sequence[str], *, old: bool = False) -> dict[str, str]:
    """XXH3 (128 bits) of these files of a folder, by name; "" for one that is not there.

    It finds damage ten times as fast as SHA-256 does, which `old` checkpoints have; against intent
    neither helps, as the checksums lie beside the files.
    """
    import xxhash  # not at the top: a plain GPU image runs the benchmarks without it

    digest = hashlib.sha256 if old else xxhash.xxh3_128

    def of_file(name: str) -> str:
        try:
            with (folder / name).open("rb") as file:
                return hashlib.file_digest(file, digest).hexdigest()
        except FileNotFoundError:
            return ""

    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(of_file, names)))


def _all_files(folder: epath.Path, part: str) -> list[str]:
    """The names in `folder` of all files below `folder / part`."""
    parents = list((folder / part).walk())  # in a bucket, whose names lack the "gs://"
    return [
        (part / parent.relative_to(parents[0][0]) / file).as_posix()
        for parent, _, files in parents
        for file in files
    ]


def find_damage(folder: epath.Path) -> str:
    """What is wrong with the files of a checkpoint; empty if all are as they were written.

    The processes of a run share the files out among themselves, and all learn what each has found.
    """
    try:
        written = json.loads((folder / CHECKSUMS).read_text())
    except FileNotFoundError:
        return f"{CHECKSUMS} is missing"
    except ValueError as error:
        return f"{CHECKSUMS} is unreadable: {error}"
    share = sorted(written)[jax.process_index() :: jax.process_count()]
    old = any(len(checksum) == _SHA256 for checksum in written.values())
    problems = [
        f"{name} is not as it was written" if found else f"{name} is missing"
        for name, found in checksums(folder, share, old=old).items()
        if found != written[name]
    ]
    problems = sorted(itertools.chain.from_iterable(distributed.all_gather(problems)))
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


def save_arguments(state: Any) -> HashingSave:
    """Arguments that save a tree of arrays and numbers."""
    return HashingSave(_numpy_scalars_to_arrays(state), ocdbt_target_data_file_size=PART)


def restore_arguments(state: Any) -> HashingRestore:
    """Arguments that restore a tree like `state` in the shardings of its leaves; one without a
    sharding comes back as a NumPy array."""
    state = _numpy_scalars_to_arrays(state)
    # Beyond these shapes there is padding alone, of which Orbax drops or appends what it takes.
    how = ocp.checkpoint_utils.construct_restore_args(state, strict=False)
    return HashingRestore(state, restore_args=how)


def _numpy_scalars_to_arrays(tree: Any) -> Any:
    """Orbax saves np.int64(3) but cannot restore it; an array of shape () it can."""
    return jax.tree.map(lambda x: np.asarray(x) if isinstance(x, np.generic) else x, tree)


def arrays_to_numpy_scalars(tree: Any, like: Any) -> Any:
    return jax.tree.map(lambda was, x: x[()] if isinstance(was, np.generic) else x, like, tree)


@dataclasses.dataclass
class LatestAndBest:
    """Orbax preservation policy: the last `keep` checkpoints and the one with the highest score.

    Orbax's own policies know the scores that a checkpoint is saved with; these come later.
    """

    keep: int
    metric: str | None
    scores: dict[str, dict[str, float]]  # of checkpoints, by step, as JSON has it

    def best(self, steps: Sequence[int]) -> int | None:
        """The step with the highest score, the later of equals; None if none has any."""
        values = {step: self.scores.get(str(step), {}).get(self.metric, math.nan) for step in steps}
        scored = [step for step in steps if not math.isnan(values[step])]
        return max(scored, key=lambda step: (values[step], step), default=None)

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*steps[-self.keep :], self.best(steps)}
        return [step in kept for step in steps]
