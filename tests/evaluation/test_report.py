"""What a run shows: the metrics file and its resumption, progress lines, summary, HTML report."""

import io
import json
import math
import re
import signal
import struct
import subprocess
import sys
import time
from html.parser import HTMLParser

import jinja2
import pytest
from conftest import environment
from helpers import bucket
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

from promptkd_jax.evaluation.report import model_card, summary_table, write_report
from promptkd_jax.infra import distributed
from promptkd_jax.infra.metrics import MetricWriter, read_metrics, truncate_metrics
from promptkd_jax.infra.terminal import ProgressBar
from promptkd_jax.training.progress import TrainingProgress

SUMMARY = {
    "metrics": [("ROUGE-L", 20.0, 25.0, ".2f", "higher"), ("KL", 2.0, 1.5, ".3f", "lower")],
    "facts": {"device": "one <cpu>"},
    "paths": {"student": "runs/a/student & co"},
}
SAMPLE = {
    "request": "why <b>bold</b>?",
    "teacher": 'because & "so"',
    "before": "</td><script>alert(1)</script>",
    "after": "",
}
VOID = {"meta", "br"}


@pytest.fixture(autouse=True)
def coloured_environment(monkeypatch):
    """Continuous integration often sets this; it must not put colours into log files."""
    monkeypatch.setenv("FORCE_COLOR", "1")


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Page(HTMLParser):
    """Texts by tag, counts of tags, and the attributes that load or lead somewhere."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts, self.targets = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.targets += [value for name, value in attributes if re.search("src|href|url", name)]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def write_rows(workdir, rows):
    with MetricWriter(workdir) as writer:
        for row in rows:
            writer.write(row["step"], {name: row[name] for name in row if name != "step"})


def events(workdir):
    """The TensorBoard events of a run: records of length, 4 bytes, message, 4 bytes."""
    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def scalars(workdir):
    """What TensorBoard shows of a run: (step, name, value)."""
    return [
        (event.step, value.tag, pytest.approx(value.simple_value, rel=1e-6))
        for event in events(workdir)
        for value in event.summary.value
    ]


def report(workdir, rows=(), **changes):
    write_rows(workdir, rows)
    given = {"title": "A run", "config_text": "seed = 0", "summary": SUMMARY, "samples": [SAMPLE]}
    return write_report(workdir, **given | changes).read_text("utf-8")


def test_a_write_is_one_json_line_at_once(tmp_path):
    with MetricWriter(tmp_path / "new" / "run") as writer:
        writer.write(10, {"loss": 0.1, "stage": "warmup"})
        writer.write(20, {"loss": 1 / 3})
        lines = (tmp_path / "new" / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 10, "loss": 0.1, "stage": "warmup"},
        {"step": 20, "loss": 1 / 3},
    ]


def test_numbers_that_json_lacks_are_null_and_read_as_nan(tmp_path):
    write_rows(tmp_path, [{"step": 1, "loss": math.nan, "grad_norm": math.inf, "kl_plain": 2.0}])
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text) == {"step": 1, "loss": None, "grad_norm": None, "kl_plain": 2.0}
    (row,) = read_metrics(tmp_path)
    assert math.isnan(row["loss"]) and math.isnan(row["grad_norm"]) and row["kl_plain"] == 2.0


def test_tensorboard_gets_the_finite_numbers(tmp_path):
    write_rows(
        tmp_path,
        [{"step": 3, "loss": 0.5, "stage": "warmup", "kl_plain": math.nan}, {"step": 4, "loss": 1}],
    )
    assert scalars(tmp_path) == [(3, "loss", 0.5), (4, "loss", 1.0)]


def test_a_metric_may_not_be_called_step(tmp_path):
    with MetricWriter(tmp_path) as writer, pytest.raises(ValueError, match="'step' of their own"):
        writer.write(1, {"step": 2.0})


def test_resuming_leaves_each_step_once(tmp_path):
    write_rows(tmp_path, [{"step": step, "loss": step / 7} for step in range(1, 9)])
    truncate_metrics(tmp_path, 5)
    write_rows(tmp_path, [{"step": step, "loss": -step} for step in range(6, 11)])
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert [row["loss"] for row in rows] == [step / 7 for step in range(1, 6)] + [
        -6,
        -7,
        -8,
        -9,
        -10,
    ]
    starts = [event.step for event in events(tmp_path) if event.HasField("session_log")]
    assert starts == [0], "a TensorBoard that is open is told to forget what it has"
    assert scalars(tmp_path) == [(row["step"], "loss", row["loss"]) for row in rows]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


KILLED = """
import os, signal, sys
from promptkd_jax.infra.metrics import MetricWriter
writer = MetricWriter(sys.argv[1])
for step in range(1, 21):
    writer.write(step, {"loss": step / 7, "stage": "promptkd", "kl_plain": float("nan")})
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("rest", [b"", b"\x18\0\0", b"\x18\0\0\0\0\0\0\0\1\2\3\4\x09torn"])
def test_tensorboard_shows_every_step_once_after_a_kill(tmp_path, rest):
    """SIGKILL leaves the rows but not their events, or one torn; what comes after the checkpoint,
    here step 15, is written again."""
    killed = subprocess.run([sys.executable, "-c", KILLED, tmp_path], env=environment())
    assert killed.returncode == -signal.SIGKILL
    before = time.time()
    write_rows(tmp_path / "partly", [{"step": step, "loss": 0.0} for step in range(1, 8)])
    (some,) = (tmp_path / "partly" / "tensorboard").iterdir()
    (own,) = (tmp_path / "tensorboard").iterdir()
    own.write_bytes(some.read_bytes() + rest)
    between = time.time()
    truncate_metrics(tmp_path, 15)
    write_rows(tmp_path, [{"step": step, "loss": -step} for step in range(16, 26)])
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 26))
    assert scalars(tmp_path) == [(row["step"], "loss", row["loss"]) for row in rows]
    times = [event.wall_time for event in events(tmp_path) if event.HasField("summary")]
    assert times == sorted(times) and before <= times[0] <= times[14] <= between <= times[15]


@pytest.mark.parametrize("torn", [b'{"step": 4, "lo', b'{"step": 4, "loss": 1.0}', b"\xc3"])
def test_a_torn_last_line_is_dropped(tmp_path, torn):
    write_rows(tmp_path, [{"step": step, "loss": math.nan} for step in (1, 2, 3)])
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    with pytest.raises(ValueError, match=r"metrics\.jsonl:4: torn line .* call truncate_metrics"):
        MetricWriter(tmp_path)
    truncate_metrics(tmp_path, 10)
    assert path.read_bytes() == whole


def test_truncation_needs_no_file(tmp_path):
    truncate_metrics(tmp_path, 5)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("line", ["not json", "[1, 2]", '{"loss": 1.0}', '{"step": 1.5}', ""])
def test_a_broken_line_in_the_middle_is_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    for read in (read_metrics, lambda workdir: truncate_metrics(workdir, 1), MetricWriter):
        with pytest.raises(ValueError, match=r"metrics\.jsonl:2: "):
            read(tmp_path)


def test_progress_off_a_terminal_is_one_plain_line_an_update():
    file = io.StringIO()
    with TrainingProgress(100, console=Console(file=file)) as bar:
        bar.update(10, {"loss": 1.23456, "kl_plain": 0.5, "stage": "warmup"}, "sft")
        bar.update(20, {"kl_prompted": 0.25, "tokens_per_second": 5432.1}, "sft")
        bar.update(30, {}, "sft")
        bar.update(40, {"loss": 1.0}, "[warm-up]")
    first, second, third, fourth = file.getvalue().splitlines()
    assert first == "sft  step 10/100  loss 1.235  KL plain 0.5"
    assert "step 20/100  KL prompted 0.25  tokens/s 5,432" in second
    assert re.fullmatch(r"sft  step 30/100  \d+:\d\d:\d\d left", third)
    assert fourth.startswith("[warm-up]  step 40/100  loss 1")
    assert re.fullmatch(r"[ -~\n]*", file.getvalue()), "control characters in a log file"


def test_frequent_updates_are_not_all_told():
    file = io.StringIO()
    bar = ProgressBar(3, "batches", unit="batch", plain_seconds=900, console=Console(file=file))
    for done in (1, 2, 3):
        bar.update(done)
    first, last = file.getvalue().splitlines()
    assert first == "batches  batch 1/3" and last.startswith("batches  batch 3/3")


def test_progress_on_a_terminal_is_a_bar():
    file = Terminal()
    console = Console(file=file, force_terminal=True, width=120)
    with TrainingProgress(100, first_step=40, console=console) as bar:
        bar.update(60, {"loss": 1.5, "kl_plain": 0.5}, "[bold]")
    assert "\x1b[" in file.getvalue()
    shown = re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", file.getvalue())
    assert "40/100" in shown, "a resumed run starts where it stopped"
    last = shown.splitlines()[-1]
    assert "[bold]" in last and "60/100" in last and "loss 1.5  KL plain 0.5" in last


def test_a_narrow_terminal_still_shows_step_and_time():
    file = Terminal()
    console = Console(file=file, force_terminal=True, color_system=None, width=70)
    metrics = {"loss": 1.5, "kl_plain": 0.5, "kl_prompted": 0.25, "tokens_per_second": 5432.1}
    with TrainingProgress(30_000, console=console) as bar:
        bar.update(30_000, metrics, "promptkd")
    assert "30000/30000" in file.getvalue() and "0:00:00" in file.getvalue()
    assert "…" not in file.getvalue()


def test_summary_shows_change_and_whole_paths():
    metrics = [
        ("ROUGE-L", 20.0, 25.0, ".2f", "higher"),
        ("[kl]", 2.0, 1.5, ".3f", "lower"),
        ("loss", None, 1.0, "", "lower"),
        ("tokens", 0, 12345, "", "higher"),
    ]
    path = "runs/" + "very/" * 60 + "long"
    text = summary_table(metrics, {"report": path})
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert lines[2:6] == [
        ["ROUGE-L", "20.00", "25.00", "+5.00 (+25.0%)", "better"],
        ["[kl]", "2.000", "1.500", "-0.500 (-25.0%)", "better"],
        ["loss", "n/a", "1", "n/a", ""],
        ["tokens", "0", "12,345", "+12,345", "better"],
    ]
    assert text.splitlines()[-1].split() == ["report", path]
    assert text.isascii() and "\x1b" not in text


def test_a_card_has_front_matter_that_is_yaml_and_says_what_is_known():
    metrics = [("KL", 2.0, 1.5, ".3f", "lower")]
    facts = [("Teacher", "owner/teacher")]
    card = model_card("A student", "It is small.", facts, known={"license": "mit"}, metrics=metrics)
    front, text = card.removeprefix("---\n").split("\n---\n")
    assert "license: mit" in front.splitlines() and "library_name: transformers" in front
    assert text.startswith("# A student\n\nIt is small.\n\n- Teacher: owner/teacher\n\n| metric |")
    assert "better" in text and text.endswith("|\n")
    alone = model_card("A student", "It is small.", facts)
    assert "license" not in alone and "|" not in alone


def test_report_holds_everything_escaped(tmp_path):
    text = report(tmp_path, config_text="a = '<&>'", title="A & <B>")
    page = Page(text)
    given = [*SAMPLE.values(), "a = '<&>'", "A & <B>", "one <cpu>", "runs/a/student & co"]
    for expected in filter(None, given):
        assert expected in page.texts, expected
    assert "(empty)" in page.texts
    assert "script" not in page.tags and "b" not in page.tags
    assert page.tags.count("details") == 1


def test_report_needs_nothing_from_elsewhere(tmp_path):
    page_text = report(tmp_path, [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}])
    page = Page(page_text)
    assert all(target.startswith("#") for target in page.targets)
    assert not re.search(r"(src|href)=[\"']?(http|//|file)|@import|url\((?!#)", page_text)
    assert not {"link", "script", "img", "iframe", "object"} & set(page.tags)


def test_report_compares_before_and_after(tmp_path):
    metrics = [
        ("up is good", 20.0, 25.0, ".2f", "higher"),
        ("down is good", 2.0, 2.5, ".3f", "lower"),
        ("lost", 2.0, math.nan, ".1f", "lower"),
        ("share", 0.25, 0.5, ".0%", "higher"),
        ("same", 1.0, 1.0, ".1f", "higher"),
        ("new", None, 3.0, ".1f", "higher"),
    ]
    text = report(tmp_path, summary=SUMMARY | {"metrics": metrics})
    body = text[text.index("<tbody>") : text.index("</tbody>")]
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in body.split("<tr>")[1:]]
    assert re.findall(r'class="(\w+)"', body) == ["better", "worse", "worse", "better"]
    assert rows == [
        ["up is good", "20.00", "25.00", "+5.00 (+25.0%)", "better"],
        ["down is good", "2.000", "2.500", "+0.500 (+25.0%)", "worse"],
        ["lost", "2.0", "nan", "+nan", "worse"],
        ["share", "25%", "50%", "+25%", "better"],
        ["same", "1.0", "1.0", "+0.0 (+0.0%)", ""],
        ["new", "n/a", "3.0", "n/a", ""],
    ]


def test_report_draws_the_groups_that_have_data_and_no_others(tmp_path):
    rows = [
        {"step": step, "stage": "warmup" if step < 3 else "promptkd", "loss": 1.0 / step}
        for step in range(1, 6)
    ]
    text = report(tmp_path, [*rows, {"step": 5, "dev/kl_plain": 0.5, "dev/kl_prompted": 0.4}])
    assert text.count("<svg") == 2
    assert re.findall(r"<h3>(.*?)</h3>", text) == ["KL(teacher ‖ student), nats", "Losses"]
    assert text.count("stroke-dasharray") == 2
    assert "Responses</h3>" not in text and "nan" not in text


def test_report_without_metrics_samples_or_figures_has_no_empty_sections(tmp_path):
    summary = {"metrics": [], "facts": {}, "paths": {}}
    page = Page(report(tmp_path, summary=summary, samples=[]))
    assert not {"svg", "table", "h2", "dl"} & set(page.tags)


def test_report_tells_of_values_that_are_not_finite(tmp_path):
    text = report(tmp_path, [{"step": 1, "loss": 1.0}, {"step": 2, "loss": math.inf}])
    assert "1 of 2 not finite, first at step 2" in text


def test_report_refuses_what_it_cannot_show(tmp_path):
    with pytest.raises(FileNotFoundError, match="metrics.jsonl"):
        write_report(tmp_path, title="", config_text="", summary=SUMMARY, samples=[])
    with pytest.raises(jinja2.UndefinedError, match="after"):
        report(tmp_path, samples=[{name: "" for name in ("request", "teacher", "before")}])
    metrics = [("KL", 2.0, 1.5, ".3f", "less")]
    with pytest.raises(ValueError, match="'KL': better is 'less', not lower or higher"):
        report(tmp_path, summary=SUMMARY | {"metrics": metrics})


# Buckets, and other processes.


def test_metrics_in_a_bucket_come_back(monkeypatch, capsys):
    folder, pail = bucket.make(monkeypatch)
    write_rows(folder, [{"step": step, "loss": step / 7} for step in range(1, 9)])
    truncate_metrics(folder, 5)
    write_rows(folder, [{"step": 6, "loss": math.nan}])
    assert [row["step"] for row in read_metrics(folder)] == [1, 2, 3, 4, 5, 6]
    assert set(pail.writes) == {"run/metrics.jsonl"}, "no TensorBoard"
    assert len(pail.writes) < 8, "not for every row"
    assert "gs://pail/run: is in a bucket, where no TensorBoard" in capsys.readouterr().out


def test_a_flush_saves_all_rows(monkeypatch):
    folder, _ = bucket.make(monkeypatch)
    writer = MetricWriter(folder)
    for step in range(3):
        writer.write(step, {"loss": 1.0})
    assert len(read_metrics(folder)) == 1
    writer.flush()
    assert len(read_metrics(folder)) == 3


def test_the_report_of_a_bucket_is_in_it(monkeypatch):
    folder, pail = bucket.make(monkeypatch)
    assert "<table" in report(folder, [{"step": 1, "loss": 1.0}])
    assert pail.writes[-1] == "run/report.html"


def test_other_processes_write_and_show_nothing(tmp_path, monkeypatch):
    write_rows(tmp_path, [{"step": step, "loss": 1.0} for step in (1, 2)])
    before = (tmp_path / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(distributed, "is_primary", lambda: False)
    truncate_metrics(tmp_path, 1)
    write_rows(tmp_path / "new", [{"step": 3, "loss": 1.0}])
    path = write_report(tmp_path, title="", config_text="", summary=SUMMARY, samples=[])
    assert not path.exists() and (tmp_path / "metrics.jsonl").read_bytes() == before
    assert not (tmp_path / "new").exists()
    for file in (io.StringIO(), Terminal()):
        with TrainingProgress(4, console=Console(file=file)) as bar:
            bar.update(2, {"loss": 1.5}, "sft")
        assert file.getvalue() == ""
