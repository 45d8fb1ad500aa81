"""`speed overhead`: the contestants do the same work, and the command says what it found."""

import re

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.cli import app
from benchmarks.speed.counting import Operators
from benchmarks.speed.overhead import METHODS, losses_of, measure, plain, steps_of


def run(*arguments):
    return CliRunner().invoke(app, ["speed", "overhead", *arguments], env={"COLUMNS": "200"})


def test_the_problem_is_that_of_the_papers():
    # In the middle of the Pareto set both are -15.09, the first one times 0.1.
    first, second = losses_of(torch.tensor([0.0, -8.355], dtype=torch.float64))
    assert float(first) == pytest.approx(-1.509, abs=1e-3)
    assert float(second) == pytest.approx(-15.09, abs=1e-2)


def operators(step):
    for _ in range(3):
        step()
    with Operators() as found:
        step()
    return found.count


@pytest.mark.parametrize(
    ("method", "at_most"), [("mgda", 4), ("upgrad", 4), ("cagrad", 5), ("mean", 3)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_has_few_operators_beyond_autograds(method, at_most, dtype):
    """Each takes one to five microseconds, more than all of the arithmetic."""
    steps = steps_of(method, dtype)
    bare = operators(plain(steps.passes, 1, dtype).step)
    assert 0 < operators(steps.step) - bare <= at_most


def test_measure_compares_with_as_many_passes():
    rows = {row.name: row for row in measure(["mgda", "mean", "famo"], 1, 2)}
    assert [(row.passes, row.forwards) for row in rows.values()][:3] == [(1, 1), (1, 2), (2, 1)]
    assert (rows["mgda"].passes, rows["mean"].passes) == (2, 1)
    assert (rows["famo"].passes, rows["famo"].forwards) == (1, 2)
    assert "TorchJD mgda" in rows
    for row in rows.values():
        assert row.beyond == pytest.approx(row.step - row.plain)
        assert row.ratio == pytest.approx(row.step / row.plain)


def test_the_command_prints_a_line_a_contestant():
    done = run("--methods", "mgda,uw", "--rounds", "1", "--steps", "2", "--dtype", "float64")
    assert done.exit_code == 0
    for name in ("mgda", "uw", "TorchJD mgda", "autograd, 1 forward, 2 backward"):
        assert re.search(rf"│ {name} +│ +[12] │ +1 │ +\d+ │ +\d+ │ +-?\d+ │", done.output)
    assert set(METHODS) >= {"mgda", "uw"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--methods", "nothing"), "must be registered"),
        (("--rounds", "0"), "must be positive"),
        (("--dtype", "int8"), "must be float32 or float64"),
    ],
)
def test_the_command_says_what_is_wrong(arguments, message):
    done = run(*arguments)
    assert done.exit_code != 0
    assert message in done.output
