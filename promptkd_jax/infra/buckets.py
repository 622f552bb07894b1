"""Buckets: a few widths that a function is compiled for, so that short rows cost less."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def run_in_smallest_bucket(
    function: Callable[[int], Any], lengths: jax.Array, columns: int, number: int
) -> Any:
    """Calls `function(width)` with the smallest of `number` even widths up to `columns` that holds
    the longest row; all widths are compiled.

    Args:
      lengths: `[B]`, of rows that are at most `columns` long.
    """
    if number == 1:
        return function(columns)
    widths = [-(-columns * k // number) for k in range(1, number + 1)]
    branches = [functools.partial(function, width) for width in widths]
    return jax.lax.switch(jnp.searchsorted(jnp.array(widths), jnp.max(lengths)), branches)
