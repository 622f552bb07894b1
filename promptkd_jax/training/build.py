"""What the fields of a checked config become: stages, their methods, optimizers and schedules."""

import dataclasses
import re

import optax

from promptkd_jax.distill import optimizer
from promptkd_jax.distill.methods.method import PRESETS, Conventions, Method
from promptkd_jax.distill.methods.method_fields import Execution, Objective
from promptkd_jax.distill.state import Optimizers
from promptkd_jax.infra.specs import declared
from promptkd_jax.models.families.registry import FAMILIES
from promptkd_jax.models.model import Model, end_ids
from promptkd_jax.training.config.fields import ModelConfig, RunConfig, StageConfig
from promptkd_jax.training.experiment import Stage, unpadded_shapes


def describe(stage: StageConfig) -> str:
    """A stage in one line: name, where targets come from, divergences, teacher view."""
    terms = " + ".join(f"{weight:g} {name}" for name, weight in stage.student_terms)
    view = "" if stage.teacher_view == "plain" else f", {stage.teacher_view} teacher"
    off = [f"{weight:g} {name} on rows of others" for name, weight in stage.off_policy_terms]
    more = off + [f"{term.weight:g} {term.kind}" for term in stage.hidden_terms]
    more += [f"{weight:g} {name} on a corpus" for name, weight in stage.corpus_terms]
    several = f", {stage.rollouts_per_prompt} to each prompt"
    rows = stage.targets + (several if stage.rollouts_per_prompt > 1 else "")
    return " + ".join([f"{stage.name}: {terms} on rows from {rows}{view}", *more])


def title(config: RunConfig) -> str:
    """The title of a run: the config's own, or one made of its stages, models and data."""
    if config.title:
        return config.title
    names = ", ".join(stage.name for stage in config.stages)
    teacher, student = short_name(config.teacher.path), short_name(config.student.path)
    if not student:
        layers = config.student.layers
        student = f"{layers if isinstance(layers, int) else len(layers)} of its layers"
    taught = any(
        stage.needs_teacher or stage.teacher_view == "cached" or stage.source.teacher_writes
        for stage in config.stages
    )
    models = f"{teacher} into {student}" if taught or not config.student.path else student
    return f"{names}: {models} on {data_name(config)}"


def data_name(config: RunConfig) -> str:
    """The name of the training data."""
    if config.data.train == "teacher":
        return "requests that the teacher wrote"
    return " + ".join(short_name(source) for source, _ in config.data.train_sources)


def short_name(source: str) -> str:
    """The end of a path, of a hub id, or of "package:NAME/FILE": what something is called, and not
    where it lies. The student or teacher of a run is called by the run as well."""
    parts = re.split("[/:]", source.partition("@")[0].rstrip("/"))
    name = re.sub(r"\.(jsonl|json|gguf)$", "", parts[-1])
    return "/".join([*parts[-2:-1], name]) if name in ("student", "teacher") else name


def remat(model: ModelConfig) -> str:
    """The policy of a model's config. "auto" is for `train` to replace; where nothing is trained it
    means nothing."""
    return "full" if model.remat == "auto" else model.remat


def stage_steps(stage: StageConfig, rows: int) -> int:
    """Steps of a stage: as given, or whole batches of so many epochs over `rows` rows."""
    return stage.steps or max(1, int(stage.epochs * (rows // stage.prompts_per_step)))


def make_stage(
    config: RunConfig,
    index: int,
    teacher: Model | None,
    student: Model,
    *,
    first: int,
    steps: int,
    longest_response: int,
    vocab_size: int,
    demonstrations: tuple[int, ...] = (),
) -> Stage:
    """Builds stage `index` of a run, still without data: `steps` steps after the `first` of the
    stages before it.

    Args:
      teacher, student: models, whose parameters may be shapes.
      longest_response: the most response tokens of a row of its data.
      vocab_size: what teacher and student share.
      demonstrations: token ids, for "in_context".
    """
    stage, conventions = config.stages[index], PRESETS[config.preset]
    room = config.data.max_length - config.data.max_prompt_length
    # Of packed rows all tokens may be of responses, but for the first.
    written = config.data.max_length - 1 if stage.packed_rows else longest_response
    capacity = {"student": room, "gold": written, "teacher": written}
    objective = {name: getattr(stage, name) for name in declared(Objective)}
    execution = Execution(**{name: getattr(stage, name) for name in declared(Execution)})
    method = Method(
        **objective,
        execution=execution,
        total_steps=steps,
        response_capacity=capacity.get(stage.targets, max(room, longest_response)),
        max_new_tokens=room,
        prompt_capacity=config.data.max_prompt_length,
        vocab_size=vocab_size,
        demonstrations=demonstrations if stage.teacher_view == "in_context" else (),
        sampling=dataclasses.replace(stage.sampling, eos_ids=end_ids(teacher, student)),
        conventions=conventions,
    )
    return Stage(
        name=stage.name,
        index=index,
        first=first,
        steps=steps,
        method=method,
        optimizers=_optimizers(config, stage, method, teacher, student),
        learning_rate=learning_rate(
            stage, stage.learning_rate, steps * method.updates_per_step, conventions
        ),
    )


def _optimizers(
    config: RunConfig, stage: StageConfig, method: Method, teacher: Model | None, student: Model
) -> Optimizers:
    """The stage's optimizer for the models, AdamW for the few other parameters; each group has its
    own clip and schedule."""
    steps, conventions = method.total_steps, method.conventions
    # Of the student; an online teacher has one update a step.
    updates = steps * method.updates_per_step
    family = FAMILIES[student.decoder.config.family]
    decay_norms = conventions.decay_norms and family.decays_norms

    def make(peak, updates, model=None):
        return optimizer.make_optimizer(
            stage.optimizer if model else "adamw",
            learning_rate(stage, peak, updates, conventions),
            weight_decay=stage.weight_decay,
            max_grad_norm=stage.max_grad_norm,
            b2=stage.adam_beta2,
            decay_mask=model and optimizer.decay_mask(model.trained, decay_norms=decay_norms),
            seed=config.seed,
            unpadded=model and unpadded_shapes(model),
        )

    teacher_rate = stage.teacher_learning_rate or stage.learning_rate
    return Optimizers(
        student=make(stage.learning_rate, updates, student),
        soft_prompt=make(
            stage.prompt_learning_rate or stage.learning_rate, steps * method.prompt_updates
        ),
        teacher=teacher and make(teacher_rate, steps, teacher),
        projection=make(stage.learning_rate, updates),
    )


def learning_rate(
    stage: StageConfig, peak: float, updates: int, conventions: Conventions
) -> optax.Schedule:
    """The stage's schedule over its `updates`, for one of its rates."""
    return optimizer.schedule(
        stage.schedule,
        peak,
        total_steps=updates,
        warmup_steps=stage.warmup_steps,
        min_lr=stage.min_lr,
        cosine_ignores_warmup=conventions.cosine_ignores_warmup,
    )
