import numpy as np
import pytest
import torch

from benchmarks.measures import Auroc, Correlation, UnitError


def _compute(meter, output, target):
    for part in (slice(0, 7), slice(7, None)):
        meter.update(output[part], target[part])
    return meter.compute().item()


@pytest.fixture
def pair():
    generator = np.random.default_rng(0)
    target = generator.normal(size=40)
    return target + generator.normal(size=40), target


def test_error_in_the_unit(pair):
    output, target = pair
    found = _compute(UnitError(300.0, 50.0), *map(torch.from_numpy, pair))
    assert found == pytest.approx(50 * np.abs(output - target).mean())


def test_error_of_logarithms_in_the_unit(pair):
    output, target = pair
    found = _compute(UnitError(6.9, 0.25, True), *map(torch.from_numpy, pair))
    values = [np.exp(6.9 + 0.25 * each) for each in (output, target)]
    assert found == pytest.approx(np.abs(values[0] - values[1]).mean())


def test_the_error_of_a_wild_output_is_finite():
    meter = UnitError(6.9, 0.25, True)
    meter.update(torch.tensor([1e6]), torch.tensor([0.0]))
    assert 1e30 < meter.compute() < float("inf")


def test_correlation(pair):
    found = _compute(Correlation(), *map(torch.from_numpy, pair))
    assert found == pytest.approx(np.corrcoef(*pair)[0, 1])


def test_correlation_of_a_constant():
    assert _compute(Correlation(), torch.ones(40), torch.arange(40.0)) == 0


def test_area_of_logits_far_out():
    target = torch.tensor([0, 1, 0, 1])
    meter = Auroc()
    meter.update(torch.tensor([40.0, 41.0, 39.0, 39.5]), target)
    assert meter.compute() == 0.75  # one of the four pairs is the wrong way round
