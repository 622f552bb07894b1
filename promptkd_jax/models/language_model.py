"""A language model as functions of its parameters, for models that are no `Decoder`.

Losses, train steps and the sampler ask a model for hidden states and its head, not for logits, and
never how it is made. `Decoder` has these methods; `LanguageModel` makes them of functions from any
library: plain JAX, flax.linen, Equinox, … `LazyLogits` is the one place where hidden states and a
head become logits.

B rows, T columns, M prefix columns, X prompt columns, S columns of a rollout, D width,
V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import struct

from promptkd_jax.infra.sharding import ROWS, axis_size, constrain, platform, vocabulary_axis
from promptkd_jax.models.layers.gated_prefix import GatedPrefix
from promptkd_jax.models.layers.projection import in_matrix_units, product_of_few_rows

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


FEW_ROWS = 32  # up to which `product_of_few_rows` is the faster one


@struct.dataclass
class LazyLogits:
    """Logits not yet multiplied out: hidden `[B, T, D]` (or `[B, D]`) and head `[V, D]`.

    Attributes:
      soft_cap: c, where the product z becomes c tanh(z / c) (Gemma 2, arXiv 2408.00118, section
        2); None: it stays as it is. Static under `jax.jit`.
    """

    hidden: Float[Array, "B T D"]
    head: Float[Array, "V D"]
    soft_cap: float | None = struct.field(pytree_node=False, default=None)

    def logits(self) -> Float[Array, "B T V"]:
        """hidden @ head^T, capped, in float32: `[B, T, V]`, or `[B, V]`."""
        head = self.head.astype(self.hidden.dtype)  # operands in half precision, sums in float32
        # Rounded to half precision, logits would be off by more than a soft prompt moves them, and
        # would tie, where top-k keeps ties.
        if platform() == "cpu" and math.prod(self.hidden.shape[:-1]) <= FEW_ROWS:
            logits = product_of_few_rows(head, self.hidden, dtype=jnp.float32)
        else:
            multiply = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
            logits = in_matrix_units(lambda h: multiply("...d,vd->...v", h, head), self.hidden)
        # Changes nothing, but XLA's CPU compiler does not make one kernel of the product and what
        # reads it, which for some shapes takes three times as long as the two.
        logits = jax.lax.reduce_precision(logits, exponent_bits=8, mantissa_bits=23)
        if self.soft_cap is not None:
            logits = self.soft_cap * jnp.tanh(logits / self.soft_cap)
        uneven = vocabulary_axis(logits.shape[-1]) is None
        if uneven and logits.ndim == 3 and logits.shape[1] % axis_size("tensor") == 0:
            return constrain(logits, ROWS, "tensor", None)  # positions are dealt out in its place
        return constrain(logits, ROWS, *(None,) * (logits.ndim - 2), "tensor")


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A causal language model, made of functions; hashable, a static argument of `jax.jit`.

    `params` is any pytree of arrays. A position must not see the positions behind it: rows begin at
    column 0, and what stands behind a row's end has no meaning.

    Rollouts run all columns through `hidden_states` for every new token, since a function of tokens
    has no key/value cache. `Decoder` has one. Losses on hidden states of inner layers need
    `Decoder`.

    Attributes:
      hidden_states: `(params, tokens [B, T], prefix [M, D] or None) -> [B, T, D]`, the states that
        the head is multiplied with, without the columns of the prefix, which is a soft prompt, or
        demonstrations, in front of every row. A model that is never seen behind a prefix may
        ignore it.
      output_head: `(params) -> [V, D]`; tied embeddings are one.
      input_embeddings: `(params, tokens [...]) -> [..., D]`; needed where a teacher is seen
        "in_context".
      logit_soft_cap: as `LazyLogits.soft_cap`.
    """

    hidden_states: Callable[
        [Any, Int[Array, "B T"], Float[Array, "M D"] | None], Float[Array, "B T D"]
    ]
    output_head: Callable[[Any], Float[Array, "V D"]]
    input_embeddings: Callable[[Any, Int[Array, "*B"]], Float[Array, "*B D"]] | None = None
    logit_soft_cap: float | None = None

    def for_sampling(self, params: Any) -> Any:
        """The parameters as a rollout reads them: as they are."""
        return params

    def prefill(
        self,
        params: Any,
        tokens: jax.Array,
        lengths: jax.Array,
        prefix: jax.Array | None,
        prompt_columns: int,
        new_columns: int,
    ) -> tuple[jax.Array, jax.Array]:
        """Runs prompts `[B, X]`: their hidden states `[B, X, D]`, and in place of a cache the
        tokens themselves, `[B, S]`, with places for all that are still to be written."""
        refuse_gates(prefix)
        columns = prompt_columns + new_columns
        written = jnp.pad(tokens, ((0, 0), (0, columns - tokens.shape[1])))
        return self.hidden_states(params, tokens, prefix), written

    def decode(
        self,
        params: Any,
        tokens: jax.Array,
        prefix: jax.Array | None,
        column: jax.Array,
        written: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """Runs one token a row, `[B]`, in `column` `[B]`, M not counted: their hidden states
        `[B, D]`, and `written` with these tokens in it."""
        rows = jnp.arange(tokens.shape[0])
        written = written.at[rows, column].set(tokens, mode="drop")
        return self.hidden_states(params, written, prefix)[rows, column], written


def refuse_gates(prefix: Any) -> None:
    """Raises ValueError of a `GatedPrefix`, for a model that is made of functions."""
    if isinstance(prefix, GatedPrefix):
        raise ValueError(
            "prefix: a GatedPrefix, but the model is a LanguageModel, whose attention has no "
            "gates; expected a Decoder, or the prefix's vectors [M, D]"
        )
