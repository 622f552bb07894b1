"""Several methods from one student within one budget, in one table and report.

`promptkd compare --config FILE[:arg] --workdir DIR` trains what the folder does not hold yet, one
process after the other, and measures all of it. The same command continues.
"""

import argparse
from collections.abc import Sequence

from promptkd_jax.cli import flags
from promptkd_jax.studies import comparison_report
from promptkd_jax.studies.compare import compare
from promptkd_jax.training.config.config_file import read_config

USAGE = "--config FILE[:arg] --workdir DIR [--config.a.b=VALUE …]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    text = "folder of a disk: runs are processes of this machine that append to logs there"
    parser.add_argument("--workdir", required=True, type=flags.disk_path, help=text)


def run(options: argparse.Namespace, rest: Sequence[str]) -> None:
    comparison = compare(read_config(rest), options.workdir)
    print(comparison_report.comparison_markdown(comparison))
    print(f"the same, with plots and samples: {options.workdir / 'report.html'}")
