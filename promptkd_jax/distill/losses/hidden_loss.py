"""Losses on the inner layers of a model: hidden states, relations between tokens, and routers.

A `HiddenTerm` compares layers of the student with layers of the teacher. Layers are counted from 0,
negative numbers from the end. The hidden states of a model's last layer are those behind its final
norm, the ones that its head sees; those of the layers before are the residual stream.

The use, in this order: `resolve_terms` once for two models, `init_projections`, and in every update
run each model with its `taps` (`teacher.lazy_logits_and_states`) and take the `hidden_loss` of the
two.

B rows, T columns, R response positions, D width, N heads of a model, H their width, A relation
heads, E their width.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from promptkd_jax.data.batch import Responses
from promptkd_jax.distill.losses.losses import forward_kl
from promptkd_jax.infra.specs import Bool, Choice, Float, Int, field, validate
from promptkd_jax.models.config import DecoderConfig

ROUTER = "router_scores"
Tap = tuple[str, int]  # "hidden", "queries", "keys", "values" or ROUTER, and the layer
States = dict[Tap, jax.Array]
Projections = dict[str, jax.Array]

KINDS = {
    "cosine": "1 - cos of the hidden states (DistilBERT, arXiv 1910.01108, section 3)",
    "mse": "the mean over D of the squared difference (TinyBERT, arXiv 1909.10351, L_hid)",
    "relation": "the KL divergence of the student's self-attention relations from the teacher's "
    "(MiniLMv2, arXiv 2012.15828, here causal)",
}
RELATIONS = ("queries", "keys", "values")
# Elements of the scores of one block of queries, [A, B, chunk, T]: 32 MiB in float32.
CHUNK_ELEMENTS = 2**23


class LayerPairs:
    """The spec of the layers that a hidden loss compares."""

    def __str__(self) -> str:
        return "'uniform', or pairs (student layer, teacher layer) such as ((-1, -1),)"

    def fault(self, value: Any) -> str:
        def is_pair(pair):
            return (
                isinstance(pair, list | tuple)
                and len(pair) == 2
                and all(type(x) is int for x in pair)
            )

        pairs = isinstance(value, list | tuple) and value and all(map(is_pair, value))
        return "" if value == "uniform" or pairs else str(self)


@dataclasses.dataclass(frozen=True)
class HiddenTerm:
    """One summand of the loss on hidden states.

    "relation" allows other widths and numbers of heads than the teacher's.

    Raises:
      ValueError: a combination that means nothing.
    """

    kind: str = field("cosine", Choice(KINDS), "what is compared at a position, and how")
    weight: float = field(
        1.0, Float(low=0.0, open_low=True), "weight in the sum, the same for each pair of layers"
    )
    layers: tuple[tuple[int, int], ...] | str = field(
        ((-1, -1),), LayerPairs(), "layers that are compared; 'uniform': evenly spaced ones"
    )
    heads: int = field(
        0, Int(low=0), "heads A of a 'relation'; 0: as many as the student has heads"
    )
    projection: bool = field(
        False,
        Bool(),
        "whether the student's hidden states go through a learned matrix to the teacher's width; "
        "with unequal widths they must",
    )

    def __post_init__(self) -> None:
        validate(self)
        if self.heads and self.kind != "relation":
            raise ValueError(
                f"heads: {self.heads}, but {self.kind!r} has none; expected 0, or kind = 'relation'"
            )
        if self.projection and self.kind == "relation":
            raise ValueError("projection: a relation loss needs none, widths may differ")


def layer_map(student_depth: int, teacher_depth: int) -> tuple[tuple[int, int], ...]:
    """Each student layer with a teacher layer, evenly spaced, the last with the last.

    TinyBERT's g(m) = m N / M, rounded up, counted from 0: 4 layers of 12 are 2, 5, 8, 11.
    """
    return tuple(
        (layer, -(-(layer + 1) * teacher_depth // student_depth) - 1)
        for layer in range(student_depth)
    )


def resolve_terms(
    terms: Sequence[HiddenTerm], student: DecoderConfig, teacher: DecoderConfig
) -> tuple[HiddenTerm, ...]:
    """Returns the terms with every layer and number of heads spelt out for these two models.

    Raises:
      ValueError: a layer that is not there, widths that differ without a projection, heads that
        divide a model's queries, keys or values unevenly, or one comparison asked for twice.
    """
    resolved = tuple(_resolve(term, student, teacher) for term in terms)
    names = [name for term in resolved for name in _names(term).values()]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"the same layers are compared twice: {', '.join(twice)}")
    return resolved


def _resolve(term: HiddenTerm, student: DecoderConfig, teacher: DecoderConfig) -> HiddenTerm:
    pairs = (
        layer_map(student.num_layers, teacher.num_layers)
        if term.layers == "uniform"
        else term.layers
    )
    layers = tuple(
        (
            _layer(term, "student", s, student.num_layers),
            _layer(term, "teacher", t, teacher.num_layers),
        )
        for s, t in pairs
    )
    if term.kind != "relation":
        if student.width != teacher.width and not term.projection:
            raise ValueError(
                f"{term.kind}: the student is {student.width} wide and the teacher "
                f"{teacher.width}; set projection to true, or compare relations"
            )
        return dataclasses.replace(term, layers=layers)
    heads = term.heads or student.num_heads
    for role, config in (("student", student), ("teacher", teacher)):
        _check_heads(heads, role, config)
    return dataclasses.replace(term, layers=layers, heads=heads)


def _layer(term: HiddenTerm, role: str, layer: int, depth: int) -> int:
    if not -depth <= layer < depth:
        raise ValueError(
            f"{term.kind}: layer {layer} of the {role}, which has the layers 0 to {depth - 1}"
        )
    return layer % depth


def _check_heads(heads: int, role: str, config: DecoderConfig) -> None:
    sizes = {"queries": config.num_heads, "keys and values": config.num_kv_heads}
    for name, count in sizes.items():
        if (count * config.head_dim) % heads:
            raise ValueError(
                f"relation: {heads} relation heads do not divide the {role}'s {name}, "
                f"{count} heads of {config.head_dim} = {count * config.head_dim}"
            )


def _names(term: HiddenTerm) -> dict[tuple[int, int], str]:
    """The names of a resolved term's pairs of layers, in metrics and projections."""
    return {pair: f"{term.kind}_{pair[0]}_{pair[1]}" for pair in term.layers}


def taps(terms: Sequence[HiddenTerm]) -> tuple[tuple[Tap, ...], tuple[Tap, ...]]:
    """The states that resolved terms compare: (of the student, of the teacher)."""
    pairs = {
        (name, pair)
        for term in terms
        for pair in term.layers
        for name in (RELATIONS if term.kind == "relation" else ("hidden",))
    }
    student, teacher = (sorted({(name, pair[side]) for name, pair in pairs}) for side in (0, 1))
    return tuple(student), tuple(teacher)


def init_projections(
    terms: Sequence[HiddenTerm], student_width: int, teacher_width: int, key: jax.Array
) -> Projections:
    """The matrices `[D_student, D_teacher]`, float32, of resolved terms; {} where none is learned.

    Between equal widths the identity, so that training begins at the loss without a projection;
    else random with orthonormal rows (or columns), which keeps lengths and angles.
    """
    # Sorted, so that a matrix's key does not depend on the order in which terms are listed.
    names = sorted(name for term in terms if term.projection for name in _names(term).values())
    shape = (student_width, teacher_width)
    if student_width == teacher_width:
        return {name: jnp.eye(student_width) for name in names}
    orthogonal = jax.nn.initializers.orthogonal()
    keys = jax.random.split(key, max(len(names), 1))
    return {name: orthogonal(k, shape, jnp.float32) for name, k in zip(names, keys)}


def hidden_loss(
    terms: Sequence[HiddenTerm],
    student: States,
    teacher: States,
    projections: Projections,
    where: Responses,
    *,
    chunk: int | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weighted sum of the terms over the response positions. The teacher is a constant.

    Args:
      terms: resolved terms.
      student, teacher: the states of `teacher.lazy_logits_and_states`; for relations, of the same
        rows.
      projections: of `init_projections`, trained along with the student.
      where: the response positions, of which the mask counts.
      chunk: queries of a relation in one block; by default as many as keep its scores below
        `CHUNK_ELEMENTS`.

    Returns:
      (loss, sums): the scalar loss, and by kind and layers ("cosine_3_5" is student layer 3
      against teacher layer 5) the unweighted masked sums, which carry no gradient. All are sums:
      divide by `where.mask.sum()` (over all devices and micro-batches) for a mean. Where the mask
      is 0 nothing is looked at: NaN there changes neither value nor gradient.

    Raises:
      ValueError: states of other rows or positions than `where`.
    """
    # The student learns from the teacher, never the other way round; projections with the student.
    teacher = jax.lax.stop_gradient(teacher)
    _check_rows(student, teacher, where)
    counts = where.mask > 0
    loss, sums = jnp.zeros(()), {}
    for term in terms:
        for (of_student, of_teacher), name in _names(term).items():
            if term.kind == "relation":
                # Where nothing counts column 0 is looked at, and its value dropped below.
                positions = jnp.where(counts, where.positions, 0)
                learner = _relation_heads(student, of_student, term.heads, positions)
                target = _relation_heads(teacher, of_teacher, term.heads, positions)
                values = _relation_kl(learner, target, positions, chunk)
            else:
                learner = _select(counts, student["hidden", of_student])
                if term.projection:
                    # [B, R, D_student] -> [B, R, D_teacher]
                    learner = learner @ projections[name]
                target = _select(counts, teacher["hidden", of_teacher])
                values = _POINTWISE[term.kind](learner, target)
            # Twice masked: the select keeps NaN out of the gradient, the mask weighs.
            sums[name] = jnp.sum(where.mask * jnp.where(counts, values, 0))
            loss = loss + term.weight * sums[name]
    return loss, jax.lax.stop_gradient(sums)


def hidden_gradient(
    terms: Sequence[HiddenTerm],
    student: States,
    teacher: States,
    projections: Projections,
    where: Responses,
    weight: jax.Array,
) -> tuple[States, Projections, jax.Array, dict[str, jax.Array]]:
    """Returns the gradient and the value of `hidden_loss` times `weight`.

    Args:
      terms, student, teacher, projections, where: as for `hidden_loss`.

    Returns:
      (gradient for `student`, gradient for `projections`, the loss times `weight`, the unweighted
      masked sum of every pair of layers by name).
    """

    def loss(student, projections):
        total, sums = hidden_loss(terms, student, teacher, projections, where)
        return weight * total, sums

    gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (total, sums), (d_student, d_projections) = gradient(student, projections)
    return d_student, d_projections, total, sums


def _check_rows(student: States, teacher: States, where: Responses) -> None:
    rows, positions = where.mask.shape
    for whose, states in (("student", student), ("teacher", teacher)):
        for (name, layer), state in states.items():
            sizes = state.shape[:2] if name == "hidden" else (state.shape[0], positions)
            if sizes != (rows, positions):
                raise ValueError(
                    f"{name} of the {whose}'s layer {layer}: {list(state.shape)}, but the mask has "
                    f"{rows} rows and {positions} positions; expected [{rows}, "
                    f"{positions if name == 'hidden' else 'T'}, …]"
                )


def _select(counts: jax.Array, x: jax.Array) -> jax.Array:
    """`x` `[B, R, …]` in float32, 0 where nothing counts: 0 times a NaN gradient would be NaN."""
    return jnp.where(counts[..., None], x.astype(jnp.float32), 0)


def _cosine(learner: jax.Array, target: jax.Array) -> jax.Array:
    return 1 - jnp.sum(_unit(learner) * _unit(target), axis=-1)


def _unit(x: jax.Array) -> jax.Array:
    """`x` scaled to length 1; where x is 0, 0 with a finite gradient."""
    # The maximum is inside of the root: the gradient of a norm is NaN at 0, that of this is 0.
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-12))


def _mse(learner: jax.Array, target: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(learner - target), axis=-1)


_POINTWISE = {"cosine": _cosine, "mse": _mse}


def _relation_heads(
    states: States, layer: int, heads: int, positions: jax.Array
) -> list[jax.Array]:
    """Queries, keys and values, their heads put together and cut anew: `[A, B, T, E]`, E = N H / A;
    0 in the columns behind the last of `positions` `[B, R]`, which none of them sees."""
    # Behind a row's last position there may be NaN, which 0 in a softmax times NaN would spread.
    last = jnp.max(positions, axis=1, keepdims=True)  # [B, 1]

    def cut(x):  # in float32, in which the gradients of all chunks are summed
        # [B, T, N, H] -> [B, T, N H] -> [A, B, T, E]
        x = x.reshape(*x.shape[:2], -1)
        x = _select(jnp.arange(x.shape[1]) <= last, x)
        return jnp.moveaxis(x.reshape(*x.shape[:2], heads, -1), 2, 0)

    return [cut(states[name, layer]) for name in RELATIONS]


# A relation of MiniLMv2, here causal. Of one kind x (queries, keys or values), cut into A heads of
# width E, position t compares itself with the positions u <= t:
#
#     r_t(u) = softmax_u(x_t · x_u / sqrt(E))      loss_t = mean over A, kinds of KL(r^p_t || r^q_t)
#
# E may differ between the two models, A may not. Of the R supervised positions, a chunk at a time
# has its scores [A, B, chunk, T] computed, forwards and again backwards.


def _relation_kl(
    learner: list[jax.Array], target: list[jax.Array], positions: jax.Array, chunk: int | None
) -> jax.Array:
    """KL(target || learner) of the relations of each query, `[B, R]`: mean over heads and kinds.

    A relation of a position is the softmax over the columns up to its own of the scaled products
    of its query (key, value) with theirs. Nothing larger than `[A, B, chunk, T]` is made, in the
    backward pass either.
    """
    heads, rows, columns, _ = learner[0].shape

    # Scores are computed again in the backward pass: kept, they would be [R, A, B, T].
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one_query(positions):  # [B]
        seen = jnp.arange(columns) <= positions[:, None]
        values = [
            forward_kl(_scores(t, positions, seen), _scores(s, positions, seen))
            for s, t in zip(learner, target)
        ]
        return jnp.mean(jnp.stack(values), axis=(0, 1))

    # [B, R] -> R calls of one position a row, `chunk` of them at once -> [R, B] -> [B, R].
    if chunk is None:
        chunk = max(CHUNK_ELEMENTS // (heads * rows * columns), 1)
    chunk = min(chunk, positions.shape[1])
    return jax.lax.map(one_query, positions.T, batch_size=chunk).T


def _scores(x: jax.Array, positions: jax.Array, seen: jax.Array) -> jax.Array:
    """Scaled products of one column a row, `positions` `[B]`, with those it sees, `[A, B, T]`."""
    # x [A, B, T, E]; the query of each row, [A, B, E].
    query = jnp.take_along_axis(x, positions[None, :, None, None], axis=2)[:, :, 0]
    scores = jnp.einsum("abe,abte->abt", query, x) / math.sqrt(x.shape[-1])
    return jnp.where(seen, scores, -jnp.inf)


# The router of a mixture of experts. Here E is the number of experts.


def load_balancing(scores: jax.Array, counts: jax.Array, per_token: int) -> jax.Array:
    """Returns the mean over layers of E sum_e f_e P_e: f_e is the number of tokens that an expert
    gets, P_e the mean of its shares, both per token (Switch Transformers, arXiv 2101.03961, eq. 4).

    It is `per_token` where all experts get as many; the gradient flows through P alone. As
    `load_balancing_loss_func` of transformers, which averages f and P over the layers first, so
    that what one layer neglects another may make up for.

    Args:
      scores: `[L, B, T, E]`, of the routers of all layers.
      counts: `[B, T]`, the columns that are tokens of a row.
      per_token: experts that a token is sent to.
    """
    number, weight = scores.shape[-1], counts / jnp.sum(counts)  # [B, T], adds up to 1
    scores = jnp.where(counts[..., None], scores.astype(jnp.float32), 0)  # no NaN of a row's end
    shares = jax.nn.softmax(scores, axis=-1)
    _, chosen = jax.lax.top_k(scores, per_token)  # [L, B, T, k]
    sent = jnp.sum(jax.nn.one_hot(chosen, number), axis=-2)  # [L, B, T, E], 0 or 1
    f, p = (jnp.einsum("bt,lbte->le", weight, x) for x in (sent, shares))
    return jnp.mean(number * jnp.sum(f * p, axis=-1))


def balance_gradient(states: States, counts: jax.Array, per_token: int) -> tuple[States, jax.Array]:
    """Returns the gradient and the value of `load_balancing`.

    Args:
      states: the scores `[B, T, E]` of the router of every layer.
      counts: as for `load_balancing`.
    """

    def loss(states):
        scores = jnp.stack(list(states.values()))  # [L, B, T, E]
        return load_balancing(scores, counts, per_token)

    value, gradient = jax.value_and_grad(loss)(states)
    return gradient, value
