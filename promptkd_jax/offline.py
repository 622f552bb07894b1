"""What the teacher wrote down beforehand: its answers, and its top-k log-probabilities.

Both are written once, go on where they were stopped, and lie beside a manifest of what made them:
teacher, tokenizer, rows, and how. What another of these made is refused, not used.

    NAME.jsonl           one line {"request": […], "answer": […]} of token ids for every row
    NAME.manifest.json

    FOLDER/ids.npy, log_probs.npy   [tokens, k]: every response token of every row, in order
           tail.npy                 [tokens]: the log-probability of all tokens but these k
           offsets.npy              [rows + 1]: where each row begins among the tokens
           manifest.json            with "rows_written", how far it has come

B rows, R response positions, D width, V vocabulary, k kept tokens.
"""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from rich.progress import Progress

from promptkd_jax.data.batch import Batch, responses
from promptkd_jax.data.records import DataError, Rows, eval_batches, with_responses
from promptkd_jax.distill.chunked_loss import Linear, TopK, chunk_elements, log_sum_of_others
from promptkd_jax.distill.losses import log_probs
from promptkd_jax.distill.teacher import view
from promptkd_jax.evaluate import dealt_out, decode, write_answers
from promptkd_jax.infra import distributed, sharding
from promptkd_jax.infra import provenance as manifests
from promptkd_jax.infra.files import Lines, is_remote, make_folder, write_json, write_text
from promptkd_jax.models.decoder import Decoder
from promptkd_jax.models.load import Model
from promptkd_jax.models.sampler import Sampling

ARRAYS = tuple(f"{name}.npy" for name in TopK._fields)


# Answers


def teacher_answers(
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
    manifests.claim(file.with_suffix(".manifest.json"), made_from, teacher, file=file)
    batch_size = dealt_out(batch_size)
    answers = distributed.on_first(lambda: _kept_answers(file, rows, batch_size))
    missing = write_answers(
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
    with Lines(file) as out:
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
        "format": manifests.FORMAT,
        "what": "answers",
        **manifests.of_model(teacher),
        "tokenizer": manifests.of_tokenizer(teacher.tokenizer),
        "requests": manifests.of_rows(requests),
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


# Log-probabilities


@dataclasses.dataclass(frozen=True, eq=False)
class Cached:
    """A finished cache, made by `write_cache` or `open_cache`. It holds no open file: threads may
    share it, and it can be sent to other processes."""

    folder: pathlib.Path
    offsets: np.ndarray  # [rows + 1]
    vocab_size: int

    def rows(self, indices: Sequence[int], capacity: int) -> TopK:
        """What the teacher gave at the response positions of the rows at `indices`, in NumPy.

        Args:
          capacity: R; column r of a row is the position that predicts its response token r, as in
            `batch.responses`. Columns behind a row's last token hold the uniform distribution.

        Returns:
          TopK `[B, R, k]`, the largest first, with its tail.

        Raises:
          DataError: a row has more than `capacity` response tokens, or a file is damaged.
        """
        stored = [_array(self.folder / name) for name in ARRAYS]
        places, top_k = (len(indices), capacity), stored[0].shape[1]
        ids = np.tile(np.arange(top_k, dtype=np.int32), (*places, 1))
        values = np.full((*places, top_k), -np.log(self.vocab_size), np.float32)
        with np.errstate(divide="ignore"):  # where all tokens are kept, none are left
            tail = np.full(places, np.log1p(-top_k / self.vocab_size), np.float32)
        for b, index in enumerate(indices):
            start, end = self.offsets[index], self.offsets[index + 1]
            if end - start > capacity:
                raise DataError(
                    f"{self.folder}: row {index} has {end - start} response tokens, the batch has "
                    f"room for {capacity}"
                )
            for array, column in zip((ids, values, tail), stored):
                array[b, : end - start] = column[start:end]
        return TopK(ids, values, tail)


def write_cache(
    teacher: Model,
    rows: Rows,
    folder: epath.PathLike,
    *,
    top_k: int,
    batch_size: int,
    length: int,
    vocab_size: int,
) -> Cached:
    """Writes the plain teacher's k largest log-probabilities at every response position into
    `folder`, or what is still missing there.

    All processes of a run take part; the first one writes.

    Args:
      folder: of a file system, not of a bucket.
      top_k: k, at most `vocab_size`, where nothing is lost.
      batch_size: rows in one call of the teacher. The same one gives the same bytes.
      length: T, at least that of the longest row.
      vocab_size: the vocabulary that teacher and student share; probabilities add up to 1 over it.

    Raises:
      DataError: `folder` was made by something else, or is in a bucket; a k or rows that cannot be
        used; or the teacher's log-probabilities are not finite.
    """
    folder = on_a_file_system(folder)
    if not 0 < top_k <= vocab_size:
        raise DataError(f"top_k {top_k}: expected 1 to {vocab_size}, the size of the vocabulary")
    counts = _response_counts(rows)
    if not counts.any():
        raise DataError(f"none of the {len(counts)} rows has a response; the cache is of responses")
    made_from = _cache_made_from(manifests.of_model(teacher), teacher.tokenizer, rows, vocab_size)
    made_from |= {"top_k": top_k}
    manifest = folder / "manifest.json"
    offsets = np.concatenate([[0], np.cumsum(counts)])
    if distributed.is_first() and not manifest.exists():
        _create_arrays(folder, offsets, top_k, vocab_size)
    manifests.claim(manifest, made_from, teacher, state={"rows_written": 0})
    _write_rows(teacher, rows, folder, offsets, top_k, batch_size, length, vocab_size)
    return Cached(folder, offsets, vocab_size)


def open_cache(
    folder: epath.PathLike,
    *,
    teacher: Mapping[str, str],
    tokenizer: Any,
    rows: Rows,
    vocab_size: int,
    top_k: int | None = None,
) -> Cached:
    """The cache that `write_cache` wrote for these rows.

    Args:
      teacher: the `identity` of the one that it has to be of, which need not be loaded.
      top_k: the k that it has to have; None: any.

    Raises:
      DataError: there is none, it is not finished, something else made it, or it is in a bucket.
    """
    folder = on_a_file_system(folder)
    manifest = folder / "manifest.json"
    if not manifest.exists():
        raise DataError(
            f"{folder}: holds no cache (no {manifest.name}); `promptkd cache --output {folder} "
            "--config …` writes one"
        )
    made_from = _cache_made_from(teacher, tokenizer, rows, vocab_size)
    if top_k is not None:
        made_from |= {"top_k": top_k}
    manifests.compare(manifest, made_from)
    written = manifests.read_manifest(manifest)["rows_written"]
    if written < len(rows.tokens):
        raise DataError(
            f"{folder}: {written} of {len(rows.tokens)} rows written; run the same "
            "`promptkd cache` command again, it goes on from there"
        )
    return Cached(folder, np.array(_array(folder / "offsets.npy")), vocab_size)


def _cache_made_from(teacher, tokenizer, rows: Rows, vocab_size: int) -> dict[str, Any]:
    return {
        "format": manifests.FORMAT,
        "what": "log_probs",
        **teacher,
        "tokenizer": manifests.of_tokenizer(tokenizer),
        "rows": manifests.of_rows(
            [np.append(n, row) for n, row in zip(rows.prompt_lengths, rows.tokens)]
        ),
        "config.data.date": rows.date or None,
        "vocab_size": vocab_size,
        "arrays": list(ARRAYS),
    }


def _response_counts(rows: Rows) -> np.ndarray:
    return np.array([len(row) for row in rows.tokens]) - rows.prompt_lengths


def on_a_file_system(folder: epath.PathLike) -> pathlib.Path:
    """The same folder. Raises DataError for one in a bucket."""
    if is_remote(folder):
        raise DataError(
            f"{folder}: a cache is read at random through memory maps, which a bucket does not "
            "have; expected a folder of a disk or of a shared file system"
        )
    return pathlib.Path(folder)


def _create_arrays(folder: pathlib.Path, offsets: np.ndarray, top_k: int, vocab_size: int) -> None:
    """Files of their final size, with nothing in them yet."""
    make_folder(folder)
    np.save(folder / "offsets.npy", offsets)
    tokens = int(offsets[-1])
    ids = np.uint16 if vocab_size <= 2**16 else np.int32
    shapes = (tokens, top_k), (tokens, top_k), (tokens,)
    for name, shape, dtype in zip(ARRAYS, shapes, (ids, np.float32, np.float32)):
        np.lib.format.open_memmap(folder / name, mode="w+", dtype=dtype, shape=shape)


def _write_rows(teacher, rows, folder, offsets, top_k, batch_size, length, vocab_size) -> None:
    """Batch by batch: first the entries, then how far it has come."""
    manifest, total = folder / "manifest.json", len(rows.tokens)
    state = distributed.on_first(lambda: manifests.read_manifest(manifest))
    first = state["rows_written"]
    if first == total:
        return
    first = first // batch_size * batch_size  # the same batches as if it had not been stopped
    compute = _largest(teacher.decoder, int(np.diff(offsets).max()), vocab_size, top_k)
    rest = rows._replace(tokens=rows.tokens[first:], prompt_lengths=rows.prompt_lengths[first:])
    with Progress() as progress:
        task = progress.add_task("rows read by the teacher", total=total, completed=first)
        for batch, real in eval_batches(rest, batch_size=batch_size, length=length):
            found = sharding.to_host(compute(teacher.params, sharding.place_rows(batch)))
            counts = np.where(np.arange(batch_size) < real, batch.lengths - batch.prompt_lengths, 0)
            mask = np.arange(found.ids.shape[1]) < counts[:, None]
            if not np.isfinite(found.log_probs[mask]).all():
                raise DataError(
                    f"{teacher.name}: a log-probability in rows {first} to {first + real - 1} is "
                    "not finite; such a teacher cannot be distilled (try dtype float32)"
                )
            for name, array in zip(ARRAYS, found if distributed.is_first() else ()):
                _write_entries(folder / name, array[mask], offsets[first])
            first += real
            write_json(manifest, state | {"rows_written": first})
            progress.update(task, completed=first)


def _write_entries(file: pathlib.Path, entries: np.ndarray, first: int) -> None:
    """Puts `entries` at `first`. Not through the map: there, a full disk would kill the process."""
    stored = _array(file)
    with file.open("r+b") as out:
        out.seek(stored.offset + first * stored.strides[0])
        out.write(entries.astype(stored.dtype).tobytes())
        out.flush()
        os.fsync(out.fileno())


def _array(file: pathlib.Path) -> np.ndarray:
    try:
        return np.load(file, mmap_mode="r")
    except (OSError, EOFError, ValueError) as error:
        raise DataError(
            f"{file}: damaged or missing: {error}; remove {file.parent}, and write it anew"
        ) from error


@functools.lru_cache(maxsize=8)
def _largest(decoder: Decoder, capacity: int, vocab_size: int, top_k: int):
    @jax.jit
    def compute(params, batch: Batch) -> TopK:
        where = responses(batch, capacity)
        return largest(view(decoder, params, batch, where, vocab_size), top_k)

    return compute


def largest(model: Linear, top_k: int) -> TopK:
    """The k largest log-probabilities at every position, `[B, R, k]`, the largest first, and that
    of the tail, which is summed before anything is rounded to 1.

    Computed in float32 over all V tokens, a few positions at a time: no `[B, R, V]` array exists.
    """

    def at(hidden: jax.Array) -> TopK:  # [B, D]
        logits = Linear(hidden[:, None], model.head).logits()[:, 0]
        everything = log_probs(logits)
        values, ids = jax.lax.top_k(everything, top_k)
        return TopK(ids, values, log_sum_of_others(everything, ids))

    most = chunk_elements(sharding.platform())
    chunk = max(most // (model.hidden.shape[0] * model.head.shape[0]), 1)
    found = jax.lax.map(at, jnp.swapaxes(model.hidden, 0, 1), batch_size=chunk)
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), found)
