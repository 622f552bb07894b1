"""Reading: the records of a source, and the documents of a corpus."""

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from promptkd_jax.data.reading.formats import (
    DOCUMENT,
    FORMATS,
    recognize,
    shown,
    to_document,
    to_record,
)
from promptkd_jax.data.reading.records import NEEDED, NEEDS, Record
from promptkd_jax.data.reading.sources import read_fields
from promptkd_jax.infra import distributed
from promptkd_jax.infra.errors import DataError, Faults

Columns = Mapping[str, str] | Iterable[tuple[str, str]]  # our name: theirs, "" for none


class RecordStream:
    """The records of a source (see `sources.read_fields`), all of one format, one after the other,
    so that not all have to fit into memory.

    Records without what is needed are left out and counted. Of these, and of fields that nothing
    reads, the first process says how many there are when all were read; the counts below are
    complete then.

    Args:
      split: the split of a data set of the hub; a file has none.
      need: what every record must have, key of `records.NEEDS`: "nothing"; the last "response";
        "some response", in any turn; or "references", a response with text to compare with.
      format: key of `formats.FORMATS`; "auto": that of which the first record has the fields.
      columns: their names of fields, by ours (one of `formats.column_names()`); "" for a field
        that is not to be read.
      limit: as many records, of those that have what is needed, end the stream; 0: it has all.
      quiet: nothing is said.

    Attributes:
      source: as it was given.
      format: "auto" until the first record was read.
      unanswered: how many were left out since they lack what is needed.
      unused: how many of them have a field that nothing reads, by its name.
    """

    def __init__(
        self,
        source: str,
        *,
        split: str = "train",
        need: str = "nothing",
        format: str = "auto",
        columns: Columns = (),
        limit: int = 0,
        quiet: bool = False,
    ):
        self.source, self._split, self._need, self._quiet = source, split, need, quiet
        self._limit = limit
        self._columns, self._format, self.format = dict(columns), format, format
        self.unanswered, self.unused = 0, collections.Counter()

    def __iter__(self) -> Iterator[Record]:
        """Yields the records from the first on.

        Raises:
          DataError: behind the last one, as `read_records`.
        """
        self.unanswered, self.unused, count = 0, collections.Counter(), 0
        has_what_is_needed, faults, seen = NEEDS[self._need], Faults(), set()
        for where, fields in read_fields(self.source, faults, split=self._split):
            try:
                if not isinstance(fields, Mapping):
                    example = FORMATS["messages"].example
                    raise DataError(f"found {shown(fields)}, expected an object like {example}")
                seen |= self._columns.values() & fields.keys()
                named, shadowed = _renamed(fields, self._columns)
                if self.format == "auto":
                    self.format = self._recognized(named, fields)
                record, unused = to_record(named, self.format, need_output=self._need != "nothing")
            except DataError as error:
                faults.add(where, str(error))
                continue
            self.unused.update([*unused, *shadowed])
            if has_what_is_needed(record):
                count += 1
                yield dataclasses.replace(record, place=where)
                if count == self._limit:
                    break
            else:
                self.unanswered += 1
        faults.raise_any(self.source)
        if not count:
            example = FORMATS.get(self.format, FORMATS["messages"]).example
            unanswered = f"none of {self.unanswered} records has {NEEDED[self._need]}"
            found = unanswered if self.unanswered else "no records"
            raise DataError(f"{self.source}: {found}; expected at least one like {example}")
        if not self._quiet:
            self._say(seen)

    def _recognized(self, named: Mapping[str, Any], fields: Mapping[str, Any]) -> str:
        """`recognize`, which names columns that are not there, too."""
        try:
            return recognize(named)
        except DataError as error:
            absent = [repr(name) for name in self._columns.values() if name and name not in fields]
            if not absent:
                raise
            said = f"{error}; data.columns names {', '.join(absent)}, which is none of the fields"
            raise DataError(said) from None

    @property
    def how(self) -> dict[str, Any]:
        """All by which records are made of the source."""
        how = dict(split=self._split, need=self._need, format=self._format)
        return how | {"columns": self._columns, "limit": self._limit}

    @property
    def left_out(self) -> dict[str, int]:
        """What reading has left out, in words, with how often."""
        without = f"without {NEEDED[self._need]}"
        dropped = {without: self.unanswered} if self.unanswered else {}
        return dropped | {f"unused field {name!r}": count for name, count in self.unused.items()}

    def _say(self, seen: set[str]) -> None:
        for theirs in self._columns.values():
            if theirs and theirs not in seen:
                which = f"none of the first {self._limit} records" if self._limit else "no record"
                distributed.warn(f"{self.source}: {which} has the field {theirs!r} of data.columns")
        if self.unanswered:
            distributed.warn(
                f"{self.source}: {self.unanswered} records left out, without {NEEDED[self._need]}"
            )
        if self.unused:
            counted = ", ".join(f"{name!r} ({n} records)" for name, n in self.unused.items())
            distributed.warn(f"{self.source}: fields that nothing reads: {counted}")


class Records(list[Record]):
    """The records of a source, in their order, and what reading has found out: `format`,
    `unanswered`, `unused` and `left_out` of the `RecordStream`."""

    def __init__(self, stream: RecordStream):
        super().__init__(stream)
        self.format, self.unanswered = stream.format, stream.unanswered
        self.unused, self.left_out = dict(stream.unused), stream.left_out


def read_records(source: str, **how: Any) -> Records:
    """Reads all records of a source into memory, as `RecordStream`, whose arguments it takes.

    Raises:
      DataError: names the first ten examples that cannot be used, by file:line, or data set and
        row (from 0), with the fault and what would be right.
    """
    return Records(RecordStream(source, **how))


def _renamed(
    fields: Mapping[str, Any], columns: Mapping[str, str]
) -> tuple[Mapping[str, Any], list[str]]:
    """The fields by our names, and the names of fields that had one of them already and made
    room."""
    if not columns:
        return fields, []
    given = {ours: fields[theirs] for ours, theirs in columns.items() if theirs in fields}
    gone = {*given, *(columns[ours] for ours in given)}
    gone |= {ours for ours, theirs in columns.items() if not theirs}
    rest = {name: value for name, value in fields.items() if name not in gone}
    shadowed = [n for n in given if fields.get(n) is not None and n not in columns.values()]
    return given | rest, shadowed


def read_corpus(source: str, *, split: str = "train", columns: Columns = ()) -> Iterator[str]:
    """Yields documents of plain text: the lines of a .txt file, the field `text` of any other
    source (see `sources.read_fields`).

    Raises:
      DataError: as `read_records`; of faults at the end.
    """
    columns, faults, number = dict(columns), Faults(), 0
    for where, fields in read_fields(source, faults, split=split):
        try:
            renamed = _renamed(fields, columns)[0] if isinstance(fields, Mapping) else fields
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
