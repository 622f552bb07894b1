"""The terminal: numbers for a person, and progress bars."""

import time
from collections.abc import Mapping
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from promptkd_jax.infra import distributed


def short_number(value: float | None, spec: str = "") -> str:
    """A number in about four digits, or by the format specification; "n/a" for None."""
    if value is None:
        return "n/a"
    return format(value, spec or (",.0f" if abs(value) >= 1000 else ".4g"))


def shows_control_codes(console: Console) -> bool:
    """Whether the console is a terminal, of which rich alone takes a log file for one if the
    environment has FORCE_COLOR."""
    return console.is_interactive and console.file.isatty()


class ProgressBar:
    """A progress bar on a terminal; elsewhere one plain line an update, free of control characters.

    Of the processes of a run, the first shows it:

        with ProgressBar(1000, "PromptKD", unit="step") as bar:
            bar.update(step, {"loss": 1.2})

    Args:
      total: how many make the bar full.
      description: what is being done, in a few words.
      unit: one of what is counted, for the plain lines.
      first: how many were done before.
      plain_seconds: least time between two plain lines, but for the last.
      console: where to show it, standard output unless told.
    """

    def __init__(
        self,
        total: int,
        description: str,
        *,
        unit: str,
        first: int = 0,
        plain_seconds: float = 10.0,
        console: Console | None = None,
    ):
        self._console, self._unit, self._title = console or Console(), unit, description
        self._plain_seconds, self._plain_at = plain_seconds, -plain_seconds
        self._live = distributed.is_primary() and shows_control_codes(self._console)
        # The speed is that of the last ten minutes, since one update may take longer than rich's
        # half a minute. Compilation is not in it: the first sample is the first update.
        # On a narrow terminal only the figures wrap; all else keeps its width.
        whole, wrapping = Column(no_wrap=True), Column(no_wrap=False)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False, table_column=whole),
            BarColumn(bar_width=16, table_column=whole),
            MofNCompleteColumn(table_column=whole),
            TextColumn("{task.fields[figures]}", markup=False, table_column=wrapping),
            TimeRemainingColumn(table_column=whole),
            console=self._console,
            speed_estimate_period=600.0,
        )
        self._task = self._progress.add_task(description, total=total, completed=first, figures="")

    def update(self, done: int, figures: Mapping[str, float] | None = None, part: str = "") -> None:
        """Shows that so many are done, with figures of the last one by their labels, and which part
        of the whole it belongs to."""
        text = "  ".join(
            f"{label} {short_number(float(x))}" for label, x in (figures or {}).items()
        )
        what = f"{self._title}  {part}".strip()
        self._progress.update(self._task, description=what, completed=done, figures=text)
        if not self._live and distributed.is_primary():
            (task,) = self._progress.tasks
            now = time.monotonic()
            if now - self._plain_at >= self._plain_seconds or task.finished:
                self._plain_at = now
                print(self._plain_line(task), file=self._console.file, flush=True)

    def _plain_line(self, task: Task) -> str:
        parts = [task.description, f"{self._unit} {int(task.completed)}/{int(task.total)}"]
        parts += [task.fields["figures"]] if task.fields["figures"] else []
        if task.time_remaining is not None:
            minutes, seconds = divmod(int(task.time_remaining), 60)
            parts.append(f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left")
        return "  ".join(parts)

    def __enter__(self) -> Self:
        if self._live:
            self._progress.start()
        return self

    def __exit__(self, *exception) -> None:
        if self._live:
            self._progress.stop()
