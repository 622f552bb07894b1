"""TPU chips, the slices of them that there are, and their names: "v5e:8x8", v5litepod-64.

Specifications and shapes: docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e and /tpu7x. Prices:
list prices on demand in the USA, per chip-hour, as the SkyPilot catalog of Google Cloud prices
(github.com/skypilot-org/skypilot-catalog, catalogs/v8/gcp) had them in 2026; other regions differ,
spot and committed use cost less, and none is published for TPU7x.
"""

import dataclasses
import functools
import itertools
import math
import re

from promptkd_jax.infra.errors import ConfigError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU chip.

    Attributes:
      hbm_gib: what it has; `usable_gib` what the compiler lets a program have of it.
      hbm_gbps: 1e9 bytes a second from HBM.
      tflops: 1e12 bfloat16 operations a second of its matrix units.
      ici_gbps: 1e9 bytes a second that it can send to its neighbours, all links together: half of
        what is published for both directions (v4: six links of 45 GB/s, from the paper arXiv
        2304.01433).
      dcn_gbps: 1e9 bytes a second between slices, its share of what a host has.
      dimensions: of the torus; largest: chips of the largest slice.
      google: what Google's names of its slices begin with, before the number of TensorCores.
      tensor_cores: of a chip; cores: devices that JAX sees in one chip.
      usd_per_hour: None where no price is published.
      compiler: what the compiler has to be told to make one device of both cores of a chip.
      platform: "tpu", or "gpu" or "cpu" for what is no TPU but is counted like one; of these
        `hbm_gbps` and `tflops` are None where only the memory is known.
      flops_per_cycle: of its matrix units, which with `tflops` give its clock; None: not known.
      capability: of a GPU, see `sharding.compute_capability`.
    """

    name: str
    hbm_gib: float
    usable_gib: float
    hbm_gbps: float | None
    tflops: float | None
    ici_gbps: float
    dcn_gbps: float
    dimensions: int
    largest: int
    google: str
    tensor_cores: int
    usd_per_hour: float | None
    cores: int = 1
    compiler: str = "default"
    platform: str = "tpu"
    flops_per_cycle: int | None = None
    capability: float = 9.0

    @property
    def clock(self) -> float | None:
        """Cycles a second, where that is known."""
        return self.tflops * 1e12 / self.flops_per_cycle if self.flops_per_cycle else None

    def per_device(self, figure: float) -> float:
        """One device's part of what a chip has."""
        return figure / self.cores


_MXU = 2 * 128**2  # operations a cycle of a matrix unit; one of a v6e is as large as four of them
CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            *("v4", 32, 31.75, 1200, 275, 270, 6.25, 3, 4096, "v4", 2, 3.22),
            compiler="megacore",
            flops_per_cycle=8 * _MXU,
        ),
        Chip(
            *("v5e", 16, 15.75, 819, 197, 200, 3.125, 2, 256, "v5litepod", 1, 1.20),
            flops_per_cycle=4 * _MXU,
        ),
        Chip(
            *("v5p", 95, 94.75, 2765, 459, 600, 6.25, 3, 6144, "v5p", 2, 4.20),
            compiler="megacore",
            flops_per_cycle=8 * _MXU,
        ),
        Chip(
            *("v6e", 32, 31.25, 1638, 918, 400, 12.5, 2, 256, "v6e", 1, 2.70),
            flops_per_cycle=4 * 4 * _MXU,
        ),
        Chip("tpu7x", 192, 189.5, 7380, 2307, 600, 12.5, 3, 9216, "tpu7x", 2, None, cores=2),
    )
}
EXAMPLES = "v4:2x2x1, v5e:4x4, v5e:8x8 or v5litepod-64, v5p:4x4x4 or v5p-128, v6e:8x8, tpu7x:2x2x1"
# Flat slices, and those of three dimensions that are smaller than a cube of 4 x 4 x 4 chips; larger
# ones consist of such cubes.
_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_BELOW_A_CUBE = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
_LONGEST = 256  # chips along one dimension


@dataclasses.dataclass(frozen=True)
class SliceTopology:
    """`number` slices of chips, each a torus of `shape`, joined by the data-centre network."""

    chip: Chip
    shape: tuple[int, ...]
    number: int = 1

    @property
    def name(self) -> str:
        """The compiler's name of one slice; of GPUs their own, and their number."""
        if self.chip.platform != "tpu":
            return f"{self.chip.name}:{self.chips}" if self.chips > 1 else self.chip.name
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def google(self) -> str | None:
        """The name of one slice for gcloud and xpk: with its number of TensorCores. They give the
        most compact shape of that many; None for another one, which has to be asked for by its
        shape."""
        if self.shape != _most_compact(self.chip, math.prod(self.shape)):
            return None
        return f"{self.chip.google}-{math.prod(self.shape) * self.chip.tensor_cores}"

    @property
    def chips(self) -> int:
        """Of all slices."""
        return math.prod(self.shape) * self.number

    @property
    def devices(self) -> int:
        """The number of devices that JAX sees, in all slices."""
        return self.chips * self.chip.cores


def parse_topology(topology: str, number: int = 1) -> SliceTopology:
    """Reads the name of a slice: "v5e:8x8", or Google's, v5litepod-64.

    Raises:
      ConfigError: no such chip, shape or number; says which there are.
    """
    if number < 1:
        raise ConfigError(f"--slices: {number} is not at least 1")
    name, _, shape = topology.partition(":")
    prefix, _, count = topology.rpartition("-")
    for chip in CHIPS.values():
        if name == chip.name and shape:
            return SliceTopology(chip, _read_shape(chip, topology, shape), number)
        if prefix in (chip.google, chip.name) and re.fullmatch(r"[1-9]\d*", count):
            return SliceTopology(chip, _read_count(chip, topology, int(count)), number)
    raise ConfigError(
        f"--topology: {topology!r} names no slice; there are {', '.join(CHIPS)}, such as {EXAMPLES}"
    )


def parse_topologies(names: str, number: int = 1, most: int = 256) -> list[SliceTopology]:
    """The slices that a list such as "v5e:8x8,v6e" names: of a chip alone all that Google has a
    name for, of at most `most` chips each. Raises as `parse_topology`."""
    found = []
    for name in names.split(","):
        if name in CHIPS:
            shapes = [_most_compact(CHIPS[name], size) for size in range(1, most + 1)]
            found += [SliceTopology(CHIPS[name], shape, number) for shape in shapes if shape]
        else:
            found.append(parse_topology(name, number))
    return found


def _read_shape(chip: Chip, topology: str, text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d*" + r"x[1-9]\d*" * (chip.dimensions - 1), text):
        raise ConfigError(
            f"--topology: {topology!r} has no shape of {chip.dimensions} numbers, as a {chip.name} "
            f"slice has; such as {EXAMPLES}"
        )
    shape = tuple(map(int, text.split("x")))
    if shape in _shapes(chip):
        return shape
    if math.prod(shape) > chip.largest:
        raise ConfigError(
            f"--topology: {topology!r} is {math.prod(shape)} chips; the largest {chip.name} slice "
            f"has {chip.largest}"
        )
    raise ConfigError(f"--topology: there is no slice {topology!r}; there are {_kinds(chip)}")


def _read_count(chip: Chip, topology: str, count: int) -> tuple[int, ...]:
    shape = _most_compact(chip, count // chip.tensor_cores)
    if shape is None or count % chip.tensor_cores:
        counted = "TensorCores, two to a chip" if chip.tensor_cores == 2 else "chips"
        raise ConfigError(
            f"--topology: there is no slice {topology!r}, which counts {counted}; there are "
            f"{_kinds(chip)}"
        )
    return shape


def _kinds(chip: Chip) -> str:
    """All slices of a chip, or how they are made."""

    def named(shapes):
        both = (SliceTopology(chip, shape) for shape in shapes)
        return ", ".join(f"{one.name} ({one.google})" for one in both)

    if chip.dimensions == 2:
        return named(_FLAT)
    return (
        f"{named(_BELOW_A_CUBE)}, and AxBxC with A <= B <= C, all multiples of 4, of at most "
        f"{chip.largest} chips, such as {named([(4, 4, 4)])}"
    )


@functools.cache
def _shapes(chip: Chip) -> tuple[tuple[int, ...], ...]:
    """The shapes of all slices of a chip."""
    if chip.dimensions == 2:
        return _FLAT
    sides = range(4, _LONGEST + 1, 4)
    of_cubes = itertools.combinations_with_replacement(sides, 3)
    return (*_BELOW_A_CUBE, *(shape for shape in of_cubes if math.prod(shape) <= chip.largest))


@functools.cache
def _most_compact(chip: Chip, chips: int) -> tuple[int, ...] | None:
    """The shape of so many chips with the least surface; None where there is none."""

    def surface(shape):
        return sum(1 / length for length in shape)

    shapes = (shape for shape in _shapes(chip) if math.prod(shape) == chips)
    return min(shapes, key=surface, default=None)
