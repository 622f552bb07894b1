"""Each method is a choice of fields: the fact that defines it, against dense losses by `jax.grad`.

Models, rows and the dense pieces are those of `test_step`. The optimizers' first states are the
gradients themselves, and each group has a rate of its own.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.methods import (
    OPTIMIZERS,
    begin,
    dense_student,
    gradient,
    in_parts,
    moved,
    plain,
    seen,
    update,
)
from helpers.steps import (
    EOS,
    STEPS,
    STUDENT,
    TEACHER,
    VOCABULARY,
    assert_close,
    batch,
    changed,
    jit,
    kl,
    log_probs,
    random_params,
    student_rows,
    teacher_params,
)

from promptkd_jax.data.batch import Batch, gather, responses
from promptkd_jax.distill.losses import policy_gradient
from promptkd_jax.distill.losses.hidden_loss import HiddenTerm
from promptkd_jax.distill.losses.policy_gradient import PolicyGradient
from promptkd_jax.distill.methods.method import Method
from promptkd_jax.distill.replay import Replay, adapt, draw, empty_replay, push
from promptkd_jax.distill.state import TrainState, summarize
from promptkd_jax.distill.step import write_ahead
from promptkd_jax.distill.targets import target_rows
from promptkd_jax.distill.teacher import Models
from promptkd_jax.infra import specs
from promptkd_jax.models.decoder import Decoder
from promptkd_jax.models.language_model import LanguageModel
from promptkd_jax.models.layers.quantization import QUANTIZE, quantize_params
from promptkd_jax.models.sampler import SamplingModel, row_keys, sample
from promptkd_jax.models.sampling_rules import Sampling

# The dense definitions


def rows_of(method: Method, student, key, replay: Replay | None = None, rows=None):
    """`target_rows` of the batch in the first step."""
    return _rows_of(method, student, teacher_params(), key, replay, rows or batch())


@functools.partial(jit, static_argnums=0)
def _rows_of(method: Method, student, teacher, key, replay, rows: Batch):
    second = SamplingModel(TEACHER, teacher) if method.teacher_share else None
    return target_rows(method, STUDENT, student, rows, replay, key, step=0, teacher=second)


def response(rows: Batch, row: int) -> list[int]:
    return np.asarray(rows.tokens)[row, rows.prompt_lengths[row] : rows.lengths[row]].tolist()


# GKD: rows of the student in parts


def gkd(share: float, **changes) -> Method:
    return plain(targets="mixed", on_policy_share=share, **changes)


def test_gkd_on_own_rows_alone_is_promptkd_without_a_prompt():
    before = begin()
    found, measured = update(gkd(1.0), before)
    promptkd = plain(targets="student", teacher_view="prompted")
    expected, told = update(promptkd, begin(soft_prompt=jnp.zeros((0, 32))))
    measured, told = summarize(measured), summarize(told)
    for name in ("student_loss", "student_entropy", "agreement", "tokens", "eos_rate"):
        assert measured[name] == pytest.approx(told[name], rel=1e-6), name
    assert_close(found.student, expected.student)
    assert moved(found.student, before.student) > 0.01
    assert told["prompt_regularizer"] == pytest.approx(0, abs=1e-6)  # no prompt, no effect


def test_gkd_on_gold_rows_alone_is_distillation_on_the_data():
    before = begin()
    after, metrics = update(gkd(0.0), before)
    (value, _), expected = dense_student(before.student, reverse=1)
    assert_close(gradient(after), expected)
    assert_close(summarize(metrics)["student_loss"], value)
    assert summarize(metrics)["on_policy_share"] == 0


QUARTER = gkd(0.25, student_terms=(("cross_entropy", 0.4), ("reverse_kl", 0.6)))


def test_a_mixed_row_is_the_students_own_or_the_datas():
    student = begin().student
    share, kinds = [], set()
    for number in range(200):
        key = jax.random.key(number)
        (rows, own, _), _ = rows_of(QUARTER, student, key)
        share.append(np.asarray(own))
        if number < 8:
            written, _ = student_rows(student, key)
            for b in range(4):
                source = written if own[b] else batch()
                assert response(rows, b) == response(source, b)
                assert rows.prompt_lengths[b] == batch().prompt_lengths[b]
                kinds.add((bool(own[b]), b))
    assert len(kinds) == 8  # every row was seen as both
    share = np.array(share)
    assert abs(share.mean() - 0.25) < 5 * np.sqrt(0.25 * 0.75 / share.size)
    assert 20 < (share.sum(axis=1) == 1).sum() < 180  # not one coin for all rows


MIXED_STEP = 2


@pytest.mark.parametrize("parts", [1, 2])
def test_mixed_targets_whole_or_in_parts(parts):
    """The coin is that of the state's key and step; cross entropy counts the data's rows alone."""
    before = begin(step=MIXED_STEP)
    key = jax.random.fold_in(before.key, MIXED_STEP)
    (rows, own, _), _ = rows_of(QUARTER, before.student, key)
    assert 0 < own.sum() < 4
    after, metrics = update(in_parts(QUARTER, parts), before)
    found = summarize(metrics)
    (value, sums), expected = dense_student(before.student, rows, gold=0.4 * ~own, reverse=0.6)
    assert_close(gradient(after), expected)
    assert_close(found["student_loss"], value)
    assert_close(metrics.sums["cross_entropy"].sum(), (sums[0] * ~own).sum())
    assert found["on_policy_share"] == own.mean()
    (_, other, _), _ = rows_of(QUARTER, before.student, jax.random.fold_in(before.key, 0))
    assert (own != other).any()


# DistiLLM: replay


def numbered(*numbers: int) -> Batch:
    """Rows that can be told apart: row n answers with n tokens, of which the last is EOS."""
    tokens = np.zeros((len(numbers), 12), np.int32)
    for row, number in zip(tokens, numbers):
        row[: 2 + number] = 10 + number
        row[1 + number] = EOS
    prompt_lengths = np.full(len(numbers), 2, np.int32)
    return Batch(tokens, prompt_lengths, prompt_lengths + np.int32(numbers))


def test_a_draw_is_what_was_pushed_with_its_masks():
    """The first response token and the EOS are predicted, each from the token before it."""
    replay = push(empty_replay(4, 14), numbered(1, 2, 3, 4))
    assert replay.full and not push(empty_replay(5, 14), numbered(1, 2, 3, 4)).full
    drawn = draw(replay, jax.random.key(0), 4)
    assert drawn.tokens.shape == (4, 14)
    where = responses(drawn, 11)
    numbers = np.asarray(where.mask.sum(axis=1), int)
    assert sorted(numbers) == [1, 2, 3, 4] and numbers.tolist() != [1, 2, 3, 4]
    for b, number in enumerate(numbers):
        real = where.mask[b] == 1
        assert where.labels[b][real].tolist() == [10 + number] * (number - 1) + [EOS]
        assert where.positions[b][real].tolist() == list(range(1, 1 + number))
        row = numbered(number)
        assert response(drawn, b) == response(row, 0)
        assert drawn.tokens[b, :12].tolist() == row.tokens[0].tolist()


def test_the_oldest_rows_make_room():
    replay = empty_replay(5, 12)
    for numbers in ((1, 2, 3), (4, 5), (6, 7, 8), (9,)):
        replay = push(replay, numbered(*numbers))
    kept = replay.rows.lengths - replay.rows.prompt_lengths
    assert sorted(kept.tolist()) == [5, 6, 7, 8, 9] and replay.count == 9
    with pytest.raises(ValueError, match="a replay buffer of 5 rows cannot take 6 at once"):
        push(replay, numbered(*range(1, 7)))


def test_draws_are_uniform_and_without_repetition():
    replay, keys = push(empty_replay(6, 12), numbered(1, 2, 3, 4, 5, 6)), 3000
    drawn = jax.vmap(lambda key: draw(replay, key, 2))(jax.random.split(jax.random.key(1), keys))
    first, second = (np.asarray(drawn.lengths - drawn.prompt_lengths)[:, i] for i in (0, 1))
    assert (first != second).all()
    pairs = np.bincount(6 * (first - 1) + second - 1, minlength=36).reshape(6, 6)
    probability = (1 - np.eye(6)) / 30
    spread = np.sqrt(keys * probability * (1 - probability))
    assert (abs(pairs - keys * probability) <= 5 * spread).all()


SCHEDULED = plain(targets="replay", max_new_tokens=1)


@jit
def scheduled(replay: Replay, step):
    """How often rows are the data's, of the buffer and new, `[3]`, over 4000 keys."""

    def one(key):
        (_, own, _), after = target_rows(
            SCHEDULED, STUDENT, begin().student, batch(), replay, key, step=step, teacher=None
        )
        pushed = after.count - replay.count
        return jnp.where(pushed == 4, 2, own.all().astype(int)), pushed, own

    case, pushed, own = jax.vmap(one)(jax.random.split(jax.random.key(3), 4000))
    whole = jnp.isin(pushed, jnp.array([0, 4])) & (own.all(axis=1) | ~own.any(axis=1))
    return (case[:, None] == jnp.arange(3)).mean(axis=0), whole.all()


@pytest.mark.parametrize(
    "threshold, step, full, expected",
    [
        (0.0, 1, True, (1, 0, 0)),
        (1.0, 0, True, (0, 0, 1)),
        (1.0, 0, False, (0, 0, 1)),
        (1.0, STEPS, True, (0, 1, 0)),
        (0.6, 1, True, (0.4, 0.15, 0.45)),
        (0.6, 1, False, (0.4, 0, 0.6)),
        (0.6, 3, True, (0.4, 0.45, 0.15)),
    ],
)
def test_the_replay_schedule(threshold, step, full, expected):
    """phi (1 - k / K) new, phi in all of the student, the rest data; new until the buffer fills."""
    replay = empty_replay(6, 12, threshold).replace(count=jnp.int32(6 if full else 5))
    found, whole = scheduled(replay, step)
    expected = np.array(expected)
    assert whole  # a batch is of one kind
    assert (abs(found - expected) <= 5 * np.sqrt(expected * (1 - expected) / 4000)).all()


REPLAY = plain(targets="replay", student_terms=(("cross_entropy", 0.4), ("reverse_kl", 0.6)))


def test_a_step_with_replay_on_the_data():
    """And then the buffer stays as it is."""
    full = push(empty_replay(4, 12), numbered(1, 2, 3, 4))
    before = begin(replay=full)
    after, metrics = update(REPLAY, before)
    (value, _), expected = dense_student(before.student, gold=0.4, reverse=0.6)
    assert_close(gradient(after), expected)
    assert_close(summarize(metrics)["student_loss"], value)
    jax.tree.map(np.testing.assert_array_equal, after.replay, full)


def test_a_step_with_replay_on_new_rows_keeps_them():
    before = begin(replay=empty_replay(4, 12, threshold=1.0))
    after, metrics = update(REPLAY, before)
    rows, _ = student_rows(before.student, jax.random.fold_in(before.key, 0))
    _, expected = dense_student(before.student, rows, reverse=0.6)
    assert_close(gradient(after), expected)
    jax.tree.map(np.testing.assert_array_equal, after.replay.rows, rows)
    assert after.replay.count == 4
    found = summarize(metrics)
    assert found["replay_threshold"] == 1 and found["on_policy_share"] == 1


def test_a_step_with_replay_on_old_rows():
    """Four of a buffer of four: all of them, with the masks that they were pushed with."""
    rows = numbered(2, 9, 1, 5)
    before = begin(STEPS, push(empty_replay(4, 12, threshold=1.0), rows))
    after, metrics = update(REPLAY, before)
    (value, _), expected = dense_student(before.student, rows, reverse=0.6)
    assert metrics.counts.sum() == 2 + 9 + 1 + 5
    assert_close(gradient(after), expected)
    assert_close(summarize(metrics)["student_loss"], value)
    jax.tree.map(np.testing.assert_array_equal, after.replay, before.replay)


def test_other_targets_leave_the_buffer_alone():
    full = push(empty_replay(4, 12, threshold=1.0), numbered(1, 2, 3, 4))
    (_, own, _), after = rows_of(plain(), begin().student, jax.random.key(0), full)
    jax.tree.map(np.testing.assert_array_equal, after, full)
    assert not own.any()


def test_the_threshold_follows_the_validation_loss():
    """It rises with a rise of at least the tolerance over the loss at the last rise."""
    replay, seen = empty_replay(2, 3), []
    for loss in (2.0, 2.0625, 1.5, 2.09375, 2.125, 2.1875, 2.25, 2.5):
        replay = adapt(replay, loss, tolerance=0.125, increment=0.4)
        seen.append((round(float(replay.threshold), 3), float(replay.validation_loss)))
    stays = [(0.0, 2.0)] * 4  # the first is what later ones are compared with, lower ones too
    assert seen == [*stays, (0.4, 2.125), (0.4, 2.125), (0.8, 2.25), (1.0, 2.5)]


# MiniLLM


SHARE = 0.3


@functools.partial(jit, static_argnames=("share", "vocab_size", "new"))
def spoken(requests, lengths, second, active=None, *, share=0.0, vocab_size=VOCABULARY, new=6):
    """What the student writes, at a share together with a `second` model."""
    return sample(
        STUDENT,
        random_params(STUDENT.config, 22),
        requests,
        lengths,
        row_keys(jax.random.key(8), jnp.arange(len(lengths))),
        max_new_tokens=new,
        sampling=Sampling(eos_ids=(EOS,)),
        vocab_size=vocab_size,
        active=active,
        second=None if second is None else SamplingModel(TEACHER, second),
        second_share=share,
    )


def mixture(tokens, vocab_size: int) -> np.ndarray:
    """(1 - a) q + a p after `tokens` `[T]`."""
    rows = np.zeros((4, 12), np.int32)  # as other tests have them compiled
    rows[:, : len(tokens)] = tokens
    q, p = (
        jax.nn.softmax(seen(decoder, params, rows)[0, len(tokens) - 1, :vocab_size])
        for decoder, params in ((STUDENT, begin().student), (TEACHER, teacher_params()))
    )
    assert 0.5 * abs(p - q).sum() > 0.2  # else it could not be told which was drawn from
    return np.asarray((1 - SHARE) * q + SHARE * p, np.float64)


def assert_frequencies(tokens, probability: np.ndarray) -> None:
    """Every token within 5 standard deviations of its expected count."""
    count = np.bincount(tokens, minlength=len(probability))
    spread = np.sqrt(len(tokens) * probability * (1 - probability))
    assert (abs(count - len(tokens) * probability) <= 5 * spread).all(), (count, probability)


def test_teacher_and_student_write_together():
    """Each token is of the mixture, given those before it, whoever they came from."""
    rows, vocab_size, request = 6000, 5, [11, 7, 30]
    requests = np.tile(np.int32(request), (rows, 1))
    lengths = np.full(rows, 3, np.int32)
    out = spoken(requests, lengths, teacher_params(), share=SHARE, vocab_size=vocab_size, new=2)
    first, second = np.asarray(out.tokens)[:, 3:].T
    assert_frequencies(first, mixture(request, vocab_size))
    token = np.bincount(first).argmax()
    given = mixture([*request, token], vocab_size)
    assert_frequencies(second[first == token], given)


def test_no_share_is_the_student_alone_and_rows_that_are_off_stay_requests():
    tokens, lengths = batch().tokens[:, :4], batch().prompt_lengths
    alone = spoken(tokens, lengths, None)
    active = np.array([True, False, True, False])
    found = spoken(tokens, lengths, teacher_params(), active)
    np.testing.assert_array_equal(found.tokens[active], alone.tokens[active])
    np.testing.assert_array_equal(found.lengths[active], alone.lengths[active])
    np.testing.assert_array_equal(found.lengths[~active], lengths[~active])
    assert not found.ended[~active].any()
    requests = np.where(np.arange(4) < lengths[:, None], tokens, 0)
    np.testing.assert_array_equal(found.tokens[~active, :4], requests[~active])
    assert (found.tokens[~active, 4:] == 0).all()


MINILLM = plain(
    targets="student",
    response_capacity=8,
    teacher_share=0.2,
    student_terms=(("policy_gradient", 1.0), ("reverse_kl", 0.5)),
)


def positions(rows: Batch):
    return responses(rows, MINILLM.response_capacity)


@jit
def dense_target(student, teacher, rows: Batch) -> policy_gradient.PolicyTarget:
    """What the answers are worth, from all logits."""
    where = positions(rows)

    def of_labels(decoder, params):
        both = gather(log_probs(decoder, params, rows.tokens), where)
        return jnp.take_along_axis(both, where.labels[..., None], axis=-1)[..., 0]

    q, p = of_labels(STUDENT, student), of_labels(TEACHER, teacher)
    return policy_gradient.policy_target(where.labels, where.mask, q, p, 0.2, PolicyGradient())


@jit
@jax.value_and_grad
def dense_policy(student, teacher, rows: Batch, target: policy_gradient.PolicyTarget):
    """The mean over response tokens of MiniLLM's two terms."""
    where = positions(rows)
    learner = gather(log_probs(STUDENT, student, rows.tokens), where)
    teacher = gather(log_probs(TEACHER, teacher, rows.tokens), where)
    policy = policy_gradient.clipped_policy_gradient(target, learner, 0.2)
    return (where.mask * (policy + 0.5 * kl(learner, teacher))).sum() / where.mask.sum()


def own_rows(before: TrainState) -> Batch:
    """What student and teacher write in the first step."""
    return rows_of(MINILLM, before.student, jax.random.fold_in(before.key, 0))[0].rows


def test_minillm():
    before = begin()
    rows = own_rows(before)
    target = dense_target(before.student, teacher_params(), rows)
    mask = positions(rows).mask == 1
    assert target.importance[mask].min() < 0.9 and target.importance[mask].max() > 1.1
    value, expected = dense_policy(before.student, teacher_params(), rows, target)
    after, metrics = update(MINILLM, before)
    assert_close(gradient(after), expected, 1e-5)
    assert_close(summarize(metrics)["student_loss"], value, 1e-5)
    assert {"policy_gradient", "reverse_kl"} <= metrics.sums.keys()


def test_minillm_in_parts_and_passes():
    """Answers are valued once, and whitened over all of the step's; the ratio of later passes is to
    the student that wrote them."""
    before = begin()
    rows = own_rows(before)
    target = dense_target(before.student, teacher_params(), rows)
    student, state = before.student, before.optimizers["student"]
    for _ in range(2):
        _, slope = dense_policy(student, teacher_params(), rows, target)
        updates, state = OPTIMIZERS.student.update(slope, state, student)
        student = optax.apply_updates(student, updates)
    after, _ = update(changed(MINILLM, gradient_accumulation_steps=2, passes=2), before)
    assert_close(after.student, student, 2e-5)


# Rows written a step ahead

STALE = changed(QUARTER, one_step_off_policy=True)


def of_step(step: int) -> Batch:
    """The data's rows in another order for every step."""
    return jax.tree.map(lambda x: np.roll(x, step, axis=0), batch())


def begin_ahead(method: Method, before: TrainState) -> TrainState:
    """With the rows of the first step written."""
    write = functools.partial(write_ahead, method=method, models=Models(STUDENT, TEACHER))
    return jit(write)(before, teacher_params(), of_step(0))


def test_a_frozen_student_writes_the_same_rows_a_step_ahead():
    """So that all that is said of step k is the same."""
    fresh = begin()
    stale = begin_ahead(STALE, fresh)
    for step in range(3):
        fresh_after, expected = update(QUARTER, fresh, of_step(step))
        stale_after, found = update(STALE, stale, of_step(step + 1))
        assert found.scalars.keys() == expected.scalars.keys()
        for name in ("tokens", "response_length", "eos_rate", "on_policy_share"):
            assert found.scalars[name] == expected.scalars[name]
        assert_close(gradient(stale_after), gradient(fresh_after))
        assert_close(found.sums, expected.sums, 1e-5)
        same = dict(params=fresh.params, optimizers=fresh.optimizers)
        fresh, stale = fresh_after.replace(**same), stale_after.replace(**same)


def test_rows_ahead_are_those_of_the_student_before_the_update():
    state, others = begin_ahead(STALE, begin()), 0
    assert state.step == 0
    for step in range(4):
        key, rows = jax.random.fold_in(state.key, step + 1), of_step(step + 1)
        expected, _ = rows_of(STALE, state.student, key, rows=rows)
        after, metrics = update(STALE, state, rows)
        jax.tree.map(np.testing.assert_array_equal, after.pending, expected)
        fresh, _ = rows_of(STALE, after.student, key, rows=rows)
        others += (fresh.rows.tokens != expected.rows.tokens).any()
        trained_on, own, _ = state.pending
        weights = dict(gold=0.4 * ~own, reverse=0.6)
        (value, _), _ = dense_student(state.student, trained_on, **weights)
        assert_close(summarize(metrics)["student_loss"], value)
        assert metrics.scalars["tokens"] == trained_on.lengths.sum()
        state = after
    assert others  # than the student after the update would write


def test_writing_and_updating_need_nothing_of_each_other():
    state = begin_ahead(STALE, begin())
    after, _ = update(STALE, state, of_step(1))
    other = jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), state.pending)
    rows = other.rows._replace(tokens=(other.rows.tokens + 1) % VOCABULARY)
    trained, _ = update(STALE, state.replace(pending=other._replace(rows=rows)), of_step(1))
    jax.tree.map(np.testing.assert_array_equal, trained.pending, after.pending)
    assert moved(trained.params, after.params) > 0
    written, _ = update(STALE, state, of_step(2))
    jax.tree.map(np.testing.assert_array_equal, written.params, after.params)
    assert (written.pending.rows.tokens != after.pending.rows.tokens).any()


def test_a_step_that_is_skipped_moves_the_rows_on():
    """And they stay in the buffer; nothing else changes."""
    method = changed(REPLAY, one_step_off_policy=True)
    state = begin_ahead(method, begin(replay=empty_replay(8, 12, threshold=1.0)))
    first = state.pending.rows
    broken = jax.tree.map(lambda x: x * jnp.nan, teacher_params())
    after, _ = update(method, state, of_step(1), teacher=broken)
    assert (after.step, after.skipped) == (1, 1)
    jax.tree.map(np.testing.assert_array_equal, after.params, state.params)
    jax.tree.map(np.testing.assert_array_equal, after.optimizers, state.optimizers)
    assert (after.pending.rows.tokens != first.tokens).any() and after.replay.count == 8
    both = jax.tree.map(lambda *x: jnp.concatenate(x), first, after.pending.rows)
    jax.tree.map(np.testing.assert_array_equal, after.replay.rows, both)
    healed, metrics = update(method, after, of_step(2))
    assert metrics.scalars["tokens"] == after.pending.rows.lengths.sum()
    assert (healed.skipped, healed.skipped_in_a_row) == (1, 0)
    assert moved(healed.params, after.params) > 0


def test_rows_that_nobody_wrote_ahead():
    with pytest.raises(ValueError, match="write_ahead"):
        update(STALE, begin())
    with pytest.raises(ValueError, match="one_step_off_policy: rows are written a step ahead, but"):
        plain(one_step_off_policy=True)
    with pytest.raises(ValueError, match="one_step_off_policy: policy_gradient needs rows that"):
        changed(MINILLM, one_step_off_policy=True)


# Several responses to a prompt


@pytest.mark.parametrize("ahead", [False, True])
def test_several_responses_to_a_prompt_are_those_of_rows_that_have_it_each(ahead):
    """In parts, whose rows are drawn from all of them, and with dropout, whose keys are of rows."""
    how = dict(gradient_accumulation_steps=2, one_step_off_policy=ahead, dropout=True)
    once = plain(targets="student", **how)
    twice = changed(once, rollouts_per_prompt=2)
    prompts = jax.tree.map(lambda x: x[1:3], batch())
    rows = jax.tree.map(lambda x: np.repeat(x, 2, axis=0), prompts)
    state, other = begin(), begin()
    if ahead:
        write = functools.partial(write_ahead, models=Models(STUDENT, TEACHER))
        state = jit(functools.partial(write, method=twice))(state, teacher_params(), prompts)
        other = jit(functools.partial(write, method=once))(other, teacher_params(), rows)
    after, metrics = update(twice, state, prompts)
    expected, measured = update(once, other, rows)
    jax.tree.map(np.testing.assert_array_equal, after.pending, expected.pending)
    assert_close(after.student, expected.student)
    assert_close(gradient(after), gradient(expected))
    assert summarize(metrics) == pytest.approx(summarize(measured), rel=1e-5)
    assert moved(after.student, begin().student) > 0
    written, _ = rows_of(twice, state.student, jax.random.key(1), rows=prompts)
    responses = [tuple(response(written.rows, row)) for row in range(4)]
    assert len({*responses}) == 4
    assert written.rows.prompt_lengths.tolist() == rows.prompt_lengths.tolist()


# A student that is rounded while it writes


def test_rows_are_those_of_the_rounded_student_and_the_update_is_that_of_the_whole_one():
    whole = plain(targets="student", gradient_accumulation_steps=2)
    rounded, state = changed(whole, rollout_quantize="int8"), begin()
    eight_bits = Decoder(STUDENT.config.replace(quantization=QUANTIZE["int8"]))
    params = quantize_params(state.student, QUANTIZE["int8"])
    how = dict(max_new_tokens=8, sampling=whole.sampling, vocab_size=VOCABULARY)
    write = jit(functools.partial(sample, eight_bits, **how))
    others = 0
    for seed in range(4):
        key, rows = jax.random.key(seed), of_step(seed)
        found, _ = rows_of(rounded, state.student, key, rows=rows)
        keys = row_keys(key, np.arange(4))
        expected = write(params, rows.tokens[:, :4], rows.prompt_lengths, keys)
        np.testing.assert_array_equal(found.rows.tokens, expected.tokens)
        others += (
            found.rows.tokens != rows_of(whole, state.student, key, rows=rows)[0].rows.tokens
        ).any()
    assert others  # than the student as it is would write
    after, metrics = update(rounded, state)
    rows, _ = rows_of(rounded, state.student, jax.random.fold_in(state.key, 0))
    expected, measured = update(
        changed(whole, targets="gold", response_capacity=8), begin(), rows.rows
    )
    assert_close(gradient(after), gradient(expected))
    assert summarize(metrics)["student_loss"] == pytest.approx(summarize(measured)["student_loss"])


def test_a_student_is_rounded_only_where_it_writes():
    """Replayed rows, or those of the data, cost nothing of it."""
    method = changed(REPLAY, rollout_quantize="int8")
    how = dict(step=jnp.zeros((), jnp.int32), teacher=None)
    inputs = batch(), empty_replay(8, 12, threshold=0.0), jax.random.key(4)

    def write(params):
        return target_rows(method, STUDENT, params, *inputs, **how)

    jaxpr = jax.make_jaxpr(write)(begin().student)
    outside = [x for x in jaxpr.eqns if x.primitive.name != "cond"]
    assert not any(var.aval.dtype == jnp.int8 for x in outside for var in x.outvars)
    assert "i8[" in str(jaxpr)


def test_a_student_that_cannot_be_rounded_while_it_writes():
    method, state = plain(targets="student", rollout_quantize="int8"), begin()
    model = LanguageModel(lambda params, tokens, prefix: tokens, lambda params: params)
    eight_bits = Decoder(STUDENT.config.replace(quantization=QUANTIZE["int8"]))
    for student in (model, eight_bits):
        with pytest.raises(
            ValueError, match="rollout_quantize: 'int8' is for a Decoder with whole"
        ):
            target_rows(
                method, student, state.student, batch(), None, state.key, step=0, teacher=None
            )
    with pytest.raises(ValueError, match="rollout_quantize: 'int8' .* policy_gradient takes to be"):
        changed(MINILLM, rollout_quantize="int8")
    with pytest.raises(ValueError, match="rollout_quantize: 'int8' is for rows that are written"):
        plain(targets="gold", rollout_quantize="int8")


def test_counts_have_a_least():
    said = "length_buckets: 0 is not >= 1; max_concurrent_rollouts: -1 is not >= 0"
    with pytest.raises(ValueError, match=said):
        plain(max_concurrent_rollouts=-1, length_buckets=0)


# Several updates in one step


def dense_updates(before: TrainState, parts: list[tuple[int, ...]]):
    """The student after one update of the cross entropy on each of these groups of rows."""
    student, state = before.student, before.optimizers["student"]
    for rows in parts:
        chosen = np.isin(np.arange(4), rows)
        of_all = (batch().lengths - batch().prompt_lengths).sum()
        of_chosen = (batch().lengths - batch().prompt_lengths)[chosen].sum()
        _, slope = dense_student(student, gold=chosen * of_all / of_chosen)
        updates, state = OPTIMIZERS.student.update(slope, state, student)
        student = optax.apply_updates(student, updates)
    return student


def test_minibatches_are_updates_one_after_the_other():
    """Of the rows as they are dealt out, once each pass; the optimizer counts every one."""
    before = begin()
    sft = plain(student_terms=(("cross_entropy", 1.0),), minibatches=2, passes=2)
    after, metrics = update(sft, before)
    assert_close(after.student, dense_updates(before, [(0, 2), (1, 3), (0, 2), (1, 3)]))
    assert after.optimizers["student"][1].count == 4 and after.step == 1
    other = dense_updates(before, [(0, 2), (0, 2), (1, 3), (1, 3)])
    assert moved(after.student, other) > 1e-3
    assert metrics.counts.tolist() == [14, 6]


# Combinations that mean nothing


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(targets="silver"), "targets: 'silver' is not one of 'gold', 'teacher'"),
        (dict(teacher_view="blind"), "teacher_view: 'blind' is not one of 'plain', 'prompted'"),
        (dict(regularization_schedule="cosine"), "regularization_schedule: 'cosine' is not one "),
        (dict(token_weighting="loud"), "token_weighting: 'loud' is not one of 'uniform', 'tea"),
        (
            dict(student_terms=(("cross_entropy", 1.0),), targets="student"),
            "student_terms: cross_entropy counts rows that the student did not write",
        ),
        (
            dict(student_terms=(("cross_entropy", 1.0),), teacher_view="prompted"),
            "teacher_view: 'prompted' is of no use where neither student_terms nor hidden_ter",
        ),
        (dict(teacher_share=0.2), "teacher_share: 0.2 mixes the teacher into rollouts, but targe"),
        (
            dict(student_terms=(("policy_gradient", 1.0),), targets="mixed"),
            "student_terms: policy_gradient rewards what the student wrote; .* found 'mixed'",
        ),
        (
            dict(
                student_terms=(("policy_gradient", 1.0),),
                targets="student",
                token_weighting="teacher_confidence",
            ),
            "token_weighting: 'teacher_confidence' is not for policy_gradient",
        ),
        (
            dict(
                student_terms=(("policy_gradient", 1.0),),
                targets="student",
                teacher_view="prompted",
                teacher_share=0.2,
            ),
            "teacher_share: 0.2 mixes the plain teacher into rollouts, of which policy_gradient",
        ),
        (dict(student_terms=()), r"student_terms: \(\) is not a non-empty tuple"),
        (dict(teacher_view="in_context"), "demonstrations: are none, but teacher_view = 'in_cont"),
        (
            dict(teacher_view="cached", targets="student"),
            "targets: 'student' makes rows during training, but a cached teacher knows only",
        ),
        (
            dict(teacher_view="cached", hidden_terms=(HiddenTerm("cosine"),)),
            "hidden_terms: a cached teacher has log-probabilities but no hidden states",
        ),
        (
            dict(teacher_view="cached", temperature=2.0),
            "temperature: 2 needs the whole distribution, a cached teacher keeps the largest",
        ),
        (
            dict(teacher_view="cached", corpus_terms=(("forward_kl", 1.0),)),
            "corpus_terms: a cached teacher has not seen the corpus; expected cross_entropy alone",
        ),
    ],
)
def test_combinations_that_mean_nothing(changes, message):
    with pytest.raises(ValueError, match=message):
        plain(**changes)


def test_the_policy_gradient_refuses_every_option_of_sampling():
    """Also one that is still to be added."""

    @dataclasses.dataclass(frozen=True)
    class WithTopA(Sampling):
        top_a: float = specs.field(0.0, specs.Float(low=0.0, high=1.0), "…")

    terms = (("policy_gradient", 1.0),)
    changed = dict(temperature=0.5, top_k=5, top_p=0.9, no_repeat_ngram_size=3, min_p=0.1)
    changed |= dict(repetition_penalty=1.5, top_a=0.2)
    assert changed.keys() == specs.declared(WithTopA).keys()
    for name, value in changed.items():
        with pytest.raises(ValueError, match=f"sampling.{name}: {value}, but policy_gradient val"):
            plain(student_terms=terms, targets="student", sampling=WithTopA(**{name: value}))
    plain(student_terms=terms, targets="student", sampling=WithTopA())


def test_several_responses_to_a_prompt_are_all_the_students():
    said = "rollouts_per_prompt: 2 responses to a prompt .* targets = 'mixed' its rows are not all"
    with pytest.raises(ValueError, match=said):
        gkd(0.5, rollouts_per_prompt=2)
    for greedy in (Sampling(temperature=0.0), Sampling(top_k=1)):
        with pytest.raises(
            ValueError, match="rollouts_per_prompt: 2 responses .* are all the same"
        ):
            plain(targets="student", rollouts_per_prompt=2, sampling=greedy)
    with pytest.raises(ValueError, match="prompt_fallback: .* and there are 2 rows of each"):
        plain(
            targets="student",
            teacher_view="prompted",
            prompt_fallback=True,
            rollouts_per_prompt=2,
        )


def test_all_contradictions_are_told_at_once():
    with pytest.raises(ValueError, match="targets: 'replay' makes .*; temperature: 0.5 needs "):
        plain(teacher_view="cached", targets="replay", temperature=0.5)


def test_combinations_that_mean_something():
    plain(teacher_view="cached", targets="teacher", corpus_terms=(("cross_entropy", 1.0),))
    cosine = HiddenTerm("cosine")
    gold = (("cross_entropy", 1.0),)
    plain(
        student_terms=gold, teacher_view="in_context", demonstrations=(7,), hidden_terms=(cosine,)
    )
    for targets in ("mixed", "replay"):
        plain(student_terms=gold, targets=targets, teacher_share=0.2)
