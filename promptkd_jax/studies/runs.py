"""The engine of a study: each run is trained once, each model answers each test set once a seed.

`compare` and `reproduce` declare which runs, which models and which sets; what is done stands in
files of the study's folder, so that the same command continues a study that was stopped, and with
further runs, sets or seeds does only these.

A run is trained by `training.run.run`, in one of two places, since neither has all of it. In a
process of its own (`train_apart`) its time and its peak memory are its own, which a process can
tell of its whole life only: what a comparison shows. In this process it can be one of many
processes of several hosts, and lie in a bucket.
"""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from promptkd_jax.data.records import Record
from promptkd_jax.data.rows import Rows, tokenize
from promptkd_jax.evaluation.bootstrap import mean_and_std
from promptkd_jax.evaluation.student_metrics import generation_metrics
from promptkd_jax.evaluation.text_metrics import rouge_l
from promptkd_jax.inference.generate import with_turn_end
from promptkd_jax.infra import distributed, signals
from promptkd_jax.infra.errors import ComparisonError
from promptkd_jax.infra.files import load_or_compute, read_text
from promptkd_jax.infra.specs import declared
from promptkd_jax.models.model import Model
from promptkd_jax.models.sampler import Sampling
from promptkd_jax.training.config import as_json, claim, fingerprint
from promptkd_jax.training.fields import NOT_IN_FINGERPRINT, DataConfig, RunConfig
from promptkd_jax.training.run import is_finished

AVERAGE = "average"
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


class Contender(NamedTuple):
    """A model that answers: its name in the tables, where it lies, the type that it computes in,
    the config whose `data` says how it is asked, and the folder for its answers."""

    name: str
    path: str
    dtype: str
    config: RunConfig
    folder: epath.Path


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


def train_apart(run: Run, cache: epath.PathLike) -> None:
    """Trains in a process of its own, whose output is in `log.txt` of the run's folder.

    Args:
      cache: for compiled code, where the environment does not name a folder for it.

    Raises:
      ComparisonError: it did not finish; with the end of what it printed.
    """
    log = run.folder / "log.txt"
    module = [sys.executable, "-m", "promptkd_jax", "train"]
    command = [*module, f"--config={run.folder / 'config.json'}", f"--workdir={run.folder}"]
    environment = {"JAX_COMPILATION_CACHE_DIR": str(cache), "PYTHONUNBUFFERED": "1"} | os.environ
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


def answer_sets(
    contender: Contender,
    sets: Mapping[str, Sequence[Record]],
    seeds: Sequence[int],
    *,
    sampling: Sampling,
    batch_size: int,
    load: Callable[..., Model],
    tokenizer: Any = None,
) -> dict[str, dict[int, dict[str, Any]]]:
    """Answers every set once with every seed, where `contender.folder` does not hold that yet.

    Args:
      sets: records with references, by name.
      batch_size: rows that are answered at once.
      load: as `load_with_tokenizer`; called if there is anything to answer.
      tokenizer: of the prompts; None: the model's own.

    Returns:
      By set and seed: `generation_metrics`, "rougeL_by_row" in percent, "texts", and how many
      "rows" there are and were "dropped".

    Raises:
      ConfigError: what is there was answered with other settings.
    """
    load = functools.cache(functools.partial(load, contender.path, dtype=contender.dtype))
    data = contender.config.data
    asked = data.prompt_format(contender.config.preset)
    decides = dict(
        model=contender.path,
        dtype=contender.dtype,
        **asked.identity,
        max_prompt_length=data.max_prompt_length,
        max_length=data.max_length,
        sampling={name: getattr(sampling, name) for name in declared(Sampling)},
    )

    def answer(name: str, seed: int) -> dict[str, Any]:
        model = with_turn_end(load(), asked, tokenizer)
        rows = tokenize(
            sets[name],
            tokenizer or model.tokenizer,
            asked,
            max_prompt_length=data.max_prompt_length,
            max_length=data.max_length,
            eos_id=model.eos_ids[0],
            long_prompts=data.long_prompts,
        )
        found = _answer(model, rows, data, sampling=sampling, batch_size=batch_size, seed=seed)
        score = f"ROUGE-L {found['rougeL']:.2f} on {found['rows']} rows"
        print(f"{contender.name} answers {name}, seed {seed}: {score}", flush=True)
        return found

    answers: dict[str, dict[int, dict[str, Any]]] = {}
    for name, records in sets.items():
        folder = answers_folder(contender, name)
        claim(folder, decides | {"records": fingerprint({"records": records})})
        answers[name] = {
            seed: load_or_compute(
                folder / f"seed{seed}.json", functools.partial(answer, name, seed)
            )
            for seed in seeds
        }
    return answers


def _answer(model: Model, rows: Rows, data: DataConfig, *, sampling: Sampling, **how: Any):
    scores, texts = generation_metrics(
        model,
        rows,
        sampling=dataclasses.replace(sampling, eos_ids=model.eos_ids),
        prompt_capacity=data.max_prompt_length,
        max_new_tokens=data.max_length - data.max_prompt_length,
        vocab_size=model.vocab_size,
        **how,
    )
    by_row = [100 * rouge_l(text, record.references) for text, record in zip(texts, rows.records)]
    counts = {"rows": len(texts), "dropped": rows.dropped}
    return scores | counts | {"rougeL_by_row": by_row, "texts": texts}


def answers_folder(contender: Contender, test_set: str) -> epath.Path:
    """Returns the folder for the answers to one set, a file for each seed."""
    return contender.folder / "evaluations" / test_set


def over_seeds(scores: Mapping[str, Mapping[int, float]]) -> dict[str, dict[str, Any]]:
    """Mean and deviation over the seeds of each set's score, and of their average.

    Args:
      scores: by set and seed, the same seeds in all.

    Returns:
      {"mean": …, "std": …, "seeds": the values} by set, and of `AVERAGE` where there is any set.
    """
    values = {name: [*by_seed.values()] for name, by_seed in scores.items()}
    if values:
        values[AVERAGE] = np.mean([*values.values()], axis=0).tolist()
    return {
        name: mean_and_std(by_seed)._asdict() | {"seeds": by_seed}
        for name, by_seed in values.items()
    }
