"""Data as models see them, before anything is trained: counts, lengths, rows, overlap, warnings.

All of it follows from rows, tokenizers and configs of models; `data_page` shows it.
"""

import dataclasses
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from promptkd_jax.data.reading.records import Record
from promptkd_jax.data.rows import Rows
from promptkd_jax.data.templates import PromptFormat
from promptkd_jax.evaluation.duplicates import Duplicate, near_duplicates
from promptkd_jax.evaluation.tables import Table
from promptkd_jax.models.model import Model

SHOWN_ROWS, SHOWN_PAIRS = 3, 5


class Split(NamedTuple):
    """The rows of a set, and how they came about."""

    name: str  # "train", "dev", or that of a test set
    rows: Rows
    prompt_format: PromptFormat
    records: Iterable[Record] | None = None  # read once, where those of the rows are not kept


class Lengths(NamedTuple):
    """Tokens of each row's "prompt", or of its "response": all that a student learns from."""

    split: str
    part: str
    tokens: np.ndarray


class Piece(NamedTuple):
    """Neighbouring tokens of one kind, as text. A special token is a piece of its own."""

    text: str
    supervised: bool
    special: bool


class ShownRow(NamedTuple):
    """A row as text, and its place (from 0) among the rows of its split."""

    split: str
    index: int
    pieces: tuple[Piece, ...]


class Pair(NamedTuple):
    """A held-out prompt, the training prompt most like it, and how like (1.0: the same words)."""

    held_out: str
    train: str
    similarity: float


class Overlap(NamedTuple):
    """How many of a split's prompts have a near-duplicate in the training data, and the pairs that
    are most alike."""

    split: str
    prompts: int
    same: int  # of the same words
    near: int  # the others
    pairs: tuple[Pair, ...]


@dataclasses.dataclass(frozen=True)
class DataReport:
    """The facts of `describe_data`.

    `counts` has a row for each split; `notes` say why rows are dropped and cut, and what else has
    to be known to read them.
    """

    counts: Table
    notes: tuple[str, ...]
    lengths: tuple[Lengths, ...]
    rows: tuple[ShownRow, ...]
    overlaps: tuple[Overlap, ...]
    warnings: tuple[str, ...]


def describe_data(
    train: Sequence[Split],
    held_out: Sequence[Split],
    student: Model,
    teacher: Model | None = None,
    *,
    max_prompt_length: int,
    max_length: int,
    trained_formats: Mapping[str, PromptFormat] = {},
    notes: Sequence[str] = (),
    compared: int | None = None,
) -> DataReport:
    """Describes the data of a run.

    Near-duplicates of the held-out prompts are looked for in those of the first of `train`, see
    `near_duplicates`; system turns do not count.

    Args:
      train: the rows to learn from; more than one have the same prompts, with other responses.
      held_out: dev and test sets.
      student: whose tokenizer and EOS the rows are of; its parameters are not looked at, nor are
        those of `teacher`.
      max_prompt_length, max_length: the limits, in tokens, that the rows were made with.
      trained_formats: how models were asked while they were trained, by their names.
      notes: to be shown beside the counts.
      compared: how many training prompts are looked at for near-duplicates; None: all.
    """
    splits = [*train, *held_out]
    models = [student] if teacher is None else [student, teacher]
    found = [
        *_beyond_positions(splits, models),
        *_never_ending(splits, student),
        *_other_formats(splits, trained_formats, student, teacher),
    ]
    overlaps = _overlaps(train[0], held_out, compared) if train else ()
    if train and compared and len(train[0].rows.tokens) > compared:
        notes = (*notes, f"Near-duplicates: among the first {compared:,} training prompts.")
    for overlap in overlaps:
        if overlap.same or overlap.near:
            found.append(
                f"{overlap.split}: {overlap.same + overlap.near} of {overlap.prompts} prompts are "
                f"in the training data, {overlap.same} of them in the same words: scores on them "
                "do not show what a student makes of new ones"
            )
    return DataReport(
        counts=_counts(splits, student.eos_ids),
        notes=(
            f"Dropped: prompts of more than {max_prompt_length} tokens. Cut: responses that end "
            f"beyond {max_length} tokens of prompt and response.",
            *notes,
        ),
        lengths=tuple(one for split in splits for one in _lengths(split)),
        rows=tuple(_shown_rows((train or held_out)[0], student.tokenizer)),
        overlaps=overlaps,
        warnings=tuple(found),
    )


def _counts(splits: Sequence[Split], eos_ids: Collection[int]) -> Table:
    # Beside what rows always have: prompts that were shortened, what reading has left out.
    others = [_others(split.rows) for split in splits]
    reasons = list(dict.fromkeys(reason for counts in others for reason in counts))
    header = ("set", "records", "dropped", "rows", "with a response", "cut", "ending with EOS")
    rows = []
    for (name, rows_of, *_), counts in zip(splits, others):
        count, responses = len(rows_of.tokens), rows_of.num_supervised
        ended = sum(int(row[-1]) in eos_ids for row in _answered(rows_of))
        numbers = (count + rows_of.dropped, rows_of.dropped, count, int((responses > 0).sum()))
        numbers += (rows_of.cut, ended, *(counts.get(reason, 0) for reason in reasons))
        rows.append((name, *(f"{number:,}" for number in numbers)))
    return Table((*header, *reasons), rows)


def _others(rows: Rows) -> dict[str, int]:
    shortened = {"prompt shortened": rows.shortened} if rows.shortened else {}
    return shortened | dict(rows.left_out)


def _answered(rows: Rows) -> list[np.ndarray]:
    """The tokens of the rows that have a response."""
    return [row for row, number in zip(rows.tokens, rows.num_supervised) if number]


def _lengths(split: Split) -> Iterator[Lengths]:
    whole = np.array([len(row) for row in split.rows.tokens], np.int32)
    responses = split.rows.num_supervised
    yield Lengths(split.name, "prompt", whole - responses)
    if responses.any():
        yield Lengths(split.name, "response", responses)


def _shown_rows(split: Split, tokenizer: PreTrainedTokenizerBase) -> Iterator[ShownRow]:
    """The first row, the last, and one halfway."""
    rows = split.rows
    special = {t for t, added in tokenizer.added_tokens_decoder.items() if added.special}
    special |= set(tokenizer.all_special_ids)
    places = np.linspace(0, len(rows.tokens) - 1, min(SHOWN_ROWS, len(rows.tokens)))
    for place in map(int, places):
        ids = rows.tokens[place]
        supervised = np.arange(len(ids)) >= rows.prompt_lengths[place]
        if rows.supervised is not None:
            supervised = rows.supervised[place]
        yield ShownRow(split.name, place, _pieces(ids, supervised, tokenizer, special))


def _pieces(
    ids: np.ndarray,
    supervised: np.ndarray,
    tokenizer: PreTrainedTokenizerBase,
    special: Collection[int],
) -> tuple[Piece, ...]:
    kinds = [(bool(learned), int(token) in special) for learned, token in zip(supervised, ids)]
    pieces, start, before = [], 0, ""
    for end in range(1, len(ids) + 1):
        if end < len(ids) and kinds[end] == kinds[start] and not kinds[start][1]:
            continue
        # Decoded with what stands before, without which some tokenizers drop a space.
        text = tokenizer.decode(ids[:end], skip_special_tokens=False)
        alone = text.removeprefix(before)
        if not text.startswith(before):
            alone = tokenizer.decode(ids[start:end], skip_special_tokens=False)
        pieces.append(Piece(_visible(alone), *kinds[start]))
        start, before = end, text
    return tuple(pieces)


def _visible(text: str) -> str:
    """The text with control characters as escapes: a terminal would obey them."""
    return "".join(c if c.isprintable() or c in "\n\t\u3000" else repr(c)[1:-1] for c in text)


# Overlap


def _overlaps(train: Split, held_out: Sequence[Split], compared: int | None) -> tuple[Overlap, ...]:
    """What each held-out set has in common with the first `compared` training prompts, which are
    read once."""
    asked = [[_asked(record) for record in split.rows.records] for split in held_out]
    records = train.rows.records if train.records is None else train.records
    prompts = map(_asked, itertools.islice(records, compared))
    starts = [0, *itertools.accumulate(map(len, asked))]
    found = near_duplicates(prompts, list(itertools.chain(*asked))) if starts[-1] else []
    return tuple(
        _overlap(
            split.name,
            texts,
            [
                one._replace(held_out=one.held_out - start)
                for one in found
                if start <= one.held_out < start + len(texts)
            ],
        )
        for split, texts, start in zip(held_out, asked, starts)
    )


def _overlap(name: str, asked: Sequence[str], found: Sequence[Duplicate]) -> Overlap:
    same = sum(one.similarity == 1.0 for one in found)
    most_alike = sorted(found, key=lambda one: -one.similarity)[:SHOWN_PAIRS]
    pairs = (
        Pair(_visible(asked[one.held_out]), _visible(one.text), one.similarity)
        for one in most_alike
    )
    return Overlap(name, len(asked), same, len(found) - same, tuple(pairs))


def _asked(record: Record) -> str:
    """The text of a prompt, without the system turn that many may share."""
    turns = (turn for turn in record.prompt if turn["role"] != "system")
    return "\n".join(str(turn.get("content") or "") for turn in turns)


# Warnings


def _beyond_positions(splits: Sequence[Split], models: Sequence[Model]) -> Iterator[str]:
    for model in models:
        decoder = model.decoder.config
        for name, rows, *_ in splits:
            lengths = np.array([len(row) for row in rows.tokens])
            if beyond := int((lengths > decoder.trained_positions).sum()):
                kind = "has" if decoder.learned_positions else "was trained for"
                yield (
                    f"{name}: {beyond} of {len(lengths)} rows have more tokens, up to "
                    f"{max(lengths)}, than the {decoder.trained_positions} positions that "
                    f"{model.name} {kind}; expected a lower max_length"
                )


def _never_ending(splits: Sequence[Split], student: Model) -> Iterator[str]:
    ends = " or ".join(student.tokenizer.convert_ids_to_tokens(list(student.eos_ids)))
    for name, rows, *_ in splits:
        answered = _answered(rows)
        if answered and not any(int(row[-1]) in student.eos_ids for row in answered):
            yield (
                f"{name}: none of {len(answered)} rows with a response ends with the end of "
                f"sequence ({ends}), from which a student learns to stop; {rows.cut} are cut: "
                "expected a higher max_length, or shorter responses"
            )


def _other_formats(
    splits: Sequence[Split],
    trained_formats: Mapping[str, PromptFormat],
    student: Model,
    teacher: Model | None,
) -> Iterator[str]:
    first = splits[0]
    for split in splits[1:]:
        if split.prompt_format.identity != first.prompt_format.identity:
            yield (
                f"{split.name}: its prompts are made by {_said(split.prompt_format)}, those of "
                f"{first.name} by {_said(first.prompt_format)}; expected one for both"
            )
    for name, trained in trained_formats.items():
        if trained.identity != first.prompt_format.identity:
            yield (
                f"{first.name}: its prompts are made by {_said(first.prompt_format)}, and {name} "
                f"was trained with {_said(trained)}"
            )
    if teacher and first.prompt_format.template == "chat":
        theirs, ours = (model.tokenizer.chat_template for model in (teacher, student))
        if theirs and theirs != ours:
            yield (
                f"{first.name}: its prompts are made by the chat template of {student.name}, and "
                f"{teacher.name} has another"
            )


def _said(prompt_format: PromptFormat) -> str:
    template, *rest = prompt_format.identity.items()
    more = "".join(f", {name} {value!r}" for name, value in rest)
    return f"template {template[1]!r}{more}"
