"""Mixtral: a Mistral with a mixture of experts in every layer."""

from collections.abc import Mapping
from typing import Any

from promptkd_jax.models.config import DecoderConfig, LayerKind
from promptkd_jax.models.families import base
from promptkd_jax.models.families.llama import ROTARY_TABLES, llama_tensors, read_llama


def _read(c: Mapping[str, Any], source: str) -> DecoderConfig:
    rope = base.read_rope(c, source, theta=1e6)
    return read_llama(
        {"rms_norm_eps": 1e-5, **c},
        source,
        [LayerKind(rope, c.get("sliding_window"))],
        experts=base.read_experts(c, source, per_token=2, norm_topk_prob=True),
    )


def _tensors(config: DecoderConfig) -> tuple[base.Tensor, ...]:
    stem = "layers.{}.block_sparse_moe"
    return llama_tensors(
        config,
        network=base.expert_rows(f"{stem}.gate", f"{stem}.experts.{{}}", ("w1", "w3", "w2")),
    )


FAMILIES = (
    base.Family(
        model_type="mixtral",
        architecture="MixtralForCausalLM",
        read=_read,
        tensors=_tensors,
        ignored=ROTARY_TABLES,
    ),
)
