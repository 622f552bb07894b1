"""Phi-3 and Phi-4-mini: projections that are stored fused, rotary positions of a part of a head."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from promptkd_jax.models.config import DecoderConfig, Dropout, LayerKind
from promptkd_jax.models.families import base, gguf_layout
from promptkd_jax.models.families.gguf_layout import GGUFLayout, Settings, layer_names
from promptkd_jax.models.families.llama import GGUF_ENDS, GGUF_NORMS, read_llama


def _read(c: Mapping[str, Any], source: str) -> DecoderConfig:
    rope = base.read_rope(c, source, partial=True)
    layers = [LayerKind(rope, c.get("sliding_window"))]
    dropout = Dropout(
        residual=c.get("resid_pdrop", 0.0), attention=c.get("attention_dropout") or 0.0
    )
    eps = c.get("rms_norm_eps", 1e-5)
    return read_llama(c, source, layers, norm_eps=eps, dropout=dropout)


def _export_fields(config: DecoderConfig) -> dict[str, Any]:
    """The fields by which transformers 4 and MLX know rotary positions.

    They know a `longrope` of three fields alone, from which its attention factor is computed. One
    that they would compute otherwise has the fields of transformers 5; these two refuse them.
    """
    rope = config.kind(0).rope
    fields = {"partial_rotary_factor": rope.share}
    if not (scaling := rope.scaling) or scaling.kind != "longrope":
        return fields
    fields["original_max_position_embeddings"] = scaling.original_max_position
    factors = {
        "short_factor": list(scaling.short_factors),
        "long_factor": list(scaling.long_factors),
    }
    three = {"type": "longrope", **factors}
    said = fields | {"max_position_embeddings": config.max_positions, "rope_scaling": three}
    if base.read_rope(said, "config", theta=rope.theta, partial=True) == rope:
        return fields | {"rope_scaling": three}
    more = {"factor": scaling.factor, "attention_factor": scaling.attention_factor}
    return fields | {"rope_scaling": {"rope_type": "longrope", **factors, **more}}


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


_WINDOW, _ORIGINAL = "attention.sliding_window", "rope.scaling.original_context_length"
_ATTENTION_FACTOR = "rope.scaling.attn_factor"
_FACTORS = {
    "short_factor": "rope_factors_short.weight",
    "long_factor": "rope_factors_long.weight",
}


def _gguf_fields(settings: Settings) -> dict[str, Any]:
    # Llama.cpp reads the window and does without it; the model has it all the same.
    fields = gguf_layout.rotary_fields(settings, partial=True)
    fields["sliding_window"] = settings(_WINDOW, 0) or None
    original = settings(_ORIGINAL, settings("context_length"))
    fields["original_max_position_embeddings"] = original
    factors = {field: settings.factors(name) for field, name in _FACTORS.items()}
    attention_factor = settings(_ATTENTION_FACTOR, 1.0)
    # Of long contexts: a factor for each rotary frequency, and one for all scores, which the file
    # has to say only where it is not what the lengths give.
    if all(array is not None for array in factors.values()):
        shortest = {field: [float(str(x)) for x in array] for field, array in factors.items()}
        fields["rope_scaling"] = {"rope_type": "longrope", **shortest}
        length = {"max_position_embeddings": settings("context_length")}
        computed = base.read_rope(fields | length, settings.path, partial=True).scaling
        if not math.isclose(attention_factor, computed.attention_factor, rel_tol=1e-6):
            fields["rope_scaling"]["attention_factor"] = attention_factor
    return fields


def _gguf_settings(config: DecoderConfig) -> dict[str, Any]:
    kind = config.kind(0)
    settings = gguf_layout.rotary_settings(config) | {
        _WINDOW: kind.sliding_window or 0,
        _ORIGINAL: config.max_positions,
    }
    if (scaling := kind.rope.scaling) and scaling.kind == "longrope":
        settings[_ORIGINAL] = scaling.original_max_position
        settings[_ATTENTION_FACTOR] = scaling.attention_factor
    return settings


def _gguf_factors(config: DecoderConfig) -> dict[str, np.ndarray]:
    scaling = config.kind(0).rope.scaling
    if not scaling or scaling.kind != "longrope":
        return {}
    values = {"short_factor": scaling.short_factors, "long_factor": scaling.long_factors}
    return {_FACTORS[field]: np.asarray(x, np.float32) for field, x in values.items()}


_GGUF_ROWS = {
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}

FAMILIES = (
    base.Family(
        model_type="phi3",
        architecture="Phi3ForCausalLM",
        read=_read,
        tensors=_tensors,
        export_fields=_export_fields,
        gguf=GGUFLayout(
            architecture="phi3",
            names=GGUF_ENDS | layer_names(GGUF_NORMS | _GGUF_ROWS),
            constants={"hidden_act": "silu"},
            read=_gguf_fields,
            write=_gguf_settings,
            factors=_gguf_factors,
        ),
    ),
)
