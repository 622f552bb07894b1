"""Qwen2 and 2.5 (biases of query, key and value), Qwen3 (norms of query and key), and its
mixtures of experts."""

from collections.abc import Mapping
from typing import Any

from promptkd_jax.models.config import DecoderConfig, LayerKind
from promptkd_jax.models.families import base
from promptkd_jax.models.families.gguf_layout import GGUFLayout, layer_names
from promptkd_jax.models.families.llama import (
    GGUF_NAMES,
    GGUF_QK_NORMS,
    ROTARY_TABLES,
    llama_tensors,
    read_llama,
)


def _read_qwen2(c: Mapping[str, Any], source: str) -> DecoderConfig:
    return read_llama(c, source, _layers(c, source), qkv_bias=True, out_bias=False)


def _read_qwen3(c: Mapping[str, Any], source: str) -> DecoderConfig:
    return read_llama(c, source, qk_norm="head", layers=_layers(c, source))


def _read_mixture(c: Mapping[str, Any], source: str) -> DecoderConfig:
    # As all that are published; else some layers would have one network for all tokens.
    dense = c.get("mlp_only_layers") or []
    base.require({**c, "mlp_only_layers": dense}, source, mlp_only_layers=[], decoder_sparse_step=1)
    # Its window, unlike that of the others, is for all layers.
    window = c.get("sliding_window", 4096) if c.get("use_sliding_window") else None
    normed = c.get("norm_topk_prob", False)
    return read_llama(
        {**c, "intermediate_size": c["moe_intermediate_size"]},
        source,
        [LayerKind(base.read_rope(c, source), window)],
        qk_norm="head",
        experts=base.read_experts(c, source, per_token=8, norm_topk_prob=normed),
    )


def _mixture_tensors(config: DecoderConfig) -> tuple[base.Tensor, ...]:
    rows = base.expert_rows("layers.{}.mlp.gate", "layers.{}.mlp.experts.{}")
    return llama_tensors(config, network=rows)


def _layers(c: Mapping[str, Any], source: str) -> list[LayerKind]:
    """Qwen's window is for the layers that `layer_types` names, or from `max_window_layers` on."""
    rope, window = base.read_rope(c, source), c.get("sliding_window", 4096)
    if not c.get("use_sliding_window", False) or window is None:
        return [LayerKind(rope)]
    full, depth = c.get("max_window_layers", 28), c["num_hidden_layers"]
    types = [base.LAYER_TYPES[layer >= full] for layer in range(depth)]
    types = base.read_layer_types(c, source, types)
    return [LayerKind(rope, window if name == "sliding_attention" else None) for name in types]


# What GGUF files of Qwen2 have beside those of a Llama.
_BIASES = {f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"}

_QWEN25 = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "use_sliding_window": False,
    "eos_token_id": 151645,
}
_QWEN3 = _QWEN25 | {
    "model_type": "qwen3",
    "max_position_embeddings": 40960,
    "head_dim": 128,
    "attention_bias": False,
}
_TIED, _UNTIED = ({"tie_word_embeddings": tied} for tied in (True, False))
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_SIZES += ("intermediate_size",)


def _names(name: str, *suffixes: str) -> tuple[str, ...]:
    return tuple(f"Qwen/{name}{suffix}" for suffix in ("", *suffixes))


_QWEN25_SIZES = (
    (_QWEN25 | _TIED, (896, 24, 14, 2, 4864), *_names("Qwen2.5-0.5B", "-Instruct")),
    (_QWEN25 | _TIED, (1536, 28, 12, 2, 8960), *_names("Qwen2.5-1.5B", "-Instruct")),
    (_QWEN25 | _TIED, (2048, 36, 16, 2, 11008), *_names("Qwen2.5-3B", "-Instruct")),
    (
        _QWEN25 | _UNTIED | {"vocab_size": 152064},
        (3584, 28, 28, 4, 18944),
        *_names("Qwen2.5-7B", "-Instruct"),
    ),
)
_QWEN3_SIZES = (
    (_QWEN3 | _TIED, (1024, 28, 16, 8, 3072), *_names("Qwen3-0.6B", "-Base")),
    (_QWEN3 | _TIED, (2048, 28, 16, 8, 6144), *_names("Qwen3-1.7B", "-Base")),
    (_QWEN3 | _TIED, (2560, 36, 32, 8, 9728), *_names("Qwen3-4B", "-Base")),
    (_QWEN3 | _UNTIED, (4096, 36, 32, 8, 12288), *_names("Qwen3-8B", "-Base")),
)
_MIXTURE = (
    _QWEN3
    | _UNTIED
    | {
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
    }
)

_DENSE = tuple(
    base.Family(
        model_type=model_type,
        architecture=architecture,
        read=read,
        tensors=llama_tensors,
        export_fields=base.layer_types,
        ignored=ROTARY_TABLES,
        gguf=GGUFLayout(
            architecture=model_type,
            names=GGUF_NAMES | more,
            constants={"hidden_act": "silu", "use_sliding_window": False},
        ),
        published=base.published(_SIZES, *sizes),
    )
    for model_type, architecture, read, more, sizes in (
        (
            "qwen2",
            "Qwen2ForCausalLM",
            _read_qwen2,
            layer_names(_BIASES, kinds=("bias",)),
            _QWEN25_SIZES,
        ),
        ("qwen3", "Qwen3ForCausalLM", _read_qwen3, layer_names(GGUF_QK_NORMS), _QWEN3_SIZES),
    )
)

FAMILIES = (
    *_DENSE,
    base.Family(
        model_type="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        read=_read_mixture,
        tensors=_mixture_tensors,
        export_fields=lambda config: {"decoder_sparse_step": 1, "mlp_only_layers": []},
        published=base.published(
            _SIZES, (_MIXTURE, (2048, 48, 32, 4, 6144), *_names("Qwen3-30B-A3B", "-Base"))
        ),
    ),
)
