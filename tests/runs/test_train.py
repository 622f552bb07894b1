"""Whole runs of tiny models: what comes out, and what happens when something goes wrong."""

import dataclasses
import datetime
import json
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import environment
from helpers import tiny
from helpers.records import example
from safetensors.numpy import load_file
from tokenizers import Regex, Tokenizer, pre_tokenizers

from promptkd_jax.cli.main import main
from promptkd_jax.infra import errors, sharding, signals
from promptkd_jax.infra.errors import CheckpointError, ConfigError, DataError, ModelError
from promptkd_jax.infra.metrics import read_metrics
from promptkd_jax.models.io.gguf_tokenizer import LLAMA3_WORDS
from promptkd_jax.models.io.peft import load_soft_prompt
from promptkd_jax.models.load import load_model
from promptkd_jax.plan.remat import with_chosen_remat
from promptkd_jax.training import experiment, loop, prepare, run_data
from promptkd_jax.training import run as training
from promptkd_jax.training.config.checks import checked
from promptkd_jax.training.config.config_file import claim
from promptkd_jax.training.recipes import method_stage, stage_config

pytestmark = pytest.mark.usefixtures("no_report")  # but of `finished`, which is made before

CONFIG = """
import pathlib, sys
sys.path.insert(0, {tests!r})
from helpers import tiny

def get_config():
    return tiny.short_config(pathlib.Path({models!r}))
"""


def run(config, workdir):
    """A run in this process, as `promptkd train` makes it."""
    return training.run(checked(config), workdir, with_chosen_remat)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("run") / "models"
    tiny.short_config(folder)
    return folder


@pytest.fixture
def config(models):
    return tiny.short_config(models)


@pytest.fixture(scope="module")
def finished(models) -> pathlib.Path:
    """A run that nothing disturbed."""
    workdir = models.parent / "finished"
    run(tiny.short_config(models), workdir)
    return workdir


def write_config(models: pathlib.Path) -> pathlib.Path:
    file = models.parent / "config.py"
    file.write_text(CONFIG.format(tests=str(pathlib.Path(__file__).parents[1]), models=str(models)))
    return file


def start(models: pathlib.Path, workdir: pathlib.Path, *overrides: str) -> subprocess.Popen:
    """The same run as `finished`, by the command line in a process of its own."""
    command = [sys.executable, "-m", "promptkd_jax", "train", f"--config={write_config(models)}"]
    return subprocess.Popen(
        [*command, f"--workdir={workdir}", *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(PYTHONUNBUFFERED="1"),
    )


def wait_for(process: subprocess.Popen, reached: Callable[[], bool]) -> None:
    """Until `reached`; fails if the run ends before."""
    while not reached():
        if process.poll() is not None:
            pytest.fail(f"the run ended too early: {process.stdout.read()}")
        time.sleep(0.01)


def student(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    return load_file(workdir / "student" / "model.safetensors")


def assert_same_student(one: pathlib.Path, other: pathlib.Path) -> None:
    ours, theirs = student(one), student(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    np.testing.assert_array_equal(
        load_soft_prompt(one / "soft_prompt"), load_soft_prompt(other / "soft_prompt")
    )


def test_a_run_leaves_what_it_promises(finished, models):
    summary = json.loads((finished / "summary.json").read_text())
    for metric in ("kl", "agreement", "rougeL"):
        assert {f"{metric}_before", f"{metric}_after"} <= summary.keys()
    assert summary["kl_after"] < summary["kl_before"]
    assert summary["updates"] == 7 and summary["updates_skipped"] == 0
    assert summary["peak_memory_gb"] > 0 and summary["seconds"] > 0
    page = (finished / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "train, row 0 (from 0)" in page and "train, by the teacher: response" in page
    assert "dev: 5 of 5 prompts are in the training data" in page
    assert "prompted teacher; 4 steps of 4 rows" in page and "Stage 2" in page
    card = (finished / "student" / "README.md").read_text()
    assert "# tiny\n" in card and "reverse_kl" in card and "- Training data: train\n" in card
    assert "- Teacher: models/teacher\n" in card and "- Started from: models/student\n" in card
    assert str(models.parent) not in card  # which means nothing to whoever reads it
    model = load_model(str(finished / "student"))
    assert model.eos_ids == (0,) and model.tokenizer is not None
    assert load_soft_prompt(finished / "soft_prompt").shape == (7, 32)


def test_every_update_is_logged_once_with_its_stage(finished):
    rows = read_metrics(finished)
    updates = [row for row in rows if "student_loss" in row]
    assert [row["step"] for row in updates] == [1, 2, 3, 4, 5, 6, 7]
    assert [row["stage"] for row in updates] == ["warmup"] * 3 + ["promptkd"] * 4
    assert all({"kl_plain", "agreement"} <= row.keys() for row in updates[:3])
    assert [row["step"] for row in updates if "tokens_per_second" in row] == [2, 3, 5, 6, 7]
    prompted = {
        "kl_plain",
        "kl_prompted",
        "prompt_norm",
        "prompt_loss",
        "eos_rate",
        "response_length",
    }
    assert all(prompted <= row.keys() for row in updates[3:])
    assert [row["regularization_weight"] for row in updates[3:]] == [0.75, 0.5, 0.25, 0.0]
    assert [row["step"] for row in rows if "dev/rougeL" in row] == [2, 4, 6, 7]


def test_data_that_is_not_there_is_told_before_anything_is_estimated(config, tmp_path):
    config.data.train = "absent.jsonl"
    with pytest.raises(DataError, match=r"^absent.jsonl: no such file"):
        training.run(checked(config), tmp_path, lambda *_: pytest.fail("it estimates first"))


def test_a_finished_run_does_nothing(finished, config, capsys):
    before = {file: file.stat().st_mtime_ns for file in finished.rglob("*")}
    assert run(config, finished) == json.loads((finished / "summary.json").read_text())
    assert "finished" in capsys.readouterr().out
    assert before == {file: file.stat().st_mtime_ns for file in finished.rglob("*")}


@pytest.mark.slow
def test_one_run_through_a_signal_and_a_kill_bit_for_bit(models, finished, tmp_path):
    """SIGTERM in the first stage, `kill -9` in the second; the same command continues."""
    process = start(models, tmp_path, "--config.checkpoint.every=1000")
    metrics = tmp_path / "metrics.jsonl"
    wait_for(process, lambda: metrics.exists() and read_metrics(tmp_path))
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate()
    assert process.returncode == 143, output
    assert "SIGTERM: stopping" in output
    # On a busy machine the signal may come when the stage has just ended, and is saved.
    assert list((tmp_path / "checkpoints").glob("[1-9]*")), output
    process = start(models, tmp_path)
    wait_for(process, (tmp_path / "checkpoints" / "5").exists)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "summary.json").exists()
    process = start(models, tmp_path)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert "continuing from step" in output
    assert_same_student(finished, tmp_path)
    updates = [row["step"] for row in read_metrics(tmp_path) if "student_loss" in row]
    assert updates == [1, 2, 3, 4, 5, 6, 7]


def test_a_run_that_was_stopped_amid_an_evaluation_goes_on_with_it(
    config, finished, tmp_path, monkeypatch
):
    """What is evaluated is safe before, and no evaluation is missing or made twice."""
    calls = iter(range(1, 100))

    def assess(*arguments):
        if next(calls) == 2:
            raise signals.Stopped(signal.SIGTERM)
        return whole(*arguments)

    whole = loop.evaluate_student
    monkeypatch.setattr(loop, "evaluate_student", assess)
    config.checkpoint.every = 1000
    with pytest.raises(signals.Stopped):
        run(config, tmp_path)
    assert (tmp_path / "checkpoints" / "4").exists()
    run(config, tmp_path)
    assert_same_student(finished, tmp_path)
    scores = [
        [row for row in read_metrics(run) if "dev/loss" in row] for run in (finished, tmp_path)
    ]
    assert [row["step"] for row in scores[1]] == [2, 4, 6, 7]
    assert scores[0] == scores[1]
    assert next(calls) == 6  # 2, 4 (stopped), 4, 6, 7


def test_a_checkpoint_is_due_by_time_too(config, finished, tmp_path, monkeypatch):
    config.checkpoint.update(every=1000, minutes=1e-9, keep=10)
    config.evaluation.every, config.log_every = 0, 5
    run(config, tmp_path)
    assert {int(x.name) for x in (tmp_path / "checkpoints").glob("[0-9]*")} == {*range(1, 8)}


def test_a_student_that_was_removed_is_written_again(config, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "student")
    run(config, tmp_path / "run")
    assert "continuing from step 7" in capsys.readouterr().out
    assert_same_student(finished, tmp_path / "run")


def test_a_run_without_a_single_update_is_no_success(config, tmp_path, monkeypatch):
    config.stages = config.stages[1:]
    config.stages[0].steps = 2
    step = experiment.train_step

    def broken(state, *arguments, **named):
        params = jax.tree.map(lambda x: x * jnp.nan, state.params)
        kept, metrics = step(state.replace(params=params), *arguments, **named)
        return kept.replace(params=state.params), metrics

    monkeypatch.setattr(experiment, "train_step", broken)
    with pytest.raises(
        errors.TrainingError, match="stage promptkd: no update took place: .* in all 2 steps"
    ):
        run(config, tmp_path)
    assert not (tmp_path / "summary.json").exists()


def test_a_student_that_is_broken_before_is_named(config, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "evaluate_student", lambda experiment: {"loss": float("nan")})
    with pytest.raises(errors.TrainingError, match="student: its loss .* is nan before training"):
        run(config, tmp_path)
    assert not (tmp_path / "before.json").exists()


def test_a_damaged_checkpoint_is_passed_over(config, finished, tmp_path, capsys):
    config.checkpoint.keep = 3
    run(config, tmp_path)
    (tmp_path / "summary.json").unlink()
    newest = max((tmp_path / "checkpoints").glob("[0-9]*"), key=lambda folder: int(folder.name))
    largest = max(newest.rglob("*"), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-10])
    run(config, tmp_path)
    output = capsys.readouterr().out
    assert "checkpoint 7 is damaged" in output and "continuing from 6" in output
    assert_same_student(finished, tmp_path)


@pytest.mark.parametrize(
    "path, change",
    [
        ("train.jsonl", lambda text: text.replace(b"the red", b"the sky")),
        ("dev.jsonl", lambda text: text.replace(b"the red", b"the sky")),
        ("teacher", lambda weights: weights[:-1] + bytes([weights[-1] ^ 1])),
        ("student", lambda weights: weights[:-1] + bytes([weights[-1] ^ 1])),
    ],
)
def test_a_folder_belongs_to_one_set_of_inputs(models, finished, tmp_path, path, change):
    """What stands under a path may change while a run is stopped: it is known by its content."""
    shutil.copytree(models, tmp_path / "models")
    config, run = tiny.short_config(tmp_path / "models"), tmp_path / "run"
    config.stages = config.stages[1:]
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        prepare.prepare(checked(config), run, mesh)
        file = tmp_path / "models" / path
        file = file / "model.safetensors" if file.is_dir() else file
        content = file.read_bytes()
        file.write_bytes(change(content))
        with pytest.raises(DataError, match=rf"inputs were others.*\n  .*{path} \(config.*there '"):
            prepare.prepare(checked(config), run, mesh)
        file.write_bytes(content)
        prepare.prepare(checked(config), run, mesh)


CLOCK = "{{ strftime_now('%d %b %Y') }} {{ messages[0]['content'] }} >"


def test_a_template_is_shown_the_day_on_which_the_run_began(config, tmp_path, monkeypatch):
    days = iter(["2026-11-27", "2026-11-28"])

    class Clock(datetime.date):
        @classmethod
        def today(cls):
            return cls.fromisoformat(next(days))

    monkeypatch.setattr(prepare, "date", Clock)
    dated = [prepare.with_date(checked(config), tmp_path) for _ in range(2)]
    assert [one.data.date for one in dated] == ["2026-11-27"] * 2
    config.data.date = "2020-01-01"
    assert prepare.with_date(checked(config), tmp_path).data.date == "2020-01-01"
    assert next(days) == "2026-11-28"  # nobody has asked for it
    model = load_model(config.student.path)
    words = model.tokenizer
    words.chat_template = CLOCK
    rows = run_data.tokenized(dated[1], model, "some", [example("say red", "", ())])
    assert rows.date == ""  # the template "plain" shows none
    chat = dataclasses.replace(dated[1].data, template="chat")
    rows = run_data.tokenized(
        dataclasses.replace(dated[1], data=chat), model, "some", [example("say red", "", ())]
    )
    assert (words.decode(rows.tokens[0]), rows.date) == ("27 Nov 2026 say red >", "2026-11-27")


def test_a_folder_belongs_to_one_config(finished, config):
    config.stages[1].learning_rate = 2e-3
    with pytest.raises(
        ConfigError, match=r"config.stages\[1\].learning_rate: there 0.001, now 0.002"
    ):
        run(config, finished)
    assert (finished / "summary.json").exists()


def test_checkpoints_of_another_run_are_refused(finished, config, tmp_path):
    shutil.copytree(finished / "checkpoints", tmp_path / "checkpoints")
    config.seed = 11
    with pytest.raises(CheckpointError, match="of a run with another config"):
        run(config, tmp_path)


def test_the_command_line_says_what_is_wrong(models, tmp_path, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help"])
    assert "--workdir DIR" in capsys.readouterr().out
    file = write_config(models)
    for arguments, message in (
        ([f"--config={file}", "--confg.seed=1"], "unknown arguments: --confg.seed=1"),
        ([f"--config={file}", "--config.sed=1"], "did you mean seed"),
        (["--config=nowhere.py"], "no Python file 'nowhere.py'"),
    ):
        with pytest.raises(SystemExit, match=re.escape(message)):
            main(["train", *arguments, f"--workdir={tmp_path}"])
    assert not list(tmp_path.iterdir())


def test_what_does_not_change_the_student_may_change(finished, config):
    config.checkpoint.keep = 5
    config.log_every = 3
    run(config, finished)


def test_updates_that_are_not_finite_stop_the_run(config, tmp_path):
    config.stages[0].learning_rate = 1e30
    config.stages[0].max_grad_norm = 1e30
    config.stop_after_skipped = 2
    config.stages[0].steps = 8
    config.evaluation.every = 0
    with pytest.raises(errors.TrainingError, match="not finite in 2 updates in a row"):
        run(config, tmp_path)


def test_all_mistakes_of_a_config_at_once(config):
    config.data.max_prompt_length = 24
    config.stages[0].batch_size = 0
    config.stages[1].student_terms = (("revers_kl", 1.0),)
    config.preset = "fast"
    with pytest.raises(ConfigError) as error:
        checked(config)
    for part in ("stages[0].batch_size", "revers_kl", "config.preset: 'fast'"):
        assert part in str(error.value), error.value


def test_contradictions_of_a_config_at_once(config):
    config.data.max_prompt_length = 24
    config.stages[0].gradient_accumulation_steps = 3
    config.stages[1].epochs = 1.0
    config.stages[1].name = "warmup"
    config.student.layers = 2
    with pytest.raises(ConfigError) as error:
        checked(config)
    assert len(str(error.value).splitlines()) == 5, error.value


def test_different_tokenizers_are_refused(config, tmp_path):
    config.student.path = tiny.write_model(
        tmp_path / "other", width=16, depth=2, seed=2, extra=("Ġpurple",)
    )
    with pytest.raises(ModelError, match="different tokenizers"):
        run(config, tmp_path / "run")


def test_a_run_says_how_its_student_is_asked(finished, config, tmp_path):
    said = json.loads((finished / "student" / "promptkd.json").read_text())
    assert said.pop("chat_template_kwargs") == list(config.data.chat_template_kwargs) == []
    assert said.items() <= config.data.to_dict().items()
    how = {"template": "plain", "system": "", "add_bos": "auto"}
    lengths = {"max_prompt_length": 16, "max_length": 24, "long_prompts": "drop"}
    assert said == how | lengths


def test_the_folder_of_a_run_is_a_model(finished, config, tmp_path, capsys):
    """That of its student; also as the teacher of another, and one without a student says so."""
    request = ["--request=say red", "--max-new-tokens=4"]
    answers = []
    for path in (finished, finished / "student"):
        main(["generate", f"--model={path}", *request])
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
    (tmp_path / "checkpoints").mkdir()
    claim(tmp_path, config)
    with pytest.raises(SystemExit, match="a run that has written no student yet.*promptkd export"):
        main(["generate", f"--model={tmp_path}", *request])
    main(["init", f"--teacher={finished}", "--layers=1", f"--output={tmp_path / 'new'}"])
    name = "model.layers.0.mlp.up_proj.weight"
    first = load_file(tmp_path / "new" / "model.safetensors")[name]
    np.testing.assert_array_equal(first, student(finished)[name])


def raise_import_error(scheme: str):
    raise ImportError(scheme)


def test_a_moved_run_is_exported_without_what_it_began_with(config, tmp_path, monkeypatch):
    """Neither data, nor teacher, nor the initial student are there any more; the teacher has
    learned, and the student is made of its layers."""
    began = tmp_path / "began"
    tiny.short_config(began)
    for role in ("teacher", "student"):
        config[role].path = str(began / role)
    config.data.update(train=str(began / "train.jsonl"), dev=str(began / "dev.jsonl"))
    config.student.update(path="", layers=2)
    prompted = method_stage("promptkd", steps=1, batch_size=4, learning_rate=1e-3)
    online = stage_config("online", steps=1, batch_size=4, learning_rate=1e-3)
    online.update(teacher_view="online", student_terms=(("reverse_kl", 1.0),))
    config.stages = (prompted, online)
    run(config, tmp_path / "run")
    shutil.rmtree(began)
    moved = (tmp_path / "run").rename(tmp_path / "elsewhere")
    main(["export", f"--workdir={moved}", f"--output={tmp_path / 'out'}"])
    assert_same_student(moved, tmp_path / "out")
    for file in sorted(f.relative_to(moved) for f in moved.glob("student/*")):
        assert (tmp_path / "out" / file).exists(), file
    learned = load_file(tmp_path / "out" / "teacher" / "model.safetensors")
    for name, array in load_file(moved / "teacher" / "model.safetensors").items():
        np.testing.assert_array_equal(learned[name], array, err_msg=name)
    main(["export", f"--workdir={moved}", f"--output={tmp_path / 'half'}", "--dtype=bfloat16"])
    for role in ("student", "teacher"):
        half = load_file(tmp_path / "half" / role / "model.safetensors")
        for name, array in load_file(moved / role / "model.safetensors").items():
            np.testing.assert_array_equal(half[name], array.astype(jnp.bfloat16), err_msg=name)
            assert half[name].dtype == jnp.bfloat16 != array.dtype
        written = json.loads((tmp_path / "half" / role / "config.json").read_text())
        assert written["dtype"] == "bfloat16"
    adapter = "soft_prompt/adapter_config.json"
    assert (tmp_path / "out" / adapter).read_text() == (moved / adapter).read_text()
    exported, there = (load_model(str(path)) for path in (tmp_path / "out" / "student", moved))
    assert exported.eos_ids == there.eos_ids
    assert exported.tokenizer("say red").input_ids == there.tokenizer("say red").input_ids
    saved = json.loads((moved / "config.json").read_text())
    saved["config"]["data"]["train"] = "gs://pail/train.jsonl"
    (moved / "config.json").write_text(json.dumps(saved))
    with monkeypatch.context() as patch:  # a machine without the packages for buckets
        patch.setattr("promptkd_jax.infra.files.fsspec.get_filesystem_class", raise_import_error)
        main(["export", f"--workdir={moved}", f"--output={tmp_path / 'again'}"])
    assert_same_student(tmp_path / "again", tmp_path / "out")
    shutil.rmtree(moved / "configs")
    with pytest.raises(
        SystemExit, match="configs/student: no such folder: the run has not begun to train"
    ):
        main(["export", f"--workdir={moved}", f"--output={tmp_path / 'out'}"])


def test_the_best_checkpoint_can_be_exported(finished, tmp_path, capsys):
    main(["export", f"--workdir={finished}", "--step=last", f"--output={tmp_path}"])
    assert_same_student(finished, tmp_path)
    main(["export", f"--workdir={finished}", "--step=best", f"--output={tmp_path / 'best'}"])
    assert "step" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="holds checkpoints"):
        main(["export", f"--workdir={finished}", "--step=3", f"--output={tmp_path / 'three'}"])


def test_an_export_names_the_folder_that_cannot_be_used(finished, tmp_path):
    copy, file = tmp_path / "copy", tmp_path / "file"
    shutil.copytree(finished, copy)
    file.touch()
    with pytest.raises(SystemExit, match=f"export: --output {file}/out: .*Not a directory"):
        main(["export", f"--workdir={copy}", f"--output={file / 'out'}"])
    unreadable = copy / "configs" / "student" / "config.json"
    unreadable.unlink()
    unreadable.mkdir()
    with pytest.raises(SystemExit, match=f"export: --workdir {copy}: .*Is a directory"):
        main(["export", f"--workdir={copy}", f"--output={tmp_path / 'out'}"])


@pytest.mark.parametrize(
    "changes, doubts",
    [
        ({}, []),
        ({"stages": [{"warmup_steps": 12}, {"warmup_steps": 8}]}, ["stages[0].warmup_steps: 12"]),
        ({"evaluation": {"every": 7}}, ["evaluation.every: 7"]),
        ({"evaluation": {"every": 0}}, []),
        # Stages end with checkpoints, and so does an evaluation.
        ({"checkpoint": {"every": 7, "minutes": 0}}, []),
        (
            {"checkpoint": {"every": 7, "minutes": 0}, "evaluation": {"every": 0}, "number": 1},
            ["checkpoint.every: 7"],
        ),
        (
            {"checkpoint": {"every": 7, "minutes": 10}, "evaluation": {"every": 0}, "number": 1},
            [],
        ),
    ],
)
def test_fields_that_are_seldom_right_are_doubted(config, changes, doubts):
    """Of 3 and 4 steps, each of which makes 4 updates."""
    config.update({name: changes[name] for name in ("evaluation", "checkpoint") if name in changes})
    for stage, fields in zip(config.stages, changes.get("stages", [])):
        stage.update(fields)
    number = changes.get("number", 2)
    config.stages = config.stages[:number]
    stages = [
        types.SimpleNamespace(steps=steps, method=types.SimpleNamespace(updates_per_step=4))
        for steps in (3, 4)[:number]
    ]
    total = sum(stage.steps for stage in stages)
    run = types.SimpleNamespace(config=config, stages=stages, total_steps=total)
    said = list(training._doubts(run))
    assert [text.split(",")[0] for text in said] == [f"config.{doubt}" for doubt in doubts]


def test_a_student_is_exported_to_gguf(finished, tmp_path, capsys):
    pytest.importorskip("gguf")
    copy, file = tmp_path / "copy", tmp_path / "new" / "student.gguf"
    shutil.copytree(finished, copy)
    export = ["export", f"--workdir={copy}", "--quantize=bf16"]
    with pytest.raises(SystemExit, match="its tokenizer has no merges; llama.cpp"):
        main([*export, f"--output={file}"])
    with pytest.raises(SystemExit, match="--quantize bf16: is for --output FILE.gguf, not for a"):
        main([*export, f"--output={tmp_path / 'folder'}"])
    with pytest.raises(
        SystemExit, match="--dtype bfloat16: is for a folder; the type of .* is --q"
    ):
        main([*export, f"--output={file}", "--dtype=bfloat16"])
    # The same tokens, but cut as llama.cpp can, and with a merge.
    saved = copy / "configs" / "student" / "tokenizer.json"
    state = json.loads(saved.read_text())
    state["model"]["merges"] = [["Ġ", "a"]]
    backend = Tokenizer.from_str(json.dumps(state))
    split = pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    backend.save(str(saved))
    main([*export, f"--output={file}"])
    assert f"student in {file}" in capsys.readouterr().out
    assert [x.name for x in file.parent.iterdir()] == ["student.gguf"]
    found, there = load_model(str(file)), load_model(str(copy))
    assert found.tokenizer("say red").input_ids == there.tokenizer("say red").input_ids
    assert found.decoder.config == there.decoder.config
    for array, expected in zip(*map(jax.tree.leaves, (found.params, there.params)), strict=True):
        np.testing.assert_allclose(array, expected, rtol=2**-8)
