"""Responses of a model, kept in a file: the teacher's, to learn from (SeqKD), or those to score.

Writing goes on where it was stopped. A manifest says what made the file: model, tokenizer, prompts,
and how; a file that something else made is refused, not used.

    NAME.jsonl           one line {"request": […], "answer": […]} for every row: the token ids of
                         its prompt and of the response
    NAME.manifest.json
"""

import dataclasses
import json
from typing import Any

import jax
from etils import epath

from promptkd_jax.data.rows import Rows, with_responses
from promptkd_jax.inference.generate import decode, generate_responses, round_up_to_devices
from promptkd_jax.infra import provenance
from promptkd_jax.infra.errors import DataError
from promptkd_jax.infra.files import AppendOnlyFile
from promptkd_jax.infra.terminal import ProgressBar
from promptkd_jax.models.io import identity
from promptkd_jax.models.model import Model
from promptkd_jax.models.sampling_rules import Sampling


def teacher_responses(teacher: Model, rows: Rows, file: epath.Path, **how: Any) -> Rows:
    """The rows with responses that the teacher wrote (SeqKD, Kim & Rush 2016, arXiv 1606.07947).

    Args:
      file: where they are kept; how: as `kept_responses` takes it.

    Returns:
      The rows, the responses of their records, where those are kept, replaced by the decoded ones.

    Raises:
      DataError: `file` was made by something else, or is damaged.
    """
    responses = kept_responses(teacher, rows, file, writer="the teacher", **how)
    eos_ids = how["sampling"].eos_ids
    records = rows.records and [
        record.answered(decode(teacher.tokenizer, response))
        for record, response in zip(rows.records, responses, strict=True)
    ]
    cut = sum(not response or response[-1] not in eos_ids for response in responses)
    return with_responses(rows, responses)._replace(records=records, cut=cut)


def kept_responses(
    model: Model,
    rows: Rows,
    file: epath.Path,
    *,
    sampling: Sampling,
    prompt_capacity: int,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    vocab_size: int,
    writer: str,
) -> list[list[int]]:
    """The token ids of one response to every row, kept in `file`, with a manifest beside it.

    What is missing there is written, in the same batches and so with the same responses as if the
    writing had never been stopped. All processes of a run take part; the first one reads and writes
    the file.

    Args:
      rows: their prompts are answered; the responses that they have are not looked at.
      seed: makes the key that all responses are sampled with; greedy ones do not depend on it.
      writer: who writes, for the message.

    Raises:
      DataError: `file` was made by something else, or is damaged.
    """
    prompts = [row[:end].tolist() for row, end in zip(rows.tokens, rows.prompt_lengths)]
    made_from = _made_from(model, prompts, sampling, seed, max_new_tokens, vocab_size)
    batch_size, total = round_up_to_devices(batch_size), len(prompts)
    lines = provenance.resume_lines(file, made_from, model.name, batch_size=batch_size, total=total)
    responses = [_response(file, prompts, *numbered) for numbered in enumerate(lines)]
    if len(responses) == total:
        return responses
    print(f"{writer} writes {total - len(responses)} responses into {file}", flush=True)
    missing = generate_responses(
        model,
        rows,
        sampling=sampling,
        prompt_capacity=prompt_capacity,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        key=jax.random.key(seed),
        vocab_size=vocab_size,
        first=len(responses),
    )
    bar = ProgressBar(
        -(-total // batch_size),
        "responses",
        unit="batch",
        first=len(responses) // batch_size,
    )
    with AppendOnlyFile(file) as out, bar:
        for response in missing:
            line = {"request": prompts[len(responses)], "answer": response.tolist()}
            responses.append(line["answer"])
            out.append(json.dumps(line) + "\n")
            if len(responses) % batch_size == 0 or len(responses) == total:
                bar.update(-(-len(responses) // batch_size))
    return responses


def _made_from(
    model: Model,
    prompts: list[list[int]],
    sampling: Sampling,
    seed: int,
    max_new_tokens: int,
    vocab_size: int,
) -> dict[str, Any]:
    kept = model.decoder.config.kv_cache_dtype
    return {
        "format": provenance.FORMAT,
        "what": "answers",
        **identity.model_identity(model),
        **({} if kept == "auto" else {"kv_cache_dtype": kept}),
        "tokenizer": identity.tokenizer_digest(model.tokenizer),
        "requests": provenance.fingerprint_rows(prompts),
        "sampling": dataclasses.asdict(sampling),
        "seed": seed if sampling.temperature else None,
        "max_new_tokens": max_new_tokens,
        "vocab_size": vocab_size,
    }


def _response(file: epath.Path, prompts: list[list[int]], number: int, line: Any) -> list[int]:
    """The response in a line of the file. Raises DataError if it is to another prompt."""
    match line:
        case {"request": prompt, "answer": [*response]} if prompts[number : number + 1] == [prompt]:
            return response
    raise DataError(
        f"{file}:{number + 1}: is no answer to the prompt of row {number} of the data; remove this "
        "line and those after it, they are written anew"
    )
