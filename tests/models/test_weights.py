"""Nothing in a model's folder is trusted that would change what it computes without a word."""

import json
import pathlib
import re
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from helpers import tiny
from helpers.models import assert_same_params, from_folder, logits, random_model, reference_logits
from safetensors.numpy import load_file, save_file

from promptkd_jax.cli.main import main
from promptkd_jax.infra import sharding
from promptkd_jax.infra.errors import ModelError
from promptkd_jax.infra.files import to_path
from promptkd_jax.models.families.base import HEAD
from promptkd_jax.models.families.registry import from_hugging_face
from promptkd_jax.models.io import export, params
from promptkd_jax.models.io.convert import convert
from promptkd_jax.models.io.export import save_model, save_without_weights
from promptkd_jax.models.io.params import all_finite
from promptkd_jax.models.io.safetensors import SafetensorsFolder, has_weights, read_card
from promptkd_jax.models.load import load_model, load_with_tokenizer, load_without_weights
from promptkd_jax.models.model import keep_layers
from promptkd_jax.training import prepare
from promptkd_jax.training.config.checks import checked
from promptkd_jax.training.config.config_file import as_json

UP = "model.layers.1.mlp.up_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 3090000\n"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    """A random tied Llama with its tokenizer."""
    return tmp_path / tiny.write_model(tmp_path / "model", width=16, depth=2, seed=0)


def write(folder, file: str = "config.json", **fields):
    """The folder with some fields of one of its JSON files set."""
    file = folder / file
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | fields))
    return folder


def store(folder, change):
    """The folder with its tensors as `change` leaves them."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def refused(folder, message: str, **how) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(str(folder), **how)


@pytest.fixture
def shards(folder, monkeypatch):
    """The same in several files with their index."""
    monkeypatch.setattr(export, "SHARD_BYTES", 6000)
    save_model(folder, load_with_tokenizer(str(folder), dtype="float32"))
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


# A head beside the embedding that a config ties it to.


@pytest.mark.parametrize(
    ("name", "embedding"),
    [
        ("gpt2", "wte.weight"),
        ("opt", "model.decoder.embed_tokens.weight"),
        ("llama_tied", EMBEDDING),
    ],
)
def test_a_head_of_its_own_is_used_as_by_transformers(name, embedding, tmp_path, capsys):
    pytest.importorskip("torch", reason="the models of transformers need torch")
    save_model(tmp_path, random_model(name))

    def add_head(tensors):
        noise = np.random.default_rng(5).normal(0, 0.5, tensors[embedding].shape)
        tensors[HEAD] = tensors[embedding] + noise.astype(np.float32)

    store(tmp_path, add_head)
    with jax.default_matmul_precision("highest"):
        model = load_model(str(tmp_path))
        expected = reference_logits(from_folder(tmp_path))
        np.testing.assert_allclose(logits(model), expected, rtol=0, atol=1e-4)
        assert np.abs(logits(random_model(name)) - expected).max() > 0.5, "the head is unseen"
    assert (
        "ties the head to the embedding, but lm_head.weight is another" in capsys.readouterr().err
    )
    save_model(tmp_path / "again", model)
    assert json.loads((tmp_path / "again/config.json").read_text())["tie_word_embeddings"] is False
    assert_same_params(load_model(str(tmp_path / "again")), model)


def test_a_head_that_differs_in_its_last_element_alone(folder, monkeypatch):
    def add_head(tensors):
        tensors[HEAD] = tensors[EMBEDDING].copy()

    assert load_model(str(store(folder, add_head))).decoder.config.tied
    monkeypatch.setattr(params, "PIECE_BYTES", 1000)  # in many pieces
    assert load_model(str(folder)).decoder.config.tied

    def change(tensors):
        tensors[HEAD][-1, -1] += 1

    assert not load_model(str(store(folder, change))).decoder.config.tied


def test_a_head_of_another_shape_is_refused(folder):
    def add_head(tensors):
        tensors[HEAD] = tensors[EMBEDDING][:-1].copy()

    refused(store(folder, add_head), "tensor lm_head.weight has shape .* the config asks for")


# Elements that are not numbers.


def test_tensors_are_read_where_they_lie(tmp_path):
    """Of every dtype, of no dimension or no element, at places that are no multiple of a size, and
    from the file that was opened, though another has taken its name."""
    draw = np.random.default_rng(0).normal
    tensors = {
        "bytes": np.arange(3, dtype=np.uint8),
        "half": draw(size=(3, 4)).astype(ml_dtypes.bfloat16),
        "scalar": np.float64(0.5).reshape(()),
        "none": np.zeros((0, 2), np.float32),
        "yes": np.array([True, False]),
        "long": np.array([[-(2**40)]]),
    }
    kinds = {"uint8": "U8", "bfloat16": "BF16", "float64": "F64", "float32": "F32", "bool": "BOOL"}
    header, end = {}, 0
    for name, x in tensors.items():
        kind = kinds.get(x.dtype.name, "I64")
        offsets = end, end + x.nbytes
        header[name] = {"dtype": kind, "shape": x.shape, "data_offsets": offsets}
        end += x.nbytes
    header = json.dumps(header).encode()
    content = b"".join(x.tobytes() for x in tensors.values())
    (tmp_path / "config.json").write_text("{}")
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + content)
    source = SafetensorsFolder(tmp_path, scaled=True)
    (tmp_path / "other").write_bytes(b"")
    (tmp_path / "other").replace(file)
    assert set(source.names()) == set(tensors)
    for name, expected in tensors.items():
        found = source.read(name)
        assert found.dtype == expected.dtype and not found.flags.writeable
        np.testing.assert_array_equal(found, expected)
    index = slice(1, 3), slice(0, 2)
    np.testing.assert_array_equal(source.read("half", index), tensors["half"][index])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_bits_tell_what_is_finite(dtype):
    bits = np.random.default_rng(0).integers(0, 2**16, 5000).astype(np.uint16)
    x = bits.view(dtype) if dtype != "float32" else (bits.astype(np.uint32) << 16).view(dtype)
    with np.errstate(invalid="ignore"):
        finite = np.isfinite(x)
    assert 0 < finite.sum() < len(x)
    assert [all_finite(x[i : i + 1]) for i in range(len(x))] == finite.tolist()
    assert not all_finite(x) and all_finite(x[finite])
    largest = ml_dtypes.finfo(dtype).max
    assert all_finite(np.array([[largest, -largest], [-0.0, 0.0]], dtype))
    assert all_finite(np.zeros((0, 3), dtype))


def test_the_last_of_many_elements_is_looked_at():
    x = np.zeros(params._CHECKED + 1, np.float32)
    assert all_finite(x)
    x[-1] = -np.inf
    assert not all_finite(x)


@pytest.mark.parametrize("name", [EMBEDDING, UP, "model.norm.weight"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tensor_that_is_not_finite_is_named(folder, name, value, dtype):
    def spoil(tensors):
        tensors[name] = tensors[name].astype(dtype)
        tensors[name].reshape(-1)[-1] = value

    refused(store(folder, spoil), f"{folder}: tensor {name} is not finite")
    refused(folder, f"tensor {name} is not finite", param_dtype="bfloat16")


def test_a_tensor_that_is_not_finite_is_named_wherever_it_is_read_from(shards, monkeypatch):
    """From shards, onto a mesh, piece by piece."""
    file = json.loads((shards / INDEX).read_text())["weight_map"][UP]
    tensors = load_file(shards / file)
    tensors[UP][3, 5] = np.nan
    save_file(tensors, shards / file)
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1})
    monkeypatch.setattr(params, "PIECE_BYTES", 100)
    refused(shards, UP, mesh=mesh)


def test_a_number_that_the_parameters_cannot_hold_is_named(folder):
    def spoil(tensors):
        tensors[UP] = tensors[UP].astype(np.float64)
        tensors[UP][0, 0] = 1e300

    with np.errstate(over="ignore"):
        refused(store(folder, spoil), rf"{UP} is not finite.*\(read as float32\)")


def test_a_fused_tensor_of_gpt2_is_named(tmp_path):
    save_model(tmp_path, random_model("gpt2"))

    def spoil(tensors):
        tensors["h.2.attn.c_attn.bias"][-1] = np.nan  # the last of the values

    refused(store(tmp_path, spoil), "h.2.attn.c_attn.bias is not finite")


@pytest.mark.parametrize("command", ["generate", "evaluate", "train", "cache", "init"])
def test_every_command_ends_with_the_name_of_the_tensor(command, tmp_path):
    config = tiny.short_config(tmp_path / "files")
    bad = config.teacher.path
    store(tmp_path / bad, lambda tensors: tensors[UP].fill(np.inf))
    file, out = tmp_path / "config.json", str(tmp_path / "out")
    file.write_text(json.dumps({"config": as_json(config)}))
    arguments = {
        "generate": ("--model", bad, "--template=plain", "--request=say red"),
        "evaluate": ("--model", bad, "--data", config.data.dev, "--output", out),
        "train": ("--config", str(file), "--workdir", out),
        "cache": ("--config", str(file), "--output", out),
        "init": ("--teacher", bad, "--layers=2", "--output", out),
    }
    with pytest.raises(SystemExit, match=f"promptkd {command}: .*{UP} is not finite"):
        main([command, *arguments[command]])


# Weights that are no plain ones.


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "bool", "float8_e4m3fn"])
@pytest.mark.parametrize("name", [UP, HEAD])
def test_weights_stored_as_something_else_are_refused(folder, dtype, name):
    def quantise(tensors):
        tensors[name] = np.clip(100 * tensors.get(name, tensors[EMBEDDING]), -100, 100)
        tensors[name] = tensors[name].astype(dtype)

    refused(store(folder, quantise), f"tensor {name} is stored as .*; a weight is read as F64, F32")


_CT = {"quant_method": "compressed-tensors"}
QUANTISED_CONFIGS = {  # the name in messages, and a config's field
    "gptq, 4 bits": {"quant_method": "gptq", "bits": 4},
    "awq, 4 bits": {"quant_method": "awq", "bits": 4},
    "hqq": {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4}}},
    "aqlm": {"quant_method": "aqlm"},
    "torchao": {"quant_method": "torchao"},
    "modelopt NVFP4": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    "bitsandbytes, 4 bits": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "bitsandbytes, 8 bits": {"load_in_4bit": False, "load_in_8bit": True},
    "compressed-tensors pack-quantized int of 4 bits": {
        **_CT,
        "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": {"type": "int", "num_bits": 4}}},
    },
}


@pytest.mark.parametrize("kind", QUANTISED_CONFIGS)
def test_a_quantised_config_is_named(folder, kind):
    write(folder, quantization_config=QUANTISED_CONFIGS[kind])
    refused(folder, rf"quantised \({kind}\).*take the model that these were made from")
    with pytest.raises(ModelError, match=rf"quantised \({kind}\).*take the model that these were"):
        convert(str(folder), folder.parent / "converted")
    write(folder, quantization_config=None, quantization={"group_size": 64, "mode": "affine"})
    refused(folder, r"quantised \(affine\)")  # MLX


@pytest.mark.parametrize("method", ["fp8", "fbgemm_fp8", "mxfp4", "compressed-tensors", "modelopt"])
def test_what_convert_dequantises_is_named_with_the_command(folder, method):
    weights = {"weights": {"type": "float", "num_bits": 8}}
    said = {"quant_method": method, "quant_algo": "FP8", "config_groups": {"group_0": weights}}
    write(folder, quantization_config=said)
    refused(folder, rf"quantised \({method}.*\n  promptkd convert --model {folder} --output conv")


@pytest.mark.parametrize("said", [None, {"load_in_4bit": False, "load_in_8bit": False}])
def test_a_config_that_says_that_nothing_is_quantised(folder, said):
    expected = load_model(str(folder))
    assert_same_params(load_model(str(write(folder, quantization_config=said))), expected)


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [
        ("qweight", "GPTQ or AWQ"),
        ("g_idx", "GPTQ or AWQ"),
        ("weight_scale_inv", "FP8.*\n  promptkd convert --model"),
        ("weight_packed", "compressed-tensors"),
        ("weight.absmax", "bitsandbytes"),
        ("weight.quant_state.bitsandbytes__nf4", "bitsandbytes"),
        ("SCB", "bitsandbytes"),
        ("scales", "MLX"),
        ("lora_A.weight", "PEFT adapter"),
    ],
)
def test_tensors_of_other_kinds_are_named(folder, suffix, kind):
    """Where the config says nothing: older files of GPTQ keep it in one of their own."""
    name = f"model.layers.0.mlp.up_proj.{suffix}"

    def add(tensors):
        tensors[name] = tensors.pop(UP.replace("1", "0"))

    refused(store(folder, add), f"{re.escape(name)}: the weights are .*{kind}")


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [
        ("LORA", r"merge it into its base model \(some/base\).*promptkd convert --model"),
        ("PROMPT_TUNING", "a soft prompt for some/base: .*load_soft_prompt reads it"),
    ],
)
@pytest.mark.parametrize("merged", [True, False], ids=["beside a model", "alone"])
def test_an_adapter_is_no_model(folder, kind, remedy, merged):
    write(folder, "adapter_config.json", peft_type=kind, base_model_name_or_path="some/base")
    if not merged:
        (folder / "config.json").unlink()
    refused(folder, rf"is a PEFT adapter \({kind}\), not a model; .*{remedy}")


@pytest.mark.parametrize(
    "file", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "tf_model.h5"]
)
def test_weights_of_other_programs_are_named_with_a_way_to_convert_them(folder, file):
    (folder / "model.safetensors").rename(folder / file)
    (folder / "training_args.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="model.safetensors: no such file") as error:
        load_model(str(folder))
    message = str(error.value)
    assert f"there is {file}." in message
    assert f"promptkd convert --model {folder} --output converted" in message


def test_a_gguf_file_in_a_folder_is_pointed_at(folder):
    (folder / "model.safetensors").rename(folder / "model-q8_0.gguf")
    refused(folder, "there is model-q8_0.gguf: give that file itself")


# Files that contradict one another, or are not there.


@pytest.mark.parametrize(
    "content", [{}, {"weight_map": {}}, {"weight_map": ["a"]}, {"metadata": 1}]
)
def test_an_index_without_files(shards, content):
    (shards / INDEX).write_text(json.dumps(content))
    refused(shards, f"{INDEX}: has no weight_map")


@pytest.mark.parametrize("value", ["../model.safetensors", 3, "model.bin", "/etc/x.safetensors"])
def test_an_index_of_what_is_no_file_of_the_folder(shards, value):
    content = json.loads((shards / INDEX).read_text())
    content["weight_map"][UP] = value
    (shards / INDEX).write_text(json.dumps(content))
    refused(shards, f"{INDEX}: has no weight_map, an object of tensor names and the files")


def test_a_missing_shard_is_named(shards):
    file = sorted(shards.glob("model-*"))[1]
    file.unlink()
    refused(shards, f"{file}: no such file .*, which the index lists: get the model's files again")


def test_a_tensor_in_two_shards(shards):
    first, *_, last = sorted(shards.glob("model-*"))
    (name, *_), more = load_file(last), load_file(first)
    save_file(more | {name: np.zeros_like(load_file(last)[name])}, first)
    refused(shards, f"tensor {name} is in {first.name} and in {last.name}")


def test_a_single_file_comes_before_an_index(shards, tmp_path, monkeypatch):
    """As in transformers."""
    monkeypatch.setattr(export, "SHARD_BYTES", 2**30)
    other = tiny.write_model(tmp_path / "other", width=16, depth=2, seed=7)
    shutil.copy(pathlib.Path(other) / "model.safetensors", shards)
    (shards / INDEX).write_text("is not looked at")
    assert_same_params(load_model(str(shards)), load_model(other))
    assert has_weights(shards)


@pytest.mark.parametrize(
    "file",
    ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    + ["chat_template.jinja", "generation_config.json", "special_tokens_map.json", INDEX],
)
def test_a_pointer_of_git_lfs_is_no_file(folder, file):
    (folder / file).write_text(POINTER)
    if file == INDEX:
        (folder / "model.safetensors").unlink()
    refused(folder, f"{file}: is a Git LFS pointer.*git lfs pull")


def test_a_pointer_in_place_of_a_gguf_file(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_text(POINTER)
    refused(file, "model.gguf: is a Git LFS pointer")


def test_a_pointer_that_is_not_read_does_no_harm(folder):
    for file in ("pytorch_model.bin", "trainer_state.json", "notes.txt"):
        (folder / file).write_text(POINTER)
    for name in ("x.json", "vocab.txt", "old.model"):
        (folder / name).mkdir()
    load_model(str(folder))


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1]", "holds a list; expected an object"),
        (b"\xff\xfe{", "not JSON"),
        (b"{\n,", ":2: not"),
    ],
)
def test_json_that_is_no_object(folder, file, content, message):
    (folder / file).write_bytes(content)
    refused(folder, f"{file}.*{message}")


@pytest.mark.parametrize("content", ["{}", "{", '{"version": "1.0", "model": {"type": "New"}}'])
def test_a_tokenizer_that_cannot_be_read_is_named(folder, content):
    (folder / "tokenizer.json").write_text(content)
    refused(folder, f"{folder}: its tokenizer cannot be read: ")


# Ends of answers.


@pytest.mark.parametrize(
    ("file", "ids"),
    [("generation_config.json", [0, 5000]), ("generation_config.json", -1), ("config.json", 5000)],
)
def test_an_end_that_is_no_token(folder, file, ids):
    if file == "config.json":
        (folder / "generation_config.json").unlink()
    write(folder, file, eos_token_id=ids)
    wrong = ids[-1] if isinstance(ids, list) else ids
    with pytest.raises(ModelError, match=f"eos_token_id {wrong} is no token: its vocabulary has"):
        load_with_tokenizer(str(folder), dtype="float32")


def test_an_end_in_the_padding_of_the_vocabulary(tmp_path):
    """Padding is cut off, so that nothing would ever sample it."""
    path = tiny.write_model(tmp_path / "model", width=16, depth=1, seed=0, pad=3)
    used = load_with_tokenizer(path, dtype="float32").vocab_size
    write(tmp_path / "model", "generation_config.json", eos_token_id=used)
    with pytest.raises(ModelError, match=rf"eos_token_id {used} is no token: .* has {used} \(0 to"):
        load_with_tokenizer(path, dtype="float32")


# Rows longer than a model was trained for.


def test_generate_warns_of_rows_beyond_the_trained_positions(folder, capsys):
    """By the length of the prompt itself, not by the longest that there may be."""
    write(folder, max_position_embeddings=20)
    prompt = "--request=say red or blue or green"
    count = len(tiny.tokenizer()("say red or blue or green\n")["input_ids"])
    ask = ["--model", str(folder), "--template=plain", prompt]
    main(["generate", *ask, f"--max-new-tokens={20 - count}"])
    assert "warning" not in capsys.readouterr().err
    main(["generate", *ask, f"--max-new-tokens={21 - count}"])
    said = capsys.readouterr().err
    assert f"warning: {folder}: rows of up to 21 tokens, but it was trained for 20 posit" in said


def test_a_run_warns_of_rows_beyond_the_trained_positions(tmp_path, capsys):
    """A soft prompt comes on top of the teacher's rows, and so do demonstrations."""
    config = tiny.short_config(tmp_path / "files")  # rows of 24 tokens
    config.stages = config.stages[1:]
    write(tmp_path / config.student.path, max_position_embeddings=24)
    write(tmp_path / config.teacher.path, max_position_embeddings=30)
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        prepare.prepare(checked(config), to_path(tmp_path), mesh)
        longest = 24 + config.soft_prompt.length
        said = capsys.readouterr().err
        assert f"{config.teacher.path}: rows of up to {longest} tokens" in said
        assert "trained for 30 positions" in said and config.student.path not in said
        config.stages[0].teacher_view = "in_context"
        config.in_context.examples = 2
        made = prepare.prepare(checked(config), to_path(tmp_path), mesh)
    longest = 24 + len(made.stages[0].method.demonstrations)
    assert f"{config.teacher.path}: rows of up to {longest} tokens" in capsys.readouterr().err


def test_a_cache_warns_of_rows_beyond_the_trained_positions(tmp_path, capsys):
    config = tiny.short_config(tmp_path / "files")
    write(tmp_path / config.teacher.path, max_position_embeddings=20)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"config": as_json(config)}))
    main(["cache", "--config", str(file), "--output", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert f"{config.teacher.path}: rows of up to 24 tokens, but it was trained for 20" in said


def test_linear_scaling_stretches_the_trained_positions():
    config = tiny.llama_config(width=16, depth=1, vocab_size=9)
    assert from_hugging_face(config).trained_positions == 128
    config["rope_scaling"] = {"type": "linear", "factor": 2.0}
    assert from_hugging_face(config).trained_positions == 256


# The card.


def test_a_card_is_handed_on_from_model_to_model(tmp_path):
    folder = tmp_path / "model"
    tiny.write_model(folder, width=16, depth=1, seed=0)
    front = "---\ntags:\n- a\nlicense: 'apache-2.0'\nbase_model: owner/name\n---\nlicense: none\n"
    (folder / "README.md").write_text(front)
    model = load_model(str(folder))
    assert model.card == {"license": "apache-2.0", "base_model": "owner/name"}
    assert keep_layers(model, (0,)).card == model.card
    save_without_weights(tmp_path / "configs", model)
    assert load_without_weights(str(tmp_path / "configs")).card == model.card
    (folder / "README.md").write_text("license: mit, says a text without front matter\n")
    assert load_model(str(folder)).card == {}


@pytest.mark.parametrize(
    ("line", "card"),
    [
        ("license: [mit, apache-2.0]", {}),
        ("license: {a: b}", {}),
        ("license:\n- mit", {}),
        ("license: 'mit", {}),
        ('license: "mit"  # since 2020', {"license": "mit"}),
        ("license: cc-by-nc-4.0\r", {"license": "cc-by-nc-4.0"}),
    ],
)
def test_a_card_takes_plain_scalars_alone(tmp_path, line, card):
    (tmp_path / "README.md").write_bytes(f"---\n{line}\ntags: x\n---\n".encode())
    assert read_card(tmp_path) == card
