"""What a compiled program sends over the network, and the cycles that the compiler of TPUs expects
of it, read from its HLO text.

What stands in a loop counts as often as the loop turns: by `known_trip_count` where the compiler
wrote it down, else by the number that the loop's condition compares its counter with (JAX's scans
count from 0), else as often as the caller says. Of a conditional, the traffic of all branches is
counted, and the time of that which takes longest.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_CALLS = ("while", "conditional", "call", "async-start")
_ONE_TO_ONE = ("collective-permute", "send")


class Collective(NamedTuple):
    """One of the `KINDS`, or a "send" to the host, which passes it on to another slice (so the
    compiler writes what goes between slices), on each device.

    Attributes:
      size: bytes of the whole array: gathered, reduced, or exchanged.
      group: devices that take part; `slices`: among how many slices they are.
      trips: how often.
      name: of the JAX operation that it is for; "" where the compiler lost it.
    """

    kind: str
    size: int
    group: int
    slices: int
    trips: int
    name: str

    @property
    def ici_bytes(self) -> float:
        """Bytes that a device sends to others of its slice, in all trips.

        The least that a ring can do: of n devices, each sends (n - 1) / n of the array, twice for
        an all-reduce, all of it for a permutation.
        """
        return self.trips * self._share(self.group // self.slices) * self.size

    @property
    def dcn_bytes(self) -> float:
        """Bytes that a device sends to another slice: the same for its part of the array."""
        inside = self.group // self.slices
        part = self.size if self.kind in _ONE_TO_ONE else self.size / inside
        return self.trips * self._share(self.slices) * part

    def _share(self, devices: int) -> float:
        if devices == 1:
            return 0.0
        if self.kind in _ONE_TO_ONE:
            return 1.0
        return (2 if self.kind == "all-reduce" else 1) * (devices - 1) / devices


class _Instruction(NamedTuple):
    """A line "%name = type opcode(operands), attributes"."""

    name: str
    type: str
    opcode: str
    rest: str  # operands and attributes


# How often a loop turns that does not say so: a number, or a function of its JAX operation's name.
Trips = int | Callable[[str], int]


def collectives(text: str, *, unknown_trips: Trips = 1, slice_devices: int = 0) -> list[Collective]:
    """All that a program sends.

    Args:
      text: the HLO of one device, as `Compiled.as_text()` gives it.
      unknown_trips: see `Trips`.
      slice_devices: devices of a slice; 0 for one slice.
    """
    computations = _computations(text)
    counted, beside = [], {}
    walk = _walk(computations, _entry(text), unknown_trips)
    for instruction, trips, computation, fusion in walk:
        found = _collective(instruction, trips, computation, slice_devices)
        channel = re.search(r"channel_id=(\d+)", instruction.rest)
        if found is None:
            continue
        if not fusion or channel is None:
            counted.append(found)
        else:
            beside.setdefault(channel.group(1), []).append((fusion, found))
    return [*counted, *(one for same in beside.values() for one in _once(same))]


class Expectation(NamedTuple):
    """What the compiler of TPUs expects a program to take: the sum over its operations, one after
    the other.

    Attributes:
      cycles: of operations of its own.
      kernel_flops: of kernels written in Pallas that say theirs (those of attention do not). Bytes
        they say too, but of whole operands: of the experts of all layers, where they read one's.
    """

    cycles: int = 0
    kernel_flops: int = 0

    def __add__(self, other: "Expectation") -> "Expectation":
        return Expectation(*map(sum, zip(self, other)))

    def __mul__(self, times: int) -> "Expectation":
        return Expectation(*(times * each for each in self))

    def seconds(self, cycles: float, flops: float) -> float:
        """The time on a device that does so much in a second."""
        return self.cycles / cycles + self.kernel_flops / flops


def expectation(text: str, *, unknown_trips: Trips = 1) -> Expectation:
    """Returns what the compiler expects of a program; what runs beside other operations
    (collectives, copies ahead of their use) has no part in it.

    Of a conditional, the branch counts that takes longest.

    Args:
      text, unknown_trips: as for `collectives`.
    """
    computations = _computations(text)

    @functools.cache
    def of(name: str) -> Expectation:
        total = Expectation()
        for one in computations.get(name, ()):
            total += _expected(one.rest)
            parts = [of(each) for each in _called(one)] if one.opcode in _CALLS else []
            if one.opcode == "while":
                turns = _turns(one, computations, unknown_trips)
                parts = [part * turns for part in parts]
            elif one.opcode == "conditional":
                parts = sorted(parts)[-1:]
            total = sum(parts, total)
        return total

    return of(_entry(text))


def _expected(rest: str) -> Expectation:
    """Of an instruction with these attributes."""
    if found := re.search(r'"estimated_cycles":"(\d+)"', rest):
        return Expectation(int(found.group(1)))
    found = re.search(r'"cost_estimate":\{"flops":"(\d+)"', rest)
    return Expectation(0, int(found.group(1))) if found else Expectation()


def _once(same: list[tuple[str, Collective]]) -> list[Collective]:
    """A collective that runs beside other work stands in all fusions that it runs beside, also in
    loops that begin and end while it runs; it counts where it starts."""
    starts = [one for fusion, one in same if fusion.startswith("async-collective-start")]
    return starts or [min((one for _, one in same), key=lambda one: one.trips)]


def _entry(text: str) -> str:
    return re.search(r"^ENTRY %?([\w.-]+)", text, re.MULTILINE).group(1)


def _computations(text: str) -> dict[str, list[_Instruction]]:
    # What a kernel carries along may have lines of its own, also such as "}".
    computations, current = {}, []
    for line in text.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$", line):
            current = computations.setdefault(header.group(1), [])
        elif parts := re.match(r" +(?:ROOT )?%?(\S+) = (.*?) ([a-z][\w-]*)\((.*)", line):
            current.append(_Instruction(*parts.groups()))
    return computations


def _walk(
    computations: Mapping[str, list[_Instruction]], entry: str, unknown_trips: Trips
) -> Iterator[tuple[_Instruction, int, str, str]]:
    """Every instruction that runs, how often, in which computation, and in which fusion or ""."""
    todo = [(entry, 1, "")]
    while todo:
        name, trips, fusion = todo.pop()
        for instruction in computations.get(name, ()):
            yield instruction, trips, name, fusion
            if instruction.opcode == "while":
                turns = trips * _turns(instruction, computations, unknown_trips)
                todo += [(body, turns, fusion) for body in _called(instruction)]
            elif instruction.opcode == "fusion":
                todo += [(body, trips, instruction.name) for body in _called(instruction)]
            elif instruction.opcode in _CALLS:
                todo += [(body, trips, fusion) for body in _called(instruction)]


def _called(instruction: _Instruction) -> list[str]:
    names = re.findall(
        r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)",
        instruction.rest,
    )
    if branches := re.search(r"branch_computations=\{([^}]*)\}", instruction.rest):
        names += [name.strip().lstrip("%") for name in branches.group(1).split(",")]
    return names


def _turns(loop: _Instruction, computations, unknown_trips: Trips) -> int:
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(known.group(1))
    condition = re.search(r"condition=%?([\w.-]+)", loop.rest).group(1)
    constants, limits = {}, []
    for one in computations[condition]:
        if one.opcode == "constant" and (value := re.match(r"(\d+)\)", one.rest)):
            constants[one.name] = int(value.group(1))
        if one.opcode == "compare" and (limit := re.search(r"([\w.-]+)\), direction=LT", one.rest)):
            limits += [constants[limit.group(1)]] if limit.group(1) in constants else []
    if limits or isinstance(unknown_trips, int):
        return max(limits, default=unknown_trips)
    return unknown_trips(_operation(loop))


def _operation(instruction: _Instruction) -> str:
    """The name of the JAX operation that an instruction is for; "" where the compiler lost it."""
    name = re.search(r'op_name="([^"]*)"', instruction.rest)
    return name.group(1) if name else ""


def _collective(
    instruction: _Instruction, trips: int, computation: str, slice_devices: int
) -> Collective | None:
    if instruction.opcode == "send" and "_xla_megascale" in instruction.rest:
        return Collective("send", int(_sizes(instruction.type)[0]), 2, 2, trips, "")
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    sizes = _sizes(instruction.type)
    if instruction.opcode in ("all-gather-start", "collective-permute-start"):
        sizes = sizes[1:2]  # (operand, result, …)
    size = sum(sizes)
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"  # of an all-reduce only this device's part is made
    elif kind == "reduce-scatter":
        size *= _groups(instruction.rest).shape[1]
    members, slices = _groups(instruction.rest), 1
    if slice_devices:
        slices = max(len(set((group // slice_devices).tolist())) for group in members)
    return Collective(kind, int(size), members.shape[1], slices, trips, _operation(instruction))


def _sizes(kind: str) -> list[float]:
    """Bytes of every array of a type, such as "(f32[4]{0}, bf16[2,8]{1,0}, u32[], token[])"."""
    arrays = re.findall(r"\b(pred|(?:bf|[sufc])(\d+)\w*)\[([\d,]*)\]", kind)
    return [
        int(bits or 8) / 8 * math.prod(int(size) for size in shape.split(",") if size)
        for _, bits, shape in arrays
    ]


def _groups(rest: str) -> np.ndarray:
    """The devices of each group, `[groups, members]`, in any of the notations for them; of a
    permutation those of each pair."""
    if pairs := rest.partition("source_target_pairs=")[2]:
        return np.array(re.findall(r"\{(\d+),(\d+)\}", pairs) or [(0, 0)], int)
    text = rest.partition("replica_groups=")[2]
    if listed := re.match(r"\{(\{[\d,]*\}(?:,\{[\d,]*\})*)\}", text):
        return np.array(
            [list(map(int, g.split(","))) for g in re.findall(r"[\d,]+(?=\})", listed[1])]
        )
    if iota := re.match(r"\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text):
        return _iota(iota.group(3)).reshape(int(iota.group(1)), int(iota.group(2)))
    if named := re.match(r"mesh\[(.*?)\](?:, device_ids=\((.*?\))\))? \{(.*?)\}", text):
        return _named_groups(*named.groups())
    raise ValueError(f"replica groups in an unknown notation: {text[:80]!r}")


def _iota(text: str) -> np.ndarray:
    """ "[2,4]T(1,0)": 0 to 7 as a table of 2 x 4, transposed."""
    shape, _, order = text.partition("T")
    devices = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return devices.transpose(_numbers(order)) if order else devices


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _named_groups(axes: str, devices: str | None, chosen: str) -> np.ndarray:
    """Groups along some axes of a mesh; "'a':(2)3" is the part of axis a of size 3 behind 2."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    shape, along = [], []
    wanted = {
        name: (int(before), int(size)) if size else None
        for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen)
    }
    for name, size in sizes.items():
        before, part = 1, size
        if name in wanted and wanted[name]:
            before, part = wanted[name]
        shape += [before, part, size // (before * part)]
        along += [False, name in wanted, False]
    table = _iota(devices) if devices else np.arange(math.prod(sizes.values()))
    table = table.reshape(shape)
    order = [*np.flatnonzero(np.logical_not(along)), *np.flatnonzero(along)]
    members = math.prod(size for size, is_along in zip(shape, along) if is_along)
    return table.transpose(order).reshape(-1, members)
