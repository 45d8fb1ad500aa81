"""Settings of all tests: one thread, a fixed seed before each test, hypothesis profiles."""

import os

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile(
    "default",
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile("thorough", max_examples=1000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# Several threads make these small problems slower, and sums irreproducible.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--thorough", action="store_true", help="many more random examples")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--thorough"):
        hypothesis.settings.load_profile("thorough")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
