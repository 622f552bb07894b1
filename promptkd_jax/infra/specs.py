"""Fields of dataclasses that say what they may be: default, range and one sentence of help.

    @dataclasses.dataclass(frozen=True)
    class Clock:
        hour: int = field(0, Int(low=0, high=23), "hour of the day")

The same declaration checks a `Clock` that is made in Python (`validate`), a group of the config of
a run (`mistakes`), and a flag (`cli.flags.of`), and is what `--help-config` shows. Of a spec,
`str(spec)` says all that would be right, and `spec.fault(value)` what a value is not, or "".
"""

import dataclasses
import difflib
import math
import numbers
import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple


def field(default: Any, spec: Any, text: str) -> Any:
    """Declares a field of a dataclass: its default, what it may be, and one sentence of help."""
    return dataclasses.field(default=default, metadata={"spec": spec, "help": text})


def declared(cls: type) -> dict[str, dataclasses.Field]:
    """Returns the fields of a dataclass that `field` declared, by name."""
    return {f.name: f for f in dataclasses.fields(cls) if "spec" in f.metadata}


def group(cls: type, text: str, **changes: Any) -> Any:
    """Declares a field that is a group of fields, those of the dataclass `cls`."""
    return field(cls(**changes), Group(cls), text)


def build(cls: type, values: Mapping[str, Any], path: str, faults: list[str]) -> Any:
    """Makes a dataclass of nested mappings; a value that `mistakes` finds wrong becomes the field's
    default, so that the others can be judged.

    Args:
      path: of `values`, for messages.
      faults: gets what the dataclasses themselves refuse, each of which is all defaults then.
    """

    def made(spec: Any, value: Any, default: Any, path: str) -> Any:
        if isinstance(spec, Optional):
            return None if value is None else made(spec.spec, value, default, path)
        if isinstance(spec, Group) and isinstance(value, Mapping):
            return build(spec.cls, value, path, faults)
        if isinstance(spec, ListOf) and isinstance(spec.spec, Group) and spec.fits(value):
            inner, other = spec.spec, spec.spec.cls()
            return tuple(made(inner, x, other, f"{path}[{i}]") for i, x in enumerate(value))
        if any(mistakes(path, value, spec)):
            return default
        return float(value) if type(spec) is Float else _tuples(value)

    named = {
        name: made(f.metadata["spec"], values.get(name, f.default), f.default, f"{path}.{name}")
        for name, f in declared(cls).items()
    }
    try:
        return cls(**named)
    except ValueError as error:
        faults.append(f"{path}: {error}")
        return cls()


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def validate(value: Any) -> None:
    """Checks the declared fields of a dataclass instance; for `__post_init__`.

    Lists become tuples, so that what is frozen can be hashed.

    Raises:
      ValueError: every field that is not what it may be.
    """
    for name, f in declared(type(value)).items():
        given, spec = getattr(value, name), f.metadata["spec"]
        if isinstance(given, list):
            object.__setattr__(value, name, _tuples(given))
        if isinstance(spec, Group) and not isinstance(given, spec.cls):
            raise ValueError(f"{name}: {given!r} is not a {spec.cls.__name__}")
    if wrong := list(mistakes("", value, Group(type(value)))):
        raise ValueError("; ".join(one.message.removeprefix(".") for one in wrong))


@dataclasses.dataclass(frozen=True)
class Float:
    """A number, also a whole one, from `low` to `high`; open ends do not count."""

    low: float | None = None
    high: float | None = None
    open_low: bool = False
    open_high: bool = False
    kind, types = "a number", numbers.Real

    def _limits(self) -> list[tuple[str, float]]:
        signs = ">" if self.open_low else ">=", "<" if self.open_high else "<="
        limits = zip(signs, (self.low, self.high))
        return [(sign, limit) for sign, limit in limits if limit is not None]

    def __str__(self) -> str:
        limits = " and ".join(f"{sign} {limit:.12g}" for sign, limit in self._limits())
        return f"{self.kind} {limits}".rstrip()

    def fault(self, value: Any) -> str:
        if isinstance(value, bool) or not isinstance(value, self.types):
            return str(self)
        compare = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
        broken = [pair for pair in self._limits() if not compare[pair[0]](value, pair[1])]
        if not broken and not -math.inf < value < math.inf:
            return "finite"
        return " and ".join(f"{sign} {limit:.12g}" for sign, limit in broken)


class Int(Float):
    """A whole number: neither True nor 3.0."""

    kind, types = "an int", numbers.Integral


SEED = Int(low=0, high=2**32 - 1)  # JAX's keys have as many bits; one more would be another's


@dataclasses.dataclass(frozen=True)
class Str:
    """A string."""

    nonempty: bool = False

    def __str__(self) -> str:
        return "a string that is not empty" if self.nonempty else "a string"

    def fault(self, value: Any) -> str:
        return "" if isinstance(value, str) and (value or not self.nonempty) else str(self)


@dataclasses.dataclass(frozen=True, init=False)
class Choice:
    """One of a few values, or of the keys of a mapping, whose values say what each of them means.

    A mapping is looked at when a value is checked: what is registered later is a choice too.
    """

    allowed: tuple | Mapping[Any, Any]

    def __init__(self, *options: Any):
        mapping = len(options) == 1 and isinstance(options[0], Mapping)
        object.__setattr__(self, "allowed", options[0] if mapping else options)

    @property
    def options(self) -> tuple:
        return tuple(self.allowed)

    @property
    def meanings(self) -> Mapping[Any, Any] | None:
        return self.allowed if isinstance(self.allowed, Mapping) else None

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
        return f"{self.spec}, or None"


@dataclasses.dataclass(frozen=True)
class ListOf:
    """A list or tuple of what `spec` says."""

    spec: Any
    nonempty: bool = False

    def __str__(self) -> str:
        return f"a {'non-empty ' * self.nonempty}tuple, each element {self.spec}"

    def fits(self, value: Any) -> bool:
        return isinstance(value, (list, tuple)) and bool(value or not self.nonempty)


@dataclasses.dataclass(frozen=True)
class Group:
    """The declared fields of a dataclass, or a mapping with the same names."""

    cls: type

    def __str__(self) -> str:
        return f"a group of {', '.join(declared(self.cls))}"


class Mistake(NamedTuple):
    """What is wrong with a field: a "missing" one, an "unknown" one, no "group" where there should
    be one, or a wrong "value"; and the same in words, with the field's path."""

    kind: str
    message: str


def with_defaults(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns nested mappings with the defaults of all fields that they lack, of elements of lists
    too; what is there stays, right or wrong."""

    def filled(spec: Any, value: Any) -> Any:
        spec = spec.spec if isinstance(spec, Optional) else spec
        if isinstance(spec, Group) and isinstance(value, Mapping):
            return with_defaults(spec.cls, value)
        if isinstance(spec, ListOf) and isinstance(value, list | tuple):
            return tuple(filled(spec.spec, element) for element in value)
        if isinstance(spec, Group) and isinstance(value, spec.cls):
            return with_defaults(
                spec.cls, {name: getattr(value, name) for name in declared(spec.cls)}
            )
        return value

    known = declared(cls).items()
    return {**values} | {
        name: filled(f.metadata["spec"], values.get(name, f.default)) for name, f in known
    }


def mistakes(
    path: str, value: Any, spec: Any, renamed: Mapping[str, str] | None = None
) -> Iterator[Mistake]:
    """Walks a value and its spec together, and tells what is missing, unknown or not right.

    Args:
      renamed: names of fields that there were, with those that took their place.
    """
    if isinstance(spec, Optional):
        if value is not None:
            yield from mistakes(path, value, spec.spec, renamed)
    elif isinstance(spec, ListOf) and spec.fits(value):
        for index, element in enumerate(value):
            yield from mistakes(f"{path}[{index}]", element, spec.spec, renamed)
    elif isinstance(spec, Group) and (isinstance(value, (Mapping, spec.cls))):
        known, given = declared(spec.cls), value if isinstance(value, Mapping) else vars(value)
        if isinstance(value, Mapping):
            for name in value:
                if name not in known:
                    yield Mistake("unknown", unknown_field(path, name, known, renamed))
        for name, f in known.items():
            inner = f.metadata["spec"]
            if name in given:
                yield from mistakes(f"{path}.{name}", given[name], inner, renamed)
            elif name not in [(renamed or {}).get(other) for other in given]:
                yield Mistake("missing", f"{path}.{name}: is missing, it should be {inner}")
    else:
        fault = str(spec) if isinstance(spec, (Group, ListOf)) else spec.fault(value)
        if isinstance(spec, ListOf) and not any(mistakes(path, value, spec.spec)):
            fault += f"; for this one write ({value!r},)"
        if fault:
            kind = "group" if isinstance(spec, Group) else "value"
            yield Mistake(kind, f"{path}: {value!r} is not {fault}")


def unknown_field(
    path: str, name: str, known: Iterable[str], renamed: Mapping[str, str] | None = None
) -> str:
    """Says of an unknown field what may have been meant."""
    name = str(name)
    if renamed and (new := renamed.get(name)) in known:
        return f"{path}.{name}: is now called {new}"
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(sorted(known))}"
    return f"{path}.{name}: is unknown; {hint}"
