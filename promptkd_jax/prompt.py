"""The soft prompt: M embeddings `[M, D]` in front of the frozen teacher, and its PEFT form."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from promptkd_jax.models.config import ModelError
from promptkd_jax.models.decoder import embed
from promptkd_jax.models.export import write_tensors

INITS = ("text", "pad", "vocabulary", "random", "examples")


def init_soft_prompt(params: Any, token_ids: Sequence[int], length: int) -> jax.Array:
    """The embeddings of `token_ids`, repeated and cut to `length`, `[M, D]` float32.

    PromptKD starts from "Suppose you are a student." (7 GPT-2 tokens); a random start collapses
    (paper, figure 4).

    Raises:
      ValueError: no token ids.
    """
    if not len(token_ids):
        raise ValueError("a soft prompt needs at least one token to start from")
    repeated = np.resize(np.asarray(token_ids, np.int32), length)
    return embed(params, repeated).astype(jnp.float32)


def pooled_soft_prompt(params: Any, token_ids: Sequence[int], length: int) -> jax.Array:
    """A text of any length in `length` vectors: means of its embeddings, `[M, D]` float32.

    The text is cut into M stretches of equal size; one that is shorter than M is repeated first.

    Raises:
      ValueError: no token ids.
    """
    repeated = max(length, len(token_ids))
    embeddings = init_soft_prompt(params, token_ids, repeated)
    return jnp.stack([jnp.mean(part, axis=0) for part in jnp.array_split(embeddings, length)])


def random_soft_prompt(key: jax.Array, length: int, width: int) -> jax.Array:
    """Standard normal numbers, `[M, D]` float32: PEFT's RANDOM. Far larger than embeddings are."""
    return jax.random.normal(key, (length, width), jnp.float32)


def save_soft_prompt(
    folder: str | pathlib.Path, soft_prompt: jax.Array, *, teacher: str, hf_config: dict[str, Any]
) -> None:
    """Writes a PEFT prompt-tuning adapter that `peft.PeftModel.from_pretrained` loads.

    Args:
      folder: made where absent.
      soft_prompt: `[M, D]`.
      teacher: name or path of the model that it belongs to.
      hf_config: the teacher's `config.json`.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    length, width = soft_prompt.shape
    config = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": teacher,
        "inference_mode": True,
        "num_virtual_tokens": length,
        "token_dim": width,
        "num_transformer_submodules": 1,
        "num_attention_heads": hf_config.get("num_attention_heads", hf_config.get("n_head")),
        "num_layers": hf_config.get("num_hidden_layers", hf_config.get("n_layer")),
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {"prompt_embeddings": np.asarray(soft_prompt, np.float32)}
    write_tensors(folder / "adapter_model.safetensors", tensors)


def load_soft_prompt(folder: str | pathlib.Path) -> jax.Array:
    """Reads a PEFT prompt-tuning adapter, `[M, D]` float32. Raises ModelError for another kind."""
    folder = pathlib.Path(folder)
    file = folder / "adapter_config.json"
    if not file.exists():
        raise ModelError(f"{file}: no such file (a folder as save_soft_prompt or PEFT writes it)")
    if (kind := json.loads(file.read_text()).get("peft_type")) != "PROMPT_TUNING":
        raise ModelError(f"{file}: peft_type is {kind!r}; only PROMPT_TUNING adapters are prompts")
    weights = folder / "adapter_model.safetensors"
    if not weights.exists():
        raise ModelError(f"{weights}: no such file (weights are read from safetensors only)")
    tensors = load_file(weights)
    if tensors.keys() != {"prompt_embeddings"}:
        raise ModelError(f"{folder}: expected one tensor prompt_embeddings, found {list(tensors)}")
    return jnp.asarray(tensors["prompt_embeddings"], jnp.float32)
