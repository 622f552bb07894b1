"""Llama and Mistral, and what those that descend from Llama take over."""

from collections.abc import Mapping, Sequence
from typing import Any

from promptkd_jax.models.config import DecoderConfig, Dropout, LayerKind
from promptkd_jax.models.families import base, gguf_layout
from promptkd_jax.models.families.gguf_layout import GGUFLayout

ROTARY_TABLES = (r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)  # in files of transformers 4


def read_llama(
    c: Mapping[str, Any],
    source: str,
    layers: Sequence[LayerKind] | None = None,
    sliding_window: int | None = None,
    **differing: Any,
) -> DecoderConfig:
    """Reads the `config.json` of a Llama, or of a family that differs from it in the kinds of its
    `layers`, or their window, or in some fields of `DecoderConfig`."""
    if layers is None:
        layers = [LayerKind(base.read_rope(c, source), sliding_window)]
    num_heads, bias = c["num_attention_heads"], c.get("attention_bias", False)
    fields = {
        "family": c["model_type"],
        "vocab_size": c["vocab_size"],
        "width": c["hidden_size"],
        "num_layers": c["num_hidden_layers"],
        "num_heads": num_heads,
        "num_kv_heads": c.get("num_key_value_heads") or num_heads,
        "head_dim": c.get("head_dim") or c["hidden_size"] // num_heads,
        "mlp_width": c["intermediate_size"],
        "max_positions": c["max_position_embeddings"],
        "norm": "rms",
        "norm_eps": c.get("rms_norm_eps", 1e-6),
        "activation": c.get("hidden_act", "silu"),
        "gated": True,
        "qkv_bias": bias,
        "out_bias": bias,
        "mlp_bias": c.get("mlp_bias", False),
        "tied": c.get("tie_word_embeddings", False),
        "dropout": Dropout(attention=c.get("attention_dropout") or 0.0),
        **base.kinds_of_layers(layers),
    }
    return DecoderConfig(**(fields | differing))


def _read_mistral(c: Mapping[str, Any], source: str) -> DecoderConfig:
    window = c.get("sliding_window", 4096)
    return read_llama(c, source, qkv_bias=False, out_bias=False, sliding_window=window)


NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}


def llama_tensors(
    config: DecoderConfig,
    norms: Mapping[str, str] = NORMS,
    network: Sequence[base.Tensor] | None = None,
) -> tuple[base.Tensor, ...]:
    """The table of a Llama, with the biases and the norms of query and key that `config` has.

    Args:
      norms: of a layer, by their names in a file those of ours.
      network: the rows of the feed-forward network, where they are others.
    """
    layer, attention, mlp = "layers.{}", "layers/attention", "layers/mlp"
    stem, bias, mlp_bias = f"{layer}.self_attn", config.qkv_bias, config.mlp_bias
    rows = [
        *base.embedding_rows("embed_tokens.weight", config),
        *base.norm_rows("norm", "final_norm"),
        *(
            row
            for theirs, ours in norms.items()
            for row in base.norm_rows(f"{layer}.{theirs}", f"layers/{ours}")
        ),
        *base.linear_rows(f"{stem}.q_proj", f"{attention}/query", "(N H) D -> D N H", bias=bias),
        *base.linear_rows(f"{stem}.k_proj", f"{attention}/key", "(K H) D -> D K H", bias=bias),
        *base.linear_rows(f"{stem}.v_proj", f"{attention}/value", "(K H) D -> D K H", bias=bias),
        *base.linear_rows(
            f"{stem}.o_proj", f"{attention}/out", "D (N H) -> N H D", bias=config.out_bias
        ),
    ]
    if network is None:
        network = [
            *base.linear_rows(f"{layer}.mlp.gate_proj", f"{mlp}/gate", "F D -> D F", bias=mlp_bias),
            *base.linear_rows(f"{layer}.mlp.up_proj", f"{mlp}/up", "F D -> D F", bias=mlp_bias),
            *base.linear_rows(f"{layer}.mlp.down_proj", f"{mlp}/down", "D F -> F D", bias=mlp_bias),
        ]
    rows += network
    if config.qk_norm == "head":
        rows += base.norm_rows(f"{stem}.q_norm", f"{attention}/query_norm", letter="H")
        rows += base.norm_rows(f"{stem}.k_norm", f"{attention}/key_norm", letter="H")
    elif config.qk_norm:
        for theirs, ours, heads in (("q_norm", "query_norm", "N"), ("k_norm", "key_norm", "K")):
            name, path = f"{stem}.{theirs}.weight", f"{attention}/{ours}/scale"
            rows.append(base.Tensor(name, path, f"({heads} H) -> {heads} H"))
    return tuple(rows)


GGUF_ENDS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": base.HEAD,
}
GGUF_LINEAR = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GGUF_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
GGUF_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
GGUF_NAMES = GGUF_ENDS | gguf_layout.layer_names(GGUF_LINEAR | GGUF_NORMS)
# Heads whose rows llama.cpp's converter permutes, in the files of Llama and of some of its heirs.
GGUF_ROTARY_PAIRS = {
    "self_attn.q_proj.weight": "num_attention_heads",
    "self_attn.k_proj.weight": "num_key_value_heads",
}
GGUF = GGUFLayout(
    architecture="llama",
    names=GGUF_NAMES,
    constants={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    read=gguf_layout.llama_fields,
    write=gguf_layout.llama_settings,
    factors=gguf_layout.llama_factors,
    rotary_pairs=GGUF_ROTARY_PAIRS,
)

_LLAMA_1 = {
    "model_type": "llama",
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "eos_token_id": 2,
}
_LLAMA_3 = _LLAMA_1 | {
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "eos_token_id": 128001,
}
_STRETCHED = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LLAMA_31 = _LLAMA_3 | {"rope_scaling": _STRETCHED | {"factor": 8.0}}
_LLAMA_32 = _LLAMA_3 | {
    "rope_scaling": _STRETCHED | {"factor": 32.0},
    "tie_word_embeddings": True,
}
_SMOLLM2 = _LLAMA_1 | {
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 0,
}
_SMOLLM2_LARGE = _SMOLLM2 | {"rope_theta": 130000.0}


def _and_instruct(name: str) -> tuple[str, str]:
    return name, f"{name}-Instruct"


FAMILIES = (
    base.Family(
        model_type="llama",
        architecture="LlamaForCausalLM",
        read=read_llama,
        tensors=llama_tensors,
        ignored=ROTARY_TABLES,
        gguf=GGUF,
        published=base.published(
            ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
            + ("intermediate_size",),
            (_LLAMA_1, (4096, 32, 32, 32, 11008), "huggyllama/llama-7b", "MiniLLM/init-Llama-7B"),
            (
                _LLAMA_1,
                (5120, 40, 40, 40, 13824),
                "huggyllama/llama-13b",
                "MiniLLM/teacher-Llama-13B",
            ),
            (_LLAMA_31, (4096, 32, 32, 8, 14336), *_and_instruct("meta-llama/Llama-3.1-8B")),
            (_LLAMA_31, (8192, 80, 64, 8, 28672), *_and_instruct("meta-llama/Llama-3.1-70B")),
            (_LLAMA_32, (2048, 16, 32, 8, 8192), *_and_instruct("meta-llama/Llama-3.2-1B")),
            (_LLAMA_32, (3072, 28, 24, 8, 8192), *_and_instruct("meta-llama/Llama-3.2-3B")),
            (_SMOLLM2, (576, 30, 9, 3, 1536), *_and_instruct("HuggingFaceTB/SmolLM2-135M")),
            (_SMOLLM2, (960, 32, 15, 5, 2560), *_and_instruct("HuggingFaceTB/SmolLM2-360M")),
            (
                _SMOLLM2_LARGE,
                (2048, 24, 32, 32, 8192),
                *_and_instruct("HuggingFaceTB/SmolLM2-1.7B"),
            ),
        ),
    ),
    base.Family(
        model_type="mistral",
        architecture="MistralForCausalLM",
        read=_read_mistral,
        tensors=llama_tensors,
        ignored=ROTARY_TABLES,
        gguf=GGUF,  # which has no window
    ),
)
