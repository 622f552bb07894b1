"""Files are whole or absent, on a disk and in a bucket, and one process of many writes them."""

import json
import os
import pathlib
import subprocess
import sys

import fsspec.config
import pytest
from etils import epath
from helpers import bucket

from promptkd_jax.infra import distributed, errors, files


@pytest.fixture(params=["disk", "pathlib", "bucket"])
def folder(request, tmp_path, monkeypatch):
    places = {"disk": lambda: epath.Path(tmp_path), "pathlib": lambda: tmp_path}
    places["bucket"] = lambda: bucket.make(monkeypatch)[0]
    return places[request.param]()


def names(folder) -> list[str]:
    return sorted(file.name for file in folder.iterdir()) if folder.exists() else []


def test_a_bucket_keeps_its_slashes():
    assert os.fspath(files.to_path("gs://pail/run") / "a.json") == "gs://pail/run/a.json"
    assert os.fspath(files.to_path("runs/a")) == "runs/a"
    assert files.is_remote("gs://pail/run") and not files.is_remote(pathlib.Path("gs:/pail"))


def test_what_others_put_into_a_bucket_is_seen():
    files.to_path("gs://pail/run")
    assert fsspec.config.conf["gcs"]["use_listings_cache"] is False


def test_a_file_is_replaced_and_nothing_else_is_left(folder):
    for text in ("old", "näu \u2028 \n"):
        files.write_text(folder / "a.txt", text)
        assert files.read_text(folder / "a.txt") == text
        assert names(folder) == ["a.txt"]


def test_a_stop_in_the_middle_leaves_the_old_file(tmp_path, monkeypatch):
    file = epath.Path(tmp_path) / "a.txt"
    files.write_text(file, "old")

    def full(descriptor):
        raise OSError("no space")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        files.write_text(file, "new")
    assert file.read_text() == "old"


def test_an_object_is_written_at_once(monkeypatch):
    folder, pail = bucket.make(monkeypatch)
    files.make_folder(folder)
    files.write_json(folder / "a.json", {"ä": 1})
    assert pail.writes == ["run/a.json"] and json.loads(files.read_text(folder / "a.json"))


@pytest.mark.parametrize("value", [{"rougeL": 1.5}, None])
def test_once_computes_once(folder, value):
    calls = []
    for _ in range(2):
        assert files.load_or_compute(folder / "a.json", lambda: calls.append(1) or value) == value
    assert calls == [1]


def test_only_the_first_process_writes(folder, monkeypatch):
    files.write_text(folder / "here.txt", "first")
    monkeypatch.setattr(distributed, "is_primary", lambda: False)
    files.make_folder(folder / "new")
    files.write_text(folder / "here.txt", "second")
    with files.AppendOnlyFile(folder / "lines.jsonl") as lines:
        lines.append("line\n")
    assert names(folder) == ["here.txt"] and files.read_text(folder / "here.txt") == "first"


def test_all_processes_get_the_first_ones_value(folder, monkeypatch):
    told = iter([False, {"of": "the first"}])
    monkeypatch.setattr(distributed, "run_on_primary", lambda compute: next(told))
    calls = []
    found = files.load_or_compute(folder / "a.json", lambda: calls.append(1) or {"of": "this one"})
    assert found == {"of": "the first"} and calls == [1]


def test_lines_go_on_where_the_file_ends(folder):
    for number in range(2):
        with files.AppendOnlyFile(folder / "a.jsonl") as lines:
            for letter in "äb":
                lines.append(f"{letter}{number}\n")
    assert files.read_text(folder / "a.jsonl") == "ä0\nb0\nä1\nb1\n"


def test_lines_on_a_disk_are_there_at_once(tmp_path):
    with files.AppendOnlyFile(epath.Path(tmp_path) / "a.jsonl") as lines:
        for number in range(3):
            lines.append(f"{number}\n")
            assert (tmp_path / "a.jsonl").read_text().endswith(f"{number}\n")


def test_an_object_that_grows_is_written_now_and_then(monkeypatch):
    folder, pail = bucket.make(monkeypatch)
    clock = iter([0, 0, 1, 9.9, 10, 10, 11, 12])
    monkeypatch.setattr(files.time, "monotonic", lambda: float(next(clock)))
    seen = []
    with files.AppendOnlyFile(folder / "a.jsonl") as lines:
        for letter in "abcde":
            lines.append(letter)
            seen.append(files.read_text(folder / "a.jsonl"))
        lines.flush()
        seen.append(files.read_text(folder / "a.jsonl"))
    assert seen == ["a", "a", "a", "abcd", "abcd", "abcde"]
    assert len(pail.writes) == 3, "nothing waits at the end"


# Whether the processes have one folder.


@pytest.fixture
def two_processes(monkeypatch):
    """Process 0 of two, of which the other sees the same, or as `appears` says."""
    monkeypatch.setattr(distributed, "is_single_process", lambda: False)
    monkeypatch.setattr(distributed, "run_on_primary", lambda compute: compute())
    told = {}

    monkeypatch.setattr(distributed, "all_gather", lambda x: [x, told.get("other", x)])
    return told


def test_one_process_writes_no_token(tmp_path):
    files.check_shared(epath.Path(tmp_path / "absent"))
    assert names(tmp_path) == []


def test_a_shared_folder_is_left_as_it_was(folder, two_processes):
    files.write_text(folder / "a.txt", "a")
    files.check_shared(folder)
    assert names(folder) == ["a.txt"]


def test_a_process_with_another_folder_is_named(folder, two_processes):
    files.write_text(folder / "a.txt", "a")
    two_processes["other"] = "host-b"
    with pytest.raises(errors.HostsError) as raised:
        files.check_shared(folder)
    assert f"{folder}: process 1 on host-b does not see there" in str(raised.value)
    assert "a file system that their machines share" in str(raised.value)
    assert names(folder) == ["a.txt"]


def test_a_process_waits_for_what_comes_late(folder, monkeypatch):
    monkeypatch.setattr(files, "SHARED_SECONDS", 0.2)
    monkeypatch.setattr(files, "_POLL_SECONDS", 0.01)
    late = iter([None, None, "tok", "token"])

    def exists(self):
        if text := next(late):
            files.write_text(self, text)
        return text is not None

    file = folder / "late"
    assert not files._appears(file, "token")
    monkeypatch.setattr(type(file), "exists", exists)
    assert files._appears(file, "token") and next(late, "all seen") == "all seen"


def test_a_folder_is_held_by_one_run_until_it_ends_however_that_may_be(tmp_path):
    program = f"""
import time
from promptkd_jax.infra import files
with files.held(files.to_path({str(tmp_path)!r})):
    print("held", flush=True)
    time.sleep(1000)
"""
    folder = files.to_path(tmp_path)
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout.readline() == b"held\n"
            refused = pytest.raises(
                errors.ConfigError, match="another process works in this folder"
            )
            with refused, files.held(folder):
                pass
        finally:
            other.kill()
    for _ in range(2):
        with files.held(folder):
            pass


def test_a_folder_that_cannot_be_written_is_not_held(tmp_path):
    (tmp_path / "file").write_text("")
    with files.held(files.to_path(tmp_path / "file")):  # whoever writes there says so
        pass
