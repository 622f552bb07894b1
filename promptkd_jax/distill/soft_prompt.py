"""First values of the soft prompt, M embeddings `[M, D]` in front of the frozen teacher.

M soft-prompt tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from promptkd_jax.models.decoder import Decoder
from promptkd_jax.models.language_model import LanguageModel
from promptkd_jax.models.layers.gated_prefix import GatedPrefix

if TYPE_CHECKING:
    from jaxtyping import Array, Float

INITS = {
    "text": "at the embeddings of `text`, repeated and cut",
    "pad": "at that of PAD, or of EOS where there is none, in all places",
    "vocabulary": "at those of tokens that are drawn",
    "random": "at normal numbers",
    "examples": "at means over demonstrations, see in_context",
}


def init_soft_prompt(
    model: Decoder | LanguageModel, params: Any, token_ids: Sequence[int], length: int
) -> Float[Array, "M D"]:
    """The embeddings of `token_ids` in a model, repeated and cut to `length`, `[M, D]` float32.

    PromptKD starts from "Suppose you are a student." (7 GPT-2 tokens); a random start collapses
    (paper, figure 4).

    Raises:
      ValueError: no token ids.
    """
    if not len(token_ids):
        raise ValueError("a soft prompt needs at least one token to start from")
    repeated = np.resize(np.asarray(token_ids, np.int32), length)
    return model.input_embeddings(params, repeated).astype(jnp.float32)


def pooled_soft_prompt(
    model: Decoder | LanguageModel, params: Any, token_ids: Sequence[int], length: int
) -> Float[Array, "M D"]:
    """A text of any length in `length` vectors: means of its embeddings, `[M, D]` float32.

    The text is cut into M stretches of equal size; one that is shorter than M is repeated first.

    Raises:
      ValueError: no token ids.
    """
    # "abc" for 2 vectors: means of "ab" and "c"; for 7: of "a", "b", "c", "a", … one by one.
    repeated = max(length, len(token_ids))
    embeddings = init_soft_prompt(model, params, token_ids, repeated)
    return jnp.stack([jnp.mean(part, axis=0) for part in jnp.array_split(embeddings, length)])


def random_soft_prompt(key: jax.Array, length: int, width: int) -> Float[Array, "M D"]:
    """Standard normal numbers, `[M, D]` float32: PEFT's RANDOM. Far larger than embeddings are."""
    return jax.random.normal(key, (length, width), jnp.float32)


def zero_gated(model: Decoder, vectors: Float[Array, "M D"]) -> GatedPrefix:
    """A soft prompt behind gates of 0, which leaves the model as it is, see `GatedPrefix`.

    Only the gates have a gradient then, and the vectors as soon as a gate is above 0: they must not
    be 0 as well.
    """
    shape = model.config.num_layers, model.config.num_heads
    return GatedPrefix(vectors, jnp.zeros(shape, jnp.float32))
