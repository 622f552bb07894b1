"""Rows in files that are mapped into memory, and rows of several sources in one batch."""

import collections
import itertools
import os
import shutil
import subprocess
import sys

import grain
import numpy as np
import pytest
from helpers.chats import CHATML, chat_tokenizer, conversation
from helpers.records import example

from promptkd_jax.data.batches import stream, train_batches
from promptkd_jax.data.mapped_rows import mapped_rows
from promptkd_jax.data.rows import (
    concatenate_rows,
    fingerprint_supervised,
    pack,
    select_rows,
    tokenize,
)
from promptkd_jax.data.templates import PromptFormat
from promptkd_jax.infra.errors import DataError

TALKS = [
    conversation("say red", "the red", "and", "blue"),
    conversation("say blue", "blue " * 400),
    conversation("say", "red", "and", "the sky"),
    conversation("red " * 400, "red"),
]


def write(records, supervise="all", left_out=(), calls=None):
    def into_files(into):
        if calls is not None:
            calls.append(into)
        tokenizer = chat_tokenizer(CHATML)
        how = dict(max_prompt_length=100, max_length=200, eos_id=0, supervise=supervise)
        rows = tokenize(iter(records), tokenizer, PromptFormat("chat"), into=into, **how)
        return rows, dict(left_out)

    return into_files


@pytest.mark.parametrize("supervise", ["last", "all"])
@pytest.mark.parametrize("place", ["kept", "gone"])
def test_mapped_rows_are_those_in_memory(tmp_path, supervise, place):
    expected, _ = write(TALKS, supervise)(None)
    folder = tmp_path / "tokens" if place == "kept" else None
    rows = mapped_rows(folder, {"a": 1}, write(TALKS, supervise, {"unused field 'x'": 2}))
    assert fingerprint_supervised(rows) == fingerprint_supervised(expected)
    assert rows.num_supervised.tolist() == expected.num_supervised.tolist()
    assert rows.left_out == {"unused field 'x'": 2} and rows.records == ()
    for name in ("dropped", "cut", "shortened", "date"):
        assert getattr(rows, name) == getattr(expected, name)
    assert (rows.dropped, rows.cut) == (1, 1)
    assert (rows.supervised is None) == (supervise == "last")
    assert rows.tokens[-1].tolist() == rows.tokens[2].tolist() and len(list(rows.tokens)) == 3
    with pytest.raises(IndexError):
        rows.tokens[3]
    how = dict(batch_size=2, length=200, seed=3)
    for ours, theirs in zip(
        stream(train_batches(rows, **how), 0), itertools.islice(train_batches(expected, **how), 4)
    ):
        assert (ours.tokens == theirs.tokens).all()
        assert np.array_equal(ours.supervised, theirs.supervised)
    chosen = select_rows(rows, [2, 0])
    assert chosen.tokens[1].tolist() == rows.tokens[0].tolist()


def test_packed_text_is_mapped_too(tmp_path):
    tokenizer, texts = chat_tokenizer(None), ["the red sky", "blue " * 2000, "one", "two"] * 600
    expected = pack(texts, tokenizer, 32, 0)
    rows = mapped_rows(tmp_path, {}, lambda into: (pack(iter(texts), tokenizer, 32, 0, into), {}))
    assert fingerprint_supervised(rows) == fingerprint_supervised(expected)
    whole = np.concatenate(expected.tokens)
    assert len(whole) % 32 == 0 and (whole == 0).sum() in range(2390, 2401)
    # Four bytes a token; a row takes sixteen more.
    size = sum(file.stat().st_size for file in tmp_path.rglob("*.bin"))
    assert size == 4 * len(whole) + 16 * len(rows.tokens)


def test_rows_are_made_once_of_the_same(tmp_path):
    calls = []
    for made_from in ({"a": 1}, {"a": 1}, {"a": 2}, {"a": 1}):
        mapped_rows(tmp_path, made_from, write(TALKS, calls=calls))
    assert len(calls) == 2
    assert len(list(tmp_path.iterdir())) == 2


def test_what_is_not_whole_is_never_taken(tmp_path):
    def stopped(into):
        write(TALKS)(into)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mapped_rows(tmp_path, {}, stopped)
    with pytest.raises(DataError, match="the data: 2 examples cannot be used"):
        broken = CHATML.replace("{{ m['role'] }}", "{{ 1 // (m.content | length - 2) }}")
        broken = chat_tokenizer(broken)
        how = dict(max_prompt_length=100, max_length=200, eos_id=0)
        some = [example("hi", "", ("a",))] * 2
        mapped_rows(
            tmp_path,
            {},
            lambda into: (tokenize(some, broken, PromptFormat("chat"), into=into, **how), {}),
        )
    assert list(tmp_path.iterdir()) == []
    # What a killed process of this machine left is removed; that of a living one is not.
    rows = mapped_rows(tmp_path, {}, write(TALKS))
    [folder] = tmp_path.iterdir()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    node = os.uname().nodename
    left = [f".unfinished-{process}-0@{node}" for process in (ended.pid, os.getpid())]
    left += [f".unfinished-{ended.pid}-0@{other}" for other in ("elsewhere", f"{node}-7")]
    for name in left:
        shutil.copytree(folder, tmp_path / name)
    mapped_rows(tmp_path, {"other": 1}, write(TALKS))
    assert [name for name in left if (tmp_path / name).exists()] == left[1:]
    assert rows.tokens[0].tolist() == mapped_rows(tmp_path, {}, None).tokens[0].tolist()


def test_damaged_files_are_named(tmp_path):
    mapped_rows(tmp_path, {}, write(TALKS))
    [file] = tmp_path.rglob("tokens.bin")
    os.truncate(file, 8)
    with pytest.raises(DataError, match=r"damaged: tokens\.bin has 8 bytes, expected .*; remove"):
        mapped_rows(tmp_path, {}, None)
    (file.parent / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="damaged: Expecting"):
        mapped_rows(tmp_path, {}, None)


# Several sources


def numbered(start, count, masked=False):
    """Rows of which each is told by its first token."""
    tokens = [np.array([i, 1, 2], np.int32) for i in range(start, start + count)]
    rows, _ = write(TALKS[:1])(None)
    supervised = [np.array([False, False, True])] * count if masked else None
    return rows._replace(
        tokens=tokens,
        prompt_lengths=np.ones(count, np.int32),
        records=TALKS[:1] * count,
        supervised=supervised,
    )


def first_tokens(rows, batches, batch_size=10, start=0):
    batches_of_rows = stream(train_batches(rows, batch_size=batch_size, length=4, seed=5), start)
    return [batch.tokens[:, 0].tolist() for batch in itertools.islice(batches_of_rows, batches)]


def test_each_source_has_its_share_of_a_batch():
    rows = concatenate_rows([numbered(0, 5), numbered(100, 200), numbered(500, 50)], [2, 1, 1])
    assert len(rows.tokens) == 255 and rows.shares == ((5, 2), (200, 1), (50, 1))
    batches = first_tokens(rows, 100)
    drawn = collections.Counter(token // 100 for batch in batches for token in batch)
    assert drawn[0] == 500 and drawn[1] + drawn[2] == 250 and drawn[5] == 250
    # A small one is seen again and again, each time in another order, and wholly each time.
    small = [token for batch in batches for token in batch if token < 100]
    rounds = [small[i : i + 5] for i in range(0, 500, 5)]
    assert all(sorted(one) == [0, 1, 2, 3, 4] for one in rounds)
    assert len(set(map(tuple, rounds))) > 50
    large = [token for batch in batches for token in batch if 100 <= token < 300]
    assert len(set(large[:200])) == 200
    # The position is one number, whatever was read before.
    assert first_tokens(rows, 3, start=57) == batches[57:60]
    assert first_tokens(rows, 100) == batches


def test_rows_of_sources_keep_which_tokens_are_supervised():
    parts = [numbered(0, 5), numbered(100, 20, masked=True)]
    rows = concatenate_rows(parts, [1.0, 3.0])
    assert rows.num_supervised.tolist() == [2] * 5 + [1] * 20
    assert rows.supervised[3].tolist() == [False, True, True]
    assert (rows.tokens[-1].tolist(), len(rows.records)) == ([119, 1, 2], 25)
    assert concatenate_rows(parts[:1], [3.0]) is parts[0]
    some = select_rows(rows, [1, 4, 5, 6, 24])
    assert some.shares == ((2, 1.0), (3, 3.0))
    assert [row[0] for row in some.tokens] == [1, 4, 100, 101, 119]
    with pytest.raises(ValueError, match="ascending"):
        select_rows(rows, [4, 1])


def test_one_source_is_shuffled_as_ever():
    rows = numbered(0, 30)
    spread = int(np.random.SeedSequence(5).generate_state(1)[0])
    order = grain.MapDataset.range(30).shuffle(spread)
    assert first_tokens(rows, 3) == [[order[i] for i in range(j, j + 10)] for j in (0, 10, 20)]
