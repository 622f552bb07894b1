"""The models of a run: teacher and student, and what they agree on: vocabulary, chat template, and
the tokens that end a response.
"""

import json
from collections.abc import Callable
from typing import Any

import jax

from promptkd_jax.data.templates import read_chat_template
from promptkd_jax.inference.generate import with_turn_end
from promptkd_jax.infra import distributed
from promptkd_jax.infra.errors import ModelError
from promptkd_jax.models.decoder import Decoder
from promptkd_jax.models.io import identity
from promptkd_jax.models.load import load_model, load_tokenizer
from promptkd_jax.models.model import Model, check_text, chosen_layers, end_ids, keep_layers
from promptkd_jax.training import build
from promptkd_jax.training.checks import needs_the_teacher
from promptkd_jax.training.field_specs import TEACHER
from promptkd_jax.training.fields import ModelConfig, RunConfig


def load_models(config: RunConfig, mesh: jax.sharding.Mesh) -> tuple[Model | None, Model]:
    """(teacher, student) on the mesh, both ended by the tokens that end either, and a turn of the
    student's chat template; no teacher where nothing looks at one.

    Raises:
      ModelError: a model that cannot be used, or has no tokenizer.
      DataError: a chat template that cannot be read or rendered.
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

    return ended_alike(config, *choose_models(config, load))


def ended_alike(
    config: RunConfig, teacher: Model | None, student: Model
) -> tuple[Model | None, Model]:
    """Returns both with one chat template and the same tokens that end a response, the teacher with
    the student's tokenizer where it has none.

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
    student = student.replace(eos_ids=eos_ids)
    return teacher and teacher.replace(eos_ids=eos_ids), student


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
    load: Callable[[str, ModelConfig], Model],
    keep_layers: Callable[[Model, tuple[int, ...]], Model] = keep_layers,
) -> tuple[Model | None, Model]:
    """(teacher, student); no teacher where nothing looks at one.

    Args:
      load: gives the model at a path, kept and computed as its config says.
      keep_layers: as `model.keep_layers`; another one where parameters are shapes.
    """
    teacher, measured = None, config.evaluation.teacher and config.teacher.path
    if needs_the_teacher(config) or measured:
        teacher = load(config.teacher.path, config.teacher)
    if config.student.path:
        return teacher, load(config.student.path, config.student)
    # Some layers of the teacher; read again where the student is kept in another dtype.
    if config.teacher.param_dtype != config.student.param_dtype:
        whole = load(config.teacher.path, config.student).replace(tokenizer=teacher.tokenizer)
    else:
        how = dict(dtype=config.student.dtype, remat=build.remat(config.student))
        whole = teacher.replace(decoder=Decoder(teacher.decoder.config.replace(**how)))
    layers = chosen_layers(whole.decoder.config.num_layers, config.student.layers)
    return teacher, keep_layers(whole, layers)


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


def agree_on_models(*models: Model | None) -> None:
    """Raises HostsError where the processes of a run read different ones."""
    for model in filter(None, () if distributed.is_single_process() else models):
        facts = (model.hf_config, identity.tokenizer_digest(model.tokenizer))
        facts = json.dumps(facts, sort_keys=True) + identity.quick_digest(model.name)
        distributed.assert_same(f"the model {model.name}", facts)
