"""What a comparison is made of: its config, and every training with a config of its own."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from promptkd_jax.training import fields, recipes
from promptkd_jax.training.config import ConfigError
from promptkd_jax.training.specs import Choice, Float, Int, ListOf, Path, Str, check


class Run(NamedTuple):
    """One training: what it is called, its config, and where it lies."""

    name: str
    config: ConfigDict
    folder: pathlib.Path

    @property
    def student(self) -> str:
        """The model that comes out."""
        return str(self.folder / "student")


class Plan(NamedTuple):
    """All trainings: `pretraining` in its order, and one run for each (method, seed)."""

    pretraining: dict[str, Run]
    runs: dict[tuple[str, int], Run]
    teacher: str
    student: str


def plan_comparison(config: ConfigDict, workdir: pathlib.Path) -> Plan:
    """Every training with its whole config, checked.

    Raises:
      ConfigError: all mistakes, each with the training that it is in.
    """
    check(config, SCHEMA)
    base = config.run.copy_and_resolve_references().unlock()
    pretraining = {}
    for name in ("teacher", "student"):
        if config.pretraining[name] is None:
            continue
        own = config.pretraining[name].copy_and_resolve_references().unlock()
        own.teacher.path = own.teacher.path or base.teacher.path
        run = Run(f"pretraining of the {name}", own, workdir / "pretraining" / name)
        pretraining[name] = run
        base[name].path = run.student
    if "student" in pretraining:
        base.student.layers = 0
    runs = {
        (method, seed): Run(
            f"{method}, seed {seed}",
            _run_config(config, base, method, seed, workdir),
            workdir / "runs" / f"{method}-seed{seed}",
        )
        for method in config.methods
        for seed in config.seeds
    }
    made = Plan(pretraining, runs, base.teacher.path, base.student.path)
    _check(config, made)
    return made


def _run_config(
    config: ConfigDict, base: ConfigDict, method: str, seed: int, workdir: pathlib.Path
) -> ConfigDict:
    """The base with one stage, that of the method, within the budget."""
    changes = dict(config.changes.get("all", {})) | dict(config.changes.get(method, {}))
    run = base.copy_and_resolve_references().unlock()
    run.title = f"{config.title}: {method}, seed {seed}"
    run.seed = seed
    run.evaluation.update(teacher=True, prompt_effect=True)
    run.stages = (
        recipes.method_stage(method, **changes | dict(steps=config.budget.steps, epochs=0.0)),
    )
    run.stop_after_seconds = config.budget.seconds if config.budget.kind == "seconds" else 0.0
    run.answers.path = str(workdir / "answers" / f"seed{seed}")
    return run.lock()


def _check(config: ConfigDict, made: Plan) -> None:
    """Raises ConfigError with all mistakes of all trainings."""
    mistakes = list(_contradictions(config, made))
    for run in (*made.pretraining.values(), *made.runs.values()):
        try:
            fields.check_recipe(run.config)
        except ConfigError as error:
            mistakes += [f"{run.name}: {line}" for line in str(error).splitlines()]
    if mistakes:
        raise ConfigError("\n".join(mistakes))


def _contradictions(config: ConfigDict, made: Plan):
    if not made.teacher:
        yield "config.run.teacher.path: is empty; a comparison needs a teacher"
    if not made.student and not config.run.student.layers:
        yield "config.run.student: give a path or layers, or a pretraining.student"
    if config.reference not in ("", *config.methods):
        yield f"config.reference: {config.reference!r} is not one of {', '.join(config.methods)}"
    if config.budget.kind == "seconds" and not config.budget.seconds:
        yield "config.budget.seconds: 0 seconds to train in; give the seconds of each run"
    rows = {run.config.stages[0].batch_size for run in made.runs.values()}
    if config.budget.kind == "steps" and len(rows) > 1:
        yield (
            f"config.changes: batch sizes {sorted(rows)}: equal steps are an equal budget only "
            "with equal batches"
        )
    for name, source in config.test.sets.items():
        if fault := Path(nonempty=True).fault(source):
            yield f"config.test.sets.{name}: {source!r} is not {fault}"
    for group in ("methods", "seeds"):
        if len(set(config[group])) < len(config[group]):
            yield f"config.{group}: {config[group]} names one of them twice"


@dataclasses.dataclass(frozen=True)
class _Fits:
    """What a field is to be, in words and as a test."""

    words: str
    test: Callable[[Any], bool]

    def __str__(self) -> str:
        return self.words

    def fault(self, value: Any) -> str:
        return "" if self.test(value) else self.words


def _is_group(value: Any) -> bool:
    return isinstance(value, ConfigDict)


def _is_run_or_none(value: Any) -> bool:
    return value is None or _is_group(value)


def _are_changes(value: Any) -> bool:
    return _is_group(value) and all(
        name in ("all", *recipes.METHODS) and _is_group(value[name]) for name in value
    )


def _are_sets(value: Any) -> bool:
    return _is_group(value) and len(value) > 0 and all(isinstance(value[n], str) for n in value)


# What is a group here is a config of a run, or a part of one: `fields.check_recipe` checks it.
_RUN = _Fits("None, or the config of a run", _is_run_or_none)
SCHEMA = {
    "title": Str(nonempty=True),
    "note": Str(),
    "methods": ListOf(Choice(*recipes.METHODS), nonempty=True),
    "reference": Str(),  # what the others are compared with; "": promptkd, or the first
    "seeds": ListOf(fields.SEED, nonempty=True),
    "budget": {
        "kind": Choice("steps", "seconds"),
        "steps": Int(low=2),  # of every run; at most so many where the budget is in seconds
        "seconds": Float(low=0.0),
    },
    "pretraining": {"teacher": _RUN, "student": _RUN},
    "run": _Fits("a group, the config of a run without stages", _is_group),
    "changes": _Fits(
        f"a group of groups, all or of a method: {', '.join(recipes.METHODS)}", _are_changes
    ),
    "test": {
        "sets": _Fits("a group of data sets, name: file or hub id", _are_sets),
        "split": Str(),
        "rows": Int(low=0),  # 0: all
        "batch_size": Int(low=1),
        "sampling": fields.SAMPLING,
    },
    "exposure_bias": {"rows": Int(low=0), "samples": Int(low=1)},
    "bootstrap": {"draws": Int(low=1)},
    "samples": Int(low=0),
}
# What may change from one start to the next: further methods and seeds, and how it is shown.
COMPARISON_NOT_IN_FINGERPRINT = (
    *("title", "note", "methods", "changes", "reference", "seeds", "bootstrap", "samples"),
    *(
        f"{group}.{name}"
        for group in ("run", "pretraining.teacher", "pretraining.student")
        for name in fields.NOT_IN_FINGERPRINT
    ),
)
