"""The HTML report of a run, its summary table, and the model card of its student.

The curves are drawn from the run's metrics alone: the report can be written again at any time, also
of a run that was killed.
"""

import math
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple

import jinja2
from etils import epath

from promptkd_jax.evaluation.tables import Table, markdown
from promptkd_jax.infra import distributed
from promptkd_jax.infra.files import to_path, write_text
from promptkd_jax.infra.metrics import read_metrics
from promptkd_jax.infra.terminal import short_number

REPORT_FILE = "report.html"


# Name, value before, value after (None: there is none), format specification without sign or width,
# such as ".2f", and "lower" or "higher", whichever is better.
Metric = tuple[str, float | None, float | None, str, str]


def summary_table(metrics: Sequence[Metric], paths: Mapping[str, str]) -> str:
    """The end of a run as text to print: metric, before, after, change; then where its files lie.

    Args:
      paths: what lies where, such as {"report": "runs/a/report.html"}; never cut or wrapped.
    """
    width = max(map(len, paths), default=0)
    lines = [f"{label.ljust(width)}   {path}" for label, path in paths.items()]
    return "\n".join([markdown(_before_and_after(metrics)), "", *lines])


def write_report(
    workdir: str | os.PathLike,
    *,
    title: str,
    config_text: str,
    summary: Mapping,
    samples: Sequence[Mapping[str, str]],
    reference: str = "teacher",
    data: Mapping[str, Any] | None = None,
) -> epath.Path:
    """Writes `workdir/report.html`, one file that needs nothing else, and returns its path.

    All processes of a run may call this; the first writes.

    The curves are those of `workdir/metrics.jsonl`, grouped as in `plots.PLOTS`, with a dashed
    line where the "stage" of the rows changes. Whatever is given is escaped.

    Args:
      workdir: folder of the run.
      title: heading of the report.
      config_text: the whole config, shown folded.
      summary: {"metrics": [Metric], "facts": {label: text}, "paths": {label: text}}; the first four
        metrics are the headline.
      samples: one {"request", "teacher", "before", "after"} a request: the text, and the responses
        of the teacher and of the student before and after training.
      reference: who wrote the texts called "teacher".
      data: the rows that were learned from and held out, as `data_page.page_section` shows them.

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
        headline=[_Comparison.of(*metric) for metric in summary["metrics"][:4]],
        before_and_after=_before_and_after(summary["metrics"]),
        facts=summary["facts"],
        paths=summary["paths"],
        plots={"Evaluation": evaluation, "Training": training},
        samples=samples,
        reference=reference,
        data=data,
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
    summary: str,
    facts: Sequence[tuple[str, str]],
    *,
    known: Mapping[str, str] | None = None,
    metrics: Sequence[Metric] = (),
) -> str:
    """The README.md of an exported student.

    Args:
      summary: what it is, in a sentence.
      facts: (label, text); they should say nothing of this machine's folders.
      known: `Model.card` of the model that it started from; None: nothing is handed on.
    """
    from huggingface_hub import ModelCardData  # and much of the hub's client

    front = ModelCardData(
        **known or {},
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["knowledge-distillation", "promptkd"],
    )
    parts = [
        f"---\n{front.to_yaml()}\n---\n# {title}",
        summary,
        "\n".join(f"- {label}: {text}" for label, text in facts),
    ]
    if metrics:
        parts.append(markdown(_before_and_after(metrics)))
    return "\n\n".join(parts) + "\n"


def _before_and_after(metrics: Sequence[Metric]) -> Table:
    rows = [_Comparison.of(*metric) for metric in metrics]
    return Table(("metric", "before", "after", "change", ""), rows)


class _Comparison(NamedTuple):
    """A metric before and after training, as text."""

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
