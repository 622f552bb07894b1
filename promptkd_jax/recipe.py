"""The config of a run: its fields with their defaults, what they may be, and what they become.

A config file imports `base_config` and `stage_config` from here and changes a few fields.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import optax
from ml_collections import ConfigDict

from promptkd_jax import losses, optimizer
from promptkd_jax.config import (
    Bool,
    Choice,
    ConfigError,
    Float,
    Int,
    ListOf,
    Str,
    check,
)
from promptkd_jax.models.decoder import REMAT
from promptkd_jax.sampler import Sampling
from promptkd_jax.step import GOLD, PRESETS, Method, Optimizers

DOLLY_ROWS = 11_435  # that the published experiments train on
METHODS = ("promptkd", "sft", "kd")


def sampling_config(**changes: Any) -> ConfigDict:
    """Plain sampling at temperature 1: no top-k, no top-p, no n-gram rule."""
    base = dict(temperature=1.0, top_k=0, top_p=1.0, no_repeat_ngram_size=0)
    return ConfigDict(base | changes)


def model_config(**changes: Any) -> ConfigDict:
    """A folder, GGUF file or hub id, computed in float32 and kept in float32."""
    return ConfigDict(dict(path="", dtype="float32", param_dtype="float32", remat="none") | changes)


def stage_config(name: str, **changes: Any) -> ConfigDict:
    """One stage of training: supervised fine-tuning on gold answers unless changed."""
    base = dict(
        name=name,
        steps=0,
        epochs=0.0,
        targets="gold",  # gold | teacher (written once, before training) | student (on-policy)
        student_terms=(("cross_entropy", 1.0),),  # (divergence, weight), see losses.DIVERGENCES
        prompted=False,
        prompt_divergence="reverse_kl",
        prompt_regulariser="reverse_kl",
        regularisation=1.0,
        batch_size=8,  # global: over all devices and micro-batches
        micro_batches=1,
        learning_rate=5e-5,
        prompt_learning_rate=0.0,  # 0: that of the student
        schedule="constant",
        warmup_steps=0,
        lr_min=1e-7,
        weight_decay=1e-2,
        clip=1.0,
        sampling=sampling_config(),
    )
    return ConfigDict(base | changes)


def promptkd_config(**changes: Any) -> ConfigDict:
    """PromptKD: the student's own rows, a prompted teacher, both losses reverse KL."""
    base = dict(targets="student", student_terms=(("reverse_kl", 1.0),), prompted=True)
    return stage_config("promptkd", **(base | changes))


def base_config() -> ConfigDict:
    """Fields that all recipes share."""
    return ConfigDict(
        dict(
            title="distillation",
            seed=10,
            preset="default",  # or "faithful": the published code's conventions
            teacher=model_config(),
            student=dict(model_config(), layers=0),
            soft_prompt=dict(length=7, text="Suppose you are a student.", add_special_tokens=False),
            data=dict(
                train="",
                train_split="train",
                dev="",
                dev_split="validation",
                dev_rows=0,  # 0: all
                template="alpaca",
                max_prompt_length=256,
                max_length=512,
            ),
            stages=(),
            answers=dict(batch_size=8, sampling=sampling_config()),
            evaluation=dict(
                every=0,  # updates; 0: only before and after
                batch_size=8,
                sampling=sampling_config(no_repeat_ngram_size=6),
                references="gold",
                samples=8,
            ),
            checkpoint=dict(every=100, keep=2, export="last"),
            mesh=dict(data=-1, fsdp=1, tensor=1),
            log_every=1,
            stop_after_skipped=10,
        )
    )


def paper_config(
    family: str, teacher: str, students: Mapping[str, tuple], argument: str, *, default: str
) -> ConfigDict:
    """A recipe of the paper: Dolly, 256 + 256 tokens, AdamW, constant rate after 100 updates.

    Args:
      students: by size: (hub id after 3 epochs of SFT, global batch, micro-batches, learning rate,
        epochs, pre-trained hub id, learning rate and epochs of the baselines).
      argument: "student=SIZE,method=promptkd|sft|kd"; both may be left out.

    Raises:
      ValueError: an argument that is not one of these.
    """
    chosen = _arguments(argument, student=(default, tuple(students)), method=("promptkd", METHODS))
    size, method = chosen["student"], chosen["method"]
    start, batch_size, micro_batches, rate, epochs, *baseline = students[size]
    pretrained, base_rate, base_epochs = baseline
    config = base_config()
    config.title = f"{method} on Dolly: {teacher} into {family} {size}"
    config.teacher.update(path=teacher, dtype="bfloat16", param_dtype="bfloat16")
    config.student.update(path=start, dtype="bfloat16")
    config.data.update(
        train="databricks/databricks-dolly-15k",
        train_split="train[1000:]",  # the published code keeps the first 1,000 rows for dev
        dev="databricks/databricks-dolly-15k",
        dev_split="train[:1000]",
    )
    config.checkpoint.update(every=500, export="best")
    config.log_every = 10
    config.teacher.remat = config.student.remat = "full"
    if method == "promptkd":
        stage = promptkd_config(
            batch_size=batch_size,
            micro_batches=micro_batches,
            learning_rate=rate,
            epochs=float(epochs),
            warmup_steps=100,
        )
    else:
        config.student.path = pretrained
        terms = {
            "sft": (("cross_entropy", 1.0),),
            "kd": (("cross_entropy", 0.5), ("forward_kl", 0.5)),
        }
        stage = stage_config(
            method,
            student_terms=terms[method],
            batch_size=32,
            learning_rate=base_rate,
            epochs=float(base_epochs),
            schedule="cosine",
        )
    config.stages = (stage,)
    config.evaluation.update(every=DOLLY_ROWS // stage.batch_size, batch_size=64)  # once an epoch
    return config


def _arguments(text: str, **known: tuple[str, Sequence[str]]) -> dict[str, str]:
    """Reads "name=value,name=value"; `known` gives each name's default and possible values."""
    chosen = {name: default for name, (default, _) in known.items()}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name not in known or value not in known[name][1]:
            right = "; ".join(f"{n}={'|'.join(values)}" for n, (_, values) in known.items())
            raise ValueError(f"{part!r} is not one of {right}")
        chosen[name] = value
    return chosen


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


class _Term:
    """A pair (divergence or "cross_entropy", weight)."""

    def __str__(self) -> str:
        return "a pair (divergence, weight) such as ('reverse_kl', 1.0)"

    def fault(self, value: Any) -> str:
        if not isinstance(value, list | tuple) or len(value) != 2:
            return str(self)
        name, weight = value
        return Float(low=0.0).fault(weight) or (name != GOLD and _Divergence().fault(name)) or ""


_DTYPE = Choice("float32", "bfloat16")  # float16 would need a loss scale
_SAMPLING = {
    "temperature": Float(low=0.0),
    "top_k": Int(low=0),
    "top_p": Float(low=0.0, high=1.0, open_low=True),
    "no_repeat_ngram_size": Int(low=0),
}
_MODEL = {"path": Str(), "dtype": _DTYPE, "param_dtype": _DTYPE, "remat": Choice(*REMAT)}
_STAGE = {
    "name": Str(nonempty=True),
    "steps": Int(low=0),
    "epochs": Float(low=0.0),
    "targets": Choice("gold", "teacher", "student"),
    "student_terms": ListOf(_Term(), nonempty=True),
    "prompted": Bool(),
    "prompt_divergence": _Divergence(),
    "prompt_regulariser": _Divergence(),
    "regularisation": Float(low=0.0),
    "batch_size": Int(low=1),
    "micro_batches": Int(low=1),
    "learning_rate": Float(low=0.0, open_low=True),
    "prompt_learning_rate": Float(low=0.0),
    "schedule": Choice(*optimizer.SCHEDULES),
    "warmup_steps": Int(low=0),
    "lr_min": Float(low=0.0),
    "weight_decay": Float(low=0.0),
    "clip": Float(low=0.0, open_low=True),
    "sampling": _SAMPLING,
}
SCHEMA = {
    "title": Str(nonempty=True),
    "seed": Int(low=0),
    "preset": Choice(*PRESETS),
    "teacher": _MODEL,
    "student": {**_MODEL, "layers": Int(low=0)},
    "soft_prompt": {"length": Int(low=1), "text": Str(nonempty=True), "add_special_tokens": Bool()},
    "data": {
        "train": Str(nonempty=True),
        "train_split": Str(),
        "dev": Str(nonempty=True),
        "dev_split": Str(),
        "dev_rows": Int(low=0),
        "template": Choice("alpaca", "chat", "plain"),
        "max_prompt_length": Int(low=1),
        "max_length": Int(low=2),
    },
    "stages": ListOf(_STAGE, nonempty=True),
    "answers": {"batch_size": Int(low=1), "sampling": _SAMPLING},
    "evaluation": {
        "every": Int(low=0),
        "batch_size": Int(low=1),
        "sampling": _SAMPLING,
        "references": Choice("gold", "teacher"),
        "samples": Int(low=0),
    },
    "checkpoint": {"every": Int(low=1), "keep": Int(low=1), "export": Choice("last", "best")},
    "mesh": {"data": Int(low=-1), "fsdp": Int(low=-1), "tensor": Int(low=-1)},
    "log_every": Int(low=1),
    "stop_after_skipped": Int(low=1),
}
# What does not change the student that comes out, so that it may change between resumes.
IRRELEVANT = (
    *("title", "log_every", "mesh", "evaluation.samples"),
    *("checkpoint.every", "checkpoint.keep"),
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
        yield from _stage_contradictions(path, stage)
        if any(other.name == stage.name for other in config.stages[:index]):
            yield f"{path}.name: {stage.name!r} is the name of an earlier stage too"
    needed = not config.student.path or config.evaluation.references == "teacher"
    if not config.teacher.path and (needed or any(map(_needs_teacher, config.stages))):
        yield "config.teacher.path: is empty, but the recipe needs a teacher"


def _needs_teacher(stage: ConfigDict) -> bool:
    against_teacher = any(name != GOLD for name, _ in stage.student_terms)
    return stage.prompted or stage.targets == "teacher" or against_teacher


def _stage_contradictions(path: str, stage: ConfigDict):
    if (stage.steps > 0) == (stage.epochs > 0):
        yield f"{path}: give either steps or epochs (the other 0)"
    if stage.batch_size % stage.micro_batches:
        yield (
            f"{path}.micro_batches: {stage.micro_batches} does not divide "
            f"batch_size = {stage.batch_size}"
        )
    golden = [name for name, _ in stage.student_terms if name == GOLD]
    if stage.prompted and len(golden) == len(stage.student_terms):
        yield f"{path}.prompted: needs a term against the teacher in student_terms"
    if golden and stage.targets == "student":
        yield f"{path}.student_terms: {GOLD} on the student's own rollouts teaches it nothing"


def describe(stage: ConfigDict) -> str:
    """A stage in one line: name, where targets come from, divergences, teacher view."""
    terms = " + ".join(f"{weight:g} {name}" for name, weight in stage.student_terms)
    view = f", prompted teacher ({stage.prompt_divergence})" if stage.prompted else ""
    return f"{stage.name}: {terms} on rows from {stage.targets}{view}"


def sampling(config: ConfigDict, eos_ids: tuple[int, ...]) -> Sampling:
    """The `sampling` group of a config."""
    return Sampling(
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        no_repeat_ngram_size=config.no_repeat_ngram_size,
        eos_ids=eos_ids,
    )


def stage_steps(stage: ConfigDict, rows: int) -> int:
    """Updates of a stage: as given, or whole batches of so many epochs over `rows` rows."""
    return stage.steps or max(1, int(stage.epochs * (rows // stage.batch_size)))


def make_method(
    config: ConfigDict,
    stage: ConfigDict,
    *,
    steps: int,
    longest_response: int,
    vocab_size: int,
    eos_ids: tuple[int, ...],
) -> Method:
    """The Method of a stage of `steps` updates; `longest_response` tokens is a row's most."""
    room = config.data.max_length - config.data.max_prompt_length
    return Method(
        targets=stage.targets,
        student_terms=tuple((name, float(weight)) for name, weight in stage.student_terms),
        total_steps=steps,
        response_capacity=room if stage.targets == "student" else longest_response,
        prompt_capacity=config.data.max_prompt_length,
        vocab_size=vocab_size,
        prompted=stage.prompted,
        prompt_divergence=stage.prompt_divergence,
        prompt_regulariser=stage.prompt_regulariser,
        regularisation=float(stage.regularisation),
        sampling=sampling(stage.sampling, eos_ids),
        micro_batches=stage.micro_batches,
        conventions=PRESETS[config.preset],
    )


def learning_rate(stage: ConfigDict, peak: float, steps: int) -> optax.Schedule:
    """The stage's schedule over its `steps` updates, for one of its two learning rates."""
    return optimizer.schedule(
        stage.schedule,
        peak,
        total_steps=steps,
        warmup_steps=stage.warmup_steps,
        lr_min=stage.lr_min,
    )


def make_optimizers(stage: ConfigDict, params: Any, *, steps: int, decay_norms: bool) -> Optimizers:
    """AdamW for the student and for the soft prompt, each with its own clip and schedule."""

    def adamw(peak, mask):
        return optimizer.adamw(
            learning_rate(stage, peak, steps),
            weight_decay=stage.weight_decay,
            clip=stage.clip,
            decay_mask=mask,
        )

    return Optimizers(
        student=adamw(stage.learning_rate, optimizer.decay_mask(params, decay_norms=decay_norms)),
        soft_prompt=adamw(stage.prompt_learning_rate or stage.learning_rate, None),
    )
