"""`step(closure)`, where the closure returns the losses."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD

import gradbal
from gradbal import MultiTaskOptimizer
from tests.gradients import expected, task_gradients
from tests.states import assert_same, fresh, snapshot
from tests.zoo import METHODS, make


@pytest.mark.parametrize("form", [list, torch.stack, lambda l: dict(zip("abc", l, strict=True))])
@pytest.mark.parametrize("aggregator", METHODS)
def test_a_closure_is_zero_grad_backward_step(aggregator: str, form) -> None:
    model, opt = fresh(aggregator, **_seeded(aggregator))
    twin, other = fresh(aggregator, **_seeded(aggregator))
    for _ in range(3):
        losses = form(model.losses(model.batch()))
        # Gradients that lie about are cleared.
        model.trunk[0].weight.grad = torch.full_like(model.trunk[0].weight, 7.0)
        assert opt.step(lambda losses=losses: losses) is losses
        other.zero_grad()
        other.backward(form(twin.losses(twin.batch())))
        other.step()
    assert_same(snapshot(model, opt), snapshot(twin, other))


def _seeded(aggregator: str) -> dict[str, Any]:
    takes = "generator" in gradbal.info(aggregator).hyperparameters
    return {"generator": torch.Generator().manual_seed(4)} if takes else {}


def test_a_closure_runs_with_gradients_enabled() -> None:
    model, opt = fresh("upgrad")
    with torch.no_grad():
        opt.step(lambda: model.losses(model.batch()))
    assert opt.losses is not None


def test_a_closure_must_return_the_losses() -> None:
    _, opt = fresh("upgrad")
    with pytest.raises(TypeError, match=r"closure must return the losses.*None"):
        opt.step(lambda: None)


@pytest.mark.parametrize("aggregator", ["mean", "mgda", "upgrad"])
@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs_solves_two_quadratics(aggregator: str, line_search: str | None) -> None:
    x = nn.Parameter(torch.tensor([4.0, -3.0], dtype=torch.float64))
    scales = torch.tensor([1.0, 5.0], dtype=torch.float64)
    opt = MultiTaskOptimizer(LBFGS([x], line_search_fn=line_search, max_iter=10), aggregator)

    def losses() -> list[Tensor]:
        # Both are least at (1, 2).
        centre = torch.tensor([1.0, 2.0], dtype=torch.float64)
        return [(scales * (x - centre).square()).sum(), ((x - centre).square()).sum()]

    first = opt.step(losses)
    assert [l.item() for l in first] == [134.0, 34.0]
    for _ in range(10):
        opt.step(losses)
    torch.testing.assert_close(x.detach(), torch.tensor([1.0, 2.0]).double(), rtol=0, atol=1e-6)


class _SharpnessAware(SGD):
    """Foret et al.: the gradient at `θ + ρ g/|g|` moves θ."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        assert closure is not None
        with torch.enable_grad():
            found = closure()
        moved = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        homes = [p.clone() for p in moved]
        norm = torch.stack([p.grad.norm() for p in moved]).norm()
        for p in moved:
            p.add_(p.grad / norm, alpha=0.1)
        with torch.enable_grad():
            closure()
        for p, home in zip(moved, homes, strict=True):
            p.copy_(home)
        super().step()
        return found


@pytest.mark.parametrize("aggregator", ["mean", "upgrad", "cagrad"])
def test_sharpness_aware_minimization(aggregator: str) -> None:
    model = make("Plain")
    batch = model.batch()
    opt = MultiTaskOptimizer(_SharpnessAware(model.parameters(), lr=0.1), aggregator)
    twin = copy.deepcopy(model)
    for _ in range(3):
        start = copy.deepcopy(twin)
        for scale in (0.1, -0.1):
            rows, values = task_gradients(twin, lambda m: m.losses(batch))
            d = expected(copy.deepcopy(opt.aggregator), rows, values, None)
            norm = torch.cat([g.flatten() for g in d.values()]).norm() if scale > 0 else 1.0
            with torch.no_grad():
                for name, g in d.items():
                    twin.get_parameter(name).copy_(start.get_parameter(name) + scale * g / norm)
        opt.step(lambda: model.losses(batch))
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
