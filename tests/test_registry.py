"""The registry: names, near misses, metadata, and methods of the user's own."""

import subprocess
import sys

import pytest
import torch

import gradbal


@pytest.fixture
def clean():
    before = set(gradbal.list_aggregators())
    yield
    for name in set(gradbal.list_aggregators()) - before:
        gradbal.registry.unregister(name)


def test_the_first_ten_methods_are_there():
    expected = {"mean", "sum", "rlw", "uw", "pcgrad", "mgda", "upgrad", "cagrad", "nash_mtl"}
    assert expected | {"imtl_g"} <= set(gradbal.list_aggregators())


def test_listing_takes_a_shell_pattern():
    found = ["aligned_mtl", "db_mtl", "excess_mtl", "imtl_g", "nash_mtl"]
    assert gradbal.list_aggregators("*mtl*") == found
    assert gradbal.list_aggregators("nothing*") == []


def test_an_unknown_name_lists_the_near_misses():
    with pytest.raises(ValueError, match=r"unknown aggregator 'nashmtl'; did you mean `nash_mtl`"):
        gradbal.create("nashmtl")
    with pytest.raises(ValueError, match="Known: aligned_mtl, cagrad, "):
        gradbal.info("zzz")


def test_an_unknown_keyword_lists_the_near_misses_and_what_there_is():
    with pytest.raises(TypeError, match=r"no keyword `rescal`; did you mean `rescale`\?.*c=0.5"):
        gradbal.create("cagrad", rescal=1)
    with pytest.raises(TypeError, match="'mean' has no keyword `c` It takes: none"):
        gradbal.create("mean", c=1)


def test_an_entry_is_data():
    entry = gradbal.info("mgda")
    assert entry.kind == "gramian"
    assert (entry.venue, entry.year) == ("Comptes Rendus Mathématique", 2012)
    assert entry.hyperparameters == {"norm": "none", "ignore_zero_rows": False}
    assert entry.consumes == "Gramian"
    assert entry.cost == "T backwards"
    assert gradbal.info("rlw").cost == "1 backward"
    assert entry.summary.startswith("The convex combination of the gradients")


def test_a_registered_class_is_found_by_name_everywhere(clean):
    @gradbal.register("mine", venue="here", year=2026)
    class Mine(gradbal.GramianAggregator):
        """All on the last task. More words."""

        def __init__(self, power: float = 2.0) -> None:
            self.power = power

        def weights(self, gramian, losses=None):
            w = torch.zeros(len(gramian), dtype=gramian.dtype)
            w[-1] = self.power
            return w

    assert repr(gradbal.create("mine", power=3.0)) == "Mine(power=3.0)"
    assert gradbal.info("mine").summary == "All on the last task"
    assert gradbal.info("mine").hyperparameters == {"power": 2.0}
    model = torch.nn.Linear(3, 2)
    opt = gradbal.MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=1), "mine", power=1.0)
    x = torch.randn(4, 3)
    opt.backward(list(model(x).pow(2).mean(0)))
    wanted = torch.autograd.grad(model(x).pow(2).mean(0)[-1], model.weight)[0]
    torch.testing.assert_close(model.weight.grad, wanted)


def test_registering_twice_or_the_wrong_thing_is_an_error(clean):
    class Mine(gradbal.Scalarizer):
        def scalarize(self, losses):
            return losses.max()

    with pytest.raises(ValueError, match="the name 'mgda' is taken by MGDA"):
        gradbal.register("mgda")(Mine)
    with pytest.raises(ValueError, match="lower_case"):
        gradbal.register("My Method")(Mine)
    with pytest.raises(TypeError, match="takes a subclass of Scalarizer"):
        gradbal.register("mine")(dict)
    assert "mine" not in gradbal.list_aggregators()


def test_importing_gradbal_imports_nothing_heavy_beside_torch():
    code = (
        "import sys, torch, numpy; before = set(sys.modules); import gradbal; "
        "print({m.split('.')[0] for m in set(sys.modules) - before})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    added = eval(done.stdout)
    outside = {m for m in added if m not in sys.stdlib_module_names and m not in ("torch", "numpy")}
    assert outside == {"gradbal"}
