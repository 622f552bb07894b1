"""The policy's gradient is the enumerated one, and a request is told from what is none."""

import importlib.resources
import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from promptkd_jax.distill.losses.losses import entropy
from promptkd_jax.inference import topic_policy
from promptkd_jax.infra.errors import DataError

RATE = 0.2  # learning rate of the policy

# The policy


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_the_expected_gradient_is_that_of_the_expected_reward(weight):
    """Every round of two draws from three topics, weighted with its probability."""
    logits, values = jnp.array([0.5, -0.3, 0.1]), jnp.array([1.0, -2.0, 0.7])
    policy = jax.nn.softmax(logits)
    estimate = sum(
        policy[i]
        * policy[j]
        * topic_policy.policy_gradient(logits, jnp.array([i, j]), values[jnp.array([i, j])], weight)
        for i, j in itertools.product(range(3), repeat=2)
    )

    def expected(logits):
        return jax.nn.softmax(logits) @ values + weight * entropy(logits)

    np.testing.assert_allclose(estimate, jax.grad(expected)(logits), atol=1e-6)


def pull(values: np.ndarray, *, rounds: int, entropy_weight: float) -> np.ndarray:
    """The policy's probabilities after rounds of 32 draws from a bandit with noisy rewards."""
    policy = topic_policy.init_policy(len(values), RATE)
    rng = np.random.default_rng(0)
    for _ in range(rounds):
        probabilities = np.asarray(jax.nn.softmax(policy.logits), np.float64)
        drawn = rng.choice(len(values), 32, p=probabilities / probabilities.sum())
        rewards = values[drawn] + rng.normal(0, 0.5, 32)
        policy = topic_policy.reinforce(policy, drawn, rewards, RATE, entropy_weight)
    return np.asarray(jax.nn.softmax(policy.logits))


def test_the_better_topic_is_found_and_the_others_are_kept():
    values = np.zeros(8)
    values[5] = 1.0
    found = pull(values, rounds=30, entropy_weight=0.5)
    assert 0.5 < found[5] < 0.95, found
    greedy = pull(values, rounds=30, entropy_weight=0.0)
    assert greedy[5] > 0.95 and greedy.min() < found.min() / 5, (greedy, found)


def test_the_bonus_holds_the_policy_at_the_exponential_of_the_advantages():
    values = jnp.array([1.0, -2.0, 0.7])
    logits = values / 0.5 + 3  # pi is proportional to exp(advantage / entropy_weight)
    policy = jax.nn.softmax(logits)
    gradients = jnp.stack(
        [topic_policy.policy_gradient(logits, jnp.array([i]), values[i], 0.5) for i in range(3)]
    )
    np.testing.assert_allclose(policy @ gradients, 0, atol=1e-6)


def test_a_topic_that_was_not_drawn_stays_where_it_is():
    policy = topic_policy.init_policy(5, RATE)
    drawn, rewards = jnp.array([0, 1, 1, 3]), [0.3, 0.1, -0.7, 0.2]
    logits = topic_policy.reinforce(policy, drawn, rewards, RATE, 0.5).logits
    np.testing.assert_allclose(logits[jnp.array([2, 4])], 0, atol=1e-3)
    np.testing.assert_allclose(jnp.abs(logits[jnp.array([0, 1, 3])]), RATE, atol=1e-3)


def test_rewards_are_normalised_within_the_round():
    found = topic_policy.normalised([1.0, 5.0, -3.0, 0.5])
    np.testing.assert_allclose([found.mean(), found.std()], [0, 1], atol=1e-6)
    np.testing.assert_array_equal(topic_policy.normalised([0.1] * 3), 0)


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
    assert topic_policy.clean_prompt(written) == request_


def test_similarity_is_the_largest_share_of_word_pairs():
    earlier = ("What is rain?", "Name two birds.")
    for text, share in (("What is snow?", 1 / 3), ("Name two birds", 1), ("Plan a party", 0)):
        assert topic_policy.similarities([text], earlier) == [share]
    assert topic_policy.similarities(["Plan a party"], []) == [0]


def test_faults_of_a_round_are_those_of_its_texts_in_turn():
    texts = [
        "?!",
        "What is rain?",
        "Why?",
        "name two birds",
        "What is RAIN",
        "say it all again",
        "Snow!",
    ]
    found = topic_policy.faults(texts, ["Name two birds."], fits=lambda text: "again" not in text)
    assert found == ["empty", "", "one word", "duplicate", "duplicate", "too long", "one word"]


def test_similarities_count_what_came_before():
    requests = ["Name a bird", "What is snow?", "what is snow"]
    found = topic_policy.similarities(requests, ["What is rain?"])
    assert found == [0, 1 / 3, 1]


# The bank


def write_bank(file: pathlib.Path, prompts: list[str]) -> str:
    file.write_text("".join(json.dumps({"instruction": prompt}) + "\n" for prompt in prompts))
    return str(file)


def test_the_bank_has_distinct_topics_of_many_tasks():
    bank = topic_policy.read_bank("package:topics.jsonl")
    file = importlib.resources.files("promptkd_jax") / "data" / "assets" / "topics.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="ascii").splitlines()]
    assert len(bank) == len(rows) == 64
    for field in ("instruction", "topic"):
        assert len({row[field].lower() for row in rows}) == 64
    assert len({row["task"] for row in rows}) == 16
    assert all(row["instruction"].endswith(", and nothing else.") for row in rows)


def test_a_bank_that_leaves_no_choice_is_refused(tmp_path):
    twice = write_bank(tmp_path / "bank.jsonl", ["say red", "say a", "say red"])
    with pytest.raises(DataError, match="bank.jsonl: .*found twice: 'say red'"):
        topic_policy.read_bank(twice)
    with pytest.raises(DataError, match="at least two"):
        topic_policy.read_bank(write_bank(tmp_path / "bank.jsonl", ["say red"]))
