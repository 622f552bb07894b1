"""A model: decoder, parameters, tokenizer, and how it ends a response."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from promptkd_jax.infra import distributed, sharding
from promptkd_jax.infra.errors import ModelError
from promptkd_jax.models.config import DecoderConfig, LoRA
from promptkd_jax.models.decoder import Decoder
from promptkd_jax.models.families.base import kinds_of_layers
from promptkd_jax.models.families.registry import FAMILIES
from promptkd_jax.models.layers.lora import join, split


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder with its parameters and what belongs to it.

    `params` is a dict pytree; `hf_config` the `config.json` it came with; `tokenizer` is None where
    the folder has none; generation ends at any of `eos_ids`. `card` has the `base_model` (a hub id)
    and the `license` that are known of it, for the card of what is made of it. `shared_tokens` is
    how many tokens it shares with the other model of a run, where there is one.
    """

    name: str
    decoder: Decoder
    params: Any
    hf_config: dict[str, Any]
    tokenizer: Any
    eos_ids: tuple[int, ...]
    card: Mapping[str, str] = dataclasses.field(default_factory=dict)
    shared_tokens: int | None = None

    @property
    def vocab_size(self) -> int:
        """Tokens in use, from 0 on: those of the tokenizer, where there is one, that have a row of
        the embedding and are shared. Padding, and tokens without a row, are behind them."""
        sizes = [self.decoder.config.vocab_size]
        sizes += [1 + max(self.tokenizer.get_vocab().values())] if self.tokenizer else []
        return min(sizes + ([] if self.shared_tokens is None else [self.shared_tokens]))

    @property
    def trained(self) -> Any:
        """The parameters that a student trains: all of them, or those of its adapter."""
        return split(self.params)[1] if self.decoder.config.lora else self.params

    @property
    def frozen(self) -> Any:
        """The parameters beside an adapter's; None where there is none."""
        return split(self.params)[0] if self.decoder.config.lora else None

    def shardings(self, mesh: Mesh | AbstractMesh) -> Any:
        """Where every parameter lies on a mesh, in a device's memory or the host's."""
        return param_shardings(self.decoder.config, self.params, mesh)

    def replace(self, **changes: Any) -> "Model":
        """The same with some fields changed."""
        return dataclasses.replace(self, **changes)


def param_shardings(config: DecoderConfig, params: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Where every parameter of `Decoder(config)` lies on a mesh: the kernels of layers, if these
    are offloaded, in the host's memory, from where each is brought to the device for its turn."""
    placed = sharding.shardings(params, mesh)
    if config.offload:
        layers = jax.tree.map_with_path(_offloaded, placed["layers"])
        placed = {**placed, "layers": layers}
    return placed


def _offloaded(path: tuple, place: Any) -> Any:
    # Kernels alone: of [L, D], [L, 1, D] or [L, E, D] a TPU cannot take a part out of what lies in
    # the memory of the host, and norms, biases and scales are small.
    return sharding.in_host_memory(place) if path[-1].key == "kernel" else place


def keep_layers(model: Model, layers: tuple[int, ...]) -> Model:
    """The same model with only `layers` of its layers, in this order (DistilGPT2's start).

    All arrays are copies, and lie where those of `model` do: a train step may take them over while
    `model` stays as it is.

    Raises:
      ModelError: a layer that the model does not have.
    """
    config = model.decoder.config
    if not layers or not set(layers) <= set(range(config.num_layers)):
        raise ModelError(
            f"layers {layers}: {model.name} has the layers 0 to {config.num_layers - 1}"
        )
    # Layers are stacked along the first axis of every array, so that keeping some is an index.
    index = np.asarray(layers)

    def keep(params):
        stack = jax.tree.map(lambda x: x[index], params["layers"])
        return jax.tree.map(jnp.copy, params | {"layers": stack})

    # The copies lie where the originals do, cut as they are.
    where = jax.tree.map(
        lambda x: x.sharding if isinstance(x, jax.Array) and x.committed else None, model.params
    )
    params = jax.jit(keep, out_shardings=where)(model.params)
    family, kept = FAMILIES[config.family], keep_layers_config(config, layers)
    # Where layers differ, the fields that say so have to name those that are left.
    fields = {family.depth_field: len(layers), **family.export_fields(kept)}
    return model.replace(
        decoder=Decoder(kept), params=params, hf_config={**model.hf_config, **fields}
    )


def keep_layers_config(config: DecoderConfig, layers: Sequence[int]) -> DecoderConfig:
    """The config of a decoder of only `layers` of these, in this order."""
    kinds = kinds_of_layers([config.kind(layer) for layer in layers])
    return config.replace(num_layers=len(layers), **kinds)


def add_adapter(model: Model, lora: LoRA, adapter: Any) -> Model:
    """The same model with an adapter, whose parameters stand beside those that they change.

    Args:
      adapter: as `lora.init_adapter` makes it or `load_lora` reads it, padded as the model is.
    """
    decoder = Decoder(model.decoder.config.replace(lora=lora))
    return model.replace(decoder=decoder, params=join(model.params, adapter))


def chosen_layers(depth: int, chosen: int | Sequence[int]) -> tuple[int, ...]:
    """The layers themselves where they are listed, else so many evenly spread ones."""
    return uniform_layers(depth, chosen) if isinstance(chosen, int) else tuple(chosen)


def end_ids(teacher: Model | None, student: Model) -> tuple[int, ...]:
    """The tokens that end a text of either model, the student's own first."""
    return tuple(dict.fromkeys(student.eos_ids + (teacher.eos_ids if teacher else ())))


def text_end(model: Model) -> int:
    """The token that ends a text which is no turn of a conversation: the tokenizer's EOS, where it
    is one of those that end a response."""
    own = model.tokenizer.eos_token_id
    return own if own in model.eos_ids else model.eos_ids[0]


def uniform_layers(depth: int, kept: int) -> tuple[int, ...]:
    """`kept` of `depth` layers, evenly spread, the first and the last among them.

    Raises:
      ModelError: more layers than there are, or none.
    """
    if not 0 < kept <= depth:
        raise ModelError(f"{kept} of {depth} layers: keep at least 1 and at most {depth}")
    return tuple(int(i) for i in np.round(np.linspace(0, depth - 1, kept)))


def check_text(model: Model) -> None:
    """Raises ModelError for a model without tokenizer or EOS, or one whose ends are no tokens."""
    if model.tokenizer is None:
        raise ModelError(f"{model.name}: has no tokenizer files (tokenizer.json, …)")
    if not model.eos_ids:
        raise ModelError(f"{model.name}: no eos_token_id in its config or generation config")
    used = model.vocab_size
    if wrong := [one for one in model.eos_ids if one not in range(used)]:
        raise ModelError(
            f"{model.name}: eos_token_id {wrong[0]} is no token: its vocabulary has {used} (0 to "
            f"{used - 1}), so that nothing would end an answer; correct generation_config.json or "
            "config.json"
        )


def check_positions(model: Model, columns: int) -> None:
    """Warns of rows that are longer than a model with rotary positions was trained for.

    A learned table of positions has no rows for them: there the decoder refuses.

    Args:
      columns: of the longest rows, a soft prompt and demonstrations included.
    """
    config = model.decoder.config
    if columns > config.trained_positions and not config.learned_positions:
        distributed.warn(
            f"{model.name}: rows of up to {columns} tokens, but it was trained for "
            f"{config.trained_positions} positions (max_position_embeddings); what it computes "
            "beyond them means little: shorten prompts or answers"
        )
