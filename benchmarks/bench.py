"""Ours against theirs, part by part, in one run on one machine: `make bench`.

python benchmarks/bench.py [--cases cpu|gpu] [--only cases|growth] [--case NAME] [--axis AXIS …]
  [--sides SIDE …] [--repeats 3] [--output FILE.json]

Each side runs in a process of its own. On a CPU they take turns: one works, the others wait; on a
GPU, whose memory one can fill, one ends before the next begins. A figure is the median of what is
measured after a warm-up. What a ratio says is ours against the faster of theirs in the same dtype,
larger is better.

First come the cases, with the sides that `cases.py` names for each; `--case NAME --sides …` takes
others. Then comes growth: around one small case rows, columns, vocabulary, soft prompt and models
grow, one at a time.

What is found goes into results/, with what earlier runs on the same device found of cases and axes
that this one leaves out, and from there into README.md, see `report.py`; `--output` writes it to a
file alone.
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
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import report
import work
from cases import CASES, GROWTH, Case

HERE = pathlib.Path(__file__).parent
MODELS = HERE.parent / ".cache" / "benchmarks"
PACKAGES = ("jax", "flax", "optax", "torch", "transformers", "peft", "numpy")
# Name of a column, its module, and the settings of its Side.
SIDES = {
    "ours": ("ours", {}),
    "ours, full remat": ("ours", {"remat": "full"}),
    "ours, whole rows": ("ours", {"length_buckets": 1}),
    "ours, in slots": ("ours", {"rollout_slots": 4}),
    "theirs": ("theirs", {}),
    "theirs, one micro-batch": ("theirs", {"micro_batches": 1}),
    "theirs, torch.compile": ("theirs", {"compile": True, "static_cache": True}),
    "theirs, bfloat16": ("theirs", {"dtype": "bfloat16"}),
}
# The peak of memory is that of iterations alone, so they come first.
STEP = ("iteration", "rollout", "update", "student_update")
OTHERS = ("checkpoint", "matmul", "stream")
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

    def first_iteration(self) -> tuple[dict, float]:
        """What loading took, and seconds from the start of the process to the end of its first
        iteration."""
        loading = self._answer()
        self.do("iteration")
        return loading, time.perf_counter() - self._begin

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


def measure(
    case: Case, sides: Sequence[str], repeats: int, parts: Sequence[str], in_turn: bool
) -> dict:
    """What each side takes for each part; a side that ended before its work was done is not there.

    With `parts` beside the step's, also loading and the first iteration of a process, without and
    with what an earlier one compiled; without them sides load while others work.
    """
    models = work.write_models(case, MODELS)
    found = {}
    for group in [list(sides)] if in_turn else [[side] for side in sides]:
        with tempfile.TemporaryDirectory() as compiled:
            start = functools.partial(Process, case=case, models=models, compiled=compiled)
            found |= _measure(start, group, {part: turns(case, part, repeats) for part in parts})
    return found


def turns(case: Case, part: str, repeats: int) -> int:
    """How often a part is measured: more often than `repeats` where that takes no time, and where
    no two times are alike."""
    if part in ("matmul", "stream"):
        return 9
    varies = case.mean_response is not None and part in ("iteration", "rollout")
    return 3 * repeats if varies else repeats


def _measure(start: Callable[[str], Process], sides: Sequence[str], parts: dict[str, int]) -> dict:
    """All `parts`, each so often, of sides that take turns."""
    starts_count = bool(set(parts) - set(STEP))
    with contextlib.ExitStack() as stack:
        running = {}

        def begin(side: str) -> None:
            running[side] = stack.enter_context(start(side))

        def first(side: str) -> dict:
            if starts_count:
                begin(side)
            loading, seconds = running[side].first_iteration()
            return {"load": summary([loading]), "first_step": seconds}

        if not starts_count:
            _each(sides, begin)
        found = _each(sides, first)
        for part, times in parts.items():
            answers = _turns({side: running[side] for side in found}, part, times)
            found = {side: found[side] | {part: summary(answers[side])} for side in answers}
            if part == "iteration":
                for side in found:
                    found[side]["peak_bytes"] = answers[side][-1]["peak_bytes"]

    def cached(side: str) -> dict:
        with start(side) as process:
            _, seconds = process.first_iteration()
            again = process.do("iteration")
        return {"first_step_cached": seconds, "peak_bytes_cached": again["peak_bytes"]}

    if starts_count:
        found = {side: found[side] | more for side, more in _each(found, cached).items()}
    return found


def _turns(running: dict[str, Process], part: str, times: int) -> dict[str, list[dict]]:
    """Answers of a part after its warm-up, which an iteration has had."""
    answers = {side: [] for side in running}
    for turn in range(part == "iteration", 1 + times):
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


def compare(case: Case, found: dict) -> dict[str, float]:
    """Ratios, ours against the best of theirs in the same dtype, larger is better. Where answers
    end by themselves no two samples are alike: iterations and rollouts go by their tokens."""
    same = [found[side] for side in theirs(case) if side in found]
    if "ours" not in found or not same:
        return {}
    ours = found["ours"]

    def tokens(part: str) -> float:
        return ours[part]["per_second"] / max(side[part]["per_second"] for side in same)

    return {
        "iteration": tokens("iteration"),
        "rollout": tokens("rollout"),
        "update": min(side["update"]["seconds"] for side in same) / ours["update"]["seconds"],
        "memory": min(side["peak_bytes_cached"] for side in same) / ours["peak_bytes_cached"],
    }


def theirs(case: Case) -> list[str]:
    """Their columns that compute in the dtype of the case."""
    return [
        name
        for name, (module, settings) in SIDES.items()
        if module == "theirs" and settings.get("dtype", case.dtype) == case.dtype
    ]


def measure_case(case: Case, sides: Sequence[str], repeats: int, in_turn: bool) -> dict:
    """All of a case."""
    found = measure(case, sides, repeats, (*STEP, *OTHERS), in_turn)
    needed, ours = work.needed(case), found.get("ours")
    shares = {}
    if needed and ours:
        rate = needed["update"]["flops"] / ours["update"]["seconds"]
        shares["update"] = rate / ours["matmul"]["per_second"]
        rate = needed["rollout"]["bytes"] / ours["rollout"]["seconds"]
        shares["rollout"] = rate / ours["stream"]["per_second"]
    return {
        "case": dataclasses.asdict(case),
        "found": found,
        "ratios": compare(case, found),
        "shares": shares,
        "needed": needed,
        "same_dtype": ["ours", *theirs(case)],
    }


def measure_axis(axis: str, cases: Sequence[Case], measured: dict, in_turn: bool) -> list[dict]:
    """The points of an axis in order; those in `measured` are there already, new ones go there."""
    points = []
    for case in sorted(cases, key=lambda case: work.sizes(case)[axis]):
        if case.name not in measured:
            found = measure(case, case.sides, GROWTH_REPEATS, STEP, in_turn)
            measured[case.name] = {"sizes": work.sizes(case), "found": found}
            times = ", ".join(f"{s} {one['iteration']['seconds']:.3f}" for s, one in found.items())
            print(f"{time.strftime('%H:%M:%S')} {case.name}, s/iteration: {times}", flush=True)
        points.append({"case": dataclasses.asdict(case)} | measured[case.name])
    return points


def main() -> None:
    """Measures, and writes what was found."""
    options = _options()
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # a GPU is not this process's alone
    run, device = about()
    in_turn = device == "cpu"
    result = {"device": device, "cases": {}, "growth": {}}
    cases, growth = CASES[options.cases], GROWTH[options.cases]
    for case in [] if options.only == "growth" else cases:
        if options.case in (None, case.name):
            one = measure_case(case, options.sides or case.sides, options.repeats, in_turn)
            if not one["found"]:
                continue  # no side has done its work; what was found before stays
            result["cases"][case.name] = {"run": run} | one
            print(report.case_table(one), flush=True)
            keep(result, options.output)
    measured = {}
    for axis in [] if options.only == "cases" else options.axis:
        points = measure_axis(axis, (growth.base, *growth.axes[axis]), measured, in_turn)
        result["growth"][axis] = {"run": run, "points": points}
        print(report.growth_table(axis, points), flush=True)
        keep(result, options.output)


def keep(result: dict, output: pathlib.Path | None) -> None:
    """Writes what was found so far."""
    if output:
        output.write_text(json.dumps(result, indent=1) + "\n")
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


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", default="cpu", choices=CASES)
    parser.add_argument("--only", choices=("cases", "growth"), help="(default: both)")
    parser.add_argument("--case", metavar="NAME", help="this case only, and no growth")
    parser.add_argument("--axis", nargs="+", choices=report.AXES, help="these only, and no cases")
    sides = f"of cases (default: see cases.py), of {', '.join(map(repr, SIDES))}"
    parser.add_argument("--sides", nargs="+", choices=SIDES, metavar="SIDE", help=sides)
    parser.add_argument("--repeats", default=3, type=int, help="of cases, after a warm-up")
    parser.add_argument("--output", type=pathlib.Path, help="file (default: results/ and README)")
    options = parser.parse_args()
    names = [case.name for case in CASES[options.cases]]
    if options.case not in (None, *names):
        parser.error(f"--case: {options.case!r} is not one of {', '.join(map(repr, names))}")
    if options.sides and not {"ours", "theirs"} <= set(options.sides):
        parser.error("--sides: ours and theirs must be among them")
    for one, other in (("case", "axis"), ("sides", "axis")):
        if getattr(options, one) and getattr(options, other):
            parser.error(f"--{one} is of cases, --{other} of growth: give one of them")
    named = "cases" if options.case else "growth" if options.axis else None
    options.only, options.axis = options.only or named, options.axis or list(report.AXES)
    return options


if __name__ == "__main__":
    main()
