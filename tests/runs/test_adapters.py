"""Whole runs of a student with an adapter: what is trained, kept, written, and goes on."""

import functools
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from flax import traverse_util
from helpers import tiny
from ml_collections import ConfigDict
from safetensors.numpy import load_file

from promptkd_jax.cli.main import main
from promptkd_jax.infra import sharding
from promptkd_jax.infra.errors import ConfigError, ModelError
from promptkd_jax.models.io.peft import load_lora
from promptkd_jax.models.layers.lora import join
from promptkd_jax.models.load import load_model
from promptkd_jax.models.model import add_adapter
from promptkd_jax.plan import roofline
from promptkd_jax.plan.abstract_run import abstract_run
from promptkd_jax.training import run as training
from promptkd_jax.training.config.checks import checked
from promptkd_jax.training.loop import open_checkpoints
from promptkd_jax.training.prepare import prepare

pytestmark = pytest.mark.usefixtures("no_report")  # but of `finished`, which is made before

# That of a config that has none.
LORA = {"rank": 0, "alpha": 16.0, "target_modules": ("all-linear",)}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("adapters") / "models"
    tiny.short_config(folder)
    return folder


def adapted(models: pathlib.Path) -> ConfigDict:
    """A rank of 3 on two maps of every layer."""
    config = tiny.short_config(models)
    config.student.lora.update(rank=3, alpha=6.0, target_modules=("q_proj", "down_proj"))
    config.checkpoint.keep = 10
    return config


@pytest.fixture
def config(models):
    return adapted(models)


@pytest.fixture(scope="module")
def finished(models) -> pathlib.Path:
    workdir = models.parent / "finished"
    training.run(checked(adapted(models)), workdir)
    return workdir


def one_device() -> jax.sharding.Mesh:
    return sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1})


def weights(folder: pathlib.Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")


def test_only_the_adapter_is_trained_and_kept(config, finished, models):
    before, after = weights(models / "student"), weights(finished / "student")
    changed = {name for name in before if (before[name] != after[name]).any()}
    assert changed == {
        f"model.layers.{layer}.{name}.weight"
        for layer in range(2)
        for name in ("self_attn.q_proj", "mlp.down_proj")
    }
    with open_checkpoints(checked(config), finished) as checkpoints:
        place = functools.partial(sharding.shardings, mesh=one_device())
        kept = checkpoints.restore_params(7, ("student",), place)
    assert {path[-1] for path in traverse_util.flatten_dict(kept["student"])} == {
        "lora_a",
        "lora_b",
    }


def test_the_adapter_beside_its_base_is_the_student(finished, models):
    base = load_model(str(models / "student"))
    lora, adapter = load_lora(finished / "adapter", base.decoder.config)
    assert (lora.rank, lora.scale) == (3, 2.0)
    said = json.loads((finished / "adapter/adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == str(models / "student")
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12)
    with_adapter, merged = add_adapter(base, lora, adapter), load_model(str(finished))
    found, expected = (x.decoder.hidden_states(x.params, tokens) for x in (with_adapter, merged))
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_peft_computes_the_students_logits_and_tokens(finished):
    peft = pytest.importorskip("peft", reason="the adapter is PEFT's")
    import torch
    import transformers

    auto = transformers.AutoModelForCausalLM
    merged = auto.from_pretrained(finished / "student")
    said = json.loads((finished / "adapter/adapter_config.json").read_text())
    base = auto.from_pretrained(said["base_model_name_or_path"])
    adapted = peft.PeftModel.from_pretrained(base, finished / "adapter")
    tokens = torch.arange(5, 17)[None]
    with torch.no_grad():
        found, expected = adapted(tokens).logits, merged(tokens).logits
    np.testing.assert_allclose(found, expected, atol=1e-5)
    how = dict(max_new_tokens=8, do_sample=False)
    assert (adapted.generate(input_ids=tokens, **how) == merged.generate(tokens, **how)).all()


@pytest.mark.parametrize("step", [2, 4])
def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(config, finished, tmp_path, step):
    """In the first stage, and in the second."""
    shutil.copytree(finished, tmp_path / "run")
    for name in ("summary.json", "after.json", "student", "adapter", "soft_prompt"):
        path = tmp_path / "run" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for folder in (tmp_path / "run/checkpoints").iterdir():
        if folder.name.isdecimal() and int(folder.name) > step:
            shutil.rmtree(folder)
    training.run(checked(config), tmp_path / "run")
    for folder, file in (("student", "model"), ("adapter", "adapter_model")):
        file = f"{folder}/{file}.safetensors"
        assert (tmp_path / "run" / file).read_bytes() == (finished / file).read_bytes()


def test_export_writes_the_adapter_alone_or_merged(finished, models, tmp_path):
    def export(*options):
        return main(["export", f"--workdir={finished}", *options])

    export(f"--output={tmp_path / 'alone'}", "--adapter")
    file = "adapter_model.safetensors"
    assert (tmp_path / "alone" / file).read_bytes() == (finished / "adapter" / file).read_bytes()
    export(f"--output={tmp_path / 'whole'}")
    file = "student/model.safetensors"
    assert (tmp_path / "whole" / file).read_bytes() == (finished / file).read_bytes()
    moved = models / "elsewhere"
    (models / "student").rename(moved)
    try:
        export(f"--output={tmp_path / 'again'}", "--adapter")  # its base is not needed
        with pytest.raises(SystemExit, match="the model that the adapter changes: .* --adapter"):
            export(f"--output={tmp_path / 'merged'}")
        tiny.write_model(models / "student", width=16, depth=2, seed=2)
        with pytest.raises(SystemExit, match="is not what the run began with; --adapter"):
            export(f"--output={tmp_path / 'merged'}")
        shutil.rmtree(models / "student")
    finally:
        moved.rename(models / "student")


def test_training_goes_on_from_an_adapter(config, finished, tmp_path):
    config.student.lora.update(LORA | {"path": str(finished)})
    mesh = one_device()
    with jax.set_mesh(mesh):
        student = prepare(checked(config), tmp_path, mesh).student
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12)
    expected = load_model(str(finished))
    found, right = (x.decoder.hidden_states(x.params, tokens) for x in (student, expected))
    np.testing.assert_allclose(found, right, atol=2e-4)
    config.student.lora.rank = 4
    with pytest.raises(ConfigError, match="lora.rank: 4, but the adapter of .* expected 0"):
        checked(config)
    config.student.lora.update(rank=0, alpha=3.0)
    with pytest.raises(ConfigError, match="lora.alpha: is for a new adapter, and that of"):
        checked(config)
    (tmp_path / "run/student").mkdir(parents=True)  # of a run without an adapter
    for wrong, said in (
        ("none", "no such folder or file"),
        ("run", "run: has no adapter_config.json"),
    ):
        config.student.lora.update(alpha=16.0, path=str(tmp_path / wrong))
        said = f"config.student.lora.path: .*{said}.*; expected the folder of an adapter"
        with pytest.raises(ModelError, match=said):
            prepare(checked(config), tmp_path, mesh)


def test_the_teacher_is_the_student_without_its_adapter(config, models, tmp_path):
    """Self-distillation keeps one set of weights."""
    config.student.path = config.teacher.path
    mesh = one_device()
    with jax.set_mesh(mesh):
        made = prepare(checked(config), tmp_path, mesh)
        teacher, frozen = jax.tree.leaves(made.teacher.params), jax.tree.leaves(made.frozen_student)
        assert all(one is other for one, other in zip(teacher, frozen, strict=True))
        stage = made.stages[1]
        state = made.start(stage, None)
        batch = sharding.place_rows(stage.batches[0])
        jitted = made.jitted_step(stage)
        after, _ = jitted(state, made.teacher.params, batch, None, made.frozen_student)
        whole = made.trained_student(after.student).params
    assert jax.tree.structure(whole) == jax.tree.structure(join(made.frozen_student, after.student))
    run = abstract_run(checked(config))
    kept = roofline.kept_bytes(run)
    adapter = sum(x.nbytes for x in jax.tree.leaves(after.student))
    assert (kept["teacher"], kept["student"]) == (sum(x.nbytes for x in teacher), adapter)
    run = run.on(mesh)
    with jax.set_mesh(mesh):
        traced = run.jitted_step(run.stage).lower(*run.arguments()).out_info[0].params
    assert jax.tree.map(np.shape, after.params) == jax.tree.map(lambda x: x.shape, traced)


def test_layers_of_the_teacher_with_an_adapter(config, tmp_path):
    """Nobody has the model that the adapter changes: the student is written merged alone."""
    config.student.update(path="", layers=2)
    config.stages = config.stages[:1]
    training.run(checked(config), tmp_path)
    assert not (tmp_path / "adapter").exists()
    assert load_model(str(tmp_path)).decoder.config.num_layers == 2
    with pytest.raises(SystemExit, match="--adapter: the base of the student of .* is layers of"):
        main(["export", f"--workdir={tmp_path}", f"--output={tmp_path / 'alone'}", "--adapter"])
    main(["export", f"--workdir={tmp_path}", f"--output={tmp_path / 'again'}"])
    file = "student/model.safetensors"
    assert (tmp_path / "again" / file).read_bytes() == (tmp_path / file).read_bytes()


def test_targets_and_dropout_that_cannot_be_are_refused(config, tmp_path):
    config.student.lora.target_modules = ("c_attn",)
    mesh = one_device()
    with pytest.raises(ModelError, match="lora.target_modules: 'c_attn' is no linear map"):
        prepare(checked(config), tmp_path, mesh)
    config.student.lora.dropout = 0.1
    with pytest.raises(ConfigError, match=r"lora.dropout: 0.1, but no stage has dropout"):
        checked(config)


@pytest.mark.parametrize(
    "field, value", [("alpha", 32.0), ("use_rslora", True), ("target_modules", ("q_proj",))]
)
def test_fields_of_an_adapter_that_is_not_there_are_refused(config, field, value):
    """A rank that was forgotten would train the whole student."""
    config.student.lora.update(LORA | {field: value})
    said = f"lora.{field}: is for an adapter, and there is none; expected .*rank above 0"
    with pytest.raises(ConfigError, match=said):
        checked(config)
