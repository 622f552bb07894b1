"""Rotary positions: how fast the pairs of a head turn, and how queries and keys are turned.

B rows, T columns, H head width, R its width that turns.
"""

import math

import jax
import jax.numpy as jnp

from promptkd_jax.models.config import Rope, RopeScaling

# Of RopeScaling.kind, what becomes of the frequencies, radians per position.
KINDS = {
    "linear": "all divided by the factor",
    "dynamic": "those of a larger theta, the larger the longer the rows are beyond max_positions",
    "llama3": "divided by the factor where they turn seldom within the original length",
    "yarn": "the same, between two pairs; Peng et al. 2023, arXiv 2309.00071",
    "longrope": "divided by factors of their own; Ding et al. 2024, arXiv 2402.13753",
}


def rotate(
    rope: Rope, x: jax.Array, positions: jax.Array, columns: int, max_positions: int
) -> jax.Array:
    """Rotary embedding of `[B, T, heads, H]` at `positions` `[B or 1, T]`, halves layout.

    Args:
      columns: that a row has room for, and max_positions: of the model; for the kinds that depend
        on the length of rows. Of a rollout they are all that may be written, so that it sees what
        the training on its rows sees.
    """
    # The pair (x_i, x_{i + R/2}) of a head is a point of the plane, turned by position times
    # frequency i: the product of a query and a key then depends on how far apart they stand alone.
    # In float32: at position 8,000 bfloat16 would be off by whole turns.
    width = x.shape[-1]
    turned = rotary_width(rope, width)
    frequencies = rotary_frequencies(rope, width, columns, max_positions)
    angles = positions[..., None] * frequencies  # [B, T, R/2]
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    if rope.scaling is not None and (factor := rope.scaling.attention_factor) != 1.0:
        cos, sin = factor * cos, factor * sin
    # Hugging Face's layout: pairs are (i, i + R/2), not neighbours.
    first, second = jnp.split(x[..., :turned].astype(jnp.float32), 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    rotated = jnp.concatenate(rotated, axis=-1).astype(x.dtype)
    return rotated if turned == width else jnp.concatenate([rotated, x[..., turned:]], axis=-1)


def rotary_width(rope: Rope, head_dim: int) -> int:
    """R, the width of a head that turns."""
    return int(head_dim * rope.share)


def rotary_frequencies(rope: Rope, head_dim: int, columns: int, max_positions: int) -> jax.Array:
    """Radians per position, `[R/2]`, as the scaling says; see `rotate`."""
    width = rotary_width(rope, head_dim)
    exponent = jnp.arange(0, width, 2, dtype=jnp.float32) / width
    frequency = rope.theta**-exponent
    scaling = rope.scaling
    if scaling is None:
        return frequency
    if scaling.kind == "linear":
        return frequency / scaling.factor
    if scaling.kind == "longrope":
        beyond = columns > scaling.original_max_position
        return frequency / jnp.array(scaling.long_factors if beyond else scaling.short_factors)
    if scaling.kind == "dynamic":
        # NTK-aware: theta grows so that the slowest pair turns as if divided by the factor, and the
        # fastest as before.
        stretched = scaling.factor * max(columns, max_positions) / max_positions
        base = rope.theta * (stretched - (scaling.factor - 1)) ** (width / (width - 2))
        return base**-exponent
    if scaling.kind == "llama3":
        # What turns fewer than low_freq_factor times within the original length is stretched by the
        # factor, what turns more than high_freq_factor times is kept, between them interpolated.
        turns = scaling.original_max_position * frequency / (2 * jnp.pi)
        kept = (turns - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
    else:
        kept = _kept_by_yarn(scaling, rope.theta, width)
    kept = jnp.clip(kept, 0.0, 1.0)
    return frequency * (kept + (1 - kept) / scaling.factor)


def _kept_by_yarn(scaling: RopeScaling, theta: float, width: int) -> jax.Array:
    """How much of each frequency is kept: all of those before the pair that turns beta_fast times
    within the original length, none behind that of beta_slow."""

    # Pair i turns theta^(-2 i / R) radians per position: solved for i, of so many turns in all.
    def pair(turns: float) -> float:
        return (
            width
            * math.log(scaling.original_max_position / (turns * 2 * math.pi))
            / (2 * math.log(theta))
        )

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    high = high + 0.001 if low == high else high
    return 1 - jnp.clip((jnp.arange(width // 2, dtype=jnp.float32) - low) / (high - low), 0.0, 1.0)
