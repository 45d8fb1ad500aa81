"""The commands that measure gradbal itself: they run, and say what was wrong."""

import pytest
import torch
from typer.testing import CliRunner

import gradbal
from benchmarks.cli import app
from benchmarks.residuals import RESIDUALS, random_jacobian, worst_residuals
from benchmarks.speed.engines import COLUMNS, measure
from benchmarks.speed.methods import PLAIN, drivable
from benchmarks.speed.models import MODELS
from benchmarks.speed.solvers import measure_against_floor, measure_against_torchjd


def run(*arguments):
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})


def test_residuals_prints_a_row_for_every_method():
    done = run("residuals", "--jacobians", "2")
    assert done.exit_code == 0
    for name in RESIDUALS:
        assert f"│ {name} " in done.output
        assert f"\n{name}: " in done.output


def test_a_wrong_solution_has_a_large_residual(monkeypatch):
    def off(self, gramian, losses=None):
        w = torch.linspace(1, 2, len(gramian), dtype=torch.float64)
        return w / w.sum()

    monkeypatch.setattr(gradbal.info("mgda").cls, "weights", off)
    assert worst_residuals("mgda", 20, 10.0, 1.0)[0] > 1e-3


def test_random_jacobians_have_the_spread_and_scale_asked_for():
    import numpy as np

    rng = np.random.default_rng(0)
    norms = torch.cat([random_jacobian(rng, 1e6, 1e-8).norm(dim=1) for _ in range(200)])
    assert norms.min() < 1e-9
    assert norms.max() > 1e-6
    assert norms.max() / norms.min() < 1e9


def test_speed_engines_measures_all_columns():
    threads = torch.get_num_threads()
    (row,) = measure(["conv"], [2], rounds=1)
    assert (row.model, row.n_tasks) == ("conv", 2)
    assert set(row.ratios) == set(COLUMNS)
    assert all(ratio > 0 for ratio in row.ratios.values())
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("name", list(MODELS))
def test_models_share_a_trunk_and_have_a_head_each(name):
    model = MODELS[name](3)
    features, losses = model.features_and_losses(model.example())
    assert features.dim() == 2
    assert len(losses) == len(model.heads) == 3
    assert all(loss.dim() == 0 for loss in losses)


def test_speed_solvers_measures_both_ratios():
    rows = [*measure_against_torchjd(["mgda", "uw"], [2, 3], 1, width=10)]
    assert [(r.method, r.n_tasks) for r in rows] == [("mgda", 2), ("mgda", 3)]
    assert all(r.ratio is not None and r.ratio > 0 for r in rows)
    rows = [*measure_against_floor(["mgda", "uw"], [3], 1, width=10)]
    assert [(r.method, r.n_tasks) for r in rows] == [("mgda", 3)]


def test_speed_methods_measures_what_backward_alone_can_drive():
    names = drivable(3)
    # One kind after the other, and none that needs more than the losses.
    kinds = [gradbal.info(name).kind for name in names]
    assert kinds == sorted(kinds, key=lambda kind: kind != "scalarizer")
    assert {"sum", "gls", "upgrad"} <= set(names)
    assert not {"mgda_ub", "modo", "sdmgrad"} & set(names)
    done = run("speed", "methods", "--methods", "upgrad,sum", "--rounds", "1", "--tasks", "2")
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
        (["speed", "solvers", "--rounds", "0"], "must be positive, found 0"),
        (["speed", "methods", "--tasks", "1"], "`--tasks` must be at least 2"),
        (["speed", "methods", "--methods", "sum,mgda_ub"], "found 'mgda_ub'"),
        (["residuals", "--jacobians", "0"], "must be at least 1, found 0"),
    ],
)
def test_bad_input_ends_with_a_sentence(arguments, message):
    done = run(*arguments)
    assert done.exit_code == 2
    assert message in done.output
    assert "Traceback" not in done.output
