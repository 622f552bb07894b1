"""Scores of answers, closeness to a teacher, and the commands that show them."""

import io
import json
import pathlib
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import bucket, tiny
from helpers.records import example

from promptkd_jax.cli.main import main
from promptkd_jax.data.rows import tokenize
from promptkd_jax.data.templates import PromptFormat
from promptkd_jax.evaluation import student_metrics
from promptkd_jax.inference import generate
from promptkd_jax.infra.files import read_text
from promptkd_jax.models.decoder import head
from promptkd_jax.models.io.export import save_model
from promptkd_jax.models.load import load_model
from promptkd_jax.models.sampler import Sampling


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("models")
    tiny.write_model(folder / "teacher", width=32, depth=2, seed=0)
    tiny.write_model(folder / "student", width=16, depth=2, seed=1)
    tiny.write_data(folder / "one.jsonl", 5)
    tiny.write_data(folder / "two.jsonl", 3)
    return folder


@pytest.fixture(scope="module")
def rows(folder):
    model = load_model(str(folder / "student"))
    records = [example("say red", "", ("the blue sky",)), example("name two", "", ("a fire",))]
    records.append(example("say the colour of grass", "", ("green",)))
    how = dict(prompt_format=PromptFormat("plain"), max_prompt_length=16, max_length=24, eos_id=0)
    return tokenize(records, model.tokenizer, **how)


def dense_closeness(teacher, student, rows):
    """KL(p || q) and top-1 agreement, position by position."""
    kl, same, count = 0.0, 0, 0
    for tokens, start in zip(rows.tokens, rows.prompt_lengths):
        p, q = (
            jax.nn.log_softmax(
                m.decoder.apply({"params": m.params}, jnp.asarray(tokens[None])) @ head(m.params).T
            )[0, start - 1 : len(tokens) - 1]
            for m in (teacher, student)
        )
        kl += float((jnp.exp(p) * (p - q)).sum())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        count += len(p)
    return kl / count, same / count


def test_closeness_is_the_mean_over_response_tokens(folder, rows):
    teacher, student = (load_model(str(folder / name)) for name in ("teacher", "student"))
    how = dict(batch_size=2, length=24, vocab_size=len(student.tokenizer))
    found = student_metrics.teacher_metrics(teacher, student, rows, **how)
    kl, same = dense_closeness(teacher, student, rows)
    np.testing.assert_allclose(found["kl"], kl, rtol=1e-4)
    assert found["agreement"] == pytest.approx(same)
    itself = student_metrics.teacher_metrics(teacher, teacher, rows, **how)
    assert itself["kl"] == pytest.approx(0, abs=1e-5) and itself["agreement"] == 1


def test_answers_do_not_depend_on_where_writing_starts(folder, rows):
    model = load_model(str(folder / "student"))
    how = dict(
        sampling=Sampling(eos_ids=(0,)),
        prompt_capacity=16,
        max_new_tokens=8,
        batch_size=2,
        key=jax.random.key(3),
    )
    whole = list(generate.generate_responses(model, rows, **how))
    rest = list(generate.generate_responses(model, rows, **how, first=2))
    assert len(whole) == 3 and len(rest) == 1
    np.testing.assert_array_equal(whole[2], rest[0])


def command(folder, output, *more: str) -> list[str]:
    data = [str(folder / "one.jsonl"), str(folder / "two.jsonl")]
    lengths = ["--max-prompt-length=16", "--max-length=24", "--template=plain"]
    return [
        f"--model={folder / 'student'}",
        "--data",
        *data,
        f"--output={output}",
        *lengths,
        *more,
    ]


def test_evaluate_reads_other_names_of_columns(folder, tmp_path):
    content = json.dumps([{"query": "say red", "gold": "red"}, {"query": "say a", "gold": ""}])
    (tmp_path / "set.json").write_text(content)
    columns = {"prompt": "query", "completion": "gold"}
    more = ["--seeds", "10", f"--columns={json.dumps(columns)}", "--format=prompt_completion"]
    main(["evaluate", *command(folder, tmp_path, *more, "--data", str(tmp_path / "set.json"))])
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert found["sets"]["set"]["rows"] == 1
    assert found["settings"]["columns"] == columns
    assert found["settings"]["format"] == "prompt_completion"


def test_evaluate_writes_every_set_and_seed(folder, tmp_path, capsys):
    main(["evaluate", *command(folder, tmp_path, "--seeds", "10", "20")])
    found = json.loads((tmp_path / "evaluation.json").read_text())["sets"]
    assert found.keys() == {"one", "two"} and found["one"]["rows"] == 5
    for one in found.values():
        scores = [seed["rougeL"] for seed in one["seeds"].values()]
        assert len(scores) == 2
        assert one["rougeL"]["mean"] == pytest.approx(np.mean(scores))
        assert one["rougeL"]["std"] == pytest.approx(np.std(scores, ddof=1))
    lines = (tmp_path / "two-seed20.jsonl").read_text().splitlines()
    assert len(lines) == 3 and {"messages", "references", "answer"} <= json.loads(lines[0]).keys()
    assert "ROUGE-L" in capsys.readouterr().out


def test_evaluate_says_what_is_wrong(folder, tmp_path):
    (folder / "bad.jsonl").write_text('{"instruction": "say red", "output": "red"}\n{"instr\n')
    arguments = [f"--model={folder / 'student'}", "--data", str(folder / "bad.jsonl")]
    with pytest.raises(SystemExit, match=r"bad.jsonl:2: broken JSON"):
        main(["evaluate", *arguments, f"--output={tmp_path}", "--template=plain"])
    with pytest.raises(SystemExit, match="no such folder or file"):
        main(["evaluate", "--model=nowhere", "--data=x.jsonl", f"--output={tmp_path}"])


def trained_with(folder, name: str, text: str) -> pathlib.Path:
    """A copy of the student with this beside it."""
    copy = shutil.copytree(folder / "student", folder / name)
    (copy / "promptkd.json").write_text(text)
    return copy


def settings(output) -> dict:
    return json.loads((output / "evaluation.json").read_text())["settings"]


def test_a_model_is_asked_as_it_was_trained(folder, tmp_path, capsys):
    """Template and lengths are those beside the model, where no flag says otherwise."""
    record = {"template": "plain", "max_prompt_length": 16, "max_length": 24, "later": 1}
    model = trained_with(folder, "recorded", json.dumps(record))
    arguments = [f"--model={model}", f"--data={folder / 'one.jsonl'}", "--seeds=1"]
    main(["evaluate", *arguments, f"--output={tmp_path / 'a'}"])
    assert "template plain (that of the training)" in capsys.readouterr().out
    wanted = {"template": "plain", "max_prompt_length": 16, "max_length": 24}
    assert wanted.items() <= settings(tmp_path / "a").items()
    main(["evaluate", *command(folder, tmp_path / "b", "--seeds=1")])  # which says all of it
    answers = [(tmp_path / x / "one-seed1.jsonl").read_text() for x in "ab"]
    assert answers[0] == answers[1]
    asked = [f"--model={model}", "--request=say red", "--max-new-tokens=6"]
    capsys.readouterr()
    main(["generate", *asked])
    printed = capsys.readouterr()
    assert "template plain (that of the training)" in printed.err
    main(["generate", *asked, "--template=plain"])
    assert capsys.readouterr().out == printed.out
    long = "--request=" + "say red and blue " * 4  # 16 words, and what ends a prompt
    with pytest.raises(SystemExit, match="longer than max_prompt_length 16"):
        main(["generate", f"--model={model}", long])
    main(["generate", f"--model={model}", long, "--max-prompt-length=20"])


def test_a_flag_wins_over_the_training(folder, tmp_path):
    record = {"template": "alpaca", "max_prompt_length": 20, "max_length": 28}
    model = trained_with(folder, "otherwise", json.dumps(record))
    arguments = [f"--model={model}", f"--data={folder / 'one.jsonl'}", "--seeds=1"]
    with pytest.raises(SystemExit, match="all 5 prompts are longer than max_prompt_length 20"):
        main(["evaluate", *arguments, f"--output={tmp_path / 'a'}"])  # the text of alpaca is
    how = ["--template=plain", "--max-prompt-length=16", "--max-length=24"]
    main(["evaluate", *arguments, *how, f"--output={tmp_path / 'a'}"])
    main(["evaluate", *command(folder, tmp_path / "b", "--seeds=1")])
    answers = [(tmp_path / x / "one-seed1.jsonl").read_text() for x in "ab"]
    assert answers[0] == answers[1]


def test_a_model_that_does_not_say_how_it_was_trained(folder, tmp_path, capsys):
    """Its chat template, where it has one, else a question: never a template that nobody chose."""
    arguments = [f"--data={folder / 'one.jsonl'}", "--seeds=1", f"--output={tmp_path}"]
    lengths = ["--max-prompt-length=16", "--max-length=24"]
    request = ["--request=say red", "--max-new-tokens=4"]
    question = r"--template: .*student does not say .* give one of alpaca, chat, plain"
    with pytest.raises(SystemExit, match=question):
        main(["evaluate", f"--model={folder / 'student'}", *arguments])
    with pytest.raises(SystemExit, match=question):
        main(["generate", f"--model={folder / 'student'}", *request])
    chat = shutil.copytree(folder / "student", folder / "chat")
    words = tiny.tokenizer()
    words.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    words.save_pretrained(chat)
    main(["evaluate", f"--model={chat}", *arguments, *lengths])
    assert settings(tmp_path)["template"] == "chat"
    main(["generate", f"--model={chat}", *request])
    assert "template chat (the tokenizer's own" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("odd", '{"template": "poem"}', "promptkd.json: template: 'poem' is not one of 'alpaca'"),
        ("short", '{"max_length": 0}', "promptkd.json: max_length: 0 is not >= 2"),
        ("torn", '{"template": ', "promptkd.json:1: not JSON"),
        ("list", "[]", "promptkd.json: holds a list"),
    ],
)
def test_a_record_that_cannot_be(folder, name, text, message):
    model = trained_with(folder, name, text)
    with pytest.raises(SystemExit, match=message):
        main(["generate", f"--model={model}", "--request=say red"])


def test_a_lengths_flag_is_weighed_against_the_record(folder, tmp_path):
    model = trained_with(folder, "long", '{"max_prompt_length": 50, "max_length": 60}')
    arguments = [f"--model={model}", f"--data={folder / 'one.jsonl'}", f"--output={tmp_path}"]
    with pytest.raises(SystemExit, match="--max-length 40 leaves no room .*-length 50"):
        main(["evaluate", *arguments, "--max-length=40"])


def test_an_output_that_cannot_be_is_found_before_the_model_is_read(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="--output .*file/out: .*Not a directory"):
        main(
            [
                "evaluate",
                "--model=absent/absent",
                "--data=x.jsonl",
                f"--output={tmp_path / 'file' / 'out'}",
            ]
        )


def test_models_data_and_results_in_a_bucket(folder, tmp_path, capsys, monkeypatch):
    """The same scores as from a disk; a model is copied once, and again when it has changed."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    pail, _ = bucket.make(monkeypatch)
    student = load_model(str(folder / "student"))
    save_model(pail / "model", student)
    (pail / "one.jsonl").write_bytes((folder / "one.jsonl").read_bytes())
    how = ["--template=plain", "--max-prompt-length=16", "--max-length=24", "--seeds=1"]
    arguments = [f"--model={pail / 'model'}", f"--data={pail / 'one.jsonl'}", *how]
    main(["evaluate", *arguments, f"--output={pail / 'out'}"])
    main(["evaluate", *command(folder, tmp_path / "out", "--seeds=1")])
    ours, theirs = (x / "out" / "one-seed1.jsonl" for x in (pail, tmp_path))
    assert read_text(ours) == read_text(theirs)
    assert sorted(f.name for f in (pail / "out").iterdir()) == [
        "evaluation.json",
        "one-seed1.jsonl",
    ]
    load_model(str(pail / "model"))
    assert len(list((tmp_path / "home" / "promptkd_jax").iterdir())) == 1
    tiny.write_model(pail / "model", width=32, depth=2, seed=1)
    assert load_model(str(pail / "model")).decoder.config.width == 32
    monkeypatch.chdir(tmp_path)
    for arguments, message in (
        ([f"--model={pail / 'absent'}", f"--data={pail / 'one.jsonl'}"], "no such folder or file"),
        ([f"--model={pail / 'model'}", f"--data={pail / 'two.jsonl'}"], "two.jsonl: no such file"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(["evaluate", *arguments, *how, f"--output={pail / 'out'}"])
    with pytest.raises(SystemExit, match="--output gs://other/out: "):
        main(["evaluate", f"--model={pail / 'model'}", "--data=x", "--output=gs://other/out"])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["home", "out"]


def test_generate_answers_a_request_and_every_line(folder, capsys, monkeypatch):
    arguments = [f"--model={folder / 'student'}", "--template=plain", "--max-new-tokens=6"]
    main(["generate", *arguments, "--request=say red"])
    answer = capsys.readouterr().out
    assert answer.endswith("\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("say red\nname two\n\nnot read\n"))
    main(["generate", *arguments])
    lines = capsys.readouterr().out
    assert lines.startswith(answer) and len(lines) > len(answer)
    with pytest.raises(SystemExit, match="no chat template"):
        main(["generate", *arguments, "--template=chat", "--request=say red"])
