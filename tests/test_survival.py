"""Every method through what happens to a run: the table method × trial.

`python -m tests.test_survival` prints it. ✓: the method was trained through the trial and came out
as it should. –: the trial is not for this method, which refuses it with an error that says why;
that error was seen. ✗: it failed.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD

import gradbal
from gradbal import MultiTaskOptimizer, NonFiniteError
from tests.drive import DRIVERS, Call, Driver
from tests.states import assert_same, snapshot
from tests.test_resume import check_cuts, checkpointed, copied
from tests.zoo import targets

STEPS = 3


@dataclass
class _Run(Driver):
    """A driver that can also do what the trials want.

    dtype: of model and batches; float32 ones have entries that bfloat16 can hold. change: of the
    losses. scaler: unscales and steps. micro: the batch comes in two halves.
    """

    dtype: torch.dtype = torch.float64
    change: Callable[[list[Tensor]], list[Tensor]] = lambda losses: losses
    scaler: GradScaler | None = None
    micro: bool = False

    def model(self) -> nn.Module:
        model = super().model()
        return model if self.dtype == torch.float64 else model.bfloat16().to(self.dtype)

    def batch(self, step: int, which: int) -> Tensor:
        batch = super().batch(step, which)
        return batch if self.dtype == torch.float64 else batch.bfloat16().to(self.dtype)

    def losses(self, model: nn.Module, call: Call, which: int) -> list[Tensor]:
        return self.change(super().losses(model, call, which))

    def make(self, model: nn.Module, opt: MultiTaskOptimizer, call: Call) -> None:
        if call.what == "step" and self.scaler is not None:
            self.scaler.step(opt)
            self.scaler.update()
        else:
            super().make(model, opt, call)

    def _backward(self, model: nn.Module, opt: MultiTaskOptimizer, call: Call) -> None:
        if opt.aggregator.needs_features:
            z = model.trunk(self.batch(call.step, 0))
            losses = self.change(targets([head(z) for head in model.heads]))
            if call in self.spoiled:
                losses[1] = losses[1] * float("nan")
            opt.backward(losses, features=z, grad_scaler=self.scaler)
        elif self.micro:
            for i, half in enumerate(self.batch(call.step, 0).chunk(2)):
                losses = [l / 2 for l in model.losses(half)]
                opt.backward(losses, accumulate=i == 0, grad_scaler=self.scaler)
        else:
            n = getattr(opt.aggregator, "n_batches", 1)
            others = [self.losses(model, call, k) for k in range(1, n)]
            losses = self.losses(model, call, 0)
            opt.backward(losses, independent=others, grad_scaler=self.scaler)

    def trained(self, steps: int = STEPS) -> tuple[nn.Module, MultiTaskOptimizer]:
        torch.manual_seed(7)
        model, opt = self.fresh()
        self.run(model, opt, range(steps))
        return model, opt


def _sgd(parameters: Any) -> SGD:
    # Adam would blow up the rounding of tiny gradients.
    return SGD(parameters, lr=0.1)


def _run(name: str, **more: Any) -> _Run:
    method, keywords = DRIVERS[name]
    return _Run(method, dict(keywords), **({"wrapped": _sgd} | more))


def _flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().double().reshape(-1) for p in model.parameters()])


def _assert_near(model: nn.Module, twin: nn.Module, start: nn.Module, tolerance: float) -> None:
    """Two runs have moved by the same, relative to how far that is."""
    moved = _flat(twin) - _flat(start)
    assert float(moved.norm()) > 1e-3
    error = float((_flat(model) - _flat(twin)).norm() / moved.norm())
    assert error <= tolerance, f"off by {error:g} of the way"


def _steps_by_closure(name: str) -> bool:
    return [call.what for call in _run(name).calls(range(1))] == ["step"]


# The trials. Each returns whether it is for this method; if not, its refusal was seen.


def resume(name: str) -> bool:
    check_cuts(_run(name), checkpointed, range(2, 3))
    return True


def scaler(name: str) -> bool:
    if _steps_by_closure(name):
        _, opt = _run(name).fresh()
        with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
            GradScaler("cpu").step(opt, closure=lambda: None)
        return False
    scales = 1.0, 65536.0
    runs = [_run(name, dtype=torch.float32, scaler=GradScaler("cpu", init_scale=s)) for s in scales]
    (plain, _), (scaled, _) = (run.trained() for run in runs)
    assert [run.scaler.get_scale() for run in runs] == [*scales]
    _assert_near(scaled, plain, runs[0].model(), 1e-4)
    return True


def bf16(name: str) -> bool:
    narrow, wide = (_run(name, dtype=d) for d in (torch.bfloat16, torch.float32))
    model, _ = narrow.trained()
    twin, _ = wide.trained()
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert bool(_flat(model).isfinite().all())
    # Entries are rounded by up to 2^-9, those of parameters by a hundredth of a step; over three
    # steps the methods that follow differences of losses are off by up to 4 % of the way.
    _assert_near(model, twin, wide.model(), 0.1)
    return True


def nan(name: str) -> bool:
    what = "step" if _steps_by_closure(name) else "backward"
    spoiled = frozenset([Call(1, what)])
    run = _run(name, spoiled=spoiled, options={"nonfinite": "raise"})
    model, opt = run.trained(1)
    calls = list(run.calls(range(1, STEPS)))
    while calls[0] != Call(1, what):
        run.make(model, opt, calls.pop(0))
    before = snapshot(model, opt)
    with pytest.raises(NonFiniteError):
        run.make(model, opt, calls[0])
    after = snapshot(model, opt)
    if what == "step":
        # It has cleared them before it took its own.
        del before["gradients"], after["gradients"]
    assert_same(after, before)

    run = _run(name, spoiled=spoiled, options={"nonfinite": "skip"})
    model, opt = run.trained()
    assert opt.diagnostics()["skipped"] == 1
    assert bool(_flat(model).isfinite().all())
    assert not torch.equal(_flat(model), _flat(run.trained(1)[0]))
    return True


def one_task(name: str) -> bool:
    run = _run(name, change=lambda losses: losses[:1])
    needed = gradbal.create(run.name, **run.keywords).promises.min_tasks
    if needed > 1:
        with pytest.raises(ValueError, match=f"{needed}"):
            run.trained(1)
        return False
    model, _ = run.trained()
    assert bool(_flat(model).isfinite().all())
    start = run.model()
    assert not torch.equal(model.trunk[0].weight, start.trunk[0].weight)
    assert not torch.equal(model.heads[0].weight, start.heads[0].weight)
    assert torch.equal(model.heads[1].weight, start.heads[1].weight)
    return True


def _zeroed(losses: Sequence[Tensor]) -> list[Tensor]:
    return [losses[0], losses[1] * 0.0 + 1.0, *losses[2:]]


def zero_row(name: str) -> bool:
    run = _run(name, change=_zeroed)
    torch.manual_seed(7)
    model, opt = run.fresh()
    for call in run.calls(range(STEPS)):
        run.make(model, opt, call)
        assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    assert bool(_flat(model).isfinite().all())
    if opt.weights is None or opt.weights.tolist() != [0.0, 1.0, 0.0]:
        # The shortest convex combination is the zero row: for `mgda` the point is stationary.
        assert not torch.equal(_flat(model), _flat(run.model()))
    return True


def accumulation(name: str) -> bool:
    run = _run(name, micro=True)
    made = gradbal.create(run.name, **run.keywords)
    n = getattr(made, "n_batches", 1)
    if _steps_by_closure(name) or n > 1 or made.needs_features:
        model, opt = run.fresh()
        z = model.trunk(run.batch(0, 0))
        losses = targets([head(z) for head in model.heads])
        with pytest.raises(ValueError, match=r"accumulate|call step"):
            opt.backward(
                losses,
                features=z if made.needs_features else None,
                independent=[losses] * (n - 1),
                accumulate=True,
            )
        return False
    # Means over halves of a batch, halved, add up to the mean over it.
    _assert_near(run.trained()[0], _run(name).trained()[0], run.model(), 1e-6)
    return True


def deepcopy(name: str) -> bool:
    check_cuts(_run(name), copied, range(2, 3))
    return True


TRIALS: dict[str, Callable[[str], bool]] = {
    "resume": resume,
    "scaler": scaler,
    "bf16": bf16,
    "NaN": nan,
    "T=1": one_task,
    "zero row": zero_row,
    "accumulation": accumulation,
    "deepcopy": deepcopy,
}


# Methods that a trial is not for, and whose refusal it sees.
_CLOSURES = {"auto_lambda", "forum", "forum(window=2)", "marigold", "marigold(estimator=central)"}
_CLOSURES |= {"moml", "moml(model_batch=train+val)"}
_DOUBLE = {"modo", "modo(batches=3)", "sdmgrad"}
NOT_FOR: dict[str, set[str]] = {
    # torch's scaler takes no closure.
    "scaler": _CLOSURES,
    "T=1": {"krum", "trimmed_mean"},
    # Each takes another way through `backward`, or none.
    "accumulation": _CLOSURES | _DOUBLE | {"aligned_mtl_ub", "mgda_ub"},
}


@pytest.mark.parametrize("trial", TRIALS)
@pytest.mark.parametrize("name", DRIVERS)
def test_survives(name: str, trial: str) -> None:
    assert TRIALS[trial](name) == (name not in NOT_FOR.get(trial, ()))


def table() -> list[list[str]]:
    """A row for each method: its name, and for each trial "✓", "–" or "✗"."""
    rows = []
    for name in DRIVERS:
        row = [name]
        for trial, run in TRIALS.items():
            try:
                row.append("✓" if run(name) else "–")
            except Exception as e:
                row.append("✗")
                print(f"{name}, {trial}: {type(e).__name__}: {e}", file=sys.stderr)
        rows.append(row)
    return rows


def main() -> int:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    rows = table()
    widths = [max(len(row[0]) for row in rows), *map(len, TRIALS)]
    for row in [["", *TRIALS], *rows]:
        cells = [row[0].ljust(widths[0]), *map(str.center, row[1:], widths[1:])]
        print("  ".join(cells).rstrip())
    marks = [mark for row in rows for mark in row[1:]]
    print(
        f"{len(rows)} methods and variants, {len(marks)} trials: {marks.count('✓')} ✓, "
        f"{marks.count('–')} –, {marks.count('✗')} ✗"
    )
    return int("✗" in marks)


if __name__ == "__main__":
    sys.exit(main())
