"""Soft prompts as PEFT stores them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from etils import epath
from safetensors import SafetensorError
from safetensors.numpy import load

from promptkd_jax.infra import distributed, sharding
from promptkd_jax.infra.errors import ModelError
from promptkd_jax.infra.files import make_folder, to_path, write_json, write_text
from promptkd_jax.models.families.registry import from_hugging_face
from promptkd_jax.models.io.export import write_tensors
from promptkd_jax.models.io.hub import pretrained_name
from promptkd_jax.models.io.params import all_finite
from promptkd_jax.models.io.safetensors import read_json, refuse_pointer

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


def save_soft_prompt(
    folder: epath.PathLike,
    soft_prompt: Float[Array, "M D"],
    *,
    teacher: str,
    hf_config: dict[str, Any],
) -> None:
    """Writes a PEFT prompt-tuning adapter that `peft.PeftModel.from_pretrained` loads.

    Its README.md says with which versions of PEFT and `transformers` it generates what it should.
    All processes of a run call this; the first writes.

    Args:
      folder: made where absent; also one in a bucket.
      soft_prompt: `[M, D]`.
      teacher: name or path of the model that it belongs to, as `load_model` takes it.
      hf_config: the teacher's `config.json`.
    """
    folder = to_path(folder)
    make_folder(folder)
    length, width = soft_prompt.shape
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
    write_json(folder / "adapter_config.json", config)
    write_text(folder / "README.md", _CARD.format(length=length))
    tensors = {"prompt_embeddings": np.asarray(sharding.to_host(soft_prompt), np.float32)}
    if distributed.is_primary():
        write_tensors(folder / "adapter_model.safetensors", tensors)


def load_soft_prompt(folder: epath.PathLike) -> Float[Array, "M D"]:
    """Reads a PEFT prompt-tuning adapter, `[M, D]` float32.

    Raises:
      ModelError: an adapter of another kind, or one that is damaged or not finite.
    """
    folder = to_path(folder)
    file = folder / "adapter_config.json"
    if not file.exists():
        raise ModelError(f"{file}: no such file (a folder as save_soft_prompt or PEFT writes it)")
    if (kind := read_json(file).get("peft_type")) != "PROMPT_TUNING":
        raise ModelError(f"{file}: peft_type is {kind!r}; only PROMPT_TUNING adapters are prompts")
    weights = folder / "adapter_model.safetensors"
    if not weights.exists():
        raise ModelError(f"{weights}: no such file (weights are read from safetensors only)")
    refuse_pointer(weights)
    try:
        tensors = load(weights.read_bytes())
    except SafetensorError as error:
        raise ModelError(f"{weights}: damaged or truncated: {error}") from error
    if tensors.keys() != {"prompt_embeddings"}:
        raise ModelError(f"{folder}: expected one tensor prompt_embeddings, found {list(tensors)}")
    found = tensors["prompt_embeddings"]
    if found.ndim != 2 or not jnp.issubdtype(found.dtype, jnp.floating):
        raise ModelError(
            f"{weights}: prompt_embeddings is {found.dtype} {list(found.shape)}; expected floating "
            "point numbers [tokens, width]"
        )
    if not all_finite(found := np.float32(found)):
        raise ModelError(f"{weights}: prompt_embeddings is not finite: it has a NaN or an infinity")
    return jnp.asarray(found)
