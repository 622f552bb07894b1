"""Where the time of ours goes, operation by operation.

python benchmarks/hotspots.py [--cases cpu|gpu] [--case NAME] [--part update] [--top 30]
  [--trace FOLDER]

Traces one part of a case after a warm-up and adds up what each operation of the compiled program
took. What runs side by side counts twice; loops and branches are left out for what is in them. On a
GPU kernels are launched one by one: a trace shows those of a command buffer as one.
`--trace` keeps the trace, for TensorBoard or Perfetto.
"""

import argparse
import collections
import os
import pathlib
import tempfile
import time
from collections.abc import Sequence

import jax
import ours
import work
from bench import MODELS, STEP
from cases import CASES

KERNEL_BY_KERNEL = "--xla_gpu_enable_command_buffer="
CONTROL = ("while", "call", "conditional")


def main(argv: Sequence[str] | None = None) -> None:
    """Traces and prints a table."""
    options = _options(argv)
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {KERNEL_BY_KERNEL}"
    case = next(case for case in CASES[options.cases] if options.case in (None, case.name))
    side = ours.Side(case, work.write_models(case, MODELS))
    do = getattr(side, options.part)
    do()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.trace or pathlib.Path(temporary)
        begin = time.perf_counter()
        with jax.profiler.trace(str(folder)):
            do()
            seconds = time.perf_counter() - begin
        newest = max(folder.rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime)
        took, number = operations(jax.profiler.ProfileData.from_file(str(newest)))
    print(f"{case.name}, {options.part}: {seconds:.2f} s, {sum(took.values()):.2f} s in operations")
    for name, its in took.most_common(options.top):
        print(f"{its:9.4f} s {its / seconds:6.1%} {number[name]:6d} x {name}")


def operations(data: "jax.profiler.ProfileData") -> tuple[dict[str, float], dict[str, int]]:
    """Seconds and executions of every operation of a trace, by name."""
    took, number = collections.Counter(), collections.Counter()
    for plane in data.planes:
        lines = list(plane.lines)
        # A GPU's operations have a line of their own beside those of the streams they ran on.
        for line in [line for line in lines if line.name == "XLA Ops"] or lines:
            for event in line.events:
                name = dict(event.stats).get("hlo_op")
                if name and not name.startswith(CONTROL):
                    took[name] += event.duration_ns / 1e9
                    number[name] += 1
    return took, number


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", default="cpu", choices=CASES)
    parser.add_argument("--case", metavar="NAME", help="(default: the first)")
    parser.add_argument("--part", default="update", choices=STEP)
    parser.add_argument("--top", default=30, type=int, help="operations that are shown")
    parser.add_argument("--trace", type=pathlib.Path, metavar="FOLDER", help="where it is kept")
    options = parser.parse_args(argv)
    names = [case.name for case in CASES[options.cases]]
    if options.case not in (None, *names):
        parser.error(f"--case: {options.case!r} is not one of {', '.join(map(repr, names))}")
    return options


if __name__ == "__main__":
    main()
