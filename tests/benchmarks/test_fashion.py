import gzip
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import fashion
from benchmarks.data import fashion as data
from benchmarks.data.images import Images
from benchmarks.training import Learner, evaluate, train
from tests.benchmarks.packing import deb, is_cached, put
from tests.benchmarks.test_mnist import _idx

FOLDER = "./usr/share/datasets/fashion-mnist"
QUICK = fashion.MULTI_FASHION.presets["quick"].settings


def _clothes(count, seed):
    """Images whose brightness grows with the class, and which are told apart by their noise."""
    labels = np.arange(count) % 10
    noise = np.random.default_rng(seed).integers(0, 15, (count, 28, 28))
    return (noise + 24 * labels[:, None, None]).astype(np.uint8), labels


@pytest.fixture
def root(tmp_path, monkeypatch):
    files = {}
    for seed, (part, count) in enumerate((("train", 240), ("t10k", 50))):
        images, labels = _clothes(count, seed)
        files[f"{FOLDER}/{part}-images-idx3-ubyte.gz"] = gzip.compress(_idx(images), 1)
        files[f"{FOLDER}/{part}-labels-idx1-ubyte.gz"] = gzip.compress(_idx(labels))
    return put(monkeypatch, data, deb(files), tmp_path / "data")


def test_images_are_those_of_the_package(root):
    train_images, test_images = data.load_fashion(root)
    for found, (images, labels) in (
        (train_images, _clothes(240, 0)),
        (test_images, _clothes(50, 1)),
    ):
        assert np.array_equal(found.images, images)
        assert np.array_equal(found.labels, labels)


def test_the_sample_is_even_and_always_the_same(root, monkeypatch):
    monkeypatch.setattr(data, "_SAMPLE", 200)
    first = data.load_fashion_5k(root)
    (root / data.ARCHIVE.file_name).unlink()
    second = data.load_fashion_5k(root)
    assert np.bincount(first.labels).tolist() == [20] * 10
    assert np.array_equal(first.images, second.images)
    everything, _ = _clothes(240, 0)
    known = {image.tobytes() for image in everything}
    assert len({image.tobytes() for image in first.images} & known) == 200


@pytest.mark.parametrize("name", ["5k", "all"])
def test_no_source_image_is_in_two_splits(root, name):
    parts = fashion.source_clothes(name, root)
    keys = [{image.tobytes() for image in part.images} for part in parts]
    assert sum(map(len, keys)) == len(set.union(*keys))
    if name == "all":
        assert len(parts[2]) == 50  # the official test images


def test_unknown_data(root):
    with pytest.raises(ValueError, match="must be '5k' or 'all', found 'mnist'"):
        fashion.source_clothes("mnist", root)


def test_a_digit_at_the_top_left_and_clothing_at_the_bottom_right(root, monkeypatch):
    digits = Images(np.full((20, 28, 28), 250, np.uint8), np.full(20, 7))
    monkeypatch.setattr(fashion, "source_digits", lambda name, folder: (digits,) * 3)
    splits = fashion.FASHION_AND_MNIST.load(replace(QUICK, train_size=30), root)
    assert (splits.train.targets["digit"] == 7).all()
    assert (splits.train.inputs[:, 0, :28, :28] == 250).all()
    brightness = splits.train.inputs[:, 0, 28:, 28:].float().mean((1, 2))
    assert torch.equal((brightness / 24).int(), splits.train.targets["clothing"].int())


def test_the_digits_that_go_with_the_data(root, monkeypatch):
    asked = []
    digits = (Images(*_clothes(20, 3)),) * 3
    monkeypatch.setattr(
        fashion, "source_digits", lambda name, folder: (asked.append(name), digits)[1]
    )
    for name in ("5k", "all"):
        fashion.FASHION_AND_MNIST.load(replace(QUICK, data=name), root)
    assert asked == ["mnist_5k", "mnist"]


def test_it_learns(root):
    sizes = {"train_size": 320, "validation_size": 40, "test_size": 100}
    settings = replace(QUICK, **sizes, epochs=4, lr=5e-3, batch_size=32)
    splits = fashion.MULTI_FASHION.load(settings, root)
    learner = Learner(fashion.MULTI_FASHION, settings, fashion.MULTI_FASHION.tasks, "upgrad", 0)
    train(learner, splits, settings, 0, lambda: None)
    for measures in evaluate(learner, splits.test).values():
        assert measures["accuracy"] > 0.25  # 0.1 is a guess


@pytest.mark.skipif(not is_cached(data.ARCHIVE), reason="the package has not been fetched")
def test_the_real_images():
    train_images, test_images = data.load_fashion()
    assert (len(train_images), len(test_images)) == (60_000, 10_000)
    # The mean that everybody normalises by.
    assert train_images.images.mean() / 255 == pytest.approx(0.2860, abs=5e-5)
    assert np.bincount(train_images.labels).tolist() == [6000] * 10
    # An ankle boot is the first, as in the data set's own description.
    assert train_images.labels[0] == 9
