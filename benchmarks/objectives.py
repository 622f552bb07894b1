"""The student's update under each objective, relative to reverse KL: time and XLA temporaries.

python benchmarks/objectives.py [--rows 2] [--columns 64] [--only wasd todi] [--output FILE.json]

GPT-2 124M into 45M with random weights by default, on the same gold rows: rollouts and a soft
prompt would cost the same under each. All are compiled in this one process and run in turn; figures
are ratios of medians. "wasd, all" has 8 neighbours for every token, "wasd, none" has none: a run
with a real teacher is between the two, see `transport` in docs/methods.md.
"""

import argparse
import functools
import json
import statistics
import time

import cases
import jax
import jax.numpy as jnp
import numpy as np

import promptkd_jax as pkd
from promptkd_jax.distill.losses.transport import Neighbours, TokenKernel
from promptkd_jax.distill.methods.curriculum import Interpolation, first_interpolation
from promptkd_jax.distill.step import train_step
from promptkd_jax.models.decoder import Decoder
from promptkd_jax.models.families.registry import from_hugging_face
from promptkd_jax.training.recipes import METHODS

PAIRS = {
    "GPT-2 124M into 45M": (cases.GPT2_BASE, cases.GPT2_45M),
    "GPT-2 XL into base": (cases.GPT2_XL, cases.GPT2_BASE),
}
FIELDS = ("temperature", "student_temperature")
SAME_UPDATE = ("abkd", "amid", "todi", "akl", "csd", "taid", "distillm", "distillm2")


def main() -> None:
    """Prints one JSON object, and writes it where asked to."""
    options = _parser().parse_args()
    teacher, student = (
        Decoder(from_hugging_face(config).replace(dtype=options.dtype))
        for config in PAIRS[options.pair]
    )
    vocab_size = student.config.vocab_size
    batch = _batch(options, vocab_size)
    optimizers = pkd.Optimizers(pkd.adamw(lambda _: 1e-9, weight_decay=0.0, max_grad_norm=1.0))
    params, teacher_params = {"student": _init(student, 1)}, _init(teacher, 0)
    arguments = {
        name: (
            pkd.init_state(
                params,
                optimizers,
                jax.random.key(0),
                interpolation=first_interpolation(method.interpolation),
            ),
            teacher_params,
            batch,
            None,
            None,
            kernel,
        )
        for name, (method, kernel) in _objectives(options, vocab_size).items()
    }
    compiled = {}
    for name, (method, _) in _objectives(options, vocab_size).items():
        models = pkd.Models(student, teacher)
        step = functools.partial(train_step, method=method, models=models, optimizers=optimizers)
        compiled[name] = jax.jit(step).lower(*arguments[name]).compile()
    seconds = {name: [] for name in compiled}
    for _ in range(options.repeats + 1):
        for name, function in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*arguments[name]))
            seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    memory = {
        name: function.memory_analysis().temp_size_in_bytes for name, function in compiled.items()
    }
    result = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "settings": {name: x for name, x in vars(options).items() if name != "output"},
        "seconds": median,
        "time": {name: median[name] / median["reverse_kl"] for name in median},
        "temporaries": {name: memory[name] / memory["reverse_kl"] for name in memory},
    }
    text = json.dumps(result, indent=2)
    print(text)
    if options.output:
        with open(options.output, "w") as file:
            file.write(f"{text}\n")


def _objectives(options: argparse.Namespace, vocab_size: int):
    """By name: the method, with the terms of a recipe on gold rows, and its kernel."""

    def method(**changes) -> pkd.Method:
        sizes = dict(total_steps=100, response_capacity=options.columns - 1, prompt_capacity=1)
        return pkd.Method(**sizes, vocab_size=vocab_size, **changes)

    made = {"reverse_kl": (method(student_terms=(("reverse_kl", 1.0),)), None)}
    for name in SAME_UPDATE:
        recipe = METHODS[name]
        changes = {field: recipe[field] for field in FIELDS if field in recipe}
        changes["student_terms"] = recipe["student_terms"] + recipe.get("off_policy_terms", ())
        if "interpolation" in recipe:
            changes["interpolation"] = Interpolation(**recipe["interpolation"])
        made[name] = method(**changes), None
    wasd = method(**{name: METHODS["wasd"][name] for name in ("student_terms", *FIELDS[1:])})
    made["wasd, none"] = wasd, TokenKernel((), vocab_size)
    made["wasd, all"] = wasd, _ring(vocab_size, wasd.transport.neighbours)
    wanted = options.only or made
    return {
        name: one
        for name, one in made.items()
        if name == "reverse_kl" or name in wanted or name.split(",")[0] in wanted
    }


def _ring(vocab_size: int, neighbours: int) -> TokenKernel:
    """Every token's neighbours are those with the nearest ids, at a distance of 0.01."""
    ids, half = np.arange(vocab_size), neighbours // 2
    steps = np.array([i for i in range(-half, half + 1) if i])
    columns = (ids[:, None] + steps) % vocab_size
    entries = np.full(columns.shape, -10.0, np.float32)
    arrays = (jnp.asarray(x) for x in (ids.astype(np.int32), columns.astype(np.int32), entries))
    return TokenKernel((Neighbours(*arrays),), vocab_size)


def _init(decoder: Decoder, seed: int):
    return jax.jit(decoder.init)(jax.random.key(seed), jnp.zeros((1, 2), jnp.int32))["params"]


def _batch(options: argparse.Namespace, vocab_size: int) -> pkd.Batch:
    shape = options.rows, options.columns
    tokens = jax.random.randint(jax.random.key(2), shape, 0, vocab_size)
    ones = jnp.ones(options.rows, jnp.int32)
    return pkd.Batch(tokens, ones, options.columns * ones)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pair", choices=PAIRS, default="GPT-2 124M into 45M")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--columns", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", default="")
    return parser


if __name__ == "__main__":
    main()
