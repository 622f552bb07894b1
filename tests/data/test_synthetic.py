"""Generated text: splits that share nothing, right answers, a tokenizer that loses nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import make_synthetic
from helpers.make_synthetic import REFERENCES, SIZES

from promptkd_jax.data.reading.record_stream import read_records
from promptkd_jax.data.rows import tokenize
from promptkd_jax.data.templates import PromptFormat
from promptkd_jax.infra.errors import DataError, ModelError
from promptkd_jax.models.io.export import save_model
from promptkd_jax.models.load import load_model, load_without_weights
from promptkd_jax.models.random_model import synthetic_tokenizer

RECORDS = {name: read_records(f"synthetic:{name}", need="response") for name in SIZES}
EVERYTHING = [record for records in RECORDS.values() for record in records]


def requests(name):
    return [(record.extra["instruction"], record.extra["input"]) for record in RECORDS[name]]


def test_no_request_stands_twice_in_any_split():
    assert {name: len(requests(name)) for name in SIZES} == SIZES
    asked = [request for name in SIZES for request in requests(name)]
    assert len(set(asked)) == len(asked)


def test_the_files_of_the_package_are_what_the_grammar_makes():
    for path, text in make_synthetic.files().items():
        assert (make_synthetic.PACKAGE / path).read_text("utf-8") == text, path


def test_every_task_is_in_every_split():
    kinds = [
        {" ".join(record.extra["instruction"].split()[:2]) for record in RECORDS[name]}
        for name in ("train", "dev", "test")
    ]
    assert kinds[0] == kinds[1] == kinds[2]
    assert kinds[0] == {"Say these", "Sort these", "How many", "What is", "What colour", "Write a"}


def answered(start, check):
    """Checks every record whose instruction begins so."""
    found = [record for record in EVERYTHING if record.extra["instruction"].startswith(start)]
    assert found
    for record in found:
        assert check(record.extra["input"].split(), record.references), record


def test_answers_are_right():
    answered("Say these words again", lambda words, out: out == (" ".join(words),))
    answered("Say these words from", lambda words, out: out == (" ".join(words[::-1]),))
    answered("Sort", lambda words, out: out == (" ".join(sorted(words)),))
    answered("How many", lambda words, out: out == (str(len(words)),))
    for record in EVERYTHING:
        if (
            record.extra["instruction"].startswith("What is")
            and "plural" not in record.extra["instruction"]
        ):
            expression = record.extra["instruction"].removeprefix("What is ")
            result = eval(expression.replace("plus", "+").replace("minus", "-"))
            assert record.references == (f"{expression} is {result}",)


def test_requests_with_several_right_answers_have_several_references():
    for name, most in (("train", 1), ("dev", REFERENCES), ("test", REFERENCES)):
        counts = [len(record.references) for record in RECORDS[name]]
        assert max(counts) == most
        assert all(len(set(record.references)) == len(record.references) for record in EVERYTHING)
    openings = {
        record.references[0].split()[0]
        for record in RECORDS["train"]
        if record.extra["instruction"].startswith("Write a sentence")
    }
    assert openings == {"A", "The"}


def test_longer_lists_than_any_trained_on():
    train = max(len(words.split()) for _, words in requests("train"))
    assert min(len(words.split()) for _, words in requests("longer")) > train


def test_the_tokenizer_gives_back_any_text():
    words = synthetic_tokenizer()
    for record in EVERYTHING:
        for text in (record.extra["instruction"], record.extra["input"], *record.references):
            assert words.decode(words(text)["input_ids"]) == text
    other = "Unknown: naïve café 🦊,  two  spaces\nand <b>"
    assert words.decode(words(other)["input_ids"]) == other


def test_every_word_of_the_grammar_is_one_token():
    words = synthetic_tokenizer()
    for record in EVERYTHING:
        for text in (record.extra["instruction"], record.extra["input"], *record.references):
            assert len(words(text)["input_ids"]) == len(text.split())
    assert words.eos_token_id == words.pad_token_id == 0


def test_rows_fit_the_shipped_comparison():
    for name in SIZES:
        rows = tokenize(
            read_records(f"synthetic:{name}", need="response"),
            synthetic_tokenizer(),
            prompt_format=PromptFormat("plain"),
            max_prompt_length=16,
            max_length=28,
            eos_id=0,
        )
        assert rows.dropped == 0 and all(row[-1] == 0 for row in rows.tokens)


def test_a_model_is_named_by_its_sizes_and_seed():
    model = load_model("synthetic:llama-D32-L2")
    config = model.decoder.config
    assert (config.width, config.num_layers, config.vocab_size) == (32, 2, model.vocab_size)
    assert model.eos_ids == (0,)
    same, other = load_model("synthetic:llama-D32-L2-S0"), load_model("synthetic:llama-D32-L2-S1")
    embeddings = [m.params["embed"]["embedding"] for m in (model, same, other)]
    np.testing.assert_array_equal(embeddings[0], embeddings[1])
    assert not np.array_equal(embeddings[0], embeddings[2])
    described = load_without_weights("synthetic:llama-D32-L2")
    assert described.params is None and described.decoder == model.decoder
    assert (described.eos_ids, described.vocab_size) == (model.eos_ids, model.vocab_size)


def test_a_model_is_kept_and_computed_in_the_dtypes_asked_for(tmp_path):
    model = load_model("synthetic:llama-D32-L1", dtype="bfloat16", param_dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype("bfloat16")}
    save_model(tmp_path, model)
    again = load_model(str(tmp_path), param_dtype="bfloat16")
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    assert again.tokenizer.get_vocab() == model.tokenizer.get_vocab()


@pytest.mark.parametrize("name", ["llama-D32", "gpt2-D32-L2", "llama-D48-L2", "llama-D0-L2", ""])
def test_other_model_names_are_refused(name):
    with pytest.raises(ModelError, match="expected llama-D<width>-L<layers>"):
        load_model(f"synthetic:{name}")


def test_other_splits_are_refused():
    with pytest.raises(DataError, match="synthetic:valid: .* has no 'valid'; it has .*dev.jsonl"):
        read_records("synthetic:valid", need="response")
