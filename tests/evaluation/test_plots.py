"""Curves: which metrics share a plot, what a drawing holds, and that nothing global is touched."""

import math
import re
import xml.etree.ElementTree as ElementTree

import matplotlib
import numpy as np
import pytest

from promptkd_jax.evaluation import plots

FIRST, SECOND, *_ = plots.CURVE_COLOURS


def rows(steps=(1, 2, 3), **metrics):
    return [
        {"step": step} | {name: values[index] for name, values in metrics.items()}
        for index, step in enumerate(steps)
    ]


def members(plots):
    return [(plot.title, [curve.label for curve in plot.curves]) for plot in plots]


def parse(plot):
    return ElementTree.fromstring(plot.svg.replace(' xmlns="http://www.w3.org/2000/svg"', ""))


def paths(plot, colour):
    """The (x, y) points of each line of a drawing that has the given colour as its stroke."""
    found = [
        element.get("d")
        for element in parse(plot).iter("path")
        if re.search(rf"fill: none; .*stroke: {colour}", element.get("style", ""))
    ]
    return [np.array(re.findall(r"[ML] (\S+) (\S+)", path), float) for path in found]


def test_metrics_of_one_unit_share_a_plot_and_others_do_not():
    line = [1.0, 2.0, 3.0]
    names = ["prompt_norm", "student_loss", "kl_prompted", "loss", "grad_norm", "kl_plain", "new"]
    evaluation, training = plots.metric_plots(rows(**dict.fromkeys(names, line)))
    assert evaluation == []
    assert members(training) == [
        ("Losses", ["student loss", "loss"]),
        (
            "KL(student ‖ teacher), nats",
            ["KL to the prompted teacher", "KL to the plain teacher"],
        ),
        ("Norm of the soft prompt", ["norm"]),
        ("Gradient norms", ["gradient norm"]),
        ("new", ["new"]),
    ]


def test_titles_name_what_is_plotted():
    titles = [title for title, _ in plots.PLOTS]
    assert len(set(titles)) == len(titles)
    names = ["kl_plain", "prompt_regularizer", "kl_in_context", "dev/kl", "dev/rougeL", "dev/new"]
    evaluation, training = plots.metric_plots(rows(**dict.fromkeys(names, [1.0, 2.0, 3.0])))
    assert [plot.title for plot in training] == [
        "KL(student ‖ teacher), nats",
        "KL of the prompted from the plain teacher, nats",
    ]
    # What an evaluation measures is the other direction: see `student_metrics.teacher_metrics`.
    assert [plot.title for plot in evaluation] == [
        "KL(teacher ‖ student), nats",
        "ROUGE-L",
        "dev: new",
    ]


def test_evaluations_are_plots_of_their_own():
    metrics = {"loss": [3.0, 2.0, 1.0], "dev/loss": [3.5, 2.5, 1.5], "eval/rougeL": [20, 21, 22]}
    evaluation, training = plots.metric_plots(rows(**metrics))
    assert members(evaluation) == [("Losses", ["dev: loss"]), ("ROUGE-L", ["eval: ROUGE-L"])]
    assert members(training) == [("Losses", ["loss"])]


def test_no_rows_and_no_numbers_make_no_plots():
    assert plots.metric_plots([]) == ([], [])
    assert plots.metric_plots([{"step": 1, "stage": "warmup"}]) == ([], [])


def test_a_curve_is_drawn_to_scale():
    _, (plot,) = plots.metric_plots(rows(steps=(0, 10, 40), loss=[1.0, 3.0, 2.0]))
    ((x, y),) = [path.T for path in paths(plot, FIRST)]
    assert (x[1] - x[0]) / (x[2] - x[0]) == pytest.approx(10 / 40, abs=1e-4)
    assert (y[2] - y[0]) / (y[1] - y[0]) == pytest.approx(0.5, abs=1e-4)
    assert y[1] < y[0], "up is more"


def test_each_curve_of_a_plot_has_its_own_colour():
    _, (plot,) = plots.metric_plots(rows(loss=[1.0, 2.0, 3.0], prompt_loss=[2.0, 2.0, 2.0]))
    assert len(paths(plot, FIRST)) == len(paths(plot, SECOND)) == 1


def test_the_background_is_that_of_the_page():
    _, (plot,) = plots.metric_plots(rows(loss=[1.0, 2.0, 3.0]))
    fills = {style.get("style") for style in parse(plot).iter("path") if style.get("style")}
    assert not any(re.search(r"fill: #(ffffff|000000)", style) for style in fills), fills


def test_a_dashed_line_stands_where_the_stage_changes():
    stages = ["warmup", "warmup", "promptkd", "promptkd"]
    given = rows(steps=(0, 10, 20, 30), loss=[4.0, 3.0, 2.0, 1.0], stage=stages)
    given.insert(2, {"step": 10, "dev/loss": 3.0})
    _, (plot,) = plots.metric_plots(given)
    assert plot.svg.count("stroke-dasharray") == 1
    assert [text.text for text in parse(plot).iter("text")][-2:] == ["warmup", "promptkd"]
    ((boundary, _), _) = next(path for path in paths(plot, "#7d858e"))
    ((x, _),) = [path.T for path in paths(plot, FIRST)]
    assert boundary == pytest.approx(x[2], abs=1e-4)


def test_values_that_are_not_finite_leave_the_curve_and_are_told():
    _, (plot,) = plots.metric_plots(rows(steps=(5, 6, 7), loss=[1.0, math.nan, 2.0]))
    (curve,) = plot.curves
    assert curve.steps.tolist() == [5, 7] and curve.values.tolist() == [1.0, 2.0]
    assert curve.warning == "1 of 3 not finite, first at step 6"
    _, (plot,) = plots.metric_plots(rows(loss=[math.nan] * 3))
    assert math.isnan(plot.curves[0].last)
    assert not paths(plot, FIRST)


def test_a_long_curve_is_thinned_to_means_within_the_range_of_all_points():
    values = np.random.default_rng(0).normal(size=10_000)
    _, (plot,) = plots.metric_plots(rows(steps=range(10_000), loss=values))
    (line,) = paths(plot, FIRST)
    means = [part.mean() for part in np.array_split(values, len(line))]
    slope, origin = np.polyfit(means, line[:, 1], 1)
    np.testing.assert_allclose((line[:, 1] - origin) / slope, means, atol=1e-4)
    (collection,) = [x for x in parse(plot).iter("g") if "FillBetween" in x.get("id", "")]
    edges = re.findall(r"[ML] \S+ (\S+)", collection.find(".//path").get("d"))
    height = float(collection.find(".//use").get("y"))
    band = (np.array(edges, float) + height - origin) / slope
    np.testing.assert_allclose([band.min(), band.max()], [values.min(), values.max()], atol=1e-4)
    assert len(plot.svg) < 100_000


def test_text_is_text_and_is_escaped():
    given = rows(loss=[1.0, 2.0, 3.0], stage=["a<b>&$x_1$"] * 3)
    given += rows(**{'"new" <metric>': [1.0, 2.0, 3.0]})
    _, training = plots.metric_plots(given)
    for plot in training:
        assert "a<b>&$x_1$" in [text.text for text in parse(plot).iter("text")]
    assert parse(training[1]).get("aria-label") == '"new" <metric>: "new" <metric>'


def test_drawing_is_reproducible_and_leaves_matplotlib_as_it_was():
    before = dict(matplotlib.rcParams)
    given = rows(loss=[1.0, 2.0, 3.0], grad_norm=[1.0, 2.0, 3.0])
    assert plots.metric_plots(given)[1][0].svg == plots.metric_plots(given)[1][0].svg
    assert dict(matplotlib.rcParams) == before


def test_every_reference_inside_a_drawing_is_to_itself():
    _, training = plots.metric_plots(rows(loss=[1.0, 2.0, 3.0], grad_norm=[1.0, 2.0, 3.0]))
    ids = [set(re.findall(r' id="([^"]+)"', plot.svg)) for plot in training]
    for plot, own in zip(training, ids):
        used = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', plot.svg)
        used = {name for pair in used for name in pair if name}
        assert used and used <= own
        assert not used & set.union(*(other for other in ids if other is not own))
