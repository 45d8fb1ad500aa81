"""STCH for multi-task learning: the warm-up, the nadir, and what comes after."""

import math
import warnings

import numpy as np
import pytest
import torch
from torch.optim import SGD

import gradbal
from gradbal import MultiTaskOptimizer
from gradbal.aggregators.stch import stch
from tests.aggregators.losses import (
    assert_reads_nothing,
    assert_resumes_anywhere,
    derivative,
    random_losses,
    seen,
    vector,
)
from tests.zoo import make


def _warm(nadir: tuple[float, ...], **keywords: object) -> gradbal.Aggregator:
    """After a warm-up of one step."""
    return seen(gradbal.create("stch", warmup_steps=1, warmup=0, **keywords), nadir)


def test_epochs_by_hand() -> None:
    method = gradbal.create("stch", warmup=2, mu=0.5)
    epochs = [[(9.0, 9.0)], [(5.0, 5.0), (7.0, 1.0)], [(2.0, 8.0), (4.0, 4.0)]]
    for epoch in epochs:
        for losses in epoch:
            # Σ log ℓ, in the epoch of the nadir as well.
            assert float(method.scalarize(vector(2.0, 8.0))) == pytest.approx(math.log(16))
            assert method.loss_weights(vector(2.0, 8.0)).tolist() == [0.5, 0.125]
            seen(method, losses)
        method.end_epoch()
    # N = (3, 6): 2 · ½ · log((1/3)² + (2/6)²) at ℓ = (1, 2).
    for _ in range(3):
        assert float(method.scalarize(vector(1.0, 2.0))) == pytest.approx(math.log(2 / 9))
        # Nothing changes any more.
        seen(method, (100.0, 100.0))
        method.end_epoch()


def test_no_warm_up_epoch_gathers_the_nadir_in_the_first() -> None:
    method = seen(gradbal.create("stch", warmup=0), (2.0, 4.0), (4.0, 8.0))
    method.end_epoch()
    assert float(method.scalarize(vector(3.0, 6.0))) == pytest.approx(2 * math.log(2))


def test_warm_up_in_steps() -> None:
    # 10 steps in place of 4 + 1 epochs: the last two give the nadir.
    method = gradbal.create("stch", warmup_steps=10)
    for step in range(10):
        assert float(method.scalarize(vector(math.e, 1.0))) == pytest.approx(1.0)
        seen(method, (step, 1.0) if step > 0 else (1.0, 1.0))
        method.end_epoch()  # has nothing to say
    assert float(method.scalarize(vector(8.5, 1.0))) == pytest.approx(2 * math.log(2))
    # Fewer steps than parts: the last one.
    method = seen(gradbal.create("stch", warmup_steps=2), (1.0, 1.0), (3.0, 5.0))
    assert float(method.scalarize(vector(3.0, 5.0))) == pytest.approx(2 * math.log(2))


@pytest.mark.parametrize("mu", [0.01, 0.5, 1.0, 30.0])
@pytest.mark.parametrize("n_tasks", [1, 2, 5])
def test_value_and_weights(mu: float, n_tasks: int) -> None:
    for seed in range(10):
        l, nadir = random_losses(seed, n_tasks, 10), random_losses(seed + 99, n_tasks, 10)
        method = _warm(tuple(nadir), mu=mu)

        def value(x: np.ndarray, nadir: np.ndarray = nadir) -> float:
            y = np.log(x / nadir) / mu
            return float(n_tasks * mu * (y.max() + np.log(np.exp(y - y.max()).sum())))

        found = float(method.scalarize(torch.from_numpy(l)))
        # The official code leaves the largest exponent out of the value.
        assert found == pytest.approx(value(l), rel=1e-10, abs=1e-12)
        largest = n_tasks * np.log(l / nadir).max()
        assert largest - 1e-12 <= found <= largest + n_tasks * mu * math.log(n_tasks) + 1e-12
        w = method.loss_weights(torch.from_numpy(l)).numpy()
        np.testing.assert_allclose(w, derivative(value, l), rtol=1e-4, atol=1e-7 * w.max())
        assert float(w @ l) == pytest.approx(n_tasks, rel=1e-12)


def test_at_mu_one_the_direction_is_that_of_fixed_weights() -> None:
    j, l = torch.randn(3, 6, dtype=torch.float64), vector(0.3, 2.0, 7.0)
    nadir = vector(1.0, 5.0, 2.0)
    d = _warm(tuple(nadir.tolist())).direction(j, l)
    fixed = (1 / nadir) @ j
    torch.testing.assert_close(d / d.norm(), fixed / fixed.norm())


@pytest.mark.parametrize("k", [1e-8, 1e8])
def test_the_scale_of_a_loss_does_not_matter_from_the_start(k: float) -> None:
    j, l = torch.randn(3, 6, dtype=torch.float64), vector(0.3, 2.0, 7.0)
    scales = vector(1.0, k, 1.0)
    for mu in (0.1, 1.0):
        plain, scaled = (gradbal.create("stch", mu=mu, warmup_steps=1) for _ in range(2))
        for _ in range(3):
            d, d_scaled = plain.direction(j, l), scaled.direction(scales[:, None] * j, scales * l)
            torch.testing.assert_close(d_scaled, d, rtol=1e-9, atol=0)


def test_tasks_that_sit_out() -> None:
    method = gradbal.create("stch", warmup=0)
    nan = float("nan")
    method.observe(vector(2.0, nan, nan), [0])
    method.observe(vector(4.0, 5.0, nan), [0, 1])
    method.end_epoch()
    # N = (3, 5, 1): the last one had no loss.
    assert float(method.scalarize(vector(3.0, 5.0, 1.0))) == pytest.approx(3 * math.log(3))
    assert float(method.scalarize(vector(3.0, 1.0), tasks=[0, 2])) == pytest.approx(2 * math.log(2))


def test_in_training() -> None:
    model = make("Plain")
    opt = MultiTaskOptimizer(SGD(model.parameters(), lr=0.001), "stch", warmup=1, mu=0.3)
    gathered = []
    for epoch in range(3):
        for part in (model.batch()[:2], model.batch()[2:]):
            values = torch.stack([l.detach() for l in model.losses(part)])
            if epoch == 1:
                gathered.append(values)
            opt.zero_grad()
            opt.backward(model.losses(part))
            wanted = 1 / values
            if epoch == 2:
                nadir = torch.stack(gathered).mean(0)
                wanted = 3 * torch.softmax((values / nadir).log() / 0.3, 0) / values
            torch.testing.assert_close(opt.weights, wanted, rtol=1e-10, atol=0)
            opt.step()
        opt.end_epoch()


def test_nobody_ends_an_epoch() -> None:
    method = gradbal.create("stch", warmup=3)
    losses = vector(1.0, 2.0)
    for _ in range(9_999):
        method.observe(losses)
    with pytest.warns(RuntimeWarning, match=r"'stch'.*10,000 steps.*warmup_steps"):
        method.observe(losses)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        in_steps = gradbal.create("stch", warmup_steps=20_000)
        for _ in range(10_001):
            method.observe(losses)
            in_steps.observe(losses)


def test_bad_input_changes_nothing() -> None:
    method = seen(gradbal.create("stch", warmup=0), (1.0, 2.0))
    before = repr(method.state_dict())
    for call in (method.scalarize, method.observe):
        with pytest.raises(
            ValueError, match="'stch' needs positive losses, found 0 for task 1; add"
        ):
            call(vector(1.0, 0.0))
        with pytest.raises(ValueError, match="found -1 for task 1"):
            call(vector(1.0, -1.0))
    with pytest.raises(ValueError, match="`stch` has 2 tasks, found 3"):
        method.scalarize(torch.ones(3))
    assert repr(method.state_dict()) == before


@pytest.mark.parametrize(
    ("keywords", "error", "words"),
    [
        ({"mu": 0.0}, ValueError, r"`mu` must be in \(0"),
        ({"mu": math.inf}, ValueError, "mu"),
        ({"warmup": -1}, ValueError, "`warmup` must be in"),
        ({"warmup": 1.5}, TypeError, "`warmup` must be an integer"),
        ({"warmup_steps": 0}, ValueError, "`warmup_steps` must be in"),
    ],
)
def test_bad_hyperparameters(keywords: dict[str, object], error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        gradbal.create("stch", **keywords)


@pytest.mark.parametrize(
    "keywords", [{}, {"warmup": 0, "mu": 0.2}, {"warmup": 1}, {"warmup_steps": 3}], ids=str
)
def test_it_resumes_anywhere(keywords: dict[str, object]) -> None:
    assert_resumes_anywhere("stch", **keywords)


def test_reset_and_nothing_read() -> None:
    method = _warm((2.0, 3.0))
    method.reset()
    assert method.state_dict()["state"] == gradbal.create("stch").state_dict()["state"]
    for keywords in ({"warmup": 1}, {"warmup_steps": 2}):
        assert_reads_nothing(gradbal.create("stch", **keywords))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_precision(dtype: torch.dtype) -> None:
    found = stch(torch.tensor([1.0, 4.0], dtype=dtype), torch.tensor([1.0, 4.0]), 0.5)
    assert found.dtype == dtype
    assert float(found) == pytest.approx(math.log(2), rel=1e-2)
