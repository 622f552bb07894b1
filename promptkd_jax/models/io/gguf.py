"""Read a llama.cpp GGUF file as if it were a Hugging Face folder.

A GGUF file holds the configuration, the tokenizer and the weights, mostly quantised, of one model.
`open_gguf` reads its header into a `GGUFModel`, whose tensors carry Hugging Face names and layout
and are dequantised one at a time; the tokenizer is rebuilt in `gguf_tokenizer`. No torch. The
optional package `gguf` does the parsing and the dequantisation: `pip install promptkd_jax[gguf]`.

Which architectures are read, and what their tensors are called, the families say: `Family.gguf`.
What could be misread is refused: a tensor or a setting of the architecture that is not understood
may change what the model computes, so each is an error. That leaves out mixtures of experts
(Mixtral also calls itself "llama"), attention biases of a Llama, YaRN, and models in several parts.

Sources: the GGUF specification (ggml, docs/gguf.md); for what the keys mean, llama.cpp's
convert_hf_to_gguf.py.
"""

from __future__ import annotations

import functools
import os
import pathlib
import re
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from promptkd_jax.infra.errors import GGUFError
from promptkd_jax.models.families.base import Family
from promptkd_jax.models.families.gguf_layout import GGUFLayout, Settings
from promptkd_jax.models.families.registry import FAMILIES
from promptkd_jax.models.io.safetensors import refuse_pointer

if TYPE_CHECKING:
    from gguf.gguf_reader import GGUFReader, ReaderTensor

EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
NORMS = "norm.weight"  # the ending of the Hugging Face names of their scales


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
    _layout: GGUFLayout = field(repr=False)

    def names(self) -> list[str]:
        """Hugging Face names of all tensors; `lm_head.weight` only where the head is untied."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor as in the Hugging Face model, [out, in] for a matrix."""
        shape = _shape(self._tensors[name])
        return shape[::-1] if name.endswith(self._layout.transposed) else shape

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
        tensor, layout = self._tensors[name], self._layout
        # [out, bytes of a row]: blocks of quantised numbers lie along the inputs, never across
        # rows, so that rows can be put in order and left out before anything is dequantised.
        rows = np.asarray(tensor.data)
        for ending, heads in layout.rotary_pairs.items():
            if name.endswith(ending):
                rows = unpermute(rows, self.config[heads])
        index = index or (slice(None),) * rows.ndim
        transposed = name.endswith(layout.transposed)
        first, *rest = reversed(index) if transposed else index
        if rows.ndim == 1:
            found = gguf_package().dequantize(rows, tensor.tensor_type)[first]
        else:
            found = gguf_package().dequantize(rows[first], tensor.tensor_type)[:, *rest]
        if layout.norm_offset and name.endswith(NORMS):
            found = found - np.float32(layout.norm_offset)
        return found.T if transposed else found


def open_gguf(path: str | os.PathLike[str]) -> GGUFModel:
    """Opens a GGUF file of an architecture that one of the families has; reads its header, no
    weights.

    Parsing takes seconds where the vocabulary is large. That all tensors are there, in the shapes
    that `config` asks for, is for `params.load_params` to check, as it does for every source.

    Raises:
      ModelError: a pointer of Git LFS in place of the file.
      GGUFError: not a whole GGUF file, of an architecture that is not read, or a setting or tensor
        that it does not have or that is of none of the `readable_types`; the package gguf is not
        installed.
      OSError: no such file, or not readable.
    """
    path = os.fspath(path)
    refuse_pointer(pathlib.Path(path))
    reader, metadata = _parse(path)
    family = _family(path, metadata)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if EMBEDDING not in tensors:
        raise GGUFError(f"{path}: tensor {EMBEDDING} is missing")
    # Settings in the form of tensors: by how much frequencies of rotary positions are scaled.
    factors = [name for name in tensors if name.startswith("rope_")]
    factors = {name: np.asarray(tensors.pop(name).data) for name in factors}
    settings = Settings(path, family.gguf.architecture, metadata, factors)
    vocab_size = _shape(tensors[EMBEDDING])[0]
    config = config_of(family, settings, vocab_size, tied=OUTPUT not in tensors)
    settings.refuse_others()
    config |= _special_ids(path, metadata, vocab_size)
    tensors = _by_hugging_face_name(path, family, tensors)
    return GGUFModel(path, config, metadata, tensors, family.gguf)


def family_of(architecture: str) -> Family | None:
    """The family whose files are of that architecture: of those that share one, the first."""
    return next(
        (f for f in FAMILIES.values() if f.gguf and f.gguf.architecture == architecture), None
    )


def config_of(family: Family, settings: Settings, vocab_size: int, *, tied: bool) -> dict[str, Any]:
    """The `config.json` that settings and factors say, but for the ids of special tokens.

    Raises:
      GGUFError: a setting is missing, or means what is not supported.
    """
    layout = family.gguf
    return {
        "model_type": family.model_type,
        "architectures": [family.architecture],
        "vocab_size": vocab_size,
        "tie_word_embeddings": tied,
        **{field: settings(name) for name, field in layout.fields.items()},
        **layout.read(settings),
        **layout.constants,
    }


def gguf_package() -> ModuleType:
    """The optional package that parses and quantises.

    Raises:
      GGUFError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise GGUFError(
            "a GGUF file needs the package gguf: pip install -e '.[gguf]' in a clone, or "
            "pip install 'promptkd_jax[gguf]'"
        ) from error
    return gguf


@functools.cache
def readable_types() -> tuple[str, ...]:
    """The types of tensors that the package gguf dequantises, whatever its version."""
    gguf, found = gguf_package(), []
    for kind, (_, size) in gguf.GGML_QUANT_SIZES.items():
        try:
            gguf.dequantize(np.zeros((1, size), np.uint8), kind)
        except NotImplementedError:
            continue
        found.append(kind.name)
    return tuple(found)


def _parse(path: str) -> tuple[GGUFReader, dict[str, Any]]:
    gguf = gguf_package()
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
    # An adapter names the same architecture as the model that it changes.
    if (kind := metadata.get("general.type", "model")) != "model":
        raise GGUFError(
            f"{path}: general.type is {kind!r}, not 'model'; an adapter is merged into its base "
            "model by llama-export-lora"
        )
    architecture = metadata.get("general.architecture")
    if (family := family_of(architecture)) is None:
        known = sorted({f.gguf.architecture for f in FAMILIES.values() if f.gguf})
        raise GGUFError(
            f"{path}: general.architecture is {architecture!r}; only "
            f"{', '.join(map(repr, known))} is read"
        )
    if (parts := metadata.get("split.count", 1)) > 1:
        raise GGUFError(f"{path}: one of {parts} parts; join them: llama-gguf-split --merge")
    return family


def _special_ids(path: str, metadata: dict[str, Any], size: int) -> dict:
    names = ("bos", "eos", "eot", "eom", "padding", "unknown")
    ids = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in names}
    for name, found in ids.items():
        if found is not None and found >= size:
            raise GGUFError(
                f"{path}: tokenizer.ggml.{name}_token_id = {found}, but there are only {size} "
                "tokens"
            )
    # A text ends by eos, a turn by eot or eom (of a message, before a tool answers).
    ends = [ids[name] for name in ("eos", "eot", "eom") if ids[name] is not None]
    ends = list(dict.fromkeys(ends))
    return {
        "bos_token_id": ids["bos"],
        "eos_token_id": ends if len(ends) > 1 else (ends or [None])[0],
        "pad_token_id": ids["padding"],
    }


def _by_hugging_face_name(
    path: str, family: Family, tensors: dict[str, ReaderTensor]
) -> dict[str, ReaderTensor]:
    renamed, unknown = {}, []
    for name, tensor in tensors.items():
        # blk.7.attn_q.weight -> blk.{}.attn_q.weight -> model.layers.7.self_attn.q_proj.weight
        layer = re.match(r"blk\.(\d+)\.", name)
        pattern = name.replace(layer[0], "blk.{}.", 1) if layer else name
        if theirs := family.gguf.names.get(pattern):
            renamed[theirs.format(layer and layer[1])] = tensor
        else:
            unknown.append(name)
        if (kind := tensor.tensor_type.name) not in readable_types():
            raise GGUFError(
                f"{path}: {name} is of type {kind}; supported are {', '.join(readable_types())}"
            )
    if unknown:
        raise GGUFError(
            f"{path}: {len(unknown)} tensors that a plain {family.model_type} does not have: "
            f"{', '.join(unknown[:8])}"
        )
    return renamed


def _shape(tensor: ReaderTensor) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(tensor.shape))  # GGUF has the fastest first


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Llama.cpp's rotary pairs (2i, 2i+1) put as Hugging Face's (i, i + H/2); rows stay whole."""
    # [N H, …] as [N, H/2, 2, …], a pair beside itself, to [N, 2, H/2, …], all firsts before all
    # seconds.
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
