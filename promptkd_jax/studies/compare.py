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
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from promptkd_jax.data.reading.record_stream import read_records
from promptkd_jax.data.rows import Rows
from promptkd_jax.data.special_tokens import unknown_token
from promptkd_jax.evaluation.bootstrap import mean_and_std
from promptkd_jax.evaluation.exposure_bias import exposure_bias, generate_samples
from promptkd_jax.inference.generate import with_turn_end
from promptkd_jax.inference.teacher_responses import teacher_responses
from promptkd_jax.infra.errors import ComparisonError, DataError
from promptkd_jax.infra.files import load_or_compute, make_folder, read_text, write_json
from promptkd_jax.infra.metrics import read_metrics
from promptkd_jax.models.load import load_with_tokenizer
from promptkd_jax.models.model import Model, end_ids
from promptkd_jax.models.sampling_rules import Sampling
from promptkd_jax.studies import comparison_report
from promptkd_jax.studies.answers import Contender, answer_sets, differences, over_seeds
from promptkd_jax.studies.comparison import (
    COMPARISON_NOT_IN_FINGERPRINT,
    ComparisonConfig,
    Plan,
    plan_comparison,
)
from promptkd_jax.studies.comparison_report import (
    BEHAVIOUR,
    COST,
    PROMPT,
    PROMPT_CURVES,
    START,
    TEACHER,
)
from promptkd_jax.studies.runs import Run, train_all, train_apart
from promptkd_jax.training.config.config_file import claim
from promptkd_jax.training.prepare import tokenized
from promptkd_jax.training.run_models import set_chat_template, shared_vocabulary


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
    train_all(made.trainings, functools.partial(_train, made))
    found = summarize_comparison(made, measure(made, workdir))
    write_json(workdir / "comparison.json", found)
    comparison_report.write(workdir, found, made.settings)
    return found


def _train(made: Plan, run: Run) -> None:
    """Trains a run. The common student is measured once a seed: what the first run of a seed found
    before its training is what all others would find."""
    before = run.folder / "before.json"
    same = [other.folder / before.name for other in made.runs.values() if _same_start(run, other)]
    if found := [file for file in same if file.exists()]:
        load_or_compute(before, lambda: json.loads(read_text(found[0])))
    train_apart(run)


def _same_start(run: Run, other: Run) -> bool:
    """Whether two runs differ by their method alone, and so begin with the same measurement."""
    one, another = (dataclasses.replace(x.config, title="", stages=()) for x in (run, other))
    return one == another


# What is measured.


def measure(made: Plan, workdir: pathlib.Path) -> dict[str, Any]:
    """Answers, scores and exposure bias, computed where `workdir` does not hold them.

    Returns:
      "rows": of each test set; "answers": by model, set and seed, what `answer_sets` returns;
      "exposure_bias": by method and seed, the fields of `ExposureBias`.
    """
    # Two at a time: the teacher, which every measurement needs, and the model measured.
    load = functools.lru_cache(maxsize=2)(load_with_tokenizer)
    data, test, dtype = made.a_run.data, made.settings.test, made.a_run.student.dtype
    teacher, asked = load(made.teacher, dtype=dtype), data.prompt_format(made.a_run.preset)
    set_chat_template(made.a_run, teacher.tokenizer, teacher.tokenizer)
    teacher = with_turn_end(teacher, asked)
    gold = made.a_run.evaluation.references == "gold"
    sets = {
        name: read_records(source, split=test.split, need="references" if gold else "nothing")[
            : test.rows or None
        ]
        for name, source in test.sets.items()
    }
    rows = {
        name: tokenized(made.a_run, teacher, test.sets[name], records)
        for name, records in sets.items()
    }
    if not gold:
        rows = _answered_by_teacher(made, teacher, rows, workdir / "fixed" / "references")
        sets = {name: answered.records for name, answered in rows.items()}
    answers: dict[str, dict[str, dict[int, Any]]] = {}
    how = dict(sampling=test.sampling, batch_size=test.batch_size, load=load)
    for contender, seeds in _contenders(made, workdir):
        make_folder(contender.folder)
        _take_over(contender, seeds)
        found = answer_sets(contender, sets, seeds, tokenizer=teacher.tokenizer, **how)
        for name, by_seed in found.items():
            answers.setdefault(contender.name, {}).setdefault(name, {}).update(by_seed)
    texts = made.settings.exposure_bias
    how = dict(split=data.dev_split, format=data.format, columns=data.columns)
    dev = read_records(data.dev, **how)
    sizes = dict(
        rows=tokenized(made.a_run, teacher, data.dev, dev[: texts.rows or None]),
        samples=texts.samples,
        prompt_capacity=data.max_prompt_length,
        max_new_tokens=data.max_length - data.max_prompt_length,
        batch_size=test.batch_size,
    )
    # What the teacher writes is the same for all methods of a seed.
    write = functools.cache(functools.partial(generate_samples, teacher, **sizes))

    def curves(run: Run, seed: int) -> dict[str, list[float]]:
        student = with_turn_end(load(run.student, dtype=dtype), asked, teacher.tokenizer)
        how = dict(seed=seed, vocab_size=shared_vocabulary(teacher, student))
        for tokens in sizes["rows"].tokens:
            if fault := unknown_token(tokens, how["vocab_size"], teacher.tokenizer):
                raise DataError(f"{data.dev}: student {student.name}: {fault}")
        written = write(eos_ids=end_ids(teacher, student), **how)
        found = exposure_bias(teacher, student, teacher_texts=written, **sizes, **how)
        return {name: np.asarray(curve).tolist() for name, curve in found._asdict().items()}

    exposure: dict[str, dict[int, Any]] = {}
    for (method, seed), run in made.runs.items():
        exposure.setdefault(method, {})[seed] = load_or_compute(
            run.folder / "exposure_bias.json", functools.partial(curves, run, seed)
        )
    return {"rows": rows, "answers": answers, "exposure_bias": exposure}


def _answered_by_teacher(
    made: Plan, teacher: Model, sets: Mapping[str, Rows], folder: pathlib.Path
) -> dict[str, Rows]:
    """The test sets with the teacher's greedy responses as their references, kept in `folder`."""
    make_folder(folder)
    return {
        name: teacher_responses(
            teacher,
            rows,
            epath.Path(folder / f"{name}.jsonl"),
            sampling=Sampling(temperature=0.0, eos_ids=teacher.eos_ids),
            prompt_capacity=made.a_run.data.max_prompt_length,
            max_new_tokens=made.a_run.data.max_length - made.a_run.data.max_prompt_length,
            batch_size=made.settings.test.batch_size,
            seed=0,
            vocab_size=teacher.vocab_size,
        )
        for name, rows in sets.items()
    }


def _contenders(made: Plan, workdir: pathlib.Path) -> Iterable[tuple[Contender, Sequence[int]]]:
    """The teacher and the common student with all seeds, then every run with its own."""
    fixed = {TEACHER: (made.teacher, "teacher"), START: (made.student, "start")}
    how = made.a_run.student.dtype, made.a_run
    for name, (model, folder) in fixed.items():
        if model:
            answers = workdir / "fixed" / folder / "evaluations"
            yield Contender(name, model, *how, answers), made.settings.seeds
    for (method, seed), run in made.runs.items():
        yield Contender(method, run.student, *how, run.folder / "evaluations"), (seed,)


def _take_over(contender: Contender, seeds: Sequence[int]) -> None:
    """Keeps the answers of a comparison begun when they had one file for all sets of a seed."""
    for seed in seeds:
        before = contender.folder.parent / f"test-seed{seed}.json"
        for name, found in json.loads(read_text(before)).items() if before.exists() else ():
            file = contender.folder / name / f"seed{seed}.json"
            if not file.exists():
                make_folder(file.parent)
                write_json(file, {"rougeL_by_row": found["rougeL"], "texts": found["texts"]})


# What it says.


def summarize_comparison(made: Plan, measured: Mapping[str, Any]) -> dict[str, Any]:
    """The comparison as plain numbers: scores, differences, figures, curves, samples."""
    config = made.settings
    default = "promptkd" if "promptkd" in config.methods else config.methods[0]
    reference = config.reference or default
    # ROUGE-L of each answer, [seeds, rows], by model and test set.
    scores = {
        model: {
            name: np.array([answer["rougeL_by_row"] for answer in by_seed.values()])
            for name, by_seed in sets.items()
        }
        for model, sets in measured["answers"].items()
    }
    by_method = {
        method: [made.runs[method, seed] for seed in config.seeds] for method in config.methods
    }
    made_by = [_read_summary(run, ("device", "versions", "seconds")) for run in made.trainings]
    curves = measured["exposure_bias"]
    return {
        "title": config.title,
        "note": config.note,
        "devices": sorted({one["device"] for one in made_by}),
        "versions": sorted({one["versions"] for one in made_by}),
        "training_seconds": sum(one["seconds"] for one in made_by),
        "budget": dataclasses.asdict(config.budget)
        | {"batch_size": sorted({run.config.stages[0].batch_size for run in made.runs.values()})},
        "seeds": list(config.seeds),
        "methods": list(config.methods),
        "reference": reference,
        "test_sets": {
            name: {"rows": len(rows.tokens), "dropped": rows.dropped}
            for name, rows in measured["rows"].items()
        },
        "rougeL": {
            model: over_seeds(
                {n: dict(zip(config.seeds, x.mean(axis=1).tolist())) for n, x in sets.items()}
            )
            for model, sets in scores.items()
        },
        "differences": {
            method: differences(scores[method], scores[reference], draws=config.bootstrap.draws)
            for method in config.methods
            if method != reference
        },
        "figures": {
            method: _figures(runs) | {"ex_acc_err": _last_excess([*curves[method].values()])}
            for method, runs in by_method.items()
        },
        "kl": {method: _mean_curve(map(_kl, runs)) for method, runs in by_method.items()},
        "prompt": {
            method: _prompt_curves(runs)
            for method, runs in by_method.items()
            if all(_is_prompted(run) for run in runs)
        },
        "exposure_bias": {
            method: _exposure_curve([*by_seed.values()]) for method, by_seed in curves.items()
        },
        "samples": _samples(config, measured),
    }


def _figures(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """Mean, deviation and values over seeds of what the summaries say."""
    summaries = [_summary(run) for run in runs]
    return {key: _spread([summary[key] for summary in summaries]) for key in summaries[0]}


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return mean_and_std(values)._asdict() | {"seeds": list(values)}


def _summary(run: Run) -> dict[str, float]:
    """The figures in a run's summary."""
    columns = (*COST, *BEHAVIOUR, *(PROMPT if _is_prompted(run) else ()))
    return _read_summary(run, [*dict.fromkeys(key for _, key, _ in columns), "rougeL_after"])


def _read_summary(run: Run, wanted: Sequence[str]) -> dict[str, Any]:
    """What a run's summary says of `wanted`. Raises ComparisonError where it is missing."""
    found = run.summary()
    if missing := [key for key in wanted if key not in found]:
        raise ComparisonError(
            f"{run.folder}/summary.json: has no {', '.join(missing)}; was it written by another "
            "version? Remove the file, and the same command writes it again"
        )
    return {key: found[key] for key in wanted}


def _is_prompted(run: Run) -> bool:
    return any(stage.teacher_view == "prompted" for stage in run.config.stages)


def _kl(run: Run) -> dict[int, float]:
    """KL(teacher || student) on the dev rows by step, from before the first update on."""
    before = json.loads(read_text(run.folder / "before.json"))
    rows = list(read_metrics(run.folder))
    during = {row["step"]: row["dev/kl"] for row in rows if "dev/kl" in row}
    if not during:  # measured before and after alone
        during = {rows[-1]["step"]: _read_summary(run, ("kl_after",))["kl_after"]}
    return {0: before["kl"]} | during


def _prompt_curves(runs: Sequence[Run]) -> dict[str, dict[str, list[float]]]:
    """The means of `PROMPT_CURVES` over runs at the logged steps; without L_reg (regularization =
    0) the plain teacher is not looked at."""
    rows = [[row for row in read_metrics(run.folder) if "kl_prompted" in row] for run in runs]
    return {
        key: _mean_curve([{row["step"]: row[key] for row in one} for one in rows])
        for key in PROMPT_CURVES
        if all(key in row for one in rows for row in one)
    }


def _mean_curve(curves: Iterable[Mapping[int, float]]) -> dict[str, list[float]]:
    """The mean of several curves at the steps that all of them have."""
    curves = list(curves)
    steps = sorted(set.intersection(*map(set, curves)))
    means = [float(np.mean([curve[step] for curve in curves])) for step in steps]
    return {"steps": steps, "values": means}


def _exposure_curve(found: Sequence[Mapping[str, Any]]) -> list[float]:
    """ExAccErr, the mean over seeds, up to the last position that a tenth of all texts reach: what
    is said of the few longer ones is noise."""
    return np.mean([one["ex_acc_err"][: _reached(found)] for one in found], axis=0).tolist()


def _last_excess(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """ExAccErr at the last position of `_exposure_curve`, over the seeds."""
    return _spread([one["ex_acc_err"][_reached(found) - 1] for one in found])


def _reached(found: Sequence[Mapping[str, Any]]) -> int:
    """How many positions a tenth of all texts reach."""
    counts = [np.minimum(one["student_count"], one["teacher_count"]) for one in found]
    return min(int(np.sum(count >= count[0] / 10)) for count in counts)


def _samples(config: ComparisonConfig, measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The first requests of each test set, evenly, with everyone's answers for the first seed."""
    seed, found = config.seeds[0], []
    share = -(-config.samples // len(measured["rows"]))
    for name, rows in measured["rows"].items():
        texts = {model: sets[name][seed]["texts"] for model, sets in measured["answers"].items()}
        for row, record in enumerate(rows.records[:share]):
            found.append(
                {
                    "set": name,
                    "request": record.prompt_text,
                    "reference": record.references[0],
                    "answers": {model: answers[row] for model, answers in texts.items()},
                }
            )
    return found[: config.samples]
