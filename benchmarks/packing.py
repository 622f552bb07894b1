"""Packed rows against length buckets on Dolly's lengths: the columns that are computed.

python benchmarks/packing.py FILE TOKENIZER [--batch-size 32] [--buckets 8] [--gap 0] [--steps 350]

Rows of at most 256 + 256 tokens from a file of records such as Dolly's, in the order of a run, for
some ways of dealing them out to micro-batches. Nothing is timed. Prints a table in Markdown.
"""

import argparse
from typing import NamedTuple

import numpy as np
from transformers import GPT2TokenizerFast

from promptkd_jax.data.batches import train_batches
from promptkd_jax.data.packing import packed_places
from promptkd_jax.data.reading.record_stream import read_records
from promptkd_jax.data.rows import Rows, tokenize
from promptkd_jax.data.templates import PromptFormat

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
    """Prints the table."""
    options = _options()
    rows = rows_of(options.file, options.tokenizer)
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
    print("| rows | micro-batches | columns for a token of a response | length buckets : this |")
    print("| --- | --- | --- | --- |")
    in_buckets = {w.micro_batches: n for w, n in zip(ways, columns) if _is_in_buckets(w)}
    for way, number in zip(ways, columns):
        each, ratio = number / responses.sum(), in_buckets[way.micro_batches] / number
        print(f"| {way.name} | {way.micro_batches} | {each:.2f} | {ratio:.2f} |")


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


def _is_in_buckets(way: Way) -> bool:
    return not way.packed and way.buckets > 1


def _least(lengths: np.ndarray, gap: int) -> int:
    """The packed rows that hold those of every step."""
    number = 1
    for each in lengths:
        while not packed_places(each, number, LENGTH, gap):
            number += 1
    return number


def rows_of(file: str, tokenizer: str) -> Rows:
    """The rows of a file of records, as GPT-2's tokenizer has them."""
    tokenizer = GPT2TokenizerFast.from_pretrained(tokenizer)
    how = dict(max_prompt_length=LENGTH // 2, max_length=LENGTH, eos_id=tokenizer.eos_token_id)
    return tokenize(read_records(file), tokenizer, PromptFormat("alpaca"), **how)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", help="records")
    parser.add_argument("tokenizer", help="of GPT-2: folder or hub id")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--buckets", type=int, default=8)
    parser.add_argument("--gap", type=int, default=0, help="columns for a soft prompt")
    parser.add_argument("--steps", type=int, default=350, help="that about an epoch")
    return parser.parse_args()


if __name__ == "__main__":
    main()
