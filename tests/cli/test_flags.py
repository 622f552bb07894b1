"""Flags are checked as the fields of a config are, and the messages name them."""

import argparse
import pathlib

import fsspec
import pytest

from promptkd_jax.cli import flags
from promptkd_jax.cli.main import COMMANDS, main, parser_of
from promptkd_jax.infra.errors import ConfigError
from promptkd_jax.infra.files import Path
from promptkd_jax.infra.specs import Float, Int
from promptkd_jax.models.sampling_rules import Sampling

CONFIG = "--config=configs/rehearsal.py"
NEEDED = {
    "data": ["--data=absent.jsonl", "--model=absent"],
    "init": ["--teacher=absent", "--layers=2", "--output=new"],
    "train": [CONFIG, "--workdir=new"],
    "evaluate": ["--model=absent", "--data=absent.jsonl", "--output=new"],
    "generate": ["--model=absent", "--request=say red"],
    "cache": [CONFIG, "--output=new"],
    "compare": ["--config=configs/compare.py:small", "--workdir=new"],
    "plan": [CONFIG, "--topology=v5e:2x2"],
    "reproduce": ["--config=configs/gpt2.py:student=base", "--workdir=new"],
    "export": ["--workdir=absent", "--output=new"],
}
SAMPLING = [
    *(("--temperature", "-1"), ("--temperature", "nan"), ("--temperature", "inf")),
    *(("--top-p", "0"), ("--top-p", "-0.2"), ("--top-p", "1.1"), ("--top-p", "nan")),
    *(("--top-k", "-1"), ("--top-k", "1.5"), ("--no-repeat-ngram-size", "-1")),
    *(("--min-p", "-0.1"), ("--min-p", "1.1"), ("--repetition-penalty", "0")),
]
LENGTHS = [("--max-prompt-length", "0"), ("--max-prompt-length", "-3")]
PROCESSES = [
    *(("--processes", "0"), ("--process", "-1"), ("--heartbeat", "0")),
    *(("--start-timeout", "-5"), ("--start-timeout", "soon")),
]
WRONG = {
    "data": [*LENGTHS, ("--max-length", "1")],
    "init": [("--dtype", "float16"), ("--layers", "-1")],
    "train": PROCESSES,
    "evaluate": [
        *(*SAMPLING, *LENGTHS, *PROCESSES, ("--max-length", "1"), ("--batch-size", "0")),
        *(("--seeds", "-1"), ("--seeds", str(2**32)), ("--seeds", "ten")),
        *(("--format", "csv"), ("--columns", "prompt"), ("--columns", '{"promt": "query"}')),
    ],
    "generate": [*SAMPLING, *LENGTHS, *PROCESSES, ("--max-new-tokens", "0"), ("--seed", "-1")],
    "cache": [*PROCESSES, ("--top-k", "0"), ("--batch-size", "0")],
    "compare": [],
    "plan": [
        *(("--slices", "0"), ("--rows", "-1"), ("--compile", "0")),
        *(("--price", "-1"), ("--price", "nan"), ("--price", "inf")),
    ],
    "reproduce": [*PROCESSES, ("--seeds", "-1")],
    "export": [*PROCESSES, ("--step", "-1"), ("--step", "first")],
}
PATHS = {
    "data": ("--data", "--model", "--test", "--output"),
    "init": ("--teacher", "--output"),
    "train": ("--workdir", "--config"),
    "evaluate": ("--model", "--data", "--output"),
    "generate": ("--model",),
    "cache": ("--output", "--config", "--config.teacher.path", "--config.data.train"),
    "compare": ("--workdir", "--config", "--config.run.data.dev", "--config.test.sets.test"),
    "plan": ("--output", "--config", "--config.student.path"),
    "reproduce": ("--workdir", "--config", "--config.teacher_responses.path"),
    "export": ("--workdir", "--output"),
}


def refused(command: str, arguments: list[str], capsys) -> str:
    """What a command says that ends before it does anything."""
    with pytest.raises(SystemExit) as raised:
        main([command, *arguments])
    assert raised.value.code not in (None, 0)
    return f"{raised.value.code} {capsys.readouterr().err}"


@pytest.mark.parametrize("command", COMMANDS)
def test_no_flag_is_read_unchecked(command):
    """A bare `int` takes -1 and a bare `float` NaN; `pathlib` makes `gs:/` of `gs://`."""
    parser = parser_of(command)[0]
    bare = (int, float, pathlib.Path, pathlib.PurePath)
    assert [action.dest for action in parser._actions if action.type in bare] == []


@pytest.mark.parametrize(
    ("command", "flag", "value"), [(name, *pair) for name, pairs in WRONG.items() for pair in pairs]
)
def test_a_value_that_means_nothing_is_refused_by_name(command, flag, value, capsys, tmp_path):
    said = refused(command, [*NEEDED[command], flag, value], capsys)
    assert f"argument {flag}: " in said and repr(value) in said


def test_the_message_says_what_would_be_right(capsys):
    said = refused("generate", [*NEEDED["generate"], "--top-p=0"], capsys)
    assert "argument --top-p: '0' is not a number > 0 and <= 1" in said
    said = refused("evaluate", [*NEEDED["evaluate"], "--batch-size=2.5"], capsys)
    assert "argument --batch-size: '2.5' is not an int >= 1" in said
    said = refused("evaluate", [*NEEDED["evaluate"], "--seeds", "1", "2", "1"], capsys)
    assert "argument --seeds: [1, 2, 1] has one of them twice" in said


@pytest.mark.parametrize("command", ["evaluate", "generate"])
@pytest.mark.parametrize("mesh", ["0,1,1", "-1,-1,1", "1,1", "1,1,-2", "1,1,x"])
def test_a_mesh_that_there_is_not(command, mesh, capsys):
    said = refused(command, [*NEEDED[command], f"--mesh={mesh}"], capsys)
    assert f"--mesh: {mesh!r} is not data,fsdp,tensor" in said


def test_a_mesh_of_other_devices_names_the_flag(capsys):
    said = refused("generate", [*NEEDED["generate"], "--mesh=3,1,1"], capsys)
    assert "--mesh: data=3 x fsdp=1 x tensor=1 does not make 1 devices" in said


@pytest.mark.parametrize(
    ("spec", "texts"),
    [
        (Int(low=0), ("0", "7", "1000000")),
        (Float(low=0.0), ("0", "1e-3", "2")),
        (Float(low=0.0, high=1.0, open_low=True), ("1", "0.001")),
        (Path(), ("runs/a", "owner/name", "package:NAME/FILE", "synthetic:train", "a:b.jsonl")),
    ],
)
def test_what_is_in_range_is_taken(spec, texts):
    for text in texts:
        value = flags.of(spec)(text)
        assert value == (text if isinstance(spec, Path) else type(value)(float(text)))


@pytest.mark.parametrize(
    "wrong",
    [
        *(dict(temperature=-1.0), dict(temperature=float("nan")), dict(temperature=float("inf"))),
        *(dict(top_p=0.0), dict(top_p=1.5), dict(top_k=-1), dict(no_repeat_ngram_size=-1)),
    ],
)
def test_the_library_refuses_them_too(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"^{name}: .* is not "):
        Sampling(**wrong)


# Paths


@pytest.fixture
def without_gcsfs(monkeypatch):
    def absent(scheme):
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr(fsspec, "get_filesystem_class", absent)


@pytest.mark.parametrize(
    ("command", "flag"), [(name, flag) for name, listed in PATHS.items() for flag in listed]
)
def test_a_bucket_out_of_reach_is_refused_at_once(
    command, flag, without_gcsfs, capsys, tmp_path, monkeypatch
):
    """Before anything is loaded, with what to install; nothing is written to ./gs:/."""
    root = pathlib.Path(__file__).parents[2]
    given = [part.replace("configs/", f"{root}/configs/") for part in NEEDED[command]]
    monkeypatch.chdir(tmp_path)
    given = [part for part in given if not part.startswith(f"{flag}=")]
    said = refused(command, [*given, f"{flag}=gs://pail/a.py"], capsys)
    if (command, flag) in (("compare", "--workdir"), ("cache", "--output")):
        assert f"argument {flag}: 'gs://pail/a.py' is not a folder of a disk" in said
    else:
        assert "pip install -e '.[gcs]' in a clone, or pip install 'promptkd_jax[gcs]'" in said
        assert "gs://pail/a.py" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("address", ["s3://pail/a", "hf://owner/name", "https://a.b/c", "gs:/pail"])
def test_other_addresses_are_no_paths(address):
    with pytest.raises(argparse.ArgumentTypeError, match="gs://BUCKET/… alone"):
        flags.path(address)


def test_a_cache_in_a_bucket_is_a_mistake_of_the_config():
    from promptkd_jax.training.config.checks import checked
    from promptkd_jax.training.recipes import base_config

    config = base_config()
    config.cache.path = "gs://pail/cache"
    with pytest.raises(
        ConfigError, match=r"config\.cache\.path: 'gs://pail/cache' is not a folder"
    ):
        checked(config)
