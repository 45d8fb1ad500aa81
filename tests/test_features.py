"""`backward(losses, features=z)`: the Jacobian at a representation, then one pass on."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD

import gradbal
from gradbal import MultiTaskOptimizer
from tests.states import assert_same, snapshot

GRAMIAN = [n for n in gradbal.list_aggregators() if gradbal.info(n).kind == "gramian"]
AT_FEATURES = [n for n in GRAMIAN if gradbal.info(n).promises.min_tasks <= 2]


class Model(nn.Module):
    """Trunk, representation, a layer that all heads share, heads; two losses."""

    def __init__(self, skip: bool = False) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first, self.trunk = nn.Linear(3, 4), nn.Linear(4, 6)
        self.neck = nn.Linear(6, 5)
        self.a, self.b = nn.Linear(5, 2), nn.Linear(5, 1)
        self.skip = skip
        self.passes = 0
        self.double()

    def batch(self) -> Tensor:
        return torch.randn(7, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        first = torch.tanh(self.first(x))
        # Before the activation: the graph of z is walked when the trunk is.
        z = _Counted.apply(self.trunk(first), self).tanh()
        y = torch.tanh(self.neck(z))
        if self.skip:
            y = y + first[:, :1]
        return z, [(self.a(y) - 1).square().mean(), (self.b(y) + 3).abs().mean()]


class _Counted(torch.autograd.Function):
    """The identity; counts backward passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, model: Model) -> Tensor:
        ctx.model = model
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.model.passes += 1
        return grad, None


def _optimizer(model: nn.Module, aggregator: str, **options: Any) -> MultiTaskOptimizer:
    if "generator" in gradbal.info(aggregator).hyperparameters:
        options["generator"] = torch.Generator().manual_seed(4)
    return MultiTaskOptimizer(SGD(model.parameters(), lr=0.1), aggregator, **options)


def _expected(
    model: Model, aggregator: gradbal.GramianAggregator, heads: str | None
) -> dict[str, Tensor]:
    """By plain autograd: Σ w_i ∇ℓ_i with w from the rows ∂ℓ_i/∂z, and the heads by their rule."""
    twin = copy.deepcopy(model)
    z, losses = twin(twin.batch())
    rows = [torch.autograd.grad(l, z, retain_graph=True)[0].flatten() for l in losses]
    g = torch.stack(rows) @ torch.stack(rows).T
    values = torch.stack([l.detach() for l in losses])
    w = aggregator.weights(g, values)
    factors = torch.ones(2, dtype=torch.float64)
    if (heads or aggregator.promises.heads) == "weighted":
        factors = aggregator.head_weights(w, g)
    named = dict(twin.named_parameters())
    grads = [
        torch.autograd.grad(l, list(named.values()), retain_graph=True, allow_unused=True)
        for l in losses
    ]
    result = {}
    for k, name in enumerate(named):
        own = [(i, row[k]) for i, row in enumerate(grads) if row[k] is not None]
        f = w if len(own) > 1 else factors
        result[name] = sum(f[i] * part for i, part in own)
    return result


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("heads", [None, "own", "weighted"])
@pytest.mark.parametrize("aggregator", AT_FEATURES)
def test_weights_come_from_the_rows_at_z(aggregator: str, heads: str | None, skip: bool) -> None:
    model = Model(skip)
    opt = _optimizer(model, aggregator, heads=heads)
    for _ in range(2):
        want = _expected(model, copy.deepcopy(opt.aggregator), heads)
        opt.zero_grad()
        z, losses = model(model.batch())
        opt.backward(losses, features=z)
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, want[name], rtol=1e-7, atol=1e-9)
        assert opt.gramian.shape == (2, 2)
        opt.step()


def test_the_trunk_is_walked_once() -> None:
    model = Model()
    opt = _optimizer(model, "mgda_ub")
    z, losses = model(model.batch())
    opt.backward(losses, features=z)
    assert model.passes == 1
    z, losses = model(model.batch())
    _optimizer(model, "mgda").backward(losses)
    assert model.passes == 3


def test_where_z_is_a_bijection_of_the_parameters_ub_is_mgda() -> None:
    # ∂z/∂θ is orthogonal: the rows at z and at θ have the same Gramian.
    theta = nn.Parameter(torch.randn(6, dtype=torch.float64))
    q = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    c = torch.randn(3, 6, dtype=torch.float64)
    plain = MultiTaskOptimizer(SGD([theta], lr=0.1), "mgda")
    plain.backward([(q @ theta - x).square().sum() for x in c])
    wanted, weights = theta.grad.clone(), plain.weights
    theta.grad = None
    opt = MultiTaskOptimizer(SGD([theta], lr=0.1), "mgda_ub")
    z = q @ theta
    opt.backward([(z - x).square().sum() for x in c], features=z)
    torch.testing.assert_close(opt.weights, weights)
    torch.testing.assert_close(theta.grad, wanted)


def test_rows_are_flattened_over_the_batch_not_summed() -> None:
    # Per sample the two losses pull apart; summed over the batch one of them vanishes.
    theta = nn.Parameter(torch.ones(1, dtype=torch.float64))
    x = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    z = x * theta
    opt = MultiTaskOptimizer(SGD([theta], lr=0.1), "mgda_ub")
    opt.backward([z.sum(), (2 * z[0] - z[1]).sum()], features=z)
    torch.testing.assert_close(opt.gramian, torch.tensor([[2.0, 1.0], [1.0, 5.0]]).double())
    torch.testing.assert_close(opt.weights, torch.tensor([0.8, 0.2]).double())


@pytest.mark.parametrize("aggregator", ["mgda_ub", "nash_mtl"])
def test_a_loss_scale_changes_nothing(aggregator: str) -> None:
    model = Model().float()
    twin = copy.deepcopy(model)
    scaler = GradScaler("cpu", init_scale=1024.0)
    opt, plain = _optimizer(model, aggregator), _optimizer(twin, aggregator)
    for _ in range(2):
        opt.zero_grad()
        z, losses = model(model.batch().float())
        opt.backward(losses, features=z, grad_scaler=scaler)
        scaler.step(opt)
        scaler.update()
        plain.zero_grad()
        z, losses = twin(twin.batch().float())
        plain.backward(losses, features=z)
        plain.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_an_overflow_is_left_to_the_scaler() -> None:
    model = Model().float()
    opt = _optimizer(model, "mgda_ub")
    scaler = GradScaler("cpu", init_scale=2.0**127)
    before = snapshot(model, opt)
    z, losses = model(model.batch().float() * 1e3)
    opt.backward([1e3 * l for l in losses], features=z, grad_scaler=scaler)
    scaler.step(opt)
    scaler.update()
    assert scaler.get_scale() == 2.0**126
    opt.zero_grad()
    assert_same(snapshot(model, opt)["parameters"], before["parameters"])


@pytest.mark.parametrize("policy", ["raise", "skip", "drop"])
def test_a_gradient_that_is_not_finite(policy: str) -> None:
    model = Model()
    opt = _optimizer(model, "mgda_ub", nonfinite=policy)
    z, losses = model(model.batch())
    losses[1] = losses[1] + (z * 0).square().sum().sqrt()
    if policy == "raise":
        with pytest.raises(gradbal.NonFiniteError, match="task 1"):
            opt.backward(losses, features=z)
    else:
        opt.backward(losses, features=z)
    if policy == "drop":
        assert opt.weights.tolist() == [1.0, 0.0]
        assert model.b.weight.grad is None
        assert bool(model.first.weight.grad.isfinite().all())
    else:
        assert all(p.grad is None for p in model.parameters())


def test_weights_are_reused_between_refreshes() -> None:
    model = Model()
    opt = _optimizer(model, "mgda_ub", update_every=2)
    z, losses = model(model.batch())
    opt.backward(losses, features=z)
    w = opt.weights
    opt.zero_grad()
    z, losses = model(2 * model.batch())
    want = torch.autograd.grad(
        w[0] * losses[0] + w[1] * losses[1], list(model.parameters()), retain_graph=True
    )
    opt.backward(losses, features=z)
    for p, g in zip(model.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, g)


def test_a_representation_that_is_one_of_several_outputs() -> None:
    # The other half reaches the losses past z; its path into the trunk must not be lost.
    torch.manual_seed(0)
    trunk, a, b = nn.Linear(3, 4).double(), nn.Linear(2, 1).double(), nn.Linear(2, 1).double()
    parameters = [*trunk.parameters(), *a.parameters(), *b.parameters()]
    x = torch.randn(5, 3, dtype=torch.float64)

    def losses() -> tuple[Tensor, list[Tensor]]:
        z, other = trunk(x).chunk(2, 1)
        return z, [a(z + other).square().mean(), (b(z) - 1).square().mean()]

    opt = MultiTaskOptimizer(SGD(parameters, lr=0.1), "mgda_ub")
    z, found = losses()
    opt.backward(found, features=z)
    _, again = losses()
    want = torch.autograd.grad(
        sum(w * l for w, l in zip(opt.weights, again, strict=True)), [*trunk.parameters()]
    )
    for p, g in zip(trunk.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, g)


def test_nothing_outside_the_optimizer_gets_a_gradient() -> None:
    model = Model()
    x = model.batch().requires_grad_()
    inside = [p for n, p in model.named_parameters() if n not in ("first.bias", "a.weight")]
    opt = MultiTaskOptimizer(SGD(inside, lr=0.1), "mgda_ub")
    z, losses = model(x)
    opt.backward(losses, features=z)
    assert x.grad is None
    assert model.first.bias.grad is None
    assert model.a.weight.grad is None
    assert model.first.weight.grad is not None


@pytest.mark.parametrize("aggregator", ["mgda_ub", "aligned_mtl_ub"])
def test_a_method_of_representations_names_what_is_missing(aggregator: str) -> None:
    model = Model()
    opt = _optimizer(model, aggregator)
    before = snapshot(model, opt)
    with pytest.raises(ValueError, match=rf"'{aggregator}'.*features=z"):
        opt.backward(model(model.batch())[1])
    assert_same(snapshot(model, opt), before)


def test_features_that_cannot_be_used() -> None:
    model = Model()
    opt = _optimizer(model, "mgda")
    z, losses = model(model.batch())
    before = snapshot(model, opt)
    with pytest.raises(TypeError, match=r"`features` must be a tensor, found list"):
        opt.backward(losses, features=[z])
    with pytest.raises(ValueError, match=r"`features` must have a graph"):
        opt.backward(losses, features=z.detach())
    with pytest.raises(ValueError, match=r"computed from parameters that the optimizer trains"):
        opt.backward(losses, features=z.detach().requires_grad_())
    with pytest.raises(ValueError, match=r"losses must be computed from `features`"):
        opt.backward(losses, features=model(model.batch())[0])
    with pytest.raises(ValueError, match=r"accumulate=True"):
        opt.backward(losses, features=z, accumulate=True)
    for scalar in ("uw", "mean"):
        with pytest.raises(ValueError, match=rf"'{scalar}' takes no `features`"):
            _optimizer(model, scalar).backward(losses, features=z)
    assert_same(snapshot(model, opt), before)
    opt.backward(losses, features=z)
