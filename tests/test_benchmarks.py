"""What the benchmarks count, and what becomes of what they found. Nothing is timed."""

import copy
import dataclasses
import json
import sys
import types

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))  # not a package

import bench  # noqa: E402
import cases  # noqa: E402
import plots  # noqa: E402
import report  # noqa: E402
import work  # noqa: E402

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


def results() -> tuple[dict, dict]:
    """Of cases alone, of growth alone."""
    one = {
        "run": RUN,
        "case": dataclasses.asdict(CASE),
        "found": {"ours": side(1), "theirs": side(2)},
        "ratios": {"iteration": 2.0, "rollout": 2.0, "update": 2.0, "memory": 2.0},
        "shares": {},
        "needed": work.needed(CASE),
        "same_dtype": ["ours", "theirs"],
    }
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


def test_figures_have_three_digits():
    figures = [report._figure(seconds) for seconds in (0.1234, 1.234, 12.34, 123.4)]
    assert figures == ["0.123", "1.23", "12.3", "123"]


IDLE = """
class Side:
    def __init__(self, case, models, *, ends=False):
        self._ends = ends

    def device_peak_bytes(self):
        return None

    def iteration(self):
        if self._ends:
            raise SystemExit(3)
        return 4

    def rollout(self):
        return 4

    def update(self):
        return None

    def matmul(self):
        return 1.0

    stream, student_update, checkpoint = matmul, update, update
"""


@pytest.fixture
def idle(tmp_path, monkeypatch):
    """Sides that do nothing, one of which ends before its work is done."""
    (tmp_path / "idle.py").write_text(IDLE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    sides = {"ours": ("idle", {}), "theirs": ("idle", {}), "ends": ("idle", {"ends": True})}
    monkeypatch.setattr(bench, "SIDES", sides)
    monkeypatch.setattr(work, "write_models", lambda *_: {"teacher": "-", "student": "-"})


def test_what_was_done_over_the_time_it_took():
    def rate(*answers):
        found = bench.summary([{"seconds": s, "value": v} for s, v in answers])
        assert found["seconds"] == 2 and found["values"] == [v for _, v in answers]
        return found["per_second"]

    assert rate((1, 12), (9, 12), (2, 12)) == 6  # one slow turn of the same changes nothing
    assert rate((1, 12), (9, 12), (2, 24)) == 4


@pytest.mark.parametrize("in_turn", [False, True])
def test_every_part_is_measured_as_often_as_asked(idle, in_turn):
    found = bench.measure(CASE, ["ours", "theirs"], 2, (*bench.STEP, *bench.OTHERS), in_turn)
    assert set(found) == {"ours", "theirs"}
    for side in found.values():
        for part in (*bench.STEP, *bench.OTHERS):
            assert len(side[part]["all"]) == bench.turns(CASE, part, 2)
        assert {"load", "first_step", "first_step_cached"} < set(side)
        assert "per_second" in side["rollout"] and "per_second" not in side["update"]
    one = {"case": dataclasses.asdict(CASE), "found": found, "shares": {}}
    assert "ours | theirs" in report.case_table(one | {"ratios": bench.compare(CASE, found)})


@pytest.mark.parametrize("in_turn", [False, True])
def test_a_side_that_ends_is_left_out_and_its_memory_is_its_own(idle, in_turn):
    ballast = bytearray(b"1") * 2**28
    found = bench.measure(CASE, ["ends", "ours"], 1, bench.STEP, in_turn)
    assert set(found) == {"ours"}
    assert found["ours"]["peak_bytes"] < len(ballast)
    assert bench.compare(CASE, found) == {}


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
            for written in side["iteration"]["values"] + side["rollout"]["values"]:
                ends = case.mean_response is not None
                assert (written < case.rows * case.response) == ends
