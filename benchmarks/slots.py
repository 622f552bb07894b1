"""Fewer rows at once than a step has (`max_concurrent_rollouts`): what turns and time it takes.

python benchmarks/slots.py FILE TOKENIZER [--rows 64 256 1024] [--fixed 85] [--prompt 13]

Rows end where those of a file of records such as Dolly's do, at most 256 tokens behind their
prompts, and others take their places as in the sampler. Nothing is timed: time is counted in what a
row adds to a turn. `--fixed` is what a turn takes beside its rows (reading weights, starting
kernels), `--prompt` what reading a row's prompt takes; the defaults are those of GPT-2 base on an
H200 (turns of 64 and of 256 rows, and prompts of 256 tokens at 400 TFLOP/s). Prints a table in
Markdown; the last row of a batch is of rows none of which ends before its limit.
"""

import argparse
from collections.abc import Sequence

import numpy as np
from packing import LENGTH, rows_of

from promptkd_jax.models.sampler import rows_of_a_round

LIMIT, DRAWS = LENGTH // 2, 20


def turns_and_prompts(lengths: Sequence[int], slots: int) -> tuple[int, int]:
    """Of the tokens that each row writes: the turns, and the prompts that are read, for shapes are
    static. As soon as a quarter of the slots are free, and rows wait, so many are let in."""
    waiting, least = list(lengths[slots:]), rows_of_a_round(slots)
    left, turns, prompts = np.array(lengths[:slots]), 0, slots
    while waiting:
        until = np.sort(left)[least - 1]
        turns, left = turns + until, np.maximum(left - until, 0)
        free = np.flatnonzero(left == 0)[: min(least, len(waiting))]
        left[free] = [waiting.pop(0) for _ in free]
        prompts += least
    return int(turns + left.max()), prompts


def main() -> None:
    """Prints the table."""
    options = _options()
    lengths = np.minimum(rows_of(options.file, options.tokenizer).num_supervised, LIMIT)
    print(f"{len(lengths):,} rows of {lengths.mean():.0f} tokens, {np.mean(lengths == LIMIT):.0%}")
    print("of them of the most\n\n| rows | at once | turns | prompts | time |")
    print("| --- | --- | --- | --- | --- |")
    for rows in options.rows:
        draws = [np.random.default_rng(seed).choice(lengths, rows) for seed in range(DRAWS)]
        whole = _time(options, rows, *_mean(draws, rows))
        for slots in (rows, rows // 2, rows // 4, rows // 8):
            turns, prompts = _mean(draws, slots)
            ratio = _time(options, slots, turns, prompts) / whole
            print(f"| {rows} | {slots} | {turns:.0f} | {prompts:.0f} | {ratio:.2f} |")
        found = [_mean([np.full(rows, LIMIT)], slots) for slots in (rows, rows // 2)]
        whole, half = (_time(options, x, *each) for x, each in zip((rows, rows // 2), found))
        turns, prompts = found[1]
        print(f"| {rows} | {rows // 2} | {turns:.0f} | {prompts:.0f} | {half / whole:.2f} |")


def _mean(draws: list[np.ndarray], slots: int) -> np.ndarray:
    return np.mean([turns_and_prompts(draw, slots) for draw in draws], axis=0)


def _time(options: argparse.Namespace, slots: int, turns: float, prompts: float) -> float:
    return turns * (options.fixed + slots) + prompts * options.prompt


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", help="records")
    parser.add_argument("tokenizer", help="of GPT-2: folder or hub id")
    parser.add_argument("--rows", type=int, nargs="+", default=(64, 256, 1024), help="of a step")
    parser.add_argument("--fixed", type=float, default=85.0, help="of a turn, in rows")
    parser.add_argument("--prompt", type=float, default=13.0, help="of a prompt, in rows of a turn")
    return parser.parse_args()


if __name__ == "__main__":
    main()
