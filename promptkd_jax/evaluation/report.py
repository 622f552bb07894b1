"""What a person sees of a run: metrics on disk, progress in the terminal, the HTML report.

Metrics live in `workdir/metrics.jsonl`, one JSON object a line, and are the only input of the
curves: the report can be written again at any time, also of a run that was killed.
"""

import io
import json
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple

import jinja2
from etils import epath
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from promptkd_jax.infra import distributed
from promptkd_jax.infra.files import Lines, is_remote, make_folder, to_path, write_text

METRICS_FILE = "metrics.jsonl"
REPORT_FILE = "report.html"

PROGRESS_FIGURES = {
    "loss": "loss",
    "kl_plain": "KL plain",
    "kl_prompted": "KL prompted",
    "tokens_per_second": "tokens/s",
}


class MetricWriter:
    """Appends metrics to `workdir/metrics.jsonl` and to TensorBoard files in `workdir/tensorboard`.

    All processes of a run have one; that of the first writes. To resume, call `truncate_metrics`
    first; the TensorBoard files, of which a killed run has lost the end, are then made anew from
    the rows of the file, each step at its old time where they still tell it.

    In a bucket the file is written anew, every few seconds and when flushed or closed (see
    `files.Lines`), and there is no TensorBoard: tensorboardX would stop the run for good at the
    first upload that fails.

    Raises:
      ValueError: if the file ends in a torn line or holds a line that is not a metrics row.
    """

    def __init__(self, workdir: str | os.PathLike):
        self._lines = self._tensorboard = None
        if distributed.is_first():
            self._open(to_path(workdir) / METRICS_FILE)

    def _open(self, path: epath.Path) -> None:
        make_folder(path.parent)
        path.touch()
        rows, torn = _parse(path)
        if torn:
            raise ValueError(
                f"{path}:{len(rows) + 1}: torn line {torn[:60]!r}: call truncate_metrics with the "
                "step to resume from before a MetricWriter is opened"
            )
        self._lines = Lines(path)
        if is_remote(path):
            print(f"{path.parent}: is in a bucket, where no TensorBoard files are written")
            return
        from tensorboardX import SummaryWriter  # takes seconds: it imports torch where there is one

        folder = path.parent / "tensorboard"
        earlier = list(folder.glob("events.out.tfevents.*"))
        times = _event_times(earlier)
        for file in earlier:
            file.unlink()
        # purge_step: a TensorBoard that is open now forgets what it has.
        self._tensorboard = SummaryWriter(logdir=str(folder), purge_step=0)
        wall_time = min(times.values(), default=time.time())
        for row in rows:
            wall_time = times.get(row["step"], wall_time)
            self._show(row.pop("step"), row, wall_time)

    def write(self, step: int, metrics: Mapping[str, float | str]) -> None:
        """Appends the metrics of one step: numbers (or scalar arrays), and names such as `stage`.

        JSON has no NaN and no infinity: such a number is stored as null, which `read_metrics` gives
        back as NaN, and is left out of TensorBoard, as names are.
        """
        if "step" in metrics:
            raise ValueError(f"metrics of step {step} have a key 'step' of their own: rename it")
        values = {
            name: value if isinstance(value, str) else float(value)
            for name, value in metrics.items()
        }
        if self._lines is not None:
            self._lines.append(_json_line({"step": int(step)} | values))
        if self._tensorboard is not None:
            self._show(int(step), values, time.time())

    def _show(self, step: int, values: Mapping[str, float | str], wall_time: float) -> None:
        for name, value in values.items():
            if not isinstance(value, str) and math.isfinite(value):
                self._tensorboard.add_scalar(name, value, step, walltime=wall_time)

    def flush(self) -> None:
        """Writes what waits: before a checkpoint, after which a resumed run goes on."""
        if self._lines is not None:
            self._lines.flush()

    def close(self) -> None:
        self.flush()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def _event_times(files: Iterable[epath.Path]) -> dict[int, float]:
    """When each step was written, in seconds since 1970, as far as TensorBoard files tell."""
    from google.protobuf.message import DecodeError
    from tensorboardX.proto.event_pb2 import Event

    times = {}
    for file in files:
        data, start = file.read_bytes(), 0
        while start + 12 < len(data):  # 8 bytes of length, 4 of checksum, the event, 4 of checksum
            end = start + 12 + int.from_bytes(data[start : start + 8], "little")
            try:
                event = Event.FromString(data[start + 12 : end])
            except DecodeError:
                break  # the torn end
            if event.HasField("summary"):
                times[event.step] = event.wall_time
            start = end + 4
    return times


def read_metrics(workdir: str | os.PathLike) -> list[dict]:
    """The rows of `workdir/metrics.jsonl`, in file order, with NaN for null.

    A last line without its newline, as a killed run leaves it, is not a row.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if any other line is not a JSON object with a whole-numbered "step".
    """
    return _parse(to_path(workdir) / METRICS_FILE)[0]


def truncate_metrics(workdir: str | os.PathLike, step: int, *, evaluated: bool = True) -> None:
    """Removes the rows after `step`, and a torn last line, so that a resumed run has no step twice.

    The file is replaced atomically, by the first process. Without a file there is nothing to
    remove.

    Args:
      evaluated: whether the evaluation of `step` stays; otherwise it is made again.

    Raises:
      ValueError: as `read_metrics`.
    """
    path = to_path(workdir) / METRICS_FILE
    if distributed.is_first() and path.exists():
        rows = [row for row in read_metrics(workdir) if row["step"] <= step]
        if not evaluated:
            rows = [row for row in rows if row["step"] < step or "dev/loss" not in row]
        write_text(path, "".join(map(_json_line, rows)))


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
        self._live = distributed.is_first() and _shows_control_codes(self._console)
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
            f"{label} {_number(float(metrics[name]))}"
            for name, label in PROGRESS_FIGURES.items()
            if name in metrics
        )
        self._progress.update(self._task, completed=step, figures=figures)
        if not self._live and distributed.is_first():
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


def summary_table(
    rows: Sequence[tuple[str, float | None, float | None]],
    paths: Mapping[str, str],
    *,
    console: Console | None = None,
) -> str:
    """The end of a run as text to print: metric, before, after, change; then where its files lie.

    Args:
      rows: (name, value before, value after); None where there is no such value.
      paths: what lies where, such as {"report": "runs/a/report.html"}; never cut or wrapped.
      console: whose width and colours to use, those of standard output unless told; off a terminal
        the text has no control characters.
    """
    console = console or Console()
    styled = _shows_control_codes(console)
    text = Console(
        file=io.StringIO(),
        width=console.width if styled else 120,
        force_terminal=styled,
        no_color=not styled,
    )
    table = Table("metric", box=None, padding=(0, 3, 0, 0), header_style="bold")
    for heading in ("before", "after", "change"):
        table.add_column(heading, justify="right")
    for name, before, after in rows:
        table.add_row(Text(name), _number(before), _number(after), _change(before, after))
    text.print(table)
    width = max(map(len, paths), default=0)
    for label, path in paths.items():
        text.print(Text.assemble((label.ljust(width), "dim"), "   ", path), soft_wrap=True)
    return text.file.getvalue()


def write_report(
    workdir: str | os.PathLike,
    *,
    title: str,
    config_text: str,
    summary: Mapping,
    samples: Sequence[Mapping[str, str]],
    reference: str = "teacher",
) -> epath.Path:
    """Writes `workdir/report.html`, one file that needs nothing else, and returns its path.

    All processes of a run may call this; the first writes.

    The curves are those of `workdir/metrics.jsonl`, grouped as in `curves.PLOTS`, with a dashed
    line where the "stage" of the rows changes. Whatever is given is escaped.

    Args:
      workdir: folder of the run.
      title: heading of the report.
      config_text: the whole config, shown folded.
      summary: {"metrics": [(name, before, after, format, better)], "facts": {label: text},
        "paths": {label: text}}; before and after are numbers or None, format is a format
        specification without sign or width, such as ".2f", and better is "lower" or "higher".
        The first four metrics are the headline.
      samples: one {"request", "teacher", "before", "after"} a request: the text, and the responses
        of the teacher and of the student before and after training.
      reference: who wrote the texts called "teacher".

    Raises:
      FileNotFoundError, ValueError: as `read_metrics`; ValueError also for another `better`.
      jinja2.UndefinedError: if a sample lacks one of its four texts.
    """
    path = to_path(workdir) / REPORT_FILE
    if not distributed.is_first():
        return path
    from promptkd_jax.evaluation import plots  # and Matplotlib, which takes a second

    evaluation, training = plots.plots(read_metrics(workdir))
    page = render(
        "report.html.jinja",
        title=title,
        metrics=[_Comparison.of(*metric) for metric in summary["metrics"]],
        facts=summary["facts"],
        paths=summary["paths"],
        plots={"Evaluation": evaluation, "Training": training},
        samples=samples,
        reference=reference,
        config_text=config_text,
    )
    write_text(path, page)
    return path


def render(template: str, **values: Any) -> str:
    """The page that a template of this package makes of `values`; whatever is given is escaped.

    Raises:
      jinja2.UndefinedError: if the template needs a value that is not given.
    """
    from promptkd_jax.evaluation.plots import CURVE_COLOURS

    folder = resources.files("promptkd_jax")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: folder.joinpath(name).read_text("utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = _number
    environment.globals["curve_colours"] = CURVE_COLOURS
    return environment.get_template(template).render(**values)


def model_card(
    title: str,
    *,
    known: Mapping[str, str],
    student: str,
    teacher: str | None,
    data: str,
    stages: Sequence[str],
    metrics: Sequence[tuple[str, float | None, float | None, str, str]],
) -> str:
    """The README.md of an exported student. It says nothing of this machine's folders.

    Args:
      known: `Model.card` of the model that it started from.
      student, teacher, data: names; `student` is "" where it started as layers of its teacher.
      metrics: as in `write_report`.
    """
    rows = [
        f"| {name} | {_number(before, spec)} | {_number(after, spec)} |"
        for name, before, after, spec, _ in metrics
    ]
    lines = [
        "---",
        *(f"{key}: {value}" for key, value in sorted(known.items())),
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [knowledge-distillation, promptkd]",
        "---",
        f"# {title}",
        "",
        "A student distilled with promptkd_jax.",
        "",
        f"- Started from: {known.get('base_model') or student or 'layers of its teacher'}",
        f"- Teacher: {teacher or 'none'}",
        *(f"- Stage {number}: {stage}" for number, stage in enumerate(stages, start=1)),
        f"- Training data: {data}",
        "- Licence: "
        + known.get("license", "not named by the model that it started from")
        + ", and what teacher and data demand",
        "",
    ]
    if rows:
        lines += ["| held-out metric | before | after |", "| --- | --- | --- |", *rows, ""]
    return "\n".join(lines)


class _Comparison(NamedTuple):
    """One line of the before/after table, as text."""

    name: str
    before: str
    after: str
    change: str
    verdict: str

    @classmethod
    def of(cls, name, before, after, spec, better) -> "_Comparison":
        if better not in ("lower", "higher"):
            raise ValueError(f"summary metric {name!r}: better is {better!r}, not lower or higher")
        verdict = ""
        if before is not None and after is not None and before != after:
            # NaN is worse than anything: both comparisons are false.
            improved = after < before if better == "lower" else after > before
            verdict = "better" if improved else "worse"
        change = _change(before, after, spec)
        return cls(name, _number(before, spec), _number(after, spec), change, verdict)


def _parse(path: epath.Path) -> tuple[list[dict], bytes]:
    """The rows of a metrics file, and what follows its last newline."""
    *lines, torn = path.read_bytes().split(b"\n")
    return [_parse_line(line, f"{path}:{number}") for number, line in enumerate(lines, 1)], torn


def _parse_line(line: bytes, where: str) -> dict:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: {line[:60]!r} is not JSON: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise ValueError(f"{where}: {line[:60]!r} is not an object with a whole-numbered 'step'")
    return {name: math.nan if value is None else value for name, value in row.items()}


def _json_line(row: Mapping) -> str:
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"


def _shows_control_codes(console: Console) -> bool:
    # rich alone would also colour a log file where the environment has FORCE_COLOR.
    return console.is_interactive and console.file.isatty()


def _number(value: float | None, spec: str = "") -> str:
    if value is None:
        return "n/a"
    return format(value, spec or (",.0f" if abs(value) >= 1000 else ".4g"))


def _change(before: float | None, after: float | None, spec: str = "") -> str:
    """after - before with its sign, and in per cent of before unless both are shares already."""
    if before is None or after is None:
        return "n/a"
    difference = after - before
    sign = "-" if difference < 0 else "+"
    text = sign + _number(abs(difference), spec)
    if before and math.isfinite(difference) and not spec.endswith("%"):
        text += f" ({sign}{abs(100.0 * difference / before):.1f}%)"
    return text
