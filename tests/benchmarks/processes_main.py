"""`python -m benchmarks` with the tiny benchmark, short waiting times, and what goes wrong on demand.

Started with several processes by `test_processes.py`; `TROUBLE` says what happens to rank 1.
"""

import os
import signal
from dataclasses import replace
from datetime import timedelta

import torch

import gradbal
from benchmarks import cli, processes
from benchmarks.catalog import BENCHMARKS
from tests.benchmarks.conftest import TINY

UNEVEN = replace(TINY.presets["quick"].settings, train_size=41, test_size=31)
"""An odd number in the last batch, and one more than the processes have in common."""

TROUBLE = os.environ.get("TROUBLE", "")


@gradbal.register("troubled")
class Troubled(gradbal.Mean):
    """What happens at the fourth step."""

    calls = 0

    def scalarize(self, losses):
        Troubled.calls += 1
        if Troubled.calls == 4 and TROUBLE == "everywhere":
            raise ZeroDivisionError("on purpose")
        if Troubled.calls == 4 and os.environ.get("RANK") == "1":
            if TROUBLE == "raises":
                raise ZeroDivisionError("on purpose")
            if TROUBLE in ("SIGKILL", "SIGSTOP"):
                os.kill(os.getpid(), getattr(signal, TROUBLE))
        return super().scalarize(losses)


if __name__ == "__main__":
    torch.set_num_threads(1)
    processes.TIMEOUT = timedelta(seconds=8 if TROUBLE == "SIGSTOP" else 120)
    processes.GRACE = timedelta(seconds=2)
    presets = {"quick": replace(TINY.presets["quick"], settings=UNEVEN)}
    presets["full"] = presets["quick"]
    BENCHMARKS["tiny"] = replace(TINY, presets=presets)
    cli.app(prog_name="python -m benchmarks")
