"""GPT-2: learned positions, layer norms, and kernels that are stored [in, out]."""

from collections.abc import Mapping
from typing import Any

from promptkd_jax.models.config import DecoderConfig, Dropout
from promptkd_jax.models.families import base
from promptkd_jax.models.families.gguf_layout import GGUFLayout, layer_names


def _read(c: Mapping[str, Any], source: str) -> DecoderConfig:
    base.require(
        c,
        source,
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        add_cross_attention=False,
    )
    return learned_positions_decoder(
        c["n_embd"],
        c["n_head"],
        family=c["model_type"],
        vocab_size=c["vocab_size"],
        num_layers=c["n_layer"],
        mlp_width=c.get("n_inner") or 4 * c["n_embd"],
        max_positions=c["n_positions"],
        norm_eps=c.get("layer_norm_epsilon", 1e-5),
        activation=c.get("activation_function", "gelu_new"),
        tied=c.get("tie_word_embeddings", True),
        dropout=Dropout(*(c.get(f"{where}_pdrop", 0.1) for where in ("embd", "resid", "attn"))),
    )


def learned_positions_decoder(width: int, num_heads: int, **more: Any) -> DecoderConfig:
    """Layer norms, a bias everywhere, a plain feed-forward, a table of positions."""
    return DecoderConfig(
        width=width,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=width // num_heads,
        norm="layer",
        gated=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        learned_positions=True,
        **more,
    )


def _tensors(config: DecoderConfig) -> tuple[base.Tensor, ...]:
    layer, attention, mlp = "h.{}", "layers/attention", "layers/mlp"
    conv1d = {"bias": True, "in_out": True}
    # Query, key and value are stored as one [D, 3 N H]; K is N.
    qkv = [
        base.linear_rows(
            f"{layer}.attn.c_attn",
            f"{attention}/{name}",
            "D (N H) -> D N H",
            fused=("N H", "N H", "N H"),
            part=part,
            **conv1d,
        )
        for part, name in enumerate(("query", "key", "value"))
    ]
    return (
        *base.embedding_rows("wte.weight", config),
        base.Tensor("wpe.weight", "positions/embedding", "P D -> P D"),
        *base.norm_rows("ln_f", "final_norm", bias=True),
        *base.norm_rows(f"{layer}.ln_1", "layers/attention_norm", bias=True),
        *base.norm_rows(f"{layer}.ln_2", "layers/mlp_norm", bias=True),
        *(row for rows in qkv for row in rows),
        *base.linear_rows(f"{layer}.attn.c_proj", f"{attention}/out", "(N H) D -> N H D", **conv1d),
        *base.linear_rows(f"{layer}.mlp.c_fc", f"{mlp}/up", "D F -> D F", **conv1d),
        *base.linear_rows(f"{layer}.mlp.c_proj", f"{mlp}/down", "F D -> F D", **conv1d),
    )


_GGUF_ROWS = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
_GGUF = GGUFLayout(
    architecture="gpt2",
    names={
        "token_embd.weight": "transformer.wte.weight",
        "position_embd.weight": "transformer.wpe.weight",
        "output_norm.weight": "transformer.ln_f.weight",
        "output_norm.bias": "transformer.ln_f.bias",
        "output.weight": base.HEAD,
        **layer_names(_GGUF_ROWS, "transformer.h.{}", ("weight", "bias")),
    },
    fields={
        "embedding_length": "n_embd",
        "block_count": "n_layer",
        "attention.head_count": "n_head",
        "feed_forward_length": "n_inner",
        "context_length": "n_positions",
        "attention.layer_norm_epsilon": "layer_norm_epsilon",
    },
    constants={"activation_function": "gelu_new"},
    read=lambda settings: {},
    write=lambda config: {},
    transposed=("c_attn.weight", "c_fc.weight", "c_proj.weight"),
)

_CONFIG = {
    "model_type": "gpt2",
    "vocab_size": 50257,
    "n_positions": 1024,
    "layer_norm_epsilon": 1e-5,
    "activation_function": "gelu_new",
    "eos_token_id": 50256,
}

FAMILIES = (
    base.Family(
        model_type="gpt2",
        architecture="GPT2LMHeadModel",
        read=_read,
        tensors=_tensors,
        prefix="transformer.",
        export_fields=lambda config: {"n_ctx": config.max_positions},  # MLX asks for it
        bare=True,
        ignored=(r"h\.\d+\.attn\.(bias|masked_bias)",),  # causal masks
        depth_field="n_layer",
        decays_norms=False,
        gguf=_GGUF,
        published=base.published(
            ("n_embd", "n_layer", "n_head"),
            (_CONFIG, (768, 12, 12), "openai-community/gpt2", "MiniLLM/init-gpt2-120M"),
            (_CONFIG, (1024, 24, 16), "openai-community/gpt2-medium", "MiniLLM/init-gpt2-340M"),
            (_CONFIG, (1280, 36, 20), "openai-community/gpt2-large", "MiniLLM/init-gpt2-760M"),
            (_CONFIG, (1600, 48, 25), "openai-community/gpt2-xl", "MiniLLM/teacher-gpt2-1.5B"),
        ),
    ),
)
