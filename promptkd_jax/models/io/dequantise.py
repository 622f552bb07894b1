"""Weights in FP8 and MXFP4 as plain ones, tensor by tensor.

FP8: beside a weight lies its scale, one number for all of it, for each row, or for each block of
it (128 × 128 in DeepSeek-V3, arXiv 2412.19437); the product is what it stands for. MXFP4 (Open
Compute Project, Microscaling Formats 1.0): 32 numbers of 4 bits share a power of two; gpt-oss has
the matrices of its experts so.
"""

import functools
import re
from collections.abc import Callable
from typing import NamedTuple

import ml_dtypes
import numpy as np

from promptkd_jax.infra.errors import ModelError
from promptkd_jax.models.io.export import in_dtype
from promptkd_jax.models.io.params import PIECE_BYTES, STORED_DTYPES
from promptkd_jax.models.io.safetensors import FLOAT8, SafetensorsFolder

_SCALES = ("_scale_inv", "_scale")  # of FP8, behind a weight's name; a factor, in spite of "inv"
_BLOCKS, _EXPONENTS = "_blocks", "_scales"  # of MXFP4, behind a weight's name
# Scales of activations and of the KV cache, of which plain weights have none.
_OF_ACTIVATIONS = re.compile(
    r".+\.(input_scale|input_scale_ub|activation_scale|output_scale|[qkv]_scale|kv_scale)"
)
_BIAS = 127  # of an exponent that is stored as a byte
_FP4 = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)


class LazyTensor(NamedTuple):
    """A tensor that is read when it is asked for."""

    nbytes: int
    read: Callable[[], np.ndarray]


def plain_tensors(
    source: SafetensorsFolder, block: tuple[int, ...], dtype: str
) -> dict[str, LazyTensor]:
    """Returns the weights of a folder by their names, none of them read: those in FP8 and MXFP4 in
    `dtype`, others as they are stored; {} where all are plain.

    Args:
      source: opened with `scaled`.
      block: rows and columns that share a scale; (): as many as there are for each scale.

    Raises:
      ModelError: a tensor has no scale, one of another shape, or is quantised otherwise.
    """
    kinds = {name: source.dtype(name) for name in source.names()}
    # Of each weight in FP8 the tensor with its scales; and MXFP4 by its two tensors, the packed
    # numbers and their exponents, which together are one weight.
    scales = {
        name: scale
        for name, kind in kinds.items()
        for scale in (name + end for end in _SCALES)
        if kind in FLOAT8 and scale in kinds
    }
    packed = {name for name in kinds if name.removesuffix(_BLOCKS) + _EXPONENTS in kinds}
    exponents = {name.removesuffix(_BLOCKS) + _EXPONENTS for name in packed}
    size, tensors = np.dtype(dtype).itemsize, {}
    for name, kind in kinds.items():
        count = int(np.prod(source.shape(name)))
        if name in scales:
            steps = _steps(source, name, scales[name], block)
            read = functools.partial(_read_fp8, source, name, scales[name], steps, dtype)
            tensors[name] = LazyTensor(count * size, read)
        elif name in packed:
            whole = name.removesuffix(_BLOCKS)
            _check_packed(source, name, whole + _EXPONENTS)
            read = functools.partial(_read_mxfp4, source, name, whole + _EXPONENTS, dtype)
            tensors[whole] = LazyTensor(2 * count * size, read)
        elif name in exponents or name in scales.values() or _OF_ACTIVATIONS.fullmatch(name):
            continue
        elif kind in STORED_DTYPES:
            bits = int(re.sub(r"\D", "", kind))
            tensors[name] = LazyTensor(count * bits // 8, functools.partial(source.read, name))
        else:
            raise ModelError(
                f"{source.path}: tensor {name} is stored as {kind}, without a scale that is read "
                f"here ({', '.join(_SCALES)} of FP8); take the model that these weights were made "
                "from"
            )
    return tensors if scales or packed else {}


def _steps(
    source: SafetensorsFolder, name: str, scale: str, block: tuple[int, ...]
) -> tuple[int, ...]:
    """How many elements of each axis of a weight share one of its scales."""
    shape, of_scale = source.shape(name), _scale_shape(source, name, scale)
    blocks = (1,) * (len(shape) - len(block)) + block if block else (0,) * len(shape)
    steps = []
    for length, count, configured in zip(shape, of_scale, blocks):
        # One scale for all, or for each block, of which the last may be cut.
        step = length if count == 1 else configured or length // count
        steps.append(max(step, 1))
    if len(of_scale) != len(shape) or any(
        -(-length // step) != count for length, count, step in zip(shape, of_scale, steps)
    ):
        blocks = f" in blocks of {' × '.join(map(str, block))}" if block else ""
        raise ModelError(
            f"{source.path}: tensor {scale} is {list(source.shape(scale))}; expected the scales of "
            f"{name}, {list(shape)}{blocks}: one, one for each row, or one for each block"
        )
    return tuple(steps)


def _scale_shape(source: SafetensorsFolder, name: str, scale: str) -> tuple[int, ...]:
    """The shape of a scale with an axis for each of its weight's."""
    shape, rank = source.shape(scale), len(source.shape(name))
    if shape in ((), (1,)):
        return (1,) * rank
    return (*shape, 1) if len(shape) == rank - 1 else shape


def _read_fp8(
    source: SafetensorsFolder, name: str, scale: str, steps: tuple[int, ...], dtype: str
) -> np.ndarray:
    """The weight, rounded once, from float32."""
    shape, scales = source.shape(name), source.read(scale)
    if scales.dtype == np.uint8:  # an exponent, as MXFP8 has them
        scales = np.exp2(scales.astype(np.float32) - _BIAS)
    scales = scales.astype(np.float32).reshape(_scale_shape(source, name, scale))
    weight = np.empty(shape, dtype)
    # A few rows at a time; each element of them with the scale of the block that it is in.
    rows = max(1, PIECE_BYTES // (4 * int(np.prod(shape[1:]))))  # in float32
    for start in range(0, shape[0], rows):
        cut = slice(start, min(start + rows, shape[0]))
        cuts = (cut, *(slice(0, length) for length in shape[1:]))
        places = (np.arange(x.start, x.stop) // step for x, step in zip(cuts, steps))
        product = source.read(name, cuts).astype(np.float32) * scales[np.ix_(*places)]
        weight[cut] = in_dtype(product, name, dtype)
    return weight


def _check_packed(source: SafetensorsFolder, blocks: str, exponents: str) -> None:
    shape, ours = source.shape(blocks), source.shape(exponents)
    kinds = {source.dtype(blocks), source.dtype(exponents)}
    if len(shape) != 4 or shape[-1] != 16 or shape[:-1] != ours or kinds != {"U8"}:
        raise ModelError(
            f"{source.path}: tensors {blocks} {list(shape)} and {exponents} {list(ours)} are not "
            "MXFP4 of experts; expected bytes [experts, out, groups, 16] and [experts, out, groups]"
        )


def _read_mxfp4(source: SafetensorsFolder, blocks: str, exponents: str, dtype: str) -> np.ndarray:
    """The matrices of experts, [E, in, out], as `transformers` dequantises them."""
    experts, out, groups, _ = source.shape(blocks)
    # 16 bytes are 32 numbers of one output, which share an exponent.
    weight = np.empty((experts, 32 * groups, out), dtype)
    for expert in range(experts):
        cut = (slice(expert, expert + 1),)
        packed = source.read(blocks, cut)[0]  # [out, groups, 16], the lower half of a byte first
        values = np.stack([_FP4[packed & 15], _FP4[packed >> 4]], axis=-1)
        exponent = source.read(exponents, cut)[0].astype(np.int32) - _BIAS
        values = np.ldexp(values.reshape(out, groups, 32), exponent[..., None])
        weight[expert] = in_dtype(values.reshape(out, 32 * groups).T, blocks, dtype)
    return weight
