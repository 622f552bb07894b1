"""OLMo 2: norms behind attention and feed-forward alone, and of all queries and keys together."""

from collections.abc import Mapping
from typing import Any

from promptkd_jax.models.config import DecoderConfig
from promptkd_jax.models.families import base
from promptkd_jax.models.families.llama import llama_tensors, read_llama

_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "post_feedforward_layernorm": "post_mlp_norm",
}


def _read(c: Mapping[str, Any], source: str) -> DecoderConfig:
    eps = c.get("rms_norm_eps", 1e-5)
    return read_llama(c, source, qk_norm="all", pre_norm=False, post_norm=True, norm_eps=eps)


def _tensors(config: DecoderConfig) -> tuple[base.Tensor, ...]:
    return llama_tensors(config, _NORMS)


FAMILIES = (
    base.Family(model_type="olmo2", architecture="Olmo2ForCausalLM", read=_read, tensors=_tensors),
)
