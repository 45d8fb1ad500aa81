"""The trimmed mean: column by column, outliers, and too few tasks."""

import pytest
import torch

import gradbal
from gradbal.aggregators.trimmed_mean import trimmed_mean
from gradbal.jacobian import CHUNK
from tests.aggregators.inputs import random_rows
from tests.gradients import assert_gradients, jacobian, shared_names, task_gradients
from tests.states import assert_same, snapshot, trained
from tests.zoo import make, optimizer


def rows(n_tasks, width=20, seed=0):
    return torch.from_numpy(random_rows(n_tasks, width, seed, spread=10.0) - 0.3)


@pytest.mark.parametrize(
    ("n_tasks", "trim"), [(3, 1), (4, 1), (5, 2), (8, 1), (8, 2), (8, 3), (9, 4), (40, 19)]
)
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_every_column_is_the_mean_of_its_middle_values(n_tasks, trim, scale):
    for seed in range(5):
        j = rows(n_tasks, seed=seed) * scale
        kept = [sorted(column.tolist())[trim : n_tasks - trim] for column in j.T]
        wanted = torch.tensor([sum(k) / len(k) for k in kept], dtype=torch.float64)
        found = gradbal.create("trimmed_mean", trim=trim).direction(j)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14 * scale)


def test_equal_values_count_each():
    j = torch.tensor([[1.0, 5.0, 2.0], [1.0, 5.0, 2.0], [1.0, 0.0, 2.0], [4.0, 0.0, 2.0]])
    assert gradbal.create("trimmed_mean").direction(j).tolist() == [1.0, 2.5, 2.0]


def test_more_columns_than_are_sorted_at_a_time():
    j = torch.randn(5, CHUNK + 7)
    torch.testing.assert_close(trimmed_mean(j, 2), j.median(0)[0], rtol=0, atol=0)


def test_nothing_trimmed_is_the_mean_and_the_most_trimmed_the_median():
    j = rows(7)
    found = gradbal.create("trimmed_mean", trim=0).direction(j)
    torch.testing.assert_close(found, j.mean(0))
    torch.testing.assert_close(trimmed_mean(j, 3), j.median(0)[0], rtol=0, atol=0)


@pytest.mark.parametrize("trim", [1, 2])
def test_it_lies_between_the_other_rows_whatever_the_outliers(trim):
    honest = rows(4)
    low, high = honest.amin(0), honest.amax(0)
    for size in (1e3, 1e30, float("inf")):
        wild = torch.full((trim, 20), size).double()
        wild[:, ::2] *= -1
        d = trimmed_mean(torch.cat([wild, honest]), trim)
        assert ((low <= d) & (d <= high)).all()


def test_one_outlier_too_many_is_not_held_off():
    honest = rows(5)
    wild = torch.full((2, 20), 1e6).double()
    assert (trimmed_mean(torch.cat([wild, honest]), 1) > honest.amax(0)).all()


def test_the_order_of_the_tasks_does_not_matter():
    j = rows(6)
    for seed in range(5):
        order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(trimmed_mean(j[order], 2), trimmed_mean(j, 2))


def test_opposite_and_zero_rows():
    g = rows(1)[0]
    assert not trimmed_mean(torch.stack([g, 0 * g, -g])).any()
    # A zero row is a value like any other: it is what is left of these three.
    assert not trimmed_mean(torch.stack([g.abs(), 0 * g, -3 * g.abs()])).any()
    torch.testing.assert_close(trimmed_mean(torch.stack([g, -50 * g, g])), g)


def test_half_precision_rows_are_averaged_in_float32():
    # In float16 a sum of these overflows.
    j = torch.full((12, 3), 6e4, dtype=torch.float16)
    assert torch.equal(trimmed_mean(j), j[0])
    j = torch.randn(9, 50).bfloat16()
    wanted = trimmed_mean(j.double()).bfloat16()
    torch.testing.assert_close(trimmed_mean(j), wanted, rtol=1e-2, atol=1e-3)


def test_a_parameter_that_a_task_does_not_reach_has_a_zero_there():
    model = make("PartlyShared")
    opt = optimizer(model, "trimmed_mean")
    found, _ = task_gradients(model, lambda twin: twin.losses(model.batch()))
    opt.backward(model.losses(model.batch()))
    median = jacobian(found, shared_names(found)).median(0)[0]
    # Two of three tasks reach the middle layer: of the three values the middle one is left.
    shapes = [model.get_parameter(n).shape for n in shared_names(found)]
    parts = median.split([shape.numel() for shape in shapes])
    wanted = {n: p.view(s) for n, p, s in zip(shared_names(found), parts, shapes, strict=True)}
    wanted.update({n: g for row in found for n, g in row.items() if n.startswith("heads")})
    assert "middle.weight" in wanted
    assert_gradients(model, wanted, 1e-9)


@pytest.mark.parametrize(("trim", "n_tasks"), [(1, 2), (2, 4), (3, 1)])
def test_too_few_tasks(trim, n_tasks):
    message = f"trim={trim} needs at least {2 * trim + 1} tasks, found {n_tasks}"
    with pytest.raises(ValueError, match=message):
        gradbal.create("trimmed_mean", trim=trim).direction(torch.ones(n_tasks, 3))


def test_too_few_tasks_in_training_change_nothing():
    model, opt = trained("trimmed_mean")
    opt.aggregator.trim = 2
    before = snapshot(model, opt)
    losses = model.losses(model.batch())
    with pytest.raises(ValueError, match="trim=2 needs at least 5 tasks, found 3"):
        opt.backward(losses)
    assert_same(snapshot(model, opt), before)
    sum(losses).backward()


def test_there_are_no_weights():
    model, opt = trained("trimmed_mean")
    assert opt.weights is None
    with pytest.raises(ValueError, match="heads must be 'own' for 'trimmed_mean'"):
        optimizer(model, "trimmed_mean", heads="weighted")


def test_bad_hyperparameters():
    with pytest.raises(TypeError, match=r"`trim` must be an integer, found 0\.1"):
        gradbal.create("trimmed_mean", trim=0.1)
    with pytest.raises(ValueError, match=r"`trim` must be in \[0, inf\), found -1"):
        gradbal.create("trimmed_mean", trim=-1)
