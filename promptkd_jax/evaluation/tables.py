"""Tables of text: Markdown that a terminal shows in columns, too, and the numbers in their cells.

A page shows a table by the macro `table` of `templates/parts.html.jinja`.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rich.cells import cell_len


class Table(NamedTuple):
    """A header and rows of as many cells: the first names the row, the others are figures."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    heading: str = ""
    note: str = ""  # how to read it


def markdown(table: Table) -> str:
    """Returns header and rows as Markdown, padded to columns: figures stand to the right."""
    rows = [[cell.replace("|", r"\|") for cell in row] for row in (table.header, *table.rows)]
    widths = [max(3, *map(cell_len, column)) for column in zip(*rows)]
    first, *others = widths
    rule = ["-" * first, *("-" * (width - 1) + ":" for width in others)]
    lines = [_padded(rows[0], widths), rule, *(_padded(row, widths) for row in rows[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _padded(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    padding = [" " * (width - cell_len(cell)) for cell, width in zip(cells, widths)]
    return [cells[0] + padding[0], *(pad + cell for cell, pad in zip(cells[1:], padding[1:]))]


def section(table: Table) -> str:
    """Returns the table as Markdown below its heading and its note."""
    return "\n\n".join([f"## {table.heading}", table.note, markdown(table)])


def mean_and_deviation(spread: Mapping[str, float], seeds: int, spec: str = ".2f") -> str:
    """Returns "mean ± std" of a `bootstrap.Spread` as a dict; of one seed, the value alone."""
    mean = format(spread["mean"], spec)
    return f"{mean} ± {format(spread['std'], spec)}" if seeds > 1 else mean
