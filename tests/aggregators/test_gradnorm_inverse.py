"""Weights inverse to the norms: the sum of the unit rows, at every scale."""

import pytest
import torch

import gradbal
from gradbal.aggregators.gradnorm_inverse import gradnorm_inverse
from tests.aggregators.inputs import random_rows


@pytest.mark.parametrize("n_tasks", [1, 2, 3, 5, 10])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_it_is_the_sum_of_the_unit_rows(n_tasks, scale):
    for seed in range(10):
        j = torch.from_numpy(random_rows(n_tasks, 15, seed, 1e6)) * scale
        d = gradbal.create("gradnorm_inverse").direction(j)
        wanted = torch.nn.functional.normalize(j, eps=0.0).sum(0)
        torch.testing.assert_close(d, wanted, rtol=0, atol=1e-12)
        norms = j.norm(dim=1)
        torch.testing.assert_close(gradnorm_inverse(j @ j.T), 1 / norms, rtol=1e-12, atol=0)


def test_only_the_diagonal_matters_and_zero_rows_have_no_weight():
    g = torch.tensor([[4.0, 1.0, 0.0], [1.0, 0.25, 0.0], [0.0, 0.0, 0.0]])
    assert gradnorm_inverse(g).tolist() == [0.5, 2.0, 0.0]
    assert gradnorm_inverse(torch.zeros(2, 2)).tolist() == [1.0, 1.0]


def test_opposite_gradients_cancel():
    g = torch.randn(6, dtype=torch.float64)
    d = gradbal.create("gradnorm_inverse").direction(torch.stack([g, -50 * g]))
    assert float(d.norm()) < 1e-12


def test_adding_a_constant_to_a_loss_changes_nothing():
    j = torch.randn(3, 5, dtype=torch.float64)
    method = gradbal.create("gradnorm_inverse")
    assert torch.equal(method.direction(j, torch.ones(3)), method.direction(j, 9 + torch.ones(3)))
