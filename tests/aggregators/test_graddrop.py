"""GradDrop: expectation, agreement, one draw for all tasks, and the form on features."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import gradbal
from gradbal.aggregators.graddrop import graddrop
from gradbal.jacobian import CHUNK
from tests.aggregators.inputs import random_rows
from tests.states import assert_same, root_at_zero, snapshot, trained
from tests.zoo import make, optimizer, targets


def rows(n_tasks=4, width=12, seed=0, shift=0.3):
    return torch.from_numpy(random_rows(n_tasks, width, seed, spread=10.0) - shift)


def seeded(seed=3, **keywords):
    return gradbal.create("graddrop", generator=torch.Generator().manual_seed(seed), **keywords)


def sharper(p):
    """A curve that favours the majority."""
    return p**2 / (p**2 + (1 - p) ** 2)


def naive(j, u, leak, f=lambda p: p):
    """The paper's formula, one number at a time; also on h, the mask alone."""
    d = [0.0] * j.shape[1]
    mask = np.zeros(j.shape)
    for k in range(j.shape[1]):
        total = sum(abs(float(g)) for g in j[:, k])
        purity = 0.5 * (1 + float(j[:, k].sum()) / total) if total > 0 else 0.5
        for i in range(len(j)):
            g, chance = float(j[i, k]), float(f(purity))
            mask[i, k] = (chance > float(u[k]) and g > 0) or (chance < float(u[k]) and g < 0)
            d[k] += (leak[i] + (1 - leak[i]) * mask[i, k]) * g
    return torch.tensor(d, dtype=torch.float64), mask


@pytest.mark.parametrize("leak", [0.0, 0.4, 1, [0.0, 0.3, 1.0, 0.8]])
@pytest.mark.parametrize("f", [None, sharper])
def test_the_papers_formula(leak, f):
    for seed in range(5):
        j, u = rows(seed=seed), torch.rand(12)
        leaks = leak if isinstance(leak, list) else [leak] * 4
        wanted, _ = naive(j, u, leaks, f or (lambda p: p))
        torch.testing.assert_close(graddrop(j, u, leak, f), wanted)
        drawn = torch.rand(12, generator=torch.Generator().manual_seed(seed))
        wanted, _ = naive(j, drawn, leaks, f or (lambda p: p))
        torch.testing.assert_close(seeded(seed, leak=leak, f=f).direction(j), wanted)


def test_the_expectation_is_the_sum():
    j, method = rows(5, 30), seeded()
    draws = torch.stack([method.direction(j) for _ in range(4000)])
    deviation = (draws.mean(0) - j.sum(0)).abs() / (draws.std(0) / 4000**0.5)
    certain = (j > 0).all(0) | (j < 0).all(0)
    assert not certain.all()
    assert (deviation[~certain] < 5).all()
    torch.testing.assert_close(draws[:, certain], j.sum(0)[certain].expand(4000, -1))


def test_every_entry_is_the_sum_of_the_positive_or_of_the_negative_parts():
    j, method = rows(5, 200), seeded()
    up, down = j.clamp(min=0).sum(0), j.clamp(max=0).sum(0)
    seen = set()
    for _ in range(20):
        d = method.direction(j)
        is_up, is_down = (torch.isclose(d, part, rtol=1e-12, atol=0) for part in (up, down))
        assert (is_up | is_down).all()
        seen |= {(bool(a), bool(b)) for a, b in zip(is_up, is_down, strict=True)}
    assert {(True, False), (False, True)} <= seen


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-24])
def test_where_all_agree_nothing_is_dropped(u):
    # The least and the largest number that is drawn decide nothing.
    j = rows().abs() * torch.tensor([1.0, -1.0]).repeat(6)
    for leak in (0.0, 0.5):
        torch.testing.assert_close(graddrop(j, torch.full((12,), u), leak), j.sum(0))


def test_a_column_of_zeros_gives_zero():
    j = rows()
    j[:, 3] = 0.0
    j[1, 5] = 0.0
    for _ in range(20):
        d = seeded().direction(j)
        assert d.isfinite().all()
        assert d[3] == 0


@pytest.mark.parametrize("leak", [1, 1.0, [1.0, 1.0, 1.0, 1.0]])
def test_a_leak_of_one_is_the_sum(leak):
    j = rows()
    torch.testing.assert_close(seeded(leak=leak).direction(j), j.sum(0))


def test_a_task_that_leaks_all_is_never_dropped():
    j = rows()
    d, without = seeded(leak=[0.0, 1.0, 0.0, 0.0]).direction(j), seeded().direction(j)
    kept = torch.isclose(d, without)
    assert not kept.all()
    torch.testing.assert_close(d[~kept], (without + j[1])[~kept])


def test_one_draw_for_all_tasks_whatever_their_order():
    j = rows(6, 50)
    d = seeded().direction(j)
    for seed in range(5):
        order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(seeded().direction(j[order]), d)


def test_all_dtypes_and_scales_make_the_same_choices():
    j = torch.randn(5, 3000).bfloat16()
    d = seeded().direction(j.double())
    up, down = j.double().clamp(min=0).sum(0), j.double().clamp(max=0).sum(0)
    assert ((d == up) | (d == down)).all()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        torch.testing.assert_close(seeded().direction(j.to(dtype)), d.to(dtype))
    for scale in (2.0**-27, 2.0**27):
        torch.testing.assert_close(seeded().direction(j.float() * scale), (d * scale).float())


def test_more_columns_than_are_summed_at_a_time():
    j, u = torch.randn(3, CHUNK + 9), torch.rand(CHUNK + 9)
    whole = graddrop(j, u, 0.25)
    for part in (slice(0, 1000), slice(CHUNK - 500, CHUNK + 9)):
        assert torch.equal(whole[part], graddrop(j[:, part], u[part], 0.25))


def test_opposite_rows_and_a_single_one():
    g = rows(1)
    assert torch.equal(seeded().direction(g), g[0])
    method = seeded()
    d = torch.stack([method.direction(torch.cat([g, -g])) for _ in range(400)])
    torch.testing.assert_close(d.abs(), g.abs().expand(400, -1))
    # One sign as often as the other: 5 standard errors of 12 · 400 coins.
    assert abs(float((d > 0).double().mean()) - 0.5) < 5 * 0.5 / 4800**0.5


def test_leaks_go_with_their_tasks():
    j = rows()
    leak = [0.1, 0.9, 0.4, 0.7]
    d = seeded(leak=leak).direction(j[[1, 3]], tasks=[1, 3])
    assert torch.equal(d, seeded(leak=[0.9, 0.7]).direction(j[[1, 3]]))
    model = make("Plain")
    opt = optimizer(model, "graddrop", leak=[0.0, 0.5, 1.0], nonfinite="drop")
    reference = seeded(11, leak=[0.0, 1.0])
    losses = model.losses(model.batch())
    trunk = list(model.trunk.parameters())
    grads = [torch.autograd.grad(losses[i], trunk, retain_graph=True) for i in (0, 2)]
    j = torch.stack([torch.cat([g.flatten() for g in row]) for row in grads])
    losses[1] = losses[1] + root_at_zero(trunk[0])
    opt.backward(losses)
    found = torch.cat([p.grad.flatten() for p in trunk])
    torch.testing.assert_close(found, reference.direction(j))


def test_the_next_draw_follows_from_a_checkpoint():
    first, j = seeded(), rows()
    first.direction(j)
    state = copy.deepcopy(first.state_dict())
    wanted = [first.direction(j) for _ in range(3)]
    other = gradbal.create("graddrop")
    other.load_state_dict(state)
    assert all(torch.equal(other.direction(j), d) for d in wanted)
    first.reset()
    assert torch.equal(first.direction(j), seeded().direction(j))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_on_an_accelerator_the_draws_follow_from_the_generator_too():
    j = rows().float().cuda()
    first = seeded()
    first.direction(j)
    state = copy.deepcopy(first.state_dict())
    d = first.direction(j)
    other = gradbal.create("graddrop")
    other.load_state_dict(state)
    assert torch.equal(other.direction(j), d)
    other.load_state_dict(state)
    torch.testing.assert_close(other.direction(j.double()), d.double())
    up, down = j.clamp(min=0).sum(0), j.clamp(max=0).sum(0)
    assert (torch.isclose(d, up) | torch.isclose(d, down)).all()


class TwoHeads(nn.Module):
    """A trunk, its features `[6, 2, 3]`, a head for each of two losses."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(4, 6)
        self.heads = nn.ModuleList(nn.Linear(6, 1) for _ in range(2))

    def features(self):
        generator = torch.Generator().manual_seed(5)
        batch = torch.randn(6, 4, generator=generator, dtype=torch.float64)
        return torch.tanh(self.trunk(batch)).view(6, 2, 3)

    def losses(self, z):
        return targets([head(z.flatten(1)) for head in self.heads])


def two_heads(**keywords):
    torch.manual_seed(1)
    model = TwoHeads().double()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    keywords = {"on": "features", "generator": torch.Generator().manual_seed(3), **keywords}
    return model, gradbal.MultiTaskOptimizer(sgd, "graddrop", **keywords)


@pytest.mark.parametrize("leak", [0.0, 0.4, [0.2, 0.9]])
@pytest.mark.parametrize("f", [None, sharper])
def test_on_features_against_a_loop(leak, f):
    model, opt = two_heads(leak=leak, f=f)
    draws = torch.Generator().manual_seed(3)
    leaks = leak if isinstance(leak, list) else [leak] * 2
    dropped = 0
    for _ in range(3):
        z = model.features()
        a = torch.stack([torch.autograd.grad(l, z)[0] for l in model.losses(z)])
        h = torch.zeros(2, 6, dtype=torch.float64)
        for i in range(2):
            for b in range(6):
                h[i] += (z[b].detach().sign() * a[i, b]).flatten()
        _, mask = naive(h, torch.rand(6, generator=draws), leaks, f or (lambda p: p))
        dropped += int((mask == 0).sum())
        new = torch.zeros(6, 2, 3, dtype=torch.float64)
        for i in range(2):
            for b in range(6):
                share = leaks[i] + (1 - leaks[i]) * torch.from_numpy(mask[i])
                new[b] += (share * a[i, b].flatten()).view(2, 3)
        z = model.features()
        wanted = torch.autograd.grad(z, list(model.trunk.parameters()), new)
        own = [
            torch.autograd.grad(l, list(head.parameters()))
            for l, head in zip(model.losses(model.features()), model.heads, strict=True)
        ]
        opt.zero_grad()
        z = model.features()
        opt.backward(model.losses(z), features=z)
        for p, g in zip(model.trunk.parameters(), wanted, strict=True):
            torch.testing.assert_close(p.grad, g)
        for head, grads in zip(model.heads, own, strict=True):
            for p, g in zip(head.parameters(), grads, strict=True):
                torch.testing.assert_close(p.grad, g)
        opt.step()
    assert dropped > 0


def test_on_features_a_leak_of_one_is_the_gradient_of_the_sum():
    model, opt = two_heads(leak=1.0)
    z = model.features()
    opt.backward(model.losses(z), features=z)
    sums = torch.autograd.grad(sum(model.losses(model.features())), list(model.parameters()))
    for p, g in zip(model.parameters(), sums, strict=True):
        torch.testing.assert_close(p.grad, g)


@pytest.mark.parametrize("shape", [(6,), (6, 4), (2, 3, 2, 5)])
def test_the_mask_is_the_same_for_the_whole_batch(shape):
    z = torch.randn(shape, dtype=torch.float64)
    a = torch.randn(3, *shape, dtype=torch.float64)
    j = a.flatten(1)
    d = seeded(on="features").direction(j, features=z).view(shape)
    assert d.shape == z.shape
    # For every position one of the 2³ subsets of tasks explains all samples.
    explained = torch.zeros(shape[1:], dtype=torch.bool)
    for subset in range(8):
        kept = torch.tensor([bool(subset >> i & 1) for i in range(3)])
        total = a[kept].sum(0)
        explained |= torch.isclose(d, total).all(0)
    assert explained.all()
    # Its signs are those of h, which do not depend on the sizes of z.
    again = seeded(on="features").direction(j, features=z * torch.rand(shape))
    assert torch.equal(again.view(shape), d)


def test_features_in_channels_last():
    z, a = torch.randn(2, 3, 4, 5).double(), rows(3, 120)
    d = seeded(on="features").direction(a, features=z)
    last = z.to(memory_format=torch.channels_last)
    assert torch.equal(seeded(on="features").direction(a, features=last), d)


def test_features_without_a_sign_keep_their_gradient():
    # A layer that starts at zero would otherwise stay there.
    z = torch.zeros(4, 3, dtype=torch.float64)
    z[:, 2] = 1.0
    a = rows(3, 12)
    d = seeded(on="features").direction(a, features=z).view(4, 3)
    torch.testing.assert_close(d[:, :2], a.sum(0).view(4, 3)[:, :2])


def test_half_precision_features_make_the_same_choices():
    z, a = torch.randn(8, 200).bfloat16(), torch.randn(3, 1600).bfloat16()
    d = seeded(on="features").direction(a.double(), features=z.double())
    found = seeded(on="features").direction(a, features=z)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), d, rtol=1e-2, atol=1e-2)


def test_leaks_go_with_their_tasks_on_features():
    model, opt = two_heads(leak=[0.0, 1.0], nonfinite="drop")
    # What is left is one task, whose gradient nothing opposes: its leak must not be the other's.
    z = model.features()
    first, second = model.losses(z)
    bad = first + root_at_zero(z)
    want = torch.autograd.grad(second, model.trunk.weight, retain_graph=True)[0]
    opt.backward([bad, second], features=z)
    torch.testing.assert_close(model.trunk.weight.grad, want)
    a = rows(2)
    z = torch.randn(3, 4)
    method = seeded(on="features", leak=[0.1, 0.9, 0.4])
    found = method.direction(a, features=z, tasks=[0, 2])
    assert torch.equal(found, seeded(on="features", leak=[0.1, 0.4]).direction(a, features=z))


def test_features_that_are_missing_or_not_wanted():
    model, opt = two_heads()
    before = snapshot(model, opt)
    losses = model.losses(model.features())
    with pytest.raises(ValueError, match=r"'graddrop' works on gradients at a representation"):
        opt.backward(losses)
    assert_same(snapshot(model, opt), before)
    plain = gradbal.MultiTaskOptimizer(opt.optimizer, "graddrop")
    z = model.features()
    with pytest.raises(ValueError, match="'graddrop' takes no `features`, found some"):
        plain.backward(model.losses(z), features=z)
    j = rows()
    for z, found in ((None, "none"), (torch.ones(5), r"shape \[5\]"), (torch.ones(()), "shape")):
        with pytest.raises(ValueError, match=rf"shape \[B, \.\.\.\] and 12 entries.*found {found}"):
            seeded(on="features").direction(j, features=z)
    with pytest.raises(ValueError, match="`features` must be None for on='parameters'"):
        seeded().direction(j, features=torch.ones(3, 4))


def test_a_wrong_number_of_leaks_changes_nothing():
    model, opt = trained("graddrop")
    opt.aggregator.leak = [0.5, 0.5]
    before = snapshot(model, opt)
    with pytest.raises(ValueError, match="`leak` must have one entry for each of 3 tasks, found 2"):
        opt.backward(model.losses(model.batch()))
    assert_same(snapshot(model, opt), before)


def test_the_curve_is_not_in_the_checkpoint():
    method = seeded(f=sharper, leak=[0.5, 0.25, 0.0, 1.0])
    assert repr(method) == "GradDrop(leak=[0.5, 0.25, 0.0, 1.0], on='parameters')"
    other = gradbal.create("graddrop", f=sharper)
    other.load_state_dict(method.state_dict())
    assert torch.equal(other.direction(rows()), method.direction(rows()))


def test_bad_hyperparameters():
    for leak in (-0.1, 1.5):
        with pytest.raises(ValueError, match=rf"`leak` must be in \[0, 1\], found {leak}"):
            gradbal.create("graddrop", leak=leak)
    with pytest.raises(ValueError, match=r"`leak` must be in \[0, 1\], found \[0.5, 2.0\]"):
        gradbal.create("graddrop", leak=[0.5, 2.0])
    with pytest.raises(ValueError, match="`on` must be one of 'parameters', 'features'"):
        gradbal.create("graddrop", on="weights")
    with pytest.raises(TypeError, match="`f` must be a function or None, found 'id'"):
        gradbal.create("graddrop", f="id")
    for f in (lambda p: 1 - p, lambda p: 2 * p):
        with pytest.raises(ValueError, match="`f` must be increasing"):
            gradbal.create("graddrop", f=f)
    for f, found in ((torch.mean, r"\[\] for \[101\]"), (lambda p: 0.5, "0.5")):
        with pytest.raises(ValueError, match=f"of the shape that it takes, found {found}"):
            gradbal.create("graddrop", f=f)
    with pytest.raises(TypeError, match=r"`generator` must be a torch\.Generator"):
        gradbal.create("graddrop", generator=3)
