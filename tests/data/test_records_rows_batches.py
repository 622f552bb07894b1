"""Templates, token rows, and the order of batches."""

import numpy as np
import pytest
import tokenizers
from conftest import DATA, TOKENIZERS
from helpers.records import example
from transformers import GPT2TokenizerFast, PreTrainedTokenizerFast

from promptkd_jax.data import templates
from promptkd_jax.data.batches import collate, eval_batches, stream, train_batches
from promptkd_jax.data.reading.record_stream import read_records
from promptkd_jax.data.rows import Rows, pack, tokenize, with_responses
from promptkd_jax.data.templates import PromptFormat, render_prompt
from promptkd_jax.infra.errors import DataError

_EOS = "<|end|>"
_CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    """One token per byte; special tokens for the start, the end and the roles of a chat."""
    vocabulary = {c: i for i, c in enumerate(tokenizers.pre_tokenizers.ByteLevel.alphabet())}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<s>", _EOS, "<|user|>", "<|assistant|>"])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token=_EOS, pad_token=_EOS
    )
    fast.chat_template = _CHAT
    return fast


def _rows(count, width=6):
    """Rows of distinct content: row i is `i` repeated, with 2 to `width` tokens."""
    lengths = 2 + np.arange(count) % (width - 1)
    tokens = [np.full(length, i, np.int32) for i, length in enumerate(lengths)]
    records = [example(str(i), "", ()) for i in range(count)]
    return Rows(tokens, np.ones(count, np.int32), records, dropped=0)


def _tokenize(records, tokenizer, max_prompt_length=50, max_length=100):
    return tokenize(
        records,
        tokenizer,
        prompt_format=PromptFormat("plain", add_bos=False),
        max_prompt_length=max_prompt_length,
        max_length=max_length,
        eos_id=tokenizer.eos_token_id,
    )


# Templates

_WITH_INPUT = """\
Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
Add {these}.

### Input:
1 2

### Response:
"""
_WITHOUT_INPUT = """\
Below is an instruction that describes a task. \
Write a response that appropriately completes the request.

### Instruction:
Add {these}.

### Response:
"""


@pytest.mark.parametrize(
    "template, given, text",
    [
        ("alpaca", "1 2", _WITH_INPUT),
        ("alpaca", "", _WITHOUT_INPUT),
        ("plain", "1 2", "Add {these}.\n1 2\n"),
        ("plain", "", "Add {these}.\n"),
        ("chat", "1 2", "<|user|>Add {these}.\n1 2<|assistant|>"),
        ("chat", "", "<|user|>Add {these}.<|assistant|>"),
    ],
)
def test_the_text_of_a_template(tokenizer, template, given, text):
    """Its tokenizer puts a BOS in front of a text; a chat template says itself how it begins."""
    record = example("Add {these}.", given, ("3",))
    bare = PromptFormat(template, add_bos=False)
    assert tokenizer.decode(render_prompt(record, bare, tokenizer)) == text
    prompt = render_prompt(record, PromptFormat(template), tokenizer)
    assert tokenizer.decode(prompt) == ("" if template == "chat" else "<s>") + text


def test_chat_tokens_are_those_of_transformers(tokenizer):
    expected = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Ünï\n2"}], add_generation_prompt=True, return_dict=False
    )
    assert render_prompt(example("Ünï", "2", ()), PromptFormat("chat"), tokenizer) == expected


def test_the_clock_of_a_template_stands_still(tokenizer):
    record, clock = example("a", "", ()), "a{{{{ strftime_now('{}') }}}}"
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    for form, shown in (("%d %b %Y", "05 Nov 2026"), ("%-d %B, %F", "5 November, 2026-11-05")):
        bare.chat_template = clock.format(form)
        prompt = render_prompt(record, PromptFormat("chat", date="2026-11-05"), bare)
        assert bare.decode(prompt) == f"a{shown}"
    bare.chat_template = clock.format("%Q")
    with pytest.raises(DataError, match="no such date: %Q"):
        render_prompt(record, PromptFormat("chat", date="2026-11-05"), bare)


def test_a_template_is_a_function_and_its_name(tokenizer, monkeypatch):
    """As CONTRIBUTING.md says."""

    def shout(record, tokenizer, how):
        return f"{record.prompt_text.upper()}!\n"

    monkeypatch.setitem(templates.TEMPLATES, "shout", shout)
    how = dict(
        prompt_format=PromptFormat("shout", add_bos=False),
        max_prompt_length=20,
        max_length=30,
        eos_id=0,
    )
    rows = tokenize([example("say red", "", ("red",))], tokenizer, **how)
    prompt = rows.tokens[0][: rows.prompt_lengths[0]]
    assert tokenizer.decode(prompt) == "SAY RED!\n"
    with pytest.raises(DataError, match="there are alpaca, chat, plain, shout"):
        render_prompt(example("say red", "", ()), PromptFormat("whisper"), tokenizer)


def test_template_errors(tokenizer):
    record = example("a", "", ())
    with pytest.raises(DataError, match="unknown template 'vicuna'; .*alpaca, chat, plain"):
        render_prompt(record, PromptFormat("vicuna"), tokenizer)
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(DataError, match="has no chat template; use 'alpaca' or 'plain'"):
        render_prompt(record, PromptFormat("chat"), bare)


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ 'a' }}\n{{ messages[0]['role' }}", "line 2: unexpected '}'"),
        ("{{ messages.nothing.content }}", "has no attribute 'nothing'"),
        ("{{ messages[0]['role'] + 1 }}", "str"),  # a TypeError of Python
    ],
)
def test_a_template_that_cannot_be_rendered_is_named(tokenizer, template, fault):
    broken = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, name_or_path="owner/broken"
    )
    broken.chat_template = template
    message = f"tokenizer owner/broken cannot be rendered for one user turn: .*{fault}.*; mend"
    with pytest.raises(DataError, match=message):
        render_prompt(example("a", "", ()), PromptFormat("chat"), broken)


# Token rows


def test_a_row_is_prompt_response_and_end(tokenizer):
    records = [example("ab", "c", ("de", "other")), example("f", "", ())]
    rows = _tokenize(records, tokenizer)
    assert tokenizer.decode(rows.tokens[0]) == "ab\nc\nde" + _EOS
    assert tokenizer.decode(rows.tokens[0][: rows.prompt_lengths[0]]) == "ab\nc\n"
    assert tokenizer.decode(rows.tokens[1]) == "f\n"  # no answer, so no end of one
    assert rows.prompt_lengths.tolist() == [5, 2]
    assert {row.dtype for row in rows.tokens} == {rows.prompt_lengths.dtype} == {np.dtype("int32")}
    assert (rows.records, rows.dropped) == (records, 0)


def test_the_response_does_not_change_the_prompt():
    merges = tokenizers.models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")])
    merging = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(merges))
    rows = tokenize(
        [example("aba", "", ("ba",))],
        merging,
        prompt_format=PromptFormat("plain", add_bos=False),
        max_prompt_length=9,
        max_length=9,
        eos_id=7,
    )
    assert rows.tokens[0].tolist() == [2, 0, 1, 0, 7]  # ab a | b a, not ab ab a
    assert rows.prompt_lengths.tolist() == [2]


def test_long_prompts_are_dropped_and_long_rows_are_cut(tokenizer):
    prompts = ["12345", "123", "1234"]
    records = [example(prompt, "", ("abc",)) for prompt in prompts]
    rows = _tokenize(records, tokenizer, max_prompt_length=5, max_length=8)
    assert [tokenizer.decode(row) for row in rows.tokens] == ["123\nabc" + _EOS, "1234\nabc"]
    assert rows.prompt_lengths.tolist() == [4, 5]
    assert (rows.records, rows.dropped, rows.cut) == (records[1:], 1, 1)


def test_token_row_errors(tokenizer):
    records = [example("a" * n, "", ()) for n in (6, 8)]
    with pytest.raises(DataError) as error:
        _tokenize(records, tokenizer, max_prompt_length=6)
    for words in ("all 2 prompts", "max_prompt_length 6", "shortest has 7", "longest 9"):
        assert words in str(error.value)
    with pytest.raises(DataError, match="no records"):
        _tokenize([], tokenizer)
    with pytest.raises(DataError, match="max_prompt_length 9 and max_length 8: expected"):
        _tokenize(records, tokenizer, max_prompt_length=9, max_length=8)
    knows_a = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[]))
    silent = PreTrainedTokenizerFast(tokenizer_object=knows_a, eos_token="a")
    with pytest.raises(DataError, match=r"^record 1 \(from 0\): its prompt has no tokens"):
        _tokenize([example("a", "", ()), example("é", "", ())], silent)


def test_other_responses_stand_behind_the_same_prompts():
    rows = _rows(3)._replace(prompt_lengths=np.array([1, 2, 1], np.int32))
    found = with_responses(rows, iter([[7, 8], np.array([9]), []]))
    assert [row.tolist() for row in found.tokens] == [[0, 7, 8], [1, 1, 9], [2]]
    assert {row.dtype for row in found.tokens} == {np.dtype(np.int32)}
    assert found.records is rows.records and found.prompt_lengths is rows.prompt_lengths
    assert [row.tolist() for row in rows.tokens] == [[0, 0], [1, 1, 1], [2, 2, 2, 2]]
    for count in (2, 4):
        with pytest.raises(ValueError, match="zip"):
            with_responses(rows, [[7]] * count)


# Batches


def test_every_row_of_a_batch_starts_at_column_0_and_ends_at_its_length():
    batch = collate(_rows(9), [4, 1, 3], length=7, pad_id=-1)
    assert batch.tokens.tolist() == [
        [4, 4, 4, 4, 4, 4, -1],
        [1, 1, 1, -1, -1, -1, -1],
        [3, 3, 3, 3, 3, -1, -1],
    ]
    assert batch.lengths.tolist() == [6, 3, 5]
    assert batch.prompt_lengths.tolist() == [1, 1, 1]
    assert {part.dtype for part in batch[:3]} == {np.dtype("int32")}


def test_lengths_do_not_depend_on_the_padding_token(tokenizer):
    eos = tokenizer.eos_token_id
    [row] = tokenizer([f"a{_EOS}b\nc{_EOS}{_EOS}"], add_special_tokens=False)["input_ids"]
    rows = Rows([np.array(row, np.int32)], np.array([4], np.int32), [example("a")], dropped=0)
    batch = collate(rows, [0], length=8, pad_id=eos)
    assert (batch.tokens[0] == eos).tolist() == [0, 1, 0, 0, 0, 1, 1, 1]
    assert (batch.prompt_lengths.tolist(), batch.lengths.tolist()) == ([4], [7])  # with the end


def test_a_row_longer_than_the_batch_is_an_error_at_once():
    with pytest.raises(DataError, match="row 4 has 6 tokens, the batch has room for 5"):
        collate(_rows(9), [0, 4], length=5)
    with pytest.raises(DataError, match="row 4 has 6 tokens, the batch has room for 5"):
        train_batches(_rows(9), batch_size=1, length=5, seed=0)


def _order(dataset, steps):
    """The row numbers of the given steps, in order."""
    return [int(row) for step in steps for row in dataset[step].tokens[:, 0]]


def test_each_epoch_is_a_permutation_of_its_own():
    batches = train_batches(_rows(20), batch_size=4, length=6, seed=0)
    epochs = [_order(batches, range(5 * epoch, 5 * epoch + 5)) for epoch in range(6)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(20))
    assert len(set(map(tuple, epochs))) == 6
    assert list(range(20)) not in epochs


def test_the_remainder_of_an_epoch_is_dropped():
    batches = train_batches(_rows(11), batch_size=4, length=6, seed=0)
    epochs = [_order(batches, (2 * epoch, 2 * epoch + 1)) for epoch in range(20)]
    assert all(len(set(epoch)) == 8 for epoch in epochs)  # no row twice in an epoch
    assert {row for epoch in epochs for row in epoch} == set(range(11))  # no row left out for ever


def test_seeds_give_different_orders_in_every_epoch():
    """Also not the same epochs one later, which is what Grain's own seeds would give."""
    orders = []
    for seed in (0, 1, 2, 2**40):
        batches = train_batches(_rows(20), batch_size=20, length=6, seed=seed)
        orders += [tuple(_order(batches, [epoch])) for epoch in range(4)]
    assert len(set(orders)) == len(orders)


def test_a_batch_is_a_function_of_rows_seed_and_step():
    first = train_batches(_rows(20), batch_size=3, length=6, seed=5)
    again = train_batches(_rows(20), batch_size=3, length=6, seed=5)
    steps = list(range(15))
    assert _order(first, steps) == _order(again, steps)
    backwards = [_order(again, [step]) for step in reversed(steps)][::-1]
    assert _order(first, steps) == sum(backwards, [])


@pytest.mark.parametrize("start", [0, 1, 4, 5, 6, 23, 10**9])
def test_a_stream_from_a_position_is_the_tail_of_the_whole(start):
    batches = train_batches(_rows(20), batch_size=4, length=6, seed=3)
    resumed = stream(batches, start)
    for step in range(start, start + 12):  # past what is read ahead, and over epochs
        for got, expected in zip(next(resumed), batches[step], strict=True):
            np.testing.assert_array_equal(got, expected)


def test_a_resumed_stream_continues_an_interrupted_one():
    rows = _rows(20)
    whole = stream(train_batches(rows, batch_size=4, length=6, seed=3), 0)
    orders = [next(whole).tokens[:, 0].tolist() for _ in range(13)]
    for taken in (1, 5, 8):
        resumed = stream(train_batches(rows, batch_size=4, length=6, seed=3), taken)
        rest = [next(resumed).tokens[:, 0].tolist() for _ in range(13 - taken)]
        assert orders[taken:] == rest


def test_a_position_before_the_start_is_an_error():
    batches = train_batches(_rows(4), batch_size=4, length=6, seed=3)
    with pytest.raises(IndexError, match="-1 is out of range"):
        stream(batches, -1)


def test_more_rows_to_a_batch_than_there_are_is_an_error():
    train_batches(_rows(4), batch_size=4, length=6, seed=0)
    with pytest.raises(DataError, match="batch_size 5 is larger than the 4 rows"):
        train_batches(_rows(4), batch_size=5, length=6, seed=0)


@pytest.mark.parametrize("count, sizes", [(7, [3, 3, 1]), (6, [3, 3]), (2, [2])])
def test_evaluation_batches_are_in_order_and_filled_up(count, sizes):
    batches = list(eval_batches(_rows(count), batch_size=3, length=6))
    assert [real for _, real in batches] == sizes
    assert {batch.tokens.shape for batch, _ in batches} == {(3, 6)}
    real_rows = [row for batch, real in batches for row in batch.tokens[:real, 0]]
    assert real_rows == list(range(count))
    last, real = batches[-1]
    assert (last.tokens[real:] == last.tokens[real - 1]).all()
    assert (last.lengths[real:] == last.lengths[real - 1]).all()


# The published data


@pytest.fixture(scope="module")
def dolly():
    """(records, tokenizer) of the Dolly training set and GPT-2."""
    folder = TOKENIZERS / "gpt2"
    path = DATA / "dolly" / "train.jsonl"
    for needed in (folder / "vocab.json", folder / "merges.txt", path):
        if not needed.is_file():
            pytest.skip(f"{needed} is absent: set PROMPTKD_DATA and PROMPTKD_TOKENIZERS")
    records = read_records(str(path), need="response")
    return records, GPT2TokenizerFast.from_pretrained(folder)


def test_the_published_number_of_training_prompts(dolly):
    """11,500 of 13,495 need the exact Alpaca text: without its last newline they are 11,514."""
    records, gpt2 = dolly
    assert len(records) == 13_495
    rows = tokenize(
        records, gpt2, PromptFormat("alpaca"), max_prompt_length=256, max_length=512, eos_id=50256
    )
    assert (len(rows.tokens), rows.dropped) == (11_500, 1_995)
    assert rows.prompt_lengths.max() == 256
    assert max(map(len, rows.tokens)) == 512
    for row, length in zip(rows.tokens, rows.prompt_lengths, strict=True):
        assert row[-1] == 50256 or len(row) == 512
        assert 0 < length < len(row)
    record, row, length = rows.records[0], rows.tokens[0], rows.prompt_lengths[0]
    assert row[:length].tolist() == render_prompt(record, PromptFormat("alpaca"), gpt2)
    assert gpt2.decode(row[length:]) == record.references[0] + "<|endoftext|>"


def test_a_corpus_is_packed_some_documents_at_a_time(tokenizer):
    """More than are encoded at once, from an iterator: one stream all the same."""
    texts = [chr(97 + i % 26) * (1 + i % 3) for i in range(2100)]
    rows = pack(iter(texts), tokenizer, 7, 0)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    stream = [token for text in ids for token in (*text, 0)]
    assert np.concatenate(rows.tokens).tolist() == stream[: len(stream) // 7 * 7]
    with pytest.raises(DataError, match="the corpus has 2 tokens, a row takes 7"):
        pack(["a"], tokenizer, 7, 0)
