"""Every family computes what `transformers` computes, from its files and back to them."""

import functools
import json
import math
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.models import (
    _LLAMA,
    _LLAMA3_ROPE,
    CONFIGS,
    LENGTHS,
    POSITIONS,
    PREFIX,
    TOKENS,
    VOCAB,
    Pair,
    assert_same_params,
    from_folder,
    logits,
    make_pair,
    random_model,
    reference_logits,
)
from helpers.tiny import equations
from safetensors.numpy import load_file, save_file

from promptkd_jax.infra.errors import ModelError
from promptkd_jax.models import language_model
from promptkd_jax.models.config import Dropout, Experts, LayerKind, Rope, RopeScaling
from promptkd_jax.models.decoder import REMAT, Decoder, head
from promptkd_jax.models.families.base import HEAD
from promptkd_jax.models.families.registry import from_hugging_face
from promptkd_jax.models.io import export
from promptkd_jax.models.io.export import save_model, to_hugging_face
from promptkd_jax.models.language_model import LazyLogits
from promptkd_jax.models.layers import projection
from promptkd_jax.models.layers.projection import product_of_few_rows
from promptkd_jax.models.load import load_model
from promptkd_jax.models.model import Model, keep_layers, uniform_layers


@pytest.fixture(scope="module", params=CONFIGS)
def model(request) -> Model:
    return random_model(request.param)


@pytest.fixture(autouse=True)
def _full_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory) -> Pair:
    return make_pair(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a random model; not to be changed."""

    @functools.cache
    def save(name: str) -> pathlib.Path:
        folder = tmp_path_factory.mktemp(f"saved_{name}")
        save_model(folder, random_model(name))
        return folder

    return save


@pytest.fixture
def copy(saved, tmp_path):
    """A copy of a saved folder, with its config or its tensors changed by a function."""

    def make(name: str, config=lambda config: config, tensors=None) -> pathlib.Path:
        folder = tmp_path / f"copy_{len(list(tmp_path.iterdir()))}"
        shutil.copytree(saved(name), folder)
        file = folder / "config.json"
        file.write_text(json.dumps(config(json.loads(file.read_text()))))
        if tensors is not None:
            file = folder / "model.safetensors"
            save_file(tensors(load_file(file)), file)
        return folder

    return make


# What is computed.


def test_logits_are_those_of_transformers(pair):
    expected = reference_logits(pair.reference)
    assert 1 < np.abs(expected).max() < 30, "weights that would hide a difference"
    np.testing.assert_allclose(logits(pair.model), expected, rtol=0, atol=1e-4)


def test_logits_behind_a_prefix_are_those_of_transformers(pair):
    expected = reference_logits(pair.reference, prefix=PREFIX)
    assert np.abs(expected - reference_logits(pair.reference)).max() > 0.5, "the prefix is unseen"
    np.testing.assert_allclose(logits(pair.model, prefix=PREFIX), expected, rtol=0, atol=1e-4)


def test_nothing_behind_a_rows_end_changes_it(model):
    behind = np.arange(TOKENS.shape[1]) >= LENGTHS[:, None]
    changed = np.where(behind, (TOKENS + 1) % VOCAB, TOKENS)
    before, after = logits(model, prefix=PREFIX), logits(model, changed, prefix=PREFIX)
    np.testing.assert_array_equal(after[~behind], before[~behind])
    assert (after[behind] != before[behind]).any()


@functools.partial(jax.jit, static_argnums=(0, 4))
def _decoded(decoder: Decoder, params, prompts, continuation, steps: int):
    """Hidden states `[B, steps, D]` of `steps` tokens a row, one by one behind the prompts."""
    _, cache = decoder.prefill(params, prompts, LENGTHS, PREFIX, prompts.shape[1], steps)

    def step(cache, index):
        token = continuation[:, index]
        hidden, cache = decoder.decode(params, token, PREFIX, LENGTHS + index, cache)
        return cache, hidden

    _, hidden = jax.lax.scan(step, cache, jnp.arange(steps))
    return hidden.swapaxes(0, 1)


@pytest.mark.parametrize("name", CONFIGS)
def test_cached_decoding_is_the_full_forward(name):
    """Rows of different lengths, a soft prompt, and padding of the prompts that is overwritten."""
    model = random_model(name)
    steps = TOKENS.shape[1] - LENGTHS.max()
    prompts = np.where(np.arange(LENGTHS.max()) < LENGTHS[:, None], TOKENS[:, :12], 7)
    columns = LENGTHS[:, None] + np.arange(steps)
    continuation = np.take_along_axis(TOKENS, columns, axis=1)
    hidden = _decoded(model.decoder, model.params, prompts, continuation, int(steps))
    found = LazyLogits(hidden, head(model.params), model.decoder.logit_soft_cap).logits()
    full = logits(model, prefix=PREFIX)
    expected = np.take_along_axis(full, columns[:, :, None], axis=1)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_remat_changes_what_is_kept_and_not_the_gradient():
    model = random_model("opt")

    def loss(params, decoder):
        hidden = decoder.apply({"params": params}, TOKENS)
        return jnp.mean(jnp.square(hidden - 1))

    gradients, products = {}, {}
    for policy in REMAT:
        decoder = Decoder(model.decoder.config.replace(remat=policy))
        gradient = jax.jit(jax.grad(loss), static_argnums=1)
        traced = gradient.trace(model.params, decoder)
        products[policy] = str(traced.jaxpr).count("dot_general")
        gradients[policy] = traced.lower().compile()(model.params)
    assert products["full"] > products["dots"] > products["none"], products
    for policy in ("full", "dots"):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
            gradients[policy],
            gradients["none"],
        )


@pytest.mark.parametrize(
    "name, modules",
    [("opt", ("q_proj", "k_proj", "v_proj")), ("qwen3", ("q_norm", "k_norm", "v_proj"))],
)
def test_intermediates_are_those_of_transformers(name, modules, tmp_path):
    """Each layer's output, and queries, keys and values as projected (and normed), not rotated."""
    import torch

    reference, _, model = make_pair(name, tmp_path)
    found = {}  # by the last part of a module's name, one array a layer
    for path, module in reference.named_modules():
        kind = path.rpartition(".")[2]
        module.register_forward_hook(
            lambda _, inputs, out, kind=kind: found.setdefault(kind, []).append(out)
        )
    with torch.no_grad():
        outputs = reference(torch.tensor(TOKENS), use_cache=False, output_hidden_states=True)
    _, sown = model.decoder.apply({"params": model.params}, TOKENS, mutable=["intermediates"])
    layers = sown["intermediates"]["layers"]
    (hidden,) = layers["hidden"]
    expected = np.stack(outputs.hidden_states[1:-1])  # the last one is behind the final norm
    np.testing.assert_allclose(hidden[:-1], expected, rtol=0, atol=1e-4)
    for kind, module in zip(("queries", "keys", "values"), modules):
        (states,) = layers["attention"][kind]
        expected = np.stack(found[module]).reshape(states.shape)
        np.testing.assert_allclose(states, expected, rtol=0, atol=1e-4, err_msg=kind)


def test_bfloat16_is_computed_in_bfloat16_and_close():
    model = random_model("llama")
    half = model.replace(decoder=Decoder(model.decoder.config.replace(dtype="bfloat16")))
    hidden = jax.eval_shape(lambda p: half.decoder.apply({"params": p}, TOKENS), model.params)
    assert hidden.dtype == jnp.bfloat16
    difference = np.abs(logits(half) - logits(model))
    assert 1e-4 < difference.mean() < 0.1, difference.mean()


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_more_columns_than_learned_positions_are_an_error(name):
    model = random_model(name)
    tokens = np.zeros((1, POSITIONS), np.int32)
    jax.eval_shape(model.decoder.apply, {"params": model.params}, tokens)
    with pytest.raises(ModelError, match=f"69 columns .* {name} model of 64 positions"):
        model.decoder.apply({"params": model.params}, tokens, prefix=PREFIX)
    with pytest.raises(ModelError, match="65 columns"):
        model.decoder.prefill(model.params, tokens[:, :4], np.array([4]), None, 4, POSITIONS - 3)


# To files and back.


def test_export_has_the_rotary_fields_of_both_transformers_versions(saved):
    """transformers 4 knows no `rope_parameters` and would take its defaults without a word."""
    config = json.loads((saved("llama") / "config.json").read_text())
    scaled = {name: x for name, x in _LLAMA3_ROPE.items() if name != "rope_theta"}
    assert (config["rope_theta"], config["rope_scaling"]) == (10000.0, scaled)
    assert config["rope_parameters"] == _LLAMA3_ROPE
    for fields in ({}, {"rope_parameters": None}):
        found = from_hugging_face({**config, **fields})
        assert found == from_hugging_face(CONFIGS["llama"])
    plain = {**CONFIGS["mistral"], "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}
    model = random_model("mistral").replace(hf_config=plain)
    found = export._config_json(model)
    assert found["rope_theta"] == 7.0 and "rope_scaling" not in found


def test_export_is_the_model_for_transformers(pair, tmp_path):
    save_model(tmp_path, pair.model)
    found = from_folder(tmp_path)
    assert type(found) is type(pair.reference)
    np.testing.assert_array_equal(reference_logits(found), reference_logits(pair.reference))


def test_a_folder_is_written_in_another_dtype(tmp_path):
    model = random_model("llama_tied")
    half = model.replace(decoder=Decoder(model.decoder.config.replace(param_dtype="float16")))
    save_model(tmp_path, half)
    found = load_file(tmp_path / "model.safetensors")
    for name, array in to_hugging_face(model.params, model.decoder.config).items():
        np.testing.assert_array_equal(found[name], array.astype(np.float16), err_msg=name)
        assert found[name].dtype == np.float16
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == "float16" and config["tie_word_embeddings"] is True
    large = half.replace(params=jax.tree.map(lambda x: 1e6 * x, model.params))
    with pytest.raises(ModelError, match="embed_tokens.weight has .* that float16 cannot hold"):
        save_model(tmp_path, large)


def test_whether_a_head_is_tied_is_always_said():
    """MLX takes it for tied where nothing is said, the Llama of transformers for its own."""
    model = random_model("llama")
    said = {k: x for k, x in model.hf_config.items() if k != "tie_word_embeddings"}
    assert export._config_json(model.replace(hf_config=said))["tie_word_embeddings"] is False


@pytest.mark.parametrize("kind", ["TokenizersBackend", "LlamaTokenizer", "Qwen2Tokenizer"])
def test_an_exported_tokenizer_is_the_same_for_both_transformers_versions(kind, tmp_path):
    """That 4.57.6 opens such a folder and gives these ids was tried; it knows these names, has no
    TokenizersBackend and no list of extra_special_tokens, and its LlamaTokenizer adds a BOS."""
    from helpers import tiny
    from transformers import AutoTokenizer

    marks = ["<|a|>", "<|b|>"]
    tokenizer = tiny.tokenizer(("<unk>", *marks))
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    tokenizer.chat_template = "{{ messages[0]['content'] }}<|b|>"
    tokenizer.save_pretrained(tmp_path / "given")
    file = tmp_path / "given" / "tokenizer_config.json"
    config = json.loads(file.read_text()) | {"tokenizer_class": kind, "unk_token": "<unk>"}
    file.write_text(json.dumps(config))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "given")
    save_model(tmp_path / "out", random_model("llama").replace(tokenizer=tokenizer))

    files = {x.name for x in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= files
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] in ("PreTrainedTokenizerFast", "Qwen2Tokenizer")
    assert config["additional_special_tokens"] == marks and "extra_special_tokens" not in config
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("say red<|a|> sky", " a<|b|>", "é"):
        assert found(text).input_ids == tokenizer(text).input_ids
        ids = tokenizer(text).input_ids
        assert found.decode(ids, skip_special_tokens=True) == tokenizer.decode(
            ids, skip_special_tokens=True
        )
    assert set(found.all_special_tokens) == set(tokenizer.all_special_tokens) >= set(marks)
    assert found.chat_template == tokenizer.chat_template


def test_load_after_export_is_bit_equal(model, tmp_path):
    tensors = to_hugging_face(model.params, model.decoder.config)
    sizes = [sum(x.size for x in jax.tree.leaves(tree)) for tree in (tensors, model.params)]
    assert sizes[0] == sizes[1], "every parameter is written once"
    save_model(tmp_path, model)
    found = load_model(str(tmp_path))
    assert_same_params(found, model)
    assert found.decoder.config == model.decoder.config
    assert found.eos_ids == model.eos_ids


def test_shards_of_transformers_are_read(tmp_path):
    pair = make_pair("llama", tmp_path / "one")
    pair.reference.save_pretrained(tmp_path / "many", max_shard_size="40KB")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
    assert not (tmp_path / "many" / "model.safetensors").exists()
    assert_same_params(load_model(str(tmp_path / "many")), pair.model)


def test_our_shards_are_read_by_us(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "SHARD_BYTES", 40_000)
    model = random_model("llama")
    save_model(tmp_path, model)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert [x.name for x in shards] == [
        f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))
    ]
    held = [load_file(shard) for shard in shards]
    assert len(shards) > 2
    assert all(sum(x.nbytes for x in tensors.values()) <= 40_000 for tensors in held)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for t in held for x in t.values())
    assert_same_params(load_model(str(tmp_path)), model)


def test_our_shards_are_read_by_transformers(tmp_path, monkeypatch):
    pair = make_pair("gpt2", tmp_path / "one")
    monkeypatch.setattr(export, "SHARD_BYTES", 40_000)
    save_model(tmp_path / "many", pair.model)
    assert not (tmp_path / "many" / "model.safetensors").exists()
    found = from_folder(tmp_path / "many")
    np.testing.assert_array_equal(reference_logits(found), reference_logits(pair.reference))


def test_a_second_save_leaves_nothing_of_the_first(tmp_path, monkeypatch):
    first, second = random_model("gpt2", seed=0), random_model("gpt2", seed=1)
    monkeypatch.setattr(export, "SHARD_BYTES", 40_000)
    save_model(tmp_path, first)
    monkeypatch.undo()
    save_model(tmp_path, second)
    assert [x.name for x in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]
    assert_same_params(load_model(str(tmp_path)), second)
    monkeypatch.setattr(export, "SHARD_BYTES", 40_000)
    save_model(tmp_path, first)
    assert not (tmp_path / "model.safetensors").exists()
    assert_same_params(load_model(str(tmp_path)), first)


def test_dtypes_are_converted_on_load(saved, tmp_path):
    """float32 file -> bfloat16 parameters -> bfloat16 file -> float32 parameters."""
    full = random_model("llama")
    half = load_model(str(saved("llama")), param_dtype="bfloat16")
    rounded = full.replace(params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), full.params))
    assert_same_params(half, rounded)

    save_model(tmp_path, half)
    assert {str(x.dtype) for x in load_file(tmp_path / "model.safetensors").values()} == {
        "bfloat16"
    }
    back = full.replace(params=jax.tree.map(lambda x: x.astype(jnp.float32), rounded.params))
    assert_same_params(load_model(str(tmp_path)), back)


def test_bfloat16_folders_of_transformers_are_read_and_ours_are_theirs(tmp_path):
    torch = pytest.importorskip("torch", reason="the models of transformers need torch")
    pair = make_pair("qwen3", tmp_path / "float32")
    pair.reference.to(torch.bfloat16).save_pretrained(tmp_path / "bfloat16")
    half = load_model(str(tmp_path / "bfloat16"), param_dtype="bfloat16")
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), pair.model.params)
    assert_same_params(half, pair.model.replace(params=rounded))
    save_model(tmp_path / "ours", half)
    found = from_folder(tmp_path / "ours")
    assert found.dtype == torch.bfloat16
    expected = pair.reference.state_dict()
    assert found.state_dict().keys() == expected.keys()
    assert all(torch.equal(x, expected[name]) for name, x in found.state_dict().items())


def _prefixed(tensors):
    return {f"transformer.{name}": x for name, x in tensors.items()}


def _hub_gpt2(tensors):
    """The files of 2019: the causal masks among the weights."""
    mask = np.tril(np.ones((1, 1, POSITIONS, POSITIONS), np.float32))
    masks = {f"h.{i}.attn.bias": mask for i in range(3)}
    return tensors | masks | {"h.0.attn.masked_bias": np.float32([-1e4])}


def _with_head(embedding: str):
    return lambda tensors: tensors | {HEAD: tensors[embedding].copy()}


OLDER_FILES = {
    "gpt2 with a prefix": ("gpt2", _prefixed),
    "gpt2 with masks": ("gpt2", _hub_gpt2),
    "gpt2 with both": ("gpt2", lambda tensors: _prefixed(_hub_gpt2(tensors))),
    "opt with a shorter prefix": (
        "opt",
        lambda tensors: {name.removeprefix("model."): x for name, x in tensors.items()},
    ),
    "gpt2 with its head": ("gpt2", _with_head("wte.weight")),
    "opt with its head": ("opt", _with_head("model.decoder.embed_tokens.weight")),
    "tied llama with its head": ("llama_tied", _with_head("model.embed_tokens.weight")),
    "llama with its frequencies": (
        "llama",
        lambda tensors: (
            tensors | {"model.layers.1.self_attn.rotary_emb.inv_freq": np.ones(6, np.float32)}
        ),
    ),
}


@pytest.mark.parametrize("name, tensors", OLDER_FILES.values(), ids=OLDER_FILES)
def test_older_files_are_the_same_model(copy, name, tensors):
    assert_same_params(load_model(str(copy(name, tensors=tensors))), random_model(name))


def test_generation_ends_where_the_generation_config_says(copy):
    folder = copy("llama", lambda c: c | {"eos_token_id": 5})
    assert load_model(str(folder)).eos_ids == (0,)
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert load_model(str(folder)).eos_ids == (7, 9)
    (folder / "generation_config.json").unlink()
    assert load_model(str(folder)).eos_ids == (5,)


# Fewer layers.


def test_all_layers_are_the_model(model):
    kept = keep_layers(model, (0, 1, 2))
    assert_same_params(kept, model)
    assert kept.decoder == model.decoder
    assert from_hugging_face(kept.hf_config) == model.decoder.config


def test_a_shrunken_model_is_the_reference_without_those_layers(pair, tmp_path):
    import torch

    save_model(tmp_path, keep_layers(pair.model, (0, 2)))
    found = reference_logits(from_folder(tmp_path))
    blocks = next(x for x in pair.reference.modules() if isinstance(x, torch.nn.ModuleList))
    dropped, config = blocks[1], pair.reference.config
    del blocks[1]
    types = getattr(config, "layer_types", None)  # read by the place of a layer
    if types:
        config.layer_types = [types[0], types[2], types[1]]
    expected = reference_logits(pair.reference)
    blocks.insert(1, dropped)
    if types:
        config.layer_types = types
    np.testing.assert_array_equal(found, expected)


def test_a_shrunken_model_computes_what_its_export_computes(tmp_path):
    pytest.importorskip("torch", reason="the models of transformers need torch")
    shrunken = keep_layers(random_model("qwen2"), (2, 0))
    save_model(tmp_path, shrunken)
    expected = reference_logits(from_folder(tmp_path))
    np.testing.assert_allclose(logits(shrunken), expected, rtol=0, atol=1e-4)


def test_uniform_layers():
    assert uniform_layers(12, 6) == (0, 2, 4, 7, 9, 11)  # the layers of DistilGPT2
    assert uniform_layers(12, 12) == tuple(range(12))
    assert uniform_layers(24, 2) == (0, 23)
    assert uniform_layers(5, 1) == (0,)
    for kept in (0, 6):
        with pytest.raises(ModelError, match=f"{kept} of 5 layers: keep at least 1 and at most 5"):
            uniform_layers(5, kept)


@pytest.mark.parametrize("layers", [(), (0, 3), (-1,)])
def test_layers_that_are_not_there(layers):
    with pytest.raises(ModelError, match="gpt2 has the layers 0 to 2"):
        keep_layers(random_model("gpt2"), layers)


# What is refused.


def changed(changes: dict):
    """Puts in what `changes` says, and takes out what it has None for."""
    return lambda fields: {k: x for k, x in (fields | changes).items() if x is not None}


def test_config_reads_rope_of_both_transformers_versions():
    rope = Rope(10000.0, RopeScaling("llama3", 8.0, 1.0, 4.0, 32))
    flat = {**_LLAMA, "model_type": "llama", "rope_theta": 10000.0, "rope_scaling": _LLAMA3_ROPE}
    assert from_hugging_face(flat).kinds == (LayerKind(rope),)
    assert from_hugging_face(flat) == from_hugging_face(CONFIGS["llama"])
    linear = from_hugging_face(CONFIGS["llama_linear"]).kind(0).rope
    assert linear == Rope(500.0, RopeScaling("linear", 4.0, original_max_position=POSITIONS))


@pytest.mark.parametrize(
    "changes, window",
    [
        ({}, None),
        ({"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0}, 6),
        ({"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 3}, None),
        ({"use_sliding_window": True, "sliding_window": 6}, None),  # from layer 28 on
        ({"use_sliding_window": False, "sliding_window": 6, "max_window_layers": 0}, None),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 6,
                "layer_types": ["sliding_attention"] * 3,
            },
            6,
        ),
    ],
)
def test_qwen_windows_are_those_of_transformers(changes, window):
    import transformers

    config = {**_LLAMA, **changes}
    ours = from_hugging_face({**config, "model_type": "qwen2"})
    assert [kind.sliding_window for kind in ours.kinds] == [window]
    theirs = transformers.Qwen2Config(**config)
    windows = {theirs.sliding_window if "sliding" in x else None for x in theirs.layer_types}
    assert windows == {window}


def test_mistral_window_is_that_of_transformers():
    import transformers

    for config in (_LLAMA, {**_LLAMA, "sliding_window": None}, {**_LLAMA, "sliding_window": 9}):
        expected = transformers.MistralConfig(**config).sliding_window
        (kind,) = from_hugging_face({**config, "model_type": "mistral"}).kinds
        assert kind.sliding_window == expected


def test_fields_that_are_null_or_absent_are_as_transformers_has_them():
    gemma = CONFIGS["gemma2"] | {"hidden_activation": None, "query_pre_attn_scalar": None}
    found = from_hugging_face(gemma | {"attention_dropout": None, "attn_logit_softcapping": 30})
    assert (found.activation, found.attention_scale) == ("gelu_pytorch_tanh", 1 / 16)
    assert found.dropout == Dropout() and type(found.attention_soft_cap) is float
    mixtral = CONFIGS["mixtral"] | {"num_local_experts": None, "num_experts": 4}
    found = from_hugging_face(mixtral | {"num_experts_per_tok": None})
    assert found.experts == Experts(4, 2, norm_topk_prob=True)
    assert found.kind(0).rope == Rope(1e6)
    silent = {key: x for key, x in CONFIGS["gpt_oss"].items() if key != "rope_parameters"}
    rope = from_hugging_face(silent | {"swiglu_limit": None}).kind(0).rope
    assert (rope.theta, rope.scaling.kind, rope.scaling.factor) == (150000.0, "yarn", 32.0)
    assert not rope.scaling.truncate


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_export_has_the_number_of_experts_of_both_transformers_versions(saved, name):
    """Version 4 reads `num_experts` of a Qwen3 and `num_local_experts` of a Mixtral."""
    config = json.loads((saved(name) / "config.json").read_text())
    number = random_model(name).decoder.config.experts.num_experts
    assert config["num_experts"] == config["num_local_experts"] == number


REFUSED_CONFIGS = {  # of whom, the changed fields (None: removed), what is said
    "architecture": ("llama", {"model_type": "bert"}, "'bert' is not supported; .*: gpt2, opt, ll"),
    "no architecture": ("llama", {"model_type": None}, "model_type None"),
    "no width": ("llama", {"hidden_size": None}, "a llama config needs the field 'hidden_size'"),
    "no depth": ("gpt2", {"n_layer": None}, "a gpt2 config needs the field 'n_layer'"),
    "no inner width": ("opt", {"ffn_dim": None}, "needs the field 'ffn_dim'"),
    "rope": (
        "llama",
        {"rope_parameters": {"rope_type": "proportional"}, "rope_scaling": None},
        "rope_type 'proportional' is not supported; supported: default, linear, dynamic, llama3, ",
    ),
    "no rope factor": (
        "llama",
        {"rope_parameters": {"rope_type": "llama3"}, "rope_scaling": None},
        "needs the field 'factor'",
    ),
    "partial rope": (
        "llama",
        {"rope_parameters": {"partial_rotary_factor": 0.5}, "rope_scaling": None},
        "partial_rotary_factor other than 1",
    ),
    "two ropes": (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        "rope_parameters .* and rope_scaling .* contradict one another",
    ),
    "scaled attention": (
        "gpt2",
        {"scale_attn_by_inverse_layer_idx": True},
        "scale_attn_by_inverse_layer_idx = True",
    ),
    "another kind of layer": (
        "gemma2",
        {"layer_types": ["chunked_attention"] * 3},
        "layer_types has 'chunked_attention'; supported are full_attention and sliding_attention",
    ),
    "too few kinds": (
        "gpt_oss",
        {"layer_types": ["full_attention"]},
        "layer_types has 1 entries for 3 layers",
    ),
    "another kind of layer, where most have none": (
        "qwen2_mixed",
        {"layer_types": ["full_attention", "linear_attention", "full_attention"]},
        "layer_types has 'linear_attention'",
    ),
    "too many kinds": (
        "smollm3",
        {"layer_types": ["full_attention"] * 4},
        "layer_types has 4 entries for 3 layers",
    ),
    "too many experts of a token": (
        "olmoe",
        {"num_experts_per_tok": 7},
        "num_experts_per_tok = 7, but there are 6 experts",
    ),
    "bidirectional": ("gemma3", {"use_bidirectional_attention": True}, "attention = True is not"),
    "activation": ("llama", {"hidden_act": "gelu_fast"}, "'gelu_fast' is not supported.*: gelu,"),
}


@pytest.mark.parametrize("name, changes, message", REFUSED_CONFIGS.values(), ids=REFUSED_CONFIGS)
def test_configs_that_are_refused(copy, name, changes, message):
    folder = copy(name, config=changed(changes))
    with pytest.raises(ModelError, match=f"{folder}: config.*{message}"):
        load_model(str(folder))


REFUSED_TENSORS = {  # of whom, the changed shapes (None: removed), what is said
    "missing": (
        "llama",
        {"model.layers.1.mlp.up_proj.weight": None},
        "1 tensors are missing: model.layers.1.mlp.up_proj.weight",
    ),
    "missing head": ("llama", {"lm_head.weight": None}, "missing: lm_head.weight"),
    "missing embedding": (
        "llama",
        {"model.embed_tokens.weight": None},
        "tensor model.embed_tokens.weight is missing",
    ),
    "a layer too many": (
        "llama",
        {"model.layers.3.mlp.up_proj.weight": (80, 48)},
        "1 tensors belong to nothing in a llama of 3 layers: model.layers.3.mlp.up_proj.weight",
    ),
    "a bias too many": (
        "llama",
        {"model.layers.0.self_attn.q_proj.bias": (48,)},
        "belong to nothing.*q_proj.bias",
    ),
    "unknown": ("gpt2", {"h.0.attn.other": (2,)}, "nothing in a gpt2 of 3 layers: h.0.attn.other"),
    "too many key heads": (
        "llama",
        {"model.layers.2.self_attn.k_proj.weight": (48, 48)},
        r"tensor model.layers.2.self_attn.k_proj.weight has shape \(48, 48\); .* asks for "
        r"\(24, 48\) \(\(K H\) D with D=48, K=2, H=12\)",
    ),
    "too few positions": (
        "gpt2",
        {"wpe.weight": (32, 48)},
        r"tensor wpe.weight has shape \(32, 48\); .* asks for \(64, 48\)",
    ),
}


@pytest.mark.parametrize("name, shapes, message", REFUSED_TENSORS.values(), ids=REFUSED_TENSORS)
def test_tensors_that_are_refused(copy, name, shapes, message):
    zeros = {tensor: shape and np.zeros(shape, np.float32) for tensor, shape in shapes.items()}
    folder = copy(name, tensors=changed(zeros))
    with pytest.raises(ModelError, match=f"{folder}: .*{message}"):
        load_model(str(folder))


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_a_truncated_file(copy, size):
    folder = copy("llama")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ModelError, match=f"{file}: damaged or truncated"):
        load_model(str(folder))


def test_missing_files(copy, tmp_path, monkeypatch):
    folder = copy("llama")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="model.safetensors: no such file .*safetensors only"):
        load_model(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match="config.json: no such file"):
        load_model(str(folder))
    monkeypatch.setattr(export, "SHARD_BYTES", 40_000)
    save_model(tmp_path / "shards", random_model("llama"))
    shard = sorted((tmp_path / "shards").glob("model-*"))[1]
    shard.unlink()
    with pytest.raises(ModelError, match=f"{shard}: no such file"):
        load_model(str(tmp_path / "shards"))


def test_a_config_that_is_not_json(copy):
    folder = copy("llama")
    (folder / "config.json").write_text('{\n"model_type": llama}')
    with pytest.raises(ModelError, match="config.json:2: not JSON"):
        load_model(str(folder))


def test_paths_that_are_no_model(tmp_path, monkeypatch):
    with pytest.raises(ModelError, match="no such folder or file, and not a hub id"):
        load_model(str(tmp_path / "absent"))
    with pytest.raises(ModelError, match="no such folder or file, and not a hub id"):
        load_model("models/absent.gguf")
    file = tmp_path / "notes.txt"
    file.write_text("no model")
    with pytest.raises(ModelError, match="notes.txt"):
        load_model(str(file))
    with pytest.raises(ModelError, match="'no_such_package' is not installed"):
        load_model("package:no_such_package/model.gguf")
    with pytest.raises(ModelError, match="'promptkd_jax' has no file 'absent'"):
        load_model("package:promptkd_jax/absent")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="'no-owner/no-model': no such local folder, and the hub"):
        load_model("no-owner/no-model")


def test_products_of_few_rows_are_products():
    rng = np.random.default_rng(0)
    kernel, x = rng.normal(size=(3, 4, 5, 6)), rng.normal(size=(2, 1, 5, 6))
    kernel, x = kernel.astype(np.float32), x.astype(np.float32)
    found = jax.jit(product_of_few_rows, static_argnums=2)(kernel, x, 2)
    np.testing.assert_allclose(found, np.einsum("abij,rtij->rtab", kernel, x), rtol=1e-5)


def test_a_cpu_reads_the_kernels_of_a_rollout_as_left_operands():
    """XLA would turn the operands of a product round where its result is turned, and reads the
    kernel about half as fast then."""
    model = random_model("llama")
    params = model.decoder.for_sampling(model.params)
    prompts = jnp.ones((2, 3), jnp.int32)
    hidden, cache = model.decoder.prefill(params, prompts, jnp.array([3, 3]), None, 3, 2)

    def logits(params, cache):
        hidden, _ = model.decoder.decode(params, prompts[:, 0], None, jnp.array([3, 3]), cache)
        head = model.decoder.output_head(params)
        return LazyLogits(hidden, head).logits()

    text = jax.jit(logits).lower(params, cache).compile().as_text()
    config, layer = model.decoder.config, params["unstacked"][0]
    kernels = [x for x in jax.tree.leaves(layer) if x.ndim > 1]
    products = re.findall(r" = f32\[(\d+),2\]\S* dot\(", text)  # [outputs, rows]
    assert len(products) == len(kernels) * config.num_layers + 1
    assert str(config.vocab_size) in products


@pytest.mark.parametrize(("rows", "copies"), [(1, 8), (2, 1)])
def test_a_tpu_multiplies_a_single_row_in_its_matrix_units(rows, copies, monkeypatch, request):
    """XLA for TPUs has them compute a product of two rows, and not one of a single row."""
    model = random_model("llama")
    prompts, lengths = jnp.ones((rows, 3), jnp.int32), jnp.full(rows, 3)
    _, cache = model.decoder.prefill(model.params, prompts, lengths, None, 3, 2)

    def logits(params):
        hidden, _ = model.decoder.decode(params, prompts[:, 0], None, lengths, cache)
        return LazyLogits(hidden, model.decoder.output_head(params)).logits()

    expected = logits(model.params)
    for module in (projection, language_model):
        monkeypatch.setattr(module, "platform", lambda: "tpu")
    jax.clear_caches()  # a layer of decoding was traced for a CPU, and must be again
    request.addfinalizer(jax.clear_caches)
    traced = jax.jit(logits).trace(model.params)
    kernels = [x for x in jax.tree.leaves(model.params["layers"]) if x.ndim > 2]
    multiplied = []  # rows of each product with a kernel or the head
    for equation, _ in equations(traced.jaxpr):
        if equation.primitive.name == "dot_general":
            (summed, _), (batch, _) = equation.params["dimension_numbers"]
            if not batch:
                shape = equation.invars[0].aval.shape
                multiplied.append(math.prod(shape) // math.prod(shape[axis] for axis in summed))
    assert len(multiplied) > len(kernels)
    assert set(multiplied) == {rows * copies}
    np.testing.assert_allclose(traced.lower().compile()(model.params), expected, atol=1e-5)
