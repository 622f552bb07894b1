"""What an update may look at beside the rows: each view of the teacher, hidden states, a corpus.

Against dense losses by `jax.grad`, as in `test_methods`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.families import FAMILIES
from helpers.methods import (
    begin,
    dense,
    dense_student,
    gradient,
    in_parts,
    moved,
    plain,
    seen,
    shares,
    update,
)
from helpers.steps import (
    STUDENT,
    TEACHER,
    VOCABULARY,
    assert_close,
    batch,
    jit,
    kl,
    log_probs,
    random_params,
    supervised,
    teacher_params,
)

from promptkd_jax.data.batch import Batch, gather, responses
from promptkd_jax.data.top_k import TopK
from promptkd_jax.distill import objective
from promptkd_jax.distill.losses import hidden_loss, losses
from promptkd_jax.distill.losses.hidden_loss import HiddenTerm
from promptkd_jax.distill.state import TrainState, summarize
from promptkd_jax.distill.teacher import Models, StepModels, lazy_logits_and_states
from promptkd_jax.distill.terms import MicroBatch
from promptkd_jax.models.decoder import Decoder
from promptkd_jax.models.families.registry import from_hugging_face

BOTH_KLS = (("forward_kl", 0.3), ("reverse_kl", 0.7))


# In context


def test_a_teacher_in_context_reads_the_demonstrations_before_the_row():
    """It is the plain teacher on the longer row, of which the student sees none."""
    examples = np.random.default_rng(5).integers(6, VOCABULARY, 7).astype(np.int32)
    before = begin()
    in_context = plain(
        student_terms=BOTH_KLS, teacher_view="in_context", demonstrations=tuple(examples.tolist())
    )
    after, metrics = update(in_context, before)
    longer = np.concatenate([np.tile(examples, (4, 1)), batch().tokens], axis=1)
    target = seen(TEACHER, teacher_params(), longer)[:, 7:]
    (value, sums), expected = dense_student(before.student, target=target, forward=0.3, reverse=0.7)
    assert_close(gradient(after), expected)
    assert_close(summarize(metrics)["student_loss"], value)
    assert_close(metrics.sums["kl_in_context"], sums[2].sum()[None])
    _, without = dense_student(before.student, forward=0.3, reverse=0.7)
    assert moved(expected, without) > 1e-3


# From a cache


def kept(k: int) -> Batch:
    """The batch with the teacher's k largest log-probabilities."""
    where = responses(batch(), 11)
    all_of_them = gather(seen(TEACHER, teacher_params(), batch().tokens), where)
    values, ids = jax.lax.top_k(all_of_them, k)
    return batch()._replace(cached=TopK(ids, values))


CACHED = plain(teacher_view="cached", student_terms=BOTH_KLS)


def test_a_full_cache_is_the_teacher():
    before = begin()
    after, metrics = update(CACHED, before, kept(VOCABULARY))
    (value, _), expected = dense_student(before.student, forward=0.3, reverse=0.7)
    assert_close(gradient(after), expected)
    found = summarize(metrics)
    assert_close(found["student_loss"], value)
    assert not CACHED.needs_teacher


def test_a_cache_of_the_largest_compares_them_and_the_rest_as_one():
    """Which bounds both divergences from below."""
    before, rows = begin(), kept(5)
    _, metrics = update(CACHED, before, rows)
    where = responses(rows, 11)
    q, p = (
        np.exp(gather(seen(decoder, params, rows.tokens), where), dtype=np.float64)
        for decoder, params in ((STUDENT, before.student), (TEACHER, teacher_params()))
    )
    q, p = (np.take_along_axis(x, np.asarray(rows.cached.ids), axis=-1) for x in (q, p))
    q, p = (np.concatenate([x, 1 - x.sum(-1, keepdims=True)], axis=-1) for x in (q, p))
    (_, sums), _ = dense_student(before.student, forward=0.3, reverse=0.7)
    for name, (one, other), row in (("forward_kl", (p, q), 1), ("reverse_kl", (q, p), 2)):
        expected = (where.mask * (one * np.log(one / other)).sum(-1)).sum()
        np.testing.assert_allclose(metrics.sums[name], expected, rtol=1e-4)
        assert expected < 0.99 * sums[row].sum()


# Online


def test_an_online_teacher_learns_first_and_the_student_from_what_it_became():
    """Each by its own optimizer, and each against the other as a constant."""
    before = begin(teacher=teacher_params())
    online = plain(teacher_view="online", student_terms=BOTH_KLS)
    after, metrics = update(online, before)
    rows = batch()
    student_says = seen(STUDENT, before.student, rows.tokens)
    (value, _), expected = dense(
        TEACHER, before.params["teacher"], student_says, rows, shares(rows, gold=1, forward=1)
    )
    assert_close(gradient(after, "teacher"), expected)
    teacher = jax.tree.map(lambda p, g: p - 0.1 * g, before.params["teacher"], expected)
    assert_close(after.params["teacher"], teacher)
    found = summarize(metrics)
    assert_close(found["teacher_loss"], value)

    target = seen(TEACHER, after.params["teacher"], rows.tokens)
    (value, _), expected = dense_student(before.student, target=target, forward=0.3, reverse=0.7)
    assert_close(gradient(after), expected)
    assert_close(found["student_loss"], value)
    _, stale = dense_student(before.student, forward=0.3, reverse=0.7)
    assert moved(expected, stale) > 1e-3


# Hidden states


HIDDEN = (
    HiddenTerm("cosine", 0.5, ((-1, -1),), projection=True),
    HiddenTerm("mse", 0.2, ((0, 0), (1, 1)), projection=True),
    HiddenTerm("relation", 0.3, "uniform", heads=2),
)
GOLD_AND_HIDDEN = plain(student_terms=(("cross_entropy", 1.0),), hidden_terms=HIDDEN)


def resolved():
    return hidden_loss.resolve_terms(HIDDEN, STUDENT.config, TEACHER.config)


@functools.cache
def with_projections() -> TrainState:
    made = hidden_loss.init_projections(resolved(), 24, 32, jax.random.key(6))
    return begin(projection=made)


@jit
@functools.partial(jax.value_and_grad, argnums=(0, 1))
def dense_hidden(student, projections, teacher):
    """Cross entropy and the hidden terms, means over all response tokens."""
    where = responses(batch(), 11)
    terms = resolved()
    models = ((STUDENT, student), (TEACHER, teacher))
    states = [
        lazy_logits_and_states(decoder, params, batch(), where, VOCABULARY, None, taps)[1]
        for (decoder, params), taps in zip(models, hidden_loss.taps(terms))
    ]
    total, _ = hidden_loss.hidden_loss(terms, *states, projections, where)
    learner = gather(log_probs(STUDENT, student, batch().tokens), where)
    gold = -jnp.take_along_axis(learner, where.labels[..., None], axis=-1)[..., 0]
    return (total + (where.mask * gold).sum()) / where.mask.sum()


@pytest.mark.parametrize("parts", [1, 2])
def test_hidden_states_whole_or_in_parts(parts):
    """The student learns from its logits and its states; projections have their own optimizer."""
    before = with_projections()
    after, metrics = update(in_parts(GOLD_AND_HIDDEN, parts), before)
    value, (student, projections) = dense_hidden(
        before.student, before.params["projection"], teacher_params()
    )
    assert_close(gradient(after), student)
    assert_close(gradient(after, "projection"), projections)
    stepped = jax.tree.map(lambda p, g: p - 0.2 * g, before.params["projection"], projections)
    assert_close(after.params["projection"], stepped)
    assert projections.keys() == {"cosine_1_1", "mse_0_0", "mse_1_1"}
    assert_close(summarize(metrics)["student_loss"], value)
    assert {"cosine_1_1", "mse_0_0", "relation_0_0", "cross_entropy"} <= metrics.sums.keys()
    _, alone = dense_student(before.student, gold=1)
    assert moved(student, alone) > 1e-3


# A corpus


def corpus() -> Batch:
    """Rows of text, every token of which counts but the first."""
    tokens = np.random.default_rng(9).integers(6, VOCABULARY, (4, 12)).astype(np.int32)
    return Batch(tokens, np.ones(4, np.int32), np.array([12, 3, 8, 5], np.int32))


@pytest.mark.parametrize("parts", [1, 2])
def test_a_corpus_adds_its_own_mean(parts):
    before = begin()
    terms = (("cross_entropy", 0.5), ("forward_kl", 0.25))
    method = in_parts(plain(corpus_terms=terms), parts)
    after, metrics = update(method, before, corpus=corpus())
    (value, _), expected = dense_student(before.student, reverse=1)
    (other, _), more = dense_student(before.student, corpus(), gold=0.5, forward=0.25)
    assert_close(gradient(after), jax.tree.map(jnp.add, expected, more))
    found = summarize(metrics)
    assert_close(found["student_loss"], value + other)
    assert_close(found["corpus_loss"], other)
    assert moved(more, jax.tree.map(jnp.zeros_like, more)) > 1e-2


# The router of a student

MIXTURE = Decoder(
    from_hugging_face(FAMILIES["mixtral"] | {"vocab_size": VOCABULARY, "num_local_experts": 4})
)


@jit
@jax.value_and_grad
def dense_balance(student):
    """The mean over layers, over the tokens of all rows, prompts included."""
    _, sown = MIXTURE.apply({"params": student}, batch().tokens, mutable=["intermediates"])
    (scores,) = sown["intermediates"]["layers"]["experts"]["router_scores"]
    there = np.arange(12) < batch().lengths[:, None]
    return jnp.mean(
        jnp.stack([hidden_loss.load_balancing(layer[None], there, 2) for layer in scores])
    )


def test_the_router_of_a_student_is_balanced_beside_its_divergences():
    params = {"student": random_params(MIXTURE.config, 3)}
    micro_batch = MicroBatch(batch(), jnp.zeros(4, bool), None)
    tokens, teacher = supervised(batch()).sum(), teacher_params()

    def of_student(weight):
        method = plain(router_balance=weight)
        views = StepModels(method, Models(MIXTURE, TEACHER), teacher)
        scale = 0.25 / tokens  # of a micro-batch with a quarter of an update's tokens
        return objective.student_gradients(params, micro_batch, scale, 0.0, views)

    found, without = map(jit(of_student, static_argnums=0), (0.3, 0.0))
    value, gradient = dense_balance(params["student"])
    more = jax.tree.map(jnp.subtract, found.by_group["student"], without.by_group["student"])
    assert_close(more, jax.tree.map(lambda x: 0.25 * 0.3 * x, gradient))
    assert jnp.abs(gradient["layers"]["experts"]["router"]["kernel"]).max() > 1e-3
    assert_close(found.sums["router_balance"] / tokens, value)
    assert_close((found.loss - without.loss) / tokens, 0.3 * value)
    assert "router_balance" not in without.sums


def test_only_a_mixture_of_experts_has_a_router():
    views = StepModels(plain(router_balance=0.1), Models(STUDENT, TEACHER), teacher_params())
    with pytest.raises(ValueError, match=r"router_balance: 0\.1, but the student is no mixture"):
        views.student_vjp(begin().student, batch())


# Temperature and weighting of the divergences


@jit
@jax.value_and_grad
def dense_tempered(student, teacher, rows):
    """(1 - H(p) / ln V) tau^2 KL(q_tau || p_tau) at tau = 2, and half the cross entropy."""
    q, p = (
        log_probs(decoder, params, rows.tokens)
        for decoder, params in ((STUDENT, student), (TEACHER, teacher))
    )
    soft_q, soft_p = jax.nn.log_softmax(q / 2), jax.nn.log_softmax(p / 2)
    sure = 1 + (jnp.exp(p) * p).sum(-1) / np.log(VOCABULARY)
    gold = -jnp.take_along_axis(q, jnp.asarray(rows.tokens)[:, 1:, None], axis=-1)[..., 0]
    mask = supervised(rows)
    return (mask * (sure * 4 * kl(soft_q, soft_p) + 0.5 * gold)).sum() / mask.sum()


def test_temperature_and_weighting_are_of_divergences_not_of_the_cross_entropy():
    before = begin()
    method = plain(
        student_terms=(("reverse_kl", 1.0), ("cross_entropy", 0.5)),
        temperature=2.0,
        token_weighting="teacher_confidence",
    )
    after, metrics = update(method, before)
    value, expected = dense_tempered(before.student, teacher_params(), batch())
    assert_close(gradient(after), expected)
    assert_close(summarize(metrics)["student_loss"], value)


def two_of_them() -> tuple[jax.Array, jax.Array]:
    target, learner = np.random.default_rng(3).normal(0, 2, (2, 5, 7)).astype(np.float32)
    return jnp.asarray(target), jnp.asarray(learner)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
def test_at_high_temperatures_the_logits_are_matched(name):
    """tau^2 KL tends to the variance of the logits' difference over 2, in both directions."""
    target, learner = two_of_them()
    function = losses.tempered(losses.divergence(name), 300.0)
    difference = learner - target
    expected = jnp.var(difference, axis=-1) / 2
    np.testing.assert_allclose(function(target, learner), expected, rtol=2e-2)
    slope = jax.grad(lambda x: function(target, x).sum())(learner)
    expected = (difference - difference.mean(axis=-1, keepdims=True)) / 7
    np.testing.assert_allclose(slope, expected, atol=1e-2)


def test_a_temperature_of_1_changes_nothing():
    assert losses.tempered(losses.reverse_kl, 1.0) is losses.reverse_kl
    assert losses.weighted(losses.reverse_kl, "uniform") is losses.reverse_kl


@pytest.mark.parametrize("name", losses.WEIGHTINGS)
def test_weights_are_shares_and_constants(name):
    target, learner = two_of_them()
    weight = losses.WEIGHTINGS[name](target, learner)
    assert 0 <= weight.min() < weight.max() <= 1
    found = losses.weighted(losses.reverse_kl, name)
    np.testing.assert_allclose(
        found(target, learner), weight * losses.reverse_kl(target, learner), rtol=1e-6
    )
    slopes = [
        jax.grad(lambda x, f=f: f(target, x).sum())(learner) for f in (found, losses.reverse_kl)
    ]
    np.testing.assert_allclose(slopes[0], weight[:, None] * slopes[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name, side", [("teacher_confidence", 0), ("student_uncertainty", 1)])
def test_what_is_weighted_by(name, side):
    """The first counts where the teacher is sure, the second where the student is not."""
    sure, unsure = jnp.array([60.0, 0.0, 0.0]), jnp.zeros(3)
    others = two_of_them()[0][0, :3]
    ends = [losses.WEIGHTINGS[name](*((x, others)[:: 1 - 2 * side])) for x in (sure, unsure)]
    expected = (1, 0) if side == 0 else (0, 1)
    np.testing.assert_allclose(ends, expected, atol=1e-5)


# The weight of the regularization


def prompted(**changes):
    return plain(teacher_view="prompted", regularization=0.7, **changes)


def with_prompt(step: int = 0) -> TrainState:
    soft_prompt = np.random.default_rng(2).normal(0, 0.5, (3, 32)).astype(np.float32)
    before = begin(step, soft_prompt=jnp.asarray(soft_prompt))
    return before.replace(regularization=jnp.float32(0.5))


def saying(loudness: float):
    """The teacher with its logits times this, and with them what the prompt does to them."""
    return teacher_params() | {"lm_head": loudness * teacher_params()["lm_head"]}


def test_a_constant_regularisation():
    for step in (0, 3, 4):
        after, metrics = update(prompted(regularization_schedule="constant"), with_prompt(step))
        found = summarize(metrics)
        assert found["regularization_weight"] == pytest.approx(0.7)
        total = found["prompt_kd"] + 0.7 * found["prompt_regularizer"]
        assert found["prompt_loss"] == pytest.approx(total, rel=1e-5)
        assert after.regularization == 0.5  # which is for the adaptive one


def test_an_adaptive_regularisation_goes_towards_its_target_by_2_percent_at_most():
    before = with_prompt()
    _, metrics = update(prompted(regularization_schedule="constant"), before)
    reached = summarize(metrics)["prompt_regularizer"]
    method = prompted(regularization_schedule="adaptive", target_kl=reached / 1.1)
    after, metrics = update(method, before)
    found = summarize(metrics)
    assert found["regularization_weight"] == 0.5
    total = found["prompt_kd"] + 0.5 * found["prompt_regularizer"]
    assert found["prompt_loss"] == pytest.approx(total, rel=1e-5)
    assert after.regularization == pytest.approx(0.5 * 1.01, rel=1e-4)

    below, metrics = update(method, before, teacher=saying(0))
    assert summarize(metrics)["prompt_regularizer"] == pytest.approx(0, abs=1e-6)
    assert below.regularization == pytest.approx(0.5 * 0.98)
    above, metrics = update(method, before, teacher=saying(2))
    assert summarize(metrics)["prompt_regularizer"] > 1.2 * reached
    assert above.regularization == pytest.approx(0.5 * 1.02)
    again, metrics = update(method, above, teacher=saying(2))
    assert summarize(metrics)["regularization_weight"] == pytest.approx(0.51)
    assert again.regularization == pytest.approx(0.51 * 1.02)
