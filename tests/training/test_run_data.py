"""The rows of a config: of one source or several, tokenised once, into files."""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import environment
from helpers import tiny
from helpers.chats import THINKING, chat_tokenizer
from helpers.files import write_lines

from promptkd_jax.cli.main import main
from promptkd_jax.data import mapped_rows
from promptkd_jax.data.rows import fingerprint_supervised
from promptkd_jax.infra import sharding
from promptkd_jax.infra.errors import ConfigError, DataError
from promptkd_jax.infra.metrics import read_metrics
from promptkd_jax.models.load import load_without_weights
from promptkd_jax.plan.remat import with_chosen_remat
from promptkd_jax.training import build, run_data
from promptkd_jax.training import run as training
from promptkd_jax.training.config.checks import checked
from promptkd_jax.training.prepare import prepare
from promptkd_jax.training.recipes import stage_config
from promptkd_jax.training.run_data import check_sources, load_data


@pytest.fixture
def folder(tmp_path):
    tiny.short_config(tmp_path / "inputs")
    return tmp_path / "inputs"


@pytest.fixture
def config(folder):
    """One stage on the data's responses; two sources, the second as messages."""
    config = tiny.short_config(folder)
    talk = [{"role": "user", "content": "say two"}, {"role": "assistant", "content": "the two"}]
    write_lines(folder / "talks.jsonl", *[{"messages": talk, "hint": "a"}] * 6)
    terms = (("forward_kl", 0.5), ("cross_entropy", 0.5))
    config.stages = (
        stage_config("gold", student_terms=terms, batch_size=4, steps=4, learning_rate=1e-3),
    )
    config.data.train = ((config.data.train, 3), (str(folder / "talks.jsonl"), 1))
    config.evaluation.every = 0
    return config


def rows_of(config, workdir=None):
    run = checked(config)
    return load_data(run, load_without_weights(run.student.path), workdir).train


def test_the_first_records_of_each_source_and_no_more_are_read(config, folder, tmp_path):
    whole = rows_of(config)
    config.data.train_rows = 7  # the second has 6
    with (folder / "talks.jsonl").open("a") as file:
        file.write('{"messages": []}\n')  # which `limit` never comes to, nor has to
    with pytest.raises(DataError, match="talks.jsonl:7: "):
        rows_of(config, tmp_path / "run")
    config.data.train_rows = 5
    first = rows_of(config, tmp_path / "run")
    assert first.shares == ((5, 3.0), (5, 1.0))
    assert first.left_out == {"unused field 'hint'": 5}
    for found, place in zip(first.tokens, [*range(5), *range(12, 17)], strict=True):
        np.testing.assert_array_equal(found, whole.tokens[place])
    config.data.train_rows = 2  # not the rows that are kept
    assert rows_of(config, tmp_path / "run").shares == ((2, 3.0), (2, 1.0))


def test_rows_are_tokenised_once_and_again_when_something_changes(
    config, folder, tmp_path, monkeypatch
):
    calls, tokenize = [], run_data.tokenize

    def counted(records, **how):
        calls.append(how.get("into"))
        return tokenize(records, **how)

    monkeypatch.setattr(run_data, "tokenize", counted)
    config.data.dev_rows = 1
    first = rows_of(config, tmp_path / "run")
    assert len(calls) == 3 and first.shares == ((12, 3.0), (6, 1.0))  # dev is not kept
    assert first.left_out == {"unused field 'hint'": 6}
    again = rows_of(config, tmp_path / "run")
    assert len(calls) == 4
    assert fingerprint_supervised(again) == fingerprint_supervised(first)
    assert again.left_out == first.left_out
    config.data.max_length = 20
    rows_of(config, tmp_path / "run")
    assert len(calls) == 7
    # By content, whatever the name.
    text = (folder / "talks.jsonl").read_text()
    (folder / "talks.jsonl").write_text(text.replace("the two", "the red"))
    rows_of(config, tmp_path / "run")
    assert len(calls) == 9
    (folder / "other.jsonl").write_text(text)
    config.data.train = str(folder / "other.jsonl")
    rows_of(config, tmp_path / "run")
    assert len(calls) == 10


def test_other_code_makes_other_rows(config, tmp_path, monkeypatch):
    rows_of(config, tmp_path)
    monkeypatch.setattr(run_data, "version", lambda name: "0")
    rows_of(config, tmp_path)
    assert len(list((tmp_path / "tokens").iterdir())) == 4


def test_data_that_change_while_they_are_read_are_not_kept(config, tmp_path, monkeypatch):
    tokenize = run_data.tokenize

    def slow(records, **how):
        rows = tokenize(records, **how)
        file = pathlib.Path(config.data.train[0][0])
        file.write_text(file.read_text() * 2)
        return rows

    monkeypatch.setattr(run_data, "tokenize", slow)
    with pytest.raises(DataError, match=r"train\.jsonl: has changed while it was read"):
        rows_of(config, tmp_path)
    assert not list((tmp_path / "tokens").iterdir())


def test_what_is_left_out_is_said_of_kept_rows_too(config, tmp_path, capsys):
    for _ in range(2):
        rows_of(config, tmp_path)
        assert "'hint'" in capsys.readouterr().err


def test_each_turn_may_be_a_row(config, folder, tmp_path):
    """Also of a template that renders the last turn in another way; what nobody answers is none."""
    talk = [{"role": r, "content": x} for r, x in zip(["user", "assistant"] * 3, "abcde")]
    write_lines(folder / "talks.jsonl", {"messages": talk}, {"messages": talk[2:4]})
    config.data.train = str(folder / "talks.jsonl")
    model = folder / "student"
    words = chat_tokenizer(THINKING)
    tiny.write_model(model, width=16, depth=2, seed=1, words=words)
    config.data.update(template="chat", supervise="each", max_prompt_length=90, max_length=99)
    rows = rows_of(config, tmp_path)
    ends = [words.decode(x[start:]) for x, start in zip(rows.tokens, rows.prompt_lengths)]
    assert ends == ["b<|im_end|>", "d<|im_end|>", "d<|im_end|>"] and rows.supervised is None
    config.stages[0].update(targets="student", student_terms=(("reverse_kl", 1.0),))
    assert len(rows_of(config, tmp_path).tokens) == 4  # the prompt that nobody answered


@pytest.mark.usefixtures("no_report")
def test_a_folder_is_free_again_after_a_mistake_in_the_data(config, folder, tmp_path):
    config.data.train = write_lines(folder / "odd.jsonl", *[{"q": "say", "a": "red"}] * 8)
    for columns in ({}, {"question": "q", "answer": "a"}):
        config.data.columns = columns
        if columns:
            training.run(checked(config), tmp_path / "run", with_chosen_remat)
        else:
            with pytest.raises(DataError, match="data.columns"):
                training.run(checked(config), tmp_path / "run", with_chosen_remat)


def test_a_report_does_without_data_that_are_gone(config, tmp_path, monkeypatch):
    fit = training.fit

    def and_remove(*args, **how):
        done = fit(*args, **how)
        pathlib.Path(config.data.train[1][0]).unlink()
        return done

    monkeypatch.setattr(training, "fit", and_remove)
    training.run(checked(config), tmp_path / "run", with_chosen_remat)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Near-duplicates were not looked for: " in page
    assert (tmp_path / "run" / "summary.json").exists()


def test_processes_that_write_at_once_have_the_same_rows(config, folder, tmp_path):
    config.data.token_cache = str(tmp_path / "tokens")
    (tmp_path / "read.py").write_text(
        "import sys\n"
        "from helpers import tiny\n"
        "from promptkd_jax.data.rows import fingerprint_supervised\n"
        "from promptkd_jax.models.load import load_without_weights\n"
        "from promptkd_jax.training.config.checks import checked\n"
        "from promptkd_jax.training.run_data import check_sources, load_data\n"
        "import pathlib\n"
        f"config = tiny.short_config(pathlib.Path({str(folder)!r}))\n"
        f"config.data.token_cache = {str(tmp_path / 'tokens')!r}\n"
        "run = checked(config)\n"
        "rows = load_data(run, load_without_weights(run.student.path)).turns\n"
        "rows = rows or load_data(run, load_without_weights(run.student.path)).train\n"
        "print(fingerprint_supervised(rows))\n"
    )
    command = [sys.executable, str(tmp_path / "read.py")]
    started = [
        subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    said = [process.communicate()[0].splitlines()[-1] for process in started]
    assert len(set(said)) == 1 and said[0].startswith("12 rows")
    assert len(list((tmp_path / "tokens").iterdir())) == 1


def test_runs_may_share_their_tokens(config, tmp_path):
    config.data.token_cache = str(tmp_path / "tokens")
    for run in "a", "b":
        rows_of(config, tmp_path / run)
    assert len(list((tmp_path / "tokens").iterdir())) == 2
    assert not (tmp_path / "a").exists()
    config.data.token_cache = "gs://bucket/tokens"
    with pytest.raises(ConfigError, match=r"data\.token_cache: .*is not a folder of a disk"):
        checked(config)


def test_a_corpus_has_sources_too(config, folder, tmp_path):
    for name, words in ("one", "red sky " * 40), ("two", "blue " * 60):
        write_lines(folder / f"{name}.jsonl", {"text": words})
    config.stages[0].corpus_terms = (("cross_entropy", 1.0),)
    config.data.corpus = tuple((str(folder / f"{name}.jsonl"), 1) for name in ("one", "two"))
    run = checked(config)
    student = load_without_weights(run.student.path)
    corpus = load_data(run, student, tmp_path).corpus
    counts = [count for count, _ in corpus.shares]
    assert sum(counts) == len(corpus.tokens) and min(counts) >= 2
    one = student.tokenizer.decode(corpus.tokens[0]), student.tokenizer.decode(corpus.tokens[-1])
    assert "red sky" in one[0] and "blue blue" in one[1]


def test_a_run_on_two_sources(config, folder, tmp_path, capsys):
    run = checked(config)
    assert build.data_name(run) == "train + talks"
    training.run(run, tmp_path / "run", with_chosen_remat)
    out = capsys.readouterr().out
    assert "talks.jsonl: 6 rows, 0 dropped" in out and "train.jsonl: 12 rows" in out
    lines = [line for line in read_metrics(tmp_path / "run") if "student_loss" in line]
    assert len(lines) == 4 and all(np.isfinite(line["student_loss"]) for line in lines)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "unused field" in page
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1})
    with jax.set_mesh(mesh):
        [stage] = prepare(run, tmp_path / "run", mesh).stages
    told = load_without_weights(run.student.path).tokenizer
    drawn = [told.decode(row) for i in range(30) for row in stage.batches[i].tokens]
    assert sum("say two" in text and "the two" in text for text in drawn) in range(30, 40)
    # Other weights are another run.
    config.data.train = tuple((source, 1) for source, _ in config.data.train)
    with pytest.raises(ConfigError, match=r"config\.data\.train.*: there 3"):
        training.run(checked(config), tmp_path / "run", with_chosen_remat)


def test_sources_in_a_flag_and_in_data(config, folder, capsys):
    (folder / "config.py").write_text(
        "import pathlib\n"
        "from helpers import tiny\n"
        f"def get_config(): return tiny.short_config(pathlib.Path({str(folder)!r}))\n"
    )
    pair = f"(({str(folder / 'train.jsonl')!r}, 0.75), ({str(folder / 'talks.jsonl')!r}, 0.25))"
    main(["data", f"--config={folder / 'config.py'}", f"--config.data.train={pair}"])
    out = capsys.readouterr().out
    assert "| train | 18 " in " ".join(out.split()) and "say two" in out
    assert "warning: dev: 5 of 5 prompts are in the training data" in out


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ((), "or several with weights such as"),
        ((("a.jsonl",),), "or several with weights such as"),
        ((("a.jsonl", 0),), "is not sources with weights above 0 (a.jsonl has 0)"),
        ((("a.jsonl", 1), ("a.jsonl", 2)), "each once"),
        ((("teacher", 1), ("a.jsonl", 2)), "'teacher' is none beside others"),
        ("(('a.jsonl', 1", "or several with weights such as"),
        ((("s3://a/b.jsonl", 1),), "buckets are those of gs://"),
    ],
)
def test_what_sources_may_be(config, value, words):
    config.data.train = value
    with pytest.raises(ConfigError) as error:
        checked(config)
    assert "config.data.train" in str(error.value) and words in str(error.value)


def test_a_stopped_writing_begins_anew(config, tmp_path, monkeypatch):
    appended = mapped_rows.RowFiles.append
    monkeypatch.setattr(mapped_rows.RowFiles, "append", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        rows_of(config, tmp_path)
    monkeypatch.setattr(mapped_rows.RowFiles, "append", appended)
    assert len(rows_of(config, tmp_path).tokens) == 18
    manifests = list((tmp_path / "tokens").glob("*/manifest.json"))
    assert sorted(json.loads(x.read_text())["rows"] for x in manifests) == [6, 12]


def test_faults_of_records_are_named_by_their_lines(config, folder):
    talk = [{"role": "user", "content": "say two"}, {"role": "assistant", "content": ""}]
    talk[1]["tool_calls"] = [{"name": "add", "arguments": {}}]
    write_lines(folder / "talks.jsonl", *[{"messages": talk}] * 3)
    with pytest.raises(DataError) as error:
        rows_of(config)
    assert "talks.jsonl:1, 2, 3: template 'plain' does not render all" in str(error.value)


@pytest.mark.parametrize("field", ["train", "dev", "corpus"])
def test_data_that_is_not_there_is_told_before_models_are_loaded(config, tmp_path, field):
    config.data[field] = str(tmp_path / "none.jsonl")
    if field == "corpus":
        config.stages[0].corpus_terms = (("cross_entropy", 1.0),)
    with pytest.raises(DataError, match="none.jsonl: no such file"):
        check_sources(checked(config))


@pytest.mark.parametrize("field", ["train", "dev"])
def test_the_first_records_are_looked_at_before_models_are_loaded(config, folder, field, capsys):
    """A thousand of them, quietly; the rest as they are read."""
    good = {"instruction": "say two", "output": "two", "unused": 1}
    broken = good | {"output": 2}
    config.data[field] = write_lines(folder / "file.jsonl", *[good] * 1000, broken)
    check_sources(checked(config))
    assert capsys.readouterr() == ("", "")
    write_lines(folder / "file.jsonl", *[good] * 999, broken)
    with pytest.raises(DataError, match=r"file.jsonl:1000: "):
        check_sources(checked(config))
