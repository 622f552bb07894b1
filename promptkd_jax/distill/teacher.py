"""Views of a model: plain, behind a prefix (the soft prompt, or demonstrations), or its top-k
log-probabilities, written down beforehand. A view gives distributions and states of inner layers.

B rows, T columns, M prefix columns, R response positions, D width, N heads, K key/value heads,
H head width, V vocabulary, L layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from promptkd_jax.data.batch import Batch, Responses, gather, responses
from promptkd_jax.data.top_k import TopK
from promptkd_jax.distill.losses import hidden_loss
from promptkd_jax.distill.losses.transport import TokenKernel
from promptkd_jax.distill.methods.method import Method
from promptkd_jax.models.config import Dropout
from promptkd_jax.models.decoder import Decoder
from promptkd_jax.models.language_model import LanguageModel, LazyLogits, refuse_gates
from promptkd_jax.models.layers.gated_prefix import GatedPrefix
from promptkd_jax.models.layers.lora import join
from promptkd_jax.models.sampler import SamplingModel, row_keys

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Key


def lazy_logits(
    model: Decoder | LanguageModel,
    params: Any,
    batch: Batch,
    where: Responses,
    vocab_size: int,
    prefix: Float[Array, "M D"] | GatedPrefix | None = None,
    dropout_keys: Key[Array, " B"] | None = None,
) -> LazyLogits:
    """Returns a model's next-token distributions at the response positions, not yet multiplied out.

    Args:
      vocab_size: V, of the tokens that teacher and student share; padding beyond it is cut off.
      prefix: `[M, D]` embeddings in front of every row, or None for the plain model. The hidden
        states are aligned with the tokens either way. The embeddings of a text's tokens put that
        text in front: see `Decoder.input_embeddings`.
      dropout_keys: of the rows, for the dropout of a `Decoder`; None: none.

    Returns:
      LazyLogits of hidden `[B, R, D]` and head `[V, D]`.
    """
    # [B, T, D] -> [B, R, D]: the head is multiplied at response positions alone.
    # The functions of a `LanguageModel` take neither keys nor segments.
    more = {"dropout_keys": dropout_keys, "segment_ids": batch.segment_ids}
    more = {name: x for name, x in more.items() if x is not None}
    if batch.segment_ids is not None and not isinstance(model, Decoder):
        raise ValueError(
            f"segment_ids: packed rows, and a {type(model).__name__}, whose functions cannot keep "
            "segments apart; expected a Decoder, or rows that are not packed"
        )
    if not isinstance(model, Decoder):
        refuse_gates(prefix)
    hidden = gather(model.hidden_states(params, batch.tokens, prefix, **more), where)
    return LazyLogits(hidden, model.output_head(params)[:vocab_size], model.logit_soft_cap)


def lazy_logits_and_states(
    model: Decoder | LanguageModel,
    params: Any,
    batch: Batch,
    where: Responses,
    vocab_size: int,
    prefix: Float[Array, "M D"] | GatedPrefix | None = None,
    taps: Sequence[hidden_loss.Tap] = (),
    dropout_keys: Key[Array, " B"] | None = None,
) -> tuple[LazyLogits, hidden_loss.States]:
    """Returns the distributions of `lazy_logits`, and states of inner layers of the same forward.

    A gradient flows through both. Each kind of state that is tapped costs the memory of that state
    in all layers, however few are wanted.

    Args:
      taps: states to return, of layers counted from 0, see `hidden_loss.Tap`; only a
        `Decoder` has them.
      dropout_keys: as for `lazy_logits`.

    Returns:
      The LazyLogits of `lazy_logits`; and by tap, at the response positions, "hidden" `[B, R, D]`,
      or at all columns, before rotary positions, "queries" `[B, T, N, H]`, "keys" and "values"
      `[B, T, K, H]`, and the scores of a router, `[B, T, E]`.
    """
    if not taps:
        return lazy_logits(model, params, batch, where, vocab_size, prefix, dropout_keys), {}
    # flax keeps what layers `sow` only if the collection is mutable.
    how = {"prefix": prefix, "dropout_keys": dropout_keys, "segment_ids": batch.segment_ids}
    last, sown = model.apply({"params": params}, batch.tokens, **how, mutable=["intermediates"])
    last, layers, states = gather(last, where), sown["intermediates"]["layers"], {}
    for name, layer in taps:
        # The last layer's are those behind the final norm, which the head sees, if it sees all D.
        is_last = layer == model.config.num_layers - 1 and not model.config.projected_width
        if name == "hidden" and is_last:
            states[name, layer] = last
            continue
        # `sow` appends to a tuple, which has one entry after one forward: all layers, stacked
        # [L, B, M + T, …]. The M columns of a prefix are cut off.
        module = {"hidden": "", hidden_loss.ROUTER: "experts"}.get(name, "attention")
        (stacked,) = (layers[module] if module else layers)[name]
        state = stacked[layer, :, -batch.tokens.shape[1] :]
        states[name, layer] = gather(state, where) if name == "hidden" else state
    head = model.output_head(params)[:vocab_size]
    return LazyLogits(last, head, model.logit_soft_cap), states


# Folded into a step's key for dropout; the rows of a rollout use 0, 1, …, `targets` the last.
_DROPOUT = np.uint32(2**32 - 2)


class DropoutKeys(NamedTuple):
    """A key of each row that the student learns from, `[B]`, and of the corpus beside them."""

    rows: Key[Array, " B"]
    corpus: Key[Array, " B"] | None


@dataclasses.dataclass(frozen=True)
class Models:
    """The two models; `teacher` is None where no teacher is looked at."""

    student: Decoder | LanguageModel
    teacher: Decoder | LanguageModel | None = None


# A forward pass of the student at response positions, and its pullback: (gradient for the
# LazyLogits, gradient for the states) -> (gradient for the parameters,), as `jax.vjp` returns it.
StudentForward = tuple[tuple[LazyLogits, hidden_loss.States], Callable]

# The same of the prompted teacher: gradient for the hidden states [B, R, D] -> (gradient for P,).
PromptedForward = tuple[tuple[LazyLogits, hidden_loss.States], Callable]

# The forward pass of the teacher in each view:
#
#     plain, online    hidden states of the rows alone, [B, T, D]
#     prompted         of [P; row], P the soft prompt [M, D], with the M columns cut off again
#     in_context       the same with the embeddings of demonstrations as P
#     cached           nothing: its top-k log-probabilities came with the batch
#
# A view gives `LazyLogits` or a `TopK`; whatever is made of these does not know which view it was.


@dataclasses.dataclass(frozen=True)
class StepModels:
    """The views that one step of `method` has of `models`, at the response positions of its rows.

    `frozen_teacher` are the parameters of a teacher that does not learn, `frozen_student` those of
    a student of which an adapter alone does, see `layers.lora`; `token_kernel` is that of the
    teacher's tokens, for "transport". `params` below are the groups of a train state.
    """

    method: Method
    models: Models
    frozen_teacher: Any
    frozen_student: Any = None
    token_kernel: TokenKernel | None = None

    def where(self, rows: Batch) -> Responses:
        """The response positions of `rows`."""
        return responses(rows, self.method.response_capacity)

    def teacher_params(self, params: Mapping[str, Any]) -> Any:
        """The teacher's parameters, trained or frozen."""
        return params["teacher"] if self.method.teacher_view == "online" else self.frozen_teacher

    def student_params(self, trained: Any) -> Any:
        """The student's parameters: those that are trained, beside frozen ones if there are any."""
        return trained if self.frozen_student is None else join(self.frozen_student, trained)

    def teacher(
        self,
        params: Mapping[str, Any],
        rows: Batch,
        soft_prompt: Float[Array, "M D"] | GatedPrefix | None = None,
        plain_rows: Bool[Array, " B"] | None = None,
    ) -> tuple[LazyLogits | TopK, hidden_loss.States]:
        """The teacher's distributions, and the states that the method's hidden terms look at.

        Args:
          soft_prompt: in front of all rows; None: of none.
          plain_rows: `[B]`, True for rows that it is not in front of after all; None: for none.
        """
        # Top-k log-probabilities that were read from disk travel in the batch.
        if self.method.teacher_view == "cached":
            if rows.cached is None:
                raise ValueError("teacher_view = 'cached' needs batches with their `cached` field")
            return rows.cached, {}
        teacher = self.teacher_params(params)
        prefix = soft_prompt
        if self.method.teacher_view == "in_context":
            # [M, D]: demonstrations are a prefix like the soft prompt, but not trained.
            if self.models.teacher.input_embeddings is None:
                raise ValueError(
                    "teacher_view = 'in_context' needs LanguageModel(…, input_embeddings=…) as the "
                    "teacher, for the demonstrations in front of its rows"
                )
            demonstrations = np.asarray(self.method.demonstrations, np.int32)
            prefix = self.models.teacher.input_embeddings(teacher, demonstrations)
        if plain_rows is None:
            return self._see(self.models.teacher, teacher, rows, prefix, self._taps[1])
        return self._see_either(teacher, rows, prefix, plain_rows)

    def _see_either(
        self,
        teacher: Any,
        rows: Batch,
        soft_prompt: Float[Array, "M D"] | GatedPrefix,
        plain_rows: Any,
    ):
        """The plain teacher of `plain_rows` and the prompted one of others, each run only where a
        row wants it."""

        def see(prefix):  # without the head, which a `cond` would copy
            seen, states = self._see(self.models.teacher, teacher, rows, prefix, self._taps[1])
            return seen.hidden, states

        # Both branches of a `cond` give the same shapes, which do not depend on the prefix.
        nothing = jax.tree.map(
            lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(lambda: see(None))
        )
        prompted, plain = (
            jax.lax.cond(jnp.any(own), lambda prefix=prefix: see(prefix), lambda: nothing)
            for own, prefix in ((~plain_rows, soft_prompt), (plain_rows, None))
        )

        def choose(plain, prompted):
            return jnp.where(plain_rows.reshape(-1, *(1,) * (plain.ndim - 1)), plain, prompted)

        hidden, states = jax.tree.map(choose, plain, prompted)
        head = self.models.teacher.output_head(teacher)[: self.method.vocab_size]
        return LazyLogits(hidden, head, self.models.teacher.logit_soft_cap), states

    def prompted_vjp(self, params: Mapping[str, Any], rows: Batch) -> PromptedForward:
        """The prompted teacher's distributions and states, and the pullback of its hidden states to
        the soft prompt."""

        def prompted(soft_prompt):  # [M, D] -> hidden [B, R, D]; the head does not depend on it
            teacher, states = self.teacher(params, rows, soft_prompt)
            return teacher.hidden, (teacher, states)

        # The teacher is frozen: its backward pass carries gradients to P alone, none to weights.
        _, pullback, seen = jax.vjp(prompted, params["soft_prompt"], has_aux=True)
        return seen, pullback

    def student_vjp(
        self, student: Any, rows: Batch, dropout_keys: Key[Array, " B"] | None = None
    ) -> StudentForward:
        """The student's distributions and states, and their pullback to its trained parameters."""

        def see(student):
            student = self.student_params(student)
            return self._see(self.models.student, student, rows, None, self._taps[0], dropout_keys)

        return jax.vjp(see, student)

    def dropout_keys(
        self, key: Key[Array, ""], rows: Batch, corpus: Batch | None = None
    ) -> DropoutKeys | None:
        """A key of each row, from that of a step, where the student has dropout: it depends on the
        row's number, not on micro-batches or devices."""
        if not self.drops:
            return None

        # A key of its own for the rows and for the corpus, whose row numbers are the same.
        def keys(batch: Batch | None, place: int):
            of_all = jax.random.fold_in(jax.random.fold_in(key, _DROPOUT), place)
            return batch and row_keys(of_all, np.arange(batch.lengths.shape[0]))

        return DropoutKeys(keys(rows, 0), keys(corpus, 1))

    @property
    def drops(self) -> bool:
        """Whether the student has dropout in its own update."""
        student = self.models.student
        if self.method.dropout and not isinstance(student, Decoder):
            raise ValueError(
                f"dropout: the student is a {type(student).__name__}, whose functions take no key; "
                "expected a Decoder, or dropout = False"
            )
        if not self.method.dropout:
            return False
        lora = student.config.lora
        return student.config.dropout != Dropout() or bool(lora and lora.dropout)

    def mixture_model(self, params: Mapping[str, Any]) -> SamplingModel | None:
        """The teacher, where it writes rollouts together with the student: as it is, whatever view
        the losses have of it."""
        if not self.method.teacher_writes_along:
            return None
        return SamplingModel(self.models.teacher, self.teacher_params(params))

    @property
    def hidden_terms(self) -> tuple[hidden_loss.HiddenTerm, ...]:
        """The method's terms on hidden states, for these two models."""
        if not self.method.hidden_terms:
            return ()
        pair = {"student": self.models.student, "teacher": self.models.teacher}
        for role, model in pair.items():
            if not isinstance(model, Decoder):
                raise ValueError(
                    f"hidden_terms: the {role} is a {type(model).__name__}, of which no inner "
                    "layer can be seen; expected a Decoder, or no hidden_terms"
                )
        configs = (model.config for model in pair.values())
        return hidden_loss.resolve_terms(self.method.hidden_terms, *configs)

    @property
    def router_taps(self) -> tuple[hidden_loss.Tap, ...]:
        """The router of every layer of a student that `router_balance` asks to balance."""
        if not self.method.router_balance:
            return ()
        student = self.models.student
        if not isinstance(student, Decoder) or student.config.experts is None:
            raise ValueError(
                f"router_balance: {self.method.router_balance:g}, but the student is no mixture of "
                "experts; expected 0"
            )
        return tuple((hidden_loss.ROUTER, layer) for layer in range(student.config.num_layers))

    @property
    def _taps(self):
        student, teacher = hidden_loss.taps(self.hidden_terms)
        return (*student, *self.router_taps), teacher

    def _see(self, model, params, rows, prefix, taps, dropout_keys=None):
        where, vocab_size = self.where(rows), self.method.vocab_size
        how = prefix, taps, dropout_keys
        return lazy_logits_and_states(model, params, rows, where, vocab_size, *how)
