"""Options and hyperparameters out of range, and entry points that are reserved."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD

import gradbal
from gradbal import MultiTaskOptimizer
from tests.zoo import make

NAN, INF = float("nan"), float("inf")


def _sgd() -> SGD:
    return SGD(nn.Linear(2, 2).parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("name", "words"),
    [("cagrd", "`cagrad`"), ("UPGrad", "`upgrad`"), ("nash", "Known: .*nash_mtl"), ("", "Known")],
)
def test_an_unknown_aggregator_lists_near_misses(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=f"unknown aggregator.*{words}"):
        MultiTaskOptimizer(_sgd(), name)


def test_an_unknown_keyword_lists_near_misses() -> None:
    with pytest.raises(TypeError, match=r"'cagrad' has no keyword `rescal`.*`rescale`"):
        MultiTaskOptimizer(_sgd(), "cagrad", rescal=1)
    with pytest.raises(TypeError, match=r"'mean' has no keyword `c`"):
        MultiTaskOptimizer(_sgd(), "mean", c=0.4)
    with pytest.raises(TypeError, match="beside an instance"):
        MultiTaskOptimizer(_sgd(), gradbal.create("cagrad"), c=0.4)


@pytest.mark.parametrize("aggregator", [None, 3, gradbal.aggregators.base.GramianAggregator, SGD])
def test_an_aggregator_is_a_name_or_an_instance(aggregator: Any) -> None:
    with pytest.raises(TypeError, match="name or an Aggregator"):
        MultiTaskOptimizer(_sgd(), aggregator)


OUT_OF_RANGE: list[tuple[str, dict[str, Any], type[Exception]]] = [
    ("cagrad", {"c": 1.0}, ValueError),
    ("cagrad", {"c": -0.1}, ValueError),
    ("cagrad", {"c": NAN}, ValueError),
    ("cagrad", {"c": "0.5"}, TypeError),
    ("cagrad", {"c": True}, TypeError),
    ("cagrad", {"rescale": 3}, ValueError),
    ("cagrad", {"rescale": -1}, ValueError),
    ("cagrad", {"rescale": True}, ValueError),
    ("imtl_g", {"guard": None}, ValueError),
    ("imtl_g", {"guard": 1}, ValueError),
    ("mgda", {"norm": "l1"}, ValueError),
    ("mgda", {"norm": None}, ValueError),
    ("mgda", {"ignore_zero_rows": "yes"}, ValueError),
    ("nash_mtl", {"max_norm": -1.0}, ValueError),
    ("nash_mtl", {"max_norm": NAN}, ValueError),
    ("nash_mtl", {"max_norm": INF}, ValueError),
    ("nash_mtl", {"ridge": 0.0}, ValueError),
    ("nash_mtl", {"ridge": 1.5}, ValueError),
    ("nash_mtl", {"max_weight": 0.0}, ValueError),
    ("nash_mtl", {"max_weight": "100"}, TypeError),
    ("pcgrad", {"reduction": "max"}, ValueError),
    ("pcgrad", {"generator": 0}, TypeError),
    ("rlw", {"distribution": "cauchy"}, ValueError),
    ("rlw", {"generator": 0}, TypeError),
    ("upgrad", {"pref": [1.0, -1.0]}, ValueError),
    ("upgrad", {"pref": [1.0, NAN]}, ValueError),
    ("upgrad", {"pref": [1.0, INF]}, ValueError),
    ("upgrad", {"pref": 1.0}, (TypeError, ValueError)),
    ("uw", {"init": 11.0}, ValueError),
    ("uw", {"init": NAN}, ValueError),
    ("uw", {"kind": "ranking"}, ValueError),
    ("uw", {"kind": ["regression", "ranking"]}, ValueError),
    ("uw", {"lr": -0.1}, ValueError),
    ("uw", {"lr": INF}, ValueError),
    ("uw", {"weight_decay": -1.0}, ValueError),
    ("uw", {"clamp": 0.0}, ValueError),
    ("uw", {"clamp": NAN}, ValueError),
]


@pytest.mark.parametrize(("name", "keywords", "error"), OUT_OF_RANGE, ids=str)
def test_hyperparameters_out_of_range(name: str, keywords: dict[str, Any], error) -> None:
    sgd = _sgd()
    with pytest.raises(error, match=next(iter(keywords))):
        MultiTaskOptimizer(sgd, name, **keywords)
    assert len(sgd.param_groups) == 1


@pytest.mark.parametrize("keyword", ["c", "rescale", "max_norm", "clamp", "init"])
def test_the_limits_themselves_are_allowed(keyword: str) -> None:
    limits = {"c": ("cagrad", 0.0), "rescale": ("cagrad", 2), "max_norm": ("nash_mtl", 0)}
    limits |= {"clamp": ("uw", None), "init": ("uw", -10)}
    name, value = limits[keyword]
    assert getattr(gradbal.create(name, **{keyword: value}), keyword) == value


@pytest.mark.parametrize(
    ("name", "keywords", "words"),
    [
        ("upgrad", {"pref": [1.0, 1.0, 1.0]}, "pref.*2 tasks"),
        ("uw", {"kind": ["regression"]}, "kind.*2 tasks"),
    ],
)
def test_one_entry_for_each_task(name: str, keywords: dict[str, Any], words: str) -> None:
    layer = nn.Linear(2, 2)
    opt = MultiTaskOptimizer(SGD(layer.parameters(), lr=0.1), name, **keywords)
    y = layer(torch.ones(1, 2))
    with pytest.raises(ValueError, match=words):
        opt.backward([y.sum(), y.square().sum()])
    assert layer.weight.grad is None


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"heads": "mine"}, ValueError, "heads.*'own'.*found 'mine'"),
        ({"heads": True}, ValueError, "heads"),
        ({"jacobian": "lop"}, ValueError, "jacobian.*`loop`"),
        ({"jacobian": None}, ValueError, "jacobian"),
        ({"update_every": 0}, ValueError, "update_every.*positive integer.*found 0"),
        ({"update_every": -1}, ValueError, "update_every"),
        ({"update_every": 2.0}, ValueError, "update_every"),
        ({"update_every": True}, ValueError, "update_every"),
        ({"loss_transform": "exp"}, ValueError, "loss_transform.*'log'"),
        ({"nonfinite": "ignore"}, ValueError, "nonfinite.*'skip'.*'ignore'"),
        ({"nonfinite": None}, ValueError, "nonfinite"),
        ({"shared_params": []}, ValueError, "shared_params.*found none"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], error, words: str) -> None:
    sgd = _sgd()
    with pytest.raises(error, match=words):
        MultiTaskOptimizer(sgd, "uw", **options)
    assert len(sgd.param_groups) == 1


def test_shared_params_must_be_trained_ones() -> None:
    layer, stranger = nn.Linear(2, 2), nn.Linear(2, 2)
    both = [*layer.parameters(), stranger.weight]
    with pytest.raises(ValueError, match=r"shared_params.*1 of 3"):
        MultiTaskOptimizer(SGD(layer.parameters(), lr=0.1), shared_params=both)


def test_only_plain_optimizers_with_parameters_are_wrapped() -> None:
    layer = nn.Linear(2, 2)
    wrapped = MultiTaskOptimizer(SGD(layer.parameters(), lr=0.1))
    for wrong, found in ((layer, "Linear"), (SGD, "type"), (wrapped, "MultiTaskOptimizer")):
        with pytest.raises(TypeError, match=f"plain torch.optim.Optimizer, found {found}"):
            MultiTaskOptimizer(wrong)
    empty = SGD([{"params": []}], lr=0.1)
    with pytest.raises(ValueError, match="at least one parameter"):
        MultiTaskOptimizer(empty)


def test_lbfgs_takes_no_group_of_learnable_weights() -> None:
    lbfgs = LBFGS(nn.Linear(2, 2).parameters())
    with pytest.raises(ValueError, match="LBFGS"):
        MultiTaskOptimizer(lbfgs, "uw")
    assert len(lbfgs.param_groups) == 1


def test_a_direction_without_weights_allows_less() -> None:
    class First(gradbal.JacobianAggregator):
        """The first row."""

        def direction(self, jacobian, losses=None):
            return jacobian[0]

    with pytest.raises(ValueError, match="heads must be 'own'"):
        MultiTaskOptimizer(_sgd(), First(), heads="weighted")
    with pytest.raises(ValueError, match="update_every must be 1"):
        MultiTaskOptimizer(_sgd(), First(), update_every=2)


@pytest.mark.parametrize("aggregator", ["mgda", "upgrad", "cagrad", "mean", "rlw", "imtl_g"])
def test_match_sum_multiplies_the_shared_gradient_alone(aggregator: str) -> None:
    model, twin = make("Plain"), make("Plain")
    options = {}
    if aggregator == "rlw":
        options["generator"] = torch.Generator().manual_seed(1)
    plain = MultiTaskOptimizer(SGD(model.parameters(), lr=0.1), aggregator, **options)
    if options:
        options["generator"] = torch.Generator().manual_seed(1)
    opt = MultiTaskOptimizer(SGD(twin.parameters(), lr=0.1), aggregator, match_sum=True, **options)
    plain.backward(model.losses(model.batch()))
    opt.backward(twin.losses(twin.batch()))
    torch.testing.assert_close(opt.weights, 3 * plain.weights)
    for (n, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad * (3 if n.startswith("trunk") else 1))


@pytest.mark.parametrize("aggregator", ["sum", "pcgrad", "nash_mtl", "fairgrad"])
def test_match_sum_is_refused_where_d_has_a_scale_of_its_own(aggregator: str) -> None:
    with pytest.raises(ValueError, match=f"match_sum must be False for '{aggregator}'"):
        MultiTaskOptimizer(_sgd(), aggregator, match_sum=True)
    with pytest.raises(ValueError, match="`match_sum` must be one of False, True, found 3"):
        MultiTaskOptimizer(_sgd(), "mgda", match_sum=3)
