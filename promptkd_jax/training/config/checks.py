"""The check of a run's config: ranges, and the facts that need two fields to see."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from ml_collections import ConfigDict

from promptkd_jax.distill.methods.method_checks import contradictions
from promptkd_jax.distill.methods.method_fields import POLICY_GRADIENT
from promptkd_jax.infra import sharding
from promptkd_jax.infra.errors import ConfigError
from promptkd_jax.infra.specs import Group, build, mistakes
from promptkd_jax.training.config.config_file import as_dict, read_config
from promptkd_jax.training.config.field_specs import TEACHER
from promptkd_jax.training.config.fields import RENAMED, LoRAConfig, RunConfig, StageConfig


def read_run(arguments: Sequence[str]) -> RunConfig:
    """Reads the config of a command line, `--config=FILE[:arg] --config.a.b=VALUE …`.

    Raises:
      ConfigError: no such file, an argument that is not about the config; or as `checked`.
    """
    faults: list[str] = []
    return checked(read_config(arguments, faults), faults)


def checked(config: ConfigDict, faults: Sequence[str] = ()) -> RunConfig:
    """Reads the config of a run into dataclasses; below this no function sees a `ConfigDict`.

    Args:
      faults: of the overrides, told with those of the values.

    Raises:
      ConfigError: every mistake, each with its path and what would be right.
    """
    run, wrong = _read(config, RunConfig)
    doubtful = set(map(_field_of, wrong))
    # A contradiction names all fields that it is about: it cannot be judged if one is wrong.
    judged = [
        line
        for line in _contradictions(run)
        if doubtful.isdisjoint(name for name in re.findall(r"\w+", line))
    ]
    if found := [*faults, *wrong, *judged]:
        raise ConfigError("\n".join(found))
    return run


def read_group(config: ConfigDict, cls: type) -> Any:
    """Reads a `ConfigDict` into the dataclass `cls`, whose fields `specs.field` declares.

    Raises:
      ConfigError: all fields that are missing, unknown, of a wrong type or out of range.
    """
    made, wrong = _read(config, cls)
    if wrong:
        raise ConfigError("\n".join(wrong))
    return made


def contradictions_of(run: RunConfig) -> list[str]:
    """The facts of a config in dataclasses that go against one another."""
    return list(_contradictions(run))


def _read(config: ConfigDict, cls: type) -> tuple[Any, list[str]]:
    """The dataclass, with defaults for what is wrong, and every mistake."""
    values = as_dict(config)
    wrong = [mistake.message for mistake in mistakes("config", values, Group(cls), RENAMED)]
    return build(cls, values, "config", wrong), wrong


def _field_of(mistake: str) -> str:
    """The name of the field that a mistake is about, or may have been meant for."""
    meant = re.search(r"(?:did you mean|is now called) (\w+)", mistake)
    path = re.sub(r"(\[\d+\])+$", "", mistake.partition(": ")[0])
    return meant[1] if meant else path.rpartition(".")[2]


def _student_contradictions(config: RunConfig):
    if not config.student.path and not config.student.layers:
        yield "config.student: give a path, or the number of teacher layers to start from (layers)"
    if config.student.path and config.student.layers:
        yield "config.student.layers: is for a student without a path of its own; set it to 0"
    lora, plain = config.student.lora, LoRAConfig()
    if lora.rank and lora.path:
        yield (
            f"config.student.lora.rank: {lora.rank}, but the adapter of config.student.lora.path "
            "has a rank of its own; expected 0"
        )
    names = ("alpha", "use_rslora", "dropout", "target_modules")
    given = [name for name in names if getattr(lora, name) != getattr(plain, name)]
    if given and lora.path:
        yield (
            f"config.student.lora.{given[0]}: is for a new adapter, and that of "
            f"config.student.lora.path has its own; expected {getattr(plain, given[0])!r}"
        )
    if given and not lora.is_used:
        yield (
            f"config.student.lora.{given[0]}: is for an adapter, and there is none; expected "
            f"{getattr(plain, given[0])!r}, or config.student.lora.rank above 0"
        )
    if lora.dropout and not any(stage.dropout for stage in config.stages):
        yield (
            f"config.student.lora.dropout: {lora.dropout:g}, but no stage has dropout; expected 0, "
            "or config.stages[i].dropout = True"
        )


def _frozen_contradictions(config: RunConfig):
    lora = config.student.lora
    if config.student.offload and not lora.is_used:
        yield (
            "config.student.offload: all of the student is trained; expected False, or "
            "config.student.lora.rank above 0"
        )
    if config.student.offload and config.student.layers:
        yield "config.student.offload: is for a student with a path of its own; expected False"
    online = any(stage.teacher_view == "online" for stage in config.stages)
    if config.teacher.offload and online:
        yield "config.teacher.offload: a teacher_view 'online' trains the teacher; expected False"
    if config.student.quantize != "none" and not lora.is_used:
        yield (
            f"config.student.quantize: {config.student.quantize!r}: rounded kernels are not "
            "trained, but an adapter beside them is; expected 'none', or config.student.lora.rank "
            "above 0"
        )
    for index, stage in enumerate(config.stages):
        if stage.teacher_view == "online" and config.teacher.quantize != "none":
            yield (
                f"config.stages[{index}].teacher_view: 'online' trains the teacher, and rounded "
                "kernels are not trained; expected 'none' as config.teacher.quantize"
            )
        if stage.rollout_quantize != "none":
            for name, plain in (("quantize", "none"), ("offload", False)):
                if (chosen := getattr(config.student, name)) != plain:
                    yield (
                        f"config.stages[{index}].rollout_quantize: {stage.rollout_quantize!r}, but "
                        f"config.student.{name} = {chosen!r}: rounds kernels that are neither "
                        "rounded nor in the host's memory; expected 'none' as rollout_quantize"
                    )
        policy = any(name == POLICY_GRADIENT for name, _ in stage.student_terms)
        writers = ["student", *(["teacher"] if stage.teacher_share else [])] if policy else []
        for name in writers:
            kept = getattr(config, name).kv_cache_dtype
            if kept != "auto":
                yield (
                    f"config.{name}.kv_cache_dtype: {kept!r} rounds the distribution that rows are "
                    f"drawn from, and config.stages[{index}] has a policy gradient, which supposes "
                    "the exact one; expected 'auto'"
                )


def _stages_contradictions(config: RunConfig):
    for index, stage in enumerate(config.stages):
        path = f"config.stages[{index}]"
        yield from _stage_contradictions(path, stage, config)
        if any(other.name == stage.name for other in config.stages[:index]):
            yield f"{path}.name: {stage.name!r} is the name of an earlier stage too"
    ahead = {stage.batch_size for stage in config.stages if stage.one_step_off_policy}
    if len(ahead) > 1:
        yield (
            f"config.stages: batch_size is {' and '.join(map(str, sorted(ahead)))} in stages with "
            "one_step_off_policy; the rows written ahead have one place in a checkpoint, expected "
            "one batch_size"
        )
    kernels = {(stage.transport.epsilon, stage.transport.neighbours) for stage in config.stages}
    if len(kernels) > 1 and any(stage.needs_token_kernel for stage in config.stages):
        yield (
            "config.stages: transport.epsilon and transport.neighbours differ between stages, and "
            "a run has one kernel of the teacher's tokens; expected one of each"
        )
    kinds = dict.fromkeys(stage.optimizer for stage in config.stages)
    if len(kinds) > 1:
        yield (
            f"config.stages: optimizer is {' and '.join(map(repr, kinds))}; a checkpoint has one "
            "structure in all stages, expected one optimizer"
        )


def _contradictions(config: RunConfig):
    data = config.data
    if data.max_prompt_length >= data.max_length:
        yield (
            f"config.data.max_prompt_length: {data.max_prompt_length} leaves no room for a "
            f"response within config.data.max_length = {data.max_length}"
        )
    if data.template != "chat":
        for name in ("system", "chat_template", "chat_template_kwargs"):
            if getattr(data, name):
                yield (
                    f"config.data.{name}: template {data.template!r} renders a turn of the user "
                    "alone; expected 'chat' as config.data.template, or nothing here"
                )
    if data.chat_template == TEACHER and not config.teacher.path:
        yield "config.data.chat_template: 'teacher' needs config.teacher.path"
    if data.supervise != "last":
        for index, stage in enumerate(config.stages):
            if stage.teacher_view == "in_context" and stage.source.on_policy:
                yield (
                    f"config.stages[{index}].teacher_view: 'in_context' shows conversations of the "
                    "data, whose turns would be prompts too; expected data.supervise = 'last'"
                )
    yield from _student_contradictions(config)
    yield from _frozen_contradictions(config)
    sizes = list(config.mesh.sizes.values())
    if sizes.count(-1) > 1:
        yield "config.mesh: at most one of data, fsdp and tensor may be -1"
    if 0 in sizes:
        yield "config.mesh: a size is at least 1, or -1 for the rest"
    if config.checkpoint.export == "best" and not config.evaluation.every:
        yield "config.checkpoint.export: 'best' needs scores; set config.evaluation.every"
    yield from _stages_contradictions(config)
    if not config.teacher.path and needs_the_teacher(config):
        yield "config.teacher.path: is empty, but the recipe needs a teacher"
    if data.dev == "teacher" and config.evaluation.references == "gold":
        yield (
            "config.evaluation.references: 'gold', and prompts that the teacher writes have no "
            "gold responses; expected 'teacher', or a file for config.data.dev"
        )
    shown = [one.name for one in config.stages if one.teacher_view == "in_context"]
    if data.train == "teacher" and (shown or config.soft_prompt.init == "examples"):
        yield (
            "config.in_context: demonstrations are gold responses, and prompts that the teacher "
            "writes have none; expected another teacher_view, or another soft_prompt.init"
        )
    if data.train == "teacher" and data.train_rows:
        yield (
            "config.data.train_rows: the prompts that the teacher writes are as many as "
            f"config.data_free.requests says; expected 0, found {data.train_rows}"
        )
    if data.dev == "teacher" and (data.train != "teacher" or not data.dev_rows):
        yield (
            "config.data.dev: 'teacher' takes dev_rows of the prompts that the teacher writes; "
            "expected data.train = 'teacher' and data.dev_rows above 0"
        )


def check_mesh(config: RunConfig, mesh: Any, stages: Iterable[int] | None = None) -> None:
    """Raises ConfigError where rows of a stage, of all or of those with the indices `stages`,
    cannot be dealt out evenly to the devices of a mesh, which may be an abstract one."""
    for index in range(len(config.stages)) if stages is None else stages:
        path, stage = f"config.stages[{index}]", config.stages[index]
        for name, number in _rows_of_step(stage).items():
            sharding.check_rows(f"{path}.{name}", number, mesh, parts=stage.num_micro_batches)
        if stage.rollouts_per_prompt > 1:
            what = f"{path}.rollouts_per_prompt: {stage.rollouts_per_prompt} of {stage.batch_size}"
            sharding.check_rows(f"{what} rows; prompts", stage.prompts_per_step, mesh)
        slots = stage.max_concurrent_rollouts
        sharding.check_rows(f"{path}.max_concurrent_rollouts", slots, mesh)


def _rows_of_step(stage: StageConfig) -> dict[str, int]:
    """The rows of the arrays that a step gets, by the field that says so: packed ones, or all of
    them; and those of a corpus."""
    names = ["packed_rows"] if stage.packed_rows else []
    names += ["batch_size"] if stage.corpus_terms or not names else []
    return {name: getattr(stage, name) for name in names}


def needs_the_teacher(config: RunConfig) -> bool:
    """Whether a run looks at the teacher at all, before, during or after training."""
    return (
        not config.student.path
        or config.evaluation.references == "teacher"
        or config.data.train == "teacher"
        or any(stage.source.teacher_writes for stage in config.stages)
        or any(stage.needs_teacher for stage in config.stages)
    )


def _row_contradictions(path: str, stage: StageConfig):
    """Counts of a step's rows that do not go together."""
    if stage.batch_size % stage.rollouts_per_prompt:
        yield (
            f"{path}.rollouts_per_prompt: {stage.rollouts_per_prompt} do not divide batch_size = "
            f"{stage.batch_size}"
        )
    for name, number in _rows_of_step(stage).items():
        if number % stage.num_micro_batches:
            yield (
                f"{path}.gradient_accumulation_steps: {stage.gradient_accumulation_steps} in each "
                f"of {stage.minibatches} minibatches do not divide {name} = {number}"
            )
    if stage.packed_rows > stage.batch_size:
        yield (
            f"{path}.packed_rows: {stage.packed_rows} are more than the rows that are packed into "
            f"them; expected at most batch_size = {stage.batch_size}, or 0"
        )
    if stage.max_concurrent_rollouts > stage.batch_size:
        yield (
            f"{path}.max_concurrent_rollouts: {stage.max_concurrent_rollouts} are more than a step "
            f"has rows; expected at most batch_size = {stage.batch_size}, or 0 for all of them"
        )


def _stage_contradictions(path: str, stage: StageConfig, config: RunConfig):
    if (stage.steps > 0) == (stage.epochs > 0):
        yield f"{path}: give either steps or epochs (the other 0)"
    yield from _row_contradictions(path, stage)
    gated = stage.teacher_view == "prompted" and config.soft_prompt.gated
    if stage.packed_rows and gated:
        yield (
            f"{path}.packed_rows: {stage.packed_rows}, but a gated soft prompt can stand in front "
            "of a whole row alone; expected 0, or config.soft_prompt.gated = False"
        )
    if stage.prompt_warmup_steps and gated:
        yield (
            f"{path}.prompt_warmup_steps: {stage.prompt_warmup_steps}, but behind closed gates the "
            "prompted teacher is the plain one, and L_reg has no gradient; expected 0, or "
            "config.soft_prompt.gated = False"
        )
    yield from (f"{path}.{mistake}" for mistake in contradictions(stage, stage, stage.sampling))
    if stage.teacher_view == "cached":
        if not config.cache.path:
            yield f"{path}.teacher_view: 'cached' needs config.cache.path (see promptkd cache)"
        if stage.source.teacher_writes:
            yield (
                f"{path}.targets: promptkd cache reads the data's own responses, not those that "
                "the teacher writes; expected 'gold'"
            )
        if stage.prompt_learning_rate:
            yield (
                f"{path}.prompt_learning_rate: a cached teacher cannot be prompted, its "
                "log-probabilities were written without a prompt; expected 0, or "
                "teacher_view = 'prompted'"
            )
    if stage.corpus_terms and not config.data.corpus:
        yield f"{path}.corpus_terms: need config.data.corpus, a file of plain text"
    if stage.source.keeps_replay:
        if stage.replay.capacity < stage.batch_size:
            yield (
                f"{path}.replay.capacity: {stage.replay.capacity} is less than one batch; expected "
                f"at least batch_size = {stage.batch_size}"
            )
        if not config.evaluation.every:
            yield (
                f"{path}.targets: 'replay' goes by the validation loss; set config.evaluation.every"
            )
    if config.data.train == "teacher" and stage.reads_responses:
        yield (
            f"{path}.targets: {stage.targets!r} needs gold responses, and prompts that the teacher "
            "writes have none; expected 'teacher' or 'student'"
        )
    elif config.data.train == "teacher" and stage.needs_responses:
        yield (
            f"{path}.prompt_fallback: compares the two teachers on gold responses, and prompts "
            "that the teacher writes have none; expected False"
        )
