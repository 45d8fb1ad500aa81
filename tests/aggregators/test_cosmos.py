"""COSMOS: the cosine's reward, and preferences that are drawn."""

import math

import numpy as np
import pytest
import torch
from torch.amp import GradScaler
from torch.optim import SGD

import gradbal
from gradbal import MultiTaskOptimizer
from gradbal.aggregators.cosmos import cosmos
from tests.aggregators.losses import (
    assert_reads_nothing,
    assert_resumes_anywhere,
    derivative,
    random_losses,
    vector,
)
from tests.zoo import make


def _value(l: np.ndarray, r: np.ndarray, lam: float) -> float:
    return float(r @ l - lam * (r / np.linalg.norm(r)) @ (l / np.linalg.norm(l)))


@pytest.mark.parametrize("lam", [0.0, 0.01, 2.0, 8.0])
@pytest.mark.parametrize("n_tasks", [1, 2, 5])
def test_value_and_weights(n_tasks: int, lam: float) -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        l, r = random_losses(seed, n_tasks, 100), rng.uniform(0, 1, n_tasks)
        method = gradbal.create("cosmos", lam=lam, pref=r.tolist())
        value = float(method.scalarize(torch.from_numpy(l)))
        assert value == pytest.approx(_value(l, r, lam), rel=1e-10, abs=1e-10)
        w = method.loss_weights(torch.from_numpy(l)).numpy()
        n = np.linalg.norm
        cosine = r @ l / (n(r) * n(l))
        wanted = r - lam * (r / (n(r) * n(l)) - cosine * l / n(l) ** 2)
        np.testing.assert_allclose(w, wanted, rtol=1e-10, atol=1e-12)
        slope = derivative(lambda x: _value(x, r, lam), l)  # noqa: B023
        np.testing.assert_allclose(w, slope, rtol=1e-5, atol=1e-6)


def test_weights_can_be_negative() -> None:
    w = gradbal.create("cosmos", lam=8.0, pref=[0.5, 0.5]).loss_weights(vector(0.1, 0.5))
    assert w[0] < 0 < w[1]


def test_the_cosine_does_not_change_with_the_scale_of_all_losses() -> None:
    l, r = vector(0.3, 2.0), vector(0.4, 0.6)
    values = [float(cosmos(s * l, r, 3.0) - s * (r @ l)) for s in (1e-8, 1.0, 1e8)]
    assert values[:2] == pytest.approx([values[1]] * 2, rel=1e-6)
    # Losses in the ratio of the preference: only the first term is left to descend.
    w = gradbal.create("cosmos", pref=[0.4, 0.6]).loss_weights(5 * r)
    torch.testing.assert_close(w, r)


def test_preferences_go_with_their_tasks() -> None:
    method = gradbal.create("cosmos", pref=[0.2, 9.0, 0.8])
    other = gradbal.create("cosmos", pref=[0.2, 0.8])
    losses = vector(2.0, 3.0)
    assert float(method.scalarize(losses, tasks=[0, 2])) == float(other.scalarize(losses))


def test_no_preference_or_only_zero_losses() -> None:
    with pytest.raises(ValueError, match="`pref` must have a positive entry"):
        gradbal.create("cosmos", pref=[0.0, 0.0])
    with pytest.raises(ValueError, match="'cosmos' needs a loss that is not zero"):
        gradbal.create("cosmos").scalarize(torch.zeros(2))
    assert bool(gradbal.create("cosmos").loss_weights(vector(0.0, 1.0)).isfinite().all())


# Preferences that are drawn.


def _sampling(**keywords: object) -> gradbal.Aggregator:
    generator = torch.Generator().manual_seed(3)
    return gradbal.create("cosmos", sample=True, generator=generator, **keywords)


@pytest.mark.parametrize("p", [None, [1.0, 1.0, 1.0], [0.1, 2.0, 5.0]])
def test_the_moments_are_those_of_the_dirichlet_distribution(p: list[float] | None) -> None:
    method = _sampling(pref=p)
    drawn = torch.stack([method.draw(3) for _ in range(4000)])
    assert (drawn >= 0).all()
    torch.testing.assert_close(drawn.sum(1), torch.ones(4000).double())
    a = torch.tensor(p or [1.2] * 3, dtype=torch.float64)
    mean = a / a.sum()
    variance = mean * (1 - mean) / (a.sum() + 1)
    assert ((drawn.mean(0) - mean).abs() / (variance / 4000).sqrt() < 4).all()
    torch.testing.assert_close(drawn.var(0), variance, rtol=0.15, atol=0)


def test_a_draw_is_for_one_step() -> None:
    method = _sampling(pref=[1.0, 2.0], lam=0.0)
    losses = vector(2.0, 3.0)
    r = method.draw()
    # The same for every look at this step's losses.
    for _ in range(3):
        torch.testing.assert_close(method.loss_weights(losses), r)
    method.observe(losses)
    assert torch.equal(method.drawn, r)
    w = method.loss_weights(losses)
    assert torch.equal(method.drawn, w)
    assert not torch.equal(w, r)
    # Another draw takes its place.
    torch.testing.assert_close(method.draw(), method.loss_weights(losses))
    torch.testing.assert_close(
        method.loss_weights(vector(1.0), tasks=[1]), method.drawn[1:], rtol=1e-12, atol=0
    )


def test_in_training_the_network_can_be_told() -> None:
    model = make("Plain")
    generator = torch.Generator().manual_seed(3)
    opt = MultiTaskOptimizer(
        SGD(model.parameters(), lr=0.01), "cosmos", sample=True, lam=0.0, generator=generator
    )
    seen = []
    for _ in range(3):
        r = opt.aggregator.draw(3)
        opt.zero_grad()
        opt.backward(model.losses(model.batch()))
        torch.testing.assert_close(opt.weights, r)
        opt.step()
        seen.append(r)
    assert not torch.equal(seen[0], seen[1])
    # Without a draw each step makes its own.
    for _ in range(2):
        opt.zero_grad()
        opt.backward(model.losses(model.batch()))
        opt.step()
        seen.append(opt.weights)
        torch.testing.assert_close(opt.aggregator.drawn, opt.weights)
    assert not torch.equal(seen[3], seen[4])


def test_a_step_that_is_skipped_keeps_its_draw() -> None:
    model = make("Plain")
    opt = MultiTaskOptimizer(SGD(model.parameters(), lr=0.01), _sampling())
    scaler = GradScaler("cpu", init_scale=1024.0)
    losses = model.losses(model.batch())
    opt.backward([losses[0] * float("inf"), *losses[1:]], grad_scaler=scaler)
    r = opt.aggregator.drawn
    scaler.step(opt)
    scaler.update()
    opt.zero_grad()
    opt.backward(model.losses(model.batch()), grad_scaler=scaler)
    assert torch.equal(opt.aggregator.drawn, r)


def test_draws_are_reproducible_and_part_of_a_checkpoint() -> None:
    method, twin = _sampling(), _sampling()
    run = [method.draw(4) for _ in range(5)]
    for r in run[:3]:
        assert torch.equal(twin.draw(4), r)
    other = gradbal.create("cosmos", sample=True)
    other.load_state_dict(twin.state_dict())
    # T as well, and that the last one is for the step to come.
    assert torch.equal(other.drawn, run[2])
    assert other.fresh
    for r in run[3:]:
        assert torch.equal(other.draw(), r)
    method.reset()
    assert method.drawn is None
    assert torch.equal(method.draw(4), run[0])


@pytest.mark.parametrize("keywords", [{}, {"sample": True}, {"pref": [1.0, 2.0, 0.5]}], ids=str)
def test_it_resumes_anywhere(keywords: dict[str, object]) -> None:
    assert_resumes_anywhere("cosmos", **keywords)


def test_errors_of_draws() -> None:
    with pytest.raises(ValueError, match="`draw` needs sample=True"):
        gradbal.create("cosmos").draw(3)
    with pytest.raises(ValueError, match="`draw` needs `n_tasks` before the first step"):
        _sampling().draw()
    with pytest.raises(ValueError, match="`pref` must have one entry for each of 3 tasks, found 2"):
        _sampling(pref=[1.0, 2.0]).draw(3)
    with pytest.raises(ValueError, match="`pref` must be positive where it is sampled"):
        _sampling(pref=[1.0, 0.0])
    method = _sampling()
    method.draw(3)
    with pytest.raises(ValueError, match="`draw` was for 3 tasks, found 2"):
        method.scalarize(torch.ones(2))


@pytest.mark.parametrize(
    ("keywords", "error", "words"),
    [
        ({"lam": -1.0}, ValueError, "`lam` must be in"),
        ({"lam": math.nan}, ValueError, "lam"),
        ({"sample": 1}, ValueError, "`sample` must be one of False, True"),
        ({"generator": 3}, TypeError, "`generator` must be a torch.Generator"),
        ({"pref": [-1.0]}, ValueError, "`pref` must be non-negative"),
    ],
)
def test_bad_hyperparameters(keywords: dict[str, object], error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        gradbal.create("cosmos", **keywords)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_precision_and_nothing_read(dtype: torch.dtype) -> None:
    found = cosmos(torch.tensor([3.0, 4.0], dtype=dtype), torch.tensor([1.0, 0.0]), 2.5)
    assert found.dtype == dtype
    assert float(found) == pytest.approx(1.5)
    assert_reads_nothing(gradbal.create("cosmos"))
    assert_reads_nothing(_sampling())
