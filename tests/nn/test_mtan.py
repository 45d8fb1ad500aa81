"""MTAN: masks, what they look at, what is shared, odd sizes, encoder and decoder."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradbal.nn import MTAN
from gradbal.nn.backbones import SegNet

TASKS = ("a", "b")


def block(c_in: int, c_out: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, 3, stride, padding=1), nn.BatchNorm2d(c_out), nn.ELU()
    )


def stages(stride: int = 2) -> nn.Module:
    """As in a ResNet: a stem, then blocks, of which the first makes the image smaller."""
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.Sequential(block(3, 4), block(4, 4)),
        nn.Sequential(block(4, 5, stride), block(5, 5), block(5, 6)),
        nn.Sequential(block(6, 3, stride), block(3, 3)),
    )


def heads(c: int = 3) -> dict[str, nn.Module]:
    return {"a": nn.Conv2d(c, 1, 1), "b": nn.Conv2d(c, 2, 1)}


def mtan(**options) -> MTAN:
    options = {"channels": [3, 4, (5, 6), 3], "stem": 1} | options
    return MTAN(TASKS, options.pop("encoder", stages), options.pop("heads", heads()), **options)


def open_masks(model: MTAN) -> None:
    """Masks of one: σ(40) is 1 in float32."""
    for masks in model.masks.values():
        for mask in masks:
            norm = mask[-2]
            norm.weight.data.zero_()
            norm.bias.data.fill_(40.0)


@pytest.mark.parametrize("size", [(16, 16), (15, 9), (8, 7)])
def test_open_masks_reproduce_the_backbone(size):
    model = mtan(transfer=lambda c_in, c_out: nn.Conv2d(c_in, c_out, 1))
    open_masks(model)
    x = torch.randn(3, 2, *size)
    expected = model.encoder(x)
    for task, z in model.features(x).items():
        assert torch.equal(z, expected), task
    assert torch.equal(model(x)["a"], model.heads["a"](expected))


def test_the_formula_step_by_step():
    """The definition with other calls: convolutions as sums over channels, norms by hand."""
    model = mtan().double().eval()
    x = torch.randn(2, 2, 9, 6, dtype=torch.float64)
    stem, one, two, three = model.encoder
    u1 = one[0](stem(x))
    p1 = one[1](u1)
    u2 = two[1](two[0](p1))
    p2 = two[2](u2)
    u3 = three[0](p2)
    p3 = three[1](u3)

    def conv(c: nn.Conv2d, z: Tensor) -> Tensor:
        return torch.einsum("oc,nchw->nohw", c.weight[:, :, 0, 0], z)

    def norm(b: nn.BatchNorm2d, z: Tensor) -> Tensor:
        b.running_var.uniform_(0.5, 2)
        b.running_mean.normal_()
        scale = b.weight / (b.running_var + b.eps).sqrt()
        return (z - b.running_mean[:, None, None]) * scale[:, None, None] + b.bias[:, None, None]

    def masked(mask: nn.Sequential, z: Tensor, p: Tensor) -> Tensor:
        hidden = norm(mask[1], conv(mask[0], z)).clamp(min=0)
        return p / (1 + (-norm(mask[4], conv(mask[3], hidden))).exp())

    z = masked(model.masks["b"][0], u1, p1)
    e = F.max_pool2d(model.transfers[0](z), 2, ceil_mode=True)
    z = masked(model.masks["b"][1], torch.cat([u2, e], 1), p2)
    e = F.max_pool2d(model.transfers[1](z), 2, ceil_mode=True)
    z = masked(model.masks["b"][2], torch.cat([u3, e], 1), p3)
    torch.testing.assert_close(model(x, task="b"), model.heads["b"](z))


def test_masks_lie_between_zero_and_one():
    model = mtan()
    seen: list[Tensor] = []
    for masks in model.masks.values():
        for mask in masks:
            mask.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model(torch.randn(4, 2, 12, 12))
    assert len(seen) == 2 * 3
    assert all(bool(((m > 0) & (m < 1)).all()) for m in seen)
    assert [tuple(m.shape[1:]) for m in seen[:3]] == [(4, 12, 12), (6, 6, 6), (3, 3, 3)]


def test_what_is_shared():
    model = mtan()
    shared = {*map(id, model.shared_parameters())}
    assert shared == {id(p) for part in (model.encoder, model.transfers) for p in part.parameters()}
    loss = model(torch.randn(4, 2, 12, 12), task="a").square().sum()
    loss.backward()
    assert all(p.grad is None for p in model.task_parameters("b"))
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.task_parameters("a"))
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.shared_parameters())


def test_one_task_computes_its_own_attention_only():
    model = mtan()
    calls: list[str] = []
    for task, masks in model.masks.items():
        masks[0].register_forward_hook(lambda *_, task=task: calls.append(task))
    model(torch.randn(2, 2, 12, 12), task="b")
    assert calls == ["b"]


@pytest.mark.parametrize("reduction", [1, 2, 100])
def test_reduction_is_of_the_channels_between(reduction):
    model = mtan(reduction=reduction)
    middles = [mask[0].out_channels for mask in model.masks["a"]]
    assert middles == [max(1, c // reduction) for c in (4, 6, 3)]


@pytest.mark.parametrize("size", [(16, 16), (17, 23), (4, 5)])
@pytest.mark.parametrize("widths", [(3, 4), (3, 4, 5)])
def test_encoder_and_decoder(size, widths):
    if min(size) < 2 ** len(widths):
        size = (2 ** len(widths), 9)
    model = MTAN(TASKS, lambda: SegNet(widths, in_channels=2), heads(widths[0]))
    x = torch.randn(2, 2, *size)
    assert len(model.masks["a"]) == 2 * len(widths)
    assert len(model.transfers) == 2 * len(widths) - 1
    outputs = model(x)
    assert outputs["a"].shape == (2, 1, *size)
    sum(y.square().mean() for y in outputs.values()).backward()
    assert all(bool(p.grad.any()) for p in model.parameters())
    open_masks(model)
    for z in model.features(x).values():
        assert torch.equal(z, model.encoder(x))


@pytest.mark.parametrize("size", [(6, 6), (7, 5), (3, 9), (1, 1), (12, 12), (20, 3)])
def test_sizes_that_are_no_multiples(size):
    """The next stage's height and width, whatever they are."""

    def encoder() -> nn.Module:
        resize = nn.Upsample(size=size) if size[0] >= 12 else nn.AdaptiveAvgPool2d(size)
        first = nn.Sequential(block(2, 3), block(3, 3))
        return nn.Sequential(first, nn.Sequential(resize, nn.Conv2d(3, 3, 1), nn.ELU()))

    model = mtan(encoder=encoder, channels=[3, 3], stem=0).eval()
    assert model.features(torch.randn(2, 2, 12, 11))["a"].shape == (2, 3, *size)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stem": 0}, "stage 0 of the encoder must be .* at least two blocks.*found Conv2d"),
        ({"stem": 4}, "`stem` must leave at least one of the encoder's 4 stages, found 4"),
        ({"channels": None}, "`channels` must be given"),
        ({"channels": [3, 4, 5]}, "one entry for each of the encoder's 4 stages, found 3"),
        ({"channels": [3, 4, 6, (1, 2, 3)]}, r"numbers or pairs of them, found \(1, 2, 3\)"),
        ({"channels": [3, 4, 0, 3]}, r"`channels` must be in \[1, inf\), found 0"),
        ({"reduction": 0}, r"`reduction` must be in \[1, inf\), found 0"),
        (
            {"channels": [3, 4, 6, 3], "example": torch.zeros(1, 2, 8, 8)},
            r"stage 2 of the encoder must have 6 channels, as `channels` .* found u .*1, 5, 4, 4",
        ),
        (
            {"heads": heads(4), "example": torch.zeros(1, 2, 8, 8)},
            "the head of task 'a' must fit its input",
        ),
        (
            {"transfer": lambda i, o: nn.Conv2d(i, o + 1, 1), "example": torch.zeros(1, 2, 8, 8)},
            "mask 1 of task 'a' must fit its input",
        ),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        mtan(**options)


def test_the_last_block_keeps_the_size():
    encoder = lambda: nn.Sequential(nn.Sequential(block(2, 3), block(3, 3, 2)))  # noqa: E731
    with pytest.raises(ValueError, match=r"must keep height and width.*\[8, 8\] before, \[4, 4\]"):
        mtan(encoder=encoder, channels=[3], stem=0, example=torch.zeros(1, 2, 8, 8))


def test_a_stage_of_one_block_has_nothing_to_split_off():
    encoder = lambda: nn.Sequential(nn.Sequential(block(2, 3)))  # noqa: E731
    with pytest.raises(ValueError, match=r"at least two blocks.*found one of 1"):
        mtan(encoder=encoder, channels=[3], stem=0)
