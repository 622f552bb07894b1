"""The config of a run: its fields with their defaults, what they may be, and what they become.

A config file imports `base_config` and `stage_config` from here and changes a few fields.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import optax
from ml_collections import ConfigDict, FieldReference

from promptkd_jax import hidden, losses, optimizer
from promptkd_jax.config import (
    Bool,
    Choice,
    ConfigError,
    Float,
    Int,
    ListOf,
    Optional,
    Str,
    check,
)
from promptkd_jax.data_free import DataFree
from promptkd_jax.hidden import KINDS, HiddenTerm
from promptkd_jax.method import (
    GOLD,
    POLICY,
    PRESETS,
    REGULARISATIONS,
    TARGETS,
    VIEWS,
    Method,
    contradictions,
    needs_teacher,
)
from promptkd_jax.models.decoder import REMAT
from promptkd_jax.policy_gradient import WHITEN, PolicyGradient
from promptkd_jax.prompt import INITS
from promptkd_jax.sampler import Sampling
from promptkd_jax.step import Optimizers

SELECT = ("rougeL", "loss")  # dev scores that can choose the best checkpoint
DOLLY_ROWS = 11_435  # that the published experiments train on


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
        targets="gold",  # where rows come from, see method.TARGETS
        student_terms=((GOLD, 1.0),),  # (divergence, weight), see losses.DIVERGENCES
        teacher_view="plain",  # see method.VIEWS
        on_policy_share=0.5,  # "mixed" targets: GKD's lambda
        teacher_share=0.0,  # of the teacher in the mixture that rollouts are drawn from
        temperature=1.0,  # in the student's divergences
        token_weighting="uniform",  # or one of losses.WEIGHTINGS
        prompt_divergence="reverse_kl",
        prompt_regulariser="reverse_kl",
        regularisation=1.0,
        regularisation_schedule="linear",  # linear (as published) | constant | adaptive
        target_kl=0.01,  # nats per token, for the adaptive schedule
        teacher_terms=((GOLD, 1.0), ("forward_kl", 1.0)),  # what an online teacher minimises
        policy_gradient=policy_gradient_config(),
        hidden_terms=(),  # of hidden_term(…)
        corpus_terms=(),  # (name, weight) on the rows of data.corpus
        replay=dict(capacity=1000, threshold=0.0, tolerance=0.1, step=0.1),
        batch_size=8,  # global: over all devices and micro-batches
        micro_batches=1,
        minibatches=1,  # updates that the rows of a step are divided among
        passes=1,  # times that the rows of a step are gone through
        learning_rate=5e-5,
        prompt_learning_rate=0.0,  # 0: that of the student
        teacher_learning_rate=0.0,  # of an online teacher; 0: that of the student
        schedule="constant",
        warmup_steps=0,
        lr_min=1e-7,
        weight_decay=1e-2,
        clip=1.0,
        sampling=sampling_config(),
    )
    return ConfigDict(base | changes)


def policy_gradient_config(**changes: Any) -> ConfigDict:
    """MiniLLM's settings, see `policy_gradient.PolicyGradient`."""
    return ConfigDict(dataclasses.asdict(PolicyGradient()) | changes)


def hidden_term(kind: str, **changes: Any) -> ConfigDict:
    """A loss on hidden states, see `hidden.HiddenTerm`."""
    return ConfigDict(dataclasses.asdict(HiddenTerm(kind)) | changes)


_RKL, _ABKD = (("reverse_kl", 1.0),), (("alpha_beta(0.2, 0.7)", 1.0),)
_PROMPTKD = dict(targets="student", teacher_view="prompted")

# By name: what makes a method a method; how long and how fast it learns is said elsewhere.
METHODS: dict[str, dict[str, Any]] = {
    "sft": {},
    "kd": dict(student_terms=((GOLD, 0.5), ("forward_kl", 0.5))),
    "seqkd": dict(targets="teacher"),
    "imitkd": dict(targets="student", student_terms=(("forward_kl", 1.0),)),
    "gkd": dict(targets="mixed", on_policy_share=1.0, student_terms=_RKL),
    "minillm": dict(
        targets="student",
        teacher_share=0.2,
        student_terms=((POLICY, 1.0), ("reverse_kl", 1.0)),
        passes=4,
    ),
    "opd": dict(
        targets="student",
        student_terms=((POLICY, 1.0),),
        policy_gradient=policy_gradient_config(
            gamma=0.0, reward_scaling=1.0, length_normalise=False, whiten="none"
        ),
    ),
    "distillm": dict(targets="replay", student_terms=(("skew_reverse_kl(0.1)", 1.0),)),
    "abkd": dict(student_terms=_ABKD),
    "promptkd": dict(_PROMPTKD, student_terms=_RKL),
    "promptkd_abkd": dict(_PROMPTKD, student_terms=_ABKD, prompt_divergence="alpha_beta(0.2, 0.7)"),
}


def method_stage(method: str, **changes: Any) -> ConfigDict:
    """The stage of a method of `METHODS`, with `changes` on top.

    Raises:
      ValueError: there is no such method.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; there are: {', '.join(METHODS)}")
    return stage_config(method, **(METHODS[method] | changes))


def promptkd_config(**changes: Any) -> ConfigDict:
    """PromptKD: the student's own rows, a prompted teacher, both losses reverse KL."""
    return method_stage("promptkd", **changes)


def base_config() -> ConfigDict:
    """Fields that all recipes share."""
    layers = FieldReference(0, field_type=object)  # a number, or a tuple
    return ConfigDict(
        dict(
            title="distillation",
            seed=10,
            preset="default",  # or "faithful": the published code's conventions
            teacher=model_config(),
            student=dict(model_config(), layers=layers),  # of the teacher: how many, or which
            soft_prompt=dict(
                length=7,
                init="text",  # text | pad | vocabulary | random | examples
                text="Suppose you are a student.",
                add_special_tokens=False,
            ),
            in_context=dict(examples=4),  # from data.train, for "in_context" and init = "examples"
            cache=dict(path="", top_k=64),  # of `promptkd cache`, for the view "cached"
            data=dict(
                train="",
                train_split="train",
                dev="",
                dev_split="validation",
                dev_rows=0,  # 0: all
                corpus="",  # plain text for corpus_terms
                corpus_split="train",
                template="alpaca",
                max_prompt_length=256,
                max_length=512,
            ),
            data_free=dataclasses.asdict(DataFree()),  # where data.train is "teacher"
            stages=(),
            answers=dict(path="", batch_size=8, sampling=sampling_config()),
            evaluation=dict(
                every=0,  # updates; 0: only before and after
                batch_size=8,
                sampling=sampling_config(no_repeat_ngram_size=6),
                references="gold",
                teacher=True,  # closeness to the teacher, which is loaded for it
                prompt_effect=False,  # the teacher's own answers, without and with its prompt
                samples=8,
            ),
            checkpoint=dict(every=100, keep=2, export="last", select="rougeL"),
            mesh=dict(data=-1, fsdp=1, tensor=1),
            log_every=1,
            stop_after_skipped=10,
            stop_after_seconds=0.0,  # of training; 0: none
        )
    )


class PaperSize(NamedTuple):
    """A student of the paper's table, and the published hyper-parameters of its runs.

    `start` is the student after 3 epochs of SFT, `pretrained` before; (rate, epochs) of the
    `supervised` methods; global batch, micro-batches, rate and epochs of the on-policy ones;
    DistiLLM's divergence, rate and epochs.
    """

    start: str
    pretrained: str
    supervised: tuple[float, int]
    on_policy: tuple[int, int, float, int]
    distillm: tuple[str, float, int]


# Where MiniLLM, GKD, PromptKD and their kind begin: a student that has had 3 epochs of SFT.
FROM_SFT = ("imitkd", "gkd", "minillm", "opd", "distillm", "abkd", "promptkd", "promptkd_abkd")


def paper_config(
    family: str,
    teacher: tuple[str, str, float, int],
    sizes: Mapping[str, PaperSize],
    argument: str,
) -> ConfigDict:
    """A recipe of the paper: Dolly, 256 + 256 tokens, AdamW.

    Args:
      teacher: its hub id after SFT and before, rate and epochs of that SFT.
      sizes: by name; the first is the default.
      argument: "student=SIZE,method=NAME", both may be left out; the methods are those of `METHODS`
        and, before them, "teacher" (its SFT) and "init" (the student's 3 epochs).

    Raises:
      ValueError: an argument that is not one of these.
    """
    chosen = _arguments(
        argument,
        student=(next(iter(sizes)), tuple(sizes)),
        method=("promptkd", (*METHODS, "teacher", "init")),
    )
    size, method = sizes[chosen["student"]], chosen["method"]
    config = base_config()
    config.title = f"{method} on Dolly: {teacher[0]} into {family} {chosen['student']}"
    config.teacher.update(path=teacher[0], dtype="bfloat16", param_dtype="bfloat16")
    start = size.start if method in FROM_SFT else size.pretrained
    config.student.update(path=start, dtype="bfloat16")
    config.teacher.remat = config.student.remat = "full"
    config.data.update(
        train="databricks/databricks-dolly-15k",
        train_split="train[1000:]",  # the published code keeps the first 1,000 rows for dev
        dev="databricks/databricks-dolly-15k",
        dev_split="train[:1000]",
    )
    config.checkpoint.update(every=500, export="best")
    config.log_every = 10
    if method == "teacher":
        config.title = f"SFT on Dolly: {teacher[1]}"
        config.student.path = teacher[1]
    if method in ("teacher", "init"):
        config.teacher.path, config.evaluation.teacher = "", False
        config.checkpoint.select = "loss" if method == "init" else "rougeL"
    config.stages = (_paper_stage(method, size, teacher),)
    epoch = DOLLY_ROWS // config.stages[0].batch_size
    config.evaluation.update(every=epoch, batch_size=64)
    return config


def _paper_stage(method: str, size: PaperSize, teacher: tuple[str, str, float, int]) -> ConfigDict:
    """What the published scripts of each method say."""
    rate, epochs = size.supervised
    supervised = dict(batch_size=32, learning_rate=rate, epochs=float(epochs), schedule="cosine")
    if method == "teacher":
        changes = dict(learning_rate=teacher[2], epochs=float(teacher[3]))
        return stage_config("teacher", **(supervised | changes))
    if method == "init":
        return stage_config("init", **(supervised | dict(epochs=3.0)))
    if method in ("sft", "kd", "seqkd", "abkd"):
        return method_stage(method, **supervised)
    if method == "distillm":
        divergence, rate, epochs = size.distillm
        changes = dict(batch_size=8, learning_rate=rate, epochs=float(epochs))
        terms = ((divergence, 1.0),)
        return method_stage(method, student_terms=terms, **(supervised | changes))
    if method == "minillm":  # 5,000 updates, 4 for each batch of rollouts
        schedule = dict(learning_rate=5e-6, warmup_steps=100, weight_decay=1e-6)
        return method_stage(method, batch_size=256, micro_batches=16, steps=1250, **schedule)
    batch_size, micro_batches, rate, epochs = size.on_policy
    return method_stage(
        method,
        batch_size=batch_size,
        micro_batches=micro_batches,
        learning_rate=rate,
        epochs=float(epochs),
        warmup_steps=100,
    )


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


@dataclasses.dataclass(frozen=True)
class _Term:
    """A pair (name, weight): the name of a divergence, or one of `others`."""

    others: tuple[str, ...] = (GOLD,)

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


_DTYPE = Choice("float32", "bfloat16")  # float16 would need a loss scale
_SAMPLING = {
    "temperature": Float(low=0.0),
    "top_k": Int(low=0),
    "top_p": Float(low=0.0, high=1.0, open_low=True),
    "no_repeat_ngram_size": Int(low=0),
}
_MODEL = {"path": Str(), "dtype": _DTYPE, "param_dtype": _DTYPE, "remat": Choice(*REMAT)}
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
    "student_terms": ListOf(_Term((GOLD, POLICY)), nonempty=True),
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
    "micro_batches": Int(low=1),
    "minibatches": Int(low=1),
    "passes": Int(low=1),
    "learning_rate": Float(low=0.0, open_low=True),
    "prompt_learning_rate": Float(low=0.0),
    "teacher_learning_rate": Float(low=0.0),
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
    "student": {**_MODEL, "layers": _TeacherLayers()},
    "soft_prompt": {
        "length": Int(low=1),
        "init": Choice(*INITS),
        "text": Str(nonempty=True),
        "add_special_tokens": Bool(),
    },
    "in_context": {"examples": Int(low=1)},
    "cache": {"path": Str(), "top_k": Int(low=1)},
    "data": {
        "train": Str(nonempty=True),
        "train_split": Str(),
        "dev": Str(nonempty=True),
        "dev_split": Str(),
        "dev_rows": Int(low=0),
        "corpus": Str(),
        "corpus_split": Str(),
        "template": Choice("alpaca", "chat", "plain"),
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
        "seed": Int(low=0),
        "bank": Str(nonempty=True),
    },
    "answers": {"path": Str(), "batch_size": Int(low=1), "sampling": _SAMPLING},
    "evaluation": {
        "every": Int(low=0),
        "batch_size": Int(low=1),
        "sampling": _SAMPLING,
        "references": Choice("gold", "teacher"),
        "teacher": Bool(),
        "prompt_effect": Bool(),
        "samples": Int(low=0),
    },
    "checkpoint": {
        "every": Int(low=1),
        "keep": Int(low=1),
        "export": Choice("last", "best"),
        "select": Choice(*SELECT),
    },
    "mesh": {"data": Int(low=-1), "fsdp": Int(low=-1), "tensor": Int(low=-1)},
    "log_every": Int(low=1),
    "stop_after_skipped": Int(low=1),
    "stop_after_seconds": Float(low=0.0),
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
        yield from _stage_contradictions(path, stage, config)
        if any(other.name == stage.name for other in config.stages[:index]):
            yield f"{path}.name: {stage.name!r} is the name of an earlier stage too"
    if not config.teacher.path and needs_the_teacher(config):
        yield "config.teacher.path: is empty, but the recipe needs a teacher"
    if data.train == "teacher" and config.evaluation.references == "gold":
        yield (
            "config.data.train: requests that the teacher writes have no gold answers; set "
            "config.evaluation.references = 'teacher'"
        )
    if data.dev == "teacher" and (data.train != "teacher" or not data.dev_rows):
        yield (
            "config.data.dev: 'teacher' takes dev_rows of the requests that the teacher writes; "
            "expected data.train = 'teacher' and data.dev_rows above 0"
        )


def resolved_hidden_terms(stage: ConfigDict, student: Any, teacher: Any) -> tuple[HiddenTerm, ...]:
    """A stage's terms on hidden states for two decoder configs.

    Raises:
      ConfigError: layers, widths or heads that do not fit these models.
    """
    try:
        return hidden.resolve(tuple(map(_hidden_term, stage.hidden_terms)), student, teacher)
    except ValueError as error:
        raise ConfigError(f"config.stages: {stage.name}.hidden_terms: {error}") from error


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
            f"{path}.micro_batches: {stage.micro_batches} x {stage.minibatches} minibatches do not "
            f"divide batch_size = {stage.batch_size}"
        )
    yield from (f"{path}.{mistake}" for mistake in contradictions(stage))
    for index, term in enumerate(stage.hidden_terms):
        try:
            _hidden_term(term)
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
    if stage.targets not in ("teacher", "student") and config.data.train == "teacher":
        yield (
            f"{path}.targets: {stage.targets!r} needs gold answers, and requests that the teacher "
            "writes have none; expected 'teacher' or 'student'"
        )


def describe(stage: ConfigDict) -> str:
    """A stage in one line: name, where targets come from, divergences, teacher view."""
    terms = " + ".join(f"{weight:g} {name}" for name, weight in stage.student_terms)
    view = "" if stage.teacher_view == "plain" else f", {stage.teacher_view} teacher"
    more = [f"{term.weight:g} {term.kind}" for term in stage.hidden_terms]
    more += [f"{weight:g} {name} on a corpus" for name, weight in stage.corpus_terms]
    return " + ".join([f"{stage.name}: {terms} on rows from {stage.targets}{view}", *more])


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
    demonstrations: tuple[int, ...] = (),
) -> Method:
    """The Method of a stage of `steps` steps.

    Args:
      longest_response: the most response tokens of a row of its data.
      demonstrations: token ids, for "in_context".
    """
    room = config.data.max_length - config.data.max_prompt_length
    capacity = {"student": room, "gold": longest_response, "teacher": longest_response}
    same = {
        field.name: stage[field.name]
        for field in dataclasses.fields(Method)
        if field.name in stage and field.name not in ("sampling", "policy_gradient")
    }
    for name in ("student_terms", "teacher_terms", "corpus_terms"):
        same[name] = tuple((term, float(weight)) for term, weight in stage[name])
    same["hidden_terms"] = tuple(_hidden_term(term) for term in stage.hidden_terms)
    return Method(
        **same,
        total_steps=steps,
        response_capacity=capacity.get(stage.targets, max(room, longest_response)),
        max_new_tokens=room,
        prompt_capacity=config.data.max_prompt_length,
        vocab_size=vocab_size,
        demonstrations=demonstrations if stage.teacher_view == "in_context" else (),
        policy_gradient=PolicyGradient(**stage.policy_gradient),
        sampling=sampling(stage.sampling, eos_ids),
        conventions=PRESETS[config.preset],
    )


def _hidden_term(term: ConfigDict) -> HiddenTerm:
    layers = term.layers
    if layers != "uniform":
        layers = tuple(map(tuple, layers))
    return HiddenTerm(term.kind, float(term.weight), layers, term.heads, term.projection)


def learning_rate(stage: ConfigDict, peak: float, steps: int) -> optax.Schedule:
    """The stage's schedule over the updates of its `steps` steps, for one of its rates."""
    return optimizer.schedule(
        stage.schedule,
        peak,
        total_steps=steps,
        warmup_steps=stage.warmup_steps,
        lr_min=stage.lr_min,
    )


def make_optimizers(
    stage: ConfigDict, student: Any, teacher: Any, *, steps: int, decay_norms: bool
) -> Optimizers:
    """AdamW for each group of parameters, each with its own clip and schedule."""

    def adamw(peak, params=None, updates=steps):
        mask = None if params is None else optimizer.decay_mask(params, decay_norms=decay_norms)
        return optimizer.adamw(
            learning_rate(stage, peak, updates),
            weight_decay=stage.weight_decay,
            clip=stage.clip,
            decay_mask=mask,
        )

    updates = steps * stage.minibatches * stage.passes
    teacher_rate = stage.teacher_learning_rate or stage.learning_rate
    return Optimizers(
        student=adamw(stage.learning_rate, student, updates),
        soft_prompt=adamw(stage.prompt_learning_rate or stage.learning_rate),
        teacher=None if teacher is None else adamw(teacher_rate, teacher),
        projection=adamw(stage.learning_rate, updates=updates),
    )
