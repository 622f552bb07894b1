"""Feed-forward networks of a decoder: one for all tokens, or a mixture of experts.

A mixture has E small networks. A router gives every token a score of each, its k best answer, and
what they say is added up with weights that follow from the scores (Shazeer et al. 2017, arXiv
1701.06538). No token is dropped: no expert has a capacity.

B rows, T columns, D width, F feed-forward width, E experts, k experts of a token, n = B T k pairs
of a token and an expert.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from promptkd_jax.infra import sharding
from promptkd_jax.infra.sharding import ROWS, constrain
from promptkd_jax.models.config import DecoderConfig, Quantization
from promptkd_jax.models.layers.projection import project
from promptkd_jax.models.layers.quantization import dequantize_kernels, quantized_kernel

ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
MIN_TILE, MAX_TILE = 8, 256  # rows of one product, see `_in_tiles`
GATE_UP = "gate_up"  # see `with_gate_beside_up`
SPARE, FEW = 1.25, 2048  # see `pairs_at_once`


class FeedForward(nn.Module):
    """act(up) or act(gate) * up, then down."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x, dropout_keys=None):
        config, width = self.config, self.config.padded.mlp_width
        activation = ACTIVATIONS[config.activation]
        if self.has_variable("params", GATE_UP):
            both = project(config, (2, width), config.mlp_bias, GATE_UP)(x, dropout_keys)
            hidden = activation(both[..., 0, :]) * both[..., 1, :]
        elif config.gated:
            up = project(config, width, config.mlp_bias, "up")(x, dropout_keys)
            gate = project(config, width, config.mlp_bias, "gate")(x, dropout_keys)
            hidden = activation(gate) * up
        else:
            hidden = activation(project(config, width, config.mlp_bias, "up")(x, dropout_keys))
        # Units are dealt out to devices; the product with `down` adds up their shares.
        hidden = constrain(hidden, ROWS, None, "tensor")
        return project(config, config.width, config.mlp_bias, "down")(hidden, dropout_keys)


def with_gate_beside_up(layers: Mapping[str, Any]) -> Mapping[str, Any]:
    """Stacked parameters of layers with one kernel `[L, D, 2, F]` (and bias `[L, 2, F]`) in place
    of those of gate and up, where both are plain: one product for two that share their input."""
    network = dict(layers.get("mlp", {}))
    gate, up = network.pop("gate", None), network.pop("up", None)
    if gate is None or not {"kernel", "bias"}.issuperset((*gate, *up)):
        return layers
    network[GATE_UP] = jax.tree.map(lambda *both: jnp.stack(both, axis=-2), gate, up)
    return {**layers, "mlp": network}


class MixtureOfExperts(nn.Module):
    """A mixture of experts, each act(gate) * up, then down.

    Sows the scores `[B, T, E]` as "router_scores" into the intermediates.

    Attributes:
      layer: whose experts they are, where plain kernels are those of all layers, `[L, E, in, out]`:
        one layer's, taken out of the stack, would be a copy for what multiplies groups.
    """

    config: DecoderConfig
    layer: int | None = None

    @nn.compact
    def __call__(self, x, dropout_keys=None):
        config, experts = self.config, self.config.experts
        # In float32: rounded scores would tie, and other experts be chosen.
        full = {"dtype": jnp.float32, "param_dtype": config.param_dtype}
        router = nn.DenseGeneral(experts.num_experts, use_bias=experts.bias, name="router", **full)
        scores = router(x)
        self.sow("intermediates", "router_scores", scores)
        weights, chosen = route(scores, experts.num_experts_per_tok, experts.norm_topk_prob)
        width = config.mlp_width

        def linear(inputs: int, outputs: int, name: str):
            stacked = self.layer is not None
            return ExpertLinear(config, inputs, outputs, stacked, name=name)()

        if experts.interleaved:
            inner = (linear(config.width, 2 * width, "gate_up"),)
        else:
            inner = tuple(linear(config.width, width, name) for name in ("gate", "up"))
        networks = Networks(inner, linear(width, config.width, "down"))
        return _mixed(config, x, weights.astype(x.dtype), chosen, networks, self.layer)


class Linear(NamedTuple):
    """Linear maps of all experts: kernel `[E, in, out]`, or of all layers `[L, E, in, out]`, and
    bias `[E, out]` or None; `scale` of a quantised kernel, see `quantization`."""

    kernel: jax.Array
    bias: jax.Array | None
    scale: jax.Array | None = None


class Networks(NamedTuple):
    """The networks of all experts: gate and up (one, with the two in turn, where they are
    interleaved), and down."""

    inner: tuple[Linear, ...]
    down: Linear


class ExpertLinear(nn.Module):
    """The parameters of a `Linear`, a plain kernel in the dtype of computation."""

    config: DecoderConfig
    inputs: int
    outputs: int
    stacked: bool

    @nn.compact
    def __call__(self):
        config, number = self.config, self.config.padded.experts.num_experts
        shape, dtype = (number, self.inputs, self.outputs), config.param_dtype
        if config.quantization:
            kernel, scale = quantized_kernel(self, config.quantization, shape, stacks=1)
        elif self.stacked:
            kernel, scale = self.get_variable("params", "kernel").astype(config.dtype), None
        else:
            kernel, scale = self.param("kernel", nn.initializers.normal(0.02), shape, dtype), None
            kernel = kernel.astype(config.dtype)
        bias = None
        if config.experts.bias:
            zeros = nn.initializers.zeros_init()
            # In float32: the gradients of all tokens of an expert are summed in its dtype.
            bias = self.param("bias", zeros, (number, self.outputs), dtype).astype(jnp.float32)
        return Linear(kernel, bias, scale)


def route(scores: jax.Array, k: int, norm_topk_prob: bool) -> tuple[jax.Array, jax.Array]:
    """Chooses the experts of every token.

    Args:
      scores: `[B, T, E]`, float32.
      norm_topk_prob: whether the weights of the k add up to 1, or are their shares among all E.

    Returns:
      (weights, chosen): `[B, T, k]` each, the best first.
    """
    best, chosen = jax.lax.top_k(scores, k)
    total = jax.nn.logsumexp(best if norm_topk_prob else scores, axis=-1, keepdims=True)
    return jnp.exp(best - total), chosen


# Experts are dealt out to the devices of `tensor`, rows to the others. Each device has whole
# networks of E / t experts and all tokens of its rows; it adds up what its own experts say of them,
# and the sums of the t devices are added at the end. Nothing is sent before that. It has places for
# its share of the pairs and a quarter more; where the router prefers its experts, the others wait
# for another turn.


def _mixed(
    config: DecoderConfig, x, weights, chosen, networks: Networks, layer: int | None
) -> jax.Array:
    """The weighted sum of the chosen experts: `[B, T, D]`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size < 2 or sharding.mesh_is_external():
        return _mixed_on_device(config, x, weights, chosen, networks, layer, 0)

    def on_device(x, weights, chosen, networks):
        first = jax.lax.axis_index("tensor") * networks.down.kernel.shape[-3]
        return _mixed_on_device(config, x, weights, chosen, networks, layer, first)[None]

    def spec(x):
        return P(None, "tensor") if x.ndim == 4 else P("tensor")  # of all layers, or one

    rows = P(ROWS if x.shape[0] % sharding.axis_size(ROWS) == 0 else None)
    # check_vma: a loop's carry begins as zeros, which do not vary along the axes.
    cut = jax.shard_map(
        on_device,
        in_specs=(rows, rows, rows, jax.tree.map(spec, networks)),
        out_specs=P("tensor", *rows),
        check_vma=False,
    )
    return constrain(jnp.sum(cut(x, weights, chosen, networks), axis=0), ROWS, None, None)


def _mixed_on_device(
    config: DecoderConfig, x, weights, chosen, networks: Networks, layer: int | None, first
) -> jax.Array:
    """The same of the experts that the device has, from number `first` on."""
    number, k = networks.down.kernel.shape[-3], chosen.shape[-1]
    # Pairs are put in the order of their experts, so that those of one lie together. With E = 2,
    # k = 1 and five tokens:
    #
    #     expert  1 0 1 1 0                                   [n], by token
    #     order   1 4 0 2 3    sizes 2 3    expert 0 0 1 1 1  by expert
    #
    # Pairs of another device's expert come last.
    expert = chosen.reshape(-1) - first
    expert = jnp.where((expert >= 0) & (expert < number), expert, number)
    order = jnp.argsort(expert, stable=True)  # [n]
    pairs = order, expert[order]
    inputs = x.reshape(-1, x.shape[-1]), weights.reshape(-1), networks
    places = pairs_at_once(chosen.size, number / config.experts.num_experts)
    if places >= chosen.size:
        y = _answers(config, layer, k, pairs, inputs)
        # By the inverse order the k of a token stand together again: [n, D] -> [B, T, k, D].
        return jnp.sum(y[jnp.argsort(order)].reshape(*chosen.shape, -1), axis=2)

    def turn(i, pairs, inputs):  # [B T, D], the sum over pairs i `places` and those that follow
        order, expert = (jax.lax.dynamic_slice_in_dim(x, i * places, places) for x in pairs)
        y = _answers(config, layer, k, (order, expert), inputs).astype(jnp.float32)
        return jnp.zeros(inputs[0].shape, jnp.float32).at[order // k].add(y)

    padding = (0, -chosen.size % places)
    pairs = jnp.pad(order, padding), jnp.pad(pairs[1], padding, constant_values=number)
    turns = -(-jnp.count_nonzero(expert < number) // places)
    return _sum_of_turns(turn, turns, pairs, inputs).reshape(x.shape).astype(x.dtype)


def pairs_at_once(pairs: int, share: float) -> int:
    """Pairs of a token and an expert that a device takes at once: a quarter more than its `share`
    of the experts gets if all are chosen alike, so that one turn nearly always does. Few, as in
    decoding, are not worth a loop."""
    tiles = math.ceil(SPARE * share * pairs / MAX_TILE)
    return min(pairs, max(tiles * MAX_TILE, FEW))


def _answers(config: DecoderConfig, layer: int | None, k: int, pairs, inputs) -> jax.Array:
    """The experts' outputs for their tokens, times the weights: `[m, D]`.

    Args:
      k: experts of a token; pair i is of token i // k.
      pairs: (order, expert): the number of each pair, and the place of its expert among those of
        the device, `[m]` each, by expert.
      inputs: (x `[B T, D]`, weights `[n]`, networks).
    """
    (order, expert), (x, weights, networks) = pairs, inputs
    number = networks.down.kernel.shape[-3]
    sizes = jnp.diff(jnp.searchsorted(expert, jnp.arange(number + 1)))  # [E]

    # Pairs of another device's expert belong to no group and count as 0: before anything is
    # multiplied with them, since nobody says what `ragged_dot` leaves there, nor its gradient.
    own = (expert < number)[:, None]

    def linear(x, weights: Linear):  # [m, in] -> [m, out]
        if config.quantization:
            y = _quantized_grouped_dot(x, weights.kernel, weights.scale, sizes, config.quantization)
        else:
            y = grouped_dot(x, *_of_layer(weights.kernel, sizes, layer))
        if weights.bias is not None:
            y = (y + weights.bias[jnp.minimum(expert, number - 1)]).astype(x.dtype)
        return jnp.where(own, y, 0)

    x_of_pairs = jnp.where(own, x[order // k], 0)
    hidden = _activated(config, [linear(x_of_pairs, weights) for weights in networks.inner])
    return linear(hidden, networks.down) * weights[order][:, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_of_turns(turn, turns, pairs, inputs) -> jax.Array:
    """The sum of `turn(i, pairs, inputs)` over i below `turns`, a number that is known only when
    the program runs. What a gradient needs is computed again, turn by turn."""
    shape = jax.eval_shape(turn, 0, pairs, inputs)
    zeros = jnp.zeros(shape.shape, shape.dtype)
    return jax.lax.fori_loop(0, turns, lambda i, y: y + turn(i, pairs, inputs), zeros)


def _sum_of_turns_fwd(turn, turns, pairs, inputs):
    return _sum_of_turns(turn, turns, pairs, inputs), (turns, pairs, inputs)


def _sum_of_turns_bwd(turn, residuals, d_y):
    turns, pairs, inputs = residuals
    leaves, structure = jax.tree.flatten(inputs)
    floats = [jnp.issubdtype(x.dtype, jnp.inexact) for x in leaves]  # no quantised kernels

    def body(i, sums):
        _, back = jax.vjp(lambda inputs: turn(i, pairs, inputs), inputs)
        gradients = itertools.compress(jax.tree.leaves(back(d_y)), floats)
        return [a + b for a, b in zip(sums, gradients, strict=True)]

    zeros = [jnp.zeros_like(x) for x in itertools.compress(leaves, floats)]
    sums = iter(jax.lax.fori_loop(0, turns, body, zeros))
    return (
        None,
        None,
        structure.unflatten([next(sums) if is_float else None for is_float in floats]),
    )


_sum_of_turns.defvjp(_sum_of_turns_fwd, _sum_of_turns_bwd)


def _of_layer(kernel, sizes, layer: int | None) -> tuple[jax.Array, jax.Array]:
    """Kernels `[L E, in, out]` of all layers, and sizes `[L E]`, 0 but for those of one layer."""
    if layer is None:
        return kernel, sizes
    kernels = kernel.reshape(-1, *kernel.shape[2:])
    begin = layer * len(sizes)
    return kernels, jnp.pad(sizes, (begin, len(kernels) - begin - len(sizes)))


def _activated(config: DecoderConfig, inner: list[jax.Array]) -> jax.Array:
    """act(gate) * up, `[n, F]`."""
    activation, limit = ACTIVATIONS[config.activation], config.experts.swiglu_limit
    gate, up = inner if len(inner) == 2 else (inner[0][:, ::2], inner[0][:, 1::2])
    if limit is None:
        return activation(gate) * up
    return activation(jnp.minimum(gate, limit)) * (jnp.clip(up, -limit, limit) + 1)


def grouped_dot(x: jax.Array, kernel: jax.Array, sizes: jax.Array) -> jax.Array:
    """Multiplies rows with the matrix of their group.

    Args:
      x: `[n, D]`, the rows of a group one behind the other, groups in order.
      kernel: `[E, D, F]`.
      sizes: `[E]`, the rows of each group; rows behind the last have no meaning.

    Returns:
      `[n, F]`. Differentiable once.
    """
    # A TPU has an instruction for it. Elsewhere XLA (of jax 0.10 to 0.11) multiplies E copies of
    # the rows, all but one of which are zero: [E, n, D], E times the work.
    if sharding.platform() == "tpu":
        return jax.lax.ragged_dot(x, kernel, sizes)
    return _in_tiles(x, kernel, sizes)


# As `projection` has it: for the gradient of x the kernels are made again.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=4)
def _quantized_grouped_dot(
    x: jax.Array, values: jax.Array, scale: jax.Array, sizes: jax.Array, how: Quantization
) -> jax.Array:
    return grouped_dot(x, dequantize_kernels(values, scale, how, x.dtype, stacks=1), sizes)


# Rows are cut into tiles of equal size, each a product with one matrix. A tile in which one group
# ends and another begins is multiplied once for each, the others' rows being masked:
#
#     groups   a a a a a b b c c c c c      of 5, 2, 5 rows
#     tiles    1 1 1 1|2 2 2 2|3 3 3 3      of 4
#     products 1·a      2·a 2·b 2·c  3·c    never more than n / 4 + E


def _tile(rows: int, groups: int) -> int:
    """Rows of a tile: about as many as a group has, a power of two."""
    return min(max(1 << (rows // groups).bit_length(), MIN_TILE), MAX_TILE)


def _for_tiles(sizes, rows: int, tile: int, turn, initial):
    """Runs `turn(carry, group, row, mask)` for every product; `row` is the first of its tile, and
    `mask` `[tile, 1]` says which rows are of `group`."""
    ends = jnp.cumsum(sizes)
    begins = ends - sizes
    first = begins // tile  # [E], the first tile of each group
    numbers = jnp.where(sizes > 0, (ends - 1) // tile - first + 1, 0)  # [E], of its products
    last = jnp.cumsum(numbers)

    # Product i is of the group whose count it falls into, and there of the tile that so many
    # products of that group before it leave.
    def body(i, carry):
        group = jnp.searchsorted(last, i, side="right")
        row = (first[group] + i - (last - numbers)[group]) * tile
        here = row + jnp.arange(tile)
        mask = (here >= begins[group]) & (here < ends[group])
        return turn(carry, group, row, mask[:, None])

    return jax.lax.fori_loop(0, last[-1], body, initial)


def _products(x, kernel, sizes, how: str) -> jax.Array:
    """The rows by the matrices `how` says in einsum notation: "td,df->tf", or "tf,df->td"."""
    tile = _tile(x.shape[0], sizes.shape[0])
    padded = jnp.pad(x, ((0, -x.shape[0] % tile), (0, 0)))

    def turn(out, group, row, mask):
        rows = jnp.where(mask, jax.lax.dynamic_slice_in_dim(padded, row, tile), 0)
        # Added to what other groups gave in the tile, whose rows are 0 here.
        y = jnp.einsum(how, rows, kernel[group])
        y += jax.lax.dynamic_slice_in_dim(out, row, tile)
        return jax.lax.dynamic_update_slice_in_dim(out, y, row, 0)

    width = kernel.shape[2 if how.endswith("f") else 1]
    zeros = jnp.zeros((padded.shape[0], width), x.dtype)
    return _for_tiles(sizes, x.shape[0], tile, turn, zeros)[: x.shape[0]]


@jax.custom_vjp
def _in_tiles(x, kernel, sizes) -> jax.Array:
    return _products(x, kernel, sizes, "td,df->tf")


def _in_tiles_fwd(x, kernel, sizes):
    return _in_tiles(x, kernel, sizes), (x, kernel, sizes)


def _in_tiles_bwd(residuals, d_y):
    x, kernel, sizes = residuals
    tile = _tile(x.shape[0], sizes.shape[0])
    padding = ((0, -x.shape[0] % tile), (0, 0))
    padded, d_padded = jnp.pad(x, padding), jnp.pad(d_y, padding)

    def turn(d_kernel, group, row, mask):
        rows = jnp.where(mask, jax.lax.dynamic_slice_in_dim(padded, row, tile), 0)
        d_rows = jax.lax.dynamic_slice_in_dim(d_padded, row, tile)
        product = jnp.einsum("td,tf->df", rows, d_rows, preferred_element_type=jnp.float32)
        return d_kernel.at[group].add(product)

    # Nothing of this is computed where the experts are frozen: the loop's result is not used.
    d_kernel = _for_tiles(sizes, x.shape[0], tile, turn, jnp.zeros(kernel.shape, jnp.float32))
    d_x = _products(d_y, kernel, sizes, "tf,df->td")
    return d_x, d_kernel.astype(kernel.dtype), None


_in_tiles.defvjp(_in_tiles_fwd, _in_tiles_bwd)
