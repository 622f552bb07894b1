"""Which Hugging Face tensor is which parameter: one table per family, used in both directions.

A row is (Hugging Face name, path in our parameter tree, pattern). The pattern is einops notation
from the stored layout to ours and at the same time the shape: V vocabulary, P rows of the position
table, D width, N heads, K key/value heads, H head width, F feed-forward width. `{}` in a name is
the layer; such parameters are stacked along a leading L. `C` joins tensors that are stored fused:
the row's `part` says which slice along C is meant. Letters that are stored as one dimension stand
together and in the same order in ours.
"""

import dataclasses
import math
import re
from collections.abc import Mapping

import numpy as np

from promptkd_jax.models.config import DecoderConfig

HEAD = "lm_head.weight"  # the one name that stands outside of the prefix


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One row of a table."""

    name: str
    path: str
    pattern: str
    part: int | None = None

    @property
    def per_layer(self) -> bool:
        """Whether there is one such tensor in every layer."""
        return "{}" in self.name

    @property
    def stored(self) -> tuple[tuple[str, ...], ...]:
        """The letters of each stored dimension: (("N", "H"), ("D",)) for "(N H) D"."""
        groups = re.findall(r"\([^)]*\)|[A-Z]", self.pattern.split(" -> ")[0])
        return tuple(tuple(group.strip("()").split()) for group in groups)

    @property
    def ours(self) -> tuple[str, ...]:
        """The letters of our dimensions, without L, and without the C of a `part`."""
        letters = tuple(self.pattern.split(" -> ")[1].split())
        return letters if self.part is None else letters[1:]

    @property
    def to_stored(self) -> str:
        """einops notation from ours, without L, to the stored layout, both without C."""
        groups = (" ".join(x for x in group if x in self.ours) for group in self.stored)
        return f"{' '.join(self.ours)} -> {' '.join(f'({group})' for group in groups)}"

    def stored_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape in a file."""
        return tuple(math.prod(sizes[x] for x in group) for group in self.stored)

    def stretches(
        self, sizes: Mapping[str, int], bounds: Mapping[str, tuple[int, int]]
    ) -> list[list[tuple[int, int]]]:
        """Where a part of a parameter is stored.

        Args:
          sizes: of each letter.
          bounds: (start, stop) of each letter of `ours`.

        Returns:
          For each stored dimension the (start, stop) of its stretches, as few as there can be, in
          the order in which their elements come in the part.
        """
        if self.part is not None:
            bounds = {**bounds, "C": (self.part, self.part + 1)}
        found = []
        for group in self.stored:
            shape = [sizes[x] for x in group]
            chosen = tuple(slice(*bounds[x]) for x in group)
            indices = np.arange(math.prod(shape)).reshape(shape)[chosen].ravel()
            pieces = np.split(indices, np.flatnonzero(np.diff(indices) != 1) + 1)
            found.append([(int(piece[0]), int(piece[-1]) + 1) for piece in pieces])
        return found


@dataclasses.dataclass(frozen=True)
class Family:
    """The table of a family, the prefixes its files come with, and tensors that carry nothing."""

    architecture: str
    depth_field: str
    prefix: str  # as transformers writes it today
    other_prefixes: tuple[str, ...]
    rows: tuple[Tensor, ...]
    ignored: tuple[str, ...] = ()  # regular expressions


def _attention(layer: str, *, bias: bool, out: str) -> list[Tensor]:
    """Separate query, key, value and output projections, stored [out, in]."""
    rows = [Tensor(f"{layer}.self_attn.{out}.weight", _at("out/kernel"), "D (N H) -> N H D")]
    if bias:
        rows.append(Tensor(f"{layer}.self_attn.{out}.bias", _at("out/bias"), "D -> D"))
    for name, letter in (("query", "N"), ("key", "K"), ("value", "K")):
        stem = f"{layer}.self_attn.{name[0]}_proj"
        rows.append(
            Tensor(f"{stem}.weight", _at(f"{name}/kernel"), f"({letter} H) D -> D {letter} H")
        )
        if bias:
            rows.append(Tensor(f"{stem}.bias", _at(f"{name}/bias"), f"({letter} H) -> {letter} H"))
    return rows


def _at(path: str) -> str:
    return f"layers/attention/{path}"


def _dense(stem: str, path: str, sizes: str, *, bias: bool) -> list[Tensor]:
    """A projection stored [out, in]; `sizes` is "IN OUT"."""
    fan_in, fan_out = sizes.split()
    rows = [Tensor(f"{stem}.weight", f"{path}/kernel", f"{fan_out} {fan_in} -> {sizes}")]
    if bias:
        rows.append(Tensor(f"{stem}.bias", f"{path}/bias", f"{fan_out} -> {fan_out}"))
    return rows


def _layer_norm(stem: str, path: str) -> list[Tensor]:
    return [
        Tensor(f"{stem}.weight", f"{path}/scale", "D -> D"),
        Tensor(f"{stem}.bias", f"{path}/bias", "D -> D"),
    ]


def _embedding(name: str, config: DecoderConfig) -> list[Tensor]:
    """The embedding, and the head where it is another matrix."""
    rows = [Tensor(name, "embed/embedding", "V D -> V D")]
    return rows if config.tied else [*rows, Tensor(HEAD, "lm_head", "V D -> V D")]


def _gpt2(config: DecoderConfig) -> Family:
    layer = "h.{}"
    rows = [
        *_embedding("wte.weight", config),
        Tensor("wpe.weight", "positions/embedding", "P D -> P D"),
        *_layer_norm("ln_f", "final_norm"),
        *_layer_norm(f"{layer}.ln_1", "layers/attention_norm"),
        *_layer_norm(f"{layer}.ln_2", "layers/mlp_norm"),
        Tensor(f"{layer}.attn.c_proj.weight", _at("out/kernel"), "(N H) D -> N H D"),
        Tensor(f"{layer}.attn.c_proj.bias", _at("out/bias"), "D -> D"),
        Tensor(f"{layer}.mlp.c_fc.weight", "layers/mlp/up/kernel", "D F -> D F"),
        Tensor(f"{layer}.mlp.c_fc.bias", "layers/mlp/up/bias", "F -> F"),
        Tensor(f"{layer}.mlp.c_proj.weight", "layers/mlp/down/kernel", "F D -> F D"),
        Tensor(f"{layer}.mlp.c_proj.bias", "layers/mlp/down/bias", "D -> D"),
    ]
    for kind, pattern in (("weight", "D (C N H) -> C D N H"), ("bias", "(C N H) -> C N H")):
        for part, name in enumerate(("query", "key", "value")):
            path = _at(f"{name}/{'kernel' if kind == 'weight' else 'bias'}")
            rows.append(Tensor(f"{layer}.attn.c_attn.{kind}", path, pattern, part))
    buffers = (r"h\.\d+\.attn\.(bias|masked_bias)",)
    return Family("GPT2LMHeadModel", "n_layer", "transformer.", ("",), tuple(rows), buffers)


def _opt(config: DecoderConfig) -> Family:
    layer = "layers.{}"
    rows = [
        *_embedding("embed_tokens.weight", config),
        Tensor("embed_positions.weight", "positions/embedding", "P D -> P D"),
        *_layer_norm("final_layer_norm", "final_norm"),
        *_layer_norm(f"{layer}.self_attn_layer_norm", "layers/attention_norm"),
        *_layer_norm(f"{layer}.final_layer_norm", "layers/mlp_norm"),
        *_attention(layer, bias=True, out="out_proj"),
        *_dense(f"{layer}.fc1", "layers/mlp/up", "D F", bias=True),
        *_dense(f"{layer}.fc2", "layers/mlp/down", "F D", bias=True),
    ]
    return Family(
        "OPTForCausalLM", "num_hidden_layers", "model.decoder.", ("decoder.", ""), tuple(rows)
    )


def _llama_like(config: DecoderConfig, architecture: str) -> Family:
    layer = "layers.{}"
    attention = _attention(layer, bias=config.qkv_bias, out="o_proj")
    rows = [
        *_embedding("embed_tokens.weight", config),
        Tensor("norm.weight", "final_norm/scale", "D -> D"),
        Tensor(f"{layer}.input_layernorm.weight", "layers/attention_norm/scale", "D -> D"),
        Tensor(f"{layer}.post_attention_layernorm.weight", "layers/mlp_norm/scale", "D -> D"),
        *(row for row in attention if config.out_bias or row.path != _at("out/bias")),
        *_dense(f"{layer}.mlp.gate_proj", "layers/mlp/gate", "D F", bias=config.mlp_bias),
        *_dense(f"{layer}.mlp.up_proj", "layers/mlp/up", "D F", bias=config.mlp_bias),
        *_dense(f"{layer}.mlp.down_proj", "layers/mlp/down", "F D", bias=config.mlp_bias),
    ]
    if config.qk_norm:
        for name in ("query", "key"):
            stored = f"{layer}.self_attn.{name[0]}_norm.weight"
            rows.append(Tensor(stored, _at(f"{name}_norm/scale"), "H -> H"))
    buffers = (r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)
    return Family(architecture, "num_hidden_layers", "model.", ("",), tuple(rows), buffers)


_LLAMA_LIKE = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def family(config: DecoderConfig) -> Family:
    """The table for a model of `config`."""
    if config.family == "gpt2":
        return _gpt2(config)
    if config.family == "opt":
        return _opt(config)
    return _llama_like(config, _LLAMA_LIKE[config.family])


def sizes(config: DecoderConfig) -> dict[str, int]:
    """The number behind each letter of a pattern."""
    return {
        "V": config.vocab_size,
        "P": config.max_positions + config.position_offset,
        "D": config.width,
        "N": config.num_heads,
        "K": config.num_kv_heads,
        "H": config.head_dim,
        "F": config.mlp_width,
        "C": 3,
    }
