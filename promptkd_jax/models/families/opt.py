"""OPT: learned positions from row 2 on, layer norms; 350m has narrower embeddings, and norms of the
residual stream itself."""

from collections.abc import Mapping
from typing import Any

from promptkd_jax.models.config import DecoderConfig, Dropout
from promptkd_jax.models.families import base
from promptkd_jax.models.families.gpt2 import learned_positions_decoder


def _read(c: Mapping[str, Any], source: str) -> DecoderConfig:
    base.require(
        c,
        source,
        _remove_final_layer_norm=False,
        enable_bias=True,
        layer_norm_elementwise_affine=True,
    )
    # OPT-350M alone has an embedding narrower than its layers, and its norms behind each residual.
    narrow = c.get("word_embed_proj_dim", c["hidden_size"])
    return learned_positions_decoder(
        c["hidden_size"],
        c["num_attention_heads"],
        family=c["model_type"],
        vocab_size=c["vocab_size"],
        num_layers=c["num_hidden_layers"],
        mlp_width=c["ffn_dim"],
        max_positions=c["max_position_embeddings"],
        norm_eps=1e-5,
        activation=c.get("activation_function", "relu"),
        tied=c.get("tie_word_embeddings", True),
        position_offset=2,
        projected_width=narrow if narrow != c["hidden_size"] else None,
        norm_placement="before" if c.get("do_layer_norm_before", True) else "sum",
        dropout=Dropout(
            residual=c.get("dropout", 0.1), attention=c.get("attention_dropout") or 0.0
        ),
    )


def _tensors(config: DecoderConfig) -> tuple[base.Tensor, ...]:
    layer, attention, mlp = "layers.{}", "layers/attention", "layers/mlp"
    stem, last, projections = f"{layer}.self_attn", (), ()
    # Where each sum is normed, the last layer's is the final norm.
    if config.norm_placement != "sum":
        last = base.norm_rows("final_layer_norm", "final_norm", bias=True)
    if config.projected_width:
        projections = (
            base.Tensor("project_in.weight", "project_in/kernel", "D W -> W D"),
            base.Tensor("project_out.weight", "project_out/kernel", "W D -> D W"),
        )
    return (
        *base.embedding_rows("embed_tokens.weight", config),
        base.Tensor("embed_positions.weight", "positions/embedding", "P D -> P D"),
        *last,
        *projections,
        *base.norm_rows(f"{layer}.self_attn_layer_norm", "layers/attention_norm", bias=True),
        *base.norm_rows(f"{layer}.final_layer_norm", "layers/mlp_norm", bias=True),
        *base.linear_rows(f"{stem}.q_proj", f"{attention}/query", "(N H) D -> D N H", bias=True),
        *base.linear_rows(f"{stem}.k_proj", f"{attention}/key", "(K H) D -> D K H", bias=True),
        *base.linear_rows(f"{stem}.v_proj", f"{attention}/value", "(K H) D -> D K H", bias=True),
        *base.linear_rows(f"{stem}.out_proj", f"{attention}/out", "D (N H) -> N H D", bias=True),
        *base.linear_rows(f"{layer}.fc1", f"{mlp}/up", "F D -> D F", bias=True),
        *base.linear_rows(f"{layer}.fc2", f"{mlp}/down", "D F -> F D", bias=True),
    )


_CONFIG = {
    "model_type": "opt",
    "vocab_size": 50272,
    "max_position_embeddings": 2048,
    "activation_function": "relu",
    "do_layer_norm_before": True,
    "eos_token_id": 2,
}

FAMILIES = (
    base.Family(
        model_type="opt",
        architecture="OPTForCausalLM",
        read=_read,
        tensors=_tensors,
        prefix="model.decoder.",
        other_prefixes=("decoder.", ""),
        published=base.published(
            ("hidden_size", "word_embed_proj_dim", "num_hidden_layers", "num_attention_heads")
            + ("ffn_dim",),
            (
                _CONFIG | {"do_layer_norm_before": False},
                (1024, 512, 24, 16, 4096),
                "facebook/opt-350m",
            ),
            (_CONFIG, (2048, 2048, 24, 32, 8192), "facebook/opt-1.3b", "MiniLLM/init-OPT-1.3B"),
            (_CONFIG, (2560, 2560, 32, 32, 10240), "facebook/opt-2.7b", "MiniLLM/init-OPT-2.7B"),
            (_CONFIG, (4096, 4096, 32, 32, 16384), "facebook/opt-6.7b", "MiniLLM/init-OPT-6.7B"),
            (_CONFIG, (5120, 5120, 40, 40, 20480), "facebook/opt-13b", "MiniLLM/teacher-OPT-13B"),
        ),
    ),
)
