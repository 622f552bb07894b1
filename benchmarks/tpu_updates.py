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
import json
import pathlib
import subprocess
import sys
import tempfile
from typing import NamedTuple

from tpu_rollouts import environment, parser_of, with_missing

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
    "Qwen3 30B-A3B into 1.7B": Case("qwen3.py:student=1.7b", "v5e:4x4", (1, 4, 4)),
}
COUNTED = ("prefill", "prompt update", "student update")  # phases of a plan
STATES = ("before", "after")


def main() -> None:
    """Compiles what is missing, and prints the table."""
    options = _options()
    if options.case:
        pathlib.Path(options.out).write_text(json.dumps(_expected(CASES[options.case])))
        return
    print(_table(with_missing(options, CASES, _least, _elsewhere)))


def _elsewhere(name: str, package: str) -> dict[str, int]:
    """`_expected` of the package of a checkout, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "found.json"
        command = [sys.executable, __file__, str(file), "--case", name]
        subprocess.run(command, env=environment(package), check=True)
        return json.loads(file.read_text())


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
    parser = parser_of(__doc__.splitlines()[0], CASES)
    parser.add_argument("--case", choices=CASES, help="compile it, and write its cycles into OUT")
    return parser.parse_args()


if __name__ == "__main__":
    main()
