"""OLMo 2 (norms behind attention and feed-forward alone) and OLMoE (a mixture of experts), both
with norms of all queries and keys together."""

from collections.abc import Mapping
from typing import Any

from promptkd_jax.models.config import DecoderConfig
from promptkd_jax.models.families import base
from promptkd_jax.models.families.gguf_layout import GGUFLayout, layer_names
from promptkd_jax.models.families.llama import (
    GGUF_ENDS,
    GGUF_LINEAR,
    GGUF_QK_NORMS,
    llama_tensors,
    read_llama,
)

_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "post_feedforward_layernorm": "post_mlp_norm",
}


def _read(c: Mapping[str, Any], source: str) -> DecoderConfig:
    eps = c.get("rms_norm_eps", 1e-5)
    return read_llama(c, source, qk_norm="all", norm_placement="after", norm_eps=eps)


def _tensors(config: DecoderConfig) -> tuple[base.Tensor, ...]:
    return llama_tensors(config, _NORMS)


def _read_mixture(c: Mapping[str, Any], source: str) -> DecoderConfig:
    base.require(c, source, clip_qkv=None)
    normed = c.get("norm_topk_prob", False)
    experts = base.read_experts(c, source, per_token=8, norm_topk_prob=normed)
    eps = c.get("rms_norm_eps", 1e-5)
    return read_llama(c, source, qk_norm="all", norm_eps=eps, experts=experts)


def _mixture_tensors(config: DecoderConfig) -> tuple[base.Tensor, ...]:
    rows = base.expert_rows("layers.{}.mlp.gate", "layers.{}.mlp.experts.{}")
    return llama_tensors(config, network=rows)


_GGUF_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}

FAMILIES = (
    base.Family(
        model_type="olmo2",
        architecture="Olmo2ForCausalLM",
        read=_read,
        tensors=_tensors,
        gguf=GGUFLayout(
            architecture="olmo2",
            names=GGUF_ENDS | layer_names(GGUF_LINEAR | GGUF_QK_NORMS | _GGUF_NORMS),
            constants={"hidden_act": "silu", "tie_word_embeddings": False},
        ),
    ),
    base.Family(
        model_type="olmoe",
        architecture="OlmoeForCausalLM",
        read=_read_mixture,
        tensors=_mixture_tensors,
    ),
)
