"""A run of which nothing is loaded: the experiment that `prepare.prepare` makes, made of shapes."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from promptkd_jax.data.batch import Batch
from promptkd_jax.data.reading.record_stream import read_records
from promptkd_jax.data.reading.sources import read_fields
from promptkd_jax.data.top_k import TopK
from promptkd_jax.distill.losses.transport import Neighbours, TokenKernel
from promptkd_jax.distill.targets import rows_at_once
from promptkd_jax.infra import sharding
from promptkd_jax.infra.errors import ConfigError, Faults, ModelError
from promptkd_jax.infra.files import io_errors, is_remote, to_path
from promptkd_jax.models.config import DecoderConfig
from promptkd_jax.models.decoder import Decoder
from promptkd_jax.models.families.registry import PUBLISHED, from_hugging_face
from promptkd_jax.models.io.hub import download, hub_id, resolve_model, student_of_run
from promptkd_jax.models.io.params import abstract_params
from promptkd_jax.models.io.safetensors import read_json
from promptkd_jax.models.layers.quantization import QUANTIZE
from promptkd_jax.models.model import Model, keep_layers_config
from promptkd_jax.models.random_model import PREFIX, synthetic_config
from promptkd_jax.training import build
from promptkd_jax.training.config.checks import check_mesh
from promptkd_jax.training.config.fields import ModelConfig, RunConfig, StageConfig
from promptkd_jax.training.experiment import Experiment, Stage, sharded_model
from promptkd_jax.training.prepare import init_learned
from promptkd_jax.training.recipes import DOLLY_ROWS
from promptkd_jax.training.run_models import check_quantized, choose_models, lora_of

UNKNOWN_STEPS = 1000  # where a schedule needs a number and nobody knows how many rows there are


@dataclasses.dataclass(frozen=True)
class AbstractRun(Experiment):
    """An experiment of shapes, its `index`-th stage the one that is looked at.

    `num_steps` of that stage is None where the number of rows is unknown. `notes` say what was
    assumed.
    """

    index: int
    num_steps: int | None
    notes: tuple[str, ...]

    @property
    def stage(self) -> Stage:
        """The one that is looked at."""
        return self.stages[self.index]

    @property
    def batch_size(self) -> int:
        """Rows of a step, packed if they are, over all devices."""
        stage = self.config.stages[self.index]
        return stage.packed_rows or stage.batch_size

    @property
    def rows_at_once(self) -> int:
        """Of a step's rows, those that are written at once on the run's mesh; all of them where
        none are written, see `targets.rows_at_once`."""
        method, row_parts = self.stage.method, self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        if not method.source.on_policy:
            return self.batch_size
        return rows_at_once(method, self.student.decoder, self.batch_size, row_parts)

    def with_micro_batches(self, number: int) -> "AbstractRun":
        """The same run, the rows of its stage dealt out to so many micro-batches."""
        change = {"gradient_accumulation_steps": number}
        configs, stages = list(self.config.stages), list(self.stages)
        configs[self.index] = dataclasses.replace(configs[self.index], **change)
        execution = dataclasses.replace(self.stage.method.execution, **change)
        method = dataclasses.replace(self.stage.method, execution=execution)
        stages[self.index] = dataclasses.replace(self.stage, method=method)
        config = dataclasses.replace(self.config, stages=tuple(configs))
        return dataclasses.replace(self, config=config, stages=tuple(stages))

    def on(self, mesh: Mesh | AbstractMesh) -> "AbstractRun":
        """The same run on another mesh, its models padded for that. Raises ConfigError where it
        cuts pairs of int4."""

        def padded(model, field):
            config = model.decoder.config.replace(tensor_parts=mesh.shape["tensor"])
            check_quantized(config, field, model.name, mesh)
            return _with_config(model, config)

        teacher = self.teacher and padded(self.teacher, "teacher")
        student = padded(self.student, "student")
        return dataclasses.replace(
            self,
            teacher=teacher,
            student=student,
            learned=_learned(self.config, teacher, student),
            mesh=mesh,
        )

    def arguments(self) -> tuple[Any, Any, Batch, Batch | None, Any, TokenKernel | None]:
        """State, teacher, rows, corpus, frozen student and token kernel of a train step, each array
        a ShapeDtypeStruct with the sharding that it has in the run.

        Raises:
          ConfigError: an axis of the mesh does not divide a parameter, or the rows.
        """
        check_mesh(self.config, self.mesh, [self.index])
        state = self.abstract_state()
        teacher = self.teacher and sharded_model(self.teacher, self.mesh)
        frozen = self.frozen_student
        if frozen is not None:
            frozen = sharded_model(self.student.replace(params=frozen), self.mesh)
        method = self.stage.method
        cached = self.config.cache.top_k if method.teacher_view == "cached" else 0
        stage = self.config.stages[self.index]
        packed = stage.packed_rows > 0
        whole = _has_whole_rows(self.config, stage) or packed
        number = stage.packed_rows or stage.prompts_per_step
        rows = self._rows(number, cached, whole, packed)
        corpus = self._rows(stage.batch_size) if method.corpus_terms else None
        return state, teacher, rows, corpus, frozen, self._token_kernel()

    def _token_kernel(self) -> TokenKernel | None:
        """With all neighbours that were asked for and as many others, if the stage needs one."""
        method = self.stage.method
        if not method.needs_token_kernel:
            return None
        place = NamedSharding(self.mesh, sharding.P())
        tokens, width = self.vocab_size, 2 * method.transport.neighbours
        ids, columns, entries = (
            jax.ShapeDtypeStruct(shape, dtype, sharding=place)
            for shape, dtype in (
                ((tokens,), jnp.int32),
                ((tokens, width), jnp.int32),
                ((tokens, width), jnp.float32),
            )
        )
        return TokenKernel((Neighbours(ids, columns, entries),), self.vocab_size)

    def _rows(self, rows: int, cached: int = 0, whole: bool = False, packed: bool = False) -> Batch:
        columns = self.config.data.max_length
        place = sharding.rows_sharding(self.mesh, rows)

        def struct(*shape, dtype=jnp.int32):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

        top_k = None
        if cached:
            shape = (rows, self.stage.method.response_capacity, cached)
            values, tail = (struct(*s, dtype=jnp.float32) for s in (shape, shape[:2]))
            top_k = TopK(struct(*shape), values, tail)
        supervised = struct(rows, columns, dtype=jnp.bool_) if whole else None
        segment_ids = struct(rows, columns) if packed else None
        ends = struct(rows), struct(rows)
        return Batch(struct(rows, columns), *ends, top_k, supervised, segment_ids)


def _has_whole_rows(config: RunConfig, stage: StageConfig) -> bool:
    """Whether rows of a stage may be conversations with several turns to learn from."""
    return config.data.supervise == "all" and not stage.by_turn


def abstract_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
    """A mesh of no devices at all, of these sizes along `data`, `fsdp`, `tensor`."""
    axes = sharding.AXES
    return AbstractMesh(tuple(sizes[axis] for axis in axes), axes, axis_types=(AxisType.Auto,) * 3)


def abstract_run(config: RunConfig, stage: str | None = None, rows: int = 0) -> AbstractRun:
    """The run of a checked config, on one device.

    Args:
      stage: the name of the one that is looked at; by default the last.
      rows: of the training data; 0 for those of a local file, or of Dolly.

    Raises:
      ConfigError: no such stage. ModelError: a model of unknown or unsupported shape.
    """
    names = [chosen.name for chosen in config.stages]
    if stage not in (None, *names):
        raise ConfigError(f"--stage: {stage!r} is no stage; there are {', '.join(names)}")
    index = names.index(stage or names[-1])
    sources: dict[str, str] = {}  # of the shapes, by the path of a model
    load = functools.partial(_load, config, sources)
    adapt = functools.partial(_with_adapter, config)
    teacher, student = choose_models(config, load, _keep_layers, adapt)
    notes = []
    for role, model in (("teacher", teacher), ("student", student)):
        if model:
            size = num_parameters(model.decoder.config) / 1e9
            source = f"shapes from {sources[model.name]}"
            notes.append(f"{role}: {model.name}, {size:.3g} B parameters, {source}")
    rows, source = (rows, "given") if rows else _training_rows(config)
    notes.append(f"{rows:,} training rows: {source}" if rows else f"training rows: {source}")
    if any(chosen.teacher_view == "in_context" for chosen in config.stages):
        notes.append("a demonstration is taken to be half as long as the longest row")
    vocab_size = min(model.vocab_size for model in (teacher, student) if model)
    stages: list[Stage] = []
    for number, chosen in enumerate(config.stages):
        steps = build.stage_steps(chosen, rows) if chosen.steps or rows else UNKNOWN_STEPS
        made = build.make_stage(
            config,
            number,
            teacher,
            student,
            first=sum(before.steps for before in stages),
            steps=steps,
            longest_response=config.data.max_length
            - (1 if _has_whole_rows(config, chosen) else config.data.max_prompt_length),
            vocab_size=vocab_size,
            demonstrations=(0,) * (config.in_context.examples * (config.data.max_length // 2)),
        )
        stages.append(made)
    return AbstractRun(
        config=config,
        teacher=teacher,
        student=student,
        learned=_learned(config, teacher, student),
        vocab_size=vocab_size,
        train=(),
        dev=None,
        stages=tuple(stages),
        mesh=abstract_mesh(dict.fromkeys(sharding.AXES, 1)),
        index=index,
        num_steps=stages[index].steps if rows or config.stages[index].steps else None,
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


def _load(config: RunConfig, sources: dict[str, str], path: str, field: str) -> Model:
    """The model at a path, of shapes; `sources` is told where these are from."""
    how: ModelConfig = getattr(config, field)
    hf_config, sources[path] = stored_config(path)
    decoder = from_hugging_face(hf_config, f"{path}: config", path).replace(
        dtype=how.dtype,
        param_dtype=how.param_dtype,
        remat=build.remat(how),
        quantization=QUANTIZE[how.quantize],
        offload=how.offload,
        kv_cache_dtype=how.kv_cache_dtype,
    )
    check_quantized(decoder, field, path)
    end = hf_config.get("eos_token_id")
    eos_ids = tuple(end) if isinstance(end, list) else (end or 0,)
    return Model(path, Decoder(decoder), abstract_params(decoder), dict(hf_config), None, eos_ids)


def _keep_layers(model: Model, layers: tuple[int, ...]) -> Model:
    return _with_config(model, keep_layers_config(model.decoder.config, layers))


def _with_adapter(config: RunConfig, student: Model) -> Model:
    lora = lora_of(config, student)
    return _with_config(student, student.decoder.config.replace(lora=lora))


def _with_config(model: Model, config: DecoderConfig) -> Model:
    return model.replace(decoder=Decoder(config), params=abstract_params(config))


def num_parameters(config: DecoderConfig) -> int:
    """How many a decoder has, padding included, in whatever they are kept."""
    return sum(x.size for x in jax.tree.leaves(abstract_params(config.replace(quantization=None))))


def _learned(config: RunConfig, teacher: Model | None, student: Model) -> dict[str, Any]:
    """Shapes of what is trained beside the student."""
    # There is no tokenizer here; the shape of a soft prompt does not depend on how it starts.
    soft_prompt = dataclasses.replace(config.soft_prompt, init="random")
    config = dataclasses.replace(config, soft_prompt=soft_prompt)

    def init(params):
        return init_learned(config, teacher and teacher.replace(params=params), student, 0, ())

    return jax.eval_shape(init, teacher and teacher.params)


def _training_rows(config: RunConfig) -> tuple[int, str]:
    """How many there are, 0 where only reading the data would tell, and what was counted."""
    if config.data.train == "teacher":
        return config.data_free.requests, "config.data_free.requests, all of them answered"
    most = config.data.train_rows
    counts, words = zip(*(_source_rows(source, most) for source, _ in config.data.train_sources))
    return sum(counts) if all(counts) else 0, "; ".join(words)


def _source_rows(train: str, most: int) -> tuple[int, str]:
    """As `_training_rows`, of one source, of which at most so many records are read; 0: all."""
    count, words = _all_rows(train)
    return (most, f"the first {most} of {train}") if 0 < most < count else (count, words)


def _all_rows(train: str) -> tuple[int, str]:
    if train == "databricks/databricks-dolly-15k":
        return DOLLY_ROWS, "the published split of Dolly"
    if train.startswith(("package:", "synthetic:")):
        return len(read_records(train)), f"all of {train}"
    if not is_remote(train) and to_path(train).is_file():
        count = sum(1 for _ in read_fields(train, Faults()))
        return count, f"all of {train}, too long ones included"
    return 0, f"not counted, {train} is no file here; --rows gives their number"
