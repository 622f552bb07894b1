"""Checkpoints: what a run cannot recompute, on disk and back again, bit for bit.

In a checkpoint are the `TrainState` of `distill.state` and the JSON that `loop` passes as meta.

Orbax writes the arrays in the background, sharded, and restores them onto any mesh. This room adds:

* A checksum of every file. Neither Orbax nor TensorStore notices a flipped byte in array data, and
  a lost file raises a bare `Exception`; here damage is found before anything is restored, and told
  apart from a state that does not fit. Every process hashes the arrays that it wrote, read back
  right after its own writing, since TensorStore hands out no bytes on their way; process 0 hashes
  the small rest, which is complete when it has merged the stores of all. At a restore each process
  verifies an even share of the files, as which of them TensorStore will read where depends on the
  mesh; all learn of a failure.
* The shape and dtype of every leaf. Orbax casts to whatever dtype it is asked for, and does not
  name the leaf that has a wrong shape.
* One error, `CheckpointError`, that says which checkpoint is still good.

In the folder of a run, `30/` is the checkpoint of step 30, `30.orbax-checkpoint-tmp/` one that was
never finished (and is never restored), `30.damaged/` one that `restore_latest` had to pass over. In
a bucket, which cannot rename, one that was never finished is `30/` without `commit_success.txt`.
`scores.json` has what the states of checkpoints score, by step: an evaluation takes long, and what
it evaluates should be safe before it begins.
"""

import json
from collections.abc import Callable, Collection
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from flax import traverse_util

from promptkd_jax.infra import distributed
from promptkd_jax.infra.errors import CheckpointError
from promptkd_jax.infra.files import io_errors, is_remote, read_text, to_path, write_json
from promptkd_jax.training.checkpoint_files import (
    HashingHandler,
    LatestAndBest,
    arrays_to_numpy_scalars,
    describe_leaves,
    find_damage,
    leaf_differences,
    restore_arguments,
    save_arguments,
    shape_of,
    write_checksums,
)

_SCORES = "scores.json"


class Checkpoints:
    """The checkpoints of one run.

        with Checkpoints(folder, keep=2, every=500, best_metric="rouge_l") as checkpoints:
            restored = checkpoints.restore_latest(abstract_state)
            for step in ...:
                state = train_step(state, batch)
                preempted = checkpoints.reached_preemption(step)
                if checkpoints.save(step, state, meta, force=preempted):
                    checkpoints.note(step, evaluate(state))

    All processes of a run call every method alike, on one shared folder. Only one run at a time may
    `save` or `restore_latest` in a folder; others may open it meanwhile to `restore`.
    """

    def __init__(
        self,
        directory: str | epath.PathLike,
        *,
        keep: int,
        every: int,
        best_metric: str | None = None,
    ):
        """Opens the folder of a run, and creates it.

        Args:
          directory: where the checkpoints go.
          keep: how many of the latest checkpoints stay on disk.
          every: steps from one checkpoint to the next.
          best_metric: by which of the `metrics` (higher is better) the best checkpoint stays too.

        Raises:
          ValueError: `keep` or `every` is less than 1.
          CheckpointError: the folder cannot be opened.
        """
        if keep < 1 or every < 1:
            raise ValueError(f"keep and every must be at least 1, got keep={keep}, every={every}")
        self.damage: list[str] = []  # what `restore_latest` passed over, for the report
        directory = to_path(directory)
        self._directory = directory if is_remote(directory) else directory.absolute()
        self._every = every
        self._policy = LatestAndBest(keep, best_metric, scores={})
        self._handler = HashingHandler()
        self._at: int | None = None  # the step last saved or restored here
        self._pending: int | None = None  # the step being written
        self._cleaned = False
        try:
            self._manager = ocp.CheckpointManager(
                self._directory,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=self._policy,
                    async_options=ocp.options.AsyncOptions(
                        post_finalization_callback=self._write_checksums
                    ),
                ),
                item_handlers={"state": self._handler, "meta": ocp.JsonCheckpointHandler()},
            )
            self._read_scores()
        except io_errors(self._directory) as error:
            wanted = "; Orbax wants also the right storage.buckets.get, of the bucket itself"
            raise CheckpointError(
                f"{self._directory} cannot be opened ({type(error).__name__}: {error})"
                + (wanted if is_remote(self._directory) else "")
            ) from error

    def save(
        self,
        step: int,
        state: Any,
        meta: dict,
        *,
        force: bool = False,
        unpadded: Any = None,
    ) -> bool:
        """Starts writing a checkpoint if one is due; to be called at every step.

        One is due at multiples of `every` except 0, where nothing is trained yet, and when forced.
        The arrays are copied before this returns, so that `state` may be donated, and reach the
        disk in the background.

        Args:
          step: the number of steps taken so far.
          state: a pytree of arrays, typed PRNG keys, Python and NumPy numbers, and None.
          meta: JSON: what else a resumed run needs (config fingerprint, stage, data position).
          force: writes at any step (the last one, a preemption, one that is evaluated).
          unpadded: shapes and dtypes of `state` without the zeros that end its arrays because its
            mesh asks for them (see `DecoderConfig.padded`), where there are any. A checkpoint goes
            by these, so that a mesh that asks for other zeros can continue from it.

        Returns:
          Whether a checkpoint was started. A step that is saved already is not saved again.

        Raises:
          CheckpointError: an earlier checkpoint could not be written, or the folder holds a later
            one than `step`.
        """
        if self._pending is not None and not self._manager.is_saving_in_progress():
            self.wait()
        if not force and not self.due(step):
            return False
        self.wait()
        if not self._follows_latest(step):
            return False
        record = {"meta": meta, "leaves": describe_leaves(unpadded or state)}
        # Orbax encodes it in the background, where the caller may have changed it meanwhile.
        record = json.loads(json.dumps(record))
        self._remove_unfinished()
        self._forget(step)
        self._pending = step
        items = ocp.args.Composite(
            state=save_arguments(state),
            meta=ocp.args.JsonSave(record),
        )
        self._manager.save(step, args=items, force=True)
        self._at = step
        return True

    @property
    def saving(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._manager.is_saving_in_progress()

    def note(self, step: int, scores: dict[str, float]) -> None:
        """Keeps what the state of checkpoint `step` scores, which decides which one is the best.

        Raises:
          ValueError: `scores` lacks `best_metric`.
        """
        metric = self._policy.metric
        if metric is not None and metric not in scores:
            raise ValueError(f"no best_metric {metric!r} in scores {sorted(scores)}")
        self._policy.scores[str(step)] = {name: float(value) for name, value in scores.items()}
        self._write_scores()

    def noted(self, step: int) -> dict[str, float] | None:
        """The scores of checkpoint `step`; None where none were noted."""
        return self._policy.scores.get(str(step))

    def due(self, step: int) -> bool:
        """Whether `save` saves at this step unasked."""
        return step > 0 and step % self._every == 0

    def restore_latest(
        self, abstract_state: Any, unpadded: Any = None
    ) -> tuple[int, Any, dict] | None:
        """Restores the newest checkpoint that is whole, and renames damaged ones that are newer.

        What was passed over is logged as a warning and kept in `self.damage`.

        Args:
          abstract_state: the state with `jax.ShapeDtypeStruct`s that have shardings in place of its
            arrays. The mesh need not be the one it was saved from.
          unpadded: as in `save`.

        Returns:
          (step, state, meta), or None where there is no checkpoint.

        Raises:
          CheckpointError: all checkpoints are damaged, or the state does not fit.
        """
        self.wait()
        steps = self.all_steps()
        if not steps:
            return None
        damaged = {}
        for whole in reversed(steps):
            if not (problem := find_damage(self._directory / str(whole))):
                break
            damaged[whole] = problem
        else:
            listing = "".join(f"\n  {step}: {problem}" for step, problem in damaged.items())
            raise CheckpointError(f"every checkpoint in {self._directory} is damaged:{listing}")
        for step, problem in damaged.items():
            self.damage.append(f"checkpoint {step} is damaged ({problem}): continuing from {whole}")
            if distributed.is_primary():
                logging.warning(self.damage[-1])
        self._set_aside(list(damaged))
        self._forget(whole + 1)
        return whole, *self._read(whole, abstract_state, unpadded)

    def restore(self, step: int, abstract_state: Any, unpadded: Any = None) -> tuple[Any, dict]:
        """Restores (state, meta) of one checkpoint; the states as in `restore_latest`.

        Raises:
          CheckpointError: there is no such checkpoint, it is damaged, or the state does not fit.
        """
        self._check_whole(step)
        return self._read(step, abstract_state, unpadded)

    def restore_params(
        self, step: int, groups: Collection[str], shardings: Callable[[Any], Any]
    ) -> dict[str, Any]:
        """Restores those groups of a state's `params` that it has; nothing else is read.

        Args:
          groups: their names, such as "student".
          shardings: from a tree of shapes to where each array goes.

        Raises:
          CheckpointError: there is no such checkpoint, or it is damaged.
        """
        self._check_whole(step)
        leaves = self._read_record(step)["leaves"].items()
        paths = {tuple(path.split("/")): leaf for path, leaf in leaves}
        wanted = traverse_util.unflatten_dict(
            {
                path: shape_of(leaf)
                for path, leaf in paths.items()
                if path[0] == "params" and path[1] in groups
            }
        )
        placed = {"params": shardings(wanted["params"])}

        def how(shape, place):  # not strict: beyond the shape there is padding alone
            return ocp.ArrayRestoreArgs(sharding=place, global_shape=shape.shape, strict=False)

        arguments = ocp.args.PyTreeRestore(
            item=wanted,
            restore_args=jax.tree.map(how, wanted, placed),
            partial_restore=True,
        )
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            return reader.restore(self._directory / str(step) / "state", args=arguments)["params"]

    def all_steps(self) -> list[int]:
        """The steps of the finished checkpoints, in order, as process 0 finds them."""
        return distributed.run_on_primary(self._listed)

    def latest_step(self) -> int | None:
        """The step of the newest finished checkpoint."""
        return max(self.all_steps(), default=None)

    def best_step(self) -> int | None:
        """The step with the highest `best_metric`, the later of equals; None without metrics."""
        return self._policy.best(self.all_steps())

    def reached_preemption(self, step: int) -> bool:
        """Whether the machine is about to be taken away: at the same step on every process.

        Needs `jax.distributed.initialize`, by which JAX listens to SIGTERM.
        """
        return self._manager.reached_preemption(step)

    def wait(self) -> None:
        """Blocks until the checkpoint being written is on disk.

        Raises:
          CheckpointError: it could not be written.
        """
        if self._pending is None:
            return
        try:
            self._manager.wait_until_finished()
        except (*io_errors(self._directory), ValueError) as error:  # ValueError: TensorStore's
            step, self._pending = self._pending, None
            self._manager.reload()
            latest = max(self._listed(), default=None)  # the other processes may be well
            raise CheckpointError(
                f"checkpoint {step} could not be written to {self._directory} ({error}). "
                + ("There is no other" if latest is None else f"Checkpoint {latest} is still good")
            ) from error
        self._pending = None  # not where a signal ends the waiting: it is still being written

    def close(self) -> None:
        """Waits for the checkpoint being written, then ends the background threads.

        Raises:
          CheckpointError: it could not be written.
        """
        try:
            self.wait()
        finally:
            self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def _listed(self) -> list[int]:
        return sorted(ocp.utils.checkpoint_steps(self._directory))

    def _follows_latest(self, step: int) -> bool:
        """False where this run has saved or restored `step`; raises where another went further."""
        latest = self._manager.latest_step()
        if latest is None or step > latest:
            return True
        if step == self._at:
            return False
        raise CheckpointError(
            f"step {step} cannot be saved: {self._directory} already holds checkpoint {latest}. "
            "Continue from that one (restore_latest) or use another folder"
        )

    def _read_scores(self) -> None:
        file = self._directory / _SCORES
        text = distributed.run_on_primary(lambda: read_text(file) if file.exists() else "{}")
        try:
            self._policy.scores = json.loads(text)
        except ValueError as error:
            raise CheckpointError(f"{file}: damaged: {error}; remove it") from error

    def _write_scores(self) -> None:
        write_json(self._directory / _SCORES, self._policy.scores)

    def _forget(self, first: int) -> None:
        """Drops the scores from step `first` on: those states are made, or written, anew."""
        scores = self._policy.scores
        earlier = {step: values for step, values in scores.items() if int(step) < first}
        if earlier != scores:
            self._policy.scores = earlier
            self._write_scores()

    def _read_record(self, step: int) -> dict:
        return self._manager.restore(
            step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
        ).meta

    def _read(self, step: int, abstract_state: Any, unpadded: Any) -> tuple[Any, dict]:
        """Restores a checkpoint whose files are known to be whole."""
        record = self._read_record(step)
        wanted = describe_leaves(unpadded or abstract_state)
        differences = leaf_differences(record["leaves"], wanted)
        if differences:
            listing = "".join(f"\n  {line}" for line in differences)
            raise CheckpointError(f"checkpoint {step} is whole, but of another state:{listing}")
        target = restore_arguments(abstract_state)
        state = self._manager.restore(step, args=ocp.args.Composite(state=target)).state
        self._at = step
        return arrays_to_numpy_scalars(state, like=abstract_state), record["meta"]

    def _check_whole(self, step: int) -> None:
        """Raises CheckpointError where there is no such checkpoint, or it is damaged."""
        self.wait()
        steps = self.all_steps()
        if step not in steps:
            raise CheckpointError(f"{self._directory} holds checkpoints {steps}, not {step}")
        if problem := find_damage(self._directory / str(step)):
            steps.remove(step)
            raise CheckpointError(f"checkpoint {step} is damaged ({problem}); others: {steps}")

    def _set_aside(self, steps: list[int]) -> None:
        """Renames damaged checkpoints, because the run will come by these steps again."""
        if not steps:
            return

        def rename():
            for step in steps:
                target = self._directory / f"{step}.damaged"
                target.rmtree(missing_ok=True)
                (self._directory / str(step)).rename(target)

        distributed.run_on_primary(rename)
        self._manager.reload()

    def _remove_unfinished(self) -> None:
        """Removes what killed runs left; at the first save, so that a reader removes nothing."""
        if not self._cleaned and jax.process_index() == 0:
            for unfinished in ocp.utils.tmp_checkpoints(self._directory):
                unfinished.get().rmtree()
        self._cleaned = True

    def _write_checksums(self) -> None:
        """Orbax calls this on process 0 when all files are written, before the folder gets its name
        or, in a bucket, its `commit_success.txt`."""
        write_checksums(self._handler.folder)
