"""Flags that commands share, and how a flag is read: checked as a field of a config is.

A value that cannot be used is refused by `argparse` before anything is loaded; the message names
the flag.
"""

import argparse
import ast
import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from etils import epath

from promptkd_jax.data.reading.formats import FORMATS
from promptkd_jax.data.rows import LONG_PROMPTS
from promptkd_jax.data.templates import TEMPLATES, read_chat_template
from promptkd_jax.infra import sharding
from promptkd_jax.infra.errors import ConfigError, ModelError
from promptkd_jax.infra.files import Path, io_errors, to_path
from promptkd_jax.infra.specs import SEED, Float, Int, declared
from promptkd_jax.models.layers.quantization import QUANTIZE
from promptkd_jax.models.load import RECORD, RECORDED, load_with_tokenizer, training_record
from promptkd_jax.models.model import Model
from promptkd_jax.models.sampling_rules import Sampling
from promptkd_jax.training.config.field_specs import DTYPE
from promptkd_jax.training.config.fields import DataConfig

_KINDS = {Int: int, Float: float}  # of the values of a spec; those of all others are text


def of(spec: Any) -> Callable[[str], Any]:
    """The `type` of a flag whose value is what a spec of `specs` says, such as `Int(low=1)`."""
    kind = _KINDS.get(type(spec), str)

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = text
        if fault := spec.fault(value):
            right = fault if kind is str else spec
            raise argparse.ArgumentTypeError(f"{text!r} is not {right}")
        return value

    return read


def path(text: str) -> epath.Path:
    """The `type` of a flag for a file or folder, of a disk or of a bucket."""
    return to_path(of(Path(nonempty=True))(text))


def disk_path(text: str) -> epath.Path:
    """The `type` of a flag for a file or folder that must not be in a bucket."""
    return to_path(of(Path(nonempty=True, bucket=False))(text))


@contextlib.contextmanager
def naming(option: str, folder: epath.Path) -> Iterator[None]:
    """Names the option whose file or folder cannot be read or written.

    Raises:
      ConfigError: in place of what the disk or the bucket raises.
    """
    try:
        yield
    except io_errors(folder) as error:
        raise ConfigError(f"{option} {folder}: {error}") from error


def check_empty(folder: epath.Path) -> None:
    """Raises ModelError for a folder that a model is to be written into and that has files."""
    if folder.exists() and not folder.is_dir():
        raise ModelError(f"{folder}: is a file; a model is written into a folder")
    found = sorted(file.name for file in folder.iterdir()) if folder.exists() else []
    if found:
        what = "a model" if "config.json" in found else "files"
        raise ModelError(
            f"{folder}: holds {what} already ({', '.join(found[:5])}{', …' * (len(found) > 5)}); "
            "give a folder that is new or empty"
        )


source = of(Path(nonempty=True))  # the `type` of a flag that names a model or data


def _named_values(field: str) -> Callable[[str], dict[str, Any]]:
    """The `type` of a flag for an object of JSON, which may be what this field of data may be."""
    spec = declared(DataConfig)[field].metadata["spec"]

    def read(text: str) -> dict[str, Any]:
        try:
            value = json.loads(text)
        except ValueError as error:
            try:  # as a config says it
                value = ast.literal_eval(text)
            except (ValueError, SyntaxError):
                raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from error
        if fault := "JSON of " + str(spec) if not isinstance(value, dict) else spec.fault(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {fault}")
        return value

    return read


def _add_bos(text: str) -> bool | str:
    return {"true": True, "false": False}.get(text, text)


def add_asking(
    parser: argparse.ArgumentParser,
    *,
    several: bool = False,
    temperature: float,
    no_repeat_ngram_size: int,
) -> None:
    """The flags of `add_model` and `add_prompting`, --dtype, --quantize and --mesh, and the fields
    of `Sampling`, for `sampling_of`, with these defaults."""
    add_model(parser, several=several)
    add_prompting(parser)
    text = "what is computed in (default: float32)"
    parser.add_argument("--dtype", default="float32", choices=DTYPE.options, help=text)
    text = "bits of kernels (default: none, they are in --dtype)"
    parser.add_argument("--quantize", default="none", choices=QUANTIZE, help=text)
    add_mesh(parser)
    chosen = Sampling(temperature=temperature, no_repeat_ngram_size=no_repeat_ngram_size)
    for name, f in declared(Sampling).items():
        default, flag = getattr(chosen, name), f"--{name.replace('_', '-')}"
        text = f"{f.metadata['help']} (default: {default:g})"
        parser.add_argument(flag, type=of(f.metadata["spec"]), default=default, help=text)


def add_model(
    parser: argparse.ArgumentParser,
    flag: str = "--model",
    *,
    required: bool = True,
    several: bool = False,
) -> None:
    """The flag of a model, or `several`."""
    text = "folder (also that of a run), .gguf file, or hub id"
    how = dict(nargs="+", action=Different) if several else {}
    parser.add_argument(flag, required=required, type=source, help=text, **how)


def add_prompting(parser: argparse.ArgumentParser) -> None:
    """The flags of how a model's prompts are made, for `data_config`: --template and what belongs
    to it, --max-prompt-length and --long-prompts."""
    text = "how the model is asked (default: as it was trained, else the tokenizer's chat template)"
    parser.add_argument("--template", choices=sorted(TEMPLATES), help=text)
    text = "system turn where a prompt has none (default: as in the training)"
    parser.add_argument("--system", help=text)
    text = 'what the chat template is given, such as {"enable_thinking": false}'
    named = dict(type=_named_values("chat_template_kwargs"), metavar="JSON")
    parser.add_argument("--chat-template-kwargs", help=text, **named)
    text = "file of Jinja text in place of the tokenizer's chat template"
    parser.add_argument("--chat-template", type=path, metavar="FILE", help=text)
    text = "whether other templates than 'chat' begin with the BOS (default: as in the training)"
    choices = dict(type=_add_bos, choices=("auto", True, False))
    parser.add_argument("--add-bos", help=text, metavar="{auto,true,false}", **choices)
    text = "tokens (default: that of the training, else 256)"
    parser.add_argument("--max-prompt-length", type=of(Int(low=1)), help=text)
    text = "what becomes of longer prompts (default: as in the training, else drop)"
    parser.add_argument("--long-prompts", choices=sorted(LONG_PROMPTS), help=text)


def add_reading(parser: argparse.ArgumentParser) -> None:
    """--format and --columns: how records are written in the data, as the fields of a config."""
    text = "of the records (default: auto, told by their fields)"
    parser.add_argument("--format", default="auto", choices=("auto", *FORMATS), help=text)
    text = 'the data\'s names of fields by those of the format, such as {"prompt": "query"}'
    named = dict(type=_named_values("columns"), metavar="JSON")
    parser.add_argument("--columns", default={}, help=text, **named)


def recorded(model: str, *, weights: bool = True) -> dict[str, Any]:
    """Reads and checks how a model was asked while it was trained, see `load.training_record`.

    Raises:
      ModelError: it says what cannot be.
    """
    said, specs = training_record(model, weights=weights), declared(DataConfig)
    record = {name: said[name] for name in RECORDED if name in said}
    for name, value in record.items():
        if fault := specs[name].metadata["spec"].fault(value):
            raise ModelError(f"{model}: {RECORD}: {name}: {value!r} is not {fault}")
    return record


def load(options: argparse.Namespace, path: str, *, dtype: str | None = None) -> Model:
    """Loads a model with its tokenizer, computed in `dtype`, or that of --dtype, in the bits of
    --quantize, and with the chat template of --chat-template where it is given."""
    model = load_with_tokenizer(path, dtype=dtype or options.dtype, quantize=options.quantize)
    if options.chat_template is not None:
        model.tokenizer.chat_template = read_chat_template(options.chat_template)
    return model


def data_config(
    path: str, options: argparse.Namespace, load: Callable[[], Model], *, weights: bool = True
) -> tuple[DataConfig, str]:
    """Chooses how a model is asked: as the user says, else as in its training, else by its
    tokenizer's own chat template.

    Args:
      path: of the model; load: loads it, called where its tokenizer has to be asked.
      weights: whether its weights will be read, which else are not fetched.

    Returns:
      The fields of `load.RECORDED`, with a chat template that is given, and why this template.

    Raises:
      ConfigError: nothing tells which template.
      ModelError: what was recorded of its training cannot be.
    """
    record = recorded(path, weights=weights)
    given = {name: getattr(options, name, None) for name in RECORDED}
    given = {name: value for name, value in given.items() if value is not None}
    if options.chat_template is not None:
        given["chat_template"] = str(options.chat_template)
    if "template" in given:
        why = "as given"
    elif "chat_template" in given:
        given["template"] = "chat"
        why = f"that of {options.chat_template}"
    elif "template" in record:
        why = "that of the training"
    elif load().tokenizer.chat_template:
        given["template"] = "chat"
        why = f"the tokenizer's own, since no {RECORD} says how the model was trained"
    else:
        raise ConfigError(
            f"--template: {path} does not say which one it was trained with (no {RECORD} says "
            f"it), and its tokenizer has no chat template; give one of {', '.join(TEMPLATES)}"
        )
    return DataConfig(**record | given), why


def sampling_of(options: argparse.Namespace, eos_ids: tuple[int, ...]) -> Sampling:
    """Reads the fields of `Sampling` from the flags of `add_asking`."""
    named = {name: getattr(options, name) for name in declared(Sampling)}
    return Sampling(**named, eos_ids=eos_ids)


class Different(argparse.Action):
    """The `action` of a flag whose values have to differ."""

    def __call__(self, parser, namespace, values, option_string=None):
        if len(set(values)) < len(values):
            raise argparse.ArgumentError(self, f"{values} has one of them twice")
        setattr(namespace, self.dest, values)


def add_seeds(parser: argparse.ArgumentParser, default: Sequence[int]) -> None:
    """--seeds: different ones, with each of which all rows are answered."""
    text = f"all rows are answered once with each (default: {' '.join(map(str, default))})"
    how = dict(type=of(SEED), nargs="+", action=Different, metavar="SEED")
    parser.add_argument("--seeds", default=list(default), help=text, **how)


def add_mesh(parser: argparse.ArgumentParser) -> None:
    """--mesh of commands without a config, for `mesh_of`."""
    text = "data,fsdp,tensor; -1 for the rest; such as --mesh=1,-1,1 (default: --mesh=-1,1,1)"
    parser.add_argument("--mesh", default="-1,1,1", help=text)


def mesh_of(options: argparse.Namespace) -> jax.sharding.Mesh:
    """The mesh of --mesh, over all devices. Raises ConfigError where they do not make it."""
    return sharding.make_mesh(sharding.parse_sizes(options.mesh), name="--mesh")


def add_processes(parser: argparse.ArgumentParser) -> None:
    """The flags of `distributed.session`."""
    group = parser.add_argument_group(
        "many processes", "Found by themselves on Slurm, Cloud TPU (GCE, GKE) and under Open MPI."
    )
    count, number = of(Int(low=1)), of(Int(low=0))
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    group.add_argument("--processes", type=count, help="how many there are")
    group.add_argument("--process", type=number, help="which of them this is, from 0")
    seconds = dict(type=count, metavar="SECONDS")
    group.add_argument("--start-timeout", default=50, help="for all to come together", **seconds)
    group.add_argument("--heartbeat", default=60, help="until a silent one is dead", **seconds)
