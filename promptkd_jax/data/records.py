"""Records: examples of a JSON lines file, of this package, or of the Hugging Face hub."""

import json
from collections.abc import Iterator, Mapping
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from promptkd_jax.infra.errors import DataError
from promptkd_jax.infra.files import address_fault, io_errors, is_remote, to_path

Message = Mapping[str, Any]  # {"role": "user", "content": "…"}, and what else a template reads


class Record(NamedTuple):
    """One example: a conversation, and what is right as its last response.

    Attributes:
      messages: the turns, of the roles system, user, assistant and tool, as chat templates take
        them. Where the last one is an assistant's, it is the gold response.
      references: texts that are right as that response, the gold one first; () where no response is
        given.
      extra: what the data say beside, by their names for it.
    """

    messages: tuple[Message, ...]
    references: tuple[str, ...] = ()
    extra: Mapping[str, Any] = {}

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The conversation up to the response."""
        answered = self.messages and self.messages[-1]["role"] == "assistant"
        return self.messages[:-1] if answered else self.messages

    def answered(self, text: str) -> "Record":
        """The same prompt with this text as its response."""
        turn = {"role": "assistant", "content": text}
        return self._replace(messages=(*self.prompt, turn), references=(text,))

    @property
    def prompt_text(self) -> str:
        """The prompt for people: the text of a single turn as it is, else each turn by its role."""
        if len(self.prompt) == 1:
            return self.prompt[0]["content"]
        return "\n".join(f"{turn['role']}: {turn.get('content') or ''}" for turn in self.prompt)


def user_record(text: str, references: tuple[str, ...] = (), **extra: Any) -> Record:
    """Returns the record of a single turn, answered by the first of the references, if any."""
    turns = ({"role": "user", "content": text},)
    gold = tuple({"role": "assistant", "content": text} for text in references[:1])
    return Record(turns + gold, references, extra)


ASSETS = {"package:": "data/assets", "synthetic:": "data/assets/synthetic"}
_DOCUMENT = '{"text": "…"}'
_EXAMPLE = '{"instruction": "…", "input": "…", "output": "…"}'


def read_records(source: str, *, split: str = "train", need_output: bool) -> list[Record]:
    """Reads records from a JSON lines file, a file of this package, or the Hugging Face hub.

    A record has `instruction`, and may have `input` (or `context`) and `output` (or `response`),
    the last a string or a list of references. Null or empty means not given. Blank lines of a file
    are skipped.

    Args:
      source: a file that exists, or a name ending in .jsonl; "package:NAME" for a file in
        promptkd_jax/data/assets; "synthetic:NAME" for one of the texts of a small grammar there
        ("train", "dev", "test" or "longer"); anything else
        is a hub id, or a folder laid out like a hub data set.
      split: the split of a hub data set; a file has none.
      need_output: whether every record must have an answer.

    Raises:
      DataError: names file:line, or data set and row (from 0), the fault and what would be right.
    """
    path = _find_file(source)
    located = _read_hub(source, split) if path is None else _read_lines(path, source)
    records = [_to_record(fields, where, need_output) for where, fields in located]
    if not records:
        raise DataError(f"{source}: no records; expected at least one like {_EXAMPLE}")
    return records


def _find_file(source: str) -> epath.Path | Traversable | None:
    """The file that `source` means, None if it means a hub data set."""
    for prefix, folder in ASSETS.items():
        if source.startswith(prefix):
            return _find_asset(source, source.removeprefix(prefix), folder)
    path = to_path(source)
    if fault := address_fault(source):
        raise DataError(f"{source} is not {fault}")
    try:
        if path.is_file():
            return path
    except io_errors(source) as error:
        raise DataError(f"{source}: cannot be read: {error}") from error
    if path.suffix in (".jsonl", ".txt") or is_remote(source):
        raise DataError(f"{source}: no such file (looked from {Path.cwd()})")
    return None


def _find_asset(source: str, name: str, folder: str) -> Traversable:
    place = resources.files("promptkd_jax") / folder
    files = {file.name: file for file in place.iterdir() if file.name.endswith(".jsonl")}
    for known in (name, f"{name}.jsonl"):
        if known in files:
            return files[known]
    raise DataError(f"{source}: promptkd_jax/{folder} has no {name!r}; it has {sorted(files)}")


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
    text = f"{instruction}\n{context}" if context else instruction
    outputs = _outputs(fields, where, need_output)
    return user_record(text, outputs, instruction=instruction, input=context)


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
