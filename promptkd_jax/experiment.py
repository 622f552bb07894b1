"""From a checked config to what a run is made of: models, rows, stages."""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import grain
import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from promptkd_jax import recipe, sharding
from promptkd_jax.data import Rows, read_records, tokenize, train_batches
from promptkd_jax.evaluate import decode, write_answers
from promptkd_jax.models.config import ModelError
from promptkd_jax.models.decoder import Decoder
from promptkd_jax.models.load import Model, keep_layers, load_model, uniform_layers
from promptkd_jax.prompt import init_soft_prompt
from promptkd_jax.sampler import Sampling
from promptkd_jax.step import PRESETS, Method, Models, Optimizers, TrainState, init_state


@dataclasses.dataclass(frozen=True)
class Stage:
    """Updates `first` + 1 to `first` + `steps` of the run, with one method."""

    name: str
    index: int
    first: int
    steps: int
    method: Method
    optimizers: Optimizers
    learning_rate: optax.Schedule
    batches: grain.MapDataset


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a run is made of; nothing of it changes while it trains.

    `student` and `soft_prompt` are those that the run starts from, `vocab_size` what teacher and
    student share, `dev` the held-out rows with their reference answers.
    """

    config: ConfigDict
    teacher: Model | None
    student: Model
    soft_prompt: jax.Array | None
    vocab_size: int
    dev: Rows
    stages: tuple[Stage, ...]
    mesh: jax.sharding.Mesh

    @property
    def total_steps(self) -> int:
        """Updates of all stages."""
        return sum(stage.steps for stage in self.stages)

    @property
    def models(self) -> Models:
        """The decoders."""
        return Models(self.student.decoder, self.teacher and self.teacher.decoder)

    @property
    def max_new_tokens(self) -> int:
        """Room for a response beside the longest request."""
        return self.config.data.max_length - self.config.data.max_prompt_length

    def start(self, stage: Stage, student: Any, soft_prompt: jax.Array | None) -> TrainState:
        """The state at the beginning of a stage. The arrays given are donated to it."""
        place = self.placed()
        begin = jax.jit(
            lambda student, prompt, key: init_state(student, prompt, stage.optimizers, key),
            out_shardings=place,
            donate_argnums=(0, 1),
        )
        key = jax.random.fold_in(jax.random.key(self.config.seed), stage.index)
        return begin(student, soft_prompt, key)

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of a state; they are the same in every stage."""
        return jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            self._shapes(),
            self.placed(),
        )

    def placed(self) -> Any:
        """Where every leaf of a state lies on the mesh."""
        return sharding.shardings(self._shapes(), self.mesh)

    def _shapes(self) -> TrainState:
        student, prompt = self.student.params, self.soft_prompt
        optimizers = self.stages[0].optimizers
        return jax.eval_shape(
            lambda s, p: init_state(s, p, optimizers, jax.random.key(0)), student, prompt
        )


def prepare(config: ConfigDict, workdir: pathlib.Path, mesh: jax.sharding.Mesh) -> Experiment:
    """Loads the models, reads the data, writes the teacher's answers where the recipe wants them.

    Answers are kept in `workdir`, so that a run that was stopped does not write them twice.

    Raises:
      ModelError, DataError: a model or data that cannot be used.
    """
    teacher, student = _load_models(config, mesh)
    vocab_size = shared_vocabulary(teacher, student)
    eos_ids = tuple(dict.fromkeys(student.eos_ids + (teacher.eos_ids if teacher else ())))
    student = student.replace(eos_ids=eos_ids)
    teacher = teacher and teacher.replace(eos_ids=eos_ids)
    data, evaluation = config.data, config.evaluation
    targets = {stage.targets for stage in config.stages}
    gold = _rows(config, data.train, data.train_split, student, "gold" in targets)
    rows = {"gold": gold, "student": gold}
    dev_gold = evaluation.references == "gold"
    dev = _rows(config, data.dev, data.dev_split, student, dev_gold, data.dev_rows)
    write = functools.partial(_teacher_written, config, teacher, vocab_size)
    if "teacher" in targets:
        chosen = recipe.sampling(config.answers.sampling, eos_ids)
        rows["teacher"] = write(gold, workdir / "teacher_answers.jsonl", chosen)
    if not dev_gold:
        greedy = Sampling(temperature=0.0, eos_ids=eos_ids)
        dev = write(dev, workdir / "dev_answers.jsonl", greedy)
    stages, first = [], 0
    for index, stage in enumerate(config.stages):
        made = _stage(config, stage, index, first, rows[stage.targets], student, vocab_size)
        stages.append(made)
        first += made.steps
    return Experiment(
        config=config,
        teacher=teacher,
        student=student,
        soft_prompt=_soft_prompt(config, teacher),
        vocab_size=vocab_size,
        dev=dev,
        stages=tuple(stages),
        mesh=mesh,
    )


def shared_vocabulary(teacher: Model | None, student: Model) -> int:
    """How many tokens teacher and student share; padding of one of them is cut off.

    Raises:
      ModelError: their tokenizers differ.
    """
    sizes = [m.decoder.config.vocab_size for m in (teacher, student) if m is not None]
    if teacher is None or teacher.tokenizer is student.tokenizer:
        return min(sizes)
    vocabularies = [m.tokenizer and m.tokenizer.get_vocab() for m in (teacher, student)]
    if None in vocabularies and sizes[0] != sizes[1]:
        raise ModelError(
            f"teacher {teacher.name} has a vocabulary of {sizes[0]} and student {student.name} of "
            f"{sizes[1]}, and a tokenizer is missing to tell whether that is padding"
        )
    if vocabularies[0] != vocabularies[1]:
        theirs, ours = (set(v.items()) for v in vocabularies)
        raise ModelError(
            f"teacher {teacher.name} and student {student.name} have different tokenizers: "
            f"{len(theirs - ours)} of {len(theirs)} tokens of the teacher have another id or are "
            "unknown to the student; distillation on logits needs the same tokenizer"
        )
    return min(sizes)


def _load_models(config: ConfigDict, mesh) -> tuple[Model | None, Model]:
    def load(path, how):
        return load_model(
            path,
            dtype=how.dtype,
            param_dtype=how.param_dtype,
            remat=how.remat,
            shardings=lambda tree: sharding.shardings(tree, mesh),
        )

    teacher = load(config.teacher.path, config.teacher) if config.teacher.path else None
    if config.student.path:
        student = load(config.student.path, config.student)
    else:
        student = _from_teacher_layers(config, teacher, load)
    for model in (teacher, student):
        if model is not None and not model.eos_ids:
            raise ModelError(f"{model.name}: no eos_token_id in its config or generation config")
    if student.tokenizer is None:
        raise ModelError(f"{student.name}: has no tokenizer files (tokenizer.json, …)")
    return teacher, student


def _from_teacher_layers(config: ConfigDict, teacher: Model, load) -> Model:
    """Some layers of the teacher; read again where the student is kept in another dtype."""
    if config.teacher.param_dtype != config.student.param_dtype:
        whole = load(config.teacher.path, config.student).replace(tokenizer=teacher.tokenizer)
    else:
        how = dict(dtype=config.student.dtype, remat=config.student.remat)
        whole = teacher.replace(decoder=Decoder(teacher.decoder.config.replace(**how)))
    return keep_layers(whole, uniform_layers(whole.decoder.config.depth, config.student.layers))


def _rows(config, source, split, student, need_output, limit=0) -> Rows:
    records = read_records(source, split=split, need_output=need_output)
    return tokenize(
        records[: limit or None],
        student.tokenizer,
        template=config.data.template,
        max_prompt_length=config.data.max_prompt_length,
        max_length=config.data.max_length,
        eos_id=student.eos_ids[0],
    )


def _teacher_written(
    config: ConfigDict,
    teacher: Model,
    vocab_size: int,
    rows: Rows,
    file: pathlib.Path,
    sampling: Sampling,
) -> Rows:
    """The rows with responses that the teacher wrote, kept line by line in `file`."""
    data, batch_size = config.data, config.answers.batch_size
    answers = _whole_lines(file, batch_size)
    missing = write_answers(
        teacher,
        rows,
        sampling=sampling,
        prompt_capacity=data.max_prompt_length,
        max_new_tokens=data.max_length - data.max_prompt_length,
        batch_size=batch_size,
        key=jax.random.key(config.seed),
        vocab_size=vocab_size,
        first=len(answers),
    )
    if len(answers) < len(rows.tokens):
        print(f"the teacher writes {len(rows.tokens) - len(answers)} answers into {file}")
    with file.open("a") as out:
        for answer in missing:
            answers.append(answer.tolist())
            out.write(json.dumps(answers[-1]) + "\n")
            out.flush()
    return _with_answers(rows, answers, teacher.tokenizer)


def _whole_lines(file: pathlib.Path, batch_size: int) -> list[list[int]]:
    """The answers of whole batches in `file`; a torn end is cut off. Whole batches, so that what
    is still to be written is computed in the same batches as in a run that was not stopped."""
    if not file.exists():
        return []
    lines = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
    lines = lines[: len(lines) // batch_size * batch_size]
    file.write_text("".join(lines))
    return [json.loads(line) for line in lines]


def _with_answers(rows: Rows, answers: list[list[int]], tokenizer: Any) -> Rows:
    tokens = [
        np.concatenate([row[:length], np.asarray(answer, np.int32)])
        for row, length, answer in zip(rows.tokens, rows.prompt_lengths, answers)
    ]
    records = [
        record._replace(outputs=(decode(tokenizer, answer),))
        for record, answer in zip(rows.records, answers)
    ]
    return rows._replace(tokens=tokens, records=records)


def _stage(
    config: ConfigDict,
    stage: ConfigDict,
    index: int,
    first: int,
    rows: Rows,
    student: Model,
    vocab_size: int,
) -> Stage:
    steps = recipe.stage_steps(stage, len(rows.tokens))
    longest = max(len(row) - length for row, length in zip(rows.tokens, rows.prompt_lengths))
    method = recipe.make_method(
        config,
        stage,
        steps=steps,
        longest_response=int(longest),
        vocab_size=vocab_size,
        eos_ids=student.eos_ids,
    )
    optimizers = recipe.make_optimizers(
        stage, student.params, steps=steps, decay_norms=_decays_norms(config, student)
    )
    batches = train_batches(
        rows,
        batch_size=stage.batch_size,
        length=config.data.max_length,
        seed=config.seed + index,
    )
    rates = recipe.learning_rate(stage, stage.learning_rate, steps)
    return Stage(stage.name, index, first, steps, method, optimizers, rates, batches)


def _decays_norms(config: ConfigDict, student: Model) -> bool:
    return PRESETS[config.preset].decay_norms and student.decoder.config.family != "gpt2"


def _soft_prompt(config: ConfigDict, teacher: Model | None) -> jax.Array | None:
    """Initialised from the config's text, where any stage is prompted."""
    if not any(stage.prompted for stage in config.stages):
        return None
    chosen = config.soft_prompt
    ids = teacher.tokenizer(chosen.text, add_special_tokens=chosen.add_special_tokens)["input_ids"]
    return init_soft_prompt(teacher.params, ids, chosen.length)
