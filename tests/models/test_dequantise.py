"""Weights in FP8 and MXFP4 stand for the same numbers as in `transformers`, and make a folder that
is read."""

import json
import pathlib
import tempfile

import jax
import ml_dtypes
import numpy as np
import pytest
from helpers.models import CONFIGS, random_model
from safetensors.numpy import load_file, save_file

from promptkd_jax.cli.main import main
from promptkd_jax.infra.errors import ModelError
from promptkd_jax.models.io import dequantise, export
from promptkd_jax.models.io.convert import convert
from promptkd_jax.models.io.dequantise import plain_tensors
from promptkd_jax.models.io.export import save_model, to_hugging_face
from promptkd_jax.models.io.safetensors import SafetensorsFolder
from promptkd_jax.models.load import load_model

torch = pytest.importorskip("torch", reason="files in FP8 are written by torch here")
safetensors_torch = pytest.importorskip("safetensors.torch")

NAME = "model.layers.1.mlp.up_proj.weight"  # [80, 48]
WHOLE_GROUPS = {"hidden_size": 64, "intermediate_size": 32, "rms_norm_eps": 1e-5}
FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
BLOCK = (32, 20)  # of which the last ones are cut: 80 = 2 * 32 + 16, 48 = 2 * 20 + 8


def fp8(x: np.ndarray, steps: tuple[int, int]):
    """A matrix in FP8 with a scale for each block, and what both stand for, in float64."""
    rows, columns = (np.arange(n) // step for n, step in zip(x.shape, steps))
    scale = np.zeros((rows[-1] + 1, columns[-1] + 1), np.float32)
    np.maximum.at(scale, (rows[:, None], columns[None]), np.abs(x) / 448)
    spread = scale[rows[:, None], columns[None]]
    stored = torch.tensor(x / spread).to(torch.float8_e4m3fn)
    return stored, scale, stored.to(torch.float64).numpy() * spread.astype(np.float64)


STEPS = {"tensor": (80, 48), "channel": (1, 48), "block": BLOCK}
METHODS = {  # a config's field, what the scale is called, and its shape
    "deepseek": ("block", "weight_scale_inv", lambda scale: scale, {"weight_block_size": BLOCK}),
    "neuralmagic": ("tensor", "weight_scale", lambda scale: scale.reshape(()), {}),
    "one": ("tensor", "weight_scale", lambda scale: scale.reshape(1), {}),
    "fbgemm_fp8": ("channel", "weight_scale", lambda scale: scale, {}),
    "flat": ("channel", "weight_scale", lambda scale: scale[:, 0], {}),
    "compressed-tensors": ("block", "weight_scale", lambda scale: scale, {}),
}
OF_ACTIVATIONS = ("mlp.up_proj.input_scale", "self_attn.k_scale")


@pytest.fixture
def folder(tmp_path):
    save_model(tmp_path / "model", random_model("llama"))
    return tmp_path / "model"


def quantise(folder, method: str, change=lambda tensors: None):
    """The folder in FP8, and its tensors as they should be read."""
    kind, name, shaped, fields = METHODS[method]
    tensors = load_file(folder / "model.safetensors")
    stored = {x: torch.tensor(array) for x, array in tensors.items()}
    expected = dict(tensors)
    array = tensors[NAME]
    stored[NAME], scale, expected[NAME] = fp8(array, STEPS[kind])
    stored[NAME.replace("weight", name)] = torch.tensor(shaped(scale))
    for of_activations in OF_ACTIVATIONS:
        stored[f"model.layers.1.{of_activations}"] = torch.tensor(0.5)
    change(stored)
    safetensors_torch.save_file(stored, folder / "model.safetensors")
    weights = {"type": "float", "num_bits": 8, "block_structure": list(BLOCK)}
    said = {"quant_method": method if "_" in method or "-" in method else "fp8", **fields}
    if method == "compressed-tensors":
        said |= {"format": "float-quantized", "config_groups": {"group_0": {"weights": weights}}}
    config = json.loads((folder / "config.json").read_text())
    config = config | {"torch_dtype": "bfloat16", "quantization_config": said}
    (folder / "config.json").write_text(json.dumps(config))
    return expected


@pytest.mark.parametrize("method", METHODS)
def test_fp8_is_the_product_with_its_scale(folder, tmp_path, method, monkeypatch):
    monkeypatch.setattr(dequantise, "PIECE_BYTES", 48 * 4 * 7)  # 7 rows: not those of a block
    expected = quantise(folder, method)
    with pytest.raises(ModelError, match="\n  promptkd convert --model") as error:
        load_model(str(folder))
    command = str(error.value).splitlines()[-1].split()
    main([*command[1:-1], str(tmp_path / "converted"), "--dtype=float32"])
    found = load_file(tmp_path / "converted" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array.astype(np.float32), err_msg=name)
    load_model(str(tmp_path / "converted"))
    convert(str(folder), tmp_path / "half")
    half = load_file(tmp_path / "half" / "model.safetensors")
    assert half[NAME].dtype == ml_dtypes.bfloat16 and half["model.norm.weight"].dtype == np.float32
    np.testing.assert_array_equal(half[NAME], expected[NAME].astype(np.float32).astype("bfloat16"))
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and not {"torch_dtype", "quantization_config"} & {*config}


def test_fp8_is_that_of_transformers():
    """Also with powers of two as bytes for scales, and for a stack of matrices."""
    fp8_of = pytest.importorskip("transformers.integrations.finegrained_fp8")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 64, 96, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.randint(100, 150, (3, 2, 3), generator=generator).to(torch.uint8)
    theirs = fp8_of.Fp8Dequantize(None)
    for scale in (scales, torch.exp2(scales.float() - 127)):
        ours = read({"experts": weight, "experts_scale_inv": scale})["experts"]
        expected = theirs._dequantize_one(weight, scale, torch.bfloat16).float().numpy()
        np.testing.assert_array_equal(ours.astype(np.float32), expected)


def read(tensors, dtype="bfloat16"):
    """Tensors of torch as they are read from a file."""
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        safetensors_torch.save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
        source = SafetensorsFolder(folder, scaled=True)
        return {x: t.read() for x, t in plain_tensors(source, (), dtype).items()}


def test_mxfp4_is_that_of_transformers():
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 6, 2, 16), generator=generator).to(torch.uint8)
    scales = torch.randint(90, 160, (3, 6, 2), generator=generator).to(torch.uint8)
    expected = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    bias = torch.zeros(3, 6, dtype=torch.bfloat16)
    found = read({"up_blocks": blocks, "up_scales": scales, "up_bias": bias})
    assert {name: x.shape for name, x in found.items()} == {"up": (3, 64, 6), "up_bias": (3, 6)}
    np.testing.assert_array_equal(found["up"].astype(np.float32), expected.float().numpy())
    with pytest.raises(ModelError, match=r"up_blocks \[3, 6, 2, 16\] .* are not MXFP4 of experts"):
        read({"up_blocks": blocks, "up_scales": scales[:2]})


def test_gpt_oss_in_mxfp4_is_the_model_of_its_plain_weights(tmp_path, monkeypatch):
    monkeypatch.setitem(CONFIGS, "mxfp4", CONFIGS["gpt_oss"] | WHOLE_GROUPS)
    save_model(tmp_path / "model", random_model("mxfp4"))
    file = tmp_path / "model" / "model.safetensors"
    tensors = {name: torch.tensor(x) for name, x in load_file(file).items()}
    generator, plain = torch.Generator().manual_seed(0), {}
    for name in [x for x in tensors if x.endswith("_proj") and ".experts." in x]:
        experts, width, out = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, out, width // 32, 16), generator=generator)
        scales = torch.randint(120, 127, (experts, out, width // 32), generator=generator)
        tensors[f"{name}_blocks"] = blocks.to(torch.uint8)
        tensors[f"{name}_scales"] = scales.to(torch.uint8)
        values = torch.tensor(FP4)[torch.stack([blocks % 16, blocks // 16], -1)].flatten(-2)
        values = values * 2.0 ** (scales[..., None] - 127)
        plain[name] = values.flatten(-2).transpose(1, 2).numpy()
    safetensors_torch.save_file(tensors, file)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert (
        convert(str(tmp_path / "model"), tmp_path / "converted") == "mxfp4, dequantised to bfloat16"
    )
    found = to_hugging_face(
        load_model(str(tmp_path / "converted")).params, random_model("mxfp4").decoder.config
    )
    assert len(plain) == 6
    for name, expected in plain.items():
        np.testing.assert_array_equal(found[name], expected, err_msg=name)


def test_files_are_of_the_usual_size_and_hold_one_after_the_other(folder, tmp_path, monkeypatch):
    expected = quantise(folder, "deepseek")
    monkeypatch.setattr(export, "SHARD_BYTES", 40_000)
    convert(str(folder), tmp_path / "converted", dtype="float32")
    shards = sorted((tmp_path / "converted").glob("model-*.safetensors"))
    assert len(shards) > 3 and max(x.stat().st_size for x in shards) < 45_000
    model = load_model(str(tmp_path / "converted"))
    assert {str(x.dtype) for x in jax.tree.leaves(model.params)} == {"float32"}
    index = json.loads((tmp_path / "converted/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == expected.keys()
    assert index["metadata"]["total_size"] == 4 * sum(x.size for x in expected.values())


def test_what_cannot_be_dequantised_is_named(folder, tmp_path):
    whole = load_file(folder / "model.safetensors")
    scale = NAME.replace("weight", "weight_scale_inv")

    def refused(change, message, **how):
        save_file(whole, folder / "model.safetensors")
        quantise(folder, "deepseek", change)
        with pytest.raises(ModelError, match=message):
            convert(str(folder), tmp_path / "converted", **how)

    refused(lambda x: x.pop(scale), f"tensor {NAME} is stored as F8_E4M3, without a scale")
    short = {scale: torch.ones(2, 3)}
    refused(lambda x: x.update(short), r"is \[2, 3\]; expected .*\[80, 48\] in blocks of 32 × 20")
    whole_number = {NAME.replace("weight", "weight_zero_point"): torch.zeros(80, dtype=torch.int8)}
    refused(lambda x: x.update(whole_number), "weight_zero_point is stored as I8")
    huge = {scale: torch.full((3, 3), 1e7)}
    large = f"{NAME} has a NaN, or a number that float16"
    refused(lambda x: x.update(huge), large, dtype="float16")
    (tmp_path / "plain").mkdir()
    save_model(tmp_path / "plain", random_model("llama"))
    with pytest.raises(ModelError, match="plain: has weights that are read as they are"):
        convert(str(tmp_path / "plain"), tmp_path / "converted")
