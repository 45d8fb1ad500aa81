"""Which entries of gradients are whose, from the graph alone, against gradients of each loss."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradbal.jacobian.separation import _reshaped, _short, separated
from gradbal.jacobian.walk import walk

B = 4

pytestmark = pytest.mark.skipif(
    not hasattr(torch.autograd.graph.Node, "_input_metadata"),
    reason="torch 2.4 does not tell the shapes that this goes by",
)


def owners_of(
    function: Callable[[Tensor], Tensor], shape: tuple[int, ...]
) -> tuple[np.ndarray | None, Tensor, Tensor]:
    """What is said of an inner tensor z of that shape; z; the losses `function(z) [B]`."""
    torch.manual_seed(0)
    z = torch.rand(shape, dtype=torch.float64, requires_grad=True) * 1.0
    losses = function(z)
    assert losses.shape == (B,)
    return separated(walk([losses], []), B).get(z.grad_fn), z, losses


def rest(z: Tensor) -> Tensor:
    return z.flatten(1).sum(1)


def as_first(z: Tensor) -> Tensor:
    return rest(z.transpose(0, 1))


LAYER = {
    "norm": nn.LayerNorm(6).double(),
    "linear": nn.Linear(6, 5).double(),
    "image": nn.Conv2d(3, 4, 3, padding=1).double(),
    "up": nn.ConvTranspose2d(3, 2, 2, stride=2).double(),
    "groups": nn.GroupNorm(3, 3).double(),
    "eval": nn.BatchNorm2d(3).double().eval(),
    "train": nn.BatchNorm2d(3).double(),
    "attend": nn.MultiheadAttention(6, 2, batch_first=True).double(),
    "across": nn.MultiheadAttention(6, 2, batch_first=False).double(),
}
CLASSES = torch.arange(B) % 3
MASK = torch.eye(B, dtype=torch.float64)

APART: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "entrywise": (lambda z: rest(F.gelu(z).exp().log() / (1 + z.sigmoid()) - z.tanh()), (B, 3)),
    "spread over features": (lambda z: (z[:, None] * torch.rand(B, 5).double()).sum(1), (B,)),
    "times features": (lambda z: rest(z * torch.rand(6).double()), (B, 6)),
    "last dimension": (lambda z: as_first(z.relu()), (3, B)),
    "flattened pairs": (lambda z: z.view(B, 2, 3).sum((1, 2)), (2 * B, 3)),
    "flattened, the batch second": (lambda z: z.view(2, B, 3).mean((0, -1)), (2 * B, 3)),
    "two views": (lambda z: rest(z[:, 0] * z[:, 1]), (B, 2, 3)),
    "halves of features": (lambda z: rest(torch.mul(*z.chunk(2, 1))), (B, 6)),
    "unbound": (lambda z: sum(z.unbind(1)), (B, 3)),
    "permuted": (lambda z: z.permute(2, 0, 1).sum((0, -1)), (B, 2, 3)),
    "squeezed": (lambda z: rest(z.unsqueeze(1).squeeze(1).unsqueeze(-1)), (B, 3)),
    "together": (lambda z: rest(torch.cat([z, z.square()], 1)), (B, 3)),
    "rows below one another": (lambda z: torch.cat([z, z]).view(2, B, 3).sum((0, 2)), (B, 3)),
    "in a stack": (lambda z: torch.stack([z, z.exp()], 2).sum((1, 2)), (B, 3)),
    "one of a sequence": (lambda z: rest(z[0]), (5, B, 3)),
    "a slice": (lambda z: rest(z[:, 1:3]), (B, 5, 2)),
    "norms": (lambda z: z.norm(dim=1) + z.logsumexp(1) + z.mean(-1, keepdim=True)[:, 0], (B, 3)),
    "softmax": (lambda z: rest(z.softmax(-1) * z.log_softmax(1)), (B, 3)),
    "cross-entropy": (lambda z: F.cross_entropy(z, CLASSES, reduction="none"), (B, 3)),
    "smoothed": (
        lambda z: F.cross_entropy(z, CLASSES, reduction="none", label_smoothing=0.1),
        (B, 3),
    ),
    "cross-entropy of images": (
        lambda z: rest(F.cross_entropy(z, torch.zeros(B, 2, 2).long(), reduction="none")),
        (B, 3, 2, 2),
    ),
    "squared errors": (lambda z: rest(F.mse_loss(z, 0 * z.detach(), reduction="none")), (B, 3)),
    "logits": (
        lambda z: rest(F.binary_cross_entropy_with_logits(z, 0 * z.detach(), reduction="none")),
        (B, 3),
    ),
    "linear": (lambda z: rest(LAYER["linear"](LAYER["norm"](z))), (B, 6)),
    "linear in sequences": (lambda z: rest(LAYER["linear"](LAYER["norm"](z))), (B, 3, 6)),
    "linear, the batch second": (lambda z: as_first(LAYER["linear"](z)), (3, B, 6)),
    "convolution": (lambda z: rest(LAYER["image"](LAYER["groups"](z))), (B, 3, 4, 4)),
    "transposed convolution": (lambda z: rest(LAYER["up"](LAYER["eval"](z))), (B, 3, 4, 4)),
    "pooled": (lambda z: rest(F.max_pool2d(F.avg_pool2d(z, 2), 2)), (B, 3, 4, 4)),
    "pooled to any size": (lambda z: rest(F.adaptive_avg_pool2d(z, 2)), (B, 3, 4, 4)),
    "larger": (lambda z: rest(F.interpolate(z, scale_factor=2)), (B, 3, 2, 2)),
    "products": (lambda z: rest(z @ z.mT), (B, 3, 2)),
    "attention": (lambda z: rest(LAYER["attend"](z, z, z, need_weights=False)[0]), (B, 3, 6)),
    "attention with weights": (lambda z: rest(LAYER["attend"](z, z, z)[0]), (B, 3, 6)),
    "attention, the batch second": (lambda z: as_first(LAYER["across"](z, z, z)[0]), (3, B, 6)),
    "summed over the first": (lambda z: z.square().sum(0), (3, B)),
    "dropout": (lambda z: rest(F.dropout(z)), (B, 3)),
    "masked": (lambda z: rest(torch.where(z > 0.1, z, 0.0).masked_fill(z > 0.9, 1.0)), (B, 3)),
}


@pytest.mark.parametrize("name", APART)
def test_what_stays_apart_is_told_apart(name: str) -> None:
    ids, z, losses = owners_of(*APART[name])
    assert ids is not None
    whole = torch.from_numpy(np.broadcast_to(ids, z.shape).copy())
    for b, loss in enumerate(losses):
        (gradient,) = torch.autograd.grad(loss, z, retain_graph=True)
        assert bool(gradient.any())
        assert not bool(gradient[whole != b].any())


MIXED: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "a mask over pairs": (lambda z: (MASK * rest(z)).sum(1), (B, 3)),
    "a product with a mask": (lambda z: (MASK @ rest(z)[:, None])[:, 0], (B, 3)),
    "a mean over the batch": (lambda z: rest(z - 0.0 * z.mean(0)), (B, 3)),
    "a sum of all": (lambda z: rest(z) + 0.0 * z.sum(), (B, 3)),
    "a softmax over the batch": (lambda z: rest(z.softmax(0)), (B, 3)),
    "a norm over the batch": (lambda z: rest(z / z.norm(dim=0, keepdim=True)), (B, 3)),
    "pairs": (lambda z: F.cross_entropy(z @ z.T, torch.arange(B), reduction="none"), (B, 3)),
    "batch statistics": (lambda z: rest(LAYER["train"](z)), (B, 3, 2, 2)),
    "attention over the batch": (lambda z: rest(LAYER["across"](z, z, z)[0]), (B, 3, 6)),
    "pooling over the batch": (lambda z: rest(F.avg_pool2d(z[None], 3, 1, 1)[0]), (B, 3)),
    "neighbours": (lambda z: z[:B].sum(1) + z[1:].sum(1), (B + 1, 3)),
    "another order": (lambda z: rest(z)[[2, 0, 1, 3]], (B, 3)),
    "rolled": (lambda z: rest(z.roll(1, 0)), (B, 3)),
    "summed up": (lambda z: rest(z.cumsum(0)), (B, 3)),
    "by size": (lambda z: rest(z).sort().values, (B, 3)),
    "as columns": (lambda z: rest(z) + z.T.reshape(B, -1).sum(1), (B, 3)),
    "the other way round": (lambda z: z.sum(0) + z.sum(1), (B, B)),
    "a convolution over the batch": (lambda z: rest(LAYER["image"](z[None])[0].mT), (3, B, B)),
    "a norm of columns": (lambda z: rest(F.layer_norm(z.T, (B,)).T), (B, 3)),
    "halves of the batch": (lambda z: rest(z[:B] + z[B:]), (2 * B, 3)),
    "each from its own": (lambda z: torch.stack([row.sum() for row in z]), (B, 3)),
}
"""What could mix instances, or what nothing is known of: no claim is made."""


@pytest.mark.parametrize("name", MIXED)
def test_what_could_mix_is_not_told_apart(name: str) -> None:
    ids, _, _ = owners_of(*MIXED[name])
    assert ids is None


def test_custom_functions_are_not_known() -> None:
    class Copied(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:
            return gradient.flip(0)

    ids, _, _ = owners_of(lambda z: rest(Copied.apply(z)), (B, 3))
    assert ids is None


def test_owners_in_another_shape() -> None:
    rng = np.random.default_rng(0)
    for _ in range(500):
        old = rng.integers(1, 5, size=rng.integers(1, 5))
        left, new = int(np.prod(old)), []
        while left > 1:
            size = int(rng.choice([k for k in range(1, left + 1) if left % k == 0]))
            new.append(size)
            left //= size
        ids = rng.integers(0, 2, size=[int(s) if rng.random() < 0.5 else 1 for s in old])
        wanted = np.broadcast_to(ids, old).reshape(new)
        found = _reshaped(_short(ids), tuple(map(int, old)), tuple(new))
        assert found.ndim == len(new)
        np.testing.assert_array_equal(np.broadcast_to(found, new), wanted)
