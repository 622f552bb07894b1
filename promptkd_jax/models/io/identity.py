"""Identities of models and tokenizers: digests of their content, whatever their path; of a hub
repository the commit, which stands for its content."""

import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from promptkd_jax.infra import distributed
from promptkd_jax.models.config import Quantization
from promptkd_jax.models.io.hub import repository_of, resolve_model
from promptkd_jax.models.model import Model
from promptkd_jax.models.random_model import PREFIX


def teacher_identity(
    path: str, dtype: str, param_dtype: str, quantization: Quantization | None = None
) -> dict[str, str]:
    """Identifies a teacher: by its files, the dtypes that it is computed in, and how its kernels
    are quantised.

    A `synthetic:` one has no files, and its name decides every parameter. The files are read by the
    first process of a run, which tells the others.
    """
    kept = f"parameters {param_dtype}" + (f", kernels {quantization}" if quantization else "")
    return {"teacher": weights_digest(path), "dtype": f"{dtype}, {kept}"}


def weights_digest(path: str) -> str:
    """A digest of a model's files, its repository and commit, or its name if it has no files."""
    return path if path.startswith(PREFIX) else distributed.run_on_primary(lambda: _digest(path))


def _digest(path: str) -> str:
    repository = repository_of(path)
    if repository and re.fullmatch("[0-9a-f]{40}", commit := resolve_model(path).name):
        return f"{repository}@{commit}"  # the hub's cache names folders so
    return files_digest(_files(path))


def files_digest(files: Sequence[pathlib.Path]) -> str:
    """A digest of the content of files, in this order."""
    with ThreadPoolExecutor() as pool:
        versions = (file.stat() for file in files)
        digests = pool.map(_file_digest, files, ((x.st_size, x.st_mtime_ns) for x in versions))
        return "sha256 " + hashlib.sha256(b"".join(digests)).hexdigest()


_END = 2**20  # bytes


def _files(path: str) -> list[pathlib.Path]:
    file = resolve_model(path)
    if file.is_file():
        return [file]
    return [file / "config.json", *sorted(file.glob("*.safetensors"))]


def quick_digest(path: str) -> str:
    """A digest of the ends of a model's files, quickly read, which differs where the files do."""
    if path.startswith(PREFIX):
        return path
    whole = hashlib.sha256()
    for file in _files(path):
        with file.open("rb") as opened:
            whole.update(opened.read(_END))
            opened.seek(max(0, file.stat().st_size - _END))
            whole.update(opened.read())
    return whole.hexdigest()


def model_identity(teacher: Model) -> dict[str, str]:
    """`teacher_identity` of a loaded model."""
    config = teacher.decoder.config
    how = config.dtype, config.param_dtype, config.quantization
    return teacher_identity(teacher.name, *how)


@functools.lru_cache(maxsize=64)
def _file_digest(file: pathlib.Path, size_and_time: tuple[int, int]) -> bytes:
    """Read once, though a run compares several manifests with the same gigabytes, unless its size
    or time changes."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").digest()


def tokenization_digest(tokenizer: Any) -> str:
    """A digest of all by which a tokenizer makes tokens of texts and conversations."""
    whole = [tokenizer_digest(tokenizer), str(tokenizer.chat_template)]
    whole += [str(tokenizer.special_tokens_map)]
    if tokenizer.is_fast:
        whole.append(tokenizer.backend_tokenizer.to_str())
    return f"sha256 {hashlib.sha256(json.dumps(whole).encode()).hexdigest()}"


def tokenizer_digest(tokenizer: Any) -> str:
    """A tokenizer's size, and a digest of its sorted vocabulary. (Rows tell how it splits text.)"""
    vocabulary = sorted(tokenizer.get_vocab().items())
    digest = hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()
    return f"{len(vocabulary)} tokens, sha256 {digest}"
