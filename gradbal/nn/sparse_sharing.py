"""Sparse sharing: one network, and for each task a mask of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import is_lazy

from gradbal.aggregators._arguments import in_range, integer
from gradbal.nn._base import MultiTaskModel
from gradbal.nn._names import check_known, module_key
from gradbal.nn._stages import Factory, copies, run

__all__ = ["Candidate", "SparseSharing", "find_masks"]


class SparseSharing(MultiTaskModel):
    """One encoder, and for each task a subnetwork of it by a binary mask.

    "Learning Sparse Sharing Architectures for Multiple Tasks", AAAI 2020,
    https://arxiv.org/abs/1911.05034. With the encoder E and its parameters θ,

        y_t = h_t(E(x; M_t ⊙ θ)),    M_t ∈ {0, 1}.

    Masks begin as ones, which is hard parameter sharing, and are found for each task alone by
    iterative magnitude pruning from the same initial state, `find_masks`; then all tasks are
    trained together, each with its mask. An entry of θ that a task's mask leaves out gets a
    gradient of exactly zero from that task. Buffers of the encoder, such as BatchNorm's running
    statistics, are there once for each task, as its subnetwork has activations of its own.

    A tensor of θ is shared if the masks of two tasks or more have an entry of it each, the same or
    not, or if no mask has one; it is a task's own if only that task's mask does. Heads are the
    tasks' own.

    Shapes: what E and the heads make of x; a mask has the shape of its parameter.

    Args:
        tasks: names, in the order of the outputs.
        encoder: function that returns the encoder E; called once.
        heads: task → module h_t.
        prunable: whether a parameter of the encoder, given with its name, has masks; None for all
            of two dimensions or more, so that biases and norms are whole, as in the authors' code.
        example: a batch; if given, the model is tried with it (in eval mode, without gradients),
            so that parts that do not fit are found at once. Lazy modules need it.

    Raises:
        TypeError: `encoder` is a module and no function, or something is not of its type.
        ValueError: tasks and heads differ, no parameter is prunable, parts do not fit, or lazy
            modules without an example.

    Note:
        E runs once for each task: T times the cost of hard parameter sharing.

        The initial state, on the CPU, and the masks are part of `state_dict`, so that a search goes
        on after a load.

    Example:
        >>> model = SparseSharing(
        ...     tasks=["age", "income"],
        ...     encoder=lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU()),
        ...     heads={"age": nn.Linear(8, 1), "income": nn.Linear(8, 2)},
        ... )
        >>> model.prune("age", 0.25)
        >>> model.sparsity("age"), model.sparsity("income")
        (0.25, 0.0)
        >>> int(model.masks["age"]["0.weight"].sum())
        24
    """

    def __init__(
        self,
        tasks: Sequence[str],
        encoder: Factory,
        heads: Mapping[str, nn.Module],
        *,
        prunable: Callable[[str, nn.Parameter], bool] | None = None,
        example: Any = None,
    ) -> None:
        super().__init__(tasks, heads)
        (self.encoder,) = copies(encoder, 1)
        self._initialize_lazy(example)
        chosen = _weights if prunable is None else prunable
        ones = {
            name: torch.ones_like(p, dtype=torch.bool)
            for name, p in self.encoder.named_parameters()
            if chosen(name, p)
        }
        if not ones:
            raise ValueError(
                "`prunable` must hold for at least one parameter of the encoder, found none "
                f"among {[name for name, _ in self.encoder.named_parameters()]}"
            )
        saved = self.encoder.state_dict()
        buffers = dict(self.encoder.named_buffers())
        self.task_masks = nn.ModuleDict({module_key(t): _Tensors(ones) for t in self.tasks})
        self.register_load_state_dict_post_hook(_loaded)  # type: ignore[no-untyped-call]
        self._look()
        self.task_buffers = nn.ModuleDict(
            {module_key(t): _Tensors(buffers, saved) for t in self.tasks}
        )
        self._complete(example)
        self.remember()

    def _initialize_lazy(self, example: Any) -> None:
        """Masks and the initial state take parameters that have shapes."""
        if not any(is_lazy(p) for p in self.parameters()):
            return
        if example is None:
            raise ValueError(
                "`example` must be given, a batch, where there are lazy modules, whose parameters "
                "have no shapes yet that masks could have"
            )
        with self._trial():
            run(self.encoder, example, "the encoder")

    @property
    def masks(self) -> dict[str, dict[str, Tensor]]:
        """Task → name of the encoder's parameter → its mask, bool, to read: see `set_masks`."""
        return {task: _tensors(self.task_masks, task) for task in self.tasks}

    @torch.no_grad()
    def set_masks(self, task: str, masks: Mapping[str, Tensor]) -> None:
        """Gives a task other masks.

        Args:
            task: whose.
            masks: name of the encoder's parameter → bool, of its shape; the others stay.

        Raises:
            ValueError: an unknown task, no prunable parameter's name, or another shape or type.
        """
        found = self.masks[check_known(task, self.tasks)]
        for name, mask in masks.items():
            wanted = found[check_known(name, found, "a key of `masks`")]
            if mask.shape != wanted.shape or mask.dtype != torch.bool:
                raise ValueError(
                    f"the mask of {name!r} must be bool of shape {list(wanted.shape)}, found "
                    f"{mask.dtype} of shape {list(mask.shape)}"
                )
        for name, mask in masks.items():
            found[name].copy_(mask)
        self._look()

    def _look(self) -> None:
        """Notes whose masks have an entry of which tensors, once, as the device has to be asked."""
        self._users = {
            name: {task for task, masks in self.masks.items() if bool(masks[name].any())}
            for name in self.masks[self.tasks[0]]
        }

    def _own(self, task: str) -> list[str]:
        own = super()._own(task)
        if len(self.tasks) == 1:
            return own  # As everywhere, the encoder of a single task counts as shared.
        return own + [f"encoder.{name}" for name, users in self._users.items() if users == {task}]

    def _features(self, x: Any, tasks: Sequence[str]) -> dict[str, Tensor]:
        parameters = dict(self.encoder.named_parameters())
        found = {}
        for task in tasks:
            masked = {
                name: _masked(parameters[name], mask, used=task in self._users[name])
                for name, mask in _tensors(self.task_masks, task).items()
            }
            state = {**masked, **_tensors(self.task_buffers, task)}
            encoder = partial(functional_call, self.encoder, state)
            found[task] = run(encoder, x, f"the encoder with the mask of task {task!r}")
        return found

    def sparsity(self, task: str) -> float:
        """The part of the entries of prunable parameters that this task's mask leaves out.

        Raises:
            ValueError: an unknown task.
        """
        masks = self.masks[check_known(task, self.tasks)].values()
        left = sum(int(mask.sum()) for mask in masks)
        return 1 - left / sum(mask.numel() for mask in masks)

    def overlap(self) -> float:
        """Entries that all masks have over those that any has: the paper's overlap ratio."""
        flat = torch.stack(
            [torch.cat([m.flatten() for m in masks.values()]) for masks in self.masks.values()]
        )
        return int(flat.all(0).sum()) / max(1, int(flat.any(0).sum()))

    @torch.no_grad()
    def prune(self, task: str, fraction: float) -> None:
        """Takes from a task's mask the smallest of the entries that it has left.

        The entries of all prunable parameters are compared by magnitude, and
        ``round(fraction * left)`` of them go, exactly.

        Args:
            task: whose mask.
            fraction: of the entries left, in (0, 1).

        Raises:
            TypeError: `fraction` is not a number.
            ValueError: an unknown task, or a fraction out of range.
        """
        in_range("fraction", fraction, 0, 1, bounds="()")
        parameters = dict(self.encoder.named_parameters())
        masks = self.masks[check_known(task, self.tasks)]
        places = torch.cat([mask.flatten() for mask in masks.values()]).nonzero()[:, 0]
        values = torch.cat([parameters[name].flatten().abs() for name in masks])[places]
        # A threshold would take more where magnitudes are equal.
        smallest = values.topk(round(fraction * len(values)), largest=False).indices
        gone = places[smallest]
        left = torch.cat([mask.flatten() for mask in masks.values()])
        left[gone] = False
        parts = torch.split(left, [mask.numel() for mask in masks.values()])
        self.set_masks(
            task, {name: part.view_as(masks[name]) for name, part in zip(masks, parts, strict=True)}
        )

    def remember(self) -> None:
        """Makes the state of now the one that `rewind` goes back to.

        To be called once weights are loaded into the model, or after a few steps of training all
        tasks together, which the paper calls multi-task warm-up.
        """
        self._initial = {
            name: tensor.detach().to("cpu", copy=True) for name, tensor in self._state().items()
        }

    @torch.no_grad()
    def rewind(self) -> None:
        """Puts parameters and buffers back to the initial state; masks stay."""
        for name, tensor in self._state().items():
            tensor.copy_(self._initial[name])

    def _state(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = dict(self.named_parameters())
        state |= {
            n: b for n, b in self.named_buffers() if n.startswith(("task_buffers.", "heads."))
        }
        return state

    def get_extra_state(self) -> dict[str, Tensor]:
        """The initial state; no buffer, which would lie on the device and be sent around by DDP."""
        return dict(self._initial)

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        """Takes over the initial state.

        Raises:
            ValueError: it is that of another model.
        """
        shapes = {name: tensor.shape for name, tensor in self._state().items()}
        if {name: tensor.shape for name, tensor in state.items()} != shapes:
            raise ValueError("the initial state must be that of a model like this one")
        self._initial = {name: tensor.to("cpu", copy=True) for name, tensor in state.items()}


@dataclass(frozen=True)
class Candidate:
    """A mask that `find_masks` has tried: the part left out, and its score."""

    sparsity: float
    score: float


def find_masks(
    model: SparseSharing,
    train_one_task: Callable[[SparseSharing, str], object],
    *,
    rounds: int,
    fraction: float,
    evaluate: Callable[[SparseSharing, str], float] | None = None,
) -> dict[str, list[Candidate]]:
    """Finds each task's mask by iterative magnitude pruning.

    "Learning Sparse Sharing Architectures for Multiple Tasks", AAAI 2020,
    https://arxiv.org/abs/1911.05034, algorithm 1, with the pruning of "The Lottery Ticket
    Hypothesis", ICLR 2019, https://arxiv.org/abs/1803.03635. For each task alone, from ones:
    train, take the smallest entries from the mask, go back to the initial state, and again. With
    `evaluate` the mask with the best score is taken, the sparser one of equals, the mask of ones
    included; without, the last. At the end the model is in its initial state, with the masks.

    Args:
        model: its masks are replaced.
        train_one_task: ``train_one_task(model, task)`` trains the model on this task, with an
            optimizer of its own and ``model(x, task=task)``.
        rounds: of pruning, at least 1.
        fraction: of the entries left that each round takes, in (0, 1).
        evaluate: ``evaluate(model, task)``, a score on validation data; higher is better. With it
            the last mask is trained as well.

    Returns:
        For each task the candidates with their scores; empty lists without `evaluate`.

    Raises:
        TypeError, ValueError: an argument out of its range, or a score that is NaN.

    Example:
        >>> model = SparseSharing(
        ...     ["a", "b"], lambda: nn.Linear(4, 8), {"a": nn.Linear(8, 1), "b": nn.Linear(8, 1)}
        ... )
        >>> def train_one_task(model: SparseSharing, task: str) -> None:
        ...     optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ...     model(torch.ones(2, 4), task=task).square().mean().backward()
        ...     optimizer.step()
        >>> _ = find_masks(model, train_one_task, rounds=2, fraction=0.5)
        >>> model.sparsity("a"), model.sparsity("b")
        (0.75, 0.75)
    """
    integer("rounds", rounds, 1)
    in_range("fraction", fraction, 0, 1, bounds="()")
    found: dict[str, list[Candidate]] = {}
    for task, masks in model.masks.items():
        model.set_masks(task, {name: torch.ones_like(mask) for name, mask in masks.items()})
        candidates = []
        best: tuple[float, dict[str, Tensor]] = (-math.inf, {})
        for done in range(rounds + 1):
            if done < rounds or evaluate is not None:
                model.rewind()
                train_one_task(model, task)
            if evaluate is not None:
                score = float(evaluate(model, task))
                if math.isnan(score):
                    raise ValueError(f"`evaluate` must return a number, found nan for {task!r}")
                candidates.append(Candidate(model.sparsity(task), score))
                if score >= best[0]:
                    best = (score, {name: mask.clone() for name, mask in masks.items()})
            if done < rounds:
                model.prune(task, fraction)
        model.set_masks(task, best[1])
        found[task] = candidates
    model.rewind()
    return found


class _Tensors(nn.Module):
    """Tensors by the names of an encoder, as buffers.

    Args:
        tensors: copied.
        saved: names of those that `state_dict` has; None for all.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], saved: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.keys = {name: module_key(name) for name in tensors}
        for name, tensor in tensors.items():
            persistent = saved is None or name in saved
            self.register_buffer(self.keys[name], tensor.clone(), persistent=persistent)

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, key) for name, key in self.keys.items()}


def _tensors(modules: nn.ModuleDict, task: str) -> dict[str, Tensor]:
    found = modules[module_key(task)]
    assert isinstance(found, _Tensors)
    return found.tensors()


def _loaded(model: SparseSharing, keys: Any) -> None:
    model._look()


def _masked(parameter: Tensor, mask: Tensor, *, used: bool) -> Tensor:
    """A parameter as a task has it; where its mask has nothing, not even connected with it."""
    if not used:
        return torch.zeros_like(parameter)
    # Not a product, where infinite entries and gradients would come through as NaN.
    return torch.where(mask, parameter, 0.0)


def _weights(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim >= 2
