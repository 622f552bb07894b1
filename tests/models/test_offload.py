"""Layers in the host's memory compute what they compute on a device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny
from helpers.models import PREFIX, TOKENS, random_model
from safetensors.numpy import load_file

from promptkd_jax.infra import sharding
from promptkd_jax.infra.errors import ConfigError
from promptkd_jax.models.decoder import Decoder
from promptkd_jax.models.families.registry import PUBLISHED, from_hugging_face
from promptkd_jax.models.io import params as reading
from promptkd_jax.models.io.export import save_model
from promptkd_jax.models.io.params import abstract_params
from promptkd_jax.models.layers.quantization import QUANTIZE
from promptkd_jax.models.load import load_model
from promptkd_jax.models.model import Model
from promptkd_jax.models.sampler import row_keys, sample
from promptkd_jax.models.sampling_rules import Sampling
from promptkd_jax.plan import ahead, chips, roofline
from promptkd_jax.plan.abstract_run import abstract_run
from promptkd_jax.training import run as training
from promptkd_jax.training.config.checks import checked

ONE = {"data": 1, "fsdp": 1, "tensor": 1}


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(ONE, jax.devices()[:1])


def offload(model: Model, mesh: jax.sharding.Mesh) -> Model:
    config = model.decoder.config.replace(offload=True)
    model = model.replace(decoder=Decoder(config))
    return model.replace(params=jax.device_put(model.params, model.shardings(mesh)))


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_kernels_are_read_into_the_hosts_memory(quantize, tmp_path, mesh, monkeypatch):
    """The devices hold no more of them than a layer at a time."""
    save_model(tmp_path, random_model("llama"))
    monkeypatch.setattr(reading, "PIECE_BYTES", 1000)
    expected = load_model(str(tmp_path), quantize=quantize, mesh=mesh)
    before, most, read = {id(x) for x in jax.live_arrays()}, 0, reading._read

    def watched(*arguments):
        nonlocal most
        new = [x for x in jax.live_arrays() if id(x) not in before]
        here = [x for x in new if x.sharding.memory_kind == "device" and x.ndim > 2]
        most = max(most, sum(x.nbytes for x in here))
        return read(*arguments)

    monkeypatch.setattr(reading, "_read", watched)
    model = load_model(str(tmp_path), quantize=quantize, offload=True, mesh=mesh)
    assert jax.tree.map(lambda x: x.sharding, model.params) == model.shardings(mesh)
    jax.tree.map(np.testing.assert_array_equal, model.params, expected.params)
    kernels = jax.tree.leaves(model.params["layers"])
    kernels = [x for x in kernels if x.sharding.memory_kind == sharding.HOST_MEMORY]
    assert 4 * most < sum(x.size * 4 for x in kernels)


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_hidden_states_and_gradients_are_the_same(name, remat, mesh):
    model = random_model(name)
    decoder = type(model.decoder)(model.decoder.config.replace(remat=remat))
    model = model.replace(decoder=decoder, params=jax.device_put(model.params))

    def gradient(model):
        def loss(prefix, params):
            return jnp.sum(jnp.sin(model.decoder.hidden_states(params, TOKENS, prefix)))

        with jax.set_mesh(mesh):
            return jax.jit(jax.value_and_grad(loss))(PREFIX, model.params)

    expected = gradient(model)
    moved = offload(model.replace(params=jax.tree.map(jnp.copy, model.params)), mesh)
    kinds = jax.tree.map(lambda x: x.sharding.memory_kind, moved.params)
    assert kinds["layers"]["mlp"]["up"]["kernel"] == "pinned_host"
    assert kinds["layers"]["mlp_norm"]["scale"] == "device"
    assert "pinned_host" not in jax.tree.leaves(kinds["embed"])
    # To rounding: what was fused with a layer's parameters begins with a copy of them now.
    for found, right in zip(gradient(moved), expected, strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-3, atol=1e-4)


def test_it_writes_the_same_tokens(mesh):
    model = random_model("llama")
    model = model.replace(params=jax.device_put(model.params))

    def written(model):
        with jax.set_mesh(mesh):
            keys = row_keys(jax.random.key(0), np.arange(len(TOKENS)))
            lengths = np.full(len(TOKENS), 4, np.int32)
            how = dict(sampling=Sampling(eos_ids=(0,)), max_new_tokens=6)
            return sample(model.decoder, model.params, TOKENS[:, :4], lengths, keys, **how).tokens

    expected = written(model)
    np.testing.assert_array_equal(written(offload(model, mesh)), expected)


@pytest.mark.usefixtures("no_report")
def test_a_run_with_an_offloaded_teacher_is_the_same_run(tmp_path):
    config = tiny.short_config(tmp_path / "models")
    config.evaluation.every, config.checkpoint.every = 0, 1000
    config.stages = config.stages[1:]
    students = []
    for offloaded in (False, True):
        config.teacher.offload = offloaded
        workdir = tmp_path / str(offloaded)
        training.run(checked(config), workdir)
        students.append(load_file(workdir / "student/model.safetensors"))
    for name, expected in students[0].items():
        # To rounding, which Adam makes larger.
        np.testing.assert_allclose(students[1][name], expected, atol=5e-5, err_msg=name)


def test_a_plan_counts_what_is_on_a_device(tmp_path, mesh):
    config = tiny.short_config(tmp_path / "models")
    kept = {}
    for offloaded in (False, True):
        config.teacher.offload = offloaded
        run = abstract_run(checked(config)).on(mesh)
        kept[offloaded] = roofline.kept_bytes(run)["teacher"]
        leaves = jax.tree.leaves_with_path(run.teacher.params["layers"])
        kernels = [x for path, x in leaves if path[-1].key == "kernel"]
        layers = sum(x.size * x.dtype.itemsize for x in kernels)
    assert kept[False] - kept[True] == layers > 0


@pytest.mark.skipif(not ahead.has_compiler(), reason=ahead.MISSING)
@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_a_tpu_compiles_offloaded_layers_in_bfloat16(quantize):
    """A gradient to the prefix, and a rollout: with as much as two layers on the device at once."""
    mesh = ahead.described_mesh(ONE, chips.parse_topology("v5e:1x1"))
    config = from_hugging_face(PUBLISHED["meta-llama/Llama-3.2-1B"])
    config = config.replace(dtype="bfloat16", param_dtype="bfloat16", num_layers=8, remat="full")
    config = config.replace(vocab_size=1024, offload=True, quantization=QUANTIZE[quantize])
    decoder = Decoder(config)
    params = abstract_params(decoder.config)
    places = Model("", decoder, params, {}, None, (0,)).shardings(mesh)

    def shape(x, place):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    def gradient(params, prefix, tokens, lengths, keys):
        def loss(prefix):
            return jnp.sum(decoder.hidden_states(params, tokens, prefix).astype(jnp.float32))

        how = dict(sampling=Sampling(eos_ids=(0,)), max_new_tokens=32)
        return jax.grad(loss)(prefix), sample(decoder, params, tokens, lengths, keys, **how)

    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 4))
    others = jnp.zeros((2, 2048)), jnp.zeros((4, 32), jnp.int32), jnp.zeros(4, jnp.int32), keys
    everywhere = jax.NamedSharding(mesh, jax.P())
    others = [shape(x, everywhere) for x in others]
    with jax.set_mesh(mesh):
        compiled = jax.jit(gradient).lower(jax.tree.map(shape, params, places), *others).compile()
    one_layer = sum(2 * x.size // 8 for x in jax.tree.leaves(params["layers"]))
    found = compiled.memory_analysis()
    assert found.argument_size_in_bytes < one_layer
    assert found.temp_size_in_bytes < 4 * one_layer  # with one of them dequantised


def test_what_is_trained_is_not_offloaded(tmp_path):
    config = tiny.short_config(tmp_path / "models")
    config.student.offload = True
    with pytest.raises(ConfigError, match="student.offload: all of the student is trained"):
        checked(config)
    config.student.lora.rank = 2
    checked(config)
    config.stages[1].update(teacher_view="online", teacher_terms=(("forward_kl", 1.0),))
    config.teacher.offload = True
    with pytest.raises(ConfigError, match="teacher.offload: a teacher_view 'online' trains"):
        checked(config)
