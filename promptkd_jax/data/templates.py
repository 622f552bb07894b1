"""Templates: how a record becomes the text of a prompt, and its tokens."""

import dataclasses
import datetime
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from promptkd_jax.data.reading.records import Message, Record, user_record
from promptkd_jax.data.special_tokens import encode_rendered, escape, spellings
from promptkd_jax.infra.errors import DataError
from promptkd_jax.infra.files import io_errors, read_text, to_path

_CLOCK = "strftime_now"
_WORD = "zebra"  # that no template writes itself
_THINKING = ("reasoning_content", "reasoning", "thinking")  # fields that templates know
# What the expressions of a template may raise.
_OF_EXPRESSIONS = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError)
_OF_EXPRESSIONS += (RecursionError,)


@dataclasses.dataclass(frozen=True)
class PromptFormat:
    """How a conversation becomes the tokens of a prompt.

    Attributes:
      template: key of `TEMPLATES`.
      system: the system turn of conversations that have none; "": none.
      chat_template_kwargs: what the chat template is given beside the conversation, such as
        {"enable_thinking": False}.
      add_bos: whether a prompt begins with the tokenizer's BOS where the template writes none
        itself; "auto": where the tokenizer puts one in front of a text.
      date: such as "2026-11-27", for a chat template that shows one; "": today.
    """

    template: str
    system: str = ""
    chat_template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    add_bos: bool | str = "auto"
    date: str = ""

    @property
    def identity(self) -> dict[str, Any]:
        """What decides a prompt beside its text and the day, to be written down: the template, and
        what differs from the default."""
        chosen = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        default = vars(PromptFormat(self.template)) | {"template": None}
        return {n: x for n, x in chosen.items() if n != "date" and x != default[n]}


def _single_turn(record: Record, prompt_format: PromptFormat) -> Message:
    """The one turn of a prompt. Raises DataError where there are others, which would be lost."""
    turns = turns_with_system(record.prompt, prompt_format.system)
    if [turn["role"] for turn in turns] != ["user"]:
        roles = ", ".join(turn["role"] for turn in turns)
        raise DataError(
            f"template {prompt_format.template!r} renders a single turn of the user, and the turns "
            f"of this prompt are: {roles}; use 'chat'"
        )
    return turns[0]


def turns_with_system(turns: Sequence[Message], system: str) -> tuple[Message, ...]:
    """The turns behind this system turn, if any, unless they begin with one."""
    has_one = turns and turns[0]["role"] == "system"
    return ({"role": "system", "content": system}, *turns) if system and not has_one else (*turns,)


def _alpaca(record: Record, tokenizer: PreTrainedTokenizerBase, how: PromptFormat) -> str:
    """The prompt of Stanford Alpaca, ending in a newline as in the MiniLLM experiments."""
    instruction, given = _single_turn(record, how)["content"], record.extra.get("input", "")
    task = "Below is an instruction that describes a task"
    if given:
        instruction = record.extra["instruction"]
        task += ", paired with an input that provides further context"
    context = f"### Input:\n{given}\n\n" if given else ""
    return (
        f"{task}. Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n{context}### Response:\n"
    )


def _chat(record: Record, tokenizer: PreTrainedTokenizerBase, how: PromptFormat) -> str:
    """The conversation and the opening of the answer, in the model's own chat format."""
    text = render_chat(record.prompt, tokenizer, how, add_generation_prompt=True)
    check_rendered(text, record.prompt, tokenizer, how, add_generation_prompt=True)
    return text


def render_chat(
    turns: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    how: PromptFormat,
    *,
    add_generation_prompt: bool = False,
) -> str:
    """Renders turns by the tokenizer's chat template.

    Raises:
      DataError: it has none, or cannot render them.
    """
    name = tokenizer.name_or_path or type(tokenizer).__name__
    if not tokenizer.chat_template:
        raise DataError(
            f"template 'chat': tokenizer {name} has no chat template; use 'alpaca' or 'plain', or "
            "give one (data.chat_template, --chat-template)"
        )
    try:
        return tokenizer.apply_chat_template(
            [dict(turn) for turn in turns_with_system(turns, how.system)],
            chat_template=chat_template(tokenizer, how),
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            **how.chat_template_kwargs,
        )
    except (TemplateError, *_OF_EXPRESSIONS) as error:
        line = f"line {error.lineno}: " if isinstance(error, TemplateSyntaxError) else ""
        roles = ", ".join(turn["role"] for turn in turns)
        shown = "one user turn" if roles == "user" else f"the turns {roles}"
        raise DataError(
            f"template 'chat': that of tokenizer {name} cannot be rendered for {shown}: "
            f"{line}{error or type(error).__name__}; mend its chat template, or use 'alpaca' or "
            "'plain'"
        ) from error


def check_rendered(
    text: str,
    turns: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    how: PromptFormat,
    *,
    add_generation_prompt: bool = False,
) -> None:
    """Raises DataError where what `render_chat` made of these turns does not depend on one of
    them, or lacks a name of a tool that one calls."""
    turns, letters = turns_with_system(turns, how.system), _letters(text)
    # What one turn says is not found again for another; the longest first, which may have others.
    said = [(len(_letters(_shown(turn))), place) for place, turn in enumerate(turns)]
    for _, place in sorted(said, reverse=True):
        turn = turns[place]
        rest, lost = _without(letters, [_shown(turn)]), False
        if rest is None:  # changed, or not there
            others = list(turns)
            others[place] = {**turn, "content": f"{turn.get('content') or ''} {_WORD}"}
            again = render_chat(others, tokenizer, how, add_generation_prompt=add_generation_prompt)
            rest, lost = letters, again == text
        letters = _without(rest, called_names(turn))
        if lost or letters is None:
            part = "" if lost else "a tool that is called in "
            raise DataError(
                f"template 'chat': the chat template leaves out {part}turn {place} (from 0), of "
                f"role {turn['role']}; expected one that renders it (data.chat_template), or data "
                "without it"
            )


def is_rendered(turn: Message, text: str) -> bool:
    """Whether a text has what a turn says and the names of the tools that it calls, but for blanks
    and signs, which templates change."""
    said = str(turn.get("content") or ""), *called_names(turn)
    return _without(_letters(text), said) is not None


def lacks_thinking(turn: Message, text: str) -> bool:
    """Whether a turn has thinking in a field of its own, which a text has not."""
    thought = (turn[name] for name in _THINKING if isinstance(turn.get(name), str))
    return any(_letters(part) not in _letters(text) for part in thought)


def called_names(turn: Message) -> list[str]:
    """The names of the tools that a turn calls."""
    named = (call.get("function", call) for call in turn.get("tool_calls") or ())
    return [str(one["name"]) for one in named if isinstance(one, Mapping) and "name" in one]


def _shown(turn: Message) -> str:
    """What a turn says, without earlier thinking, which templates may delete."""
    return str(turn.get("content") or "").rpartition("</think>")[2]


def _without(letters: str, said: Sequence[str]) -> str | None:
    """The letters of a text without those of each of these parts, None where one is not there."""
    for part in map(_letters, said):
        if part not in letters:
            return None
        letters = letters.replace(part, "\n", 1) if part else letters
    return letters


def _letters(text: str) -> str:
    return re.sub(r"\W+", "", text)


def read_chat_template(path: str) -> str:
    """Reads a chat template, Jinja text, from a file. Raises DataError where there is none."""
    try:
        return read_text(to_path(path))
    except (*io_errors(path), UnicodeDecodeError) as error:
        raise DataError(f"chat template {path}: cannot be read: {error}") from error


def chat_template(tokenizer: PreTrainedTokenizerBase, how: PromptFormat) -> str:
    """The tokenizer's template, with its clock stopped."""
    return _stopped_clock(how.date) + tokenizer.get_chat_template()


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


def _plain(record: Record, tokenizer: PreTrainedTokenizerBase, how: PromptFormat) -> str:
    return _single_turn(record, how)["content"] + "\n"


def shows_date(template: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether prompts depend on the day on which they are rendered."""
    return template == "chat" and _CLOCK in str(tokenizer.chat_template)


TEMPLATES: dict[str, Callable[[Record, PreTrainedTokenizerBase, PromptFormat], str]] = {
    "alpaca": _alpaca,
    "chat": _chat,
    "plain": _plain,
}


def render_prompt(
    record: Record, prompt_format: PromptFormat, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """The tokens of a record's prompt; special tokens only where the template writes them, and a
    BOS as `PromptFormat.add_bos` says.

    Templates are "alpaca" (the published Alpaca text, with or without input), "chat" (the turns and
    the generation prompt, in the tokenizer's chat template) and "plain" (the text alone; the
    response stands on a line of its own).

    Raises:
      DataError: the template is unknown, or "chat" for a tokenizer without a chat template, or with
        one that cannot be rendered.
    """
    spelled = spellings(tokenizer)
    how = escaped_format(prompt_format, spelled)
    text = render_escaped(escaped_record(record, spelled), tokenizer, how)
    [ids] = with_bos(encode_rendered([text], tokenizer), prompt_format, tokenizer)
    return ids


def render_escaped(record: Record, tokenizer: PreTrainedTokenizerBase, how: PromptFormat) -> str:
    """The text of a prompt, of a record and format that are escaped already."""
    if how.template not in TEMPLATES:
        raise DataError(f"unknown template {how.template!r}; there are {', '.join(TEMPLATES)}")
    return TEMPLATES[how.template](record, tokenizer, how)


def escaped_record(record: Record, spelled: re.Pattern) -> Record:
    """The record with its texts as `escape` gives them."""
    roles = [turn["role"] for turn in record.messages]
    turns = (escape(turn, spelled) | {"role": r} for turn, r in zip(record.messages, roles))
    return dataclasses.replace(record, messages=tuple(turns), extra=escape(record.extra, spelled))


def escaped_format(prompt_format: PromptFormat, spelled: re.Pattern) -> PromptFormat:
    """The format with its system turn as `escape` gives it."""
    return dataclasses.replace(prompt_format, system=escape(prompt_format.system, spelled))


def turn_end(prompt_format: PromptFormat, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The special token by which a chat template ends a turn of the assistant, such as <|im_end|>:
    the first one behind what it says. None where there is none, or no chat template is used.

    Raises:
      DataError: there is no chat template, or it cannot render a turn of the assistant.
    """
    if prompt_format.template != "chat":
        return None
    spelled = spellings(tokenizer)
    turns = user_record("Name an animal.", (_WORD,)).messages
    text = render_chat(turns, tokenizer, escaped_format(prompt_format, spelled))
    found = spelled.search(text.rpartition(_WORD)[2]) if _WORD in text else None
    return found and found[0]


def with_bos(
    prompts: list[list[int]], prompt_format: PromptFormat, tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """The prompts behind a BOS, where `PromptFormat.add_bos` wants one and none is there yet."""
    bos = _bos(prompt_format, tokenizer)
    return [ids if ids[:1] == bos else bos + ids for ids in prompts]


def _bos(prompt_format: PromptFormat, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that a prompt begins with, or none."""
    bos, wanted = tokenizer.bos_token_id, prompt_format.add_bos
    if wanted == "auto":
        # A chat template says itself how a conversation begins.
        if bos is None or prompt_format.template == "chat":
            return []
        wanted = tokenizer("a")["input_ids"][:1] == [bos]
    if wanted and bos is None:
        raise DataError(f"add_bos: tokenizer {tokenizer.name_or_path} has no BOS; expected False")
    return [bos] if wanted else []
