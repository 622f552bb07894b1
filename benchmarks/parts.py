"""The parts of a check, one after the other, each under a time limit of its own.

python benchmarks/parts.py FILE.json [--seconds 580] <LIST

A line of the list is a part's name, its limit in seconds, and its command, quoted as in a shell.
`parts` of FILE says how each ended, as soon as it has:

    status   "begun", "done", "failed" (its exit status was not 0), "over its limit", "stopped" (by
             a signal to this program) or "no time left" (of --seconds, which all parts share)
    exit, seconds, limit, command, date, and tail, the last lines that it printed

A part and all processes of its group are gone before the next begins. Parts that are done in FILE
are left out, so that the same command goes on where it was stopped. All output goes to FILE.log
too. The exit status is 0 if all parts are done, 1 if not, and 128 + n after signal n.
"""

import argparse
import collections
import contextlib
import datetime
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from typing import TextIO

import report

TAIL, WIDTH = 200, 400  # lines that are kept, and characters of each
HERE = f"{os.getcwd()}/"  # says nothing in a file that others read
GRACE = 5.0  # seconds between asking a group to end and ending it
LEAST = 1.0  # seconds: with less left no part begins
_signals: list[int] = []  # that were caught


def run_all(lines: Iterable[str], file: pathlib.Path, seconds: float) -> dict[str, dict]:
    """Runs the parts of a list; returns how each of them ended, then or before."""
    end, parts = time.monotonic() + seconds, {}
    with file.with_suffix(".log").open("a") as log:
        for line in lines:
            name, limit, *command = shlex.split(line)
            before = report.read(file).get("parts", {}).get(name)
            if before and before["status"] == "done":
                print(f"{name}: done before", flush=True)
                parts[name] = before
                continue
            if _signals:
                break
            limit = max(0.0, min(float(limit), end - time.monotonic()))
            if limit >= LEAST:
                _record(file, name, _described(command, limit) | {"status": "begun"})
                print(f"{name}: {shlex.join(command)}", flush=True)
                parts[name] = run(command, limit, log)
            else:
                parts[name] = before or _described(command, limit) | {"status": "no time left"}
            _record(file, name, parts[name])
            print(f"{name}: {parts[name]['status']}, {parts[name]['seconds']:.0f} s", flush=True)
    return parts


def run(command: Sequence[str], limit: float, log: TextIO) -> dict:
    """Runs one part; returns how it ended."""
    tail, begin = collections.deque(maxlen=TAIL), time.monotonic()
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        process_group=0,  # but of this session: who ends that ends the part too
    )

    def pump() -> None:
        for line in child.stdout:
            tail.append(line.rstrip("\n").replace(HERE, "")[:WIDTH])
            print(line, end="", flush=True)
            print(line, end="", file=log, flush=True)

    pumping = threading.Thread(target=pump, daemon=True)  # a stray process may hold the pipe
    pumping.start()
    while child.poll() is None and not _signals and time.monotonic() - begin < limit:
        time.sleep(0.05)
    ended = {None: "stopped" if _signals else "over its limit", 0: "done"}
    status = ended.get(child.returncode, "failed")
    _end_group(child)
    pumping.join(GRACE)
    seconds = time.monotonic() - begin
    more = {"status": status, "exit": child.returncode, "seconds": seconds, "tail": list(tail)}
    return _described(command, limit) | more


def _described(command: Sequence[str], limit: float) -> dict:
    """What is known of a part before it runs."""
    return {
        "status": None,
        "exit": None,
        "seconds": 0.0,
        "limit": limit,
        "command": shlex.join(command).replace(HERE, ""),
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
        "tail": [],
    }


def _end_group(child: subprocess.Popen) -> None:
    """Ends a part and what it started: first by asking, then without."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        end = time.monotonic() + GRACE
        with contextlib.suppress(ProcessLookupError):  # nobody is left
            os.killpg(child.pid, number)
            while time.monotonic() < end:
                child.poll()
                os.killpg(child.pid, 0)
                time.sleep(0.05)
            continue
        break


def _record(file: pathlib.Path, name: str, part: dict) -> None:
    result = report.read(file)
    result["parts"] = result.get("parts", {}) | {name: part}
    report.write(file, result)


def main() -> None:
    """Runs the parts that the standard input lists."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=pathlib.Path, metavar="FILE.json")
    parser.add_argument("--seconds", type=float, default=580, help="of all parts together")
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda caught, _: _signals.append(caught))
    parts = run_all(sys.stdin.read().splitlines(), options.file, options.seconds)
    print(report.parts_table(parts))
    if _signals:
        sys.exit(128 + _signals[0])
    sys.exit(any(part["status"] != "done" for part in parts.values()))


if __name__ == "__main__":
    main()
