"""The pretended device sees what a real one would wait for, and computes what the CPU computes."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from benchmarks.accelerator import DEVICE, Accelerator
from tests.zoo import make

READS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x[0].item(),
    "float": lambda x: float(x[0]),
    "int": lambda x: int(x[0]),
    "bool": lambda x: bool(x[0] > 0),
    "if": lambda x: 1 if x.any() else 0,
    "index of a list": lambda x: [1, 2, 3][x[0].long()],
    "in": lambda x: 1.0 in x,
    "equal": lambda x: torch.equal(x, x),
    "allclose": lambda x: torch.allclose(x, x),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 1),
    "mask": lambda x: x[x > 1],
    "masked_select": lambda x: x.masked_select(x > 1),
    "unique": lambda x: x.unique(),
    "repeat_interleave": lambda x: x.repeat_interleave(x.long()),
    "solve": lambda x: torch.linalg.solve(torch.diag(x), x),
    "eigh": lambda x: torch.linalg.eigh(torch.diag(x)),
}
DOWN: dict[str, Callable[[Tensor], object]] = {
    "cpu": lambda x: x.cpu(),
    "tolist": lambda x: x.tolist(),
    "to": lambda x: x.to("cpu", torch.float64),
    "to like": lambda x: x.to(torch.ones(1)),
    "copy_": lambda x: torch.empty(3).copy_(x),
    "not pinned": lambda x: torch.empty(3).copy_(x, non_blocking=True),
    "not there yet": lambda x: x.to("cpu", non_blocking=True),
    "foreach": lambda x: torch._foreach_copy_([torch.empty(3)], [x]),
}
UP: dict[str, Callable[[Tensor], object]] = {
    "tensor": lambda x: torch.tensor([1.0, 2.0, 3.0], device="cuda"),
    "to": lambda x: torch.ones(3).to("cuda:0"),
    "to device": lambda x: torch.ones(3).to(x.device),
    "to like": lambda x: torch.ones(3).to(x),
    "copy_": lambda x: x.copy_(torch.ones(3)),
    "not pinned": lambda x: torch.ones(3).to("cuda", non_blocking=True),
    "waiting": lambda x: torch.ones(3).pin_memory().to("cuda"),
    "list as index": lambda x: x[[0, 1, 2]],
    "list as target": lambda x: x.__setitem__([0, 1, 2], 0.0),
    "index": lambda x: x[torch.tensor([0, 1, 2])],
}
REFUSED: dict[str, Callable[[Tensor], object]] = {
    "numpy": lambda x: x.numpy(),
    "array": lambda x: x.__array__(),
    "format": lambda x: f"{x[0]:.3f}",
    "mixing": lambda x: x + torch.ones(3),
    "product": lambda x: torch.ones(3) @ x,
    "stack": lambda x: torch.stack([x[0], torch.tensor(1.0)]),
    "foreach": lambda x: torch._foreach_add([x], [torch.ones(3)]),
    "index": lambda x: torch.ones(3)[x.long() - 1],
    "made unseen": lambda x: x.new_tensor([1.0, 2.0, 3.0]) + x,
}
UNSEEN: dict[str, Callable[[Tensor], object]] = {
    "shape": lambda x: (x.shape, len(x), x.dtype, x.device, x.numel()),
    "arithmetic": lambda x: (x * 2.0 + torch.tensor(1.0)).sum(),
    "factories": lambda x: torch.zeros(2, device="cuda") + torch.ones_like(x[:2]) + x.new_ones(2),
    "dtype": lambda x: x.to(torch.float64).to("cuda"),
    "views": lambda x: (x[0], x[1:], x.view(3, 1), x.unbind(), torch.split(x, [1, 2])),
    "norm": lambda x: (torch.linalg.vector_norm(x), torch._foreach_norm([x])),
    "pinned": lambda x: torch.empty(3, pin_memory=True).zero_(),
}


@pytest.fixture
def device() -> Iterator[Accelerator]:
    with Accelerator() as entered:
        yield entered


@pytest.fixture
def x(device: Accelerator) -> Tensor:
    return device.put(torch.tensor([1.0, 2.0, 3.0]))


@pytest.mark.parametrize("look", READS.values(), ids=READS)
def test_reads_are_seen(device: Accelerator, x: Tensor, look: Callable[[Tensor], object]) -> None:
    with device.watched() as seen:
        look(x)
    assert seen.reads
    assert seen.waits == seen.reads
    assert not seen.down
    assert not seen.up


@pytest.mark.parametrize("copy", DOWN.values(), ids=DOWN)
def test_downloads_are_seen(
    device: Accelerator, x: Tensor, copy: Callable[[Tensor], object]
) -> None:
    with device.watched() as seen:
        copy(x)
    assert [(d.shape, d.n_bytes) for d in seen.down] == [((3,), 12)]
    assert seen.waits == seen.down


@pytest.mark.parametrize("copy", UP.values(), ids=UP)
def test_uploads_are_seen(device: Accelerator, x: Tensor, copy: Callable[[Tensor], object]) -> None:
    with device.watched() as seen:
        copy(x)
    assert [(u.numel, u.waits) for u in seen.up] == [(3, True)]
    assert seen.waits == seen.up


def test_copies_that_do_not_wait(device: Accelerator, x: Tensor) -> None:
    host = torch.empty(3, pin_memory=True)
    with device.watched() as seen:
        host.copy_(x, non_blocking=True)
        torch.ones(3).pin_memory().to(x.device, non_blocking=True)
    assert [t.numel for t in [*seen.down, *seen.up]] == [3, 3]
    assert not seen.waits
    assert host.tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("use", REFUSED.values(), ids=REFUSED)
def test_what_would_pass_unseen_or_fail_on_a_device_is_refused(
    x: Tensor, use: Callable[[Tensor], object]
) -> None:
    with pytest.raises((RuntimeError, TypeError)):
        use(x)


@pytest.mark.parametrize("use", UNSEEN.values(), ids=UNSEEN)
def test_what_needs_no_data(
    device: Accelerator, x: Tensor, use: Callable[[Tensor], object]
) -> None:
    with device.watched() as seen:
        use(x)
    assert not [*seen.down, *seen.up, *seen.reads]


def test_nothing_works_outside() -> None:
    with Accelerator() as device:
        x = device.put(torch.ones(3))
    with pytest.raises(RuntimeError, match="outside"):
        x + 1.0


def test_random_numbers_of_the_device(device: Accelerator) -> None:
    generator = torch.Generator("cuda").manual_seed(1)
    assert isinstance(generator, torch.Generator)
    with device.watched() as seen:
        drawn = torch.rand(3, device="cuda", generator=generator)
    assert not [*seen.down, *seen.up, *seen.reads]
    assert torch.equal(device.look(drawn), torch.rand(3, generator=generator.manual_seed(1)))


def test_views_are_of_the_same_data(device: Accelerator) -> None:
    buffer = torch.zeros(2, 6, device="cuda")
    first, second = torch.split(buffer[1], [4, 2])
    torch._foreach_copy_([first.view(2, 2), second], [torch.ones_like(first).view(2, 2), -second])
    first.view(2, 2)[1].mul_(5.0)
    assert device.look(buffer).tolist() == [[0.0] * 6, [1.0, 1.0, 5.0, 5.0, 0.0, 0.0]]


def test_gradients_are_those_of_the_cpu(device: Accelerator) -> None:
    found, wanted = device.put(make("BatchNorm")), make("BatchNorm")
    batch = wanted.batch()
    for model, x in ((found, device.put(batch)), (wanted, batch)):
        sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        for _ in range(2):
            sgd.zero_grad()
            sum(model.losses(x)).backward()
            sgd.step()
    for p, q in zip(found.parameters(), wanted.parameters(), strict=True):
        assert p.device == DEVICE
        assert p.grad.device == DEVICE
        assert torch.equal(device.look(p), q)
        assert torch.equal(device.look(p.grad), q.grad)


def test_a_parameter_that_moves_is_the_same_object(device: Accelerator) -> None:
    p = nn.Parameter(torch.ones(2))
    sgd = torch.optim.SGD([p], lr=1.0)
    p.data = torch.zeros(3, device="cuda")
    assert sgd.param_groups[0]["params"][0] is p
    assert p.device == DEVICE
    assert p.requires_grad
    p.sum().backward()
    sgd.step()
    assert device.look(p).tolist() == [-1.0] * 3
