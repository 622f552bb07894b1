"""What a run needs of chips that nobody has: counted, compiled, searched."""

import dataclasses
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import bucket, tiny
from ml_collections import ConfigDict

from promptkd_jax.cli.main import main
from promptkd_jax.infra import sharding
from promptkd_jax.infra.errors import ConfigError, ModelError
from promptkd_jax.infra.files import to_path, write_json
from promptkd_jax.models.decoder import REMAT, Decoder
from promptkd_jax.models.families.registry import PUBLISHED, from_hugging_face
from promptkd_jax.models.io import params as params_module
from promptkd_jax.models.io.hub import hub_id
from promptkd_jax.models.io.params import abstract_params
from promptkd_jax.models.layers.gated_prefix import GatedPrefix
from promptkd_jax.models.sampler import sample
from promptkd_jax.models.sampling_rules import Sampling
from promptkd_jax.plan import abstract_run as abstract_run_module
from promptkd_jax.plan import ahead, chips, costs, hlo, remat, roofline, tables
from promptkd_jax.plan import command as plan
from promptkd_jax.plan.abstract_run import abstract_run, stored_config
from promptkd_jax.training.config.checks import checked
from promptkd_jax.training.config.config_file import load_config
from promptkd_jax.training.prepare import prepare
from promptkd_jax.training.recipes import base_config, hidden_term, method_stage

ROOT = pathlib.Path(__file__).parents[2]


def llama(width: int, layers: int, num_kv_heads: int, feed_forward: int, vocab_size: int) -> dict:
    return PUBLISHED["huggyllama/llama-7b"] | {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": num_kv_heads,
        "intermediate_size": feed_forward,
        "vocab_size": vocab_size,
    }


SMALL = llama(512, 3, 4, 1024, vocab_size=1024)
SMALLER = llama(256, 2, 2, 512, vocab_size=1024)


@pytest.fixture(autouse=True)
def small_models(monkeypatch):
    table = PUBLISHED | {"some/small": SMALL, "some/smaller": SMALLER}
    monkeypatch.setattr("promptkd_jax.plan.abstract_run.PUBLISHED", table)


def small_config(**changes) -> ConfigDict:
    """PromptKD of two models that are too small to be worth it."""
    config = base_config()
    config.teacher.update(path="some/small", dtype="bfloat16", param_dtype="bfloat16")
    config.student.update(path="some/smaller", dtype="bfloat16")
    config.teacher.remat = config.student.remat = "full"
    config.data.update(train="none.jsonl", dev="none.jsonl")
    config.data.update(max_prompt_length=128, max_length=256)
    config.stages = (method_stage("promptkd", **(dict(batch_size=8, steps=10) | changes)),)
    return config


def small_run(*shape: int, **changes):
    """Of these sizes along data, fsdp and tensor; else on one device."""
    run = abstract_run(checked(small_config(**changes)))
    return run.on(plan.abstract_mesh(sizes(*shape))) if shape else run


def sizes(data: int, fsdp: int, tensor: int) -> dict[str, int]:
    return dict(zip(sharding.AXES, (data, fsdp, tensor)))


# Shapes


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("openai-community/gpt2", 0.1244),
        ("openai-community/gpt2-xl", 1.558),
        ("facebook/opt-350m", 0.3312),
        ("facebook/opt-1.3b", 1.316),
        ("facebook/opt-6.7b", 6.658),
        ("facebook/opt-13b", 12.853),
        ("huggyllama/llama-7b", 6.738),
        ("huggyllama/llama-13b", 13.016),
        ("meta-llama/Llama-3.1-8B", 8.030),
        ("meta-llama/Llama-3.1-70B", 70.554),
        ("meta-llama/Llama-3.2-1B", 1.236),
        ("meta-llama/Llama-3.2-3B", 3.213),
        ("HuggingFaceTB/SmolLM2-135M", 0.1345),
        ("HuggingFaceTB/SmolLM2-360M", 0.3618),
        ("HuggingFaceTB/SmolLM2-1.7B", 1.711),
        ("Qwen/Qwen2.5-0.5B", 0.4940),
        ("Qwen/Qwen2.5-7B", 7.616),
        ("Qwen/Qwen3-1.7B", 1.721),
        ("Qwen/Qwen3-30B-A3B", 30.53),
        ("google/gemma-2-2b", 2.614),
    ],
)
def test_known_architectures_have_the_published_number_of_parameters(name, billions):
    params = abstract_params(from_hugging_face(PUBLISHED[name], name))
    assert sum(x.size for x in jax.tree.leaves(params)) / 1e9 == pytest.approx(billions, rel=1e-3)


@pytest.mark.parametrize("file", ["gpt2", "opt", "llama", "llama31", "smollm2", "qwen3"])
def test_every_model_of_the_large_configs_is_known(file):
    config = checked(load_config([f"--config={ROOT / 'configs' / file}.py"])[0])
    for model in (config.teacher, config.student):
        assert hub_id(model.path)[0] in PUBLISHED
        assert model.remat == "full" and model.dtype == "bfloat16"
    assert config.student.param_dtype == "float32"


# All but those of many runs, and of random models.
RECIPES = {x.stem for x in (ROOT / "configs").glob("*.py")} - {"compare", "rehearsal"}


@pytest.mark.parametrize("file", sorted(RECIPES))
def test_prompts_of_recipes_that_nobody_has_published_are_behind_gates(file):
    config = checked(load_config([f"--config={ROOT / 'configs' / file}.py"])[0])
    published = file in ("gpt2", "opt", "llama")
    prompted = [stage for stage in config.stages if stage.teacher_view == "prompted"]
    assert prompted and config.soft_prompt.gated != published
    for stage in prompted:
        assert stage.regularization_schedule == ("linear" if published else "constant")


def test_a_folder_comes_before_the_table(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps(tiny.llama_config(width=8, depth=1, vocab_size=9))
    )
    found, source = stored_config(str(tmp_path))
    assert found["hidden_size"] == 8 and source == "its folder"
    with pytest.raises(ModelError, match=r"config\.json: no such file"):
        stored_config(str(ROOT / "tests"))


def test_a_model_in_a_bucket_and_one_of_a_run(tmp_path, monkeypatch):
    """Its config alone is read; of a run, that of the student."""
    pail, _ = bucket.make(monkeypatch)
    config = tiny.llama_config(width=8, depth=1, vocab_size=9)
    for folder in (pail, tmp_path):
        write_json(folder / "config.json", {"fingerprint": "0", "config": {}})
        with pytest.raises(ModelError, match="a run that has written no student yet"):
            stored_config(str(folder))
        (folder / "student").mkdir()
        write_json(folder / "student" / "config.json", config)
        assert stored_config(str(folder)) == stored_config(str(folder / "student"))
        assert stored_config(str(folder)) == (config, "its folder")
    with pytest.raises(ModelError, match="no such folder or file in the bucket"):
        stored_config(str(pail / "absent"))


# Runs


@pytest.mark.parametrize("layers", [0, (0, 2)])
def test_the_run_that_is_planned_is_the_one_that_is_prepared(layers, tmp_path):
    """Of shapes: the same state, steps and schedule, also where the student is cut out of the
    teacher and every group of parameters learns."""
    config = tiny.short_config(tmp_path / "files")
    if layers:
        config.student.update(path="", layers=layers)
    stage = {"batch_size": 4, "epochs": 2.0}
    term = hidden_term("mse", layers=((0, 0),), projection=True)
    config.stages = (
        method_stage("promptkd", **stage),
        method_stage("kd", name="hidden", hidden_terms=(term,), **stage),
        method_stage("imitkd", teacher_view="online", one_step_off_policy=True, **stage),
        method_stage("distillm", **stage),
    )
    config, mesh = checked(config), sharding.make_mesh(sizes(1, 1, 1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        made = prepare(config, to_path(tmp_path), mesh)
    run = abstract_run(config).on(mesh)
    assert run.abstract_state() == made.abstract_state()
    assert set(run.learned) == {"soft_prompt", "teacher", "projection"}
    for planned, stage in zip(run.stages, made.stages, strict=True):
        assert (planned.first, planned.steps) == (stage.first, stage.steps)
        longest = max(planned.method.response_capacity, stage.method.response_capacity)
        same = {"response_capacity": longest}  # every response is taken to be as long as it may
        assert dataclasses.replace(planned.method, **same) == dataclasses.replace(
            stage.method, **same
        )


def test_several_responses_to_a_prompt_take_fewer_rows_of_the_data():
    config = small_config(rollouts_per_prompt=4, epochs=1.0, steps=0, batch_size=8)
    run = abstract_run(checked(config), rows=100)
    assert run.num_steps == 50  # of two prompts each
    on_two, again = run.on(plan.abstract_mesh(sizes(2, 1, 1))), small_run(2, 1, 1)
    assert on_two.arguments()[2].tokens.shape == (2, 256)
    prefill, four = (roofline.phases(x)["prefill"].flops for x in (on_two, again))
    assert four == 4 * prefill
    in_slots = small_run(2, 1, 1, rollouts_per_prompt=4, max_concurrent_rollouts=4)
    assert roofline.phases(in_slots)["prefill"].flops == four
    assert roofline.phases(on_two)["decode"] == roofline.phases(again)["decode"]
    said = r"rollouts_per_prompt: 4 of 8 rows; prompts: 2 cannot be dealt out evenly to 4 devices"
    with pytest.raises(ConfigError, match=said):
        run.on(plan.abstract_mesh(sizes(2, 2, 1))).arguments()
    with pytest.raises(ConfigError, match="divides both the 2 prompts and the parameters"):
        plan.search(run, chips.parse_topology("v5p:8x8x8"))


def test_a_stage_is_planned_on_meshes_that_do_not_divide_another():
    config = small_config()
    config.stages = (method_stage("kd", batch_size=6, steps=1), *config.stages)
    sizes_of_4 = plan.abstract_mesh(sizes(2, 2, 1))
    abstract_run(checked(config)).on(sizes_of_4).arguments()
    with pytest.raises(ConfigError, match=r"config.stages\[0\].batch_size: 6 in 1 micro-batches"):
        abstract_run(checked(config), "kd").on(sizes_of_4).arguments()
    more = abstract_run(checked(config)).on(sizes_of_4).with_micro_batches(4)
    with pytest.raises(ConfigError, match=r"config.stages\[1\].batch_size: 8 in 4 micro-batches"):
        more.arguments()


# Memory


def with_auto(student="auto", **changes):
    config = small_config(**changes)
    config.teacher.remat, config.student.remat = "auto", student
    return checked(config)


@pytest.mark.parametrize("missing, policy", [(0, "none"), (1, "dots"), (2, "full"), (3, "full")])
def test_the_remat_policy_is_the_first_that_fits(missing, policy, monkeypatch):
    """In as much memory as each policy needs, less a byte."""
    config, mesh = with_auto(), plan.abstract_mesh(sizes(1, 1, 1))
    needed = [
        roofline.needed_bytes(remat.with_remat(config, policy), mesh, "cpu") for policy in REMAT
    ]
    assert sorted(needed, reverse=True) == needed and len(set(needed)) == 3
    memory = max(needed) if missing == 0 else needed[missing - 1] - 1
    monkeypatch.setattr(remat, "device_bytes", lambda: memory / remat.SHARE)
    chosen = remat.with_chosen_remat(config, mesh)
    assert chosen.teacher.remat == chosen.student.remat == policy
    assert config.teacher.remat == "auto"


def test_a_policy_that_somebody_named_stays():
    config, mesh = with_auto(student="dots"), plan.abstract_mesh(sizes(1, 1, 1))
    assert remat.with_remat(config, "none").student.remat == "dots"
    named = checked(small_config())
    assert remat.with_chosen_remat(named, mesh) is named


def test_more_devices_have_room_for_more():
    config = with_auto(batch_size=8)

    def saved(number: int) -> float:
        mesh = plan.abstract_mesh(sizes(number, 1, 1))
        most, least = (remat.with_remat(config, policy) for policy in ("none", "full"))
        return roofline.needed_bytes(most, mesh, "cpu") - roofline.needed_bytes(least, mesh, "cpu")

    np.testing.assert_allclose(saved(8), saved(1) / 8)


def test_what_layers_keep_is_what_xla_keeps():
    """Of a deep decoder alone, by the compiler's own account of one gradient."""
    tokens, found, expected = jnp.zeros((32, 64), jnp.int32), {}, {}
    deep = llama(256, 24, 2, 512, vocab_size=64)

    def loss(params, decoder):
        return jnp.sum(decoder.apply({"params": params}, tokens) ** 2)

    for policy in REMAT:
        config = from_hugging_face(deep).replace(remat=policy)
        gradient = jax.jit(jax.grad(loss), static_argnums=1)
        compiled = gradient.lower(abstract_params(config), Decoder(config)).compile()
        found[policy] = compiled.memory_analysis().temp_size_in_bytes
        count = costs.Counter(config, sizes(1, 1, 1))
        expected[policy] = roofline._saved(count, 32, 64, "cpu", 9.0)
    for more, less in (("dots", "full"), ("none", "dots")):
        saved = found[more] - found[less]
        assert 0.8 < (expected[more] - expected[less]) / saved < 1.25, (found, expected)


def test_what_the_second_attention_behind_gates_keeps():
    """By the compiler's account of the gradient for the soft prompt, less that without gates."""
    tokens, length, found, expected = jnp.zeros((4, 128), jnp.int32), 4, {}, {}
    config = from_hugging_face(llama(64, 12, 4, 64, vocab_size=64)).replace(remat="none")
    vectors = jnp.zeros((length, 64))

    def loss(prefix, params):
        return jnp.sum(Decoder(config).apply({"params": params}, tokens, prefix=prefix) ** 2)

    for gated, prefix in ((False, vectors), (True, GatedPrefix(vectors, jnp.zeros((12, 4))))):
        compiled = jax.jit(jax.grad(loss)).lower(prefix, abstract_params(config)).compile()
        found[gated] = compiled.memory_analysis().temp_size_in_bytes
        count = costs.Counter(config, sizes(1, 1, 1))
        expected[gated] = roofline._saved(count, 4, length + 128, "cpu", 9.0, gated=gated)
    second = found[True] - found[False]
    assert 0.7 < (expected[True] - expected[False]) / second < 1.4, (found, expected)


def test_the_second_attention_behind_gates_is_work():
    """4 L B T^2 N H for each forward of the prompted teacher, of which the student's update has
    one, and as much for each of the two products of a backward pass, and for what it recomputes."""
    config = small_config()
    config.soft_prompt.gated = True
    plain, gated = (roofline.phases(abstract_run(checked(x))) for x in (small_config(), config))
    run = small_run()
    teacher, rows = run.teacher.decoder.config, run.batch_size // run.stage.method.num_micro_batches
    columns = run.config.data.max_length
    one = 4 * teacher.num_layers * rows * columns**2 * teacher.num_heads * teacher.head_dim
    again = 2 if teacher.remat == "none" else 3
    number = run.stage.method.num_micro_batches
    assert gated["prompt update"].flops - plain["prompt update"].flops == number * (1 + again) * one
    assert gated["student update"].flops - plain["student update"].flops == number * one


def test_memory_is_that_of_the_real_arrays():
    """On one device every shard is whole; on many the shards are what the sharding rules say."""
    run = small_run()
    kept = roofline.kept_bytes(run)
    params = {m: abstract_params(from_hugging_face(c)) for m, c in (("p", SMALL), ("q", SMALLER))}
    real = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params["q"])
    moments = run.stage.optimizers.student.init(real)
    student = sum(x.nbytes for x in jax.tree.leaves(real))
    prompt = jnp.zeros((7, 512))
    prompt_moments = run.stage.optimizers.soft_prompt.init(prompt)
    expected = {
        "teacher": sum(2 * x.size for x in jax.tree.leaves(params["p"])),
        "student": student,
        "soft prompt": prompt.nbytes,
        "optimizers": sum(x.nbytes for x in jax.tree.leaves((moments, prompt_moments))),
        "rows and the rest": 8 * (256 + 2) * 4,
    }
    assert kept == expected
    cut = roofline.kept_bytes(small_run(2, 2, 2))
    scales = 256 * 4 * (2 * 2 + 1)  # norms of 2 layers and the last: on every device
    assert cut["student"] == (student - scales) // 4 + scales
    assert cut["rows and the rest"] == kept["rows and the rest"] // 4


def test_the_state_of_an_optimizer_is_kept_and_moved():
    """In 8 bits it is about a quarter, on every mesh, and so is what an update reads of it."""
    for shape in ((1, 1, 1), (1, 2, 2)):
        bytes_of, moved = {}, {}
        for name in ("adamw", "adamw_8bit"):
            run = small_run(*shape, optimizer=name)
            bytes_of[name] = roofline.kept_bytes(run)["optimizers"]
            moved[name] = roofline.phases(run)["student update"].hbm_bytes
        whole, small = bytes_of["adamw"], bytes_of["adamw_8bit"]
        assert 0.25 * whole < small < 0.28 * whole
        saved = moved["adamw"] - moved["adamw_8bit"]
        assert saved == pytest.approx(2 * (whole - small), rel=0.02)


def test_rows_written_ahead_are_kept_where_the_rows_lie():
    """Of each: tokens, two lengths, whose it is and whether it ended."""
    rows = 8 * (256 + 2) * 4
    for shape, devices in (((1, 1, 1), 1), ((2, 2, 2), 4)):
        kept = roofline.kept_bytes(small_run(*shape, one_step_off_policy=True))
        assert kept["rows and the rest"] == (2 * rows + 8 * 2) // devices


def test_a_step_that_writes_ahead_compiles_from_shapes():
    mesh = sharding.make_mesh(sizes(1, 1, 1), jax.devices()[:1])
    run = small_run(one_step_off_policy=True, batch_size=2).on(mesh)
    with jax.set_mesh(mesh):
        lowered = run.jitted_step(run.stage).lower(*run.arguments())
    state, _ = lowered.out_info
    assert state.pending.rows.tokens.shape == (2, 256)


def test_the_cache_counts_both_keys_and_values_of_every_column():
    config = from_hugging_face(SMALLER).replace(dtype="bfloat16")
    tokens, lengths = jnp.zeros((8, 20), jnp.int32), jnp.ones(8, jnp.int32)

    def real_bytes(config):
        def layers(params):
            return Decoder(config).prefill(params, tokens, lengths, None, 20, 10)[1].layers

        shapes = jax.eval_shape(layers, abstract_params(config))
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))

    real = real_bytes(config)
    assert costs.cache_bytes(config, 8, 30, sizes(1, 1, 1)) == real
    assert costs.cache_bytes(config, 8, 30, sizes(2, 2, 2)) == real / 8
    assert costs.cache_bytes(config, 8, 30, sizes(1, 2, 4)) == real / 4  # 2 heads, each twice
    config = config.replace(kv_cache_dtype="int8")
    assert costs.cache_bytes(config, 8, 30, sizes(1, 1, 1)) == real_bytes(config) < 0.6 * real


# Work


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_operations_are_those_that_xla_counts(family):
    """One layer, which XLA counts once as it does a loop. It also counts norms and softmax."""
    gpt2 = PUBLISHED["openai-community/gpt2"] | {"n_embd": 256, "n_head": 4, "vocab_size": 512}
    config = from_hugging_face({"llama": SMALLER, "gpt2": gpt2}[family]).replace(num_layers=1)
    decoder, params = Decoder(config), abstract_params(config)
    tokens = jax.ShapeDtypeStruct((2, 128), jnp.int32)

    def forward(params, tokens):
        return jnp.sum(decoder.apply({"params": params}, tokens))

    def counted(function):
        return jax.jit(function).lower(params, tokens).cost_analysis()["flops"]

    expected = costs.forward_flops(config, 2, 128)
    assert counted(forward) == pytest.approx(expected, rel=0.05)
    both = expected + costs.backward_flops(config, 2, 128, weights=True)
    assert counted(jax.grad(forward)) == pytest.approx(both, rel=0.05)
    assert both == 3 * expected
    again = costs.backward_flops(config.replace(remat="full"), 2, 128, weights=True)
    assert again == 3 * expected
    inputs = costs.backward_flops(config, 2, 128, weights=False)
    assert inputs == 2 * expected - 2 * 2 * 128 * costs.matrix_parameters(config)


def test_a_token_is_multiplied_with_its_own_experts_alone():
    config = from_hugging_face(PUBLISHED["Qwen/Qwen3-30B-A3B"])
    layers = abstract_params(config)["layers"]
    matrices = [x.size for x in jax.tree.leaves(layers) if x.ndim > 2]
    of_experts = [
        x.size for name in ("gate", "up", "down") for x in layers["experts"][name].values()
    ]
    assert costs.matrix_parameters(config) == sum(matrices)
    for_token = sum(matrices) - sum(of_experts) * (128 - 8) // 128
    assert costs.token_parameters(config) == for_token
    assert costs.forward_flops(config, 1, 1, keys=0) == 2 * for_token
    count = costs.Counter(config, sizes(1, 1, 1))
    for rows, chosen in ((1, 8), (4, 32), (64, 128)):
        read = sum(matrices) - sum(of_experts) * (128 - chosen) // 128
        cache = costs.cache_bytes(config, rows, 9, sizes(1, 1, 1))
        expected = 4 * read + count.head_bytes + cache
        assert count.decode(rows, 9, 1).hbm_bytes == expected


def test_experts_have_places_for_a_quarter_more_than_their_share_and_sinks_no_kernel():
    hf_config = {"model_type": "gpt_oss", "hidden_size": 64, "num_hidden_layers": 1}
    hf_config |= {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 8}
    hf_config |= {"intermediate_size": 32, "num_local_experts": 8, "num_experts_per_tok": 2}
    config = from_hugging_face(hf_config | {"vocab_size": 64, "max_position_embeddings": 512})
    config = config.replace(dtype="bfloat16")
    one, eight = (costs.Counter(config, sizes(1, 1, t)) for t in (1, 8))
    heads, pair = 4 * 8 * 8, 2 * 64 + 4 * 32
    assert one.activation_bytes == 2 * (2 * 64 + 2 * pair + heads)
    assert eight.activation_bytes == 2 * (2 * 64 + 2 * 1.25 / 8 * pair + heads / 8)
    plain = costs.Counter(config.replace(attention_sinks=False), sizes(1, 1, 1))
    found, without = (roofline._saved(x, 2, 256, "gpu", 9.0) for x in (one, plain))
    assert found - without == 2 * 256 * 3 * 4 * 8 * 256  # the scores, which cuDNN would not keep
    kept = roofline._saved(costs.Counter(plain.config, sizes(1, 1, 8)), 2, 256, "gpu", 9.0)
    assert kept == 2 * 256 * 1.4 * 2 * (2 * 64 + heads / 8)  # turns of experts keep nothing


def test_decode_reads_all_weights_and_the_cache_for_every_token():
    run, one = small_run(), sizes(1, 1, 1)
    decode = roofline.phases(run)["decode"]
    student = run.student.decoder.config
    weights = 2 * (costs.matrix_parameters(student) + 1024 * 256)
    assert decode.hbm_bytes == 128 * (weights + costs.cache_bytes(student, 8, 256, one))
    assert decode.ici_bytes == 0
    assert roofline.phases(small_run(1, 1, 2))["decode"].ici_bytes == (
        128
        * (2 * student.num_layers + 1)
        * 2
        * 8
        * 256
        * 2
        / 2  # all-reduces of [8, 256], 2 a layer
    )


def test_a_tpu_has_a_head_whole_in_a_loss_where_tensor_does_not_divide_the_vocabulary(monkeypatch):
    """That of both models, whose teacher's own vocabulary is padded evenly."""
    odd = {
        name: llama(256, 2, 2, 512, vocab_size=size)
        for name, size in (("some/small", 1024), ("some/smaller", 1022))
    }
    monkeypatch.setattr("promptkd_jax.plan.abstract_run.PUBLISHED", odd)
    run = small_run(1, 2, 4)
    step = roofline._step(run)
    uneven = step.student
    assert uneven.uneven_vocabulary and step.teacher.uneven_vocabulary
    assert not roofline._step(small_run(1, 2, 2)).student.uneven_vocabulary
    assert not roofline._step(run, "gpu").student.uneven_vocabulary
    even = dataclasses.replace(uneven, uneven_vocabulary=False)
    assert uneven.head_bytes == even.head_bytes  # padded to 1024, a rollout has it in parts
    whole = 2 * 1024 * 256  # in bfloat16
    for products in (1, 3):
        more = uneven.head(8, 128, products) + even.head(8, 128, products) * -1
        # Read as often as blocks; gathered from 8 devices, not 2 of them; of 3 products one is a
        # gradient in float32, summed up over `tensor` as well.
        blocks = uneven.blocks(8, 128)
        assert more.hbm_bytes == products * blocks * whole * 3 / 4
        gathered = whole * (7 / 8 - 1 / 8)
        assert more.ici_bytes == gathered + (products == 3) * 2 * whole * 3 / 4
        assert more.flops == more.dcn_bytes == 0
    on_tpu, on_gpu = (roofline.temporary_bytes(run, name)["update"] for name in ("tpu", "gpu"))
    work_of_gpu = roofline.phases(run, "gpu")
    monkeypatch.setattr(costs.Counter, "loss_head_bytes", costs.Counter.head_bytes)
    assert on_tpu - roofline.temporary_bytes(run, "tpu")["update"] == 4 * whole * 3 / 4
    assert on_gpu == roofline.temporary_bytes(run, "gpu")["update"]
    assert work_of_gpu == roofline.phases(run, "gpu")


def test_what_is_read_for_every_token_is_as_small_as_it_is_rounded_to():
    rounded, whole = small_run(1, 2, 1, rollout_quantize="int8"), small_run(1, 2, 1)
    found, expected = (roofline.phases(run) for run in (rounded, whole))
    kernels = costs.matrix_parameters(whole.student.decoder.config)
    assert expected["decode"].hbm_bytes - found["decode"].hbm_bytes == 128 * kernels
    assert found["student update"] == expected["student update"]
    # Parameters in float32 are read, and kernels written and read in one byte in place of two.
    more = found["prefill"].hbm_bytes - expected["prefill"].hbm_bytes
    assert more == 4 * kernels / 2 - (2 + 1) * kernels
    temporaries = [roofline.temporary_bytes(run)["rollout"] for run in (whole, rounded)]
    assert temporaries[0] - temporaries[1] == 2 * kernels  # the compiler for TPUs has two copies
    in_half = small_config(rollout_quantize="int8")
    in_half.student.param_dtype = "bfloat16"
    alone = abstract_run(checked(in_half)).on(plan.abstract_mesh(sizes(1, 1, 1)))
    found = roofline.temporary_bytes(alone)
    assert found["rollout"] == found["cache"] + 2 * kernels  # nothing is cast, nothing gathered
    adapter = small_config()
    adapter.student.update(quantize="int8")
    adapter.student.lora.rank = 2
    of_base = roofline.phases(abstract_run(checked(adapter)))["decode"]
    plain = roofline.phases(small_run())["decode"]
    assert plain.hbm_bytes - of_base.hbm_bytes == 128 * kernels


def test_phases_follow_the_method():
    prompted = roofline.phases(small_run())
    assert list(prompted) == list(roofline.PHASES)
    gold = small_config()
    gold.stages = (method_stage("kd", batch_size=8, steps=10),)
    assert list(roofline.phases(abstract_run(checked(gold)))) == ["student update"]
    assert run_flops(roofline.phases(small_run(length_buckets=2))) == run_flops(prompted)
    in_parts = roofline.phases(small_run(gradient_accumulation_steps=2))
    again = costs.forward_flops(small_run().student.decoder.config, 8, 256)
    assert run_flops(in_parts) - run_flops(prompted) == again  # it is not shared then
    without = small_run(regularization=0.0)
    plain = run_flops(prompted) - run_flops(roofline.phases(without))
    teacher = without.teacher.decoder.config
    heads = costs.head_flops(teacher, 8, 128)
    assert plain == costs.forward_flops(teacher, 8, 256) + heads


def run_flops(phases) -> float:
    return sum(work.flops for work in phases.values())


# Traffic

IN_A_LOOP = """
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

def on_device(x):
    def body(total, row):  # 5 times: an all-reduce of 16 floats among 4
        return total + jax.lax.psum(row, "b"), None
    total, _ = jax.lax.scan(body, jnp.zeros(16), x)
    return jax.lax.all_gather(total, "a", tiled=True)  # once: 32 floats among 2

cut = jax.shard_map(on_device, mesh=mesh, in_specs=P(None, "b"), out_specs=P(), check_vma=False)
print(jax.jit(cut).lower(jax.ShapeDtypeStruct((5, 64), jnp.float32)).compile().as_text())
"""


def test_collectives_in_a_loop_count_as_often_as_it_turns():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    text = subprocess.run(
        [sys.executable, "-c", IN_A_LOOP],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = {one.kind: one for one in hlo.collectives(text)}
    assert set(found) == {"all-reduce", "all-gather"}
    reduce, gather = found["all-reduce"], found["all-gather"]
    assert (reduce.size, reduce.group, reduce.trips) == (16 * 4, 4, 5)
    assert reduce.ici_bytes == 5 * 64 * 2 * 3 / 4
    assert (gather.size, gather.group, gather.trips) == (32 * 4, 2, 1)
    assert gather.ici_bytes == 128 / 2
    # Two slices of four devices: "a" goes between them, "b" does not.
    between = {one.kind: one for one in hlo.collectives(text, slice_devices=4)}
    assert between["all-reduce"].dcn_bytes == 0
    assert between["all-gather"].ici_bytes == 0
    assert between["all-gather"].dcn_bytes == 128 / 2


TPU_TEXT = """\
HloModule jit_step
%condition (p: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(7)
  %p = (s32[]{:T(128)}, f32[8]{0:T(8)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}
%unknown (p: (s32[], f32[8])) -> pred[] {
  %p.1 = (s32[]{:T(128)}, f32[8]{0:T(8)S(1)}) parameter(0)
  ROOT %odd = pred[]{:T(512)} custom-call(%p.1)
}
%started (p: f32[8]) -> f32[16] {
  %all-gather.1 = f32[16]{0:T(8)} all-gather(%p), channel_id=3, replica_groups=[2,2]<=[4]
}
%beside (p: f32[8]) -> f32[16] {
  %all-gather.2 = f32[16]{0:T(8)} all-gather(%p), channel_id=3, replica_groups=[2,2]<=[4]
}
%all-reduce-scatter.1 (p: bf16[8]) -> bf16[4] {
  %all-reduce.9 = bf16[8]{0} all-reduce(%p), channel_id=4, replica_groups=mesh['x'=2,'y'=2] {'y'}
}
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %kernel = f32[8]{0} custom-call(%p), custom_call_target="tpu_custom_call", metadata={text="
}
"}
  %f = f32[16]{0} fusion(%p), kind=kCustom, calls=%beside
  %s = bf16[4]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
}
%body.2 (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %permute = f32[8]{0} collective-permute(%p), source_target_pairs={{0,1},{1,0}}
}
ENTRY %main (p: f32[8]) -> f32[8] {
  %send = (f32[4]{0}, u32[], token[]) send(%p), frontend_attributes={_xla_megascale_target="{1}"}
  %async-collective-start = f32[16]{0} fusion(%p), kind=kCustom, calls=%started
  %while = (s32[]{:T(128)}, /*index=1*/f32[8]{0}) while(%t), condition=%condition, body=%body
  %while.2 = (s32[], f32[8]{0}) while(%t), condition=%unknown, body=%body.2, metadata={op_name="x"}
}
"""


def test_the_tpu_compilers_ways_of_writing():
    """Loops without a count, a gather that goes on beside a loop, a reduce-scatter as a fusion."""
    listed = hlo.collectives(TPU_TEXT, unknown_trips=11)
    found = {one.kind: one for one in listed}
    assert len(listed) == 4
    assert {kind: (one.size, one.trips) for kind, one in found.items()} == {
        "all-gather": (64, 1),
        "reduce-scatter": (16, 7),
        "collective-permute": (32, 11),
        "send": (16, 1),
    }
    assert (found["send"].ici_bytes, found["send"].dcn_bytes) == (0, 16)
    assert found["reduce-scatter"].ici_bytes == 7 * 16 / 2


def test_cycles_are_counted_as_often_as_a_loop_turns():
    text = TPU_TEXT
    for name, cycles in (("%f =", 10), ("%permute", 100), ("%all-gather.1", 5000), ("%send", 1)):
        line = next(line for line in text.splitlines() if name in line)
        config = f', backend_config={{"window_config":{{"estimated_cycles":"{cycles}"}}}}'
        text = text.replace(line, line + config)
    kernel = ', backend_config={"cost_estimate":{"flops":"600","x":"0","bytes_accessed":"20"}}'
    line = next(line for line in text.splitlines() if "%odd" in line)
    text = text.replace(line, line.replace("custom-call(%p.1)", f"custom-call(%p.1){kernel}"))
    # 7 turns of the first loop, as many of the second as we say; none of what a fusion consists of.
    found = hlo.expectation(text, unknown_trips=11)
    assert found == (7 * 10 + 11 * 100 + 1, 11 * 600)
    assert hlo.expectation(text, unknown_trips=0) == (7 * 10 + 1, 0)
    by_name = hlo.expectation(text, unknown_trips={"x": 3}.__getitem__)
    assert by_name == (7 * 10 + 3 * 100 + 1, 3 * 600)
    assert found.seconds(10, 100) == 117.1 + 66


def test_of_the_branches_of_a_conditional_the_longest_counts():
    text = ""
    for cycles in (5, 20, 8):
        config = f'backend_config={{"estimated_cycles":"{cycles}"}}'
        text += (
            f"%branch.{cycles} (p: f32[8]) -> f32[8] {{\n  %a = f32[8] add(%p, %p), {config}\n}}\n"
        )
    branches = "branch_computations={%branch.5, %branch.20, %branch.8}"
    text += f"ENTRY %main (p: f32[8]) -> f32[8] {{\n  %c = f32[8] conditional(%p), {branches}\n}}"
    assert hlo.expectation(text) == (20, 0)


def test_experts_take_one_turn_and_losses_one_for_each_block():
    run = small_run(batch_size=2**14).on(abstract_run_module.abstract_mesh(sizes(1, 1, 1)))
    trips = ahead._trips(run, 0)
    inside = "layers/experts/shard_map/while"
    assert trips("jit(step)/jvp(head)/while") > 1
    assert trips(f"jit(step)/transpose(jvp(Decoder))/while/body/{inside}") == 1
    for before in ("while/body/Decoder", "queue/while/body/while/body/Decoder"):
        assert trips(f"jit(step)/{before}/jit(_decode_layer)/Layer/experts/shard_map/while") == 1


def test_rows_that_wait_for_a_slot_are_written_in_rounds():
    mesh = abstract_run_module.abstract_mesh(sizes(1, 1, 1))
    run = small_run(batch_size=8, max_concurrent_rollouts=2).on(mesh)
    tokens = run.stage.method.rollout_length
    trips = ahead._trips(run, tokens)
    first, rounds = trips("jit(step)/while"), trips("jit(step)/queue/while")
    assert (first, rounds) == (tokens, 6)  # 6 rows wait, one is let in at a time
    assert first + rounds * trips("jit(step)/queue/while/body/while") == tokens * 8 / 2
    assert ahead._trips(run, 0)("jit(step)/queue/while") == 6
    plain = ahead._trips(small_run(batch_size=8).on(mesh), tokens)
    assert (plain("jit(step)/while"), plain("jit(step)/queue/while")) == (tokens, 0)
    many = small_run(batch_size=1024).on(mesh)  # half of them wait
    assert ahead._trips(many, tokens)("jit(step)/queue/while") == 4
    phases = (roofline.phases(small_run(batch_size=n))["decode"] for n in (1024, 512))
    assert next(phases) == next(phases) * 2


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", [[0, 1], [2, 3]]),
        ("mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
        ("mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
    ],
)
def test_replica_groups_in_all_notations(text, groups):
    assert hlo._groups(f", replica_groups={text}, channel_id=1").tolist() == groups


# Plans


def test_a_plan_from_shapes_alone():
    slices = chips.parse_topology("v5e:2x2")
    found = plan.estimate(small_run(), slices, sizes(1, 2, 2), price=2.0)
    assert found["memory"]["fits"] and found["memory"]["by"] == "estimate"
    phases = found["phases"].values()
    in_turn = sum(sum(one["seconds"].values()) for one in phases)
    at_least = sum(max(one["seconds"].values()) for one in phases)
    assert found["seconds_per_step"] == pytest.approx(in_turn, rel=1e-12)
    assert found["least_seconds_per_step"] == pytest.approx(at_least, rel=1e-12)
    assert found["tokens_per_second"] == 8 * 256 / found["seconds_per_step"]
    assert found["usd"] == pytest.approx(10 * found["seconds_per_step"] * 4 * 2.0 / 3600)
    million = found["usd"] / (10 * 8 * 256) * 1e6
    assert found["usd_per_million_tokens"] == pytest.approx(million)
    json.dumps(found)


def test_more_chips_hold_less_each():
    before = None
    for chips_along in (1, 2, 4, 8):
        kept = roofline.kept_bytes(small_run(1, chips_along, 4, batch_size=64))
        total = kept["teacher"] + kept["student"] + kept["optimizers"]
        assert before is None or 0.5 * before <= total < 0.52 * before
        before = total


def test_the_search_leaves_out_what_does_not_divide_and_ranks_the_rest():
    found, dropped = plan.search(small_run(), chips.parse_topology("v5e:4x4"))
    assert dropped["rows do not divide"] and dropped["a parameter does not divide"]
    for one in found:
        rows, mesh = 8 // one["micro_batches"], one["mesh"]
        assert rows % (mesh["data"] * mesh["fsdp"]) == 0
        assert mesh["tensor"] in (1, 2, 4)  # 4 heads
        assert np.prod(list(mesh.values())) == 16
    pace = [one["seconds_per_step"] for one in found]
    assert all(after > 0.97 * before for before, after in zip(pace, pace[1:]))
    across, _ = plan.search(small_run(), chips.parse_topology("v5e:2x2", 4))
    assert across and all(one["mesh"]["data"] % 4 == 0 for one in across)


def test_a_search_traces_each_padding_of_each_model_once(monkeypatch):
    traced, config = [], small_config()

    def counted(config):
        traced.append(config)
        return Decoder(config)

    monkeypatch.setattr(params_module, "Decoder", counted)
    params_module._abstract.cache_clear()
    run = abstract_run(checked(config))
    plan.search(run, chips.parse_topology("v5e:2x4"))
    plan.search(run, chips.parse_topology("v6e:2x4"))
    assert len(traced) == len(set(traced)) > 2


def test_a_search_for_what_cannot_be_says_so():
    with pytest.raises(ConfigError, match=r"--search: no mesh of 4096 devices divides both the 8"):
        plan.search(small_run(), chips.parse_topology("v5p:16x16x16"))


@pytest.mark.parametrize(
    ("topology", "number", "says"),
    [
        ("v9:2x2", 1, r"'v9:2x2' names no slice; there are v4, v5e, v5p, v6e, tpu7x, such as v4"),
        ("v5e", 1, "'v5e' names no slice"),
        ("v5e:8x4", 1, r"no slice 'v5e:8x4'; there are v5e:1x1 \(v5litepod-1\), .*v5e:4x8"),
        ("v6e:3x3", 1, r"no slice 'v6e:3x3'; there are .*v6e:16x16 \(v6e-256\)"),
        ("v5litepod-48", 1, "no slice 'v5litepod-48', which counts chips"),
        ("v5p-100", 1, "no slice 'v5p-100', which counts TensorCores, two to a chip"),
        ("v5p-7", 1, "no slice 'v5p-7'"),
        ("v4:8x4x4", 1, r"no slice 'v4:8x4x4'; .* A <= B <= C, all multiples of 4"),
        ("v5p:2x2x8", 1, "no slice 'v5p:2x2x8'"),
        ("v5p:16x16x28", 1, "is 7168 chips; the largest v5p slice has 6144"),
        ("v5e:2x2x1", 1, "has no shape of 2 numbers, as a v5e slice has; such as"),
        ("v5p:4x4", 1, "has no shape of 3 numbers"),
        ("v5e:32x16", 1, "is 512 chips; the largest v5e slice has 256"),
        ("v5e:2x2", 0, "--slices: 0 is not at least 1"),
    ],
)
def test_topologies_that_there_are_not(topology, number, says):
    with pytest.raises(ConfigError, match=says):
        chips.parse_topology(topology, number)


@pytest.mark.parametrize(
    ("name", "google", "number"),
    [
        ("v4:2x2x1", "v4-8", 4),
        ("v4:2x2x4", "v4-32", 16),
        ("v4:8x8x12", "v4-1536", 768),
        ("v5e:2x4", "v5litepod-8", 8),
        ("v5e:8x8", "v5litepod-64", 64),
        ("v5e:16x16", "v5litepod-256", 256),
        ("v5p:2x4x4", "v5p-64", 32),
        ("v5p:4x4x4", "v5p-128", 64),
        ("v5p:4x8x12", "v5p-768", 384),
        ("v5p:16x16x24", "v5p-12288", 6144),
        ("v6e:8x8", "v6e-64", 64),
        ("tpu7x:2x2x1", "tpu7x-8", 4),
    ],
)
def test_both_names_of_a_slice(name, google, number):
    """Google's counts TensorCores, and means the most compact shape of so many."""
    found = chips.parse_topology(name)
    assert found == chips.parse_topology(google)
    assert (found.name, found.google, found.chips) == (name, google, number)


def test_a_slice_that_only_its_shape_names():
    assert chips.parse_topology("v5p:4x4x16").google is None
    assert chips.parse_topology("v5p-512").name == "v5p:4x8x8"
    assert chips.parse_topology("v5e-64").google == "v5litepod-64"


def test_a_chip_stands_for_all_its_slices():
    found = chips.parse_topologies("v6e,v5p-128", 2)
    sizes = [1, 4, 8, 16, 32, 64, 128, 256, 64]
    assert [one.chips for one in found] == [2 * size for size in sizes]
    assert [one.chips for one in chips.parse_topologies("v4")] == [4, 8, 16, 32, 64, 128, 192, 256]


@pytest.mark.parametrize(
    ("text", "number", "says"),
    [
        ("1,2", 1, "'1,2' is not data,fsdp,tensor, such as 1,-1,1"),
        ("1,2,3", 1, "data=1 x fsdp=2 x tensor=3 does not make 4 devices"),
        ("-1,-1,1", 1, "--mesh: '-1,-1,1' is not data,fsdp,tensor.*or once -1"),
        ("0,4,1", 1, "--mesh: '0,4,1' is not data,fsdp,tensor.*each at least 1"),
        ("1,-1,1", 2, "--mesh.data: 1 is not a multiple of the 2 slices"),
    ],
)
def test_meshes_that_there_are_not(text, number, says):
    with pytest.raises(ConfigError, match=says):
        plan.mesh_sizes(small_run(), chips.parse_topology("v5e:2x2", number), text)


def test_the_mesh_of_the_config_and_of_the_command_line():
    slices = chips.parse_topology("tpu7x:2x2x1")  # two devices a chip
    assert plan.mesh_sizes(small_run(), slices, None) == sizes(8, 1, 1)
    assert plan.mesh_sizes(small_run(), slices, "2,-1,2") == sizes(2, 2, 2)


def command(*arguments: str, capsys) -> str:
    main(["plan", f"--config={ROOT}/configs/llama.py", "--topology=v5e:8x8", *arguments])
    return capsys.readouterr().out


def test_without_the_compiler_the_estimate_is_marked(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(ahead, "has_compiler", lambda: False)
    said = command("--mesh=1,8,8", f"--output={tmp_path}/plan.json", capsys=capsys)
    assert "ESTIMATE ONLY" in said and "pip install -e '.[tpu]'" in " ".join(said.split())
    assert "FITS" in said
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["compiled"] is None and found["memory"]["by"] == "estimate"
    assert "ESTIMATE" not in command("--mesh=1,8,8", "--no-compile", capsys=capsys)
    with pytest.raises(SystemExit) as ended:
        command("--no-compile", capsys=capsys)  # all along data
    assert ended.value.code == 1 and "DOES NOT FIT" in capsys.readouterr().out


def test_a_plan_says_how_many_rows_it_writes_at_once_where_not_all(capsys):
    many = "--config.stages[0].batch_size=8192"  # 1,024 on each of 8 devices
    how = "--mesh=1,8,8", "--no-compile"
    with pytest.raises(SystemExit):  # they do not fit
        command(*how, many, capsys=capsys)
    assert "micro-batches; 4096 rows written at once" in capsys.readouterr().out
    assert "written at once" not in command(*how, capsys=capsys)
    assert small_run(batch_size=1024).rows_at_once == 512
    gold = small_config()
    gold.stages = (method_stage("kd", batch_size=1024, steps=1),)
    assert abstract_run(checked(gold)).rows_at_once == 1024  # of the data


def test_a_search_shows_the_smallest_where_none_fits(capsys):
    with pytest.raises(SystemExit) as ended:
        command("--no-compile", "--search", "--config.stages[0].batch_size=8192", capsys=capsys)
    said = capsys.readouterr().out
    assert ended.value.code == 1 and "3 of 3: the smallest, since none fits" in said
    shown = [float(line.split("|")[3]) for line in said.splitlines() if "| estimate |" in line]
    flags = [f"--config={ROOT}/configs/llama.py", "--config.stages[0].batch_size=8192"]
    run = abstract_run(checked(load_config(flags)[0]))
    every, _ = plan.search(run, chips.parse_topology("v5e:8x8"))
    least = sorted(one["memory"]["needed"] / 2**30 for one in every)[:3]
    assert shown == pytest.approx(least, abs=0.01)


def test_the_flags_of_a_plan_are_those_of_its_mesh(capsys):
    """What is printed to be pasted, pasted: the config has that mesh and those micro-batches."""
    said = command("--no-compile", "--search", capsys=capsys)
    assert "the compiler mostly expects more)" in said
    (line,) = [line for line in said.splitlines() if line.startswith("the first: ")]
    pasted = shlex.split(line.removeprefix("the first: "))
    config, rest = load_config([f"--config={ROOT}/configs/llama.py", *pasted])
    assert not rest
    best = plan.search(abstract_run(checked(config)), chips.parse_topology("v5e:8x8"))[0][0]
    assert dict(config.mesh) == best["mesh"]
    assert config.stages[0].gradient_accumulation_steps == best["micro_batches"]


def test_what_does_not_fit_has_no_price():
    tight = dataclasses.replace(chips.CHIPS["v5e"], usable_gib=1e-3)
    slices = chips.SliceTopology(tight, (2, 2))
    found = plan.estimate(small_run(), slices, sizes(1, 2, 2), price=2.0)
    assert not found["memory"]["fits"]
    assert found["usd"] is found["usd_per_hour"] is found["usd_per_million_tokens"] is None
    assert "cost: none, it does not fit" in tables._summary(found)


def test_slices_are_compared_cheapest_first(capsys, tmp_path):
    """What fits by its price, then what has none, then what does not fit: 7B into one small slice;
    64 rows and 40 heads are for no 4,096 chips."""
    file = tmp_path / "plans.json"
    main(
        [
            "plan",
            *[f"--config={ROOT}/configs/llama.py", f"--output={file}"]
            + ["--topology=v5e:4x4,v6e-16,v5e:2x2,tpu7x-8,v4:16x16x16", "--no-compile"],
        ]
    )
    said = capsys.readouterr().out
    found = json.loads(file.read_text())
    names = [one["google"] for one in found["plans"]]
    assert names == ["v6e-16", "v5litepod-16", "tpu7x-8", "v5litepod-4"]
    assert found["impossible"] == ["v4:16x16x16"]
    prices = [one["usd_per_million_tokens"] for one in found["plans"]]
    assert prices[0] < prices[1] and prices[2] is prices[3] is None
    assert "the first, v6e:4x4: --config.mesh.data=" in said
    assert "11,435 training rows: the published split of Dolly" in said


def test_the_rows_that_were_counted_are_named(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"instruction": "a"}\n\n{"instruction": "b"}\n')
    config = small_config(steps=0, epochs=16.0)
    assert "not counted, none.jsonl is no file here" in abstract_run(checked(config)).notes[-1]
    assert "7 training rows: given" in abstract_run(checked(config), rows=7).notes
    config.data.train = str(file)
    assert abstract_run(checked(config)).notes[-1].startswith(f"2 training rows: all of {file}")
    config.data.train = ((str(file), 1), ("none.jsonl", 1))
    config.data.train_rows = 1
    said = abstract_run(checked(config)).notes[-1]  # as many as there may be are not counted
    assert f"the first 1 of {file}; not counted, none.jsonl is no file here" in said
    config.data.train = str(file)
    said = f"1 training rows: the first 1 of {file}"
    assert abstract_run(checked(config)).notes[-1].startswith(said)


# Commands that are about to be launched


def check_launched(*words: str, where=("--devices=4",)) -> None:
    main(["plan", "--no-compile", *where, "--", "promptkd", *words])


def test_a_command_is_checked_for_its_devices(capsys):
    train = ("train", f"--config={ROOT}/configs/llama.py", "--workdir=gs://b/r")
    check_launched(*train, "--config.mesh.fsdp=4")
    assert "checked for 4 devices: promptkd train" in capsys.readouterr().out
    check_launched(
        *train, "--config.mesh.fsdp=8", "--config.mesh.tensor=8", where=["--topology=v5e-64"]
    )
    assert "FITS" in capsys.readouterr().out
    check_launched("evaluate", "--model=m", "--data=d", "--output=o", "--mesh=1,4,1")
    check_launched("reproduce", f"--config={ROOT}/configs/gpt2.py:student=base", "--workdir=r")
    check_launched("cache", f"--config={ROOT}/configs/gpt2.py:student=base", "--output=r")
    check_launched(
        "compare", f"--config={ROOT}/configs/compare.py", "--workdir=r", where=["--devices=1"]
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["tain"], "no such command; there are data, convert, init"),
        (["compare", "--config=c.py"], "is one process, and not for 4 devices"),
        (["data", "--config=c.py"], "is one process, and not for 4 devices"),
        (["train", "--workdir=r", "--config=c.py"], "no Python file 'c.py'"),
        (["train", "--workdir=r", "LLAMA", "--confg.seed=1"], "unknown arguments: --confg.seed=1"),
        (["train", "--workdir=r", "LLAMA", "--config.sed=1"], "did you mean seed"),
        (["train", "--workdir=r", "LLAMA", "--config.mesh.fsdp=8"], "does not make 4 devices"),
        (["train", "--workdir=r", "LLAMA", "--config.stages[0].batch_size=6"], "dealt out evenly"),
        (
            ["train", "--workdir=r", "LLAMA", "--config.stages[0].max_concurrent_rollouts=6"],
            "max_concurrent_rollouts",
        ),
        (["train", "--workdir=r", "LLAMA", "--config.student.path=tests"], "no such file"),
        (["evaluate", "--model=m", "--data=d", "--output=o", "--mesh=1,8,1"], "4 devices"),
        (["evaluate", "--model=m", "--data=d"], "2"),
        (["cache", "LLAMA", "--output=o", "--config.mesh.fsdp=3"], "does not make 4 devices"),
        (["plan", "LLAMA"], "promptkd plan: is what checks"),
    ],
)
def test_a_command_that_cannot_work_is_refused(words, says, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = [f"--config={ROOT}/configs/llama.py" if word == "LLAMA" else word for word in words]
    with pytest.raises(SystemExit, match=re.escape(says)):
        check_launched(*words)


def test_a_comparison_is_checked_before_it_is_launched():
    compare = ("compare", f"--config={ROOT}/configs/compare.py", "--workdir=r")
    with pytest.raises(SystemExit, match="config.seeds: .* names one of them twice"):
        check_launched(*compare, "--config.seeds=(1,1)", where=["--devices=1"])


def test_a_command_is_checked_for_a_topology_or_for_devices():
    for where in ([], ["--devices=4", "--topology=v5e:2x2"]):
        with pytest.raises(SystemExit, match="give --topology or --devices"):
            check_launched("evaluate", "--model=m", "--data=d", "--output=o", where=where)


def test_a_run_whose_state_alone_does_not_fit_is_refused():
    train = ("train", f"--config={ROOT}/configs/llama.py", "--workdir=gs://b/r")
    mesh = ("--config.mesh.data=16", "--config.mesh.fsdp=1")
    with pytest.raises(SystemExit, match="not fit into v5e:4x4; this fits by the estimate: --"):
        check_launched(*train, *mesh, where=["--topology=v5litepod-16"])


def test_mistakes_end_with_a_message(capsys):
    for arguments, says in (
        (["--mesh=1,1,32"], "data=1 x fsdp=1 x tensor=32 does not make 64 devices"),
        (
            ["--mesh=64,1,1", "--config.stages[0].gradient_accumulation_steps=2"],
            "cannot be dealt out evenly",
        ),
        (["--mesh=1,8,8", "--search"], "--mesh 1,8,8: is of one plan"),
        (["--mesh=1,8,8", "--topology=v5e:8x8,v6e"], "--mesh 1,8,8: is of one plan"),
        (["--devices=4"], "--devices: of unknown devices only a command"),
        (["--stage=first"], "--stage: 'first' is no stage; there are promptkd"),
        (["--config.teacher.remat=some"], "config.teacher.remat: 'some' is not one of"),
    ):
        with pytest.raises(SystemExit, match=says):
            command("--no-compile", *arguments, capsys=capsys)


def test_what_the_compiler_says_of_a_program_that_is_too_large():
    found = ahead._too_large(
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
        "hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G."
    )
    assert (found.needed, found.usable) == (int(20.5 * 2**30), int(15.75 * 2**30))


@pytest.mark.skipif(not ahead.has_compiler(), reason=ahead.MISSING)
def test_the_compiler_agrees_with_what_is_counted():
    slices = chips.parse_topology("v5e:2x2")
    run = small_run()
    found = plan.compiled(run, slices, sizes(1, 2, 2))
    programs = found["compiled"]["programs"]
    step = programs["step"]
    kept = sum(found["memory"]["kept"].values())
    assert step["arguments"] == pytest.approx(kept, rel=0.02)
    assert found["memory"]["needed"] == step["total"] < found["memory"]["usable"]
    guess = plan.estimate(run, slices, sizes(1, 2, 2))
    for name, phase in found["phases"].items():
        assert phase["flops"] == guess["phases"][name]["flops"]
    assert 0.3 < sent(found) / sent(guess) < 3


@pytest.mark.skipif(not ahead.has_compiler(), reason=ahead.MISSING)
def test_the_compiler_expects_a_token_to_take_little_more_than_reading_the_model():
    """2 layers of Llama-3.2 1B with 64 rows of 512 columns on a v5e, heads of half a register."""
    mesh = ahead.described_mesh(sizes(1, 1, 1), chips.parse_topology("v5e:1x1"))
    config = from_hugging_face(PUBLISHED["meta-llama/Llama-3.2-1B"])
    config = config.replace(dtype="bfloat16", param_dtype="bfloat16", num_layers=2, vocab_size=8192)
    here = sharding.rows_sharding(mesh, 64)

    def shape(x, dtype=None):
        return jax.ShapeDtypeStruct(getattr(x, "shape", x), dtype or x.dtype, sharding=here)

    def write(params, tokens, lengths, keys):
        how = dict(max_new_tokens=256, sampling=Sampling(eos_ids=(2,)))
        return sample(Decoder(config), params, tokens, lengths, keys, **how)

    params = abstract_params(config)
    params = jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
        params,
        sharding.shardings(params, mesh),
    )
    keys = shape(jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 64)))
    inputs = shape((64, 256), jnp.int32), shape((64,), jnp.int32), keys
    with jax.set_mesh(mesh):
        text = jax.jit(write).lower(params, *inputs).compile().as_text()
    # The loop over tokens is the only one whose turns the compiler does not know.
    once, twice = (hlo.expectation(text, unknown_trips=n).cycles for n in (1, 2))
    cost, chip = costs.Counter(config, mesh.shape).decode(64, 512, 1), chips.CHIPS["v5e"]
    least = cost.hbm_bytes / (chip.hbm_gbps * 1e9) * chip.clock
    assert least / 2 < twice - once < 1.75 * least


@pytest.mark.skipif(not ahead.has_compiler(), reason=ahead.MISSING)
def test_the_compiler_expects_layers_to_take_little_more_than_their_products():
    """The gradient of 2 layers of a Llama 7B, 128 rows of 512 columns on 4 x 4 v5e. Where kernels
    are not gathered it expects 2.6 times the products."""
    mesh = ahead.described_mesh(sizes(1, 8, 2), chips.parse_topology("v5e:4x4"))
    config = from_hugging_face(PUBLISHED["MiniLLM/init-Llama-7B"])
    config = config.replace(dtype="bfloat16", num_layers=2, vocab_size=8192)
    params = abstract_params(config)
    params = jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
        params,
        sharding.shardings(params, mesh),
    )
    here = sharding.rows_sharding(mesh, 128)
    tokens = jax.ShapeDtypeStruct((128, 512), jnp.int32, sharding=here)

    def loss(params, tokens):
        return jnp.sum(Decoder(config).hidden_states(params, tokens).astype(jnp.float32))

    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(loss)).lower(params, tokens).compile().as_text()
    flops = costs.forward_flops(config, 128, 512)
    flops += costs.backward_flops(config, 128, 512, weights=True)
    least = flops / mesh.size / chips.CHIPS["v5e"].flops_per_cycle
    assert least / 2 < hlo.expectation(text).cycles < 2 * least


def sent(found) -> float:
    return sum(phase["ici_bytes"] for phase in found["phases"].values())
