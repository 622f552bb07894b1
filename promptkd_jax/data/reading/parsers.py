"""Parsers: the fields of the examples in one file, of JSON, tables or text, each with its place.

A file is known by what it begins with, and where that does not tell, by its suffix. Examples come
one after the other, so that no file has to fit into memory.
"""

import codecs
import contextlib
import csv
import io
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib.resources.abc import Traversable
from pathlib import PurePath
from typing import Any, BinaryIO

from etils import epath

from promptkd_jax.infra.errors import DataError, Faults

Located = tuple[str, Any]  # ("train.jsonl:3", {"instruction": "…", …})
File = epath.Path | Traversable

READ = ".jsonl, .json (one array), .csv, .tsv, .parquet and .txt (a corpus), plain, .gz or .zst"

_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}  # by their first bytes
# What other files begin with, as patterns.
_OTHERS = {
    rb"version https://git-lfs": "a Git LFS pointer and not the data; fetch them by `git lfs pull`",
    rb"PK\x03\x04": "a zip archive or a spreadsheet; unpack it, or save the sheet as .csv",
    rb"BZh[1-9]1AY&SY": "compressed by bzip2; decompress it, or compress it by gzip or zstd",
    rb"\xfd7zXZ\0": "compressed by xz; decompress it, or compress it by gzip or zstd",
    rb"\x04\x22M\x18": "compressed by lz4; decompress it, or compress it by gzip or zstd",
    rb"7z\xbc\xaf\x27\x1c": "a 7-Zip archive; unpack it",
    rb"ARROW1\0|\xff{4}": "an Arrow file; save it as .parquet",
    rb"SQLite format 3\0": "a data base of SQLite; save the table as .csv",
    rb"\x80[\x02-\x05]": "a pickle, which is not read since it may run code; save it as .parquet",
    rb"\x89PNG|\xff\xd8\xff": "an image; models see text alone",
    rb"%PDF-": "a PDF; save its text as UTF-8",
    rb"(?i:<!doctype html|<html)": "a web page; download the file itself",
    rb"\xff\xfe|\xfe\xff": "text in UTF-16; save it as UTF-8",
}
_HEAD, _CHUNK = 2**13, 2**16  # bytes that are looked at first, and read at once
_LONGEST_LITERAL = 16  # characters of JSON's longest word: what an error so near the end may lack


def file_kind(name: str) -> str:
    """The suffix of a file that can be read, that of a compression left out; "" for others."""
    suffix = PurePath(re.sub(r"\.(gz|zst)$", "", name.lower())).suffix
    return suffix if suffix in _SUFFIXES else ""


def read_file(name: str, file: File, faults: Faults) -> Iterator[Located]:
    """Yields the fields of every example of a file, with its place: its line, or its row.

    Args:
      name: of the file, for messages.
      faults: gets the examples that cannot be read, which are left out.

    Raises:
      DataError: the file is of another kind; says of which.
      OSError, or another of `io_errors`: it cannot be read, or its compressed end is missing.
    """
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(file.open("rb"))
        stream = opened if hasattr(opened, "peek") else io.BufferedReader(opened)
        codec = next((c for mark, c in _COMPRESSED.items() if stream.peek(4).startswith(mark)), "")
        if codec:
            stream = _decompressed(stream, codec)
        head, kind = stream.peek(_HEAD), file_kind(name)
        text = head.removeprefix(codecs.BOM_UTF8).lstrip()
        if head.startswith(b"PAR1"):
            if codec:  # copied to the disk, since it is read from its end
                whole = stack.enter_context(tempfile.TemporaryFile())
                shutil.copyfileobj(stream, whole)
                stream = whole
            yield from _read_parquet(name, stream)
            return
        for beginning, content in _OTHERS.items():
            if re.match(beginning, text):
                raise DataError(f"{name}: is {content}")
        if b"\0" in head or kind == ".parquet":
            shown = "is no Parquet file, whatever its name" if kind == ".parquet" else "is binary"
            raise DataError(f"{name}: {shown}; what is read: {READ}")
        if kind in (".csv", ".tsv"):
            titles = text.partition(b"\n")[0].decode(errors="replace")
            marks = "\t,;" if kind == ".tsv" else ",;\t"
            separator = max(marks, key=titles.count)  # the first of equal ones
            if kind == ".tsv" and "\t" in titles:
                separator = "\t"
            yield from _read_table(name, stream, faults, separator)
        elif kind == ".txt":
            for number, line in _lines(name, stream, faults):
                yield f"{name}:{number}", {"text": line.strip()}
        elif text.startswith(b"["):
            yield from _read_array(name, stream, faults)
        elif text.partition(b"\n")[0].strip() == b"{":
            raise DataError(
                f"{name}: is one JSON object over many lines; expected an object on every line, or "
                f"one array [ … ] of objects (jq -c . {name} > lines.jsonl)"
            )
        else:
            yield from _read_lines(name, stream, faults)


def _decompressed(stream: BinaryIO, codec: str) -> io.BufferedReader:
    import pyarrow  # takes a moment to import, and plain files need none of it

    return io.BufferedReader(pyarrow.CompressedInputStream(stream, codec), _HEAD)


def _read_parquet(name: str, stream: BinaryIO) -> Iterator[Located]:
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(stream).iter_batches(batch_size=1024):
            for fields in batch.to_pylist():
                yield f"{name} row {number}", without_absent(fields)
                number += 1
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{name}: damaged Parquet after row {number}: {error}") from error


def without_absent(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a table without what is null in its structures: a table gives each structure of a
    column the fields of all others."""

    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: kept(inner) for name, inner in value.items() if inner is not None}
        return [kept(inner) for inner in value] if isinstance(value, list) else value

    return {name: kept(value) for name, value in row.items()}


def _lines(name: str, stream: BinaryIO, faults: Faults) -> Iterator[tuple[int, str]]:
    """Yields the lines, each with its number; they end at newlines alone."""
    for number, line in enumerate(stream, start=1):  # as bytes, to find a bad one on its line
        try:
            text = line.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            faults.add(f"{name}:{number}", _not_utf8(error))
            text = line.decode("utf-8-sig", errors="replace")  # so that others are found too
        yield number, text


def _not_utf8(error: UnicodeDecodeError) -> str:
    before, byte = error.object[: error.start], error.object[error.start : error.start + 1]
    column = len(before) - before.rfind(b"\n")
    return (
        f"byte {column} of the line is not UTF-8 (0x{byte.hex()}, "
        f"{byte.decode('latin-1')!r} in Latin-1); save the file as UTF-8"
    )


def _read_lines(name: str, stream: BinaryIO, faults: Faults) -> Iterator[Located]:
    for number, line in _lines(name, stream, faults):
        if line.strip():
            where = f"{name}:{number}"
            try:
                fields = json.loads(line.rstrip())
            except (ValueError, RecursionError) as error:
                faults.add(where, f"{_json_fault(error)}; every line is one object")
            else:
                yield where, fields


def _json_fault(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"broken JSON at column {error.colno} ({error.msg})"
    if isinstance(error, RecursionError):
        return "JSON nested too deeply, brackets in brackets"
    digits = f"{sys.get_int_max_str_digits():,}"
    return f"a number of more than {digits} digits, which would be text in quotes"


class _Text:
    """UTF-8 text as it comes: what begins at `at` is not used yet, and is of line `line`."""

    def __init__(self, name: str, stream: BinaryIO):
        self._name, self._stream = name, stream
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._decode_json = json.JSONDecoder().raw_decode
        self.text, self.at, self.line = "", 0, 1

    def next_mark(self) -> str:
        """The next character that is no blank, "" at the end of the file."""
        while True:
            end = self.at
            while end < len(self.text) and self.text[end].isspace():
                end += 1
            self.skip_to(end)
            if self.at < len(self.text) or not self._more():
                return self.text[self.at : self.at + 1]

    def skip_to(self, end: int) -> None:
        """Uses the text up to `end`."""
        self.line += self.text.count("\n", self.at, end)
        self.at = end

    def next_value(self) -> Any:
        """Uses the JSON value that begins here. Raises what `json` raises."""
        while True:
            try:
                value, end = self._decode_json(self.text, self.at)
            except json.JSONDecodeError as error:
                # Of a value whose end is not there yet, which may be in the middle of a word.
                near_end = error.pos > len(self.text) - _LONGEST_LITERAL
                unfinished = near_end or error.msg.startswith("Unterminated string")
                if not unfinished or not self._more():
                    raise
            else:
                length = end - self.at
                if end < len(self.text) or not self._more():  # a number may go on
                    self.skip_to(self.at + length)
                    return value

    def _more(self) -> bool:
        """Reads on, as much again as is waiting; False at the end of the file."""
        self.text, self.at = self.text[self.at :], 0
        chunk = self._stream.read(max(_CHUNK, len(self.text)))
        try:
            self.text += self._decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            before = self.text.count("\n") + error.object[: error.start].count(b"\n")
            raise DataError(f"{self._name}:{self.line + before}: {_not_utf8(error)}") from error
        return bool(chunk)


def _read_array(name: str, stream: BinaryIO, faults: Faults) -> Iterator[Located]:
    """Yields the elements of one JSON array, in one line or many, as they come."""
    text, expected, number = _Text(name, stream), "[", 0
    while mark := text.next_mark():
        if mark not in expected:
            faults.add(
                f"{name}:{text.line}", f"found {mark!r} in a JSON array, expected {expected[0]!r}"
            )
            return
        text.skip_to(text.at + 1)
        if mark == "]":
            if text.next_mark():
                faults.add(f"{name}:{text.line}", "text after the end of a JSON array")
            return
        if expected == "[" and text.next_mark() == "]":
            return
        text.next_mark()
        where = f"{name}:{text.line} (element {number})"
        try:
            value = text.next_value()
        except DataError:
            raise
        except json.JSONDecodeError as error:
            near = error.doc[max(error.pos - 20, 0) : error.pos + 20]
            faults.add(where, f"broken JSON ({error.msg} near {near!r}); nothing more is read")
            return
        except (ValueError, RecursionError) as error:
            faults.add(where, f"{_json_fault(error)}; nothing more is read")
            return
        yield where, value
        expected, number = ",]", number + 1
    faults.add(f"{name}:{text.line}", "the JSON array has no end; is the file cut off?")


def _read_table(name: str, stream: BinaryIO, faults: Faults, separator: str) -> Iterator[Located]:
    csv.field_size_limit(sys.maxsize)  # a text may be long
    lines = (line for _, line in _lines(name, stream, faults))
    rows = csv.reader(lines, delimiter=separator, strict=True)
    header = next((cells for cells in rows if any(cells)), [])  # blank lines may come first
    if len(set(header)) < len(header):
        raise DataError(f"{name}: two columns have one name: {header}; rename one of them")
    while True:
        where = f"{name}:{rows.line_num + 1}"
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            faults.add(where, f"broken CSV ({error})")
            continue
        if len(cells) == len(header):
            yield where, dict(zip(header, cells))
        elif cells:
            faults.add(where, f"{len(cells)} cells under {len(header)} columns")
