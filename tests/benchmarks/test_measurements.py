"""The commands that measure gradbal itself: they run, and say what was wrong."""

import pytest
import torch
from typer.testing import CliRunner

import gradbal
from benchmarks.cli import app
from benchmarks.residuals import RESIDUALS, random_jacobian, worst_residuals
from benchmarks.speed.engines import COLUMNS, measure
from benchmarks.speed.models import MODELS
from benchmarks.speed.scaling import METHODS
from benchmarks.speed.scaling import measure as measure_scaling
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


def test_speed_scaling_counts_the_passes_of_a_step():
    rows = [*measure_scaling([2, 5], rounds=1)]
    assert [(r.n_tasks, r.method) for r in rows] == [(t, m) for t in (2, 5) for m in METHODS]
    passes = {(r.method, r.n_tasks): (r.backwards, r.forwards) for r in rows}
    for n_tasks in (2, 5):
        assert passes["mgda", n_tasks] == (n_tasks, 1)
        assert passes["marigold central", n_tasks] == (1, 3)
        for method in ("marigold forward", "marigold free", "famo"):
            assert passes[method, n_tasks] == (1, 2)
    assert all(r.ratio > 0 for r in rows)


def test_speed_scaling_prints_both_tables():
    done = run("speed", "scaling", "--tasks", "2,3", "--rounds", "1")
    assert done.exit_code == 0
    for method in METHODS:
        assert done.output.count(f"│ {method} ") == 2
    assert "3 + 1" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["speed", "engines", "--models", "mlp,vgg"], "`--models` must be among mlp, conv"),
        (["speed", "engines", "--tasks", "1"], "`--tasks` must be numbers from 2 on, found '1'"),
        (["speed", "engines", "--tasks", "a"], "`--tasks` must be numbers from 2 on, found 'a'"),
        (["speed", "engines", "--rounds", "0"], "must be positive, found 0"),
        (["speed", "solvers", "--rounds", "0"], "must be positive, found 0"),
        (["speed", "scaling", "--rounds", "0"], "must be positive, found 0"),
        (["residuals", "--jacobians", "0"], "must be at least 1, found 0"),
    ],
)
def test_bad_input_ends_with_a_sentence(arguments, message):
    done = run(*arguments)
    assert done.exit_code == 2
    assert message in done.output
    assert "Traceback" not in done.output
