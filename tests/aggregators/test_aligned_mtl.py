"""Aligned-MTL: closed form, orthogonal rows of equal length, rank loss, far-apart norms."""

import numpy as np
import pytest
import torch

import gradbal
from gradbal.aggregators.aligned_mtl import aligned_mtl
from gradbal.solvers import graded_eigh
from tests.aggregators.inputs import random_rows


def balance(j, **keywords):
    """The matrix B, row by row: w is linear in the preference."""
    g = torch.from_numpy(j @ j.T)
    return np.stack([aligned_mtl(g, e, **keywords).numpy() for e in np.eye(len(j))], 1)


@pytest.mark.parametrize("seed", range(200))
def test_closed_form_for_two_tasks(seed):
    j = random_rows(2, 5, seed, spread=100.0) - 0.3
    g = j @ j.T
    delta, t = np.sqrt(np.linalg.det(g)), np.trace(g)
    least = 2 * delta**2 / (t + np.sqrt(t**2 - 4 * delta**2))
    adjugate = np.array([[g[1, 1], -g[0, 1]], [-g[0, 1], g[0, 0]]])
    wanted = np.sqrt(least) * (adjugate + delta * np.eye(2)) / (delta * np.sqrt(t + 2 * delta))
    assert np.abs(balance(j) - wanted).max() < 1e-9 * np.abs(wanted).max()


@pytest.mark.parametrize("n_tasks", [3, 5, 10])
@pytest.mark.parametrize("spread", [1.0, 1e5])
@pytest.mark.parametrize("scale", ["min", "median", "mean"])
def test_aligned_rows_are_orthogonal_and_of_one_length(n_tasks, spread, scale):
    for seed in range(10):
        j = random_rows(n_tasks, 15, seed, spread)
        # The singular values of J itself: by Jacobi's method on the vectors.
        squares = np.linalg.svd(j)[1] ** 2
        aligned = balance(j, scale=scale) @ j
        gramian = aligned @ aligned.T
        s = gramian.trace() / n_tasks
        assert np.abs(gramian / s - np.eye(n_tasks)).max() < 1e-10
        wanted = {"min": squares[-1], "median": np.median(squares), "mean": squares.mean()}
        assert s == pytest.approx(wanted[scale], rel=1e-9 * spread**0.5)
        d = gradbal.create("aligned_mtl", scale=scale).direction(torch.from_numpy(j))
        assert float(d @ d) == pytest.approx(s / n_tasks, rel=1e-9)


def test_orthogonal_rows_of_one_length_stay():
    j = np.linalg.qr(np.random.default_rng(0).standard_normal((9, 4)))[0].T * 7
    assert np.abs(balance(j) - np.eye(4)).max() < 1e-12


@pytest.mark.parametrize("scale", ["min", "median", "mean"])
def test_rank_loss_is_truncated(scale):
    rng = np.random.default_rng(1)
    j = rng.standard_normal((5, 2)) @ rng.standard_normal((2, 9))
    aligned = balance(j, scale=scale) @ j
    gramian = aligned @ aligned.T
    s = gramian.trace() / 2
    # A multiple of a projector of rank two.
    assert np.abs(gramian @ gramian - s * gramian).max() < 1e-10 * s**2
    squares = np.linalg.svd(j)[1][:2] ** 2
    wanted = {"min": squares[-1], "median": squares.mean(), "mean": squares.mean()}
    assert s == pytest.approx(wanted[scale])


def test_a_float32_gramian_does_not_make_rounding_the_least_eigenvalue():
    # With a threshold of 1e-10, "min" is rounding noise and d all but vanishes.
    rng = np.random.default_rng(2)
    j = torch.from_numpy(rng.standard_normal((6, 3)) @ rng.standard_normal((3, 50)))
    g = (j.float() @ j.float().T).float()
    d = gradbal.create("aligned_mtl").weights(g).double() @ j
    wanted = gradbal.create("aligned_mtl").direction(j)
    torch.testing.assert_close(d, wanted, rtol=1e-4, atol=1e-5 * float(wanted.norm()))


def test_the_cutoff_can_be_chosen():
    j = torch.tensor([[1.0, 0.0], [1.0, 1e-3]], dtype=torch.float64)
    tiny = gradbal.create("aligned_mtl").direction(j)
    truncated = gradbal.create("aligned_mtl", rtol=1e-4).direction(j)
    assert float(tiny.norm()) < 1e-3
    torch.testing.assert_close(truncated, j.mean(0), rtol=1e-3, atol=1e-5)
    assert float(gradbal.create("aligned_mtl", scale="mean").direction(j).norm()) > 0.1


def test_preference():
    j = torch.from_numpy(random_rows(3, 9, 0))
    g = j @ j.T
    b = torch.from_numpy(balance(j.numpy()))
    pref = [0.5, 2.0, 0.0]
    method = gradbal.create("aligned_mtl", pref=pref)
    torch.testing.assert_close(method.weights(g), b @ torch.tensor(pref, dtype=torch.float64))
    part = g[1:][:, 1:]
    wanted = gradbal.create("aligned_mtl", pref=pref[1:]).weights(part)
    assert torch.equal(method.weights(part, tasks=[1, 2]), wanted)


def test_bad_hyperparameters():
    with pytest.raises(ValueError, match="`scale` must be one of 'min', 'median', 'mean'"):
        gradbal.create("aligned_mtl", scale="rmse")
    with pytest.raises(ValueError, match=r"`rtol` must be in \[0, 1\)"):
        gradbal.create("aligned_mtl", rtol=1.0)
    with pytest.raises(ValueError, match="non-negative"):
        gradbal.create("aligned_mtl", pref=[1.0, -1.0])
    with pytest.raises(ValueError, match="one entry for each of 3 tasks"):
        gradbal.create("aligned_mtl", pref=[1.0]).weights(torch.eye(3))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 12])
@pytest.mark.parametrize("rank", [1, 4, 40])
@pytest.mark.parametrize("spread", [1.0, 1e6])
def test_graded_eigenvalues(size, rank, spread):
    rng = np.random.default_rng(size)
    u = rng.standard_normal((size, rank))
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    n = spread ** rng.uniform(-0.5, 0.5, size)
    g = n[:, None] * (u @ u.T) * n
    values, vectors = graded_eigh(u @ u.T, n)
    assert (values >= 0).all()
    assert np.abs(vectors.T @ vectors - np.eye(size)).max() < 1e-13
    assert np.abs((vectors * values) @ vectors.T - g).max() < 1e-13 * np.abs(g).max()
    if rank > size:
        # Relative to itself, the least one is the largest of the inverse.
        inverse = np.linalg.inv(u @ u.T) / n[:, None] / n
        assert values.min() == pytest.approx(1 / np.linalg.eigvalsh(inverse).max(), rel=1e-12)
