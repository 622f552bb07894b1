"""Tables keep their columns, whatever stands in the cells."""

import pytest
from rich.cells import cell_len

from promptkd_jax.evaluation.bootstrap import mean_and_std
from promptkd_jax.evaluation.tables import Table, markdown, mean_and_deviation, section

TABLE = Table(
    ("model", "ROUGE-L", ""),
    [("a|b", "1.5", "better"), ("\u6559\u5e08", "22.75", "")],
    "Scores",
    "Of 2.",
)


def test_a_table_is_markdown_in_columns():
    lines = markdown(TABLE).splitlines()
    assert lines[1] == "| ----- | ------: | -----: |"
    assert lines[2] == r"| a\|b  |     1.5 | better |"
    assert {cell_len(line) for line in lines} == {cell_len(lines[0])}


def test_the_cells_that_name_a_row_stand_to_the_left():
    lines = markdown(TABLE._replace(names=2)).splitlines()
    assert lines[2] == r"| a\|b  | 1.5     | better |"


def test_a_section_has_heading_and_note():
    assert section(TABLE).startswith("## Scores\n\nOf 2.\n\n| model |")


@pytest.mark.parametrize("values, text", [([1.0, 3.0], "2.0 ± 1.4"), ([2.0], "2.0")])
def test_one_seed_has_no_deviation(values, text):
    spread = mean_and_std(values)._asdict()
    assert mean_and_deviation(spread, len(values), ".1f") == text
