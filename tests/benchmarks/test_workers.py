"""Runs in processes of their own, with benchmarks that those find by name."""

import os
import signal
import time
from dataclasses import replace

import torch
from typer.testing import CliRunner

from benchmarks import cli
from benchmarks.benchmark import Task
from benchmarks.plan import Plan
from benchmarks.results import ResultsFile, Run, Trial
from benchmarks.runs import make_run
from benchmarks.workers import Job, Workers
from tests.benchmarks.conftest import TINY

SETTINGS = TINY.presets["default"].settings
TRIAL = Trial.of(SETTINGS)
NAME = "tests.benchmarks.test_workers:OWN"
OWN = replace(TINY, name="own")


def _killed(output, target):
    os.kill(os.getpid(), signal.SIGKILL)


def _exits(output, target):
    os._exit(3)


def _raises(output, target):
    raise ZeroDivisionError("on purpose")


def _sleeps(output, target):
    time.sleep(60)


def _with(loss):
    return replace(OWN, tasks=(Task("class", loss, TINY.tasks[0].measures), TINY.tasks[1]))


KILLED, EXITS, RAISES, SLEEPS = map(_with, (_killed, _exits, _raises, _sleeps))


def _cannot_load(settings, data_root):
    raise OSError("no data")


NO_DATA = replace(OWN, load=_cannot_load)


def _job(name=NAME, method="sum", seed=0):
    return Job(name, SETTINGS, Run(method, seed, "linear", TRIAL), None)


def _all(workers, jobs, steps=None):
    """What becomes of the jobs, in their order."""
    waiting, ended = list(jobs), {}
    while waiting or not workers.is_idle:
        while waiting and workers.has_room:
            workers.start(waiting.pop(0))
        for job, record in workers.poll(
            0.2, lambda job, n: None if steps is None else steps.append(n)
        ):
            ended[job] = record
    return [ended[job] for job in jobs]


def test_runs_are_the_same_wherever_they_are_made():
    jobs = [_job(method=method, seed=seed) for method in ("sum", "mgda") for seed in (0, 1)]
    with Workers(2, 1, None) as workers:
        found = _all(workers, jobs)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    splits = TINY.load(SETTINGS, None)
    for job, record in zip(jobs, found, strict=True):
        here = make_run(OWN, SETTINGS, job.run, splits, None, lambda: None)
        assert (record.run, record.error) == (job.run, None)
        assert (record.test, record.validation) == (here.test, here.validation)
        assert record.threads == 1
    torch.set_num_threads(threads)


def test_what_happens_to_one_costs_its_run_and_nothing_else():
    names = ["KILLED", "EXITS", "RAISES", "NO_DATA"]
    jobs = [_job(NAME.replace("OWN", name)) for name in names]
    with Workers(1, 1, None) as workers:
        *failed, good = _all(workers, [*jobs, _job()])
    assert [record.error for record in failed] == [
        "WorkerDied: the process was ended by SIGKILL; the machine may have run out of memory",
        "WorkerDied: the process ended with exit code 3",
        "ZeroDivisionError: on purpose",
        "OSError: no data",
    ]
    assert [record.run for record in failed] == [job.run for job in jobs]
    assert good.error is None
    assert good.test["class"]["accuracy"] > 0


def test_the_processes_end_with_their_context():
    with Workers(1, 1, None) as workers:
        workers.start(_job(NAME.replace("OWN", "SLEEPS")))
        (worker,) = workers._workers
        time.sleep(0.1)
        started = time.monotonic()
    assert time.monotonic() - started < 30
    assert worker._process.exitcode is not None


def test_the_command_fills_the_table(tmp_path):
    words = ["run", NAME, "--methods", "sum", "mgda", "--seeds", "2", "--tune"]
    words += ["--workers", "2", "--out", str(tmp_path)]
    result = CliRunner().invoke(cli.app, words, prog_name="benchmarks")
    assert result.exit_code == 0, result.output
    records, _ = ResultsFile(tmp_path).read()
    plan = Plan(OWN, OWN.presets["default"], ("sum", "mgda"), 2)
    assert {record.fingerprint for record in records} == {plan.fingerprint}
    # Three rates for each of four rows, three pairs more of decay and dropout, and a second seed.
    assert len(records) == len({record.run for record in records}) == 3 * 4 + 3 + 4
    assert all(record.step_time is not None for record in records if record.method != "single_task")
    assert "run 19 of 19" in result.output
    assert "unitary" in result.output
    again = CliRunner().invoke(cli.app, words, prog_name="benchmarks")
    assert f"19 of 19 runs found in {tmp_path / 'results.jsonl'}" in again.output
    assert len(ResultsFile(tmp_path).read()[0]) == 19


def test_a_process_that_died_between_two_runs():
    with Workers(1, 1, None) as workers:
        (good,) = _all(workers, [_job()])
        assert good.error is None
        (worker,) = workers._workers
        worker._process.kill()
        worker._process.join()
        lost, next_one = _all(workers, [_job(seed=1), _job(seed=2)])
    assert lost.error.startswith("WorkerDied: the process was ended by SIGKILL")
    assert next_one.error is None
