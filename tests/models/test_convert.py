"""What is converted is the model: by torch's files, and by PEFT's adapters as PEFT merges them."""

import json
import shutil

import numpy as np
import pytest
from helpers.models import (
    TOKENS,
    assert_same_params,
    from_folder,
    logits,
    make_pair,
    random_model,
    reference_logits,
)
from safetensors.numpy import load_file, save_file

from promptkd_jax.cli.main import main
from promptkd_jax.infra.errors import ModelError
from promptkd_jax.models.io.convert import convert
from promptkd_jax.models.io.export import save_model
from promptkd_jax.models.io.safetensors import read_json
from promptkd_jax.models.load import load_model

torch = pytest.importorskip("torch", reason="files of torch are read by torch")


@pytest.fixture
def folder(tmp_path):
    """The folder of a random Llama, and its tensors as torch has them."""
    save_model(tmp_path / "model", random_model("llama"))
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "model.safetensors").unlink()
    return tmp_path / "model", {name: torch.tensor(x) for name, x in tensors.items()}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_file_of_torch_is_the_same_model(folder, tmp_path, zipped, capsys):
    path, tensors = folder
    torch.save(tensors, path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ModelError) as error:
        load_model(str(path))
    command = next(x for x in str(error.value).splitlines() if "promptkd convert" in x).split()
    assert command == ["promptkd", "convert", "--model", str(path), "--output", "converted"]
    main([*command[1:-1], str(tmp_path / "converted")])
    assert "converted: pytorch_model.bin" in capsys.readouterr().out
    assert_same_params(load_model(str(tmp_path / "converted")), random_model("llama"))
    with pytest.raises(SystemExit, match="holds a model already .*new or empty"):
        main([*command[1:-1], str(tmp_path / "converted")])


def test_shards_and_half_precision_stay(folder, tmp_path):
    path, tensors = folder
    names = list(tensors)
    where = {}
    for number, some in enumerate((names[:5], names[5:]), start=1):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({name: tensors[name].to(torch.bfloat16) for name in some}, path / file)
        where |= dict.fromkeys(some, file)
    index = {"metadata": {}, "weight_map": where}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    convert(str(path), tmp_path / "converted")
    found = sorted(file.name for file in (tmp_path / "converted").glob("*model*"))
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    assert found == [*shards, "model.safetensors.index.json"]
    stored = load_file(tmp_path / "converted" / shards[0])
    assert {str(x.dtype) for x in stored.values()} == {"bfloat16"}
    ours = load_model(str(tmp_path / "converted"))
    close = random_model("llama")
    np.testing.assert_allclose(logits(ours), logits(close), rtol=0, atol=0.5)


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('it ran')",))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (Evil(), "torch's loader of weights alone refuses it"),
        ({"a": Evil()}, "torch's loader of weights alone refuses it"),
        ([1, 2], "holds something else than tensors"),
        ({"a": 1}, "holds something else than tensors"),
        ({"a": torch.zeros(2, dtype=torch.float8_e4m3fn)}, "weights in torch.float8_e4m3fn"),
        (b"\x80\x02}", "refuses it"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    ],
)
def test_what_is_no_weights_is_refused_and_never_run(folder, tmp_path, content, words):
    path, _ = folder
    file = path / "pytorch_model.bin"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    with pytest.raises(ModelError, match=words):
        convert(str(path), tmp_path / "converted")


def test_what_there_is_to_convert_is_said(folder, tmp_path, monkeypatch):
    path, tensors = folder
    with pytest.raises(ModelError, match=r"pytorch_model\.bin: no such file"):
        convert(str(path), tmp_path / "converted")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="empty: nothing to convert; expected a model's config"):
        convert(str(tmp_path / "empty"), tmp_path / "converted")
    with pytest.raises(ModelError, match="is a file; expected the folder of a model"):
        convert(str(path / "config.json"), tmp_path / "converted")
    with pytest.raises(ModelError, match="is no adapter .*which --base is for"):
        convert(str(path), tmp_path / "converted", base="x")
    save_model(tmp_path / "whole", random_model("llama"))
    with pytest.raises(ModelError, match="has weights that are read as they are: give it itself"):
        convert(str(tmp_path / "whole"), tmp_path / "converted")
    torch.save(tensors, path / "pytorch_model.bin")
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(ModelError, match="torch is needed to read it: pip install torch"):
        convert(str(path), tmp_path / "converted")


# Adapters

peft = pytest.importorskip("peft", reason="the adapters are PEFT's")


def adapter(pair, folder, **how):
    """A random adapter of PEFT's, and the model that PEFT merges it into."""
    made = peft.get_peft_model(pair.reference, peft.LoraConfig(r=3, lora_alpha=5, **how))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in made.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data.normal_(0, 0.2, generator=generator)
    made.save_pretrained(folder)
    config = folder / "adapter_config.json"
    named = json.loads(config.read_text()) | {"base_model_name_or_path": str(pair.folder)}
    config.write_text(json.dumps(named))
    return made.merge_and_unload()


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("llama", {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}),
        (
            "llama",
            {
                "target_modules": "all-linear",
                "rank_pattern": {"q_proj": 2},
                "alpha_pattern": {"layers.1.self_attn.q_proj": 9},
                "modules_to_save": ["lm_head"],
            },
        ),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    ],
)
def test_an_adapter_is_merged_as_peft_merges_it(tmp_path, name, how):
    pair = make_pair(name, tmp_path / "base")
    before = reference_logits(pair.reference)
    merged = adapter(pair, tmp_path / "adapter", **how)
    expected = reference_logits(merged)
    assert np.abs(expected - before).max() > 0.1
    with pytest.raises(ModelError, match="promptkd convert --model"):
        load_model(str(tmp_path / "adapter"))
    said = convert(str(tmp_path / "adapter"), tmp_path / "merged")
    assert said == f"a LoRA adapter of {pair.folder}, merged"
    np.testing.assert_allclose(logits(load_model(str(tmp_path / "merged"))), expected, atol=1e-4)
    found = reference_logits(from_folder(tmp_path / "merged"), TOKENS)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    shutil.move(pair.folder, tmp_path / "moved")
    convert(str(tmp_path / "adapter"), tmp_path / "again", base=str(tmp_path / "moved"))
    assert_same_params(load_model(str(tmp_path / "again")), load_model(str(tmp_path / "merged")))


def test_an_adapter_that_cannot_be_merged_is_refused(tmp_path):
    pair = make_pair("llama", tmp_path / "base")
    adapter(pair, tmp_path / "adapter", target_modules=["q_proj"])
    file = tmp_path / "adapter" / "adapter_config.json"
    config, weights = json.loads(file.read_text()), tmp_path / "adapter/adapter_model.safetensors"
    tensors = load_file(weights)

    def refused(changes, tensors, words):
        file.write_text(json.dumps(config | changes))
        save_file(tensors, weights)
        with pytest.raises(ModelError, match=words):
            convert(str(tmp_path / "adapter"), tmp_path / "merged")

    refused({"use_dora": True}, tensors, "use_dora = True cannot be merged")
    refused({"bias": "all"}, tensors, "bias = 'all' cannot be merged")
    refused({"peft_type": "IA3"}, tensors, r"\(IA3\), of which only LORA")
    refused({"peft_type": "PROMPT_TUNING"}, tensors, "cannot be merged .*load_soft_prompt reads it")
    quantised = {**read_json(pair.folder / "config.json"), "quantization_config": "bitsandbytes"}
    (tmp_path / "bnb").mkdir()
    (tmp_path / "bnb" / "config.json").write_text(json.dumps(quantised))
    named = {"base_model_name_or_path": str(tmp_path / "bnb")}
    refused(named, tensors, r"quantised \(bitsandbytes\).*another base model .* by --base")
    refused({"base_model_name_or_path": None}, tensors, "names no base model; give it by --base")
    first = next(iter(tensors))
    other = {name: x for name, x in tensors.items() if name != first}
    refused({}, other, "has lora_A or lora_B, and not the other")
    elsewhere = {name.replace("layers.0", "layers.7"): x for name, x in tensors.items()}
    refused({}, elsewhere, "changes model.layers.7.self_attn.q_proj.weight, which .* not have")
    refused({}, tensors | {"a.lora_embedding_A": tensors[first]}, "lora_embedding_A cannot be")
    short = {name: x[:5] if "lora_B" in name else x for name, x in tensors.items()}
    refused({}, short, r"is \[5, 48\], in the base model \[48, 48\]")
    weights.unlink()
    with pytest.raises(ModelError, match="has none of adapter_model.safetensors"):
        convert(str(tmp_path / "adapter"), tmp_path / "merged")
