"""The policy's gradient is the enumerated one, and the requests do not depend on interruptions."""

import dataclasses
import importlib.resources
import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from promptkd_jax import data_free
from promptkd_jax.data import DataError
from promptkd_jax.data_free import DataFree, clean_request, write_requests
from promptkd_jax.losses import entropy
from promptkd_jax.models.decoder import head
from promptkd_jax.models.load import Model, load_model

# So that most of what a random model writes are words, which are a token each.
SYLLABLES = map("".join, itertools.product("bdgklm", "aeiou", "bdgklmnprst"))
MORE_WORDS = tuple(f"Ġ{word}" for word in SYLLABLES)
HOW = dict(template="plain", prompt_capacity=24, batch_size=4, vocab_size=605)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("models")
    tiny.write_model(folder / "teacher", width=32, depth=2, seed=0, extra=MORE_WORDS)
    tiny.write_model(folder / "student", width=16, depth=2, seed=1, extra=MORE_WORDS)
    topics = [f"say {a} {b}" for a in tiny.WORDS[:3] for b in ("sky", "grass")]
    write_bank(folder / "bank.jsonl", topics)
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


def write_bank(file: pathlib.Path, topics: list[str]) -> str:
    file.write_text("".join(json.dumps({"instruction": topic}) + "\n" for topic in topics))
    return str(file)


def lines(file: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


# The policy


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_the_expected_gradient_is_that_of_the_expected_reward(weight):
    """Every round of two draws from three topics, weighted with its probability."""
    logits, values = jnp.array([0.5, -0.3, 0.1]), jnp.array([1.0, -2.0, 0.7])
    policy = jax.nn.softmax(logits)
    estimate = sum(
        policy[i]
        * policy[j]
        * data_free.policy_gradient(logits, jnp.array([i, j]), values[jnp.array([i, j])], weight)
        for i, j in itertools.product(range(3), repeat=2)
    )

    def expected(logits):
        return jax.nn.softmax(logits) @ values + weight * entropy(logits)

    np.testing.assert_allclose(estimate, jax.grad(expected)(logits), atol=1e-6)


def pull(settings: DataFree, values: np.ndarray, rounds: int) -> np.ndarray:
    """The policy's probabilities after so many rounds of a bandit with noisy rewards."""
    policy = data_free.init_policy(len(values), settings.learning_rate)
    rng = np.random.default_rng(0)
    for _ in range(rounds):
        probabilities = np.asarray(jax.nn.softmax(policy.logits), np.float64)
        drawn = rng.choice(len(values), settings.round_size, p=probabilities / probabilities.sum())
        rewards = values[drawn] + rng.normal(0, 0.5, settings.round_size)
        policy = data_free.reinforce(policy, drawn, rewards, settings)
    return np.asarray(jax.nn.softmax(policy.logits))


def test_the_better_topic_is_found_and_the_others_are_kept():
    values = np.zeros(8)
    values[5] = 1.0
    found = pull(DataFree(round_size=32), values, 30)
    assert 0.5 < found[5] < 0.95, found
    greedy = pull(DataFree(round_size=32, entropy_weight=0.0), values, 30)
    assert greedy[5] > 0.95 and greedy.min() < found.min() / 5, (greedy, found)


def test_the_bonus_holds_the_policy_at_the_exponential_of_the_advantages():
    values = jnp.array([1.0, -2.0, 0.7])
    logits = values / 0.5 + 3  # pi is proportional to exp(advantage / entropy_weight)
    policy = jax.nn.softmax(logits)
    gradients = jnp.stack(
        [data_free.policy_gradient(logits, jnp.array([i]), values[i], 0.5) for i in range(3)]
    )
    np.testing.assert_allclose(policy @ gradients, 0, atol=1e-6)


def test_a_topic_that_was_not_drawn_stays_where_it_is():
    settings = DataFree(learning_rate=0.2)
    policy = data_free.init_policy(5, settings.learning_rate)
    drawn, rewards = jnp.array([0, 1, 1, 3]), [0.3, 0.1, -0.7, 0.2]
    logits = data_free.reinforce(policy, drawn, rewards, settings).logits
    np.testing.assert_allclose(logits[jnp.array([2, 4])], 0, atol=1e-3)
    np.testing.assert_allclose(jnp.abs(logits[jnp.array([0, 1, 3])]), 0.2, atol=1e-3)


def test_rewards_are_normalised_within_the_round():
    found = data_free.normalised([1.0, 5.0, -3.0, 0.5])
    np.testing.assert_allclose([found.mean(), found.std()], [0, 1], atol=1e-6)
    np.testing.assert_array_equal(data_free.normalised([0.1] * 3), 0)
    with pytest.raises(ValueError, match="round_size: 1"):
        DataFree(round_size=1)


# The texts


@pytest.mark.parametrize(
    ("written", "request_"),
    [
        ("\n\n  What is rain?  \nIt is water.", "What is rain?"),
        ('"What is rain?"', "What is rain?"),
        ("“What is rain?”", "What is rain?"),
        ('"What is', "What is"),
        ('1. "What is rain?"', "What is rain?"),
        ("- What is rain?", "What is rain?"),
        ("(2) What is rain?", "What is rain?"),
        ("**Question:** What is rain?", "What is rain?"),
        ("**Question 1: What is rain?**", "What is rain?"),
        ("Sure! Here is a question:\n\nWhat is rain?", "What is rain?"),
        ("Here is a list: a, b. Sort it.", "Here is a list: a, b. Sort it."),
        ('Define "rain"', 'Define "rain"'),
        ('"Rain" and "snow"', '"Rain" and "snow"'),
        ("3.5 litres cost 7. What does one cost?", "3.5 litres cost 7. What does one cost?"),
        ("Sort these:\nrain, cat", "Sort these:"),
        ("  \n", ""),
        ("", ""),
    ],
)
def test_the_request_is_the_first_line_without_its_trimmings(written, request_):
    assert clean_request(written) == request_


def test_what_is_no_new_request():
    known = {data_free.words("What is rain?")}
    assert data_free.fault("?!", known) == "empty"
    assert data_free.fault("Rain!", known) == "one word"
    assert data_free.fault("what IS  rain", known) == "duplicate"
    assert data_free.fault("What is snow?", known) == ""


def test_similarity_is_the_largest_share_of_word_pairs():
    earlier = [data_free.word_pairs(text) for text in ("What is rain?", "Name two birds.")]
    assert data_free.similarity("What is snow?", earlier) == 1 / 3
    assert data_free.similarity("Name two birds", earlier) == 1
    assert data_free.similarity("Plan a party", earlier) == 0
    assert data_free.similarity("Plan a party", []) == 0


# The bank


def test_the_bank_has_distinct_topics_of_many_tasks():
    bank = data_free.read_bank("package:topics.jsonl")
    file = importlib.resources.files("promptkd_jax") / "prompts" / "topics.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="ascii").splitlines()]
    assert len(bank) == len(rows) == 64
    for field in ("instruction", "topic"):
        assert len({row[field].lower() for row in rows}) == 64
    assert len({row["task"] for row in rows}) == 16
    assert all(row["instruction"].endswith(", and nothing else.") for row in rows)


def test_a_bank_that_leaves_no_choice_is_refused(tmp_path):
    twice = write_bank(tmp_path / "bank.jsonl", ["say red", "say a", "say red"])
    with pytest.raises(DataError, match="bank.jsonl: .*found twice: 'say red'"):
        data_free.read_bank(twice)
    with pytest.raises(DataError, match="at least two"):
        data_free.read_bank(write_bank(tmp_path / "bank.jsonl", ["say red"]))


def test_a_topic_longer_than_a_prompt_is_refused(teacher, student, settings, tmp_path):
    with pytest.raises(DataError, match="longer than"):
        write_requests(
            teacher, student, tmp_path / "r.jsonl", settings, **HOW | {"prompt_capacity": 2}
        )


# Writing


@pytest.fixture(scope="module")
def whole(folder, teacher, student, settings):
    """An uninterrupted call: its records and its file."""
    file = folder / "whole.jsonl"
    return write_requests(teacher, student, file, settings, **HOW), file


def test_requests_are_records_without_answers(whole, teacher):
    records, file = whole
    assert len(records) == 18
    assert all(record.input == "" and record.outputs == () for record in records)
    assert len({data_free.words(record.instruction) for record in records}) == 18
    assert not any("<end>" in record.instruction for record in records)
    kept = [line["request"] for line in lines(file) if line.get("fault") == ""]
    assert [record.instruction for record in records] == kept[:18]


def test_the_parts_of_a_reward_are_what_they_are_said_to_be(whole, teacher, settings):
    requests = [line for line in lines(whole[1]) if line.get("fault") == ""]
    for line in requests:
        parts = line["kl"], line["similarity"], line["surprise"]
        assert line["kl"] > 0 and 0 <= line["similarity"] <= 1 and line["surprise"] > 0
        assert line["reward"] == parts[0] - parts[1] - 0.2 * parts[2]
    first = requests[0]
    prompt, text = (teacher.tokenizer(first[name])["input_ids"] for name in ("topic", "request"))
    text = text[: settings.max_request_tokens]
    tokens = jnp.array([prompt + text])
    log_p = jax.nn.log_softmax(logits_of(teacher, tokens)[0, len(prompt) - 1 : -1])
    expected = -np.mean([log_p[t, token] for t, token in enumerate(text)])
    np.testing.assert_allclose(first["surprise"], expected, rtol=1e-4)


def test_disagreement_is_the_mean_kl_over_the_answer(teacher, student, settings, monkeypatch):
    requests, answers = ["say red sky", "name two"], [np.array([70, 271, 0]), np.array([300])]
    monkeypatch.setattr(data_free, "write_answers", lambda *rest, **named: iter(answers))
    pair = data_free._Pair(teacher, student, **HOW)
    found = data_free._disagreements(pair, settings, requests, jax.random.key(0))
    for value, request, answer in zip(found, requests, answers):
        prompt = teacher.tokenizer(request)["input_ids"]
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
    assert write_requests(teacher, student, copy, settings, **HOW) == records
    assert copy.read_text() == file.read_text()


def test_more_requests_continue_the_same_file(whole, teacher, student, settings, tmp_path):
    records, file = whole
    fewer = dataclasses.replace(settings, requests=4)
    copy = tmp_path / "requests.jsonl"
    assert write_requests(teacher, student, copy, fewer, **HOW) == records[:4]
    assert write_requests(teacher, student, copy, settings, **HOW) == records
    assert copy.read_text() == file.read_text()


def test_a_finished_file_is_only_read(whole, teacher, student, settings, monkeypatch):
    monkeypatch.setattr(data_free, "write_answers", None)
    assert write_requests(teacher, student, whole[1], settings, **HOW) == whole[0]


def test_a_student_like_its_teacher_disagrees_nowhere(teacher, settings, tmp_path):
    few = dataclasses.replace(settings, requests=2)
    write_requests(teacher, teacher, tmp_path / "r.jsonl", few, **HOW)
    assert {line["kl"] for line in lines(tmp_path / "r.jsonl") if line.get("fault") == ""} == {0.0}


@pytest.mark.parametrize("change", ["teacher", "student", "seed", "template"])
def test_a_file_of_another_making_is_refused(whole, teacher, student, settings, change):
    models = {"teacher": (student, student), "student": (teacher, teacher)}
    chosen = dataclasses.replace(settings, seed=11) if change == "seed" else settings
    how = HOW | ({"template": "alpaca", "prompt_capacity": 160} if change == "template" else {})
    with pytest.raises(DataError, match=f"\n  {change}: there"):
        write_requests(*models.get(change, (teacher, student)), whole[1], chosen, **how)


def test_a_file_without_its_manifest_is_refused(whole, teacher, student, settings, tmp_path):
    (tmp_path / "r.jsonl").write_text(whole[1].read_text())
    with pytest.raises(DataError, match="r.manifest.json, which says what made it, is missing"):
        write_requests(teacher, student, tmp_path / "r.jsonl", settings, **HOW)


def test_duplicates_are_dropped_counted_and_the_end_of_patience_is_told(
    teacher, student, settings, tmp_path
):
    """A greedy teacher has one request per topic, and no more."""
    greedy = dataclasses.replace(settings, temperature=0.0, round_size=8, seed=3)
    file = tmp_path / "requests.jsonl"
    with pytest.raises(DataError, match=r"dropped: \d+ duplicate.*; 18 are wanted, but the last 5"):
        write_requests(teacher, student, file, greedy, **HOW)
    requests = [line for line in lines(file) if "request" in line]
    kept = [line["request"] for line in requests if not line["fault"]]
    assert 0 < len(kept) <= 6 and len(set(kept)) == len(kept)
    dropped = [line for line in requests if line["fault"]]
    assert all(line["kl"] is None for line in dropped)
    first = requests[:8]
    worst = max(line["surprise"] for line in first if not line["fault"])
    assert {line["reward"] for line in first if line["fault"]} == {-1 - 0.2 * worst}


def test_a_request_that_fits_no_prompt_is_dropped(teacher, student, settings, tmp_path):
    tight = HOW | {"prompt_capacity": 13}
    file = tmp_path / "requests.jsonl"
    few = dataclasses.replace(settings, requests=2)
    for record in write_requests(teacher, student, file, few, **tight):
        assert len(teacher.tokenizer(record.instruction)["input_ids"]) <= 13
    assert "too long" in {line.get("fault") for line in lines(file)}


def test_a_damaged_line_is_named(whole, teacher, student, settings, tmp_path):
    copy = tmp_path / "requests.jsonl"
    manifest = whole[1].with_suffix(".manifest.json").read_text()
    copy.with_suffix(".manifest.json").write_text(manifest)
    copy.write_text(whole[1].read_text().replace('{"topic"', '{"top', 1))
    with pytest.raises(DataError, match="requests.jsonl:1: broken JSON"):
        write_requests(teacher, student, copy, settings, **HOW)
