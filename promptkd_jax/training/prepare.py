"""From a config to everything that its run needs, in four steps: load the models, load the data,
generate what is asked for, build the stages.
"""

import dataclasses
import functools
from collections.abc import Sequence
from datetime import date
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from promptkd_jax.data.batches import train_batches
from promptkd_jax.data.packing import Packing
from promptkd_jax.data.rows import Rows, fingerprint_records, fingerprint_supervised, select_rows
from promptkd_jax.data.special_tokens import unknown_token
from promptkd_jax.distill.losses import hidden_loss
from promptkd_jax.distill.losses.transport import TokenKernel, token_kernel
from promptkd_jax.distill.soft_prompt import (
    init_soft_prompt,
    pooled_soft_prompt,
    random_soft_prompt,
    zero_gated,
)
from promptkd_jax.inference import logprob_cache, teacher_responses
from promptkd_jax.inference.data_free import generate_prompts
from promptkd_jax.infra import distributed, provenance, sharding
from promptkd_jax.infra.errors import ConfigError, DataError, ModelError
from promptkd_jax.infra.files import load_or_compute, to_path
from promptkd_jax.models.io import identity
from promptkd_jax.models.layers.gated_prefix import GatedPrefix
from promptkd_jax.models.layers.quantization import QUANTIZE
from promptkd_jax.models.model import Model, check_positions, text_end
from promptkd_jax.models.sampling_rules import Sampling
from promptkd_jax.training import build
from promptkd_jax.training.config.fields import RunConfig
from promptkd_jax.training.experiment import Experiment, Stage
from promptkd_jax.training.run_data import RunData, load_data, tokenized
from promptkd_jax.training.run_models import agree_on_models, load_models, lora_folder


def prepare(config: RunConfig, workdir: epath.Path, mesh: jax.sharding.Mesh) -> Experiment:
    """Loads the models, loads the data, has the teacher generate what the recipe asks for, and
    builds the stages.

    What the teacher writes may take hours. It is kept in `workdir` (responses in
    `config.teacher_responses.path`, where it is given), so that a run that was stopped goes on.

    Raises:
      ModelError, DataError, ConfigError: a model, data or method that cannot be used.
    """
    # Load the models.
    if config.offload_optimizer_state:
        sharding.check_host_memory("config.offload_optimizer_state", mesh)
    teacher, student = load_models(config, mesh)
    vocab_size = student.vocab_size
    agree_on_models(teacher, student)

    # Load the data.
    data = load_data(config, student, workdir)
    shown = _shown(config, data.train)
    demonstrations = tuple(int(token) for index in shown for token in data.train.tokens[index])
    _check_lengths(config, teacher, student, demonstrations)

    # Generate what is asked for.
    data = _generate(config, data, teacher, student, vocab_size, workdir)
    named = dict(train=data.train, turns=data.turns, teacher=data.answered, dev=data.dev)
    for name, rows in named.items():
        if rows is not None:
            fingerprint = provenance.fingerprint_rows(rows.tokens)
            distributed.assert_same(f"the data ({name} rows)", fingerprint)
    provenance.verify_inputs(workdir, _inputs(config, teacher, student, data))

    # Build the stages.
    stages: list[Stage] = []
    for index, stage in enumerate(config.stages):
        rows = data.of(stage)
        if stage.teacher_view == "in_context" and not stage.source.teacher_writes:
            # On a demonstration itself the teacher would only read out its answer.
            rows = select_rows(rows, np.setdiff1d(np.arange(len(rows.tokens)), shown))
        longest = max(rows.num_supervised)
        made = build.make_stage(
            config,
            index,
            teacher,
            student,
            first=sum(before.steps for before in stages),
            steps=build.stage_steps(stage, len(rows.tokens)),
            longest_response=max(int(longest), 1),
            vocab_size=vocab_size,
            demonstrations=demonstrations,
        )
        stages.append(_with_data(config, made, rows, data.corpus, student))
    learned = init_learned(config, teacher, student, vocab_size, demonstrations)
    kernel = _token_kernel(config, teacher, vocab_size)
    return Experiment(
        config=config,
        teacher=teacher,
        student=student,
        learned=jax.device_put(learned, sharding.shardings(learned, mesh)),
        vocab_size=vocab_size,
        train=tuple(filter(None, (data.train, data.answered))),
        dev=data.dev,
        stages=tuple(stages),
        mesh=mesh,
        token_kernel=jax.device_put(kernel, jax.sharding.NamedSharding(mesh, sharding.P())),
    )


def with_date(config: RunConfig, workdir: epath.Path) -> RunConfig:
    """The config with the date that chat templates are shown; "" becomes that of the run's first
    start, which `workdir` keeps."""
    if config.data.date:
        return config
    started = load_or_compute(workdir / "started.json", lambda: {"date": date.today().isoformat()})
    data = dataclasses.replace(config.data, date=started["date"])
    return dataclasses.replace(config, data=data)


def _check_lengths(
    config: RunConfig, teacher: Model | None, student: Model, demonstrations: Sequence[int]
) -> None:
    """Raises ModelError where demonstrations and rows are longer than the teacher can see; warns of
    rows that are longer than a model was trained for."""
    data, views = config.data, {stage.teacher_view for stage in config.stages}
    check_positions(student, data.max_length)
    if teacher is None:
        return
    prompted = config.soft_prompt.length if "prompted" in views else 0
    shown = len(demonstrations) if "in_context" in views else 0
    decoder = teacher.decoder.config
    if shown and decoder.learned_positions and shown + data.max_length > decoder.max_positions:
        raise ModelError(
            f"{teacher.name}: {config.in_context.examples} demonstrations of {shown} tokens and "
            f"rows of {data.max_length} do not fit into its {decoder.max_positions} positions; set "
            "config.in_context.examples lower, or config.data.max_length"
        )
    check_positions(teacher, max(prompted, shown) + data.max_length)


# Data


def _generate(
    config: RunConfig,
    data: RunData,
    teacher: Model | None,
    student: Model,
    vocab_size: int,
    workdir: epath.Path,
) -> RunData:
    """Has the teacher write the prompts that are missing, then the responses that are asked for."""
    names, settings = config.data, config.teacher_responses
    shared = dict(
        prompt_capacity=names.max_prompt_length,
        batch_size=settings.batch_size,
        vocab_size=vocab_size,
    )
    train, answered, dev = data.train, None, data.dev
    if train is None:
        held = names.dev_rows if dev is None else 0
        free = dataclasses.replace(config.data_free, requests=config.data_free.requests + held)
        asked = names.prompt_format(config.preset)
        file = workdir / "requests.jsonl"
        records = generate_prompts(teacher, student, file, free, asked, **shared)
        train = tokenized(config, student, names.train_name, records[held:])
        if dev is None:
            dev = tokenized(config, student, names.dev, records[:held])
    respond = functools.partial(
        teacher_responses.teacher_responses,
        teacher,
        max_new_tokens=names.max_length - names.max_prompt_length,
        seed=config.seed,
        **shared,
    )
    folder = to_path(settings.path or workdir)
    if any(stage.source.teacher_writes for stage in config.stages):
        sampling = dataclasses.replace(settings.sampling, eos_ids=student.eos_ids)
        prompts = train if data.turns is None else data.turns
        answered = respond(prompts, folder / "teacher_answers.jsonl", sampling=sampling)
        _warn_of_cut(config, "the teacher", answered)
    if any(stage.reads_responses for stage in config.stages):
        _warn_of_cut(config, names.train_name, train)
    if config.evaluation.references == "teacher":
        greedy = Sampling(temperature=0.0, eos_ids=student.eos_ids)
        dev = respond(dev, folder / "dev_answers.jsonl", sampling=greedy)
    return data._replace(train=train, answered=answered, dev=dev)


def _inputs(
    config: RunConfig, teacher: Model | None, student: Model, data: RunData
) -> dict[str, str]:
    """Returns digests of all that the run learns from, by the fields that name it."""
    names, found = config.data, {}
    for field, model in (("teacher", teacher), ("student", student)):
        if model and getattr(config, field).path:
            found |= model_input(config, field)
    if path := config.student.lora.path:
        files = sorted(lora_folder(path).glob("adapter_*"))
        digest = distributed.run_on_primary(lambda: identity.files_digest(files))
        found[f"{path} (config.student.lora.path)"] = digest
    found["the tokenizer"] = identity.tokenizer_digest(student.tokenizer)
    found["the tokens that end an answer"] = str(list(student.eos_ids))
    for stage in config.stages:
        rows = "answers of the teacher" if stage.source.teacher_writes else "rows"
        found[f"{names.train_name} (config.data.train, {rows})"] = fingerprint_supervised(
            data.of(stage)
        )
    found[f"{names.dev} (config.data.dev)"] = fingerprint_records(data.dev)
    if data.corpus is not None:
        digest = fingerprint_supervised(data.corpus)
        found[f"{names.corpus_name} (config.data.corpus)"] = digest
    return found | ({"the date (config.data.date)": data.dev.date} if data.dev.date else {})


def model_input(config: RunConfig, field: str) -> dict[str, str]:
    """The digest of the "teacher" or "student" that a run begins with, by the field that names
    it."""
    path = getattr(config, field).path
    return {f"{path} (config.{field}.path)": identity.weights_digest(path)}


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
    number, count = config.in_context.examples, len(rows.tokens)
    if number > count or not rows.num_supervised.all():
        raise DataError(
            f"{config.data.train_name}: {count} rows, of which {number} with an answer are wanted "
            "as demonstrations (config.in_context.examples)"
        )
    return np.random.default_rng(config.seed).choice(count, number, replace=False).tolist()


# Stages


def _with_data(
    config: RunConfig, stage: Stage, rows: Rows, corpus: Rows | None, student: Model
) -> Stage:
    """The stage with batches of its rows, and of the corpus where it learns on that."""
    chosen, names = config.stages[stage.index], config.data
    corpus = corpus if stage.method.corpus_terms else None
    for name, each, to_each in (
        (names.train_name, rows, chosen.rollouts_per_prompt),
        (names.corpus_name, corpus, 1),
    ):
        if each is not None and (most := to_each * len(each.tokens)) < chosen.batch_size:
            several = f", {to_each} to each prompt" if to_each > 1 else ""
            raise DataError(
                f"config.stages[{stage.index}].batch_size: {chosen.batch_size}{several}, but there "
                f"are {len(each.tokens)} rows of {name} ({each.dropped} records were dropped for "
                f"long prompts); expected at most {most}"
            )
    batches = functools.partial(
        train_batches, length=config.data.max_length, seed=config.seed + stage.index
    )
    method, cached, packing, teacher = stage.method, None, None, config.teacher
    kept = teacher.dtype, teacher.param_dtype, QUANTIZE[teacher.quantize]
    if method.teacher_view == "cached":  # by a teacher that need not be loaded
        cached = logprob_cache.open_cache(
            to_path(config.cache.path),
            teacher=identity.teacher_identity(teacher.path, *kept),
            tokenizer=student.tokenizer,
            rows=rows,
            vocab_size=method.vocab_size,
            top_k=config.cache.top_k,
        )
    if number := method.execution.packed_rows:
        prefix = config.soft_prompt.length if method.prompted else len(method.demonstrations)
        packing = Packing(number, prefix, stage.steps)
    return dataclasses.replace(
        stage,
        batches=batches(
            rows,
            batch_size=chosen.prompts_per_step,
            cached=cached,
            capacity=method.response_capacity,
            packing=packing,
        ),
        corpus=None if corpus is None else batches(corpus, batch_size=chosen.batch_size),
    )


def init_learned(
    config: RunConfig,
    teacher: Model | None,
    student: Model,
    vocab_size: int,
    demonstrations: Sequence[int],
) -> dict[str, Any]:
    """Initializes what is trained beside the student, by its group in the train state.

    Raises:
      ConfigError: terms on hidden states with layers, widths or heads that do not fit the models,
        or on a router that the student has not got.
    """
    learned, key = {}, jax.random.key(config.seed)
    if any(stage.teacher_view == "prompted" for stage in config.stages):
        learned["soft_prompt"] = _soft_prompt(config, teacher, vocab_size, demonstrations, key)
    if any(stage.teacher_view == "online" for stage in config.stages):
        # In half precision most updates would round to nothing.
        learned["teacher"] = jax.tree.map(
            lambda x: jnp.array(x, jnp.float32, copy=True), teacher.params
        )
    terms: list[hidden_loss.HiddenTerm] = []
    for stage in config.stages:
        if stage.router_balance and student.decoder.config.experts is None:
            raise ConfigError(
                f"config.stages: {stage.name}.router_balance: {stage.router_balance:g}, but the "
                "student is no mixture of experts; expected 0"
            )
        if stage.hidden_terms:
            shapes = student.decoder.config, teacher.decoder.config
            try:
                terms += hidden_loss.resolve_terms(stage.hidden_terms, *shapes)
            except ValueError as error:
                raise ConfigError(f"config.stages: {stage.name}.hidden_terms: {error}") from error
    if any(term.projection for term in terms):
        widths = student.decoder.config.width, teacher.decoder.config.width
        learned["projection"] = hidden_loss.init_projections(terms, *widths, key)
    return learned


def _token_kernel(config: RunConfig, teacher: Model | None, vocab_size: int) -> TokenKernel | None:
    """That of the teacher's input embeddings, where a stage has "transport"; the settings are the
    same in all that have, see `checks`."""
    settings = [stage.transport for stage in config.stages if stage.needs_token_kernel]
    if not settings:
        return None
    embeddings = teacher.decoder.input_embeddings(teacher.params, np.arange(vocab_size))
    kernel = token_kernel(embeddings, settings[0])
    if distributed.is_primary():
        print(f"transport: {kernel.num_tokens} of {vocab_size} tokens have neighbours")
    return kernel


def _soft_prompt(config, teacher, vocab_size: int, demonstrations, key) -> jax.Array | GatedPrefix:
    vectors = _vectors(config, teacher, vocab_size, demonstrations, key)
    return zero_gated(teacher.decoder, vectors) if config.soft_prompt.gated else vectors


def _vectors(config, teacher, vocab_size: int, demonstrations, key) -> jax.Array:
    chosen, tokenizer = config.soft_prompt, teacher.tokenizer
    if chosen.init == "random":
        return random_soft_prompt(key, chosen.length, teacher.decoder.config.embedding_width)
    if chosen.init == "examples":
        return pooled_soft_prompt(teacher.decoder, teacher.params, demonstrations, chosen.length)
    if chosen.init == "vocabulary":
        ids = jax.random.randint(key, (chosen.length,), 0, vocab_size)
    elif chosen.init == "pad":
        own = tokenizer.pad_token_id
        ids = [text_end(teacher) if own is None else own]
    else:
        ids = tokenizer(chosen.text, add_special_tokens=chosen.add_special_tokens)["input_ids"]
    if fault := unknown_token(ids, teacher.decoder.config.vocab_size, tokenizer):
        raise ConfigError(f"config.soft_prompt.init: {chosen.init!r}: {fault}")
    return init_soft_prompt(teacher.decoder, teacher.params, ids, chosen.length)
