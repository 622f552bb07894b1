"""Preconditioners: what becomes of the gradient of a parameter before rate, decay and rounding.

Their moments, in bytes a parameter: `adam` 8, `adam_8bit` 2 and a few hundredths, `muon` 4 (and 8
outside of the layers), `adafactor` the square root of it, so to say: next to none.

Layers are stacked, and of a kernel `[L, D, N, H]` every layer is the matrix `[D, N H]` that it
computes: see `matrices`. A mesh may end parameters with zeros (see `DecoderConfig.padded`), whose
gradients are 0. `Matrices` has the shapes without: means over a matrix are then those of one
device, and a checkpoint of one mesh goes on on another. The moments of what is padding are 0.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from promptkd_jax.models.layers.lora import MODULES, B


class Preconditioner(NamedTuple):
    """Turns the gradient of one parameter into the direction of its update.

    Attributes:
      init: `(param, its Matrices) -> (mu, nu)`, zeros for its first and second moment, or None.
      update: `(gradient, mu, nu, its Matrices, count) -> (direction, mu, nu)`, in float32. Of a
        stack it may be called with some of the layers: the first axis of the arrays is then shorter
        than `Matrices.stack` says. `count` is the number of the update, from 1 on.
      elementwise: no entry of a direction depends on another's; it is never called with slices.
      row_wise: no row of a matrix's direction depends on another's; of one that is not in a stack
        it may be called with some of the rows.
    """

    init: Callable
    update: Callable
    elementwise: bool = False
    row_wise: bool = False


# Adam


def adam(b1: float, b2: float, eps: float = 1e-8) -> Preconditioner:
    """Adam's direction (Kingma & Ba 2015, arXiv 1412.6980, algorithm 1), its moments in float32.

    `optax.scale_by_adam` takes 1 - b ** t from a b that float32 has rounded: for b = 0.999 and
    t = 1 it is off by 1.3e-5. Here log(b) is exact to float64, and expm1 loses nothing near 0.
    """

    def init(param, seen):
        # Two arrays of zeros: one cannot be donated twice.
        return jnp.zeros(param.shape, jnp.float32), jnp.zeros(param.shape, jnp.float32)

    def update(gradient, mu, nu, seen, count):
        mu = optax.tree.update_moment(gradient, mu, b1, 1)
        nu = optax.tree.update_moment(gradient, nu, b2, 2)
        return _adam_direction(count, b1, b2, eps)(mu, nu), mu, nu

    return Preconditioner(init, update, elementwise=True)


def _adam_direction(count: jax.Array, b1: float, b2: float, eps: float) -> Callable:
    # Bias corrections 1 - b^t by expm1: for b2 = 0.999 and t = 1 the difference of floats loses
    # 3 of 7 digits.
    logs = (math.log(b) if b else -math.inf for b in (b1, b2))
    share1, share2 = (-jnp.expm1(count * log) for log in logs)
    return lambda m, v: (m / share1) / (jnp.sqrt(v / share2) + eps)


# Adam, its moments in 8 bits

BLOCK = 256  # neighbours along the last axis that share a scale, as in bitsandbytes
MIN_SIZE = 4096  # parameters of fewer entries keep their moments in float32, as there


class Quantized(NamedTuple):
    """An array in 8 bits: `codes` of its shape, int8 or (not negative) uint8, and float32 `scales`
    `[…, ceil(last axis / BLOCK)]`, the largest absolute value of each block."""

    codes: jax.Array
    scales: jax.Array


def adam_8bit(b1: float, b2: float, eps: float = 1e-8) -> Preconditioner:
    """Adam's direction, both moments in 8 bits between updates (Dettmers et al. 2022, arXiv
    2110.02861), those of small parameters in float32; the arithmetic is float32.

    A block's codes are logarithmic: each is 1.09 times the one before, over 16 octaves of the first
    moment and 32 of the second. An update moves the second moment by a thousandth, so that codes
    rounded to nearest would stand still. `_threshold` makes rounding right on average.
    """
    in_float32 = adam(b1, b2, eps)

    def init(param, seen):
        if seen.size < MIN_SIZE:
            return in_float32.init(param, seen)
        scales = (*param.shape[:-1], -(-param.shape[-1] // BLOCK))
        return tuple(
            Quantized(jnp.zeros(param.shape, dtype), jnp.zeros(scales, jnp.float32))
            for dtype in (jnp.int8, jnp.uint8)
        )

    def update(gradient, mu, nu, seen, count):
        if not isinstance(mu, Quantized):
            return in_float32.update(gradient, mu, nu, seen, count)
        moments = dequantize(mu), dequantize(nu)
        direction, mu, nu = in_float32.update(gradient, *moments, seen, count)
        threshold = _threshold(count)
        return direction, quantize(mu, jnp.int8, threshold), quantize(nu, jnp.uint8, threshold)

    return Preconditioner(init, update, row_wise=True)


def quantize(x: jax.Array, dtype: Any, threshold: jax.Array | float = 0.5) -> Quantized:
    """An array `[…, n]` in 8 bits. Code 0 is 0, and code c of K = 127 (int8, which has a sign) or
    255 (uint8) is 2^(R (c - K) / (K - 1)) of the largest of its block, with R = 16 or 32.

    A value between two codes becomes the upper one if it lies further than `threshold` (0 to 1) of
    the way to it. Of uint8, only 0 becomes 0: a second moment that vanishes beside a large one of
    its block would else make its parameter's next update as large as its gradient / 1e-8.
    """
    blocks = _blocks(x)  # […, n / BLOCK, BLOCK]
    scales = jnp.max(jnp.abs(blocks), axis=-1)
    ratio = jnp.abs(blocks) / jnp.where(scales > 0, scales, 1.0)[..., None]
    top, octaves = _code(dtype)
    place = top + jnp.log2(ratio) * ((top - 1) / octaves)  # -inf of 0
    # The two codes around a value; `ratio` decides between them, since `place` is a logarithm, and
    # a mean over many roundings has to be right of the values themselves.
    below = jnp.clip(jnp.floor(place), 0, top - 1)
    low, high = _magnitude(below, dtype), _magnitude(below + 1, dtype)
    codes = below + (ratio - low > threshold * (high - low))
    if dtype == jnp.uint8:
        codes = jnp.where(ratio > 0, jnp.maximum(codes, 1), 0)
    else:
        codes = codes * jnp.sign(blocks)
    codes = codes.reshape(*x.shape[:-1], -1)[..., : x.shape[-1]]
    return Quantized(codes.astype(dtype), scales)


def dequantize(x: Quantized) -> jax.Array:
    """The array in float32."""
    codes = _blocks(x.codes.astype(jnp.float32))
    values = jnp.sign(codes) * _magnitude(jnp.abs(codes), x.codes.dtype) * x.scales[..., None]
    return values.reshape(*x.codes.shape[:-1], -1)[..., : x.codes.shape[-1]]


def _code(dtype: Any) -> tuple[int, int]:
    """The largest code, and octaves between code 1 and that one."""
    return (255, 32) if dtype == jnp.uint8 else (127, 16)


def _magnitude(code: jax.Array, dtype: Any) -> jax.Array:
    top, octaves = _code(dtype)
    return jnp.where(code > 0, jnp.exp2((code - top) * (octaves / (top - 1))), 0.0)


def _blocks(x: jax.Array) -> jax.Array:
    """`[…, n]` as `[…, ceil(n / BLOCK), BLOCK]`, or one shorter block; ends with zeros."""
    size = x.shape[-1]
    block = min(size, BLOCK)
    padding = [(0, 0)] * (x.ndim - 1) + [(0, -size % block)]
    return jnp.pad(x, padding).reshape(*x.shape[:-1], -1, block)


def _threshold(count: jax.Array) -> jax.Array:
    """The fraction of count times the golden ratio: values that fill [0, 1) evenly, so that over
    many updates a share p of them is below p. Being one number for all parameters, it is the same
    on any mesh, and for any padding."""
    fraction = count.astype(jnp.uint32) * jnp.uint32(2654435769)  # 2^32 / 1.618…; wraps around
    return (fraction >> 8).astype(jnp.float32) / 2**24


# Adafactor


class Factors(NamedTuple):
    """Means of squared gradients along the outputs, `rows` `[*stack, in]`, and along the inputs,
    `columns` `[*stack, out]`, of stacked matrices."""

    rows: jax.Array
    columns: jax.Array


def adafactor(clipping_threshold: float = 1.0, eps: float = 1e-30) -> Preconditioner:
    """Gradients over the root of a factored second moment, clipped (Shazeer & Stern 2018, arXiv
    1804.04235, algorithms 4 and 5): u = g / sqrt(rows columns / mean(rows)), u / max(1, rms(u)).

    There is no momentum, and the rate is absolute, not relative to a parameter's size. Decay rate
    is 1 - t^-0.8. `optax.scale_by_factored_rms` takes for a matrix the two largest axes of an
    array, layers and heads among them.

    Args:
      clipping_threshold: the largest root mean square of a matrix's, or vector's, update.
    """

    def init(param, seen):
        if seen.is_vector:
            return None, jnp.zeros(param.shape, jnp.float32)
        return None, Factors(*(jnp.zeros((*seen.stack, n), jnp.float32) for n in seen.shape))

    def inverse_root(x):
        return jax.lax.rsqrt(jnp.maximum(x, eps))

    def update(gradient, mu, nu, seen, count):
        b2 = 1 - count.astype(jnp.float32) ** -0.8

        def moved(moment, mean):
            return b2 * moment + (1 - b2) * mean

        # [*stack, in, out], or [*stack, size]
        x = gradient.reshape(*gradient.shape[: len(seen.stack)], *seen.shape)
        if seen.is_vector:
            nu = moved(nu, gradient**2)
            x *= inverse_root(nu.reshape(x.shape))
        else:
            # Sums over what is padded too, where gradients are 0, divided by what is not.
            inputs, outputs = seen.own
            nu = Factors(
                moved(nu.rows, jnp.sum(x**2, -1) / outputs),
                moved(nu.columns, jnp.sum(x**2, -2) / inputs),
            )
            mean = jnp.sum(nu.rows, -1, keepdims=True) / inputs
            x *= inverse_root(nu.rows / jnp.maximum(mean, eps))[..., None]
            x *= inverse_root(nu.columns)[..., None, :]
        each = tuple(range(len(seen.stack), x.ndim))
        rms = jnp.sqrt(jnp.sum(x**2, each, keepdims=True) / math.prod(seen.own))
        x /= jnp.maximum(1.0, rms / clipping_threshold)
        return x.reshape(gradient.shape), None, nu

    return Preconditioner(init, update)


# Muon


def muon(b2: float, momentum: float = 0.95) -> Preconditioner:
    """Orthogonalized momentum for the matrices of the layers (Jordan et al. 2024), times
    0.2 sqrt(max(in, out)), with which rates and decays are those of AdamW (Liu et al. 2025, arXiv
    2502.16982, equation 4); Adam for all other parameters. As `torch.optim.Muon` with
    `match_rms_adamw`, the momentum of Nesterov.

    `optax.contrib.muon` has no stacks of experts and would scale by padded sizes.

    Args:
      b2: of Adam, whose first moment decays with 0.9.
    """
    others = adam(0.9, b2)

    def is_hidden(seen):
        return bool(seen.stack) and not seen.is_vector

    def init(param, seen):
        moments = others.init(param, seen)
        return (moments[0], None) if is_hidden(seen) else moments

    def update(gradient, mu, nu, seen, count):
        if not is_hidden(seen):
            return others.update(gradient, mu, nu, seen, count)
        mu = optax.tree.update_moment(gradient, mu, momentum, 1)
        ahead = optax.tree.update_moment(gradient, mu, momentum, 1)  # Nesterov's
        # Layers one after the other, the experts of each at once.
        orthogonal = orthogonalize
        for _ in seen.stack[1:]:
            orthogonal = jax.vmap(orthogonal)
        x = ahead.reshape(*ahead.shape[: len(seen.stack)], *seen.shape)
        x = 0.2 * math.sqrt(max(seen.own)) * jax.lax.map(orthogonal, x)
        return x.reshape(ahead.shape), mu, None

    return Preconditioner(init, update)


def orthogonalize(x: jax.Array) -> jax.Array:
    """A matrix with the singular vectors of `x` `[m, n]` and singular values near 1 (0.7 to 1.2,
    those below a thousandth of the norm excepted): five Newton-Schulz iterations of degree 5."""
    # The smaller of the two products of x with itself, [m, m] with m <= n.
    if x.shape[0] > x.shape[1]:
        return orthogonalize(x.T).T

    # With x = U S V^T an iteration is U p(S) V^T, p(s) = 3.4445 s - 4.775 s^3 + 2.0315 s^5, which
    # brings what is between 0 and 1 near 1. The norm is at least the largest singular value.
    def iteration(_, x):
        gram = x @ x.T
        return 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x

    return jax.lax.fori_loop(0, 5, iteration, x / (jnp.linalg.norm(x) + 1e-7))


# Parameters as matrices


@dataclasses.dataclass(frozen=True)
class Matrices:
    """How a parameter consists of matrices: its shape as `[*stack, in, out]`, or, of vectors,
    `[*stack, size]`. `shape` is (in, out) or (size,), `own` the same without padding, and `size`
    all entries without padding."""

    stack: tuple[int, ...]
    shape: tuple[int, ...]
    own: tuple[int, ...]
    size: int

    @property
    def is_vector(self) -> bool:
        return len(self.shape) == 1


def matrices(params: Any, unpadded: Any = None) -> Any:
    """`Matrices` for every parameter of a tree of arrays or shapes, by its path: parameters in
    `layers` are stacked along them, those of experts along these too; attention's output has two
    axes of inputs (heads and their widths), everything else one.

    Args:
      unpadded: the same without padding; a tree with fewer leaves, or None: others have none.
    """
    leaves = jax.tree_util.tree_leaves_with_path(unpadded)
    unpadded_shapes = {_path(path): x.shape for path, x in leaves}

    def of_leaf(path, x):
        path = _path(path)
        own = unpadded_shapes.get(path, x.shape)
        *modules, name = path.split("/")
        experts = "experts" in modules and "router" not in modules
        stack = ("layers" in modules) + experts
        inputs = 1 if name == B else MODULES.get("/".join(modules[-2:]), 1)
        is_vector = name in ("bias", "scale", "sinks")

        def shape_of(shape):
            if is_vector:
                return (math.prod(shape[stack:]),)
            return math.prod(shape[stack : stack + inputs]), math.prod(shape[stack + inputs :])

        return Matrices(x.shape[:stack], shape_of(x.shape), shape_of(own), math.prod(own))

    return jax.tree_util.tree_map_with_path(of_leaf, params)


def _path(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
