"""The runs of a study: each is trained once.

`compare` and `reproduce` declare which; what is done stands in files of the study's folder, so that
the same command continues a study that was stopped, and with further runs does only these.

A run is trained by `training.run.run`, in one of two places, since neither has all of it. In a
process of its own (`train_apart`) its time and its peak memory are its own, which a process can
tell of its whole life only: what a comparison shows. In this process it can be one of many
processes of several hosts, and lie in a bucket.
"""

import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from etils import epath

from promptkd_jax.infra import distributed, signals
from promptkd_jax.infra.errors import ComparisonError
from promptkd_jax.infra.files import read_text
from promptkd_jax.training.config.config_file import as_json, claim
from promptkd_jax.training.config.fields import NOT_IN_FINGERPRINT, RunConfig
from promptkd_jax.training.run import is_finished

_POLL_SECONDS = 0.1


class Run(NamedTuple):
    """One training: what it is called, its config, and where it lies."""

    name: str
    config: RunConfig
    folder: epath.Path

    @property
    def student(self) -> str:
        """The model that comes out."""
        return str(self.folder / "student")

    def summary(self) -> dict[str, Any]:
        """Reads what the finished run came to, in numbers."""
        return json.loads(read_text(self.folder / "summary.json"))


def train_all(runs: Sequence[Run], train: Callable[[Run], Any]) -> None:
    """Trains the runs in their order, but for those that are finished.

    Raises:
      ConfigError: a folder belongs to another run; then nothing is trained.
    """
    distributed.assert_same("what is to be trained", str([as_json(run.config) for run in runs]))
    for run in runs:
        claim(run.folder, run.config, NOT_IN_FINGERPRINT)
    for number, run in enumerate(runs, start=1):
        name = f"[{number}/{len(runs)}] {run.name}"
        if distributed.run_on_primary(functools.partial(is_finished, run.folder)):
            print(f"{name}: finished before", flush=True)
            continue
        print(f"{name} …", flush=True)
        train(run)
        summary = distributed.run_on_primary(run.summary)
        score = f"ROUGE-L {summary['rougeL_after']:.2f}"
        print(f"{name}: {summary['seconds']:.0f} s, {score}", flush=True)


def train_apart(run: Run) -> None:
    """Trains in a process of its own, whose output is in `log.txt` of the run's folder.

    Raises:
      ComparisonError: it did not finish; with the end of what it printed.
    """
    log = run.folder / "log.txt"
    module = [sys.executable, "-m", "promptkd_jax", "train"]
    command = [*module, f"--config={run.folder / 'config.json'}", f"--workdir={run.folder}"]
    environment = {"PYTHONUNBUFFERED": "1"} | os.environ
    with log.open("a", encoding="utf-8") as out:
        status = _exit_status(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
    if status or not (run.folder / "summary.json").exists():
        tail = log.read_text("utf-8").splitlines()[-12:]
        raise ComparisonError(
            f"{run.name} ended with exit status {status} before it was finished; the same "
            f"command continues here. The end of {log}:\n" + "\n".join(f"  {t}" for t in tail)
        )


def _exit_status(command: Sequence[str], **how: Any) -> int:
    """Of a program, which at a signal is told to stop, and waited for."""
    with (
        subprocess.Popen(command, start_new_session=True, **how) as process,  # Ctrl-C is for us
        signals.deferred("this training has saved", lambda: process.returncode is None),
    ):
        told = False
        while process.poll() is None:
            if signals.stop_asked() and not told:
                process.terminate()
                told = True
            time.sleep(_POLL_SECONDS)
        if told:
            signals.stop(signals.stop_asked())
        return process.returncode
