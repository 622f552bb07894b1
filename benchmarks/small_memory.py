"""The quickstart in less memory: what each way saves, what it costs in time and in quality.

python benchmarks/small_memory.py OUT [--only NAME …] [--times]

Trains the quickstart (SmolLM2-135M-Instruct into 24 of its layers, float32 on a CPU) once for every
way of `WAYS`, each in a process of its own, and writes `OUT/results.json` after each; what is there
is not done again. Memory is XLA's account of the PromptKD step (arguments and temporaries) and the
most that the process had. Quality is that of the exported student against the plain teacher, on its
own greedy responses to the held-out prompts. With `--times`, for a machine that does nothing else,
PromptKD steps of all ways are timed one after the other, and given as ratios to the first way's.
"""

import argparse
import dataclasses
import importlib.metadata
import itertools
import json
import pathlib
import platform
import statistics
import subprocess
import sys
import time

import jax

from promptkd_jax.data.batches import stream
from promptkd_jax.data.reading.record_stream import read_records
from promptkd_jax.data.rows import Rows, tokenize, with_responses
from promptkd_jax.data.templates import PromptFormat
from promptkd_jax.evaluation.student_metrics import teacher_metrics
from promptkd_jax.inference.generate import generate_responses, with_turn_end
from promptkd_jax.infra import sharding
from promptkd_jax.infra.files import to_path
from promptkd_jax.models.load import load_model
from promptkd_jax.models.model import Model
from promptkd_jax.models.sampling_rules import Sampling
from promptkd_jax.plan import ahead
from promptkd_jax.plan.abstract_run import abstract_run
from promptkd_jax.training.config.checks import read_run
from promptkd_jax.training.prepare import prepare

CONFIG = "--config=configs/quickstart.py"
# Of an adapter, which wants a larger rate: ten times that of the whole student.
ADAPTER = {
    "student.lora.rank": 16,
    "student.lora.alpha": 32.0,
    "stages[0].learning_rate": 3e-3,
    "stages[0].min_lr": 3e-4,
    "stages[1].learning_rate": 5e-4,
}
WAYS = {
    "whole, float32": {},
    "whole, bfloat16 with stochastic rounding": {"student.param_dtype": "bfloat16"},
    "whole, AdamW in 8 bits": {
        "stages[0].optimizer": "adamw_8bit",
        "stages[1].optimizer": "adamw_8bit",
    },
    "LoRA": ADAPTER,
    "whole, int8 teacher": {"teacher.quantize": "int8"},
    "whole, int4 teacher": {"teacher.quantize": "int4"},
    "LoRA, int8 teacher and base": ADAPTER
    | {"teacher.quantize": "int8", "student.quantize": "int8"},
}
CHAT, PROMPT, LENGTH = PromptFormat("chat"), 50, 96
HELD_OUT = "package:quickstart_heldout.jsonl"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def main() -> None:
    """Trains what is missing, and prints the table."""
    options = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {"ways": {}}
    results["versions"] = {name: importlib.metadata.version(name) for name in PACKAGES}
    results["machine"] = f"Python {platform.python_version()}, {platform.machine()}"
    for name, settings in WAYS.items():
        if name in results["ways"] or (options.only and name not in options.only):
            continue
        results["ways"][name] = _measured(name, settings, options.out)
        file.write_text(json.dumps(results, indent=2) + "\n")
    for name in results["ways"] if options.times else ():
        results["ways"][name]["seconds"] = _seconds(WAYS[name], _workdir(options.out, name))
        file.write_text(json.dumps(results, indent=2) + "\n")
    print(_table(results["ways"]))


def _flags(settings: dict) -> list[str]:
    flags = [f"--config.{path}={value}" for path, value in settings.items()]
    return [CONFIG, "--config.data.dev_rows=8", *flags]


def _workdir(out: pathlib.Path, name: str) -> pathlib.Path:
    return out / "".join(x if x.isalnum() else "_" for x in name)


def _mesh() -> jax.sharding.Mesh:
    return sharding.make_mesh(dict.fromkeys(sharding.AXES, 1), jax.devices()[:1])


def _seconds(settings: dict, workdir: pathlib.Path) -> float:
    """Of a PromptKD step of the student that a run began with: the median of three behind one."""
    config = read_run(_flags(settings))
    config = dataclasses.replace(config, stages=config.stages[-1:])
    with jax.set_mesh(mesh := _mesh()):
        experiment = prepare(config, to_path(str(workdir)), mesh)
        (stage,) = experiment.stages
        state, step, each = experiment.start(stage, None), experiment.jitted_step(stage), []
        for batch in itertools.islice(stream(stage.batches, 0), 4):
            begun = time.monotonic()
            inputs = experiment.teacher.params, sharding.place_rows(batch), None
            new = step(state, *inputs, experiment.frozen_student)
            state, _ = jax.block_until_ready(new)
            each.append(time.monotonic() - begun)
    return statistics.median(each[1:])


def _measured(name: str, settings: dict, out: pathlib.Path) -> dict[str, float]:
    flags, workdir = _flags(settings), _workdir(out, name)
    command = [sys.executable, "-m", "promptkd_jax", "train", *flags, f"--workdir={workdir}"]
    subprocess.run(command, check=True)
    program = ahead.compile_step(abstract_run(read_run(flags)).on(_mesh()))
    summary = json.loads((workdir / "summary.json").read_text())
    teacher, rows = _teacher_and_rows()
    student = load_model(str(workdir))
    found = teacher_metrics(
        teacher, student, rows, batch_size=16, length=LENGTH, vocab_size=teacher.vocab_size
    )
    return {
        "step_gb": program.total / 1e9,
        "peak_gb": summary["peak_memory_gb"],
        "kl": found["kl"],
        "agreement": found["agreement"],
    }


def _teacher_and_rows() -> tuple[Model, Rows]:
    """The plain teacher, and its greedy responses to the held-out prompts."""
    teacher = with_turn_end(load_model(read_run([CONFIG]).teacher.path), CHAT)
    rows = tokenize(
        read_records(HELD_OUT),
        teacher.tokenizer,
        CHAT,
        max_prompt_length=PROMPT,
        max_length=LENGTH,
        eos_id=teacher.eos_ids[0],
        vocab_size=teacher.vocab_size,
    )
    responses = generate_responses(
        teacher,
        rows,
        sampling=Sampling(temperature=0.0, eos_ids=teacher.eos_ids),
        prompt_capacity=PROMPT,
        max_new_tokens=LENGTH - PROMPT,
        batch_size=16,
        key=jax.random.key(0),
        vocab_size=teacher.vocab_size,
    )
    return teacher, with_responses(rows, [response.tolist() for response in responses])


def _table(ways: dict[str, dict[str, float]]) -> str:
    lines = [
        "| the quickstart | step, GB | process, GB | time | KL, nats | agreement |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    first = next(iter(ways.values()))
    for name, one in ways.items():
        ratio = f"{one['seconds'] / first['seconds']:.2f}" if "seconds" in one else ""
        lines.append(
            f"| {name} | {one['step_gb']:.2f} | {one['peak_gb']:.2f} | {ratio} | "
            f"{one['kl']:.3f} | {one['agreement']:.3f} |"
        )
    return "\n".join(lines)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--only", nargs="*", choices=WAYS, help="of the ways")
    parser.add_argument("--times", action="store_true", help="time the steps of all ways")
    return parser.parse_args()


if __name__ == "__main__":
    main()
