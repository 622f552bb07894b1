"""The layout in which llama.cpp stores a family, and pieces that several share.

A GGUF file says what a model is by settings (`llama.rope.freq_base`), and by small tensors of
factors that divide rotary frequencies. A layout reads them into fields of `config.json`, and writes
them for a `DecoderConfig`.

Source: llama.cpp's converter (conversion/) and the files that load its models (src/models/).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from promptkd_jax.infra.errors import GGUFError
from promptkd_jax.models.config import DecoderConfig, Rope, RopeScaling
from promptkd_jax.models.layers.rotary import rotary_frequencies, rotary_width

ROPE_FREQS = "rope_freqs.weight"
_ORIGINAL_LENGTH = "rope.scaling.original_context_length"
_TURNED = "rope.dimension_count"
# Of all layouts; by themselves they say nothing that a model computes.
_HARMLESS = ("rope.scaling.finetuned", _ORIGINAL_LENGTH, "tensor_data_layout", "vocab_size")


class Settings:
    """The settings and factors of a file. Each that is not asked for is left over.

    Args:
      path: of the file, for messages.
      architecture: the prefix of all settings.
      metadata: all keys and values of the file.
      factors: small tensors of factors, by their names.
    """

    def __init__(
        self,
        path: str,
        architecture: str,
        metadata: Mapping[str, Any],
        factors: Mapping[str, np.ndarray],
    ):
        self.path, self.prefix = path, f"{architecture}."
        self._metadata, self._factors = metadata, factors
        self._asked = set(_HARMLESS)

    def __call__(self, name: str, default: Any = None) -> Any:
        """The value of a setting.

        Raises:
          GGUFError: there is none, and no default.
        """
        self._asked.add(name)
        value = self._metadata.get(self.prefix + name, default)
        if value is None:
            raise GGUFError(
                f"{self.path}: no metadata {self.prefix}{name}, which a {self.prefix[:-1]} needs"
            )
        # Floats are stored as float32: 1e-5 would come out as 9.999999747378752e-06.
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def factors(self, name: str) -> np.ndarray | None:
        """The factors of that name, if the file has them."""
        self._asked.add(name)
        return self._factors.get(name)

    def refuse_others(self) -> None:
        """Raises GGUFError for what nobody asked for, unless it is switched off: 0 or false."""
        for key, value in self._metadata.items():
            name = key.removeprefix(self.prefix)
            if name != key and name not in self._asked and value:
                raise GGUFError(
                    f"{self.path}: {key} = {value!r} is not supported: the model is not a plain "
                    f"{self.prefix[:-1]}, or the key is new; understood are "
                    f"{self.prefix}* with {', '.join(sorted(self._asked))}"
                )
        if left := [name for name in self._factors if name not in self._asked]:
            raise GGUFError(f"{self.path}: a plain {self.prefix[:-1]} has no {left[0]}")


# Settings that the file of every decoder with rotary positions has, by the field of config.json
# that says the same.
FIELDS = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "feed_forward_length": "intermediate_size",
    "context_length": "max_position_embeddings",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
# The settings of any family, by the field of `DecoderConfig` that says the same.
SIZES = {
    "embedding_length": "width",
    "block_count": "num_layers",
    "attention.head_count": "num_heads",
    "feed_forward_length": "mlp_width",
    "context_length": "max_positions",
    "attention.layer_norm_rms_epsilon": "norm_eps",
    "attention.layer_norm_epsilon": "norm_eps",
}


def rotary_fields(settings: Settings, *, partial: bool = False) -> dict[str, Any]:
    """Reads heads and rotary positions.

    Args:
      partial: whether a part of a head may turn.

    Raises:
      GGUFError: heads of other widths, or a stretching that is not read.
    """
    num_heads = settings("attention.head_count")
    head_dim = settings("attention.key_length", settings("embedding_length") // num_heads)
    fields = {
        "num_key_value_heads": settings("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "rope_theta": settings("rope.freq_base", 10000.0),
    }
    widths = {key: settings(key, head_dim) for key in ("attention.value_length", _TURNED)}
    if partial:
        fields["partial_rotary_factor"] = widths.pop(_TURNED) / head_dim
    for key, width in widths.items():
        if width != head_dim:
            raise GGUFError(
                f"{settings.path}: {settings.prefix}{key} = {width}; only the head width, "
                f"{head_dim}, is supported"
            )
    kind, factor = settings("rope.scaling.type", "none"), settings("rope.scaling.factor", 1.0)
    if kind not in ("none", "linear"):
        raise GGUFError(
            f"{settings.path}: {settings.prefix}rope.scaling.type = {kind!r}; supported are 'none' "
            "and 'linear'"
        )
    if factor != 1.0:
        fields["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    return fields


def rotary_settings(config: DecoderConfig) -> dict[str, Any]:
    """The settings that `rotary_fields` reads; of layers with a window, others may hold."""
    rope = config.rope or Rope()
    settings = {
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        _TURNED: rotary_width(rope, config.head_dim),
        "rope.freq_base": rope.theta,
    }
    if rope.scaling and rope.scaling.kind == "linear":
        settings |= {"rope.scaling.type": "linear", "rope.scaling.factor": rope.scaling.factor}
    return settings


def llama_fields(settings: Settings) -> dict[str, Any]:
    """Reads `rotary_fields`, and the stretching of Llama 3 from its factors: back to the four
    numbers they were computed from, all but one known."""
    fields, stored = rotary_fields(settings), settings.factors(ROPE_FREQS)
    length = settings(_ORIGINAL_LENGTH, 8192)
    if stored is None:
        return fields
    if "rope_scaling" in fields:
        raise GGUFError(
            f"{settings.path}: {settings.prefix}rope.scaling.type = 'linear' with {ROPE_FREQS}; "
            "supported is one of them"
        )
    factor = float(stored[-1])  # the longest wave is stretched by the full factor
    scaling = RopeScaling("llama3", factor, original_max_position=length)
    expected = _divisors(Rope(fields["rope_theta"], scaling), fields["head_dim"])
    fields["rope_scaling"] = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": length,
    }
    if stored.shape != expected.shape or not np.allclose(stored, expected, rtol=1e-3):
        raise GGUFError(
            f"{settings.path}: {ROPE_FREQS} does not follow from {fields['rope_scaling']} with "
            f"rope_theta {fields['rope_theta']}: found {stored.tolist()}, expected "
            f"{expected.tolist()}"
        )
    return fields


def llama_settings(config: DecoderConfig) -> dict[str, Any]:
    """The settings that `llama_fields` reads."""
    settings = rotary_settings(config)
    if scaling := _llama3_scaling(config):
        settings[_ORIGINAL_LENGTH] = scaling.original_max_position
    return settings


def llama_factors(config: DecoderConfig) -> dict[str, np.ndarray]:
    """The factors that `llama_fields` reads: by what each frequency is divided, `[H/2]`."""
    if not _llama3_scaling(config):
        return {}
    return {ROPE_FREQS: _divisors(config.kind(0).rope, config.head_dim)}


def _llama3_scaling(config: DecoderConfig) -> RopeScaling | None:
    scaling = config.kind(0).rope and config.kind(0).rope.scaling
    return scaling if scaling and scaling.kind == "llama3" else None


def _divisors(rope: Rope, head_dim: int) -> np.ndarray:
    length = rope.scaling.original_max_position
    plain = dataclasses.replace(rope, scaling=None)
    plain, stretched = (rotary_frequencies(x, head_dim, length, length) for x in (plain, rope))
    return np.asarray(plain / stretched, np.float32)


def layer_names(
    rows: Mapping[str, str], stem: str = "model.layers.{}", kinds: tuple[str, ...] = ("weight",)
) -> dict[str, str]:
    """The names of the tensors of a layer, by their middle parts."""
    return {
        f"blk.{{}}.{theirs}.{kind}": f"{stem}.{ours}.{kind}"
        for theirs, ours in rows.items()
        for kind in kinds
    }


@dataclasses.dataclass(frozen=True)
class GGUFLayout:
    """The layout in which llama.cpp stores a family.

    Attributes:
      architecture: `general.architecture` of the file, and the prefix of its settings.
      names: GGUF name -> Hugging Face name; `{}` is the layer in both.
      fields: setting -> field of `config.json`; a file must have them.
      constants: the fields of `config.json` that are the same in all files.
      read: the fields of `config.json` that the other settings and the factors say.
      write: the settings that a model has beside `fields`.
      factors: the factors that a model has.
      rotary_pairs: ending of a Hugging Face name -> field that has its number of heads, of the
        tensors whose rows llama.cpp's converter permutes.
      transposed: endings of the Hugging Face names of matrices that are [in, out] there.
      norm_offset: the number that files add to the scales of norms.
    """

    architecture: str
    names: Mapping[str, str]
    fields: Mapping[str, str] = dataclasses.field(default_factory=lambda: FIELDS)
    constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    read: Callable[[Settings], dict[str, Any]] = rotary_fields
    write: Callable[[DecoderConfig], dict[str, Any]] = rotary_settings
    factors: Callable[[DecoderConfig], dict[str, np.ndarray]] = lambda config: {}
    rotary_pairs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    transposed: tuple[str, ...] = ()
    norm_offset: float = 0.0
