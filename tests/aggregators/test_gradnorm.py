"""GradNorm: against autograd and torch's Adam, its fixed point, initial losses, chosen layers."""

import copy
import io
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.amp import GradScaler
from torch.optim import SGD, Adam

import gradbal
from gradbal import MultiTaskOptimizer
from gradbal.aggregators.gradnorm import gradnorm
from tests.gradients import task_gradients
from tests.states import assert_same, snapshot
from tests.zoo import make, targets

PARAMS = ("simplex", "softmax")


def steps(n_steps, n_tasks, seed=0):
    """Gramians and losses of a run."""
    rng = np.random.default_rng(seed)
    for _ in range(n_steps):
        j = rng.standard_normal((n_tasks, 9)) * np.arange(1, n_tasks + 1)[:, None]
        yield torch.from_numpy(j @ j.T), torch.from_numpy(rng.uniform(0.2, 2, n_tasks))


def reference(run, param="simplex", alpha=1.5, lr=0.025, initial=None):
    """The weights of each step, by autograd and torch.optim.Adam, as the paper says."""
    learned = adam = None
    for g, losses in run:
        if learned is None:
            initial = losses if initial is None else initial
            first = torch.ones_like(losses) if param == "simplex" else torch.zeros_like(losses)
            learned = nn.Parameter(first)
            adam = Adam([learned], lr=lr, eps=1e-100)
        w = learned if param == "simplex" else len(losses) * learned.softmax(0)
        yield w.detach().clone()
        norms = w * g.diagonal().sqrt()
        rates = losses / initial
        wanted = norms.mean() * (rates / rates.mean()) ** alpha
        adam.zero_grad()
        (norms - wanted.detach()).abs().sum().backward()
        adam.step()
        if param == "simplex":
            with torch.no_grad():
                learned.clamp_(min=1e-6)
                learned.mul_(len(losses) / learned.sum())


@pytest.mark.parametrize("param", PARAMS)
@pytest.mark.parametrize("n_tasks", [1, 2, 5])
@pytest.mark.parametrize("alpha", [0.0, 0.12, 1.5, 3.0])
def test_autograd_and_adam_over_forty_steps(param, n_tasks, alpha):
    method = gradbal.create("gradnorm", param=param, alpha=alpha, lr=0.05)
    run = list(steps(40, n_tasks))
    for (g, losses), wanted in zip(run, reference(run, param, alpha, 0.05), strict=True):
        found = method.weights(g, losses)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
        assert float(found.sum()) == pytest.approx(n_tasks, abs=1e-12)


def test_a_large_learning_rate_runs_into_the_bound():
    method = gradbal.create("gradnorm", lr=0.9)
    run, least = list(steps(40, 3)), []
    for (g, losses), wanted in zip(run, reference(run, lr=0.9), strict=True):
        found = method.weights(g, losses)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
        least.append(float(found.min()))
    assert 0 < min(least) < 1e-5


def test_two_steps_by_hand():
    method = gradbal.create("gradnorm", alpha=1.0, lr=0.1)
    g = torch.diag(torch.tensor([16.0, 1.0], dtype=torch.float64))
    one = torch.ones(2, dtype=torch.float64)
    # G = (4, 1) around 2.5: Adam's first step is of length lr, whatever the gradient.
    assert torch.equal(method.weights(g, one), one)
    # G = (3.6, 1.1), Ḡ = 2.35; r = (0.4, 1.6) and c = (0.94, 3.76): the same signs as before.
    w = method.weights(g, torch.tensor([0.25, 1.0]))
    torch.testing.assert_close(w, torch.tensor([0.9, 1.1], dtype=torch.float64))
    # G = (3.2, 1.2), Ḡ = 2.2; now r = (1.6, 0.4), c = (3.52, 0.88) turns both signs.
    w = method.weights(g, torch.tensor([1.0, 0.25]))
    torch.testing.assert_close(w, torch.tensor([0.8, 1.2], dtype=torch.float64))
    first = (0.9 * 0.9 + 0.9 - 1) * 0.1 / (1 - 0.9**3)
    w = method.weights(g, one)
    moved = torch.tensor([0.8 - 0.1 * first, 1.2 + 0.1 * first], dtype=torch.float64)
    torch.testing.assert_close(w, moved)


def test_the_function_is_the_derivative():
    for g, rates in steps(20, 4):
        w = torch.rand(4, dtype=torch.float64).requires_grad_()
        rates = rates / rates.mean()
        norms = w * g.diagonal().sqrt()
        wanted = (norms.mean() * rates**1.2).detach()
        (derivative,) = torch.autograd.grad((norms - wanted).abs().sum(), w)
        torch.testing.assert_close(gradnorm(g, w.detach(), rates, alpha=1.2), derivative)


@pytest.mark.parametrize("param", PARAMS)
def test_alpha_zero_makes_all_weighted_norms_equal(param):
    method = gradbal.create("gradnorm", alpha=0.0, lr=0.002, param=param)
    n = torch.tensor([5.0, 1.0, 2.5, 0.7], dtype=torch.float64)
    for _ in range(3000):
        w = method.weights(torch.diag(n**2), torch.rand(4))
    wanted = 4 / n / (1 / n).sum()
    torch.testing.assert_close(w, wanted, rtol=0.02, atol=0)


@pytest.mark.parametrize("param", PARAMS)
@pytest.mark.parametrize("n_tasks", [1, 3, 7, 11, 40])
def test_equal_norms_and_rates_change_nothing(param, n_tasks):
    # Not by a rounding error either, of which Adam would make a whole step.
    for seed in range(10):
        method = gradbal.create("gradnorm", param=param)
        rng = np.random.default_rng(seed)
        g = torch.full((n_tasks, n_tasks), rng.uniform(), dtype=torch.float64)
        losses = torch.from_numpy(rng.uniform(0.5, 2, n_tasks))
        for factor in (1.0, 0.7, 0.3, 0.1):
            assert torch.equal(method.weights(g, factor * losses), torch.ones(n_tasks).double())


def test_a_common_gradient_of_all_weights_moves_no_softmax():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        rates = torch.from_numpy(rng.uniform(0.5, 1.5, 11))
        rates /= rates.mean()
        w = rates**2 / (rates**2).mean()  # below all targets at alpha = 2
        g = rng.uniform() * torch.eye(11, dtype=torch.float64)
        assert torch.equal(gradnorm(g, w, rates, alpha=2.0), -g.diagonal().sqrt())
        ones = torch.ones(11, dtype=torch.float64)
        method = gradbal.create("gradnorm", param="softmax", alpha=2.0, initial_loss=ones)
        method.weights(g, ones)
        method.w = w
        method.weights(g, rates)
        torch.testing.assert_close(method.w, w, rtol=1e-12, atol=0)


@pytest.mark.parametrize("param", PARAMS)
def test_neither_the_scale_of_a_loss_nor_that_of_all_gradients_matters(param):
    scales = torch.tensor([1e-6, 1.0, 1e4, 3.0], dtype=torch.float64)
    for gradients in (1e-16, 1.0, 1e16):
        one, other = (gradbal.create("gradnorm", param=param) for _ in range(2))
        for g, losses in steps(20, 4):
            w = one.weights(g, losses)
            torch.testing.assert_close(other.weights(g * gradients, losses * scales), w)


@pytest.mark.parametrize("param", PARAMS)
def test_permuting_the_tasks_permutes_the_weights_of_every_step(param):
    one, other = (gradbal.create("gradnorm", param=param) for _ in range(2))
    order = torch.tensor([2, 0, 3, 1])
    for g, losses in steps(20, 4):
        w = one.weights(g, losses)
        permuted = other.weights(g[order][:, order], losses[order])
        torch.testing.assert_close(permuted, w[order])


@pytest.mark.parametrize(
    ("g", "losses"),
    [
        (torch.zeros(2, 2), torch.ones(2)),
        (torch.eye(2), torch.zeros(2)),
    ],
    ids=["no gradient", "no loss"],
)
def test_without_a_rate_the_weights_stay(g, losses):
    method = gradbal.create("gradnorm")
    for h, l in steps(5, 2):
        method.weights(h, l)
    before = method.w.clone(), method.adam.clone()
    method.weights(g, losses)
    assert torch.equal(method.w, before[0])
    assert torch.equal(method.adam, before[1])
    method.weights(torch.diag(torch.tensor([9.0, 1.0])), torch.ones(2))
    assert not torch.equal(method.w, before[0])


def test_a_first_loss_of_zero_keeps_the_weights():
    method = gradbal.create("gradnorm")
    for losses in ([0.0, 1.0], [2.0, 1.0], [1.0, 3.0]):
        w = method.weights(torch.diag(torch.tensor([9.0, 1.0])), torch.tensor(losses))
        assert torch.equal(w, torch.ones(2))


def test_a_zero_row_beside_others():
    method = gradbal.create("gradnorm", alpha=0.0)
    for _ in range(50):
        w = method.weights(torch.diag(torch.tensor([0.0, 4.0, 1.0])))
    # Nothing moves its weight but that the others' shrink or grow.
    assert w.isfinite().all()
    assert (w > 0).all()
    assert w[1] < w[2]


def test_losses_that_are_not_given_count_as_ones():
    one, other = (gradbal.create("gradnorm") for _ in range(2))
    for g, _ in steps(5, 3):
        assert torch.equal(one.weights(g), other.weights(g, torch.ones(3)))


@pytest.mark.parametrize("value", [-0.5, float("nan")])
def test_a_negative_loss_is_named_and_nothing_changes(value):
    method = gradbal.create("gradnorm")
    for g, losses in steps(3, 3):
        method.weights(g, losses)
    before = copy.deepcopy(method.state_dict())
    words = f"not negative, found {value:g} for the task of index 1; add an offset"
    with pytest.raises(ValueError, match=words):
        method.weights(torch.eye(3), torch.tensor([1.0, value, 2.0]))
    assert_same(method.state_dict(), before)
    with pytest.raises(ValueError, match="index 2; add an offset"):
        method.weights(torch.eye(2), torch.tensor([1.0, value]), tasks=[0, 2])


def test_the_mean_of_the_first_epoch_as_initial_loss():
    method = gradbal.create("gradnorm", initial_loss="epoch")
    method.end_epoch()  # before any step: no epoch was over
    epoch, rest = list(steps(7, 3)), list(steps(20, 3, seed=1))
    for g, losses in epoch:
        assert torch.equal(method.weights(g, losses), torch.ones(3, dtype=torch.float64))
    method.end_epoch()
    mean = torch.stack([losses for _, losses in epoch]).mean(0)
    for n, ((g, losses), wanted) in enumerate(
        zip(rest, reference(rest, initial=mean), strict=True)
    ):
        torch.testing.assert_close(method.weights(g, losses), wanted, rtol=1e-9, atol=1e-12)
        if n == 10:
            method.end_epoch()


def test_numbers_as_initial_losses():
    initial = [math.log(10), math.log(2), 1.0]
    method = gradbal.create("gradnorm", initial_loss=initial)
    run = list(steps(20, 3))
    for (g, losses), wanted in zip(run, reference(run, initial=torch.tensor(initial)), strict=True):
        torch.testing.assert_close(method.weights(g, losses), wanted)
    as_tensor = gradbal.create("gradnorm", initial_loss=torch.tensor(initial, dtype=torch.float64))
    assert as_tensor.hyperparameters()["initial_loss"] == initial
    with pytest.raises(ValueError, match="one entry for each of 2 tasks, found 3"):
        method.__class__(initial_loss=initial).weights(torch.eye(2))


def test_the_papers_alpha_and_a_learning_rate_of_its_own():
    # Not 2, and no parameter in the main optimizer, whose learning rate and decay are its own.
    assert gradbal.create("gradnorm").alpha == 1.5
    found = []
    for lr, decay in ((0.1, 0.0), (1e-9, 0.9)):
        model = make("Plain")
        sgd = SGD(model.parameters(), lr=lr, weight_decay=decay)
        opt = MultiTaskOptimizer(sgd, "gradnorm")
        assert len(opt.param_groups) == 1
        for _ in range(3):
            opt.backward(model.losses(model.batch()))  # no step: the model stays
        found.append(opt.weights)
    assert torch.equal(*found)
    assert not torch.equal(found[0], torch.ones(3, dtype=torch.float64))


def test_weights_are_not_uniform_in_the_first_epoch_by_default():
    method = gradbal.create("gradnorm")
    run = list(steps(2, 3))
    for g, losses in run:
        w = method.weights(g, losses)
    assert not torch.equal(w, torch.ones(3, dtype=torch.float64))


class Counted(torch.autograd.Function):
    """Identity that counts the backward passes through it."""

    calls = 0

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        Counted.calls += 1
        return grad


class Deep(nn.Module):
    """A trunk of two layers, the second of which is probed, and a head for each of four tasks."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 5)
        self.heads = nn.ModuleList(nn.Linear(5, 1) for _ in range(4))

    def losses(self, x):
        z = Counted.apply(self.first(x).tanh())
        z = self.last(z).tanh()
        return targets([head(z) for head in self.heads])


def deep(layer="weight", optimizer=SGD, **options):
    torch.manual_seed(5)
    model = Deep().double()
    layer = {"weight": model.last.weight, "both": model.last.parameters(), None: None}[layer]
    inner = optimizer(model.parameters(), lr=0.05)
    names = ("alpha", "lr", "initial_loss", "param")
    keywords = {k: options.pop(k) for k in names if k in options}
    method = gradbal.create("gradnorm", layer=layer, **keywords)
    return model, MultiTaskOptimizer(inner, method, **options)


def batches(n, size=6):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, size, 4, generator=generator, dtype=torch.float64)


def weighted(rows, w):
    """`Σ w_i ∇ℓ_i` for every parameter."""
    total = {}
    for factor, row in zip(w, rows, strict=True):
        for name, g in row.items():
            total[name] = total.get(name, 0) + factor * g
    return total


@pytest.mark.parametrize(
    ("layer", "names"),
    [
        ("weight", ["last.weight"]),
        ("both", ["last.weight", "last.bias"]),
        (None, ["first.weight", "first.bias", "last.weight", "last.bias"]),
    ],
)
@pytest.mark.parametrize("param", PARAMS)
def test_through_the_optimizer_by_plain_autograd(layer, names, param):
    model, opt = deep(layer, lr=0.2, param=param)
    taken, run = [], []
    for x in batches(8):
        rows, values = task_gradients(model, lambda twin, x=x: twin.losses(x))
        j = torch.stack([torch.cat([row[n].flatten() for n in names]) for row in rows])
        run.append((j @ j.T, values))
        opt.zero_grad()
        opt.backward(model.losses(x))
        taken.append(opt.weights)
        for name, g in weighted(rows, opt.weights).items():
            torch.testing.assert_close(model.get_parameter(name).grad, g)
        torch.testing.assert_close(opt.gramian, j @ j.T)
        opt.step()
    for found, wanted in zip(taken, reference(run, param, lr=0.2), strict=True):
        torch.testing.assert_close(found, wanted)
    assert float((taken[-1] - 1).abs().max()) > 0.1


@pytest.mark.parametrize("layer", ["weight", "both", None])
def test_the_rest_of_the_trunk_is_walked_once(layer):
    model, opt = deep(layer)
    for x in batches(3):
        Counted.calls = 0
        opt.backward(model.losses(x))
        assert Counted.calls == (1 if layer else 4)


def test_heads_may_keep_their_own_gradients():
    model, opt = deep(heads="own")
    for x in batches(3):
        rows, _ = task_gradients(model, lambda twin, x=x: twin.losses(x))
        opt.zero_grad()
        opt.backward(model.losses(x))
    assert not torch.equal(opt.weights, torch.ones(4, dtype=torch.float64))
    for name, g in weighted(rows, opt.weights).items():
        own = next(row[name] for row in rows if name in row)
        wanted = own if "heads" in name else g
        torch.testing.assert_close(model.get_parameter(name).grad, wanted)


def train(model, opt, xs, end_epoch_after=()):
    for k, x in enumerate(xs):
        opt.zero_grad()
        opt.backward(model.losses(x))
        opt.step()
        if k in end_epoch_after:
            opt.end_epoch()


@pytest.mark.parametrize("param", PARAMS)
@pytest.mark.parametrize("initial_loss", ["first", "epoch", [1.0, 2.0, 3.0, 4.0]])
@pytest.mark.parametrize("stop", [0, 2, 3, 5])
@pytest.mark.parametrize("layer", ["weight", None])
def test_a_resumed_run_is_the_same_bit_for_bit(layer, stop, initial_loss, param):
    xs = batches(8)
    # The first epoch ends after the third step.
    options = {"initial_loss": initial_loss, "param": param, "optimizer": Adam}
    model, opt = deep(layer, **options)
    train(model, opt, xs, end_epoch_after=[2])
    before, early = deep(layer, **options)
    train(before, early, xs[:stop], end_epoch_after=[2])
    file = io.BytesIO()
    torch.save({"model": before.state_dict(), "opt": early.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    resumed, late = deep(layer, optimizer=Adam)
    resumed.load_state_dict(state["model"])
    late.load_state_dict(state["opt"])
    train(resumed, late, xs[stop:], end_epoch_after=[2 - stop] if stop < 3 else [])
    assert_same(snapshot(resumed, late), snapshot(model, opt))


def test_update_every_uses_the_weights_again():
    model, opt = deep(update_every=3, lr=0.2)
    taken = []
    for x in batches(7):
        rows, _ = task_gradients(model, lambda twin, x=x: twin.losses(x))
        opt.zero_grad()
        Counted.calls = 0
        opt.backward(model.losses(x))
        assert Counted.calls == 1
        for name, g in weighted(rows, opt.weights).items():
            torch.testing.assert_close(model.get_parameter(name).grad, g)
        taken.append(opt.weights)
        opt.step()
    assert torch.equal(taken[3], taken[5])
    assert not torch.equal(taken[2], taken[3])
    assert not torch.equal(taken[5], taken[6])


@pytest.mark.parametrize("layer", ["weight", None])
def test_micro_batches_are_one_batch(layer):
    model, opt = deep(layer)
    twin, whole = deep(layer)
    for x in batches(4):
        opt.zero_grad()
        for k, part in enumerate(x.chunk(2)):
            opt.backward([l / 2 for l in model.losses(part)], accumulate=k == 0)
        opt.step()
        whole.zero_grad()
        whole.backward(twin.losses(x))
        whole.step()
        torch.testing.assert_close(opt.weights, whole.weights)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert not torch.equal(opt.weights, torch.ones(4, dtype=torch.float64))


def test_a_loss_scale_changes_nothing():
    model, opt = deep(lr=0.2)
    twin, plain = deep(lr=0.2)
    scaler = GradScaler("cpu", init_scale=65536.0)
    for x in batches(4):
        opt.zero_grad()
        opt.backward(model.losses(x), grad_scaler=scaler)
        scaler.step(opt)
        scaler.update()
        train(twin, plain, [x])
        torch.testing.assert_close(opt.weights, plain.weights)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_a_step_that_is_left_out_leaves_the_weights():
    model, opt = deep(nonfinite="skip", lr=0.2)
    xs = batches(4)
    train(model, opt, xs[:3])
    before = copy.deepcopy(opt.aggregator.state_dict())
    losses = model.losses(xs[3])
    opt.backward([losses[0] * float("nan"), *losses[1:]])
    assert_same(opt.aggregator.state_dict(), before)


@pytest.mark.parametrize("param", PARAMS)
def test_a_task_that_sits_out_keeps_its_weight_and_its_history(param):
    model, opt = deep(nonfinite="drop", lr=0.2, param=param)
    xs = batches(5)
    train(model, opt, xs[:3])
    method = opt.aggregator
    before = copy.deepcopy(method)
    losses = model.losses(xs[3])
    rows, values = task_gradients(model, lambda twin: twin.losses(xs[3]))
    opt.zero_grad()
    opt.backward([losses[0], losses[1] * float("nan"), *losses[2:]])
    others = [0, 2, 3]
    assert torch.equal(opt.weights[others], before.w[others])
    assert opt.weights[1] == 0
    assert model.heads[1].weight.grad is None
    assert method.w[1] == before.w[1]
    assert torch.equal(method.adam[:, 1], before.adam[:, 1])
    assert float(method.w.sum()) == pytest.approx(4, abs=1e-12)
    assert not torch.equal(method.w[others], before.w[others])
    # The others go on as three tasks with weights of the same sum would.
    alone = gradbal.create("gradnorm", lr=0.2, param=param)
    alone.w, alone.adam = before.w[others], before.adam[:, others]
    alone.initial = before.initial[:, others]
    alone.prepare(3, values)
    j = torch.stack([rows[i]["last.weight"].flatten() for i in others])
    alone.weights(j @ j.T, values[others])
    torch.testing.assert_close(
        method.w[others] / method.w[others].sum(), alone.w / alone.w.sum(), rtol=1e-9, atol=0
    )


def test_a_task_that_sits_out_at_first_takes_its_first_loss_later():
    model, opt = deep(nonfinite="drop")
    losses = model.losses(batches(1)[0])
    opt.backward([losses[0], losses[1] * float("nan"), *losses[2:]])
    assert opt.aggregator.initial[1].tolist() == [1, 0, 1, 1]
    opt.backward(model.losses(batches(1)[0]))
    assert opt.aggregator.initial[0, 1] == opt.losses[1]


def test_reset_goes_back_to_the_first_step():
    method = gradbal.create("gradnorm", initial_loss="epoch")
    run = list(steps(6, 3))

    def weights():
        for k, (g, losses) in enumerate(run):
            yield method.weights(g, losses)
            if k == 2:
                method.end_epoch()

    first = list(weights())
    method.reset()
    assert all(torch.equal(w, v) for w, v in zip(weights(), first, strict=True))
    with pytest.raises(ValueError, match="`gradnorm` has 3 tasks, found 2"):
        method.weights(torch.eye(2))
    method.reset()
    assert torch.equal(method.weights(torch.eye(2)), torch.ones(2))


@pytest.mark.parametrize("how", ["copy", "reload"])
def test_the_layer_stays_with_its_model(how):
    model, opt = deep()
    if how == "copy":
        model, opt = copy.deepcopy((model, opt))
    else:
        opt.load_state_dict(opt.state_dict())
    assert opt.aggregator.layer[0] is model.last.weight
    assert "layer" not in opt.aggregator.hyperparameters()
    Counted.calls = 0
    opt.backward(model.losses(batches(1)[0]))
    assert Counted.calls == 1


@pytest.mark.parametrize(
    ("keywords", "error", "words"),
    [
        ({"alpha": -0.1}, ValueError, r"`alpha` must be in \[0, 3\], found -0.1"),
        ({"alpha": 3.1}, ValueError, "`alpha`"),
        ({"lr": -1.0}, ValueError, r"`lr` must be in \[0, inf\), found -1"),
        ({"lr": "fast"}, TypeError, "`lr` must be a number"),
        ({"param": "log"}, ValueError, "`param` must be one of 'simplex', 'softmax', found 'log'"),
        ({"initial_loss": "last"}, ValueError, "`initial_loss` must be one of 'first', 'epoch'"),
        ({"initial_loss": [1.0, 0.0]}, ValueError, r"`initial_loss` must be positive, found \[1"),
        ({"initial_loss": []}, ValueError, "`initial_loss` must be positive, found"),
        ({"initial_loss": 2.0}, ValueError, "`initial_loss` must be a sequence of numbers"),
        ({"layer": nn.Linear(2, 2)}, TypeError, "`layer` must be a tensor or an iterable.*Linear"),
        ({"layer": []}, TypeError, r"`layer` must be a tensor or an iterable.*found \[\]"),
        ({"layer": ["trunk"]}, TypeError, "`layer` must be a tensor or an iterable"),
        ({"layer": torch.ones(2)}, ValueError, "`layer` must require grad, found 1 of 1"),
    ],
    ids=str,
)
def test_bad_hyperparameters(keywords, error, words):
    with pytest.raises(error, match=words):
        gradbal.create("gradnorm", **keywords)


def test_a_layer_that_no_loss_reaches_is_an_error():
    model, _ = deep()
    opt = MultiTaskOptimizer(
        SGD(model.parameters(), lr=0.1), "gradnorm", layer=nn.Linear(2, 2).weight
    )
    with pytest.raises(ValueError, match="no loss reaches any of the 1"):
        opt.backward(model.losses(batches(1)[0]))
    assert all(p.grad is None for p in model.parameters())


def test_it_warns_when_the_first_epoch_never_ends():
    method = gradbal.create("gradnorm", initial_loss="epoch")
    j = torch.eye(2, dtype=torch.float64)
    method.direction(j, torch.ones(2))
    method.initial[1] = 9_999
    with pytest.warns(RuntimeWarning, match=r"'gradnorm'.*10,000 steps.*initial_loss='first'"):
        method.direction(j, torch.ones(2))
