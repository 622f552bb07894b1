"""How the teacher is seen: as it is, or behind the soft prompt."""

from typing import Any

import jax

from promptkd_jax.losses import Linear
from promptkd_jax.models.decoder import Decoder, head
from promptkd_jax.targets import Batch, Responses, gather


def view(
    decoder: Decoder,
    params: Any,
    batch: Batch,
    where: Responses,
    vocab_size: int,
    soft_prompt: jax.Array | None = None,
) -> Linear:
    """A model's next-token distributions at the response positions, not yet multiplied out.

    Args:
      soft_prompt: `[M, D]` in front of every row, or None for the model as it is. The hidden
        states are aligned with the tokens either way.
      vocab_size: the vocabulary that teacher and student share; padding beyond it is cut off.

    Returns:
      Linear of hidden `[B, R, D]` and head `[vocab_size, D]`.
    """
    hidden = decoder.apply({"params": params}, batch.tokens, prefix=soft_prompt)
    return Linear(gather(hidden, where), head(params)[:vocab_size])
