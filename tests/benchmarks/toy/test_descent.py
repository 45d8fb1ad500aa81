import math

import pytest
import torch

import gradbal
from benchmarks.toy.descent import descend
from benchmarks.toy.settings import SETTINGS, Contestant, contestants, unsuited
from gradbal.aggregators.base import (
    BilevelAggregator,
    ClosureAggregator,
    DoubleSamplingAggregator,
)

SETTING = SETTINGS["nash_famo"]
ALL = {c.label: c for c in contestants(SETTING) if unsuited(c) is None}


def _by_optimizer(contestant, start, steps):
    """The last point of a user's own loop, or the step at which it raises."""
    toy = SETTING.toy
    x = torch.nn.Parameter(torch.tensor(SETTING.starts[start], dtype=torch.float64))
    opt = gradbal.MultiTaskOptimizer(
        torch.optim.Adam([x], lr=SETTING.learning_rate), contestant.create(start)
    )
    method = opt.aggregator

    def losses():
        return list(toy.losses(x))

    for step in range(steps):
        try:
            if isinstance(method, BilevelAggregator):
                opt.step(losses, losses)
                continue
            if isinstance(method, ClosureAggregator) and method.looks_around:
                opt.step(losses)
                continue
            opt.zero_grad()
            if isinstance(method, DoubleSamplingAggregator):
                others = [losses() for _ in range(method.n_batches - 1)]
                opt.backward(losses(), independent=others)
            else:
                opt.backward(losses())
            if contestant.clip is not None:
                torch.nn.utils.clip_grad_norm_([x], contestant.clip)
            opt.step()
            if isinstance(method, ClosureAggregator) and method.looks_after:
                opt.update(losses())
        except ValueError:
            return None, step
    return x.tolist(), None


# The losses at the first of these starts are positive, at the second the gradients conflict.
@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("label", ALL)
def test_goes_where_the_optimizer_goes(label, start):
    # With several evaluations at every step in place of one.
    steps = 30 if label in ("forum", "moml", "auto_lambda") else 120
    end, failed_at = _by_optimizer(ALL[label], start, steps)
    (path,) = descend(SETTING, [(ALL[label], start)], steps)
    assert path.failed_at == failed_at
    if end is not None:
        assert path.end == pytest.approx(end, abs=1e-10)
        assert math.dist(path.end, SETTING.starts[start]) > 0.02


def test_all_but_those_that_cannot_are_run():
    everyone = {c.method for c in contestants(SETTING)}
    assert everyone == set(gradbal.list_aggregators())
    left_out = {c.method for c in contestants(SETTING) if unsuited(c)}
    assert left_out == {"mgda_ub", "aligned_mtl_ub"}


# x1 and x2 after 2,000 steps of the authors' code, float32, torch 2.13: FAMO's repository, in which
# the directions of PCGrad and CAGrad are clipped, and Nash-MTL's, in which they are not.
OFFICIAL = {
    "sum": [
        (-6.34515, 4.45080),
        (-2.72136, -1.80519),
        (6.70319, 5.98318),
        (-5.87075, -2.16689),
        (8.31193, -0.00047),
    ],
    "pcgrad+clip": [
        (-6.34515, 4.45080),
        (-2.93954, -1.99769),
        (6.70319, 5.98319),
        (-6.75334, -2.57687),
        (6.99888, -2.91170),
    ],
    "pcgrad": [
        (-6.34515, 4.45080),
        (-2.72136, -1.80519),
        (6.70319, 5.98318),
        (-6.90366, -2.27387),
        (6.90697, -3.00637),
    ],
    "cagrad+clip": [
        (-6.30694, 4.46234),
        (-1.57366, -2.00004),
        (6.71220, 5.79620),
        (-5.60102, -2.51516),
        (8.34392, 0.00024),
    ],
    "cagrad": [
        (-6.30694, 4.46234),
        (-1.51048, -1.78557),
        (6.71220, 5.79620),
        (-5.81899, -2.28693),
        (8.36079, -0.00030),
    ],
    # From (0, 0) the derivative by x1 is 0 but for rounding, which decides for left or right.
    "imtl_g": [
        (-6.26567, 4.42774),
        None,
        (6.92616, 5.97598),
        (-5.20914, -3.08829),
        (7.28874, -3.14427),
    ],
    "famo": [
        (-6.33579, 4.27800),
        None,
        (7.18956, 5.99583),
        (-5.12299, -1.93962),
        (6.34190, -2.07926),
    ],
    "uw": [(-6.23056, 4.79750), None, (7.17428, 6.22720), None, None],
}


@pytest.mark.parametrize("label", OFFICIAL)
def test_two_thousand_steps_as_in_the_authors_code(label):
    _compare(ALL[label], OFFICIAL[label])


@gradbal.register("mgda_with_corners_cut")
class _CornersCut(gradbal.GramianAggregator):
    """The authors' solver for two tasks: where the least norm is at a corner, 0.999 and 0.001."""

    def weights(self, gramian, losses=None):
        (a, b), (_, c) = gramian.tolist()
        w = 0.999 if b >= a else 0.001 if b >= c else (c - b) / (a + c - 2 * b)
        return torch.tensor([w, 1 - w], dtype=gramian.dtype)


gradbal.registry.unregister("mgda_with_corners_cut")


def test_two_thousand_steps_of_mgda_but_for_the_authors_corners(monkeypatch):
    official = [
        (-6.11545, 4.51215),
        (2.76260, -1.81655),
        (6.93190, 5.94011),
        (-5.14089, -3.73193),
        (7.87749, -3.02476),
    ]
    # The last one has the least norm inside all the way.
    _compare(ALL["mgda"], [*[None] * 4, official[4]])
    contestant = Contestant("mgda_with_corners_cut", "mgda")
    monkeypatch.setattr(Contestant, "create", lambda self, start: _CornersCut())
    _compare(contestant, official)


def _compare(contestant, official):
    starts = [k for k, point in enumerate(official) if point is not None]
    paths = descend(SETTING, [(contestant, k) for k in starts], 2000)
    for path in paths:
        assert path.error is None
        assert path.end == pytest.approx(official[path.start], abs=1e-3), path.start


def test_the_front_is_reached_and_kept():
    # Some way above the front.
    setting = type(SETTING)("near", "", scale=0.1, starts=((4.0, -6.0),), steps=1000)
    (path,) = descend(setting, [(ALL["sum"], 0)], 1000)
    assert path.settled is not None
    assert 100 < path.settled < 900
    gap = setting.toy.front.gap(setting.toy.evaluate(torch.tensor([path.end]).numpy())[0] * [10, 1])
    assert path.gap == pytest.approx(gap[0], abs=1e-4)
    (short,) = descend(setting, [(ALL["sum"], 0)], path.settled - 1)
    assert short.settled is None
    (longer,) = descend(setting, [(ALL["sum"], 0)], path.settled)
    assert longer.settled == path.settled


def test_one_that_fails_says_so_and_leaves_the_others_alone():
    runs = [(ALL["dwa"], 1), (ALL["sum"], 1), (ALL["dwa"], 0)]
    failed, plain, fine = descend(SETTING, runs, 300)
    assert failed.failed_at == 1
    assert "needs no negative losses" in failed.error
    assert failed.settled is None
    assert fine.error is plain.error is None
    (alone,) = descend(SETTING, [(ALL["sum"], 1)], 300)
    assert alone.end == plain.end


def test_a_trajectory_keeps_at_most_400_points_with_both_ends():
    (path,) = descend(SETTING, [(ALL["sum"], 3)], 1001)
    assert len(path.points) <= 400
    assert path.points[0] == (0, *SETTING.starts[3])
    assert path.points[-1] == (1001, *path.end)
    steps = [step for step, _, _ in path.points]
    assert steps == sorted(set(steps))


def test_steps_are_told_as_they_are_made():
    told = []
    descend(SETTING, [(ALL["sum"], 3)], 777, told.append)
    assert sum(told) == 777
    assert len(told) > 1
