"""Chat templates: where responses lie, how they end, and text that spells special tokens."""

import dataclasses

import numpy as np
import pytest
import tokenizers
from helpers.chats import (
    CHATML,
    ENDS,
    GEMMA,
    LLAMA_3,
    SPECIAL,
    THINKING,
    chat_tokenizer,
    conversation,
    unmarked,
)
from helpers.records import example
from transformers import PreTrainedTokenizerFast

from promptkd_jax.data.conversations import one_turn_each
from promptkd_jax.data.reading.records import Record
from promptkd_jax.data.rows import fingerprint_supervised, select_rows, tokenize
from promptkd_jax.data.special_tokens import encode, encode_rendered, escape, spellings
from promptkd_jax.data.templates import PromptFormat, read_chat_template, render_prompt, turn_end
from promptkd_jax.infra.errors import DataError

CHAT, PLAIN = PromptFormat("chat"), PromptFormat("plain")
TALK = conversation("say red", "the red", "and  blue\n", "blue is\nthe sky", "one", "two")
THOUGHTS = conversation("say red", "<think>a</think>red", "and", "<think>b</think>blue")


def rows_of(records, tokenizer, prompt_format=CHAT, **how):
    how = dict(max_prompt_length=400, max_length=600, eos_id=tokenizer.eos_token_id) | how
    return tokenize(records, tokenizer, prompt_format, **how)


def prompts_of(rows):
    return [row[:end].tolist() for row, end in zip(rows.tokens, rows.prompt_lengths)]


def responses_of(rows):
    return [row[end:].tolist() for row, end in zip(rows.tokens, rows.prompt_lengths)]


# Rows of conversations


@pytest.fixture(params=[CHATML, LLAMA_3, GEMMA], ids=["chatml", "llama_3", "gemma"])
def template(request):
    return request.param


def made(template):
    return chat_tokenizer(unmarked(template), SPECIAL[template], bos=template != CHATML)


def test_a_row_of_all_turns_is_that_of_transformers(template):
    tokenizer = made(template)
    rows = rows_of([TALK], tokenizer, supervise="all")
    truth = tokenizer.apply_chat_template(
        list(TALK.messages),
        chat_template=template,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    end = tokenizer.convert_tokens_to_ids(ENDS[template])
    length = len(truth["input_ids"]) - truth["input_ids"][::-1].index(end)  # no blanks behind it
    assert rows.tokens[0].tolist() == truth["input_ids"][:length]
    assert rows.supervised[0].tolist() == [x == 1 for x in truth["assistant_masks"][:length]]
    assert rows.supervised[0].sum() == sum(truth["assistant_masks"])
    assert rows.tokens[0][rows.supervised[0]].tolist().count(end) == 3
    assert rows.prompt_lengths[0] == np.flatnonzero(rows.supervised[0])[0]
    assert rows.tokens[0].tolist().count(1) == (1 if template != CHATML else 6)  # BOS: once


def test_turns_one_by_one_have_the_tokens_of_the_whole(template):
    tokenizer = made(template)
    whole = rows_of([TALK], tokenizer, supervise="all")
    turns = list(one_turn_each([TALK]))
    rows = rows_of(turns, tokenizer)
    assert [turn.references for turn in turns] == [("the red",), ("blue is\nthe sky",), ("two",)]
    assert rows.supervised is None
    for row in rows.tokens:
        assert row.tolist() == whole.tokens[0][: len(row)].tolist()
    learned = whole.tokens[0][whole.supervised[0]].tolist()
    assert sum(responses_of(rows), []) == learned
    assert rows.num_supervised.sum() == whole.num_supervised[0] == len(learned)
    asked = tokenizer.apply_chat_template(
        list(TALK.messages[:3]), add_generation_prompt=True, return_dict=False
    )
    assert prompts_of(rows)[1] == asked


def test_a_row_ends_as_its_template_ends_a_turn(template):
    tokenizer = made(template)
    assert turn_end(CHAT, tokenizer) == ENDS[template] != tokenizer.eos_token
    assert turn_end(PLAIN, tokenizer) is None
    end = tokenizer.convert_tokens_to_ids(ENDS[template])
    [response] = responses_of(rows_of([example("say red", "", ("the red",))], tokenizer))
    assert response == [*encode(["the red"], tokenizer)[0], end]
    [response] = responses_of(rows_of([example("say red", "", ("the red",))], tokenizer, PLAIN))
    assert response[-1] == tokenizer.eos_token_id


def test_a_template_without_such_a_token_ends_with_the_eos():
    bare = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    tokenizer = chat_tokenizer(bare + "{% if add_generation_prompt %}assistant:{% endif %}")
    assert turn_end(CHAT, tokenizer) is None
    rows = rows_of([example("say red", "", ("the red",))], tokenizer)
    assert tokenizer.decode(prompts_of(rows)[0]) == "user: say red\nassistant:"
    assert tokenizer.decode(responses_of(rows)[0]) == " the red<|endoftext|>"
    with pytest.raises(DataError, match="record 0 .* no special token at the end of a turn"):
        rows_of([TALK], tokenizer, supervise="all")


def test_a_template_may_leave_the_response_out():
    """It is taken as it is then, behind the prompt."""
    tokenizer = chat_tokenizer("{{ messages[0]['content'] }}>")
    rows = rows_of([example("say red", "", ("the red",))], tokenizer)
    assert tokenizer.decode(rows.tokens[0]) == "say red>the red<|endoftext|>"
    for content in (None, "", "let me see"):
        call = {"role": "assistant", "content": content, "tool_calls": [{"name": "add"}]}
        with pytest.raises(DataError, match=r"record 0 .* does not render all of its response"):
            rows_of([Record((*TALK.messages[:1], call))], tokenizer)


def test_a_template_may_not_leave_out_what_is_asked():
    tokenizer = chat_tokenizer("{{ messages[-1]['content'] }}>")
    talk, asked = conversation("say red", "the red", "and"), conversation("say red")
    with pytest.raises(DataError, match="record 1 .* leaves out turn 1 .* of role assistant"):
        rows_of([asked, talk], tokenizer)
    system = PromptFormat("chat", system="be brief")
    with pytest.raises(DataError, match="record 0 .* leaves out turn 0 .* of role system"):
        rows_of([asked], tokenizer, system)
    # Also where another turn says the same.
    hidden = conversation("red", "blue", "say red or blue")
    with pytest.raises(DataError, match="leaves out turn . .* of role"):
        rows_of([hidden], tokenizer)
    # What it changes, or shows by a mark, is not left out.
    tokenizer.chat_template = "{{ messages[0]['content'] | replace('no', '') | length }}"
    assert tokenizer.decode(prompts_of(rows_of([conversation("no no")], tokenizer))[0]) == "1"
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "add"}]}
    tokenizer.chat_template = unmarked(CHATML)
    with pytest.raises(DataError, match="leaves out a tool that is called in turn 1 "):
        rows_of([Record((*asked.messages, call, *asked.messages))], tokenizer)


OPENED = (  # as DeepSeek-R1's: a prompt opens thinking, and a turn has none of it
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'].split('</think>')[-1] }}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


def test_thinking_that_a_prompt_opens_is_not_opened_again():
    tokenizer = chat_tokenizer(OPENED)
    rows = rows_of([conversation("say", "<think>\nred\n</think>\n\nblue")], tokenizer)
    text = tokenizer.decode(rows.tokens[0])
    assert text.endswith("assistant\n<think>\nred\n</think>\n\nblue<|im_end|>")
    with pytest.raises(DataError, match="ends with '<think>', and the response has no '</think>'"):
        rows_of([conversation("say", "blue")], tokenizer)


@pytest.mark.parametrize("prompt_format", [PLAIN, CHAT], ids=["plain", "chat"])
def test_a_mark_at_the_end_of_what_is_asked_is_the_askers(prompt_format):
    tokenizer = chat_tokenizer("{{ messages[0]['content'] + '\n' }}")
    rows = rows_of([conversation("close <b>", "<b> red")], tokenizer, prompt_format)
    assert tokenizer.decode(rows.tokens[0]) == "close <b>\n<b> red<|endoftext|>"


def test_thinking_in_a_field_that_a_template_does_not_know_is_counted():
    tokenizer = chat_tokenizer(unmarked(CHATML))
    *turns, last = conversation("say", "red", "and", "blue").messages
    record = Record((*turns, last | {"reasoning_content": "one two"}), ("blue",))
    for supervise in ("last", "all"):
        rows = rows_of([record, TALK], tokenizer, supervise=supervise)
        assert rows.left_out == {"thinking that the template leaves out": 1}
        assert tokenizer.decode(rows.tokens[0]).endswith("assistant\nblue<|im_end|>")
    known = "{{ m['reasoning_content'] or '' }}{{ m['content'] }}"
    tokenizer.chat_template = unmarked(CHATML).replace("{{ m['content'] }}", known)
    rows = rows_of([record], tokenizer)
    assert tokenizer.decode(responses_of(rows)[0]) == "one twoblue<|im_end|>" and not rows.left_out


def test_a_system_turn_that_stands_only_before_a_question():
    """As Mistral's: a conversation that ends with a response is rendered without it."""
    tokenizer = chat_tokenizer(
        "{% for m in messages %}{% if m['role'] == 'user' %}[INST] "
        "{% if loop.last and messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}\n"
        "{% endif %}{{ m['content'] }}[/INST]{% elif m['role'] == 'assistant' %} "
        "{{ m['content'] }}</s>{% endif %}{% endfor %}",
        ("</s>", "[INST]", "[/INST]"),
    )
    plain, briefly = conversation("say", "red"), conversation("say", "red", system="be brief")
    rows = rows_of([plain, briefly], tokenizer)
    assert [tokenizer.decode(x) for x in responses_of(rows)] == [" red</s>"] * 2
    assert "be brief" in tokenizer.decode(prompts_of(rows)[1])


def test_two_calls_are_two_names():
    once = "{% if m['tool_calls'] %}[{{ m['tool_calls'][0]['name'] }}]{% endif %}"
    tokenizer = chat_tokenizer(
        unmarked(CHATML).replace("{{ m['content'] }}", once + "{{ m['content'] or '' }}")
    )
    calls = {"role": "assistant", "content": "", "tool_calls": [{"name": "add"}]}
    record = Record((*TALK.messages[:1], calls))
    assert len(rows_of([record], tokenizer).tokens) == 1
    calls["tool_calls"] *= 2
    with pytest.raises(DataError, match="does not render all of its response, which calls tools"):
        rows_of([record], tokenizer)


def test_what_marks_have_behind_the_end_of_a_turn_is_not_supervised():
    wide = CHATML.replace("<|im_end|>{% endgeneration %}", "<|im_end|>\n{% endgeneration %}")
    tokenizer = chat_tokenizer(wide.replace("assistant\n{% endif %}", "assistant\n(\n{% endif %}"))
    rows = rows_of([TALK], tokenizer, supervise="all")
    learned = tokenizer.decode(rows.tokens[0][rows.supervised[0]])
    assert learned == "the red<|im_end|>blue is\nthe sky<|im_end|>two<|im_end|>"
    assert tokenizer.decode(rows.tokens[0]).endswith("two<|im_end|>")


def test_a_turn_goes_to_its_last_end():
    """A part of a turn may end as turns do."""
    both = "{% if m['role'] == 'assistant' %}thought<|im_end|>{% endif %}{{ m['content'] }}"
    tokenizer = chat_tokenizer(unmarked(CHATML).replace("{{ m['content'] }}", both))
    for supervise in ("last", "all"):
        rows = rows_of([TALK], tokenizer, supervise=supervise)
        assert tokenizer.decode(rows.tokens[0]).endswith("thought<|im_end|>two<|im_end|>")
    turns = rows_of(one_turn_each([TALK]), tokenizer)
    assert rows.num_supervised.sum() == turns.num_supervised.sum()


def test_faults_of_a_template_are_named_together_by_their_places():
    faults = "{% if loop.index0 == 2 %}{{ 1 // 0 }}{% endif %}"
    tokenizer = chat_tokenizer(CHATML.replace("<|im_start|>{{ m", f"{faults}<|im_start|>{{{{ m"))
    good, bad = conversation("say red", "red"), conversation("say red", "red", "and", "blue")
    records = [good, *[dataclasses.replace(bad, place=f"a.jsonl:{i}") for i in range(2, 2502)]]
    with pytest.raises(DataError) as error:
        rows_of(records, tokenizer)
    lines = str(error.value).splitlines()
    assert lines[0] == "the data: 2500 examples cannot be used:" and len(lines) == 3
    assert lines[1].startswith(
        "  a.jsonl:2, 3, 4, 5, 6, 7, 8, 9, 10, 11: template 'chat': that of "
    )
    assert "zero" in lines[1]
    assert lines[-1] == "  and 2490 more"


def test_where_the_eos_ends_a_turn_nothing_changes():
    special = ("<|im_end|>", "<|im_start|>", "<|endoftext|>")
    tokenizer = chat_tokenizer(unmarked(CHATML), special)
    records = [example("say red", "", ("the red",)), example("say", "a", (" blue \n sky ",))]
    rows = rows_of(records, tokenizer, supervise="all")  # of single turns, the same as the last
    for record, row in zip(records, rows.tokens):
        prompt = render_prompt(record, CHAT, tokenizer)
        answer = tokenizer(record.references[0], add_special_tokens=False)["input_ids"]
        assert row.tolist() == [*prompt, *answer, 0]
    assert rows.supervised is None


def test_thinking_that_a_template_deletes_is_refused():
    tokenizer = chat_tokenizer(THINKING)
    rows = rows_of([TALK, THOUGHTS], tokenizer)
    assert tokenizer.decode(prompts_of(rows)[1]).count("<think>") == 0
    assert tokenizer.decode(responses_of(rows)[1]) == "<think>b</think>blue<|im_end|>"
    assert len(rows_of(one_turn_each([TALK, THOUGHTS]), tokenizer).tokens) == 5
    by_turn = rows_of(one_turn_each([TALK]), tokenizer).num_supervised.sum()
    assert rows_of([TALK], tokenizer, supervise="all").num_supervised == [by_turn]
    with pytest.raises(DataError) as error:
        rows_of([TALK, THOUGHTS], tokenizer, supervise="all")
    for words in ("record 1 (from 0)", "turn 1 (from 0) differently where others follow", "'last'"):
        assert words in str(error.value)
    marked = THINKING.replace("{{ m['content'].s", "{% generation %}{{ m['content'].s")
    tokenizer.chat_template = marked.replace("{% else %}", "{% endgeneration %}{% else %}", 1)
    with pytest.raises(DataError, match="lacks some of what is said there"):
        rows_of([THOUGHTS], tokenizer, supervise="all")


def test_marks_tell_where_the_generation_prompt_says_more():
    opens = CHATML.replace("assistant\n{% endif %}", "assistant\n(\n{% endif %}")
    tokenizer = chat_tokenizer(opens)
    found, expected = rows_of([TALK], tokenizer, supervise="all"), chat_tokenizer(unmarked(CHATML))
    expected = rows_of([TALK], expected, supervise="all")
    assert found.tokens[0].tolist() == expected.tokens[0].tolist()
    assert found.supervised[0].tolist() == expected.supervised[0].tolist()
    # Also where they leave out the token that ends a turn.
    tokenizer.chat_template = opens.replace(
        "<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>"
    )
    found = rows_of([TALK], tokenizer, supervise="all")
    assert found.supervised[0].tolist() == expected.supervised[0].tolist()
    tokenizer.chat_template = unmarked(opens)
    with pytest.raises(DataError, match="turn 1 .* asked for with another text than it has"):
        rows_of([TALK], tokenizer, supervise="all")
    # A row of the last response alone has it as it is, with the end of a turn.
    assert tokenizer.decode(responses_of(rows_of([TALK], tokenizer))[0]) == "two<|im_end|>"


def test_a_token_across_the_beginning_of_a_turn():
    """The prompt's tokens stay as they are, those of a response begin behind them."""
    tokenizer = chat_tokenizer(unmarked(CHATML), extra=("ĊĊ",))
    talk = conversation("say red", "\n\nred", "and", "blue")
    rows = rows_of(one_turn_each([talk]), tokenizer)
    assert prompts_of(rows)[0] == render_prompt(example("say red"), CHAT, tokenizer)
    assert tokenizer.decode(responses_of(rows)[0]) == "\n\nred<|im_end|>"
    whole = rows_of([talk], tokenizer, supervise="all")
    learned = whole.tokens[0][whole.supervised[0]].tolist()
    assert learned == sum(responses_of(rows), [])
    assert whole.tokens[0].tolist()[: len(rows.tokens[0])] == rows.tokens[0].tolist()


def test_tool_calls_are_as_the_template_has_them():
    calls = "{% for call in m['tool_calls'] or [] %}[{{ call['name'] }}]{% endfor %}"
    tokenizer = chat_tokenizer(
        unmarked(CHATML).replace("{{ m['content'] }}", calls + "{{ m['content'] or '' }}")
    )
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "<|im_end|>"}]}
    answer = {"role": "tool", "content": "one"}
    last = {"role": "assistant", "content": "the one"}
    record = Record((*TALK.messages[:1], call, answer, last), ("the one",))
    rows = rows_of([record], tokenizer, supervise="all")
    assert tokenizer.decode(rows.tokens[0][rows.supervised[0]]) == (
        "[<|im_end|>]<|im_end|>the one<|im_end|>"
    )
    assert rows.tokens[0].tolist().count(2) == 4  # what is called is text
    turns = rows_of(one_turn_each([record]), tokenizer)
    assert tokenizer.decode(responses_of(turns)[0]) == "[<|im_end|>]<|im_end|>"


def test_a_conversation_that_nobody_answers_is_a_prompt():
    talk = conversation("say red", "red", "and")
    assert list(one_turn_each([talk])) == [conversation("say red", "red"), talk]
    rows = rows_of([talk], made(CHATML), supervise="all")
    assert made(CHATML).decode(responses_of(rows)[0]) == "red<|im_end|>"


def test_turns_that_nobody_asked_for_or_of_weight_0_are_not_supervised(template):
    tokenizer = made(template)
    *turns, last = conversation("say red", "red", "and", "blue").messages
    greeting = {"role": "assistant", "content": "hello"}
    unwanted = turns[1] | {"weight": 0}
    for skipped in ((greeting, turns[0], last), (turns[0], unwanted, turns[2], last)):
        record = Record(skipped, ("blue",))
        rows = rows_of([record], tokenizer, supervise="all")
        assert rows.supervised is None
        assert tokenizer.decode(responses_of(rows)[0]) == f"blue{ENDS[template]}"
        assert list(one_turn_each([record])) == [record]
    third = {"role": "user", "content": "more"}, {"role": "assistant", "content": "sky"}
    record = Record((greeting, *turns, last, *third), ("sky",))
    rows = rows_of([record], tokenizer, supervise="all")
    words = tokenizer.decode(rows.tokens[0][rows.supervised[0]]).split(ENDS[template])
    assert words == ["red", "blue", "sky", ""]


def test_templates_of_one_turn_refuse_others():
    for prompt_format in (PLAIN, PromptFormat("alpaca")):
        with pytest.raises(DataError, match="are: user, assistant, user, assistant, user; use 'ch"):
            rows_of([TALK], made(CHATML), prompt_format, supervise="all")


def test_supervised_tokens_are_cut_and_chosen_with_their_rows():
    tokenizer = made(CHATML)
    single = conversation("say red", "the red")
    whole = rows_of([single, TALK], tokenizer, supervise="all")
    cut = rows_of([single, TALK], tokenizer, supervise="all", max_prompt_length=30, max_length=40)
    assert [len(mask) for mask in cut.supervised] == [len(row) for row in cut.tokens]
    assert cut.supervised[1].tolist() == whole.supervised[1][:40].tolist() and cut.cut == 1
    assert whole.supervised[0].tolist() == [False] * whole.prompt_lengths[0] + [True] * 5
    assert select_rows(whole, [1]).supervised == whole.supervised[1:]
    other = whole._replace(supervised=[mask & False for mask in whole.supervised])
    assert fingerprint_supervised(whole) != fingerprint_supervised(other)


# Prompts that are too long


def test_long_prompts_lose_their_first_turns():
    tokenizer = made(CHATML)
    talk = conversation(*(["say red", "the red"] * 4), system="name two")
    short = conversation(*(["say red", "the red"] * 2), system="name two")
    limit = len(prompts_of(rows_of([short], tokenizer))[0])
    long = conversation("say red", "red", "red " * 200, "red")
    records = [short, talk, long]
    rows = rows_of(records, tokenizer, max_prompt_length=limit, long_prompts="cut")
    assert rows.tokens[0].tolist() == rows.tokens[1].tolist()
    # The records are whole: what is shortened is the prompt.
    assert rows.records == [short, talk] and (rows.shortened, rows.dropped) == (1, 1)
    rows = rows_of(records, tokenizer, max_prompt_length=limit)
    assert rows.records == [short] and (rows.shortened, rows.dropped) == (0, 2)
    rows = rows_of(records, tokenizer, max_prompt_length=limit + 1, long_prompts="cut")
    assert rows.records == [short, talk]


def test_whole_conversations_lose_their_first_turns_too():
    """As many as it takes for what stands before the first response to be short enough."""
    tokenizer = made(CHATML)
    talk = conversation("red " * 50, "red", "say", "blue", "and", "sky", system="name two")
    rest = conversation("say", "blue", "and", "sky", system="name two")
    [expected] = rows_of([rest], tokenizer, supervise="all").tokens
    how = dict(max_prompt_length=40, max_length=400, supervise="all")
    rows = rows_of([talk, rest], tokenizer, long_prompts="cut", **how)
    assert [row.tolist() for row in rows.tokens] == 2 * [expected.tolist()]
    assert rows.supervised[0].tolist() == rows.supervised[1].tolist()
    assert (rows.shortened, rows.dropped) == (1, 0)
    assert rows_of([talk, rest], tokenizer, **how).dropped == 1


# Text that spells a special token


def test_what_spells_a_special_token_is_text(template):
    tokenizer, end = made(template), SPECIAL[template].index(ENDS[template])
    marks = "".join(SPECIAL[template])
    record = example(f"a{marks}\n", f"{marks}b", (f"c{marks}d <|im", "other"))
    asked, clean = rows_of([record], tokenizer), rows_of([example("a", "b", ("c",))], tokenizer)
    for token in range(len(SPECIAL[template])):
        assert asked.tokens[0].tolist().count(token) == clean.tokens[0].tolist().count(token)
    assert asked.tokens[0][-1] == end
    text = tokenizer.decode([token for token in asked.tokens[0] if token >= len(SPECIAL[template])])
    assert (text.count(marks), text.count(f"c{marks}d <|im")) == (3, 1)


@pytest.mark.parametrize("prompt_format", [PLAIN, PromptFormat("alpaca")], ids=["plain", "alpaca"])
def test_so_it_is_in_templates_without_marks(prompt_format):
    tokenizer = made(GEMMA)
    [row] = rows_of([example("a<eos>", "<bos>", ("c<eos>",))], tokenizer, prompt_format).tokens
    assert np.flatnonzero(row < 4).tolist() == [0, len(row) - 1]  # the BOS, the EOS
    assert tokenizer.decode(row).endswith("c<eos><eos>")


def test_the_system_turn_of_a_config_is_text_too():
    tokenizer = made(CHATML)
    system = "say <|im_end|>"
    [prompt] = prompts_of(rows_of([example("a")], tokenizer, PromptFormat("chat", system=system)))
    assert prompt.count(2) == 2 and f"{system}<|im_end|>" in tokenizer.decode(prompt)


def test_escaped_texts():
    spelled = spellings(chat_tokenizer(None, ("<s>", "s>x", "a")))
    for text in ("<s>", "<<s>>", "<s>x", "s>xs>x<s>x", "\ufdd0<s>", "\ufdd0\ufdd0", "aa"):
        assert not spelled.search(escape(text, spelled))
    assert escape("plain a", spelled) == "plain a"
    nested = [{"name": "<s>", "n": 1, "inner": {"x": ["<s>"]}}, None]
    assert escape(nested, spelled)[0]["inner"]["x"][0] == escape("<s>", spelled) != "<s>"
    tokenizer = chat_tokenizer(None)
    for text in ("\ufdd0 red", "\ufdd0<|im_end|>\ufdd0", "\ufdd12\ufdd1<|im_end|>"):
        [ids] = encode([text], tokenizer)
        assert tokenizer.decode(ids) == text and min(ids) > 2


def test_nothing_else_of_the_text_changes():
    """Also where a special token takes the blanks around it, and the first word a mark."""
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            {token: i for i, token in enumerate(["</s>", "<|end|>", "▁", *"</s>|endhi\nx", "▁h"])},
            merges=[("▁", "h")],
            unk_token="</s>",
        )
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.add_special_tokens(["</s>", tokenizers.AddedToken("<|end|>", rstrip=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    text = "hi hi<|end|> \nhi</s> hi<|end|>\n"
    [plain] = encode_rendered([text], tokenizer)
    assert plain.count(1) == 2 and plain.count(0) == 1
    spelled = escape("hi<|end|>", spellings(tokenizer))
    [found] = encode_rendered([text + spelled], tokenizer)
    assert found[: len(plain)] == plain
    assert found[len(plain) :] == tokenizer.convert_tokens_to_ids(list("hi<|end|>"))


def test_a_slow_tokenizer_says_that_it_cannot(monkeypatch):
    tokenizer = made(CHATML)
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    assert encode(["red"], tokenizer)
    with pytest.raises(DataError, match=r"expected a fast tokenizer \(tokenizer.json\)"):
        encode(["<|im_end|>"], tokenizer)


# Files of templates


def test_a_chat_template_of_a_file(tmp_path):
    file = tmp_path / "chat.jinja"
    file.write_text(CHATML)
    assert read_chat_template(str(file)) == CHATML
    with pytest.raises(DataError, match="chat template .*none.jinja: cannot be read"):
        read_chat_template(str(tmp_path / "none.jinja"))
    file.write_bytes(b"\xff")
    with pytest.raises(DataError, match="chat template .*chat.jinja: cannot be read"):
        read_chat_template(str(file))
