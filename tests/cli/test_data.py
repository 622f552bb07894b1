"""The command `promptkd data`: the rows of a config or a file, without weights."""

import json
import pathlib

import pytest
from helpers import tiny

from promptkd_jax.cli.main import main
from promptkd_jax.models.load import RECORD


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A config with its data, and models whose weights are gone."""
    folder = tmp_path_factory.mktemp("data") / "inputs"
    tiny.short_config(folder)
    for weights in folder.glob("*/*.safetensors"):
        weights.unlink()
    (folder / "config.py").write_text(
        "import pathlib\n"
        "from helpers import tiny\n"
        f"def get_config(): return tiny.short_config(pathlib.Path({str(folder)!r}))\n"
    )
    return folder


@pytest.fixture
def said(folder, capsys):
    """said(*arguments): what the command prints, or the message that it ends with."""

    def said(*arguments: str) -> str:
        try:
            main(["data", *arguments])
        except SystemExit as end:
            return str(end.code)
        return capsys.readouterr().out

    return said


def counts(text: str) -> dict[str, list[str]]:
    """The figures of the first table, by set."""
    lines = text[text.index("| set ") :].split("\n\n")[0].splitlines()[2:]
    cells = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    return {name: figures for name, *figures in cells}


def test_a_config_shows_the_rows_of_its_run(folder, said, tmp_path):
    text = said(f"--config={folder / 'config.py'}", f"--output={tmp_path / 'new' / 'data.html'}")
    assert counts(text) == {
        "train": ["12", "0", "12", "12", "0", "12"],
        "dev": ["5", "0", "5", "5", "0", "5"],
    }
    assert "No responses of the data are learned from in: warmup, promptkd." in text
    assert "train, row 0 (from 0)\nsay red red\n⟦the red«<end>»⟧" in text
    assert "warning: dev: 5 of 5 prompts are in the training data, 5 of them in the same" in text
    page = (tmp_path / "new" / "data.html").read_text()
    assert "<h1>Data: tiny</h1>" in page and "<mark>the red</mark>" in page
    assert "&#34;max_prompt_length&#34;: 16" in page


def test_overrides_and_test_sets_are_taken(folder, said, tmp_path):
    new = tiny.write_data(tmp_path / "train.jsonl", 3)
    how = (f"--config={folder / 'config.py'}", "--test", new, str(folder / "dev.jsonl"))
    text = said(*how, "--config.data.dev_rows=2", "--config.data.max_length=18")
    figures = counts(text)
    # "train" and "dev" are names already.
    assert list(figures) == ["train", "dev", new, str(folder / "dev.jsonl")]
    assert figures["dev"][0] == "2" and figures[new][0] == "3"
    assert "responses that end beyond 18 tokens" in text


def test_how_data_are_read_is_said_in_one_place(folder, said):
    how = ('--columns={"prompt": "query"}', "--format=messages")
    text = said(f"--config={folder / 'config.py'}", *how)
    assert text.endswith("--format, --columns: are for --data; a config has fields for that")


def test_what_reading_left_out_is_told(folder, said, tmp_path):
    """Of gold rows, those without a response; and fields that nothing reads."""
    records = [
        {"instruction": f"say {x}", "output": x, "mood": x} for x in ("red", "blue", "green")
    ]
    records.append({"instruction": "say a", "output": " "})
    file = tmp_path / "gold.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    how = (f"--config={folder / 'config.py'}", f"--config.data.train={file}")
    gold = ("--config.stages[0].targets=gold", "--config.stages[0].batch_size=2")
    text = said(*how, *gold, "--config.stages[1].batch_size=2")
    header = next(line for line in text.splitlines() if line.startswith("| set "))
    columns = [cell.strip() for cell in header.split("|")]
    assert columns[-3:-1] == ["without a response as its last turn", "unused field 'mood'"]
    assert counts(text)["train"][-2:] == ["1", "3"]


def test_a_file_needs_a_model_and_no_config(folder, said):
    how = (f"--data={folder / 'train.jsonl'}", f"--model={folder / 'student'}")
    lengths = ("--max-prompt-length=16", "--max-length=8")
    text = said(*how, *lengths, "--template=plain", f"--test={folder / 'dev.jsonl'}")
    assert "max_prompt_length 16 and max_length 8: expected" in text
    text = said(*how, "--max-prompt-length=6", "--max-length=8", "--template=plain")
    assert "template plain (as given)" in text
    assert counts(text) == {"train": ["12", "0", "12", "12", "12", "0"]}
    assert "warning: train: none of 12 rows with a response ends with the end of sequence" in text


def test_the_record_of_a_training_is_followed_and_another_template_told(folder, said, tmp_path):
    student = tmp_path / "student"
    student.mkdir()
    for file in (folder / "student").iterdir():
        (student / file.name).write_bytes(file.read_bytes())
    asked = {"template": "plain", "max_prompt_length": 6, "max_length": 11}
    (student / RECORD).write_text(json.dumps(asked))
    how = (f"--data={folder / 'train.jsonl'}", f"--model={student}")
    text = said(*how)
    assert "template plain (that of the training)" in text and "warning" not in text
    assert "prompts of more than 6 tokens" in text and "beyond 11 tokens" in text
    text = said(*how, "--template=alpaca", "--max-prompt-length=400", "--max-length=500")
    assert f"template 'alpaca', and {student} was trained with template 'plain'" in text
    # By bytes, Alpaca's text is longer than the 128 positions.
    assert f"than the 128 positions that {student} was trained for" in text


def test_prompts_of_the_teacher_cannot_be_shown_before_it_writes_them(folder, said, tmp_path):
    config = f"--config={folder / 'config.py'}"
    teacher = ("--config.data.train=teacher", "--config.evaluation.references=teacher")
    text = said(config, *teacher)
    assert list(counts(text)) == ["dev"] and "--- dev, row 0" in text
    assert "Train: the teacher writes its prompts when the run begins." in text
    both = ("--config.data.dev=teacher", "--config.data.dev_rows=2")
    assert "the teacher writes all of it when the run begins" in said(config, *teacher, *both)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --config FILE, or --data FILE and --model MODEL"),
        (["--model=m"], "give --config FILE, or --data FILE and --model MODEL"),
        (["--data=d"], "--data: give --model, whose tokenizer the rows are made with"),
        (["--data=d", "--model=m", "--config=c"], "unknown arguments beside --data: --config=c"),
        (["--data=d", "--model=no/such/m"], "no such folder or file"),
        (["--config=c", "--template=chat", "--split=a"], "--template, --split: are for --data"),
    ],
)
def test_what_is_missing_is_said(arguments, message, said):
    assert message in said(*arguments)


def test_an_output_that_cannot_be_written_is_named(folder, said, tmp_path):
    (tmp_path / "file").write_text("")
    output = tmp_path / "file" / "data.html"
    assert f"--output {output}: " in said(f"--config={folder / 'config.py'}", f"--output={output}")


def test_the_weights_are_gone(folder):
    assert not list(pathlib.Path(folder).rglob("*.safetensors"))
