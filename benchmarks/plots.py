"""Plots of what was measured: how work grows, and where a case lies under the machine's roof."""

import pathlib
from collections.abc import Sequence

COLOURS = {
    "ours": "#1f6fb4",
    "theirs": "#d0641c",
    "theirs, torch.compile": "#3d9a50",
    "theirs, bfloat16": "#8a56ac",
    "theirs, one micro-batch": "#8c7a3a",
}
AXES = {
    "rows": "rows",
    "columns": "columns",
    "vocabulary": "vocabulary",
    "soft_prompt": "soft-prompt vectors",
    "parameters": "parameters",
}
ROOF = ("matmul", "stream")  # parts that show what a machine computes and reads
MARKERS = {"rollout": "o", "update": "s", "student_update": "^"}
STYLE = {
    "font.size": 8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 8,
    "svg.fonttype": "none",  # text, which is small
    "svg.hashsalt": "benchmarks",  # the same drawing is the same file
}


def draw(result: dict, folder: pathlib.Path, stem: str) -> dict[str, str]:
    """Draws what a result has into `folder`; returns the files' names by what they show."""
    import matplotlib

    drawn = {}
    with matplotlib.rc_context(STYLE):
        whole = [one for one in result["cases"].values() if _has_roof(one)]
        for name, figure in {
            "roofline": whole and roofline(whole),
            "growth": result["growth"] and growth(result["growth"]),
        }.items():
            if figure:
                drawn[name] = f"{stem}-{name}.svg"
                figure.savefig(folder / drawn[name], metadata={"Date": None})
    return drawn


def growth(axes: dict):
    """A column for each axis: seconds of an iteration and peak memory, both axes logarithmic."""
    from matplotlib.figure import Figure

    shown = [axis for axis in AXES if axis in axes]
    figure = Figure(figsize=(2.1 * len(shown) + 0.4, 4), layout="constrained")
    grid = figure.subplots(2, len(shown), sharey="row", sharex="col", squeeze=False)
    for axis, (above, below) in zip(shown, grid.T):
        for side in ("ours", "theirs"):
            points = [point for point in axes[axis]["points"] if side in point["found"]]
            places = [point["sizes"][axis] for point in points]
            found = [point["found"][side] for point in points]
            style = {"color": COLOURS[side], "marker": "o", "markersize": 3, "label": side}
            above.plot(places, [one["iteration"]["seconds"] for one in found], **style)
            below.plot(places, [one["peak_bytes"] / 2**30 for one in found], **style)
        every = [point["sizes"][axis] for point in axes[axis]["points"]]
        _logarithmic(below, every)
        below.set_xlabel(AXES[axis])
    for axes_, label in zip(grid[:, 0], ("iteration, s", "peak memory\nwith compiling, GiB")):
        axes_.set_yscale("log")
        axes_.yaxis.set_major_locator(_few_ticks())
        axes_.yaxis.set_major_formatter("{x:g}")
        axes_.yaxis.set_minor_formatter("")
        axes_.set_ylabel(label)
    grid[0, 0].legend(frameon=False)
    return figure


def roofline(cases: Sequence[dict]):
    """A panel for each case: what its parts reached, of FLOP/s, over the FLOP for each byte that
    they need at least; above them the roof of their machine."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(cases), 3.4), layout="constrained")
    for axes, one in zip(figure.subplots(1, len(cases), sharey=True, squeeze=False)[0], cases):
        _panel(axes, one)
        axes.set_title(one["case"]["name"])
        axes.set_xlabel("FLOP for each byte that is needed")
    figure.axes[0].set_ylabel("FLOP/s")
    figure.axes[0].legend(frameon=False, loc="lower right")
    return figure


def roof(one: dict) -> dict[str, float]:
    """What a machine reached in a case, by either side: operations and bytes a second."""
    sides = [one["found"][side] for side in one["same_dtype"] if side in one["found"]]
    reached = {part: [s[part]["per_second"] for s in sides if part in s] for part in ROOF}
    return {part: max(rates) for part, rates in reached.items() if rates}


def _has_roof(one: dict) -> bool:
    """Whether it is known what a case needs and what its machine reached, and a part beside."""
    measured = set(one["found"].get("ours", ()))
    return bool(one["needed"] and len(roof(one)) == len(ROOF) and measured & set(MARKERS))


def _panel(axes, one: dict) -> None:
    """The roof and the points of a case."""
    rates = roof(one)
    needed = {p: one["needed"][p] for p in MARKERS if p in one["found"]["ours"]}
    intensities = {part: work["flops"] / work["bytes"] for part, work in needed.items()}
    ridge = rates["matmul"] / rates["stream"]
    ends = min(ridge, *intensities.values()) / 2, max(ridge, *intensities.values()) * 3
    bound = [min(rates["stream"] * x, rates["matmul"]) for x in (ends[0], ridge, ends[1])]
    axes.plot((ends[0], ridge, ends[1]), bound, color="#555555", linewidth=1)
    axes.annotate(f"{rates['matmul'] / 1e9:,.0f} GFLOP/s", (ends[1], bound[1]), (0, 3), **_TEXT)
    axes.annotate(f"{rates['stream'] / 1e9:,.1f} GB/s", (ridge, bound[1]), (-4, 3), **_TEXT)
    for side in one["same_dtype"]:
        for part in (part for part in needed if part in one["found"].get(side, ())):
            rate = needed[part]["flops"] / one["found"][side][part]["seconds"]
            label = f"{side}: {part.replace('student_update', 'update of the student')}"
            style = {"color": COLOURS[side], "marker": MARKERS[part], "markersize": 5}
            axes.plot(intensities[part], rate, label=label, linestyle="", **style)
    axes.set_xscale("log")
    axes.set_yscale("log")


_TEXT = {"textcoords": "offset points", "ha": "right", "va": "bottom", "color": "#555555"}


def _logarithmic(axes, places: list[float]) -> None:
    """The x axis, with a tick at each place."""
    axes.set_xscale("log")
    axes.set_xticks(places, [_short(place) for place in places])
    axes.set_xticks([], minor=True)


def _few_ticks():
    from matplotlib.ticker import LogLocator

    return LogLocator(subs=(1, 1.5, 2, 3, 5, 7))


def _short(number: float) -> str:
    """32768 as 32k, 3500000 as 3.5M."""
    if number >= 1e6:
        return f"{number / 1e6:.3g}M"
    return f"{number / 1024:.0f}k" if number >= 10_000 else f"{number:g}"
