"""An exported folder says what its readers ask for: vLLM, MLX and transformers 4 beside 5.

None of them is run here. Which fields and names they read stands in docs/models.md.
"""

import json
import pathlib

import jax
import numpy as np
import pytest
from helpers.models import CONFIGS, from_folder, logits, random_model, reference_logits
from safetensors.numpy import load_file

from promptkd_jax.infra.errors import ModelError
from promptkd_jax.models.decoder import Decoder
from promptkd_jax.models.families.registry import FAMILIES, from_hugging_face
from promptkd_jax.models.io.export import save_model
from promptkd_jax.models.load import load_model
from promptkd_jax.models.model import Model, keep_layers

FULL, SLIDING = "full_attention", "sliding_attention"
PATTERNS = ("sliding_window_pattern", "_sliding_window_pattern")


@pytest.fixture(autouse=True)
def _full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def changed(name: str, **changes) -> Model:
    """A random model whose config differs in fields that its parameters do not depend on; a field
    of None is left out."""
    hf_config = random_model(name).hf_config | {"pad_token_id": 0} | changes
    hf_config = {key: x for key, x in hf_config.items() if x is not None}
    model = random_model(name)
    return model.replace(hf_config=hf_config, decoder=Decoder(from_hugging_face(hf_config)))


def written(folder: pathlib.Path, model: Model) -> dict:
    """Saves a model, and returns its `config.json`."""
    save_model(folder, model)
    return json.loads((folder / "config.json").read_text())


def assert_read(folder: pathlib.Path, model: Model) -> None:
    """The folder is the model, for us and for transformers."""
    assert load_model(str(folder)).decoder.config == model.decoder.config
    pytest.importorskip("torch", reason="the models of transformers need torch")
    found = reference_logits(from_folder(folder))
    np.testing.assert_allclose(logits(model), found, rtol=0, atol=1e-4)


# Layers of Gemma 3: every p-th is full. MLX reads p alone, and takes 6 where nothing is said.


@pytest.mark.parametrize("said", [2, None], ids=["in the source", "not in the source"])
def test_the_period_of_gemmas_windows_is_said(tmp_path, said):
    types = [SLIDING, FULL, SLIDING]
    model = changed("gemma3", sliding_window_pattern=said, layer_types=types)
    config = written(tmp_path, model)
    assert config["layer_types"] == types
    assert [config[name] for name in PATTERNS] == [2, 2]


@pytest.mark.parametrize(
    ("layers", "types", "period"),
    [
        ((0, 2, 1), [SLIDING, SLIDING, FULL], 3),
        ((0, 1), [SLIDING, FULL], 2),
        ((1,), [FULL], 1),
        ((1, 2), [FULL, SLIDING], None),
        ((0, 2), [SLIDING, SLIDING], None),
    ],
)
def test_the_period_is_that_of_the_layers_that_are_kept(tmp_path, layers, types, period):
    """If they have none it is null, and not left out: MLX would compute something else."""
    student = keep_layers(random_model("gemma3"), layers)
    config = written(tmp_path, student)
    assert config["layer_types"] == types
    assert [config[name] for name in PATTERNS] == [period, period]
    assert_read(tmp_path, student)


def test_no_period_and_no_types_is_no_model():
    config = CONFIGS["gemma3"] | {"sliding_window_pattern": None}
    with pytest.raises(ModelError, match="layer_types has 0 entries for 3 layers"):
        from_hugging_face(config)


# Phi-3 with longrope: transformers 4 refuses more than three fields, MLX fewer.


LONGROPE = CONFIGS["phi3_long"]["rope_scaling"]
FACTORS = {key: LONGROPE[key] for key in ("short_factor", "long_factor")}
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16}
SOURCES = {
    "transformers 4": {},
    "transformers 5": {
        "rope_parameters": {**LONG, **FACTORS, "type": "longrope", "partial_rotary_factor": 1.0},
        "rope_scaling": None,
    },
    "the original length among them": {
        "rope_parameters": {**LONG, **FACTORS},
        "rope_scaling": None,
        "original_max_position_embeddings": None,
    },
    "no type": {"rope_scaling": {"rope_type": "longrope", **FACTORS}},
}


@pytest.mark.parametrize("changes", SOURCES.values(), ids=SOURCES)
def test_longrope_has_the_three_fields_of_transformers_4(tmp_path, changes):
    model = changed("phi3_long", **changes)
    assert model.decoder == random_model("phi3_long").decoder
    config = written(tmp_path, model)
    assert config["rope_scaling"] == LONGROPE
    assert config["original_max_position_embeddings"] == 16
    assert config["partial_rotary_factor"] == 1.0
    assert_read(tmp_path, model)


@pytest.mark.parametrize("source", ["flat", "transformers 5"])
def test_longrope_that_three_fields_cannot_say_says_all(tmp_path, source):
    """MLX asks for a type, and would compute another attention factor: so it has none."""
    own = {**LONGROPE, "attention_factor": 1.5}
    changes = {"rope_scaling": own} if source == "flat" else {"rope_parameters": LONG | own}
    model = changed("phi3_long", **{"rope_scaling": None, **changes})
    rope = written(tmp_path, model)["rope_scaling"]
    assert (rope["rope_type"], rope["attention_factor"]) == ("longrope", 1.5)
    assert "type" not in rope
    assert_read(tmp_path, model)


def test_a_factor_that_follows_from_the_lengths_is_no_contradiction_and_another_is():
    rope = {**LONG, **FACTORS, "factor": 16.0}  # 256 positions, 16 before
    same = CONFIGS["phi3_long"] | {"rope_parameters": rope}
    assert from_hugging_face(same) == from_hugging_face(CONFIGS["phi3_long"])
    for changes in ({"factor": 8.0}, {"attention_factor": 1.5}, {"partial_rotary_factor": 0.5}):
        with pytest.raises(ModelError, match="contradict one another"):
            from_hugging_face(same | {"rope_parameters": rope | changes})


def test_longrope_of_a_gguf_file_is_that_of_transformers_4(tmp_path):
    pytest.importorskip("gguf")
    from helpers.gguf_files import byte_level_tokenizer

    from promptkd_jax.models.io.gguf_export import save_gguf

    model = random_model("phi3_long")
    save_gguf(
        tmp_path / "model.gguf", model.replace(tokenizer=byte_level_tokenizer()), quantize="f32"
    )
    found = load_model(str(tmp_path / "model.gguf"))
    assert found.decoder.config.kinds == model.decoder.config.kinds
    config = written(tmp_path / "folder", found)
    assert config["rope_scaling"] == LONGROPE
    assert config["original_max_position_embeddings"] == 16


# GPT-2: as openai-community/gpt2 has it.


def test_gpt2_has_the_names_of_published_files(tmp_path, monkeypatch):
    """MLX reads no others. transformers 4 refuses them beside a head, which MLX cannot have."""
    tied = random_model("gpt2")
    assert written(tmp_path / "tied", tied)["n_ctx"] == CONFIGS["gpt2"]["n_positions"]
    tensors = load_file(tmp_path / "tied/model.safetensors")
    assert {"wte.weight", "wpe.weight", "ln_f.bias", "h.2.attn.c_attn.weight"} <= tensors.keys()
    assert not any(name.startswith("transformer.") for name in tensors)
    assert_read(tmp_path / "tied", tied)

    monkeypatch.setitem(CONFIGS, "untied", CONFIGS["gpt2"] | {"tie_word_embeddings": False})
    untied = random_model("untied")
    save_model(tmp_path / "untied", untied)
    tensors = load_file(tmp_path / "untied/model.safetensors")
    assert {"transformer.wte.weight", "lm_head.weight"} <= tensors.keys()
    assert not any(name.startswith(("h.", "w")) for name in tensors)
    assert_read(tmp_path / "untied", untied)


# Fields that a source may leave to its readers, and MLX does not.


ASKED_FOR = {
    "qwen3": {"rope_theta": 10000.0},
    "granite": {"rope_theta": 10000.0, "attention_bias": False, "mlp_bias": False},
    "qwen3_moe": {"rope_theta": 10000.0, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "gpt_oss": {"layer_types": [SLIDING, FULL, SLIDING]},
    "gemma3": {"rope_theta": 1000.0, "rope_local_base_freq": 100.0},
    "opt": {},
}


@pytest.mark.parametrize(("name", "fields"), ASKED_FOR.items(), ids=ASKED_FOR)
def test_what_mlx_asks_for_is_said(tmp_path, name, fields):
    assert not fields.keys() & CONFIGS[name].keys()
    model = random_model(name)
    config = written(tmp_path, model)
    assert {key: config[key] for key in fields} == fields
    assert ("rope_theta" in config) == (name != "opt")
    assert from_hugging_face(config) == model.decoder.config


def test_an_export_is_told_what_its_source_leaves_out_of_theta(tmp_path):
    """Theta of Gemma 3's layers without a window is another than that of those with one."""
    model = changed("gemma3", rope_parameters=None, layer_types=[SLIDING, SLIDING, FULL])
    config = written(tmp_path, model)
    assert config["rope_theta"] == 1e6
    assert from_hugging_face(config) == model.decoder.config


def test_layers_that_do_not_differ_have_no_types(tmp_path):
    """With layer_types, transformers takes a Mistral for a Ministral, and vLLM gives a Granite
    attention sinks."""
    for name in ("mistral", "granite", "llama"):
        assert "layer_types" not in written(tmp_path / name, random_model(name))


@pytest.mark.parametrize("name", ["qwen2_mixed", "gemma2", "gemma3", "smollm3_windows", "gpt_oss"])
def test_fields_of_an_export_are_those_of_the_kept_layers(name):
    student = keep_layers(random_model(name), (2, 0))
    config = from_hugging_face(student.hf_config)
    assert config == student.decoder.config
    fields = FAMILIES[config.family].export_fields(config)
    assert len(fields["layer_types"]) == 2 and fields.items() <= student.hf_config.items()
