"""What the fields of an example mean, format by format."""

import dataclasses
import datetime
import json

import pyarrow.parquet
import pytest
from helpers.files import write_lines
from helpers.records import example

from promptkd_jax.data.reading import formats
from promptkd_jax.data.reading.formats import FORMATS, Fields, Format, to_record
from promptkd_jax.data.reading.record_stream import read_records
from promptkd_jax.data.reading.records import responses_of, user_record
from promptkd_jax.infra.errors import DataError
from promptkd_jax.training.config.fields import DataConfig


def read(folder, *records, **how):
    path = write_lines(folder / "some.jsonl", *records)
    return read_records(path, **{"need": "response"} | how)


def fault_of(folder, record, **how):
    with pytest.raises(DataError) as error:
        read(folder, record, **how)
    head, _, fault = str(error.value).partition(".jsonl:1: ")
    assert fault, head
    return fault


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


SYSTEM = {"role": "system", "content": "be brief"}
HI = (user("hi"), assistant("yes"))
ALPACA = {"instruction": "hi", "input": ""}


@pytest.mark.parametrize(
    ("format", "fields", "messages"),
    [
        ("messages", {"messages": [user("hi"), assistant("yes")]}, HI),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]},
            HI,
        ),
        ("prompt_completion", {"prompt": "hi", "completion": "yes"}, HI),
        ("prompt_completion", {"prompt": [user("hi")], "completion": [assistant("yes")]}, HI),
        ("prompt_completion", {"prompt": [SYSTEM, user("hi")], "completion": "yes"}, (SYSTEM, *HI)),
        ("prompt_completion", {"prompt": "hi", "completion": [assistant("yes")]}, HI),
        ("question_answer", {"question": "hi", "answer": "yes"}, HI),
        ("instruction", {"instruction": "hi", "output": "yes"}, HI),
        (
            "instruction",
            {"instruction": "hi", "output": "yes", "system": "be brief"},
            (SYSTEM, *HI),
        ),
        (
            "instruction",
            {"instruction": "hi", "output": "yes", "history": [["a", "b"]], "system": "be brief"},
            (SYSTEM, user("a"), assistant("b"), *HI),
        ),
        (
            "question_answer",
            {"question": "hi", "response": "yes", "system_prompt": "be brief"},
            (SYSTEM, *HI),
        ),
        (
            "messages",
            {"system": "be brief", "messages": [user("hi"), assistant("yes")]},
            (SYSTEM, *HI),
        ),
        # As tables have turns.
        ("messages", {"messages": json.dumps([user("hi"), assistant("yes", name=None)])}, HI),
        ("messages", {"messages": [user([{"type": "text", "text": "hi"}]), assistant("yes")]}, HI),
    ],
)
def test_every_format_is_told_by_its_fields(tmp_path, format, fields, messages):
    for name in ("auto", format):
        records = read(tmp_path, fields, format=name)
        assert (records.format, records[0].messages) == (format, messages)
        assert records[0].references == ("yes",)
        assert (records.unanswered, records.unused) == (0, {})


def test_a_conversation_keeps_its_turns_names_and_tool_calls(tmp_path):
    """Arguments are an object, as templates want them; OpenAI writes them as text."""
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    turns = [
        SYSTEM,
        user("one more") | {"name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "1", "name": "add"},
        assistant("it is 2"),
        user("and more?"),
        assistant("3", reasoning_content="2 + 1"),
    ]
    (record,) = read(tmp_path, {"messages": turns, "references": ["3", "three"]})
    function = {"name": "add", "arguments": {"a": 1}}
    turns[2] = assistant("", tool_calls=[call | {"function": function}])
    assert record.messages == tuple(turns)
    assert record.prompt == tuple(turns[:-1])
    assert record.references == ("3", "three")


def test_a_single_turn_says_what_the_template_alpaca_shows(tmp_path):
    (record,) = read(tmp_path, {"question": "a?", "context": "b", "answer": ["c", "d"], "id": 3})
    expected = example("a?", "b", ("c", "d"))
    extra = {"id": 3, "instruction": "a?", "input": "b"}
    assert record == dataclasses.replace(expected, extra=extra)
    assert record.place.endswith("some.jsonl:1")


def test_fields_that_nothing_reads_are_kept_and_named_once(tmp_path, capfd):
    turns = [user("hi"), assistant("yes")]
    records = read(
        tmp_path,
        {"messages": turns, "id": 1, "prompt": "hi", "hint": "for the teacher"},
        {"messages": turns, "id": 2, "prompt": "hi", "hint": None},
    )
    assert records.unused == {"prompt": 2, "hint": 1}  # an id is nothing to ask about
    assert records[0].extra == {"id": 1, "prompt": "hi", "hint": "for the teacher"}
    said = capfd.readouterr().err
    assert said.count("'prompt' (2 records), 'hint' (1 records)") == 1 and "'id'" not in said


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            ALPACA | {"output": "x", "tools": [{"name": "add"}]},
            ["'tools' would be lost", "{'tools': ''}"],
        ),
        (ALPACA | {"output": "x", "images": ["a.png"]}, ["'images' would be lost", "text alone"]),
        (ALPACA | {"output": "x", "history": "b"}, ["'history' is text, and no JSON"]),
        (ALPACA | {"output": "x", "history": {"a": 1}}, ["'history' is dict", "pairs"]),
        (ALPACA | {"output": "x", "history": [["a"]]}, ["'history[0]' is list ['a']"]),
        ({"messages": [SYSTEM, *HI], "system": "no"}, ["'system' beside a system turn"]),
        ({"messages": [*HI, *HI], "history": [["a", "b"]]}, ["'history' beside several turns"]),
    ],
)
def test_what_would_change_the_meaning_is_not_dropped(tmp_path, fields, words):
    fault = fault_of(tmp_path, fields)
    for word in words:
        assert word in fault


@pytest.mark.parametrize("nothing", [[], "[]", "", None])
def test_no_history_is_none(tmp_path, nothing):
    (record,) = read(tmp_path, ALPACA | {"output": "x", "history": nothing})
    assert record == example("hi", "", ("x",))


def test_a_field_is_left_out_where_data_columns_says_so(tmp_path):
    fields = ALPACA | {"output": "x", "tools": [{"name": "add"}], "history": []}
    (record,) = read(tmp_path, fields, columns={"tools": ""})
    assert record == example("hi", "", ("x",))


def test_a_column_that_is_not_there_is_named(tmp_path):
    columns = {"prompt": "querry", "completion": "reply"}
    fault = fault_of(tmp_path, {"query": "a", "reply": "b"}, columns=columns)
    assert "data.columns names 'querry', which is none of the fields" in fault


def test_columns_name_the_fields_of_a_format(tmp_path, capfd):
    fields = {"query": "hi", "gold": "yes", "persona": "be brief", "prompt": "hi!"}
    how = dict(columns=(("prompt", "query"), ("completion", "gold"), ("system", "persona")))
    (record,) = read(tmp_path, fields, **how)
    assert record.messages == (SYSTEM, *HI)
    # The field that had the name already is nobody's now.
    assert "fields that nothing reads: 'prompt' (1 records)" in capfd.readouterr().err
    (record,) = read(tmp_path, {"query": "hi", "gold": "yes"}, **how)
    assert record.messages == HI
    assert "no record has the field 'persona' of data.columns" in capfd.readouterr().err
    columns = DataConfig.__dataclass_fields__["columns"].metadata["spec"]
    assert columns.fault({"prompt": "query"}) == "" == columns.fault((("system", ""),))
    assert "'promt' is none of ours: messages, " in columns.fault({"promt": "query"})
    assert "names in the data by ours" in columns.fault({"prompt": 3})
    assert DataConfig(columns={"prompt": "query"}).columns == (("prompt", "query"),)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"query": "hi"}, ["'query' are of no known format", "'messages'", "data.columns"]),
        ({"mesages": []}, ["did you mean messages?", "{'messages': 'THEIR NAME'}"]),
        ({"text": "hi"}, ["no known format", "config.data.corpus"]),
        ({"question": "hi", "answers": "yes"}, ["'answer' is missing or null", "'THEIR NAME'"]),
        ({"messages": []}, ["'messages' is list [], expected a list of turns"]),
        ({"messages": "hi"}, ["'messages' is text, and no JSON"]),
        ({"messages": ["hi"]}, ["'messages[0]' is str 'hi'", "role, content"]),
        (
            {"messages": [{"role": "user", "contents": "a"}]},
            ["'messages[0].content' is missing or null (has: 'role', 'contents')"],
        ),
        (
            {"messages": [{"role": "system", "contents": "Be brief."}, user("a"), assistant("b")]},
            ["'messages[0].content' is missing or null (has: 'role', 'contents')"],
        ),
        (
            {"messages": [user("a"), {"role": "assistant", "contents": "b"}]},
            ["'messages[1].content' is missing or null (has: 'role', 'contents')"],
        ),
        ({"messages": [{"role": "judge", "content": "a"}]}, ["'messages[0]'", "'judge'", "system"]),
        ({"messages": [user(" "), assistant("a")]}, ["'messages[0].content' is empty"]),
        ({"messages": [user("a"), assistant(3)]}, ["'messages[1].content' is int 3"]),
        ({"messages": [assistant("a")]}, ["no turn of the user"]),
        ({"messages": [user([{"type": "image_url"}])]}, ["the part dict", "text alone"]),
        (
            {"messages": [user("a"), assistant("b", tool_calls=3)]},
            ["'messages[1].tool_calls' is int 3"],
        ),
        (
            {"messages": [user("a"), assistant("b", reasoning_content="\ud83d")]},
            ["'messages[1]' has half a surrogate pair"],
        ),
        (
            {"conversations": [{"from": "human", "value": "a\udc00"}]},
            ["'conversations[0].value' has half a surrogate pair at character 2"],
        ),
    ],
)
def test_a_record_that_cannot_be_used_is_named_for_what_it_is(tmp_path, fields, words):
    fault = fault_of(tmp_path, fields)
    for word in words:
        assert word in fault


def test_all_records_of_a_source_have_one_format(tmp_path):
    with pytest.raises(DataError, match=r"some\.jsonl:2: field 'question' is missing"):
        read(tmp_path, {"question": "a", "answer": "b"}, {"prompt": "a", "completion": "b"})
    assert "field 'prompt' is missing" in fault_of(
        tmp_path, {"question": "a", "answer": "b"}, format="prompt_completion"
    )


@pytest.mark.parametrize(
    "nothing", [{"output": None}, {"output": ""}, {"output": " "}, {"output": []}]
)
def test_empty_answers_are_dropped_and_counted_where_one_is_needed(tmp_path, nothing, capfd):
    records = [ALPACA | {"output": "b"}, ALPACA | nothing]
    found = read(tmp_path, *records)
    assert (len(found), found.unanswered) == (1, 1)
    said = capfd.readouterr().err
    assert "some.jsonl: 1 records left out, without a response as its last turn" in said
    found = read(tmp_path, *records, need="nothing")
    assert (found[1].references, found.unanswered) == ((), 0)
    with pytest.raises(DataError, match="none of 2 records has a response as its last turn; exp"):
        read(tmp_path, records[1], records[1])


def test_an_answer_without_its_field_is_a_mistake_where_one_is_needed(tmp_path):
    assert read(tmp_path, ALPACA, need="nothing")[0].references == ()
    assert "field 'output' is missing or null (has: 'instruction'" in fault_of(tmp_path, ALPACA)


@pytest.mark.parametrize("last", [[], [assistant("  ")]])
def test_a_conversation_without_a_last_answer_is_an_unanswered_prompt(tmp_path, last):
    turns = [*HI, user("and?"), *last]
    found = read(tmp_path, {"messages": turns}, {"messages": list(HI)})
    assert (len(found), found.unanswered) == (1, 1)
    (record,) = read(tmp_path, {"messages": turns}, need="nothing")
    assert record.messages == record.prompt == (*HI, user("and?"))
    assert record.references == ()
    # It has a response all the same, in another turn.
    assert len(read(tmp_path, {"messages": turns}, need="some response")) == 1


def test_a_tool_call_is_a_response_and_no_text_to_compare_with(tmp_path):
    call = assistant("", tool_calls=[{"function": {"name": "add", "arguments": {"a": None}}}])
    turns = [*HI, user("and?"), call]
    (record,) = read(tmp_path, {"messages": turns})
    assert record.messages == (*HI, user("and?"), call)
    assert (record.prompt, record.references) == ((*HI, user("and?")), ())
    found = read(tmp_path, {"messages": turns}, {"messages": list(HI)}, need="references")
    assert (len(found), found.unanswered) == (1, 1)


@pytest.mark.parametrize(
    "called",
    [
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
        {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
        {"role": "Assistant", "content": "", "tool_calls": [{"name": "f", "arguments": "{}"}]},
    ],
)
def test_calls_in_the_dialects_that_people_have(tmp_path, called):
    turns = [{"role": "developer", "content": "be brief"}, user("hi"), called]
    turns += [{"role": "function", "name": "f", "content": "3"}, assistant("3", tool_calls=[])]
    (record,) = read(tmp_path, {"messages": turns})
    system, _, call, result, last = record.messages
    assert (system["role"], result["role"], last) == ("system", "tool", assistant("3"))
    function = call["tool_calls"][0].get("function", call["tool_calls"][0])
    assert (function, call["role"]) == ({"name": "f", "arguments": {}}, "assistant")
    turns[2] = assistant("", tool_calls=[{"function": "f"}])
    assert "'messages[2].tool_calls[0]' is dict" in fault_of(tmp_path, {"messages": turns})


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}])
def test_a_turn_that_is_not_to_be_learned_from_says_so(tmp_path, mark):
    """As fine-tuning services write it; an empty turn is none to learn from either."""
    greeting, red, blue = assistant("hello"), assistant("red"), assistant("blue")
    turns = [greeting, user("a"), red | mark, user("b"), assistant(" "), user("c"), blue]
    (record,) = read(tmp_path, {"messages": turns})
    assert list(responses_of(record.messages)) == [6]
    # Where that is the last, the one before is the response, if there is one.
    turns = [user("a"), red | {"weight": 1}, user("b"), blue | mark, user("c"), blue | mark]
    (record,) = read(tmp_path, {"messages": turns})
    assert (record.references, len(record.messages)) == (("red",), 2)
    (record,) = read(tmp_path, {"messages": turns[2:]}, need="nothing")
    assert (record.references, len(record.messages)) == ((), 3)
    fault = fault_of(tmp_path, {"messages": [user("a"), red | {"weight": 0.5}]})
    assert "'messages[1].weight' is float 0.5, expected 0 or 1" in fault


def test_what_a_turn_has_beside_is_as_json_has_it(tmp_path):
    """Tables also have dates; arguments that other rows have are none of a call."""
    table = pyarrow.Table.from_pylist(
        [
            {"messages": [{"role": "user", "content": "a", "day": datetime.date(2026, 1, 2)}]},
            {"messages": [user("a"), assistant("b", tool_calls=[{"name": "f", "size": 1}])]},
        ]
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    first, second = read_records(str(tmp_path / "a.parquet"))
    assert first.messages == (user("a") | {"day": "2026-01-02"},)
    assert second.messages[1] == assistant("b", tool_calls=[{"name": "f", "size": 1}])
    assert json.dumps([first.messages, second.messages])


def test_the_last_turn_of_a_prompt_is_not_the_beginning_of_the_completion(tmp_path):
    for completion in ("sure", [assistant("sure")]):
        fields = {"prompt": [user("hi"), assistant("I am")], "completion": completion}
        assert "'prompt' ends with a turn of the assistant" in fault_of(tmp_path, fields)
    fields["completion"] = [user("and?"), assistant("yes")]
    assert len(read(tmp_path, fields)[0].messages) == 4


def test_a_format_is_a_function_and_its_entry(tmp_path, monkeypatch):
    """As CONTRIBUTING.md says."""

    def riddle(fields: Fields):
        return user_record(f"What is {fields.text('riddle')}?", fields.references("solution"))

    entry = Format(riddle, ("riddle", "solution"), '{"riddle": "…", "solution": "…"}')
    monkeypatch.setitem(FORMATS, "riddle", entry)
    (record,) = read(tmp_path, {"riddle": "red", "solution": "a colour", "id": 1})
    assert record == user_record("What is red?", ("a colour",), id=1)
    (record,) = read(tmp_path, {"enigma": "red", "solution": "a"}, columns={"riddle": "enigma"})
    assert record.prompt_text == "What is red?"
    assert "solution" in formats.column_names()


def test_an_empty_last_turn_gives_way_to_the_references():
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": " "}]
    both = {"messages": turns, "references": ["gold"]}
    record, _ = to_record(both, "messages", need_output=True)
    assert record.references == ("gold",) and record.messages[-1]["content"] == "gold"
    record, _ = to_record({"messages": turns}, "messages", need_output=True)
    assert record.references == () and len(record.messages) == 1
