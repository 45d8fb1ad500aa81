import csv
import io
import statistics
from dataclasses import asdict

import pytest
from rich.console import Console

from benchmarks.benchmark import SINGLE_TASK
from benchmarks.plan import Plan
from benchmarks.plot import write_plot
from benchmarks.report import Stat, failures, screen_table, summarise, write_csv, write_whole
from benchmarks.results import Record
from tests.benchmarks.conftest import TINY

PLAN = Plan(TINY, TINY.presets["default"], ("sum", "mgda"), seeds=2)


def _record(method, seed, accuracy=None, mse=None, **other):
    fields = {
        "benchmark": "tiny",
        "method": method,
        "architecture": "linear",
        "seed": seed,
        "fingerprint": PLAN.fingerprint,
        "error": None,
        "test": {"class": {"accuracy": accuracy}, "size": {"mse": mse}},
        "validation": {},
        "aggregator": "",
        "step_time": None,
        "train_seconds": 1.0,
        "settings": asdict(PLAN.settings),
        "versions": {},
    }
    return Record(**{**fields, **other})


RECORDS = [
    _record(SINGLE_TASK, 0, 0.8, 2.0),
    _record(SINGLE_TASK, 1, 0.8, 4.0),
    _record("sum", 0, 0.6, 3.0, step_time=1.0),
    _record("sum", 1, 0.8, 6.0, step_time=1.0),
    _record("mgda", 0, 0.9, 3.0, step_time=1.75),
    _record("mgda", 1, error="ValueError: [bold] boom", test={}, step_time=1.25),
    _record("mgda", 2, 0.1, 9.0),  # not a seed of the plan
    _record("sum", 0, 0.1, 9.0, fingerprint="other"),
]


def _printed(rows):
    console = Console(file=io.StringIO(), width=120)
    console.print(screen_table(PLAN, rows))
    return console.file.getvalue()


def test_numbers_by_hand():
    single, plain, mgda = summarise(PLAN, RECORDS)
    assert [row.method for row in (single, plain, mgda)] == [SINGLE_TASK, "sum", "mgda"]
    assert (plain.seeds, plain.failed, mgda.seeds, mgda.failed) == (2, 0, 1, 1)
    accuracy = plain.test["class", "accuracy"]
    assert accuracy.mean == pytest.approx(0.7)
    assert accuracy.spread == pytest.approx(statistics.stdev([0.6, 0.8]))
    # Baseline 0.8 and 3: seed 0 is 25 % and 0 % worse, seed 1 is 0 % and 100 % worse.
    assert plain.delta_m.mean == pytest.approx((12.5 + 50) / 2)
    assert plain.delta_p.mean == pytest.approx(-(12.5 + 50) / 2)
    assert single.delta_m.mean == pytest.approx(0)
    assert mgda.delta_m == Stat(pytest.approx(-6.25), None)
    assert mgda.step_time == 1.5
    assert single.step_time is None


def test_the_table_on_the_screen():
    text = _printed(summarise(PLAN, RECORDS))
    for part in ("70.00 ± 14.14", "4.50 ± 2.12", "31.25 ± 26.52", "1.50×", "1 of 2 failed"):
        assert part in text
    assert "-0.00" not in text


def test_a_method_that_always_fails_and_a_missing_baseline():
    records = [
        _record("sum", 0, 0.6, 3.0),
        *(_record("mgda", seed, error="ValueError: x", test={}) for seed in (0, 1)),
    ]
    plain, mgda = summarise(PLAN, records)
    assert plain.delta_m is None
    assert (mgda.seeds, mgda.failed, mgda.delta_m) == (0, 2, None)
    line = next(line for line in _printed([plain, mgda]).splitlines() if "mgda" in line)
    assert "failed" in line


def test_failures_are_told():
    assert failures(PLAN, RECORDS) == ["mgda, seed 1: failed with ValueError: [bold] boom"]


def test_csv(tmp_path):
    write_csv(PLAN, summarise(PLAN, RECORDS), tmp_path / "summary.csv")
    with (tmp_path / "summary.csv").open(newline="") as stream:
        single, plain, mgda = csv.DictReader(stream)
    assert float(plain["class_accuracy_mean"]) == pytest.approx(0.7)
    assert float(plain["size_mse_std"]) == pytest.approx(2.1213, abs=1e-4)
    assert float(plain["delta_m_mean"]) == -float(plain["delta_p_mean"]) == pytest.approx(31.25)
    assert (mgda["seeds"], mgda["failed"], mgda["size_mse_std"]) == ("1", "1", "")
    assert single["fingerprint"] == PLAN.fingerprint


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(target):
        target.write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_whole(path, fail)
    assert path.read_text() == "old"
    write_whole(path, lambda target: target.write_text("new"))
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_plot_labels_every_method_once_and_without_overlap(tmp_path, monkeypatch):
    figures = []

    def keep(path, write):
        figures.append(write.__closure__[0].cell_contents)
        write(path)

    monkeypatch.setattr("benchmarks.plot.write_whole", keep)
    # Ten methods at one and the same place, the hardest case for labels.
    names = tuple(f"method_{number}" for number in range(10))
    plan = Plan(TINY, TINY.presets["default"], names, seeds=1)
    records = [_record(name, 0, 0.5, 1.0) for name in (SINGLE_TASK, *names)]
    write_plot(plan, summarise(plan, records), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")

    (figure,) = figures
    (axes,) = figure.axes
    renderer = figure.canvas.get_renderer()
    # Annotation.get_window_extent takes in the leader line; the text alone is meant here.
    boxes = {text.get_text(): _text_box(text, renderer) for text in axes.texts}
    assert set(boxes) == set(names)
    placed = list(boxes.values())
    for number, box in enumerate(placed):
        assert not any(box.overlaps(other) for other in placed[number + 1 :])
        assert figure.bbox.containsx(box.x0)
        assert figure.bbox.containsx(box.x1)
    assert axes.get_xlabel() == "class test accuracy (%)"
    assert axes.get_ylabel() == "size test mse"


def _text_box(annotation, renderer):
    from matplotlib.text import Text

    annotation.update_positions(renderer)
    return Text.get_window_extent(annotation, renderer)


def test_plot_without_any_good_run(tmp_path):
    plan = Plan(TINY, TINY.presets["default"], ("sum",), seeds=1)
    rows = summarise(plan, [_record("sum", 0, error="ValueError: x", test={})])
    write_plot(plan, rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").is_file()
