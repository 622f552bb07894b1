"""Facts about the prompt sets that ship inside the package."""

import json
import re
from collections import Counter
from importlib.resources import files

import pytest

TRAIN, HELD_OUT = "quickstart_train.jsonl", "quickstart_heldout.jsonl"


def read_prompts(name: str) -> list[dict[str, str]]:
    text = (files("promptkd_jax") / "data" / "assets" / name).read_text(encoding="ascii")
    return [json.loads(line) for line in text.splitlines()]


def words(row: dict[str, str]) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z0-9']+", f"{row['instruction']} {row['input']}".lower()))


def test_row_counts():
    assert len(read_prompts(HELD_OUT)) == 48
    assert len(read_prompts(TRAIN)) + len(read_prompts(HELD_OUT)) >= 300


@pytest.mark.parametrize("name", [TRAIN, HELD_OUT])
def test_every_row_has_the_required_keys(name):
    for number, row in enumerate(read_prompts(name), start=1):
        where = f"{name}:{number}: {row}"
        assert set(row) == {"instruction", "input", "category"}, where
        assert all(isinstance(value, str) and value == value.strip() for value in row.values()), (
            where
        )
        assert row["instruction"] and row["category"], where


@pytest.mark.parametrize("name", [TRAIN, HELD_OUT])
def test_rows_are_short(name):
    for number, row in enumerate(read_prompts(name), start=1):
        where = f"{name}:{number}: {row}"
        assert 4 <= len(row["instruction"].split()) <= 20, where
        assert len(row["input"].split()) < 12, where


def test_no_instruction_is_shared_or_repeated():
    train = [row["instruction"].lower() for row in read_prompts(TRAIN)]
    held_out = [row["instruction"].lower() for row in read_prompts(HELD_OUT)]
    assert not set(train) & set(held_out), sorted(set(train) & set(held_out))
    repeated = [text for text, count in Counter(train + held_out).items() if count > 1]
    assert not repeated, repeated


def test_no_held_out_prompt_is_close_to_a_training_prompt():
    train = [(row, words(row)) for row in read_prompts(TRAIN)]
    for held_out in read_prompts(HELD_OUT):
        for row, other in train:
            shared = len(words(held_out) & other) / min(len(words(held_out)), len(other))
            assert shared <= 0.6, f"{shared:.2f} of the words shared: {held_out} and {row}"


def test_both_files_cover_the_same_categories_evenly():
    train = Counter(row["category"] for row in read_prompts(TRAIN))
    held_out = Counter(row["category"] for row in read_prompts(HELD_OUT))
    assert set(train) == set(held_out)
    assert len(train) >= 12
    assert len(set(train.values())) == len(set(held_out.values())) == 1, (train, held_out)
