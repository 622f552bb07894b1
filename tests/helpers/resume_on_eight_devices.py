"""Run by test_experiment.py in a process with eight virtual devices: `python
resume_on_eight_devices.py FOLDER`. Whatever is trained, in whatever numbers and wherever it lies:
a step is that of one device, and a run that stopped at a checkpoint goes on, on its mesh bit for
bit and on another one to rounding."""

import math
import pathlib
import sys

import jax
import numpy as np
from helpers import tiny

from promptkd_jax.infra import sharding
from promptkd_jax.plan.fit import changed
from promptkd_jax.training.config.checks import checked
from promptkd_jax.training.experiment import Experiment
from promptkd_jax.training.loop import open_checkpoints
from promptkd_jax.training.prepare import prepare
from promptkd_jax.training.recipes import stage_config

ONE = {"data": 1, "fsdp": 1, "tensor": 1}
BEFORE, AFTER = {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 1, "fsdp": 2, "tensor": 4}
OPTIMIZER = "stages[0].optimizer"
CASES = {
    "an adapter, its base in int8, the teacher in int4, a prompt behind gates": {
        "student.lora.rank": 2,
        "student.quantize": "int8",
        "teacher.quantize": "int4",
        "soft_prompt.gated": True,
    },
    "bfloat16, moments in 8 bits, these and an int8 teacher offloaded": {
        "student.param_dtype": "bfloat16",
        "stages[0].optimizer": "adamw_8bit",
        "offload_optimizer_state": True,
        "teacher.offload": True,
        "teacher.quantize": "int8",
    },
}


def goes_on(folder: pathlib.Path, workdir: pathlib.Path, settings: dict) -> None:
    """A step against that of one device, and the next one against it after a checkpoint, on the
    same mesh and elsewhere."""
    config = tiny.short_config(folder, pad=2)  # 277 tokens: 278 and 280 on the two meshes
    config.teacher.remat = config.student.remat = "none"
    terms = (("forward_kl", 0.5), ("cross_entropy", 0.5))
    how = dict(targets="gold", teacher_view="prompted", batch_size=4, student_terms=terms)
    config.stages = (stage_config("only", steps=2, learning_rate=1e-2, **how),)
    config = changed(checked(config), settings)

    def on(sizes):
        """The experiment on a mesh, and its step with the rows of a number."""
        mesh = sharding.make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])
        with jax.set_mesh(mesh):
            made = prepare(config, workdir, mesh)
        (stage,) = made.stages
        jitted = made.jitted_step(stage)

        def step(state, number):
            with jax.set_mesh(mesh):
                state = made.start(stage, None) if state is None else state
                rows = sharding.place_rows(stage.batches[number])
                return jitted(state, made.teacher.params, rows, None, made.frozen_student)[0]

        return made, step

    def restored(made: Experiment):
        state, _ = checkpoints.restore(1, made.abstract_state(), made.unpadded_state())
        assert jax.tree.map(lambda x: x.sharding, state) == made.placed()  # its memory, too
        return state, whole(made, state)

    (alone, step_alone), (here, step), (elsewhere, other_step) = map(on, (ONE, BEFORE, AFTER))
    with open_checkpoints(config, workdir) as checkpoints:
        state = step(None, 0)
        checkpoints.save(1, state, {}, unpadded=here.unpadded_state())
        saved = whole(here, state)
        jax.tree_util.tree_map_with_path(same, saved, whole(alone, step_alone(None, 0)))
        expected = whole(here, step(state, 1))
        state, found = restored(here)
        jax.tree.map(np.testing.assert_array_equal, found, saved)
        jax.tree.map(np.testing.assert_array_equal, whole(here, step(state, 1)), expected)
        state, found = restored(elsewhere)
        jax.tree.map(np.testing.assert_array_equal, found, saved)
        found = whole(elsewhere, other_step(state, 1))
    jax.tree_util.tree_map_with_path(same, found, expected)


def whole(made: Experiment, state):
    """A state as NumPy, without the zeros that end its arrays on a mesh."""
    state = sharding.to_host(state.replace(key=jax.random.key_data(state.key)))
    like = made.unpadded_state().replace(key=state.key)

    def cut(x, shape):
        return np.asarray(x)[tuple(map(slice, shape.shape))]

    return jax.tree.map(cut, state, like)


def same(path, found, expected) -> None:
    # An update is of 1e-2, and Adam's also where a gradient is hardly more than its rounding. Sums
    # in another order may lie beyond a threshold: a code, or bfloat16's number, is then the next.
    rtol, atol = {"bfloat16": (2**-7, 5e-4), "int8": (0, 1)}.get(found.dtype.name, (1e-3, 5e-4))
    found, expected = (np.asarray(x, np.float32) for x in (found, expected))
    apart = ~np.isclose(found, expected, rtol=rtol, atol=atol)
    assert apart.mean() < 1e-2, (jax.tree_util.keystr(path), apart.mean())


if __name__ == "__main__":
    assert jax.device_count() == 8
    root = pathlib.Path(sys.argv[1])
    for number, (name, settings) in enumerate(CASES.items()):
        print(name, flush=True)
        goes_on(root / "models", root / str(number), settings)
