import json
import threading
from dataclasses import asdict, replace

import pytest

from benchmarks.errors import BadInput
from benchmarks.multimnist import MULTIMNIST
from benchmarks.results import Record, ResultsFile, Run, Trial, best_by_run, fingerprint

RECORD = Record(
    benchmark="b",
    method="mgda",
    architecture="a",
    seed=0,
    fingerprint="f",
    error=None,
    test={"größe": {"mse": 0.25}},
    validation={},
    aggregator="MGDA()",
    step_time=1.5,
    train_seconds=2.0,
    settings={"epochs": 1, "lr": 0.1},
    versions={"torch": "2"},
)


def test_what_is_written_is_read(tmp_path):
    results = ResultsFile(tmp_path / "deep" / "folder")
    written = [RECORD, replace(RECORD, seed=1, error="ValueError: x", step_time=None)]
    for record in written:
        results.append(record)
    assert ResultsFile(results.folder).read() == (written, 0)
    assert all(json.loads(line) for line in results.path.read_text().splitlines())


@pytest.mark.parametrize("cut", [1, 40, 140])
def test_a_cut_last_line_costs_only_itself(tmp_path, cut):
    results = ResultsFile(tmp_path)
    results.append(RECORD)
    results.append(replace(RECORD, seed=1))
    content = results.path.read_bytes()
    results.path.write_bytes(content[: len(content) // 2 + cut])
    assert results.read() == ([RECORD], 1)
    results.append(replace(RECORD, seed=2))
    assert results.read() == ([RECORD, replace(RECORD, seed=2)], 1)


def test_a_line_cut_inside_a_character(tmp_path):
    results = ResultsFile(tmp_path)
    results.append(RECORD)
    content = results.path.read_bytes()
    results.path.write_bytes(content + content[: content.index("ö".encode()) + 1])
    assert results.read() == ([RECORD], 1)


def test_only_the_line_end_missing(tmp_path):
    results = ResultsFile(tmp_path)
    results.append(RECORD)
    results.path.write_bytes(results.path.read_bytes().rstrip(b"\n"))
    results.append(replace(RECORD, seed=1))
    assert results.read() == ([RECORD, replace(RECORD, seed=1)], 0)


def test_json_that_is_no_record_is_counted(tmp_path):
    results = ResultsFile(tmp_path)
    results.path.write_text('{"method": "mgda"}\n[1]\n')
    assert results.read() == ([], 2)


def test_a_line_from_before_sizes_were_written(tmp_path):
    line = asdict(RECORD)
    for name in ("parameters", "step_seconds", "curve", "peak_bytes", "threads"):
        del line[name]
    results = ResultsFile(tmp_path)
    results.path.write_text(json.dumps(line) + "\n")
    assert results.read() == ([RECORD], 0)


def test_writers_at_the_same_time_lose_nothing(tmp_path):
    files = [ResultsFile(tmp_path) for _ in range(4)]

    def write(number):
        for seed in range(20):
            files[number].append(replace(RECORD, method=str(number), seed=seed))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    records, unreadable = files[0].read()
    assert unreadable == 0
    assert len({(record.method, record.seed) for record in records}) == 80


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="`--out` must be a folder that can be written to, found"):
        ResultsFile(tmp_path / "file" / "folder")


def test_a_good_run_is_preferred_then_the_latest():
    failed = replace(RECORD, error="ValueError: old", test={})
    failed_again = replace(failed, error="ValueError: new")
    better = replace(RECORD, train_seconds=3.0)
    other = replace(RECORD, architecture="b")
    key = Run("mgda", 0, "a", Trial(0.1, 0.0, 0.0))
    assert best_by_run([failed, failed_again])[key] == failed_again
    assert best_by_run([RECORD, failed])[key] == RECORD
    assert best_by_run([failed, RECORD, better])[key] == better
    assert best_by_run([RECORD, other]) == {key: RECORD, key._replace(architecture="b"): other}


def test_fingerprint_follows_settings_revision_and_versions(monkeypatch):
    settings = MULTIMNIST.presets["quick"].settings
    mine = fingerprint(MULTIMNIST, settings)
    assert mine == fingerprint(MULTIMNIST, replace(settings))
    assert mine == fingerprint(MULTIMNIST, settings, "lenet")
    assert mine == fingerprint(MULTIMNIST, replace(settings, lr=1.0, weight_decay=1.0, dropout=0.5))
    found = {
        mine,
        fingerprint(MULTIMNIST, settings, "mmoe"),
        fingerprint(MULTIMNIST, replace(settings, epochs=7)),
        fingerprint(MULTIMNIST, replace(settings, data="mnist")),
        fingerprint(replace(MULTIMNIST, revision=99), settings),
        fingerprint(replace(MULTIMNIST, name="other"), settings),
    }
    monkeypatch.setattr("benchmarks.versions.version", lambda package: "0.0.0")
    found.add(fingerprint(MULTIMNIST, settings))
    assert len(found) == 7
