"""Special tokens: the marks that a template writes are tokens, text that spells one stays text."""

import functools
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from promptkd_jax.infra.errors import DataError

# A noncharacter of Unicode, which programs may use inside and texts do not have.
_ESCAPE = "\ufdd0"
# In the names of special tokens, which no text can know.
_SECRET = f"\ufdd1{secrets.token_hex(8)}"


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The special tokens by their spelling, longer ones first; those of a single character are left
    out, which no text could do without."""
    added = tokenizer.added_tokens_decoder.items()
    ids = {token.content: id for id, token in added if token.special and len(token.content) > 1}
    return dict(sorted(ids.items(), key=lambda item: -len(item[0])))


def unknown_token(
    ids: Sequence[int], vocab_size: int | None, tokenizer: PreTrainedTokenizerBase
) -> str | None:
    """Says which of the ids is none of the `vocab_size` tokens in use (None: all are); None where
    there is none.

    A tokenizer may have tokens that its model has no row for, such as a padding token that was
    added to it alone, or that the other model of a run does not know.
    """
    if vocab_size is None or (largest := max(ids, default=0)) < vocab_size:
        return None
    token = tokenizer.convert_ids_to_tokens(int(largest))
    return (
        f"token {token!r} has the id {largest}, but the tokens that the model has, or shares with "
        f"its teacher, are 0 to {vocab_size - 1}; expected text, a template and a tokenizer "
        "without it"
    )


def spellings(tokenizer: PreTrainedTokenizerBase) -> re.Pattern:
    """Matches a special token in a text."""
    return re.compile("|".join(map(re.escape, special_tokens(tokenizer))) or "(?!)")


def escape(value: Any, spelled: re.Pattern) -> Any:
    """A text in which nothing spells a special token, for a template to put between its own marks;
    of other values all texts inside.

    An escape character stands behind the first character of what did; `encode_rendered` takes it
    out again. It also stands before each one that was there.
    """
    if isinstance(value, Mapping):
        return {key: escape(inner, spelled) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(escape(inner, spelled) for inner in value)
    if not isinstance(value, str):
        return value
    value = value.replace(_ESCAPE, 2 * _ESCAPE)
    while spelled.search(value):  # again for those that overlapped with one of the last round
        value = spelled.sub(lambda match: match[0][0] + _ESCAPE + match[0][1:], value)
    return value


def encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The tokens of plain texts, none of them special."""
    spelled = spellings(tokenizer)
    return encode_rendered([escape(text, spelled) for text in texts], tokenizer)


def encode_rendered(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The tokens of texts that a template made of what `escape` gave: its own marks are special.

    Raises:
      DataError: a text spells a special token, which this kind of tokenizer cannot keep apart.
    """
    if not texts:
        return []
    # All in one call, which is what lets a fast tokenizer use its threads.
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        verbose=False,  # no warning about texts beyond the model's length: they are cut or dropped
    )["input_ids"]
    if escaped := [i for i, text in enumerate(texts) if _ESCAPE in text]:
        renamed, spelled = _renamed(tokenizer), spellings(tokenizer)
        names = {token: _name(id) for token, id in special_tokens(tokenizer).items()}
        marked = (spelled.sub(lambda match: names[match[0]], texts[i]) for i in escaped)
        plain = [re.sub(f"{_ESCAPE}(.)", r"\1", text, flags=re.DOTALL) for text in marked]
        for i, found in zip(escaped, renamed.encode_batch(plain, add_special_tokens=False)):
            encoded[i] = found.ids
    return encoded


def _name(id: int) -> str:
    return f"{_SECRET} {id}\ufdd1"


@functools.lru_cache(maxsize=2)
def _renamed(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """The same tokenizer, where special tokens are spelled as no text is.

    To encode the stretches between them one by one would not do: a tokenizer may see the beginning
    of a text in each, and a special token may take the blanks around it.
    """
    fault = (
        f"tokenizer {tokenizer.name_or_path}: a text spells one of its special tokens, and could "
        "not be told from it; expected a fast tokenizer (tokenizer.json), or data without it"
    )
    if not tokenizer.is_fast:
        raise DataError(fault)
    names = {token: _name(id) for token, id in special_tokens(tokenizer).items()}
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in state["added_tokens"]:
        if token["content"] in names:
            token |= {"content": names[token["content"]], "normalized": False}
    model = state["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(token, token): id for token, id in model["vocab"].items()}
    else:  # of a unigram model: tokens and their scores
        model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    renamed = Tokenizer.from_str(json.dumps(state | {"post_processor": None}))
    if any(renamed.token_to_id(_name(id)) != id for id in special_tokens(tokenizer).values()):
        raise DataError(fault)
    return renamed
