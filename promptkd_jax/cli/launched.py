"""A promptkd command that is about to be launched: read as it will read itself, and checked for the
devices that it will have, before these are paid for."""

from collections.abc import Sequence

from promptkd_jax.cli.main import COMMANDS, parse
from promptkd_jax.infra import sharding
from promptkd_jax.infra.errors import ConfigError
from promptkd_jax.infra.files import of_another_machine
from promptkd_jax.plan.abstract_run import abstract_mesh, abstract_run
from promptkd_jax.studies import comparison, reproduce
from promptkd_jax.training.config.checks import check_mesh, read_run
from promptkd_jax.training.config.config_file import read_config
from promptkd_jax.training.config.fields import RunConfig

ALONE = ("init", "data", "compare")  # of one process


@of_another_machine()
def check_command(words: Sequence[str], devices: int, number: int = 1) -> RunConfig | None:
    """Checks a command for so many devices, all of whose mistakes would show when these are there.

    Args:
      words: "promptkd", the name of a command, and its arguments.
      devices: of all processes together; number: the slices that they come in.

    Returns:
      The config of a `promptkd train`; None for other commands.

    Raises:
      ConfigError: there is no such command, a fault of its config or `--mesh`, or so many devices
        cannot share its work. ModelError: a model of unknown shape.
      SystemExit: an argument that it does not know.
    """
    name, arguments = (list(words[1:2]) or [""])[0], list(words[2:])
    if name not in COMMANDS:
        raise ConfigError(f"promptkd {name}: no such command; there are {', '.join(COMMANDS)}")
    if name == "plan":
        raise ConfigError("promptkd plan: is what checks, and not to be launched; run it here")
    if name in ALONE and devices > 1:
        raise ConfigError(f"promptkd {name} is one process, and not for {devices} devices")
    options, rest = parse(name, arguments)
    if name == "train":
        config = read_run(rest)
        sizes = _check_rows(config, devices, number)
        for stage in config.stages:
            abstract_run(config, stage.name).on(abstract_mesh(sizes)).arguments()
        return config
    if name == "cache":
        config = read_run(rest)
        sharding.mesh_shape(config.mesh.sizes, devices, number)
    elif name == "compare":  # its own config: of several runs
        made = comparison.plan_comparison(read_config(rest), options.workdir)
        for run in made.trainings:
            _check_rows(run.config, devices, number)
    elif name == "reproduce":  # of models that it makes itself
        how = options.config, options.workdir, options.methods, rest
        runs = reproduce.plan_reproduction(*how, from_published=options.from_published)
        for run in runs.values():
            _check_rows(run.config, devices, number)
    elif "mesh" in options:
        sharding.mesh_shape(sharding.parse_sizes(options.mesh), devices, number)
    return None


def _check_rows(config: RunConfig, devices: int, number: int) -> dict[str, int]:
    """The sizes of a config's mesh, which must divide the rows of all stages."""
    shape = sharding.mesh_shape(config.mesh.sizes, devices, number)
    sizes = dict(zip(sharding.AXES, shape))
    check_mesh(config, abstract_mesh(sizes))
    return sizes
