"""The paper's pipeline and its table: `promptkd reproduce --config FILE[:arg] --workdir DIR`.

The teacher is fine-tuned, the student for 3 epochs, then distilled by each of the methods; teacher
and students answer the five test sets with every seed. The same command continues one that was
stopped, and one with further methods, sets or seeds adds to it. `--dry-run` trains nothing, and
estimates how many hours of which chips each run takes.
"""

import argparse
from collections.abc import Sequence

import jax

from promptkd_jax.cli import flags
from promptkd_jax.evaluation.tables import markdown
from promptkd_jax.plan import chips, gpus
from promptkd_jax.plan.command import plan_runs
from promptkd_jax.plan.fit import fitted
from promptkd_jax.plan.tables import IN_TURN, hours_table
from promptkd_jax.studies import published
from promptkd_jax.studies.reproduce import SEEDS, named_models, reproduce, table
from promptkd_jax.training import recipes

DEVICES = "v5e-8,v6e-8,v5p-16,a100,h100"
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
    parser.add_argument(
        "--dry-run",
        nargs="?",
        const=DEVICES,
        metavar="DEVICES",
        help=f"train nothing, print the hours by TPU slice or GPU (default: {DEVICES})",
    )
    flags.add_processes(parser)


def run(options: argparse.Namespace, rest: Sequence[str]) -> None:
    if options.dry_run:
        print(_hours(options, rest))
        return
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


def _hours(options: argparse.Namespace, overrides: Sequence[str]) -> str:
    """The hours of all runs by device, in words and as a table."""
    jax.config.update("jax_platforms", "cpu")  # a TPU or GPU that is here stays free
    devices = [_device(name) for name in options.dry_run.split(",")]
    configs = named_models(
        options.config, options.methods, overrides, from_published=options.from_published
    )
    above = (
        "Hours that the training of each run takes by the estimate of `promptkd plan`, on the best "
        f"mesh by it: {IN_TURN}, each at its peak; without compilation, evaluation, checkpoints "
        "and what a teacher writes before. A real run is mostly slower. USD of list prices of "
        "TPUs; GPUs have none here."
    )
    return f"{above}\n\n{markdown(hours_table(plan_runs(configs, devices)))}"


def _device(name: str) -> chips.SliceTopology:
    is_gpu = name.lower().partition(":")[0] in gpus.GPUS
    return gpus.parse_device(name) if is_gpu else chips.parse_topology(name)
