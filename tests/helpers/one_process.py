"""One process of a run of test_processes.py: `promptkd train`, slower.

In the environment: `PAUSE_AT=STEP`, the checkpoint of that step is never finished; `STEP_SECONDS`,
how long a step takes at least; `FAIL_ON=PROCESS`, this one cannot read its data; `HANG_IN=FILE`,
the first writes it and never reads its data.
"""

import ctypes
import os
import pathlib
import re
import signal
import sys
import time

import jax

from promptkd_jax.cli.main import main
from promptkd_jax.infra.errors import DataError
from promptkd_jax.training import run_data
from promptkd_jax.training.checkpoint import Checkpoints

write_checksums, save, read = (
    Checkpoints._write_checksums,
    Checkpoints.save,
    run_data.Records,
)


def pause(self):
    while str(self._pending) == os.environ.get("PAUSE_AT"):
        (self._directory / "paused").touch()
        time.sleep(0.1)
    write_checksums(self)


def slow_save(self, *args, **kwargs):
    time.sleep(float(os.environ.get("STEP_SECONDS", "0")))
    return save(self, *args, **kwargs)


def failing_read(*args, **kwargs):
    if str(jax.process_index()) == os.environ.get("FAIL_ON"):
        raise DataError("there is no such file")
    if "HANG_IN" in os.environ and jax.process_index() == 0:
        pathlib.Path(os.environ["HANG_IN"]).touch()
        mutex = ctypes.create_string_buffer(64)
        while True:  # the second time without end, and never back in Python
            ctypes.CDLL(None).pthread_mutex_lock(mutex)
    return read(*args, **kwargs)


Checkpoints._write_checksums, Checkpoints.save = pause, slow_save
run_data.Records = failing_read
try:
    main(["train", *sys.argv[1:]])
finally:
    if jax.distributed.is_initialized():
        (caught,) = re.findall(r"SigCgt:\s*(\w+)", pathlib.Path("/proc/self/status").read_text())
        if not int(caught, 16) >> (signal.SIGTERM - 1) & 1:
            print("nobody listens to SIGTERM any more", file=sys.stderr)
