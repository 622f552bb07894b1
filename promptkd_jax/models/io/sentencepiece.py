"""`tokenizer.model`, of SentencePiece, in folders that have no `tokenizer.json`.

`transformers` makes a fast tokenizer of it, by what `tokenizer_config.json` says of its class, and
by defaults where it says nothing. SentencePiece itself says whether that encodes as it does.
"""

import pathlib
from typing import Any

from promptkd_jax.infra.errors import ModelError

SENTENCEPIECE = "tokenizer.model"
_EXTRA = (
    "pip install -e '.[sentencepiece]' in a clone, or pip install 'promptkd_jax[sentencepiece]'"
)
# Words with and without a blank before them, digits, capitals, and characters of several bytes. No
# blank at an end or beside another, of which `transformers` makes something else on purpose.
_PROBES = ("Hello world, this is 1 of 237 tests.", "naïve — 你好", "(a)")


def processor(folder: pathlib.Path) -> Any:
    """The folder's `tokenizer.model` as SentencePiece reads it; None if it has none, or one of
    another kind (of tiktoken, which `transformers` tries next).

    Raises:
      ModelError: SentencePiece is not installed.
    """
    file = folder / SENTENCEPIECE
    if not file.exists():
        return None
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise ModelError(
            f"{folder}: its tokenizer is {SENTENCEPIECE} without tokenizer.json, for which the "
            f"package sentencepiece is needed: {_EXTRA}"
        ) from error
    try:
        return SentencePieceProcessor(model_file=str(file))
    except RuntimeError:
        return None


def check_pieces(folder: pathlib.Path, tokenizer: Any, pieces: Any) -> None:
    """Raises ModelError for a tokenizer that encodes otherwise than SentencePiece."""
    for text in _PROBES:
        ours, theirs = tokenizer.encode(text, add_special_tokens=False), pieces.encode(text)
        if ours != theirs:
            raise ModelError(
                f"{folder / SENTENCEPIECE}: transformers reads it as a {type(tokenizer).__name__}, "
                f"which encodes {text!r} as {ours}, SentencePiece as {theirs}; expected a "
                "tokenizer.json, or the class that the model was made with as tokenizer_class of "
                "tokenizer_config.json"
            )
