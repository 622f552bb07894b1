"""Conversations: where the turns of the assistant lie in what a chat template makes of them.

A row of the last response is a prompt and what the template writes behind it; a row of all of them
is the conversation rendered whole. Tokens of a response are the same in both: a conversation of
which that cannot be, such as where the template deletes earlier thinking, is refused.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from promptkd_jax.data.reading.records import Message, Record, responses_of
from promptkd_jax.data.special_tokens import encode_rendered, special_tokens, spellings
from promptkd_jax.data.templates import (
    PromptFormat,
    chat_template,
    check_rendered,
    escaped_format,
    escaped_record,
    is_rendered,
    lacks_thinking,
    render_chat,
    render_escaped,
    turn_end,
    turns_with_system,
    with_bos,
)
from promptkd_jax.infra.errors import DataError, Faults

_REMEDY = (
    "expected data.supervise = 'each' or 'last', or a chat template that keeps a conversation as "
    "it was (data.chat_template)"
)


class Conversation(NamedTuple):
    """A prompt, what follows it, and which tokens of that a student learns from."""

    prompt: list[int]
    response: list[int]
    supervised: np.ndarray  # bool, as long as the response
    lacks_thinking: bool = False  # which a response has in a field that the template does not know


class _Pieces(NamedTuple):
    """A conversation as text: the prompt, then by turns a response and what stands before the next
    one. `whole`: the template wrote it as one text, of which its tokens are."""

    texts: tuple[str, ...]
    whole: bool = True
    lacks_thinking: bool = False


def one_turn_each(records: Iterable[Record]) -> Iterator[Record]:
    """Yields each turn of the assistant with the history before it as a record of its own; a
    conversation that ends with another turn is a prompt besides."""
    for record in records:
        for end in responses_of(record.messages):
            turns, last = record.messages[: end + 1], end + 1 == len(record.messages)
            gold = str(turns[-1].get("content") or "")
            references = (gold,) if gold.strip() else ()
            split = dataclasses.replace(record, messages=turns, references=references)
            yield record if last else split
        if not record.is_answered:
            yield record


def shorter_histories(record: Record) -> Iterator[Record]:
    """Yields the record without its first turns, ever fewer of them, with its system turn: each
    begins with a turn of the user."""
    system = [turn for turn in record.messages[:1] if turn["role"] == "system"]
    starts = [i for i, turn in enumerate(record.prompt) if turn["role"] == "user"]
    for start in starts[1:]:
        yield dataclasses.replace(record, messages=(*system, *record.messages[start:]))


def _has_several_responses(record: Record) -> bool:
    """Whether a row of all responses differs from that of the last one."""
    count = len(list(responses_of(record.messages)))
    return count > 1 or (count == 1 and not record.is_answered)


def tokenize_conversations(
    records: Sequence[Record],
    *,
    prompt_format: PromptFormat,
    tokenizer: PreTrainedTokenizerBase,
    eos_id: int,
    supervise: str,
    faults: Faults,
    first: int = 0,
) -> list[Conversation | None]:
    """The tokens of each record: its prompt, and its last response, or by `supervise` "all" what
    follows the prompt up to the last response, of which all turns of the assistant are supervised.

    A response is as the template writes it, up to the token that ends a turn; where it writes none,
    and for other templates than 'chat', it is the response alone and `eos_id`. The prompt has the
    tokens that it has alone: where a token would cross the beginning or the end of a response, each
    piece of the conversation is tokenised by itself. A record without response gives its prompt.

    Args:
      faults: gets the records that cannot be rendered, or not as `supervise` wants it, by their
        place or number.
      first: the number of the first record, for messages.

    Returns:
      One for each record, None for one with a fault.

    Raises:
      DataError: there is no such template, or it cannot be used for any record.
    """
    end, spelled = turn_end(prompt_format, tokenizer), spellings(tokenizer)
    how, pieces = escaped_format(prompt_format, spelled), {}
    for index, record in enumerate(records):
        several = supervise == "all" and how.template == "chat" and _has_several_responses(record)
        render = _all_responses if several else _last_response
        try:
            pieces[index] = render(escaped_record(record, spelled), tokenizer, how, end)
        except DataError as error:
            faults.add(record.place or f"record {first + index} (from 0)", str(error))
    tokens = _encode_pieces(list(pieces.values()), tokenizer)
    special = set(special_tokens(tokenizer).values())
    eos_id = eos_id if end is None else tokenizer.convert_tokens_to_ids(end)
    prompts = with_bos([prompt for prompt, *_ in tokens], prompt_format, tokenizer)
    found: list[Conversation | None] = [None] * len(records)
    for (index, made), prompt, (_, *rest) in zip(pieces.items(), prompts, tokens):
        if rest and not (made.whole and rest[-1][-1:] and rest[-1][-1] in special):
            rest[-1] = [*rest[-1], eos_id]
        masks = [np.full(len(piece), place % 2 == 0) for place, piece in enumerate(rest)]
        supervised = np.concatenate([np.zeros(0, bool), *masks])
        response = list(itertools.chain(*rest))
        found[index] = Conversation(prompt, response, supervised, made.lacks_thinking)
    return found


def _encode_pieces(
    conversations: Sequence[_Pieces], tokenizer: PreTrainedTokenizerBase
) -> list[list[list[int]]]:
    """The tokens of each piece of each conversation.

    As one text, since a tokenizer may see the beginning of a text in a piece by itself; by itself
    where a token would lie across two pieces, and the tokens of the first depend on the second.
    """
    texts = [
        list(itertools.accumulate(pieces)) if whole else list(pieces)
        for pieces, whole, _ in conversations
    ]
    encoded = iter(encode_rendered(list(itertools.chain(*texts)), tokenizer))
    found = [[next(encoded) for _ in some] for some in texts]
    crossed = []
    for place, (_, whole, _) in enumerate(conversations):
        *heads, tokens = found[place]
        if whole and any(tokens[: len(head)] != head for head in heads):
            crossed.append(place)
        elif whole:
            bounds = [0, *map(len, heads), len(tokens)]
            found[place] = [tokens[start:stop] for start, stop in itertools.pairwise(bounds)]
    apart = iter(encode_rendered([x for i in crossed for x in conversations[i].texts], tokenizer))
    for place in crossed:
        found[place] = [next(apart) for _ in conversations[place].texts]
    return found


def _last_response(
    record: Record, tokenizer: PreTrainedTokenizerBase, how: PromptFormat, end: str | None
) -> _Pieces:
    """The prompt and what the template writes behind it for the response, up to the token that ends
    a turn; the response alone where it leaves some of the response out.

    Raises:
      DataError: the response calls tools that are not rendered, or has no text; or its prompt ends
        in the middle of thinking that it has not.
    """
    asked = render_escaped(record, tokenizer, how)
    if not record.is_answered:
        return _Pieces((asked,))
    response, opened = record.messages[-1], None
    said = response.get("content")
    if how.template == "chat":
        opened = _opened(asked, record)
        whole = render_chat(record.messages, tokenizer, how)
        behind = _up_to(end, _behind(asked, whole, tokenizer))
        if opened and _closing(opened[1]) not in behind:
            behind = ""
        if behind.strip() and is_rendered(response, behind):
            return _Pieces((asked, behind), lacks_thinking=lacks_thinking(response, behind))
        if opened and isinstance(said, str) and _closing(opened[1]) not in said:
            raise DataError(
                f"template 'chat': a prompt ends with {opened[0].strip()!r}, and the response has "
                f"no {_closing(opened[1])!r}; expected data with thinking, or "
                "data.chat_template_kwargs, such as {'enable_thinking': False}"
            )
    if response.get("tool_calls") or not isinstance(said, str):
        raise DataError(
            f"template {how.template!r} does not render all of its response, which calls tools or "
            "has no text; expected a chat template that does (data.chat_template)"
        )
    if opened:  # by the prompt already
        said = said.removeprefix(opened[0].strip()).lstrip("\n")
    return _Pieces((asked, said), whole=False, lacks_thinking=lacks_thinking(response, said))


def _opened(asked: str, record: Record) -> re.Match[str] | None:
    """A mark that a template ends a prompt with, such as <think>; None where there is none."""
    found = re.search(r"<(\w+)>\s*$", asked)
    last = str(record.prompt[-1].get("content") or "")
    return None if found and last.rstrip().endswith(found[0].strip()) else found


def _closing(mark: str) -> str:
    return f"</{mark}>"


def _behind(asked: str, whole: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """What a conversation has behind its prompt, or, where it has the prompt with a change, behind
    the last special token of it and what follows that; "" where it has neither."""
    if whole.startswith(asked):
        return whole.removeprefix(asked)
    marks = list(spellings(tokenizer).finditer(asked))
    tail = asked[marks[-1].start() :] if marks else asked
    return whole.rpartition(tail)[2] if tail in whole else ""


def _up_to(end: str | None, text: str) -> str:
    """A text up to the last token that ends a turn, which may also end a part of one."""
    return text[: text.rindex(end) + len(end)] if end and end in text else text.rstrip()


def _all_responses(
    record: Record, tokenizer: PreTrainedTokenizerBase, how: PromptFormat, end: str | None
) -> _Pieces:
    """The conversation rendered whole, up to its last response.

    Raises:
      DataError: the template renders a turn differently, or not, where others follow.
    """
    *_, last = responses_of(record.messages)
    turns = record.messages[: last + 1]
    try:
        if end is None:
            raise DataError("the template writes no special token at the end of a turn")
        whole, spans = _spans(turns, tokenizer, how, end)
    except DataError as error:
        raise DataError(
            f"its turns of the assistant cannot be supervised in one row: {error}; {_REMEDY}"
        ) from error
    check_rendered(whole, turns, tokenizer, how)
    bounds = [0, *itertools.chain(*spans)]
    texts = tuple(whole[start:stop] for start, stop in itertools.pairwise(bounds))
    thoughtless = (
        lacks_thinking(turns[place], text)
        for place, text in zip(responses_of(turns), texts[1::2], strict=False)
    )
    return _Pieces(texts, lacks_thinking=any(thoughtless))


def _spans(
    turns: Sequence[Message], tokenizer: PreTrainedTokenizerBase, how: PromptFormat, end: str
) -> tuple[str, list[tuple[int, int]]]:
    """A conversation as the template renders it, and from where to where the assistant speaks in
    it, in characters, the ends of turns included."""
    whole, spans = render_chat(turns, tokenizer, how), []
    for index in responses_of(turns):
        asked = render_chat(turns[:index], tokenizer, how, add_generation_prompt=True)
        said = _up_to(end, render_chat(turns[: index + 1], tokenizer, how))
        if not whole.startswith(asked):
            fault = f"turn {index} (from 0) is asked for with another text than it has before it"
            break
        if len(said) <= len(asked) or not whole.startswith(said):
            fault = (
                f"the template renders turn {index} (from 0) differently where others follow, as "
                "those do that have thinking, or a place for it, in the last turn alone"
            )
            break
        if not is_rendered(turns[index], said[len(asked) :]):
            fault = f"the template leaves out some of turn {index} (from 0)"
            break
        spans.append((len(asked), len(said)))
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
    spoken = [place for place, turn in enumerate(turns) if turn["role"] == "assistant"]
    wanted = list(responses_of(turns))
    if len(spans) == len(spoken):
        spans = [span for place, span in zip(spoken, spans) if place in wanted]
    elif spoken != wanted:
        raise DataError("the template marks other turns as generated than those of the assistant")
    # The end of a turn belongs to it, also where the mark stops before it; blanks behind it do not.
    ends = []
    for start, stop in spans:
        behind = whole.startswith(end, stop)
        ends.append(stop + len(end) if behind else start + len(_up_to(end, whole[start:stop])))
    texts = [whole[start:stop] for (start, _), stop in zip(spans, ends)]
    if len(texts) != len(wanted):  # several marks in a turn
        texts = ["".join(texts)] * len(wanted)
    if rendered != whole or not all(is_rendered(turns[i], text) for i, text in zip(wanted, texts)):
        raise DataError("what the template marks as generated lacks some of what is said there")
    return [(start, stop) for (start, _), stop in zip(spans, ends)]
