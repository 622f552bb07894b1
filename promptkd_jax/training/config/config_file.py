"""The config of a run: read from a Python file, overridden from the command line, checked once.

`ml_collections.config_flags` stops at the first wrong override and knows nothing of what a value
may be. Here the file is imported and the overrides are set on the `ConfigDict` itself, right or
wrong, so that `checks` tells all mistakes at once, each with its path and what would be right.
"""

import ast
import dataclasses
import errno
import hashlib
import inspect
import json
import os
import re
import types
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from promptkd_jax.infra import distributed
from promptkd_jax.infra.errors import ConfigError
from promptkd_jax.infra.files import (
    GCS_EXTRA,
    LOCK,
    address_fault,
    io_errors,
    is_remote,
    make_folder,
    read_text,
    to_path,
    write_json,
)
from promptkd_jax.infra.provenance import INPUTS
from promptkd_jax.infra.specs import Group, declared, mistakes, with_defaults
from promptkd_jax.training.config.fields import RENAMED, RunConfig


def load_config(
    argv: Sequence[str], faults: list[str] | None = None, *, cls: type | None = None
) -> tuple[ConfigDict, list[str]]:
    """Reads `--config=FILE[:arg]` and applies every `--config.a.b[0].c=VALUE`, in order.

    FILE defines `get_config()` or `get_config(arg)`, or is the `config.json` of a run's folder
    (also of one in a bucket), whose lists are read as tuples. VALUE is read as `fields` declares
    the field, tuples as Python writes them, `None` always as None. Whether there is such a field,
    and whether it may be this value, is for `checks` to say.

    Args:
      faults: gets the overrides whose path leads nowhere; None: they are raised.
      cls: the dataclass whose defaults a `config.json` gets that has not got all of its fields.

    Returns:
      The config, locked (no new fields), and the arguments that are not about it.

    Raises:
      ConfigError: no such file, no `get_config`, an unknown arg.
    """
    files, overrides, rest = _split_arguments(argv)
    if len(files) != 1:
        raise ConfigError(f"config: expected one --config=FILE[:arg], found {files or 'none'}")
    file, argument = split_argument(files[0])
    is_run = file.endswith(".json")
    config = _own(_read_json(file, argument, cls) if is_run else _import(file, argument))
    found = [] if faults is None else faults
    for path, text in overrides:
        try:
            _override(config, path, text)
        except ConfigError as error:
            found.append(str(error))
    if found and faults is None:
        raise ConfigError("\n".join(found))
    return config, rest


def split_argument(source: str) -> tuple[str, str]:
    """The file and the argument of "FILE[:arg]", where FILE may be of a bucket."""
    return re.fullmatch(r"(\w+://[^:]*|[^:]*):?(.*)", source, re.DOTALL).groups()


def read_config(arguments: Sequence[str], faults: list[str] | None = None) -> ConfigDict:
    """Returns the config of a command line.

    Args:
      faults: as in `load_config`; gets arguments that are not about the config, too.

    Raises:
      ConfigError: as `load_config`; or an argument that is not about the config.
    """
    found = [] if faults is None else faults
    config, unknown = load_config(arguments, found, cls=RunConfig)
    if unknown:
        found.append(f"unknown arguments: {' '.join(unknown)}")
    if found and faults is None:
        raise ConfigError("\n".join(found))
    return config


def fingerprint(config: Any, ignore: tuple[str, ...] = ()) -> str:
    """Twelve hex digits of what decides the result of a run; 1 and 1.0 count as the same.

    Args:
      config: a dataclass, ConfigDict or dict, with its keys in any order.
      ignore: what does not change the result: paths without "config." and without indices, such
        as "report" or "stages.save_every", each with everything below it.
    """
    canonical = json.dumps(_canonical(as_dict(config), "", ignore), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def claim(
    folder: epath.PathLike, config: Any, ignore: tuple[str, ...] = (), option: str = "--workdir"
) -> None:
    """Makes the folder that of a run with this config, as its `config.json` says.

    A run that never got as far as to write anything else leaves its folder to the next.

    Args:
      ignore: as in `fingerprint`: what may change from one start of the run to the next.
      option: that chooses the folder, for the message.

    Raises:
      ConfigError: it belongs to another config, with every field that differs; or it cannot be
        written.
    """
    distributed.run_on_primary(lambda: _claim(to_path(folder), config, ignore, option))


def _claim(folder: epath.Path, config: Any, ignore: tuple[str, ...], option: str) -> None:
    file = folder / "config.json"
    ours = {"fingerprint": fingerprint(config, ignore), "config": as_json(config)}
    try:
        theirs = json.loads(read_text(file)) if file.exists() else None
        if theirs and dataclasses.is_dataclass(config):
            theirs["config"] = as_json(_of_run(type(config), theirs["config"]))
            theirs["fingerprint"] = fingerprint(theirs["config"], ignore)
        begun = {other.name for other in folder.iterdir()} if folder.exists() else set()
        # What stands there before the run itself begins, and decides nothing.
        used = begun - {file.name, INPUTS, "started.json", "tokens", LOCK}
        if theirs and used and theirs["fingerprint"] != ours["fingerprint"]:
            configs = theirs["config"], ours["config"]
            raise ConfigError(_another_config(folder, *configs, ignore, option))
        if not used:  # the inputs too may be others now
            (folder / INPUTS).unlink(missing_ok=True)
        if theirs != ours:
            make_folder(folder)
            write_json(file, ours)
    except io_errors(folder) as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise
        needed = (
            "a bucket that exists, credentials for it, the right to read, write, list and delete "
            f"its objects, and the packages of the extra gcs: {GCS_EXTRA}"
            if is_remote(folder)
            else "a folder, existing or not, that this user may write"
        )
        raise ConfigError(
            f"{folder}: cannot be written ({type(error).__name__}: {error}); expected {needed}"
        ) from error


def _another_config(
    folder: epath.Path, theirs: Any, ours: Any, ignore: tuple[str, ...], option: str
) -> str:
    there, now = (_flat(_canonical(config, "", ignore), "config") for config in (theirs, ours))
    lines = [f"{folder} belongs to a run of another config; take another {option}, or set back"]
    for name in sorted(there | now):
        if there.get(name) != now.get(name):
            lines.append(f"  {name}: there {there.get(name)!r}, now {now.get(name)!r}")
    if (folder / "student").exists():
        lines.append(
            f"To train its student further: --config.student.path={folder / 'student'} "
            "--config.student.layers=0 with another --workdir"
        )
    return "\n".join(lines)


def as_dict(value: Any) -> Any:
    """Returns dicts in place of ConfigDicts and of dataclasses, of which the declared fields, and
    Python's numbers in place of NumPy's."""
    if dataclasses.is_dataclass(value):
        return {name: as_dict(getattr(value, name)) for name in declared(type(value))}
    if isinstance(value, (Mapping, ConfigDict)):
        return {name: as_dict(child) for name, child in value.items()}
    if isinstance(value, list):
        return [as_dict(element) for element in value]
    if isinstance(value, tuple):
        return tuple(map(as_dict, value))
    return value.item() if isinstance(value, np.generic) else value


def as_json(config: Any) -> dict[str, Any]:
    """Returns dicts, lists, numbers and strings."""
    return json.loads(json.dumps(as_dict(config)))


def _canonical(value: Any, path: str, ignore: tuple[str, ...]) -> Any:
    """Leaves out what is to be ignored, and writes whole numbers as such."""
    if isinstance(value, dict):
        below = {name: f"{path}.{name}".removeprefix(".") for name in value}
        return {n: _canonical(value[n], below[n], ignore) for n in value if below[n] not in ignore}
    if isinstance(value, (list, tuple)):
        return [_canonical(element, path, ignore) for element in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _flat(value: Any, path: str) -> dict[str, Any]:
    """Every leaf of a JSON value by its path."""
    if isinstance(value, dict):
        children = ((f"{path}.{key}", child) for key, child in value.items())
    elif isinstance(value, list):
        children = ((f"{path}[{index}]", child) for index, child in enumerate(value))
    else:
        return {path: value}
    return {name: leaf for at, child in children for name, leaf in _flat(child, at).items()}


# Reading.


def _split_arguments(argv: Sequence[str]) -> tuple[list, list, list]:
    """Returns the config files, (path, text) of the overrides, and everything else."""
    files, overrides, rest = [], [], []
    arguments = iter(argv)
    for argument in arguments:
        flag, equals, text = argument.partition("=")
        if re.fullmatch("--?config", flag):
            files.append(text if equals else next(arguments, ""))
        elif re.match(r"--?config[.\[]", flag):
            overrides.append((flag.lstrip("-"), text if equals else None))
        else:
            rest.append(argument)
    return files, overrides, rest


def _read_json(file: str, argument: str, cls: type | None) -> ConfigDict:
    if argument:
        raise ConfigError(f"config: {file} takes no argument, but got {argument!r}")
    text = _content(file, "JSON")
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"config: {file} is not JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("config"), dict):
        raise ConfigError(
            f'config: {file} is not the config of a run; expected {{"config": {{…}}}} as a run '
            "writes it into its folder"
        )
    return ConfigDict(_of_run(cls, content["config"]) if cls else _from_json(content["config"]))


def _of_run(cls: type, config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as a run wrote it, with the defaults of fields that there were none of then."""
    return with_defaults(cls, _from_json(config))


def _content(file: str, kind: str) -> bytes:
    """Raises ConfigError for a file that is not there, not of this kind, or cannot be read."""
    if fault := address_fault(file):
        raise ConfigError(f"config: {file!r} is not {fault}")
    try:
        if file.endswith((".py", ".json")) and to_path(file).is_file():
            return to_path(file).read_bytes()
    except io_errors(file) as error:
        raise ConfigError(f"config: {file} cannot be read: {error}") from error
    raise ConfigError(f"config: there is no {kind} file {file!r}")


def _from_json(value: Any) -> Any:
    """A config that a run wrote, with tuples for lists and the names that its fields have now."""
    if isinstance(value, dict):
        return {
            RENAMED.get(name, name): child if name == "sets" else _from_json(child)
            for name, child in value.items()
        }
    return tuple(map(_from_json, value)) if isinstance(value, list) else value


def _import(file: str, argument: str) -> ConfigDict:
    module = types.ModuleType("config")
    module.__file__ = file if is_remote(file) else os.path.abspath(file)
    exec(compile(_content(file, "Python"), module.__file__, "exec"), module.__dict__)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"config: {file} defines no get_config")
    arguments = [argument] if argument else []
    if len(inspect.signature(module.get_config).parameters) < len(arguments):
        raise ConfigError(f"config: get_config of {file} takes no argument, but got {argument!r}")
    try:
        config = module.get_config(*arguments)
    except ValueError as error:
        raise ConfigError(f"config: {':'.join([file, *arguments])}: {error}") from error
    except AttributeError as error:  # as a ConfigDict raises it for a field that it has not
        name = re.sub(r"\W", "", str(error).partition("\n")[0])
        if name not in RENAMED:
            raise
        raise ConfigError(f"config: {file}: {name} is now called {RENAMED[name]}") from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"config: get_config of {file} returned {config!r}, not a ConfigDict")
    return config


def _own(value: Any) -> Any:
    """Copies dicts, also those in tuples, as locked ConfigDicts: an override of one stage shall
    not reach another that was made of the same dict. References to other fields stay."""
    if isinstance(value, (list, tuple)):
        return type(value)([_own(element) for element in value])
    if not isinstance(value, (Mapping, ConfigDict)):
        return value
    config = ConfigDict(type_safe=False)  # a field may hold what its default is not
    for name, child in ConfigDict(value).items(preserve_field_references=True):
        config[name] = _own(child)
    return config.lock()


def _override(config: ConfigDict, path: str, text: str | None) -> None:
    """Sets a field, also one that there is not, which is a mistake of the config from then on."""
    if text is None:
        raise ConfigError(f"{path}: has no value, write --{path}=VALUE")
    if not re.fullmatch(r"config(\.\w+|\[\d+\])+", path):
        raise ConfigError(f"{path}: is no path such as config.a.b[0].c")
    where, spec, value = "config", Group(RunConfig), config
    for part, name, index in re.findall(r"(\.(\w+)|\[(\d+)\])", path):
        holder, value, where = value, _child(where, value, name, index), where + part
        fields = declared(spec.cls) if isinstance(spec, Group) else {}
        spec = fields[name].metadata["spec"] if name in fields else getattr(spec, "spec", None)
    if not name:
        raise ConfigError(f"{path}: set the whole tuple, now {holder!r}")
    holder[name] = _read(text, spec, value)


def _child(where: str, holder: Any, name: str, index: str) -> Any:
    """holder.name or holder[index]; the other of the two is empty."""
    if index and isinstance(holder, (list, tuple)):
        if int(index) < len(holder):
            return holder[int(index)]
        raise ConfigError(f"{where}[{index}]: is unknown; the last is [{len(holder) - 1}]")
    if name and isinstance(holder, ConfigDict):
        if name not in holder:
            with holder.unlocked():
                holder[name] = ConfigDict(type_safe=False)
        return holder[name]
    if isinstance(holder, (list, tuple)):
        raise ConfigError(f"{where}: is a tuple; its elements are {where}[0], …")
    raise ConfigError(f"{where}: {holder!r} has no {'elements' if index else 'fields'}")


def _read(text: str, spec: Any, old: Any) -> Any:
    """Reads the text of an override as its field may be, else as the value that it replaces."""
    is_text = not any(mistakes("", text, spec)) if spec else isinstance(old, str)
    if is_text and text != "None":
        return text
    try:
        return _own(ast.literal_eval({"true": "True", "false": "False"}.get(text, text)))
    except (ValueError, SyntaxError):
        return text
