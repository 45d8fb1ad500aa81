"""Random weights: the simplex, expectations, and which parameters they are for."""

import pytest
import torch

import gradbal
from gradbal.aggregators.rgw import rgw
from gradbal.aggregators.rlw import rlw

DISTRIBUTIONS = ("normal", "uniform", "dirichlet", "bernoulli")


def seeded(name, seed=3, **keywords):
    generator = torch.Generator().manual_seed(seed)
    return gradbal.create(name, generator=generator, **keywords)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_random_and_rgw_draw_as_rlw_does(distribution):
    j = torch.randn(5, 9, dtype=torch.float64)
    directions = [
        [method.direction(j) for _ in range(3)]
        for method in (seeded(n, distribution=distribution) for n in ("rlw", "random", "rgw"))
    ]
    for first, second, third in zip(*directions, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, third)
    # Fresh ones at every step.
    assert not torch.equal(directions[0][0], directions[0][1])


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("name", ["random", "rgw"])
def test_every_task_weighs_the_same_on_average(name, distribution):
    method = seeded(name, distribution=distribution)
    given = torch.eye(3) if name == "rgw" else torch.ones(3)
    draw = method.weights if name == "rgw" else method.loss_weights
    w = torch.stack([draw(given) for _ in range(4000)]).double()
    assert (w >= 0).all()
    torch.testing.assert_close(w.sum(1), torch.ones(4000).double(), rtol=0, atol=1e-6)
    deviation = (w.mean(0) - 1 / 3).abs() / (w.std(0) / 4000**0.5)
    assert (deviation < 4).all()


def test_the_functions_draw_from_the_generator_that_they_get():
    one, two = (torch.Generator().manual_seed(5) for _ in range(2))
    assert torch.equal(rgw(torch.eye(4).double(), generator=one), rlw(4, generator=two))


def test_rgw_leaves_zero_rows_out():
    j = torch.randn(3, 5, dtype=torch.float64)
    j[1] = 0
    w = seeded("rgw").weights(j @ j.T)
    assert w[1] == 0
    assert float(w.sum()) == pytest.approx(1)


def test_task_specific_parameters():
    assert gradbal.info("random").promises.heads == "weighted"
    assert gradbal.info("rgw").promises.heads == "own"


@pytest.mark.parametrize("name", ["random", "rgw"])
def test_bad_hyperparameters(name):
    with pytest.raises(ValueError, match="`distribution` must be one of 'normal'"):
        gradbal.create(name, distribution="gauss")
    with pytest.raises(TypeError, match=r"`generator` must be a torch\.Generator"):
        gradbal.create(name, generator=3)
