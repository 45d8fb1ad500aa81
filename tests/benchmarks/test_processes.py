"""Several processes: the table of one process, and an end for all of them.

torchrun itself is started once. The other tests start its processes themselves: nobody then ends
those that wait for one that is gone.
"""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import cli, launch, processes
from benchmarks.errors import BenchmarkError, EndedElsewhere
from benchmarks.results import ResultsFile

ROOT = Path(__file__).parents[2]

# Seconds that a command may take on a machine that is busy with other things.
LIMIT = 240


@pytest.fixture(scope="module")
def server():
    """Starts processes in which all that takes seconds to import is there."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.benchmarks.processes_main", "benchmarks.plot"])
    return context


class Run:
    """A command in several processes, or in one."""

    def __init__(self, server, folder, *arguments, size=2, **environment):
        from tests.benchmarks.processes_main import main

        self.files = [(folder / f"out{rank}", folder / f"err{rank}") for rank in range(size)]
        common = {"OMP_NUM_THREADS": "1", **environment}
        if size > 1:
            with socket.socket() as found:
                found.bind(("127.0.0.1", 0))
                port = found.getsockname()[1]
            common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            common |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
        self.processes = []
        for rank, (out, err) in enumerate(self.files):
            out.unlink(missing_ok=True)
            err.unlink(missing_ok=True)
            own = {"RANK": str(rank), "OUT": str(out), "ERR": str(err)}
            # One process alone would start others, which do not know the tiny benchmark.
            alone = [] if size > 1 else ["--workers", "0"]
            target = (["run", *map(str, arguments), *alone], common | own)
            self.processes.append(server.Process(target=main, args=target, daemon=True))
            self.processes[-1].start()

    def end(self):
        """Exit codes of those that end; the others are killed and have None."""
        deadline = time.monotonic() + LIMIT
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
        return codes

    def said(self, stream=0):
        return [files[stream].read_text() for files in self.files]


def _lines(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def _metrics(folder):
    return {
        (line["architecture"], line["method"], line["seed"], split, task, measure): value
        for line in _lines(folder)
        for split in ("test", "validation")
        for task, measures in line[split].items()
        for measure, value in measures.items()
    }


def test_torchrun_fills_the_table_of_one_process(tmp_path):
    arguments = ["run", "multimnist", "--quick", "--methods", "upgrad", "--out"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", "-m", "benchmarks", *arguments, tmp_path / "two"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.count("test set") == done.stdout.count("│ upgrad") == 1
    assert done.stdout.count("run 2 of 2: upgrad, seed 0:") == 1
    assert "torchrun --nproc-per-node 2 -m benchmarks run multimnist --full" in done.stdout
    lines = _lines(tmp_path / "two")
    assert [(line["method"], line["error"]) for line in lines] == [
        ("single_task", None),
        ("upgrad", None),
    ]
    assert {line["processes"] for line in lines} == {2}
    assert lines[1]["step_time"] > 0

    found = CliRunner().invoke(cli.app, [*arguments, str(tmp_path / "one")])
    assert found.exit_code == 0
    assert {line["processes"] for line in _lines(tmp_path / "one")} == {1}
    # An accuracy moves by steps: one of the 1,024 or 512 images may be the other way.
    assert _metrics(tmp_path / "two") == pytest.approx(_metrics(tmp_path / "one"), abs=1.5 / 512)


# One of each way in which a step is made.
METHODS = ["sum", "upgrad", "graddrop", "mgda_ub", "famo", "marigold", "moml", "sdmgrad", "rlw"]


def test_uneven_batches_and_every_kind_of_step(server, tmp_path):
    arguments = ("tiny", "--seeds", "1", "--methods", *METHODS, "--out")
    runs = [
        Run(server, tmp_path, *arguments, tmp_path / str(size), size=size).end() for size in (2, 1)
    ]
    assert runs == [[0, 0], [0]]
    alone = _metrics(tmp_path / "1")
    assert len(alone) == 4 * (1 + len(METHODS))
    assert _metrics(tmp_path / "2") == pytest.approx(alone, rel=1e-5)


def test_architectures(server, tmp_path):
    # Noise that is drawn; a term in the losses; masks that are searched for before the training;
    # weights that no loss reaches.
    architectures = ("ltb", "dselect_k", "sparse_sharing", "pruned")
    arguments = ("tiny", "--seeds", "1", "--methods", "mean", "moml", "--architectures")
    outs = {size: tmp_path / str(size) for size in (2, 1)}
    runs = [
        Run(server, tmp_path, *arguments, *architectures, "--out", out, size=size).end()
        for size, out in outs.items()
    ]
    assert runs == [[0, 0], [0]]
    found, alone = (_metrics(out) for out in outs.values())
    assert len(alone) == 4 * (1 + 2 * (1 + len(architectures)))
    assert found == pytest.approx(alone, rel=1e-5)
    assert all(line["step_time"] for line in _lines(outs[2]) if line["method"] != "single_task")


def test_a_table_goes_on_with_another_number_of_processes(server, tmp_path):
    arguments = ("tiny", "--methods", "sum", "--out", tmp_path)
    for size, seeds in ((1, 1), (2, 2), (2, 2)):
        run = Run(server, tmp_path, *arguments, "--seeds", seeds, size=size)
        assert run.end() == [0] * size
    assert [(line["seed"], line["processes"]) for line in _lines(tmp_path)] == [
        *[(0, 1), (0, 1)],
        *[(1, 2), (1, 2)],
    ]
    # The step takes another time.
    assert len({line["step_time"] for line in _lines(tmp_path)} - {None}) == 2
    first, second = run.said()
    assert "4 of 4 runs found" in first
    assert "runs of 1 and 2 processes" in " ".join(first.split())
    assert second == ""


def test_what_fails_everywhere_is_a_failed_run(server, tmp_path):
    arguments = ("tiny", "--seeds", "1", "--methods", "troubled", "sum", "--out", tmp_path)
    run = Run(server, tmp_path, *arguments, TROUBLE="everywhere")
    assert run.end() == [1, 0]
    errors = {line["method"]: line["error"] for line in _lines(tmp_path)}
    assert errors == {
        "single_task": None,
        "troubled": "ZeroDivisionError: on purpose",
        "sum": None,
    }
    first, second = run.said()
    assert first.count("troubled, seed 0: failed with ZeroDivisionError: on purpose") == 1
    assert second == ""
    assert run.said(1) == ["", ""]


@pytest.mark.parametrize(
    ("trouble", "where", "message"),
    [
        ("there", 1, "rank 1 failed with ZeroDivisionError: on purpose"),
        ("loss", 1, "rank 1 failed with ZeroDivisionError: on purpose"),
        ("SIGKILL", 1, "rank 1 waits or is gone"),
        ("SIGKILL", 0, "rank 0 waits or is gone"),
        ("SIGSTOP", 1, "rank 1 waits or is gone"),
    ],
)
def test_a_process_that_fails_alone_ends_them_all(server, tmp_path, trouble, where, message):
    arguments = ("tiny", "--seeds", "1", "--methods", "troubled", "--out", tmp_path)
    run = Run(server, tmp_path, *arguments, TROUBLE=trouble, WHERE=str(where))
    other, troubled = run.processes[1 - where], run.processes[where]
    other.join(LIMIT)
    assert other.exitcode == 1
    if trouble == "SIGSTOP":
        troubled.kill()
    assert run.end()[where] == (-signal.SIGKILL if trouble.startswith("SIG") else 1)
    # Beside it there are warnings of torch's own where the store is gone.
    (said,) = [
        line for text in run.said(1) for line in text.splitlines() if line.startswith("Error: ")
    ]
    assert message in said
    assert "Traceback" not in "".join(run.said(1))
    # What was finished before is kept, and what was not is no failed run.
    assert [line["method"] for line in _lines(tmp_path)] == (
        [] if trouble == "loss" else ["single_task"]
    )


def test_ctrl_c_ends_all_and_the_same_command_goes_on(server, tmp_path):
    arguments = ("tiny", "--seeds", "1", "--methods", "troubled", "--out", tmp_path)
    run = Run(server, tmp_path, *arguments, TROUBLE="interrupt")
    assert run.end() == [130, 130]
    said = "".join(run.said(1))
    assert said.count("1 of 2 runs are kept") == said.count("\nInterrupted. ") == 1
    assert "Go on with: torchrun --nproc-per-node 2 -m benchmarks run tiny --methods" in said
    run = Run(server, tmp_path, *arguments, TROUBLE="")
    assert run.end() == [0, 0]
    assert "1 of 2 runs found" in run.said()[0]
    assert [line["method"] for line in _lines(tmp_path)] == ["single_task", "troubled"]


def test_what_is_wrong_before_the_training_is_said_once(server, tmp_path):
    (tmp_path / "file").write_text("")
    for arguments, message in (
        (("tinny", "--out", tmp_path / "out"), "Error: `NAME` must name what `list` shows"),
        (("tiny", "--out", tmp_path / "file" / "out"), "Error: `--out` must be a folder"),
    ):
        run = Run(server, tmp_path, *arguments)
        codes = run.end()
        assert codes[0] == 2
        assert codes[1] > 0
        said = "".join(run.said(1))
        assert said.startswith(message)
        assert said.count("\n") == 1
        assert run.said() == ["", ""]


def _in_threads(action):
    """What `action(team)` returns, or raises, for each of two that share a store."""
    store = torch.distributed.HashStore()

    def tried(rank):
        try:
            return action(processes._Launched(store, rank, 2))
        except BenchmarkError as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(tried, range(2)))


def test_only_the_first_downloads():
    seen = []

    def load(team):
        def action():
            seen.append((team.rank, "starts"))
            time.sleep(0.1)
            seen.append((team.rank, "ends"))
            return team.rank

        return team.after_lead(action)

    assert _in_threads(load) == [0, 1]
    assert seen == [(rank, what) for rank in (0, 1) for what in ("starts", "ends")]


def test_where_the_first_fails_the_others_end_quietly():
    def load(team):
        if team.rank == 0:
            assert team.speaks()
            raise BenchmarkError("no data")
        return team.after_lead(lambda: pytest.fail("there is nothing to load"))

    first, second = _in_threads(load)
    assert str(first) == "no data"
    assert isinstance(second, EndedElsewhere)


def test_work_that_went_the_same_way_everywhere_is_settled(monkeypatch):
    monkeypatch.setattr(processes, "GRACE", timedelta(seconds=0.2))
    assert _in_threads(lambda team: team.settle("x")) == ["x", "x"]
    assert _in_threads(lambda team: [team.settle(None), team.settle("x")]) == [[None, "x"]] * 2
    for error in _in_threads(lambda team: team.settle("xy"[team.rank])):
        assert "rank 0 failed with x" in str(error)
        assert "rank 1 failed with y" in str(error)
    first, second = _in_threads(lambda team: team.settle("x") if team.rank == 0 else None)
    assert "rank 1 waits or is gone" in str(first)
    assert second is None


def test_one_says_why_all_end():
    assert sorted(_in_threads(lambda team: team.speaks())) == [False, True]


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_parts_make_up_the_whole(count):
    teams = [processes._Launched(None, rank, 3) for rank in range(3)]
    parts = [team.part(count) for team in teams]
    assert [i for index, n in parts for i in index[:n].tolist()] == list(range(count))
    assert all(len(index) == max(n, 1) for index, n in parts)


def test_the_words_that_start_as_many_again(monkeypatch):
    assert launch.launcher() == ["python"]
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert launch.launcher() == ["torchrun", "--nnodes", "2", "--nproc-per-node", "4"]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert launch.launcher() == ["torchrun", "--nproc-per-node", "8"]


def test_a_results_file_from_before_there_were_several_processes(tmp_path):
    results = ResultsFile(tmp_path)
    fields = dict.fromkeys(("benchmark", "method", "architecture", "seed", "fingerprint"))
    fields |= dict.fromkeys(("error", "test", "validation", "aggregator", "step_time"))
    fields |= dict.fromkeys(("train_seconds", "settings", "versions"))
    results.path.write_text(json.dumps(fields) + "\n")
    (record,), unreadable = results.read()
    assert (record.processes, unreadable) == (1, 0)
