"""Rows: tokenized records, in their order.

Every row starts at column 0 and ends at its length: nothing is left-padded, and no mask is ever
derived from the padding token, which is often also the end of sequence.
"""

import dataclasses
import datetime
import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from promptkd_jax.data.conversations import (
    has_several_responses,
    shorter_histories,
    tokenize_last,
    tokenize_whole,
)
from promptkd_jax.data.records import Record
from promptkd_jax.data.special_tokens import encode
from promptkd_jax.data.templates import PromptFormat, prompt_tokens, render_prompt, shows_date
from promptkd_jax.infra.errors import DataError
from promptkd_jax.infra.provenance import fingerprint_rows

SUPERVISE = {"last": "the last one", "all": "all of them, in a row that is the whole conversation"}
LONG_PROMPTS = {
    "drop": "the record is left out",
    "cut": "as few turns as will do are left out at its beginning, not a system turn; the record, "
    "if its last turn is too long",
}


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
    shortened: int = 0  # prompts without their first turns, which would have been too long
    left_out: Mapping[str, int] = {}  # when records were read: see `reading.Records`

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
    supervise: str = "last",
    long_prompts: str = "drop",
) -> Rows:
    """Tokenises records into rows: prompt, response, the token that ends it, cut to max_length.

    A response is encoded so that a prompt's tokens do not depend on it. A row that is cut has no
    end, and is counted; a record without response gives its prompt alone. A record whose prompt has
    more than max_prompt_length tokens is dropped and counted.

    Args:
      eos_id: ends a response where the chat template does not (see `templates.turn_end`).
      supervise: "last": a row is the last response, and all before it is its prompt; "all": all
        turns of the assistant are supervised, and the prompt is what stands before the first.
      long_prompts: "drop", or "cut": first without as many turns from its beginning as needed.

    Raises:
      DataError: no record is left, a prompt has no tokens, the two lengths contradict each other,
        or the template cannot be rendered, or not as `supervise` wants it.
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
    several = supervise == "all" and prompt_format.template == "chat"
    whole = {i: x for i, x in enumerate(records) if several and has_several_responses(x)}
    last = {i: record for i, record in enumerate(records) if i not in whole}
    shorter = {}
    if long_prompts == "cut":
        shorter = _shortened(last, prompt_format, tokenizer, max_prompt_length)
    found = tokenize_last(last | shorter, prompt_format, tokenizer, eos_id)
    found |= tokenize_whole(whole, prompt_format, tokenizer)
    kept = _short_enough([found[i].prompt for i in range(len(found))], max_prompt_length)
    rows = [found[i].prompt + found[i].response for i in kept]
    supervised = None
    if whole:
        masks = (np.append(np.zeros(len(found[i].prompt), bool), found[i].supervised) for i in kept)
        supervised = [mask[:max_length] for mask in masks]
    return Rows(
        tokens=[np.array(row[:max_length], np.int32) for row in rows],
        prompt_lengths=np.array([len(found[i].prompt) for i in kept], np.int32),
        records=[records[i] for i in kept],  # whole, also where the prompt was shortened
        dropped=len(records) - len(kept),
        cut=sum(len(row) > max_length for row in rows),
        date=date,
        supervised=supervised,
        shortened=len(shorter),
    )


def _shortened(
    records: Mapping[int, Record],
    prompt_format: PromptFormat,
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_length: int,
) -> dict[int, Record]:
    """Those with a prompt that is too long, without as few of its first turns as will do; a prompt
    whose last turn is too long stays as it is."""
    prompts = prompt_tokens(list(records.values()), prompt_format, tokenizer)
    long = (i for i, prompt in zip(records, prompts) if len(prompt) > max_prompt_length)
    found = {}
    for i in long:
        for shorter in shorter_histories(records[i]):
            if len(render_prompt(shorter, prompt_format, tokenizer)) <= max_prompt_length:
                found[i] = shorter
                break
    return found


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
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int, eos_id: int
) -> Rows:
    """Documents, each with its end of sequence, one after the other, cut into rows of `length`.

    Every token but a row's first counts as its response. What is left at the end makes no row.

    Raises:
      DataError: there is not enough text for one row.
    """
    texts, parts = iter(texts), [np.zeros(0, np.int32)]
    # A few documents at a time: their encodings take 40 times the memory of their tokens.
    while some := list(itertools.islice(texts, 1000)):
        for ids in encode(some, tokenizer):
            parts.append(np.array([*ids, eos_id], np.int32))
    stream = np.concatenate(parts)
    count = len(stream) // length
    if not count:
        raise DataError(f"the corpus has {len(stream)} tokens, a row takes {length}")
    tokens = stream[: count * length].reshape(count, length)
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
