import os

import pytest

from benchmarks.errors import BenchmarkError
from benchmarks.jobs import share_out


def _work(job, tell):
    tell(job)
    if job == 13:
        os._exit(1)
    if job < 0:
        raise ValueError(f"found {job}")
    return job * job


@pytest.mark.parametrize("workers", [1, 2])
def test_every_job_is_done_once_and_steps_are_told(workers):
    told = []
    found = dict(share_out(_work, [3, 1, 2], workers, told.append))
    assert found == {3: 9, 1: 1, 2: 4}
    assert sum(told) <= 6
    assert workers == 2 or sum(told) == 6


def test_an_error_in_a_worker_reaches_the_caller():
    with pytest.raises(ValueError, match="found -1"):
        list(share_out(_work, [-1, 1], 2))


def test_a_dead_worker_is_told():
    with pytest.raises(BenchmarkError, match="a worker process has died"):
        list(share_out(_work, [13, 13], 2))
