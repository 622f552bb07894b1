"""The excess accumulated error against mathematics."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny
from helpers.records import example

from promptkd_jax.data.rows import tokenize
from promptkd_jax.data.templates import PromptFormat
from promptkd_jax.evaluation.exposure_bias import (
    ex_acc_err,
    exposure_bias,
    generate_samples,
    position_errors,
)
from promptkd_jax.inference import generate
from promptkd_jax.models.decoder import head
from promptkd_jax.models.load import load_model
from promptkd_jax.models.model import Model, end_ids
from promptkd_jax.models.sampling_rules import Sampling

NEW = 6  # response positions
SIZES = dict(batch_size=2, prompt_capacity=16, max_new_tokens=NEW)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Model, Model]:
    folder = tmp_path_factory.mktemp("models")
    tiny.write_model(folder / "teacher", width=32, depth=2, seed=0)
    tiny.write_model(folder / "student", width=16, depth=2, seed=1)
    teacher, student = (load_model(str(folder / name)) for name in ("teacher", "student"))
    # Answers end early now and then, and not all at the same position.
    ends = tuple(range(0, student.vocab_size, 4))
    return teacher.replace(eos_ids=ends), student.replace(eos_ids=ends)


@pytest.fixture(scope="module")
def rows(models):
    requests = ("say red", "name two", "say the colour of grass")
    records = [example(text, "", ("the blue sky",)) for text in requests]
    how = dict(prompt_format=PromptFormat("plain"), max_prompt_length=16, max_length=24, eos_id=0)
    return tokenize(records, models[1].tokenizer, **how)


def measured(models, rows, samples=2, **changes):
    sizes = SIZES | dict(vocab_size=models[1].vocab_size) | changes
    return exposure_bias(*models, rows, samples=samples, seed=3, **sizes)


def with_answers(rows, answers):
    pairs = zip(rows.tokens, rows.prompt_lengths, answers)
    return rows._replace(
        tokens=[np.append(row[:start], answer).astype(np.int32) for row, start, answer in pairs]
    )


@functools.cache
def dense_logits(decoder):
    return jax.jit(
        lambda params, tokens: decoder.apply({"params": params}, tokens) @ head(params).T
    )


def dense_errors(models, tokens, start) -> np.ndarray:
    """KL(p || q) where one row's response tokens are predicted; what stands behind it is a 7."""
    padded = np.full((1, 24), 7)
    padded[0, : len(tokens)] = tokens
    p, q = (jax.nn.log_softmax(dense_logits(m.decoder)(m.params, padded)[0]) for m in models)
    return np.asarray(jnp.exp(p) * (p - q), np.float64).sum(axis=-1)[start - 1 : len(tokens) - 1]


def dense_curve(models, rows, writer, samples=2):
    """Errors of each position, averaged over the texts that reach it, then accumulated."""
    errors = [[] for _ in range(NEW)]
    for sample in range(samples):
        answers = generate.generate_responses(
            writer,
            rows,
            sampling=Sampling(eos_ids=writer.eos_ids),
            prompt_capacity=16,
            max_new_tokens=NEW,
            batch_size=2,
            key=jax.random.fold_in(jax.random.key(3), sample),
            vocab_size=writer.vocab_size,
        )
        texts = with_answers(rows, answers)
        for tokens, start in zip(texts.tokens, texts.prompt_lengths):
            for position, error in enumerate(dense_errors(models, tokens, start)):
                errors[position].append(error)
    means = [np.mean(found) if found else 0.0 for found in errors]
    return np.cumsum(means), [len(found) for found in errors]


def test_agrees_with_the_dense_definition(models, rows):
    found = measured(models, rows)
    eps, teacher_count = dense_curve(models, rows, models[0])
    regret, student_count = dense_curve(models, rows, models[1])
    assert found.student_count.tolist() == student_count and student_count[0] == 6
    assert found.teacher_count.tolist() == teacher_count and 0 < teacher_count[2] < 6
    np.testing.assert_allclose(found.teacher_error, eps, rtol=1e-4)
    np.testing.assert_allclose(found.student_error, regret, rtol=1e-4)
    np.testing.assert_allclose(found.ex_acc_err, 100 * (regret - eps) / eps, atol=0.02)
    assert np.abs(found.ex_acc_err).max() > 1


def test_texts_of_the_teacher_written_before_are_the_same(models, rows):
    """Texts of another seed change the teacher's curve alone."""
    found = measured(models, rows)
    sizes = SIZES | dict(vocab_size=models[1].vocab_size, eos_ids=end_ids(*models), samples=2)
    for seed, same in ((3, True), (4, False)):
        texts = generate_samples(models[0], rows, seed=seed, **sizes)
        other = measured(models, rows, teacher_texts=texts)
        np.testing.assert_array_equal(other.student_error, found.student_error)
        assert np.array_equal(other.teacher_error, found.teacher_error) == same


def test_the_first_position_has_no_excess(models, rows):
    """It depends on the request alone, whoever writes the rest."""
    found = measured(models, rows)
    assert found.ex_acc_err[0] == 0 and found.student_error[0] > 0.1


def test_a_student_that_is_its_teacher_has_no_error(models, rows):
    found = measured((models[0], models[0]), rows)
    np.testing.assert_allclose(found.student_error, 0, atol=1e-6)
    np.testing.assert_array_equal(found.student_error, found.teacher_error)
    np.testing.assert_array_equal(found.student_count, found.teacher_count)
    np.testing.assert_array_equal(found.ex_acc_err, 0)


def test_ex_acc_err_is_a_percentage_of_the_error_on_the_teachers_text():
    found = ex_acc_err(np.array([0.0, 3.0, 1.0]), np.array([0.0, 2.0, 2.0]))
    np.testing.assert_array_equal(found, [0, 50, -50])


def test_an_answer_of_only_an_eos_counts_one_position(models, rows):
    """Its token is also the padding: only lengths can tell it."""
    short = with_answers(rows, [[0]] * 3)
    sums, counts = position_errors(
        *models, short, batch_size=2, length=24, capacity=NEW, vocab_size=models[1].vocab_size
    )
    assert counts.tolist() == [3, 0, 0, 0, 0, 0]
    expected = sum(
        dense_errors(models, *pair)[0] for pair in zip(short.tokens, rows.prompt_lengths)
    )
    np.testing.assert_allclose(sums, [expected, 0, 0, 0, 0, 0], rtol=1e-4)


def test_the_curves_stay_level_where_no_text_reaches(models, rows):
    always = tuple(range(models[1].vocab_size))  # every first token ends the answer
    teacher, student = (model.replace(eos_ids=always) for model in models)
    found = measured((teacher, student), rows)
    assert found.student_count.tolist() == found.teacher_count.tolist() == [6, 0, 0, 0, 0, 0]
    assert (found.student_error == found.student_error[0]).all() and found.student_error[0] > 0
    np.testing.assert_array_equal(found.ex_acc_err, 0)


def test_padding_and_batches_change_nothing(models, rows):
    found = measured(models, rows)
    again = measured(models, rows, prompt_capacity=21, batch_size=3)
    for name, array in found._asdict().items():
        np.testing.assert_allclose(getattr(again, name), array, 1e-4, 1e-3, err_msg=name)
