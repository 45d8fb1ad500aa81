"""The cut between heads and shared part: going on from it gives the gradients of the losses."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from gradbal._losses import _EDGES_ARE_ROOTS
from gradbal.jacobian.frontier import Frontier, find_frontier
from gradbal.jacobian.graph import Root
from tests.zoo import ZOO, make, targets

pytestmark = pytest.mark.skipif(
    not _EDGES_ARE_ROOTS, reason="passes that start from edges need torch 2.5"
)


def _roots(losses: Sequence[Tensor | GradientEdge], like: Tensor) -> list[Root]:
    return [(l, torch.tensor(0.5 + i).to(like)) for i, l in enumerate(losses)]


def _check(roots: list[Root], parameters: list[Tensor], tolerance: float = 1e-12) -> Frontier:
    """Every loss's gradients, put together from its own part and the shared one."""
    frontier = find_frontier(roots, parameters)
    assert all(not set(own) & set(frontier.shared) for own in frontier.own)
    stacked, stacked_heads = frontier.cotangents()
    for i, (root, c) in enumerate(roots):
        wanted = torch.autograd.grad(root, parameters, c, retain_graph=True, allow_unused=True)
        entered = frontier.walk(i)
        assert list(entered.cotangents) == frontier.edges[i]
        found = dict(entered.heads)
        if entered.cotangents:
            shared = torch.autograd.grad(
                list(entered.cotangents),
                parameters,
                list(entered.cotangents.values()),
                retain_graph=True,
                allow_unused=True,
            )
            assert not found.keys() & {k for k, g in enumerate(shared) if g is not None}
            found.update((k, g) for k, g in enumerate(shared) if g is not None)
        assert found.keys() == {k for k, g in enumerate(wanted) if g is not None}
        for k, g in found.items():
            torch.testing.assert_close(g, wanted[k], rtol=tolerance, atol=tolerance)
        for edge, rows in stacked.items():
            assert len(rows) == len(roots)
            row = entered.cotangents.get(edge, torch.zeros_like(rows[i]))
            torch.testing.assert_close(rows[i], row, rtol=0, atol=0)
        assert stacked_heads[i].keys() == entered.heads.keys()
    return frontier


@pytest.mark.parametrize("name", ZOO)
def test_every_model_of_the_zoo(name: str) -> None:
    model = make(name)
    losses = model.losses(model.batch())
    parameters = [p for p in model.parameters() if p.requires_grad]
    roots = [(l, torch.tensor(0.5 + i).to(l)) for i, l in enumerate(losses)]
    _check(roots, parameters, max(1e-12, model.tolerance))


def test_a_skip_connection_is_not_counted_twice() -> None:
    # Each loss enters at the top, and behind it at the middle and at the bottom.
    first, second, third = (nn.Linear(4, 4).double() for _ in range(3))
    x = torch.randn(5, 4, dtype=torch.float64)
    z = torch.tanh(first(x))
    y = torch.tanh(second(z))
    u = torch.tanh(third(y) + z)
    heads = [nn.Linear(12, 1).double() for _ in range(3)]
    losses = targets([head(torch.cat([z, y, u], 1)) for head in heads])
    parameters = [p for layer in (first, second, third, *heads) for p in layer.parameters()]
    frontier = _check(_roots(losses, x), parameters)
    assert [len(edges) for edges in frontier.edges] == [3, 3, 3]
    assert frontier.shared == list(range(6))
    assert frontier.own == [[6, 7], [8, 9], [10, 11]]


def test_nested_entries_do_not_compute_the_shared_part() -> None:
    passes = []

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            ctx.set_materialize_grads(False)
            return x * 2.0

        @staticmethod
        def backward(ctx, grad: Tensor | None) -> Tensor | None:
            passes.append(grad is not None)
            return None if grad is None else grad * 2.0

    layer = nn.Linear(4, 4)
    z = layer(torch.randn(5, 4))
    y = Counted.apply(z)
    losses = [(z * y).sum(), (z + y).square().sum()]
    frontier = find_frontier(_roots(losses, z), list(layer.parameters()))
    frontier.cotangents()
    assert True not in passes


def test_partly_shared_regions_are_entered_at_their_tops() -> None:
    trunk, middle = nn.Linear(4, 4), nn.Linear(4, 4)
    z = trunk(torch.randn(3, 4))
    y = middle(z)
    losses = targets([z * 2.0, y * 3.0, y.sin(), y.exp() + z])
    frontier = _check(_roots(losses, z), [*trunk.parameters(), *middle.parameters()], 1e-5)
    top, bottom = (y.grad_fn, 0), (z.grad_fn, 0)
    places = [{(e.node, e.output_nr) for e in edges} for edges in frontier.edges]
    assert places == [{bottom}, {top}, {top}, {top, bottom}]


@pytest.mark.parametrize("form", ["stack", "vector", "slices", "same"])
def test_losses_that_are_shared_themselves(form: str) -> None:
    model = make("Plain")
    z = torch.tanh(model.trunk(model.batch()))
    parts = torch.cat([head(z) for head in model.heads], 1).square().mean(0)
    one = torch.ones((), dtype=torch.float64)
    roots: list[Root]
    if form == "stack":
        node = torch.stack([p.exp() for p in parts]).grad_fn
        roots = [(GradientEdge(n, k), one) for n, k in node.next_functions]
    elif form == "vector":
        roots = [(parts, row) for row in torch.eye(3, dtype=torch.float64)]
    elif form == "slices":
        roots = [(p, one) for p in parts]
    else:
        roots = [(parts[0], one)] * 2 + [(parts[0] * parts[1], one)]
    frontier = _check(roots, list(model.parameters()))
    assert all(len(edges) == 1 for edges in frontier.edges) or form == "same"


def test_a_parameter_used_by_a_head_and_behind_it() -> None:
    weight = nn.Parameter(torch.randn(4, 4, dtype=torch.float64))
    x = torch.randn(3, 4, dtype=torch.float64)
    z = torch.tanh(x @ weight)
    losses = targets([z @ weight, (z @ weight.T).exp(), z])
    frontier = _check(_roots(losses, x), [weight])
    assert [len(edges) for edges in frontier.edges] == [2, 2, 1]


def test_one_loss_alone_shares_nothing() -> None:
    layer = nn.Linear(4, 1)
    frontier = _check(_roots([layer(torch.ones(2, 4)).sum()], layer.weight), [*layer.parameters()])
    assert frontier.shared == []
    assert frontier.own == [[0, 1]]


def test_hooks_run_as_they_would() -> None:
    # One that doubles, at the frontier, in a head and in the shared part: each counts once.
    trunk = nn.Linear(4, 4).double()
    heads = [nn.Linear(4, 1).double() for _ in range(2)]
    inner = torch.tanh(trunk(torch.randn(3, 4, dtype=torch.float64)))
    z = inner * 2.0
    outputs = [head(z) for head in heads]
    for t in (inner, z, outputs[0]):
        t.register_hook(lambda g: g * 2.0)
    z.grad_fn.register_prehook(lambda gs: (gs[0] * 3.0,))
    outputs[1].grad_fn.register_hook(lambda sent, _: tuple(s * 5.0 for s in sent))
    parameters = [p for layer in (trunk, *heads) for p in layer.parameters()]
    _check(_roots(targets(outputs), z), parameters)


def test_the_walk_leaves_no_hooks_behind() -> None:
    layer = nn.Linear(4, 1)
    z = layer(torch.ones(2, 4))
    y = z * 2.0
    loss = (y * z).sum()
    # One entry lies behind the other: hooks that were still there would send nothing on.
    roots = _roots([loss, (y + z).sum()], z)
    wanted = torch.autograd.grad(loss, [layer.weight], retain_graph=True)

    def fail(_: Tensor) -> None:
        raise KeyError("from a hook")

    handle = z.register_hook(fail)
    frontier = find_frontier(roots, list(layer.parameters()))
    with pytest.raises(KeyError, match="from a hook"):
        frontier.walk(0)
    handle.remove()
    assert torch.equal(torch.autograd.grad(loss, [layer.weight])[0], wanted[0])


def _random_graph(seed: int) -> tuple[list[Root], list[Tensor]]:
    """Losses on top of operators that take any of the values before them."""
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    parameters = [
        torch.randn(3, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(4)
    ]
    values: list[Tensor] = list(parameters)
    for _ in range(draw.randint(1, 14)):
        a, b = draw.choice(values), draw.choice(values)
        kind = draw.randrange(5)
        if kind == 0:
            values.append(a * b)
        elif kind == 1:
            values.append(torch.tanh(a))
        elif kind == 2:
            # Two outputs of one node.
            values.extend(torch.stack([a, a + b]).unbind())
        elif kind == 3:
            values.append((a * 1.0).mul_(0.5) + b.float().double())
        else:
            copy = a * 1.0
            copy[1:] = b[:2]
            values.append(copy)
    chosen = [draw.choice(values) for _ in range(draw.randint(1, 4))]
    one = torch.ones(3, dtype=torch.float64)
    return [(draw.choice([v, v.sin(), v * draw.choice(values)]), one) for v in chosen], parameters


@pytest.mark.parametrize("start", range(0, 300, 50))
def test_random_graphs(start: int) -> None:
    n_nested = 0
    for seed in range(start, start + 50):
        frontier = _check(*_random_graph(seed), 1e-6)
        n_nested += any(frontier._is_nested(i) for i in range(len(frontier.edges)))
    assert n_nested, "no graph has an entry behind another"
