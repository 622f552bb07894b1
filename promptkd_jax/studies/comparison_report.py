"""What a person sees of a comparison: its tables, as Markdown and in one HTML page, and plots.

All is made of what `comparison.json` holds (see `compare.summarize_comparison`), here `found`.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from promptkd_jax.evaluation import plots
from promptkd_jax.evaluation.report import render
from promptkd_jax.infra.files import write_text
from promptkd_jax.studies.comparison import ComparisonConfig
from promptkd_jax.training.config import as_json

AVERAGE = "average"
TEACHER, START = "teacher", "student before"

# Heading, key of a run's summary, format.
COST = (
    ("updates", "updates", ",.0f"),
    ("training, s", "training_seconds", ",.1f"),
    ("tokens/s", "tokens_per_second", ",.0f"),
    ("s/sample", "seconds_per_sample", ".4f"),
    ("peak memory, GB", "peak_memory_gb", ".2f"),
)
BEHAVIOUR = (
    ("KL(teacher ‖ student), nats", "kl_after", ".3f"),
    ("top-1 agreement", "agreement_after", ".3f"),
    ("response length, tokens", "response_length_after", ".1f"),
    ("ended by EOS", "eos_rate_after", ".3f"),
    ("repetition", "repetition_after", ".3f"),
)
PROMPT = (
    ("KL(teacher ‖ student) without it, nats", "kl_after", ".3f"),
    ("with it", "kl_prompted_after", ".3f"),
    ("teacher's ROUGE-L without it", "teacher_rougeL", ".2f"),
    ("with it", "teacher_rougeL_prompted", ".2f"),
)


class Table(NamedTuple):
    """A heading, a note on how to read it, and cells of text."""

    heading: str
    note: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def write(workdir: pathlib.Path, found: Mapping[str, Any], config: ComparisonConfig) -> None:
    """Writes `comparison.md` and `report.html`, one file that needs nothing else."""
    write_text(workdir / "comparison.md", comparison_markdown(found))
    page = render(
        "compare.html.jinja",
        title=found["title"],
        note=found["note"],
        budget=budget(found),
        facts=_facts(found),
        tables=tables(found),
        plots=comparison_plots(found),
        samples=found["samples"],
        config_text=json.dumps(as_json(config), indent=2),
    )
    write_text(workdir / "report.html", page)


def comparison_markdown(found: Mapping[str, Any]) -> str:
    """The tables as Markdown, with the budget and the note above them."""
    lines = [f"# {found['title']}", ""]
    lines += [found["note"], ""] if found["note"] else []
    lines += [budget(found), ""]
    for table in tables(found):
        lines += [f"## {table.heading}", "", table.note, ""]
        lines += map(_line, (table.header, ["---"] * len(table.header), *table.rows))
        lines += [""]
    return "\n".join(lines)


def budget(found: Mapping[str, Any]) -> str:
    """The budget in a sentence."""
    kind, steps, seconds, rows = (
        found["budget"][name] for name in ("kind", "steps", "seconds", "batch_size")
    )
    batches = " or ".join(map(str, rows))
    if kind == "steps":
        return (
            f"Budget: equal steps. Every method takes {steps:,} steps of {batches} rows, however "
            "long they last and whoever writes the rows."
        )
    return (
        f"Budget: equal wall-clock. Every method trains for {seconds:,.0f} s, however many steps "
        f"of {batches} rows that makes (at most {steps:,}, for which the schedules are made; "
        "compilation is not counted)."
    )


def tables(found: Mapping[str, Any]) -> list[Table]:
    """ROUGE-L with differences, cost, behaviour, and what a soft prompt did where there is one."""
    seeds = len(found["seeds"])
    over = f"Mean ± standard deviation over {seeds} seeds." if seeds > 1 else "One seed."
    made = [_rouge_table(found, over)]
    cost = (
        "Time and speed are those of training alone, without compilation, evaluation and the "
        "writing of teacher's answers; peak memory is that of the whole run, in which every method "
        f"is measured against the teacher. {over}"
    )
    made.append(Table("Cost", cost, *_figures(found, COST)))
    made.append(_behaviour_table(found, over))
    if any("kl_prompted_after" in figures for figures in found["figures"].values()):
        note = f"What the trained prompt does to its teacher, on held-out requests. {over}"
        made.append(Table("The soft prompt's effect", note, *_figures(found, PROMPT)))
    return made


def comparison_plots(found: Mapping[str, Any]) -> dict[str, list[plots.Plot]]:
    """ROUGE-L by method, KL over the steps, ExAccErr over the positions; by heading."""
    dots = [_dots(found, name) for name in (*found["test_sets"], AVERAGE)]
    kl = [plots.curve(name, list(zip(c["steps"], c["values"]))) for name, c in found["kl"].items()]
    excess = [
        plots.curve(name, list(enumerate(values, start=1)))
        for name, values in found["exposure_bias"].items()
    ]
    lines = [
        plots.line_plot("Held-out KL(teacher ‖ student), nats", kl),
        plots.line_plot("Excess accumulated error, %", excess, x_label="response token"),
    ]
    return {"ROUGE-L by method": dots if len(dots) > 2 else dots[:1], "Over time": lines}


def _rouge_table(found: Mapping[str, Any], over: str) -> Table:
    reference = found["reference"]
    sets = [name for name in (*found["test_sets"], AVERAGE)]
    sets = sets if len(sets) > 2 else sets[:1]
    teacher = found["rougeL"][TEACHER][AVERAGE]["mean"]
    header = ["model", *sets, "of the teacher's", f"minus {reference} [95 %]"]
    rows = []
    for model in _models(found):
        scores = found["rougeL"][model]
        share = f"{scores[AVERAGE]['mean'] / teacher:.1%}" if teacher else "n/a"
        cells = [_spread(scores[name], ".2f", found) for name in sets]
        rows.append([model, *cells, share, _difference(found, model)])
    note = (
        f"{over} Last column: paired differences of the average, seed by seed and request by "
        "request, with a bootstrap interval over seeds and requests; with few seeds it is a rough "
        "one."
    )
    return Table("ROUGE-L", note, header, rows)


def _models(found: Mapping[str, Any]) -> list[str]:
    return [name for name in (TEACHER, START) if name in found["rougeL"]] + found["methods"]


def _difference(found: Mapping[str, Any], model: str) -> str:
    if model not in found["differences"]:
        return ""
    one = found["differences"][model][AVERAGE]
    return f"{one['mean']:+.2f} [{one['low']:+.2f}, {one['high']:+.2f}]"


def _figures(
    found: Mapping[str, Any], columns: Sequence[tuple[str, str, str]]
) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table of figures, for the methods that have them all."""
    rows = [
        [method, *(_spread(figures[key], spec, found) for _, key, spec in columns)]
        for method, figures in found["figures"].items()
        if all(key in figures for _, key, _ in columns)
    ]
    return ["method", *(heading for heading, _, _ in columns)], rows


def _behaviour_table(found: Mapping[str, Any], over: str) -> Table:
    header, rows = _figures(found, BEHAVIOUR)
    last = [f"{found['exposure_bias'][row[0]][-1]:+.1f}" for row in rows]
    note = (
        f"Of the trained student, on held-out requests. {over} ExAccErr: how much more it errs on "
        "its own text than on the teacher's, accumulated up to the last position that a tenth of "
        "the texts reach; 0 is best, below 0 is no fault."
    )
    rows = [[*row, value] for row, value in zip(rows, last)]
    return Table("Behaviour", note, [*header, "ExAccErr, %"], rows)


def _spread(one: Mapping[str, float], spec: str, found: Mapping[str, Any]) -> str:
    mean = format(one["mean"], spec)
    return f"{mean} ± {format(one['std'], spec)}" if len(found["seeds"]) > 1 else mean


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _dots(found: Mapping[str, Any], name: str) -> plots.Plot:
    scores = {method: found["rougeL"][method][name] for method in found["methods"]}
    return plots.dot_plot(
        name,
        {method: one["seeds"] for method, one in scores.items()},
        {method: (one["mean"], one["std"]) for method, one in scores.items()},
        {
            model: found["rougeL"][model][name]["mean"]
            for model in (TEACHER, START)
            if model in found["rougeL"]
        },
    )


def _facts(found: Mapping[str, Any]) -> dict[str, str]:
    sets = [f"{name} ({one['rows']:,} requests)" for name, one in found["test_sets"].items()]
    return {
        "Methods": ", ".join(found["methods"]),
        "Seeds": ", ".join(map(str, found["seeds"])),
        "Test sets": ", ".join(sets),
    }
