"""XLA's TPU compiler without a TPU: a run's programs for chips that nobody here has.

Needs libtpu (`pip install 'jax[tpu]'`), on any Linux machine. See `jax.experimental.topologies`.
"""

import importlib.util
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from promptkd_jax.distill.targets import target_rows
from promptkd_jax.infra import sharding
from promptkd_jax.infra.errors import ConfigError
from promptkd_jax.models.layers.lora import join
from promptkd_jax.models.sampler import SamplingModel, rows_of_a_round
from promptkd_jax.plan import hlo
from promptkd_jax.plan.abstract_run import AbstractRun
from promptkd_jax.plan.chips import EXAMPLES, GIB, SliceTopology
from promptkd_jax.plan.costs import Counter
from promptkd_jax.plan.hlo import Collective, Expectation

# libtpu asks the machine that it runs on what TPU it has, and lets one process at a time use it.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
MISSING = (
    "the TPU compiler is not installed: .venv/bin/pip install -e '.[tpu]', or pip install "
    "'jax[tpu]' (no TPU is needed for it)"
)


class Program(NamedTuple):
    """The compiler's figures of one program, bytes on one device.

    Attributes:
      arguments: the inputs; `new_outputs`: what does not take the place of a donated input.
      temporaries: everything between.
      code: the program itself.
      collectives: what is sent over the network.
      expected: the compiler's expectation of its time; `expected_once`: of all but what a loop does
        whose turns nobody knows beforehand, which is writing tokens.
    """

    arguments: int
    new_outputs: int
    temporaries: int
    code: int
    collectives: tuple[Collective, ...]
    expected: Expectation
    expected_once: Expectation

    @property
    def total(self) -> int:
        """Bytes that a device needs."""
        return self.arguments + self.new_outputs + self.temporaries + self.code


class TooLarge(NamedTuple):
    """What the compiler says of a program that does not fit; bytes on one device, None where it
    does not say how many."""

    needed: int | None
    usable: int | None
    message: str


def has_compiler() -> bool:
    """Whether libtpu is installed."""
    return importlib.util.find_spec("libtpu") is not None


def described_mesh(sizes: Mapping[str, int], slices: SliceTopology) -> Mesh:
    """A mesh of devices that can be compiled for, not computed on, laid out as
    `sharding.make_mesh` lays out real ones.

    Raises:
      ConfigError: a shape that the compiler does not know.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {"chip_config_name": slices.chip.compiler}
    if slices.number > 1:
        options["num_slices"] = slices.number
    if slices.chips // slices.number == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        described = topologies.get_topology_desc(slices.name, platform="tpu", **options)
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(
            f"--topology: the compiler does not know {slices.name} ({error}); there are, for "
            f"example, {EXAMPLES}"
        ) from error
    devices = list(described.devices)
    assert len(devices) == slices.devices, (slices, len(devices))
    return sharding.make_mesh(sizes, devices)


def compile_step(run: AbstractRun) -> Program | TooLarge:
    """Compiles the train step, as the run jits it, for the described mesh that it is on.

    Raises:
      ConfigError: the mesh does not divide the parameters or rows.
    """
    return _compile(run.jitted_step(run.stage), run, run.arguments())


def compile_rollout(run: AbstractRun) -> Program | TooLarge:
    """Compiles a step's beginning: the student writes its answers. Raises as `compile_step`."""
    method, models = run.stage.method, run.models

    def write(params, frozen, teacher, batch, replay, key, step):
        params = params if frozen is None else join(frozen, params)
        voice = SamplingModel(models.teacher, teacher) if method.teacher_writes_along else None
        return target_rows(
            method, models.student, params, batch, replay, key, step=step, teacher=voice
        )[0]

    state, teacher, batch, _, frozen, _ = run.arguments()
    if not method.teacher_writes_along:
        teacher = None
    inputs = (state.params["student"], frozen, teacher, batch)
    inputs += (state.replay, state.key, state.step)
    return _compile(jax.jit(write), run, inputs)


def _compile(jitted: Any, run: AbstractRun, inputs: tuple) -> Program | TooLarge:
    try:
        with jax.set_mesh(run.mesh):
            compiled = jitted.lower(*inputs).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _too_large(str(error))
    used = compiled.memory_analysis()
    slices = len({getattr(device, "slice_index", 0) for device in run.mesh.devices.flat})
    text, tokens = compiled.as_text(), run.stage.method.rollout_length
    collectives = hlo.collectives(
        text,
        unknown_trips=_trips(run, tokens),
        slice_devices=run.mesh.size // slices if slices > 1 else 0,
    )
    return Program(
        arguments=used.argument_size_in_bytes,
        new_outputs=used.output_size_in_bytes - used.alias_size_in_bytes,
        temporaries=used.temp_size_in_bytes,
        code=used.generated_code_size_in_bytes,
        collectives=tuple(collectives),
        expected=hlo.expectation(text, unknown_trips=_trips(run, tokens)),
        expected_once=hlo.expectation(text, unknown_trips=_trips(run, 0)),
    )


def _trips(run: AbstractRun, tokens: int) -> hlo.Trips:
    """How often loops turn whose end depends on lengths: that over `tokens` of a rollout, that over
    the rows which wait for a slot, and those of losses, over blocks of positions."""
    method, config = run.stage.method, run.student.decoder.config
    micro_batch = run.batch_size // method.num_micro_batches
    count = Counter(config, run.mesh.shape)
    blocks = count.blocks(micro_batch, method.response_capacity)
    slots = run.rows_at_once
    waiting = run.batch_size - slots
    rounds = -(-waiting // (rows_of_a_round(slots // count.row_parts) * count.row_parts))

    def trips(operation: str) -> int:
        if "/experts/" in operation:  # over what exceeds `feed_forward.pairs_at_once`
            return 1
        if re.fullmatch(r"jit\([^)]*\)(/cond|/branch_\w+)*/while", operation):
            return tokens
        if operation.endswith("/queue/while"):
            return rounds
        if "/queue/while/" in operation:
            return -(-tokens * waiting // (slots * rounds))
        return blocks if "jvp" in operation else 1

    return trips


def _too_large(message: str) -> TooLarge:
    """Reads "Used 20.53G of 15.75G hbm"."""
    found = re.search(r"Used ([\d.]+)([KMG]) of ([\d.]+)([KMG]) hbm", message)
    if not found:
        return TooLarge(None, None, message.splitlines()[0])
    units = {"K": 2**10, "M": 2**20, "G": GIB}
    needed, usable = (int(float(found[i]) * units[found[i + 1]]) for i in (1, 3))
    return TooLarge(needed, usable, message.splitlines()[0])
