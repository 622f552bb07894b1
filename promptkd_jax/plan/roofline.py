"""Work, memory and traffic of a step, put together of the `costs` of its parts.

Every row is taken to be as long as the config allows and every rollout to run to its limit, so that
work and tokens are those of full rows.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from promptkd_jax.distill.losses import chunked_loss
from promptkd_jax.distill.methods.method import Method
from promptkd_jax.distill.methods.method_fields import CROSS_ENTROPY
from promptkd_jax.distill.optimizer import SLICE
from promptkd_jax.distill.preconditioners import matrices
from promptkd_jax.infra import sharding
from promptkd_jax.models.layers.attention import implementation
from promptkd_jax.models.layers.quantization import QUANTIZE
from promptkd_jax.plan.abstract_run import AbstractRun, abstract_run
from promptkd_jax.plan.costs import Cost, Counter, cache_bytes
from promptkd_jax.training.config.fields import RunConfig
from promptkd_jax.training.run_models import shares_teacher

PHASES = ("prefill", "decode", "prompt update", "student update")


class _Step(NamedTuple):
    """Sizes of a step, and the counters of its models."""

    method: Method
    student: Counter
    teacher: Counter | None
    batch_size: int
    rows: int  # of a micro-batch
    columns: int
    positions: int  # of a response
    before: int  # columns before every row that the teacher sees
    gated: bool  # whether these are a soft prompt behind gates
    slots: int  # rows that are written at once

    @property
    def writers(self) -> list[Counter]:
        """The models that write the rows of a rollout."""
        if not self.method.source.on_policy:
            return []
        student, how = self.student, QUANTIZE[self.method.execution.rollout_quantize]
        if how:
            config = student.config.replace(quantization=how)
            student = dataclasses.replace(student, config=config, rounded=True)
        return [student, self.teacher] if self.method.teacher_writes_along else [student]

    def forward_behind(self) -> Cost:
        """A forward of the teacher of a micro-batch behind these columns; behind gates each layer
        attends twice."""
        cost = self.teacher.forward(self.rows, self.before + self.columns)
        return cost + self.teacher.attention(self.rows, self.columns) * self.gated

    def backward_behind(self, *, weights: bool) -> Cost:
        """The backward pass of `forward_behind`; `weights`: to the teacher's parameters too."""
        cost = self.teacher.backward(self.rows, self.before + self.columns, weights=weights)
        again = 2 if self.teacher.config.remat == "none" else 3
        return cost + self.teacher.attention(self.rows, self.columns) * (again * self.gated)


def _step(run: AbstractRun, platform: str = "tpu", slices: int = 1) -> _Step:
    method, before = run.stage.method, 0
    if method.prompted:
        before = run.config.soft_prompt.length
    elif method.teacher_view == "in_context":
        before = len(method.demonstrations)

    uneven = platform == "tpu" and run.vocab_size % run.mesh.shape["tensor"] != 0

    def counter(model, optimizer):
        parameters = jax.tree.leaves(model.trained)
        state = jax.tree.leaves(jax.eval_shape(optimizer.init, model.trained))
        return Counter(
            model.decoder.config.padded,
            run.mesh.shape,
            slices,
            parameters=sum(x.size for x in parameters),
            optimizer_bytes=sum(x.size * x.dtype.itemsize for x in state),
            uneven_vocabulary=uneven,
        )

    optimizers = run.stage.optimizers

    return _Step(
        method=method,
        student=counter(run.student, optimizers.student),
        teacher=run.teacher and counter(run.teacher, optimizers.teacher),
        batch_size=run.batch_size,
        rows=run.batch_size // method.num_micro_batches,
        columns=run.config.data.max_length,
        positions=method.response_capacity,
        before=before,
        gated=method.prompted and run.config.soft_prompt.gated,
        slots=run.rows_at_once,
    )


def phases(run: AbstractRun, platform: str = "tpu", slices: int = 1) -> dict[str, Cost]:
    """The cost of a train step on the run's mesh, by phase.

    Args:
      platform: of the devices; slices: that `data` goes across.
    """
    step = _step(run, platform, slices)
    costs = *_rollout(step), _teacher(step), _student(step)
    return {name: cost for name, cost in zip(PHASES, costs) if cost != Cost()}


def _rollout(step: _Step) -> tuple[Cost, Cost]:
    asked, tokens = step.method.prompt_capacity, step.method.rollout_length
    prefill, decode = Cost(), Cost()
    for writer in step.writers:
        prompts = step.batch_size
        if step.slots == step.batch_size:  # else each row of a prompt is let in by itself
            prompts //= step.method.rollouts_per_prompt
        prefill += writer.gathered_copy() + writer.forward(prompts, asked)
        turns = step.batch_size / step.slots
        decode += writer.decode(step.slots, asked + tokens, tokens) * turns
    return prefill, decode


def _teacher(step: _Step) -> Cost:
    """The soft prompt's update: plain and prompted forward, backward to the prompt; or that of a
    teacher that learns. The student is seen beside it."""
    method, student, teacher = step.method, step.student, step.teacher
    rows, columns, positions = step.rows, step.columns, step.positions
    online = method.teacher_view == "online"
    if not (method.prompted or online):
        return Cost()
    part = step.forward_behind() + step.backward_behind(weights=online)
    part += teacher.head(rows, positions, 2 + online)
    part += student.head(rows, positions, 1)
    if method.prompted and method.regularization:
        part += teacher.forward(rows, columns) + teacher.head(rows, positions, 1)
    # One forward of the student may serve both updates; then it counts in the student's.
    if not method.updates_together:
        part += student.forward(rows, columns)
    update = teacher.optimizer() if online else Cost()
    return part * (method.num_micro_batches * method.prompt_updates) + update


def _student(step: _Step) -> Cost:
    """Forward and backward of the student, the teacher as it is seen now, and all other terms."""
    method, student, teacher = step.method, step.student, step.teacher
    rows, columns, positions = step.rows, step.columns, step.positions
    part = student.forward(rows, columns)
    whole = student.config.lora is None  # all is trained, the head too
    part += student.backward(rows, columns, weights=whole)
    part += student.head(rows, positions, 2 + whole)
    if method.student_needs_teacher and method.teacher_view != "cached":
        if not method.prompt_lag:  # else that of the prompt's update
            part += step.forward_behind()
        part += teacher.head(rows, positions, 1)
    if method.prompt_fallback:  # the plain teacher too, and both of them on the data's responses
        part += teacher.forward(rows, columns) * 2 + step.forward_behind()
        part += teacher.head(rows, positions, 2)
    if method.corpus_terms:
        part += student.forward(rows, columns)
        part += student.backward(rows, columns, weights=whole)
        part += student.head(rows, columns - 1, 2 + whole)
        if any(name != CROSS_ENTROPY for name, _ in method.corpus_terms):
            part += teacher.forward(rows, columns)
            part += teacher.head(rows, columns - 1, 1)
    cost = part * (method.num_micro_batches * method.passes)
    if method.has_policy_gradient:
        log_probs = student.forward(rows, columns) + step.forward_behind()
        log_probs += student.head(rows, positions, 1) + teacher.head(rows, positions, 1)
        cost += log_probs * method.num_micro_batches
    return cost + student.optimizer() * method.updates_per_step


def kept_bytes(run: AbstractRun) -> dict[str, int]:
    """Bytes that a device of the run's mesh holds between steps, by part, exactly: its shards of
    all arrays.

    Raises:
      ConfigError: an axis does not divide a parameter.
    """
    state, teacher, rows, corpus, frozen, _ = run.arguments()
    shared = frozen is not None and shares_teacher(run.config)
    written = (state.replay, state.pending)
    parts = {
        "teacher": (teacher, state.params.get("teacher")),
        "student": (state.params["student"], None if shared else frozen),
        "soft prompt": state.soft_prompt,
        "optimizers": state.optimizers,
        "rows and the rest": (state.params.get("projection"), written, rows, corpus),
    }
    return {name: sum(map(_on_device, jax.tree.leaves(tree))) for name, tree in parts.items()}


def _on_device(leaf: Any) -> int:
    return 0 if leaf.sharding.memory_kind == sharding.HOST_MEMORY else _shard_bytes(leaf)


def _shard_bytes(leaf: Any) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def needed_bytes(
    config: RunConfig, mesh: Any, platform: str, capability: float = 9.0, stage: str | None = None
) -> float:
    """Bytes that a device of `mesh` needs, an estimate: in a stage, or in that which needs most.

    Args:
      platform, capability: as for `temporary_bytes`.

    Raises:
      ConfigError: the mesh does not divide parameters or rows.
    """
    needed = []
    for name in [stage] if stage else [each.name for each in config.stages]:
        run = abstract_run(config, name, rows=1).on(mesh)  # how many there are is not asked
        kept = sum(kept_bytes(run).values())
        needed.append(kept + temporary_bytes(run, platform, capability)["all"])
    return max(needed)


def temporary_bytes(
    run: AbstractRun, platform: str = "tpu", capability: float = 9.0
) -> dict[str, float]:
    """Bytes that a device needs beside that, an estimate: "rollout", "update", and "all" of them;
    "cache" is part of the rollout's.

    The rollout keeps the cache and a copy of the student, gathered, in the dtype of computation;
    the update gradients, what `remat` lets the layers keep, a layer's gathered parameters, heads,
    and logits of a block. What is neither gathered nor cast is not copied, but by the compiler for
    CPUs, which takes layers out of their stack before the loop over tokens. That for TPUs was seen
    to lay a copy out once more for decoding, and to keep both parts at once; those of CPUs and GPUs
    use the memory of one for the other. Where the optimizer's own update, beside the gradients,
    needs more than the backward pass did, that counts.

    Args:
      platform: of the devices; capability: of GPUs, see `sharding.compute_capability`.
    """
    step, mesh = _step(run, platform), run.mesh.shape
    method, student, teacher = step.method, step.student, step.teacher
    models = [student, teacher] if teacher else [student]
    length = method.prompt_capacity + method.rollout_length
    cache = sum(cache_bytes(writer.config, step.slots, length, mesh) for writer in step.writers)
    tpu, fsdp, whole = platform == "tpu", mesh["fsdp"] > 1, student.config.lora is None
    copies = 0.0
    for writer in step.writers:
        if writer.config.offload:  # while one layer computes, the next is fetched
            copies += 2 * writer.one_layer_bytes
            continue
        copied = fsdp or writer.config.dtype != writer.config.param_dtype
        unstacked = platform == "cpu" and not writer.config.quantization
        copies += writer.layer_bytes if copied or unstacked or writer.rounded else 0
        copies += 2 * writer.head_bytes if copied else 0
    devices = mesh["fsdp"] * mesh["tensor"]
    trained = jnp.dtype(student.config.param_dtype).itemsize if whole else 4
    # Of several micro-batches the sum of gradients is in float32, beside the latest one's.
    each = trained + 4 if method.num_micro_batches > 1 else trained
    gradients = each * student.parameters / devices
    drops = method.dropout and student.config.dropout.attention > 0
    device = platform, capability
    saved = _saved(student, step.rows, step.columns, *device, drops=drops)
    before = 0.0  # what the teacher's update keeps, before that of the student
    if method.prompted or method.teacher_view == "online":
        before = _saved(teacher, step.rows, step.before + step.columns, *device, gated=step.gated)
    gathered = max(2 * model.one_layer_bytes for model in models)
    # The student's head has a gradient, from the logits and from the embedding.
    heads = 2 * student.loss_head_bytes if whole else 0.0
    if tpu or fsdp:
        heads += sum(model.loss_head_bytes for model in models)
    all_logits = step.rows * step.positions * run.vocab_size / math.prod(mesh.values())
    logits = 6 * 4 * min(chunked_loss.chunk_elements(platform), all_logits)
    if tpu or method.updates_together:
        update = gradients + saved + before  # of which one forward of the student serves both
    else:
        update = max(gradients + saved, before)
    update += gathered + heads + logits
    optimizing, early = (size / devices for size in _optimizing(run, platform))
    update = early + max(update, gradients + optimizing)
    if run.config.offload_optimizer_state:  # all of it, beside the rest, at the most
        update += sum(map(_shard_bytes, jax.tree.leaves(run.abstract_state().optimizers)))
    rollout = cache + (2 if tpu else 1) * copies
    together = rollout + update if tpu else max(rollout, update)
    return {"cache": cache, "rollout": rollout, "update": update, "all": together}


# Bytes an entry, in float32 for the most part, that XLA's compiler for TPUs (jax 0.10.2) has for an
# update beside parameters, gradients and moments: of parameters that are updated whole, all of them
# together, and of a slice. An elementwise update is one kernel, and needs none.
_OPTIMIZING = {"adamw": (0, 0), "adamw_8bit": (12, 20), "adafactor": (0, 0), "muon": (8, 16)}


def _optimizing(run: AbstractRun, platform: str) -> tuple[float, float]:
    """Bytes of all devices that the student's optimizer needs for its update beside parameters,
    gradients and moments, and of a copy of the moments that is there from the step's beginning.

    What slices result in, changes in float32 and new moments, is there whole: of two parameters at
    a time. The compiler for CPUs computes all as early as it can: it has these results of all
    parameters, and moments of 8 bits in float32 beside the backward pass too, where no loop over
    slices keeps it from that. That for GPUs is as sparing as that for TPUs: docs/memory.md.
    """
    name, trained = run.config.stages[run.index].optimizer, run.student.trained
    if name == "adamw":
        return 0.0, 0.0
    in_8_bits = name == "adamw_8bit"
    state = jax.eval_shape(run.stage.optimizers.student.init, trained)
    structure = jax.tree.structure(trained)
    each = map(structure.flatten_up_to, (trained, matrices(trained), state.mu, state.nu))
    whole, results = 0, []
    for param, seen, *moments in zip(*each):
        if param.size > SLICE and (seen.stack or in_8_bits):
            new = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(moments))
            results.append(4 * param.size + new)
        elif seen.stack or in_8_bits:  # others have an elementwise update, or Adafactor's
            whole += param.size
    of_whole, of_slice = _OPTIMIZING[name]
    together = results if platform == "cpu" else sorted(results)[-2:]
    in_slices = sum(together) + of_slice * SLICE if results else 0
    early = 8 * whole if in_8_bits and platform == "cpu" else 0
    return float(max(of_whole * whole, in_slices)), float(early)


def _saved(
    count: Counter,
    rows: int,
    columns: int,
    platform: str,
    capability: float,
    *,
    drops: bool = False,
    gated: bool = False,
) -> float:
    """Bytes that the forward keeps for the backward pass: the input of every layer; with "dots" (as
    layers in the host's memory have it in place of "none") also what its matrices give, which the
    backward pass reads; with "none" the inputs and outputs of all products, attention's weights
    among them where no flash kernel leaves them out (there is none where some of them are dropped),
    those of two attentions behind gates, and 0.4 times as much for norms, rotations and activation
    functions."""
    config, tensor, tokens = count.config, count.mesh["tensor"], rows * columns / count.row_parts
    if config.remat == "none" and not config.offload:
        # Of three arrays of this size at most; of the second attention two were seen.
        sets = 5 if gated else 3
        scores = sets * 4 * config.num_layers * config.num_heads / tensor * columns
        flash = implementation(
            platform=platform,
            dtype=config.dtype,
            rows=rows,
            columns=columns,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            row_parts=count.row_parts,
            head_parts=tensor,
            plain=config.has_plain_attention,
            capability=capability,
        )
        turns = count.expert_bytes if tensor > 1 else 0.0  # what they compute again is not kept
        each = 1.4 * (count.activation_bytes - turns)
        each += count.attention_bytes if gated else 0.0
        return tokens * (each + (scores if drops or flash == "xla" else 0.0))
    kept = config.width
    if config.remat != "full":
        cut = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        if config.experts is None:  # products of experts are computed again
            cut += (2 if config.gated else 1) * config.mlp_width
        kept += config.width + cut / tensor
    return config.num_layers * tokens * kept * count.itemsize
