"""From a config to everything that its run needs, in four steps: load the models, read the data,
generate what the teacher writes, build the stages.
"""

import dataclasses
import functools
import json
from collections.abc import Sequence
from datetime import date
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from promptkd_jax.data import logprobs
from promptkd_jax.data.batches import train_batches
from promptkd_jax.data.records import Record, read_corpus, read_records
from promptkd_jax.data.rows import Rows, fingerprint_records, pack, select_rows, tokenize
from promptkd_jax.distill import hidden_loss
from promptkd_jax.distill.method import TARGETS, Method, reads_answers
from promptkd_jax.distill.soft_prompt import (
    init_soft_prompt,
    pooled_soft_prompt,
    random_soft_prompt,
)
from promptkd_jax.distill.state import Optimizers
from promptkd_jax.inference import logprob_cache, teacher_responses
from promptkd_jax.inference.data_free import generate_prompts
from promptkd_jax.infra import distributed, provenance, sharding
from promptkd_jax.infra.errors import DataError, ModelError
from promptkd_jax.infra.files import load_or_compute, to_path
from promptkd_jax.models.decoder import Decoder
from promptkd_jax.models.io import identity
from promptkd_jax.models.load import load_model
from promptkd_jax.models.model import (
    Model,
    check_positions,
    check_text,
    chosen_layers,
    end_ids,
    keep_layers,
)
from promptkd_jax.models.sampler import Sampling
from promptkd_jax.training import build
from promptkd_jax.training.checks import needs_the_teacher
from promptkd_jax.training.experiment import Experiment, Stage
from promptkd_jax.training.fields import RunConfig, StageConfig


def prepare(config: RunConfig, workdir: epath.Path, mesh: jax.sharding.Mesh) -> Experiment:
    """Loads the models, reads the data, writes the teacher's requests and answers where the recipe
    wants them.

    They are kept in `workdir` (responses in `config.teacher_responses.path`, where it is given), so
    that a run that was stopped does not write them twice.

    Raises:
      ModelError, DataError, ConfigError: a model, data or method that cannot be used.
    """
    teacher, student = load_models(config, mesh)
    vocab_size = shared_vocabulary(teacher, student)
    eos_ids = end_ids(teacher, student)
    student = student.replace(eos_ids=eos_ids)
    teacher = teacher and teacher.replace(eos_ids=eos_ids)
    _agree_on_models(teacher, student)
    _check_positions(config, teacher, student)
    rows, dev = _all_rows(config, teacher, student, vocab_size, workdir)
    for what, some in (*rows.items(), ("dev", dev)):
        distributed.assert_same(f"the data ({what} rows)", provenance.fingerprint_rows(some.tokens))
    corpus = _corpus(config, student) if any(s.corpus_terms for s in config.stages) else None
    provenance.verify_inputs(workdir, _inputs(config, teacher, student, rows, dev, corpus))
    shown = _shown(config, rows["gold"])
    demonstrations = tuple(int(token) for index in shown for token in rows["gold"].tokens[index])
    stages, first = [], 0
    for index, stage in enumerate(config.stages):
        its_rows = rows[stage.targets]
        if stage.teacher_view == "in_context":
            _check_room(config, teacher, demonstrations)
            if stage.targets != "teacher":  # whose answers are not those that are shown
                its_rows = _not_shown(its_rows, shown)
        made = _stage(
            config, index, first, its_rows, corpus, (teacher, student), vocab_size, demonstrations
        )
        stages.append(made)
        first += made.steps
    learned = _learned(config, teacher, student, vocab_size, demonstrations)
    return Experiment(
        config=config,
        teacher=teacher,
        student=student,
        learned=jax.device_put(learned, sharding.shardings(learned, mesh)),
        vocab_size=vocab_size,
        dev=dev,
        stages=tuple(stages),
        mesh=mesh,
    )


def _inputs(config: RunConfig, teacher, student, rows, dev, corpus) -> dict[str, str]:
    """Returns digests of all that the run learns from, by the fields that name it."""
    data, found = config.data, {}
    for field, model in (("teacher", teacher), ("student", student)):
        if path := model and getattr(config, field).path:
            found[f"{path} (config.{field}.path)"] = identity.weights_digest(path)
    found["the tokenizer"] = identity.tokenizer_digest(student.tokenizer)
    found["the tokens that end an answer"] = str(list(student.eos_ids))
    for targets in sorted({stage.targets for stage in config.stages}):
        name = "answers of the teacher" if targets == "teacher" else "rows"
        found[f"{data.train} (config.data.train, {name})"] = fingerprint_records(rows[targets])
    found[f"{data.dev} (config.data.dev)"] = fingerprint_records(dev)
    if corpus is not None:
        found[f"{data.corpus} (config.data.corpus)"] = fingerprint_records(corpus)
    return found | ({"the date (config.data.date)": dev.date} if dev.date else {})


def with_date(config: RunConfig, workdir: epath.Path) -> RunConfig:
    """The config with the date that chat templates are shown; "" becomes that of the run's first
    start, which `workdir` keeps."""
    if config.data.date:
        return config
    started = load_or_compute(workdir / "started.json", lambda: {"date": date.today().isoformat()})
    data = dataclasses.replace(config.data, date=started["date"])
    return dataclasses.replace(config, data=data)


def _check_positions(config: RunConfig, teacher: Model | None, student: Model) -> None:
    """Warns of rows that are longer than a model was trained for; see `_check_room` for those with
    demonstrations."""
    check_positions(student, config.data.max_length)
    if teacher is not None:
        prompted = any(stage.teacher_view == "prompted" for stage in config.stages)
        check_positions(teacher, prompted * config.soft_prompt.length + config.data.max_length)


def _agree_on_models(*models: Model | None) -> None:
    """Raises HostsError where the processes of a run read different ones."""
    for model in filter(None, () if distributed.is_single_process() else models):
        facts = (model.hf_config, identity.tokenizer_digest(model.tokenizer))
        facts = json.dumps(facts, sort_keys=True) + identity.quick_digest(model.name)
        distributed.assert_same(f"the model {model.name}", facts)


def _all_rows(config: RunConfig, teacher, student, vocab_size: int, workdir: epath.Path):
    """({kind of targets: rows}, dev rows)."""
    data, folder = config.data, to_path(config.teacher_responses.path or workdir)
    targets = {stage.targets for stage in config.stages}
    dev_gold = config.evaluation.references == "gold"
    if data.train == "teacher":
        held = data.dev_rows if data.dev == "teacher" else 0
        records = _written_requests(config, teacher, student, vocab_size, workdir, held)
        dev_records, records = records[:held], records[held:]
    else:
        need_output = any(map(reads_answers, config.stages))
        records = read_records(data.train, split=data.train_split, need_output=need_output)
    if data.dev != "teacher":
        dev_records = read_records(data.dev, split=data.dev_split, need_output=dev_gold)
        dev_records = dev_records[: data.dev_rows or None]
    rows = tokenized(config, student, data.train, records)
    dev = tokenized(config, student, data.dev, dev_records)
    write = functools.partial(
        teacher_responses.teacher_responses,
        teacher,
        prompt_capacity=data.max_prompt_length,
        max_new_tokens=data.max_length - data.max_prompt_length,
        batch_size=config.teacher_responses.batch_size,
        seed=config.seed,
        vocab_size=vocab_size,
    )
    kinds = dict.fromkeys(TARGETS, rows)
    if "teacher" in targets:
        sampling = config.teacher_responses.sampling
        chosen = dataclasses.replace(sampling, eos_ids=student.eos_ids)
        kinds["teacher"] = write(rows, folder / "teacher_answers.jsonl", sampling=chosen)
        _warn_of_cut(config, "the teacher", kinds["teacher"])
    if any(map(reads_answers, config.stages)):
        _warn_of_cut(config, data.train, rows)
    if not dev_gold:
        greedy = Sampling(temperature=0.0, eos_ids=student.eos_ids)
        dev = write(dev, folder / "dev_answers.jsonl", sampling=greedy)
    return kinds, dev


def _written_requests(config: RunConfig, teacher, student, vocab_size: int, workdir, more: int):
    """Where there are no data: see `data_free`. So many, and `more` to hold out."""
    settings, data = config.data_free, config.data
    return generate_prompts(
        teacher,
        student,
        workdir / "requests.jsonl",
        dataclasses.replace(settings, requests=settings.requests + more),
        template=data.template,
        prompt_capacity=data.max_prompt_length,
        batch_size=config.teacher_responses.batch_size,
        vocab_size=vocab_size,
        date=data.date,
    )


def tokenized(config: RunConfig, model: Model, source: str, records: Sequence[Record]) -> Rows:
    """The records as rows of the config's template and lengths; says how many were dropped, and how
    many answers are cut."""
    limit, length = config.data.max_prompt_length, config.data.max_length
    rows = tokenize(
        records,
        model.tokenizer,
        template=config.data.template,
        max_prompt_length=limit,
        max_length=length,
        eos_id=model.eos_ids[0],
        date=config.data.date,
    )
    print(
        f"{source}: {len(rows.tokens)} rows, {rows.dropped} dropped (over {limit} tokens), "
        f"{rows.cut} answers cut at {length} tokens"
    )
    return rows


def _warn_of_cut(config: RunConfig, source: str, rows: Rows) -> None:
    if rows.cut == len(rows.tokens):
        distributed.warn(
            f"config.data.max_length: {config.data.max_length} cuts every answer of {source}: none "
            "has an end of sequence, from which a student learns to stop"
        )


def _shown(config: RunConfig, rows: Rows) -> list[int]:
    """The rows that are demonstrations, with their answers; none where nobody sees them."""
    wanted = config.soft_prompt.init == "examples" or any(
        stage.teacher_view == "in_context" for stage in config.stages
    )
    if not wanted:
        return []
    number, found = config.in_context.examples, len(rows.tokens)
    if number > found or not all(record.outputs for record in rows.records):
        raise DataError(
            f"{config.data.train}: {found} rows, of which {number} with an answer are wanted as "
            "demonstrations (config.in_context.examples)"
        )
    return np.random.default_rng(config.seed).choice(found, number, replace=False).tolist()


def _not_shown(rows: Rows, shown: Sequence[int]) -> Rows:
    """The others: on a demonstration itself the teacher would only read out its answer."""
    return select_rows(rows, np.setdiff1d(np.arange(len(rows.tokens)), shown))


def _check_room(config: RunConfig, teacher: Model, demonstrations: tuple[int, ...]) -> None:
    """Raises ModelError where demonstrations and rows are longer than the teacher can see; warns of
    those that are longer than it was trained for."""
    decoder, length = teacher.decoder.config, len(demonstrations) + config.data.max_length
    if decoder.learned_positions and length > decoder.max_positions:
        raise ModelError(
            f"{teacher.name}: {config.in_context.examples} demonstrations of {len(demonstrations)} "
            f"tokens and rows of {config.data.max_length} do not fit into its "
            f"{decoder.max_positions} positions; set config.in_context.examples lower, or "
            "config.data.max_length"
        )
    check_positions(teacher, length)


def _learned(config, teacher, student, vocab_size: int, demonstrations) -> dict[str, Any]:
    """What is trained beside the student, by its group in the train state."""
    learned, key = {}, jax.random.key(config.seed)
    if any(stage.teacher_view == "prompted" for stage in config.stages):
        learned["soft_prompt"] = _soft_prompt(config, teacher, vocab_size, demonstrations, key)
    if any(stage.teacher_view == "online" for stage in config.stages):
        # In half precision most updates would round to nothing.
        learned["teacher"] = jax.tree.map(
            lambda x: jnp.array(x, jnp.float32, copy=True), teacher.params
        )
    if matrices := projections(config, teacher, student, key):
        learned["projection"] = matrices
    return learned


def projections(
    config: RunConfig, teacher: Model | None, student: Model, key: jax.Array
) -> hidden_loss.Projections:
    """Between the hidden states of both models, for the terms of all stages; {} where none is."""
    shapes = [model.decoder.config for model in (student, teacher) if model]
    terms = [
        term
        for stage in config.stages
        if stage.hidden_terms
        for term in build.resolved_hidden_terms(stage, *shapes)
    ]
    return (
        hidden_loss.init_projections(terms, *(shape.width for shape in shapes), key)
        if terms
        else {}
    )


def _soft_prompt(config, teacher, vocab_size: int, demonstrations, key) -> jax.Array:
    chosen, tokenizer = config.soft_prompt, teacher.tokenizer
    if chosen.init == "random":
        return random_soft_prompt(key, chosen.length, teacher.decoder.config.width)
    if chosen.init == "examples":
        return pooled_soft_prompt(teacher.params, demonstrations, chosen.length)
    if chosen.init == "vocabulary":
        ids = jax.random.randint(key, (chosen.length,), 0, vocab_size)
    elif chosen.init == "pad":
        own = tokenizer.pad_token_id
        ids = [teacher.eos_ids[0] if own is None else own]
    else:
        ids = tokenizer(chosen.text, add_special_tokens=chosen.add_special_tokens)["input_ids"]
    return init_soft_prompt(teacher.params, ids, chosen.length)


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


def load_models(config: RunConfig, mesh: jax.sharding.Mesh) -> tuple[Model | None, Model]:
    """(teacher, student); no teacher where nothing looks at one.

    Raises:
      ModelError: a model that cannot be used, or has no tokenizer.
    """

    def load(path, how):
        model = load_model(
            path,
            dtype=how.dtype,
            param_dtype=how.param_dtype,
            remat=build.remat(how),
            mesh=mesh,
        )
        if padding := model.decoder.config.padding:
            print(f"{path}: padded for mesh.tensor = {mesh.shape['tensor']}: {padding}")
        return model

    teacher, measured = None, config.evaluation.teacher and config.teacher.path
    if needs_the_teacher(config) or measured:
        teacher = load(config.teacher.path, config.teacher)
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


def _from_teacher_layers(config: RunConfig, teacher: Model, load) -> Model:
    """Some layers of the teacher; read again where the student is kept in another dtype."""
    if config.teacher.param_dtype != config.student.param_dtype:
        whole = load(config.teacher.path, config.student).replace(tokenizer=teacher.tokenizer)
    else:
        how = dict(dtype=config.student.dtype, remat=build.remat(config.student))
        whole = teacher.replace(decoder=Decoder(teacher.decoder.config.replace(**how)))
    return keep_layers(whole, chosen_layers(whole.decoder.config.num_layers, config.student.layers))


def _stage(
    config: RunConfig,
    index: int,
    first: int,
    rows: Rows,
    corpus: Rows | None,
    models: tuple[Model | None, Model],
    vocab_size: int,
    demonstrations: tuple[int, ...],
) -> Stage:
    """Stage `index`, after `first` steps of those before it."""
    stage, (_, student), length = config.stages[index], models, config.data.max_length
    steps = build.stage_steps(stage, len(rows.tokens))
    longest = max(len(row) - start for row, start in zip(rows.tokens, rows.prompt_lengths))
    method = build.make_method(
        config,
        stage,
        steps=steps,
        longest_response=max(int(longest), 1),
        vocab_size=vocab_size,
        eos_ids=student.eos_ids,
        demonstrations=demonstrations,
    )
    batches = functools.partial(
        train_batches, batch_size=stage.batch_size, length=length, seed=config.seed + index
    )
    cached = _cache(config, student, rows, vocab_size) if stage.teacher_view == "cached" else None
    return Stage(
        name=stage.name,
        index=index,
        first=first,
        steps=steps,
        method=method,
        optimizers=stage_optimizers(config, stage, models, method),
        learning_rate=build.learning_rate(
            stage, stage.learning_rate, steps * method.updates, method.conventions
        ),
        batches=batches(rows, cached=cached, capacity=method.response_capacity),
        corpus=batches(corpus) if stage.corpus_terms else None,
    )


def stage_optimizers(
    config: RunConfig, stage: StageConfig, models: tuple[Model | None, Model], method: Method
) -> Optimizers:
    """Those of a stage of `method`, for (teacher, student)."""
    teacher, student = models
    return build.make_optimizers(
        stage,
        student.params,
        teacher and teacher.params,
        steps=method.total_steps,
        updates=method.total_steps * method.updates,
        conventions=method.conventions,
        decay_norms=method.conventions.decay_norms and student.decoder.config.family != "gpt2",
        seed=config.seed,
    )


def _cache(config: RunConfig, student: Model, rows: Rows, vocab_size: int) -> logprobs.Cached:
    """What the teacher, which need not be loaded, wrote down about the rows."""
    teacher = config.teacher
    return logprob_cache.open_cache(
        to_path(config.cache.path),
        teacher=identity.teacher_identity(teacher.path, teacher.dtype, teacher.param_dtype),
        tokenizer=student.tokenizer,
        rows=rows,
        vocab_size=vocab_size,
        top_k=config.cache.top_k,
    )


def _corpus(config: RunConfig, student: Model) -> Rows:
    texts = read_corpus(config.data.corpus, split=config.data.corpus_split)
    return pack(texts, student.tokenizer, config.data.max_length, student.eos_ids[0])
