"""Phi-3 and Phi-4-mini: projections that are stored fused, rotary positions of a part of a head."""

from collections.abc import Mapping
from typing import Any

from promptkd_jax.models.config import DecoderConfig, Dropout, LayerKind
from promptkd_jax.models.families import base
from promptkd_jax.models.families.llama import read_llama


def _read(c: Mapping[str, Any], source: str) -> DecoderConfig:
    rope = base.read_rope(c, source, partial=True)
    layers = [LayerKind(rope, c.get("sliding_window"))]
    dropout = Dropout(residual=c.get("resid_pdrop", 0.0), attention=c.get("attention_dropout", 0.0))
    eps = c.get("rms_norm_eps", 1e-5)
    return read_llama(c, source, layers, norm_eps=eps, dropout=dropout)


def _tensors(config: DecoderConfig) -> tuple[base.Tensor, ...]:
    layer, attention, mlp = "layers.{}", "layers/attention", "layers/mlp"
    stem = f"{layer}.self_attn"
    qkv = [
        base.linear_rows(
            f"{stem}.qkv_proj",
            f"{attention}/{name}",
            f"({heads} H) D -> D {heads} H",
            bias=False,
            fused=("N H", "K H", "K H"),
            part=part,
        )
        for part, (name, heads) in enumerate((("query", "N"), ("key", "K"), ("value", "K")))
    ]
    gate_up = [
        base.linear_rows(
            f"{layer}.mlp.gate_up_proj",
            f"{mlp}/{name}",
            "F D -> D F",
            bias=False,
            fused=("F", "F"),
            part=part,
        )
        for part, name in enumerate(("gate", "up"))
    ]
    return (
        *base.embedding_rows("embed_tokens.weight", config),
        *base.norm_rows("norm", "final_norm"),
        *base.norm_rows(f"{layer}.input_layernorm", "layers/attention_norm"),
        *base.norm_rows(f"{layer}.post_attention_layernorm", "layers/mlp_norm"),
        *(row for rows in (*qkv, *gate_up) for row in rows),
        *base.linear_rows(f"{stem}.o_proj", f"{attention}/out", "D (N H) -> N H D", bias=False),
        *base.linear_rows(f"{layer}.mlp.down_proj", f"{mlp}/down", "D F -> F D", bias=False),
    )


FAMILIES = (
    base.Family(model_type="phi3", architecture="Phi3ForCausalLM", read=_read, tensors=_tensors),
)
