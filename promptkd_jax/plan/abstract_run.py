"""A run of which nothing is loaded: shapes, dtypes and, on a mesh, shardings of all that it keeps.

The state is that of `experiment.Experiment`, made by the same functions from models that have
shapes instead of parameters.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from promptkd_jax.data.batch import Batch
from promptkd_jax.data.records import read_records
from promptkd_jax.data.top_k import TopK
from promptkd_jax.infra import sharding
from promptkd_jax.infra.errors import ConfigError, ModelError
from promptkd_jax.infra.files import io_errors, is_remote, to_path
from promptkd_jax.models.config import DecoderConfig
from promptkd_jax.models.decoder import Decoder
from promptkd_jax.models.families.registry import PUBLISHED, from_hugging_face
from promptkd_jax.models.io.hub import download, hub_id, resolve_model, student_of_run
from promptkd_jax.models.io.params import abstract_params
from promptkd_jax.models.io.safetensors import read_json
from promptkd_jax.models.model import Model, chosen_layers, end_ids
from promptkd_jax.models.random_model import PREFIX, synthetic_config
from promptkd_jax.training import build
from promptkd_jax.training.checks import needs_the_teacher
from promptkd_jax.training.experiment import Experiment, Stage
from promptkd_jax.training.fields import ModelConfig, RunConfig
from promptkd_jax.training.prepare import projections, stage_optimizers
from promptkd_jax.training.recipes import DOLLY_ROWS

UNKNOWN_STEPS = 1000  # where a schedule needs a number and nobody knows how many rows there are


@dataclasses.dataclass(frozen=True)
class AbstractRun:
    """The parts of a run, its `index`-th stage the one that is looked at.

    `params` of teacher and student are shapes. `learned`: as in `Experiment`. `steps` of the stage
    is None where the number of rows is unknown. `notes` say what was assumed.
    """

    config: RunConfig
    index: int
    teacher: Model | None
    student: Model
    learned: dict[str, Any]
    vocab_size: int
    steps: int | None
    stages: tuple[Stage, ...]
    notes: tuple[str, ...]

    @property
    def stage(self) -> Stage:
        """The one that is looked at."""
        return self.stages[self.index]

    @property
    def batch_size(self) -> int:
        """Rows of a step, over all devices."""
        return self.config.stages[self.index].batch_size

    def with_micro_batches(self, number: int) -> "AbstractRun":
        """The same run, its rows dealt out to so many micro-batches."""
        execution = self.stage.method.execution
        execution = dataclasses.replace(execution, gradient_accumulation_steps=number)
        method = dataclasses.replace(self.stage.method, execution=execution)
        stages = list(self.stages)
        stages[self.index] = dataclasses.replace(self.stage, method=method)
        return dataclasses.replace(self, stages=tuple(stages))

    def on(self, mesh: Mapping[str, int]) -> "AbstractRun":
        """The same run with its models padded for a mesh of these sizes."""
        teacher, student = (
            model and _with_config(model, model.decoder.config.replace(tensor_parts=mesh["tensor"]))
            for model in (self.teacher, self.student)
        )
        learned = dict(self.learned)
        if "teacher" in learned:
            learned["teacher"] = _in_float32(teacher.params)
        return dataclasses.replace(self, teacher=teacher, student=student, learned=learned)

    def experiment(self, mesh: Any) -> Experiment:
        """The one that `prepare.prepare` makes, but of shapes. The mesh may be abstract."""
        padded = self.on(mesh.shape)
        return Experiment(
            config=self.config,
            teacher=padded.teacher,
            student=padded.student,
            learned=padded.learned,
            vocab_size=self.vocab_size,
            dev=None,
            stages=self.stages,
            mesh=mesh,
        )

    def arguments(self, mesh: Any) -> tuple[Any, Any, Batch, Batch | None]:
        """State, teacher, rows and corpus of a train step, each array a ShapeDtypeStruct with the
        sharding that it has in the run.

        Raises:
          ConfigError: an axis of the mesh does not divide a parameter, or the rows.
        """
        check_mesh_rows(self, mesh)
        experiment = self.experiment(mesh)
        state, teacher = experiment.abstract_state(), None
        if experiment.teacher is not None:
            params = experiment.teacher.params
            teacher = jax.tree.map(_struct, params, sharding.shardings(params, mesh))
        where = sharding.rows_sharding(mesh, self.batch_size)
        rows = functools.partial(self._rows, where=where)
        method = self.stage.method
        cached = self.config.cache.top_k if method.teacher_view == "cached" else 0
        return state, teacher, rows(cached), rows(0) if method.corpus_terms else None

    def _rows(self, cached: int, where: Any) -> Batch:
        rows, columns = self.batch_size, self.config.data.max_length

        def struct(*shape, dtype=jnp.int32):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

        top_k = None
        if cached:
            shape = (rows, self.stage.method.response_capacity, cached)
            values, tail = (struct(*s, dtype=jnp.float32) for s in (shape, shape[:2]))
            top_k = TopK(struct(*shape), values, tail)
        return Batch(struct(rows, columns), struct(rows), struct(rows), top_k)


def abstract_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
    """A mesh of no devices at all, of these sizes along `data`, `fsdp`, `tensor`."""
    axes = sharding.AXES
    return AbstractMesh(tuple(sizes[axis] for axis in axes), axes, axis_types=(AxisType.Auto,) * 3)


def check_mesh_rows(run: AbstractRun, mesh: Any) -> None:
    """Raises ConfigError where rows cannot be dealt out evenly to the devices."""
    where = f"config.stages[{run.index}]"
    slots = run.config.stages[run.index].max_concurrent_rollouts
    sharding.check_rows(f"{where}.batch_size", run.batch_size, run.stage.method.parts, mesh)
    sharding.check_rows(f"{where}.max_concurrent_rollouts", slots, 1, mesh)


def abstract_run(config: RunConfig, stage: str | None = None, rows: int = 0) -> AbstractRun:
    """The run of a checked config.

    Args:
      stage: the name of the one that is looked at; by default the last.
      rows: of the training data; 0 for those of a local file, or of Dolly.

    Raises:
      ConfigError: no such stage. ModelError: a model of unknown or unsupported shape.
    """
    index, notes = _stage_index(config, stage), []
    teacher, student = _models(config, notes)
    vocab_size = student.vocab_size
    if teacher is not None:
        vocab_size = min(vocab_size, teacher.vocab_size)
    rows, source = (rows, "given") if rows else _training_rows(config)
    notes.append(f"{rows:,} training rows: {source}" if rows else f"training rows: {source}")
    stages, steps = [], None
    for number, chosen in enumerate(config.stages):
        its_steps = build.stage_steps(chosen, rows) if chosen.steps or rows else None
        if number == index:
            steps = its_steps
        made = _stage(config, number, its_steps or UNKNOWN_STEPS, (teacher, student), vocab_size)
        stages.append(made)
    if any(chosen.teacher_view == "in_context" for chosen in config.stages):
        notes.append("a demonstration is taken to be half as long as the longest row")
    return AbstractRun(
        config=config,
        index=index,
        teacher=teacher,
        student=student,
        learned=_learned(config, teacher, student),
        vocab_size=vocab_size,
        steps=steps,
        stages=tuple(stages),
        notes=tuple(notes),
    )


def stored_config(path: str) -> tuple[dict[str, Any], str]:
    """The `config.json` of a model, and where it is from: its folder or file, the built-in table
    (see `families.registry.PUBLISHED`), or the hub.

    Raises:
      ModelError: it is nowhere, or no JSON.
    """
    if path.startswith(PREFIX):
        return synthetic_config(path)[0], "made by the package"
    try:
        return _stored_config(path)
    except io_errors(path) as error:
        raise ModelError(f"model {path!r}: cannot be read: {error}") from error


def _stored_config(path: str) -> tuple[dict[str, Any], str]:
    local = to_path(path)
    if local.suffix == ".gguf":
        from promptkd_jax.models.io.gguf import open_gguf

        return open_gguf(str(resolve_model(path))).config, "its file"
    if local.exists():
        return read_json(student_of_run(local) / "config.json"), "its folder"
    if is_remote(path):
        raise ModelError(f"model {path!r}: no such folder or file in the bucket")
    repository, _ = hub_id(path)
    if repository in PUBLISHED:
        return PUBLISHED[repository], "the built-in table of architectures"
    return read_json(download(path, ["config.json"]) / "config.json"), "the hub"


def _models(config: RunConfig, notes: list[str]) -> tuple[Model | None, Model]:
    """(teacher, student), as `prepare.load_models` chooses them."""
    teacher, measured = None, config.evaluation.teacher and config.teacher.path
    if needs_the_teacher(config) or measured:
        teacher = _model(config.teacher.path, config.teacher, notes, "teacher")
    if config.student.path:
        student = _model(config.student.path, config.student, notes, "student")
    else:
        depth = teacher.decoder.config.num_layers
        kept = chosen_layers(depth, config.student.layers)
        student = _model(config.teacher.path, config.student, notes, "student", len(kept))
    eos_ids = end_ids(teacher, student)
    teacher = teacher and teacher.replace(eos_ids=eos_ids)
    return teacher, student.replace(eos_ids=eos_ids)


def _model(path: str, how: ModelConfig, notes: list[str], role: str, depth: int = 0) -> Model:
    hf_config, source = stored_config(path)
    decoder = from_hugging_face(hf_config, f"{path}: config").replace(
        dtype=how.dtype, param_dtype=how.param_dtype, remat=build.remat(how)
    )
    decoder = decoder.replace(num_layers=depth or decoder.num_layers)
    params = _params(decoder)
    size = sum(x.size for x in jax.tree.leaves(params))
    notes.append(f"{role}: {path}, {size / 1e9:.3g} B parameters, shapes from {source}")
    found = hf_config.get("eos_token_id")
    eos_ids = tuple(found) if isinstance(found, list) else (found or 0,)
    return Model(path, Decoder(decoder), params, dict(hf_config), None, eos_ids)


def _with_config(model: Model, config: DecoderConfig) -> Model:
    return model.replace(decoder=Decoder(config), params=_params(config))


@functools.cache
def _params(config: DecoderConfig) -> Any:
    """Shapes of a decoder's parameters, traced once: a search asks for each micro-batch."""
    return abstract_params(config)


def _stage_index(config: RunConfig, name: str | None) -> int:
    names = [stage.name for stage in config.stages]
    if name is None:
        return len(names) - 1
    if name not in names:
        raise ConfigError(f"--stage: {name!r} is no stage; there are {', '.join(names)}")
    return names.index(name)


def _training_rows(config: RunConfig) -> tuple[int, str]:
    """How many there are, 0 where only reading the data would tell, and what was counted."""
    train = config.data.train
    if train == "teacher":
        return config.data_free.requests, "config.data_free.requests, all of them answered"
    if train == "databricks/databricks-dolly-15k":
        return DOLLY_ROWS, "the published split of Dolly"
    if train.startswith(("package:", "synthetic:")):
        return len(read_records(train, need_output=False)), f"all of {train}"
    if not is_remote(train) and (file := to_path(train)).is_file():
        with file.open("rb") as lines:
            count = sum(1 for line in lines if line.strip())
        return count, f"the lines of {train} that are not blank, too long ones included"
    return 0, f"not counted, {train} is no file here; --rows gives their number"


def _stage(config: RunConfig, index: int, steps: int, models, vocab_size: int) -> Stage:
    """The stage that `prepare.prepare` makes, every row as long as the config allows."""
    stage, (_, student) = config.stages[index], models
    room = config.data.max_length - config.data.max_prompt_length
    shown = config.in_context.examples * (config.data.max_length // 2)
    method = build.make_method(
        config,
        stage,
        steps=steps,
        longest_response=room,
        vocab_size=vocab_size,
        eos_ids=student.eos_ids,
        demonstrations=(0,) * shown,
    )
    return Stage(
        name=stage.name,
        index=index,
        first=0,
        steps=steps,
        method=method,
        optimizers=stage_optimizers(config, stage, models, method),
        learning_rate=build.learning_rate(
            stage, stage.learning_rate, steps * method.updates, method.conventions
        ),
        batches=None,
        corpus=None,
    )


def _learned(config: RunConfig, teacher: Model | None, student: Model) -> dict[str, Any]:
    """Shapes of what is trained beside the student."""
    learned, views = {}, {stage.teacher_view for stage in config.stages}
    if "prompted" in views:
        shape = (config.soft_prompt.length, teacher.decoder.config.width)
        learned["soft_prompt"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    if "online" in views:
        learned["teacher"] = _in_float32(teacher.params)
    if made := jax.eval_shape(lambda: projections(config, teacher, student, jax.random.key(0))):
        learned["projection"] = made
    return learned


def _in_float32(params: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), params)


def _struct(leaf: Any, place: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
