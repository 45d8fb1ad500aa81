"""MoDo and SDMGrad: steps worked out by hand, limits, scale."""

import pytest
import torch

import gradbal


def _vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_two_steps_of_modo_by_hand() -> None:
    method = gradbal.create("modo", gamma=0.1, rho=0.5)
    # λ = (½, ½): Aλ + ρλ = (2.25, 0.75) → (0.275, 0.425), then + 0.15 each onto the simplex.
    first = method.step(torch.tensor([[4.0, 0.0], [0.0, 1.0]], dtype=torch.float64))
    torch.testing.assert_close(first, _vector(0.425, 0.575))
    # Not symmetric: (0.425 − 0.1(0.575 + 0.2125), 0.575 − 0.1(0.2875)) = (0.34625, 0.54625).
    second = method.step(torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64))
    torch.testing.assert_close(second, _vector(0.4, 0.6))


def test_two_steps_of_sdmgrad_by_hand() -> None:
    method = gradbal.create("sdmgrad", lam=1.0, lr=0.25, momentum=0.5, n_iter=2)
    # s = (2 + 0)/2 = 1: the negative A₂₂ counts as zero. p = (½, ½).
    a = torch.tensor([[4.0, 0.0], [2.0, -1.0]], dtype=torch.float64)
    # w + p = (1, 1): v = (4, 1), w → (½ − 1, ½ − ¼) → Π(−0.5, 0.25) = (0.125, 0.875).
    # w + p = (0.625, 1.375): v = (2, ½) + (2.5, −0.125) = (4.5, 0.375),
    # w → (0.125 − 1.125, 0.875 − 0.09375) = (−1, 0.78125) → (0, 1).
    torch.testing.assert_close(method.step(a), (_vector(0.0, 1.0) + _vector(0.5, 0.5)) / 2)
    # The next call starts from w = (0, 1) with no velocity: w + p = (0.5, 1.5), v = (2, −0.5),
    # w → (−0.5, 1.125) → (0, 1); and there it stays.
    torch.testing.assert_close(method.step(a), _vector(0.25, 0.75))


@pytest.mark.parametrize("seed", range(5))
def test_modo_on_one_batch_again_and_again_is_mgda(seed: int) -> None:
    torch.manual_seed(seed)
    j = torch.randn(4, 10, dtype=torch.float64)
    g = j @ j.T
    step = 1.0 / float(torch.linalg.eigvalsh(g)[-1])
    method = gradbal.create("modo", gamma=step, rho=0.0)
    for _ in range(3000):
        w = method.step(g)
    torch.testing.assert_close(w, gradbal.create("mgda").weights(g), rtol=0, atol=1e-6)


def test_no_step_is_the_mean() -> None:
    j = torch.randn(3, 5, dtype=torch.float64)
    method = gradbal.create("modo", gamma=0.0)
    method.direction(j)
    torch.testing.assert_close(method.direction(j), j.mean(0))


@pytest.mark.parametrize("lam", [0.0, 0.3, 5.0])
def test_sdmgrad_converged_is_mgda_on_shifted_rows(lam: float) -> None:
    # |Jᵀ(w + λp)|² with Σw = 1 is MGDA's problem for the rows g_i + λ Jᵀp.
    torch.manual_seed(1)
    j = torch.randn(4, 10, dtype=torch.float64)
    method = gradbal.create("sdmgrad", lam=lam, lr=0.1, n_iter=5000, batches=1)
    shifted = j + lam * j.mean(0)
    w = gradbal.create("mgda").weights(shifted @ shifted.T)
    wanted = (w + lam / 4) / (1 + lam)
    torch.testing.assert_close(method.step(j @ j.T), wanted, rtol=0, atol=1e-6)


def test_a_strong_preference_is_followed() -> None:
    j = torch.randn(2, 5, dtype=torch.float64)
    method = gradbal.create("sdmgrad", lam=1e9, pref=[3.0, 1.0])
    torch.testing.assert_close(method.direction(j), 0.75 * j[0] + 0.25 * j[1])


@pytest.mark.parametrize("scale", [1e-8, 1e-4, 1e4, 1e8])
def test_sdmgrad_and_scale_free_modo_do_not_see_the_scale_of_the_losses(scale: float) -> None:
    j = torch.randn(3, 6, dtype=torch.float64)
    for make in (
        lambda: gradbal.create("sdmgrad", lr=0.2),
        lambda: gradbal.create("modo", scale_free=True),
    ):
        scaled, plain = make(), make()
        for _ in range(3):
            d, wanted = scaled.direction(scale * j), scale * plain.direction(j)
        torch.testing.assert_close(d, wanted, rtol=1e-9, atol=0)


def test_products_with_no_positive_diagonal_leave_the_weights() -> None:
    # A_ii = ⟨g_i, g'_i⟩ of two batches can be negative; then there is no scale to go by.
    method = gradbal.create("sdmgrad", lam=0.0)
    w = method.step(torch.tensor([[-1.0, 3.0], [0.0, 0.0]]))
    assert w.tolist() == [0.5, 0.5]


def test_float32_and_float64_agree_where_steps_contract() -> None:
    j = torch.randn(4, 40_000)
    for name, options in (("modo", {"gamma": 1e-6}), ("sdmgrad", {"lr": 0.2})):
        d = gradbal.create(name, **options).direction(j)
        wanted = gradbal.create(name, **options).direction(j.double())
        torch.testing.assert_close(d.double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["modo", "sdmgrad"])
def test_tasks_that_sit_out_keep_what_they_have(name: str) -> None:
    method = gradbal.create(name)
    method.step(torch.diag(_vector(1.0, 2.0, 3.0)))
    before = method.simplex_weights.clone()
    w = method.step(torch.diag(_vector(1.0, 5.0)), tasks=[0, 2])
    assert float(w.sum()) == pytest.approx(1)
    after = method.simplex_weights
    assert after[1] == before[1]
    assert float(after.sum()) == pytest.approx(1)
    with pytest.raises(ValueError, match=f"`{name}` has 3 tasks, found 2"):
        method.step(torch.eye(2))
    method.reset()
    assert method.simplex_weights is None


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("modo", {"gamma": -1.0}, "`gamma` must be in"),
        ("modo", {"batches": 1}, "`batches` must be one of 2, 3"),
        ("sdmgrad", {"lr": 0.0}, "`lr` must be in"),
        ("sdmgrad", {"momentum": 1.0}, "`momentum` must be in"),
        ("sdmgrad", {"n_iter": 0}, "`n_iter` must be a positive integer"),
        ("sdmgrad", {"pref": [0.0, 0.0]}, "`pref` must have a positive entry"),
        ("sdmgrad", {"pref": [-1.0, 2.0]}, "`pref` must be non-negative"),
        ("sdmgrad", {"batches": 2}, "`batches` must be one of 1, 3"),
    ],
)
def test_bad_hyperparameters(name: str, options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        gradbal.create(name, **options)


def test_a_preference_of_another_length() -> None:
    with pytest.raises(ValueError, match="`pref` must have one entry for each of 3 tasks, found 2"):
        gradbal.create("sdmgrad", pref=[1.0, 1.0]).direction(torch.eye(3))
