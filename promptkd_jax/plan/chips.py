"""What a TPU chip has, and which chips a topology such as "v5e:8x8" names.

Specifications: docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e and /tpu7x. Prices: list prices
on demand in the USA, per chip-hour, as the SkyPilot catalog of Google Cloud prices
(github.com/skypilot-org/skypilot-catalog, catalogs/v8/gcp) had them in 2026; other regions differ,
spot and committed use cost less, and none is published for TPU7x.
"""

import dataclasses
import math
import re

from promptkd_jax.config import ConfigError

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
      dimensions: of the torus; largest: chips of a pod.
      cores: devices that JAX sees in one chip.
      usd_per_hour: None where no price is published.
      compiler: what the compiler has to be told to make one device of both cores of a chip.
    """

    name: str
    hbm_gib: float
    usable_gib: float
    hbm_gbps: float
    tflops: float
    ici_gbps: float
    dcn_gbps: float
    dimensions: int
    largest: int
    usd_per_hour: float | None
    cores: int = 1
    compiler: str = "default"

    def per_device(self, figure: float) -> float:
        """One device's part of what a chip has."""
        return figure / self.cores


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 32, 31.75, 1200, 275, 270, 6.25, 3, 4096, 3.22, compiler="megacore"),
        Chip("v5e", 16, 15.75, 819, 197, 200, 3.125, 2, 256, 1.20),
        Chip("v5p", 95, 94.75, 2765, 459, 600, 6.25, 3, 8960, 4.20, compiler="megacore"),
        Chip("v6e", 32, 31.25, 1638, 918, 400, 12.5, 2, 256, 2.70),
        Chip("tpu7x", 192, 189.5, 7380, 2307, 600, 12.5, 3, 9216, None, cores=2),
    )
}
EXAMPLES = "v4:2x2x1, v5e:4x4, v5e:8x8, v5p:4x4x4, v6e:8x8, tpu7x:2x2x1"


@dataclasses.dataclass(frozen=True)
class Slices:
    """`number` slices of chips, each a torus of `shape`, joined by the data-centre network."""

    chip: Chip
    shape: tuple[int, ...]
    number: int = 1

    @property
    def name(self) -> str:
        """As the compiler names one slice."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        """Of all slices."""
        return math.prod(self.shape) * self.number

    @property
    def devices(self) -> int:
        """That JAX sees, in all slices."""
        return self.chips * self.chip.cores


def slices(topology: str, number: int = 1) -> Slices:
    """Reads a topology such as "v5e:8x8".

    Raises:
      ConfigError: no such chip or shape; says which there are.
    """
    name, _, shape = topology.partition(":")
    if name not in CHIPS:
        raise ConfigError(
            f"--topology: {topology!r} names no chip; there are {', '.join(CHIPS)}, such as "
            f"{EXAMPLES}"
        )
    chip = CHIPS[name]
    pattern = r"[1-9]\d*" + r"x[1-9]\d*" * (chip.dimensions - 1)
    if not re.fullmatch(pattern, shape):
        raise ConfigError(
            f"--topology: {topology!r} has no shape of {chip.dimensions} numbers, as a {name} "
            f"slice has; such as {EXAMPLES}"
        )
    sizes = tuple(map(int, shape.split("x")))
    if math.prod(sizes) > chip.largest:
        raise ConfigError(
            f"--topology: {topology!r} is {math.prod(sizes)} chips, a {name} pod has {chip.largest}"
        )
    if number < 1:
        raise ConfigError(f"--slices: {number} is not at least 1")
    return Slices(chip, sizes, number)
