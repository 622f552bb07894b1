"""The tokenizer of a GGUF file is the one of the model it was made from, or an error."""

import json

import pytest
import transformers
from helpers.families import LLAMA
from helpers.gguf_files import SIZES, gguf_tensors, metadata, smollm2_file, weights, write
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from promptkd_jax.infra.errors import GGUFError
from promptkd_jax.models.decoder import Decoder
from promptkd_jax.models.families.registry import from_hugging_face
from promptkd_jax.models.io.gguf import open_gguf
from promptkd_jax.models.io.gguf_tokenizer import (
    LLAMA3_WORDS,
    tokenizer_from_gguf,
    tokenizer_metadata,
)
from promptkd_jax.models.model import Model

TEXTS = (
    "Déjà vu: naïve façade, Straße 12345, 3.14159 ½ ² ٣٤.",
    "你好，世界！日本語テスト 한국어 🙂👩‍👩‍👧",
    "  two  spaces\tand\r\n\n\nlines   ",
    "I'LL say we're 'quoted' , don't_do . $5+$7=$12 <|end|> x<|end|>y <think>",
    "",
)


def byte_level_vocabulary() -> tuple[list[str], list[str]]:
    """Tokens and merges of a small byte-level BPE, trained on the texts above."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(TEXTS * 3, trainer)
    bpe = json.loads(backend.to_str())["model"]
    return sorted(bpe["vocab"], key=bpe["vocab"].get), [" ".join(pair) for pair in bpe["merges"]]


TOKENS, MERGES = byte_level_vocabulary()
# Named by their numbers in the file, then one more control token, then an ordinary added token.
SPECIAL = ["<|begin|>", "<|end|>", "<|pad|>", "<|sep|>", "<think>"]
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}"


def tokenizer_keys(pre: str = "gpt-2") -> dict:
    n = len(TOKENS)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": TOKENS + SPECIAL,
        "tokenizer.ggml.token_type": [1] * n + [3, 3, 3, 3, 4],
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": n,
        "tokenizer.ggml.eos_token_id": n + 1,
        "tokenizer.ggml.padding_token_id": n + 2,
        "tokenizer.chat_template": TEMPLATE,
    }


def open_with(path, changes: dict):
    """A model whose file has the given tokenizer; a value of None removes a key."""
    keys = {key: value for key, value in changes.items() if value is not None}
    sizes = {**SIZES, "layers": 1, "vocabulary": len(keys["tokenizer.ggml.tokens"])}
    return open_gguf(write(path, metadata(sizes) | keys, gguf_tensors(weights(sizes), sizes)))


@pytest.fixture
def load(tmp_path):
    return lambda changes: tokenizer_from_gguf(open_with(tmp_path / "model.gguf", changes))


BYTE_LEVEL = ["gpt-2", "smollm", "llama-bpe", "default", "qwen2"]


@pytest.mark.parametrize("pre", BYTE_LEVEL)
def test_byte_level_text_comes_back_exactly(load, pre):
    tokenizer = load(tokenizer_keys(pre) | {"tokenizer.ggml.add_bos_token": False})
    for text in TEXTS:
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
        assert max(ids, default=0) < len(tokenizer) == len(TOKENS) + len(SPECIAL)


def words(tokenizer, text: str) -> list[str]:
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    return [decoders.ByteLevel().decode([piece]) for piece, _ in pieces]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["I", "'", "LL", " don", "'t", " pay", " 12345", "\n", "\n", "é", "(", "x", " "]),
        ("smollm", ["I", "'", "LL", " don", "'t", " pay", " ", *"12345", "\n", "\n", "é", "("]),
        ("llama-bpe", ["I", "'LL", " don", "'t", " pay", " ", "123", "45", "\n\n", "é", "(x", " "]),
        ("qwen2", ["I", "'LL", " don", "'t", " pay", " ", *"12345", "\n\n", "é", "(x", " "]),
        ("default", ["I", "'", "LL", " don", "'", "t", " pay", " ", "123", "45", "\n", "\n"]),
    ],
)
def test_words_are_cut_where_each_pre_tokenizer_cuts_them(load, pre, expected):
    found = words(load(tokenizer_keys(pre)), "I'LL don't pay 12345\n\né(x ")
    assert found[: len(expected)] == expected


def test_gpt2_and_smollm_match_their_published_pre_tokenizers(load):
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    published = {"gpt-2": byte_level, "smollm": pre_tokenizers.Sequence([digits, byte_level])}
    for pre, published_pre in published.items():
        backend = Tokenizer(models.BPE(*vocabulary_and_merges()))
        backend.pre_tokenizer = published_pre
        tokenizer = load(tokenizer_keys(pre))
        for text in TEXTS[:3]:
            assert tokenizer(text).input_ids == backend.encode(text).ids


def vocabulary_and_merges() -> tuple[dict[str, int], list[tuple[str, str]]]:
    return {t: i for i, t in enumerate(TOKENS)}, [tuple(m.split(" ")) for m in MERGES]


def test_qwen2_matches_transformers_and_normalises(load):
    vocabulary, merges = vocabulary_and_merges()
    reference = transformers.Qwen2Tokenizer(vocab=vocabulary, merges=merges)
    tokenizer = load(tokenizer_keys("qwen2"))
    for text in (*TEXTS[:3], "De\u0301ja\u0300"):
        assert tokenizer(text).input_ids == reference(text).input_ids
    assert tokenizer.decode(tokenizer("De\u0301ja\u0300").input_ids) == "Déjà"


def test_llama3_takes_whole_words_before_merges(load):
    """A word of the vocabulary that no merges lead to is one token for llama-bpe only."""
    changes = {"tokenizer.ggml.tokens": [*TOKENS, *SPECIAL, "Ġzqx"]}
    changes |= {"tokenizer.ggml.token_type": [*[1] * len(TOKENS), 3, 3, 3, 3, 4, 1]}
    changes |= {"tokenizer.ggml.add_bos_token": False}
    counts = {pre: load(tokenizer_keys(pre) | changes)(" zqx") for pre in ("llama-bpe", "qwen2")}
    assert counts["llama-bpe"].input_ids == [len(TOKENS) + len(SPECIAL)]
    assert len(counts["qwen2"].input_ids) == 4


def test_special_tokens_are_whole_and_named_as_in_the_file(load):
    tokenizer, n = load(tokenizer_keys()), len(TOKENS)
    ids = tokenizer("a<|end|>b<think><|sep|>").input_ids
    assert [i for i in ids if i >= n] == [n + 1, n + 4, n + 3] and len(ids) == 5
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab<think>"
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<|begin|>", n)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|end|>", n + 1)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|pad|>", n + 2)
    assert tokenizer.model_max_length == 2048


def test_bos_and_eos_are_added_as_the_file_says(load):
    n = len(TOKENS)
    for pre, add_bos, add_eos, expected in [
        ("gpt-2", None, None, []),
        ("llama-bpe", None, None, [n]),
        ("llama-bpe", False, None, []),
        ("gpt-2", True, True, [n, n + 1]),
    ]:
        flags = {"add_bos_token": add_bos, "add_eos_token": add_eos}
        flags = {f"tokenizer.ggml.{name}": value for name, value in flags.items()}
        tokenizer = load(tokenizer_keys(pre) | flags)
        ids = tokenizer("x").input_ids
        assert [i for i in ids if i >= n] == expected and len(ids) == 1 + len(expected)


def test_the_chat_template_is_the_files(load):
    tokenizer = load(tokenizer_keys())
    chat = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<|begin|>hi<|end|>"
    assert load(tokenizer_keys() | {"tokenizer.chat_template": None}).chat_template is None


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_saved_and_loaded_by_transformers_it_is_the_same(load, tmp_path, model):
    tokenizer = load(tokenizer_keys("llama-bpe") if model == "gpt2" else sentencepiece_keys())
    tokenizer.save_pretrained(tmp_path / "saved")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in TEXTS:
        assert again(text).input_ids == tokenizer(text).input_ids
    assert again.special_tokens_map == tokenizer.special_tokens_map
    assert again.chat_template == tokenizer.chat_template


BLOCKS = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def sentencepiece_keys() -> dict:
    """A small SentencePiece BPE: bytes, merged pieces by falling score, then single letters."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = BLOCKS
    trainer = trainers.BpeTrainer(vocab_size=180, show_progress=False)
    backend.train_from_iterator(
        [*TEXTS[:1], TEXTS[3], "the naive theatre there, Straße"] * 2, trainer
    )
    vocabulary = json.loads(backend.to_str())["model"]["vocab"]
    pieces = sorted(vocabulary, key=lambda piece: (len(piece) == 1, vocabulary[piece]))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(pieces))],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def sentencepiece(text: str, keys: dict) -> list[int]:
    """SentencePiece BPE as llama.cpp runs it: join the best-scored neighbours, leftmost first."""
    tokens, scores = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.scores"]
    number = {token: i for i, token in enumerate(tokens)}
    symbols = list(("▁" + text.replace(" ", "▁")) if text else "")
    while True:
        joined = [a + b for a, b in zip(symbols, symbols[1:])]
        found = [(-scores[number[word]], i) for i, word in enumerate(joined) if word in number]
        if not found:
            break
        at = min(found)[1]
        symbols[at : at + 2] = [joined[at]]
    ids = []
    for symbol in symbols:
        raw = [number[f"<0x{byte:02X}>"] for byte in symbol.encode()]
        ids += [number[symbol]] if symbol in number else raw
    return ids


def test_sentencepiece_bpe_is_that_of_llama_cpp(load):
    keys = sentencepiece_keys()
    tokenizer = load(keys)
    for text in (*TEXTS, "there is the theatre", "   ", "\n", "a  b", " Straße"):
        ids = tokenizer(text).input_ids
        assert ids == [1, *sentencepiece(text, keys)]  # llama.cpp adds BOS unless told not to
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert any(i < 259 for i in ids[1:]) or 3 + ord("\n") in tokenizer("\n").input_ids


def test_sentencepiece_puts_a_space_where_llama_2_does(load):
    keys = sentencepiece_keys()
    ids = load(keys)("the</s>the").input_ids
    assert ids == [1, *sentencepiece("the", keys), 2, *sentencepiece("the", keys)]
    bare = load(keys | {"tokenizer.ggml.add_space_prefix": False})
    assert bare.decode(bare(" the").input_ids, skip_special_tokens=True) == " the"
    assert len(bare("t").input_ids) == 2


def test_sentencepiece_merges_make_normal_tokens_only(load):
    keys = sentencepiece_keys()
    twice = keys["tokenizer.ggml.tokens"][259] * 2
    more = {"tokens": twice, "scores": 0.0, "token_type": 3}
    keys |= {(k := f"tokenizer.ggml.{name}"): [*keys[k], value] for name, value in more.items()}
    merges = json.loads(load(keys).backend_tokenizer.to_str())["model"]["merges"]
    assert merges and twice not in ["".join(merge) for merge in merges]


def test_sentencepiece_without_byte_tokens_has_the_unknown_token(load):
    keys = sentencepiece_keys()
    for name in ("tokens", "scores", "token_type"):
        del keys[f"tokenizer.ggml.{name}"][3:259]
    assert load(keys)("☃☃").input_ids.count(0) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "t5"}, "tokenizer.ggml.model is 't5'; supported are gpt2, llama"),
        ({"model": None}, "tokenizer.ggml.model is None"),
        ({"pre": "bloom"}, "tokenizer.ggml.pre is 'bloom'; supported are gpt-2, smollm"),
        ({"pre": None}, "tokenizer.ggml.pre is None.*convert the model again"),
        ({"merges": None}, "no metadata tokenizer.ggml.merges"),
        ({"merges": ["a b c"]}, r"merges\[0\] is 'a b c'; it must be two tokens"),
        ({"merges": [*MERGES, "z Z"]}, rf"merges\[{len(MERGES)}\] is 'z Z'"),
        ({"token_type": [1] * 5}, "token_type has 5 entries, but token_embd.weight has"),
        ({"tokens": [*TOKENS, *["<same>"] * 5]}, r"tokens has duplicates: \['<same>'\]"),
        ({"add_space_prefix": True}, "add_space_prefix = True is not supported"),
        ({"add_bos_token": True, "bos_token_id": None}, "no metadata .*bos_token_id"),
    ],
)
def test_a_tokenizer_that_cannot_be_rebuilt_is_refused(tmp_path, changes, message):
    changes = {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
    sizes = {**SIZES, "layers": 1, "vocabulary": len(TOKENS) + len(SPECIAL)}
    keys = metadata(sizes) | tokenizer_keys() | changes
    keys = {key: value for key, value in keys.items() if value is not None}
    path = write(tmp_path / "model.gguf", keys, gguf_tensors(weights(sizes), sizes))
    model = open_gguf(path)
    with pytest.raises(GGUFError, match=f"model.gguf: .*{message}"):
        tokenizer_from_gguf(model)


def test_sentencepiece_without_distinct_scores_is_refused(tmp_path):
    keys = sentencepiece_keys()
    keys["tokenizer.ggml.scores"] = [-1000.0] * len(keys["tokenizer.ggml.scores"])
    model = open_with(tmp_path / "model.gguf", keys)
    with pytest.raises(GGUFError, match="scores are all equal"):
        tokenizer_from_gguf(model)


@pytest.mark.slow
def test_smollm2_tokenizer():
    tokenizer = tokenizer_from_gguf(open_gguf(smollm2_file()))
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer) == 49152
    assert tokenizer.convert_ids_to_tokens(tokenizer(" 2024").input_ids) == ["Ġ", *"2024"]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert tokenizer(chat).input_ids.count(1) == 2 == tokenizer(chat).input_ids.count(2)


# Written


def model_with(tokenizer, rows: int, eos_ids: tuple[int, ...]) -> Model:
    """A model of which only what belongs to its tokenizer is looked at."""
    decoder = Decoder(from_hugging_face({**LLAMA, "model_type": "llama", "vocab_size": rows}))
    return Model("some/model", decoder, None, {}, tokenizer, eos_ids)


@pytest.mark.parametrize("pre", [*BYTE_LEVEL, "dbrx", "stablelm2", "gpt-4o", "tekken", "llama"])
def test_a_tokenizer_that_is_written_is_read_again(load, pre):
    keys = sentencepiece_keys() if pre == "llama" else tokenizer_keys(pre)
    tokenizer = load(keys)
    eos = tokenizer.eos_token_id
    found = tokenizer_metadata(model_with(tokenizer, len(tokenizer), (eos,)))
    assert found.pop("general.name") == "model"
    if pre == "llama":  # the same order by other numbers
        scores = found.pop("tokenizer.ggml.scores")
        order = sorted(range(len(scores)), key=scores.__getitem__)
        theirs = keys["tokenizer.ggml.scores"]
        merged = [
            i for i in order if scores[i] > -1e6 and keys["tokenizer.ggml.token_type"][i] == 1
        ]
        assert merged and merged == sorted(merged, key=theirs.__getitem__)
        found["tokenizer.ggml.scores"] = theirs
    added = ("add_bos_token", "add_eos_token", "add_space_prefix")
    added = [f"tokenizer.ggml.{name}" for name in added]
    assert {key: x for key, x in found.items() if key not in added or key in keys} == keys
    again = load(found)
    for text in TEXTS:
        assert again(text).input_ids == tokenizer(text).input_ids


def test_published_forms_of_pre_tokenizers_are_known(load):
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    without = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    split = pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated")
    forms = {
        "gpt-2": (byte_level, None, False),
        "smollm": (pre_tokenizers.Sequence([digits, byte_level]), None, False),
        "llama-bpe": (pre_tokenizers.Sequence([split, without]), None, True),
        "dbrx": (pre_tokenizers.Sequence([split, without]), None, False),
        "qwen2": (transformers.Qwen2Tokenizer().backend_tokenizer.pre_tokenizer, "NFC", False),
    }
    for pre, (form, normalizer, ignore_merges) in forms.items():
        backend = Tokenizer(models.BPE(*vocabulary_and_merges(), ignore_merges=ignore_merges))
        backend.pre_tokenizer = form
        if normalizer:
            backend.normalizer = getattr(normalizers, normalizer)()
        assert written(backend)["tokenizer.ggml.pre"] == pre


def written(backend: Tokenizer, **special: str) -> dict:
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    return tokenizer_metadata(model_with(tokenizer, len(tokenizer), (0,)))


def test_rows_that_are_no_tokens_are_none_when_read_again(load):
    tokenizer = load(tokenizer_keys())
    padded = tokenizer_metadata(model_with(tokenizer, len(tokenizer) + 3, (len(TOKENS) + 1,)))
    assert padded["tokenizer.ggml.tokens"][-1] == f"[PAD{len(tokenizer) + 2}]"
    assert load(padded).get_vocab() == tokenizer.get_vocab()


def test_all_tokens_that_end_a_turn_are_written(load):
    tokenizer, n = load(tokenizer_keys()), len(TOKENS)
    found = tokenizer_metadata(model_with(tokenizer, len(tokenizer), (n + 1, n + 3, n)))
    names = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
    assert [found[name] for name in names] == [n + 1, n + 3, n]
    with pytest.raises(GGUFError, match="4 tokens end an answer; a GGUF file names at most 3"):
        tokenizer_metadata(model_with(tokenizer, len(tokenizer), (n, n + 1, n + 2, n + 3)))


def test_white_space_behind_special_tokens_goes_as_in_phi_3(load):
    """Llama.cpp sees by the name whose special tokens take it."""
    end = AddedToken("<|end|>", special=True, normalized=False, rstrip=True)
    backend = Tokenizer(models.BPE(*vocabulary_and_merges()))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens([end])
    found = written(backend)
    assert found["general.name"] == "phi-3 model"
    for name, kept in (("phi-3 model", 0), ("Phi3-mini", 0), ("model", 2)):
        ids = load(found | {"general.name": name})("<|end|>\n\na").input_ids
        assert len(ids) == 2 + kept


def lowercase(backend):
    backend.normalizer = normalizers.Lowercase()


def whitespace(backend):
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def prefix_space(backend):
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def other_words(backend):
    split = pre_tokenizers.Split(Regex(r"\p{L}+"), "isolated")
    without = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, without])


def separator(backend):
    backend.post_processor = processors.TemplateProcessing(
        single="<|sep|> $A", special_tokens=[("<|sep|>", 0)]
    )


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lowercase,
            "cuts text as its own does: Lowercase; those that can be written are like gpt-2",
        ),
        (whitespace, r'as its own does: \{"type": "Whitespace"\}'),
        (prefix_space, r'as its own does: \{"type": "ByteLevel", "add_prefix_space": true'),
        (other_words, r"as its own does: PreTokenizer\(words=\('.*p\{L\}\+',"),
        (
            separator,
            r"makes \['.', 'a'\] of 'a'; a GGUF file can only have BOS and EOS around a text",
        ),
    ],
)
def test_a_tokenizer_that_llama_cpp_has_not_is_refused(spoil, message):
    backend = Tokenizer(models.BPE(*vocabulary_and_merges()))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    spoil(backend)
    with pytest.raises(GGUFError, match=f"^some/model: .*{message}"):
        written(backend)


def test_a_tokenizer_that_is_no_bpe_or_has_no_merges_is_refused():
    with pytest.raises(GGUFError, match="its tokenizer has no merges; llama.cpp does not load"):
        written(Tokenizer(models.BPE({"a": 0}, [])))
    with pytest.raises(GGUFError, match="its tokenizer is a WordLevel; only a BPE can be written"):
        written(Tokenizer(models.WordLevel({"a": 0}, "a")))


def test_merges_that_no_scores_say_are_refused(load):
    """SentencePiece makes a token of any two that are one; these merges leave one way out."""
    backend = Tokenizer(
        models.BPE({"<unk>": 0, "a": 1, "aa": 2, "aaa": 3}, [("a", "a"), ("aa", "a")])
    )
    state = json.loads(backend.to_str())
    state["model"] |= {"byte_fallback": True, "unk_token": "<unk>"}
    state["normalizer"] = json.loads(normalizers.Replace(" ", "▁").__getstate__())
    with pytest.raises(GGUFError, match="are not those of a SentencePiece model"):
        written(Tokenizer.from_str(json.dumps(state)))
    state["model"]["merges"].append(["a", "aa"])
    found = written(Tokenizer.from_str(json.dumps(state)))
    assert found["tokenizer.ggml.scores"][2:] == [-1.0, -2.0]
    assert found["tokenizer.ggml.add_space_prefix"] is False


@pytest.mark.parametrize(("scheme", "prefix"), [("first", True), ("never", False)])
def test_sentencepiece_as_transformers_5_builds_it(scheme, prefix):
    backend = transformers.LlamaTokenizer(
        vocab={"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4, "ab": 5}, merges=[("a", "b")]
    ).backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    found = written(backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    assert found["tokenizer.ggml.add_space_prefix"] is prefix
    assert found["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 1]
