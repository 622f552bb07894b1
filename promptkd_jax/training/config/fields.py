"""Every field of a run's config: name, default, range and help. Nothing else repeats them.

`recipes` makes the `ConfigDict` of a config file from these defaults, `checks` reads one back into
a `RunConfig`, and `promptkd train --help-config` and docs/fields.md show the table. The fields of a
stage are declared with the mathematics that they belong to: `method_fields.Objective`,
`Execution`, `PolicyGradient`, `HiddenTerm`, `sampler.Sampling`, `data_free.DataFree`.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from promptkd_jax.data.reading.formats import FORMATS
from promptkd_jax.data.rows import LONG_PROMPTS, SUPERVISE
from promptkd_jax.data.templates import TEMPLATES, PromptFormat
from promptkd_jax.distill.methods.method import PRESETS
from promptkd_jax.distill.methods.method_fields import Execution, Objective
from promptkd_jax.distill.optimizer import OPTIMIZERS, SCHEDULES
from promptkd_jax.distill.soft_prompt import INITS
from promptkd_jax.evaluation.text_metrics import ROUGE_TOKENIZERS
from promptkd_jax.inference.data_free import DataFree
from promptkd_jax.infra.files import Path
from promptkd_jax.infra.specs import (
    SEED,
    Bool,
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
from promptkd_jax.models.layers.quantization import QUANTIZE
from promptkd_jax.models.sampling_rules import Sampling
from promptkd_jax.training.config.field_specs import (
    DTYPE,
    KV_CACHE_DTYPE,
    POSITIVE,
    REMAT,
    Columns,
    Date,
    Keywords,
    Sources,
    TeacherLayers,
    weighted_sources,
)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A model that a run starts from."""

    path: str = field("", Path(), "folder (also that of a run), .gguf file, or hub id")
    dtype: str = field("float32", DTYPE, "what is computed in")
    param_dtype: str = field(
        "float32", DTYPE, "what parameters are kept in; the optimizer works in float32"
    )
    remat: str = field("none", REMAT, "what the backward pass computes again instead of keeping it")
    offload: bool = field(False, Bool(), "whether frozen layers lie in the host's memory")
    quantize: str = field("none", Choice(*QUANTIZE), "what kernels that nothing trains are kept in")
    kv_cache_dtype: str = field("auto", KV_CACHE_DTYPE, "what rollouts keep keys and values in")


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """A low-rank adapter of the student, which alone is trained, see `models.layers.lora`."""

    rank: int = field(0, Int(low=0), "of the change; 0: no adapter, all of the student is trained")
    alpha: float = field(16.0, POSITIVE, "over rank, the factor of the change")
    use_rslora: bool = field(False, Bool(), "whether alpha is over the root of rank (rsLoRA)")
    dropout: float = field(
        0.0, Float(low=0.0, high=1.0, open_high=True), "of its input, in stages with dropout"
    )
    target_modules: tuple[str, ...] = field(
        ("all-linear",),
        ListOf(Str(nonempty=True), nonempty=True),
        "linear maps of every layer that are changed, by the names that transformers has for them, "
        "as patterns of their ends, such as ('q_proj', 'v_proj'); 'all-linear': all of them",
    )
    path: str = field(
        "", Path(), "LoRA adapter of PEFT to start from, with its own rank, alpha and modules"
    )

    @property
    def is_used(self) -> bool:
        """Whether there is an adapter."""
        return bool(self.rank or self.path)


@dataclasses.dataclass(frozen=True)
class StudentConfig(ModelConfig):
    """The model that learns."""

    layers: int | tuple[int, ...] = field(
        0, TeacherLayers(), "of the teacher, in place of a path: how many, evenly spaced, or which"
    )
    lora: LoRAConfig = group(LoRAConfig, "a low-rank adapter, which alone is trained")


@dataclasses.dataclass(frozen=True)
class SoftPromptConfig:
    """The soft prompt, for the view 'prompted'."""

    length: int = field(7, Int(low=1), "number of vectors (M)")
    init: str = field("text", Choice(INITS), "where the vectors start")
    text: str = field("Suppose you are a student.", Str(nonempty=True), "for init = 'text'")
    add_special_tokens: bool = field(False, Bool(), "whether the text gets a BOS")
    gated: bool = field(
        False, Bool(), "whether every head has a gate for it, which is learned and starts at 0"
    )


@dataclasses.dataclass(frozen=True)
class InContextConfig:
    """Demonstrations, for the view 'in_context' and soft_prompt.init = 'examples'."""

    examples: int = field(4, Int(low=1), "how many, taken from data.train")


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """What `promptkd cache` wrote, for the view 'cached'."""

    path: str = field("", Path(bucket=False), "folder that promptkd cache wrote")
    top_k: int = field(
        64,
        Int(low=1),
        "log-probabilities of a token that it has, as promptkd cache --top-k wrote it",
    )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Records, and how they become rows."""

    train: str | tuple[tuple[str, float], ...] = field(
        "",
        Sources(nonempty=True),
        "a file, folder or pattern, a Hugging Face data set, 'synthetic:train', "
        "'package:NAME/FILE', or 'teacher', which writes the prompts (see data_free); or several "
        "with their shares of a batch, such as ((source, 0.7), (other, 0.3))",
    )
    train_split: str = field("train", Str(), "of a Hugging Face data set, such as train[1000:]")
    train_rows: int = field(
        0, Int(low=0), "records of each source of train that are read, from the first on; 0: all"
    )
    dev: str = field(
        "", Path(nonempty=True), "as train, for evaluation; 'teacher': some of its own"
    )
    dev_split: str = field("validation", Str(), "as train_split")
    dev_rows: int = field(0, Int(low=0), "rows of dev that are used; 0: all")
    format: str = field(
        "auto", Choice("auto", *FORMATS), "of the records; 'auto': told by their fields"
    )
    columns: tuple[tuple[str, str], ...] = field(
        (), Columns(), "the data's names of fields, by those of the format; '': not read"
    )
    corpus: str | tuple[tuple[str, float], ...] = field(
        "", Sources(), "plain text for corpus_terms, as train"
    )
    corpus_split: str = field("train", Str(), "as train_split")
    template: str = field("alpaca", Choice(*TEMPLATES), "how a record becomes the text of a prompt")
    system: str = field("", Str(), "system turn of conversations that have none; '': none")
    chat_template_kwargs: tuple[tuple[str, Any], ...] = field(
        (), Keywords(), "what the chat template is given beside the conversation"
    )
    chat_template: str = field(
        "",
        Path(),
        "of 'chat', saved with the student: a file of Jinja text, or 'teacher'; '': the "
        "tokenizer's own, or the teacher's where it has none",
    )
    add_bos: bool | str = field(
        "auto",
        Choice("auto", True, False),
        "whether prompts of other templates than 'chat' begin with the BOS; 'auto': as the "
        "tokenizer has it, and not with preset 'faithful'",
    )
    date: str = field(
        "", Date(), "that a chat template may show; '': that of the run's first start"
    )
    max_prompt_length: int = field(256, Int(low=1), "tokens of a prompt; longer: see long_prompts")
    max_length: int = field(512, Int(low=2), "tokens of a row; longer responses are cut")
    long_prompts: str = field(
        "drop",
        Choice(LONG_PROMPTS),
        "what becomes of records with prompts over max_prompt_length",
    )
    supervise: str = field(
        "last",
        Choice(SUPERVISE),
        "the turns of the assistant in a conversation that a student learns from; where a model "
        "writes the responses, 'all' is 'each'",
    )
    token_cache: str = field(
        "",
        Path(bucket=False),
        "folder of a disk for the tokens of train and corpus, which runs may share; '': the run's "
        "own, or with a workdir in a bucket none",
    )

    def __post_init__(self):
        for name in ("chat_template_kwargs", "columns"):
            if isinstance(value := getattr(self, name), Mapping):  # as pairs, which can be hashed
                object.__setattr__(self, name, tuple(value.items()))

    @property
    def train_sources(self) -> tuple[tuple[str, float], ...]:
        """The sources of `train`, each with its weight."""
        return weighted_sources(self.train)

    @property
    def corpus_sources(self) -> tuple[tuple[str, float], ...]:
        """The sources of `corpus`, each with its weight."""
        return weighted_sources(self.corpus)

    @property
    def train_name(self) -> str:
        """The sources of `train`, for people."""
        return " + ".join(source for source, _ in self.train_sources)

    @property
    def corpus_name(self) -> str:
        """The sources of `corpus`, for people."""
        return " + ".join(source for source, _ in self.corpus_sources)

    def prompt_format(self, preset: str) -> PromptFormat:
        """Returns how a conversation becomes a prompt, under this preset of conventions."""
        add_bos = False if self.add_bos == "auto" and preset == "faithful" else self.add_bos
        keywords = dict(self.chat_template_kwargs)
        return PromptFormat(self.template, self.system, keywords, add_bos, self.date)


@dataclasses.dataclass(frozen=True)
class ReplayConfig:
    """DistiLLM's buffer and schedule, for targets = 'replay'."""

    capacity: int = field(1000, Int(low=1), "rows of the buffer")
    threshold: float = field(
        0.0, Float(low=0.0, high=1.0), "probability of a rollout in the beginning"
    )
    tolerance: float = field(0.1, Float(low=0.0), "by which the validation loss may rise")
    step: float = field(0.1, Float(low=0.0, high=1.0), "added to the threshold when it rises more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig(Execution, Objective):
    """A stage of training: an objective, how it is computed, and how long and fast it learns."""

    name: str = field("", Str(nonempty=True), "name, in reports and messages")
    steps: int = field(0, Int(low=0), "batches of the stage; 0: as many as `epochs` says")
    epochs: float = field(0.0, Float(low=0.0), "passes over the training rows; 0: see `steps`")
    replay: ReplayConfig = group(ReplayConfig, "DistiLLM's buffer and schedule")
    batch_size: int = field(8, Int(low=1), "rows of a step, over all devices and micro-batches")
    optimizer: str = field(
        "adamw",
        Choice(OPTIMIZERS),
        "of the student and an online teacher; soft prompt and projections have AdamW",
    )
    learning_rate: float = field(5e-5, POSITIVE, "peak rate of the student")
    prompt_learning_rate: float = field(0.0, Float(low=0.0), "of the soft prompt; 0: the student's")
    teacher_learning_rate: float = field(
        0.0, Float(low=0.0), "of an online teacher; 0: that of the student"
    )
    schedule: str = field("constant", Choice(*SCHEDULES), "of the learning rates")
    warmup_steps: int = field(
        0, Int(low=0), "linear, of every schedule; with preset 'faithful' not of the cosine"
    )
    min_lr: float = field(1e-7, Float(low=0.0), "where falling schedules end")
    weight_decay: float = field(1e-2, Float(low=0.0), "decoupled, of matrices")
    max_grad_norm: float = field(1.0, POSITIVE, "norm that gradients are clipped to")
    adam_beta2: float = field(0.999, Float(low=0.0, high=0.999999), "of Adam's second moment")
    sampling: Sampling = group(Sampling, "how rollouts are sampled")

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches that a step's rows are dealt out to."""
        return self.gradient_accumulation_steps * self.minibatches

    @property
    def prompts_per_step(self) -> int:
        """Rows of the data that a step takes."""
        return self.batch_size // self.rollouts_per_prompt

    @property
    def by_turn(self) -> bool:
        """Whether a model writes the responses, each to a prompt of its own."""
        return self.source.on_policy or self.source.teacher_writes


@dataclasses.dataclass(frozen=True)
class TeacherResponsesConfig:
    """What the teacher writes before training, for targets = 'teacher'."""

    path: str = field(
        "",
        Path(),
        "folder of teacher_answers.jsonl and dev_answers.jsonl, which are read or get written; '': "
        "that of the run",
    )
    batch_size: int = field(8, Int(low=1), "rows that are written at once")
    sampling: Sampling = group(Sampling, "how they are sampled")


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Scores on data.dev, before, during and after training."""

    every: int = field(0, Int(low=0), "steps between evaluations; 0: only before and after")
    batch_size: int = field(8, Int(low=1), "rows that are answered at once")
    sampling: Sampling = group(Sampling, "how responses are sampled", no_repeat_ngram_size=6)
    references: str = field(
        "gold", Choice("gold", "teacher"), "what ROUGE-L compares responses with"
    )
    rouge_tokenizer: str = field(
        "published", Choice(ROUGE_TOKENIZERS), "the tokens that ROUGE-L compares"
    )
    teacher: bool = field(
        True, Bool(), "whether a teacher that no stage needs is loaded, to measure closeness to it"
    )
    prompt_effect: bool = field(
        False, Bool(), "whether the teacher responds itself, without and with its soft prompt"
    )
    samples: int = field(8, Int(low=0), "responses that the report shows")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When a run saves itself, and which of its students it exports."""

    every: int = field(100, Int(low=1), "steps between checkpoints")
    minutes: float = field(10.0, Float(low=0.0), "between checkpoints, beside `every`; 0: never")
    keep: int = field(2, Int(low=1), "checkpoints that are kept, beside the best")
    export: str = field("last", Choice("last", "best"), "the student that a run ends with")
    select: str = field("rougeL", Choice("rougeL", "loss"), "the dev score that 'best' goes by")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices by axis."""

    data: int = field(-1, Int(low=-1), "parts of a batch, parameters repeated")
    fsdp: int = field(1, Int(low=-1), "parts of a batch and of all parameters")
    tensor: int = field(1, Int(low=-1), "parts of heads, feed-forward and vocabulary")

    @property
    def sizes(self) -> dict[str, int]:
        """Returns the sizes by axis."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One run, from models and data to a report."""

    title: str = field("", Str(), "of the report; '': made of stages, models and data")
    seed: int = field(10, SEED, "of everything that is drawn")
    preset: str = field("default", Choice(*PRESETS), "'faithful': the published code's conventions")
    teacher: ModelConfig = group(ModelConfig, "the model that is learned from")
    student: StudentConfig = group(StudentConfig, "the model that learns")
    soft_prompt: SoftPromptConfig = group(SoftPromptConfig, "for the view 'prompted'")
    in_context: InContextConfig = group(InContextConfig, "for the view 'in_context'")
    cache: CacheConfig = group(CacheConfig, "for the view 'cached'")
    data: DataConfig = group(DataConfig, "records, and how they become rows")
    stages: tuple[StageConfig, ...] = field(
        (),
        ListOf(Group(StageConfig), nonempty=True),
        "one after the other, each made by recipes.method_stage or stage_config",
    )
    data_free: DataFree = group(
        DataFree, "prompts that the teacher writes, for data.train = 'teacher'"
    )
    teacher_responses: TeacherResponsesConfig = group(
        TeacherResponsesConfig, "what the teacher writes before training"
    )
    evaluation: EvaluationConfig = group(EvaluationConfig, "scores on data.dev")
    checkpoint: CheckpointConfig = group(CheckpointConfig, "what a run saves")
    mesh: MeshConfig = group(MeshConfig, "devices by axis; -1 for one of them: all that are left")
    offload_optimizer_state: bool = field(False, Bool(), "whether moments lie in the host's memory")
    log_every: int = field(1, Int(low=1), "steps between lines of metrics")
    stop_after_skipped: int = field(
        10, Int(low=1), "updates in a row without a finite gradient that end the run"
    )
    stop_after_seconds: float = field(0.0, Float(low=0.0), "of training; 0: no limit")


# Fields that do not change the student that comes out, so that they may change between resumes.
NOT_IN_FINGERPRINT = (
    *("title", "log_every", "mesh", "evaluation.samples", "evaluation.prompt_effect"),
    *("teacher.remat", "student.remat", "teacher.offload", "student.offload"),
    *("teacher_responses.path", "cache.path", "data.token_cache", "offload_optimizer_state"),
    *("checkpoint.every", "checkpoint.minutes", "checkpoint.keep"),
)
# Names that fields had before.
RENAMED = {
    "micro_batches": "gradient_accumulation_steps",
    "rollout_slots": "max_concurrent_rollouts",
    "stale_rollouts": "one_step_off_policy",
    "regularisation": "regularization",
    "regularisation_schedule": "regularization_schedule",
    "prompt_regulariser": "prompt_regularizer",
    "length_normalise": "length_normalize",
    "lr_min": "min_lr",
    "clip": "max_grad_norm",
    "adam_b2": "adam_beta2",
    "answers": "teacher_responses",
}


class Entry(NamedTuple):
    """A line of the table: the path of a field or group, its default, what it may be, its help."""

    path: str
    default: Any
    spec: Any
    text: str

    @property
    def is_group(self) -> bool:
        """Whether fields are below it, or below its elements."""
        return isinstance(getattr(self.spec, "spec", self.spec), Group)

    @property
    def required(self) -> bool:
        """Whether a config has to give it, since its default is none that it may be."""
        single = isinstance(self.spec, Group)
        return not single and any(mistakes(self.path, self.default, self.spec))


def entries(defaults: Any = RunConfig(), path: str = "") -> Iterator[Entry]:
    """Yields the plain fields of a group, and then its groups, each with all that is below it; of a
    list of groups the fields of an element, as `[i]`."""
    groups = []
    for name, f in declared(type(defaults)).items():
        at = f"{path}.{name}".removeprefix(".")
        entry = Entry(at, getattr(defaults, name), f.metadata["spec"], f.metadata["help"])
        if entry.is_group:
            groups.append(entry)
        else:
            yield entry
    for entry in groups:
        yield entry
        if isinstance(entry.spec, ListOf):
            yield from entries(entry.spec.spec.cls(), f"{entry.path}[i]")
        else:
            yield from entries(entry.default, entry.path)
