"""Granite: a Llama whose inputs, scores, residuals and logits are multiplied by numbers."""

from collections.abc import Mapping
from typing import Any

from promptkd_jax.models.config import DecoderConfig
from promptkd_jax.models.families import base
from promptkd_jax.models.families.llama import llama_tensors, read_llama


def _read(c: Mapping[str, Any], source: str) -> DecoderConfig:
    return read_llama(
        c,
        source,
        input_scale=float(c.get("embedding_multiplier", 1.0)),
        attention_scale=float(c.get("attention_multiplier", 1.0)),
        residual_scale=float(c.get("residual_multiplier", 1.0)),
        logit_scale=1.0 / float(c.get("logits_scaling", 1.0)),
    )


FAMILIES = (
    base.Family(
        model_type="granite", architecture="GraniteForCausalLM", read=_read, tensors=llama_tensors
    ),
)
