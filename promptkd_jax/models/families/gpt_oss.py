"""gpt-oss: a mixture of experts with biases and a clamped gate, a window in every other layer, and
attention sinks."""

from collections.abc import Mapping
from typing import Any

from promptkd_jax.models.config import DecoderConfig, LayerKind
from promptkd_jax.models.families import base
from promptkd_jax.models.families.llama import llama_tensors, read_llama


def _read(c: Mapping[str, Any], source: str) -> DecoderConfig:
    base.require(c, source, swiglu_alpha=1.702, attention_bias=True)
    rope = base.read_rope(c, source, theta=150000.0)
    kinds = {
        "sliding_attention": LayerKind(rope, c.get("sliding_window", 128)),
        "full_attention": LayerKind(rope),
    }
    names = c.get("layer_types") or [
        list(kinds)[layer % 2] for layer in range(c["num_hidden_layers"])
    ]
    experts = base.read_experts(
        c,
        per_token=4,
        renormalized=True,
        bias=True,
        interleaved=True,
        limit=c.get("swiglu_limit", 7.0),
    )
    return read_llama(
        {"rms_norm_eps": 1e-5, "head_dim": 64, **c},
        source,
        [kinds[name] for name in names],
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
            base.Tensor(f"{stem}.experts.gate_up_proj", f"{path}/gate_up/kernel", "E D G -> E D G"),
            base.Tensor(f"{stem}.experts.gate_up_proj_bias", f"{path}/gate_up/bias", "E G -> E G"),
            base.Tensor(f"{stem}.experts.down_proj", f"{path}/down/kernel", "E F D -> E F D"),
            base.Tensor(f"{stem}.experts.down_proj_bias", f"{path}/down/bias", "E D -> E D"),
            base.Tensor("layers.{}.self_attn.sinks", "layers/attention/sinks", "N -> N"),
        ],
    )


FAMILIES = (
    base.Family(
        model_type="gpt_oss", architecture="GptOssForCausalLM", read=_read, tensors=_tensors
    ),
)
