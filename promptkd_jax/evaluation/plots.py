"""Metrics rows to curves: inline SVG plots for the report, drawn without any global state."""

import io
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import markupsafe
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

# Which curves stand in which group. A line is one plot: the metrics that its regular expression
# matches share an axis, so they must share a unit. The first match wins; a metric that no line
# matches gets a plot of its own.
PLOTS = (
    ("Losses", r"loss|\w+_loss"),
    ("Hidden states", r"(cosine|mse|relation)_\d+_\d+"),
    ("KL divergence", r"kl_plain|kl_prompted"),
    ("KL divergence", r"prompt_regularizer"),
    ("KL divergence", r"kl_\w+"),
    ("Student", r"agreement"),
    ("Student", r"student_entropy"),
    ("Soft prompt", r"prompt_norm"),
    ("Soft prompt", r"regularization_weight"),
    ("Soft prompt", r"prompt_grad_norm"),
    ("Responses", r"response_length\w*"),
    ("Responses", r"eos_rate|repetition"),
    ("Responses", r"on_policy_share|replay_threshold"),
    ("Responses", r"response_\w+"),
    ("Responses", r"tokens_beyond"),
    ("Optimisation", r"learning_rate|\w+_learning_rate"),
    ("Optimisation", r"grad_norm|\w+_grad_norm"),
    ("Text scores", r"rougeL"),
    ("Text scores", r"exact_match"),
    ("Optimisation", r"skipped_in_a_row"),
    ("Speed", r"tokens_per_second|\w+_tokens_per_second"),
    ("Speed", r"seconds_per_update"),
    ("Speed", r"tokens"),
)
EVALUATION_PREFIXES = ("dev/", "eval/")
LABELS = {
    "kl_plain": "KL to the plain teacher",
    "kl_prompted": "KL to the prompted teacher",
    "prompt_regularizer": "prompted from plain teacher",
    "agreement": "top-1 agreement with the teacher seen",
    "student_entropy": "entropy, nats",
    "regularization_weight": "weight of the regularizer",
    "skipped_in_a_row": "updates skipped in a row",
    "seconds_per_update": "seconds per update",
    "tokens": "tokens per update",
    "tokens_beyond": "response tokens that no loss sees",
    "prompt_norm": "norm",
    "prompt_grad_norm": "gradient norm",
    "grad_norm": "gradient norm",
    "response_length": "length in tokens",
    "eos_rate": "share ended by EOS",
    "repetition": "share of repeated 4-grams",
    "on_policy_share": "rows by the student",
    "replay_threshold": "DistiLLM's threshold",
    "tokens_per_second": "tokens/s",
    "rougeL": "ROUGE-L",
}
CURVE_COLOURS = 6

# Placeholder colours of the drawings. The page gets CSS variables in their place, so that one
# drawing suits its light and its dark scheme.
_CSS_COLOURS = {"#000001": "var(--muted)", "#000002": "var(--line)"} | {
    f"#00001{index}": f"var(--curve-{index})" for index in range(CURVE_COLOURS)
}
_MUTED, _LINE, *_CURVES = _CSS_COLOURS
_MOST_POINTS = 120


class Curve(NamedTuple):
    """The finite points of one metric, its last value (finite or not), a word on lost points."""

    label: str
    steps: np.ndarray
    values: np.ndarray
    last: float
    warning: str


class Plot(NamedTuple):
    """Curves that share an axis, and their drawing: an <svg> element to put into a page.

    The drawing uses the CSS variables --muted, --line and --curve-0 to --curve-5.
    """

    group: str
    curves: list[Curve]
    svg: markupsafe.Markup


class _Frame(NamedTuple):
    """What all plots of a run share: its stages [(first step, name)] and its range of steps."""

    stages: list[tuple[int, str]]
    first: int
    last: int


def metric_plots(rows: Sequence[Mapping]) -> tuple[list[Plot], list[Plot]]:
    """The plots of a run: those of its evaluations, and those of its training.

    Args:
      rows: {"step": int, metric: number, ...} in order. A "stage" in a row is the name of the part
        of the run that it belongs to; plots have a dashed line where it changes. Other names
        (strings) are passed over.

    Returns:
      The plots of the metrics that begin with `EVALUATION_PREFIXES`, and of all others. A metric
      that no row has makes no plot.
    """
    steps = [row["step"] for row in rows]
    frame = _Frame(_stages(rows), min(steps, default=0), max(steps, default=0))
    curves = _curves(rows)
    evaluation = [name for name in curves if name.startswith(EVALUATION_PREFIXES)]
    training = [name for name in curves if name not in evaluation]
    return _plots(evaluation, curves, frame), _plots(training, curves, frame)


def line_plot(group: str, curves: Sequence[Curve], *, x_label: str = "step") -> Plot:
    """Curves on common axes, each in its own colour, dashed where the colours come round again."""
    steps = [step for curve in curves for step in curve.steps]
    frame = _Frame([], min(steps, default=0), max(steps, default=0))
    return Plot(group, list(curves), _svg(group, curves, frame, x_label))


def dot_plot(
    group: str,
    values: Mapping[str, Sequence[float]],
    spreads: Mapping[str, tuple[float, float]],
    references: Mapping[str, float],
) -> Plot:
    """One line per name: its values as pale dots, their mean with a bar of one deviation each way.

    Args:
      spreads: mean and standard deviation of each name's values.
      references: numbers to compare with, each a dashed line across the plot.
    """

    def draw(axes: Axes) -> None:
        for line, (name, colour) in enumerate(zip(values, itertools.cycle(_CURVES))):
            mean, deviation = spreads[name]
            places = [line] * len(values[name])
            axes.scatter(values[name], places, color=colour, s=14, alpha=0.35, linewidths=0)
            axes.errorbar(mean, line, xerr=deviation, color=colour, marker="o", markersize=5)
        for row, (name, value) in enumerate(references.items()):
            _draw_mark(axes, value, name, row)
        _dress(axes, "x")
        axes.set_yticks(range(len(values)), list(values))
        axes.set_ylim(len(values) - 0.5, -0.5)

    label = f"{group}: {', '.join(values)}"
    return Plot(group, [], _drawing(label, draw, height=0.7 + 0.24 * len(values)))


def _stages(rows: Iterable[Mapping]) -> list[tuple[int, str]]:
    named = (row for row in rows if "stage" in row)
    stretches = itertools.groupby(named, key=lambda row: row["stage"])
    return [(next(stretch)["step"], stage) for stage, stretch in stretches]


def _curves(rows: Iterable[Mapping]) -> dict[str, Curve]:
    points: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name != "step" and not isinstance(value, str):
                points.setdefault(name, []).append((row["step"], value))
    return {name: curve(_label(name), pairs) for name, pairs in points.items()}


def curve(label: str, points: Sequence[tuple[int, float]]) -> Curve:
    """A curve through (step, value) points, at least one."""
    steps, values = map(np.array, zip(*points))
    finite = np.isfinite(values)
    lost = steps[~finite]
    warning = (
        f"{len(lost)} of {len(steps)} not finite, first at step {lost[0]}" if len(lost) else ""
    )
    return Curve(label, steps[finite], values[finite], float(values[-1]), warning)


def _label(name: str) -> str:
    """`dev/kl_plain` -> `dev: KL to the plain teacher`."""
    *prefix, metric = name.split("/", 1)
    return ": ".join([*prefix, LABELS.get(metric, metric.replace("_", " "))])


def _plots(names: Sequence[str], curves: Mapping[str, Curve], frame: _Frame) -> list[Plot]:
    grouped = [(group, [curves[name] for name in members]) for group, members in _grouped(names)]
    return [Plot(group, members, _svg(group, members, frame)) for group, members in grouped]


def _grouped(names: Sequence[str]) -> list[tuple[str, list[str]]]:
    """(group, metrics of one plot) in the order of PLOTS; unknown metrics follow, one by one."""
    groups, left = [], list(names)
    for group, pattern in PLOTS:
        members = [name for name in left if re.fullmatch(pattern, name.rpartition("/")[2])]
        left = [name for name in left if name not in members]
        if members:
            groups.append((group, members))
    return groups + [("Other", [name]) for name in left]


def _svg(
    group: str, curves: Sequence[Curve], frame: _Frame, x_label: str = "step"
) -> markupsafe.Markup:
    label = f"{group}: {', '.join(curve.label for curve in curves)}"
    return _drawing(label, lambda axes: _draw(axes, curves, frame, x_label), height=2.5)


def _drawing(label: str, draw: Callable[[Axes], None], *, height: float) -> markupsafe.Markup:
    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": label,
        "text.parse_math": False,
        "font.family": "sans-serif",
        "font.size": 9.5,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(5.0, height), facecolor="none", layout="constrained")
        draw(figure.add_subplot(facecolor="none"))
        file = io.StringIO()
        FigureCanvasSVG(figure).print_svg(file)
    return _inline(file.getvalue(), label)


def _draw(axes: Axes, curves: Sequence[Curve], frame: _Frame, x_label: str) -> None:
    looks = itertools.cycle(itertools.product(("-", (0, (4, 2))), _CURVES))
    for curve, (dashes, colour) in zip(curves, looks):
        if len(curve.steps):
            steps, mean, low, high = _thinned(curve.steps, curve.values)
            if len(steps) < len(curve.steps):
                axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
            marker = "o" if len(steps) <= 30 else ""
            look = dict(linestyle=dashes, linewidth=1.5, marker=marker, markersize=3.5)
            axes.plot(steps, mean, color=colour, **look)
    margin = 0.02 * (frame.last - frame.first) or 0.5
    axes.set_xlim(frame.first - margin, frame.last + margin)
    _draw_stages(axes, frame)
    _dress(axes, "y")
    axes.set_xlabel(x_label, color=_MUTED, size=8.5, loc="right")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))


def _draw_stages(axes: Axes, frame: _Frame) -> None:
    starts = [step for step, _ in frame.stages]
    for step in starts[1:]:
        axes.axvline(step, color=_MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
    taken, row = -math.inf, 0
    for step, name in frame.stages:
        # A name that would run into the one before it goes to the other of two rows.
        row = 1 - row if step < taken else 0
        height = 1.02 + 0.09 * row
        axes.text(step, height, name, transform=axes.get_xaxis_transform(), color=_MUTED, size=8.5)
        taken = step + 0.02 * (len(name) + 1) * (frame.last - frame.first)


def _draw_mark(axes: Axes, value: float, name: str, row: int) -> None:
    """A dashed line with its name above the plot, in one of several rows."""
    axes.axvline(value, color=_MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
    # A little above the axes, whatever their height.
    axes.annotate(
        name,
        (value, 1.0),
        xycoords=axes.get_xaxis_transform(),
        xytext=(0, 3 + 11 * row),
        textcoords="offset points",
        color=_MUTED,
        size=8.5,
        horizontalalignment="center",
    )


def _dress(axes: Axes, numbers: str) -> None:
    """Grid, spines and ticks of the axis that shows the numbers, "x" or "y"."""
    axes.grid(axis=numbers, color=_LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.spines["bottom"].set_color(_LINE)
    axes.tick_params(colors=_MUTED, length=0)
    axis = axes.xaxis if numbers == "x" else axes.yaxis
    axis.set_major_locator(MaxNLocator(5, min_n_ticks=3, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def _thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, ...]:
    """A curve in at most _MOST_POINTS stretches: mean step, and mean, lowest and highest value."""
    count = min(_MOST_POINTS, len(steps))
    stretches = np.array_split(values, count)
    mean, low, high = (np.array([f(s) for s in stretches]) for f in (np.mean, np.min, np.max))
    return np.array([np.mean(part) for part in np.array_split(steps, count)]), mean, low, high


def _inline(file: str, label: str) -> markupsafe.Markup:
    """The content of an SVG file as an element that can stand in a page next to others."""
    (view_box,) = re.findall(r'<svg[^>]* viewBox="([^"]*)"', file)
    body = file[file.index(">", file.index("<svg")) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
    # The page has its own font, and the names of a figure's parts repeat in every file: only what
    # is referred to keeps its name.
    body = re.sub(r"font-family: [^;]*; ", "", body)
    used = set(re.findall(r"#([\w-]+)", body))
    body = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", body)
    for colour, variable in _CSS_COLOURS.items():
        body = body.replace(colour, variable)
    head = markupsafe.Markup('<svg viewBox="{}" role="img" aria-label="{}">')
    return head.format(view_box, label) + markupsafe.Markup(body.strip())
