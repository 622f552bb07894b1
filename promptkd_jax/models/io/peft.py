"""Soft prompts and low-rank adapters (LoRA) as PEFT stores them.

PEFT's A and B are those of `layers.lora` transposed: `lora_A.weight` [r, in], `lora_B.weight`
[out, r], for each layer by itself. Where `transformers` stores several of our maps as one (query,
key and value of GPT-2), PEFT has one pair for all: ours become one of n r rows and columns,

    A = [A1; A2; A3]    B = diag(B1, B2, B3)    with the same scale s
"""

from __future__ import annotations

import itertools
import math
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util
from safetensors import SafetensorError
from safetensors.numpy import load

from promptkd_jax.infra import distributed, sharding
from promptkd_jax.infra.errors import ModelError
from promptkd_jax.infra.files import make_folder, to_path, write_json, write_text
from promptkd_jax.models.config import DecoderConfig, LoRA
from promptkd_jax.models.families.base import Tensor, sizes
from promptkd_jax.models.families.registry import FAMILIES, from_hugging_face
from promptkd_jax.models.io.convert import ADAPTER, StoredLoRA, read_lora, without_prefix
from promptkd_jax.models.io.export import write_tensors
from promptkd_jax.models.io.hub import pretrained_name
from promptkd_jax.models.io.params import all_finite
from promptkd_jax.models.io.safetensors import read_json, refuse_pointer
from promptkd_jax.models.layers.gated_prefix import GatedPrefix, prefix_vectors
from promptkd_jax.models.layers.lora import MODULES, A, B
from promptkd_jax.models.model import Model

if TYPE_CHECKING:
    from jaxtyping import Array, Float

_CARD = """\
---
library_name: peft
pipeline_tag: text-generation
tags: [knowledge-distillation, promptkd, prompt-tuning]
---
# A soft prompt of {length} tokens

Trained with promptkd_jax; a prompt-tuning adapter for the teacher that `adapter_config.json` names:

```python
model = peft.PeftModel.from_pretrained(teacher, "path/to/soft_prompt")
```

**Versions.** `model(...)` is right with PEFT 0.18 to 0.21.2 and `transformers` 5.0 to 5.24.
`model.generate(...)` is right with `transformers` up to 5.23. From 5.24.0 on, these versions of
PEFT do not find its cache, put the prompt in front of every new token and, without a warning,
generate other text; `model.generate(..., use_cache=False)` is right there too.
"""


_GATED_CARD = """\
---
tags: [knowledge-distillation, promptkd, prompt-tuning]
---
# A gated soft prompt of {length} vectors

Trained with promptkd_jax for the teacher {teacher}. In every layer and head attention is
(1 - gate) times that without it plus gate times that behind it, and the text keeps the positions
that it has without it.

**Not a PEFT adapter.** PEFT's prompt tuning can say neither: it puts `prompt_embeddings` before the
text, with gates of 1, which is another teacher. `promptkd_jax.load_soft_prompt` reads both
arrays. The student needs none of this.
"""
_GATED = "gated_prompt.safetensors"
_PEFT_FILES = "adapter_config.json", "adapter_model.safetensors"


def save_soft_prompt(
    folder: epath.PathLike,
    soft_prompt: Float[Array, "M D"] | GatedPrefix,
    *,
    teacher: str,
    hf_config: dict[str, Any],
) -> None:
    """Writes a PEFT prompt-tuning adapter that `peft.PeftModel.from_pretrained` loads.

    Its README.md says with which versions of PEFT and `transformers` it generates what it should.
    Of a `GatedPrefix`, which no adapter of PEFT can express, a file of its own, with a README.md
    that says so; `load_soft_prompt` reads both.
    All processes of a run call this; the first writes.

    Args:
      folder: made where absent; also one in a bucket.
      soft_prompt: `[M, D]`, or a `GatedPrefix`.
      teacher: name or path of the model that it belongs to, as `load_model` takes it.
      hf_config: the teacher's `config.json`.
    """
    folder = to_path(folder)
    make_folder(folder)
    length, width = prefix_vectors(soft_prompt).shape
    gated = isinstance(soft_prompt, GatedPrefix)
    if distributed.is_primary():  # what another soft prompt left there, of the other form
        for name in _PEFT_FILES if gated else (_GATED,):
            (folder / name).unlink(missing_ok=True)
    if gated:
        write_text(folder / "README.md", _GATED_CARD.format(length=length, teacher=teacher))
        _write(folder / _GATED, prompt_embeddings=soft_prompt.vectors, gates=soft_prompt.gates)
        return
    name, revision = pretrained_name(teacher)
    decoder = from_hugging_face(hf_config, f"{teacher}: config")
    config = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name,
        "revision": revision,
        "inference_mode": True,
        "num_virtual_tokens": length,
        "token_dim": width,
        "num_transformer_submodules": 1,
        "num_attention_heads": decoder.num_heads,
        "num_layers": decoder.num_layers,
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
    }
    config_file, weights = (folder / name for name in _PEFT_FILES)
    write_json(config_file, config)
    write_text(folder / "README.md", _CARD.format(length=length))
    _write(weights, prompt_embeddings=soft_prompt)


def _write(file: epath.Path, **tensors: Any) -> None:
    on_host = {n: np.asarray(sharding.to_host(x), np.float32) for n, x in tensors.items()}
    if distributed.is_primary():
        write_tensors(file, on_host)


def load_soft_prompt(folder: epath.PathLike) -> Float[Array, "M D"] | GatedPrefix:
    """Reads a PEFT prompt-tuning adapter, `[M, D]` float32, or what `save_soft_prompt` wrote of a
    `GatedPrefix`.

    Raises:
      ModelError: an adapter of another kind, or one that is damaged, not finite, or with gates that
        are not from 0 to 1.
    """
    folder = to_path(folder)
    if (gated := folder / _GATED).exists():
        dimensions = {"prompt_embeddings": "tokens, width", "gates": "layers, heads"}
        vectors, gates = _read(gated, dimensions)
        if not 0 <= gates.min() <= gates.max() <= 1:
            raise ModelError(
                f"{gated}: gates from {gates.min():.4g} to {gates.max():.4g}; expected 0 to 1"
            )
        return GatedPrefix(vectors, gates)
    file, weights = (folder / name for name in _PEFT_FILES)
    if not file.exists():
        raise ModelError(f"{file}: no such file (a folder as save_soft_prompt or PEFT writes it)")
    if (kind := read_json(file).get("peft_type")) != "PROMPT_TUNING":
        raise ModelError(f"{file}: peft_type is {kind!r}; only PROMPT_TUNING adapters are prompts")
    if not weights.exists():
        raise ModelError(f"{weights}: no such file (weights are read from safetensors only)")
    (vectors,) = _read(weights, {"prompt_embeddings": "tokens, width"})
    return vectors


def _read(weights: epath.Path, expected: Mapping[str, str]) -> list[Float[Array, "A B"]]:
    """The tensors of a file, float32, in the order of `expected`: by name their two dimensions."""
    refuse_pointer(weights)
    try:
        tensors = load(weights.read_bytes())
    except SafetensorError as error:
        raise ModelError(f"{weights}: damaged or truncated: {error}") from error
    if tensors.keys() != expected.keys():
        number = "one tensor" if len(expected) == 1 else "tensors"
        raise ModelError(
            f"{weights.parent}: expected {number} {', '.join(expected)}, found {list(tensors)}"
        )
    for name, dimensions in expected.items():
        x = tensors[name]
        if x.ndim != 2 or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ModelError(
                f"{weights}: {name} is {x.dtype} {list(x.shape)}; expected floating point numbers "
                f"[{dimensions}]"
            )
        if not all_finite(np.float32(x)):
            raise ModelError(f"{weights}: {name} is not finite: it has a NaN or an infinity")
    return [jnp.asarray(np.float32(tensors[name])) for name in expected]


# Low-rank adapters

ALL = "all-linear"  # PEFT's word for every map of every layer


def adaptable(config: DecoderConfig) -> dict[str, list[tuple[str, Tensor]]]:
    """The linear maps of a model that may have an adapter, by the names of their modules in
    `transformers`, with `{}` for the layer: their paths in `lora.MODULES` and rows of the table,
    several where they are stored as one."""
    family, found = FAMILIES[config.family], {}
    for row in family.tensors(config):
        module = row.path.removeprefix("layers/").removesuffix("/kernel")
        if row.path.endswith("/kernel") and module in MODULES:
            name = family.prefix + row.name.removesuffix(".weight")
            found.setdefault(name, []).append((module, row))
    return found


def lora_modules(config: DecoderConfig, targets: Sequence[str], where: str) -> tuple[str, ...]:
    """The maps that PEFT's `target_modules` name, as keys of `lora.MODULES`.

    Args:
      targets: names of modules or their ends ("q_proj"), as patterns; "all-linear".
      where: the field, for messages.

    Raises:
      ModelError: one of them names nothing.
    """
    names, chosen = adaptable(config), set()
    for target in targets:
        # As PEFT matches: the whole name, or its end from a dot on.
        pattern = ".*" if target == ALL else target
        try:
            matches = [x for x in names if re.fullmatch(rf"(.*\.)?({pattern})", x.format(0))]
        except re.error as error:
            raise ModelError(f"{where}: {target!r} is no pattern: {error}") from error
        if not matches:
            known = ", ".join(dict.fromkeys(x.rpartition(".")[2] for x in names))
            raise ModelError(
                f"{where}: {target!r} is no linear map of a {config.family}'s layers; expected "
                f"{ALL}, or some of {known}"
            )
        chosen |= {module for name in matches for module, _ in names[name]}
    return tuple(module for module in MODULES if module in chosen)


def lora_config(model: Model) -> dict[str, Any]:
    """The `adapter_config.json` of a model's adapter."""
    config, lora = model.decoder.config, model.decoder.config.lora
    name, revision = pretrained_name(model.name)
    names = {x: len(parts) for x, parts in adaptable(config).items() if parts[0][0] in lora.modules}
    others = [x for x in adaptable(config) if x not in names]
    ends = {x: x.rpartition("{}.")[2] for x in names}
    for x in ends:  # as short as tells it from those that have none
        short = ends[x].rpartition(".")[2]
        if not any(other.endswith(f".{short}") for other in others):
            ends[x] = short
    # Of maps stored as one the rank is that of all together, and so alpha, so that s is as before.
    fused = {ends[x]: number for x, number in names.items() if number > 1}
    root = math.sqrt if lora.use_rslora else float
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name,
        "revision": revision,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.use_rslora,
        "target_modules": sorted(set(ends.values())),
        "rank_pattern": {end: n * lora.rank for end, n in fused.items()},
        "alpha_pattern": {end: root(n) * lora.alpha for end, n in fused.items()},
        "fan_in_fan_out": _stores_inputs_first(config),
        "bias": "none",
        "use_dora": False,
        "modules_to_save": None,
    }


def read_lora_config(found: Mapping[str, Any], config: DecoderConfig) -> LoRA:
    """The inverse of `lora_config`, for the model that it is for."""
    modules = lora_modules(config, found["target_modules"], ADAPTER)
    how = found["use_rslora"], found["lora_dropout"]
    return LoRA(found["r"], found["lora_alpha"], modules, *how)


def save_lora(folder: epath.PathLike, model: Model) -> None:
    """Writes a model's adapter for `peft.PeftModel.from_pretrained`, in float32.

    All processes of a run call this; the first writes.

    Args:
      folder: made where absent; also one in a bucket.
      model: with the adapter among its parameters; `name` is that of the frozen one.
    """
    folder, config = to_path(folder), model.decoder.config
    make_folder(folder)
    write_json(folder / ADAPTER, lora_config(model))
    card = _LORA_CARD.format(rank=config.lora.rank, base=model.name)
    if config.quantization:
        card += _ROUNDED.format(bits=config.quantization.bits)
    write_text(folder / "README.md", card)
    tensors, flat = {}, traverse_util.flatten_dict(model.params, sep="/")
    for name, parts in adaptable(config).items():
        if parts[0][0] not in config.lora.modules:
            continue
        # Maps that are stored as one (GPT-2's query, key and value) have one adapter there, of the
        # rank of all: their A below one another, their B along the diagonal.
        pairs = [_stored_pair(flat, module, row, config) for module, row in parts]
        for layer in range(config.num_layers):
            stem = f"base_model.model.{name.format(layer)}"
            tensors[f"{stem}.lora_A.weight"] = np.concatenate([a[layer] for a, _ in pairs])
            tensors[f"{stem}.lora_B.weight"] = _block_diagonal([b[layer] for _, b in pairs])
    if distributed.is_primary():
        write_tensors(folder / "adapter_model.safetensors", tensors)


def load_lora(folder: str | os.PathLike, config: DecoderConfig) -> tuple[LoRA, Any]:
    """Reads a LoRA adapter of PEFT.

    Args:
      config: of the model that it is for, without padding.

    Returns:
      The adapter's shape and its parameters, as `lora.join` puts them beside the model's.

    Raises:
      ModelError: it is none, is damaged, belongs to another model, or has layers or modules that
        differ in rank or scale.
    """
    folder = pathlib.Path(folder)
    stored, where = read_lora(folder), f"{folder}: "
    if stored.whole:
        raise ModelError(f"{where}trains {next(iter(stored.whole))} whole; {_MERGE}")
    left = {without_prefix(name): name for name in stored.pairs}  # that nothing has read yet
    adapter, scales = {}, {}
    for name, parts in adaptable(config).items():
        layers = [left.pop(without_prefix(name.format(i)), None) for i in range(config.num_layers)]
        if not any(layers):
            continue
        if not all(layers):
            raise ModelError(f"{where}changes {name} of some layers, not of all; {_MERGE}")
        pairs = [_parts_of(stored, module, parts, config) for module in layers]
        if len({pair[0][0].shape for pair in pairs}) > 1:
            raise ModelError(f"{where}{name} has another rank in some layers; {_MERGE}")
        for place, (module, row) in enumerate(parts):
            # Stored as matrices, [L, in, r] and [L, r, out]: ours have axes for heads and widths.
            shape = [sizes(config)[x] for x in row.ours]
            axes = MODULES[module]
            a, b = (np.stack([pair[place][side] for pair in pairs]) for side in (0, 1))
            adapter[f"layers/{module}/{A}"] = a.reshape(len(a), *shape[:axes], -1)
            adapter[f"layers/{module}/{B}"] = b.reshape(*b.shape[:2], *shape[axes:])
            # To nine digits: what `lora_config` makes of a root comes back rounded.
            scales[module] = {(a.shape[2], float(f"{stored.scale(x):.9g}")) for x in layers}
    if left or not adapter:
        wrong = next(iter(left.values()), "nothing")
        raise ModelError(f"{where}changes {wrong}, which this {config.family} has no adapter for")
    if len(different := set().union(*scales.values())) > 1:
        ranks = ", ".join(f"rank {rank} times {scale:.4g}" for rank, scale in sorted(different))
        raise ModelError(f"{where}its modules differ ({ranks}); {_MERGE}")
    rank, scale = different.pop()
    # The inverse of s = alpha / r, or of s = alpha / sqrt(r).
    rslora = bool(stored.config.get("use_rslora"))
    alpha = scale * (math.sqrt(rank) if rslora else rank)
    if math.isclose(alpha, said := float(stored.config["lora_alpha"]), rel_tol=1e-6):
        alpha = said
    lora = LoRA(
        rank,
        alpha,
        tuple(module for module in MODULES if module in scales),
        rslora,
        float(stored.config.get("lora_dropout") or 0.0),
    )
    return lora, traverse_util.unflatten_dict(adapter, sep="/")


_MERGE = "expected one that changes all layers alike; merge it into its base: promptkd convert"
_LORA_CARD = """\
---
library_name: peft
pipeline_tag: text-generation
tags: [knowledge-distillation, lora]
---
# A LoRA adapter of rank {rank}

Trained with promptkd_jax, for `{base}`:

```python
model = peft.PeftModel.from_pretrained(base, "path/to/adapter")
```
"""
_ROUNDED = """
It was trained beside kernels in {bits} bits: on the plain model it computes nearly the same. The
merged student of the run is what it was.
"""


def _stores_inputs_first(config: DecoderConfig) -> bool:
    """Whether matrices are stored [in, out] (GPT-2)."""
    (_, row), *_ = next(iter(adaptable(config).values()))
    return row.stored[0] == row.ours[:1]


def _stored_pair(flat: Any, module: str, row: Tensor, config: DecoderConfig) -> tuple:
    """A map's A [L, r, in] and B [L, out, r], without padding."""
    a, b = (np.asarray(sharding.to_host(flat[f"layers/{module}/{x}"]), np.float32) for x in (A, B))
    own = [slice(sizes(config)[x]) for x in row.ours]
    axes = MODULES[module]
    a, b = a[(slice(None), *own[:axes])], b[(slice(None), slice(None), *own[axes:])]
    layers, rank = b.shape[:2]
    return a.reshape(layers, -1, rank).swapaxes(1, 2), b.reshape(layers, rank, -1).swapaxes(1, 2)


def _block_diagonal(blocks: list[np.ndarray]) -> np.ndarray:
    # [B1  0; 0  B2]: the rows of a map see the columns of its own A alone.
    rows, columns = (sum(x.shape[axis] for x in blocks) for axis in (0, 1))
    whole, row, column = np.zeros((rows, columns), np.float32), 0, 0
    for block in blocks:
        whole[row : row + block.shape[0], column : column + block.shape[1]] = block
        row, column = row + block.shape[0], column + block.shape[1]
    return whole


def _parts_of(stored: StoredLoRA, name: str, parts: list, config: DecoderConfig) -> list[tuple]:
    """(A [in, r], B [r, out]) of each of the maps that a module of PEFT is for."""
    a, b = (np.float32(stored.pairs[name][side]) for side in "AB")
    if not (all_finite(a) and all_finite(b)):
        raise ModelError(f"{stored.folder}: {name} is not finite: it has a NaN or an infinity")
    # Maps that are stored as one share their inputs; their outputs stand below one another.
    letters = sizes(config)
    inputs, *_ = (math.prod(letters[x] for x in row.ours[: MODULES[m]]) for m, row in parts)
    outputs = [math.prod(letters[x] for x in row.ours[MODULES[m] :]) for m, row in parts]
    if a.shape[1:] != (inputs,) or b.shape != (sum(outputs), len(a)):
        raise ModelError(
            f"{stored.folder}: {name} has lora_A {list(a.shape)} and lora_B {list(b.shape)}; "
            f"expected [r, {inputs}] and [{sum(outputs)}, r]: it is for another model"
        )
    ends = list(itertools.accumulate(outputs))
    b_of_parts = np.split(b, ends[:-1])
    # One that `save_lora` wrote comes apart again into the ranks that it was made of; others share
    # their A.
    rank, own = int(stored.config["r"]), []
    for place, one in enumerate(b_of_parts):
        columns = slice(place * rank, (place + 1) * rank)
        ours = len(a) == len(parts) * rank
        if not ours or np.count_nonzero(one) != np.count_nonzero(one[:, columns]):
            return [(a.T, one.T) for one in b_of_parts]
        own.append((a[columns].T, one[:, columns].T))
    return own
