"""The smooth Tchebycheff scalarization: closed form, bounds, limits."""

import math

import numpy as np
import pytest
import torch

import gradbal
from gradbal.aggregators.stch_scalar import stch_scalar
from tests.aggregators.losses import (
    assert_reads_nothing,
    assert_resumes_anywhere,
    derivative,
    random_losses,
    vector,
)

MUS = (0.01, 0.1, 0.5, 1.0, 20.0)


def _case(seed: int, n_tasks: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    pref = rng.uniform(0, 1, n_tasks)
    return random_losses(seed, n_tasks, 100), pref / pref.sum(), rng.uniform(-1, 1, n_tasks)


@pytest.mark.parametrize("mu", MUS)
@pytest.mark.parametrize("n_tasks", [1, 2, 5])
def test_value_weights_and_bounds(mu: float, n_tasks: int) -> None:
    for seed in range(10):
        l, p, z = _case(seed, n_tasks)

        def value(x: np.ndarray, p: np.ndarray = p, z: np.ndarray = z) -> float:
            y = p * (x - z)
            return float(y.max() + mu * np.log(np.exp((y - y.max()) / mu).sum()))

        method = gradbal.create("stch_scalar", mu=mu, pref=p.tolist(), ideal=z.tolist())
        found = float(method.scalarize(torch.from_numpy(l)))
        assert found == pytest.approx(value(l), rel=1e-10)
        largest = (p * (l - z)).max()
        assert largest - 1e-12 <= found <= largest + mu * math.log(n_tasks) + 1e-12
        w = method.loss_weights(torch.from_numpy(l)).numpy()
        np.testing.assert_allclose(w, derivative(value, l), rtol=1e-3, atol=1e-6 * w.max())
        # w_i/p_i is a softmax.
        assert float((w / p).sum()) == pytest.approx(1, rel=1e-12)


def test_near_zero_it_is_tchebycheff() -> None:
    l, p, z = (torch.from_numpy(x) for x in _case(1, 4))
    keywords = {"pref": p.tolist(), "ideal": z.tolist()}
    smooth = gradbal.create("stch_scalar", mu=1e-4, **keywords).loss_weights(l)
    torch.testing.assert_close(smooth, gradbal.create("tchebycheff", **keywords).loss_weights(l))


def test_for_large_mu_the_direction_is_that_of_the_preference() -> None:
    l, p, _ = (torch.from_numpy(x) for x in _case(2, 4))
    w = gradbal.create("stch_scalar", mu=1e9, pref=p.tolist()).loss_weights(l)
    torch.testing.assert_close(w, p / 4)


def test_defaults_are_equal_preferences_and_an_ideal_of_zero() -> None:
    plain = gradbal.create("stch_scalar")
    told = gradbal.create("stch_scalar", pref=[0.5, 0.5], ideal=[0.0, 0.0])
    losses = vector(1.0, 3.0)
    assert float(plain.scalarize(losses)) == float(told.scalarize(losses))
    assert float(plain.scalarize(losses)) == pytest.approx(math.log(math.exp(0.5) + math.exp(1.5)))


def test_losses_below_the_ideal_point_are_allowed() -> None:
    w = gradbal.create("stch_scalar", ideal=[5.0, 5.0]).loss_weights(vector(1.0, -3.0))
    e = math.exp(-2.0) / (math.exp(-2.0) + math.exp(-4.0))
    assert w.tolist() == pytest.approx([e / 2, (1 - e) / 2])


@pytest.mark.parametrize("size", [1e-8, 1e8])
def test_it_scales_with_mu(size: float) -> None:
    l = vector(0.3, 2.0, 7.0)
    plain = gradbal.create("stch_scalar", mu=0.5).loss_weights(l)
    scaled = gradbal.create("stch_scalar", mu=0.5 * size).loss_weights(size * l)
    torch.testing.assert_close(scaled, plain)
    # Large losses and a small μ do not overflow.
    far = gradbal.create("stch_scalar", mu=0.01)
    assert far.loss_weights(torch.tensor([1e6, 2e6])).tolist() == [0.0, 0.5]
    assert float(far.scalarize(torch.tensor([1e6, 2e6]))) == 1e6


def test_preference_and_ideal_go_with_their_tasks() -> None:
    method = gradbal.create("stch_scalar", pref=[0.2, 9.0, 0.8], ideal=[1.0, 9.0, 0.5])
    other = gradbal.create("stch_scalar", pref=[0.2, 0.8], ideal=[1.0, 0.5])
    losses = vector(2.0, 3.0)
    assert float(method.scalarize(losses, tasks=[0, 2])) == float(other.scalarize(losses))


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"mu": 0.0}, r"`mu` must be in \(0"),
        ({"pref": [1.0, -1.0]}, "`pref` must be non-negative"),
        ({"pref": [0.0, 0.0]}, "`pref` must have a positive entry"),
        ({"ideal": [1.0, math.nan]}, "`ideal` must be a sequence of finite numbers"),
        ({"ideal": 0.0}, "`ideal` must be a sequence of finite numbers"),
    ],
)
def test_bad_hyperparameters(keywords: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        gradbal.create("stch_scalar", **keywords)


@pytest.mark.parametrize("keyword", ["pref", "ideal"])
def test_other_numbers_of_tasks(keyword: str) -> None:
    method = gradbal.create("stch_scalar", **{keyword: [1.0, 2.0]})
    for call in (method.scalarize, lambda losses: method.prepare(3, losses)):
        with pytest.raises(
            ValueError, match=f"`{keyword}` must have one entry for each of 3 tasks"
        ):
            call(torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_precision(dtype: torch.dtype) -> None:
    found = stch_scalar(torch.tensor([2.0, 2.0], dtype=dtype), torch.tensor([0.5, 0.5]), mu=1.0)
    assert found.dtype == dtype
    assert float(found) == pytest.approx(1 + math.log(2), rel=1e-2)


def test_checkpoints_and_nothing_read() -> None:
    assert_resumes_anywhere("stch_scalar", mu=0.1, pref=[1.0, 2.0, 0.5], ideal=[0.1, 0.0, -1.0])
    assert_reads_nothing(gradbal.create("stch_scalar", pref=[1.0, 0.0, 2.0], ideal=[0.0, 1.0, 2.0]))
