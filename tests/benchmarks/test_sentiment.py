from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import sentiment
from benchmarks.data import sentiment as data
from benchmarks.errors import BenchmarkError
from benchmarks.models.bag import Bag
from benchmarks.training import Learner, evaluate, train
from tests.benchmarks.packing import is_cached, put, tarball

COUNTS = {"tweets": 60, "amazon": 80, "movies": 100, "editorials": 40}
WORDS = ["good", "bad", "great", "awful"]


def _line(domain, number):
    """Ratings are those of a text's second word; a review or editorial has four sentences."""
    name = f"{number // 4 + 1}_{number % 4 + 1}" if domain in ("amazon", "editorials") else number
    mood = number % 4
    return f"{name}\t{(-1) ** mood * (1 + mood / 4)}\tA {WORDS[mood]} {domain} {number}."


def _archive(**changes):
    files = {
        f"hutto_ICWSM_2014/{data.DOMAINS[domain]}_GroundTruth.txt": (
            changes.get(domain) or "\n".join(_line(domain, i) for i in range(count))
        ).encode()
        for domain, count in COUNTS.items()
    }
    inner = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    return tarball({inner: tarball(files)})


@pytest.fixture
def root(tmp_path, monkeypatch):
    return put(monkeypatch, data, _archive(), tmp_path / "data")


def _settings(sizes=(170, 28, 28)):
    names = ("train_size", "validation_size", "test_size")
    settings = sentiment.SENTIMENT.presets["quick"].settings
    return replace(settings, **dict(zip(names, sizes, strict=True)))


def test_rows_are_those_of_the_files(root):
    texts = data.load_texts(root)
    assert np.bincount(texts.domain).tolist() == list(COUNTS.values())
    assert texts.rating[:5].tolist() == [1, -1.25, 1.5, -1.75, 1]
    assert len(set(texts.source[texts.domain == 1])) == 20  # reviews of four sentences
    assert len(set(texts.source[texts.domain == 2])) == 100
    assert not set(texts.source[texts.domain == 1]) & set(texts.source[texts.domain == 3])


def test_equal_texts_are_of_one_source(tmp_path, monkeypatch):
    tweets = "1\t1.0\tGreat phone!\r\n2\t2.0\tgreat  phone\n3\t-1\t:)\n4\t-1\t:(\n\n"
    amazon = "1_1\t1\tgreat phone.\n1_2\t1\tbuy it\n2_1\t2\tBuy it!\n2_2\t0\tno\n3_1\t0\tother"
    content = _archive(tweets=tweets, amazon=amazon)
    texts = data.load_texts(put(monkeypatch, data, content, tmp_path / "data"))
    sources = [texts.source[texts.domain == number].tolist() for number in (0, 1)]
    assert sources[0][0] == sources[0][1]
    assert len(set(sources[0])) == 3
    # The review's first sentence is a tweet's text, and left out; the others have one in common.
    assert len(sources[1]) == 4
    assert len(set(sources[1][:3])) == 1
    assert len(set(sources[1])) == 2


@pytest.mark.parametrize(
    "line", ["1\t5.0\ttoo good", "1\tnan\tx", "1\tgood\tx", "1\t1.0", "a\t1\tb\tc"]
)
def test_lines_of_another_form(tmp_path, monkeypatch, line):
    content = _archive(movies=f"{_line('movies', 0)}\n{line}\n")
    root = put(monkeypatch, data, content, tmp_path / "data")
    with pytest.raises(BenchmarkError, match=r"line 2 of .*movieReviewSnippets.* must hold a name"):
        data.load_texts(root)


def test_terms():
    same = ["Not good.", "not GOOD", "not, good"]
    assert len({tuple(data.bag(text)) for text in same}) == 1
    assert len(data.bag("not good")) == 3  # two words and their pair
    assert data.bag("good not")[:2] == data.bag("not good")[1::-1]
    assert data.bag("good not")[2] != data.bag("not good")[2]
    assert data.bag("don’t &amp; x") == data.bag("don't & x")
    assert len({data.bag(text)[0] for text in (":)", ":(", "!", "!!", "<3")}) == 5
    assert len(data.bag("word " * 500)) == data.LENGTH
    assert max(data.bag("a b c d e")) < data.BINS
    assert data.bag("") == []


def test_each_text_belongs_to_one_task(root):
    splits = sentiment.SENTIMENT.load(_settings(), root)
    for part, size in ((splits.train, 170), (splits.validation, 28), (splits.test, 28)):
        known = torch.stack([~target.isnan() for target in part.targets.values()])
        assert len(part) == size
        assert (known.sum(0) == 1).all()
        for task, count in zip(COUNTS, known.sum(1).tolist(), strict=True):
            assert abs(count - size * COUNTS[task] / 280) <= 1


def test_sentences_of_one_review_are_in_one_part(root):
    texts = data.load_texts(root)
    splits = sentiment.splits_of(texts, _settings())
    # Each text has a number of its own, and so its own terms.
    source = {row.tobytes(): number for row, number in zip(texts.bins, texts.source, strict=True)}
    assert len(source) == len(texts)
    parts = [
        {source[row.numpy().tobytes()] for row in part.inputs}
        for part in (splits.train, splits.validation, splits.test)
    ]
    assert sum(map(len, parts)) == len(set.union(*parts))


def test_a_bag_is_a_linear_layer_of_counts():
    torch.manual_seed(0)
    bag = Bag(5, 3)
    torch.nn.init.normal_(bag.bias)
    found = bag(torch.tensor([[1, 1, 4, 5], [5, 5, 5, 5]], dtype=torch.int16))
    counts = torch.tensor([[0.0, 2, 0, 0, 1], [0, 0, 0, 0, 0]])
    counts[0] /= 3**0.5
    expected = (counts @ bag.weight.weight[:5] + bag.bias).relu()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("tasks", [4, 1])
def test_it_learns(root, tasks):
    settings = replace(_settings(), epochs=5, lr=2e-2, batch_size=16)
    splits = sentiment.SENTIMENT.load(settings, root)
    benchmark = sentiment.SENTIMENT
    method = "upgrad" if tasks > 1 else None
    learner = Learner(benchmark, settings, benchmark.tasks[:tasks], method, 0)
    train(learner, splits, settings, 0, lambda: None)
    for measures in evaluate(learner, splits.test).values():
        assert measures["mae"] < 0.7  # that of a guess is 1.4
        assert measures["correlation"] > 0.9


@pytest.mark.skipif(not is_cached(data.ARCHIVE), reason="the archive has not been fetched")
def test_the_real_texts():
    texts = data.load_texts()
    # The paper has 4,200, 3,708, 10,605 and 5,190; eight are another domain's too.
    assert np.bincount(texts.domain).tolist() == [4200, 3706, 10604, 5185]
    splits = sentiment.splits_of(texts, sentiment.SENTIMENT.presets["default"].settings)
    for target in splits.train.targets.values():
        # The constants are the training rows'.
        known = target[~target.isnan()].double()
        assert known.mean().item() == pytest.approx(0, abs=1e-3)
        assert known.std(correction=0).item() == pytest.approx(1, abs=1e-3)
