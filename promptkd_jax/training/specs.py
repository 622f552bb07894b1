"""What a field of a config may be."""

import dataclasses
import difflib
import math
import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from promptkd_jax.infra.errors import ConfigError
from promptkd_jax.infra.files import address_fault, is_remote


@dataclasses.dataclass(frozen=True)
class Float:
    """A number, also a whole one, from `low` (from above it, where that is open) to `high`."""

    low: float | None = None
    high: float | None = None
    open_low: bool = False
    kind, types = "a number", (int, float)

    def _limits(self) -> list[tuple[str, float]]:
        limits = ((">" if self.open_low else ">=", self.low), ("<=", self.high))
        return [(sign, limit) for sign, limit in limits if limit is not None]

    def __str__(self) -> str:
        limits = " and ".join(f"{sign} {limit:.12g}" for sign, limit in self._limits())
        return f"{self.kind} {limits}".rstrip()

    def fault(self, value: Any) -> str:
        if isinstance(value, bool) or not isinstance(value, self.types):
            return str(self)
        compare = {">": operator.gt, ">=": operator.ge, "<=": operator.le}
        broken = [pair for pair in self._limits() if not compare[pair[0]](value, pair[1])]
        if not broken and isinstance(value, float) and not math.isfinite(value):
            return "finite"
        return " and ".join(f"{sign} {limit:.12g}" for sign, limit in broken)


class Int(Float):
    """A whole number: neither True nor 3.0."""

    kind, types = "an int", (int,)


@dataclasses.dataclass(frozen=True)
class Str:
    """A string."""

    nonempty: bool = False

    def __str__(self) -> str:
        return "a string that is not empty" if self.nonempty else "a string"

    def fault(self, value: Any) -> str:
        return "" if isinstance(value, str) and (value or not self.nonempty) else str(self)


@dataclasses.dataclass(frozen=True)
class Path(Str):
    """A file or folder, of a bucket too where `bucket` says so; or another name, such as a hub's.

    What cannot be reached from here is a fault before anything is read or written.
    """

    bucket: bool = True

    def fault(self, value: Any) -> str:
        if fault := super().fault(value):
            return fault
        if is_remote(value) and not self.bucket:
            return "a folder of a disk or of a shared file system"
        return address_fault(value)


@dataclasses.dataclass(frozen=True, init=False)
class Choice:
    """One of a few values."""

    options: tuple

    def __init__(self, *options: Any):
        object.__setattr__(self, "options", options)

    def __str__(self) -> str:
        return f"one of {', '.join(map(repr, self.options))}"

    def fault(self, value: Any) -> str:
        same = [type(value) is type(option) and value == option for option in self.options]
        return "" if any(same) else str(self)


class Bool(Choice):
    """True or False: neither 1 nor 0."""

    def __init__(self):
        super().__init__(True, False)


@dataclasses.dataclass(frozen=True)
class Optional:
    """None, or what `spec` says."""

    spec: Any

    def __str__(self) -> str:
        return f"{_right(self.spec)}, or None"


@dataclasses.dataclass(frozen=True)
class ListOf:
    """A list or tuple of what `spec`, also a nested dict, says."""

    spec: Any
    nonempty: bool = False

    def __str__(self) -> str:
        return f"a {'non-empty ' * self.nonempty}tuple, each element {_right(self.spec)}"

    def fits(self, value: Any) -> bool:
        return isinstance(value, (list, tuple)) and bool(value or not self.nonempty)


def _right(spec: Any) -> str:
    return f"a group of {', '.join(spec)}" if isinstance(spec, Mapping) else str(spec)


def _mistakes(path: str, value: Any, spec: Any) -> Iterator[str]:
    """Walks the config and the schema together."""
    if isinstance(spec, Optional):
        if value is not None:
            yield from _mistakes(path, value, spec.spec)
    elif isinstance(spec, ListOf) and spec.fits(value):
        for index, element in enumerate(value):
            yield from _mistakes(f"{path}[{index}]", element, spec.spec)
    elif isinstance(spec, Mapping) and is_group(value):
        yield from (unknown_field(path, name, spec) for name in value if name not in spec)
        for name, inner in spec.items():
            if name in value:
                yield from _mistakes(f"{path}.{name}", value[name], inner)
            else:
                yield f"{path}.{name}: is missing, it should be {_right(inner)}"
    else:
        fault = _right(spec) if isinstance(spec, (Mapping, ListOf)) else spec.fault(value)
        if fault:
            yield f"{path}: {value!r} is not {fault}"


def unknown_field(path: str, name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(sorted(known))}"
    return f"{path}.{name}: is unknown; {hint}"


def is_group(value: Any) -> bool:
    return isinstance(value, (Mapping, ConfigDict))


def plain(value: Any, path: str, ignore: tuple[str, ...]) -> Any:
    if is_group(value):
        below = {name: f"{path}.{name}".removeprefix(".") for name in value}
        return {n: plain(value[n], below[n], ignore) for n in value if below[n] not in ignore}
    if isinstance(value, (list, tuple)):
        return [plain(element, path, ignore) for element in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def check(config: Mapping | ConfigDict, schema: Mapping[str, Any]) -> None:
    """Compares a whole config with a schema: nested dicts whose leaves are the specs below.

    Raises:
      ConfigError: all fields that are missing, unknown, of a wrong type or out of range.
    """
    if mistakes := list(_mistakes("config", config, schema)):
        raise ConfigError("\n".join(mistakes))
