"""From parameters back to a folder that `transformers` loads."""

import itertools
import json
import pathlib
from typing import Any

import einops
import jax
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError
from safetensors.numpy import save_file

from promptkd_jax.models import families
from promptkd_jax.models.config import DecoderConfig, ModelError
from promptkd_jax.models.load import Model, stored_names

SHARD_BYTES = 5 * 10**9


def to_hugging_face(params: Any, config: DecoderConfig) -> dict[str, np.ndarray]:
    """All tensors under their Hugging Face names and in their layout: the inverse of loading."""
    flat = traverse_util.flatten_dict(params, sep="/")
    letters = families.sizes(config)
    table = families.family(config)
    tensors = {}
    # The rows of one stored tensor (GPT-2's fused query, key and value) stand behind one another.
    for _, group in itertools.groupby(table.rows, key=lambda row: row.name):
        rows = list(group)
        stored, ours = rows[0].pattern.split(" -> ")
        used = {letter: size for letter, size in letters.items() if letter in stored}
        arrays = [np.asarray(flat[row.path]) for row in rows]
        for layer, name in enumerate(stored_names(rows[0], config, table.prefix)):
            parts = [array[layer] for array in arrays] if rows[0].per_layer else arrays
            array = parts[0] if rows[0].part is None else np.stack(parts)
            tensors[name] = np.ascontiguousarray(
                einops.rearrange(array, f"{ours} -> {stored}", **used)
            )
    return tensors


def save_model(folder: str | pathlib.Path, model: Model, *, card: str | None = None) -> None:
    """Writes a folder for `AutoModelForCausalLM.from_pretrained`.

    `config.json`, safetensors (in shards of 5 GB with an index where larger), the tokenizer,
    `generation_config.json`, and `card` as README.md. The weights are written in the dtype of the
    parameters.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = model.decoder.config
    _write_json(folder / "config.json", _config_json(model))
    _write_json(folder / "generation_config.json", _generation_json(model))
    _save_tensors(folder, to_hugging_face(jax.device_get(model.params), config))
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(folder)
    if card is not None:
        (folder / "README.md").write_text(card)


def _config_json(model: Model) -> dict[str, Any]:
    config = model.decoder.config
    dropped = ("torch_dtype", "_name_or_path")
    kept = {key: value for key, value in model.hf_config.items() if key not in dropped}
    architecture = families.family(config).architecture
    return {**kept, "architectures": [architecture], "dtype": config.param_dtype}


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


def _save_tensors(folder: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    shards: list[dict[str, np.ndarray]] = [{}]
    for name, array in tensors.items():
        if sum(x.nbytes for x in shards[-1].values()) + array.nbytes > SHARD_BYTES and shards[-1]:
            shards.append({})
        shards[-1][name] = array
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for file, shard in zip(names, shards):
        write_tensors(folder / file, shard)
    # An index or a file that an earlier save left behind would be read instead of these.
    for earlier in folder.glob("model*.safetensors*"):
        if earlier.name not in names:
            earlier.unlink()
    if len(shards) > 1:
        total = sum(array.nbytes for array in tensors.values())
        index = {name: file for file, shard in zip(names, shards) for name in shard}
        _write_json(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": index},
        )


def write_tensors(file: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    """Whole or not at all, so that what an earlier save wrote stays good on a full disk.

    Raises:
      ModelError: the file cannot be written.
    """
    unfinished = file.with_suffix(".unfinished")
    try:
        save_file(tensors, unfinished, metadata={"format": "pt"})
    except SafetensorError as error:
        raise ModelError(f"{file}: could not be written: {error}") from error
    unfinished.chmod(0o644)  # safetensors leaves it to its owner alone
    unfinished.replace(file)


def _write_json(file: pathlib.Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
