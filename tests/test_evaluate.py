"""Scores of answers, closeness to a teacher, and the commands that show them."""

import io
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from promptkd_jax import evaluate, generate
from promptkd_jax.data import Record, tokenize
from promptkd_jax.models.decoder import head
from promptkd_jax.models.load import load_model
from promptkd_jax.sampler import Sampling


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
    records = [Record("say red", "", ("the blue sky",)), Record("name two", "", ("a fire",))]
    records.append(Record("say the colour of grass", "", ("green",)))
    how = dict(template="plain", max_prompt_length=16, max_length=24, eos_id=0)
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
    found = evaluate.closeness(teacher, student, rows, **how)
    kl, same = dense_closeness(teacher, student, rows)
    np.testing.assert_allclose(found["kl"], kl, rtol=1e-4)
    assert found["agreement"] == pytest.approx(same)
    itself = evaluate.closeness(teacher, teacher, rows, **how)
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
    whole = list(evaluate.write_answers(model, rows, **how))
    rest = list(evaluate.write_answers(model, rows, **how, first=2))
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


def test_evaluate_writes_every_set_and_seed(folder, tmp_path, capsys):
    evaluate.main(command(folder, tmp_path, "--seeds", "10", "20"))
    found = json.loads((tmp_path / "evaluation.json").read_text())["sets"]
    assert found.keys() == {"one", "two"} and found["one"]["rows"] == 5
    for one in found.values():
        scores = [seed["rougeL"] for seed in one["seeds"].values()]
        assert len(scores) == 2
        assert one["rougeL"]["mean"] == pytest.approx(np.mean(scores))
        assert one["rougeL"]["std"] == pytest.approx(np.std(scores, ddof=1))
    lines = (tmp_path / "two-seed20.jsonl").read_text().splitlines()
    assert (
        len(lines) == 3 and {"instruction", "references", "answer"} <= json.loads(lines[0]).keys()
    )
    assert "ROUGE-L" in capsys.readouterr().out


def test_evaluate_says_what_is_wrong(folder, tmp_path):
    (folder / "bad.jsonl").write_text('{"instruction": "say red", "output": "red"}\n{"instr\n')
    arguments = [f"--model={folder / 'student'}", "--data", str(folder / "bad.jsonl")]
    with pytest.raises(SystemExit, match=r"bad.jsonl:2: broken JSON"):
        evaluate.main([*arguments, f"--output={tmp_path}", "--template=plain"])
    with pytest.raises(SystemExit, match="no such folder or file"):
        evaluate.main(["--model=nowhere", "--data=x.jsonl", f"--output={tmp_path}"])


def test_generate_answers_a_request_and_every_line(folder, capsys, monkeypatch):
    arguments = [f"--model={folder / 'student'}", "--template=plain", "--max-new-tokens=6"]
    generate.main([*arguments, "--request=say red"])
    answer = capsys.readouterr().out
    assert answer.endswith("\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("say red\nname two\n\nnot read\n"))
    generate.main(arguments)
    lines = capsys.readouterr().out
    assert lines.startswith(answer) and len(lines) > len(answer)
    with pytest.raises(SystemExit, match="no chat template"):
        generate.main([*arguments, "--template=chat", "--request=say red"])
