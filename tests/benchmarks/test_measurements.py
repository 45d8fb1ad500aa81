"""The commands that measure gradbal itself: they run, and say what was wrong."""

import math
import re
from functools import partial

import pytest
import torch
from typer.testing import CliRunner

import gradbal
from benchmarks import residuals
from benchmarks.cli import app
from benchmarks.jacobians import FAMILIES, SCALES, hard_jacobian
from benchmarks.residuals import RESIDUALS, worst_residuals
from benchmarks.speed.experts import MODELS as EXPERTS
from benchmarks.speed.methods import PLAIN, drivable
from benchmarks.speed.scaling import METHODS as SCALING
from benchmarks.speed.scaling import measure as measure_scaling
from benchmarks.speed.solvers import measure_against_floor, measure_against_torchjd


def run(*arguments):
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})


def test_residuals_prints_a_row_for_every_method_and_says_what_it_means(monkeypatch):
    monkeypatch.setitem(RESIDUALS, "uw", lambda name, jacobian: math.nan)
    done = run("residuals", "--jacobians", "2")
    assert done.exit_code == 0
    for name in RESIDUALS:
        assert f"│ {name} " in done.output
        assert f"\n{name}: " in done.output
    for family in FAMILIES:
        assert (f"\n{family}: " in done.output) == (family != "zero")
    (line,) = (line for line in done.output.splitlines() if line.startswith("│ uw "))
    assert line.count("–") == len(FAMILIES) - 1
    assert "–: defined for none." in done.output
    assert "…" not in done.output


def test_residuals_by_scale():
    done = run("residuals", "--jacobians", "2", "--by", "scale")
    assert done.exit_code == 0
    assert all(f"{scale:.0e} ┃" in done.output for scale in SCALES)


def test_speed_experts():
    done = run("speed", "experts", "--experts", "2,3", "--rounds", "1")
    assert done.exit_code == 0
    for name in EXPERTS:
        assert len(re.findall(rf"│ {name} +│ +[23] │ +\d+\.\d\d │", done.output)) == 2
    assert run("speed", "experts", "--experts", "1").exit_code != 0
    assert "must be positive" in run("speed", "experts", "--rounds", "0").output


def rows(family):
    return partial(hard_jacobian, family=family)


FUNCTIONS = ("aligned_mtl", "cagrad", "pcgrad", "upgrad")
METHODS = ("config", "dualproj", "fairgrad", "imtl_g", "mgda", "nash_mtl", "primary")


@pytest.mark.parametrize("name", [*FUNCTIONS, *METHODS])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "zero"])
def test_a_slightly_wrong_solution_has_a_residual(monkeypatch, name, family):
    """The largest term of `d = Jᵀw` is one percent too long."""
    where, attribute = (residuals, name) if name in FUNCTIONS else (gradbal.info(name).cls, None)
    solve = getattr(where, attribute or "weights")

    def off(*args, **keywords):
        w = solve(*args, **keywords)
        gramian = args[0] if name in FUNCTIONS else args[1]
        w[(w.abs() * gramian.diagonal().sqrt()).argmax()] *= 1.01
        return w

    monkeypatch.setattr(where, attribute or "weights", off)
    # MGDA's only solution with a zero row is d = 0, which has no terms.
    if (name, family) != ("mgda", "zero_row"):
        assert worst_residuals(name, 10, rows(family))[1] > 1e-4


@pytest.mark.parametrize("name", METHODS)
def test_weights_that_are_not_numbers_are_worse_than_any(monkeypatch, name):
    def nothing(self, gramian, losses=None):
        return torch.full((len(gramian),), math.nan, dtype=torch.float64)

    monkeypatch.setattr(gradbal.info(name).cls, "weights", nothing)
    assert worst_residuals(name, 3, rows("normal")) == (math.inf, math.inf)


@pytest.mark.parametrize(
    "name", ["config", "dualproj", "fairgrad", "imtl_g", "nash_mtl", "primary"]
)
def test_a_zero_row_with_a_weight_is_wrong(monkeypatch, name):
    solve = gradbal.info(name).cls.weights

    def off(*args, **keywords):
        w = solve(*args, **keywords)
        return torch.where(args[1].diagonal() == 0, 1.0, w)

    monkeypatch.setattr(gradbal.info(name).cls, "weights", off)
    assert worst_residuals(name, 10, rows("zero_row"))[0] == math.inf


def test_the_median_and_the_worst_are_of_those_that_are_defined(monkeypatch):
    values = iter([math.nan, 1.0, 3.0, math.nan, 2.0, *[math.nan] * 5])
    monkeypatch.setitem(RESIDUALS, "mgda", lambda name, jacobian: next(values))
    assert worst_residuals("mgda", 5, rows("normal")) == (2.0, 3.0)
    assert all(math.isnan(value) for value in worst_residuals("mgda", 5, rows("normal")))


def test_speed_solvers_measures_both_ratios():
    rows = [*measure_against_torchjd(["mgda", "uw"], [2, 3], 1, width=10)]
    assert [(r.method, r.n_tasks) for r in rows] == [("mgda", 2), ("mgda", 3)]
    assert all(r.ratio is not None and r.ratio > 0 for r in rows)
    rows = [*measure_against_floor(["mgda", "uw"], [3], 1, width=10)]
    assert [(r.method, r.n_tasks) for r in rows] == [("mgda", 3)]
    for measure_it in (measure_against_torchjd, measure_against_floor):
        # Krum needs three tasks.
        two, three = measure_it(["krum"], [2, 3], 1, width=10)
        assert (two.ratio, two.reason) == (None, "")
        assert three.ratio > 0


def test_speed_scaling_counts_the_passes_of_a_step():
    rows = [*measure_scaling([2, 5], rounds=1)]
    assert [(r.n_tasks, r.method) for r in rows] == [(t, m) for t in (2, 5) for m in SCALING]
    passes = {(r.method, r.n_tasks): (r.backwards, r.forwards) for r in rows}
    for n_tasks in (2, 5):
        assert passes["mgda", n_tasks] == (n_tasks, 1)
        assert passes["marigold central", n_tasks] == (1, 3)
        for method in ("marigold forward", "marigold free", "famo"):
            assert passes[method, n_tasks] == (1, 2)
    assert all(r.ratio > 0 for r in rows)


def test_speed_sketch_prints_each_row_and_the_worst():
    arguments = ["--models", "lenet", "--sizes", "64,1000000", "--steps", "0,1", "--seeds", "2"]
    done = run("speed", "sketch", *arguments, "--average", "1")
    assert done.exit_code == 0
    # Over one step it is the same.
    fresh, fixed = re.search(r"^one batch, .*: ([0-9.]+), ([0-9.]+)$", done.output, re.M).groups()
    assert 0 < float(fresh) == float(fixed) < 4 / 64
    lines = [line.split("│") for line in done.output.splitlines() if line.startswith("│")]
    names = [line[1].strip() for line in lines]
    assert names == ["lenet"] * 4 + ["worst"] * 2
    small, large = [[line for line in lines if line[4].strip() == k] for k in ("64", "1,000,000")]
    for column in (5, 6):
        figures = [float(line[column]) for line in small]
        assert figures[2] == max(figures[:2])
        # A standard error of up to 1/√64, and no error where P ≤ k.
        assert 0.01 < figures[2] < 4 / 8
        assert all(float(line[column]) == 0 for line in large)
    assert all(line[7].strip() == "0.00°" for line in large)


def test_speed_methods_prints_what_grows_with_the_tasks():
    done = run("speed", "methods", "--methods", "sum", "--rounds", "1", "--growth", "2,3")
    assert done.exit_code == 0
    for method in SCALING:
        assert done.output.count(f"│ {method} ") == 2
    assert "3 + 1" in done.output


def test_speed_methods_measures_what_backward_alone_can_drive():
    names = drivable(3)
    # One kind after the other, and none that needs more than the losses.
    kinds = [gradbal.info(name).kind for name in names]
    assert kinds == sorted(kinds, key=lambda kind: kind != "scalarizer")
    assert {"sum", "gls", "upgrad"} <= set(names)
    assert not {"mgda_ub", "modo", "sdmgrad"} & set(names)
    done = run("speed", "methods", "--methods", "upgrad,sum", "--rounds", "1", "--growth", "")
    assert done.exit_code == 0
    rows = ((PLAIN, "itself"), ("upgrad", "gramian"), ("sum", "scalarizer"))
    for name, kind in rows:
        (line,) = [line for line in done.output.splitlines() if f"│ {name} " in line]
        assert kind in line
        assert float(line.split("│")[3]) > 0.2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["speed", "engines", "--models", "mlp,vgg"], "`--models` must be among mlp, conv"),
        (["speed", "engines", "--tasks", "1"], "`--tasks` must be numbers from 2 on, found '1'"),
        (["speed", "engines", "--tasks", "a"], "`--tasks` must be numbers from 2 on, found 'a'"),
        (["speed", "engines", "--rounds", "0"], "must be positive, found 0"),
        (["speed", "engines", "--seconds", "0"], "must be positive, found 21, 0, 6"),
        (["speed", "engines", "--memory", "nan"], "must be positive, found 21, 20, nan"),
        (["speed", "engines", "--threads", "1,0"], "`--threads` must be numbers from 1 on"),
        (["speed", "engines", "--method", "uw"], "`--method` must be among aligned_mtl"),
        (["speed", "engines", "--engines", "loop,eager"], "`--engines` must be among auto, loop"),
        (["speed", "engines", "--device", "tpu"], "`--device` must be cpu or cuda, found 'tpu'"),
        (["speed", "solvers", "--rounds", "0"], "must be positive, found 0"),
        (["speed", "sketch", "--models", "lenet,vgg"], "`--models` must be among lenet, resnet18"),
        (["speed", "sketch", "--sizes", "0"], "`--sizes` must be numbers from 1 on, found '0'"),
        (["speed", "sketch", "--steps", "5,1"], "`--steps` rising, found 20, 0, '5,1'"),
        (["speed", "methods", "--growth", "a"], "must be numbers from 2 on, found 'a'"),
        (["speed", "methods", "--tasks", "1"], "`--tasks` must be at least 2"),
        (["speed", "methods", "--methods", "sum,mgda_ub"], "found 'mgda_ub'"),
        (["residuals", "--jacobians", "0"], "must be at least 1, found 0"),
        (["residuals", "--by", "row"], "`--by` must be family or scale, found 'row'"),
    ],
)
def test_bad_input_ends_with_a_sentence(arguments, message):
    done = run(*arguments)
    assert done.exit_code == 2
    assert message in done.output
    assert "Traceback" not in done.output


def test_speed_of_instances_prints_every_column():
    done = run("speed", "instance", "--models", "lenet", "--batches", "3", "--rounds", "1")
    assert done.exit_code == 0, done.output
    (line,) = (line for line in done.output.splitlines() if line.startswith("│ lenet "))
    ratios, peaks = line.split("│")[3:6], line.split("│")[6:10]
    assert all(float(cell) > 0 for cell in [*ratios, *peaks])
    assert float(line.split("│")[10]) < 1e-5


@pytest.mark.parametrize(
    ("options", "found"),
    [(("--models", "lenet,vgg"), "'vgg'"), (("--batches", "1"), "1"), (("--rounds", "0"), "0")],
)
def test_speed_of_instances_says_what_was_wrong(options, found):
    done = run("speed", "instance", *options)
    assert done.exit_code == 2
    assert f"found {found}" in done.output.replace("\n", " ") or found in done.output


def test_speed_memory_prints_a_curve_for_every_engine():
    done = run("speed", "memory", "--steps", "1,3", "--engines", "loop,sketch")
    assert done.exit_code == 0
    for engine in ("loop", "sketch"):
        (line,) = (line for line in done.output.splitlines() if line.startswith(f"│ {engine} "))
        assert re.search(r"│ +\d+, \d+\.\d │ +\d+, \d+\.\d │ +0 │$", line)


def test_speed_memory_says_what_is_wrong():
    for arguments in (("--engines", "lop"), ("--steps", "3,1"), ("--steps", "0")):
        done = run("speed", "memory", *arguments)
        assert done.exit_code != 0
        assert "found" in done.output
