"""Bytes that are held at once, counted by the allocator."""

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def peak(run: Callable[[], object]) -> int:
    """The most that `run` holds at once on the host of what it allocates itself."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    found = profiler.profiler.kineto_results.events()
    events = [e for e in found if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    held = most = 0
    for event in events:
        held += event.nbytes()
        most = max(most, held)
    return most
