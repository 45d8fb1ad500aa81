"""A benchmark as a user has one, in a module of its own."""

from tests.benchmarks.reporting.records import SEVEN

OWN = SEVEN["census"]
