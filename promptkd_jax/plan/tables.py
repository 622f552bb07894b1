"""A plan as tables of the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from promptkd_jax.plan.chips import GIB


def show(plan: Mapping[str, Any], *, missing: str | None = None) -> None:
    """Prints one plan (see `command.estimate`).

    Args:
      missing: why there is only an estimate, where there should be more.
    """
    console = Console()
    console.print("\n".join(_heading(plan)), highlight=False, markup=False)
    console.print(_memory_table(plan))
    console.print(_phases_table(plan))
    console.print("\n".join(_summary(plan)), highlight=False)
    if missing:
        console.print(f"ESTIMATE ONLY: {missing}", highlight=False, markup=False)


def show_search(
    plans: Sequence[Mapping[str, Any]],
    *,
    dropped: Mapping[str, int],
    fitting: int,
    missing: str | None = None,
    most: int = 12,
) -> None:
    """Prints the first of the plans side by side."""
    console = Console()
    console.print("\n".join(_heading(plans[0], mesh=False)), highlight=False, markup=False)
    left_out = ", ".join(f"{number} where {why}" for why, number in dropped.items() if number)
    pairs = "pairs of a mesh and a number of micro-batches"
    console.print(f"{fitting} {pairs} fit by the estimate; left out: {left_out or 'none'}")
    headings = ("mesh", "micro", "GiB", "fits", "by", "s/step", "tokens/s", "USD/Mtok")
    table = Table(
        title=f"data x fsdp x tensor and micro-batches, {min(most, len(plans))} of {len(plans)}: "
        "the fastest first, in classes of 2 % of the time; in a class the smallest first",
        title_justify="left",
    )
    for name in headings:
        table.add_column(name, justify="right")
    for plan in plans[:most]:
        memory = plan["memory"]
        table.add_row(
            " x ".join(map(str, plan["mesh"].values())),
            str(plan["micro_batches"]),
            _gib(memory["needed"]),
            "yes" if memory["fits"] else "NO",
            memory["by"],
            f"{plan['seconds_per_step']:.3g}",
            f"{plan['tokens_per_second']:,.0f}",
            _optional(plan["usd_per_million_tokens"], ".3g"),
        )
    console.print(table)
    if plans[0]["memory"]["fits"]:
        print(f"the first: {' '.join(plans[0]['flags'])}")
    if missing:
        console.print(f"ESTIMATE ONLY: {missing}", highlight=False, markup=False)


def show_comparison(plans: Sequence[Mapping[str, Any]], *, impossible: Sequence[str]) -> None:
    """Prints the best plans of several slices side by side, in their order.

    Args:
      impossible: the names of slices that no mesh was found for.
    """
    console = Console()
    lines = _heading(plans[0], mesh=False, slices=False)
    console.print("\n".join(lines), highlight=False, markup=False)
    headings = ("slice", "named", "chips", "mesh", "micro", "GiB", "of", "s/step", "USD/h")
    table = Table(
        title="the best mesh of each slice by the estimate (--search of one compiles): first what "
        "fits, the cheapest at the top, then what has no list price, then what does not fit",
        title_justify="left",
    )
    for name in (*headings, "USD/Mtok", "stage, USD"):
        table.add_column(name, justify="right")
    for plan in plans:
        memory = plan["memory"]
        fits = memory["fits"]
        table.add_row(
            _slices(plan),
            plan["google"] or "-",
            str(plan["chips"]),
            " x ".join(map(str, plan["mesh"].values())),
            str(plan["micro_batches"]),
            _gib(memory["needed"]),
            _gib(memory["usable"]),
            f"{plan['seconds_per_step']:.3g}" if fits else "NO FIT",
            _optional(plan["usd_per_hour"], ",.2f"),
            _optional(plan["usd_per_million_tokens"], ".3g"),
            _optional(plan["usd"], ",.0f"),
        )
    Console(width=max(console.width, 110)).print(table)
    if impossible:
        print(f"no mesh divides rows and parameters on {', '.join(impossible)}")
    if (first := plans[0])["memory"]["fits"]:
        print(f"the first, {_slices(first)}: {' '.join(first['flags'])}")
    else:
        print("none of them fits")


def _slices(plan: Mapping[str, Any]) -> str:
    return f"{plan['slices']} x {plan['topology']}" if plan["slices"] > 1 else plan["topology"]


def _heading(plan: Mapping[str, Any], *, mesh: bool = True, slices: bool = True) -> list[str]:
    lines = [plan["title"], plan["stage"], *plan["notes"]]
    rows = f"{plan['rows']} rows of {plan['columns']} tokens a step"
    if not slices:
        return [*lines, rows]
    chips = f"{plan['chips']} chips"
    if plan["devices"] != plan["chips"]:
        chips += f" ({plan['devices']} devices)"
    google = plan["google"] or "by its shape alone: gcloud … --type --topology"
    lines.append(f"{_slices(plan)} ({google}): {chips}, {rows}")
    if mesh:
        axes = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items())
        lines.append(f"mesh: {axes}; {plan['micro_batches']} micro-batches")
    return lines


def _memory_table(plan: Mapping[str, Any]) -> Table:
    memory = plan["memory"]
    each = "one device (half a chip)" if plan["devices"] > plan["chips"] else "one chip"
    table = Table("memory of " + each, show_footer=True)
    table.columns[0].footer = f"needed ({memory['by']}), of {_gib(memory['usable'])} usable"
    table.add_column("GiB", justify="right", footer=f"{_gib(memory['needed'])}")
    verdict = "FITS" if memory["fits"] else "DOES NOT FIT"
    table.add_column("", footer=verdict)
    for part, size in memory["kept"].items():
        table.add_row(part, _gib(size), "exact")
    table.add_row("temporaries", _gib(memory["temporaries"]), memory["by"])
    if memory["cache"]:
        table.add_row("  of these the rollout's cache", _gib(memory["cache"]), "exact")
    return table


def _phases_table(plan: Mapping[str, Any]) -> Table:
    phases = plan["phases"]
    table = Table("a step, by phase")
    for name in phases:
        table.add_column(name, justify="right")
    sent = {name: one["ici_bytes"] + one["dcn_bytes"] for name, one in phases.items()}
    rows = {
        "PFLOP, all chips": [one["flops"] / 1e15 for one in phases.values()],
        "GB of HBM moved": [one["hbm_bytes"] / 1e9 for one in phases.values()],
        f"GB sent ({plan['traffic_by']})": [size / 1e9 for size in sent.values()],
    }
    for limit in next(iter(phases.values()))["seconds"]:
        rows[f"{limit}, s"] = [one["seconds"][limit] for one in phases.values()]
    rows["at least, s"] = [one["time"] for one in phases.values()]
    for name, values in rows.items():
        table.add_row(name, *(f"{value:.3g}" for value in values))
    table.add_row("bound by", *(one["bound"] for one in phases.values()))
    return table


def _summary(plan: Mapping[str, Any]) -> list[str]:
    lines = []
    if not plan["memory"]["fits"]:
        lines.append("it does not fit: --search tries other meshes and micro-batches")
    lines += [
        "PFLOP of all chips together, bytes and seconds of each; a real run is slower.",
        f"step: at least {plan['seconds_per_step']:.3g} s; tokens per second: at most "
        f"{plan['tokens_per_second']:,.0f}",
    ]
    price = plan["usd_per_chip_hour"]
    if not plan["memory"]["fits"]:
        lines.append("cost: none, it does not fit")
    elif price is None:
        lines.append("cost: no list price is published for this chip; give --price")
    else:
        cost = plan["usd_per_million_tokens"]
        lines.append(f"cost: at least {cost:.3g} USD per million tokens at {price:g} per chip-hour")
    if plan["hours"] is not None:
        cost = "" if plan["usd"] is None else f", {plan['usd']:,.0f} USD"
        lines.append(
            f"stage: {plan['steps']} steps, at least {plan['hours']:.3g} h{cost}, without "
            "compilation, evaluation and checkpoints"
        )
    if plan["compiled"]:
        lines.append(f"compiled in {plan['compiled']['seconds']:.0f} s")
    return lines


def _gib(size: float | None) -> str:
    return "?" if size is None else f"{size / GIB:.2f}"


def _optional(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)
