"""The table of `fields` for readers: `promptkd train --help-config`, and docs/fields.md."""

import re
import textwrap
from collections.abc import Iterable
from typing import Any

from promptkd_jax.infra.errors import ConfigError
from promptkd_jax.infra.specs import ListOf, unknown_field
from promptkd_jax.training.config.fields import RENAMED, Entry, entries

WIDTH = 96
HEAD = """# Fields of a run's config

`promptkd train --help-config` prints the same, `--help-config 'stages[0].sampling'` one group. In a
config file they are attributes (`config.data.max_length = 256`), on the command line flags
(`--config.data.max_length=256`). `[i]` stands for an element of a tuple, such as `stages[0]`. What
is required has no default that would do.
"""
TABLE = ["| field | default | what it may be | |", "|---|---|---|---|"]
BAR = "\\|"  # within a cell


def config_help(path: str = "") -> str:
    """Describes all fields of a run's config, or one group or field of it.

    Args:
      path: such as "stages[0].sampling", with or without "config." in front; "" for all.

    Raises:
      ConfigError: there is no such field.
    """
    name = re.sub(r"\[.*?\]", "[i]", path.removesuffix("."))
    name = re.sub(r"^config(\.|$)", "", name)
    inside = (f"{name}.", f"{name}[")
    chosen = [e for e in entries() if not name or e.path == name or e.path.startswith(inside)]
    if not chosen:
        raise ConfigError(_unknown(name))
    return "\n".join(map(_lines, chosen))


def fields_markdown() -> str:
    """Renders the reference page of fields: a table for each group."""
    parts = [HEAD, "## The run\n", *TABLE]
    for entry in entries():
        if entry.is_group:
            element = "[i]" * isinstance(entry.spec, ListOf)
            needed = " (required)" * entry.required
            parts += [f"\n## `{entry.path}{element}`: {entry.text}{needed}\n", *TABLE]
        else:
            default = "required" if entry.required else f"`{entry.default!r}`"
            meanings = "".join(f"; `{name}`: {text}" for name, text in _meanings(entry.spec))
            cells = f"`{entry.path.rpartition('.')[2]}`", default, entry.spec, entry.text + meanings
            parts.append(f"| {' | '.join(str(cell).replace('|', BAR) for cell in cells)} |")
    return "\n".join([*parts, ""])


def _unknown(name: str) -> str:
    """Says which part of a path is none, and what there is in its place."""
    places, parent = [e.path.rpartition(".") for e in entries()], ""
    for part in name.split("."):
        known = [member for place, _, member in places if place == parent]
        if not known:
            return f"config.{name}: {parent} has no field {part}; a tuple's are those of stages[0]"
        if part.removesuffix("[i]") not in known:
            return unknown_field(f"config.{parent}".rstrip("."), part, known, RENAMED)
        parent = f"{parent}.{part}".removeprefix(".")
    return f"config.{name}: is unknown; elements of a tuple are such as stages[0]"


def _meanings(spec: Any) -> Iterable[tuple[str, str]]:
    return (getattr(spec, "meanings", None) or {}).items()


def _lines(entry: Entry) -> str:
    if entry.is_group:
        return f"\n{entry.path}{' (required)' * entry.required}: {entry.text}"
    default = ", required" if entry.required else f" = {entry.default!r}"
    text = f"{entry.path}{default} ({entry.spec}): {entry.text}"
    lines = textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="      ")
    lines += [f"      {value}: {meaning}" for value, meaning in _meanings(entry.spec)]
    return "\n".join(lines)
