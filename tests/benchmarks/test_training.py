import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import gradbal
from benchmarks.benchmark import Split
from benchmarks.processes import Team
from benchmarks.timing import Contestant, StepTime, step_times
from benchmarks.training import Learner, batches, evaluate, steps_per_run, train
from tests.benchmarks.conftest import TINY

SETTINGS = TINY.presets["default"].settings
SPLITS = TINY.load(SETTINGS, None)


def _learner(method, seed=0, tasks=TINY.tasks, **changes):
    return Learner(TINY, replace(SETTINGS, **changes), tasks, method, seed)


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


def _masked(split, missing):
    """The same data with NaN for the size of some examples."""
    sizes = split.targets["size"].clone()
    sizes[missing] = float("nan")
    return Split(split.inputs, {**split.targets, "size": sizes})


@pytest.mark.parametrize("method", [None, "mgda", "famo", "uw", "sdmgrad"])
def test_missing_labels_count_in_no_loss(method):
    missing = torch.arange(len(SPLITS.train)) % 3 == 1
    learner = _learner(method)
    outputs = learner.model(SPLITS.train.inputs)["size"]
    expected = (outputs - SPLITS.train.targets["size"])[~missing].square().mean()
    losses = learner.step(_masked(SPLITS.train, missing), SPLITS.validation)
    if method != "sdmgrad":  # Its losses are those of a part of the batch.
        assert float(losses[1]) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert all(value.isfinite().all() for value in _state(learner).values())


@pytest.mark.parametrize("method", [None, "mgda", "uw", "mean"])
def test_a_task_without_labels_sits_the_step_out(method):
    learner = _learner(method)
    head = {n: v.clone() for n, v in _state(learner).items() if n.startswith("heads.size")}
    nothing = torch.ones(len(SPLITS.train), dtype=torch.bool)
    losses = learner.step(_masked(SPLITS.train, nothing), SPLITS.validation)
    assert losses[1].isnan()
    assert losses[0].isfinite()
    assert head
    assert all(torch.equal(value, _state(learner)[name]) for name, value in head.items())


@pytest.mark.parametrize("method", [None, "mgda"])
def test_a_batch_without_any_label_trains_nothing(method):
    learner = Learner(TINY, SETTINGS, TINY.tasks[1:], method, 0)
    before = [p.clone() for p in learner.model.parameters()]
    nowhere = _masked(SPLITS.train, torch.ones(len(SPLITS.train), dtype=torch.bool))
    losses = learner.step(nowhere, SPLITS.validation)
    assert losses.isnan().tolist() == [True]
    assert all(map(torch.equal, before, learner.model.parameters()))


def test_missing_labels_count_in_no_measure():
    learner = _learner(None)
    missing = torch.arange(len(SPLITS.test)) % 4 == 0
    found = evaluate(learner, _masked(SPLITS.test, missing))
    errors = learner.model(SPLITS.test.inputs)["size"] - SPLITS.test.targets["size"]
    assert found["size"]["mse"] == pytest.approx(errors[~missing].square().mean().item())


def test_missing_labels_of_parts_add_up_to_the_whole():
    missing = torch.zeros(len(SPLITS.train), dtype=torch.bool)
    missing[:15] = missing[25] = True  # All of the first part of three, and one of the second.
    whole = _masked(SPLITS.train, missing)
    losses, weights = [], []
    for rank in range(3):
        learner = _learner(None)
        place = SimpleNamespace(size=3, rank=rank)
        learner.team = SimpleNamespace(size=3, part=partial(Team.part, place), wrap=_unwrapped)
        _, found, count = learner._losses(whole)
        losses.append(float(found[1].detach()))
        weights.append(count / len(whole))
    alone = _learner(None)._losses(whole)[1][1]
    together = sum(weight * loss for weight, loss in zip(weights, losses, strict=True))
    assert losses[0] == 0
    assert together == pytest.approx(float(alone.detach()), rel=1e-6)


def _unwrapped(module, unused):
    return module


def test_the_curve_of_a_run():
    learner = _learner("mgda")
    steps = []
    seconds, curve = train(learner, SPLITS, SETTINGS, 0, lambda: steps.append(1), probe=True)
    assert [entry["epoch"] for entry in curve] == [1, 2]
    assert 0 < curve[0]["seconds"] < curve[1]["seconds"] <= seconds + 1e-4
    assert curve[-1]["validation"] == evaluate(learner, SPLITS.validation)
    for entry in curve:
        assert len(entry["losses"]) == 2
        assert sum(entry["weights"]) == pytest.approx(1)
        assert entry["conflicts"] in (0.0, 1.0)
        assert -1 <= entry["cosine"] <= 1
    assert len(steps) == 10


def test_the_losses_of_the_curve_are_means_over_the_epoch():
    learner, seen = _learner(None), []
    step = learner.step

    def recorded(batch, held_out):
        seen.append(step(batch, held_out))
        return seen[-1]

    learner.step = recorded
    _, curve = train(learner, SPLITS, SETTINGS, 0, lambda: None)
    assert curve[0]["losses"] == pytest.approx(torch.stack(seen[:5]).mean(0).tolist())
    assert curve[1]["losses"] == pytest.approx(torch.stack(seen[5:]).mean(0).tolist())
    assert curve[0]["weights"] is curve[0]["conflicts"] is curve[0]["cosine"] is None


def test_the_probe_by_hand_and_without_a_trace():
    learner = _learner("mgda", dropout=0.5)
    before = {name: value.clone() for name, value in _state(learner).items()}
    torch.manual_seed(3)
    probed = learner.probe(SPLITS.train)
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(1))
    assert all(torch.equal(value, _state(learner)[name]) for name, value in before.items())
    assert all(p.grad is None for p in learner.model.parameters())
    torch.manual_seed(3)
    _, losses, _ = learner._losses(SPLITS.train)
    trunk = list(learner.model.trunk.parameters())
    rows = [
        torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, trunk, retain_graph=True)])
        for loss in losses
    ]
    cosine = float(torch.cosine_similarity(*rows, dim=0))
    assert probed.cosine == pytest.approx(cosine, abs=1e-6)
    assert probed.conflicts == float(cosine < 0)


def test_dropout_is_of_the_features_and_in_training_alone():
    learner = _learner(None, dropout=0.5)
    learner._losses(SPLITS.train)
    trained = learner._trained
    features = learner.model.features(SPLITS.train.inputs)
    dropped = trained._dropped(features)
    kept = dropped != 0
    assert 0.2 < kept.double().mean() < 0.8
    assert torch.allclose(dropped[kept], 2 * features[kept])
    trained.eval()
    assert torch.equal(trained._dropped(features), features)


def test_weight_decay_is_adams():
    learner = _learner("mgda", weight_decay=0.25)
    assert [group["weight_decay"] for group in learner.optimizer.param_groups] == [0.25]


def test_the_peak_grows_with_the_tasks_that_are_kept_apart():
    contestants = [Contestant(None, "linear"), Contestant("mgda", "linear")]
    found = step_times(TINY, SETTINGS, SPLITS.train, contestants, 1, lambda: None)
    plain, mgda = (found[contestant].peak_bytes for contestant in contestants)
    assert plain > 0
    # Two gradients of the trunk's 15 parameters, of four bytes each.
    assert mgda - plain >= 2 * 15 * 4
