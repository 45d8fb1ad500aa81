"""Awkward models, each with its losses and a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradbal

ZOO: dict[str, type[Zoo]] = {}


class Zoo(nn.Module):
    """A model whose `losses(batch)` is a list of `n_tasks` scalars.

    dtype: of the parameters. tolerance: of a gradient against the reference, relative to the
    largest entry of all of them; `rounding` where one backward pass takes the sum of all losses.
    """

    n_tasks: ClassVar[int] = 2
    dtype: ClassVar[torch.dtype] = torch.float64
    tolerance: ClassVar[float] = 1e-7
    rounding: ClassVar[float] = 1e-7

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not cls.__name__.startswith("_"):
            ZOO[cls.__name__] = cls

    def batch(self) -> Tensor:
        generator = torch.Generator().manual_seed(5)
        return torch.randn(6, 4, generator=generator, dtype=torch.float64).to(self.dtype)

    def losses(self, batch: Tensor) -> list[Tensor]:
        raise NotImplementedError


def make(name: str) -> Zoo:
    """A model of the zoo, always with the same parameters."""
    torch.manual_seed(3)
    return ZOO[name]().to(ZOO[name].dtype)


def targets(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Conflicting losses: every output is drawn to another constant.

    They are at least 1, so that their logarithms suit methods that take no negative losses.
    """
    return [(o - (-2.0) ** i).square().mean() + 1 for i, o in enumerate(outputs)]


class Plain(Zoo):
    n_tasks = 3

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(5, 1) for _ in range(3))

    def losses(self, batch: Tensor) -> list[Tensor]:
        z = self.trunk(batch)
        return targets([head(z) for head in self.heads])


class UsedTwice(Zoo):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.a, self.b = nn.Linear(4, 1), nn.Linear(4, 2)

    def losses(self, batch: Tensor) -> list[Tensor]:
        z = self.layer(torch.tanh(self.layer(batch)))
        return targets([self.a(z), self.b(z)])


class TiedWeights(Zoo):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.decoder = nn.Linear(4, 7, bias=False)
        self.decoder.weight = self.embedding.weight
        self.head = nn.Linear(4, 1)

    def batch(self) -> Tensor:
        return torch.tensor([0, 3, 3, 6])

    def losses(self, batch: Tensor) -> list[Tensor]:
        z = self.embedding(batch)
        return [
            nn.functional.cross_entropy(self.decoder(z), batch.flip(0)),
            *targets([self.head(z)]),
        ]


class PartlyShared(Zoo):
    n_tasks = 3

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.middle = nn.Linear(4, 5), nn.Linear(5, 5)
        self.heads = nn.ModuleList(nn.Linear(5, 1) for _ in range(3))

    def losses(self, batch: Tensor) -> list[Tensor]:
        z = torch.tanh(self.trunk(batch))
        deep = torch.tanh(self.middle(z))
        return targets([self.heads[0](z), self.heads[1](deep), self.heads[2](deep)])


class NoCommonParameter(Zoo):
    """Each parameter is shared by two of three losses, none by all."""

    n_tasks = 3

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(4, 1) for _ in range(3))

    def losses(self, batch: Tensor) -> list[Tensor]:
        a, b, c = (part(batch) for part in self.parts)
        return targets([a + b, b * c, c - a])


class Frozen(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.trunk[0].weight.requires_grad_(False)
        self.heads[1].bias.requires_grad_(False)


class Unused(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(3, 3)


class NestedHead(Zoo):
    """A head that lives inside the trunk module, which shared parameters follow in order."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.ModuleDict(
            {"first": nn.Linear(4, 5), "head": nn.Linear(5, 1), "last": nn.Linear(5, 5)}
        )
        self.other = nn.Linear(5, 1)

    def losses(self, batch: Tensor) -> list[Tensor]:
        z = torch.tanh(self.trunk["last"](torch.tanh(self.trunk["first"](batch))))
        return targets([self.trunk["head"](z), self.other(z)])


class BatchNorm(Zoo):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh())
        self.a, self.b = nn.Linear(5, 1), nn.Linear(5, 1)

    def losses(self, batch: Tensor) -> list[Tensor]:
        z = self.trunk(batch)
        return targets([self.a(z), self.b(z)])


class Dropout(BatchNorm):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.4), nn.Linear(8, 5))


class LSTM(Zoo):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 3, num_layers=2, batch_first=True)
        self.a, self.b = nn.Linear(3, 1), nn.Linear(3, 1)

    def losses(self, batch: Tensor) -> list[Tensor]:
        z, _ = self.lstm(batch.view(2, 3, 4))
        return targets([self.a(z), self.b(z[:, -1])])


class Attention(Zoo):
    n_tasks = 3

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.1, batch_first=True)
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(3))

    def losses(self, batch: Tensor) -> list[Tensor]:
        z = self.encoder(batch.view(2, 3, 4))
        z, _ = self.attend(z, z, z)
        return targets([head(z) for head in self.heads])


class ChannelsLast(Zoo):
    """Convolutions with in-place ReLU, in channels-last memory format."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), nn.Conv2d(3, 3, 2), nn.ReLU(inplace=True)
        )
        self.a, self.b = nn.Conv2d(3, 1, 2), nn.Conv2d(3, 2, 1)
        self.to(memory_format=torch.channels_last)

    def batch(self) -> Tensor:
        generator = torch.Generator().manual_seed(5)
        images = torch.randn(3, 2, 6, 6, generator=generator, dtype=self.dtype)
        return images.to(memory_format=torch.channels_last)

    def losses(self, batch: Tensor) -> list[Tensor]:
        z = self.trunk(batch)
        return targets([self.a(z), self.b(z)])


class Checkpointed(Plain):
    def losses(self, batch: Tensor) -> list[Tensor]:
        z = checkpoint(self.trunk, batch, use_reentrant=False)
        outputs = [checkpoint(head, z, use_reentrant=False) for head in self.heads]
        return targets(outputs)


class Autocast(Zoo):
    dtype = torch.float32
    tolerance = 1e-5
    rounding = 2e-2

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU())
        self.a, self.b = nn.Linear(8, 1), nn.Linear(8, 1)

    def losses(self, batch: Tensor) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            z = self.trunk(batch)
            outputs = [self.a(z), self.b(z)]
        return targets([o.float() for o in outputs])


class EarlyBranches(Zoo):
    n_tasks = 4

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(4))

    def losses(self, batch: Tensor) -> list[Tensor]:
        outputs = []
        for block, head in zip(self.blocks, self.heads, strict=True):
            batch = torch.tanh(block(batch))
            outputs.append(head(batch))
        return targets(outputs)


class HeadOnly(Plain):
    """The last loss reaches nothing but its own head."""

    def losses(self, batch: Tensor) -> list[Tensor]:
        return [*super().losses(batch)[:2], self.heads[2].weight.square().sum()]


class SingleTask(Plain):
    n_tasks = 1

    def losses(self, batch: Tensor) -> list[Tensor]:
        return super().losses(batch)[:1]


class BFloat16(Plain):
    dtype = torch.bfloat16
    tolerance = rounding = 1e-2


class MixedDtypes(Zoo):
    tolerance = rounding = 1e-5

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide = nn.Linear(4, 4), nn.Linear(4, 4)
        self.a, self.b = nn.Linear(4, 1), nn.Linear(4, 1)

    def to(self, *args: Any, **kwargs: Any) -> MixedDtypes:
        super().to(*args, **kwargs)
        self.narrow.float()
        self.a.float()
        return self

    def losses(self, batch: Tensor) -> list[Tensor]:
        z = torch.tanh(self.wide(self.narrow(batch.float()).double()))
        return targets([self.a(z.float()), self.b(z)])


class ScalarParameter(Zoo):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.temperature = nn.Parameter(torch.tensor(1.5))
        self.shift = nn.Parameter(torch.tensor(0.5))

    def losses(self, batch: Tensor) -> list[Tensor]:
        z = self.layer(batch) * self.temperature
        return targets([z, z * self.shift])


class LeafLoss(Zoo):
    """A loss that is a parameter itself."""

    def __init__(self) -> None:
        super().__init__()
        self.level = nn.Parameter(torch.tensor(1.5))
        self.layer = nn.Linear(4, 1)

    def losses(self, batch: Tensor) -> list[Tensor]:
        return [self.level, (self.layer(batch) - self.level).square().mean()]


class ChangingGraph(Zoo):
    """A layer is shared at even steps and one task's at odd ones, another the other way round."""

    n_tasks = 3

    def __init__(self) -> None:
        super().__init__()
        self.turn = 0
        self.trunk, self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(3))

    def losses(self, batch: Tensor) -> list[Tensor]:
        z = torch.tanh(self.trunk(batch))
        both, one = (self.left, self.right) if self.turn % 2 == 0 else (self.right, self.left)
        self.turn += 1
        y = both(z)
        return targets([self.heads[0](y), self.heads[1](y), self.heads[2](one(z))])


def trains_plainly(aggregator: str) -> bool:
    """Whether `backward(losses)` alone is what the method takes."""
    made = gradbal.create(aggregator)
    return not made.needs_features and gradbal.info(aggregator).kind != "closure"


METHODS = [
    name
    for name in gradbal.list_aggregators()
    if trains_plainly(name) and gradbal.info(name).promises.min_tasks <= 2
]
"""What any model with two losses can be trained with."""


def accepts(aggregator: str, *losses: float) -> bool:
    """Whether a method has weights for these losses."""
    made = gradbal.create(aggregator)
    try:
        if isinstance(made, gradbal.Scalarizer):
            made.loss_weights(torch.tensor(losses))
    except ValueError:
        return False
    return True


def takes(aggregator: str, **options: Any) -> bool:
    """Whether a method can serve these options of `MultiTaskOptimizer`."""
    made = gradbal.create(aggregator)
    if options.get("loss_transform") == "log" and (
        made.logarithmic or not accepts(aggregator, -1.0, 1.0)
    ):
        return False
    if isinstance(made, gradbal.JacobianAggregator):
        if options.get("heads") == "weighted" and not made.weighted:
            return False
        if options.get("update_every", 1) > 1 and not made.combines:
            return False
    return True


WITH_HEADS = [(m, h) for m in METHODS for h in ("own", "weighted") if takes(m, heads=h)]
"""Every method with every rule for heads that it can serve."""


def fits(aggregator: str, model: str, heads: str | None) -> bool:
    """Whether a method can train a model of the zoo with this rule for heads."""
    made = gradbal.create(aggregator)
    if model == "ChangingGraph" and getattr(made, "per_parameter_state", False):
        return False
    if model == "ChannelsLast" and made.category == "jacobian" and not made.promises.deterministic:
        # The reference has its columns in another order: the draws for them are not the same.
        return False
    return takes(aggregator, heads=heads) and ZOO[model].n_tasks >= made.promises.min_tasks


def keywords(aggregator: str) -> dict[str, Any]:
    """What makes a method draw the same random numbers, and take every task at every step."""
    known = gradbal.info(aggregator).hyperparameters
    chosen = {"generator": torch.Generator().manual_seed(11), "per_step": 99}
    return {k: v for k, v in chosen.items() if k in known}


def optimizer(model: nn.Module, aggregator: str, **options: Any) -> gradbal.MultiTaskOptimizer:
    """SGD under a method; every call draws the same random numbers."""
    sgd = torch.optim.SGD(model.parameters(), lr=0.01)
    return gradbal.MultiTaskOptimizer(sgd, aggregator, **keywords(aggregator) | options)
