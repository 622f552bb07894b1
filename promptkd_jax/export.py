"""`promptkd export --workdir DIR --output FOLDER`: a checkpoint of a run, for transformers.

The workdir is all that it needs: it may have been moved or copied, and the models and the data that
the run began with may be gone.
"""

import argparse
import contextlib
import functools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from promptkd_jax import flags
from promptkd_jax.infra import distributed, sharding
from promptkd_jax.infra.distributed import HostsError
from promptkd_jax.infra.files import check_writable, failures
from promptkd_jax.models.config import ModelError
from promptkd_jax.training.checkpoint import CheckpointError
from promptkd_jax.training.config import ConfigError, load_config
from promptkd_jax.training.experiment import SAVED, load_configs, save, with_date
from promptkd_jax.training.loop import open_checkpoints


def main(argv: Sequence[str] | None = None) -> None:
    """Writes student and soft prompt of the last, the best, or a numbered checkpoint."""
    options = _parser().parse_args(argv)
    with distributed.together(options):
        try:
            distributed.agree_on_options(options)
            export(options.workdir, options.step, options.output, flags.mesh_of(options))
        except (CheckpointError, ConfigError, ModelError, HostsError) as error:
            sys.exit(f"promptkd export: {error}")


def export(workdir: epath.Path, step: str, output: epath.Path, mesh: jax.sharding.Mesh) -> None:
    """See `main`.

    Args:
      step: "last", "best", or a number.
      mesh: of this machine's devices; not that of the run.

    Raises:
      CheckpointError: there is no such checkpoint, or `workdir` is not the folder of a run.
      ConfigError: the disk or the bucket of `workdir` or of `output` refuses.
      ModelError: the run has not come as far as to a checkpoint.
    """
    file = workdir / "config.json"
    with _named("--workdir", workdir):
        if not distributed.on_first(file.exists):
            raise CheckpointError(f"{file}: no such file; {workdir} is not the folder of a run")
        config = with_date(load_config([f"--config={file}"])[0], workdir)
    with _named("--output", output):
        check_writable(output)
    with _named("--workdir", workdir):
        models = load_configs(config, workdir)
        number, params = _restored(config, workdir, step, mesh)
    with _named("--output", output):
        paths = save(config, models, params, output)
    print(f"step {number}: " + ", ".join(f"{what} in {path}" for what, path in paths.items()))


@contextlib.contextmanager
def _named(option: str, folder: epath.Path) -> Iterator[None]:
    """Names the option whose folder cannot be read or written."""
    try:
        yield
    except failures(folder) as error:
        raise ConfigError(f"{option} {folder}: {error}") from error


def _restored(
    config: ConfigDict, workdir: epath.Path, step: str, mesh: jax.sharding.Mesh
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="promptkd export", description=main.__doc__)
    parser.add_argument("--workdir", required=True, type=flags.path, help="of a promptkd train")
    parser.add_argument("--output", required=True, type=flags.path)
    parser.add_argument("--step", default="last", type=_step, help="last, best, or a number")
    flags.add_mesh(parser)
    flags.add_processes(parser)
    return parser


if __name__ == "__main__":
    main()
