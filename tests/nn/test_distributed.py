"""Every architecture in two processes: DDP and FSDP2 give the mean of the processes' gradients."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from gradbal import MultiTaskOptimizer
from tests.nn.models import DRAWS, MODELS, batch, losses, make
from tests.processes import workers

PROCESSES = 2


def _gradients(name: str) -> dict[str, torch.Tensor | None]:
    """In one process, of both batches; two passes, as the second meets what the first has left."""
    sums: list[dict[str, torch.Tensor | None]] = []
    for rank in range(PROCESSES):
        model = make(name)
        for step in range(2):
            sum(losses(model, batch(seed=2 * step + rank)).values()).backward()
        sums.append({n: p.grad for n, p in model.named_parameters()})
    return {n: None if g is None else (g + sums[1][n]) / PROCESSES for n, g in sums[0].items()}


def _wrapped(kind: str, model: nn.Module) -> nn.Module:
    if kind == "ddp":
        return DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    fully_shard(model, mesh=init_device_mesh("cpu", (PROCESSES,)))
    return model


def _work(rank: int, kinds: list[str], folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=PROCESSES)
    for name in MODELS:
        wanted = _gradients(name)
        for kind in kinds:
            model = make(name)
            wrapped = _wrapped(kind, model)
            for step in range(2):
                sum(losses(wrapped, batch(seed=2 * step + rank)).values()).backward()
            for n, p in model.named_parameters():
                found = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
                where = f"{kind}, {name}, {n}"
                torch.testing.assert_close(found, wanted[n], rtol=1e-9, atol=1e-12, msg=where)
            model.load_state_dict(copy.deepcopy(model.state_dict()))
    dist.destroy_process_group()


def _trained(name: str, kind: str) -> list[torch.Tensor]:
    """Parameters after some balanced steps on this process's part; on both parts for "alone"."""
    model = make(name)
    wrapped = model if kind == "alone" else _wrapped(kind, model)
    group = "local" if kind == "alone" else None
    opt = MultiTaskOptimizer(SGD(model.parameters(), lr=0.05), "upgrad", process_group=group)
    for step in range(3):
        if kind == "alone":
            parts = [losses(model, batch(seed=2 * step + rank)) for rank in range(PROCESSES)]
            found = {t: sum(part[t] for part in parts) / PROCESSES for t in parts[0]}
        else:
            found = losses(wrapped, batch(seed=2 * step + dist.get_rank()))
        opt.zero_grad()
        opt.backward(found)
        opt.step()
    values = [p.detach() for p in model.parameters()]
    return [p.full_tensor() if hasattr(p, "full_tensor") else p for p in values]


def _mixes(name: str) -> bool:
    """Whether a part of the batch is not trained on as it would be in the whole of it."""
    norms = nn.BatchNorm1d, nn.BatchNorm2d
    return name in DRAWS or any(isinstance(module, norms) for module in make(name).modules())


def _balance(kind: str) -> list[str]:
    """The names of what was trained, once all is as it should be."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "FSDP2-wrapped module")
        for name in MODELS:
            found = _trained(name, kind)
            for value in found:
                everywhere = [torch.empty_like(value) for _ in range(PROCESSES)]
                dist.all_gather(everywhere, value.contiguous())
                assert everywhere[0].equal(everywhere[1]), f"{kind}, {name}"
            if not _mixes(name):
                wanted = _trained(name, "alone")
                where = f"{kind}, {name}"
                torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12, msg=where)
    return list(MODELS)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_balanced_steps_are_those_of_one_process(kind: str) -> None:
    if kind == "fsdp2" and torch.__version__ < "2.6":
        pytest.skip("fully_shard was in a module of trials")
    with workers(PROCESSES) as two:
        assert two.run(_balance, kind) == [list(MODELS)] * PROCESSES
    assert sum(map(_mixes, MODELS)) < len(MODELS) / 2


@pytest.mark.skipif(not dist.is_available(), reason="this build of torch has no torch.distributed")
def test_gradients_are_the_mean_over_processes(tmp_path: Path) -> None:
    # Before 2.6 fully_shard was in a module of trials.
    kinds = ["ddp", "fsdp2"] if torch.__version__ >= "2.6" else ["ddp"]
    torch.multiprocessing.spawn(_work, (kinds, str(tmp_path)), nprocs=PROCESSES)
