"""Every recipe, teacher view and source of rows as a whole run of tiny models; what cannot be is
refused before anything is loaded."""

import dataclasses
import functools
import itertools
import json
import pathlib
import threading

import jax
import numpy as np
import pytest
from conftest import ROOT
from helpers import tiny
from ml_collections import ConfigDict
from safetensors.numpy import load_file

from promptkd_jax.cli.main import main
from promptkd_jax.data.batches import stream
from promptkd_jax.infra import sharding
from promptkd_jax.infra.errors import ConfigError, DataError, ModelError
from promptkd_jax.infra.metrics import read_metrics
from promptkd_jax.models.decoder import embed
from promptkd_jax.training import build, experiment, loop, run_models
from promptkd_jax.training import prepare as preparation
from promptkd_jax.training import run as training
from promptkd_jax.training.build import stage_steps, title
from promptkd_jax.training.config.checks import checked
from promptkd_jax.training.config.config_file import claim, load_config
from promptkd_jax.training.recipes import METHODS, hidden_term, method_stage, sampling_config

VOCABULARY = len(tiny.tokenizer())
GOLD = "cross_entropy"
CONFIGS = ROOT / "configs"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("recipes") / "models"
    tiny.short_config(folder)
    return folder


@pytest.fixture
def config(models) -> ConfigDict:
    """Of one stage, evaluated before and after it only."""
    return short(models, stage("kd"))


def short(models: pathlib.Path, *stages: ConfigDict) -> ConfigDict:
    config = tiny.short_config(models)
    config.evaluation.every = 0
    config.checkpoint.every = 1000
    config.stages = stages
    return config


def stage(method: str, **changes) -> ConfigDict:
    """Of a few small steps."""
    return method_stage(method, **(dict(steps=3, batch_size=4, learning_rate=1e-3) | changes))


def run(config: ConfigDict, workdir: pathlib.Path) -> dict:
    return training.run(checked(config), workdir)


def prepare(config: ConfigDict, workdir: pathlib.Path) -> experiment.Experiment:
    """What a run is made of, before its first update."""
    made, mesh = checked(config), sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        return preparation.prepare(made, workdir, mesh)


def updates(workdir: pathlib.Path) -> list[dict]:
    return [row for row in read_metrics(workdir) if "student_loss" in row]


def weights(folder: pathlib.Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")


def assert_same(one: pathlib.Path, other: pathlib.Path, atol: float = 0.0) -> None:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=atol, err_msg=name)


def differ(one: pathlib.Path, other: pathlib.Path) -> bool:
    ours, theirs = weights(one), weights(other)
    return any(np.any(ours[name] != theirs[name]) for name in ours)


# The named methods

STATISTICS = {"student_entropy", "response_length", "tokens", "student_grad_norm", "learning_rate"}
CLOSE = {"agreement", "kl_plain"}
PROMPT = {"prompt_loss", "prompt_kd", "prompt_regularizer", "kl_prompted", "kl_plain"}
LOGGED = {
    "sft": set(),
    "kd": {*CLOSE, GOLD, "forward_kl"},
    "seqkd": set(),
    "imitkd": {*CLOSE, "eos_rate"},
    "gkd": {*CLOSE, "eos_rate", "on_policy_share"},
    "minillm": {*CLOSE, "eos_rate", "policy_gradient", "reverse_kl"},
    "opd": {*CLOSE, "eos_rate"},
    "distillm": {*CLOSE, "on_policy_share", "replay_threshold"},
    "abkd": CLOSE,
    "wasd": {*CLOSE, "on_policy_share", "replay_threshold"},
    "taid": {*CLOSE, "soft_cross_entropy", "interpolation_share"},
    "skd": {*CLOSE, "eos_rate"},
    "distillm2": {*CLOSE, "on_policy_share", "eos_rate", "off_policy_skew_forward_kl(0.1)"},
    "promptkd": {*PROMPT, "eos_rate", "prompt_norm", "regularization_weight"},
    "promptkd_wasd": {*PROMPT, "eos_rate", "prompt_norm", "regularization_weight"},
    "promptkd_amid": {*PROMPT, "eos_rate", "prompt_norm", "regularization_weight"},
}


# The others differ from one of these in a divergence alone.
@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("method", LOGGED)
def test_a_named_method_trains(models, tmp_path, method):
    config = short(models, stage(method))
    prompted = method.startswith("promptkd")
    config.evaluation.update(
        every=2 if method in ("distillm", "wasd") else 0, prompt_effect=prompted
    )
    summary = run(config, tmp_path)
    for score in ("kl", "agreement", "loss", "rougeL", "response_length", "eos_rate", "repetition"):
        assert {f"{score}_before", f"{score}_after"} <= summary.keys(), score
    measured = {"seconds", "training_seconds", "tokens_per_second", "seconds_per_sample"}
    assert measured | {"peak_memory_gb"} <= summary.keys()
    effect = {"kl_prompted_after", "teacher_rougeL", "teacher_rougeL_prompted"}
    assert (effect <= summary.keys()) == prompted
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert summary["updates"] == 3 * METHODS[method].get("passes", 1)
    assert summary["updates_skipped"] == 0
    assert summary.pop("device") and summary.pop("versions").startswith("jax ")
    assert all(np.isfinite(value) for value in summary.values()), summary
    for row in updates(tmp_path):
        found = {name for name, value in row.items() if name != "stage" and np.isfinite(value)}
        assert (STATISTICS | LOGGED[method] | {"student_loss"}) <= found, row
    assert differ(tmp_path / "student", models / "student")
    for when in ("before", "after"):
        assert len(json.loads((tmp_path / f"{when}.json").read_text())["texts"]) == 5
    assert (tmp_path / "teacher_answers.jsonl").exists() == (method in ("seqkd", "distillm2"))


def test_a_method_takes_changes_and_says_which_there_are():
    changed = method_stage("gkd", on_policy_share=0.3, batch_size=2)
    assert changed.student_terms == (("reverse_kl", 1.0),)
    assert (changed.on_policy_share, changed.batch_size) == (0.3, 2)
    assert method_stage("gkd", name="later").name == "later"
    with pytest.raises(ValueError, match="'gdk'; there are: sft, kd, seqkd"):
        method_stage("gdk")


# Teacher views


@pytest.mark.usefixtures("no_report")
def test_the_teacher_alone_sees_demonstrations(models, tmp_path):
    config = short(models, stage("kd", teacher_view="in_context"))
    config.in_context.examples = 3
    found = prepare(config, tmp_path / "prepared")
    rows = prepare(short(models, stage("sft")), tmp_path / "rows")
    examples = np.split(np.asarray(found.stages[0].method.demonstrations), 3)
    assert not rows.stages[0].method.demonstrations
    known = [rows.stages[0].batches[i].tokens[:, :11].tolist() for i in range(3)]
    known = [row for batch in known for row in batch]
    assert all(example.tolist() in known for example in examples)
    run(config, tmp_path / "run")
    assert all(row["tokens"] == 4 * 11 for row in updates(tmp_path / "run"))
    assert all(row["kl_in_context"] > 0 for row in updates(tmp_path / "run"))


def test_demonstrations_have_to_be_there(models, config, tmp_path):
    config.stages = (stage("imitkd", teacher_view="in_context"),)
    config.in_context.examples = 13
    with pytest.raises(DataError, match=r"train.jsonl: 12 rows, of which 13 with an answer"):
        run(config, tmp_path)
    config.in_context.examples = 2
    bare = tmp_path / "requests.jsonl"
    bare.write_text("".join(f'{{"instruction": "say {i}"}}\n' for i in range(12)))
    config.data.train = str(bare)
    with pytest.raises(DataError, match="2 with an answer are wanted as demonstrations"):
        run(config, tmp_path / "bare")


def write_cache(config: ConfigDict, folder: pathlib.Path, *options: str) -> None:
    """By the command line, from the `config.json` of a run."""
    claim(folder / "run", config)
    file = folder / "run" / "config.json"
    main(["cache", f"--config={file}", f"--output={folder / 'cache'}", *options])


@pytest.fixture(scope="module")
def whole_cache(models) -> pathlib.Path:
    """k = V."""
    folder = models.parent / "whole"
    write_cache(short(models, stage("kd")), folder, f"--top-k={VOCABULARY}", "--batch-size=5")
    return folder / "cache"


def cached_config(models: pathlib.Path, folder: pathlib.Path) -> ConfigDict:
    config = short(models, stage("kd", teacher_view="cached"))
    config.cache.update(path=str(folder), top_k=VOCABULARY)
    config.evaluation.teacher = False
    return config


@pytest.mark.usefixtures("no_report")
def test_a_whole_cache_stands_for_the_teacher(models, whole_cache, tmp_path, monkeypatch):
    """On packed rows as on rows by themselves."""
    loaded, load = [], run_models.load_model

    def recorded(path, **how):
        loaded.append(path)
        return load(path, **how)

    monkeypatch.setattr(run_models, "load_model", recorded)
    config = cached_config(models, whole_cache)
    config.stages[0].packed_rows = 2
    summary = run(config, tmp_path / "cached")
    assert loaded == [str(models / "student")]
    assert not {"kl_after", "agreement_after"} & summary.keys() and "loss_after" in summary
    run(short(models, stage("kd")), tmp_path / "online")
    assert str(models / "teacher") in loaded
    assert_same(tmp_path / "cached" / "student", tmp_path / "online" / "student", atol=1e-4)
    for ours, theirs in zip(updates(tmp_path / "cached"), updates(tmp_path / "online")):
        assert ours["student_loss"] == pytest.approx(theirs["student_loss"], rel=1e-5)
        assert ours["kl_cached"] == pytest.approx(theirs["kl_plain"], rel=1e-4)
        assert all(ours[name] == theirs[name] for name in ("tokens", "response_length"))


def test_a_cache_of_something_else_is_refused_at_the_start(models, whole_cache, tmp_path):
    fresh = functools.partial(cached_config, models, whole_cache)
    teacher, tokenizer, data, kept, nowhere = (fresh() for _ in range(5))
    teacher.teacher.path = tiny.write_model(tmp_path / "other", width=32, depth=3, seed=5)
    student = tiny.write_model(tmp_path / "words", width=16, depth=2, seed=1, extra=("Ġpurple",))
    tokenizer.student.path = student
    data.data.train = tiny.write_data(tmp_path / "data.jsonl", 11)
    kept.cache.top_k = 8
    nowhere.cache.path = str(tmp_path / "nowhere")
    for number, (config, error, message) in enumerate(
        (
            (teacher, DataError, "something else.*\n  teacher: there 'sha256"),
            (tokenizer, ModelError, "different tokenizers: .* the teacher, Ġpurple of the student"),
            (data, DataError, "rows: there '12 rows.*, now '11 rows"),
            (kept, DataError, "top_k: there 275, now 8"),
            (nowhere, DataError, "nowhere: holds no cache"),
        )
    ):
        with pytest.raises(error, match=message):
            run(config, tmp_path / f"run{number}")
        assert not (tmp_path / f"run{number}" / "before.json").exists()


# The loop


@pytest.mark.usefixtures("no_report")
def test_the_next_rows_are_read_before_anything_waits_for_the_device(models, tmp_path, monkeypatch):
    """Between a step and its log; and none after the last step."""
    events, jitted_step = [], experiment.Experiment.jitted_step

    def recorded(name, function):
        def recording(*arguments):
            events.append(name)
            return function(*arguments)

        return recording

    def reading(dataset, start):
        return map(recorded("read", lambda batch: batch), stream(dataset, start))

    monkeypatch.setattr(loop, "stream", reading)
    monkeypatch.setattr(loop, "summarize", recorded("wait", loop.summarize))
    monkeypatch.setattr(jax, "block_until_ready", recorded("wait", jax.block_until_ready))
    monkeypatch.setattr(
        experiment.Experiment,
        "jitted_step",
        lambda self, stage: recorded("step", jitted_step(self, stage)),
    )
    run(short(models, stage("sft"), stage("imitkd", steps=1)), tmp_path / "run")
    in_turn = [name for name, _ in itertools.groupby(events)]
    first = ["read", "step", "read", "wait", "step", "read", "wait", "step", "wait"]
    assert in_turn == [*first, "read", "step", "wait"]


# Resuming


class Interrupted(Exception):
    """What ends a run in the middle."""


def die(config: ConfigDict, workdir: pathlib.Path, step: int, monkeypatch) -> None:
    """The run, until the step that was to be the next after `step`."""
    summarize, done = loop.summarize, len(updates(workdir)) if workdir.exists() else 0

    def dying(*arguments):
        nonlocal done
        if done == step:
            raise Interrupted
        done += 1
        return summarize(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(loop, "summarize", dying)
        run(config, workdir)


REPLAY = dict(capacity=8, threshold=1.0, tolerance=0.1, step=0.1)


@pytest.mark.usefixtures("no_report")
def test_a_run_that_died_in_every_stage_goes_on_bit_for_bit(models, tmp_path, monkeypatch, capsys):
    """What it needs is all there: replayed rows and those written ahead, the position among them,
    the teacher that learns, and a moving target."""
    replay = stage("distillm", steps=6, replay=REPLAY, one_step_off_policy=True)
    minillm = stage("minillm", minibatches=2, passes=2, warmup_steps=8, rollouts_per_prompt=2)
    online = stage("kd", teacher_view="online", teacher_learning_rate=2e-3)
    online.interpolation.update(schedule="adaptive", rate=0.5)
    config = short(models, replay, minillm, online)
    config.checkpoint.every = 1
    config.evaluation.every = 2
    whole, again = tmp_path / "whole", tmp_path / "again"
    run(config, whole)
    lines = capsys.readouterr().out.splitlines()
    assert lines.count(title(checked(config))) == 1, "before the steps, and not in front of each"
    for line, step in (
        ("distillm  step 1/12", 1),
        ("minillm  step 7/12", 7),
        ("kd  step 12/12", 12),
    ):
        assert sum(shown.startswith(f"{line}  ") for shown in lines) == 1, step
    waits = [line.split(":")[0] for line in lines if line.startswith("compiling stage ")]
    assert waits == [f"compiling stage {name}" for name in ("distillm", "minillm", "kd")]
    for step in (2, 8, 11):
        die(config, again, step, monkeypatch)
        assert not (again / "summary.json").exists()
    run(config, again)
    assert "continuing from step 11" in capsys.readouterr().out
    for model in ("student", "teacher"):
        assert_same(whole / model, again / model)
    losses = [[row["student_loss"] for row in updates(folder)] for folder in (whole, again)]
    assert losses[0] == losses[1] and len(losses[0]) == 12
    rows = {kind: [row for row in updates(whole) if row["stage"] == kind] for kind in METHODS}
    assert [row["on_policy_share"] for row in rows["distillm"]] == [1.0] * 6
    rates = [row["learning_rate"] for row in rows["minillm"]]  # 4 updates a step, from rate 0 on
    assert rates == pytest.approx([1e-3 * 3 / 8, 1e-3 * 7 / 8, 1e-3])
    shares = [row["interpolation_share"] for row in rows["kd"]]
    assert shares[0] == pytest.approx(0.4) and shares == sorted(set(shares))
    for row in rows["kd"]:
        parts = row["teacher_cross_entropy"] + row["teacher_forward_kl"]
        assert row["teacher_loss"] == pytest.approx(parts, rel=1e-5)
    assert differ(whole / "teacher", models / "teacher")


@pytest.mark.usefixtures("no_report")
def test_rows_written_ahead_are_those_of_their_step(models, tmp_path):
    """At a rate at which nothing changes, every step has the rows of the run that writes them when
    it needs them; in every stage, and the corpus beside them as well."""
    figures = []
    lines = [f"{other} say {word}" for word in tiny.WORDS for other in tiny.WORDS]
    (tmp_path / "corpus.txt").write_text("\n\n".join(lines))
    for stale in (False, True):
        some = stage("imitkd", gradient_accumulation_steps=2)
        rest = stage("gkd", on_policy_share=0.5, corpus_terms=(CE,), one_step_off_policy=stale)
        some.learning_rate = rest.learning_rate = 1e-30
        config = short(models, some, rest)
        config.stages[0].one_step_off_policy = stale
        config.data.corpus = str(tmp_path / "corpus.txt")
        run(config, tmp_path / str(stale))
        figures.append(updates(tmp_path / str(stale)))
    fresh, ahead = figures
    assert len(ahead) == 6
    assert len({row["tokens"] for row in ahead}) > 2
    for one, other in zip(fresh, ahead):
        for name in ("step", "stage", "tokens", "response_length", "eos_rate"):
            assert one[name] == other[name], name
        for name in ("student_loss", "corpus_loss"):
            assert one.get(name, 0) == pytest.approx(other.get(name, 0), rel=1e-5), name


# Other losses


@pytest.mark.usefixtures("no_report")
def test_hidden_terms_add_up_between_models_of_different_width(models, tmp_path):
    terms = (
        hidden_term("cosine", weight=0.5, projection=True),
        hidden_term("mse", weight=0.25, projection=True, layers="uniform"),
        hidden_term("relation", weight=2.0, layers=((0, 1), (1, 2))),
    )
    run(short(models, stage("kd", hidden_terms=terms)), tmp_path)
    of_terms = {"cosine_1_2": 0.5, "mse_0_1": 0.25, "mse_1_2": 0.25}
    of_terms |= {"relation_0_1": 2.0, "relation_1_2": 2.0, GOLD: 0.5, "forward_kl": 0.5}
    for row in updates(tmp_path):
        total = sum(weight * row[name] for name, weight in of_terms.items())
        assert row["student_loss"] == pytest.approx(total, rel=1e-5)


def test_hidden_states_of_different_width_need_a_projection(models, tmp_path):
    config = short(models, stage("kd", hidden_terms=(hidden_term("mse"),)))
    with pytest.raises(ConfigError, match="kd.hidden_terms: mse: the student is 16 wide"):
        run(config, tmp_path)
    assert not (tmp_path / "before.json").exists()


def test_a_student_without_a_router_has_none_to_balance(models, tmp_path):
    config = short(models, stage("kd", router_balance=0.01))
    message = r"config.stages: kd.router_balance: 0.01, but the student is no mixture of experts"
    with pytest.raises(ConfigError, match=message):
        run(config, tmp_path)


@pytest.mark.usefixtures("no_report")
def test_a_corpus_is_lines_of_text_or_of_json(models, tmp_path):
    documents = [" ".join(tiny.WORDS[i : i + 9]) for i in range(10)]
    (tmp_path / "corpus.txt").write_text("\n\n".join(documents))
    lines = [json.dumps({"text": text}) + "\n" for text in documents]
    (tmp_path / "corpus.jsonl").write_text("".join(lines))
    terms = ((GOLD, 0.5), ("forward_kl", 0.5))
    config = short(models, stage("sft", corpus_terms=terms, gradient_accumulation_steps=2))
    found = []
    for kind in ("jsonl", "txt"):
        config.data.corpus = str(tmp_path / f"corpus.{kind}")
        found.append(prepare(config, tmp_path / kind).stages[0].corpus[1])
    for ours, theirs in zip(*found):
        np.testing.assert_array_equal(ours, theirs)
    assert np.all(found[0].lengths == 24) and np.all(found[0].prompt_lengths == 1)
    run(config, tmp_path / "run")
    for row in updates(tmp_path / "run"):
        assert row["corpus_loss"] > 0
        total = row[GOLD] + row["corpus_loss"]
        assert row["student_loss"] == pytest.approx(total, rel=1e-5)


def test_a_corpus_has_to_hold_a_batch(models, config, tmp_path):
    config.stages = (stage("sft", corpus_terms=((GOLD, 1.0),)),)
    for number, (text, message) in enumerate(
        ((" \n", "no text"), ("say red", "corpus has .* a row takes 24"))
    ):
        config.data.corpus = str(tmp_path / f"{number}.txt")
        pathlib.Path(config.data.corpus).write_text(text)
        with pytest.raises(DataError, match=message):
            run(config, tmp_path / f"run{number}")


# The soft prompt


def test_a_soft_prompt_starts_from_embeddings_or_noise(models, tmp_path):
    config = short(models, stage("promptkd"))
    found = {}
    for init in ("text", "pad", "vocabulary", "random", "examples"):
        config.soft_prompt.init = init
        found[init] = prepare(config, tmp_path)
        assert found[init].learned["soft_prompt"].shape == (7, 32), init
    prompts = {init: np.asarray(made.learned["soft_prompt"]) for init, made in found.items()}
    teacher = found["text"].teacher
    table = np.asarray(embed(teacher.params, np.arange(VOCABULARY)))
    ids = teacher.tokenizer("Suppose you are a student.", add_special_tokens=False)["input_ids"]
    np.testing.assert_array_equal(prompts["text"], table[ids[:7]])
    np.testing.assert_array_equal(prompts["pad"], table[[0] * 7])
    rows = {tuple(row) for row in table}
    assert all(tuple(row) in rows for row in prompts["vocabulary"])
    assert len({tuple(row) for row in prompts["vocabulary"]}) > 3
    assert not any(tuple(row) in rows for row in prompts["random"])
    assert not any(tuple(row) in rows for row in prompts["examples"])  # each of several tokens
    config.in_context.examples = 2
    fewer = np.asarray(prepare(config, tmp_path).learned["soft_prompt"])
    assert not np.allclose(fewer, prompts["examples"])


def test_a_short_text_is_repeated(models, tmp_path):
    config = short(models, stage("promptkd"))
    config.soft_prompt.update(text="red", length=8)
    prompt = np.asarray(prepare(config, tmp_path).learned["soft_prompt"])
    np.testing.assert_array_equal(prompt[:3], prompt[3:6])
    np.testing.assert_array_equal(prompt[:2], prompt[6:])


@pytest.mark.usefixtures("no_report")
def test_the_regularisation_adapts(models, tmp_path):
    how = dict(regularization=0.5, regularization_schedule="adaptive", prompt_learning_rate=2e-3)
    run(short(models, stage("promptkd", **how)), tmp_path)
    rows = updates(tmp_path)
    coefficients = [row["regularization_weight"] for row in rows]
    assert coefficients == pytest.approx([0.5, 0.51, 0.5202], rel=1e-5)
    for row in rows:
        assert row["prompt_regularizer"] > 1.2 * 0.01  # of target_kl: the coefficient has to rise
        total = row["prompt_kd"] + row["regularization_weight"] * row["prompt_regularizer"]
        assert row["prompt_loss"] == pytest.approx(total, rel=1e-5)


# Rows that the teacher wrote


@pytest.mark.usefixtures("no_report")
def test_answers_are_written_once_for_all_runs_of_a_folder(models, tmp_path, capsys):
    config = short(models, stage("seqkd"))
    config.teacher_responses.path = str(tmp_path / "answers")
    run(config, tmp_path / "one")
    assert "the teacher writes 12 responses" in capsys.readouterr().out
    file = tmp_path / "answers" / "teacher_answers.jsonl"
    written = file.read_bytes()
    config.stages = (stage("seqkd", student_terms=(("forward_kl", 1.0),)),)
    run(config, tmp_path / "two")
    assert "the teacher writes" not in capsys.readouterr().out
    assert file.read_bytes() == written and not (tmp_path / "two" / file.name).exists()
    lengths = [[row["response_length"] for row in updates(tmp_path / w)] for w in ("one", "two")]
    assert lengths[0] == lengths[1]
    config.seed = 11
    with pytest.raises(DataError, match=r"take another place.*\n  seed: there 10, now 11$"):
        run(config, tmp_path / "three")
    assert file.read_bytes() == written


@pytest.mark.usefixtures("no_report")
def test_a_run_without_data(models, tmp_path):
    bank = tmp_path / "bank.jsonl"
    bank.write_text("".join(f'{{"instruction": "name {word}"}}\n' for word in tiny.WORDS[:4]))
    config = short(models, stage("seqkd"))
    config.data.max_length = 20  # room for 4: the sampler of the requests is that of the answers
    config.data.update(train="teacher", dev="teacher", dev_rows=3)
    sizes = dict(requests=8, round_size=6, max_request_tokens=4, max_new_tokens=4)
    config.data_free.update(bank=str(bank), **sizes)
    config.evaluation.references = "teacher"
    summary = run(config, tmp_path / "run")
    assert summary["updates"] == 3 and np.isfinite(summary["kl_after"])
    answered = (tmp_path / "run" / "dev_answers.jsonl").read_text().splitlines()
    trained = (tmp_path / "run" / "teacher_answers.jsonl").read_text().splitlines()
    assert (len(answered), len(trained)) == (3, 8)
    requests = [tuple(json.loads(line)["request"]) for line in answered + trained]
    assert len(set(requests)) == 11
    assert (tmp_path / "run" / "requests.jsonl").exists()


# Where a student starts, and where its training ends


@pytest.mark.usefixtures("no_report")
def test_a_student_of_listed_layers(models, tmp_path):
    config = short(models, stage("kd", steps=2))
    config.student.update(path="", layers=(0, 2))
    found = prepare(config, tmp_path / "prepared")
    for ours, theirs in zip(
        jax.tree.leaves(found.student.params["layers"]),
        jax.tree.leaves(found.teacher.params["layers"]),
    ):
        np.testing.assert_array_equal(ours, theirs[np.array([0, 2])])
    summary = run(config, tmp_path / "run")
    assert np.isfinite(summary["kl_after"])
    exported = json.loads((tmp_path / "run" / "student" / "config.json").read_text())
    assert exported["num_hidden_layers"] == 2


@pytest.mark.parametrize("text, layers", [("12", 12), ("(0, 2)", (0, 2))])
def test_layers_are_given_on_the_command_line(text, layers):
    source = f"--config={CONFIGS}/quickstart.py"
    config, _ = load_config([source, f"--config.student.layers={text}"])
    checked(config)
    assert config.student.layers == layers


@pytest.mark.usefixtures("no_report")
def test_the_lowest_dev_loss_can_choose_the_checkpoint(models, tmp_path, capsys, monkeypatch):
    scores = {"loss": [4.0, 1.0, 3.0, 2.0], "rougeL": [1.0, 2.0, 5.0, 3.0]}
    losses = []

    def evaluate(experiment, student=None, soft_prompt=None):
        found = whole(experiment, student, soft_prompt)
        if student is not None:  # else that of the start
            losses.append(found["loss"])
            found |= {name: values[len(losses) - 1] for name, values in scores.items()}
        return found

    whole = loop.evaluate_student
    monkeypatch.setattr(loop, "evaluate_student", evaluate)
    config = short(models, stage("sft", steps=4))
    config.evaluation.every = 1
    config.checkpoint.update(export="best", select="loss")
    config.teacher.path, config.evaluation.teacher = "", False  # as the paper's SFT runs
    summary = run(config, tmp_path)
    rows = [row for row in read_metrics(tmp_path) if "dev/loss" in row]
    assert [row["dev/loss"] for row in rows] == scores["loss"]
    said = (
        "the best checkpoint by dev loss, which is exported, is that of step 2 of 4, in stage sft"
    )
    assert said in capsys.readouterr().out
    assert "step 2 of 4, in stage sft" in (tmp_path / "student" / "README.md").read_text()
    assert summary["loss_after"] == pytest.approx(losses[1], rel=1e-6)
    assert "kl_after" not in summary


@pytest.mark.usefixtures("no_report")
def test_a_step_is_compiled_once_while_the_first_student_is_measured(
    models, tmp_path, monkeypatch, caplog
):
    """In a thread, as on a TPU; what comes out is the same. A run that goes on measures nothing."""
    threads, compile_ahead = [], training.compile_ahead

    def recorded(*arguments):
        threads.append(threading.current_thread())
        compile_ahead(*arguments)

    monkeypatch.setattr(training, "compile_ahead", recorded)
    config = short(models, stage("promptkd", one_step_off_policy=True), stage("sft", steps=1))
    config.checkpoint.every = 1
    run(config, tmp_path / "plain")
    assert not threads
    monkeypatch.setattr(training, "COMPILED_ASIDE", ("cpu",))
    jax.config.update("jax_log_compiles", True)
    try:
        run(config, tmp_path / "aside")
    finally:
        jax.config.update("jax_log_compiles", False)
    compiled = [line for line in caplog.messages if "XLA compilation of jit(step)" in line]
    assert len(compiled) == 2  # of two stages
    assert len(threads) == 1 and threading.main_thread() not in threads
    assert_same(tmp_path / "aside/student", tmp_path / "plain/student")
    die(config, tmp_path / "again", 2, monkeypatch)
    run(config, tmp_path / "again")
    assert len(threads) == 2
    assert_same(tmp_path / "again/student", tmp_path / "plain/student")


@pytest.mark.usefixtures("no_report")
def test_a_budget_of_time_ends_a_run(models, tmp_path, capsys):
    config = short(models, stage("sft", steps=200), stage("promptkd", steps=200))
    config.stop_after_seconds = 1e-6
    summary = run(config, tmp_path)
    assert summary["updates"] == 2  # the first is compilation, which does not count
    assert summary["training_seconds"] > 1e-6
    assert {row["stage"] for row in updates(tmp_path)} == {"sft"}
    assert differ(tmp_path / "student", models / "student")
    assert run(config, tmp_path) == summary
    assert "finished, nothing to do" in capsys.readouterr().out


# What cannot be


def refused(config: ConfigDict) -> str:
    with pytest.raises(ConfigError) as error:
        checked(config)
    return str(error.value)


CACHED = dict(teacher_view="cached")
CE, POLICY = (GOLD, 1.0), ("policy_gradient", 1.0)
IMPOSSIBLE = {
    "student rows, cache": (
        stage("imitkd", **CACHED),
        ["stages[0].targets: 'student' makes rows during training"],
    ),
    "replayed rows, cache": (
        stage("distillm", **CACHED),
        [
            "stages[0].targets: 'replay' makes rows during training",
            "stages[0].targets: 'replay' goes by the validation loss",
        ],
    ),
    "prompt, cache": (
        stage("kd", prompt_learning_rate=1e-3, **CACHED),
        ["stages[0].prompt_learning_rate: a cached teacher cannot be prompted"],
    ),
    "hidden states, cache": (
        stage("kd", hidden_terms=(hidden_term("relation"),), **CACHED),
        ["stages[0].hidden_terms: a cached teacher has log-probabilities but no hidden states"],
    ),
    "temperature, cache": (
        stage("kd", temperature=2.0, **CACHED),
        ["stages[0].temperature: 2 needs the whole distribution"],
    ),
    "a temperature of the student's, cache": (
        stage("kd", student_temperature=2.0, **CACHED),
        ["stages[0].student_temperature: 2 needs the whole distribution"],
    ),
    "transport, cache": (
        stage("wasd", targets="gold", **CACHED),
        ["stages[0].student_terms: transport needs the whole distribution"],
    ),
    "transport to a moving target": (
        stage("promptkd_wasd", interpolation=dict(schedule="linear")),
        ["stages[0].interpolation.schedule: 'linear' mixes teacher and student by steps"],
    ),
    "two ways to write along": (
        stage("skd", teacher_share=0.2),
        ["stages[0].teacher_top_k: 25 draws from the teacher in one way and teacher_share = 0.2"],
    ),
    "a teacher that writes along, gold rows": (
        stage("kd", teacher_top_k=5),
        ["stages[0].teacher_top_k: 5 has the teacher write along in rollouts"],
    ),
    "a teacher that writes along, policy gradient": (
        stage("opd", teacher_top_k=5),
        ["stages[0].teacher_top_k: 5, but policy_gradient has weights for tokens of a mixture"],
    ),
    "moving target, cache": (
        stage("taid", **CACHED),
        ["stages[0].interpolation.schedule: 'adaptive' mixes whole distributions"],
    ),
    "terms of rows of others, of which there are none": (
        stage("imitkd", off_policy_terms=(("forward_kl", 1.0),), row_weights="rising"),
        ["stages[0].off_policy_terms: tell rows that the student wrote from others"],
    ),
    "a weight of rows of one kind": (
        stage("gkd", row_weights="rising"),
        ["stages[0].row_weights: 'rising' weighs student_terms against off_policy_terms"],
    ),
    "cross-entropy on own rows": (
        stage("distillm2", student_terms=(CE, ("reverse_kl", 1.0))),
        ["stages[0].student_terms: cross_entropy counts rows that the student did not write"],
    ),
    "a moving target of tokens": (
        stage("sft", interpolation=dict(schedule="linear")),
        ["stages[0].interpolation.schedule: 'linear' moves the target of divergences"],
    ),
    "weights and a temperature of tokens": (
        stage("sft", token_weighting="teacher_confidence", temperature=2.0),
        [
            "stages[0].token_weighting: 'teacher_confidence' is of divergences",
            "stages[0].temperature: 2.0 is of divergences",
        ],
    ),
    "a share that falls": (
        stage("taid", interpolation=dict(schedule="adaptive", start=0.9, end=0.5)),
        ["stages[0].interpolation.start: 0.9 is above end = 0.5"],
    ),
    "tokens of the tail against each other, cache": (
        stage("csd", **CACHED),
        ["stages[0].student_terms: csd(learner, learner, 1.5) needs the whole distribution"],
    ),
    "corpus, cache": (
        stage("kd", corpus_terms=(("forward_kl", 1.0),), **CACHED),
        ["stages[0].corpus_terms: a cached teacher has not seen the corpus"],
    ),
    "cache of nowhere": (
        stage("kd", **CACHED),
        ["stages[0].teacher_view: 'cached' needs config.cache.path"],
    ),
    "policy gradient, gold rows": (
        stage("minillm", targets="gold", teacher_share=0.0),
        ["stages[0].student_terms: policy_gradient rewards what the student wrote"],
    ),
    "policy gradient, weighting": (
        stage("minillm", token_weighting="teacher_confidence"),
        ["stages[0].token_weighting: 'teacher_confidence' is not for policy_gradient"],
    ),
    "more slots than rows": (
        stage("gkd", max_concurrent_rollouts=5),
        ["stages[0].max_concurrent_rollouts: 5 are more than a step has rows; expected"],
    ),
    "slots, gold rows": (
        stage("kd", max_concurrent_rollouts=2),
        ["stages[0].max_concurrent_rollouts: 2 rows are to be written at once"],
    ),
    "lag of no prompt": (
        stage("kd", prompt_lag=1),
        ["stages[0].prompt_lag: 1, but teacher_view = 'plain' has no soft prompt"],
    ),
    "lag, several updates": (
        stage("promptkd", prompt_lag=1, passes=2),
        ["stages[0].prompt_lag: saves a forward of the teacher where a step has one update"],
    ),
    "lag, policy gradient": (
        stage("promptkd", prompt_lag=1, student_terms=(("policy_gradient", 1.0),)),
        ["stages[0].prompt_lag: policy_gradient values all rows of a step by the teacher before"],
    ),
    "packed rows of the student": (
        stage("imitkd", packed_rows=2),
        ["stages[0].packed_rows: rows are packed when their lengths are known, before a step"],
    ),
    "packed minibatches": (
        stage("kd", packed_rows=2, minibatches=2),
        ["stages[0].packed_rows: packed by their lengths, other rows would be in each of 2"],
    ),
    "packed rows, relations": (
        stage("kd", packed_rows=2, hidden_terms=(hidden_term("relation"),)),
        ["stages[0].packed_rows: a 'relation' of hidden_terms compares a token with all before"],
    ),
    "packed rows that fall back": (
        stage("promptkd", targets="gold", prompt_fallback=True, packed_rows=2),
        ["stages[0].prompt_fallback: chooses the teacher of a row, and packed_rows = 2 has"],
    ),
    "a fallback on what the teacher wrote": (
        stage("promptkd", targets="teacher", prompt_fallback=True),
        ["stages[0].prompt_fallback: compares the two teachers on the data's responses, but with"],
    ),
    "more packed rows than rows": (
        stage("kd", packed_rows=6, gradient_accumulation_steps=4),
        [
            "stages[0].gradient_accumulation_steps: 4 in each of 1 minibatches do not divide "
            "packed_rows = 6",
            "stages[0].packed_rows: 6 are more than the rows that are packed into them",
        ],
    ),
    "several responses to a prompt, rows that are not the student's": (
        stage("gkd", rollouts_per_prompt=3),
        [
            "stages[0].rollouts_per_prompt: 3 do not divide batch_size = 4",
            "stages[0].rollouts_per_prompt: 3 responses to a prompt are written in a step, but "
            "with targets = 'mixed'",
        ],
    ),
    "a rounded writer, a policy gradient": (
        stage("opd", rollout_quantize="int8"),
        ["stages[0].rollout_quantize: 'int8' draws tokens from a rounded student, which"],
    ),
    "rows ahead, gold rows": (
        stage("kd", one_step_off_policy=True),
        ["stages[0].one_step_off_policy: rows are written a step ahead, but targets = 'gold'"],
    ),
    "rows ahead, policy gradient": (
        stage("opd", one_step_off_policy=True),
        ["stages[0].one_step_off_policy: policy_gradient needs rows that the student wrote"],
    ),
    "teacher's share, gold rows": (
        stage("kd", teacher_share=0.2),
        ["stages[0].teacher_share: 0.2 mixes the teacher into rollouts"],
    ),
    "cross-entropy, student rows": (
        stage("imitkd", student_terms=(CE,)),
        ["stages[0].student_terms: cross_entropy counts rows that the student did not write"],
    ),
    "cross-entropy beside another, student rows": (
        stage("gkd", student_terms=(CE, ("reverse_kl", 1.0))),
        ["stages[0].student_terms: cross_entropy counts rows that the student did not write"],
    ),
    "samples that are not the models' own": (
        stage("minillm", sampling=sampling_config(temperature=0.5, top_k=5)),
        ["stages[0].sampling.temperature: 0.5", "stages[0].sampling.top_k: 5"],
    ),
    "weighting from a cache": (
        stage("abkd", teacher_view="cached", token_weighting="teacher_confidence"),
        ["stages[0].token_weighting: 'teacher_confidence' needs whole distributions"],
    ),
    "no weight": (
        stage("abkd", student_terms=(("forward_kl", 0.0),)),
        ["stages[0].student_terms: all weights are 0"],
    ),
    "a prompt that nobody looks at": (
        stage("sft", teacher_view="prompted"),
        ["stages[0].teacher_view: 'prompted' is of no use"],
    ),
    "a term twice": (
        stage("sft", student_terms=(CE, CE)),
        ["stages[0].student_terms: cross_entropy, cross_entropy: expected each name once"],
    ),
    "corpus of nowhere": (
        stage("sft", corpus_terms=(CE,)),
        ["stages[0].corpus_terms: need config.data.corpus"],
    ),
    "replay, no evaluation": (
        stage("distillm"),
        ["stages[0].targets: 'replay' goes by the validation loss"],
    ),
    "replay of less than a batch": (
        stage("distillm", replay=REPLAY | dict(capacity=3)),
        ["stages[0].replay.capacity: 3 is less than one batch"],
    ),
    "unknown view": (stage("kd", teacher_view="blind"), ["stages[0].teacher_view: 'blind'"]),
    "unknown rows": (stage("kd", targets="both"), ["stages[0].targets: 'both'"]),
    "unknown weighting": (
        stage("kd", token_weighting="length"),
        ["stages[0].token_weighting: 'length'"],
    ),
    "unknown schedules": (
        stage("kd", regularization_schedule="cosine", schedule="adaptive"),
        ["stages[0].regularization_schedule: 'cosine'", "stages[0].schedule: 'adaptive'"],
    ),
    "unknown hidden term": (
        stage("kd", hidden_terms=(ConfigDict(dict(hidden_term("mse")) | dict(kind="attention")),)),
        ["stages[0].hidden_terms[0].kind: 'attention'"],
    ),
    "policy gradient, corpus or teacher": (
        stage("kd", corpus_terms=(POLICY,), teacher_terms=(POLICY,)),
        ["stages[0].corpus_terms[0]: ('policy_gradient'", "stages[0].teacher_terms[0]: ('policy_"],
    ),
    "teacher's rows, cache": (
        stage("seqkd", student_terms=(("forward_kl", 1.0),), **CACHED),
        ["stages[0].targets: promptkd cache reads the data's own responses"],
    ),
    "heads of a cosine": (
        stage("kd", hidden_terms=(ConfigDict(dict(hidden_term("mse")) | dict(heads=2)),)),
        ["stages[0].hidden_terms[0]: heads: 2"],
    ),
    "minibatches": (
        stage("minillm", minibatches=3),
        ["stages[0].gradient_accumulation_steps: 1 in each of 3 minibatches do not divide"],
    ),
}


@pytest.mark.parametrize("combination", IMPOSSIBLE)
def test_an_impossible_combination_is_refused_with_the_reason(config, combination):
    impossible, messages = IMPOSSIBLE[combination]
    config.stages = (impossible,)
    found = refused(config)
    assert len(found.splitlines()) >= len(messages)
    for message in messages:
        assert f"config.{message}" in found, found


def test_a_step_of_more_rows_than_there_are_is_refused_and_the_folder_left_free(models, tmp_path):
    """The second is of another config, in the folder of the first, which never began."""
    for number in (999, 998):
        message = rf"config\.stages\[0\]\.batch_size: {number}, but there are \d+ rows of "
        with pytest.raises(DataError, match=message):
            run(short(models, stage("sft", batch_size=number)), tmp_path / "run")


@pytest.mark.parametrize("method", METHODS)
def test_conversations_are_for_every_method(method):
    checked(load_config([f"--config={CONFIGS / 'chat.py'}:method={method}"])[0])


def test_a_short_run_is_the_same_stages_in_ten_steps_each():
    short = checked(load_config([f"--config={CONFIGS / 'chat.py'}:run=short,method=gkd"])[0])
    whole = checked(load_config([f"--config={CONFIGS / 'chat.py'}:method=gkd"])[0])
    assert [stage_steps(stage, 12) for stage in short.stages] == [10, 10]
    alike = dict(steps=0, epochs=1.0, batch_size=16)
    assert tuple(dataclasses.replace(stage, **alike) for stage in short.stages) == whole.stages
    with pytest.raises(ConfigError, match=r"'run=shrt' is not one of method=.*; run=whole\|short"):
        load_config([f"--config={CONFIGS / 'chat.py'}:run=shrt"])


def test_packed_rows_behind_gates_are_refused_before_anything_is_loaded(config):
    config.soft_prompt.gated = True
    config.stages = (stage("promptkd", targets="gold", packed_rows=2),)
    assert "config.stages[0].packed_rows: 2, but a gated soft prompt can" in refused(config)
    config.stages[0].packed_rows = 0
    checked(config)


def test_a_warm_up_behind_closed_gates_is_refused(config):
    """L_reg is 0 there and has no gradient: AdamW would follow what rounding leaves of it."""
    config.soft_prompt.gated = True
    config.stages = (stage("promptkd", steps=3, prompt_warmup_steps=2),)
    assert "config.stages[0].prompt_warmup_steps: 2, but behind closed gates" in refused(config)
    config.soft_prompt.gated = False
    checked(config)


@pytest.mark.parametrize(
    "changes, title",
    [
        ({}, "kd: teacher-gpt2-1.5B into init-gpt2-120M on databricks-dolly-15k"),
        ({"title": "mine"}, "mine"),
        ({"teacher.path": "Qwen/Qwen2.5-7B@refs/pr/1"}, "kd: Qwen2.5-7B into init-gpt2-120M on"),
        ({"student.path": "runs/a/student"}, "kd: teacher-gpt2-1.5B into a/student on"),
        ({"student.path": "", "student.layers": (0, 5)}, "kd: teacher-gpt2-1.5B into 2 of its lay"),
        ({"teacher.path": "package:some/Model.Q4_1.gguf"}, "kd: Model.Q4_1 into"),
        ({"data.train": "/pail/data/more.jsonl"}, "init-gpt2-120M on more"),
        ({"data.train": "teacher"}, "init-gpt2-120M on requests that the teacher wrote"),
    ],
)
def test_a_title_says_what_is_trained(changes, title):
    file = pathlib.Path(__file__).parents[2] / "configs" / "gpt2.py"
    fields = [f"--config.{name}={value}" for name, value in changes.items()]
    config, _ = load_config([f"--config={file}", *fields])
    config.stages = (stage("kd", targets="teacher"),)
    assert title in build.title(checked(config))


def test_answers_that_no_method_reads_need_not_be_there(models, tmp_path):
    """GKD at lambda = 1 learns on the student's rows alone."""
    bare = tmp_path / "requests.jsonl"
    bare.write_text("".join(f'{{"instruction": "say {i}"}}\n' for i in range(12)))
    config = short(models, stage("gkd"))
    config.data.train = str(bare)
    assert prepare(config, tmp_path / "own").stages[0].method.on_policy_share == 1
    fallback = stage("promptkd", prompt_fallback=True)  # which judges by the data's answers
    for other in (stage("gkd", on_policy_share=0.9), fallback):
        config.stages = (other,)
        with pytest.raises(DataError, match="requests.jsonl:1, 2, .*: field 'output' is missing"):
            prepare(config, tmp_path / other.name)


def test_without_data_there_are_no_gold_answers(config):
    config.data.train = "teacher"
    config.stages = (stage("sft"), stage("gkd", on_policy_share=0.9), stage("seqkd"))
    found = refused(config)
    assert "config.stages[0].targets: 'gold' needs gold responses" in found
    assert "config.stages[1].targets: 'mixed' needs gold responses" in found
    assert len(found.splitlines()) == 2
    config.stages = (stage("imitkd", teacher_view="in_context"),)
    assert "config.in_context: demonstrations are gold responses" in refused(config)
    config.stages = (stage("promptkd", prompt_fallback=True),)
    assert "config.stages[0].prompt_fallback: compares the two teachers on gold" in refused(config)
    config.stages = (stage("seqkd"), stage("gkd"))  # whose rows are all the student's
    checked(config)  # the dev set is a file, with gold answers
    config.data.dev = "teacher"
    found = refused(config)
    assert "config.evaluation.references: 'gold', and prompts that the teacher writes" in found
    assert "config.data.dev: 'teacher' takes dev_rows" in found
    config.data.train_rows = 4
    assert "config.data.train_rows: the prompts that the teacher writes are as" in refused(config)


def test_a_recipe_that_looks_at_a_teacher_needs_one(config):
    config.teacher.path = ""
    needs = [
        stage("promptkd"),
        stage("kd"),
        stage("seqkd"),
        stage("sft", hidden_terms=(hidden_term("relation"),)),
        stage("sft", teacher_view="online", student_terms=(("forward_kl", 1.0),)),
    ]
    for one in needs:
        config.stages = (one,)
        assert "config.teacher.path: is empty, but the recipe needs a teacher" in refused(config)
    config.stages = (stage("sft"),)
    checked(config)


def test_rows_ahead_have_one_place(config):
    ahead = stage("gkd", one_step_off_policy=True)
    config.stages = (stage("imitkd", one_step_off_policy=True, batch_size=8), ahead)
    assert "config.stages: batch_size is 4 and 8 in stages with one_step_off_policy" in refused(
        config
    )
    config.stages = (stage("imitkd", batch_size=8), ahead)
    checked(config)


def test_stages_have_one_optimizer(config):
    config.stages = (stage("sft", optimizer="muon"), stage("imitkd"))
    assert "config.stages: optimizer is 'muon' and 'adamw'" in refused(config)
    config.stages = (stage("sft", optimizer="muon"), stage("imitkd", optimizer="muon"))
    checked(config)
    config.stages = (stage("sft", optimizer="soap"),)
    assert "stages[0].optimizer: 'soap' is not one of 'adamw', 'adamw_8bit'" in refused(config)


def test_all_that_contradicts_is_told_at_once(config):
    config.stages = (
        stage("imitkd", temperature=2.0, prompt_learning_rate=1e-3, **CACHED),
        stage("distillm", replay=REPLAY | dict(capacity=2)),
    )
    found = refused(config).splitlines()
    paths = [line.split(": ")[0] for line in found]
    assert paths == [
        "config.stages[0].targets",
        "config.stages[0].temperature",
        "config.stages[0].teacher_view",
        "config.stages[0].prompt_learning_rate",
        "config.stages[1].replay.capacity",
        "config.stages[1].targets",
    ]


# The recipes of the paper

STUDENTS = {
    "gpt2": ("base", "medium", "large"),
    "opt": ("1.3b", "2.7b", "6.7b"),
    "llama": ("7b",),
    "smollm2": ("360m", "135m"),
}
# (global batch, learning rate, epochs) by method and student, from the published scripts.
SUPERVISED = {
    "base": (32, 5e-4, 20),
    "medium": (32, 1e-4, 20),
    "large": (32, 1e-4, 10),
    "1.3b": (32, 5e-5, 10),
    "2.7b": (32, 5e-5, 10),
    "6.7b": (32, 1e-5, 10),
    "7b": (32, 1e-5, 10),
}
ON_POLICY = {
    "base": (256, 5e-5, 20),
    "medium": (64, 1e-5, 20),
    "large": (64, 5e-6, 15),
    "1.3b": (64, 5e-6, 10),
    "2.7b": (64, 5e-6, 10),
    "6.7b": (64, 5e-6, 10),
    "7b": (64, 5e-6, 10),
}
DISTILLM = {
    "base": (8, 5e-4, 20),
    "medium": (8, 5e-4, 20),
    "large": (8, 1e-4, 10),
    "1.3b": (8, 5e-5, 10),
    "2.7b": (8, 5e-5, 10),
    "6.7b": (8, 5e-5, 10),
    "7b": (8, 5e-5, 10),  # that of OPT: nothing is published
}
PUBLISHED = dict.fromkeys(("sft", "kd", "seqkd"), SUPERVISED)
PUBLISHED |= dict.fromkeys(("gkd", "promptkd"), ON_POLICY) | {"distillm": DISTILLM}
AMID = {"base": (32, 1e-4, 20), "medium": (32, 5e-4, 20), "large": (32, 5e-4, 10)}
WASD = dict.fromkeys(AMID, (32, 1e-4, 20))
PUBLISHED |= {
    "amid": SUPERVISED | AMID,
    "wasd": SUPERVISED | WASD,
    "todi": SUPERVISED,
    "csd": SUPERVISED,
}
PAPER = [(family, size) for family in ("gpt2", "opt", "llama") for size in STUDENTS[family]]
EPOCH = {256: 44, 64: 178, 32: 357, 8: 1429}  # updates in 11,435 rows


def recipe(family: str, student: str, method: str) -> ConfigDict:
    argument = f"{CONFIGS}/{family}.py:student={student},method={method}"
    return load_config([f"--config={argument}"])[0]


@pytest.mark.parametrize("method", [*METHODS, "teacher", "init"])
@pytest.mark.parametrize("family", STUDENTS)
def test_a_shipped_recipe_is_one_that_can_run(family, method):
    for student in STUDENTS[family]:
        config = recipe(family, student, method)
        checked(config)
        assert [one.name for one in config.stages] == [method]
        assert config.evaluation.every == EPOCH[config.stages[0].batch_size]
        assert (config.seed, config.checkpoint.export) == (10, "best")
        assert (config.data.max_prompt_length, config.data.max_length) == (256, 512)
        sampled = dict(temperature=1.0, top_k=0, top_p=1.0, no_repeat_ngram_size=6)
        sampled |= dict(min_p=0.0, repetition_penalty=1.0)
        assert config.evaluation.sampling.to_dict() == sampled


@pytest.mark.parametrize("method", ["promptkd", "kd", "init"])  # of the paper's 64 and 32 rows
def test_a_recipe_for_a_small_gpu_is_evaluated_once_an_epoch(method):
    (config, _) = load_config([f"--config={CONFIGS / 'llama32.py'}:student=1b,method={method}"])
    assert config.stages[0].batch_size == 8 and config.evaluation.every == EPOCH[8]


def test_a_shipped_recipe_says_what_there_is():
    with pytest.raises(ConfigError, match=r"student=base\|medium\|large; method=sft\|kd"):
        recipe("gpt2", "small", "kd")
    with pytest.raises(ConfigError, match=r"'method=pkd' is not one of .*promptkd\|"):
        recipe("gpt2", "base", "pkd")
    with pytest.raises(ConfigError, match=r"student=1b\|3b; method=.*; gpu=24gb\|16gb"):
        load_config([f"--config={CONFIGS / 'llama32.py'}:student=2b,gpu=24gb"])


@pytest.mark.parametrize("method", PUBLISHED)
@pytest.mark.parametrize("family, student", PAPER)
def test_published_rates_batches_and_epochs(family, student, method):
    config = recipe(family, student, method)
    (found,) = config.stages
    values = (found.batch_size, found.learning_rate, found.epochs)
    assert values == PUBLISHED[method][student]
    on_policy = method in ("gkd", "promptkd")
    assert (found.schedule, found.warmup_steps) == (
        ("constant", 100) if on_policy else ("cosine", 0)
    )
    assert (found.min_lr, found.weight_decay, found.max_grad_norm) == (1e-7, 1e-2, 1.0)
    accumulated = {256: 16, 64: 4 if family == "gpt2" else 1}
    assert found.gradient_accumulation_steps == accumulated.get(found.batch_size, 1)
    pretrained = recipe(family, student, "sft").student.path
    raw = ("sft", "kd", "seqkd", "todi", "csd")
    assert (config.student.path == pretrained) == (method in raw)


@pytest.mark.parametrize("family, student", PAPER)
def test_published_promptkd(family, student):
    config = recipe(family, student, "promptkd")
    (found,) = config.stages
    assert (found.targets, found.teacher_view) == ("student", "prompted")
    assert found.student_terms == (("reverse_kl", 1.0),)
    assert (found.prompt_divergence, found.prompt_regularizer) == ("reverse_kl",) * 2
    assert (found.regularization, found.regularization_schedule) == (1.0, "linear")
    assert found.prompt_learning_rate in (0.0, found.learning_rate)
    prompt = config.soft_prompt
    assert (prompt.length, prompt.init, prompt.text) == (7, "text", "Suppose you are a student.")
    assert prompt.add_special_tokens == (family != "gpt2")
    planned = {"base": 880, "medium": 3560, "large": 2670}
    (stage,) = checked(config).stages
    assert stage_steps(stage, 11_435) == planned.get(student, 1780)


@pytest.mark.parametrize("family, student", PAPER)
def test_published_minillm(family, student):
    (found,) = recipe(family, student, "minillm").stages
    assert (found.targets, found.teacher_share, found.passes) == ("student", 0.2, 4)
    assert found.student_terms == (("policy_gradient", 1.0), ("reverse_kl", 1.0))
    assert (found.batch_size, found.learning_rate, found.weight_decay) == (256, 5e-6, 1e-6)
    updates = found.steps * found.minibatches * found.passes
    assert updates in (5000, 4992)  # whole batches of rollouts
    assert found.batch_size // found.minibatches == (256 if student == "base" else 64)
    assert found.adam_beta2 == 0.95
    assert (found.schedule, found.warmup_steps) == ("constant", 100)
    policy = found.policy_gradient
    assert (policy.gamma, policy.reward_scaling, policy.reward_clip) == (0.95, 0.5, 100.0)
    assert policy.ratio_clip == 0.2 and policy.length_normalize


@pytest.mark.parametrize(
    "family, rate", [("gpt2", 5e-5), ("opt", 1e-5), ("llama", 1e-5)], ids=["gpt2", "opt", "llama"]
)
def test_published_pipeline_before_distillation(family, rate):
    for student in STUDENTS[family]:
        teacher, init = (recipe(family, student, method) for method in ("teacher", "init"))
        (found,) = teacher.stages
        assert (found.batch_size, found.learning_rate, found.epochs) == (32, rate, 10)
        assert teacher.checkpoint.select == "rougeL" and init.checkpoint.select == "loss"
        (found,) = init.stages
        batch_size, rate_of_student, _ = SUPERVISED[student]
        assert (found.batch_size, found.learning_rate, found.epochs) == (
            batch_size,
            rate_of_student,
            3,
        )
        assert init.student.path == recipe(family, student, "sft").student.path
        assert teacher.student.path not in (
            init.student.path,
            recipe(family, student, "kd").teacher.path,
        )


def test_published_losses():
    terms = {
        ("base", "kd"): ((GOLD, 0.5), ("forward_kl", 0.5)),
        ("base", "gkd"): (("reverse_kl", 1.0),),
        ("base", "imitkd"): (("forward_kl", 1.0),),
        ("base", "abkd"): (("alpha_beta(0.2, 0.7)", 1.0),),
        ("base", "distillm"): (("skew_forward_kl(0.1)", 1.0),),
        ("medium", "distillm"): (("skew_reverse_kl(0.1)", 1.0),),
        ("large", "distillm"): (("skew_reverse_kl(0.1)", 1.0),),
    }
    for (student, method), expected in terms.items():
        assert recipe("gpt2", student, method).stages[0].student_terms == expected
    gkd, opd, distillm = (recipe("gpt2", "base", m).stages[0] for m in ("gkd", "opd", "distillm"))
    assert (gkd.targets, gkd.on_policy_share) == ("mixed", 1.0)
    assert opd.policy_gradient.gamma == 0.0 and opd.policy_gradient.whiten == "none"
    assert distillm.replay.to_dict() == dict(capacity=1000, threshold=0.0, tolerance=0.1, step=0.1)
