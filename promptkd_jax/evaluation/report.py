"""The HTML report of a run, its summary table, and the model card of its student.

The curves are drawn from the run's metrics alone: the report can be written again at any time, also
of a run that was killed.
"""

import io
import math
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple

import jinja2
from etils import epath
from rich.console import Console
from rich.table import Table
from rich.text import Text

from promptkd_jax.infra import distributed
from promptkd_jax.infra.files import to_path, write_text
from promptkd_jax.infra.metrics import read_metrics
from promptkd_jax.infra.terminal import short_number, shows_control_codes

REPORT_FILE = "report.html"


def summary_table(
    rows: Sequence[tuple[str, float | None, float | None]],
    paths: Mapping[str, str],
    *,
    console: Console | None = None,
) -> str:
    """The end of a run as text to print: metric, before, after, change; then where its files lie.

    Args:
      rows: (name, value before, value after); None where there is no such value.
      paths: what lies where, such as {"report": "runs/a/report.html"}; never cut or wrapped.
      console: whose width and colours to use, those of standard output unless told; off a terminal
        the text has no control characters.
    """
    console = console or Console()
    styled = shows_control_codes(console)
    text = Console(
        file=io.StringIO(),
        width=console.width if styled else 120,
        force_terminal=styled,
        no_color=not styled,
    )
    table = Table("metric", box=None, padding=(0, 3, 0, 0), header_style="bold")
    for heading in ("before", "after", "change"):
        table.add_column(heading, justify="right")
    for name, before, after in rows:
        table.add_row(Text(name), short_number(before), short_number(after), _change(before, after))
    text.print(table)
    width = max(map(len, paths), default=0)
    for label, path in paths.items():
        text.print(Text.assemble((label.ljust(width), "dim"), "   ", path), soft_wrap=True)
    return text.file.getvalue()


def write_report(
    workdir: str | os.PathLike,
    *,
    title: str,
    config_text: str,
    summary: Mapping,
    samples: Sequence[Mapping[str, str]],
    reference: str = "teacher",
) -> epath.Path:
    """Writes `workdir/report.html`, one file that needs nothing else, and returns its path.

    All processes of a run may call this; the first writes.

    The curves are those of `workdir/metrics.jsonl`, grouped as in `plots.PLOTS`, with a dashed
    line where the "stage" of the rows changes. Whatever is given is escaped.

    Args:
      workdir: folder of the run.
      title: heading of the report.
      config_text: the whole config, shown folded.
      summary: {"metrics": [(name, before, after, format, better)], "facts": {label: text},
        "paths": {label: text}}; before and after are numbers or None, format is a format
        specification without sign or width, such as ".2f", and better is "lower" or "higher".
        The first four metrics are the headline.
      samples: one {"request", "teacher", "before", "after"} a request: the text, and the responses
        of the teacher and of the student before and after training.
      reference: who wrote the texts called "teacher".

    Raises:
      FileNotFoundError, ValueError: as `read_metrics`; ValueError also for another `better`.
      jinja2.UndefinedError: if a sample lacks one of its four texts.
    """
    path = to_path(workdir) / REPORT_FILE
    if not distributed.is_primary():
        return path
    from promptkd_jax.evaluation import plots  # and Matplotlib, which takes a second

    evaluation, training = plots.metric_plots(read_metrics(workdir))
    page = render(
        "report.html.jinja",
        title=title,
        metrics=[_Comparison.of(*metric) for metric in summary["metrics"]],
        facts=summary["facts"],
        paths=summary["paths"],
        plots={"Evaluation": evaluation, "Training": training},
        samples=samples,
        reference=reference,
        config_text=config_text,
    )
    write_text(path, page)
    return path


def render(template: str, **values: Any) -> str:
    """The page that a template of this package makes of `values`; whatever is given is escaped.

    Raises:
      jinja2.UndefinedError: if the template needs a value that is not given.
    """
    from promptkd_jax.evaluation.plots import CURVE_COLOURS

    folder = resources.files("promptkd_jax") / "evaluation" / "templates"
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: folder.joinpath(name).read_text("utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = short_number
    environment.globals["curve_colours"] = CURVE_COLOURS
    return environment.get_template(template).render(**values)


def model_card(
    title: str,
    *,
    known: Mapping[str, str],
    student: str,
    teacher: str | None,
    data: str,
    stages: Sequence[str],
    metrics: Sequence[tuple[str, float | None, float | None, str, str]],
) -> str:
    """The README.md of an exported student. It says nothing of this machine's folders.

    Args:
      known: `Model.card` of the model that it started from.
      student, teacher, data: names; `student` is "" where it started as layers of its teacher.
      metrics: as in `write_report`.
    """
    rows = [
        f"| {name} | {short_number(before, spec)} | {short_number(after, spec)} |"
        for name, before, after, spec, _ in metrics
    ]
    lines = [
        "---",
        *(f"{key}: {value}" for key, value in sorted(known.items())),
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [knowledge-distillation, promptkd]",
        "---",
        f"# {title}",
        "",
        "A student distilled with promptkd_jax.",
        "",
        f"- Started from: {known.get('base_model') or student or 'layers of its teacher'}",
        f"- Teacher: {teacher or 'none'}",
        *(f"- Stage {number}: {stage}" for number, stage in enumerate(stages, start=1)),
        f"- Training data: {data}",
        "- Licence: "
        + known.get("license", "not named by the model that it started from")
        + ", and what teacher and data demand",
        "",
    ]
    if rows:
        lines += ["| held-out metric | before | after |", "| --- | --- | --- |", *rows, ""]
    return "\n".join(lines)


class _Comparison(NamedTuple):
    """One line of the before/after table, as text."""

    name: str
    before: str
    after: str
    change: str
    verdict: str

    @classmethod
    def of(cls, name, before, after, spec, better) -> "_Comparison":
        if better not in ("lower", "higher"):
            raise ValueError(f"summary metric {name!r}: better is {better!r}, not lower or higher")
        verdict = ""
        if before is not None and after is not None and before != after:
            # NaN is worse than anything: both comparisons are false.
            improved = after < before if better == "lower" else after > before
            verdict = "better" if improved else "worse"
        change = _change(before, after, spec)
        return cls(name, short_number(before, spec), short_number(after, spec), change, verdict)


def _change(before: float | None, after: float | None, spec: str = "") -> str:
    """after - before with its sign, and in per cent of before unless both are shares already."""
    if before is None or after is None:
        return "n/a"
    difference = after - before
    sign = "-" if difference < 0 else "+"
    text = sign + short_number(abs(difference), spec)
    if before and math.isfinite(difference) and not spec.endswith("%"):
        text += f" ({sign}{abs(100.0 * difference / before):.1f}%)"
    return text
