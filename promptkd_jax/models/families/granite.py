"""Granite: a Llama whose inputs, scores, residuals and logits are multiplied by numbers."""

from collections.abc import Mapping
from typing import Any

from promptkd_jax.models.config import DecoderConfig
from promptkd_jax.models.families import base, gguf_layout
from promptkd_jax.models.families.gguf_layout import GGUFLayout, Settings
from promptkd_jax.models.families.llama import (
    GGUF_NAMES,
    GGUF_ROTARY_PAIRS,
    llama_tensors,
    read_llama,
)


def _read(c: Mapping[str, Any], source: str) -> DecoderConfig:
    return read_llama(
        c,
        source,
        input_scale=float(c.get("embedding_multiplier", 1.0)),
        attention_scale=float(c.get("attention_multiplier", 1.0)),
        residual_scale=float(c.get("residual_multiplier", 1.0)),
        logit_scale=1.0 / float(c.get("logits_scaling", 1.0)),
    )


def _export_fields(config: DecoderConfig) -> dict[str, Any]:
    return {"attention_bias": config.out_bias, "mlp_bias": config.mlp_bias}


def _gguf_fields(settings: Settings) -> dict[str, Any]:
    fields = gguf_layout.llama_fields(settings)
    return fields | {
        "embedding_multiplier": settings("embedding_scale", 1.0),
        "attention_multiplier": settings("attention.scale", fields["head_dim"] ** -0.5),
        "residual_multiplier": settings("residual_scale", 1.0),
    }


def _gguf_settings(config: DecoderConfig) -> dict[str, Any]:
    return gguf_layout.llama_settings(config) | {
        "embedding_scale": config.input_scale,
        "attention.scale": config.attention_scale,
        "residual_scale": config.residual_scale,
        "logit_scale": 1.0 / config.logit_scale,
    }


FAMILIES = (
    base.Family(
        model_type="granite",
        architecture="GraniteForCausalLM",
        read=_read,
        tensors=llama_tensors,
        export_fields=_export_fields,
        gguf=GGUFLayout(
            architecture="granite",
            names=GGUF_NAMES,
            fields=gguf_layout.FIELDS | {"logit_scale": "logits_scaling"},
            constants={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
            read=_gguf_fields,
            write=_gguf_settings,
            factors=gguf_layout.llama_factors,
            rotary_pairs=GGUF_ROTARY_PAIRS,
        ),
    ),
)
