"""Recipes: configs with the defaults of `fields`, and the named methods.

A config file imports `base_config` and `stage_config`, `method_stage` or `paper_config` from here
and changes a few fields.
"""

import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from promptkd_jax.distill.losses.hidden_loss import HiddenTerm
from promptkd_jax.distill.losses.policy_gradient import PolicyGradient
from promptkd_jax.distill.methods.curriculum import Interpolation
from promptkd_jax.distill.methods.method_fields import CROSS_ENTROPY, POLICY_GRADIENT, TRANSPORT
from promptkd_jax.models.sampling_rules import Sampling
from promptkd_jax.training.config.config_file import as_dict
from promptkd_jax.training.config.fields import RunConfig, StageConfig

DOLLY_ROWS = 11_435  # that the published experiments train on


def _defaults(cls: type, /, **changes: Any) -> ConfigDict:
    """The fields of a group with their defaults, but for `changes`."""
    return ConfigDict(as_dict(cls()) | changes, type_safe=False)  # `checks` knows the types


def sampling_config(**changes: Any) -> ConfigDict:
    """Plain sampling at temperature 1: no top-k, no top-p, no n-gram rule."""
    return _defaults(Sampling, **changes)


def stage_config(name: str, **changes: Any) -> ConfigDict:
    """One stage of training: supervised fine-tuning on gold responses unless changed."""
    return _defaults(StageConfig, name=name, **changes)


def hidden_term(kind: str, **changes: Any) -> ConfigDict:
    """A loss on hidden states, see `hidden_loss.HiddenTerm`."""
    return _defaults(HiddenTerm, kind=kind, **changes)


_RKL, _ABKD = (("reverse_kl", 1.0),), (("alpha_beta(0.2, 0.7)", 1.0),)
_AMID = "mixed_learner(alpha_beta(0.2, 0.7), 0.5, 0.5)"
# Weight 100 there, without a factor of the temperatures, which losses.tempered has.
_WASD = dict(student_terms=((TRANSPORT, 50.0),), student_temperature=2.0)
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
        policy_gradient=_defaults(
            PolicyGradient, gamma=0.0, reward_scaling=1.0, length_normalize=False, whiten="none"
        ),
    ),
    "distillm": dict(targets="replay", student_terms=(("skew_reverse_kl(0.1)", 1.0),)),
    "abkd": dict(student_terms=_ABKD),
    "amid": dict(targets="replay", student_terms=((_AMID, 1.0),)),
    # No factor of the temperatures there, losses.tempered has one of 4.
    "todi": dict(student_terms=((CROSS_ENTROPY, 0.5), ("todi", 0.125)), temperature=2.0),
    "akl": dict(student_terms=((CROSS_ENTROPY, 0.5), ("akl(0.5)", 0.5))),
    "csd": dict(student_terms=(("csd(learner, learner, 1.5)", 1.0),)),
    "taid": dict(
        student_terms=(("soft_cross_entropy", 1.0),),
        interpolation=_defaults(Interpolation, schedule="adaptive"),
    ),
    "distillm2": dict(
        targets="teacher_and_student",
        student_terms=(("mixed_target(reverse_kl, -1, 0.9, True)", 1.0),),
        off_policy_terms=(("skew_forward_kl(0.1)", 1.0),),
        row_weights="rising",
    ),
    "wasd": dict(targets="replay", **_WASD),
    "skd": dict(targets="student", teacher_top_k=25, student_terms=(("forward_kl", 1.0),)),
    "promptkd": dict(_PROMPTKD, student_terms=_RKL),
    "promptkd_abkd": dict(_PROMPTKD, student_terms=_ABKD, prompt_divergence="alpha_beta(0.2, 0.7)"),
    "promptkd_amid": dict(_PROMPTKD, student_terms=((_AMID, 1.0),), prompt_divergence=_AMID),
    "promptkd_wasd": dict(_PROMPTKD, **_WASD),
}


# Fields of a stage for a soft prompt behind gates (`soft_prompt.gated`). A prompt that could be any
# distribution would come to p_P ~ (q p^alpha)^(1 / (1 + alpha)), at about 1 / (1 + alpha)^2 of
# KL(q || p) from p: at alpha = 1 a quarter, which on a real model harmed the student, at 10 less
# than a hundredth, however long it learns. See docs/methods.md, "A prompt that does no harm".
GATED_PROMPT = types.MappingProxyType(
    dict(prompt_learning_rate=1e-2, regularization_schedule="constant", regularization=10.0)
)


def behind_gates(config: ConfigDict) -> ConfigDict:
    """The run with its soft prompt behind gates, by `GATED_PROMPT`. For recipes that nobody has
    published: the paper's have no gates."""
    config.soft_prompt.gated = True
    for stage in config.stages:
        if stage.teacher_view == "prompted":
            stage.update(dict(GATED_PROMPT))
    return config


def method_stage(method: str, **changes: Any) -> ConfigDict:
    """The stage of a method of `METHODS`, with `changes` on top.

    Raises:
      ValueError: there is no such method.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; there are: {', '.join(METHODS)}")
    return stage_config(**(dict(name=method) | METHODS[method] | changes))


def base_config() -> ConfigDict:
    """The fields of a run with their defaults, see `fields.RunConfig`; it still lacks stages."""
    return _defaults(RunConfig)


class PaperSize(NamedTuple):
    """A student of the paper's table, and the published hyper-parameters of its runs.

    `start` is the student after 3 epochs of SFT, `pretrained` before; (rate, epochs) of the
    `supervised` methods; global batch, micro-batches, rate and epochs of the on-policy ones;
    DistiLLM's divergence, rate and epochs; (rate, epochs) of methods of `OF_THEIR_OWN`, which
    without a published value have the supervised ones.
    """

    start: str
    pretrained: str
    supervised: tuple[float, int]
    on_policy: tuple[int, int, float, int]
    distillm: tuple[str, float, int]
    of_their_own: Mapping[str, tuple[float, int]] = types.MappingProxyType({})


# Where MiniLLM, GKD, PromptKD and their kind begin: a student that has had 3 epochs of SFT.
FROM_SFT = ("imitkd", "gkd", "minillm", "opd", "distillm", "abkd", "amid", "wasd", "distillm2")
FROM_SFT += ("skd", "promptkd", "promptkd_abkd", "promptkd_amid", "promptkd_wasd")
# Those that were published with batches of 32 rows and a cosine, as the supervised ones are.
OF_THEIR_OWN = ("amid", "wasd", "todi", "akl", "csd", "taid", "distillm2")


def paper_choices(sizes: Mapping[str, PaperSize]) -> dict[str, tuple[str, tuple[str, ...]]]:
    """What the argument of `paper_config` chooses among, as `read_arguments` takes it."""
    return {
        "student": (next(iter(sizes)), tuple(sizes)),
        "method": ("promptkd", (*METHODS, "teacher", "init")),
    }


def paper_config(
    teacher: tuple[str, str, float, int],
    sizes: Mapping[str, PaperSize],
    argument: str,
    **more: tuple[str, Sequence[str]],
) -> ConfigDict:
    """A recipe of the paper: Dolly, 256 + 256 tokens, AdamW.

    Args:
      teacher: its hub id after SFT and before, rate and epochs of that SFT.
      sizes: by name; the first is the default.
      argument: "student=SIZE,method=NAME", both may be left out; the methods are those of `METHODS`
        and, before them, "teacher" (its SFT) and "init" (the student's 3 epochs).
      more: what else the argument may say, which the caller reads, as `read_arguments` takes it.

    Raises:
      ValueError: an argument that is not one of these.
    """
    chosen = read_arguments(argument, **paper_choices(sizes), **more)
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
    config.stages[0].dropout = True  # of those models that have it
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
    if method in OF_THEIR_OWN:
        rate, epochs = size.of_their_own.get(method, size.supervised)
        changes = dict(learning_rate=rate, epochs=float(epochs))
        return method_stage(method, **(supervised | changes))
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
            gradient_accumulation_steps=micro_batches,
            steps=5000 // (4 * minibatches),
            learning_rate=5e-6,
            warmup_steps=100,
            weight_decay=1e-6,
            adam_beta2=0.95,
        )
    return method_stage(
        method,
        batch_size=batch_size,
        gradient_accumulation_steps=micro_batches,
        learning_rate=rate,
        epochs=float(epochs),
        warmup_steps=100,
    )


def read_arguments(text: str, **known: tuple[str, Sequence[str]]) -> dict[str, str]:
    """Reads "name=value,name=value"; `known` gives each name's default and possible values."""
    chosen = {name: default for name, (default, _) in known.items()}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name not in known or value not in known[name][1]:
            right = "; ".join(f"{n}={'|'.join(values)}" for n, (_, values) in known.items())
            raise ValueError(f"{part!r} is not one of {right}")
        chosen[name] = value
    return chosen
