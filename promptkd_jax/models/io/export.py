"""Export of parameters to a folder that `transformers` loads.

Stored tensors are brought to the host one after another and written shard by shard, wherever the
parameters lie. All processes take part; the first one writes.
"""

import collections
import contextlib
import functools
import itertools
import json
import math
import os
import pathlib
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import einops
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util
from safetensors import SafetensorError
from safetensors.numpy import save_file

from promptkd_jax.infra import distributed, files, sharding
from promptkd_jax.infra.errors import ModelError
from promptkd_jax.models.config import DecoderConfig
from promptkd_jax.models.families.base import Tensor, sizes, stack_sizes
from promptkd_jax.models.families.registry import FAMILIES
from promptkd_jax.models.io.params import PIECE_BYTES, all_finite, stored_names
from promptkd_jax.models.layers.lora import A, B, merged
from promptkd_jax.models.layers.quantization import (
    axes_of,
    dequantize_kernels,
    is_quantized,
    scale_path,
)
from promptkd_jax.models.model import Model

SHARD_BYTES = 5 * 10**9
STORED_IN = ("bfloat16", "float16", "float32")  # what readers of a folder know


def to_hugging_face(params: Any, config: DecoderConfig) -> dict[str, np.ndarray]:
    """All tensors under their Hugging Face names and in their layout, without padding, an adapter
    merged into them: the inverse of loading."""
    return dict(stored_tensors(params, config))


def stored_tensors(params: Any, config: DecoderConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Yields what `to_hugging_face` gives, one by one. All processes must take them in step."""
    flat = traverse_util.flatten_dict(params, sep="/")
    letters = sizes(config)
    for names, rows in _rows_by_tensor(config):
        stack = stack_sizes(rows[0], config)
        arrays = zip(*(_values(flat, row.path, stack, config) for row in rows), strict=True)
        for name, parts in zip(names, arrays, strict=True):
            # Each without padding, in the layout of the file; fused ones end to end.
            parts = [
                einops.rearrange(part[tuple(slice(letters[x]) for x in row.ours)], row.to_stored)
                for row, part in zip(rows, parts, strict=True)
            ]
            whole = parts[0] if len(parts) == 1 else np.concatenate(parts, rows[0].fused_axis)
            yield name, np.ascontiguousarray(whole)


def stored_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each of `stored_tensors`, by name, in their order."""
    return {
        name: row.stored_shape(sizes(config))
        for names, (row, *_) in _rows_by_tensor(config)
        for name in names
    }


def _rows_by_tensor(config: DecoderConfig) -> Iterator[tuple[list[str], list[Tensor]]]:
    """Yields the names of a tensor, of all layers and experts, and its rows: several where it is
    fused."""
    family, rows = FAMILIES[config.family], collections.defaultdict(list)
    for row in family.tensors(config):
        rows[row.name].append(row)
    for parts in rows.values():
        yield list(stored_names(parts[0], config, family.prefix)), parts


def _values(flat: Mapping[str, Any], path: str, stack: tuple[int, ...], config: DecoderConfig):
    """Yields a parameter as `_on_host` does, the change of an adapter merged into it."""
    a, b = (path.removesuffix("kernel") + name for name in (A, B))
    kernels = _plain(flat, path, stack, config)
    if a not in flat:
        yield from kernels
        return
    changes = (_on_host(flat[x], stack) for x in (a, b))
    for kernel, *change in zip(kernels, *changes, strict=True):
        yield merged(kernel, *change, config.lora.scale)


def _plain(flat: Mapping[str, Any], path: str, stack: tuple[int, ...], config: DecoderConfig):
    """Yields a parameter as `_on_host` does, a quantised kernel in the dtype of parameters."""
    how = config.quantization
    if how is None or not is_quantized(path):
        yield from _on_host(flat[path], stack)
        return
    both = (_on_host(flat[x], stack) for x in (path, scale_path(path)))
    for kernel in zip(*both, strict=True):
        inputs = axes_of(path)["inputs"]
        yield np.asarray(dequantize_kernels(*kernel, how, config.param_dtype, inputs=inputs))


def _on_host(x: Any, stack: tuple[int, ...]) -> Iterator[np.ndarray]:
    """A parameter whole, or each of its layers, or of their experts, without those that are
    padding; large layers are brought one by one."""
    if not stack or x.nbytes <= PIECE_BYTES:
        whole = sharding.to_host(x)
        yield from (whole[place] for place in np.ndindex(stack))
        return
    for layer in range(x.shape[0]):
        # An index by a number is a dynamic slice: compiled once for all layers.
        whole = sharding.to_host(x[layer])
        yield from (whole[place] for place in np.ndindex(stack[1:]))


def save_model(folder: str | os.PathLike, model: Model, *, card: str | None = None) -> None:
    """Writes a folder for `AutoModelForCausalLM.from_pretrained`.

    `config.json`, safetensors (in shards of 5 GB with an index where larger), the tokenizer,
    `generation_config.json`, and `card` as README.md. The weights are written in `param_dtype` of
    the decoder's config, whatever the parameters are in. Host memory holds the tensors of one shard
    at a time. All processes must call it, and go on when the first has written everything.

    Args:
      folder: made where absent; also one in a bucket, such as gs://bucket/folder.

    Raises:
      ModelError: a file of weights cannot be written, or a weight is not finite in that dtype.
    """
    folder = files.to_path(folder)
    distributed.run_on_primary(functools.partial(_save_all_but_weights, folder, model, card))
    _save_tensors(folder, model)


def save_without_weights(folder: str | os.PathLike, model: Model) -> None:
    """Writes all of `save_model` but the weights: `load.load_without_weights` reads it back.

    All processes must call it, and go on when the first has written everything.
    """
    known = "".join(f"{key}: {value}\n" for key, value in sorted(model.card.items()))
    card, folder = f"---\n{known}---\n", files.to_path(folder)
    distributed.run_on_primary(functools.partial(_save_all_but_weights, folder, model, card))


def _save_all_but_weights(folder: epath.Path, model: Model, card: str | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(folder / "config.json", _config_json(model))
    files.write_json(folder / "generation_config.json", _generation_json(model))
    if model.tokenizer is not None:
        with as_local(folder) as local:
            model.tokenizer.save_pretrained(local)
            _make_readable_by_transformers_4(local / "tokenizer_config.json")
    if card is not None:
        (folder / "README.md").write_text(card)


def _make_readable_by_transformers_4(file: pathlib.Path) -> None:
    """Calls a class and special tokens by the names that transformers 4 and 5 both know."""
    config = json.loads(file.read_text("utf-8"))
    # 4 has no such class; its LlamaTokenizer puts a BOS of its own choice before every text. What
    # both call PreTrainedTokenizerFast is tokenizer.json and nothing besides.
    if config.get("tokenizer_class") in ("TokenizersBackend", "LlamaTokenizer"):
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(extra := config.get("extra_special_tokens"), list):  # 4 has an object there
        config["additional_special_tokens"] = extra
        del config["extra_special_tokens"]
    files.write_json(file, config)


def _config_json(model: Model) -> dict[str, Any]:
    config = model.decoder.config
    dropped = ("torch_dtype", "_name_or_path")
    kept = {key: value for key, value in model.hf_config.items() if key not in dropped}
    architecture = FAMILIES[config.family].architecture
    kept |= _flat_rope(kept, config) | FAMILIES[config.family].export_fields(config)
    # MLX takes heads for tied where nothing is said, transformers for each family otherwise.
    said = {"tie_word_embeddings": config.tied, "dtype": config.param_dtype}
    if config.experts:  # of two names, transformers 4 knows one for each family, and 5 writes one
        names = ("num_experts", "num_local_experts")
        said |= dict.fromkeys(names, config.experts.num_experts)
    return {**kept, "architectures": [architecture], **said}


def _flat_rope(hf_config: Mapping[str, Any], config: DecoderConfig) -> dict[str, Any]:
    """The fields that transformers 4 reads in place of `rope_parameters`; it would take its default
    rotary frequencies without a word. MLX asks for theta, also where it is the default."""
    silent = config.rope and not hf_config.get("rope_theta")
    flat = {"rope_theta": config.rope.theta} if silent else {}
    rope = hf_config.get("rope_parameters")
    if not rope or hf_config.get("rope_scaling"):
        return flat
    if "full_attention" in rope:  # by the type of a layer
        local = rope.get("sliding_attention") or {}
        flat |= {"rope_local_base_freq": local["rope_theta"]} if "rope_theta" in local else {}
        rope = rope["full_attention"]
    flat |= {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
    if rope.get("rope_type", "default") != "default":
        flat["rope_scaling"] = {key: x for key, x in rope.items() if key != "rope_theta"}
    return flat


def _generation_json(model: Model) -> dict[str, Any]:
    eos = list(model.eos_ids)
    found = {
        "bos_token_id": model.hf_config.get("bos_token_id"),
        "eos_token_id": eos[0] if len(eos) == 1 else eos,
        "pad_token_id": model.hf_config.get("pad_token_id"),
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
    }
    return {key: value for key, value in found.items() if value not in (None, [])}


def _save_tensors(folder: epath.Path, model: Model) -> None:
    # Which file a tensor belongs to, and how many files there are, which their names say, follows
    # from shapes alone. Tensors then come one by one, in the order of the files. To bring one to
    # the host is a collective of all processes; the first alone keeps it.
    config = model.decoder.config
    size = jnp.dtype(config.param_dtype).itemsize
    family = FAMILIES[config.family]
    prefix = family.prefix if family.bare and config.tied else ""
    tensor_bytes = {
        name.removeprefix(prefix): size * math.prod(shape)
        for name, shape in stored_shapes(config).items()
    }
    shards = shard_files(tensor_bytes)
    tensors = (
        (name.removeprefix(prefix), in_dtype(array, name, config.param_dtype))
        for name, array in stored_tensors(model.params, config)
    )
    for file, names in shards.items():
        _save_shard(folder / file, itertools.islice(tensors, len(names)))
    distributed.run_on_primary(functools.partial(_save_index, folder, shards, tensor_bytes))


def shard_files(sizes: Mapping[str, int]) -> dict[str, list[str]]:
    """The files of tensors of so many bytes, in their order, and the names of those in each."""
    shards, held = [[]], 0
    for name, size in sizes.items():
        if held + size > SHARD_BYTES and shards[-1]:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    count = len(shards)
    return {f"model-{i:05}-of-{count:05}.safetensors": x for i, x in enumerate(shards, start=1)}


def _save_shard(file: epath.Path, tensors: Iterator[tuple[str, np.ndarray]]) -> None:
    held = {name: array for name, array in tensors if distributed.is_primary()}
    distributed.run_on_primary(functools.partial(write_tensors, file, held))


def _save_index(
    folder: epath.Path, shards: Mapping[str, list[str]], sizes: Mapping[str, int]
) -> None:
    # An index or a file that an earlier save left behind would be read instead of these.
    for earlier in folder.glob("model*.safetensors*"):
        if earlier.name not in shards:
            earlier.unlink()
    if len(shards) > 1:
        index = {name: file for file, names in shards.items() for name in names}
        content = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": index}
        files.write_json(folder / "model.safetensors.index.json", content)


def in_dtype(array: np.ndarray, name: str, dtype: str) -> np.ndarray:
    """A tensor of floating point in another dtype; itself where it has that one, or holds integers.

    Raises:
      ModelError: a number that is not finite in that dtype.
    """
    if not jnp.issubdtype(array.dtype, jnp.floating) or array.dtype == jnp.dtype(dtype):
        return array
    with np.errstate(over="ignore"):
        array = array.astype(dtype)
    if not all_finite(array):
        raise ModelError(f"tensor {name} has a NaN, or a number that {dtype} cannot hold")
    return array


def write_tensors(file: str | os.PathLike, tensors: Mapping[str, np.ndarray]) -> None:
    """Whole or not at all, so that what an earlier save wrote stays good on a full disk.

    Args:
      file: also one in a bucket, such as gs://bucket/file.

    Raises:
      ModelError: the file cannot be written.
    """
    file = files.to_path(file)
    with as_local(file.parent) as folder:
        unfinished = (folder / file.name).with_suffix(".unfinished")
        try:
            # It writes memory as it lies, whatever the strides say.
            whole = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
            save_file(whole, unfinished, metadata={"format": "pt"})
        except SafetensorError as error:
            raise ModelError(f"{file}: could not be written: {error}") from error
        unfinished.chmod(0o644)  # safetensors leaves it to its owner alone
        unfinished.replace(folder / file.name)


@contextlib.contextmanager
def as_local(folder: epath.Path) -> Iterator[pathlib.Path]:
    """`folder`, or for one in a bucket a temporary one, whose files are copied there at the end."""
    if not files.is_remote(folder):
        yield pathlib.Path(folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield pathlib.Path(temporary)
        for file in sorted(pathlib.Path(temporary).rglob("*")):
            target = folder / file.relative_to(temporary)
            if file.is_dir():
                target.mkdir(parents=True, exist_ok=True)
            else:
                epath.Path(file).copy(target, overwrite=True)
