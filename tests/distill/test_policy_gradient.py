"""Policy gradients are the gradients they estimate, and MiniLLM's published numbers come out."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import golden_cases
from helpers.golden import assert_close

from promptkd_jax.data.batch import Batch, gather, responses
from promptkd_jax.distill.losses import losses
from promptkd_jax.distill.losses.chunked_loss import linear_loss
from promptkd_jax.distill.losses.policy_gradient import (
    PolicyGradient,
    PolicyTarget,
    advantages,
    clipped_policy_gradient,
    importance_weights,
    policy_target,
    rewards,
)
from promptkd_jax.models.decoder import head
from promptkd_jax.models.io.export import to_hugging_face
from promptkd_jax.models.language_model import LazyLogits
from promptkd_jax.models.load import load_model

PLAIN = PolicyGradient(reward_scaling=1.0, length_normalize=False, whiten="none", ratio_clip=None)
ON_POLICY_DISTILLATION = dataclasses.replace(PLAIN, gamma=0.0, ratio_clip=0.2)
MASK = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], np.float32)


@pytest.fixture(autouse=True)
def _full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# What is estimated: expectations over all tokens of a small vocabulary


def expected_gradient(student, teacher, share: float, settings: PolicyGradient):
    """Of the loss with respect to the student's logits `[V]`, over y ~ (1 - share) q + share p."""
    log_q, log_p = losses.log_probs(student), losses.log_probs(teacher)
    labels = jnp.arange(len(student))[:, None]  # every token is one row of one position
    mask = jnp.ones(labels.shape)
    target = policy_target(labels, mask, log_q[:, None], log_p[:, None], share, settings)
    probability = (1 - share) * jnp.exp(log_q) + share * jnp.exp(log_p)

    def loss(student):
        learner = jnp.broadcast_to(student, (*labels.shape, len(student)))
        terms = clipped_policy_gradient(target, learner, settings.ratio_clip)
        return jnp.sum(probability[:, None] * terms)

    return jax.grad(loss)(student)


@pytest.mark.parametrize("ratio_clip", [None, 0.2])
@pytest.mark.parametrize("share", [0.0, 0.2])
def test_expected_gradient_is_that_of_the_reverse_kl(share, ratio_clip):
    """Whoever sampled; and at q_new = q_old without a future or whitening no clipping bites: a
    token with an importance above 1 is one of which the teacher wants less."""
    student, teacher = normal(0, 6), 3 * normal(1, 6)
    exact = jax.grad(losses.reverse_kl, argnums=1)(teacher, jnp.asarray(student))
    settings = dataclasses.replace(ON_POLICY_DISTILLATION, ratio_clip=ratio_clip)
    found = expected_gradient(student, teacher, share, settings)
    np.testing.assert_allclose(found, exact, atol=2e-6)
    if share:  # the weights are needed: some are far from 1
        weights = importance_weights(losses.log_probs(student), losses.log_probs(teacher), share)
        assert weights.min() < 0.8 and weights.max() > 1.2


def test_reward_scaling_divides_the_gradient():
    student, teacher = normal(0, 6), normal(1, 6)
    halved = dataclasses.replace(ON_POLICY_DISTILLATION, reward_scaling=0.5)
    exact = jax.grad(losses.reverse_kl, argnums=1)(teacher, jnp.asarray(student))
    np.testing.assert_allclose(
        expected_gradient(student, teacher, 0.0, halved), exact / 0.5, atol=1e-6
    )


@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_gamma_decides_whether_a_token_answers_for_those_after_it(gamma):
    """Answers of two tokens: gamma = 1 is the gradient of the KL of whole answers, gamma = 0 that
    of the KL at each position with the prefixes as they fell."""
    size = 4
    students = (jnp.asarray(normal(0, size)), jnp.asarray(normal(1, size, size)))
    teachers = (normal(2, size), normal(3, size, size))
    first, second = (x.ravel() for x in np.meshgrid(range(size), range(size), indexing="ij"))
    labels = np.stack([first, second], axis=1)  # every answer is one row

    def logits(model):
        at_first = jnp.broadcast_to(model[0], (size * size, size))
        return jnp.stack([at_first, model[1][first]], axis=1)

    log_q, log_p = (-losses.cross_entropy(labels, logits(model)) for model in (students, teachers))
    settings = dataclasses.replace(PLAIN, gamma=gamma)
    target = policy_target(labels, jnp.ones(labels.shape), log_q, log_p, 0.0, settings)

    def estimate(model):
        terms = clipped_policy_gradient(target, logits(model), None)
        return jnp.sum(jnp.exp(log_q).prod(axis=1, keepdims=True) * terms)

    def kl(model):
        q = jnp.exp(losses.log_probs(model[0]))
        prefixes = q if gamma else jax.lax.stop_gradient(q)
        later = losses.reverse_kl(teachers[1], model[1])
        return losses.reverse_kl(teachers[0], model[0]) + jnp.sum(prefixes * later)

    for found, exact in zip(jax.grad(estimate)(students), jax.grad(kl)(students)):
        np.testing.assert_allclose(found, exact, atol=1e-6)


def reverse_kl_estimate(student_log_prob, teacher_log_prob, mask) -> jax.Array:
    """e^d - 1 - d with d = log p - log q of tokens sampled from q, `[B, R]`, 0 where masked.

    Never negative, and its mean over y ~ q is KL(q || p) in nats: a metric that MiniLLM logs.
    """
    d = jnp.where(mask > 0, teacher_log_prob - student_log_prob, 0.0)
    return jnp.expm1(d) - d


def test_reverse_kl_estimate_is_never_negative_and_right_on_average():
    student, teacher = normal(0, 6), normal(1, 6)
    log_q, log_p = losses.log_probs(student), losses.log_probs(teacher)
    estimate = reverse_kl_estimate(log_q, log_p, jnp.ones(6))
    assert (estimate >= 0).all()
    exact = losses.reverse_kl(teacher, student)
    np.testing.assert_allclose(jnp.sum(jnp.exp(log_q) * estimate), exact, rtol=1e-5)
    assert (reverse_kl_estimate(log_q, jnp.full(6, jnp.nan), jnp.zeros(6)) == 0).all()


# Rewards, weights, advantages


def test_rewards_are_scaled_then_clipped_and_only_given_to_response_tokens():
    teacher = np.array([[-1.0, -9.0, -jnp.inf, jnp.nan]])
    student = np.array([[-2.0, -1.0, -1.0, -1.0]])
    settings = PolicyGradient(reward_scaling=0.5, reward_clip=3.0)
    found = rewards(student, teacher, np.array([[1, 1, 1, 0]]), settings)
    np.testing.assert_array_equal(found, [[2.0, -3.0, -3.0, 0.0]])


def test_importance_weights_make_up_for_who_sampled():
    student, teacher = normal(0, 6), 3 * normal(1, 6)
    log_q, log_p = losses.log_probs(student), losses.log_probs(teacher)
    np.testing.assert_array_equal(importance_weights(log_q, log_p, 0.0), 1.0)
    weights = importance_weights(log_q, log_p, 0.2)
    mixed = 0.8 * jnp.exp(log_q) + 0.2 * jnp.exp(log_p)
    np.testing.assert_allclose(mixed * weights, jnp.exp(log_q), rtol=1e-5)
    assert (weights <= 1 / 0.8 + 1e-6).all()


def test_advantages_by_hand():
    reward = np.array([[1.0, 2.0, 4.0, 8.0], [1.0, 2.0, 0.0, 0.0], [3.0, 0.0, 0.0, 0.0]])
    half = dataclasses.replace(PLAIN, gamma=0.5)
    expected = np.array([[4.0, 6.0, 8.0, 8.0], [2.0, 2.0, 0.0, 0.0], [3.0, 0.0, 0.0, 0.0]])
    np.testing.assert_allclose(advantages(reward, MASK, half), expected)
    remaining = np.array([[4, 3, 2, 1], [2, 1, 1, 1], [1, 1, 1, 1]])
    divided = dataclasses.replace(half, length_normalize=True)
    np.testing.assert_allclose(advantages(reward, MASK, divided), expected / remaining)
    now = dataclasses.replace(PLAIN, gamma=0.0)
    np.testing.assert_array_equal(advantages(reward, MASK, now), reward)


def test_whitening_looks_at_response_tokens_only():
    reward = (3 + normal(0, *MASK.shape)) * MASK
    settings = PolicyGradient()
    found = np.asarray(advantages(reward, MASK, settings))
    real = found[MASK > 0]
    np.testing.assert_allclose([real.mean(), real.std()], [0, 1], atol=1e-5)
    assert (found[MASK == 0] == 0).all()

    def with_room(settings):
        """The same answers in arrays of twice the capacity."""
        wider = [np.pad(x, ((0, 0), (0, 4))) for x in (reward, MASK)]
        return np.asarray(advantages(*wider, settings))[:, :4]

    np.testing.assert_allclose(with_room(settings), found, atol=1e-5)
    padded = dataclasses.replace(settings, whiten="padded")
    published = np.asarray(advantages(reward, MASK, padded))
    np.testing.assert_allclose([published.mean(), published.std()], [0, 1], atol=1e-5)
    assert np.abs(with_room(padded) - published)[MASK > 0].min() > 0.1


def test_what_stands_behind_an_answer_is_ignored():
    labels = np.zeros(MASK.shape, np.int32)
    log_q, log_p = -np.abs(normal(0, *MASK.shape)), -np.abs(normal(1, *MASK.shape))
    for whiten in ("response", "padded"):
        settings = PolicyGradient(whiten=whiten)
        clean = policy_target(labels, MASK, log_q * MASK, log_p * MASK, 0.2, settings)
        dirty = [np.where(MASK > 0, x, np.nan) for x in (log_q, log_p)]
        found = policy_target(labels, MASK, *dirty, 0.2, settings)
        jax.tree.map(np.testing.assert_array_equal, found, clean)


# The loss


@pytest.mark.parametrize("moved", [True, False])
@pytest.mark.parametrize("advantage", [-2.0, 2.0])
def test_a_ratio_beyond_its_bounds_pushes_no_further(advantage, moved):
    """Whether the student moved there or, as published, the importance alone is out there."""
    ratios, ones = np.array([0.5, 0.9, 1.1, 1.5]), np.ones(4)
    log_prob = np.log(np.array([0.1, 0.2, 0.3, 0.15]))
    old, importance = (log_prob - np.log(ratios), ones) if moved else (log_prob, ratios)
    target = PolicyTarget(np.zeros(4, np.int32), old, jnp.full(4, advantage), importance)

    def loss(log_prob):
        logits = jnp.stack([log_prob, jnp.log1p(-jnp.exp(log_prob))], axis=-1)
        return clipped_policy_gradient(target, logits, 0.2)

    found, gradient = jax.jvp(loss, (log_prob,), (ones,))
    bounded = np.clip(ratios, *((0.8, np.inf) if advantage < 0 else (-np.inf, 1.2)))
    np.testing.assert_allclose(found, -advantage * bounded, rtol=1e-5)
    np.testing.assert_allclose(gradient, -advantage * ratios * (ratios == bounded), rtol=1e-5)


@pytest.mark.parametrize("ratio_clip", [None, 0.2])
def test_without_logits_it_is_the_same_loss(ratio_clip):
    labels = np.random.default_rng(0).integers(0, 7, MASK.shape)
    log_q, log_p = -np.abs(normal(0, *MASK.shape)), -np.abs(normal(1, *MASK.shape))
    target = policy_target(labels, MASK, log_q, log_p, 0.2, PolicyGradient())
    learner = LazyLogits(jnp.asarray(normal(5, *MASK.shape, 3)), jnp.asarray(normal(6, 7, 3)))
    term = functools.partial(clipped_policy_gradient, ratio_clip=ratio_clip)

    def chunked(learner):
        return linear_loss((term,), learner, (target,), MASK, chunk=3)[0]

    def dense(learner):
        return jnp.sum(MASK * term(target, learner.logits()))

    found, expected = (jax.value_and_grad(f)(learner) for f in (chunked, dense))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), found, expected)


def test_settings_say_what_is_wrong():
    assert hash(PolicyGradient()) == hash(PolicyGradient(gamma=0.95))
    for wrong in (
        dict(gamma=1.5),
        dict(reward_scaling=0.0),
        dict(reward_clip=-1.0),
        dict(ratio_clip=0.0),
        dict(whiten="rows"),
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            PolicyGradient(**wrong)


# The published numbers


@functools.partial(jax.jit, static_argnums=0)
def hidden_states(decoder, params, tokens):
    return decoder.apply({"params": params}, tokens)


class Rollout:
    """One case: three models, the stored rollout as rows from column 0, the settings."""

    def __init__(self, folder, case: dict, scratch):
        self.hyper = case["hyper"]
        paths = {name: folder / path for name, path in case["paths"].items()}
        self.arrays = dict(np.load(paths["expected"]))
        self.teacher = load_model(str(paths["teacher"]))
        self.student = load_model(str(paths["rollout_student"]))
        shutil.copy(paths["rollout_student"] / "config.json", scratch)
        shutil.copy(paths["loss_student_weights"], scratch / "model.safetensors")
        self.drifted = load_model(str(scratch))  # the student after some updates on this rollout
        self.share = self.hyper["alpha"] or 0.0
        self.settings = PolicyGradient(
            gamma=self.hyper["gamma"],
            reward_scaling=self.hyper["reward_scaling"] or 1.0,
            reward_clip=self.hyper["cliprange_reward"] or 1e9,
            ratio_clip=self.hyper["cliprange"],
            length_normalize=True,  # always: the case's "length_norm" is about statistics only
            whiten="padded",
        )
        self.text = self._text_rows()
        self.rows = self._rows(self.arrays["batch_response_tensors"], self.arrays["batch_lens"])
        self.where = responses(self.rows, self.arrays["batch_mask"].shape[1])

    def _rows(self, answers, answer_lengths) -> Batch:
        """Requests from column 0, each followed by its answer; the lengths say where they end.

        The stored requests are left-padded, and their only record is what the models were given to
        attend to. What they do not attend to has no position either, so leaving it out changes
        nothing; `assert_same_rows` checks that tokens and positions agree.
        """
        requests = self.arrays["batch_query_tensors"]
        count, width = requests.shape
        seen = self.arrays["input_attention_mask"][:count, :width] == 1
        columns = max(width + answers.shape[1], self.text.tokens.shape[1])  # one compilation
        tokens = np.zeros((count, columns), np.int32)
        lengths = seen.sum(axis=1)
        for row, length in enumerate(lengths):
            tokens[row, :length] = requests[row, seen[row]]
            tokens[row, length : length + answers.shape[1]] = answers[row]
        return Batch(*map(jnp.asarray, (tokens, lengths, lengths + answer_lengths)))

    def _text_rows(self) -> Batch:
        """The rows of text: their last token is only ever a label."""
        arrays = self.arrays
        lengths = arrays["lm_model_attention_mask"].sum(axis=1)
        labels = arrays["lm_nomodel_label"]
        tokens = np.pad(arrays["lm_model_input_ids"], ((0, 0), (0, 1)))
        rows = np.arange(len(tokens))
        tokens[rows, lengths] = labels[rows, lengths - 1]
        prompt_lengths = (labels != -100).argmax(axis=1) + 1
        return Batch(*map(jnp.asarray, (tokens, prompt_lengths, lengths + 1)))

    def logits(self, model, rows: Batch, where):
        """At the response positions."""
        hidden = hidden_states(model.decoder, model.params, rows.tokens)
        return LazyLogits(gather(hidden, where), head(model.params)).logits()

    def sampled(self, logits, forbidden):
        """The distribution that was sampled from."""
        return jnp.where(forbidden, -jnp.inf, logits / self.hyper["temperature"])

    def log_probs(self, rows: Batch, forbidden):
        """Of the answers' tokens, 0 behind their ends: the student's as sampled, the teacher's as
        it rewards, the teacher's as sampled."""
        where = responses(rows, forbidden.shape[1])
        student, teacher = (self.logits(m, rows, where) for m in (self.student, self.teacher))
        seen = self.sampled(student, forbidden), teacher, self.sampled(teacher, forbidden)
        return [
            jnp.where(where.mask > 0, -losses.cross_entropy(where.labels, x), 0.0) for x in seen
        ]

    def target(self, student, teacher, sampled) -> PolicyTarget:
        """Of `log_probs` of the rollout."""
        where = self.where
        target = policy_target(
            where.labels, where.mask, student, teacher, self.share, self.settings
        )
        return target._replace(importance=importance_weights(student, sampled, self.share))

    def estimate(self):
        """The reverse KL of tokens that the student sampled alone, `[B, R]`, and their number."""
        rows, forbidden = self.rows, self.arrays["batch_inf_mask"]
        if self.hyper["alpha"] is not None:  # then from a rollout of its own
            answers, lengths = self.arrays["student_response_ids"], self.arrays["batch_s_lens"]
            rows, forbidden = self._rows(answers, lengths), self.arrays["student_inf_mask"]
        mask = responses(rows, forbidden.shape[1]).mask
        student, teacher, _ = self.log_probs(rows, forbidden)
        return reverse_kl_estimate(student, teacher, mask), mask.sum(axis=1)

    def loss_and_gradient(self, target: PolicyTarget):
        """((total, parts), gradient) of the drifted student; see `_loss`."""
        where = responses(self.text, self.text.tokens.shape[1] - 1)
        teacher = self.logits(self.teacher, self.rows, self.where)
        constants = (
            (target, self.sampled(teacher, self.arrays["batch_inf_mask"])),
            (where, self.logits(self.teacher, self.text, where)),
        )
        function = jax.jit(jax.value_and_grad(self._loss, has_aux=True))
        return function(self.drifted.params, *constants)

    def _loss(self, params, rollout, text):
        columns = self.rows.tokens.shape[1] - self.text.tokens.shape[1]
        texts = jnp.pad(self.text.tokens, ((0, 0), (0, columns)))
        tokens = jnp.concatenate([self.rows.tokens, texts])
        hidden = hidden_states(self.drifted.decoder, params, tokens)
        answers, texts = jnp.split(hidden, [len(self.rows.tokens)])
        kernel = head(params)
        rl, pg, reg = self._policy_loss(LazyLogits(gather(answers, self.where), kernel), *rollout)
        pt, lm, ds = self._text_loss(LazyLogits(gather(texts, text[0]), kernel), *text)
        parts = dict(rl_loss=rl, pg_loss=pg, reg_loss=reg, pt_loss=pt, lm_loss=lm, ds_loss=ds)
        return rl + self.hyper["lm_coef"] * pt, parts

    def _policy_loss(self, learner: LazyLogits, target: PolicyTarget, teacher):
        """Policy gradient and single-step term, three positions at a time."""
        forbidden, count = self.arrays["batch_inf_mask"], self.where.mask.sum()
        clip = self.settings.ratio_clip
        policy_gradient = functools.partial(clipped_policy_gradient, ratio_clip=clip)
        loss, sums = linear_loss(
            (allowed(policy_gradient), allowed(losses.reverse_kl)),
            learner.replace(hidden=learner.hidden / self.hyper["temperature"]),
            ((target, forbidden), (teacher, forbidden)),
            self.where.mask,
            (1 / count, self.hyper["single_step_reg"] / count),
            chunk=3,
        )
        return loss, *sums / count

    def _text_loss(self, learner: LazyLogits, where, teacher):
        """Cross-entropy and distillation on text."""
        count, share = where.mask.sum(), self.hyper["kd_ratio"]
        loss, sums = linear_loss(
            (losses.cross_entropy, losses.soft_cross_entropy),
            learner,
            (where.labels, teacher),
            where.mask,
            ((1 - share) / count, share / count),
        )
        return loss, *sums / count


def allowed(term):
    """The term, with the learner's forbidden tokens at -inf; they come along with the target."""

    def without_forbidden(target, learner):
        target, forbidden = target
        return term(target, jnp.where(forbidden, -jnp.inf, learner))

    return without_forbidden


def close(found, expected, what: str, tolerance: float = 1e-5) -> None:
    """To the tolerance, absolute below 1 and relative above."""
    scale = np.maximum(1, np.abs(expected))
    assert_close(np.asarray(found, np.float64) / scale, expected / scale, tolerance, what)


@pytest.mark.parametrize("folder, case", golden_cases("minillm_unit"))
def test_minillm(folder, case, tmp_path):
    rollout = Rollout(folder, case, tmp_path)
    arrays, mask = rollout.arrays, rollout.where.mask
    assert_same_rows(rollout)
    np.testing.assert_array_equal(mask, arrays["batch_mask"])

    student, teacher, sampled = rollout.log_probs(rollout.rows, arrays["batch_inf_mask"])
    reward = rewards(student, teacher, mask, rollout.settings)
    target = rollout.target(student, teacher, sampled)
    rev_kl, student_lengths = rollout.estimate()
    for name, found in {
        "batch_t_rewards": teacher,
        "batch_logprobs": student,
        "batch_ent_rewards": -student,
        "batch_rewards": reward,
        "batch_w": target.importance,
        "batch_rev_kl": rev_kl,
        "advantages": target.advantage,
    }.items():
        close(found, arrays[name], name)

    (total, parts), gradient = rollout.loss_and_gradient(target)
    for name in ("rl_loss", "pt_loss"):
        close(parts[name], arrays[name], name)
    close(total, arrays["total_loss"], "total_loss")
    by_length = rollout.hyper["length_norm"]
    once = dataclasses.replace(rollout.settings, whiten="none", length_normalize=by_length)
    statistics = {
        **parts,
        "reward": advantages(reward, mask, once)[:, 0].mean(),
        "rev_kl": (rev_kl.sum(axis=1) / (student_lengths if by_length else 1)).mean(),
        "mixed_lens": mask.sum(axis=1).mean(),
        "stu_lens": student_lengths.mean(),
    }
    assert {f"stat_{name}" for name in statistics} == {x for x in arrays if x.startswith("stat_")}
    for name, found in statistics.items():
        close(found, arrays[f"stat_{name}"], name)
    assert_gradient(rollout, gradient, case["grad_norm_per_parameter"])


def assert_same_rows(rollout: Rollout) -> None:
    """What the published models read at each position is what ours read at it."""
    arrays, rows = rollout.arrays, rollout.rows
    for row, length in enumerate(np.asarray(rows.lengths)):
        seen = arrays["input_attention_mask"][row] == 1  # without the last token: a label only
        np.testing.assert_array_equal(
            rows.tokens[row, : length - 1], arrays["input_input_ids"][row, seen][: length - 1]
        )
        if "input_position_ids" in arrays:  # given to GPT-2 only
            np.testing.assert_array_equal(
                arrays["input_position_ids"][row, seen][: length - 1], np.arange(length - 1)
            )


def assert_gradient(rollout: Rollout, gradient, expected: dict[str, float]) -> None:
    """The norm of the whole and of every parameter, before clipping."""
    close(optax.tree.norm(gradient), rollout.arrays["grad_norm"], "grad_norm", 5e-5)
    found = to_hugging_face(gradient, rollout.drifted.decoder.config)
    assert found.keys() == expected.keys()
    for name, norm in expected.items():
        close(np.linalg.norm(found[name]), norm, name, 5e-5)
