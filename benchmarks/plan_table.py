"""The tables of docs/plan.md: pairs of models on TPU slices, compiled by XLA's TPU compiler.

python benchmarks/plan_table.py [--results benchmarks/results/plan.json] [--only PAIR] [--show]

Needs libtpu (pip install 'jax[tpu]'), no TPU. Each row takes minutes: the best meshes by the
estimate are compiled until one fits, at most `--compile` of them. What is there already is not made
again, so a run that was stopped goes on where it was, but for rows without a time by the compiler,
which are older; until then a row is the estimate, and says so. `--show` only prints the tables.
"""

import argparse
import json
import pathlib
import sys
from typing import Any

import jax

from promptkd_jax.infra.errors import ConfigError
from promptkd_jax.infra.files import write_json
from promptkd_jax.plan import ahead, chips
from promptkd_jax.plan import command as plan
from promptkd_jax.plan.abstract_run import abstract_run
from promptkd_jax.plan.chips import GIB
from promptkd_jax.training.config.checks import checked
from promptkd_jax.training.config.config_file import load_config

PAIRS = {
    "GPT-2 XL into base": "configs/gpt2.py:student=base",
    "OPT 13B into 6.7B": "configs/opt.py:student=6.7b",
    "Llama 13B into 7B": "configs/llama.py:student=7b",
    "Llama-3.1 70B into 8B": "configs/llama31.py:student=8b",
    "Qwen3 30B-A3B into 1.7B": "configs/qwen3.py:student=1.7b",
}
SLICES = {
    "v4-8": "v4:2x2x1",
    "v5e-16": "v5e:4x4",
    "v5e-64": "v5e:8x8",
    "v5e-256": "v5e:16x16",
    "v5p-128": "v5p:4x4x4",
    "v6e-64": "v6e:8x8",
}
SCALED = "Llama 13B into 7B"
# The same mesh but for `fsdp` and `data`: rows of a chip halve until each has one, then `data`.
SCALING = {
    "v5e:4x4": "1,4,4",
    "v5e:4x8": "1,8,4",
    "v5e:8x8": "1,16,4",
    "v5e:8x16": "1,32,4",
    "v5e:16x16": "1,64,4",
}


def main() -> None:
    """Makes what is missing and prints the tables."""
    jax.config.update("jax_platforms", "cpu")
    options = _parser().parse_args()
    file = options.results
    results = json.loads(file.read_text("utf-8")) if file.exists() else {}
    if not options.show:
        if not ahead.has_compiler():
            sys.exit(ahead.MISSING)
        for pair in PAIRS:
            for name, topology in SLICES.items():
                _once(results, file, f"estimate | {pair} | {name}", _estimated, pair, topology)
            for topology, mesh in SCALING.items() if pair == SCALED else ():
                _once(
                    results, file, f"estimate | scaling | {topology}", _guess, pair, topology, mesh
                )
        for pair in PAIRS:
            if options.only not in (None, pair):
                continue
            for name, topology in SLICES.items():
                _once(results, file, f"{pair} | {name}", _fastest, pair, topology, options)
            for topology, mesh in SCALING.items() if pair == SCALED else ():
                _once(results, file, f"scaling | {topology}", _given, pair, topology, mesh)
    print(table(results), scaling_table(results), sep="\n\n")


def _once(results: dict[str, Any], file: pathlib.Path, key: str, make: Any, *inputs: Any) -> None:
    found = results.get(key, {"phases": {}})
    if "phases" not in found or found.get("time_by") in ("compiler", "estimate"):  # as it is now
        return
    print(f"{key} …", flush=True)
    results[key] = make(*inputs)
    write_json(file, results)


def _run(pair: str):
    config, _ = load_config([f"--config={PAIRS[pair]}"])
    return abstract_run(checked(config))


def _fastest(pair: str, topology: str, options: argparse.Namespace) -> dict[str, Any]:
    """The first of the meshes, fastest first by the estimate, that fits as compiled; else the one
    that comes nearest."""
    run, slices = _run(pair), chips.parse_topology(topology)
    try:
        candidates, _ = plan.search(run, slices)
    except ConfigError as error:
        return {"impossible": str(error)}
    tried = []
    candidates.sort(key=lambda one: not one["memory"]["fits"])
    if not candidates[0]["memory"]["fits"]:  # by the estimate nothing does: the smallest
        candidates.sort(key=lambda one: one["memory"]["needed"])
    for candidate in candidates[: options.compile]:
        its_run = run.with_micro_batches(candidate["micro_batches"])
        tried.append(_compiled(its_run, slices, candidate["mesh"]))
        if tried[-1].get("memory", {}).get("fits"):
            return tried[-1]
    return min(tried, key=lambda one: one.get("memory", {}).get("needed") or float("inf"))


def _estimated(pair: str, topology: str) -> dict[str, Any]:
    """The best mesh by the estimate; where none fits, the one that needs least."""
    try:
        candidates, _ = plan.search(_run(pair), chips.parse_topology(topology))
    except ConfigError as error:
        return {"impossible": str(error)}
    if candidates[0]["memory"]["fits"]:
        return candidates[0]
    return min(candidates, key=lambda one: one["memory"]["needed"])


def _guess(pair: str, topology: str, mesh: str) -> dict[str, Any]:
    run, slices = _run(pair).with_micro_batches(1), chips.parse_topology(topology)
    return plan.estimate(run, slices, plan.mesh_sizes(run, slices, mesh))


def _given(pair: str, topology: str, mesh: str) -> dict[str, Any]:
    run, slices = _run(pair), chips.parse_topology(topology)
    run = run.with_micro_batches(1)
    return _compiled(run, slices, plan.mesh_sizes(run, slices, mesh))


def _compiled(run, slices, sizes) -> dict[str, Any]:
    try:
        return plan.compiled(run, slices, sizes)
    except jax.errors.JaxRuntimeError as error:  # a fault of the compiler is a row of the table
        return {"mesh": dict(sizes), "failed": str(error).splitlines()[0][:300]}


def table(results: dict[str, Any]) -> str:
    """Markdown: a row for each pair and slice."""
    lines = [
        "| pair | slice | by | mesh, micro-batches | GiB of a chip, of usable | fits "
        "| s/step, expected (at least) | tokens/s | USD/M tokens | stage, USD |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for pair in PAIRS:
        for name in SLICES:
            if found := _found(results, f"{pair} | {name}"):
                lines.append(f"| {pair} | {name} | {_by(found)} | {_row(found)} |")
    return "\n".join(lines)


def _found(results: dict[str, Any], key: str) -> dict[str, Any] | None:
    """What was compiled, else what was estimated."""
    return results.get(key) or results.get(f"estimate | {key}")


def _by(found: dict[str, Any]) -> str:
    return found.get("memory", {}).get("by", "–")


def _row(found: dict[str, Any]) -> str:
    if "phases" not in found:
        return f"{found.get('impossible') or found.get('failed')} | | | | | |"
    memory = found["memory"]
    cost = [found["usd_per_million_tokens"], found["usd"]]
    cells = [
        f"{_mesh(found)}, {found['micro_batches']}",
        f"{_gib(memory['needed'])} of {_gib(memory['usable'])}",
        "yes" if memory["fits"] else "no",
        _seconds(found) if memory["fits"] else "–",
        f"{found['tokens_per_second']:,.0f}" if memory["fits"] else "–",
        *(f"{x:,.2f}" if x is not None and memory["fits"] else "–" for x in cost),
    ]
    return " | ".join(cells)


def _seconds(found: dict[str, Any]) -> str:
    """Of a step: what the compiler expects, or by the estimate, and the least."""
    return f"{found['seconds_per_step']:.2f} ({found['least_seconds_per_step']:.2f})"


def scaling_table(results: dict[str, Any]) -> str:
    """Markdown: one pair on ever more chips."""
    lines = [
        "| chips | by | mesh | kept, GiB | temporaries, GiB | needed, GiB "
        "| sent in a step, GB | moved in a step, GB | tokens/s | tokens/s of a chip |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for topology in SCALING:
        found = _found(results, f"scaling | {topology}")
        if found is None or "phases" not in found:
            continue
        memory, phases = found["memory"], found["phases"].values()
        sent = sum(phase["ici_bytes"] + phase["dcn_bytes"] for phase in phases)
        cells = [
            str(found["chips"]),
            _by(found),
            _mesh(found),
            _gib(sum(memory["kept"].values())),
            _gib(memory["temporaries"]),
            _gib(memory["needed"]),
            f"{sent / 1e9:.1f}",
            f"{sum(phase['hbm_bytes'] for phase in phases) / 1e9:.0f}",
            f"{found['tokens_per_second']:,.0f}",
            f"{found['tokens_per_second'] / found['chips']:,.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _mesh(found: dict[str, Any]) -> str:
    return " × ".join(map(str, found["mesh"].values()))


def _gib(size: float | None) -> str:
    return "?" if size is None else f"{size / GIB:.1f}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    results = pathlib.Path("benchmarks/results/plan.json")
    parser.add_argument("--results", type=pathlib.Path, default=results)
    parser.add_argument("--only", choices=list(PAIRS))
    parser.add_argument("--compile", type=int, default=3, help="meshes of a row, at most")
    parser.add_argument("--show", action="store_true")
    return parser


if __name__ == "__main__":
    main()
