"""Rebuild the tokenizer that a GGUF file holds, and describe one for such a file.

Sources: the GGUF specification (ggml, docs/gguf.md); for what the keys mean and how each
pre-tokenizer cuts text, llama.cpp's convert_hf_to_gguf.py and src/llama-vocab.cpp.
"""

import json
import re
from collections import Counter
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from promptkd_jax.infra.errors import GGUFError
from promptkd_jax.models.io.gguf import GGUFModel
from promptkd_jax.models.model import Model

# Token types of the specification.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_WORDS = LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN_WORDS = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
GPT4O_WORDS = (
    TEKKEN_WORDS.replace(f"{_LOWER}+|", f"{_LOWER}+{_CONTRACTION}|")
    .replace(f"{_LOWER}*|", f"{_LOWER}*{_CONTRACTION}|")
    .replace(r"|\p{N}|", r"|\p{N}{1,3}|")
)


class PreTokenizer(NamedTuple):
    """How text becomes the words within which a byte-level BPE merges.

    Attributes:
      words: the expressions that cut text, applied one after the other.
      nfc: whether text is normalised first; llama.cpp never does.
      ignore_merges: whether a word that is a token is one, whatever the merges say.
      add_bos: whether BOS is added unless the file says otherwise.
    """

    words: tuple[str, ...]
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


# By tokenizer.ggml.pre; of those that are alike, the first is written.
PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer((GPT2_WORDS,)),
    "smollm": PreTokenizer((r"\p{N}", GPT2_WORDS)),
    "llama-bpe": PreTokenizer((LLAMA3_WORDS,), ignore_merges=True, add_bos=True),
    "qwen2": PreTokenizer((QWEN2_WORDS,), nfc=True),
    "dbrx": PreTokenizer((LLAMA3_WORDS,)),
    "stablelm2": PreTokenizer((QWEN2_WORDS,)),
    "gpt-4o": PreTokenizer((GPT4O_WORDS,)),
    "tekken": PreTokenizer((TEKKEN_WORDS,), ignore_merges=True, add_bos=True),
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", GPT2_WORDS, r"\p{N}+", r"[0-9][0-9][0-9]")),
}
_ALIKE = {
    "smollm": ("refact", "starcoder"),
    "llama-bpe": ("llama3", "llama-v3"),
    "dbrx": ("smaug-bpe",),
}
PRE_TOKENIZERS |= {name: PRE_TOKENIZERS[one] for one, names in _ALIKE.items() for name in names}


def tokenizer_from_gguf(model: GGUFModel) -> PreTrainedTokenizerFast:
    """Rebuilds the tokenizer of an open GGUF file, with its special tokens and chat template.

    Byte-level BPE ("gpt2") for the `PRE_TOKENIZERS`, and SentencePiece BPE with byte
    fallback ("llama"). Where Hugging Face and llama.cpp differ this follows the tokenizer that the
    model was trained with: NFC normalisation for "qwen2". "default" is what llama.cpp calls so.
    As in Llama 2's published tokenizer, a SentencePiece text gets a leading space after every
    special token. As in Hugging Face, a byte that the vocabulary lacks is dropped by "gpt2".

    Raises:
      GGUFError: a tokenizer of another kind, or one whose parts are missing or contradictory.
    """
    kind = _value(model, "model")
    builders = {"gpt2": _byte_level_bpe, "llama": _sentencepiece_bpe}
    if kind not in builders:
        raise GGUFError(
            f"{model.path}: tokenizer.ggml.model is {kind!r}; supported are {', '.join(builders)}"
        )
    tokens, types = _per_token(model, "tokens"), _per_token(model, "token_type")
    backend = builders[kind](model, tokens, types)
    # Control and user-defined tokens match as a whole, before any other splitting.
    strips = _is_phi3(model.metadata.get("general.name", ""))
    for kinds, special in (((UNKNOWN, CONTROL), True), ((USER_DEFINED,), False)):
        whole = [token for token, type_ in zip(tokens, types) if type_ in kinds]
        whole = [
            AddedToken(x, special=special, normalized=False, rstrip=strips and x not in _UNSTRIPPED)
            for x in whole
        ]
        (backend.add_special_tokens if special else backend.add_tokens)(whole)
    # Roles of single tokens, and whether a text is put between the first two.
    special = {name: _special(model, tokens, name) for name in ("bos", "eos", "unknown", "padding")}
    # A byte-level BPE without a known pre-tokenizer was refused.
    add_bos = kind == "llama" or PRE_TOKENIZERS[_value(model, "pre")].add_bos
    add_bos = _value(model, "add_bos_token", add_bos)
    add_eos = _value(model, "add_eos_token", False)
    for name, added in (("bos", add_bos), ("eos", add_eos)):
        if added and special[name] is None:  # transformers would silently add nothing
            raise GGUFError(
                f"{model.path}: no metadata tokenizer.ggml.{name}_token_id, but it is to be added"
            )
    architecture = model.metadata["general.architecture"]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=special["bos"],
        eos_token=special["eos"],
        unk_token=special["unknown"],
        pad_token=special["padding"],
        add_bos_token=add_bos,
        add_eos_token=add_eos,
        chat_template=model.metadata.get("tokenizer.chat_template"),
        model_max_length=model.metadata[f"{architecture}.context_length"],
    )


def _is_phi3(name: str) -> bool:
    """Whether special tokens take the white space behind them, which llama.cpp sees by the name."""
    return bool(re.search("phi-?3", name.lower()))


_UNSTRIPPED = ("<unk>", "<s>", "<|endoftext|>")


def _value(model: GGUFModel, name: str, default: Any = None) -> Any:
    return model.metadata.get(f"tokenizer.ggml.{name}", default)


def _special(model: GGUFModel, tokens: list[str], name: str) -> str | None:
    found = _value(model, f"{name}_token_id")
    return None if found is None else tokens[found]


def _per_token(model: GGUFModel, name: str) -> list:
    found = _array(model, name)
    if len(found) != model.config["vocab_size"]:
        raise GGUFError(
            f"{model.path}: tokenizer.ggml.{name} has {len(found)} entries, but token_embd.weight "
            f"has {model.config['vocab_size']} rows"
        )
    return found


def _array(model: GGUFModel, name: str) -> list:
    if (found := _value(model, name)) is None:
        raise GGUFError(
            f"{model.path}: no metadata tokenizer.ggml.{name}, which its tokenizer needs"
        )
    return found


def _vocabulary(model: GGUFModel, tokens: list[str], types: list[int]) -> dict[str, int]:
    # Rows of the embedding that are no tokens are given names by which they are left out again.
    used = {i for i, kind in enumerate(types) if kind != UNUSED or tokens[i] != _unused(i)}
    vocabulary = {token: i for i, token in enumerate(tokens) if i in used}
    if len(vocabulary) < len(used):
        twice = [token for token, count in Counter(tokens).items() if count > 1]
        raise GGUFError(f"{model.path}: tokenizer.ggml.tokens has duplicates: {twice[:8]}")
    return vocabulary


def _byte_level_bpe(model: GGUFModel, tokens: list[str], types: list[int]) -> Tokenizer:
    pre = _value(model, "pre")
    if pre not in PRE_TOKENIZERS:
        raise GGUFError(
            f"{model.path}: tokenizer.ggml.pre is {pre!r}; supported are "
            f"{', '.join(PRE_TOKENIZERS)} (a file without it is older than llama.cpp's "
            "pre-tokenizers: convert the model again)"
        )
    if _value(model, "add_space_prefix", False):
        raise GGUFError(
            f"{model.path}: tokenizer.ggml.add_space_prefix = True is not supported for a "
            "byte-level BPE"
        )
    vocabulary, how = _vocabulary(model, tokens, types), PRE_TOKENIZERS[pre]
    merges = [tuple(merge.split(" ")) for merge in _array(model, "merges")]
    for i, merge in enumerate(merges):
        if len(merge) != 2 or not {*merge, "".join(merge)} <= vocabulary.keys():  # or Rust panics
            raise GGUFError(
                f"{model.path}: tokenizer.ggml.merges[{i}] is {' '.join(merge)!r}; it must be two "
                "tokens of the vocabulary whose union is one too"
            )
    backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=how.ignore_merges))
    if how.nfc:
        backend.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(words), "isolated") for words in how.words]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece_bpe(model: GGUFModel, tokens: list[str], types: list[int]) -> Tokenizer:
    scores = _per_token(model, "scores")
    if len({score for score, kind in zip(scores, types) if kind == NORMAL}) < 2:
        raise GGUFError(
            f"{model.path}: tokenizer.ggml.scores are all equal, so the order of merges is lost; "
            "convert the model again from its tokenizer.model"
        )
    bpe = models.BPE(
        _vocabulary(model, tokens, types),
        _score_merges(tokens, scores, types),
        unk_token=_special(model, tokens, "unknown"),
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = Tokenizer(bpe)
    to_blocks, to_spaces = normalizers.Replace(" ", "▁"), decoders.Replace("▁", " ")
    backend.normalizer = to_blocks
    steps = [to_spaces, decoders.ByteFallback(), decoders.Fuse()]
    if _value(model, "add_space_prefix", True):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), to_blocks])
        steps.append(decoders.Strip(content=" ", left=1, right=0))
    backend.decoder = decoders.Sequence(steps)
    return backend


def _score_merges(
    tokens: list[str], scores: list[float], types: list[int]
) -> list[tuple[str, str]]:
    """All ways to make a normal token of two: best score first, ties by token numbers.

    That is the list of merges in the tokenizer.json published for such models.
    """
    normal = {token: i for i, token in enumerate(tokens) if types[i] == NORMAL}
    ranked = sorted(
        (-scores[i], i, normal[token[:cut]], normal[token[cut:]])
        for token, i in normal.items()
        for cut in range(1, len(token))
        if token[:cut] in normal and token[cut:] in normal
    )
    return [(tokens[left], tokens[right]) for _, _, left, right in ranked]


def _unused(token: int) -> str:
    """The name that llama.cpp's converter gives to a row of the embedding that is no token."""
    return f"[PAD{token}]"


# The other way round


def tokenizer_metadata(model: Model) -> dict[str, Any]:
    """Returns the keys and values by which a GGUF file holds the tokenizer of a model, its special
    tokens and its chat template: what `tokenizer_from_gguf` reads.

    A pre-tokenizer is known by the expressions that it cuts text with. Scores, which SentencePiece
    has in place of merges, follow from their order. A SentencePiece text gets a leading space after
    every special token, as llama.cpp reads all files, also where the tokenizer gives it one at the
    beginning alone.

    Args:
      model: with a tokenizer and EOS; its embedding has as many rows as the file has tokens.

    Raises:
      GGUFError: llama.cpp has no tokenizer that does the same.
    """
    if not model.tokenizer.is_fast:
        raise GGUFError(f"{model.name}: its tokenizer is none of the library tokenizers")
    state = json.loads(model.tokenizer.backend_tokenizer.to_str())
    if (kind := state["model"]["type"]) != "BPE":
        raise GGUFError(f"{model.name}: its tokenizer is a {kind}; only a BPE can be written")
    if not state["model"]["merges"]:
        raise GGUFError(f"{model.name}: its tokenizer has no merges; llama.cpp does not load that")
    tokens, types = _tokens(model, state)
    metadata = {"tokens": tokens, "token_type": types, **_special_metadata(model)}
    if state["model"]["byte_fallback"]:
        metadata |= {
            "model": "llama",
            "pre": "default",
            "scores": _scores(model, state, tokens, types),
            "add_space_prefix": _adds_space(model, state),
        }
    else:
        metadata |= {
            "model": "gpt2",
            "pre": _pre_tokenizer(model, state),
            "merges": [" ".join(merge) for merge in state["model"]["merges"]],
        }
    metadata = {f"tokenizer.ggml.{name}": value for name, value in metadata.items()}
    template = model.tokenizer.chat_template
    template = template.get("default") if isinstance(template, dict) else template
    metadata["general.name"] = _name(model, state)
    return metadata | ({"tokenizer.chat_template": template} if template else {})


def _name(model: Model, state: dict[str, Any]) -> str:
    """The name of the model, by which llama.cpp knows the tokenizer of Phi-3."""
    name = re.split(r"[/\\]", model.name.rstrip("/\\"))[-1]
    strips = any(token["rstrip"] for token in state["added_tokens"])
    if strips == _is_phi3(name):
        return name
    return f"phi-3 {name}" if strips else re.sub("(?i)phi-?3", "phi", name)


def _tokens(model: Model, state: dict[str, Any]) -> tuple[list[str], list[int]]:
    """The tokens by number, and the type of each; of as many as the model has rows."""
    rows = model.decoder.config.vocab_size
    tokens, types = [_unused(i) for i in range(rows)], [UNUSED] * rows
    sentencepiece = state["model"]["byte_fallback"]
    for token, i in state["model"]["vocab"].items():
        if i >= rows:
            continue
        is_byte = sentencepiece and re.fullmatch("<0x[0-9A-F]{2}>", token)
        tokens[i], types[i] = token, BYTE if is_byte else NORMAL
    for added in state["added_tokens"]:
        i, token = added["id"], added["content"]
        if i >= rows:
            continue
        # Llama.cpp matches them in text as it stands, before spaces become blocks.
        text = token.replace("▁", " ") if sentencepiece and not added["special"] else token
        tokens[i], types[i] = text, CONTROL if added["special"] else USER_DEFINED
        if sentencepiece and i == model.tokenizer.unk_token_id:
            types[i] = UNKNOWN
    return tokens, types


def _special_metadata(model: Model) -> dict[str, Any]:
    tokenizer, ends = model.tokenizer, ("eos", "eot", "eom")
    if len(model.eos_ids) > len(ends):
        raise GGUFError(
            f"{model.name}: {len(model.eos_ids)} tokens end an answer; a GGUF file names at most "
            f"{len(ends)}"
        )
    ids = {"bos": tokenizer.bos_token_id, **dict(zip(ends, model.eos_ids))}
    ids |= {"unknown": tokenizer.unk_token_id, "padding": tokenizer.pad_token_id}
    text, whole = (tokenizer("a", add_special_tokens=x).input_ids for x in (False, True))
    sides = [(bos, eos) for bos in (False, True) for eos in (False, True)]
    added = [[ids["bos"]] * bos + text + [ids["eos"]] * eos for bos, eos in sides]
    if whole not in added:
        raise GGUFError(
            f"{model.name}: its tokenizer makes {tokenizer.convert_ids_to_tokens(whole)} of 'a'; a "
            "GGUF file can only have BOS and EOS around a text"
        )
    add_bos, add_eos = sides[added.index(whole)]
    rows = model.decoder.config.vocab_size
    ids = {f"{name}_token_id": i for name, i in ids.items() if i is not None and i < rows}
    return ids | {"add_bos_token": add_bos, "add_eos_token": add_eos}


def _steps(part: dict[str, Any] | None, within: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or a pre-tokenizer, one after the other."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [step for each in part[within] for step in _steps(each, within)]


def _pre_tokenizer(model: Model, state: dict[str, Any]) -> str:
    normalizers = [step["type"] for step in _steps(state["normalizer"], "normalizers")]
    steps = _steps(state["pre_tokenizer"], "pretokenizers")
    words, unknown = [], [x for x in normalizers if x != "NFC"]
    for step in steps:
        settings = {key: x for key, x in step.items() if key not in ("type", "trim_offsets")}
        match step["type"], settings:
            case "Split", {"pattern": {"Regex": text}, "behavior": "Isolated", "invert": False}:
                words.append(text)
            case "Digits", {"individual_digits": True}:
                words.append(r"\p{N}")
            case "ByteLevel", {"add_prefix_space": False, "use_regex": use_regex}:
                words += [GPT2_WORDS] if use_regex else []
            case _:
                unknown.append(json.dumps(step))
    bpe = state["model"]
    how = PreTokenizer(tuple(words), "NFC" in normalizers, bool(bpe["ignore_merges"]))
    unknown += [x for x in ("continuing_subword_prefix", "end_of_word_suffix", "dropout") if bpe[x]]
    names = [name for name, x in PRE_TOKENIZERS.items() if x._replace(add_bos=False) == how]
    if unknown or not names or [step["type"] for step in steps][-1:] != ["ByteLevel"]:
        raise GGUFError(
            f"{model.name}: llama.cpp knows no tokenizer that cuts text as its own does: "
            f"{', '.join(unknown) or how}; those that can be written are like "
            f"{', '.join(PRE_TOKENIZERS)}"
        )
    return names[0]


def _adds_space(model: Model, state: dict[str, Any]) -> bool:
    """Whether a SentencePiece text gets a leading space."""
    normalizers = _steps(state["normalizer"], "normalizers")
    pre_tokenizers = _steps(state["pre_tokenizer"], "pretokenizers")
    to_blocks = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepended = {"type": "Prepend", "prepend": "▁"}
    no_words = {"pattern": {"String": " "}, "behavior": "MergedWithPrevious"}  # Gemma's: no effect
    match normalizers, pre_tokenizers:
        case [*first, last], rest if last == to_blocks and first in ([], [prepended]):
            if all(no_words.items() <= step.items() for step in rest):
                return bool(first)
        case [], [{"type": "Metaspace", "replacement": "▁", "split": False, **more}]:
            return more["prepend_scheme"] != "never"
    raise GGUFError(
        f"{model.name}: llama.cpp knows no SentencePiece tokenizer that prepares text as its own "
        f"does: {json.dumps([*normalizers, *pre_tokenizers], ensure_ascii=False)}"
    )


def _scores(
    model: Model, state: dict[str, Any], tokens: list[str], types: list[int]
) -> list[float]:
    """Scores by which llama.cpp merges in the order of the merges: the earlier, the higher."""
    normal = {token for token, kind in zip(tokens, types) if kind == NORMAL}
    # Others are taken out of a text before anything is merged.
    merges = [tuple(merge) for merge in state["model"]["merges"]]
    merges = [pair for pair in merges if {*pair, "".join(pair)} <= normal]
    order = {}
    for left, right in merges:
        order.setdefault(left + right, -1.0 - len(order))
    scores = [0.0 if kind == BYTE else order.get(x, -1e6) for x, kind in zip(tokens, types)]
    implied = _score_merges(tokens, scores, types)
    whole = [["".join(pair) for pair in pairs] for pairs in (merges, implied)]
    if whole[0] != whole[1] or set(merges) != set(implied):
        raise GGUFError(
            f"{model.name}: the merges of its tokenizer are not those of a SentencePiece model, "
            "which makes a token of any two that are one; no scores say the same"
        )
    return scores
