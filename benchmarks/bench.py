"""Ours against theirs, part by part, in one run on one machine: `make bench`.

python benchmarks/bench.py [--cases cpu] [--case NAME] [--sides SIDE …] [--repeats 5]
  [--output FILE.json]

Each side runs in a process of its own, and they take turns: one works, the others wait. A figure is
the median of what is measured after a warm-up. What a ratio says is ours against the faster of
theirs in the same dtype, larger is better.
"""

import argparse
import contextlib
import dataclasses
import datetime
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

import work
from cases import CASES, Case

HERE = pathlib.Path(__file__).parent
MODELS = HERE.parent / ".cache" / "benchmarks"
PACKAGES = ("jax", "flax", "optax", "torch", "transformers", "peft", "numpy")
# Name of a column, its module, and the settings of its Side.
SIDES = {
    "ours": ("ours", {}),
    "theirs": ("theirs", {}),
    "theirs, torch.compile": ("theirs", {"compile": True}),
    "theirs, bfloat16": ("theirs", {"dtype": "bfloat16"}),
}
PARTS = ("rollout", "update", "student_update", "iteration", "checkpoint")
RATES = ("matmul", "stream")


class Process:
    """A side at work in a process of its own."""

    def __init__(self, side: str, case: Case, models: dict[str, str], compiled: str):
        module, settings = SIDES[side]
        described = [json.dumps(settings), json.dumps(dataclasses.asdict(case))]
        places = {"JAX_COMPILATION_CACHE_DIR": compiled, "TORCHINDUCTOR_CACHE_DIR": compiled}
        self._child = subprocess.Popen(
            [sys.executable, HERE / "serve.py", module, *described, *models.values()],
            env=os.environ | places | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.loading = self._answer()

    def do(self, part: str) -> dict:
        """`seconds`, `value` and `peak_bytes` of a part."""
        print(part, file=self._child.stdin, flush=True)
        return self._answer()

    def end(self) -> None:
        """Stops it."""
        self._child.stdin.close()
        self._child.wait()

    def _answer(self) -> dict:
        line = self._child.stdout.readline()
        if not line:
            raise RuntimeError("a side ended before its work was done; what it printed says why")
        return json.loads(line)


def measure(case: Case, sides: list[str], repeats: int) -> dict:
    """What each side takes for each part."""
    models = work.write_models(case, MODELS)
    with tempfile.TemporaryDirectory() as compiled, contextlib.ExitStack() as stack:
        first = {side: first_step(side, case, models, compiled) for side in sides}
        running = {side: Process(side, case, models, compiled) for side in sides}
        for process in running.values():
            stack.callback(process.end)
        found = {side: {"load": [running[side].loading]} for side in sides}
        for part in (*PARTS, *RATES):
            for turn in range(1 + repeats):
                for side in sides:
                    answer = running[side].do(part)
                    if turn:
                        found[side].setdefault(part, []).append(answer)
    return {side: summary(found[side]) | first[side] for side in sides}


def first_step(side: str, case: Case, models: dict[str, str], compiled: str) -> dict:
    """Seconds from the start of a process to the end of its first iteration, without and with what
    an earlier one compiled; and the most memory of a run that does nothing but iterations."""
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        process = Process(side, case, models, compiled)
        process.do("iteration")
        seconds.append(time.perf_counter() - start)
        peak = process.do("iteration")["peak_bytes"]
        process.end()
    return {"first_step": seconds[0], "first_step_cached": seconds[1], "peak_bytes": peak}


def summary(found: dict[str, list[dict]]) -> dict:
    """Medians and spreads by part, and rates where a part says what it did."""
    result = {}
    for part, answers in found.items():
        seconds = [answer["seconds"] for answer in answers]
        result[part] = {"seconds": statistics.median(seconds), "all": seconds}
        if answers[0]["value"] is not None:
            rates = [answer["value"] / answer["seconds"] for answer in answers]
            result[part]["per_second"] = statistics.median(rates)
    return result


def compare(case: Case, found: dict) -> tuple[dict, dict]:
    """Ratios, ours against the faster of theirs, larger is better; and shares of what the machine
    gave to the same process: of its rate of large products, and of reading a matrix."""
    ours = found["ours"]
    same = [found[side] for side in found if side in theirs(case)]

    def fewest(part: str) -> float:
        return min(side[part]["seconds"] for side in same)

    fastest = max(side["rollout"]["per_second"] for side in same)
    ratios = {
        "iteration": fewest("iteration") / ours["iteration"]["seconds"],
        "rollout": ours["rollout"]["per_second"] / fastest,
        "update": fewest("update") / ours["update"]["seconds"],
        "memory": min(side["peak_bytes"] for side in same) / ours["peak_bytes"],
    }
    rate = work.operations(case)["update"] / ours["update"]["seconds"]
    shares = {"update": rate / ours["matmul"]["per_second"]}
    if case.mean_response is None:
        rate = work.decode_bytes(case) / ours["rollout"]["seconds"]
        shares["rollout"] = rate / ours["stream"]["per_second"]
    return ratios, shares


def theirs(case: Case) -> list[str]:
    """Their columns that compute in the dtype of the case."""
    return [
        name
        for name, (module, settings) in SIDES.items()
        if module == "theirs" and settings.get("dtype", case.dtype) == case.dtype
    ]


def main() -> None:
    """Measures, and writes what was found."""
    parser = _parser()
    options = parser.parse_args()
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # two sides share a GPU
    chosen = [case for case in CASES[options.cases] if options.case in (None, case.name)]
    if not chosen:
        names = ", ".join(repr(case.name) for case in CASES[options.cases])
        parser.error(f"--case: {options.case!r} is not one of {names}")
    if not {"ours", "theirs"} <= set(options.sides):
        parser.error("--sides: ours and theirs must be among them")
    result = about() | {"cases": {}}
    for case in chosen:
        found = measure(case, options.sides, options.repeats)
        ratios, shares = compare(case, found)
        described = dataclasses.asdict(case)
        one = {"case": described, "found": found, "ratios": ratios, "shares": shares}
        result["cases"][case.name] = one
        result.setdefault("ratios", ratios)  # those of the first case
        print(table(one), flush=True)
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
        return
    name = f"{datetime.date.today()}-{result['device']}.json".replace(" ", "-")
    (HERE / "results" / name).write_text(json.dumps(result, indent=1) + "\n")
    readme = HERE / "README.md"
    readme.write_text(with_section(readme.read_text(), section(name, result), result["device"]))


def section(name: str, result: dict) -> str:
    """The tables of a run, and how they came about."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    tables = [table(one) for one in result["cases"].values()]
    about = f"`{result['command']}`, {result['machine']}, {versions}: [{name}](results/{name})."
    return "\n".join([f"### {result['device']}", "", about, "", *tables])


def with_section(text: str, new: str, device: str) -> str:
    """`text` with the section of a device replaced, or added at its end."""
    begin, end = f"<!-- {device} -->\n", f"<!-- end of {device} -->\n"
    before, _, rest = text.partition(begin)
    return f"{before.rstrip()}\n\n{begin}{new}{end}{rest.partition(end)[2]}"


def about() -> dict:
    """Command, device and versions."""
    import jax

    device = jax.devices()[0]
    return {
        "command": shlex.join(["python", "benchmarks/bench.py", *sys.argv[1:]]),
        "device": device.platform if device.platform == "cpu" else device.device_kind,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def table(one: dict) -> str:
    """Markdown: a line for each part, a column for each side."""
    found = one["found"]
    lines = [
        f"| {one['case']['name']} | " + " | ".join(found) + " | ratio |",
        "|---" * (len(found) + 2) + "|",
    ]

    def line(label: str, figure, ratio: str = "") -> None:
        figures = [figure(side) for side in found.values()]
        lines.append(f"| {label} | " + " | ".join(figures) + f" | {ratio} |")

    def seconds(part: str):
        def text(side: dict) -> str:
            middle, each = side[part]["seconds"], side[part]["all"]
            return f"{middle:.2f} ({min(each):.2f}–{max(each):.2f})"

        return text

    def ratio(name: str) -> str:
        return f"{one['ratios'][name]:.2f}"

    line("iteration, s", seconds("iteration"), ratio("iteration"))
    line("rollout, s", seconds("rollout"))
    line("rollout, tokens/s", lambda s: f"{s['rollout']['per_second']:,.0f}", ratio("rollout"))
    line("update of both, s", seconds("update"), ratio("update"))
    line("update of the student alone, s", seconds("student_update"))
    line("peak memory, GiB", lambda s: f"{s['peak_bytes'] / 2**30:.2f}", ratio("memory"))
    line("first iteration, from the start, s", lambda s: f"{s['first_step']:.0f}")
    line("the same, compiled before, s", lambda s: f"{s['first_step_cached']:.0f}")
    line("loading, s", lambda s: f"{s['load']['seconds']:.1f}")
    line("checkpoint, saved and read, s", seconds("checkpoint"))
    line("large product, GFLOP/s", lambda s: f"{s['matmul']['per_second'] / 1e9:,.0f}")
    line("skinny product, GB/s", lambda s: f"{s['stream']['per_second'] / 1e9:,.1f}")
    shares = ", ".join(f"{name} {share:.0%}" for name, share in one["shares"].items())
    return "\n".join([*lines, "", f"Of the machine's rates, ours: {shares}.", ""])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", default="cpu", choices=CASES)
    parser.add_argument("--case", metavar="NAME", help="one of them (default: all)")
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--repeats", default=5, type=int, help="after a warm-up")
    parser.add_argument("--output", type=pathlib.Path, help="file (default: by date and device)")
    return parser


if __name__ == "__main__":
    main()
