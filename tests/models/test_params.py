"""Weights go from files to devices, and back, in parts: each what it needs, nothing held whole."""

import importlib
import itertools
import json
import pathlib
import socket
import subprocess
import sys
import tracemalloc
import weakref

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from helpers.families import FAMILIES
from helpers.models import assert_same_params, random_model

from promptkd_jax.models.decoder import Decoder
from promptkd_jax.models.families import registry
from promptkd_jax.models.families.registry import from_hugging_face
from promptkd_jax.models.io import export, params
from promptkd_jax.models.io.export import save_model, to_hugging_face, write_tensors
from promptkd_jax.models.io.params import abstract_params, load_params
from promptkd_jax.models.load import load_model
from promptkd_jax.models.model import Model, keep_layers

WIDE = {  # the layers are most of it
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 1024,
    "max_position_embeddings": 64,
}


def test_shapes_that_are_asked_for_again_are_a_tree_of_their_own():
    config = from_hugging_face(WIDE)
    abstract_params(config)["layers"]["mlp"].clear()
    assert abstract_params(config)["layers"]["mlp"].keys() == {"gate", "up", "down"}


class Counted:
    """Tensors in memory, whose elements all differ, that remember how often each was read."""

    path = "counted"

    def __init__(self, hf_config: dict):
        self.config = hf_config
        config = from_hugging_face(hf_config)
        params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), abstract_params(config))
        shapes = {name: x.shape for name, x in to_hugging_face(params, config).items()}
        number = itertools.count()
        self.tensors = {
            name: np.float32(list(itertools.islice(number, int(np.prod(shape))))).reshape(shape)
            for name, shape in shapes.items()
        }
        self.forget()

    def forget(self):
        self.elements = 0
        self.times = {name: np.zeros(x.shape, int) for name, x in self.tensors.items()}

    def names(self):
        return list(self.tensors)

    def shape(self, name):
        return self.tensors[name].shape

    def dtype(self, name):
        return "F32"

    def read(self, name, index=None):
        part = self.tensors[name][index or ...]
        self.elements += part.size
        self.times[name][index or ...] += 1
        return part


def flat(tree) -> dict:
    return traverse_util.flatten_dict(tree, sep="/")


def wide_model(seed: int = 0) -> Model:
    """A Llama of 28 MB, 1 MB in its largest stored tensor."""
    config = from_hugging_face(WIDE)
    rng = np.random.default_rng(seed)
    draw = lambda x: rng.random(x.shape, np.float32)  # noqa: E731
    params = jax.tree.map(draw, abstract_params(config))
    return Model("wide", Decoder(config), params, WIDE, None, (0,))


# What is read.


@pytest.mark.parametrize("family", FAMILIES)
def test_a_part_reads_its_elements_once_and_no_others(family):
    """Also parts that no rule makes: along the layers, and within heads."""
    source = Counted(FAMILIES[family])
    config = from_hugging_face(source.config)
    whole = flat(load_params(source, config))
    assert all((times == 1).all() for times in source.times.values()), "whole"
    table = registry.FAMILIES[config.family]
    for row in table.tensors(config):
        shape = whole[row.path].shape
        halves = [(n // 2, n) for n in shape]
        cuts = [
            [half if i == j else (0, n) for j, n in enumerate(shape)]
            for i, half in enumerate(halves)
        ]
        for cut in (*cuts, halves):
            before = source.elements
            part = params._read(source, config, row, table.prefix, tuple(cut))
            expected = whole[row.path][tuple(slice(*bounds) for bounds in cut)]
            np.testing.assert_array_equal(part, expected, err_msg=f"{row.path} {cut}")
            assert source.elements - before == part.size, (row.path, cut)


def test_pieces_of_a_tensor_make_the_whole(monkeypatch):
    """However small the pieces are that a tensor is read in, and layer by layer."""
    source = Counted(FAMILIES["gpt2"])
    config = from_hugging_face(source.config)
    expected = flat(load_params(source, config))
    for size in (1, 500, 3000):
        monkeypatch.setattr(params, "PIECE_BYTES", size)
        source.forget()
        found = flat(load_params(source, config))
        for path, array in expected.items():
            np.testing.assert_array_equal(found[path], array, err_msg=path)
        assert all((times == 1).all() for times in source.times.values()), size


def test_the_host_holds_no_stack_of_layers_beside_the_arrays(tmp_path, monkeypatch):
    model = wide_model()
    save_model(tmp_path, model)
    monkeypatch.setattr(params, "PIECE_BYTES", 2**18)
    load_model(str(tmp_path))  # the first time, much else is allocated
    tracemalloc.start()  # sees NumPy's memory, not that of the arrays on the device
    found = load_model(str(tmp_path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert_same_params(found, model)
    largest = 2**20  # a stack has 8 of them; JAX may let go of the last ones late
    assert peak < 5 * largest, peak


def test_parts_of_a_quantised_tensor(tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf")
    from helpers.gguf_files import SIZES, gguf_tensors, metadata, weights, write

    from promptkd_jax.models.io.gguf import open_gguf

    assert gguf
    file = write(tmp_path / "m.gguf", metadata(SIZES), gguf_tensors(weights(SIZES), SIZES, "Q8_0"))
    source = open_gguf(file)
    for name in source.names():
        whole = source.read(name)
        index = tuple(slice(n // 4, n // 2) for n in whole.shape)
        np.testing.assert_array_equal(source.read(name, index), whole[index], err_msg=name)
    config = from_hugging_face(source.config)
    expected = flat(load_params(source, config))
    monkeypatch.setattr(params, "PIECE_BYTES", 1000)
    for path, array in flat(load_params(source, config)).items():
        np.testing.assert_array_equal(array, expected[path], err_msg=path)


# What is written.


def test_the_host_holds_one_shard(tmp_path, monkeypatch):
    model, most = wide_model(), 3 * 2**20
    monkeypatch.setattr(export, "SHARD_BYTES", most)
    monkeypatch.setattr(export, "PIECE_BYTES", 2**18)
    alive, seen = [], []

    def watched(*arguments):
        for name, array in whole(*arguments):
            alive.append((weakref.ref(array), array.nbytes))
            seen.append(sum(size for here, size in alive if here() is not None))
            yield name, array
            del array

    whole = export.stored_tensors
    monkeypatch.setattr(export, "stored_tensors", watched)
    save_model(tmp_path, model)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 8
    assert max(seen) <= most + 2**20, "more than a shard and the tensor behind it"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in flat(model.params).values())
    assert_same_params(load_model(str(tmp_path)), model)


@pytest.fixture
def bucket(monkeypatch):
    """A bucket in memory, behind the gs:// of epath."""
    registry = importlib.import_module("fsspec.registry")
    from fsspec.implementations.memory import MemoryFileSystem

    class Bucket(MemoryFileSystem):
        protocol = ("gcs", "gs")
        store, pseudo_dirs = {}, [""]

        @classmethod
        def _strip_protocol(cls, path):
            return MemoryFileSystem._strip_protocol(path.removeprefix("gs://"))

    monkeypatch.setitem(registry._registry, "gcs", Bucket)
    return Bucket


def test_a_folder_in_a_bucket_is_that_of_the_disk(tmp_path, monkeypatch, bucket):
    from helpers import tiny

    monkeypatch.setattr(export, "SHARD_BYTES", 60_000)
    model = random_model("llama").replace(tokenizer=tiny.tokenizer())
    save_model(tmp_path, model, card="# A card\n")
    save_model("gs://models/student", random_model("gpt2"))  # of which nothing may be left
    save_model("gs://models/student", model, card="# A card\n")
    found = {
        name.removeprefix("/models/student/"): x.getvalue() for name, x in bucket.store.items()
    }
    assert found == {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert "tokenizer.json" in found and sum("safetensors" in name for name in found) > 3
    write_tensors("gs://models/prompt.safetensors", {"x": np.ones(3, np.float32)})
    write_tensors(tmp_path / "prompt.safetensors", {"x": np.ones(3, np.float32)})
    there = bucket.store["/models/prompt.safetensors"].getvalue()
    assert there == (tmp_path / "prompt.safetensors").read_bytes()


# On a mesh, and from several processes.


def test_kept_layers_are_copies():
    model = wide_model()
    model = model.replace(params=jax.tree.map(jnp.asarray, model.params))
    kept = keep_layers(model, tuple(range(8)))
    jax.jit(lambda tree: jax.tree.map(lambda x: 0 * x, tree), donate_argnums=0)(kept.params)
    assert_same_params(model, wide_model())


ON_A_MESH = """
import functools, json, pathlib, sys
import jax, numpy as np
from flax import traverse_util
from promptkd_jax.infra import sharding
from promptkd_jax.models.random_model import synthetic_model
from promptkd_jax.models.io import export
from promptkd_jax.models import load
from promptkd_jax.models.io import params as streaming
from promptkd_jax.models.families.registry import from_hugging_face
from promptkd_jax.models.decoder import Decoder
from promptkd_jax.models.io.export import save_model
from promptkd_jax.models.model import Model, keep_layers
from promptkd_jax.models.load import load_model
from promptkd_jax.models.io.params import abstract_params, pad

folder, configs, processes, process, port = sys.argv[1:]
folder, configs, process = pathlib.Path(folder), json.loads(configs), int(process)
if int(processes) > 1:
    jax.distributed.initialize(f"localhost:{port}", int(processes), process)
sizes = (2, 2, 2) if jax.device_count() == 8 else (1, 2, 1)
mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes)))
place = functools.partial(sharding.shardings, mesh=mesh)
flat = functools.partial(traverse_util.flatten_dict, sep="/")

def assert_sharded(params, expected, what):
    config = model.decoder.config if what != "synthetic" else many.decoder.config
    params, expected = flat(params), flat(pad(expected, config))
    placed = flat(place(params))
    assert params.keys() == expected.keys()
    for path, array in params.items():
        assert array.sharding.is_equivalent_to(placed[path], array.ndim), (what, path)
        assert array.dtype == expected[path].dtype, (what, path)
        assert array.shape == expected[path].shape, (what, path)
        for shard in array.addressable_shards:
            message = f"{what} {path}"
            np.testing.assert_array_equal(shard.data, expected[path][shard.index], message)

def files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}

class Counting(load.SafetensorsFolder):
    read_bytes = 0

    def read(self, name, index=None):
        found = super().read(name, index)
        Counting.read_bytes += found.nbytes
        return found

load.SafetensorsFolder = Counting
for name in [x for x in ("gpt2", "llama_biases", "gpt_oss") if x in configs]:
    for kind in ("int8", "int4"):
        whole = load_model(str(folder / name), quantize=kind)
        model = load_model(str(folder / name), mesh=mesh, quantize=kind)
        assert_sharded(model.params, whole.params, f"{name} {kind}")

for name, hf_config in configs.items():
    whole = load_model(str(folder / name))  # written by the test
    Counting.read_bytes = 0
    model = load_model(str(folder / name), mesh=mesh)
    assert_sharded(model.params, whole.params, name)
    stored = flat(whole.params)  # without the zeros of padding, which nobody reads
    distinct = {
        (path, str(shard.index)): stored[path][shard.index].nbytes
        for path, array in flat(model.params).items() for shard in array.addressable_shards
    }
    assert Counting.read_bytes == sum(distinct.values()), (name, Counting.read_bytes)
    if int(processes) == 1:
        save_model(folder / f"{name}_again", model)
        assert files(folder / f"{name}_again") == files(folder / name), name

# Large parameters, that are put together and taken apart layer by layer.
streaming.PIECE_BYTES, export.PIECE_BYTES = 100, 3000
half = load_model(str(folder / name), mesh=mesh, param_dtype="bfloat16")
rounded = jax.tree.map(lambda x: np.asarray(x).astype("bfloat16"), whole.params)
assert_sharded(half.params, rounded, "bfloat16")
kept = keep_layers(model, (1, 0))
taken = {k: x if k != "layers" else jax.tree.map(lambda x: x[::-1], x) for k, x in
         jax.tree.map(np.asarray, whole.params).items()}
assert_sharded(kept.params, taken, "kept")
export.SHARD_BYTES = 8000
saved = folder / f"shards_{processes}"
save_model(saved, model)
assert json.loads((saved / "model.safetensors.index.json").read_text())
if int(processes) > 1:
    sys.exit(0)
assert_sharded(load_model(str(saved), mesh=mesh).params, whole.params, "shards")
one, many = (synthetic_model("synthetic:llama-D32-L1", mesh=x) for x in (None, mesh))
assert_sharded(many.params, jax.tree.map(np.asarray, one.params), "synthetic")
"""


def on_a_mesh(folder: pathlib.Path, configs: dict[str, dict], processes: int, devices: int) -> None:
    """Runs ON_A_MESH on random models of these configs."""
    for name, hf_config in configs.items():
        config = from_hugging_face(hf_config)
        rng = np.random.default_rng(0)
        params = jax.tree.map(
            lambda x, rng=rng: rng.normal(size=x.shape).astype(np.float32), abstract_params(config)
        )
        save_model(folder / name, Model(name, Decoder(config), params, hf_config, None, (0,)))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", ON_A_MESH, str(folder), json.dumps(configs), str(processes)]
    started = [
        subprocess.Popen(
            [*command, str(process), str(port)],
            env=conftest.environment(XLA_FLAGS=conftest.devices(devices)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(processes)
    ]
    said = [process.communicate(timeout=900)[0] for process in started]
    for process, text in zip(started, said):
        assert process.returncode == 0, text[-4000:]


def test_eight_devices_hold_what_one_holds(tmp_path):
    """Also of models whose vocabulary, heads and feed-forward width two devices do not divide."""
    odd = {"vocab_size": 31, "n_head": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    odd |= {"n_inner": 23, "ffn_dim": 23, "intermediate_size": 23}
    grouped = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 4}
    configs = dict(FAMILIES)
    for name in ("gpt2", "opt", "llama_tied", "llama_biases", "qwen3_biases"):
        config = FAMILIES[name] | (odd if name in ("gpt2", "opt") else odd | grouped)
        configs[f"{name}_padded"] = config
    on_a_mesh(tmp_path, configs, processes=1, devices=8)


def test_two_processes_hold_and_write_what_one_does(tmp_path):
    on_a_mesh(tmp_path, {"gpt2": FAMILIES["gpt2"]}, processes=2, devices=1)
    written = load_model(str(tmp_path / "shards_2"))
    assert_same_params(written, load_model(str(tmp_path / "gpt2")))
    assert len(list((tmp_path / "shards_2").glob("model-*.safetensors"))) > 2
