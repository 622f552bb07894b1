"""What a run is made of: models, rows, stages, and the jitted step of each stage."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import grain
import jax
import optax
from jax.sharding import NamedSharding

from promptkd_jax.data.batches import stream
from promptkd_jax.data.rows import Rows
from promptkd_jax.distill.losses.transport import TokenKernel
from promptkd_jax.distill.methods.curriculum import first_interpolation
from promptkd_jax.distill.methods.method import Method
from promptkd_jax.distill.replay import empty_replay
from promptkd_jax.distill.state import Optimizers, TrainState, init_state
from promptkd_jax.distill.step import train_step, write_ahead
from promptkd_jax.distill.targets import empty_target_batch
from promptkd_jax.distill.teacher import Models
from promptkd_jax.infra import sharding
from promptkd_jax.models.io.params import abstract_params
from promptkd_jax.models.layers.lora import join
from promptkd_jax.models.model import Model
from promptkd_jax.training.config.fields import RunConfig


@dataclasses.dataclass(frozen=True)
class Stage:
    """Steps `first` + 1 to `first` + `steps` of the run, with one method. `learning_rate` is that
    of the student's updates, of which a step may make several. Where nothing is trained it has no
    `batches`."""

    name: str
    index: int
    first: int
    steps: int
    method: Method
    optimizers: Optimizers
    learning_rate: optax.Schedule
    batches: grain.MapDataset | None = None
    corpus: grain.MapDataset | None = None


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a run is made of; nothing of it changes while it trains.

    `student` is the one that the run starts from, `learned` what is trained beside it, by its group
    in the train state, `vocab_size` what teacher and student share, `dev` the held-out rows with
    their reference answers, `train` the rows to learn from, with their own responses, and then, if
    it writes any, with those of the teacher, `token_kernel` that of the teacher's tokens where a
    stage has "transport". An experiment that is planned has shapes for arrays,
    no rows, and a mesh that may be abstract.
    """

    config: RunConfig
    teacher: Model | None
    student: Model
    learned: dict[str, Any]
    vocab_size: int
    train: tuple[Rows, ...]
    dev: Rows | None
    stages: tuple[Stage, ...]
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh
    token_kernel: TokenKernel | None = dataclasses.field(default=None, kw_only=True)

    @property
    def total_steps(self) -> int:
        """Updates of all stages."""
        return sum(stage.steps for stage in self.stages)

    def name_of_step(self, step: int) -> str:
        """A step in words: which of how many, and in which stage."""
        stage = next(x for x in self.stages if step <= x.first + x.steps)
        return f"step {step} of {self.total_steps}, in stage {stage.name}"

    @property
    def models(self) -> Models:
        """The decoders."""
        return Models(self.student.decoder, self.teacher and self.teacher.decoder)

    @property
    def frozen_student(self) -> Any:
        """The student's parameters beside an adapter that alone is trained; None: all are."""
        return self.student.frozen

    def trained_student(self, trained: Any) -> Model:
        """The student with parameters as a train state has them."""
        frozen = self.frozen_student
        return self.student.replace(params=join(frozen, trained) if frozen else trained)

    @property
    def max_new_tokens(self) -> int:
        """Room for a response beside the longest request."""
        return self.config.data.max_length - self.config.data.max_prompt_length

    def start(self, stage: Stage, before: TrainState | None) -> TrainState:
        """The state at the beginning of a stage, after `before`, whose arrays are donated to it.

        The optimizers start anew; without `before` it is the beginning of the run.
        """
        params = before.params if before else self._params()
        begin = jax.jit(
            lambda params, key: self._init(stage, params, key),
            out_shardings=self.placed(),
            donate_argnums=0,
        )
        key = jax.random.fold_in(jax.random.key(self.config.seed), stage.index)
        state = begin(params, key)
        return state.replace(skipped=before.skipped) if before else state

    def write_ahead(self, stage: Stage, state: TrainState) -> TrainState:
        """The state, donated, with the rows of the stage's first step, where its rows are written
        ahead."""
        if not stage.method.execution.one_step_off_policy:
            return state
        write = functools.partial(write_ahead, method=stage.method, models=self.models)
        write = jax.jit(write, out_shardings=self.placed(), donate_argnums=0)
        batch = sharding.place_rows(next(stream(stage.batches, 0)))
        return write(state, self.teacher and self.teacher.params, batch, self.frozen_student)

    def jitted_step(self, stage: Stage) -> Callable:
        """`train_step` of a stage: (state, teacher, batch, corpus, frozen student) to (state,
        metrics), with the state donated and the metrics on every device."""

        def step(state, *inputs):
            if self.config.offload_optimizer_state:
                state = state.replace(optimizers=sharding.to_device(state.optimizers))
            how = dict(method=stage.method, models=self.models, optimizers=stage.optimizers)
            return train_step(state, *inputs, **how)

        everywhere = NamedSharding(self.mesh, sharding.P())
        return jax.jit(step, out_shardings=(self.placed(), everywhere), donate_argnums=0)

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of a state; they are the same in every stage."""
        return _in_places(self._shapes(self._params()), self.placed())

    def unpadded_state(self) -> TrainState:
        """Shapes and dtypes of a state on one device, the same for every mesh."""
        params = dict(self._params())
        for name, model in (("student", self.student), ("teacher", self.teacher)):
            if name in params:
                params[name] = jax.tree.map(
                    lambda x, here: jax.ShapeDtypeStruct(x.shape, here.dtype),
                    unpadded_shapes(model),
                    params[name],
                )
        return self._shapes(params)

    def placed(self) -> Any:
        """Where every leaf of a state lies on the mesh, in a device's memory or the host's."""
        placed = sharding.shardings(self._shapes(self._params()), self.mesh)
        if self.config.offload_optimizer_state:
            placed = placed.replace(optimizers=sharding.in_host_memory(placed.optimizers))
        return placed

    def _shapes(self, params: dict[str, Any]) -> TrainState:
        return jax.eval_shape(
            lambda params: self._init(self.stages[0], params, jax.random.key(0)), params
        )

    def _params(self) -> dict[str, Any]:
        return {"student": self.student.trained, **self.learned}

    def _init(self, stage: Stage, params: dict[str, Any], key: jax.Array) -> TrainState:
        """A stage's first state. All have the same structure, whatever each of them trains."""
        replay, pending, config = None, None, self.config
        if any(s.source.keeps_replay for s in config.stages):
            capacity = max(s.replay.capacity for s in config.stages if s.source.keeps_replay)
            threshold = config.stages[stage.index].replay.threshold
            replay = empty_replay(capacity, config.data.max_length, threshold)
        ahead = [s.batch_size for s in config.stages if s.one_step_off_policy]
        if ahead:  # all alike, see `checks`
            pending = empty_target_batch(ahead[0], config.data.max_length)
        interpolation = None
        if any(s.interpolation.schedule == "adaptive" for s in config.stages):
            interpolation = first_interpolation(stage.method.interpolation)
        return init_state(
            params,
            stage.optimizers,
            key,
            regularization=stage.method.regularization,
            replay=replay,
            pending=pending,
            interpolation=interpolation,
        )


def unpadded_shapes(model: Model) -> Any:
    """Shapes of the parameters that a model trains, on one device: the same for every mesh."""
    config = model.decoder.config
    if config.tensor_parts > 1:
        model = model.replace(params=abstract_params(config.replace(tensor_parts=1)))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), model.trained)


def sharded_model(model: Model, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> Any:
    """Shapes and dtypes of a model's parameters, with their shardings on a mesh."""
    return _in_places(model.params, model.shardings(mesh))


def _in_places(tree: Any, places: Any) -> Any:
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places
    )
