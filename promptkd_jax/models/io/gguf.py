"""Read a llama.cpp GGUF file of the Llama family as if it were a Hugging Face folder.

A GGUF file holds the configuration, the tokenizer and the weights, mostly quantised, of one model.
`open_gguf` reads its header into a `GGUFModel`, whose tensors carry Hugging Face names and layout
and are dequantised one at a time; the tokenizer is rebuilt in `gguf_tokenizer`. No torch. The
optional package `gguf` does the parsing and the dequantisation: `pip install promptkd_jax[gguf]`.

What could be misread is refused: a tensor or a `llama.*` key that is not understood may change
what the model computes, so each is an error. That leaves out mixtures of experts (Mixtral also
calls itself "llama"), attention biases, sliding windows, YaRN, and models in several parts.

Sources: the GGUF specification (ggml, docs/gguf.md); for what the keys mean, llama.cpp's
convert_hf_to_gguf.py.
"""

from __future__ import annotations

import os
import pathlib
import re
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from promptkd_jax.infra.errors import GGUFError
from promptkd_jax.models.io.safetensors import refuse_pointer

if TYPE_CHECKING:
    from gguf.gguf_reader import GGUFReader, ReaderTensor

# Q5_0, Q5_1 and IQ4_NL: what llama.cpp puts in a K-quant file where a row is no multiple of 256.
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL")
TYPES += ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")

GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {  # below blk.{i}. and model.layers.{i}.
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}

# The keys under "llama." that are read below, and the three that change nothing.
KEYS = frozenset(
    ("block_count", "context_length", "embedding_length", "feed_forward_length")
    + ("attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon")
    + ("attention.key_length", "attention.value_length", "rope.dimension_count", "rope.freq_base")
    + ("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length")
    + ("rope.scaling.finetuned", "tensor_data_layout", "vocab_size")
)


@dataclass(frozen=True, eq=False)
class GGUFModel:
    """An open GGUF file under Hugging Face names. Made by `open_gguf`.

    Attributes:
      path: the file.
      config: what a Hugging Face `config.json` of the model says. `eos_token_id` is a list where
        the file also names an end-of-turn or end-of-message token. Frequency factors
        (`rope_freqs.weight`) appear as `rope_scaling` of type "llama3".
      metadata: the keys and values of the file, as they are.
    """

    path: str
    config: dict
    metadata: dict[str, Any] = field(repr=False)
    _tensors: dict[str, ReaderTensor] = field(repr=False)  # by Hugging Face name

    def names(self) -> list[str]:
        """Hugging Face names of all tensors; `lm_head.weight` only where the head is untied."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor as in the Hugging Face model, [out, in] for a matrix."""
        return _shape(self._tensors[name])

    def dtype(self, name: str) -> str:
        """The dtype that `read` gives, as safetensors calls it."""
        return "F32"

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """One tensor, dequantised: float32, [out, in], rows of q and k in Hugging Face order.

        The file is memory-mapped, and each call reads and dequantises anew: nothing is kept. What
        the file itself holds as float32 is a read-only view of it.

        Args:
          index: which part; the rows that it cuts off are not dequantised.
        """
        tensor = self._tensors[name]
        rows = np.asarray(tensor.data)
        if name.endswith("self_attn.q_proj.weight"):
            rows = _unpermute(rows, self.config["num_attention_heads"])
        elif name.endswith("self_attn.k_proj.weight"):
            rows = _unpermute(rows, self.config["num_key_value_heads"])
        if index is None or rows.ndim == 1:
            return _gguf().dequantize(rows, tensor.tensor_type)[index or ...]
        return _gguf().dequantize(rows[index[0]], tensor.tensor_type)[:, *index[1:]]


def open_gguf(path: str | os.PathLike[str]) -> GGUFModel:
    """Opens a GGUF file of architecture "llama"; reads its header, no weights.

    Parsing takes seconds where the vocabulary is large. That all tensors are there, in the shapes
    that `config` asks for, is for `params.load_params` to check, as it does for every source.

    Raises:
      ModelError: a pointer of Git LFS in place of the file.
      GGUFError: not a whole GGUF file, not a plain Llama, or a tensor that a Llama does not have or
        that is of none of the `TYPES`.
      ImportError: the package gguf is not installed.
      OSError: no such file, or not readable.
    """
    path = os.fspath(path)
    refuse_pointer(pathlib.Path(path))
    reader, metadata = _parse(path)
    _check_metadata(path, metadata)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(path, metadata, tensors)
    return GGUFModel(path, config, metadata, _by_hugging_face_name(path, tensors))


def _gguf() -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise GGUFError(
            "reading a GGUF file needs the package gguf: pip install promptkd_jax[gguf]"
        ) from error
    return gguf


def _parse(path: str) -> tuple[GGUFReader, dict[str, Any]]:
    try:
        reader = _gguf().GGUFReader(path)
        metadata = {key: entry.contents() for key, entry in reader.fields.items()}
    except (ValueError, LookupError, OverflowError) as error:  # gguf checks no bounds
        raise GGUFError(
            f"{path}: not a whole GGUF file: parsing its {os.stat(path).st_size} bytes stopped at "
            f"{type(error).__name__}: {error}. It is truncated or damaged (fetch it again), is no "
            "GGUF file, or is newer than the installed gguf package"
        ) from error
    if reader.byte_order != "I":
        raise GGUFError(f"{path}: big-endian; convert it with gguf-convert-endian {path} little")
    return reader, metadata


def _check_metadata(path: str, metadata: dict[str, Any]) -> None:
    """Refuses what is not one whole file of a plain Llama."""
    if (kind := metadata.get("general.type", "model")) != "model":
        raise GGUFError(
            f"{path}: general.type is {kind!r}, not 'model'; an adapter is merged into its base "
            "model by llama-export-lora"
        )
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise GGUFError(f"{path}: general.architecture is {architecture!r}; only 'llama' is read")
    if (parts := metadata.get("split.count", 1)) > 1:
        raise GGUFError(f"{path}: one of {parts} parts; join them: llama-gguf-split --merge")
    for key, value in metadata.items():
        # An unknown setting that is 0 or false is switched off.
        if key.startswith("llama.") and key.removeprefix("llama.") not in KEYS and value:
            raise GGUFError(
                f"{path}: {key} = {value!r} is not supported: the model is not a plain Llama, or "
                f"the key is new; understood are llama.* with {', '.join(sorted(KEYS))}"
            )


def _config(path: str, metadata: dict[str, Any], tensors: dict[str, ReaderTensor]) -> dict:
    width = _setting(path, metadata, "embedding_length")
    heads = _setting(path, metadata, "attention.head_count")
    head_dim = _setting(path, metadata, "attention.key_length", width // heads)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": width,
        "num_hidden_layers": _setting(path, metadata, "block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _setting(path, metadata, "attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": _setting(path, metadata, "feed_forward_length"),
        "max_position_embeddings": _setting(path, metadata, "context_length"),
        "rms_norm_eps": _setting(path, metadata, "attention.layer_norm_rms_epsilon"),
        "rope_theta": _setting(path, metadata, "rope.freq_base", 10000.0),
        "vocab_size": _vocabulary_size(path, tensors),
        "tie_word_embeddings": "output.weight" not in tensors,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }
    _check_head_width(path, metadata, head_dim)
    scaling = _rope_scaling(path, metadata, tensors.pop("rope_freqs.weight", None), config)
    return config | scaling | _special_ids(path, metadata, config["vocab_size"])


def _setting(path: str, metadata: dict[str, Any], key: str, default: Any = None) -> Any:
    value = metadata.get(f"llama.{key}", default)
    if value is None:
        raise GGUFError(f"{path}: no metadata llama.{key}, which a Llama needs")
    # Floats are stored as float32: 1e-5 would come out as 9.999999747378752e-06.
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _check_head_width(path: str, metadata: dict[str, Any], width: int) -> None:
    for key in ("attention.value_length", "rope.dimension_count"):
        if (found := _setting(path, metadata, key, width)) != width:
            raise GGUFError(
                f"{path}: llama.{key} = {found}; only the head width, {width}, is supported"
            )


def _vocabulary_size(path: str, tensors: dict[str, ReaderTensor]) -> int:
    if "token_embd.weight" not in tensors:
        raise GGUFError(f"{path}: tensor token_embd.weight is missing")
    return _shape(tensors["token_embd.weight"])[0]


def _special_ids(path: str, metadata: dict[str, Any], size: int) -> dict:
    names = ("bos", "eos", "eot", "eom", "padding", "unknown")
    ids = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in names}
    for name, found in ids.items():
        if found is not None and found >= size:
            raise GGUFError(
                f"{path}: tokenizer.ggml.{name}_token_id = {found}, but there are only {size} "
                "tokens"
            )
    ends = [ids[name] for name in ("eos", "eot", "eom") if ids[name] is not None]
    ends = list(dict.fromkeys(ends))
    return {
        "bos_token_id": ids["bos"],
        "eos_token_id": ends if len(ends) > 1 else (ends or [None])[0],
        "pad_token_id": ids["padding"],
    }


def _rope_scaling(
    path: str, metadata: dict[str, Any], freqs: ReaderTensor | None, config: dict
) -> dict:
    kind = metadata.get("llama.rope.scaling.type", "none")
    factor = _setting(path, metadata, "rope.scaling.factor", 1.0)
    if freqs is not None and kind == "none":
        length = _setting(path, metadata, "rope.scaling.original_context_length", 8192)
        return {"rope_scaling": _llama3_scaling(path, freqs, config, length)}
    if freqs is not None or kind not in ("none", "linear"):
        raise GGUFError(
            f"{path}: llama.rope.scaling.type = {kind!r}"
            f"{' with rope_freqs.weight' if freqs is not None else ''}; supported are 'none', "
            "'linear', and Llama 3's frequency factors in rope_freqs.weight without a type"
        )
    return {} if factor == 1.0 else {"rope_scaling": {"rope_type": "linear", "factor": factor}}


def _llama3_scaling(path: str, freqs: ReaderTensor, config: dict, length: int) -> dict:
    """Frequency factors back to the four numbers they were computed from, all but one known."""
    stored = np.asarray(freqs.data)
    scaling = {
        "rope_type": "llama3",
        "factor": float(stored[-1]),  # the longest wave is stretched by the full factor
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": length,
    }
    expected = _llama3_factors(config["rope_theta"], config["head_dim"], scaling)
    if not np.allclose(stored, expected, rtol=1e-3):
        raise GGUFError(
            f"{path}: rope_freqs.weight does not follow from {scaling} with rope_theta "
            f"{config['rope_theta']}: found {stored.tolist()}, expected {expected.tolist()}"
        )
    return scaling


def _llama3_factors(theta: float, head_dim: int, scaling: dict) -> np.ndarray:
    """By what Llama 3.1 divides each rotary frequency, [H / 2]."""
    waves = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] / waves
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - kept) / scaling["factor"] + kept)


def _by_hugging_face_name(path: str, tensors: dict[str, ReaderTensor]) -> dict[str, ReaderTensor]:
    names = {name: _hugging_face_name(name) for name in tensors}
    if unknown := [name for name, ours in names.items() if ours is None]:
        raise GGUFError(
            f"{path}: {len(unknown)} tensors that a plain Llama does not have: "
            f"{', '.join(unknown[:8])}"
        )
    for name, tensor in tensors.items():
        if (kind := tensor.tensor_type.name) not in TYPES:
            raise GGUFError(f"{path}: {name} is of type {kind}; supported are {', '.join(TYPES)}")
    return {names[name]: tensor for name, tensor in tensors.items()}


def _hugging_face_name(name: str) -> str | None:
    layer = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
    if layer is None:
        return GLOBAL_NAMES.get(name)
    below = LAYER_NAMES.get(layer[2])
    return f"model.layers.{layer[1]}.{below}" if below else None


def _shape(tensor: ReaderTensor) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(tensor.shape))  # GGUF has the fastest first


def _unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """From llama.cpp's rotary pairs (2i, 2i+1) to Hugging Face's (i, i + H/2); rows stay whole."""
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
