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

LIMIT, DRAWS = LENGTH // 2, 20


def turns_and_prefills(lengths: Sequence[int], slots: int) -> tuple[int, int]:
    """Of the tokens that each row writes: as soon as a quarter of the slots are free, and rows
    wait, all free ones are taken, which is one prefill of `slots` rows."""
    waiting, left = list(lengths), np.zeros(slots, int)
    turns = prefills = 0
    while waiting:
        free = np.flatnonzero(left == 0)[: len(waiting)]
        left[free] = [waiting.pop(0) for _ in free]
        prefills += 1
        until = np.sort(left)[max(1, slots // 4) - 1] if waiting else left.max()
        turns, left = turns + until, np.maximum(left - until, 0)
    return int(turns), prefills


def main() -> None:
    """Prints the table."""
    options = _options()
    lengths = np.minimum(rows_of(options.file, options.tokenizer).num_supervised, LIMIT)
    print(f"{len(lengths):,} rows of {lengths.mean():.0f} tokens, {np.mean(lengths == LIMIT):.0%}")
    print("of them of the most\n\n| rows | at once | turns | prefills | time |")
    print("| --- | --- | --- | --- | --- |")
    for rows in options.rows:
        draws = [np.random.default_rng(seed).choice(lengths, rows) for seed in range(DRAWS)]
        whole = _time(options, rows, *_mean(draws, rows))
        for slots in (rows, rows // 2, rows // 4, rows // 8):
            turns, prefills = _mean(draws, slots)
            ratio = _time(options, slots, turns, prefills) / whole
            print(f"| {rows} | {slots} | {turns:.0f} | {prefills:.1f} | {ratio:.2f} |")
        found = [_mean([np.full(rows, LIMIT)], slots) for slots in (rows, rows // 2)]
        whole, half = (_time(options, x, *each) for x, each in zip((rows, rows // 2), found))
        turns, prefills = found[1]
        print(f"| {rows} | {rows // 2} | {turns:.0f} | {prefills:.1f} | {half / whole:.2f} |")


def _mean(draws: list[np.ndarray], slots: int) -> np.ndarray:
    return np.mean([turns_and_prefills(draw, slots) for draw in draws], axis=0)


def _time(options: argparse.Namespace, slots: int, turns: float, prefills: float) -> float:
    return turns * (options.fixed + slots) + prefills * slots * options.prompt


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
