"""Class-balanced losses: closed forms in float64, torchvision's focal loss, awkward counts."""

import math
from decimal import Decimal, getcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from gradbal.nn import losses
from gradbal.nn.losses import (
    ClassBalancedLoss,
    class_balanced_focal,
    class_balanced_sigmoid,
    class_balanced_softmax,
    class_balanced_weights,
)

FORMS: list[Any] = [class_balanced_softmax, class_balanced_sigmoid, class_balanced_focal]


def _data(*rest: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    logits = 3 * torch.randn(6, 4, *rest, dtype=dtype)
    return logits, torch.randint(4, (6, *rest))


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.9999, 0.999999, 1 - 1e-12])
@pytest.mark.parametrize("counts", [[1, 2, 5], [1, 10**4, 10**9], [7], [3.0, 10**15]])
def test_weights_are_the_paper_s_to_the_last_digit(beta: float, counts: list[float]) -> None:
    getcontext().prec = 60
    inverse = [(1 - Decimal(beta)) / (1 - Decimal(beta) ** Decimal(n)) for n in counts]
    expected = [float(len(counts) * w / sum(inverse)) for w in inverse]
    weights = class_balanced_weights(counts, beta)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, torch.tensor(expected), rtol=2e-7, atol=0)


def test_weights_between_the_two_limits() -> None:
    counts = torch.tensor([10, 100, 1000])
    assert class_balanced_weights(counts, 0.0).tolist() == [1, 1, 1]
    frequencies = 1 / counts.double()
    expected = (3 * frequencies / frequencies.sum()).float()
    torch.testing.assert_close(class_balanced_weights(counts, 1 - 1e-9), expected)
    weights = class_balanced_weights(counts, 0.99)
    assert bool((weights[1:] < weights[:-1]).all())


@pytest.mark.parametrize(
    ("counts", "beta", "message"),
    [
        ([1, 2], 1.0, r"`beta` must be in \[0, 1\), found 1.0"),
        ([1, 2], -0.1, r"`beta` must be in"),
        ([1, 2], math.nan, r"`beta` must be in"),
        ([], 0.9, "`counts` must have one number for each class"),
        ([[1, 2]], 0.9, r"found shape \(1, 2\)"),
        ([3, 0], 0.9, r"at least 1, a class without samples has no weight, found \[3.0, 0.0\]"),
        ([3, math.inf], 0.9, "finite"),
        ([3, math.nan], 0.9, "finite"),
    ],
)
def test_bad_counts_and_betas(counts: Any, beta: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        class_balanced_weights(counts, beta)


@pytest.mark.parametrize("rest", [(), (3, 2)])
def test_softmax_is_the_closed_form(rest: tuple[int, ...]) -> None:
    logits, target = _data(*rest)
    weights = class_balanced_weights([5, 50, 500, 5000], 0.999).double()
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    chosen = torch.gather(p, 1, target[:, None])[:, 0]
    expected = -weights[target] * chosen.log()
    loss = class_balanced_softmax(logits, target, weights, reduction="none")
    torch.testing.assert_close(loss, expected)
    mean = class_balanced_softmax(logits, target, weights)
    torch.testing.assert_close(mean, expected.mean())
    total = class_balanced_softmax(logits, target, weights, reduction="sum")
    torch.testing.assert_close(total, expected.sum())


@pytest.mark.parametrize("rest", [(), (3, 2)])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_is_torchvision_s(rest: tuple[int, ...], gamma: float) -> None:
    logits, target = _data(*rest)
    logits.requires_grad_()
    weights = class_balanced_weights([5, 50, 500, 5000], 0.999).double()
    one_hot = F.one_hot(target, 4).movedim(-1, 1).double()
    each = sigmoid_focal_loss(logits, one_hot, alpha=-1, gamma=gamma).sum(1)
    expected = (each * weights[target]).mean()
    loss = class_balanced_focal(logits, target, weights, gamma=gamma)
    torch.testing.assert_close(loss, expected)
    found, wanted = (torch.autograd.grad(l, logits)[0] for l in (loss, expected))
    torch.testing.assert_close(found, wanted)


def test_sigmoid_is_the_closed_form() -> None:
    logits, target = _data()
    weights = class_balanced_weights([5, 50, 500, 5000], 0.999).double()
    one_hot = F.one_hot(target, 4).double()
    each = F.binary_cross_entropy_with_logits(logits, one_hot, reduction="none").sum(1)
    loss = class_balanced_sigmoid(logits, target, weights, reduction="none")
    torch.testing.assert_close(loss, each * weights[target])


@pytest.mark.parametrize("form", FORMS)
def test_ignored_targets_count_for_nothing(form: Any) -> None:
    logits, target = _data(3)
    weights = class_balanced_weights([5, 50, 500, 5000], 0.999).double()
    target[2], target[4, 1] = -1, -1
    kept = target != -1
    flat = logits.movedim(1, -1)[kept]
    loss = form(logits, target, weights, ignore_index=-1)
    torch.testing.assert_close(loss, form(flat, target[kept], weights))
    each = form(logits, target, weights, ignore_index=-1, reduction="none")
    assert each.shape == target.shape
    assert bool((each[~kept] == 0).all())
    assert bool((each[kept] > 0).all())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 100.0, 1e4])
def test_float32_is_float64_to_rounding(form: Any, scale: float) -> None:
    logits, target = _data()
    logits = (logits * scale).float()
    weights = class_balanced_weights([1, 10**3, 10**6, 10**9], 0.9999)
    results = []
    for dtype in (torch.float32, torch.float64):
        z = logits.to(dtype).requires_grad_()
        loss = form(z, target, weights.to(dtype))
        (gradient,) = torch.autograd.grad(loss, z)
        results.append((loss.detach().double(), gradient.double()))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-30)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(form: Any, dtype: torch.dtype) -> None:
    logits, target = _data(50)
    weights = class_balanced_weights([5, 50, 500, 5000])
    loss = form(logits.to(dtype), target, weights)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, form(logits.to(dtype).float(), target, weights))


@pytest.mark.parametrize("form", FORMS)
def test_bad_shapes_targets_and_reductions(form: Any) -> None:
    logits, target = _data(dtype=torch.float32)
    weights = class_balanced_weights([5, 50, 500, 5000])
    with pytest.raises(ValueError, match=r"`logits` must be \[N, 4, ...\] for the 4 classes"):
        form(logits[:, :3], target, weights)
    with pytest.raises(ValueError, match=r"`target` must be \[6\] for logits"):
        form(logits, target[:4], weights)
    with pytest.raises(ValueError, match="must be integers, the classes, found torch"):
        form(logits, target.float(), weights)
    with pytest.raises(ValueError, match=r"`weights` must be \[C\]"):
        form(logits, target, weights[None])
    with pytest.raises(ValueError, match="`reduction` must be one of"):
        form(logits, target, weights, reduction="median")
    for wrong in (4, -1):
        with pytest.raises((IndexError, RuntimeError)):
            form(logits, torch.full_like(target, wrong), weights)


def test_bad_gamma() -> None:
    logits, target = _data(dtype=torch.float32)
    with pytest.raises(ValueError, match="`gamma` must be finite and at least 0, found -1"):
        class_balanced_focal(logits, target, torch.ones(4), gamma=-1)
    with pytest.raises(ValueError, match="`gamma` must be finite"):
        ClassBalancedLoss([1, 2], form="focal", gamma=math.inf)
    with pytest.raises(ValueError, match='`gamma` is for form="focal"'):
        ClassBalancedLoss([1, 2], gamma=2.0)
    with pytest.raises(ValueError, match="`form` must be one of"):
        ClassBalancedLoss([1, 2], form="hinge")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`reduction` must be one of"):
        ClassBalancedLoss([1, 2], reduction="median")  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["softmax", "sigmoid", "focal"])
def test_the_module_is_the_function(form: Any) -> None:
    logits, target = _data(3, dtype=torch.float32)
    target[0, 0] = 9
    counts = [5, 50, 500, 5000]
    options: dict[str, Any] = {"gamma": 1.5} if form == "focal" else {}
    module = ClassBalancedLoss(counts, 0.99, form=form, ignore_index=9, reduction="sum", **options)
    expected = getattr(losses, f"class_balanced_{form}")(
        logits,
        target,
        class_balanced_weights(counts, 0.99),
        ignore_index=9,
        reduction="sum",
        **options,
    )
    assert torch.equal(module(logits, target), expected)
    assert list(module.state_dict()) == ["weights"]
    assert f"classes=4, beta=0.99, form='{form}'" in repr(module)
