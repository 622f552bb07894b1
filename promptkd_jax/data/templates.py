"""Templates: how a record becomes the text of a prompt, and its tokens."""

import datetime
import string
from collections.abc import Callable, Sequence

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from promptkd_jax.data.records import Record, plain_prompt
from promptkd_jax.infra.errors import DataError

_CLOCK = "strftime_now"


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
    turn = {"role": "user", "content": plain_prompt(record)}
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
    return plain_prompt(record) + "\n"


def shows_date(template: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether prompts depend on the day on which they are rendered."""
    return template == "chat" and _CLOCK in str(tokenizer.chat_template)


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
    return prompt_tokens([record], template, tokenizer, date)[0]


def prompt_tokens(
    records: Sequence[Record], template: str, tokenizer: PreTrainedTokenizerBase, date: str
) -> list[list[int]]:
    if template not in TEMPLATES:
        raise DataError(f"unknown template {template!r}; there are {', '.join(TEMPLATES)}")
    render = TEMPLATES[template]
    return encode([render(record, tokenizer, date) for record in records], tokenizer)


def encode(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """All texts in one call, which is what lets a fast tokenizer use its threads."""
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        verbose=False,  # no warning about texts beyond the model's length: they are cut or dropped
    )
    return encoded["input_ids"]
