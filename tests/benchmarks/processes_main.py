"""`python -m benchmarks` with the tiny benchmark, as a process started by `test_processes.py`.

`TROUBLE` in the environment says what happens in the method `troubled`, on rank `WHERE`.
"""

import os
import signal
import sys
from dataclasses import replace
from datetime import timedelta

import torch

import gradbal
from benchmarks import cli, processes, training
from benchmarks.catalog import BENCHMARKS
from gradbal.aggregators.mean import Mean
from tests.benchmarks.conftest import TINY

UNEVEN = replace(TINY.presets["quick"].settings, train_size=43, test_size=31)
"""Three examples in the last batch: parts of two and one, and of one and none for `sdmgrad`."""


class Troubled(Mean):
    """Something happens at the second step of the training, after four that are measured."""

    calls = 0

    def scalarize(self, losses):
        Troubled.calls += 1
        trouble, here = os.environ["TROUBLE"], os.environ["RANK"] == os.environ.get("WHERE")
        if Troubled.calls == 6:
            if trouble == "everywhere" or (trouble == "there" and here):
                raise ZeroDivisionError("on purpose")
            if trouble.startswith("SIG") and here:
                os.kill(os.getpid(), getattr(signal, trouble))
            if trouble == "interrupt":
                raise KeyboardInterrupt
        return super().scalarize(losses)


def _trouble_outside(loss):
    """A part of the batch that cannot be evaluated, where gradbal hears nothing of it."""

    def failing(output, target):
        if os.environ["RANK"] == os.environ["WHERE"]:
            raise ZeroDivisionError("on purpose")
        return loss(output, target)

    return failing


def _leave_out(network, *others):
    """Masks after which no task has anything of the second stage's weights."""
    for task in network.model.tasks:
        name = "1.0.weight"
        empty = torch.zeros_like(network.model.masks[task][name])
        network.model.set_masks(task, {name: empty})


def main(arguments, environment):
    """Runs the command line in a process of its own, which has its own environment."""
    os.environ.update(environment)
    for stream, name in ((1, "OUT"), (2, "ERR")):
        os.dup2(os.open(environment[name], os.O_WRONLY | os.O_CREAT), stream)
    torch.set_num_threads(1)
    trouble = os.environ.get("TROUBLE", "")
    processes.TIMEOUT = timedelta(seconds=6 if trouble == "SIGSTOP" else 240)
    processes.GRACE = timedelta(seconds=1)
    tasks = TINY.tasks
    if trouble == "loss":
        tasks = tuple(replace(task, loss=_trouble_outside(task.loss)) for task in tasks)
    presets = {name: replace(preset, settings=UNEVEN) for name, preset in TINY.presets.items()}
    pruned = replace(TINY.architectures["sparse_sharing"], prepare=_leave_out)
    architectures = {**TINY.architectures, "pruned": pruned}
    BENCHMARKS["tiny"] = replace(TINY, tasks=tasks, presets=presets, architectures=architectures)
    gradbal.register("troubled")(Troubled)
    training._EVALUATION_BATCH = 7
    sys.argv = ["benchmarks", *arguments]
    cli.app(prog_name="benchmarks")
