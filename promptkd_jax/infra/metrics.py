"""The metrics of a run: `metrics.jsonl`, one JSON object a line, and TensorBoard events."""

import json
import math
import os
import time
from collections.abc import Iterable, Mapping

from etils import epath

from promptkd_jax.infra import distributed
from promptkd_jax.infra.files import AppendOnlyFile, is_remote, make_folder, to_path, write_text

METRICS_FILE = "metrics.jsonl"


class MetricWriter:
    """Appends metrics to `workdir/metrics.jsonl` and to TensorBoard files in `workdir/tensorboard`.

    All processes of a run have one; that of the first writes. To resume, call `truncate_metrics`
    first; the TensorBoard files, of which a killed run has lost the end, are then made anew from
    the rows of the file, each step at its old time where they still tell it.

    In a bucket the file is written anew, every few seconds and when flushed or closed (see
    `files.AppendOnlyFile`), and there is no TensorBoard: tensorboardX would stop the run for good
    at the first upload that fails.

    Raises:
      ValueError: if the file ends in a torn line or holds a line that is not a metrics row.
    """

    def __init__(self, workdir: str | os.PathLike):
        self._lines = self._tensorboard = None
        if distributed.is_primary():
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
        self._lines = AppendOnlyFile(path)
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
    if distributed.is_primary() and path.exists():
        rows = [row for row in read_metrics(workdir) if row["step"] <= step]
        if not evaluated:
            rows = [row for row in rows if row["step"] < step or "dev/loss" not in row]
        write_text(path, "".join(map(_json_line, rows)))


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
