"""One run, from models and data to a report: `promptkd train --config FILE[:arg] --workdir DIR`.

The same command continues a run that was stopped, and says so of one that is finished.
"""

import argparse
from collections.abc import Sequence

import jax

from promptkd_jax.cli import flags
from promptkd_jax.infra.errors import ConfigError, TrainingError
from promptkd_jax.plan.fit import fitted, out_of_memory
from promptkd_jax.training import run as training
from promptkd_jax.training.config.checks import read_run
from promptkd_jax.training.config.field_help import config_help

USAGE = "--config FILE[:arg] --workdir DIR [--config.a.b=VALUE …]"


class _HelpConfig(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        try:
            print(config_help(values))
        except ConfigError as error:
            raise argparse.ArgumentError(self, str(error)) from error
        parser.exit()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    text = "folder of the run, or gs://BUCKET/…"
    parser.add_argument("--workdir", required=True, type=flags.path, help=text)
    text = "describe all fields of a config, or those of a group such as stages[0].sampling"
    how = dict(nargs="?", const="", metavar="PATH", action=_HelpConfig)
    parser.add_argument("--help-config", help=text, **how)
    flags.add_processes(parser)


def run(options: argparse.Namespace, rest: Sequence[str]) -> None:
    config = read_run(rest)
    try:
        training.run(config, options.workdir, fitted)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise TrainingError(out_of_memory(config, error)) from error
