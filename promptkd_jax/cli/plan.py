"""What a run needs of TPUs not yet rented: `promptkd plan --config FILE[:arg] --topology v5e:8x8`.

Counts a train step's memory, work and traffic from shapes, and has XLA's TPU compiler, where it is
installed, compile the very step for these chips. No weights, no data, no TPU. Of several slices it
compares the best mesh of each; `-- promptkd COMMAND …` in place of a config checks a whole command
before it is launched. The exit status is 1 if nothing of what was asked for fits into the memory.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence

import jax

from promptkd_jax.cli import flags, launched
from promptkd_jax.infra.errors import ConfigError
from promptkd_jax.infra.files import make_folder, write_json
from promptkd_jax.infra.specs import Float, Int
from promptkd_jax.plan import chips, gpus
from promptkd_jax.plan.abstract_run import abstract_run
from promptkd_jax.plan.command import best_flags, plan_one, plan_run
from promptkd_jax.training.config.checks import read_run

TAKES_COMMAND = True
USAGE = "--config FILE[:arg] [options] [--config.a.b=VALUE …], or [options] -- promptkd COMMAND …"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    count, rows = flags.of(Int(low=1)), flags.of(Int(low=0))
    topology = f"a slice, such as {chips.EXAMPLES}; of several, v5e:8x8,v6e, the cheapest first"
    parser.add_argument("--topology", help=f"{topology} (default: of all chips)")
    text = "of one machine, in place of TPUs: 24GB, rtx4090, h100:8, or here (this machine's)"
    parser.add_argument("--device", help=text)
    text = "for a command after --, in place of a topology"
    parser.add_argument("--devices", type=count, help=text)
    parser.add_argument("--slices", type=count, default=1, help="joined by the slow network")
    parser.add_argument("--mesh", help="data,fsdp,tensor; one may be -1; default: config.mesh")
    parser.add_argument("--stage", help="of the config, by name; default: the last")
    parser.add_argument("--rows", type=rows, default=0, help="of the training data, if not counted")
    price = flags.of(Float(low=0.0))
    parser.add_argument("--price", type=price, help="USD per chip-hour; default: the list price")
    parser.add_argument("--search", action="store_true", help="try all meshes and micro-batches")
    parser.add_argument("--compile", type=count, default=3, help="so many of the best of --search")
    parser.add_argument("--no-compile", action="store_true", help="the estimate alone, in seconds")
    parser.add_argument("--output", type=flags.path, help="JSON file for all figures")


def run(options: argparse.Namespace, rest: Sequence[str]) -> None:
    if options.device != gpus.HERE:
        jax.config.update("jax_platforms", "cpu")  # a TPU or GPU that is here stays free
    if options.launched is not None:
        if rest:
            raise ConfigError(f"unknown arguments before --: {' '.join(rest)}")
        _check(options)
        return
    plan = plan_run(read_run(rest), options)
    if options.output:
        with flags.naming("--output", options.output):
            make_folder(options.output.parent)
            write_json(options.output, plan)
        print(f"written to {options.output}")
    if not any(each["memory"]["fits"] for each in plan.get("plans", [plan])):
        sys.exit(1)


def _check(options: argparse.Namespace) -> None:
    """Has a command that is about to be launched read, and plans its run where it is one.

    Raises:
      ConfigError: it cannot work on these devices.
    """
    if (options.devices is None) == (options.topology is None):
        raise ConfigError("give --topology or --devices: what the command after -- is to run on")
    slices = options.topology and chips.parse_topology(options.topology, options.slices)
    devices = slices.devices if slices else options.devices
    config = launched.check_command(options.launched, devices, options.slices)
    if config and slices:
        planned = abstract_run(config, options.stage, options.rows)
        memory = plan_one(planned, slices, options)["memory"]
        if sum(memory["kept"].values()) > memory["usable"]:
            raise ConfigError(f"config.mesh: {best_flags(planned, slices)}")
    print(f"checked for {devices} devices: {shlex.join(options.launched)}")
