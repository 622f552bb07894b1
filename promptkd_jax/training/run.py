"""One run, from models and data to a report; continues one that was stopped."""

import concurrent.futures
import contextlib
import itertools
import json
import math
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import jax
from etils import epath

from promptkd_jax.evaluation.data_page import page_section
from promptkd_jax.evaluation.data_report import DataReport, Split, describe_data
from promptkd_jax.evaluation.report import summary_table, write_report
from promptkd_jax.infra import distributed, sharding
from promptkd_jax.infra.errors import DataError, TrainingError
from promptkd_jax.infra.files import check_shared, held, load_or_compute, read_text, write_json
from promptkd_jax.models.io.safetensors import has_weights
from promptkd_jax.models.layers.attention import AMPERE, implementation
from promptkd_jax.training import build
from promptkd_jax.training.config.checks import check_mesh
from promptkd_jax.training.config.config_file import as_json, claim
from promptkd_jax.training.config.field_specs import TEACHER
from promptkd_jax.training.config.fields import NOT_IN_FINGERPRINT, RunConfig
from promptkd_jax.training.experiment import Experiment
from promptkd_jax.training.loop import (
    Trained,
    compile_ahead,
    dev_generation_metrics,
    evaluate_student,
    fit,
)
from promptkd_jax.training.prepare import prepare, with_date
from promptkd_jax.training.run_data import check_sources, training_records
from promptkd_jax.training.save import save, save_configs

# name, format, which direction is better
DEV_METRICS = {
    "kl": ("held-out KL(teacher ‖ student), nats", ".3f", "lower"),
    "agreement": ("top-1 agreement with the teacher", ".3f", "higher"),
    "rougeL": ("ROUGE-L", ".2f", "higher"),
    "repetition": ("share of repeated 4-grams", ".3f", "lower"),
}
# What summary.json compares before and after training.
SUMMARY_KEYS = (*DEV_METRICS, "loss", "response_length", "eos_rate")
# That the report looks for near-duplicates of dev in; `promptkd data` looks at all.
COMPARED_PROMPTS = 100_000
# Where a step is compiled while a student is measured. On a CPU both want the same cores; on a GPU
# XLA chooses kernels by timing them, which a device at work would falsify.
COMPILED_ASIDE = ("tpu",)
PROMPT_EFFECT = ("teacher_rougeL", "teacher_rougeL_prompted")


def run(
    config: RunConfig,
    workdir: epath.Path,
    choose_remat: Callable[[RunConfig, jax.sharding.Mesh], RunConfig] | None = None,
) -> dict[str, Any]:
    """Trains, or continues, or finds it done; returns what `summary.json` says.

    Args:
      workdir: a folder that all processes see, as `files.to_path` makes it.
      choose_remat: replaces "auto", as `plan.remat.with_chosen_remat`; None: that is "full".
    """
    distributed.assert_same("the config", json.dumps(as_json(config), sort_keys=True))
    distributed.assert_same("the version of jax, flax, optax or promptkd_jax", _versions())
    with held(workdir):
        claim(workdir, config, NOT_IN_FINGERPRINT)
        check_shared(workdir)
        return _run(config, workdir, choose_remat)


def _run(config: RunConfig, workdir: epath.Path, choose_remat: Callable | None) -> dict[str, Any]:
    if distributed.run_on_primary(lambda: is_finished(workdir)):
        print(f"{workdir} is finished, nothing to do: see {workdir / 'report.html'}")
        return distributed.run_on_primary(lambda: json.loads(read_text(workdir / "summary.json")))
    started = time.monotonic()
    mesh = sharding.make_mesh(config.mesh.sizes)
    check_mesh(config, mesh)
    check_sources(config)  # in a second, where an estimate and the models take longer
    config = with_date(config, workdir)
    config = choose_remat(config, mesh) if choose_remat else config
    with jax.set_mesh(mesh):
        experiment = prepare(config, workdir, mesh)
        save_configs(experiment, workdir)
        for doubt in _doubts(experiment):
            distributed.warn(doubt)
        step = experiment.jitted_step(experiment.stages[0])

        def assess():
            with _compiled_aside(experiment, step):
                return _assess_first(experiment)

        before = load_or_compute(workdir / "before.json", assess)
        result = fit(experiment, workdir, started, before, step)
        return finish(experiment, workdir, result, before)


@contextlib.contextmanager
def _compiled_aside(experiment: Experiment, step: Callable) -> Iterator[None]:
    """Has the first stage's step compiled in a thread, on the platforms of `COMPILED_ASIDE`."""
    if sharding.platform() not in COMPILED_ASIDE:
        yield
        return

    def compile_first():
        with jax.set_mesh(experiment.mesh):  # of this thread
            compile_ahead(experiment, experiment.stages[0], step)

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        compiled = pool.submit(compile_first)
        yield
        compiled.result()


def _doubts(experiment: Experiment) -> Iterator[str]:
    """Fields that can be right, and seldom are."""
    config, total = experiment.config, experiment.total_steps
    for index, stage in enumerate(experiment.stages):
        warmup = config.stages[index].warmup_steps
        updates = stage.steps * stage.method.updates_per_step
        if warmup >= updates:
            yield (
                f"config.stages[{index}].warmup_steps: {warmup}, but the stage has {updates} "
                f"updates: its rate never comes to config.stages[{index}].learning_rate"
            )
    yield from _without_a_kernel(experiment)
    every = config.evaluation.every
    if every >= total:
        yield (
            f"config.evaluation.every: {every}, but the run has {total} steps: no evaluation "
            "before the end; 0 asks for none"
        )
    forced = 0 < every < total or len(config.stages) > 1  # by evaluations, and by stages' ends
    every = config.checkpoint.every
    if every >= total and not forced and not config.checkpoint.minutes:
        yield (
            f"config.checkpoint.every: {every}, but the run has {total} steps, and "
            "config.checkpoint.minutes is 0: no checkpoint before the end, so that a run that is "
            "killed begins anew"
        )


def _without_a_kernel(experiment: Experiment) -> Iterator[str]:
    """Models on GPUs whose attention XLA computes."""
    if sharding.platform() != "gpu":
        return
    capability, mesh = sharding.compute_capability(), experiment.mesh.shape
    for model in filter(None, (experiment.teacher, experiment.student)):
        config = model.decoder.config
        padded = config.padded
        chosen = implementation(
            platform="gpu",
            dtype=config.dtype,
            rows=1,
            columns=experiment.config.data.max_length,
            num_heads=padded.num_heads,
            num_kv_heads=padded.num_kv_heads,
            head_dim=config.head_dim,
            row_parts=1,
            head_parts=mesh["tensor"],
            plain=config.has_plain_attention,
            capability=capability,
        )
        if chosen == "xla":
            yield (
                f"{model.name}: XLA computes its attention, in more memory than cuDNN's kernel, "
                "which is for bfloat16, heads of at most 128 in multiples of 8, neither soft caps "
                f"nor sinks, and NVIDIA's compute capability {AMPERE:g}; here: {config.dtype}, "
                f"heads of {config.head_dim}, compute capability {capability:g}"
            )


def is_finished(workdir: epath.Path) -> bool:
    """Whether nothing is left to do: a student that was removed is exported once more."""
    return (workdir / "summary.json").exists() and has_weights(workdir / "student")


def _assess_first(experiment: Experiment) -> dict[str, Any]:
    """Scores the student that the run starts from. Raises TrainingError where it is broken."""
    print("measuring the student before training …", flush=True)
    found = evaluate_student(experiment)
    for key, who in (("loss", experiment.student), ("kl", experiment.teacher)):
        if not math.isfinite(found.get(key, 0.0)):
            name = DEV_METRICS[key][0] if key in DEV_METRICS else "loss"
            raise TrainingError(
                f"{who.name}: its {name} on the dev rows is {found[key]} before training: its "
                f"weights, or what {who.decoder.config.dtype} makes of them, are not finite numbers"
            )
    return found


def _versions() -> str:
    return ", ".join(f"{p} {version(p)}" for p in ("jax", "flax", "optax", "promptkd_jax"))


def finish(
    experiment: Experiment, workdir: epath.Path, trained: Trained, before: dict[str, Any]
) -> dict[str, Any]:
    """Exports, measures, reports; `summary.json` comes last and says that the run is finished."""
    config, state = experiment.config, trained.state
    print("measuring the student after training …", flush=True)
    after = evaluate_student(experiment, state.student, state.soft_prompt)
    if state.soft_prompt is not None and config.evaluation.prompt_effect:
        # The teacher's own ROUGE-L, without and with its soft prompt (table 4 of the paper).
        for name, prompt in zip(PROMPT_EFFECT, (None, state.soft_prompt)):
            scores, _ = dev_generation_metrics(experiment, experiment.teacher, prompt)
            after[name] = scores["rougeL"]
    write_json(workdir / "after.json", after)
    rows = [
        (name, before[key], after[key], *rest)
        for key, (name, *rest) in DEV_METRICS.items()
        if key in after
    ]
    models = experiment.teacher, experiment.student
    paths = {"report": str(workdir / "report.html")}
    params = state.params | {"student": experiment.trained_student(state.student).params}
    step = experiment.name_of_step(trained.step)
    paths |= save(config, models, params, workdir, rows, step=step)
    summary = _summary(trained, before, after)
    stages = {
        f"Stage {number}": f"{build.describe(chosen)}; {stage.steps} steps of "
        f"{chosen.batch_size} rows"
        for number, (chosen, stage) in enumerate(zip(config.stages, experiment.stages), start=1)
    }
    facts = stages | {
        "Exported": step,
        "Device": summary["device"],
        "Processes": str(jax.process_count()),
        "Versions": summary["versions"],
        "Time": f"{trained.seconds / 60:.1f} min",
        "Peak memory": f"{summary['peak_memory_gb']:.2f} GB",
    }
    write_report(
        workdir,
        title=build.title(config),
        config_text=json.dumps(as_json(config), indent=2),
        summary={"metrics": rows, "facts": facts, "paths": paths},
        samples=_samples(experiment, before["texts"], after["texts"]),
        reference="teacher" if config.evaluation.references == "teacher" else "reference",
        data=page_section(_data_report(experiment)) if distributed.is_primary() else None,
    )
    print(summary_table(rows, paths))
    write_json(workdir / "summary.json", summary)
    return summary


def _summary(trained: Trained, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What a run came to, in numbers, and on what."""
    spent = trained.training
    summary = {
        f"{key}_{when}": found[key]
        for key in SUMMARY_KEYS
        for when, found in (("before", before), ("after", after))
        if key in found
    }
    summary |= {
        "seconds": trained.seconds,
        "training_seconds": spent["seconds"],
        "peak_memory_gb": peak_memory_gb(),
        "updates": trained.updates,
        "updates_skipped": int(trained.state.skipped),
        "device": _device(),
        "versions": f"{_versions()}, python {platform.python_version()}",
    }
    if spent["rows"]:
        summary["tokens_per_second"] = spent["tokens"] / spent["seconds"]
        summary["seconds_per_sample"] = spent["seconds"] / spent["rows"]
    if "kl_prompted" in after:
        summary["kl_prompted_after"] = after["kl_prompted"]
    return summary | {name: after[name] for name in PROMPT_EFFECT if name in after}


def _device() -> str:
    """The devices that a run computes on, in words."""
    kind = jax.devices()[0].device_kind
    count = jax.device_count()
    cores = f" ({os.cpu_count()} cores)" if kind == "cpu" else ""
    return f"{count} × {kind}{cores}" if count > 1 else f"{kind}{cores}"


def peak_memory_gb() -> float:
    """The most memory in use so far, in GB: of the accelerator, else of this process."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    unit = 1 if sys.platform == "darwin" else 1024
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return statistics.get("peak_bytes_in_use", resident) / 1e9


def _data_report(experiment: Experiment) -> DataReport:
    """The rows that the run learned from, and was measured on."""
    data = experiment.config.data
    prompt_format = data.prompt_format(experiment.config.preset)
    names = "train", "train, by the teacher"
    records, notes = None, []
    if data.train != TEACHER:
        records = itertools.chain.from_iterable(training_records(experiment.config, quiet=True))
        try:
            records = list(itertools.islice(records, COMPARED_PROMPTS))
        except DataError as error:  # the run itself is done, and its rows are kept
            records = []
            notes = [f"Near-duplicates were not looked for: {error}"]
    return describe_data(
        [Split(name, rows, prompt_format, records) for name, rows in zip(names, experiment.train)],
        [Split("dev", experiment.dev, prompt_format)],
        experiment.student,
        experiment.teacher,
        max_prompt_length=data.max_prompt_length,
        max_length=data.max_length,
        notes=notes,
        compared=COMPARED_PROMPTS,
    )


def _samples(experiment: Experiment, before: list[str], after: list[str]) -> list[dict[str, str]]:
    records = experiment.dev.records[: experiment.config.evaluation.samples]
    return [
        {
            "request": record.prompt_text,
            "teacher": record.references[0],
            "before": first,
            "after": last,
        }
        for record, first, last in zip(records, before, after)
    ]
