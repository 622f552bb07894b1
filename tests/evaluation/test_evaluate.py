"""Scores of answers, closeness to a teacher, and the commands that show them."""

import io
import json
import pathlib
import re
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import bucket, tiny
from helpers.records import example

from promptkd_jax.cli import evaluate, flags
from promptkd_jax.cli.main import main
from promptkd_jax.data.rows import tokenize
from promptkd_jax.data.templates import PromptFormat
from promptkd_jax.evaluation import student_metrics
from promptkd_jax.inference import generate
from promptkd_jax.infra.files import read_text
from promptkd_jax.models.decoder import head
from promptkd_jax.models.io.export import save_model
from promptkd_jax.models.load import load_model, load_with_tokenizer
from promptkd_jax.models.sampling_rules import Sampling


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


def test_answers_do_not_depend_on_where_writing_starts(folder, rows, caplog):
    """Nor is anything compiled for it, or for a last batch that is not full."""
    model = load_model(str(folder / "student"))
    generate._sampler.cache_clear()
    how = dict(
        sampling=Sampling(eos_ids=(0,)),
        prompt_capacity=16,
        max_new_tokens=8,
        batch_size=2,
        key=jax.random.key(3),
    )
    with jax.log_compiles():
        whole = list(generate.generate_responses(model, rows, **how))
        rest = list(generate.generate_responses(model, rows, **how, first=2))
    samplers = [x for x in caplog.messages if re.match(r"Compiling (jit\()?compiled\b", x)]
    assert len(samplers) == 1
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


def written(output) -> dict:
    """What `evaluation.json` says of its only model."""
    (model,) = json.loads((output / "evaluation.json").read_text())["models"].values()
    return model


def test_evaluate_reads_other_names_of_columns(folder, tmp_path):
    content = json.dumps([{"query": "say red", "gold": "red"}, {"query": "say a", "gold": ""}])
    (tmp_path / "set.json").write_text(content)
    columns = {"prompt": "query", "completion": "gold"}
    more = ["--seeds", "10", f"--columns={json.dumps(columns)}", "--format=prompt_completion"]
    main(["evaluate", *command(folder, tmp_path, *more, "--data", str(tmp_path / "set.json"))])
    assert written(tmp_path)["sets"]["set"]["rows"] == 1
    settings = json.loads((tmp_path / "evaluation.json").read_text())["settings"]
    assert (settings["columns"], settings["format"]) == (columns, "prompt_completion")


def test_evaluate_writes_every_set_and_seed(folder, tmp_path, capsys):
    main(["evaluate", *command(folder, tmp_path, "--seeds", "10", "20")])
    found = written(tmp_path)["sets"]
    assert found.keys() == {"one", "two"} and found["one"]["rows"] == 5
    for one in found.values():
        scores = [seed["rougeL"] for seed in one["seeds"].values()]
        assert len(scores) == 2
        assert one["rougeL"]["mean"] == pytest.approx(np.mean(scores))
        assert one["rougeL"]["std"] == pytest.approx(np.std(scores, ddof=1))
    lines = (tmp_path / "student" / "two" / "seed20.jsonl").read_text().splitlines()
    assert len(lines) == 3 and {"messages", "references", "answer"} <= json.loads(lines[0]).keys()
    assert "ROUGE-L" in capsys.readouterr().out


def test_several_models_stand_in_one_table_with_their_differences(folder, tmp_path, capsys):
    """Paired by request and seed, each with an interval, from the first model."""
    arguments = command(folder, tmp_path, "--seeds", "10", "20")
    arguments[0] = "--model"
    arguments[1:1] = [str(folder / "teacher"), str(folder / "student")]
    main(["evaluate", *arguments])
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert list(found["models"]) == ["teacher", "student"]
    for score in ("rougeL", "exact_match"):
        assert list(found["differences"][score]) == ["student"]
        assert list(found["differences"][score]["student"]) == ["one", "two", "average"]
    means = [found["models"][name]["sets"]["one"]["rougeL"]["mean"] for name in found["models"]]
    difference = found["differences"]["rougeL"]["student"]["one"]
    assert difference["mean"] == pytest.approx(means[1] - means[0], abs=1e-3)
    assert difference["low"] <= difference["mean"] <= difference["high"]
    printed = capsys.readouterr().out
    assert "− teacher (95 %)" in printed and printed.count("| average | student |") == 1


def test_differences_are_of_the_requests_that_all_answered():
    """Another template or tokenizer may drop others for their length."""
    answers = {
        "a": {"set": {1: {"kept": [0, 1, 2], "rougeL_by_row": [1.0, 2.0, 9.0], "texts": "xyz"}}},
        "b": {"set": {1: {"kept": [2, 0], "rougeL_by_row": [11.0, 4.0], "texts": "zx"}}},
    }
    records = {"set": [example("say", "", (letter,)) for letter in "xyw"]}
    found = evaluate._differences(answers, records)
    assert found["rougeL"]["b"]["set"]["mean"] == pytest.approx((11 + 4 - 1 - 9) / 2)
    assert found["exact_match"]["b"]["set"]["mean"] == 0


def test_sets_and_models_of_one_name_are_told_apart(folder, tmp_path):
    names = evaluate.distinct_names
    assert names(["a/test.jsonl", "b/test.jsonl", "dev.jsonl"]) == {
        "a-test": "a/test.jsonl",
        "b-test": "b/test.jsonl",
        "dev": "dev.jsonl",
    }
    assert [*names(["x/run/student", "y/run/student"])] == ["x-run-student", "y-run-student"]
    assert [*names(["d.jsonl", "d.csv"])] == ["d.jsonl", "d.csv"]
    assert [*names(["student", "a/student", "gs://pail/student"])] == [
        *("student", "a-student", "pail-student")
    ]
    assert [*names(["owner/Name-0.5B", "synthetic:test", "package:own.jsonl"])] == [
        *("Name-0.5B", "synthetic-test", "own")
    ]
    other = tmp_path / "other" / "one.jsonl"
    other.parent.mkdir()
    tiny.write_data(other, 4)
    arguments = command(folder, tmp_path / "out", "--seeds=1")
    arguments[3] = str(other)
    main(["evaluate", *arguments])
    rows = {name: one["rows"] for name, one in written(tmp_path / "out")["sets"].items()}
    assert sorted(rows.values()) == [4, 5] and set(rows) >= {"other-one"}


def test_the_same_command_answers_only_what_is_missing(folder, tmp_path, monkeypatch, capsys):
    main(["evaluate", *command(folder, tmp_path, "--seeds", "10", "20")])
    before = (tmp_path / "evaluation.json").read_text()
    answers = tmp_path / "student" / "two"
    (answers / "seed20.json").unlink()
    capsys.readouterr()
    main(["evaluate", *command(folder, tmp_path, "--seeds", "10", "20")])
    printed = capsys.readouterr().out
    assert printed.count("student answers") == 1 and "student answers two, seed 20" in printed
    assert (tmp_path / "evaluation.json").read_text() == before
    assert sorted(file.name for file in answers.iterdir()) == [
        *("config.json", "seed10.json", "seed10.jsonl", "seed20.json", "seed20.jsonl")
    ]
    monkeypatch.setattr(flags, "load_with_tokenizer", lambda *_, **__: 1 / 0)
    main(["evaluate", *command(folder, tmp_path, "--seeds", "10", "20")])
    assert (tmp_path / "evaluation.json").read_text() == before


def test_answers_of_other_settings_or_of_another_model_are_not_taken(folder, tmp_path):
    model = shutil.copytree(folder / "student", tmp_path / "model")
    arguments = command(folder, tmp_path / "out", "--seeds=1")
    arguments[0] = f"--model={model}"
    main(["evaluate", *arguments])
    message = r"out/model/one belongs .* another --output, .*\n.*sampling.min_p: there 0, now 0.5"
    with pytest.raises(SystemExit, match=message):
        main(["evaluate", *arguments, "--min-p=0.5"])
    with pytest.raises(SystemExit, match="config.rouge_tokenizer: there 'published'"):
        main(["evaluate", *arguments, "--rouge-tokenizer=unicode"])
    tiny.write_model(model, width=16, depth=2, seed=2)  # trained anew
    with pytest.raises(SystemExit, match="config.weights"):
        main(["evaluate", *arguments])


def test_a_model_in_fewer_bits_is_another_model(folder, tmp_path, monkeypatch):
    loaded = []

    def load(*arguments, **how):
        loaded.append(load_with_tokenizer(*arguments, **how))
        return loaded[-1]

    monkeypatch.setattr(flags, "load_with_tokenizer", load)
    arguments = command(folder, tmp_path, "--seeds=1")
    main(["evaluate", *arguments, "--quantize=int8"])
    kernel = loaded[-1].params["layers"]["mlp"]["up"]["kernel"]
    assert kernel.dtype == jnp.int8 and written(tmp_path)["quantize"] == "int8"
    for other in ("int4", "none"):
        with pytest.raises(SystemExit, match=r"config.weights: there '\w+ in int8', now"):
            main(["evaluate", *arguments, f"--quantize={other}"])


def test_all_sets_are_checked_before_the_first_is_answered(folder, tmp_path):
    (tmp_path / "long.jsonl").write_text(
        json.dumps({"instruction": "say red and blue " * 9, "output": "red"}) + "\n"
    )
    arguments = command(folder, tmp_path / "out", "--seeds=1")
    arguments[3] = str(tmp_path / "long.jsonl")
    with pytest.raises(SystemExit, match="all 1 prompts are longer than max_prompt_length 16"):
        main(["evaluate", *arguments])
    assert not list((tmp_path / "out").rglob("seed*"))


def test_references_that_rouge_cannot_count_are_warned_of(folder, tmp_path, capsys):
    lines = [{"instruction": f"say {i}", "output": "привет мир"} for i in range(3)]
    data = tmp_path / "russian.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = [f"--model={folder / 'student'}", f"--data={data}", "--seeds=1"]
    arguments += ["--template=plain", "--max-prompt-length=16", "--max-length=24"]
    main(["evaluate", *arguments, f"--output={tmp_path / 'a'}"])
    warned = capsys.readouterr().err
    assert "3 of 3 rows have no reference with a token that rouge_tokenizer 'published'" in warned
    assert "'unicode' counts 3 of them" in warned
    main(["evaluate", *arguments, f"--output={tmp_path / 'b'}", "--rouge-tokenizer=unicode"])
    assert "rouge_tokenizer" not in capsys.readouterr().err


def test_evaluate_says_what_is_wrong(folder, tmp_path):
    (folder / "bad.jsonl").write_text('{"instruction": "say red", "output": "red"}\n{"instr\n')
    arguments = [f"--model={folder / 'student'}", "--data", str(folder / "bad.jsonl")]
    with pytest.raises(SystemExit, match=r"bad.jsonl:2: broken JSON"):
        main(["evaluate", *arguments, f"--output={tmp_path}", "--template=plain"])
    with pytest.raises(SystemExit, match="no such folder or file"):
        main(
            [
                "evaluate",
                "--model=nowhere",
                f"--data={folder / 'one.jsonl'}",
                f"--output={tmp_path}",
            ]
        )


def trained_with(folder, name: str, text: str) -> pathlib.Path:
    """A copy of the student with this beside it."""
    copy = shutil.copytree(folder / "student", folder / name)
    (copy / "promptkd.json").write_text(text)
    return copy


def test_a_model_is_asked_as_it_was_trained(folder, tmp_path, capsys):
    """Template and lengths are those beside the model, where no flag says otherwise."""
    record = {"template": "plain", "max_prompt_length": 16, "max_length": 24, "later": 1}
    model = trained_with(folder, "recorded", json.dumps(record))
    arguments = [f"--model={model}", f"--data={folder / 'one.jsonl'}", "--seeds=1"]
    main(["evaluate", *arguments, f"--output={tmp_path / 'a'}"])
    assert "template plain (that of the training)" in capsys.readouterr().out
    wanted = {"template": "plain", "max_prompt_length": 16, "max_length": 24}
    assert wanted.items() <= written(tmp_path / "a").items()
    main(["evaluate", *command(folder, tmp_path / "b", "--seeds=1")])  # which says all of it
    answers = [next((tmp_path / x).glob("*/one/seed1.jsonl")).read_text() for x in "ab"]
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
    answers = [next((tmp_path / x).glob("*/one/seed1.jsonl")).read_text() for x in "ab"]
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
    assert written(tmp_path)["template"] == "chat"
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
        main(["evaluate", *arguments, "--template=plain", "--max-length=40"])


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
    ours, theirs = pail / "out" / "model" / "one", tmp_path / "out" / "student" / "one"
    assert read_text(ours / "seed1.jsonl") == read_text(theirs / "seed1.jsonl")
    names = ["config.json", "seed1.json", "seed1.jsonl"]
    assert sorted(f.name for f in ours.iterdir()) == names
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
