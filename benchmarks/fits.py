"""A train step of a config at its real size, on this machine's devices, with made-up weights: does
it fit, and what does it take?

    XLA_PYTHON_CLIENT_MEM_FRACTION=0.146 python benchmarks/fits.py \
        --config=configs/llama32.py:student=1b,gpu=24gb

Nothing is read but the config and the built-in shapes of published models. Prints what the compiler
says, the temporaries that `promptkd plan` estimates and XLA's own account of the step, and again
with the seconds of each step and the most that the device had in use. A run that does not fit ends
with XLA's error. On a larger GPU XLA_PYTHON_CLIENT_MEM_FRACTION makes a smaller one.
"""

import json
import sys
import time

import jax
import jax.numpy as jnp

from promptkd_jax.data.batch import Batch
from promptkd_jax.infra import sharding
from promptkd_jax.plan import roofline
from promptkd_jax.plan.abstract_run import AbstractRun, abstract_run
from promptkd_jax.training.config.checks import read_run

STEPS = 3


def main() -> None:
    """Compiles the last stage's step, and makes some."""
    config = read_run(sys.argv[1:])
    mesh = sharding.make_mesh(config.mesh.sizes)
    run = abstract_run(config).on(mesh)
    device = mesh.devices.flat[0]
    with jax.set_mesh(mesh):
        begun = time.monotonic()
        compiled = run.jitted_step(run.stage).lower(*run.arguments()).compile()
        compiling, account = time.monotonic() - begun, compiled.memory_analysis()
        said = {
            "device": device.device_kind,
            "jax": jax.__version__,
            "limit": (device.memory_stats() or {}).get("bytes_limit"),
            "compiling_s": round(compiling, 1),
            "estimated_temporaries": roofline.temporary_bytes(run, platform=sharding.platform()),
            "xla": {
                name: getattr(account, f"{name}_size_in_bytes")
                for name in ("argument", "output", "alias", "temp", "generated_code")
            },
        }
        print(json.dumps(said), flush=True)
        state, *others = _made_up(run)
        for number in range(STEPS):
            begun = time.monotonic()
            state, metrics = jax.block_until_ready(compiled(state, *others))
            said[f"step_{number}_s"] = round(time.monotonic() - begun, 3)
    said["loss"] = float(metrics.losses["student"].sum())
    said["response_tokens"] = int(metrics.counts.sum())
    said["most_in_use"] = (device.memory_stats() or {}).get("peak_bytes_in_use")
    print(json.dumps(said, indent=2))


def _made_up(run: AbstractRun) -> list:
    """Arrays for all arguments: parameters of small numbers, rows of full prompts, zeros else."""
    state, teacher, batch, *others = run.arguments()
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), state.optimizers)
    teacher = jax.tree.map(_numbers, teacher)  # the largest first, while all memory is free
    state = jax.tree.map(_numbers, state.replace(optimizers=None)).replace(optimizers=zeros)
    rows, columns = batch.tokens.shape
    tokens = 5 + jnp.arange(rows * columns, dtype=jnp.int32).reshape(rows, columns) % 1000
    ends = run.stage.method.prompt_capacity, columns
    batch = Batch(tokens, *(jnp.full(rows, end, jnp.int32) for end in ends))
    return [state, teacher, sharding.place_rows(batch), *jax.tree.map(_numbers, others)]


def _numbers(x: jax.ShapeDtypeStruct) -> jax.Array:
    """Numbers that repeat along the last axis, made without any other array."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.key(0)
    if x.ndim < 2 or not (jnp.issubdtype(x.dtype, jnp.floating) or x.dtype == jnp.int8):
        return jnp.zeros(x.shape, x.dtype, device=x.sharding)

    def made():
        number = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1) * 37 % 251 - 125
        return number.astype(x.dtype) * (1 if x.dtype == jnp.int8 else jnp.asarray(1e-4, x.dtype))

    return jax.jit(made, out_shardings=x.sharding)()


if __name__ == "__main__":
    main()
