"""Krum: distances of the vectors themselves, ties, outliers, and too few tasks."""

import math

import numpy as np
import pytest
import torch

import gradbal
from tests.aggregators.inputs import random_rows
from tests.states import assert_same, root_at_zero, snapshot, trained
from tests.zoo import make, targets


def chosen(j, f=0, m=1):
    """The m rows of least score, from the vectors, one pair at a time."""
    scores = []
    for i in range(len(j)):
        others = sorted(float(((j[i] - j[k]) ** 2).sum()) for k in range(len(j)) if k != i)
        scores.append(sum(others[: len(j) - f - 2]))
    return sorted(sorted(range(len(j)), key=lambda i: (scores[i], i))[:m])


@pytest.mark.parametrize(
    ("n_tasks", "f", "m"), [(3, 0, 1), (4, 1, 1), (5, 0, 2), (5, 2, 3), (9, 3, 4), (40, 7, 20)]
)
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_the_rows_of_least_score_share_the_weight(n_tasks, f, m, scale):
    method = gradbal.create("krum", n_byzantine=f, n_selected=m)
    for seed in range(20):
        j = random_rows(n_tasks, 12, seed, spread=10.0) * scale
        w = method.weights(torch.from_numpy(j @ j.T))
        wanted = torch.zeros(n_tasks).double()
        wanted[chosen(j, f, m)] = 1 / m
        assert torch.equal(w, wanted)
        d = method.direction(torch.from_numpy(j))
        torch.testing.assert_close(d, wanted @ torch.from_numpy(j))


def test_distances_are_squared():
    j = torch.tensor([0.0, 1, 2, 3, 10, 11], dtype=torch.float64)[:, None]
    by_power = [(j - j.T).abs().pow(p).sort(1)[0][:, :5].sum(1).argmin().item() for p in (1, 2)]
    assert by_power == [2, 3]
    assert gradbal.create("krum").weights(j @ j.T).argmax() == 3


def test_a_row_is_not_its_own_neighbour():
    # With one neighbour each, one that is its own would have the score 0 and come first.
    j = torch.tensor([[30.0, 0.0], [9.0, 0.1], [9.0, 0.1], [4.0, 0.0], [2.0, 0.0]])
    assert gradbal.create("krum", n_byzantine=2).weights(j @ j.T).tolist() == [0, 1, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_scores_go_to_the_lowest_index(dtype):
    method, two = gradbal.create("krum"), gradbal.create("krum", n_selected=2)
    # The closest two of three, in every order, and the corners of a regular simplex, turned.
    j = torch.tensor([[1.0, 0.0], [1.0, 0.3], [5.0, 5.0]], dtype=dtype)
    for order in ([0, 1, 2], [1, 0, 2], [2, 1, 0], [0, 2, 1]):
        w = method.weights(j[order] @ j[order].T)
        assert int(w.argmax()) == min(order.index(0), order.index(1))
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        q = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=dtype))[0]
        j = 3 * q + torch.randn(6, generator=generator, dtype=dtype)
        assert method.weights(j @ j.T).tolist() == [1, 0, 0, 0, 0, 0]
        assert two.weights(j @ j.T).tolist() == [0.5, 0.5, 0, 0, 0, 0]


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_rounding_errors_below_zero_are_no_distances(scale):
    # |g|² + |h|² − 2⟨g, h⟩ of equal rows is not exactly zero, and may be negative.
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        g, other = torch.randn(2, 300, generator=generator) * scale
        j = torch.stack([other, g, g * (1 + 1e-7), g])
        w = gradbal.create("krum", n_selected=3).weights(j @ j.T)
        assert w.isfinite().all()
        torch.testing.assert_close(w, torch.tensor([0.0, 1, 1, 1]) / 3)


def test_up_to_f_outliers_do_no_harm():
    rng = np.random.default_rng(0)
    for size in (1.0, 1e3, 1e8):
        honest = 1.0 + 0.1 * rng.standard_normal((5, 20))
        wild = size * rng.standard_normal((2, 20)) - 5 * size
        j = torch.from_numpy(np.concatenate([wild, honest]))
        w = gradbal.create("krum", n_byzantine=2).weights(j @ j.T)
        assert not w[:2].any()
        gap = (w @ j - 1.0).norm()
        assert gap < 0.1 * 2 * math.sqrt(20)


def test_adding_a_vector_to_all_rows_adds_it_to_the_direction():
    for seed in range(20):
        j = torch.from_numpy(random_rows(6, 9, seed))
        shift = torch.randn(9, dtype=torch.float64)
        for m in (1, 3):
            method = gradbal.create("krum", n_byzantine=1, n_selected=m)
            torch.testing.assert_close(method.direction(j + shift), method.direction(j) + shift)


def test_all_rows_selected_is_the_mean():
    j = torch.from_numpy(random_rows(5, 9, 0))
    d = gradbal.create("krum", n_selected=5).direction(j)
    torch.testing.assert_close(d, j.mean(0))


def test_a_zero_row_is_a_gradient_like_any_other():
    j = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.1, 0.0], [-0.2, 0.1]])
    assert gradbal.create("krum").weights(j @ j.T).tolist() == [0, 1, 0, 0]


def test_opposite_rows_and_equal_rows():
    g = torch.randn(6, dtype=torch.float64)
    d = gradbal.create("krum").direction(torch.stack([g, -g, g, g]))
    torch.testing.assert_close(d, g)
    assert not gradbal.create("krum", n_selected=3).direction(torch.zeros(3, 6)).any()


@pytest.mark.parametrize(
    ("keywords", "least"), [({}, 3), ({"n_byzantine": 2}, 5), ({"n_selected": 4}, 4)]
)
def test_too_few_tasks(keywords, least):
    method = gradbal.create("krum", **keywords)
    name, value = next(iter(keywords.items()), ("n_byzantine", 0))
    message = f"Krum with {name}={value} needs at least {least} tasks, found {least - 1}"
    with pytest.raises(ValueError, match=message):
        method.weights(torch.eye(least - 1))
    assert method.weights(torch.eye(least)).sum() == 1


def test_too_few_tasks_in_training_change_nothing():
    model, opt = trained("krum")
    opt.aggregator.n_byzantine = 1
    before = snapshot(model, opt)
    with pytest.raises(ValueError, match="n_byzantine=1 needs at least 4 tasks, found 3"):
        opt.backward(model.losses(model.batch()))
    assert_same(snapshot(model, opt), before)
    # The losses still have their graph: another method can use them.
    losses = model.losses(model.batch())
    with pytest.raises(ValueError, match="needs at least 4 tasks"):
        opt.backward(losses)
    sum(losses).backward()


def test_tasks_that_sit_out_can_be_too_many():
    model = make("EarlyBranches")
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    opt = gradbal.MultiTaskOptimizer(sgd, "krum", nonfinite="drop")

    def losses(n_bad):
        found = targets([head(model.blocks[0](model.batch())) for head in model.heads])
        bad = root_at_zero(model.blocks[0].weight)
        return [l + bad if i < n_bad else l for i, l in enumerate(found)]

    opt.backward(losses(1))
    assert opt.weights[0] == 0
    assert opt.weights.sum() == 1
    opt.zero_grad()
    before = snapshot(model, opt)
    with pytest.raises(ValueError, match="needs at least 3 tasks, found 2"):
        opt.backward(losses(2))
    assert_same(snapshot(model, opt), before)


def test_bad_hyperparameters():
    with pytest.raises(TypeError, match=r"`n_byzantine` must be an integer, found 1\.0"):
        gradbal.create("krum", n_byzantine=1.0)
    with pytest.raises(TypeError, match="`n_selected` must be an integer, found True"):
        gradbal.create("krum", n_selected=True)
    with pytest.raises(ValueError, match=r"`n_byzantine` must be in \[0, inf\), found -1"):
        gradbal.create("krum", n_byzantine=-1)
    with pytest.raises(ValueError, match=r"`n_selected` must be in \[1, inf\), found 0"):
        gradbal.create("krum", n_selected=0)
