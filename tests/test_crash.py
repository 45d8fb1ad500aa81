"""A training process that is killed at any moment goes on from its last checkpoint, bit for bit."""

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
import torch._dynamo  # What the first step of an optimizer would import, in every process.
from torch.optim import Adam

from gradbal import MultiTaskOptimizer
from tests.states import assert_same
from tests.zoo import make

N_STEPS = 240
N_KILLS = 10


def train(folder: str, aggregator: str) -> None:
    """Takes the steps that are left, with a checkpoint after each."""
    torch.set_num_threads(1)
    path = Path(folder) / "checkpoint.pt"
    model = make("Dropout")
    opt = MultiTaskOptimizer(Adam(model.parameters(), lr=0.01), aggregator)
    first = 0
    if path.exists():
        checkpoint = torch.load(path, weights_only=True)
        model.load_state_dict(checkpoint["model"])
        opt.load_state_dict(checkpoint["opt"])
        torch.set_rng_state(checkpoint["random"])
        first = checkpoint["step"]
    for step in range(first, N_STEPS):
        opt.zero_grad()
        opt.backward(model.losses(model.batch() + step / N_STEPS))
        opt.step()
        state = {
            "model": model.state_dict(),
            "opt": opt.state_dict(),
            "random": torch.get_rng_state(),
            "step": step + 1,
        }
        torch.save(state, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)
        with (Path(folder) / "progress").open("a") as progress:
            progress.write(".")


@pytest.mark.parametrize("aggregator", ["uw", "nash_mtl", "moco"])
def test_a_killed_run_resumes(aggregator: str, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    # The processes are forked from one that has imported everything.
    context.set_forkserver_preload(["tests.test_crash"])
    chance = random.Random(0)
    (tmp_path / "killed").mkdir()
    progress = tmp_path / "killed" / "progress"
    progress.touch()
    killed_at = []
    for _ in range(N_KILLS):
        process = context.Process(target=train, args=(str(tmp_path / "killed"), aggregator))
        goal = progress.stat().st_size + chance.randrange(N_STEPS // N_KILLS // 2)
        process.start()
        while progress.stat().st_size < goal:
            assert process.is_alive()
            time.sleep(0.001)
        time.sleep(chance.uniform(0.0, 0.01))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the run was over before it could be killed"
        killed_at.append(progress.stat().st_size)
    assert len(set(killed_at)) > N_KILLS // 2
    (tmp_path / "whole").mkdir()
    for folder in ("killed", "whole"):
        process = context.Process(target=train, args=(str(tmp_path / folder), aggregator))
        process.start()
        process.join()
        assert process.exitcode == 0
    killed, whole = (
        torch.load(tmp_path / folder / "checkpoint.pt", weights_only=True)
        for folder in ("killed", "whole")
    )
    assert whole["step"] == N_STEPS
    assert_same(killed, whole)
