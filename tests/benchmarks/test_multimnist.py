from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.data.images import Images
from benchmarks.multimnist import MULTIMNIST, source_digits
from benchmarks.overlay import compose

TASKS = ("top_left", "bottom_right")
QUICK = MULTIMNIST.presets["quick"].settings


@pytest.fixture(scope="module")
def parts():
    return source_digits("mnist_5k", None)


def _keys(digits):
    return {image.tobytes() for image in digits.images}


def test_no_source_digit_is_in_two_splits(parts):
    assert [len(part) for part in parts] == [4000, 200, 800]
    train, validation, test = map(_keys, parts)
    assert not train & test
    assert not train & validation
    assert not validation & test


def _marked(count):
    """Digits whose pixels all have the value 1 + their index, labelled index mod 10."""
    values = np.arange(1, count + 1, dtype=np.uint8)
    images = np.broadcast_to(values[:, None, None], (count, 28, 28)).copy()
    return Images(images, np.arange(count) % 10)


def test_canvas():
    split = compose(_marked(10), _marked(10), 40, 0, TASKS)
    assert split.inputs.shape == (40, 1, 36, 36)
    assert split.inputs.dtype == torch.uint8
    first, second = split.targets["top_left"] + 1, split.targets["bottom_right"] + 1
    for image, a, b in zip(split.inputs[:, 0], first, second, strict=True):
        assert (image[:28, :8] == a).all()  # only the first digit reaches here
        assert (image[:8, :28] == a).all()
        assert (image[8:, 28:] == b).all()  # and only the second one here
        assert (image[28:, 8:] == b).all()
        assert (image[8:28, 8:28] == torch.maximum(a, b)).all()
        assert (image[28:, :8] == 0).all()  # no digit reaches the other two corners
        assert (image[:8, 28:] == 0).all()


def test_every_digit_is_used_equally_often():
    split = compose(_marked(10), _marked(10), 35, 0, TASKS)
    for target in split.targets.values():
        assert set(torch.bincount(target, minlength=10).tolist()) == {3, 4}
    assert not torch.equal(split.targets["top_left"], split.targets["bottom_right"])


def test_composing_is_deterministic_and_independent_of_the_global_seed():
    torch.manual_seed(1)
    first = MULTIMNIST.load(QUICK, None)
    torch.manual_seed(2)
    second = MULTIMNIST.load(QUICK, None)
    digits = source_digits("mnist_5k", None)[0]
    other = compose(digits, digits, QUICK.train_size, 0, TASKS)
    assert torch.equal(first.train.inputs, second.train.inputs)
    assert torch.equal(first.test.targets["top_left"], second.test.targets["top_left"])
    assert not torch.equal(first.train.inputs, other.inputs)


def test_sizes_follow_the_settings():
    splits = MULTIMNIST.load(replace(QUICK, train_size=30, validation_size=20, test_size=10), None)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (30, 20, 10)


def test_full_keeps_the_official_test_digits(monkeypatch):
    digits = _marked(240)
    official = Images(digits.images[:20] + 200, digits.labels[:20])
    monkeypatch.setattr("benchmarks.multimnist.load_full", lambda root: (digits, official))
    train, validation, test = source_digits("mnist", None)
    assert (len(train), len(validation)) == (200, 40)
    assert not _keys(train) & _keys(validation)
    assert test is official


def test_unknown_data():
    with pytest.raises(ValueError, match="must be 'mnist_5k' or 'mnist', found 'fashion'"):
        source_digits("fashion", None)


def test_lenet_is_the_published_one():
    model = MULTIMNIST.build(["top_left", "bottom_right"])
    sizes = {name: tuple(p.shape) for name, p in model.named_parameters() if "weight" in name}
    assert sizes == {
        "conv1.weight": (10, 1, 9, 9),
        "conv2.weight": (20, 10, 5, 5),
        "fc.weight": (50, 500),
        "heads.top_left.weight": (10, 50),
        "heads.bottom_right.weight": (10, 50),
    }
    outputs = model(torch.zeros(3, 1, 36, 36, dtype=torch.uint8))
    assert {task: tuple(y.shape) for task, y in outputs.items()} == {
        "top_left": (3, 10),
        "bottom_right": (3, 10),
    }
