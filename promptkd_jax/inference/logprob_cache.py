"""The teacher's top-k log-probabilities, written once, so that a run need not load the teacher.

Writing goes on where it was stopped. A manifest says what made the cache: teacher, tokenizer, rows,
and how; a cache that something else made is refused, not used.

    FOLDER/ids.npy, log_probs.npy   [tokens, k]: every response token of every row, in order
           tail.npy                 [tokens]: the log-probability of all tokens but these k
           offsets.npy              [rows + 1]: where each row begins among the tokens
           manifest.json            with "rows_written", how far it has come

B rows, R response positions, D width, V vocabulary, k kept tokens.
"""

import functools
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from promptkd_jax.data.batch import Batch, responses
from promptkd_jax.data.batches import eval_batches
from promptkd_jax.data.logprobs import ARRAYS, Cached, on_a_file_system, open_array
from promptkd_jax.data.rows import Rows, fingerprint_supervised
from promptkd_jax.data.top_k import TopK
from promptkd_jax.distill.losses.chunked_loss import top_k as most_likely
from promptkd_jax.distill.teacher import lazy_logits
from promptkd_jax.infra import distributed, provenance, sharding
from promptkd_jax.infra.errors import DataError
from promptkd_jax.infra.files import make_folder, write_json
from promptkd_jax.infra.terminal import ProgressBar
from promptkd_jax.models.decoder import Decoder
from promptkd_jax.models.io import identity
from promptkd_jax.models.model import Model


def write_cache(
    teacher: Model,
    rows: Rows,
    folder: epath.PathLike,
    *,
    top_k: int,
    batch_size: int,
    length: int,
    vocab_size: int,
    tokenizer: Any = None,
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
      tokenizer: that of the rows; None: the teacher's.

    Raises:
      DataError: `folder` was made by something else, or is in a bucket; a k or rows that cannot be
        used; or the teacher's log-probabilities are not finite.
    """
    folder = on_a_file_system(folder)
    if not 0 < top_k <= vocab_size:
        raise DataError(f"top_k {top_k}: expected 1 to {vocab_size}, the size of the vocabulary")
    counts = rows.num_supervised
    if not counts.any():
        raise DataError(f"none of the {len(counts)} rows has a response; the cache is of responses")
    manifest, offsets = folder / "manifest.json", np.concatenate([[0], np.cumsum(counts)])
    tokenizer = tokenizer or teacher.tokenizer
    made_from = _made_from(identity.model_identity(teacher), tokenizer, rows, vocab_size)
    if distributed.is_primary() and not manifest.exists():
        _create_arrays(folder, offsets, top_k, vocab_size)
    provenance.verify_or_write(
        manifest, made_from | {"top_k": top_k}, teacher.name, state={"rows_written": 0}
    )
    state = distributed.run_on_primary(lambda: provenance.read_manifest(manifest))
    if state["rows_written"] == len(counts):
        return Cached(folder, offsets, vocab_size)
    # In the same batches as if it had not been stopped.
    first = state["rows_written"] // batch_size * batch_size
    compute = _largest(teacher.decoder, int(counts.max()), vocab_size, top_k)
    batches = eval_batches(rows, batch_size=batch_size, length=length, first=first)
    with ProgressBar(len(counts), "rows read by the teacher", unit="row", first=first) as bar:
        for batch, real in batches:
            kept = sharding.to_host(compute(teacher.params, sharding.place_rows(batch)))
            ends = np.where(np.arange(batch_size) < real, batch.num_supervised, 0)
            mask = np.arange(kept.ids.shape[1]) < ends[:, None]
            if not np.isfinite(kept.log_probs[mask]).all():
                raise DataError(
                    f"{teacher.name}: a log-probability in rows {first} to {first + real - 1} is "
                    "not finite; such a teacher cannot be distilled (try dtype float32)"
                )
            # First the entries, then how far the writing has come.
            for name, array in zip(ARRAYS, kept if distributed.is_primary() else ()):
                _write_entries(folder / name, array[mask], offsets[first])
            first += real
            write_json(manifest, state | {"rows_written": first})
            bar.update(first)
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
    made_from = _made_from(teacher, tokenizer, rows, vocab_size)
    if top_k is not None:
        made_from |= {"top_k": top_k}
    provenance.verify(manifest, made_from)
    written = provenance.read_manifest(manifest)["rows_written"]
    if written < len(rows.tokens):
        raise DataError(
            f"{folder}: {written} of {len(rows.tokens)} rows written; run the same "
            "`promptkd cache` command again, it goes on from there"
        )
    return Cached(folder, np.array(open_array(folder / "offsets.npy")), vocab_size)


def _made_from(
    teacher: Mapping[str, str], tokenizer: Any, rows: Rows, vocab_size: int
) -> dict[str, Any]:
    return {
        "format": provenance.FORMAT,
        "what": "log_probs",
        **teacher,
        "tokenizer": identity.tokenizer_digest(tokenizer),
        "rows": fingerprint_supervised(rows),
        "config.data.date": rows.date or None,
        "vocab_size": vocab_size,
        "arrays": list(ARRAYS),
    }


def _create_arrays(folder: pathlib.Path, offsets: np.ndarray, top_k: int, vocab_size: int) -> None:
    """Files of their final size, with nothing in them yet."""
    make_folder(folder)
    np.save(folder / "offsets.npy", offsets)
    tokens = int(offsets[-1])
    ids = np.uint16 if vocab_size <= 2**16 else np.int32
    shapes = (tokens, top_k), (tokens, top_k), (tokens,)
    for name, shape, dtype in zip(ARRAYS, shapes, (ids, np.float32, np.float32)):
        np.lib.format.open_memmap(folder / name, mode="w+", dtype=dtype, shape=shape)


def _write_entries(file: pathlib.Path, entries: np.ndarray, first: int) -> None:
    """Puts `entries` at `first`. Not through the map: there, a full disk would kill the process."""
    stored = open_array(file)
    with file.open("r+b") as out:
        out.seek(stored.offset + first * stored.strides[0])
        out.write(entries.astype(stored.dtype).tobytes())
        out.flush()
        os.fsync(out.fileno())


@functools.lru_cache(maxsize=8)
def _largest(decoder: Decoder, capacity: int, vocab_size: int, k: int):
    @jax.jit
    def compute(params, batch: Batch) -> TopK:
        where = responses(batch, capacity)
        return most_likely(lazy_logits(decoder, params, batch, where, vocab_size), k)

    return compute
