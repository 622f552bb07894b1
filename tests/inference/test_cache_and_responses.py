"""What the teacher wrote down: it is what the teacher says, written once, and for nobody else."""

import functools
import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import bucket, tiny
from safetensors.numpy import load_file, save_file

from promptkd_jax.cli import cache
from promptkd_jax.cli.main import main
from promptkd_jax.data import logprobs
from promptkd_jax.data.batch import responses
from promptkd_jax.data.batches import collate, stream, train_batches
from promptkd_jax.data.reading.record_stream import read_records
from promptkd_jax.data.rows import Rows, tokenize
from promptkd_jax.data.templates import PromptFormat
from promptkd_jax.distill.losses import chunked_loss, losses
from promptkd_jax.distill.losses.chunked_loss import linear_loss
from promptkd_jax.inference import logprob_cache, teacher_responses
from promptkd_jax.inference.generate import generate_responses
from promptkd_jax.infra import distributed
from promptkd_jax.infra.errors import ConfigError, DataError
from promptkd_jax.infra.files import read_text, to_path, write_text
from promptkd_jax.models.decoder import head
from promptkd_jax.models.io import identity
from promptkd_jax.models.language_model import LazyLogits
from promptkd_jax.models.load import load_model
from promptkd_jax.models.model import Model
from promptkd_jax.models.sampling_rules import Sampling
from promptkd_jax.training.config.checks import checked

LENGTH = 24
SAMPLING = Sampling(eos_ids=(0,))
VOCABULARY = len(tiny.tokenizer())


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Model:
    """With 3 unused rows at the end of its vocabulary."""
    folder = tmp_path_factory.mktemp("models") / "teacher"
    return load_model(tiny.write_model(folder, width=16, depth=2, seed=0, pad=3))


@pytest.fixture(scope="module")
def rows(teacher, tmp_path_factory) -> Rows:
    """7 rows with responses of different lengths, one of them without any."""
    outputs = ["the red", "is", "", "two and three or one", "sky", "the the the", "fire"]
    lines = [{"instruction": f"say {tiny.WORDS[i]}", "output": o} for i, o in enumerate(outputs)]
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tokenize(
        read_records(str(file)),
        teacher.tokenizer,
        prompt_format=PromptFormat("plain"),
        max_prompt_length=12,
        max_length=LENGTH,
        eos_id=0,
    )


def changed_rows(rows: Rows, number: int, column: int) -> Rows:
    """One token of one row is another."""
    tokens = [row.copy() for row in rows.tokens]
    tokens[number][column] += 1
    return rows._replace(tokens=tokens)


def with_a_changed_weight(teacher: Model, folder: pathlib.Path) -> Model:
    shutil.copytree(teacher.name, folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("norm.weight"))
    tensors[name] = tensors[name] + np.eye(1, tensors[name].size, dtype=np.float32)[0] / 8
    save_file(tensors, file)
    return load_model(str(folder))


def write(teacher, rows, folder, **changes) -> logprobs.Cached:
    how = dict(top_k=4, batch_size=2, length=LENGTH, vocab_size=VOCABULARY)
    return logprob_cache.write_cache(teacher, rows, folder, **(how | changes))


def reopen(teacher, rows, folder, **changes) -> logprobs.Cached:
    tokenizer = changes.get("tokenizer") or teacher.tokenizer
    config = teacher.decoder.config
    whose = identity.teacher_identity(teacher.name, config.dtype, config.param_dtype)
    how = dict(teacher=whose, tokenizer=tokenizer, rows=rows, vocab_size=VOCABULARY)
    return logprob_cache.open_cache(folder, **(how | changes))


@pytest.fixture(scope="module")
def small(teacher, rows, tmp_path_factory) -> pathlib.Path:
    """A finished cache of 4 tokens at each position; tests that change it take a copy."""
    folder = tmp_path_factory.mktemp("caches") / "small"
    write(teacher, rows, folder)
    return folder


def dense(teacher: Model, row: np.ndarray, prompt_length: int) -> np.ndarray:
    """The teacher's log-probabilities at a row's response positions, without batch or chunks."""
    tokens = np.pad(row, (0, LENGTH - len(row)))[None]
    found = all_log_probs(teacher.decoder, teacher.params, tokens)
    return np.asarray(found)[0, prompt_length - 1 : len(row) - 1]


@functools.partial(jax.jit, static_argnums=0)
def all_log_probs(decoder, params, tokens):
    hidden = decoder.apply({"params": params}, tokens)
    return jax.nn.log_softmax(hidden @ head(params)[:VOCABULARY].T)


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def stops_after(monkeypatch, calls: int) -> None:
    """The process dies at the call of the teacher that comes then."""
    original = logprob_cache.eval_batches

    def batches(*args, **kwargs):
        for number, batch in enumerate(original(*args, **kwargs)):
            if number == calls:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(logprob_cache, "eval_batches", batches)


# The cache


def test_a_full_cache_is_the_teacher(teacher, rows, tmp_path):
    """At every response position, the EOS included, over the shared vocabulary."""
    cached = write(teacher, rows, tmp_path, top_k=VOCABULARY)
    found = cached.rows(range(len(rows.tokens)), 10)
    assert found.ids.dtype == np.int32 and found.log_probs.dtype == np.float32
    tokens = sum(map(len, rows.tokens)) - rows.prompt_lengths.sum()
    assert (tmp_path / "log_probs.npy").stat().st_size == 128 + 4 * tokens * VOCABULARY
    for number, (row, prompt_length) in enumerate(zip(rows.tokens, rows.prompt_lengths)):
        expected = dense(teacher, row, prompt_length)
        assert len(expected) == len(row) - prompt_length
        whole = np.full((10, VOCABULARY), np.nan)
        np.put_along_axis(whole, found.ids[number], found.log_probs[number], axis=1)
        np.testing.assert_allclose(whole[: len(expected)], expected, rtol=1e-6, atol=1e-6)


def test_the_kept_are_the_largest(teacher, rows, small):
    found = reopen(teacher, rows, small).rows([3, 5], 10)
    for b, number in enumerate([3, 5]):
        expected = dense(teacher, rows.tokens[number], rows.prompt_lengths[number])
        order = np.argsort(-expected, axis=1)[:, :4]
        np.testing.assert_array_equal(found.ids[b, : len(order)], order)
        kept = np.take_along_axis(expected, order, axis=1)
        np.testing.assert_allclose(found.log_probs[b, : len(order)], kept, rtol=1e-6, atol=1e-6)
        rest = np.log1p(-np.exp(kept.astype(np.float64)).sum(axis=1))
        np.testing.assert_allclose(found.tail[b, : len(order)], rest, rtol=1e-5, atol=1e-5)
        uniform = np.log(1 - 4 / VOCABULARY)
        np.testing.assert_allclose(found.tail[b, len(order) :], uniform, rtol=1e-6)


def test_the_tail_of_a_sure_teacher_is_kept_though_it_rounds_to_0():
    """Logits 0, -30, -31, then -40: all but the first add up to less than float32 tells from 1."""
    logits = jnp.full((1, 1, 200), -40.0).at[0, 0, :3].set(jnp.array([0.0, -30.0, -31.0]))
    found = chunked_loss.top_k(LazyLogits(jnp.ones((1, 1, 1)), logits[0, 0, :, None]), 3)
    np.testing.assert_allclose(found.tail, -40 + np.log(197), rtol=1e-6)
    assert 1 - np.exp(found.log_probs, dtype=np.float32).sum() <= 0


def test_a_cache_without_tails_is_refused(teacher, rows, small, tmp_path):
    """As an older version wrote it."""
    folder = tmp_path / "older"
    shutil.copytree(small, folder)
    written = json.loads((folder / "manifest.json").read_text())
    del written["arrays"]
    (folder / "manifest.json").write_text(json.dumps(written))
    with pytest.raises(DataError, match="arrays: there None, now .*tail.npy"):
        reopen(teacher, rows, folder)


def test_positions_are_computed_in_blocks(monkeypatch):
    """The blocks change nothing, and no array is as large as all logits."""
    hidden, kernel = (
        jax.random.normal(jax.random.key(i), s) for i, s in ((0, (2, 7, 5)), (1, (50, 5)))
    )
    model = LazyLogits(hidden, kernel)
    monkeypatch.setattr(chunked_loss, "chunk_elements", lambda _: 3 * 2 * 50)
    values, ids = jax.lax.top_k(losses.log_probs(model.logits()), 3)
    found = chunked_loss.top_k(model, 3)
    np.testing.assert_array_equal(found.ids, ids)
    np.testing.assert_allclose(found.log_probs, values, rtol=1e-6)
    shapes = re.findall(r"f32\[([\d,]+)\]", str(jax.make_jaxpr(chunked_loss.top_k, 1)(model, 3)))
    assert max(np.prod(list(map(int, shape.split(",")))) for shape in shapes) == 3 * 2 * 50


@pytest.mark.parametrize("kept", [4, "all"])
def test_a_loss_on_cached_batches_counts_real_positions_alone(teacher, rows, tmp_path, kept):
    """What fills a batch up gives no NaN, in values or gradients, and a full cache's loss is 0."""
    kept = VOCABULARY if kept == "all" else kept
    cached = write(teacher, rows, tmp_path, top_k=kept)
    batch = collate(rows, [1, 3, 2], length=LENGTH)
    target, where = cached.rows([1, 3, 2], 10), responses(batch, 10)
    hidden = teacher.decoder.apply({"params": teacher.params}, batch.tokens)
    hidden = jnp.take_along_axis(hidden, where.positions[:, :, None], axis=1)

    def loss(hidden):
        learner = LazyLogits(hidden, head(teacher.params)[:VOCABULARY])
        return linear_loss((losses.forward_kl,), learner, (target,), where.mask)[0]

    value, gradient = jax.value_and_grad(loss)(hidden)
    assert abs(value) < 1e-4  # the teacher against itself
    assert np.isfinite(gradient).all()
    assert loss(hidden + 1) > 0.01


def test_large_vocabularies_need_more_than_16_bits(tmp_path):
    for vocab_size, dtype in ((2**16, np.uint16), (2**16 + 1, np.int32)):
        logprob_cache._create_arrays(tmp_path, np.array([1]), 2, vocab_size)
        logprob_cache._write_entries(tmp_path / "ids.npy", np.array([[5, vocab_size - 1]]), 0)
        stored = np.load(tmp_path / "ids.npy")
        assert stored.dtype == dtype and stored.tolist() == [[5, vocab_size - 1]]


@pytest.mark.parametrize("calls", [0, 1, 3])
def test_a_stopped_cache_goes_on_to_the_same_bytes(
    teacher, rows, small, tmp_path, monkeypatch, calls
):
    with monkeypatch.context() as dying:
        stops_after(dying, calls)
        with pytest.raises(KeyboardInterrupt):
            write(teacher, rows, tmp_path)
    with pytest.raises(DataError, match=f"{2 * calls} of 7 rows written; run the same"):
        reopen(teacher, rows, tmp_path)
    stops_after(monkeypatch, 4 - calls)  # and no batch is computed twice
    write(teacher, rows, tmp_path)
    assert contents(tmp_path) == contents(small)


def test_what_was_written_past_the_progress_is_written_again(teacher, rows, small, tmp_path):
    """As after a machine that lost power: the manifest is behind, what came after it is torn."""
    shutil.copytree(small, tmp_path, dirs_exist_ok=True)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"rows_written": 5}))
    array = np.load(tmp_path / "log_probs.npy", mmap_mode="r+")
    array[np.load(small / "offsets.npy")[4] :] = 7
    array.flush()
    write(teacher, rows, tmp_path)
    assert contents(tmp_path) == contents(small)


def test_folders_killed_before_the_manifest_begin_anew(teacher, rows, small, tmp_path):
    (tmp_path / "ids.npy").write_bytes(b"torn")
    (tmp_path / "manifest.json.unfinished").write_text("{")
    write(teacher, rows, tmp_path)
    assert contents(tmp_path) == contents(small)


def test_a_finished_cache_does_not_ask_the_teacher(teacher, rows, small, monkeypatch):
    monkeypatch.setattr(logprob_cache, "_largest", None)
    before = {file: file.stat().st_mtime_ns for file in small.iterdir()}
    write(teacher, rows, small)
    assert before == {file: file.stat().st_mtime_ns for file in small.iterdir()}


def refused(message: str):
    """Exactly one thing differs, and the message names it."""
    return pytest.raises(DataError, match=rf"from something else; [^\n]*\n  {message}: there .*$")


def test_a_cache_of_something_else_is_refused(teacher, rows, small, tmp_path):
    other = with_a_changed_weight(teacher, tmp_path / "other")
    for act in (write, reopen):
        with refused("teacher"):
            act(other, rows, small)
        with refused("rows"):
            act(teacher, changed_rows(rows, 3, -1), small)
        with refused("rows"):
            act(teacher, rows._replace(prompt_lengths=rows.prompt_lengths - 1), small)
        with refused("rows"):
            act(
                teacher,
                rows._replace(tokens=rows.tokens[:-1], prompt_lengths=rows.prompt_lengths[:-1]),
                small,
            )
        with refused("tokenizer"):
            act(
                teacher.replace(tokenizer=tiny.tokenizer(("Ġpurple",))),
                rows,
                small,
                vocab_size=VOCABULARY,
            )
        with refused("vocab_size"):
            act(teacher, rows, small, vocab_size=VOCABULARY - 1)
        with refused("top_k"):
            act(teacher, rows, small, top_k=5)
        with refused("dtype"):
            act(load_model(teacher.name, dtype="bfloat16"), rows, small)


def test_a_teacher_that_moved_is_the_same(teacher, rows, small, tmp_path):
    moved = shutil.copytree(teacher.name, tmp_path / "moved")
    reopen(load_model(str(moved)), rows, small, top_k=4)


def test_a_synthetic_teacher_is_known_by_its_name(rows, tmp_path):
    one, other = (load_model(f"synthetic:llama-D32-L1-S{seed}") for seed in (0, 1))
    how = dict(vocab_size=one.vocab_size)
    known = rows._replace(tokens=[row % one.vocab_size for row in rows.tokens])
    write(one, known, tmp_path, **how)
    reopen(load_model(one.name), known, tmp_path, **how)
    for act in (write, reopen):
        with refused("teacher"):
            act(other, known, tmp_path, **how)
        with refused("dtype"):
            act(load_model(one.name, dtype="bfloat16"), known, tmp_path, **how)


def test_impossible_caches_are_refused(teacher, rows, tmp_path):
    for top_k in (0, VOCABULARY + 1):
        with pytest.raises(DataError, match=rf"top_k {top_k}: expected 1 to {VOCABULARY}"):
            write(teacher, rows, tmp_path, top_k=top_k)
    requests = [row[:length] for row, length in zip(rows.tokens, rows.prompt_lengths)]
    with pytest.raises(DataError, match="none of the 7 rows has a response"):
        write(teacher, rows._replace(tokens=requests), tmp_path)
    with pytest.raises(DataError, match="holds no cache .* `promptkd cache --output"):
        reopen(teacher, rows, tmp_path)
    assert not list(tmp_path.iterdir())


def test_damage_is_named(teacher, rows, small, tmp_path):
    shutil.copytree(small, tmp_path, dirs_exist_ok=True)
    (tmp_path / "manifest.json").write_text('{"format": 1,')
    with pytest.raises(DataError, match=r"manifest\.json: damaged: .*; remove it"):
        reopen(teacher, rows, tmp_path)
    with pytest.raises(DataError, match="row 3 has 8 response tokens, the batch has room for 5"):
        reopen(teacher, rows, small).rows([3], 5)
    shutil.copy(small / "manifest.json", tmp_path)
    (tmp_path / "ids.npy").write_bytes((small / "ids.npy").read_bytes()[:-1])
    with pytest.raises(DataError, match=r"ids\.npy: damaged or missing"):
        reopen(teacher, rows, tmp_path).rows([0], 9)


def test_a_teacher_that_is_not_finite_is_refused(teacher, rows, tmp_path):
    broken = teacher.replace(params=jax.tree.map(lambda x: x * jnp.nan, teacher.params))
    with pytest.raises(DataError, match="a log-probability in rows 0 to 1 is not finite"):
        write(broken, rows, tmp_path)


# Batches


@pytest.fixture(scope="module")
def batches(teacher, rows, small):
    cached = reopen(teacher, rows, small)
    return train_batches(rows, batch_size=3, length=LENGTH, seed=4, cached=cached, capacity=8)


def test_batches_carry_the_entries_of_their_rows(rows, teacher, small, batches):
    """After shuffling, in every epoch: the rows are found again by their tokens."""
    cached, seen = reopen(teacher, rows, small), set()
    for step in range(6):
        batch = batches[step]
        assert batch.cached.ids.shape == batch.cached.log_probs.shape == (3, 8, 4)
        for b in range(3):
            row = batch.tokens[b, : batch.lengths[b]].tolist()
            number = [list(map(int, tokens)) for tokens in rows.tokens].index(row)
            expected = cached.rows([number], 8)
            np.testing.assert_array_equal(batch.cached.ids[b], expected.ids[0])
            np.testing.assert_array_equal(batch.cached.log_probs[b], expected.log_probs[0])
            seen.add(number)
    assert seen == set(range(7))


def test_batches_from_a_position_carry_the_same_entries(batches):
    for step, found in zip(range(3, 8), stream(batches, 3)):
        jax.tree.map(np.testing.assert_array_equal, found, batches[step])


def test_batches_without_a_cache_carry_none(rows, batches):
    plain = train_batches(rows, batch_size=3, length=LENGTH, seed=4)[5]
    assert plain.cached is None
    np.testing.assert_array_equal(plain.tokens, batches[5].tokens)


def test_a_response_too_long_for_the_batches_is_an_error_at_once(rows, teacher, small):
    cached = reopen(teacher, rows, small)
    with pytest.raises(DataError, match="row 3 has 8 response tokens, the batch has room for 5"):
        train_batches(rows, batch_size=3, length=LENGTH, seed=4, cached=cached, capacity=5)


# Answers


def answer(teacher, rows, file, **changes) -> Rows:
    how = dict(sampling=SAMPLING, prompt_capacity=12, max_new_tokens=6, batch_size=2, seed=3)
    how |= dict(vocab_size=VOCABULARY)
    return teacher_responses.teacher_responses(teacher, rows, file, **(how | changes))


@pytest.fixture(scope="module")
def answered(teacher, rows, tmp_path_factory) -> pathlib.Path:
    file = tmp_path_factory.mktemp("answers") / "answers.jsonl"
    answer(teacher, rows, file)
    return file


def test_answers_take_the_place_of_responses(teacher, rows, answered):
    found = answer(teacher, rows, answered)
    expected = generate_responses(
        teacher,
        rows,
        sampling=SAMPLING,
        prompt_capacity=12,
        max_new_tokens=6,
        batch_size=2,
        key=jax.random.key(3),
        vocab_size=VOCABULARY,
    )
    for number, one in enumerate(expected):
        length = rows.prompt_lengths[number]
        assert found.tokens[number][:length].tolist() == rows.tokens[number][:length].tolist()
        assert found.tokens[number][length:].tolist() == one.tolist()
        text = teacher.tokenizer.decode(one, skip_special_tokens=True).strip()
        assert found.records[number].references == (text,)
        assert found.records[number].prompt_text == rows.records[number].prompt_text
    assert found.prompt_lengths.tolist() == rows.prompt_lengths.tolist()


@pytest.mark.parametrize("written", [0, 1, 3, 6])
@pytest.mark.parametrize("torn", [b"", b'{"request": [1, 2', b"\0\0\0"])
def test_stopped_answers_go_on_to_the_same_bytes(teacher, rows, answered, tmp_path, written, torn):
    file = tmp_path / "answers.jsonl"
    shutil.copy(answered.with_suffix(".manifest.json"), file.with_suffix(".manifest.json"))
    lines = answered.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:written]) + torn)
    found = answer(teacher, rows, file)
    assert contents(tmp_path) == contents(answered.parent)
    assert len(found.tokens) == 7


def test_progress_is_told_in_batches(teacher, rows, answered, tmp_path, capsys):
    file = tmp_path / "answers.jsonl"
    shutil.copy(answered.with_suffix(".manifest.json"), file.with_suffix(".manifest.json"))
    file.write_bytes(b"".join(answered.read_bytes().splitlines(keepends=True)[:2]))
    answer(teacher, rows, file)
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"the teacher writes 5 responses into {file}"
    told = [line.split("  ")[:2] for line in lines]
    assert told == [["responses", f"batch {number}/4"] for number in (2, 4)]
    answer(teacher, rows, file)
    assert capsys.readouterr().out == ""


def test_answers_before_the_stop_are_not_asked_for_again(
    teacher, rows, answered, tmp_path, monkeypatch
):
    file, calls = tmp_path / "answers.jsonl", []
    shutil.copy(answered.with_suffix(".manifest.json"), file.with_suffix(".manifest.json"))
    file.write_bytes(b"".join(answered.read_bytes().splitlines(keepends=True)[:5]))

    def dies(*_, first, **__):
        calls.append(first)
        raise KeyboardInterrupt

    monkeypatch.setattr(teacher_responses, "generate_responses", dies)
    with pytest.raises(KeyboardInterrupt):
        answer(teacher, rows, file)
    assert calls == [4] and len(file.read_text().splitlines()) == 4


def test_answers_of_something_else_are_refused(teacher, rows, answered, tmp_path):
    with refused("teacher"):
        answer(with_a_changed_weight(teacher, tmp_path / "other"), rows, answered)
    with refused("tokenizer"):
        answer(
            teacher.replace(tokenizer=tiny.tokenizer(("Ġpurple",))),
            rows,
            answered,
            vocab_size=VOCABULARY,
        )
    with refused("requests"):
        answer(teacher, changed_rows(rows, 3, 0), answered)
    for name, value in (("seed", 4), ("max_new_tokens", 5), ("vocab_size", 100)):
        with refused(name):
            answer(teacher, rows, answered, **{name: value})
    with refused("sampling"):
        answer(teacher, rows, answered, sampling=Sampling(top_p=0.9, eos_ids=(0,)))
    answer(teacher, changed_rows(rows, 3, -1), answered)  # the responses do not matter


def test_greedy_answers_have_no_seed(teacher, rows, tmp_path):
    greedy = Sampling(temperature=0.0, eos_ids=(0,))
    ours = answer(teacher, rows, tmp_path / "a.jsonl", sampling=greedy, seed=1)
    theirs = answer(teacher, rows, tmp_path / "a.jsonl", sampling=greedy, seed=2)
    jax.tree.map(np.testing.assert_array_equal, ours.tokens, theirs.tokens)


def test_a_cache_is_no_file_of_answers(teacher, rows, answered, small, tmp_path):
    shutil.copy(small / "manifest.json", tmp_path / "answers.manifest.json")
    with pytest.raises(DataError, match="what: there 'log_probs', now 'answers'"):
        answer(teacher, rows, tmp_path / "answers.jsonl")


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", r"answers\.jsonl:2: damaged"),
        ("[1]", r"answers\.jsonl:2: is no answer to the prompt of row 1"),
        ('{"request": [1], "answer": [2]}', r"jsonl:2: is no answer to the prompt of row 1"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(teacher, rows, answered, tmp_path, line, message):
    shutil.copytree(answered.parent, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "answers.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], line, *lines[2:]]) + "\n")
    with pytest.raises(DataError, match=message):
        answer(teacher, rows, file)


def test_answers_without_a_manifest_are_refused(teacher, rows, answered, tmp_path):
    shutil.copy(answered, tmp_path / "answers.jsonl")
    with pytest.raises(DataError, match=r"answers\.manifest\.json, which says .* is missing"):
        answer(teacher, rows, tmp_path / "answers.jsonl")


# The command

CONFIG = """
import pathlib, sys
sys.path.insert(0, {tests!r})
from helpers import tiny

def get_config():
    return tiny.short_config(pathlib.Path({models!r}))
"""


def test_the_command_writes_what_a_run_opens(tmp_path, capsys):
    file, folder = tmp_path / "config.py", tmp_path / "cache"
    tests, models = str(pathlib.Path(__file__).parents[1]), tmp_path / "models"
    file.write_text(CONFIG.format(tests=tests, models=str(models)))
    command = [f"--config={file}", f"--output={folder}", "--top-k=3", "--batch-size=5"]
    main(["cache", *command])
    printed = capsys.readouterr().out
    data = tiny.short_config(models).data
    teacher = load_model(str(models / "teacher"))
    rows = tokenize(
        read_records(data.train, need="response"),
        teacher.tokenizer,
        PromptFormat(data.template),
        max_prompt_length=data.max_prompt_length,
        max_length=data.max_length,
        eos_id=0,
    )
    cached = reopen(teacher, rows, folder, top_k=3)
    tokens = sum(map(len, rows.tokens)) - rows.prompt_lengths.sum()
    assert cached.offsets[-1] == tokens
    assert f"{folder}: the 3 largest log-probabilities at {tokens} response tokens" in printed
    before = contents(folder)
    main(["cache", *command])
    assert contents(folder) == before
    for more, message in (
        (["--top-k=4"], "top_k: there 3, now 4"),
        (["--config.data.template=alpaca", "--config.data.max_prompt_length=8"], "longer than"),
        (["--colour=red"], "unknown arguments: --colour=red"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(["cache", *command, *more])


def test_a_config_without_a_teacher_has_no_cache(tmp_path):
    config = tiny.short_config(tmp_path / "models")
    config.teacher.path = ""
    with pytest.raises(ConfigError, match=r"config\.teacher\.path: is empty"):
        cache.cache(checked(config), tmp_path / "cache", top_k=3, batch_size=2)


# Buckets, and many processes.


def test_answers_in_a_bucket_go_on_to_the_same_bytes(teacher, rows, answered, monkeypatch):
    folder, pail = bucket.make(monkeypatch)
    file = folder / "answers.jsonl"
    found = answer(teacher, rows, file)
    whole = answered.read_text()
    assert read_text(file) == whole and len(pail.writes) < 8, "not for every answer"
    write_text(file, whole[: len(whole) // 2])
    again = answer(teacher, rows, file)
    assert read_text(file) == whole
    assert [one.tolist() for one in again.tokens] == [one.tolist() for one in found.tokens]


def test_a_cache_in_a_bucket_is_refused(teacher, rows, small, monkeypatch):
    folder, _ = bucket.make(monkeypatch)
    with pytest.raises(DataError, match="^gs://pail/run: .*memory maps.*a shared file system"):
        write(teacher, rows, folder)
    with pytest.raises(DataError, match="^gs://pail/run: .*memory maps"):
        reopen(teacher, rows, folder)


def test_the_command_refuses_a_bucket_before_it_loads_a_model(tmp_path):
    config = tiny.short_config(tmp_path / "files")
    config.teacher.path = str(tmp_path / "absent")
    with pytest.raises(DataError, match="^gs://pail/cache: .*memory maps"):
        cache.cache(checked(config), to_path("gs://pail/cache"), top_k=2, batch_size=2)


def test_other_processes_take_what_the_first_has(teacher, rows, answered, monkeypatch, tmp_path):
    """Their own disk stays empty, and they answer what the first one lacks."""
    kept = [json.loads(line) for line in answered.read_text().splitlines()][:4]
    told = iter([identity.model_identity(teacher)["teacher"], None, kept])
    monkeypatch.setattr(distributed, "run_on_primary", lambda compute: next(told))
    monkeypatch.setattr(distributed, "is_primary", lambda: False)
    found = answer(teacher, rows, tmp_path / "answers.jsonl")
    monkeypatch.undo()
    assert next(told, "all told") == "all told"
    expected = answer(teacher, rows, answered)
    assert [one.tolist() for one in found.tokens] == [one.tolist() for one in expected.tokens]
    assert list(tmp_path.iterdir()) == []


def test_other_processes_write_no_entry(teacher, rows, small, monkeypatch, tmp_path):
    told = iter([identity.model_identity(teacher)["teacher"], None, {"rows_written": 0}])
    monkeypatch.setattr(distributed, "run_on_primary", lambda compute: next(told))
    monkeypatch.setattr(distributed, "is_primary", lambda: False)
    found = write(teacher, rows, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    assert found.offsets.tolist() == np.load(small / "offsets.npy").tolist()


def test_the_first_process_alone_reads_the_teachers_files(teacher, monkeypatch):
    monkeypatch.setattr(distributed, "run_on_primary", lambda compute: "told")
    assert identity.model_identity(teacher)["teacher"] == "told"
