"""The mesh, and one table that says where every parameter lies on it.

Axes: `data` (rows), `fsdp` (rows too, and parameters cut along their width), `tensor` (heads,
feed-forward, vocabulary, and experts, which are dealt out whole). One device is a 1 x 1 x 1 mesh
and the same code; so are many processes, each of which holds its part of every array.

Models and losses say by `constrain` where their intermediate arrays lie. They look at the mesh that
`jax.set_mesh` has set, and without one do nothing.
"""

import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from promptkd_jax.infra.errors import ConfigError

P = PartitionSpec
AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # the axes that the rows of a batch are dealt out to

# (regular expression on a parameter's path, spec); the first match counts. Layers are stacked along
# a leading axis. Optimizer moments have the paths of their parameters, with a name more where they
# are quantized (codes, scales) or factored (rows, columns).
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"embed/embedding|lm_head", P("tensor", "fsdp")),
    (r"positions/embedding", P(None, "fsdp")),
    (r"project_(in|out)/kernel", P()),
    (r"layers/attention/(query|key|value)/kernel", P(None, "fsdp", "tensor", None)),
    (r"layers/attention/(query|key|value)/bias", P(None, "tensor", None)),
    (r"layers/attention/out/kernel", P(None, "tensor", None, "fsdp")),
    (r"layers/mlp/(up|gate)/kernel", P(None, "fsdp", "tensor")),
    (r"layers/mlp/(up|gate)/bias", P(None, "tensor")),
    (r"layers/mlp/gate_up/kernel", P(None, "fsdp", None, "tensor")),  # of a rollout
    (r"layers/mlp/down/kernel", P(None, "tensor", "fsdp")),
    # Scales of quantised kernels lie as the outputs do; groups of inputs are not cut.
    (r"project_(in|out)/kernel_scale", P()),
    (r"layers/attention/(query|key|value)/kernel_scale", P(None, None, "tensor")),
    (r"layers/mlp/(up|gate)/kernel_scale", P(None, None, "tensor")),
    (r"layers/(attention/out|mlp/down)/kernel_scale", P(None, None, "fsdp")),
    (r"layers/experts/(gate|up|gate_up)/kernel_scale", P(None, "tensor")),
    (r"layers/experts/down/kernel_scale", P(None, "tensor", None, "fsdp")),
    (r"layers/(attention|mlp)/(query|key|value|gate|up)/lora_a", P()),
    (r"layers/attention/(query|key|value)/lora_b", P(None, None, "tensor", None)),
    (r"layers/mlp/(gate|up)/lora_b", P(None, None, "tensor")),
    (r"layers/(attention/out|mlp/down)/lora_a", P(None, "tensor")),
    (r"layers/(attention/out|mlp/down)/lora_b", P()),
    (r"layers/attention/sinks", P(None, "tensor")),
    (r"layers/experts/router/(kernel|bias)", P()),
    (r"layers/experts/(gate|up|gate_up)/kernel", P(None, "tensor", "fsdp", None)),
    (r"layers/experts/down/kernel", P(None, "tensor", None, "fsdp")),
    (r"layers/experts/(gate|up|gate_up|down)/bias", P(None, "tensor", None)),
    (r".*(norm/(scale|bias)|(out|down)/bias)", P()),
    (r"(soft_prompt|projection|replay)(/.*)?", P()),
    (r"pending(/.*)?", P(ROWS)),
    (r".*/(rows|columns)", P()),
)
# Of grouped heads there may be fewer than devices along `tensor`: then each of these has all.
FEW_HEADS = r"layers/attention/(key|value)/(kernel|kernel_scale|bias|lora_b)"


def make_mesh(
    sizes: Mapping[str, int], devices: Sequence[Any] | None = None, *, name: str = "config.mesh"
) -> Mesh:
    """A mesh of `devices` (all); one of the sizes may be -1, "the rest".

    Devices of several slices (TPU) are joined along `data`, which crosses the slow network least
    often. Processes of one device each or of many, on GPUs or CPUs, come in their own order, so
    that neighbours along `tensor` and `fsdp` are those of one node.

    Raises:
      ConfigError: the sizes, called `name`, do not multiply to the number of devices, or `data` to
        slices.
    """
    devices = jax.devices() if devices is None else devices
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    shape = mesh_shape(sizes, len(devices), slices, name=name)
    if slices > 1:
        inside = (shape[0] // slices, *shape[1:])
        placed = mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1), devices)
    else:
        placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * 3)


def parse_sizes(text: str) -> dict[str, int]:
    """The sizes in a text such as "1,-1,1": data, fsdp, tensor.

    Raises:
      ConfigError: not three whole numbers of at least 1, one of which may be -1.
    """
    if not re.fullmatch(r"(0*[1-9]\d*|-1)(,(0*[1-9]\d*|-1)){2}", text) or text.count("-") > 1:
        raise ConfigError(
            f"--mesh: {text!r} is not data,fsdp,tensor, such as 1,-1,1: each at least 1, or once "
            "-1 for the rest of the devices"
        )
    return dict(zip(AXES, map(int, text.split(","))))


def mesh_shape(
    sizes: Mapping[str, int], devices: int, slices: int = 1, *, name: str = "config.mesh"
) -> tuple[int, ...]:
    """The sizes in the order of `AXES`, one that is -1 filled in.

    Raises:
      ConfigError: as `make_mesh`.
    """
    shape = [sizes[axis] for axis in AXES]
    asked = " x ".join(f"{axis}={sizes[axis]}" for axis in AXES)
    if shape.count(-1) == 1:
        known = math.prod(size for size in shape if size != -1)
        shape[shape.index(-1)] = devices // max(known, 1)
    if math.prod(shape) != devices or min(shape) < 1:
        raise ConfigError(f"{name}: {asked} does not make {devices} devices")
    if shape[0] % slices:
        raise ConfigError(
            f"{name}.data: {shape[0]} is not a multiple of the {slices} slices, between which "
            "only this axis goes"
        )
    return tuple(shape)


def spec(path: str) -> PartitionSpec:
    """The spec of the parameter at `path`. Raises ValueError where no rule covers it."""
    for pattern, found in RULES:
        if _matches(pattern, path):
            return found
    raise ValueError(f"no sharding rule covers the parameter {path!r}")


def _matches(pattern: str, path: str) -> bool:
    return re.search(rf"(^|/)({pattern})$", path) is not None


def parts_along(mesh: Any, path: str, axis: int) -> int:
    """How many parts a mesh cuts the parameter at `path` into, along one of its axes; 1 without a
    mesh."""
    axes = spec(path)
    cut_by = _names(axes[axis]) if mesh is not None and axis < len(axes) else ()
    return math.prod(mesh.shape[name] for name in cut_by)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A NamedSharding for every array of a parameter tree or of anything that contains one.

    Scalars and keys are replicated. Raises ConfigError where an axis does not divide a dimension.
    """

    def place(path, leaf):
        return NamedSharding(mesh, _fitting_spec(_name(path), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(place, tree)


def _fitting_spec(name: str, shape: tuple[int, ...], mesh: Any) -> PartitionSpec:
    """The spec of an array of this shape on this mesh."""
    if not shape:
        return P()
    # Codes lie as the array that they stand for, scales of their blocks where these divide.
    name, _, part = re.fullmatch(r"(.*?)(/(codes|scales))?", name).groups()
    kept = []
    for size, axis in zip(shape, spec(name)):
        parts = math.prod(mesh.shape[one] for one in _names(axis))
        if (size < parts and _matches(FEW_HEADS, name)) or (part == "scales" and size % parts):
            axis, parts = None, 1
        if size % parts:
            raise ConfigError(
                f"config.mesh: parameter {name} {shape}: {size} is not divisible by the {parts} "
                f"devices of mesh axis {axis!r}"
            )
        kept.append(axis)
    return P(*kept)


def constrain(x: jax.Array, *axes: Any) -> jax.Array:
    """Says where an array lies on the mesh in context; without one nothing is said.

    A mesh of other axes, or of axes that are not `AxisType.Auto`, is somebody else's: of the axes
    that it lacks nothing is said.

    Args:
      axes: for each dimension an axis, several (`ROWS`), or None: the dimension is not cut. Axes
        that do not divide it do not cut it either, but for `tensor`, which also cuts unevenly: a
        padded vocabulary, cut off at its last token, lies on the devices where it lay before.
    """
    mesh = jax.sharding.get_abstract_mesh()
    ours = _ours(mesh)
    if mesh.size < 2 or not ours.intersection(AXES):
        return x
    whole = None if ours.issuperset(AXES) else P.UNCONSTRAINED
    kept = []
    for size, axis in zip(x.shape, axes):
        names = tuple(name for name in _names(axis) if name in ours)
        devices = math.prod(mesh.shape[name] for name in names)
        cuts = size % devices == 0 or (names == ("tensor",) and size > devices)
        kept.append(names if names and cuts else whole)
    return jax.lax.with_sharding_constraint(x, P(*kept))


def mesh_is_external() -> bool:
    """Whether the mesh in context is somebody else's: where its rows lie, nobody here knows."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.size > 1 and not _ours(mesh).issuperset(AXES)


def _ours(mesh: Any) -> set[str]:
    axes = zip(mesh.axis_names, mesh.axis_types)
    return {name for name, kind in axes if kind == AxisType.Auto}


def _names(axis: Any) -> tuple[str, ...]:
    """The mesh axes in one element of a spec."""
    if axis is None:
        return ()
    return axis if isinstance(axis, tuple) else (axis,)


def axis_size(axis: Any) -> int:
    """Devices along an axis of the mesh in context, or along several; 1 without a mesh."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape.get(name, 1) for name in _names(axis))


def unshard_fsdp(params: Any) -> Any:
    """Parameters that are no longer cut along `fsdp`, for what reads all of them many times."""

    def gather(path, x):
        return constrain(x, *_without_fsdp(spec(_name(path))))

    return params if axis_size("fsdp") == 1 else jax.tree_util.tree_map_with_path(gather, params)


def unshard_kernel(kernel: jax.Array, path: Sequence[str]) -> jax.Array:
    """The kernel of a layer's projection at `path`, no longer cut along `fsdp`, for the product
    that reads it. Left the choice, XLA for TPUs sends parts of the kernel round and adds up parts
    of the product, which by its own estimate takes up to four times as long as one product."""
    axes = spec("/".join(("layers", *path[-2:], "kernel")))[1:]
    return constrain(kernel, *_without_fsdp(axes))


def _without_fsdp(axes: Sequence[Any]) -> list[Any]:
    return [None if axis == "fsdp" else axis for axis in axes]


def rows_sharding(mesh: Mesh, rows: int) -> NamedSharding:
    """Where `rows` rows of a batch lie: across `data` and `fsdp`, where these divide them."""
    divides = rows % math.prod(mesh.shape[name] for name in ROWS) == 0
    return NamedSharding(mesh, P(ROWS if divides else None))


def check_rows(what: str, rows: int, mesh: Any, *, parts: int | None = None) -> None:
    """Raises ConfigError where `rows`, in so many micro-batches if any, cannot be dealt out
    evenly."""
    devices = math.prod(mesh.shape[name] for name in ROWS)
    if rows % (parts or 1) or rows // (parts or 1) % devices:
        said = f"{rows} in {parts} micro-batches" if parts else rows
        raise ConfigError(
            f"{what}: {said} cannot be dealt out evenly to {devices} devices (data x fsdp)"
        )


def vocabulary_axis(size: int) -> str | None:
    """The axis that a vocabulary of so many tokens is cut along in a loss: `tensor`; on a TPU None
    where that does not divide it. XLA for TPUs gathers all logits of uneven parts, for every sum
    over them."""
    uneven = size % axis_size("tensor") != 0
    return None if uneven and platform() == "tpu" else "tensor"


def num_row_shards(rows: int) -> int:
    """Devices that so many rows are dealt out to; 1 where they do not divide."""
    return 1 if rows % axis_size(ROWS) else axis_size(ROWS)


def take_local_rows(x: Any, order: Any) -> Any:
    """Elements of `x` `[n, …]`, each device its own: order `[devices, k]` counts from the first of
    a device's n / devices. `[devices, k, …]`; nothing is sent."""
    x = x.reshape(order.shape[0], -1, *x.shape[1:])
    places = order.reshape(*order.shape, *(1,) * (x.ndim - 2))
    taken = jax.numpy.take_along_axis(x, places, axis=1)
    return constrain(taken, ROWS, *(None,) * (x.ndim - 1))


def place_rows(tree: Any) -> Any:
    """Host arrays `[B, …]`, the same on every process, on the mesh in context: each process hands
    over the rows that its devices hold. Without a mesh: on one device."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return jax.tree.map(jax.numpy.asarray, tree)

    def place(x):
        x = np.asarray(x)
        return jax.make_array_from_callback(
            x.shape, rows_sharding(mesh, x.shape[0]), lambda index: x[index]
        )

    return jax.tree.map(place, tree)


# The memory beside a device that it reads from without a copy by the host's programs.
HOST_MEMORY = "pinned_host"


def in_host_memory(places: Any) -> Any:
    """The same shardings, of arrays in the host's memory."""
    return jax.tree.map(lambda place: place.with_memory_kind(HOST_MEMORY), places)


def check_host_memory(what: str, mesh: Mesh) -> None:
    """Raises ConfigError where the devices of a mesh have no host memory, which `what` asks for."""
    device = mesh.devices.flat[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if HOST_MEMORY not in kinds:
        raise ConfigError(
            f"{what}: a {device.device_kind} has no memory {HOST_MEMORY!r} (it has "
            f"{', '.join(kinds)}); expected False"
        )


def to_device(tree: Any) -> Any:
    """Arrays in a device's own memory, for what is traced."""
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device), tree)


def to_host(tree: Any) -> Any:
    """Arrays as NumPy, whole, on every process, wherever their parts are."""
    return jax.device_get(jax.tree.map(_whole, tree))


def _whole(x: Any) -> Any:
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
        return x
    return _replicate(x, NamedSharding(x.sharding.mesh, P()))


@functools.partial(jax.jit, static_argnums=1)
def _replicate(x: jax.Array, everywhere: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, everywhere)


def platform() -> str:
    """What the mesh in context consists of, also one of described chips that nobody has: "tpu",
    "gpu" or "cpu"; without a mesh, what JAX computes on."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.default_backend()
    # By its kind, "cpu", "TPU v5 lite" or "NVIDIA H100": JAX before 0.10.2 says no platform here.
    kind = mesh.abstract_device.device_kind
    return {"cpu": "cpu", "TPU": "tpu"}.get(kind[:3], "gpu")


def compute_capability() -> float:
    """NVIDIA's number of what a GPU of this process can do, 8.0 for Ampere; 0 without one."""
    said = getattr(jax.local_devices()[0], "compute_capability", None)
    try:
        return float(said or 0)
    except ValueError:  # AMD's, such as gfx942
        return 0.0


def _name(path: Sequence[Any]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
