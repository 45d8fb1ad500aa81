import csv
import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import cli
from benchmarks.benchmark import SINGLE_TASK, Architecture
from benchmarks.catalog import BENCHMARKS
from benchmarks.plan import Plan
from benchmarks.training import Learner, evaluate, train
from tests.benchmarks.conftest import TINY

SETTINGS = TINY.presets["default"].settings
SPLITS = TINY.load(SETTINGS, None)
ALL = list(TINY.architectures)


def _run(*args):
    words = [str(arg) for arg in ("run", *args, "--workers", "0")]
    return CliRunner().invoke(cli.app, words, prog_name="benchmarks")


def _lines(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def _runs(folder):
    return [(line["architecture"], line["method"], line["seed"]) for line in _lines(folder)]


def _learner(architecture, method="upgrad", tasks=TINY.tasks):
    return Learner(TINY, SETTINGS, tasks, method, 0, architecture)


@pytest.mark.parametrize("method", ["mean", "upgrad"])
@pytest.mark.parametrize("name", ALL)
def test_every_architecture_trains_every_parameter(name, method):
    learner = _learner(name, method)
    before = {key: value.clone() for key, value in learner.model.named_parameters()}
    learner.prepare(SPLITS)
    train(learner, SPLITS, SETTINGS, 0, lambda: None)
    still = [k for k, v in learner.model.named_parameters() if torch.equal(v, before[k])]
    assert still == []
    assert set(evaluate(learner, SPLITS.test)) == {"class", "size"}
    assert learner.parameters == sum(p.numel() for p in learner.model.parameters())


def test_masks_of_sparse_sharing_are_found_for_each_task():
    learner = _learner("sparse_sharing")
    learner.prepare(SPLITS)
    model = learner.model.model
    # 30 % of what is left goes in each of at most three rounds.
    allowed = {round(1 - 0.7**rounds, 1) for rounds in range(4)}
    assert {round(model.sparsity(task), 1) for task in model.tasks} <= allowed
    again = _learner("sparse_sharing")
    for key, value in again.model.named_parameters():
        assert torch.equal(value, dict(learner.model.named_parameters())[key])  # as it started
    again.prepare(SPLITS)
    for task, masks in model.masks.items():
        assert all(torch.equal(m, again.model.model.masks[task][k]) for k, m in masks.items())


@pytest.mark.parametrize("name", ALL)
def test_inputs_are_encoded_once_before_the_architecture(name):
    model = _learner(name).model.eval()
    x = SPLITS.test.inputs
    outputs = model(x)
    expected = model.model(2 * x)
    for task, y in expected.items():
        torch.testing.assert_close(outputs[task], y)


def test_all_seeds_of_all_architectures(tmp_path, tiny):
    result = _run("tiny", "--architectures", "all", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    expected = [
        run
        for seed in (0, 1)
        for run in [
            ("linear", SINGLE_TASK, seed),
            *((name, method, seed) for name in ALL for method in ("mean", "upgrad")),
        ]
    ]
    assert _runs(tmp_path) == expected
    for line in _lines(tmp_path):
        assert line["error"] is None
        assert line["parameters"] > 0
        assert (line["step_seconds"] is None) == (line["method"] == SINGLE_TASK)
    for part in ("architecture", "parameters", "ms", "mmoe"):
        assert part in result.output
    with (tmp_path / "architectures.csv").open(newline="") as stream:
        table = list(csv.DictReader(stream))
    assert [(row["architecture"], row["method"]) for row in table] == [
        run[:2] for run in expected if run[2] == 0
    ]
    assert len({row["fingerprint"] for row in table}) == 1 + len(ALL)
    sizes = {row["architecture"]: int(row["parameters"]) for row in table}
    # A trunk of 4·3 + 3 for each of two networks, and their heads.
    assert sizes["linear"] == 15 + 12 + 15 + 4
    assert sizes["hps"] == 40 + 72 + 27 + 9
    assert (tmp_path / "architectures.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "summary.csv").exists()


def test_chosen_architectures_and_methods_beside_hard_sharing(tmp_path, tiny):
    options = ("--methods", "mgda", "--seeds", "1", "--out", tmp_path)
    first = _run("tiny", "--architectures", "mmoe", "cgc", *options)
    assert first.exit_code == 0, first.output
    runs = [("linear", SINGLE_TASK, 0), *((name, "mgda", 0) for name in ("hps", "mmoe", "cgc"))]
    assert _runs(tmp_path) == runs
    again = _run("tiny", "--architectures", "mmoe", "cgc", "ple", *options)
    assert "4 of 5 runs found" in again.output
    assert _runs(tmp_path) == [*runs, ("ple", "mgda", 0)]


def test_runs_without_architectures_are_told_apart(tmp_path, tiny):
    options = ("--methods", "sum", "--seeds", "1", "--out", tmp_path)
    _run("tiny", "--architectures", "hps", *options)
    result = _run("tiny", *options)
    assert "1 of 2 runs found" in result.output  # single_task
    assert "1 runs with other settings or versions left aside" in result.output
    assert _runs(tmp_path) == [
        ("linear", SINGLE_TASK, 0),
        ("hps", "sum", 0),
        ("linear", "sum", 0),
    ]
    with (tmp_path / "summary.csv").open(newline="") as stream:
        assert "parameters" not in next(csv.reader(stream))


def test_methods_that_look_at_a_common_representation(tmp_path, tiny):
    options = ("--methods", "mgda_ub", "--seeds", "1", "--out", tmp_path / "out")
    result = _run("tiny", "--architectures", "hps", "mmoe", *options)
    assert result.exit_code == 2
    assert "must not name mgda_ub beside architectures other than hps, found hps" in result.output
    assert not (tmp_path / "out").exists()
    assert _run("tiny", "--architectures", "hps", *options).exit_code == 0


def test_what_an_architecture_prepares_comes_before_its_training(tmp_path, tiny, monkeypatch):
    seen = []

    def prepare(model, tasks, splits, settings, seed):
        seen.append(
            (model.training, [t.name for t in tasks], len(splits.train), settings.epochs, seed)
        )
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()

    prepared = Architecture("", TINY.architectures["hps"].build, prepare)
    monkeypatch.setitem(tiny.architectures, "prepared", prepared)
    options = ("--methods", "sum", "--seeds", "2", "--out", tmp_path)
    assert _run("tiny", "--architectures", "prepared", *options).exit_code == 0
    assert seen == [(True, ["class", "size"], 40, 2, seed) for seed in (0, 1)]
    tests = {line["architecture"]: line["test"] for line in _lines(tmp_path)}
    assert tests["prepared"] != tests["hps"]


def test_a_failing_architecture_is_one_failed_run(tmp_path, tiny, monkeypatch):
    def build(tasks):
        raise ZeroDivisionError("on purpose")

    monkeypatch.setitem(tiny.architectures, "broken", Architecture("", build))
    options = ("--methods", "sum", "--seeds", "1", "--out", tmp_path)
    result = _run("tiny", "--architectures", "broken", *options)
    assert result.exit_code == 1
    assert "broken sum, seed 0: failed with ZeroDivisionError: on purpose" in result.output
    assert [line["error"] is None for line in _lines(tmp_path)] == [True, True, False]


def test_regularisation_is_added_to_its_task(monkeypatch):
    learner = _learner("hps", method=None)
    inputs = []

    class Regularized(type(learner.model.model)):
        def regularization_loss(self, x=None, task=None):
            inputs.append(x)
            return {"class": 3, "size": 5}[task] * self.heads[task].linear.bias.sum()

    plain = [loss.item() for loss in learner._losses(SPLITS.train)[1]]
    learner.model.model.__class__ = Regularized
    found = [loss.item() for loss in learner._losses(SPLITS.train)[1]]
    for loss, extra, factor, task in zip(found, plain, (3, 5), ("class", "size"), strict=True):
        bias = learner.model.model.heads[task].linear.bias.sum().item()
        assert loss == pytest.approx(extra + factor * bias, rel=1e-5)
    assert all(torch.equal(x, 2 * SPLITS.train.inputs) for x in inputs)


def test_architectures_are_told_how_far_training_is():
    learner = _learner("hps")
    seen = []
    tell = learner.model.model.set_progress
    learner.model.model.set_progress = lambda step, total: seen.append(
        (step, total, tell(step, total))
    )
    train(learner, SPLITS, SETTINGS, 0, lambda: None)
    assert seen == [(step, 10, None) for step in range(10)]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("tiny", "--architectures", "mmoo"), "found 'mmoo'; did you mean mmoe?"),
        (
            ("bare", "--architectures", "all"),
            "must not be given for bare, which has none, found all",
        ),
    ],
)
def test_bad_input_is_one_sentence(args, message, tmp_path, tiny, monkeypatch):

    monkeypatch.setitem(BENCHMARKS, "bare", replace(TINY, name="bare", architectures={}))
    result = _run(*args, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert result.output.startswith("Error: `--architectures` must ")
    assert message in result.output
    assert result.output.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["census", "census_education", "multimnist"])
def test_architectures_of_a_benchmark_are_of_like_size(name):
    benchmark = BENCHMARKS[name]
    tasks = [task.name for task in benchmark.tasks]
    sizes = {
        key: sum(p.numel() for p in architecture.build(tasks).parameters())
        for key, architecture in benchmark.architectures.items()
    }
    assert max(sizes.values()) < 1.25 * min(sizes.values()), sizes


@pytest.mark.parametrize(
    ("name", "inputs", "shape"),
    [
        ("census", torch.zeros(5, 39), (5,)),
        ("census_education", torch.zeros(5, 38), (5,)),
        ("multimnist", torch.zeros(5, 1, 36, 36, dtype=torch.uint8), (5, 10)),
    ],
)
def test_architectures_take_a_benchmarks_inputs(name, inputs, shape):
    benchmark = BENCHMARKS[name]
    tasks = [task.name for task in benchmark.tasks]
    expected = dict.fromkeys(tasks, shape)
    for architecture in benchmark.architectures.values():
        outputs = architecture.build(tasks)(inputs)
        assert {task: tuple(y.shape) for task, y in outputs.items()} == expected


def test_hard_sharing_on_multimnist_is_the_lenet():
    benchmark = BENCHMARKS["multimnist"]
    tasks = [task.name for task in benchmark.tasks]
    lenet, shared = benchmark.build(tasks), benchmark.architectures["hps"].build(tasks)
    ours = dict(shared.named_parameters())
    trunk_first = sorted(ours, key=lambda name: "heads" in name)
    with torch.no_grad():
        for name, p in zip(trunk_first, lenet.parameters(), strict=True):
            ours[name].copy_(p)
    images = torch.randint(256, (5, 1, 36, 36), dtype=torch.uint8)
    for task, y in lenet(images).items():
        torch.testing.assert_close(shared(images)[task], y)


def test_presets_of_architectures(tmp_path, tiny, monkeypatch):
    quick = tiny.presets["quick"]
    other = replace(quick, settings=replace(quick.settings, epochs=1))
    monkeypatch.setitem(BENCHMARKS, "tiny", replace(tiny, architecture_presets={"quick": other}))
    for words in (["--quick"], ["--quick", "--architectures", "hps"], ["--architectures", "hps"]):
        _run("tiny", *words, "--seeds", "1", "--methods", "sum", "--out", tmp_path)
    epochs = [line["settings"]["epochs"] for line in _lines(tmp_path)]
    # The last one finds the single-task runs of the first.
    assert epochs == [2, 2, 1, 1, 2]


def test_a_plan_with_architectures_names_its_rows():
    plan = Plan(TINY, TINY.presets["default"], ("sum",), 1, ("mmoe",))
    assert plan.label("sum", "mmoe") == "mmoe sum"
    assert plan.label(SINGLE_TASK, "linear") == SINGLE_TASK
    assert plan.compared == ("hps", "mmoe")
