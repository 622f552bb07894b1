"""Every mistake in a config is told at once, with its path and what would be right."""

import copy
import dataclasses
import errno
import json
import pathlib
import re
import textwrap

import numpy as np
import pytest
from helpers import bucket
from ml_collections import ConfigDict

from promptkd_jax.data.templates import TEMPLATES
from promptkd_jax.distill.methods.method import Method
from promptkd_jax.infra import distributed
from promptkd_jax.infra.errors import ConfigError
from promptkd_jax.infra.files import Path, write_text
from promptkd_jax.infra.provenance import verify_inputs
from promptkd_jax.infra.specs import (
    Bool,
    Choice,
    Float,
    Group,
    Int,
    ListOf,
    Optional,
    Str,
    declared,
    field,
    group,
)
from promptkd_jax.infra.specs import mistakes as mistakes_of
from promptkd_jax.models.sampling_rules import Sampling
from promptkd_jax.training import recipes
from promptkd_jax.training.config import checks, field_help, fields
from promptkd_jax.training.config.checks import read_group
from promptkd_jax.training.config.config_file import as_json, claim, fingerprint, load_config

FILE = """
    from ml_collections import ConfigDict
    from ml_collections.config_dict import placeholder

    def get_config(size="small"):
        widths = {"small": 8, "large": 64}
        if size not in widths:
            raise ValueError(f"size {size!r} is not one of {sorted(widths)}")
        config = ConfigDict({
            "width": widths[size], "name": "run", "debug": False, "note": None,
            "seed": placeholder(int), "betas": (0.9, 0.99), "files": ["a"], "impedance": 1j,
            "optimizer": {"learning_rate": 0.1, "warmup_steps": 100},
        })
        stage = ConfigDict({"steps": 10, "loss": {"alpha": 0.5}})
        stage.learning_rate = config.optimizer.get_ref("learning_rate")
        config.stages = (stage, stage)
        config.mixture = ({"weight": 1.0}, {"weight": 2.0})
        return config
"""


@pytest.fixture
def load(tmp_path):
    """load(*overrides) reads FILE; load(..., argument=":large") or load(..., source=...) too."""

    def load(*overrides, argument="", source=FILE):
        path = tmp_path / "small.py"
        path.write_text(textwrap.dedent(source))
        return load_config([f"--config={path}{argument}", *overrides])[0]

    return load


def mistakes(function, *arguments, **options) -> list[str]:
    with pytest.raises(ConfigError) as error:
        function(*arguments, **options)
    return str(error.value).splitlines()


# Files and arguments.


def test_other_arguments_are_left_in_order(tmp_path):
    path = tmp_path / "c.py"
    path.write_text(textwrap.dedent(FILE))
    argv = ["train.py", "--workdir=/w", "--config", f"{path}:large", "-config.width=3", "--", "x"]
    config, rest = load_config([*argv, "--configure=1"])
    assert rest == ["train.py", "--workdir=/w", "--", "x", "--configure=1"]
    assert config.width == 3


def test_the_argument_reaches_get_config(load):
    assert load().width == 8
    assert load(argument=":large").width == 64


@pytest.mark.parametrize(
    "argv, found", [([], "none"), (["--config=a.py", "--config=b.py"], "a.py")]
)
def test_one_file_is_needed(argv, found):
    (line,) = mistakes(load_config, argv)
    assert line.startswith("config: expected one --config=FILE[:arg], found ")
    assert found in line


def test_a_missing_file_is_named():
    assert mistakes(load_config, ["--config=no/such.py:x"]) == [
        "config: there is no Python file 'no/such.py'"
    ]


@pytest.mark.parametrize(
    "source, argument, found",
    [
        ("x = 1", "", "small.py defines no get_config"),
        ("def get_config(): return {}", "", "small.py returned {}, not a ConfigDict"),
        ("def get_config(): return 1", ":large", "takes no argument, but got 'large'"),
        (FILE, ":huge", "small.py:huge: size 'huge' is not one of ['large', 'small']"),
    ],
)
def test_a_wrong_file_is_told(load, source, argument, found):
    (line,) = mistakes(load, source=source, argument=argument)
    assert line.startswith("config: ")
    assert found in line


def test_a_bug_in_the_file_keeps_its_own_error(load):
    with pytest.raises(NameError, match="oops"):
        load(source="def get_config(): return oops")


# The config of a run's folder.


def write_json(folder, content) -> str:
    path = folder / "config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_the_config_of_a_folder_is_the_one_that_claimed_it(load, tmp_path):
    source = FILE.replace(', "impedance": 1j', "")  # JSON has no complex numbers
    config = load("--config.stages[1].loss.alpha=0.25", source=source)
    claim(tmp_path / "run", config)
    again, rest = load_config([f"--config={tmp_path / 'run' / 'config.json'}", "--other"])
    assert rest == ["--other"]
    assert as_json(again) == as_json(config) and fingerprint(again) == fingerprint(config)
    assert again.betas == (0.9, 0.99) and again.seed is None
    assert [type(stage) for stage in again.stages] == [ConfigDict, ConfigDict]
    assert type(again.optimizer.learning_rate) is float
    with pytest.raises(AttributeError, match="locked"):
        again.stages[0].loss.new_field = 1


def test_lists_in_a_json_file_are_tuples_at_any_depth(tmp_path):
    terms = {"terms": [["kl", 1.0], ["ce", 0.5]], "layers": [0, 2]}
    path = write_json(tmp_path, {"config": {"stages": [terms], "none": []}})
    config, _ = load_config([f"--config={path}", "--config.stages[0].layers=(1, 2)"])
    assert config.stages[0].terms == (("kl", 1.0), ("ce", 0.5))
    assert config.stages[0].layers == (1, 2) and config.none == ()


@pytest.mark.parametrize(
    "content, found",
    [
        ("{", "is not JSON: "),
        ([1], "is not the config of a run; expected"),
        ({"width": 3}, "is not the config of a run; expected"),
        ({"config": [1]}, "is not the config of a run; expected"),
    ],
)
def test_a_wrong_json_file_is_told(tmp_path, content, found):
    (line,) = mistakes(load_config, [f"--config={write_json(tmp_path, content)}"])
    assert "config.json" in line and found in line


def test_a_missing_json_file_and_an_argument_are_told(tmp_path):
    path = write_json(tmp_path, {"config": {}})
    assert mistakes(load_config, [f"--config={path}:large"]) == [
        f"config: {path} takes no argument, but got 'large'"
    ]
    assert mistakes(load_config, ["--config=no/such.json"]) == [
        "config: there is no JSON file 'no/such.json'"
    ]


def test_a_folder_has_one_config_but_for_what_is_ignored(tmp_path):
    claim(tmp_path, make_config(), ("name", "stages.learning_rate"))
    (tmp_path / "before.json").write_text("{}")
    other = make_config()
    other.name, other.stages = "other", ({"learning_rate": 7}, {"learning_rate": 8})
    claim(tmp_path, other, ("name", "stages.learning_rate"))
    assert load_config([f"--config={tmp_path / 'config.json'}"])[0].name == "other"
    third = make_config()
    third.steps, third.betas, third.name = 2, [0.9, 0.5], "third"
    assert mistakes(claim, tmp_path, third, ("name", "stages.learning_rate")) == [
        f"{tmp_path} belongs to a run of another config; take another --workdir, or set back",
        "  config.betas[1]: there 1, now 0.5",
        "  config.steps: there 1, now 2",
    ]
    assert load_config([f"--config={tmp_path / 'config.json'}"])[0].name == "other"


def test_claiming_again_writes_nothing(tmp_path):
    claim(tmp_path, make_config())
    before = (tmp_path / "config.json").stat().st_mtime_ns
    claim(tmp_path, make_config())
    assert (tmp_path / "config.json").stat().st_mtime_ns == before


# Overrides.


@pytest.mark.parametrize(
    "override, value",
    [
        ("width=12", 12),
        ("width=None", None),
        ("name=2", "2"),
        ("name=None", None),
        ("name=a=b", "a=b"),
        ("name=", ""),
        ("debug=true", True),
        ("debug=True", True),
        ("debug=false", False),
        ("seed=7", 7),
        ("note=7", 7),
        ("note=some text", "some text"),
        ("note=(1, 2)", (1, 2)),
        ("betas=(1, 2, 3)", (1, 2, 3)),
        ("betas=[1]", (1,)),
        ("betas=1,2", (1, 2)),
        ("files=('b', 'c')", ["b", "c"]),
        ("optimizer.learning_rate=1e-4", 1e-4),
        ("optimizer.learning_rate=3", 3.0),
        ("stages[1].steps=3", 3),
        ("stages[0].loss.alpha=0", 0.0),
        ("mixture[1].weight=3", 3.0),
    ],
)
def test_an_override_takes_the_type_of_what_it_replaces(load, override, value):
    path = override.partition("=")[0]
    found = load(f"--config.{override}")
    for name in re.findall(r"\w+", path):
        found = found[int(name) if name.isdigit() else name]
    assert (found, type(found)) == (value, type(value))


def test_the_last_override_wins(load):
    assert load("--config.width=1", "--config.width=2").width == 2


def test_an_override_of_one_stage_reaches_no_other(load):
    config = load("--config.stages[0].steps=3", "--config.stages[0].loss.alpha=0.25")
    assert [stage.steps for stage in config.stages] == [3, 10]
    assert [stage.loss.alpha for stage in config.stages] == [0.25, 0.5]


def test_references_still_follow(load):
    config = load("--config.optimizer.learning_rate=0.5")
    assert [stage.learning_rate for stage in config.stages] == [0.5, 0.5]


def test_a_whole_tuple_of_groups_can_be_given(load):
    config = load("--config.stages=({'steps': 1}, {'steps': 2})")
    assert [stage.steps for stage in config.stages] == [1, 2]
    assert all(isinstance(stage, ConfigDict) for stage in config.stages)


def test_the_result_has_no_room_for_new_fields(load):
    config = load()
    for holder in (config, config.optimizer, config.stages[0], config.stages[1].loss):
        with pytest.raises(AttributeError, match="locked"):
            holder.new_field = 1


@pytest.mark.parametrize(
    "override, message",
    [
        ("width", "config.width: has no value, write --config.width=VALUE"),
        ("stages[2].steps=3", "config.stages[2]: is unknown; the last is [1]"),
        ("betas[0]=0.8", "config.betas[0]: set the whole tuple, now (0.9, 0.99)"),
        ("width.x=3", "config.width: 8 has no fields"),
        ("width[0]=3", "config.width: 8 has no elements"),
        ("stages.0.steps=3", "config.stages: is a tuple; its elements are config.stages[0], …"),
        ("stages[-1].steps=3", "config.stages[-1].steps: is no path such as config.a.b[0].c"),
    ],
)
def test_an_override_that_leads_nowhere_is_told(load, override, message):
    assert mistakes(load, f"--config.{override}") == [message]


RUN = """
    from promptkd_jax.training.recipes import base_config, hidden_term, method_stage

    def get_config():
        config = base_config()
        config.student.layers = (0, 2)
        config.teacher.path = "teacher"
        config.data.update(train="a.jsonl", dev="b.jsonl")
        terms = (hidden_term("mse"), hidden_term("cosine", layers="uniform"))
        config.stages = (method_stage("kd", steps=8, hidden_terms=terms),)
        return config
"""
PAIR = "each element a pair (divergence, weight) such as ('reverse_kl', 1.0)"


@pytest.fixture
def read_run_of(tmp_path):
    """read_run_of(*overrides) reads and checks RUN."""
    path = tmp_path / "run.py"
    path.write_text(textwrap.dedent(RUN))
    return lambda *overrides: checks.read_run(
        [f"--config={path}", *(f"--config.{override}" for override in overrides)]
    )


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("student.layers=3", 3),
        ("student.layers=[1, 3]", (1, 3)),
        ("stages[0].hidden_terms[0].layers=uniform", "uniform"),
        ("stages[0].hidden_terms[1].layers=((0, 1), (-1, -1))", ((0, 1), (-1, -1))),
        ("stages[0].policy_gradient.ratio_clip=None", None),
        ("stages[0].policy_gradient.ratio_clip=3", 3.0),
        ("stages[0].learning_rate=1", 1.0),
        ("stages[0].student_terms=(('reverse_kl', 1),)", (("reverse_kl", 1),)),
        ("title=(1, 2)", "(1, 2)"),
        ("title=3", "3"),
        ("data.date=2026-11-27", "2026-11-27"),
        ("evaluation.teacher=false", False),
    ],
)
def test_the_field_decides_how_an_override_is_read(read_run_of, override, value):
    """Whatever its default is: a number where there was a tuple, a tuple where there was a name."""
    found = read_run_of(override)
    for name in re.findall(r"\w+", override.partition("=")[0]):
        found = found[int(name)] if name.isdigit() else getattr(found, name)
    assert (found, type(found)) == (value, type(value))


def test_a_config_file_too_may_set_what_its_default_is_not(tmp_path):
    source = textwrap.dedent(RUN).replace(
        "    return config",
        """\
    config.stages[0].hidden_terms[0].layers = "uniform"
    config.seed = "ten"
    return config""",
    )
    (tmp_path / "run.py").write_text(source)
    assert mistakes(checks.read_run, [f"--config={tmp_path / 'run.py'}"]) == [
        "config.seed: 'ten' is not an int >= 0 and <= 4294967295"
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("log_every=ten", "config.log_every: 'ten' is not an int >= 1"),
        ("log_every=1.5", "config.log_every: 1.5 is not an int >= 1"),
        ("log_every=True", "config.log_every: True is not an int >= 1"),
        ("log_every=", "config.log_every: '' is not an int >= 1"),
        ("title=None", "config.title: None is not a string"),
        ("evaluation.teacher=1", "config.evaluation.teacher: 1 is not one of True, False"),
        ("data.template=5", "config.data.template: 5 is not one of 'alpaca', 'chat', 'plain'"),
        ("mesh=2", "config.mesh: 2 is not a group of data, fsdp, tensor"),
        ("evaluation.evry=2", "config.evaluation.evry: is unknown; did you mean every?"),
        ("mesh.x=3", "config.mesh.x: is unknown; there are data, fsdp, tensor"),
        ("evaluatoin.every=3", "config.evaluatoin: is unknown; did you mean evaluation?"),
        ("stages[0].stepz=3", "config.stages[0].stepz: is unknown; did you mean steps?"),
        ("stages[0].clip=3", "config.stages[0].clip: is now called max_grad_norm"),
        (
            "student.layers=some",
            "config.student.layers: 'some' is not a number of layers, or a tuple of different "
            "layers such as (0, 2, 4)",
        ),
        (
            "stages[0].student_terms=reverse_kl",
            f"config.stages[0].student_terms: 'reverse_kl' is not a non-empty tuple, {PAIR}",
        ),
        (
            "student.lora.target_modules=q_proj",
            "config.student.lora.target_modules: 'q_proj' is not a non-empty tuple, each element a "
            "string that is not empty; for this one write ('q_proj',)",
        ),
        (
            "stages[0].corpus_terms=('reverse_kl', 1",
            f"config.stages[0].corpus_terms: \"('reverse_kl', 1\" is not a tuple, {PAIR}",
        ),
    ],
)
def test_an_override_that_a_field_cannot_be_is_told(read_run_of, override, message):
    assert mistakes(read_run_of, override) == [message]


@pytest.mark.parametrize(("field", "others"), [("student", 2), ("teacher", 1), ("corpus", 1)])
def test_names_of_terms_are_listed_with_those_that_are_no_divergence(read_run_of, field, others):
    (line,) = mistakes(read_run_of, f"stages[0].{field}_terms=(('sft', 1.0),)")
    named = [f"'{name}'" in line for name in ("cross_entropy", "policy_gradient")]
    assert named == [True, others == 2] and re.search("there are: .*, forward_kl, ", line)


def test_mistakes_of_all_kinds_are_told_at_once(read_run_of):
    """Where an override leads, names, types, ranges, and what contradicts what is right."""
    given = ("stages[3].steps=1", "sead=1", "log_every=ten", "seed=-1", "stages[0].temperature=0")
    contradictory = ("student.path=own", "data.max_length=100", "mesh.data=-1", "mesh.fsdp=-1")
    assert [line.partition(": ")[0] for line in mistakes(read_run_of, *given, *contradictory)] == [
        "config.stages[3]",
        "config.sead",
        "config.seed",
        "config.stages[0].temperature",
        "config.log_every",
        "config.data.max_prompt_length",
        "config.student.layers",
        "config.mesh",
    ]


@pytest.mark.parametrize(
    "overrides",
    [
        ("data.max_length=ten", "data.max_prompt_length=600"),
        ("stages[0].steps=ten",),
        ("stages[0].stepz=7", "stages[0].steps=0"),
        ("student.layers=x",),
        ("mesh.data=x", "mesh.fsdp=-1"),
        ("stages[0].batch_size=-3", "stages[0].gradient_accumulation_steps=5"),
        ("stages[0].student_terms=1", "stages[0].hidden_terms=()", "stages[0].teacher_view=online"),
        ("evaluation.every=x", "checkpoint.export=best"),
    ],
)
def test_what_is_wrong_itself_contradicts_nothing(read_run_of, overrides):
    assert len(mistakes(read_run_of, *overrides)) == 1


def test_an_argument_that_is_no_field_is_told_with_the_rest(tmp_path):
    (tmp_path / "run.py").write_text(textwrap.dedent(RUN))
    arguments = [f"--config={tmp_path / 'run.py'}", "--confg.seed=2", "--config.seed=-1"]
    assert mistakes(checks.read_run, arguments) == [
        "unknown arguments: --confg.seed=2",
        "config.seed: -1 is not >= 0",
    ]


# The fields.


@dataclasses.dataclass(frozen=True)
class Decay:
    decay: float = field(0, Float(low=0.0, high=1.0), "of weights")


@dataclasses.dataclass(frozen=True)
class Rate:
    learning_rate: float = field(1, Float(low=0, open_low=True), "of the stage")

    def __post_init__(self):
        if self.learning_rate == 13:
            raise ValueError("learning_rate: 13 brings no luck")


@dataclasses.dataclass(frozen=True)
class Length:
    length: int = field(1, Int(low=1, high=2_000_000), "of the prompt")


@dataclasses.dataclass(frozen=True)
class Place:
    path: str = field("", Path(), "of a file")


@dataclasses.dataclass(frozen=True)
class Settings:
    steps: int = field(1, Int(low=1), "how many")
    name: str = field("run", Str(nonempty=True), "of the run")
    note: str | None = field(None, Optional(Str()), "what to know")
    debug: bool = field(False, Bool(), "whether to say more")
    loss: str = field("reverse_kl", Choice("forward_kl", "reverse_kl"), "what is minimized")
    optimizer: Decay = group(Decay, "how")
    stages: tuple[Rate, ...] = field((), ListOf(Group(Rate), nonempty=True), "in order")
    betas: tuple[float, ...] = field((0.9, 1), ListOf(Float()), "of Adam")
    prompt: Length | None = field(None, Optional(Group(Length)), "soft")


def make_config() -> ConfigDict:
    return ConfigDict(
        {
            "steps": 1,
            "name": "run",
            "note": None,
            "debug": False,
            "loss": "reverse_kl",
            "optimizer": {"decay": 0},
            "stages": (ConfigDict({"learning_rate": 1e-4}), {"learning_rate": 1}),
            "betas": [0.9, 1],
            "prompt": None,
        }
    )


def changed(**fields) -> dict:
    return {name: make_config()[name] for name in make_config()} | fields


def read(config) -> Settings:
    return read_group(config, Settings)


def test_a_right_config_becomes_dataclasses():
    found = read(make_config())
    assert found == Settings(betas=(0.9, 1), stages=(Rate(1e-4), Rate(1)))
    assert hash(found)  # lists are tuples
    found = read(changed(note="x", prompt={"length": 2_000_000}, betas=()))
    assert found.prompt == Length(2_000_000) and found.betas == ()


def test_what_a_dataclass_refuses_is_told_with_its_path():
    stages = ({"learning_rate": 13}, {"learning_rate": 1}, {"learning_rate": 13})
    assert mistakes(read, changed(stages=stages)) == [
        f"config.stages[{index}]: learning_rate: 13 brings no luck" for index in (0, 2)
    ]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"steps": 0}, "config.steps: 0 is not >= 1"),
        ({"steps": True}, "config.steps: True is not an int >= 1"),
        ({"steps": 2.0}, "config.steps: 2.0 is not an int >= 1"),
        ({"steps": None}, "config.steps: None is not an int >= 1"),
        ({"name": ""}, "config.name: '' is not a string that is not empty"),
        ({"note": 3}, "config.note: 3 is not a string"),
        ({"debug": 0}, "config.debug: 0 is not one of True, False"),
        ({"loss": "mse"}, "config.loss: 'mse' is not one of 'forward_kl', 'reverse_kl'"),
        ({"optimizer": {"decay": 1.5}}, "config.optimizer.decay: 1.5 is not <= 1"),
        (
            {"optimizer": {"decay": "1"}},
            "config.optimizer.decay: '1' is not a number >= 0 and <= 1",
        ),
        (
            {"optimizer": {"decay": float("nan")}},
            "config.optimizer.decay: nan is not >= 0 and <= 1",
        ),
        ({"optimizer": 0.1}, "config.optimizer: 0.1 is not a group of decay"),
        (
            {"stages": ()},
            "config.stages: () is not a non-empty tuple, each element a group of learning_rate",
        ),
        (
            {"stages": ({"learning_rate": 1}, ConfigDict({"learning_rate": -0.1}))},
            "config.stages[1].learning_rate: -0.1 is not > 0",
        ),
        ({"stages": (3,)}, "config.stages[0]: 3 is not a group of learning_rate"),
        ({"betas": "0.9"}, "config.betas: '0.9' is not a tuple, each element a number"),
        ({"betas": (0.9, False)}, "config.betas[1]: False is not a number"),
        ({"prompt": {"length": 3_000_000}}, "config.prompt.length: 3000000 is not <= 2000000"),
        ({"prompt": 3}, "config.prompt: 3 is not a group of length"),
        ({"stepz": 1}, "config.stepz: is unknown; did you mean steps?"),
        (
            {"prompt": {"length": 1, "zzz": 1}},
            "config.prompt.zzz: is unknown; there are length",
        ),
        (
            {"optimizer": {}},
            "config.optimizer.decay: is missing, it should be a number >= 0 and <= 1",
        ),
    ],
)
def test_a_wrong_value_is_told(fields, message):
    assert mistakes(read, ConfigDict(changed(**fields))) == [message]


def test_all_wrong_values_are_told_at_once():
    config = changed(steps=-1, debug="yes", extra=1, stages=({"learning_rate": 0}, {}))
    del config["loss"], config["prompt"], config["optimizer"]
    assert mistakes(read, config) == [
        "config.extra: is unknown; there are "
        "betas, debug, loss, name, note, optimizer, prompt, stages, steps",
        "config.steps: -1 is not >= 1",
        "config.debug: 'yes' is not one of True, False",
        "config.loss: is missing, it should be one of 'forward_kl', 'reverse_kl'",
        "config.optimizer: is missing, it should be a group of decay",
        "config.stages[0].learning_rate: 0 is not > 0",
        "config.stages[1].learning_rate: is missing, it should be a number > 0",
        "config.prompt: is missing, it should be a group of length, or None",
    ]


# The fingerprint.


def test_the_fingerprint_is_that_of_the_values():
    config = make_config()
    backwards = {name: config[name] for name in reversed(list(config))}
    assert re.fullmatch("[0-9a-f]{12}", fingerprint(config))
    assert fingerprint(config) == fingerprint(backwards) == "d4f88197dbe0"
    assert fingerprint(config) == fingerprint(changed(steps=1.0, betas=(0.9, 1.0)))
    for changes in ({"steps": 2}, {"stages": ()}, {"betas": (1, 0.9)}, {"debug": None}):
        assert fingerprint(changed(**changes)) != fingerprint(config)


def test_the_fingerprint_leaves_out_what_is_ignored():
    ignore = ("name", "optimizer", "stages.learning_rate")
    other = changed(name="x", optimizer={"a": {"b": 1}}, stages=({"learning_rate": 7}, {}))
    assert fingerprint(other, ignore) == fingerprint(make_config(), ignore)
    assert fingerprint(other, ignore) != fingerprint(changed(stages=({},)), ignore)
    assert fingerprint({"names": 1}, ("name",)) != fingerprint({"names": 2}, ("name",))
    assert fingerprint({"a": {"name": 1}}, ("name",)) != fingerprint({"a": {}}, ("name",))


def test_a_folder_where_nothing_was_done_is_free_for_another_config(tmp_path):
    claim(tmp_path, ConfigDict(dict(teacher="a typing mistake")))
    verify_inputs(tmp_path, {"data": "14 rows"})
    claim(tmp_path, ConfigDict(dict(teacher="right")))
    verify_inputs(tmp_path, {"data": "20 rows"})  # those of the run that never began are gone
    assert "right" in (tmp_path / "config.json").read_text()
    (tmp_path / "before.json").write_text("{}")
    with pytest.raises(ConfigError, match="teacher: there 'right', now 'another'"):
        claim(tmp_path, ConfigDict(dict(teacher="another")))


# Folders that cannot be written, and buckets.


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_folder_that_cannot_be_is_named(tmp_path, name):
    (tmp_path / "file").write_text("")
    folder = tmp_path / name
    with pytest.raises(
        ConfigError, match=rf"^{folder}: cannot be written .*Not a directory.*a fol"
    ):
        claim(folder, make_config())


def test_a_forbidden_folder_is_named(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise PermissionError(13, "Permission denied", "config.json.unfinished")

    monkeypatch.setattr("promptkd_jax.infra.files.os.fsync", refuse)
    with pytest.raises(ConfigError, match="cannot be written .*denied.*that this user may write"):
        claim(tmp_path / "run", make_config())


def test_a_full_disk_is_no_mistake_in_a_config(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("promptkd_jax.infra.files.os.fsync", refuse)
    with pytest.raises(OSError, match="No space left"):
        claim(tmp_path / "run", make_config())


def test_a_bucket_that_is_absent_is_named(monkeypatch):
    bucket.make(monkeypatch)
    message = "^gs://other/run: cannot be written .*FileNotFound.*expected a bucket that exists"
    with pytest.raises(ConfigError, match=message):
        claim("gs://other/run", make_config())


def test_a_run_in_a_bucket_keeps_its_config(load, monkeypatch):
    folder, _ = bucket.make(monkeypatch)
    config = load("--config.width=12", source=FILE.replace(', "impedance": 1j', ""))
    claim(folder, config)
    again, _ = load_config([f"--config={folder}/config.json"])
    assert as_json(again) == as_json(config)
    write_text(folder / "before.json", "{}")
    config.width = 13
    with pytest.raises(ConfigError, match="config.width: there 12, now 13"):
        claim(folder, config)
    with pytest.raises(ConfigError, match="config.json takes no argument, but got 'arg'"):
        load_config([f"--config={folder}/config.json:arg"])


def test_a_config_in_a_bucket_is_read(monkeypatch):
    folder, _ = bucket.make(monkeypatch)
    source = "from ml_collections import ConfigDict\ndef get_config(size='1'):\n"
    (folder / "a.py").write_text(
        source + "    return ConfigDict(dict(size=int(size), at=__file__))"
    )
    for argument, size in ((":7", 7), ("", 1)):
        config, _ = load_config([f"--config={folder}/a.py{argument}"])
        assert config.size == size and config.at == "gs://pail/run/a.py"
    for source, message in (
        ("gs://pail/b.py", "there is no Python file 'gs://pail/b.py'"),
        ("gs://other/b.py", "there is no Python file 'gs://other/b.py'"),
        ("gs://pail/config.json", "there is no JSON file 'gs://pail/config.json'"),
        ("s3://pail/b.py", "'s3://pail/b.py' is not a path .*gs://BUCKET"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config([f"--config={source}"])


def test_a_bucket_without_its_packages_names_them(monkeypatch):
    def absent(scheme):
        raise ImportError

    monkeypatch.setattr("promptkd_jax.infra.files.fsspec.get_filesystem_class", absent)
    needed = r"within reach: buckets need .* pip install 'promptkd_jax\[gcs\]'"
    with pytest.raises(ConfigError, match=f"^config: 'gs://pail/a.py' is not {needed}"):
        load_config(["--config=gs://pail/a.py:7"])
    with pytest.raises(ConfigError, match=f"^config.path: 'gs://pail/a' is not {needed}"):
        read_group(ConfigDict(dict(path="gs://pail/a")), Place)
    assert read_group(ConfigDict(dict(path="owner/name")), Place) == Place("owner/name")


def test_a_run_of_before_a_field_was_there_goes_on_with_its_default(tmp_path):
    """Its folder is read, and belongs to the same config; another value is another config."""
    quickstart = pathlib.Path(__file__).parents[2] / "configs" / "quickstart.py"
    config = checks.read_run([f"--config={quickstart}"])
    claim(tmp_path, config)
    (tmp_path / "metrics.jsonl").write_text("")
    file = tmp_path / "config.json"
    stored = json.loads(file.read_text())
    for stage in stored["config"]["stages"]:
        del stage["dropout"], stage["sampling"]["min_p"]
    file.write_text(json.dumps(stored | {"fingerprint": "of another time"}))
    assert checks.read_run([f"--config={file}"]) == config
    claim(tmp_path, config)
    stages = (dataclasses.replace(config.stages[0], dropout=True), *config.stages[1:])
    with pytest.raises(ConfigError, match=r"dropout: there False, now True"):
        claim(tmp_path, dataclasses.replace(config, stages=stages))


def test_only_the_first_process_claims(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "run_on_primary", lambda compute: None)
    claim(tmp_path / "run", make_config())
    assert not (tmp_path / "run").exists()


# Help.


def test_a_template_of_prompts_is_one_of_a_config():
    spec = declared(fields.DataConfig)["template"].metadata["spec"]
    assert spec.options == tuple(TEMPLATES)


def test_every_field_has_help_and_a_default_that_is_right():
    for entry in fields.entries():
        assert entry.text, entry.path
        if entry.path != "data" and not entry.required:
            assert not list(mistakes_of(entry.path, entry.default, entry.spec)), entry


def test_help_marks_what_is_required_and_has_plain_fields_before_groups():
    needed = [entry.path for entry in fields.entries() if entry.required]
    assert needed == ["data.train", "data.dev", "stages", "stages[i].name"]
    marked = [
        line.split()[0] for line in field_help.config_help().splitlines() if "required" in line
    ]
    assert marked == ["data.train,", "data.dev,", "stages", "stages[i].name,"]
    # Below a heading nothing stands that is not the group's.
    heading = ""
    for entry in fields.entries():
        parent = entry.path.rpartition(".")[0]
        assert entry.is_group or parent in (heading, f"{heading}[i]"), entry.path
        heading = entry.path if entry.is_group else heading


def test_help_of_a_group_a_field_and_of_what_is_none():
    whole = field_help.config_help()
    assert all(f"\n{name}" in whole or f"  {name}" in whole for name in declared(fields.RunConfig))
    of_group = field_help.config_help("config.stages[3].sampling")
    assert (
        of_group.count("  stages[i].sampling.") == len(declared(Sampling))
        and "stages[i].sampling.top_p = 1.0" in of_group
    )
    of_field = field_help.config_help("stages[0].targets")
    assert "student: the student's own" in of_field and "teacher_view" not in of_field
    for path, says in {
        "stages[0].micro_batch": r"^config.stages\[i\].micro_batch: is unknown",
        "evaluation.evry": "^config.evaluation.evry: is unknown; did you mean every",
        "evry": "^config.evry: is unknown; there are",
        "answers.path": "^config.answers: is now called teacher_responses",
        "stages[0].clip": r"^config.stages\[i\].clip: is now called max_grad_norm",
        "seed.x": "^config.seed.x: seed has no field x",
    }.items():
        with pytest.raises(ConfigError, match=says):
            field_help.config_help(path)


def test_a_name_of_before_is_answered_with_the_new_one():
    config = recipes.base_config()
    config.stages = (recipes.stage_config("sft", steps=1, clip=1.0, micro_batches=2),)
    said = mistakes(read_group, config, fields.RunConfig)
    assert "config.stages[0].clip: is now called max_grad_norm" in said
    assert "config.stages[0].micro_batches: is now called gradient_accumulation_steps" in said
    known = {name.rpartition(".")[2] for name, *_ in fields.entries()}
    assert set(fields.RENAMED.values()) <= known and not known & set(fields.RENAMED)


def test_a_config_that_an_earlier_version_wrote_is_read_with_the_names_of_now(tmp_path):
    config = as_json(recipes.base_config())
    config["stages"] = [as_json(recipes.stage_config("sft", steps=1))]
    config["data"] |= {"train": "a.jsonl", "dev": "b.jsonl"}
    config["teacher"]["path"], config["student"]["path"] = "teacher", "student"
    before = copy.deepcopy(config)
    before["answers"] = before.pop("teacher_responses")
    before["stages"][0]["clip"] = before["stages"][0].pop("max_grad_norm")
    for name, content in (("before", before), ("now", config)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"config": content}))
    found = [load_config([f"--config={tmp_path / name}.json"])[0] for name in ("before", "now")]
    assert read_group(found[0], fields.RunConfig) == read_group(found[1], fields.RunConfig)


def test_a_python_config_that_names_a_group_of_before_is_told_the_new_one(tmp_path):
    file = tmp_path / "config.py"
    file.write_text(
        "from promptkd_jax.training.recipes import base_config\n"
        "def get_config():\n"
        "    config = base_config()\n"
        "    config.answers.batch_size = 4\n"
    )
    with pytest.raises(ConfigError, match="answers is now called teacher_responses"):
        load_config([f"--config={file}"])


@pytest.mark.parametrize(
    "wrong", [dict(policy_gradient={}), dict(execution={}), dict(sampling=None), dict(passes=True)]
)
def test_a_method_is_made_of_what_it_says(wrong):
    sizes = dict(total_steps=1, response_capacity=3, prompt_capacity=3, vocab_size=9)
    assert hash(Method(student_terms=[["reverse_kl", 1.0]], **sizes))  # lists become tuples
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))}: "):
        Method(**wrong, **sizes)


def test_a_folder_in_which_nothing_was_begun_is_the_next_configs(tmp_path):
    """As when a path was wrong: the day stands there, but neither models nor data were found."""
    config = make_config()
    claim(tmp_path / "run", config)
    (tmp_path / "run" / "started.json").write_text("{}")
    config.steps = 7
    claim(tmp_path / "run", config)
    (tmp_path / "run" / "configs").mkdir()
    config.steps = 8
    with pytest.raises(ConfigError, match="config.steps: there 7, now 8"):
        claim(tmp_path / "run", config)


def test_numbers_of_numpy_are_numbers(tmp_path):
    config = make_config()
    with config.ignore_type():
        config.steps, config.betas = np.int64(1), (np.float32(0.5), 1)
    assert read(config) == Settings(betas=(0.5, 1), stages=(Rate(1e-4), Rate(1)))
    claim(tmp_path / "run", read(config))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["betas"] == [0.5, 1]


@dataclasses.dataclass(frozen=True)
class _Inner:
    size: int = field(1, Int(low=1), "a size")
    rate: float = field(0.0, Float(), "a rate")


@dataclasses.dataclass(frozen=True)
class _Outer:
    inner: _Inner = group(_Inner, "a group")
    other: _Inner = group(_Inner, "a group")


def test_a_mistake_has_a_kind_beside_its_words():
    value = {"inner": {"size": 0, "rat": 1.0}, "other": 3}
    found = mistakes_of("config", value, Group(_Outer))
    assert [(mistake.kind, mistake.message.split(":")[0]) for mistake in found] == [
        ("unknown", "config.inner.rat"),
        ("value", "config.inner.size"),
        ("missing", "config.inner.rate"),
        ("group", "config.other"),
    ]
