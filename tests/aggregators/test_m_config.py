"""M-ConFIG: a float64 loop of its formulas, turns, one backward pass a step, state."""

import copy
import io
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

import gradbal
from tests.aggregators.inputs import random_rows
from tests.gradients import jacobian, shared_names, task_gradients
from tests.states import assert_same, root_at_zero, snapshot
from tests.zoo import make, targets


class Loop:
    """The formulas, in float64, with ConFIG by the pseudo-inverse of the unit momenta."""

    def __init__(self, n_tasks: int, beta1=0.9, beta2=0.999, eps=1e-8) -> None:
        self.beta1, self.beta2, self.eps = beta1, beta2, eps
        self.m, self.count = [0.0] * n_tasks, [0] * n_tasks
        self.t, self.f, self.s = 0, 0.0, 0.0

    def direction(self, rows: dict[int, np.ndarray]) -> np.ndarray:
        for i, g in rows.items():
            self.m[i] = self.beta1 * self.m[i] + (1 - self.beta1) * g
            self.count[i] += 1
        if 0 in self.count:
            return np.zeros_like(g)
        self.t += 1
        m = np.stack([m / (1 - self.beta1**c) for m, c in zip(self.m, self.count, strict=True)])
        x = np.linalg.pinv(m / np.linalg.norm(m, axis=1, keepdims=True)).sum(1)
        x /= np.linalg.norm(x)
        d = (m @ x).sum() * x
        f = d * (1 - self.beta1**self.t)
        h = (f - self.beta1 * self.f) / (1 - self.beta1)
        self.f, self.s = f, self.beta2 * self.s + (1 - self.beta2) * h**2
        return d / (np.sqrt(self.s / (1 - self.beta2**self.t)) + self.eps)


@pytest.mark.parametrize("per_step", [1, 2, 4, 9])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.0), (0.0, 0.9)])
def test_it_is_a_loop_of_the_formulas(per_step, betas):
    options = {"beta1": betas[0], "beta2": betas[1], "eps": 1e-3}
    method = gradbal.create("m_config", per_step=per_step, **options)
    loop, turn = Loop(4, **options), 0
    for seed in range(13):
        j = random_rows(4, 11, seed, spread=10.0) - 0.3
        chosen = [(turn + k) % 4 for k in range(min(per_step, 4))]
        turn += len(chosen)
        assert method.tasks_in_turn(4) == sorted(chosen)
        d = method.direction(torch.from_numpy(j))
        np.testing.assert_allclose(d, loop.direction({i: j[i] for i in chosen}), rtol=1e-9)


def test_rows_in_turn_alone_are_the_whole_jacobian():
    whole, alone = gradbal.create("m_config"), gradbal.create("m_config")
    alone.prepare(3, torch.zeros(()))
    for seed in range(9):
        j = torch.from_numpy(random_rows(3, 8, seed))
        turn = alone.tasks_in_turn(3)
        assert torch.equal(alone.direction(j[turn], tasks=turn), whole.direction(j))


def test_zero_until_every_task_had_its_turn():
    method = gradbal.create("m_config")
    j = torch.from_numpy(random_rows(3, 8, 0))
    assert not method.direction(j).any()
    assert not method.direction(j).any()
    # The first that is not zero is d₀/(|d₀| + ε).
    torch.testing.assert_close(method.direction(j).abs(), torch.ones(8).double(), atol=1e-6, rtol=0)
    single = gradbal.create("m_config").direction(torch.tensor([[3.0, -2.0, 0.0]]))
    torch.testing.assert_close(single, torch.tensor([1.0, -1.0, 0.0]))


@pytest.mark.parametrize("scale", [1e-8, 1e-4, 1e4, 1e8])
def test_without_epsilon_the_scale_of_the_losses_does_not_matter(scale):
    one, other = (gradbal.create("m_config", eps=0.0) for _ in range(2))
    for _ in range(9):
        j = torch.randn(3, 20)
        torch.testing.assert_close(
            other.direction(j * scale), one.direction(j), rtol=1e-3, atol=1e-3
        )


def test_epsilon_is_in_units_of_the_gradients():
    j = torch.tensor([[2.0, 0.0, 0.0]])
    for eps, wanted in ((2.0, 0.5), (0.0, 1.0)):
        d = gradbal.create("m_config", eps=eps).direction(j)
        torch.testing.assert_close(d, torch.tensor([wanted, 0.0, 0.0]))
    assert float(gradbal.create("m_config").direction(j * 1e-20).abs().max()) < 1e-11


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_squares_beyond_float32_do_no_harm(scale):
    method = gradbal.create("m_config", eps=0.0, per_step=2)
    for _ in range(3):
        d = method.direction(torch.tensor([[1.0, 2.0], [-1.0, 1.0]]) * scale)
    torch.testing.assert_close(d, torch.tensor([-1.0, 1.0]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["zero_row", "all_zero", "equal", "opposite"])
def test_degenerate_rows(case):
    g = torch.randn(7, dtype=torch.float64)
    rows, wanted = {
        "zero_row": ([g, 0 * g], g.sign()),
        "all_zero": ([0 * g, 0 * g], 0 * g),
        "equal": ([g, g], g.sign()),
        "opposite": ([g, -3 * g], 0 * g),
    }[case]
    for eps in (0.0, 1e-8):
        method = gradbal.create("m_config", per_step=2, eps=eps)
        for _ in range(4):
            d = method.direction(torch.stack(rows))
        torch.testing.assert_close(d, wanted, rtol=1e-5, atol=1e-8)


def test_angles_and_length_are_configs():
    j = torch.from_numpy(random_rows(3, 9, 0))
    for options in ({"a": [1.0, 2.0, 3.0]}, {"length": "norm of mean"}, {"length": 2.5}):
        method = gradbal.create("m_config", per_step=3, beta2=0.0, eps=1.0, **options)
        # With one step d is d₀/(|d₀| + 1).
        unscaled = gradbal.create("config", **options).direction(j)
        torch.testing.assert_close(method.direction(j), unscaled / (unscaled.abs() + 1))
    with pytest.raises(ValueError, match="one entry for each of 2 tasks, found 3"):
        gradbal.create("m_config", a=[1, 1, 1]).prepare(2, torch.zeros(()))


def test_half_precision_momenta_are_kept_in_float32():
    j = torch.ones(2, 4, dtype=torch.bfloat16)
    method = gradbal.create("m_config", beta1=0.999, per_step=2)
    for _ in range(2000):
        d = method.direction(j)
    assert {method.rows.dtype, method.root.dtype, method.pseudo_momentum.dtype} == {torch.float32}
    assert d.dtype == torch.bfloat16
    torch.testing.assert_close(method.rows, torch.full((2, 4), 1 - 0.999**2000), rtol=1e-3, atol=0)


def test_bad_hyperparameters():
    for name in ("beta1", "beta2"):
        with pytest.raises(ValueError, match=rf"`{name}` must be in \[0, 1\), found 1"):
            gradbal.create("m_config", **{name: 1.0})
    with pytest.raises(ValueError, match=r"`per_step` must be in \[1, inf\), found 0"):
        gradbal.create("m_config", per_step=0)
    with pytest.raises(TypeError, match=r"`per_step` must be an integer, found 2\.0"):
        gradbal.create("m_config", per_step=2.0)
    with pytest.raises(ValueError, match="`eps` must be in"):
        gradbal.create("m_config", eps=-1e-8)
    with pytest.raises(ValueError, match="`a` must be positive"):
        gradbal.create("m_config", a=[1.0, 0.0])
    with pytest.raises(ValueError, match="`length` must be one of"):
        gradbal.create("m_config", length="sum")


# From end to end.


class _Counted(torch.autograd.Function):
    passes: ClassVar[int] = 0

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        _Counted.passes += 1
        return grad


def _fresh(**options: object):
    model = make("Plain")
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
    return model, gradbal.MultiTaskOptimizer(sgd, "m_config", **options)


def _batches(n: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(8)
    return [torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in range(n)]


def _step(model, opt, batch: Tensor, pieces: int = 1) -> None:
    opt.zero_grad()
    for k, part in enumerate(batch.chunk(pieces)):
        opt.backward([l / pieces for l in model.losses(part)], accumulate=k < pieces - 1)
    opt.step()


@pytest.mark.parametrize(("per_step", "pieces"), [(1, 1), (1, 3), (2, 1), (2, 2)])
def test_end_to_end_against_the_loop(per_step: int, pieces: int) -> None:
    model, opt = _fresh(per_step=per_step)
    loop, turn = Loop(3), 0
    for batch in _batches(10):
        chosen = [(turn + k) % 3 for k in range(per_step)]
        turn += per_step
        rows, _ = task_gradients(model, lambda twin: _mean_losses(twin, batch.chunk(pieces)))  # noqa: B023
        names = shared_names(rows)
        j = jacobian(rows, names).numpy()
        wanted = loop.direction({i: j[i] for i in chosen})
        _step(model, opt, batch, pieces)
        found = torch.cat([model.get_parameter(n).grad.view(-1) for n in names])
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-9)
        for i, head in enumerate(model.heads):
            if i in chosen:
                torch.testing.assert_close(head.weight.grad, rows[i][f"heads.{i}.weight"])
            else:
                assert head.weight.grad is None
                assert head.bias.grad is None
    assert opt.weights is None


def _mean_losses(model, parts: Sequence[Tensor]) -> list[Tensor]:
    losses = [model.losses(part) for part in parts]
    return [torch.stack(l).mean() for l in zip(*losses, strict=True)]


@pytest.mark.parametrize("per_step", [1, 2, 3])
def test_as_many_backward_passes_as_tasks_in_turn(per_step: int) -> None:
    model, opt = _fresh(per_step=per_step)
    for batch in _batches(4):
        _Counted.passes = 0
        z = _Counted.apply(model.trunk(batch))
        opt.backward(targets([head(z) for head in model.heads]))
        assert _Counted.passes == per_step


@pytest.mark.parametrize("steps", range(8))
def test_a_checkpoint_at_every_phase(steps: int) -> None:
    model, opt = _fresh()
    batches = _batches(steps + 5)
    for batch in batches[:steps]:
        _step(model, opt, batch)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, file)
    file.seek(0)
    checkpoint = torch.load(file, weights_only=True)
    twin, other = _fresh()
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    twin.load_state_dict(checkpoint["model"])
    other.load_state_dict(checkpoint["opt"])
    for batch in batches[steps:]:
        _step(model, opt, batch)
        _step(twin, other, batch)
        assert_same(snapshot(twin, other), snapshot(model, opt))


def test_the_turn_stays_until_the_micro_batches_are_aggregated() -> None:
    model, opt = _fresh()
    whole_model, whole = _fresh()
    for batch in _batches(7):
        _step(model, opt, batch, pieces=3)
        whole.zero_grad()
        whole.backward(_mean_losses(whole_model, batch.chunk(3)))
        whole.step()
        assert opt.aggregator.queue == whole.aggregator.queue
    for p, q in zip(model.parameters(), whole_model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-9)


def _spoiled(model, batch: Tensor, where: str) -> list[Tensor]:
    losses = model.losses(batch)
    bad = float("nan") if where == "loss" else root_at_zero(model.trunk[0].weight)
    losses[1] = losses[1] * bad if where == "loss" else losses[1] + bad
    return losses


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_a_step_left_out_is_not_a_turn(nonfinite: str) -> None:
    model, opt = _fresh(nonfinite=nonfinite)
    for batch in _batches(4):
        _step(model, opt, batch)
    before = snapshot(model, opt)
    assert opt.aggregator.tasks_in_turn(3) == [1]
    for where in ("loss", "gradient"):
        losses = _spoiled(model, batch, where)
        if nonfinite == "raise":
            with pytest.raises(gradbal.NonFiniteError):
                opt.backward(losses)
        else:
            opt.backward(losses)
            opt.step()
        assert_same(snapshot(model, opt), before)


def test_a_dropped_task_lets_the_next_one_go_first_and_comes_back() -> None:
    model, opt = _fresh(nonfinite="drop")
    for batch in _batches(3):
        _step(model, opt, batch)
    turns = []
    for bad in (True, True, True, False, False, False):
        before = copy.deepcopy(opt.aggregator.turns)
        opt.zero_grad()
        losses = _spoiled(model, batch, "loss") if bad else model.losses(batch)
        opt.backward(losses)
        opt.step()
        turns += [i for i in range(3) if opt.aggregator.turns[i] > before[i]]
        assert model.heads[turns[-1]].weight.grad is not None
    assert turns == [0, 2, 0, 1, 2, 0]
    assert opt.diagnostics()["dropped"] == {1: 3}
    assert opt.diagnostics()["skipped"] == 0


def test_a_gradient_that_is_never_finite_does_not_stop_the_others() -> None:
    # Only when its turn has come does a finite loss show that its gradient is not.
    model, opt = _fresh(nonfinite="drop")
    for batch in _batches(3):
        _step(model, opt, batch)
    row = opt.aggregator.rows[1].clone()
    for _ in range(6):
        opt.zero_grad()
        opt.backward(_spoiled(model, batch, "gradient"))
        opt.step()
    assert opt.aggregator.turns == [3, 1, 3]
    assert torch.equal(opt.aggregator.rows[1], row)
    assert opt.diagnostics()["skipped"] == 2


def test_a_micro_batch_that_spoils_the_turn_leaves_the_step_out() -> None:
    model, opt = _fresh(nonfinite="drop")
    for batch in _batches(4):
        _step(model, opt, batch)
    weights = copy.deepcopy(model.state_dict())
    assert opt.aggregator.tasks_in_turn(3) == [1]
    opt.zero_grad()
    opt.backward(model.losses(batch), accumulate=True)
    opt.backward(_spoiled(model, batch, "loss"))
    opt.step()
    assert_same(model.state_dict(), weights)
    assert opt.diagnostics()["skipped"] == 1
    assert opt.aggregator.tasks_in_turn(3) == [2]
    _step(model, opt, batch)
    assert opt.aggregator.turns == [2, 1, 2]
