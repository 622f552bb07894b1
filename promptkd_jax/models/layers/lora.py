"""Low-rank adapters (LoRA): a frozen model of which a change of small rank is trained.

    y = x W + s (x A) B        A [in, r], B [r, out], s = alpha / r        Hu et al. 2021,
                               s = alpha / sqrt(r) with rsLoRA             arXiv 2106.09685,
                                                                           arXiv 2312.03732

A and B are parameters beside the kernel W that they change, stacked like it along the layers:
`layers/attention/query/lora_a` [L, D, r] and `lora_b` [L, r, N, H]. A model of which they are not
there computes y = x W: to take them off is all that it takes to have the frozen model back.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from promptkd_jax.models.config import LoRA

A, B = "lora_a", "lora_b"
MODULES = {  # that an adapter can change, by their paths: number of axes of the input
    **dict.fromkeys(("attention/query", "attention/key", "attention/value"), 1),
    "attention/out": 2,
    **dict.fromkeys(("mlp/gate", "mlp/up", "mlp/down"), 1),
}
_FIRST_PLACE = 3  # of dropout in a layer, behind those of `attention.keep_mask`


def split(params: Mapping[str, Any]) -> tuple[Any, Any]:
    """(the frozen model, the adapter): two trees of parameters, as `join` puts them together."""
    flat = traverse_util.flatten_dict(params)
    adapter = {path: x for path, x in flat.items() if path[-1] in (A, B)}
    frozen = {path: x for path, x in flat.items() if path not in adapter}
    return traverse_util.unflatten_dict(frozen), traverse_util.unflatten_dict(adapter)


def join(frozen: Any, trained: Any) -> Any:
    """One tree with the leaves of both, of which no path is a leaf of one and in the other."""
    flat = traverse_util.flatten_dict(frozen) | traverse_util.flatten_dict(trained)
    return traverse_util.unflatten_dict(flat)


def adapter_shapes(params: Any, lora: LoRA) -> Any:
    """Shapes of an adapter, in float32, for a model whose parameters or shapes are given."""
    flat, shapes = traverse_util.flatten_dict(params, sep="/"), {}
    for module in lora.modules:
        # A kernel is [L, *in, *out]: A takes its inputs, and B gives its outputs.
        inputs, path = MODULES[module], f"layers/{module}"
        layers, *axes = flat[f"{path}/kernel"].shape
        shapes[f"{path}/{A}"] = (layers, *axes[:inputs], lora.rank)
        shapes[f"{path}/{B}"] = (layers, lora.rank, *axes[inputs:])
    structs = {path: jax.ShapeDtypeStruct(x, jnp.float32) for path, x in shapes.items()}
    return traverse_util.unflatten_dict(structs, sep="/")


def init_adapter(params: Any, lora: LoRA, key: jax.Array) -> Any:
    """A new adapter: A uniform within ±1 / sqrt(in), as PEFT has it, and B 0, so that it changes
    nothing.

    Args:
      params: of the frozen model, or their shapes, without padding.
    """
    shapes = traverse_util.flatten_dict(adapter_shapes(params, lora), sep="/")
    # In the order of paths: a matrix's numbers do not depend on how the tree is built.
    adapter = {}
    for place, (path, x) in enumerate(sorted(shapes.items())):
        if path.endswith(B):
            adapter[path] = jnp.zeros(x.shape, x.dtype)
            continue
        bound = np.prod(x.shape[1:-1]) ** -0.5  # of A [L, *in, r]: all its inputs
        key_of_path = jax.random.fold_in(key, place)
        adapter[path] = jax.random.uniform(key_of_path, x.shape, x.dtype, -bound, bound)
    return traverse_util.unflatten_dict(adapter, sep="/")


def merged(kernel: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float) -> np.ndarray:
    """W + s A B of one layer, computed in float32, in the dtype of W."""
    change = np.tensordot(np.float32(a), np.float32(b), axes=1)
    return (np.float32(kernel) + np.float32(scale) * change).astype(kernel.dtype)


def without_changes(policy: Callable[..., Any], lora: LoRA | None) -> Callable[..., Any]:
    """A policy of `jax.checkpoint` that saves what `policy` does, but not the changes (x A) B: each
    is as large as the product with W beside it, and made again of r numbers."""

    def saves(primitive, *inputs, **parameters):
        # The second product of a change is the one that sums over r.
        if primitive is jax.lax.dot_general_p:
            over, _ = parameters["dimension_numbers"][0]
            if [inputs[0].shape[axis] for axis in over] == [lora.rank]:
                return False
        return policy(primitive, *inputs, **parameters)

    return policy if lora is None else saves


def keep_inputs(keys: jax.Array, rate: float, shape: tuple[int, ...], module: str) -> jax.Array:
    """Factors of dropout `[B, T, *in]` for the input of an adapter: 0 for a share of `rate`, else
    1 / (1 - rate). Those of a column depend on its number, and on no padding behind heads or units.

    Args:
      keys: `[B]`, of the rows in a layer.
      shape: `(T, *in)`.
      module: the last name of its path.
    """
    places = [path.rsplit("/", 1)[1] for path in MODULES]
    place = _FIRST_PLACE + places.index(module)

    def of_column(key, column):
        key = jax.random.fold_in(jax.random.fold_in(key, place), column)
        return jax.random.bernoulli(key, 1 - rate, shape[1:])

    # [B] keys and [T] columns -> [B, T, *in].
    of_row = jax.vmap(of_column, (None, 0))
    kept = jax.vmap(of_row, (0, None))(keys, jnp.arange(shape[0]))
    return kept.astype(jnp.float32) / (1 - rate)
