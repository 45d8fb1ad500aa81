import csv
import json

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import cli
from benchmarks.lines import Lines
from benchmarks.pareto import runner
from benchmarks.pareto.picture import write_pictures
from benchmarks.pareto.records import Job, Record, make
from benchmarks.pareto.table import remarks, screen_tables, to_csv, to_markdown


def _invoke(*args):
    return CliRunner().invoke(cli.app, [str(arg) for arg in args], prog_name="benchmarks")


def _lines(folder):
    return [json.loads(line) for line in (folder / "pareto.jsonl").read_text().splitlines()]


def test_from_end_to_end_and_again(tmp_path, monkeypatch):
    args = ("run", "pareto", "--problems", "f4,ewq", "--steps", "20", "--workers", "1")
    args += ("--seeds", "2", "--out", tmp_path, "--methods", "constant", "mgda")
    result = _invoke(*args)
    assert result.exit_code == 0, result.output
    lines = _lines(tmp_path)
    assert len(lines) == 2 + 5
    learned = [r for r in lines if r["problem"] == "f4"]
    assert [r["number"] for r in learned] == [0, 1]
    assert all(len(r["points"]) == 100 and r["hypervolume"] is not None for r in learned)
    paths = [r for r in lines if r["problem"] == "ewq"]
    assert all(len(r["points"]) == 51 and r["stationarity"] is not None for r in paths)
    for part in ("Hypervolume", "ewq", "TorchJD", "Written"):
        assert part in result.output
    for name in ("pareto", "ewq"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (tmp_path / f"{name}.svg").read_text()
    with (tmp_path / "pareto.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    stalled = next(r for r in rows if (r["problem"], r["number"]) == ("ewq", "1"))
    assert float(stalled["x2"]) == float(stalled["torchjd_x2"]) == -3.0

    made = []
    monkeypatch.setattr(runner, "make", lambda job, tell: made.append(job))
    again = _invoke(*args)
    assert again.exit_code == 0, again.output
    assert "7 of 7 runs found" in again.output
    assert made == []
    assert _lines(tmp_path) == lines


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--problems", "f7"), "`--problems` must name"),
        (("--methods", "stch_scalr"), "did you mean stch_scalar"),
        (("--problems", "f4", "--methods", "mgda"), "`--methods` must name scalarizers"),
        (("--seeds", "0"), "`--seeds` must be at least 1, found 0"),
    ],
)
def test_mistakes_are_told(tmp_path, args, message):
    result = _invoke("run", "pareto", *args, "--out", tmp_path)
    assert result.exit_code == 2
    assert message in result.output


def _record(problem, method, number, **found):
    return Record(
        problem=problem,
        method=method,
        number=number,
        steps=2000,
        fingerprint="",
        hypervolume=found.get("hypervolume"),
        stationarity=found.get("stationarity"),
        points=found["points"],
        versions={},
    )


def test_others_numbers_stand_beside_ours():
    points = [[0.0, 1.0], [1.0, 0.0]]
    records = [
        _record("f6", "constant", k, hypervolume=v, points=points)
        for k, v in enumerate((0.2, 0.22, 0.24))
    ]
    records.append(_record("cqf", "imtl_g", 0, stationarity=0.0, points=[[0.5, 0.5], [0.55, 1.97]]))
    records.append(
        _record("cqf", "mgda", 0, stationarity=0.0, points=[[0.5, 0.5], [0.67154, 1.46241]])
    )
    text = to_markdown(records)
    assert "| f6 | gradbal | 0.2200 ± 0.0200 | 0.5433 |" in text
    assert "|  | official | 0.2274 ± 0.0132 |  |" in text
    assert "(−0.1148, 4.1515)" in text
    (line,) = remarks(records)
    assert line.startswith("imtl_g ends elsewhere than TorchJD's on cqf from (0.5, 0.5). ")
    assert len(screen_tables(records)) == 2
    rows = list(csv.DictReader(to_csv(records).splitlines()))
    assert rows[0]["official_hypervolume_mean"] == "0.2274"
    assert rows[0]["x1"] == ""


def test_a_network_that_ended_in_nan_has_no_front(tmp_path, monkeypatch):
    nothing = torch.full((100, 2), torch.nan, dtype=torch.float64)
    monkeypatch.setattr("benchmarks.pareto.records.learn", lambda *args: nothing)
    record = make(Job("f5", "constant", 0, 20), lambda n: None)
    assert (record.hypervolume, record.points) == (0.0, [])
    Lines(tmp_path / "pareto.jsonl", Record).write([record])
    assert [path.name for path in write_pictures([record], tmp_path)] == [
        "pareto.png",
        "pareto.svg",
    ]
    assert "f5" in to_csv([record])
