"""Rows: tokenized records, in their order.

Every row starts at column 0 and ends at its length: nothing is left-padded, and no mask is ever
derived from the padding token, which is often also the end of sequence.
"""

import bisect
import collections
import dataclasses
import datetime
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from promptkd_jax.data.conversations import (
    Conversation,
    shorter_histories,
    tokenize_conversations,
)
from promptkd_jax.data.reading.records import Record
from promptkd_jax.data.special_tokens import encode, unknown_token
from promptkd_jax.data.templates import PromptFormat, shows_date
from promptkd_jax.infra.errors import DataError, Faults
from promptkd_jax.infra.provenance import fingerprint_rows

T = TypeVar("T")

SUPERVISE = {
    "last": "the last one",
    "all": "all of them, in a row that is the whole conversation",
    "each": "all of them, each in a row of its own behind the turns before it",
}
LONG_PROMPTS = {
    "drop": "the record is left out",
    "cut": "as few turns as will do are left out at its beginning, not a system turn; the record, "
    "if its last turn is too long",
}


class Rows(NamedTuple):
    """Tokenised records, in their order, without those whose prompt is too long."""

    tokens: Sequence[np.ndarray]  # int32: prompt, response, end of sequence
    prompt_lengths: np.ndarray  # int32, one per row
    records: Sequence[Record]  # () where only the tokens are kept, see `mapped_rows`
    dropped: int
    cut: int = 0  # responses without their end, and so without an end of sequence
    date: str = ""  # that the prompts were rendered with, "" where the template shows none
    # bool, for each row which of its tokens a student learns from; None: those of the response.
    supervised: Sequence[np.ndarray] | None = None
    shortened: int = 0  # prompts without their first turns, which would have been too long
    left_out: Mapping[str, int] = {}  # when records were read: see `reading.RecordStream`
    # How many rows are of each source, one behind the other, and the source's share of a batch; ():
    # all rows are alike.
    shares: Sequence[tuple[int, float]] = ()

    @property
    def num_supervised(self) -> np.ndarray:
        """How many tokens of each row a student learns from."""
        if self.supervised is not None:
            return np.array([row.sum() for row in self.supervised], np.int32)
        return np.array([len(row) for row in self.tokens], np.int32) - self.prompt_lengths


class RowSink(Protocol):
    """Where `tokenize` and `pack` put rows: a `RowList`, or files of `mapped_rows`."""

    def append(
        self, tokens: np.ndarray, prompt_length: int, supervised: np.ndarray, record: Record | None
    ) -> None:
        """Takes a row: its tokens, int32, and for each of them whether it is supervised."""

    def finish(self, masked: bool, **facts: Any) -> Rows:
        """Returns the rows, with these fields; `masked`: not all of each response is supervised."""


class RowList:
    """A `RowSink` in memory, which keeps the records too."""

    def __init__(self):
        self._tokens, self._prompt_lengths = [], []
        self._supervised, self._records = [], []

    def append(
        self, tokens: np.ndarray, prompt_length: int, supervised: np.ndarray, record: Record | None
    ) -> None:
        self._tokens.append(tokens)
        self._prompt_lengths.append(prompt_length)
        self._supervised.append(supervised)
        self._records.append(record)

    def finish(self, masked: bool, **facts: Any) -> Rows:
        return Rows(
            self._tokens,
            np.array(self._prompt_lengths, np.int32),
            self._records,
            supervised=self._supervised if masked else None,
            **facts,
        )


def tokenize(
    records: Iterable[Record],
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: PromptFormat,
    *,
    max_prompt_length: int,
    max_length: int,
    eos_id: int,
    vocab_size: int | None = None,
    supervise: str = "last",
    long_prompts: str = "drop",
    into: RowSink | None = None,
) -> Rows:
    """Tokenises records into rows: prompt, response, the token that ends it, cut to max_length.

    A response is encoded so that a prompt's tokens do not depend on it. A row that is cut has no
    end, and is counted; a record without response gives its prompt alone. A record whose prompt has
    more than max_prompt_length tokens is dropped and counted.

    Args:
      records: read once, a few at a time.
      eos_id: ends a response where the chat template does not (see `templates.turn_end`).
      vocab_size: tokens in use, as `Model.vocab_size`, so that no row has others; None: all.
      supervise: "last": a row is the last response, and all before it is its prompt; "all": all
        turns of the assistant are supervised, and the prompt is what stands before the first. For
        "each" see `conversations.one_turn_each`.
      long_prompts: key of `LONG_PROMPTS`: "drop", or "cut": first without as many turns from its
        beginning as needed.
      into: where the rows go; by default into memory.

    Raises:
      DataError: no record is left, the two lengths contradict each other; or records have no
        tokens, some that are not in use, or a template that fails: names the first ten of them.
    """
    if not 0 < max_prompt_length <= max_length:
        raise DataError(
            f"max_prompt_length {max_prompt_length} and max_length {max_length}: "
            "expected 0 < max_prompt_length <= max_length"
        )
    date = ""
    if shows_date(prompt_format.template, tokenizer):  # one for all records, also at midnight
        date = prompt_format.date or datetime.date.today().isoformat()
    prompt_format = dataclasses.replace(prompt_format, date=date)
    how = dict(prompt_format=prompt_format, tokenizer=tokenizer, eos_id=eos_id, supervise=supervise)
    cut = long_prompts == "cut"
    into, counts, lengths, masked = into or RowList(), collections.Counter(), _Range(), False
    for record, one, length in _conversations(records, max_prompt_length, cut, vocab_size, **how):
        lengths.add(length)
        if len(one.prompt) > max_prompt_length:
            counts["dropped"] += 1
            continue
        counts["shortened"] += len(one.prompt) < length
        row = np.array(one.prompt + one.response, np.int32)
        supervised = np.append(np.zeros(len(one.prompt), bool), one.supervised)
        counts["cut"] += len(row) > max_length
        counts["lacks_thinking"] += one.lacks_thinking
        masked = masked or not one.supervised.all()
        # The record stays whole, also where the prompt was shortened.
        into.append(row[:max_length], len(one.prompt), supervised[:max_length], record)
    if not lengths.count:
        raise DataError("no records to tokenise; expected at least one")
    if counts["dropped"] == lengths.count:
        raise DataError(
            f"all {lengths.count} prompts are longer than max_prompt_length {max_prompt_length}: "
            f"the shortest has {lengths.least} tokens, the longest {lengths.most}"
        )
    facts: dict[str, Any] = {name: counts[name] for name in ("dropped", "cut", "shortened")}
    if thoughtless := counts["lacks_thinking"]:
        facts["left_out"] = {"thinking that the template leaves out": thoughtless}
    return into.finish(masked, **facts, date=date)


def _conversations(
    records: Iterable[Record], longest: int, cut: bool, vocab_size: int | None, **how: Any
) -> Iterator[tuple[Record, Conversation, int]]:
    """Yields each record, its tokens, and how many its prompt has. To be `cut`, prompts of more
    than `longest` tokens are without as few of their first turns as will do; as they are where none
    will, since the last turn alone is too long.

    Raises:
      DataError: at the end, the faults of all records; from the first one on nothing is yielded.
    """
    faults, first = Faults(), 0
    how["faults"] = faults
    for some in _chunks(records, _characters):
        found = tokenize_conversations(some, first=first, **how)
        for number, (record, one) in enumerate(zip(some, found), start=first):
            length = len(one.prompt) if one else 0
            if one and not length:
                fault = "its prompt has no tokens; expected a tokenizer that has some for its text"
                faults.add(record.place or f"record {number} (from 0)", fault)
            if cut and length > longest:
                one = _shortened(record, one, longest, first=number, **how)
            if one and len(one.prompt) <= longest:
                ids = one.prompt + one.response
                if fault := unknown_token(ids, vocab_size, how["tokenizer"]):
                    faults.add(record.place or f"record {number} (from 0)", fault)
            if not faults.count:
                yield record, one, length
        first += len(some)
    faults.raise_any(getattr(records, "source", "the data"))


def _shortened(record: Record, whole: Conversation, longest: int, **how: Any) -> Conversation:
    for shorter in shorter_histories(record):
        [one] = tokenize_conversations([shorter], **how)
        if one is None or len(one.prompt) <= longest:
            learned = one and (one.supervised.any() or not whole.supervised.any())
            return one if learned else whole
    return whole


class _Range:
    """How many numbers there were, the least and the most of them."""

    def __init__(self):
        self.count, self.least, self.most = 0, math.inf, -math.inf

    def add(self, number: int) -> None:
        self.count, self.least = self.count + 1, min(self.least, number)
        self.most = max(self.most, number)


def _characters(record: Record) -> int:
    """The characters that are tokenised at once for a record: every turn is once for each response
    behind it, at most."""
    said = sum(len(str(turn.get("content"))) for turn in record.messages)
    return said * len(record.messages)


def _chunks(items: Iterable[T], size: Callable[[T], int]) -> Iterator[list[T]]:
    """A few at a time, of about a million characters: the encodings of texts take a hundred times
    the memory of their tokens."""
    some, held = [], 0
    for item in items:
        some.append(item)
        held += size(item)
        if held >= 1_000_000 or len(some) == 1000:
            yield some
            some, held = [], 0
    if some:
        yield some


def pack(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    eos_id: int,
    into: RowSink | None = None,
    vocab_size: int | None = None,
) -> Rows:
    """Documents, each with its end of sequence, one after the other, cut into rows of `length`.

    Every token but a row's first counts as its response. What is left at the end makes no row.

    Args:
      texts: read once, a few at a time.
      vocab_size: as `tokenize` takes it.
      into: where the rows go; by default into memory.

    Raises:
      DataError: there is not enough text for one row, or a text has a token that is not in use.
    """
    into, rest, count = into or RowList(), np.zeros(0, np.int32), 0
    supervised = np.arange(length) > 0
    for some in _chunks(texts, len):
        encoded = encode(some, tokenizer)
        for text, ids in zip(some, encoded):
            if fault := unknown_token(ids, vocab_size, tokenizer):
                raise DataError(f"the corpus: the document that begins {text[:40]!r}: {fault}")
        parts = (np.array([*ids, eos_id], np.int32) for ids in encoded)
        stream = np.concatenate([rest, *parts])
        whole = len(stream) // length
        for row in stream[: whole * length].reshape(whole, length):
            into.append(row, 1, supervised, None)
        rest, count = stream[whole * length :], count + whole
    if not count:
        raise DataError(f"the corpus has {len(rest)} tokens, a row takes {length}")
    return into.finish(False, dropped=0)


class _Chain(Sequence[np.ndarray]):
    """Several sequences as one, which stay where they are."""

    def __init__(self, parts: Sequence[Sequence[np.ndarray]]):
        self._parts = parts
        self._ends = list(itertools.accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> np.ndarray:
        index = range(len(self))[index]
        part = bisect.bisect_right(self._ends, index)
        return self._parts[part][index - (self._ends[part - 1] if part else 0)]


def concatenate_rows(parts: Sequence[Rows], weights: Sequence[float]) -> Rows:
    """The rows of several sources, one behind the other, with the share of each in a batch."""
    if len(parts) == 1:
        return parts[0]
    tokens, supervised = [rows.tokens for rows in parts], None
    if any(rows.supervised is not None for rows in parts):
        masks = (_ResponseMasks(x) if x.supervised is None else x.supervised for x in parts)
        supervised = _Chain(list(masks))
    left_out = collections.Counter()
    for rows in parts:
        left_out.update(rows.left_out)
    return Rows(
        _Chain(tokens),
        np.concatenate([rows.prompt_lengths for rows in parts]),
        [record for rows in parts for record in rows.records],
        dropped=sum(rows.dropped for rows in parts),
        cut=sum(rows.cut for rows in parts),
        date=max(rows.date for rows in parts),
        supervised=supervised,
        shortened=sum(rows.shortened for rows in parts),
        left_out=left_out,
        shares=tuple((len(rows.tokens), weight) for rows, weight in zip(parts, weights)),
    )


class _ResponseMasks(Sequence[np.ndarray]):
    """Which tokens are supervised, where that is all of each response."""

    def __init__(self, rows: Rows):
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows.tokens)

    def __getitem__(self, index: int) -> np.ndarray:
        return np.arange(len(self._rows.tokens[index])) >= self._rows.prompt_lengths[index]


def with_responses(rows: Rows, responses: Iterable[Sequence[int]]) -> Rows:
    """The requests of the rows with these token ids as their responses, one for every row."""
    tokens = [
        np.concatenate([row[:start], np.asarray(response, np.int32)])
        for row, start, response in zip(rows.tokens, rows.prompt_lengths, responses, strict=True)
    ]
    return rows._replace(tokens=tokens, supervised=None)


def select_rows(rows: Rows, indices: Sequence[int]) -> Rows:
    """The rows at these indices, in their order; one may stand there twice. Those of several
    sources have to stay one source behind the other."""
    ends = list(itertools.accumulate(count for count, _ in rows.shares))
    counts = np.diff(np.searchsorted(indices, [0, *ends]))
    if rows.shares and np.any(np.diff(indices) < 0):
        raise ValueError("rows of several sources: expected indices in ascending order")
    return rows._replace(
        shares=tuple((int(count), share) for count, (_, share) in zip(counts, rows.shares)),
        tokens=[rows.tokens[index] for index in indices],
        prompt_lengths=rows.prompt_lengths[np.asarray(indices, np.int32)],
        records=rows.records and [rows.records[index] for index in indices],
        supervised=rows.supervised and [rows.supervised[index] for index in indices],
    )


def fingerprint_records(rows: Rows) -> str:
    """`fingerprint_supervised`, and all references."""
    references = json.dumps([record.references for record in rows.records]).encode()
    digest = hashlib.sha256(references).hexdigest()[:16]
    return f"{fingerprint_supervised(rows)}, references {digest}"


def fingerprint_supervised(rows: Rows) -> str:
    """`fingerprint_rows` with where each prompt ends, and which tokens are supervised."""

    def marked() -> Iterator[np.ndarray]:
        masks = itertools.repeat(None) if rows.supervised is None else rows.supervised
        for start, row, mask in zip(rows.prompt_lengths, rows.tokens, masks):
            places = [] if mask is None else [np.flatnonzero(mask)]
            yield np.concatenate([[start], row, *places])

    return fingerprint_rows(marked())
