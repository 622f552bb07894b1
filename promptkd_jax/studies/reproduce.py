"""The paper's pipeline, and its table beside the published one.

The teacher is fine-tuned (`method=teacher` of the config file), the student for 3 epochs
(`method=init`), then distilled by each of the methods (`method=NAME`), and teacher and students
answer the five test sets with every seed. Each step keeps what it has done in a folder of its own
in the workdir, so that the same command continues one that was stopped, and one with further
methods, sets or seeds adds to it.
"""

import functools
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import jax
from etils import epath
from ml_collections import ConfigDict
from rich.table import Table

from promptkd_jax.data.records import Record, read_records
from promptkd_jax.data.rows import tokenize
from promptkd_jax.evaluation.bootstrap import mean_and_std
from promptkd_jax.evaluation.student_metrics import generation_metrics
from promptkd_jax.infra import sharding
from promptkd_jax.infra.errors import DataError
from promptkd_jax.infra.files import is_remote, load_or_compute, to_path, write_json, write_text
from promptkd_jax.models.load import load_with_tokenizer
from promptkd_jax.models.model import Model
from promptkd_jax.models.sampler import Sampling
from promptkd_jax.studies import published
from promptkd_jax.training import build, recipes, run
from promptkd_jax.training.checks import checked
from promptkd_jax.training.config import (
    ConfigError,
    claim,
    fingerprint,
    load_config,
    split_argument,
)
from promptkd_jax.training.fields import RunConfig

PROTOCOL = dict(temperature=1.0, top_k=0, top_p=1.0, no_repeat_ngram_size=6)
SEEDS = (10, 20, 30, 40, 50)

# ROUGE-L by test set and seed.
Scores = dict[str, dict[int, float]]


class ReproducedModel(NamedTuple):
    """A model to evaluate: where it lies, and the config whose `data` says how it is asked."""

    path: str
    dtype: str
    config: RunConfig


class Row(NamedTuple):
    """A line of the table: ROUGE-L of one model on one set, None where there is no number."""

    method: str
    test_set: str
    mean: float | None  # of ours, over the seeds
    std: float | None
    published: float | None
    difference: float | None  # ours minus published


def reproduce(
    source: str,
    workdir: epath.Path,
    *,
    methods: Sequence[str],
    seeds: Sequence[int] = SEEDS,
    sets: Sequence[str] = (),
    overrides: Sequence[str] = (),
    from_published: bool = False,
    choose_remat: Callable[[RunConfig, jax.sharding.Mesh], RunConfig] | None = None,
) -> list[Row]:
    """Trains and evaluates what `workdir` does not hold yet, and writes the table into it.

    Args:
      source: the config file with its argument, without a method.
      sets: "NAME=FILE", NAME of `published.SETS`.
      overrides: "--config.a.b=VALUE", for every run.
      from_published: start from the models that the config names, fine-tune none.
      choose_remat: as `training.run.run` takes it.

    Returns:
      The table, as `table_rows` makes it.

    Raises:
      ConfigError, DataError: before anything is trained, where an argument is wrong.
      ConfigError: the folder holds runs or evaluations of other settings.
      ModelError, CheckpointError, TrainingError: see `training.run.run`.
    """
    records, theirs = read_sets(sets), published_numbers(source)
    workdir = workdir if is_remote(workdir) else workdir.resolve()
    runs = plan_reproduction(source, workdir, methods, overrides, from_published=from_published)
    models = contenders(runs, workdir)
    for name, config in runs.items():
        print(f"{name}: {build.title(config)}")
        run.run(config, workdir / name, choose_remat)
    scores = {}
    for name, model in models.items():
        with jax.set_mesh(sharding.make_mesh(model.config.mesh.sizes)):
            scores[name] = evaluate_model(model, records, seeds, workdir / name / "evaluations")
    rows = table_rows(scores, theirs)
    found = {
        "config": source,
        "overrides": list(overrides),
        "from_published": from_published,
        "published": published.SOURCE,
        "sampling": PROTOCOL,
        "seeds": seeds,
        "missing_sets": missing_sets(records),
        "scores": scores,
        "table": [row._asdict() for row in rows],
    }
    write_json(workdir / "reproduction.json", found)
    write_text(workdir / "reproduction.md", reproduction_markdown(found, rows))
    return rows


def read_sets(arguments: Sequence[str]) -> dict[str, list[Record]]:
    """The records of every "NAME=FILE" by name, in the paper's order; says which are not given.

    Raises:
      DataError: an unknown name, a name given twice, no such file, a file that cannot be used.
    """
    found = {}
    for argument in arguments:
        name, _, file = argument.partition("=")
        if name not in published.SETS or not file:
            names = ", ".join(published.SETS)
            raise DataError(f"--sets: {argument!r} is not NAME=FILE with NAME one of {names}")
        if name in found:
            raise DataError(f"--sets: {name} is given twice")
        if not is_remote(file) and not to_path(file).is_file():
            raise DataError(f"--sets {argument}: no such file (looked from {pathlib.Path.cwd()})")
        found[name] = read_records(file, need_output=True)
    if missing := missing_sets(found):
        print(
            f"without the test sets {', '.join(missing)} (n/a in the table); give them by "
            "--sets NAME=FILE, now or when all is trained"
        )
    return {name: found[name] for name in published.SETS if name in found}


def missing_sets(given: Mapping[str, Any]) -> list[str]:
    """The paper's test sets that are not among the given."""
    return [name for name in published.SETS if name not in given]


def published_numbers(source: str) -> dict[str, dict[str, float]]:
    """By method and set, for "FAMILY.py:student=SIZE"; says so where none are published.

    Without a size it is the first, as in `recipes.paper_config`.
    """
    file, argument = split_argument(source)
    sizes = published.ROUGE_L.get(pathlib.Path(file).stem, {})
    arguments = dict(part.partition("=")[::2] for part in argument.split(","))
    student = arguments.get("student", next(iter(sizes), ""))
    if student not in sizes:
        known = [f"{f}.py:student={s}" for f, sizes in published.ROUGE_L.items() for s in sizes]
        print(f"no published numbers for {source}: there are those of {', '.join(known)}")
    return sizes.get(student, {})


def plan_reproduction(
    source: str,
    workdir: epath.Path,
    methods: Sequence[str],
    overrides: Sequence[str],
    *,
    from_published: bool,
) -> dict[str, RunConfig]:
    """The runs by name, in their order: each starts from models that those before it leave.

    Raises:
      ConfigError: a config that cannot be run, or an override of what the pipeline decides.
    """
    runs = {} if from_published else {"teacher": _config(source, "teacher", overrides)}
    if not from_published and set(methods) & set(recipes.FROM_SFT):
        runs["init"] = _config(source, "init", overrides)
    runs |= {method: _config(source, method, overrides) for method in methods}
    if not from_published:
        _refuse_paths(overrides)
        _connect(runs, workdir)
    found = {}
    for name, config in runs.items():
        try:
            found[name] = checked(config)
        except ConfigError as error:
            raise ConfigError(f"{source} with method={name}: {error}") from error
    return found


def _config(source: str, method: str, overrides: Sequence[str]) -> ConfigDict:
    """What the config file says for one method."""
    file, argument = split_argument(source)
    if re.search(r"\bmethod=", argument):
        raise ConfigError(f"config: {source}: name the methods after --methods")
    argument = ",".join(filter(None, (argument, f"method={method}")))
    config, unknown = load_config([f"--config={file}:{argument}", *overrides])
    if unknown:
        raise ConfigError(f"unknown arguments: {' '.join(unknown)}")
    return config


def _refuse_paths(overrides: Sequence[str]) -> None:
    for override in overrides:
        if found := re.match(r"--?(config\.(teacher|student)\.path)=", override):
            raise ConfigError(
                f"{found[1]}: differs between the steps of the pipeline, so that an override for "
                "all of them is wrong; change the config file, or add --from-published to "
                "fine-tune neither"
            )


def _connect(runs: dict[str, ConfigDict], workdir: epath.Path) -> None:
    """Sets teacher and student of each run to what the runs before it export."""
    for name, config in runs.items():
        if name != "teacher" and config.teacher.path:
            config.teacher.path = _export(workdir, "teacher")
        if name in recipes.FROM_SFT:
            config.student.update(path=_export(workdir, "init"), layers=0)


def _export(workdir: epath.Path, run: str) -> str:
    return str(workdir / run / "student")


def contenders(runs: Mapping[str, RunConfig], workdir: epath.Path) -> dict[str, ReproducedModel]:
    """What is evaluated: the teacher, of this pipeline or of the config, and every student.

    Raises:
      ConfigError: nothing is fine-tuned, and no config names a teacher.
    """
    found = {}
    if "teacher" not in runs:
        named = [config for config in runs.values() if config.teacher.path]
        if not named:
            raise ConfigError("config.teacher.path: is empty, so --from-published has no teacher")
        teacher = named[0].teacher
        found["teacher"] = ReproducedModel(teacher.path, teacher.dtype, named[0])
    for name, config in runs.items():
        if name != "init":
            found[name] = ReproducedModel(_export(workdir, name), config.student.dtype, config)
    return found


def evaluate_model(
    contender: ReproducedModel,
    sets: Mapping[str, Sequence[Record]],
    seeds: Sequence[int],
    folder: epath.Path,
) -> Scores:
    """ROUGE-L of every set and seed, kept with the answers in `folder`, one file for each.

    Raises:
      ConfigError: what is there was made with other settings.
    """
    load = functools.cache(
        functools.partial(load_with_tokenizer, contender.path, dtype=contender.dtype)
    )
    found: Scores = {}
    for name, records in sets.items():
        claim(folder / name, _settings(contender, records))
        answer = functools.partial(_answer, load, contender.config, records)
        kept = {
            seed: load_or_compute(
                folder / name / f"seed{seed}.json", functools.partial(answer, seed)
            )
            for seed in seeds
        }
        found[name] = {seed: one["rougeL"] for seed, one in kept.items()}
    return found


def _settings(contender: ReproducedModel, records: Sequence[Record]) -> dict[str, Any]:
    """What, with the seed, decides the answers."""
    data = contender.config.data
    return dict(
        model=contender.path,
        dtype=contender.dtype,
        records=fingerprint({"records": records}),
        template=data.template,
        max_prompt_length=data.max_prompt_length,
        max_length=data.max_length,
        sampling=PROTOCOL,
    )


def _answer(
    load: Callable[[], Model], config: RunConfig, records: Sequence[Record], seed: int
) -> dict[str, Any]:
    """Scores of one set with one seed, the answers ("texts"), and how many rows there are."""
    model, data = load(), config.data
    rows = tokenize(
        records,
        model.tokenizer,
        template=data.template,
        max_prompt_length=data.max_prompt_length,
        max_length=data.max_length,
        eos_id=model.eos_ids[0],
    )
    scores, texts = generation_metrics(
        model,
        rows,
        sampling=Sampling(**PROTOCOL, eos_ids=model.eos_ids),
        prompt_capacity=data.max_prompt_length,
        max_new_tokens=data.max_length - data.max_prompt_length,
        batch_size=config.evaluation.batch_size,
        seed=seed,
        vocab_size=model.vocab_size,
    )
    print(f"{model.name}, seed {seed}: ROUGE-L {scores['rougeL']:.2f} on {len(texts)} rows")
    return scores | {"rows": len(texts), "dropped": rows.dropped, "texts": texts}


def table_rows(
    scores: Mapping[str, Scores], theirs: Mapping[str, Mapping[str, float]]
) -> list[Row]:
    """Ours beside the published: for each method a row per test set, and their average.

    The average, ours and the published one, is over the sets that were evaluated (all five where
    none was); its deviation is that of the seeds' averages.
    """
    rows = []
    for method, ours in scores.items():
        numbers = theirs.get(method, {})
        for name in published.SETS:
            values = list(ours.get(name, {}).values())
            rows.append(_row(method, name, values, numbers.get(name)))
        taken = [name for name in published.SETS if name in ours] or published.SETS
        title = "average" if len(taken) == len(published.SETS) else f"average of {len(taken)}"
        values = [fmean(one) for one in zip(*(o.values() for o in ours.values()))]
        number = fmean(numbers[name] for name in taken) if numbers else None
        rows.append(_row(method, title, values, number))
    return rows


def _row(method: str, test_set: str, values: Sequence[float], number: float | None) -> Row:
    """A row with the mean over seeds and their sample standard deviation (0 for one seed)."""
    if not values:
        return Row(method, test_set, None, None, number, None)
    mean, std = mean_and_std(values)
    difference = mean - number if number is not None else None
    return Row(method, test_set, mean, std, number, difference)


HEADER = ("method", "test set", "ours", "published", "difference")


def table(rows: Sequence[Row]) -> Table:
    """For the terminal."""
    found = Table(*HEADER)
    for row in rows:
        found.add_row(*_cells(row), end_section=row.test_set not in published.SETS)
    return found


def reproduction_markdown(found: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """The table as a page, with what it is a table of."""
    seeds = ", ".join(map(str, found["seeds"]))
    lines = [
        f"# Reproduction: {found['config']}",
        "",
        f"ROUGE-L, mean ± standard deviation over the seeds {seeds}.",
        f"Published: {found['published']}.",
    ]
    if found["overrides"]:
        lines += ["", "Changed from the config: `" + " ".join(found["overrides"]) + "`."]
    if found["from_published"]:
        lines += ["", "Teacher and initial student are those of the config, not fine-tuned here."]
    if found["missing_sets"]:
        lines += ["", f"Not evaluated (n/a): {', '.join(found['missing_sets'])}."]
    lines += [
        "",
        _line(HEADER),
        _line(["---"] * len(HEADER)),
        *(_line(_cells(row)) for row in rows),
    ]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(row: Row) -> tuple[str, ...]:
    """As printed; the paper gives one decimal, two would pretend to more."""
    ours = None if row.mean is None else f"{row.mean:.2f} ± {row.std:.2f}"
    digits = 1 if row.test_set in published.SETS else 2
    number = None if row.published is None else f"{row.published:.{digits}f}"
    difference = None if row.difference is None else f"{row.difference:+.2f}"
    return row.method, row.test_set, *(cell or "n/a" for cell in (ours, number, difference))
