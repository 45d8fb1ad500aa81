"""Which layers are found in a graph, and what is left alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gradbal.jacobian.layers import Convolution, Embedding, Linear, Norm, Shift, find_layers, owned
from gradbal.jacobian.walk import walk


def randn(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def layers_of(outputs: Tensor | Sequence[Tensor], parameters: Sequence[Tensor]) -> Any:
    roots = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    return find_layers(walk(roots, parameters), parameters)


def module(made: nn.Module, *inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
    made = made.double()
    return made(*inputs).square().sum(), list(made.parameters())


INDICES = torch.tensor([[0, 3], [3, 6]])

FOUND: dict[str, tuple[Callable[[], tuple[Tensor, list[Tensor]]], list[type]]] = {
    "linear 1-D": (lambda: module(nn.Linear(3, 5), randn(3)), [Linear]),
    "linear 2-D": (lambda: module(nn.Linear(3, 5), randn(4, 3)), [Linear]),
    "linear 3-D": (lambda: module(nn.Linear(3, 5), randn(2, 4, 3)), [Linear]),
    "linear 4-D": (lambda: module(nn.Linear(3, 5), randn(2, 2, 4, 3)), [Linear]),
    "linear without bias": (lambda: module(nn.Linear(3, 5, bias=False), randn(2, 4, 3)), [Linear]),
    "linear of a transpose": (
        lambda: module(nn.Linear(3, 5), randn(4, 2, 3).transpose(0, 1)),
        [Shift, Linear],
    ),
    "conv 1d": (lambda: module(nn.Conv1d(2, 3, 2), randn(2, 2, 5)), [Convolution]),
    "conv 2d": (lambda: module(nn.Conv2d(2, 4, 3, groups=2), randn(2, 2, 5, 5)), [Convolution]),
    "conv 3d": (lambda: module(nn.Conv3d(2, 3, 2), randn(2, 2, 3, 3, 3)), [Convolution]),
    "conv transposed": (
        lambda: module(nn.ConvTranspose2d(2, 3, 2), randn(2, 2, 5, 5)),
        [Convolution],
    ),
    "layer norm": (lambda: module(nn.LayerNorm((2, 3)), randn(4, 2, 3)), [Norm]),
    "group norm": (lambda: module(nn.GroupNorm(2, 4), randn(2, 4, 3)), [Norm]),
    "batch norm": (lambda: module(nn.BatchNorm2d(2), randn(2, 2, 3, 3)), [Norm]),
    "batch norm, eval": (lambda: module(nn.BatchNorm1d(2).eval(), randn(4, 2)), [Norm]),
    "embedding": (lambda: module(nn.Embedding(7, 3), INDICES), [Embedding]),
}


@pytest.mark.parametrize("name", FOUND)
def test_layers_are_found_with_all_their_parameters(name: str) -> None:
    make, kinds = FOUND[name]
    loss, parameters = make()
    found = layers_of(loss, parameters)
    assert [type(layer) for layer in found] == kinds
    assert sorted(k for layer in found for k in owned(layer)) == list(range(len(parameters)))


@pytest.mark.parametrize(
    "norm",
    [
        nn.LayerNorm((3, 4)),
        nn.LayerNorm(4),
        nn.GroupNorm(2, 4),
        nn.BatchNorm1d(4),
        nn.BatchNorm1d(4).eval(),
    ],
    ids=str,
)
def test_what_a_norm_scales_is_what_it_gives_without_weight_and_bias(norm: nn.Module) -> None:
    shape = (5, 3, 4) if isinstance(norm, nn.LayerNorm) else (5, 4, 3)
    norm = norm.double()
    if isinstance(norm, nn.BatchNorm1d):
        norm.running_mean, norm.running_var = randn(4), randn(4).square() + 0.1
    # Weight and bias start at one and zero, so that the output is what they act on.
    out = norm(randn(*shape))
    (layer,) = layers_of(out.square().sum(), list(norm.parameters()))
    torch.testing.assert_close(layer.normalized(), out.detach(), rtol=1e-12, atol=1e-12)
    weight = norm.get_parameter("weight")
    assert tuple(out.shape[d] for d in layer.dims) == tuple(weight.shape)
    assert layer.mixes == (isinstance(norm, nn.BatchNorm1d) and norm.training)


def test_inputs_of_a_matrix_product_are_those_of_the_layer() -> None:
    x = randn(2, 4, 3)
    loss, parameters = module(nn.Linear(3, 5), x)
    (layer,) = layers_of(loss, parameters)
    torch.testing.assert_close(layer.inputs, x.view(8, 3))


def test_padding_of_an_embedding() -> None:
    made = nn.Embedding(7, 3, padding_idx=6, scale_grad_by_freq=True)
    (layer,) = layers_of(made(INDICES).sum(), list(made.parameters()))
    assert (layer.padding_idx, layer.by_freq) == (6, True)
    made = nn.Embedding(7, 3)
    (layer,) = layers_of(made(INDICES).sum(), list(made.parameters()))
    assert (layer.padding_idx, layer.by_freq) == (None, False)


def weight() -> nn.Parameter:
    return nn.Parameter(randn(5, 3))


def twice(w: Tensor) -> Tensor:
    return (F.linear(F.linear(randn(4, 3), w), w.T)).sum()


def scaled_product(w: Tensor) -> Tensor:
    return torch.addmm(randn(3), randn(4, 5), w, alpha=2.0).sum()


def changed_in_place(w: Tensor) -> Tensor:
    x = randn(4, 5) * 1.0
    y = x @ w
    x.add_(1.0)
    return y.sum()


def with_hooks(w: Tensor) -> Tensor:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t * 1.0, lambda t: t * 2.0):
        return F.linear(randn(4, 3), w).sum()


LEFT_ALONE: dict[str, Callable[[Tensor], Tensor | list[Tensor]]] = {
    "a part of a parameter": lambda w: F.linear(randn(4, 3), w[:2]).sum(),
    "two views": lambda w: F.linear(randn(4, 3), w[:2]).sum() + F.linear(randn(4, 3), w[2:]).sum(),
    "used twice": twice,
    "one product, taken twice": lambda w: (lambda t: (randn(4, 3) @ t + randn(4, 3) @ t).sum())(
        w.T
    ),
    "decayed": lambda w: F.linear(randn(4, 3), w).sum() + w.square().sum(),
    "decayed in another loss": lambda w: [F.linear(randn(4, 3), w).sum(), w.square().sum()],
    "a loss itself": lambda w: [F.linear(randn(4, 3), w).sum(), w],
    "scaled": lambda w: F.linear(randn(4, 3), w * 2.0).sum(),
    "cast": lambda w: F.linear(randn(4, 3).float(), w.float()).sum(),
    "on the left": lambda w: (w @ randn(3, 4)).sum(),
    "a scaled product": scaled_product,
    "input changed in place": changed_in_place,
    "hooks on saved tensors": with_hooks,
    "checkpointing": lambda w: checkpoint(
        lambda x: F.linear(x, w).tanh(), randn(4, 3).requires_grad_(), use_reentrant=False
    ).sum(),
    "a sparse gradient": lambda w: F.embedding(INDICES % 5, w, sparse=True).sum(),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_is_not_surely_a_layer_is_left_alone(name: str) -> None:
    w = weight()
    assert layers_of(LEFT_ALONE[name](w), [w]) == []


def test_a_frozen_weight_leaves_a_bias() -> None:
    made = nn.Linear(3, 5).double()
    made.weight.requires_grad_(False)
    (layer,) = layers_of(made(randn(4, 3)).sum(), [made.bias])
    assert layer == Shift(layer.node, 0, 1)


def test_a_bias_of_two_layers_is_nobodys() -> None:
    first, second = nn.Linear(3, 5).double(), nn.Linear(3, 5).double()
    second.bias = first.bias
    loss = (first(randn(4, 3)) + second(randn(4, 3))).sum()
    parameters = [first.weight, first.bias, second.weight]
    found = layers_of(loss, parameters)
    assert sorted(k for layer in found for k in owned(layer)) == [0, 2]


def test_a_walk_knows_which_loss_reaches_what() -> None:
    a, b, c = (randn(2).requires_grad_() for _ in range(3))
    first, second = (a * b).sum(), (b * c).sum()
    graph = walk([first, second], [a, b, c])
    assert graph.reach(2, 3) == [(True, True, False), (False, True, True)]
