"""What XLA's TPU compiler expects of a train step but for the writing of tokens, beside the least
that its products take.

PYTHONPATH=. python benchmarks/tpu_updates.py OUT.json [--before CHECKOUT] [--only NAME …]

Needs libtpu and no TPU. Compiles the step of PromptKD for every case of `CASES`, without dropout,
in a process of its own, and with `--before` also that of another checkout of this repository. What
is counted is reading prompts, both updates and the optimizers; estimates, not measurements: the
compiler counts operations one after the other, without collectives, copies that run beside them,
and the flash attention kernel. `benchmarks/tpu_rollouts.py` has the tokens.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
from typing import NamedTuple

from promptkd_jax.infra import sharding
from promptkd_jax.plan import ahead
from promptkd_jax.plan import command as plan
from promptkd_jax.plan.abstract_run import abstract_run
from promptkd_jax.plan.chips import parse_topology
from promptkd_jax.training.config.checks import checked
from promptkd_jax.training.config.config_file import load_config


class Case(NamedTuple):
    """A recipe on a slice, all rows of a step at once."""

    config: str
    topology: str
    mesh: tuple[int, int, int]


CASES = {
    "GPT-2 XL into base": Case("gpt2.py:student=base", "v5e:4x4", (1, 16, 1)),
    "GPT-2 XL into base, tensor 2": Case("gpt2.py:student=base", "v5e:4x4", (1, 8, 2)),
    "Llama 13B into 7B": Case("llama.py:student=7b", "v5e:8x8", (1, 8, 8)),
    "Llama-3.1 70B into 8B": Case("llama31.py:student=8b", "v6e:8x8", (4, 2, 8)),
}
COUNTED = ("prefill", "prompt update", "student update")  # phases of a plan
STATES = ("before", "after")


def main() -> None:
    """Compiles what is missing, and prints the table."""
    options = _options()
    file = pathlib.Path(options.out)
    if options.case:
        file.write_text(json.dumps(_expected(CASES[options.case])))
        return
    results = json.loads(file.read_text()) if file.exists() else {"cases": {}}
    results["versions"] = {x: importlib.metadata.version(x) for x in ("jax", "jaxlib", "libtpu")}
    packages = {"after": "."} | ({"before": options.before} if options.before else {})
    for name in options.only or CASES:
        found = results["cases"].setdefault(name, {})
        found["least"] = _least(CASES[name])
        for when, package in packages.items():
            if when not in found:
                found[when] = _elsewhere(name, package, file.with_suffix(f".{os.getpid()}"))
                file.write_text(json.dumps(results, indent=2) + "\n")
    print(_table(results["cases"]))


def _elsewhere(name: str, package: str, file: pathlib.Path) -> dict[str, int]:
    """`_expected` of the package of a checkout, in a process of its own."""
    where = [str(pathlib.Path(package).resolve()), *os.environ.get("PYTHONPATH", "").split(":")]
    environment = os.environ | {"PYTHONPATH": ":".join(where)}
    subprocess.run([sys.executable, __file__, file, "--case", name], env=environment, check=True)
    found = json.loads(file.read_text())
    file.unlink()
    return found


def _run(case: Case):
    changes = ("dropout=False", "gradient_accumulation_steps=1")
    flags = [f"--config.stages[0].{change}" for change in changes]
    config, _ = load_config([f"--config=configs/{case.config}", *flags])
    return abstract_run(checked(config)), parse_topology(case.topology)


def _expected(case: Case) -> dict[str, int]:
    """Cycles of all but the tokens, and bytes of temporaries, of the step as it is compiled."""
    run, slices = _run(case)
    mesh = ahead.described_mesh(dict(zip(sharding.AXES, case.mesh, strict=True)), slices)
    program = ahead.compile_step(run.on(mesh))
    if isinstance(program, ahead.TooLarge):
        raise SystemExit(program.message)
    once = program.expected_once
    cycles = once.cycles + once.kernel_flops / slices.chip.flops_per_cycle
    return {"cycles": round(cycles), "temporaries": program.temporaries}


def _least(case: Case) -> int:
    """Cycles of the products alone, at the peak of the matrix units."""
    run, slices = _run(case)
    found = plan.estimate(run, slices, dict(zip(sharding.AXES, case.mesh, strict=True)))
    seconds = sum(found["phases"][name]["seconds"]["compute"] for name in COUNTED)
    return round(seconds * slices.chip.clock)


def _table(cases: dict[str, dict]) -> str:
    """Cycles of a step without its tokens, in millions."""
    lines = [
        "| a step without its tokens | slice | products | before | after | after : products |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, found in cases.items():
        case = CASES[name]
        said = [f"{found['least'] / 1e6:,.0f}"]
        said += [f"{found[x]['cycles'] / 1e6:,.0f}" if x in found else "" for x in STATES]
        ratio = f"{found['after']['cycles'] / found['least']:.2f}" if "after" in found else ""
        slice_ = f"{case.topology}, {' x '.join(map(str, case.mesh))}"
        lines.append(f"| {name} | {slice_} | {' | '.join(said)} | {ratio} |")
    return "\n".join(lines)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", help="file of the results")
    parser.add_argument("--before", help="another checkout of this repository")
    parser.add_argument("--only", nargs="*", choices=CASES, help="of the cases")
    parser.add_argument("--case", choices=CASES, help="compile it, and write its cycles into OUT")
    return parser.parse_args()


if __name__ == "__main__":
    main()
