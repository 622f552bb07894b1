"""`promptkd train --config FILE[:arg] --workdir DIR`: one run, from models and data to a report.

The same command continues a run that was stopped, and says so of one that is finished.
"""

import argparse
import errno
import functools
import json
import pathlib
import platform
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import jax
from ml_collections import ConfigDict
from ml_collections.config_dict import CustomJSONEncoder

from promptkd_jax import recipe, sharding
from promptkd_jax.checkpoint import CheckpointError, Checkpoints
from promptkd_jax.config import ConfigError, fingerprint, load_config
from promptkd_jax.data import DataError, stream
from promptkd_jax.evaluate import closeness, score
from promptkd_jax.experiment import Experiment, Stage, prepare, save
from promptkd_jax.models.config import ModelError
from promptkd_jax.report import (
    MetricWriter,
    TrainingProgress,
    summary_table,
    truncate_metrics,
    write_report,
)
from promptkd_jax.step import TrainState, summarise, train_step

# name, format, which direction is better
HELD_OUT = {
    "kl": ("held-out KL(teacher ‖ student), nats", ".3f", "lower"),
    "agreement": ("top-1 agreement with the teacher", ".3f", "higher"),
    "rougeL": ("ROUGE-L", ".2f", "higher"),
}


class TrainingError(RuntimeError):
    """A run that cannot go on; says why and what is safe."""


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line and runs; a mistake of the user ends it with a message alone."""
    try:
        options, rest = _parser().parse_known_args(argv)
        config, unknown = load_config(rest)
        if unknown:
            raise ConfigError(f"unknown arguments: {' '.join(unknown)}")
        recipe.check_recipe(config)
        signal.signal(signal.SIGTERM, _leave)
        run(config, options.workdir)
    except (ConfigError, DataError, ModelError, CheckpointError, TrainingError) as error:
        sys.exit(f"promptkd train: {error}")
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        sys.exit(f"promptkd train: {error}; what was saved is good: make room, run it again")


def run(config: ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
    """Trains, or continues, or finds it done; returns what `summary.json` says."""
    _claim(workdir, config)
    summary = workdir / "summary.json"
    if summary.exists():
        print(f"{workdir} is finished, nothing to do: see {workdir / 'report.html'}")
        return json.loads(summary.read_text())
    started = time.monotonic()
    mesh = sharding.make_mesh(config.mesh)
    _check_devices(config, mesh)
    with jax.set_mesh(mesh):
        experiment = prepare(config, workdir, mesh)
        before = _once(workdir / "before.json", lambda: assess(experiment, None))
        state, started = fit(experiment, workdir, started)
        return finish(experiment, workdir, state, before, started)


def _leave(*_: Any) -> None:
    """SIGTERM outside of the loop, where what is done is on disk already."""
    print("stopped; the same command continues")
    sys.exit(0)


def _check_devices(config: ConfigDict, mesh: jax.sharding.Mesh) -> None:
    """Raises ConfigError where rows cannot be dealt out to the devices."""
    if jax.process_count() > 1:
        raise ConfigError(f"{jax.process_count()} processes: a run is one process for now")
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    for index, stage in enumerate(config.stages):
        if (stage.batch_size // stage.micro_batches) % rows:
            raise ConfigError(
                f"config.stages[{index}].batch_size: {stage.batch_size} in {stage.micro_batches} "
                f"micro-batches cannot be dealt out evenly to {rows} devices (data x fsdp)"
            )


def assess(experiment: Experiment, student: Any) -> dict[str, Any]:
    """The student on the dev rows: closeness to the teacher, scores, and its answers ("texts").

    Args:
      student: its parameters; None for those that the run starts from.
    """
    config, data = experiment.config.evaluation, experiment.config.data
    model = experiment.student if student is None else experiment.student.replace(params=student)
    found: dict[str, Any] = {}
    if experiment.teacher is not None:
        found |= closeness(
            experiment.teacher,
            model,
            experiment.dev,
            batch_size=config.batch_size,
            length=data.max_length,
            vocab_size=experiment.vocab_size,
        )
    scores, texts = score(
        model,
        experiment.dev,
        sampling=recipe.sampling(config.sampling, model.eos_ids),
        prompt_capacity=data.max_prompt_length,
        max_new_tokens=experiment.max_new_tokens,
        batch_size=config.batch_size,
        seed=experiment.config.seed,
        vocab_size=experiment.vocab_size,
    )
    return found | scores | {"texts": texts}


def fit(experiment: Experiment, workdir: pathlib.Path, started: float) -> tuple[TrainState, float]:
    """Every update that is not done yet.

    Args:
      started: when this process began its work, on the monotonic clock.

    Returns:
      The state to export, and `started` moved back by the time that earlier processes spent.
    """
    config = experiment.config
    rule = config.checkpoint
    with (
        Checkpoints(
            workdir / "checkpoints",
            keep=rule.keep,
            every=rule.every,
            best_metric="dev/rougeL" if config.evaluation.every else None,
        ) as checkpoints,
        _Loop(experiment, workdir, checkpoints, started) as loop,
    ):
        for stage in experiment.stages:
            loop.train(stage)
        checkpoints.wait()
        best = checkpoints.best_step()
        if rule.export == "best" and best not in (None, loop.done):
            print(f"the best checkpoint by dev ROUGE-L is that of step {best}")
            return checkpoints.restore(best, experiment.abstract_state())[0], loop.started
        return loop.state, loop.started


class _Loop:
    """Where a run stands: `done` updates of all, and the `state` after them."""

    def __init__(
        self,
        experiment: Experiment,
        workdir: pathlib.Path,
        checkpoints: Checkpoints,
        started: float,
    ):
        self.experiment, self.checkpoints, self.started = experiment, checkpoints, started
        self.state, self.done = None, 0
        self._fingerprint = fingerprint(experiment.config, recipe.IRRELEVANT)
        if restored := checkpoints.restore_latest(experiment.abstract_state()):
            self.done, self.state, meta = restored
            if meta["fingerprint"] != self._fingerprint:
                raise CheckpointError(
                    f"{workdir}/checkpoints: checkpoint {self.done} is of a run with another "
                    "config; take another --workdir"
                )
            self.started -= meta["seconds"]
            print("\n".join(checkpoints.damage + [f"continuing from step {self.done}"]))
        truncate_metrics(workdir, self.done)
        self.writer = MetricWriter(workdir)
        self.progress = TrainingProgress(
            experiment.total_steps, experiment.config.title, first_step=self.done
        )
        self._stop_asked = False

    def __enter__(self) -> "_Loop":
        self._handler = signal.signal(signal.SIGTERM, self._ask_to_stop)
        self.progress.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.progress.__exit__(*exception)
        self.writer.close()
        signal.signal(signal.SIGTERM, self._handler)

    def train(self, stage: Stage) -> None:
        """The updates of `stage` that are not done yet."""
        experiment, end = self.experiment, stage.first + stage.steps
        config = experiment.config
        log_every = min(config.log_every, config.stop_after_skipped)  # logs see what was skipped
        if self.done >= end:
            return
        if self.done == stage.first:
            self.state = experiment.start(stage, self.state)
        teacher = experiment.teacher and experiment.teacher.params
        rows = sharding.rows_sharding(experiment.mesh)
        step = jax.jit(
            functools.partial(
                train_step,
                method=stage.method,
                models=experiment.models,
                optimizers=stage.optimizers,
            ),
            out_shardings=(experiment.placed(), None),
            donate_argnums=0,
        )
        self._mark()
        for batch in stream(stage.batches, self.done - stage.first):
            batch = jax.tree.map(lambda x: jax.make_array_from_process_local_data(rows, x), batch)
            self.state, metrics = step(self.state, teacher, batch)
            self.done += 1
            if self.done % log_every == 0 or self.done == end:
                self._log(stage, summarise(metrics, stage.method.conventions))
            self._save(stage, self._evaluate(stage))
            if self.done == end:
                return

    def _log(self, stage: Stage, values: dict[str, float]) -> None:
        """Metrics to file and terminal; the one place where the loop waits for the device."""
        updates, seconds = self.done - self._marked[0], time.monotonic() - self._marked[1]
        values |= {
            "tokens_per_second": updates * values["tokens"] / seconds,
            "seconds_per_update": seconds / updates,
            "learning_rate": float(stage.learning_rate(self.done - stage.first - 1)),
        }
        self.writer.write(self.done, values | {"stage": stage.name})
        self.progress.update(self.done, values | {"loss": values["student_loss"]})
        skipped, limit = values["skipped_in_a_row"], self.experiment.config.stop_after_skipped
        if skipped >= limit:
            raise TrainingError(
                f"step {self.done}: the loss or a gradient was not finite in {int(skipped)} "
                f"updates in a row (config.stop_after_skipped = {limit}); none of them changed "
                f"the student. Last checkpoint: {self.checkpoints.latest_step()}. Try a smaller "
                "learning rate, or dtype float32"
            )
        self._mark()

    def _mark(self) -> None:
        self._marked = self.done, time.monotonic()

    def _evaluate(self, stage: Stage) -> dict[str, float] | None:
        every = self.experiment.config.evaluation.every
        last = self.done == self.experiment.total_steps
        if not every or (self.done % every and not last):
            return None
        found = assess(self.experiment, self.state.student)
        scores = {f"dev/{name}": value for name, value in found.items() if name != "texts"}
        self.writer.write(self.done, scores | {"stage": stage.name})
        self._mark()
        return scores

    def _save(self, stage: Stage, scores: dict[str, float] | None) -> None:
        last = self.done == self.experiment.total_steps
        self.checkpoints.save(
            self.done,
            self.state,
            {
                "stage": stage.name,
                "position": self.done - stage.first,
                "fingerprint": self._fingerprint,
                "seconds": time.monotonic() - self.started,
            },
            metrics=scores,
            force=last or self._stop_asked or scores is not None,
        )
        if self._stop_asked:
            self.checkpoints.wait()
            print(f"stopped after step {self.done} and saved; the same command continues")
            sys.exit(0)

    def _ask_to_stop(self, *_: Any) -> None:
        self._stop_asked = True


def finish(
    experiment: Experiment,
    workdir: pathlib.Path,
    state: TrainState,
    before: dict[str, Any],
    started: float,
) -> dict[str, Any]:
    """Exports, measures, reports; `summary.json` comes last and says that the run is finished."""
    config = experiment.config
    after = assess(experiment, state.student)
    seconds = time.monotonic() - started
    rows = [
        (name, before[key], after[key], *rest)
        for key, (name, *rest) in HELD_OUT.items()
        if key in after
    ]
    paths = {"report": str(workdir / "report.html")} | save(experiment, state, workdir, rows)
    summary = {
        f"{key}_{when}": found[key]
        for key in HELD_OUT
        for when, found in (("before", before), ("after", after))
        if key in found
    }
    summary |= {
        "seconds": seconds,
        "peak_memory_gb": peak_memory_gb(),
        "updates": experiment.total_steps,
        "updates_skipped": int(state.skipped),
    }
    facts = {
        "Device": jax.devices()[0].device_kind,
        "Devices": str(jax.device_count()),
        "Versions": ", ".join(f"{p} {version(p)}" for p in ("jax", "flax", "optax")),
        "Python": platform.python_version(),
        "Time": f"{seconds / 60:.1f} min",
        "Peak memory": f"{summary['peak_memory_gb']:.2f} GB",
    }
    write_report(
        workdir,
        title=config.title,
        config_text=json.dumps(_plain(config), indent=2),
        summary={"metrics": rows, "facts": facts, "paths": paths},
        samples=_samples(experiment, before["texts"], after["texts"]),
        reference="teacher" if config.evaluation.references == "teacher" else "reference",
    )
    print(summary_table([row[:3] for row in rows], paths))
    _write(workdir / "summary.json", summary)
    return summary


def peak_memory_gb() -> float:
    """The most memory in use so far, in GB: of the accelerator, else of this process."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    unit = 1 if sys.platform == "darwin" else 1024
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return statistics.get("peak_bytes_in_use", resident) / 1e9


def _samples(experiment: Experiment, before: list[str], after: list[str]) -> list[dict[str, str]]:
    records = experiment.dev.records[: experiment.config.evaluation.samples]
    return [
        {
            "request": "\n".join(filter(None, (record.instruction, record.input))),
            "teacher": record.outputs[0],
            "before": first,
            "after": last,
        }
        for record, first, last in zip(records, before, after)
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="promptkd train",
        description=__doc__,
        usage="%(prog)s --config FILE[:arg] --workdir DIR [--config.a.b=VALUE …]",
        allow_abbrev=False,
    )
    parser.add_argument("--workdir", required=True, type=pathlib.Path)
    return parser


def _claim(workdir: pathlib.Path, config: ConfigDict) -> None:
    """Makes the folder this run's own. Raises ConfigError where it belongs to another config."""
    file = workdir / "config.json"
    ours = {"fingerprint": fingerprint(config, recipe.IRRELEVANT), "config": _plain(config)}
    if not file.exists():
        workdir.mkdir(parents=True, exist_ok=True)
        _write(file, ours)
        return
    theirs = json.loads(file.read_text())
    if theirs["fingerprint"] != ours["fingerprint"]:
        found, wanted = _flat(theirs["config"]), _flat(ours["config"])
        different = sorted(k for k in found | wanted if found.get(k) != wanted.get(k))
        lines = [f"  {k}: there {found.get(k)!r}, now {wanted.get(k)!r}" for k in different]
        raise ConfigError(
            f"{workdir} belongs to a run of another config; take another --workdir, or set back\n"
            + "\n".join(lines)
        )


def _plain(config: ConfigDict) -> dict[str, Any]:
    """As JSON has it: dicts, lists, numbers, strings."""
    return json.loads(json.dumps(config, cls=CustomJSONEncoder))


def _flat(value: Any, path: str = "config") -> dict[str, Any]:
    """Every leaf of a JSON value by its path."""
    if isinstance(value, dict):
        children = ((f"{path}.{key}", child) for key, child in value.items())
    elif isinstance(value, list):
        children = ((f"{path}[{index}]", child) for index, child in enumerate(value))
    else:
        return {path: value}
    return {name: leaf for at, child in children for name, leaf in _flat(child, at).items()}


def _once(file: pathlib.Path, compute: Callable[[], Any]) -> Any:
    """What `file` holds, computed and written where it is absent."""
    if not file.exists():
        _write(file, compute())
    return json.loads(file.read_text())


def _write(file: pathlib.Path, content: Any) -> None:
    """JSON, whole or not at all."""
    unfinished = file.with_suffix(".tmp")
    unfinished.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    unfinished.replace(file)


if __name__ == "__main__":
    main()
