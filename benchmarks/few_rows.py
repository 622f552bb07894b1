"""Products of few rows with a matrix on a CPU, by the order of the operands.

python benchmarks/few_rows.py [--width D] [--features F]

A token of a rollout is a product of few rows, each of one token, with every kernel: what it can
take at least is reading them. Prints how fast XLA reads 24 kernels `[D, F]` as right operands,
x W, and as left ones, W^T x^T (`projection.product_of_few_rows`), over the speed at which they are
summed up. The best of twelve turns each; a ratio above 1 says that the sum is the slower one.
"""

import argparse
import time

import jax
import jax.numpy as jnp

from promptkd_jax.models.layers.projection import product_of_few_rows

KERNELS, TURNS = 24, 12


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--features", type=int, default=3072)
    options = parser.parse_args()
    keys = jax.random.split(jax.random.key(0), KERNELS)
    shape = options.width, options.features
    right = [jax.random.normal(key, shape) for key in keys]
    left = [jnp.array(kernel.T) for kernel in right]
    reading = _seconds(lambda kernels: sum(map(jnp.sum, kernels)), right)
    print("| rows | x W | W^T x^T |", "| --- | --- | --- |", sep="\n")
    for rows in (1, 4, 8, 16, 32, 64, 128):
        x = jnp.ones((rows, options.width))
        times = (
            _seconds(lambda kernels, x: sum(jnp.tanh(x @ w) for w in kernels), right, x),
            _seconds(_left_products, left, x),
        )
        print(f"| {rows} |", " | ".join(f"{reading / t:.2f}" for t in times), "|", flush=True)


def _left_products(kernels: list[jax.Array], x: jax.Array) -> jax.Array:
    return sum(jnp.tanh(product_of_few_rows(w, x)) for w in kernels)


def _seconds(function, *arguments) -> float:
    function, each = jax.jit(function), []
    for _ in range(1 + TURNS):
        begun = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        each.append(time.perf_counter() - begun)
    return min(each[1:])


if __name__ == "__main__":
    main()
