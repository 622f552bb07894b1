"""Many processes as one run: how they start, agree, speak with one voice, and end together.

Every process runs the same program on the same global arrays (JAX's multi-controller runtime). What
is on the host is computed by all of them alike; the first writes files and speaks for all.

They talk through the key-value store of JAX's coordinator. Within a `session`, a failure ends all:

1. The process that fails writes its exit status and message to the store, and ends (`_end_all`).
2. A thread of every other one polls the store, says the message, and ends the process with that
   status, also in the middle of a collective operation (`_watch`).
3. The first one ends last, since the store is gone with it (`_leave`).

A process that dies without a word is missed by JAX's heartbeat, which aborts the others.
"""

import argparse
import atexit
import contextlib
import functools
import hashlib
import itertools
import json
import os
import platform
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax

from promptkd_jax.infra import signals
from promptkd_jax.infra.errors import HostsError

# The exit status of many processes where a device or a connection failed, so that starting them
# again may help; 1 says that it will not. (JAX itself aborts where a process is dead: 134.)
RESTART = 42
_FAILURES = "promptkd_jax/failures/"
_POLL_SECONDS = 1.0
_FOREVER = 10**9  # milliseconds: 11 days; who waits for a dead process is ended by its heartbeat
_numbers = itertools.count()  # of the calls by which processes talk; the same on all
# How JAX says that there is no cluster, or that it computes already, and so with one process.
_ALONE = ("coordinator_address should be defined", "before any JAX calls")
_ending = threading.Lock()  # held by whoever ends this process


@contextlib.contextmanager
def session(options: argparse.Namespace) -> Iterator[None]:
    """Starts the processes of a run; where one fails, all say why, and end.

    For entry points, before anything touches a device. On a machine that belongs to no cluster, and
    without flags, there is one process, and nothing to start but to listen to signals. Of many only
    the first writes to stdout.

    Args:
      options: with the flags of `flags.add_processes`.

    Raises:
      SystemExit: flags that do not say who this process is. (Where the others do not come, or one
        of them fails, the process ends at once.)
    """
    try:
        _start(options)
    except HostsError as error:
        sys.exit(f"promptkd: {error}")
    if is_single_process():
        with signals.answered():
            yield
        return
    if not is_primary():
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())
    over = threading.Event()
    atexit.register(over.set)  # before the connection ends
    threading.Thread(target=_watch, args=[over], daemon=True).start()
    try:
        with signals.answered(_stop_all):
            yield
    except BaseException as error:  # whatever it is, the others must not wait for this process
        if isinstance(error, signals.Stopped) or (isinstance(error, SystemExit) and not error.code):
            raise
        _end_all(error)


def is_primary() -> bool:
    """Whether this process is the one that writes files."""
    return is_single_process() or jax.process_index() == 0


def is_single_process() -> bool:
    """Whether there is one process; where none was started, without touching a device."""
    return not jax.distributed.is_initialized() or jax.process_count() == 1


def run_on_primary(compute: Callable[[], Any]) -> Any:
    """`compute()` of the first process, on all of them; it must be a JSON value.

    The others wait, for as long as it takes and the first is alive.
    """
    if is_single_process():
        return compute()
    key = f"promptkd_jax/first/{next(_numbers)}"
    if is_primary():
        _store().key_value_set_bytes(key, json.dumps(compute()).encode())
    return json.loads(_store().blocking_key_value_get_bytes(key, _FOREVER))


def all_gather(value: Any) -> list[Any]:
    """Gathers a JSON value of every process, in their order, on all of them."""
    if is_single_process():
        return [value]
    key = f"promptkd_jax/gather/{next(_numbers)}"
    _store().key_value_set_bytes(f"{key}/{jax.process_index()}", json.dumps(value).encode())
    return [
        json.loads(_store().blocking_key_value_get_bytes(f"{key}/{process}", _FOREVER))
        for process in range(jax.process_count())
    ]


def assert_same(what: str, text: str) -> None:
    """Checks that all processes hold the same `text`; they wait for one another.

    Raises:
      HostsError: on every process, where one holds another; says which.
    """
    digests = all_gather(hashlib.sha256(text.encode()).hexdigest())
    others = [process for process, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise HostsError(
            f"{what} of process {', '.join(map(str, others))} is not that of process 0 (this is "
            f"process {jax.process_index()} on {platform.node()}); all {len(digests)} need the same"
        )


def assert_same_options(options: argparse.Namespace) -> None:
    """`assert_same` on all flags but who a process is."""
    same = {name: value for name, value in vars(options).items() if name != "process"}
    assert_same("the command line", str(sorted(same.items())))


@functools.cache
def warn(message: str) -> None:
    """Says on stderr what does not stop a run: once, by the first process."""
    if is_primary():
        print(f"warning: {message}", file=sys.stderr, flush=True)


def _store():
    """JAX's key-value store, which the coordinator keeps."""
    from orbax.checkpoint import multihost  # a third of a second, for several processes alone

    return multihost.get_jax_distributed_client()


def _start(options: argparse.Namespace) -> None:
    given = options.coordinator, options.processes, options.process
    if any(x is not None for x in given) and None in given:
        raise HostsError(
            "--coordinator, --processes and --process belong together: give all three or none"
        )
    if options.coordinator and not re.fullmatch(r".+:\d+", options.coordinator):
        raise HostsError(f"--coordinator: {options.coordinator!r} is not HOST:PORT")
    if options.coordinator and not 0 <= options.process < options.processes:
        raise HostsError(
            f"--process: {options.process} is none of {options.processes}, counted from 0"
        )
    if options.processes == 1 or jax.distributed.is_initialized():
        return
    if not options.coordinator and os.environ.get("SLURM_NTASKS") == "1":
        return  # JAX would give the only task one GPU of all that it has
    if options.coordinator:
        print(
            f"promptkd: process {options.process} of {options.processes} on {platform.node()} "
            f"waits for the others at {options.coordinator}, {options.start_timeout} s at most",
            file=sys.stderr,
            flush=True,
        )
    if options.process:
        _await_coordinator(options.coordinator, options.start_timeout)
    where = options.coordinator or "the address that the cluster's environment gives"
    late = (
        f"promptkd: not all processes came together at {where} within {options.start_timeout} s "
        f"(--start-timeout), seen from {platform.node()}"
    )
    timer = threading.Timer(options.start_timeout, _give_up, [late])
    timer.daemon = True
    timer.start()  # JAX's own limit ends in an abort that says nothing of this
    try:
        jax.distributed.initialize(
            *given,
            initialization_timeout=options.start_timeout + 30,
            heartbeat_timeout_seconds=options.heartbeat,
        )
    except (ValueError, RuntimeError) as error:
        if given != (None, None, None) or not any(text in str(error) for text in _ALONE):
            raise HostsError(f"--coordinator, --processes, --process: {error}") from error
    finally:
        timer.cancel()


def _give_up(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
    os._exit(1)


def _await_coordinator(address: str, seconds: int) -> None:
    """Raises HostsError where nobody listens at `address`; JAX would abort, naming no address."""
    host, _, port = address.rpartition(":")
    end, problem = time.monotonic() + seconds, None
    while (left := end - time.monotonic()) > 0:
        try:
            socket.create_connection((host, int(port)), timeout=left).close()
            return
        except OSError as error:
            problem = error
            time.sleep(min(left, 0.5))
    raise HostsError(
        f"--coordinator: no process answers at {address} within {seconds} s (--start-timeout): "
        f"{problem}. Is process 0 running, is the address right, is the port open?"
    )


def _watch(over: threading.Event) -> None:
    """Ends this process when another has failed, also in the middle of a collective operation."""
    while not over.wait(_POLL_SECONDS):
        if found := _failures():
            if _ending.acquire(blocking=False):
                _leave(*found)
            return


def _failures() -> tuple[int, str] | None:
    """The exit status that other processes have ended with, and why."""
    try:
        found = [json.loads(text) for _, text in _store().key_value_dir_get(_FAILURES)]
    except jax.errors.JaxRuntimeError:  # the first is gone, and with it the store
        return None
    if not found:
        return None
    return min(status for status, _ in found), "\n".join(message for _, message in found)


def _end_all(error: BaseException) -> None:
    """Says what went wrong here, lets the others know, and does not wait for them."""
    while not _ending.acquire(timeout=60):
        pass  # the thread that watches ends the process
    if isinstance(error, SystemExit):
        found = 1, str(error.code)
    else:
        status = RESTART if isinstance(error, jax.errors.JaxRuntimeError) else 1
        trace = "".join(traceback.format_exception(error)).rstrip()
        # Maybe another one has ended in the middle of what they did together, and has said why.
        found = _failures() or (status, trace)
    _tell(*found)
    _leave(*found)


def _stop_all(status: int) -> None:
    """The end of all processes by a signal that this one got."""
    if _ending.acquire(blocking=False):
        message = f"stopped by {signal.Signals(status - 128).name}; the same command continues"
        _tell(status, message)
        _leave(status, message)


def _tell(status: int, message: str) -> None:
    """Lets the other processes know why they have to end."""
    said = json.dumps([status, f"process {jax.process_index()} on {platform.node()}: {message}"])
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # where the first is gone with its store
        _store().key_value_set(f"{_FAILURES}{jax.process_index()}", said)


def _leave(status: int, message: str) -> None:
    """Ends the process whatever its threads wait for, when the others have read why."""
    sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)
    time.sleep((6 if is_primary() else 3) * _POLL_SECONDS)  # the store is gone with the first
    os._exit(status)
