"""nonfinite="skip" leaves the step out, nonfinite="drop" the task."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.optim import Adam

import gradbal
from gradbal import MultiTaskOptimizer
from tests.states import assert_same, fresh, root_at_zero, snapshot, trained
from tests.zoo import METHODS, make, takes, targets

GRAMIAN = [name for name in METHODS if gradbal.info(name).kind == "gramian"]
LOSS_ONLY = [name for name in METHODS if gradbal.info(name).kind == "scalarizer"]
NAN = float("nan")


@pytest.fixture(scope="module", autouse=True)
def _coordinatewise() -> Iterator[None]:
    """A method that looks at the entries of J, for the time of this file."""

    @gradbal.register("largest_entries")
    class LargestEntries(gradbal.JacobianAggregator):
        """The entry of largest absolute value in each column."""

        def direction(self, jacobian: Tensor, losses: Tensor | None = None) -> Tensor:
            assert bool(jacobian.isfinite().all())
            largest = jacobian.abs().argmax(0, keepdim=True)
            return jacobian.gather(0, largest)[0]

    yield
    gradbal.registry.unregister("largest_entries")


def _spoil(model, losses: list[Tensor], where: str) -> list[Tensor]:
    """NaN in the loss of task 1, or only in its gradient for the trunk or for its head."""
    losses = list(losses)
    if where == "loss":
        losses[1] = losses[1] * NAN
    else:
        part = model.trunk[0].weight if where == "trunk" else model.heads[1].weight
        losses[1] = losses[1] + root_at_zero(part)
    return losses


SKIPPED = [(name, "loss") for name in [*METHODS, "largest_entries"]]
SKIPPED += [(name, where) for name in [*GRAMIAN, "largest_entries"] for where in ("trunk", "head")]


@pytest.mark.parametrize("make_one", [fresh, trained])
@pytest.mark.parametrize(("aggregator", "where"), SKIPPED)
def test_skip_leaves_the_step_out(aggregator: str, where: str, make_one) -> None:
    model, opt = make_one(aggregator, nonfinite="skip")
    twin, other = copy.deepcopy((model, opt))
    opt.zero_grad()
    before = snapshot(model, opt)
    opt.backward(_spoil(model, model.losses(model.batch()), where))
    opt.step()
    after = snapshot(model, opt)
    before.pop("tasks"), after.pop("tasks")
    assert_same(after, before)
    assert opt.diagnostics()["skipped"] == 1
    # The steps that follow are those of a run that never met the bad batch.
    for m, o in ((model, opt), (twin, other)):
        o.zero_grad()
        o.backward(m.losses(m.batch()))
        o.step()
    assert_same(snapshot(model, opt), snapshot(twin, other))
    assert opt.diagnostics()["skipped"] == 1


@pytest.mark.parametrize("aggregator", ["uw", "upgrad"])
def test_skip_leaves_a_closures_step_out(aggregator: str) -> None:
    model, opt = fresh(aggregator, nonfinite="skip")
    before = copy.deepcopy(model.state_dict())
    bad = _spoil(model, model.losses(model.batch()), "loss")
    assert opt.step(lambda: bad) is bad
    assert_same(model.state_dict(), before)
    assert opt.diagnostics()["skipped"] == 1


@pytest.mark.parametrize("aggregator", ["upgrad", "largest_entries"])
def test_skip_leaves_out_the_step_of_all_its_micro_batches(aggregator: str) -> None:
    model, opt = fresh(aggregator, nonfinite="skip")
    before = copy.deepcopy(model.state_dict())
    opt.backward(model.losses(model.batch()), accumulate=True)
    opt.backward(_spoil(model, model.losses(model.batch()), "loss"), accumulate=True)
    opt.backward(model.losses(model.batch()))
    opt.step()
    assert_same(model.state_dict(), before)
    opt.zero_grad()
    opt.backward(model.losses(model.batch()))
    opt.step()
    assert not torch.equal(model.heads[0].weight, before["heads.0.weight"])


def _without(aggregator: str, **options: object) -> tuple[dict[str, Tensor], MultiTaskOptimizer]:
    """Gradients of tasks 0 and 2 in a run that has no other task."""
    model = make("Plain")
    opt = MultiTaskOptimizer(Adam(model.parameters(), lr=0.01), aggregator, **options)
    losses = model.losses(model.batch())
    opt.backward([losses[0], losses[2]])
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, opt


@pytest.mark.parametrize("heads", ["own", "weighted"])
@pytest.mark.parametrize("form", [list, torch.stack], ids=["list", "stack"])
@pytest.mark.parametrize(("aggregator", "where"), SKIPPED)
def test_drop_is_the_run_without_the_task(aggregator: str, where: str, form, heads: str) -> None:
    options: dict[str, object] = {}
    if "generator" in gradbal.info(aggregator).hyperparameters:
        options["generator"] = torch.Generator().manual_seed(4)
    if takes(aggregator, heads=heads):
        options["heads"] = heads
    want, other = _without(aggregator, **copy.deepcopy(options))
    model, opt = fresh(aggregator, nonfinite="drop", **options)
    opt.backward(form(_spoil(model, model.losses(model.batch()), where)))
    for n, p in model.named_parameters():
        if n in want:
            torch.testing.assert_close(p.grad, want[n], rtol=1e-9, atol=1e-12, msg=n)
        else:
            assert p.grad is None or not bool(p.grad.any()), n
    if other.weights is not None:
        torch.testing.assert_close(opt.weights[[0, 2]], other.weights, rtol=1e-9, atol=0)
        assert float(opt.weights[1]) == 0
    diagnostics = opt.diagnostics()
    assert diagnostics["dropped"] == {1: 1}
    assert diagnostics["skipped"] == 0


@pytest.mark.parametrize("aggregator", [*METHODS, "largest_entries"])
def test_a_dropped_task_comes_back(aggregator: str) -> None:
    # Its own gradient, whatever its weight.
    model, opt = fresh(aggregator, nonfinite="drop", heads="own")
    for bad in (True, True, False):
        opt.zero_grad()
        losses = model.losses(model.batch())
        opt.backward(_spoil(model, losses, "loss") if bad else losses)
        opt.step()
        assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert opt.diagnostics()["dropped"] == {1: 2}
    assert bool(model.heads[1].weight.grad.any())


@pytest.mark.parametrize("where", ["loss", "trunk", "head"])
@pytest.mark.parametrize("aggregator", [*GRAMIAN, "largest_entries"])
def test_what_is_told_of_a_dropped_task(aggregator: str, where: str) -> None:
    """Nothing is left of its gradient, nor of the one that it had a step before."""
    model, opt = trained(aggregator, nonfinite="drop")
    opt.zero_grad()
    opt.backward(_spoil(model, model.losses(model.batch()), where))
    assert not bool(opt.gramian[1].any())
    assert not bool(opt.gramian[:, 1].any())
    diagnostics = opt.diagnostics()
    assert diagnostics["gradient_norms"][1] == 0
    assert diagnostics["cosines"][0][2] == pytest.approx(diagnostics["cosines"][2][0])


@pytest.mark.parametrize("where", ["loss", "trunk"])
@pytest.mark.parametrize("aggregator", [*GRAMIAN, "largest_entries"])
def test_drop_of_every_task_is_a_skip(aggregator: str, where: str) -> None:
    model, opt = fresh(aggregator, nonfinite="drop")
    before = snapshot(model, opt)
    losses = model.losses(model.batch())
    bad = NAN if where == "loss" else root_at_zero(model.trunk[0].weight)
    opt.backward([l * bad if where == "loss" else l + bad for l in losses])
    opt.step()
    after = snapshot(model, opt)
    before.pop("tasks"), after.pop("tasks")
    assert_same(after, before)
    assert opt.diagnostics()["skipped"] == 1


@pytest.mark.parametrize("aggregator", LOSS_ONLY)
def test_drop_of_every_loss_is_a_skip(aggregator: str) -> None:
    model, opt = fresh(aggregator, nonfinite="drop")
    opt.backward([l * NAN for l in model.losses(model.batch())])
    opt.step()
    assert opt.diagnostics()["skipped"] == 1
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("aggregator", "keywords", "left"),
    [
        ("upgrad", {"pref": [1.0, 5.0, 2.0]}, {"pref": [1.0, 2.0]}),
        (
            "uw",
            {"kind": ["regression", "regression", "classification"]},
            {"kind": ["regression", "classification"]},
        ),
        ("gls", {"weights": [1.0, 5.0, 2.0]}, {"weights": [1.0, 2.0]}),
        ("tchebycheff", {"ideal": [9.0, 5.0, 1.0]}, {"ideal": [9.0, 1.0]}),
        ("stch_scalar", {"pref": [9.0, 5.0, 1.0]}, {"pref": [9.0, 1.0]}),
        ("pbi", {"pref": [9.0, 5.0, 1.0]}, {"pref": [9.0, 1.0]}),
        ("cosmos", {"pref": [9.0, 5.0, 1.0]}, {"pref": [9.0, 1.0]}),
        ("init_loss_inverse", {"initial": [9.0, 5.0, 1.0]}, {"initial": [9.0, 1.0]}),
        ("prior_loss_inverse", {"prior": [9.0, 5.0, 1.0]}, {"prior": [9.0, 1.0]}),
    ],
)
def test_drop_keeps_the_others_own_hyperparameters(aggregator: str, keywords, left) -> None:
    want, _ = _without(aggregator, **left)
    model, opt = fresh(aggregator, nonfinite="drop", **keywords)
    opt.backward(_spoil(model, model.losses(model.batch()), "loss"))
    for n, grad in want.items():
        torch.testing.assert_close(model.get_parameter(n).grad, grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("aggregator", ["mean", "uw"])
def test_drop_under_a_loss_transform(aggregator: str) -> None:
    want, _ = _without(aggregator, loss_transform="log")
    model, opt = fresh(aggregator, nonfinite="drop", loss_transform="log")
    opt.backward(_spoil(model, model.losses(model.batch()), "loss"))
    for n, grad in want.items():
        torch.testing.assert_close(model.get_parameter(n).grad, grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("aggregator", ["mean", "upgrad"])
def test_drop_between_two_refreshes_of_the_weights(aggregator: str) -> None:
    model, opt = fresh(aggregator, nonfinite="drop", update_every=2, heads="own")
    opt.backward(model.losses(model.batch()))
    w = opt.weights.clone()
    opt.zero_grad()
    z = model.trunk(model.batch())
    losses = targets([head(z) for head in model.heads])
    weight = model.trunk[0].weight
    g = [torch.autograd.grad(losses[i], weight, retain_graph=True)[0] for i in (0, 2)]
    opt.backward(_spoil(model, losses, "loss"))
    if aggregator == "upgrad":
        torch.testing.assert_close(weight.grad, w[0] * g[0] + w[2] * g[1])
    assert bool(weight.grad.isfinite().all())
    assert opt.diagnostics()["dropped"] == {1: 1}


@pytest.mark.parametrize("where", ["trunk", "head"])
def test_large_gradients_beside_a_half_precision_trunk_are_finite(where: str) -> None:
    trunk, head = torch.nn.Linear(3, 3).half(), torch.nn.Linear(3, 1)
    parameters = [*trunk.parameters(), *head.parameters()]
    opt = MultiTaskOptimizer(torch.optim.SGD(parameters, lr=0.1), "upgrad")
    z = trunk(torch.ones(2, 3).half()).float()
    y = head(z).sum()
    if where == "head":
        y = y + (head.weight * 1e6).sum()
    opt.backward([y, z.square().mean()])
    assert bool(head.weight.grad.isfinite().all())
    if where == "head":
        assert float(head.weight.grad.abs().max()) > 9e5
