"""Low-rank adapters compute, learn and are stored as PEFT's."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from helpers.models import (
    TOKENS,
    assert_same_params,
    from_folder,
    logits,
    make_pair,
    random_model,
    reference_logits,
)

from promptkd_jax.infra.errors import ModelError
from promptkd_jax.models.config import LoRA
from promptkd_jax.models.decoder import Decoder
from promptkd_jax.models.io.export import save_model
from promptkd_jax.models.io.params import abstract_params, pad
from promptkd_jax.models.io.peft import load_lora, lora_modules, save_lora
from promptkd_jax.models.layers.lora import MODULES, init_adapter, join, keep_inputs, split
from promptkd_jax.models.load import load_model
from promptkd_jax.models.model import add_adapter


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def adapted(name: str, *targets: str, seed: int = 0, **more):
    """A random model with a random adapter of rank 3."""
    model = random_model(name)
    config = model.decoder.config
    lora = LoRA(3, 5.0, lora_modules(config, targets or ("all-linear",), "targets"), **more)
    rng = np.random.default_rng(seed)
    adapter = init_adapter(abstract_params(config), lora, jax.random.key(0))
    drawn = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), adapter)
    return add_adapter(model, lora, drawn)


def test_a_new_adapter_changes_nothing_and_starts_as_pefts_does():
    model = random_model("gpt2")
    lora = LoRA(4, 8.0, tuple(m for m in MODULES if m != "mlp/gate"))
    adapter = init_adapter(abstract_params(model.decoder.config), lora, jax.random.key(1))
    for path, x in flat(adapter).items():
        if path.endswith("lora_b"):
            assert not np.any(x), path
            continue
        bound = np.prod(x.shape[1:-1]) ** -0.5  # kaiming_uniform with a = sqrt(5)
        assert 0.9 * bound < np.abs(x).max() <= bound, path
        assert abs(float(x.mean())) < 0.1 * bound, path
    with_adapter = add_adapter(model, lora, adapter)
    np.testing.assert_array_equal(logits(with_adapter), logits(model))
    frozen, trained = split(with_adapter.params)
    assert flat(frozen).keys() == flat(model.params).keys()
    assert flat(trained).keys() == flat(adapter).keys()
    assert flat(join(frozen, trained)).keys() == flat(with_adapter.params).keys()


@pytest.mark.parametrize(("rslora", "scale"), [(False, 5 / 3), (True, 5 / 3**0.5)])
def test_the_change_is_that_of_the_formula(rslora, scale):
    model = adapted("llama", "q_proj", "o_proj", use_rslora=rslora)
    changed = flat(model.params)
    assert {path.rsplit("/", 1)[0] for path in changed if path.endswith("lora_a")} == {
        "layers/attention/query",
        "layers/attention/out",
    }
    for path in ("query", "out"):
        kernel, a, b = (
            changed.pop(f"layers/attention/{path}/{x}") for x in ("kernel", "lora_a", "lora_b")
        )
        whole = "ldr,lrnh->ldnh" if path == "query" else "lnhr,lrd->lnhd"
        changed[f"layers/attention/{path}/kernel"] = kernel + scale * np.einsum(whole, a, b)
    expected = random_model("llama").replace(params=traverse_util.unflatten_dict(changed, sep="/"))
    np.testing.assert_allclose(logits(model), logits(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma3", "phi3", "mixtral"])
def test_peft_computes_the_same_and_gives_the_adapter_back(name, tmp_path):
    """GPT-2 and Phi-3 store several of the maps as one."""
    peft = pytest.importorskip("peft", reason="the adapters are PEFT's")
    model = adapted(name, use_rslora=name in ("gpt2", "phi3"))
    model = model.replace(hf_config={**model.hf_config, "pad_token_id": 0})
    base = model.replace(decoder=random_model(name).decoder, params=split(model.params)[0])
    save_model(tmp_path / "base", base)
    save_lora(tmp_path / "adapter", model.replace(name=str(tmp_path / "base")))
    loaded = peft.PeftModel.from_pretrained(from_folder(tmp_path / "base"), tmp_path / "adapter")
    loaded = loaded.eval()
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["r"] == 3
    expected = logits(model)
    assert np.abs(expected - logits(base)).max() > 0.1
    np.testing.assert_allclose(reference_logits(loaded.base_model), expected, atol=1e-4)
    # What PEFT stores is read back as what it was.
    loaded.save_pretrained(tmp_path / "again")
    lora, adapter = load_lora(tmp_path / "again", base.decoder.config)
    assert lora == model.decoder.config.lora
    again = add_adapter(base, lora, adapter)
    assert_same_params(again, model)
    # And a folder has the change in its weights.
    save_model(tmp_path / "merged", model)
    np.testing.assert_allclose(logits(load_model(str(tmp_path / "merged"))), expected, atol=1e-4)


TARGETS = {  # of PEFT, by names of `transformers`
    "llama": ["q_proj", "down_proj"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "opt": ["k_proj", "out_proj", "fc1"],
    "gemma3": ["o_proj", "gate_proj"],
    "phi3": ["qkv_proj", "down_proj"],
}


@pytest.mark.parametrize("name", TARGETS)
def test_an_adapter_of_peft_computes_and_learns_the_same(name, tmp_path):
    """One A for query, key and value of GPT-2 becomes one for each, which start alike: its gradient
    is the sum of theirs."""
    peft = pytest.importorskip("peft", reason="the adapters are PEFT's")
    import torch
    from safetensors.numpy import load_file

    pair, rank = make_pair(name, tmp_path / "base"), 3
    how = {"r": rank, "lora_alpha": 5, "fan_in_fan_out": name == "gpt2"}
    how = peft.LoraConfig(target_modules=TARGETS[name], **how)
    made = peft.get_peft_model(pair.reference, how)
    generator = torch.Generator().manual_seed(0)
    for path, parameter in made.named_parameters():
        if "lora_" in path:
            parameter.data.normal_(0, 0.2, generator=generator)
    made.save_pretrained(tmp_path / "adapter")
    lora, adapter = load_lora(tmp_path / "adapter", pair.model.decoder.config)
    assert lora.rank == rank
    model = add_adapter(pair.model, lora, adapter)
    np.testing.assert_allclose(logits(model), reference_logits(made.base_model), atol=1e-4)
    tokens, labels = TOKENS[:, :-1], TOKENS[:, 1:]
    out = made.base_model(torch.tensor(tokens), use_cache=False).logits.flatten(0, 1)
    torch.nn.functional.cross_entropy(out, torch.tensor(labels).flatten().long()).backward()
    frozen, trained = split(model.params)

    def loss(trained):
        params = join(frozen, trained)
        hidden = model.decoder.hidden_states(params, tokens)
        every = jax.nn.log_softmax(hidden @ model.decoder.output_head(params).T)
        return -jnp.mean(jnp.take_along_axis(every, labels[..., None], -1))

    gradients = jax.jit(jax.grad(loss))(trained)
    save_lora(tmp_path / "gradients", model.replace(params=join(frozen, gradients)))
    found = load_file(tmp_path / "gradients/adapter_model.safetensors")
    expected = {
        path.replace(".default", ""): parameter.grad.numpy()
        for path, parameter in made.named_parameters()
        if "lora_" in path
    }
    assert found.keys() == expected.keys()
    for path, gradient in expected.items():
        # A [n r, in] and B [out, n r] of n maps that are stored as one.
        axis = 0 if "lora_A" in path else 1
        of_maps = np.stack(np.split(found[path], found[path].shape[axis] // rank, axis))
        np.testing.assert_allclose(of_maps.sum(0), gradient, rtol=1e-3, atol=1e-6, err_msg=path)


def test_an_adapter_is_merged_into_what_is_written_layer_by_layer(tmp_path, monkeypatch):
    model = adapted("gpt2")
    monkeypatch.setattr("promptkd_jax.models.io.export.PIECE_BYTES", 1)
    save_model(tmp_path, model)
    np.testing.assert_allclose(logits(load_model(str(tmp_path))), logits(model), atol=1e-4)


def test_padding_changes_no_number_of_a_new_adapter():
    """Of heads and units, which a mesh deals out."""
    model = random_model("gpt2")
    config = model.decoder.config.replace(tensor_parts=3)
    modules = lora_modules(config, ("all-linear",), "targets")
    lora = LoRA(3, 5.0, modules)
    adapter = init_adapter(abstract_params(model.decoder.config), lora, jax.random.key(0))
    padded = config.replace(lora=lora)
    whole = pad(join(model.params, adapter), padded)
    assert flat(whole)["layers/attention/out/lora_a"].shape[1] == 6
    found = model.replace(decoder=type(model.decoder)(padded), params=whole)
    expected = add_adapter(model, lora, adapter)
    tokens = model.decoder.config.vocab_size
    np.testing.assert_allclose(logits(found)[..., :tokens], logits(expected), atol=1e-5)


def test_dropout_of_the_input_has_its_rate_and_depends_on_row_column_and_module():
    keys = jax.random.split(jax.random.key(0), 4)
    kept = np.asarray(keep_inputs(keys, 0.25, (50, 8, 4), "out"))
    assert set(np.unique(kept)) == {0.0, np.float32(1 / 0.75)}
    assert abs((kept == 0).mean() - 0.25) < 0.02
    np.testing.assert_array_equal(kept[:, :20], keep_inputs(keys, 0.25, (20, 8, 4), "out"))
    np.testing.assert_array_equal(
        kept[:, :, :8], keep_inputs(keys, 0.25, (50, 12, 4), "out")[:, :, :8]
    )
    assert (kept != np.asarray(keep_inputs(keys, 0.25, (50, 8, 4), "query"))).any()
    assert (kept[0] != kept[1]).any()


def test_targets_that_name_nothing_are_refused():
    config = random_model("llama").decoder.config
    assert lora_modules(config, (r"[qv]_proj",), "targets") == (
        "attention/query",
        "attention/value",
    )
    assert lora_modules(config, ("mlp.down_proj",), "targets") == ("mlp/down",)
    with pytest.raises(ModelError, match="targets: '\\*_proj' is no pattern"):
        lora_modules(config, ("*_proj",), "targets")
    with pytest.raises(ModelError, match="'c_attn' is no linear map of a llama's layers; expected"):
        lora_modules(config, ("q_proj", "c_attn"), "config.student.lora.target_modules")


def test_an_untrained_adapter_of_a_fused_map_keeps_its_rank(tmp_path):
    """B is 0: it must not be taken for one that `save_lora` put together."""
    peft = pytest.importorskip("peft", reason="the adapters are PEFT's")
    pair = make_pair("gpt2", tmp_path / "base")
    how = peft.LoraConfig(r=12, target_modules=["c_attn", "mlp.c_fc"], fan_in_fan_out=True)
    peft.get_peft_model(pair.reference, how).save_pretrained(tmp_path / "adapter")
    lora, _ = load_lora(tmp_path / "adapter", pair.model.decoder.config)
    assert (lora.rank, lora.alpha) == (12, 8)


def test_adapters_that_are_not_alike_in_all_layers_are_refused(tmp_path):
    from safetensors.numpy import load_file, save_file

    model = adapted("llama", "q_proj", "v_proj")
    config = model.decoder.config.replace(lora=None)
    save_lora(tmp_path, model)
    file, settings = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors, said = load_file(file), json.loads(settings.read_text())

    def refused(match, change=lambda tensors: tensors, **fields):
        save_file(change(dict(tensors)), file)
        settings.write_text(json.dumps(said | fields))
        with pytest.raises(ModelError, match=match):
            load_lora(tmp_path, config)

    refused("init_lora_weights = 'pissa', which changes the base", init_lora_weights="pissa")
    refused("alora_invocation_tokens = .* cannot be merged", alora_invocation_tokens=[5])
    layer = "base_model.model.model.layers.1.self_attn.q_proj"
    refused(
        "q_proj has another rank in some layers",
        lambda x: (
            x
            | {
                f"{layer}.lora_{s}.weight": np.ones((2, 2), "f").repeat(24, 1 - "AB".index(s))
                for s in "AB"
            }
        ),
    )
    refused("modules differ .*rank 3.* merge it", alpha_pattern={"q_proj": 7})
    refused("of some layers, not of all", lambda x: {k: v for k, v in x.items() if layer not in k})
    refused(
        "expected .* it is for another model",
        lambda x: {k: v[:, :-1].copy() if "lora_A" in k else v for k, v in x.items()},
    )
    refused(
        "NaN or an infinity",
        lambda x: x | {f"{layer}.lora_A.weight": np.full((3, 48), np.nan, "f")},
    )
    refused("trains model.norm.weight whole", lambda x: x | {"model.norm.weight": np.ones(48, "f")})
    refused(
        "changes model.layers.0.x.y_proj, which this llama",
        lambda x: (
            x
            | {
                f"base_model.model.model.layers.0.x.y_proj.lora_{s}.weight": np.ones((3, 3), "f")
                for s in "AB"
            }
        ),
    )


def test_the_change_is_no_residual_of_a_backward_pass_that_keeps_products():
    """Of rank 3 it is made again of [B, T, 3]: what is kept grows by that for every map, not by a
    second [B, T, F]."""
    model = adapted("llama")
    config = model.decoder.config

    def kept(lora, params):
        decoder = Decoder(config.replace(remat="dots", lora=lora))

        def loss(x):
            return jnp.sum(decoder.hidden_states(params, TOKENS, prefix=x))

        prefix = jnp.ones((1, config.width))
        pullback = jax.eval_shape(lambda x: jax.vjp(loss, x)[1], prefix)
        return sum(x.size for x in jax.tree.leaves(pullback))

    without, with_it = kept(None, split(model.params)[0]), kept(config.lora, model.params)
    tokens, maps = TOKENS.shape[0] * (TOKENS.shape[1] + 1), 7 * config.num_layers
    adapter = sum(x.size for x in jax.tree.leaves(split(model.params)[1]))
    assert 0 < with_it - without <= 2 * tokens * maps * 3 + adapter
