"""The paper's pipeline and its table: `promptkd reproduce --config FILE[:arg] --workdir DIR`.

The teacher is fine-tuned, the student for 3 epochs, then distilled by each of the methods; teacher
and students answer the five test sets with every seed. The same command continues one that was
stopped, and one with further methods, sets or seeds adds to it.
"""

import argparse
from collections.abc import Sequence

from promptkd_jax.cli import flags
from promptkd_jax.evaluation.tables import markdown
from promptkd_jax.plan.fit import fitted
from promptkd_jax.studies import published
from promptkd_jax.studies.reproduce import SEEDS, reproduce, table
from promptkd_jax.training import recipes

USAGE = "--config FILE[:arg] --workdir DIR [options] [--config.a.b=VALUE …]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="such as configs/gpt2.py:student=base")
    parser.add_argument("--workdir", required=True, type=flags.path)
    parser.add_argument(
        "--methods", nargs="+", default=["promptkd"], choices=recipes.METHODS, metavar="METHOD"
    )
    flags.add_seeds(parser, SEEDS)
    parser.add_argument(
        "--sets",
        nargs="+",
        default=[],
        metavar="NAME=FILE",
        help=f"JSON lines; NAME is one of {', '.join(published.SETS)}",
    )
    parser.add_argument(
        "--from-published",
        action="store_true",
        help="start from the fine-tuned models that the config names",
    )
    flags.add_processes(parser)


def run(options: argparse.Namespace, rest: Sequence[str]) -> None:
    rows = reproduce(
        options.config,
        options.workdir,
        methods=options.methods,
        seeds=options.seeds,
        sets=options.sets,
        overrides=rest,
        from_published=options.from_published,
        choose_remat=fitted,
    )
    print(markdown(table(rows, len(options.seeds))))
    print(f"written to {options.workdir}/reproduction.json and reproduction.md")
