"""PBI: along a ray and back to it."""

import math

import numpy as np
import pytest
import torch

import gradbal
from gradbal.aggregators.pbi import pbi
from tests.aggregators.losses import (
    assert_reads_nothing,
    assert_resumes_anywhere,
    derivative,
    random_losses,
    vector,
)


def _value(l: np.ndarray, r: np.ndarray, z: np.ndarray, theta: float) -> float:
    """By the angle with the ray."""
    f, r = l - z, r / np.linalg.norm(r)
    along = f @ r
    return float(along + theta * math.sqrt(max(f @ f - along**2, 0.0)))


@pytest.mark.parametrize("theta", [0.0, 0.5, 5.0])
@pytest.mark.parametrize("n_tasks", [2, 3, 7])
def test_value_and_weights(n_tasks: int, theta: float) -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        l = random_losses(seed, n_tasks, 100)
        r, z = rng.uniform(0, 1, n_tasks), rng.uniform(-1, 1, n_tasks)
        method = gradbal.create("pbi", theta=theta, pref=r.tolist(), ideal=z.tolist())
        value = float(method.scalarize(torch.from_numpy(l)))
        assert value == pytest.approx(_value(l, r, z, theta), rel=1e-9)
        w = method.loss_weights(torch.from_numpy(l)).numpy()
        unit = r / np.linalg.norm(r)
        off = (l - z) - (l - z) @ unit * unit
        np.testing.assert_allclose(w, unit + theta * off / np.linalg.norm(off), rtol=1e-9)
        slope = derivative(lambda x: _value(x, r, z, theta), l)  # noqa: B023
        np.testing.assert_allclose(w, slope, atol=1e-4 * (1 + theta))


def test_weights_can_be_negative() -> None:
    w = gradbal.create("pbi", theta=1.0).loss_weights(vector(3.0, 1.0))
    assert w.tolist() == pytest.approx([math.sqrt(2), 0.0], abs=1e-12)
    assert gradbal.create("pbi").loss_weights(vector(3.0, 1.0))[1] < 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [1e-8, 1.0, 1e8])
def test_on_the_ray_there_is_no_distance(dtype: torch.dtype, size: float) -> None:
    # The rounding of r, of z + t r and of f is no distance either.
    for seed in range(50):
        rng = np.random.default_rng(seed)
        n_tasks = int(rng.integers(1, 9))
        r, z = rng.uniform(0.01, 1, n_tasks), size * rng.uniform(-3, 3, n_tasks)
        losses = torch.from_numpy(z + size * rng.uniform(0.1, 10) * r).to(dtype)
        method = gradbal.create("pbi", pref=r.tolist(), ideal=z.tolist())
        unit = torch.from_numpy(r / np.linalg.norm(r)).to(dtype)
        torch.testing.assert_close(method.loss_weights(losses), unit)


def test_just_off_the_ray_the_weights_are_those_of_the_distance() -> None:
    w = gradbal.create("pbi").loss_weights(vector(1 + 1e-12, 1.0))
    unit = math.sqrt(0.5)
    assert w.tolist() == pytest.approx([6 * unit, -4 * unit], rel=1e-3)


@pytest.mark.parametrize("size", [1e-8, 1e8])
def test_the_sizes_of_preference_and_losses_do_not_matter(size: float) -> None:
    l, r = vector(0.3, 2.0, 7.0), [1.0, 2.0, 0.5]
    wanted = gradbal.create("pbi", pref=r).loss_weights(l)
    torch.testing.assert_close(
        gradbal.create("pbi", pref=[size * x for x in r]).loss_weights(l), wanted
    )
    torch.testing.assert_close(gradbal.create("pbi", pref=r).loss_weights(size * l), wanted)


def test_losses_all_zero_or_one_task_are_no_trouble() -> None:
    assert gradbal.create("pbi").loss_weights(torch.zeros(4)).tolist() == [0.5] * 4
    for loss in (-2.0, 0.0, 3.0):
        assert gradbal.create("pbi").loss_weights(vector(loss)).tolist() == [1.0]


def test_preference_and_ideal_go_with_their_tasks() -> None:
    method = gradbal.create("pbi", pref=[0.2, 9.0, 0.8], ideal=[1.0, 9.0, 0.5])
    other = gradbal.create("pbi", pref=[0.2, 0.8], ideal=[1.0, 0.5])
    losses = vector(2.0, 3.0)
    assert float(method.scalarize(losses, tasks=[0, 2])) == float(other.scalarize(losses))


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"theta": -1.0}, "`theta` must be in"),
        ({"pref": [0.0, 0.0]}, "`pref` must have a positive entry"),
        ({"pref": [1.0, -1.0]}, "`pref` must be non-negative"),
        ({"ideal": [math.inf]}, "`ideal` must be a sequence of finite numbers"),
    ],
)
def test_bad_hyperparameters(keywords: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        gradbal.create("pbi", **keywords)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_precision(dtype: torch.dtype) -> None:
    found = pbi(torch.tensor([3.0, 4.0], dtype=dtype), torch.tensor([1.0, 0.0]), theta=0.5)
    assert found.dtype == dtype
    assert float(found) == 5.0


def test_checkpoints_and_nothing_read() -> None:
    assert_resumes_anywhere("pbi", pref=[1.0, 2.0, 0.5], ideal=[0.1, 0.0, -1.0])
    assert_reads_nothing(gradbal.create("pbi", pref=[1.0, 2.0, 0.5], ideal=[0.1, 0.0, -1.0]))
