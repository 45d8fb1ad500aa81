"""The engine that takes several losses through their shared part at once, and its fallback."""

from __future__ import annotations

import copy
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import gradbal
from benchmarks.accelerator import Accelerator
from gradbal._losses import _EDGES_ARE_ROOTS
from gradbal.jacobian import Rows
from gradbal.jacobian.vmap import FAILURES, VMap
from tests.test_frontier import random_graph
from tests.zoo import Plain, make, optimizer, targets

Losses = Callable[[], list[Tensor]]

needs_edges = pytest.mark.skipif(
    not _EDGES_ARE_ROOTS, reason="before torch 2.5 all graphs go through the loop"
)


@pytest.fixture(autouse=True)
def _nothing_is_said() -> Iterator[None]:
    """Not even once: filters that make warnings errors would be silenced by the fallback."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        yield
    assert [str(w.message) for w in said] == []


def _check(
    losses: Losses, parameters: list[Tensor], engine: VMap, tolerance: float = 1e-10
) -> None:
    """Checks the engine's Jacobian against plain passes over another graph of the same kind."""
    torch.manual_seed(1)
    wanted = []
    for l in losses():
        grads = torch.autograd.grad(l, parameters, retain_graph=True)
        wanted.append(torch.cat([_flat(p, g) for p, g in zip(parameters, grads, strict=True)]))
    torch.manual_seed(1)
    found = losses()
    rows = Rows(engine=engine)
    rows.take([(l, torch.ones_like(l)) for l in found], parameters)
    jacobian, expected = rows.jacobian.clone(), torch.stack(wanted)
    scale = float(expected.abs().max())
    torch.testing.assert_close(jacobian, expected, rtol=0, atol=tolerance * scale)


def _flat(parameter: Tensor, grad: Tensor) -> Tensor:
    """In the order of the parameter's memory."""
    return (grad if parameter.is_contiguous() else grad.permute(0, 2, 3, 1)).flatten()


def _heads(z: Tensor, n_tasks: int = 3) -> list[Tensor]:
    """Losses with nothing but z in common, each with another cotangent."""
    generator = torch.Generator().manual_seed(7)
    draws = [torch.randn(z.shape, generator=generator, dtype=torch.float64) for _ in range(n_tasks)]
    return [(z * draw.to(z)).sum() + z.square().mean() * i for i, draw in enumerate(draws)]


class _Function(torch.autograd.Function):
    """The identity, with a backward of one's choice."""

    @staticmethod
    def forward(ctx, x: Tensor, backward: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.chosen = backward
        return x * 1.0

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.chosen(grad), None


def _written_into(grad: Tensor) -> Tensor:
    result = torch.zeros(grad.shape, dtype=grad.dtype)
    result[:, 1:] = grad[:, 1:]
    return result


AWKWARD: dict[str, Callable[[Tensor], Tensor]] = {
    "item": lambda g: g * g.norm().item(),
    "branch": lambda g: g if g.sum() > 0 else g * 2.0,
    "numpy": lambda g: torch.from_numpy(g.numpy() * 2.0),
    "data": lambda g: g.data * 2.0,
    "list": lambda g: torch.tensor(g.tolist(), dtype=g.dtype),
    "in place of a tensor without batch": _written_into,
    "as many as there are": lambda g: g * g[g > 0].sum(),
    "random": lambda g: g + torch.randn_like(g) * 0.0,
    "out": lambda g: torch.mul(g, 2.0, out=torch.empty_like(g)),
}


@needs_edges
@pytest.mark.parametrize("name", AWKWARD)
def test_functions_that_cannot_be_batched(name: str) -> None:
    layer = nn.Linear(4, 5).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    tries = []

    def backward(grad: Tensor) -> Tensor:
        tries.append(name)
        return AWKWARD[name](grad)

    def losses() -> list[Tensor]:
        return _heads(_Function.apply(layer(x), backward))

    engine = VMap()
    for step in range(3):
        tries.clear()
        _check(losses, list(layer.parameters()), engine)
        assert engine.name == "loop"
        assert engine.fallback
        # Three plain passes to compare with, three of the loop, and one that fails.
        assert len(tries) == (7 if step == 0 else 6)


@needs_edges
def test_functions_and_hooks_that_can_be() -> None:
    layer = nn.Linear(4, 5).double()
    x = torch.randn(6, 4, dtype=torch.float64)

    def losses() -> list[Tensor]:
        z = _Function.apply(layer(x), lambda g: g * (g >= g.mean()))
        z.register_hook(lambda g: g / g.norm().clamp(min=1.0))
        y = torch.tanh(z)
        y.register_hook(lambda g: g * 2.0)
        return _heads(y)

    engine = VMap()
    for _ in range(2):
        _check(losses, list(layer.parameters()), engine)
        assert engine.fallback is None


@needs_edges
def test_a_hook_that_comes_later() -> None:
    model = make("Plain")
    opt = optimizer(model, "upgrad", jacobian="vmap")
    for step in range(3):
        z = model.trunk(model.batch())
        if step == 2:
            z.register_hook(lambda g: g * g.norm().item())
        losses = targets([head(z) for head in model.heads])
        opt.zero_grad()
        opt.backward(losses, retain_graph=step == 2)
        assert opt.diagnostics()["engine"] == ("loop" if step == 2 else "vmap")
    # A graph that is freed as it is walked is gone.
    other = optimizer(model, "upgrad", jacobian="vmap")
    other.backward(model.losses(model.batch()))
    z = model.trunk(model.batch())
    z.register_hook(lambda g: g * g.norm().item())
    before = {n: p.grad.clone() for n, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match=r'must work.*item.*use jacobian="loop"'):
        other.backward(targets([head(z) for head in model.heads]))
    assert all(torch.equal(p.grad, before[n]) for n, p in model.named_parameters())
    other.backward(model.losses(model.batch()))
    assert other.diagnostics()["engine"] == "loop"


@needs_edges
def test_the_graph_is_freed_once_it_is_known_to_work() -> None:
    model = make("Plain")
    opt = optimizer(model, "upgrad", jacobian="vmap")
    for _ in range(2):
        losses = model.losses(model.batch())
        opt.backward(losses)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        losses[0].backward()
    opt.backward(losses := model.losses(model.batch()), retain_graph=True)
    opt.backward(losses)


@needs_edges
def test_another_graph_is_another_try_but_not_forever() -> None:
    layer = nn.Linear(4, 5).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    parameters, engine = list(layer.parameters()), VMap()
    tries = []

    def depth(n: int, backward: Callable[[Tensor], Tensor]) -> Losses:
        def losses() -> list[Tensor]:
            z = layer(x)
            for _ in range(n):
                z = torch.tanh(z)
            return _heads(_Function.apply(z, backward))

        return losses

    def broken(grad: Tensor) -> Tensor:
        tries.append(grad)
        return grad * grad.norm().item()

    _check(lambda: _heads(layer(x)), parameters, engine)
    assert engine.fallback is None
    for n in range(FAILURES + 3):
        tries.clear()
        _check(depth(n, broken), parameters, engine)
        assert len(tries) == (7 if n < FAILURES else 6)
        assert engine.name == "loop"
    _check(lambda: _heads(layer(x)), parameters, engine)
    assert engine.fallback is None


def _conv(channels_last: bool) -> tuple[nn.Module, Tensor]:
    net = nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.ReLU(inplace=True), nn.Conv2d(6, 4, 2))
    x = torch.randn(2, 3, 7, 7)
    if channels_last:
        return net.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    return net, x


class _Operator(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(8, 8), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer(x))


class _First(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)[0]


_PLACES = torch.tensor([[3, 1], [0, 0], [7, 2], [5, 5]])
_COLUMNS = torch.arange(8).roll(3).expand(4, 3, 8)
_SEQUENCE = torch.linspace(-1.0, 1.0, 96).sin().view(4, 3, 8)

LAYERS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "conv": lambda: _conv(False),
    "conv, channels last": lambda: _conv(True),
    "transposed conv": lambda: (nn.ConvTranspose1d(3, 2, 3), _SEQUENCE),
    "batch norm": lambda: (nn.BatchNorm1d(3), _SEQUENCE),
    "batch norm, eval": lambda: (nn.BatchNorm1d(3).eval(), _SEQUENCE),
    "instance norm": lambda: (nn.InstanceNorm1d(3, affine=True), _SEQUENCE),
    "group norm": lambda: (nn.GroupNorm(3, 3), _SEQUENCE),
    "layer norm": lambda: (nn.LayerNorm(8), _SEQUENCE),
    "embedding": lambda: (nn.Embedding(9, 4), _PLACES),
    "embedding bag": lambda: (nn.EmbeddingBag(9, 4), _PLACES),
    "encoder": lambda: (
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True),
        _SEQUENCE,
    ),
    "attention": lambda: (
        _Operator(lambda z: functional.scaled_dot_product_attention(z, z, z, is_causal=True)),
        _SEQUENCE,
    ),
    "lstm": lambda: (_First(nn.LSTM(8, 4, num_layers=2, batch_first=True)), _SEQUENCE),
    "gru": lambda: (_First(nn.GRU(8, 4, batch_first=True)), _SEQUENCE),
    "dropout": lambda: (_Operator(lambda z: functional.dropout(z, 0.4)), _SEQUENCE),
    "max pool": lambda: (_Operator(lambda z: functional.max_pool1d(z, 2)), _SEQUENCE),
    "gather": lambda: (_Operator(lambda z: z.gather(1, (_PLACES % 3)[..., None])), _SEQUENCE),
    "scatter": lambda: (
        _Operator(lambda z: torch.zeros(4, 3, 8).to(z).scatter(2, _COLUMNS, z)),
        _SEQUENCE,
    ),
    "scatter_add": lambda: (
        _Operator(lambda z: torch.zeros(4, 3, 3).to(z).scatter_add(2, _COLUMNS % 3, z)),
        _SEQUENCE,
    ),
    "index": lambda: (_Operator(lambda z: z[_PLACES[:, 0] % 4]), _SEQUENCE),
    "mask": lambda: (_Operator(lambda z: z[_SEQUENCE > 0.0]), _SEQUENCE),
    "index_put": lambda: (
        _Operator(lambda z: torch.zeros_like(z).index_put((_PLACES[:, 0] % 4,), z, True)),
        _SEQUENCE,
    ),
    "assignment": lambda: (_Operator(_assigned), _SEQUENCE),
    "cdist": lambda: (_Operator(lambda z: torch.cdist(z, z.flip(1) * 2.0)), _SEQUENCE),
    "cumulative": lambda: (_Operator(lambda z: z.cumsum(-1).cummax(1)[0]), _SEQUENCE),
    "norm": lambda: (_Operator(lambda z: functional.normalize(z, dim=1).logsumexp(1)), _SEQUENCE),
    "interpolate": lambda: (
        _Operator(lambda z: functional.interpolate(z, scale_factor=2.0, mode="linear")),
        _SEQUENCE,
    ),
    "unfold": lambda: (_Operator(lambda z: z.unfold(1, 2, 1)), _SEQUENCE),
    "einsum": lambda: (_Operator(lambda z: torch.einsum("bij,bkj->bik", z, z)), _SEQUENCE),
    "inverse": lambda: (
        _Operator(lambda z: torch.linalg.inv(z @ z.mT + torch.eye(3).to(z))),
        _SEQUENCE,
    ),
    "complex": lambda: (_Operator(lambda z: torch.fft.rfft(z).abs()), _SEQUENCE),
    "checkpoint": lambda: (
        _Operator(lambda z: checkpoint(lambda y: y.tanh().exp(), z, use_reentrant=False)),
        _SEQUENCE,
    ),
    "checkpoint with dropout": lambda: (
        _Operator(lambda z: checkpoint(functional.dropout, z, use_reentrant=False)),
        _SEQUENCE,
    ),
}


def _assigned(z: Tensor) -> Tensor:
    y = z * 1.0
    y[:, 0] = y[:, 1] * 3.0
    return y.mul_(2.0)


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_and_operators(name: str, chunk_size: int | None) -> None:
    module, x = LAYERS[name]()
    module = module.double()
    x = x.double() if x.is_floating_point() else x
    engine = VMap(chunk_size)
    for _ in range(2):
        _check(lambda: _heads(module(x)), list(module.parameters()), engine)
    works = _EDGES_ARE_ROOTS and name != "checkpoint with dropout"
    assert engine.name == ("vmap" if works else "loop"), engine.fallback


@pytest.mark.parametrize("norm", ["batch", "layer", "group"])
def test_autocast(norm: str) -> None:
    norms = {"batch": nn.BatchNorm1d(6), "layer": nn.LayerNorm(6), "group": nn.GroupNorm(2, 6)}
    net = nn.Sequential(nn.Linear(8, 6), norms[norm], nn.GELU(), nn.Linear(6, 6))
    x, engine = _SEQUENCE.flatten(0, 1), VMap()

    def losses() -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            z = net(x)
        return _heads(z.float())

    for _ in range(2):
        # Products of bfloat16 matrices are rounded, in another order.
        _check(losses, list(net.parameters()), engine, 1e-2)


@pytest.mark.parametrize("backend", ["aot_eager", "eager"])
def test_compiled_parts(backend: str) -> None:
    net = nn.Sequential(nn.Linear(8, 6), nn.Tanh())
    with warnings.catch_warnings():
        # Of the compiler's own.
        warnings.simplefilter("ignore")
        compiled = torch.compile(net, backend=backend)
        x, engine = _SEQUENCE.flatten(0, 1), VMap()
        for _ in range(2):
            _check(lambda: _heads(compiled(x)), list(net.parameters()), engine, 1e-5)
    assert engine.name == ("loop" if backend == "aot_eager" or not _EDGES_ARE_ROOTS else "vmap")


def test_anomaly_detection() -> None:
    layer, x = nn.Linear(8, 2).double(), _SEQUENCE.double()
    engine = VMap()
    with warnings.catch_warnings(), torch.autograd.set_detect_anomaly(False):
        _check(lambda: _heads(layer(x)), list(layer.parameters()), engine)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        anomaly = torch.autograd.detect_anomaly()
    with anomaly:
        _check(lambda: _heads(layer(x)), list(layer.parameters()), engine)
        assert engine.name == "loop"


class _Held(TorchDispatchMode):
    """The most bytes that the results of operators held at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, tuple | list) else [result]:
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in before:
                n_bytes = t.untyped_storage().nbytes()
                self.now += n_bytes
                self.most = max(self.most, self.now)
                weakref.finalize(t.untyped_storage(), self._freed, n_bytes)
        return result

    def _freed(self, n_bytes: int) -> None:
        self.now -= n_bytes


@needs_edges
def test_chunks_bound_memory() -> None:
    n_tasks, n = 12, 200
    layer = nn.Linear(n, n)
    x = torch.randn(4, n)
    row = 4 * (n * n + n)

    def most(**engine: Any) -> float:
        opt = optimizer(layer, "upgrad", **engine)
        opt.backward(_heads(layer(x), n_tasks))
        losses = _heads(layer(x), n_tasks)
        with _Held() as held:
            opt.backward(losses)
        return held.most / row

    # The buffer is there already; the direction and what comes after it are a few rows.
    loop = most(jacobian="loop")
    found = {c: most(jacobian="vmap", chunk_size=c) for c in (2, 4, n_tasks)}
    assert loop < 4.0
    for c, peak in found.items():
        assert c <= peak < c + loop + 1.0


def test_nothing_is_read_from_an_accelerator() -> None:
    engine = VMap()
    rows = Rows(engine=engine)
    with Accelerator() as device:
        model = device.put(make("Plain"))
        batch = device.put(make("Plain").batch())
        for _ in range(2):
            losses = model.losses(batch)
            one = torch.ones_like(losses[0])
            with device.watched() as seen:
                rows.take([(l, one) for l in losses], list(model.parameters()))
            assert not seen.waits
            assert not seen.up
    assert engine.name == ("vmap" if _EDGES_ARE_ROOTS else "loop"), engine.fallback


def test_chunk_size_is_checked() -> None:
    model = make("Plain")
    for wrong in (0, -1):
        with pytest.raises(ValueError, match=rf"`chunk_size` must be .* found {wrong}"):
            optimizer(model, "upgrad", jacobian="vmap", chunk_size=wrong)
    with pytest.raises(TypeError, match=r"`chunk_size` must be an integer, found True"):
        optimizer(model, "upgrad", jacobian="vmap", chunk_size=True)
    with pytest.raises(ValueError, match=r'is for jacobian="vmap" or "auto", found 2 for \'loop\''):
        optimizer(model, "upgrad", jacobian="loop", chunk_size=2)


def test_copies_and_pickles() -> None:
    model = make("Plain")
    opt = optimizer(model, "upgrad", jacobian="vmap", chunk_size=2)
    opt.backward(model.losses(model.batch()))
    for twin in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert twin._balancer.engine.chunk_size == 2
        assert twin.diagnostics()["tasks"] == [0, 1, 2]


@needs_edges
@pytest.mark.parametrize("sit_out", [{1}, {0, 2}, {0}])
def test_tasks_that_sit_out(sit_out: set[int]) -> None:
    model = _Wide().double()
    parameters = list(model.parameters())
    taken = []
    for engine in (VMap(), None):
        rows = Rows() if engine is None else Rows(engine=engine)
        for absent in (frozenset[int](), frozenset(sit_out)):
            losses = model.losses(model.batch())
            roots = [(l, torch.ones_like(l)) for l in losses]
            rows.take(roots, parameters, sit_out=absent)
            rows.pending = absent == frozenset()
        taken.append(rows)
        assert engine is None or engine.fallback is None
    torch.testing.assert_close(taken[0].jacobian, taken[1].jacobian)
    for found, wanted in zip(taken[0].heads, taken[1].heads, strict=True):
        assert found.keys() == wanted.keys()
        torch.testing.assert_close(found, wanted)


class _Wide(Plain):
    n_tasks = 5

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(5, 1) for _ in range(self.n_tasks))


@needs_edges
def test_the_shared_part_is_walked_once_a_chunk() -> None:
    model = _Wide().double()
    passes: list[Tensor] = []
    for chunk_size, n_passes in ((None, 2), (2, 5), (5, 2), (1, 5)):
        z = model.trunk(model.batch())
        z.register_hook(lambda g: passes.append(g))
        losses = targets([head(z) for head in model.heads])
        rows = Rows(engine=VMap(chunk_size))
        # Where the own parts end and where the shared one begins; once for one that goes alone.
        passes.clear()
        rows.take([(l, torch.ones_like(l)) for l in losses], list(model.parameters()))
        assert len(passes) == n_passes


@needs_edges
def test_a_part_that_not_all_reach_is_not_sent_zeros() -> None:
    # √ has no slope at 0: times zero that is NaN, in the rows of losses that do not reach it.
    layer = nn.Linear(4, 5).double()
    z = layer(torch.randn(6, 4, dtype=torch.float64))
    root = (z - z.detach()).abs().sqrt()
    losses = [root.sum(), (root * 2.0).sum(), *_heads(z)]
    engine = VMap()
    rows = Rows(engine=engine)
    rows.take([(l, torch.ones_like(l)) for l in losses], list(layer.parameters()))
    assert engine.fallback is None
    assert rows.jacobian[:2].isnan().any(1).all()
    assert rows.jacobian[2:].isfinite().all()


@needs_edges
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_random_graphs(chunk_size: int | None) -> None:
    n_batched = 0
    for seed in range(150):
        roots, parameters = random_graph(seed)
        engine = VMap(chunk_size)
        found: list[Any] = [None] * len(roots)
        for block in engine.rows(roots, parameters, True):
            rows = block.rows(len(parameters))
            for i, row in zip(block.tasks, rows, strict=True):
                found[i] = row
        for (root, c), row in zip(roots, found, strict=True):
            wanted = torch.autograd.grad(root, parameters, c, retain_graph=True, allow_unused=True)
            assert [g is None for g in row] == [g is None for g in wanted]
            for g, other in zip(row, wanted, strict=True):
                if other is not None:
                    # Some of the graph is float32.
                    torch.testing.assert_close(g, other, rtol=1e-6, atol=1e-6)
        n_batched += engine.fallback is None
    assert n_batched > 20


@needs_edges
def test_an_explicit_set_of_shared_parameters() -> None:
    batch = make("PartlyShared").batch()
    grads = []
    for engine in ("loop", "vmap"):
        model = make("PartlyShared")
        # A head's parameter among them, a part of the trunk not.
        chosen = [model.trunk.weight, model.middle.bias, model.heads[1].weight]
        opt = optimizer(model, "upgrad", jacobian=engine, shared_params=chosen)
        for _ in range(2):
            opt.backward(model.losses(batch))
        assert opt.diagnostics()["engine"] == engine
        grads.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(grads[1], grads[0])


def test_diagnostics_say_which_engine_it_was() -> None:
    model = make("SingleTask")
    opt = optimizer(model, "upgrad", jacobian="vmap")
    opt.backward(model.losses(model.batch()))
    told = opt.diagnostics()
    assert told["engine"] == "loop"
    assert isinstance(told["fallback"], str)
    assert gradbal.MultiTaskOptimizer(opt.optimizer, "upgrad").diagnostics()["fallback"] is None
