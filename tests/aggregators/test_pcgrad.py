"""PCGrad: the two ways to do the projections against each other and against the vectors."""

import numpy as np
import pytest
import torch

from gradbal.aggregators.pcgrad import _all_together, _one_by_one, pcgrad, random_orders
from tests.aggregators.inputs import random_rows


def projected_sum(j, orders):
    total = np.zeros(j.shape[1])
    for i, order in enumerate(orders.tolist()):
        v = j[i].copy()
        for k in order:
            if v @ j[k] < 0:
                v -= v @ j[k] / (j[k] @ j[k]) * j[k]
        total += v
    return total


@pytest.mark.parametrize("n_tasks", [1, 2, 3, 7, 12, 13, 30])
@pytest.mark.parametrize("spread", [1.0, 1e4])
def test_both_ways_project_the_vectors(n_tasks, spread):
    for seed in range(10):
        j = random_rows(n_tasks, 40, seed, spread) - 0.3 * random_rows(1, 40, seed)
        orders = random_orders(n_tasks, torch.Generator().manual_seed(seed))
        wanted = projected_sum(j, orders)
        g = j @ j.T
        for project in (_one_by_one, _all_together):
            found = project(g, orders.numpy()) @ j
            assert np.linalg.norm(found - wanted) < 1e-11 * np.linalg.norm(j)
        found = pcgrad(torch.from_numpy(g), orders).numpy() @ j
        assert np.linalg.norm(found - wanted) < 1e-11 * np.linalg.norm(j)


@pytest.mark.parametrize("n_tasks", [3, 20])
def test_rows_that_count_as_zero_change_nothing(n_tasks):
    j = random_rows(n_tasks, 40, 0)
    small = np.insert(j, 1, -1e-13 * j.sum(0), 0)
    orders = random_orders(n_tasks + 1, torch.Generator().manual_seed(0))
    kept = [i for i in range(n_tasks + 1) if i != 1]
    without = [[kept.index(k) for k in order if k != 1] for order in orders[kept].tolist()]
    w = pcgrad(torch.from_numpy(small @ small.T), orders).numpy()
    assert w[1] == 0
    wanted = pcgrad(torch.from_numpy(j @ j.T), torch.tensor(without)).numpy()
    np.testing.assert_allclose(w[kept], wanted, rtol=1e-9)


def test_random_orders_are_drawn_independently():
    orders = random_orders(4, torch.Generator().manual_seed(0))
    assert orders.shape == (4, 3)
    draws = [random_orders(3, torch.Generator().manual_seed(s))[:, 0] for s in range(300)]
    first = torch.stack(draws).double()
    # Row 0 starts with 1 or 2 equally often, whatever row 1 starts with.
    assert abs(float((first[:, 0] == 1).double().mean()) - 0.5) < 0.1
    assert abs(float(((first[:, 0] == 1) == (first[:, 1] == 0)).double().mean()) - 0.5) < 0.1
