"""A whole comparison of tiny models: what it writes, that it resumes, and what it refuses."""

import json
import pathlib
import re
import shutil
import signal
import subprocess
import sys
from html.parser import HTMLParser
from importlib.metadata import version

import jax
import numpy as np
import pytest
from conftest import environment
from etils import epath
from ml_collections import ConfigDict

from promptkd_jax.cli.main import main
from promptkd_jax.data.reading.record_stream import read_records
from promptkd_jax.data.reading.records import user_record
from promptkd_jax.infra import sharding
from promptkd_jax.infra.errors import ComparisonError, ConfigError
from promptkd_jax.infra.metrics import read_metrics
from promptkd_jax.models.load import load_with_tokenizer
from promptkd_jax.models.sampling_rules import Sampling
from promptkd_jax.studies import answers, compare, comparison, comparison_report
from promptkd_jax.training import run as training
from promptkd_jax.training.config.checks import checked, read_group
from promptkd_jax.training.config.config_file import load_config
from promptkd_jax.training.loop import evaluate_student
from promptkd_jax.training.prepare import prepare, tokenized
from promptkd_jax.training.recipes import base_config, method_stage, sampling_config

ROOT = pathlib.Path(__file__).parents[2]
VOID = {"meta", "br"}


class Page(HTMLParser):
    """Texts and tags of a page in which every tag is closed in turn."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def pretraining(run: ConfigDict, model: str) -> ConfigDict:
    config = run.copy_and_resolve_references()
    config.student.path = model
    config.evaluation.every = 0
    config.stages = (method_stage("sft", steps=2, batch_size=8, learning_rate=1e-3),)
    return config


def tiny_comparison() -> ConfigDict:
    """SFT and PromptKD, two seeds of two updates, from a student of two updates."""
    run = base_config()
    run.teacher.path = "synthetic:llama-D32-L2"
    run.data.update(
        train="synthetic:train",
        dev="synthetic:dev",
        dev_rows=4,
        template="plain",
        max_prompt_length=16,
        max_length=24,
    )
    run.evaluation.update(every=2, batch_size=4, sampling=sampling_config())
    student = pretraining(run, "synthetic:llama-D32-L1-S1")
    return ConfigDict(
        dict(
            title="tiny <b>& tidy</b>",
            note="ranks nothing",
            methods=("sft", "promptkd"),
            reference="",
            seeds=(10, 20),
            budget=dict(kind="steps", steps=2, seconds=0.0),
            pretraining=dict(teacher=None, student=student),
            run=run,
            changes=dict(
                all=dict(batch_size=4, learning_rate=1e-3), promptkd=dict(prompt_learning_rate=1e-2)
            ),
            test=dict(
                sets=dict(test="synthetic:test", longer="synthetic:longer"),
                split="",
                rows=6,
                batch_size=4,
                sampling=sampling_config(),
            ),
            exposure_bias=dict(rows=3, samples=2),
            bootstrap=dict(draws=100),
            samples=3,
        )
    )


@pytest.fixture
def config():
    return tiny_comparison()


def train_here(run):
    """A training in this process: as `train_apart` but for starting Python again."""
    config, _ = load_config([f"--config={run.folder / 'config.json'}"])
    training.run(checked(config), run.folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(workdir, what `compare` returned) of a comparison that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("comparison")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "train_apart", train_here)
        patch.setattr(training, "write_report", lambda *_, **__: None)  # half of the time
        assess, assessed = training._assess_first, []
        patch.setattr(
            training,
            "_assess_first",
            lambda experiment: assessed.append(experiment.config.title) or assess(experiment),
        )
        found = compare.compare(tiny_comparison(), workdir)
        assert len(assessed) == 3, assessed  # in the pretraining, and once a seed
        return workdir, found


def test_every_method_has_every_figure(finished):
    workdir, found = finished
    assert json.loads((workdir / "comparison.json").read_text()) == found
    assert found["reference"] == "promptkd" and set(found["differences"]) == {"sft"}
    assert list(found["rougeL"]) == ["teacher", "student before", "sft", "promptkd"]
    for scores in found["rougeL"].values():
        assert set(scores) == {"test", "longer", "average"}
        assert all(len(one["seeds"]) == 2 for one in scores.values())
    columns = comparison_report.COST + comparison_report.BEHAVIOUR
    figures = {"rougeL_after", *(key for _, key, _ in columns)}
    figures.add("ex_acc_err")
    assert set(found["figures"]["sft"]) == figures
    prompted = {key for _, key, _ in comparison_report.PROMPT}
    assert set(found["figures"]["promptkd"]) == figures | prompted
    assert found["figures"]["sft"]["updates"] == {"mean": 2.0, "std": 0.0, "seeds": [2, 2]}
    assert found["kl"]["sft"]["steps"] == [0, 2]
    assert all(0 < len(curve) <= 8 for curve in found["exposure_bias"].values())


def test_it_says_what_it_was_made_on_and_how_long_that_took(finished):
    workdir, found = finished
    summaries = [json.loads(file.read_text()) for file in workdir.glob("*/*/summary.json")]
    assert len(summaries) == 5  # the pretraining, and two seeds of two methods
    assert found["training_seconds"] == pytest.approx(sum(one["seconds"] for one in summaries))
    assert len(found["devices"]) == len(found["versions"]) == 1
    assert f"jax {version('jax')}, flax {version('flax')}" in found["versions"][0]
    text = (workdir / "comparison.md").read_text()
    assert all(said in text for said in found["devices"] + found["versions"])


def test_curves_of_a_soft_prompt_are_means_over_its_runs(finished):
    workdir, found = finished
    assert set(found["prompt"]) == {"promptkd"}
    assert set(found["prompt"]["promptkd"]) == set(comparison_report.PROMPT_CURVES)
    for key, curve in found["prompt"]["promptkd"].items():
        rows = [
            [row for row in read_metrics(workdir / "runs" / f"promptkd-seed{seed}") if key in row]
            for seed in (10, 20)
        ]
        assert curve["steps"] == [row["step"] for row in rows[0]]
        means = np.mean([[row[key] for row in one] for one in rows], axis=0)
        assert curve["values"] == pytest.approx(means)


def test_excess_error_of_a_method_is_that_of_its_seeds(finished):
    for method, figures in finished[1]["figures"].items():
        last = finished[1]["exposure_bias"][method][-1]
        assert figures["ex_acc_err"]["mean"] == pytest.approx(last)
        assert len(figures["ex_acc_err"]["seeds"]) == 2


def test_differences_of_kl_are_paired_by_seed(finished):
    found = json.loads(json.dumps(finished[1]))
    found["figures"]["sft"]["kl_after"]["seeds"] = [3.0, 8.0]
    found["figures"]["promptkd"]["kl_after"]["seeds"] = [2.0, 5.0]
    tables = {table.heading: table for table in comparison_report.tables(found)}
    assert tables["Behaviour"].header[-1] == "KL minus promptkd's"
    last = {row[0]: row[-1] for row in tables["Behaviour"].rows}
    assert last == {"sft": "2.000 ± 1.414", "promptkd": ""}


def test_kl_of_runs_that_are_measured_before_and_after_alone(finished, tmp_path):
    workdir, found = finished
    plan = comparison.plan_comparison(tiny_comparison(), workdir.resolve())
    run = plan.runs["sft", 10]
    for name in ("before.json", "summary.json"):
        shutil.copy(run.folder / name, tmp_path / name)
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    lines = [line for line in lines if "dev/kl" not in line]
    (tmp_path / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    assert compare._kl(run._replace(folder=tmp_path)) == pytest.approx(compare._kl(run))


def test_a_teacher_agrees_with_its_own_responses_as_references(config, tmp_path):
    """Whatever the data say: greedy, it writes just these."""
    config.run.evaluation.references = "teacher"
    made = comparison.plan_comparison(config, tmp_path)
    teacher = load_with_tokenizer(made.teacher, dtype="float32")
    records = read_records("synthetic:test")[:5]
    rows = tokenized(
        made.a_run, teacher, "test", [user_record(record.prompt_text) for record in records]
    )
    answered = compare._answered_by_teacher(made, teacher, {"test": rows}, tmp_path)["test"]
    greedy = answers.Contender(
        "teacher", made.teacher, "float32", made.a_run, tmp_path / "evaluations"
    )
    found = answers.answer_sets(
        greedy,
        {"test": answered.records},
        [10],
        sampling=Sampling(temperature=0.0),
        batch_size=4,
        load=load_with_tokenizer,
    )
    assert found["test"][10]["rougeL_by_row"] == [100.0] * 5


def test_greedy_responses_of_the_teacher_are_written_once(config, tmp_path):
    def folders():
        made = comparison.plan_comparison(config, tmp_path)
        return {one.config.teacher_responses.path for one in made.trainings}

    sampled = {str(tmp_path / "answers" / f"seed{seed}") for seed in (10, 20)}
    assert folders() == sampled | {""}
    for part in (config.run, config.pretraining.student):
        part.teacher_responses.sampling.temperature = 0.0
    assert folders() == {str(tmp_path / "answers" / "greedy")}
    config.pretraining.student.data.train = "synthetic:longer"  # other requests
    assert folders() == {str(tmp_path / "answers" / "greedy"), ""}


def test_all_start_from_the_same_student_and_teacher(finished):
    workdir, found = finished
    starts = {curve["values"][0] for curve in found["kl"].values()}
    assert len(starts) == 1
    configs = [
        json.loads(file.read_text())["config"] for file in workdir.glob("runs/*/config.json")
    ]
    assert len(configs) == 4
    assert {c["student"]["path"] for c in configs} == {str(workdir / "pretraining/student/student")}
    assert {c["teacher"]["path"] for c in configs} == {"synthetic:llama-D32-L2"}
    assert sorted(c["seed"] for c in configs) == [10, 10, 20, 20]
    assert {(s["steps"], s["batch_size"]) for c in configs for s in c["stages"]} == {(2, 4)}


def test_the_common_student_is_measured_as_each_run_would_measure_it(finished, config, tmp_path):
    run = comparison.plan_comparison(config, finished[0].resolve()).runs["promptkd", 20]
    before = json.loads((run.folder / "before.json").read_text())
    mesh = sharding.make_mesh(run.config.mesh.sizes)
    with jax.set_mesh(mesh):
        found = evaluate_student(prepare(run.config, epath.Path(tmp_path), mesh))
    assert found["texts"] == before["texts"]
    assert found["kl"] == pytest.approx(before["kl"])


def test_scores_are_means_over_sets_then_over_seeds():
    found = answers.over_seeds({"a": {10: 2.0, 20: 6.0}, "b": {10: 0.0, 20: 2.0}})
    assert {name: one["seeds"] for name, one in found.items()} == {
        "a": [2.0, 6.0],
        "b": [0.0, 2.0],
        "average": [1.0, 4.0],
    }
    assert found["average"]["mean"] == 2.5
    assert found["a"]["std"] == pytest.approx(np.sqrt(8.0))


def test_scores_are_means_over_requests(finished):
    workdir, found = finished
    folder = workdir / "runs" / "sft-seed20" / "evaluations"
    for name in ("test", "longer"):
        answer = json.loads((folder / name / "seed20.json").read_text())
        assert answer["rows"] == len(answer["rougeL_by_row"]) == found["test_sets"][name]["rows"]
        mean = np.mean(answer["rougeL_by_row"])
        assert found["rougeL"]["sft"][name]["seeds"][1] == pytest.approx(mean)
        assert answer["rougeL"] == pytest.approx(mean, abs=1e-4)


def test_differences_are_of_the_method_from_the_reference():
    ours = {"test": np.full((2, 5), 3.0), "longer": np.full((2, 7), 6.0)}
    theirs = {"test": np.full((2, 5), 1.0), "longer": np.full((2, 7), 1.0)}
    found = answers.differences(ours, theirs, draws=20)
    for name, difference in (("test", 2.0), ("longer", 5.0), ("average", 3.5)):
        assert found[name] == pytest.approx(dict.fromkeys(("mean", "low", "high"), difference))


def test_the_teacher_answers_anew_with_each_seed(finished):
    folder = finished[0] / "fixed" / "teacher" / "evaluations" / "test"
    one, other = (json.loads((folder / f"seed{seed}.json").read_text()) for seed in (10, 20))
    assert one["texts"] != other["texts"]


def test_answers_of_a_comparison_begun_before_are_kept(finished, config, tmp_path, monkeypatch):
    """Which had one file for all sets of a seed."""
    workdir = shutil.copytree(finished[0], tmp_path / "before")
    plan = comparison.plan_comparison(config, workdir)
    for file in workdir.glob("*/*/evaluations"):
        for seed in (10, 20):
            by_set = {
                one.parent.name: json.loads(one.read_text())
                for one in file.glob(f"*/seed{seed}.json")
            }
            old = {
                name: {"rougeL": answer["rougeL_by_row"], "texts": answer["texts"]}
                for name, answer in by_set.items()
            }
            if old:
                (file.parent / f"test-seed{seed}.json").write_text(json.dumps(old))
        shutil.rmtree(file)
    monkeypatch.setattr(answers, "kept_responses", None)
    measured = compare.measure(plan, workdir)
    found = compare.summarize_comparison(plan, measured)
    assert found["rougeL"] == finished[1]["rougeL"] and found["samples"] == finished[1]["samples"]


def test_the_teacher_writes_once_for_all_methods_of_a_seed(finished, config, monkeypatch):
    workdir = finished[0].resolve()
    kept = {file: file.read_text() for file in workdir.glob("runs/*/exposure_bias.json")}
    for file in kept:
        file.unlink()
    write, seeds = compare.generate_samples, []
    monkeypatch.setattr(
        compare,
        "generate_samples",
        lambda *of, seed, **how: seeds.append(seed) or write(*of, seed=seed, **how),
    )
    compare.measure(comparison.plan_comparison(config, workdir), workdir)
    assert sorted(seeds) == [10, 20] and len(kept) == 4
    assert kept == {file: file.read_text() for file in kept}


def test_the_report_is_a_page_with_everything_escaped(finished):
    workdir, found = finished
    text = (workdir / "report.html").read_text()
    page = Page(text)
    assert text.startswith("<!doctype html>") and text.count("<svg") == 7
    shown = " ".join(page.texts)
    for expected in (found["title"], "ranks nothing", comparison_report.budget(found)):
        assert expected in shown
    assert "b" not in page.tags[: page.tags.index("figure")]
    for sample in found["samples"]:
        assert sample["request"] in page.texts
        assert set(sample["answers"]) == {"teacher", "student before", "sft", "promptkd"}
    assert not re.search(r"(src|href)=[\"']?(http|//|file)|@import", text)


def test_names_are_escaped_wherever_they_stand(finished, tmp_path, config):
    name = "<i>x</i> & |y|"
    text = json.dumps(finished[1]).replace('"sft"', json.dumps(name))
    found = json.loads(text)
    comparison_report.write(tmp_path, found, config)
    page = Page((tmp_path / "report.html").read_text())
    assert "i" not in [tag for tag, at in zip(page.tags, page.texts) if at == "x"]
    assert page.texts.count(name) >= 6
    assert "<i>x" not in (tmp_path / "report.html").read_text()
    lines = (tmp_path / "comparison.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| <i>")]
    assert rows and all(r"\|y\|" in row for row in rows)


def test_every_table_row_has_as_many_cells_as_its_header(finished):
    for table in comparison_report.tables(finished[1]):
        assert {len(row) for row in table.rows} == {len(table.header)}, table.heading
    headings = [table.heading for table in comparison_report.tables(finished[1])]
    assert headings == ["ROUGE-L", "Cost", "Behaviour", "The soft prompt's effect"]


def test_a_finished_comparison_trains_and_measures_nothing(finished, config, monkeypatch):
    workdir, found = finished

    def never(*arguments):
        raise AssertionError(f"called with {arguments}")

    for module, name in (
        (compare, "train_apart"),
        (answers, "kept_responses"),
        (compare, "exposure_bias"),
    ):
        monkeypatch.setattr(module, name, never)
    before = {file: file.stat().st_mtime_ns for file in workdir.glob("runs/*/*")}
    assert compare.compare(config, workdir) == found
    assert before == {file: file.stat().st_mtime_ns for file in workdir.glob("runs/*/*")}


def test_a_further_seed_trains_only_that(finished, config, monkeypatch):
    trained = []
    monkeypatch.setattr(compare, "train_apart", lambda run: trained.append(run.name) or 1 / 0)
    config.seeds = (10, 20, 30)
    with pytest.raises(ZeroDivisionError):
        compare.compare(config, finished[0])
    assert trained == ["sft, seed 30"]


def test_another_budget_is_refused_in_the_same_folder(finished, config):
    config.budget.steps = 3
    with pytest.raises(ConfigError, match="config.budget.steps: there 2, now 3"):
        compare.compare(config, finished[0])


def test_a_summary_without_a_figure_is_named(finished, config, tmp_path):
    run = comparison.plan_comparison(config, finished[0].resolve()).runs["sft", 10]
    summary = json.loads((run.folder / "summary.json").read_text())
    del summary["tokens_per_second"]
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(ComparisonError, match="summary.json: has no tokens_per_second;"):
        compare._summary(run._replace(folder=tmp_path))


@pytest.mark.slow
def test_a_training_that_fails_says_how_it_ended(config, tmp_path):
    config.pretraining.student.student.path = "synthetic:none"
    with pytest.raises(ComparisonError) as error:
        compare.compare(config, tmp_path)
    message = str(error.value)
    assert message.startswith("pretraining of the student ended with exit status 1")
    assert "promptkd train: synthetic:none: expected llama-D" in message
    assert str(tmp_path / "pretraining" / "student" / "log.txt") in message


def test_the_budget_is_said_plainly(finished):
    found = finished[1]
    assert comparison_report.budget(found).startswith("Budget: equal steps. Every method takes 2 ")
    seconds = found["budget"] | dict(kind="seconds", seconds=90.0)
    text = comparison_report.budget(found | {"budget": seconds})
    assert text.startswith("Budget: equal wall-clock. Every method trains for 90 s")


def test_a_budget_in_seconds_stops_the_runs(config, tmp_path):
    config.budget = dict(kind="seconds", steps=1000, seconds=30.0)
    made = comparison.plan_comparison(config, tmp_path).runs.values()
    assert {(r.config.stop_after_seconds, r.config.stages[0].steps) for r in made} == {(30.0, 1000)}


def test_all_mistakes_at_once(config, tmp_path):
    config.changes.promptkd = dict(batch_size=8, student_terms=(("revers_kl", 1.0),))
    config.reference = "kd"
    config.seeds = (10, 10)
    config.pretraining.student.log_every = 0
    with pytest.raises(ConfigError) as error:
        compare.compare(config, tmp_path)
    for part in (
        "batch sizes [4, 8]",
        "config.reference: 'kd' is not one of sft, promptkd",
        "config.seeds: (10, 10) names one of them twice",
        "pretraining of the student: config.log_every: 0 is not",
        "promptkd, seed 10: config.stages[0].student_terms",
    ):
        assert part in str(error.value), str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("methods", ("sft", "promptk"), r"config.methods\[1\]: 'promptk' is not one of"),
        ("changes", ConfigDict(dict(al=dict())), "(?s)config.changes: .* is not a group of groups"),
        ("pretraining", ConfigDict(dict(teacher=None, student=3)), "student: 3 is not None, or"),
    ],
)
def test_a_wrong_field_is_told(config, field, value, message):
    config[field] = value
    with pytest.raises(ConfigError, match=message):
        read_group(config, comparison.ComparisonConfig)


@pytest.mark.parametrize("argument", ["small", "smollm2", "smollm2,data=somewhere"])
def test_the_shipped_comparisons_are_right(argument, tmp_path):
    config, _ = load_config([f"--config={ROOT}/configs/compare.py:{argument}"])
    read_group(config, comparison.ComparisonConfig)
    made = comparison.plan_comparison(config, tmp_path)
    assert len(made.runs) == len(config.methods) * len(config.seeds)
    assert {m for m, _ in made.runs} >= {"sft", "kd", "seqkd", "gkd", "distillm", "abkd", "minillm"}
    teacher, student = (made.pretraining[name].student for name in ("teacher", "student"))
    assert made.pretraining["student"].config.teacher.path == teacher
    found = {(r.config.teacher.path, r.config.student.path) for r in made.runs.values()}
    assert found == {(teacher, student)}


def test_the_evidence_has_pairs_that_differ_by_the_prompt_alone(tmp_path):
    """And every run learns from the same requests, of which the data have no response."""
    config, _ = load_config([f"--config={ROOT}/configs/compare.py:evidence"])
    made = comparison.plan_comparison(config, tmp_path)
    assert len({seed for _, seed in made.runs}) >= 3
    assert len({one.config.data for one in made.trainings}) == 1
    assert len({one.config.teacher_responses.path for one in made.trainings}) == 1
    stages = {method: run.config.stages[0] for (method, _), run in made.runs.items()}
    assert not any(
        stage.source.reads_responses and stage.on_policy_share < 1 for stage in stages.values()
    )
    assert len({(stage.steps, stage.batch_size) for stage in stages.values()}) == 1
    for plain, prompted in (("gkd", "promptkd"), ("amid", "promptkd_amid")):
        for field in ("student_terms", "learning_rate", "schedule", "temperature", "passes"):
            assert getattr(stages[plain], field) == getattr(stages[prompted], field)
        assert stages[plain].teacher_view == "plain"
        assert stages[prompted].teacher_view == "prompted"
        assert stages[plain].source.on_policy and stages[prompted].source.on_policy


def test_the_command_line_says_what_is_wrong(tmp_path):
    with pytest.raises(SystemExit, match="promptkd compare: config: .*'large' is not small, "):
        main(["compare", f"--config={ROOT}/configs/compare.py:large", f"--workdir={tmp_path}"])


def test_excess_error_ends_where_few_texts_go_on():
    def one(errors, student, teacher):
        return {"ex_acc_err": errors, "student_count": student, "teacher_count": teacher}

    found = [
        one([0, 2, 4, 90], [40, 20, 4, 1], [40, 30, 9, 1]),
        one([0, 4, 8, 9], [40] * 4, [40] * 4),
    ]
    assert compare._exposure_curve(found) == [0, 3, 6]


TRAINING = """
import signal, sys, time

def save(*_):
    time.sleep(0.5)
    print("saved", flush=True)
    sys.exit(143)

signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
time.sleep(1000)
"""
COMPARISON = f"""
import sys
from promptkd_jax.infra import signals
from promptkd_jax.studies import runs
signals.GRACE_SECONDS = 0.1
with signals.answered():
    runs._exit_status([sys.executable, "-c", {TRAINING!r}])
print("goes on", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_comparison_that_is_stopped_lets_its_training_save(number):
    process = subprocess.Popen(
        [sys.executable, "-c", COMPARISON],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    output, errors = process.communicate()
    assert (process.returncode, output) == (128 + number, "saved\n")
    assert f"{number.name}: stopping after this training has saved" in errors


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda c: c.run.__delattr__("teacher"), "config.run.teacher: is missing"),
        (
            lambda c: c.pretraining.student.__delattr__("mesh"),
            "config.pretraining.student.mesh: is missing",
        ),
        (
            lambda c: c.changes.update(promptkd=ConfigDict(dict(batch_size="4"))),
            r"promptkd, seed 10: config.stages\[0\].batch_size: '4' is not an int",
        ),
        (lambda c: c.changes.update(sft=ConfigDict(dict(method="kd"))), "not a group of groups"),
    ],
)
def test_what_runs_are_made_of_is_checked_before_it_is_used(config, tmp_path, change, says):
    config.unlock()
    config.run, config.pretraining.student = (
        ConfigDict(dict(one)).unlock() for one in (config.run, config.pretraining.student)
    )
    change(config)
    with pytest.raises(ConfigError, match=says):
        comparison.plan_comparison(config, tmp_path)
