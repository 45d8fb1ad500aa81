import numpy as np
import pytest

from benchmarks.data.parsed import parsed


def _parse(calls):
    def parse():
        calls.append(1)
        return {"a": np.arange(3, dtype=np.uint8), "b": np.array([np.nan])}

    return parse


def test_what_has_been_parsed_is_read_from_then_on(tmp_path):
    calls, path = [], tmp_path / "new" / "x.npz"
    for _ in range(2):
        arrays = parsed(path, _parse(calls))
        assert arrays["a"].tolist() == [0, 1, 2]
        assert arrays["a"].dtype == np.uint8
        assert np.isnan(arrays["b"]).all()
    assert len(calls) == 1
    assert [each.name for each in path.parent.iterdir()] == ["x.npz"]


@pytest.mark.parametrize("content", [b"", b"damaged", b"PK\x03\x04"])
def test_a_damaged_file_is_made_anew(tmp_path, content):
    calls, path = [], tmp_path / "x.npz"
    path.write_bytes(content)
    for _ in range(2):
        assert parsed(path, _parse(calls))["a"].tolist() == [0, 1, 2]
    assert len(calls) == 1


def test_nothing_is_unpickled(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, a=np.array([{"an": "object"}], dtype=object), allow_pickle=True)
    assert parsed(path, _parse([]))["a"].tolist() == [0, 1, 2]


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    calls = []
    for _ in range(2):
        assert parsed(tmp_path / "file" / "x.npz", _parse(calls))["a"].tolist() == [0, 1, 2]
    assert len(calls) == 2
