"""The Gramian of per-instance losses against a plain backward pass and against TorchJD's engine."""

from __future__ import annotations

import copy
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.errors import MissingExtra
from gradbal import MultiTaskOptimizer
from gradbal.jacobian import Instance, deliver

__all__ = ["COLUMNS", "MODELS", "Row", "measure"]

COLUMNS = {
    "engine": "the Gramian, and the gradients of the weighted losses",
    "backward": "all of MultiTaskOptimizer.backward, the method's weights too",
    "torchjd": "TorchJD's autogram.Engine(batch_dim=0), and the pass of the weighted losses",
}
"""What is timed, each as a ratio to `losses.sum().backward()`."""

_CALL = "the call"

_SELDOM = 4
"""TorchJD takes part in one round of so many."""


class _Encoder(nn.Module):
    """Two layers of width 192 over 32 tokens."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(192, 4, 768, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(192, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.encoder(tokens).mean(1))
        return out


def _mlp() -> nn.Module:
    """784-1024-1024-10."""
    layers = [nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(1024, 10))


def _lenet() -> nn.Module:
    """LeNet-5 on 28x28."""
    features = [nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2)]
    features += [nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten()]
    head = [nn.Linear(400, 120), nn.Tanh(), nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, 10)]
    return nn.Sequential(*features, *head)


def _conv() -> nn.Module:
    """Three 3x3 convolutions with GroupNorm, up to 64 channels, on 3x32x32."""
    layers: list[nn.Module] = []
    channels = 3
    for width, stride in ((16, 1), (32, 2), (64, 2)):
        layers += [nn.Conv2d(channels, width, 3, stride, 1), nn.GroupNorm(4, width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (_mlp, (784,)),
    "lenet": (_lenet, (1, 28, 28)),
    "conv": (_conv, (3, 32, 32)),
    "transformer": (_Encoder, (32, 192)),
}
"""Name → constructor, and the shape of one instance."""


@dataclass(frozen=True)
class Row:
    """One model at one batch size.

    ratios: by `COLUMNS`, medians over the rounds of the CPU time over that of the plain pass in the
    same round. peaks: bytes at the peak of each, and of the plain pass, over what was there before.
    difference: of the two Gramians, relative to the largest entry. reason: why there is no figure
    of TorchJD's.
    """

    model: str
    batch: int
    n_parameters: int
    ratios: dict[str, float | None]
    peaks: dict[str, int]
    difference: float | None
    reason: str = ""


Variant = Callable[[Tensor], Tensor | None]


def measure(
    models: Sequence[str],
    batch_sizes: Sequence[int],
    rounds: int,
    threads: int = 1,
    method: str = "imtl_g",
) -> Iterator[Row]:
    """Times every variant in turn on the same batch, round after round.

    Args:
        models: keys of `MODELS`.
        batch_sizes: values of B.
        rounds: measured rounds, at least 1; eight more warm up.
        threads: of torch.
        method: a Gramian method for `backward`.

    Yields:
        One row for each model and B, as soon as it is there.

    Raises:
        MissingExtra: TorchJD is not installed.
    """
    try:
        import torchjd.autogram  # noqa: F401
    except ImportError as error:
        raise MissingExtra("torchjd", "python -m benchmarks speed") from error
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for name in models:
            for size in batch_sizes:
                yield _measure(name, size, rounds, method)
    finally:
        torch.set_num_threads(before)


def _measure(name: str, size: int, rounds: int, method: str) -> Row:
    from torchjd.autogram import Engine

    torch.manual_seed(0)
    make, shape = MODELS[name]
    model, batch, labels = make(), torch.randn(size, *shape), torch.arange(size) % 10
    # TorchJD leaves its hooks on the model.
    twin = copy.deepcopy(model)
    parameters = list(model.parameters())
    ones = torch.ones(size)
    engine = Instance()
    optimizer = MultiTaskOptimizer(SGD(parameters, lr=0.0), method, jacobian="instance")
    theirs = Engine(twin, batch_dim=0)

    def plain(losses: Tensor) -> None:
        losses.sum().backward()  # type: ignore[no-untyped-call]

    def gramian(losses: Tensor) -> Tensor:
        found = engine.take(losses, ones, parameters, None, frozenset(), retain_graph=False)
        if found.direct:
            pairs = engine.combined(found, ones, ones, frozenset())
            targets, gradients = [p for p, _ in pairs], [g for _, g in pairs]
            del pairs
            deliver(targets, gradients, (), (), ())
        else:
            losses.backward(ones)  # type: ignore[no-untyped-call]
            pairs = [(p, p.grad) for p in parameters if p.grad is not None]
            engine.check(found, ones, ones, pairs, compare=True)
        return found.gramian

    def torchjd(losses: Tensor) -> Tensor:
        found = theirs.compute_gramian(losses)
        losses.backward(ones)  # type: ignore[no-untyped-call]
        return found

    variants: dict[str, Variant] = {
        "plain": plain,
        "engine": gramian,
        "backward": optimizer.backward,
        "torchjd": torchjd,
    }

    def losses_for(variant: str) -> Tensor:
        of = twin if variant == "torchjd" else model
        of.zero_grad()
        return nn.functional.cross_entropy(of(batch), labels, reduction="none")

    reason, difference = "", None
    # Rows are looked at once more at steps 2, 4 and 8.
    for _ in range(8):
        for variant in ("plain", "engine", "backward"):
            variants[variant](losses_for(variant))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            their_gramian = torchjd(losses_for("torchjd"))
        our_gramian = gramian(losses_for("engine"))
        off = (our_gramian - their_gramian.double()).abs().max() / our_gramian.abs().max()
        difference = float(off)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        del variants["torchjd"]
    ratios: dict[str, list[float]] = {column: [] for column in variants if column != "plain"}
    for number in range(rounds):
        names = [v for v in variants if v != "torchjd" or number % _SELDOM == 0]
        turn = number % len(names)
        seconds = {}
        for variant in names[turn:] + names[:turn]:
            losses = losses_for(variant)
            start = time.process_time()
            variants[variant](losses)
            seconds[variant] = time.process_time() - start
        for column in names:
            if column != "plain":
                ratios[column].append(seconds[column] / seconds["plain"])
    return Row(
        name,
        size,
        sum(p.numel() for p in parameters),
        {c: statistics.median(ratios[c]) if c in ratios else None for c in COLUMNS},
        {v: _peak(run, partial(losses_for, v)) for v, run in variants.items()},
        difference,
        reason,
    )


def _peak(run: Variant, losses: Callable[[], Tensor]) -> int:
    """Bytes of the CPU's allocator at the peak of one call, over what was there before.

    The losses are made under the profiler too: what the call frees of their graph counts.
    """
    # Kineto reports on stderr that there is no driver, and every start and stop.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        of_model = losses()
        with record_function(_CALL):
            run(of_model)
    events = profiler.profiler.kineto_results.events()
    live = peak = 0
    for event in sorted(events, key=lambda event: int(event.start_ns())):
        if event.name() == _CALL:
            live = peak = 0
        elif event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak
