"""One run, from models and data to a report: `promptkd train --config FILE[:arg] --workdir DIR`.

The same command continues a run that was stopped, and says so of one that is finished.
"""

import argparse
from collections.abc import Sequence

from promptkd_jax.cli import flags
from promptkd_jax.plan.remat import with_chosen_remat
from promptkd_jax.training import fields
from promptkd_jax.training import run as training
from promptkd_jax.training.config import read_config

USAGE = "--config FILE[:arg] --workdir DIR [--config.a.b=VALUE …]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    text = "folder of the run, or gs://BUCKET/…"
    parser.add_argument("--workdir", required=True, type=flags.path, help=text)
    flags.add_processes(parser)


def run(options: argparse.Namespace, rest: Sequence[str]) -> None:
    config = read_config(rest)
    fields.check_recipe(config)
    training.run(config, options.workdir, with_chosen_remat)
