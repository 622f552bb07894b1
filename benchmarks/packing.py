"""Packed rows against length buckets on Dolly's lengths: columns that are computed, and time.

python benchmarks/packing.py FILE TOKENIZER [--batch-size 32] [--buckets 8] [--gap 0] [--steps 350]
  [--times 8]

Rows of at most 256 + 256 tokens from a file of records such as Dolly's, in the order of a run.
Columns are counted for `--steps` steps, with some ways of dealing rows out to micro-batches. The
first `--times` of these steps are then run in one micro-batch, as KD on small random models, all
ways in turn: a ratio is of the times of the same steps. Prints tables in Markdown.
"""

import argparse
import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from transformers import GPT2TokenizerFast

from promptkd_jax.data.batch import Batch
from promptkd_jax.data.batches import train_batches
from promptkd_jax.data.packing import pack_batch, packed_places
from promptkd_jax.data.reading import read_records
from promptkd_jax.data.rows import Rows, tokenize
from promptkd_jax.data.templates import PromptFormat
from promptkd_jax.distill.method import Method
from promptkd_jax.distill.method_fields import Execution
from promptkd_jax.distill.state import Optimizers, init_state
from promptkd_jax.distill.step import train_step
from promptkd_jax.distill.teacher import Models
from promptkd_jax.models.decoder import Decoder
from promptkd_jax.models.families.registry import from_hugging_face

LENGTH = 512


class Way(NamedTuple):
    """How the rows of a step are computed: in `packed` rows, or 0 for each its own, dealt out to
    micro-batches, in so many length buckets."""

    name: str
    packed: int
    micro_batches: int
    buckets: int

    def columns(self, lengths: np.ndarray, gap: int) -> int:
        """Those that a step's rows of `lengths` `[B]` are computed in, padding included."""
        if self.packed:
            places = packed_places(lengths, self.packed, LENGTH, gap)
            lengths = np.array([lengths[at].sum() + gap * (len(at) - 1) for at in places])
        # As `step` deals rows out where there are buckets: those of like length together.
        parts = np.sort(lengths).reshape(self.micro_batches, -1)
        widths = np.array([-(-LENGTH * k // self.buckets) for k in range(1, self.buckets + 1)])
        taken = widths[np.searchsorted(widths, parts.max(axis=1))]
        return int(taken.sum() * parts.shape[1])


def main() -> None:
    """Prints what is counted, then what is timed."""
    options = _options()
    rows, vocab_size = _rows(options)
    batches = train_batches(rows, batch_size=options.batch_size, length=LENGTH, seed=10)
    steps = [batches[step] for step in range(options.steps)]
    lengths, responses = (
        np.array([x(batch) for batch in steps])
        for x in (lambda batch: batch.lengths, lambda batch: batch.num_supervised)
    )
    least = _least(lengths, options.gap)
    print(
        f"{len(rows.tokens):,} rows of {np.mean(lengths):.0f} tokens, {np.mean(responses):.0f} of "
        f"them of the response; {options.steps} steps of {options.batch_size}, which fit into "
        f"{least} packed rows, {options.gap} columns between two\n"
    )
    ways = _ways(options, least)
    columns = [sum(way.columns(each, options.gap) for each in lengths) for way in ways]
    _print_table("columns for a token of a response", ways, np.array(columns) / responses.sum())
    if options.times:
        ways = [way for way in ways if way.micro_batches == 1]
        seconds = _times(ways, steps[: options.times], options.gap, vocab_size)
        seconds = 1e3 * np.sum(seconds, axis=1) / responses[: options.times].sum()
        _print_table("ms for a token of a response", ways, seconds)


def _print_table(what: str, ways: list[Way], values: np.ndarray) -> None:
    """One line a way, beside those of length buckets with as many micro-batches."""
    print(f"\n| rows | micro-batches | {what} | length buckets : this |\n|{' --- |' * 4}")
    in_buckets = {
        w.micro_batches: x for w, x in zip(ways, values) if not w.packed and w.buckets > 1
    }
    for way, value in zip(ways, values):
        ratio = in_buckets[way.micro_batches] / value
        print(f"| {way.name} | {way.micro_batches} | {value:.2f} | {ratio:.2f} |")


def _ways(options: argparse.Namespace, least: int) -> list[Way]:
    ways = []
    for number in (1, 2, 4, 8):
        packed = -(-least // number) * number
        ways += [
            Way("whole", 0, number, 1),
            Way(f"in {options.buckets} length buckets", 0, number, options.buckets),
            Way(f"packed into {packed}, in length buckets", packed, number, options.buckets),
        ]
    return ways


def _least(lengths: np.ndarray, gap: int) -> int:
    """The packed rows that hold those of every step."""
    number = 1
    for each in lengths:
        while not packed_places(each, number, LENGTH, gap):
            number += 1
    return number


def _rows(options: argparse.Namespace) -> tuple[Rows, int]:
    tokenizer = GPT2TokenizerFast.from_pretrained(options.tokenizer)
    lengths = dict(max_prompt_length=LENGTH // 2, max_length=LENGTH)
    end = dict(eos_id=tokenizer.eos_token_id)
    rows = tokenize(read_records(options.file), tokenizer, PromptFormat("alpaca"), **lengths, **end)
    return rows, len(tokenizer)


# Times


def _decoder(layers: int, width: int, vocab_size: int) -> Decoder:
    shape = dict(n_embd=width, n_layer=layers, n_head=width // 64, n_positions=2 * LENGTH)
    return Decoder(from_hugging_face({"model_type": "gpt2", "vocab_size": vocab_size} | shape))


def _params(model: Decoder, seed: int) -> Any:
    init = jax.jit(model.init)
    return init(jax.random.key(seed), jnp.zeros((1, 2), jnp.int32))["params"]


def _times(ways: list[Way], steps: list[Batch], gap: int, vocab_size: int) -> list[list[float]]:
    """Seconds of each step in each way, the ways in turn; what is compiled is not counted."""
    models = Models(student=_decoder(4, 256, vocab_size), teacher=_decoder(8, 384, vocab_size))
    student, teacher = _params(models.student, 0), _params(models.teacher, 1)
    optimizers = Optimizers(optax.sgd(1e-3))
    runs = []
    for way in ways:
        method = Method(
            student_terms=(("cross_entropy", 0.5), ("forward_kl", 0.5)),
            total_steps=len(steps),
            response_capacity=LENGTH - 1,
            prompt_capacity=LENGTH // 2,
            vocab_size=vocab_size,
            execution=Execution(
                gradient_accumulation_steps=way.micro_batches,
                length_buckets=way.buckets,
                packed_rows=way.packed,
            ),
        )
        fixed = dict(method=method, models=models, optimizers=optimizers)
        runs.append(jax.jit(functools.partial(train_step, **fixed)))
    state = init_state({"student": student}, optimizers, jax.random.key(0))
    seconds = [[] for _ in ways]
    for number, batch in enumerate([steps[0], *steps]):
        for way, step, taken in zip(ways, runs, seconds):
            rows = pack_batch(batch, way.packed, gap=gap) if way.packed else batch
            start = time.perf_counter()
            jax.block_until_ready(step(state, teacher, rows))
            if number:
                taken.append(time.perf_counter() - start)
    return seconds


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", help="records")
    parser.add_argument("tokenizer", help="of GPT-2: folder or hub id")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--buckets", type=int, default=8)
    parser.add_argument("--gap", type=int, default=0, help="columns for a soft prompt")
    parser.add_argument("--steps", type=int, default=350, help="that are counted, about an epoch")
    parser.add_argument("--times", type=int, default=8, help="steps that are timed")
    return parser.parse_args()


if __name__ == "__main__":
    main()
