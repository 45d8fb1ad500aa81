"""LearningToBranch: draws, warm-up, schedule, the tree of eval mode, and runs that are resumed."""

import copy
import io
import math

import pytest
import torch
from torch import nn

from gradbal.nn import LearningToBranch
from gradbal.nn._counted_noise import gumbel
from tests.nn.models import IN, TASKS, WIDTH, batch, heads, losses, staged


def ltb(tasks=TASKS, **options) -> LearningToBranch:
    options = {"warmup": 0.0, "generator": torch.Generator().manual_seed(5)} | options
    encoder = options.pop("encoder", staged)
    own = {task: nn.Linear(WIDTH, 1) for task in tasks}
    return LearningToBranch(tasks, encoder, options.pop("heads", own), **options).double()


def alone(model, task, x):
    """The task's own encoder and head, without any other."""
    for stage in model.encoders[task.replace(".", "%2E")]:
        x = stage(x)
    return model.heads[task.replace(".", "%2E")](x)


def test_rows_are_one_hot_in_training():
    model = ltb()
    seen = set()
    for _ in range(30):
        p = model.parents()
        assert p.shape == (2, 3, 3)
        assert set(p.flatten().tolist()) == {0.0, 1.0}
        assert torch.equal(p.sum(-1), torch.ones(2, 3, dtype=p.dtype))
        seen.add(tuple(p.argmax(-1).flatten().tolist()))
    assert len(seen) > 10


def test_parents_are_drawn_with_the_probabilities_of_the_logits():
    """χ² with 8 degrees of freedom in all: above 31.8 once in 10 000 times. Any τ: arg max."""
    model = ltb(tau=lambda progress: 0.3)
    want = torch.tensor([[0.2, 0.3, 0.5], [0.8, 0.1, 0.1], [1 / 3, 1 / 3, 1 / 3]]).double()
    with torch.no_grad():
        model.logits[0] = want.log() + 7
        model.logits[1] = model.logits[0]
        n = 2000
        counts = sum(model.parents() for _ in range(n))
    for found in counts:
        assert float(((found - n * want) ** 2 / (n * want)).sum()) < 31.8
    both = (counts / n).flatten()
    assert not torch.equal(both[:9], both[9:])


def test_the_noise_is_gumbel_s():
    """Mean γ and variance π²/6, by many states; different seeds and draws are uncorrelated."""
    states = [torch.tensor([seed, draw]) for seed in (0, 1, 2**62 - 1) for draw in range(3)]
    noise = torch.stack([gumbel(state, (20_000,), torch.float64) for state in states])
    assert bool(noise.isfinite().all())
    error = math.pi / math.sqrt(6 * 20_000)
    torch.testing.assert_close(
        noise.mean(1), torch.full((9,), 0.5772157).double(), rtol=0, atol=5 * error
    )
    torch.testing.assert_close(
        noise.var(1), torch.full((9,), math.pi**2 / 6).double(), rtol=0.08, atol=0
    )
    correlation = torch.corrcoef(noise) - torch.eye(9, dtype=torch.float64)
    assert float(correlation.abs().max()) < 5 / math.sqrt(20_000)
    along = torch.corrcoef(torch.stack([noise[:, 1:].flatten(), noise[:, :-1].flatten()]))
    assert abs(float(along[0, 1])) < 5 / math.sqrt(180_000)
    assert torch.equal(gumbel(states[4], (20_000,), torch.float64), noise[4])


def test_large_diagonals_are_separate_networks():
    model = ltb(heads=heads())
    with torch.no_grad():
        model.logits.copy_(1e4 * torch.eye(3))
    x = batch()
    for mode in (True, False):
        model.train(mode)
        for task, y in model(x).items():
            assert torch.equal(y, alone(model, task, x))
    assert model.branching() == [[0, 1, 2], [0, 1, 2]]


def test_the_straight_through_gradient():
    """That of the soft coefficients at the values of the hard ones, by the chain rule by hand."""
    model = ltb(("a", "b"), encoder=lambda: nn.ModuleList(list(staged())[:2]), tau=lambda p: 0.7)
    with torch.no_grad():
        model.logits.copy_(torch.tensor([[[0.3, -0.2], [0.1, 0.4]]]))
    x = batch()
    noise = gumbel(model.noise, (1, 2, 2), torch.float64)
    soft = ((model.logits + noise) / 0.7).softmax(-1).detach()[0]
    hard = nn.functional.one_hot(soft.argmax(-1), 2).double()
    y = torch.stack([model.encoders[t][0](x) for t in "ab"]).detach()
    z = torch.einsum("ji,inc->jnc", hard, y).requires_grad_()
    loss = sum(
        model.heads[t](model.encoders[t][1](z[j])).square().mean() for j, t in enumerate("ab")
    )
    (at_z,) = torch.autograd.grad(loss, z)
    at_p = torch.einsum("jnc,inc->ji", at_z, y)
    expected = soft * (at_p - (soft * at_p).sum(-1, keepdim=True)) / 0.7
    found = sum(v.square().mean() for v in model(x).values())
    torch.testing.assert_close(found.detach(), loss.detach())
    found.backward()
    torch.testing.assert_close(model.logits.grad[0], expected)
    assert bool(expected.any())


def test_warm_up_averages_and_logits_wait():
    model = ltb(warmup=0.25, heads=heads())
    with torch.no_grad():
        model.logits.normal_()
    x = batch()
    for step in (None, 0, 1):
        if step is not None:
            model.set_progress(step, 8)
        ys = [x] * 3
        for l in range(2):
            ys = [sum(model.encoders[k][l](ys[0]) for k in model.encoders) / 3] * 3
        outputs = model(x)
        for k, task in zip(model.encoders, TASKS, strict=True):
            expected = model.heads[k](model.encoders[k][2](ys[0]))
            torch.testing.assert_close(outputs[task], expected)
        model.zero_grad()
        sum(losses(model, x).values()).backward()
        assert not model.logits.grad.any()
    model.set_progress(2, 8)
    assert set(model.parents().flatten().tolist()) == {0.0, 1.0}
    sum(losses(model, x).values()).backward()
    assert bool(model.logits.grad.any())


def test_eval_is_arg_max_without_noise_also_in_warm_up():
    model = ltb(warmup=0.5, heads=heads())
    with torch.no_grad():
        model.logits.copy_(torch.tensor([[0, 2, 1], [1, 0, 3], [0, 9, 1]]).double())
    model.eval()
    assert model.branching() == [[1, 2, 1], [1, 2, 1]]
    x = batch()
    before = copy.deepcopy(model.state_dict())
    first, again = model(x), model(x)
    for task in TASKS:
        assert torch.equal(first[task], again[task])
        assert torch.equal(first[task], model(x, task=task))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    encoders = [model.encoders[k] for k in ("a", "b", "c%2Ed")]
    # Node 0 of the last stage has parent 1, which has parent 2.
    y = encoders[0][2](encoders[1][1](encoders[2][0](x)))
    torch.testing.assert_close(first["a"], model.heads["a"](y))


@pytest.mark.parametrize("seed", range(5))
def test_branching_is_a_tree(seed):
    torch.manual_seed(seed)
    model = ltb()
    with torch.no_grad():
        model.logits.normal_()
    parents = model.branching()
    assert len(parents) == 2
    assert all(len(stage) == 3 and all(p in range(3) for p in stage) for stage in parents)
    assert torch.equal(model.eval().parents().argmax(-1), torch.tensor(parents))
    # All nodes with parent 0: a tree with one root.
    with torch.no_grad():
        model.logits.zero_()[..., 0] = 1
    assert model.branching() == [[0, 0, 0], [0, 0, 0]]


def test_the_schedule():
    model = ltb(warmup=0.5)
    assert float(model.temperature) == 10
    falling = []
    for step in range(11):
        model.set_progress(step, 10)
        falling.append(float(model.temperature))
    assert falling == sorted(falling, reverse=True)
    assert falling[-1] == pytest.approx(0.1)
    model = ltb(tau=lambda progress: 2 - progress)
    model.set_progress(1, 4)
    assert float(model.temperature) == 1.75


def _trained(model, optimizer, steps):
    for step in steps:
        model.set_progress(step, 10)
        optimizer.zero_grad()
        sum(losses(model, batch(seed=step)).values()).backward()
        optimizer.step()


def test_a_run_from_a_checkpoint_is_the_same():
    whole = ltb(heads=heads(), warmup=0.2)
    optimizer = torch.optim.Adam(whole.parameters(), lr=0.05)
    _trained(whole, optimizer, range(5))
    file = io.BytesIO()
    torch.save([whole.state_dict(), optimizer.state_dict()], file)
    copied = copy.deepcopy(whole)
    _trained(whole, optimizer, range(5, 10))

    torch.manual_seed(99)
    resumed = ltb(heads=heads(), warmup=0.2, generator=torch.Generator().manual_seed(6))
    other = torch.optim.Adam(resumed.parameters(), lr=0.05)
    state, optimizer_state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    resumed.load_state_dict(state)
    other.load_state_dict(copy.deepcopy(optimizer_state))
    _trained(resumed, other, range(5, 10))

    third = torch.optim.Adam(copied.parameters(), lr=0.05)
    third.load_state_dict(copy.deepcopy(optimizer_state))
    _trained(copied, third, range(5, 10))
    for k, v in whole.state_dict().items():
        assert torch.equal(v, resumed.state_dict()[k]), k
        assert torch.equal(v, copied.state_dict()[k]), k
    assert int(whole.noise[1]) == 10


def test_the_global_random_state_is_left_alone():
    model = ltb(heads=heads())
    before = torch.get_rng_state()
    model(batch())
    model.eval()(batch())
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_shared():
    model = ltb(heads=heads())
    own = {id(p) for p in model.task_parameters("c.d")}
    parts = (model.heads["c%2Ed"], model.encoders["c%2Ed"][2])
    assert own == {id(p) for part in parts for p in part.parameters()}
    assert any(p is model.logits for p in model.shared_parameters())
    # Over enough draws every other parameter gets gradients from several tasks.
    shared = model.shared_parameters()
    reached = [set() for _ in shared]
    for _ in range(40):
        for task, loss in losses(model, batch()).items():
            gradients = torch.autograd.grad(loss, shared, retain_graph=True)
            for tasks, g in zip(reached, gradients, strict=True):
                if g.any():
                    tasks.add(task)
    assert all(len(tasks) > 1 for tasks in reached)


def test_a_single_task_is_a_single_network():
    model = ltb(("a",))
    x = batch()
    assert torch.equal(model(x)["a"], alone(model, "a", x))
    assert model.branching() == [[0], [0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup": 1.0}, r"`warmup` must be in \[0, 1\), found 1.0"),
        ({"tau": lambda progress: 0.0}, r"`tau\(0\)` must be in \(0, inf\), found 0.0"),
        ({"encoder": lambda: nn.Sequential(nn.Linear(IN, WIDTH))}, "at least two stages"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        ltb(**options)


def test_nodes_of_a_stage_have_one_shape():
    widths = iter([5, 6, 5])

    def encoder():
        width = next(widths)
        return nn.Sequential(nn.Linear(IN, width), nn.Linear(width, WIDTH))

    with pytest.raises(ValueError, match=r"nodes of stage 0 must .* found \(2, 5\) and \(2, 6\)"):
        ltb(encoder=encoder, example=torch.zeros(2, IN))
