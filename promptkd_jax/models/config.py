"""The shape of a decoder, whatever family it is of."""

import dataclasses
import itertools
import math
from typing import Any


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """A stretching of rotary frequencies, see `rotary.KINDS`.

    Attributes:
      factor: by which positions are stretched.
      low_freq_factor, high_freq_factor: turns within the original length, between which "llama3"
        goes from stretched to kept.
      original_max_position: the length before the stretching.
      beta_fast, beta_slow: the same of "yarn", the other way round; `truncate`: to whole pairs.
      attention_factor: by which "yarn" and "longrope" multiply queries and keys.
      short_factors, long_factors: of "longrope", one for each frequency: within the original
        length, and beyond.
    """

    kind: str
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions (Su et al. 2021, arXiv 2104.09864): how fast the pairs of a head turn.

    Attributes:
      share: of the head's width, from the front, that turns.
    """

    theta: float = 10000.0
    scaling: RopeScaling | None = None
    share: float = 1.0


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What layers of one model differ in.

    Attributes:
      rope: None: the layer sees no positions, or those of a table.
      sliding_window: positions that one sees, itself included; None: all before.
    """

    rope: Rope | None = None
    sliding_window: int | None = None


@dataclasses.dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of the feed-forward network, see `feed_forward`.

    Attributes:
      num_experts: E; num_experts_per_tok: k.
      norm_topk_prob: whether the weights of the k add up to 1.
      bias: whether router and experts have biases.
      interleaved: whether gate and up are one parameter, in turn.
      swiglu_limit: of gate, from above, and of up, on both sides, to which 1 is added (gpt-oss);
        None: of neither.
    """

    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool
    bias: bool = False
    interleaved: bool = False
    swiglu_limit: float | None = None


@dataclasses.dataclass(frozen=True)
class Dropout:
    """Shares of what is set to 0 in training, where keys for it are given.

    Attributes:
      embedding: of what goes into the first layer.
      residual: of what attention and feed-forward add.
      attention: of the weights of values.
    """

    embedding: float = 0.0
    residual: float = 0.0
    attention: float = 0.0


@dataclasses.dataclass(frozen=True)
class LoRA:
    """A low-rank adapter, which alone is trained, see `lora`.

    Attributes:
      rank: r; alpha: over r it is the factor of the change, or with `use_rslora` over its root.
      modules: the maps that every layer has one for, keys of `lora.MODULES`.
      dropout: of the adapter's input in training, where keys for it are given.
    """

    rank: int
    alpha: float
    modules: tuple[str, ...]
    use_rslora: bool = False
    dropout: float = 0.0

    @property
    def scale(self) -> float:
        """The factor s of the change."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


@dataclasses.dataclass(frozen=True)
class Quantization:
    """Kernels in few bits, which nothing trains, see `quantization`.

    Attributes:
      bits: of a weight, 8 or 4.
      group: inputs of an output that share a scale; None: all of them.
    """

    bits: int
    group: int | None = None

    @property
    def bytes_per_weight(self) -> float:
        """Of its number and of its share of a scale, where that is of a group."""
        return self.bits / 8 + (2 / self.group if self.group else 0)

    def __str__(self) -> str:
        return f"int{self.bits}" + (f" in groups of {self.group}" if self.group else "")


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
    activation: str  # key of feed_forward.ACTIVATIONS
    gated: bool  # act(gate) * up instead of act(up)
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    tied: bool  # the head is the embedding
    experts: Experts | None = None  # `mlp_width` is then that of one of them
    attention_sinks: bool = False  # one score a head that has no value, see `attention.attend`
    learned_positions: bool = False
    position_offset: int = 0  # unused leading rows of the position table (OPT: 2)
    # The kinds that layers are of, and for each layer the place of its own; (): the first.
    kinds: tuple[LayerKind, ...] = (LayerKind(),)
    pattern: tuple[int, ...] = ()
    qk_norm: str = ""  # of queries and keys: "" none, "head" of each head, "all" of all together
    # Of norms: "before" attention and feed-forward, "after" them, before they are added to the
    # residual stream, "both", or of the "sum" itself, then without a final norm (OPT-350m).
    norm_placement: str = "before"
    norm_offset: float = 0.0  # that is added to the scales of norms (Gemma: 1)
    projected_width: int | None = None  # W of embeddings and head, where projections lead to D
    embedding_scale: float = 1.0  # of the embeddings of tokens
    input_scale: float = 1.0  # of all that goes into the first layer, a soft prompt included
    residual_scale: float = 1.0  # of what attention and feed-forward add
    attention_scale: float | None = None  # of the scores; None: H ** -0.5
    logit_scale: float = 1.0  # of the hidden states that the head sees
    logit_soft_cap: float | None = None  # see `LazyLogits`
    attention_soft_cap: float | None = None  # of the scores, see `attention.attend`
    dropout: Dropout = Dropout()
    lora: LoRA | None = None  # of the adapter among the parameters
    quantization: Quantization | None = None  # of the kernels among the parameters
    # How it is run; not part of what the model is.
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"  # key of decoder.REMAT
    kv_cache_dtype: str = "auto"  # of a rollout: "int8", or that of computation
    offload: bool = False  # whether the layers' parameters lie in the host's memory
    tensor_parts: int = 1  # devices along mesh axis `tensor`, see `padded`

    @property
    def padded(self) -> "DecoderConfig":
        """The sizes of the parameters: vocabulary, heads and feed-forward width are padded with
        zeros to what `tensor_parts` devices share out evenly.

        These zeros compute nothing and stay zero. A padded head or feed-forward unit gives 0, which
        weights of 0 take on, so that neither side has a gradient; padded rows of the vocabulary are
        looked up by no token, and cut off the head before it is read. AdamW moves no parameter
        whose value and gradients are 0. Key/value heads are padded with all query heads that read
        them; fewer than `tensor_parts` are not cut at all and need not divide. Experts are dealt
        out whole; no token is sent to one that is padding.
        """
        parts, group = self.tensor_parts, self.num_heads // self.num_kv_heads
        num_kv_heads = next(
            count
            for count in itertools.count(self.num_kv_heads)
            if count * group % parts == 0 and (count % parts == 0 or count < parts)
        )
        padded = self.replace(
            vocab_size=_multiple(self.vocab_size, parts),
            num_heads=num_kv_heads * group,
            num_kv_heads=num_kv_heads,
        )
        if self.experts is None:
            return padded.replace(mlp_width=_multiple(self.mlp_width, parts))
        number = _multiple(self.experts.num_experts, parts)
        return padded.replace(experts=dataclasses.replace(self.experts, num_experts=number))

    @property
    def padding(self) -> str:
        """The sizes that `padded` changes: "vocab_size 50257 to 50258, heads 25 to 26", or ""."""
        padded = self.padded
        sizes = {
            name: (getattr(self, name), getattr(padded, name))
            for name in ("vocab_size", "num_heads", "num_kv_heads", "mlp_width")
        }
        if self.experts:
            sizes["experts"] = self.experts.num_experts, padded.experts.num_experts
        return ", ".join(f"{name} {x} to {y}" for name, (x, y) in sizes.items() if x != y)

    @property
    def has_plain_attention(self) -> bool:
        """Whether there are neither soft caps nor sinks, which not every kernel has."""
        return self.attention_soft_cap is None and not self.attention_sinks

    def replace(self, **changes: Any) -> "DecoderConfig":
        """The same with some fields changed."""
        return dataclasses.replace(self, **changes)

    @property
    def embedding_width(self) -> int:
        """The width of embeddings, of a soft prompt, and of the hidden states that the head sees:
        W, or D."""
        return self.projected_width or self.width

    @property
    def trained_positions(self) -> int:
        """The number of positions that it was trained for; linear scaling and that which depends
        on a row's length stretch them later."""
        scalings = [kind.rope.scaling for kind in self.kinds if kind.rope and kind.rope.scaling]
        later = [x.factor for x in scalings if x.kind in ("linear", "dynamic")]
        return int(self.max_positions * max(later, default=1.0))

    @property
    def rope(self) -> Rope | None:
        """The rotary positions of layers without a window, or of others where those have none."""
        kinds = sorted(self.kinds, key=lambda kind: kind.sliding_window or 0)
        return next((kind.rope for kind in kinds if kind.rope), None)

    def kind(self, layer: int) -> LayerKind:
        """The kind of a layer."""
        return self.kinds[self.pattern[layer] if self.pattern else 0]


def _multiple(size: int, parts: int) -> int:
    """The least multiple of `parts` that is not below `size`."""
    return -(-size // parts) * parts


def matrix_parameters(config: DecoderConfig, experts: int | None = None) -> int:
    """Of all layers: L (2 D N H + 2 D K H + 2 or 3 D F), of a mixture of experts 3 D F for each of
    them, and D E.

    Args:
      experts: how many of them count (all); of one token that is `Experts.num_experts_per_tok`.
    """
    attention = 2 * config.width * (config.num_heads + config.num_kv_heads) * config.head_dim
    feed_forward = (3 if config.gated else 2) * config.width * config.mlp_width
    if config.experts:
        every = config.experts.num_experts
        feed_forward *= every if experts is None else min(experts, every)
        feed_forward += config.width * every
    return config.num_layers * (attention + feed_forward)
