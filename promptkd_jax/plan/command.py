"""Plans of a run: of one mesh, of the best ones, of several slices."""

import argparse
import math
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from promptkd_jax.distill.method import ON_POLICY
from promptkd_jax.infra import sharding
from promptkd_jax.infra.errors import ConfigError
from promptkd_jax.infra.sharding import AXES
from promptkd_jax.plan import ahead, chips, roofline
from promptkd_jax.plan.abstract_run import AbstractRun, abstract_mesh, abstract_run, check_mesh_rows
from promptkd_jax.plan.ahead import Program, TooLarge
from promptkd_jax.plan.chips import Slices
from promptkd_jax.plan.hlo import Collective
from promptkd_jax.plan.roofline import Work
from promptkd_jax.plan.tables import show, show_comparison, show_search
from promptkd_jax.training import build
from promptkd_jax.training.fields import RunConfig

Sizes = Mapping[str, int]


class Candidate(NamedTuple):
    """A mesh and a number of micro-batches that divide everything, and what is estimated of it."""

    sizes: dict[str, int]
    micro_batches: int
    plan: dict[str, Any]


def plan_run(config: RunConfig, options: argparse.Namespace) -> dict[str, Any]:
    """Whichever plan the options ask for: of one mesh, of the best ones, of several slices."""
    if options.devices is not None:
        raise ConfigError("--devices: of unknown devices only a command can be checked, after --")
    named = chips.every(options.topology or ",".join(chips.CHIPS), options.slices)
    if options.mesh and (options.search or len(named) > 1):
        raise ConfigError(
            f"--mesh {options.mesh}: is of one plan; a search and a comparison try all"
        )
    run = abstract_run(config, options.stage, options.rows)
    if len(named) > 1:
        return _compare(run, named, options)
    return (_search if options.search else plan_one)(run, named[0], options)


def plan_one(run: AbstractRun, slices: Slices, options: argparse.Namespace) -> dict[str, Any]:
    sizes = mesh_sizes(run, slices, options.mesh)
    compiling = not options.no_compile and ahead.has_compiler()
    found = (compiled if compiling else estimate)(run, slices, sizes, options.price)
    show(found, missing=_missing(compiling, options))
    return found


def _missing(compiling: bool, options: argparse.Namespace) -> str | None:
    return None if compiling or options.no_compile else ahead.MISSING


def _compare(
    run: AbstractRun, named: Sequence[Slices], options: argparse.Namespace
) -> dict[str, Any]:
    """The best mesh of each of several slices, by the estimate, the cheapest first."""
    plans, impossible = [], []
    for slices in named:
        try:
            plans.append(search(run, slices, options.price)[0][0].plan)
        except ConfigError:
            impossible.append(slices.name)
    if not plans:
        raise ConfigError(f"--topology: no mesh of any of {', '.join(impossible)} divides the run")
    plans.sort(key=_price_rank)
    show_comparison(plans, impossible=impossible)
    return {"plans": plans, "impossible": impossible}


def _price_rank(plan: Mapping[str, Any]) -> tuple:
    """Sorts what fits first, then the cheaper; without a price by the chips, what does not fit by
    what it lacks."""
    memory, price = plan["memory"], plan["usd_per_million_tokens"]
    lacking = 0.0 if memory["fits"] else memory["needed"] / memory["usable"]
    return not memory["fits"], lacking, price is None, price or plan["chips"]


def best_flags(run: AbstractRun, slices: Slices) -> str:
    """The mesh that would fit in place of one whose state alone does not, in words."""
    best = search(run, slices)[0][0].plan
    said = f"what a run keeps does not fit into {slices.name}; "
    if not best["memory"]["fits"]:
        return said + "no mesh does by the estimate: take a larger slice (plan --search)"
    return said + "this fits by the estimate: " + " ".join(best["flags"])


def _search(run: AbstractRun, slices: Slices, options: argparse.Namespace) -> dict[str, Any]:
    candidates, dropped = search(run, slices, options.price)
    compiling = not options.no_compile and ahead.has_compiler()
    best = [one for one in candidates if one.plan["memory"]["fits"]]
    shown = [one.plan for one in best or candidates[:1]]
    if compiling:
        number = min(options.compile, len(best))
        for place in range(number):
            print(f"compiling {place + 1} of {number}: {_named(best[place].sizes)}", flush=True)
            its_run = run.with_micro_batches(best[place].micro_batches)
            shown[place] = compiled(its_run, slices, best[place].sizes, options.price)
        shown.sort(key=_rank)
    missing = _missing(compiling, options)
    show_search(shown, dropped=dropped, fitting=len(best), missing=missing)
    return {"plans": shown, "dropped": dropped}


def mesh_sizes(run: AbstractRun, slices: Slices, text: str | None) -> dict[str, int]:
    """The mesh of "data,fsdp,tensor", or of the config, one of which may be -1 for the rest.

    Raises:
      ConfigError: no three numbers, or they do not multiply to the devices of the slices.
    """
    name, sizes = "config.mesh", run.config.mesh.sizes
    if text:
        name, sizes = "--mesh", sharding.parse_sizes(text)
    return dict(zip(AXES, sharding.mesh_shape(sizes, slices.devices, slices.number, name=name)))


def estimate(
    run: AbstractRun, slices: Slices, sizes: Sizes, price: float | None = None
) -> dict[str, Any]:
    """The plan of one mesh from shapes alone.

    Args:
      price: USD per chip-hour; None for the list price, where there is one.

    Raises:
      ConfigError: the mesh does not divide rows or parameters.
    """
    kept = roofline.kept_bytes(run, abstract_mesh(sizes))
    temporary = roofline.temporary_bytes(run, sizes)
    beside = temporary["rollout"] + temporary["update"]
    memory = _memory(slices, kept, temporary["cache"], sum(kept.values()) + beside, beside)
    work = roofline.phases(run, sizes, slices.number)
    return _assembled(run, slices, sizes, price, memory, work, None)


def compiled(
    run: AbstractRun, slices: Slices, sizes: Sizes, price: float | None = None
) -> dict[str, Any]:
    """The plan of one mesh with the TPU compiler's memory and traffic; work is counted.

    Raises as `estimate`, and:
      ConfigError: the compiler does not know the topology.
    """
    check_mesh_rows(run, abstract_mesh(sizes))
    mesh = ahead.described_mesh(dict(sizes), slices)
    found = estimate(run, slices, sizes, price)
    begun = time.monotonic()
    programs = {"step": _compiled(ahead.compile_step, run, mesh)}
    if run.stage.method.targets in ON_POLICY:
        programs["rollout"] = _compiled(ahead.compile_rollout, run, mesh)
    step, kept = programs["step"], roofline.kept_bytes(run, abstract_mesh(sizes))
    cache = found["memory"]["cache"]
    if isinstance(step, Program):
        beside = step.total - sum(kept.values())
        memory = _memory(slices, kept, cache, step.total, beside, by="compiler")
    else:
        memory = _memory(slices, kept, cache, step.needed, None, by="compiler", fits=False)
    tokens = run.stage.method.rollout_length
    work = _with_traffic(roofline.phases(run, sizes, slices.number), programs, tokens)
    said = {
        "programs": {name: _said(program) for name, program in programs.items()},
        "seconds": round(time.monotonic() - begun, 1),
    }
    return _assembled(run, slices, sizes, price, memory, work, said)


def _compiled(compile_it: Callable, run: AbstractRun, mesh: Any) -> Program | TooLarge:
    try:
        return compile_it(run, mesh)
    except TooLarge as error:
        return error


def _said(program: Program | TooLarge) -> dict[str, Any]:
    if isinstance(program, TooLarge):
        return {"needed": program.needed, "usable": program.usable, "message": str(program)}
    kinds: dict[str, dict[str, float]] = {}
    for one in program.collectives:
        kind = kinds.setdefault(one.kind, {"number": 0, "sent": 0.0, "sent_between_slices": 0.0})
        kind["number"] += one.trips
        kind["sent"] += one.sent
        kind["sent_between_slices"] += one.sent_between_slices
    sizes = program._asdict()
    del sizes["collectives"]
    return {**sizes, "total": program.total, "collectives": kinds}


def _with_traffic(
    work: dict[str, Work], programs: Mapping[str, Program | TooLarge], tokens: int
) -> dict[str, Work]:
    """The phases with what the compiled programs send.

    What the rollout alone sends is prefill, but for its outermost loop over at most `tokens`
    tokens, which is decode. The rest of the step is both updates; they share it as they share the
    estimate.
    """
    step, rollout = programs["step"], programs.get("rollout")
    if not isinstance(step, Program) or isinstance(rollout, TooLarge):
        return work
    traffic = {"prefill": (0.0, 0.0), "decode": (0.0, 0.0)}
    if rollout is not None:
        loop = [one for one in rollout.collectives if _in_decode_loop(one, tokens)]
        rest = [one for one in rollout.collectives if not _in_decode_loop(one, tokens)]
        traffic = {"prefill": _sent(rest), "decode": _sent(loop)}
    updates = [name for name in work if name not in traffic]
    whole = _sent(step.collectives)
    left = [max(a - b - c, 0.0) for a, b, c in zip(whole, *traffic.values())]
    estimated = sum(work[name].sent for name in updates)
    for name in updates:
        share = work[name].sent / estimated if estimated else 1 / len(updates)
        traffic[name] = (left[0] * share, left[1] * share)
    return {name: Work(one.flops, one.moved, *traffic[name]) for name, one in work.items()}


def _in_decode_loop(one: Collective, tokens: int) -> bool:
    if not one.name:
        return one.trips % tokens == 0
    return re.match(r"jit\([^)]*\)(/cond|/branch_\w+)*/while/", one.name) is not None


def _sent(collectives: Sequence[Any]) -> tuple[float, float]:
    return (
        sum(one.sent for one in collectives),
        sum(one.sent_between_slices for one in collectives),
    )


def _memory(
    slices: Slices,
    kept: Mapping[str, int],
    cache: float,
    needed: float | None,
    beside: float | None,
    *,
    by: str = "estimate",
    fits: bool | None = None,
) -> dict[str, Any]:
    """Bytes of one device. The cache is one of the temporaries, which are all `beside` what is
    kept; `needed` and `beside` are None where the compiler did not say."""
    chip = slices.chip
    usable = chip.per_device(chip.usable_gib) * chips.GIB
    return {
        "kept": dict(kept),
        "cache": round(cache),
        "temporaries": None if beside is None else round(beside),
        "needed": None if needed is None else round(needed),
        "usable": round(usable),
        "has": round(chip.per_device(chip.hbm_gib) * chips.GIB),
        "fits": bool(needed is not None and needed <= usable) if fits is None else fits,
        "by": by,
    }


def _assembled(
    run: AbstractRun,
    slices: Slices,
    sizes: Sizes,
    price: float | None,
    memory: dict[str, Any],
    work: Mapping[str, Work],
    said: dict[str, Any] | None,
) -> dict[str, Any]:
    """All that is known, as it is written to JSON."""
    phases, seconds = {}, 0.0
    for name, one in work.items():
        each = one.seconds(slices)
        bound = max(each, key=each.get)
        seconds += each[bound]
        phases[name] = {**vars(one), "seconds": each, "bound": bound, "time": each[bound]}
    price = slices.chip.usd_per_hour if price is None else price
    paid = price is not None and memory["fits"]  # what does not fit has no price
    tokens = run.batch_size * run.config.data.max_length / seconds
    per_hour = price * slices.chips if paid else None
    hours = None if run.steps is None else run.steps * seconds / 3600
    counted = said is not None and not any(
        "message" in program for program in said["programs"].values()
    )
    return {
        "title": build.title(run.config),
        "stage": build.describe(run.config.stages[run.index]),
        "notes": [*run.notes, *_padding(run, sizes)],
        "topology": slices.name,
        "google": slices.google,
        "slices": slices.number,
        "chips": slices.chips,
        "devices": slices.devices,
        "mesh": dict(sizes),
        "rows": run.batch_size,
        "columns": run.config.data.max_length,
        "micro_batches": run.stage.method.execution.gradient_accumulation_steps,
        "flags": mesh_flags(run, sizes),
        "memory": memory,
        "phases": phases,
        "traffic_by": "compiler" if counted else "estimate",
        "seconds_per_step": seconds,
        "tokens_per_second": tokens,
        "usd_per_chip_hour": price,
        "usd_per_hour": per_hour,
        "usd_per_million_tokens": None if per_hour is None else per_hour / 3600 / tokens * 1e6,
        "steps": run.steps,
        "hours": hours,
        "usd": None if None in (per_hour, hours) else per_hour * hours,
        "compiled": said,
    }


def _padding(run: AbstractRun, sizes: Sizes) -> Iterator[str]:
    """Notes of the padding that the mesh adds to each model."""
    padded = run.on(sizes)
    for role, model in (("teacher", padded.teacher), ("student", padded.student)):
        if model and model.decoder.config.padding:
            yield f"{role}: padded for tensor {sizes['tensor']}: {model.decoder.config.padding}"


def mesh_flags(run: AbstractRun, sizes: Sizes) -> list[str]:
    """The words of a `promptkd train` that give a run this mesh and its micro-batches, quoted."""
    mesh = [f"--config.mesh.{axis}={sizes[axis]}" for axis in AXES]
    number = run.stage.method.execution.gradient_accumulation_steps
    return [
        *mesh,
        shlex.quote(f"--config.stages[{run.index}].gradient_accumulation_steps={number}"),
    ]


def search(
    run: AbstractRun, slices: Slices, price: float | None = None
) -> tuple[list[Candidate], dict[str, int]]:
    """Every mesh and number of micro-batches, estimated, the best first.

    Returns:
      The candidates: those that fit first, of these the one with most tokens per second; and by
      reason how many were not considered.
    """
    found, dropped = [], {"rows do not divide": 0, "a parameter does not divide": 0}
    models = [model.decoder.config for model in (run.student, run.teacher) if model]
    heads = min(config.num_heads for config in models)
    for sizes in _factorisations(slices.devices, slices.number):
        for number in _divisors(run.batch_size // run.stage.method.minibatches):
            its_run = run.with_micro_batches(number)
            if not _rows_divide(its_run, sizes):
                dropped["rows do not divide"] += 1
                continue
            if sizes["tensor"] > heads:
                dropped["a parameter does not divide"] += 1
                continue
            try:
                plan = estimate(its_run, slices, sizes, price)
            except ConfigError:
                dropped["a parameter does not divide"] += 1
                continue
            found.append(Candidate(sizes, number, plan))
    if not found:
        raise ConfigError(
            f"--search: no mesh of {slices.devices} devices divides both the "
            f"{run.batch_size} rows and the parameters; take fewer chips or another batch_size"
        )
    return sorted(found, key=lambda one: _rank(one.plan)), dropped


def _rank(plan: Mapping[str, Any]) -> tuple:
    """Sorts what fits first, compiled before estimated, then the faster; within 2 % the smaller."""
    pace = round(math.log(plan["seconds_per_step"], 1.02))
    memory = plan["memory"]
    return not memory["fits"], plan["compiled"] is None, pace, memory["needed"] or math.inf


def _rows_divide(run: AbstractRun, sizes: Sizes) -> bool:
    rows, devices = run.batch_size // run.stage.method.parts, sizes["data"] * sizes["fsdp"]
    slots = run.config.stages[run.index].max_concurrent_rollouts
    return rows > 0 and rows % devices == 0 and slots % devices == 0


def _factorisations(devices: int, slices: int) -> Iterator[dict[str, int]]:
    """All data x fsdp x tensor, `data` a multiple of the slices."""
    for data in _divisors(devices):
        for fsdp in _divisors(devices // data):
            if data % slices == 0:
                yield dict(zip(AXES, (data, fsdp, devices // data // fsdp)))


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _named(sizes: Sizes) -> str:
    return " x ".join(f"{axis} {sizes[axis]}" for axis in AXES)
