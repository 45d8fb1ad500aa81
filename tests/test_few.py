"""Steps of few numbers: the lane that ordinary ones take gives what the other way gives, and
whatever is not ordinary goes the other way."""

import copy
import io
import random

import pytest
import torch
from torch import nn

import gradbal
from gradbal import MultiTaskOptimizer
from gradbal._balancer import Balancer
from gradbal._few import Few, are_alike
from gradbal.aggregators.base import GramianAggregator
from gradbal.registry import create

N_TASKS = 3
ALIKE = [
    name for name in gradbal.list_aggregators() if name != "constant" and are_alike(create(name))
]


class Problem:
    """Three losses of two parameters, and an optimizer for them."""

    def __init__(self, method="mgda", dtype=torch.float64, **options):
        generator = torch.Generator().manual_seed(3)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.parameters = [nn.Parameter(draw(3)), nn.Parameter(draw(2, 2))]
        self.centres = [[draw(3), draw(2, 2)] for _ in range(N_TASKS)]
        adam = torch.optim.Adam(self.parameters, lr=0.05)
        self.optimizer = MultiTaskOptimizer(adam, method, **options)

    def losses(self):
        return [
            sum(
                (p - c).square().mul(i + 1.0).sum()
                for p, c in zip(self.parameters, cs, strict=True)
            )
            for i, cs in enumerate(self.centres)
        ]

    def step(self, losses=None, **options):
        self.optimizer.zero_grad()
        self.optimizer.backward(self.losses() if losses is None else losses, **options)
        self.optimizer.step()

    def outcome(self):
        opt = self.optimizer
        diagnostics = opt.diagnostics()
        return {
            "parameters": [p.detach().clone() for p in self.parameters],
            "grads": [None if p.grad is None else p.grad.clone() for p in self.parameters],
            "diagnostics": {k: repr(v) for k, v in diagnostics.items()},
            "outcome": [opt.weights, opt.gramian, opt.losses, opt._balancer.head_weights],
            "state": opt.state_dict(),
        }


@pytest.fixture
def lane(monkeypatch):
    """How many steps have gone the short way."""
    taken = []
    finish = Balancer.finish_few

    def counted(self, *arguments):
        finish(self, *arguments)
        taken.append(1)

    monkeypatch.setattr(Balancer, "finish_few", counted)
    return taken


@pytest.fixture
def without_lane(monkeypatch):
    """Sends all steps the other way, within `with`."""

    def run(function):
        with monkeypatch.context() as patch:
            patch.setattr(Few, "after", classmethod(lambda *_: None))
            return function()

    return run


def assert_same(found, expected):
    """Bit for bit: both ways do the same arithmetic."""
    for name in ("parameters", "grads", "outcome"):
        for a, b in zip(found[name], expected[name], strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert found["diagnostics"] == expected["diagnostics"]
    # The entry of gradbal's is a string that holds all tensors to the last bit.
    assert repr(found["state"]) == repr(expected["state"])


def test_most_methods_of_the_gramian_are_alike():
    others = [
        name
        for name in gradbal.list_aggregators()
        if name != "constant" and isinstance(create(name), GramianAggregator) and name not in ALIKE
    ]
    assert {"mgda", "upgrad", "pcgrad", "cagrad", "nash_mtl", "imtl_g"} <= set(ALIKE)
    # Those look at a representation or some columns, or have weights of their own to train.
    assert {"mgda_ub", "aligned_mtl_ub", "gradnorm", "imtl"} <= set(others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ALIKE)
def test_both_ways_agree_bit_for_bit(method, dtype, lane, without_lane):
    def run():
        torch.manual_seed(0)
        problem = Problem(method, dtype)
        for _ in range(6):
            problem.step()
        return problem.outcome()

    expected = without_lane(run)
    assert not lane
    found = run()
    # The first step finds out what the losses reach.
    assert len(lane) == 5
    assert_same(found, expected)


@pytest.mark.parametrize("form", ["list", "tuple", "dict", "mapping of numbers"])
def test_every_form_of_losses(form, lane, without_lane):
    forms = {
        "list": list,
        "tuple": tuple,
        "dict": lambda losses: dict(zip("abc", losses, strict=True)),
        "mapping of numbers": lambda losses: dict(enumerate(losses)),
    }

    def run():
        problem = Problem("upgrad")
        for _ in range(4):
            problem.step(forms[form](problem.losses()))
        return problem.outcome()

    expected = without_lane(run)
    found = run()
    assert len(lane) == 3
    assert_same(found, expected)


def nan(problem):
    losses = problem.losses()
    return [losses[0] * float("nan"), *losses[1:]]


def nan_gradient(problem):
    losses = problem.losses()
    p = problem.parameters[0]
    return [losses[0] + 0.0 * (p - p.detach()).abs().sqrt().sum(), *losses[1:]]


def too_steep(problem):
    """Gradients whose squares are inf."""
    losses = problem.losses()
    return [losses[0] * 1e180, *losses[1:]]


def reaches_less(problem):
    losses = problem.losses()
    return [problem.parameters[0].square().sum(), *losses[1:]]


def of_one_parameter(problem):
    return [p.square().sum() * i for p in problem.parameters[:1] for i in (1, 2, 3)]


def swapped(problem):
    return dict(reversed([*enumerate(problem.losses())]))


STEPS = {
    "plain": lambda problem: problem.step(),
    "nan": lambda problem: problem.step(nan(problem)),
    "nan gradient": lambda problem: problem.step(nan_gradient(problem)),
    "too steep": lambda problem: problem.step(too_steep(problem)),
    "reaches less": lambda problem: problem.step(reaches_less(problem)),
    "of one parameter": lambda problem: problem.step(of_one_parameter(problem)),
    "absent": lambda problem: problem.step([None, *problem.losses()[1:]]),
    "one tensor": lambda problem: problem.step(torch.stack(problem.losses())),
    "functions": lambda problem: problem.step(
        [lambda i=i: problem.losses()[i] for i in range(N_TASKS)]
    ),
    "other order": lambda problem: problem.step(swapped(problem)),
    "half": lambda problem: problem.step([loss.float() for loss in problem.losses()]),
    "kept graph": lambda problem: problem.step(retain_graph=True),
    "batch size": lambda problem: problem.step(batch_size=4),
    "unused scaler": lambda problem: problem.step(
        grad_scaler=torch.amp.GradScaler("cpu", enabled=False)
    ),
    "closure": lambda problem: problem.optimizer.step(problem.losses),
    "memory given back": lambda problem: problem.optimizer.zero_grad(free_buffers=True),
}


def accumulate(problem):
    problem.optimizer.zero_grad()
    problem.optimizer.backward([loss / 2 for loss in problem.losses()], accumulate=True)
    problem.optimizer.backward([loss / 2 for loss in problem.losses()])
    problem.optimizer.step()


def gradients_add_up(problem):
    problem.optimizer.zero_grad()
    problem.optimizer.backward(problem.losses())
    problem.optimizer.backward(problem.losses())
    problem.optimizer.step()


def frozen(problem):
    problem.parameters[1].requires_grad_(False)
    try:
        problem.step()
    finally:
        problem.parameters[1].requires_grad_()


def hooked(problem):
    handle = problem.parameters[0].register_hook(lambda g: g * 2)
    try:
        problem.step()
    finally:
        handle.remove()


def resumed(problem):
    buffer = io.BytesIO()
    torch.save(problem.optimizer.state_dict(), buffer)
    buffer.seek(0)
    problem.optimizer.load_state_dict(torch.load(buffer, weights_only=True))


def copied(problem):
    problem.parameters, problem.optimizer = copy.deepcopy((problem.parameters, problem.optimizer))


def cast(problem):
    # No step: Adam does not take parameters of another dtype than its state.
    problem.optimizer.zero_grad()
    for p in problem.parameters:
        p.data = p.data.float()
    problem.optimizer.backward(problem.losses())
    assert all(p.grad.dtype == torch.float32 for p in problem.parameters)
    problem.optimizer.zero_grad()
    for p in problem.parameters:
        p.data = p.data.double()


def scaled(problem):
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    problem.optimizer.zero_grad()
    problem.optimizer.backward(problem.losses(), grad_scaler=scaler)
    scaler.step(problem.optimizer)
    scaler.update()


STEPS |= {
    step.__name__: step
    for step in (accumulate, gradients_add_up, frozen, hooked, resumed, copied, cast, scaled)
}


def outcome_of(problem, names):
    """The outcome of such steps, and what their errors said."""
    errors = []
    for name in names:
        try:
            STEPS[name](problem)
        except ValueError as error:
            errors.append(str(error))
    return problem.outcome(), errors


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("nonfinite", ["raise", "skip", "drop"])
def test_other_steps_in_between(kind, nonfinite, lane, without_lane):
    names = ("plain", "plain", kind, kind, "plain", "plain", "plain")

    def run():
        return outcome_of(Problem("upgrad", nonfinite=nonfinite), names)

    expected, errors = without_lane(run)
    found, found_errors = run()
    assert_same(found, expected)
    assert found_errors == errors
    is_bad = kind in ("nan", "nan gradient", "too steep")
    assert len(errors) == (2 if nonfinite == "raise" and is_bad else 0)
    assert all("must be finite" in error for error in errors)
    assert len(lane) >= 3


@pytest.mark.parametrize("seed", range(40))
def test_any_steps_in_any_order(seed, lane, without_lane):
    dice = random.Random(seed)
    names = [dice.choice(["plain", dice.choice([*STEPS])]) for _ in range(25)]
    method, nonfinite = dice.choice(ALIKE), dice.choice(["raise", "skip", "drop"])

    def run():
        torch.manual_seed(0)
        # Errors: something is not finite, or too few tasks are left for Krum.
        return outcome_of(Problem(method, nonfinite=nonfinite), names)

    expected, errors = without_lane(run)
    found, found_errors = run()
    assert_same(found, expected)
    assert found_errors == errors
    assert lane


class Stopped(BaseException):
    """Like an interrupt."""


def raise_stopped(*_):
    raise Stopped


def in_prepare(problem, monkeypatch):
    monkeypatch.setattr(type(problem.optimizer.aggregator), "prepare", raise_stopped)


def in_weights(problem, monkeypatch):
    aggregator = problem.optimizer.aggregator
    weights = type(aggregator).weights

    def stopped(*arguments):
        weights(aggregator, *arguments)
        raise Stopped

    monkeypatch.setattr(aggregator, "weights", stopped)


def in_a_hook(problem, _):
    problem.parameters[1].register_post_accumulate_grad_hook(raise_stopped)


def in_a_pass(problem, _):
    problem.centres[2][0] = Broken.apply(problem.parameters[0])


class Broken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        raise Stopped


@pytest.mark.parametrize("method", ["pcgrad", "nash_mtl", "mgda"])
@pytest.mark.parametrize("where", [in_prepare, in_weights, in_a_hook, in_a_pass])
def test_an_error_changes_nothing(method, where, lane, monkeypatch):
    torch.manual_seed(0)
    problem = Problem(method)
    for _ in range(3):
        problem.step()
    assert len(lane) == 2
    problem.optimizer.zero_grad()
    before = problem.outcome()
    with monkeypatch.context() as patch:
        where(problem, patch)
        with pytest.raises(Stopped):
            problem.optimizer.backward(problem.losses())
    problem.optimizer.zero_grad()
    assert_same(problem.outcome(), before)
    assert len(lane) == 2


def test_a_step_that_is_booked_stays(monkeypatch):
    """An interrupt that comes between the booking and the end of `backward` undoes no half."""
    whole, stopped = Problem("pcgrad"), Problem("pcgrad")
    finish = Balancer.finish_few

    def then_stopped(self, *arguments):
        finish(self, *arguments)
        raise Stopped

    torch.manual_seed(0)
    for _ in range(3):
        whole.step()
    torch.manual_seed(0)
    for _ in range(2):
        stopped.step()
    stopped.optimizer.zero_grad()
    with monkeypatch.context() as patch:
        patch.setattr(Balancer, "finish_few", then_stopped)
        with pytest.raises(Stopped):
            stopped.optimizer.backward(stopped.losses())
    stopped.optimizer.step()
    assert_same(stopped.outcome(), whole.outcome())


def test_many_numbers_go_the_other_way(lane):
    model = nn.Linear(20, 10)
    optimizer = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), "mgda")
    for _ in range(3):
        optimizer.zero_grad()
        output = model(torch.ones(4, 20))
        optimizer.backward([output.square().mean(), output.exp().mean()])
        optimizer.step()
    assert not lane


def test_parameters_of_single_tasks_go_the_other_way(lane):
    shared, own = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = MultiTaskOptimizer(torch.optim.SGD([shared, own], lr=0.1), "mgda")
    for _ in range(3):
        optimizer.zero_grad()
        optimizer.backward([(shared * own).square().sum(), (shared - 3).square().sum()])
        optimizer.step()
    assert not lane


@pytest.mark.parametrize(
    "options",
    [
        {"update_every": 2},
        {"loss_transform": "log"},
        {"match_sum": True},
        {"jacobian": "vmap"},
        {"jacobian": "gramian"},
    ],
)
def test_options_that_go_the_other_way(options, lane):
    problem = Problem("mgda", torch.float32, **options)
    for _ in range(4):
        problem.step()
    assert not lane
