"""Several processes with a part of the batch each take the step of one with the whole batch."""

import copy
import pickle
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import gradbal
from gradbal import MultiTaskOptimizer
from gradbal.aggregators.base import BilevelAggregator
from gradbal.distributed import DistributedError
from tests.drive import DRIVERS, Call, Driver, driver
from tests.processes import Workers, workers

STEPS = 4
N_SAMPLES = 6


@pytest.fixture(scope="module")
def two() -> Iterator[Workers]:
    with workers(2) as found:
        yield found


@pytest.fixture(scope="module")
def four() -> Iterator[Workers]:
    with workers(4) as found:
        yield found


class Through(nn.Module):
    """All of a model's work in one `forward`, which is where wrappers listen."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Tensor, features: bool = False) -> Any:
        if not features:
            return self.model.losses(batch)
        z = self.model.trunk(batch)
        return [head(z).square().mean() + 1 for head in self.model.heads], z


def part(batch: Tensor) -> Tensor:
    """This process's samples, as even as can be."""
    return batch.tensor_split(dist.get_world_size())[dist.get_rank()]


def with_generator(name: str, keywords: dict[str, Any], seed: int) -> dict[str, Any]:
    made = gradbal.create(name, **keywords)
    if not hasattr(made, "generator"):
        return keywords
    return {**keywords, "generator": torch.Generator().manual_seed(seed)}


@dataclass
class Divided(Driver):
    """A method on this process's part of every batch; as itself in one process.

    how: "ddp", "plain" replicas, "fsdp", "hsdp" (each shard twice) or "alone".
    """

    how: str = "alone"
    wrapped: Any = field(default=lambda parameters: SGD(parameters, lr=0.05, momentum=0.5))

    def fresh(self) -> tuple[nn.Module, MultiTaskOptimizer]:
        model = self.model()
        whole: nn.Module = Through(model)
        if self.how == "ddp":
            whole = DistributedDataParallel(whole)
        elif self.how in ("fsdp", "hsdp"):
            whole = shard(whole, copies=1 + (self.how == "hsdp"))
        group = {
            "ddp": None,
            "fsdp": None,
            "hsdp": None,
            "plain": dist.group.WORLD,
            "alone": "local",
        }[self.how]
        # Every process would draw its own numbers.
        seed = 7 if self.how == "alone" else 7 + dist.get_rank()
        keywords = with_generator(self.name, self.keywords, seed)
        opt = MultiTaskOptimizer(
            self.wrapped(whole.parameters()),
            self.name,
            process_group=group,
            **self.options,
            **keywords,
        )
        return whole, opt

    def batch(self, step: int, which: int) -> Tensor:
        found = super().batch(step, which)
        return found if self.how == "alone" else part(found)

    def losses(self, model: nn.Module, call: Call, which: int) -> list[Tensor]:
        return model(self.batch(call.step, which))

    def _backward(self, model: nn.Module, opt: MultiTaskOptimizer, call: Call) -> None:
        batch = self.batch(call.step, 0)
        size = None if self.how == "alone" else len(batch)
        if opt.aggregator.needs_features:
            losses, z = model(batch, features=True)
            opt.backward(losses, features=z, batch_size=size)
            return
        n = getattr(opt.aggregator, "n_batches", 1)
        others = [self.losses(model, call, k) for k in range(1, n)]
        opt.backward(self.losses(model, call, 0), independent=others, batch_size=size)


def shard(model: nn.Module, copies: int = 1) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    size = dist.get_world_size()
    if copies == 1:
        mesh = init_device_mesh("cpu", (size,))
    else:
        sizes = copies, size // copies
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("copies", "shards"))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def values(model: nn.Module) -> list[Tensor]:
    found = [p.detach() for p in model.parameters()]
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.clone() for p in found]


def trained(name: str, how: str, options: dict[str, Any]) -> tuple[list[Tensor], Any]:
    """Parameters and weights after some steps."""
    method, keywords = DRIVERS[name]
    with warnings.catch_warnings():
        # About views that FSDP hands out, which nobody writes to here.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module")
        divided = Divided(method, dict(keywords), how=how, options=dict(options))
        model, opt = divided.fresh()
        divided.run(model, opt, range(STEPS))
    return values(model), opt.weights


def alone(name: str, options: dict[str, Any]) -> tuple[list[Tensor], Any]:
    return trained(name, "alone", options)


def compare(workers: Workers, name: str, how: str, **options: Any) -> None:
    parameters, weights = alone(name, options)
    for found, their_weights in workers.run(trained, name, how, options):
        torch.testing.assert_close(found, parameters, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(their_weights, weights, rtol=1e-6, atol=1e-9)


MASKS = ["graddrop"]
"""Methods whose masks of a representation need the whole batch."""


@pytest.mark.parametrize("how", ["ddp", "plain"])
@pytest.mark.parametrize("name", DRIVERS)
def test_every_method(two: Workers, name: str, how: str) -> None:
    compare(two, name, how)


@pytest.mark.parametrize("how", ["ddp", "plain"])
@pytest.mark.parametrize(
    "name",
    [
        "mean",
        "uw",
        "famo",
        "upgrad",
        "nash_mtl",
        "pcgrad",
        "moco",
        "m_config",
        "graddrop",
        "mgda_ub",
        "modo",
    ],
)
def test_uneven_parts(four: Workers, name: str, how: str) -> None:
    """Six samples in four processes: 2, 2, 1 and 1, of which the weighted mean is taken."""
    compare(four, name, how)


def takes_shards(name: str) -> bool:
    method, keywords = DRIVERS[name]
    made = gradbal.create(method, **keywords)
    looks = getattr(made, "looks_around", False) or isinstance(made, BilevelAggregator)
    probes = getattr(made, "probed_parameters", lambda: None)() is not None
    return not (looks or probes or made.needs_features or getattr(made, "n_batches", 1) > 1)


SHARDED = [name for name in DRIVERS if takes_shards(name)]
FSDP = pytest.mark.skipif(torch.__version__ < "2.6", reason="fully_shard was in a module of trials")


@FSDP
@pytest.mark.parametrize("name", SHARDED)
def test_every_method_on_shards(two: Workers, name: str) -> None:
    compare(two, name, "fsdp")


@FSDP
@pytest.mark.parametrize("name", ["mean", "upgrad", "moco", "m_config", "graddrop"])
def test_uneven_shards(four: Workers, name: str) -> None:
    """Four processes, and parameters of one to five rows: some have none of them."""
    compare(four, name, "fsdp")


@FSDP
@pytest.mark.parametrize("name", ["mean", "upgrad", "moco", "m_config", "graddrop"])
def test_shards_that_are_copied(four: Workers, name: str) -> None:
    """A mesh of two dimensions: two shards, and two processes with each."""
    compare(four, name, "hsdp")


def without_sync() -> str:
    divided = Divided("upgrad", how="fsdp")
    model, opt = divided.fresh()
    divided.run(model, opt, range(1))
    before = values(model)
    model.set_requires_gradient_sync(False)
    with pytest.raises(ValueError, match="set_requires_gradient_sync") as error:
        opt.backward(divided.losses(model, Call(1, ""), 0))
    assert all(map(torch.equal, before, values(model)))
    return str(error.value)


@FSDP
def test_shards_without_sync_are_refused(two: Workers) -> None:
    assert len(set(two.run(quietly, without_sync))) == 1


def in_half_precision() -> list[torch.dtype]:
    """FSDP's own mixed precision: bfloat16 in the passes, float32 shards."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = Through(Driver("upgrad").model().float())
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(model, mp_policy=policy)
    opt = MultiTaskOptimizer(SGD(model.parameters(), lr=0.05), "upgrad")
    before = values(model)
    for step in range(2):
        opt.zero_grad()
        opt.backward(model(part(Driver("upgrad").batch(step, 0)).bfloat16()))
        opt.step()
    assert not all(map(torch.equal, before, values(model)))
    assert opt.gramian.isfinite().all()
    return [p.grad.dtype for p in model.parameters()]


@FSDP
def test_mixed_precision_of_shards(two: Workers) -> None:
    for found in two.run(quietly, in_half_precision):
        assert set(found) == {torch.float32}


@pytest.mark.parametrize(
    "options",
    [
        {"jacobian": "loop"},
        {"jacobian": "vmap"},
        {"jacobian": "sketch"},
        {"update_every": 2},
        {"update_every": 2, "heads": "own"},
        {"heads": "own"},
        {"heads": "weighted", "match_sum": True},
        {"loss_transform": "log"},
        {"nonfinite": "drop"},
    ],
    ids=str,
)
@pytest.mark.parametrize("how", ["ddp", "plain", pytest.param("fsdp", marks=FSDP)])
def test_options(two: Workers, how: str, options: dict[str, Any]) -> None:
    if how == "fsdp" and options.get("jacobian") in ("vmap", "sketch"):
        with pytest.raises(AssertionError, match=r"`jacobian` must be .loop. or .auto."):
            two.run(trained, "upgrad", how, options)
        return
    compare(two, "upgrad", how, **options)


@pytest.mark.parametrize("how", ["ddp", "plain"])
def test_sketches_add_up(two: Workers, how: str) -> None:
    """Fewer numbers than columns: the processes' mean sketch is that of the whole batch's rows."""
    compare(two, "upgrad", how, jacobian="sketch", sketch_size=16)


def test_two_passes_of_a_scalarizer(two: Workers) -> None:
    for how in ("ddp", "plain"):
        compare(two, "mean", how, heads="own", match_sum=True)


def with_settings(settings: dict[str, Any], compressed: bool) -> list[Tensor]:
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

    model = Through(Driver("upgrad").model())
    ddp = DistributedDataParallel(model, **settings)
    if compressed:
        ddp.register_comm_hook(None, bf16_compress_hook)
    opt = MultiTaskOptimizer(SGD(model.parameters(), lr=0.05), "upgrad", nonfinite="drop")
    for step in range(3):
        opt.zero_grad()
        opt.backward(ddp(part(Driver("upgrad").batch(step, 0))))
        opt.step()
    return values(model)


@pytest.mark.parametrize(
    ("settings", "compressed", "rtol"),
    [
        ({"gradient_as_bucket_view": True}, False, 1e-9),
        ({"gradient_as_bucket_view": True, "find_unused_parameters": True}, False, 1e-9),
        ({"bucket_cap_mb": 0.0001}, False, 1e-9),
        # What DDP sends has eight bits of mantissa then.
        ({}, True, 2e-2),
    ],
    ids=str,
)
def test_settings_of_ddp(
    two: Workers, settings: dict[str, Any], compressed: bool, rtol: float
) -> None:
    model = Driver("upgrad").model()
    opt = MultiTaskOptimizer(SGD(model.parameters(), lr=0.05), "upgrad")
    for step in range(3):
        opt.zero_grad()
        opt.backward(model.losses(Driver("upgrad").batch(step, 0)))
        opt.step()
    for found in two.run(with_settings, settings, compressed):
        torch.testing.assert_close(found, values(model), rtol=rtol, atol=1e-2 * rtol)


def widths(how: str) -> tuple[int, int, torch.Size]:
    divided = Divided("moco", how=how)
    model, opt = divided.fresh()
    divided.run(model, opt, range(1))
    rows = opt._balancer.rows
    return rows.width, opt.diagnostics()["shared"], opt.aggregator.rows.shape


@FSDP
def test_rows_and_state_are_sharded(two: Workers) -> None:
    found = two.run(quietly, widths, "fsdp")
    (own, shared, state), (others, _, _) = found
    assert own + others == shared
    assert max(own, others) < shared
    assert state == (3, own)


# Micro-batches.


def micro(how: str, name: str) -> list[Tensor]:
    divided = Divided(name, how=how)
    model, opt = divided.fresh()
    sync = model.no_sync if how == "ddp" else None
    for step in range(3):
        opt.zero_grad()
        with sync() if sync else torch.enable_grad():
            opt.backward(divided.losses(model, Call(step, ""), 1), accumulate=True)
        opt.backward(divided.losses(model, Call(step, ""), 0))
        opt.step()
    return values(model)


@pytest.mark.parametrize("name", ["upgrad", "mean", "uw", "graddrop"])
@pytest.mark.parametrize("how", ["ddp", "plain", pytest.param("fsdp", marks=FSDP)])
def test_accumulation(two: Workers, how: str, name: str) -> None:
    wanted = micro("alone", name)
    with warnings.catch_warnings():
        for found in two.run(micro_quietly, how, name):
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def micro_quietly(how: str, name: str) -> list[Tensor]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "FSDP2-wrapped module")
        return micro(how, name)


def adds_up(how: str) -> list[Tensor]:
    """Balanced gradients add up in `.grad`, as in any loop with no_sync."""
    divided = Divided("upgrad", how=how)
    model, opt = divided.fresh()
    opt.zero_grad()
    with model.no_sync() if how == "ddp" else torch.enable_grad():
        opt.backward(divided.losses(model, Call(0, ""), 0))
    opt.backward(divided.losses(model, Call(1, ""), 0))
    opt.step()
    return values(model)


@pytest.mark.parametrize("how", ["ddp", "plain"])
def test_no_sync_without_gathering(two: Workers, how: str) -> None:
    wanted = adds_up("alone")
    for found in two.run(adds_up, how):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


# Tasks that are not everywhere.


def lacking(how: str, name: str, unused: bool, options: dict[str, Any]) -> list[Tensor]:
    """Task 1 is in the first process's part only, then in the second's, then in both."""
    model = Driver(name).model()
    whole: nn.Module = Through(model)
    alone = how == "alone"
    if how == "ddp":
        whole = DistributedDataParallel(whole, find_unused_parameters=unused)
    opt = MultiTaskOptimizer(
        SGD(whole.parameters(), lr=0.05),
        name,
        process_group={"alone": "local", "plain": dist.group.WORLD}.get(how),
        **options,
    )
    for step in range(4):
        batch = Driver(name).batch(step, 0)
        losses = whole(batch if alone else part(batch))
        who = {0: [0], 1: [1], 2: [0, 1], 3: []}[step]
        if alone and who != [0, 1]:
            halves = batch.tensor_split(2)
            losses[1] = whole(halves[who[0]])[1] if who else None
        elif not alone and dist.get_rank() not in who:
            losses[1] = None
        opt.zero_grad()
        opt.backward(losses)
        opt.step()
    return values(whole)


@pytest.mark.parametrize("name", ["upgrad", "mean", "db_mtl"])
@pytest.mark.parametrize(
    ("how", "unused"), [("ddp", False), ("ddp", True), ("plain", False)], ids=str
)
def test_a_process_lacks_a_task(two: Workers, how: str, unused: bool, name: str) -> None:
    options = {"jacobian": "loop"}
    wanted = lacking("alone", name, False, options)
    for found in two.run(lacking, how, name, unused, options):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_a_process_lacks_a_task_of_sketches(two: Workers) -> None:
    options = {"jacobian": "sketch"}
    wanted = lacking("alone", "upgrad", False, options)
    for found in two.run(lacking, "ddp", "upgrad", False, options):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


class OwnInputs(nn.Module):
    """Each task has inputs, a head and its own call."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(4, 5).double()
        self.heads = nn.ModuleList(nn.Linear(5, 1).double() for _ in range(2))

    def forward(self, batch: Tensor, task: int) -> Tensor:
        return self.heads[task](self.trunk(batch).tanh()).square().mean()


def own_inputs(how: str) -> list[Tensor]:
    """Every process has a task of its own."""
    model = OwnInputs()
    whole: nn.Module = model
    if how == "ddp":
        whole = DistributedDataParallel(model, find_unused_parameters=True)
    opt = MultiTaskOptimizer(
        SGD(whole.parameters(), lr=0.1),
        "upgrad",
        process_group={"alone": "local", "plain": dist.group.WORLD}.get(how),
    )
    for step in range(3):
        batches = Driver("upgrad").batch(step, 0).tensor_split(2)
        mine = [0, 1] if how == "alone" else [dist.get_rank()]
        losses = [whole(batches[i], i) if i in mine else None for i in range(2)]
        opt.zero_grad()
        opt.backward(losses)
        opt.step()
    return values(whole)


@pytest.mark.parametrize("how", ["ddp", "plain"])
def test_every_process_has_a_task_of_its_own(two: Workers, how: str) -> None:
    wanted = own_inputs("alone")
    for found in two.run(own_inputs, how):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


class Branches(nn.Module):
    """Which layers a loss goes through depends on its batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(4, 4).double() for _ in range(3))

    def losses(self, batch: Tensor) -> list[Tensor]:
        layer = self.layers[1 if batch[0, 0] > 0 else 2]
        z = self.layers[0](batch)
        return [layer(z).square().mean(), z.abs().mean(), layer(z).tanh().mean() + 3]


def branches(how: str) -> list[Tensor]:
    model = Branches()
    opt = MultiTaskOptimizer(
        SGD(model.parameters(), lr=0.1),
        "upgrad",
        process_group="local" if how == "alone" else dist.group.WORLD,
    )
    for step in range(4):
        batch = Driver("upgrad").batch(step, 0)
        parts = list(batch.tensor_split(2))
        for part in parts:
            part[0, 0] = 1.0 if (part is parts[0]) == (step < 3) else -1.0
        opt.zero_grad()
        if how == "alone":
            pairs = zip(model.losses(parts[0]), model.losses(parts[1]), strict=True)
            opt.backward([(a + b) / 2 for a, b in pairs])
        else:
            opt.backward(model.losses(parts[dist.get_rank()]))
        opt.step()
    return values(model)


def test_graphs_that_differ_between_processes(two: Workers) -> None:
    wanted = branches("alone")
    for found in two.run(branches, "plain"):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


# What goes wrong in one process.


def nan_on_one(how: str, nonfinite: str, name: str, where: str) -> Any:
    divided = Divided(name, how=how, options={"nonfinite": nonfinite})
    model, opt = divided.fresh()
    divided.run(model, opt, range(2))
    before = values(model), opt.state_dict()["param_groups"]
    losses = divided.losses(model, Call(2, ""), 0)
    if dist.get_rank() == 1:
        # A loss, or a gradient alone.
        bad = (-losses[2]).sqrt() if where == "loss" else (losses[2] - losses[2]).sqrt() + 1
        losses[2] = bad
    opt.zero_grad()
    try:
        opt.backward(losses)
        opt.step()
        error = None
    except gradbal.NonFiniteError as found:
        error = found.tasks
        assert opt.state_dict()["param_groups"] == before[1]
    after = values(model)
    divided.run(model, opt, range(3, 5))
    return before[0], error, after, values(model), opt.diagnostics()


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("nonfinite", ["raise", "skip", "drop"])
@pytest.mark.parametrize("how", ["ddp", "plain", pytest.param("fsdp", marks=FSDP)])
def test_nan_in_one_process(two: Workers, how: str, nonfinite: str, where: str) -> None:
    first, second = two.run(quietly, nan_on_one, how, nonfinite, "upgrad", where)
    torch.testing.assert_close(first[3], second[3], rtol=0, atol=0)
    before, error, after, _, found = second
    assert first[1] == error == ([2] if nonfinite == "raise" else None)
    moved = not all(map(torch.equal, before, after))
    assert moved == (nonfinite == "drop")
    assert found["skipped"] == first[4]["skipped"] == int(nonfinite == "skip")
    assert found["dropped"] == ({2: 1} if nonfinite == "drop" else {})


def quietly(function: Any, *args: Any) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "FSDP2-wrapped module")
        return function(*args)


def raises_in_one(how: str, kind: str) -> Any:
    divided = Divided("upgrad", how=how)
    model, opt = divided.fresh()
    divided.run(model, opt, range(2))
    before = opt.state_dict()["param_groups"]
    losses = divided.losses(model, Call(2, ""), 0)
    bad = dist.get_rank() == 1
    if bad and kind == "losses":
        losses = losses[:2]
    elif bad and kind == "hook":
        losses[0].grad_fn.register_prehook(lambda grads: grads[0].no_such_thing)
    opt.zero_grad()
    try:
        opt.backward(losses, accumulate=bad and kind == "accumulate")
        error = None
    except Exception as found:
        error = type(found).__name__, str(found)
    assert opt.state_dict()["param_groups"] == before
    divided.run(model, opt, range(3, 5))
    return error, values(model)


@pytest.mark.parametrize("how", ["ddp", "plain"])
@pytest.mark.parametrize(
    ("kind", "mine", "others"),
    [
        ("losses", "ValueError", "rank 1 could not: ValueError: the number of losses must stay 3"),
        ("hook", "AttributeError", "rank 1 could not: AttributeError"),
        ("accumulate", "DistributedError", "must take the same step"),
    ],
)
def test_an_error_in_one_process(two: Workers, how: str, kind: str, mine: str, others: str) -> None:
    (first, a), (second, b) = two.run(raises_in_one, how, kind)
    assert second[0] == mine
    assert first[0] == "DistributedError"
    assert others in first[1]
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def overflow(how: str) -> Any:
    divided = Divided("upgrad", how=how)
    model, opt = divided.fresh()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
    for step in range(4):
        losses = divided.losses(model, Call(step, ""), 0)
        if step == 1 and how != "alone" and dist.get_rank() == 1:
            losses[0] = losses[0] * 1e308 * 1e10
        opt.zero_grad()
        if step == 1 and how == "alone":
            # The one process's part of the batch overflowed.
            losses[0] = losses[0] * 1e308 * 1e10
        opt.backward(losses, grad_scaler=scaler)
        scaler.step(opt)
        scaler.update()
    return values(model), scaler.get_scale()


@pytest.mark.parametrize("how", ["ddp", "plain"])
def test_overflow_in_one_process(two: Workers, how: str) -> None:
    wanted, scale = overflow("alone")
    assert scale == 2.0**9
    for found, their_scale in two.run(overflow, how):
        assert their_scale == scale
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


# Who takes part.


def found_group(kind: str) -> Any:
    model = Driver("upgrad").model()
    if kind == "differ" and dist.get_rank() == 1:
        with torch.no_grad():
            next(iter(model.parameters())).add_(1.0)
    group = {"local": "local", "none": None}.get(kind, dist.group.WORLD)
    opt = MultiTaskOptimizer(SGD(model.parameters(), lr=0.1), "upgrad", process_group=group)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            for _ in range(2):
                opt.backward(model.losses(part(Driver("upgrad").batch(0, 0))))
        except ValueError as error:
            return str(error)
    return [str(w.message) for w in caught]


def test_replicas_that_nobody_told_of(two: Workers) -> None:
    for found in two.run(found_group, "none"):
        assert len(found) == 1
        assert "2 processes" in found[0]
        assert 'process_group="local"' in found[0]
    assert two.run(found_group, "local") == [[], []]
    assert two.run(found_group, "given") == [[], []]


def test_replicas_must_start_alike(two: Workers) -> None:
    for found in two.run(found_group, "differ"):
        assert "must start from the same parameters" in found


@pytest.mark.parametrize("group", [object(), "world", 3])
def test_a_group_that_is_none(group: Any) -> None:
    model = Driver("upgrad").model()
    with pytest.raises(TypeError, match=r"`process_group` must be a torch\.distributed"):
        MultiTaskOptimizer(SGD(model.parameters(), lr=0.1), "upgrad", process_group=group)


@pytest.mark.parametrize("size", [-1, float("nan"), [1, 2], "3"])
def test_batch_sizes_are_checked(size: Any) -> None:
    model = Driver("upgrad").model()
    opt = MultiTaskOptimizer(SGD(model.parameters(), lr=0.1), "upgrad")
    with pytest.raises((ValueError, TypeError), match="`batch_size` must be"):
        opt.backward(model.losses(Driver("upgrad").batch(0, 0)), batch_size=size)


def empty_part(how: str) -> list[Tensor]:
    """The second process's part counts nothing, whatever its losses are."""
    divided = Divided("upgrad", how=how)
    model, opt = divided.fresh()
    batch = Driver("upgrad").batch(0, 0).tensor_split(2)
    mine = 0 if how == "alone" else dist.get_rank()
    opt.backward(model(batch[mine] * (1 + 9 * mine)), batch_size=[3, 0][mine])
    opt.step()
    return values(model)


def no_sample(how: str) -> list[Tensor]:
    """The second process has no sample, so that its losses are NaN."""
    divided = Divided("upgrad", how=how)
    model, opt = divided.fresh()
    for step in range(2):
        batch = Driver("upgrad").batch(step, 0)
        if how != "alone" and dist.get_rank() == 1:
            batch = batch[:0]
        opt.zero_grad()
        opt.backward(model(batch), batch_size=len(batch))
        opt.step()
    return values(model)


@pytest.mark.parametrize("how", ["ddp", "plain", pytest.param("fsdp", marks=FSDP)])
def test_a_part_without_samples(two: Workers, how: str) -> None:
    wanted = no_sample("alone")
    for found in two.run(quietly, no_sample, how):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("how", ["ddp", "plain"])
def test_an_empty_part(two: Workers, how: str) -> None:
    wanted = empty_part("alone")
    for found in two.run(empty_part, how):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def by_task(how: str) -> list[Tensor]:
    """Task 0 has all six samples, the others one in the first process and five in the second."""
    divided = Divided("upgrad", how=how)
    model, opt = divided.fresh()
    batch = Driver("upgrad").batch(0, 0)
    cuts = [3, 1, 1]
    if how == "alone":
        opt.backward(model(batch))
    else:
        mine = [batch[:c] if dist.get_rank() == 0 else batch[c:] for c in cuts]
        losses = [model(x)[i] for i, x in enumerate(mine)]
        opt.backward(losses, batch_size=[len(x) for x in mine])
    opt.step()
    return values(model)


def test_a_batch_size_for_each_task(two: Workers) -> None:
    wanted = by_task("alone")
    for found in two.run(by_task, "plain"):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def refused(how: str, kind: str) -> str:
    method = "graddrop" if kind == "masks" else "upgrad"
    keywords = {"on": "features"} if kind == "masks" else {}
    jacobian = kind if kind in ("gramian", "instance") else "loop"
    transform = "log" if kind == "log" else None
    divided = Divided(
        method, keywords, {"jacobian": jacobian, "loss_transform": transform}, how=how
    )
    model, opt = divided.fresh()
    batch = divided.batch(0, 0)
    try:
        if kind == "masks":
            losses, z = model(batch, features=True)
            opt.backward(losses, features=z)
        elif kind == "instance":
            opt.backward(model.module.model.trunk(batch).square().sum(1))
        elif kind == "log":
            losses = model(batch)
            opt.backward([lambda i=i: losses[i] for i in range(3)])
        else:
            opt.backward(model(batch))
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("gramian", '"gramian"'),
        ("instance", '"instance"'),
        ("masks", "need the whole batch in one process"),
        ("log", "needs all losses before the first gradient"),
    ],
)
def test_what_processes_cannot_do_together(two: Workers, kind: str, message: str) -> None:
    for found in two.run(refused, "ddp", kind):
        assert found.startswith("with 2 processes"), found
        assert message in found


def static_graph() -> str:
    model = DistributedDataParallel(Through(Driver("upgrad").model()), static_graph=True)
    opt = MultiTaskOptimizer(SGD(model.parameters(), lr=0.1), "upgrad")
    with pytest.raises(ValueError, match="must have static_graph=False") as error:
        opt.backward(model(Driver("upgrad").batch(0, 0)))
    return str(error.value)


def test_static_graphs_are_refused(two: Workers) -> None:
    assert len(set(two.run(static_graph))) == 1


def first_fsdp() -> str:
    from torch.distributed.fsdp import FullyShardedDataParallel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = Through(Driver("upgrad").model())
        model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        opt = MultiTaskOptimizer(SGD(model.parameters(), lr=0.1), "upgrad")
        with pytest.raises(ValueError, match="must be those of fully_shard") as error:
            opt.backward(model(Driver("upgrad").batch(0, 0)))
    return str(error.value)


def test_fsdp1_is_refused(two: Workers) -> None:
    assert len(set(two.run(first_fsdp))) == 1


# Copies, hooks, functions.


def copies(how: str) -> list[Tensor]:
    divided = Divided("moco", how=how)
    model, opt = divided.fresh()
    divided.run(model, opt, range(2))
    twin = copy.deepcopy(opt)
    assert twin.weights.equal(opt.weights)
    if how == "ddp":
        pickle.dumps(opt)
    divided.run(model, opt, range(2, 4))
    return values(model)


@pytest.mark.parametrize("how", ["ddp", "plain"])
def test_copies_of_the_optimizer(two: Workers, how: str) -> None:
    wanted = copies("alone")
    for found in two.run(copies, how):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def hooked(how: str) -> int:
    divided = Divided("upgrad", how=how)
    model, opt = divided.fresh()
    calls = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: calls.append(p))
    divided.run(model, opt, range(2))
    return len(calls)


@pytest.mark.parametrize("how", ["ddp", "plain", pytest.param("fsdp", marks=FSDP)])
def test_hooks_run_once_a_step(two: Workers, how: str) -> None:
    n = len(list(Driver("upgrad").model().parameters()))
    assert two.run(quietly, hooked, how) == [2 * n, 2 * n]


def as_functions(how: str, name: str) -> list[Tensor]:
    divided = Divided(name, how=how)
    model, opt = divided.fresh()
    for step in range(3):
        batch = divided.batch(step, 0)
        opt.zero_grad()
        opt.backward([lambda i=i, b=batch: model(b)[i] for i in range(3)], batch_size=len(batch))
        opt.step()
    return values(model)


@pytest.mark.parametrize("name", ["upgrad", "mean", "moco"])
def test_losses_as_functions(four: Workers, name: str) -> None:
    wanted = as_functions("alone", name)
    for found in four.run(as_functions, "plain", name):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def subgroups() -> list[Tensor]:
    """Ranks 0, 1 train one model together, and 2, 3 another one."""
    pairs = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    rank = dist.get_rank()
    model = Driver("upgrad").model()
    ddp = DistributedDataParallel(Through(model), process_group=pairs[rank // 2])
    opt = MultiTaskOptimizer(SGD(model.parameters(), lr=0.05), "upgrad")
    for step in range(2):
        batch = Driver("upgrad").batch(step + 10 * (rank // 2), 0)
        opt.zero_grad()
        opt.backward(ddp(batch.tensor_split(2)[rank % 2]))
        opt.step()
    return values(model)


def test_the_group_is_that_of_the_ddp_module(four: Workers) -> None:
    found = four.run(subgroups)
    for pair in (0, 1):
        model = Driver("upgrad").model()
        opt = MultiTaskOptimizer(SGD(model.parameters(), lr=0.05), "upgrad")
        for step in range(2):
            opt.zero_grad()
            opt.backward(model.losses(Driver("upgrad").batch(step + 10 * pair, 0)))
            opt.step()
        for rank in (2 * pair, 2 * pair + 1):
            torch.testing.assert_close(found[rank], values(model), rtol=1e-9, atol=1e-12)


def half_precision() -> Any:
    divided = Divided("upgrad", how="ddp", options={"jacobian_dtype": torch.bfloat16})
    model, opt = divided.fresh()
    divided.run(model, opt, range(2))
    return values(model), opt.gramian


def test_rows_in_half_precision(two: Workers) -> None:
    wanted, _ = alone("upgrad", {})
    for found, g in two.run(half_precision):
        assert g.isfinite().all()
        assert all(f.isfinite().all() for f in found)
        assert len(found) == len(wanted)


def test_errors_name_the_ranks() -> None:
    error = DistributedError("a message", [1, 2])
    assert error.ranks == [1, 2]
    assert str(error) == "a message"
    assert driver("upgrad").name == "upgrad"
