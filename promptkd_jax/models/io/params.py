"""Parameters from named tensors: every one named, shaped and used; each process reads its own part.

A family's table says which stored tensor is which parameter. Here the part of a parameter that a
device holds is traced back to parts of stored tensors, and only these are read, piece by piece.
"""

import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec

from promptkd_jax.infra.errors import ConfigError, ModelError
from promptkd_jax.infra.sharding import HOST_MEMORY, in_host_memory, parts_along
from promptkd_jax.models.config import DecoderConfig, Quantization
from promptkd_jax.models.decoder import Decoder
from promptkd_jax.models.families.base import HEAD, Tensor, sizes, stack_sizes
from promptkd_jax.models.families.registry import FAMILIES
from promptkd_jax.models.layers.lora import adapter_shapes, join
from promptkd_jax.models.layers.quantization import (
    axes_of,
    is_quantized,
    quantize_kernels,
    scale_path,
)

PIECE_BYTES = 64 * 2**20  # what is read at once; a stack of layers that is larger goes one by one
STORED_DTYPES = ("F64", "F32", "F16", "BF16")
_CHECKED = 2**17  # elements that are checked at once; they stay in a core's cache

Bounds = tuple[tuple[int, int], ...]  # (start, stop) of each dimension


class TensorSource(Protocol):
    """Named arrays that are read in parts, with the `config.json` they belong to."""

    path: str
    config: dict[str, Any]

    def names(self) -> list[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> str: ...
    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray: ...


def load_params(source: TensorSource, config: DecoderConfig, shardings: Any = None) -> Any:
    """Fills the parameter tree of `Decoder(config)` from `source`; nothing may be left over.

    Only what the devices of this process hold is read, each element once. Beyond these arrays, host
    memory holds what they have of one stored tensor, for a moment twice, and a few times
    PIECE_BYTES; of what goes to the host's memory, one parameter twice. Where the config has
    kernels quantised, the devices do it, layer by layer: they hold no more than one plain one. All
    processes must call it.

    Raises:
      ModelError: a tensor is missing, of another shape, of integers, or unknown, or has an element
        that is not finite in the dtype of the parameters.
    """
    plain = config.replace(quantization=None)
    shapes, placed = _shapes_and_places(plain, shardings)
    kept, places = _shapes_and_places(config, shardings)
    prefix = _prefix(source, config)
    _check(source, config, prefix)  # all that is wrong is told before the first gigabyte is read
    params = {}
    for row in FAMILIES[config.family].tensors(config):
        read = functools.partial(_read, source, config, row, prefix)
        shape, place = shapes[row.path], placed.get(row.path)
        if config.quantization and is_quantized(row.path):
            paths = row.path, scale_path(row.path)
            both = [(kept[path], places.get(path)) for path in paths]
            axes = axes_of(row.path)
            kernel = _quantized(read, shape, place, both, config.quantization, axes)
            params |= dict(zip(paths, kernel))
        else:
            params[row.path] = _parameter(read, shape, place, row.stacked)
    assert params.keys() == kept.keys(), params.keys() ^ kept.keys()
    return traverse_util.unflatten_dict(params, sep="/")


def _shapes_and_places(
    config: DecoderConfig, shardings: Any
) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[str, NamedSharding]]:
    """Both of each parameter, by its path; no places without a mesh."""
    abstract = abstract_params(config)
    places = traverse_util.flatten_dict(shardings(abstract), sep="/") if shardings else {}
    return traverse_util.flatten_dict(abstract, sep="/"), places


def has_head_of_its_own(source: TensorSource, config: DecoderConfig) -> bool:
    """Whether a head is stored that is not equal to the embedding.

    Both are read, piece by piece, up to the first difference. What cannot be compared, since shape
    or dtype are wrong, counts as different: `load_params` then says what is wrong.
    """
    if HEAD not in source.names():
        return False
    embedding = stored_name(FAMILIES[config.family].tensors(config)[0], _prefix(source, config))
    shape = source.shape(embedding)
    alike = source.shape(HEAD) == shape and len(shape) == 2
    if not alike or not {source.dtype(embedding), source.dtype(HEAD)} <= {*STORED_DTYPES}:
        return True
    rows, width = shape
    step = max(1, PIECE_BYTES // (4 * width))
    pieces = ((slice(i, min(i + step, rows)), slice(0, width)) for i in range(0, rows, step))
    names = embedding, HEAD
    return not all(np.array_equal(*(source.read(x, piece) for x in names)) for piece in pieces)


def _parameter(
    read: Callable[[Bounds], np.ndarray],
    shape: jax.ShapeDtypeStruct,
    sharding: NamedSharding | None,
    stacked: int,
) -> jax.Array:
    """The array of which `read` gives parts; a large one is put together layer by layer."""
    if not stacked or _bytes_here(shape, sharding) <= PIECE_BYTES or _is_host_memory(sharding):
        return _place(read, shape.shape, sharding)
    # On the devices at once; the host holds one layer at a time.
    stack = jnp.zeros(shape.shape, shape.dtype, device=sharding)
    for layer, array in enumerate(_layers(read, shape, sharding)):
        # Blocking, or the host would hold several layers.
        stack = jax.block_until_ready(_put(stack, array, layer))
    return stack


def _quantized(
    read: Callable[[Bounds], np.ndarray],
    shape: jax.ShapeDtypeStruct,
    sharding: NamedSharding | None,
    kept: Sequence[tuple[jax.ShapeDtypeStruct, NamedSharding | None]],
    how: Quantization,
    axes: Mapping[str, int],
) -> Sequence[jax.Array]:
    """The values and scales, of the shapes and in the places of `kept`, of the kernels that `read`
    gives parts of."""
    if not axes["stacks"]:
        kernel = _quantize(_place(read, shape.shape, sharding), how, **axes)
        return jax.device_put(kernel, tuple(place for _, place in kept))
    axes = {**axes, "stacks": axes["stacks"] - 1}
    places = tuple(_of_layer(place) for _, place in kept)
    kernels = (_quantize(array, how, **axes) for array in _layers(read, shape, sharding))
    if any(_is_host_memory(place) for _, place in kept):
        # From the devices layer by layer, which hold none of them for long.
        places = in_host_memory(places)
        layers = [jax.block_until_ready(jax.device_put(kernel, places)) for kernel in kernels]
        return [_stack(each, place) for each, (_, place) in zip(zip(*layers), kept)]
    stacks = tuple(jnp.zeros(x.shape, x.dtype, device=place) for x, place in kept)
    for layer, kernel in enumerate(kernels):
        stacks = jax.block_until_ready(_put(stacks, jax.device_put(kernel, places), layer))
    return stacks


def _stack(layers: Sequence[jax.Array], sharding: NamedSharding) -> jax.Array:
    """Layers that lie in the host's memory, cut alike, as one array of `sharding`."""
    shape = layers[0].shape

    def bounds(index):
        return tuple(cut.indices(size)[:2] for cut, size in zip(index, shape))

    parts = [{bounds(x.index): x.data for x in each.addressable_shards} for each in layers]

    def part(index):
        return np.stack([each[bounds(index[1:])] for each in parts])

    return jax.make_array_from_callback((len(layers), *shape), sharding, part)


def _is_host_memory(sharding: NamedSharding | None) -> bool:
    return sharding is not None and sharding.memory_kind == HOST_MEMORY


_quantize = jax.jit(quantize_kernels, static_argnames=("how", "inputs", "stacks"))


def _layers(
    read: Callable[[Bounds], np.ndarray],
    shape: jax.ShapeDtypeStruct,
    sharding: NamedSharding | None,
) -> Iterator[jax.Array]:
    """Yields the layers of a stack one by one."""

    def read_layer(layer: int, bounds: Bounds) -> np.ndarray:
        return read(((layer, layer + 1), *bounds))[0]

    for layer in range(shape.shape[0]):
        part = functools.partial(read_layer, layer)
        yield _place(part, shape.shape[1:], _of_layer(sharding))


def _of_layer(sharding: NamedSharding | None) -> NamedSharding | None:
    """The sharding of one layer of a stack, whose axis of layers is not cut."""
    if sharding is None:
        return None
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))


def _bytes_here(shape: jax.ShapeDtypeStruct, sharding: NamedSharding | None) -> int:
    """Bytes of it that the devices of one process hold, the same number on all processes."""
    if sharding is None:
        return math.prod(shape.shape) * shape.dtype.itemsize
    part = math.prod(sharding.shard_shape(shape.shape)) * shape.dtype.itemsize
    return part * max(1, sharding.mesh.devices.size // jax.process_count())


def _place(
    read: Callable[[Bounds], np.ndarray], shape: tuple[int, ...], sharding: NamedSharding | None
) -> jax.Array:
    """The array of which `read` gives parts; devices that hold the same part share one reading."""
    if sharding is None:
        return jax.device_put(read(tuple((0, size) for size in shape)))
    # Devices along `data` hold the same part, and ask for it one after the other.
    once = functools.cache(read)

    def part(index):
        return once(tuple(cut.indices(size)[:2] for cut, size in zip(index, shape)))

    return jax.make_array_from_callback(shape, sharding, part)


@functools.partial(jax.jit, donate_argnums=0)
def _put(stack: Any, array: Any, layer: int) -> Any:
    put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=layer, axis=0)
    return jax.tree.map(put, stack, array)


def abstract_params(config: DecoderConfig) -> Any:
    """Shapes and dtypes of the parameters, those of an adapter among them; nothing computed."""
    shapes = jax.tree.map(lambda x: x, _abstract(config.replace(offload=False)))  # one's own tree
    if config.lora is None:
        return shapes
    plain = config.replace(lora=None, quantization=None)  # an adapter is beside whole kernels
    return join(shapes, adapter_shapes(abstract_params(plain), config.lora))


@functools.cache
def _abstract(config: DecoderConfig) -> Any:
    """Traced once a config: a run asks for the shapes of a model six times, a search for more."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(lambda: Decoder(config).init(jax.random.key(0), tokens))["params"]


def check_pairs(config: DecoderConfig, where: str, mesh: Any = None) -> None:
    """Checks that the inputs of kernels in 4 bits lie in pairs, of which no mesh cuts one.

    Args:
      where: the field that asks for 4 bits, and the model, for messages.
      mesh: for which `config` is padded; None for one device.

    Raises:
      ModelError: a kernel has an odd number of inputs.
      ConfigError: the mesh would cut between two that share a byte.
    """
    if config.quantization is None or config.quantization.bits != 4:
        return
    plain = config.replace(quantization=None, lora=None)
    for path, kernel in traverse_util.flatten_dict(abstract_params(plain), sep="/").items():
        if not is_quantized(path):
            continue
        axis = sum(axes_of(path).values()) - 1  # the last of the inputs, behind the stacks
        size, parts = kernel.shape[axis], parts_along(mesh, path, axis)
        said = f"{where}: 'int4' keeps two inputs of a kernel in a byte"
        if size % 2:
            raise ModelError(
                f"{said}, and {path} has {size}, an odd number of them; expected 'int8'"
            )
        if size % (2 * parts):
            axes = ", ".join(f"mesh.{name} = {mesh.shape[name]}" for name in ("fsdp", "tensor"))
            raise ConfigError(
                f"{said}, and {axes} would cut between them: {path} has {size}; expected 'int8', "
                "or another mesh"
            )


def pad(params: Any, config: DecoderConfig) -> Any:
    """Parameters of the model's own sizes, with the zeros of `config.padded` behind them."""
    return padded_to(params, abstract_params(config))


def padded_to(params: Any, shapes: Any) -> Any:
    """Parameters with zeros behind them, up to shapes of the same tree."""

    def fill(x, padded):
        return jnp.pad(x, [(0, there - here) for here, there in zip(x.shape, padded.shape)])

    return jax.tree.map(fill, params, shapes)


def stored_name(row: Tensor, prefix: str, place: tuple[int, ...] = ()) -> str:
    """The full name of a row's tensor in a file; `place`: its layer, or layer and expert."""
    name = row.name if row.name == HEAD else prefix + row.name
    return name.format(*place)


def stored_names(row: Tensor, config: DecoderConfig, prefix: str) -> Iterator[str]:
    """The names of a row's tensors, layer by layer, in it expert by expert."""
    return (stored_name(row, prefix, place) for place in np.ndindex(stack_sizes(row, config)))


# From a part of a parameter to parts of a file, for a query kernel [L, D, N, H] of which a device
# holds heads 2 and 3 of 4, H = 8, in a Llama that stores "(N H) D":
#
#     bounds      (0, L), (0, D), (2, 4), (0, 8)     of the parameter, from its sharding
#     places      0 … L-1, one stored tensor each    the axes that are stacked: here the first
#     letters     D 0:D, N 2:4, H 0:8                by the names of our dimensions
#     stretches   [16:32], [0:D]                     of each stored dimension, `Tensor.stretches`
#     pieces      [16:24], [24:32] × [0:D]           of at most PIECE_BYTES, read one by one
#
# `target` is where a tensor goes, in our order of axes; `as_stored` is the same memory in the order
# of the file, so that a piece is copied into place and nothing is transposed on the way.


def _read(
    source: TensorSource, config: DecoderConfig, row: Tensor, prefix: str, bounds: Bounds
) -> np.ndarray:
    """The part of a row's parameter within `bounds`, in the dtype of the parameters; zeros where
    it is padded."""
    part = np.zeros([stop - start for start, stop in bounds], jnp.dtype(config.param_dtype))
    letters = sizes(config)
    present = (*stack_sizes(row, config), *(letters[x] for x in row.ours))
    bounds = [(start, min(stop, size)) for (start, stop), size in zip(bounds, present, strict=True)]
    # All of it is padding: nothing of the file belongs here.
    if any(start >= stop for start, stop in bounds):
        return part
    targets = part[tuple(slice(stop - start) for start, stop in bounds)]
    stack, bounds = bounds[: row.stacked], bounds[row.stacked :]
    stretches = row.stretches(letters, dict(zip(row.ours, bounds, strict=True)))
    for place in itertools.product(*(range(*bound) for bound in stack)):
        target = targets[tuple(i - first for i, (first, _) in zip(place, stack))]
        as_stored = einops.rearrange(target, row.to_stored)
        assert np.may_share_memory(as_stored, target), row
        name = stored_name(row, prefix, place)
        _fill(as_stored, source, name, stretches)
        if not all_finite(target):
            raise ModelError(
                f"{source.path}: tensor {name} is not finite: it has a NaN or an infinity (read as "
                f"{config.param_dtype}); a merge or conversion went wrong, or the file was damaged"
            )
    return part


def all_finite(x: np.ndarray) -> bool:
    """Whether no element is NaN or infinite.

    By their bits, at the speed of memory: NumPy's own test is five times slower for bfloat16.
    """
    # An exponent of all ones is an infinity or NaN: compared as unsigned, without the sign.
    bits = x.reshape(-1).view(f"u{x.itemsize}")
    infinity = np.asarray(np.inf, x.dtype).view(bits.dtype)  # NaN has the same exponent, and more
    unsigned = np.asarray(2 ** (8 * x.itemsize - 1) - 1, bits.dtype)
    starts = range(0, bits.size, _CHECKED)
    return all(((bits[i : i + _CHECKED] & unsigned) < infinity).all() for i in starts)


def _fill(
    target: np.ndarray, source: TensorSource, name: str, stretches: list[list[tuple[int, int]]]
) -> None:
    """Reads the stretches of each dimension of a tensor into `target`, which has no others."""
    rows = max(1, PIECE_BYTES // target[0].nbytes)
    steps = (rows, *target.shape[1:])
    for cuts in itertools.product(*map(_pieces, stretches, steps)):
        here, there = zip(*cuts)
        target[here] = source.read(name, there)


def _pieces(stretches: list[tuple[int, int]], step: int) -> Iterator[tuple[slice, slice]]:
    """Stretches in pieces of at most `step`: (where they go, one behind the other, where from)."""
    end = 0
    for start, stop in stretches:
        for first in range(start, stop, step):
            size = min(step, stop - first)
            yield slice(end, end + size), slice(first, first + size)
            end += size


def _prefix(source: TensorSource, config: DecoderConfig) -> str:
    family, names = FAMILIES[config.family], set(source.names())
    first = family.tensors(config)[0].name
    for prefix in (family.prefix, *family.other_prefixes):
        if prefix + first in names:
            return prefix
    raise ModelError(f"{source.path}: tensor {family.prefix + first} is missing")


def _check(source: TensorSource, config: DecoderConfig, prefix: str) -> None:
    """Every tensor of the table is there, of its shape and of floating point, and no other."""
    family, letters = FAMILIES[config.family], sizes(config)
    rows = {
        name: row for row in family.tensors(config) for name in stored_names(row, config, prefix)
    }
    found = set(source.names())
    if missing := sorted(rows.keys() - found):
        raise ModelError(f"{source.path}: {len(missing)} tensors are missing: {_some(missing)}")
    # Buffers that some exports keep: masks, rotary tables.
    harmless = re.compile("|".join((*family.ignored, "$^")))
    left = {
        name
        for name in found - rows.keys()
        if not harmless.fullmatch(name.removeprefix(prefix)) and not (name == HEAD and config.tied)
    }
    if left:
        raise ModelError(
            f"{source.path}: {len(left)} tensors belong to nothing in a {config.family} of "
            f"{config.num_layers} layers: {_some(sorted(left))}"
        )
    for name, row in rows.items():
        if (shape := source.shape(name)) != (expected := row.stored_shape(letters)):
            used = ", ".join(f"{x}={size}" for x, size in letters.items() if x in row.layout)
            raise ModelError(
                f"{source.path}: tensor {name} has shape {shape}; the config asks for {expected} "
                f"({row.layout} with {used})"
            )
        if (dtype := source.dtype(name)) not in STORED_DTYPES:
            raise ModelError(
                f"{source.path}: tensor {name} is stored as {dtype}; a weight is read as "
                f"{', '.join(STORED_DTYPES)}: take the model that these quantised ones were made "
                "from"
            )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
