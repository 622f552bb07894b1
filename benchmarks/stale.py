"""Rows written a step ahead (`one_step_off_policy`) against fresh ones, and the student they make;
or a soft prompt as it was before its update (`prompt_lag`) against the fresh one.

python benchmarks/stale.py [--stale rows] [--workdir .cache/stale] [--method gkd]
  [--seeds 10 20 30] [--steps 150] [--rate 5e-4]
python benchmarks/stale.py --stale prompt --method promptkd

The models and the generated text of `configs/compare.py:small`: both are pretrained once, then the
student learns from the teacher on its own answers, once in each way for every seed, in a process of
its own. What is there already is not made again. Prints a table in Markdown.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import statistics
import sys

import jax

from promptkd_jax.infra.metrics import read_metrics
from promptkd_jax.studies import comparison
from promptkd_jax.studies.runs import train_apart
from promptkd_jax.training.config.config_file import claim, load_config
from promptkd_jax.training.config.fields import NOT_IN_FINGERPRINT

HERE = pathlib.Path(__file__).parents[1]
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
LAST = 50  # updates
STALE = {"rows": {"one_step_off_policy": True}, "prompt": {"prompt_lag": 1}}
FIGURES = {  # of a run: name, format
    "loss": (f"student loss, last {LAST} updates", ".4f"),
    "kl_after": ("dev KL(p‖q), nats", ".4f"),
    "agreement_after": ("dev agreement", ".3f"),
    "rougeL_after": ("dev ROUGE-L", ".2f"),
}


def main() -> None:
    """Trains what is not there yet and prints the table."""
    options = _options()
    pretraining, runs = _runs(options)
    for run in (*pretraining, *runs.values()):
        if not (run.folder / "summary.json").exists():
            print(f"{run.name} …", file=sys.stderr, flush=True)
            claim(run.folder, run.config, NOT_IN_FINGERPRINT)
            train_apart(run)
    found = {key: _figures(run) for key, run in runs.items()}
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    print(f"`python {shlex.join(sys.argv)}`", end=": ")
    print(f"{_device()}; {versions}, Python {platform.python_version()}\n")
    print("\n".join(_table(found, options.seeds)))


def _runs(options: argparse.Namespace) -> tuple[list[comparison.Run], dict]:
    """The trainings of the teacher and the student, and by (stale, seed) the others."""
    config, _ = load_config([f"--config={HERE / 'configs/compare.py'}:small"])
    config = config.copy_and_resolve_references().unlock()
    config.methods, config.seeds = (options.method,), tuple(options.seeds)
    config.budget.steps = options.steps
    config.changes.all.learning_rate = options.rate
    config.run.update(log_every=1)
    made = comparison.plan_comparison(config, options.workdir)
    runs = {}
    for seed in options.seeds:
        for stale in (False, True):
            run = made.runs[options.method, seed]
            (stage,), kind = run.config.stages, f"stale {options.stale}" if stale else "fresh"
            stage = dataclasses.replace(stage, **STALE[options.stale] if stale else {})
            title = f"{run.name}, {kind}"
            own = dataclasses.replace(run.config, stages=(stage,), title=title)
            kind = kind.replace(" ", "-")
            folder = f"{options.method}-{options.steps}-{options.rate:g}-{kind}-seed{seed}"
            runs[stale, seed] = comparison.Run(own.title, own, options.workdir / folder)
    return list(made.pretraining.values()), runs


def _figures(run: comparison.Run) -> dict[str, float]:
    summary = json.loads((run.folder / "summary.json").read_text("utf-8"))
    rows = [row for row in read_metrics(run.folder) if "student_loss" in row]
    return summary | {"loss": statistics.fmean(row["student_loss"] for row in rows[-LAST:])}


def _table(found: dict, seeds: list[int]) -> list[str]:
    """Mean and deviation over the seeds of each way, and of the difference of both."""
    lines = [["way", *(name for name, _ in FIGURES.values())], ["---"] * (1 + len(FIGURES))]
    ways = {
        "before training": lambda key, seed: found[False, seed].get(key.replace("after", "before")),
        "fresh": lambda key, seed: found[False, seed][key],
        "stale": lambda key, seed: found[True, seed][key],
        "stale − fresh": lambda key, seed: found[True, seed][key] - found[False, seed][key],
    }
    for way, value in ways.items():
        cells = []
        for key, (_, form) in FIGURES.items():
            if way == "before training" and not key.endswith("_after"):
                cells.append("")
                continue
            values = [value(key, seed) for seed in seeds]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.fmean(values):{form}} ± {spread:{form}}")
        lines.append([way, *cells])
    return [f"| {' | '.join(line)} |" for line in lines]


def _device() -> str:
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{jax.device_count()} × {device.device_kind}"
    names = [
        line.partition(":")[2].strip()
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{os.cpu_count()} cores of {names[0] if names else platform.processor()}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = pathlib.Path(".cache/stale")
    parser.add_argument("--stale", choices=STALE, default="rows")
    parser.add_argument("--workdir", type=pathlib.Path, default=default)
    parser.add_argument("--method", default="gkd", help="one that writes rows during training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 20, 30])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rate", type=float, default=5e-4)
    options = parser.parse_args()
    options.workdir = options.workdir.resolve()
    return options


if __name__ == "__main__":
    main()
