"""Rebuild the tokenizer that a GGUF file of the Llama family holds.

Sources: the GGUF specification (ggml, docs/gguf.md); for what the keys mean and how each
pre-tokenizer cuts text, llama.cpp's convert_hf_to_gguf.py and src/llama-vocab.cpp.
"""

from collections import Counter
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from promptkd_jax.infra.errors import GGUFError
from promptkd_jax.models.io.gguf import GGUFModel

# Token types of the specification; 5 (unused) and 6 (byte) need no treatment.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4

GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tokenizer.ggml.pre -> the expressions that cut text into words, applied one after the other.
WORDS = {
    "smollm": (r"\p{N}", GPT2_WORDS),
    "llama-bpe": (LLAMA3_WORDS,),
    "llama3": (LLAMA3_WORDS,),
    "llama-v3": (LLAMA3_WORDS,),
    "gpt-2": (GPT2_WORDS,),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2_WORDS, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "qwen2": (LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}"),),
}
LLAMA3 = ("llama-bpe", "llama3", "llama-v3")  # whole words before merges; BOS unless the file says


def tokenizer_from_gguf(model: GGUFModel) -> PreTrainedTokenizerFast:
    """Rebuilds the tokenizer of an open GGUF file, with its special tokens and chat template.

    Byte-level BPE ("gpt2") for the pre-tokenizers in `WORDS`, and SentencePiece BPE with byte
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
    for kinds, special in (((UNKNOWN, CONTROL), True), ((USER_DEFINED,), False)):
        whole = [token for token, type_ in zip(tokens, types) if type_ in kinds]
        whole = [AddedToken(token, special=special, normalized=False) for token in whole]
        (backend.add_special_tokens if special else backend.add_tokens)(whole)
    special = {name: _special(model, tokens, name) for name in ("bos", "eos", "unknown", "padding")}
    add_bos = _value(model, "add_bos_token", _value(model, "pre") in LLAMA3 or kind == "llama")
    add_eos = _value(model, "add_eos_token", False)
    for name, added in (("bos", add_bos), ("eos", add_eos)):
        if added and special[name] is None:  # transformers would silently add nothing
            raise GGUFError(
                f"{model.path}: no metadata tokenizer.ggml.{name}_token_id, but it is to be added"
            )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=special["bos"],
        eos_token=special["eos"],
        unk_token=special["unknown"],
        pad_token=special["padding"],
        add_bos_token=add_bos,
        add_eos_token=add_eos,
        chat_template=model.metadata.get("tokenizer.chat_template"),
        model_max_length=model.config["max_position_embeddings"],
    )


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


def _vocabulary(model: GGUFModel, tokens: list[str]) -> dict[str, int]:
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        twice = [token for token, count in Counter(tokens).items() if count > 1]
        raise GGUFError(f"{model.path}: tokenizer.ggml.tokens has duplicates: {twice[:8]}")
    return vocabulary


def _byte_level_bpe(model: GGUFModel, tokens: list[str], types: list[int]) -> Tokenizer:
    pre = _value(model, "pre")
    if pre not in WORDS:
        raise GGUFError(
            f"{model.path}: tokenizer.ggml.pre is {pre!r}; supported are {', '.join(WORDS)} (a "
            "file without it is older than llama.cpp's pre-tokenizers: convert the model again)"
        )
    if _value(model, "add_space_prefix", False):
        raise GGUFError(
            f"{model.path}: tokenizer.ggml.add_space_prefix = True is not supported for a "
            "byte-level BPE"
        )
    vocabulary = _vocabulary(model, tokens)
    merges = [tuple(merge.split(" ")) for merge in _array(model, "merges")]
    for i, merge in enumerate(merges):
        if len(merge) != 2 or not {*merge, "".join(merge)} <= vocabulary.keys():  # or Rust panics
            raise GGUFError(
                f"{model.path}: tokenizer.ggml.merges[{i}] is {' '.join(merge)!r}; it must be two "
                "tokens of the vocabulary whose union is one too"
            )
    backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre in LLAMA3))
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(words), "isolated") for words in WORDS[pre]]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece_bpe(model: GGUFModel, tokens: list[str], types: list[int]) -> Tokenizer:
    bpe = models.BPE(
        _vocabulary(model, tokens),
        _score_merges(model, tokens, types),
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


def _score_merges(model: GGUFModel, tokens: list[str], types: list[int]) -> list[tuple[str, str]]:
    """All ways to make a normal token of two: best score first, ties by token numbers.

    That is the list of merges in the tokenizer.json published for such models.
    """
    scores = _per_token(model, "scores")
    normal = {token: i for i, token in enumerate(tokens) if types[i] == NORMAL}
    if len({scores[i] for i in normal.values()}) < 2:
        raise GGUFError(
            f"{model.path}: tokenizer.ggml.scores are all equal, so the order of merges is lost; "
            "convert the model again from its tokenizer.model"
        )
    ranked = sorted(
        (-scores[i], i, normal[token[:cut]], normal[token[cut:]])
        for token, i in normal.items()
        for cut in range(1, len(token))
        if token[:cut] in normal and token[cut:] in normal
    )
    return [(tokens[left], tokens[right]) for _, _, left, right in ranked]
