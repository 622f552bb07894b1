"""Exposure bias: how much more a student errs on its own text than on its teacher's.

An error is KL(teacher || student) of the next token. Accumulated along text that the student wrote
it is R(l), along text that the teacher wrote eps(l); their relative difference is the excess
accumulated error ExAccErr(l) of Arora et al. 2022 (arXiv 2204.01171), figure 3 of PromptKD (arXiv
2402.12842). 0: the student's own mistakes do not lead it astray.

R response positions.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from promptkd_jax.data.rows import Rows, with_responses
from promptkd_jax.distill.losses.losses import forward_kl
from promptkd_jax.inference.generate import generate_responses
from promptkd_jax.inference.response_values import response_values
from promptkd_jax.models.model import Model, end_ids
from promptkd_jax.models.sampling_rules import Sampling


class ExposureBias(NamedTuple):
    """Curves over the response positions l = 1 … R, each `[R]`.

    `student_error` is R(l) and `teacher_error` eps(l), in nats: the mean error at each position,
    summed up to l, on the student's and on the teacher's text. `ex_acc_err` is in percent.
    `student_count` and `teacher_count` say how many texts reach position l; the curves stay level
    where none does.
    """

    student_error: np.ndarray
    teacher_error: np.ndarray
    ex_acc_err: np.ndarray
    student_count: np.ndarray
    teacher_count: np.ndarray


def exposure_bias(
    teacher: Model,
    student: Model,
    rows: Rows,
    *,
    samples: int,
    seed: int,
    prompt_capacity: int,
    max_new_tokens: int,
    batch_size: int,
    vocab_size: int,
    teacher_texts: Sequence[Rows] | None = None,
) -> ExposureBias:
    """The ExAccErr curve of a student and its plain teacher, both sampling at temperature 1.

    Args:
      rows: requests of at most `prompt_capacity` tokens; their responses are not looked at.
      samples: texts that each model writes for every request. Both draw with the same keys, so
        that the two curves differ by their models rather than by their luck.
      max_new_tokens: R, the length of the curves.
      vocab_size: the vocabulary that teacher and student share.
      teacher_texts: what `generate_samples` gives for the teacher with all of the above and
        `end_ids`, for who has it from another student; None: written here.

    Returns:
      The curves. They start at 0 %, since the first position depends on the request only.
    """
    write = functools.partial(
        generate_samples,
        rows=rows,
        samples=samples,
        seed=seed,
        prompt_capacity=prompt_capacity,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        vocab_size=vocab_size,
        eos_ids=end_ids(teacher, student),
    )
    errors = functools.partial(
        position_errors,
        teacher,
        student,
        batch_size=batch_size,
        length=prompt_capacity + max_new_tokens,
        capacity=max_new_tokens,
        vocab_size=vocab_size,
    )
    if teacher_texts is None:
        teacher_texts = write(teacher)
    student_error, student_count = _accumulated(map(errors, write(student)))
    teacher_error, teacher_count = _accumulated(map(errors, teacher_texts))
    return ExposureBias(
        student_error,
        teacher_error,
        ex_acc_err(student_error, teacher_error),
        student_count,
        teacher_count,
    )


def _accumulated(errors: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Of `position_errors` of each sample: the mean at a position, summed up to it, and counts."""
    total, count = np.sum(list(errors), axis=0)
    return np.cumsum(total / np.maximum(count, 1)), count.astype(int)


def generate_samples(
    writer: Model,
    rows: Rows,
    *,
    samples: int,
    seed: int,
    prompt_capacity: int,
    max_new_tokens: int,
    batch_size: int,
    vocab_size: int,
    eos_ids: tuple[int, ...],
) -> list[Rows]:
    """The rows with what the model writes as their responses, once for each of the samples.

    Args: as of `exposure_bias`; `eos_ids` end a text.
    """
    return [
        with_responses(
            rows,
            generate_responses(
                writer,
                rows,
                sampling=Sampling(eos_ids=eos_ids),
                prompt_capacity=prompt_capacity,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                key=jax.random.fold_in(jax.random.key(seed), sample),
                vocab_size=vocab_size,
            ),
        )
        for sample in range(samples)
    ]


def ex_acc_err(student_error: np.ndarray, teacher_error: np.ndarray) -> np.ndarray:
    """100 (R - eps) / eps, in percent; 0 where the student makes no error on the teacher's text."""
    excess = 100 * (student_error - teacher_error)
    return np.divide(excess, teacher_error, out=np.zeros_like(excess), where=teacher_error > 0)


def position_errors(
    teacher: Model,
    student: Model,
    rows: Rows,
    *,
    batch_size: int,
    length: int,
    capacity: int,
    vocab_size: int,
) -> np.ndarray:
    """KL(teacher || student) at each position of the rows' responses, their EOS included.

    Args:
      length: columns of a batch, at least as many as the longest row has tokens.
      capacity: R, at least as many as the longest response has tokens.

    Returns:
      `[2, R]`: the sum of the errors in nats, and how many rows reach the position.
    """
    batches = response_values(
        forward_kl,
        (teacher, student),
        rows,
        batch_size=batch_size,
        length=length,
        capacity=capacity,
        vocab_size=vocab_size,
    )
    total = np.zeros((2, capacity))
    for values in batches:
        total += values.sum(axis=0, dtype=np.float64).filled(0), values.count(axis=0)
    return total
