"""Which remat policy a run's memory has room for: `remat = "auto"`."""

import dataclasses
import os

import jax

from promptkd_jax.infra import distributed, sharding
from promptkd_jax.models.decoder import REMAT
from promptkd_jax.plan import roofline
from promptkd_jax.training.config.fields import RunConfig

SHARE = 0.75  # of a device's memory: an estimate does not know all
# Of a GPU's memory for JAX: the variable that says it, and what JAX takes without one.
FRACTION, DEFAULT_FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION", 0.75


def with_chosen_remat(config: RunConfig, mesh: jax.sharding.Mesh) -> RunConfig:
    """A checked config with a policy in place of every "auto": of those whose estimate fits into
    the devices of `mesh` the one that computes least twice, else "full"."""
    if "auto" not in (config.teacher.remat, config.student.remat):
        return config
    memory = distributed.run_on_primary(device_bytes)
    for policy in REMAT:  # the first keeps most
        tried = with_remat(config, policy)
        needed = roofline.needed_bytes(tried, mesh, *device_kind())
        if needed <= SHARE * memory:
            break
    print(f"remat: {policy}, an estimated {needed / 1e9:.1f} of a device's {memory / 1e9:.1f} GB")
    return tried


def with_remat(config: RunConfig, policy: str) -> RunConfig:
    """A copy with `policy` in place of every "auto"."""
    models = {"teacher": config.teacher, "student": config.student}
    auto = {name: model for name, model in models.items() if model.remat == "auto"}
    chosen = {name: dataclasses.replace(model, remat=policy) for name, model in auto.items()}
    return dataclasses.replace(config, **chosen)


def device_kind() -> tuple[str, float]:
    """Platform and compute capability of the devices here, as estimates of memory take them."""
    return sharding.platform(), sharding.compute_capability()


def device_bytes() -> float:
    """The memory of a device; those of a CPU share the machine's, of which a container or a job
    may have less: name a policy there."""
    if statistics := jax.local_devices()[0].memory_stats():
        return statistics["bytes_limit"]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / jax.local_device_count()


def memory_fraction() -> float:
    """The part of a device's memory that `device_bytes` is: of a GPU as the environment says."""
    if sharding.platform() != "gpu":
        return 1.0
    set_by = os.environ.get(FRACTION) or os.environ.get("XLA_CLIENT_MEM_FRACTION")
    return float(set_by or DEFAULT_FRACTION)
