"""GLS: the geometric mean, its weights and its scales."""

import math

import numpy as np
import pytest
import torch
from torch.optim import SGD

import gradbal
from gradbal import MultiTaskOptimizer
from gradbal.aggregators.gls import gls
from tests.aggregators.losses import (
    assert_reads_nothing,
    assert_resumes_anywhere,
    derivative,
    random_losses,
    vector,
)
from tests.zoo import make


def _value(a: np.ndarray) -> object:
    return lambda l: float(np.prod(l ** (a / a.sum())))


@pytest.mark.parametrize("n_tasks", [1, 2, 3, 7])
def test_value_and_weights(n_tasks: int) -> None:
    for seed in range(20):
        l = random_losses(seed, n_tasks)
        a = np.ones(n_tasks) if seed % 2 else np.random.default_rng(seed).uniform(0, 3, n_tasks)
        method = gradbal.create("gls", weights=None if seed % 2 else a.tolist())
        value = float(method.scalarize(torch.from_numpy(l)))
        w = method.loss_weights(torch.from_numpy(l)).numpy()
        assert value == pytest.approx(_value(a)(l), rel=1e-12)
        np.testing.assert_allclose(w, derivative(_value(a), l), rtol=1e-7)
        np.testing.assert_allclose(w, a * value / (a.sum() * l), rtol=1e-12)
        assert float(w @ l) == pytest.approx(value, rel=1e-12)


def test_equal_losses_weigh_the_same() -> None:
    w = gradbal.create("gls").loss_weights(torch.full((4,), 2.5, dtype=torch.float64))
    assert w.tolist() == pytest.approx([0.25] * 4, rel=1e-12)


@pytest.mark.parametrize("k", [1e-8, 3.0, 1e8])
def test_the_scale_of_one_loss_is_a_factor_of_the_direction(k: float) -> None:
    j, l = torch.randn(3, 6, dtype=torch.float64), vector(0.3, 2.0, 7.0)
    scales = vector(1.0, k, 1.0)
    method = gradbal.create("gls")
    d = method.direction(j, l)
    scaled = method.direction(scales[:, None] * j, scales * l)
    torch.testing.assert_close(scaled, k ** (1 / 3) * d, rtol=1e-10, atol=0)
    # All at once: of degree one.
    torch.testing.assert_close(method.direction(k * j, k * l), k * d, rtol=1e-10, atol=0)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_ten_small_or_large_losses_neither_underflow_nor_overflow(size: float) -> None:
    # Their product is 1e∓300, far beyond float32.
    losses = torch.full((10,), size)
    method = gradbal.create("gls")
    assert float(method.scalarize(losses)) == pytest.approx(size, rel=1e-5)
    assert method.loss_weights(losses).tolist() == pytest.approx([0.1] * 10, rel=1e-5)


def test_eps_is_inside_the_logarithm() -> None:
    method = gradbal.create("gls", eps=0.5)
    losses = vector(0.0, 1.5)
    assert float(method.scalarize(losses)) == pytest.approx(1.0)
    assert method.loss_weights(losses).tolist() == pytest.approx([1.0, 0.25])


def test_focus_weights_go_with_their_tasks() -> None:
    method = gradbal.create("gls", weights=[1.0, 5.0, 3.0])
    value = float(method.scalarize(vector(16.0, 1.0), tasks=[0, 2]))
    assert value == pytest.approx(16.0**0.25)
    # One that has none does not count.
    alone = gradbal.create("gls", weights=[0.0, 2.0]).loss_weights(vector(7.0, 3.0))
    assert alone.tolist() == pytest.approx([0.0, 1.0])


def test_in_training_heads_are_weighted_too() -> None:
    model = make("Plain")
    opt = MultiTaskOptimizer(SGD(model.parameters(), lr=0.1), "gls")
    product = math.prod(model.losses(model.batch())) ** (1 / 3)
    want = torch.autograd.grad(product, list(model.parameters()))
    opt.backward(model.losses(model.batch()))
    for p, g in zip(model.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, g)


@pytest.mark.parametrize("value", [0.0, -1.5])
def test_a_loss_that_is_not_positive(value: float) -> None:
    method = gradbal.create("gls")
    with pytest.raises(
        ValueError, match=rf"'gls' needs positive losses, found {value:g} for task 1"
    ):
        method.scalarize(vector(1.0, value))
    with pytest.raises(ValueError, match="for task 4; add an offset to that loss"):
        method.scalarize(vector(1.0, value), tasks=[0, 4])
    # An offset, as the message says.
    assert float(gradbal.create("gls", eps=2.0).scalarize(vector(2.0, value))) > 0


def test_logarithms_of_losses_are_no_input() -> None:
    sgd = SGD(make("Plain").parameters(), lr=0.1)
    with pytest.raises(ValueError, match="loss_transform must be None for 'gls'"):
        MultiTaskOptimizer(sgd, "gls", loss_transform="log")


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"weights": [0.0, 0.0]}, "`weights` must have a positive entry"),
        ({"weights": [1.0, -1.0]}, "`weights` must be non-negative"),
        ({"weights": 2.0}, "`weights` must be a sequence"),
        ({"eps": -1.0}, "`eps` must be in"),
    ],
)
def test_bad_hyperparameters(keywords: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        gradbal.create("gls", **keywords)


def test_other_numbers_of_tasks() -> None:
    method = gradbal.create("gls", weights=[1.0, 2.0])
    with pytest.raises(ValueError, match="`weights` must have one entry for each of 3 tasks"):
        method.scalarize(torch.ones(3))
    with pytest.raises(ValueError, match="`weights` must have one entry for each of 3 tasks"):
        method.prepare(3, torch.ones(3))
    with pytest.raises(ValueError, match="`weights` must have a positive entry"):
        gradbal.create("gls", weights=[0.0, 2.0]).scalarize(torch.ones(1), tasks=[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_precision(dtype: torch.dtype) -> None:
    assert gls(torch.tensor([1.0, 4.0], dtype=dtype)).dtype == dtype
    assert float(gls(torch.tensor([1.0, 4.0], dtype=dtype))) == 2.0


def test_checkpoints_and_nothing_read() -> None:
    assert_resumes_anywhere("gls", weights=[1.0, 2.0, 0.5], eps=0.1)
    assert_reads_nothing(gradbal.create("gls"))
