"""One side of the comparison: promptkd_jax, the train step as a run jits it."""

import dataclasses
import functools
import itertools
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from cases import RATE, STEPS, Case

import promptkd_jax as pkd
from promptkd_jax.distill.targets import target_rows
from promptkd_jax.infra.compile_cache import return_memory_of_compiling


class Side:
    """The parts of the work; each does its part to the end."""

    def __init__(self, case: Case, models: dict[str, str], **changes):
        return_memory_of_compiling()  # as every command does
        case = dataclasses.replace(case, **changes)
        self._case, self._batches = case, itertools.count()
        dtypes = dict(dtype=case.dtype, remat=case.remat)
        teacher = pkd.load_model(models["teacher"], param_dtype=case.dtype, **dtypes)
        student = pkd.load_model(models["student"], **dtypes)
        self._teacher = jax.block_until_ready(teacher.params)
        method = pkd.Method(
            targets="student",
            student_terms=(("reverse_kl", 1.0),),
            total_steps=STEPS,
            response_capacity=case.response,
            prompt_capacity=case.request,
            vocab_size=case.student["vocab_size"],
            teacher_view="prompted",
            sampling=pkd.Sampling(eos_ids=() if case.eos_id is None else (case.eos_id,)),
            execution=pkd.Execution(
                gradient_accumulation_steps=case.micro_batches,
                length_buckets=case.length_buckets,
                max_concurrent_rollouts=case.rollout_slots,
                rollout_quantize=case.rollout_quantize,
            ),
        )
        rate = pkd.schedule("constant", RATE, total_steps=STEPS)
        adamw = pkd.adamw(rate, weight_decay=0.01, max_grad_norm=1.0)
        optimizers = pkd.Optimizers(adamw, adamw)
        step = functools.partial(
            pkd.train_step,
            models=pkd.Models(student.decoder, teacher.decoder),
            optimizers=optimizers,
        )

        def jitted(**changes):
            changed = dataclasses.replace(method, **changes)
            return jax.jit(functools.partial(step, method=changed), donate_argnums=0)

        self._iteration = jitted()
        written = dict(max_concurrent_rollouts=0, rollout_quantize="none")
        execution = dataclasses.replace(method.execution, **written)
        on_rows = dict(targets="gold", execution=execution)
        self._update = jitted(**on_rows)
        self._student_update = jitted(teacher_view="plain", **on_rows)

        def rollout(params, batch, key):
            inputs = method, student.decoder, params, batch, None, key
            return target_rows(*inputs, step=0, teacher=None)[0].rows

        self._rollout = jax.jit(rollout)
        prompt = pkd.init_soft_prompt(
            teacher.decoder, self._teacher, range(case.soft_prompt), case.soft_prompt
        )
        self._state = pkd.init_state(
            {"student": student.params, "soft_prompt": prompt}, optimizers, jax.random.key(0)
        )
        self._rows = jax.device_put(batch_of(case, case.requests(0), case.answers(0)))
        self._factors, self._multiply = {}, jax.jit(jnp.matmul)

    def rollout(self) -> int:
        """Writes the answers of a batch; returns their tokens."""
        batch, key = self._batch(), jax.random.key(0)
        rows = jax.block_until_ready(self._rollout(self._state.student, batch, key))
        return int(jnp.sum(rows.lengths - rows.prompt_lengths))

    def update(self) -> None:
        """Soft prompt and student, on rows that are there."""
        self._take(self._update, self._rows)

    def student_update(self) -> None:
        """The student alone, on rows that are there."""
        self._take(self._student_update, self._rows)

    def iteration(self) -> int:
        """Rollout and update; returns the tokens of the answers."""
        return int(jnp.sum(self._take(self._iteration, self._batch()).counts))

    def checkpoint(self) -> None:
        """Saves what is trained, and reads it back."""
        from promptkd_jax.training.checkpoint import Checkpoints  # else without Orbax

        with tempfile.TemporaryDirectory() as folder:
            with Checkpoints(folder, keep=1, every=1) as checkpoints:
                checkpoints.save(1, self._state, {})
                checkpoints.wait()
                _, restored, *_ = checkpoints.restore_latest(self._state)
            jax.block_until_ready(restored)

    def matmul(self) -> float:
        """A large product in the dtype of computation; returns its operations."""
        return self._product(*self._case.square)

    def stream(self) -> float:
        """A product of as many rows as a batch has; returns the bytes of its matrix."""
        self._product(*self._case.skinny)
        _, inner, outer = self._case.skinny
        return inner * outer * jnp.dtype(self._case.dtype).itemsize

    def _product(self, rows: int, inner: int, outer: int) -> float:
        if (rows, inner, outer) not in self._factors:
            shapes = (rows, inner), (inner, outer)
            self._factors[rows, inner, outer] = [jnp.ones(s, self._case.dtype) for s in shapes]
        jax.block_until_ready(self._multiply(*self._factors[rows, inner, outer]))
        return 2.0 * rows * inner * outer

    def device_peak_bytes(self) -> int | None:
        """The most memory so far of a device that has its own."""
        if jax.default_backend() == "cpu":
            return None
        return jax.devices()[0].memory_stats()["peak_bytes_in_use"]

    def _take(self, step, batch: pkd.Batch) -> pkd.Metrics:
        self._state, metrics = jax.block_until_ready(step(self._state, self._teacher, batch))
        return metrics

    def _batch(self) -> pkd.Batch:
        requests = self._case.requests(next(self._batches))
        return batch_of(self._case, requests, [[0]] * len(requests))


def batch_of(case: Case, requests: list[list[int]], answers: list[list[int]]) -> pkd.Batch:
    """Rows from column 0 on, in all columns of the case."""
    rows = [[*request, *answer] for request, answer in zip(requests, answers)]
    tokens = np.zeros((len(rows), case.columns), np.int32)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = row
    lengths = [np.array([len(row) for row in some], np.int32) for some in (requests, rows)]
    return pkd.Batch(tokens, *lengths)
