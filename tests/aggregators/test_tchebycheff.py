"""Tchebycheff: only the worst task descends."""

import numpy as np
import pytest
import torch
from torch.optim import SGD

import gradbal
from gradbal import MultiTaskOptimizer
from gradbal.aggregators.tchebycheff import tchebycheff
from tests.aggregators.losses import (
    assert_reads_nothing,
    assert_resumes_anywhere,
    random_losses,
    vector,
)
from tests.zoo import make


@pytest.mark.parametrize("augment", [0.0, 0.05])
@pytest.mark.parametrize("n_tasks", [1, 2, 5])
def test_value_and_weights(n_tasks: int, augment: float) -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        l, p, z = random_losses(seed, n_tasks), rng.uniform(0, 1, n_tasks), rng.normal(size=n_tasks)
        method = gradbal.create("tchebycheff", augment=augment, pref=p.tolist(), ideal=z.tolist())
        y = p * (l - z)
        value = float(method.scalarize(torch.from_numpy(l)))
        assert value == pytest.approx(y.max() + augment * y.sum(), rel=1e-12)
        wanted = augment * p
        wanted[y.argmax()] += p[y.argmax()]
        w = method.loss_weights(torch.from_numpy(l)).numpy()
        np.testing.assert_allclose(w, wanted, rtol=1e-12)


def test_the_first_of_equal_ones_descends() -> None:
    method = gradbal.create("tchebycheff")
    assert method.loss_weights(vector(1.0, 3.0, 3.0)).tolist() == [0.0, 1 / 3, 0.0]
    assert method.loss_weights(torch.ones(3)).tolist() == pytest.approx([1 / 3, 0.0, 0.0])


@pytest.mark.parametrize("size", [1e-8, 1e8])
def test_the_scale_of_all_losses_does_not_matter(size: float) -> None:
    l = vector(0.3, 7.0, 2.0)
    assert gradbal.create("tchebycheff").loss_weights(size * l).tolist() == [0.0, 1 / 3, 0.0]
    assert gradbal.create("tchebycheff").loss_weights(-l).tolist() == [1 / 3, 0.0, 0.0]


def test_it_finds_the_optimum_that_the_preference_picks() -> None:
    # On the front of x² and (x − 1)², p_1 x² = p_2 (x − 1)²: x = 1/(1 + √(p_1/p_2)).
    x = torch.nn.Parameter(vector(0.9))
    sgd = SGD([x], lr=0.05)
    opt = MultiTaskOptimizer(sgd, "tchebycheff", pref=[0.8, 0.2])
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.99)
    for _ in range(1000):
        opt.zero_grad()
        opt.backward([x.square().sum(), (x - 1).square().sum()])
        opt.step()
        scheduler.step()
    assert float(x.detach()) == pytest.approx(1 / 3, abs=1e-3)


def test_in_training_the_others_get_no_gradient() -> None:
    model = make("Plain")
    opt = MultiTaskOptimizer(SGD(model.parameters(), lr=0.1), "tchebycheff")
    losses = model.losses(model.batch())
    worst = int(torch.stack(losses).argmax())
    opt.backward(losses)
    for i, head in enumerate(model.heads):
        assert bool(head.weight.grad.any()) == (i == worst)


def test_tasks_that_sit_out() -> None:
    method = gradbal.create("tchebycheff", pref=[0.0, 1.0, 2.0], ideal=[0.0, 5.0, 1.0])
    assert method.loss_weights(vector(9.0, 2.0), tasks=[0, 2]).tolist() == [0.0, 2.0]
    with pytest.raises(ValueError, match=r"`pref` must have a positive entry, found \[0.0\]"):
        method.loss_weights(vector(9.0), tasks=[0])


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"augment": -0.1}, "`augment` must be in"),
        ({"pref": [1.0, -1.0]}, "`pref` must be non-negative"),
        ({"pref": []}, "`pref` must have a positive entry"),
        ({"ideal": "ab"}, "`ideal` must be a sequence of finite numbers"),
    ],
)
def test_bad_hyperparameters(keywords: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        gradbal.create("tchebycheff", **keywords)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_precision(dtype: torch.dtype) -> None:
    found = tchebycheff(torch.tensor([2.0, 3.0], dtype=dtype), torch.tensor([0.5, 0.5]), 1.0, 0.5)
    assert found.dtype == dtype
    assert float(found) == 1.75


def test_checkpoints_and_nothing_read() -> None:
    assert_resumes_anywhere("tchebycheff", augment=0.1, pref=[1.0, 2.0, 0.5])
    assert_reads_nothing(gradbal.create("tchebycheff", augment=0.1, ideal=[0.0, 1.0, 2.0]))
