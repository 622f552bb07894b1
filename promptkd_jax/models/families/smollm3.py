"""SmolLM3: a Llama of which every fourth layer sees no positions."""

from collections.abc import Mapping
from typing import Any

from promptkd_jax.models.config import DecoderConfig, LayerKind
from promptkd_jax.models.families import base
from promptkd_jax.models.families.gguf_layout import GGUFLayout
from promptkd_jax.models.families.llama import (
    GGUF_NAMES,
    GGUF_ROTARY_PAIRS,
    llama_tensors,
    read_llama,
)


def _read(c: Mapping[str, Any], source: str) -> DecoderConfig:
    rope, depth = base.read_rope(c, source, theta=2e6), c["num_hidden_layers"]
    interval = c.get("no_rope_layer_interval", 4)
    turned = c.get("no_rope_layers") or [(layer + 1) % interval != 0 for layer in range(depth)]
    window = c.get("sliding_window") if c.get("use_sliding_window") else None
    types = ["full_attention" if has_rope else "sliding_attention" for has_rope in turned]
    types = base.read_layer_types(c, source, types)
    layers = [
        LayerKind(rope if has_rope else None, window if kind == "sliding_attention" else None)
        for has_rope, kind in zip(turned, types, strict=True)
    ]
    return read_llama(c, source, layers, tied=c.get("tie_word_embeddings", True))


def _export_fields(config: DecoderConfig) -> dict[str, list]:
    ropes = [config.kind(layer).rope for layer in range(config.num_layers)]
    return base.layer_types(config) | {"no_rope_layers": [int(x is not None) for x in ropes]}


_CONFIG = {
    "model_type": "smollm3",
    "vocab_size": 128256,
    "max_position_embeddings": 65536,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5000000.0,
    "no_rope_layer_interval": 4,
    "tie_word_embeddings": True,
    "eos_token_id": 128012,
}

FAMILIES = (
    base.Family(
        model_type="smollm3",
        architecture="SmolLM3ForCausalLM",
        read=_read,
        tensors=llama_tensors,
        export_fields=_export_fields,
        gguf=GGUFLayout(
            architecture="smollm3",
            names=GGUF_NAMES,
            constants={
                "hidden_act": "silu",
                "attention_bias": False,
                "mlp_bias": False,
                "no_rope_layer_interval": 4,  # llama.cpp knows no other
                "use_sliding_window": False,
            },
            rotary_pairs=GGUF_ROTARY_PAIRS,
        ),
        published=base.published(
            ("hidden_size", "num_hidden_layers", "intermediate_size"),
            (
                _CONFIG,
                (2048, 36, 11008),
                "HuggingFaceTB/SmolLM3-3B",
                "HuggingFaceTB/SmolLM3-3B-Base",
            ),
        ),
    ),
)
