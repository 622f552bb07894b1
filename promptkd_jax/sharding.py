"""The mesh, and one table that says where every parameter lies on it.

Axes: `data` (rows), `fsdp` (rows too, and parameters cut along their width), `tensor` (heads,
feed-forward and vocabulary). One device is a 1 x 1 x 1 mesh and the same code.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from promptkd_jax.config import ConfigError

P = PartitionSpec
AXES = ("data", "fsdp", "tensor")
ROWS = P(("data", "fsdp"))

# (regular expression on a parameter's path, spec); the first match counts. Layers are stacked along
# a leading axis. Optimizer moments have the paths of their parameters.
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"embed/embedding|lm_head", P("tensor", "fsdp")),
    (r"positions/embedding", P(None, "fsdp")),
    (r"layers/attention/(query|key|value)/kernel", P(None, "fsdp", "tensor", None)),
    (r"layers/attention/(query|key|value)/bias", P(None, "tensor", None)),
    (r"layers/attention/out/kernel", P(None, "tensor", None, "fsdp")),
    (r"layers/mlp/(up|gate)/kernel", P(None, "fsdp", "tensor")),
    (r"layers/mlp/(up|gate)/bias", P(None, "tensor")),
    (r"layers/mlp/down/kernel", P(None, "tensor", "fsdp")),
    (r".*(norm/(scale|bias)|(out|down)/bias)", P()),
    (r"(soft_prompt|projection|replay)(/.*)?", P()),
)


def make_mesh(sizes: Mapping[str, int]) -> Mesh:
    """A mesh of all devices; one of the sizes may be -1, "the rest".

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    shape = [sizes[axis] for axis in AXES]
    devices = jax.device_count()
    if shape.count(-1) == 1:
        known = int(np.prod([size for size in shape if size != -1]))
        shape[shape.index(-1)] = devices // max(known, 1)
    if int(np.prod(shape)) != devices or min(shape) < 1:
        asked = " x ".join(f"{axis}={sizes[axis]}" for axis in AXES)
        raise ConfigError(f"config.mesh: {asked} does not make {devices} devices")
    return jax.make_mesh(tuple(shape), AXES, axis_types=(AxisType.Auto,) * 3)


def spec(path: str) -> PartitionSpec:
    """The spec of the parameter at `path`. Raises ValueError where no rule covers it."""
    for pattern, found in RULES:
        if re.search(rf"(^|/)({pattern})$", path):
            return found
    raise ValueError(f"no sharding rule covers the parameter {path!r}")


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A NamedSharding for every array of a parameter tree or of anything that contains one.

    Scalars and keys are replicated. Raises ValueError where an axis does not divide a dimension.
    """

    def place(path, leaf):
        if leaf.ndim == 0:
            return NamedSharding(mesh, P())
        name = "/".join(str(_key(part)) for part in path)
        found = spec(name)
        for size, axes in zip(leaf.shape, found):
            parts = mesh.shape[axes] if axes is not None else 1
            if size % parts:
                raise ConfigError(
                    f"config.mesh: parameter {name} {leaf.shape}: {size} is not divisible by the "
                    f"{parts} devices of mesh axis {axes!r}"
                )
        return NamedSharding(mesh, found)

    return jax.tree_util.tree_map_with_path(place, tree)


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """Where the rows of a batch lie: across `data` and `fsdp`."""
    return NamedSharding(mesh, ROWS)


def _key(part: Any) -> Any:
    """The name in one step of a tree path."""
    for attribute in ("key", "name", "idx"):
        if hasattr(part, attribute):
            return getattr(part, attribute)
    raise TypeError(f"unknown step {part!r} in a tree path")
