"""The README's Python runs as it stands, and its configs and commands exist."""

import pathlib
import re
import sys

import pytest
from helpers import tiny

from promptkd_jax.cli.main import COMMANDS
from promptkd_jax.studies.comparison import plan_comparison
from promptkd_jax.training.config import load_config
from promptkd_jax.training.fields import check_recipe
from promptkd_jax.training.recipes import METHODS

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_examples_run_one_after_the_other(tmp_path, monkeypatch):
    tiny.write_model(tmp_path / "teacher", width=32, depth=3, seed=0)
    tiny.write_model(tmp_path / "student", width=16, depth=2, seed=1)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 5
    namespace = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["state"].step == 1


def test_every_config_named_is_one(tmp_path):
    named = set(re.findall(r"configs/\w+\.py(?::[\w.=,]+)?", README))
    assert {"configs/quickstart.py", "configs/gpt2.py:student=base"} <= named
    for name in named:
        for method in METHODS if "NAME" in name else [""]:
            config, _ = load_config([f"--config={ROOT / name.replace('NAME', method)}"])
            plan_comparison(config, tmp_path) if "methods" in config else check_recipe(config)


def test_every_method_is_a_row_of_the_table():
    rows = re.findall(r"^\| `(\w+)` \| .* \| .* \| .* \|.*\|$", README, flags=re.MULTILINE)
    assert tuple(name for name in rows if name in METHODS) == tuple(METHODS)


def test_every_command_named_exists():
    for command in re.findall(r"promptkd (\w+) --", README):
        assert command in COMMANDS, command


def test_importing_touches_no_device_and_reads_no_flags():
    import subprocess

    code = "import promptkd_jax, jax; assert not jax._src.xla_bridge._backends; print('clean')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "clean"


@pytest.mark.parametrize("student", ["base", "medium", "large"])
def test_gpt2_recipe_is_the_published_one(student):
    config, _ = load_config([f"--config={ROOT}/configs/gpt2.py:student={student}"])
    check_recipe(config)
    (stage,) = config.stages
    published = {"base": (256, 5e-5, 20), "medium": (64, 1e-5, 20), "large": (64, 5e-6, 15)}
    assert (stage.batch_size, stage.learning_rate, stage.epochs) == published[student]
    assert (stage.weight_decay, stage.clip, stage.warmup_steps) == (1e-2, 1.0, 100)
    assert config.soft_prompt.length == 7 and config.seed == 10
    assert (config.data.max_prompt_length, config.data.max_length) == (256, 512)
    assert (stage.teacher_view, stage.targets, stage.regularisation) == ("prompted", "student", 1.0)
