"""Closures called again: what modules, random numbers, hooks and autocast must not notice."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

from gradbal import MultiTaskOptimizer
from gradbal._closures import Closure, Evaluations, length, read_values
from gradbal.distributed import Alone

CPU = torch.device("cpu")


class Statistics(nn.Module):
    """Everything that a forward pass can do to buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("in_place", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(()))
        self.register_buffer("empty", None)

    def forward(self, x: Tensor) -> Tensor:
        self.in_place += x.detach().sum()
        self.replaced = self.replaced + 1
        self.empty = x.detach().mean()
        self.register_buffer(f"made_{len(self._buffers)}", torch.ones(()))
        return x * (1 + 0 * self.in_place)


def _again(function: Callable[[], Any], grad: bool = False) -> Any:
    return Closure(function, [CPU]).again(grad)


@pytest.mark.parametrize("grad", [False, True])
def test_buffers_that_are_changed_replaced_filled_or_made_are_put_back(grad: bool) -> None:
    model = nn.Sequential(nn.Linear(2, 2), Statistics())
    x = torch.randn(3, 2)
    model(x)
    before = dict(model[1]._buffers)
    values = [v.clone() for v in before.values()]
    _again(lambda: model(x), grad)
    after = model[1]._buffers
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert [v.item() for v in after.values()] == [v.item() for v in values]


def test_an_empty_buffer_is_empty_again() -> None:
    module = Statistics()
    _again(lambda: module(torch.randn(3)))
    assert list(module._buffers) == ["in_place", "replaced", "empty"]
    assert module.empty is None


def test_a_buffer_of_two_modules_stays_one_buffer() -> None:
    a, b = Statistics(), Statistics()
    b.in_place = a.in_place
    both = nn.Sequential(a, b)
    seen = []

    def closure() -> None:
        both(torch.ones(3))
        seen.append((a.in_place is b.in_place, float(a.in_place)))

    _again(closure)
    assert seen == [(True, 6.0)]
    assert a.in_place is b.in_place
    assert float(a.in_place) == 0.0


def test_a_module_inside_modules_is_visited_once() -> None:
    # Each nested call walking everything below it would be quadratic in the depth.
    class Counted(nn.Sequential):
        visits = 0

        def named_modules(self, *args: Any, **kwargs: Any) -> Any:
            Counted.visits += 1
            return super().named_modules(*args, **kwargs)

    module: nn.Module = nn.Linear(2, 2)
    for _ in range(10):
        module = Counted(module)
    list(module.modules())
    once, Counted.visits = Counted.visits, 0
    _again(lambda: module(torch.randn(3, 2)))
    assert Counted.visits == once


def test_an_error_in_the_closure_leaves_buffers_calls_and_random_numbers_as_they_were() -> None:
    module = Statistics()
    call, random = nn.Module.__call__, torch.get_rng_state()

    def closure() -> None:
        module(torch.rand(3))
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        _again(closure)
    assert nn.Module.__call__ is call
    assert torch.equal(torch.get_rng_state(), random)
    assert float(module.in_place) == 0.0
    assert module.empty is None


def test_a_module_in_a_graph_keeps_the_buffers_that_the_graph_has_saved() -> None:
    # In evaluation mode the backward pass of BatchNorm reads the running statistics.
    norm = nn.BatchNorm1d(3).eval()
    x = torch.randn(4, 3, requires_grad=True)
    loss = norm(x).square().sum()
    (wanted,) = torch.autograd.grad(loss, x, retain_graph=True)
    _again(lambda: norm.train()(x))
    norm.eval()
    assert torch.equal(torch.autograd.grad(loss, x)[0], wanted)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("how", ["whole", "whole in place", "part", "part in place"])
def test_compiled_modules_leave_no_trace_and_are_compiled_once_a_mode(how: str) -> None:
    import torch._dynamo

    compiled = []

    def backend(graph: Any, example: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model: Any = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    called = model
    if how == "whole":
        called = torch.compile(model, backend=backend)
    elif how == "part":
        model[1] = torch.compile(model[1], backend=backend)
    else:
        (model if how == "whole in place" else model[1]).compile(backend=backend)
    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm1d))
    opt = MultiTaskOptimizer(SGD(model.parameters(), lr=0.01), "marigold")
    counts = []
    for k in range(4):
        x = torch.randn(8, 4)
        opt.step(lambda x=x: list(called(x).square().mean(0)))
        assert int(norm.num_batches_tracked) == k + 1
        counts.append(len(compiled))
    assert counts == [2, 2, 2, 2]  # with and without grad
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_scripted_module_leaves_no_trace() -> None:
    model = torch.jit.script(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))
    x = torch.randn(8, 4)
    model(x)
    before = [b.clone() for b in model.buffers()]
    _again(lambda: model(x))
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))


def test_autocast_around_the_step_does_not_hide_that_parameters_moved() -> None:
    # Its cache holds half-precision copies of parameters until the outermost region ends.
    def run(outside: bool) -> Tensor:
        torch.manual_seed(0)
        layer = nn.Linear(64, 2)
        sgd = SGD(layer.parameters(), lr=0.5)
        opt = MultiTaskOptimizer(sgd, "marigold", transform="identity", eps=0.5)
        x = torch.randn(16, 64)

        def closure() -> list[Tensor]:
            with torch.autocast("cpu", torch.bfloat16):
                out = layer(x).float()
            return [(out[:, 0] - 1).square().mean(), (out[:, 1] + 3).square().mean()]

        with torch.autocast("cpu", torch.bfloat16, enabled=outside):
            for _ in range(2):
                opt.step(closure)
        return opt.aggregator.simplex_weights

    found = run(outside=True)
    assert not torch.equal(found, torch.full((2,), 0.5, dtype=torch.float64))
    torch.testing.assert_close(found, run(outside=False))


def test_gradient_hooks_run_once_a_step() -> None:
    for name in ("moml", "auto_lambda", "forum"):
        layer = nn.Linear(2, 2)
        seen = []
        layer.weight.register_hook(lambda g, seen=seen: seen.append(g))
        opt = MultiTaskOptimizer(SGD(layer.parameters(), lr=0.1), name)
        opt.step(*[lambda layer=layer: list(layer(torch.randn(4, 2)).square().mean(0))] * 2)
        assert len(seen) == 1
        assert torch.equal(seen[0], layer.weight.grad)


def test_values_keep_the_order_of_the_tasks_and_the_precision_of_numbers() -> None:
    assert read_values({"b": 2.0, "a": 1.0}, ("a", "b")).tolist() == [1.0, 2.0]
    assert read_values([0.1, 1], None).tolist() == [0.1, 1.0]
    assert read_values([torch.tensor(0.5), 0.1], None).tolist() == [0.5, 0.1]
    assert read_values(torch.tensor([1.0, 2.0]), (0, 1)).tolist() == [1.0, 2.0]
    with pytest.raises(TypeError, match=r"losses must be a list.*found float"):
        read_values(1.0, None)
    with pytest.raises(ValueError, match=r"losses of \['a', 'b'\] are required, found \['a'\]"):
        read_values({"a": 1.0}, ("a", "b"))
    with pytest.raises(ValueError, match="at least one loss"):
        read_values([], None)


def test_parameters_are_back_bit_for_bit_even_after_an_error() -> None:
    p = nn.Parameter(torch.rand(1000) * 1e-3)
    before, version = p.detach().clone(), p._version
    evaluations = Evaluations(Closure(list, [CPU]), None, [p], SGD([p], lr=1.0), None, Alone())
    least = 0.0

    def look() -> None:
        nonlocal least
        with evaluations.moved(torch.full((1000,), 1e6)):
            least = float(p.detach().min())
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        look()
    assert least >= 1e6
    assert torch.equal(p, before)
    assert p._version == version, "graphs that have saved it stay valid"


def test_half_precision_gradients_whose_sum_overflows_are_finite() -> None:
    p = nn.Parameter(torch.zeros(1000, dtype=torch.float16))
    train = Closure(lambda: [(p * 100.0).sum()], [CPU])
    evaluations = Evaluations(train, None, [p], SGD([p], lr=1.0), None, Alone())
    assert bool((evaluations.gradient(torch.ones(1)) == 100.0).all())
    assert bool((evaluations.jacobian() == 100.0).all())


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_lengths_of_any_scale(scale: float) -> None:
    parts = [scale * torch.tensor([3.0, 0.0]), scale * torch.tensor(4.0)]
    assert length(parts) == pytest.approx(5 * scale, rel=1e-5)
    assert length([torch.zeros(2)]) == 0.0
    assert length([torch.full((10_000,), 1e3, dtype=torch.float16)]) == pytest.approx(1e5)
    p = nn.Parameter(torch.ones(4))
    evaluations = Evaluations(Closure(list, [CPU]), None, [p], SGD([p], lr=1.0), None, Alone())
    assert evaluations.lengths() == (2.0, 0.0)


def test_what_a_virtual_step_needs() -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(1))
    sgd = SGD([{"params": [b], "lr": 3.0}, {"params": [a]}], lr=0.5)
    evaluations = Evaluations(Closure(list, [CPU]), None, [a, b], sgd, None, Alone())
    assert evaluations.learning_rates().tolist() == [0.5, 0.5, 3.0]
    del sgd.param_groups[0]["lr"]
    with pytest.raises(ValueError, match=r"learning rate `lr` in every param group.*found a"):
        evaluations.learning_rates()


def test_parameters_on_several_devices_and_sparse_gradients_are_refused() -> None:
    a, b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1, device="meta"))
    with pytest.raises(ValueError, match="must be on one device, found cpu, meta"):
        Evaluations(Closure(list, [CPU]), None, [a, b], SGD([a, b], lr=1.0), None, Alone())
    table = nn.Embedding(5, 2, sparse=True)
    opt = MultiTaskOptimizer(SGD(table.parameters(), lr=0.1), "forum")

    def closure() -> list[Tensor]:
        return list(table(torch.tensor([0, 3])).square().mean(0))

    with pytest.raises(ValueError, match=r"gradients must be dense.*sparse=False"):
        opt.step(closure, closure)
    opt = MultiTaskOptimizer(SGD(table.parameters(), lr=0.1), "marigold")
    with pytest.raises(ValueError, match=r"gradients must be dense.*sparse=False"):
        opt.step(closure)


@pytest.mark.parametrize("name", ["famo", "marigold", "moml", "auto_lambda", "forum"])
def test_no_graph_outlives_its_step(name: str) -> None:
    import gc
    import weakref

    layer = nn.Linear(2, 2)
    opt = MultiTaskOptimizer(Adam(layer.parameters(), lr=0.1), name)
    alive: list[Any] = []

    def closure() -> list[Tensor]:
        out = layer(torch.randn(4, 2))
        alive.append(weakref.ref(out))
        return list(1 + out.square().mean(0))

    losses = opt.step(*[closure] * (1 if name in ("famo", "marigold") else 2))
    del losses
    gc.collect()
    assert len(alive) > 1
    assert not any(ref() is not None for ref in alive)


@pytest.mark.parametrize(("name", "options"), [("famo", {}), ("marigold", {"estimator": "free"})])
def test_a_failed_backward_leaves_nothing_to_wait_for(name: str, options: dict[str, Any]) -> None:
    layer = nn.Linear(2, 2)
    opt = MultiTaskOptimizer(SGD(layer.parameters(), lr=0.1), name, **options)

    def losses() -> list[Tensor]:
        return list(1 + layer(torch.ones(4, 2)).square().mean(0))

    used = losses()
    opt.backward(used)
    opt.step()
    opt.update(losses())
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        opt.backward(used)
    opt.backward(losses())


@pytest.mark.parametrize("name", ["famo", "marigold"])
def test_weights_that_are_used_again_teach_nothing(name: str) -> None:
    layer = nn.Linear(2, 2)
    opt = MultiTaskOptimizer(SGD(layer.parameters(), lr=0.1), name, update_every=3)
    calls = 0

    def closure() -> list[Tensor]:
        nonlocal calls
        calls += 1
        return list(1 + layer(torch.ones(4, 2)).square().mean(0))

    counts, weights = [], []
    for _ in range(4):
        calls = 0
        opt.step(closure)
        counts.append(calls)
        weights.append(opt.weights)
    more = 2 if name == "famo" else 3
    assert counts == [more, 1, 1, more]
    assert torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[3])


@pytest.mark.parametrize("name", ["famo", "marigold"])
def test_methods_that_compare_losses_take_them_as_they_are(name: str) -> None:
    layer = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=f"loss_transform must be None for '{name}'"):
        MultiTaskOptimizer(SGD(layer.parameters(), lr=0.1), name, loss_transform="log")
