"""A plan as tables of the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from promptkd_jax.evaluation.tables import Table, markdown
from promptkd_jax.infra.terminal import short_number
from promptkd_jax.plan.chips import GIB
from promptkd_jax.plan.fit import MEMORY_FRACTION, Fit
from promptkd_jax.plan.remat import DEFAULT_FRACTION, FRACTION

IN_TURN = "matrix units, memory and network of each phase in turn"


def show(plan: Mapping[str, Any], *, missing: str | None = None) -> None:
    """Prints one plan (see `command.estimate`).

    Args:
      missing: why there is only an estimate, where there should be more.
    """
    phases = [markdown(_phases_table(plan)), ""] if plan["phases"] else []
    table = markdown(_memory_table(plan))
    print(*_heading(plan), "", table, "", *phases, *_summary(plan), sep="\n")
    if missing:
        print(f"ESTIMATE ONLY: {missing}")


def show_search(
    plans: Sequence[Mapping[str, Any]],
    *,
    dropped: Mapping[str, int],
    fitting: int,
    missing: str | None = None,
    most: int = 12,
) -> None:
    """Prints the first of the plans side by side."""
    left_out = ", ".join(f"{number} where {why}" for why, number in dropped.items() if number)
    rows = [
        (
            _mesh(plan),
            str(plan["micro_batches"]),
            _gib(plan["memory"]["needed"]),
            "yes" if plan["memory"]["fits"] else "NO",
            plan["memory"]["by"],
            short_number(plan["seconds_per_step"], ".3g"),
            short_number(plan["least_seconds_per_step"], ".3g"),
            short_number(plan["tokens_per_second"], ",.0f"),
            short_number(plan["usd_per_million_tokens"], ".3g"),
        )
        for plan in plans[:most]
    ]
    header = ("mesh", "micro", "GiB", "fits", "by", "s/step", "least", "tokens/s", "USD/Mtok")
    compiled = any(plan["memory"]["by"] == "compiler" for plan in plans)
    first = ": what is compiled comes first" if compiled else ""
    order = "the smallest, since none fits"
    if fitting:
        order = "the fastest first, in classes of 2 % of the time; in a class the smallest first"
    print(
        *_heading(plans[0], mesh=False),
        f"{fitting} pairs of a mesh and a number of micro-batches fit by the estimate; left out: "
        f"{left_out or 'none'}",
        f"data x fsdp x tensor and micro-batches, {len(rows)} of {len(plans)}: {order}",
        f"(seconds by the estimate: {IN_TURN}; the compiler mostly expects more{first})",
        "",
        markdown(Table(header, rows)),
        "",
        sep="\n",
    )
    if plans[0]["memory"]["fits"]:
        print(f"the first: {' '.join(plans[0]['flags'])}")
    if missing:
        print(f"ESTIMATE ONLY: {missing}")


def show_comparison(plans: Sequence[Mapping[str, Any]], *, impossible: Sequence[str]) -> None:
    """Prints the best plans of several slices side by side, in their order.

    Args:
      impossible: the names of slices that no mesh was found for.
    """
    rows = [
        (
            _slices(plan),
            plan["google"] or "-",
            str(plan["chips"]),
            _mesh(plan),
            str(plan["micro_batches"]),
            _gib(plan["memory"]["needed"]),
            _gib(plan["memory"]["usable"]),
            f"{plan['seconds_per_step']:.3g}" if plan["memory"]["fits"] else "NO FIT",
            short_number(plan["usd_per_hour"], ",.2f"),
            short_number(plan["usd_per_million_tokens"], ".3g"),
            short_number(plan["usd"], ",.0f"),
        )
        for plan in plans
    ]
    header = ("slice", "named", "chips", "mesh", "micro", "GiB", "of", "s/step", "USD/h")
    print(
        *_heading(plans[0], mesh=False, slices=False),
        "the best mesh of each slice by the estimate (--search of one compiles): first what fits, "
        "the cheapest at the top, then what has no list price, then what does not fit",
        "",
        markdown(Table((*header, "USD/Mtok", "stage, USD"), rows, names=2)),
        "",
        sep="\n",
    )
    if impossible:
        print(f"no mesh divides rows and parameters on {', '.join(impossible)}")
    if (first := plans[0])["memory"]["fits"]:
        print(f"the first, {_slices(first)}: {' '.join(first['flags'])}")
    else:
        print("none of them fits")


def hours_table(plans: Mapping[str, Mapping[str, Mapping[str, Any] | None]]) -> Table:
    """Hours of several runs on several devices, their sums, and the price of these.

    Args:
      plans: by run and device, as `command.plan_runs` makes them.
    """

    def hours(plan: Mapping[str, Any] | None) -> str:
        if plan is None:
            return "NO MESH"
        return short_number(plan["hours"], ",.2f") if plan["memory"]["fits"] else "NO FIT"

    def whole(device: str, key: str) -> float | None:
        each = [of[device] and of[device]["memory"]["fits"] and of[device][key] for of in columns]
        return None if any(value in (None, False) for value in each) else sum(each)

    columns = list(plans.values())
    devices = list(columns[0])
    rows = [(name, *map(hours, of.values())) for name, of in plans.items()]
    rows.append(("all, hours", *(short_number(whole(one, "hours"), ",.2f") for one in devices)))
    rows.append(("all, USD", *(short_number(whole(one, "usd"), ",.0f") for one in devices)))
    return Table(("run", *devices), rows)


def show_fits(fits: Sequence[Fit], usable: float, scale: float = 1.0) -> None:
    """Prints what would make a run fit, one change more in every line, and the flags for it;
    `scale`: what the estimates are multiplied by, to begin with the compiler's figure."""
    if fits[0].needed <= usable:
        return
    rows, before = [], 0
    for one in fits:
        words = f"and {one.words}" if one.changes else one.words
        if len(one.changes) < before:
            words = f"that is enough: {one.all_words}"
        before = len(one.changes)
        rows.append((words, _gib(one.needed), "yes" * (one.needed <= usable) or "NO"))
    how = "estimate" if scale == 1 else f"estimate, times {scale:.2f} as the first line's"
    print(
        "",
        markdown(Table((f"what would make it fit ({how})", "GiB", "fits"), rows)),
        "",
        sep="\n",
    )
    if fits[-1].needed <= usable:
        print(f"flags of the last line: {fits[-1].flags}")
    else:
        print("none of these makes it fit: take a larger GPU, several, or smaller models")


def _mesh(plan: Mapping[str, Any]) -> str:
    return " x ".join(map(str, plan["mesh"].values()))


def _slices(plan: Mapping[str, Any]) -> str:
    return f"{plan['slices']} x {plan['topology']}" if plan["slices"] > 1 else plan["topology"]


def _heading(plan: Mapping[str, Any], *, mesh: bool = True, slices: bool = True) -> list[str]:
    lines = [plan["title"], plan["stage"], *plan["notes"]]
    rows = f"{plan['rows']} rows of {plan['columns']} tokens a step"
    if not slices:
        return [*lines, rows]
    if plan["platform"] != "tpu":
        lines.append(f"{plan['topology']}, {rows}")
        return [*lines, *_mesh_line(plan)] if mesh else lines
    chips = f"{plan['chips']} chips"
    if plan["devices"] != plan["chips"]:
        chips += f" ({plan['devices']} devices)"
    google = plan["google"] or "by its shape alone: gcloud … --type --topology"
    lines.append(f"{_slices(plan)} ({google}): {chips}, {rows}")
    return [*lines, *_mesh_line(plan)] if mesh else lines


def _mesh_line(plan: Mapping[str, Any]) -> list[str]:
    axes = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items())
    line = f"mesh: {axes}; {plan['micro_batches']} micro-batches"
    if plan["rows_at_once"] < plan["rows"]:
        line += f"; {plan['rows_at_once']} rows written at once"
    return [line]


def _memory_table(plan: Mapping[str, Any]) -> Table:
    memory = plan["memory"]
    each = "one device (half a chip)" if plan["devices"] > plan["chips"] else "one chip"
    each = each if plan["platform"] == "tpu" else "one device"
    rows = [(part, _gib(size), "exact") for part, size in memory["kept"].items()]
    rows.append(("temporaries", _gib(memory["temporaries"]), memory["by"]))
    if memory["cache"]:
        rows.append(("  of these the rollout's cache", _gib(memory["cache"]), "exact"))
    needed = f"needed ({memory['by']}), of {_gib(memory['usable'])} usable"
    verdict = "FITS" if memory["fits"] else "DOES NOT FIT"
    return Table(
        (f"memory of {each}", "GiB", ""), [*rows, (needed, _gib(memory["needed"]), verdict)]
    )


def _phases_table(plan: Mapping[str, Any]) -> Table:
    phases = plan["phases"]
    sent = {name: one["ici_bytes"] + one["dcn_bytes"] for name, one in phases.items()}
    figures = {
        "PFLOP, all chips": [one["flops"] / 1e15 for one in phases.values()],
        "GB of HBM moved": [one["hbm_bytes"] / 1e9 for one in phases.values()],
        f"GB sent ({plan['traffic_by']})": [size / 1e9 for size in sent.values()],
    }
    for limit in next(iter(phases.values()))["seconds"]:
        figures[f"{limit}, s"] = [one["seconds"][limit] for one in phases.values()]
    figures["in turn, s"] = [one["in_turn"] for one in phases.values()]
    figures["at least, s"] = [one["time"] for one in phases.values()]
    if plan["time_by"] == "compiler":
        figures["expected, s"] = [one["expected"] for one in phases.values()]
    rows = [(name, *(f"{value:.3g}" for value in values)) for name, values in figures.items()]
    rows.append(("bound by", *(one["bound"] for one in phases.values())))
    return Table(("a step, by phase", *phases), rows)


def _summary(plan: Mapping[str, Any]) -> list[str]:
    lines, memory = [], plan["memory"]
    named = plan["platform"] == "gpu" and memory["usable"] < memory["has"]  # else JAX has all of it
    if named and memory["fits"] and memory["needed"] > DEFAULT_FRACTION * memory["has"]:
        lines.append(
            f"JAX takes {100 * DEFAULT_FRACTION:.0f} % of a GPU's memory, and this is more: "
            f"set {FRACTION}={MEMORY_FRACTION}"
        )
    if not plan["memory"]["fits"]:
        several = plan["devices"] > 1 or plan["platform"] == "tpu"
        lines.append(
            "it does not fit" + ": --search tries other meshes and micro-batches" * several
        )
    if plan["seconds_per_step"] is None:
        return lines
    by = "the compiler" if plan["time_by"] == "compiler" else f"the estimate, {IN_TURN}"
    lines.append("PFLOP of all chips together, bytes and seconds of each.")
    lines.append(
        f"step: {plan['seconds_per_step']:.3g} s by {by} (at least "
        f"{plan['least_seconds_per_step']:.3g}); tokens per second: "
        f"{plan['tokens_per_second']:,.0f}"
    )
    if plan["platform"] == "tpu" or plan["usd_per_chip_hour"] is not None:  # GPUs may be one's own
        lines.append(_cost(plan))
    if plan["hours"] is not None:
        cost = "" if plan["usd"] is None else f", {plan['usd']:,.0f} USD"
        hours = f"{plan['hours']:.3g} h{cost}"
        lines.append(
            f"stage: {plan['steps']} steps, {hours}, without compilation, evaluation and "
            "checkpoints"
        )
    if plan["compiled"]:
        lines.append(f"compiled in {plan['compiled']['seconds']:.0f} s")
    return lines


def _cost(plan: Mapping[str, Any]) -> str:
    price, cost = plan["usd_per_chip_hour"], plan["usd_per_million_tokens"]
    if not plan["memory"]["fits"]:
        return "cost: none, it does not fit"
    if price is None:
        return "cost: no list price is published for this chip; give --price"
    return f"cost: {cost:.3g} USD per million tokens at {price:g} per chip-hour"


def _gib(size: float | None) -> str:
    return "?" if size is None else f"{size / GIB:.2f}"
