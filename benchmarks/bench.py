"""Ours against theirs, part by part, in one run on one machine: `make bench`.

python benchmarks/bench.py [--cases cpu|gpu] [--only cases|growth|seen] [--case NAME …]
  [--axis AXIS …] [--sides SIDE …] [--parts PART …] [--repeats 3] [--output FILE.json [--missing]]

Each side runs in a process of its own. On a CPU they take turns: one works, the others wait; on a
GPU, whose memory one can fill, one ends before the next begins. A figure is the median of what is
measured after a warm-up. What a ratio says is ours against the faster of theirs in the same dtype,
larger is better.

First come the cases, with the sides that `cases.py` names for each; `--case NAME --sides …` takes
others. Then comes growth: around one small case rows, columns, vocabulary, soft prompt and models
grow, one at a time.

What is found goes into results/, with what earlier runs on the same device found of cases and axes
that this one leaves out, and from there into README.md, see `report.py`; `--output` adds it to a
file alone, after every side that ends. With `--missing` a run that was stopped goes on: sides work
one after the other, without those that the file has, and compiled programs are kept.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import report
import work
from cases import CASES, GROWTH, PARTS, STEP, Case

HERE = pathlib.Path(__file__).parent
MODELS = HERE.parent / ".cache" / "benchmarks"
PACKAGES = ("jax", "flax", "optax", "torch", "transformers", "peft", "numpy")
# Name of a column, its module, and the settings of its Side.
SIDES = {
    "ours": ("ours", {}),
    "ours, full remat": ("ours", {"remat": "full"}),
    "ours, whole rows": ("ours", {"length_buckets": 1}),
    "ours, in slots": ("ours", {"rollout_slots": 4}),
    "ours, int8 rollouts": ("ours", {"rollout_quantize": "int8"}),
    "theirs": ("theirs", {}),
    "theirs, one micro-batch": ("theirs", {"micro_batches": 1}),
    "theirs, torch.compile": ("theirs", {"compile": True, "static_cache": True}),
    "theirs, bfloat16": ("theirs", {"dtype": "bfloat16"}),
}
GROWTH_REPEATS = 3


class SideEnded(RuntimeError):
    """A side ended before its work was done; what it printed says why."""


class Process:
    """A side at work in a process of its own, which ends with the context."""

    def __init__(self, side: str, case: Case, models: dict[str, str], compiled: str):
        module, settings = SIDES[side]
        described = [json.dumps(settings), json.dumps(dataclasses.asdict(case))]
        places = {"JAX_COMPILATION_CACHE_DIR": compiled, "TORCHINDUCTOR_CACHE_DIR": compiled}
        self._begin = time.perf_counter()
        self._child = subprocess.Popen(
            [sys.executable, HERE / "serve.py", module, *described, *models.values()],
            env=os.environ | places | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def do(self, part: str) -> dict:
        """`seconds`, `value` and `peak_bytes` of a part."""
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            print(part, file=self._child.stdin, flush=True)
        return self._answer()

    def loading(self) -> dict:
        """What importing and loading took: once, before anything else is done."""
        return self._answer()

    def first_iteration(self) -> float:
        """Seconds from the start of the process to the end of its first iteration."""
        self.do("iteration")
        return time.perf_counter() - self._begin

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.close()
        self._child.wait()

    def _answer(self) -> dict:
        line = self._child.stdout.readline()
        if not line:
            raise SideEnded(f"exit status {self._child.wait()}")
        return json.loads(line)


def groups(sides: Iterable[str], in_turn: bool) -> list[list[str]]:
    """Sides that work at the same time, in turn; else each alone."""
    return [list(sides)] if in_turn else [[side] for side in sides]


def measure(
    case: Case,
    sides: Sequence[str],
    repeats: int,
    parts: Sequence[str],
    compiled: pathlib.Path | None = None,
    so_far: Callable[[dict], None] = lambda found: None,
) -> dict:
    """What each side takes for each part, in turn; a side that ended before its work was done is
    not there.

    With "starts" among the parts, also what the first iteration of a process takes, without and
    with what an earlier one compiled; without it sides load while others work.

    Args:
      compiled: a folder that keeps compiled programs; None: they are of these processes alone.
      so_far: called after every part, with what will be returned.
    """
    models = work.write_models(case, MODELS)
    times = {part: turns(case, part, repeats) for part in PARTS if part in parts}
    with tempfile.TemporaryDirectory() as own:
        start = functools.partial(Process, case=case, models=models, compiled=str(compiled or own))
        return _measure(start, sides, times, so_far)


def turns(case: Case, part: str, repeats: int) -> int:
    """How often a part is measured: more often than `repeats` where that takes no time, and where
    no two times are alike."""
    if part == "starts":
        return 1
    if part in ("matmul", "stream"):
        return 9
    varies = case.mean_response is not None and part in ("iteration", "rollout")
    return 3 * repeats if varies else repeats


def _measure(
    start: Callable[[str], Process],
    sides: Sequence[str],
    parts: dict[str, int],
    so_far: Callable[[dict], None],
) -> dict:
    """All `parts`, each so often, of sides that take turns."""
    starts_count = "starts" in parts
    warm = {"iteration"} if starts_count else set()
    with contextlib.ExitStack() as stack:
        running = {}

        def begin(side: str) -> None:
            running[side] = stack.enter_context(start(side))

        def first(side: str) -> dict:
            if not starts_count:
                return {"load": summary([running[side].loading()])}
            begin(side)
            loading = summary([running[side].loading()])
            return {"load": loading, "first_step": running[side].first_iteration()}

        if not starts_count:
            _each(sides, begin)
        found = _each(sides, first)
        for part in (part for part in parts if part != "starts"):
            live = {side: running[side] for side in found}
            answers = _turns(live, part, parts[part], part not in warm)
            found = {side: found[side] | {part: summary(answers[side])} for side in answers}
            if part == "iteration":
                for side in found:
                    found[side]["peak_bytes"] = answers[side][-1]["peak_bytes"]
            so_far(found)

    def cached(side: str) -> dict:
        with start(side) as process:
            process.loading()
            seconds = process.first_iteration()
            again = process.do("iteration")
        return {"first_step_cached": seconds, "peak_bytes_cached": again["peak_bytes"]}

    if starts_count:
        found = {side: found[side] | more for side, more in _each(found, cached).items()}
    return found


def _turns(running: dict[str, Process], part: str, times: int, warm_up: bool) -> dict:
    """Answers of a part, by side, after one that warms up."""
    answers = {side: [] for side in running}
    for turn in range(not warm_up, 1 + times):
        found = _each(answers, lambda side: running[side].do(part))
        answers = {side: answers[side] + [answer] * (turn > 0) for side, answer in found.items()}
    return answers


def _each(sides: Iterable[str], work_of: Callable[[str], Any]) -> dict[str, Any]:
    """What each side comes to, without those that ended before."""
    found = {}
    for side in sides:
        try:
            found[side] = work_of(side)
        except SideEnded as ended:
            print(f"{side}: {ended}", file=sys.stderr)
    return found


def summary(answers: list[dict]) -> dict:
    """Median and all of the seconds; where a part says what it did, that and the rate: of the
    median where all turns did the same, else of all turns together."""
    seconds, values = ([answer[key] for answer in answers] for key in ("seconds", "value"))
    result = {"seconds": statistics.median(seconds), "all": seconds}
    if None not in values:
        alike = len(set(values)) == 1
        rate = values[0] / result["seconds"] if alike else sum(values) / sum(seconds)
        result |= {"values": values, "per_second": rate}
    return result


def theirs(case: Case) -> list[str]:
    """Their columns that compute in the dtype of the case."""
    return [
        name
        for name, (module, settings) in SIDES.items()
        if module == "theirs" and settings.get("dtype", case.dtype) == case.dtype
    ]


def of_case(case: Case, found: dict, run: dict, in_turn: bool, kept: bool) -> dict:
    """All of a case, see `report.rated`. If `in_turn`, all sides are of one run; if compiled
    programs were `kept`, they may be of another."""
    one = {
        "run": run,
        "case": dataclasses.asdict(case),
        "found": found,
        "needed": work.needed(case),
        "same_dtype": ["ours", *theirs(case)],
        "in_turn": in_turn,
        "kept": kept,
    }
    return report.rated(one)


def measure_axis(axis: str, cases: Sequence[Case], measured: dict, in_turn: bool) -> list[dict]:
    """The points of an axis in order; those in `measured` are there already, new ones go there."""
    points = []
    for case in sorted(cases, key=lambda case: work.sizes(case)[axis]):
        if case.name not in measured:
            found = {}
            for group in groups(case.sides, in_turn):
                found |= measure(case, group, GROWTH_REPEATS, STEP)
            measured[case.name] = {"sizes": work.sizes(case), "found": found}
            times = ", ".join(f"{s} {one['iteration']['seconds']:.3f}" for s, one in found.items())
            print(f"{time.strftime('%H:%M:%S')} {case.name}, s/iteration: {times}", flush=True)
        points.append({"case": dataclasses.asdict(case)} | measured[case.name])
    return points


def measure_case(
    case: Case, options: argparse.Namespace, run: dict, device: str, in_turn: bool
) -> list[str]:
    """Measures the sides of a case, or those that are missing, and keeps them; returns the sides
    that ended before their work was done."""
    parts, more = options.parts or case.parts, {}
    wanted = {"first_step_cached" if part == "starts" else part for part in parts}
    as_case = functools.partial(of_case, case, run=run, in_turn=in_turn, kept=options.missing)
    there = {}

    def is_missing(side: str) -> bool:
        return not wanted <= set(there.get(side, ()))

    def add(found: dict) -> None:
        there.update(found)
        if there:  # else no side has done its work, and what was found before stays
            cases = {case.name: as_case(there)}
            keep({"device": device, "cases": cases, "growth": {}}, options.output)

    if options.missing:
        before = report.read(options.output).get("cases", {})
        there |= report.joined(before.get(case.name), as_case({}))["found"]
        more = {"compiled": MODELS / "compiled", "so_far": add}
    sides = list(filter(is_missing, options.sides or case.sides))
    for group in groups(sides, in_turn):
        add(measure(case, group, options.repeats, parts, **more))
        print(report.case_table(as_case(there)), flush=True)
    return list(filter(is_missing, sides))


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, and writes what was found."""
    options = _options(argv)
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # a GPU is not this process's alone
    run, device = about()
    device = "rehearsal" if options.cases == "rehearsal" else device
    empty = {"device": device, "cases": {}, "growth": {}}
    if options.only == "seen":
        keep(empty | {"seen": seen() | {"run": run}}, options.output)
        return
    in_turn = device == "cpu" and not options.missing
    ended = {}
    for case in [] if options.only == "growth" else CASES[options.cases]:
        if options.case is None or case.name in options.case:
            ended[case.name] = measure_case(case, options, run, device, in_turn)
    growth, measured = GROWTH.get(options.cases), {}
    for axis in options.axis if options.only in (None, "growth") else []:
        points = measure_axis(axis, (growth.base, *growth.axes[axis]), measured, in_turn)
        print(report.growth_table(axis, points), flush=True)
        keep(empty | {"growth": {axis: {"run": run, "points": points}}}, options.output)
    if options.missing and any(ended.values()):
        sys.exit(f"bench.py: sides that ended before their work was done: {ended}")


def keep(result: dict, output: pathlib.Path | None) -> None:
    """Adds to what is there already."""
    if output:
        report.add(output, result)
    else:
        report.publish(HERE, result)


def about() -> tuple[dict, str]:
    """The command of this run and where it ran, and the device."""
    import jax

    device = jax.devices()[0]
    output = argparse.ArgumentParser()
    output.add_argument("--output")  # says nothing of the figures
    run = {
        "command": shlex.join(["python", "benchmarks/bench.py", *output.parse_known_args()[1]]),
        "date": str(datetime.date.today()),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    return run, device.platform if device.platform == "cpu" else device.device_kind


def seen() -> dict:
    """What is installed, and what JAX, PyTorch and the driver see of this machine."""
    import jax
    import torch

    device, on_gpu = jax.devices()[0], torch.cuda.is_available()
    packages = {one.name: one.version for one in importlib.metadata.distributions()}
    found = {
        "packages": dict(sorted(packages.items(), key=lambda item: item[0].lower())),
        "jax": {
            "devices": [str(one) for one in jax.devices()],
            "client": device.client.platform_version,
            "memory": device.memory_stats(),
        },
        "torch": {
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "device": str(torch.cuda.get_device_properties(0)) if on_gpu else None,
        },
        "driver": None,
    }
    if shutil.which("nvidia-smi"):
        asked = "--query-gpu=name,memory.total,driver_version,clocks.sm,power.limit,utilization.gpu"
        told = subprocess.run(["nvidia-smi", asked, "--format=csv"], capture_output=True, text=True)
        found["driver"] = (told.stdout + told.stderr).splitlines()
    print(json.dumps(found, indent=1))
    return found


def _options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", default="cpu", choices=CASES)
    only = "(default: cases and growth); seen: what is installed, and the devices"
    parser.add_argument("--only", choices=("cases", "growth", "seen"), help=only)
    parser.add_argument("--case", nargs="+", metavar="NAME", help="these only, and no growth")
    parser.add_argument("--axis", nargs="+", choices=report.AXES, help="these only, and no cases")
    sides = f"of cases (default: see cases.py), of {', '.join(map(repr, SIDES))}"
    parser.add_argument("--sides", nargs="+", choices=SIDES, metavar="SIDE", help=sides)
    parts = f"of cases (default: see cases.py), of {', '.join(PARTS)}"
    parser.add_argument("--parts", nargs="+", choices=PARTS, metavar="PART", help=parts)
    parser.add_argument("--repeats", default=3, type=int, help="of cases, after a warm-up")
    parser.add_argument("--output", type=pathlib.Path, help="file (default: results/ and README)")
    missing = "go on: only sides that the file has not yet, one after the other"
    parser.add_argument("--missing", action="store_true", help=missing)
    options = parser.parse_args(argv)
    names = [case.name for case in CASES[options.cases]]
    for unknown in set(options.case or ()) - set(names):
        parser.error(f"--case: {unknown!r} is not one of {', '.join(map(repr, names))}")
    if options.sides and not {"ours", "theirs"} <= set(options.sides):
        parser.error("--sides: ours and theirs must be among them")
    if options.missing and not options.output:
        parser.error("--missing: expected --output FILE, of which sides may be missing")
    for one, other in (("case", "axis"), ("sides", "axis")):
        if getattr(options, one) and getattr(options, other):
            parser.error(f"--{one} is of cases, --{other} of growth: give one of them")
    named = "cases" if options.case or options.cases not in GROWTH else None
    named = "growth" if options.axis else named
    options.only, options.axis = options.only or named, options.axis or list(report.AXES)
    return options


if __name__ == "__main__":
    main()
