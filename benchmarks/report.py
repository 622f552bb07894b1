"""What was measured, as tables and plots in README.md.

python benchmarks/report.py FILE.json …

Does from files of one device, the later over the earlier, what `bench.py` does at its end: adds
them to what results/ has of that device, draws the plots beside it, and replaces the device's
section of README.md. With the newest file of results/ itself it draws all of it again.

Of a result, `cases` (by name) and `growth` (by axis) each carry the `run` that they are of. A file
of `gpu.sh` also has `parts`, how each of them ended, and what was `seen` there.
"""

import json
import os
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
    write(folder / "results" / f"{stem}.json", result)
    drawn = plots.draw(result, folder / "results", stem)
    readme = folder / "README.md"
    text = with_section(readme.read_text(), section(result, stem, drawn), result["device"])
    readme.write_text(text)


def read(file: pathlib.Path) -> dict:
    """What a file has; nothing where there is none."""
    return json.loads(file.read_text()) if file.exists() else {}


def add(file: pathlib.Path, new: dict) -> None:
    """Adds to what a file has of the same device."""
    old = read(file)
    if old.get("device", new["device"]) != new["device"]:
        sys.exit(f"{file} is of {old['device']}, expected one of {new['device']}: name another")
    write(file, merged(old, new))


def write(file: pathlib.Path, result: dict) -> None:
    """Replaces a file at once: who is stopped meanwhile leaves the old one."""
    unfinished = file.with_name(f"{file.name}.unfinished")
    unfinished.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(unfinished, file)


def merged(old: dict, new: dict) -> dict:
    """`new` over `old`, by case and axis; `ratios` are those of the first case. Of a part of
    `gpu.sh` the later over the earlier, but one that is not done over none that is."""
    cases = dict(old.get("cases", {}))
    for name, one in new["cases"].items():
        cases[name] = joined(cases.get(name), one)
    first = next(iter(cases.values()), {"ratios": {}})
    result = {"device": new["device"], "ratios": first["ratios"], "cases": cases}
    result["growth"] = old.get("growth", {}) | new["growth"]
    parts = dict(old.get("parts", {}))
    for name, part in new.get("parts", {}).items():
        if part["status"] == "done" or parts.get(name, part)["status"] != "done":
            parts[name] = part
    seen = old.get("seen", {}) | new.get("seen", {})
    return result | ({"parts": parts} if parts else {}) | ({"seen": seen} if seen else {})


def joined(old: dict | None, new: dict) -> dict:
    """A case with the sides of two runs, where these had the machine for themselves and it is the
    same work by the same versions; else `new` alone."""

    def conditions(one: dict) -> str:
        run = {key: one["run"][key] for key in ("machine", "versions")}
        return json.dumps([one["case"], run, one.get("in_turn", True)], sort_keys=True)

    if old is None or new.get("in_turn", True) or conditions(old) != conditions(new):
        return new
    return rated(new | {"found": old["found"] | new["found"]})


def rated(one: dict) -> dict:
    """A case with `ratios` of its sides, and ours as `shares` of the roof of its machine."""
    found, needed, shares = one["found"], one["needed"] or {}, {}
    ours, rates = found.get("ours", {}), plots.roof(one)
    for part, quantity, bound in (("update", "flops", "matmul"), ("rollout", "bytes", "stream")):
        if part in needed and part in ours and bound in rates:
            shares[part] = needed[part][quantity] / ours[part]["seconds"] / rates[bound]
    same = [found[side] for side in one["same_dtype"] if side in found and side != "ours"]
    return one | {"ratios": ratios(ours, same), "shares": shares}


def ratios(ours: dict, theirs: Iterable[dict]) -> dict[str, float]:
    """Ours against the best of theirs, larger is better, of the parts that both have. Where answers
    end by themselves no two samples are alike: iterations and rollouts go by their tokens."""

    def best(choose: Callable, figure: Callable[[dict], float], part: str) -> float | None:
        return choose((figure(side) for side in theirs if part in side), default=None)

    found, theirs = {}, list(theirs)
    for part in ("iteration", "rollout"):
        other = best(max, lambda side, part=part: side[part]["per_second"], part)
        if part in ours and other:
            found[part] = ours[part]["per_second"] / other
    other = best(min, lambda side: side["update"]["seconds"], "update")
    if "update" in ours and other:
        found["update"] = other / ours["update"]["seconds"]
    peak = "peak_bytes_cached" if "peak_bytes_cached" in ours else "peak_bytes"
    other = best(min, lambda side: side[peak], peak)
    if peak in ours and other:
        found["memory"] = other / ours[peak]
    return found


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
    if parts := result.get("parts"):
        lines += ["", parts_table(parts)]
    return "\n".join(lines)


def with_section(text: str, new: str, device: str) -> str:
    """`text` with the section of a device replaced, or added at its end."""
    begin, end = f"<!-- {device} -->\n", f"<!-- end of {device} -->\n"
    before, _, rest = text.partition(begin)
    return f"{before.rstrip()}\n\n{begin}{new}{end}{rest.partition(end)[2]}"


def case_table(one: dict) -> str:
    """Markdown: a line for each part of a case that was measured, a column for each side."""
    found = one["found"]
    lines = [f"| {one['case']['name']} | {' | '.join(found)} | ratio |"]
    lines.append("|---" * (len(found) + 2) + "|")

    def line(part: str, label: str, figure: Callable[[dict], str], ratio: str = "") -> None:
        figures = [figure(side) if part in side else "–" for side in found.values()]
        ratio = f"{one['ratios'][ratio]:.2f}" if ratio in one["ratios"] else ""
        if any(part in side for side in found.values()):
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

    def gibibytes(peak: str) -> Callable[[dict], str]:
        return lambda side: f"{side[peak] / 2**30:.2f}"

    def prompt_seconds(side: dict) -> str:
        return f"{side['update']['seconds'] - side['student_update']['seconds']:.2f}"

    whole = any("peak_bytes_cached" in side for side in found.values())
    line("iteration", "iteration, s", seconds("iteration"))
    line("iteration", "tokens of its answers", tokens("iteration"))
    line(
        "iteration",
        "its answers, tokens/s",
        lambda s: f"{s['iteration']['per_second']:,.1f}",
        "iteration",
    )
    line("iteration", "iterations an hour", lambda s: f"{3600 / s['iteration']['seconds']:,.0f}")
    line("rollout", "rollout, s", seconds("rollout"))
    line("rollout", "its tokens", tokens("rollout"))
    line(
        "rollout",
        "rollout, tokens/s",
        lambda s: f"{s['rollout']['per_second']:,.0f}",
        "rollout",
    )
    line("update", "update of both, s", seconds("update"), "update")
    line("student_update", "update of the student alone, s", seconds("student_update"))
    line("student_update", "the difference, the soft prompt's, s", prompt_seconds)
    line(
        "peak_bytes_cached",
        "peak memory, compiled before, GiB",
        gibibytes("peak_bytes_cached"),
        "memory",
    )
    line(
        "peak_bytes",
        f"peak memory, {'compiled then or before' if one.get('kept') else 'with compiling'}, GiB",
        gibibytes("peak_bytes"),
        "" if whole else "memory",
    )
    line("first_step", "first iteration, from the start, s", lambda s: f"{s['first_step']:.0f}")
    line(
        "first_step_cached",
        "the same, compiled before, s",
        lambda s: f"{s['first_step_cached']:.0f}",
    )
    line("load", "loading, s", lambda s: f"{s['load']['seconds']:.1f}")
    line("checkpoint", "checkpoint, saved and read, s", seconds("checkpoint"))
    line("matmul", "large product, GFLOP/s", rate("matmul", 1e9, 0))
    line("stream", "skinny product, GB/s", rate("stream", 1e9, 1))
    if one["shares"]:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in one["shares"].items())
        lines += ["", f"Of the machine's rates, ours: {shares}."]
    return "\n".join([*lines, ""])


def parts_table(parts: dict[str, dict]) -> str:
    """Markdown: how each part of `gpu.sh` ended, and the last line that it printed."""
    lines = ["| part of `gpu.sh` | ended | seconds | of at most | last line |", "|---" * 5 + "|"]
    for name, part in parts.items():
        last = next(filter(str.strip, reversed(part["tail"])), "").replace("|", "\\|")
        figures = f"{part['status']} | {part['seconds']:.0f} | {part['limit']:.0f}"
        lines.append(f"| {name} | {figures} | {last} |")
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
        result = json.loads(file.read_text())
        if "device" not in result:
            sys.exit(f"report.py: nothing in {file} was measured\n\n{parts_table(result['parts'])}")
        publish(pathlib.Path(__file__).parent, result)
        print(f"{file}: its figures are in {pathlib.Path(__file__).with_name('README.md')}")


if __name__ == "__main__":
    main()
