"""Tables of text: Markdown that a terminal shows in columns, too, and the numbers in their cells.

A page shows a table by the macro `table` of `templates/parts.html.jinja`.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rich.cells import cell_len


class Table(NamedTuple):
    """A header and rows of as many cells: the first name the row, the others are figures."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    heading: str = ""
    note: str = ""  # how to read it
    names: int = 1  # how many of the cells name a row


def markdown(table: Table) -> str:
    """Returns header and rows as Markdown, padded to columns: figures stand to the right."""
    rows = [[cell.replace("|", r"\|") for cell in row] for row in (table.header, *table.rows)]
    columns = []
    for index, cells in enumerate(zip(*rows)):
        left, width = index < table.names, max(3, *map(cell_len, cells))
        gaps = [" " * (width - cell_len(cell)) for cell in cells]
        header, *figures = (c + gap if left else gap + c for c, gap in zip(cells, gaps))
        rule = "-" * width if left else "-" * (width - 1) + ":"
        columns.append([header, rule, *figures])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in zip(*columns))


def section(table: Table) -> str:
    """Returns the table as Markdown below its heading and its note."""
    return "\n\n".join([f"## {table.heading}", table.note, markdown(table)])


def mean_and_deviation(spread: Mapping[str, float], seeds: int, spec: str = ".2f") -> str:
    """Returns "mean ± std" of a `bootstrap.Spread` as a dict; of one seed, the value alone."""
    mean = format(spread["mean"], spec)
    return f"{mean} ± {format(spread['std'], spec)}" if seeds > 1 else mean
