"""The chunked linear loss against the dense one: XLA temporaries and time, value and gradients.

python benchmarks/loss.py [--rows 4] [--columns 512] [--vocab 49152] [--dtype float32]

Both are compiled and run in this one process, in turn; the figure is the ratio of the medians.
"""

import argparse
import json
import statistics
import time

import jax
import jax.numpy as jnp

from promptkd_jax.distill.losses import losses
from promptkd_jax.distill.losses.chunked_loss import linear_loss
from promptkd_jax.models.language_model import LazyLogits


def main() -> None:
    """Prints one JSON object."""
    options = _parser().parse_args()
    inputs = _inputs(options)
    divergence = losses.divergence(options.divergence)

    def dense(hidden, head, target, mask):
        return jnp.sum(divergence(target.logits(), LazyLogits(hidden, head).logits()) * mask)

    def chunked(hidden, head, target, mask):
        return linear_loss([divergence], LazyLogits(hidden, head), [target], mask)[0]

    compiled = {
        f.__name__: jax.jit(jax.value_and_grad(f, argnums=(0, 1))).lower(*inputs).compile()
        for f in (dense, chunked)
    }
    seconds = {name: [] for name in compiled}
    for _ in range(options.repeats + 1):
        for name, function in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*inputs))
            seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    temporaries = {
        name: function.memory_analysis().temp_size_in_bytes / 2**20
        for name, function in compiled.items()
    }
    result = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "settings": vars(options),
        "temporaries_mib": temporaries,
        "seconds": median,
        "time_ratio": median["chunked"] / median["dense"],
    }
    print(json.dumps(result, indent=2))


def _inputs(options: argparse.Namespace):
    keys = jax.random.split(jax.random.key(0), 4)
    shape = (options.rows, options.columns)

    def normal(key, *shape):
        return jax.random.normal(key, shape, options.dtype)

    return (
        normal(keys[0], *shape, 576),
        0.05 * normal(keys[1], options.vocab, 576),
        LazyLogits(normal(keys[2], *shape, 960), 0.05 * normal(keys[3], options.vocab, 960)),
        jnp.ones(shape),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--columns", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--divergence", default="reverse_kl")
    parser.add_argument("--repeats", type=int, default=5)
    return parser


if __name__ == "__main__":
    main()
