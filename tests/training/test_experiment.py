"""Where the state of a run lies between its steps, and that it goes on elsewhere."""

import pathlib
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import devices, environment
from helpers import tiny

from promptkd_jax.infra import sharding
from promptkd_jax.infra.errors import ConfigError
from promptkd_jax.plan import fit, roofline
from promptkd_jax.plan.abstract_run import abstract_run
from promptkd_jax.training.config.checks import checked
from promptkd_jax.training.config.fields import RunConfig
from promptkd_jax.training.prepare import prepare
from promptkd_jax.training.recipes import method_stage


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
    return sharding.make_mesh(dict.fromkeys(sharding.AXES, 1), jax.devices()[:1])


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> RunConfig:
    config = tiny.short_config(tmp_path_factory.mktemp("experiment") / "models")
    config.teacher.remat = config.student.remat = "none"
    config.stages = (method_stage("promptkd", targets="gold", steps=2, batch_size=4),)
    return checked(config)


def memories(tree) -> set[str]:
    return {x.sharding.memory_kind for x in jax.tree.leaves(tree)}


def test_moments_in_the_hosts_memory_are_those_of_a_device(config, mesh, tmp_path):
    states = []
    for offloaded, memory in ((False, "device"), (True, sharding.HOST_MEMORY)):
        new = fit.changed(config, {"offload_optimizer_state": offloaded})
        with jax.set_mesh(mesh):
            made = prepare(new, tmp_path, mesh)
            (stage,) = made.stages
            step, teacher = made.jitted_step(stage), made.teacher.params
            state = made.start(stage, None)
            assert memories(state.optimizers) == {memory} and memories(state.params) == {"device"}
            rows = [sharding.place_rows(stage.batches[number]) for number in (0, 1)]
            state, _ = step(state, teacher, rows[0])
            assert memories(state.optimizers) == {memory} and memories(state.params) == {"device"}
            # A step that is skipped keeps them as they were.
            before = jax.device_get((state.params, state.optimizers))
            state, _ = step(state, jax.tree.map(lambda x: x * jnp.nan, teacher), rows[1])
            after = jax.device_get((state.params, state.optimizers))
            assert state.skipped == 1
            jax.tree.map(np.testing.assert_array_equal, after, before)
            state, _ = step(state, teacher, rows[1])
        states.append(jax.device_get((state.params, state.optimizers)))
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_a_plan_counts_offloaded_moments_in_the_update_alone(config, mesh):
    runs = [
        abstract_run(fit.changed(config, {"offload_optimizer_state": x})).on(mesh)
        for x in (False, True)
    ]
    kept, kept_offloaded = map(roofline.kept_bytes, runs)
    assert kept["optimizers"] > 0 == kept_offloaded["optimizers"]
    assert kept_offloaded == kept | {"optimizers": 0}
    needed, needed_offloaded = (roofline.temporary_bytes(run, "gpu") for run in runs)
    assert needed_offloaded["update"] - needed["update"] == kept["optimizers"]
    assert needed_offloaded["rollout"] == needed["rollout"]


def test_devices_without_host_memory_are_refused(config, tmp_path):
    """A fake, since every platform that JAX has here has that memory."""
    device = SimpleNamespace(
        device_kind="Abacus", addressable_memories=lambda: [SimpleNamespace(kind="beads")]
    )
    new = fit.changed(config, {"offload_optimizer_state": True})
    said = r"config.offload_optimizer_state: a Abacus has no memory 'pinned_host' \(it has beads\)"
    with pytest.raises(ConfigError, match=said):
        prepare(new, tmp_path, SimpleNamespace(devices=np.array([device])))


def test_a_mesh_gives_one_devices_numbers_and_a_run_goes_on_on_another(tmp_path):
    folder = pathlib.Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, folder / "helpers" / "resume_on_eight_devices.py", tmp_path],
        env=environment(XLA_FLAGS=devices(8)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (done.stdout[-500:], done.stderr[-4000:])


def test_packed_rows_have_room_for_the_soft_prompt(config, mesh, tmp_path):
    """Of two vectors: two rows of 11 tokens in 24 columns. In shapes that a plan counts on."""
    new = fit.changed(config, {"stages[0].packed_rows": 2, "soft_prompt.length": 2})
    with jax.set_mesh(mesh):
        (stage,) = prepare(new, tmp_path, mesh).stages
        batch = stage.batches[0]
        planned = abstract_run(new).on(mesh).arguments()[2]
    jax.tree.map(np.testing.assert_equal, *[jax.tree.map(jnp.shape, x) for x in (batch, planned)])
    assert stage.method.response_capacity == config.data.max_length - 1 == 23
    assert batch.segment_ids.tolist() == 2 * [[1] * 11 + [0] * 2 + [2] * 11]
