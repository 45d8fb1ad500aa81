"""Uncertainty weighting: the forms in use, the optimum, training of the log-variances."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

import gradbal
from gradbal import MultiTaskOptimizer
from gradbal.aggregators.uw import uw
from tests.aggregators.losses import assert_resumes_anywhere, vector
from tests.zoo import make

LOSSES = (0.3, 2.0, 7.0)

# Each form by its own formula, in the letters of its code, for one task.
FORMS = {
    "Kendall, regression": (
        {},
        0.0,
        lambda l, s: l / (2 * math.exp(s)) + math.log(math.exp(s / 2)),
    ),
    "Kendall, classification": (
        {"kind": "classification"},
        0.0,
        lambda l, s: l / math.exp(s) + math.log(math.sqrt(math.exp(s))),
    ),
    "Nash-MTL": ({}, 0.0, lambda l, s: 0.5 * (math.exp(-s) * l + s)),
    "LibMTL": ({"init": -0.5}, -0.5, lambda l, s: l / (2 * math.exp(s)) + s / 2),
    "Auto-Lambda": ({"init": -0.7}, -0.7, lambda l, s: 1 / (2 * math.exp(s)) * l + s / 2),
    "Aligned-MTL": ({"kind": "classification"}, 0.0, lambda l, s: math.exp(-s) * l + 0.5 * s),
}


def _at(s: Tensor, **keywords: object) -> gradbal.Aggregator:
    method = gradbal.create("uw", **keywords)
    method.prepare(len(s), s)
    method.parameters()[0].data = s.clone()
    return method


@pytest.mark.parametrize("form", FORMS)
def test_the_forms_in_use(form: str) -> None:
    keywords, init, objective = FORMS[form]
    first = gradbal.create("uw", **keywords)
    wanted = sum(objective(l, init) for l in LOSSES)
    assert float(first.scalarize(vector(*LOSSES)).detach()) == pytest.approx(wanted, rel=1e-12)
    assert first.learned.tolist() == pytest.approx([init] * 3)

    s = vector(-1.0, 0.5, 2.0)
    method = _at(s, **keywords)
    value = method.scalarize(vector(*LOSSES))
    pairs = list(zip(LOSSES, s.tolist(), strict=True))
    assert float(value.detach()) == pytest.approx(sum(objective(l, x) for l, x in pairs))
    (slope,) = torch.autograd.grad(value, method.learned)
    h = 1e-6
    by_differences = [(objective(l, x + h) - objective(l, x - h)) / (2 * h) for l, x in pairs]
    np.testing.assert_allclose(slope.numpy(), by_differences, rtol=1e-6)
    w = method.loss_weights(vector(*LOSSES))
    steps = [(objective(l + h, x) - objective(l - h, x)) / (2 * h) for l, x in pairs]
    np.testing.assert_allclose(w.numpy(), steps, rtol=1e-6)


def test_the_optimum_for_frozen_losses() -> None:
    kinds = ["regression", "classification", "regression"]
    factors = vector(0.5, 1.0, 0.5)
    theta = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    opt = MultiTaskOptimizer(SGD([theta], lr=0.0), "uw", lr=0.5, kind=kinds, init=-0.5)
    losses = vector(*LOSSES)
    for _ in range(500):
        opt.zero_grad()
        # Values frozen, gradients not.
        opt.backward([l + theta.sum() - theta.sum().detach() for l in losses])
        opt.step()
    s = opt.aggregator.learned.detach()
    torch.testing.assert_close(s, (2 * factors * losses).log())
    torch.testing.assert_close(opt.aggregator.loss_weights(losses), 1 / (2 * losses))
    value = float(opt.aggregator.scalarize(losses).detach())
    assert value == pytest.approx(float(((1 + s) / 2).sum()))


def test_mixed_kinds_go_with_their_tasks() -> None:
    kinds = ["classification", "regression", "classification"]
    s = vector(0.1, -0.3, 1.0)
    method = _at(s, kind=kinds)
    w = method.loss_weights(vector(1.0, 1.0), tasks=[1, 2])
    torch.testing.assert_close(w, torch.stack([0.5 * (-s[1]).exp(), (-s[2]).exp()]))
    for losses in (torch.ones(2), torch.ones(4)):
        with pytest.raises(ValueError, match="`kind` must have one entry for each of"):
            method.scalarize(losses)


def test_a_tasks_weight_depends_on_its_own_loss_alone() -> None:
    model, twin = make("Plain"), make("Plain")
    opt = MultiTaskOptimizer(SGD(model.parameters(), lr=0.0), "uw", lr=0.1)
    other = MultiTaskOptimizer(SGD(twin.parameters(), lr=0.0), "uw", lr=0.1)
    for _ in range(3):
        opt.zero_grad()
        opt.backward(model.losses(model.batch()))
        opt.step()
        other.zero_grad()
        losses = twin.losses(twin.batch())
        other.backward([losses[0], 9 * losses[1], 0.1 * losses[2]])
        other.step()
    s, changed = opt.aggregator.learned.detach(), other.aggregator.learned.detach()
    assert s[0] == changed[0]
    assert (s[1:] != changed[1:]).all()


def test_decay_pulls_the_variances_to_one_only_where_it_is_asked_for() -> None:
    # LibMTL and Auto-Lambda train s under the main optimizer's decay.
    found = []
    for decay in (0.0, 0.5):
        theta = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        sgd = SGD([theta], lr=0.1, weight_decay=0.5)
        opt = MultiTaskOptimizer(sgd, "uw", init=-0.5, weight_decay=decay)
        opt.backward([theta.sum() + 2.0])
        opt.step()
        found.append(float(opt.aggregator.learned.detach()))
    slope = -0.5 * math.exp(0.5) * 2.0 + 0.5
    assert found == pytest.approx([-0.5 - 0.1 * slope, -0.5 - 0.1 * (slope - 0.25)])


def test_a_loss_below_zero_cannot_blow_its_weight_up() -> None:
    theta = nn.Parameter(torch.zeros(2))
    opt = MultiTaskOptimizer(Adam([theta], lr=0.0), "uw", lr=5.0, clamp=3.0)
    for _ in range(20):
        opt.zero_grad()
        opt.backward([theta.sum() - 1.0, (theta - 1).square().sum()])
        assert float(opt.weights.max()) <= 0.5 * math.exp(3.0) * (1 + 1e-6)
        opt.step()
    assert float(opt.weights[0]) == pytest.approx(0.5 * math.exp(3.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_precision(dtype: torch.dtype) -> None:
    found = uw(torch.tensor([3.0, 4.0], dtype=dtype), torch.zeros(2), ["regression"] * 2)
    assert float(found) == 3.5
    # Log-variances are kept in float32 at least: half precision would lose their steps.
    method = gradbal.create("uw")
    method.scalarize(torch.ones(2, dtype=dtype))
    assert method.learned.dtype == torch.float32


@pytest.mark.parametrize(
    "keywords", [{}, {"kind": ["regression", "classification", "regression"], "lr": 0.1}], ids=str
)
def test_it_resumes_anywhere(keywords: dict[str, object]) -> None:
    assert_resumes_anywhere("uw", **keywords)
