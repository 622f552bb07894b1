"""The door: a command is a file and a line, and its errors and its end are those of Unix tools."""

import dataclasses
import importlib
import os
import re
import subprocess
import sys
import textwrap

import pytest

from promptkd_jax import cli
from promptkd_jax.cli.main import COMMANDS, LESS_MEMORY, main, parser_of
from promptkd_jax.studies.comparison import ComparisonConfig
from promptkd_jax.training.config.fields import RunConfig

TOY = '''
    """A toy: `promptkd toy --count N`."""

    from promptkd_jax.cli import flags
    from promptkd_jax.infra.errors import DataError
    from promptkd_jax.infra.specs import Int

    {usage}


    def add_arguments(parser):
        parser.add_argument("--count", type=flags.of(Int(low=1)), default=1, help="of toys")


    def run(options, rest):
        if options.count > 3:
            raise DataError(f"--count: {{options.count}} toys, expected at most 3")
        print(options.count, rest)
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """toy(usage) adds a command as CONTRIBUTING.md says: a file in cli/, and a line in COMMANDS."""

    def toy(usage: str = "") -> None:
        (tmp_path / "toy.py").write_text(textwrap.dedent(TOY.format(usage=usage)))
        monkeypatch.setattr(cli, "__path__", [*cli.__path__, str(tmp_path)])
        monkeypatch.setitem(COMMANDS, "toy", "a toy to play with")

    yield toy
    sys.modules.pop("promptkd_jax.cli.toy", None)


def ended(*arguments: str) -> object:
    """The message or the status that a command ends with."""
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    return raised.value.code


def test_a_command_is_a_file_and_a_line(toy, capsys):
    toy()
    main(["toy", "--count=2"])
    assert capsys.readouterr().out == "2 []\n"
    assert ended("toy", "--count=4") == "promptkd toy: --count: 4 toys, expected at most 3"
    assert ended("toy", "--count=0") == ended("toy", "--config=a.py") == 2
    said = capsys.readouterr().err
    assert "argument --count: '0' is not an int >= 1" in said
    assert "unrecognized arguments: --config=a.py" in said
    assert ended("toy", "--help") == 0 and ended("--help") == 0
    said = capsys.readouterr().out
    assert "A toy: `promptkd toy --count N`." in said and "  toy        a toy to play with" in said


def test_no_memory_left_is_answered_with_what_the_command_has(toy, monkeypatch):
    """Flags of the command, and fields of the config that it takes."""
    toy()

    def run(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nmore")

    module = importlib.import_module("promptkd_jax.cli.toy")
    monkeypatch.setattr(module, "run", run)
    said = "promptkd toy: no memory left (RESOURCE_EXHAUSTED: out of memory); "
    assert ended("toy") == f"{said}take a device or a machine with more"
    monkeypatch.setitem(LESS_MEMORY, "toy", "try a smaller --count")
    assert ended("toy") == f"{said}try a smaller --count"


@pytest.mark.parametrize("name", COMMANDS)
def test_advice_names_flags_that_a_command_has(name):
    advice = LESS_MEMORY.get(name, "")
    if name == "reproduce":  # of another command
        advice = re.sub("`[^`]*`", "", advice)
    parser, takes_config = parser_of(name)
    for flag in re.findall(r"--[a-z-]+", advice):
        assert flag in parser._option_string_actions
    groups = {"compare": ComparisonConfig}
    fields = {f.name for f in dataclasses.fields(groups.get(name, RunConfig))}
    named = re.findall(r"config\.(\w+)(?:\[0\])?\.(\w+)", advice)
    assert takes_config or not named
    assert {group for group, _ in named} <= fields


def test_a_command_with_usage_gets_the_arguments_of_a_config(toy, capsys):
    toy('USAGE = "--config FILE[:arg] [--count N]"')
    main(["toy", "--config=a.py", "--config.b=1"])
    assert capsys.readouterr().out == "1 ['--config=a.py', '--config.b=1']\n"
    assert parser_of("toy")[1]


@pytest.mark.parametrize(
    "command", [["train", "--help-config"], ["train", "--help-config=mesh"], ["--help"]]
)
def test_a_reader_that_goes_away_ends_a_command_quietly(command):
    """As in `promptkd … | head`: also where all of it waits in a buffer until the end."""
    reader, writer = os.pipe()
    os.close(reader)
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": ""}
    how = dict(stdout=writer, stderr=subprocess.PIPE, env=environment)
    done = subprocess.run([sys.executable, "-m", "promptkd_jax", *command], **how)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("argument", ["--request=a\udcff", "\ud83d", "--data=a\udc80.jsonl"])
def test_bytes_that_are_no_text_are_refused_before_a_command_sees_them(argument):
    with pytest.raises(SystemExit, match="is not UTF-8; expected text that is") as end:
        main(["generate", "--model", "x", argument])
    assert str(end.value.code).isascii()
