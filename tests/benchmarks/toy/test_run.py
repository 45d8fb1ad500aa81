import csv
import json

import pytest
from typer.testing import CliRunner

from benchmarks import cli
from benchmarks.toy import runner
from benchmarks.toy.published import published
from benchmarks.toy.records import Record
from benchmarks.toy.settings import SETTINGS
from benchmarks.toy.table import differences, screen_table, to_csv, to_markdown

SETTING = SETTINGS["nash_famo"]


def _invoke(*args):
    return CliRunner().invoke(cli.app, [str(arg) for arg in args], prog_name="benchmarks")


def _lines(folder):
    return [json.loads(line) for line in (folder / "toy.jsonl").read_text().splitlines()]


def test_list_and_help_know_it():
    assert "  toy " in _invoke("list").output
    help_text = _invoke("run", "toy", "--help").output
    assert "--setting" in help_text
    assert "--epochs" not in help_text
    assert "--epochs" in _invoke("run", "--help").output


def test_from_end_to_end_and_again(tmp_path, monkeypatch):
    args = ("run", "toy", "--steps", "300", "--workers", "1", "--out", tmp_path)
    methods = ("--methods", "sum", "mgda", "dwa", "krum", "mgda_ub")
    result = _invoke(*args, *methods)
    assert result.exit_code == 0, result.output
    lines = _lines(tmp_path)
    assert [(r["label"], r["start"]) for r in lines if r["label"] == "sum"] == [
        ("sum", k) for k in range(5)
    ]
    for line in lines:
        assert line["first"] == list(SETTING.starts[line["start"]])
        assert len(line["trajectory"]) <= 400
        assert line["trajectory"][-1][1:] == pytest.approx(line["end"], abs=1e-5)
        assert (line["error"] is None) == (line["trajectory"][-1][0] == 300)
    errors = {(r["label"], r["start"]): r["error"] for r in lines if r["error"]}
    assert {label for label, _ in errors} == {"dwa", "krum"}
    assert {start for label, start in errors if label == "krum"} == set(range(5))
    assert "at least 3 tasks" in errors["krum", 0]
    for part in ("krum: ", "mgda_ub: works at a representation", "dwa: ", "0/5"):
        assert part in result.output
    with (tmp_path / "toy.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 20
    assert {r["official_x1"] for r in rows} == {""}  # They are of 50,000 steps.
    assert "| mgda | gradbal |" in (tmp_path / "toy.md").read_text()
    for name in ("trajectories", "losses"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        svg = (tmp_path / f"{name}.svg").read_text()
        assert "<svg" in svg

    # What is there is not made again, and what is not is added.
    made = []
    descend = runner.from_all_starts
    monkeypatch.setattr(
        runner, "from_all_starts", lambda *args: made.append(args[2].label) or descend(*args)
    )
    again = _invoke(*args, *methods, "pcgrad")
    assert again.exit_code == 0, again.output
    assert made == ["pcgrad"]
    assert "4 of 5 methods found" in again.output
    assert _lines(tmp_path)[:20] == lines
    assert len(_lines(tmp_path)) == 25


def test_other_steps_are_other_trajectories(tmp_path):
    for steps in (20, 40):
        _invoke("run", "toy", "--methods", "sum", "--steps", steps, "--out", tmp_path)
    assert [r["steps"] for r in _lines(tmp_path)] == [20] * 5 + [40] * 5


def test_workers_find_the_same(tmp_path):
    methods = ("--methods", "rlw", "famo", "--steps", "30")
    for workers in (1, 2):
        out = tmp_path / str(workers)
        result = _invoke("run", "toy", *methods, "--workers", workers, "--out", out)
        assert result.exit_code == 0, result.output
    alone, shared = (
        {(r["label"], r["start"]): r["end"] for r in _lines(tmp_path / str(n))} for n in (1, 2)
    )
    assert alone == shared
    assert len(alone) == 10


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--methods", "mgdaa"), "did you mean mgda"),
        (("--steps", "0"), "`--steps` must be at least 1, found 0"),
        (("--workers", "0"), "`--workers` must be at least 1, found 0"),
        (("--setting", "famo"), "did you mean nash_famo"),
    ],
)
def test_mistakes_are_told(tmp_path, args, message):
    result = _invoke("run", "toy", *args, "--out", tmp_path)
    assert result.exit_code == 2
    assert message in result.output


def _record(label, start, end, gap, error=None):
    return Record(
        setting="nash_famo",
        label=label,
        method=label,
        options={},
        clip=None,
        start=start,
        fingerprint="",
        steps=50_000,
        first=list(SETTING.starts[start]),
        end=list(end),
        losses=[0.0, 0.0],
        gap=gap,
        reached=error is None and gap < 0.5,
        steps_to_front=9_000 if error is None and gap < 0.5 else None,
        error=error,
        failed_at=None if error is None else 7,
        microseconds=20.0,
        trajectory=[[0, *SETTING.starts[start]], [50_000, *end]],
        versions={},
    )


def test_what_differs_from_the_official_numbers_is_said():
    same = [
        _record("sum", k, found.end, found.gap)
        for (label, source, k), found in published("nash_famo").items()
        if (label, source) == ("sum", "official")
    ]
    assert len(same) == 5
    assert differences(SETTING, same) == []
    other = [*same[:2], _record("sum", 2, (-5.727, -8.409), 0.002), *same[3:]]
    (line,) = differences(SETTING, other)
    assert "from (9, 9) on the front, theirs not" in line
    assert "chaotic" in line
    moved = _record("famo", 1, (0.2, -8.355), 0.01)
    lines = differences(SETTING, [moved])
    assert "from (0, 0) x1 0.200, theirs 0.077" in lines[0]
    assert "the derivatives by x1 are 0 but for rounding" in lines[0]
    assert "chaotic" not in lines[0]
    refused = _record("dwa", 0, (-8.0, 7.0), 110.0, "ValueError: 'dwa' needs this, found that")
    assert differences(SETTING, [refused]) == []
    (line,) = differences(SETTING, [_record("dwa", 1, (0, 0), 77.0, "ValueError: no")])
    assert "no number, theirs on the front" in line


def test_the_table_has_the_official_numbers_below_ours():
    records = [_record("uw", k, (6.7, -8.43), 0.1) for k in range(5)]
    text = to_markdown(SETTING, records, 50_000, {"krum": "needs three tasks"})
    lines = [line for line in text.splitlines() if line.startswith("|  | official |")]
    assert lines[0].count("✗") == 5
    assert "✗ 21.3 %" in lines[0]
    assert "- krum: needs three tasks" in text
    # After fewer steps there is nothing to compare with.
    assert "official |" not in to_markdown(SETTING, records, 2_000, {}).split("## ")[0]
    rows = csv.DictReader(to_csv(SETTING, records, 50_000).splitlines())
    assert [float(row["official_x1"]) for row in rows][3:] == [-6.65814, 6.74764]
    table = screen_table(SETTING, records, 50_000)
    assert table.row_count == 3
