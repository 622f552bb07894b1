"""A bucket in memory for `gs://` paths, with what real ones lack: appending, and other buckets."""

import fsspec
from etils import epath
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem

from promptkd_jax.infra.files import is_remote, to_path

NAME = "pail"


class Bucket(MemoryFileSystem):
    """Counts how often each object was written, in `writes`."""

    protocol, cachable = ("gs", "gcs"), False

    def __init__(self, **options):
        super().__init__(**options)
        self.store, self.pseudo_dirs, self.writes = {}, [""], []

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + str(path).removeprefix("gs://").strip("/")

    def _open(self, path, mode="rb", **options):
        if path.split("/")[1] != NAME:
            raise FileNotFoundError(path)
        if mode == "wb":
            self.writes.append(path.removeprefix(f"/{NAME}/"))
        elif mode != "rb":
            raise NotImplementedError(f"mode {mode} of an object")
        return super()._open(path, mode=mode, **options)

    def walk(self, *arguments, **options):  # as gcsfs, without a leading slash
        for parent, folders, files in super().walk(*arguments, **options):
            yield parent.lstrip("/"), folders, files

    def mv(self, *arguments, **options):
        raise AssertionError("an object cannot be renamed at once")


def make(monkeypatch) -> tuple[epath.Path, Bucket]:
    """A new one, and the path of a run in it."""
    monkeypatch.setattr(fsspec, "get_filesystem_class", lambda scheme: Bucket)  # that of gcsfs
    bucket, kind = Bucket(), type(backend.fsspec_backend)
    others = kind.fs
    monkeypatch.setattr(
        kind, "fs", lambda self, path: bucket if is_remote(path) else others(self, path)
    )
    return to_path(f"gs://{NAME}/run"), bucket
