"""All families, by the `model_type` of their `config.json`."""

from collections.abc import Mapping
from typing import Any

from promptkd_jax.infra.errors import ModelError
from promptkd_jax.models.config import DecoderConfig
from promptkd_jax.models.families import (
    gemma,
    gpt2,
    gpt_oss,
    granite,
    llama,
    mixtral,
    olmo,
    opt,
    phi,
    qwen,
    smollm3,
)
from promptkd_jax.models.families.base import Family
from promptkd_jax.models.families.quantised import read_quantisation

# A new file of families is registered here.
FAMILIES: dict[str, Family] = {
    family.model_type: family
    for file in (gpt2, opt, llama, mixtral, qwen, gemma, gpt_oss, granite, olmo, phi, smollm3)
    for family in file.FAMILIES
}
PUBLISHED: dict[str, dict[str, Any]] = {
    name: config for family in FAMILIES.values() for name, config in family.published.items()
}


def from_hugging_face(
    config: Mapping[str, Any], source: str = "config.json", model: str = "MODEL"
) -> DecoderConfig:
    """Reads a `config.json`.

    Args:
      source, model: what messages call the config, and the model to convert.

    Raises:
      ModelError: for what the decoder does not compute, and quantised weights.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ModelError(
            f"{source}: model_type {kind!r} is not supported; supported: {', '.join(FAMILIES)}"
        )
    if quantisation := read_quantisation(config):
        raise ModelError(f"{source}: {quantisation.fault(model)}")
    try:
        return FAMILIES[kind].read(config, source)
    except KeyError as error:
        raise ModelError(f"{source}: a {kind} config needs the field {error}") from error
