"""Work and traffic of the parts of a step, counted from shapes alone: layers, heads, caches.

Multiplications count as two operations. Attention counts all pairs of columns, as plain XLA
computes them; the splash kernel leaves out up to half.

B rows, T columns, D width, N heads, K key/value heads, H head width, F feed-forward width,
E experts, V vocabulary, L layers; d, f, t devices along `data`, `fsdp`, `tensor`. Bytes are those
of one device. Models are taken as they are padded for the mesh, experts to be chosen evenly.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax.numpy as jnp

from promptkd_jax.distill.losses import chunked_loss
from promptkd_jax.models.config import DecoderConfig, matrix_parameters
from promptkd_jax.models.layers.feed_forward import SPARE
from promptkd_jax.plan.chips import SliceTopology


@dataclasses.dataclass(frozen=True)
class Cost:
    """`flops` of all devices together; bytes of one device: to and from HBM, sent to chips of the
    same slice (ICI), and sent to other slices (DCN)."""

    flops: float = 0.0
    hbm_bytes: float = 0.0
    ici_bytes: float = 0.0
    dcn_bytes: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*map(sum, zip(dataclasses.astuple(self), dataclasses.astuple(other))))

    def __mul__(self, times: float) -> "Cost":
        return Cost(*(times * part for part in dataclasses.astuple(self)))

    def seconds(self, slices: SliceTopology) -> dict[str, float]:
        """Seconds of each of matrix units, HBM, network and slow network, would it work alone."""
        chip = slices.chip
        each = {
            "compute": self.flops / (slices.chips * chip.tflops * 1e12),
            "HBM": self.hbm_bytes / (chip.per_device(chip.hbm_gbps) * 1e9),
            "network": self.ici_bytes / (chip.per_device(chip.ici_gbps) * 1e9),
        }
        if slices.number > 1:
            each["between slices"] = self.dcn_bytes / (chip.per_device(chip.dcn_gbps) * 1e9)
        return each


def token_parameters(config: DecoderConfig) -> int:
    """Of the `matrix_parameters`, those that one token is multiplied with."""
    return matrix_parameters(config, config.experts.num_experts_per_tok if config.experts else None)


def forward_flops(config: DecoderConfig, rows: int, columns: int, keys: int | None = None) -> int:
    """Of the layers: 2 B T token_parameters + 4 L B T S N H, S keys to a column (T)."""
    attention = attention_flops(config, rows, columns, columns if keys is None else keys)
    return 2 * rows * columns * token_parameters(config) + attention


def attention_flops(config: DecoderConfig, rows: int, columns: int, keys: int) -> int:
    """Of all layers: 4 L B T S N H."""
    return 4 * config.num_layers * rows * columns * keys * config.num_heads * config.head_dim


def backward_flops(config: DecoderConfig, rows: int, columns: int, *, weights: bool) -> int:
    """Of the layers: a product for the inputs and, with `weights`, one for the parameters for each
    of the forward, attention's always both; and the forward again where activations are not kept.
    """
    whole = forward_flops(config, rows, columns)
    matrices = 2 * rows * columns * token_parameters(config)
    again = 0 if config.remat == "none" else whole
    return again + 2 * whole - (0 if weights else matrices)


def head_flops(config: DecoderConfig, rows: int, positions: int) -> int:
    """Of logits: 2 B R V D."""
    return 2 * rows * positions * config.vocab_size * config.embedding_width


def _inner_width(config: DecoderConfig) -> int:
    """Of the inputs and outputs of a feed-forward network's products, those inside of it."""
    return (4 if config.gated else 2) * config.mlp_width


@dataclasses.dataclass(frozen=True)
class Counter:
    """Costs of the pieces of a step for one model, of padded sizes, on a mesh."""

    config: DecoderConfig
    mesh: Mapping[str, int]
    slices: int = 1
    parameters: int = 0
    optimizer_bytes: int = 0  # of its state, of all devices
    uneven_vocabulary: bool = False  # on a TPU: `tensor` does not divide it without padding
    rounded: bool = False  # kernels that are kept whole are quantised for a rollout

    @property
    def row_parts(self) -> int:
        return self.mesh["data"] * self.mesh["fsdp"]

    @property
    def itemsize(self) -> int:
        """Bytes of a number in the dtype of computation."""
        return jnp.dtype(self.config.dtype).itemsize

    @property
    def layer_bytes(self) -> float:
        """Of the matrices of all layers, gathered along `fsdp`, as they are read."""
        return matrix_parameters(self.config) * self._kernel_itemsize / self.mesh["tensor"]

    @property
    def _kernel_itemsize(self) -> float:
        how = self.config.quantization
        return how.bytes_per_weight if how else self.itemsize

    @property
    def one_layer_bytes(self) -> float:
        """Of the matrices of one layer, gathered, in the dtype of computation."""
        whole = matrix_parameters(self.config) * self.itemsize / self.mesh["tensor"]
        return whole / self.config.num_layers

    @property
    def head_bytes(self) -> float:
        """Of the head, gathered along `fsdp`; the embedding is as large."""
        return (
            self.config.vocab_size
            * self.config.embedding_width
            * self.itemsize
            / self.mesh["tensor"]
        )

    @property
    def loss_head_bytes(self) -> float:
        """Of the head as a TPU's loss reads it: whole where positions are dealt out along `tensor`
        in place of the vocabulary (`sharding.vocabulary_axis`)."""
        return self.head_bytes * (self.mesh["tensor"] if self.uneven_vocabulary else 1)

    @property
    def activation_bytes(self) -> float:
        """Of the inputs and outputs of all products, for one token."""
        config = self.config
        heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        inner = 0 if config.experts else _inner_width(config)
        each = (heads + inner) / self.mesh["tensor"] + (2 if config.experts else 4) * config.width
        return config.num_layers * each * self.itemsize + self.expert_bytes

    @property
    def expert_bytes(self) -> float:
        """Of these, what goes through experts: each pair of a token and an expert for which a
        device has a place."""
        config = self.config
        if not config.experts:
            return 0.0
        pairs = config.experts.num_experts_per_tok * min(1, SPARE / self.mesh["tensor"])
        each = 2 * config.width + _inner_width(config)
        return config.num_layers * pairs * each * self.itemsize

    @property
    def attention_bytes(self) -> float:
        """Of the inputs and outputs of attention, for one token."""
        config = self.config
        heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        return config.num_layers * heads * self.itemsize / self.mesh["tensor"]

    def attention(self, rows: int, columns: int) -> Cost:
        """Queries, keys and values read and the result written, with nothing else of a layer."""
        moved = rows * columns / self.row_parts * self.attention_bytes
        return Cost(attention_flops(self.config, rows, columns, columns), moved)

    def forward(self, rows: int, columns: int) -> Cost:
        """Reads all layers once, after gathering them and the embedding along `fsdp`; 2 all-reduces
        of the hidden states a layer along `tensor`, and one of the embeddings; inputs and outputs
        of all products pass through HBM."""
        tokens = rows * columns / self.row_parts
        look_up = self._allgather_bytes(self.head_bytes) + self._allreduce_hidden_bytes(tokens)
        return Cost(
            forward_flops(self.config, rows, columns),
            self.layer_bytes + tokens * self.activation_bytes,
            self._allgather_bytes(self.layer_bytes)
            + self._allreduce_layers_bytes(tokens)
            + look_up,
        )

    def backward(self, rows: int, columns: int, *, weights: bool) -> Cost:
        """Work as of the forward, and the gradients of the layers, once read and once written."""
        tokens, gradient = rows * columns / self.row_parts, self.layer_bytes
        passes = 1 if self.config.remat == "none" else 2
        moved = passes * (gradient + tokens * self.activation_bytes)
        moved += (1 + weights) * tokens * self.activation_bytes
        sent = self._allgather_bytes(gradient) + passes * self._allreduce_layers_bytes(tokens)
        cost = Cost(backward_flops(self.config, rows, columns, weights=weights), moved, sent)
        if weights:
            gradient += self.head_bytes  # as large as the embedding
            cost += Cost(0, 2 * gradient, *self._reduce_gradient_bytes(gradient))
        return cost

    def head(self, rows: int, positions: int, products: int) -> Cost:
        """`products` with the head (logits: 1; hidden states' gradient, head's gradient: 1 more
        each), which is gathered once and read for every block of positions."""
        vocab_size, width = self.config.vocab_size, self.config.embedding_width
        devices = math.prod(self.mesh.values())
        logits = rows * positions * vocab_size * 4 / devices
        cost = Cost(
            products * head_flops(self.config, rows, positions),
            products * (self.blocks(rows, positions) * self.loss_head_bytes + logits),
            self._allgather_bytes(self.head_bytes) + self.loss_head_bytes - self.head_bytes,
        )
        if products > 1:
            hidden = rows * positions / self.row_parts * width * 4
            cost += Cost(ici_bytes=self._allreduce_bytes(hidden))
        if products > 2:
            in_float32 = vocab_size * width * 4 / self.mesh["tensor"]
            cost += Cost(0, 0, *self._reduce_gradient_bytes(in_float32))
            if self.uneven_vocabulary:  # each device of `tensor` has a whole one, of its positions
                cost += Cost(ici_bytes=in_float32 * (self.mesh["tensor"] - 1))
        return cost

    def blocks(self, rows: int, positions: int) -> int:
        """Blocks of positions that a loss takes one after the other."""
        on_device = max(rows * self.config.vocab_size // math.prod(self.mesh.values()), 1)
        return -(-positions // max(chunked_loss.chunk_elements("tpu") // on_device, 1))

    def gathered_copy(self) -> Cost:
        """A rollout gathers what writes once; what it rounds before it reads as it is kept."""
        size = self.layer_bytes + self.head_bytes
        kept = matrix_parameters(self.config) * jnp.dtype(self.config.param_dtype).itemsize
        read = self.rounded * kept / (self.mesh["fsdp"] * self.mesh["tensor"])
        return Cost(0, 2 * size + read, self._allgather_bytes(size))

    def decode(self, rows: int, columns: int, steps: int) -> Cost:
        """Each token reads layers, head and the whole cache; of a mixture, the experts that the
        rows can have chosen."""
        tokens = rows / self.row_parts
        cache = cache_bytes(self.config, rows, columns, self.mesh)
        chosen = self.config.experts and math.ceil(tokens * self.config.experts.num_experts_per_tok)
        read = matrix_parameters(self.config, chosen)
        step = Cost(
            forward_flops(self.config, rows, 1, keys=columns) + head_flops(self.config, rows, 1),
            read * self._kernel_itemsize / self.mesh["tensor"] + self.head_bytes + cache,
            self._allreduce_layers_bytes(tokens) + self._allreduce_hidden_bytes(tokens),
        )
        return step * steps

    def optimizer(self) -> Cost:
        """Parameter, gradient and state read, all but the gradient written."""
        moved = 3 * 4 * self.parameters + 2 * self.optimizer_bytes
        return Cost(hbm_bytes=moved / (self.mesh["fsdp"] * self.mesh["tensor"]))

    def _allgather_bytes(self, size: float) -> float:
        """Along `fsdp`."""
        return size * (self.mesh["fsdp"] - 1) / self.mesh["fsdp"]

    def _allreduce_bytes(self, size: float) -> float:
        """Along `tensor`."""
        return 2 * size * (self.mesh["tensor"] - 1) / self.mesh["tensor"]

    def _allreduce_hidden_bytes(self, tokens: float) -> float:
        """Of one hidden state, or embedding, of so many tokens."""
        return self._allreduce_bytes(tokens * self.config.width * self.itemsize)

    def _allreduce_layers_bytes(self, tokens: float) -> float:
        return 2 * self.config.num_layers * self._allreduce_hidden_bytes(tokens)

    def _reduce_gradient_bytes(self, size: float) -> tuple[float, float]:
        """Scattered along `fsdp`, then all-reduced along `data`: in a slice, and between them."""
        part, inside = size / self.mesh["fsdp"], self.mesh["data"] // self.slices
        sent = self._allgather_bytes(size) + 2 * part * (inside - 1) / inside
        return sent, 2 * part / inside * (self.slices - 1) / self.slices


def cache_bytes(config: DecoderConfig, rows: int, columns: int, mesh: Mapping[str, int]) -> float:
    """Keys and values: 2 L B S K H, rows along `data` and `fsdp`, heads along `tensor`, each as
    often as makes their number divide; in 8 bits with a scale for each head and column."""
    heads = math.lcm(config.num_kv_heads, mesh["tensor"]) / mesh["tensor"]
    elements = 2 * config.num_layers * rows * columns * heads * config.head_dim
    itemsize = jnp.dtype(config.dtype).itemsize
    if config.kv_cache_dtype == "int8":
        itemsize = 1 + 2 / config.head_dim
    return elements * itemsize / (mesh["data"] * mesh["fsdp"])
