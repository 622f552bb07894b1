"""SIGTERM while a command answers, writes the teacher's responses or a cache: what was written is
kept, the status is 143, and the same command goes on to what it would have written at once."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from conftest import environment
from helpers import tiny

from promptkd_jax.cli.main import main
from promptkd_jax.training.config.config_file import as_json

ROWS = 400  # in batches of 4, so that a signal comes amid them


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("stopped")
    config = tiny.short_config(folder / "data")
    tiny.write_data(folder / "data" / "train.jsonl", ROWS)
    config.stages = config.stages[:1]
    config.evaluation.every = 0
    (folder / "config.json").write_text(json.dumps({"config": as_json(config)}))
    return folder


def evaluate(folder, output) -> list[str]:
    lengths = ["--template=plain", "--max-prompt-length=16", "--max-length=24", "--batch-size=4"]
    data = folder / "data"
    models = [f"--model={data / 'student'}", f"--data={data / 'train.jsonl'}", "--seeds=1"]
    return ["evaluate", *models, f"--output={output}", *lengths]


def train(folder, output) -> list[str]:
    return ["train", f"--config={folder / 'config.json'}", f"--workdir={output}"]


def cache(folder, output) -> list[str]:
    how = [f"--config={folder / 'config.json'}", f"--output={output}", "--batch-size=4"]
    return ["cache", *how, "--top-k=8"]


def lines(file: str):
    def written(output: pathlib.Path) -> int:
        return (output / file).read_bytes().count(b"\n") if (output / file).exists() else 0

    return written


def rows_written(output: pathlib.Path) -> int:
    manifest = output / "manifest.json"
    return json.loads(manifest.read_text())["rows_written"] if manifest.exists() else 0


def start(arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "promptkd_jax", *arguments],
        env=environment(PYTHONUNBUFFERED="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "written", "result"),
    [
        (evaluate, lines("student/train/seed1.unfinished.jsonl"), "student/train/seed1.json"),
        (train, lines("teacher_answers.jsonl"), "teacher_answers.jsonl"),
        (cache, rows_written, "log_probs.npy"),
    ],
    ids=["evaluate", "teacher_responses", "cache"],
)
def test_what_is_stopped_goes_on(folder, tmp_path, capsys, command, written, result):
    """Only what is stopped has a process of its own."""
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    process = start(command(folder, stopped))
    while not written(stopped) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate()
    assert process.returncode == 143, output
    assert "SIGTERM: stopping" in output
    kept = written(stopped)
    assert 0 < kept < ROWS
    main(command(folder, stopped))
    if command is not cache:
        assert f"writes {ROWS - kept // 4 * 4} responses" in capsys.readouterr().out
    main(command(folder, whole))
    assert (stopped / result).read_bytes() == (whole / result).read_bytes()
