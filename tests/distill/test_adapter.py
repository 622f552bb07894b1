"""A student of which an adapter alone is trained: its gradients follow from those of the whole."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from helpers.steps import (
    ON_POLICY,
    STUDENT,
    TEACHER,
    assert_close,
    batch,
    changed,
    jit,
    method,
    random_params,
    teacher_params,
)
from helpers.tiny import equations

from promptkd_jax.data.batch import Batch
from promptkd_jax.distill.state import Optimizers, init_state
from promptkd_jax.distill.step import train_step, write_ahead
from promptkd_jax.distill.teacher import Models
from promptkd_jax.models.config import LoRA
from promptkd_jax.models.decoder import Decoder
from promptkd_jax.models.layers.lora import MODULES, init_adapter, join, merged, split

SGD = optax.sgd(1.0)
OPTIMIZERS = Optimizers(student=SGD, soft_prompt=SGD)
LORA = LoRA(2, 3.0, tuple(module for module in MODULES if module != "mlp/gate"), dropout=0.5)
ADAPTED = Decoder(STUDENT.config.replace(lora=LORA))
TEXT = Batch(batch().tokens, np.ones(4, np.int32), batch().lengths)


def adapter():
    rng = np.random.default_rng(2)
    shapes = init_adapter(random_params(STUDENT.config, 1), LORA, jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), x.dtype), shapes)


def whole():
    """The student with the change of the adapter in its kernels."""
    flat, low = (
        traverse_util.flatten_dict(x, sep="/")
        for x in (random_params(STUDENT.config, 1), adapter())
    )
    for module in LORA.modules:
        path = f"layers/{module}"
        parts = flat[f"{path}/kernel"], low[f"{path}/lora_a"], low[f"{path}/lora_b"]
        layers = [merged(*map(np.asarray, each), LORA.scale) for each in zip(*parts)]
        flat[f"{path}/kernel"] = jnp.asarray(np.stack(layers))
    return traverse_util.unflatten_dict(flat, sep="/")


def step(student, trained, frozen, how, corpus=None):
    """(state before, state after, metrics) of one step, whose update is the gradient."""
    params = {"student": trained, "soft_prompt": jnp.full((3, TEACHER.config.width), 0.1)}
    before = init_state(params, OPTIMIZERS, jax.random.key(3))
    fixed = dict(method=how, models=Models(student, TEACHER), optimizers=OPTIMIZERS)
    after, metrics = jit(functools.partial(train_step, **fixed))(
        before, teacher_params(), batch(), corpus, frozen
    )
    return before, after, metrics


CASES = {
    "gold": (method(), None),
    "on-policy": (ON_POLICY, None),
    "corpus, two micro-batches": (
        method(corpus_terms=(("cross_entropy", 0.5),), gradient_accumulation_steps=2),
        TEXT,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_its_gradient_is_that_of_the_whole_through_the_change(name):
    """dL/dA = s dL/dW Bᵀ, dL/dB = s Aᵀ dL/dW; the soft prompt's is that of the same student."""
    how, corpus = CASES[name]
    before, after, metrics = step(ADAPTED, adapter(), random_params(STUDENT.config, 1), how, corpus)
    there, then, expected = step(STUDENT, whole(), None, how, corpus)
    gradient = jax.tree.map(jnp.subtract, before.params, after.params)
    of_whole = jax.tree.map(jnp.subtract, there.params, then.params)
    assert_close(gradient["soft_prompt"], of_whole["soft_prompt"], atol=1e-5)
    np.testing.assert_array_equal(metrics.counts, expected.counts)
    found, kernels, low = (
        traverse_util.flatten_dict(x, sep="/")
        for x in (gradient["student"], of_whole["student"], adapter())
    )
    assert len(found) == 2 * len(LORA.modules)
    for module in LORA.modules:
        path, axes = f"layers/{module}", MODULES[module]
        d_kernel, a, b = kernels[f"{path}/kernel"], low[f"{path}/lora_a"], low[f"{path}/lora_b"]
        for layer in range(len(a)):
            out = d_kernel.ndim - 1 - axes
            d_a = np.tensordot(
                d_kernel[layer], b[layer], (range(axes, axes + out), range(1, 1 + out))
            )
            d_b = np.tensordot(a[layer], d_kernel[layer], (range(axes), range(axes)))
            for side, right in (("a", d_a), ("b", d_b)):
                there = found[f"{path}/lora_{side}"][layer]
                assert_close(there, LORA.scale * right, atol=2e-5)


def test_the_head_of_a_frozen_model_has_no_gradient():
    """No product makes an array of its size but the logits themselves."""
    frozen = random_params(STUDENT.config, 1)
    params = {"student": adapter(), "soft_prompt": jnp.full((3, TEACHER.config.width), 0.1)}
    before = init_state(params, OPTIMIZERS, jax.random.key(3))
    fixed = dict(method=method(), models=Models(ADAPTED, TEACHER), optimizers=OPTIMIZERS)
    traced = jax.make_jaxpr(functools.partial(train_step, **fixed))(
        before, teacher_params(), batch(), None, frozen
    )
    head = (STUDENT.config.vocab_size, STUDENT.config.width)
    shapes = [
        tuple(out.aval.shape)
        for equation, _ in equations(traced)
        if equation.primitive.name == "dot_general"
        for out in equation.outvars
    ]
    assert shapes and head not in shapes


def test_dropout_of_the_adapter_is_that_of_a_stage_with_dropout():
    frozen = random_params(STUDENT.config, 1)
    results = {
        (drops, parts): step(
            ADAPTED,
            adapter(),
            frozen,
            changed(method(), dropout=drops, gradient_accumulation_steps=parts),
        )[1].student
        for drops, parts in ((False, 1), (True, 1), (True, 2))
    }
    without, one, two = results.values()
    assert_close(two, one, atol=1e-5)  # the same masks in any number of micro-batches
    differences = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), without, one)
    assert min(jax.tree.leaves(differences)) > 1e-6


def test_rows_are_written_ahead_by_the_adapted_student():
    how = changed(ON_POLICY, one_step_off_policy=True)
    frozen, fixed = random_params(STUDENT.config, 1), dict(method=how)
    pending = {}
    for name, student, trained, rest in (
        ("adapted", ADAPTED, adapter(), frozen),
        ("whole", STUDENT, whole(), None),
    ):
        params = {"student": trained, "soft_prompt": jnp.full((3, TEACHER.config.width), 0.1)}
        state = init_state(params, OPTIMIZERS, jax.random.key(3))
        write = functools.partial(write_ahead, models=Models(student, TEACHER), **fixed)
        pending[name] = jit(write)(state, teacher_params(), batch(), rest).pending
    np.testing.assert_array_equal(pending["adapted"].rows.tokens, pending["whole"].rows.tokens)


def test_split_and_join_are_inverse():
    params = join(random_params(STUDENT.config, 1), adapter())
    frozen, trained = split(params)
    assert_close(trained, adapter())
    assert_close(join(frozen, trained), params)
