"""Weights inverse to prior losses, and the losses of constant predictions."""

import math

import pytest
import torch
from torch import nn

import gradbal
from gradbal.aggregators.prior_loss_inverse import prior_loss, prior_loss_inverse
from tests.aggregators.losses import assert_reads_nothing, assert_resumes_anywhere, vector

NAME = "prior_loss_inverse"


def test_the_weights_are_the_inverses() -> None:
    j = torch.randn(2, 5, dtype=torch.float64)
    method = gradbal.create(NAME, prior=[4.0, 0.5])
    torch.testing.assert_close(method.direction(j), j[0] / 4 + 2 * j[1])
    assert float(method.scalarize(vector(1.0, -1.0))) == -1.75
    assert float(prior_loss_inverse(vector(1.0, 1.0), vector(2.0, 4.0))) == 0.75
    assert method.linear


def test_without_priors_it_is_the_sum() -> None:
    j = torch.randn(4, 5)
    assert torch.equal(gradbal.create(NAME).direction(j), gradbal.create("sum").direction(j))


def test_priors_go_with_their_tasks() -> None:
    method = gradbal.create(NAME, prior=[4.0, 9.0, 0.5])
    assert method.loss_weights(torch.ones(2), tasks=[0, 2]).tolist() == [0.25, 2.0]
    for call in (method.scalarize, lambda losses: method.prepare(2, losses)):
        with pytest.raises(ValueError, match="`prior` must have one entry for each of 2 tasks"):
            call(torch.ones(2))


@pytest.mark.parametrize("shape", [(500,), (20, 5, 5)])
def test_the_entropy_is_the_least_cross_entropy_of_a_constant(shape: tuple[int, ...]) -> None:
    labels = torch.randint(0, 5, shape)
    labels[labels == 3] = 0  # a class without examples
    logits = nn.Parameter(torch.zeros(5, dtype=torch.float64))
    lbfgs = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-10, tolerance_change=1e-14)

    def closure() -> torch.Tensor:
        lbfgs.zero_grad()
        rows = logits.expand(labels.numel(), 5)
        loss = nn.functional.cross_entropy(rows, labels.flatten())
        loss.backward()
        return loss

    for _ in range(5):
        loss = lbfgs.step(closure).detach()
    assert prior_loss(labels, "classification") == pytest.approx(float(loss), rel=1e-6)


@pytest.mark.parametrize("shape", [(50,), (50, 3)])
def test_the_variance_is_the_least_squared_error_of_a_constant(shape: tuple[int, ...]) -> None:
    labels = torch.randn(shape, dtype=torch.float64) * 3 + 100
    constant = labels.mean(0).expand(shape)
    wanted = float(nn.functional.mse_loss(constant, labels))
    assert prior_loss(labels.float(), "regression") == pytest.approx(wanted, rel=1e-5)
    assert float(nn.functional.mse_loss(constant + 0.1, labels)) > wanted


def test_known_entropies() -> None:
    assert prior_loss(torch.arange(10).repeat(3), "classification") == pytest.approx(math.log(10))
    assert prior_loss(torch.tensor([True, False, False, False]), "classification") == pytest.approx(
        0.25 * math.log(4) + 0.75 * math.log(4 / 3)
    )
    assert prior_loss(torch.ones(5, dtype=torch.int32), "classification") == 0.0


@pytest.mark.parametrize(
    ("labels", "kind", "words"),
    [
        (torch.ones(0), "regression", "`labels` must have at least one entry"),
        (torch.tensor([1.0, math.nan]), "regression", "`labels` must be finite"),
        (
            torch.tensor([1.0]),
            "classification",
            "`labels` must be class indices, found torch.float",
        ),
        (torch.tensor([1, -1]), "classification", "from 0 on, found -1; leave out what the loss"),
        (torch.tensor([1]), "ranking", "`kind` must be one of 'classification', 'regression'"),
    ],
)
def test_bad_labels(labels: torch.Tensor, kind: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        prior_loss(labels, kind)


@pytest.mark.parametrize("prior", [[1.0, 0.0], [-1.0]])
def test_bad_priors(prior: list[float]) -> None:
    with pytest.raises(ValueError, match="`prior` must be positive"):
        gradbal.create(NAME, prior=prior)


def test_checkpoints_and_nothing_read() -> None:
    assert_resumes_anywhere(NAME, prior=[1.0, 2.0, 3.0])
    assert_reads_nothing(gradbal.create(NAME, prior=[1.0, 2.0, 3.0]))
