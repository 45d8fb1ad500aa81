"""Generalized means: known ones, their weights, every γ."""

import itertools
import math

import numpy as np
import pytest
import torch

import gradbal
from gradbal.aggregators.generalized_mean import generalized_mean
from tests.aggregators.losses import (
    assert_reads_nothing,
    assert_resumes_anywhere,
    random_losses,
    vector,
)

NAME = "generalized_mean"
INF = math.inf
MEANS = {
    -INF: lambda l: l.min(),
    -1.0: lambda l: len(l) / (1 / l).sum(),
    0.0: lambda l: math.exp(np.log(l).mean()),
    1.0: lambda l: l.mean(),
    2.0: lambda l: math.sqrt((l * l).mean()),
    INF: lambda l: l.max(),
}


@pytest.mark.parametrize("gamma", MEANS)
def test_the_means_that_have_names(gamma: float) -> None:
    for seed in range(20):
        l = random_losses(seed, 1 + seed % 6)
        found = float(gradbal.create(NAME, gamma=gamma).scalarize(torch.from_numpy(l)))
        assert found == pytest.approx(MEANS[gamma](l), rel=1e-12)


@pytest.mark.parametrize("gamma", [-300.0, -2.5, -1e-3, -1e-5, 0.0, 1e-12, 1e-3, 0.5, 3.0, 40.0])
def test_weights(gamma: float) -> None:
    for seed in range(20):
        l = random_losses(seed, 1 + seed % 6, 100)
        method = gradbal.create(NAME, gamma=gamma)
        value = float(method.scalarize(torch.from_numpy(l)))
        w = method.loss_weights(torch.from_numpy(l)).numpy()
        wanted = (l / value) ** (gamma - 1) / len(l)
        np.testing.assert_allclose(w, wanted, rtol=1e-9, atol=1e-12 * wanted.max())
        assert float(w @ l) == pytest.approx(value, rel=1e-11)


def test_close_to_zero_it_is_as_exact_as_elsewhere() -> None:
    # log M = mean x + γ var x/2 + γ² κ₃/6 + …, with x = log ℓ.
    l = vector(0.2, 1.0, 30.0)
    x = l.log()
    y = x - x.mean()
    for gamma in (1e-3, 1e-4, 1e-6, 1e-9, -1e-4, -1e-8):
        series = gamma * y.square().mean() / 2 + gamma**2 * y.pow(3).mean() / 6
        above = math.log(float(generalized_mean(l, gamma))) - float(x.mean())
        assert above == pytest.approx(float(series), rel=1e-3, abs=2e-15)


def test_it_grows_with_gamma() -> None:
    l = torch.from_numpy(random_losses(3, 5))
    gammas = [-INF, -1e6, -20.0, -1.0, -1e-3, -1e-5, 0.0, 1e-5, 1e-3, 0.5, 1.0, 4.0, 1e6, INF]
    values = [float(generalized_mean(l, gamma)) for gamma in gammas]
    assert all(a <= b * (1 + 1e-15) for a, b in itertools.pairwise(values))
    assert values[1] == pytest.approx(values[0], rel=1e-5)
    assert values[-2] == pytest.approx(values[-1], rel=1e-5)


@pytest.mark.parametrize("gamma", [-1e308, -400.0, 400.0, 1e308])
def test_large_gamma_overflows_nowhere(gamma: float) -> None:
    l = vector(1e-8, 3.0, 1e8)
    method = gradbal.create(NAME, gamma=gamma)
    w = method.loss_weights(l)
    assert w.isfinite().all()
    assert float(w @ l) == pytest.approx(float(method.scalarize(l)), rel=1e-9)


@pytest.mark.parametrize("gamma", [INF, -INF])
def test_equal_extremes_share_the_weight(gamma: float) -> None:
    assert gradbal.create(NAME, gamma=gamma).loss_weights(vector(2.0, 2.0)).tolist() == [0.5, 0.5]
    w = gradbal.create(NAME, gamma=gamma).loss_weights(vector(1.0, 2.0)).tolist()
    assert w == pytest.approx([0.0, 1.0] if gamma > 0 else [1.0, 0.0])


@pytest.mark.parametrize("gamma", [-INF, -2.0, 0.0, 1.0, 3.0])
@pytest.mark.parametrize("k", [1e-8, 1e8])
def test_of_degree_one(gamma: float, k: float) -> None:
    j, l = torch.randn(3, 6, dtype=torch.float64), vector(0.3, 2.0, 7.0)
    method = gradbal.create(NAME, gamma=gamma)
    torch.testing.assert_close(method.scalarize(k * l), k * method.scalarize(l))
    torch.testing.assert_close(method.loss_weights(k * l), method.loss_weights(l))
    # Scaling one loss turns the direction, but for the geometric mean.
    scales = vector(1.0, k, 1.0)
    d, scaled = method.direction(j, l), method.direction(scales[:, None] * j, scales * l)
    if math.isfinite(gamma):
        parallel = float(torch.cosine_similarity(d, scaled, dim=0)) > 1 - 1e-12
        assert parallel == (gamma == 0.0)


def test_the_default_is_the_geometric_mean() -> None:
    l = vector(0.3, 2.0, 7.0)
    assert gradbal.create(NAME).gamma == 0.0
    torch.testing.assert_close(
        gradbal.create(NAME).loss_weights(l), gradbal.create("gls").loss_weights(l)
    )


def test_a_loss_that_is_not_positive() -> None:
    for gamma in (-1.0, 0.0, 1.0):
        with pytest.raises(
            ValueError, match=rf"'{NAME}' needs positive losses, found 0 for task 1"
        ):
            gradbal.create(NAME, gamma=gamma).scalarize(vector(1.0, 0.0))
    with pytest.raises(ValueError, match="found -1 for task 3"):
        gradbal.create(NAME).scalarize(vector(1.0, -1.0), tasks=[0, 3])
    assert float(gradbal.create(NAME, eps=1.0).scalarize(vector(3.0, 0.0))) == pytest.approx(2.0)


@pytest.mark.parametrize("keywords", [{"gamma": math.nan}, {"eps": -1.0}], ids=str)
def test_bad_hyperparameters(keywords: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(keywords))}` must be in"):
        gradbal.create(NAME, **keywords)
    with pytest.raises(TypeError, match="`gamma` must be a number"):
        gradbal.create(NAME, gamma="0")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_precision(dtype: torch.dtype) -> None:
    for gamma in (-1.0, 0.0, 1e-4, 2.0, INF):
        found = generalized_mean(torch.tensor([4.0, 4.0], dtype=dtype), gamma)
        assert found.dtype == dtype
        assert float(found) == 4.0


@pytest.mark.parametrize("gamma", [-1.0, 0.0, 1e-4, 2.0, INF])
def test_checkpoints_and_nothing_read(gamma: float) -> None:
    assert_resumes_anywhere(NAME, gamma=gamma)
    assert_reads_nothing(gradbal.create(NAME, gamma=gamma))
