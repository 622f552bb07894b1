"""The paper's pipeline on tiny models: what starts where, what is kept, and the table."""

import heapq
import itertools
import json
import pathlib
import re
import statistics
import sys

import pytest
from conftest import DATA
from helpers import bucket, tiny
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from promptkd_jax.cli.main import main
from promptkd_jax.data.reading.record_stream import read_records
from promptkd_jax.infra.errors import ConfigError
from promptkd_jax.infra.files import read_text
from promptkd_jax.models.io.export import save_model
from promptkd_jax.models.load import load_model
from promptkd_jax.plan.tables import hours_table
from promptkd_jax.studies import published, reproduce
from promptkd_jax.studies.answers import Contender
from promptkd_jax.studies.published import ROUGE_L, SETS
from promptkd_jax.training import recipes
from promptkd_jax.training.config.config_file import load_config

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
CONFIG = """
import pathlib, sys
sys.path.insert(0, {tests!r})
from helpers import tiny
from promptkd_jax.training.recipes import method_stage, stage_config

def get_config(arg=""):
    chosen = dict(part.split("=") for part in arg.split(","))
    if chosen["student"] != "base":
        raise ValueError(f"no student {{chosen['student']}}")
    config = tiny.short_config(pathlib.Path({models!r}))
    config.title = "tiny " + chosen["method"]
    how = dict(steps=30, batch_size=4, learning_rate=1e-2)
    config.log_every, config.checkpoint.every = 30, 100
    config.stages = (stage_config("sft", **how),)
    config.evaluation.every = 0
    config.teacher.path = ""
    if chosen["method"] == "teacher":
        config.student.path = {models!r} + "/teacher"
    elif chosen["method"] not in ("init", "sft"):
        config.teacher.path = "hub/teacher"
        if chosen["method"] not in ("kd", "seqkd", "todi", "akl", "csd", "taid"):
            config.student.path = "hub/init"
    if chosen["method"] == "promptkd":
        config.stages = (method_stage("promptkd", **how),)
    return config
"""
SEEDS = ["10", "20"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """A config file, models and data, and two of the test sets."""
    folder = tmp_path_factory.mktemp("reproduce")
    tests, models = str(pathlib.Path(__file__).parents[1]), str(folder / "models")
    (folder / "gpt2.py").write_text(CONFIG.format(tests=tests, models=models))
    tiny.short_config(folder / "models")
    tiny.write_data(folder / "dolly.jsonl", 7)
    tiny.write_data(folder / "vicuna.jsonl", 3)
    return folder


def command(folder, workdir, *more: str) -> list[str]:
    return [
        f"--config={folder / 'gpt2.py'}:student=base",
        f"--workdir={workdir}",
        *("--methods", "promptkd"),
        *("--seeds", *SEEDS),
        *("--sets", *(f"{name}={folder / name}.jsonl" for name in ("vicuna", "dolly"))),
        *more,
    ]


@pytest.fixture(scope="module")
def finished(folder) -> pathlib.Path:
    """The pipeline with two seeds and two sets."""
    main(["reproduce", *command(folder, folder / "finished")])
    return folder / "finished"


def kept(workdir: pathlib.Path) -> dict[pathlib.Path, int]:
    """When each file was written, but for the table's own."""
    files = (file for file in workdir.rglob("*") if file.stem != "reproduction")
    return {file: file.stat().st_mtime_ns for file in files if file.is_file()}


def texts(file: pathlib.Path) -> list[str]:
    return json.loads(file.read_text())["texts"]


# The pipeline


@pytest.mark.parametrize("method", recipes.METHODS)
def test_where_each_run_starts(folder, method):
    source, workdir = f"{folder}/gpt2.py:student=base", folder / "work"
    runs = reproduce.plan_reproduction(source, workdir, [method], (), from_published=False)
    pretrained = method in ("sft", "kd", "seqkd", "todi", "akl", "csd", "taid")
    assert list(runs) == ["teacher", *["init"] * (not pretrained), method]
    raw = f"{folder}/models/student"
    configs = {name: run.config for name, run in runs.items()}
    paths = {name: (one.teacher.path, one.student.path) for name, one in configs.items()}
    assert paths["teacher"] == ("", f"{folder}/models/teacher")
    assert pretrained or paths["init"] == ("", raw)
    teacher = "" if method == "sft" else f"{workdir}/teacher/student"
    assert paths[method] == (teacher, raw if pretrained else f"{workdir}/init/student")


def test_a_workdir_in_a_bucket(folder, monkeypatch, tmp_path):
    """Config, sets, models and results; what is trained there is for `train` to say."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    pail, _ = bucket.make(monkeypatch)
    for name in ("gpt2.py", "dolly.jsonl"):
        (pail / name).write_bytes((folder / name).read_bytes())

    def run(config, workdir, choose_remat=None):
        assert workdir.parent == pail / "work"
        (workdir / "summary.json").write_text('{"seconds": 1.0, "rougeL_after": 2.0}')
        save_model(workdir / "student", load_model(f"{folder}/models/student"))

    monkeypatch.setattr(reproduce.run, "run", run)
    monkeypatch.chdir(tmp_path)
    arguments = [f"--config={pail}/gpt2.py:student=base", f"--workdir={pail}/work"]
    main(["reproduce", *arguments, "--methods=kd", "--seeds=1", f"--sets=dolly={pail}/dolly.jsonl"])
    runs = reproduce.plan_reproduction(
        f"{pail}/gpt2.py:student=base", pail, ["kd"], (), from_published=False
    )
    assert runs["kd"].config.teacher.path == "gs://pail/run/teacher/student"
    assert (pail / "work" / "reproduction.md").exists()
    scores = pail / "work" / "kd" / "evaluations" / "dolly" / "seed1.json"
    assert len(json.loads(read_text(scores))["texts"]) == 7
    assert [file.name for file in tmp_path.iterdir()] == ["home"]


def test_from_published_fine_tunes_neither(folder):
    source, workdir = f"{folder}/gpt2.py:student=base", folder / "work"
    runs = reproduce.plan_reproduction(
        source, workdir, ["sft", "promptkd"], (), from_published=True
    )
    assert list(runs) == ["sft", "promptkd"]
    config = runs["promptkd"].config
    assert (config.teacher.path, config.student.path) == ("hub/teacher", "hub/init")
    found = {model.name: model.path for model in reproduce.contenders(runs, workdir)}
    assert found["teacher"] == "hub/teacher"
    assert found["sft"] == f"{workdir}/sft/student"
    with pytest.raises(ConfigError, match="--from-published has no teacher"):
        reproduce.contenders({"sft": runs["sft"]}, workdir)


def test_distillation_starts_at_the_init(folder, finished, tmp_path):
    """The same model with the same seed gives the same answers to the dev rows."""
    config = reproduce.plan_reproduction(
        f"{folder}/gpt2.py:student=base", finished, ["sft"], (), from_published=False
    )["sft"].config
    init = Contender(
        "init", f"{finished}/init/student", "float32", config, tmp_path / "evaluations"
    )
    dev = read_records(config.data.dev, need="references")
    reproduce.evaluate_model(init, {"dev": dev}, [config.seed])
    start = texts(finished / "promptkd" / "before.json")
    assert start == texts(tmp_path / "evaluations" / "dev" / f"seed{config.seed}.json")
    assert texts(finished / "init" / "before.json") != start
    config = json.loads((finished / "promptkd" / "config.json").read_text())["config"]
    assert config["teacher"]["path"] == str(finished / "teacher" / "student")


def test_a_second_call_trains_and_evaluates_nothing(folder, finished, capsys):
    before = kept(finished)
    assert sum(file.name in ("seed10.json", "seed20.json") for file in before) == 2 * 2 * 2
    table = (finished / "reproduction.md").read_text()
    main(["reproduce", *command(folder, finished)])
    assert kept(finished) == before
    assert (finished / "reproduction.md").read_text() == table
    assert capsys.readouterr().out.count(": finished before") == 3


def test_what_is_missing_is_added_and_a_seed_repeats_itself(folder, finished):
    lost = finished / "promptkd" / "evaluations" / "dolly" / "seed20.json"
    content, others = lost.read_text(), kept(finished)
    lost.unlink()
    del others[lost]
    main(["reproduce", *command(folder, finished)])
    assert lost.read_text() == content
    after = kept(finished)
    assert after.pop(lost) and after == others


def test_seeds_give_other_answers(finished):
    first, second = (
        texts(finished / "promptkd" / "evaluations" / "dolly" / f"seed{seed}.json")
        for seed in SEEDS
    )
    assert len(first) == len(second) == 7
    assert first != second


def test_scores_are_those_of_promptkd_evaluate(folder, finished, tmp_path):
    """Whose defaults are the published sampling."""
    main(
        [
            "evaluate",
            f"--model={finished / 'promptkd' / 'student'}",
            f"--data={folder / 'dolly.jsonl'}",
            f"--output={tmp_path}",
            *("--template=plain", "--max-prompt-length=16", "--max-length=24", "--batch-size=4"),
            *("--seeds", *SEEDS),
        ]
    )
    found = json.loads((tmp_path / "evaluation.json").read_text())
    theirs = found["models"]["student"]["sets"]["dolly"]["seeds"]
    ours = json.loads((finished / "reproduction.json").read_text())["scores"]["promptkd"]["dolly"]
    assert ours == {seed: scores["rougeL"] for seed, scores in theirs.items()}
    assert reproduce.PROTOCOL.temperature == 1 and reproduce.SEEDS == (10, 20, 30, 40, 50)
    assert reproduce.PROTOCOL.no_repeat_ngram_size == 6


# The table


def test_the_table_has_ours_beside_the_published(finished):
    found = json.loads((finished / "reproduction.json").read_text())
    assert found["missing_sets"] == ["self_inst", "s_ni", "unni"]
    lines = (finished / "reproduction.md").read_text().splitlines()
    lines = [re.sub(" +", " ", line) for line in lines]
    assert "Not evaluated (n/a): self_inst, s_ni, unni." in lines
    assert "| method | test set | ours | published | difference |" in lines
    assert [row["method"] for row in found["table"][::6]] == ["teacher", "promptkd"]
    scores = found["scores"]["promptkd"]["dolly"].values()
    mean, std = statistics.fmean(scores), statistics.stdev(scores)
    cells = f"{mean:.2f} ± {std:.2f} | 25.6 | {mean - 25.6:+.2f}"
    assert f"| promptkd | dolly | {cells} |" in lines
    assert "| promptkd | unni | n/a | 28.9 | n/a |" in lines
    assert any(line.startswith("| teacher | average of 2 | ") for line in lines)


def test_an_average_is_over_the_same_sets_and_its_deviation_over_seeds():
    ours = {"dolly": {10: 20.0, 20: 22.0}, "vicuna": {10: 10.0, 20: 14.0}}
    theirs = {"sft": ROUGE_L["gpt2"]["base"]["sft"]}
    rows = reproduce.table_rows({"sft": ours, "opd": ours}, theirs)
    average = rows[5]
    assert average[:2] == ("sft", "average of 2")
    assert average.mean == 16.5 and average.std == pytest.approx(statistics.stdev((15, 18)))
    assert average.published == pytest.approx((22.9 + 14.5) / 2)
    assert average.difference == pytest.approx(16.5 - 18.7)
    assert rows[6] == ("opd", "dolly", 21.0, pytest.approx(2**0.5), None, None)
    whole = {name: {10: float(number)} for number, name in enumerate(SETS)}
    row = reproduce.table_rows({"sft": whole}, theirs)[5]
    assert row[:4] == ("sft", "average", 2.0, 0.0) and row.published == pytest.approx(16.48)
    amid = {"amid": ROUGE_L["gpt2"]["base"]["amid"]}  # of which the average alone is published
    rows = reproduce.table_rows({"amid": whole}, amid)
    assert rows[5][2:] == (2.0, 0.0, 23.46, pytest.approx(2 - 23.46))
    assert all(row.published is None for row in rows[:5])
    assert reproduce.table_rows({"amid": ours}, amid)[5].published is None  # of two sets
    nothing = reproduce.table_rows({"sft": {}}, theirs)
    assert nothing[0] == ("sft", "dolly", None, None, 22.9, None)
    assert nothing[5].published == pytest.approx(16.48) and nothing[5].mean is None


AVERAGES = {
    "base": (16.48, 17.36, 16.82, 19.50, 21.02, 22.24),
    "medium": (21.00, 21.18, 21.06, 23.40, 23.32, 23.92),
    "large": (21.14, 21.40, 21.14, 22.62, 24.18, 25.08),
}


@pytest.mark.parametrize("size", AVERAGES)
def test_published_numbers_give_the_published_averages(size):
    names = ("teacher", "sft", "kd", "seqkd", "gkd", "minillm", "promptkd")
    found = ROUGE_L["gpt2"][size]
    newer = {"base": ("abkd", "csd", "amid", "wasd"), "medium": ("csd", "amid", "wasd")}
    assert tuple(found) == (*names, *newer.get(size, ()))
    averages = [statistics.fmean(found[name].values()) for name in names]
    assert averages == pytest.approx((23.34, *AVERAGES[size]), abs=1e-6)


def test_published_numbers_are_found_by_the_name_of_the_config(capsys):
    found = reproduce.published_numbers("some/opt.py:student=2.7b")
    assert found["promptkd"]["s_ni"] == 31.4 and found["teacher"]["unni"] == 33.8
    assert reproduce.published_numbers("llama.py:student=7b")["minillm"]["vicuna"] == 20.6
    assert capsys.readouterr().out == ""
    assert reproduce.published_numbers("gpt2.py:student=tiny") == {}
    assert "gpt2.py:student=medium" in capsys.readouterr().out
    assert reproduce.published_numbers("configs/smollm2.py") == {}
    assert "configs/smollm2.py" in capsys.readouterr().out
    assert all(tuple(row) == published.SETS for row in found.values())


@pytest.mark.parametrize("family", ROUGE_L)
def test_a_config_without_a_size_has_the_numbers_of_its_default(family, capsys):
    config = load_config([f"--config={CONFIGS / family}.py"])[0]
    numbers = reproduce.published_numbers(f"configs/{family}.py")
    (size,) = [size for size, found in ROUGE_L[family].items() if found is numbers]
    named = load_config([f"--config={CONFIGS / family}.py:student={size}"])[0]
    assert config.student.path == named.student.path
    assert reproduce.published_numbers(f"{family}.py:method=kd") is numbers
    assert capsys.readouterr().out == ""


# Real data


RECIPE = """
import sys
sys.path.insert(0, {root!r})
from configs import gpt2

def get_config(arg=""):
    config = gpt2.get_config(arg)
    config.student.path = {models!r} + ("/teacher" if "method=teacher" in arg else "/student")
    if config.teacher.path:
        config.teacher.path = {models!r} + "/teacher"
    config.data.update(train={train!r}, dev={dev!r}, train_split="train", dev_split="train")
    config.data.update(max_prompt_length=192, max_length=200)
    config.evaluation.update(every=0, batch_size=12)
    config.checkpoint.export = "last"
    config.stages[0].update(steps=2, epochs=0.0, batch_size=4, gradient_accumulation_steps=1)
    return config
"""


def learned_tokenizer(files) -> PreTrainedTokenizerFast:
    """A thousand byte pairs of the first lines of the files; `<end>` is EOS and padding."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=1000, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    lines = (line for file in files for line in itertools.islice(file.open(encoding="utf-8"), 50))
    backend.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")


def test_the_recipe_of_gpt2_on_the_published_data(tmp_path, no_report, capsys):
    """With random models of some ten thousand parameters; the shortest rows of every file."""
    files = {"train": "dolly/train", "dev": "dolly/dev", "dolly": "dolly/test"}
    files |= {name: f"eval/{name}" for name in ("self_inst", "vicuna", "s_ni")}
    files = {name: DATA / f"{file}.jsonl" for name, file in files.items()}
    if missing := [str(file) for file in files.values() if not file.is_file()]:
        pytest.skip(f"{missing[0]} is absent: set PROMPTKD_DATA")
    words, models = learned_tokenizer(files.values()), tmp_path / "models"
    for number, (name, width) in enumerate((("teacher", 16), ("student", 8))):
        tiny.write_model(models / name, width=width, depth=1, seed=number, words=words)
    few = {name: tmp_path / f"{name}.jsonl" for name in files}
    for name, file in files.items():
        with file.open(encoding="utf-8") as lines:
            few[name].write_text("".join(heapq.nsmallest(24, lines, key=len)))
    paths = dict(root=str(CONFIGS.parent), models=str(models))
    recipe = RECIPE.format(**paths, train=str(few["train"]), dev=str(few["dev"]))
    (tmp_path / "gpt2.py").write_text(recipe)
    given = ["dolly", "self_inst", "vicuna", "s_ni"]
    arguments = [f"--config={tmp_path}/gpt2.py:student=base", f"--workdir={tmp_path}/work"]
    arguments += ["--methods", "promptkd", "--seeds", "10", "--sets"]
    main(["reproduce", *arguments, *(f"{name}={few[name]}" for name in given)])
    found = json.loads((tmp_path / "work" / "reproduction.json").read_text())
    assert found["missing_sets"] == ["unni"] and set(found["scores"]) == {"teacher", "promptkd"}
    for scores in found["scores"].values():
        assert list(scores) == given
        assert all(0 <= score < 30 for by_seed in scores.values() for score in by_seed.values())
    table = {(row["method"], row["test_set"]): row for row in found["table"]}
    numbers = ROUGE_L["gpt2"]["base"]["promptkd"]
    assert all(table["promptkd", name]["published"] == numbers[name] for name in SETS)
    prompt = json.loads((tmp_path / "work" / "promptkd" / "metrics.jsonl").open().readline())
    assert prompt["prompt_norm"] > 0 and prompt["kl_prompted"] > 0
    shown = capsys.readouterr().out
    assert "vicuna" in shown and "n/a" in shown


# The dry run


def test_a_dry_run_says_hours_and_trains_nothing(tmp_path, capsys):
    def hours(*more):
        arguments = [f"--config={CONFIGS}/gpt2.py:student=base", f"--workdir={tmp_path}/work"]
        arguments += ["--methods", "sft", "kd", "--from-published", "--dry-run", "v5e-1,h100"]
        main(["reproduce", *arguments, *more])
        lines = [line.split("|") for line in capsys.readouterr().out.splitlines() if "|" in line]
        cells = [[cell.strip() for cell in line[1:-1]] for line in lines]
        assert cells[0] == ["run", "v5e:1x1", "h100"]
        return {name: figures for name, *figures in cells[2:]}

    found = hours()
    assert list(found) == ["sft", "kd", "all, hours", "all, USD"]
    for device in (0, 1):
        each = [float(found[name][device]) for name in ("sft", "kd", "all, hours")]
        assert sum(each[:2]) == pytest.approx(each[2], abs=0.011) and each[1] > each[0] > 0
    assert float(found["all, USD"][0]) > 0 and found["all, USD"][1] == "n/a"
    longer = hours("--config.stages[0].epochs=40.0")  # in place of 20
    assert float(longer["kd"][1]) == pytest.approx(2 * float(found["kd"][1]), abs=0.011)
    assert not (tmp_path / "work").exists()


def test_a_pipeline_that_does_not_fit_has_no_hours():
    def plan(hours, fits=True):
        return {"hours": hours, "usd": 2 * hours, "memory": {"fits": fits}}

    plans = {
        "teacher": {"a": plan(1.5), "b": plan(1.0, fits=False), "c": plan(3.0)},
        "kd": {"a": plan(0.25), "b": plan(0.5), "c": None},
    }
    assert hours_table(plans).rows == [
        ("teacher", "1.50", "NO FIT", "3.00"),
        ("kd", "0.25", "0.50", "NO MESH"),
        ("all, hours", "1.75", "n/a", "n/a"),
        ("all, USD", "4", "n/a", "n/a"),
    ]


# Mistakes


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--sets", "dollly=x.jsonl"], "NAME=FILE with NAME one of dolly, self_inst, vicuna"),
        (["--sets", "dolly"], "'dolly' is not NAME=FILE"),
        (["--sets", "dolly=nowhere.jsonl"], "dolly=nowhere.jsonl: no such file"),
        (["--sets", "dolly={0}/dolly.jsonl", "dolly={0}/vicuna.jsonl"], "dolly is given twice"),
        (["--sets", "dolly={0}/bad.jsonl"], "bad.jsonl:1: broken JSON"),
        (["--config={0}/gpt2.py:student=base,method=kd"], "methods after --methods"),
        (["--config={0}/gpt2.py:student=huge"], "no student huge"),
        (["--config.stages[0].step=1"], "did you mean steps"),
        (["--config.student.path=x"], "config.student.path: differs between the steps"),
        (["--config.stages[0].batch_size=0"], "with method=teacher: config.stages[0].batch_size"),
        (["--confg.seed=1"], "unknown arguments: --confg.seed=1"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(folder, tmp_path, arguments, message):
    (folder / "bad.jsonl").write_text('{"instruct\n')
    arguments = [argument.replace("{0}", str(folder)) for argument in arguments]
    with pytest.raises(SystemExit) as error:
        main(["reproduce", *command(folder, tmp_path / "work"), *arguments])
    assert message in str(error.value)
    assert not (tmp_path / "work").exists()


def test_a_tilde_in_a_set_is_the_home_folder(folder, monkeypatch):
    """No shell expands that of dolly=~/dolly.jsonl."""
    monkeypatch.setenv("HOME", str(folder))
    expected = reproduce.read_sets([f"dolly={folder}/dolly.jsonl"])
    assert reproduce.read_sets(["dolly=~/dolly.jsonl"]) == expected


def test_an_unknown_method_is_told(folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["reproduce", *command(folder, tmp_path), "--methods", "promtkd"])
    assert "'promtkd' (choose from" in capsys.readouterr().err


def test_evaluations_of_another_set_are_refused(folder, finished, capsys):
    other = f"dolly={folder / 'vicuna.jsonl'}"
    with pytest.raises(SystemExit, match="dolly belongs to(.|\n)*config.records: there"):
        main(["reproduce", *command(folder, finished), "--sets", other])


def test_the_command_is_known(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["promptkd", "reproduce", "--help"])
    with pytest.raises(SystemExit, match="0"):
        main()
    assert "--from-published" in capsys.readouterr().out
