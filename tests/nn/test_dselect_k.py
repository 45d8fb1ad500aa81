"""DSelect-k: the smooth step, selectors, gates, and the regularization."""

import itertools
import math

import pytest
import torch
from torch import nn

from gradbal.nn import DSelectK, HardParameterSharing
from gradbal.nn.dselect_k import smooth_step
from tests.nn.models import IN, TASKS, encoder, heads

x = torch.randn(6, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def model(n=4, k=2, **options):
    if options.get("per_example"):
        options = {"gate_input_dim": IN} | options
    return DSelectK(TASKS, encoder, heads(), num_experts=n, k=k, **options).double()


def logits(gate, n, k):
    """Sets what z is to random numbers, some of them outside ±γ/2."""
    b = math.ceil(math.log2(n))
    with torch.no_grad():
        if isinstance(gate.z, nn.Linear):
            gate.z.weight.normal_()
            return gate.z(x).view(6, k, b)
        gate.z.normal_()
        return gate.z.detach()


@pytest.mark.parametrize("gamma", [0.5, 1.0, 3.0])
def test_the_smooth_step_is_continuous_with_its_derivative(gamma):
    t = torch.linspace(-gamma, gamma, 4001, dtype=torch.float64)
    s = smooth_step(t, gamma)
    assert torch.equal(s[t <= -gamma / 2], torch.zeros_like(s[t <= -gamma / 2]))
    assert torch.equal(s[t >= gamma / 2], torch.ones_like(s[t >= gamma / 2]))
    inside = t.abs() < gamma / 2
    cubic = -2 / gamma**3 * t**3 + 3 / (2 * gamma) * t + 0.5
    torch.testing.assert_close(s[inside], cubic[inside])
    torch.testing.assert_close(s + s.flip(0), torch.ones_like(s))
    slopes = s.diff() / t.diff()
    assert slopes.min() >= 0
    # The derivative changes by at most max|S''| · step, and so jumps nowhere.
    assert slopes.diff().abs().max() <= 6 / gamma**2 * (t[1] - t[0]) * (1 + 1e-6)
    at = torch.tensor([-gamma / 2, 0.1 * gamma, gamma / 2], dtype=torch.float64, requires_grad=True)
    smooth_step(at, gamma).sum().backward()
    h = 1e-6 * gamma
    central = (smooth_step(at.detach() + h, gamma) - smooth_step(at.detach() - h, gamma)) / (2 * h)
    torch.testing.assert_close(at.grad, central, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.parametrize(("n", "k"), [(2, 1), (3, 2), (4, 4), (5, 2), (8, 3)])
def test_selectors_are_products_over_bits(n, k, per_example):
    made = model(n, k, per_example=per_example, gamma=2.0)
    for task, key in zip(TASKS, ("a", "b", "c%2Ed"), strict=True):
        gate = made.gates[key]
        s = smooth_step(logits(gate, n, k), 2.0)
        b = s.shape[-1]
        everything = []
        for number in itertools.product((0, 1), repeat=b):
            factors = [s[..., j] if bit else 1 - s[..., j] for j, bit in enumerate(number)]
            everything.append(torch.stack(factors).prod(0))
        r = torch.stack(everything, -1)
        torch.testing.assert_close(r.sum(-1), torch.ones_like(r.sum(-1)))
        found = gate.selectors(x) if per_example else gate.selectors()
        torch.testing.assert_close(found, r[..., :n])
        assert found.min() >= 0
        a = gate.a(x) if per_example else gate.a
        q = made.gate(x, task)
        torch.testing.assert_close(q, (a.softmax(-1).unsqueeze(-1) * r[..., :n]).sum(-2))
        assert (q.sum(-1) <= 1 + 1e-12).all()
        if n == 2**b:
            torch.testing.assert_close(q.sum(-1), torch.ones_like(q.sum(-1)))


@pytest.mark.parametrize("per_example", [False, True])
def test_at_most_k_experts_are_selected_where_the_step_is_flat(per_example):
    made = model(8, 2, per_example=per_example)
    gate = made.gates["a"]
    with torch.no_grad():
        if per_example:
            gate.z.bias.zero_()
            gate.z.weight.normal_().mul_(1e6)
        else:
            gate.z.copy_(torch.tensor([[0.5, -0.5, 2.0], [-3.0, 0.7, 0.5]]))
    r = gate.selectors(x) if per_example else gate.selectors()
    assert set(r.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(r.sum(-1), torch.ones_like(r.sum(-1)))
    q = made.gate(x, "a")
    assert (q > 0).sum(-1).max() <= 2
    torch.testing.assert_close(q.sum(-1), torch.ones_like(q.sum(-1)))
    if not per_example:
        # The highest bit comes first: 101 and 011.
        assert q.nonzero().flatten().tolist() == [3, 5]
        z = made.features(x)["a"]
        torch.testing.assert_close(z, q[3] * made.experts[3](x) + q[5] * made.experts[5](x))


@pytest.mark.parametrize("per_example", [False, True])
def test_one_expert_is_hard_parameter_sharing(per_example):
    made = model(1, 1, per_example=per_example)
    plain = HardParameterSharing(TASKS, encoder, heads()).double()
    state = {k: v for k, v in made.state_dict().items() if not k.startswith("gates")}
    plain.load_state_dict({k.replace("experts.0.", "encoder."): v for k, v in state.items()})
    for task, y in plain(x).items():
        assert torch.equal(made(x)[task], y)
    assert made.regularization_loss(x) == 0


def test_gates_start_where_the_step_is_steepest():
    for per_example in (False, True):
        made = model(8, 3, per_example=per_example, gamma=4.0)
        for gate in made.gates.values():
            for part, bound in ((gate.z, 0.04), (gate.a, 0.05)):
                for p in part.parameters() if per_example else [part]:
                    assert bound / 10 < p.abs().max() <= bound
    # A gate that finds its width later starts no differently.
    lazy = DSelectK(
        TASKS, encoder, heads(), num_experts=8, k=3, per_example=True, example=x.float()
    )
    assert lazy.gates["a"].z.weight.abs().max() <= 0.01
    assert type(lazy.gates["a"].z) is nn.Linear


@pytest.mark.parametrize("per_example", [False, True])
def test_regularization(per_example):
    n, k, weight = 3, 2, 0.3
    made = model(n, k, per_example=per_example, entropy=weight)
    total = 0.0
    for task, key in zip(TASKS, ("a", "b", "c%2Ed"), strict=True):
        gate = made.gates[key]
        r = gate.selectors(x) if per_example else gate.selectors().unsqueeze(0)
        values = [
            sum(-weight * sum(p * math.log(p + 1e-6) for p in row) + 1 / sum(row) for row in sample)
            for sample in r.tolist()
        ]
        want = sum(values) / len(values)
        assert math.isclose(made.regularization_loss(x, task).item(), want, rel_tol=1e-12)
        total += want
    assert math.isclose(made.regularization_loss(x).item(), total, rel_tol=1e-12)
    made.regularization_loss(x, "b").backward()
    reached = {name.split(".")[1] for name, p in made.named_parameters() if p.grad is not None}
    assert reached == {"b"}


def test_regularization_is_finite_with_flat_selectors():
    made = model(3, 1, entropy=1.0)
    with torch.no_grad():
        made.gates["a"].z.copy_(torch.tensor([[1.0, -1.0]]))
    found = made.regularization_loss(task="a")
    torch.testing.assert_close(found, torch.ones_like(found), rtol=1e-5, atol=0)
    found.backward()
    assert torch.equal(made.gates["a"].z.grad, torch.zeros(1, 2, dtype=torch.float64))


def test_the_entropy_can_follow_the_progress():
    made = model(4, 2, entropy=lambda progress: 2 * progress)
    constant = model(4, 2, entropy=1.0)
    constant.load_state_dict(made.state_dict())
    assert made.regularization_loss() == 0
    made.set_progress(1, 2)
    torch.testing.assert_close(made.regularization_loss(), constant.regularization_loss())
    assert model(4, 2).regularization_loss() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 3, "k": 4}, "`k` must be at most `num_experts`, 3, found 4"),
        ({"k": 0}, "`k` must be in"),
        ({"n": 0}, "`num_experts` must be in"),
        ({"gamma": 0.0}, r"`gamma` must be in \(0"),
        ({"entropy": -1.0}, "`entropy` must be in"),
        ({"gate_input_dim": IN}, "are for per_example=True"),
        ({"gate_encoder": nn.Identity()}, "are for per_example=True"),
        ({"per_example": 1}, "`per_example` must be one of"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        model(**options)


def test_regularization_of_gates_that_depend_on_the_batch_needs_it():
    with pytest.raises(ValueError, match="`x` must be the batch"):
        model(3, 2, per_example=True).regularization_loss()
    assert model(4, 2, per_example=True).regularization_loss() == 0
