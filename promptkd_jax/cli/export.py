"""A checkpoint of a run, for transformers: `promptkd export --workdir DIR --output FOLDER`; or its
student for llama.cpp, if the output is named FILE.gguf.

The workdir is all that it needs: it may have been moved or copied, and the models and the data that
the run began with may be gone.
"""

import argparse
import functools
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

from promptkd_jax.cli import flags
from promptkd_jax.infra import distributed, sharding
from promptkd_jax.infra.errors import CheckpointError, ConfigError, ModelError
from promptkd_jax.infra.files import check_writable, of_another_machine
from promptkd_jax.infra.provenance import INPUTS, read_manifest
from promptkd_jax.models.io.export import STORED_IN
from promptkd_jax.models.io.gguf_export import QUANTIZATIONS, check_gguf, save_gguf
from promptkd_jax.models.io.peft import save_lora
from promptkd_jax.models.layers.lora import join
from promptkd_jax.training import build
from promptkd_jax.training.config.checks import read_run
from promptkd_jax.training.config.fields import RunConfig
from promptkd_jax.training.loop import open_checkpoints
from promptkd_jax.training.prepare import model_input, with_date
from promptkd_jax.training.run_models import load_frozen_student
from promptkd_jax.training.save import SAVED, load_configs, save


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True, type=flags.path, help="of a promptkd train")
    parser.add_argument("--output", required=True, type=flags.path, help="folder, or FILE.gguf")
    parser.add_argument(
        "--quantize",
        type=_quantization,
        help=f"type of the matrices of FILE.gguf: {', '.join(QUANTIZATIONS)} (default f16); "
        "K-quants such as Q4_K_M are made of such a file by llama.cpp's llama-quantize",
    )
    text = "write the LoRA adapter of the student alone, for PEFT: its base model is not needed"
    parser.add_argument("--adapter", action="store_true", help=text)
    parser.add_argument("--step", default="last", type=_step, help="last (default), best, a number")
    text = "of the weights (default: as they were trained)"
    parser.add_argument("--dtype", default="", choices=STORED_IN, help=text)
    flags.add_mesh(parser)
    flags.add_processes(parser)


def run(options: argparse.Namespace, rest: Sequence[str]) -> None:
    """Writes student and soft prompt of the last, the best, or a numbered checkpoint.

    Raises:
      CheckpointError: there is no such checkpoint, or --workdir is not the folder of a run.
      ConfigError: the disk or the bucket of --workdir or of --output refuses; --quantize without
        a GGUF file.
      GGUFError: llama.cpp does not run such a student.
      ModelError: the run has not come as far as to a checkpoint.
    """
    distributed.assert_same_options(options)
    workdir, output, mesh = options.workdir, options.output, flags.mesh_of(options)
    to_gguf = output.suffix.lower() == ".gguf"
    quantize = options.quantize or "f16"
    if options.quantize and not to_gguf:
        raise ConfigError(
            f"--quantize {options.quantize}: is for --output FILE.gguf, not for a folder ({output})"
        )
    if options.dtype and to_gguf:
        raise ConfigError(
            f"--dtype {options.dtype}: is for a folder; the type of {output} is --quantize's"
        )
    if options.adapter and (to_gguf or options.dtype):
        raise ConfigError(
            "--adapter: is for a folder, in float32; expected neither .gguf nor --dtype"
        )
    file = workdir / "config.json"
    with flags.naming("--workdir", workdir):
        if not distributed.run_on_primary(file.exists):
            raise CheckpointError(f"{file}: no such file; {workdir} is not the folder of a run")
        with of_another_machine():  # the run's models and data may be gone, or out of reach
            config = with_date(read_run([f"--config={file}"]), workdir)
    if options.adapter:
        _check_adapter(config, workdir)
    with flags.naming("--output", output):
        if output.is_file() and not to_gguf:
            raise ConfigError(f"--output {output}: is a file; expected a folder, or FILE.gguf")
        if output.is_dir() and to_gguf:
            raise ConfigError(f"--output {output}: is a folder; expected FILE.gguf")
        check_writable(output.parent if to_gguf else output)
    with flags.naming("--workdir", workdir):
        models = load_configs(config, workdir)
        if to_gguf:
            check_gguf(models[1], quantize)  # before gigabytes are read
        with open_checkpoints(config, workdir) as checkpoints:
            named = {"last": checkpoints.latest_step, "best": checkpoints.best_step}
            step = named[options.step]() if options.step in named else int(options.step)
            if step is None:
                raise CheckpointError(f"{workdir}/checkpoints has no {options.step} checkpoint")
            place = functools.partial(sharding.shardings, mesh=mesh)
            groups = ("student",) if to_gguf or options.adapter else SAVED
            params = checkpoints.restore_params(step, groups, place)
    student = models[1].replace(params=params["student"])
    if student.decoder.config.lora and not options.adapter:  # merged
        student = student.replace(params=_whole(config, workdir, params["student"], mesh))
    params |= {"student": student.params}
    with flags.naming("--output", output):
        if options.adapter:
            save_lora(output, student)
            paths = {"adapter": output}
        elif to_gguf:
            save_gguf(output, student.replace(name=build.title(config)), quantize=quantize)
            paths = {"student": output}
        else:
            paths = save(config, models, params, output, step=f"step {step}", dtype=options.dtype)
    begun = "" if distributed.run_on_primary((workdir / "summary.json").exists) else " (unfinished)"
    said = ", ".join(f"{what} in {path}" for what, path in paths.items())
    print(f"step {step} of {workdir}{begun}: {said}")


def _check_adapter(config: RunConfig, workdir: epath.Path) -> None:
    """Raises ConfigError where a run's student has no adapter, or one of a base in no folder."""
    if not config.student.lora.is_used:
        raise ConfigError(f"--adapter: the student of {workdir} has none (config.student.lora)")
    if not config.student.path:
        raise ConfigError(
            f"--adapter: the base of the student of {workdir} is layers of its teacher, which no "
            "folder has that an adapter could name; without --adapter the two are merged"
        )


def _whole(config: RunConfig, workdir: epath.Path, adapter: Any, mesh: jax.sharding.Mesh) -> Any:
    """The adapter beside the parameters that it changes, which no checkpoint has."""
    field = "student" if config.student.path else "teacher"
    try:
        begun = distributed.run_on_primary(lambda: read_manifest(workdir / INPUTS))
        if not model_input(config, field).items() <= begun.items():
            path = getattr(config, field).path
            raise ModelError(f"{path} (config.{field}.path) is not what the run began with")
        with jax.set_mesh(mesh):
            return join(load_frozen_student(config, mesh).params, adapter)
    except ModelError as error:
        alone = "; --adapter writes it alone" if config.student.path else ""
        raise ModelError(f"the model that the adapter changes: {error}{alone}") from error


def _quantization(text: str) -> str:
    if (name := text.lower()) not in QUANTIZATIONS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is none of {', '.join(QUANTIZATIONS)}; other types are made of f16 files by "
            "llama.cpp, such as: llama-quantize FILE.gguf Q4_K_M.gguf Q4_K_M"
        )
    return name


def _step(text: str) -> str:
    if text not in ("last", "best") and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither last, best, nor a number")
    return text
