"""A student of all its teacher's layers is its teacher; of some, it has just these."""

import json
import pathlib

import numpy as np
import pytest
import transformers
from flax import traverse_util
from helpers import bucket, tiny
from helpers.models import CONFIGS, assert_same_params, logits, random_model
from safetensors.numpy import load_file

from promptkd_jax.cli.main import main
from promptkd_jax.models.families.registry import FAMILIES
from promptkd_jax.models.io.export import save_model
from promptkd_jax.models.load import load_model, load_with_tokenizer
from promptkd_jax.models.model import Model

LAYERS = 3  # of every teacher here


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, pathlib.Path]:
    """A random teacher of every family, as a folder."""
    folder = tmp_path_factory.mktemp("teachers")
    for name in CONFIGS:
        save_model(folder / name, random_model(name))
    return {name: folder / name for name in CONFIGS}


def start(teacher: object, layers: str, output: pathlib.Path, *more: str) -> pathlib.Path:
    main(["init", "--teacher", str(teacher), "--layers", layers, "--output", str(output), *more])
    return output


def assert_layers(student: Model, teacher: Model, kept: list[int]) -> None:
    """Layer i of the student is layer kept[i] of the teacher; all else is the same."""
    found, given = (traverse_util.flatten_dict(m.params, sep="/") for m in (student, teacher))
    assert found.keys() == given.keys()
    for path, array in found.items():
        if not path.startswith("layers/"):
            np.testing.assert_array_equal(array, given[path], err_msg=path)
            continue
        assert len(array) == len(kept), path
        for layer, of_teacher in zip(array, kept):
            np.testing.assert_array_equal(layer, given[path][of_teacher], err_msg=path)


def test_every_family_is_here():
    named = {config["model_type"] for config in CONFIGS.values()}
    assert named == set(FAMILIES)


@pytest.mark.parametrize("name", CONFIGS)
def test_with_all_layers_the_student_is_the_teacher(folders, tmp_path, name):
    teacher = load_model(str(folders[name]))
    student = load_model(str(start(folders[name], str(LAYERS), tmp_path / "student")))
    assert_same_params(student, teacher)
    assert student.decoder == teacher.decoder
    assert student.hf_config == teacher.hf_config
    assert student.eos_ids == teacher.eos_ids
    np.testing.assert_array_equal(logits(student), logits(teacher))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    ("layers", "kept"), [("2", [0, 2]), ("2,0", [2, 0])], ids=["uniform", "listed"]
)
def test_the_layers_are_the_teachers(folders, tmp_path, name, layers, kept):
    output = start(folders[name], layers, tmp_path / "student")
    student = load_model(str(output))
    assert_layers(student, random_model(name), kept)
    field = "n_layer" if name == "gpt2" else "num_hidden_layers"
    assert json.loads((output / "config.json").read_text())[field] == len(kept)
    assert transformers.AutoConfig.from_pretrained(output).num_hidden_layers == len(kept)


@pytest.mark.parametrize(
    "windows",
    [
        {"layer_types": ["sliding_attention"] * LAYERS},
        {"layer_types": ["full_attention"] * LAYERS},
        {"max_window_layers": LAYERS},  # so that no layer has one
        {"max_window_layers": 0},
    ],
    ids=["named", "named full", "none", "all"],
)
def test_the_windows_of_qwens_layers_stay(tmp_path, windows):
    teacher = random_model("qwen2")
    changed = {"use_sliding_window": True, "sliding_window": 6, **windows}
    save_model(tmp_path / "teacher", teacher.replace(hf_config=teacher.hf_config | changed))
    teacher = load_model(str(tmp_path / "teacher"))
    output = start(tmp_path / "teacher", "2", tmp_path / "student")
    kinds = teacher.decoder.config.kinds
    assert load_model(str(output)).decoder.config.kinds == kinds
    theirs = transformers.AutoConfig.from_pretrained(output)
    windowed = {bool(kinds[0].sliding_window)}
    assert {kind == "sliding_attention" for kind in theirs.layer_types} == windowed
    assert len(theirs.layer_types) == 2


def test_a_gguf_file_goes_in(tmp_path):
    pytest.importorskip("gguf")
    from helpers.gguf_files import SIZES, gguf_tensors, metadata, weights, write
    from test_gguf_tokenizer import tokenizer_keys

    keys = tokenizer_keys()
    sizes = {**SIZES, "layers": LAYERS, "vocabulary": len(keys["tokenizer.ggml.tokens"])}
    file = write(
        tmp_path / "teacher.gguf", metadata(sizes) | keys, gguf_tensors(weights(sizes), sizes)
    )
    student = load_with_tokenizer(str(start(file, "0,2", tmp_path / "out")), dtype="float32")
    teacher = load_model(file)
    assert_layers(student, teacher, [0, 2])
    assert student.tokenizer.get_vocab() == teacher.tokenizer.get_vocab()
    assert student.eos_ids == teacher.eos_ids


def test_a_hub_id_goes_in(folders, tmp_path, monkeypatch):
    asked = []

    def download(name, **rest):
        asked.append(name)
        return str(folders["opt"])

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    student = load_model(str(start("owner/model", "1,", tmp_path / "student")))
    assert set(asked) == {"owner/model"}
    assert_layers(student, random_model("opt"), [1])


def test_text_goes_in_and_out_and_the_card_says_what_it_is(tmp_path, capsys):
    teacher = tiny.write_model(tmp_path / "teacher", width=32, depth=6, seed=0)
    output = start(teacher, "3", tmp_path / "student", "--dtype", "bfloat16")
    tensors = load_file(output / "model.safetensors")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"bfloat16"}
    assert json.loads((output / "config.json").read_text())["dtype"] == "bfloat16"
    student = load_with_tokenizer(str(output), dtype="float32")
    assert student.tokenizer("say red").input_ids == tiny.tokenizer()("say red").input_ids
    card = (output / "README.md").read_text()
    size = sum(tensor.size for tensor in tensors.values())
    for text in (f"{teacher} (6 layers)", "counted from 0: 0, 2, 5\n", f"{size:,} in bfloat16"):
        assert text in card
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "0, 2, 5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("4", "4 of 3 layers: keep at least 1 and at most 3"),
        ("0", "0 of 3 layers"),
        ("0,3", r"layers \(0, 3\): .*gpt2 has the layers 0 to 2"),
    ],
)
def test_layers_that_are_not_there(folders, tmp_path, layers, message):
    with pytest.raises(SystemExit, match=f"promptkd init: {message}"):
        start(folders["gpt2"], layers, tmp_path / "student")
    assert not (tmp_path / "student").exists()


@pytest.mark.parametrize("layers", ["", "half", "0-2", "0,,2", "1.5", ",", "0;2"])
def test_a_list_that_cannot_be_read(tmp_path, capsys, layers):
    with pytest.raises(SystemExit):
        start("anything", layers, tmp_path / "student")
    said = capsys.readouterr().err
    assert f"--layers: {layers!r} is neither a number of layers (18) nor a list" in said


def test_a_layer_listed_twice(tmp_path, capsys):
    with pytest.raises(SystemExit):
        start("anything", "0,2, 2", tmp_path / "student")
    assert "--layers: '0,2, 2' has layer 2 more than once" in capsys.readouterr().err


def test_nothing_is_overwritten(folders, tmp_path):
    output = start(folders["gpt2"], "2", tmp_path / "student")
    before = {file: file.read_bytes() for file in output.iterdir()}
    with pytest.raises(SystemExit, match=r"student: holds a model already \(README.md, config.js"):
        start(folders["opt"], "2", output)
    assert {file: file.read_bytes() for file in output.iterdir()} == before
    notes = tmp_path / "notes" / "README.md"
    notes.parent.mkdir()
    notes.write_text("mine")
    with pytest.raises(SystemExit, match=r"holds files already \(README.md\); give a folder"):
        start(folders["gpt2"], "2", notes.parent)
    with pytest.raises(SystemExit, match="README.md: is a file"):
        start(folders["gpt2"], "2", notes)
    assert notes.read_text() == "mine"


def test_a_student_in_a_bucket(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    pail, _ = bucket.make(monkeypatch)
    monkeypatch.chdir(tmp_path)
    start(folders["gpt2"], "0,2", pail / "student")
    start(pail / "student", "1,", pail / "smaller")
    assert_layers(load_model(str(pail / "smaller")), random_model("gpt2"), [2])
    with pytest.raises(SystemExit, match="student: holds a model already"):
        start(folders["gpt2"], "2", pail / "student")
    with pytest.raises(SystemExit, match="--output gs://other/student: "):
        start(folders["gpt2"], "2", "gs://other/student")
    assert [file.name for file in tmp_path.iterdir()] == ["home"]


def test_a_teacher_that_is_not_there(tmp_path):
    with pytest.raises(SystemExit, match="promptkd init: model 'absent': no such folder"):
        start("absent", "2", tmp_path / "student")
    assert not (tmp_path / "student").exists()
