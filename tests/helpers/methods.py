"""Train steps of many methods on small models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from helpers.steps import (
    ON_POLICY,
    STUDENT,
    TEACHER,
    batch,
    changed,
    jit,
    kl,
    log_probs,
    method,
    random_params,
    supervised,
    teacher_params,
)

from promptkd_jax.data.batch import Batch
from promptkd_jax.distill.methods.method import Method
from promptkd_jax.distill.replay import Replay
from promptkd_jax.distill.state import Optimizers, TrainState, init_state
from promptkd_jax.distill.step import train_step
from promptkd_jax.distill.teacher import Models
from promptkd_jax.models.decoder import Decoder


def falling(count):
    """A rate that says which update this is."""
    return 0.5 / (1 + count)


OPTIMIZERS = Optimizers(
    student=optax.sgd(falling, momentum=0.9),
    soft_prompt=optax.sgd(0.5, momentum=0.9),
    teacher=optax.sgd(0.1, momentum=0.9),
    projection=optax.sgd(0.2, momentum=0.9),
)


def plain(**changes) -> Method:
    """A plain teacher, reverse KL and, where rows are written, the rollouts of `student_rows`."""
    base = dict(teacher_view="plain", max_new_tokens=8, sampling=ON_POLICY.sampling)
    return method(**(base | changes))


def begin(step: int = 0, replay: Replay | None = None, **groups) -> TrainState:
    """A state with the student of `test_step`, and the groups that a method trains beside it."""
    groups = {"student": random_params(STUDENT.config, 22)} | groups
    made = init_state(groups, OPTIMIZERS, jax.random.key(4), replay=replay)
    return made.replace(step=jnp.full((), step, jnp.int32))


def in_parts(method: Method, parts: int) -> Method:
    """The same, accumulated over `parts` micro-batches."""
    return changed(method, gradient_accumulation_steps=parts)


@functools.cache
def compiled(method: Method):
    models = Models(STUDENT, TEACHER)
    return jit(functools.partial(train_step, method=method, models=models, optimizers=OPTIMIZERS))


def update(method: Method, before: TrainState, rows=None, corpus=None, teacher=None, kernel=None):
    """New state and metrics; without a teacher where the method says that it needs none."""
    frozen = method.needs_teacher and method.teacher_view != "online"
    teacher = teacher or (teacher_params() if frozen else None)
    return compiled(method)(before, teacher, rows or batch(), corpus, None, kernel)


def gradient(after: TrainState, group: str = "student"):
    """What the first update of a group was made from."""
    return after.optimizers[group][0].trace


@functools.partial(jit, static_argnums=0)
def seen(decoder: Decoder, params, tokens):
    """Log-probabilities of each next token, `[B, T - 1, V]`."""
    return log_probs(decoder, params, tokens)


@functools.partial(jit, static_argnums=0)
def dense(decoder: Decoder, params, target, rows: Batch, weights):
    """((value, sums by term and row), gradient) of cross entropy, KL(target || learner) and
    KL(learner || target) with `weights` `[3, B]`."""

    def loss(params):
        learner = log_probs(decoder, params, rows.tokens)
        labels = jnp.asarray(rows.tokens)[:, 1:, None]
        gold = -jnp.take_along_axis(learner, labels, axis=-1)[..., 0]
        terms = jnp.stack([gold, kl(target, learner), kl(learner, target)])
        sums = (supervised(rows) * terms).sum(-1)
        return (weights * sums).sum(), sums

    return jax.value_and_grad(loss, has_aux=True)(params)


def shares(rows: Batch, *, gold=0.0, forward=0.0, reverse=0.0) -> np.ndarray:
    """Weights `[3, B]` of means over all response tokens; each may be given by row."""
    tokens = (rows.lengths - rows.prompt_lengths).sum()
    rows = [np.broadcast_to(x, rows.lengths.shape) for x in (gold, forward, reverse)]
    return np.stack(rows).astype(np.float32) / np.float32(tokens)


def dense_student(student, rows: Batch | None = None, target=None, **weights):
    """`dense` of the student, by default against the plain teacher; weights as for `shares`."""
    rows = (rows or batch())._replace(cached=None)
    target = seen(TEACHER, teacher_params(), rows.tokens) if target is None else target
    return dense(STUDENT, student, target, rows, shares(rows, **weights))


def moved(tree, other) -> float:
    """The largest difference of two trees."""
    return max(jax.tree.leaves(jax.tree.map(lambda a, b: float(abs(a - b).max()), tree, other)))
