"""A run with a teacher in int8 and an adapter beside a student in int4."""

import json
import pathlib

import jax
import numpy as np
import pytest
from helpers import tiny
from ml_collections import ConfigDict

from promptkd_jax.infra import sharding
from promptkd_jax.infra.errors import ConfigError, ModelError
from promptkd_jax.models.io.peft import load_lora
from promptkd_jax.models.load import load_model
from promptkd_jax.models.model import add_adapter
from promptkd_jax.plan import roofline
from promptkd_jax.plan.abstract_run import abstract_mesh, abstract_run
from promptkd_jax.training import run as training
from promptkd_jax.training.config.checks import checked
from promptkd_jax.training.recipes import hidden_term, method_stage
from promptkd_jax.training.run_models import load_models


@pytest.fixture
def config(tmp_path) -> ConfigDict:
    """PromptKD on tokens and hidden states."""
    config = tiny.short_config(tmp_path / "models")
    config.teacher.quantize, config.student.quantize = "int8", "int4"
    config.student.lora.update(rank=2, alpha=4.0)
    config.student.kv_cache_dtype = "int8"
    term = hidden_term("relation")
    how = dict(steps=2, batch_size=4, learning_rate=1e-2, hidden_terms=(term,))
    config.stages = (method_stage("promptkd", **how),)
    config.teacher.remat = config.student.remat = "none"
    config.evaluation.update(every=0, teacher=False)
    return config


@pytest.mark.usefixtures("no_report")
def test_a_run_trains_the_adapter_of_a_quantised_student(config, tmp_path):
    run, workdir = checked(config), tmp_path / "run"
    training.run(run, workdir)
    base = load_model(config.student.path, quantize="int4")
    lora, adapter = load_lora(workdir / "adapter", base.decoder.config)
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12)
    student, written = add_adapter(base, lora, adapter), load_model(str(workdir))
    found, expected, before = (
        np.asarray(x.decoder.hidden_states(x.params, tokens)) for x in (student, written, base)
    )
    np.testing.assert_allclose(found, expected, atol=2e-4)
    assert np.abs(found - before).max() > 1e-2


def test_a_plan_counts_the_bytes_of_quantised_models(config):
    run, mesh = checked(config), sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1})
    with jax.set_mesh(mesh):
        teacher, student = load_models(run, mesh)
    planned = abstract_run(run)
    kept = roofline.kept_bytes(planned)
    assert kept["teacher"] == sum(x.nbytes for x in jax.tree.leaves(teacher.params))
    assert kept["student"] == sum(x.nbytes for x in jax.tree.leaves(student.params))
    config.teacher.quantize = config.student.quantize = "none"
    plain = abstract_run(checked(config))
    assert kept["teacher"] < roofline.kept_bytes(plain)["teacher"]
    assert planned.notes[:2] == plain.notes[:2]  # numbers of parameters


def test_a_run_and_its_plan_say_alike_what_int4_does_not_fit(config):
    config.teacher.update(path=config.student.path, quantize="int4")  # of width 16
    run, mesh = checked(config), abstract_mesh({"data": 1, "fsdp": 16, "tensor": 1})
    said = "config.teacher.quantize .* mesh.fsdp = 16, .* layers/.* has 16; expected 'int8', or"
    for refused in (load_models, lambda run, mesh: abstract_run(run).on(mesh)):
        with pytest.raises(ConfigError, match=said):
            refused(run, mesh)
    file = pathlib.Path(config.teacher.path) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"intermediate_size": 101}))
    said = "config.teacher.quantize .* layers/mlp/down/kernel has 101, an odd .* expected 'int8'"
    for refused in (load_models, lambda run, mesh: abstract_run(run)):
        with pytest.raises(ModelError, match=said):
            refused(run, abstract_mesh(dict.fromkeys(mesh.axis_names, 1)))


def test_layers_of_a_quantised_teacher_are_read_plain(config):
    config.student.update(path="", layers=2, quantize="none")
    config.student.lora.update(rank=0, alpha=16.0)
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1})
    with jax.set_mesh(mesh):
        teacher, student = load_models(checked(config), mesh)
    dtypes = [x.params["layers"]["mlp"]["up"]["kernel"].dtype for x in (teacher, student)]
    assert dtypes == [np.int8, np.float32]


def test_what_is_trained_or_weighed_is_not_quantised(config):
    config.student.lora.update(rank=0, alpha=16.0)
    with pytest.raises(ConfigError, match=r"student.quantize: 'int4': .*lora.rank above 0"):
        checked(config)
    config.student.quantize = "none"
    checked(config)
    config.stages[0].student_terms = (("policy_gradient", 1.0),)
    with pytest.raises(
        ConfigError, match=r"kv_cache_dtype: 'int8' rounds .*stages\[0\] has a policy"
    ):
        checked(config)
    config.student.kv_cache_dtype, config.teacher.kv_cache_dtype = "auto", "int8"
    checked(config)
    config.stages[0].teacher_view, config.stages[0].teacher_share = "plain", 0.2
    with pytest.raises(ConfigError, match=r"config.teacher.kv_cache_dtype: 'int8' rounds"):
        checked(config)
    config.stages[0].teacher_share, config.teacher.kv_cache_dtype = 0.0, "auto"
    config.stages[0].student_terms = (("reverse_kl", 1.0),)
    config.stages[0].teacher_view = "online"
    config.stages[0].hidden_terms = ()
    with pytest.raises(ConfigError, match=r"stages\[0\].teacher_view: 'online' .*quantize"):
        checked(config)
