"""What a person sees of a comparison: its tables, as Markdown and in one HTML page, and plots.

All is made of what `comparison.json` holds (see `compare.summarize_comparison`), here `found`.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from promptkd_jax.evaluation import plots
from promptkd_jax.evaluation.bootstrap import mean_and_std
from promptkd_jax.evaluation.report import render
from promptkd_jax.evaluation.tables import Table, mean_and_deviation, section
from promptkd_jax.infra.files import write_text
from promptkd_jax.studies.answers import AVERAGE
from promptkd_jax.studies.comparison import ComparisonConfig
from promptkd_jax.training.config.config_file import as_json

TEACHER, START = "teacher", "student before"

# The figures that are shown: heading, key of a run's summary, format; PROMPT behind a soft prompt.
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
EXPOSURE = ("ExAccErr, %", "ex_acc_err", ".1f")
PROMPT = (
    ("KL(teacher ‖ student) without it, nats", "kl_after", ".3f"),
    ("with it", "kl_prompted_after", ".3f"),
    ("teacher's ROUGE-L without it", "teacher_rougeL", ".2f"),
    ("with it", "teacher_rougeL_prompted", ".2f"),
)
# Of each update, on its own rows: what the prompt does to the teacher that the student learns from.
PROMPT_CURVES = {
    "prompt_regularizer": "KL(p_P ‖ p)",
    "kl_prompted": "KL(q ‖ p_P)",
    "kl_plain": "KL(q ‖ p)",
}


def write(workdir: pathlib.Path, found: Mapping[str, Any], config: ComparisonConfig) -> None:
    """Writes `comparison.md` and `report.html`, one file that needs nothing else."""
    write_text(workdir / "comparison.md", comparison_markdown(found))
    page = render(
        "compare.html.jinja",
        title=found["title"],
        note=found["note"],
        budget=budget(found),
        seeds=len(found["seeds"]),
        facts=_facts(found),
        tables=tables(found),
        plots=comparison_plots(found),
        samples=found["samples"],
        config_text=json.dumps(as_json(config), indent=2),
    )
    write_text(workdir / "report.html", page)


def comparison_markdown(found: Mapping[str, Any]) -> str:
    """The tables as Markdown, with the note, the budget and the facts above them."""
    facts = "\n".join(f"- {name}: {value}" for name, value in _facts(found).items())
    above = filter(None, (f"# {found['title']}", found["note"], budget(found), facts))
    return "\n\n".join([*above, *map(section, tables(found))]) + "\n"


def budget(found: Mapping[str, Any]) -> str:
    """The budget in a sentence."""
    spent = found["budget"]
    steps, rows = spent["steps"], " or ".join(map(str, spent["batch_size"]))
    if spent["kind"] == "steps":
        return (
            f"Budget: equal steps. Every method takes {steps:,} steps of {rows} rows, however "
            "long they last and whoever writes the rows."
        )
    return (
        f"Budget: equal wall-clock. Every method trains for {spent['seconds']:,.0f} s, however "
        f"many steps of {rows} rows that makes (at most {steps:,}, for which the schedules are "
        "made; compilation is not counted)."
    )


def tables(found: Mapping[str, Any]) -> list[Table]:
    """ROUGE-L with differences, cost, behaviour, and what a soft prompt did where there is one."""
    seeds = len(found["seeds"])
    over = f"Mean ± standard deviation over {seeds} seeds." if seeds > 1 else "One seed."
    made = [
        _rouge_table(found, over),
        _figures(found, COST)._replace(
            heading="Cost",
            note="Time and speed are those of training alone, without compilation, evaluation and "
            "the writing of the teacher's responses; peak memory is that of the whole run, in "
            f"which every method is measured against the teacher. {over}",
        ),
        _with_paired_kl(found, _figures(found, (*BEHAVIOUR, EXPOSURE)))._replace(
            heading="Behaviour",
            note=f"Of the trained student, on held-out requests. {over} ExAccErr: how much more it "
            "errs on its own text than on the teacher's, accumulated up to the last position that "
            "a tenth of the texts reach; 0 is best, below 0 is no fault. Last column: differences "
            "of KL seed by seed; below 0 is closer to the teacher.",
        ),
        _figures(found, PROMPT)._replace(
            heading="The soft prompt's effect",
            note=f"What the trained prompt does to its teacher, on held-out requests. {over}",
        ),
    ]
    return [table for table in made if table.rows]


def comparison_plots(found: Mapping[str, Any]) -> dict[str, list[plots.Plot]]:
    """ROUGE-L by method, KL over the steps, ExAccErr over the positions, what the soft prompt did
    over the steps; by heading."""
    dots = [_dots(found, name) for name in _shown_sets(found)]
    kl = [plots.curve(name, list(zip(c["steps"], c["values"]))) for name, c in found["kl"].items()]
    excess = [
        plots.curve(name, list(enumerate(values, start=1)))
        for name, values in found["exposure_bias"].items()
    ]
    lines = [
        plots.line_plot("Held-out KL(teacher ‖ student), nats", kl),
        plots.line_plot("Excess accumulated error, %", excess, x_label="response token"),
    ]
    made = {"ROUGE-L by method": dots, "Over time": lines}
    return made | ({"The soft prompt over time": _prompt_plots(found)} if found["prompt"] else {})


def _prompt_plots(found: Mapping[str, Any]) -> list[plots.Plot]:
    """The prompted teacher's distance from the plain one, and the student's from both."""

    def curves(*keys: str) -> list[plots.Curve]:
        return [
            plots.curve(
                f"{method}: {PROMPT_CURVES[key]}",
                list(zip(by_key[key]["steps"], by_key[key]["values"])),
            )
            for method, by_key in found["prompt"].items()
            for key in keys
            if key in by_key
        ]

    return [
        plots.line_plot("Prompted from plain teacher, nats", curves("prompt_regularizer")),
        plots.line_plot(
            "Student from prompted and plain teacher, nats", curves("kl_prompted", "kl_plain")
        ),
    ]


def _rouge_table(found: Mapping[str, Any], over: str) -> Table:
    reference, sets = found["reference"], _shown_sets(found)
    teacher = found["rougeL"][TEACHER][AVERAGE]["mean"]
    rows = []
    for model in [name for name in (TEACHER, START) if name in found["rougeL"]] + found["methods"]:
        scores = found["rougeL"][model]
        share = f"{scores[AVERAGE]['mean'] / teacher:.1%}" if teacher else "n/a"
        cells = [mean_and_deviation(scores[name], len(found["seeds"])) for name in sets]
        difference = ""
        if model in found["differences"]:
            of = found["differences"][model][AVERAGE]
            difference = f"{of['mean']:+.2f} [{of['low']:+.2f}, {of['high']:+.2f}]"
        rows.append([model, *cells, share, difference])
    note = (
        f"{over} Last column: paired differences of the average, seed by seed and request by "
        "request, with a bootstrap interval over seeds and requests; with few seeds it is a rough "
        "one."
    )
    header = ["model", *sets, "of the teacher's", f"minus {reference} [95 %]"]
    return Table(header, rows, "ROUGE-L", note)


def _shown_sets(found: Mapping[str, Any]) -> list[str]:
    """The test sets, and their average where there are several."""
    sets = list(found["test_sets"])
    return [*sets, AVERAGE] if len(sets) > 1 else sets


def _figures(found: Mapping[str, Any], columns: Sequence[tuple[str, str, str]]) -> Table:
    """The figures of the methods that have them all."""
    seeds = len(found["seeds"])
    rows = [
        [method, *(mean_and_deviation(figures[key], seeds, spec) for _, key, spec in columns)]
        for method, figures in found["figures"].items()
        if all(key in figures for _, key, _ in columns)
    ]
    return Table(["method", *(heading for heading, _, _ in columns)], rows)


def _with_paired_kl(found: Mapping[str, Any], table: Table) -> Table:
    """The table of all methods with each one's KL minus the reference's of the same seed."""
    reference, rows = found["reference"], []
    theirs = found["figures"][reference]["kl_after"]["seeds"]
    for method, *cells in table.rows:
        pairs = zip(found["figures"][method]["kl_after"]["seeds"], theirs)
        spread = mean_and_std([ours - their for ours, their in pairs])._asdict()
        difference = mean_and_deviation(spread, len(theirs), ".3f")
        rows.append([method, *cells, "" if method == reference else difference])
    return table._replace(header=[*table.header, f"KL minus {reference}'s"], rows=rows)


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
        "Device": " and ".join(found["devices"]),
        "Versions": " and ".join(found["versions"]),
        "Time of all trainings": f"{found['training_seconds'] / 60:,.1f} min",
    }
