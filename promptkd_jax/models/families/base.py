"""The description of a family of models, and the pieces that tables and readers of several share.

A family is a file of this folder: it reads the family's `config.json` into a `DecoderConfig`, says
which Hugging Face tensor is which parameter (one table, used in both directions), how llama.cpp
stores it if GGUF files of it are read and written, and which shapes are published.

A row of a table is (Hugging Face name, path in our parameter tree, pattern). The pattern is einops
notation from the stored layout to ours and at the same time the shape: V vocabulary, P rows of the
position table, D width, N heads, K key/value heads, H head width, F feed-forward width, E experts,
I gate and up of an expert in turn, W width of embeddings where it is not D. `{}` in a name is the
layer, a second one the expert; such parameters are stacked along a leading L, or L E. Letters that
are stored as one dimension stand together and in the same order in ours.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from promptkd_jax.infra.errors import ModelError
from promptkd_jax.models.config import DecoderConfig, Experts, LayerKind, Rope, RopeScaling
from promptkd_jax.models.families.gguf_layout import GGUFLayout
from promptkd_jax.models.layers.rotary import KINDS

HEAD = "lm_head.weight"  # the one name that stands outside of the prefix
EXPERT_NAMES = ("gate_proj", "up_proj", "down_proj")
_DIMENSION = re.compile(r"\([^)]*\)|[A-Z]")  # of a pattern: "(N H)" or "D"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One row of a table.

    Some tensors are stored fused, end to end along one dimension: `fused` has the letters of that
    dimension for each of them, ("N H", "K H", "K H") for query, key and value, and `part` says
    which one the row is. The pattern is that of the part alone.
    """

    name: str
    path: str
    pattern: str
    fused: tuple[str, ...] = ()
    part: int = 0

    @property
    def stacked(self) -> int:
        """Leading dimensions of ours that are tensors of their own in a file: 0, or 1 for one in
        every layer, 2 for one of every expert of every layer."""
        return self.name.count("{}")

    @property
    def stored(self) -> tuple[tuple[str, ...], ...]:
        """The letters of each stored dimension: (("N", "H"), ("D",)) for "(N H) D"."""
        groups = _DIMENSION.findall(self.pattern.split(" -> ")[0])
        return tuple(tuple(group.strip("()").split()) for group in groups)

    @property
    def ours(self) -> tuple[str, ...]:
        """The letters of our dimensions, without those that are `stacked`."""
        return tuple(self.pattern.split(" -> ")[1].split())

    @property
    def to_stored(self) -> str:
        """einops notation from ours, without the `stacked` dimensions, to the stored layout."""
        return " -> ".join(reversed(self.pattern.split(" -> ")))

    @property
    def fused_axis(self) -> int:
        """The stored dimension along which parts lie end to end."""
        return self.stored.index(tuple(self.fused[self.part].split()))

    @property
    def layout(self) -> str:
        """The stored dimensions, those of all parts: "D (N H + K H + K H)"."""
        groups = [" ".join(group) for group in self.stored]
        if self.fused:
            groups[self.fused_axis] = " + ".join(self.fused)
        return " ".join(f"({group})" if " " in group else group for group in groups)

    def stored_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape in a file, all parts together."""
        shape = [math.prod(sizes[x] for x in group) for group in self.stored]
        if self.fused:
            shape[self.fused_axis] = self._ends(sizes)[-1]
        return tuple(shape)

    def _ends(self, sizes: Mapping[str, int]) -> list[int]:
        """The end of each part along `fused_axis`."""
        extents = (math.prod(sizes[x] for x in letters.split()) for letters in self.fused)
        return list(itertools.accumulate(extents))

    def stretches(
        self, sizes: Mapping[str, int], bounds: Mapping[str, tuple[int, int]]
    ) -> list[list[tuple[int, int]]]:
        """Finds the places in which a part of a parameter is stored.

        Args:
          sizes: of each letter.
          bounds: (start, stop) of each letter of `ours`.

        Returns:
          For each stored dimension the (start, stop) of its stretches, as few as there can be, in
          the order in which their elements come in the part.
        """
        # One stored dimension is a box of its letters, row by row: of "(N H)" with N=4 and H=2, the
        # first half of every head, H 0:1, is the elements 0, 2, 4, 6: four stretches of one. All of
        # heads 1 and 2 is one stretch, 2:6.
        stretches = []
        for axis, group in enumerate(self.stored):
            box = [sizes[x] for x in group]
            inside = tuple(slice(*bounds[x]) for x in group)
            indices = np.arange(math.prod(box)).reshape(box)[inside].ravel()
            if self.part and axis == self.fused_axis:
                indices += self._ends(sizes)[self.part - 1]
            runs = np.split(indices, np.flatnonzero(np.diff(indices) != 1) + 1)
            stretches.append([(int(run[0]), int(run[-1]) + 1) for run in runs])
        return stretches


def layer_types(config: DecoderConfig) -> dict[str, list]:
    """The field of `config.json` that says which layers have a window."""
    windows = [config.kind(layer).sliding_window for layer in range(config.num_layers)]
    types = ["full_attention" if window is None else "sliding_attention" for window in windows]
    return {"layer_types": types}


@dataclasses.dataclass(frozen=True)
class Family:
    """One `model_type`: the reader of its config, and the table that reads and writes its files.

    Attributes:
      model_type: what `config.json` calls it; `DecoderConfig.family`.
      architecture: the class of `transformers`.
      read: (config.json, its place for messages) -> DecoderConfig; a KeyError is a missing field.
      tensors: the table for a model of that config, the embedding first.
      prefix: of all names but `HEAD`, as `transformers` writes them today.
      other_prefixes: those that older files have instead.
      ignored: regular expressions, below the prefix, of tensors that carry nothing.
      depth_field: of `config.json`, the number of layers.
      decays_norms: whether weight decay reaches its norm scales in the published code, which
        excepts them by GPT-2's names; see `Conventions.decay_norms`.
      export_fields: the fields of `config.json` that an export has whatever its source says: of
        which kind each layer is, and what other readers ask for.
      bare: whether files are written without `prefix`, as published ones are, if the head is tied
        (`transformers` 4 opens no others without it).
      gguf: None where no GGUF file of it is read or written.
      published: `config.json` by hub id, so that a run can be planned without its files.
    """

    model_type: str
    architecture: str
    read: Callable[[Mapping[str, Any], str], DecoderConfig]
    tensors: Callable[[DecoderConfig], tuple[Tensor, ...]]
    prefix: str = "model."
    other_prefixes: tuple[str, ...] = ("",)
    ignored: tuple[str, ...] = ()
    depth_field: str = "num_hidden_layers"
    decays_norms: bool = True
    export_fields: Callable[[DecoderConfig], dict[str, Any]] = lambda config: {}
    bare: bool = False
    gguf: GGUFLayout | None = None
    published: Mapping[str, dict[str, Any]] = dataclasses.field(default_factory=dict)


def sizes(config: DecoderConfig) -> dict[str, int]:
    """The number behind each letter of a pattern."""
    return {
        "V": config.vocab_size,
        "P": config.max_positions + config.position_offset,
        "D": config.width,
        "N": config.num_heads,
        "K": config.num_kv_heads,
        "H": config.head_dim,
        "F": config.mlp_width,
        "E": config.experts.num_experts if config.experts else 0,
        "I": 2 * config.mlp_width,
        "W": config.embedding_width,
    }


def stack_sizes(row: Tensor, config: DecoderConfig) -> tuple[int, ...]:
    """The sizes of the dimensions that are `stacked`: (), (L,) or (L, E)."""
    return (config.num_layers, sizes(config)["E"])[: row.stacked]


# Pieces of tables.


def linear_rows(
    stem: str,
    path: str,
    pattern: str,
    *,
    bias: bool,
    in_out: bool = False,
    fused: tuple[str, ...] = (),
    part: int = 0,
) -> list[Tensor]:
    """The kernel of a projection and, with `bias`, its bias: of the letters of the output, which
    are stored first, or last where a kernel is stored `in_out`."""
    rows = [Tensor(f"{stem}.weight", f"{path}/kernel", pattern, fused, part)]
    if bias:
        out = _DIMENSION.findall(pattern.split(" -> ")[0])[-1 if in_out else 0]
        out = f"{out} -> {out.strip('()')}"
        rows.append(Tensor(f"{stem}.bias", f"{path}/bias", out, fused, part))
    return rows


def norm_rows(stem: str, path: str, *, bias: bool = False, letter: str = "D") -> list[Tensor]:
    """The scale of a norm over `letter` and, with `bias`, its bias."""
    pattern = f"{letter} -> {letter}"
    rows = [Tensor(f"{stem}.weight", f"{path}/scale", pattern)]
    return [*rows, Tensor(f"{stem}.bias", f"{path}/bias", pattern)] if bias else rows


def embedding_rows(name: str, config: DecoderConfig) -> list[Tensor]:
    """The embedding, and the head where it is another matrix."""
    pattern = "V W -> V W" if config.projected_width else "V D -> V D"
    rows = [Tensor(name, "embed/embedding", pattern)]
    return rows if config.tied else [*rows, Tensor(HEAD, "lm_head", pattern)]


def expert_rows(router: str, experts: str, names: Sequence[str] = EXPERT_NAMES) -> list[Tensor]:
    """The router and the networks of experts without biases.

    Args:
      router, experts: the stems, with `{}` for the layer, and in the second another for the expert.
      names: of gate, up and down.
    """
    gate, up, down = names
    path = "layers/experts"
    return [
        *linear_rows(router, f"{path}/router", "E D -> D E", bias=False),
        *linear_rows(f"{experts}.{gate}", f"{path}/gate", "F D -> D F", bias=False),
        *linear_rows(f"{experts}.{up}", f"{path}/up", "F D -> D F", bias=False),
        *linear_rows(f"{experts}.{down}", f"{path}/down", "D F -> F D", bias=False),
    ]


# Pieces of readers.


def require(c: Mapping[str, Any], source: str, **expected: Any) -> None:
    """Raises ModelError for a field that is there and of another value."""
    for field, right in expected.items():
        if (found := c.get(field, right)) != right:
            raise ModelError(f"{source}: {field} = {found!r} is not supported (only {right!r})")


def read_rope(
    c: Mapping[str, Any],
    source: str,
    *,
    layer_type: str = "",
    theta: float = 10000.0,
    partial: bool = False,
) -> Rope:
    """Theta and scaling, from `rope_parameters` (transformers 5) or the older flat fields.

    Args:
      layer_type: whose parameters, where layers differ.
      theta: where the config has none.
      partial: whether a part of a head may turn.
    """
    new, old = (c.get(field) or {} for field in ("rope_parameters", "rope_scaling"))
    new = new.get(layer_type, new) if layer_type else new
    theta = float((new or old).get("rope_theta") or c.get("rope_theta") or theta)
    rope, other = (
        Rope(theta, _read_scaling(said, c, source), _read_share(said, c))
        for said in (new or old, old or new)
    )
    # One may say what the other leaves to be computed: they are compared by what they mean.
    if rope != other:
        raise ModelError(
            f"{source}: rope_parameters {new} and rope_scaling {old} contradict one another; "
            "remove the wrong one"
        )
    if rope.share != 1.0 and not partial:
        raise ModelError(f"{source}: partial_rotary_factor other than 1 is not supported")
    return rope


def _read_share(rope: Mapping[str, Any], c: Mapping[str, Any]) -> float:
    return float(rope.get("partial_rotary_factor", c.get("partial_rotary_factor", 1.0)))


def _read_scaling(rope: Mapping[str, Any], c: Mapping[str, Any], source: str) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    kind = {"su": "longrope"}.get(kind, kind)  # as Phi-3 called it
    if kind == "default":
        return None
    if kind not in KINDS:
        raise ModelError(
            f"{source}: rope_type {kind!r} is not supported; supported: default, {', '.join(KINDS)}"
        )
    longest = int(c["max_position_embeddings"])
    original = rope.get("original_max_position_embeddings")
    original = int(original or c.get("original_max_position_embeddings") or longest)
    factor = rope.get("factor")
    if kind == "longrope" or (kind == "yarn" and factor is None):
        factor = factor or longest / original
    factor = float(rope["factor"] if factor is None else factor)
    found = RopeScaling(kind, factor, original_max_position=original)
    if kind == "llama3":
        return dataclasses.replace(
            found,
            low_freq_factor=float(rope["low_freq_factor"]),
            high_freq_factor=float(rope["high_freq_factor"]),
        )
    attention_factor = rope.get("attention_factor")
    if kind == "yarn":
        if attention_factor is None:
            mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
            attention_factor = _mscale(factor, mscale or 1.0)
            if mscale and all_dim:
                attention_factor /= _mscale(factor, all_dim)
        return dataclasses.replace(
            found,
            beta_fast=float(rope.get("beta_fast") or 32),
            beta_slow=float(rope.get("beta_slow") or 1),
            truncate=bool(rope.get("truncate", True)),
            attention_factor=float(attention_factor),
        )
    if kind == "longrope":
        if attention_factor is None:
            logs = math.log(factor) / math.log(original) if factor > 1 else 0.0
            attention_factor = math.sqrt(1 + logs)
        return dataclasses.replace(
            found,
            attention_factor=float(attention_factor),
            short_factors=tuple(map(float, rope["short_factor"])),
            long_factors=tuple(map(float, rope["long_factor"])),
        )
    return found


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def read_experts(c: Mapping[str, Any], source: str, *, per_token: int, **differing: Any) -> Experts:
    """The experts, whose number transformers 5 also writes by the other of its two names.

    Args:
      per_token: where the config does not say.
      differing: further fields.
    """
    number = c["num_local_experts" if c.get("num_local_experts") else "num_experts"]
    per_token = c.get("num_experts_per_tok") or per_token
    if per_token > number:
        raise ModelError(
            f"{source}: num_experts_per_tok = {per_token}, but there are {number} experts"
        )
    return Experts(number, per_token, **differing)


LAYER_TYPES = ("full_attention", "sliding_attention")


def read_layer_types(c: Mapping[str, Any], source: str, default: Sequence[str]) -> Sequence[str]:
    """Returns the type of every layer, one of `LAYER_TYPES`: that of the field, or the default.

    Raises:
      ModelError: another type, or not as many as there are layers.
    """
    names = c.get("layer_types") or default
    if other := sorted(set(names) - set(LAYER_TYPES)):
        raise ModelError(
            f"{source}: layer_types has {other[0]!r}; supported are {' and '.join(LAYER_TYPES)}"
        )
    if len(names) != c["num_hidden_layers"]:
        raise ModelError(
            f"{source}: layer_types has {len(names)} entries for {c['num_hidden_layers']} layers"
        )
    return names


def kinds_of_layers(layers: Sequence[LayerKind]) -> dict[str, Any]:
    """The fields of a `DecoderConfig` whose layers are of these kinds."""
    kinds = tuple(dict.fromkeys(layers))
    pattern = tuple(map(kinds.index, layers)) if len(kinds) > 1 else ()
    return {"kinds": kinds, "pattern": pattern}


# Published shapes.


def published(
    fields: tuple[str, ...], *models: tuple[Mapping[str, Any], tuple[int, ...], *tuple[str, ...]]
) -> dict[str, dict[str, Any]]:
    """`config.json` by hub id.

    Args:
      fields: the names of the sizes that differ from model to model.
      models: (what they have in common, sizes, hub ids of models of these sizes).
    """
    return {
        name: common | dict(zip(fields, model_sizes, strict=True))
        for common, model_sizes, *names in models
        for name in names
    }
