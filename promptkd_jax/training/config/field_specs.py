"""What the fields of a config may be, where that is more than a number, a name or a choice."""

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from promptkd_jax.data.reading.formats import column_names
from promptkd_jax.infra.files import Path
from promptkd_jax.infra.specs import Choice, Float

TEACHER = "teacher"  # in place of a file: what the teacher has
DTYPE = Choice("float32", "bfloat16")  # float16 would need a loss scale
REMAT = Choice(
    {
        "auto": "the first of the others that fits into memory, by an estimate",
        "none": "nothing",
        "dots": "all but matrix products",
        "full": "all but the inputs of layers",
    }
)
POSITIVE = Float(low=0.0, open_low=True)
KV_CACHE_DTYPE = Choice({"auto": "dtype", "int8": "8 bits, a scale for each head and token"})


class TeacherLayers:
    """The spec of the layers of the teacher that a student starts from."""

    def __str__(self) -> str:
        return "a number of layers, or a tuple of different layers such as (0, 2, 4)"

    def fault(self, value: Any) -> str:
        layers = value if isinstance(value, list | tuple) else [value]
        counted = all(type(layer) is int and layer >= 0 for layer in layers)
        return "" if counted and 0 < len(layers) == len(set(layers)) else str(self)


class Date:
    """The spec of a day as ISO 8601 writes it, or none."""

    def __str__(self) -> str:
        return "a date such as '2026-11-27', or ''"

    def fault(self, value: Any) -> str:
        try:
            return "" if value == "" or datetime.date.fromisoformat(value) else str(self)
        except (TypeError, ValueError):
            return str(self)


class Keywords:
    """The spec of named values, as a mapping or as pairs."""

    def __str__(self) -> str:
        return "named values such as {'enable_thinking': False}"

    def fault(self, value: Any) -> str:
        pairs = value.items() if isinstance(value, Mapping) else value
        try:
            named = dict(pairs)
        except (TypeError, ValueError):
            return str(self)
        plain = all(isinstance(x, str | bool | int | float | None) for x in named.values())
        return "" if plain and all(isinstance(name, str) for name in named) else str(self)


class Columns:
    """The spec of the data's names of fields by ours, as a mapping or as pairs."""

    def __str__(self) -> str:
        return "names in the data by ours such as {'prompt': 'query'}"

    def fault(self, value: Any) -> str:
        try:
            named = dict(value.items() if isinstance(value, Mapping) else value)
        except (TypeError, ValueError):
            return str(self)
        if not all(isinstance(theirs, str) for theirs in named.values()):
            return str(self)
        known = column_names()
        unknown = [ours for ours in named if ours not in known]
        return f"{self}; {unknown[0]!r} is none of ours: {', '.join(known)}" if unknown else ""


@dataclasses.dataclass(frozen=True)
class Sources(Path):
    """The spec of a source of data, or of several with their weights."""

    def __str__(self) -> str:
        return f"{super().__str__()}, or several with weights such as (('a.jsonl', 0.7), …)"

    def fault(self, value: Any) -> str:
        if not isinstance(value, list | tuple):
            is_several = isinstance(value, str) and value.startswith(("((", "[(", "[["))
            return str(self) if is_several else super().fault(value)
        for pair in value:
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                return str(self)
            if fault := Path(nonempty=True).fault(pair[0]):
                return fault
            if pair[0] == TEACHER:
                return f"sources of data, of which {TEACHER!r} is none beside others"
            if Float(low=0.0, open_low=True).fault(pair[1]):
                return f"sources with weights above 0 ({pair[0]} has {pair[1]!r})"
        names = [pair[0] for pair in value]
        return "" if 0 < len(names) == len(set(names)) else f"{self}; each once"


def weighted_sources(value: str | Sequence[tuple[str, float]]) -> tuple[tuple[str, float], ...]:
    """The sources of data that a value of `Sources` names, each with its weight."""
    return ((value, 1.0),) if isinstance(value, str) else tuple((x, float(w)) for x, w in value)
