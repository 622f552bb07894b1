"""gpt-oss: a mixture of experts with biases and a clamped gate, a window in every other layer, and
attention sinks."""

from collections.abc import Mapping
from typing import Any

from promptkd_jax.models.config import DecoderConfig, LayerKind
from promptkd_jax.models.families import base
from promptkd_jax.models.families.llama import llama_tensors, read_llama

# Of a config that says nothing of positions.
_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _read(c: Mapping[str, Any], source: str) -> DecoderConfig:
    base.require(c, source, swiglu_alpha=1.702, attention_bias=True)
    if not (c.get("rope_parameters") or c.get("rope_scaling")):
        c = {**c, "rope_scaling": _YARN}
    rope = base.read_rope(c, source, theta=150000.0)
    kinds = {
        "sliding_attention": LayerKind(rope, c.get("sliding_window", 128)),
        "full_attention": LayerKind(rope),
    }
    names = [list(kinds)[layer % 2] for layer in range(c["num_hidden_layers"])]
    experts = base.read_experts(
        c,
        source,
        per_token=4,
        norm_topk_prob=True,
        bias=True,
        interleaved=True,
        swiglu_limit=c.get("swiglu_limit") or 7.0,
    )
    return read_llama(
        {"rms_norm_eps": 1e-5, "head_dim": 64, **c},
        source,
        [kinds[name] for name in base.read_layer_types(c, source, names)],
        qkv_bias=True,
        out_bias=True,
        activation="quick_gelu",
        experts=experts,
        attention_sinks=True,
    )


def _tensors(config: DecoderConfig) -> tuple[base.Tensor, ...]:
    stem, path = "layers.{}.mlp", "layers/experts"
    return llama_tensors(
        config,
        network=[
            *base.linear_rows(f"{stem}.router", f"{path}/router", "E D -> D E", bias=True),
            base.Tensor(f"{stem}.experts.gate_up_proj", f"{path}/gate_up/kernel", "E D I -> E D I"),
            base.Tensor(f"{stem}.experts.gate_up_proj_bias", f"{path}/gate_up/bias", "E I -> E I"),
            base.Tensor(f"{stem}.experts.down_proj", f"{path}/down/kernel", "E F D -> E F D"),
            base.Tensor(f"{stem}.experts.down_proj_bias", f"{path}/down/bias", "E D -> E D"),
            base.Tensor("layers.{}.self_attn.sinks", "layers/attention/sinks", "N -> N"),
        ],
    )


FAMILIES = (
    base.Family(
        model_type="gpt_oss",
        architecture="GptOssForCausalLM",
        read=_read,
        tensors=_tensors,
        export_fields=base.layer_types,
    ),
)
