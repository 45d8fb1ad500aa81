"""The layer-by-layer Gramian and what it delivers, against plain float64 gradients."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.autograd.graph import Node
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

from benchmarks.accelerator import Accelerator
from gradbal import MultiTaskOptimizer, NonFiniteError
from gradbal.jacobian import layers, parts
from gradbal.jacobian.layers import find_layers
from gradbal.jacobian.walk import walk
from tests.states import root_at_zero
from tests.zoo import make, optimizer

Losses = Callable[[], list[Tensor]]


@pytest.fixture(params=["chosen", "always"])
def every_part(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether a layer is kept as factors wherever it can be, not only where it saves work."""
    if request.param == "always":
        monkeypatch.setattr(parts, "_pays", lambda *_: True)
    return request.param == "always"


def randn(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(math.prod(shape) + len(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def spread(out: Tensor, n: int = 3) -> list[Tensor]:
    """n losses of an output, no two alike."""
    scales = torch.linspace(0.5, 2.0, out.numel(), dtype=out.dtype).view(out.shape)
    return [(out * scales.roll(i, -1) + i).sin().mean() for i in range(n)]


def width(opt: MultiTaskOptimizer) -> int:
    """Numbers kept for each task."""
    return opt._balancer.engine._buffer.shape[1]


def check(
    losses: Losses, parameters: Sequence[Tensor], heads: str = "weighted", tolerance: float = 1e-9
) -> MultiTaskOptimizer:
    """Gramian and gradients against those of plain passes; the losses are evaluated twice."""
    chosen = [p for p in parameters if p.requires_grad]
    rows = [torch.autograd.grad(l, chosen, retain_graph=True, allow_unused=True) for l in losses()]
    counts = [sum(row[k] is not None for row in rows) for k in range(len(chosen))]
    filled = [
        [torch.zeros_like(p) if g is None else g for g, p in zip(row, chosen, strict=True)]
        for row in rows
    ]
    j = torch.stack(
        [
            torch.cat([g.double().flatten() for g, c in zip(row, counts, strict=True) if c > 1])
            for row in filled
        ]
    )
    want = j @ j.T
    for p in chosen:
        p.grad = None
    opt = MultiTaskOptimizer(SGD(chosen, lr=0.1), "upgrad", jacobian="gramian", heads=heads)
    opt.backward(losses())
    norms = want.diagonal().sqrt()
    scale = (norms[:, None] * norms).clamp_min(1e-300)
    error = float(((opt.gramian - want) / scale).abs().max())
    assert error <= tolerance, error
    for k, (p, count) in enumerate(zip(chosen, counts, strict=True)):
        if not count:
            assert p.grad is None
            continue
        w = opt.weights if count > 1 or heads == "weighted" else torch.ones(len(rows))
        total = sum(w[i].double() * row[k].double() for i, row in enumerate(filled))
        largest = max(float(g.abs().max()) for row in filled for g in row)
        assert p.grad.dtype == p.dtype
        assert float((p.grad.double() - total).abs().max()) <= tolerance * largest, k
    return opt


Case = tuple[Any, ...]
"""What makes a module, and its inputs."""


def module(case: Case, shift: Tensor | None = None) -> tuple[Losses, list[Tensor]]:
    """Losses of a module, and its parameters; with a trained shift of its first input."""
    build, first, *others = case
    torch.manual_seed(0)
    made = build().double()
    for p in made.parameters():
        nn.init.normal_(p)
    if shift is None:
        return lambda: spread(made(first, *others)), [*made.parameters()]
    return lambda: spread(made(first + shift, *others)), [*made.parameters(), shift]


INDICES = torch.tensor([[0, 3, 3], [8, 0, 5]])

LINEAR = {
    "1-D": (lambda: nn.Linear(7, 5), randn(7)),
    "2-D": (lambda: nn.Linear(7, 5), randn(4, 7)),
    "3-D": (lambda: nn.Linear(7, 5), randn(2, 3, 7)),
    "4-D": (lambda: nn.Linear(7, 5), randn(2, 2, 2, 7)),
    "more rows than inputs": (lambda: nn.Linear(3, 5), randn(9, 3)),
    "no bias": (lambda: nn.Linear(7, 5, bias=False), randn(4, 7)),
    "no bias, 3-D": (lambda: nn.Linear(7, 5, bias=False), randn(2, 3, 7)),
    "transposed input": (lambda: nn.Linear(7, 5), randn(3, 2, 7).transpose(0, 1)),
    "expanded input": (lambda: nn.Linear(7, 5), randn(7).expand(2, 3, 7)),
    "equal rows": (lambda: nn.Linear(7, 5), randn(1, 7).expand(6, 7).clone()),
    "zeros": (lambda: nn.Linear(7, 5), torch.zeros(4, 7, dtype=torch.float64)),
    "zeros, no bias": (lambda: nn.Linear(7, 5, bias=False), torch.zeros(4, 7, dtype=torch.float64)),
    "two layers": (lambda: nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 5)), randn(4, 7)),
}

CONVOLUTIONS = {
    "1d": (lambda: nn.Conv1d(3, 4, 3), randn(2, 3, 7)),
    "1d, all settings": (
        lambda: nn.Conv1d(3, 4, 3, stride=2, padding=2, dilation=2),
        randn(2, 3, 7),
    ),
    "1d, without batch": (lambda: nn.Conv1d(3, 4, 3), randn(3, 7)),
    "2d": (lambda: nn.Conv2d(3, 4, 3), randn(2, 3, 5, 4)),
    "2d, stride and padding": (
        lambda: nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 2)),
        randn(2, 3, 5, 4),
    ),
    "2d, dilation": (lambda: nn.Conv2d(3, 4, 2, dilation=2), randn(2, 3, 5, 4)),
    "2d, groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), randn(2, 4, 5, 4)),
    "2d, no bias": (lambda: nn.Conv2d(3, 4, 3, bias=False), randn(2, 3, 5, 4)),
    "2d, same": (lambda: nn.Conv2d(3, 4, 3, padding="same"), randn(2, 3, 5, 4)),
    "2d, reflected": (
        lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
        randn(2, 3, 5, 4),
    ),
    "2d, channels last": (
        lambda: nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last),
        randn(2, 3, 5, 4).to(memory_format=torch.channels_last),
    ),
    "3d": (lambda: nn.Conv3d(2, 3, 2), randn(2, 2, 3, 4, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 4, 3, stride=2), randn(2, 3, 3, 2)),
    "depthwise": (lambda: nn.Conv2d(3, 6, 3, groups=3), randn(2, 3, 5, 4)),
}

OTHERS = {
    "layer norm": (lambda: nn.LayerNorm((3, 4)), randn(5, 3, 4)),
    "group norm": (lambda: nn.GroupNorm(2, 4), randn(5, 4, 3)),
    "instance norm": (lambda: nn.InstanceNorm1d(4, affine=True), randn(5, 4, 3)),
    "batch norm": (lambda: nn.BatchNorm1d(4), randn(5, 4, 3)),
    "batch norm, eval": (lambda: nn.BatchNorm1d(4).eval(), randn(5, 4, 3)),
    "embedding": (lambda: nn.Embedding(9, 4), INDICES),
    "embedding, padding": (lambda: nn.Embedding(9, 4, padding_idx=3), INDICES),
    "embedding, last row pads": (lambda: nn.Embedding(9, 4, padding_idx=-1), INDICES),
    "embedding, by frequency": (
        lambda: nn.Embedding(9, 4, padding_idx=0, scale_grad_by_freq=True),
        INDICES,
    ),
    "embedding, max norm": (lambda: nn.Embedding(9, 4, max_norm=0.5), INDICES),
    "embedding, small table": (lambda: nn.Embedding(9, 4), INDICES.repeat(3, 1)),
    "embedding bag": (lambda: nn.EmbeddingBag(9, 4), INDICES),
    "embedding, then linear": (lambda: nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 2)), INDICES),
    "bilinear": (lambda: nn.Bilinear(3, 4, 2), randn(5, 3), randn(5, 4)),
    "PReLU": (lambda: nn.Sequential(nn.Linear(7, 4), nn.PReLU(4)), randn(5, 7)),
    "GRU": (lambda: Outputs(nn.GRU(3, 4)), randn(2, 5, 3)),
    "attention": (
        lambda: nn.TransformerEncoderLayer(4, 2, 9, dropout=0.0, batch_first=True),
        randn(2, 3, 4),
    ),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(7, 5)), randn(4, 7)),
    "spectral norm, eval": (
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(7, 5)).eval(),
        randn(4, 7),
    ),
}


class Outputs(nn.Module):
    """The output of a recurrent network, without its state."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]


LAYERS: dict[str, Case] = {
    f"{kind}: {name}": case
    for kind, made in (("linear", LINEAR), ("conv", CONVOLUTIONS), ("other", OTHERS))
    for name, case in made.items()
}


@pytest.mark.usefixtures("every_part")
@pytest.mark.parametrize("name", LAYERS)
def test_every_kind_of_layer(name: str) -> None:
    check(*module(LAYERS[name]))


# Where the input needs no gradient, passes end at the layer; here they go on.
@pytest.mark.usefixtures("every_part")
@pytest.mark.parametrize("name", [n for n in LAYERS if LAYERS[n][1].is_floating_point()])
def test_every_kind_of_layer_with_a_parameter_behind_it(name: str) -> None:
    shift = nn.Parameter(torch.full_like(LAYERS[name][1], 0.1))
    check(*module(LAYERS[name], shift))


@pytest.mark.parametrize(
    ("name", "n_kept"),
    [
        ("linear: 2-D", 4 * 5),
        ("linear: 3-D", 6 * 5),
        # The bias is added apart, and keeps its own gradient.
        ("linear: transposed input", 6 * 5 + 5),
        ("linear: two layers", 4 * 6 + 4 * 5),
        ("conv: 1d", 2 * 4 * 5),
        ("conv: 2d, no bias", 2 * 4 * 6),
        ("conv: 2d, groups", 6 * 2 * 9 + 6),
        ("other: embedding", 6 * 4),
        ("other: embedding, small table", 9 * 4),
        ("other: layer norm", 2 * 12),
        ("other: weight norm", 5 * 7 + 5 + 5),
    ],
)
def test_what_is_kept(name: str, n_kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_pays", lambda *_: True)
    assert width(check(*module(LAYERS[name]))) == n_kept


def weights(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    return [nn.Parameter(randn(*shape)) for shape in shapes]


def layer(*shape: int) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(*shape).double()


def tied() -> tuple[Losses, list[Tensor]]:
    table, decoder = nn.Embedding(9, 4).double(), nn.Linear(4, 9, bias=False).double()
    decoder.weight = table.weight
    return lambda: spread(decoder(table(INDICES))), [table.weight]


def used_twice() -> tuple[Losses, list[Tensor]]:
    one = layer(7, 7)
    return lambda: spread(one(one(randn(4, 7)).tanh())), [*one.parameters()]


def decayed_in_one_loss() -> tuple[Losses, list[Tensor]]:
    one = layer(7, 5)

    def losses() -> list[Tensor]:
        first, *others = spread(one(randn(4, 7)))
        return [first + one.weight.square().sum(), *others]

    return losses, [*one.parameters()]


def partly_shared() -> tuple[Losses, list[Tensor]]:
    first, second, heads = layer(7, 6), layer(6, 5), [layer(5, 2) for _ in range(3)]

    def losses() -> list[Tensor]:
        z = first(randn(4, 7)).tanh()
        y = second(z).tanh()
        direct = [z[:, :5], y, y]
        return [spread(h(x), 3)[i] for i, (h, x) in enumerate(zip(heads, direct, strict=True))]

    return losses, [p for one in (first, second, *heads) for p in one.parameters()]


def functional(name: str) -> tuple[Losses, list[Tensor]]:
    w, v, b = weights((5, 7), (7, 5), (5,))
    x = randn(4, 7)
    uses: dict[str, Callable[[], Tensor]] = {
        "x @ W": lambda: x @ v,
        "W @ x": lambda: w @ x.T,
        "x @ W.T": lambda: x @ w.T,
        "one transpose, two products": lambda: (lambda t: x @ t + x.cos() @ t)(w.t()),
        "3-D @ W": lambda: randn(2, 2, 7) @ v,
        "a part of W": lambda: F.linear(x, w[:3]),
        "parts of W": lambda: F.linear(x, w[:3]) + F.linear(x, w[1:4]),
        "a bias of rows": lambda: torch.addmm(randn(4, 1) * b, x, v),
        "addmm": lambda: torch.addmm(b, x, v),
        "addmm, scaled": lambda: torch.addmm(b, x, v, alpha=2.0, beta=0.5),
        "einsum": lambda: torch.einsum("ni,oi->no", x, w),
        "input and weight": lambda: w @ v,
        "a layer without a loss of its own": lambda: (x @ v).detach() + x @ v,
    }
    return lambda: spread(uses[name]()), [w, v, b]


FUNCTIONAL = [
    "x @ W",
    "W @ x",
    "x @ W.T",
    "one transpose, two products",
    "3-D @ W",
    "a part of W",
    "parts of W",
    "a bias of rows",
    "addmm",
    "addmm, scaled",
    "einsum",
    "input and weight",
    "a layer without a loss of its own",
]


@pytest.mark.usefixtures("every_part")
@pytest.mark.parametrize("name", FUNCTIONAL)
def test_functions_of_parameters(name: str) -> None:
    check(*functional(name))


@pytest.mark.usefixtures("every_part")
@pytest.mark.parametrize("make_case", [tied, used_twice, decayed_in_one_loss, partly_shared])
@pytest.mark.parametrize("heads", ["own", "weighted"])
def test_parameters_that_do_not_belong_to_one_layer_alone(make_case: Any, heads: str) -> None:
    check(*make_case(), heads=heads)


@pytest.mark.usefixtures("every_part")
@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_frozen_parameters(frozen: str) -> None:
    model = nn.Sequential(layer(7, 6), nn.Tanh(), layer(6, 5))
    for one in (model[0], model[2]):
        one.get_parameter(frozen).requires_grad_(False)
    check(lambda: spread(model(randn(4, 7))), [*model.parameters()])


@pytest.mark.usefixtures("every_part")
@pytest.mark.parametrize("trained", [[0], [1], [2], [0, 3], [1, 2]])
def test_explicit_shared_parameters(trained: list[int]) -> None:
    model = nn.Sequential(layer(7, 6), nn.Tanh(), layer(6, 5))
    parameters = [*model.parameters()]
    chosen = [parameters[k] for k in trained]
    losses = spread(model(randn(4, 7)))
    rows = [torch.autograd.grad(l, chosen, retain_graph=True) for l in losses]
    j = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    opt = MultiTaskOptimizer(
        SGD(parameters, lr=0.1), "upgrad", jacobian="gramian", shared_params=chosen
    )
    opt.backward(losses)
    torch.testing.assert_close(opt.gramian, j @ j.T, rtol=1e-9, atol=1e-12)
    twin = copy.deepcopy(model)
    rows_opt = MultiTaskOptimizer(
        SGD(twin.parameters(), lr=0.1),
        "upgrad",
        shared_params=[[*twin.parameters()][k] for k in trained],
    )
    rows_opt.backward(spread(twin(randn(4, 7))))
    for p, q in zip(parameters, twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-10)


@pytest.mark.usefixtures("every_part")
@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("where", ["output", "input", "module"])
def test_hooks_of_users_count(where: str, behind: bool) -> None:
    one = layer(7, 5)
    shift = nn.Parameter(randn(4, 7))
    if where == "module":
        one.register_full_backward_hook(lambda _, grad_in, __: tuple(3 * g for g in grad_in))

    def losses() -> list[Tensor]:
        x = randn(4, 7) + (shift if behind else shift.detach().requires_grad_())
        out = one(x)
        if where != "module":
            (out if where == "output" else x).register_hook(
                lambda g: g * torch.arange(1, 5)[:, None]
            )
        return spread(out)

    check(losses, [*one.parameters(), *([shift] if behind else [])])


new_torch = pytest.mark.skipif(
    not hasattr(Node, "_input_metadata"),
    reason="torch 2.4 starts no pass inside of a graph, nor tells of hooks on saved tensors",
)


def together(opt: MultiTaskOptimizer) -> bool | None:
    """Whether gradients of several losses went back in one pass; None if that was not tried."""
    return opt._balancer.engine._batches


def perceptron() -> tuple[nn.ModuleList, Callable[[nn.ModuleList], list[Tensor]]]:
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 5))
    model = nn.ModuleList([trunk, *(nn.Linear(5, 2) for _ in range(4))]).double()

    def losses(model: nn.ModuleList) -> list[Tensor]:
        z = model[0](randn(4, 7))
        return [(h(z) - i).square().mean() for i, h in enumerate(model[1:])]

    return model, losses


@new_torch
def test_losses_go_back_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_pays", lambda *_: True)
    model, losses = perceptron()
    passes = 0

    def counted(module: nn.Module, *_: Any) -> None:
        nonlocal passes
        passes += 1

    model[0][3].register_full_backward_pre_hook(counted)
    opt = check(lambda: losses(model), [*model.parameters()])
    # A module's hook is a node of its own, of which nobody knows what it does.
    assert together(opt) is None
    assert passes == 4 + 4
    model, losses = perceptron()
    seen: list[Tensor] = []

    def observed(model: nn.ModuleList) -> list[Tensor]:
        z = model[0][2](model[0][:2](randn(4, 7)))
        z.register_hook(seen.append)
        y = model[0][3:](z)
        return [(h(y) - i).square().mean() for i, h in enumerate(model[1:])]

    opt = check(lambda: observed(model), [*model.parameters()])
    assert together(opt)
    assert len(seen) == 4 + 1


@new_torch
@pytest.mark.parametrize("heads", ["own", "weighted"])
def test_a_hook_that_works_for_one_loss_at_a_time(
    heads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "_pays", lambda *_: True)
    model, _ = perceptron()

    def losses() -> list[Tensor]:
        z = model[0](randn(4, 7))
        z.register_hook(lambda g: g / g.norm().item())
        return [(h(z) - i).square().mean() for i, h in enumerate(model[1:])]

    opt = check(losses, [*model.parameters()], heads=heads)
    assert together(opt) is False
    opt.zero_grad()
    opt.backward(losses())


def test_a_hook_that_changes_gradients_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_pays", lambda *_: True)
    first, second = layer(7, 5), layer(5, 5)

    def losses() -> list[Tensor]:
        z = first(randn(4, 7))
        # The gradient that arrives at the sum goes on to both of its terms as it is.
        total = torch.addmm(second.bias, z, second.weight) + z
        z.register_hook(lambda g: g.mul_(2.0))
        return spread(total)

    check(losses, [*first.parameters(), *second.parameters()])


def test_losses_that_enter_at_different_layers_go_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parts, "_pays", lambda *_: True)
    assert together(check(*partly_shared())) is None


def test_hooks_on_parameters_run_once_on_the_result() -> None:
    one = layer(7, 5)
    seen: list[Tensor] = []
    one.weight.register_hook(lambda g: seen.append(g))
    opt = check(lambda: spread(one(randn(4, 7))), [*one.parameters()])
    # Three plain passes of the reference, and the delivery.
    assert len(seen) == 4
    assert opt.weights is not None
    torch.testing.assert_close(seen[-1], one.weight.grad)


@new_torch
@pytest.mark.usefixtures("every_part")
def test_checkpointing_runs_the_layers_no_more_often_than_the_rows_do() -> None:
    model = nn.Sequential(layer(7, 6), nn.Tanh(), layer(6, 5))
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    x = randn(4, 7)

    def losses() -> list[Tensor]:
        return spread(checkpoint(model, x, use_reentrant=False))

    check(losses, [*model.parameters()])
    # The reference and the engine: a forward each, and another one in each of three passes.
    assert len(calls) == 2 * 4


@pytest.mark.usefixtures("every_part")
def test_packed_tensors() -> None:
    model = nn.Sequential(layer(7, 6), nn.Tanh(), layer(6, 5))

    def losses() -> list[Tensor]:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t + 0.0):
            return spread(model(randn(4, 7)))

    check(losses, [*model.parameters()])


@pytest.mark.usefixtures("every_part")
def test_autocast() -> None:
    model = nn.Sequential(layer(7, 6), nn.LayerNorm(6), layer(6, 5)).float()
    x = randn(4, 7).float()

    def losses() -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
        return spread(out.float())

    check(losses, [*model.parameters()], tolerance=1e-6)


def test_a_part_is_computed_outside_of_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_pays", lambda *_: True)
    one = layer(7, 5).float()
    parameters = [*one.parameters()]
    out = one(randn(4, 7).float())
    (found,) = find_layers(walk([out], parameters), parameters)
    part = parts.make_part(found, parameters, [0, 1], 3)
    deltas = randn(3, 4, 5).float()
    want = part.spanned(deltas), part.gradients(deltas[0])
    with torch.autocast("cpu", torch.bfloat16):
        got = part.spanned(deltas), part.gradients(deltas[0])
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.usefixtures("every_part")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = nn.Sequential(layer(7, 6), nn.Tanh(), layer(6, 5)).to(dtype)
    # Rows of half-precision passes are rounded; δ is, but not its product with what came in.
    check(lambda: spread(model(randn(4, 7).to(dtype))), [*model.parameters()], tolerance=2e-2)


@pytest.mark.usefixtures("every_part")
def test_compiled_parts() -> None:
    model = nn.Sequential(layer(7, 6), nn.Tanh(), layer(6, 5))
    compiled = torch.compile(model[0], backend="aot_eager")
    known = hasattr(torch._functorch.config, "donated_buffer")
    with torch._functorch.config.patch({"donated_buffer": False} if known else {}):
        check(lambda: spread(model[2](compiled(randn(4, 7)).tanh())), [*model.parameters()])
    torch._dynamo.reset()


def test_a_model_as_it_is_used() -> None:
    torch.manual_seed(0)
    trunk = nn.Sequential(
        nn.Linear(300, 400), nn.ReLU(), nn.Linear(400, 400), nn.LayerNorm(400), nn.ReLU()
    )
    heads = nn.ModuleList(nn.Linear(400, 3) for _ in range(5))
    model = nn.ModuleList([trunk, heads]).double()
    x = randn(32, 300)
    labels = torch.arange(32) % 3

    def losses() -> list[Tensor]:
        z = trunk(x)
        return [F.cross_entropy(h(z), labels.roll(i)) for i, h in enumerate(heads)]

    opt = check(losses, [*model.parameters()])
    assert width(opt) == 32 * 800 + 800
    assert opt.diagnostics()["shared"] == 300 * 400 + 400 * 400 + 4 * 400


def test_cosines_of_single_precision() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU())
    head = nn.Linear(512, 6)
    x = torch.rand(64, 784)

    def gram(dtype: torch.dtype, **how: Any) -> Tensor:
        parameters = [*model.to(dtype).parameters()]
        opt = MultiTaskOptimizer(SGD(parameters, lr=0.1), "upgrad", **how)
        opt.backward([*head.to(dtype)(model(x.to(dtype))).square().mean(0)])
        return opt.gramian

    found = gram(torch.float32, jacobian="gramian")
    want = gram(torch.float64)
    norms = want.diagonal().sqrt()
    assert float(((found - want) / norms / norms[:, None]).abs().max()) < 1e-6


@pytest.mark.parametrize("aggregator", ["upgrad", "mgda", "nash_mtl", "aligned_mtl"])
def test_nearly_dependent_rows_are_as_good_as_those_of_the_loop(aggregator: str) -> None:
    torch.manual_seed(0)
    x, direction = torch.randn(48, 600), torch.randn(1, 400)
    gradients = {}
    for engine, dtype in (
        ("gramian", torch.float32),
        ("loop", torch.float32),
        ("loop", torch.float64),
    ):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(600, 400), nn.Tanh()).to(dtype)
        z = model(x.to(dtype))
        first = (z * direction.to(dtype)).square().mean()
        losses = [first, -first + 1e-3 * z.sin().mean(), 3.0 * first + 1e-3 * z.cos().mean()]
        opt = MultiTaskOptimizer(SGD(model.parameters(), lr=0.1), aggregator, jacobian=engine)
        opt.backward(losses)
        grad = torch.cat([p.grad.flatten() for p in model.parameters()]).double()
        gradients[engine, dtype] = grad
    want = gradients["loop", torch.float64]
    errors = {
        engine: float((gradients[engine, torch.float32] - want).norm() / want.norm())
        for engine in ("gramian", "loop")
    }
    assert errors["gramian"] <= max(errors["loop"], 1e-6), errors


@pytest.mark.usefixtures("every_part")
@pytest.mark.parametrize("where", ["trunk", "head", "loss"])
def test_what_is_not_finite_is_found(where: str) -> None:
    model = make("Plain")
    opt = optimizer(model, "upgrad", jacobian="gramian", nonfinite="drop")
    twin = copy.deepcopy(model)
    plain = optimizer(twin, "upgrad", nonfinite="drop")
    for one, m in ((opt, model), (plain, twin)):
        losses = m.losses(m.batch())
        bad = {"trunk": m.trunk[0].weight, "head": m.heads[1].weight, "loss": losses[1]}[where]
        losses[1] = losses[1] * math.nan if where == "loss" else losses[1] + root_at_zero(bad)
        one.backward(losses)
    assert opt.diagnostics()["dropped"] == {1: 1}
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)
    strict = optimizer(model, "upgrad", jacobian="gramian")
    losses = model.losses(model.batch())
    with pytest.raises(NonFiniteError, match="1"):
        strict.backward([losses[0], losses[1] + root_at_zero(model.heads[1].weight), losses[2]])


@pytest.mark.usefixtures("every_part")
@pytest.mark.parametrize(
    "options", [{}, {"heads": "own"}, {"loss_transform": "log"}, {"update_every": 2}], ids=str
)
def test_options_are_those_of_the_loop(options: dict[str, Any]) -> None:
    found = []
    for engine in ("loop", "gramian"):
        model = make("Plain")
        opt = optimizer(model, "cagrad", jacobian=engine, **options)
        scaler = GradScaler("cpu", init_scale=1024.0)
        for _ in range(3):
            opt.zero_grad()
            opt.backward(model.losses(model.batch()), grad_scaler=scaler)
            scaler.step(opt)
            scaler.update()
        found.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-10)


def test_an_overflow_is_left_to_the_scaler() -> None:
    model = make("Plain")
    opt = optimizer(model, "upgrad", jacobian="gramian")
    scaler = GradScaler("cpu", init_scale=1024.0)
    before = copy.deepcopy(model.state_dict())
    losses = model.losses(model.batch())
    losses[1] = losses[1] + root_at_zero(model.trunk[0].weight)
    opt.backward(losses, grad_scaler=scaler)
    scaler.step(opt)
    scaler.update()
    assert scaler.get_scale() == 512.0
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)


@pytest.mark.parametrize("always", [False, True])
def test_the_graph_is_freed_unless_it_is_to_be_kept(
    always: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "_pays", lambda *_: always)
    one = layer(7, 5)
    opt = MultiTaskOptimizer(SGD(one.parameters(), lr=0.1), "upgrad", jacobian="gramian")
    losses = spread(one(randn(4, 7)).tanh())
    opt.backward(losses, retain_graph=True)
    opt.backward(losses)
    with pytest.raises(RuntimeError, match="second time"):
        opt.backward(losses)


def test_activations_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_pays", lambda *_: True)
    model, losses = perceptron()
    opt = MultiTaskOptimizer(SGD(model.parameters(), lr=0.1), "upgrad", jacobian="gramian")
    opt.backward(losses(model))
    graph = losses(model)
    activation = graph[0].grad_fn.next_functions[0][0].next_functions[0][0]
    while activation.name() != "TanhBackward0":
        steps = [n for n, _ in activation.next_functions if n is not None]
        activation = steps[1] if activation.name() == "AddmmBackward0" else steps[0]
    opt.backward(graph)
    with pytest.raises(RuntimeError, match="freed"):
        _ = activation._saved_result


def test_one_task_and_no_task_that_goes_without_gradient() -> None:
    one = layer(7, 5)
    opt = MultiTaskOptimizer(SGD(one.parameters(), lr=0.1), "upgrad", jacobian="gramian")
    (loss,) = spread(one(randn(4, 7)), 1)
    want = torch.autograd.grad(loss, [*one.parameters()], retain_graph=True)
    opt.backward([loss])
    torch.testing.assert_close([p.grad for p in one.parameters()], [*want])


# Convolutions, norms and attention have rows of parameters' own gradients, an embedding has not.
@pytest.mark.parametrize("name", ["Plain", "Dropout", "ChannelsLast", "TiedWeights", "Attention"])
def test_the_host_waits_once_a_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_pays", lambda *_: True)
    # The pretended device's tensors are of a class of their own.
    monkeypatch.setattr(layers, "_is_plain", lambda tensor, shape: tensor.shape == tuple(shape))
    with Accelerator() as device:
        found, wanted = device.put(make(name)), make(name)
        for model, batch in ((found, device.put(found.batch())), (wanted, wanted.batch())):
            opt = optimizer(model, "upgrad", jacobian="gramian")
            for _ in range(2):
                torch.manual_seed(1)
                opt.zero_grad()
                losses = model.losses(batch)
                with device.watched() as seen:
                    opt.backward(losses)
                if model is found:
                    n = len(losses)
                    assert [d.numel for d in seen.waits] == [(n + 2) * n]
                opt.step()
        for p, q in zip(found.parameters(), wanted.parameters(), strict=True):
            torch.testing.assert_close(device.look(p), q.detach(), rtol=1e-12, atol=1e-15)


def test_it_survives_a_copy() -> None:
    model = make("Plain")
    opt = optimizer(model, "upgrad", jacobian="gramian")
    opt.backward(model.losses(model.batch()))
    twin, other = copy.deepcopy((model, opt))
    for m, o in ((model, opt), (twin, other)):
        o.zero_grad()
        o.backward(m.losses(m.batch()))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0)


def test_methods_that_need_more_than_the_gramian_are_refused_by_name() -> None:
    for name in ("graddrop", "modo", "moml"):
        with pytest.raises(ValueError, match=f"gramian.*{name}.*loop"):
            optimizer(make("Plain"), name, jacobian="gramian")
    with pytest.raises(ValueError, match="column group"):
        optimizer(make("Plain"), "gradvac", groups="matrix", jacobian="gramian")
    optimizer(make("Plain"), "uw", jacobian="gramian")


def test_micro_batches_are_refused() -> None:
    model = make("Plain")
    opt = optimizer(model, "upgrad", jacobian="gramian")
    with pytest.raises(ValueError, match=r"accumulate=True.*gramian"):
        opt.backward(model.losses(model.batch()), accumulate=True)
    assert all(p.grad is None for p in model.parameters())
    linear = optimizer(model, "sum", jacobian="gramian")
    linear.backward(model.losses(model.batch()), accumulate=True)


def test_features_and_probed_layers_have_rows_of_their_own() -> None:
    found = []
    for engine in ("loop", "gramian"):
        model = make("Plain")
        opt = optimizer(model, "mgda_ub", jacobian=engine)
        z = model.trunk(model.batch())
        opt.backward([h(z).square().mean() for h in model.heads], features=z)
        probing = MultiTaskOptimizer(
            SGD(model.parameters(), lr=0.1),
            "gradnorm",
            layer=[model.trunk[0].weight],
            jacobian=engine,
        )
        probing.backward(model.losses(model.batch()))
        found.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*found)


class Chain(nn.Module):
    """A chain of operations; losses are taken along it, and some add a parameter by itself."""

    def __init__(self, operations: Sequence[str]) -> None:
        super().__init__()
        self.operations = operations
        self.linears = nn.ModuleList(nn.Linear(4, 4, bias=o != "no bias") for o in operations)
        self.norms = nn.ModuleList(nn.LayerNorm(4) for _ in operations)
        self.free = nn.ParameterList(torch.randn(4, 4) for _ in operations)

    def after(self, k: int, states: Sequence[Tensor]) -> Tensor:
        z, name = states[-1], self.operations[k]
        if name in ("linear", "no bias"):
            return self.linears[k](z)
        if name == "norm":
            return self.norms[k](z)
        if name == "tanh":
            return z.tanh()
        if name == "skip":
            return z + states[max(0, k - 2)]
        if name == "reuse":
            return self.linears[0](z)
        if name == "view":
            return self.linears[k](z.view(3, 1, 4).expand(3, 2, 4)).sum(1)
        return z @ self.free[k] if name == "matmul" else z * self.free[k].mean(0)

    def losses(self, x: Tensor, taps: Sequence[int], decay: Sequence[bool]) -> list[Tensor]:
        states = [x]
        for k in range(len(self.operations)):
            states.append(self.after(k, states))
        found = []
        for i, (tap, decays) in enumerate(zip(taps, decay, strict=True)):
            place = min(tap, len(self.operations) - 1)
            loss = (states[place + 1] * (i + 1.0)).sin().mean() + self.free[0].square().mean()
            found.append(loss + self.linears[place].weight.cos().mean() if decays else loss)
        return found


OPERATIONS = ["linear", "no bias", "tanh", "skip", "norm", "reuse", "view", "matmul", "scale"]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from(OPERATIONS), min_size=1, max_size=8),
    st.lists(st.integers(0, 7), min_size=3, max_size=3),
    st.lists(st.booleans(), min_size=3, max_size=3),
    st.booleans(),
)
def test_random_graphs(
    operations: list[str], taps: list[int], decay: list[bool], always: bool
) -> None:
    torch.manual_seed(0)
    model = Chain(operations).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "_pays", lambda *_: always)
        check(lambda: model.losses(x, taps, decay), [*model.parameters()])
