"""Files of a run: whole or absent whenever it is stopped, on a disk or in a bucket.

A path is an `etils.epath.Path`, as `to_path` makes it: of a folder of this machine, of one that
many machines share, or of a bucket (`gs://bucket/run`); a `pathlib.Path` does for what is never in
a bucket. Of the processes of a run, which all call these functions alike, the first writes.
"""

import contextlib
import contextvars
import dataclasses
import hashlib
import json
import os
import pathlib
import platform
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

import fsspec
import fsspec.config
from etils import epath

from promptkd_jax.infra import distributed, errors
from promptkd_jax.infra.specs import Str

LOCK = ".lock"  # of a folder that a run holds
BUCKET_SECONDS = 10.0  # from one writing of a growing object to the next
SHARED_SECONDS = 30.0  # that a file of one machine may need until others see it
# For what is in a bucket.
GCS_EXTRA = "pip install -e '.[gcs]' in a clone, or pip install 'promptkd_jax[gcs]'"
_POLL_SECONDS = 0.5
_COPY_BYTES = 16 * 2**20


def to_path(text: str | os.PathLike) -> epath.Path:
    """The file or folder of that name; for entry points, since `pathlib` spoils `gs://`, and no
    shell expands the `~` in `--flag=~/folder`.

    What is in a bucket is asked of the bucket every time: it changes by other processes, and by
    TensorStore, past the memory of `gcsfs`.
    """
    if is_remote(text):
        fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    return epath.Path(os.path.expanduser(text))


def is_remote(file: str | os.PathLike) -> bool:
    """Whether it is in a bucket: without appending, renaming, memory maps and real folders."""
    return "://" in os.fspath(file)


def address_fault(text: str) -> str:
    """The fault of a path or name that a user gave, as words after "is not"; "" for none.

    Nothing is asked of the network: a scheme is known or not, its packages are installed or not.
    """
    scheme = re.match(r"(\w+):/", text)  # also gs:/bucket, as pathlib spoils it
    if scheme is None:
        return ""
    if not text.startswith("gs://"):
        return "a path or a hub id (owner/name); buckets are those of gs://BUCKET/… alone"
    try:
        fsspec.get_filesystem_class("gcs")
    except ImportError:
        needed = f"within reach: buckets need the packages of the extra gcs: {GCS_EXTRA}"
        return "" if _of_another_machine.get() else needed
    return ""


_of_another_machine = contextvars.ContextVar("_of_another_machine", default=False)


@dataclasses.dataclass(frozen=True)
class Path(Str):
    """The spec of a file or folder, of a bucket too if `bucket`; or of another name, such as a
    hub's. What cannot be reached from here is a fault before anything is read or written."""

    bucket: bool = True

    def fault(self, value: Any) -> str:
        if fault := super().fault(value):
            return fault
        if is_remote(value) and not self.bucket:
            return "a folder of a disk or of a shared file system"
        return address_fault(value)


@contextlib.contextmanager
def of_another_machine() -> Iterator[None]:
    """Looks at paths for a machine that has packages of its own, whatever this one lacks."""
    before = _of_another_machine.set(True)
    try:
        yield
    finally:
        _of_another_machine.reset(before)


def io_errors(file: str | os.PathLike) -> tuple[type[Exception], ...]:
    """What reading and writing raise where the disk, the bucket or the network refuses."""
    if not is_remote(file):
        return (OSError,)
    try:
        from aiohttp import ClientError
        from gcsfs.retry import HttpError
        from google.api_core.exceptions import GoogleAPIError
        from google.auth.exceptions import GoogleAuthError
    except ImportError:
        return OSError, ImportError
    return OSError, ClientError, GoogleAPIError, GoogleAuthError, HttpError


def make_folder(folder: epath.Path) -> None:
    """With its parents, where it is absent. A bucket has no folders, and is not made."""
    if distributed.is_primary() and not is_remote(folder):
        folder.mkdir(parents=True, exist_ok=True)


def check_writable(folder: epath.Path) -> None:
    """Makes a folder and a file in it, which goes again: so that work is not done and then lost.

    Raises:
      OSError, or another of `io_errors`: nothing can be written there.
    """

    def check():
        make_folder(folder)
        probe = folder / f".writable-{secrets.token_hex(8)}"
        probe.write_bytes(b"")
        probe.unlink()

    distributed.run_on_primary(check)


def local_copy(source: epath.Path, suffixes: Collection[str]) -> pathlib.Path:
    """Copies a file of a bucket, or of a folder there the files with these suffixes, to this
    machine, where models of the hub are kept as well (`HF_HOME`).

    What is there already is not copied again, unless a name, a size or a time has changed.

    Raises:
      OSError, or another of `io_errors`: it cannot be read, or not be written here.
    """
    from huggingface_hub.constants import HF_HOME

    single = source.is_file()
    found = [source] if single else [f for f in source.iterdir() if f.suffix in suffixes]
    stats = [(file.name, file.stat()) for file in found]
    facts = sorted((name, stat.length, stat.mtime) for name, stat in stats)
    digest = hashlib.sha256(json.dumps([os.fspath(source), facts]).encode()).hexdigest()
    folder = pathlib.Path(HF_HOME) / "promptkd_jax" / digest
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as begun:
            for file in found:
                with file.open("rb") as theirs, open(pathlib.Path(begun) / file.name, "wb") as ours:
                    shutil.copyfileobj(theirs, ours, _COPY_BYTES)
            try:
                pathlib.Path(begun).rename(folder)
            except OSError:
                if not folder.exists():  # where another process was not faster
                    raise
    return folder / source.name if single else folder


def write_text(file: epath.Path, text: str) -> None:
    """Writes a file so that whoever looks sees the old one or the new one, whole."""
    if not distributed.is_primary():
        return
    if is_remote(file):
        file.write_bytes(text.encode())  # an object changes at once, when all of it is there
        return
    unfinished = file.with_name(file.name + ".unfinished")
    with unfinished.open("wb") as out:
        out.write(text.encode())
        out.flush()
        os.fsync(out.fileno())
    unfinished.replace(file)


def write_json(file: epath.Path, content: Any) -> None:
    """As `write_text`, indented."""
    write_text(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_text(file: epath.Path) -> str:
    """UTF-8, whatever the locale, which decides for objects of a bucket."""
    return file.read_bytes().decode()


def load_or_compute(file: epath.Path, compute: Callable[[], Any]) -> Any:
    """What the JSON file holds, computed and written where it is absent.

    All processes compute, or none; each gets the first one's value.
    """
    if not distributed.run_on_primary(file.exists):
        write_json(file, compute())
    return distributed.run_on_primary(lambda: json.loads(read_text(file)))


class AppendOnlyFile:
    """A file that grows at its end.

    On a disk, what is appended is there at once. An object of a bucket cannot grow: it is written
    anew, at most every `BUCKET_SECONDS` and when flushed or closed, so that a killed run has lost
    what came since. Torn lines are for the reader to cut off before (see `write_text`).
    """

    def __init__(self, file: epath.Path):
        self._file, self._waiting, self._written = file, b"", -BUCKET_SECONDS
        self._remote, self._object = is_remote(file), b""
        if self._remote and distributed.is_primary() and file.exists():
            self._object = file.read_bytes()

    def append(self, text: str) -> None:
        """Whole lines, with their newlines."""
        self._waiting += text.encode()
        if not self._remote or time.monotonic() - self._written >= BUCKET_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes what waits."""
        if self._waiting and distributed.is_primary():
            if self._remote:
                self._object += self._waiting
                self._file.write_bytes(self._object)
            else:
                with self._file.open("ab") as out:
                    out.write(self._waiting)
            self._written = time.monotonic()
        self._waiting = b""

    def __enter__(self) -> "AppendOnlyFile":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.flush()


@contextlib.contextmanager
def held(folder: epath.Path) -> Iterator[None]:
    """Holds a folder of a disk, made where absent, for one run, whose processes all call this,
    until it ends, however that may be. One that cannot be written is not held.

    Raises:
      ConfigError: another run holds it.
    """
    opened: list[int] = []
    distributed.run_on_primary(lambda: None if is_remote(folder) else _hold(folder, opened))
    try:
        yield
    finally:
        for descriptor in opened:
            os.close(descriptor)


def _hold(folder: epath.Path, opened: list[int]) -> None:
    import fcntl

    try:
        folder.mkdir(parents=True, exist_ok=True)
        opened.append(os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666))
    except OSError:  # whoever writes there says what is wrong
        return
    try:
        # Of the kernel: it is gone with the process, by `kill -9` too.
        fcntl.flock(opened[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(opened.pop())
        raise errors.ConfigError(
            f"{folder}: another process works in this folder; wait for it or end it, or take "
            "another one"
        ) from None
    except OSError:  # a network's file system without locks
        return


def check_shared(folder: epath.Path) -> None:
    """Checks that all processes see the files of the first in `folder`.

    Raises:
      HostsError: on every process, where one does not within `SHARED_SECONDS`.
    """
    if distributed.is_single_process():
        return
    name = distributed.run_on_primary(lambda: f".shared-{secrets.token_hex(8)}")
    file = folder / name
    write_text(file, name)
    distributed.run_on_primary(lambda: None)  # it is written before anybody looks
    hosts = distributed.all_gather("" if _appears(file, name) else platform.node() or "?")
    if distributed.is_primary():
        file.unlink()
    if any(hosts):
        who = ", ".join(f"{i} on {host}" for i, host in enumerate(hosts) if host)
        raise errors.HostsError(
            f"{folder}: process {who} does not see there what process 0 wrote, within "
            f"{SHARED_SECONDS:.0f} s; all {len(hosts)} processes need one folder: of a file system "
            "that their machines share, or of a bucket (gs://bucket/run)"
        )


def _appears(file: epath.Path, text: str) -> bool:
    """Whether a file with this content can be seen before long."""
    end = time.monotonic() + SHARED_SECONDS
    while not (file.exists() and read_text(file) == text):
        if time.monotonic() > end:
            return False
        time.sleep(_POLL_SECONDS)
    return True
