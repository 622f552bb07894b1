"""The README's Python runs as it stands, and its configs and commands exist."""

import itertools
import json
import pathlib
import re
import shlex
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from conftest import environment
from helpers import tiny
from helpers.chats import CHATML, chat_tokenizer, unmarked

from promptkd_jax.cli.main import COMMANDS, main
from promptkd_jax.infra.metrics import read_metrics
from promptkd_jax.studies.comparison import plan_comparison
from promptkd_jax.training.config import field_help
from promptkd_jax.training.config.checks import checked
from promptkd_jax.training.config.config_file import load_config
from promptkd_jax.training.recipes import METHODS

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = {file.name: file.read_text() for file in [ROOT / "README.md", *ROOT.glob("docs/*.md")]}


@pytest.mark.parametrize("page", ["README.md", "api.md"])
def test_examples_run_one_after_the_other(page, tmp_path, monkeypatch):
    tiny.write_model(tmp_path / "teacher", width=32, depth=3, seed=0)
    tiny.write_model(tmp_path / "student", width=16, depth=2, seed=1)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGES[page], flags=re.DOTALL)
    namespace = {}
    for block in blocks:
        exec(compile(block, page, "exec"), namespace)
    assert all(jnp.any(x != 0) for x in jax.tree.leaves(namespace["gradient"]))
    assert page == "README.md" or (namespace["state"].step, namespace["state"].skipped) == (1, 0)


SHORTER = """
import runpy

def get_config(arg=""):
    config = runpy.run_path({path!r})["get_config"](arg)
    config.data.update(max_prompt_length=64, max_length=120)
    return config
"""


def test_the_way_from_a_file_of_messages_is_walked_word_for_word(tmp_path):
    """Its commands, on data like its line, which fits into rows of 120 tokens, and tiny models."""
    section = README[README.index("## Your own teacher, student and data") :]
    line, commands = re.findall(r"```(?:json|bash)\n(.*?)```", section, flags=re.DOTALL)[:2]
    for name, count in ("train", 17), ("dev", 3):
        lines = [line.replace("sky", f"{name} {number}") for number in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    for name, width in ("teacher", 32), ("student", 16):
        folder, words = tmp_path / "path/to" / name, chat_tokenizer(unmarked(CHATML))
        tiny.write_model(folder, width=width, depth=2, seed=width, words=words)
    (tmp_path / "configs").mkdir()
    config = SHORTER.format(path=str(ROOT / "configs" / "chat.py"))
    (tmp_path / "configs" / "chat.py").write_text(config)
    command = tmp_path / ".venv/bin/promptkd"
    command.parent.mkdir(parents=True)
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m promptkd_jax "$@"\n')
    command.chmod(0o755)
    done = subprocess.run(
        ["bash", "-e", "-c", commands],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Blue.«<|im_end|>»" in done.stdout and "train.jsonl: 17 rows" in done.stdout
    updates = [line for line in read_metrics(tmp_path / "runs/mine") if "student_loss" in line]
    assert len(updates) == 20
    assert (tmp_path / "runs/mine/student/model.safetensors").exists()


def test_the_commands_for_a_small_gpu_run_and_say_what_the_pages_say(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(ROOT)
    (command,) = re.findall(r"^\.venv/bin/promptkd (plan .*--device.*?)  #", README, re.MULTILINE)
    main(shlex.split(command))
    assert "FITS" in capsys.readouterr().out
    for gpu, device in (("24gb", "24GB"), ("16gb", "16GB")):
        output = tmp_path / f"{gpu}.json"
        config = f"--config=configs/llama32.py:student=1b,gpu={gpu}"
        main(["plan", config, f"--device={device}", f"--output={output}"])
        memory = json.loads(output.read_text())["memory"]
        kept = memory["kept"]
        sizes = kept["teacher"], kept["student"], kept["optimizers"], memory["temporaries"]
        row = " | ".join(f"{size / 2**30:.2f}" for size in (*sizes, memory["needed"]))
        assert row in PAGES["memory.md"]
        assert f"{memory['needed'] / 2**30:.0f} of 24 GiB" in README or gpu != "24gb"


def test_a_first_page_is_read_in_a_sitting():
    assert README.count("\n") <= 250


def test_the_file_map_is_that_of_the_package():
    """One line a file, or one for small files of a kind; `io/` is a folder of `models`."""
    lines = README[README.index("```text\npromptkd_jax/\n") :].splitlines()[2:]
    package, folder, mapped = ROOT / "promptkd_jax", pathlib.Path(), []
    for line in itertools.takewhile(lambda line: line != "```", lines):
        names, said = re.fullmatch(r" +(\S+(?: \S+)*) {2,}(\S.*)", line).groups()
        assert said, line
        of_root = line[2:3] != " "
        if names.endswith("/") and of_root:
            folder = pathlib.Path(names)
        elif names.endswith("/"):
            files = (package / folder / names).glob("[!_]*.py")
            mapped += [str(file.relative_to(package)) for file in files]
        else:
            mapped += [name if of_root else str(folder / name) for name in names.split(" ")]
    files = [str(file.relative_to(package)) for file in package.rglob("*.py")]
    assert sorted(mapped) == sorted(f for f in files if "/" not in f or "__init__" not in f)


def test_the_page_of_fields_is_the_table():
    """`fields_markdown()` writes it."""
    assert PAGES["fields.md"] == field_help.fields_markdown()


def test_links_between_pages_lead_somewhere():
    for name, text in PAGES.items():
        folder = ROOT if name == "README.md" else ROOT / "docs"
        for target in re.findall(r"\]\(([^)#\s]+)\)", text):
            assert "://" in target or (folder / target).exists(), (name, target)


def test_every_config_named_is_one(tmp_path):
    every = "\n".join(PAGES.values())
    named = set(re.findall(r"configs/\w+\.py(?::[\w.=,]+)?", every))
    assert {"configs/quickstart.py", "configs/gpt2.py:student=base"} <= named
    for name in named:
        for method in METHODS if "NAME" in name else [""]:
            config, _ = load_config([f"--config={ROOT / name.replace('NAME', method)}"])
            plan_comparison(config, tmp_path) if "methods" in config else checked(config)


def test_every_method_is_a_row_of_a_table():
    """The paper's methods of the README's, the newer ones of that in docs/methods.md."""
    text = README + PAGES["methods.md"]
    rows = re.findall(r"^\| `(\w+)` \| .* \| .* \| .* \|.*\|$", text, flags=re.MULTILINE)
    assert sorted(name for name in rows if name in METHODS) == sorted(METHODS)


def test_every_command_named_exists():
    for command in re.findall(r"promptkd (\w+) --", "\n".join(PAGES.values())):
        assert command in COMMANDS, command


def test_importing_touches_no_device_and_reads_no_flags():
    code = "import promptkd_jax, jax; assert not jax._src.xla_bridge._backends; print('clean')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "clean"


@pytest.mark.parametrize("student", ["base", "medium", "large"])
def test_gpt2_recipe_is_the_published_one(student):
    config, _ = load_config([f"--config={ROOT}/configs/gpt2.py:student={student}"])
    checked(config)
    (stage,) = config.stages
    published = {"base": (256, 5e-5, 20), "medium": (64, 1e-5, 20), "large": (64, 5e-6, 15)}
    assert (stage.batch_size, stage.learning_rate, stage.epochs) == published[student]
    assert (stage.weight_decay, stage.max_grad_norm, stage.warmup_steps) == (1e-2, 1.0, 100)
    assert config.soft_prompt.length == 7 and config.seed == 10
    assert (config.data.max_prompt_length, config.data.max_length) == (256, 512)
    assert (stage.teacher_view, stage.targets, stage.regularization) == ("prompted", "student", 1.0)
