"""GradVac: the vectors themselves, its targets from step to step, by column group."""

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD

import gradbal
from gradbal import MultiTaskOptimizer
from gradbal.aggregators import gradvac as module
from gradbal.aggregators.gradvac import gradvac
from gradbal.aggregators.pcgrad import random_orders
from tests.aggregators.inputs import random_rows
from tests.gradients import assert_gradients, jacobian, shared_names, task_gradients
from tests.states import assert_same, snapshot
from tests.zoo import make


def seeded(seed=3, **keywords):
    return gradbal.create("gradvac", generator=torch.Generator().manual_seed(seed), **keywords)


def corrected(j, target, orders, beta):
    """The sum of the corrected vectors by the paper's formula; moves `target [T, T]`."""
    total = np.zeros(j.shape[1])
    for i, order in enumerate(orders):
        v = j[i].copy()
        for k in order:
            lengths = np.linalg.norm(v), np.linalg.norm(j[k])
            if not all(lengths):
                continue
            cosine, hat = v @ j[k] / lengths[0] / lengths[1], target[i, k]
            if cosine < hat:
                turn = hat * np.sqrt(1 - cosine**2) - cosine * np.sqrt(1 - hat**2)
                v += lengths[0] * turn / (lengths[1] * np.sqrt(1 - hat**2)) * j[k]
            target[i, k] = (1 - beta) * hat + beta * cosine
        total += v
    return total


@pytest.mark.parametrize(("n_tasks", "width"), [(2, 5), (3, 20), (7, 9), (17, 30), (40, 60)])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_the_vectors_themselves_over_five_steps(n_tasks, width, scale):
    method, generator = seeded(beta=0.3), torch.Generator().manual_seed(3)
    target = np.zeros((n_tasks, n_tasks))
    for step in range(5):
        j = (random_rows(n_tasks, width, step, spread=1e4) - 0.2) * scale
        wanted = corrected(j, target, random_orders(n_tasks, generator).numpy(), 0.3)
        found = method.direction(torch.from_numpy(j)).numpy()
        size = np.linalg.norm(j, axis=1).sum()
        assert np.linalg.norm(found - wanted) < 1e-12 * size
        np.testing.assert_allclose(method.target[0].numpy(), target, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n_tasks", [1, 2, 3, 16])
@pytest.mark.parametrize("n_groups", [1, 4])
def test_pairs_and_steps_agree(n_tasks, n_groups, monkeypatch):
    rng = np.random.default_rng(0)
    rows = torch.from_numpy(rng.standard_normal((n_groups, n_tasks, 9)))
    rows[-1, 0] = 0.0
    target = torch.from_numpy(rng.uniform(-1, 1, (n_groups, n_tasks, n_tasks)))
    found = []
    for few in (0, 1000):
        monkeypatch.setattr(module, "_FEW", few)
        orders = random_orders(n_tasks, torch.Generator().manual_seed(1))
        found.append(gradvac(rows @ rows.mT, target, orders, beta=0.2))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("hat", [-0.5, 0.0, 0.3, 0.9, 0.999999])
@pytest.mark.parametrize("seed", range(10))
def test_the_corrected_cosine_of_two_tasks_is_the_target(hat, seed):
    j = torch.from_numpy(random_rows(2, 5, seed, spread=100.0) - 0.6)
    j[0] -= 2 * j[0].norm() / j[1].norm() * j[1]  # a cosine below all these targets
    target = torch.tensor([[[0.0, hat], [-1.0, 0.0]]], dtype=torch.float64)
    w, _ = gradvac((j @ j.T)[None], target, torch.tensor([[1], [0]]))
    assert w[0, 0] == 1  # the second task stays as it is
    turned = w[0] @ j - j[1]
    assert float(turned @ j[1] / turned.norm() / j[1].norm()) == pytest.approx(hat, abs=1e-9)


@pytest.mark.parametrize("n_tasks", [2, 5, 20])
def test_the_first_step_is_pcgrad_with_the_same_orders(n_tasks):
    for seed in range(10):
        j = torch.from_numpy(random_rows(n_tasks, 12, seed, spread=1e3) - 0.3)
        pcgrad = gradbal.create("pcgrad", generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(seeded(seed).direction(j), pcgrad.direction(j))


def test_two_steps_by_hand():
    method = seeded(beta=0.5)
    half = 0.5**0.5
    d = method.direction(torch.tensor([[1.0, 0.0], [half, half]], dtype=torch.float64))
    torch.testing.assert_close(d, torch.tensor([1 + half, half], dtype=torch.float64))
    # The target is now half of cos 45°, 1/√8, whose tangent's inverse is 1/√7.
    d = method.direction(torch.eye(2, dtype=torch.float64) * torch.tensor([[3.0], [5.0]]))
    root = 7**-0.5
    torch.testing.assert_close(d, torch.tensor([3 + 5 * root, 5 + 3 * root], dtype=torch.float64))
    wanted = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]], dtype=torch.float64) / (2 * 8**0.5)
    torch.testing.assert_close(method.target, wanted)


def test_targets_move_where_nothing_was_corrected_too():
    j = torch.tensor([[1.0, 0.0], [3.0, 4.0]], dtype=torch.float64)
    method = seeded(beta=0.1)
    assert torch.equal(method.direction(j), j.sum(0))
    torch.testing.assert_close(method.target[0, 0, 1], torch.tensor(0.06, dtype=torch.float64))
    # Below the cosine there is nothing to correct.
    assert torch.equal(method.direction(j), j.sum(0))


def test_beta_is_the_papers():
    assert gradbal.create("gradvac").beta == 0.01


@pytest.mark.parametrize("n_tasks", [3, 20])
def test_tasks_that_agree_for_long(n_tasks):
    method = seeded(beta=0.5)
    g = torch.randn(9, dtype=torch.float64)
    for step in range(100):
        scales = torch.linspace(1, 2 + step, n_tasks, dtype=torch.float64)
        d = method.direction(scales[:, None] * g)
        assert float((d - scales.sum() * g).norm() / d.norm()) < 1e-12
    assert (method.target.abs() <= 1).all()
    assert float(method.target[0, 0, 1]) > 1 - 1e-12
    # The target's sine is zero by now.
    assert method.direction(torch.randn(n_tasks, 9, dtype=torch.float64)).isfinite().all()


@pytest.mark.parametrize("n_tasks", [3, 20])
def test_a_zero_row_has_no_weight_and_leaves_its_targets(n_tasks):
    method = seeded(beta=0.5)
    j = torch.from_numpy(random_rows(n_tasks, 9, 0))
    method.direction(j)
    before = method.target.clone()
    j[1] = 0.0
    j[0] *= -1
    w = method.weights(j @ j.T)
    assert w[1] == 0
    assert torch.equal(method.target[0, 1], before[0, 1])
    assert torch.equal(method.target[0, :, 1], before[0, :, 1])
    assert not torch.equal(method.target[0, 0, 2:], before[0, 0, 2:])
    after = method.target.clone()
    assert torch.equal(method.weights(torch.zeros(n_tasks, n_tasks)), torch.ones(n_tasks))
    assert torch.equal(method.target, after)


@pytest.mark.parametrize("ratio", [1e-3, 1.0, 50.0])
def test_opposite_gradients_cancel_and_what_is_left_is_not_measured(ratio):
    g = torch.randn(6, dtype=torch.float64)
    other = torch.randn(6, dtype=torch.float64)
    method = seeded(beta=1.0)
    assert float(method.direction(torch.stack([g, -ratio * g])).norm()) < 1e-12 * (1 + ratio)
    # Cancelled by its opposite, the first has no direction: no cosine with the third one.
    orders = torch.tensor([[1, 2], [0, 2], [0, 1]])
    j = torch.stack([g, -ratio * g, other])
    target = torch.full((1, 3, 3), 0.25, dtype=torch.float64)
    target[0, 0, 1] = 0.0
    _, moved = gradvac((j @ j.T)[None], target, orders, beta=1.0)
    assert moved[0, 0, 2] == 0.25
    assert float(moved[0, 0, 1]) == pytest.approx(-1)


@pytest.mark.parametrize("few", [0, 1000])
def test_what_had_grown_before_it_was_cancelled_is_not_measured_either(few, monkeypatch):
    monkeypatch.setattr(module, "_FEW", few)
    for seed in range(10):
        rng = np.random.default_rng(seed)
        u, v, other = np.linalg.qr(rng.standard_normal((9, 3)))[0].T
        # A target of one makes u into u + 1e4 v, which the third cancels.
        j = torch.from_numpy(np.stack([u, v, -rng.uniform(1, 2) * (u + 1e4 * v), u + other]))
        target = torch.full((1, 4, 4), 0.25, dtype=torch.float64)
        target[0, 0, 1:3] = torch.tensor([1.0, 0.0])
        orders = torch.tensor([[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]])
        _, moved = gradvac((j @ j.T)[None], target, orders, beta=1.0)
        assert float(moved[0, 0, 2]) == pytest.approx(-1)
        assert moved[0, 0, 3] == 0.25


def test_one_task_is_left_as_it_is():
    method = seeded()
    g = torch.randn(1, 6)
    for _ in range(3):
        assert torch.equal(method.direction(g), g[0])


WIDTHS = [3, 4, 13]


def test_groups_have_targets_and_corrections_of_their_own():
    method, generator = seeded(beta=0.3, groups=WIDTHS), torch.Generator().manual_seed(3)
    targets = np.zeros((3, 4, 4))
    for step in range(4):
        j = random_rows(4, 20, step, spread=100.0) - 0.2
        # One order for all groups.
        orders = random_orders(4, generator).numpy()
        parts = np.split(j, [3, 7], axis=1)
        pairs = zip(parts, targets, strict=True)
        wanted = np.concatenate([corrected(part, t, orders, 0.3) for part, t in pairs])
        found = method.direction(torch.from_numpy(j))
        np.testing.assert_allclose(found.numpy(), wanted, rtol=0, atol=1e-11 * np.abs(j).max())
        np.testing.assert_allclose(method.target.numpy(), targets, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups_keep_the_dtype(dtype):
    j = torch.randn(3, 20).to(dtype)
    d = seeded(groups=WIDTHS).direction(j)
    assert d.dtype == dtype
    wanted = seeded(groups=WIDTHS).direction(j.double())
    torch.testing.assert_close(d.double(), wanted, rtol=0, atol=4 * torch.finfo(dtype).eps)


class Nested(nn.Module):
    """Parameters of modules that have children, vectors before and after matrices."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.randn(4))
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.first = nn.Linear(4, 5)
        self.norm = nn.LayerNorm(5)
        self.mixing = nn.Parameter(torch.randn(5, 5))
        self.heads = nn.ModuleList(nn.Linear(5, 1) for _ in range(3))

    def losses(self, x):
        z = self.norm(self.first(x * self.scale + self.shift)).tanh() @ self.mixing
        return [(h(z) - (-2.0) ** i).square().mean() for i, h in enumerate(self.heads)]


# A module's own parameters come before its children's: shift and scale, mixing, first and norm.
LAYERS = [5, 25, 25 + 10]
MATRICES = [4, 1, 25, 20, 5, 5, 5]


@pytest.mark.parametrize(
    ("groups", "widths"), [("layer", LAYERS), ("matrix", MATRICES), ([30, 35], [30, 35])]
)
def test_groups_through_the_optimizer(groups, widths):
    model = Nested().double()
    method = seeded(beta=0.5, groups=groups)
    opt = MultiTaskOptimizer(SGD(model.parameters(), lr=0.1), method)
    by_hand = seeded(beta=0.5, groups=widths)
    corrections = []
    for _ in range(4):
        x = torch.randn(6, 4, dtype=torch.float64)
        rows, values = task_gradients(model, lambda twin, x=x: twin.losses(x))
        names = shared_names(rows)
        assert sum(widths) == sum(rows[0][n].numel() for n in names)
        d = by_hand.direction(jacobian(rows, names), values)
        sizes = [rows[0][n].numel() for n in names]
        wanted = {n: p.view_as(rows[0][n]) for n, p in zip(names, d.split(sizes), strict=True)}
        for row in rows:  # heads keep their own gradient
            wanted.update({n: g for n, g in row.items() if n not in names})
        opt.zero_grad()
        opt.backward(model.losses(x))
        assert_gradients(model, wanted, 1e-12)
        torch.testing.assert_close(method.target, by_hand.target)
        assert len(method.target) == len(widths)
        corrections.append(float((d - jacobian(rows, names).sum(0)).norm() / d.norm()))
        assert opt.weights is None
        opt.step()
    assert max(corrections) > 0.01


def test_a_checkpoint_with_groups_goes_on_bit_for_bit():
    def run(model, opt, n_steps):
        for _ in range(n_steps):
            opt.zero_grad()
            opt.backward(model.losses(model.batch()))
            opt.step()

    model = make("Plain")
    opt = MultiTaskOptimizer(SGD(model.parameters(), lr=0.1), seeded(groups="matrix", beta=0.2))
    run(model, opt, 3)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    twin = make("Plain")
    other = MultiTaskOptimizer(SGD(twin.parameters(), lr=0.1), seeded(seed=8))
    twin.load_state_dict(state["model"])
    other.load_state_dict(state["opt"])
    assert other.aggregator.groups == "matrix"
    for pair in ((model, opt), (twin, other)):
        run(*pair, 3)
    assert_same(snapshot(twin, other), snapshot(model, opt))


@pytest.mark.parametrize("groups", ["model", "matrix"])
def test_only_the_tasks_that_take_part_are_used_and_updated(groups):
    model = make("Plain")
    method = seeded(groups=groups, beta=0.5)
    opt = MultiTaskOptimizer(SGD(model.parameters(), lr=0.1), method, nonfinite="drop")
    opt.backward(model.losses(model.batch()))
    before, reference = method.target.clone(), copy.deepcopy(method)
    reference.target = before[:, [0, 2]][:, :, [0, 2]]
    losses = model.losses(model.batch())
    opt.zero_grad()
    opt.backward([losses[0], losses[1] * float("nan"), losses[2]])
    assert torch.equal(method.target[:, 1], before[:, 1])
    assert torch.equal(method.target[:, :, 1], before[:, :, 1])
    # The others go on as if there were the two of them alone.
    rows, values = task_gradients(model, lambda twin: twin.losses(twin.batch()))
    j = jacobian([rows[0], rows[2]], shared_names(rows))
    if groups == "matrix":
        reference.groups = [20, 5]
    d = reference.direction(j, values)
    trunk = model.trunk[0]
    found = torch.cat([trunk.weight.grad.flatten(), trunk.bias.grad])
    torch.testing.assert_close(found, d)
    torch.testing.assert_close(method.target[:, [0, 2]][:, :, [0, 2]], reference.target)


def test_a_task_may_sit_out_the_first_step():
    model = make("Plain")
    opt = MultiTaskOptimizer(SGD(model.parameters(), lr=0.1), seeded(), nonfinite="drop")
    losses = model.losses(model.batch())
    opt.backward([losses[0], losses[1] * float("nan"), losses[2]])
    assert opt.aggregator.target.shape == (1, 3, 3)
    assert not opt.aggregator.target[0, 1].any()
    assert opt.aggregator.target[0, 0, 2] != 0
    opt.backward(model.losses(model.batch()))


def test_reset_goes_back_to_the_first_step():
    jacobians = torch.randn(4, 3, 9)
    method = seeded(beta=0.5)
    first = [method.direction(j) for j in jacobians]
    assert method.target.any()
    method.reset()
    assert all(torch.equal(method.direction(j), d) for j, d in zip(jacobians, first, strict=True))
    # And another number of tasks may follow.
    method.reset()
    method.direction(torch.randn(5, 9))


def test_another_number_of_tasks_or_groups_is_an_error():
    method = seeded(groups=[4, 5])
    method.direction(torch.randn(3, 9))
    before = method.target.clone()
    with pytest.raises(ValueError, match="`gradvac` has 3 tasks, found 4"):
        method.direction(torch.randn(4, 9))
    with pytest.raises(ValueError, match="`gradvac` has 3 tasks, found 4"):
        method.prepare(4, torch.zeros(()))
    with pytest.raises(ValueError, match="`gradvac` has 2 groups, found 1"):
        method.group_weights(torch.eye(3)[None])
    assert torch.equal(method.target, before)


def test_groups_that_do_not_fit_what_there_is():
    with pytest.raises(ValueError, match=r"must add up to 9 columns, found 7 in \[3, 4\]"):
        seeded(groups=[3, 4]).direction(torch.randn(3, 9))
    for groups in ("layer", "matrix"):
        with pytest.raises(ValueError, match=f"groups='{groups}' needs the shapes"):
            seeded(groups=groups).direction(torch.randn(3, 9))
    with pytest.raises(ValueError, match="`groups` must be 'model' where there is one Gramian"):
        seeded(groups="layer").weights(torch.eye(3))
    model = make("Plain")
    opt = MultiTaskOptimizer(SGD(model.parameters(), lr=0.1), seeded(groups=[30]))
    with pytest.raises(ValueError, match="must add up to 25 columns, found 30"):
        opt.backward(model.losses(model.batch()))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"update_every": 2}, "update_every must be 1 for 'gradvac' with weights by column group"),
        ({"heads": "weighted"}, "heads must be 'own' for 'gradvac' with weights by column group"),
    ],
)
def test_options_that_need_one_weight_for_each_task(options, words):
    model = make("Plain")
    opt = MultiTaskOptimizer(SGD(model.parameters(), lr=0.1), seeded(groups="layer"), **options)
    with pytest.raises(ValueError, match=words):
        opt.backward(model.losses(model.batch()))
    assert all(p.grad is None for p in model.parameters())
    plain = MultiTaskOptimizer(SGD(model.parameters(), lr=0.1), seeded(), **options)
    plain.backward(model.losses(model.batch()))


def test_groups_belong_to_the_shared_parameters_of_the_first_step():
    model = make("ChangingGraph")
    opt = MultiTaskOptimizer(SGD(model.parameters(), lr=0.1), seeded(groups="matrix"))
    opt.backward(model.losses(model.batch()))
    with pytest.raises(ValueError, match="must stay the same for 'gradvac'"):
        opt.backward(model.losses(model.batch()))


@pytest.mark.parametrize(
    ("keywords", "error", "words"),
    [
        ({"beta": 0.0}, ValueError, r"`beta` must be in \(0, 1\], found 0"),
        ({"beta": 1.1}, ValueError, r"`beta` must be in \(0, 1\], found 1.1"),
        ({"beta": "x"}, TypeError, "`beta` must be a number"),
        ({"groups": "module"}, ValueError, "`groups` must be one of 'model', 'layer', 'matrix'"),
        ({"groups": []}, ValueError, r"or positive numbers of columns, found \[\]"),
        ({"groups": [3, 0]}, ValueError, r"or positive numbers of columns, found \[3, 0\]"),
        ({"groups": [3, 1.5]}, ValueError, r"or positive numbers of columns, found \[3, 1.5\]"),
        ({"groups": 3}, ValueError, "or positive numbers of columns, found 3"),
        ({"generator": 3}, TypeError, "`generator` must be a torch"),
    ],
)
def test_bad_hyperparameters(keywords, error, words):
    with pytest.raises(error, match=words):
        gradbal.create("gradvac", **keywords)
