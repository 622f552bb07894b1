"""Many processes as one run: how they start, agree, speak with one voice, and end together.

Every process runs the same program on the same global arrays (JAX's multi-controller runtime). What
is on the host is computed by all of them alike; the first writes files and speaks for all.
"""

import argparse
import atexit
import contextlib
import hashlib
import json
import os
import platform
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

_FAILURES = "promptkd_jax/failures/"
_POLL_SECONDS = 1.0
_ending = threading.Lock()  # held by whoever ends this process


class HostsError(RuntimeError):
    """Processes that cannot be one run; says which, and what would be right."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `together`."""
    group = parser.add_argument_group(
        "many processes", "Found by themselves on Slurm, Cloud TPU (GCE, GKE) and under Open MPI."
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    group.add_argument("--processes", type=int, help="how many there are")
    group.add_argument("--process", type=int, help="which of them this is, from 0")
    group.add_argument(
        "--start-timeout", type=int, default=300, metavar="SECONDS", help="for all to come together"
    )
    group.add_argument(
        "--heartbeat", type=int, default=60, metavar="SECONDS", help="until a silent one is dead"
    )


@contextlib.contextmanager
def together(options: argparse.Namespace) -> Iterator[None]:
    """Starts the processes of a run; where one fails, all say why, and end.

    For entry points, before anything touches a device. On a machine that belongs to no cluster, and
    without flags, there is one process and nothing to start. Only the first process writes to
    stdout.

    Args:
      options: with the flags of `add_arguments`.

    Raises:
      HostsError: flags that do not say who this process is.
      SystemExit: the others did not come, or one of them failed.
    """
    _start(options)
    if jax.process_count() == 1:
        yield
        return
    if not is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (as long as the process)
    over = threading.Event()
    atexit.register(over.set)  # before the connection ends
    threading.Thread(target=_watch, args=[over], daemon=True).start()
    try:
        yield
    except BaseException as error:
        if isinstance(error, SystemExit) and not error.code:
            raise
        _end_all(error)


def is_first() -> bool:
    """Whether this process is the one that writes files."""
    return jax.process_index() == 0


def on_first(compute: Callable[[], Any]) -> Any:
    """`compute()` of the first process, on all of them; it must be a JSON value."""
    if jax.process_count() == 1:
        return compute()
    content = json.dumps(compute()).encode() if is_first() else b""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    padded = np.zeros(max(1024, 1 << size.bit_length()), np.uint8)  # few sizes: few compilations
    padded[: len(content)] = np.frombuffer(content, np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded))[:size].tobytes())


def agree(what: str, text: str) -> None:
    """Checks that all processes hold the same `text`.

    Raises:
      HostsError: on every process, where one holds another; says which.
    """
    if jax.process_count() == 1:
        return
    ours = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    all_of_them = np.asarray(multihost_utils.process_allgather(ours))
    others = [i for i, digest in enumerate(all_of_them) if (digest != all_of_them[0]).any()]
    if others:
        raise HostsError(
            f"{what} of process {', '.join(map(str, others))} is not that of process 0 (this is "
            f"process {jax.process_index()} on {platform.node()}); all {len(all_of_them)} need the "
            "same"
        )


def _start(options: argparse.Namespace) -> None:
    given = options.coordinator, options.processes, options.process
    if any(x is not None for x in given) and None in given:
        raise HostsError(
            "--coordinator, --processes and --process belong together: give all three or none"
        )
    if options.processes == 1:
        return
    where = options.coordinator or "the coordinator that the cluster's environment names"
    late = (
        f"promptkd: no connection of all {options.processes or ''} processes through {where} "
        f"within {options.start_timeout} s (--start-timeout); this is process {options.process} on "
        f"{platform.node()}. Is process 0 running, is the address right, is the port open?"
    )
    timer = threading.Timer(options.start_timeout, _leave, [late.replace("  ", " ")])
    timer.start()  # JAX's own time limit ends in an abort that names no address
    try:
        jax.distributed.initialize(
            *given,
            initialization_timeout=options.start_timeout + 10,
            heartbeat_timeout_seconds=options.heartbeat,
        )
    except ValueError as error:
        if given != (None, None, None) or "coordinator_address" not in str(error):
            raise HostsError(f"--coordinator, --processes, --process: {error}") from error
        # No cluster: one process.
    finally:
        timer.cancel()


def _watch(over: threading.Event) -> None:
    """Ends this process when another has failed, also in the middle of a collective operation."""
    client = multihost.get_jax_distributed_client()
    while not over.wait(_POLL_SECONDS):
        if failures := client.key_value_dir_get(_FAILURES):
            if _ending.acquire(blocking=False):
                _leave("\n".join(message for _, message in failures))
            return


def _end_all(error: BaseException) -> None:
    """Says what went wrong here, lets the others know, and does not wait for them."""
    if not _ending.acquire(blocking=False):
        time.sleep(60)  # another thread ends the process
    if isinstance(error, SystemExit):
        message = str(error.code)
    else:
        message = "".join(traceback.format_exception(error)).rstrip()
    who = f"process {jax.process_index()} on {platform.node()}"
    multihost.get_jax_distributed_client().key_value_set(
        f"{_FAILURES}{jax.process_index()}", f"{who}: {message}"
    )
    _leave(message)


def _leave(message: str) -> None:
    """Ends the process whatever its threads wait for; the first stays until all have read why."""
    print(message, file=sys.stderr, flush=True)
    if jax.distributed.is_initialized() and is_first():
        time.sleep(3 * _POLL_SECONDS)
    os._exit(1)
