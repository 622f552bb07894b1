"""Mixtral: a Mistral with a mixture of experts in every layer."""

from collections.abc import Mapping
from typing import Any

from promptkd_jax.models.config import DecoderConfig
from promptkd_jax.models.families import base
from promptkd_jax.models.families.llama import ROTARY_TABLES, llama_tensors, read_llama


def _read(c: Mapping[str, Any], source: str) -> DecoderConfig:
    return read_llama(
        {"rms_norm_eps": 1e-5, **c},
        source,
        sliding_window=c.get("sliding_window"),
        experts=base.read_experts(c, per_token=2, renormalized=True),
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
