"""Plans of a run: of one mesh, of the best ones, of several slices."""

import argparse
import math
import re
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from promptkd_jax.infra import sharding
from promptkd_jax.infra.errors import ConfigError
from promptkd_jax.infra.sharding import AXES
from promptkd_jax.plan import ahead, chips, fit, gpus, roofline
from promptkd_jax.plan.abstract_run import AbstractRun, abstract_mesh, abstract_run
from promptkd_jax.plan.ahead import Program, TooLarge
from promptkd_jax.plan.chips import SliceTopology
from promptkd_jax.plan.costs import Cost
from promptkd_jax.plan.hlo import Collective
from promptkd_jax.plan.remat import memory_fraction
from promptkd_jax.plan.tables import show, show_comparison, show_fits, show_search
from promptkd_jax.training import build
from promptkd_jax.training.config.checks import check_mesh
from promptkd_jax.training.config.fields import RunConfig

Sizes = Mapping[str, int]  # devices along `data`, `fsdp`, `tensor`
Plan = dict[str, Any]  # all that is known of a run on one mesh, as it is written to JSON


def plan_run(config: RunConfig, options: argparse.Namespace) -> Plan:
    """Whichever plan the options ask for: of one mesh, of the best ones, of several slices."""
    if options.devices is not None:
        raise ConfigError("--devices: of unknown devices only a command can be checked, after --")
    if options.device is not None:
        return _plan_gpus(config, options)
    named = chips.parse_topologies(options.topology or ",".join(chips.CHIPS), options.slices)
    if options.mesh and (options.search or len(named) > 1):
        raise ConfigError(
            f"--mesh {options.mesh}: is of one plan; a search and a comparison try all"
        )
    run = abstract_run(config, options.stage, options.rows)
    if len(named) > 1:
        return _compare(run, named, options)
    return (_search if options.search else plan_one)(run, named[0], options)


def plan_one(run: AbstractRun, slices: SliceTopology, options: argparse.Namespace) -> Plan:
    """Prints and returns the plan of one mesh: that of the options, or of the config."""
    sizes = mesh_sizes(run, slices, options.mesh)
    compiling, missing = _compiler(options)
    plan = (compiled if compiling else estimate)(run, slices, sizes, options.price)
    show(plan, missing=missing)
    return plan


def _plan_gpus(config: RunConfig, options: argparse.Namespace) -> Plan:
    """The plan of this machine's devices or of named GPUs, and what would make it fit there."""
    if options.topology or options.slices > 1:
        raise ConfigError("--device: is of one machine's GPUs; expected no --topology, no --slices")
    here = options.device == gpus.HERE
    slices = gpus.devices_here() if here else gpus.parse_device(options.device)
    run = abstract_run(config, options.stage, options.rows)
    if options.search:
        return _search(run, slices, options)
    plan = plan_one(run, slices, options)
    mesh, usable, chip = abstract_mesh(plan["mesh"]), plan["memory"]["usable"], slices.chip
    device, stage = (chip.platform, chip.capability), run.config.stages[run.index].name
    scale = 1.0
    if plan["memory"]["by"] == "compiler" and plan["memory"]["needed"]:
        # What is tried is estimated, and the estimate is off by as much as it is here.
        scale = plan["memory"]["needed"] / roofline.needed_bytes(config, mesh, *device, stage)
    fits = fit.tried(config, mesh, device, usable / scale, stage)
    fits = [each._replace(needed=scale * each.needed) for each in fits]
    most = fit.most_usable(usable, memory_fraction()) if here else usable
    if usable < (plan["memory"]["needed"] or 0) <= most:
        print(f"it would fit with more of the GPU for JAX: {fit.larger_part(most)}")
    show_fits(fits, usable, scale)
    steps = [{"words": f.words, "needed": f.needed, "flags": f.flags} for f in fits]
    return {**plan, "fits": steps}


def _search(run: AbstractRun, slices: SliceTopology, options: argparse.Namespace) -> Plan:
    plans, dropped = search(run, slices, options.price)
    compiling, missing = _compiler(options)
    best = [plan for plan in plans if plan["memory"]["fits"]]
    shown = best or sorted(plans, key=lambda plan: plan["memory"]["needed"])[:3]
    number = min(options.compile, len(best)) if compiling else 0
    for place, plan in enumerate(best[:number]):
        mesh = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items())
        print(f"compiling {place + 1} of {number}: {mesh}", flush=True)
        its_run = run.with_micro_batches(plan["micro_batches"])
        shown[place] = compiled(its_run, slices, plan["mesh"], options.price)
    if compiling:
        shown.sort(key=_rank)
    show_search(shown, dropped=dropped, fitting=len(best), missing=missing)
    return {"plans": shown, "dropped": dropped}


def _compiler(options: argparse.Namespace) -> tuple[bool, str | None]:
    """Whether to compile; where that is asked for and cannot be, why."""
    if options.no_compile or options.device not in (None, gpus.HERE):
        return False, None
    if options.device is not None:
        return True, None
    return ahead.has_compiler(), None if ahead.has_compiler() else ahead.MISSING


def _compare(run: AbstractRun, named: Sequence[SliceTopology], options: argparse.Namespace) -> Plan:
    """The best mesh of each of several slices, by the estimate, the cheapest first."""
    plans, impossible = [], []
    for slices in named:
        try:
            plans.append(search(run, slices, options.price)[0][0])
        except ConfigError:
            impossible.append(slices.name)
    if not plans:
        raise ConfigError(f"--topology: no mesh of any of {', '.join(impossible)} divides the run")
    plans.sort(key=_price_rank)
    show_comparison(plans, impossible=impossible)
    return {"plans": plans, "impossible": impossible}


def _price_rank(plan: Plan) -> tuple:
    """Sorts what fits first, then the cheaper; without a price by the chips, what does not fit by
    what it lacks."""
    memory, price = plan["memory"], plan["usd_per_million_tokens"]
    lacking = 0.0 if memory["fits"] else memory["needed"] / memory["usable"]
    return not memory["fits"], lacking, price is None, price or plan["chips"]


def best_flags(run: AbstractRun, slices: SliceTopology) -> str:
    """The mesh that would fit in place of one whose state alone does not, in words."""
    best = search(run, slices)[0][0]
    said = f"what a run keeps does not fit into {slices.name}; "
    if not best["memory"]["fits"]:
        return said + "no mesh does by the estimate: take a larger slice (plan --search)"
    return said + "this fits by the estimate: " + " ".join(best["flags"])


def mesh_sizes(run: AbstractRun, slices: SliceTopology, text: str | None) -> dict[str, int]:
    """The mesh of "data,fsdp,tensor", or of the config, one of which may be -1 for the rest.

    Raises:
      ConfigError: no three numbers, or they do not multiply to the devices of the slices.
    """
    name, sizes = "config.mesh", run.config.mesh.sizes
    if text:
        name, sizes = "--mesh", sharding.parse_sizes(text)
    return dict(zip(AXES, sharding.mesh_shape(sizes, slices.devices, slices.number, name=name)))


def estimate(
    run: AbstractRun, slices: SliceTopology, sizes: Sizes, price: float | None = None
) -> Plan:
    """The plan of one mesh from shapes alone.

    Args:
      price: USD per chip-hour; None for the list price, where there is one.

    Raises:
      ConfigError: the mesh does not divide rows or parameters.
    """
    run = run.on(abstract_mesh(sizes))
    chip = slices.chip
    kept = roofline.kept_bytes(run)
    temporary = roofline.temporary_bytes(run, chip.platform, chip.capability)
    needed = sum(kept.values()) + temporary["all"]
    usable = chip.per_device(chip.usable_gib) * chips.GIB
    memory = {  # of one device; the cache is one of the temporaries
        "kept": kept,
        "cache": round(temporary["cache"]),
        "temporaries": round(temporary["all"]),
        "needed": round(needed),
        "usable": round(usable),
        "has": round(chip.per_device(chip.hbm_gib) * chips.GIB),
        "fits": needed <= usable,
        "by": "estimate",
    }
    costs = roofline.phases(run, chip.platform, slices.number) if chip.tflops else {}
    return _assembled(run, slices, price, memory, costs, None)


def compiled(
    run: AbstractRun, slices: SliceTopology, sizes: Sizes, price: float | None = None
) -> Plan:
    """The plan of one mesh with the TPU compiler's memory and traffic; work is counted.

    Raises as `estimate`, and:
      ConfigError: the compiler does not know the topology.
    """
    memory = estimate(run, slices, sizes, price)["memory"]
    tpu = slices.chip.platform == "tpu"
    run = run.on(ahead.described_mesh(sizes, slices) if tpu else sharding.make_mesh(sizes))
    begun, programs = time.monotonic(), {"step": ahead.compile_step(run)}
    if run.stage.method.source.on_policy:
        programs["rollout"] = ahead.compile_rollout(run)
    memory |= {"by": "compiler", "fits": False, "temporaries": None}
    if isinstance(step := programs["step"], TooLarge):
        memory["needed"] = step.needed
    else:
        memory["needed"] = step.total
        memory["temporaries"] = step.total - sum(memory["kept"].values())
        memory["fits"] = step.total <= memory["usable"]
    chip = slices.chip
    costs = roofline.phases(run, chip.platform, slices.number) if chip.tflops else {}
    costs = _with_traffic(costs, programs, run.stage.method.rollout_length)
    said = {
        "programs": {name: _said(program) for name, program in programs.items()},
        "seconds": round(time.monotonic() - begun, 1),
    }
    return _assembled(run, slices, price, memory, costs, said, _expected(costs, programs, slices))


def _expected(
    costs: Mapping[str, Cost], programs: Mapping[str, Program | TooLarge], slices: SliceTopology
) -> dict[str, float]:
    """Seconds that the compiler expects of each phase, one operation after the other, and its
    traffic; not less than its bound, which knows what the compiler leaves out. Both updates share
    the rest of the step as they share the bound. {} where there is no expectation."""
    chip = slices.chip
    if chip.clock is None or any(isinstance(program, TooLarge) for program in programs.values()):
        return {}
    rates = chip.clock, chip.tflops * 1e12
    bounds = {name: max(cost.seconds(slices).values()) for name, cost in costs.items()}
    found, whole = {}, programs["step"].expected.seconds(*rates)
    if "rollout" in programs:
        rollout = programs["rollout"]
        found["prefill"] = rollout.expected_once.seconds(*rates)
        found["decode"] = rollout.expected.seconds(*rates) - found["prefill"]
    left = max(whole - sum(found.values()), 0.0)
    updates = [name for name in costs if name not in found]
    for name in updates:
        found[name] = left * bounds[name] / sum(bounds[each] for each in updates)
    for name, cost in costs.items():
        each = cost.seconds(slices)
        sent = sum(each[limit] for limit in each if limit not in ("compute", "HBM"))
        found[name] = max(found[name] + sent, bounds[name])
    return {name: found[name] for name in costs}


def _said(program: Program | TooLarge) -> dict[str, Any]:
    said = program._asdict()
    if isinstance(program, TooLarge):
        return said
    said |= {name: said[name]._asdict() for name in ("expected", "expected_once")}
    kinds: dict[str, dict[str, float]] = {}
    for one in said.pop("collectives"):
        kind = kinds.setdefault(one.kind, {"number": 0, "ici_bytes": 0.0, "dcn_bytes": 0.0})
        kind["number"] += one.trips
        kind["ici_bytes"] += one.ici_bytes
        kind["dcn_bytes"] += one.dcn_bytes
    return {**said, "total": program.total, "collectives": kinds}


def _with_traffic(
    costs: dict[str, Cost], programs: Mapping[str, Program | TooLarge], tokens: int
) -> dict[str, Cost]:
    """The phases with what the compiled programs send.

    What the rollout alone sends is prefill, but for its outermost loop over at most `tokens`
    tokens, which is decode. The rest of the step is both updates; they share it as they share the
    estimate.
    """
    if not costs or any(isinstance(program, TooLarge) for program in programs.values()):
        return costs
    traffic = {"prefill": (0.0, 0.0), "decode": (0.0, 0.0)}
    if "rollout" in programs:
        parts = {"prefill": [], "decode": []}
        for one in programs["rollout"].collectives:
            parts["decode" if _in_decode_loop(one, tokens) else "prefill"].append(one)
        traffic = {name: _sent(part) for name, part in parts.items()}
    updates = [name for name in costs if name not in traffic]
    whole = _sent(programs["step"].collectives)
    left = [max(a - b - c, 0.0) for a, b, c in zip(whole, *traffic.values())]
    estimated = sum(costs[name].ici_bytes for name in updates)
    for name in updates:
        share = costs[name].ici_bytes / estimated if estimated else 1 / len(updates)
        traffic[name] = (left[0] * share, left[1] * share)
    return {name: Cost(cost.flops, cost.hbm_bytes, *traffic[name]) for name, cost in costs.items()}


def _in_decode_loop(one: Collective, tokens: int) -> bool:
    if not one.name:
        return one.trips % tokens == 0
    loop = r"jit\([^)]*\)(/cond|/branch_\w+)*(/queue/while/body)?/while/"
    return re.match(loop, one.name) is not None


def _sent(collectives: Sequence[Collective]) -> tuple[float, float]:
    """Bytes that go to devices of the same slice, and to others."""
    return sum(one.ici_bytes for one in collectives), sum(one.dcn_bytes for one in collectives)


def _assembled(
    run: AbstractRun,
    slices: SliceTopology,
    price: float | None,
    memory: dict[str, Any],
    costs: Mapping[str, Cost],
    said: dict[str, Any] | None,
    expected: Mapping[str, float] = {},
) -> Plan:
    """All that is known of the run on its mesh; `said` is what the compiler said, and `expected`
    the seconds that it expects of each phase. Without these a phase is estimated to take what
    matrix units, memory and networks take in turn: mostly an operation waits for one of them."""
    phases = {}
    for name, cost in costs.items():
        each = cost.seconds(slices)
        bound = max(each, key=each.get)
        phases[name] = {**vars(cost), "seconds": each, "bound": bound, "time": each[bound]}
        phases[name] |= {"in_turn": sum(each.values()), "expected": expected.get(name)}
    least = sum(phase["time"] for phase in phases.values())
    seconds = sum(expected.values()) or sum(phase["in_turn"] for phase in phases.values())
    sizes = {axis: run.mesh.shape[axis] for axis in AXES}
    micro_batches = run.stage.method.execution.gradient_accumulation_steps
    flags = [f"--config.mesh.{axis}={size}" for axis, size in sizes.items()]
    steps = f"--config.stages[{run.index}].gradient_accumulation_steps={micro_batches}"
    padding = [
        f"{role}: padded for tensor {sizes['tensor']}: {model.decoder.config.padding}"
        for role, model in (("teacher", run.teacher), ("student", run.student))
        if model and model.decoder.config.padding
    ]
    price = slices.chip.usd_per_hour if price is None else price
    paid = price is not None and memory["fits"]  # what does not fit has no price
    tokens = run.batch_size * run.config.data.max_length / seconds if seconds else None
    per_hour = price * slices.chips if paid else None
    hours = run.num_steps * seconds / 3600 if run.num_steps and seconds else None
    counted = said and not any("message" in program for program in said["programs"].values())
    return {
        "title": build.title(run.config),
        "stage": build.describe(run.config.stages[run.index]),
        "notes": [*run.notes, *padding],
        "topology": slices.name,
        "google": slices.google,
        "slices": slices.number,
        "platform": slices.chip.platform,
        "chips": slices.chips,
        "devices": slices.devices,
        "mesh": sizes,
        "rows": run.batch_size,
        "rows_at_once": run.rows_at_once,
        "columns": run.config.data.max_length,
        "micro_batches": micro_batches,
        "flags": [*flags, shlex.quote(steps)],
        "memory": memory,
        "phases": phases,
        "traffic_by": "compiler" if counted else "estimate",
        "seconds_per_step": seconds or None,
        "least_seconds_per_step": least or None,
        "time_by": "compiler" if expected else "estimate",
        "tokens_per_second": tokens,
        "usd_per_chip_hour": price,
        "usd_per_hour": per_hour,
        "usd_per_million_tokens": per_hour / 3600 / tokens * 1e6 if per_hour and tokens else None,
        "steps": run.num_steps,
        "hours": hours,
        "usd": None if None in (per_hour, hours) else per_hour * hours,
        "compiled": said,
    }


def search(
    run: AbstractRun, slices: SliceTopology, price: float | None = None
) -> tuple[list[Plan], dict[str, int]]:
    """Every mesh and number of micro-batches, estimated, the best first.

    Returns:
      The plans: those that fit first, of these the one with most tokens per second; and by reason
      how many pairs were not considered.
    """
    plans, dropped = [], {"rows do not divide": 0, "a parameter does not divide": 0}
    models = [model.decoder.config for model in (run.student, run.teacher) if model]
    heads = min(config.num_heads for config in models)
    numbers = _divisors(run.batch_size // run.stage.method.minibatches)
    runs = [run.with_micro_batches(number) for number in numbers]
    for sizes in _factorisations(slices.devices, slices.number):
        for its_run in runs:
            try:
                check_mesh(its_run.config, abstract_mesh(sizes), [run.index])
            except ConfigError:
                dropped["rows do not divide"] += 1
                continue
            if sizes["tensor"] > heads:
                dropped["a parameter does not divide"] += 1
                continue
            try:
                plans.append(estimate(its_run, slices, sizes, price))
            except ConfigError:
                dropped["a parameter does not divide"] += 1
    if not plans:
        several = run.stage.method.rollouts_per_prompt
        rows = f"{run.batch_size} rows" if several == 1 else f"{run.batch_size // several} prompts"
        raise ConfigError(
            f"--search: no mesh of {slices.devices} devices divides both the {rows} and the "
            "parameters; take fewer chips or another batch_size"
        )
    return sorted(plans, key=_rank), dropped


def plan_runs(
    configs: Mapping[str, RunConfig], devices: Sequence[SliceTopology], price: float | None = None
) -> dict[str, dict[str, Plan | None]]:
    """The best mesh of each of several runs on each of several devices, by the estimate.

    Returns:
      By run and name of the devices; None where no mesh divides the run.
    """
    found: dict[str, dict[str, Plan | None]] = {}
    for name, config in configs.items():
        run, found[name] = abstract_run(config), {}
        for slices in devices:
            try:
                found[name][slices.name] = search(run, slices, price)[0][0]
            except ConfigError:
                found[name][slices.name] = None
    return found


def _rank(plan: Plan) -> tuple:
    """Sorts what fits first, compiled before estimated, then the faster; within 2 % the smaller."""
    pace = round(math.log(plan["seconds_per_step"] or 1.0, 1.02))
    memory = plan["memory"]
    return not memory["fits"], plan["compiled"] is None, pace, memory["needed"] or math.inf


def _factorisations(devices: int, slices: int) -> Iterator[dict[str, int]]:
    """All data x fsdp x tensor, `data` a multiple of the slices."""
    for data in _divisors(devices):
        for fsdp in _divisors(devices // data):
            if data % slices == 0:
                yield dict(zip(AXES, (data, fsdp, devices // data // fsdp)))


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
