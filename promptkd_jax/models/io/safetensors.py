"""The weights of a `save_pretrained` folder. What is none is refused by its name: adapters,
quantised weights, pickles, pointers of Git LFS.
"""

import json
import pathlib
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors
from etils import epath

from promptkd_jax.infra.errors import ModelError
from promptkd_jax.models.families.quantised import Quantisation, convert_command
from promptkd_jax.models.families.registry import from_hugging_face

# Configs, tokenizers, templates and card; which files hold the weights is seen from these.
SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "README.md")
CARD_KEYS = ("base_model", "license")
FLOAT8 = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}
FLOAT8 |= {"F8_E8M0": ml_dtypes.float8_e8m0fnu}  # powers of two: scales
_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_DTYPES |= {f"I{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)}
_DTYPES |= {f"U{bits}": np.dtype(f"u{bits // 8}") for bits in (8, 16, 32, 64)}
_DTYPES |= {"BOOL": np.bool_, **FLOAT8}
SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
PLAIN = r"\w[\w./@+-]*"  # a scalar that YAML reads as it stands
_POINTER = b"version https://git-lfs.github.com/spec/"

# Tensors that only files of another kind have.
_OF_OTHER_KINDS = {
    r".+\.(qweight|qzeros|g_idx)": "quantised by GPTQ or AWQ",
    r".+\.weight_packed": "quantised by compressed-tensors",
    r".+\.(absmax|quant_map|SCB|weight_format)|.+\.quant_state\..+": "quantised by bitsandbytes",
    r".+\.(scales|biases)": "quantised by MLX",
    r".+\.lora_[AB]\..+": "those of a PEFT adapter",
}
# Those that `convert` reads.
_SCALED = {
    r".+\.(weight_scale|weight_scale_inv|input_scale)": "FP8",
    r".+_blocks": "MXFP4",
}
# Where weights are that nothing here reads.
_UNREAD = ("pytorch_model*.bin", "consolidated*.pth", "tf_model.h5", "flax_model.msgpack")


class SafetensorsFolder:
    """The weights of a folder: `model.safetensors`, or shards with their index.

    Args:
      name: what the model was asked for by, for the remedies of messages; by default the folder.
      scaled: whether weights in FP8 or MXFP4 are read, too, as they are stored.

    Raises:
      ModelError: a folder of another kind, or a file of it that is missing, damaged, or contradicts
        another one.
    """

    def __init__(self, folder: pathlib.Path, name: str = "", *, scaled: bool = False):
        self.path, name = str(folder), name or str(folder)
        self._stored: dict[str, _Stored] = {}
        self._where = where = {}
        files = listed_files(folder) if scaled else weight_files(folder, name)
        self.config = read_json(folder / "config.json")
        # Only headers are read here: a file is mapped into memory, and of it a slice of a tensor is
        # read when `read` asks for it.
        for file in files:
            opened, stored = _open(folder / file, name), _mapped(folder / file)
            for tensor in opened.keys():  # noqa: SIM118
                if tensor in where:
                    raise ModelError(
                        f"{self.path}: tensor {tensor} is in {where[tensor]} and in {file}; which "
                        "of them is meant cannot be seen: get the model's files again"
                    )
                self._stored[tensor], where[tensor] = stored[tensor], file
        _refuse_other_kinds(self.path, self._stored, None if scaled else name)

    def names(self) -> list[str]:
        """All tensor names of all files."""
        return list(self._stored)

    def file_of(self, name: str) -> str:
        """The name of the file that holds a tensor."""
        return self._where[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """The stored shape."""
        return self._stored[name].shape

    def dtype(self, name: str) -> str:
        """The stored dtype, as safetensors calls it: "BF16"."""
        return self._stored[name].dtype

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """The tensor, or the part at `index`, in its stored dtype (those of `ml_dtypes` too): where
        it lies in its file, so that it cannot be written, and may be unaligned.

        Raises:
          ModelError: a dtype that no weights have.
        """
        stored = self._stored[name]
        if stored.dtype not in _DTYPES:
            raise ModelError(f"{self.path}: tensor {name}: dtype {stored.dtype} is not read")
        return stored.data.view(_DTYPES[stored.dtype]).reshape(stored.shape)[index or ...]


class _Stored(NamedTuple):
    """A tensor in a file that is mapped into memory: its dtype as safetensors calls it, its shape,
    its bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray


def _mapped(file: pathlib.Path) -> dict[str, _Stored]:
    """The tensors of a file that safetensors has checked. The library itself would copy each, and
    have NumPy name dtypes that only `ml_dtypes` knows."""
    content = np.asarray(np.memmap(file, np.uint8, "r"))
    # https://huggingface.co/docs/safetensors: the header's size, the header, the tensors.
    begin = 8 + int.from_bytes(content[:8].tobytes(), "little")
    header = json.loads(content[8:begin].tobytes())
    header.pop("__metadata__", None)
    return {
        name: _Stored(
            one["dtype"],
            tuple(one["shape"]),
            content[slice(*(begin + offset for offset in one["data_offsets"]))],
        )
        for name, one in header.items()
    }


def weight_files(folder: pathlib.Path, name: str = "") -> list[str]:
    """The names of the files that hold a folder's weights, which need not be there yet.

    As `transformers` reads it: where there is `model.safetensors`, it holds all, and no index is
    looked at.

    Args:
      name: as `SafetensorsFolder` takes it.

    Raises:
      ModelError: no config of a supported model in plain weights; a PEFT adapter; or an index that
        names no files.
    """
    name = name or str(folder)
    _refuse_adapter(folder, name)
    from_hugging_face(read_json(folder / "config.json"), f"{folder}: config", name)
    return listed_files(folder)


def has_weights(folder: epath.Path) -> bool:
    """Whether a folder holds every file of weights that it should."""
    return all((folder / file).exists() for file in listed_files(folder))


def listed_files(folder: pathlib.Path) -> list[str]:
    """The files of weights that a folder's index names, or the one that needs none.

    Raises:
      ModelError: the index names no files.
    """
    index = folder / _INDEX
    if (folder / SINGLE).exists() or not index.exists():
        return [SINGLE]
    found = read_json(index).get("weight_map")
    names = found.values() if isinstance(found, dict) else ()
    if not names or not all(re.fullmatch(r"[\w.-]+\.safetensors", str(name)) for name in names):
        raise ModelError(
            f"{index}: has no weight_map, an object of tensor names and the files that they are "
            "in; get the file again, or write the folder anew with save_pretrained"
        )
    return sorted(set(names))


def read_json(file: pathlib.Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """The object that a JSON file holds; `default`, where one is given, if there is no file.

    Raises:
      ModelError: it is missing, a pointer of Git LFS, or not a JSON object.
    """
    if not file.exists():
        if default is None:
            raise ModelError(f"{file}: no such file")
        return default
    refuse_pointer(file)
    try:
        found = json.loads(file.read_bytes())
    except json.JSONDecodeError as error:
        raise ModelError(f"{file}:{error.lineno}: not JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise ModelError(f"{file}: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{file}: holds a {type(found).__name__}; expected an object, {{…}}")
    return found


def read_card(folder: pathlib.Path) -> dict[str, str]:
    """The `CARD_KEYS` that the README.md of a model gives; {} where there are none.

    Its front matter is YAML, of which only plain scalars are taken, no lists.
    """
    file = folder / "README.md"
    text = file.read_bytes().decode(errors="replace") if file.exists() else ""
    front = re.match(r"---\r?\n(.*?)\n---", text, re.DOTALL)
    scalar = rf"^(\w+): +(['\"]?)({PLAIN})\2[ \t\r]*(?: #.*)?$"
    lines = re.findall(scalar, front[1], re.MULTILINE) if front else []
    return {key: value for key, _, value in lines if key in CARD_KEYS}


def refuse_pointer(file: pathlib.Path) -> None:
    """Raises ModelError for what Git LFS leaves in place of a file that it has not fetched."""
    with file.open("rb") as opened:
        if opened.read(len(_POINTER)) == _POINTER:
            raise ModelError(
                f"{file}: is a Git LFS pointer, not the file itself; fetch it: git lfs pull, in "
                "that folder"
            )


def _open(file: pathlib.Path, model: str):
    if not file.exists():
        raise ModelError(_absent(file, model))
    refuse_pointer(file)
    try:
        return safetensors.safe_open(file, framework="np")
    except safetensors.SafetensorError as error:
        raise ModelError(f"{file}: damaged or truncated: {error}") from error


def _absent(file: pathlib.Path, model: str) -> str:
    """Why there is no such file of weights, and the remedy."""
    folder = file.parent
    text = f"{file}: no such file (weights are read from safetensors only)"
    if unread := sorted(x.name for pattern in _UNREAD for x in folder.glob(pattern)):
        text += f"; there is {', '.join(unread[:3])}"
    if gguf := sorted(folder.glob("*.gguf")):
        return f"{text}; there is {gguf[0].name}: give that file itself as the model"
    if file.name != SINGLE:
        return f"{text}, which the index lists: get the model's files again"
    return (
        f"{text}. Files pytorch_model*.bin are converted, where torch is installed, by\n"
        f"  {convert_command(model)}\n"
        "Else take a revision that has them, OWNER/NAME@REVISION (on the hub that may be a pull "
        "request of its converter, refs/pr/1), or what transformers' save_pretrained writes"
    )


def _refuse_adapter(folder: pathlib.Path, model: str) -> None:
    # transformers, too, takes such a folder for an adapter, whatever else it holds.
    file = folder / "adapter_config.json"
    if not file.exists():
        return
    adapter = read_json(file)
    kind, base = adapter.get("peft_type"), adapter.get("base_model_name_or_path")
    if kind == "PROMPT_TUNING":
        remedy = soft_prompt_use(str(base))
    else:
        remedy = f"merge it into its base model ({base}) first: {convert_command(model, 'merged')}"
    raise ModelError(f"{folder}: is a PEFT adapter ({kind}), not a model; {remedy}")


def soft_prompt_use(base: str) -> str:
    """How a prompt-tuning adapter is used, for messages."""
    return (
        f"it is a soft prompt for {base}: vectors in front of a row's tokens, which no weights can "
        "hold; load_soft_prompt reads it, and peft.PeftModel.from_pretrained puts it before that "
        "model"
    )


def _refuse_other_kinds(path: str, names: Iterable[str], model: str | None) -> None:
    """Raises ModelError for tensors that no plain weights have; those of `_SCALED` where `model`
    says how to name them to `convert`."""
    for name in names:
        for pattern, kind in _OF_OTHER_KINDS.items():
            if re.fullmatch(pattern, name):
                raise ModelError(
                    f"{path}: tensor {name}: the weights are {kind}; only plain ones in floating "
                    "point are read: take the model that these were made from"
                )
        for pattern, kind in _SCALED.items() if model else ():
            if re.fullmatch(pattern, name):
                fault = Quantisation(kind, is_read=True).fault(model)
                raise ModelError(f"{path}: tensor {name}: {fault}")
