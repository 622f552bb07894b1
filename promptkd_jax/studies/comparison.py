"""What a comparison is made of: its config, and every training with a config of its own."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from promptkd_jax.infra.errors import ConfigError
from promptkd_jax.infra.files import Path
from promptkd_jax.infra.specs import (
    SEED,
    Choice,
    Float,
    Group,
    Int,
    ListOf,
    Str,
    declared,
    field,
    group,
    mistakes,
)
from promptkd_jax.models.sampling_rules import Sampling
from promptkd_jax.studies.runs import Run
from promptkd_jax.training import recipes
from promptkd_jax.training.config.checks import checked, read_group
from promptkd_jax.training.config.config_file import as_dict
from promptkd_jax.training.config.fields import NOT_IN_FINGERPRINT, RENAMED, RunConfig, StageConfig


@dataclasses.dataclass(frozen=True)
class _Fits:
    """A spec in words and as a test."""

    words: str
    test: Callable[[Any], bool]

    def __str__(self) -> str:
        return self.words

    def fault(self, value: Any) -> str:
        return "" if self.test(value) else self.words


def _is_group(value: Any) -> bool:
    return isinstance(value, Mapping)


def _are_changes(value: Any) -> bool:
    return _is_group(value) and all(
        name in ("all", *recipes.METHODS)
        and _is_group(value[name])
        and set(value[name]) <= {*declared(StageConfig), *RENAMED}
        for name in value
    )


def _are_sets(value: Any) -> bool:
    return _is_group(value) and len(value) > 0 and all(isinstance(value[n], str) for n in value)


# What is a mapping here is a config of a run, or a part of one: `checks.checked` checks it.
_RUN = _Fits("None, or the config of a run", lambda value: value is None or _is_group(value))


@dataclasses.dataclass(frozen=True)
class BudgetConfig:
    """What every run may spend."""

    kind: str = field("steps", Choice("steps", "seconds"), "what is equal for all methods")
    steps: int = field(
        2, Int(low=2), "of every run; at most so many where the budget is in seconds"
    )
    seconds: float = field(0.0, Float(low=0.0), "of training, where the budget is in seconds")


@dataclasses.dataclass(frozen=True)
class PretrainingConfig:
    """Runs that make the teacher and the student that all methods share."""

    teacher: Mapping | None = field(None, _RUN, "None: run.teacher as it is")
    student: Mapping | None = field(None, _RUN, "None: run.student as it is")


@dataclasses.dataclass(frozen=True)
class TestConfig:
    """The data that every student answers in the end, which ROUGE-L compares with
    run.evaluation.references."""

    sets: Mapping = field(
        None, _Fits("a group of data sets, name: file or hub id", _are_sets), "by name"
    )
    split: str = field("", Str(), "of hub data sets")
    rows: int = field(0, Int(low=0), "of each set; 0: all")
    batch_size: int = field(8, Int(low=1), "rows that are answered at once")
    sampling: Sampling = group(Sampling, "how responses are sampled")


@dataclasses.dataclass(frozen=True)
class ExposureBiasConfig:
    """Exposure bias on data.dev."""

    rows: int = field(0, Int(low=0), "0: all")
    samples: int = field(1, Int(low=1), "responses to each row")


@dataclasses.dataclass(frozen=True)
class BootstrapConfig:
    """Confidence intervals."""

    draws: int = field(2000, Int(low=1), "resamples")


@dataclasses.dataclass(frozen=True)
class ComparisonConfig:
    """Several methods from one student within one budget."""

    title: str = field("", Str(nonempty=True), "of the report")
    note: str = field("", Str(), "what a reader should know")
    methods: tuple[str, ...] = field(
        (), ListOf(Choice(*recipes.METHODS), nonempty=True), "that are compared"
    )
    reference: str = field(
        "", Str(), "what the others are compared with; '': promptkd, or the first"
    )
    seeds: tuple[int, ...] = field((), ListOf(SEED, nonempty=True), "of every method")
    budget: BudgetConfig = group(BudgetConfig, "what every run may spend")
    pretraining: PretrainingConfig = group(PretrainingConfig, "of the teacher and of the student")
    run: Mapping = field(
        None, _Fits("a group, the config of a run without stages", _is_group), "of every run"
    )
    changes: Mapping = field(
        None,
        _Fits(f"a group of groups, all or of a method: {', '.join(recipes.METHODS)}", _are_changes),
        "of stages, for all methods or for one",
    )
    test: TestConfig = group(TestConfig, "the data that every student answers in the end")
    exposure_bias: ExposureBiasConfig = group(ExposureBiasConfig, "on data.dev")
    bootstrap: BootstrapConfig = group(BootstrapConfig, "confidence intervals")
    samples: int = field(6, Int(low=0), "responses that the report shows")


class Plan(NamedTuple):
    """A comparison's settings and all its trainings: `pretraining` in its order, and one run for
    each (method, seed)."""

    settings: ComparisonConfig
    pretraining: dict[str, Run]
    runs: dict[tuple[str, int], Run]
    teacher: str
    student: str

    @property
    def trainings(self) -> list[Run]:
        """All of them, in their order."""
        return [*self.pretraining.values(), *self.runs.values()]

    @property
    def a_run(self) -> RunConfig:
        """The config of one of the runs: their data and models are the same."""
        return next(iter(self.runs.values())).config


def plan_comparison(config: ConfigDict, workdir: pathlib.Path) -> Plan:
    """Reads and checks a comparison, and every training with its whole config.

    Raises:
      ConfigError: all mistakes, each with the training that it is in.
    """
    settings = read_group(config, ComparisonConfig)
    _check_bases(settings)
    base = _copied(config.run)
    pretraining, faults = {}, []

    def add(name: str, config: ConfigDict, folder: pathlib.Path) -> Run | None:
        try:
            return Run(name, checked(config), folder)
        except ConfigError as error:
            faults.extend(f"{name}: {line}" for line in str(error).splitlines())
            return None

    for name in ("teacher", "student"):
        if getattr(settings.pretraining, name) is None:
            continue
        own, folder = _copied(config.pretraining[name]), workdir / "pretraining" / name
        own.teacher.path = own.teacher.path or base.teacher.path
        same = (own.teacher, own.data) == (base.teacher, base.data)
        if same and not own.teacher_responses.sampling.temperature:
            own.teacher_responses.path = _responses_folder(own, workdir)
        pretraining[name] = add(f"pretraining of the {name}", own, folder)
        base[name].path = str(folder / "student")
    if "student" in pretraining:
        base.student.layers = 0
    configs = {
        (method, seed): _run_config(settings, base, method, seed, workdir)
        for method in settings.methods
        for seed in settings.seeds
    }
    runs = {
        (method, seed): add(
            f"{method}, seed {seed}", config, workdir / "runs" / f"{method}-seed{seed}"
        )
        for (method, seed), config in configs.items()
    }
    made = Plan(settings, pretraining, runs, base.teacher.path, base.student.path)
    rows = {config.stages[0].batch_size for config in configs.values()}
    if wrong := [*_contradictions(made, rows), *faults]:
        raise ConfigError("\n".join(wrong))
    return made


def _check_bases(settings: ComparisonConfig) -> None:
    """Raises ConfigError where what runs are made of lacks a field, or has one that is none."""
    bases = {"run": settings.run}
    for name in ("teacher", "student"):
        bases[f"pretraining.{name}"] = getattr(settings.pretraining, name)
    wrong = [
        mistake.message
        for name, base in bases.items()
        if base is not None
        for mistake in mistakes(f"config.{name}", as_dict(base), Group(RunConfig), RENAMED)
        # Values are checked with the whole configs of the trainings, to which these are parts.
        if mistake.kind != "value"
    ]
    if wrong:
        raise ConfigError("\n".join(wrong))


def _copied(config: ConfigDict) -> ConfigDict:
    return config.copy_and_resolve_references().unlock()


def _run_config(
    settings: ComparisonConfig, base: ConfigDict, method: str, seed: int, workdir: pathlib.Path
) -> ConfigDict:
    """The base with one stage, that of the method, within the budget."""
    budget = settings.budget
    changes = {**settings.changes.get("all", {}), **settings.changes.get(method, {})}
    run = _copied(base)
    run.title = f"{settings.title}: {method}, seed {seed}"
    run.seed = seed
    run.evaluation.update(teacher=True, prompt_effect=True)
    run.stages = (recipes.method_stage(method, **changes | dict(steps=budget.steps, epochs=0.0)),)
    run.stop_after_seconds = budget.seconds if budget.kind == "seconds" else 0.0
    run.teacher_responses.path = _responses_folder(run, workdir)
    return run.lock()


def _responses_folder(config: ConfigDict, workdir: pathlib.Path) -> str:
    """Where the teacher's responses to the training data are kept; greedy ones are the same for
    all seeds."""
    sampled = config.teacher_responses.sampling.temperature
    return str(workdir / "answers" / (f"seed{config.seed}" if sampled else "greedy"))


def _contradictions(made: Plan, rows: set[int]) -> Iterator[str]:
    """Tells what means nothing together; `rows` are the batch sizes of all runs."""
    settings, budget = made.settings, made.settings.budget
    if not made.teacher:
        yield "config.run.teacher.path: is empty; a comparison needs a teacher"
    if not made.student and not settings.run["student"]["layers"]:
        yield "config.run.student: give a path or layers, or a pretraining.student"
    if settings.reference not in ("", *settings.methods):
        known = ", ".join(settings.methods)
        yield f"config.reference: {settings.reference!r} is not one of {known}"
    if budget.kind == "seconds" and not budget.seconds:
        yield "config.budget.seconds: 0 seconds to train in; give the seconds of each run"
    if budget.kind == "steps" and len(rows) > 1 and all(type(x) is int for x in rows):
        yield (
            f"config.changes: batch sizes {sorted(rows)}: equal steps are an equal budget only "
            "with equal batches"
        )
    for name, source in settings.test.sets.items():
        if fault := Path(nonempty=True).fault(source):
            yield f"config.test.sets.{name}: {source!r} is not {fault}"
    for name, values in (("methods", settings.methods), ("seeds", settings.seeds)):
        if len(set(values)) < len(values):
            yield f"config.{name}: {values} names one of them twice"


# What may change from one start to the next: further methods and seeds, and how it is shown.
COMPARISON_NOT_IN_FINGERPRINT = (
    *("title", "note", "methods", "changes", "reference", "seeds", "bootstrap", "samples"),
    *(
        f"{group}.{name}"
        for group in ("run", "pretraining.teacher", "pretraining.student")
        for name in NOT_IN_FINGERPRINT
    ),
)
