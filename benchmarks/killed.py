"""Runs that are killed go on bit for bit, whatever is trained, quantised or offloaded.

python benchmarks/killed.py OUT [--devices 8] [--only NUMBER …]

Trains `configs/rehearsal.py` twenty times, so that every two choices of `CHOICES` meet in one of
the runs: by the command line, once to its end, and once with `kill -9` behind a checkpoint and the
same command again. Parameters and metrics of both have to be the same, bit for bit. With
`--devices 8` the runs are those of `ON_EIGHT`, on a mesh of eight virtual devices of the CPU; they
also go on behind the kill on another mesh, where losses have to be the same to rounding.
`OUT/killed.json` has what was found, after each run; what it has is not done again.
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

LORA = {"student.lora.rank": 4}
CHOICES = {
    "student": {
        "float32": {},
        "bfloat16": {"student.param_dtype": "bfloat16"},
        "LoRA": LORA,
        "LoRA of int8": LORA | {"student.quantize": "int8"},
        "LoRA of int4": LORA | {"student.quantize": "int4"},
    },
    "optimizer": {
        name: {"stages[0].optimizer": name} for name in ("adamw", "adamw_8bit", "muon", "adafactor")
    },
    "teacher": {name: {"teacher.quantize": name} for name in ("none", "int8", "int4")},
    "cache": {name: {"student.kv_cache_dtype": name} for name in ("auto", "int8")},
    "frozen layers": {"device": {}, "host": {"teacher.offload": True}},
    "moments": {"device": {}, "host": {"offload_optimizer_state": True}},
    "prompt": {"in front": {}, "behind gates": {"soft_prompt.gated": True}},
}
STEPS, EVERY, KILLED = 8, 2, 4
SETTINGS = {
    "stages[0].steps": STEPS,
    "checkpoint.every": EVERY,
    "checkpoint.keep": STEPS,
    "evaluation.every": EVERY,
    "log_every": 1,
}
ON_EIGHT = (1, 6, 8, 14, 19)  # of the runs: every student, teacher and optimizer
MESH = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
OTHER_MESH = {"mesh.data": 1, "mesh.fsdp": 2, "mesh.tensor": 4}
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
PARTS = (
    "student/model.safetensors",
    "adapter/adapter_model.safetensors",
    "soft_prompt/adapter_model.safetensors",
    "soft_prompt/gated_prompt.safetensors",
)
ROUNDING = 1e-2  # of a loss on another mesh, relative: of rounded numbers, and of rare other tokens


def combinations() -> list[dict[str, str]]:
    """Every student with every optimizer, the other choices so that all pairs are met."""
    others, made = random.Random(1), []
    for i, student in enumerate(CHOICES["student"]):
        for j, name in enumerate(CHOICES["optimizer"]):
            teacher = ("none", "int8", "int4")[(i + j) % 3]
            rest = [others.choice(list(CHOICES[x])) for x in list(CHOICES)[3:]]
            made.append(dict(zip(CHOICES, (student, name, teacher, *rest), strict=True)))
    for one, other in itertools.combinations(CHOICES, 2):
        met = {(each[one], each[other]) for each in made}
        assert len(met) == len(CHOICES[one]) * len(CHOICES[other]), (one, other)
    return made


def settings(combination: dict[str, str]) -> dict:
    """The fields of a config that a combination sets."""
    merged = dict(SETTINGS)
    for choice, name in combination.items():
        merged |= CHOICES[choice][name]
    if "student.lora.rank" in merged and merged.get("teacher.offload"):
        merged["student.offload"] = True  # of its frozen base
    return merged


class Runs:
    """The command line of a combination."""

    def __init__(self, fields: dict, devices: int):
        flags = [f"--config.{path}={value}" for path, value in fields.items()]
        command = [sys.executable, "-m", "promptkd_jax", "train", "--config=configs/rehearsal.py"]
        self._command, self._environment = [*command, *flags], dict(os.environ)
        self._environment["JAX_NUM_CPU_DEVICES"] = str(devices)

    def start(self, workdir: pathlib.Path, mesh: dict) -> subprocess.Popen:
        """A process that trains, or goes on; what it says goes to a file beside the workdir."""
        flags = [f"--config.{path}={value}" for path, value in mesh.items()]
        with workdir.with_suffix(".log").open("a") as log:
            return subprocess.Popen(
                [*self._command, *flags, f"--workdir={workdir}"],
                env=self._environment,
                stdout=log,
                stderr=log,
            )

    def finish(self, workdir: pathlib.Path, mesh: dict) -> None:
        """Trains, or goes on, to the end."""
        if code := self.start(workdir, mesh).wait():
            raise SystemExit(f"{workdir}: exit status {code}; see {workdir.with_suffix('.log')}")

    def kill(self, workdir: pathlib.Path, mesh: dict) -> int:
        """Trains until it is killed behind a checkpoint; the number of updates that were made."""
        process = self.start(workdir, mesh)
        while not (workdir / "checkpoints" / str(KILLED)).exists():
            if process.poll() is not None:
                raise SystemExit(f"{workdir}: ended; see {workdir.with_suffix('.log')}")
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (workdir / "summary.json").exists(), f"{workdir}: ended before it was killed"
        return len(_losses(workdir))


def _metrics(workdir: pathlib.Path) -> list[dict]:
    """All that was measured, but times."""
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{name: x for name, x in row.items() if "second" not in name} for row in rows]


def _losses(workdir: pathlib.Path) -> list[float]:
    return [row["student_loss"] for row in _metrics(workdir) if "student_loss" in row]


def same_runs(one: pathlib.Path, other: pathlib.Path) -> None:
    """All parameters and metrics, bit for bit."""
    found = [part for part in PARTS if (one / part).exists()]
    assert PARTS[0] in found, one
    assert found == [part for part in PARTS if (other / part).exists()], (one, other)
    for part in found:
        assert (one / part).read_bytes() == (other / part).read_bytes(), (other, part)
    assert _metrics(one) == _metrics(other), other


def tried(combination: dict[str, str], folder: pathlib.Path, devices: int) -> dict:
    """The runs of one combination; what was found of them."""
    runs, mesh = Runs(settings(combination), devices), MESH if devices > 1 else {}
    whole, killed, elsewhere = (folder / name for name in ("whole", "killed", "elsewhere"))
    shutil.rmtree(folder, ignore_errors=True)  # of a try that was stopped
    folder.mkdir(parents=True)
    runs.finish(whole, mesh)
    found = combination | {"killed behind update": runs.kill(killed, mesh)}
    if devices > 1:
        shutil.copytree(killed, elsewhere)
        runs.finish(elsewhere, OTHER_MESH)
        pairs = zip(_losses(elsewhere), _losses(whole), strict=True)
        most = max(abs(x / y - 1) for x, y in pairs)
        assert most < ROUNDING, (combination, most)
        found["most of a loss on another mesh"] = most
    runs.finish(killed, mesh)
    same_runs(whole, killed)
    shutil.rmtree(folder)
    return found


def main() -> None:
    """Tries what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--devices", type=int, default=1, choices=(1, 8))
    parser.add_argument("--only", type=int, nargs="*", help="of the combinations, from 0")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "killed.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    results["versions"] = {name: importlib.metadata.version(name) for name in PACKAGES}
    same = results.setdefault(f"{options.devices} devices, bit for bit", {})
    file.write_text(json.dumps(results, indent=2) + "\n")
    wanted = options.only or (range(20) if options.devices == 1 else ON_EIGHT)
    for number in wanted:
        if str(number) not in same:
            folder = options.out / f"{options.devices}-{number}"
            same[str(number)] = tried(combinations()[number], folder, options.devices)
            file.write_text(json.dumps(results, indent=2) + "\n")
            print(number, same[str(number)], flush=True)


if __name__ == "__main__":
    main()
