"""What is said of data before training: counts, lengths, rows, overlap and warnings."""

import io
import re

import numpy as np
import pytest
from helpers import tiny
from rich.console import Console

from promptkd_jax.data.reading.records import Record, user_record
from promptkd_jax.data.rows import Rows, tokenize
from promptkd_jax.data.templates import PromptFormat
from promptkd_jax.evaluation.data_page import bin_edges, show_data, write_data_page
from promptkd_jax.evaluation.data_report import Piece, Split, describe_data
from promptkd_jax.infra.files import to_path
from promptkd_jax.models.decoder import Decoder
from promptkd_jax.models.families.registry import from_hugging_face
from promptkd_jax.models.model import Model

PLAIN = PromptFormat("plain")
SIZES = dict(max_prompt_length=16, max_length=24)
TRAIN = [("say red", "the red"), ("say blue and green", "blue"), ("name the colour of grass", "x")]


def model(name="student", *, positions=128, chat_template=None) -> Model:
    """A model without parameters."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = chat_template
    config = tiny.llama_config(width=16, depth=1, vocab_size=len(tokenizer))
    config |= {"max_position_embeddings": positions}
    return Model(name, Decoder(from_hugging_face(config)), None, config, tokenizer, (0,))


def rows_of(pairs, **sizes) -> Rows:
    records = [user_record(text, (answer,) if answer else ()) for text, answer in pairs]
    return tokenize(records, tiny.tokenizer(), PLAIN, eos_id=0, **SIZES | sizes)


def described(train=TRAIN, held_out=(), student=None, teacher=None, **more):
    """The report of pairs of prompt and response, or of rows."""
    splits = [
        Split(name, data if isinstance(data, Rows) else rows_of(data), PLAIN)
        for name, data in (("train", train), ("dev", held_out))
        if data
    ]
    return describe_data(splits[:1], splits[1:], student or model(), teacher, **SIZES, **more)


def table(counts):
    return [dict(zip(counts.header, row)) for row in counts.rows]


def shown(report, **how) -> str:
    file = io.StringIO()
    show_data(report, Console(file=file, **how))
    return file.getvalue()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_records_rows_dropped_and_cut_are_counted():
    pairs = [*TRAIN, ("say " * 17, "red"), ("say red", "the blue " * 20), ("say a", "")]
    (row,) = table(described(pairs).counts)
    assert row == {
        "set": "train",
        "records": "6",
        "dropped": "1",
        "rows": "5",
        "with a response": "4",
        "cut": "1",
        "ending with EOS": "3",
    }
    assert described(pairs).notes[0] == (
        "Dropped: prompts of more than 16 tokens. Cut: responses that end beyond 24 tokens of "
        "prompt and response."
    )


def test_what_reading_left_out_is_a_column_for_each_reason():
    splits = (
        Split("train", rows_of(TRAIN)._replace(left_out={"empty answers": 3}), PLAIN),
        Split("dev", rows_of(TRAIN)._replace(left_out={"unknown field 'id'": 1}), PLAIN),
    )
    first, second = table(describe_data(splits[:1], splits[1:], model(), **SIZES).counts)
    assert (first["empty answers"], first["unknown field 'id'"]) == ("3", "0")
    assert (second["empty answers"], second["unknown field 'id'"]) == ("0", "1")


def test_lengths_are_those_of_prompts_and_of_responses_with_their_end():
    rows = rows_of([("say red", "the red"), ("say blue", "")])
    lengths = {(one.split, one.part): one.tokens.tolist() for one in described(rows).lengths}
    starts = rows.prompt_lengths.tolist()
    assert lengths["train", "prompt"] == starts
    assert lengths["train", "response"] == [len(rows.tokens[0]) - starts[0], 0]
    assert [one.part for one in described([("say red", "")]).lengths] == ["prompt"]


@pytest.mark.parametrize(("low", "high"), [(0, 0), (3, 14), (3, 15), (0, 512), (7, 1000)])
def test_bins_hold_every_length_once(low, high):
    edges = bin_edges(low, high)
    assert edges[0] == low and edges[-2] <= high < edges[-1] and len(edges) <= 13
    assert len(set(np.diff(edges))) == 1
    lengths = np.arange(low, high + 1)
    assert np.histogram(lengths, edges)[0].sum() == len(lengths)


def test_rows_are_shown_as_the_model_sees_them():
    first, *_, last = described([("say red", "the red"), *TRAIN]).rows
    assert first.pieces == (
        Piece("say red\n", supervised=False, special=False),
        Piece("the red", supervised=True, special=False),
        Piece("<end>", supervised=True, special=True),
    )
    assert [first.index, last.index] == [0, 3]


def test_every_supervised_turn_is_marked():
    tokenizer = tiny.tokenizer()
    words = ["say red", " the red", "<end>", " and blue", " the blue", "<end>"]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in words]
    learned = [False, True, True, False, True, True]
    tokens = np.concatenate(ids).astype(np.int32)
    supervised = np.concatenate([[mark] * len(part) for mark, part in zip(learned, ids)])
    rows = Rows([tokens], np.array([len(ids[0])]), [Record(())], 0, supervised=[supervised])
    report = described(rows)
    found = [(piece.text, piece.supervised) for piece in report.rows[0].pieces]
    assert found == list(zip(words, learned))
    assert "say red⟦ the red«<end>»⟧ and blue⟦ the blue«<end>»⟧" in shown(report)
    by_part = {one.part: int(one.tokens[0]) for one in report.lengths}
    assert by_part == {"prompt": len(ids[0] + ids[3]), "response": int(supervised.sum())}


def test_text_that_spells_a_special_token_is_not_shown_as_one():
    tokenizer = tiny.tokenizer()
    ids = np.array(tokenizer.convert_tokens_to_ids(list("<end>")) + [0], np.int32)
    rows = Rows([ids], np.array([2]), [Record(())], 0)
    assert "<e⟦nd>«<end>»⟧" in shown(described(rows))


def test_a_terminal_obeys_no_text_of_the_data():
    rows = rows_of([("say \x1b[31m\x07 red", "the\x00 red — 天")], max_length=48)
    text = shown(described(rows))
    assert "say \\x1b[31m\\x07 red" in text and "the\\x00 red — 天" in text
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", text)


def test_colours_in_a_terminal_and_marks_elsewhere(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as continuous integration has it
    monkeypatch.delenv("NO_COLOR", raising=False)
    report = described()
    plain = shown(report)
    assert "say red\n⟦the red«<end>»⟧" in plain and "\x1b" not in plain
    file = Terminal()
    show_data(report, Console(file=file, force_terminal=True, color_system="standard", width=30))
    assert "\x1b[32mthe red\x1b[0m\x1b[1;32m<end>\x1b[0m" in file.getvalue()
    assert "⟦" not in file.getvalue()
    file = Terminal()
    show_data(report, Console(file=file, force_terminal=True, no_color=True))
    assert "⟦the red«<end>»⟧" in file.getvalue(), "where colours are not wanted"


def test_a_histogram_in_the_terminal_counts_rows():
    lines = shown(described([("say red", "the")] * 3 + [("say red and", "the")])).splitlines()
    start = lines.index("train: prompt, tokens")
    assert lines[start + 1].endswith("  3") and lines[start + 2].endswith("  1")
    assert lines[start + 1].count("█") == 40 and lines[start + 2].count("█") == 14


def test_held_out_prompts_that_were_learned_from_are_told():
    long = "name one colour of the sky and say two colours of grass and fire or of a red name"
    train = [*TRAIN, (long, "x")]
    held_out = [("Say red!", "y"), (long.replace("fire", "blue"), "y"), ("name three fires", "y")]
    train, held_out = (
        rows_of(pairs, max_prompt_length=200, max_length=300) for pairs in (train, held_out)
    )
    report = described(train, held_out)
    (overlap,) = report.overlaps
    assert (overlap.split, overlap.prompts, overlap.same, overlap.near) == ("dev", 3, 1, 1)
    assert [(pair.held_out, pair.train) for pair in overlap.pairs] == [
        ("Say red!", "say red"),
        (long.replace("fire", "blue"), long),
    ]
    (warning,) = report.warnings
    assert "dev: 2 of 3 prompts are in the training data, 1 of them in the same words" in warning
    assert described(TRAIN, [("name three fires", "y")]).warnings == ()


def test_a_system_turn_that_all_share_makes_no_duplicates():
    system = {"role": "system", "content": "You are a helpful assistant that answers in one word."}

    def rows(text):
        record = Record((system, {"role": "user", "content": text}))
        return rows_of([(text, "")])._replace(records=[record])

    assert described(rows("say red"), rows("say blue")).overlaps[0].near == 0
    assert described(rows("say red"), rows("say red")).overlaps[0].same == 1


def test_rows_longer_than_a_model_was_trained_for_are_told_by_model():
    train = [("say red", "the"), ("say blue", "the red of fire"), ("say a", "the blue of sky " * 2)]
    lengths = [len(row) for row in rows_of(train).tokens]
    few, some = sorted(lengths)[0], sorted(lengths)[1]
    models = dict(student=model(positions=few), teacher=model("teacher", positions=some))
    report = described(train, **models)
    student, teacher = report.warnings
    assert student == (
        f"train: 2 of 3 rows have more tokens, up to {max(lengths)}, than the {few} positions that "
        "student was trained for; expected a lower max_length"
    )
    assert "1 of 3 rows" in teacher and f"the {some} positions that teacher was" in teacher


def test_data_from_which_no_student_learns_to_stop_are_told():
    cut = rows_of([("say red", "the blue " * 20), ("say blue", "the red " * 20)])
    (warning,) = described(cut).warnings
    assert "train: none of 2 rows with a response ends with the end of sequence (<end>)" in warning
    assert "2 are cut" in warning
    assert described([*[("say red", "the blue " * 20)] * 2, ("say a", "b")]).warnings == ()
    assert described([("say red", "")]).warnings == (), "prompts have no response to end"


def test_prompts_that_are_made_in_another_way_are_told():
    train = Split("train", rows_of(TRAIN), PLAIN)
    other = Split("dev", rows_of([("name one", "y")]), PromptFormat("plain", system="Be short."))
    same = Split("test", rows_of([("name two", "y")]), PromptFormat("plain", date="2026-11-27"))
    formats = {"student": PLAIN, "teacher": PromptFormat("alpaca")}
    how = dict(trained_formats=formats, **SIZES)
    dev, teacher = describe_data([train], [other, same], model(), **how).warnings
    assert dev == (
        "dev: its prompts are made by template 'plain', system 'Be short.', those of train by "
        "template 'plain'; expected one for both"
    )
    assert teacher == (
        "train: its prompts are made by template 'plain', and teacher was trained with template "
        "'alpaca'"
    )


def test_a_teacher_with_another_chat_template_is_told():
    split = Split("train", rows_of(TRAIN), PromptFormat("chat"))
    models = model(chat_template="{{ 1 }}"), model("teacher", chat_template="{{ 2 }}")
    (warning,) = describe_data([split], [], *models, **SIZES).warnings
    assert "by the chat template of student, and teacher has another" in warning
    assert describe_data([split], [], models[0], models[0], **SIZES).warnings == ()


def test_a_page_says_the_same_and_escapes_all(tmp_path):
    report = described([("say <b>", "the </div>")], [("say <b>", "the")])
    file = to_path(tmp_path / "new" / "data.html")
    write_data_page(file, report, title="A & <B>", config_text="a = '<&>'")
    page = file.read_text()
    assert (
        'say &lt;b&gt;\n<mark>the &lt;/div&gt;</mark><mark><b class="special">&lt;end&gt;</b>'
        in page
    )
    assert "say <b>" not in page and "A &amp; &lt;B&gt;" in page
    assert page.count("<svg") == 2 and "1 of 1 prompts are in the training data" in page
    assert "Warning</b> dev:" in page and "Dropped: prompts of more than 16 tokens" in page
