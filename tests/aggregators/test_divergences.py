"""What known implementations get wrong or do otherwise, and gradbal does not: one test each.

Where a method's own tests, its closed forms or the battery guard it already, it is not here again.
"""

import math

import numpy as np
import pytest
import torch
from torch import nn

import gradbal
from gradbal.aggregators.mgda import mgda
from gradbal.aggregators.nash_mtl import nash_mtl
from gradbal.aggregators.pcgrad import random_orders
from tests.aggregators.inputs import DIRECT, make, random_rows, terms

COSINE = -0.6
A = torch.tensor([3.0, 0.0], dtype=torch.float64)
B = torch.tensor([COSINE, math.sqrt(1 - COSINE**2)], dtype=torch.float64) * 0.5
UNITS = A / 3 + B / 0.5


def d_of(name, rows, **keywords):
    return gradbal.create(name, **keywords).direction(torch.stack(rows))


def close(found, wanted, rtol=1e-9):
    assert float((found - wanted).norm()) <= rtol * float(wanted.norm())


def off(g, h):
    """g projected off h."""
    return g - (g @ h) / (h @ h) * h


def test_equal_weighting_is_the_sum_whatever_the_number_of_tasks():
    # LibMTL documents 1/T and computes 1.
    model = nn.Linear(2, 3, bias=False).double()
    for name, weight in (("ew", 1), ("sum", 1), ("mean", 1 / 3)):
        opt = gradbal.MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), name)
        opt.zero_grad()
        opt.backward([model(A)[i] for i in range(3)])
        close(model.weight.grad, weight * A.expand(3, 2))


def test_uw_starts_at_a_variance_of_one_and_halves_regression_losses_alone():
    # LibMTL starts at -0.5, auto-lambda at -0.7; both take every task for a regression.
    losses = torch.tensor([2.0, 7.0])
    assert gradbal.create("uw").loss_weights(losses).tolist() == [0.5, 0.5]
    kinds = gradbal.create("uw", kind=["regression", "classification"])
    assert kinds.loss_weights(losses).tolist() == [0.5, 1.0]


def test_uw_is_not_pulled_to_zero_by_the_models_weight_decay():
    # At s = log ℓ the objective is flat in s; decay would move s away.
    p = nn.Parameter(torch.ones(2, dtype=torch.float64))
    sgd = torch.optim.SGD([p], lr=0.5, weight_decay=1.0)
    opt = gradbal.MultiTaskOptimizer(sgd, "uw", init=1.0)
    opt.backward([math.e * p.sum() / 2, math.e * p.prod()])
    opt.step()
    torch.testing.assert_close(opt.aggregator.learned.detach(), torch.ones(2).double())
    assert float(p.detach().max()) < 0.5


# Rows u, u, h with u and h orthogonal: what a matrix inverse cannot take.
_STEP = math.sqrt(5) / 6  # CAGrad's ball around (2, 1)/3, for c = ½
_ANGLE = math.pi / 4 + math.asin(2 / math.sqrt(10))  # where ⟨d, u⟩ = ⟨d, h⟩
IDENTICAL = {
    "aligned_mtl": (math.sqrt(2) / 3, 1 / 3),
    "cagrad": ((2 / 3 + _STEP * math.cos(_ANGLE)) / 1.25,) * 2,
    "config": (1.5, 1.5),
    "dualproj": (2 / 3, 1 / 3),
    "fairgrad": (math.sqrt(2), 1.0),
    "gradnorm_inverse": (2.0, 1.0),
    "imtl_g": (0.5, 0.5),
    "mgda": (0.5, 0.5),
    "nash_mtl": (math.sqrt(2 / 3), math.sqrt(1 / 3)),
    "pcgrad": (2.0, 1.0),
    "primary": (1.0, 0.0),
    "upgrad": (2 / 3, 1 / 3),
}


@pytest.mark.parametrize("name", list(IDENTICAL))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_two_identical_gradients_beside_another(name, dtype):
    u, h = torch.eye(2, dtype=dtype)
    wanted = torch.tensor(IDENTICAL[name], dtype=torch.float64)
    close(d_of(name, [u, u, h]).double(), wanted, 1e-9 if dtype == torch.float64 else 1e-6)


# Rows 0, A, B with A and B in conflict: the closed forms of A and B, the zero row inactive.
_PROJECTED = off(A, B) + off(B, A)
_ADJUGATE = torch.tensor([[B @ B, -(A @ B)], [-(A @ B), A @ A]], dtype=torch.float64)
_ROOT = math.sqrt(float(torch.linalg.det(_ADJUGATE)))
_TRACE = float(A @ A + B @ B)
_LEAST = (_TRACE - math.sqrt(_TRACE**2 - 4 * _ROOT**2)) / 2
_ALIGN = math.sqrt(_LEAST) / (_ROOT * math.sqrt(_TRACE + 2 * _ROOT))
_ALIGN = _ALIGN * (_ADJUGATE + _ROOT * torch.eye(2, dtype=torch.float64))
ZERO_ROW = {
    "aligned_mtl": _ALIGN.sum(0) @ torch.stack([A, B]) / 3,
    "config": 0.5 * (3 + 0.5) * UNITS,
    # ⟨A + B, B⟩ < 0: the mean is projected off B.
    "dualproj": off(A + B, B) / 3,
    "fairgrad": UNITS / math.sqrt(1 + COSINE),
    "gradnorm_inverse": UNITS,
    "imtl_g": 3 * 0.5 / (3 + 0.5) * UNITS,
    "nash_mtl": UNITS / UNITS.norm(),
    "pcgrad": _PROJECTED,
    "primary": torch.zeros(2, dtype=torch.float64),
    "upgrad": _PROJECTED / 3,
}


@pytest.mark.parametrize("name", list(ZERO_ROW))
def test_a_task_without_a_gradient_leaves_the_others_their_problem(name):
    found = d_of(name, [0 * A, A, B])
    close(found, ZERO_ROW[name])


def test_cagrad_counts_a_zero_row_in_the_mean_but_not_in_the_worst_case():
    d = d_of("cagrad", [0 * A, A, B], rescale=0)
    mean = (A + B) / 3
    angles = torch.linspace(0, 2 * math.pi, 100_001, dtype=torch.float64)
    circle = mean + 0.5 * mean.norm() * torch.stack([angles.cos(), angles.sin()], 1)
    best = (circle @ torch.stack([A, B], 1)).amin(1).max()
    assert float(torch.minimum(d @ A, d @ B)) == pytest.approx(float(best), rel=1e-4)
    assert float((d - mean).norm()) == pytest.approx(0.5 * float(mean.norm()))


def test_mgda_under_l2_with_a_zero_row_is_zero_or_the_others():
    # LibMTL divides by the norm: NaN.
    rows = [0 * A, A, B]
    assert not d_of("mgda", rows, norm="l2").any()
    # Of two unit rows the mean has least norm; d combines the gradients as they are.
    close(d_of("mgda", rows, norm="l2", ignore_zero_rows=True), (A + B) / 2)


@pytest.mark.parametrize("name", DIRECT)
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float16, 1e-3), (torch.bfloat16, 1.0), (torch.bfloat16, 1e-25), (torch.float32, 1e-25)],
)
@pytest.mark.parametrize("n_tasks", [1, 2, 5])
def test_rows_whose_products_their_precision_cannot_hold(name, dtype, scale, n_tasks):
    # The squares of the entries underflow; the entries themselves do not.
    n_tasks = max(n_tasks, gradbal.info(name).promises.min_tasks)
    rows = random_rows(n_tasks, 30, 0) - 0.3
    j = torch.from_numpy(rows * scale).to(dtype)
    d, wanted = make(name).direction(j), make(name).direction(j.double())
    assert d.dtype == dtype
    rounding = torch.finfo(dtype).eps
    if not gradbal.info(name).promises.settles:
        return
    size = max(terms(make(name), j), float(wanted.norm()))
    assert float((d.double() - wanted).norm()) <= 4 * rounding * size


@pytest.mark.parametrize("angle", [1e-2, 1.0])
def test_mgda_ends_at_the_optimum_and_not_after_so_many_steps(angle):
    # A hundred steps of Frank-Wolfe leave a gap of 1e-2 angle² and a weight on all forty rows.
    j = np.ones(60) + angle * np.random.default_rng(0).standard_normal((40, 60))
    j /= np.linalg.norm(j, axis=1, keepdims=True)
    w = mgda(torch.from_numpy(j @ j.T)).numpy()
    d = w @ j
    gap = j @ d - d @ d
    assert gap.min() > -1e-14
    assert np.abs(gap[w > 0]).max() < 1e-14
    assert 10 < (w > 0).sum() < 20
    assert (w >= 0).all()
    assert w.sum() == pytest.approx(1)


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1.0, 1e6])
@pytest.mark.parametrize("n_tasks", [2, 3, 8])
def test_nash_mtl_is_exact_for_small_gradients_of_unequal_norms(scale, n_tasks):
    # A hundredfold spread of the norms leaves the official code's w wrong by 20 % and more.
    for seed in range(10):
        j = (random_rows(n_tasks, 12, seed, spread=100.0) - 0.3) * scale
        w = nash_mtl(torch.from_numpy(j @ j.T)).numpy()
        assert np.abs(w * (j @ (w @ j)) - 1).max() < 1e-10


@pytest.mark.parametrize("ratio", [1e-2, 1e-3, 1e-6])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("scale", [1e-8, 1.0])
def test_fairgrad_is_exact_where_a_small_row_conflicts(ratio, alpha, scale):
    # The official code's solver stops early on small Gramians.
    b = torch.tensor([-0.9, math.sqrt(0.19)], dtype=torch.float64) * ratio
    j = torch.stack([A / 3, b]) * scale
    w = gradbal.create("fairgrad", alpha=alpha).weights(j @ j.T)
    gains, wanted, n = j @ (w @ j), w ** (-1 / alpha), j.norm(dim=1)
    assert (gains > 0).all()
    assert float(((gains - wanted).abs() / torch.maximum(wanted, n * (w @ n))).max()) < 1e-12


@pytest.mark.parametrize("length", [0.25, 0.2])
def test_imtl_g_where_the_sum_of_the_weights_vanishes_or_is_negative(length):
    # TorchJD returns zero where 1ᵀv vanishes; the paper's formula explodes, and below it ascends.
    between = torch.tensor([0.6, 0.6, math.sqrt(0.28)], dtype=torch.float64)
    j = torch.eye(3, dtype=torch.float64)
    j[2] = length * between
    w = gradbal.create("imtl_g").weights(j @ j.T)
    v = torch.tensor([1.0, 1.0, -0.5 / length], dtype=torch.float64)
    close(w, v / v.abs().sum())
    assert (j @ (w @ j) > 0).all()


def test_pcgrad_draws_an_order_of_its_own_for_every_task():
    # The official code's shuffle has no effect.
    generator = torch.Generator().manual_seed(0)
    draws = [tuple(random_orders(3, generator)[:, 0].tolist()) for _ in range(1600)]
    counts = [draws.count((i, j, k)) for i in (1, 2) for j in (0, 2) for k in (0, 1)]
    # Eight equally frequent triples: a standard deviation is 13.
    assert sum(counts) == 1600
    assert all(abs(count - 200) < 60 for count in counts)


@pytest.mark.parametrize(("rescale", "divisor"), [(0, 1.0), (1, 1.16), (2, 1.4)])
@pytest.mark.parametrize("scale", [1e-8, 1.0])
def test_cagrad_goes_on_along_the_mean_at_a_stationary_point(rescale, divisor, scale):
    # The first two cancel, and no direction in the ball is better than ⟨d, g_1⟩ = ⟨d, g_2⟩ = 0.
    u, h = torch.eye(2, dtype=torch.float64) * scale
    d = d_of("cagrad", [u, -u, h], c=0.4, rescale=rescale)
    close(d, h / 3 / divisor)


def _two_heads(name, **keywords):
    """`.grad` of the two heads, whose own gradients are 5 and 7; the shared ones are A and B."""
    shared = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    heads = [nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2)]
    sgd = torch.optim.SGD([shared, *heads], lr=1.0)
    opt = gradbal.MultiTaskOptimizer(sgd, name, **keywords)
    opt.backward([shared @ A + 5 * heads[0].sum(), shared @ B + 7 * heads[1].sum()])
    return [float(head.grad) for head in heads]


_NASH = 1 / math.sqrt(1 + COSINE)
WEIGHTED = {
    "imtl_g": (0.5 / 3.5, 3 / 3.5),
    "mgda": ((B @ (B - A)) / (A - B).square().sum(), (A @ (A - B)) / (A - B).square().sum()),
    # Not scaled to `max_norm`, as the shared gradient is.
    "nash_mtl": (_NASH / 3, _NASH / 0.5),
}


@pytest.mark.parametrize("name", list(WEIGHTED))
def test_heads_are_weighted_as_their_papers_have_it(name):
    # In LibMTL it depends on how the gradients were taken.
    first, second = (float(w) for w in WEIGHTED[name])
    assert _two_heads(name) == pytest.approx([5 * first, 7 * second])
    assert _two_heads(name, heads="own") == [5, 7]


@pytest.mark.parametrize(
    "name", ["aligned_mtl", "cagrad", "config", "dualproj", "fairgrad", "pcgrad", "rgw", "upgrad"]
)
def test_heads_keep_their_own_gradients_as_the_official_code_has_it(name):
    assert _two_heads(name) == [5, 7]
