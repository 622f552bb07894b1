"""GPUs by name or by memory: "rtx4090", "h100:8" for eight of them, "24GB".

Figures of the makers' data sheets and architecture papers: dense bfloat16 products that are summed
in float32 (before Ampere float32's own), bandwidth of the memory, and what one card sends to the
others of its machine (NVLink where it has it, else PCIe), in one direction. Memory is what NVIDIA's
driver reports (nvidia-smi) of those cards of which it is known.
"""

import dataclasses
import re

import jax

from promptkd_jax.infra.errors import ConfigError
from promptkd_jax.infra.sharding import compute_capability
from promptkd_jax.plan.chips import GIB, Chip, SliceTopology
from promptkd_jax.plan.remat import device_bytes

# Of the memory of a card: CUDA, its libraries and the screen have the rest. JAX itself takes 75 %
# unless XLA_PYTHON_CLIENT_MEM_FRACTION says more.
USABLE = 0.92
MOST = 16  # of one machine


def _gpu(
    name: str,
    mib: float,
    gbps: float | None,
    tflops: float | None,
    link: float = 32,
    capability: float = 9.0,
) -> Chip:
    return Chip(
        name=name,
        hbm_gib=mib / 1024,
        usable_gib=USABLE * mib / 1024,
        hbm_gbps=gbps,
        tflops=tflops,
        ici_gbps=link,
        dcn_gbps=12.5,
        dimensions=1,
        largest=MOST,
        google="",
        tensor_cores=1,
        usd_per_hour=None,
        platform="gpu",
        capability=capability,
    )


GPUS = {
    gpu.name: gpu
    for gpu in (
        # MiB of memory: "24 GB" of a data sheet may be less, since error correction takes a part.
        # Of data-centre cards from thundergolfer.com/blog/nvidia-gpu-memory-capacity (NVML, by a
        # cloud that has them), of RTX 3090 and 4090 as nvidia-smi prints it; the products with 1024
        # are the data sheets' GB, taken for GiB.
        # Before Ampere without bfloat16: products in float32.
        _gpu("t4", 15360, 320, 8.1, 16, 7.5),
        _gpu("v100", 32 * 1024, 900, 15.7, 150, 7.0),
        _gpu("rtx2080ti", 11 * 1024, 616, 13.4, 16, 7.5),
        _gpu("rtx3060", 12 * 1024, 360, 25.6, 16),
        _gpu("rtx3080", 10 * 1024, 760, 59.5),
        _gpu("rtx3090", 24576, 936, 71),
        _gpu("rtx4060ti-16gb", 16 * 1024, 288, 44, 16),
        _gpu("rtx4080", 16 * 1024, 717, 97.5),
        _gpu("rtx4090", 24564, 1008, 165),
        _gpu("rtx5090", 32 * 1024, 1792, 209.5, 64),
        _gpu("a10", 23028, 600, 125),  # the A10G too
        _gpu("l4", 23034, 300, 121),
        _gpu("a6000", 48 * 1024, 768, 155, 56),
        _gpu("l40s", 46068, 864, 362),
        _gpu("a100-40gb", 40960, 1555, 312, 300),
        _gpu("a100", 81920, 2039, 312, 300),
        _gpu("h100", 81559, 3350, 989, 450),
        _gpu("h200", 143771, 4800, 989, 450),
        _gpu("b200", 180 * 1024, 8000, 2250, 900),
    )
}


HERE = "here"


def devices_here() -> SliceTopology:
    """The devices of this machine, of which JAX says the memory."""
    device, gib = jax.local_devices()[0], device_bytes() / GIB
    here = _gpu(device.device_kind, 1024 * gib, None, None)
    kind = dict(platform=device.platform, capability=compute_capability())
    here = dataclasses.replace(here, usable_gib=gib, **kind)
    return SliceTopology(here, (jax.device_count(),))


def parse_device(text: str) -> SliceTopology:
    """Reads "rtx4090", also as "RTX 4090" or "4090", "h100:8" or "24GB".

    Raises:
      ConfigError: no such GPU, or no number of them; says which there are.
    """
    name, _, count = text.lower().replace(" ", "").partition(":")
    number = int(count) if re.fullmatch(r"[1-9]\d?", count) and int(count) <= MOST else 0
    gpu = GPUS.get(name) or GPUS.get(f"rtx{name}")
    if found := re.fullmatch(r"(\d+(?:\.\d+)?)gi?b", name):
        gpu = _gpu(f"a GPU of {found[1]} GB", 1024 * float(found[1]), None, None)
        gpu = gpu if gpu.hbm_gib else None
    if gpu and ":" in text and not number:
        raise ConfigError(f"--device: {text!r}: expected 1 to {MOST} of {name!r}, found {count!r}")
    if gpu is None:
        raise ConfigError(
            f"--device: {text!r} names no GPU; expected its memory, such as 24GB, one of "
            f"{', '.join(GPUS)}, or of several, such as rtx4090:2, at most {MOST}; {HERE!r} for "
            "this machine's"
        )
    return SliceTopology(gpu, (number or 1,))
