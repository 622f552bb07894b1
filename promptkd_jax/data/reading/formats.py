"""Formats: what the fields of an example mean, one function for each way in which people write one.

A format is recognised by its first field, or named in `data.format`; other names of columns are
given by `data.columns`. To add one, write a function from `Fields` to a `Record`, and its entry in
`FORMATS`.
"""

import dataclasses
import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from promptkd_jax.data.reading.records import Message, Record, responses_of, user_record
from promptkd_jax.infra.errors import DataError

_ROLES = {
    **{name: "user" for name in ("user", "human")},
    **{name: "assistant" for name in ("assistant", "gpt", "chatgpt", "model", "bot")},
    "function_call": "assistant",
    **{name: "system" for name in ("system", "developer")},
    **{name: "tool" for name in ("tool", "function", "observation", "function_response")},
}
# Fields of every format that stand for turns, and those that would have to.
_SYSTEM, _HISTORY = ("system", "system_prompt"), "history"
_REFUSED = {
    "tools": "templates are not given tools; write them into the system turn",
    "functions": "templates are not given functions; write them into the system turn",
    "images": "models see text alone",
    "image": "models see text alone",
}
# Labels, which nobody expects in a prompt.
_LABELS = ("id", "idx", "index", "category", "source", "dataset", "language", "tags")
DOCUMENT = '{"text": "…"}'


class Fields:
    """The fields of an example by our names, and which of them a format has used.

    Attributes:
      answer: the names of which one has the answer; () where a conversation has it in itself.
    """

    def __init__(self, given: Mapping[str, Any]):
        self._given, self._used = given, set()
        self.answer: tuple[str, ...] = ()

    def pick(self, *names: str) -> tuple[str, Any]:
        """Returns the one of these fields that is given, and its value; the first and None where
        none is, or is null.

        Raises:
          DataError: several are given.
        """
        self._used.update(names)
        given = [name for name in names if self._given.get(name) is not None]
        if len(given) > 1:
            both = " and ".join(map(repr, given))
            raise DataError(f"fields {both} mean the same; keep one of them")
        name = given[0] if given else names[0]
        return name, self._given.get(name)

    def required(self, name: str) -> Any:
        """Returns the value of a field. Raises DataError where it is not there, or null."""
        _, value = self.pick(name)
        if value is None:
            raise DataError(self.missing((name,)) or f"field {name!r} is null; say what is asked")
        return value

    def text(self, *names: str) -> str:
        """Returns the text of the one of these fields that is given, "" where none is or it is
        blank.

        Raises:
          DataError: as `pick`, or it is no text.
        """
        name, value = self.pick(*names)
        text = "" if value is None else as_text(value, name)
        return text if text.strip() else ""

    def references(self, *names: str) -> tuple[str, ...]:
        """Returns the answers in the one of these fields that is given, a text or a list of them;
        () where there is none, or it is empty.

        Raises:
          DataError: as `pick`, or it is something else, or one of several is empty.
        """
        name, given = self.pick(*names)
        if given is None or given == [] or (isinstance(given, str) and not given.strip()):
            return ()
        if not isinstance(given, list):
            if not isinstance(given, str):
                expected = "expected a string or a list of strings"
                raise DataError(f"field {name!r} is {shown(given)}, {expected}")
            return (as_text(given, name),)
        answers = tuple(as_text(text, f"{name}[{i}]") for i, text in enumerate(given))
        for i, answer in enumerate(answers):
            if not answer.strip():
                raise DataError(f"field '{name}[{i}]' is empty; give an answer or remove it")
        return answers

    def missing(self, names: Sequence[str]) -> str:
        """Returns what to say where none of these fields is there; "" where one is."""
        if not names or any(name in self._given for name in names):
            return ""
        found = ", ".join(map(repr, self._given)) or "none"
        return (
            f"field {names[0]!r} is missing or null (has: {found}); "
            f"data.columns says where it is, such as {{'{names[0]}': 'THEIR NAME'}}"
        )

    def unused(self) -> dict[str, Any]:
        """Returns the fields that nothing has read, without those that are null."""
        return {k: v for k, v in self._given.items() if k not in self._used and v is not None}


def as_text(value: Any, name: str) -> str:
    """Returns a value that is text. Raises DataError where it is none, or no tokenizer takes it."""
    if not isinstance(value, str):
        raise DataError(f"field {name!r} is {shown(value)}, expected a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"field {name!r} has half a surrogate pair at character {error.start + 1}; "
            "write the whole character"
        ) from error
    return value


def shown(value: Any) -> str:
    """Returns a value for messages, shortened."""
    return f"{type(value).__name__} {repr(value)[:60]}"


# One turn


def _instruction(fields: Fields) -> Record:
    return _single_turn(fields, "instruction", ("output", "response"))


def _question_answer(fields: Fields) -> Record:
    return _single_turn(fields, "question", ("answer", "response", "output"))


def _prompt_completion(fields: Fields) -> Record:
    """Each of the two may be a text, or turns (as TRL has them); texts may be several answers."""
    answers = ("completion", "response", "output")
    (_, prompt), (name, completion) = fields.pick("prompt"), fields.pick(*answers)
    ends_in_turns = isinstance(completion, list) and any(isinstance(x, Mapping) for x in completion)
    if not isinstance(prompt, list) and not ends_in_turns:
        return _single_turn(fields, "prompt", answers)
    if not isinstance(prompt, list):
        prompt = [{"role": "user", "content": prompt}]
    turns = _turns(prompt, "prompt")
    answer = _turns(completion, name) if ends_in_turns else ()
    if turns[-1]["role"] == "assistant" and (not answer or answer[0]["role"] == "assistant"):
        raise DataError(
            "field 'prompt' ends with a turn of the assistant, which the completion would go on "
            "with; expected the whole response in one of them"
        )
    if answer:
        return _conversation(turns + answer, ())
    fields.answer = answers
    return _conversation(turns, fields.references(*answers))


def _single_turn(fields: Fields, asked: str, answers: tuple[str, ...]) -> Record:
    instruction = fields.required(asked)
    if not as_text(instruction, asked).strip():
        raise DataError(f"field {asked!r} is empty; say what is asked")
    context = fields.text("input", "context")
    text = f"{instruction}\n{context}" if context else instruction
    fields.answer = answers
    return user_record(text, fields.references(*answers), instruction=instruction, input=context)


# Conversations


def _messages(fields: Fields) -> Record:
    turns = _turns(fields.required("messages"), "messages")
    return _conversation(turns, fields.references("references"))


def _sharegpt(fields: Fields) -> Record:
    return _conversation(_turns(fields.required("conversations"), "conversations"), ())


def _conversation(turns: tuple[Message, ...], references: tuple[str, ...]) -> Record:
    """The record of these turns, of which the last may be the gold response."""
    while turns and turns[-1]["role"] == "assistant" and _is_empty(turns[-1]):
        turns = turns[:-1]  # an empty answer is none
    if turns and turns[-1]["role"] == "assistant":
        if turns[-1].get("weight") == 0:  # the last that is learned from is the response, if any
            asked = (i for i, turn in enumerate(turns) if turn["role"] != "assistant")
            turns = turns[: max(responses_of(turns), default=max(asked, default=-1)) + 1]
        gold = turns[-1]["content"] if turns and turns[-1]["role"] == "assistant" else ""
        if gold.strip():
            references = (gold, *(text for text in references if text != gold))
    elif references:
        turns = (*turns, {"role": "assistant", "content": references[0]})
    record = Record(turns, references)
    if not any(turn["role"] == "user" for turn in record.prompt):
        raise DataError("the conversation has no turn of the user before its response")
    return record


def _is_empty(turn: Message) -> bool:
    return not (turn["content"].strip() or turn.get("tool_calls"))


def _turns(value: Any, name: str) -> tuple[Message, ...]:
    if isinstance(value, str):  # as tables have it
        value = _from_json(value, name)
    if not isinstance(value, list) or not value:
        raise DataError(f"field {name!r} is {shown(value)}, expected a list of turns")
    return tuple(_turn(turn, f"{name}[{i}]") for i, turn in enumerate(value))


def _turn(turn: Any, name: str) -> Message:
    """A turn as chat templates take it; what it has beside role and content stays."""
    if not isinstance(turn, Mapping):
        raise DataError(f"field {name!r} is {shown(turn)}, expected an object with role, content")
    rest = {key: value for key, value in turn.items() if value is not None}  # as tables fill up
    said = rest.pop("role", None) or rest.pop("from", None)
    said = said.lower() if isinstance(said, str) else said
    role = _ROLES.get(said) if isinstance(said, str) else None
    if role is None:
        known = ", ".join(dict.fromkeys(_ROLES))
        raise DataError(f"field '{name}' has the role {said!r}; there are {known}")
    key = "value" if "value" in rest and "content" not in rest else "content"
    # null is what tables have where a turn says nothing; a name that is not there is a mistake.
    missing = turn.get(key) is None if role == "user" else key not in turn
    if missing and not rest.keys() & {"tool_calls", "function_call"}:
        found = ", ".join(map(repr, turn))
        raise DataError(
            f"field '{name}.{key}' is missing or null (has: {found}); expected what is said"
        )
    content = _content(rest.pop(key, ""), f"{name}.{key}")
    if said == "function_call":  # LLaMA-Factory's, whose content it is
        rest["tool_calls"], content = _from_json(content, f"{name}.{key}"), ""
        if isinstance(rest["tool_calls"], Mapping):
            rest["tool_calls"] = [rest["tool_calls"]]
    if older := rest.pop("function_call", None):  # OpenAI's, before there were several
        rest["tool_calls"] = [{"type": "function", "function": older}]
    if not rest.get("tool_calls"):
        rest.pop("tool_calls", None)
    else:
        rest["tool_calls"] = _tool_calls(rest["tool_calls"], f"{name}.tool_calls")
    if role == "user" and not content.strip():
        raise DataError(f"field '{name}.{key}' is empty; say what is asked")
    # As JSON has it, and without half surrogates.
    rest = json.loads(as_text(json.dumps(rest, ensure_ascii=False, default=str), name))
    turn = {"role": role, "content": content, **rest}
    if role == "assistant" and (_is_empty(turn) or not _is_trained(turn, name)):
        turn["weight"] = 0
    return turn


def _is_trained(turn: Message, name: str) -> bool:
    """Whether a turn is to be learned from, by the words that fine-tuning services have for it."""
    for key in ("weight", "train"):
        if (value := turn.get(key, 1)) not in (0, 1):
            raise DataError(f"field '{name}.{key}' is {shown(value)}, expected 0 or 1")
    return all(turn.get(key, 1) for key in ("weight", "train"))


def _content(value: Any, name: str) -> str:
    """The text of a turn, also where it is a list of parts."""
    if not isinstance(value, list):
        return as_text(value, name)
    for part in value:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            raise DataError(f"field {name!r} has the part {shown(part)}; models see text alone")
    return "".join(as_text(part.get("text"), name) for part in value)


def _tool_calls(calls: Any, name: str) -> list[Any]:
    """Calls as templates take them: arguments are objects, which OpenAI writes as JSON in text."""
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise DataError(f"field {name!r} is {shown(calls)}, expected a list of objects")
    taken = []
    for i, call in enumerate(calls):
        function = call.get("function", call)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DataError(f"field '{name}[{i}]' is {shown(call)}, expected a function's name")
        if isinstance(function.get("arguments"), str):
            arguments = _from_json(function["arguments"], f"{name}[{i}].arguments")
            function = {**function, "arguments": arguments}
        taken.append({**call, "function": function} if "function" in call else function)
    return taken


def _from_json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"field {name!r} is text, and no JSON: {error}") from error


# The table, and how it is used


class Format(NamedTuple):
    """A way to write an example: `read` makes a record of its `fields`, whose first tells it."""

    read: Callable[[Fields], Record]
    fields: tuple[str, ...]
    example: str


FORMATS = {
    "messages": Format(
        _messages, ("messages", "references"), '{"messages": [{"role": "user", "content": "…"}, …]}'
    ),
    "sharegpt": Format(
        _sharegpt, ("conversations",), '{"conversations": [{"from": "human", "value": "…"}, …]}'
    ),
    "instruction": Format(
        _instruction,
        ("instruction", "input", "output"),
        '{"instruction": "…", "input": "…", "output": "…"}',
    ),
    "prompt_completion": Format(
        _prompt_completion, ("prompt", "completion"), '{"prompt": "…", "completion": "…"}'
    ),
    "question_answer": Format(
        _question_answer, ("question", "answer"), '{"question": "…", "answer": "…"}'
    ),
}


def column_names() -> list[str]:
    """Returns the names that `data.columns` may give another one, or "" to leave a field out."""
    names = [name for known in FORMATS.values() for name in known.fields]
    others = "response", "context", "text", *_SYSTEM, _HISTORY, *_REFUSED
    return list(dict.fromkeys([*names, *others]))


def recognize(fields: Mapping[str, Any]) -> str:
    """Returns the key in `FORMATS` of what these fields are.

    Raises:
      DataError: of none.
    """
    for name, known in FORMATS.items():
        if fields.get(known.fields[0]) is not None:
            return name
    first = [known.fields[0] for known in FORMATS.values()]
    found, telling = (", ".join(map(repr, names)) or "none" for names in (fields, first))
    corpus = "; plain text is for config.data.corpus" if "text" in fields else ""
    alike = [close for name in fields for close in difflib.get_close_matches(name, first, 1)]
    meant = f" (did you mean {alike[0]}?)" if alike else ""
    raise DataError(
        f"the fields {found} are of no known format{meant}: none is one of {telling}; data.columns "
        f"says which field is which, such as {{'{[*alike, 'prompt'][0]}': 'THEIR NAME'}}{corpus}"
    )


def to_record(
    fields: Mapping[str, Any], name: str, *, need_output: bool
) -> tuple[Record, list[str]]:
    """Makes a record of an example's fields, by the format of this name.

    Args:
      need_output: whether a field that has the answer must be there, which may still be empty.

    Returns:
      The record, with references () where its answer is empty, and the names of the fields that
      nothing has read, which its `extra` keeps.

    Raises:
      DataError: the fault, without a place.
    """
    given = Fields(fields)
    record = FORMATS[name].read(given)
    if need_output and (fault := given.missing(given.answer)):
        raise DataError(fault)
    record = _with_system_and_history(record, given)
    for field, why in _REFUSED.items():
        if given.pick(field)[1] not in (None, "", "[]", [], {}):
            raise DataError(
                f"field {field!r} would be lost: {why}, or leave it out by data.columns = "
                f"{{'{field}': ''}}"
            )
    unused = given.unused()
    # Names of a single turn's parts are for the template "alpaca" alone.
    beside = {k: _plain(v) for k, v in unused.items() if k not in ("instruction", "input")}
    extra = {**beside, **record.extra}
    return dataclasses.replace(record, extra=extra), [k for k in unused if k not in _LABELS]


def _plain(value: Any) -> Any:
    """The value as JSON may have it: tables also have dates, bytes and images."""
    if isinstance(value, str | int | float):
        return value
    return json.loads(json.dumps(value, default=str))


def _with_system_and_history(record: Record, given: Fields) -> Record:
    """The record with the turns that a system prompt and earlier turns beside it stand for."""
    system, (_, history) = given.text(*_SYSTEM), given.pick(_HISTORY)
    turns = record.messages
    if history:
        if len(record.prompt) > 1:
            raise DataError(f"field {_HISTORY!r} beside several turns; write it as turns, too")
        turns = _history(history) + turns
    if system:
        if turns[0]["role"] == "system":
            raise DataError("field 'system' beside a system turn; keep one of them")
        turns = ({"role": "system", "content": system}, *turns)
    return dataclasses.replace(record, messages=turns)


def _history(value: Any) -> tuple[Message, ...]:
    """Earlier turns, as [asked, answered] pairs or as messages."""
    earlier = _from_json(value, _HISTORY) if isinstance(value, str) else value
    if not earlier:
        return ()
    if not isinstance(earlier, list):
        raise DataError(f"field {_HISTORY!r} is {shown(earlier)}, expected [asked, answered] pairs")
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in earlier):
        return _turns(earlier, _HISTORY)
    named = [
        {"role": role, "content": text}
        for pair in earlier
        for role, text in zip(("user", "assistant"), pair)
    ]
    return _turns(named, _HISTORY)


def to_document(fields: Any) -> str:
    """Returns the text of a corpus's document. Raises DataError where it has none."""
    if not isinstance(fields, Mapping) or "text" not in fields:
        raise DataError(f"found {shown(fields)}, expected an object like {DOCUMENT}")
    return as_text(fields["text"], "text")
