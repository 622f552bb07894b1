"""One update is what Algorithm 1 of the paper says: checked against dense losses and `jax.grad`.

Models are tiny and random. The optimizer is SGD with momentum, whose state after the first update
is the gradient itself. Steps are compiled once per method and with little optimisation: compiling
is nearly all of the time.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.families import FAMILIES
from helpers.steps import (
    EOS,
    ON_POLICY,
    STEPS,
    STUDENT,
    TEACHER,
    assert_close,
    batch,
    jit,
    kl,
    llama,
    log_probs,
    method,
    random_params,
    student_rows,
    supervised,
    teacher_params,
)
from helpers.tiny import equations

from promptkd_jax.data.batch import Batch, truncate
from promptkd_jax.distill import micro_batches
from promptkd_jax.distill.losses.hidden_loss import HiddenTerm
from promptkd_jax.distill.methods.method import PRESETS, Conventions, Method
from promptkd_jax.distill.optimizer import Gradients, accumulate, adamw
from promptkd_jax.distill.state import Metrics, Optimizers, TrainState, init_state, summarize
from promptkd_jax.distill.step import train_step
from promptkd_jax.distill.teacher import Models
from promptkd_jax.models.decoder import Decoder
from promptkd_jax.models.families.registry import from_hugging_face
from promptkd_jax.models.io.params import abstract_params

MOMENTUM = optax.sgd(0.5, momentum=0.9)
OPTIMIZERS = Optimizers(MOMENTUM, MOMENTUM)


def state(prompted: bool = True, step: int = 0) -> TrainState:
    soft_prompt = jnp.asarray(np.random.default_rng(2).normal(0, 0.5, (3, 32)), jnp.float32)
    student = random_params(STUDENT.config, 22)
    soft_prompt = soft_prompt if prompted else None
    params = {"student": student, "soft_prompt": soft_prompt}
    made = init_state(params, OPTIMIZERS, jax.random.key(4))
    return made.replace(step=jnp.full((), step, jnp.int32))


def sft(**changes) -> Method:
    return method(student_terms=(("cross_entropy", 1.0),), teacher_view="plain", **changes)


def step_of(method: Method):
    models = Models(STUDENT, TEACHER)
    return functools.partial(train_step, method=method, models=models, optimizers=OPTIMIZERS)


@functools.cache
def compiled(method: Method):
    """The donating step of `method`."""
    return jit(step_of(method), donate_argnums=0)


def update(method: Method, before: TrainState | None = None, rows=None, teacher=None):
    """New state and metrics; `before` is not donated, a copy is."""
    before = state(method.prompted) if before is None else before
    teacher = teacher_params() if teacher is None and method.needs_teacher else teacher
    return compiled(method)(jax.tree.map(jnp.copy, before), teacher, rows or batch())


def counted(method: Method):
    """Response tokens by micro-batch, and those that no loss sees: without the updates, of which
    neither needs anything, so that little is compiled."""

    @jit
    def counts(before, rows):
        _, metrics = step_of(method)(before, None, rows)
        return metrics.counts, metrics.scalars["tokens_beyond"]

    return counts(state(prompted=False), batch())


def student_gradient(after: TrainState):
    return after.optimizers["student"][0].trace


def prompt_gradient(after: TrainState):
    return after.optimizers["soft_prompt"][0].trace


# The dense definitions


@jit
@functools.partial(jax.value_and_grad, has_aux=True)
def dense_prompt_loss(soft_prompt, student, rows, row_weights, row_alpha, teacher):
    """Equation 3, weighted by row; beside it each term's sum by row."""
    prompted = log_probs(TEACHER, teacher, rows.tokens, soft_prompt)
    plain = log_probs(TEACHER, teacher, rows.tokens)
    learner = log_probs(STUDENT, student, rows.tokens)
    pairs = {
        "prompt_kd": (prompted, learner),
        "prompt_regularizer": (prompted, plain),
        "kl_prompted": (learner, prompted),
        "kl_plain": (learner, plain),
    }
    sums = {name: (supervised(rows) * kl(*pair)).sum(-1) for name, pair in pairs.items()}
    by_row = sums["prompt_kd"] + row_alpha * sums["prompt_regularizer"]
    return (row_weights * by_row).sum(), sums


@jit
@functools.partial(jax.value_and_grad, has_aux=True)
def dense_student_loss(student, soft_prompt, rows, row_weights, term_weights, teacher):
    """Cross entropy, KL(p || q) and equation 4, weighted by row and by term."""
    prompted = log_probs(TEACHER, teacher, rows.tokens, soft_prompt)
    plain = log_probs(TEACHER, teacher, rows.tokens)
    learner = log_probs(STUDENT, student, rows.tokens)
    gold = -jnp.take_along_axis(learner, rows.tokens[:, 1:, None], axis=-1)[..., 0]
    terms = {
        "cross_entropy": gold,
        "forward_kl": kl(plain, learner),
        "reverse_kl": kl(learner, prompted),
        "entropy": -(jnp.exp(learner) * learner).sum(-1),
        "agreement": prompted.argmax(-1) == learner.argmax(-1),
    }
    sums = {name: (supervised(rows) * term).sum(-1) for name, term in terms.items()}  # [B]
    by_row = term_weights @ jnp.stack(list(sums.values())[:3])
    return (row_weights * by_row).sum(), sums


def rows_equal(rows: Batch | None = None) -> np.ndarray:
    """The weight of each row in a mean over all response tokens."""
    rows = rows or batch()
    return np.full(len(rows.lengths), 1 / (rows.lengths - rows.prompt_lengths).sum(), np.float32)


def dense_prompt(soft_prompt, student, *, alpha, weights=None, rows=None):
    rows = rows or batch()
    weights = rows_equal(rows) if weights is None else weights
    alpha = np.broadcast_to(np.float32(alpha), weights.shape)
    return dense_prompt_loss(soft_prompt, student, rows, weights, alpha, teacher_params())


def dense_student(student, soft_prompt, *, terms=(0, 0, 1), weights=None, rows=None):
    rows = rows or batch()
    weights = rows_equal(rows) if weights is None else weights
    terms = np.array(terms, np.float32)
    return dense_student_loss(student, soft_prompt, rows, weights, terms, teacher_params())


# Supervised fine-tuning and distillation without a prompt


def test_sft_is_the_masked_cross_entropy_of_the_tokens_eos_included():
    before = state(prompted=False)
    after, metrics = update(sft())
    (value, sums), gradient = dense_student(before.student, state().soft_prompt, terms=(1, 0, 0))
    assert supervised(batch()).sum() == metrics.counts.sum() == 20
    assert supervised(batch())[1].tolist() == [True] + 10 * [False]  # the immediate EOS
    assert_close(summarize(metrics)["student_loss"], value)
    assert_close(metrics.losses["student"], sums["cross_entropy"].sum()[None])
    assert_close(metrics.sums["cross_entropy"], metrics.losses["student"])
    assert_close(student_gradient(after), gradient)
    assert_close(summarize(metrics)["student_grad_norm"], optax.tree.norm(gradient))
    stepped = jax.tree.map(lambda p, g: p - 0.5 * g, before.student, gradient)
    assert_close(after.student, stepped)
    assert after.soft_prompt is None and after.optimizers.keys() == {"student"}


def test_distillation_adds_its_terms():
    terms = (("cross_entropy", 0.3), ("forward_kl", 0.7))
    after, metrics = update(method(student_terms=terms, teacher_view="plain"))
    (value, sums), gradient = dense_student(
        state().student, state().soft_prompt, terms=(0.3, 0.7, 0)
    )
    assert_close(summarize(metrics)["student_loss"], value)
    assert_close(metrics.sums["cross_entropy"], sums["cross_entropy"].sum()[None])
    assert_close(metrics.sums["forward_kl"], sums["forward_kl"].sum()[None])
    assert_close(student_gradient(after), gradient)
    (_, sums), _ = dense_prompt(state().soft_prompt, state().student, alpha=0)
    assert_close(metrics.sums["kl_plain"], sums["kl_plain"].sum()[None])


def test_a_term_that_is_named_twice_is_refused():
    with pytest.raises(ValueError, match="reverse_kl, reverse_kl: expected each name once"):
        method(student_terms=(("reverse_kl", 0.5), ("reverse_kl", 0.5)))


# PromptKD


def test_promptkd_is_algorithm_1():
    """The prompt by equation 3, then the student by equation 4 against the prompt just updated."""
    before = state()
    after, metrics = update(method())
    (loss, sums), gradient = dense_prompt(before.soft_prompt, before.student, alpha=3 / 4)
    assert_close(prompt_gradient(after), gradient)
    assert_close(after.soft_prompt, before.soft_prompt - 0.5 * gradient)
    for name, found in sums.items():
        assert_close(metrics.sums[name], found.sum()[None])
    assert_close(summarize(metrics)["prompt_loss"], loss)

    (loss, _), gradient = dense_student(before.student, after.soft_prompt)
    assert_close(student_gradient(after), gradient)
    assert_close(summarize(metrics)["student_loss"], loss)
    _, stale = dense_student(before.student, before.soft_prompt)
    difference = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), gradient, stale)
    assert max(jax.tree.leaves(difference)) > 1e-3  # else this could not tell which prompt it was


def test_metrics_of_the_student():
    after, metrics = update(method())
    found = summarize(metrics)
    (_, sums), _ = dense_student(state().student, after.soft_prompt)
    assert_close(found["student_entropy"], sums["entropy"].sum() / 20)
    assert_close(found["agreement"], sums["agreement"].sum() / 20)
    assert 0 < found["agreement"] < 1
    assert found["response_length"] == 5 and found["tokens"] == 30
    assert_close(found["prompt_norm"], jnp.linalg.norm(after.soft_prompt))


def test_the_regularisation_falls_linearly_to_exactly_0():
    now, weights = state(), []
    for _ in range(STEPS):
        before, (now, metrics) = now, update(method(), now)
        weights.append(summarize(metrics)["regularization_weight"])
    assert weights == [3 / 4, 2 / 4, 1 / 4, 0]
    (loss, _), _ = dense_prompt(before.soft_prompt, before.student, alpha=0)
    assert_close(summarize(metrics)["prompt_loss"], loss)


def test_with_a_lag_the_student_sees_the_prompt_before_its_update():
    """Which is no other update of the prompt."""
    before = state()
    after, metrics = update(method(prompt_lag=1, gradient_accumulation_steps=2), before)
    (_, sums), expected = dense_student(before.student, before.soft_prompt)
    assert_close(student_gradient(after), expected)
    reverse_kl = metrics.sums["reverse_kl"].sum()
    np.testing.assert_allclose(reverse_kl, sums["reverse_kl"].sum(), rtol=1e-5)
    _, expected = dense_prompt(before.soft_prompt, before.student, alpha=1 - 1 / STEPS)
    assert_close(prompt_gradient(after), expected)


def test_no_regularisation_is_the_last_update_without_the_plain_teacher():
    last = state(step=STEPS - 1)
    with_it, measured = update(method(), last)
    without, fewer = update(method(regularization=0.0), last)
    assert_close(prompt_gradient(without), prompt_gradient(with_it))
    assert_close(student_gradient(without), student_gradient(with_it))
    assert measured.sums.keys() - fewer.sums.keys() == {"prompt_regularizer", "kl_plain"}


def test_a_prompt_without_effect_gets_no_gradient():
    """A teacher whose attention adds nothing cannot see the prompt; its positions are relative."""
    deaf = jax.tree.map(lambda x: x, teacher_params())
    deaf["layers"]["attention"]["out"]["kernel"] *= 0
    before = state()
    after, metrics = update(method(), before, teacher=deaf)
    assert (prompt_gradient(after) == 0).all()
    assert_close(after.soft_prompt, before.soft_prompt, 0)
    assert abs(metrics.sums["prompt_regularizer"]).max() < 1e-5
    assert_close(metrics.sums["kl_prompted"], metrics.sums["kl_plain"])
    assert_close(metrics.losses["student"], metrics.sums["kl_plain"])
    assert after.skipped == 0


def test_what_stands_behind_a_row_changes_nothing():
    """Neither its token values, EOS or not, nor tokens that are EOS inside of the row."""
    rows = batch()
    behind = np.arange(12) >= rows.lengths[:, None]
    other = rows._replace(tokens=np.where(behind, 7, rows.tokens))
    for each in (method(), sft()):
        found, expected = update(each, rows=other)[0], update(each)[0]
        assert_close(student_gradient(found), student_gradient(expected), 1e-7)
    inside = rows._replace(tokens=rows.tokens.copy())
    inside.tokens[0, 5] = EOS
    assert update(sft(), rows=inside)[1].counts.sum() == 20


def test_the_state_is_donated():
    before = jax.tree.map(jnp.copy, state())
    after, _ = compiled(method())(before, teacher_params(), batch())
    assert all(x.is_deleted() for x in jax.tree.leaves((before.student, before.soft_prompt)))
    assert not any(x.is_deleted() for x in jax.tree.leaves((after, teacher_params())))
    assert jax.tree.structure(after) == jax.tree.structure(before)


# Accumulation


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("make", [sft, method])
def test_accumulation_changes_nothing(make, parts):
    """Micro-batches of unequal numbers of tokens give the update of one batch."""
    whole, expected = update(make())
    cut, found = update(make(gradient_accumulation_steps=parts))
    counts = (batch().lengths - batch().prompt_lengths).reshape(-1, parts).sum(0)
    assert len(set(counts)) > 1
    np.testing.assert_array_equal(found.counts, counts)
    assert_close(student_gradient(cut), student_gradient(whole))
    if make is method:
        assert_close(prompt_gradient(cut), prompt_gradient(whole))
    for name, value in summarize(expected).items():
        np.testing.assert_allclose(summarize(found)[name], value, rtol=2e-5, err_msg=name)


@pytest.mark.parametrize(
    "make, parts, widths",
    [(method, 1, [12]), (sft, 2, [8, 12]), (method, 4, 2 * [4, 8, 12, 12])],
)
def test_rows_of_like_length_in_fewer_columns(make, parts, widths, monkeypatch):
    """Rows of 12, 2, 9 and 7 tokens, in 4, 8 or 12 columns; in the soft prompt's update, and then
    in the student's; of one micro-batch in both at once."""
    whole, expected = update(make())
    taken = []

    def noted(rows, width):
        jax.debug.callback(lambda: taken.append(width))
        return truncate(rows, width)

    monkeypatch.setattr(micro_batches, "truncate", noted)
    cut, found = update(make(gradient_accumulation_steps=parts, length_buckets=3))
    jax.effects_barrier()
    assert taken == widths
    assert_close(student_gradient(cut), student_gradient(whole))
    if make is method:
        assert_close(prompt_gradient(cut), prompt_gradient(whole))
    for name, value in summarize(expected).items():
        np.testing.assert_allclose(summarize(found)[name], value, rtol=2e-5, err_msg=name)


@pytest.mark.parametrize(
    "changes",
    [{"conventions": PRESETS["faithful"]}, {"gradient_accumulation_steps": 2, "minibatches": 2}],
)
def test_rows_stay_in_their_part_where_that_matters(changes):
    changes = {"gradient_accumulation_steps": 4} | changes
    expected, _ = counted(sft(**changes))
    found, _ = counted(sft(length_buckets=3, **changes))
    np.testing.assert_array_equal(found, expected)


FIRST = np.array([1, 0, 1, 0], np.float32)  # the rows of the first of two micro-batches


def mean_of_means() -> np.ndarray:
    """The weight of each row in the mean over micro-batches of means over their tokens."""
    counts = batch().lengths - batch().prompt_lengths
    first, last = counts[FIRST == 1].sum(), counts[FIRST == 0].sum()
    return np.where(FIRST, 1 / (2 * first), 1 / (2 * last)).astype(np.float32)


def test_mean_of_means():
    conventions = Conventions(mean_of_means=True)
    after, metrics = update(sft(gradient_accumulation_steps=2, conventions=conventions))
    weights = mean_of_means()
    (value, _), gradient = dense_student(
        state().student, state().soft_prompt, terms=(1, 0, 0), weights=weights
    )
    assert_close(student_gradient(after), gradient)
    assert_close(summarize(metrics, conventions)["student_loss"], value)
    (other, _), _ = dense_student(state().student, state().soft_prompt, terms=(1, 0, 0))
    assert abs(other - value) > 1e-2
    assert_close(summarize(metrics)["student_loss"], other)


PUBLISHED = method(
    gradient_accumulation_steps=2,
    conventions=Conventions(mean_of_means=True, stale_prompt=True, early_clock=True),
)


@pytest.mark.parametrize("step, alpha", [(0, (3 / 4, 2 / 4)), (2, (1 / 4, 0)), (STEPS - 1, (0, 0))])
def test_published_conventions(step, alpha):
    """Of two micro-batches, only the last sees the new prompt, and its clock is one ahead."""
    before = state(step=step)
    after, metrics = update(PUBLISHED, before)
    weights = mean_of_means()
    (loss, _), gradient = dense_prompt(
        before.soft_prompt, before.student, alpha=np.where(FIRST, *alpha), weights=weights
    )
    assert_close(prompt_gradient(after), gradient)
    assert_close(summarize(metrics, PUBLISHED.conventions)["prompt_loss"], loss)

    (old, _), stale = dense_student(before.student, before.soft_prompt, weights=weights * FIRST)
    (new, _), fresh = dense_student(
        before.student, after.soft_prompt, weights=weights * (1 - FIRST)
    )
    assert_close(student_gradient(after), jax.tree.map(jnp.add, stale, fresh))
    assert_close(summarize(metrics, PUBLISHED.conventions)["student_loss"], old + new)


def test_gradients_in_half_precision_are_summed_in_float32():
    """In bfloat16, 256 + 1 is 256. A micro-batch is traced once, for shapes and loop."""
    one = {"x": jnp.ones((512, 3), jnp.bfloat16)}
    gradients = Gradients(one, jnp.float32(2), {"kl": jnp.float32(3)})
    traced = []

    def gradients_of(x):
        traced.append(x)
        return gradients._replace(by_group=x)

    found = accumulate(gradients_of, (one,))
    assert len(traced) == 1
    assert found.by_group["x"].dtype == jnp.bfloat16
    assert found.loss.shape == found.sums["kl"].shape == (512,)
    np.testing.assert_array_equal(found.by_group["x"], 512)


def test_response_tokens_that_no_loss_sees_are_counted():
    """Rows of 9, 1, 5 and 5 response tokens, of which losses see 5."""
    lengths = batch().lengths - batch().prompt_lengths
    assert max(lengths) > 5
    counts, beyond = counted(sft(response_capacity=5))
    np.testing.assert_array_equal(counts, [np.minimum(lengths, 5).sum()])
    assert beyond == np.maximum(lengths - 5, 0).sum()
    _, beyond = counted(sft())
    assert beyond == 0


def test_a_student_in_half_precision_keeps_its_dtypes_over_several_updates():
    """And the same state gives the same update: the rounding is decided by the state."""
    optimizers = Optimizers(adamw(lambda _: 1e-4, weight_decay=0.1, max_grad_norm=1.0))
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state().student)
    before = init_state({"student": params}, optimizers, jax.random.key(0))
    step = jit(
        functools.partial(
            train_step,
            method=sft(passes=3, gradient_accumulation_steps=2),
            models=Models(STUDENT),
            optimizers=optimizers,
        )
    )
    after, metrics = step(before, None, batch())
    again, _ = step(before, None, batch())
    jax.tree.map(np.testing.assert_array_equal, after.params, again.params)
    types = [jax.tree.map(lambda x: x.dtype, s) for s in (before, after)]
    assert types[0] == types[1]
    apart = jax.tree.map(lambda a, b: jnp.mean(a != b), params, after.student)
    assert 0 < np.mean(jax.tree.leaves(apart)) < 1
    assert np.isfinite(metrics.grad_norms["student"])


def test_summarize_divides_once():
    sums, counts = {"loss": np.array([6.0, 4.0])}, np.array([3.0, 1.0])
    sums, norms = {"kl": sums["loss"] / 2}, {"student": np.float32(7)}
    metrics = Metrics({"student": 2 * sums["kl"]}, norms, sums, counts, {"tokens": np.int32(4)})
    expected = {"student_loss": 10 / 4, "kl": 5 / 4, "student_grad_norm": 7, "tokens": 4}
    assert summarize(metrics) == expected
    expected |= {"student_loss": 6 / 2, "kl": 3 / 2}
    assert summarize(metrics, Conventions(mean_of_means=True)) == expected


# The student's own rows


def test_on_policy_rows_come_from_the_student_and_carry_no_gradient():
    """Rows of the update after step k are drawn with fold_in(key, k), and then they are data."""
    before = state(step=2)
    rows, ended = student_rows(before.student, jax.random.fold_in(before.key, 2))
    after, metrics = update(ON_POLICY, before)
    counts = rows.lengths - rows.prompt_lengths
    assert metrics.counts.sum() == counts.sum()
    found = summarize(metrics)
    assert found["response_length"] == counts.mean() and found["eos_rate"] == ended.mean()
    assert found["tokens"] == rows.lengths.sum()

    _, gradient = dense_prompt(before.soft_prompt, before.student, alpha=1 / 4, rows=rows)
    assert_close(prompt_gradient(after), gradient)
    (loss, _), gradient = dense_student(before.student, after.soft_prompt, rows=rows)
    assert_close(student_gradient(after), gradient)
    assert_close(found["student_loss"], loss)


def test_the_same_state_gives_the_same_update_and_the_next_one_other_rows():
    first, metrics = update(ON_POLICY)
    again, _ = update(ON_POLICY)
    for a, b in zip(jax.tree.leaves(first.student), jax.tree.leaves(again.student)):
        np.testing.assert_array_equal(a, b)
    _, later = update(ON_POLICY, state(step=2))
    assert summarize(later)["kl_plain"] != summarize(metrics)["kl_plain"]


def broken(where: str):
    """A state and a teacher with one NaN among the parameters, in `where`."""
    before = update(ON_POLICY)[0]  # with momentum, so that a change of it would show
    teacher = jax.tree.map(jnp.copy, teacher_params())
    if where == "teacher":
        teacher["lm_head"] = teacher["lm_head"].at[0, 0].set(jnp.nan)
    elif where == "student":
        scale = before.student["final_norm"]["scale"].at[0].set(jnp.nan)
        before.student["final_norm"]["scale"] = scale
    elif where == "soft_prompt":
        before = before.replace(
            params=before.params | {"soft_prompt": before.soft_prompt.at[0, 0].set(jnp.nan)}
        )
    return before, teacher


@pytest.mark.parametrize("where", ["student", "soft_prompt", "teacher"])
def test_an_update_that_is_not_finite_changes_nothing_but_the_counters(where):
    before, teacher = broken(where)
    after, _ = update(ON_POLICY, before, teacher=teacher)
    after, metrics = update(ON_POLICY, after, teacher=teacher)
    assert (after.step, after.skipped, after.skipped_in_a_row) == (3, 2, 2)
    assert metrics.scalars["skipped_in_a_row"] == 2
    for name in ("params", "optimizers"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(before, name))
    assert jax.random.key_data(after.key).tolist() == jax.random.key_data(before.key).tolist()

    healed = after.replace(params=state().params)
    after, _ = update(ON_POLICY, healed)
    assert (after.step, after.skipped, after.skipped_in_a_row) == (4, 2, 0)
    assert optax.tree.norm(jax.tree.map(jnp.subtract, after.student, healed.student)) > 0


# Nothing is computed twice


def products(jaxpr) -> list[tuple[tuple[int, ...], int, bool]]:
    """(shape, floating-point operations, whether of attention scores) of every matrix product.

    Counted on the jaxpr, where a scanned layer shows its length, and not on the compiled program,
    where back ends rename products. Products of attention are those with batch dimensions.
    """
    found = []
    for equation, times in equations(jaxpr):
        if equation.primitive.name == "dot_general":
            (contracted, _), (batched, _) = equation.params["dimension_numbers"]
            shape = equation.outvars[0].aval.shape
            depth = np.prod([equation.invars[0].aval.shape[i] for i in contracted])
            flops = int(2 * np.prod(shape) * depth * times)
            found.append((tuple(sorted(shape)), flops, bool(batched)))
    return found


def traced_products(teacher: Decoder, student: Decoder, **changes):
    rows, length, prompt = 4, 64, 2
    int32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    each = method(
        total_steps=100,
        response_capacity=length - 1,
        prompt_capacity=1,
        vocab_size=512,
        **changes,
    )
    step = functools.partial(
        train_step, method=each, models=Models(student, teacher), optimizers=OPTIMIZERS
    )
    soft_prompt = jax.ShapeDtypeStruct((prompt, teacher.config.width), jnp.float32)
    before = jax.eval_shape(
        lambda student, soft: init_state(
            {"student": student, "soft_prompt": soft}, OPTIMIZERS, jax.random.key(0)
        ),
        abstract_params(student.config),
        soft_prompt,
    )
    data = Batch(int32((rows, length)), int32((rows,)), int32((rows,)))
    return products(jax.make_jaxpr(step)(before, abstract_params(teacher.config), data).jaxpr)


def weights(decoder: Decoder) -> int:
    """Entries of the layers' matrices and of the head."""
    layers = abstract_params(decoder.config)["layers"]
    kernels = [x.size for x in jax.tree.leaves(layers) if x.ndim > 2]
    return sum(kernels) + decoder.config.vocab_size * decoder.config.width


@pytest.mark.parametrize(
    "teacher, parts", [(llama(6, 256, 1024, 512), 4), (llama(1, 64, 256, 512), 1)]
)
def test_matrix_products_of_an_update(teacher, parts):
    """Three forwards and a backward without weights of the teacher; forward and backward of the
    student: 8 N_T + 6 N_S operations a token, attention scores apart. Once with a large teacher
    and once with a small one, beside which a second forward of the student would show."""
    teacher, student = Decoder(teacher), Decoder(llama(4, 128, 512, 512))
    tokens = 4 * 64
    found = traced_products(teacher, student)
    total = sum(flops for _, flops, attention in found if not attention)
    needed = (8 * weights(teacher) + 6 * weights(student)) * tokens
    print(f"products: {total / needed:.3f} of what is needed")
    assert 0.95 * needed < total <= 1.1 * needed
    shapes = {shape for shape, _, _ in found}
    assert (128, 512) in shapes  # gradients of the student's feed-forward
    assert (teacher.config.width, teacher.config.mlp_width) not in shapes  # and none of this

    def saved(**changes) -> float:
        """Operations, in forwards of the teacher and its head."""
        fewer = traced_products(teacher, student, **changes)
        fewer = sum(flops for _, flops, attention in fewer if not attention)
        return (total - fewer) / (2 * weights(teacher) * tokens)

    assert saved(regularization=0.0) == pytest.approx(1, rel=0.02)
    # With a lag its head alone is multiplied again; several micro-batches add no forward pass.
    layers = 1 - 512 * teacher.config.width / weights(teacher)
    saved_by_lag = saved(prompt_lag=1, gradient_accumulation_steps=parts)
    assert saved_by_lag == pytest.approx(layers * (64 + 2) / 64, rel=0.01)
    # Of two buckets one is taken: a whole step, and one with half as many columns in its layers.
    more = -saved(length_buckets=2) * 2 * weights(teacher) * tokens
    assert total / 2 < more < 0.6 * total


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_teacher_and_student(family):
    """A step of PromptKD with rollouts, dropout and losses on inner layers fits together, in shapes
    alone; what they compute is tested where it is."""
    config = from_hugging_face(FAMILIES[family])
    decoder, params = Decoder(config), abstract_params(config)
    inner = (HiddenTerm("mse"), HiddenTerm("relation", layers="uniform"))
    chosen = dataclasses.replace(
        ON_POLICY,
        vocab_size=30,
        hidden_terms=inner,
        dropout=True,
        router_balance=0.01 if config.experts else 0.0,
    )
    width = config.embedding_width
    groups = {"student": params, "soft_prompt": jax.ShapeDtypeStruct((3, width), jnp.float32)}
    begin = functools.partial(init_state, optimizers=OPTIMIZERS, key=jax.random.key(0))
    fixed = dict(method=chosen, models=Models(decoder, decoder), optimizers=OPTIMIZERS)
    before = jax.eval_shape(begin, groups)
    after, metrics = jax.eval_shape(functools.partial(train_step, **fixed), before, params, batch())
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), before
    )
    assert {"mse_1_1", "relation_0_0", "reverse_kl"} <= metrics.sums.keys()
    assert ("router_balance" in metrics.sums) == (config.experts is not None)
