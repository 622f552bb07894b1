"""Checkpoints come back bit for bit, and damage, a full disk or a kill cost one of them at most."""

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from conftest import devices, environment
from helpers import bucket

from promptkd_jax.infra.errors import CheckpointError
from promptkd_jax.models.layers.gated_prefix import GatedPrefix
from promptkd_jax.training import checkpoint_files
from promptkd_jax.training.checkpoint import Checkpoints
from promptkd_jax.training.checkpoint_files import find_damage

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def make_state(seed: int) -> dict:
    params = {
        "kernel": jax.random.normal(jax.random.key(seed), (64, 33)),
        "bias": jax.random.normal(jax.random.key(seed + 1), (7,), jnp.bfloat16),
    }
    return {
        "params": params,
        "optimizer": OPTIMIZER.init(params),
        "key": jax.random.key(seed, impl="rbg"),
        "old_key": jax.random.PRNGKey(seed),
        "soft_prompt": None,
        "gated": GatedPrefix(jnp.full((2, 3), float(seed)), jnp.zeros((2, 4))),
        "step": seed,
        "scale": 0.1,
        "count": np.int64(seed),
        "mean": np.float32(0.1),
        "host": np.arange(5) + seed,
        "frozen": True,
    }


def abstract(state):
    def leaf(x):
        if not isinstance(x, jax.Array):
            return x
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

    return jax.tree.map(leaf, state)


def assert_same_bits(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for path, x in jax.tree_util.tree_leaves_with_path(left):
        y = dict(jax.tree_util.tree_leaves_with_path(right))[path]
        assert type(x) is type(y), path
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            assert x.dtype == y.dtype
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes()), path


def write(folder: Path, steps, keep=10, scores=None, **options) -> None:
    with Checkpoints(folder, keep=keep, every=1, **options) as checkpoints:
        for step in steps:
            assert checkpoints.save(step, make_state(step), {"at": step})
            if scores and step in scores:
                checkpoints.note(step, scores[step])


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> Path:
    """The folder of a run with checkpoints 10, 20 and 30; copy it before you harm it."""
    folder = tmp_path_factory.mktemp("run")
    write(folder, (10, 20, 30))
    return folder


@pytest.fixture
def harmed(three, tmp_path) -> Path:
    return Path(shutil.copytree(three, tmp_path / "run"))


def largest_file(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=os.path.getsize)


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


# What is saved, and when.


def test_every_kind_of_leaf_returns_bit_for_bit(three):
    state = make_state(30)
    with Checkpoints(three, keep=10, every=1) as checkpoints:
        step, restored, meta = checkpoints.restore_latest(abstract(state))
    assert (step, meta) == (30, {"at": 30})
    assert_same_bits(restored, state)
    assert isinstance(restored["optimizer"][1][0], optax.ScaleByAdamState)


def test_a_large_array_lies_in_files_that_are_hashed_side_by_side(tmp_path, monkeypatch):
    part = 4096
    monkeypatch.setattr(checkpoint_files, "PART", part)
    state = {"zeros": jnp.zeros((64, 4 * part // 64), jnp.uint8)}
    with Checkpoints(tmp_path, keep=1, every=1) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait()
        sizes = [file.stat().st_size for file in tmp_path.rglob("d/*") if file.is_file()]
        # All bytes of the array, though they are alike, and never two parts in a file.
        assert sum(sizes) >= 4 * part and max(sizes) < 2 * part
        assert_same_bits(checkpoints.restore_latest(abstract(state))[1], state)


def test_parameters_can_be_had_without_the_rest(tmp_path):
    """By their names, placed as asked; what else the state has needs no place to go to."""
    student = {
        "layers": {"kernel": jnp.arange(6.0).reshape(2, 3)},
        "scale": jnp.ones(3, "bfloat16"),
    }
    params = {"student": student, "projection": [jnp.ones(2)], "soft_prompt": jnp.zeros((7, 3))}
    with Checkpoints(tmp_path, keep=1, every=1) as checkpoints:
        checkpoints.save(3, {"params": params, "key": jax.random.key(1)}, {})
    asked = []

    def place(shapes):
        asked.append(shapes)
        return jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), shapes)

    with Checkpoints(tmp_path, keep=1, every=1) as checkpoints:
        found = checkpoints.restore_params(3, ("student", "teacher", "soft_prompt"), place)
        with pytest.raises(CheckpointError, match=r"holds checkpoints \[3\], not 4"):
            checkpoints.restore_params(4, ("student",), place)
    del params["projection"]
    assert_same_bits(found, params)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), asked[0]) == shapes
    flip_byte(largest_file(tmp_path / "3"))
    with (
        Checkpoints(tmp_path, keep=1, every=1) as checkpoints,
        pytest.raises(CheckpointError, match="checkpoint 3 is damaged"),
    ):
        checkpoints.restore_params(3, ("student",), place)


def test_an_older_checkpoint_can_be_asked_for(three):
    with Checkpoints(three, keep=10, every=1) as checkpoints:
        restored, meta = checkpoints.restore(10, abstract(make_state(10)))
        with pytest.raises(CheckpointError, match=r"holds checkpoints \[10, 20, 30\], not 15"):
            checkpoints.restore(15, abstract(make_state(10)))
    assert meta == {"at": 10}
    assert_same_bits(restored, make_state(10))


def test_an_empty_folder_has_nothing(tmp_path):
    with Checkpoints(tmp_path / "new", keep=1, every=1, best_metric="score") as checkpoints:
        assert checkpoints.restore_latest(abstract(make_state(0))) is None
        assert checkpoints.latest_step() is None
        assert checkpoints.best_step() is None
        assert checkpoints.all_steps() == []
        assert not checkpoints.reached_preemption(1)


def test_saves_at_multiples_and_when_forced(tmp_path):
    with Checkpoints(tmp_path, keep=10, every=4) as checkpoints:
        saved = [step for step in range(10) if checkpoints.save(step, {"x": 1.0}, {})]
        assert saved == [4, 8]
        assert checkpoints.save(9, {"x": 1.0}, {}, force=True)
        assert not checkpoints.save(9, {"x": 1.0}, {}, force=True)
        checkpoints.wait()
        assert checkpoints.all_steps() == [4, 8, 9]


def test_donated_and_overwritten_arrays_are_saved_as_they_were(tmp_path):
    host = np.arange(2_000_000)
    double = jax.jit(lambda x: 2 * x, donate_argnums=0)
    device = double(jnp.arange(2_000_000, dtype=jnp.float32))
    state, meta = {"host": host, "device": device}, {"position": [1]}
    shapes = abstract(state)
    with Checkpoints(tmp_path, keep=1, every=1) as checkpoints:
        checkpoints.save(1, state, meta)
        double(device)
        host[:] = -1
        meta["position"].append(2)
        _, restored, meta = checkpoints.restore_latest(shapes)
    np.testing.assert_array_equal(restored["host"], np.arange(2_000_000))
    np.testing.assert_array_equal(restored["device"], 2 * np.arange(2_000_000, dtype=np.float32))
    assert meta == {"position": [1]}


def test_meta_that_is_not_json_is_refused_at_once(tmp_path):
    with Checkpoints(tmp_path, keep=1, every=1) as checkpoints:
        with pytest.raises(TypeError, match="not JSON serializable"):
            checkpoints.save(1, {"x": 1.0}, {"array": np.ones(2)})
        assert checkpoints.save(1, {"x": 1.0}, {})


@pytest.mark.parametrize("keep, every", [(0, 1), (1, 0)])
def test_keep_and_every_are_at_least_one(tmp_path, keep, every):
    with pytest.raises(ValueError, match=f"keep={keep}, every={every}"):
        Checkpoints(tmp_path, keep=keep, every=every)


# What stays.


def test_the_last_and_the_best_stay_also_after_reopening(tmp_path):
    scores = {2: {"score": 0.9}, 4: {"score": 0.1}, 5: {"score": float("nan")}}
    write(tmp_path, range(1, 6), keep=2, best_metric="score", scores=scores)
    with Checkpoints(tmp_path, keep=2, every=1, best_metric="score") as checkpoints:
        assert checkpoints.all_steps() == [2, 4, 5]
        assert checkpoints.best_step() == 2
        checkpoints.restore_latest(abstract(make_state(5)))
        checkpoints.save(6, make_state(6), {})
        checkpoints.note(6, {"score": 0.9, "loss": 1 / 3})
        checkpoints.save(7, make_state(7), {})
        checkpoints.wait()
        assert (checkpoints.all_steps(), checkpoints.best_step()) == ([6, 7], 6)
    with Checkpoints(tmp_path, keep=2, every=1, best_metric="score") as checkpoints:
        assert checkpoints.noted(6) == {"score": 0.9, "loss": 1 / 3}
        assert checkpoints.noted(7) is None


def test_a_state_that_is_made_anew_has_no_scores_yet(harmed):
    scores = {step: {"score": float(step)} for step in (10, 20, 30)}
    with Checkpoints(harmed, keep=10, every=10, best_metric="score") as checkpoints:
        for step, one in scores.items():
            checkpoints.note(step, one)
        assert checkpoints.best_step() == 30
    flip_byte(largest_file(harmed / "30"))
    with Checkpoints(harmed, keep=10, every=10, best_metric="score") as checkpoints:
        assert checkpoints.restore_latest(abstract(make_state(20)))[0] == 20
        assert (checkpoints.noted(20), checkpoints.noted(30)) == (scores[20], None)
        assert checkpoints.best_step() == 20


def test_without_a_best_metric_only_the_last_stay(tmp_path):
    write(tmp_path, range(1, 6), keep=2, scores={1: {"score": 1.0}})
    with Checkpoints(tmp_path, keep=2, every=1) as checkpoints:
        assert checkpoints.all_steps() == [4, 5]
        assert checkpoints.best_step() is None


def test_scores_without_the_best_metric_are_refused(tmp_path):
    message = r"no best_metric 'rouge_l' in scores \['loss'\]"
    with (
        Checkpoints(tmp_path, keep=1, every=1, best_metric="rouge_l") as checkpoints,
        pytest.raises(ValueError, match=message),
    ):
        checkpoints.note(1, {"loss": 1.0})


def test_a_run_that_did_not_continue_may_not_mix_with_an_older_one(harmed):
    with Checkpoints(harmed, keep=10, every=1) as checkpoints:
        for step in (20, 30):
            with pytest.raises(CheckpointError, match="already holds checkpoint 30"):
                checkpoints.save(step, make_state(step), {})


def test_a_checkpoint_with_checksums_of_before_is_whole(harmed):
    """SHA-256, of which the digits are twice as many."""
    file = harmed / "30/checksums.json"
    names = json.loads(file.read_text())
    sha = {x: hashlib.sha256((harmed / "30" / x).read_bytes()).hexdigest() for x in names}
    file.write_text(json.dumps(sha))
    with Checkpoints(harmed, keep=10, every=10, best_metric="score") as checkpoints:
        assert checkpoints.restore_latest(abstract(make_state(20)))[0] == 30
    file.write_text(json.dumps(sha | {"meta/metadata": "0" * 64}))
    with Checkpoints(harmed, keep=10, every=10, best_metric="score") as checkpoints:
        assert checkpoints.restore_latest(abstract(make_state(20)))[0] == 20
        assert "meta/metadata is not as it was written" in checkpoints.damage[0]


# Damage.

FILES = (
    "checksums.json",
    "meta/metadata",
    "state/_METADATA",
    "state/_sharding",
    "state/manifest.ocdbt",
    "state/array_metadatas/process_0",
    "array data",
)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("harm", ["removed", "truncated", "flipped byte"])
def test_a_damaged_newest_checkpoint_costs_only_itself(harmed, file, harm):
    path = largest_file(harmed / "30") if file == "array data" else harmed / "30" / file
    if harm == "removed":
        path.unlink()
    elif harm == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    else:
        flip_byte(path)
    with Checkpoints(harmed, keep=10, every=10, best_metric="score") as checkpoints:
        step, state, meta = checkpoints.restore_latest(abstract(make_state(20)))
        (message,) = checkpoints.damage
        assert message.startswith("checkpoint 30 is damaged (")
        assert message.endswith("): continuing from 20")
        assert file in message or file in ("array data", "checksums.json")
        assert (step, meta) == (20, {"at": 20})
        assert_same_bits(state, make_state(20))


def test_a_run_comes_again_by_the_step_that_was_damaged(harmed):
    for once_more in (True, False):
        flip_byte(largest_file(harmed / "30"))
        with Checkpoints(harmed, keep=10, every=10) as checkpoints:
            assert checkpoints.restore_latest(abstract(make_state(20)))[0] == 20
            assert (harmed / "30.damaged").is_dir()
            assert checkpoints.all_steps() == [10, 20]
            assert checkpoints.save(30, make_state(30), {"at": once_more})
            assert checkpoints.restore_latest(abstract(make_state(30)))[2] == {"at": once_more}


def test_all_damaged_names_all_and_moves_none(harmed):
    for step in (10, 20, 30):
        flip_byte(largest_file(harmed / str(step)))
    with Checkpoints(harmed, keep=10, every=1) as checkpoints:
        with pytest.raises(CheckpointError, match=r"(?s)every checkpoint.*30: .*20: .*10: "):
            checkpoints.restore_latest(abstract(make_state(0)))
        assert checkpoints.all_steps() == [10, 20, 30]


@pytest.mark.parametrize("item, more", [("meta", ""), ("state", r", and \d+ more")])
def test_a_damaged_checkpoint_that_was_asked_for_is_refused(harmed, item, more):
    shutil.rmtree(harmed / "20" / item)
    with Checkpoints(harmed, keep=10, every=1, best_metric="score") as checkpoints:
        problem = rf"({item}/\S+ is missing(, )?){{1,3}}{more}"  # so many files as Orbax writes
        with pytest.raises(CheckpointError, match=rf"20 is damaged \({problem}\); .*\[10, 30\]"):
            checkpoints.restore(20, abstract(make_state(20)))


def test_another_state_is_not_taken_for_damage(three):
    wanted = abstract(make_state(30))
    wanted["params"]["kernel"] = jax.ShapeDtypeStruct((64, 34), jnp.float32)
    wanted["params"]["bias"] = jax.ShapeDtypeStruct((7,), jnp.float32)
    wanted["soft_prompt"] = jax.ShapeDtypeStruct((3,), jnp.float32)
    wanted["key"] = abstract(jax.random.key(0, impl="threefry2x32"))
    del wanted["host"]
    with Checkpoints(three, keep=10, every=1) as checkpoints:
        with pytest.raises(CheckpointError) as error:
            checkpoints.restore_latest(wanted)
        assert checkpoints.all_steps() == [10, 20, 30]
    assert str(error.value).splitlines() == [
        "checkpoint 30 is whole, but of another state:",
        "  host: int64[5] in it, nothing asked for",
        "  key: key<rbg>[] in it, key<fry>[] asked for",
        "  params/bias: bfloat16[7] in it, float32[7] asked for",
        "  params/kernel: float32[64, 33] in it, float32[64, 34] asked for",
        "  soft_prompt: nothing in it, float32[3] asked for",
    ]


# Other processes: another mesh, a full disk, a kill.

PRELUDE = """
    import os, resource, signal, sys
    from pathlib import Path
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import NamedSharding, PartitionSpec as P
    from promptkd_jax.training import checkpoint
    from promptkd_jax.infra.errors import CheckpointError
    from promptkd_jax.training.checkpoint import Checkpoints
    folder = Path(sys.argv[1])
"""


def run_python(
    script: str, folder: Path, prefix=(), arguments=(), **variables
) -> subprocess.CompletedProcess:
    source = textwrap.dedent(PRELUDE) + textwrap.dedent(script)
    return subprocess.run(
        [*prefix, sys.executable, "-c", source, str(folder), *arguments],
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=900,
    )


def test_restores_onto_another_mesh(tmp_path):
    script = """
        def put(shape, rows, columns):
            names, axis_types = ("fsdp", "tensor"), (jax.sharding.AxisType.Auto,) * 2
            mesh = jax.make_mesh(shape, names, axis_types=axis_types)
            values = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
            return {
                "kernel": jax.device_put(values, NamedSharding(mesh, P(rows, columns))),
                "bias": jax.device_put(values[0].astype(jnp.bfloat16), NamedSharding(mesh, P())),
                "key": jax.device_put(jax.random.key(1), NamedSharding(mesh, P())),
            }
        def abstract(x):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        saved, wanted = put((8, 1), "fsdp", None), put((2, 4), "tensor", "fsdp")
        with Checkpoints(folder, keep=1, every=1) as checkpoints:
            checkpoints.save(1, saved, {})
            restored = checkpoints.restore_latest(jax.tree.map(abstract, wanted))[1]
        for name in saved:
            assert restored[name].sharding == wanted[name].sharding != saved[name].sharding
        saved["key"], restored["key"] = map(jax.random.key_data, (saved["key"], restored["key"]))
        for name in saved:
            assert np.asarray(restored[name]).tobytes() == np.asarray(saved[name]).tobytes()
    """
    result = run_python(script, tmp_path, XLA_FLAGS=devices(8))
    assert result.returncode == 0, result.stderr


TWO_PROCESSES = """
    from promptkd_jax.infra import distributed
    from promptkd_jax.training import checkpoint_files
    me = int(sys.argv[3])
    jax.distributed.initialize(f"localhost:{sys.argv[2]}", 2, me)
    names, checksums = [], checkpoint_files.checksums
    def listed(folder, files, **how):
        names.extend(files)
        return checksums(folder, files, **how)
    checkpoint_files.checksums = listed
    mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    place, values = NamedSharding(mesh, P("fsdp")), np.random.default_rng(0).normal(size=20_000)
    x = jax.make_array_from_callback(values.shape, place, lambda index: values[index])
    shape = {"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)}
    with Checkpoints(folder, keep=1, every=1) as checkpoints:
        checkpoints.save(1, {"x": x}, {})
        checkpoints.wait()
        stores = [any(f"ocdbt.process_{i}/" in name for name in names) for i in (0, 1)]
        assert stores == [me == 0, me == 1], names
        names.clear()
        (restored, _) = checkpoints.restore(1, shape)
        assert (restored["x"].addressable_data(0) == x.addressable_data(0)).all()
        written = checkpoint_files.json.loads((folder / "1" / "checksums.json").read_text())
        shares = distributed.all_gather(names)
        assert sorted(shares[0] + shares[1]) == sorted(written) and min(map(len, shares)) > 1
        own = max((folder / "1" / "state" / f"ocdbt.process_{me}" / "d").iterdir(),
            key=os.path.getsize)
        data = bytearray(own.read_bytes())
        data[len(data) // 2] ^= 1
        own.write_bytes(data)
        damaged = distributed.all_gather(own.relative_to(folder / "1").as_posix())
        try:
            checkpoints.restore(1, shape)
        except CheckpointError as error:
            for name in damaged:
                assert f"{name} is not as it was written" in str(error), error
        else:
            raise AssertionError("nothing was found")
"""


def test_each_of_two_processes_hashes_what_it_wrote(tmp_path):
    """And verifies its share; both name what either finds damaged."""
    with socket.socket() as one:
        one.bind(("localhost", 0))
        port = one.getsockname()[1]

    def run(process):
        return run_python(TWO_PROCESSES, tmp_path, arguments=(str(port), process))

    with ThreadPoolExecutor() as pool:
        for result in pool.map(run, ("0", "1")):
            assert result.returncode == 0, result.stderr


FILL_DISK = """
    def save(step, size):
        checkpoints.save(step, {"x": jax.random.normal(jax.random.key(step), (size,))}, {})
    with Checkpoints(folder / "run", keep=1, every=10) as checkpoints:
        save(10, 1000)
        checkpoints.wait()
        if "limit" in os.environ:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        save(20, 600_000)
        try:
            while True:
                checkpoints.save(21, None, {})  # not due, but the error comes all the same
        except CheckpointError as error:
            assert str(error).startswith("checkpoint 20 could not be written"), error
            assert str(error).endswith("Checkpoint 10 is still good"), error
        wanted = {"x": jax.ShapeDtypeStruct((1000,), jnp.float32)}
        step, state, _ = checkpoints.restore_latest(wanted)
        assert step == 10
        assert (state["x"] == jax.random.normal(jax.random.key(10), (1000,))).all()
        save(30, 1000)
        checkpoints.wait()
        assert checkpoints.all_steps() == [30]
"""


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    mount = 'mount -t tmpfs -o size=1m none "$0" && exec "$@"'
    prefix = ["unshare", "--mount", "--map-root-user", "sh", "-c", mount, str(tmp_path)]
    if shutil.which("unshare") and subprocess.run([*prefix, "true"]).returncode == 0:
        result = run_python(FILL_DISK, tmp_path, prefix=prefix)
    else:  # no leave to mount a small file system: files that cannot grow are the next best
        result = run_python(FILL_DISK, tmp_path, limit="1")
    assert result.returncode == 0, result.stderr


KILL_WHILE_WRITING = """
    while not any(path.is_file() for path in folder.glob("20.*/state*/**/*")):
        pass
    os.kill(os.getpid(), signal.SIGKILL)
"""
KILL_BEFORE_THE_LAST_RENAME = """
    checkpoints.wait()
"""


@pytest.mark.parametrize(
    "moment",
    [KILL_WHILE_WRITING, KILL_BEFORE_THE_LAST_RENAME],
    ids=["while writing", "before the last rename"],
)
def test_a_kill_in_the_middle_leaves_the_checkpoint_before(tmp_path, moment):
    script = """
    checkpoints = Checkpoints(folder, keep=1, every=1)
    checkpoints.save(10, {"x": jnp.arange(8.0)}, {})
    checkpoints.wait()
    checkpoint.write_checksums = lambda folder: os.kill(os.getpid(), signal.SIGKILL)
    checkpoints.save(20, {"x": jax.random.normal(jax.random.key(0), (8_000_000,))}, {})
    """
    assert run_python(script + moment, tmp_path).returncode == -9
    assert (tmp_path / "20.orbax-checkpoint-tmp").is_dir()
    with Checkpoints(tmp_path, keep=1, every=1) as checkpoints:
        wanted = {"x": jax.ShapeDtypeStruct((8,), jnp.float32)}
        step, state, _ = checkpoints.restore_latest(wanted)
        assert step == 10
        assert (tmp_path / "20.orbax-checkpoint-tmp").is_dir(), "reading removed it"
        np.testing.assert_array_equal(state["x"], np.arange(8.0))
        assert checkpoints.save(30, {"x": jnp.arange(8.0)}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["30"]


# Buckets.


def test_a_bucket_keeps_its_name(monkeypatch):
    opened, (folder, _) = [], bucket.make(monkeypatch)
    monkeypatch.setattr(ocp, "CheckpointManager", lambda folder, **_: opened.append(str(folder)))
    Checkpoints(folder / "checkpoints", keep=1, every=1)
    Checkpoints("checkpoints", keep=1, every=1)
    assert opened == [f"{folder}/checkpoints", str(Path("checkpoints").absolute())]


def test_checkpoints_that_cannot_be_opened_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=f"^{tmp_path}/file/new cannot be opened .*Not a dir"):
        Checkpoints(tmp_path / "file" / "new", keep=1, every=1)


def test_files_in_a_bucket_have_the_checksums_of_a_disk(three, monkeypatch):
    folder, pail = bucket.make(monkeypatch)
    for file in (three / "30").rglob("*"):
        if file.is_file():
            (folder / "30" / file.relative_to(three / "30")).write_bytes(file.read_bytes())
    assert find_damage(folder / "30") == ""
    name = largest_file(three / "30" / "state").relative_to(three / "30").as_posix()
    (folder / "30" / name).write_bytes(b"other")
    assert find_damage(folder / "30") == f"{name} is not as it was written"


def test_padding_is_what_the_reader_asks_for(tmp_path):
    """Zeros behind an array belong to the mesh, not to the run; the shapes before them to the run,
    whatever the padding."""

    def padded(rows):
        return {"table": jnp.zeros((rows, 3)).at[:5].set(jnp.arange(15.0).reshape(5, 3))}

    def shape(rows):
        return {"table": jax.ShapeDtypeStruct((rows, 3), jnp.float32)}

    def where(rows):
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return {"table": jax.ShapeDtypeStruct((rows, 3), jnp.float32, sharding=here)}

    with Checkpoints(tmp_path, keep=10, every=1) as checkpoints:
        checkpoints.save(1, padded(8), {}, unpadded=shape(5))
        for rows in (8, 6, 5, 12):
            state, _ = checkpoints.restore(1, where(rows), shape(5))
            np.testing.assert_array_equal(state["table"], padded(rows)["table"])
        with pytest.raises(CheckpointError, match=r"table: float32\[5, 3\] in it, float32\[7, 3\]"):
            checkpoints.restore_latest(where(8), shape(7))
        with pytest.raises(CheckpointError, match=r"table: float32\[5, 3\] in it, float32\[8, 3\]"):
            checkpoints.restore(1, where(8))
