"""A checkpoint of a run, for transformers: `promptkd export --workdir DIR --output FOLDER`; or its
student for llama.cpp, if the output is named FILE.gguf.

The workdir is all that it needs: it may have been moved or copied, and the models and the data that
the run began with may be gone.
"""

import argparse
import functools
from collections.abc import Sequence

from promptkd_jax.cli import flags
from promptkd_jax.infra import distributed, sharding
from promptkd_jax.infra.errors import CheckpointError, ConfigError
from promptkd_jax.infra.files import check_writable, of_another_machine
from promptkd_jax.models.io.export import STORED_IN
from promptkd_jax.models.io.gguf_export import QUANTIZATIONS, check_gguf, save_gguf
from promptkd_jax.training.checks import read_run
from promptkd_jax.training.loop import open_checkpoints
from promptkd_jax.training.prepare import with_date
from promptkd_jax.training.save import SAVED, load_configs, save


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True, type=flags.path, help="of a promptkd train")
    parser.add_argument("--output", required=True, type=flags.path, help="folder, or FILE.gguf")
    parser.add_argument(
        "--quantize",
        choices=QUANTIZATIONS,
        help="type of the matrices of FILE.gguf (default f16); K-quants such as Q4_K_M are made of "
        "such a file by llama.cpp's llama-quantize",
    )
    parser.add_argument("--step", default="last", type=_step, help="last, best, or a number")
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
    to_gguf = output.suffix == ".gguf"
    quantize = options.quantize or "f16"
    if options.quantize and not to_gguf:
        raise ConfigError(
            f"--quantize {options.quantize}: is for --output FILE.gguf, not for a folder ({output})"
        )
    if options.dtype and to_gguf:
        raise ConfigError(
            f"--dtype {options.dtype}: is for a folder; the type of {output} is --quantize's"
        )
    file = workdir / "config.json"
    with flags.naming("--workdir", workdir):
        if not distributed.run_on_primary(file.exists):
            raise CheckpointError(f"{file}: no such file; {workdir} is not the folder of a run")
        with of_another_machine():  # the run's models and data may be gone, or out of reach
            config = with_date(read_run([f"--config={file}"]), workdir)
    with flags.naming("--output", output):
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
            groups = ("student",) if to_gguf else SAVED
            params = checkpoints.restore_params(step, groups, place)
    with flags.naming("--output", output):
        if to_gguf:
            student = models[1].replace(params=params["student"])
            save_gguf(output, student, quantize=quantize)
            paths = {"student": output}
        else:
            paths = save(config, models, params, output, dtype=options.dtype)
    print(f"step {step}: " + ", ".join(f"{what} in {path}" for what, path in paths.items()))


def _step(text: str) -> str:
    if text not in ("last", "best") and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither last, best, nor a number")
    return text
