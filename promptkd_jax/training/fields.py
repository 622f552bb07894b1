"""What the config of a run may be: every field, and the facts that need two fields to see."""

import dataclasses
import datetime
from typing import Any

from ml_collections import ConfigDict

from promptkd_jax.distill import losses, optimizer
from promptkd_jax.distill.hidden_loss import KINDS
from promptkd_jax.distill.method import (
    CROSS_ENTROPY,
    MINIMUMS,
    POLICY_GRADIENT,
    PRESETS,
    REGULARISATIONS,
    TARGETS,
    VIEWS,
    contradictions,
    needs_teacher,
    reads_answers,
)
from promptkd_jax.distill.policy_gradient import WHITEN
from promptkd_jax.distill.soft_prompt import INITS
from promptkd_jax.models.decoder import REMAT
from promptkd_jax.training.build import make_hidden_term
from promptkd_jax.training.config import ConfigError
from promptkd_jax.training.specs import Bool, Choice, Float, Int, ListOf, Optional, Path, Str, check

SELECTION_METRICS = ("rougeL", "loss")  # dev scores that can choose the best checkpoint


class _Divergence:
    """A name from `losses.DIVERGENCES`, with numbers where it takes them."""

    def __str__(self) -> str:
        return "a divergence such as 'reverse_kl' or 'alpha_beta(0.2, 0.7)'"

    def fault(self, value: Any) -> str:
        if not isinstance(value, str):
            return str(self)
        try:
            losses.divergence(value)
        except ValueError as error:
            return f"{self} ({error})"
        return ""


@dataclasses.dataclass(frozen=True)
class _Term:
    """A pair (name, weight): the name of a divergence, or one of `others`."""

    others: tuple[str, ...] = (CROSS_ENTROPY,)

    def __str__(self) -> str:
        return "a pair (divergence, weight) such as ('reverse_kl', 1.0)"

    def fault(self, value: Any) -> str:
        if not isinstance(value, list | tuple) or len(value) != 2:
            return str(self)
        name, weight = value
        known = name in self.others
        return Float(low=0.0).fault(weight) or (not known and _Divergence().fault(name)) or ""


class _Layers:
    """Pairs of layers that a hidden loss compares."""

    def __str__(self) -> str:
        return "'uniform', or pairs (student layer, teacher layer) such as ((-1, -1),)"

    def fault(self, value: Any) -> str:
        pairs = isinstance(value, list | tuple) and all(
            isinstance(pair, list | tuple) and len(pair) == 2 and all(type(x) is int for x in pair)
            for pair in value
        )
        return "" if value == "uniform" or (pairs and value) else str(self)


class _TeacherLayers:
    """Which layers of the teacher a student starts from."""

    def __str__(self) -> str:
        return "a number of layers, or a tuple of different layers such as (0, 2, 4)"

    def fault(self, value: Any) -> str:
        if isinstance(value, list | tuple):
            good = all(type(x) is int and x >= 0 for x in value) and len(set(value)) == len(value)
            return "" if good and value else str(self)
        return "" if type(value) is int and value >= 0 else str(self)


class _Date:
    """A day as ISO 8601 writes it, or none."""

    def __str__(self) -> str:
        return "a date such as '2026-11-27', or ''"

    def fault(self, value: Any) -> str:
        try:
            return "" if value == "" or datetime.date.fromisoformat(value) else str(self)
        except (TypeError, ValueError):
            return str(self)


DTYPE = Choice("float32", "bfloat16")  # float16 would need a loss scale
SEED = Int(low=0, high=2**32 - 1)  # JAX's keys have as many bits; one more would be another's
SAMPLING = {
    "temperature": Float(low=0.0),
    "top_k": Int(low=0),
    "top_p": Float(low=0.0, high=1.0, open_low=True),
    "no_repeat_ngram_size": Int(low=0),
}
_MODEL = {"path": Path(), "dtype": DTYPE, "param_dtype": DTYPE, "remat": Choice("auto", *REMAT)}
_POLICY_GRADIENT = {
    "gamma": Float(low=0.0, high=1.0),
    "reward_scaling": Float(low=0.0, open_low=True),
    "reward_clip": Float(low=0.0, open_low=True),
    "ratio_clip": Optional(Float(low=0.0, open_low=True)),
    "length_normalise": Bool(),
    "whiten": Choice(*WHITEN),
}
_HIDDEN_TERM = {
    "kind": Choice(*KINDS),
    "weight": Float(low=0.0, open_low=True),
    "layers": _Layers(),
    "heads": Int(low=0),
    "projection": Bool(),
}
_STAGE = {
    "name": Str(nonempty=True),
    "steps": Int(low=0),
    "epochs": Float(low=0.0),
    "targets": Choice(*TARGETS),
    "student_terms": ListOf(_Term((CROSS_ENTROPY, POLICY_GRADIENT)), nonempty=True),
    "teacher_view": Choice(*VIEWS),
    "on_policy_share": Float(low=0.0, high=1.0),
    "teacher_share": Float(low=0.0, high=0.99),
    "temperature": Float(low=0.0, open_low=True),
    "token_weighting": Choice("uniform", *losses.WEIGHTINGS),
    "prompt_divergence": _Divergence(),
    "prompt_regulariser": _Divergence(),
    "regularisation": Float(low=0.0),
    "regularisation_schedule": Choice(*REGULARISATIONS),
    "target_kl": Float(low=0.0, open_low=True),
    "teacher_terms": ListOf(_Term(), nonempty=True),
    "policy_gradient": _POLICY_GRADIENT,
    "hidden_terms": ListOf(_HIDDEN_TERM),
    "corpus_terms": ListOf(_Term()),
    "replay": {
        "capacity": Int(low=1),
        "threshold": Float(low=0.0, high=1.0),
        "tolerance": Float(low=0.0),
        "step": Float(low=0.0, high=1.0),
    },
    "batch_size": Int(low=1),
    "stale_rollouts": Bool(),
    **{field: Int(low=least) for field, least in MINIMUMS.items()},
    "length_buckets": Int(low=MINIMUMS["length_buckets"], high=16),
    "learning_rate": Float(low=0.0, open_low=True),
    "prompt_learning_rate": Float(low=0.0),
    "teacher_learning_rate": Float(low=0.0),
    "schedule": Choice(*optimizer.SCHEDULES),
    "warmup_steps": Int(low=0),
    "lr_min": Float(low=0.0),
    "weight_decay": Float(low=0.0),
    "clip": Float(low=0.0, open_low=True),
    "adam_b2": Float(low=0.0, high=0.999999),
    "sampling": SAMPLING,
}
SCHEMA = {
    "title": Str(),
    "seed": SEED,
    "preset": Choice(*PRESETS),
    "teacher": _MODEL,
    "student": {**_MODEL, "layers": _TeacherLayers()},
    "soft_prompt": {
        "length": Int(low=1),
        "init": Choice(*INITS),
        "text": Str(nonempty=True),
        "add_special_tokens": Bool(),
    },
    "in_context": {"examples": Int(low=1)},
    "cache": {"path": Path(bucket=False), "top_k": Int(low=1)},
    "data": {
        "train": Path(nonempty=True),
        "train_split": Str(),
        "dev": Path(nonempty=True),
        "dev_split": Str(),
        "dev_rows": Int(low=0),
        "corpus": Path(),
        "corpus_split": Str(),
        "template": Choice("alpaca", "chat", "plain"),
        "date": _Date(),
        "max_prompt_length": Int(low=1),
        "max_length": Int(low=2),
    },
    "stages": ListOf(_STAGE, nonempty=True),
    "data_free": {
        "requests": Int(low=1),
        "round_size": Int(low=2),
        "max_request_tokens": Int(low=1),
        "max_new_tokens": Int(low=1),
        "learning_rate": Float(low=0.0, open_low=True),
        "novelty_weight": Float(low=0.0),
        "fluency_weight": Float(low=0.0),
        "entropy_weight": Float(low=0.0),
        "temperature": Float(low=0.0, open_low=True),
        "seed": SEED,
        "bank": Path(nonempty=True),
    },
    "answers": {"path": Path(), "batch_size": Int(low=1), "sampling": SAMPLING},
    "evaluation": {
        "every": Int(low=0),
        "batch_size": Int(low=1),
        "sampling": SAMPLING,
        "references": Choice("gold", "teacher"),
        "teacher": Bool(),
        "prompt_effect": Bool(),
        "samples": Int(low=0),
    },
    "checkpoint": {
        "every": Int(low=1),
        "minutes": Float(low=0.0),
        "keep": Int(low=1),
        "export": Choice("last", "best"),
        "select": Choice(*SELECTION_METRICS),
    },
    "mesh": {"data": Int(low=-1), "fsdp": Int(low=-1), "tensor": Int(low=-1)},
    "log_every": Int(low=1),
    "stop_after_skipped": Int(low=1),
    "stop_after_seconds": Float(low=0.0),
}
# What does not change the student that comes out, so that it may change between resumes.
NOT_IN_FINGERPRINT = (
    *("title", "log_every", "mesh", "evaluation.samples", "evaluation.prompt_effect"),
    *("teacher.remat", "student.remat"),
    *("checkpoint.every", "checkpoint.minutes", "checkpoint.keep", "answers.path", "cache.path"),
)


def check_recipe(config: ConfigDict) -> None:
    """The whole config against the schema, then the facts that need two fields to see.

    Raises:
      ConfigError: every mistake, each with its path and what would be right.
    """
    check(config, SCHEMA)
    if mistakes := list(_contradictions(config)):
        raise ConfigError("\n".join(mistakes))


def _contradictions(config: ConfigDict):
    data = config.data
    if data.max_prompt_length >= data.max_length:
        yield (
            f"config.data.max_prompt_length: {data.max_prompt_length} leaves no room for a "
            f"response within config.data.max_length = {data.max_length}"
        )
    if not config.student.path and not config.student.layers:
        yield "config.student: give a path, or the number of teacher layers to start from (layers)"
    if config.student.path and config.student.layers:
        yield "config.student.layers: is for a student without a path of its own; set it to 0"
    if [config.mesh.data, config.mesh.fsdp, config.mesh.tensor].count(-1) > 1:
        yield "config.mesh: at most one size may be -1"
    if 0 in (config.mesh.data, config.mesh.fsdp, config.mesh.tensor):
        yield "config.mesh: a size is at least 1, or -1 for the rest"
    if config.checkpoint.export == "best" and not config.evaluation.every:
        yield "config.checkpoint.export: 'best' needs scores; set config.evaluation.every"
    for index, stage in enumerate(config.stages):
        path = f"config.stages[{index}]"
        yield from _stage_contradictions(path, stage, config)
        if any(other.name == stage.name for other in config.stages[:index]):
            yield f"{path}.name: {stage.name!r} is the name of an earlier stage too"
    if not config.teacher.path and needs_the_teacher(config):
        yield "config.teacher.path: is empty, but the recipe needs a teacher"
    sizes = {stage.batch_size for stage in config.stages if stage.stale_rollouts}
    if len(sizes) > 1:
        yield (
            f"config.stages: batch_size is {' and '.join(map(str, sorted(sizes)))} in stages with "
            "stale_rollouts; the rows written ahead have one place in a checkpoint, expected one "
            "batch_size"
        )
    if data.dev == "teacher" and config.evaluation.references == "gold":
        yield (
            "config.evaluation.references: 'gold', and requests that the teacher writes have no "
            "gold answers; expected 'teacher', or a file for config.data.dev"
        )
    shown = [one.name for one in config.stages if one.teacher_view == "in_context"]
    if data.train == "teacher" and (shown or config.soft_prompt.init == "examples"):
        yield (
            "config.in_context: demonstrations are gold answers, and requests that the teacher "
            "writes have none; expected another teacher_view, or another soft_prompt.init"
        )
    if data.dev == "teacher" and (data.train != "teacher" or not data.dev_rows):
        yield (
            "config.data.dev: 'teacher' takes dev_rows of the requests that the teacher writes; "
            "expected data.train = 'teacher' and data.dev_rows above 0"
        )


def needs_the_teacher(config: ConfigDict) -> bool:
    """Whether a run looks at the teacher at all, before, during or after training."""
    return (
        not config.student.path
        or config.evaluation.references == "teacher"
        or config.data.train == "teacher"
        or any(stage.targets == "teacher" for stage in config.stages)
        or any(needs_teacher(stage) for stage in config.stages)
    )


def _stage_contradictions(path: str, stage: ConfigDict, config: ConfigDict):
    if (stage.steps > 0) == (stage.epochs > 0):
        yield f"{path}: give either steps or epochs (the other 0)"
    parts = stage.micro_batches * stage.minibatches
    if stage.batch_size % parts:
        yield (
            f"{path}.micro_batches: {stage.micro_batches} in each of {stage.minibatches} "
            f"minibatches do not divide batch_size = {stage.batch_size}"
        )
    if stage.rollout_slots > stage.batch_size:
        yield (
            f"{path}.rollout_slots: {stage.rollout_slots} are more than a step has rows; expected "
            f"at most batch_size = {stage.batch_size}, or 0 for all of them"
        )
    yield from (f"{path}.{mistake}" for mistake in contradictions(stage))
    for index, term in enumerate(stage.hidden_terms):
        try:
            make_hidden_term(term)
        except ValueError as error:
            yield f"{path}.hidden_terms[{index}]: {error}"
    if stage.teacher_view == "cached":
        if not config.cache.path:
            yield f"{path}.teacher_view: 'cached' needs config.cache.path (see promptkd cache)"
        if stage.targets == "teacher":
            yield (
                f"{path}.targets: promptkd cache reads the data's own answers, not those that the "
                "teacher writes; expected 'gold'"
            )
        if stage.prompt_learning_rate:
            yield (
                f"{path}.prompt_learning_rate: a cached teacher cannot be prompted, its "
                "log-probabilities were written without a prompt; expected 0, or "
                "teacher_view = 'prompted'"
            )
    if stage.corpus_terms and not config.data.corpus:
        yield f"{path}.corpus_terms: need config.data.corpus, a file of plain text"
    if stage.targets == "replay":
        if stage.replay.capacity < stage.batch_size:
            yield f"{path}.replay.capacity: {stage.replay.capacity} is less than one batch"
        if not config.evaluation.every:
            yield (
                f"{path}.targets: 'replay' goes by the validation loss; set config.evaluation.every"
            )
    if reads_answers(stage) and config.data.train == "teacher":
        yield (
            f"{path}.targets: {stage.targets!r} needs gold answers, and requests that the teacher "
            "writes have none; expected 'teacher' or 'student'"
        )
