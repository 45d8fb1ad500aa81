import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import gradbal
from benchmarks.timing import Contestant, StepTime, step_times
from benchmarks.training import Learner, batches, evaluate, steps_per_run, train
from tests.benchmarks.conftest import TINY

SETTINGS = TINY.presets["default"].settings
SPLITS = TINY.load(SETTINGS, None)


def _learner(method, seed=0, tasks=TINY.tasks):
    return Learner(TINY, SETTINGS, tasks, method, seed)


def _state(learner):
    return learner.model.state_dict()


def test_all_methods_start_from_the_same_network():
    first, second, other = (_learner(None), _learner("rlw"), _learner("rlw", seed=1))
    for name, value in _state(first).items():
        assert torch.equal(value, _state(second)[name])
    assert not torch.equal(_state(first)["trunk.weight"], _state(other)["trunk.weight"])


def test_a_single_task_network_starts_with_the_same_trunk_and_has_one_head():
    single = _learner(None, tasks=TINY.tasks[1:])
    assert torch.equal(_state(single)["trunk.weight"], _state(_learner("sum"))["trunk.weight"])
    assert list(single.model.heads) == ["size"]


def test_batches_depend_on_the_seed_alone():
    settings = replace(SETTINGS, batch_size=16)
    torch.manual_seed(5)
    first = list(batches(SPLITS.train, settings, seed=0))
    torch.manual_seed(6)
    second = list(batches(SPLITS.train, settings, seed=0))
    other = list(batches(SPLITS.train, settings, seed=1))
    assert [len(batch) for batch in first] == [16, 16, 8] * settings.epochs
    assert len(first) == steps_per_run(settings)
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0].inputs, other[0].inputs)
    epochs = [torch.cat([b.inputs for b in first[i : i + 3]]) for i in (0, 3)]
    assert not torch.equal(*epochs)  # shuffled anew
    assert torch.equal(*(epoch.sort(0).values for epoch in epochs))  # of the same examples


def test_batches_keep_inputs_and_targets_together():
    for batch in batches(SPLITS.train, SETTINGS, seed=0):
        assert torch.equal(batch.targets["class"], batch.inputs[:, :3].argmax(1))


def test_the_sum_method_trains_like_plain_pytorch():
    learners = [_learner(None), _learner("sum")]
    for learner in learners:
        train(learner, SPLITS, SETTINGS, 0, lambda: None)
    for name, value in _state(learners[0]).items():
        torch.testing.assert_close(value, _state(learners[1])[name])
    assert not torch.equal(
        _state(learners[0])["trunk.weight"], _state(_learner(None))["trunk.weight"]
    )


def test_methods_that_count_epochs_are_told():
    settings = replace(SETTINGS, batch_size=16, epochs=3)
    learner = _learner("dwa")
    seen = []

    def after_step():
        method = learner.optimizer.aggregator
        seen.append((method.epoch, method.steps))

    train(learner, SPLITS, settings, 0, after_step)
    assert seen == [(e + s // 3, s % 3) for e in range(3) for s in (1, 2, 3)]
    train(_learner(None), SPLITS, settings, 0, lambda: None)


def test_a_loss_that_is_not_finite_stops_the_training():
    tasks = (replace(TINY.tasks[0], loss=lambda output, target: output.sum() * math.nan),)
    learner = _learner(None, tasks=tasks)
    with pytest.raises(FloatingPointError, match="found nan for class in step 1"):
        train(learner, SPLITS, SETTINGS, 0, lambda: None)


def test_evaluate_agrees_with_a_count_by_hand(monkeypatch):
    monkeypatch.setattr("benchmarks.training._EVALUATION_BATCH", 7)  # 30 examples, unevenly
    learner = _learner("sum")
    found = evaluate(learner, SPLITS.test)
    outputs = learner.model(SPLITS.test.inputs)
    hits = outputs["class"].argmax(1) == SPLITS.test.targets["class"]
    errors = outputs["size"] - SPLITS.test.targets["size"]
    assert found["class"]["accuracy"] == pytest.approx(hits.float().mean().item())
    assert found["size"]["mse"] == pytest.approx(errors.square().mean().item())


@pytest.mark.parametrize(
    ("threads", "size", "clock"),
    [(1, 1, "process_time"), (2, 1, "perf_counter"), (1, 2, "perf_counter")],
)
def test_step_times_are_ratios_to_the_plain_sum(monkeypatch, threads, size, clock):
    durations = {(None, "linear"): 2.0, ("sum", "linear"): 3.0, ("mgda", "hps"): 5.0}
    now = 0.0

    class Recorder:
        def __init__(self, benchmark, settings, tasks, method, seed, architecture, team):
            self.seconds = durations[method, architecture]

        def step(self, batch, held_out):
            nonlocal now
            now += self.seconds

    monkeypatch.setattr("benchmarks.timing.Learner", Recorder)
    monkeypatch.setattr(
        "benchmarks.training.time", SimpleNamespace(perf_counter=None, process_time=None)
    )
    monkeypatch.setattr(f"benchmarks.training.time.{clock}", lambda: now)
    monkeypatch.setattr("benchmarks.timing._peak", lambda learner, batch: 7)
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    rounds = []
    contestants = [Contestant("sum", "linear"), Contestant("mgda", "hps")]
    team = SimpleNamespace(size=size, settle=lambda error: error)
    found = step_times(TINY, SETTINGS, SPLITS.train, contestants, 4, lambda: rounds.append(1), team)
    peak = 7 if size == 1 else None
    expected = [StepTime(1.5, 3.0, peak), StepTime(2.5, 5.0, peak)]
    assert found == dict(zip(contestants, expected, strict=True))
    assert len(rounds) == 4


def test_a_method_that_raises_has_no_step_time():
    known, *unknown = contestants = [
        Contestant("sum", "linear"),
        Contestant("none_such", "linear"),
        Contestant("sum", "none_such"),
    ]
    found = step_times(TINY, SETTINGS, SPLITS.train, contestants, 1, lambda: None)
    assert list(found) == [known]
    assert not found.keys() & set(unknown)
    assert found[known].ratio > 0
    assert found[known].seconds > 0


METHODS = [n for n in gradbal.list_aggregators() if gradbal.info(n).promises.min_tasks <= 2]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_the_trunk(method):
    learner = _learner(method)
    before = {name: value.clone() for name, value in _state(learner).items()}
    for _ in range(3):
        assert len(learner.step(SPLITS.train, SPLITS.validation)) == 2
    for name, value in _state(learner).items():
        assert "heads" in name or not torch.equal(value, before[name])


def test_a_method_of_independent_batches_gets_parts_of_the_batch(monkeypatch):
    learner = _learner("sdmgrad")
    seen = []
    backward = learner.optimizer.backward

    def recorded(losses, **more):
        seen.append((losses, more))
        backward(losses, **more)

    monkeypatch.setattr(learner.optimizer, "backward", recorded)
    learner.step(SPLITS.train, SPLITS.validation)
    ((losses, more),) = seen
    assert len(more["independent"]) == 2
    assert more.get("features") is None
    values = [float(part[0].detach()) for part in (losses, *more["independent"])]
    assert len(set(values)) == 3
