from collections import Counter
from dataclasses import replace

import pytest

from benchmarks.reporting.selection import select
from benchmarks.results import Trial
from tests.benchmarks.reporting.records import failed, make_benchmark, metrics, record

TWO = make_benchmark("two", ("a", "b"))
KNOWN = {"two": TWO}


def _grid(method, scores, seed=0, **other):
    """One record for each learning rate."""
    return [
        record(TWO, method, seed, 0.5, score, lr=lr, **other)
        for lr, score in zip((1e-4, 1e-3, 1e-2), scores, strict=True)
    ]


def _chosen(records):
    """By method, the learning rate of the trial that it is given."""
    (selection,), _ = select(records, KNOWN)
    return {entry.method: entry.trial.lr for entry in selection.entries}


SINGLE = _grid("single_task", (0.5, 0.6, 0.7))


def test_best_on_validation_is_chosen():
    records = [*SINGLE, *_grid("mean", (0.5, 0.4, 0.3)), *_grid("mgda", (0.5, 0.6, 0.4))]
    assert _chosen(records) == {"single_task": 1e-2, "mean": 1e-4, "mgda": 1e-3}


def test_measures_are_weighed_against_the_middle_single_task_run():
    # Against (0.8, 0.2), the middle rate's run, losing 0.2 and gaining 0.1 is −25 % and +50 %.
    single = [
        record(TWO, "single_task", 0, 0.5, validation, lr=lr)
        for lr, validation in ((1e-4, (0.2, 0.8)), (1e-3, (0.8, 0.2)), (1e-2, (0.2, 0.8)))
    ]
    mean = [
        record(TWO, "mean", 0, 0.5, validation, lr=lr)
        for lr, validation in ((1e-4, (0.8, 0.2)), (1e-3, (0.6, 0.3)))
    ]
    assert _chosen([*single, *mean])["mean"] == 1e-3


def test_the_choice_never_looks_at_the_test_set():
    records = [*SINGLE, *_grid("mean", (0.3, 0.4, 0.5))]
    tests = [0.1, 0.9, 0.2, 0.8, 0.7, 0.3]
    shuffled = [
        replace(r, test=metrics(TWO, value)) for r, value in zip(records, tests, strict=True)
    ]
    assert _chosen(records) == _chosen(shuffled)
    assert _chosen(records)["mean"] == 1e-2


def test_only_the_lowest_seed_decides():
    records = [*SINGLE, *_grid("mean", (0.5, 0.4, 0.3)), record(TWO, "mean", 1, 0.5, 0.99, lr=1e-2)]
    assert _chosen(records)["mean"] == 1e-4


def test_failed_trials_lose_and_a_method_may_fail_altogether():
    records = [
        *SINGLE,
        *_grid("mean", (0.3, 0.4, 0.5))[:2],
        failed(TWO, "mean", 0, "x", lr=1e-2),
        failed(TWO, "mgda", 0, "boom", lr=1e-3),
    ]
    (selection,), _ = select(records, KNOWN)
    by_method = {entry.method: entry for entry in selection.entries}
    assert by_method["mean"].trial.lr == 1e-3
    assert by_method["mean"].finished
    mgda = by_method["mgda"]
    assert (mgda.good, len(mgda.failed), mgda.tried, mgda.trials) == ((), 1, 1, 3)


def test_without_a_baseline_the_first_trial_stands_in():
    assert _chosen(_grid("mean", (0.3, 0.5, 0.4)))["mean"] == 1e-4


def test_a_validation_measure_of_zero_decides_nothing():
    single = [record(TWO, "single_task", 0, 0.5, (0.0, 0.5))]
    records = [*single, *_grid("mean", ((0.9, 0.1), (0.1, 0.2), (0.5, 0.1)))]
    assert _chosen(records)["mean"] == 1e-3


def test_the_newest_settings_count_and_others_are_told():
    old = [replace(r, settings={**r.settings, "epochs": 1}) for r in SINGLE]
    versions = {"gradbal": "0.0.9", "torch": "2.14.1", "python": "3.11.7"}
    older = [replace(r, versions=versions) for r in SINGLE]
    revision = [replace(r, fingerprint="before") for r in SINGLE]
    (selection,), _ = select([*old, *older, *revision, *SINGLE], KNOWN)
    assert selection.records == tuple(SINGLE)
    assert (selection.left_aside, selection.left_seconds) == (9, 18)


def test_another_python_is_the_same_table():
    other = {**SINGLE[0].versions, "python": "3.10.1"}
    (selection,), _ = select([replace(SINGLE[0], versions=other), *SINGLE[1:]], KNOWN)
    assert len(selection.records) == 3


def test_a_later_run_takes_the_place_of_a_failed_one():
    (selection,), _ = select([failed(TWO, "single_task", 0, "x", lr=1e-4), *SINGLE], KNOWN)
    assert all(r.error is None for r in selection.records)


def test_what_is_missing_is_known():
    records = [*SINGLE, *_grid("mean", (0.3, 0.4, 0.5))[1:]]
    records += [record(TWO, "single_task", seed, 0.5, lr=1e-2) for seed in (1, 2)]
    records += [record(TWO, "mean", 1, 0.5, lr=1e-2)]
    (selection,), _ = select(records, KNOWN)
    single, mean = selection.entries
    assert single.finished
    assert (mean.tried, mean.trials, mean.missing_seeds, mean.finished) == (2, 3, 1, False)
    assert selection.grid == tuple(Trial(lr, 0.0, 0.0) for lr in (1e-4, 1e-3, 1e-2))


def test_unitary_has_more_trials_and_is_finished_all_the_same():
    records = [*SINGLE, *_grid("unitary", (0.3, 0.4, 0.5))]
    records.append(record(TWO, "unitary", 0, 0.5, 0.9, lr=1e-3, decay=1e-4))
    (selection,), _ = select(records, KNOWN)
    unitary = selection.entries[1]
    assert unitary.trial == Trial(1e-3, 1e-4, 0.0)
    assert (unitary.tried, unitary.finished) == (4, True)


def test_unknown_benchmarks_are_counted():
    other = replace(SINGLE[0], benchmark="gone")
    selections, unknown = select([other, other, *SINGLE], KNOWN)
    assert [selection.benchmark.name for selection in selections] == ["two"]
    assert unknown == Counter({"gone": 2})


@pytest.mark.parametrize("architecture", ["mtan", "hps"])
def test_architectures_are_lines_of_their_own(architecture):
    more = _grid("mean", (0.5, 0.4, 0.3), architecture=architecture, fingerprint="of it")
    (selection,), _ = select([*SINGLE, *more], KNOWN)
    if architecture == "mtan":
        assert [entry.architecture for entry in selection.entries] == ["hps", "mtan"]
    else:  # The same architecture with another mark is another revision, and the newest counts.
        assert [entry.method for entry in selection.entries] == ["mean"]
