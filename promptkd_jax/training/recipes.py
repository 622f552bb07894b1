"""Recipes: the fields of a run's config with their defaults, and the named methods.

A config file imports `base_config` and `stage_config`, `method_stage` or `paper_config` from here
and changes a few fields. `fields` says what the fields may be, `build` what they become.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict, FieldReference

from promptkd_jax.distill.hidden_loss import HiddenTerm
from promptkd_jax.distill.method import CROSS_ENTROPY, POLICY_GRADIENT
from promptkd_jax.distill.policy_gradient import PolicyGradient
from promptkd_jax.inference.data_free import DataFree

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
        student_terms=((CROSS_ENTROPY, 1.0),),  # (divergence, weight), see losses.DIVERGENCES
        teacher_view="plain",  # see method.VIEWS
        rollout_slots=0,  # rows that are written at once, others follow where some end; 0: all
        stale_rollouts=False,  # rows are written during the step before, see method.Method
        on_policy_share=0.5,  # "mixed" targets: GKD's lambda
        teacher_share=0.0,  # of the teacher in the mixture that rollouts are drawn from
        temperature=1.0,  # in the student's divergences
        token_weighting="uniform",  # or one of losses.WEIGHTINGS
        prompt_divergence="reverse_kl",
        prompt_regulariser="reverse_kl",
        regularisation=1.0,
        regularisation_schedule="linear",  # linear (as published) | constant | adaptive
        target_kl=0.01,  # nats per token, for the adaptive schedule
        teacher_terms=(
            (CROSS_ENTROPY, 1.0),
            ("forward_kl", 1.0),
        ),  # what an online teacher minimises
        policy_gradient=policy_gradient_config(),
        hidden_terms=(),  # of hidden_term(…)
        corpus_terms=(),  # (name, weight) on the rows of data.corpus
        replay=dict(capacity=1000, threshold=0.0, tolerance=0.1, step=0.1),
        batch_size=8,  # global: over all devices and micro-batches
        micro_batches=1,
        length_buckets=1,  # lengths that an update is compiled for, for rows that are shorter
        minibatches=1,  # updates that the rows of a step are divided among
        passes=1,  # times that the rows of a step are gone through
        learning_rate=5e-5,
        prompt_learning_rate=0.0,  # 0: that of the student
        teacher_learning_rate=0.0,  # of an online teacher; 0: that of the student
        schedule="constant",
        warmup_steps=0,  # of every schedule; with preset "faithful" not of the cosine, as published
        lr_min=1e-7,
        weight_decay=1e-2,
        clip=1.0,
        adam_b2=0.999,
        sampling=sampling_config(),
    )
    return ConfigDict(base | changes)


def policy_gradient_config(**changes: Any) -> ConfigDict:
    """MiniLLM's settings, see `policy_gradient.PolicyGradient`."""
    return ConfigDict(dataclasses.asdict(PolicyGradient()) | changes)


def hidden_term(kind: str, **changes: Any) -> ConfigDict:
    """A loss on hidden states, see `hidden_loss.HiddenTerm`."""
    return ConfigDict(dataclasses.asdict(HiddenTerm(kind)) | changes)


_RKL, _ABKD = (("reverse_kl", 1.0),), (("alpha_beta(0.2, 0.7)", 1.0),)
_PROMPTKD = dict(targets="student", teacher_view="prompted")

# By name: what makes a method a method; how long and how fast it learns is said elsewhere.
METHODS: dict[str, dict[str, Any]] = {
    "sft": {},
    "kd": dict(student_terms=((CROSS_ENTROPY, 0.5), ("forward_kl", 0.5))),
    "seqkd": dict(targets="teacher"),
    "imitkd": dict(targets="student", student_terms=(("forward_kl", 1.0),)),
    "gkd": dict(targets="mixed", on_policy_share=1.0, student_terms=_RKL),
    "minillm": dict(
        targets="student",
        teacher_share=0.2,
        student_terms=((POLICY_GRADIENT, 1.0), ("reverse_kl", 1.0)),
        passes=4,
    ),
    "opd": dict(
        targets="student",
        student_terms=((POLICY_GRADIENT, 1.0),),
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
    return stage_config(**(dict(name=method) | METHODS[method] | changes))


def base_config() -> ConfigDict:
    """Fields that all recipes share."""
    layers = FieldReference(0, field_type=object)  # a number, or a tuple
    return ConfigDict(
        dict(
            title="",  # "": made of stages, models and data, see build.title
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
                date="",  # that a chat template may show; "": that of the run's first start
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
            checkpoint=dict(every=100, minutes=10.0, keep=2, export="last", select="rougeL"),
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
    batch_size, micro_batches, rate, epochs = size.on_policy
    if method == "minillm":  # 5,000 updates: 4 passes over 256 rollouts, a batch at a time
        minibatches = 256 // batch_size
        return method_stage(
            method,
            batch_size=256,
            minibatches=minibatches,
            micro_batches=micro_batches,
            steps=5000 // (4 * minibatches),
            learning_rate=5e-6,
            warmup_steps=100,
            weight_decay=1e-6,
            adam_b2=0.95,
        )
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
