"""Models in files that are not read, written anew as a folder of safetensors.

`pytorch_model.bin`, also in shards, is read by torch's loader of weights alone, which runs nothing
that a pickle says; torch is not needed otherwise. A LoRA adapter is added to the matrices of its
base model, W + s B A (Hu et al. 2021, arXiv 2106.09685), as PEFT's `merge_and_unload` does. Weights
in FP8 or MXFP4 are dequantised.
"""

import collections
import math
import pathlib
import re
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from promptkd_jax.infra import files
from promptkd_jax.infra.errors import ModelError
from promptkd_jax.models.families.quantised import CONFIG_KEYS, read_quantisation
from promptkd_jax.models.families.registry import from_hugging_face
from promptkd_jax.models.io.dequantise import plain_tensors
from promptkd_jax.models.io.export import in_dtype, shard_files, write_tensors
from promptkd_jax.models.io.hub import download, local_path, resolve_model
from promptkd_jax.models.io.safetensors import (
    SINGLE,
    SMALL_FILES,
    SafetensorsFolder,
    listed_files,
    read_json,
    refuse_pointer,
    soft_prompt_use,
)

ADAPTER = "adapter_config.json"
_BIN, _BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_TORCH = "torch is needed to read it: pip install torch, or pip install -e '.[parity]' in a clone"
# What reading garbage as a pickle raises besides.
_OF_GARBAGE = (ValueError, LookupError, TypeError, AttributeError)
# What an adapter of PEFT may have that merging it needs to know; others are switched off.
_PLAIN = {
    "use_dora": False,
    "bias": "none",
    "trainable_token_indices": None,
    "alora_invocation_tokens": None,
    "layer_replication": None,
}
# Beginnings that leave the base model as it is; PiSSA, OLoRA, CorDA and LoftQ take from it what the
# adapter has.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal")

Shard = tuple[str, Mapping[str, np.ndarray]]  # a file's name, and its tensors


class _Source(NamedTuple):
    """A model to convert, and what is said of it."""

    said: str
    shards: Iterable[Shard]
    folders: Sequence[pathlib.Path]  # of configs and tokenizers: later ones add to the first
    dtype: str = ""  # in which weights are written that are not as they are stored


def convert(path: str, output: pathlib.Path, *, base: str = "", dtype: str = "") -> str:
    """Writes a model into a folder that `load_model` reads, and says what it was.

    Host memory holds the tensors of one file at a time.

    Args:
      path: a folder or hub id: of weights in FP8 or MXFP4, of `pytorch_model.bin` files, or of a
        LoRA adapter.
      output: a new folder of a disk.
      base: of an adapter, in place of the one that it names.
      dtype: of the weights; "": as they are stored, dequantised ones in bfloat16.

    Raises:
      ModelError: it is none of these, or something in it would be lost or cannot be read.
    """
    folder = local_path(path)
    if path.startswith("package:"):
        raise ModelError(f"{path}: is read as it is: give it itself")
    if folder.is_file():
        raise ModelError(f"{folder}: is a file; expected the folder of a model, or a hub id")
    if not folder.is_dir():
        folder = download(path, SMALL_FILES)
    if (folder / ADAPTER).exists():
        source = _adapter(path, base)
    elif not (folder / "config.json").exists():
        raise ModelError(
            f"{folder}: nothing to convert; expected a model's config.json with {_BIN} or with "
            f"weights in FP8 or MXFP4, or a LoRA adapter's {ADAPTER}"
        )
    elif base:
        raise ModelError(f"{path}: is no adapter (no {ADAPTER}), which --base is for")
    else:
        source = _model(path, folder, dtype)
    # One shard after the other is made and written, so that the host never holds the whole.
    output.mkdir(parents=True, exist_ok=True)
    where, total = {}, 0
    for file, tensors in source.shards:
        if dtype:
            tensors = {name: in_dtype(array, name, dtype) for name, array in tensors.items()}
        write_tensors(output / file, tensors)
        where |= dict.fromkeys(tensors, file)
        total += sum(x.nbytes for x in tensors.values())
    if len(set(where.values())) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        files.write_json(files.to_path(output / f"{SINGLE}.index.json"), index)
    # An adapter's tokenizer takes the place of its base's: training may have added tokens to it.
    for folder in source.folders:
        _copy_small_files(folder, output, overwrite=folder is not source.folders[0])
    if dtype := dtype or source.dtype:
        config = read_json(output / "config.json")
        kept = {x: config[x] for x in config if x not in (*CONFIG_KEYS, "torch_dtype")}
        files.write_json(files.to_path(output / "config.json"), kept | {"dtype": dtype})
    return source.said


def adapter_folder(path: str) -> pathlib.Path:
    """The folder of an adapter: one of this machine, that of a run, or of the hub. Raises
    ModelError: it is nowhere."""
    folder = local_path(path)
    if (folder / "adapter" / ADAPTER).exists():  # of a run
        return folder / "adapter"
    return folder if folder.is_dir() else download(path, [*SMALL_FILES, *_ADAPTER_FILES])


def _adapter(path: str, base: str) -> _Source:
    lora = read_lora(folder := adapter_folder(path))
    named = base or str(lora.config.get("base_model_name_or_path") or "")
    if not named:
        raise ModelError(f"{folder / ADAPTER}: names no base model; give it by --base")
    try:
        source = SafetensorsFolder(plain := resolve_model(named), named)
    except ModelError as error:
        remedy = "" if base else "; another base model of the same shapes can be given by --base"
        raise ModelError(f"the base model of {folder / ADAPTER}: {error}{remedy}") from error
    return _Source(f"a LoRA adapter of {named}, merged", _merged(source, lora), [plain, folder])


def _model(path: str, folder: pathlib.Path, dtype: str) -> _Source:
    config, where = read_json(folder / "config.json"), f"{folder}: config"
    quantisation = read_quantisation(config)
    if quantisation and not quantisation.is_read:
        raise ModelError(f"{where}: {quantisation.fault(path)}")
    # Refused here, if no family reads it: before weights are downloaded, and not after.
    from_hugging_face({key: config[key] for key in config if key not in CONFIG_KEYS}, where)
    if not local_path(path).is_dir():
        folder = download(path, [*SMALL_FILES, SINGLE, *listed_files(folder)])
    # Kernels in blocks with scales (FP8, MXFP4) become plain ones, tensor by tensor; else there are
    # files of torch, each of which becomes one of safetensors.
    if quantisation or all((folder / name).exists() for name in listed_files(folder)):
        source, dtype = SafetensorsFolder(folder, path, scaled=True), dtype or "bfloat16"
        tensors = plain_tensors(source, quantisation.block if quantisation else (), dtype)
        if not tensors:
            raise ModelError(f"{folder}: has weights that are read as they are: give it itself")
        names = shard_files({name: tensor.nbytes for name, tensor in tensors.items()})
        shards = ((file, {x: tensors[x].read() for x in some}) for file, some in names.items())
        said = quantisation.name if quantisation else "quantised weights"
        return _Source(f"{said}, dequantised to {dtype}", shards, [folder], dtype)
    names = _bin_files(folder)
    if not local_path(path).is_dir():
        folder = download(path, [*SMALL_FILES, *names])
    shards = ((_as_safetensors(name), read_torch(folder / name)) for name in names)
    return _Source(", ".join(names), shards, [folder])


def _copy_small_files(source: pathlib.Path, output: pathlib.Path, *, overwrite: bool) -> None:
    """Configs, tokenizers and templates; of an adapter, what its own training has changed."""
    skipped = {ADAPTER, _BIN_INDEX, f"{SINGLE}.index.json", "hf_quant_config.json"}
    skipped |= {"config.json", "README.md"} if overwrite else set()
    for pattern in SMALL_FILES:
        for file in source.glob(pattern):
            if file.name not in skipped:
                shutil.copyfile(file, output / file.name)


# Files of torch


def _bin_files(folder: pathlib.Path) -> list[str]:
    index = folder / _BIN_INDEX
    if not index.exists():
        names = [_BIN]
    else:
        found = read_json(index).get("weight_map")
        names = sorted(set(found.values())) if isinstance(found, dict) else []
        if not names or not all(re.fullmatch(r"[\w.-]+\.bin", str(name)) for name in names):
            raise ModelError(f"{index}: has no weight_map, of tensors and the files they are in")
    return names


def _as_safetensors(name: str) -> str:
    return name.replace("pytorch_model", "model").removesuffix(".bin") + ".safetensors"


def read_torch(file: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of a file of torch, by name, in their dtypes.

    Raises:
      ModelError: torch is not installed; or there is no such file, or anything in it but tensors.
    """
    try:
        import torch
    except ImportError as error:
        raise ModelError(f"{file}: {_TORCH}") from error
    import pickle

    if not file.exists():
        raise ModelError(f"{file}: no such file")
    refuse_pointer(file)
    try:
        found = torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
    except (pickle.UnpicklingError, RuntimeError, EOFError, *_OF_GARBAGE) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"{file}: torch's loader of weights alone refuses it: {first}; a file that needs more "
            "may run code: get the weights as safetensors"
        ) from error
    values = found.values() if isinstance(found, Mapping) else [found]
    if not isinstance(found, Mapping) or not all(isinstance(x, torch.Tensor) for x in values):
        raise ModelError(f"{file}: holds something else than tensors by their names")
    return {str(name): _to_numpy(tensor, file) for name, tensor in found.items()}


def _to_numpy(tensor: Any, file: pathlib.Path) -> np.ndarray:
    import torch

    tensor = tensor.detach().contiguous()
    # NumPy has no bfloat16: the same bytes go over as int16, and are given their dtype there.
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    if tensor.dtype.itemsize == 1 and tensor.is_floating_point():
        raise ModelError(f"{file}: has weights in {tensor.dtype}; only plain ones are converted")
    return tensor.numpy()


# Adapters


class StoredLoRA(NamedTuple):
    """An adapter: its config, and its tensors by the modules that they belong to."""

    folder: pathlib.Path
    config: Mapping[str, Any]
    pairs: Mapping[str, dict[str, np.ndarray]]  # module -> "A" [r, in], "B" [out, r]
    whole: Mapping[str, np.ndarray]  # name -> what takes the place of a tensor

    def scale(self, module: str) -> float:
        """The factor s of a module's change."""
        config, rank = self.config, len(self.pairs[module]["A"])
        alpha = _of_module(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
        return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)

    def change(self, module: str) -> np.ndarray:
        """s B A of a module, [out, in], float32."""
        a, b = (self.pairs[module][side].astype(np.float32) for side in "AB")
        return self.scale(module) * (b @ a)


def _of_module(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """What a pattern of PEFT says of a module: its keys are the ends of names."""
    found = (x for key, x in pattern.items() if re.fullmatch(rf"(.*\.)?({key})", module))
    return next(found, default)


def read_lora(folder: pathlib.Path) -> StoredLoRA:
    """Reads a LoRA adapter of PEFT.

    Raises:
      ModelError: it is none, or has anything that is more than low-rank changes of matrices.
    """
    config = read_json(folder / ADAPTER)
    if (kind := config.get("peft_type")) == "PROMPT_TUNING":
        use = soft_prompt_use(config.get("base_model_name_or_path"))
        raise ModelError(f"{folder}: cannot be merged into a model: {use}")
    if kind != "LORA":
        raise ModelError(
            f"{folder}: is a PEFT adapter ({kind}), of which only LORA can be merged into a model"
        )
    for name, plain in _PLAIN.items():
        if config.get(name, plain) not in (plain, None):
            raise ModelError(f"{folder / ADAPTER}: {name} = {config[name]!r} cannot be merged here")
    if (init := config.get("init_lora_weights", True)) not in _INITS:
        raise ModelError(
            f"{folder / ADAPTER}: init_lora_weights = {init!r}, which changes the base model too; "
            "expected an adapter of the base itself: PEFT's save_pretrained(…, "
            "path_initial_model_for_weight_conversion=…)"
        )
    present = [name for name in _ADAPTER_FILES if (folder / name).exists()]
    if not present:
        raise ModelError(f"{folder}: has none of {', '.join(_ADAPTER_FILES)}")
    if present[0].endswith(".bin"):
        tensors = read_torch(folder / present[0])
    else:
        from safetensors.numpy import load_file

        tensors = load_file(folder / present[0])
    pairs, whole = {}, {}
    for name, array in tensors.items():
        ours = name.removeprefix("base_model.model.")
        if found := re.fullmatch(r"(.+)\.lora_([AB])\.weight", ours):
            pairs.setdefault(found[1], {})[found[2]] = array
        elif "lora_" in ours:
            raise ModelError(f"{folder}: its tensor {name} cannot be merged here")
        else:
            whole[ours] = array
    if odd := [module for module, pair in pairs.items() if len(pair) != 2]:
        raise ModelError(f"{folder}: {odd[0]} has lora_A or lora_B, and not the other")
    return StoredLoRA(folder, config, pairs, whole)


def _merged(source: SafetensorsFolder, lora: StoredLoRA) -> Iterator[Shard]:
    places = {without_prefix(name): name for name in source.names()}
    changes = {f"{module}.weight": module for module in lora.pairs}
    wanted = {without_prefix(name): name for name in (*changes, *lora.whole)}
    if missing := [name for short, name in wanted.items() if short not in places]:
        raise ModelError(f"{lora.folder}: changes {missing[0]}, which {source.path} does not have")
    by_file = collections.defaultdict(list)
    for name in source.names():
        by_file[source.file_of(name)].append(name)
    for file, names in by_file.items():
        tensors = {}
        for name in names:
            array = source.read(name)
            if (adapted := wanted.get(without_prefix(name))) is not None:
                array = _adapted(array, adapted, changes.get(adapted), lora)
            tensors[name] = array
        yield file, tensors


def _adapted(array: np.ndarray, name: str, module: str | None, lora: StoredLoRA) -> np.ndarray:
    if module is None:
        new = lora.whole[name]
    else:
        change = lora.change(module)
        change = change.T if lora.config.get("fan_in_fan_out") else change
        new = array.astype(np.float32) + change if change.shape == array.shape else change
    if new.shape != array.shape:
        raise ModelError(
            f"{lora.folder}: {name} is {list(new.shape)}, in the base model {list(array.shape)}"
        )
    return new.astype(array.dtype)


def without_prefix(name: str) -> str:
    """A name as of a base model alone: files have it so, or behind that of one with its head."""
    return re.sub(r"^(transformer|model|model\.decoder)\.", "", name)
