"""The table of `fields` for readers: `promptkd train --help-config`, and docs/fields.md."""

import textwrap
from typing import Any

from promptkd_jax.infra.errors import ConfigError
from promptkd_jax.infra.specs import Choice, Group, ListOf, unknown_field
from promptkd_jax.training.fields import RENAMED, Entry, entries

WIDTH = 96
HEAD = """# Fields of a run's config

`promptkd train --help-config` prints the same, `--help-config 'stages[0].sampling'` one group. In a
config file they are attributes (`config.data.max_length = 256`), on the command line flags
(`--config.data.max_length=256`). `[i]` stands for an element of a tuple, such as `stages[0]`.
"""


def config_help(path: str = "") -> str:
    """Describes all fields of a run's config, or one group or field of it.

    Args:
      path: such as "stages[0].sampling", with or without "config." in front; "" for all.

    Raises:
      ConfigError: there is no such field.
    """
    name = _general(path)
    name = "" if name == "config" else name
    inside = (f"{name}.", f"{name}[")
    chosen = [e for e in entries() if not name or e.path == name or e.path.startswith(inside)]
    if not chosen:
        raise ConfigError(_unknown(name))
    return "\n".join(map(_lines, chosen))


def fields_markdown() -> str:
    """Renders the reference page of fields: a table for each group."""
    groups: dict[str, list[Entry]] = {"": []}
    for entry in entries():
        groups.setdefault(entry.path.rpartition(".")[0], []).append(entry)
    texts = {e.path: e.text for e in entries()}
    parts = [HEAD]
    for name, members in groups.items():
        title = f"`{name}`: {texts[name.removesuffix('[i]')]}" if name else "The run"
        rows = [
            f"| `{e.path.rpartition('.')[2]}` | {_default(e)} | {_cell(str(e.spec))} "
            f"| {_cell(e.text)}{_meanings(e.spec)} |"
            for e in members
            if not _holds_groups(e.spec)
        ]
        parts.append(
            "\n".join(
                [
                    f"## {title}\n",
                    "| field | default | what it may be | |",
                    "|---" * 4 + "|",
                    *rows,
                    "",
                ]
            )
        )
    return "\n".join(parts)


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


def _general(path: str) -> str:
    """config.stages[0].name -> stages[i].name"""
    path = path.removeprefix("config.").removesuffix(".")
    parts = [part.partition("[") for part in path.split(".")]
    return ".".join(head + ("[i]" if bracket else "") for head, bracket, _ in parts)


def _holds_groups(spec: Any) -> bool:
    return isinstance(spec, Group) or (isinstance(spec, ListOf) and isinstance(spec.spec, Group))


def _lines(entry: Entry) -> str:
    if _holds_groups(entry.spec):
        return f"\n{entry.path}: {entry.text}"
    text = f"{entry.path} = {entry.default!r} ({entry.spec}): {entry.text}"
    lines = textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="      ")
    if isinstance(entry.spec, Choice) and entry.spec.meanings:
        lines += [f"      {value}: {meaning}" for value, meaning in entry.spec.meanings.items()]
    return "\n".join(lines)


def _default(entry: Entry) -> str:
    return _cell(f"`{entry.default!r}`")


def _meanings(spec: Any) -> str:
    if not (isinstance(spec, Choice) and spec.meanings):
        return ""
    return _cell("; " + "; ".join(f"`{value}`: {text}" for value, text in spec.meanings.items()))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
