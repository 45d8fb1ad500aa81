"""What is run: the settings of the papers, and the methods with what they need there."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

import gradbal
from benchmarks.toy.problem import Toy

__all__ = ["SETTINGS", "Contestant", "Setting", "contestants", "unsuited"]

Point = tuple[float, float]


@dataclass(frozen=True)
class Contestant:
    """A method as it is run.

    Attributes:
        label: its name in the table.
        method: its name in the registry.
        options: what differs from its defaults.
        clip: the length that d is cut to, or None.
    """

    label: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    clip: float | None = None

    def create(self, start: int) -> gradbal.Aggregator:
        """The aggregator of one trajectory, with random numbers of its own.

        Args:
            start: the number of the starting point, which is the seed.
        """
        options = dict(self.options)
        if "generator" in inspect.signature(gradbal.info(self.method).cls).parameters:
            options["generator"] = torch.Generator().manual_seed(start)
        return gradbal.create(self.method, **options)


@dataclass(frozen=True)
class Setting:
    """One paper's way to run the toy, with Adam.

    Attributes:
        name: what `--setting` takes.
        summary: where it is from.
        scale: of the first loss.
        starts: the starting points.
        steps, quick_steps: how many, and how many for a look.
        learning_rate: of the point.
        own: of what methods learn themselves.
        cagrad: c of CAGrad.
    """

    name: str
    summary: str
    scale: float
    starts: tuple[Point, ...]
    steps: int
    quick_steps: int = 2_000
    learning_rate: float = 1e-3
    own: float = 0.025
    cagrad: float = 0.4

    @cached_property
    def toy(self) -> Toy:
        """The problem."""
        return Toy(self.scale)


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting(
            "nash_famo",
            "as in Nash-MTL's and FAMO's code, L1 scaled by 0.1",
            scale=0.1,
            starts=((-8.5, 7.5), (0.0, 0.0), (9.0, 9.0), (-7.5, -0.5), (9.0, -1.0)),
            steps=50_000,
        ),
        Setting(
            "cagrad",
            "as in CAGrad's code, not scaled",
            scale=1.0,
            starts=((-8.5, 7.5), (-8.5, -5.0), (9.0, 9.0)),
            steps=100_000,
            cagrad=0.5,
        ),
    )
}

_LEARNED = ("uw", "imtl_l", "imtl", "gradnorm")
"""Methods whose own weights have a learning rate `lr`, besides FAMO."""

_CLIPPED = {"pcgrad": 1.0, "cagrad": 0.5, "graddrop": 1.0}
"""Methods whose direction FAMO's code cuts to length 1. Its CAGrad has twice this direction."""


def contestants(setting: Setting) -> list[Contestant]:
    """Every registered method, and those that FAMO's code clips once more with the clip."""
    found = []
    for method in gradbal.list_aggregators():
        options: dict[str, Any] = {}
        if method in _LEARNED:
            options = {"lr": setting.own}
        elif method == "famo":
            # Just below the least values of both losses.
            bounds = [-21.0 * setting.scale, -21.0]
            options = {"lr": setting.own, "gamma": 0.0, "min_losses": bounds}
        elif method == "cagrad":
            options = {"c": setting.cagrad}
        elif method == "dwa":
            # As the official toy averages the losses.
            options = {"window": 25}
        elif method == "forum":
            # An epoch: there is none in the toy.
            options = {"window": 500}
        elif method == "stch":
            options = {"warmup_steps": 500}
        found.append(Contestant(method, method, options))
        if method in _CLIPPED:
            found.append(Contestant(f"{method}+clip", method, options, _CLIPPED[method]))
    return found


def unsuited(contestant: Contestant) -> str | None:
    """Why the method cannot run on the toy at all, or None."""
    if contestant.create(0).needs_features:
        plain = contestant.method.removesuffix("_ub")
        return f"works at a representation, which a point of the plane has not; here it is {plain}"
    return None
