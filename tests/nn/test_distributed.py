"""Every architecture in two processes: DDP and FSDP2 give the mean of the processes' gradients."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.nn.models import MODELS, batch, losses, make

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


@pytest.mark.skipif(not dist.is_available(), reason="this build of torch has no torch.distributed")
def test_gradients_are_the_mean_over_processes(tmp_path: Path) -> None:
    # Before 2.6 fully_shard was in a module of trials.
    kinds = ["ddp", "fsdp2"] if torch.__version__ >= "2.6" else ["ddp"]
    torch.multiprocessing.spawn(_work, (kinds, str(tmp_path)), nprocs=PROCESSES)
