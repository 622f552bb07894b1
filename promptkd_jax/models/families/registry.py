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

# A new file of families is registered here.
FAMILIES: dict[str, Family] = {
    family.model_type: family
    for file in (gpt2, opt, llama, mixtral, qwen, gemma, gpt_oss, granite, olmo, phi, smollm3)
    for family in file.FAMILIES
}
PUBLISHED: dict[str, dict[str, Any]] = {
    name: config for family in FAMILIES.values() for name, config in family.published.items()
}


def from_hugging_face(config: Mapping[str, Any], source: str = "config.json") -> DecoderConfig:
    """Reads a `config.json`. Raises ModelError for what the decoder does not compute."""
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ModelError(
            f"{source}: model_type {kind!r} is not supported; supported: {', '.join(FAMILIES)}"
        )
    _refuse_quantised(config, source)
    try:
        return FAMILIES[kind].read(config, source)
    except KeyError as error:
        raise ModelError(f"{source}: a {kind} config needs the field {error}") from error


def _refuse_quantised(config: Mapping[str, Any], source: str) -> None:
    settings = config.get("quantization_config") or config.get("quantization")  # the latter: MLX
    if not settings:
        return
    method = settings
    if isinstance(settings, Mapping):
        older = [settings[key] for key in ("load_in_4bit", "load_in_8bit") if key in settings]
        method = settings.get("quant_method") or settings.get("mode")
        if older and not method:  # of bitsandbytes before it had a name
            if not any(older):
                return
            method = "bitsandbytes"
        method = method or settings
    raise ModelError(
        f"{source}: the weights are quantised ({method}); only plain ones in floating "
        "point are read: take the model that these were made from, or, for bitsandbytes and FP8, "
        "write them anew with transformers' model.dequantize() and save_pretrained (if they are "
        "plain already, remove the field)"
    )
