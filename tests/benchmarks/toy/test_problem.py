import numpy as np
import pytest
import torch

from benchmarks.toy.problem import Toy


@pytest.fixture(scope="module")
def points():
    random = np.random.default_rng(0).uniform(-10, 10, (500, 2))
    # Where c1 and c2 have their kink, and where a logarithm is clamped.
    kinks = [(0.0, 0.0), (3.0, 0.0), (-7.0, 0.0), (7.0, 0.0), (-9.0, 0.0), (5.0, 20.0)]
    return np.concatenate([random, kinks])


@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_closed_form_agrees_with_autograd(points, scale):
    toy = Toy(scale)
    x = torch.tensor(points, requires_grad=True)
    losses = toy.losses(x)
    rows = [torch.autograd.grad(losses[:, i].sum(), x, retain_graph=True)[0] for i in range(2)]
    found, jacobian = toy.evaluate(points)
    np.testing.assert_allclose(found, losses.detach().numpy(), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(jacobian, torch.stack(rows, 1).numpy(), rtol=1e-10, atol=1e-12)


def test_one_point_as_many(points):
    toy = Toy(0.1)
    losses, jacobian = toy.evaluate(points)
    for k, point in enumerate(points.tolist()):
        one = toy.evaluate_one(*point)
        np.testing.assert_allclose(one[0], losses[k], rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(one[1], jacobian[k], rtol=1e-10, atol=1e-12)


def test_the_start_at_the_kink_is_left():
    # The official runs leave (0, 0), where both c1 and c2 pull downwards in x2.
    gradient = Toy(1.0).evaluate(np.zeros((1, 2)))[1][0]
    assert gradient[:, 0] == pytest.approx([0, 0])
    f = np.log(3.5) + 6
    g = (49 + 0.1 * 64) / 10 - 20
    # f2 has its logarithm's argument at 3.5 there, too.
    assert gradient[:, 1] == pytest.approx([0.5 * f - 0.5 * g] * 2)


def test_where_the_front_is():
    toy = Toy(0.1)
    points, unscaled = toy.front.points, toy.front.unscaled
    middle = len(points) // 2
    assert points[middle] == pytest.approx([0.0, -8.355], abs=2e-4)
    assert points[[0, -1], 1] == pytest.approx([-8.4345, -8.4345], abs=5e-5)
    assert unscaled[middle] == pytest.approx([-15.09, -15.09], abs=2e-3)


def test_the_front_is_pareto_stationary_and_ahead_of_everything():
    toy = Toy(0.1)
    x = torch.tensor(toy.front.points[1:-1:40], requires_grad=True)
    losses = toy.losses(x)
    (a,) = torch.autograd.grad(losses[:, 0].sum(), x, retain_graph=True)
    (b,) = torch.autograd.grad(losses[:, 1].sum(), x)
    cosine = torch.nn.functional.cosine_similarity(a, b)
    torch.testing.assert_close(cosine, torch.full_like(cosine, -1.0))

    around = np.random.default_rng(1).uniform([-7.5, -9.0], [7.5, -8.0], (4000, 2))
    gap = toy.front.gap(toy.evaluate(around)[0] / [toy.scale, 1.0])
    # The curve between two of its points is above the chord, which is what is compared with.
    assert gap.min() > -1e-5


# L1 without its scale, L2, and the gap in percent: rows of nash-mtl's and FAMO's code and of a
# float64 re-implementation, with a gap computed by others from a coarser curve.
GAPS = [
    (-18.7744, -0.86168, 6.020),
    (-0.92267, -17.13776, 13.813),
    (-11.97819, -9.75228, 21.253),
    (3.20873, 0.87070, 87.090),
    (7.31504, 0.31756, 93.324),
    (7.57045, -4.39034, 75.832),
    (1.53153, 7.21944, 97.271),
    (0.00206, -0.00074, 77.042),
    (-3.79828, -19.82751, 0.002),
    (-19.98939, -0.45092, 0.000),
]


@pytest.mark.parametrize(("l1", "l2", "percent"), GAPS)
def test_gap_is_that_of_the_published_rows(l1, l2, percent):
    assert Toy(0.1).front.gap(np.array([[l1, l2]]))[0] == pytest.approx(percent, abs=0.02)


def test_gap_is_the_least_step_onto_the_front():
    front = Toy(0.1).front
    losses = np.random.default_rng(2).uniform(-20, 12, (200, 2))
    worse = (losses[:, None] - front.unscaled).max(2).min(1)
    np.testing.assert_allclose(front.gap(losses), 100 * worse / front.span, atol=0.02)
