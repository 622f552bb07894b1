"""`promptkd train --config FILE[:arg] --workdir DIR`: one run, from models and data to a report.

The same command continues a run that was stopped, and says so of one that is finished.
"""

import argparse
import errno
import functools
import itertools
import json
import platform
import resource
import signal
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
from etils import epath
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from promptkd_jax import build, hosts, schema, sharding
from promptkd_jax.checkpoint import CheckpointError, Checkpoints
from promptkd_jax.config import ConfigError, as_json, claim, fingerprint, parse
from promptkd_jax.data import DataError, stream
from promptkd_jax.evaluate import closeness, score
from promptkd_jax.experiment import Experiment, Stage, prepare, save
from promptkd_jax.files import check_shared, once, read_text, to_path, write_json
from promptkd_jax.hosts import HostsError
from promptkd_jax.models.config import ModelError
from promptkd_jax.models.load import Model
from promptkd_jax.report import (
    MetricWriter,
    TrainingProgress,
    summary_table,
    truncate_metrics,
    write_report,
)
from promptkd_jax.step import TrainState, summarise, train_step
from promptkd_jax.targets import adapt

# name, format, which direction is better
HELD_OUT = {
    "kl": ("held-out KL(teacher ‖ student), nats", ".3f", "lower"),
    "agreement": ("top-1 agreement with the teacher", ".3f", "higher"),
    "rougeL": ("ROUGE-L", ".2f", "higher"),
}
# What summary.json compares before and after training.
COMPARED = (*HELD_OUT, "loss", "response_length", "eos_rate", "repetition")
PROMPT_EFFECT = ("teacher_rougeL", "teacher_rougeL_prompted")
SELECTION = "selection"  # the score that chooses the best checkpoint, higher is better


class TrainingError(RuntimeError):
    """A run that cannot go on; says why and what is safe."""


# What the user can mend: the message says how.
MISTAKES = (ConfigError, DataError, ModelError, CheckpointError, TrainingError, HostsError)


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line and runs; a mistake of the user ends it with a message alone."""
    options, _ = _parser().parse_known_args(argv)
    with hosts.together(options):
        try:
            _, config = parse(_parser(), argv)
            schema.check_recipe(config)
            if not jax.distributed.is_initialized():  # which listens to SIGTERM itself
                signal.signal(signal.SIGTERM, _leave)
            run(config, to_path(options.workdir))
        except MISTAKES as error:
            sys.exit(f"promptkd train: {error}")
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            sys.exit(f"promptkd train: {error}; what was saved is good: make room, run it again")


def run(config: ConfigDict, workdir: epath.Path) -> dict[str, Any]:
    """Trains, or continues, or finds it done; returns what `summary.json` says.

    Args:
      workdir: a folder that all processes see, as `files.to_path` makes it.
    """
    hosts.agree("the config", json.dumps(as_json(config), sort_keys=True))
    hosts.agree("the version of jax, flax, optax or promptkd_jax", _versions())
    claim(workdir, config, schema.IRRELEVANT)
    check_shared(workdir)
    summary = workdir / "summary.json"
    if hosts.on_first(summary.exists):
        print(f"{workdir} is finished, nothing to do: see {workdir / 'report.html'}")
        return hosts.on_first(lambda: json.loads(read_text(summary)))
    started = time.monotonic()
    mesh = sharding.make_mesh(config.mesh)
    _check_rows(config, mesh)
    with jax.set_mesh(mesh):
        experiment = prepare(config, workdir, mesh)
        before = once(workdir / "before.json", lambda: _assess_first(experiment))
        result = fit(experiment, workdir, started, before)
        return finish(experiment, workdir, result, before)


def _assess_first(experiment: Experiment) -> dict[str, Any]:
    print("measuring the student before training …", flush=True)
    return assess(experiment)


def _leave(*_: Any) -> None:
    """SIGTERM outside of the loop, where what is done is on disk already."""
    print("stopped; the same command continues")
    sys.exit(0)


def _versions() -> str:
    return ", ".join(f"{p} {version(p)}" for p in ("jax", "flax", "optax", "promptkd_jax"))


def _check_rows(config: ConfigDict, mesh: jax.sharding.Mesh) -> None:
    """Raises ConfigError where rows cannot be dealt out to the devices."""
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    for index, stage in enumerate(config.stages):
        parts = stage.micro_batches * stage.minibatches
        if (stage.batch_size // parts) % rows:
            raise ConfigError(
                f"config.stages[{index}].batch_size: {stage.batch_size} in {parts} "
                f"micro-batches cannot be dealt out evenly to {rows} devices (data x fsdp)"
            )


def assess(
    experiment: Experiment, student: Any = None, soft_prompt: jax.Array | None = None
) -> dict[str, Any]:
    """The student on the dev rows: closeness to the teacher, scores, and its answers ("texts").

    Args:
      student: its parameters; None for those that the run starts from.
      soft_prompt: for the closeness to the prompted teacher.
    """
    model = experiment.student if student is None else experiment.student.replace(params=student)
    config = experiment.config
    close = closeness(
        experiment.teacher,
        model,
        experiment.dev,
        batch_size=config.evaluation.batch_size,
        length=config.data.max_length,
        vocab_size=experiment.vocab_size,
        soft_prompt=soft_prompt,
    )
    scores, texts = _score(experiment, model)
    return close | scores | {"texts": texts}


def _score(experiment: Experiment, model: Model, soft_prompt: jax.Array | None = None):
    config, data = experiment.config.evaluation, experiment.config.data
    return score(
        model,
        experiment.dev,
        sampling=build.sampling(config.sampling, model.eos_ids),
        prompt_capacity=data.max_prompt_length,
        max_new_tokens=experiment.max_new_tokens,
        batch_size=config.batch_size,
        seed=experiment.config.seed,
        vocab_size=experiment.vocab_size,
        soft_prompt=soft_prompt,
    )


def open_checkpoints(config: ConfigDict, workdir: epath.Path) -> Checkpoints:
    """Those of the run with this config, which `workdir` belongs to."""
    return Checkpoints(
        workdir / "checkpoints",
        keep=config.checkpoint.keep,
        every=config.checkpoint.every,
        best_metric=SELECTION if config.evaluation.every else None,
    )


class Trained(NamedTuple):
    """What training comes to: the state to export, the student's updates, and what they took.

    `seconds` of the whole run, all its processes; `training` the sums of `_Loop.spent`.
    """

    state: TrainState
    updates: int
    seconds: float
    training: dict[str, float]


def fit(
    experiment: Experiment, workdir: epath.Path, started: float, before: dict[str, Any]
) -> Trained:
    """Every update that is not done yet.

    Args:
      started: when this process began its work, on the monotonic clock.
      before: what `assess` said of the initial student.
    """
    rule = experiment.config.checkpoint
    with (
        open_checkpoints(experiment.config, workdir) as checkpoints,
        _Loop(experiment, workdir, checkpoints, started, before) as loop,
    ):
        for stage in experiment.stages:
            loop.train(stage)
        checkpoints.wait()
        best, state = checkpoints.best_step(), loop.state
        if rule.export == "best" and best not in (None, loop.done):
            print(f"the best checkpoint by dev {rule.select} is that of step {best}")
            state = checkpoints.restore(best, experiment.abstract_state())[0]
        updates = sum(
            min(max(loop.done - stage.first, 0), stage.steps) * stage.method.updates
            for stage in experiment.stages
        )
        return Trained(state, updates, time.monotonic() - loop.started, loop.spent)


class _Loop:
    """Where a run stands: `done` updates of all, the `state` after them, and what they took.

    `spent` has the seconds, rows and tokens of training, without compilation and evaluation.
    """

    def __init__(
        self,
        experiment: Experiment,
        workdir: epath.Path,
        checkpoints: Checkpoints,
        started: float,
        before: dict[str, Any],
    ):
        self.experiment, self.checkpoints, self.started = experiment, checkpoints, started
        self.state, self.done, self._validation_loss = None, 0, before["loss"]
        self.spent = {"seconds": 0.0, "rows": 0, "tokens": 0.0}
        self._fingerprint = fingerprint(experiment.config, schema.IRRELEVANT)
        if restored := checkpoints.restore_latest(experiment.abstract_state()):
            self.done, self.state, meta = restored
            if meta["fingerprint"] != self._fingerprint:
                raise CheckpointError(
                    f"{workdir}/checkpoints: checkpoint {self.done} is of a run with another "
                    "config; take another --workdir"
                )
            self.started -= meta["seconds"]
            self.spent = meta["spent"]
            self._validation_loss = meta["validation_loss"]
            print("\n".join(checkpoints.damage + [f"continuing from step {self.done}"]))
        truncate_metrics(workdir, self.done)
        self.writer = MetricWriter(workdir)
        self.progress = TrainingProgress(
            experiment.total_steps, experiment.config.title, first_step=self.done
        )
        self._stop_asked = False

    def __enter__(self) -> "_Loop":
        self._handler = signal.getsignal(signal.SIGTERM)
        if not jax.distributed.is_initialized():  # which listens to it itself, see `train`
            signal.signal(signal.SIGTERM, self._ask_to_stop)
        self.progress.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.progress.__exit__(*exception)
        self.writer.close()
        signal.signal(signal.SIGTERM, self._handler)

    @property
    def over(self) -> bool:
        """Whether the run ends here, by its updates or by its time."""
        limit = self.experiment.config.stop_after_seconds
        return self.done == self.experiment.total_steps or 0 < limit <= self.spent["seconds"]

    def train(self, stage: Stage) -> None:
        """The updates of `stage` that are not done yet."""
        experiment, end = self.experiment, stage.first + stage.steps
        config = experiment.config
        log_every = min(config.log_every, config.stop_after_skipped)  # logs see what was skipped
        if config.stop_after_seconds:
            log_every = 1  # and the time
        if self.done >= end or self.over:
            return
        if self.done == stage.first:
            self.state = experiment.start(stage, self.state)
            self._adapt_replay(stage)
        teacher = experiment.teacher and experiment.teacher.params
        step = jax.jit(
            functools.partial(
                train_step,
                method=stage.method,
                models=experiment.models,
                optimizers=stage.optimizers,
            ),
            out_shardings=(experiment.placed(), NamedSharding(experiment.mesh, sharding.P())),
            donate_argnums=0,
        )
        self._mark()
        first = self.done - stage.first
        corpus = stream(stage.corpus, first) if stage.corpus else itertools.repeat(None)
        for rows in zip(stream(stage.batches, first), corpus):
            self.state, metrics = step(self.state, teacher, *sharding.place_rows(rows))
            self.done += 1
            self._tokens = self._tokens + metrics.scalars["tokens"]
            if self.done == stage.first + first + 1:
                jax.block_until_ready(metrics)
                self._mark()  # the first update of a stage is compilation
            if self.done % log_every == 0 or self.done == end:
                self._log(stage, summarise(metrics, stage.method.conventions))
            scores = self._evaluate(stage)
            if jax.distributed.is_initialized():  # then it says at which step all of them stop
                self._stop_asked |= self.checkpoints.reached_preemption(self.done)
            self._save(stage, scores)
            if self.done == end or self.over:
                return

    def _log(self, stage: Stage, values: dict[str, float]) -> None:
        """Metrics to file and terminal; the one place where the loop waits for the device."""
        values |= self._account(stage)
        made = (self.done - stage.first) * stage.method.updates
        values["learning_rate"] = float(stage.learning_rate(made - 1))  # of the latest update
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

    def _mark(self) -> None:
        self._marked, self._tokens = (self.done, time.monotonic()), 0.0

    def _account(self, stage: Stage) -> dict[str, float]:
        """Adds to `spent` what was done since the last mark, and marks; how fast that was."""
        tokens = float(self._tokens)  # waits for the device
        steps, seconds = self.done - self._marked[0], time.monotonic() - self._marked[1]
        self._mark()
        if not steps:
            return {}
        rows = steps * self.experiment.config.stages[stage.index].batch_size
        seconds = hosts.on_first(lambda: seconds)  # one clock, so that all stop at the same step
        spent = {"seconds": seconds, "rows": rows, "tokens": tokens}
        self.spent = {name: self.spent[name] + spent[name] for name in spent}
        return {"tokens_per_second": tokens / seconds, "seconds_per_update": seconds / steps}

    def _evaluate(self, stage: Stage) -> dict[str, float] | None:
        every = self.experiment.config.evaluation.every
        if not every or (self.done % every and not self.over):
            return None
        self._account(stage)
        found = assess(self.experiment, self.state.student)
        self._validation_loss = found["loss"]
        scores = {f"dev/{name}": value for name, value in found.items() if name != "texts"}
        self.writer.write(self.done, scores | {"stage": stage.name})
        self._adapt_replay(stage)
        self._mark()
        selected = self.experiment.config.checkpoint.select
        return scores | {SELECTION: -found["loss"] if selected == "loss" else found[selected]}

    def _adapt_replay(self, stage: Stage) -> None:
        """DistiLLM's schedule goes by the validation loss, first by that before the stage."""
        if stage.method.targets == "replay":
            rule = self.experiment.config.stages[stage.index].replay
            loss, replay = self._validation_loss, self.state.replay
            replay = adapt(replay, loss, tolerance=rule.tolerance, step=rule.step)
            self.state = self.state.replace(replay=replay)

    def _save(self, stage: Stage, scores: dict[str, float] | None) -> None:
        self.writer.flush()  # a resumed run continues the metrics that stand before its checkpoint
        self.checkpoints.save(
            self.done,
            self.state,
            {
                "stage": stage.name,
                "position": self.done - stage.first,
                "fingerprint": self._fingerprint,
                "seconds": time.monotonic() - self.started,
                "spent": self.spent,
                "validation_loss": self._validation_loss,
            },
            metrics=scores,
            force=self.over or self._stop_asked or scores is not None,
        )
        if self._stop_asked:
            self.checkpoints.wait()
            print(f"stopped after step {self.done} and saved; the same command continues")
            sys.exit(0)

    def _ask_to_stop(self, *_: Any) -> None:
        self._stop_asked = True


def finish(
    experiment: Experiment, workdir: epath.Path, trained: Trained, before: dict[str, Any]
) -> dict[str, Any]:
    """Exports, measures, reports; `summary.json` comes last and says that the run is finished."""
    config, state = experiment.config, trained.state
    print("measuring the student after training …", flush=True)
    after = assess(experiment, state.student, state.soft_prompt)
    if state.soft_prompt is not None and config.evaluation.prompt_effect:
        after |= _prompt_effect(experiment, state.soft_prompt)
    write_json(workdir / "after.json", after)
    rows = [
        (name, before[key], after[key], *rest)
        for key, (name, *rest) in HELD_OUT.items()
        if key in after
    ]
    paths = {"report": str(workdir / "report.html")} | save(experiment, state, workdir, rows)
    summary = _summary(trained, before, after)
    facts = {
        "Device": jax.devices()[0].device_kind,
        "Devices": str(jax.device_count()),
        "Processes": str(jax.process_count()),
        "Versions": _versions(),
        "Python": platform.python_version(),
        "Time": f"{trained.seconds / 60:.1f} min",
        "Peak memory": f"{summary['peak_memory_gb']:.2f} GB",
    }
    write_report(
        workdir,
        title=config.title,
        config_text=json.dumps(as_json(config), indent=2),
        summary={"metrics": rows, "facts": facts, "paths": paths},
        samples=_samples(experiment, before["texts"], after["texts"]),
        reference="teacher" if config.evaluation.references == "teacher" else "reference",
    )
    print(summary_table([row[:3] for row in rows], paths))
    write_json(workdir / "summary.json", summary)
    return summary


def _prompt_effect(experiment: Experiment, soft_prompt: jax.Array) -> dict[str, float]:
    """The teacher's own ROUGE-L, without and with its soft prompt (table 4 of the paper)."""
    plain, _ = _score(experiment, experiment.teacher)
    prompted, _ = _score(experiment, experiment.teacher, soft_prompt)
    return {"teacher_rougeL": plain["rougeL"], "teacher_rougeL_prompted": prompted["rougeL"]}


def _summary(trained: Trained, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What a run came to, in numbers."""
    spent = trained.training
    summary = {
        f"{key}_{when}": found[key]
        for key in COMPARED
        for when, found in (("before", before), ("after", after))
        if key in found
    }
    summary |= {
        "seconds": trained.seconds,
        "training_seconds": spent["seconds"],
        "peak_memory_gb": peak_memory_gb(),
        "updates": trained.updates,
        "updates_skipped": int(trained.state.skipped),
    }
    if spent["rows"]:
        summary["tokens_per_second"] = spent["tokens"] / spent["seconds"]
        summary["seconds_per_sample"] = spent["seconds"] / spent["rows"]
    if "kl_prompted" in after:
        summary["kl_prompted_after"] = after["kl_prompted"]
    return summary | {name: after[name] for name in PROMPT_EFFECT if name in after}


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
    parser.add_argument("--workdir", required=True, help="folder of the run, or gs://BUCKET/…")
    hosts.add_arguments(parser)
    return parser


if __name__ == "__main__":
    main()
