"""SIGTERM and Ctrl-C: answered within a second, obeyed as soon as nothing is lost by it.

Python runs a signal's handler between two instructions of the main thread, one of which may be
minutes of XLA. So the answer comes from a thread, which the interpreter tells of signals at once
(`signal.set_wakeup_fd`). Then

* the handler raises `Stopped` in the main thread, unless what was done has to be saved first
  (`deferred`), or something is being written (`awaited`): then it is called once more afterwards.
  Should the main thread not get to it, the process ends `GRACE_SECONDS` later;
* a second signal ends the process where it is. One that comes at once is none: `timeout` and some
  schedulers signal a process and then its whole group.

Of many processes JAX listens to SIGTERM, so that all save at the same step and stop
(`Checkpoints.reached_preemption`). There a signal is answered and passed on to JAX, nothing is
raised, and should the main thread not get to it, all processes end together.

The exit status is the conventional one, 128 + the signal's number, so that `train && evaluate` does
not go on. The interpreter is not torn down: threads of XLA may still compute with what it frees.
"""

import atexit
import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

GRACE_SECONDS = 5.0
ECHO_SECONDS = 0.2  # within which the same signal is the first once more
_POLL_SECONDS = 0.05


class Stopped(SystemExit):
    """The end by a signal: status 143 for SIGTERM, 130 for Ctrl-C."""

    def __init__(self, number: int):
        super().__init__(128 + number)


def _no() -> bool:
    return False


class _Listener:
    """The first signal that came, and what has to be done before it is obeyed."""

    def __init__(self, end_all: Callable[[int], None] | None):
        self.number, self._heard, self._end_all = 0, 0.0, end_all
        self.numbers = (signal.SIGINT,) if end_all else (signal.SIGTERM, signal.SIGINT)
        self.until, self.unsaved, self.writing = "", _no, _no
        self.raised, self._answered = False, threading.Event()
        self._own = False  # whether the next signal is of `_insist`, and so none
        self._hearing = threading.Lock()

    def handle(self, number: int, _: Any) -> None:
        """Runs in the main thread."""
        if not (self._end_all or self.raised or self._busy()):
            self.raised = True
            self._answered.wait(1.0)
            raise Stopped(self.number or number)

    def watch(self, pipe: int) -> None:
        """Runs in a thread, until the other end of the pipe is closed."""
        while numbers := os.read(pipe, 1):
            if numbers[0] in self.numbers:
                self._hear(numbers[0])
        os.close(pipe)

    def watch_chained(self, pipe: int) -> None:
        """The same for SIGTERM, of which `faulthandler` writes a trace, in pieces."""
        while os.read(pipe, 2**16):
            self._hear(signal.SIGTERM)
            time.sleep(_POLL_SECONDS)
            os.set_blocking(pipe, False)
            with contextlib.suppress(BlockingIOError):
                while os.read(pipe, 2**16):
                    pass
            os.set_blocking(pipe, True)
        os.close(pipe)

    def _hear(self, number: int) -> None:
        with self._hearing:
            if self._own:
                self._own = False
                return
            name = signal.Signals(number).name
            if number == self.number and time.monotonic() - self._heard < ECHO_SECONDS:
                return
            if self.number:
                _say(f"{name} again: ending at once")
                _end(128 + self.number)
            self.number, self._heard = number, time.monotonic()
        after = f" after {self.until}" if self.unsaved() else ""
        _say(f"{name}: stopping{after} (a second one ends at once)")
        self._answered.set()
        threading.Thread(target=self._insist, daemon=True).start()

    def _insist(self) -> None:
        """Runs in a thread: ends what does not end by itself."""
        if self._end_all and self.number != signal.SIGTERM:
            self._own = True
            signal.raise_signal(signal.SIGTERM)  # which is what JAX listens to
        self._rest()
        if not (self._end_all or self.raised):
            self._own = True
            signal.pthread_kill(threading.main_thread().ident, self.number)  # once more
        time.sleep(GRACE_SECONDS)
        self._rest()
        (self._end_all or _end)(128 + self.number)

    def _rest(self) -> None:
        while self._busy():
            time.sleep(_POLL_SECONDS)

    def _busy(self) -> bool:
        return self.unsaved() or self.writing()


_listener: _Listener | None = None  # signals are the process's, and so is who listens


@contextlib.contextmanager
def answered(end_all: Callable[[int], None] | None = None) -> Iterator[None]:
    """Listens to SIGTERM and Ctrl-C while a command runs in the main thread.

    Args:
      end_all: of many processes, what ends all with an exit status. JAX, whose processes they are,
        listens to SIGTERM already.

    Raises:
      Stopped: where a signal is obeyed.
    """
    global _listener
    if _listener is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    _listener = _Listener(end_all)
    pipes = [_pipe_to(_listener.watch)]
    os.set_blocking(pipes[0], False)
    woken = signal.set_wakeup_fd(pipes[0], warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, _listener.handle) for number in _listener.numbers}
    if end_all:  # JAX's handler is none of Python's; `faulthandler` calls it after its own
        pipes.append(_pipe_to(_listener.watch_chained))
        faulthandler.register(signal.SIGTERM, pipes[1], all_threads=False, chain=True)
    stopped = False
    try:
        yield
    except Stopped as stop:
        stopped = True
        if not end_all:
            atexit.register(_end, stop.code)  # until then a second signal still ends the process
        raise
    finally:
        if not stopped:
            _restore(handlers, woken, pipes)


def _pipe_to(watch: Callable[[int], None]) -> int:
    """The end to write to of a pipe that a thread reads."""
    reading, writing = os.pipe()
    threading.Thread(target=watch, args=[reading], daemon=True).start()
    return writing


def _restore(handlers: dict, woken: int, pipes: list[int]) -> None:
    global _listener
    for number, handler in handlers.items():
        signal.signal(number, handler)
    signal.set_wakeup_fd(woken)
    if len(pipes) > 1:
        faulthandler.unregister(signal.SIGTERM)
    for pipe in pipes:
        os.close(pipe)
    _listener = None


@contextlib.contextmanager
def deferred(until: str, unsaved: Callable[[], bool]) -> Iterator[None]:
    """Lets the body finish what it does before a signal is obeyed.

    Args:
      until: what is finished first, for the answer, such as "this step".
      unsaved: whether something would be lost now; then the body has to ask `stop_asked`, to save,
        and to `stop`. Called from another thread, too.
    """
    if _listener is None:
        yield
        return
    before = _listener.until, _listener.unsaved
    _listener.until, _listener.unsaved = until, unsaved
    try:
        yield
    finally:
        _listener.until, _listener.unsaved = before


@contextlib.contextmanager
def awaited(writing: Callable[[], bool]) -> Iterator[None]:
    """Lets what is being written become whole before a signal is obeyed: whoever waits for it, as
    Orbax does, may lose it where the waiting is broken off.

    Args:
      writing: whether something is; called from another thread.
    """
    if _listener is None:
        yield
        return
    before, _listener.writing = _listener.writing, writing
    try:
        yield
    finally:
        _listener.writing = before


def stop(number: int) -> NoReturn:
    """Raises `Stopped`, where the body of `deferred` has saved; the handler raises no second."""
    if _listener:
        _listener.raised = True
    raise Stopped(number)


def stop_asked() -> int:
    """The number of the signal that has come, 0 where none has."""
    return _listener.number if _listener else 0


def _say(text: str) -> None:
    """Writes past the locks of `sys.stderr`, which the main thread may hold in half a line."""
    with contextlib.suppress(OSError):
        os.write(2, f"\npromptkd: {text}\n".encode())


def _end(status: int) -> None:
    """Ends the process."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            if stream.isatty():
                stream.write("\x1b[?25h")  # a progress bar may have hidden the cursor
            stream.flush()
    os._exit(status)
