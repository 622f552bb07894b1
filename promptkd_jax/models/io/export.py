"""From parameters back to a folder that `transformers` loads.

Stored tensors are brought to the host one after another and written shard by shard, wherever the
parameters lie. All processes take part; the first one writes.
"""

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
import jax
import numpy as np
from etils import epath
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import SafetensorError
from safetensors.numpy import save_file

from promptkd_jax.infra import distributed, files, sharding
from promptkd_jax.infra.errors import ModelError
from promptkd_jax.models.config import DecoderConfig
from promptkd_jax.models.families import base as families
from promptkd_jax.models.io.params import PIECE_BYTES, stored_names
from promptkd_jax.models.model import Model

SHARD_BYTES = 5 * 10**9


def to_hugging_face(params: Any, config: DecoderConfig) -> dict[str, np.ndarray]:
    """All tensors under their Hugging Face names and in their layout, without padding: the inverse
    of loading."""
    return dict(stored_tensors(params, config))


def stored_tensors(params: Any, config: DecoderConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Yields what `to_hugging_face` gives, one by one. All processes must take them in step."""
    flat = traverse_util.flatten_dict(params, sep="/")
    letters = families.sizes(config)
    for rows in _rows_of_tensors(config):
        stored, ours = rows[0].pattern.split(" -> ")
        used = {letter: size for letter, size in letters.items() if letter in stored}
        arrays = zip(*(_on_host(flat[row.path], row.per_layer) for row in rows), strict=True)
        own = tuple(slice(letters[letter]) for letter in rows[0].ours)
        for name, parts in zip(_names(rows, config), arrays, strict=True):
            parts = [part[own] for part in parts]
            array = parts[0] if rows[0].part is None else np.stack(parts)
            array = einops.rearrange(array, f"{ours} -> {stored}", **used)
            yield name, np.ascontiguousarray(array)


def _stored_bytes(params: Any, config: DecoderConfig) -> Iterator[tuple[str, int]]:
    """Name and size of each of `stored_tensors`, in its order."""
    flat = traverse_util.flatten_dict(params, sep="/")
    for rows in _rows_of_tensors(config):
        size = math.prod(rows[0].stored_shape(families.sizes(config)))
        for name in _names(rows, config):
            yield name, size * flat[rows[0].path].dtype.itemsize


def _rows_of_tensors(config: DecoderConfig) -> Iterator[list[families.Tensor]]:
    """The rows of each stored tensor: GPT-2's fused query, key and value stand together."""
    rows = families.family(config).rows
    return (list(group) for _, group in itertools.groupby(rows, key=lambda row: row.name))


def _names(rows: list[families.Tensor], config: DecoderConfig) -> Iterator[str]:
    return stored_names(rows[0], config, families.family(config).prefix)


def _on_host(x: Any, per_layer: bool) -> Iterator[np.ndarray]:
    """A parameter whole, or each of its layers; large layers are brought one by one."""
    if not per_layer:
        yield sharding.to_host(x)
    elif x.nbytes <= PIECE_BYTES:
        yield from sharding.to_host(x)
    else:
        yield from (_layer_on_host(x, layer) for layer in range(x.shape[0]))


def _layer_on_host(x: Any, layer: int) -> np.ndarray:
    if not isinstance(x, jax.Array):
        return x[layer]
    everywhere = None
    if not x.is_fully_addressable:
        everywhere = NamedSharding(x.sharding.mesh, PartitionSpec())
    return np.asarray(jax.jit(_take_layer, out_shardings=everywhere)(x, layer))


def _take_layer(x: jax.Array, layer: int) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)


def save_model(folder: str | os.PathLike, model: Model, *, card: str | None = None) -> None:
    """Writes a folder for `AutoModelForCausalLM.from_pretrained`.

    `config.json`, safetensors (in shards of 5 GB with an index where larger), the tokenizer,
    `generation_config.json`, and `card` as README.md. The weights are written in the dtype of the
    parameters. Host memory holds the tensors of one shard at a time. All processes must call it,
    and go on when the first has written everything.

    Args:
      folder: made where absent; also one in a bucket, such as gs://bucket/folder.

    Raises:
      ModelError: a file of weights cannot be written.
    """
    folder = files.to_path(folder)
    distributed.run_on_primary(functools.partial(_save_configs, folder, model))
    _save_tensors(folder, model)
    distributed.run_on_primary(functools.partial(_save_texts, folder, model, card))


def save_without_weights(folder: str | os.PathLike, model: Model) -> None:
    """Writes all of `save_model` but the weights: `load.load_without_weights` reads it back.

    All processes must call it, and go on when the first has written everything.
    """
    folder = files.to_path(folder)
    distributed.run_on_primary(functools.partial(_save_configs, folder, model))
    known = "".join(f"{key}: {value}\n" for key, value in sorted(model.card.items()))
    distributed.run_on_primary(functools.partial(_save_texts, folder, model, f"---\n{known}---\n"))


def _save_configs(folder: epath.Path, model: Model) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", _config_json(model))
    _write_json(folder / "generation_config.json", _generation_json(model))


def _save_texts(folder: epath.Path, model: Model, card: str | None) -> None:
    if model.tokenizer is not None:
        with _local(folder) as local:
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
    _write_json(file, config)


def _config_json(model: Model) -> dict[str, Any]:
    config = model.decoder.config
    dropped = ("torch_dtype", "_name_or_path")
    kept = {key: value for key, value in model.hf_config.items() if key not in dropped}
    architecture = families.family(config).architecture
    kept |= _flat_rope(kept)
    return {**kept, "architectures": [architecture], "dtype": config.param_dtype}


def _flat_rope(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that transformers 4 reads in place of `rope_parameters`; it would take its default
    rotary frequencies without a word."""
    rope = hf_config.get("rope_parameters")
    if not rope or hf_config.get("rope_scaling"):
        return {}
    flat = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
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
    config = model.decoder.config
    sizes = dict(_stored_bytes(model.params, config))
    shards = _shards(sizes)
    written = ["model.safetensors"]
    if len(shards) > 1:
        written = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    tensors = stored_tensors(model.params, config)
    for file, names in zip(written, shards):
        _save_shard(folder / file, itertools.islice(tensors, len(names)))
    distributed.run_on_primary(
        functools.partial(_save_index, folder, dict(zip(written, shards)), sizes)
    )


def _shards(sizes: Mapping[str, int]) -> list[list[str]]:
    """The names of the tensors in each file."""
    shards, held = [[]], 0
    for name, size in sizes.items():
        if held + size > SHARD_BYTES and shards[-1]:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards


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
        _write_json(folder / "model.safetensors.index.json", content)


def write_tensors(file: str | os.PathLike, tensors: Mapping[str, np.ndarray]) -> None:
    """Whole or not at all, so that what an earlier save wrote stays good on a full disk.

    Args:
      file: also one in a bucket, such as gs://bucket/file.

    Raises:
      ModelError: the file cannot be written.
    """
    file = files.to_path(file)
    with _local(file.parent) as folder:
        unfinished = (folder / file.name).with_suffix(".unfinished")
        try:
            save_file(dict(tensors), unfinished, metadata={"format": "pt"})
        except SafetensorError as error:
            raise ModelError(f"{file}: could not be written: {error}") from error
        unfinished.chmod(0o644)  # safetensors leaves it to its owner alone
        unfinished.replace(folder / file.name)


@contextlib.contextmanager
def _local(folder: epath.Path) -> Iterator[pathlib.Path]:
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


def _write_json(file: epath.Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
