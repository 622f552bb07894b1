"""The training loop: update after update, with logs, evaluations, checkpoints, and how it ends."""

import dataclasses
import itertools
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from etils import epath

from promptkd_jax.data.batch import Batch
from promptkd_jax.data.batches import stream
from promptkd_jax.distill.replay import adapt
from promptkd_jax.distill.state import TrainState, summarize
from promptkd_jax.evaluation.student_metrics import generation_metrics, teacher_metrics
from promptkd_jax.infra import distributed, sharding, signals
from promptkd_jax.infra.errors import CheckpointError, TrainingError
from promptkd_jax.infra.metrics import MetricWriter, truncate_metrics
from promptkd_jax.models.layers.gated_prefix import GatedPrefix
from promptkd_jax.models.model import Model
from promptkd_jax.training import build
from promptkd_jax.training.checkpoint import Checkpoints
from promptkd_jax.training.config.config_file import fingerprint
from promptkd_jax.training.config.fields import NOT_IN_FINGERPRINT, RunConfig
from promptkd_jax.training.experiment import Experiment, Stage
from promptkd_jax.training.progress import TrainingProgress

SELECTION = "selection"  # the score that chooses the best checkpoint, higher is better


def evaluate_student(
    experiment: Experiment, student: Any = None, soft_prompt: jax.Array | GatedPrefix | None = None
) -> dict[str, Any]:
    """The student on the dev rows: closeness to the teacher, scores, and its responses ("texts").

    Args:
      student: its parameters as a train state has them; None for those that the run starts from.
      soft_prompt: for the closeness to the prompted teacher.
    """
    model = experiment.student if student is None else experiment.trained_student(student)
    config = experiment.config
    close = teacher_metrics(
        experiment.teacher,
        model,
        experiment.dev,
        batch_size=config.evaluation.batch_size,
        length=config.data.max_length,
        vocab_size=experiment.vocab_size,
        soft_prompt=soft_prompt,
    )
    scores, texts = dev_generation_metrics(experiment, model)
    return close | scores | {"texts": texts}


def dev_generation_metrics(
    experiment: Experiment, model: Model, soft_prompt: jax.Array | GatedPrefix | None = None
):
    """(scores, texts) of a model's responses to all dev rows, see
    `student_metrics.generation_metrics`."""
    config, data = experiment.config.evaluation, experiment.config.data
    return generation_metrics(
        model,
        experiment.dev,
        sampling=dataclasses.replace(config.sampling, eos_ids=model.eos_ids),
        prompt_capacity=data.max_prompt_length,
        max_new_tokens=experiment.max_new_tokens,
        batch_size=config.batch_size,
        seed=experiment.config.seed,
        vocab_size=experiment.vocab_size,
        soft_prompt=soft_prompt,
        rouge_tokenizer=config.rouge_tokenizer,
    )


def open_checkpoints(config: RunConfig, workdir: epath.Path) -> Checkpoints:
    """Those of the run with this config, which `workdir` belongs to."""
    return Checkpoints(
        workdir / "checkpoints",
        keep=config.checkpoint.keep,
        every=config.checkpoint.every,
        best_metric=SELECTION if config.evaluation.every else None,
    )


class Trained(NamedTuple):
    """What training comes to: the state to export, of which step it is, the student's updates, and
    what they took.

    `seconds` of the whole run, all its processes; `training` the sums of `_Loop.spent`.
    """

    state: TrainState
    step: int
    updates: int
    seconds: float
    training: dict[str, float]


def compile_ahead(experiment: Experiment, stage: Stage, step: Callable) -> None:
    """Compiles a stage's jitted `step` from shapes, so that its first call finds it compiled."""
    rows = next(_placed_batches(stage, 0))
    step.lower(experiment.abstract_state(), *_arguments(experiment, rows)).compile()


def fit(
    experiment: Experiment,
    workdir: epath.Path,
    started: float,
    before: dict[str, Any],
    first_step: Callable,
) -> Trained:
    """Every update that is not done yet.

    Args:
      started: when this process began its work, on the monotonic clock.
      before: what `evaluate_student` said of the initial student.
      first_step: `experiment.jitted_step` of the first stage.

    Raises:
      TrainingError: the loss or a gradient is not finite again and again, or in every step.
      CheckpointError: a checkpoint cannot be written, or is of another run.
      Stopped: by a signal; what was done is saved.
    """
    rule, checkpoints = experiment.config.checkpoint, open_checkpoints(experiment.config, workdir)
    with (
        signals.awaited(lambda: checkpoints.saving),  # also while they are closed
        checkpoints,
        _Loop(experiment, workdir, checkpoints, started, before, first_step) as loop,
        signals.deferred("this step", lambda: loop.unsaved),
    ):
        for stage in experiment.stages:
            loop.train(stage)
        checkpoints.wait()
        best, step, state = checkpoints.best_step(), loop.done, loop.state
        if rule.export == "best" and best not in (None, step):
            step, like = best, (experiment.abstract_state(), experiment.unpadded_state())
            what = f"the best checkpoint by dev {rule.select}, which is exported"
            print(f"{what}, is that of {experiment.name_of_step(step)}", flush=True)
            state, _ = checkpoints.restore(step, *like)
        updates = sum(
            min(max(loop.done - stage.first, 0), stage.steps) * stage.method.updates_per_step
            for stage in experiment.stages
        )
        return Trained(state, step, updates, time.monotonic() - loop.started, loop.spent)


def _placed_batches(stage: Stage, first: int) -> Iterator[tuple[Batch, Batch | None]]:
    """(rows, corpus) for the steps of a stage from `first` on, on the devices. Rows that a step
    writes ahead are those of the next."""
    rows = stream(stage.batches, first + stage.method.execution.one_step_off_policy)
    corpus = stream(stage.corpus, first) if stage.corpus else itertools.repeat(None)
    return map(sharding.place_rows, zip(rows, corpus))


def _arguments(experiment: Experiment, rows: tuple[Batch, Batch | None]) -> tuple:
    """What a step gets beside the state."""
    teacher = experiment.teacher and experiment.teacher.params
    return teacher, *rows, experiment.frozen_student, experiment.token_kernel


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
        first_step: Callable,
    ):
        self.experiment, self.checkpoints, self.started = experiment, checkpoints, started
        self._first_step = first_step
        self.state, self.done, self._validation_loss = None, 0, before["loss"]
        self.spent = {"seconds": 0.0, "rows": 0, "tokens": 0.0}
        self._skipped = 0  # before the stage
        self._fingerprint = fingerprint(experiment.config, NOT_IN_FINGERPRINT)
        self._unpadded = experiment.unpadded_state()
        if restored := checkpoints.restore_latest(experiment.abstract_state(), self._unpadded):
            self.done, self.state, meta = restored
            if meta["fingerprint"] != self._fingerprint:
                raise CheckpointError(
                    f"{workdir}/checkpoints: checkpoint {self.done} is of a run with another "
                    "config; take another --workdir"
                )
            self.started -= meta["seconds"]
            self.spent = meta["spent"]
            self._validation_loss, self._skipped = meta["validation_loss"], meta["skipped"]
            print("\n".join(checkpoints.damage + [f"continuing from step {self.done}"]))
        self._saved = self.done, self._clock()
        self._mark()
        truncate_metrics(workdir, self.done, evaluated=checkpoints.noted(self.done) is not None)
        self.writer = MetricWriter(workdir)
        self.progress = TrainingProgress(experiment.total_steps, first_step=self.done)

    def __enter__(self) -> "_Loop":
        print(build.title(self.experiment.config))
        self.progress.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.progress.__exit__(*exception)
        self.writer.close()

    def _clock(self) -> float:
        """Seconds: of the clock, or of many processes, which shall agree, those of training, which
        they know when they log."""
        return time.monotonic() if distributed.is_single_process() else self.spent["seconds"]

    @property
    def unsaved(self) -> bool:
        """Whether steps were made of which there is no checkpoint."""
        return self.done != self._saved[0]

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
        if stage.first < self.done <= end:
            self._evaluate(stage)  # unless it was before the run was stopped
        if self.done >= end or self.over:
            self._check_updates(stage)
            return
        message = f"compiling stage {stage.name}: its first step takes longer than those behind it"
        print(message, flush=True)
        if self.done == stage.first:
            self._skipped = int(self.state.skipped) if self.state else 0
            self.state = experiment.start(stage, self.state)
            self._adapt_replay(stage)
            self.state = experiment.write_ahead(stage, self.state)
        step = experiment.jitted_step(stage) if stage.index else self._first_step
        self._mark()
        first = self.done - stage.first
        batches = _placed_batches(stage, first)
        rows = next(batches)
        while not (self.done == end or self.over):
            self.state, metrics = step(self.state, *_arguments(experiment, rows))
            self.done += 1
            if self.done < end:
                rows = next(batches)  # the device is at work, and nothing has waited for it yet
            self._tokens = self._tokens + metrics.scalars["tokens"]
            if self.done == stage.first + first + 1:
                jax.block_until_ready(metrics)
                self._mark()  # the first update of a stage is compilation
            if self.done % log_every == 0 or self.done == end:
                self._log(stage, summarize(metrics, stage.method.conventions))
            self._save(stage)
            self._evaluate(stage)
        self._check_updates(stage)

    def _check_updates(self, stage: Stage) -> None:
        """Raises TrainingError after a stage whose every step was skipped."""
        steps = self.done - stage.first
        if 0 < steps <= stage.steps and int(self.state.skipped) - self._skipped == steps:
            raise TrainingError(
                f"stage {stage.name}: no update took place: the loss or a gradient was not finite "
                f"in all {steps} steps, so that the student is what it was before. Try a smaller "
                "learning rate, or dtype float32"
            )

    def _log(self, stage: Stage, values: dict[str, float]) -> None:
        """Metrics to file and terminal; the one place where the loop waits for the device."""
        values |= self._account(stage)
        made = (self.done - stage.first) * stage.method.updates_per_step
        values["learning_rate"] = float(stage.learning_rate(made - 1))  # of the latest update
        self.writer.write(self.done, values | {"stage": stage.name})
        self.progress.update(self.done, values | {"loss": values["student_loss"]}, stage.name)
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
        # One clock, so that all stop at the same step.
        seconds = distributed.run_on_primary(lambda: seconds)
        spent = {"seconds": seconds, "rows": rows, "tokens": tokens}
        self.spent = {name: self.spent[name] + spent[name] for name in spent}
        return {"tokens_per_second": tokens / seconds, "seconds_per_update": seconds / steps}

    @property
    def _evaluation_due(self) -> bool:
        every = self.experiment.config.evaluation.every
        return every > 0 and (self.done % every == 0 or self.over)

    def _evaluate(self, stage: Stage) -> None:
        """Scores the student, where it is due and was not done yet. Its checkpoint is written."""
        if not self._evaluation_due:
            return
        scores = self.checkpoints.noted(self.done)
        if scores is None:
            self._account(stage)
            found = evaluate_student(self.experiment, self.state.student)
            scores = {f"dev/{name}": value for name, value in found.items() if name != "texts"}
            self.writer.write(self.done, scores | {"stage": stage.name})
            self.writer.flush()
            selected = self.experiment.config.checkpoint.select
            scores[SELECTION] = -found["loss"] if selected == "loss" else found[selected]
            self.checkpoints.note(self.done, scores)
            self._mark()
        self._validation_loss = scores["dev/loss"]
        self._adapt_replay(stage)

    def _adapt_replay(self, stage: Stage) -> None:
        """DistiLLM's schedule goes by the validation loss, first by that before the stage."""
        if stage.method.source.keeps_replay:
            rule = self.experiment.config.stages[stage.index].replay
            loss, replay = self._validation_loss, self.state.replay
            replay = adapt(replay, loss, tolerance=rule.tolerance, increment=rule.step)
            self.state = self.state.replace(replay=replay)

    def _save(self, stage: Stage) -> None:
        """Writes a checkpoint where one is due, and obeys a signal."""
        stop = signals.stop_asked()
        if not distributed.is_single_process():  # at a step that all processes stop at
            preempted = self.checkpoints.reached_preemption(self.done)
            stop = preempted and (stop or signal.SIGTERM)
        minutes = self.experiment.config.checkpoint.minutes
        late = 0 < 60 * minutes <= self._clock() - self._saved[1]
        last = self.done == stage.first + stage.steps  # before the next one is compiled
        force = bool(self.over or last or late or stop or self._evaluation_due)
        if force or self.checkpoints.due(self.done):
            self.writer.flush()  # a resumed run continues what stands before its checkpoint
        saved = self.checkpoints.save(
            self.done,
            self.state,
            {
                "stage": stage.name,
                "position": self.done - stage.first,
                "fingerprint": self._fingerprint,
                "seconds": time.monotonic() - self.started,
                "spent": self.spent,
                "validation_loss": self._validation_loss,
                "skipped": self._skipped,
            },
            force=force,
            unpadded=self._unpadded,
        )
        if saved:
            self._saved = self.done, self._clock()
        if stop:
            self.checkpoints.wait()
            print(f"stopped after step {self.done} and saved; the same command continues")
            signals.stop(stop)
