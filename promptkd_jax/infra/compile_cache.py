"""Compiled programs, kept from one process to the next: JAX's persistent cache, on by default; and
the memory that compiling took, which the system gets back before a program runs.

JAX's own variables come first: JAX_COMPILATION_CACHE_DIR names another folder, or a bucket, and
with JAX_ENABLE_COMPILATION_CACHE=0 nothing is kept.

    $XDG_CACHE_HOME/promptkd_jax/compiled/       or ~/.cache/…
      x86_64-0d6f6ac2/                           what one kind of processor compiled
        jit_step-….-cache
"""

import ctypes
import functools
import hashlib
import os
import pathlib
import platform

import jax

from promptkd_jax.infra import distributed

MAX_BYTES = 4 * 2**30  # of a folder; programs that were not used for the longest time make room

_COMPILED = "/jax/core/compile/backend_compile_duration"  # JAX's event, when a program is there
_LONG = 1.0  # seconds; what compiles faster has taken little memory

# Lines of /proc/cpuinfo that say which instructions a processor has, on x86 and on Arm.
_INSTRUCTIONS = (
    "vendor_id",
    "cpu family",
    "model",
    "flags",
    "CPU implementer",
    "CPU architecture",
    "CPU variant",
    "CPU part",
    "Features",
)


def keep_compiled_programs() -> None:
    """Turns the cache on, if the user has not chosen a folder, or none.

    For entry points, before anything is compiled. Processes may share the folder: JAX locks it.
    """
    if jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:
        return
    folder = default_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        distributed.warn(
            f"{folder} cannot be made ({error.strerror}), so that programs are compiled anew in "
            "every process; JAX_COMPILATION_CACHE_DIR names another folder for them"
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if jax.config.jax_compilation_cache_max_size == -1:  # JAX's default: it grows for ever
        jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)


@functools.cache  # JAX would call a second one, too
def return_memory_of_compiling() -> None:
    """Has every program that took a second or more to compile followed by `malloc_trim`.

    For entry points, once. XLA's compiler frees what it took, but glibc keeps that for each of its
    threads, and the memory that the program takes comes on top of it. Without glibc's `malloc_trim`
    nothing is done.
    """
    if platform.system() != "Linux" or not hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        return

    def trim(event: str, seconds: float, **_) -> None:
        if event == _COMPILED and seconds >= _LONG:
            libc.malloc_trim(0)

    jax.monitoring.register_event_duration_secs_listener(trim)


def default_folder() -> pathlib.Path:
    """The folder for programs of this machine's processor, below the user's cache folder."""
    named = pathlib.Path(os.environ.get("XDG_CACHE_HOME", ""))
    # By the XDG base directory specification a relative path is to be ignored.
    home = named if named.is_absolute() else pathlib.Path("~/.cache").expanduser()
    return home / "promptkd_jax" / "compiled" / processor_kind(_cpuinfo())


def processor_kind(cpuinfo: str) -> str:
    """Names a kind of processor by its instructions: "x86_64-0d6f6ac2".

    XLA's programs for a CPU are machine code. JAX's keys do not surely know the processor, and XLA
    does no more than log that a program may have instructions which this one lacks (SIGILL).

    Args:
      cpuinfo: the text of Linux' /proc/cpuinfo, of whose processors the first is read; or any other
        text that names a processor.
    """
    first = cpuinfo.strip().split("\n\n")[0]
    fields = dict(map(str.strip, line.split(":", 1)) for line in first.splitlines() if ":" in line)
    told = [f"{name}: {fields[name]}" for name in _INSTRUCTIONS if name in fields] or [first]
    return f"{platform.machine()}-{hashlib.sha256(repr(told).encode()).hexdigest()[:8]}"


def _cpuinfo() -> str:
    try:
        return pathlib.Path("/proc/cpuinfo").read_text()
    except FileNotFoundError:  # not Linux
        return platform.processor() or platform.machine()
