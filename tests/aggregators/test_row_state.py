"""What the methods with state `[T, P]` have in common, alone and under MultiTaskOptimizer."""

import copy
import io
from typing import Any

import pytest
import torch

import gradbal
from gradbal.aggregators._row_state import RowStateMixin
from tests.aggregators.inputs import random_rows
from tests.gradients import jacobian, shared_names, task_gradients
from tests.states import assert_same, fresh, snapshot
from tests.zoo import keywords, make, optimizer

NAMES = [n for n in gradbal.list_aggregators() if issubclass(gradbal.info(n).cls, RowStateMixin)]

every = pytest.mark.parametrize("name", NAMES)


def rows(seed: int, n_tasks: int = 3, width: int = 8) -> torch.Tensor:
    return torch.from_numpy(random_rows(n_tasks, width, seed))


def stepped(name: str, steps: int = 4) -> Any:
    method = gradbal.create(name)
    for seed in range(steps):
        method.direction(rows(seed))
    return method


def test_the_methods_are_these():
    assert {"db_mtl", "excess_mtl", "m_config", "moco"} <= set(NAMES)


@every
def test_other_tasks_or_parameters_are_refused(name):
    method = stepped(name)
    before = copy.deepcopy(method.state_dict())
    for changed, words in (
        (rows(9, n_tasks=4), f"'{name}' has state for 3 tasks, found 4"),
        (rows(9, width=7), f"'{name}' has state for 8 shared scalars, found 7"),
    ):
        with pytest.raises(ValueError, match=words):
            method.direction(changed)
    with pytest.raises(ValueError, match="has state for 3 tasks, found 2"):
        method.prepare(2, torch.zeros(()))
    assert_same(method.state_dict(), before)
    method.reset()
    assert method.direction(rows(9, n_tasks=4, width=7)).shape == (7,)


@every
def test_a_checkpoint_has_the_sizes_too(name):
    method = gradbal.create(name)
    method.load_state_dict(stepped(name).state_dict())
    with pytest.raises(ValueError, match="has state for 3 tasks, found 2"):
        method.prepare(2, torch.zeros(()))
    with pytest.raises(ValueError, match="has state for 8 shared scalars, found 9"):
        method.direction(rows(0, 2, 9), tasks=[0, 1])
    assert method.direction(rows(0, 2), tasks=[0, 2]).shape == (8,)


@every
@pytest.mark.parametrize("tasks", [[0, 0], [0, 3], [-1, 0], [0], [0, 1, 2]])
def test_tasks_that_do_not_fit_are_refused(name, tasks):
    method = stepped(name)
    before = copy.deepcopy(method.state_dict())
    with pytest.raises(ValueError, match="`tasks` must be 2 different indices below 3"):
        method.direction(rows(0, 2), tasks=tasks)
    assert_same(method.state_dict(), before)


@every
def test_some_tasks_first(name):
    with pytest.raises(ValueError, match="call prepare"):
        gradbal.create(name).direction(rows(0, 2), tasks=[0, 2])
    method = gradbal.create(name)
    method.prepare(3, torch.zeros(()))
    method.direction(rows(0, 2), tasks=[0, 2])
    assert method.rows.any(1).tolist() == [True, False, True]


@every
def test_state_goes_through_a_file_and_is_not_shared(name):
    method = stepped(name, 5)
    file = io.BytesIO()
    torch.save(method.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    kept = copy.deepcopy(saved)
    other = gradbal.create(name)
    other.load_state_dict(saved)
    for seed in range(5, 9):
        assert torch.equal(other.direction(rows(seed)), method.direction(rows(seed)))
    assert_same(saved, kept)
    assert_same(other.state_dict(), method.state_dict())


@every
@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_state_is_in_float32_or_wider(name, given, kept):
    method = gradbal.create(name)
    for seed in range(4):
        assert method.direction(rows(seed).to(given)).dtype == given
    tensors = [v for v in method.state_dict()["state"].values() if isinstance(v, torch.Tensor)]
    assert {t.dtype for t in tensors} == {kept}


@every
def test_jacobians_are_not_written_to_and_directions_do_not_change(name):
    method = stepped(name)
    j = rows(7)
    before = j.clone()
    d = method.direction(j)
    first = d.clone()
    method.direction(rows(8))
    assert torch.equal(j, before)
    assert torch.equal(d, first)


@every
def test_other_shared_parameters_are_refused_and_nothing_changes(name):
    model = make("Plain")
    opt = optimizer(model, name)
    for _ in range(2):
        opt.zero_grad()
        opt.backward(model.losses(model.batch()))
        opt.step()
    before = snapshot(model, opt)
    twin, other = copy.deepcopy((model, opt))
    model.trunk[0].bias.requires_grad_(False)
    with pytest.raises(ValueError, match=f"shared parameters must stay the same for '{name}'"):
        opt.backward(model.losses(model.batch()))
    assert_same(snapshot(model, opt), before)
    with pytest.raises(ValueError, match="number of losses must stay 3"):
        opt.backward(model.losses(model.batch())[:2])
    assert_same(snapshot(model, opt), before)
    model.trunk[0].bias.requires_grad_(True)
    for m, o in ((model, opt), (twin, other)):
        o.zero_grad()
        o.backward(m.losses(m.batch()))
    assert_same(snapshot(model, opt), snapshot(twin, other))


@every
def test_a_resumed_run_refuses_other_shared_parameters(name):
    model, opt = fresh(name, **keywords(name))
    opt.backward(model.losses(model.batch()))
    twin, other = fresh(name, **keywords(name))
    other.load_state_dict(opt.state_dict())
    twin.trunk[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="shared parameters must stay the same"):
        other.backward(twin.losses(twin.batch()))


@every
def test_drop_keeps_the_state_of_the_task_and_updates_the_others(name):
    model = make("Plain")
    opt = optimizer(model, name, nonfinite="drop")
    for _ in range(2):
        opt.zero_grad()
        opt.backward(model.losses(model.batch()))
        opt.step()
    before = copy.deepcopy(opt.aggregator)
    gradients, values = task_gradients(model, lambda twin: twin.losses(model.batch()))
    names = shared_names(gradients)
    losses = model.losses(model.batch())
    losses[1] = losses[1] * float("nan")
    opt.zero_grad()
    opt.backward(losses)
    assert torch.equal(opt.aggregator.rows[1], before.rows[1])
    assert not torch.equal(opt.aggregator.rows[[0, 2]], before.rows[[0, 2]])
    wanted = before.direction(jacobian(gradients, names)[[0, 2]], values[[0, 2]], tasks=[0, 2])
    found = torch.cat([model.get_parameter(n).grad.view(-1) for n in names])
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(opt.aggregator.rows, before.rows, rtol=1e-9, atol=1e-15)
