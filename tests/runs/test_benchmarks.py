"""What the benchmarks count, and what becomes of what they found. Nothing is timed."""

import contextlib
import copy
import dataclasses
import itertools
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time
import types

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))  # not a package

import bench  # noqa: E402
import cases  # noqa: E402
import hotspots  # noqa: E402
import killed  # noqa: E402
import plots  # noqa: E402
import report  # noqa: E402
import slots  # noqa: E402
import work  # noqa: E402

from promptkd_jax.training.config.checks import read_run  # noqa: E402

TINY = cases.gpt2(8, 2, 2, vocab_size=32, columns=16)
CASE = cases.Case("tiny", TINY, TINY, rows=1, request=4, response=4, soft_prompt=2)
RUN = {
    "command": "python benchmarks/bench.py",
    "date": "2026-01-02",
    "machine": "a",
    "versions": {},
}


@pytest.mark.parametrize("device", cases.GROWTH)
def test_along_an_axis_of_growth_one_size_differs(device):
    growth = cases.GROWTH[device]
    base = work.sizes(growth.base)
    assert set(growth.axes) == set(report.AXES) == set(plots.AXES) == set(base)
    for axis, others in growth.axes.items():
        for case in others:
            sizes = work.sizes(case)
            changed = {name for name in base if sizes[name] != base[name]}
            assert changed - {"parameters"} == {axis} - {"parameters"}
            assert ("parameters" in changed) == (axis in ("vocabulary", "parameters"))


@pytest.mark.parametrize("device", cases.GROWTH)
def test_models_have_positions_for_rows_behind_their_soft_prompts(device):
    growth = cases.GROWTH[device]
    for case in (growth.base, *(case for others in growth.axes.values() for case in others)):
        assert case.columns + case.soft_prompt <= case.teacher["n_positions"]


def test_every_side_that_counts_for_a_ratio_has_a_colour():
    assert {"ours", *bench.theirs(CASE)} <= set(plots.COLOURS)


def test_bytes_of_updates_are_those_of_their_passes():
    matrices = 2 * (4 + 8) * 8 * 8 + 32 * 8  # of 2 layers and the head
    parameters = (32 + 16) * 8 + 2 * (12 * 8 * 8 + 13 * 8) + 2 * 8
    logits = 4 * 4 * 32
    learns = 2 * 4 * (matrices + 2 * 2 * 8 * 8) + logits + 8 * 4 * parameters
    teacher = 4 * (matrices + 2 * 2 * 10 * 8)
    student_update = learns + teacher + logits
    update = student_update + 3 * teacher + 2 * logits
    assert work.update_bytes(CASE) == {"update": update, "student_update": student_update}


def test_a_rollout_computes_as_much_as_a_forward_that_attends_to_what_it_sees():
    matrices = 2 * (4 + 8) * 8 * 8
    products = 2 * 8 * matrices + 2 * 4 * 32 * 8
    attention = 4 * 2 * 8 * (4 * 2 + 4 * 6)  # layers, width, columns by the keys before them
    assert work.operations(CASE)["rollout"] == products + attention


def test_nothing_is_counted_where_answers_end_by_themselves():
    assert work.needed(dataclasses.replace(CASE, mean_response=2)) is None
    assert set(work.needed(CASE)) == set(plots.MARKERS)


def side(scale: float) -> dict:
    timed = {"seconds": scale, "all": [scale, scale], "values": [1e9, 1e9]}
    timed["per_second"] = 1e9 / scale
    parts = ("iteration", "rollout", "update", "student_update", "load", "checkpoint")
    parts += ("matmul", "stream")
    whole = {"first_step": 1.0, "first_step_cached": 1.0}
    whole |= dict.fromkeys(("peak_bytes", "peak_bytes_cached"), int(scale * 2**30))
    return {part: timed for part in parts} | whole


def measured_case(**found: dict) -> dict:
    return report.rated(
        {
            "run": RUN,
            "case": dataclasses.asdict(CASE),
            "found": found,
            "needed": work.needed(CASE),
            "same_dtype": ["ours", "theirs"],
        }
    )


def results() -> tuple[dict, dict]:
    """Of cases alone, of growth alone."""
    one = measured_case(ours=side(1), theirs=side(2))
    points = [
        {"case": one["case"], "sizes": dict.fromkeys(report.AXES, n), "found": found}
        for n, found in ((1, {"ours": side(1), "theirs": side(2)}), (4, {"ours": side(3)}))
    ]
    axes = {axis: {"run": RUN, "points": points} for axis in ("rows", "parameters")}
    empty = {"device": "A device", "cases": {}, "growth": {}}
    return empty | {"cases": {"tiny": one}}, empty | {"growth": axes}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "README.md").write_text("# Benchmarks\n")
    return tmp_path


def test_a_run_of_one_kind_leaves_what_another_found(folder):
    of_cases, of_growth = results()
    for result in (of_cases, of_growth, of_cases):
        report.publish(folder, result)
    text = (folder / "README.md").read_text()
    assert "| iterations an hour | 3,600 | 1,800 |" in text
    assert "| 1 | 1.00 / 2.00 |" in text
    assert "| 4 | 3.00 / – |" in text  # theirs ended before its work was done
    assert text.count("### A device") == text.count("#### Growth") == 1
    files = {file.name for file in (folder / "results").iterdir()}
    stem = "2026-01-02-A-device"
    assert files == {f"{stem}.json", f"{stem}-growth.svg", f"{stem}-roofline.svg"}
    assert all(f"(results/{name})" in text for name in files)


def test_what_is_drawn_again_is_the_same(folder):
    of_cases, of_growth = results()
    result = of_cases | {"growth": of_growth["growth"]}
    before = copy.deepcopy(result)
    report.publish(folder, result)
    first = {file.name: file.read_bytes() for file in folder.rglob("*.*")}
    report.publish(folder, result)
    assert {file.name: file.read_bytes() for file in folder.rglob("*.*")} == first
    assert all(len(content) < 150_000 for content in first.values())
    assert result == before


def test_ratios_are_against_the_best_of_theirs():
    one = measured_case(ours=side(1), theirs=side(2))
    assert one["ratios"] == dict.fromkeys(("iteration", "rollout", "update", "memory"), 2.0)
    other = side(4) | {"update": {"seconds": 1.5, "all": [1.5]}}
    one = report.rated(one | {"found": one["found"] | {"another": other}})
    assert one["ratios"]["update"] == 2.0  # in another dtype
    one = report.rated(one | {"same_dtype": ["ours", "theirs", "another"]})
    assert one["ratios"] == one["ratios"] | {"iteration": 2.0, "update": 1.5}


def test_of_parts_that_are_measured_there_are_lines_and_ratios():
    ours, theirs = ({"rollout": side(scale)["rollout"]} for scale in (1, 3))
    one = measured_case(ours=ours, theirs=theirs)
    assert one["ratios"] == {"rollout": 3.0}
    labels = [line.split(" | ")[0] for line in report.case_table(one).splitlines()[2:]]
    assert labels == ["| rollout, s", "| its tokens", "| rollout, tokens/s"]


def test_sides_of_several_runs_add_up_where_each_had_the_machine_for_itself(folder):
    """Merged, they are what one run would have found."""
    alone = {"in_turn": False}
    both = measured_case(ours=side(1), theirs=side(2)) | alone
    files = []
    for number, name in enumerate(both["found"]):
        files.append(folder / f"{number}.json")
        one = measured_case(**{name: both["found"][name]}) | alone
        report.add(files[-1], results()[0] | {"cases": {"tiny": one}})
    for file in files:
        report.publish(folder, json.loads(file.read_text()))
    (found,) = (folder / "results").glob("*.json")
    assert json.loads(found.read_text())["cases"]["tiny"] == json.loads(json.dumps(both))

    old, new = (measured_case(**{name: one}) for name, one in both["found"].items())
    assert report.joined(old, new) == new  # sides that took turns are compared in one run
    other = new | alone | {"run": RUN | {"versions": {"jax": "1"}}}
    assert report.joined(old | alone, other) == other


def test_a_part_that_is_done_stays_done_and_is_shown_with_its_last_line(folder):
    result, _ = results()
    done = {"status": "done", "seconds": 12.3, "limit": 60, "tail": ["1 | 2", ""]}
    others = {"status": "no time left", "seconds": 0, "limit": 0, "tail": []}
    report.publish(folder, result | {"parts": {"tests": done, "xl": others}})
    report.publish(folder, result | {"parts": {"tests": others, "xl": done}})
    text = (folder / "README.md").read_text()
    for name in ("tests", "xl"):
        assert f"| {name} | done | 12 | 60 | 1 \\| 2 |" in text


def test_a_file_is_of_one_device(tmp_path):
    file, (result, _) = tmp_path / "found.json", results()
    report.add(file, result)
    with pytest.raises(SystemExit, match="of A device, expected one of another"):
        report.add(file, result | {"device": "another"})


def test_figures_have_three_digits():
    figures = [report._figure(seconds) for seconds in (0.1234, 1.234, 12.34, 123.4)]
    assert figures == ["0.123", "1.23", "12.3", "123"]


IDLE = """
VALUES = {"iteration": 4, "rollout": 4, "matmul": 1.0, "stream": 1.0}


class Side:
    def __init__(self, case, models, *, ends=None):
        self._ends = ends

    def device_peak_bytes(self):
        return None

    def __getattr__(self, part):
        def do():
            if part == self._ends:
                raise SystemExit(3)
            return VALUES.get(part)

        return do
"""


@pytest.fixture
def idle(tmp_path, monkeypatch):
    """Sides that do nothing, one of which ends before its work is done."""
    (tmp_path / "idle.py").write_text(IDLE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    sides = {"ours": ("idle", {}), "theirs": ("idle", {})}
    sides |= {f"ends in {part}": ("idle", {"ends": part}) for part in ("iteration", "update")}
    monkeypatch.setattr(bench, "SIDES", sides)
    monkeypatch.setattr(work, "write_models", lambda *_: {"teacher": "-", "student": "-"})
    monkeypatch.setattr(bench, "MODELS", tmp_path)


def test_what_was_done_over_the_time_it_took():
    def rate(*answers):
        found = bench.summary([{"seconds": s, "value": v} for s, v in answers])
        assert found["seconds"] == 2 and found["values"] == [v for _, v in answers]
        return found["per_second"]

    assert rate((1, 12), (9, 12), (2, 12)) == 6  # one slow turn of the same changes nothing
    assert rate((1, 12), (9, 12), (2, 24)) == 4


@pytest.mark.parametrize("parts", [bench.PARTS, ("matmul", "rollout")])
def test_every_part_is_measured_as_often_as_asked(idle, parts):
    found = bench.measure(CASE, ["ours", "theirs"], 2, parts)
    assert set(found) == {"ours", "theirs"}
    for side in found.values():
        for part in set(parts) - {"starts"}:
            assert len(side[part]["all"]) == bench.turns(CASE, part, 2)
        timed = {"first_step", "first_step_cached"} if "starts" in parts else set()
        peaks = {"peak_bytes", "peak_bytes_cached"} if "starts" in parts else set()
        assert set(side) == set(parts) - {"starts"} | {"load"} | timed | peaks
        assert "per_second" in side["rollout"]
    one = report.rated(bench.of_case(CASE, found, RUN, True, False) | {"same_dtype": list(found)})
    assert "ours | theirs" in report.case_table(one)
    assert ("iteration" in one["ratios"]) == ("iteration" in parts)


def test_a_side_that_ends_is_left_out_and_its_memory_is_its_own(idle):
    ballast = bytearray(b"1") * 2**28
    found = bench.measure(CASE, ["ends in iteration", "ours"], 1, bench.STEP)
    assert set(found) == {"ours"}
    assert found["ours"]["peak_bytes"] < len(ballast)
    assert bench.of_case(CASE, found, RUN, True, False)["ratios"] == {}


def test_a_run_that_was_stopped_goes_on_with_the_sides_that_are_missing(
    idle, tmp_path, monkeypatch
):
    """A side of which only some parts are there is missing too."""
    monkeypatch.setattr(bench, "about", lambda: (RUN, "A device"))
    monkeypatch.setattr(bench, "CASES", {"cpu": (CASE,)})
    whole, file = bench.SIDES, tmp_path / "found.json"

    def sides(*parts: str, ends: bool = False) -> dict:
        other = whole["ends in update" if ends else "theirs"]
        monkeypatch.setattr(bench, "SIDES", whole | {"theirs": other})
        arguments = ["--case", "tiny", "--missing", "--output", str(file), "--parts", *parts]
        with pytest.raises(SystemExit, match="theirs") if ends else contextlib.nullcontext():
            bench.main(arguments)
        return json.loads(file.read_text())["cases"]["tiny"]["found"]

    first = sides("rollout", "update", ends=True)
    assert set(first["ours"]) == {"load", "rollout", "update"}
    assert set(first["theirs"]) == {"load", "rollout"}
    second = sides("rollout", "update")
    assert second["ours"] == first["ours"] and set(second["theirs"]) == set(first["ours"])
    third = sides("rollout", "update", "matmul")
    assert all("matmul" in side for side in third.values())


def test_both_sides_update_on_the_same_rows():
    torch = pytest.importorskip("torch")
    pytest.importorskip("peft")
    import ours
    import theirs

    case = dataclasses.replace(CASE, rows=3, request=6, response=5, mean_response=3)
    loop = types.SimpleNamespace(settings=theirs.Settings(), device=torch.device("cpu"))
    rows = theirs.rows_of(case, loop)
    batch = ours.batch_of(case, case.requests(0), case.answers(0))
    assert len(set(batch.lengths - batch.prompt_lengths)) > 1
    for row, (tokens, begin, end) in enumerate(zip(*batch[:3])):
        supervised = rows.labels[row] != theirs.IGNORED
        assert rows.labels[row][supervised].tolist() == tokens[begin:end].tolist()
        assert rows.input_ids[row][supervised].tolist() == tokens[begin - 1 : end - 1].tolist()
        assert rows.attention_mask[row].sum() == end - 1
    assert rows.mask.sum() == sum(batch.lengths - batch.prompt_lengths)
    assert rows.first == min(batch.prompt_lengths) - 1


@pytest.mark.parametrize(
    "file", sorted((ROOT / "benchmarks" / "results").glob("????-??-??-*.json"))
)
def test_what_was_measured_can_be_shown(file):
    result = json.loads(file.read_text())
    text = report.section(result, file.stem, {})
    assert all(f"| {name} |" in text for name in result["cases"])
    assert result["ratios"] == next(iter(result["cases"].values()))["ratios"]
    for one in result["cases"].values():
        case = cases.Case(**one["case"])
        for side in one["found"].values():
            parts = [side[part] for part in ("iteration", "rollout") if part in side]
            for written in itertools.chain.from_iterable(part["values"] for part in parts):
                ends = case.mean_response is not None
                assert (written < case.rows * case.response) == ends


# The check of a GPU: parts that stand in for its own.


def run_parts(file, parts: dict[str, tuple[float, str]], *options: str) -> tuple[int, dict]:
    """Exit status, and how each part ended; a part is its limit and a shell's command."""
    listed = "".join(f"{name} {n} sh -c {shlex.quote(c)}\n" for name, (n, c) in parts.items())
    command = [sys.executable, ROOT / "benchmarks" / "parts.py", file, *options]
    done = subprocess.run(command, input=listed, text=True, stdout=subprocess.PIPE)
    return done.returncode, json.loads(file.read_text())["parts"]


def is_running(pid: str) -> bool:
    try:
        status = pathlib.Path(f"/proc/{int(pid)}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return "State:\tZ" not in status  # nor dead, and waiting for its parent to notice


def test_a_part_that_fails_or_hangs_neither_loses_what_was_nor_stops_what_comes(tmp_path):
    file, child = tmp_path / "gpu.json", tmp_path / "child"
    report.write(file, results()[0])
    parts = {
        "good": (60, "echo first; echo second >&2"),
        "bad": (60, "echo begins; echo says why; exit 3"),
        "hung": (1, f"trap '' TERM; sleep 600 & echo $! >{child}; echo waits; wait; sleep 600"),
        "later": (60, "echo last"),
    }
    status, ended = run_parts(file, parts)
    assert status == 1
    assert {name: (part["status"], part["exit"]) for name, part in ended.items()} == {
        "good": ("done", 0),
        "bad": ("failed", 3),
        "hung": ("over its limit", -signal.SIGKILL),
        "later": ("done", 0),
    }
    assert ended["good"]["tail"] == ["first", "second"]
    assert ended["bad"]["tail"] == ["begins", "says why"]
    assert ended["hung"]["tail"] == ["waits"] and not is_running(child.read_text())
    assert "cases" in json.loads(file.read_text())
    log = file.with_suffix(".log").read_text()
    assert log == "first\nsecond\nbegins\nsays why\nwaits\nlast\n"


def test_the_same_command_goes_on_with_what_is_not_done(tmp_path):
    file, count, fails = (tmp_path / name for name in ("gpu.json", "count", "fails"))
    report.write(file, {"parts": {"cut": {"status": "begun"}}})
    parts = {name: (60, f"echo {name} >>{count}") for name in ("done", "cut")}
    parts["mended"] = 60, f"echo mended >>{count}; test ! -e {fails}"
    fails.touch()
    assert run_parts(file, parts)[0] == 1
    fails.unlink()
    status, ended = run_parts(file, parts)
    assert status == 0 and {part["status"] for part in ended.values()} == {"done"}
    assert count.read_text().split() == ["done", "cut", "mended", "mended"]


def test_no_part_begins_when_the_time_of_all_is_over(tmp_path):
    touched = tmp_path / "touched"
    parts = {"first": (60, f"touch {touched}")}
    status, ended = run_parts(tmp_path / "gpu.json", parts, "--seconds", "0")
    assert (status, ended["first"]["status"]) == (1, "no time left")
    assert not touched.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_part_that_runs_and_all_that_it_started(tmp_path, number):
    file, child = tmp_path / "gpu.json", tmp_path / "child"
    command = [sys.executable, ROOT / "benchmarks" / "parts.py", file]
    running = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)
    running.stdin.write(f"long 600 sh -c 'sleep 600 & echo $! >{child}; wait'\nnext 60 true\n")
    running.stdin.close()
    while not (child.exists() and child.read_text().strip()):
        time.sleep(0.05)
    running.send_signal(number)
    assert running.wait() == 128 + number
    (part,) = json.loads(file.read_text())["parts"].values()
    assert part["status"] == "stopped" and not is_running(child.read_text())


@pytest.fixture
def gpu_sh(tmp_path):
    """Runs the script with an interpreter that prints what it is given."""
    stub = tmp_path / "python"
    stub.write_text('#!/bin/sh\necho "$JAX_PLATFORMS $@"\ncat\n')
    stub.chmod(0o755)

    def run(*options: str) -> tuple[list[str], list[list[str]]]:
        command = [ROOT / "benchmarks" / "gpu.sh", "out", *options]
        environment = os.environ | {"PYTHON": str(stub)}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, check=True
        )
        first, *parts = map(shlex.split, done.stdout.splitlines())
        assert {part[2] for part in parts} == {str(stub)}
        return first, [[*part[:2], *part[3:]] for part in parts]

    return run


@pytest.mark.parametrize("rehearse", [False, True])
def test_the_check_of_a_gpu_is_commands_that_exist_within_its_time(gpu_sh, tmp_path, rehearse):
    first, parts = gpu_sh(*["--rehearse"] * rehearse)
    file = str(tmp_path / "out" / "gpu.json")
    platforms = "cpu" if rehearse else "cuda,cpu"
    assert first == [platforms, "benchmarks/parts.py", file, "--seconds", "580"]
    assert [part[0] for part in parts] == [
        "seen",
        "tests",
        "xl",
        "rollout",
        "rollout-spots",
        "llama",
        "update-spots",
    ]
    for _, limit, program, *arguments in parts:
        assert 0 < int(limit) < 580
        if program == "-m":
            assert arguments[0] == "pytest" and (ROOT / arguments[-1]).exists()
            continue
        if program.endswith("hotspots.py"):
            assert hotspots._options(arguments).cases == ("rehearsal" if rehearse else "gpu")
            continue
        options = bench._options(arguments)
        assert str(options.output) == file
        assert options.cases == ("rehearsal" if rehearse else "gpu")
        assert options.only == ("cases" if options.case else "seen")


def test_a_rehearsal_is_of_the_same_cases_with_other_sizes_and_names():
    for case, small in zip(cases.CASES["gpu"], cases.CASES["rehearsal"], strict=True):
        assert small.name == f"rehearsal of {case.name}"
        assert (small.sides, small.parts, small.remat) == (case.sides, case.parts, case.remat)
        assert small.dtype == case.dtype and small.rows % small.micro_batches == 0
        assert work.sizes(small)["parameters"] < 1e6


def test_a_plain_gpu_image_has_all_that_the_check_imports():
    """One without what only runs from configs need."""
    missing = (
        "grain",
        "ml_collections",
        "datasets",
        "rouge_score",
        "nltk",
        "tensorboardX",
        "xxhash",
    )
    code = f"""import sys
sys.modules |= dict.fromkeys({(*missing, "gguf", "gcsfs")})  # importing these raises
sys.path += {[str(ROOT / part) for part in ("benchmarks", "tests", "tests/runs")]}
import bench, ours, parts, report, test_gpu"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_runs_that_are_killed_are_runs():
    """That every two choices meet, `combinations` asserts; here, that each is a config."""
    for combination in killed.combinations():
        fields = killed.settings(combination)
        flags = [f"--config.{path}={value}" for path, value in fields.items()]
        run = read_run([f"--config={ROOT / 'configs/rehearsal.py'}", *flags])
        assert run.stages[0].optimizer == combination["optimizer"]
        assert run.teacher.quantize == combination["teacher"]


def test_runs_that_differ_in_a_bit_are_not_the_same(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name / "student").mkdir(parents=True)
        (tmp_path / name / "student/model.safetensors").write_bytes(b"12")
        row = {"step": 1, "student_loss": 0.5, "seconds_per_update": len(name)}
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(row))
    killed.same_runs(tmp_path / "one", tmp_path / "other")
    (tmp_path / "other/student/model.safetensors").write_bytes(b"13")
    with pytest.raises(AssertionError, match="student/model.safetensors"):
        killed.same_runs(tmp_path / "one", tmp_path / "other")


def test_rows_take_the_places_of_those_that_end():
    """4 | 1 1 2: two places, and two rows that are let in one after the other."""
    assert slots.turns_and_prompts([4, 1, 1, 2], 2) == (4, 4)
    assert slots.turns_and_prompts([4, 1, 1, 2], 4) == (4, 4)
    assert slots.turns_and_prompts([4] * 12, 8) == (8, 12)  # two rounds of two
    assert slots.turns_and_prompts([4] * 9, 8) == (8, 10)  # of which one row is none
