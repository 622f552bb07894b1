"""Read a llama.cpp GGUF file as if it were a Hugging Face folder.

A GGUF file holds the configuration, the tokenizer and the weights, mostly quantised, of one model.
`open_gguf` reads its header into a `GGUFModel`, whose tensors carry Hugging Face names and layout
and are dequantised one at a time; the tokenizer is rebuilt in `gguf_tokenizer`. No torch. The
optional package `gguf` does the parsing and the dequantisation: `pip install promptkd_jax[gguf]`.

Which architectures are read, and what their tensors are called, the families say: `Family.gguf`.
What could be misread is refused: a tensor or a setting of the architecture that is not understood
may change what the model computes, so each is an error. That leaves out mixtures of experts
(Mixtral also calls itself "llama"), attention biases, sliding windows, YaRN, and models in several
parts.

Sources: the GGUF specification (ggml, docs/gguf.md); for what the keys mean, llama.cpp's
convert_hf_to_gguf.py.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from promptkd_jax.infra.errors import GGUFError
from promptkd_jax.models.families.base import Family
from promptkd_jax.models.families.registry import FAMILIES, from_hugging_face
from promptkd_jax.models.io.safetensors import refuse_pointer
from promptkd_jax.models.rotary import rotary_frequencies

if TYPE_CHECKING:
    from gguf.gguf_reader import GGUFReader, ReaderTensor

# Q5_0, Q5_1 and IQ4_NL: what llama.cpp puts in a K-quant file where a row is no multiple of 256.
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL")
TYPES += ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")

# Settings that the file of every decoder has, by the field of config.json that says the same.
FIELDS = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "feed_forward_length": "intermediate_size",
    "context_length": "max_position_embeddings",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
# Those that have a default, and the three that change nothing.
OPTIONAL = ("attention.head_count_kv", "attention.key_length", "attention.value_length")
OPTIONAL += ("rope.dimension_count", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor")
OPTIONAL += ("rope.scaling.original_context_length",)
OPTIONAL += ("rope.scaling.finetuned", "tensor_data_layout", "vocab_size")


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
    _num_heads: dict[str, int] = field(repr=False)  # by the ending of names with permuted rows

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
        # [out, bytes of a row]: blocks of quantised numbers lie along the inputs, never across
        # rows, so that rows can be put in order and left out before anything is dequantised.
        rows = np.asarray(tensor.data)
        for ending, num_heads in self._num_heads.items():
            if name.endswith(ending):
                rows = _unpermute(rows, num_heads)
        if index is None or rows.ndim == 1:
            return _gguf().dequantize(rows, tensor.tensor_type)[index or ...]
        return _gguf().dequantize(rows[index[0]], tensor.tensor_type)[:, *index[1:]]


def open_gguf(path: str | os.PathLike[str]) -> GGUFModel:
    """Opens a GGUF file of an architecture that one of the families has; reads its header, no
    weights.

    Parsing takes seconds where the vocabulary is large. That all tensors are there, in the shapes
    that `config` asks for, is for `params.load_params` to check, as it does for every source.

    Raises:
      ModelError: a pointer of Git LFS in place of the file.
      GGUFError: not a whole GGUF file, of an architecture that is not read, or a setting or tensor
        that it does not have or that is of none of the `TYPES`; the package gguf is not installed.
      OSError: no such file, or not readable.
    """
    path = os.fspath(path)
    refuse_pointer(pathlib.Path(path))
    reader, metadata = _parse(path)
    family = _family(path, metadata)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(path, family, metadata, tensors)
    num_heads = {ending: config[field] for ending, field in family.gguf.rotary_pairs.items()}
    tensors = _by_hugging_face_name(path, family, tensors)
    return GGUFModel(path, config, metadata, tensors, num_heads)


def _gguf() -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise GGUFError(
            "reading a GGUF file needs the package gguf: pip install -e '.[gguf]' in a clone, or "
            "pip install 'promptkd_jax[gguf]'"
        ) from error
    return gguf


def _parse(path: str) -> tuple[GGUFReader, dict[str, Any]]:
    gguf = _gguf()
    try:
        reader = gguf.GGUFReader(path)
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


def _family(path: str, metadata: dict[str, Any]) -> Family:
    """The family whose file it is; refuses what is not one whole file of a plain one."""
    if (kind := metadata.get("general.type", "model")) != "model":
        raise GGUFError(
            f"{path}: general.type is {kind!r}, not 'model'; an adapter is merged into its base "
            "model by llama-export-lora"
        )
    families = {f.gguf.architecture: f for f in FAMILIES.values() if f.gguf}
    architecture = metadata.get("general.architecture")
    if architecture not in families:
        raise GGUFError(
            f"{path}: general.architecture is {architecture!r}; only "
            f"{', '.join(map(repr, families))} is read"
        )
    if (parts := metadata.get("split.count", 1)) > 1:
        raise GGUFError(f"{path}: one of {parts} parts; join them: llama-gguf-split --merge")
    family, prefix = families[architecture], f"{architecture}."
    understood = {*FIELDS, *OPTIONAL, *family.gguf.fields}
    for key, value in metadata.items():
        # An unknown setting that is 0 or false is switched off.
        if key.startswith(prefix) and key.removeprefix(prefix) not in understood and value:
            raise GGUFError(
                f"{path}: {key} = {value!r} is not supported: the model is not a plain "
                f"{family.model_type}, or the key is new; understood are {prefix}* with "
                f"{', '.join(sorted(understood))}"
            )
    return family


def _config(
    path: str, family: Family, metadata: dict[str, Any], tensors: dict[str, ReaderTensor]
) -> dict[str, Any]:
    """The `config.json` of the model; takes `rope_freqs.weight`, which says a part of it, out of
    the tensors."""
    architecture = family.gguf.architecture

    def setting(key: str, default: Any = None) -> Any:
        value = metadata.get(f"{architecture}.{key}", default)
        if value is None:
            raise GGUFError(
                f"{path}: no metadata {architecture}.{key}, which a {family.model_type} needs"
            )
        # Floats are stored as float32: 1e-5 would come out as 9.999999747378752e-06.
        return float(str(np.float32(value))) if isinstance(value, float) else value

    if "token_embd.weight" not in tensors:
        raise GGUFError(f"{path}: tensor token_embd.weight is missing")
    fields = FIELDS | family.gguf.fields
    config = {field: setting(key) for key, field in fields.items()}
    num_heads = config["num_attention_heads"]
    head_dim = setting("attention.key_length", config["hidden_size"] // num_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (found := setting(key, head_dim)) != head_dim:
            raise GGUFError(
                f"{path}: {architecture}.{key} = {found}; only the head width, {head_dim}, is "
                "supported"
            )
    config |= {
        "model_type": family.model_type,
        "architectures": [family.architecture],
        "num_key_value_heads": setting("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "rope_theta": setting("rope.freq_base", 10000.0),
        "vocab_size": _shape(tensors["token_embd.weight"])[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        **family.gguf.constants,
    }
    freqs = tensors.pop("rope_freqs.weight", None)
    kind, factor = setting("rope.scaling.type", "none"), setting("rope.scaling.factor", 1.0)
    if freqs is not None and kind == "none":
        length = setting("rope.scaling.original_context_length", 8192)
        config["rope_scaling"] = _llama3_scaling(path, freqs, config, length)
    elif freqs is not None or kind not in ("none", "linear"):
        raise GGUFError(
            f"{path}: {architecture}.rope.scaling.type = {kind!r}"
            f"{' with rope_freqs.weight' if freqs is not None else ''}; supported are 'none', "
            "'linear', and Llama 3's frequency factors in rope_freqs.weight without a type"
        )
    elif factor != 1.0:
        config["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    return config | _special_ids(path, metadata, config["vocab_size"])


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
    # By what each frequency, [H / 2], is divided.
    stretched = from_hugging_face(config | {"rope_scaling": scaling}, path)
    rope, shape = stretched.kind(0).rope, (stretched.head_dim, length, stretched.max_positions)
    plain = dataclasses.replace(rope, scaling=None)
    expected = np.asarray(rotary_frequencies(plain, *shape) / rotary_frequencies(rope, *shape))
    if not np.allclose(stored, expected, rtol=1e-3):
        raise GGUFError(
            f"{path}: rope_freqs.weight does not follow from {scaling} with rope_theta "
            f"{config['rope_theta']}: found {stored.tolist()}, expected {expected.tolist()}"
        )
    return scaling


def _by_hugging_face_name(
    path: str, family: Family, tensors: dict[str, ReaderTensor]
) -> dict[str, ReaderTensor]:
    renamed, unknown = {}, []
    for name, tensor in tensors.items():
        layer = re.match(r"blk\.(\d+)\.", name)
        pattern = name.replace(layer[0], "blk.{}.", 1) if layer else name
        if theirs := family.gguf.names.get(pattern):
            renamed[theirs.format(layer and layer[1])] = tensor
        else:
            unknown.append(name)
        if (kind := tensor.tensor_type.name) not in TYPES:
            raise GGUFError(f"{path}: {name} is of type {kind}; supported are {', '.join(TYPES)}")
    if unknown:
        raise GGUFError(
            f"{path}: {len(unknown)} tensors that a plain {family.model_type} does not have: "
            f"{', '.join(unknown[:8])}"
        )
    return renamed


def _shape(tensor: ReaderTensor) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(tensor.shape))  # GGUF has the fastest first


def _unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Llama.cpp's rotary pairs (2i, 2i+1) put as Hugging Face's (i, i + H/2); rows stay whole."""
    # [N H, …] as [N, H/2, 2, …], a pair beside itself, to [N, 2, H/2, …], all firsts before all
    # seconds.
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
