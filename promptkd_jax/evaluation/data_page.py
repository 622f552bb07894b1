"""Shows a `DataReport`: in a terminal, as a page of its own, or as a section of a run's report."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath
from rich.console import Console
from rich.text import Text

from promptkd_jax.evaluation.data_report import DataReport, Lengths, Overlap, ShownRow
from promptkd_jax.evaluation.duplicates import THRESHOLD
from promptkd_jax.evaluation.report import render
from promptkd_jax.evaluation.tables import Table, markdown
from promptkd_jax.infra.files import make_folder, write_text
from promptkd_jax.infra.terminal import shows_control_codes

_BINS = 12  # of a histogram
_BAR, _LONGEST_PIECE = 40, 1500  # characters, of the terminal


def show_data(report: DataReport, console: Console | None = None) -> None:
    """Prints a report: on a terminal supervised tokens are green and special ones bold, elsewhere
    they stand between marks."""
    console = console or Console()
    coloured = shows_control_codes(console) and not console.no_color

    def say(text: str | Text = "") -> None:
        if coloured:
            console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=console.file)

    say(markdown(report.counts))
    say("\n" + "\n".join(report.notes) + "\n")
    say(markdown(length_table(report.lengths)))
    for split, part, tokens in report.lengths:
        say(f"\n{split}: {part}, tokens")
        say("\n".join(_bars(tokens)))
    legend = (
        "supervised in green, special tokens in bold" if coloured else "⟦supervised⟧, «special»"
    )
    say(f"\nRows as the model sees them: {legend}")
    for row in report.rows:
        say(f"\n--- {row.split}, row {row.index} (from 0)")
        say(_coloured(row) if coloured else _marked(row))
    for overlap in report.overlaps:
        say(f"\n{_overlap_line(overlap)}")
        for pair in overlap.pairs:
            shown = (" ".join(text.split())[:100] for text in (pair.held_out, pair.train))
            say("  {:.2f}  {}\n        {}".format(pair.similarity, *shown))
    if report.warnings:
        say()
    for warning in report.warnings:
        say(f"warning: {warning}")


def write_data_page(file: epath.Path, report: DataReport, *, title: str, config_text: str) -> None:
    """Writes a report as a page that needs nothing else.

    Args:
      title: heading of the page.
      config_text: how the rows were made, shown folded.
    """
    make_folder(file.parent)
    values = dict(title=title, config_text=config_text, data=page_section(report))
    write_text(file, render("data_page.html.jinja", **values))


def page_section(report: DataReport) -> dict[str, Any]:
    """Returns what the macro of `templates/data.html.jinja` shows of a report."""
    from promptkd_jax.evaluation.plots import histogram_plot  # and Matplotlib, which takes a second

    plots = []
    for part in ("prompt", "response"):
        of_part = [one for one in report.lengths if one.part == part]
        if of_part:
            every = np.concatenate([one.tokens for one in of_part])
            edges = bin_edges(every.min(), every.max())
            counts = {
                one.split: (np.histogram(one.tokens, edges)[0], float(np.median(one.tokens)))
                for one in of_part
            }
            plots.append(histogram_plot(f"Tokens of a {part}", counts, edges))
    return {
        "counts": report.counts,
        "notes": report.notes,
        "lengths": length_table(report.lengths),
        "plots": plots,
        "rows": report.rows,
        "overlaps": [(_overlap_line(one), one.pairs) for one in report.overlaps],
        "warnings": report.warnings,
    }


def length_table(lengths: Sequence[Lengths]) -> Table:
    """Returns the lengths in a few figures, in tokens."""
    rows = [
        (
            f"{split}: {part}",
            *(
                f"{np.percentile(tokens, share):,.1f}".removesuffix(".0")
                for share in (0, 50, 95, 100)
            ),
            f"{tokens.mean():,.1f}",
        )
        for split, part, tokens in lengths
    ]
    return Table(("tokens", "least", "median", "95 %", "most", "mean"), rows)


def bin_edges(low: int, high: int) -> np.ndarray:
    """Returns the edges of at most 12 bins of whole numbers, as wide as each other, that reach from
    `low` to `high`: the first number of each bin, and the one after the last bin."""
    width = -(-(high - low + 1) // _BINS)
    return np.arange(low, high + width + 1, width)


def _bars(tokens: np.ndarray) -> Iterator[str]:
    edges = bin_edges(tokens.min(), tokens.max())
    counts, _ = np.histogram(tokens, edges)
    names = [
        f"{low}–{end - 1}" if end - low > 1 else f"{low}" for low, end in zip(edges, edges[1:])
    ]
    width = max(map(len, names))
    for name, count in zip(names, counts):
        bar = "█" * -(-_BAR * count // counts.max())
        yield f"  {name:>{width}}  {bar:{_BAR}}  {count:,}"


def _shortened(text: str) -> str:
    half = _LONGEST_PIECE // 2
    left_out = len(text) - 2 * half
    return text if left_out <= 0 else f"{text[:half]} […{left_out:,} characters…] {text[-half:]}"


def _marked(row: ShownRow) -> str:
    shown = ""
    for supervised, pieces in itertools.groupby(row.pieces, key=lambda piece: piece.supervised):
        texts = (f"«{p.text}»" if p.special else _shortened(p.text) for p in pieces)
        shown += f"⟦{''.join(texts)}⟧" if supervised else "".join(texts)
    return shown


def _coloured(row: ShownRow) -> Text:
    shown = Text()
    for text, supervised, special in row.pieces:
        style = f"{'bold ' * special}{'green' * supervised}".strip()
        shown.append(_shortened(text), style or None)
    return shown


def _overlap_line(overlap: Overlap) -> str:
    return (
        f"{overlap.split}: {overlap.same} of {overlap.prompts} prompts are in the training data in "
        f"the same words, {overlap.near} nearly (of the runs of three words that either has, at "
        f"least {THRESHOLD:.0%} are in both)"
    )
