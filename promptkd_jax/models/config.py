"""The shape of a decoder, whatever family it is of."""

import dataclasses
import itertools
from typing import Any


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """A stretching of rotary frequencies: "linear" (by `factor`) or "llama3"."""

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

    family: str  # key of families.registry.FAMILIES
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
