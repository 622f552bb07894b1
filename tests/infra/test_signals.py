"""SIGTERM and Ctrl-C: an answer at once, an end as soon as nothing is lost, the usual status.

`BUSY` keeps the main thread inside of one call of C, as XLA does, for longer than any test waits.
"""

import signal
import subprocess
import sys
import time

import pytest

from promptkd_jax.infra import signals

BUSY = "hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)"
PROGRAM = """
import contextlib, hashlib, signal, sys, time
from promptkd_jax.infra import signals
signals.GRACE_SECONDS = 0.1
saved = []

def ready():
    print("ready", flush=True)

with signals.answered():
{body}
print("not stopped", flush=True)
"""
AT_ONCE = "time.sleep(1000)"
STEP = """
with signals.deferred("this step", lambda: not saved):
    ready()
    while not signals.stop_asked():
        time.sleep(0.01)
    print("finishing", flush=True)
    saved.append(True)
    signals.stop(signals.stop_asked())
"""
WRITING = """
written = []

def write():
    sys.stdin.readline()
    written.append(True)
    print("written", flush=True)

import threading
writer = threading.Thread(target=write, daemon=True)
writer.start()
with signals.awaited(lambda: not written):
    ready()
    try:
        {inside}
    except signals.Stopped:
        print("raised", flush=True)
        raise
"""

# JAX tells the processes of a run of its SIGTERM: here the handler that prints it.
OF_MANY = """
import os
told = []

def tell(*_):
    told.append(True)
    print("told", flush=True)

signal.signal(signal.SIGTERM, tell)

def end_all(status):
    print("all end", flush=True)
    os._exit(status)

"""


def start(body: str, many: bool = False) -> subprocess.Popen:
    indented = "".join(f"    {line}\n" for line in body.strip().splitlines())
    program = PROGRAM.format(body=indented)
    if many:
        head, body = program.split("with signals.answered()", 1)
        program = f"{head}{OF_MANY}with signals.answered(end_all){body}"
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("body", [AT_ONCE, BUSY])
def test_where_nothing_is_lost_a_signal_is_the_end(body, number):
    """Also where the main thread never comes back to Python."""
    process = start(f"ready()\n{body}")
    process.send_signal(number)
    output, errors = process.communicate()
    assert process.returncode == 128 + number
    assert output == "" and errors == (
        f"\npromptkd: {number.name}: stopping (a second one ends at once)\n"
    )


def test_a_step_is_finished_and_saved_first():
    process = start(STEP)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate()
    assert process.returncode == 143
    assert "SIGTERM: stopping after this step (a second one" in errors
    assert output == "finishing\n"


@pytest.mark.parametrize("inside", [AT_ONCE, BUSY])
def test_what_is_being_written_is_finished_first(inside):
    process = start(WRITING.replace("{inside}", inside))
    process.send_signal(signal.SIGTERM)
    assert process.stderr.readline() == "\n"
    assert "SIGTERM: stopping (a" in process.stderr.readline()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1.0)  # far longer than its time of grace
    output, _ = process.communicate("go on\n")
    assert process.returncode == 143
    assert output == ("written\n" if inside == BUSY else "written\nraised\n")


def test_a_second_signal_ends_whatever_is_lost():
    process = start(f'with signals.deferred("this step", lambda: True):\n    ready()\n    {BUSY}')
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "\n"
    assert "SIGINT: stopping after this step" in process.stderr.readline()
    time.sleep(2 * signals.ECHO_SECONDS)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert errors == "\npromptkd: SIGINT again: ending at once\n"


def test_a_signal_that_comes_twice_at_once_is_one():
    """GNU timeout signals its child, and then the group that the child is in."""
    process = start(STEP.replace("saved.append", "time.sleep(1)\n    saved.append"))
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate()
    assert (process.returncode, "finishing" in output) == (143, True)
    assert errors.count("promptkd:") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_of_many_processes_tells_the_others_and_all_end(number):
    process = start("ready()\nwhile True: time.sleep(0.01)", many=True)
    process.send_signal(number)
    output, errors = process.communicate()
    assert process.returncode == 128 + number
    assert output == "told\nall end\n"
    assert errors == f"\npromptkd: {number.name}: stopping (a second one ends at once)\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_of_many_processes_saves_with_the_others_first(number):
    """At the step that JAX says, once it was told."""
    process = start(STEP.replace("not sig", "not told or not sig"), many=True)
    process.send_signal(number)
    output, errors = process.communicate(timeout=600)  # for ever, were it not told
    assert process.returncode == 128 + number
    assert output == "told\nfinishing\n"
    assert f"{number.name}: stopping after this step (a second one" in errors


def test_a_second_signal_ends_one_of_many_processes_too():
    busy = f'with signals.deferred("this step", lambda: True):\n    ready()\n    {BUSY}'
    process = start(busy, many=True)
    for number, answer in (
        (signal.SIGINT, "SIGINT: stopping after this step (a second one ends at once)\n"),
        (signal.SIGTERM, "SIGTERM again: ending at once\n"),
    ):
        process.send_signal(number)
        assert process.stderr.readline() == "\n"
        assert process.stderr.readline() == f"promptkd: {answer}"
        time.sleep(1)  # what this process tells itself must be over
    assert process.wait() == 130


def test_handlers_are_those_of_before_afterwards():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with signals.answered():
        with signals.answered():  # a command that is part of another
            assert signal.getsignal(signal.SIGTERM) not in before
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert signals.stop_asked() == 0
