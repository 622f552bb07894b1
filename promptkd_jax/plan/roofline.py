"""Work, memory and traffic of a step, counted from shapes alone.

Multiplications count as two operations. Every row is taken to be as long as the config allows and
every rollout to run to its limit, so that work and tokens are those of full rows. Attention counts
all pairs of columns, as plain XLA computes them; the splash kernel leaves out up to half.

B rows, T columns, M soft-prompt tokens, R response positions, D width, N heads, K key/value heads,
H head width, F feed-forward width, V vocabulary, L layers; d, f, t devices along `data`, `fsdp`,
`tensor`. Bytes are those of one device. Models are taken as they are padded for the mesh.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax

from promptkd_jax.distill import chunked_loss
from promptkd_jax.distill.method import CROSS_ENTROPY, ON_POLICY, POLICY_GRADIENT
from promptkd_jax.models.attention import implementation
from promptkd_jax.models.config import DecoderConfig
from promptkd_jax.plan.chips import Slices

if TYPE_CHECKING:
    from promptkd_jax.plan.abstract_run import AbstractRun

PHASES = ("prefill", "decode", "prompt update", "student update")
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclasses.dataclass(frozen=True)
class Work:
    """`flops` of all devices together; `moved` bytes to and from HBM, `sent` to chips of the same
    slice, `sent_between_slices`, of one device."""

    flops: float = 0.0
    moved: float = 0.0
    sent: float = 0.0
    sent_between_slices: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, n) + getattr(other, n) for n in _FIELDS))

    def __mul__(self, times: float) -> Work:
        return Work(*(times * getattr(self, n) for n in _FIELDS))

    def seconds(self, slices: Slices) -> dict[str, float]:
        """Seconds of each of matrix units, HBM, network and slow network, would it work alone."""
        chip = slices.chip
        each = {
            "compute": self.flops / (slices.chips * chip.tflops * 1e12),
            "HBM": self.moved / (chip.per_device(chip.hbm_gbps) * 1e9),
            "network": self.sent / (chip.per_device(chip.ici_gbps) * 1e9),
        }
        if slices.number > 1:
            slow = chip.per_device(chip.dcn_gbps) * 1e9
            each["between slices"] = self.sent_between_slices / slow
        return each


_FIELDS = tuple(field.name for field in dataclasses.fields(Work))


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
    """Work of the pieces of a step on a mesh."""

    mesh: Mapping[str, int]
    slices: int

    @property
    def row_parts(self) -> int:
        return self.mesh["data"] * self.mesh["fsdp"]

    def forward(self, config: DecoderConfig, rows: int, columns: int) -> Work:
        """Reads all layers once, after gathering them and the embedding along `fsdp`; 2 all-reduces
        of the hidden states a layer along `tensor`, and one of the embeddings; inputs and outputs
        of all products pass through HBM."""
        tokens = rows * columns / self.row_parts
        return Work(
            forward_flops(config, rows, columns),
            self._layer_bytes(config) + tokens * self._activations(config),
            self._gather(self._layer_bytes(config))
            + self._reduce_hidden(config, tokens)
            + self._look_up(config, tokens),
        )

    def backward(self, config: DecoderConfig, rows: int, columns: int, *, weights: bool) -> Work:
        """Work as of the forward, and the gradients of the layers, once read and once written."""
        tokens, gradient = rows * columns / self.row_parts, self._layer_bytes(config)
        passes = 1 if config.remat == "none" else 2
        moved = passes * (gradient + tokens * self._activations(config))
        moved += (1 + weights) * tokens * self._activations(config)
        sent = self._gather(gradient) + passes * self._reduce_hidden(config, tokens)
        found = Work(backward_flops(config, rows, columns, weights=weights), moved, sent)
        if weights:
            gradient += self._head_bytes(config)  # as large as the embedding
            found += Work(0, 2 * gradient, *self._reduce_gradient(gradient))
        return found

    def head(self, config: DecoderConfig, rows: int, positions: int, products: int) -> Work:
        """`products` with the head (logits: 1; hidden states' gradient, head's gradient: 1 more
        each), which is gathered once and read for every block of positions."""
        size = config.vocab_size * config.width * _BYTES[config.dtype] / self.mesh["tensor"]
        on_device = max(rows * config.vocab_size // math.prod(self.mesh.values()), 1)
        block = max(chunked_loss.chunk_elements("tpu") // on_device, 1)
        logits = rows * positions * config.vocab_size * 4 / math.prod(self.mesh.values())
        found = Work(
            products * head_flops(config, rows, positions),
            products * (-(-positions // block) * size + logits),
            self._gather(size),
        )
        if products > 1:
            found += Work(sent=self._around(rows * positions / self.row_parts * config.width * 4))
        if products > 2:
            in_float32 = config.vocab_size * config.width * 4 / self.mesh["tensor"]
            found += Work(0, 0, *self._reduce_gradient(in_float32))
        return found

    def resident(self, config: DecoderConfig) -> Work:
        """A rollout gathers what writes once."""
        size = self._layer_bytes(config) + self._head_bytes(config)
        return Work(0, 2 * size, self._gather(size))

    def decode(self, config: DecoderConfig, rows: int, columns: int, steps: int) -> Work:
        """Each token reads layers, head and the whole cache."""
        tokens = rows / self.row_parts
        step = Work(
            forward_flops(config, rows, 1, keys=columns) + head_flops(config, rows, 1),
            self._layer_bytes(config)
            + self._head_bytes(config)
            + cache_bytes(config, rows, columns, self.mesh),
            self._reduce_hidden(config, tokens)
            + self._around(tokens * config.width * _BYTES[config.dtype]),
        )
        return step * steps

    def optimizer(self, parameters: float) -> Work:
        """AdamW in float32: parameter, gradient and two moments read, all but one written."""
        return Work(moved=7 * 4 * parameters / (self.mesh["fsdp"] * self.mesh["tensor"]))

    def _layer_bytes(self, config: DecoderConfig) -> float:
        return matrix_parameters(config) * _BYTES[config.dtype] / self.mesh["tensor"]

    def _head_bytes(self, config: DecoderConfig) -> float:
        return config.vocab_size * config.width * _BYTES[config.dtype] / self.mesh["tensor"]

    def _activations(self, config: DecoderConfig) -> float:
        """Bytes of the inputs and outputs of all products, for one token."""
        heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        cut = heads + (4 if config.gated else 2) * config.mlp_width
        each = 4 * config.width + cut / self.mesh["tensor"]
        return config.num_layers * each * _BYTES[config.dtype]

    def _gather(self, size: float) -> float:
        return size * (self.mesh["fsdp"] - 1) / self.mesh["fsdp"]

    def _around(self, size: float) -> float:
        """An all-reduce along `tensor`."""
        return 2 * size * (self.mesh["tensor"] - 1) / self.mesh["tensor"]

    def _reduce_hidden(self, config: DecoderConfig, tokens: float) -> float:
        return 2 * config.num_layers * self._around(tokens * config.width * _BYTES[config.dtype])

    def _look_up(self, config: DecoderConfig, tokens: float) -> float:
        """Embeddings: the table gathered along `fsdp`, what is found added up along `tensor`."""
        found = self._around(tokens * config.width * _BYTES[config.dtype])
        return self._gather(self._head_bytes(config)) + found

    def _reduce_gradient(self, size: float) -> tuple[float, float]:
        """Scattered along `fsdp`, then all-reduced along `data`: in a slice, and between them."""
        part, inside = size / self.mesh["fsdp"], self.mesh["data"] // self.slices
        sent = self._gather(size) + 2 * part * (inside - 1) / inside
        return sent, 2 * part / inside * (self.slices - 1) / self.slices


def cache_bytes(config: DecoderConfig, rows: int, columns: int, mesh: Mapping[str, int]) -> float:
    """Keys and values: 2 L B S K H, rows along `data` and `fsdp`, heads along `tensor`, each as
    often as makes their number divide."""
    heads = math.lcm(config.num_kv_heads, mesh["tensor"]) / mesh["tensor"]
    elements = 2 * config.num_layers * rows * columns * heads * config.head_dim
    return elements * _BYTES[config.dtype] / (mesh["data"] * mesh["fsdp"])


def phases(run: AbstractRun, mesh: Mapping[str, int], slices: int = 1) -> dict[str, Work]:
    """The work of a train step, by phase.

    Args:
      mesh: sizes of `data`, `fsdp`, `tensor`; slices: that `data` goes across.
    """
    run, count = run.on(mesh), _Counter(mesh, slices)
    found = dict(zip(PHASES, (*_rollout(run, count), _teacher(run, count), _student(run, count))))
    return {name: work for name, work in found.items() if work != Work()}


def _rollout(run: AbstractRun, count: _Counter) -> tuple[Work, Work]:
    method = run.stage.method
    if method.targets not in ON_POLICY:
        return Work(), Work()
    voices = [run.student.decoder.config.padded]
    if method.teacher_share:
        voices.append(run.teacher.decoder.config.padded)
    prefill, decode = Work(), Work()
    slots, asked, steps = _slots(run), method.prompt_capacity, method.rollout_length
    turns = run.batch_size / slots
    for voice in voices:
        prefill += count.resident(voice) + count.forward(voice, run.batch_size, asked)
        decode += count.decode(voice, slots, asked + steps, steps) * turns
    return prefill, decode


def _slots(run: AbstractRun) -> int:
    """Rows that are written at once."""
    return min(run.stage.method.execution.max_concurrent_rollouts or run.batch_size, run.batch_size)


def _sizes(run: AbstractRun) -> tuple[int, int, int, int, int]:
    """Rows of a part, parts, columns, response positions, columns before every row."""
    method, columns = run.stage.method, run.config.data.max_length
    before = 0
    if method.prompted:
        before = run.config.soft_prompt.length
    elif method.teacher_view == "in_context":
        before = len(method.demonstrations)
    return run.batch_size // method.parts, method.parts, columns, method.response_capacity, before


def _teacher(run: AbstractRun, count: _Counter) -> Work:
    """The soft prompt's update: plain and prompted forward, backward to the prompt; or that of a
    teacher that learns. The student is seen beside it."""
    method = run.stage.method
    if not (method.prompted or method.teacher_view == "online"):
        return Work()
    rows, parts, columns, positions, before = _sizes(run)
    teacher, student = run.teacher.decoder.config.padded, run.student.decoder.config.padded
    online = method.teacher_view == "online"
    one = count.forward(teacher, rows, before + columns)
    one += count.backward(teacher, rows, before + columns, weights=online)
    one += count.head(teacher, rows, positions, 2 + online)
    one += count.head(student, rows, positions, 1)
    if method.prompted and method.regularization:
        one += count.forward(teacher, rows, columns) + count.head(teacher, rows, positions, 1)
    if not _shared(run):
        one += count.forward(student, rows, columns)
    update = count.optimizer(_parameters(run.teacher)) if online else Work()
    return one * parts + update


def _student(run: AbstractRun, count: _Counter) -> Work:
    """Forward and backward of the student, the teacher as it is seen now, and all other terms."""
    method = run.stage.method
    rows, parts, columns, positions, before = _sizes(run)
    student = run.student.decoder.config.padded
    one = count.forward(student, rows, columns)
    one += count.backward(student, rows, columns, weights=True)
    one += count.head(student, rows, positions, 3)
    if method.needs_view and method.teacher_view != "cached":
        teacher = run.teacher.decoder.config.padded
        one += count.forward(teacher, rows, before + columns)
        one += count.head(teacher, rows, positions, 1)
    if method.corpus_terms:
        one += count.forward(student, rows, columns)
        one += count.backward(student, rows, columns, weights=True)
        one += count.head(student, rows, columns - 1, 3)
        if any(name != CROSS_ENTROPY for name, _ in method.corpus_terms):
            one += count.forward(run.teacher.decoder.config.padded, rows, columns)
            one += count.head(run.teacher.decoder.config.padded, rows, columns - 1, 1)
    found = one * (parts * method.passes)
    if any(name == POLICY_GRADIENT for name, _ in method.student_terms):
        for model in (run.student, run.teacher):
            config = model.decoder.config.padded
            valued = count.forward(config, rows, columns) + count.head(config, rows, positions, 1)
            found += valued * parts
    return found + count.optimizer(_parameters(run.student)) * method.updates


def _shared(run: AbstractRun) -> bool:
    """Whether one forward of the student serves both updates; it counts in the student's."""
    method = run.stage.method
    return method.parts * method.passes == method.execution.length_buckets == 1


def _parameters(model: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(model.params))


def kept_bytes(run: AbstractRun, mesh: Any) -> dict[str, int]:
    """Bytes that a device holds between steps, by part, exactly: its shards of all arrays.

    Args:
      mesh: also an abstract one.

    Raises:
      ConfigError: an axis does not divide a parameter.
    """
    state, teacher, rows, corpus = run.arguments(mesh)
    named = {"student": state.params["student"], "soft prompt": state.soft_prompt}
    written = (state.replay, state.pending)
    parts = {
        "teacher": (teacher, state.params.get("teacher")),
        **named,
        "optimizers": state.optimizers,
        "rows and the rest": (state.params.get("projection"), written, rows, corpus),
    }
    return {name: sum(map(_on_device, jax.tree.leaves(tree))) for name, tree in parts.items()}


def _on_device(leaf: Any) -> int:
    shape = leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize


def temporary_bytes(
    run: AbstractRun, mesh: Mapping[str, int], platform: str = "tpu"
) -> dict[str, float]:
    """Bytes that a device needs beside that, an estimate: "rollout" and "update", together, as the
    compiler was seen to do; "cache" is part of the rollout's.

    The rollout keeps the cache and a gathered copy of the student in the dtype of computation, once
    more as it is laid out for decoding; the update gradients, what `remat` lets the layers keep, a
    layer's gathered parameters, heads, and logits of a block.

    Args:
      mesh: sizes of `data`, `fsdp`, `tensor`.
      platform: of the devices.
    """
    run, method, count = run.on(mesh), run.stage.method, _Counter(mesh, 1)
    rows, _, columns, positions, before = _sizes(run)
    student = run.student.decoder.config.padded
    voices = [student] if method.targets in ON_POLICY else []
    if voices and method.teacher_share:
        voices.append(run.teacher.decoder.config.padded)
    length = method.prompt_capacity + method.rollout_length
    cache = sum(cache_bytes(voice, _slots(run), length, mesh) for voice in voices)
    copies = sum(count._layer_bytes(voice) + 2 * count._head_bytes(voice) for voice in voices)
    devices = mesh["fsdp"] * mesh["tensor"]
    gradients = 4 * _parameters(run.student) / devices * (2 if method.parts > 1 else 1)
    saved = _saved(count, student, rows, columns, platform)
    if method.prompted or method.teacher_view == "online":
        saved += _saved(count, run.teacher.decoder.config.padded, rows, before + columns, platform)
    models = [model.decoder.config.padded for model in (run.student, run.teacher) if model]
    gathered = max(2 * count._layer_bytes(config) / config.num_layers for config in models)
    heads = sum(count._head_bytes(config) for config in models) + 2 * count._head_bytes(student)
    logits = (
        6
        * 4
        * min(
            chunked_loss.chunk_elements(platform),
            rows * positions * run.vocab_size / math.prod(mesh.values()),
        )
    )
    update = gradients + saved + gathered + heads + logits
    return {"cache": cache, "rollout": cache + 2 * copies, "update": update}


def _saved(count: _Counter, config: DecoderConfig, rows: int, columns: int, platform: str) -> float:
    """Bytes that the forward keeps for the backward pass: the input of every layer; with "dots"
    also what its matrices give, which the backward pass reads; with "none" the inputs and outputs
    of all products, attention's weights among them where no flash kernel leaves them out, and half
    as much again for norms, rotations and activation functions."""
    tokens, size = rows * columns / count.row_parts, _BYTES[config.dtype]
    if config.remat == "none":
        scores = 3 * 4 * config.num_layers * config.num_heads / count.mesh["tensor"] * columns
        flash = implementation(
            platform=platform,
            dtype=config.dtype,
            rows=rows,
            columns=columns,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            row_parts=count.row_parts,
            head_parts=count.mesh["tensor"],
        )
        return tokens * (1.5 * count._activations(config) + (scores if flash == "xla" else 0))
    kept = config.width
    if config.remat == "dots":
        cut = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        cut += (2 if config.gated else 1) * config.mlp_width
        kept += config.width + cut / count.mesh["tensor"]
    return config.num_layers * tokens * kept * size
