"""Weights inverse to the first losses: warm-ups by hand, given losses, tasks that sit out."""

import copy
import math

import pytest
import torch
from torch.optim import LBFGS, SGD

import gradbal
from gradbal import MultiTaskOptimizer
from tests.aggregators.losses import (
    assert_reads_nothing,
    assert_resumes_anywhere,
    seen,
    vector,
)
from tests.zoo import make

NAME = "init_loss_inverse"


def test_the_first_batch() -> None:
    method = gradbal.create(NAME)
    assert method.loss_weights(vector(2.0, 0.1)).tolist() == pytest.approx([0.5, 10.0])
    # Only a step that is taken counts.
    assert method.loss_weights(vector(4.0, 0.2)).tolist() == pytest.approx([0.25, 5.0])
    seen(method, (4.0, 0.2), (100.0, 100.0))
    assert method.loss_weights(vector(1.0, 1.0)).tolist() == pytest.approx([0.25, 5.0])
    assert float(method.scalarize(vector(1.0, -1.0))) == pytest.approx(0.25 - 5.0)


def test_a_warm_up_by_hand() -> None:
    method = gradbal.create(NAME, warmup=3)
    # Means 4, (4 + 2)/2, (4 + 2 + 0.3)/3; then that one.
    for loss, mean in ((4.0, 4.0), (2.0, 3.0), (0.3, 2.1), (50.0, 2.1), (1.0, 2.1)):
        w = method.loss_weights(vector(loss, 1.0))
        assert w.tolist() == pytest.approx([1 / mean, 1.0], rel=1e-12)
        seen(method, (loss, 1.0))


def test_initial_losses_that_are_known() -> None:
    method = gradbal.create(NAME, initial=[math.log(10), 2.0])
    for losses in (vector(2.0, 0.1), vector(-1.0, 0.0)):
        assert method.loss_weights(losses).tolist() == pytest.approx([1 / math.log(10), 0.5])
        method.observe(losses)
    assert method.total is None


def test_tasks_that_sit_out_have_their_own_first_losses() -> None:
    method, nan = gradbal.create(NAME, warmup=2), float("nan")
    method.observe(vector(2.0, nan, 1.0), [0, 2])
    method.observe(vector(4.0, nan, 3.0), [0, 2])
    # The first has 3 for good, the second what it has now, and then its mean.
    assert method.loss_weights(vector(9.0, 5.0, 9.0)).tolist() == pytest.approx([1 / 3, 0.2, 0.5])
    assert method.loss_weights(vector(9.0, 5.0), tasks=[0, 1]).tolist() == pytest.approx(
        [1 / 3, 0.2]
    )
    method.observe(vector(9.0, 5.0, 9.0))
    assert method.loss_weights(vector(9.0, 7.0), tasks=[0, 1]).tolist() == pytest.approx(
        [1 / 3, 1 / 6]
    )
    method.observe(vector(9.0, 7.0, nan), [0, 1])
    assert method.loss_weights(torch.ones(3)).tolist() == pytest.approx([1 / 3, 1 / 6, 0.5])


@pytest.mark.parametrize("k", [1e-8, 1e8])
def test_the_scale_of_a_loss_does_not_matter(k: float) -> None:
    j, l, scales = (
        torch.randn(3, 6, dtype=torch.float64),
        vector(0.3, 2.0, 7.0),
        vector(1.0, k, 1.0),
    )
    plain, scaled = (gradbal.create(NAME, warmup=2) for _ in range(2))
    for step in range(4):
        d = plain.direction(j, l / (step + 1))
        d_scaled = scaled.direction(scales[:, None] * j, scales * l / (step + 1))
        torch.testing.assert_close(d_scaled, d, rtol=1e-10, atol=0)


def test_in_training_with_micro_batches() -> None:
    model = make("Plain")
    opt = MultiTaskOptimizer(SGD(model.parameters(), lr=0.01), NAME)
    twin = copy.deepcopy(model)
    other = MultiTaskOptimizer(SGD(twin.parameters(), lr=0.01), NAME)
    first = torch.stack(model.losses(model.batch())).detach()
    for _ in range(3):
        opt.zero_grad()
        opt.backward(model.losses(model.batch()))
        opt.step()
        torch.testing.assert_close(opt.weights, 1 / first)
        other.zero_grad()
        for i, part in enumerate(twin.batch().chunk(2)):
            other.backward([l / 2 for l in twin.losses(part)], accumulate=i == 0)
        other.step()
        torch.testing.assert_close(other.weights, 1 / first)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_an_optimizer_that_asks_again_meets_the_same_objective() -> None:
    model, twin = make("Plain"), make("Plain")
    keywords = {"line_search_fn": "strong_wolfe", "max_iter": 6}
    opt = MultiTaskOptimizer(LBFGS(model.parameters(), **keywords), NAME)
    plain = LBFGS(twin.parameters(), **keywords)
    first = torch.stack(twin.losses(twin.batch())).detach()

    def closure() -> torch.Tensor:
        plain.zero_grad()
        loss = (torch.stack(twin.losses(twin.batch())) / first).sum()
        loss.backward()
        return loss

    for _ in range(3):
        opt.step(lambda: model.losses(model.batch()))
        plain.step(closure)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_micro_batches_add_up_once_the_weights_are_known() -> None:
    method = gradbal.create(NAME, warmup=2)
    assert not method.linear
    seen(method, (1.0, 1.0))
    assert not method.linear
    seen(method, (1.0, 1.0))
    assert method.linear
    assert gradbal.create(NAME, initial=[1.0]).linear
    method.reset()
    assert not method.linear


def test_a_loss_that_is_not_positive_changes_nothing() -> None:
    method = seen(gradbal.create(NAME, warmup=2), (1.0, 2.0))
    before = repr(method.state_dict())
    for call in (method.scalarize, method.observe):
        with pytest.raises(
            ValueError, match=rf"'{NAME}' needs positive losses, found -3 for task 1"
        ):
            call(vector(1.0, -3.0))
    with pytest.raises(ValueError, match="found 0 for task 1"):
        method.observe(vector(-1.0, 0.0), [1])
    with pytest.raises(ValueError, match=f"`{NAME}` has 2 tasks, found 3"):
        method.scalarize(torch.ones(3))
    assert repr(method.state_dict()) == before
    # After the warm-up there is nothing to divide by.
    seen(method, (1.0, 2.0), (-1.0, -1.0))
    assert float(method.scalarize(vector(-1.0, 0.0))) == -1.0


@pytest.mark.parametrize(
    ("keywords", "error", "words"),
    [
        ({"warmup": 0}, ValueError, "`warmup` must be in"),
        ({"warmup": 1.0}, TypeError, "`warmup` must be an integer"),
        ({"initial": [1.0, 0.0]}, ValueError, "`initial` must be positive"),
        ({"initial": [1.0, math.inf]}, ValueError, "`initial` must be a sequence of finite"),
    ],
)
def test_bad_hyperparameters(keywords: dict[str, object], error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        gradbal.create(NAME, **keywords)


def test_other_numbers_of_tasks() -> None:
    method = gradbal.create(NAME, initial=[1.0, 2.0])
    for call in (method.scalarize, lambda losses: method.prepare(3, losses)):
        with pytest.raises(ValueError, match="`initial` must have one entry for each of 3 tasks"):
            call(torch.ones(3))


@pytest.mark.parametrize(
    "keywords", [{}, {"warmup": 4}, {"warmup": 99}, {"initial": [1.0, 2.0, 3.0]}], ids=str
)
def test_it_resumes_anywhere(keywords: dict[str, object]) -> None:
    assert_resumes_anywhere(NAME, **keywords)


def test_nothing_read() -> None:
    for keywords in ({}, {"warmup": 4}, {"initial": [1.0, 2.0, 3.0]}):
        assert_reads_nothing(gradbal.create(NAME, **keywords))
