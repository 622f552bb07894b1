"""A GGUF file that we write is the model: for us, for transformers, and for llama.cpp."""

import sys
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from helpers.gguf_files import byte_level_tokenizer, gguf, smollm2_file
from helpers.models import CONFIGS, TOKENS, logits, random_model, reference_logits

from promptkd_jax.infra.errors import GGUFError, ModelError
from promptkd_jax.models.decoder import Decoder
from promptkd_jax.models.families.registry import FAMILIES
from promptkd_jax.models.io.gguf import open_gguf
from promptkd_jax.models.io.gguf_export import QUANTIZATIONS, save_gguf
from promptkd_jax.models.load import load_model
from promptkd_jax.models.model import Model, keep_layers
from promptkd_jax.models.sampler import row_keys, sample
from promptkd_jax.models.sampling_rules import Sampling

# Of the random models, what llama.cpp cannot compute put as it can.
CHANGES = {
    "gpt2": {},
    "llama": {},
    "llama_linear": {},
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3": {"query_pre_attn_scalar": 16},
    "smollm3": {"num_hidden_layers": 5, "no_rope_layer_interval": 4},
    "olmo2": {},
    "granite": {},
    "phi3": {"sliding_window": None},
    "phi3_long": {
        "rope_scaling": CONFIGS["phi3_long"]["rope_scaling"] | {"attention_factor": 1.25}
    },
}


@pytest.fixture
def make(monkeypatch):
    """Random models with a tokenizer, by their names and fields of their configs."""

    def model(name: str, **changes) -> Model:
        monkeypatch.setitem(CONFIGS, name, CONFIGS[name] | changes)
        return random_model(name).replace(tokenizer=byte_level_tokenizer())

    return model


def in_file(model: Model, path, quantize: str = "f32") -> str:
    save_gguf(path / "model.gguf", model, quantize=quantize)
    return str(path / "model.gguf")


@pytest.mark.parametrize("name", CHANGES)
def test_a_file_that_is_read_again_is_the_model(make, tmp_path, name):
    model = make(name, **CHANGES[name])
    found = load_model(in_file(model, tmp_path))
    family = found.decoder.config.family  # Mistral's files call it Llama
    assert found.decoder.config == model.decoder.config.replace(family=family)
    expected = traverse_util.flatten_dict(model.params, sep="/")
    for path, array in traverse_util.flatten_dict(found.params, sep="/").items():
        rounding = 2e-7 if path.endswith("scale") and "gemma" in name else 0  # 1 was added
        np.testing.assert_allclose(array, expected[path], rtol=0, atol=rounding, err_msg=path)
    assert found.eos_ids == model.eos_ids
    again = tmp_path / "again"
    twice = open_gguf(in_file(found, again))
    once = open_gguf(tmp_path / "model.gguf")
    assert twice.config == once.config
    for tensor in once.names():
        np.testing.assert_array_equal(twice.read(tensor), once.read(tensor), err_msg=tensor)


def test_every_family_that_llama_cpp_runs_is_tried():
    assert {CONFIGS[name]["model_type"] for name in CHANGES} == {
        name for name, family in FAMILIES.items() if family.gguf
    }


def test_logits_are_those_of_the_model(make, tmp_path):
    """Transposed, fused, with a table of positions."""
    model = make("gpt2")
    np.testing.assert_array_equal(logits(load_model(in_file(model, tmp_path))), logits(model))


def test_kept_layers_keep_their_windows(make, tmp_path):
    model = keep_layers(make("gemma3", **CHANGES["gemma3"]), (1, 0, 2))
    found = load_model(in_file(model, tmp_path)).decoder.config
    assert found.kinds == model.decoder.config.kinds and found.pattern == (0, 1, 1)


@pytest.mark.parametrize("quantize", QUANTIZATIONS)
def test_matrices_are_of_the_type_asked_for(make, tmp_path, quantize):
    model = make("gpt2", n_embd=64)
    path = in_file(model, tmp_path, quantize)
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    plain = {name: kind for name, kind in kinds.items() if kind == "F32"}
    expected = {name for name in kinds if "norm" in name or "bias" in name or "position" in name}
    assert plain.keys() == (kinds.keys() if quantize == "f32" else expected)
    assert set(kinds.values()) == {"F32", quantize.upper()}
    found, ours = load_model(path).params["embed"]["embedding"], model.params["embed"]["embedding"]
    kind = gguf.GGMLQuantizationType[quantize.upper()]
    np.testing.assert_array_equal(found, gguf.dequantize(gguf.quantize(ours, kind), kind))


def test_parameters_in_bfloat16_are_written_as_they_are(make, tmp_path):
    model = make("qwen3")
    decoder = Decoder(model.decoder.config.replace(param_dtype="bfloat16"))
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), model.params)
    path = in_file(model.replace(decoder=decoder, params=params), tmp_path, "bf16")
    found = load_model(path, param_dtype="bfloat16")
    jax.tree.map(np.testing.assert_array_equal, found.params, params)


def test_tokens_without_a_row_are_left_out(make, tmp_path):
    model = make("llama", vocab_size=len(byte_level_tokenizer()))
    model.tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    found = load_model(in_file(model, tmp_path))
    assert "[PAD]" not in found.tokenizer.get_vocab() and found.tokenizer.pad_token is None
    assert found.tokenizer("say red").input_ids == model.tokenizer("say red").input_ids


@pytest.mark.parametrize("quantize, number", [("f16", 1e5), ("bf16", np.nan), ("q8_0", np.inf)])
def test_a_number_that_a_type_cannot_hold_is_named(make, tmp_path, quantize, number):
    model = make("llama", hidden_size=64, intermediate_size=64)
    model.params["layers"]["mlp"]["down"]["kernel"][0, 3, 3] = number
    message = f"blk.0.ffn_down.weight has a NaN, or a number that {quantize} cannot hold"
    with pytest.raises(GGUFError, match=message):
        in_file(model, tmp_path, quantize)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("opt", {}, "GGUF files of the family opt are not written here; those of gpt2, llama"),
        ("mistral", {}, r"its kinds\[0\]\.sliding_window is 5, but None for llama.cpp's llama"),
        ("llama_tied", {}, "its qkv_bias is True, but False"),
        ("llama_yarn", {}, r"its kinds\[0\]\.rope\.scaling is .*yarn.*, but None"),
        ("gemma3", {}, "its attention_scale is 0.204.*, but 0.25 for llama.cpp's gemma3"),
        ("smollm3", {}, "its kinds is .*rope=None.* for llama.cpp's smollm3"),
        ("olmo2", {"tie_word_embeddings": True}, "its tied is True, but False"),
        ("gpt2", {"activation_function": "relu"}, "its activation is 'relu', but 'gelu_new'"),
        ("qwen3", {"attention_bias": True}, "its qkv_bias is True, but False"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(make, tmp_path, name, changes, message):
    with pytest.raises(GGUFError, match=f"^{name}: .*{message}"):
        in_file(make(name, **changes), tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_is_said_before_anything_is(make, tmp_path, monkeypatch):
    model = make("llama")
    with pytest.raises(GGUFError, match="has 48 numbers in a row; q8_0 has blocks of 32"):
        in_file(model, tmp_path, "q8_0")
    with pytest.raises(ModelError, match="has no tokenizer"):
        in_file(model.replace(tokenizer=None), tmp_path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(GGUFError, match=r"pip install 'promptkd_jax\[gguf\]'"):
        in_file(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_writing_holds_one_tensor(make, tmp_path):
    model = make("llama", num_hidden_layers=64, hidden_size=64)
    sizes = [x.nbytes for x in jax.tree.leaves(model.params)]
    largest = max(x.nbytes for x in open_gguf_tensors(in_file(model, tmp_path)))
    params = jax.tree.map(jnp.asarray, model.params)
    tracemalloc.start()
    in_file(model.replace(params=params), tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * largest + 2**20 < sum(sizes) / 2


def open_gguf_tensors(path: str) -> list[np.ndarray]:
    model = open_gguf(path)
    return [model.read(name) for name in model.names()]


# What others make of the files


# Transformers does not read the width of heads of Qwen3 and the number of positions of GPT-2; and
# it takes the frequency factors of Llama 3 for weights that a model does not have.
AS_TRANSFORMERS = {
    "gpt2": {"n_positions": 1024},
    "llama": {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}},
    "qwen2": CHANGES["qwen2"],
    "qwen3": {"head_dim": 128},
}


@pytest.mark.parametrize("name", AS_TRANSFORMERS)
def test_transformers_reads_the_same_model(make, tmp_path, name):
    pytest.importorskip("torch", reason="transformers reads GGUF files by torch")
    import transformers

    model = make(name, **AS_TRANSFORMERS[name])
    in_file(model, tmp_path)
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf")
    np.testing.assert_allclose(reference_logits(found.eval()), logits(model), atol=1e-4)


@pytest.fixture(scope="module")
def llama_cpp():
    reason = "the binding of llama.cpp is not installed: pip install llama-cpp-python"
    return pytest.importorskip("llama_cpp", reason=reason)


def llama_cpp_logits(llama_cpp, path: str) -> np.ndarray:
    full = llama_cpp.GGML_TYPE_F32
    how = {"n_ctx": TOKENS.shape[1], "logits_all": True, "verbose": False, "n_threads": 1}
    model, rows = llama_cpp.Llama(path, **how, type_k=full, type_v=full), []
    for row in TOKENS:
        model.reset()
        model.eval(row.tolist())
        rows.append(np.array(model.scores[: len(row)]))
    return np.stack(rows)


@pytest.mark.parametrize("name", CHANGES)
def test_llama_cpp_computes_the_same_logits(make, tmp_path, llama_cpp, name):
    model = make(name, **CHANGES[name])
    found = llama_cpp_logits(llama_cpp, in_file(model, tmp_path))
    # Its GELU is a table in float16.
    atol = 2e-2 if model.decoder.config.activation.startswith("gelu") else 2e-4
    np.testing.assert_allclose(found, logits(model), rtol=0, atol=atol)


@pytest.mark.slow
def test_llama_cpp_answers_as_the_sampler_does(tmp_path, llama_cpp):
    """SmolLM2 in float16: the same tokens of the chat, and the same greedy answers."""
    path = in_file(load_model(smollm2_file()), tmp_path, "f16")
    model = load_model(path)
    other = llama_cpp.Llama(path, n_ctx=256, verbose=False, n_threads=1)
    questions = ("What is the capital of France?", "Write one sentence about cats.")
    chats = [[{"role": "user", "content": question}] for question in questions]
    how = {"tokenize": False, "add_generation_prompt": True}
    texts = [model.tokenizer.apply_chat_template(chat, **how) for chat in chats]
    prompts = [model.tokenizer(text).input_ids for text in texts]
    assert [other.tokenize(text.encode(), special=True) for text in texts] == prompts
    lengths = np.array([len(prompt) for prompt in prompts])
    rows = np.zeros((len(prompts), max(lengths)), np.int32)
    for row, prompt in zip(rows, prompts):
        row[: len(prompt)] = prompt
    greedy = Sampling(temperature=0.0, eos_ids=model.eos_ids)
    keys = row_keys(jax.random.key(0), jnp.arange(len(rows)))
    rollout = sample(
        model.decoder, model.params, rows, lengths, keys, max_new_tokens=24, sampling=greedy
    )
    for i, prompt in enumerate(prompts):
        ours = np.asarray(rollout.tokens[i, len(prompt) : int(rollout.lengths[i])]).tolist()
        theirs = other.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0)
        assert [next(theirs) for _ in ours] == ours
        assert len(ours) > 5
