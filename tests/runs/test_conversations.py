"""Runs on conversations: rows of all turns, prompts of each, and a template's own end of a turn."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from helpers import tiny
from helpers.chats import CHATML, chat_tokenizer, conversation, unmarked
from helpers.files import write_lines
from transformers import AutoTokenizer

from promptkd_jax.cli import cache
from promptkd_jax.cli.main import main
from promptkd_jax.data.reading.records import Record
from promptkd_jax.infra import sharding
from promptkd_jax.infra.errors import ConfigError, DataError, ModelError
from promptkd_jax.infra.metrics import read_metrics
from promptkd_jax.plan.remat import with_chosen_remat
from promptkd_jax.training import prepare
from promptkd_jax.training import run as training
from promptkd_jax.training.config.checks import checked
from promptkd_jax.training.recipes import base_config, stage_config

pytestmark = pytest.mark.usefixtures("no_report")

TEMPLATE, END, EOS = unmarked(CHATML), 2, 0
TERMS = (("forward_kl", 0.5), ("cross_entropy", 0.5))


def talks() -> list[Record]:
    words = tiny.WORDS
    return [
        conversation(
            *(f"{words[(i + j) % 7]} {words[(i * j) % 11]}" for j in range(2 + 2 * (i % 3)))
        )
        for i in range(12)
    ]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> pathlib.Path:
    """A teacher with a chat template, and a student of its vocabulary without one."""
    folder = tmp_path_factory.mktemp("models")
    words = chat_tokenizer(TEMPLATE), chat_tokenizer(None)
    tiny.write_model(folder / "teacher", width=32, depth=2, seed=0, words=words[0])
    tiny.write_model(folder / "student", width=16, depth=2, seed=1, words=words[1])
    return folder


@pytest.fixture
def config(models, tmp_path):
    """Two stages on conversations: on the data's responses, and on the student's own."""
    lines = ({"messages": list(talk.messages)} for talk in talks())
    file = write_lines(tmp_path / "talks.jsonl", *lines)
    config = base_config()
    config.teacher.path, config.student.path = str(models / "teacher"), str(models / "student")
    config.data.update(train=file, dev=file, template="chat", supervise="all", dev_rows=3)
    config.data.update(max_prompt_length=100, max_length=128)
    config.evaluation.update(batch_size=3, samples=1)
    shared = dict(student_terms=TERMS[:1], batch_size=4, learning_rate=1e-3, steps=2)
    config.stages = (
        stage_config("gold", **(shared | {"student_terms": TERMS})),
        stage_config("own", targets="student", **shared),
    )
    return config


def run(config, workdir):
    return training.run(checked(config), workdir, with_chosen_remat)


def saved(workdir):
    """The template, the ends and the record of a run's student."""
    folder = workdir / "student"
    generation = json.loads((folder / "generation_config.json").read_text())
    said = json.loads((folder / "promptkd.json").read_text())
    return AutoTokenizer.from_pretrained(folder).chat_template, generation["eos_token_id"], said


def test_a_run_on_every_turn(config, tmp_path, capsys):
    workdir = tmp_path / "run"
    config.student.remat = "auto"  # its estimate looks at rows of this kind
    run(config, workdir)
    out = capsys.readouterr().out
    assert f"the chat template is that of the teacher, {config.teacher.path}" in out
    assert "rows end with <|im_end|>, as the chat template ends a turn" in out
    assert "talks.jsonl: 12 rows, 0 dropped" in out
    assert (
        "talks.jsonl, turn by turn: 24 rows, 0 dropped" in out
    )  # 4 conversations each of 1, 2, 3 turns
    template, ends, said = saved(workdir)
    assert (template, ends) == (TEMPLATE, [END, EOS])
    assert said["template"] == "chat"
    lines = [line for line in read_metrics(workdir) if "student_loss" in line]
    assert len(lines) == 4 and all(np.isfinite(line["student_loss"]) for line in lines)
    assert not any(line.get("tokens_beyond") for line in lines)
    # Its own template and ends are known to whoever asks it, and to an export.
    main(["generate", f"--model={workdir}", "--request=say red", "--max-new-tokens=4"])
    assert "template chat (that of the training)" in capsys.readouterr().err
    main(["export", f"--workdir={workdir}", f"--output={tmp_path / 'again'}"])
    assert saved(tmp_path / "again") == (template, ends, said)


def test_the_rows_of_each_stage(config, tmp_path):
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1})
    config.stages = (*config.stages, stage_config("teacher", targets="teacher", steps=1))
    config.stages[2].update(student_terms=TERMS, batch_size=4)
    with jax.set_mesh(mesh):
        made = prepare.prepare(checked(config), tmp_path, mesh)
    gold, own, teacher = (stage.batches[0] for stage in made.stages)
    assert gold.supervised.shape == gold.tokens.shape
    assert own.supervised is None and teacher.supervised is None
    assert (gold.tokens[gold.supervised] == END).sum() >= 4
    assert made.student.eos_ids == made.teacher.eos_ids == (END, EOS)
    for b in range(4):
        before = own.tokens[b, : own.prompt_lengths[b]]
        assert made.student.tokenizer.decode(before).endswith("<|im_start|>assistant\n")
        assert own.tokens[b, own.lengths[b] - 1] == END


def test_a_cache_of_every_turn(config, models, tmp_path, capsys):
    """Its teacher is not loaded then; the template is still the teacher's."""
    config.stages = config.stages[:1]
    cache.cache(checked(config), tmp_path / "cache", top_k=8, batch_size=4)
    assert "8 largest log-probabilities" in capsys.readouterr().out
    config.stages[0].teacher_view = "cached"
    config.cache.update(path=str(tmp_path / "cache"), top_k=8)
    config.evaluation.teacher = False
    run(config, tmp_path / "run")
    lines = [line for line in read_metrics(tmp_path / "run") if "student_loss" in line]
    assert len(lines) == 2 and all(np.isfinite(line["student_loss"]) for line in lines)
    assert saved(tmp_path / "run")[0] == TEMPLATE


def test_a_chat_template_of_a_file_or_of_the_teacher(config, models, tmp_path):
    own = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|endoftext|>{% endfor %}"
    file = tmp_path / "own.jinja"
    file.write_text(own)
    config.stages, config.data.supervise = config.stages[:1], "last"
    config.evaluation.teacher = False
    config.data.chat_template = str(file)
    run(config, tmp_path / "file")
    assert saved(tmp_path / "file")[:2] == (own, EOS)
    # The student has one of its own, and is to take the teacher's.
    words = chat_tokenizer(own)
    config.student.path = tiny.write_model(
        tmp_path / "student", width=16, depth=2, seed=1, words=words
    )
    config.data.chat_template = ""
    run(config, tmp_path / "own")
    assert saved(tmp_path / "own")[:2] == (own, EOS)
    config.data.chat_template = "teacher"
    run(config, tmp_path / "teacher")
    assert saved(tmp_path / "teacher")[:2] == (TEMPLATE, [END, EOS])
    config.teacher.path = str(models / "student")
    with pytest.raises(ModelError, match="chat_template: 'teacher', and .*student has none"):
        run(config, tmp_path / "none")
    config.data.chat_template = str(tmp_path / "no.jinja")
    with pytest.raises(DataError, match="no.jinja: cannot be read"):
        run(config, tmp_path / "none")


def test_a_chat_template_of_a_flag(models, tmp_path, capsys):
    file = tmp_path / "own.jinja"
    file.write_text(TEMPLATE)
    ask = ["generate", f"--model={models / 'student'}", "--request=say red", "--max-new-tokens=3"]
    main([*ask, f"--chat-template={file}"])
    assert f"template chat (that of {file})" in capsys.readouterr().err
    data = tiny.write_data(tmp_path / "data.jsonl", 3)
    scores = tmp_path / "scores"
    short = ["--max-prompt-length=60", "--max-length=64", "--seeds", "1"]
    main(
        ["evaluate", f"--model={models / 'student'}", f"--data={data}", f"--output={scores}"]
        + [*short, f"--chat-template={file}", "--long-prompts=cut"]
    )
    (asked,) = json.loads((scores / "evaluation.json").read_text())["models"].values()
    assert (asked["chat_template"], asked["long_prompts"]) == (str(file), "cut")
    # Another text in the same file asks otherwise: what was answered does not stand for it.
    file.write_text(TEMPLATE + "{# another #}")
    with pytest.raises(SystemExit, match="chat_template"):
        main(
            ["evaluate", f"--model={models / 'student'}", f"--data={data}", f"--output={scores}"]
            + [*short, f"--chat-template={file}", "--long-prompts=cut"]
        )
    own = tmp_path / "own"
    shutil.copytree(models / "student", own)
    (own / "chat_template.jinja").write_text(TEMPLATE)
    plain = ["evaluate", f"--model={own}", f"--data={data}", f"--output={tmp_path / 'own-scores'}"]
    main([*plain, *short, "--template=chat"])
    (own / "chat_template.jinja").write_text(TEMPLATE + "{# another #}")
    with pytest.raises(SystemExit, match="chat_template"):
        main([*plain, *short, "--template=chat"])
    with pytest.raises(SystemExit, match="no.jinja: cannot be read"):
        main([*ask, f"--chat-template={tmp_path / 'no.jinja'}"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"template": "plain", "system": "be kind"},
            "data.system: template 'plain' renders a ",
        ),
        ({"template": "alpaca", "chat_template": "a.jinja"}, "data.chat_template: template 'alp"),
        ({"supervise": "first"}, "data.supervise: 'first' is not one of 'last', 'all'"),
        ({"long_prompts": "left"}, "data.long_prompts: 'left' is not one of 'drop', 'cut'"),
    ],
)
def test_what_a_config_says_of_conversations(config, changes, message):
    config.data.update(**changes)
    with pytest.raises(ConfigError, match=message):
        checked(config)


def test_contradictions_of_two_fields(config):
    config.stages[1].update(teacher_view="in_context")
    with pytest.raises(ConfigError, match=r"stages\[1\].teacher_view: .* data.supervise = 'last'"):
        checked(config)
    config.stages, config.teacher.path = config.stages[:1], ""
    config.data.chat_template = "teacher"
    with pytest.raises(ConfigError, match="chat_template: 'teacher' needs config.teacher.path"):
        checked(config)
