"""Gemma 2 and 3 (text): norms on both sides, of which scales lack 1, and layers with windows.

Gemma 2 caps scores and logits, and every other layer of it has a window. Gemma 3 has norms of query
and key in their place, and windows in five of six layers, whose rotary positions turn faster.
"""

from collections.abc import Mapping
from typing import Any

from promptkd_jax.models.config import DecoderConfig, LayerKind
from promptkd_jax.models.families import base, gguf_layout
from promptkd_jax.models.families.gguf_layout import GGUFLayout, Settings, layer_names
from promptkd_jax.models.families.llama import (
    GGUF_ENDS,
    GGUF_LINEAR,
    GGUF_QK_NORMS,
    llama_tensors,
    read_llama,
)

_NORMS = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "post_mlp_norm",
}


def _read_gemma2(c: Mapping[str, Any], source: str) -> DecoderConfig:
    rope = base.read_rope(c, source)
    kinds = {
        "sliding_attention": LayerKind(rope, c.get("sliding_window", 4096)),
        "full_attention": LayerKind(rope),
    }
    # Defaults are those of transformers: its files leave out what is as there.
    caps = {
        "attention_soft_cap": _number(c.get("attn_logit_softcapping", 50.0)),
        "logit_soft_cap": _number(c.get("final_logit_softcapping", 30.0)),
    }
    return _decoder(c, source, kinds, period=2, **caps)


def _read_gemma3(c: Mapping[str, Any], source: str) -> DecoderConfig:
    # Layers with a window have rotary positions of their own, by another base.
    theta = {"full_attention": c.get("rope_theta", 1e6)}
    theta["sliding_attention"] = c.get("rope_local_base_freq", 10000.0)
    kinds = {
        name: LayerKind(
            base.read_rope(_of(name, c), source, layer_type=name, theta=theta[name]),
            c.get("sliding_window", 4096) if name == "sliding_attention" else None,
        )
        for name in theta
    }
    caps = {
        "attention_soft_cap": _number(c.get("attn_logit_softcapping")),
        "logit_soft_cap": _number(c.get("final_logit_softcapping")),
    }
    period = c.get("sliding_window_pattern", 6)  # null where layer_types has none
    return _decoder(c, source, kinds, period=period, qk_norm="head", **caps)


def _decoder(
    c: Mapping[str, Any],
    source: str,
    kinds: Mapping[str, LayerKind],
    period: int | None,
    **differing: Any,
) -> DecoderConfig:
    """A decoder of which every `period`-th layer has no window, where the config lists no types."""
    if c.get("use_bidirectional_attention"):  # of Gemma 2 it is null
        base.require(c, source, use_bidirectional_attention=False)
    # From Llama it differs in its numbers: embeddings times sqrt(D), scores by an exponent of their
    # own, norms of both sides that multiply by 1 + scale.
    types = _every(period, c["num_hidden_layers"]) if period else []
    return read_llama(
        c | {"hidden_act": c.get("hidden_activation") or "gelu_pytorch_tanh"},
        source,
        [kinds[name] for name in base.read_layer_types(c, source, types)],
        tied=c.get("tie_word_embeddings", True),
        head_dim=c.get("head_dim", 256),
        norm_placement="both",
        norm_offset=1.0,
        embedding_scale=c["hidden_size"] ** 0.5,
        attention_scale=(c.get("query_pre_attn_scalar") or 256) ** -0.5,
        **differing,
    )


def _every(period: int, depth: int) -> list[str]:
    full = [(layer + 1) % period == 0 for layer in range(depth)]
    return ["full_attention" if x else "sliding_attention" for x in full]


def _gemma3_fields(config: DecoderConfig) -> dict[str, Any]:
    """The types of layers, and their period, which MLX reads in place of the types.

    The period of types that have none is null: MLX then stops; it takes 6 where nothing is said.
    """
    fields = base.layer_types(config)
    types = fields["layer_types"]
    # The first layer without a window says the period, if all others follow it.
    period = types.index("full_attention") + 1 if "full_attention" in types else None
    period = period if period and types == _every(period, len(types)) else None
    return fields | dict.fromkeys(("sliding_window_pattern", "_sliding_window_pattern"), period)


def _number(cap: float | None) -> float | None:
    return None if cap is None else float(cap)


def _of(name: str, c: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config as layers of this type see it: the older flat fields are of the other type."""
    without = {"rope_theta", *(("rope_scaling",) if name == "sliding_attention" else ())}
    return {field: value for field, value in c.items() if field not in without}


def _tensors(config: DecoderConfig) -> tuple[base.Tensor, ...]:
    return llama_tensors(config, _NORMS)


_GGUF_NORMS = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_WINDOW, _LOCAL_THETA = "attention.sliding_window", "rope.freq_base_swa"
_PATTERN = "attention.sliding_window_pattern"
_SOFT_CAPS = {
    "attn_logit_softcapping": "attention_soft_cap",
    "final_logit_softcapping": "logit_soft_cap",
}
_GEMMA2_27B, _GEMMA3_27B = 46, 62  # their depths


def _gguf_gemma2(settings: Settings) -> dict[str, Any]:
    caps = zip(_SOFT_CAPS, (50.0, 30.0))
    fields = _gguf_fields(settings, 4096, 2, _GEMMA2_27B)
    return fields | {name: settings(name, cap) for name, cap in caps}


def _gguf_gemma2_settings(config: DecoderConfig) -> dict[str, Any]:
    settings = _gguf_settings(config)
    settings.pop(_LOCAL_THETA, None)  # it has one for all layers
    return settings | {theirs: getattr(config, ours) for theirs, ours in _SOFT_CAPS.items()}


def _gguf_gemma3(settings: Settings) -> dict[str, Any]:
    fields = _gguf_fields(settings, 0, 6, _GEMMA3_27B)
    return fields | {"rope_local_base_freq": settings(_LOCAL_THETA, 10000.0)}


def _gguf_fields(settings: Settings, window: int, period: int, largest: int) -> dict[str, Any]:
    """What both read; `largest`: the depth of the model whose scores are scaled otherwise."""
    fields, depth = gguf_layout.rotary_fields(settings), settings("block_count")
    window, pattern = settings(_WINDOW, window), settings(_PATTERN, period)
    if not isinstance(pattern, list):
        pattern = [(layer + 1) % pattern != 0 for layer in range(depth)]
    # Llama.cpp knows no other scales of scores.
    per_head = settings("embedding_length") // settings("attention.head_count")
    return fields | {
        "query_pre_attn_scalar": per_head if depth == largest else fields["head_dim"],
        "sliding_window": window or None,
        "layer_types": [
            "sliding_attention" if window and local else "full_attention" for local in pattern
        ],
    }


def _gguf_settings(config: DecoderConfig) -> dict[str, Any]:
    settings = gguf_layout.rotary_settings(config)
    kinds = [config.kind(layer) for layer in range(config.num_layers)]
    if local := next((kind for kind in kinds if kind.sliding_window), None):
        settings |= {
            _WINDOW: local.sliding_window,
            _LOCAL_THETA: local.rope.theta,
            _PATTERN: [kind.sliding_window is not None for kind in kinds],
        }
    return settings


def _gguf(architecture: str, qk_norms: Mapping[str, str], read: Any, write: Any) -> GGUFLayout:
    return GGUFLayout(
        architecture=architecture,
        names=GGUF_ENDS | layer_names(GGUF_LINEAR | qk_norms | _GGUF_NORMS),
        constants={"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False},
        read=read,
        write=write,
        norm_offset=1.0,
    )


_GEMMA2 = {
    "model_type": "gemma2",
    "vocab_size": 256000,
    "max_position_embeddings": 8192,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
}
_GEMMA3 = {
    "model_type": "gemma3_text",
    "vocab_size": 262144,
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
}

FAMILIES = (
    base.Family(
        model_type="gemma2",
        architecture="Gemma2ForCausalLM",
        read=_read_gemma2,
        tensors=_tensors,
        export_fields=base.layer_types,
        gguf=_gguf("gemma2", {}, _gguf_gemma2, _gguf_gemma2_settings),
        published=base.published(
            ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
            + ("intermediate_size",),
            (_GEMMA2, (2304, 26, 8, 4, 9216), "google/gemma-2-2b", "google/gemma-2-2b-it"),
            (_GEMMA2, (3584, 42, 16, 8, 14336), "google/gemma-2-9b", "google/gemma-2-9b-it"),
        ),
    ),
    base.Family(
        model_type="gemma3_text",
        architecture="Gemma3ForCausalLM",
        read=_read_gemma3,
        tensors=_tensors,
        export_fields=_gemma3_fields,
        gguf=_gguf("gemma3", GGUF_QK_NORMS, _gguf_gemma3, _gguf_settings),
        published=base.published(
            ("hidden_size", "num_hidden_layers", "intermediate_size"),
            (_GEMMA3, (640, 18, 2048), "google/gemma-3-270m", "google/gemma-3-270m-it"),
            (_GEMMA3, (1152, 26, 6912), "google/gemma-3-1b-pt", "google/gemma-3-1b-it"),
        ),
    ),
)
