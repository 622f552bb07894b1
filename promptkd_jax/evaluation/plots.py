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
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

# Which curves stand in one plot, and its title. The metrics that a regular expression matches, with
# their prefix or without it, share an axis, so they must share a unit. The first match wins; a
# metric that no line matches gets a plot of its own, with its name as the title.
PLOTS = (
    ("Losses", r"loss|\w+_loss"),
    ("Distances between hidden states", r"(cosine|mse|relation)_\d+_\d+"),
    # On responses of the data or of the teacher; in training, on the rows of the step.
    ("KL(teacher ‖ student), nats", r"\w+/kl(_\w+)?|kl"),
    ("KL(student ‖ teacher), nats", r"kl_\w+"),
    ("KL of the prompted from the plain teacher, nats", r"prompt_regularizer"),
    ("Top-1 agreement with the teacher", r"agreement"),
    ("Entropy of the student, nats", r"student_entropy"),
    ("Norm of the soft prompt", r"prompt_norm"),
    ("Gates of the soft prompt, mean over heads", r"prompt_gate"),
    ("Rows learned from the plain teacher", r"plain_share"),
    ("Weight of the prompt's regularizer", r"regularization_weight"),
    ("Gradient norm of the soft prompt", r"prompt_grad_norm"),
    ("Length of responses, tokens", r"response_length\w*"),
    ("Share of responses ended by EOS, of repeated 4-grams", r"eos_rate|repetition"),
    ("Share of rows by the student", r"on_policy_share|replay_threshold"),
    ("Other figures of responses", r"response_\w+"),
    ("Response tokens that no loss sees", r"tokens_beyond"),
    ("Learning rates", r"learning_rate|\w+_learning_rate"),
    ("Gradient norms", r"grad_norm|\w+_grad_norm"),
    ("ROUGE-L", r"rougeL"),
    ("chrF", r"chrF"),
    ("Exact match, %", r"exact_match"),
    ("Updates skipped in a row", r"skipped_in_a_row"),
    ("Tokens per second", r"tokens_per_second|\w+_tokens_per_second"),
    ("Seconds per update", r"seconds_per_update"),
    ("Tokens per update", r"tokens"),
)
EVALUATION_PREFIXES = ("dev/", "eval/")
LABELS = {
    "kl": "KL to the teacher",
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
    "prompt_gate": "gate",
    "plain_share": "share of plain rows",
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
# Of a middle lightness, and the background shines through: a plot stands on a light or a dark page.
CURVE_COLOURS = ("#3b82c4", "#d0691f", "#2f9c8a", "#9170c0", "#b08f1a", "#858b93")
_MUTED, _LINE = "#7d858e", "#80808050"
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": _MUTED,
    "axes.labelcolor": _MUTED,
    "axes.labelsize": 8.5,
    "axes.edgecolor": _LINE,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "grid.color": _LINE,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}
_MARK = dict(color=_MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
_MOST_POINTS = 120


class Curve(NamedTuple):
    """The finite points of one metric, its last value (finite or not), a word on lost points."""

    label: str
    steps: np.ndarray
    values: np.ndarray
    last: float
    warning: str


class Plot(NamedTuple):
    """Curves that share an axis, and their drawing: an <svg> element to put into a page."""

    title: str
    curves: list[Curve]
    svg: markupsafe.Markup


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
    points: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name != "step" and not isinstance(value, str):
                points.setdefault(name, []).append((row["step"], value))
    named = (row for row in rows if "stage" in row)
    stretches = itertools.groupby(named, key=lambda row: row["stage"])
    stages = [(next(stretch)["step"], stage) for stage, stretch in stretches]
    steps = [row["step"] for row in rows]

    def plots(names: Sequence[str]) -> list[Plot]:
        return [
            line_plot(
                title, [curve(_label(name), points[name]) for name in members], steps, stages=stages
            )
            for title, members in _grouped(names)
        ]

    evaluation = [name for name in points if name.startswith(EVALUATION_PREFIXES)]
    return plots(evaluation), plots([name for name in points if name not in evaluation])


def line_plot(
    title: str,
    curves: Sequence[Curve],
    steps: Sequence[int] | None = None,
    *,
    stages: Sequence[tuple[int, str]] = (),
    x_label: str = "step",
) -> Plot:
    """Curves on common axes, each in its own colour, dashed where the colours come round again.

    Args:
      steps: between the first and the last of which the axis reaches; None: those of the curves.
      stages: (first step, name) of each; a dashed line stands between two.
    """
    if steps is None:
        steps = [step for curve in curves for step in curve.steps]
    first, last = min(steps, default=0), max(steps, default=0)

    def draw(axes: Axes) -> None:
        looks = itertools.cycle(itertools.product(("-", (0, (4, 2))), CURVE_COLOURS))
        for curve, (dashes, colour) in zip(curves, looks):
            if len(curve.steps):
                _draw_curve(axes, curve, color=colour, linestyle=dashes)
        margin = 0.02 * (last - first) or 0.5
        axes.set_xlim(first - margin, last + margin)
        _draw_stages(axes, stages, last - first)
        _scale(axes, axes.yaxis)
        axes.set_xlabel(x_label, loc="right")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))

    names = ", ".join(curve.label for curve in curves)
    return Plot(title, list(curves), _drawing(f"{title}: {names}", draw, height=2.5))


def dot_plot(
    title: str,
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
        for line, (name, colour) in enumerate(zip(values, itertools.cycle(CURVE_COLOURS))):
            mean, deviation = spreads[name]
            places = [line] * len(values[name])
            axes.scatter(values[name], places, color=colour, s=14, alpha=0.35, linewidths=0)
            axes.errorbar(mean, line, xerr=deviation, color=colour, marker="o", markersize=5)
        for row, (name, value) in enumerate(references.items()):
            axes.axvline(value, **_MARK)
            axes.annotate(  # a little above the axes, whatever their height
                name,
                (value, 1.0),
                xycoords=axes.get_xaxis_transform(),
                xytext=(0, 3 + 11 * row),
                textcoords="offset points",
                size=8.5,
                horizontalalignment="center",
            )
        _scale(axes, axes.xaxis)
        axes.set_yticks(range(len(values)), list(values))
        axes.set_ylim(len(values) - 0.5, -0.5)

    label = f"{title}: {', '.join(values)}"
    return Plot(title, [], _drawing(label, draw, height=0.7 + 0.24 * len(values)))


def histogram_plot(
    title: str, counts: Mapping[str, tuple[np.ndarray, float]], edges: np.ndarray
) -> Plot:
    """Outlines of how many values are in each bin, as shares of all.

    Args:
      counts: (values in each bin, what is shown beside the name) by name.
      edges: of the bins, one more than there are.
    """
    shares = {name: count / count.sum() for name, (count, _) in counts.items()}

    def draw(axes: Axes) -> None:
        for share, colour in zip(shares.values(), itertools.cycle(CURVE_COLOURS)):
            axes.stairs(share, edges, color=colour, linewidth=1.5)
            axes.stairs(share, edges, color=colour, alpha=0.15, fill=True)
        _scale(axes, axes.yaxis)
        axes.set_ylim(bottom=0.0)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_xlabel("tokens", loc="right")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))

    curves = [
        Curve(name, edges[:-1], shares[name], value, "") for name, (_, value) in counts.items()
    ]
    return Plot(title, curves, _drawing(f"{title}: {', '.join(counts)}", draw, height=2.2))


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


def _grouped(names: Iterable[str]) -> list[tuple[str, list[str]]]:
    """(title, metrics of one plot) in the order of PLOTS; unknown metrics follow, one by one."""
    groups, left = [], list(names)
    for title, pattern in PLOTS:
        members = [name for name in left if _matches(pattern, name)]
        left = [name for name in left if name not in members]
        if members:
            groups.append((title, members))
    return groups + [(_label(name), [name]) for name in left]


def _matches(pattern: str, name: str) -> bool:
    bare = name.rpartition("/")[2]
    return bool(re.fullmatch(pattern, name) or re.fullmatch(pattern, bare))


def _drawing(label: str, draw: Callable[[Axes], None], *, height: float) -> markupsafe.Markup:
    # The salt makes names of parts that other drawings of the page do not have.
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": label}):
        figure = Figure(figsize=(5.0, height), facecolor="none", layout="constrained")
        draw(figure.add_subplot(facecolor="none"))
        file = io.StringIO()
        FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})
    _, _, drawing = file.getvalue().partition("<svg")
    # What a screen reader says in place of the picture.
    return markupsafe.Markup(f'<svg role="img" aria-label="{markupsafe.escape(label)}"{drawing}')


def _draw_curve(axes: Axes, curve: Curve, **look) -> None:
    """A line through at most `_MOST_POINTS` means of stretches, in a band of their ranges."""
    count = min(_MOST_POINTS, len(curve.steps))
    steps = [np.mean(part) for part in np.array_split(curve.steps, count)]
    stretches = np.array_split(curve.values, count)
    if count < len(curve.steps):
        low, high = map(np.min, stretches), map(np.max, stretches)
        band = dict(color=look["color"], alpha=0.2, linewidth=0)
        axes.fill_between(steps, list(low), list(high), **band)
    marker = "o" if count <= 30 else ""
    means = [np.mean(part) for part in stretches]
    axes.plot(steps, means, linewidth=1.5, marker=marker, markersize=3.5, **look)


def _draw_stages(axes: Axes, stages: Sequence[tuple[int, str]], width: int) -> None:
    taken, row = -math.inf, 0
    for number, (step, name) in enumerate(stages):
        if number:
            axes.axvline(step, **_MARK)
        # A name that would run into the one before it goes to the other of two rows.
        row = 1 - row if step < taken else 0
        axes.text(step, 1.02 + 0.09 * row, name, transform=axes.get_xaxis_transform(), size=8.5)
        taken = step + 0.02 * (len(name) + 1) * width


def _scale(axes: Axes, axis: matplotlib.axis.Axis) -> None:
    """Ticks and grid of the axis that shows the numbers."""
    axes.grid(axis=axis.axis_name, linewidth=0.8)
    axis.set_major_locator(MaxNLocator(5, min_n_ticks=3, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
