"""Randomly initialized models, named by their sizes: for trying out, and for tests."""

from __future__ import annotations

import re
from importlib import resources
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from promptkd_jax.infra.errors import ModelError
from promptkd_jax.models.decoder import Decoder
from promptkd_jax.models.families.registry import from_hugging_face
from promptkd_jax.models.io.params import pad
from promptkd_jax.models.layers.quantization import QUANTIZE, quantize_params
from promptkd_jax.models.model import Model, param_shardings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PREFIX = "synthetic:"
END = "<end>"


def synthetic_tokenizer() -> PreTrainedTokenizerFast:
    """Returns the tokenizer of the `synthetic:` data: a token for each of its words, one for every
    byte of anything else; `<end>`, 0, ends sequences and pads them."""
    # Imported here: half of the time to load a model that has no tokenizer.
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    file = resources.files("promptkd_jax") / "models" / "assets" / "synthetic_tokenizer.json"
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(file.read_text("utf-8")),
        **dict.fromkeys(("eos_token", "pad_token", "bos_token"), END),
    )


def synthetic_model(
    name: str,
    *,
    dtype: str = "float32",
    param_dtype: str = "float32",
    remat: str = "none",
    quantize: str = "none",
    offload: bool = False,
    mesh: Mesh | None = None,
) -> Model:
    """Returns a randomly initialized Llama with the tokenizer of the `synthetic:` data.

    Args:
      name: "synthetic:llama-D64-L4" for width 64 and 4 layers, "synthetic:llama-D64-L4-S1" for
        another seed than 0.
      dtype, param_dtype, remat, quantize, offload, mesh: as `load_model` takes them.

    Raises:
      ModelError: no such name, or a width that is not a multiple of 32.
    """
    hf_config, seed = synthetic_config(name)
    config = from_hugging_face(hf_config, name)
    config = config.replace(dtype=dtype, param_dtype=param_dtype, remat=remat)
    on_mesh = config.replace(tensor_parts=1 if mesh is None else mesh.shape["tensor"])

    how = QUANTIZE[quantize]

    def init():
        tokens = jnp.zeros((1, 2), jnp.int32)  # the same numbers on every mesh
        # Drawn without the padding of a mesh, with which all numbers would be others.
        params = pad(Decoder(config).init(jax.random.key(seed), tokens)["params"], on_mesh)
        return quantize_params(params, how) if how else params

    kept = on_mesh.replace(quantization=how, offload=offload)
    placed = None if mesh is None else param_shardings(kept, jax.eval_shape(init), mesh)
    params = jax.jit(init, out_shardings=placed)()
    return Model(name, Decoder(kept), params, hf_config, synthetic_tokenizer(), (0,))


def synthetic_config(name: str) -> tuple[dict[str, Any], int]:
    """Returns the `config.json` of a Llama with heads of 16, two to a key/value head; and the seed.

    Raises:
      ModelError: as `synthetic_model`.
    """
    sizes = re.fullmatch(rf"{PREFIX}llama-D(\d+)-L(\d+)(?:-S(\d+))?", name)
    width, depth, seed = (int(size or 0) for size in sizes.groups()) if sizes else (0, 0, 0)
    if not depth or not width or width % 32:
        raise ModelError(
            f"{name}: expected llama-D<width>-L<layers>[-S<seed>], such as llama-D64-L4, the width "
            "a multiple of 32"
        )
    config = {
        "model_type": "llama",
        "vocab_size": len(synthetic_tokenizer()),
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": width // 16,
        "num_key_value_heads": width // 32,
        "intermediate_size": 3 * width,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return config, seed
