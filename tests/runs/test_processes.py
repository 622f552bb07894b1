"""Two real processes are one run: the same numbers, through kills and signals, and one voice."""

import contextlib
import json
import pathlib
import platform
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import environment
from helpers import tiny
from safetensors.numpy import load_file

from promptkd_jax.cli.main import main
from promptkd_jax.training import run
from promptkd_jax.training.config.checks import checked
from promptkd_jax.training.recipes import method_stage

TESTS = pathlib.Path(__file__).parents[1]
STEPS = 8
RUNS = ("one", "two")
HANGS = 900  # seconds that nothing takes, on however busy a machine
HEARTBEAT = 5  # seconds until a process that was killed is missed


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """Models, data, a config file, and the run of one process in `one`."""
    folder = tmp_path_factory.mktemp("processes")
    config = tiny.short_config(folder / "data")  # 275 tokens, which `tensor` = 2 does not divide
    config.evaluation.update(every=0)
    config.checkpoint.export = "last"
    # Adam makes a gradient that is 0 but for rounding as large as any. At 1e-3 that comes to 9e-4
    # of a loss in these steps, on some CPUs; at 1e-4 to 1e-6, where an update is worth 4e-4.
    config.stages = (
        method_stage(
            "promptkd", steps=STEPS, batch_size=4, gradient_accumulation_steps=2, learning_rate=1e-4
        ),
    )
    run.run(checked(config), folder / "one")
    return folder


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def training(folder, workdir, *arguments) -> list:
    """The words of `promptkd train` behind the interpreter."""
    config = folder / "one" / "config.json"
    return [
        TESTS / "helpers" / "one_process.py",
        *(f"--config={config}", f"--workdir={folder / workdir}", *arguments),
    ]


def alone(*words) -> subprocess.CompletedProcess:
    how = dict(env=environment(), capture_output=True, text=True)
    return subprocess.run([sys.executable, *words], **how)


@contextlib.contextmanager
def two_processes(*words, each=((), ()), **variables):
    """Starts them, yields both, and leaves none behind."""
    port, running = free_port(), []
    for number in (0, 1):
        flags = (
            *(f"--coordinator=localhost:{port}", "--processes=2", f"--process={number}"),
            *each[number],
        )
        running.append(
            subprocess.Popen(
                [sys.executable, *words, *flags],
                env=environment(**variables),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        yield running
    finally:
        for one in running:
            one.kill()
            one.wait()


def ends(running, timeout=HANGS):
    """[(exit status, stdout, stderr)] of all."""
    return [(one.wait(timeout), one.stdout.read(), one.stderr.read()) for one in running]


def wait_for(found, what: str, running, timeout=HANGS):
    end = time.monotonic() + timeout
    while not found():
        gone = [one.stderr.read() for one in running if one.poll() is not None]
        assert not gone and time.monotonic() < end, (what, gone)
        time.sleep(0.1)


def metrics(folder, workdir) -> dict[int, dict]:
    lines = (folder / workdir / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row for row in map(json.loads, lines)}


def saved(folder, workdir) -> list[int]:
    names = [path.name for path in (folder / workdir / "checkpoints").iterdir()]
    return sorted(int(name) for name in names if name.isdigit())


def same_losses(folder, workdir):
    expected, found = metrics(folder, "one"), metrics(folder, workdir)
    assert list(found) == list(expected) == list(range(1, STEPS + 1))
    for step, right in expected.items():
        for name in ("kl_prompted", "prompt_loss", "student_loss"):
            assert found[step][name] == pytest.approx(right[name], rel=1e-5), (step, name)


def killed_while_saving(folder, workdir, victim: int, step: int, *arguments):
    """Kills a process in the middle of the asynchronous save of `step`; the other must end too."""
    paused = folder / workdir / "checkpoints" / "paused"
    paused.unlink(missing_ok=True)
    words = training(folder, workdir, f"--heartbeat={HEARTBEAT}", *arguments)
    with two_processes(*words, PAUSE_AT=str(step)) as running:
        wait_for(paused.exists, f"the save of step {step}", running)
        running[victim].send_signal(signal.SIGKILL)
        survivor = running[1 - victim]
        status, _, stderr = ends([survivor], timeout=HEARTBEAT + HANGS)[0]
    assert status != 0
    assert "another task died" in stderr or "heartbeat" in stderr.lower(), stderr[-2000:]
    assert saved(folder, workdir)[-1] == step - 1


def test_one_run_through_kills_signals_and_other_meshes(folder):
    """Two processes, cut along fsdp, data and tensor in turn; at last one alone. Every loss is that
    of the run that one process made without a stop."""
    killed_while_saving(folder, "two", 1, 3, "--config.mesh.data=1", "--config.mesh.fsdp=2")
    killed_while_saving(folder, "two", 0, 5, "--config.mesh.data=2")
    tensor = ("--config.mesh.data=1", "--config.mesh.tensor=2")
    with two_processes(*training(folder, "two", *tensor), STEP_SECONDS="0.5") as running:
        wait_for(lambda: saved(folder, "two")[-1] >= 5, "the save of step 5", running)
        running[1].send_signal(signal.SIGTERM)
        (status, stdout, stderr), other = ends(running)
        assert (status, other[0]) == (143, 143), (stderr, other[2])
        assert "promptkd: SIGTERM: stopping" in other[2]
    stopped = saved(folder, "two")[-1]
    assert 5 <= stopped < STEPS
    assert f"stopped after step {stopped} and saved" in stdout
    assert other[1] == ""  # the first speaks for both
    assert "nobody listens" not in stderr + other[2]
    done = alone(*training(folder, "two"))
    assert done.returncode == 0, done.stderr
    assert f"continuing from step {stopped}" in done.stdout
    same_losses(folder, "two")
    ours, theirs = (load_file(folder / run / "student" / "model.safetensors") for run in RUNS)
    assert ours.keys() == theirs.keys()
    for name in ours:  # each of the steps moves a parameter by about 1e-3
        assert np.abs(ours[name] - theirs[name]).mean() < 2e-4, name


def test_different_configs_are_refused_by_both(folder):
    each = ((), ("--config.seed=11",))
    with two_processes(*training(folder, "different"), each=each) as running:
        for status, _, stderr in ends(running):
            assert status == 1
            assert "the config of process 1 is not that of process 0" in stderr, stderr
    assert not (folder / "different").exists()


@pytest.mark.parametrize("who", [0, 1])
def test_what_fails_on_one_is_said_by_both(folder, who):
    """One cannot read its data, while the other already waits for it."""
    with two_processes(*training(folder, f"failing{who}"), FAIL_ON=str(who)) as running:
        found = ends(running)
    (failed, _, own), (other, _, heard) = found[who], found[1 - who]
    assert failed == other == 1, (own, heard)
    assert own.endswith("promptkd train: there is no such file\n")
    assert f"process {who} on {platform.node()}: promptkd train: there is no such file" in heard


@pytest.mark.parametrize("who, number", [(1, signal.SIGTERM), (0, signal.SIGINT)])
def test_a_signal_to_one_outside_of_steps_ends_both(folder, who, number, tmp_path):
    """One reads data, without end, and the other waits for it."""
    hanging = tmp_path / "hanging"
    with two_processes(*training(folder, tmp_path / "run"), HANG_IN=str(hanging)) as running:
        wait_for(hanging.exists, "the data", running)
        running[who].send_signal(number)
        found = ends(running)
    assert [status for status, _, _ in found] == [128 + number] * 2, found
    assert f"promptkd: {number.name}: stopping (a second one ends at once)" in found[who][2]
    told = f"process {who} on {platform.node()}: stopped by {number.name}; the same command"
    assert told in found[1 - who][2]


def test_a_coordinator_that_is_not_there(folder):
    flags = ("--coordinator=localhost:1", "--processes=2", "--process=1", "--start-timeout=4")
    done = alone(*training(folder, "alone", *flags))
    assert done.returncode == 1
    assert "no process answers at localhost:1 within 4 s" in done.stderr
    assert not (folder / "alone").exists()


def test_flags_that_do_not_say_who_this_is(folder):
    with pytest.raises(SystemExit, match="give all three or none"):
        main(["train", *training(folder, "flags", "--processes=2")[1:]])


def test_an_evaluation_of_two_is_that_of_one(folder):
    """Each does its rows, of models that are cut; the first writes."""

    def arguments(output):
        return [
            *(f"--model={folder / 'one' / 'student'}", f"--data={folder / 'data' / 'dev.jsonl'}"),
            *("--template=plain", "--max-prompt-length=16", "--max-length=24", "--seeds=1"),
            *("--batch-size=3", f"--output={folder / output}"),
        ]

    main(["evaluate", *arguments("alone"), "--mesh=1,1,1"])
    words = ["-m", "promptkd_jax", "evaluate", *arguments("both"), "--mesh=1,2,1"]
    with two_processes(*words) as running:
        for status, _, stderr in ends(running):
            assert status == 0, stderr
    for name in ("evaluation.json", "student/dev/seed1.jsonl"):
        assert (folder / "both" / name).read_text() == (folder / "alone" / name).read_text()


ON_SLURM = """
import argparse, os, jax
from promptkd_jax.cli import flags
from promptkd_jax.infra import distributed
parser = argparse.ArgumentParser()
flags.add_processes(parser)
with distributed.session(parser.parse_args([])):
    place = {"from": jax.process_index(), "of": jax.process_count()}
    told = distributed.run_on_primary(lambda: place)
    distributed.assert_same("what process 0 says", str(told))
    print(told)
"""


def test_the_tasks_of_a_slurm_step_find_each_other():
    """As `srun --ntasks=2` sets the environment; no flag says anything."""
    job = str(free_port() + 1)  # JAX makes the port of it
    step = {"SLURM_JOB_ID": job, "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    tasks = [
        subprocess.Popen(
            [sys.executable, "-c", ON_SLURM],
            env=environment(**step, SLURM_PROCID=task, SLURM_LOCALID=task),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for task in ("0", "1")
    ]
    first, second = ends(tasks)
    assert first[0] == second[0] == 0, (first[2], second[2])
    assert "{'from': 0, 'of': 2}" in first[1] and second[1] == ""
