"""The paper's pipeline, and its table beside the published one.

The teacher is fine-tuned (`method=teacher` of the config file), the student for 3 epochs
(`method=init`), then distilled by each of the methods (`method=NAME`), and teacher and students
answer the five test sets with every seed. Each step keeps what it has done in a folder of its own
in the workdir, so that the same command continues one that was stopped, and one with further
methods, sets or seeds adds to it.
"""

import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import jax
from etils import epath
from ml_collections import ConfigDict

from promptkd_jax.data.reading.record_stream import read_records
from promptkd_jax.data.reading.records import Record
from promptkd_jax.evaluation.tables import Table, markdown, mean_and_deviation
from promptkd_jax.infra import sharding
from promptkd_jax.infra.errors import DataError
from promptkd_jax.infra.files import is_remote, to_path, write_json, write_text
from promptkd_jax.infra.specs import declared
from promptkd_jax.models.load import load_with_tokenizer
from promptkd_jax.models.sampling_rules import Sampling
from promptkd_jax.studies import published
from promptkd_jax.studies.answers import AVERAGE, Contender, answer_sets, over_seeds
from promptkd_jax.studies.runs import Run, train_all
from promptkd_jax.training import recipes, run
from promptkd_jax.training.config.checks import checked
from promptkd_jax.training.config.config_file import ConfigError, load_config, split_argument
from promptkd_jax.training.config.fields import RunConfig

PROTOCOL = Sampling(temperature=1.0, top_k=0, top_p=1.0, no_repeat_ngram_size=6)
SEEDS = (10, 20, 30, 40, 50)

# ROUGE-L by test set and seed.
Scores = dict[str, dict[int, float]]


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

    def train(one: Run) -> None:
        run.run(one.config, one.folder, choose_remat)

    train_all([*runs.values()], train)
    scores = {model.name: evaluate_model(model, records, seeds) for model in models}
    rows = table_rows(scores, theirs)
    found = {
        "config": source,
        "overrides": list(overrides),
        "from_published": from_published,
        "published": published.SOURCE,
        "sampling": {name: getattr(PROTOCOL, name) for name in declared(Sampling)},
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
        found[name] = read_records(file, need="references")
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
    """By method and set (or "average"), for "FAMILY.py:student=SIZE"; says so where there are none.

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
) -> dict[str, Run]:
    """The runs by name, in their order: each starts from models that those before it leave.

    Raises:
      ConfigError: a config that cannot be run, or an override of what the pipeline decides.
    """
    configs = _configs(source, methods, overrides, from_published)
    if not from_published:
        _connect(configs, workdir)
    checked_configs = _checked(source, configs)
    return {name: Run(name, config, workdir / name) for name, config in checked_configs.items()}


def named_models(
    source: str, methods: Sequence[str], overrides: Sequence[str], *, from_published: bool
) -> dict[str, RunConfig]:
    """The configs of the same runs with the models that the config file names, none of which is
    made by a run before: of the same shapes, for who plans. Raises as `plan_reproduction`."""
    return _checked(source, _configs(source, methods, overrides, from_published))


def _configs(
    source: str, methods: Sequence[str], overrides: Sequence[str], from_published: bool
) -> dict[str, ConfigDict]:
    init = ["init"] if set(methods) & set(recipes.FROM_SFT) else []
    names = methods if from_published else ["teacher", *init, *methods]
    configs = {name: _config(source, name, overrides) for name in names}
    if not from_published:
        _refuse_paths(overrides)
    return configs


def _checked(source: str, configs: Mapping[str, ConfigDict]) -> dict[str, RunConfig]:
    found = {}
    for name, config in configs.items():
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


def _connect(configs: Mapping[str, ConfigDict], workdir: epath.Path) -> None:
    """Sets teacher and student of each run to what the runs before it export."""
    for name, config in configs.items():
        if name != "teacher" and config.teacher.path:
            config.teacher.path = str(workdir / "teacher" / "student")
        if name in recipes.FROM_SFT:
            config.student.update(path=str(workdir / "init" / "student"), layers=0)


def contenders(runs: Mapping[str, Run], workdir: epath.Path) -> list[Contender]:
    """What is evaluated: the teacher, of this pipeline or of the config, and every student.

    Raises:
      ConfigError: nothing is fine-tuned, and no config names a teacher.
    """
    found = [
        Contender(
            name, one.student, one.config.student.dtype, one.config, one.folder / "evaluations"
        )
        for name, one in runs.items()
        if name != "init"
    ]
    if "teacher" in runs:
        return found
    for config in (one.config for one in runs.values()):
        if config.teacher.path:
            named = config.teacher.path, config.teacher.dtype
            return [
                Contender("teacher", *named, config, workdir / "teacher" / "evaluations"),
                *found,
            ]
    raise ConfigError("config.teacher.path: is empty, so --from-published has no teacher")


def evaluate_model(
    model: Contender, sets: Mapping[str, Sequence[Record]], seeds: Sequence[int]
) -> Scores:
    """ROUGE-L of every set and seed (see `answer_sets`)."""
    with jax.set_mesh(sharding.make_mesh(model.config.mesh.sizes)):
        answers = answer_sets(
            model,
            sets,
            seeds,
            sampling=PROTOCOL,
            batch_size=model.config.evaluation.batch_size,
            load=load_with_tokenizer,
        )
    return {
        name: {seed: answer["rougeL"] for seed, answer in by_seed.items()}
        for name, by_seed in answers.items()
    }


def table_rows(
    scores: Mapping[str, Scores], theirs: Mapping[str, Mapping[str, float]]
) -> list[Row]:
    """Ours beside the published: for each method a row per test set, and their average.

    The average, ours and the published one, is over the sets that were evaluated (all five where
    none was); its deviation is that of the seeds' averages. Of some methods nothing is published
    but the average over all five.
    """
    rows = []
    for method, ours in scores.items():
        numbers = theirs.get(method, {})
        spreads = over_seeds(ours)
        for name in published.SETS:
            rows.append(_row(method, name, spreads.get(name), numbers.get(name)))
        taken = [name for name in published.SETS if name in ours] or published.SETS
        title = AVERAGE if len(taken) == len(published.SETS) else f"{AVERAGE} of {len(taken)}"
        number = numbers.get(AVERAGE) if len(taken) == len(published.SETS) else None
        if numbers.keys() >= set(taken):
            number = fmean(numbers[name] for name in taken)
        rows.append(_row(method, title, spreads.get(AVERAGE), number))
    return rows


def _row(method: str, test_set: str, ours: Mapping | None, number: float | None) -> Row:
    if ours is None:
        return Row(method, test_set, None, None, number, None)
    difference = None if number is None else ours["mean"] - number
    return Row(method, test_set, ours["mean"], ours["std"], number, difference)


def table(rows: Sequence[Row], seeds: int) -> Table:
    """The rows as text; the paper gives one decimal, two would pretend to more."""
    cells = []
    for row in rows:
        ours = None if row.mean is None else mean_and_deviation(row._asdict(), seeds)
        digits = 1 if row.test_set in published.SETS else 2
        number = None if row.published is None else f"{row.published:.{digits}f}"
        difference = None if row.difference is None else f"{row.difference:+.2f}"
        figures = (text or "n/a" for text in (ours, number, difference))
        cells.append((row.method, row.test_set, *figures))
    header = ("method", "test set", "ours", "published", "difference")
    return Table(header, cells, names=2)


def reproduction_markdown(found: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """The table as a page, with what it is a table of."""
    seeds = found["seeds"]
    if len(seeds) > 1:
        what = f"mean ± standard deviation over the seeds {', '.join(map(str, seeds))}"
    else:
        what = f"of the seed {seeds[0]}"
    parts = [
        f"# Reproduction: {found['config']}",
        f"ROUGE-L, {what}.\nPublished: {found['published']}.",
    ]
    if found["overrides"]:
        parts.append("Changed from the config: `" + " ".join(found["overrides"]) + "`.")
    if found["from_published"]:
        parts.append("Teacher and initial student are those of the config, not fine-tuned here.")
    if found["missing_sets"]:
        parts.append(f"Not evaluated (n/a): {', '.join(found['missing_sets'])}.")
    return "\n\n".join([*parts, markdown(table(rows, len(seeds)))]) + "\n"
