"""One family is one file: the recipe of CONTRIBUTING.md, for a family that nobody has."""

import json
import pathlib

import numpy as np
import pytest
from helpers.families import FAMILIES as CONFIGS
from helpers.models import assert_same_params, logits
from safetensors.numpy import load_file, save_file

from promptkd_jax.infra.errors import GGUFError, ModelError
from promptkd_jax.models.config import DecoderConfig
from promptkd_jax.models.families import base, gguf_layout, llama, registry
from promptkd_jax.models.io import params
from promptkd_jax.models.io.export import save_model, to_hugging_face
from promptkd_jax.models.load import load_model
from promptkd_jax.models.model import keep_layers

# The new file: a Llama that has other names, another field for its depth, and, as Phi-3, query, key
# and value in one tensor, gate and up in another.

WIDTHS = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}


def _read(c, source: str) -> DecoderConfig:
    base.require(c, source, clip_qkv=None)
    return llama.read_llama({**c, "num_hidden_layers": c["depth"]}, source, tied=False)


def _tensors(config: DecoderConfig) -> tuple[base.Tensor, ...]:
    block, attention, mlp = "blocks.{}", "layers/attention", "layers/mlp"
    qkv, gate_up = ("N H", "K H", "K H"), ("F", "F")
    rows = [
        *base.embedding_rows("tokens.weight", config),
        *base.norm_rows("last_norm", "final_norm"),
        *base.norm_rows(f"{block}.norm_1", "layers/attention_norm"),
        *base.norm_rows(f"{block}.norm_2", "layers/mlp_norm"),
        *base.linear_rows(f"{block}.out", f"{attention}/out", "D (N H) -> N H D", bias=False),
        *base.linear_rows(f"{block}.down", f"{mlp}/down", "D F -> F D", bias=False),
    ]
    for part, name in enumerate(("query", "key", "value")):
        pattern = f"({qkv[part]}) D -> D {qkv[part]}"
        where = {"bias": config.qkv_bias, "fused": qkv, "part": part}
        rows += base.linear_rows(f"{block}.qkv", f"{attention}/{name}", pattern, **where)
    for part, name in enumerate(("gate", "up")):
        where = {"bias": False, "fused": gate_up, "part": part}
        rows += base.linear_rows(f"{block}.gate_up", f"{mlp}/{name}", "F D -> D F", **where)
    return tuple(rows)


TOY = base.Family(
    model_type="toy",
    architecture="ToyForCausalLM",
    read=_read,
    tensors=_tensors,
    prefix="toy.",
    ignored=(r"blocks\.\d+\.mask",),
    depth_field="depth",
    gguf=gguf_layout.GGUFLayout(
        architecture="toy",
        names={
            "token_embd.weight": "toy.tokens.weight",
            "output_norm.weight": "toy.last_norm.weight",
            "output.weight": "lm_head.weight",
            "blk.{}.attn_norm.weight": "toy.blocks.{}.norm_1.weight",
            "blk.{}.ffn_norm.weight": "toy.blocks.{}.norm_2.weight",
            "blk.{}.attn_output.weight": "toy.blocks.{}.out.weight",
            "blk.{}.ffn_down.weight": "toy.blocks.{}.down.weight",
            "blk.{}.attn_qkv.weight": "toy.blocks.{}.qkv.weight",
            "blk.{}.ffn_up.weight": "toy.blocks.{}.gate_up.weight",
        },
        fields=gguf_layout.FIELDS | {"block_count": "depth", "level": "toy_level"},
    ),
)

# The test.


@pytest.fixture
def llama_model(tmp_path):
    """A random Llama of three layers, and its tensors by name."""
    config = CONFIGS["llama"] | WIDTHS | {"num_hidden_layers": 3, "eos_token_id": 1}
    decoder = registry.from_hugging_face(config)
    rng = np.random.default_rng(0)
    table = registry.FAMILIES["llama"]
    tensors = {
        name: rng.normal(1, 0.5, row.stored_shape(base.sizes(decoder))).astype(np.float32)
        for row in table.tensors(decoder)
        for name in params.stored_names(row, decoder, table.prefix)
    }
    folder = write(tmp_path / "llama", config, tensors)
    return load_model(str(folder)), config, tensors


def write(folder: pathlib.Path, config: dict, tensors: dict) -> pathlib.Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def renamed(tensors: dict[str, np.ndarray], layers: int) -> dict[str, np.ndarray]:
    """The tensors of a Llama as a Toy has them."""

    def joined(*names: str) -> np.ndarray:
        return np.concatenate([tensors[f"model.layers.{i}.{name}.weight"] for name in names])

    toy = {
        "toy.tokens.weight": tensors["model.embed_tokens.weight"],
        "toy.last_norm.weight": tensors["model.norm.weight"],
        "lm_head.weight": tensors["lm_head.weight"],
    }
    for i in range(layers):
        block = f"toy.blocks.{i}"
        heads = (f"self_attn.{letter}_proj" for letter in "qkv")
        toy[f"{block}.norm_1.weight"] = joined("input_layernorm")
        toy[f"{block}.norm_2.weight"] = joined("post_attention_layernorm")
        toy[f"{block}.out.weight"] = joined("self_attn.o_proj")
        toy[f"{block}.down.weight"] = joined("mlp.down_proj")
        toy[f"{block}.qkv.weight"] = joined(*heads)
        toy[f"{block}.gate_up.weight"] = joined("mlp.gate_proj", "mlp.up_proj")
    return toy


@pytest.fixture
def toy(llama_model, monkeypatch):
    """The same model as a Toy: its config and its tensors."""
    monkeypatch.setitem(registry.FAMILIES, "toy", TOY)
    _, config, tensors = llama_model
    config = config | {"model_type": "toy", "depth": 3}
    del config["num_hidden_layers"]
    return config, renamed(tensors, 3)


def test_a_new_family_is_loaded_run_and_written_back(llama_model, toy, tmp_path, monkeypatch):
    config, tensors = toy
    buffers = {"toy.blocks.1.mask": np.ones((4, 4), np.float32)}
    folder = write(tmp_path / "toy", config, tensors | buffers)
    model = load_model(str(folder))
    assert_same_params(model, llama_model[0])
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
    np.testing.assert_array_equal(logits(model, tokens), logits(llama_model[0], tokens))
    save_model(tmp_path / "saved", model)
    found = load_file(tmp_path / "saved" / "model.safetensors")
    assert found.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config.items() <= saved.items() and saved["architectures"] == ["ToyForCausalLM"]
    shallow = keep_layers(model, (0, 2))
    assert shallow.hf_config["depth"] == 2
    written = to_hugging_face(shallow.params, shallow.decoder.config)
    np.testing.assert_array_equal(
        written["toy.blocks.1.qkv.weight"], tensors["toy.blocks.2.qkv.weight"]
    )
    monkeypatch.setattr(params, "PIECE_BYTES", 300)  # piece by piece
    assert_same_params(load_model(str(folder)), llama_model[0])


def test_a_fused_tensor_of_another_shape_is_told_in_letters(toy, tmp_path):
    config, tensors = toy
    tensors["toy.blocks.1.qkv.weight"] = tensors["toy.blocks.1.qkv.weight"][:-1]
    folder = write(tmp_path / "toy", config, tensors)
    message = r"qkv.weight has shape \(63, 32\).*\(64, 32\) \(\(N H \+ K H \+ K H\) D with D=32"
    with pytest.raises(ModelError, match=message):
        load_model(str(folder))


def test_what_a_new_family_cannot_be_is_refused(toy, tmp_path):
    config, tensors = toy
    with pytest.raises(ModelError, match="clip_qkv = 8 is not supported"):
        load_model(str(write(tmp_path / "clipped", config | {"clip_qkv": 8}, tensors)))
    with pytest.raises(ModelError, match="a toy config needs the field 'depth'"):
        registry.from_hugging_face({key: x for key, x in config.items() if key != "depth"})


def test_a_gguf_of_its_own_architecture_is_read(toy, llama_model, tmp_path):
    files = pytest.importorskip("helpers.gguf_files")
    from promptkd_jax.models.io.gguf import open_gguf

    _, tensors = toy
    stored = {theirs: name for name, theirs in TOY.gguf.names.items()}
    of_gguf = {}
    for name, array in tensors.items():
        layer = next((part for part in name.split(".") if part.isdigit()), None)
        pattern = name if layer is None else name.replace(f".{layer}.", ".{}.")
        full = files.gguf.GGMLQuantizationType.F32
        of_gguf[stored[pattern].format(layer)] = (array, full)
    sizes = {"width": 32, "heads": 4, "num_kv_heads": 2, "inner": 24, "layers": 3, "vocabulary": 32}
    llama_keys = files.metadata(sizes) | {"llama.rope.freq_base": 10000.0}
    keys = {name.replace("llama.", "toy."): x for name, x in llama_keys.items()}

    def write_gguf(**more) -> str:
        at = tmp_path / "model.gguf"
        return files.write(at, keys | {"toy.level": 7} | more, of_gguf, architecture="toy")

    model = open_gguf(write_gguf())
    assert (model.config["depth"], model.config["toy_level"]) == (3, 7)
    assert "num_hidden_layers" not in model.config
    decoder = registry.from_hugging_face(model.config)
    found = llama_model[0].replace(params=params.load_params(model, decoder))
    assert_same_params(found, llama_model[0])  # no rows were permuted
    with pytest.raises(GGUFError, match=r"toy\.experts = 8 .* not a plain toy"):
        open_gguf(write_gguf(**{"toy.experts": 8}))
    del keys["toy.block_count"]
    with pytest.raises(GGUFError, match=r"no metadata toy\.block_count, which a toy needs"):
        open_gguf(write_gguf())


def test_every_file_of_families_is_registered():
    here = pathlib.Path(registry.__file__).parent
    shared = {"__init__", "base", "gguf_layout", "quantised", "registry"}
    files = {file.stem for file in here.glob("*.py")} - shared
    registered = {family.read.__module__.rsplit(".", 1)[1] for family in registry.FAMILIES.values()}
    assert files == registered
    assert all(name == family.model_type for name, family in registry.FAMILIES.items())
