"""What was measured, as tables and plots in README.md.

python benchmarks/report.py FILE.json …

Does from files of one device, the later over the earlier, what `bench.py` does at its end: adds
them to what results/ has of that device, draws the plots beside it, and replaces the device's
section of README.md. With the newest file of results/ itself it draws all of it again.

Of a result, `cases` (by name) and `growth` (by axis) each carry the `run` that they are of.
"""

import json
import pathlib
import statistics
import sys
from collections.abc import Callable, Iterable

import plots

# Of growth, and what a value of each is.
AXES = {
    "rows": "rows of a batch",
    "columns": "columns of a row",
    "vocabulary": "words of the vocabulary",
    "soft_prompt": "soft-prompt vectors",
    "parameters": "parameters of both models",
}
GROWTH_SIDES = ("ours", "theirs")


def publish(folder: pathlib.Path, new: dict) -> None:
    """Writes results, plots and the device's section of the README of `folder`."""
    name = new["device"].replace(" ", "-")
    files = sorted((folder / "results").glob(f"????-??-??-{name}.json"))
    result = merged(json.loads(files[-1].read_text()) if files else {}, new)
    stem = f"{max(run['date'] for run in _runs(result))}-{name}"
    (folder / "results" / f"{stem}.json").write_text(json.dumps(result, indent=1) + "\n")
    drawn = plots.draw(result, folder / "results", stem)
    readme = folder / "README.md"
    text = with_section(readme.read_text(), section(result, stem, drawn), result["device"])
    readme.write_text(text)


def merged(old: dict, new: dict) -> dict:
    """`new` over `old`, by case and axis; `ratios` are those of the first case."""
    parts = {part: old.get(part, {}) | new[part] for part in ("cases", "growth")}
    first = next(iter(parts["cases"].values()), {"ratios": {}})
    return {"device": new["device"], "ratios": first["ratios"]} | parts


def section(result: dict, stem: str, drawn: dict[str, str]) -> str:
    """The tables of a device, each below the run that it is of, and plots by name."""
    lines = [f"### {result['device']}", "", f"All figures: [{stem}.json](results/{stem}.json)."]
    lines += ["Plots: `python benchmarks/report.py FILE.json` draws them again.", ""]
    last = None
    tables = [(one["run"], case_table(one)) for one in result["cases"].values()]
    grown = result["growth"]
    tables += [(grown[a]["run"], growth_table(a, grown[a]["points"])) for a in AXES if a in grown]
    for index, (run, table) in enumerate(tables):
        if index == len(result["cases"]):
            lines += _plot("roofline", drawn) + ["#### Growth", ""] + _plot("growth", drawn)
        if run != last:
            lines += [_about(run), ""]
        lines, last = [*lines, table], run
    if not grown:
        lines += _plot("roofline", drawn)
    return "\n".join(lines)


def with_section(text: str, new: str, device: str) -> str:
    """`text` with the section of a device replaced, or added at its end."""
    begin, end = f"<!-- {device} -->\n", f"<!-- end of {device} -->\n"
    before, _, rest = text.partition(begin)
    return f"{before.rstrip()}\n\n{begin}{new}{end}{rest.partition(end)[2]}"


def case_table(one: dict) -> str:
    """Markdown: a line for each part of a case, a column for each side."""
    found = one["found"]
    lines = [f"| {one['case']['name']} | {' | '.join(found)} | ratio |"]
    lines.append("|---" * (len(found) + 2) + "|")

    def line(label: str, figure: Callable[[dict], str], ratio: str = "") -> None:
        figures = [figure(side) for side in found.values()]
        ratio = f"{one['ratios'][ratio]:.2f}" if ratio in one["ratios"] else ""
        lines.append(f"| {label} | {' | '.join(figures)} | {ratio} |")

    def seconds(part: str) -> Callable[[dict], str]:
        def text(side: dict) -> str:
            middle, each = side[part]["seconds"], side[part]["all"]
            return f"{middle:.2f} ({min(each):.2f}–{max(each):.2f})"

        return text

    def rate(part: str, scale: float, digits: int) -> Callable[[dict], str]:
        def text(side: dict) -> str:
            each = [v / s / scale for v, s in zip(side[part]["values"], side[part]["all"])]
            middle = side[part]["per_second"] / scale
            return f"{middle:,.{digits}f} ({min(each):,.{digits}f}–{max(each):,.{digits}f})"

        return text

    def tokens(part: str) -> Callable[[dict], str]:
        return lambda side: f"{statistics.median(side[part]['values']):,.0f}"

    line("iteration, s", seconds("iteration"))
    line("tokens of its answers", tokens("iteration"))
    line("its answers, tokens/s", lambda s: f"{s['iteration']['per_second']:,.1f}", "iteration")
    line("iterations an hour", lambda s: f"{3600 / s['iteration']['seconds']:,.0f}")
    line("rollout, s", seconds("rollout"))
    line("its tokens", tokens("rollout"))
    line("rollout, tokens/s", lambda s: f"{s['rollout']['per_second']:,.0f}", "rollout")
    line("update of both, s", seconds("update"), "update")
    line("update of the student alone, s", seconds("student_update"))
    line(
        "the difference, the soft prompt's, s",
        lambda s: f"{s['update']['seconds'] - s['student_update']['seconds']:.2f}",
    )
    line(
        "peak memory, compiled before, GiB",
        lambda s: f"{s['peak_bytes_cached'] / 2**30:.2f}",
        "memory",
    )
    line("peak memory, with compiling, GiB", lambda s: f"{s['peak_bytes'] / 2**30:.2f}")
    line("first iteration, from the start, s", lambda s: f"{s['first_step']:.0f}")
    line("the same, compiled before, s", lambda s: f"{s['first_step_cached']:.0f}")
    line("loading, s", lambda s: f"{s['load']['seconds']:.1f}")
    line("checkpoint, saved and read, s", seconds("checkpoint"))
    line("large product, GFLOP/s", rate("matmul", 1e9, 0))
    line("skinny product, GB/s", rate("stream", 1e9, 1))
    if one["shares"]:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in one["shares"].items())
        lines += ["", f"Of the machine's rates, ours: {shares}."]
    return "\n".join([*lines, ""])


def growth_table(axis: str, points: Iterable[dict]) -> str:
    """Markdown: a line for each value on an axis; in a cell ours / theirs."""
    columns = {
        "iteration, s": lambda s: _figure(s["iteration"]["seconds"]),
        "rollout, s": lambda s: _figure(s["rollout"]["seconds"]),
        "rollout, tokens/s": lambda s: f"{s['rollout']['per_second']:,.0f}",
        "update of both, s": lambda s: _figure(s["update"]["seconds"]),
        "of the student alone, s": lambda s: _figure(s["student_update"]["seconds"]),
        "peak memory, with compiling, GiB": lambda s: f"{s['peak_bytes'] / 2**30:.2f}",
    }
    lines = [f"| {AXES[axis]} | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for point in points:
        value = point["sizes"][axis]
        label = f"{value:,}"
        if axis == "parameters":
            label = f"{value / 1e6:,.1f}M ({point['case']['name']})"
        cells = [_cell(point["found"], figure) for figure in columns.values()]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _cell(found: dict, figure: Callable[[dict], str]) -> str:
    """`ours / theirs`; a dash stands for a side that ended before its work was done."""
    return " / ".join(figure(found[side]) if side in found else "–" for side in GROWTH_SIDES)


def _figure(seconds: float) -> str:
    """With three digits, and no more than three behind the point."""
    return f"{seconds:.{max(0, 2 - len(str(int(seconds))) + 1) if seconds >= 1 else 3}f}"


def _plot(name: str, drawn: dict[str, str]) -> list[str]:
    return [f"![{name}](results/{drawn[name]})", ""] if name in drawn else []


def _runs(result: dict) -> list[dict]:
    return [one["run"] for part in ("cases", "growth") for one in result[part].values()]


def _about(run: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    return f"`{run['command']}`, {run['date']}, {run['machine']}, {versions}."


def main() -> None:
    """Publishes files, one after the other."""
    for file in map(pathlib.Path, sys.argv[1:]):
        if not file.exists():
            sys.exit(f"report.py: there is no {file}; expected a file that bench.py wrote")
        publish(pathlib.Path(__file__).parent, json.loads(file.read_text()))
        print(f"{file}: its figures are in {pathlib.Path(__file__).with_name('README.md')}")


if __name__ == "__main__":
    main()
