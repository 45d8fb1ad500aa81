"""MMoE, CGC and PLE: gates, experts that run once, and what they are in their limits."""

import pytest
import torch
from torch import nn

from gradbal.nn import CGC, PLE, HardParameterSharing, MMoE
from gradbal.nn._gates import SoftmaxGate
from tests.nn.models import IN, TASKS, WIDTH, encoder, heads, staged

KEYS = ("a", "b", "c%2Ed")
x = torch.randn(6, IN, generator=torch.Generator().manual_seed(2))


def mmoe(n=3, **options):
    return MMoE(TASKS, encoder, heads(), num_experts=n, **{"gate_input_dim": IN} | options)


def cgc(**options):
    settings = {"num_shared": 2, "num_specific": 1, "gate_input_dim": IN}
    return CGC(TASKS, encoder, heads(), **settings | options)


def ple(stages=staged, **options):
    return PLE(TASKS, stages, heads(), **{"num_shared": 2, "num_specific": 1} | options)


def count_runs(model, kind=nn.Tanh):
    """A list that gets an entry at each pass through such a module."""
    ran = []
    for module in model.modules():
        if isinstance(module, kind):
            module.register_forward_hook(lambda module, *_: ran.append(module))
    return ran


def test_mmoe_is_the_formula():
    model = mmoe().double()
    z = x.double()
    outputs = [expert(z) for expert in model.experts]
    for key, task in zip(KEYS, TASKS, strict=True):
        gate = model.gates[key].linear
        p = (z @ gate.weight.T + gate.bias).softmax(1)
        torch.testing.assert_close(model.gate(z, task), p)
        want = sum(p[:, k, None] * outputs[k] for k in range(3))
        torch.testing.assert_close(model.features(z)[task], want)


def test_one_expert_is_hard_parameter_sharing():
    model = mmoe(1)
    plain = HardParameterSharing(TASKS, encoder, heads())
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("gates")}
    plain.load_state_dict({k.replace("experts.0.", "encoder."): v for k, v in state.items()})
    for task, y in plain(x).items():
        assert torch.equal(model(x)[task], y)


def test_gates_of_zeros_average():
    model = mmoe()
    with torch.no_grad():
        for p in model.gates.parameters():
            p.zero_()
    want = torch.stack([expert(x) for expert in model.experts]).mean(0)
    for z in model.features(x).values():
        torch.testing.assert_close(z, want)


def test_experts_and_rows_of_gates_permuted_together_change_nothing():
    model, other = mmoe().double(), mmoe().double()
    order = [2, 0, 1]
    state = model.state_dict()
    for i, j in enumerate(order):
        for name in ("0.weight", "0.bias"):
            state[f"experts.{i}.{name}"] = model.state_dict()[f"experts.{j}.{name}"]
    for key in KEYS:
        for name in ("weight", "bias"):
            full = f"gates.{key}.linear.{name}"
            state[full] = model.state_dict()[full][order]
    other.load_state_dict(state)
    for task, z in model.features(x.double()).items():
        torch.testing.assert_close(other.features(x.double())[task], z)


def test_gates_are_on_the_simplex():
    for model in (mmoe(), cgc(), ple(), ple(shared_stream=False)):
        gates = [module for module in model.modules() if isinstance(module, SoftmaxGate)]
        assert len(gates) >= len(TASKS)
        inputs = {}
        for gate in gates:
            gate.register_forward_pre_hook(
                lambda gate, args, inputs=inputs: inputs.update({gate: args})
            )
        model(100 * x)
        for gate in gates:
            p = gate(*inputs[gate])
            assert p.min() >= 0
            torch.testing.assert_close(p.sum(1), torch.ones(6))


def test_cgc_without_task_experts_is_mmoe():
    model = cgc(num_specific=0)
    other = mmoe(2)
    state = {
        k.replace("layer.shared_experts", "experts").replace("layer.gates", "gates"): v
        for k, v in model.state_dict().items()
    }
    other.load_state_dict(state)
    for task, y in model(x).items():
        assert torch.equal(other(x)[task], y)


def test_cgc_is_the_formula():
    model = cgc(num_specific={"a": 2, "b": 0, "c.d": 1}).double()
    z, layer = x.double(), model.layer
    for key, task in zip(KEYS, TASKS, strict=True):
        experts = [*layer.shared_experts, *layer.task_experts[key]]
        gate = layer.gates[key].linear
        p = (z @ gate.weight.T + gate.bias).softmax(1)
        assert p.shape[1] == len(experts)
        want = sum(p[:, k, None] * expert(z) for k, expert in enumerate(experts))
        torch.testing.assert_close(model.features(z)[task], want)


def test_ple_of_one_layer_is_cgc():
    for shared_stream in (True, False):
        model = ple(lambda: nn.ModuleList([encoder()]), shared_stream=shared_stream)
        other = cgc()
        model(x)
        other.load_state_dict(
            {k.replace("layers.0", "layer"): v for k, v in model.state_dict().items()}
        )
        for task, y in model(x).items():
            assert torch.equal(other(x)[task], y)


@pytest.mark.parametrize("shared_stream", [True, False])
def test_ple_is_the_formula(shared_stream):
    model = ple(num_specific={"a": 2, "b": 0, "c.d": 1}, shared_stream=shared_stream).double()
    model(x.double())

    def mixture(gate, v, outputs):
        p = (v @ gate.linear.weight.T + gate.linear.bias).softmax(1)
        assert p.shape[1] == len(outputs)
        return sum(p[:, k, None] * y for k, y in enumerate(outputs))

    common, own = x.double(), dict.fromkeys(KEYS, x.double())
    for l, layer in enumerate(model.layers):
        found = {key: [e(own[key]) for e in layer.task_experts[key]] for key in KEYS}
        shared = {
            key: [e(common if shared_stream else own[key]) for e in layer.shared_experts]
            for key in KEYS
        }
        if shared_stream and l < 2:
            everything = [*shared["a"], *(y for key in KEYS for y in found[key])]
            common = mixture(layer.shared_gate, common, everything)
        else:
            assert layer.shared_gate is None
        own = {
            key: mixture(layer.gates[key], own[key], [*shared[key], *found[key]]) for key in KEYS
        }
    for key, task in zip(KEYS, TASKS, strict=True):
        torch.testing.assert_close(model.features(x.double())[task], own[key])


def test_each_expert_runs_once():
    for model, n_experts in ((mmoe(3), 3), (cgc(), 5), (ple(), 15)):
        model(x)
        ran = count_runs(model)
        model(x)
        assert len(ran) == len(set(ran)) == n_experts
    # Without a shared stream the shared experts run for each task, but for the first layer.
    model = ple(shared_stream=False)
    model(x)
    ran = count_runs(model)
    model(x)
    assert len(ran) == (2 + 3) + 2 * (3 * 2 + 3)
    ran.clear()
    model(x, task="a")
    assert len(ran) == 3 * (2 + 1)


def test_gates_see_channel_means_of_images():
    def convolution():
        return nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten())

    images = torch.randn(4, 3, 5, 5)
    model = MMoE(TASKS, convolution, heads(18), num_experts=2, example=images)
    gate = model.gates["a"].linear
    assert type(gate) is nn.Linear
    want = (images.mean((2, 3)) @ gate.weight.T + gate.bias).softmax(1)
    torch.testing.assert_close(model.gate(images, "a"), want)


def test_a_batch_that_gates_cannot_see_needs_a_gate_encoder():
    class Last(nn.Module):
        def forward(self, x):
            return x[:, -1]

    def sequences():
        return nn.Sequential(Last(), nn.Linear(IN, WIDTH))

    words = torch.randn(2, 7, IN)
    for model in (
        MMoE(TASKS, sequences, heads(), num_experts=2),
        CGC(TASKS, sequences, heads(), num_shared=1, num_specific=1),
    ):
        with pytest.raises(ValueError, match=r"`gate_encoder` must be given .* found \[2, 7, 4\]"):
            model(words)
    model = MMoE(TASKS, sequences, heads(), num_experts=2, gate_encoder=Last(), example=words)
    assert model.gate(words, "b").shape == (2, 2)


def test_lazy_gates_draw_no_number_twice():
    def make():
        torch.manual_seed(5)
        return MMoE(TASKS, encoder, heads(), num_experts=2, example=x)

    drawn = {p.flatten()[0].item() for p in make().parameters()}
    torch.manual_seed(5)
    made = make()
    assert nn.Linear(IN, 2).weight[0, 0].item() not in drawn
    for p, q in zip(made.parameters(), make().parameters(), strict=True):
        assert torch.equal(p, q)


def test_perturbed_experts_differ():
    first = encoder()

    def pretrained():
        made = encoder()
        made.load_state_dict(first.state_dict())
        return made

    def weights(perturb):
        model = MMoE(TASKS, pretrained, heads(), num_experts=2, gate_input_dim=IN, perturb=perturb)
        return [expert[0].weight for expert in model.experts]

    assert all(torch.equal(w, first[0].weight) for w in weights(0.0))
    a, b = weights(1e-3)
    size = first[0].weight.square().mean().sqrt()
    for w in (a, b):
        assert 1e-4 < (w - first[0].weight).square().mean().sqrt() / size < 1e-2
    assert not torch.equal(a, b)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (mmoe, {"n": 0}, "`num_experts` must be in"),
        (mmoe, {"gate_input_dim": 0}, "`gate_input_dim` must be in"),
        (mmoe, {"perturb": -1.0}, "`perturb` must be in"),
        (mmoe, {"batched": "yes"}, "`batched` must be one of"),
        (mmoe, {"gate_input_dim": IN + 1, "example": x}, r"a gate \(`gate_input_dim`\) must fit"),
        (cgc, {"num_shared": 0}, "tasks would share no parameters"),
        (cgc, {"num_specific": -1}, "`num_specific` must be in"),
        (cgc, {"num_specific": {"a": 1, "b": 1}}, "found none for 'c.d'"),
        (cgc, {"num_specific": dict.fromkeys(TASKS, 1) | {"aa": 1}}, "did you mean `a`"),
        (ple, {"num_shared": 0}, "tasks would share no parameters"),
        (ple, {"shared_stream": None}, "`shared_stream` must be one of"),
        (ple, {"gate_input_dims": [IN]}, "one entry for each of 3 layers, found 1"),
        (ple, {"gate_encoders": [None] * 4}, "one entry for each of 3 layers, found 4"),
        (
            ple,
            {"stages": lambda: nn.ModuleList([nn.Linear(IN, 3), nn.Linear(4, 5)]), "example": x},
            r"expert 0 of the experts of task 'a' in layer 1 must fit its input, found .* \[6, 3\]",
        ),
    ],
)
def test_wrong_arguments(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (mmoe, {"n": 2.0}, "`num_experts` must be an integer"),
        (mmoe, {"gate_encoder": lambda x: x}, "`gate_encoder` must be a module or None"),
        (ple, {"stages": encoder, "gate_input_dims": 4}, "must be a sequence, one for each layer"),
        (ple, {"stages": lambda: nn.Linear(IN, WIDTH)}, "of its stages, found Linear"),
    ],
)
def test_wrong_types(make, options, message):
    with pytest.raises(TypeError, match=message):
        make(**options)


def test_experts_must_be_independent():
    expert, weight = encoder(), nn.Parameter(torch.zeros(WIDTH, IN))

    def tied():
        made = nn.Linear(IN, WIDTH)
        made.weight = weight
        return made

    for factory, what in ((lambda: expert, "module, Sequential"), (tied, "tensor, Parameter")):
        with pytest.raises(ValueError, match=f"the same {what}, in calls 1 and 2"):
            MMoE(TASKS, factory, heads(), num_experts=2)


def test_experts_of_different_widths():
    widths = iter((5, 6))
    with pytest.raises(ValueError, match=r"one shape, found \[6, 5\] .* \[6, 6\] of expert 1"):
        MMoE(TASKS, lambda: nn.Linear(IN, next(widths)), heads(), num_experts=2, example=x)
    widths = iter((5, 1, 1, 1))
    with pytest.raises(ValueError, match=r"one shape, found \[\[6, 5\], \[6, 1\]\]"):
        CGC(
            TASKS,
            lambda: nn.Linear(IN, next(widths)),
            heads(),
            num_shared=1,
            num_specific=1,
            example=x,
        )
