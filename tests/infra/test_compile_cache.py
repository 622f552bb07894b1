"""Compiled programs outlive a process, if the user wants it, on the processor that made them; the
memory of compiling does not outlive compiling."""

import ctypes
import json
import os
import pathlib
import platform
import subprocess
import sys
import textwrap

import jax
import pytest

from promptkd_jax.infra.compile_cache import (
    default_folder,
    processor_kind,
    return_memory_of_compiling,
)

CPU = """processor : {number}
vendor_id : AuthenticAMD
cpu family : 25
model : 1
cpu MHz : {mhz}
flags : fpu avx2{more}
"""

# Compiles a program twice, JAX's own memory of it forgotten in between.
PROGRAM = """
import jax, sys
from promptkd_jax.infra.compile_cache import keep_compiled_programs
before = jax.config.jax_compilation_cache_dir
keep_compiled_programs()
hits = []
jax.monitoring.register_event_listener(
    lambda event, **_: hits.append(event) if event.endswith("/cache_hits") else None
)
for _ in range(2):
    jax.jit(lambda x: x * 3)(1.0)
    jax.clear_caches()
print(len(hits))
"""


def compiled_with(**environment) -> tuple[int, str]:
    """How many programs came out of the cache, and what was said on stderr."""
    names = "JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE", "XDG_CACHE_HOME"
    clean = {name: value for name, value in os.environ.items() if name not in names}
    clean |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"} | environment
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM)]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, check=True)
    return int(done.stdout), done.stderr


def test_the_kind_of_processor_is_what_it_can_do():
    two = CPU.format(number=0, mhz=2450, more="") + "\n" + CPU.format(number=1, mhz=3100, more="")
    assert processor_kind(two) == processor_kind(CPU.format(number=7, mhz=1500, more=""))
    assert processor_kind(two) != processor_kind(CPU.format(number=0, mhz=2450, more=" avx512f"))
    assert processor_kind("arm") != processor_kind("i386")


def test_a_processor_has_a_name_where_there_is_no_proc(monkeypatch):
    def missing(self):
        raise FileNotFoundError(self)

    monkeypatch.setattr(pathlib.Path, "read_text", missing)
    assert default_folder().name.startswith(platform.machine())


def test_programs_are_kept_in_the_users_cache_folder(tmp_path):
    hits, said = compiled_with(XDG_CACHE_HOME=str(tmp_path))
    assert hits and not said
    (kind,) = (tmp_path / "promptkd_jax" / "compiled").iterdir()
    assert list(kind.glob("*-cache"))


@pytest.mark.parametrize("variable", ["JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"])
def test_jaxs_own_variables_come_first(tmp_path, variable):
    value = str(tmp_path / "other") if variable.endswith("DIR") else "0"
    hits, _ = compiled_with(HOME=str(tmp_path), **{variable: value})
    assert bool(hits) == (tmp_path / "other").exists() == variable.endswith("DIR")
    assert not (tmp_path / ".cache").exists()


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "promptkd_jax").write_text("in the way")
    hits, said = compiled_with(XDG_CACHE_HOME=str(tmp_path))
    assert not hits and f"{tmp_path}/promptkd_jax/compiled" in said


COMPILING = """
import ctypes, types
import jax
from promptkd_jax.infra import compile_cache

trims, programs = [], []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: event == compile_cache._COMPILED and programs.append(seconds)
)
ctypes.CDLL = lambda name: types.SimpleNamespace(malloc_trim=trims.append)
compile_cache._LONG = {seconds}
for _ in range(2):
    compile_cache.return_memory_of_compiling()
jax.block_until_ready(jax.jit(lambda x: x * 3)(1.0))
print([trims, len(programs)])
"""


@pytest.mark.parametrize(("seconds", "share"), [(0.0, 1), (1000.0, 0)])
def test_memory_goes_back_once_behind_each_program_that_took_long(seconds, share):
    command = [sys.executable, "-c", COMPILING.format(seconds=seconds)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    trims, programs = json.loads(done.stdout)
    assert programs and len(trims) == share * programs and not any(trims)  # malloc_trim(0)


def test_a_system_without_malloc_trim_keeps_its_memory(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    listeners = []
    register = listeners.append
    monkeypatch.setattr(jax.monitoring, "register_event_duration_secs_listener", register)
    return_memory_of_compiling.__wrapped__()
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    return_memory_of_compiling.__wrapped__()
    assert not listeners
