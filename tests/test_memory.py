"""What a step holds beyond the passes that it cannot do without: the Jacobian, and little else."""

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from gradbal import MultiTaskOptimizer
from tests.memory import peak


class _Wide(nn.Module):
    def __init__(self, n_tasks: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(400, 600), nn.Tanh(), nn.Linear(600, 300))
        self.heads = nn.ModuleList(nn.Linear(300, 1) for _ in range(n_tasks))

    def losses(self) -> list[Tensor]:
        z = self.trunk(torch.ones(8, 400)).tanh()
        return [(head(z) - i).square().mean() for i, head in enumerate(self.heads)]


def _beyond_bare_passes(n_tasks: int, aggregator: str, **keywords: object) -> float:
    """Peak bytes of a first step beyond those of T passes, over the T·P·4 of float32 rows."""
    model = _Wide(n_tasks)
    parameters = list(model.parameters())

    def bare() -> None:
        losses = model.losses()
        for i, loss in enumerate(losses, 1):
            torch.autograd.grad(loss, parameters, retain_graph=i < n_tasks, allow_unused=True)

    opt = MultiTaskOptimizer(SGD(parameters, lr=0.1), aggregator, jacobian="loop", **keywords)
    n_shared = sum(p.numel() for p in model.trunk.parameters())
    floor = peak(bare)
    return (peak(lambda: opt.backward(model.losses())) - floor) / (n_tasks * n_shared * 4)


@pytest.mark.parametrize("n_tasks", [3, 11, 40])
@pytest.mark.parametrize("aggregator", ["upgrad", "mgda"])
def test_a_step_holds_the_jacobian_and_a_tenth_more(aggregator: str, n_tasks: int) -> None:
    beyond = _beyond_bare_passes(n_tasks, aggregator)
    # Less would mean that the count misses something.
    assert 0.99 <= beyond <= 1.1


@pytest.mark.parametrize("n_tasks", [3, 11, 40])
def test_rows_in_half_precision_take_half(n_tasks: int) -> None:
    beyond = _beyond_bare_passes(n_tasks, "upgrad", jacobian_dtype=torch.bfloat16)
    # A sixteenth of them is converted at a time.
    assert 0.49 <= beyond <= 0.6


def test_gradients_have_memory_of_their_own() -> None:
    model = _Wide(3)
    opt = MultiTaskOptimizer(SGD(model.parameters(), lr=0.1), "upgrad")
    opt.backward(model.losses())
    before = [p.grad for p in model.parameters()]
    values = [g.clone() for g in before]
    opt.zero_grad()
    opt.backward([2 * l for l in model.losses()])
    for g, value, p in zip(before, values, model.parameters(), strict=True):
        assert torch.equal(g, value)
        torch.testing.assert_close(p.grad, 2 * g)
        assert p.grad.untyped_storage().nbytes() == p.numel() * p.itemsize
