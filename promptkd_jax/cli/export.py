"""A checkpoint of a run, for transformers: `promptkd export --workdir DIR --output FOLDER`.

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
from promptkd_jax.infra.errors import CheckpointError
from promptkd_jax.infra.files import check_writable, of_another_machine
from promptkd_jax.training.checks import read_run
from promptkd_jax.training.fields import RunConfig
from promptkd_jax.training.loop import open_checkpoints
from promptkd_jax.training.prepare import with_date
from promptkd_jax.training.save import SAVED, load_configs, save


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True, type=flags.path, help="of a promptkd train")
    parser.add_argument("--output", required=True, type=flags.path)
    parser.add_argument("--step", default="last", type=_step, help="last, best, or a number")
    flags.add_mesh(parser)
    flags.add_processes(parser)


def run(options: argparse.Namespace, rest: Sequence[str]) -> None:
    distributed.assert_same_options(options)
    export(options.workdir, options.step, options.output, flags.mesh_of(options))


def export(workdir: epath.Path, step: str, output: epath.Path, mesh: jax.sharding.Mesh) -> None:
    """Writes student and soft prompt of the last, the best, or a numbered checkpoint.

    Args:
      step: "last", "best", or a number.
      mesh: of this machine's devices; not that of the run.

    Raises:
      CheckpointError: there is no such checkpoint, or `workdir` is not the folder of a run.
      ConfigError: the disk or the bucket of `workdir` or of `output` refuses.
      ModelError: the run has not come as far as to a checkpoint.
    """
    file = workdir / "config.json"
    with flags.naming("--workdir", workdir):
        if not distributed.run_on_primary(file.exists):
            raise CheckpointError(f"{file}: no such file; {workdir} is not the folder of a run")
        with of_another_machine():  # the run's models and data may be gone, or out of reach
            run = read_run([f"--config={file}"])
        config = with_date(run, workdir)
    with flags.naming("--output", output):
        check_writable(output)
    with flags.naming("--workdir", workdir):
        models = load_configs(config, workdir)
        number, params = _restored(config, workdir, step, mesh)
    with flags.naming("--output", output):
        paths = save(config, models, params, output)
    print(f"step {number}: " + ", ".join(f"{what} in {path}" for what, path in paths.items()))


def _restored(
    config: RunConfig, workdir: epath.Path, step: str, mesh: jax.sharding.Mesh
) -> tuple[int, dict[str, Any]]:
    """The number of a checkpoint and its parameters, by their names in `SAVED`."""
    with open_checkpoints(config, workdir) as checkpoints:
        named = {"last": checkpoints.latest_step, "best": checkpoints.best_step}
        number = named[step]() if step in named else int(step)
        if number is None:
            raise CheckpointError(f"{workdir}/checkpoints has no {step} checkpoint")
        place = functools.partial(sharding.shardings, mesh=mesh)
        return number, checkpoints.restore_params(number, SAVED, place)


def _step(text: str) -> str:
    if text not in ("last", "best") and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither last, best, nor a number")
    return text
