"""Several methods, one student, one budget: trains them and measures them.

Every method is trained with every seed, each run in a process of its own, so that its time and its
peak memory are its own, all from the same student, on the same data, within the same budget: equal
steps, or equal wall-clock. Then teacher, common student and all results answer the same test
requests. Out come `comparison.json`, `comparison.md` and `report.html`.

The same command continues a comparison that was stopped, and with further methods or seeds in its
config it trains and measures only these.
"""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from promptkd_jax.data.records import read_records
from promptkd_jax.data.rows import Rows
from promptkd_jax.evaluation.bootstrap import mean_and_std, paired_difference
from promptkd_jax.evaluation.exposure_bias import exposure_bias, generate_samples
from promptkd_jax.evaluation.text_metrics import rouge_l
from promptkd_jax.inference.generate import decode, generate_responses
from promptkd_jax.infra import signals
from promptkd_jax.infra.errors import ComparisonError
from promptkd_jax.infra.files import load_or_compute, write_json
from promptkd_jax.infra.metrics import read_metrics
from promptkd_jax.models.load import load_with_tokenizer
from promptkd_jax.models.model import Model, end_ids
from promptkd_jax.studies import comparison_report
from promptkd_jax.studies.comparison import (
    COMPARISON_NOT_IN_FINGERPRINT,
    ComparisonConfig,
    Plan,
    Run,
    plan_comparison,
)
from promptkd_jax.studies.comparison_report import AVERAGE, START, TEACHER
from promptkd_jax.training.config import claim
from promptkd_jax.training.fields import NOT_IN_FINGERPRINT
from promptkd_jax.training.prepare import shared_vocabulary, tokenized

# What a run's summary.json says and the comparison shows; the latter only behind a soft prompt.
FIGURES = (
    *("updates", "training_seconds", "tokens_per_second", "seconds_per_sample", "peak_memory_gb"),
    *("kl_after", "agreement_after", "rougeL_after"),
    *("response_length_after", "eos_rate_after", "repetition_after"),
)
_POLL_SECONDS = 0.1
PROMPT_FIGURES = ("kl_prompted_after", "teacher_rougeL", "teacher_rougeL_prompted")


class Contender(NamedTuple):
    """A model that is measured, with the seed of its answers, and where they are kept."""

    model: str
    seed: int
    folder: pathlib.Path


def compare(config: ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
    """Trains and measures what `workdir` does not hold yet, and writes the comparison into it.

    Returns:
      What `comparison.json` says.

    Raises:
      ConfigError: a mistake in the config, or the folder belongs to another comparison.
      DataError, ModelError: data or a model that cannot be used.
      ComparisonError: a training failed, or its summary lacks a figure.
    """
    workdir = pathlib.Path(workdir).resolve()
    made = plan_comparison(config, workdir)
    claim(workdir, made.settings, COMPARISON_NOT_IN_FINGERPRINT)
    trainings = [*made.pretraining.values(), *made.runs.values()]
    for run in trainings:
        claim(run.folder, run.config, NOT_IN_FINGERPRINT)
    for number, run in enumerate(trainings, start=1):
        _train_once(run, f"[{number}/{len(trainings)}] {run.name}", workdir / "cache")
    measured = measure(made, workdir)
    found = summarize_comparison(made, measured)
    write_json(workdir / "comparison.json", found)
    comparison_report.write(workdir, found, made.settings)
    return found


# What is trained.


def _train_once(run: Run, name: str, cache: pathlib.Path) -> None:
    summary = run.folder / "summary.json"
    if summary.exists():
        print(f"{name}: finished before")
        return
    print(f"{name} …", flush=True)
    train(run, cache)
    found = json.loads(summary.read_text("utf-8"))
    print(f"{name}: {found['seconds']:.0f} s, ROUGE-L {found['rougeL_after']:.2f}", flush=True)


def train(run: Run, cache: pathlib.Path) -> None:
    """One training in a process of its own, its output in `log.txt` of its folder.

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
        status = _run(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
    if status or not (run.folder / "summary.json").exists():
        tail = log.read_text("utf-8").splitlines()[-12:]
        raise ComparisonError(
            f"{run.name} ended with exit status {status} before it was finished; the same "
            f"command continues here. The end of {log}:\n" + "\n".join(f"  {t}" for t in tail)
        )


def _run(command: Sequence[str], **how: Any) -> int:
    """The exit status of a program, which at a signal is told to stop, and waited for."""
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


# What is measured.


def measure(made: Plan, workdir: pathlib.Path) -> dict[str, Any]:
    """Answers, scores and exposure bias, computed where `workdir` does not hold them.

    Returns:
      "requests": of each test set, how many are answered and dropped, and the texts; "tests": by
      model and seed, what `_answer_sets` returns; "exposure_bias": by method and seed, the fields
      of `ExposureBias`.
    """
    # Two at a time: the teacher, which every measurement needs, and the model measured.
    load = functools.lru_cache(maxsize=2)(
        functools.partial(load_with_tokenizer, dtype=made.a_run.student.dtype)
    )
    teacher = load(made.teacher)
    sets = _test_sets(made, teacher)
    dev = _dev_rows(made, teacher)
    tests: dict[str, dict[int, Any]] = {}
    for model, seed, contender in _contenders(made, workdir):
        contender.folder.mkdir(parents=True, exist_ok=True)
        tests.setdefault(model, {})[seed] = load_or_compute(
            contender.folder / f"test-seed{seed}.json",
            functools.partial(_answer_sets, made, sets, load, contender),
        )
    write = functools.cache(functools.partial(_teacher_texts, made, dev, load, made.teacher))
    exposure: dict[str, dict[int, Any]] = {}
    for (method, seed), run in made.runs.items():
        exposure.setdefault(method, {})[seed] = load_or_compute(
            run.folder / "exposure_bias.json",
            functools.partial(_exposure_bias, made, dev, load, made.teacher, write, run, seed),
        )
    requests = {
        name: {
            "rows": len(rows.tokens),
            "dropped": rows.dropped,
            "texts": ["\n".join(filter(None, r[:2])) for r in rows.records],
            "references": [r.outputs[0] for r in rows.records],
        }
        for name, rows in sets.items()
    }
    return {"requests": requests, "tests": tests, "exposure_bias": exposure}


def _contenders(made: Plan, workdir: pathlib.Path):
    """(model, seed, Contender): the teacher, the common student, then every run."""
    fixed = {TEACHER: (made.teacher, "teacher")}
    if made.student:
        fixed[START] = (made.student, "start")
    for name, (model, folder) in fixed.items():
        for seed in made.settings.seeds:
            yield name, seed, Contender(model, seed, workdir / "fixed" / folder)
    for (method, seed), run in made.runs.items():
        yield method, seed, Contender(run.student, seed, run.folder)


def _test_sets(made: Plan, teacher: Model) -> dict[str, Rows]:
    test = made.settings.test
    return {
        name: _rows(made, test.sets[name], test.split, teacher, test.rows, need_output=True)
        for name in test.sets
    }


def _dev_rows(made: Plan, teacher: Model) -> Rows:
    data, rows = made.a_run.data, made.settings.exposure_bias.rows
    return _rows(made, data.dev, data.dev_split, teacher, rows, need_output=False)


def _rows(
    made: Plan, source: str, split: str, model: Model, limit: int, *, need_output: bool
) -> Rows:
    records = read_records(source, split=split, need_output=need_output)
    return tokenized(made.a_run, model, source, records[: limit or None])


def _answer_sets(
    made: Plan,
    sets: Mapping[str, Rows],
    load: Callable[[str], Model],
    contender: Contender,
) -> dict[str, Any]:
    """By test set: the answers ("texts"), and ROUGE-L of each in per cent."""
    model, data, test = load(contender.model), made.a_run.data, made.settings.test
    print(f"{contender.model} answers {', '.join(sets)}, seed {contender.seed}", flush=True)
    found = {}
    for name, rows in sets.items():
        answers = generate_responses(
            model,
            rows,
            sampling=dataclasses.replace(test.sampling, eos_ids=model.eos_ids),
            prompt_capacity=data.max_prompt_length,
            max_new_tokens=data.max_length - data.max_prompt_length,
            batch_size=test.batch_size,
            key=jax.random.key(contender.seed),
            vocab_size=model.vocab_size,
        )
        texts = [decode(model.tokenizer, answer) for answer in answers]
        scores = [100 * rouge_l(t, record.outputs) for t, record in zip(texts, rows.records)]
        found[name] = {"rougeL": scores, "texts": texts}
    return found


def _exposure_bias(
    made: Plan,
    dev: Rows,
    load: Callable[[str], Model],
    teacher: str,
    write: Callable[..., list[Rows]],
    run: Run,
    seed: int,
) -> dict[str, list[float]]:
    models = load(teacher), load(run.student)
    vocab_size = shared_vocabulary(*models)
    found = exposure_bias(
        *models,
        dev,
        seed=seed,
        vocab_size=vocab_size,
        teacher_texts=write(seed, vocab_size, end_ids(*models)),
        **_text_sizes(made),
    )
    return {name: np.asarray(curve).tolist() for name, curve in found._asdict().items()}


def _teacher_texts(
    made: Plan,
    dev: Rows,
    load: Callable[[str], Model],
    teacher: str,
    seed: int,
    vocab_size: int,
    eos_ids: tuple[int, ...],
) -> list[Rows]:
    """The same for all methods of a seed."""
    sizes = _text_sizes(made)
    return generate_samples(
        load(teacher), dev, seed=seed, vocab_size=vocab_size, eos_ids=eos_ids, **sizes
    )


def _text_sizes(made: Plan) -> dict[str, int]:
    data, settings = made.a_run.data, made.settings
    return dict(
        samples=settings.exposure_bias.samples,
        prompt_capacity=data.max_prompt_length,
        max_new_tokens=data.max_length - data.max_prompt_length,
        batch_size=settings.test.batch_size,
    )


# What it says.


def summarize_comparison(made: Plan, measured: Mapping[str, Any]) -> dict[str, Any]:
    """The comparison as plain numbers: scores, differences, figures, curves, samples."""
    config = made.settings
    reference = config.reference or _default_reference(config.methods)
    scores = {
        model: {name: _stacked(by_seed, name) for name in measured["requests"]}
        for model, by_seed in measured["tests"].items()
    }
    differences = {
        method: _differences(config, scores[method], scores[reference])
        for method in config.methods
        if method != reference
    }
    by_method = {
        method: {seed: made.runs[method, seed] for seed in config.seeds}
        for method in config.methods
    }
    return {
        "title": config.title,
        "note": config.note,
        "budget": dataclasses.asdict(config.budget) | {"batch_size": _batch_sizes(made)},
        "seeds": list(config.seeds),
        "methods": list(config.methods),
        "reference": reference,
        "test_sets": {
            name: {"rows": one["rows"], "dropped": one["dropped"]}
            for name, one in measured["requests"].items()
        },
        "rougeL": {model: _over_seeds(sets) for model, sets in scores.items()},
        "differences": differences,
        "figures": {method: _figures(runs) for method, runs in by_method.items()},
        "kl": {method: _mean_curve(map(_kl, runs.values())) for method, runs in by_method.items()},
        "exposure_bias": {
            method: _exposure_curve(list(by_seed.values()))
            for method, by_seed in measured["exposure_bias"].items()
        },
        "samples": _samples(config, measured),
    }


def _default_reference(methods: Sequence[str]) -> str:
    return "promptkd" if "promptkd" in methods else methods[0]


def _batch_sizes(made: Plan) -> list[int]:
    return sorted({run.config.stages[0].batch_size for run in made.runs.values()})


def _stacked(by_seed: Mapping[int, Any], name: str) -> np.ndarray:
    """ROUGE-L of each answer to a test set, `[seeds, rows]`."""
    return np.array([one[name]["rougeL"] for one in by_seed.values()])


def _over_seeds(sets: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Each set's score and their average: one value a seed, mean and deviation of these."""
    values = {name: scores.mean(axis=1) for name, scores in sets.items()}
    values[AVERAGE] = np.mean(list(values.values()), axis=0)
    return {
        name: mean_and_std(one)._asdict() | {"seeds": one.tolist()} for name, one in values.items()
    }


def _differences(
    config: ComparisonConfig, ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]
) -> dict[str, dict[str, float]]:
    """Ours minus theirs, on each set and on average, with the bootstrap interval."""
    pairs = {name: ([ours[name]], [theirs[name]]) for name in ours}
    pairs[AVERAGE] = (list(ours.values()), [theirs[name] for name in ours])
    return {
        name: paired_difference(*pair, draws=config.bootstrap.draws, seed=0)._asdict()
        for name, pair in pairs.items()
    }


def _figures(runs: Mapping[int, Run]) -> dict[str, dict[str, float]]:
    """Mean and deviation over seeds of what the summaries say."""
    summaries = [_summary(run) for run in runs.values()]
    return {
        key: mean_and_std([summary[key] for summary in summaries])._asdict() for key in summaries[0]
    }


def _summary(run: Run) -> dict[str, float]:
    """The figures in a run's summary. Raises ComparisonError where one is missing."""
    file = run.folder / "summary.json"
    found = json.loads(file.read_text("utf-8"))
    prompted = any(stage.teacher_view == "prompted" for stage in run.config.stages)
    wanted = FIGURES + (PROMPT_FIGURES if prompted else ())
    if missing := [key for key in wanted if key not in found]:
        raise ComparisonError(
            f"{file}: has no {', '.join(missing)}; was it written by another version? Remove the "
            "file, and the same command writes it again"
        )
    return {key: found[key] for key in wanted}


def _kl(run: Run) -> dict[int, float]:
    """KL(teacher || student) on the dev rows by step, from before the first update on."""
    before = json.loads((run.folder / "before.json").read_text("utf-8"))
    rows = (row for row in read_metrics(run.folder) if "dev/kl" in row)
    return {0: before["kl"]} | {row["step"]: row["dev/kl"] for row in rows}


def _mean_curve(curves) -> dict[str, list[float]]:
    """The mean of several curves at the steps that all of them have."""
    curves = list(curves)
    steps = sorted(set.intersection(*map(set, curves)))
    return {
        "steps": steps,
        "values": [float(np.mean([curve[step] for curve in curves])) for step in steps],
    }


def _exposure_curve(found: Sequence[Mapping[str, Any]]) -> list[float]:
    """ExAccErr, the mean over seeds, up to the last position that a tenth of all texts reach: what
    is said of the few longer ones is noise."""
    counts = [np.minimum(one["student_count"], one["teacher_count"]) for one in found]
    reached = min(int(np.sum(count >= count[0] / 10)) for count in counts)
    return np.mean([one["ex_acc_err"][:reached] for one in found], axis=0).tolist()


def _samples(config: ComparisonConfig, measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The first requests of each test set, evenly, with everyone's answers for the first seed."""
    seed, found = config.seeds[0], []
    share = -(-config.samples // len(measured["requests"]))
    for name, requests in measured["requests"].items():
        for row in range(min(share, requests["rows"])):
            answers = {m: t[seed][name]["texts"][row] for m, t in measured["tests"].items()}
            found.append(
                {
                    "set": name,
                    "request": requests["texts"][row],
                    "reference": requests["references"][row],
                    "answers": answers,
                }
            )
    return found[: config.samples]
