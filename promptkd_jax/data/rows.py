"""Rows: tokenized records, in their order.

Every row starts at column 0 and ends at its length: nothing is left-padded, and no mask is ever
derived from the padding token, which is often also the end of sequence.
"""

import dataclasses
import datetime
import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from promptkd_jax.data.records import Record
from promptkd_jax.data.templates import PromptFormat, encode, prompt_tokens, shows_date
from promptkd_jax.infra.errors import DataError
from promptkd_jax.infra.provenance import fingerprint_rows


class Rows(NamedTuple):
    """Tokenised records, in their order, without those whose prompt is too long."""

    tokens: list[np.ndarray]  # int32: prompt, response, end of sequence
    prompt_lengths: np.ndarray  # int32, one per row
    records: list[Record]
    dropped: int
    cut: int = 0  # responses without their end, and so without an end of sequence
    date: str = ""  # that the prompts were rendered with, "" where the template shows none
    # bool, for each row which of its tokens a student learns from; None: those of the response.
    supervised: list[np.ndarray] | None = None

    @property
    def num_supervised(self) -> np.ndarray:
        """How many tokens of each row a student learns from."""
        if self.supervised is not None:
            return np.array([row.sum() for row in self.supervised], np.int32)
        return np.array([len(row) for row in self.tokens], np.int32) - self.prompt_lengths


def tokenize(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: PromptFormat,
    *,
    max_prompt_length: int,
    max_length: int,
    eos_id: int,
) -> Rows:
    """Tokenises records into rows: prompt, first output, end of sequence, cut to max_length tokens.

    The response is encoded by itself, so that a prompt's tokens do not depend on it. A row that is
    cut has no end of sequence, and is counted; a record without output gives its prompt alone. A
    record whose prompt has more than max_prompt_length tokens is dropped and counted.

    Raises:
      DataError: no record is left, a prompt has no tokens, the two lengths contradict each other,
        or the template cannot be rendered.
    """
    if not 0 < max_prompt_length <= max_length:
        raise DataError(
            f"max_prompt_length {max_prompt_length} and max_length {max_length}: "
            "expected 0 < max_prompt_length <= max_length"
        )
    if not records:
        raise DataError("no records to tokenise; expected at least one")
    date = ""
    if shows_date(prompt_format.template, tokenizer):
        # One for all records, also at midnight.
        date = prompt_format.date or datetime.date.today().isoformat()
    prompt_format = dataclasses.replace(prompt_format, date=date)
    prompts = prompt_tokens(records, prompt_format, tokenizer)
    kept = _short_enough(prompts, max_prompt_length)
    answers = encode(["".join(records[i].references[:1]) for i in kept], tokenizer)
    ends = [[*answer, eos_id] if records[i].references else [] for i, answer in zip(kept, answers)]
    rows = [prompts[i] + end for i, end in zip(kept, ends)]
    return Rows(
        tokens=[np.array(row[:max_length], np.int32) for row in rows],
        prompt_lengths=np.array([len(prompts[i]) for i in kept], np.int32),
        records=[records[i] for i in kept],
        dropped=len(records) - len(kept),
        cut=sum(len(row) > max_length for row in rows),
        date=date,
    )


def _short_enough(prompts: list[list[int]], max_prompt_length: int) -> list[int]:
    """The indices of the prompts that fit, at least one."""
    lengths = [len(prompt) for prompt in prompts]
    if min(lengths) == 0:
        raise DataError(
            f"the prompt of record {lengths.index(0)} (from 0) has no tokens; "
            "expected a tokenizer that has tokens for its text"
        )
    kept = [i for i, length in enumerate(lengths) if length <= max_prompt_length]
    if not kept:
        raise DataError(
            f"all {len(lengths)} prompts are longer than max_prompt_length {max_prompt_length}: "
            f"the shortest has {min(lengths)} tokens, the longest {max(lengths)}"
        )
    return kept


def pack(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int, eos_id: int
) -> Rows:
    """Documents, each with its end of sequence, one after the other, cut into rows of `length`.

    Every token but a row's first counts as its response. What is left at the end makes no row.

    Raises:
      DataError: there is not enough text for one row.
    """
    stream = [token for ids in encode(list(texts), tokenizer) for token in (*ids, eos_id)]
    count = len(stream) // length
    if not count:
        raise DataError(f"the corpus has {len(stream)} tokens, a row takes {length}")
    tokens = np.array(stream[: count * length], np.int32).reshape(count, length)
    return Rows(list(tokens), np.ones(count, np.int32), [Record(())] * count, dropped=0)


def with_responses(rows: Rows, responses: Iterable[Sequence[int]]) -> Rows:
    """The requests of the rows with these token ids as their responses, one for every row."""
    tokens = [
        np.concatenate([row[:start], np.asarray(response, np.int32)])
        for row, start, response in zip(rows.tokens, rows.prompt_lengths, responses, strict=True)
    ]
    return rows._replace(tokens=tokens, supervised=None)


def select_rows(rows: Rows, indices: Sequence[int]) -> Rows:
    """The rows at these indices, in their order; one may stand there twice."""
    return rows._replace(
        tokens=[rows.tokens[index] for index in indices],
        prompt_lengths=rows.prompt_lengths[np.asarray(indices, np.int32)],
        records=[rows.records[index] for index in indices],
        supervised=rows.supervised and [rows.supervised[index] for index in indices],
    )


def fingerprint_records(rows: Rows) -> str:
    """`fingerprint_supervised`, and all references."""
    references = json.dumps([record.references for record in rows.records]).encode()
    digest = hashlib.sha256(references).hexdigest()[:16]
    return f"{fingerprint_supervised(rows)}, references {digest}"


def fingerprint_supervised(rows: Rows) -> str:
    """`fingerprint_rows` with where each prompt ends, and which tokens are supervised."""
    tokens = [np.append(start, row) for start, row in zip(rows.prompt_lengths, rows.tokens)]
    for number, supervised in enumerate(rows.supervised or []):
        tokens[number] = np.append(tokens[number], np.flatnonzero(supervised))
    return fingerprint_rows(tokens)
