"""Experts run as one, against the same one after another."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from gradbal.nn._experts import Experts, mix

x = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def perceptron():
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


def experts(factory=perceptron, n=3, batched=True):
    return Experts([factory() for _ in range(n)], batched, "the experts").double()


def runs_as_one(made, inputs=x):
    """Whether a pass through them is a batched one, from beginning to end."""
    calls = []
    original = type(made).__dict__["_at_once"]

    def counted(self, inputs):
        calls.append(None)
        output = original(self, inputs)
        calls[-1] = "done"
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Experts, "_at_once", counted)
        made(inputs)
    return calls == ["done"]


def convolution():
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2), nn.GroupNorm(1, 3), nn.Flatten()
    )


class Tied(nn.Module):
    """One weight used twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("factory", [perceptron, convolution, Tied, lambda: nn.BatchNorm1d(4)])
def test_outputs_and_gradients_are_those_of_a_loop(factory):
    made = experts(factory).eval()
    assert runs_as_one(made)
    loop = copy.deepcopy(made)
    loop._batched = False
    assert not runs_as_one(loop)
    assert list(made.state_dict()) == list(loop.state_dict())
    weights = torch.randn_like(loop(x))
    for used in (made, loop):
        (used(x) * weights).sum().backward()
    torch.testing.assert_close(made(x), loop(x))
    for p, q in zip(made.parameters(), loop.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    again = [expert(x) for expert in made]
    torch.testing.assert_close(made(x), torch.stack(again))


def test_frozen_parameters_get_no_gradients():
    made = experts()
    made[1][0].weight.requires_grad_(False)
    made(x).sum().backward()
    assert [p.grad is None for p in made.parameters()] == [
        not p.requires_grad for p in made.parameters()
    ]


class WithBranch(nn.Linear):
    """What it does depends on its input, which a batched pass cannot follow."""

    def forward(self, x):
        y = super().forward(x)
        return y if y.sum() > 0 else -y


class Named(nn.Linear):
    """A module with settings of its own."""

    def __init__(self, slope, unknown=None):
        super().__init__(4, 2)
        self.slope, self.unknown = slope, unknown

    def forward(self, x):
        return self.slope * super().forward(x)


LOOPED = {
    "branches": [lambda: WithBranch(4, 2)] * 3,
    "statistics": [lambda: nn.BatchNorm1d(4)] * 3,
    "power iterations": [lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 2).double())]
    * 3,
    "other modules": [nn.Tanh, nn.Sigmoid, nn.Tanh],
    "other settings": [lambda: Named(1.0), lambda: Named(2.0), lambda: Named(1.0)],
    "unknown settings": [lambda: Named(1.0, unknown=lambda: None)] * 3,
    "other depths": [
        lambda: nn.Sequential(nn.Tanh()),
        lambda: nn.Sequential(nn.Tanh(), nn.Tanh()),
        lambda: nn.Sequential(nn.Tanh()),
    ],
}


@pytest.mark.parametrize("case", LOOPED)
def test_what_cannot_run_as_one_runs_in_a_loop(case):
    made = Experts([make() for make in LOOPED[case]], True, "the experts").double().train()
    twins = copy.deepcopy(list(made))
    outputs = made(x)
    for y, twin in zip(outputs, twins, strict=True):
        torch.testing.assert_close(y, twin(x))
    assert not runs_as_one(made)
    for expert, twin in zip(made, twins, strict=True):
        twin(x)
        for value, other in zip(expert.buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(value, other)


def test_hooks_run_once_for_each_expert():
    made = experts()
    assert runs_as_one(made)
    seen = []
    handles = [e[0].register_forward_hook(lambda *_: seen.append(1)) for e in made]
    made(x)
    assert len(seen) == 3
    for handle in handles:
        handle.remove()
    assert runs_as_one(made)


def test_one_expert_in_another_mode():
    made = experts(lambda: nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))).eval()
    assert runs_as_one(made)
    made[1].train()
    assert not runs_as_one(made)
    assert (made(x)[1] == 0).any()
    assert not (made(x)[0] == 0).any()


def test_dropout_differs_between_experts():
    made = experts(lambda: nn.Sequential(nn.Linear(2, 2, bias=False), nn.Dropout(0.5)), n=2)
    with torch.no_grad():
        for expert in made:
            expert[0].weight.copy_(torch.eye(2))
    ones = torch.ones(1000, 2, dtype=torch.float64)
    assert runs_as_one(made, ones)
    a, b = made(ones)
    assert set(a.unique().tolist()) == {0.0, 2.0}
    assert 0.4 < (a == b).double().mean() < 0.6


def test_errors_are_those_of_the_loop_and_do_no_harm():
    made = experts()
    with pytest.raises(ValueError, match=r"expert 0 of the experts must fit .* \[6, 3\]"):
        made(x[:, :3])
    assert runs_as_one(made)


def test_copies_and_slices():
    made = experts()
    made(x)
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        torch.testing.assert_close(twin(x), made(x))
        assert runs_as_one(twin)
    assert len(made[:2]) == 2
    assert made[1] is list(made)[1]


def test_lazy_experts():
    made = experts(lambda: nn.LazyLinear(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made(x)
    assert runs_as_one(made)


@pytest.mark.parametrize("shape", [(3, 6, 2), (3, 6, 2, 4), (1, 6, 2)])
def test_mix(shape):
    outputs = torch.randn(shape, dtype=torch.float64)
    p = torch.rand(6, shape[0], dtype=torch.float64)
    want = torch.stack([sum(p[b, k] * outputs[k, b] for k in range(shape[0])) for b in range(6)])
    torch.testing.assert_close(mix(p, outputs), want)
    q = p[0]
    torch.testing.assert_close(mix(q, outputs), sum(q[k] * outputs[k] for k in range(shape[0])))
