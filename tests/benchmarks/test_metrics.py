import math

import pytest

from benchmarks.metrics import delta_m, delta_p

# NYUv2, SegNet/MTAN: mIoU, pixel accuracy, absolute and relative depth error, mean and median
# angle, and shares within 11.25°, 22.5° and 30°. Single-task baseline and rows as printed in Table
# 2 of "Multi-Task Learning as a Bargaining Game" (Navon et al., ICML 2022, arXiv 2202.01017).
STL = [38.30, 63.76, 0.6754, 0.2780, 25.01, 19.21, 30.14, 57.20, 69.15]
HIGHER = [True, True, False, False, False, False, True, True, True]
PUBLISHED = {
    "ls": ([39.29, 65.33, 0.5493, 0.2263, 28.15, 23.96, 22.09, 47.50, 61.08], 5.59),
    "mgda": ([30.47, 59.90, 0.6070, 0.2555, 24.88, 19.45, 29.18, 56.88, 69.36], 1.38),
    "nash_mtl": ([40.13, 65.93, 0.5261, 0.2171, 25.26, 20.08, 28.40, 55.47, 68.15], -4.04),
}


@pytest.mark.parametrize("method", PUBLISHED)
def test_delta_m_of_published_rows(method):
    row, printed = PUBLISHED[method]
    assert delta_m(row, STL, HIGHER) == pytest.approx(printed, abs=0.011)


def test_delta_p_weighs_tasks_and_not_metrics():
    row, _ = PUBLISHED["nash_mtl"]
    parts = [slice(0, 2), slice(2, 4), slice(4, 9)]
    found = delta_p([row[p] for p in parts], [STL[p] for p in parts], [HIGHER[p] for p in parts])
    by_task = [-delta_m(row[p], STL[p], HIGHER[p]) for p in parts]
    assert found == pytest.approx(sum(by_task) / 3)
    assert abs(found + delta_m(row, STL, HIGHER)) > 1  # not just the other sign


def test_by_hand():
    # +25 % where higher is better, 50 % more error: mean loss 12.5 %.
    assert delta_m([0.5, 3.0], [0.4, 2.0], [True, False]) == pytest.approx(12.5)
    assert delta_p([[0.5], [3.0]], [[0.4], [2.0]], [[True], [False]]) == pytest.approx(-12.5)
    # Task one +25 %, task two −50 % and +20 %: (25 − 15) / 2.
    found = delta_p([[0.5], [3.0, 1.6]], [[0.4], [2.0, 2.0]], [[True], [False, False]])
    assert found == pytest.approx(5.0)


def test_the_baseline_itself_is_zero():
    assert delta_m(STL, STL, HIGHER) == 0


@pytest.mark.parametrize("baseline", [[0.0, 1.0], [1.0, math.nan], [1.0, math.inf]])
def test_impossible_baseline(baseline):
    with pytest.raises(ValueError, match="`baseline` must be finite and not 0"):
        delta_m([1.0, 1.0], baseline, [True, True])


@pytest.mark.parametrize(
    ("values", "baseline", "higher"),
    [([1.0], [1.0, 2.0], [True, True]), ([1.0, 2.0], [1.0, 2.0], [True]), ([], [], [])],
)
def test_shapes_that_do_not_fit(values, baseline, higher):
    with pytest.raises(ValueError, match="one length, at least 1, found"):
        delta_m(values, baseline, higher)
    with pytest.raises(ValueError, match=r"one length, at least 1, found .* metrics"):
        delta_p([values], [baseline], [higher])


def test_different_numbers_of_tasks():
    with pytest.raises(ValueError, match="found 1, 2 and 1 tasks"):
        delta_p([[1.0]], [[1.0], [1.0]], [[True]])
