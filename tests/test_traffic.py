"""What several processes send each other, counted, against the formulas of the README."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from gradbal import MultiTaskOptimizer, _replicas
from tests.processes import workers
from tests.test_distributed import FSDP

if torch.__version__ >= "2.6":
    from torch.distributed.fsdp import fully_shard

README = (Path(__file__).parent.parent / "README.md").read_text()

# Bytes that each process sends where N of them pass n bytes around in a ring.
_RING = {
    "all_reduce": lambda n, size: 2 * (size - 1) / size * n,
    "reduce_scatter": lambda n, size: (size - 1) / size * n,
    "all_gather": lambda n, size: (size - 1) * n,
    "broadcast": lambda n, size: n,
}


def rows(t: float, p: float, n: float, b: int = 4) -> float:
    """Rows that are averaged, of b bytes an entry: their reduce-scatter, and DDP's all-reduce."""
    return (n - 1) / n * (t * p * b + 2 * p * 4)


def whole_rows(t: float, p: float, n: float, b: int = 4) -> float:
    """Rows that every process needs, for methods that look at J itself."""
    return (n - 1) / n * (2 * t * p * b + 2 * p * 4)


def sketches(t: float, p: float, n: float, k: float) -> float:
    return (n - 1) / n * (2 * t * k * 4 + 2 * p * 4)


def single(p: float, n: float) -> float:
    """One weighted pass."""
    return (n - 1) / n * 2 * p * 4


def shards(t: float, p: float, n: float) -> float:
    """FSDP's own: all parameters for the forward pass and for each of T backward passes, and each
    pass's gradients back."""
    return (n - 1) / n * (1 + 2 * t) * p * 4


class Tasks(nn.Module):
    """Eight tasks, whose heads are small beside what they share."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())
        self.heads = nn.ModuleList(nn.Linear(256, 1) for _ in range(8))

    def forward(self, batch: Tensor) -> list[Tensor]:
        z = self.trunk(batch)
        return [(head(z) - i).square().mean() for i, head in enumerate(self.heads)]


@contextlib.contextmanager
def counted(model: DistributedDataParallel) -> Iterator[Counter[str]]:
    """Bytes sent within it, by whom: "ddp" the module's own, "rows" ours, "small" of the hosts."""
    sent: Counter[str] = Counter()
    size = dist.get_world_size()

    def count(name: str, tensor: Tensor) -> None:
        n = _RING[name](tensor.numel() * tensor.element_size(), size)
        sent["small" if tensor.numel() < 256 else "rows"] += n

    real = dist.all_reduce, dist.all_gather, dist.broadcast, _replicas._reduce_scatter

    def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        count("all_reduce", tensor)
        return real[0](tensor, *args, **kwargs)

    def all_gather(found: list[Tensor], tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        count("all_gather", tensor)
        return real[1](found, tensor, *args, **kwargs)

    def broadcast(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        count("broadcast", tensor)
        return real[2](tensor, *args, **kwargs)

    def reduce_scatter(mine: Tensor, send: Tensor, **kwargs: Any) -> Any:
        count("reduce_scatter", send)
        return real[3](mine, send, **kwargs)

    # DDP compares annotations, and these would be text.
    def hook(state, bucket):  # type: ignore[no-untyped-def]
        buffer = bucket.buffer()
        sent["ddp"] += _RING["all_reduce"](buffer.numel() * buffer.element_size(), size)
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        # It is counted; nobody looks at the gradients.
        done.set_result(buffer)
        return done

    model.register_comm_hook(None, hook)
    dist.all_reduce, dist.all_gather, dist.broadcast = all_reduce, all_gather, broadcast
    _replicas._reduce_scatter = reduce_scatter
    try:
        yield sent
    finally:
        dist.all_reduce, dist.all_gather, dist.broadcast = real[:3]
        _replicas._reduce_scatter = real[3]


def traffic(name: str, options: dict[str, Any]) -> tuple[dict[str, float], int, int]:
    """Bytes of one step, P shared scalars, and all scalars."""
    model = DistributedDataParallel(Tasks())
    opt = MultiTaskOptimizer(SGD(model.parameters(), lr=0.0), name, **options)
    batch = torch.randn(4, 64, generator=torch.Generator().manual_seed(dist.get_rank()))
    for _ in range(2):
        # What is looked for once.
        opt.zero_grad()
        opt.backward(model(batch))
    with counted(model) as sent:
        opt.zero_grad()
        opt.backward(model(batch))
    n_all = sum(p.numel() for p in model.parameters())
    n_heads = sum(p.numel() for p in model.module.heads.parameters())
    return dict(sent), n_all - n_heads, n_all


@pytest.mark.parametrize("size", [2, 4])
def test_bytes_that_are_sent(size: int) -> None:
    t, k = 8, 1024
    with workers(size) as processes:
        for name, options, formula in [
            ("upgrad", {}, lambda p, extra: rows(t, p, size) + extra),
            (
                "upgrad",
                {"jacobian_dtype": torch.bfloat16},
                lambda p, extra: rows(t, p, size, b=2) + extra,
            ),
            ("moco", {}, lambda p, extra: whole_rows(t, p, size) + extra),
            (
                "upgrad",
                {"jacobian": "sketch", "sketch_size": k},
                lambda p, extra: sketches(t, p, size, k) + extra,
            ),
            ("mean", {}, lambda p, extra: single(p, size) + extra),
        ]:
            for sent, n_shared, n_all in processes.run(traffic, name, options):
                # DDP averages the heads as well.
                expected = formula(n_shared, single(n_all - n_shared, size))
                found = sent["ddp"] + sent.get("rows", 0.0)
                assert found == pytest.approx(expected, rel=2e-3), (name, options)
                # Whatever the model's size is.
                assert sent["small"] < 200 * size + 64 * t * t


def traffic_of_shards(name: str) -> tuple[float, int, int]:
    """Bytes that FSDP sends in one step, P shared scalars, and all with what fills up shards."""
    model = Tasks()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in [m for m in model.modules() if isinstance(m, nn.Linear)]:
            fully_shard(module)
        fully_shard(model)
        opt = MultiTaskOptimizer(SGD(model.parameters(), lr=0.0), name)
        batch = torch.randn(4, 64, generator=torch.Generator().manual_seed(dist.get_rank()))
        opt.backward(model(batch))
        sent, size = 0.0, dist.get_world_size()
        real = {name: getattr(dist, name) for name in _SHARDED if hasattr(dist, name)}

        def counting(name: str) -> Any:
            def count(output: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> Any:
                nonlocal sent
                sent += _RING[_SHARDED[name]](input.numel() * input.element_size(), size)
                # One of them may be written as another.
                put(real)
                try:
                    return real[name](output, input, *args, **kwargs)
                finally:
                    put({name: counting(name) for name in real})

            return count

        def put(functions: dict[str, Any]) -> None:
            for name, function in functions.items():
                setattr(dist, name, function)

        opt.zero_grad()
        put({name: counting(name) for name in real})
        try:
            opt.backward(model(batch))
        finally:
            put(real)
    n_shared = sum(p.numel() for p in model.trunk.parameters())
    # Every process has as many rows of a parameter as the one with most.
    filled = [size * -(-p.shape[0] // size) * (p.numel() // p.shape[0]) for p in model.parameters()]
    return sent, n_shared, sum(filled)


_SHARDED = {
    "all_gather_into_tensor": "all_gather",
    "all_gather_single": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "reduce_scatter_single": "reduce_scatter",
}
"""What FSDP calls, by either of its names."""


@FSDP
@pytest.mark.parametrize("size", [2, 4])
def test_bytes_that_fsdp_sends(size: int) -> None:
    with workers(size) as processes:
        for name, passes in (("upgrad", 8), ("mean", 1)):
            for sent, n_shared, n_filled in processes.run(traffic_of_shards, name):
                # Of the heads, which the formula leaves out, a pass gathers one or two.
                assert shards(passes, n_shared, size) <= sent <= shards(passes, n_filled, size)
                assert sent == pytest.approx(shards(passes, n_shared, size), rel=0.12), name


def megabytes(n: float) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"


def test_the_example_of_the_readme() -> None:
    t, p, n, k = 10, 1e9, 64, 65536
    example = {
        "DDP, rows": (t, t * p * 4, rows(t, p, n)),
        "DDP, rows in bfloat16": (t, t * p * 2, rows(t, p, n, b=2)),
        'DDP, `jacobian="sketch"`': (t + 1, p * 4 + t * k * 4, sketches(t, p, n, k)),
        "DDP, a scalarizer": (1, 0.0, single(p, n)),
        "FSDP2": (t, t * p * 4 / n, shards(t, p, n)),
    }
    for name, (passes, memory, sent) in example.items():
        shown = "0" if not memory else megabytes(memory)
        row = f"| {name} | {passes} | {shown} | {megabytes(sent)} |"
        assert row in README, row
    assert re.search(r"T = 10, P = 10⁹, N = 64", README)
