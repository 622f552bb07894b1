"""What a run leaves: student and soft prompt for transformers and PEFT, the report's model card."""

from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from promptkd_jax.data.templates import shows_date
from promptkd_jax.evaluation.report import model_card
from promptkd_jax.inference.generate import with_turn_end
from promptkd_jax.infra import distributed
from promptkd_jax.infra.errors import ModelError
from promptkd_jax.infra.files import make_folder, write_json
from promptkd_jax.models.decoder import Decoder
from promptkd_jax.models.io.convert import ADAPTER
from promptkd_jax.models.io.export import save_model, save_without_weights
from promptkd_jax.models.io.peft import (
    lora_config,
    read_lora_config,
    save_lora,
    save_soft_prompt,
)
from promptkd_jax.models.io.safetensors import read_json
from promptkd_jax.models.layers.gated_prefix import GatedPrefix
from promptkd_jax.models.layers.quantization import QUANTIZE
from promptkd_jax.models.load import RECORD, RECORDED, load_without_weights
from promptkd_jax.models.model import Model
from promptkd_jax.training import build
from promptkd_jax.training.config.fields import RunConfig
from promptkd_jax.training.experiment import Experiment

SAVED = ("student", "soft_prompt", "teacher")  # the groups of parameters that `save` writes


CONFIGS = "configs"  # folder of a workdir: what belongs to its models but their weights


def save_configs(experiment: Experiment, workdir: epath.Path) -> None:
    """Writes all that `save` needs but parameters, so that the student of a checkpoint can be had
    without the models that the run started from. `load_configs` reads it back."""
    for name in ("student", "teacher"):
        if model := getattr(experiment, name):
            save_without_weights(workdir / CONFIGS / name, model)
    if experiment.student.decoder.config.lora:
        make_folder(workdir / CONFIGS / "adapter")
        write_json(workdir / CONFIGS / "adapter" / ADAPTER, lora_config(experiment.student))


def load_configs(config: RunConfig, workdir: epath.Path) -> tuple[Model | None, Model]:
    """Reads (teacher, student) of a run, named as its config names them, without parameters.

    Raises:
      ModelError: the run has not come as far as to write them.
    """

    def load(name: str, path: str) -> Model:
        how = getattr(config, name)
        kept = dict(dtype=how.dtype, param_dtype=how.param_dtype)
        kept |= dict(quantization=QUANTIZE[how.quantize])
        found = load_without_weights(str(workdir / CONFIGS / name), **kept)
        asked = config.data.prompt_format(config.preset)
        return with_turn_end(found.replace(name=path), asked)

    student, teacher = (workdir / CONFIGS / name for name in ("student", "teacher"))
    if not distributed.run_on_primary(student.exists):
        raise ModelError(
            f"{student}: no such folder: the run has not begun to train yet; it has a checkpoint "
            "later, and the command that began it goes on where it was stopped"
        )
    student = load("student", config.student.path or config.teacher.path)
    if config.student.lora.is_used:
        adapter = read_json(workdir / CONFIGS / "adapter" / ADAPTER)
        decoder = student.decoder.config
        decoder = decoder.replace(lora=read_lora_config(adapter, decoder))
        student = student.replace(decoder=Decoder(decoder))
    teacher = (
        load("teacher", config.teacher.path) if distributed.run_on_primary(teacher.exists) else None
    )
    return teacher, student


def save(
    config: RunConfig,
    models: tuple[Model | None, Model],
    params: Mapping[str, Any],
    folder: epath.Path,
    metrics: Sequence[tuple] = (),
    *,
    step: str,
    dtype: str = "",
) -> dict[str, str]:
    """Writes a run's student, with a model card and how it was asked, and its soft prompt into
    `folder`; the teacher too, where it learned.

    Args:
      models: (teacher, student); their own parameters are not looked at.
      params: by group, as in `TrainState`; of a student with an adapter the frozen ones too.
      metrics: for the card, as `report.model_card` takes them.
      step: of which the parameters are, in words, for the card.
      dtype: of the weights; "": as they were trained.

    Returns:
      What lies where.
    """
    teacher, student = models
    start = build.short_name(student.name) if config.student.path else "layers of its teacher"
    taught_by = "none"
    if teacher:
        taught_by = teacher.card.get("base_model", build.short_name(teacher.name))
    licence = student.card.get("license", "not named by the model that it started from")
    facts = [
        ("Started from", student.card.get("base_model", start)),
        ("Teacher", taught_by),
        *((f"Stage {n}", build.describe(stage)) for n, stage in enumerate(config.stages, start=1)),
        ("Checkpoint", step),
        ("Training data", build.data_name(config)),
        ("Licence", f"{licence}, and what teacher and data demand"),
    ]
    lead = "A student distilled with promptkd_jax."
    card = model_card(build.title(config), lead, facts, known=student.card, metrics=metrics)
    asked = {name: getattr(config.data, name) for name in RECORDED}
    if not shows_date(config.data.template, student.tokenizer):
        del asked["date"]
    kept = dtype or student.decoder.config.param_dtype
    learned = _with_params(student, params["student"], kept)
    save_model(folder / "student", learned, card=card)
    write_json(folder / "student" / RECORD, asked)
    paths = {"student": str(folder / "student")}
    if config.student.lora.is_used and config.student.path:  # else nobody has its frozen model
        paths["adapter"] = str(folder / "adapter")
        save_lora(folder / "adapter", learned)
    if "teacher" in params:
        paths["teacher"] = str(folder / "teacher")
        learned = _with_params(teacher, params["teacher"], dtype or "float32")
        save_model(folder / "teacher", learned, card=card)
        write_json(folder / "teacher" / RECORD, asked)
    if (soft_prompt := params.get("soft_prompt")) is not None:
        if isinstance(soft_prompt, Mapping):  # a checkpoint knows its parts by name alone
            soft_prompt = GatedPrefix(**soft_prompt)
        paths["soft prompt"] = str(folder / "soft_prompt")
        save_soft_prompt(
            folder / "soft_prompt",
            soft_prompt,
            teacher=teacher.name,
            hf_config=teacher.hf_config,
        )
    return paths


def _with_params(model: Model, params: Any, dtype: str) -> Model:
    """The model with these parameters, to be written in `dtype`."""
    decoder = Decoder(model.decoder.config.replace(param_dtype=dtype))
    return model.replace(decoder=decoder, params=params)
