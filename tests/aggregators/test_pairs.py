"""Two tasks: weights in closed form are those of the solvers for any number of tasks."""

import numpy as np
import pytest
import torch

from gradbal.aggregators import _gramians
from gradbal.registry import create

METHODS = [
    ("mgda", {}),
    ("mgda", {"norm": "l2"}),
    ("mgda", {"norm": "loss+"}),
    ("mgda", {"ignore_zero_rows": True}),
    ("upgrad", {}),
    ("upgrad", {"pref": [0.3, 2.0]}),
    ("nash_mtl", {"max_norm": 0.0}),
    ("nash_mtl", {"max_norm": 0.0, "ridge": 1e-5}),
]


def gramian(cosine, first, second):
    product = cosine * first * second
    return torch.tensor([[first**2, product], [product, second**2]], dtype=torch.float64)


@pytest.mark.parametrize(("method", "options"), METHODS)
@pytest.mark.parametrize("cosine", [-1.0, -1 + 1e-9, -1 + 1e-5, -0.9, -0.3, 0.0, 0.2, 0.97, 1.0])
@pytest.mark.parametrize("norms", [(1.0, 1.0), (3.0, 0.5), (1e-4, 1e3), (1e8, 1e-6)])
def test_closed_form_and_solver_agree(method, options, cosine, norms, monkeypatch):
    aggregator, g = create(method, **options), gramian(cosine, *norms)
    losses = torch.tensor([0.7, 3.0], dtype=torch.float64)
    with monkeypatch.context() as patch:
        patch.setattr(_gramians, "_of_pair", lambda *_: None)
        expected = aggregator.weights(g, losses).numpy()
    found = aggregator.weights(g, losses).numpy()
    units = np.array(norms)
    np.testing.assert_allclose(found * units, expected * units, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("method", "options"), METHODS)
def test_the_closed_form_is_what_runs(method, options, monkeypatch):
    aggregator, losses = create(method, **options), torch.ones(2, dtype=torch.float64)
    monkeypatch.setattr(_gramians, "symmetric_float64", None)
    assert aggregator.weights(gramian(-0.4, 2.0, 1.0), losses).isfinite().all()
