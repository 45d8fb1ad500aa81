"""What every aggregator must satisfy, parametrised from the registry: a method is tested by being
registered, and what it promises there is what is tested here."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import gradbal
from tests.aggregators.inputs import (
    DIRECT,
    FAMILIES,
    WELL_POSED,
    Case,
    cases,
    make,
    suited,
    terms,
    weights_of,
)

ALL = gradbal.list_aggregators()
SCALES = (1e-8, 1e-4, 1e4, 1e8)

every = pytest.mark.parametrize("name", DIRECT)
every_single = pytest.mark.parametrize("name", ALL)


def promising(promise: str) -> pytest.MarkDecorator:
    """The methods whose registry entry makes a promise."""
    names = [n for n in DIRECT if getattr(gradbal.info(n).promises, promise) not in (None, False)]
    return pytest.mark.parametrize("name", names)


def smooth(name: str) -> tuple[str, ...]:
    """The families on which a rounding error may not change the result."""
    return FAMILIES if gradbal.info(name).promises.continuous else WELL_POSED


def error(found: Tensor, wanted: Tensor, size: float) -> float:
    """Distance relative to the size of the terms of the sum."""
    gap = float((found.double() - wanted.double()).norm())
    return gap / size if size > 0 else gap


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@given(case=cases())
def test_any_input_gives_a_finite_direction_of_the_same_kind(name, dtype, case):
    j = suited(name, case).jacobian()
    if dtype == torch.float16:
        # Its largest number is 65504, its smallest 6e-8.
        j = j / j.abs().max().clamp_min(1e-300)
    j = j.to(dtype)
    before = j.clone()
    d = make(name).direction(j)
    assert d.shape == j.shape[1:]
    assert d.dtype == dtype
    assert d.device == j.device
    # 1/|g| of a float16 row may itself be beyond float16, which is the format's limit.
    if dtype != torch.float16 or gradbal.info(name).promises.degree == 1:
        assert d.isfinite().all()
    assert torch.equal(j, before)


@promising("non_conflicting")
@given(case=cases())
def test_no_task_is_conflicted_with(name, case):
    j = suited(name, case).jacobian()
    aggregator = make(name)
    d = aggregator.direction(j)
    n = j.norm(dim=1)
    # Near a stationary point d is a small difference of large terms, known to their rounding.
    size = terms(aggregator, j)
    rounding = 1e-12 * size
    if size > 1e4 * d.norm():
        # There a ridge r bounds the weights by √(T/r) and leaves conflicts up to √(T r).
        rounding += (len(j) * getattr(aggregator, "ridge", 0.0)) ** 0.5
    counts = n > 1e-12 * n.max()  # the others are taken as zero
    assert (j @ d >= -n * (1e-7 * d.norm() + rounding))[counts].all()


@promising("permutation_invariant")
@given(case=cases(), seed=st.integers(0, 1000))
def test_permuting_the_tasks_changes_nothing(name, case, seed):
    if not gradbal.info(name).promises.deterministic:
        return
    if case.family not in smooth(name):
        case = Case("normal", case.n_tasks, case.width, case.seed)
    j = suited(name, case).jacobian()
    order = torch.randperm(len(j), generator=torch.Generator().manual_seed(seed))
    aggregator = make(name)
    d, permuted = aggregator.direction(j), make(name).direction(j[order])
    assert error(permuted, d, terms(aggregator, j)) < 1e-6
    w = weights_of(aggregator, j)
    # Weights are unique where no row is a combination of others.
    if w is not None and case.family in WELL_POSED and len(j) <= j.shape[1]:
        n = j.norm(dim=1)
        w_permuted = weights_of(make(name), j[order])
        assert error(w_permuted * n[order], (w * n)[order], terms(aggregator, j)) < 1e-5


@promising("degree")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@given(case=cases(), scale=st.sampled_from(SCALES))
def test_homogeneous_of_the_promised_degree(name, dtype, case, scale):
    if case.family not in smooth(name):
        case = Case("normal", case.n_tasks, case.width, case.seed)
    j = suited(name, case).jacobian().to(dtype)
    # A power of two scales float32 rows without rounding them, so that the problem is the same.
    scale = 2.0 ** round(math.log2(scale))
    aggregator = make(name)
    d = aggregator.direction(j)
    scaled = make(name).direction(j * scale)
    wanted = d.double() * scale**aggregator.promises.degree
    size = terms(aggregator, j) * scale**aggregator.promises.degree
    assert error(scaled, wanted, size) < (1e-7 if dtype == torch.float64 else 1e-6)


@every
@given(case=cases(), seed=st.integers(0, 1000))
def test_rotating_columns_rotates_the_direction(name, case, seed):
    if gradbal.info(name).kind == "jacobian":
        return
    if case.family not in smooth(name):
        case = Case("normal", case.n_tasks, case.width, case.seed)
    j = suited(name, case).jacobian()
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(j.shape[1], j.shape[1], dtype=j.dtype, generator=generator))[0]
    aggregator = make(name)
    d = aggregator.direction(j)
    assert error(make(name).direction(j @ q), d @ q, terms(aggregator, j)) < 1e-6


@every
@given(case=cases())
def test_zero_columns_change_nothing(name, case):
    if case.family not in smooth(name):
        case = Case("normal", case.n_tasks, case.width, case.seed)
    j = suited(name, case).jacobian()
    wide = torch.cat([j, torch.zeros(len(j), 7, dtype=j.dtype)], 1)
    d, d_wide = make(name).direction(j), make(name).direction(wide)
    assert error(d_wide[:-7], d, terms(make(name), j)) < 1e-6
    assert not d_wide[-7:].any()


@promising("gain")
@pytest.mark.parametrize("n_tasks", [1, 2, 3, 7])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_equal_rows_and_a_single_task_give_the_promised_gain(name, n_tasks, scale):
    g = torch.randn(20, dtype=torch.float64) * scale
    n_tasks = max(n_tasks, gradbal.info(name).promises.min_tasks)
    aggregator = make(name)
    d = aggregator.direction(g.expand(n_tasks, -1))
    gain = aggregator.promises.gain(aggregator, n_tasks, float(g.norm()))
    torch.testing.assert_close(d, gain * g, rtol=1e-6, atol=0)


@every
@pytest.mark.parametrize("n_tasks", [1, 2, 5])
def test_all_rows_zero_give_zero(name, n_tasks):
    n_tasks = max(n_tasks, gradbal.info(name).promises.min_tasks)
    aggregator = make(name)
    assert not aggregator.direction(torch.zeros(n_tasks, 6)).any()
    w = weights_of(aggregator, torch.zeros(n_tasks, 6))
    assert w is None or w.isfinite().all()
    # The weights of a scalarizer are what its losses make them.
    assert w is None or gradbal.info(name).kind == "scalarizer" or (w > 0).all()


@promising("zero_rows_inactive")
@given(case=cases(("zero_row",)))
def test_a_zero_row_has_no_weight(name, case):
    j = suited(name, case).jacobian()
    if len(j) == 1 or gradbal.info(name).kind != "gramian":
        return
    w = make(name).weights(j @ j.T)
    zero = (j == 0).all(1)
    if name in ("mgda", "mgda_ub"):
        # By definition: the point is Pareto stationary.
        assert not make(name).direction(j).any()
        w = make(name, ignore_zero_rows=True).weights(j @ j.T)
    assert not w[zero].any()
    assert w.isfinite().all()


@every
def test_an_inf_or_nan_gramian_is_an_error(name):
    if gradbal.info(name).kind != "gramian":
        return
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="must be finite"):
            make(name).weights(torch.tensor([[1.0, 0.0], [0.0, bad]]))
    with pytest.raises(ValueError, match=r"shape \[T, T\]"):
        make(name).weights(torch.ones(2, 3))


@promising("simplex")
@given(case=cases())
def test_weights_are_on_the_simplex(name, case):
    w = weights_of(make(name), suited(name, case).jacobian())
    assert (w >= 0).all()
    assert float(w.sum()) == pytest.approx(1, abs=1e-12)


@promising("row_scale_invariant")
@given(case=cases(("normal", "low_rank", "non_stationary")), seed=st.integers(0, 1000))
def test_scaling_rows_changes_nothing(name, case, seed):
    j = suited(name, case).jacobian()
    scales = 10 ** torch.from_numpy(np.random.default_rng(seed).uniform(-5, 5, (len(j), 1)))
    n = (scales * j).norm(dim=1)
    # A row 1e-12 times the largest counts as zero, which no scaling may change here.
    assume(bool(((n == 0) | (n > 1e-10 * n.max())).all()))
    aggregator = make(name)
    d, scaled = aggregator.direction(j), make(name).direction(scales * j)
    assert error(scaled, d, terms(aggregator, j)) < 1e-6


@promising("linear_row_scaling")
@given(case=cases(), seed=st.integers(0, 1000))
def test_linear_in_positive_row_scales(name, case, seed):
    j = suited(name, case).jacobian()
    rng = np.random.default_rng(seed)
    n = j.norm(dim=1)
    # A row 1e-12 times the largest counts as zero, which no scaling may change here.
    assume(bool(((n == 0) | (n > 1e-10 * n.max())).all()))
    a, b = torch.from_numpy(rng.uniform(0.1, 10, (2, len(j), 1)))
    d = make(name).direction((2 * a + 3 * b) * j)
    parts = 2 * make(name).direction(a * j) + 3 * make(name).direction(b * j)
    assert error(parts, d, terms(make(name), (2 * a + 3 * b) * j)) < 1e-6


@promising("settles")
@given(case=cases(WELL_POSED))
def test_float32_agrees_with_float64(name, case):
    j = suited(name, case).jacobian().float()
    aggregator = make(name)
    d = aggregator.direction(j.double())
    assert error(make(name).direction(j), d, terms(aggregator, j)) < 1e-5


@promising("settles")
@given(case=cases(WELL_POSED))
def test_a_wide_float32_jacobian_agrees_with_float64(name, case):
    # Beyond the size at which everything is done in float64 anyway.
    j = suited(name, case).jacobian().float()
    wide = j.repeat(1, -(-(1 << 17) // (j.shape[1] * len(j)))) if len(j) < 9 else j
    aggregator = make(name)
    exact = aggregator.direction(wide.double())
    # An ill-conditioned problem amplifies the 1e-8 of the blocked product.
    condition = float(torch.linalg.cond(torch.nn.functional.normalize(wide.double())))
    limit = 1e-5 * min(condition, 1e4) ** 2 if gradbal.info(name).kind == "gramian" else 1e-5
    assert error(make(name).direction(wide), exact, terms(aggregator, wide)) < limit


@every
def test_two_runs_agree_and_a_checkpoint_goes_on_bit_for_bit(name):
    jacobians = torch.randn(6, 4, 10, dtype=torch.float64)
    losses = torch.rand(6, 4, dtype=torch.float64) + 0.5
    first = make(name)
    run = [first.direction(j, l) for j, l in zip(jacobians, losses, strict=True)]
    again = make(name)
    for j, l, d in zip(jacobians[:3], losses, run, strict=False):
        assert torch.equal(again.direction(j, l), d)
    resumed = make(name, seed=77)
    resumed.load_state_dict(again.state_dict())
    for j, l, d in zip(jacobians[3:], losses[3:], run[3:], strict=True):
        assert torch.equal(resumed.direction(j, l), d)
    again.reset()
    assert torch.equal(again.direction(jacobians[0], losses[0]), run[0])


@every_single
def test_a_checkpoint_of_another_method_is_refused(name):
    other = "mgda" if name != "mgda" else "upgrad"
    aggregator = make(name)
    before = repr(aggregator)
    with pytest.raises(ValueError, match=f"a checkpoint of '{name}' is required, found one of"):
        aggregator.load_state_dict(make(other).state_dict())
    assert repr(aggregator) == before


@every_single
def test_hyperparameters_survive_repr_and_checkpoint(name):
    aggregator = make(name)
    keywords = aggregator.hyperparameters()
    assert repr(gradbal.create(name, **keywords)) == repr(aggregator)
    assert all(f"{k}={v!r}" in repr(aggregator) for k, v in keywords.items())
    assert aggregator.state_dict()["hyperparameters"] == keywords


@every
def test_the_global_random_state_is_not_used(name):
    aggregator = make(name)
    before = torch.random.get_rng_state()
    aggregator.direction(torch.randn(3, 5, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.random.get_rng_state(), before)


@every_single
def test_the_registry_entry_is_complete(name):
    entry = gradbal.info(name)
    assert entry.title
    assert entry.venue
    assert entry.summary
    assert entry.consumes
    assert entry.cost
    assert entry.venue == "folklore" or (entry.year and entry.url.startswith("https://"))
    assert entry.promises.heads in ("own", "weighted")
    assert isinstance(entry.promises.deterministic, bool)
    assert repr(gradbal.create(name)).startswith(entry.cls.__name__)
    doc = entry.cls.__doc__
    assert ">>>" in doc
    assert entry.url in doc
