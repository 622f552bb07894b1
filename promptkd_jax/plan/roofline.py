"""Work, memory and traffic of a step, counted from shapes alone.

Multiplications count as two operations. Every row is taken to be as long as the config allows and
every rollout to run to its limit, so that work and tokens are those of full rows. Attention counts
all pairs of columns, as plain XLA computes them; the splash kernel leaves out up to half.

B rows, T columns, M soft-prompt tokens, R response positions, D width, N heads, K key/value heads,
H head width, F feed-forward width, V vocabulary, L layers; d, f, t devices along `data`, `fsdp`,
`tensor`. Bytes are those of one device. Models are taken as they are padded for the mesh.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from promptkd_jax.distill import chunked_loss
from promptkd_jax.distill.method import CROSS_ENTROPY, POLICY_GRADIENT, Method
from promptkd_jax.models.attention import implementation
from promptkd_jax.models.config import DecoderConfig
from promptkd_jax.plan.abstract_run import AbstractRun
from promptkd_jax.plan.chips import SliceTopology

PHASES = ("prefill", "decode", "prompt update", "student update")


@dataclasses.dataclass(frozen=True)
class Cost:
    """`flops` of all devices together; bytes of one device: to and from HBM, sent to chips of the
    same slice (ICI), and sent to other slices (DCN)."""

    flops: float = 0.0
    hbm_bytes: float = 0.0
    ici_bytes: float = 0.0
    dcn_bytes: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*map(sum, zip(dataclasses.astuple(self), dataclasses.astuple(other))))

    def __mul__(self, times: float) -> "Cost":
        return Cost(*(times * part for part in dataclasses.astuple(self)))

    def seconds(self, slices: SliceTopology) -> dict[str, float]:
        """Seconds of each of matrix units, HBM, network and slow network, would it work alone."""
        chip = slices.chip
        each = {
            "compute": self.flops / (slices.chips * chip.tflops * 1e12),
            "HBM": self.hbm_bytes / (chip.per_device(chip.hbm_gbps) * 1e9),
            "network": self.ici_bytes / (chip.per_device(chip.ici_gbps) * 1e9),
        }
        if slices.number > 1:
            each["between slices"] = self.dcn_bytes / (chip.per_device(chip.dcn_gbps) * 1e9)
        return each


def matrix_parameters(config: DecoderConfig) -> int:
    """Of all layers, that every token is multiplied with: L (2 D N H + 2 D K H + 2 or 3 D F)."""
    attention = 2 * config.width * (config.num_heads + config.num_kv_heads) * config.head_dim
    feed_forward = (3 if config.gated else 2) * config.width * config.mlp_width
    return config.num_layers * (attention + feed_forward)


def forward_flops(config: DecoderConfig, rows: int, columns: int, keys: int | None = None) -> int:
    """Of the layers: 2 B T matrix_parameters + 4 L B T S N H, S keys to a column (T)."""
    pairs = rows * columns * (columns if keys is None else keys)
    attention = 4 * config.num_layers * pairs * config.num_heads * config.head_dim
    return 2 * rows * columns * matrix_parameters(config) + attention


def backward_flops(config: DecoderConfig, rows: int, columns: int, *, weights: bool) -> int:
    """Of the layers: a product for the inputs and, with `weights`, one for the parameters for each
    of the forward, attention's always both; and the forward again where activations are not kept.
    """
    whole = forward_flops(config, rows, columns)
    matrices = 2 * rows * columns * matrix_parameters(config)
    again = 0 if config.remat == "none" else whole
    return again + 2 * whole - (0 if weights else matrices)


def head_flops(config: DecoderConfig, rows: int, positions: int) -> int:
    """Of logits: 2 B R V D."""
    return 2 * rows * positions * config.vocab_size * config.width


@dataclasses.dataclass(frozen=True)
class _Counter:
    """Costs of the pieces of a step for one model, of padded sizes, on a mesh."""

    config: DecoderConfig
    mesh: Mapping[str, int]
    slices: int = 1
    parameters: int = 0

    @property
    def row_parts(self) -> int:
        return self.mesh["data"] * self.mesh["fsdp"]

    @property
    def itemsize(self) -> int:
        """Bytes of a number in the dtype of computation."""
        return jnp.dtype(self.config.dtype).itemsize

    @property
    def layer_bytes(self) -> float:
        """Of the matrices of all layers, gathered along `fsdp`."""
        return matrix_parameters(self.config) * self.itemsize / self.mesh["tensor"]

    @property
    def head_bytes(self) -> float:
        """Of the head, gathered along `fsdp`; the embedding is as large."""
        return self.config.vocab_size * self.config.width * self.itemsize / self.mesh["tensor"]

    @property
    def activation_bytes(self) -> float:
        """Of the inputs and outputs of all products, for one token."""
        config = self.config
        heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        cut = heads + (4 if config.gated else 2) * config.mlp_width
        each = 4 * config.width + cut / self.mesh["tensor"]
        return config.num_layers * each * self.itemsize

    def forward(self, rows: int, columns: int) -> Cost:
        """Reads all layers once, after gathering them and the embedding along `fsdp`; 2 all-reduces
        of the hidden states a layer along `tensor`, and one of the embeddings; inputs and outputs
        of all products pass through HBM."""
        tokens = rows * columns / self.row_parts
        look_up = self._allgather_bytes(self.head_bytes) + self._allreduce_hidden_bytes(tokens)
        return Cost(
            forward_flops(self.config, rows, columns),
            self.layer_bytes + tokens * self.activation_bytes,
            self._allgather_bytes(self.layer_bytes)
            + self._allreduce_layers_bytes(tokens)
            + look_up,
        )

    def backward(self, rows: int, columns: int, *, weights: bool) -> Cost:
        """Work as of the forward, and the gradients of the layers, once read and once written."""
        tokens, gradient = rows * columns / self.row_parts, self.layer_bytes
        passes = 1 if self.config.remat == "none" else 2
        moved = passes * (gradient + tokens * self.activation_bytes)
        moved += (1 + weights) * tokens * self.activation_bytes
        sent = self._allgather_bytes(gradient) + passes * self._allreduce_layers_bytes(tokens)
        cost = Cost(backward_flops(self.config, rows, columns, weights=weights), moved, sent)
        if weights:
            gradient += self.head_bytes  # as large as the embedding
            cost += Cost(0, 2 * gradient, *self._reduce_gradient_bytes(gradient))
        return cost

    def head(self, rows: int, positions: int, products: int) -> Cost:
        """`products` with the head (logits: 1; hidden states' gradient, head's gradient: 1 more
        each), which is gathered once and read for every block of positions."""
        vocab_size, width = self.config.vocab_size, self.config.width
        devices = math.prod(self.mesh.values())
        on_device = max(rows * vocab_size // devices, 1)
        block = max(chunked_loss.chunk_elements("tpu") // on_device, 1)
        logits = rows * positions * vocab_size * 4 / devices
        cost = Cost(
            products * head_flops(self.config, rows, positions),
            products * (-(-positions // block) * self.head_bytes + logits),
            self._allgather_bytes(self.head_bytes),
        )
        if products > 1:
            hidden = rows * positions / self.row_parts * width * 4
            cost += Cost(ici_bytes=self._allreduce_bytes(hidden))
        if products > 2:
            in_float32 = vocab_size * width * 4 / self.mesh["tensor"]
            cost += Cost(0, 0, *self._reduce_gradient_bytes(in_float32))
        return cost

    def gathered_copy(self) -> Cost:
        """A rollout gathers what writes once."""
        size = self.layer_bytes + self.head_bytes
        return Cost(0, 2 * size, self._allgather_bytes(size))

    def decode(self, rows: int, columns: int, steps: int) -> Cost:
        """Each token reads layers, head and the whole cache."""
        tokens = rows / self.row_parts
        cache = cache_bytes(self.config, rows, columns, self.mesh)
        step = Cost(
            forward_flops(self.config, rows, 1, keys=columns) + head_flops(self.config, rows, 1),
            self.layer_bytes + self.head_bytes + cache,
            self._allreduce_layers_bytes(tokens) + self._allreduce_hidden_bytes(tokens),
        )
        return step * steps

    def optimizer(self) -> Cost:
        """AdamW in float32: parameter, gradient and two moments read, all but one written."""
        return Cost(hbm_bytes=7 * 4 * self.parameters / (self.mesh["fsdp"] * self.mesh["tensor"]))

    def _allgather_bytes(self, size: float) -> float:
        """Along `fsdp`."""
        return size * (self.mesh["fsdp"] - 1) / self.mesh["fsdp"]

    def _allreduce_bytes(self, size: float) -> float:
        """Along `tensor`."""
        return 2 * size * (self.mesh["tensor"] - 1) / self.mesh["tensor"]

    def _allreduce_hidden_bytes(self, tokens: float) -> float:
        """Of one hidden state, or embedding, of so many tokens."""
        return self._allreduce_bytes(tokens * self.config.width * self.itemsize)

    def _allreduce_layers_bytes(self, tokens: float) -> float:
        return 2 * self.config.num_layers * self._allreduce_hidden_bytes(tokens)

    def _reduce_gradient_bytes(self, size: float) -> tuple[float, float]:
        """Scattered along `fsdp`, then all-reduced along `data`: in a slice, and between them."""
        part, inside = size / self.mesh["fsdp"], self.mesh["data"] // self.slices
        sent = self._allgather_bytes(size) + 2 * part * (inside - 1) / inside
        return sent, 2 * part / inside * (self.slices - 1) / self.slices


def cache_bytes(config: DecoderConfig, rows: int, columns: int, mesh: Mapping[str, int]) -> float:
    """Keys and values: 2 L B S K H, rows along `data` and `fsdp`, heads along `tensor`, each as
    often as makes their number divide."""
    heads = math.lcm(config.num_kv_heads, mesh["tensor"]) / mesh["tensor"]
    elements = 2 * config.num_layers * rows * columns * heads * config.head_dim
    return elements * jnp.dtype(config.dtype).itemsize / (mesh["data"] * mesh["fsdp"])


class _Step(NamedTuple):
    """Sizes of a step, and the counters of its models."""

    method: Method
    student: _Counter
    teacher: _Counter | None
    batch_size: int
    rows: int  # of a micro-batch
    columns: int
    positions: int  # of a response
    before: int  # columns before every row that the teacher sees
    slots: int  # rows that are written at once

    @property
    def writers(self) -> list[_Counter]:
        """The models that write the rows of a rollout."""
        if not self.method.source.on_policy:
            return []
        return [self.student, self.teacher] if self.method.teacher_share else [self.student]


def _step(run: AbstractRun, slices: int = 1) -> _Step:
    method, before = run.stage.method, 0
    if method.prompted:
        before = run.config.soft_prompt.length
    elif method.teacher_view == "in_context":
        before = len(method.demonstrations)

    def counter(model):
        parameters = sum(x.size for x in jax.tree.leaves(model.params))
        return _Counter(model.decoder.config.padded, run.mesh.shape, slices, parameters)

    return _Step(
        method=method,
        student=counter(run.student),
        teacher=run.teacher and counter(run.teacher),
        batch_size=run.batch_size,
        rows=run.batch_size // method.parts,
        columns=run.config.data.max_length,
        positions=method.response_capacity,
        before=before,
        slots=min(method.execution.max_concurrent_rollouts or run.batch_size, run.batch_size),
    )


def phases(run: AbstractRun, slices: int = 1) -> dict[str, Cost]:
    """The cost of a train step on the run's mesh, by phase.

    Args:
      slices: that `data` goes across.
    """
    step = _step(run, slices)
    costs = *_rollout(step), _teacher(step), _student(step)
    return {name: cost for name, cost in zip(PHASES, costs) if cost != Cost()}


def _rollout(step: _Step) -> tuple[Cost, Cost]:
    asked, tokens = step.method.prompt_capacity, step.method.rollout_length
    prefill, decode = Cost(), Cost()
    for writer in step.writers:
        prefill += writer.gathered_copy() + writer.forward(step.batch_size, asked)
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
    part = teacher.forward(rows, step.before + columns)
    part += teacher.backward(rows, step.before + columns, weights=online)
    part += teacher.head(rows, positions, 2 + online)
    part += student.head(rows, positions, 1)
    if method.prompted and method.regularization:
        part += teacher.forward(rows, columns) + teacher.head(rows, positions, 1)
    # One forward of the student may serve both updates; then it counts in the student's.
    if not method.parts * method.passes == method.execution.length_buckets == 1:
        part += student.forward(rows, columns)
    update = teacher.optimizer() if online else Cost()
    return part * method.parts + update


def _student(step: _Step) -> Cost:
    """Forward and backward of the student, the teacher as it is seen now, and all other terms."""
    method, student, teacher = step.method, step.student, step.teacher
    rows, columns, positions = step.rows, step.columns, step.positions
    part = student.forward(rows, columns)
    part += student.backward(rows, columns, weights=True)
    part += student.head(rows, positions, 3)
    if method.needs_view and method.teacher_view != "cached":
        part += teacher.forward(rows, step.before + columns)
        part += teacher.head(rows, positions, 1)
    if method.corpus_terms:
        part += student.forward(rows, columns)
        part += student.backward(rows, columns, weights=True)
        part += student.head(rows, columns - 1, 3)
        if any(name != CROSS_ENTROPY for name, _ in method.corpus_terms):
            part += teacher.forward(rows, columns)
            part += teacher.head(rows, columns - 1, 1)
    cost = part * (method.parts * method.passes)
    if any(name == POLICY_GRADIENT for name, _ in method.student_terms):
        for model in (student, teacher):
            cost += (model.forward(rows, columns) + model.head(rows, positions, 1)) * method.parts
    return cost + student.optimizer() * method.updates


def kept_bytes(run: AbstractRun) -> dict[str, int]:
    """Bytes that a device of the run's mesh holds between steps, by part, exactly: its shards of
    all arrays.

    Raises:
      ConfigError: an axis does not divide a parameter.
    """
    state, teacher, rows, corpus = run.arguments()
    written = (state.replay, state.pending)
    parts = {
        "teacher": (teacher, state.params.get("teacher")),
        "student": state.params["student"],
        "soft prompt": state.soft_prompt,
        "optimizers": state.optimizers,
        "rows and the rest": (state.params.get("projection"), written, rows, corpus),
    }
    return {name: sum(map(_on_device, jax.tree.leaves(tree))) for name, tree in parts.items()}


def _on_device(leaf: Any) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def temporary_bytes(run: AbstractRun, platform: str = "tpu") -> dict[str, float]:
    """Bytes that a device needs beside that, an estimate: "rollout" and "update", together, as the
    compiler was seen to do; "cache" is part of the rollout's.

    The rollout keeps the cache and a gathered copy of the student in the dtype of computation, once
    more as it is laid out for decoding; the update gradients, what `remat` lets the layers keep, a
    layer's gathered parameters, heads, and logits of a block.

    Args:
      platform: of the devices.
    """
    step, mesh = _step(run), run.mesh.shape
    method, student, teacher = step.method, step.student, step.teacher
    models = [student, teacher] if teacher else [student]
    length = method.prompt_capacity + method.rollout_length
    cache = sum(cache_bytes(writer.config, step.slots, length, mesh) for writer in step.writers)
    copies = sum(writer.layer_bytes + 2 * writer.head_bytes for writer in step.writers)
    devices = mesh["fsdp"] * mesh["tensor"]
    gradients = 4 * student.parameters / devices * (2 if method.parts > 1 else 1)
    saved = _saved(student, step.rows, step.columns, platform)
    if method.prompted or method.teacher_view == "online":
        saved += _saved(teacher, step.rows, step.before + step.columns, platform)
    gathered = max(2 * model.layer_bytes / model.config.num_layers for model in models)
    heads = sum(model.head_bytes for model in models) + 2 * student.head_bytes
    all_logits = step.rows * step.positions * run.vocab_size / math.prod(mesh.values())
    logits = 6 * 4 * min(chunked_loss.chunk_elements(platform), all_logits)
    update = gradients + saved + gathered + heads + logits
    return {"cache": cache, "rollout": cache + 2 * copies, "update": update}


def _saved(count: _Counter, rows: int, columns: int, platform: str) -> float:
    """Bytes that the forward keeps for the backward pass: the input of every layer; with "dots"
    also what its matrices give, which the backward pass reads; with "none" the inputs and outputs
    of all products, attention's weights among them where no flash kernel leaves them out, and half
    as much again for norms, rotations and activation functions."""
    config, tensor, tokens = count.config, count.mesh["tensor"], rows * columns / count.row_parts
    if config.remat == "none":
        scores = 3 * 4 * config.num_layers * config.num_heads / tensor * columns
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
        )
        return tokens * (1.5 * count.activation_bytes + (scores if flash == "xla" else 0))
    kept = config.width
    if config.remat == "dots":
        cut = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        cut += (2 if config.gated else 1) * config.mlp_width
        kept += config.width + cut / tensor
    return config.num_layers * tokens * kept * count.itemsize
