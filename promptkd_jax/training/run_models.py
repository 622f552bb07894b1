"""The models of a run: teacher and student, and what they agree on: vocabulary, chat template, and
the tokens that end a response.
"""

import dataclasses
import functools
import itertools
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax

from promptkd_jax.data.templates import read_chat_template
from promptkd_jax.inference.generate import with_turn_end
from promptkd_jax.infra import distributed, sharding
from promptkd_jax.infra.errors import ModelError
from promptkd_jax.models.config import DecoderConfig, LoRA
from promptkd_jax.models.decoder import Decoder
from promptkd_jax.models.io import identity
from promptkd_jax.models.io.convert import ADAPTER, adapter_folder
from promptkd_jax.models.io.params import abstract_params, check_pairs, padded_to
from promptkd_jax.models.io.peft import load_lora, lora_modules
from promptkd_jax.models.layers.lora import adapter_shapes, init_adapter
from promptkd_jax.models.layers.quantization import QUANTIZE
from promptkd_jax.models.load import load_model, load_tokenizer, load_without_weights
from promptkd_jax.models.model import (
    Model,
    add_adapter,
    check_text,
    chosen_layers,
    end_ids,
    keep_layers,
)
from promptkd_jax.training import build
from promptkd_jax.training.config.checks import needs_the_teacher
from promptkd_jax.training.config.field_specs import TEACHER
from promptkd_jax.training.config.fields import ModelConfig, RunConfig

_ADAPTER = 2**31  # folded into the seed's key


KEPT = ("param_dtype", "quantize", "offload")  # fields of a model that say how arrays are kept


def load_models(config: RunConfig, mesh: jax.sharding.Mesh) -> tuple[Model | None, Model]:
    """(teacher, student) on the mesh, both ended by the tokens that end either, and a turn of the
    student's chat template; no teacher where nothing looks at one.

    Raises:
      ModelError: a model that cannot be used, or has no tokenizer.
      ConfigError: a mesh that cuts pairs of int4.
      DataError: a chat template that cannot be read or rendered.
    """

    def adapt(student):
        return _with_adapter(config, student, mesh)

    models = choose_models(config, functools.partial(_load, config, mesh), adapt=adapt)
    return ended_alike(config, *models)


def ended_alike(
    config: RunConfig, teacher: Model | None, student: Model
) -> tuple[Model | None, Model]:
    """Returns both with one chat template, the same tokens that end a response, and how many tokens
    they share; the teacher with the student's tokenizer where it has none.

    Raises:
      ModelError, DataError: as `load_models`.
    """
    check_text(student)
    if teacher is not None:
        teacher = teacher.replace(tokenizer=teacher.tokenizer or student.tokenizer)
        check_text(teacher)
    set_chat_template(config, teacher and teacher.tokenizer, student.tokenizer)
    known = student.replace(eos_ids=end_ids(teacher, student))
    eos_ids = with_turn_end(known, config.data.prompt_format(config.preset)).eos_ids
    if eos_ids != known.eos_ids:
        marks = student.tokenizer.convert_ids_to_tokens(list(eos_ids))
        how = f"rows end with {marks[0]}, as the chat template ends a turn"
        print(f"{how}; sampling stops at {' and '.join(marks)}", flush=True)
    shared, eos_ids = _shared_ends(config, teacher, student, eos_ids)
    student = student.replace(eos_ids=eos_ids, shared_tokens=shared)
    return teacher and teacher.replace(eos_ids=eos_ids, shared_tokens=shared), student


def _shared_ends(
    config: RunConfig, teacher: Model | None, student: Model, eos_ids: tuple[int, ...]
) -> tuple[int, tuple[int, ...]]:
    """How many tokens the models share, and which of these end a response; names the special tokens
    that they do not share.

    Raises:
      ModelError: their tokenizers differ, or in the token that ends rows.
    """
    if teacher is None and any(stage.teacher_view == "cached" for stage in config.stages):
        teacher = load_without_weights(config.teacher.path)  # of which the cache knows no more
        teacher = teacher.replace(tokenizer=teacher.tokenizer or student.tokenizer)
    shared = shared_vocabulary(teacher, student)
    if teacher is not None and (differing := _differing_tokens(teacher, student)):
        print(
            f"teacher and student share the tokens 0 to {shared - 1}; special tokens behind them "
            f"are cut off, {len(differing)} of which differ: {_some(differing)}",
            flush=True,
        )
    if eos_ids[0] >= shared:
        token = student.tokenizer.convert_ids_to_tokens(eos_ids[0])
        raise ModelError(
            f"rows end with {token!r} (id {eos_ids[0]}), but teacher {teacher.name} and student "
            f"{student.name} share only the tokens 0 to {shared - 1}; where the ids mean the same, "
            "give both the tokenizer files of one of them"
        )
    return shared, tuple(x for x in eos_ids if x < shared)


def set_chat_template(config: RunConfig, teacher: Any, student: Any) -> None:
    """Gives the student's tokenizer the chat template that `data.chat_template` names, or the
    teacher's where it has none of its own; one of a file to the teacher's tokenizer too.

    Raises:
      ModelError: the teacher has none.
      DataError: the file cannot be read.
    """
    chosen = config.data.chat_template
    if config.data.template != "chat":
        return
    if chosen not in ("", TEACHER):
        for tokenizer in filter(None, (teacher, student)):
            tokenizer.chat_template = read_chat_template(chosen)
        return
    if not chosen and (student.chat_template or not config.teacher.path):
        return
    theirs = teacher or load_tokenizer(config.teacher.path)
    if theirs is not None and theirs.chat_template:
        print(f"the chat template is that of the teacher, {config.teacher.path}", flush=True)
        student.chat_template = theirs.chat_template
    elif chosen:
        raise ModelError(
            f"config.data.chat_template: 'teacher', and {config.teacher.path} has none; expected a "
            "file, or another config.data.template"
        )


def choose_models(
    config: RunConfig,
    load: Callable[[str, str], Model],
    keep_layers: Callable[[Model, tuple[int, ...]], Model] = keep_layers,
    adapt: Callable[[Model], Model] = lambda student: student,
) -> tuple[Model | None, Model]:
    """(teacher, student); no teacher where nothing looks at one.

    Args:
      load: gives the model at a path, kept and computed as "teacher" or "student" of the config
        says.
      keep_layers: as `model.keep_layers`; another one where parameters are shapes.
      adapt: gives a student its adapter, where the config has one.
    """
    teacher, measured = None, config.evaluation.teacher and config.teacher.path
    if needs_the_teacher(config) or measured:
        teacher = load(config.teacher.path, "teacher")
    lora, path = config.student.lora.is_used, config.student.path
    if path and not (teacher and shares_teacher(config)):
        student = load(path, "student")
        return teacher, adapt(student) if lora else student
    # The teacher itself, which an adapter leaves as it is, or some of its layers; read again where
    # the student is kept otherwise.
    if _kept_alike(config):
        how = dict(dtype=config.student.dtype, remat=build.remat(config.student))
        how |= dict(kv_cache_dtype=config.student.kv_cache_dtype)
        student = teacher.replace(decoder=Decoder(teacher.decoder.config.replace(**how)))
    else:
        student = load(config.teacher.path, "student").replace(tokenizer=teacher.tokenizer)
    if not path:
        layers = chosen_layers(student.decoder.config.num_layers, config.student.layers)
        student = keep_layers(student, layers)
    return teacher, adapt(student) if lora else student


def load_frozen_student(config: RunConfig, mesh: jax.sharding.Mesh) -> Model:
    """The student as it was before a run, without an adapter. Raises as `load_models`."""
    if config.student.path:
        return _load(config, mesh, config.student.path, "student")
    evaluation = dataclasses.replace(config.evaluation, teacher=False)
    alone = dataclasses.replace(config, stages=(), evaluation=evaluation)
    return choose_models(alone, functools.partial(_load, config, mesh))[1]


def _load(config: RunConfig, mesh: jax.sharding.Mesh, path: str, field: str) -> Model:
    how: ModelConfig = getattr(config, field)
    kept = dict(dtype=how.dtype, param_dtype=how.param_dtype)
    kept |= dict(quantize=how.quantize, offload=how.offload)
    if how.quantize == "int4":  # before the file is opened: says which field asks for it
        decoder = load_without_weights(path).decoder.config
        decoder = decoder.replace(quantization=QUANTIZE["int4"], tensor_parts=mesh.shape["tensor"])
        check_quantized(decoder, field, path, mesh)
    model = load_model(path, **kept, remat=build.remat(how), mesh=mesh)
    decoder = model.decoder.config.replace(kv_cache_dtype=how.kv_cache_dtype)
    model = model.replace(decoder=Decoder(decoder))
    if padding := model.decoder.config.padding:
        print(f"{path}: padded for mesh.tensor = {mesh.shape['tensor']}: {padding}")
    return model


def check_quantized(config: DecoderConfig, field: str, path: str, mesh: Any = None) -> None:
    """`check_pairs` of the model at `path`, which is the "teacher" or "student" of a run."""
    check_pairs(config, f"config.{field}.quantize ({path})", mesh)


def shares_teacher(config: RunConfig) -> bool:
    """Whether the student is the teacher with an adapter, both with the same arrays."""
    teacher, student = config.teacher, config.student
    same = student.path == teacher.path and _kept_alike(config)
    return bool(student.path) and same and student.lora.is_used


def _kept_alike(config: RunConfig) -> bool:
    return all(getattr(config.teacher, x) == getattr(config.student, x) for x in KEPT)


def lora_of(config: RunConfig, student: Model) -> LoRA:
    """The shape of the student's adapter.

    Raises:
      ModelError: the adapter of `config.student.lora.path` is none, or for another model; a target
        that the student does not have.
    """
    chosen, decoder = config.student.lora, student.decoder.config
    if chosen.path:
        return load_lora(lora_folder(chosen.path), decoder)[0]
    where = "config.student.lora.target_modules"
    modules = lora_modules(decoder, chosen.target_modules, where)
    return LoRA(chosen.rank, chosen.alpha, modules, chosen.use_rslora, chosen.dropout)


def lora_folder(path: str) -> pathlib.Path:
    """The folder of the adapter of `config.student.lora.path`. Raises ModelError: there is none."""
    try:
        if not ((folder := adapter_folder(path)) / ADAPTER).exists():
            raise ModelError(f"{folder}: has no {ADAPTER}")
        return folder
    except ModelError as error:
        raise ModelError(
            f"config.student.lora.path: {error}; expected the folder of an adapter of PEFT, or "
            "that of a run which trained one"
        ) from error


def _with_adapter(config: RunConfig, student: Model, mesh: jax.sharding.Mesh) -> Model:
    """The student with the adapter that it starts with, on the mesh. Raises as `lora_of`."""
    # An adapter is beside whole kernels, in however few bits these are.
    lora, plain = lora_of(config, student), student.decoder.config.replace(quantization=None)
    own = plain.replace(tensor_parts=1)
    if path := config.student.lora.path:
        _, adapter = load_lora(lora_folder(path), own)
    else:
        key = jax.random.fold_in(jax.random.key(config.seed), _ADAPTER)
        adapter = init_adapter(abstract_params(own), lora, key)
    adapter = padded_to(adapter, adapter_shapes(abstract_params(plain), lora))
    return add_adapter(student, lora, jax.device_put(adapter, sharding.shardings(adapter, mesh)))


def shared_vocabulary(teacher: Model | None, student: Model) -> int:
    """How many tokens teacher and student share, from 0 on: what is behind them, padding and
    special tokens that only one of them has, is cut off the distributions of both.

    Raises:
      ModelError: their tokenizers differ in other tokens, or in special ones among the others.
    """
    if teacher is None:
        return student.vocab_size
    differing = _differing_tokens(teacher, student)
    if not differing:
        return min(teacher.vocab_size, student.vocab_size)
    first = min(differing)
    vocabularies = [m.tokenizer.get_vocab().values() for m in (teacher, student)]
    special = [m.tokenizer.added_tokens_decoder for m in (teacher, student)]
    behind = {x for ids, added in zip(vocabularies, special) for x in ids if x not in added}
    if behind and max(behind) >= first:
        whole = max(len(ids) for ids in vocabularies)
        raise ModelError(
            f"teacher {teacher.name} and student {student.name} have different tokenizers: "
            f"{len(differing)} of {whole} ids are other tokens, such as {_some(differing)}; "
            "distillation on logits needs the same (only special tokens behind all others may "
            "differ)"
        )
    return min(teacher.vocab_size, student.vocab_size, first)


def _differing_tokens(teacher: Model, student: Model) -> dict[int, tuple[str | None, str | None]]:
    """The ids, ascending, that are not the same token for both, with the teacher's and the
    student's; None for one that has none."""
    theirs, ours = (m.tokenizer.get_vocab() for m in (teacher, student))
    if theirs == ours:
        return {}
    theirs, ours = ({id: token for token, id in x.items()} for x in (theirs, ours))
    both = {id: (theirs.get(id), ours.get(id)) for id in sorted(theirs.keys() | ours.keys())}
    return {id: pair for id, pair in both.items() if pair[0] != pair[1]}


def _some(differing: Mapping[int, tuple[str | None, str | None]]) -> str:
    listed = [
        f"{id} ({theirs or 'none'} of the teacher, {ours or 'none'} of the student)"
        for id, (theirs, ours) in itertools.islice(differing.items(), 5)
    ]
    return ", ".join(listed) + (", …" if len(differing) > len(listed) else "")


def agree_on_models(*models: Model | None) -> None:
    """Raises HostsError where the processes of a run read different ones."""
    for model in filter(None, () if distributed.is_single_process() else models):
        facts = (model.hf_config, identity.tokenizer_digest(model.tokenizer))
        facts = json.dumps(facts, sort_keys=True) + identity.quick_digest(model.name)
        distributed.assert_same(f"the model {model.name}", facts)
