"""Gradient sign dropout."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Generator, Tensor

from gradbal.aggregators._arguments import in_range, one_of, preference
from gradbal.aggregators._mixins import RandomMixin
from gradbal.aggregators.base import JacobianAggregator
from gradbal.jacobian import CHUNK
from gradbal.registry import Promises, register

__all__ = ["GradDrop", "graddrop", "graddrop_features"]

Leak = float | Sequence[float]
Curve = Callable[[Tensor], Tensor]


@register(
    "graddrop",
    title="Just Pick a Sign: Optimizing Deep Multitask Models with Gradient Sign Dropout",
    venue="NeurIPS",
    year=2020,
    url="https://arxiv.org/abs/2010.06808",
    promises=Promises(heads="own", degree=1, gain=lambda a, t, n: float(t), deterministic=False),
)
class GradDrop(RandomMixin, JacobianAggregator):
    """In every coordinate the sum of the positive or of the negative parts, picked at random.

    Chen et al., "Just Pick a Sign: Optimizing Deep Multitask Models with Gradient Sign Dropout",
    NeurIPS 2020, https://arxiv.org/abs/2010.06808. With the purity
    `P_k = ½(1 + Σ_i g_ik / Σ_i |g_ik|)` of coordinate k and one uniform U_k for all tasks, the
    positive entries stay if `f(P_k) > U_k`, else the negative ones: `M_ik` is 1 for those that stay
    and 0 for the others, and `d_k = Σ_i (λ_i + (1 − λ_i) M_ik) g_ik`. With λ = 0 and f the
    identity `E[d] = Σ g_i`.

    On features z, with the gradients A_i of the losses by z, U and M come from
    `h_i = Σ sign(z) ⊙ A_i`, summed over the batch, in place of g_i: one mask for a position of the
    features, the same for the whole batch. `Σ_i (λ_i + (1 − λ_i) M_i) ⊙ A_i` then goes on from z
    through the trunk.

    Args:
        leak: λ in [0, 1], one number or one for each task: the share of a gradient that is never
            dropped. 0 is the paper's, 1 the sum.
        on: "parameters", or "features" (the paper), which needs `backward(losses, features=z)` with
            z of shape `[B, ...]`.
        f: takes a tensor of purities and returns one of the same shape, entry by entry: increasing,
            into [0, 1]. None is the identity. It is not part of a checkpoint.
        generator: a CPU generator; None makes one seeded from `torch.initial_seed()`.

    Raises:
        ValueError: `leak` is not in [0, 1], or has not one entry for each task; an unknown `on`; f
            leaves [0, 1] or falls; a generator that is not on the CPU.

    Note:
        Most published code works on parameters, as the default here; some of it takes the mean and
        multiplies it by T. One takes the purity over all coordinates together and the leak the
        other way round; one gives NaN where a column is zero, which here gives zero. Features
        without a sign, as those of a layer that starts at zero, have h = 0 for all tasks: nothing
        is dropped there, while the paper's M would drop all of it and leave the layer as it is.

        U and P do not depend on the dtype, so that all dtypes make the same choices. On an
        accelerator U is drawn there, by a generator that gets its seed from this one at every
        step: the choices on another kind of device differ.

    Example:
        >>> import torch
        >>> d = GradDrop().direction(torch.tensor([[1.0, 2.0], [3.0, -5.0]]))
        >>> (float(d[0]), float(d[1]) in (2.0, -5.0))
        (4.0, True)
    """

    per_task_state = True
    state_names = ("generator",)
    unsaved = ("f", "generator")

    def __init__(
        self,
        leak: float | Sequence[float] = 0.0,
        on: str = "parameters",
        f: Curve | None = None,
        generator: Generator | None = None,
    ) -> None:
        self.leak = _checked_leak(leak)
        one_of("on", on, ("parameters", "features"))
        _check_curve(f)
        self.on = on
        self.f = f
        self._own(generator)

    @property
    def needs_features(self) -> bool:
        """Whether it works on gradients at a representation, `backward(losses, features=z)`."""
        return self.on == "features"

    def prepare(self, n_tasks: int, like: Tensor) -> None:
        """Checks that `leak` has T entries, unless it is a number.

        Raises:
            ValueError: it has not.
        """
        if isinstance(self.leak, list):
            preference("leak", self.leak, n_tasks, 0.0)

    def direction(
        self,
        jacobian: Tensor,
        losses: Tensor | None = None,
        tasks: Sequence[int] | None = None,
        features: Tensor | None = None,
    ) -> Tensor:
        """`d [P]` from the Jacobian `[T, P]`.

        Args:
            jacobian: `[T, P]`, or `[k, P]` when `tasks` names the k tasks that take part.
            losses: not used.
            tasks: indices of the tasks that take part; None for all.
            features: `z [B, ...]` with P entries, for `on="features"`; else None.

        Raises:
            ValueError: `leak` has not one entry for each task; features that are missing, not
                wanted, or of another size.
        """
        leak = self.leak
        if tasks is None:
            self.prepare(len(jacobian), jacobian)
        elif isinstance(leak, list):
            leak = [leak[i] for i in tasks]
        if not self.needs_features:
            if features is not None:
                raise ValueError("`features` must be None for on='parameters', found a tensor")
            return graddrop(jacobian, self._uniform(jacobian[0]), leak, self.f)
        width = jacobian.shape[1]
        if features is None or features.dim() == 0 or features.numel() != width:
            found = "none" if features is None else f"shape {list(features.shape)}"
            raise ValueError(
                f"`features` must have shape [B, ...] and {width} entries for on='features', "
                f"found {found}"
            )
        z = features.detach().reshape(len(features), -1)
        gradients = jacobian.view(len(jacobian), *z.shape)
        return graddrop_features(gradients, z, self._uniform(z[0]), leak, self.f).flatten()

    def _uniform(self, like: Tensor) -> Tensor:
        """U, float32, of the size and on the device of a vector."""
        generator, device = self.generator, like.device
        if device.type != "cpu":
            # One number goes to the device in place of a copy of all of them.
            seed = int(torch.randint(2**63 - 1, (), device="cpu", generator=generator))
            generator = Generator(device).manual_seed(seed)
        width = len(like) if self.columns is None else self.columns.width
        u = torch.rand(width, dtype=torch.float32, device=device, generator=generator)
        return u if self.columns is None else self.columns.own(u)


def graddrop(jacobian: Tensor, u: Tensor, leak: Leak = 0.0, f: Curve | None = None) -> Tensor:
    """`d_k = Σ_i (λ_i + (1 − λ_i) M_ik) g_ik`.

    Args:
        jacobian: `[T, P]`.
        u: `[P]`, in [0, 1), on the same device; the same for all tasks.
        leak: λ, one number or T.
        f: see `GradDrop`.

    Returns:
        `d [P]`, dtype and device of the Jacobian, summed in float64.
    """
    pieces = []
    chunks = (torch.split(x, CHUNK, -1) for x in (jacobian.detach(), u))
    for rows, drawn in zip(*chunks, strict=True):
        up, down = _parts(rows)
        # λ ≥ 0, so that the parts of λ_i g_i are λ_i times those of g_i.
        leaked = (leak * up, leak * down) if isinstance(leak, float | int) else _parts(rows, leak)
        keeps_up = _keeps_up(up, down, drawn, f)
        d = torch.where(keeps_up, up + leaked[1], leaked[0] + down)
        pieces.append(d.to(jacobian.dtype))
    return torch.cat(pieces)


def graddrop_features(
    gradients: Tensor, z: Tensor, u: Tensor, leak: Leak = 0.0, f: Curve | None = None
) -> Tensor:
    """`Σ_i (λ_i + (1 − λ_i) M_i) ⊙ A_i`, with M from `h_i = Σ_batch sign(z) ⊙ A_i`.

    Args:
        gradients: A, `[T, B, F]`.
        z: `[B, F]`.
        u: `[F]`, in [0, 1), on the same device; the same for all tasks.
        leak: λ, one number or T.
        f: see `GradDrop`.

    Returns:
        `[B, F]`, dtype and device of the gradients. Half-precision rows are added in float32.
    """
    gradients = gradients.detach()
    sign = z.sign().to(gradients.dtype)
    h = torch.stack([(sign * a).sum(0, dtype=torch.float64) for a in gradients])
    up, down = _parts(h)
    stays = torch.where(_keeps_up(up, down, u, f), h > 0.0, h < 0.0) | (up == down)
    wide = torch.promote_types(gradients.dtype, torch.float32)
    total = torch.zeros(z.shape, dtype=wide, device=gradients.device)
    leaks = [leak] * len(h) if isinstance(leak, float | int) else leak
    for a, kept, share in zip(gradients, stays, leaks, strict=True):
        total.add_(a * torch.where(kept, 1.0, float(share)).to(wide))
    return total.to(gradients.dtype)


def _parts(rows: Tensor, factors: Iterable[float] | None = None) -> tuple[Tensor, Tensor]:
    """`Σ λ_i max(g_i, 0)` and `Σ λ_i min(g_i, 0)`, float64; one row at a time, to save memory."""
    up = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    down = torch.zeros_like(up)
    for row, factor in zip(rows, [1.0] * len(rows) if factors is None else factors, strict=True):
        up.add_(row.clamp(min=0.0), alpha=factor)
        down.add_(row.clamp(max=0.0), alpha=factor)
    return up, down


def _keeps_up(up: Tensor, down: Tensor, u: Tensor, f: Curve | None) -> Tensor:
    """Where the positive parts stay, from the sums of both."""
    absolute = up - down
    purity = 0.5 * (1.0 + (up + down) / absolute.masked_fill(absolute == 0.0, 1.0))
    return (purity if f is None else f(purity)) > u


def _checked_leak(leak: float | Sequence[float]) -> float | list[float]:
    if isinstance(leak, int | float):
        in_range("leak", leak, 0, 1)
        return leak
    found: list[float] = preference("leak", leak, None, 0.0).tolist()
    if not all(x <= 1.0 for x in found):
        raise ValueError(f"`leak` must be in [0, 1], found {found}")
    return found


def _check_curve(f: Curve | None) -> None:
    if f is None:
        return
    if not callable(f):
        raise TypeError(f"`f` must be a function or None, found {f!r}")
    values = f(torch.linspace(0.0, 1.0, 101, dtype=torch.float64))
    if not isinstance(values, Tensor) or values.shape != (101,):
        raise ValueError(
            "`f` must return a tensor of the shape that it takes, found "
            + (f"{list(values.shape)} for [101]" if isinstance(values, Tensor) else repr(values))
        )
    if not bool(((values >= 0) & (values <= 1)).all() & (values.diff() >= 0).all()):
        raise ValueError("`f` must be increasing from [0, 1] into [0, 1], found one that is not")
