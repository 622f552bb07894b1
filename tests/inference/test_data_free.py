"""Requests are rewarded as is said, and do not depend on interruptions."""

import dataclasses
import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import bucket, tiny

from promptkd_jax.data.templates import PromptFormat
from promptkd_jax.inference import data_free, topic_policy
from promptkd_jax.inference.data_free import DataFree, generate_prompts
from promptkd_jax.infra import distributed
from promptkd_jax.infra.errors import DataError
from promptkd_jax.infra.files import read_text, write_text
from promptkd_jax.models.decoder import Decoder, head
from promptkd_jax.models.io import identity
from promptkd_jax.models.load import load_model
from promptkd_jax.models.model import Model

# So that most of what a random model writes are words, which are a token each.
SYLLABLES = map("".join, itertools.product("bdgklm", "aeiou", "bdgklmnprst"))
MORE_WORDS = tuple(f"Ġ{word}" for word in SYLLABLES)
HOW = dict(prompt_format=PromptFormat("plain"), prompt_capacity=24, batch_size=4, vocab_size=605)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("models")
    tiny.write_model(folder / "teacher", width=32, depth=2, seed=0, extra=MORE_WORDS)
    tiny.write_model(folder / "student", width=16, depth=2, seed=1, extra=MORE_WORDS)
    prompts = [f"say {a} {b}" for a in tiny.WORDS[:3] for b in ("sky", "grass")]
    write_bank(folder / "bank.jsonl", prompts)
    return folder


@pytest.fixture(scope="module")
def teacher(folder) -> Model:
    return load_model(str(folder / "teacher"))


@pytest.fixture(scope="module")
def student(folder) -> Model:
    return load_model(str(folder / "student"))


@pytest.fixture(scope="module")
def settings(folder) -> DataFree:
    return DataFree(
        requests=18,
        round_size=6,
        max_request_tokens=10,
        max_new_tokens=8,
        bank=str(folder / "bank.jsonl"),
    )


def write_bank(file: pathlib.Path, prompts: list[str]) -> str:
    file.write_text("".join(json.dumps({"instruction": prompt}) + "\n" for prompt in prompts))
    return str(file)


def lines(file: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(folder, teacher, student, settings):
    """An uninterrupted call: its records and its file."""
    file = folder / "whole.jsonl"
    return generate_prompts(teacher, student, file, settings, **HOW), file


def test_requests_are_records_without_answers(whole, teacher):
    records, file = whole
    assert len(records) == 18
    assert all(len(record.messages) == 1 and record.references == () for record in records)
    assert len({topic_policy.words(record.prompt_text) for record in records}) == 18
    assert not any("<end>" in record.prompt_text for record in records)
    kept = [line["prompt"] for line in lines(file) if line.get("fault") == ""]
    assert [record.prompt_text for record in records] == kept[:18]


def test_the_parts_of_a_reward_are_what_they_are_said_to_be(whole, teacher, settings):
    requests = [line for line in lines(whole[1]) if line.get("fault") == ""]
    for line in requests:
        parts = line["kl"], line["similarity"], line["surprise"]
        assert line["kl"] > 0 and 0 <= line["similarity"] <= 1 and line["surprise"] > 0
        assert line["reward"] == parts[0] - parts[1] - 0.2 * parts[2]
    first = requests[0]
    prompt = teacher.tokenizer(first["topic"] + "\n")["input_ids"]
    text = teacher.tokenizer(first["prompt"])["input_ids"]
    text = text[: settings.max_request_tokens]
    tokens = jnp.array([prompt + text])
    log_p = jax.nn.log_softmax(logits_of(teacher, tokens)[0, len(prompt) - 1 : -1])
    expected = -np.mean([log_p[t, token] for t, token in enumerate(text)])
    np.testing.assert_allclose(first["surprise"], expected, rtol=1e-4)


def test_disagreement_is_the_mean_kl_over_the_answer(teacher, student, settings, monkeypatch):
    requests, answers = ["say red sky", "name two"], [np.array([70, 271, 0]), np.array([300])]
    monkeypatch.setattr(data_free, "generate_responses", lambda *rest, **named: iter(answers))
    task = data_free._Task(teacher, student, settings, **HOW)
    found = data_free._disagreements(task, requests, jax.random.key(0))
    for value, request, answer in zip(found, requests, answers):
        prompt = teacher.tokenizer(request + "\n")["input_ids"]
        tokens = jnp.array([[*prompt, *answer]])
        at = slice(len(prompt) - 1, -1)
        log_p, log_q = (
            jax.nn.log_softmax(logits_of(model, tokens)[0, at]) for model in (teacher, student)
        )
        expected = jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))
        np.testing.assert_allclose(value, expected, rtol=1e-4)


def logits_of(model: Model, tokens: jax.Array) -> jax.Array:
    hidden = model.decoder.apply({"params": model.params}, tokens)
    return hidden @ head(model.params)[: HOW["vocab_size"]].T


@pytest.mark.parametrize("torn", [1, 9, 15, 20])
def test_a_stopped_call_goes_on_to_the_same_requests(
    whole, teacher, student, settings, tmp_path, torn
):
    """Killed in the first, second or third round, in the middle of a line."""
    records, file = whole
    copy = tmp_path / "requests.jsonl"
    manifest = file.with_suffix(".manifest.json").read_text()
    copy.with_suffix(".manifest.json").write_text(manifest)
    kept = file.read_text().splitlines(keepends=True)[:torn]
    copy.write_text("".join(kept)[:-3])
    assert generate_prompts(teacher, student, copy, settings, **HOW) == records
    assert copy.read_text() == file.read_text()


def test_more_requests_continue_the_same_file(whole, teacher, student, settings, tmp_path):
    records, file = whole
    fewer = dataclasses.replace(settings, requests=4)
    copy = tmp_path / "requests.jsonl"
    assert generate_prompts(teacher, student, copy, fewer, **HOW) == records[:4]
    assert generate_prompts(teacher, student, copy, settings, **HOW) == records
    assert copy.read_text() == file.read_text()


def test_a_finished_file_is_only_read(whole, teacher, student, settings, monkeypatch):
    monkeypatch.setattr(data_free, "generate_responses", None)
    assert generate_prompts(teacher, student, whole[1], settings, **HOW) == whole[0]


def test_answers_beyond_the_trained_positions(whole, teacher, student, settings, capsys):
    """The student reads the teacher's answers, which may be longer than rows of training data."""
    decoder = Decoder(student.decoder.config.replace(max_positions=9))
    short = student.replace(decoder=decoder, name="short")
    generate_prompts(teacher, short, whole[1], settings, **HOW)
    longest = HOW["prompt_capacity"] + settings.max_new_tokens
    said = f"short: rows of up to {longest} tokens, but it was trained for 9 positions"
    assert said in capsys.readouterr().err


def test_a_student_like_its_teacher_disagrees_nowhere(teacher, settings, tmp_path):
    few = dataclasses.replace(settings, requests=2)
    generate_prompts(teacher, teacher, tmp_path / "r.jsonl", few, **HOW)
    assert {line["kl"] for line in lines(tmp_path / "r.jsonl") if line.get("fault") == ""} == {0.0}


@pytest.mark.parametrize("change", ["teacher", "student", "seed", "template"])
def test_a_file_of_another_making_is_refused(whole, teacher, student, settings, change):
    models = {"teacher": (student, student), "student": (teacher, teacher)}
    chosen = dataclasses.replace(settings, seed=11) if change == "seed" else settings
    other = {"prompt_format": PromptFormat("alpaca"), "prompt_capacity": 160}
    how = HOW | (other if change == "template" else {})
    with pytest.raises(DataError, match=f"\n  {change}: there"):
        generate_prompts(*models.get(change, (teacher, student)), whole[1], chosen, **how)


def test_a_file_without_its_manifest_is_refused(whole, teacher, student, settings, tmp_path):
    (tmp_path / "r.jsonl").write_text(whole[1].read_text())
    with pytest.raises(DataError, match="r.manifest.json, which says what made it, is missing"):
        generate_prompts(teacher, student, tmp_path / "r.jsonl", settings, **HOW)


def test_duplicates_are_dropped_counted_and_the_end_of_patience_is_told(
    teacher, student, settings, tmp_path
):
    """A greedy teacher has one request per topic, and no more."""
    greedy = dataclasses.replace(settings, temperature=1e-6, round_size=8, seed=3)
    file = tmp_path / "requests.jsonl"
    with pytest.raises(DataError, match=r"dropped: \d+ duplicate.*; 18 are wanted, but the last 5"):
        generate_prompts(teacher, student, file, greedy, **HOW)
    requests = [line for line in lines(file) if "prompt" in line]
    kept = [line["prompt"] for line in requests if not line["fault"]]
    assert 0 < len(kept) <= 6 and len(set(kept)) == len(kept)
    dropped = [line for line in requests if line["fault"]]
    assert all(line["kl"] is None for line in dropped)
    first = requests[:8]
    worst = max(line["surprise"] for line in first if not line["fault"])
    assert {line["reward"] for line in first if line["fault"]} == {-1 - 0.2 * worst}


def test_a_topic_longer_than_a_prompt_is_refused(teacher, student, settings, tmp_path):
    with pytest.raises(DataError, match="longer than"):
        generate_prompts(
            teacher, student, tmp_path / "r.jsonl", settings, **HOW | {"prompt_capacity": 2}
        )


def test_a_request_that_fits_no_prompt_is_dropped(teacher, student, settings, tmp_path):
    tight = HOW | {"prompt_capacity": 14}
    file = tmp_path / "requests.jsonl"
    few = dataclasses.replace(settings, requests=2)
    for record in generate_prompts(teacher, student, file, few, **tight):
        assert len(teacher.tokenizer(record.prompt_text)["input_ids"]) <= 14
    assert "too long" in {line.get("fault") for line in lines(file)}


def test_a_damaged_line_is_named(whole, teacher, student, settings, tmp_path):
    copy = tmp_path / "requests.jsonl"
    manifest = whole[1].with_suffix(".manifest.json").read_text()
    copy.with_suffix(".manifest.json").write_text(manifest)
    copy.write_text(whole[1].read_text().replace('{"topic"', '{"top', 1))
    with pytest.raises(DataError, match="requests.jsonl:1: damaged"):
        generate_prompts(teacher, student, copy, settings, **HOW)


def test_a_round_of_one_is_refused():
    with pytest.raises(ValueError, match="round_size: 1"):
        DataFree(round_size=1)


def test_requests_in_a_bucket_go_on_to_the_same(whole, teacher, student, settings, monkeypatch):
    records, file = whole
    folder, _ = bucket.make(monkeypatch)
    copy = folder / "requests.jsonl"
    write_text(copy.with_suffix(".manifest.json"), file.with_suffix(".manifest.json").read_text())
    write_text(copy, file.read_text()[:-3])
    assert generate_prompts(teacher, student, copy, settings, **HOW) == records
    assert read_text(copy) == file.read_text()


def test_other_processes_take_the_rounds_of_the_first(
    whole, teacher, student, settings, monkeypatch, tmp_path
):
    """They go on with the same policy and the same requests, and write nothing."""
    records, file = whole
    told = iter([identity.model_identity(teacher)["teacher"], None, lines(file)[:6]])
    monkeypatch.setattr(distributed, "run_on_primary", lambda compute: next(told))
    monkeypatch.setattr(distributed, "is_primary", lambda: False)
    assert generate_prompts(teacher, student, tmp_path / "none.jsonl", settings, **HOW) == records
    assert next(told, "all told") == "all told"
    assert list(tmp_path.iterdir()) == []
