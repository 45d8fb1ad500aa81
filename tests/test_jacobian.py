"""The Jacobian routine: Gramian, combination, what losses reach, and the buffer."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.optim import SGD

import gradbal
from gradbal import MultiTaskOptimizer
from gradbal.jacobian import (
    BLOCK,
    CHUNK,
    SMALL,
    Rows,
    combine,
    gramian,
    reached_parameters,
    wants_exact,
)
from tests.zoo import METHODS, make

GRAMIAN = [n for n in METHODS if gradbal.info(n).kind == "gramian"]
WIDTHS = [1, 7, BLOCK - 1, BLOCK, BLOCK + 1, SMALL // 3, SMALL // 3 + 1, 9 * BLOCK + 13]
# The contract: cosines are right to 1e-6 whatever the precision.
TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 1e-6,
    torch.bfloat16: 1e-6,
    torch.float16: 1e-6,
}


def _matrix(n_tasks: int, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Rows of different norms, with cosines near one."""
    common = torch.randn(width, dtype=torch.float64)
    rows = common + 0.1 * torch.randn(n_tasks, width, dtype=torch.float64)
    return (rows * torch.logspace(-2, 0, n_tasks, dtype=torch.float64)[:, None]).to(dtype)


def _cosine_error(found: Tensor, jacobian: Tensor) -> float:
    assert found.dtype == torch.float64
    want = jacobian.double() @ jacobian.double().T
    return float((_cosines(found) - _cosines(want)).abs().max())


def _cosines(matrix: Tensor) -> Tensor:
    norms = matrix.diagonal().sqrt()
    return matrix / norms / norms[:, None]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_gramian_is_that_of_float64(width: int, dtype: torch.dtype) -> None:
    j = _matrix(3, width, dtype)
    assert _cosine_error(gramian(j), j) <= TOLERANCE[dtype]
    assert _cosine_error(gramian(j, exact=True), j) <= 1e-13


def test_a_device_without_autocast() -> None:
    j = torch.ones(2, 5, device="meta")
    assert combine(gramian(j).sum(1), j).shape == (5,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n_tasks", "width"), [(2, CHUNK + 1), (SMALL // 100, 101)])
def test_less_than_a_block_is_left(n_tasks: int, width: int, dtype: torch.dtype) -> None:
    j = torch.ones(n_tasks, width, dtype=dtype)
    assert bool((gramian(j)[:2] == width).all())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("width", [100, SMALL // 3 + 1, 1 << 18])
@pytest.mark.parametrize("kind", ["near", "steps"])
def test_gramian_is_as_accurate_as_it_says(kind: str, width: int, dtype: torch.dtype) -> None:
    if kind == "near":
        j = _matrix(3, width, dtype)
    else:
        # Equal products, whose sums in float32 drift one way.
        levels = torch.tensor([[1.0, 0.3], [0.7, 0.21], [1.9, 0.57]], dtype=torch.float64)
        j = levels.repeat_interleave(width // 2, 1).to(dtype)
    assert _cosine_error(gramian(j), j) <= TOLERANCE[dtype]


@pytest.mark.parametrize("width", [(1 << 18) + 3, (3 << 16) * 2 + 255])
def test_gramian_of_many_rows_is_summed_in_parts(width: int) -> None:
    jacobian = _matrix(40, width, torch.float32)
    assert _cosine_error(gramian(jacobian), jacobian) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("aggregator", GRAMIAN)
@pytest.mark.parametrize("n_tasks", [3, 8])
def test_equal_directions_in_float32(aggregator: str, n_tasks: int) -> None:
    """Rows c_i g: a Gramian of rank one, which rounding must not make a full one."""
    g = torch.ones(SMALL // n_tasks + 100)
    g[:1000] = 0.37
    j = torch.linspace(0.3, 1.9, n_tasks)[:, None] * g
    keywords = {"generator": torch.Generator().manual_seed(1)} if aggregator == "pcgrad" else {}
    model = nn.Module()
    model.theta = nn.Parameter(torch.zeros_like(g))
    opt = MultiTaskOptimizer(SGD(model.parameters(), lr=1.0), aggregator, **keywords)
    opt.backward([(model.theta * row).sum() + 1 for row in j])
    want = gradbal.create(aggregator, **keywords).direction(j.double(), torch.ones(n_tasks))
    error = (model.theta.grad.double() - want).norm() / want.norm()
    assert float(error) < 1e-4


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_gramian_of_a_view(layout: str, dtype: torch.dtype) -> None:
    width = 8 * BLOCK + 5
    if layout == "transposed":
        j = _matrix(3, width, dtype).T.contiguous().T
    elif layout == "strided":
        j = _matrix(3, 2 * width, dtype)[:, ::2]
    else:
        j = _matrix(1, width, dtype).expand(3, width)
    assert not j.is_contiguous()
    assert _cosine_error(gramian(j), j) <= TOLERANCE[dtype]


def test_gramian_is_better_than_one_float32_product() -> None:
    j = _matrix(4, 1 << 20, torch.float32)
    plain = _cosine_error((j @ j.T).double(), j)
    assert _cosine_error(gramian(j), j) <= min(1e-6, plain)


@pytest.fixture
def _medium_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("_medium_precision")
@pytest.mark.parametrize("width", [100, 9 * BLOCK + 13])
def test_gramian_under_fast_matmul(width: int) -> None:
    # Products of lower precision must not be used, on any machine.
    j = _matrix(3, width, torch.float32)
    assert _cosine_error(gramian(j), j) <= 1e-12
    assert torch.get_float32_matmul_precision() == "medium"


@pytest.mark.parametrize("width", [100, 9 * BLOCK + 13])
def test_products_under_autocast(width: int) -> None:
    j = _matrix(3, width, torch.float32)
    w = torch.tensor([0.2, -0.3, 0.5])
    with torch.autocast("cpu", torch.bfloat16):
        found, direction = gramian(j), combine(w, j)
        assert torch.is_autocast_enabled("cpu")
    assert _cosine_error(found, j) <= 1e-6
    assert direction.dtype == torch.float32
    torch.testing.assert_close(direction, combine(w, j), rtol=0, atol=0)


@pytest.mark.parametrize("exponent", [-20, -12, 12, 20])
@pytest.mark.parametrize("width", [100, 9 * BLOCK + 13])
def test_exact_gramian_of_extreme_rows(width: int, exponent: int) -> None:
    j = _matrix(3, width, torch.float32) * 10.0**exponent
    assert _cosine_error(gramian(j, exact=True), j) <= 1e-12


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("width", [1, 100, SMALL // 3 + 1, (1 << 18) + 3])
def test_combine(width: int, dtype: torch.dtype) -> None:
    j = _matrix(3, width, dtype)
    w = torch.tensor([0.2, -0.3, 0.5], dtype=torch.float64)
    d = combine(w, j)
    assert d.dtype == dtype
    assert d.shape == (width,)
    want = w @ j.double()
    torch.testing.assert_close(
        d.double(),
        want,
        rtol=2 * torch.finfo(dtype).eps,
        atol=1e-6 if dtype.itemsize < 8 else 1e-14,
    )


def test_inputs_are_left_alone_and_no_graph_is_made() -> None:
    j = _matrix(3, 50).requires_grad_()
    w = torch.ones(3, dtype=torch.float64, requires_grad=True)
    assert not gramian(j).requires_grad
    assert not combine(w, j).requires_grad


class _Wide(nn.Module):
    """Enough parameters for the products by blocks; losses of any scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(width))
        self.register_buffer("targets", _matrix(3, width, torch.float32))
        self.targets[1] *= -1

    def losses(self, scales: list[float]) -> list[Tensor]:
        return [
            0.5 * (self.theta - t).double().square().mean() * s
            for t, s in zip(self.targets, scales, strict=True)
        ]


@pytest.mark.parametrize("width", [50, 9 * BLOCK])
@pytest.mark.parametrize(
    "scales",
    [[1e-20] * 3, [1e20] * 3, [1e-20, 1.0, 1e5], [1e10, 1e-10, 1.0], [1e-20, 1.0, 1e20]],
    ids=str,
)
@pytest.mark.parametrize("aggregator", ["upgrad", "mgda", "nash_mtl", "imtl_g", "cagrad"])
def test_extreme_scales_through_the_optimizer(
    aggregator: str, scales: list[float], width: int
) -> None:
    model = _Wide(width)
    opt = MultiTaskOptimizer(SGD(model.parameters(), lr=1.0), aggregator)
    opt.backward(model.losses(scales))
    losses = model.losses(scales)
    rows = [torch.autograd.grad(l, model.theta, retain_graph=True)[0].double() for l in losses]
    method = gradbal.create(aggregator)
    want = method.direction(torch.stack(rows), torch.stack(losses).detach())
    error = (model.theta.grad.double() - want).abs().max() / want.abs().max()
    # float32 Gramians leave the weights of nearly stationary points less exact.
    assert float(error) < (1e-5 if width == 50 else 1e-3)


def _reach(losses: list[Tensor], parameters: list[Tensor]) -> list[tuple[bool, ...]]:
    return reached_parameters(losses, parameters)


@pytest.mark.parametrize(
    "name", ["Plain", "PartlyShared", "TiedWeights", "Unused", "Checkpointed", "LSTM", "HeadOnly"]
)
def test_reached_parameters_are_those_with_a_gradient(name: str) -> None:
    model = make(name)
    parameters = [p for p in model.parameters() if p.requires_grad]
    losses = model.losses(model.batch())
    found = _reach(losses, parameters)
    for l, reach in zip(losses, found, strict=True):
        grads = torch.autograd.grad(l, parameters, retain_graph=True, allow_unused=True)
        assert reach == tuple(g is not None for g in grads)


def test_reached_parameters_of_leaves_and_edges() -> None:
    x = torch.ones((), requires_grad=True)
    y = torch.ones((), requires_grad=True)
    edge = get_gradient_edge(x * 2)
    assert reached_parameters([x, edge, y * x], [x, y]) == [
        (True, False),
        (True, False),
        (True, True),
    ]


def test_a_deep_graph_is_walked_without_recursion() -> None:
    x = torch.ones((), requires_grad=True)
    y = x
    for _ in range(5000):
        y = y * 1.0
    assert _reach([y], [x]) == [(True,)]


@pytest.mark.parametrize("aggregator", ["upgrad", "nash_mtl"])
def test_the_buffer_is_used_again(aggregator: str) -> None:
    model = make("Plain")
    rows = Rows()
    parameters = list(model.parameters())
    addresses = set()
    for _ in range(3):
        losses = model.losses(model.batch())
        roots = [(l, torch.ones_like(l)) for l in losses]
        rows.take(roots, parameters)
        addresses.add(rows.jacobian.data_ptr())
        grads = [
            torch.autograd.grad(l, model.trunk[0].weight, retain_graph=True)[0]
            for l in model.losses(model.batch())
        ]
        want = torch.stack([g.flatten() for g in grads])
        torch.testing.assert_close(rows.jacobian[:, : want.shape[1]], want)
    assert len(addresses) == 1


@pytest.mark.parametrize("jacobian", ["loop", "vmap", "gramian"])
def test_a_model_that_is_cast_gets_another_buffer(jacobian: str) -> None:
    """One of the old dtype would round its gradients."""
    model = make("Plain").float()
    batch = model.batch()

    def optimizer() -> MultiTaskOptimizer:
        return MultiTaskOptimizer(SGD(model.parameters(), lr=0.1), "upgrad", jacobian=jacobian)

    def take(optimizer: MultiTaskOptimizer) -> list[Tensor]:
        optimizer.zero_grad()
        optimizer.backward(model.losses(batch.to(next(model.parameters()).dtype)))
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    old = optimizer()
    take(old)
    model.double()
    found, expected = take(old), take(optimizer())
    assert {g.dtype for g in found} == {torch.float64}
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0.0)


def test_a_model_is_not_cast_while_gradients_wait() -> None:
    model = make("Plain").float()
    optimizer = MultiTaskOptimizer(SGD(model.parameters(), lr=0.1), "upgrad")
    optimizer.backward(model.losses(model.batch().float()), accumulate=True)
    model.double()
    with pytest.raises(ValueError, match="must stay the same while gradients accumulate"):
        optimizer.backward(model.losses(model.batch().double()))


def test_rows_before_any_gradient() -> None:
    with pytest.raises(RuntimeError, match="no gradients"):
        _ = Rows().jacobian


def test_unreached_parts_of_a_row_are_zero() -> None:
    model = make("PartlyShared")
    rows = Rows()
    parameters = list(model.parameters())
    for _ in range(2):
        losses = model.losses(model.batch())
        rows.take([(l, torch.ones_like(l)) for l in losses], parameters)
        trunk = sum(p.numel() for p in model.trunk.parameters())
        assert bool(rows.jacobian[0, :trunk].any())
        assert not bool(rows.jacobian[0, trunk:].any())
        assert bool(rows.jacobian[1, trunk:].any())


@pytest.mark.parametrize("aggregator", ["upgrad", "mgda"])
def test_a_representation_may_be_in_channels_last(aggregator: str) -> None:
    found = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = make("ChannelsLast").to(memory_format=memory_format)
        z = model.trunk(model.batch().to(memory_format=memory_format))
        assert z.is_contiguous(memory_format=memory_format)
        opt = MultiTaskOptimizer(SGD(model.parameters(), lr=0.1), aggregator)
        opt.backward([(model.a(z) - 1).square().mean(), model.b(z).square().mean()], features=z)
        found.append([p.grad for p in model.parameters()])
    for p, q in zip(*found, strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("n_tasks", [1, 2, 3, 6, 7, 20])
@pytest.mark.parametrize("spread", [1.0, 1e8])
def test_nearly_dependent_rows_want_exact_products(n_tasks, spread):
    rng = np.random.default_rng(0)
    wanted = []
    for _ in range(200):
        # Cosines whose least eigenvalue is from far above to far below the bound of 1e-3.
        mixed = rng.standard_normal((n_tasks, n_tasks)) + 10 ** rng.uniform(-3, 3) * np.ones(
            n_tasks
        )
        c = mixed @ mixed.T + 10 ** rng.uniform(-6, 0) * np.eye(n_tasks)
        n = np.sqrt(np.diagonal(c))
        c = c / n[:, None] / n
        least = np.linalg.eigvalsh(c)[0]
        if abs(least - 1e-3) > 1e-6:
            scale = spread ** rng.uniform(-0.5, 0.5, n_tasks)
            g = torch.from_numpy(scale[:, None] * c * scale)
            wide = torch.empty(n_tasks, SMALL + 1, device="meta")
            assert wants_exact(g, wide) == (least < 1e-3)
            wanted.append(least < 1e-3)
    assert any(wanted) == (n_tasks > 1)
    assert not all(wanted)


def test_rows_out_of_range_want_exact_products_unless_they_are_zero():
    j = torch.randn(3, SMALL)
    assert not wants_exact(gramian(j), j)
    j[1] = 0.0
    assert not wants_exact(gramian(j), j)
    j[1, 0] = 1e-20
    assert wants_exact(gramian(j), j)
