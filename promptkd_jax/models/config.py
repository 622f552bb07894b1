"""The shape of a decoder, read from a Hugging Face `config.json`."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

from promptkd_jax.infra.errors import ModelError


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched: "linear" (by `factor`) or "llama3"."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Everything that distinguishes one decoder-only language model from another.

    Sizes: `width` D, `num_heads` N, `num_kv_heads` K, `head_dim` H, `mlp_width` F, `vocab_size` V,
    `num_layers` L. Hashable, so that it can be a static argument of `jax.jit`.
    """

    family: str  # key of families.FAMILIES
    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    max_positions: int
    norm: str  # "layer" | "rms"
    norm_eps: float
    activation: str  # key of decoder.ACTIVATIONS
    gated: bool  # act(gate) * up instead of act(up)
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    tied: bool  # the head is the embedding
    learned_positions: bool = False  # else rotary
    position_offset: int = 0  # unused leading rows of the position table (OPT: 2)
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    qk_norm: bool = False
    sliding_window: int | None = None  # positions that one sees, itself included; None: all before
    # How it is run; not part of what the model is.
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"  # key of decoder.REMAT
    tensor_parts: int = 1  # devices along mesh axis `tensor`, see `padded`

    @property
    def padded(self) -> "DecoderConfig":
        """The sizes of the parameters: vocabulary, heads and feed-forward width are padded with
        zeros to what `tensor_parts` devices share out evenly.

        These zeros compute nothing and stay zero. A padded head or feed-forward unit gives 0, which
        weights of 0 take on, so that neither side has a gradient; padded rows of the vocabulary are
        looked up by no token, and cut off the head before it is read. AdamW moves no parameter
        whose value and gradients are 0. Key/value heads are padded with all query heads that read
        them; fewer than `tensor_parts` are not cut at all and need not divide.
        """
        parts, group = self.tensor_parts, self.num_heads // self.num_kv_heads
        num_kv_heads = next(
            count
            for count in itertools.count(self.num_kv_heads)
            if count * group % parts == 0 and (count % parts == 0 or count < parts)
        )
        return self.replace(
            vocab_size=_multiple(self.vocab_size, parts),
            num_heads=num_kv_heads * group,
            num_kv_heads=num_kv_heads,
            mlp_width=_multiple(self.mlp_width, parts),
        )

    @property
    def padding(self) -> str:
        """The sizes that `padded` changes: "vocab_size 50257 to 50258, heads 25 to 26", or ""."""
        padded = self.padded
        sizes = {
            name: (getattr(self, name), getattr(padded, name))
            for name in ("vocab_size", "num_heads", "num_kv_heads", "mlp_width")
        }
        return ", ".join(f"{name} {x} to {y}" for name, (x, y) in sizes.items() if x != y)

    def replace(self, **changes: Any) -> "DecoderConfig":
        """The same with some fields changed."""
        return dataclasses.replace(self, **changes)

    @property
    def trained_positions(self) -> int:
        """The number of positions that it was trained for; linear scaling stretches them later."""
        linear = self.rope_scaling is not None and self.rope_scaling.kind == "linear"
        return int(self.max_positions * self.rope_scaling.factor) if linear else self.max_positions


def _multiple(size: int, parts: int) -> int:
    """The least multiple of `parts` that is not below `size`."""
    return -(-size // parts) * parts


def from_hugging_face(config: Mapping[str, Any], source: str = "config.json") -> DecoderConfig:
    """Reads a `config.json`. Raises ModelError for what the decoder does not compute."""
    kind = config.get("model_type")
    if kind not in _READERS:
        raise ModelError(
            f"{source}: model_type {kind!r} is not supported; supported: {', '.join(_READERS)}"
        )
    _refuse_quantised(config, source)
    try:
        return _READERS[kind](config, source)
    except KeyError as error:
        raise ModelError(f"{source}: a {kind} config needs the field {error}") from error


def _refuse_quantised(config: Mapping[str, Any], source: str) -> None:
    settings = config.get("quantization_config") or config.get("quantization")  # the latter: MLX
    if not settings:
        return
    method = settings
    if isinstance(settings, Mapping):
        older = [settings[key] for key in ("load_in_4bit", "load_in_8bit") if key in settings]
        method = settings.get("quant_method") or settings.get("mode")
        if older and not method:  # of bitsandbytes before it had a name
            if not any(older):
                return
            method = "bitsandbytes"
        method = method or settings
    raise ModelError(
        f"{source}: the weights are quantised ({method}); only plain ones in floating "
        "point are read: take the model that these were made from, or, for bitsandbytes and FP8, "
        "write them anew with transformers' model.dequantize() and save_pretrained (if they are "
        "plain already, remove the field)"
    )


def _require(config: Mapping[str, Any], source: str, **expected: Any) -> None:
    for field, right in expected.items():
        if (found := config.get(field, right)) != right:
            raise ModelError(f"{source}: {field} = {found!r} is not supported (only {right!r})")


def _gpt2(c: Mapping[str, Any], source: str) -> DecoderConfig:
    _require(
        c,
        source,
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        add_cross_attention=False,
    )
    return _learned_positions_decoder(
        c["n_embd"],
        c["n_head"],
        family="gpt2",
        vocab_size=c["vocab_size"],
        num_layers=c["n_layer"],
        mlp_width=c.get("n_inner") or 4 * c["n_embd"],
        max_positions=c["n_positions"],
        norm_eps=c.get("layer_norm_epsilon", 1e-5),
        activation=c.get("activation_function", "gelu_new"),
        tied=c.get("tie_word_embeddings", True),
    )


def _opt(c: Mapping[str, Any], source: str) -> DecoderConfig:
    _require(
        c,
        source,
        do_layer_norm_before=True,
        _remove_final_layer_norm=False,
        word_embed_proj_dim=c["hidden_size"],
        enable_bias=True,
        layer_norm_elementwise_affine=True,
    )
    return _learned_positions_decoder(
        c["hidden_size"],
        c["num_attention_heads"],
        family="opt",
        vocab_size=c["vocab_size"],
        num_layers=c["num_hidden_layers"],
        mlp_width=c["ffn_dim"],
        max_positions=c["max_position_embeddings"],
        norm_eps=1e-5,
        activation=c.get("activation_function", "relu"),
        tied=c.get("tie_word_embeddings", True),
        position_offset=2,
    )


def _learned_positions_decoder(width: int, num_heads: int, **more: Any) -> DecoderConfig:
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


def _llama_like(
    c: Mapping[str, Any],
    source: str,
    *,
    qkv_bias: bool = False,
    out_bias: bool = False,
    **more: Any,
) -> DecoderConfig:
    theta, scaling = _rope(c, source)
    num_heads = c["num_attention_heads"]
    return DecoderConfig(
        family=c["model_type"],
        vocab_size=c["vocab_size"],
        width=c["hidden_size"],
        num_layers=c["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=c.get("num_key_value_heads") or num_heads,
        head_dim=c.get("head_dim") or c["hidden_size"] // num_heads,
        mlp_width=c["intermediate_size"],
        max_positions=c["max_position_embeddings"],
        norm="rms",
        norm_eps=c.get("rms_norm_eps", 1e-6),
        activation=c.get("hidden_act", "silu"),
        gated=True,
        qkv_bias=qkv_bias,
        out_bias=out_bias,
        mlp_bias=c.get("mlp_bias", False),
        tied=c.get("tie_word_embeddings", False),
        rope_theta=theta,
        rope_scaling=scaling,
        **more,
    )


def _llama(c: Mapping[str, Any], source: str) -> DecoderConfig:
    bias = c.get("attention_bias", False)
    return _llama_like(c, source, qkv_bias=bias, out_bias=bias)


def _mistral(c: Mapping[str, Any], source: str) -> DecoderConfig:
    return _llama_like(c, source, sliding_window=c.get("sliding_window", 4096))


def _qwen2(c: Mapping[str, Any], source: str) -> DecoderConfig:
    return _llama_like(c, source, qkv_bias=True, sliding_window=_qwen_window(c, source))


def _qwen3(c: Mapping[str, Any], source: str) -> DecoderConfig:
    bias = c.get("attention_bias", False)
    sliding_window = _qwen_window(c, source)
    return _llama_like(
        c, source, qkv_bias=bias, out_bias=bias, qk_norm=True, sliding_window=sliding_window
    )


_READERS: dict[str, Callable[[Mapping[str, Any], str], DecoderConfig]] = {
    "gpt2": _gpt2,
    "opt": _opt,
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
}


def _qwen_window(c: Mapping[str, Any], source: str) -> int | None:
    """Qwen's window is for the layers that `layer_types` names, or from `max_window_layers` on."""
    sliding_window = c.get("sliding_window", 4096)
    if not c.get("use_sliding_window", False) or sliding_window is None:
        return None
    full = c.get("max_window_layers", 28)
    kinds = c.get("layer_types") or [
        "sliding_attention" if layer >= full else "full_attention"
        for layer in range(c["num_hidden_layers"])
    ]
    if len(set(kinds)) > 1:
        raise ModelError(
            f"{source}: {kinds.count('sliding_attention')} of {len(kinds)} layers have a sliding "
            f"window (layer_types, or max_window_layers = {full}); only all or none is supported "
            "(set use_sliding_window to false for none)"
        )
    return sliding_window if kinds[0] == "sliding_attention" else None


def _rope(c: Mapping[str, Any], source: str) -> tuple[float, RopeScaling | None]:
    """Theta and scaling, from `rope_parameters` (transformers 5) or the older flat fields."""
    new, old = (c.get(field) or {} for field in ("rope_parameters", "rope_scaling"))
    if new and old and _without_theta(new) != _without_theta(old):
        raise ModelError(
            f"{source}: rope_parameters {new} and rope_scaling {old} contradict one another; "
            "remove the wrong one"
        )
    rope = new or old
    theta = float(rope.get("rope_theta") or c.get("rope_theta") or 10000.0)
    if rope.get("partial_rotary_factor", c.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ModelError(f"{source}: partial_rotary_factor other than 1 is not supported")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", float(rope["factor"]))
    if kind == "llama3":
        return theta, RopeScaling(
            "llama3",
            float(rope["factor"]),
            float(rope["low_freq_factor"]),
            float(rope["high_freq_factor"]),
            int(rope["original_max_position_embeddings"]),
        )
    raise ModelError(
        f"{source}: rope_type {kind!r} is not supported; supported: default, linear, llama3"
    )


def _without_theta(rope: Mapping[str, Any]) -> dict[str, Any]:
    """The scaling alone; theta may stand beside it."""
    scaling = {key: x for key, x in rope.items() if key not in ("rope_theta", "rope_type", "type")}
    return scaling | {"rope_type": rope.get("rope_type", rope.get("type", "default"))}
