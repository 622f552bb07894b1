"""Responses written by the teacher, kept in a file (SeqKD).

Writing goes on where it was stopped. A manifest says what made the file: teacher, tokenizer,
requests, and how; a file that something else made is refused, not used.

    NAME.jsonl           one line {"request": […], "answer": […]} of token ids for every row
    NAME.manifest.json
"""

import dataclasses
import json
from typing import Any

import jax
from etils import epath

from promptkd_jax.data.rows import Rows, with_responses
from promptkd_jax.inference.generate import decode, generate_responses, round_up_to_devices
from promptkd_jax.infra import distributed, provenance
from promptkd_jax.infra.errors import DataError
from promptkd_jax.infra.files import AppendOnlyFile, write_text
from promptkd_jax.models.io import identity
from promptkd_jax.models.model import Model
from promptkd_jax.models.sampler import Sampling


def teacher_responses(
    teacher: Model,
    rows: Rows,
    file: epath.Path,
    *,
    sampling: Sampling,
    prompt_capacity: int,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    vocab_size: int,
) -> Rows:
    """The rows with responses that the teacher wrote (SeqKD, Kim & Rush 2016, arXiv 1606.07947).

    They are kept in `file`, with a manifest beside it; what is missing there is written, in the
    same batches and so with the same answers as if the writing had never been stopped. All
    processes of a run take part; the first one reads and writes the file.

    Args:
      rows: their requests are answered; the responses that they have are not looked at.
      seed: makes the key that all answers are sampled with; greedy answers do not depend on it.

    Returns:
      The rows, their records' outputs replaced by the decoded answers.

    Raises:
      DataError: `file` was made by something else, or is damaged.
    """
    made_from = _answers_made_from(teacher, rows, sampling, seed, max_new_tokens, vocab_size)
    provenance.verify_or_write(
        file.with_suffix(".manifest.json"), made_from, teacher.name, file=file
    )
    batch_size = round_up_to_devices(batch_size)
    answers = distributed.run_on_primary(lambda: _kept_answers(file, rows, batch_size))
    missing = generate_responses(
        teacher,
        rows,
        sampling=sampling,
        prompt_capacity=prompt_capacity,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        key=jax.random.key(seed),
        vocab_size=vocab_size,
        first=len(answers),
    )
    if len(answers) < len(rows.tokens):
        print(f"the teacher writes {len(rows.tokens) - len(answers)} answers into {file}")
    with AppendOnlyFile(file) as out:
        for answer in missing:
            line = {"request": _request(rows, len(answers)), "answer": answer.tolist()}
            answers.append(line["answer"])
            out.append(json.dumps(line) + "\n")
    records = [
        record._replace(outputs=(decode(teacher.tokenizer, answer),))
        for record, answer in zip(rows.records, answers, strict=True)
    ]
    cut = sum(not answer or answer[-1] not in sampling.eos_ids for answer in answers)
    return with_responses(rows, answers)._replace(records=records, cut=cut)


def _answers_made_from(
    teacher: Model, rows: Rows, sampling: Sampling, seed: int, max_new_tokens: int, vocab_size: int
) -> dict[str, Any]:
    requests = [_request(rows, number) for number in range(len(rows.tokens))]
    return {
        "format": provenance.FORMAT,
        "what": "answers",
        **identity.model_identity(teacher),
        "tokenizer": identity.tokenizer_digest(teacher.tokenizer),
        "requests": provenance.fingerprint_rows(requests),
        "sampling": dataclasses.asdict(sampling),
        "seed": seed if sampling.temperature else None,
        "max_new_tokens": max_new_tokens,
        "vocab_size": vocab_size,
    }


def _kept_answers(file: epath.Path, rows: Rows, batch_size: int) -> list[list[int]]:
    """The answers in `file`: all, or those of whole batches, so that what is still to be written is
    computed in the same batches as in a run that was not stopped. A torn end is cut off."""
    if not file.exists():
        return []
    lines = file.read_bytes().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n")]
    if len(whole) != len(rows.tokens):
        whole = whole[: len(whole) // batch_size * batch_size]
    answers = [_kept_answer(file, rows, *numbered) for numbered in enumerate(whole)]
    if whole != lines:
        write_text(file, b"".join(whole).decode())
    return answers


def _kept_answer(file: epath.Path, rows: Rows, number: int, text: bytes) -> list[int]:
    try:
        line = json.loads(text)
        request, answer = line["request"], line["answer"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file}:{number + 1}: damaged ({error!r}); expected an object with 'request' and "
            "'answer': remove this line and those after it, they are written anew"
        ) from error
    if number >= len(rows.tokens) or request != _request(rows, number):
        raise DataError(
            f"{file}:{number + 1}: answers another request than row {number} of the data; remove "
            "this line and those after it, they are written anew"
        )
    return answer


def _request(rows: Rows, number: int) -> list[int]:
    return rows.tokens[number][: rows.prompt_lengths[number]].tolist()
