"""How the weights of a model are quantised, as its `config.json` says."""

import re
import shlex
from collections.abc import Mapping
from typing import Any, NamedTuple

CONFIG_KEYS = ("quantization_config", "quantization")  # the latter: MLX
# Methods of which `promptkd convert` reads all that there is, and those of which it depends.
_READ = ("fp8", "fbgemm_fp8", "mxfp4")
_MODELOPT_READ = "FP8"


class Quantisation(NamedTuple):
    """A method of quantisation: what messages call it, and whether `promptkd convert` reads it."""

    name: str
    is_read: bool
    block: tuple[int, ...] = ()  # rows and columns that share a scale, where the config says them

    def fault(self, model: str) -> str:
        """Why a model in such weights cannot be used, and the remedy."""
        text = (
            f"the weights are quantised ({self.name}); only plain ones in floating point are read"
        )
        if self.is_read:
            return f"{text}: write them in bfloat16 first, by\n  {convert_command(model)}"
        return (
            f"{text}: take the model that these were made from (if they are plain already, remove "
            "the field)"
        )


def convert_command(model: str, output: str = "converted") -> str:
    """The command that writes a model anew as a folder that is read, for messages."""
    return f"promptkd convert --model {shlex.quote(model)} --output {output}"


def read_quantisation(config: Mapping[str, Any]) -> Quantisation | None:
    """Reads the field of a `config.json` on how its weights are quantised; None if they are not."""
    settings = next((config[key] for key in CONFIG_KEYS if config.get(key)), None)
    if not settings:
        return None
    if not isinstance(settings, Mapping):
        return Quantisation(str(settings), False)
    older = [settings[key] for key in ("load_in_4bit", "load_in_8bit") if key in settings]
    method = settings.get("quant_method") or settings.get("mode")
    if older and not method:  # of bitsandbytes before it had a name
        if not any(older):
            return None
        method = "bitsandbytes"
    if method == "compressed-tensors":
        return _compressed_tensors(settings)
    if method == "modelopt":
        kind = settings.get("quant_algo")
        return Quantisation(f"modelopt {kind}", kind == _MODELOPT_READ)
    bits = settings.get("bits") or ("4" if settings.get("load_in_4bit") else "")
    bits = bits or ("8" if settings.get("load_in_8bit") else "")
    name = f"{method}, {bits} bits" if bits else str(method or settings)
    return Quantisation(name, method in _READ, tuple(settings.get("weight_block_size") or ()))


def _compressed_tensors(settings: Mapping[str, Any]) -> Quantisation:
    groups = settings.get("config_groups") or {}
    weights = [group["weights"] for group in groups.values() if group.get("weights")]
    kinds = {(how.get("type"), how.get("num_bits")) for how in weights}
    bits = ", ".join(sorted(f"{kind} of {count} bits" for kind, count in kinds))
    name = " ".join(filter(None, ("compressed-tensors", settings.get("format"), bits)))
    blocks = {str(how.get("block_structure") or "") for how in weights} - {""}
    block = re.findall(r"\d+", blocks.pop()) if len(blocks) == 1 else ()
    return Quantisation(name, kinds == {("float", 8)}, tuple(map(int, block)))
