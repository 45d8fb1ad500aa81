"""What every architecture promises, whichever it is."""

import copy
import shutil
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

import gradbal
from benchmarks.accelerator import Accelerator
from tests.drive import DRIVERS, EPOCH, Call, Driver
from tests.gradients import assert_gradients, expected, shared_names, task_gradients
from tests.nn.models import BREAKS, DRAWS, FEATURES, MODELS, TASKS, batch, losses, make

every = pytest.mark.parametrize("name", MODELS)


def names_of(model: nn.Module, parameters: list[nn.Parameter]) -> list[str]:
    names = {id(p): n for n, p in model.named_parameters()}
    return [names[id(p)] for p in parameters]


def rows_of(model: nn.Module) -> list[dict[str, Tensor]]:
    """For each task the parameters that its loss reaches, with their gradients."""
    return task_gradients(model, lambda twin: list(total_losses(twin, batch()).values()))[0]


def total_losses(model: Any, x: Tensor) -> dict[str, Tensor]:
    """Each task's loss, with its part of the regularization."""
    found = losses(model, x)
    return {task: l + model.regularization_loss(x, task) for task, l in found.items()}


@every
def test_outputs(name):
    model, x = make(name), batch()
    for mode in (True, False)[name in DRAWS :]:
        model.train(mode)
        outputs = model(x)
        assert list(outputs) == list(TASKS)
        assert [list(y.shape) for y in outputs.values()] == [[6, 1], [6, 2], [6, 3]]
        features = model.features(x)
        again = model.from_features(features)
        for task in TASKS:
            torch.testing.assert_close(model(x, task), outputs[task])
            torch.testing.assert_close(again[task], outputs[task])
            one = model.features(x, task=task)
            torch.testing.assert_close(model.from_features(one, task), outputs[task])
    if name in FEATURES:
        assert isinstance(features, Tensor)
    else:
        assert list(features) == list(TASKS)


@every
def test_only_what_a_task_needs_is_computed(name):
    model = make(name)
    other = {id(p) for task in TASKS[1:] for p in model.task_parameters(task)}
    own = [module for module in model.modules() if list(module.parameters())]
    ran = []
    for module in own:
        if all(id(p) in other for p in module.parameters()):
            module.register_forward_hook(lambda module, *_: ran.append(module))
    model(batch(), task="a")
    assert not ran
    model(batch())
    assert ran


@every
def test_parameters_are_shared_or_a_tasks(name):
    model = make(name)
    parts = [model.shared_parameters(), *map(model.task_parameters, TASKS)]
    found = [id(p) for part in parts for p in part]
    assert len(set(found)) == len(found)
    assert set(found) == {id(p) for p in model.parameters()}
    assert all(parts)


@every
def test_no_parameter_is_dead_and_each_belongs_to_who_reaches_it(name):
    model = make(name)
    rows = rows_of(model)
    for p in names_of(model, list(model.parameters())):
        assert any(p in row and row[p].abs().max() > 0 for row in rows), f"{p} is dead"
    assert set(shared_names(rows)) == set(names_of(model, model.shared_parameters()))
    for row, task in zip(rows, TASKS, strict=True):
        own = set(names_of(model, model.task_parameters(task)))
        assert {n for n in row if n not in shared_names(rows)} == own


@every
def test_the_same_parameters_are_shared_when_each_task_has_its_own_batch(name):
    model = make(name)
    batches = [batch(6, seed) for seed in range(len(TASKS))]

    def own_losses(twin):
        return [
            twin(x, task=task).square().mean() + twin.regularization_loss(x, task)
            for task, x in zip(TASKS, batches, strict=True)
        ]

    rows, _ = task_gradients(model, own_losses)
    assert set(shared_names(rows)) == set(names_of(model, model.shared_parameters()))
    assert {n for row in rows for n in row} == {n for n, _ in model.named_parameters()}


@every
def test_a_state_dict_makes_another_model_the_same(name):
    model, x = make(name).eval(), batch()
    model.set_progress(3, 4)
    other = make(name, seed=4).eval()
    before = other(x)
    other.load_state_dict(model.state_dict())
    after = other(x)
    for task, y in model(x).items():
        assert torch.equal(after[task], y)
        assert not torch.equal(before[task], y)
    assert torch.equal(other.regularization_loss(x), model.regularization_loss(x))


@every
def test_evaluation_is_deterministic_and_leaves_no_trace(name):
    model, x = make(name).eval(), batch()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with torch.no_grad():
        first, second = model(x), model(x)
    for task in TASKS:
        assert torch.equal(first[task], second[task])
        assert not first[task].requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)


@every
def test_training_mode_works_without_gradients(name):
    model, x = make(name).train(), batch()
    with torch.no_grad():
        outputs = model(x)
        extra = model.regularization_loss(x)
    assert not any(y.requires_grad for y in outputs.values())
    assert not extra.requires_grad
    # A pass with gradients makes none by itself.
    total_losses(model, x)
    assert all(p.grad is None for p in model.parameters())


@every
def test_copies_are_independent(name):
    model, x = make(name), batch()
    model(x)
    twin = copy.deepcopy(model.eval())
    before, copied = model(x), twin(x)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(1)
    for task, y in model(x).items():
        assert torch.equal(y, before[task])
        assert torch.equal(y, copied[task])
        assert not torch.equal(y, twin(x)[task])


@every
def test_regularization_adds_up_over_the_tasks(name):
    model, x = make(name), batch()
    parts = [model.regularization_loss(x, task) for task in TASKS]
    total = model.regularization_loss(x)
    assert total.shape == ()
    assert total.dtype == torch.float64
    torch.testing.assert_close(total, torch.stack(parts).sum())
    with pytest.raises(ValueError, match="did you mean `a`"):
        model.regularization_loss(x, "aa")


@every
def test_autocast(name):
    model = make(name, dtype=torch.float32)
    x = batch().float()
    want = copy.deepcopy(model)(x)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(x)
        total = sum(total_losses(model, x).values())
    for task, y in outputs.items():
        # Some layers in bfloat16, of 8 bits.
        torch.testing.assert_close(y.float(), want[task], rtol=0.05, atol=0.05)
    total.backward()
    for p in model.parameters():
        assert p.grad.dtype == torch.float32
        assert p.grad.isfinite().all()


@every
def test_the_host_does_not_wait_for_the_device(name):
    with Accelerator() as device:
        model, x = device.put(make(name)), device.put(batch())
        for _ in range(2):
            with device.watched() as seen:
                total = sum(total_losses(model, x).values())
                total.backward()
            assert not seen.waits
            assert not seen.up
            assert not seen.down


@every
def test_compiled_in_one_graph(name):
    torch._dynamo.reset()
    model, twin, x = make(name), make(name), batch()
    compiled = torch.compile(model, backend="eager", fullgraph=name not in BREAKS)
    for _ in range(2):
        sums = []
        for used, origin in ((compiled, model), (twin, twin)):
            origin.zero_grad()
            total = sum(losses(used, x).values())
            total.backward()
            with torch.no_grad():
                for p in origin.parameters():
                    if p.grad is not None:
                        p.sub_(p.grad, alpha=0.1)
            sums.append(total.detach())
        torch.testing.assert_close(*sums)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch's compiler needs one for C++")
def test_compiled_to_machine_code():
    torch._dynamo.reset()
    model, x = make("MMoE"), batch()
    compiled = torch.compile(model)
    for task, y in compiled(x).items():
        torch.testing.assert_close(y, model(x)[task])


@pytest.mark.parametrize(
    ("aggregator", "engine"),
    [("mean", "auto")] + [("upgrad", e) for e in ("auto", "gramian", "loop", "sketch", "vmap")],
)
@every
def test_gradients_are_those_of_plain_autograd(name, aggregator, engine):
    model, x = make(name), batch()
    wrapped = torch.optim.SGD(model.parameters(), lr=0.01)
    opt = gradbal.MultiTaskOptimizer(wrapped, aggregator, jacobian=engine)
    n_shared = sum(p.numel() for p in model.shared_parameters())
    for _ in range(2):
        rows, values = task_gradients(model, lambda twin: list(total_losses(twin, x).values()))
        want = expected(copy.deepcopy(opt.aggregator), rows, values, None)
        opt.zero_grad()
        opt.backward(total_losses(model, x))
        assert_gradients(model, want, 1e-7)
        if aggregator != "mean":
            assert opt.diagnostics()["shared"] == n_shared
        opt.step()


class OfModel(Driver):
    """A method that trains one of the models."""

    def __init__(self, method: str, architecture: str) -> None:
        name, keywords = DRIVERS[method]
        super().__init__(name, dict(keywords))
        self.architecture = architecture

    def model(self) -> Any:
        return make(self.architecture)

    def losses(self, model: Any, call: Call, which: int) -> list[Tensor]:
        return list(total_losses(model, self.batch(call.step, which)).values())

    def _backward(self, model: Any, opt: gradbal.MultiTaskOptimizer, call: Call) -> None:
        if not opt.aggregator.needs_features:
            super()._backward(model, opt, call)
            return
        z = model.features(self.batch(call.step, 0))
        outputs = model.from_features(z)
        opt.backward([y.square().mean() + 1 for y in outputs.values()], features=z)


@pytest.mark.parametrize("method", gradbal.list_aggregators())
@pytest.mark.parametrize("name", [name for name in MODELS if "," not in name])
def test_every_method_trains_it(name, method):
    if gradbal.create(method).needs_features and name not in FEATURES:
        assert isinstance(make(name).features(batch()), dict)
        return
    run = OfModel(method, name)
    model, opt = run.fresh()
    before = copy.deepcopy(model.state_dict())
    run.run(model, opt, range(EPOCH))
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert all(p.isfinite().all() for p in model.parameters())
    assert set(names_of(model, model.shared_parameters())) & changed
    # Some methods give all weight to one task.
    assert any(set(names_of(model, model.task_parameters(task))) & changed for task in TASKS)
