"""Models from a folder, a hub id or a GGUF file: every tensor is named, of its shape, and used."""

import functools
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from promptkd_jax.infra import distributed, sharding
from promptkd_jax.infra.errors import ModelError
from promptkd_jax.models.decoder import Decoder
from promptkd_jax.models.families.base import HEAD
from promptkd_jax.models.families.registry import from_hugging_face
from promptkd_jax.models.io.hub import repository_of, resolve_model
from promptkd_jax.models.io.params import check_pairs, has_head_of_its_own, load_params
from promptkd_jax.models.io.safetensors import (
    PLAIN,
    SafetensorsFolder,
    read_card,
    read_json,
    refuse_pointer,
)
from promptkd_jax.models.io.sentencepiece import SENTENCEPIECE, check_pieces, processor
from promptkd_jax.models.layers.feed_forward import ACTIVATIONS
from promptkd_jax.models.layers.quantization import QUANTIZE
from promptkd_jax.models.model import Model, check_text, param_shardings
from promptkd_jax.models.random_model import (
    PREFIX,
    synthetic_config,
    synthetic_model,
    synthetic_tokenizer,
)

RECORD = "promptkd.json"  # beside a student: how it was asked while it was trained
RECORDED = (  # of the fields of its data
    *("template", "system", "chat_template_kwargs", "add_bos", "date"),
    *("max_prompt_length", "max_length", "long_prompts"),
)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", SENTENCEPIECE)
# Whatever else the tokenizers of transformers read.
_BESIDE_TOKENIZER = ("*tokens*.json", "vocab.*", "merges.txt", "*.model", "*chat_template*")


def load_model(
    path: str,
    *,
    dtype: str = "float32",
    param_dtype: str = "float32",
    remat: str = "none",
    quantize: str = "none",
    offload: bool = False,
    mesh: Mesh | None = None,
) -> Model:
    """Loads a causal language model.

    Args:
      path: a folder as `save_pretrained` writes it, the folder of a finished run, a `.gguf` file
        (these also in a bucket), `package:NAME/FILE` for a file inside an installed Python package,
        a hub id such as `openai-community/gpt2`, with a branch, tag or commit as
        `owner/name@revision`, or `synthetic:NAME` for a random model (see `synthetic_model`).
      dtype: what is computed in; param_dtype: what the parameters are kept in.
      remat: key of `decoder.REMAT`.
      quantize: key of `quantization.QUANTIZE`: what the kernels of linear maps are kept in, of a
        model that is not trained.
      offload: whether the layers' kernels lie in the host's memory; wants a mesh.
      mesh: of `sharding.make_mesh`; None for one device. Each process reads what its devices hold.
        Vocabulary, heads or feed-forward width that it does not divide: see `DecoderConfig.padded`.

    Raises:
      ModelError: the folder, a file, a field or a tensor is missing, of another shape, or unknown,
        or a weight is not finite; a kernel has an odd number of inputs, and is to be in int4.
      ConfigError: `offload`, and the devices have no such memory; a mesh that cuts pairs of int4.
    """
    if offload:
        sharding.check_host_memory(f"{path}: offload", mesh)
    how = dict(dtype=dtype, param_dtype=param_dtype, remat=remat, offload=offload)
    if path.startswith(PREFIX):
        return synthetic_model(path, **how, quantize=quantize, mesh=mesh)
    file = resolve_model(path)
    if file.suffix == ".gguf":
        source, tokenizer, card, generation = *_open_gguf(file), {}
    else:
        source = SafetensorsFolder(file, path if repository_of(path) else "")
        tokenizer, generation, card = _tokenizer(file), _generation(file), read_card(file)
    if repository := repository_of(path):
        card = card | {"base_model": repository}
    config = from_hugging_face(source.config, f"{source.path}: config")
    if config.activation not in ACTIVATIONS:
        raise ModelError(
            f"{source.path}: config: activation {config.activation!r} is not supported; "
            f"supported: {', '.join(ACTIVATIONS)}"
        )
    parts = 1 if mesh is None else mesh.shape["tensor"]
    config = config.replace(**how, quantization=QUANTIZE[quantize], tensor_parts=parts)
    check_pairs(config, f"{path}: quantize", mesh)
    hf_config = source.config
    if config.tied and has_head_of_its_own(source, config):
        # As transformers 5 does; the config says so from here on, for whoever reads an export.
        config, hf_config = config.replace(tied=False), {**hf_config, "tie_word_embeddings": False}
        distributed.warn(
            f"{path}: its config ties the head to the embedding, but {HEAD} is another "
            "matrix than the embedding; it is used"
        )
    shardings = None if mesh is None else functools.partial(param_shardings, config, mesh=mesh)
    return Model(
        name=path,
        decoder=Decoder(config),
        params=load_params(source, config, shardings),
        hf_config=hf_config,
        tokenizer=tokenizer,
        eos_ids=_eos_ids(generation, source.config, tokenizer),
        card=card,
    )


def load_tokenizer(path: str) -> Any:
    """Reads the tokenizer of a model as `load_model` does, and nothing else; None if it has none.

    Raises:
      ModelError: as `load_model`.
    """
    if path.startswith(PREFIX):
        return synthetic_tokenizer()
    file = resolve_model(path)
    if file.suffix == ".gguf":
        from promptkd_jax.models.io.gguf import open_gguf
        from promptkd_jax.models.io.gguf_tokenizer import tokenizer_from_gguf

        return tokenizer_from_gguf(open_gguf(str(file)))
    return _tokenizer(file)


def load_without_weights(path: str, **changes: Any) -> Model:
    """Reads a model without `params` (None): its config and its tokenizer are all that is fetched,
    and all that has to be there, as `export.save_without_weights` writes it.

    Args:
      path: as `load_model` takes it.
      changes: of the decoder's config, such as `param_dtype`.

    Raises:
      ModelError: a file is missing or cannot be read.
    """
    if path.startswith(PREFIX):
        hf_config, _ = synthetic_config(path)
        file, tokenizer, generation, card = path, synthetic_tokenizer(), {}, {}
    elif (file := resolve_model(path, weights=False)).suffix == ".gguf":
        source, tokenizer, card = _open_gguf(file)
        hf_config, generation = source.config, {}
    else:
        hf_config = read_json(file / "config.json")
        tokenizer, generation, card = _tokenizer(file), _generation(file), read_card(file)
    config = from_hugging_face(hf_config, f"{file}: config", path).replace(**changes)
    eos_ids = _eos_ids(generation, hf_config, tokenizer)
    return Model(path, Decoder(config), None, hf_config, tokenizer, eos_ids, card)


def training_record(path: str, *, weights: bool = True) -> dict[str, Any]:
    """Reads how a model was asked while it was trained, as the run that made it wrote beside it.

    Args:
      weights: whether these are about to be read, too: from a bucket, all is copied at once.

    Returns:
      The fields `RECORDED` of that run's data; {} where nothing is said.

    Raises:
      ModelError: there is no such model, or the file is no JSON.
    """
    if path.startswith("synthetic:"):
        return {}
    return read_json(resolve_model(path, weights=weights) / RECORD, {})


def _open_gguf(file: pathlib.Path) -> tuple[Any, Any, dict[str, str]]:
    """The file as a source of weights, its tokenizer, and what its card would say."""
    from promptkd_jax.models.io.gguf import open_gguf
    from promptkd_jax.models.io.gguf_tokenizer import tokenizer_from_gguf

    source = open_gguf(str(file))
    licence = source.metadata.get("general.license")
    plain = isinstance(licence, str) and re.fullmatch(PLAIN, licence)
    return source, tokenizer_from_gguf(source), {"license": licence} if plain else {}


def _generation(folder: pathlib.Path) -> dict[str, Any]:
    return read_json(folder / "generation_config.json", {})


def _tokenizer(folder: pathlib.Path) -> Any:
    if not any((folder / file).exists() for file in TOKENIZER_FILES):
        return None
    for pattern in (*TOKENIZER_FILES, *_BESIDE_TOKENIZER):
        for file in filter(pathlib.Path.is_file, folder.glob(pattern)):
            refuse_pointer(file)
    whole = any((folder / file).exists() for file in ("tokenizer.json", "vocab.json"))
    pieces = None if whole else processor(folder)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizers, written in Rust, raises nothing more definite
        raise ModelError(
            f"{folder}: its tokenizer cannot be read: {type(error).__name__}: {error}"
        ) from error
    if pieces is not None:
        check_pieces(folder, tokenizer, pieces)
    return tokenizer


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


def load_with_tokenizer(path: str, *, dtype: str, quantize: str = "none") -> Model:
    """Reads a model, for what reads and writes text, onto the mesh in context.

    Raises:
      ModelError: it cannot be read, or has no tokenizer or EOS.
    """
    mesh = jax.sharding.get_mesh()
    mesh = None if mesh.empty else mesh
    model = load_model(path, dtype=dtype, param_dtype=dtype, quantize=quantize, mesh=mesh)
    check_text(model)
    return model
