"""Records → templates → token rows → batches, with a position that a checkpoint can hold.

Every row starts at column 0 and ends at its length: nothing is left-padded, and no mask is ever
derived from the padding token, which is often also the end of sequence. The position of a run in
its data is one integer, the index of the next batch; it is global, so that the number of hosts and
devices may change between a save and a restore.
"""

import datetime
import json
import string
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import grain
import numpy as np
from etils import epath
from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from promptkd_jax.data.batch import Batch
from promptkd_jax.infra.files import address_fault, failures, is_remote, to_path

if TYPE_CHECKING:
    from promptkd_jax.offline import Cached


class DataError(ValueError):
    """Data that cannot be used as it is: says where, what was found and what would be right."""


class Record(NamedTuple):
    """One example: what is asked, the text it is asked about, and the reference answers."""

    instruction: str
    input: str  # "" where there is none
    outputs: tuple[str, ...]  # () where no answer is given


class Rows(NamedTuple):
    """Tokenised records, in their order, without those whose prompt is too long."""

    tokens: list[np.ndarray]  # int32: prompt, response, end of sequence
    prompt_lengths: np.ndarray  # int32, one per row
    records: list[Record]
    dropped: int
    cut: int = 0  # responses without their end, and so without an end of sequence
    date: str = ""  # that the prompts were rendered with, "" where the template shows none


# Records

_PACKAGE = "package:"
_SYNTHETIC = "synthetic:"
_DOCUMENT = '{"text": "…"}'
_EXAMPLE = '{"instruction": "…", "input": "…", "output": "…"}'


def read_records(source: str, *, split: str = "train", need_output: bool) -> list[Record]:
    """Reads records from a JSON lines file, a file of this package, or the Hugging Face hub.

    A record has `instruction`, and may have `input` (or `context`) and `output` (or `response`),
    the last a string or a list of references. Null or empty means not given. Blank lines of a file
    are skipped.

    Args:
      source: a file that exists, or a name ending in .jsonl; "package:NAME" for a file in
        promptkd_jax/prompts; "synthetic:NAME" for generated ones (see `synthetic`); anything else
        is a hub id, or a folder laid out like a hub data set.
      split: the split of a hub data set; a file has none.
      need_output: whether every record must have an answer.

    Raises:
      DataError: names file:line, or data set and row (from 0), the fault and what would be right.
    """
    if source.startswith(_SYNTHETIC):
        from promptkd_jax import synthetic  # it builds on this module

        return synthetic.records(source.removeprefix(_SYNTHETIC))
    path = _find_file(source)
    located = _read_hub(source, split) if path is None else _read_lines(path, source)
    records = [_to_record(fields, where, need_output) for where, fields in located]
    if not records:
        raise DataError(f"{source}: no records; expected at least one like {_EXAMPLE}")
    return records


def _find_file(source: str) -> epath.Path | Traversable | None:
    """The file that `source` means, None if it means a hub data set."""
    if source.startswith(_PACKAGE):
        return _find_package_file(source)
    path = to_path(source)
    if fault := address_fault(source):
        raise DataError(f"{source} is not {fault}")
    try:
        if path.is_file():
            return path
    except failures(source) as error:
        raise DataError(f"{source}: cannot be read: {error}") from error
    if path.suffix in (".jsonl", ".txt") or is_remote(source):
        raise DataError(f"{source}: no such file (looked from {Path.cwd()})")
    return None


def _find_package_file(source: str) -> Traversable:
    folder = resources.files("promptkd_jax") / "prompts"
    files = {file.name: file for file in folder.iterdir()} if folder.is_dir() else {}
    name = source.removeprefix(_PACKAGE)
    if name not in files:
        raise DataError(f"{source}: promptkd_jax/prompts has no {name!r}; it has {sorted(files)}")
    return files[name]


def _read_lines(path: epath.Path | Traversable, source: str) -> Iterator[tuple[str, object]]:
    with path.open("rb") as file:  # as bytes, so that a bad one is found on its line
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{source}:{number}"
                yield where, _parse_line(line.rstrip(), where)


def _parse_line(line: bytes, where: str) -> object:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: byte {error.start + 1} of the line is not UTF-8; save the file as UTF-8"
        ) from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: broken JSON at column {error.colno} ({error.msg}); "
            f"every line is one object like {_EXAMPLE}"
        ) from error


def _read_hub(source: str, split: str) -> Iterator[tuple[str, object]]:
    import datasets  # takes a second to import, and a run on local files needs none of it

    failures = (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError)
    try:
        rows = datasets.load_dataset(source, split=split)
    except failures as error:
        raise DataError(
            f"{source}: no such file, and reading split {split!r} of a Hugging Face data set of "
            f"this name failed: {error}"
        ) from error
    for number, fields in enumerate(rows):
        yield f"{source} (split {split!r}) row {number}", fields


def _to_record(fields: object, where: str, need_output: bool) -> Record:
    if not isinstance(fields, dict):
        raise DataError(f"{where}: found {_shown(fields)}, expected an object like {_EXAMPLE}")
    name, instruction = _pick(fields, ("instruction",), where)
    if instruction is None:
        raise DataError(_missing(fields, name, where))
    if not _text(instruction, name, where).strip():
        raise DataError(f"{where}: field 'instruction' is empty; say what is asked")
    name, context = _pick(fields, ("input", "context"), where)
    context = "" if context is None else _text(context, name, where)
    context = context if context.strip() else ""  # blanks are no input
    return Record(instruction, context, _outputs(fields, where, need_output))


def _outputs(fields: dict, where: str, need_output: bool) -> tuple[str, ...]:
    name, given = _pick(fields, ("output", "response"), where)
    if given is None and need_output:
        raise DataError(_missing(fields, name, where))
    blank = given == [] or (isinstance(given, str) and not given.strip())
    if given is None or (blank and not need_output):
        return ()
    if isinstance(given, str):
        return (_answer(given, name, where),)
    if not isinstance(given, list):
        expected = "expected a string or a list of strings"
        raise DataError(f"{where}: field {name!r} is {_shown(given)}, {expected}")
    if not given:
        raise DataError(f"{where}: field {name!r} is an empty list; give at least one reference")
    return tuple(_answer(text, f"{name}[{i}]", where) for i, text in enumerate(given))


def _answer(value: object, name: str, where: str) -> str:
    answer = _text(value, name, where)
    if not answer.strip():
        raise DataError(f"{where}: field {name!r} is empty; give an answer or remove the record")
    return answer


def _pick(fields: dict, names: tuple[str, ...], where: str) -> tuple[str, object]:
    """The one of `names` that is given, and its value; the first name and None if none is."""
    given = [name for name in names if fields.get(name) is not None]
    if len(given) > 1:
        both = " and ".join(map(repr, given))
        raise DataError(f"{where}: fields {both} mean the same; keep one of them")
    name = given[0] if given else names[0]
    return name, fields.get(name)


def _text(value: object, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: field {name!r} is {_shown(value)}, expected a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # the tokenizer would fail on it, naming no line
        raise DataError(
            f"{where}: field {name!r} has half a surrogate pair at character {error.start + 1}; "
            "write the whole character"
        ) from error
    return value


def _missing(fields: dict, name: str, where: str) -> str:
    found = ", ".join(map(repr, fields)) or "none"
    return f"{where}: field {name!r} is missing or null (has: {found}); expected {_EXAMPLE}"


def _shown(value: object) -> str:
    return f"{type(value).__name__} {repr(value)[:60]}"


# Templates


def _alpaca(record: Record, tokenizer: PreTrainedTokenizerBase, date: str) -> str:
    """The prompt of Stanford Alpaca, ending in a newline as in the MiniLLM experiments."""
    task = "Below is an instruction that describes a task"
    if record.input:
        task += ", paired with an input that provides further context"
    context = f"### Input:\n{record.input}\n\n" if record.input else ""
    return (
        f"{task}. Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{record.instruction}\n\n{context}### Response:\n"
    )


def _chat(record: Record, tokenizer: PreTrainedTokenizerBase, date: str) -> str:
    """One user turn and the opening of the answer, in the model's own chat format."""
    name, clock = tokenizer.name_or_path or type(tokenizer).__name__, _stopped_clock(date)
    if not tokenizer.chat_template:
        raise DataError(
            f"template 'chat': tokenizer {name} has no chat template; use 'alpaca' or 'plain'"
        )
    turn = {"role": "user", "content": _request(record)}
    try:
        return tokenizer.apply_chat_template(
            [turn],
            chat_template=clock + tokenizer.get_chat_template(),
            add_generation_prompt=True,
            tokenize=False,
        )
    except (TemplateError, TypeError, ValueError) as error:  # what expressions in it raise, too
        line = f"line {error.lineno}: " if isinstance(error, TemplateSyntaxError) else ""
        raise DataError(
            f"template 'chat': that of tokenizer {name} cannot be rendered for one user turn: "
            f"{line}{error}; mend its chat template, or use 'alpaca' or 'plain'"
        ) from error


def _stopped_clock(date: str) -> str:
    """A macro in place of the clock that transformers gives to templates, by which a run that
    continues on another day would be another one; transformers passes on no function of ours."""
    if not date:
        return ""
    day = datetime.datetime.fromisoformat(date)
    codes = [f"%{flag}{letter}" for flag in ("-", "") for letter in string.ascii_letters]
    values = {code: day.strftime(code) for code in codes}
    shown = "".join(f"|replace('{code}', '{v}')" for code, v in values.items() if "%" not in v)
    return (
        f"{{%- macro {_CLOCK}(format) -%}}{{%- set shown = format{shown} -%}}"
        "{%- if '%' in shown -%}{{ raise_exception('no such date: ' ~ shown) }}{%- endif -%}"
        "{{ shown }}{%- endmacro -%}"
    )


def _plain(record: Record, tokenizer: PreTrainedTokenizerBase, date: str) -> str:
    return _request(record) + "\n"


def _request(record: Record) -> str:
    return f"{record.instruction}\n{record.input}" if record.input else record.instruction


def shows_date(template: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether prompts depend on the day on which they are rendered."""
    return template == "chat" and _CLOCK in str(tokenizer.chat_template)


_CLOCK = "strftime_now"
TEMPLATES: dict[str, Callable[[Record, PreTrainedTokenizerBase, str], str]] = {
    "alpaca": _alpaca,
    "chat": _chat,
    "plain": _plain,
}


def render_prompt(
    record: Record, template: str, tokenizer: PreTrainedTokenizerBase, date: str = ""
) -> list[int]:
    """The tokens of a record's prompt; special tokens only where the template writes them.

    Args:
      record: its instruction and input make the prompt.
      template: "alpaca" (the published Alpaca text, with or without input), "chat" (one user turn
        and the generation prompt, in the tokenizer's chat template) or "plain" (the instruction,
        and the input on the next line; the response stands on a line of its own).
      tokenizer: the model's own.
      date: such as "2026-11-27", for a chat template that shows one; "": today.

    Raises:
      DataError: the template is unknown, or "chat" for a tokenizer without a chat template, or with
        one that cannot be rendered.
    """
    return _prompts([record], template, tokenizer, date)[0]


def _prompts(
    records: Sequence[Record], template: str, tokenizer: PreTrainedTokenizerBase, date: str
) -> list[list[int]]:
    if template not in TEMPLATES:
        raise DataError(f"unknown template {template!r}; there are {', '.join(TEMPLATES)}")
    render = TEMPLATES[template]
    return _encode([render(record, tokenizer, date) for record in records], tokenizer)


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """All texts in one call, which is what lets a fast tokenizer use its threads."""
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        verbose=False,  # no warning about texts beyond the model's length: they are cut or dropped
    )
    return encoded["input_ids"]


# Token rows


def tokenize(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str,
    max_prompt_length: int,
    max_length: int,
    eos_id: int,
    date: str = "",
) -> Rows:
    """Tokenises records into rows: prompt, first output, end of sequence, cut to max_length tokens.

    The response is encoded by itself, so that a prompt's tokens do not depend on it. A row that is
    cut has no end of sequence, and is counted; a record without output gives its prompt alone. A
    record whose prompt has more than max_prompt_length tokens is dropped and counted.

    Args:
      template, date: as `render_prompt` takes them.

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
    today = date or datetime.date.today().isoformat()  # one for all records, also at midnight
    date = today if shows_date(template, tokenizer) else ""
    prompts = _prompts(records, template, tokenizer, date)
    kept = _short_enough(prompts, max_prompt_length)
    answers = _encode(["".join(records[i].outputs[:1]) for i in kept], tokenizer)
    ends = [[*answer, eos_id] if records[i].outputs else [] for i, answer in zip(kept, answers)]
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


def read_corpus(source: str, *, split: str = "train") -> list[str]:
    """Documents of plain text: the lines of a .txt file, the field `text` of a JSON lines file, or
    of a hub data set.

    Raises:
      DataError: as `read_records`.
    """
    path = _find_file(source)
    if path is not None and source.endswith(".txt"):
        texts = [line.strip() for line in path.read_bytes().decode().splitlines()]
    else:
        located = _read_hub(source, split) if path is None else _read_lines(path, source)
        texts = [_document(fields, where) for where, fields in located]
    if not any(texts):
        raise DataError(f"{source}: no text; expected documents such as {_DOCUMENT}")
    return [text for text in texts if text]


def _document(fields: object, where: str) -> str:
    if not isinstance(fields, dict) or "text" not in fields:
        raise DataError(f"{where}: found {_shown(fields)}, expected an object like {_DOCUMENT}")
    return _text(fields["text"], "text", where)


def pack(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int, eos_id: int
) -> Rows:
    """Documents, each with its end of sequence, one after the other, cut into rows of `length`.

    Every token but a row's first counts as its response. What is left at the end makes no row.

    Raises:
      DataError: there is not enough text for one row.
    """
    stream = [token for ids in _encode(list(texts), tokenizer) for token in (*ids, eos_id)]
    count = len(stream) // length
    if not count:
        raise DataError(f"the corpus has {len(stream)} tokens, a row takes {length}")
    tokens = np.array(stream[: count * length], np.int32).reshape(count, length)
    return Rows(list(tokens), np.ones(count, np.int32), [Record("", "", ())] * count, dropped=0)


# Batches


def collate(rows: Rows, indices: Sequence[int], *, length: int, pad_id: int = 0) -> Batch:
    """The rows at `indices` as one batch of width T = length: each from column 0, then pad_id.

    Raises:
      DataError: a row is longer than `length`.
    """
    tokens = np.full((len(indices), length), pad_id, np.int32)
    lengths = np.array([len(rows.tokens[i]) for i in indices], np.int32)
    for b, i in enumerate(indices):
        if lengths[b] > length:
            raise DataError(
                f"row {i} has {lengths[b]} tokens, the batch has room for {length}; "
                "expected length >= the max_length given to tokenize"
            )
        tokens[b, : lengths[b]] = rows.tokens[i]
    return Batch(tokens, rows.prompt_lengths[np.asarray(indices)], lengths)


def train_batches(
    rows: Rows,
    *,
    batch_size: int,
    length: int,
    seed: int,
    cached: "Cached | None" = None,
    capacity: int | None = None,
) -> grain.MapDataset:
    """An endless data set: element i is the Batch of step i, a pure function of (rows, seed, i).

    An epoch is len(rows.tokens) // batch_size batches; each is shuffled anew over all rows, and
    leaves out the remainder.

    Args:
      cached: what the teacher wrote down about these rows, to go with each batch.
      capacity: R, the response positions of a batch; for `cached`, and as large as the longest
        response where it is not given.

    Raises:
      DataError: there are fewer rows than batch_size, or a row is longer than `length` or than
        `capacity`.
    """
    count = len(rows.tokens)
    if batch_size > count:
        raise DataError(
            f"batch_size {batch_size} is larger than the {count} rows ({rows.dropped} records "
            f"were dropped for long prompts); expected at most {count}"
        )
    responses = [len(row) - prompt for row, prompt in zip(rows.tokens, rows.prompt_lengths)]
    capacity = capacity or max(responses)

    def make(indices: Sequence[int]) -> Batch:
        batch = collate(rows, indices, length=length)
        if cached is None:
            return batch
        return batch._replace(cached=cached.rows(indices, capacity))

    for lengths in (list(map(len, rows.tokens)), responses):
        make([int(np.argmax(lengths))])  # a row that is too long stops the run here
    # Grain shuffles epoch e with seed + e: unspread, epoch 1 of seed 0 would be epoch 0 of seed 1.
    spread_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    batches = (
        grain.MapDataset.range(count)
        .shuffle(spread_seed)
        .batch(batch_size, drop_remainder=True, batch_fn=make)
    )
    return batches.repeat()


def stream(dataset: grain.MapDataset, start: int) -> Iterator[Batch]:
    """Yields dataset[start], dataset[start + 1], …, preparing the next few in a thread.

    However far it has read ahead, the position to save is the index of the next batch to train on:
    start plus the number of batches taken.

    Raises:
      IndexError: `start` is negative or past the end of the data set.
    """
    # One thread: the rows are in memory, more would only compete for the interpreter.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    batches = iter(dataset.to_iter_dataset(options))
    batches.set_state({"next_index": start})
    return batches


def eval_batches(rows: Rows, *, batch_size: int, length: int) -> Iterator[tuple[Batch, int]]:
    """Yields all rows in order, in batches of one shape, each with how many of its rows are real.

    The last batch is filled up by repeating the last row.

    Raises:
      DataError: a row is longer than `length`.
    """
    count = len(rows.tokens)
    for start in range(0, count, batch_size):
        indices = np.minimum(np.arange(start, start + batch_size), count - 1)
        yield collate(rows, indices, length=length), min(batch_size, count - start)


def with_responses(rows: Rows, responses: Iterable[Sequence[int]]) -> Rows:
    """The requests of the rows with these token ids as their responses, one for every row."""
    tokens = [
        np.concatenate([row[:start], np.asarray(response, np.int32)])
        for row, start, response in zip(rows.tokens, rows.prompt_lengths, responses, strict=True)
    ]
    return rows._replace(tokens=tokens)


def select_rows(rows: Rows, indices: Sequence[int]) -> Rows:
    """The rows at these indices, in their order; one may stand there twice."""
    return rows._replace(
        tokens=[rows.tokens[index] for index in indices],
        prompt_lengths=rows.prompt_lengths[np.asarray(indices, np.int32)],
        records=[rows.records[index] for index in indices],
    )
