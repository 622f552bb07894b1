"""Gemma 3, its text models: norms on both sides, of which scales lack 1, windows in five of six
layers, whose rotary positions turn faster, and norms of query and key."""

from collections.abc import Mapping
from typing import Any

from promptkd_jax.models.config import DecoderConfig, LayerKind
from promptkd_jax.models.families import base
from promptkd_jax.models.families.llama import llama_tensors, read_llama

_NORMS = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "post_mlp_norm",
}


def _read(c: Mapping[str, Any], source: str) -> DecoderConfig:
    base.require(
        c,
        source,
        final_logit_softcapping=None,
        attn_logit_softcapping=None,
        use_bidirectional_attention=False,
    )
    theta = {"full_attention": c.get("rope_theta", 1e6)}
    theta["sliding_attention"] = c.get("rope_local_base_freq", 10000.0)
    kinds = {
        name: LayerKind(
            base.read_rope(_of(name, c), source, layer_type=name, theta=theta[name]),
            c.get("sliding_window", 4096) if name == "sliding_attention" else None,
        )
        for name in theta
    }
    period = c.get("sliding_window_pattern", 6)
    types = c.get("layer_types") or [
        "full_attention" if (layer + 1) % period == 0 else "sliding_attention"
        for layer in range(c["num_hidden_layers"])
    ]
    return read_llama(
        c | {"hidden_act": c.get("hidden_activation", "gelu_pytorch_tanh")},
        source,
        [kinds[name] for name in types],
        tied=c.get("tie_word_embeddings", True),
        head_dim=c.get("head_dim", 256),
        qk_norm="head",
        post_norm=True,
        norm_offset=1.0,
        embedding_scale=c["hidden_size"] ** 0.5,
        attention_scale=c.get("query_pre_attn_scalar", 256) ** -0.5,
    )


def _of(name: str, c: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config as layers of this type see it: the older flat fields are of the other type."""
    without = {"rope_theta", *(("rope_scaling",) if name == "sliding_attention" else ())}
    return {field: value for field, value in c.items() if field not in without}


def _tensors(config: DecoderConfig) -> tuple[base.Tensor, ...]:
    return llama_tensors(config, _NORMS)


_CONFIG = {
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
        model_type="gemma3_text",
        architecture="Gemma3ForCausalLM",
        read=_read,
        tensors=_tensors,
        published=base.published(
            ("hidden_size", "num_hidden_layers", "intermediate_size"),
            (_CONFIG, (640, 18, 2048), "google/gemma-3-270m", "google/gemma-3-270m-it"),
            (_CONFIG, (1152, 26, 6912), "google/gemma-3-1b-pt", "google/gemma-3-1b-it"),
        ),
    ),
)
