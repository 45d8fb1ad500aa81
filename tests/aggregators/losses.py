"""What tests of the methods that look at the losses alone have in common."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD

import gradbal
from gradbal import MultiTaskOptimizer, Scalarizer
from tests.states import assert_same
from tests.zoo import make


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_losses(seed: int, n_tasks: int, spread: float = 1e3) -> np.ndarray:
    """Positive losses `[T]`, log-uniform."""
    return spread ** np.random.default_rng(seed).uniform(-0.5, 0.5, n_tasks)


def derivative(value: Callable[[np.ndarray], float], at: np.ndarray) -> np.ndarray:
    """By central differences, with steps relative to each entry."""
    result = []
    for i, x in enumerate(at):
        step = np.zeros_like(at)
        step[i] = 1e-6 * abs(x)
        result.append((value(at + step) - value(at - step)) / (2 * step[i]))
    return np.asarray(result)


def seen(method: Scalarizer, *losses: Sequence[float]) -> Scalarizer:
    """The method after steps with these losses."""
    for each in losses:
        method.observe(vector(*each))
    return method


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


ACTIONS = ("backward", "step", "backward", "step", "end_epoch") * 3


def _act(action: str, model: nn.Module, opt: MultiTaskOptimizer) -> None:
    if action == "backward":
        opt.zero_grad()
        opt.backward(model.losses(model.batch()))
    else:
        getattr(opt, action)()


def _trained(opt: MultiTaskOptimizer) -> list[Tensor]:
    return [p for group in opt.param_groups for p in group["params"]]


def assert_resumes_anywhere(name: str, **keywords: Any) -> None:
    """A run of six steps in three epochs, saved and loaded after any of its calls, goes on bit for
    bit as if nothing had been; the gradients are kept beside the checkpoint."""

    def start() -> tuple[nn.Module, MultiTaskOptimizer]:
        if "generator" in gradbal.info(name).hyperparameters:
            keywords["generator"] = torch.Generator().manual_seed(3)
        model = make("Plain")
        return model, MultiTaskOptimizer(SGD(model.parameters(), lr=0.01), name, **keywords)

    model, opt = start()
    history = []
    for action in ACTIONS:
        history.append(
            through_a_file(
                {
                    "model": model.state_dict(),
                    "grads": [p.grad for p in _trained(opt)],
                    "opt": copy.deepcopy(opt.state_dict()),
                }
            )
        )
        _act(action, model, opt)
    for done, saved in enumerate(history):
        twin, other = start()
        twin.load_state_dict(saved["model"])
        other.load_state_dict(saved["opt"])
        for p, grad in zip(_trained(other), saved["grads"], strict=True):
            p.grad = grad
        for action in ACTIONS[done:]:
            _act(action, twin, other)
        assert_same(other.state_dict(), opt.state_dict())
        assert_same(twin.state_dict(), model.state_dict())


def assert_reads_nothing(method: Scalarizer, n_tasks: int = 3) -> None:
    """Three epochs of two steps each on tensors that have no values to read."""
    losses = torch.ones(n_tasks, device="meta")
    for _ in range(3):
        for _ in range(2):
            method.prepare(n_tasks, losses)
            w = method.loss_weights(losses)
            assert (w.device.type, w.shape) == ("meta", (n_tasks,))
            method.observe(losses)
        method.end_epoch()
