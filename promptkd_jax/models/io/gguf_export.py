"""Export of a model to a GGUF file, which llama.cpp and what is built on it run.

What `gguf` and `gguf_tokenizer` read, written: the same tables of the families, the other way
round. That a file says all of a model is seen by reading its settings back, before the first weight
is written. Weights are brought to the host and quantised one tensor after another, wherever the
parameters lie; the optional package `gguf` does it: `pip install promptkd_jax[gguf]`.

Source: llama.cpp's converter, convert_hf_to_gguf.py and conversion/.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from promptkd_jax.infra import distributed, files
from promptkd_jax.infra.errors import GGUFError
from promptkd_jax.models.config import DecoderConfig
from promptkd_jax.models.families.base import Family
from promptkd_jax.models.families.gguf_layout import SIZES, GGUFLayout, Settings
from promptkd_jax.models.families.registry import FAMILIES, from_hugging_face
from promptkd_jax.models.io.export import as_local, stored_shapes, stored_tensors
from promptkd_jax.models.io.gguf import NORMS, config_of, family_of, gguf_package
from promptkd_jax.models.io.gguf_tokenizer import tokenizer_metadata
from promptkd_jax.models.io.params import all_finite
from promptkd_jax.models.model import Model, check_text

# The types of matrices that the package gguf quantises, smaller and smaller. Others (the K-quants:
# Q4_K_M, Q6_K) llama.cpp's own `llama-quantize` makes from a file in f32, f16 or bf16.
QUANTIZATIONS = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
_POSITIONS = "position_embd.weight"


def save_gguf(file: str | os.PathLike, model: Model, *, quantize: str = "f16") -> None:
    """Writes a model as one GGUF file: weights, tokenizer and chat template.

    Matrices are written as `quantize` says, all else and tables of positions in float32. Host
    memory holds one tensor at a time, for a moment twice. The file appears when it is whole. All
    processes must call it, and go on when the first has written everything.

    Args:
      file: its folder is made where absent; also one in a bucket, such as gs://bucket/model.gguf.
      quantize: one of `QUANTIZATIONS`.

    Raises:
      ModelError: a model without tokenizer or EOS.
      GGUFError: llama.cpp does not run the family, or not as this model computes it; it does not
        know the tokenizer; rows are no multiple of the blocks of `quantize`; the package gguf is
        not installed.
    """
    header = _header(model, quantize)
    config = model.decoder.config
    layout, factors = FAMILIES[config.family].gguf, header.factors.values()
    # To bring a tensor to the host is a collective of all processes; the first alone writes it.
    tensors = (
        _as_stored(name, array, layout, header.described)
        for name, array in stored_tensors(model.params, config)
    )
    target = _Target(files.to_path(file), layout.architecture)
    with contextlib.ExitStack() as stack:
        stack.callback(target.discard)
        distributed.run_on_primary(functools.partial(target.open, header))
        for entry, array in zip(header.entries, itertools.chain(tensors, factors), strict=True):
            distributed.run_on_primary(functools.partial(target.write, array, entry))
        distributed.run_on_primary(target.close)


def check_gguf(model: Model, quantize: str) -> None:
    """Raises what `save_gguf` would, without looking at `model.params`."""
    _header(model, quantize)


class _Entry(NamedTuple):
    """A tensor as the header of a file has it: its name, its shape, [out, in], and its type."""

    name: str
    shape: tuple[int, ...]
    kind: Any  # gguf.GGMLQuantizationType


class _Header(NamedTuple):
    """All of a file but its weights.

    Attributes:
      metadata: its keys and values.
      entries: its tensors, in their order.
      factors: the last of them.
      described: the `config.json` that it says.
    """

    metadata: dict[str, Any]
    entries: list[_Entry]
    factors: dict[str, np.ndarray]
    described: dict[str, Any]


def _header(model: Model, quantize: str) -> _Header:
    gguf = gguf_package()
    check_text(model)
    config = model.decoder.config
    family = FAMILIES[config.family]
    factors, described = _described(model.name, family, config)
    metadata = {
        "general.type": "model",
        "general.file_type": _file_type(gguf, quantize),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        **({"general.license": model.card["license"]} if "license" in model.card else {}),
        **{f"{family.gguf.architecture}.{x}": y for x, y in _settings(family, config).items()},
        **tokenizer_metadata(model),
    }
    entries = _entries(model, family, gguf.GGMLQuantizationType[quantize.upper()])
    full = gguf.GGMLQuantizationType.F32
    entries += [_Entry(name, array.shape, full) for name, array in factors.items()]
    return _Header(metadata, entries, factors, described)


class _Target:
    """A GGUF file that is being written, by the first process alone."""

    def __init__(self, file: epath.Path, architecture: str):
        self._file, self._architecture = file, architecture
        self._stack, self._unfinished = contextlib.ExitStack(), None

    def open(self, header: _Header) -> None:
        gguf = gguf_package()
        files.make_folder(self._file.parent)
        folder = self._stack.enter_context(as_local(self._file.parent))
        self._whole = folder / self._file.name
        self._unfinished = self._whole.with_suffix(".unfinished")
        self._writer = writer = gguf.GGUFWriter(self._unfinished, self._architecture)
        add = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
        for key, value in header.metadata.items():
            getattr(writer, f"add_{add[type(value)]}")(key, value)
        for name, shape, kind in header.entries:
            numbers, size = gguf.GGML_QUANT_SIZES[kind]  # of a block, and its bytes
            size *= math.prod(shape) // numbers
            writer.add_tensor_info(name, shape, np.dtype("float32"), size, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()

    def write(self, array: np.ndarray, entry: _Entry) -> None:
        with np.errstate(over="ignore", invalid="ignore"):
            stored = gguf_package().quantize(array, entry.kind)
        halved = stored if stored.dtype == np.float16 else array
        if not (all_finite(np.ascontiguousarray(array)) and all_finite(halved)):
            raise GGUFError(
                f"tensor {entry.name} has a NaN, or a number that {entry.kind.name.lower()} cannot "
                "hold"
            )
        self._writer.write_tensor_data(stored)

    def discard(self) -> None:
        """Removes what was not finished; nothing where all was."""
        if self._unfinished:
            self._unfinished.unlink(missing_ok=True)
        self._stack.close()

    def close(self) -> None:
        self._writer.close()
        self._unfinished.replace(self._whole)
        self._stack.close()


def _settings(family: Family, config: DecoderConfig) -> dict[str, Any]:
    layout = family.gguf
    sizes = {name: getattr(config, SIZES[name]) for name in layout.fields if name in SIZES}
    return sizes | layout.write(config) | {"vocab_size": config.vocab_size}


def _described(
    name: str, family: Family, config: DecoderConfig
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The factors of a file, and the `config.json` that it says.

    Raises:
      GGUFError: that is another model.
    """
    if family.gguf is None:
        runs = ", ".join(name for name, x in FAMILIES.items() if x.gguf)
        raise GGUFError(
            f"{name}: GGUF files of the family {config.family} are not written here; those of "
            f"{runs} are"
        )
    architecture, factors = family.gguf.architecture, family.gguf.factors(config)
    settings = {f"{architecture}.{key}": x for key, x in _settings(family, config).items()}
    settings = Settings(name, architecture, settings, factors)
    described = config_of(family_of(architecture), settings, config.vocab_size, tied=config.tied)
    settings.refuse_others()
    found = from_hugging_face(described, f"{name}: as llama.cpp's {architecture}")
    # How it is trained and run is no part of what a file says.
    unsaid = ("family", "dropout", "lora", "quantization")
    unsaid += ("dtype", "param_dtype", "remat", "tensor_parts")
    found = found.replace(**{field: getattr(config, field) for field in unsaid})
    if difference := _difference(config, found):
        raise GGUFError(
            f"{name}: no GGUF file can say what this model is: its {difference} for llama.cpp's "
            f"{architecture}"
        )
    return factors, described


def _difference(ours: Any, theirs: Any, place: str = "") -> str:
    """The first difference of two configs, as words; "" for none that float32 can tell apart."""
    if dataclasses.is_dataclass(ours) and type(ours) is type(theirs):
        parts = [(f"{place}.{f.name}".strip("."), f.name) for f in dataclasses.fields(ours)]
        parts = [(at, getattr(ours, x), getattr(theirs, x)) for at, x in parts]
    elif isinstance(ours, tuple) and isinstance(theirs, tuple) and len(ours) == len(theirs):
        parts = [(f"{place}[{i}]", x, y) for i, (x, y) in enumerate(zip(ours, theirs))]
    elif isinstance(ours, float) and isinstance(theirs, float):
        same = math.isclose(ours, theirs, rel_tol=1e-6)
        return "" if same else f"{place} is {ours!r}, but {theirs!r}"
    else:
        return "" if ours == theirs else f"{place} is {ours!r}, but {theirs!r}"
    found = (_difference(x, y, at) for at, x, y in parts)
    return next(filter(None, found), "")


def _entries(model: Model, family: Family, kind: Any) -> list[_Entry]:
    """Those of `stored_tensors`, in its order: matrices of a type, all else in float32."""
    gguf, layout, config, entries = gguf_package(), family.gguf, model.decoder.config, []
    names = {ours: theirs for theirs, ours in layout.names.items()}
    for name, shape in stored_shapes(config).items():
        layer = re.search(r"\.(\d+)\.", name)
        pattern = name.replace(layer[0], ".{}.", 1) if layer else name
        if pattern not in names:
            raise GGUFError(f"{model.name}: llama.cpp's {layout.architecture} has no {name}")
        theirs = names[pattern].format(layer and layer[1])
        matrix = len(shape) > 1 and theirs != _POSITIONS
        shape = shape[::-1] if name.endswith(layout.transposed) else shape
        entry = _Entry(theirs, shape, kind if matrix else gguf.GGMLQuantizationType.F32)
        if shape[-1] % (numbers := gguf.GGML_QUANT_SIZES[entry.kind][0]):
            raise GGUFError(
                f"{model.name}: {theirs} has {shape[-1]} numbers in a row; {kind.name.lower()} has "
                f"blocks of {numbers}: write it as f32, f16 or bf16"
            )
        entries.append(entry)
    return entries


def _as_stored(
    name: str, array: np.ndarray, layout: GGUFLayout, described: Mapping[str, Any]
) -> np.ndarray:
    """A tensor in the layout of the file, float32."""
    array = array.astype(np.float32)
    for ending, heads in layout.rotary_pairs.items():
        if name.endswith(ending):
            array = _permute(array, described[heads])
    if layout.norm_offset and name.endswith(NORMS):
        array = array + np.float32(layout.norm_offset)
    return np.ascontiguousarray(array.T if name.endswith(layout.transposed) else array)


def _permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """The rotary pairs (i, i + H/2) of Hugging Face put as llama.cpp's, (2i, 2i+1)."""
    # [N H, …] as [N, 2, H/2, …], all firsts before all seconds, to [N, H/2, 2, …].
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _file_type(gguf: Any, quantize: str) -> int:
    name = "ALL_F32" if quantize == "f32" else f"MOSTLY_{quantize.upper()}"
    return int(gguf.LlamaFileType[name])
