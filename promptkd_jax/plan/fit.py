"""What would make a run fit into its devices' memory: changes of its config, tried by estimates."""

import dataclasses
import functools
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from promptkd_jax.infra import distributed, sharding
from promptkd_jax.infra.errors import ConfigError, ModelError
from promptkd_jax.plan import gpus, roofline
from promptkd_jax.plan.remat import (
    DEFAULT_FRACTION,
    FRACTION,
    device_bytes,
    device_kind,
    memory_fraction,
    with_chosen_remat,
)
from promptkd_jax.training.config.checks import contradictions_of
from promptkd_jax.training.config.fields import NOT_IN_FINGERPRINT, RunConfig
from promptkd_jax.training.run_models import KEPT

MEMORY_FRACTION = 0.95  # of a GPU for JAX, where nothing else needs it

Settings = Mapping[str, Any]  # values by the paths of fields, such as "teacher.dtype"


class Change(NamedTuple):
    """Settings that lower what a run needs, and what they are, in words."""

    words: str
    settings: Settings


class Fit(NamedTuple):
    """What a run needs with some changes made, bytes of one device."""

    changes: tuple[Change, ...]
    needed: float

    @property
    def words(self) -> str:
        """The last change; "as it is" without one."""
        return self.changes[-1].words if self.changes else "as it is"

    @property
    def all_words(self) -> str:
        """All changes, in words."""
        return "; ".join(change.words for change in self.changes)

    @property
    def settings(self) -> Settings:
        """Those of all changes."""
        return {path: x for change in self.changes for path, x in change.settings.items()}

    @property
    def flags(self) -> str:
        """The settings as flags of a command."""
        return " ".join(shlex.quote(f"--config.{path}={x}") for path, x in self.settings.items())


def changes(config: RunConfig) -> Iterator[Change]:
    """Yields what may be changed, the least first: what alters no number, then what rounds, then
    what waits for the host's memory at every step, then what is another method of training."""
    models = {"teacher": config.teacher, "student": config.student}
    trained = any(stage.teacher_view == "online" for stage in config.stages)
    kept_as = functools.partial(_kept_as, config)
    adapted, both = config.student.lora.is_used, ["teacher"]
    if adapted and config.student.path == config.teacher.path:
        # One set of weights serves both, while both are kept alike.
        both = list(models)
        how = {x: getattr(config.teacher, x) for x in KEPT}
        alike = {f"student.{x}": to for x, to in how.items() if getattr(config.student, x) != to}
        if alike:
            yield Change("one model for teacher and student", alike)
    kept = [name for name, model in models.items() if model.remat not in ("full", "auto")]
    if kept:
        yield Change("remat", {f"{name}.remat": "full" for name in kept})
    for rows in (4, 2, 1):  # of a micro-batch
        new = {}
        for i, stage in enumerate(config.stages):
            minibatch = (stage.packed_rows or stage.batch_size) // stage.minibatches
            number = next(n for n in range(1, minibatch + 1) if _gives(minibatch, n, rows))
            if number > stage.gradient_accumulation_steps:
                new[f"stages[{i}].gradient_accumulation_steps"] = number
        if new:
            yield Change("smaller micro-batches", new)
    slots = {
        f"stages[{i}].max_concurrent_rollouts": max(1, stage.batch_size // 4)
        for i, stage in enumerate(config.stages)
        if stage.source.on_policy and not stage.max_concurrent_rollouts and stage.batch_size > 1
    }
    if slots:
        yield Change("fewer rollouts at once", slots)
    for name, model in models.items():
        half = {"dtype": "bfloat16", "param_dtype": "bfloat16"}
        new = {f"{name}.{x}": to for x, to in half.items() if getattr(model, x) != to}
        if new:
            yield Change(f"the {name} in bfloat16", new)
    if config.student.kv_cache_dtype == "auto":
        yield Change("keys and values of rollouts in int8", {"student.kv_cache_dtype": "int8"})
    of_both = " and the student's" if len(both) > 1 else ""
    settings = kept_as("quantize", "int8", ["student"])
    frozen = Change("the student's frozen kernels in int8", settings)
    if config.teacher.quantize == "none" and not trained:
        settings = kept_as("quantize", "int8", both)
        yield Change(f"the teacher's{of_both} kernels in int8", settings)
    if adapted and config.student.quantize == "none":
        yield frozen
    optimizers = [f"stages[{i}].optimizer" for i in range(len(config.stages))]
    if config.stages[0].optimizer == "adamw":  # one for all
        yield Change("AdamW's moments in 8 bits", dict.fromkeys(optimizers, "adamw_8bit"))
    if not (config.teacher.offload or trained):
        settings = kept_as("offload", True, both)
        yield Change(f"the teacher's{of_both} layers in the host's memory", settings)
    if not config.offload_optimizer_state:
        yield Change("the moments in the host's memory", {"offload_optimizer_state": True})
    if not adapted:
        settings = {"student.lora.rank": 16, "student.lora.alpha": 32.0}
        yield Change("a LoRA student, which wants a larger learning rate", settings)
        yield frozen
    if config.teacher.quantize != "int4" and not trained:
        settings = kept_as("quantize", "int4", both)
        yield Change(f"the teacher's{of_both} kernels in int4", settings)
    if not config.student.offload:
        words = "the student's frozen layers in the host's memory"
        yield Change(words, kept_as("offload", True, ["student"]))


def _kept_as(config: RunConfig, field: str, value: Any, names: Sequence[str]) -> Settings:
    """A field of these models; a student that is kept rounded, or in the host's memory, is not
    rounded while it writes."""
    rounding = [i for i, stage in enumerate(config.stages) if stage.rollout_quantize != "none"]
    never = {f"stages[{i}].rollout_quantize": "none" for i in rounding if "student" in names}
    return {f"{name}.{field}": value for name in names} | never


def _gives(rows: int, number: int, most: int) -> bool:
    """Whether rows are dealt out evenly to so many micro-batches, of at most `most` each."""
    return rows % number == 0 and rows // number <= most


def changed(config: RunConfig, settings: Settings) -> RunConfig:
    """A copy with other values of some fields."""
    for path, value in settings.items():
        config = _replaced(config, path.replace("[", ".").replace("]", "").split("."), value)
    return config


def _replaced(group: Any, path: list[str], value: Any) -> Any:
    first, *rest = path
    if isinstance(group, tuple):
        place = int(first)
        return (*group[:place], _replaced(group[place], rest, value), *group[place + 1 :])
    inner = _replaced(getattr(group, first), rest, value) if rest else value
    return dataclasses.replace(group, **{first: inner})


def tried(
    config: RunConfig,
    mesh: Any,
    device: tuple[str, float],
    usable: float,
    stage: str | None = None,
) -> list[Fit]:
    """The run as it is, then with one change more at a time until it fits; changes that gain
    nothing, and those that this run or mesh does not allow, are left out. If it fits without some
    of the earlier ones, the last is without these.

    Args:
      device: platform and compute capability, as for `roofline.needed_bytes`.
      stage: that has to fit; None: all of them.
    """
    known = set(contradictions_of(config))

    def needed(changes: Sequence[Change]) -> float | None:
        """Bytes with these changes; None where they cannot be."""
        settings = {path: x for change in changes for path, x in change.settings.items()}
        new = changed(config, settings)
        if not known.issuperset(contradictions_of(new)):
            return None
        try:
            return roofline.needed_bytes(new, mesh, *device, stage)
        # A mesh that does not divide what the change makes; inputs that do not lie in pairs.
        except (ConfigError, ModelError):
            return None

    fits = [Fit((), roofline.needed_bytes(config, mesh, *device, stage))]
    for change in changes(config):
        if (last := fits[-1]).needed <= usable:
            break
        # Later micro-batches take the place of earlier ones.
        together = *(x for x in last.changes if x.words != change.words), change
        found = needed(together)
        if found is not None and found < 0.995 * last.needed:
            fits.append(Fit(together, found))
    if (last := fits[-1]).needed <= usable:
        fewer = last
        for change in reversed(last.changes[:-1]):
            without = tuple(x for x in fewer.changes if x is not change)
            found = needed(without)
            if found is not None and found <= usable:
                fewer = Fit(without, found)
        if fewer is not last:
            fits.append(fewer)
    return fits


def most_usable(limit: float, fraction: float) -> float:
    """Bytes that a run may use of a GPU of which JAX takes MEMORY_FRACTION: `gpus.USABLE` of its
    memory, or what JAX takes of it now, if that is more.

    Args:
      limit: bytes that JAX takes of it now.
      fraction: the part of its memory that these are.
    """
    return max(limit, gpus.USABLE * limit / fraction)


def larger_part(most: float) -> str:
    """How JAX takes so much of a GPU that a run may use `most` bytes of it, in words."""
    return (
        f"set {FRACTION}={MEMORY_FRACTION}, with which a run may use {most / 1e9:.1f} GB of it "
        f"(JAX takes {100 * DEFAULT_FRACTION:.0f} % of a GPU's memory if nothing is set)"
    )


def remedy(
    needed: float,
    limit: float,
    most: float,
    within: Callable[[float], Fit],
    share: float = 1.0,
) -> str:
    """The least to set for a run that finds no room in a device, in words: a larger part of a GPU
    for JAX, which changes nothing of the run; changes of its config; or both.

    Args:
      needed: bytes of a device, by the estimate.
      limit: bytes that JAX takes of it.
      most: bytes that the run could use of it, see `most_usable`.
      within: the run with the least changes for so many bytes, or the closest to them.
      share: of the memory there is, what changes are to leave a run with: after a device had none
        left, the estimate is too low.
    """
    larger, alone = larger_part(most), limit < most and needed <= most
    usable = share * min(needed, limit if alone else most)
    last = within(usable)
    fits = last.needed <= usable
    # A workdir is of one config, but for these fields.
    elsewhere = "" if last.settings.keys() <= {*NOT_IN_FINGERPRINT} else " and another --workdir"
    said = f"{last.needed / 1e9:.1f} GB would do with {last.all_words}, by {last.flags}{elsewhere}"
    if alone:
        return f"{larger}; otherwise {said}" if fits else larger
    if fits:
        return said if last.needed <= share * limit else f"{larger}, and {said}"
    return (
        "nothing that is tried by `promptkd plan --device` would make it fit: take more devices "
        "(config.mesh.fsdp), a larger one, or smaller models"
    )


def fitted(config: RunConfig, mesh: jax.sharding.Mesh) -> RunConfig:
    """`with_chosen_remat`; warns of a run that will not fit by the estimate, before anything is
    loaded, and says what would make it fit."""
    config = with_chosen_remat(config, mesh)
    limit, most = distributed.run_on_primary(_memory)
    needed = roofline.needed_bytes(config, mesh, *device_kind())
    if needed > limit:
        distributed.warn(
            f"this run needs an estimated {needed / 1e9:.1f} GB of a device, which has "
            f"{limit / 1e9:.1f} GB for it; {remedy(needed, limit, most, _within(config, mesh))}"
        )
    return config


def out_of_memory(config: RunConfig, error: Exception) -> str:
    """What to set after a device had no memory left, whatever the estimate was. Of many processes
    one alone may have had none: nothing is asked of the others."""
    mesh = sharding.make_mesh(config.mesh.sizes)
    needed = roofline.needed_bytes(config, mesh, *device_kind())
    said = remedy(needed, *_memory(), _within(config, mesh), share=0.8)
    return f"a device has no memory left ({str(error).splitlines()[0]}); {said}"


def _memory() -> tuple[float, float]:
    """Bytes that JAX takes of a device, and that a run could use of it."""
    limit = device_bytes()
    return limit, most_usable(limit, memory_fraction())


def _within(config: RunConfig, mesh: jax.sharding.Mesh) -> Callable[[float], Fit]:
    return lambda usable: tried(config, mesh, device_kind(), usable)[-1]
