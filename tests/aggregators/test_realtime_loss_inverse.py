"""Weights inverse to the present losses, or to their moving averages."""

import math

import pytest
import torch
from torch.optim import SGD

import gradbal
from gradbal import MultiTaskOptimizer
from gradbal.aggregators.realtime_loss_inverse import realtime_loss_inverse
from tests.aggregators.losses import (
    assert_reads_nothing,
    assert_resumes_anywhere,
    random_losses,
    seen,
    vector,
)
from tests.zoo import make

NAME = "realtime_loss_inverse"


@pytest.mark.parametrize("n_tasks", [1, 2, 5])
def test_the_gradient_is_that_of_the_logarithms(n_tasks: int) -> None:
    l = torch.from_numpy(random_losses(n_tasks, n_tasks)).requires_grad_()
    (wanted,) = torch.autograd.grad(l.log().sum(), l)
    method = gradbal.create(NAME)
    torch.testing.assert_close(method.loss_weights(l), wanted)
    assert float(method.scalarize(l).detach()) == pytest.approx(n_tasks)
    # T/L times the geometric mean's.
    mean = gradbal.create("gls")
    w = mean.loss_weights(l) * n_tasks / mean.scalarize(l).detach()
    torch.testing.assert_close(w, wanted)


def test_moving_averages_by_hand() -> None:
    method = gradbal.create(NAME, ema=0.75)
    # m = 4, ¾·4 + ¼·8 = 5, ¾·5 + ¼·1 = 4.
    for loss, average in ((4.0, 4.0), (8.0, 5.0), (1.0, 4.0)):
        for _ in range(2):
            w = method.loss_weights(vector(loss, 1.0))
            assert w.tolist() == pytest.approx([1 / average, 1.0], rel=1e-12)
        assert float(method.scalarize(vector(loss, 1.0))) == pytest.approx(loss / average + 1)
        seen(method, (loss, 1.0))


def test_tasks_that_sit_out_keep_their_averages() -> None:
    method, nan = gradbal.create(NAME, ema=0.5), float("nan")
    method.observe(vector(4.0, nan, 1.0), [0, 2])
    method.observe(vector(nan, nan, 3.0), [2])
    # Averages 4, none, 2.
    w = method.loss_weights(vector(8.0, 5.0, 2.0))
    assert w.tolist() == pytest.approx([1 / 6, 1 / 5, 1 / 2])
    w = method.loss_weights(vector(5.0, 4.0), tasks=[1, 2])
    assert w.tolist() == pytest.approx([1 / 5, 1 / 3])
    method.observe(vector(8.0, 5.0, 2.0))
    assert method.average.tolist() == pytest.approx([6.0, 5.0, 2.0])


@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("k", [1e-8, 1e8])
def test_the_scale_of_a_loss_does_not_matter(ema: float, k: float) -> None:
    j, l, scales = (
        torch.randn(3, 6, dtype=torch.float64),
        vector(0.3, 2.0, 7.0),
        vector(1.0, k, 1.0),
    )
    plain, scaled = (gradbal.create(NAME, ema=ema) for _ in range(2))
    for step in range(3):
        d = plain.direction(j, l / (step + 1))
        d_scaled = scaled.direction(scales[:, None] * j, scales * l / (step + 1))
        torch.testing.assert_close(d_scaled, d, rtol=1e-10, atol=0)


def test_eps_is_added_to_the_losses() -> None:
    w = gradbal.create(NAME, eps=0.5).loss_weights(vector(0.0, 1.5))
    assert w.tolist() == [2.0, 0.5]


def test_micro_batches_are_weighted_by_their_sum() -> None:
    model = make("Plain")
    opt = MultiTaskOptimizer(SGD(model.parameters(), lr=0.01), NAME)
    whole = torch.stack(model.losses(model.batch())).detach()
    for i, part in enumerate(model.batch().chunk(2)):
        opt.backward([l / 2 for l in model.losses(part)], accumulate=i == 0)
    torch.testing.assert_close(opt.weights, 1 / whole)


def test_bad_input_changes_nothing() -> None:
    method = seen(gradbal.create(NAME, ema=0.5), (1.0, 2.0))
    before = repr(method.state_dict())
    for call in (method.scalarize, method.observe):
        with pytest.raises(
            ValueError, match=rf"'{NAME}' needs positive losses, found 0 for task 1"
        ):
            call(vector(1.0, 0.0))
    with pytest.raises(ValueError, match="found -1 for task 7"):
        method.scalarize(vector(-1.0), tasks=[7])
    with pytest.raises(ValueError, match=f"`{NAME}` has 2 tasks, found 3"):
        method.scalarize(torch.ones(3))
    assert repr(method.state_dict()) == before


@pytest.mark.parametrize(
    "keywords", [{"ema": 1.0}, {"ema": -0.1}, {"eps": -1.0}, {"eps": math.inf}], ids=str
)
def test_bad_hyperparameters(keywords: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(keywords))}` must be in"):
        gradbal.create(NAME, **keywords)


@pytest.mark.parametrize("keywords", [{}, {"ema": 0.9}], ids=str)
def test_checkpoints_reset_and_nothing_read(keywords: dict[str, object]) -> None:
    assert_resumes_anywhere(NAME, **keywords)
    method = gradbal.create(NAME, **keywords)
    assert_reads_nothing(method)
    method.reset()
    assert method.average is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_precision(dtype: torch.dtype) -> None:
    found = realtime_loss_inverse(torch.tensor([3.0, 4.0], dtype=dtype))
    assert found.dtype == dtype
    assert float(found) == 2.0
