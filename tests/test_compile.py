"""Models with compiled parts, and compiled training steps, against the same without compiling."""

import contextlib
import copy
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._functorch.config
from torch import Tensor
from torch.optim import SGD

import gradbal.jacobian.compiled
import gradbal.jacobian.graph
from gradbal import MultiTaskOptimizer
from gradbal.jacobian import combine, cross_gramian, gramian, reached_parameters
from tests.states import assert_same, snapshot
from tests.zoo import Zoo, keywords, make, targets

VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])
donates = pytest.mark.skipif(VERSION < (2, 5), reason="torch 2.4 donates no buffers")
tells = pytest.mark.skipif(
    VERSION < (2, 8), reason="older torch does not tell what is inside a compiled part"
)

# What torch's compiler looks at on its way.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

METHODS = ["sum", "gls", "upgrad", "graddrop"]
"""Known weights, weights of the losses, Gramian, Jacobian."""

Losses = Callable[[Tensor], Any]


@pytest.fixture(autouse=True)
def _anew() -> Iterator[None]:
    """Nothing is compiled before a test, and buffers are donated, as by default."""
    torch._dynamo.reset()
    config = torch._functorch.config
    donating = config.patch(donated_buffer=True) if VERSION >= (2, 5) else contextlib.nullcontext()
    with donating:
        yield


def partly(model: Zoo, what: str, backend: str = "aot_eager", **options: Any) -> Losses:
    """The losses of a trunk with heads, of which something is compiled."""

    def compiled(function: Any) -> Any:
        return torch.compile(function, backend=backend, **options)

    if what == "losses":
        return compiled(model.losses)
    heads = list(model.heads) if hasattr(model, "heads") else [model.a, model.b]
    if what == "model":
        outputs = compiled(lambda batch: [head(z) for z in [model.trunk(batch)] for head in heads])
        return lambda batch: targets(outputs(batch))
    trunk = model.trunk
    if "trunk" in what:
        trunk = compiled(trunk)
    if "heads" in what:
        heads = [compiled(head) for head in heads]
    return lambda batch: targets([head(z) for z in [trunk(batch)] for head in heads])


def optimizer(model: Zoo, aggregator: str, **options: Any) -> MultiTaskOptimizer:
    sgd = SGD(model.parameters(), lr=0.05, momentum=0.9)
    return MultiTaskOptimizer(sgd, aggregator, **keywords(aggregator) | options)


def assert_runs_are_the_same(
    name: str, aggregator: str, losses: Callable[[Zoo], Losses], *, lazily: bool = False, **opt: Any
) -> None:
    """Two steps, and one of two micro-batches of other sizes."""
    model = make(name)
    twin = copy.deepcopy(model)
    runs = [(model, losses(model)), (twin, twin.losses)]
    for each, function in runs:
        torch.manual_seed(1)
        made = optimizer(each, aggregator, **opt)
        for sizes in ([6], [6], [4, 2]):
            made.zero_grad()
            for i, batch in enumerate(each.batch().split(sizes)):
                given = function(batch)
                if lazily:
                    given = [lambda k=k, f=function, b=batch: f(b)[k] for k in range(len(given))]
                made.backward(given, accumulate=i < len(sizes) - 1)
            made.step()
    for (n, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10, msg=lambda m, n=n: f"{n}: {m}")
    for p, q in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("aggregator", METHODS)
@pytest.mark.parametrize("what", ["trunk", "trunk and heads"])
def test_compiled_parts(what: str, aggregator: str) -> None:
    assert_runs_are_the_same("Plain", aggregator, lambda model: partly(model, what), heads="own")


@tells
@pytest.mark.parametrize(
    ("what", "aggregator"), [("model", "upgrad"), *(("losses", name) for name in METHODS)]
)
def test_compiled_as_a_whole(what: str, aggregator: str) -> None:
    """Heads are still told from the trunk, although one node of the graph has all of them."""
    assert_runs_are_the_same("Plain", aggregator, lambda model: partly(model, what), heads="own")


@pytest.mark.parametrize("aggregator", METHODS)
def test_compiled_as_a_whole_with_shared_parameters_named(aggregator: str) -> None:
    model = make("Plain")
    twin = copy.deepcopy(model)
    for each, losses in ((model, partly(model, "losses")), (twin, twin.losses)):
        shared = each.trunk.parameters()
        made = optimizer(each, aggregator, shared_params=shared, heads="own")
        for _ in range(2):
            made.zero_grad()
            made.backward(losses(each.batch()))
            made.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)


@tells
@pytest.mark.parametrize(
    "options", [{"update_every": 2}, {"heads": "weighted"}, {"nonfinite": "drop"}], ids=str
)
@pytest.mark.parametrize("what", ["losses"])
def test_options(what: str, options: dict[str, Any]) -> None:
    assert_runs_are_the_same("Plain", "upgrad", lambda model: partly(model, what), **options)


@tells
@pytest.mark.parametrize("what", ["trunk", "losses"])
@pytest.mark.parametrize("name", ["BatchNorm", "Dropout"])
def test_statistics_and_random_masks(name: str, what: str) -> None:
    assert_runs_are_the_same(name, "upgrad", lambda model: partly(model, what))


@tells
@pytest.mark.parametrize(
    ("what", "aggregator"), [("trunk", "upgrad"), ("losses", "sum"), ("losses", "upgrad")]
)
def test_functions_of_compiled_parts(what: str, aggregator: str) -> None:
    losses = lambda model: partly(model, what)  # noqa: E731
    assert_runs_are_the_same("Plain", aggregator, losses, lazily=True, heads="own")


@tells
def test_what_a_compiled_loss_reaches() -> None:
    model = make("PartlyShared")
    plain = reached_parameters(model.losses(model.batch()), list(model.parameters()))
    whole = torch.compile(model.losses, backend="aot_eager")(model.batch())
    assert len({l.grad_fn for l in whole}) == 1, "the test is about one node for all"
    assert reached_parameters(whole, list(model.parameters())) == plain


@tells
def test_a_model_that_is_compiled_in_the_middle_of_a_run() -> None:
    model = make("Plain")
    twin = copy.deepcopy(model)
    runs = [(model, optimizer(model, "upgrad")), (twin, optimizer(twin, "upgrad"))]
    for step in range(4):
        for each, opt in runs:
            losses = each.losses
            if each is model and step >= 2:
                losses = partly(model, "losses")
            opt.zero_grad()
            opt.backward(losses(each.batch()))
            opt.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)
    assert runs[0][1].diagnostics()["shared"] == runs[1][1].diagnostics()["shared"]


# Donated buffers.


def _warmed(model: Zoo) -> Losses:
    """Compiled losses after a plain backward pass, so that the compiled one donates its buffers."""
    losses = partly(model, "losses")
    sum(losses(model.batch())).backward()
    model.zero_grad()
    return losses


@donates
def test_the_trap_is_there() -> None:
    model = make("Plain")
    losses = _warmed(model)
    with pytest.raises(RuntimeError, match="donated buffer"):
        torch.autograd.grad(losses(model.batch())[0], model.trunk[0].weight, retain_graph=True)


@tells
@pytest.mark.parametrize(
    ("aggregator", "options"),
    [("sum", {"heads": "own"}), ("upgrad", {"heads": "own"}), ("upgrad", {"update_every": 2})],
    ids=str,
)
def test_after_a_plain_backward_pass(aggregator: str, options: dict[str, Any]) -> None:
    assert_runs_are_the_same("Plain", aggregator, _warmed, **options)


@tells
def test_a_kept_graph_can_be_walked_again() -> None:
    for aggregator in ("sum", "upgrad"):
        model = make("Plain")
        opt = optimizer(model, aggregator)
        losses = _warmed(model)
        opt.backward(losses(model.batch()))
        opt.zero_grad()
        given = losses(model.batch())
        opt.backward(given, retain_graph=True)
        # Scalarizers walk it a second time in one piece.
        got = [p.grad.clone() for p in model.parameters()]
        opt.zero_grad()
        opt.backward(given)
        for p, g in zip(model.parameters(), got, strict=True):
            torch.testing.assert_close(p.grad, g)


@donates
def test_where_no_copies_can_be_made_the_error_says_what_to_write(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in (gradbal.jacobian.compiled, gradbal.jacobian.graph):
        monkeypatch.setattr(module, "keep_buffers", lambda node: None)
    model = make("Plain")
    opt = optimizer(model, "upgrad")
    opt.backward(model.losses(model.batch()))
    opt.step()
    losses = _warmed(model)
    before = snapshot(model, opt)
    with pytest.raises(RuntimeError, match=r"torch\._functorch\.config\.donated_buffer = False"):
        opt.backward(losses(model.batch()))
    assert_same(snapshot(model, opt), before)


@donates
def test_evaluations_walk_compiled_parts_again() -> None:
    model = make("Plain")
    twin = copy.deepcopy(model)
    for each, losses in ((model, _warmed(model)), (twin, twin.losses)):
        opt = MultiTaskOptimizer(SGD(each.parameters(), lr=0.05), "moml")
        for _ in range(2):
            opt.step(
                lambda each=each, losses=losses: losses(each.batch()),
                lambda each=each, losses=losses: losses(each.batch() * 0.5),
            )
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)


@donates
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_code_that_does_overwrite_its_buffers() -> None:
    """Inductor's does, where shapes are dynamic; without copies gradients would be off by far."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(8, 64), torch.nn.GELU(), torch.nn.Linear(64, 64), torch.nn.Tanh()]
    trunk = torch.nn.Sequential(*layers, torch.nn.Linear(64, 64), torch.nn.Softmax(-1))
    compiled = torch.compile(trunk, backend="inductor", dynamic=True)
    x = torch.randn(6, 8)
    grads = []
    for function in (compiled, trunk):
        opt = MultiTaskOptimizer(SGD(trunk.parameters(), lr=0.1), "upgrad")
        z = function(x)
        opt.backward([(z - 1).square().sum(), z.exp().sum(), -z.prod(1).sum() + z[:, 0].sum()])
        grads.append([p.grad.clone() for p in trunk.parameters()])
        opt.zero_grad()
    for p, q in zip(*grads, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


# Compiled training steps.


@tells
@pytest.mark.parametrize("aggregator", ["uw", "dwa", "upgrad", "m_config"])
def test_a_compiled_training_step(aggregator: str) -> None:
    model = make("Plain")
    twin = copy.deepcopy(model)
    for each, compiles in ((model, True), (twin, False)):
        opt = optimizer(each, aggregator)

        def step(batch: Tensor, each: Zoo = each, opt: MultiTaskOptimizer = opt) -> Tensor:
            opt.zero_grad()
            losses = each.losses(batch)
            opt.backward(losses)
            opt.step()
            return losses[0]

        run = torch.compile(step, backend="aot_eager") if compiles else step
        for _ in range(4):
            run(each.batch())
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("aggregator", ["uw", "upgrad"])
def test_a_training_step_breaks_nowhere_but_at_the_calls(aggregator: str) -> None:
    model = make("Plain")
    opt = optimizer(model, aggregator)

    def step(batch: Tensor) -> None:
        opt.zero_grad()
        opt.backward(model.losses(batch))
        opt.step()

    found = torch._dynamo.explain(step)(model.batch())
    assert found.graph_count == 1, "the forward pass is one graph"
    assert found.graph_break_count <= 1


@pytest.mark.skipif(VERSION < (2, 5), reason="torch 2.4's compiler stops at autocast's state")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [10, 300_000])
def test_products_compile_into_one_graph(width: int, dtype: torch.dtype) -> None:
    j = torch.randn(3, width).to(dtype)
    w = torch.rand(3, dtype=torch.float64)
    for function, arguments in ((gramian, (j,)), (combine, (w, j)), (cross_gramian, (j, j + 1))):
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        # Blocked float32 products are right to 1e-6; compiled ones are in float64.
        tolerance = {"rtol": 1e-5, "atol": 1e-6 * width} if function is gramian else {}
        torch.testing.assert_close(compiled(*arguments), function(*arguments), **tolerance)
