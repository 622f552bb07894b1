"""What XLA's TPU compiler expects of a token of a rollout, beside the least that memory allows.

PYTHONPATH=. python benchmarks/tpu_rollouts.py OUT.json [--before CHECKOUT] [--only NAME …]

Needs libtpu and no TPU. Compiles `sample` for every case of `CASES`, in a process of its own, and
with `--before` also that of another checkout of this repository. The least is the time to read
weights and cache once, and to write the logits, from and to HBM; estimates, not measurements: the
compiler counts operations one after the other, without collectives and copies that run beside them.
Of a mixture the experts, which are kernels in Pallas, have no part in either.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from promptkd_jax.infra import sharding
from promptkd_jax.models.decoder import Decoder
from promptkd_jax.models.families.registry import from_hugging_face
from promptkd_jax.models.io.params import abstract_params
from promptkd_jax.models.layers.quantization import QUANTIZE
from promptkd_jax.models.sampler import sample
from promptkd_jax.models.sampling_rules import Sampling
from promptkd_jax.plan import ahead, hlo
from promptkd_jax.plan.abstract_run import stored_config
from promptkd_jax.plan.chips import parse_topology
from promptkd_jax.plan.costs import Counter

# OLMoE 1B-7B with 4 of its 16 layers, since the built-in table has no mixture this small.
MIXTURE = {
    "model_type": "olmoe",
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 4,
    "max_position_embeddings": 4096,
    "vocab_size": 50304,
    "tie_word_embeddings": False,
}
PROMPT, NEW = 256, 256


class Case(NamedTuple):
    """Rows of 512 columns that a model writes; kept in `param_dtype`, computed in bfloat16."""

    model: str
    topology: str
    mesh: tuple[int, int, int]
    rows: int
    param_dtype: str = "float32"
    quantize: str = "none"


CASES = {
    "Llama-3.2 1B, v5e": Case("meta-llama/Llama-3.2-1B", "v5e:1x1", (1, 1, 1), 64),
    "Llama-3.2 1B, v6e": Case("meta-llama/Llama-3.2-1B", "v6e:1x1", (1, 1, 1), 64),
    "Llama-3.2 1B, v5e, 1 x 2 x 4": Case("meta-llama/Llama-3.2-1B", "v5e:2x4", (1, 2, 4), 64),
    "Llama-3.2 1B, v5e, 1 x 8 x 1": Case("meta-llama/Llama-3.2-1B", "v5e:2x4", (1, 8, 1), 8),
    "GPT-2 base, v5e, 1 x 8 x 1": Case("openai-community/gpt2", "v5e:2x4", (1, 8, 1), 256),
    "GPT-2 XL, v5e": Case(
        "openai-community/gpt2-xl", "v5e:1x1", (1, 1, 1), 32, param_dtype="bfloat16"
    ),
    "GPT-2 XL, v5e, 1 x 2 x 4": Case("openai-community/gpt2-xl", "v5e:2x4", (1, 2, 4), 64),
    "OLMoE, 4 layers, v6e": Case("", "v6e:1x1", (1, 1, 1), 64),
    "Llama-3.2 1B in int8, v5e": Case(
        "meta-llama/Llama-3.2-1B", "v5e:1x1", (1, 1, 1), 64, quantize="int8"
    ),
    "GPT-2 XL in int8, v5e": Case(
        "openai-community/gpt2-xl", "v5e:1x1", (1, 1, 1), 32, quantize="int8"
    ),
}


def main() -> None:
    """Compiles what is missing, and prints the table."""
    options = _options()
    if options.text:
        pathlib.Path(options.out).write_text(_compiled(CASES[options.text]))
        return
    print(_table(with_missing(options, CASES, _least, _cycles)))


def with_missing(
    options: argparse.Namespace,
    cases: Mapping[str, Any],
    least: Callable[[Any], int],
    find: Callable[[str, str], Any],
) -> dict[str, dict[str, Any]]:
    """The results in the file OUT, with what is missing: of each case `least`, and what `find` says
    of it (by its name) for this package and for the one of `--before`."""
    file = pathlib.Path(options.out)
    results = json.loads(file.read_text()) if file.exists() else {"cases": {}}
    results["versions"] = {x: importlib.metadata.version(x) for x in ("jax", "jaxlib", "libtpu")}
    packages = {"after": "."} | ({"before": options.before} if options.before else {})
    for name in options.only or cases:
        found = results["cases"].setdefault(name, {})
        found["least"] = least(cases[name])
        for when, package in packages.items():
            if when not in found:
                found[when] = find(name, package)
                file.write_text(json.dumps(results, indent=2) + "\n")
    return results["cases"]


def environment(package: str) -> dict[str, str]:
    """In which Python imports the package of a checkout."""
    where = [str(pathlib.Path(package).resolve()), *os.environ.get("PYTHONPATH", "").split(":")]
    return os.environ | {"PYTHONPATH": ":".join(where)}


def parser_of(description: str, cases: Mapping[str, Any]) -> argparse.ArgumentParser:
    """The arguments that `with_missing` reads."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("out", help="file of the results")
    parser.add_argument("--before", help="another checkout of this repository")
    parser.add_argument("--only", nargs="*", choices=cases, help="of the cases")
    return parser


def _cycles(name: str, package: str) -> int | None:
    """Expected cycles of one token of all rows, as the package of a checkout writes it; None where
    that does not fit into the chip's memory."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "program.txt"
        command = [sys.executable, __file__, str(file), "--text", name]
        how = dict(env=environment(package), stderr=subprocess.PIPE, text=True)
        done = subprocess.run(command, **how)
        if done.returncode and "RESOURCE_EXHAUSTED" in done.stderr:
            return None
        if done.returncode:
            raise SystemExit(done.stderr)
        text = file.read_text()

    # Of two loops the compiler does not know the turns: that over tokens, and of experts.
    def cycles(tokens: int) -> int:
        def trips(operation: str) -> int:
            return 1 if "/experts/" in operation else tokens

        return hlo.expectation(text, unknown_trips=trips).cycles

    return cycles(2) - cycles(1)


def _compiled(case: Case) -> str:
    """The program that writes the rows of a case, as the compiler writes it."""
    mesh = ahead.described_mesh(
        dict(zip(sharding.AXES, case.mesh, strict=True)), parse_topology(case.topology)
    )
    config = _config(case)
    shapes = abstract_params(config)
    params = jax.tree.map(_shape, shapes, sharding.shardings(shapes, mesh))
    rows = sharding.rows_sharding(mesh, case.rows)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), case.rows))
    tokens = jax.ShapeDtypeStruct((case.rows, PROMPT), jnp.int32)
    lengths = jax.ShapeDtypeStruct((case.rows,), jnp.int32)

    def write(params, tokens, lengths, keys):
        how = dict(max_new_tokens=NEW, sampling=Sampling(eos_ids=(2,)))
        return sample(Decoder(config), params, tokens, lengths, keys, **how)

    with jax.set_mesh(mesh):
        inputs = (_shape(x, rows) for x in (tokens, lengths, keys))
        return jax.jit(write).lower(params, *inputs).compile().as_text()


def _shape(x, where):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def _config(case: Case):
    hf_config = stored_config(case.model)[0] if case.model else MIXTURE
    config = from_hugging_face(hf_config, case.model).replace(
        dtype="bfloat16", param_dtype=case.param_dtype, tensor_parts=case.mesh[2]
    )
    return config.replace(quantization=QUANTIZE[case.quantize])


def _least(case: Case) -> int:
    """Cycles in which weights and cache can be read once, and the logits written."""
    config, mesh = _config(case).padded, dict(zip(sharding.AXES, case.mesh, strict=True))
    count = Counter(config, mesh)
    logits = 4 * case.rows / count.row_parts * config.vocab_size / mesh["tensor"]
    moved = count.decode(case.rows, PROMPT + NEW, 1).hbm_bytes + logits
    if config.experts:  # all of them are read
        moved -= (
            3 * 2 * config.num_layers * config.experts.num_experts * config.width * config.mlp_width
        )
    chip = parse_topology(case.topology).chip
    return round(moved / (chip.hbm_gbps * 1e9) * chip.clock)


def _table(cases: dict[str, dict[str, int]]) -> str:
    """Cycles of one token of all rows, in millions."""
    lines = [
        "| a token of all rows, 512 columns, bfloat16 | least | before | after | after : least |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, found in cases.items():
        said = [_said(found[x]) if x in found else "" for x in ("least", "before", "after")]
        ratio = f"{found['after'] / found['least']:.2f}" if found.get("after") else ""
        lines.append(f"| {name}, {CASES[name].rows} rows | {' | '.join(said)} | {ratio} |")
    return "\n".join(lines)


def _said(cycles: int | None) -> str:
    return "does not fit" if cycles is None else f"{cycles / 1e6:.1f}"


def _options() -> argparse.Namespace:
    parser = parser_of(__doc__.splitlines()[0], CASES)
    parser.add_argument("--text", choices=CASES, help="write the compiled program into OUT instead")
    return parser.parse_args()


if __name__ == "__main__":
    main()
