"""Conversations: where the turns of the assistant lie in what a chat template makes of them.

A row of the last response is a prompt and what the template writes behind it; a row of all of them
is the conversation rendered whole. Tokens of a response are the same in both: a conversation of
which that cannot be, such as where the template deletes earlier thinking, is refused.
"""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from promptkd_jax.data.records import Message, Record
from promptkd_jax.data.special_tokens import encode_rendered, special_tokens, spellings
from promptkd_jax.data.templates import (
    PromptFormat,
    chat_template,
    escaped_format,
    escaped_record,
    render_chat,
    render_prompts,
    turn_end,
    turns_with_system,
    with_bos,
)
from promptkd_jax.infra.errors import DataError

_REMEDY = (
    "expected data.supervise = 'last', targets that a model writes, or a chat template that keeps "
    "a conversation as it was (data.chat_template)"
)


class Conversation(NamedTuple):
    """A prompt, what follows it, and which tokens of that a student learns from."""

    prompt: list[int]
    response: list[int]
    supervised: np.ndarray  # bool, as long as the response

    @staticmethod
    def of(prompt: list[int], response: list[int]) -> "Conversation":
        """A prompt and its response, of which a student learns every token."""
        return Conversation(prompt, response, np.ones(len(response), bool))


def one_turn_each(records: Sequence[Record]) -> list[Record]:
    """Each turn of the assistant with the history before it as a record of its own; a conversation
    that ends with another turn is a prompt besides."""
    found = []
    for record in records:
        for end in _responses_of(record.messages):
            turns, last = record.messages[: end + 1], end + 1 == len(record.messages)
            gold = turns[-1].get("content")
            references = (gold,) if isinstance(gold, str) else ()
            found.append(record if last else record._replace(messages=turns, references=references))
        if not _is_answered(record):
            found.append(record)
    return found


def shorter_histories(record: Record) -> Iterator[Record]:
    """Yields the record without its first turns, ever fewer of them, with its system turn: each
    begins with a turn of the user."""
    system = [turn for turn in record.messages[:1] if turn["role"] == "system"]
    starts = [i for i, turn in enumerate(record.prompt) if turn["role"] == "user"]
    for start in starts[1:]:
        yield record._replace(messages=(*system, *record.messages[start:]))


def tokenize_last(
    records: Mapping[int, Record],
    prompt_format: PromptFormat,
    tokenizer: PreTrainedTokenizerBase,
    eos_id: int,
) -> dict[int, Conversation]:
    """The prompt and the last response of each record, as the template writes it up to the token
    that ends a turn; where it writes none, and for other templates than 'chat', the response alone
    and `eos_id`. A record without response gives its prompt.

    Args:
      records: by the number that messages call them.

    Raises:
      DataError: as `render_prompt`; or a response without text that the template does not render.
    """
    asked = dict(zip(records, render_prompts([*records.values()], prompt_format, tokenizer)))
    prompts = dict(zip(records, encode_rendered([*asked.values()], tokenizer)))
    responses = _last_responses(
        {i: record for i, record in records.items() if _is_answered(record)},
        asked,
        prompts,
        prompt_format,
        tokenizer,
        eos_id,
    )
    found = [Conversation.of(prompt, responses.get(i, [])) for i, prompt in prompts.items()]
    return dict(zip(records, _with_bos(found, prompt_format, tokenizer)))


def _last_responses(
    records: Mapping[int, Record],
    asked: Mapping[int, str],
    prompts: Mapping[int, list[int]],
    prompt_format: PromptFormat,
    tokenizer: PreTrainedTokenizerBase,
    eos_id: int,
) -> dict[int, list[int]]:
    """The tokens of the last responses to prompts of these texts and tokens, with their end."""
    end, spelled = turn_end(prompt_format, tokenizer), spellings(tokenizer)
    how, rendered, alone = escaped_format(prompt_format, spelled), {}, {}
    for i, record in records.items():
        record, text = escaped_record(record, spelled), None
        if prompt_format.template == "chat":
            text = _behind(asked[i], record, tokenizer, how, end)
        if text is not None:
            rendered[i] = text
        elif not isinstance(text := record.messages[-1].get("content"), str):
            raise DataError(
                f"record {i} (from 0): its response has no text, and template "
                f"{prompt_format.template!r} does not render it"
            )
        alone[i] = text
    # As one text with the prompt, since a tokenizer may see the beginning of a text in a response
    # by itself; by itself where that would change the tokens of the prompt.
    found = dict(zip(alone, encode_rendered([*alone.values()], tokenizer)))
    joint = encode_rendered([asked[i] + text for i, text in rendered.items()], tokenizer)
    for i, tokens in zip(rendered, joint):
        start = len(prompts[i])
        found[i] = tokens[start:] if tokens[:start] == prompts[i] else found[i]
    special = set(special_tokens(tokenizer).values())
    eos_id = eos_id if end is None else tokenizer.convert_tokens_to_ids(end)
    return {
        i: tokens if i in rendered and tokens and tokens[-1] in special else [*tokens, eos_id]
        for i, tokens in found.items()
    }


def tokenize_whole(
    records: Mapping[int, Record], prompt_format: PromptFormat, tokenizer: PreTrainedTokenizerBase
) -> dict[int, Conversation]:
    """Each conversation rendered whole, up to its last response; all of its turns of the assistant
    are supervised, with the tokens that end them. The prompt is what stands before the first.

    Args:
      records: by the number that messages call them.

    Raises:
      DataError: the template renders a turn differently, or not, where others follow, or a token
        crosses the beginning or the end of one.
    """
    if not records:
        return {}
    end, spelled = turn_end(prompt_format, tokenizer), spellings(tokenizer)
    how, found = escaped_format(prompt_format, spelled), []
    for number, record in records.items():
        *_, last = _responses_of(record.messages)
        try:
            if end is None:
                raise DataError("the template writes no special token at the end of a turn")
            turns = escaped_record(record, spelled).messages[: last + 1]
            found.append(_tokens(*_spans(turns, tokenizer, how, end), tokenizer))
        except DataError as error:
            raise DataError(
                f"record {number} (from 0): its turns of the assistant cannot be supervised in one "
                f"row: {error}; {_REMEDY}"
            ) from error
    return dict(zip(records, _with_bos(found, prompt_format, tokenizer)))


def _with_bos(
    found: list[Conversation], prompt_format: PromptFormat, tokenizer: PreTrainedTokenizerBase
) -> list[Conversation]:
    prompts = with_bos([one.prompt for one in found], prompt_format, tokenizer)
    return [one._replace(prompt=prompt) for one, prompt in zip(found, prompts)]


def has_several_responses(record: Record) -> bool:
    """Whether a row of all responses differs from that of the last one."""
    count = len(list(_responses_of(record.messages)))
    return count > 1 or (count == 1 and not _is_answered(record))


def _responses_of(turns: Sequence[Message]) -> Iterator[int]:
    return (i for i, turn in enumerate(turns) if turn["role"] == "assistant")


def _is_answered(record: Record) -> bool:
    return bool(record.messages) and record.messages[-1]["role"] == "assistant"


def _behind(
    asked: str,
    record: Record,
    tokenizer: PreTrainedTokenizerBase,
    how: PromptFormat,
    end: str | None,
) -> str | None:
    """What the template writes behind a prompt for its response, up to the token that ends a turn;
    None where it renders the prompt otherwise then, or leaves some of the response out."""
    whole = render_chat(record.messages, tokenizer, how)
    behind = whole.removeprefix(asked)
    complete = behind.strip() and _has_all(behind, record.messages[-1:])
    if not whole.startswith(asked) or not complete:
        return None
    return behind[: behind.index(end) + len(end)] if end and end in behind else behind.rstrip()


def _has_all(text: str, turns: Sequence[Message]) -> bool:
    """Whether a text has what the turns say, in their order; templates change blanks around it."""
    text, place = "".join(text.split()), 0
    for said in (turn.get(part) for turn in turns for part in ("reasoning_content", "content")):
        if isinstance(said, str):
            said = "".join(said.split())
            place = text.find(said, place) + len(said)
            if place < len(said):
                return False
    return True


def _spans(
    turns: Sequence[Message], tokenizer: PreTrainedTokenizerBase, how: PromptFormat, end: str
) -> tuple[str, list[tuple[int, int]]]:
    """A conversation as the template renders it, and from where to where the assistant speaks in
    it, in characters, the ends of turns included."""
    whole, spans = render_chat(turns, tokenizer, how), []
    for index in _responses_of(turns):
        asked = render_chat(turns[:index], tokenizer, how, add_generation_prompt=True)
        said = render_chat(turns[: index + 1], tokenizer, how)
        stop = said.find(end, len(asked)) + len(end)
        if not whole.startswith(asked):
            fault = f"turn {index} (from 0) is asked for with another text than it has before it"
            break
        if stop < len(end) or not whole.startswith(said[:stop]):
            fault = (
                f"the template renders turn {index} (from 0) differently where others follow, as "
                "those do that delete earlier thinking"
            )
            break
        if not _has_all(said[len(asked) : stop], turns[index : index + 1]):
            fault = f"the template leaves out some of turn {index} (from 0)"
            break
        spans.append((len(asked), stop))
    else:
        return whole, spans
    if not re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template()):
        raise DataError(fault)
    return whole, _marked(whole, turns, tokenizer, how, end)


def _marked(
    whole: str,
    turns: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    how: PromptFormat,
    end: str,
) -> list[tuple[int, int]]:
    """As `_spans`, by the template's own {% generation %} marks."""
    [rendered], [spans] = render_jinja_template(
        conversations=[[dict(turn) for turn in turns_with_system(turns, how.system)]],
        chat_template=chat_template(tokenizer, how),
        return_assistant_tokens_mask=True,
        **{**tokenizer.special_tokens_map, **how.chat_template_kwargs},
    )
    texts = [rendered[start:stop] for start, stop in spans]
    spoken = [turn for turn in turns if turn["role"] == "assistant"]
    if rendered != whole or not _has_all("".join(texts), spoken):
        raise DataError("what the template marks as generated lacks some of what is said there")
    # The end of a turn belongs to it, also where the mark stops before.
    return [
        (start, stop + len(end) if whole.startswith(end, stop) else stop) for start, stop in spans
    ]


def _tokens(
    whole: str, spans: Sequence[tuple[int, int]], tokenizer: PreTrainedTokenizerBase
) -> Conversation:
    """The tokens of a conversation up to its last span; those of the spans are supervised."""
    places = list(itertools.chain.from_iterable(spans))
    *heads, tokens = encode_rendered([whole[:place] for place in places], tokenizer)
    for place, head in zip(places, heads):
        if tokens[: len(head)] != head:
            near = whole[max(place - 20, 0) : place + 20]
            raise DataError(f"a token crosses from one turn into the next, in {near!r}")
    bounds = [*map(len, heads), len(tokens)]
    first, mask = bounds[0], np.zeros(len(tokens), bool)
    for start, stop in zip(bounds[::2], bounds[1::2]):
        mask[start:stop] = True
    return Conversation(tokens[:first], tokens[first:], mask[first:])
