"""Kernels in 8 and 4 bits: what they hold, what is computed with them, and what it takes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from helpers.models import (
    CONFIGS,
    LENGTHS,
    PREFIX,
    TOKENS,
    assert_same_params,
    logits,
    random_model,
)
from jax.sharding import AbstractMesh

from promptkd_jax.infra.errors import ModelError
from promptkd_jax.infra.sharding import AXES
from promptkd_jax.models.config import LoRA, Quantization
from promptkd_jax.models.decoder import Decoder
from promptkd_jax.models.families.registry import from_hugging_face
from promptkd_jax.models.io import identity, params
from promptkd_jax.models.io.export import save_model, to_hugging_face
from promptkd_jax.models.io.params import abstract_params, load_params
from promptkd_jax.models.layers.lora import init_adapter
from promptkd_jax.models.layers.quantization import (
    QUANTIZE,
    dequantize_kernels,
    dequantize_params,
    quantize_kernels,
    quantize_params,
)
from promptkd_jax.models.load import load_model
from promptkd_jax.models.model import Model, add_adapter, keep_layers
from promptkd_jax.models.sampler import sample
from promptkd_jax.models.sampling_rules import Sampling

KINDS = ("int8", "int4")
HOW = (Quantization(8), Quantization(4), Quantization(4, 4), Quantization(8, 8))


def quantized(model: Model, kind: str) -> Model:
    how = QUANTIZE[kind]
    decoder = Decoder(model.decoder.config.replace(quantization=how))
    return model.replace(decoder=decoder, params=quantize_params(model.params, how))


def rounded(model: Model, kind: str) -> Model:
    """The plain model that computes what the quantised one does."""
    how = QUANTIZE[kind]
    kernels = dequantize_params(quantize_params(model.params, how), how, jnp.float32)
    return model.replace(params=kernels)


# Numbers and scales.


def by_numpy(kernel: np.ndarray, how: Quantization) -> np.ndarray:
    """The rounded kernel `[in, out]`, element by element."""
    most, found = 2 ** (how.bits - 1), np.empty_like(kernel)
    for first in range(0, len(kernel), how.group or len(kernel)):
        group = kernel[first : first + (how.group or len(kernel))]
        for out, column in enumerate(group.T):
            largest = max(column, key=abs)
            scale = np.float32(jnp.bfloat16(-largest / np.float32(most)))
            numbers = np.clip(np.round(column / scale), -most, most - 1) if scale else 0 * column
            found[first : first + len(group), out] = numbers * scale
    return found


@pytest.mark.parametrize("how", HOW, ids=str)
def test_rounds_to_the_nearest_number_of_each_group(how):
    """Also where the last group is short, and one has nothing but zeros."""
    kernel = np.random.default_rng(0).normal(size=(14, 6)).astype(np.float32)
    kernel[:4, 2] = 0
    kernel[:, 5] = 0
    values, scale = quantize_kernels(kernel, how)
    assert (values.dtype, scale.dtype) == (jnp.int8, jnp.bfloat16)
    assert values.nbytes == kernel.size * how.bits // 8
    assert scale.shape == (-(-14 // (how.group or 14)), 6)
    found = np.asarray(dequantize_kernels(values, scale, how, jnp.float32))
    np.testing.assert_array_equal(found, by_numpy(kernel, how))


@pytest.mark.parametrize("how", HOW, ids=str)
def test_axes_of_inputs_are_one_and_stacks_many(how):
    kernel = np.random.default_rng(0).normal(size=(2, 3, 4, 6, 5)).astype(np.float32)
    back = functools.partial(dequantize_kernels, how=how, dtype=jnp.float32, inputs=2, stacks=1)
    found = back(*quantize_kernels(kernel, how, inputs=2, stacks=1))
    for layer, array in enumerate(kernel):
        expected = by_numpy(array.reshape(12, 30), how).reshape(array.shape)
        np.testing.assert_array_equal(found[layer], expected)


def test_odd_inputs_are_no_pairs():
    with pytest.raises(ModelError, match=r"\(7, 4\) has an odd number of inputs.*'int8'"):
        quantize_kernels(np.ones((7, 4), np.float32), Quantization(4, 32))


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2", "opt_350m"])
def test_inputs_in_pairs_may_be_cut_by_a_mesh_that_divides_the_pairs(name):
    config = random_model(name).decoder.config.replace(quantization=QUANTIZE["int4"])
    params.check_pairs(config, "here")
    params.check_pairs(config.replace(tensor_parts=2), "here", AbstractMesh((1, 2, 2), AXES))


def test_a_model_with_odd_inputs_is_named_with_the_parameter(tmp_path):
    save_model(tmp_path, random_model("llama", intermediate_size=37))
    load_model(str(tmp_path), quantize="int8")
    said = f"{tmp_path}: quantize: 'int4' .* layers/mlp/down/kernel has 37, .* expected 'int8'"
    with pytest.raises(ModelError, match=said):
        load_model(str(tmp_path), quantize="int4")


# What is computed.


CASES = [(name, "int8") for name in CONFIGS]
CASES += [(name, "int4") for name in ("gpt2", "opt_350m", "llama_tied", "gpt_oss")]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_every_family_computes_with_its_rounded_kernels(name, kind):
    model = random_model(name)
    found, expected = quantized(model, kind), logits(rounded(model, kind))
    shapes = abstract_params(found.decoder.config)
    assert jax.tree.map(jnp.shape, found.params) == jax.tree.map(jnp.shape, shapes)
    np.testing.assert_allclose(logits(found), expected, atol=2e-4)
    error = np.abs(expected - logits(model)).mean() / np.abs(logits(model)).mean()
    assert error < (0.1 if kind == "int8" else 0.8)


@pytest.mark.parametrize("name", ["llama_tied", "mixtral"])
def test_the_gradient_of_a_soft_prompt_is_that_of_the_rounded_model(name):
    model = random_model(name)

    def gradient(model):
        def loss(prefix, params):
            return jnp.sum(jnp.sin(model.decoder.hidden_states(params, TOKENS, prefix)))

        return jax.jit(jax.grad(loss))(PREFIX, model.params)

    for kind in KINDS:
        expected = gradient(rounded(model, kind))
        np.testing.assert_allclose(gradient(quantized(model, kind)), expected, atol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_as_the_rounded_model(kind):
    model = random_model("llama")

    @functools.partial(jax.jit, static_argnums=0)
    def written(decoder, params):
        keys, greedy = jax.random.split(jax.random.key(0), 3), Sampling(temperature=0.0)
        how = dict(max_new_tokens=6, sampling=greedy)
        return sample(decoder, params, TOKENS[:, :12], LENGTHS, keys, **how).tokens

    found, expected = quantized(model, kind), rounded(model, kind)
    found = written(found.decoder, found.params)
    np.testing.assert_array_equal(found, written(expected.decoder, expected.params))


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_changes_a_quantised_model_as_it_does_the_rounded_one(kind):
    lora = LoRA(2, 4.0, ("attention/query", "attention/out", "mlp/down"))
    model = random_model("llama")
    adapter = init_adapter(model.params, lora, jax.random.key(0))
    adapter = jax.tree.map(lambda x: x + 0.1, adapter)
    found = add_adapter(quantized(model, kind), lora, adapter)
    expected = add_adapter(rounded(model, kind), lora, adapter)
    shapes = abstract_params(found.decoder.config)
    assert jax.tree.map(jnp.shape, found.params) == jax.tree.map(jnp.shape, shapes)
    np.testing.assert_allclose(logits(found), logits(expected), atol=2e-4)
    # An export has the adapter merged into plain kernels.
    written, plain = (to_hugging_face(x.params, x.decoder.config) for x in (found, expected))
    assert written.keys() == plain.keys()
    for name, array in plain.items():
        np.testing.assert_array_equal(written[name], array, err_msg=name)


# What it takes.

DEEP = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 256,
    "num_hidden_layers": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
    "max_position_embeddings": 32,
}
EXPERTS = DEEP | {
    "model_type": "mixtral",
    "intermediate_size": 128,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hf_config", [DEEP, EXPERTS], ids=["llama", "mixtral"])
def test_no_copy_of_all_kernels_is_made(hf_config, kind):
    """Neither in a forward pass, nor for a gradient, nor for the loop that writes tokens."""
    config = from_hugging_face(hf_config).replace(dtype="bfloat16", param_dtype="bfloat16")
    decoder = Decoder(config.replace(quantization=QUANTIZE[kind]))
    shapes = abstract_params(decoder.config)
    plain = traverse_util.flatten_dict(abstract_params(config)["layers"], sep="/")
    copy = sum(2 * x.size for path, x in plain.items() if path.endswith("kernel"))
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    prefix = jax.ShapeDtypeStruct((2, 256), jnp.float32)

    def forward(params, tokens, prefix):
        return decoder.hidden_states(params, tokens, prefix)

    def gradient(params, tokens, prefix):
        return jax.grad(lambda x: jnp.sum(forward(params, tokens, x).astype(jnp.float32)))(prefix)

    def writes(params, tokens, prefix):
        keys = jax.random.split(jax.random.key(0), 1)
        how = dict(max_new_tokens=4, prefix=prefix)
        return sample(decoder, params, tokens, jnp.array([4]), keys, **how).tokens

    for function in (forward, gradient, writes):
        compiled = jax.jit(function).lower(shapes, tokens, prefix).compile()
        temporary = compiled.memory_analysis().temp_size_in_bytes
        assert temporary < copy / 2, (function.__name__, temporary, copy)


# Where it is read.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["gpt2", "opt_350m", "mixtral"])
def test_a_folder_is_read_layer_by_layer(name, kind, tmp_path, monkeypatch):
    model = random_model(name)
    save_model(tmp_path, model)
    read = []

    def watched(kernel, how, **axes):
        read.append(kernel.shape)
        return quantize_kernels(kernel, how, **axes)

    monkeypatch.setattr(params, "_quantize", watched)
    found = load_model(str(tmp_path), quantize=kind)
    assert_same_params(found, quantized(model, kind))
    layers = model.decoder.config.num_layers
    kernels = traverse_util.flatten_dict(model.params["layers"], sep="/")
    kernels = [x for path, x in kernels.items() if path.endswith("kernel") and "router" not in path]
    assert sum(map(np.prod, read)) >= sum(x.size for x in kernels)
    assert max(map(np.prod, read)) <= max(x.size for x in kernels) / layers


def test_tensors_of_a_gguf_file_are_read_as_those_of_a_folder(tmp_path):
    pytest.importorskip("gguf")
    from helpers.gguf_files import SIZES, gguf_tensors, metadata, weights, write

    from promptkd_jax.models.io.gguf import open_gguf

    file = write(tmp_path / "m.gguf", metadata(SIZES), gguf_tensors(weights(SIZES), SIZES, "Q8_0"))
    source, how = open_gguf(file), QUANTIZE["int4"]
    config = from_hugging_face(source.config)
    found = load_params(source, config.replace(quantization=how))
    expected = quantize_params(load_params(source, config), how)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_layers_are_kept_with_their_scales():
    model = quantized(random_model("llama"), "int4")
    kept = keep_layers(model, (2, 0)).params["layers"]
    for path, x in traverse_util.flatten_dict(model.params["layers"]).items():
        np.testing.assert_array_equal(traverse_util.flatten_dict(kept)[path], x[np.array([2, 0])])


def test_another_quantisation_is_another_teacher():
    name = "synthetic:llama-D32-L1"
    found = [identity.model_identity(load_model(name, quantize=kind)) for kind in QUANTIZE]
    assert len(set(map(str, found))) == 3
    assert found[0] == identity.teacher_identity(name, "float32", "float32")
