"""DWA: epochs worked out by hand, windows, tasks that sit out, checkpoints."""

import math
import warnings

import pytest
import torch

import gradbal
from gradbal import MultiTaskOptimizer
from gradbal.aggregators.dwa import dwa
from tests.aggregators.losses import assert_reads_nothing, assert_resumes_anywhere, seen, vector
from tests.zoo import make


def _after(*epochs: list[tuple[float, ...]], **keywords: object) -> gradbal.Aggregator:
    method = gradbal.create("dwa", **keywords)
    for epoch in epochs:
        seen(method, *epoch)
        method.end_epoch()
    return method


def _weights(method: gradbal.Aggregator, n_tasks: int = 2, **taking_part: object) -> list[float]:
    return method.loss_weights(torch.ones(n_tasks, dtype=torch.float64), **taking_part).tolist()


def test_three_epochs_by_hand() -> None:
    method = gradbal.create("dwa")
    # Means 3 and 10, then 1.5 and 8: r = (½, 0.8), so w_1 = 2 sigmoid((0.5 − 0.8)/2).
    for epoch in ([(4.0, 12.0), (2.0, 8.0)], [(1.0, 8.0), (2.0, 8.0)]):
        for losses in epoch:
            assert _weights(method) == [1.0, 1.0]
            seen(method, losses)
        method.end_epoch()
    first = 2 / (1 + math.exp(0.15))
    for losses in [(3.0, 4.0), (1.5, 4.0), (0.0, 4.0)]:
        # The same all through the epoch.
        assert _weights(method) == pytest.approx([first, 2 - first], rel=1e-12)
        seen(method, losses)
    method.end_epoch()
    # Means 1.5 and 4: r = (1, ½).
    first = 2 / (1 + math.exp(-0.25))
    assert _weights(method) == pytest.approx([first, 2 - first], rel=1e-12)


def test_weights_are_a_softmax_of_the_ratios_and_sum_to_the_number_of_tasks() -> None:
    r = [0.9, 1.1, 0.2, 3.0]
    for temperature in (0.5, 2.0, 10.0):
        w = _weights(
            _after([(1.0,) * 4], [tuple(r)], temperature=temperature),
            4,
        )
        e = [math.exp(x / temperature) for x in r]
        assert w == pytest.approx([4 * x / sum(e) for x in e], rel=1e-12)
        assert sum(w) == pytest.approx(4, rel=1e-12)
    assert _weights(_after([(1.0,) * 4], [tuple(r)], temperature=1e9), 4) == pytest.approx(
        [1.0] * 4
    )


def test_equal_ratios_give_equal_weights() -> None:
    assert _weights(_after([(3.0, 8.0)], [(1.5, 4.0)])) == [1.0, 1.0]


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_the_scale_of_a_loss_does_not_matter(scale: float) -> None:
    plain = _weights(_after([(3.0, 8.0)], [(1.0, 7.0)]))
    scaled = _weights(_after([(3.0 * scale, 8.0)], [(1.0 * scale, 7.0)]))
    assert scaled == pytest.approx(plain, rel=1e-12)
    assert plain[1] > plain[0], "the slower one gets more"


def test_a_loss_of_zero_before_has_a_ratio_of_one() -> None:
    w = _weights(_after([(0.0, 2.0, 0.0)], [(5.0, 2.0, 0.0)]), 3)
    assert w == [1.0, 1.0, 1.0]


def test_windows_are_epochs_of_so_many_steps() -> None:
    # As in the codes of Nash-MTL and Aligned-MTL, with 25.
    method = gradbal.create("dwa", window=2)
    steps = [(4.0, 12.0), (2.0, 8.0), (1.0, 8.0), (2.0, 8.0), (9.0, 9.0)]
    for losses in steps[:3]:
        seen(method, losses)
        method.end_epoch()  # has nothing to say
        assert _weights(method) == [1.0, 1.0]
    seen(method, steps[3])
    wanted = _weights(_after(steps[:2], steps[2:4]))
    assert wanted != [1.0, 1.0]
    assert _weights(method) == wanted
    seen(method, steps[4])
    assert _weights(method) == wanted


def test_an_epoch_without_a_step_is_none() -> None:
    method = _after([(3.0, 8.0)], [(1.0, 7.0)])
    before = _weights(method)
    method.end_epoch()
    assert _weights(method) == before


def test_tasks_that_sit_out() -> None:
    method = gradbal.create("dwa")
    nan = float("nan")
    method.observe(vector(4.0, nan, 2.0), [0, 2])
    method.observe(vector(2.0, 6.0, 2.0))
    method.end_epoch()
    method.observe(vector(1.5, nan, 1.0), [0, 2])
    method.end_epoch()
    # Means 3, 6, 2, then 1.5, as before, 1.
    e = [math.exp(x / 2) for x in (0.5, 1.0, 0.5)]
    assert _weights(method, 3) == pytest.approx([3 * x / sum(e) for x in e], rel=1e-12)
    assert _weights(method, 2, tasks=[0, 2]) == pytest.approx([1.0, 1.0], rel=1e-12)
    e = e[:2]
    wanted = [2 * x / sum(e) for x in e]
    assert _weights(method, 2, tasks=[0, 1]) == pytest.approx(wanted, rel=1e-12)


def test_a_task_without_any_loss_so_far_has_a_ratio_of_one() -> None:
    method = gradbal.create("dwa", window=1)
    nan = float("nan")
    for _ in range(2):
        method.observe(vector(nan, 1.0), [1])
    assert _weights(method) == [1.0, 1.0]


def test_in_training() -> None:
    model = make("Plain")
    opt = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), "dwa")
    means = []
    for epoch in range(3):
        sums = torch.zeros(3, dtype=torch.float64)
        for part in (model.batch()[:2], model.batch()[2:]):
            opt.zero_grad()
            # Micro-batches: their losses add up.
            losses = [l / 2 for l in model.losses(part)]
            opt.backward(losses, accumulate=True)
            more = [l / 2 for l in model.losses(part.flip(0))]
            opt.backward(more)
            sums += torch.stack(losses).detach() + torch.stack(more).detach()
            if epoch == 2:
                ratios = means[1] / means[0]
                wanted = 3 * torch.softmax(ratios / 2, 0)
                torch.testing.assert_close(opt.weights, wanted, rtol=1e-12, atol=0)
                assert float((wanted - 1).abs().max()) > 0.01
            else:
                assert opt.weights.tolist() == [1.0] * 3
            opt.step()
        means.append(sums / 2)
        opt.end_epoch()


def test_nobody_ends_an_epoch() -> None:
    method = gradbal.create("dwa")
    losses = vector(1.0, 2.0)
    for _ in range(9_999):
        method.observe(losses)
    with pytest.warns(
        RuntimeWarning, match=r"end_epoch\(\) was not called in 10,000 steps.*window"
    ):
        method.observe(losses)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method.observe(losses)
        # Long epochs are nothing to warn of, nor is a window.
        method.end_epoch()
        windowed = gradbal.create("dwa", window=20_000)
        for _ in range(10_001):
            method.observe(losses)
            windowed.observe(losses)


def test_bad_input_changes_nothing() -> None:
    method = _after([(3.0, 8.0)], [(1.0, 7.0)])
    before = repr(method.state_dict())
    with pytest.raises(ValueError, match=r"'dwa' needs no negative losses, found -2 for task 1"):
        method.loss_weights(torch.tensor([0.0, -2.0]))
    with pytest.raises(ValueError, match=r"found -2 for task 5; add an offset"):
        method.loss_weights(torch.tensor([1.0, -2.0]), tasks=[3, 5])
    with pytest.raises(ValueError, match=r"found -2 for task 1"):
        method.observe(torch.tensor([1.0, -2.0]))
    with pytest.raises(ValueError, match="`dwa` has 2 tasks, found 3"):
        method.loss_weights(torch.ones(3))
    assert repr(method.state_dict()) == before


@pytest.mark.parametrize(
    ("keywords", "error", "words"),
    [
        ({"temperature": 0.0}, ValueError, r"`temperature` must be in \(0"),
        ({"temperature": math.nan}, ValueError, "temperature"),
        ({"window": 0}, ValueError, "`window` must be in"),
        ({"window": 2.0}, TypeError, "`window` must be an integer"),
    ],
)
def test_bad_hyperparameters(keywords: dict[str, object], error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        gradbal.create("dwa", **keywords)


@pytest.mark.parametrize("keywords", [{}, {"window": 1}, {"window": 2}], ids=str)
def test_it_resumes_anywhere(keywords: dict[str, object]) -> None:
    assert_resumes_anywhere("dwa", **keywords)


def test_reset_and_nothing_read() -> None:
    method = _after([(3.0, 8.0)], [(1.0, 7.0)])
    method.reset()
    assert method.state_dict() == gradbal.create("dwa").state_dict()
    for keywords in ({}, {"window": 2}):
        assert_reads_nothing(gradbal.create("dwa", **keywords))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_precision(dtype: torch.dtype) -> None:
    w = dwa(torch.tensor([1.0, 4.0]).to(dtype), torch.tensor([2.0, 4.0]).to(dtype))
    assert w.dtype == dtype
    # Sums of many losses are kept in float64, whatever the losses' precision.
    method = gradbal.create("dwa")
    for _ in range(3000):
        method.observe(torch.tensor([0.1, 1.0], dtype=dtype))
    method.end_epoch()
    exact = float(torch.tensor(0.1, dtype=dtype))
    assert float(method.last[0]) == pytest.approx(exact, rel=1e-12)
