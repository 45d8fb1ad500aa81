"""Constant weights, and equal weighting by its other name."""

import math

import pytest
import torch

import gradbal
from gradbal.aggregators.constant import constant
from gradbal.aggregators.sum import Sum


def test_the_weights_are_used_as_they_are():
    j = torch.randn(3, 5, dtype=torch.float64)
    w = [2.0, -0.5, 0.0]
    method = gradbal.create("constant", weights=w)
    wanted = torch.tensor(w, dtype=torch.float64)
    torch.testing.assert_close(method.direction(j), wanted @ j)
    assert method.loss_weights(torch.rand(3)).tolist() == w
    assert float(constant(torch.tensor([1.0, 2.0]), [3.0, -1.0])) == 1.0


def test_without_weights_it_is_the_sum():
    j = torch.randn(4, 5)
    assert torch.equal(gradbal.create("constant").direction(j), gradbal.create("sum").direction(j))
    quarter = gradbal.create("constant", weights=[1 / 4] * 4).direction(j)
    torch.testing.assert_close(quarter, gradbal.create("mean").direction(j))


def test_weights_go_with_their_tasks():
    method = gradbal.create("constant", weights=[2.0, -0.5, 7.0])
    assert float(method.scalarize(torch.tensor([1.0, 10.0]), tasks=[0, 2])) == 72.0
    with pytest.raises(ValueError, match="one entry for each of 2 tasks, found 3"):
        method.scalarize(torch.ones(2))
    with pytest.raises(ValueError, match="one entry for each of 2 tasks, found 3"):
        method.prepare(2, torch.ones(()))


@pytest.mark.parametrize("w", [[], [1.0, math.nan], [math.inf], "ab", 2.0, [[1.0]]])
def test_bad_weights(w):
    with pytest.raises(ValueError, match="`weights` must be a sequence of finite numbers, found"):
        gradbal.create("constant", weights=w)


def test_ew_is_the_sum():
    j = torch.randn(4, 5)
    assert torch.equal(gradbal.create("ew").direction(j), gradbal.create("sum").direction(j))
    assert isinstance(gradbal.create("ew"), Sum)
    assert gradbal.info("ew").promises == gradbal.info("sum").promises
    # Each keeps its own name.
    assert (gradbal.create("ew").name, gradbal.create("sum").name) == ("ew", "sum")
