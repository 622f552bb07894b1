"""From a checked config to what a run is made of: models, rows, stages."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import grain
import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from promptkd_jax import recipe, sharding
from promptkd_jax.data import DataError, Rows, read_records, tokenize, train_batches
from promptkd_jax.evaluate import decode, write_answers
from promptkd_jax.models.config import ModelError
from promptkd_jax.models.decoder import Decoder
from promptkd_jax.models.export import save_model
from promptkd_jax.models.load import Model, check_text, keep_layers, load_model, uniform_layers
from promptkd_jax.prompt import init_soft_prompt, save_soft_prompt
from promptkd_jax.report import model_card
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

    def start(self, stage: Stage, before: TrainState | None) -> TrainState:
        """The state at the beginning of a stage, after `before`, whose arrays are donated to it.

        The optimizers start anew; without `before` it is the beginning of the run.
        """
        student = before.student if before else self.student.params
        soft_prompt = before.soft_prompt if before else self.soft_prompt
        place = self.placed()
        begin = jax.jit(
            lambda student, prompt, key: init_state(student, prompt, stage.optimizers, key),
            out_shardings=place,
            donate_argnums=(0, 1),
        )
        key = jax.random.fold_in(jax.random.key(self.config.seed), stage.index)
        state = begin(student, soft_prompt, key)
        return state.replace(skipped=before.skipped) if before else state

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


def save(
    experiment: Experiment, state: TrainState, folder: pathlib.Path, metrics: Sequence[tuple] = ()
) -> dict[str, str]:
    """Writes the student of `state`, with a model card, and its soft prompt into `folder`.

    Args:
      metrics: for the card, as `report.model_card` takes them.

    Returns:
      What lies where.
    """
    config, teacher = experiment.config, experiment.teacher
    card = model_card(
        config.title,
        teacher=teacher and teacher.name,
        data=config.data.train,
        stages=[recipe.describe(stage) for stage in config.stages],
        metrics=metrics,
    )
    student = experiment.student.replace(params=state.student)
    save_model(folder / "student", student, card=card)
    paths = {"student": str(folder / "student")}
    if state.soft_prompt is not None:
        paths["soft prompt"] = str(folder / "soft_prompt")
        save_soft_prompt(
            folder / "soft_prompt",
            state.soft_prompt,
            teacher=teacher.name,
            hf_config=teacher.hf_config,
        )
    return paths


def shared_vocabulary(teacher: Model | None, student: Model) -> int:
    """How many tokens teacher and student share; padding of one of them is cut off.

    Raises:
      ModelError: their tokenizers differ.
    """
    if teacher is None:
        return student.vocab_size
    theirs, ours = (set(m.tokenizer.get_vocab().items()) for m in (teacher, student))
    if theirs != ours:
        raise ModelError(
            f"teacher {teacher.name} and student {student.name} have different tokenizers: "
            f"{len(theirs - ours)} of {len(theirs)} tokens of the teacher have another id or are "
            "unknown to the student; distillation on logits needs the same tokenizer"
        )
    return min(teacher.vocab_size, student.vocab_size)


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
    check_text(student)
    if teacher is not None and teacher.tokenizer is None:
        teacher = teacher.replace(tokenizer=student.tokenizer)
    if teacher is not None:
        check_text(teacher)
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
    rows = tokenize(
        records[: limit or None],
        student.tokenizer,
        template=config.data.template,
        max_prompt_length=config.data.max_prompt_length,
        max_length=config.data.max_length,
        eos_id=student.eos_ids[0],
    )
    limit = config.data.max_prompt_length
    print(f"{source}: {len(rows.tokens)} rows, {rows.dropped} dropped (over {limit} tokens)")
    return rows


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
    answers = _kept_answers(file, rows, batch_size)
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
            line = {"request": _request(rows, len(answers)), "answer": answer.tolist()}
            answers.append(line["answer"])
            out.write(json.dumps(line) + "\n")
            out.flush()
    return _with_answers(rows, answers, teacher.tokenizer)


def _kept_answers(file: pathlib.Path, rows: Rows, batch_size: int) -> list[list[int]]:
    """The answers in `file`: all, or those of whole batches, so that what is still to be written is
    computed in the same batches as in a run that was not stopped. A torn end is cut off.

    Raises:
      DataError: they answer other requests.
    """
    if not file.exists():
        return []
    text = file.read_text().splitlines(keepends=True)
    lines = [line for line in text if line.endswith("\n")]
    if len(lines) != len(rows.tokens):
        lines = lines[: len(lines) // batch_size * batch_size]
    found = [json.loads(line) for line in lines]
    for number, line in enumerate(found):
        if number >= len(rows.tokens) or line["request"] != _request(rows, number):
            raise DataError(
                f"{file}:{number + 1}: answers another request than row {number} of the data; the "
                "data changed since it was written: take another --workdir"
            )
    if len(lines) < len(text):
        file.write_text("".join(lines))
    return [line["answer"] for line in found]


def _request(rows: Rows, number: int) -> list[int]:
    return rows.tokens[number][: rows.prompt_lengths[number]].tolist()


def _with_answers(rows: Rows, answers: list[list[int]], tokenizer: Any) -> Rows:
    tokens = [
        np.concatenate([row[:length], np.asarray(answer, np.int32)])
        for row, length, answer in zip(rows.tokens, rows.prompt_lengths, answers)
    ]
    records = [
        record._replace(outputs=(decode(tokenizer, answer),))
        for record, answer in zip(rows.records, answers, strict=True)
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
