"""Losses on hidden states and relations, on random models and against dense definitions."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.steps import STUDENT, TEACHER, VOCABULARY, batch, llama, random_params
from helpers.tiny import equations

from promptkd_jax.data.batch import Responses, responses
from promptkd_jax.distill.losses.hidden_loss import (
    KINDS,
    RELATIONS,
    HiddenTerm,
    hidden_loss,
    init_projections,
    layer_map,
    load_balancing,
    resolve_terms,
    taps,
)
from promptkd_jax.distill.teacher import lazy_logits, lazy_logits_and_states
from promptkd_jax.models.decoder import REMAT, Decoder

CAPACITY = 11
PROMPT = np.random.default_rng(5).normal(0, 0.5, (3, 32)).astype(np.float32)
# The student: 2 layers, 24 wide, 3 heads. The teacher: 2 layers, 32 wide, 4 heads, 2 of keys.
RELATION = HiddenTerm("relation", 0.5, ((0, 1),), heads=4)
COSINE = HiddenTerm("cosine", 2.0, ((1, 1), (0, -1)), projection=True)
MSE = HiddenTerm("mse", 3.0, ((-2, 0),), projection=True)
TERMS = resolve_terms((RELATION, COSINE, MSE), STUDENT.config, TEACHER.config)


@functools.cache
def params(decoder: Decoder, seed: int = 0):
    return random_params(decoder.config, seed)


def where() -> Responses:
    return responses(batch(), CAPACITY)


@functools.partial(jax.jit, static_argnums=(0, 1))
def seen(decoder, looked_at, params, rows, soft_prompt=None):
    """`view` with taps, at the response positions of `rows`."""
    return lazy_logits_and_states(
        decoder, params, rows, responses(rows, CAPACITY), VOCABULARY, soft_prompt, looked_at
    )


@functools.cache
def teacher_states():
    return seen(TEACHER, taps(TERMS)[1], params(TEACHER), batch())[1]


def projections(terms=TERMS):
    return init_projections(terms, 24, 32, jax.random.key(1))


def largest(tree) -> float:
    return max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree))


def random_states(kinds, width, heads, seed, columns=12):
    """States of layer 0 without a model."""
    rng = np.random.default_rng(seed)
    shapes = {"hidden": (4, CAPACITY, width)} | dict.fromkeys(
        RELATIONS, (4, columns, heads, width // heads)
    )
    return {(kind, 0): jnp.asarray(rng.normal(0, 1, shapes[kind]), jnp.float32) for kind in kinds}


def rotations(heads, width, seed):
    """A random orthogonal matrix per head, `[heads, width, width]`."""
    drawn = np.random.default_rng(seed).normal(0, 1, (heads, width, width))
    return jnp.asarray(np.linalg.qr(drawn)[0], jnp.float32)


# The relation loss


def dense_relation(heads, learner, target, where: Responses):
    """By definition, with all scores of all columns; the masked sum."""

    def log_relation(x):
        x = x.reshape(*x.shape[:2], heads, -1)
        scores = jnp.einsum("bqah,bkah->baqk", x, x) / math.sqrt(x.shape[-1])
        return jax.nn.log_softmax(jnp.where(jnp.tri(x.shape[1]), scores, -1e9))

    total = 0.0
    for name in RELATIONS:
        log_p, log_q = log_relation(target[name, 0]), log_relation(learner[name, 0])
        kl = (jnp.exp(log_p) * (log_p - log_q)).sum(-1).mean(1)  # [B, T]
        total += (where.mask * jnp.take_along_axis(kl, where.positions, axis=1)).sum() / 3
    return total


@pytest.mark.parametrize("chunk", [1, 4, CAPACITY, None])
def test_the_chunked_relation_loss_is_the_dense_one(chunk):
    """Also for unequal widths and heads: 6 heads of 4 against 2 of 16, both as 4 heads."""
    learner, target = random_states(RELATIONS, 24, 6, 0), random_states(RELATIONS, 32, 2, 1)
    terms = (HiddenTerm("relation", 1.0, ((0, 0),), heads=4),)

    @jax.jit
    @jax.value_and_grad
    def found(learner):
        return hidden_loss(terms, learner, target, {}, where(), chunk=chunk)[0]

    dense = jax.jit(jax.value_and_grad(functools.partial(dense_relation, 4)))
    expected = dense(learner, target, where())
    assert expected[0] > 1
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
        found(learner),
        expected,
    )


def test_no_array_of_all_scores():
    """Only blocks of queries exist, in the backward pass too."""
    columns = 60
    learner = random_states(RELATIONS, 24, 6, 0, columns)
    positions = jnp.broadcast_to(jnp.arange(columns), (4, columns))
    whole = Responses(positions, positions, jnp.ones((4, columns)))
    terms = (HiddenTerm("relation", 1.0, ((0, 0),), heads=6),)

    def biggest(chunk):
        def loss(learner, target):
            return hidden_loss(terms, learner, target, {}, whole, chunk=chunk)[0]

        jaxpr = jax.make_jaxpr(jax.grad(loss))(learner, learner)
        return max(x.aval.size for equation, _ in equations(jaxpr) for x in equation.outvars)

    assert biggest(columns) >= 6 * 4 * columns * columns
    assert biggest(2) <= 2 * 6 * 4 * columns * 4  # the gathered queries or the scores of a block


def test_relations_are_blind_to_a_rotation_within_a_head():
    learner, target = random_states(RELATIONS, 24, 6, 0), random_states(RELATIONS, 32, 4, 1)
    terms = (HiddenTerm("relation", 1.0, ((0, 0),), heads=4),)

    def turned(x, heads, width):
        split = x.reshape(*x.shape[:2], heads, width)
        return jnp.einsum("btah,ahk->btak", split, rotations(heads, width, 7)).reshape(x.shape)

    loss = jax.jit(lambda learner: hidden_loss(terms, learner, target, {}, where())[0])
    before = loss(learner)
    within = loss(jax.tree.map(lambda x: turned(x, 4, 6), learner))
    across = loss(jax.tree.map(lambda x: turned(x, 2, 12), learner))
    np.testing.assert_allclose(within, before, rtol=1e-5)
    assert abs(across - before) > 0.01 * before


def test_a_query_sees_its_own_column_and_those_before():
    learner, target = random_states(RELATIONS, 24, 6, 0), random_states(RELATIONS, 32, 4, 1)
    terms = (HiddenTerm("relation", 1.0, ((0, 0),), heads=2),)
    at = jnp.full((4, 1), 6)
    one = Responses(at, at, jnp.ones((4, 1)))
    gradient = jax.grad(lambda learner: hidden_loss(terms, learner, target, {}, one)[0])(learner)
    for name in RELATIONS:
        reached = np.abs(gradient[name, 0]).max(axis=(2, 3)) > 0
        np.testing.assert_array_equal(reached, np.tile(np.arange(12) <= 6, (4, 1)))


# Hidden states


def pointwise(kind, learner, target):
    loss, _ = hidden_loss((HiddenTerm(kind, 1.0, ((0, 0),)),), learner, target, {}, where())
    return loss


def test_cosine_and_mse_are_their_definitions():
    learner, target = random_states(["hidden"], 8, 1, 0), random_states(["hidden"], 8, 1, 1)
    a, b = (np.asarray(x["hidden", 0], np.float64) for x in (learner, target))
    mask = np.asarray(where().mask)
    cosine = 1 - (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    np.testing.assert_allclose(
        pointwise("cosine", learner, target), (mask * cosine).sum(), rtol=1e-5
    )
    mse = ((a - b) ** 2).mean(-1)
    np.testing.assert_allclose(pointwise("mse", learner, target), (mask * mse).sum(), rtol=1e-5)


def test_cosine_is_blind_to_scale():
    learner, target = random_states(["hidden"], 8, 1, 0), random_states(["hidden"], 8, 1, 1)
    scaled = jax.tree.map(lambda x: 7 * x, learner)
    before = pointwise("cosine", learner, target)
    np.testing.assert_allclose(pointwise("cosine", scaled, target), before, rtol=1e-5)
    assert pointwise("mse", scaled, target) > 2 * pointwise("mse", learner, target)


@pytest.mark.parametrize("kind", ["cosine", "mse", "relation"])
def test_nan_where_nothing_counts_changes_nothing(kind):
    """At masked positions, and for relations in the columns that no position sees."""
    names, rows = (RELATIONS, batch()) if kind == "relation" else (["hidden"], None)
    term = HiddenTerm(kind, 1.0, ((0, 0),), heads=4 if kind == "relation" else 0)
    learner, target = (random_states(names, 16, 4, seed) for seed in (0, 1))

    def broken(states):
        if rows is None:
            outside = np.asarray(where().mask) == 0
        else:
            outside = np.arange(12) >= np.asarray(rows.lengths)[:, None] - 1
        assert outside.any()
        return {name: x.at[outside].set(np.nan) for name, x in states.items()}

    def found(learner, target):
        loss = lambda learner: hidden_loss((term,), learner, target, {}, where())  # noqa: E731
        return jax.jit(jax.value_and_grad(loss, has_aux=True))(learner)

    (value, sums), gradient = found(broken(learner), broken(target))
    (right, _), right_gradient = found(learner, target)
    assert np.isfinite(value) and value == right and len(sums) == 1
    jax.tree.map(np.testing.assert_array_equal, gradient, right_gradient)


@pytest.mark.parametrize(
    "cut, says",
    [
        (lambda x: x[:, 1:], r"hidden of the teacher's layer 0: \[4, 10, 8\], but .* 11 positions"),
        (lambda x: x[1:], r"\[3, 11, 8\], but the mask has 4 rows"),
    ],
)
def test_states_of_other_positions_are_refused_when_traced(cut, says):
    states = random_states(["hidden"], 8, 1, 0)
    with pytest.raises(ValueError, match=says):
        jax.eval_shape(lambda x: pointwise("mse", x, jax.tree.map(cut, x)), states)


def test_hidden_states_of_zero_have_finite_gradients():
    target = random_states(["hidden"], 8, 1, 1)
    zero = jax.tree.map(jnp.zeros_like, target)
    gradient = jax.grad(lambda learner: pointwise("cosine", learner, target))(zero)
    assert np.isfinite(gradient["hidden", 0]).all()


# All terms together


@functools.partial(jax.jit, static_argnums=(0, 1))
def update(student, terms, params, teacher, made, rows):
    """((loss, sums), gradients of student and projections); without teacher, against itself."""

    def loss(params, made):
        looked_at = taps(terms)[0] if teacher else sum(taps(terms), ())
        states = seen(student, looked_at, params, rows)[1]
        return hidden_loss(terms, states, teacher or states, made, responses(rows, CAPACITY))

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, made)


def run(student=STUDENT, rows=None):
    """`TERMS` between student and teacher."""
    rows = batch() if rows is None else rows
    return update(student, TERMS, params(STUDENT), teacher_states(), projections(), rows)


def run_with_itself(*layers: tuple[int, int]):
    """Every kind of loss between layers of one model, and one with the first projection."""
    terms = (
        HiddenTerm("relation", 1.0, layers, heads=2),
        HiddenTerm("mse", 1.0, layers),
        HiddenTerm("cosine", 1.0, layers),
        HiddenTerm("mse", 1.0, ((1, 1),), projection=True),
    )
    made = init_projections(terms, 32, 32, jax.random.key(0))
    return update(TEACHER, terms, params(TEACHER), None, made, batch())


def test_a_model_is_at_no_distance_from_itself():
    (_, sums), gradients = run_with_itself((0, 0))
    assert sums.keys() == {"relation_0_0", "mse_0_0", "cosine_0_0", "mse_1_1"}
    assert largest(sums) < 2e-5
    assert largest(gradients) < 2e-5
    (_, sums), (gradient, _) = run_with_itself((0, 1))
    assert min(float(sums[f"{kind}_0_1"]) for kind in ("relation", "mse", "cosine")) > 0.5
    assert largest(gradient) > 0.1


def test_models_of_unequal_widths_and_heads():
    (loss, sums), (d_student, d_projections) = run()
    assert sums.keys() == {"relation_0_1", "cosine_1_1", "cosine_0_1", "mse_0_0"}
    by_name = {name: float(x) for name, x in sums.items()}
    assert min(by_name.values()) > 0.1, by_name
    expected = 0.5 * sums["relation_0_1"] + 2 * (sums["cosine_1_1"] + sums["cosine_0_1"])
    np.testing.assert_allclose(loss, expected + 3 * sums["mse_0_0"], rtol=1e-6)
    assert d_projections.keys() == {"cosine_1_1", "cosine_0_1", "mse_0_0"}
    assert all(largest(x) > 1e-3 for x in d_projections.values())
    attention = d_student["layers"]["attention"]
    reached = {x: largest(attention[x]) for x in ("query", "key", "value")}
    assert min(reached.values()) > 1e-3, reached


@pytest.mark.parametrize("kind", KINDS)
def test_the_teacher_is_a_constant(kind):
    names = RELATIONS if kind == "relation" else ["hidden"]
    learner, target = random_states(names, 24, 6, 0), random_states(names, 24, 6, 1)
    terms = (HiddenTerm(kind, 1.0, ((0, 0),), heads=3 if kind == "relation" else 0),)

    @functools.partial(jax.grad, argnums=(0, 1))
    def gradients(learner, target):
        return hidden_loss(terms, learner, target, {}, where())[0]

    d_learner, d_target = gradients(learner, target)
    assert largest(d_target) == 0
    assert largest(d_learner) > 1e-4


@pytest.mark.parametrize("policy", [policy for policy in REMAT if policy != "none"])
def test_remat_changes_no_gradient(policy):
    """But for rounding: gradients are up to 30 large."""
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4),
        run(Decoder(STUDENT.config.replace(remat=policy))),
        run(),
    )


def test_nothing_behind_a_rows_last_position_counts():
    """Neither padding nor the label of the last position, which is never an input that counts."""
    rows = batch()
    behind = np.arange(rows.tokens.shape[1]) >= rows.lengths[:, None] - 1
    changed = np.where(behind, (rows.tokens + 1) % VOCABULARY, rows.tokens)
    (loss, sums), gradient = run()
    other = run(rows=rows._replace(tokens=changed))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
        other,
        ((loss, sums), gradient),
    )
    before = np.where(np.arange(12) == 0, (rows.tokens + 1) % VOCABULARY, rows.tokens)
    assert abs(run(rows=rows._replace(tokens=before))[0][0] - loss) > 0.1


def test_a_row_without_response_counts_nothing():
    rows = batch()
    empty = rows._replace(lengths=rows.prompt_lengths)
    (loss, sums), gradients = run(rows=empty)
    assert loss == 0
    assert largest(sums) == 0
    assert largest(gradients) == 0


# What is seen


def all_taps(decoder: Decoder):
    layers = range(decoder.config.num_layers)
    return tuple((name, layer) for name in ("hidden", *RELATIONS) for layer in layers)


@pytest.mark.parametrize("soft_prompt", [None, PROMPT], ids=["plain", "prompted"])
def test_taps_change_nothing_of_the_view(soft_prompt):
    rows = batch()
    expected = jax.jit(lazy_logits, static_argnums=(0, 4))(
        TEACHER, params(TEACHER), rows, where(), VOCABULARY, soft_prompt
    )
    without, nothing = seen(TEACHER, (), params(TEACHER), rows, soft_prompt)
    assert nothing == {}
    found, states = seen(TEACHER, all_taps(TEACHER), params(TEACHER), rows, soft_prompt)
    for linear in (without, found):
        np.testing.assert_allclose(linear.hidden, expected.hidden, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(linear.head, expected.head)
    assert {name: x.shape for (name, layer), x in states.items() if layer == 0} == {
        "hidden": (4, CAPACITY, 32),
        "queries": (4, 12, 4, 8),
        "keys": (4, 12, 2, 8),
        "values": (4, 12, 2, 8),
    }
    np.testing.assert_array_equal(states["hidden", 1], found.hidden)  # behind the final norm
    assert np.abs(states["hidden", 0] - found.hidden).max() > 0.1


def test_a_forward_without_taps_keeps_nothing():
    def outputs(**how):
        apply = functools.partial(TEACHER.apply, **how)
        jaxpr = jax.make_jaxpr(apply)({"params": params(TEACHER)}, batch().tokens).jaxpr
        (scan,) = [e for e in jaxpr.eqns if e.primitive.name == "scan"]
        return [x.aval.shape for x in scan.outvars]

    assert outputs() == [(4, 12, 32)]
    assert len(outputs(mutable=["intermediates"])) == 5


def test_states_are_aligned_with_the_tokens_behind_a_soft_prompt():
    """In the first layer what a token is projected to depends on nothing but itself.

    That it does so behind a prompt, too, says that the prompt's columns are cut off and that
    positions are not yet in the queries and keys.
    """
    plain, prompted = (
        seen(TEACHER, all_taps(TEACHER), params(TEACHER), batch(), x)[1] for x in (None, PROMPT)
    )
    for name in RELATIONS:
        np.testing.assert_allclose(prompted[name, 0], plain[name, 0], rtol=1e-5, atol=1e-5)
        assert np.abs(prompted[name, 1] - plain[name, 1]).max() > 0.1, "the prompt is unseen"


def test_the_soft_prompt_gets_a_gradient_through_the_states():
    @jax.jit
    @jax.grad
    def gradient(soft_prompt):
        looked_at = (("queries", 1), ("hidden", 0))
        _, states = seen(TEACHER, looked_at, params(TEACHER), batch(), soft_prompt)
        return sum(jnp.sum(jnp.square(x)) for x in states.values())

    assert largest(gradient(PROMPT)) > 0.1


# Terms


def test_layer_map():
    assert layer_map(4, 12) == ((0, 2), (1, 5), (2, 8), (3, 11))  # TinyBERT's
    assert layer_map(3, 3) == ((0, 0), (1, 1), (2, 2))
    for student, teacher in ((18, 30), (5, 7), (3, 2), (1, 6)):
        layers = [pair[1] for pair in layer_map(student, teacher)]
        assert len(layers) == student
        assert layers == sorted(layers)
        assert layers[-1] == teacher - 1
        assert layers[0] >= 0


def test_terms_are_spelt_out_for_two_models():
    small, large = llama(2, 32, 48, VOCABULARY), llama(4, 32, 48, VOCABULARY)
    terms = resolve_terms(
        (HiddenTerm("relation", layers=((-1, -2),)), HiddenTerm("mse", layers="uniform")),
        small,
        large,
    )
    assert terms == (
        HiddenTerm("relation", layers=((1, 2),), heads=4),
        HiddenTerm("mse", layers=((0, 1), (1, 3))),
    )
    assert hash(terms) == hash(resolve_terms(terms, small, large))
    assert taps(terms) == (
        (("hidden", 0), ("hidden", 1), ("keys", 1), ("queries", 1), ("values", 1)),
        (("hidden", 1), ("hidden", 3), ("keys", 2), ("queries", 2), ("values", 2)),
    )


def test_projections():
    assert init_projections(TERMS[:1], 24, 32, jax.random.key(0)) == {}
    wide = init_projections(TERMS, 24, 32, jax.random.key(0))
    assert wide.keys() == {"cosine_1_1", "cosine_0_1", "mse_0_0"}
    for x in wide.values():
        assert (x.shape, x.dtype) == ((24, 32), jnp.float32)
        np.testing.assert_allclose(x @ x.T, np.eye(24), atol=1e-5)
    assert np.abs(wide["cosine_1_1"] - wide["cosine_0_1"]).max() > 0.1
    narrow = init_projections(TERMS, 32, 24, jax.random.key(0))["mse_0_0"]
    np.testing.assert_allclose(narrow.T @ narrow, np.eye(24), atol=1e-5)
    same = init_projections(TERMS, 8, 8, jax.random.key(0))
    np.testing.assert_array_equal(same["mse_0_0"], np.eye(8))


REFUSED = {
    "kind": (dict(kind="cosin"), "kind: 'cosin' is not one of 'cosine', 'mse', 'relation'"),
    "weight": (dict(kind="mse", weight=0.0), "weight: 0.0 is not > 0"),
    "nan": (dict(kind="mse", weight=math.nan), "weight: nan is not > 0"),
    "no layers": (dict(kind="mse", layers=()), r"layers: \(\) is not 'uniform', or pairs"),
    "no pairs": (dict(kind="mse", layers=(0, 1)), r"layers: \(0, 1\) is not"),
    "layers": (dict(kind="mse", layers="even"), "layers: 'even' is not"),
    "heads": (dict(kind="cosine", heads=2), "heads: 2, but 'cosine' has none"),
    "less heads": (dict(kind="relation", heads=-1), "heads: -1 is not >= 0"),
    "projection": (
        dict(kind="relation", projection=True),
        "projection: a relation loss needs none",
    ),
}


@pytest.mark.parametrize("fields, message", REFUSED.values(), ids=REFUSED)
def test_terms_that_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        HiddenTerm(**fields)


UNFIT = {
    "student layer": (
        [HiddenTerm("relation", layers=((2, 0),), heads=4)],
        "relation: layer 2 of the student, which has the layers 0 to 1",
    ),
    "teacher layer": (
        [HiddenTerm("relation", layers=((0, -3),), heads=4)],
        "layer -3 of the teacher, which has the layers 0 to 1",
    ),
    "widths": (
        [HiddenTerm("cosine")],
        "cosine: the student is 24 wide and the teacher 32; set projection to true",
    ),
    "heads of queries": (
        [HiddenTerm("relation")],
        "3 relation heads do not divide the teacher's queries, 4 heads of 8 = 32",
    ),
    "heads of keys": (
        [HiddenTerm("relation", heads=16)],
        "16 relation heads do not divide the student's queries, 3 heads of 8 = 24",
    ),
    "twice": (
        [MSE, HiddenTerm("mse", layers=((0, 0), (0, -1)), projection=True)],
        "the same layers are compared twice: mse_0_0",
    ),
}


@pytest.mark.parametrize("terms, message", UNFIT.values(), ids=UNFIT)
def test_terms_that_do_not_fit_the_models(terms, message):
    with pytest.raises(ValueError, match=message):
        resolve_terms(terms, STUDENT.config, TEACHER.config)


def test_relation_heads_must_divide_grouped_keys_too():
    grouped = TEACHER.config.replace(num_kv_heads=1)
    message = "16 relation heads do not divide the teacher's keys and values, 1 heads of 8 = 8"
    with pytest.raises(ValueError, match=message):
        resolve_terms([HiddenTerm("relation", heads=16)], TEACHER.config, grouped)


def test_balance_of_a_router_is_that_of_transformers():
    """Of each layer; it is smallest where all experts get as many tokens."""
    torch = pytest.importorskip("torch", reason="the models of transformers need torch")
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    scores = np.random.default_rng(0).normal(size=(3, 2, 5, 4)).astype(np.float32)
    counts = np.arange(5) < np.array([[5], [2]])
    mask = torch.tensor(counts.astype(np.int64))
    expected = [
        load_balancing_loss_func((torch.tensor(layer).reshape(-1, 4),), 4, 2, mask).item()
        for layer in scores
    ]
    found = load_balancing(scores, counts, 2)
    np.testing.assert_allclose(found, np.mean(expected), rtol=1e-6)
    spoilt = np.where(counts[..., None], scores, np.nan)
    gradient = jax.grad(load_balancing)(jnp.asarray(spoilt), counts, 2)
    assert jnp.isfinite(gradient).all() and jnp.abs(gradient).max() > 0
    even = 9.0 * np.eye(4, dtype=np.float32)[None, None]
    assert load_balancing(even, np.ones((1, 4)), 1) == pytest.approx(1.0)
    assert load_balancing(even[:, :, [0, 0, 0, 0]], np.ones((1, 4)), 1) > 3.9
