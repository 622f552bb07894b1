"""The published learning-rate schedules, and AdamW with clipping and a decay mask."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

SCHEDULES = ("constant", "cosine", "noam")


def schedule(
    style: str,
    learning_rate: float,
    *,
    total_steps: int,
    warmup_steps: int = 0,
    lr_min: float = 1e-7,
) -> optax.Schedule:
    """The learning rate at update 0, 1, … as in the published code.

    All warm up linearly from 0 over `warmup_steps` (the first update of a warm-up has rate 0). Then
    "constant" stays; "cosine" falls to `lr_min` at `total_steps` (and follows the cosine beyond);
    "noam" falls with the square root of the remaining share to `lr_min`, where it stays.
    """
    span = learning_rate - lr_min

    def ramp(step):
        return jnp.minimum(1.0, step / warmup_steps) if warmup_steps else 1.0

    def cosine(step):
        return ramp(step) * (lr_min + span * 0.5 * (1 + jnp.cos(math.pi * step / total_steps)))

    def noam(step):
        done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        decayed = lr_min + span * jnp.sqrt(jnp.clip(1 - done, 0.0, 1.0))
        return jnp.where(step < warmup_steps, learning_rate * ramp(step), decayed)

    styles = {"constant": lambda step: learning_rate * ramp(step), "cosine": cosine, "noam": noam}
    return styles[style]


def adamw(
    learning_rate: optax.Schedule,
    *,
    weight_decay: float,
    clip: float,
    decay_mask: Any = None,
    b2: float = 0.999,
) -> optax.GradientTransformation:
    """Clip the global norm to `clip`, then AdamW (0.9, b2, 1e-8), decoupled decay."""
    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.adamw(learning_rate, b2=b2, weight_decay=weight_decay, mask=decay_mask),
    )


def decay_mask(params: Any, *, decay_norms: bool = False) -> Any:
    """True where weight decay applies: matrices and embeddings, not biases, not norm scales.

    The published code lists its exceptions by GPT-2's names, so that the norm scales of other
    families are decayed: `decay_norms` says so.
    """

    def decayed(path, _):
        name = path[-1].key
        return name != "bias" and (decay_norms or name != "scale")

    return jax.tree_util.tree_map_with_path(decayed, params)
