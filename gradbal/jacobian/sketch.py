"""The Gramian from a short sketch of each row, where T rows do not fit into memory."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradbal.jacobian.engines import Found
from gradbal.jacobian.graph import (
    Absent,
    Reach,
    Root,
    check_dense,
    common_kind,
    hooks_held_back,
    reach_of,
    shared_indices,
)
from gradbal.jacobian.loop import Loop
from gradbal.jacobian.products import gramian

__all__ = ["SIZE", "Sketch", "Sketched"]

SIZE = 1 << 16
"""k, unless another one is asked for."""

_CHUNK = 1 << 18
"""Columns folded at a time on the host, where they stay in its cache."""

_CHUNK_ON_DEVICE = 1 << 21
"""The same on an accelerator, where fewer and larger operators are better."""

_GOLDEN = 0x9E3779B97F4A7C15
_WORD = 64


@dataclass(frozen=True)
class Sketched:
    """Sketches of T rows, and what has to be known besides.

    sketches: `[T, k]`, on the device; zero for tasks that sit out. extremes, shared, reach: as in
    `Found`.
    """

    sketches: Tensor
    extremes: Tensor
    shared: list[Tensor]
    reach: list[Reach | None] = field(default_factory=list)

    def signature(self) -> int:
        """A number that is another one, almost surely, where other parameters are reached."""
        return zlib.crc32(repr(self.reach).encode())

    def widen(self, reach: list[Reach | None]) -> None:
        """Sketches of other parameters cannot be made to match.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            'with jacobian="sketch" losses must reach the same parameters in all processes, found '
            'that they do not; use "loop"'
        )

    def found(self) -> Found:
        """The Gramian of the sketches, every product in float64."""
        return Found(gramian(self.sketches, exact=True), self.extremes, self.shared, self.reach)


@dataclass
class Sketch:
    """Estimates the Gramian from a linear sketch of each row; no more than one row is ever there.

    A row g `[P]` is cut into blocks of k columns. With random signs s, and for each block m a
    random shift r_m by which it is turned around,

        S(g)[b] = Σ_{m, q: q + r_m = b mod k} s_{mk+q} g_{mk+q}        `[k]`.

    `E⟨S(g), S(h)⟩ = ⟨g, h⟩`, and as two columns fall on each other with probability 1/k at most,
    `Var⟨S(g), S(h)⟩ ≤ (|g|²|h|² + ⟨g, h⟩²)/k` for any two rows. A cosine c comes out with a
    standard error of `(1 − c²)/√k`, at most 0.004 for k = 65,536, and is off by more than 3.5/√k
    once in two thousand times; a norm by a factor of `1 ± 1/√(2k)`. Where P ≤ k nothing falls on
    anything, and the Gramian is exact. Without shifts there is no such bound: in a layer whose
    width divides k all columns of one input meet, and on a trained transformer the errors were
    2.2/√k. `python -m benchmarks speed sketch` measures them, and what they do to directions.

    Errors are relative to `|Jᵀw|²` for every w, by about `√(2/k)`, since all rows have the same
    map: dependent rows have dependent sketches, and the smallest eigenvalue of a nearly singular
    Gramian is as accurate as the largest. Rounding ends that: float32 rows are summed in float32,
    which tells rows from dependent ones down to angles of 1e-6 or so, and nothing is computed
    again in float64.

    Signs and shifts are a function of seed, step and P alone, drawn from no generator: the same
    for all rows, on every device, and in a resumed run. They are fresh at every step. Then the
    estimate is unbiased also at parameters that earlier signs had a part in, and errors average
    out where gradients change slowly: over 60 steps of LeNet on one batch, at k = 4,096, the mean
    error of a cosine was 0.0019, and 0.0089 with fixed signs (with a new batch of 32 at every step
    0.0018 and 0.0020; `speed sketch --average 60`). They cost no more than folding one more row.

    The sketch is linear: the mean of several processes' sketches at the same step, of the same
    shared parameters, is the sketch of their mean rows. `sketch` gives `[T, k]` for that, and
    `Sketched.found` goes on from it.

    Args:
        size: k, at least 1.
        seed: of signs and shifts.
        engine: what takes the rows, one at a time.

    Attributes:
        step: the number of the step, which the caller counts.

    Example:
        >>> x = torch.ones(3, requires_grad=True)
        >>> roots = [(x.sum(), torch.tensor(1.0)), (2 * x[0], torch.tensor(1.0))]
        >>> Sketch().take(roots, [x], None, frozenset()).gramian
        tensor([[3., 2.],
                [2., 4.]], dtype=torch.float64)
    """

    size: int = SIZE
    seed: int = 0
    engine: Loop = field(default_factory=Loop)
    step: int = 0
    name: str = field(default="sketch", init=False)
    # Of the last step: its parameters, by identity, and what each loss reached.
    _seen: tuple[list[int], list[Reach | None]] | None = field(default=None, init=False, repr=False)

    def take(
        self,
        roots: Sequence[Root | Absent],
        parameters: Sequence[Tensor],
        shared_parameters: list[Tensor] | None,
        sit_out: frozenset[int],
        retain_graph: bool = True,
    ) -> Found:
        """An estimate of the Gramian of the shared parameters; the graph is kept.

        Args:
            roots: for each of T losses, where its backward pass starts and with which cotangent.
            parameters: n leaf tensors that require grad.
            shared_parameters: an explicit set of shared ones, or None to detect them.
            sit_out: tasks whose row and column are left zero.

        Raises:
            ValueError: no parameter is reached by two losses, shared parameters on two devices,
                or a sparse gradient.
        """
        return self.sketch(roots, parameters, shared_parameters, sit_out).found()

    def sketch(
        self,
        roots: Sequence[Root | Absent],
        parameters: Sequence[Tensor],
        shared_parameters: list[Tensor] | None,
        sit_out: frozenset[int],
    ) -> Sketched:
        """The sketches, for arguments as those of `take`; same seed, step and shared parameters
        give sketches that can be added."""
        parameters = list(parameters)
        known = [id(p) for p in parameters]
        if self._seen is not None and self._seen[0] == known and len(self._seen[1]) == len(roots):
            pairs = zip(roots, self._seen[1], strict=True)
            # Of a task that is absent, what is known by now.
            reach = [(isinstance(root, Absent) and root.reach) or seen for root, seen in pairs]
            sketched = self._fold(roots, parameters, shared_parameters, sit_out, reach, True)
            if sketched is not None:
                return sketched
        reach = reach_of(roots, parameters)
        sketched = self._fold(roots, parameters, shared_parameters, sit_out, reach, False)
        assert sketched is not None
        self._seen = known, reach
        return sketched

    def _fold(
        self,
        roots: Sequence[Root | Absent],
        parameters: list[Tensor],
        explicit: list[Tensor] | None,
        sit_out: frozenset[int],
        reach: list[Reach | None],
        remembered: bool,
    ) -> Sketched | None:
        """None where what is remembered of the graph turns out not to be so."""
        shared = shared_indices(parameters, reach, explicit)
        chosen = [parameters[k] for k in shared]
        others = sorted(set(range(len(parameters))).difference(shared))
        fold = _Fold(chosen, self.size, self.seed, self.step)
        sketches = fold.lanes.new_zeros(len(roots), fold.width)
        extremes = torch.zeros(len(roots), device=sketches.device)
        starts = {
            i: root
            for i, root in enumerate(roots)
            if i not in sit_out and not isinstance(root, Absent)
        }
        taken = self.engine.rows([*starts.values()], parameters, True)
        with hooks_held_back(parameters):
            for i in starts:
                # `zip` would hold on to one row while the next one is taken.
                grads = next(taken)
                check_dense(grads, parameters)
                if remembered and tuple(g is not None for g in grads) != reach[i]:
                    return None
                fold([grads[k] for k in shared], sketches[i])
                heads = [g for k in others if (g := grads[k]) is not None]
                if heads:
                    norms = torch._foreach_norm(heads, float("inf"))
                    extremes[i] = torch.stack([n.to(extremes) for n in norms]).amax()
                del grads, heads
        return Sketched(sketches, extremes, chosen, reach)


@dataclass
class _Chunk:
    """Some blocks of a row: which parts of which gradients they are, their columns in the buffer,
    the signs, the buffer by blocks, and the lane of each block."""

    pieces: list[tuple[int, int, int]]
    columns: Tensor
    signs: Tensor
    blocks: list[Tensor]
    targets: list[Tensor]


class _Fold:
    """The linear map from a row to its sketch, for one step.

    Blocks are added to lanes of width 2k, each from its own shift on, several at once; lanes are
    added up, and their halves, when the row is done.
    """

    def __init__(self, parameters: Sequence[Tensor], size: int, seed: int, step: int) -> None:
        device, dtype = common_kind(parameters)
        dtype = torch.promote_types(dtype, torch.float32)
        sizes = [p.numel() for p in parameters]
        total = sum(sizes)
        self.width = width = max(min(size, total), 1)
        n_blocks = -(-total // width)
        in_cache = _CHUNK if device.type == "cpu" else _CHUNK_ON_DEVICE
        n_lanes = max(1, min(n_blocks, in_cache // width))
        self.lanes = torch.zeros(n_lanes, 2 * width, dtype=dtype, device=device)
        self._zero = torch.zeros(1, dtype=dtype, device=device)
        # Turning all blocks alike changes nothing: the first one stays, and P ≤ k is a copy.
        shifts = _words(_key(seed, step, 1), n_blocks).remainder(width).tolist()
        shifts[:1] = [0] * min(1, n_blocks)
        buffer = torch.empty(min(n_lanes * width, total), dtype=dtype, device=device)
        signs = _signs(_key(seed, step, 0), total, device)
        blocks, lanes = list(torch.split(buffer, width)), self.lanes.unbind()
        self._chunks = []
        for start in range(0, total, n_lanes * width):
            end = min(start + n_lanes * width, total)
            if end - start < len(buffer):
                blocks = list(torch.split(buffer[: end - start], width))
            first = start // width
            targets = [
                lane.narrow(0, shift, len(block))
                for lane, shift, block in zip(lanes, shifts[first:], blocks, strict=False)
            ]
            self._chunks.append(
                _Chunk(
                    _pieces(sizes, start, end),
                    buffer[: end - start],
                    signs[start:end],
                    blocks,
                    targets,
                )
            )

    def __call__(self, grads: Sequence[Tensor | None], into: Tensor) -> None:
        """Writes the sketch of a row, given as the gradients of the parameters, None for zeros.

        Columns are in the order of a tensor's indices, whatever its strides are.
        """
        flat = [None if g is None else g.reshape(-1) for g in grads]
        self.lanes.zero_()
        for chunk in self._chunks:
            parts = []
            for k, begin, end in chunk.pieces:
                g = flat[k]
                parts.append(self._zero.expand(end - begin) if g is None else g[begin:end])
            torch.cat(parts, out=chunk.columns)
            chunk.columns.mul_(chunk.signs)
            torch._foreach_add_(chunk.targets, chunk.blocks)
        total = self.lanes.sum(0)
        torch.add(total[: self.width], total[self.width :], out=into)


def _pieces(sizes: Sequence[int], start: int, end: int) -> list[tuple[int, int, int]]:
    """What parts of tensors of these sizes lie in columns start to end: index, begin, end."""
    result, offset = [], 0
    for k, size in enumerate(sizes):
        begin, stop = max(start - offset, 0), min(end - offset, size)
        if begin < stop:
            result.append((k, begin, stop))
        offset += size
    return result


def _signs(key: int, count: int, device: torch.device) -> Tensor:
    """`[count]`, int8, ±1."""
    octets = _words(key, -(-count // _WORD), device).view(torch.uint8)
    places = torch.arange(8, dtype=torch.uint8, device=device)
    bits = (octets >> places[:, None]).bitwise_and_(1).view(torch.int8)
    return bits.mul_(2).sub_(1).view(-1)[:count]


def _key(seed: int, step: int, purpose: int) -> int:
    """Where a stream of random words starts."""
    key = 0
    for number in (seed, step, purpose):
        key = _mixed((key + number + _GOLDEN) % (1 << 64))
    return key


def _mixed(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % (1 << 64)
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % (1 << 64)
    return z ^ (z >> 31)


def _words(key: int, count: int, device: torch.device | None = None) -> Tensor:
    """`[count]`, int64: the numbers of *Fast Splittable Pseudorandom Number Generators* (Steele,
    Lea & Flood, OOPSLA 2014, https://doi.org/10.1145/2660193.2660195), by integer arithmetic, which
    is the same on all devices."""
    z = torch.arange(1, count + 1, dtype=torch.int64, device=device)
    z = z.mul_(_signed(_GOLDEN)).add_(_signed(key))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = z.bitwise_xor_(_shifted(z, shift)).mul_(_signed(factor))
    return z.bitwise_xor_(_shifted(z, 31))


def _shifted(z: Tensor, by: int) -> Tensor:
    """To the right, as if there were no sign."""
    return (z >> by).bitwise_and_((1 << (64 - by)) - 1)


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number
