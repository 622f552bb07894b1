"""A checkpoint, saved and read, against `torch.save` and `torch.load` of the same arrays.

python benchmarks/checkpoint.py [--copies 3] [--repeats 3]

Both are in this one process, in turn, on the local disk; the figures are the ratios of the medians.
Ours makes and checks checksums. The arrays are those of GPT-2 45M, as often as parameters and
moments of AdamW ask for; a save that warms up comes first.
"""

import argparse
import json
import pathlib
import statistics
import tempfile
import time

import jax
import numpy as np
import torch

from promptkd_jax.training.checkpoint import Checkpoints

WIDTH, DEPTH, VOCABULARY = 512, 6, 50257
SHAPES = {
    "embedding": (VOCABULARY, WIDTH),
    "positions": (1024, WIDTH),
    "attention": (DEPTH, WIDTH, 4 * WIDTH),
    "up": (DEPTH, WIDTH, 4 * WIDTH),
    "down": (DEPTH, 4 * WIDTH, WIDTH),
}


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--copies", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    draw = np.random.default_rng(0).standard_normal
    arrays = {
        f"{name} {copy}": draw(shape, dtype=np.float32)
        for name, shape in SHAPES.items()
        for copy in range(options.copies)
    }
    sides = {
        ours: jax.device_put(arrays),
        theirs: {name: torch.from_numpy(array.copy()) for name, array in arrays.items()},
    }
    taken = {side.__name__: [] for side in sides}
    for _ in range(1 + options.repeats):
        for side, state in sides.items():
            with tempfile.TemporaryDirectory() as folder:
                wall, cpu = time.perf_counter(), time.process_time()
                side(state, pathlib.Path(folder))
                spent = time.perf_counter() - wall, time.process_time() - cpu
            taken[side.__name__].append(spent)
    median = {
        name: [statistics.median(column) for column in zip(*times[1:])]
        for name, times in taken.items()
    }
    result = {
        "bytes": sum(array.nbytes for array in arrays.values()),
        "wall and CPU seconds": median,
        "wall and CPU ratio": [x / y for x, y in zip(median["ours"], median["theirs"])],
        "versions": {"jax": jax.__version__, "torch": torch.__version__},
    }
    print(json.dumps(result, indent=2))


def ours(state: dict, folder: pathlib.Path) -> None:
    """A checkpoint of arrays on a device, saved and read back onto it."""
    with Checkpoints(folder, keep=1, every=1) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait()
        _, restored, _ = checkpoints.restore_latest(state)
        jax.block_until_ready(restored)


def theirs(state: dict, folder: pathlib.Path) -> None:
    """The same by PyTorch."""
    torch.save(state, folder / "state.pt")
    torch.load(folder / "state.pt", weights_only=True)


if __name__ == "__main__":
    main()
