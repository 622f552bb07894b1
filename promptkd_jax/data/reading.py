"""Reading: the records of a source, and the documents of a corpus."""

import collections
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from promptkd_jax.data.formats import (
    DOCUMENT,
    FORMATS,
    recognize,
    shown,
    to_document,
    to_record,
)
from promptkd_jax.data.parsers import Faults
from promptkd_jax.data.records import Record
from promptkd_jax.data.sources import read_fields
from promptkd_jax.infra import distributed
from promptkd_jax.infra.errors import DataError

Columns = Mapping[str, str] | Iterable[tuple[str, str]]  # our name: theirs, "" for none


class Records(list[Record]):
    """The records of a source, in their order, and what reading it has left out.

    Attributes:
      format: key of `formats.FORMATS`.
      unanswered: how many were dropped since their answer has no text.
      unused: how many of them have a field that nothing reads, by its name.
    """

    def __init__(
        self, records: Iterable[Record], format: str, unanswered: int, unused: Mapping[str, int]
    ):
        super().__init__(records)
        self.format, self.unanswered, self.unused = format, unanswered, dict(unused)

    @property
    def left_out(self) -> dict[str, int]:
        """What reading has left out, in words, with how often."""
        dropped = {"without a response": self.unanswered} if self.unanswered else {}
        return dropped | {f"unused field {name!r}": count for name, count in self.unused.items()}


def read_records(
    source: str,
    *,
    split: str = "train",
    need_output: bool,
    format: str = "auto",
    columns: Columns = (),
) -> Records:
    """Reads the records of a source (see `sources.read_fields`), all of one format.

    Records whose answer has no text are dropped and counted where one is needed. Of these, and of
    fields that nothing reads, the first process says once how many there are.

    Args:
      split: the split of a data set of the hub; a file has none.
      need_output: whether every record must have an answer.
      format: key of `formats.FORMATS`; "auto": that of which the first record has the fields.
      columns: their names of fields, by ours (one of `formats.column_names()`); "" for a field
        that is not to be read.

    Raises:
      DataError: names the first ten examples that cannot be used, by file:line, or data set and
        row (from 0), with the fault and what would be right.
    """
    columns, faults = dict(columns), Faults()
    records: list[Record] = []
    unused, seen = collections.Counter(), set()
    unanswered = 0
    for where, fields in read_fields(source, faults, split=split):
        try:
            if not isinstance(fields, Mapping):
                example = FORMATS["messages"].example
                raise DataError(f"found {shown(fields)}, expected an object like {example}")
            seen |= columns.values() & fields.keys()
            fields = _renamed(fields, columns)
            if format == "auto":
                format = recognize(fields)
            record, beside = to_record(fields, format, need_output)
        except DataError as error:
            faults.add(where, str(error))
            continue
        unused.update(beside)
        if need_output and not record.references:
            unanswered += 1
        else:
            records.append(record)
    faults.raise_any(source)
    if not records:
        example = FORMATS.get(format, FORMATS["messages"]).example
        found = f"all {unanswered} answers are without text" if unanswered else "no records"
        raise DataError(f"{source}: {found}; expected at least one like {example}")
    _say(source, columns, seen, unanswered, unused)
    return Records(records, format, unanswered, unused)


def _renamed(fields: Mapping[str, Any], columns: Mapping[str, str]) -> Mapping[str, Any]:
    """The fields by our names; a field that has our name already makes room."""
    if not columns:
        return fields
    given = {ours: fields[theirs] for ours, theirs in columns.items() if theirs in fields}
    gone = {*given, *(columns[ours] for ours in given)}
    gone |= {ours for ours, theirs in columns.items() if not theirs}
    return given | {name: value for name, value in fields.items() if name not in gone}


def _say(
    source: str,
    columns: Mapping[str, str],
    seen: set[str],
    unanswered: int,
    unused: Mapping[str, int],
) -> None:
    for theirs in columns.values():
        if theirs and theirs not in seen:
            distributed.warn(f"{source}: no record has the field {theirs!r} of data.columns")
    if unanswered:
        distributed.warn(f"{source}: {unanswered} records dropped, their answers have no text")
    if unused:
        counted = ", ".join(f"{name!r} ({count} records)" for name, count in unused.items())
        distributed.warn(f"{source}: fields that nothing reads: {counted}")


def read_corpus(source: str, *, split: str = "train", columns: Columns = ()) -> Iterator[str]:
    """Yields documents of plain text: the lines of a .txt file, the field `text` of any other
    source (see `sources.read_fields`).

    Raises:
      DataError: as `read_records`; of faults at the end.
    """
    columns, faults, number = dict(columns), Faults(), 0
    for where, fields in read_fields(source, faults, split=split):
        try:
            renamed = _renamed(fields, columns) if isinstance(fields, Mapping) else fields
            text = to_document(renamed)
        except DataError as error:
            faults.add(where, str(error))
            continue
        if text:
            number += 1
            yield text
    faults.raise_any(source)
    if not number:
        raise DataError(f"{source}: no text; expected documents such as {DOCUMENT}")
