"""Qwen2 and 2.5 (biases of query, key and value), Qwen3 (norms of query and key)."""

from collections.abc import Mapping
from typing import Any

from promptkd_jax.infra.errors import ModelError
from promptkd_jax.models.config import DecoderConfig
from promptkd_jax.models.families import base
from promptkd_jax.models.families.llama import ROTARY_TABLES, llama_tensors, read_llama


def _read_qwen2(c: Mapping[str, Any], source: str) -> DecoderConfig:
    window = _sliding_window(c, source)
    return read_llama(c, source, qkv_bias=True, out_bias=False, sliding_window=window)


def _read_qwen3(c: Mapping[str, Any], source: str) -> DecoderConfig:
    return read_llama(c, source, qk_norm=True, sliding_window=_sliding_window(c, source))


def _sliding_window(c: Mapping[str, Any], source: str) -> int | None:
    """Qwen's window is for the layers that `layer_types` names, or from `max_window_layers` on."""
    sliding_window = c.get("sliding_window", 4096)
    if not c.get("use_sliding_window", False) or sliding_window is None:
        return None
    full = c.get("max_window_layers", 28)
    kinds = c.get("layer_types") or [
        "sliding_attention" if layer >= full else "full_attention"
        for layer in range(c["num_hidden_layers"])
    ]
    if len(set(kinds)) > 1:
        raise ModelError(
            f"{source}: {kinds.count('sliding_attention')} of {len(kinds)} layers have a sliding "
            f"window (layer_types, or max_window_layers = {full}); only all or none is supported "
            "(set use_sliding_window to false for none)"
        )
    return sliding_window if kinds[0] == "sliding_attention" else None


FAMILIES = tuple(
    base.Family(
        model_type=model_type,
        architecture=architecture,
        read=read,
        tensors=llama_tensors,
        ignored=ROTARY_TABLES,
    )
    for model_type, architecture, read in (
        ("qwen2", "Qwen2ForCausalLM", _read_qwen2),
        ("qwen3", "Qwen3ForCausalLM", _read_qwen3),
    )
)
