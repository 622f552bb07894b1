"""`promptkd export --workdir DIR --output FOLDER`: a checkpoint of a run, for transformers."""

import argparse
import sys
from collections.abc import Sequence

import jax
from etils import epath

from promptkd_jax import hosts, sharding
from promptkd_jax.checkpoint import CheckpointError
from promptkd_jax.config import ConfigError, load_config
from promptkd_jax.data import DataError
from promptkd_jax.experiment import prepare, save
from promptkd_jax.files import to_path
from promptkd_jax.hosts import HostsError
from promptkd_jax.loop import open_checkpoints
from promptkd_jax.models.config import ModelError


def main(argv: Sequence[str] | None = None) -> None:
    """Writes student and soft prompt of the last, the best, or a numbered checkpoint."""
    options = _parser().parse_args(argv)
    with hosts.together(options):
        try:
            hosts.agree_on_options(options)
            sizes = sharding.parse_sizes(options.mesh)
            export(options.workdir, options.step, options.output, sizes)
        except (CheckpointError, ConfigError, DataError, ModelError, HostsError) as error:
            sys.exit(f"promptkd export: {error}")


def export(workdir: epath.Path, step: str, output: epath.Path, mesh: dict[str, int]) -> None:
    """See `main`. Raises CheckpointError where there is no such checkpoint.

    Args:
      mesh: sizes of its axes, on this machine.
    """
    file = workdir / "config.json"
    if not hosts.on_first(file.exists):
        raise CheckpointError(f"{file}: no such file; {workdir} is not the folder of a run")
    config, _ = load_config([f"--config={file}"])
    config.mesh.update(mesh)
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh), open_checkpoints(config, workdir) as checkpoints:
        named = {"last": checkpoints.latest_step, "best": checkpoints.best_step}
        number = named[step]() if step in named else int(step)
        if number is None:
            raise CheckpointError(f"{workdir}/checkpoints has no {step} checkpoint")
        experiment = prepare(config, workdir, mesh)
        like = experiment.abstract_state(), experiment.unpadded_state()
        state, _ = checkpoints.restore(number, *like)
    paths = save(experiment, state, output)
    print(f"step {number}: " + ", ".join(f"{what} in {path}" for what, path in paths.items()))


def _step(text: str) -> str:
    if text not in ("last", "best") and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither last, best, nor a number")
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="promptkd export", description=main.__doc__)
    parser.add_argument("--workdir", required=True, type=to_path, help="of a promptkd train")
    parser.add_argument("--output", required=True, type=to_path)
    parser.add_argument("--step", default="last", type=_step, help="last, best, or a number")
    hosts.add_mesh_argument(parser)
    hosts.add_arguments(parser)
    return parser


if __name__ == "__main__":
    main()
