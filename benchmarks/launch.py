"""How this process was started: alone, or by torchrun beside others."""

from __future__ import annotations

import os

__all__ = ["launcher", "rank", "size"]


def rank() -> int:
    """The number of this process; 0 leads."""
    return int(os.environ.get("RANK", "0")) if size() > 1 else 0


def size() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launcher() -> list[str]:
    """The words of the command line that start as many processes again."""
    if size() == 1:
        return ["python"]
    here = int(os.environ.get("LOCAL_WORLD_SIZE", size()))
    nodes = [] if here == size() else ["--nnodes", str(-(-size() // here))]
    return ["torchrun", *nodes, "--nproc-per-node", str(here)]
