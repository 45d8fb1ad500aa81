from dataclasses import replace

import numpy as np
import pytest

from benchmarks.data.splitting import cut, share
from benchmarks.yeast import YEAST

GROUPS = np.repeat(np.arange(40), np.arange(40) % 4 + 1)  # 100 rows, up to 4 a group


def test_parts_have_the_sizes_and_no_group_in_common():
    parts = cut(GROUPS, (60, 15, 17), seed=0)
    assert [len(part) for part in parts] == [60, 15, 17]
    groups = [set(GROUPS[part]) for part in parts]
    assert not groups[0] & groups[1]
    assert not groups[0] & groups[2]
    assert not groups[1] & groups[2]
    assert len(set(np.concatenate(parts))) == 92


def test_without_groups_every_row_is_used():
    parts = cut(np.arange(50), (30, 10, 10), seed=0)
    assert sorted(np.concatenate(parts)) == list(range(50))


def test_fewer_training_rows_are_some_of_the_more():
    more = cut(GROUPS, (60, 15, 17), seed=0)
    fewer = cut(GROUPS, (20, 15, 17), seed=0)
    assert set(fewer[0]) < set(more[0])
    assert np.array_equal(fewer[1], more[1])
    assert np.array_equal(fewer[2], more[2])


def test_the_order_is_the_seeds():
    again = cut(GROUPS, (60, 15, 17), seed=0)
    other = cut(GROUPS, (60, 15, 17), seed=1)
    assert np.array_equal(cut(GROUPS, (60, 15, 17), seed=0)[0], again[0])
    assert not np.array_equal(other[0], again[0])


@pytest.mark.parametrize("sizes", [(101, 0, 0), (98, 1, 1), (50, 50, 1)])
def test_too_few_rows(sizes):
    with pytest.raises(ValueError, match="sizes must be at most the rows there are"):
        cut(np.repeat(np.arange(25), 4), sizes, seed=0)


def test_shares_are_proportional_and_lose_nothing():
    settings = replace(
        YEAST.presets["quick"].settings, train_size=101, validation_size=10, test_size=7
    )
    shares = share(settings, [400, 300, 200, 100])
    assert [sum(sizes) for sizes in zip(*shares, strict=True)] == [101, 10, 7]
    for (train, _, _), expected in zip(shares, (40.4, 30.3, 20.2, 10.1), strict=True):
        assert abs(train - expected) <= 1
