"""The progress of a run in the terminal."""

from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from promptkd_jax.evaluation.report import short_number, shows_control_codes
from promptkd_jax.infra import distributed

PROGRESS_FIGURES = {
    "loss": "loss",
    "kl_plain": "KL plain",
    "kl_prompted": "KL prompted",
    "tokens_per_second": "tokens/s",
}


class TrainingProgress:
    """A progress bar on a terminal; elsewhere one plain line an update, free of control characters.

    Shows the step, the metrics named in `PROGRESS_FIGURES` that the update has, and the time left;
    of the processes of a run, the first shows it:

        with TrainingProgress(1000, "PromptKD") as bar:
            bar.update(step, {"loss": 1.2, "tokens_per_second": 5400.0})

    Args:
      total_steps: the step at which the bar is full.
      description: what is being done, in a word or two.
      first_step: the step a resumed run starts from.
      console: where to show it, standard output unless told.
    """

    def __init__(
        self,
        total_steps: int,
        description: str,
        *,
        first_step: int = 0,
        console: Console | None = None,
    ):
        self._console = console or Console()
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
        self._task = self._progress.add_task(
            description, total=total_steps, completed=first_step, figures=""
        )

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows that `step` steps are done, with the metrics of the last one."""
        figures = "  ".join(
            f"{label} {short_number(float(metrics[name]))}"
            for name, label in PROGRESS_FIGURES.items()
            if name in metrics
        )
        self._progress.update(self._task, completed=step, figures=figures)
        if not self._live and distributed.is_primary():
            print(self._plain_line(), file=self._console.file, flush=True)

    def _plain_line(self) -> str:
        (task,) = self._progress.tasks
        parts = [task.description, f"step {int(task.completed)}/{int(task.total)}"]
        parts += [task.fields["figures"]] if task.fields["figures"] else []
        if task.time_remaining is not None:
            minutes, seconds = divmod(int(task.time_remaining), 60)
            parts.append(f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left")
        return "  ".join(parts)

    def __enter__(self) -> "TrainingProgress":
        if self._live:
            self._progress.start()
        return self

    def __exit__(self, *exception) -> None:
        if self._live:
            self._progress.stop()
