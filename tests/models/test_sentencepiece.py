"""A `tokenizer.model` alone encodes as SentencePiece does, or is refused with the remedy."""

import io
import json
import pathlib
import sys

import pytest
from helpers import tiny

from promptkd_jax.infra.errors import ModelError
from promptkd_jax.models.io.export import save_model
from promptkd_jax.models.load import load_model, load_tokenizer

sentencepiece = pytest.importorskip("sentencepiece", reason="what encodes is SentencePiece")

TEXTS = [f"say red or blue or green, number {i} of {7 * i} foxes" for i in range(60)]
TEXTS += ["The naïve fox said: hello world.", "(你好) — 3.14 tests", "red.blue"]
LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
LLAMA |= {"unk_token": "<unk>", "add_bos_token": True}


@pytest.fixture(scope="module")
def pieces() -> bytes:
    """A BPE with bytes for what it does not know, as Llama and Mistral have."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=written,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        minloglevel=2,
    )
    return written.getvalue()


def folder_of(folder: pathlib.Path, pieces: bytes, config: dict | None) -> pathlib.Path:
    """A model whose tokenizer is `tokenizer.model`, and what `tokenizer_config.json` says of it."""
    tiny.write_model(folder, width=16, depth=1, seed=0, pad=200)
    for file in folder.glob("*tokenizer*"):
        file.unlink()
    (folder / "tokenizer.model").write_bytes(pieces)
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_it_encodes_as_sentencepiece(pieces, tmp_path):
    folder = folder_of(tmp_path / "model", pieces, LLAMA)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=pieces)
    model = load_model(str(folder))
    assert model.tokenizer.eos_token_id == theirs.eos_id() == 2
    save_model(tmp_path / "again", model)
    for tokenizer in (model.tokenizer, load_tokenizer(str(tmp_path / "again"))):
        for text in TEXTS:
            assert tokenizer.encode(text, add_special_tokens=False) == theirs.encode(text)
            assert tokenizer.encode(text) == [theirs.bos_id(), *theirs.encode(text)]
            assert tokenizer.decode(theirs.encode(text)) == text


def test_another_reading_of_it_is_refused(pieces, tmp_path):
    """Of a class that adds no blank before a text, as SentencePiece does."""
    folder = folder_of(tmp_path / "model", pieces, LLAMA | {"tokenizer_class": "GemmaTokenizer"})
    with pytest.raises(ModelError, match="encodes 'Hello world.*SentencePiece as .*tokenizer_clas"):
        load_tokenizer(str(folder))


def test_the_package_is_named_where_it_is_missing(pieces, tmp_path, monkeypatch):
    folder = folder_of(tmp_path / "model", pieces, LLAMA)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ModelError, match=r"without tokenizer.json, .*\[sentencepiece\]"):
        load_tokenizer(str(folder))
    (folder / "tokenizer.json").write_text(tiny.tokenizer().backend_tokenizer.to_str())
    load_tokenizer(str(folder))


def test_what_is_no_sentencepiece_is_refused(tmp_path):
    folder = folder_of(tmp_path / "model", b"no model", LLAMA)
    with pytest.raises(ModelError, match="its tokenizer cannot be read"):
        load_tokenizer(str(folder))
