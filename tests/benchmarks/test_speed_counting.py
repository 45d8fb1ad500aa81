"""The counters of memory, operators and waits, on calls of which the numbers are known."""

import pytest
import torch
from torch import nn

from benchmarks.speed.contestants import Contestant
from benchmarks.speed.counting import Allocations, Operators, host_reads
from benchmarks.speed.models import Heads

CPU = torch.device("cpu")
N = 100_000


def tiny(n_tasks=2):
    return Heads(nn.Linear(6, 8), 8, n_tasks, lambda: torch.randn(4, 6))


def test_a_tensor_counts_with_its_bytes_and_a_view_with_none():
    with Allocations(CPU) as memory, memory.watched():
        x = torch.empty(N, dtype=torch.float64)
        x.view(10, -1)[:, 3:].t()
    assert (memory.held, memory.peak) == (0, 8 * N)


def test_the_peak_is_what_lives_at_once_and_not_what_was_ever_allocated():
    with Allocations(CPU) as memory, memory.watched():
        for _ in range(5):
            x = torch.empty(N)
            del x
    assert memory.peak == 4 * N


def test_the_peak_is_taken_within_and_counts_what_was_kept_from_before():
    before = torch.empty(N)
    with Allocations(CPU) as memory:
        passing = torch.empty(7 * N)
        kept = torch.empty(2 * N)
        del passing
        memory.settle()
        with memory.watched():
            result = torch.empty(N)
        torch.empty(9 * N)
    del before, kept, result
    assert (memory.held, memory.peak) == (8 * N, 12 * N)


def test_what_is_freed_within_makes_room():
    with Allocations(CPU) as memory:
        graph = torch.empty(3 * N)
        with memory.watched():
            del graph
            result = torch.empty(2 * N)
    del result
    assert memory.peak == 12 * N


def test_what_an_operator_takes_for_itself_counts_too():
    x = torch.empty(N).random_()
    with Allocations(CPU) as memory, memory.watched():
        y = x.sort().values
    # Values and the indices that nobody asked for.
    assert memory.peak >= 4 * N + 8 * N
    del y


def test_operators_are_counted_without_views():
    x = torch.ones(3, 4, requires_grad=True)
    with Operators() as operators:
        y = (x.t().reshape(2, 6) * 2.0).exp().sum()
    # The transposed tensor is copied for its new shape: clone, and a view that is none by name.
    assert operators.count == 5
    with Operators() as operators:
        torch.autograd.grad(y, x)
    assert operators.count >= 3


@pytest.mark.parametrize(
    ("call", "waits"),
    [
        (lambda features, losses: torch.stack(losses).sum(), 0),
        (lambda features, losses: losses[0].item(), 1),
        (lambda features, losses: [loss.item() for loss in losses], 2),
        (lambda features, losses: torch.stack(losses).tolist(), 1),
        (lambda features, losses: features.detach().cpu().numpy().tolist(), 1),
        (lambda features, losses: features[features > 0], 1),
        (lambda features, losses: features.nonzero(), 1),
        (lambda features, losses: bool(features.any()) and float(losses[1].detach()), 2),
    ],
)
def test_waits_are_counted(call, waits):
    model = tiny()
    made = []

    def make(own):
        made.append(own)
        return Contestant("a call", own, call)

    assert host_reads(make, model, model.example()) == waits
    # The model itself stays where it is.
    assert made[0] is not model
    assert all(p.device == CPU and type(p) is nn.Parameter for p in model.parameters())
