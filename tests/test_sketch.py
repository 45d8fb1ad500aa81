"""`jacobian="sketch"`: the estimate, what it costs, and what it refuses."""

from __future__ import annotations

import copy
import io
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode

import gradbal
from benchmarks.accelerator import Accelerator
from gradbal import MultiTaskOptimizer, NonFiniteError
from gradbal.jacobian import Root, Sketch, Sketched
from gradbal.jacobian.sketch import SIZE, _words
from tests.gradients import jacobian, shared_names, task_gradients
from tests.states import assert_same, fresh, root_at_zero, snapshot
from tests.zoo import make, optimizer


def _roots(losses: Sequence[Tensor]) -> list[Root]:
    return [(l, torch.ones_like(l)) for l in losses]


def sketched(rows: Tensor, size: int, seed: int = 0, step: int = 0) -> Tensor:
    """`[T, k]`, of losses that have the given rows `[T, P]` as gradients."""
    x = torch.zeros(rows.shape[1], dtype=rows.dtype, requires_grad=True)
    engine = Sketch(size, seed)
    engine.step = step
    return engine.sketch(_roots([row @ x for row in rows]), [x], None, frozenset()).sketches


def normal(*shape: int, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def correlated(n_columns: int, cosine: float) -> Tensor:
    """Two rows, of norms 1 and 10, with that cosine exactly."""
    q = torch.linalg.qr(normal(n_columns, 2))[0].mT
    return torch.stack([q[0], 10 * (cosine * q[0] + math.sqrt(1 - cosine**2) * q[1])])


def cosines(g: Tensor) -> Tensor:
    n = g.diagonal().sqrt()
    return g / n / n[:, None]


# The estimate.


def test_random_words_are_those_of_splitmix64() -> None:
    # Published for the seeds 0 and 1234567.
    known = {
        0: [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F],
        1234567: [6457827717110365317, 3203168211198807973, 9817491932198370423],
    }
    for seed, words in known.items():
        assert [w % (1 << 64) for w in _words(seed, 3).tolist()] == words


@pytest.mark.parametrize("size", [8, 100])
def test_the_gramian_is_unbiased(size: int) -> None:
    rows = torch.cat([correlated(500, 0.6), normal(1, 500)])
    exact = rows @ rows.mT
    squares = exact.diagonal()
    for n in (100, 900):
        found = torch.stack([s @ s.mT for s in (sketched(rows, size, seed) for seed in range(n))])
        # From the bound for random shifts: no pair within a block of columns meets.
        deviation = ((squares * squares[:, None] + exact**2) / size * (1 - size / 500)).sqrt()
        apart = (found.mean(0) - exact).abs() / deviation
        assert apart.max() < 4 / math.sqrt(n)
        assert apart.max() > 0
        assert ((found - exact).std(0) / deviation).max() < 1.25


@pytest.mark.parametrize("cosine", [0.0, 0.3, -0.8])
def test_the_error_of_a_cosine(cosine: float) -> None:
    size, n = 256, 800
    rows = correlated(8192, cosine)
    found = torch.stack([s @ s.mT for s in (sketched(rows, size, seed) for seed in range(n))])
    errors = torch.stack([cosines(g)[0, 1] for g in found]) - cosine
    # A standard deviation of 800 values is known to 2.5%, and P/k = 32.
    assert errors.std() * math.sqrt(size) == pytest.approx(1 - cosine**2, rel=0.08)
    assert (errors.abs() > 3.5 / math.sqrt(size)).sum() <= 3
    norms = found[:, 0, 0].sqrt() - 1
    assert norms.std() * math.sqrt(2 * size) == pytest.approx(1, rel=0.08)


def test_columns_at_a_distance_of_the_size_are_told_apart() -> None:
    """As in a layer whose width divides k. Without shifts, three columns would be all that is left,
    with errors of about 0.4."""
    size = 256
    rows = torch.zeros(2, 100 * size, dtype=torch.float64)
    rows[:, ::size] = normal(2, 100)
    exact = cosines(rows @ rows.mT)[0, 1]
    found = [sketched(rows, size, seed) for seed in range(400)]
    errors = torch.stack([cosines(s @ s.mT)[0, 1] for s in found]) - exact
    assert errors.std() * math.sqrt(size) == pytest.approx(float(1 - exact**2), rel=0.15)


@pytest.mark.parametrize("n_columns", [1, 63, 64, 300, 512])
def test_a_row_that_is_not_longer_is_copied_with_signs(n_columns: int) -> None:
    rows = normal(3, n_columns)
    found = sketched(rows, 512)
    assert torch.equal(found.abs(), rows.abs())
    negative = (found * rows < 0).double().mean(1)
    if n_columns >= 300:
        assert ((negative - 0.5).abs() < 0.12).all()
    assert not torch.equal(sketched(normal(3, 513), 512).abs(), normal(3, 513).abs())


def test_every_column_goes_to_one_place_with_a_sign() -> None:
    matrix = sketched(torch.eye(300, dtype=torch.float64), 64)
    assert torch.equal(matrix.abs().sum(1), torch.ones(300, dtype=torch.float64))
    assert matrix.unique().tolist() == [-1, 0, 1]
    # No two columns of a block of 64 meet.
    assert all(block.abs().sum(0).max() == 1 for block in matrix.split(64))


@pytest.mark.parametrize("chunk", [1, 64, 200, 640])
def test_how_many_columns_are_folded_at_a_time_does_not_matter(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters = [normal(n).requires_grad_() for n in (5, 130, 1, 700, 64, 100)]
    # The second loss does not reach the fourth parameter, nor the third one the first.
    reached = [parameters, [*parameters[:3], *parameters[4:]], parameters[1:]]
    losses = [sum(p.square().sum() * (i + 1) for p in chosen) for i, chosen in enumerate(reached)]
    found = [Sketch(64).sketch(_roots(losses), parameters, None, frozenset()).sketches]
    monkeypatch.setattr("gradbal.jacobian.sketch._CHUNK", chunk)
    found.append(Sketch(64).sketch(_roots(losses), parameters, None, frozenset()).sketches)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-12)
    part = torch.cat(
        [2 * p.detach() if i != 3 else 0 * p.detach() for i, p in enumerate(parameters)]
    )
    torch.testing.assert_close(found[1][1], sketched(2 * part[None], 64)[0], rtol=0, atol=1e-12)


def test_the_sketch_is_linear() -> None:
    rows = normal(2, 5000)
    mixed = torch.cat([rows, 3 * rows[:1] - 0.5 * rows[1:]])
    found = sketched(mixed, 128)
    torch.testing.assert_close(found[2], 3 * found[0] - 0.5 * found[1], rtol=0, atol=1e-12)


def test_the_mean_of_two_processes_sketches_is_that_of_their_mean_rows() -> None:
    model = make("Plain")
    parameters = list(model.parameters())
    batches = [model.batch(), model.batch() + 1]

    def of(losses: list[Tensor]) -> Sketched:
        return Sketch(16, seed=4, step=7).sketch(_roots(losses), parameters, None, frozenset())

    parts = [of(model.losses(b)) for b in batches]
    together = of([(a + b) / 2 for a, b in zip(*map(model.losses, batches), strict=True)])
    mean = (parts[0].sketches + parts[1].sketches) / 2
    assert mean.shape == (3, 16)
    torch.testing.assert_close(together.sketches, mean, rtol=1e-12, atol=1e-12)
    found = Sketched(mean, together.extremes, together.shared).found()
    torch.testing.assert_close(found.gramian, together.found().gramian)


@pytest.mark.parametrize("angle", [0.0, 1e-3, 1e-6])
def test_nearly_dependent_rows_stay_so(angle: float) -> None:
    """The error of the smallest eigenvalue is relative to itself."""
    size = 1024
    g, h = normal(2, 50_000)
    rows = torch.stack([g, g + angle * h])
    found = torch.linalg.svdvals(sketched(rows, size))
    exact = torch.linalg.svdvals(rows)
    if angle == 0:
        assert found[1] < 1e-12 * found[0]
    else:
        # Four standard errors.
        torch.testing.assert_close(found, exact, rtol=4 / math.sqrt(2 * size), atol=0)


def test_half_precision_is_added_up_in_float32() -> None:
    rows = torch.full((2, 1 << 14), 1.0, dtype=torch.bfloat16)
    found = sketched(rows, 4)
    assert found.dtype == torch.float32
    # Sums of 4096 signs, which bfloat16 would round to multiples of two.
    assert torch.equal(found, sketched(rows.double(), 4).float())


# Where it comes from.


def test_it_is_a_function_of_seed_and_step_alone() -> None:
    rows = normal(2, 1000)
    state = torch.get_rng_state()
    first = sketched(rows, 64, seed=1, step=2)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(77)
    assert torch.equal(sketched(rows, 64, seed=1, step=2), first)
    for seed, step in ((1, 3), (2, 2), (2, 1)):
        # Both signs and shifts are others.
        other = sketched(rows, 64, seed=seed, step=step)
        assert abs(float(torch.cosine_similarity(other[0], first[0], dim=0))) < 0.5
        assert not torch.isclose(other.abs(), first.abs()).any()


def test_strides_do_not_matter() -> None:
    """Where a gradient comes in another memory format, its columns are the same."""
    weight = normal(3, 4, 5, 5).requires_grad_()
    coefficients = normal(2, 3, 4, 5, 5, seed=9)
    found = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        losses = [(weight * c.to(memory_format=memory_format)).sum() for c in coefficients]
        (grad,) = torch.autograd.grad(losses[0], weight, retain_graph=True)
        assert grad.is_contiguous(memory_format=memory_format)
        found.append(Sketch(16).sketch(_roots(losses), [weight], None, frozenset()).sketches)
    assert_same(*found)


def test_what_was_before_does_not_matter() -> None:
    """A graph that changes from step to step, and an engine that remembers it."""
    model = make("ChangingGraph")
    batch, parameters = model.batch(), list(model.parameters())
    old = Sketch(16)
    shared = []
    for _ in range(4):
        losses = model.losses(batch)
        known = old.sketch(_roots(losses), parameters, None, frozenset())
        new = Sketch(16).sketch(_roots(losses), parameters, None, frozenset())
        assert_same(known.sketches, new.sketches)
        assert_same(known.extremes, new.extremes)
        assert [id(p) for p in known.shared] == [id(p) for p in new.shared]
        shared.append({id(p) for p in new.shared})
    assert shared[0] != shared[1]
    assert shared[0] == shared[2]


def _through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def _train(model: Any, opt: MultiTaskOptimizer, steps: int) -> list[Tensor | None]:
    gramians = []
    for _ in range(steps):
        opt.zero_grad()
        opt.backward(model.losses(model.batch()))
        opt.step()
        gramians.append(opt.gramian)
    return gramians


@pytest.mark.parametrize("every", [1, 2])
def test_a_resumed_run_is_the_same_bit_for_bit(every: int) -> None:
    options: dict[str, Any] = {"jacobian": "sketch", "sketch_size": 7, "update_every": every}
    model, opt = fresh("upgrad", **options)
    _train(model, opt, 3)
    checkpoint = _through_a_file({"model": model.state_dict(), "opt": opt.state_dict()})
    twin, other = fresh("upgrad", **options)
    twin.load_state_dict(checkpoint["model"])
    other.load_state_dict(checkpoint["opt"])
    # Without the number of steps, signs would be those of the first ones.
    third, late = fresh("upgrad", **options)
    third.load_state_dict(checkpoint["model"])
    late.optimizer.load_state_dict(copy.deepcopy(opt.optimizer.state_dict()))
    found = [_train(m, o, 4) for m, o in ((model, opt), (twin, other), (third, late))]
    assert_same(found[1], found[0])
    assert_same(snapshot(twin, other), snapshot(model, opt))
    assert_same(other.state_dict(), opt.state_dict())
    estimates = [[g for g in part if g is not None] for part in found]
    assert not torch.equal(estimates[2][0], estimates[0][0])


# What it costs.


class _Peak(TorchDispatchMode):
    """The most bytes of tensors that were made in this context and alive at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {id(t.untyped_storage()) for t in _tensors([*args, *(kwargs or {}).values()])}
        result = func(*args, **(kwargs or {}))
        for t in _tensors([result]):
            storage = t.untyped_storage()
            if id(storage) in self._known or id(storage) in before:
                continue
            size = storage.nbytes()
            self._known.add(id(storage))
            weakref.finalize(storage, self._gone, id(storage), size)
            self.now += size
        self.peak = max(self.peak, self.now)
        return result

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _tensors(values: Any) -> list[Tensor]:
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


def _peak(jacobian: str, n_tasks: int, **options: Any) -> tuple[int, int]:
    """Bytes at the peak of the larger of two steps; and P."""
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(8, 2000), nn.Tanh(), nn.Linear(2000, 2000), nn.Tanh())
    heads = nn.ModuleList(nn.Linear(2000, 1) for _ in range(n_tasks))
    model = nn.ModuleList([trunk, heads])
    opt = MultiTaskOptimizer(
        SGD(model.parameters(), lr=0.1), "upgrad", jacobian=jacobian, **options
    )
    peak = 0
    for _ in range(2):
        opt.zero_grad()
        z = trunk(torch.ones(2, 8))
        losses = [(head(z) - i).square().mean() for i, head in enumerate(heads)]
        with _Peak() as seen:
            opt.backward(losses)
        peak = max(peak, seen.peak)
    return peak, sum(p.numel() for p in trunk.parameters())


def test_memory_does_not_grow_by_a_row_for_each_task() -> None:
    size = 4096
    found = {n: _peak("sketch", n, sketch_size=size) for n in (3, 11)}
    peaks, p = {n: peak for n, (peak, _) in found.items()}, found[3][1]
    # One row in float32, one byte a column for signs, buffer and lanes of 2^18 columns.
    budget = 4 * p + p + 4 * (1 + 2) * (1 << 18)
    for n, peak in peaks.items():
        # Besides, sketches, gradients of heads and activations.
        assert 4 * p < peak <= 1.02 * budget + 8 * n * size
    # What the tasks add is their sketches, in float32 and for the Gramian in float64, not rows.
    assert peaks[11] - peaks[3] <= 8 * 16 * size
    # The same measurement sees what rows take.
    assert _peak("loop", 11)[0] >= 11 * 4 * p


def test_launches_do_not_grow_with_the_number_of_parameters() -> None:
    """A row takes three operators for each 2^21 columns, views aside, on an accelerator."""
    with Accelerator() as device:
        counts = []
        for depth in (4, 40):
            rows = [torch.ones(7), *(torch.ones(100) for _ in range(depth))]
            parameters = [device.put(r).requires_grad_() for r in rows]
            losses = [sum((p * i).sum() for p in parameters) for i in (1.0, 2.0)]
            roots = [(l, device.put(torch.ones(()))) for l in losses]
            with device.watched() as seen:
                for l, c in roots:
                    torch.autograd.grad(l, parameters, c, retain_graph=True)
            bare = _launches(seen.operators)
            with device.watched() as seen:
                Sketch(64).take(roots, parameters, None, frozenset())
            assert not seen.waits
            counts.append(_launches(seen.operators) - bare)
    assert counts[0] == counts[1]
    assert counts[0] <= 60


def _launches(operators: list[str]) -> int:
    views = ("view", "split", "narrow", "slice", "select", "expand", "unbind", "detach", "alias")
    views += ("transpose", "permute", "t.default", "unsqueeze", "as_strided")
    return sum(not any(v in name for v in views) for name in operators)


def test_a_step_waits_for_the_gramian_alone() -> None:
    with Accelerator() as device:
        model = device.put(make("Plain"))
        batch = device.put(model.batch())
        opt = optimizer(model, "upgrad", jacobian="sketch", sketch_size=8)
        for _ in range(2):
            opt.zero_grad()
            losses = model.losses(batch)
            with device.watched() as seen:
                opt.backward(losses)
            (only,) = seen.waits
            assert only.numel == (3 + 2) * 3
            opt.step()


# What it gives.


class _Middle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(50, 300), nn.Tanh(), nn.Linear(300, 100), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(100, 1) for _ in range(4))

    def losses(self, batch: Tensor) -> list[Tensor]:
        z = self.trunk(batch)
        return [(h(z) - (-1.0) ** i).square().mean() for i, h in enumerate(self.heads)]


@pytest.mark.parametrize("aggregator", ["upgrad", "mgda", "nash_mtl", "cagrad", "config"])
def test_the_direction_is_right_to_the_stated_error(aggregator: str) -> None:
    model = _Middle()
    batch = normal(32, 50).float()
    rows, _ = task_gradients(model, lambda twin: twin.losses(batch))
    j = jacobian(rows, shared_names(rows))
    wanted = gradbal.create(aggregator).direction(j)
    size = 4096
    assert j.shape[1] > 10 * size
    opt = optimizer(model, aggregator, jacobian="sketch", sketch_size=size)
    squares = []
    for _ in range(10):
        opt.zero_grad()
        opt.backward(model.losses(batch))
        found = torch.cat([p.grad.double().reshape(-1) for p in model.trunk.parameters()])
        squares.append(float((found / found.norm() - wanted / wanted.norm()).square().sum()))
    # One error of 1/√k in each of three directions to turn to.
    rms = math.sqrt(sum(squares) / len(squares))
    assert rms <= 2 * math.sqrt(3 / size)
    assert rms > 1e-4


def test_the_gramian_is_that_of_the_sketch() -> None:
    model = make("Plain")
    opt = optimizer(model, "upgrad", jacobian="sketch", sketch_size=5)
    losses = model.losses(model.batch())
    engine = Sketch(5)
    expected = engine.take(_roots(losses), list(model.parameters()), None, frozenset())
    opt.backward(losses)
    assert_same(opt.gramian, expected.gramian)
    weights = gradbal.create("upgrad").weights(expected.gramian)
    torch.testing.assert_close(opt.weights, weights, rtol=1e-12, atol=0)
    assert opt.diagnostics()["engine"] == "sketch"
    assert opt.diagnostics()["steps"] == 1


def test_a_task_that_sits_out_has_no_sketch() -> None:
    model = make("Plain")
    found = Sketch(5).sketch(
        _roots(model.losses(model.batch())), list(model.parameters()), None, frozenset([1])
    )
    assert not found.sketches[1].any()
    assert found.sketches[0].any()
    assert found.sketches[2].any()


def test_scaled_gradients_have_the_same_weights() -> None:
    weights, gradients = [], []
    for scaler in (None, GradScaler("cpu", init_scale=8.0)):
        model = make("Plain")
        opt = optimizer(model, "upgrad", jacobian="sketch", sketch_size=7)
        opt.backward(model.losses(model.batch()), grad_scaler=scaler)
        weights.append(opt.weights)
        gradients.append([p.grad for p in model.parameters()])
    assert_same(weights[1], weights[0])
    for scaled, plain in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(scaled, 8 * plain)


def test_hooks_on_parameters_run_once() -> None:
    model = make("Plain")
    calls = []
    model.trunk[0].weight.register_hook(lambda g: calls.append(1))
    opt = optimizer(model, "upgrad", jacobian="sketch", heads="weighted")
    opt.backward(model.losses(model.batch()))
    assert calls == [1]


@pytest.mark.parametrize("where", ["trunk", "head"])
@pytest.mark.parametrize("size", [7, SIZE])
def test_gradients_that_are_not_finite(where: str, size: int) -> None:
    def losses(model: Any) -> list[Tensor]:
        found = model.losses(model.batch())
        part = model.trunk[0].weight if where == "trunk" else model.heads[1].weight
        found[1] = found[1] + root_at_zero(part)
        return found

    made: dict[str, MultiTaskOptimizer] = {}
    for policy in ("raise", "skip", "drop"):
        model = make("Plain")
        opt = made[policy] = optimizer(
            model, "upgrad", jacobian="sketch", sketch_size=size, nonfinite=policy
        )
        before = snapshot(model, opt)
        if policy == "raise":
            with pytest.raises(NonFiniteError, match="task 1"):
                opt.backward(losses(model))
        else:
            opt.backward(losses(model))
        if policy != "drop":
            assert_same(snapshot(model, opt)["gradients"], before["gradients"])
    assert made["skip"].diagnostics()["skipped"] == 1
    assert made["drop"].diagnostics()["dropped"] == {1: 1}
    assert all(torch.isfinite(p.grad).all() for p in model.trunk.parameters())


def test_an_overflow_is_left_to_the_scaler() -> None:
    model = make("Plain")
    opt = optimizer(model, "upgrad", jacobian="sketch")
    losses = model.losses(model.batch())
    losses[0] = losses[0] + root_at_zero(model.trunk[0].weight)
    opt.backward(losses, grad_scaler=GradScaler("cpu", init_scale=8.0))
    assert torch.isinf(model.trunk[0].weight.grad).all()


def test_sparse_gradients_are_refused() -> None:
    table = nn.Embedding(5, 3, sparse=True)
    opt = MultiTaskOptimizer(SGD(table.parameters(), lr=0.1), "upgrad", jacobian="sketch")
    z = table(torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="gradients must be dense"):
        opt.backward([z.sum(), z.square().sum()])


# Whom it serves.

NEEDING_ROWS = [
    name
    for name in gradbal.list_aggregators()
    if gradbal.info(name).kind not in ("gramian", "scalarizer") and name not in ("famo", "marigold")
]


def _single(aggregator: str, **options: Any) -> MultiTaskOptimizer:
    layer = nn.Linear(2, 2)
    return optimizer(layer, aggregator, jacobian="sketch", **options)


@pytest.mark.parametrize("aggregator", NEEDING_ROWS)
def test_methods_that_need_rows_are_refused_by_name(aggregator: str) -> None:
    with pytest.raises(ValueError, match=f"'{aggregator}', which needs the gradients themselves"):
        _single(aggregator)


@pytest.mark.parametrize("name", sorted(set(gradbal.list_aggregators()) - set(NEEDING_ROWS)))
def test_all_others_are_served(name: str) -> None:
    assert _single(name).diagnostics()["engine"] == "sketch"


@pytest.mark.parametrize(
    ("aggregator", "options"),
    [
        ("gradvac", {"groups": "layer"}),
        ("gradvac", {"groups": "matrix"}),
        ("gradvac", {"groups": [4, 2]}),
        ("gradvac", {"groups": [1]}),
        ("cr_mogm", {"inner": "gradvac", "options": {"groups": "layer"}}),
    ],
)
def test_column_groups_are_refused(aggregator: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"'{aggregator}' with weights by column group"):
        _single(aggregator, **options)


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "64"])
def test_sizes_that_are_none(size: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="`sketch_size` must be"):
        _single("upgrad", sketch_size=size)


@pytest.mark.parametrize("engine", ["auto", "loop"])
def test_a_size_for_another_engine(engine: str) -> None:
    with pytest.raises(ValueError, match='`sketch_size` is for jacobian="sketch"'):
        optimizer(nn.Linear(2, 2), "upgrad", jacobian=engine, sketch_size=64)


def test_gathering_is_refused_with_nothing_changed() -> None:
    model, opt = fresh("upgrad", jacobian="sketch", sketch_size=7)
    _train(model, opt, 2)
    before = snapshot(model, opt)
    with pytest.raises(ValueError, match=r'accumulate=True needs .* found jacobian="sketch"'):
        opt.backward(model.losses(model.batch()), accumulate=True)
    assert_same(snapshot(model, opt), before)
    assert _train(model, opt, 1)[0] is not None


def test_micro_batches_of_a_scalarizer() -> None:
    """They add up where weights are known before; where not, gradients would have to be kept."""
    model = make("Plain")
    opt = optimizer(model, "sum", jacobian="sketch")
    opt.backward(model.losses(model.batch()), accumulate=True)
    opt.backward(model.losses(model.batch()))
    assert opt.diagnostics()["steps"] == 1
    opt = optimizer(make("Plain"), "gls", jacobian="sketch")
    with pytest.raises(ValueError, match="accumulate=True needs an engine whose gradients add up"):
        opt.backward(model.losses(model.batch()), accumulate=True)


@pytest.mark.parametrize("aggregator", ["sum", "uw"])
def test_a_scalarizer_has_no_use_for_it(aggregator: str) -> None:
    gradients = []
    for engine in ("loop", "sketch"):
        model = make("Plain")
        opt = optimizer(model, aggregator, jacobian=engine)
        opt.backward(model.losses(model.batch()))
        gradients.append([p.grad for p in model.parameters()])
    assert_same(gradients[1], gradients[0])


def _at_features(model: Any, opt: MultiTaskOptimizer) -> None:
    z = model.trunk(model.batch())
    losses = [(h(z) - i).square().mean() for i, h in enumerate(model.heads)]
    opt.backward(losses, features=z)


def _at_a_layer(model: Any, opt: MultiTaskOptimizer) -> None:
    opt.backward(model.losses(model.batch()))


@pytest.mark.parametrize(
    ("aggregator", "step"),
    [("mgda_ub", _at_features), ("upgrad", _at_features), ("gradnorm", _at_a_layer)],
)
def test_few_columns_are_taken_as_they_are(
    aggregator: str, step: Callable[[Any, MultiTaskOptimizer], None]
) -> None:
    """At a representation, or one layer, rows are short: exact, whatever the size is."""
    gramians = []
    for engine in ("loop", "sketch"):
        model = make("Plain")
        options = {"layer": [model.trunk[0].bias]} if aggregator == "gradnorm" else {}
        if engine == "sketch":
            options["sketch_size"] = 1
        opt = optimizer(model, aggregator, jacobian=engine, **options)
        step(model, opt)
        gramians.append(opt.gramian)
    assert_same(gramians[1], gramians[0])
