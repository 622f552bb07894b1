"""From a folder, a hub id or a GGUF file to parameters: every tensor named, shaped and used."""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from promptkd_jax.infra import distributed, sharding
from promptkd_jax.models import families
from promptkd_jax.models.config import ModelError, from_hugging_face
from promptkd_jax.models.decoder import ACTIVATIONS, Decoder
from promptkd_jax.models.io.hub import pretrained_name, repository_of, resolve
from promptkd_jax.models.io.params import has_head_of_its_own, load_params
from promptkd_jax.models.io.safetensors import (
    PLAIN,
    SafetensorsFolder,
    read_card,
    read_json,
    refuse_pointer,
)

RECORD = "promptkd.json"  # beside a student: how it was asked while it was trained
RECORDED = ("template", "date", "max_prompt_length", "max_length")  # of the fields of its data
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")
# Whatever else the tokenizers of transformers read.
_BESIDE_TOKENIZER = ("*tokens*.json", "vocab.*", "merges.txt", "*.model", "*chat_template*")


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder with its parameters and what belongs to it.

    `params` is a dict pytree; `hf_config` the `config.json` it came with; `tokenizer` is None where
    the folder has none; generation ends at any of `eos_ids`. `card` has the `base_model` (a hub id)
    and the `license` that are known of it, for the card of what is made of it.
    """

    name: str
    decoder: Decoder
    params: Any
    hf_config: dict[str, Any]
    tokenizer: Any
    eos_ids: tuple[int, ...]
    card: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def vocab_size(self) -> int:
        """Tokens in use: those of the tokenizer, where there is one, without padding."""
        rows = self.decoder.config.vocab_size
        return min(rows, 1 + max(self.tokenizer.get_vocab().values())) if self.tokenizer else rows

    def replace(self, **changes: Any) -> "Model":
        """The same with some fields changed."""
        return dataclasses.replace(self, **changes)


def load_model(
    path: str,
    *,
    dtype: str = "float32",
    param_dtype: str = "float32",
    remat: str = "none",
    mesh: Mesh | None = None,
) -> Model:
    """Loads a causal language model.

    Args:
      path: a folder as `save_pretrained` writes it, the folder of a finished run, a `.gguf` file
        (these also in a bucket), `package:NAME/FILE` for a file inside an installed Python package,
        a hub id such as `openai-community/gpt2`, with a branch, tag or commit as
        `owner/name@revision`, or `synthetic:NAME` for a random model (see
        `synthetic`).
      dtype: what is computed in; param_dtype: what the parameters are kept in.
      remat: key of `decoder.REMAT`.
      mesh: of `sharding.make_mesh`; None for one device. Each process reads only what its devices
        hold. Where the mesh does not divide vocabulary, heads or feed-forward width, these are
        padded: see `DecoderConfig.padded`.

    Raises:
      ModelError: the folder, a file, a field or a tensor is missing, of another shape, or unknown,
        or a weight is not finite.
    """
    if path.startswith("synthetic:"):
        from promptkd_jax import synthetic  # it builds on this module

        name = path.removeprefix("synthetic:")
        return synthetic.model(name, dtype=dtype, param_dtype=param_dtype, remat=remat, mesh=mesh)
    file = resolve(path)
    if file.suffix == ".gguf":
        from promptkd_jax.models.io.gguf import open_gguf
        from promptkd_jax.models.io.gguf_tokenizer import tokenizer_from_gguf

        source = open_gguf(str(file))
        tokenizer, generation = tokenizer_from_gguf(source), {}
        licence = source.metadata.get("general.license")
        plain = isinstance(licence, str) and re.fullmatch(PLAIN, licence)
        card = {"license": licence} if plain else {}
    else:
        source = SafetensorsFolder(file, pretrained_name(path) if repository_of(path) else None)
        tokenizer, generation = _tokenizer(file), read_json(file / "generation_config.json", {})
        card = read_card(file)
    if repository := repository_of(path):
        card = card | {"base_model": repository}
    config = from_hugging_face(source.config, f"{source.path}: config")
    if config.activation not in ACTIVATIONS:
        raise ModelError(
            f"{source.path}: config: activation {config.activation!r} is not supported; "
            f"supported: {', '.join(ACTIVATIONS)}"
        )
    config = config.replace(dtype=dtype, param_dtype=param_dtype, remat=remat)
    hf_config = source.config
    if config.tied and has_head_of_its_own(source, config):
        # As transformers 5 does; the config says so from here on, for whoever reads an export.
        config, hf_config = config.replace(tied=False), {**hf_config, "tie_word_embeddings": False}
        distributed.warn(
            f"{path}: its config ties the head to the embedding, but {families.HEAD} is another "
            "matrix than the embedding; it is used"
        )
    parts = 1 if mesh is None else mesh.shape["tensor"]
    config = config.replace(tensor_parts=parts)
    shardings = None if mesh is None else functools.partial(sharding.shardings, mesh=mesh)
    return Model(
        name=path,
        decoder=Decoder(config),
        params=load_params(source, config, shardings),
        hf_config=hf_config,
        tokenizer=tokenizer,
        eos_ids=_eos_ids(generation, source.config, tokenizer),
        card=card,
    )


def load_without_weights(path: str, **changes: Any) -> Model:
    """Reads a model without `params` (None) from what `export.save_without_weights` wrote.

    Args:
      changes: of the decoder's config, such as `param_dtype`.

    Raises:
      ModelError: a file is missing or cannot be read.
    """
    folder = resolve(path)
    hf_config = read_json(folder / "config.json")
    tokenizer, generation = _tokenizer(folder), read_json(folder / "generation_config.json", {})
    config = from_hugging_face(hf_config, f"{folder}: config").replace(**changes)
    eos_ids = _eos_ids(generation, hf_config, tokenizer)
    card = read_card(folder)
    return Model(path, Decoder(config), None, hf_config, tokenizer, eos_ids, card)


def keep_layers(model: Model, layers: tuple[int, ...]) -> Model:
    """The same model with only `layers` of its layers, in this order (DistilGPT2's start).

    All arrays are copies, and lie where those of `model` do: a train step may take them over while
    `model` stays as it is.

    Raises:
      ModelError: a layer that the model does not have.
    """
    config = model.decoder.config
    if not layers or not set(layers) <= set(range(config.depth)):
        raise ModelError(f"layers {layers}: {model.name} has the layers 0 to {config.depth - 1}")
    index = np.asarray(layers)

    def keep(params):
        stack = jax.tree.map(lambda x: x[index], params["layers"])
        return jax.tree.map(jnp.copy, params | {"layers": stack})

    where = jax.tree.map(_committed_to, model.params)
    params = jax.jit(keep, out_shardings=where)(model.params)
    depth_field = families.family(config).depth_field
    hf_config = {**model.hf_config, depth_field: len(layers)}
    if "layer_types" in hf_config:
        hf_config["layer_types"] = [hf_config["layer_types"][i] for i in layers]
    decoder = Decoder(config.replace(depth=len(layers)))
    return model.replace(decoder=decoder, params=params, hf_config=hf_config)


def _committed_to(x: Any) -> Any:
    return x.sharding if isinstance(x, jax.Array) and x.committed else None


def chosen_layers(depth: int, chosen: int | Sequence[int]) -> tuple[int, ...]:
    """The layers themselves where they are listed, else so many evenly spread ones."""
    return uniform_layers(depth, chosen) if isinstance(chosen, int) else tuple(chosen)


def end_ids(teacher: Model | None, student: Model) -> tuple[int, ...]:
    """The tokens that end a text of either model, the student's own first."""
    return tuple(dict.fromkeys(student.eos_ids + (teacher.eos_ids if teacher else ())))


def uniform_layers(depth: int, kept: int) -> tuple[int, ...]:
    """`kept` of `depth` layers, evenly spread, the first and the last among them.

    Raises:
      ModelError: more layers than there are, or none.
    """
    if not 0 < kept <= depth:
        raise ModelError(f"{kept} of {depth} layers: keep at least 1 and at most {depth}")
    return tuple(int(i) for i in np.round(np.linspace(0, depth - 1, kept)))


def training_record(path: str) -> dict[str, Any]:
    """Reads how a model was asked while it was trained, as the run that made it wrote beside it.

    Returns:
      The fields `RECORDED` of that run's data; {} where nothing is said.

    Raises:
      ModelError: there is no such model, or the file is no JSON.
    """
    if path.startswith("synthetic:"):
        return {}
    return read_json(resolve(path) / RECORD, {})


def _tokenizer(folder: pathlib.Path) -> Any:
    if not any((folder / file).exists() for file in TOKENIZER_FILES):
        return None
    for pattern in (*TOKENIZER_FILES, *_BESIDE_TOKENIZER):
        for file in filter(pathlib.Path.is_file, folder.glob(pattern)):
            refuse_pointer(file)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizers, written in Rust, raises nothing more definite
        raise ModelError(
            f"{folder}: its tokenizer cannot be read: {type(error).__name__}: {error}"
        ) from error


def _eos_ids(
    generation: Mapping[str, Any], config: Mapping[str, Any], tokenizer
) -> tuple[int, ...]:
    """All that end an answer; the tokenizer's own, which ends a chat turn, first."""
    own = () if tokenizer is None or tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    for found in (generation.get("eos_token_id"), config.get("eos_token_id")):
        if found is not None:
            ids = tuple(found) if isinstance(found, list) else (found,)
            return tuple(sorted(ids, key=lambda one: one not in own))
    return own


def load_with_tokenizer(path: str, *, dtype: str) -> Model:
    """Reads a model, for what reads and writes text, onto the mesh in context.

    Raises:
      ModelError: it cannot be read, or has no tokenizer or EOS.
    """
    mesh = jax.sharding.get_mesh()
    mesh = None if mesh.empty else mesh
    model = load_model(path, dtype=dtype, param_dtype=dtype, mesh=mesh)
    check_text(model)
    return model


def check_text(model: Model) -> None:
    """Raises ModelError for a model without tokenizer or EOS, or one whose ids are no tokens."""
    if model.tokenizer is None:
        raise ModelError(f"{model.name}: has no tokenizer files (tokenizer.json, …)")
    if not model.eos_ids:
        raise ModelError(f"{model.name}: no eos_token_id in its config or generation config")
    rows, largest = model.decoder.config.vocab_size, max(model.tokenizer.get_vocab().values())
    if largest >= rows:
        raise ModelError(
            f"{model.name}: its tokenizer has ids up to {largest}, its embedding only {rows} rows"
        )
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
