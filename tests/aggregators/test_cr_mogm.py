"""CR-MOGM: the average in closed form, around every method that has weights."""

import copy
import io

import numpy as np
import pytest
import torch
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import LambdaLR

import gradbal
from gradbal import MultiTaskOptimizer
from gradbal.aggregators.cr_mogm import cr_mogm
from tests.aggregators.inputs import make as fresh_method
from tests.aggregators.inputs import random_rows
from tests.gradients import assert_gradients, task_gradients
from tests.states import assert_same, snapshot
from tests.zoo import make


def wraps(name):
    """Whether CR-MOGM takes the method."""
    made = gradbal.create(name)
    return made.category in ("gramian", "scalarizer") and not (
        made.param_groups() or name == "cr_mogm"
    )


INSIDE = [name for name in gradbal.list_aggregators() if wraps(name)]
BY_NORM = ("fairgrad", "gradnorm_inverse", "nash_mtl")
TRAINED = [n for n in INSIDE if not gradbal.create(n).needs_features]


def rows(n_steps, n_tasks=4, width=9):
    return [torch.from_numpy(random_rows(n_tasks, width, s) - 0.3) for s in range(n_steps)]


def losses(n_steps, n_tasks=4):
    return torch.from_numpy(np.random.default_rng(0).uniform(1.1, 3, (n_steps, n_tasks)))


def fresh_weights(name, jacobians, values, **options):
    """ŵ of each step, of a method inside on its own."""
    method = fresh_method(name, **options)
    for j, l in zip(jacobians, values, strict=True):
        if isinstance(method, gradbal.Scalarizer):
            yield method.loss_weights(l)
        else:
            yield method.weights(j @ j.T, l)


def averaged(weights, a):
    """`a^{k−1} ŵ_1 + (1−a) Σ_j a^{k−j} ŵ_j` for each k."""
    weights = list(weights)
    for k in range(len(weights)):
        total = a**k * weights[0]
        for j in range(1, k + 1):
            total = total + (1 - a) * a ** (k - j) * weights[j]
        yield total


@pytest.mark.parametrize("a", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("name", INSIDE)
def test_the_average_of_all_weights_so_far(name, a):
    jacobians, values = rows(5), losses(5)
    n = [j.norm(dim=1) if name in BY_NORM else torch.ones(4) for j in jacobians]
    inside = fresh_weights(name, jacobians, values)
    scaled = (w * norms for w, norms in zip(inside, n, strict=True))
    method = gradbal.create("cr_mogm", inner=fresh_method(name), a=a)
    steps = zip(jacobians, values, n, averaged(scaled, a), strict=True)
    for j, l, norms, wanted in steps:
        w = method.weights(j @ j.T, l)
        torch.testing.assert_close(w, wanted / norms, rtol=1e-10, atol=1e-12)
        found = method.head_weights(w, j @ j.T)
        if name not in ("nash_mtl", "fairgrad"):
            assert found is w


@pytest.mark.parametrize("name", INSIDE)
def test_without_a_past_it_is_the_method_inside(name):
    wrapped, plain = gradbal.create("cr_mogm", inner=fresh_method(name), a=0.0), fresh_method(name)
    for j, l in zip(rows(4), losses(4), strict=True):
        torch.testing.assert_close(wrapped.direction(j, l), plain.direction(j, l))


@pytest.mark.parametrize("name", INSIDE)
def test_with_the_past_alone_the_first_weights_stay(name):
    method = gradbal.create("cr_mogm", inner=fresh_method(name), a=1.0)
    j = rows(1)[0]
    first = method.weights(j @ j.T, losses(1)[0])
    for other, l in zip(rows(5)[1:], losses(4), strict=True):
        other = torch.nn.functional.normalize(other) * j.norm(dim=1, keepdim=True)
        torch.testing.assert_close(method.weights(other @ other.T, l), first)


def test_two_steps_by_hand():
    method = gradbal.create("cr_mogm", a=0.75)
    # MGDA at orthogonal rows: w in proportion to 1/G_ii.
    w = method.weights(torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64)))
    torch.testing.assert_close(w, torch.tensor([0.75, 0.25], dtype=torch.float64))
    w = method.weights(torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64)))
    torch.testing.assert_close(w, torch.tensor([0.625, 0.375], dtype=torch.float64))


@pytest.mark.parametrize("name", ["mgda", "rlw", "rgw"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_simplex_is_not_left(name, dtype):
    method = gradbal.create("cr_mogm", inner=fresh_method(name), a=0.6)
    assert method.promises.simplex
    for j in rows(200):
        w = method.weights((j @ j.T).to(dtype))
        assert w.dtype == dtype
        assert (w >= 0).all()
        assert float(w.sum()) == pytest.approx(1, abs=1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("a", [0.1, 0.5, 0.9, 1 / 3])
def test_constant_weights_stay_exactly(a):
    method = gradbal.create("cr_mogm", a=a)
    g = rows(1)[0] @ rows(1)[0].T
    first = method.weights(g)
    assert all(torch.equal(method.weights(g), first) for _ in range(20))


def test_the_default_is_mgda_with_nine_tenths_of_the_past():
    method = gradbal.create("cr_mogm")
    assert (method.inner.name, method.a) == ("mgda", 0.9)


@pytest.mark.parametrize("name", BY_NORM)
def test_weights_like_inverse_norms_are_averaged_row_by_row(name):
    """Rows scaled anew at every step: an average of the weights themselves would be that of the
    steps at which a row was small."""
    rng = np.random.default_rng(0)
    one, other = (gradbal.create("cr_mogm", inner=name, a=0.7) for _ in range(2))
    for j in rows(6):
        scales = torch.from_numpy(10 ** rng.uniform(-4, 4, (4, 1)))
        d = one.direction(j)
        torch.testing.assert_close(other.direction(scales * j), d, rtol=1e-7, atol=1e-10)
    wanted = one.weights(j @ j.T)
    h = (scales * j) @ (scales * j).T
    w = other.weights(h)
    torch.testing.assert_close(w * scales[:, 0], wanted, rtol=1e-7, atol=0)


def test_inverse_norms_are_not_smoothed_at_all():
    # w_i |g_i| is one, whatever the norms are.
    wrapped, plain = (
        gradbal.create("cr_mogm", inner="gradnorm_inverse"),
        gradbal.create("gradnorm_inverse"),
    )
    for j in rows(5):
        torch.testing.assert_close(wrapped.direction(j), plain.direction(j))


@pytest.mark.parametrize("name", BY_NORM)
def test_a_zero_row_keeps_its_average_and_has_no_weight(name):
    method = gradbal.create("cr_mogm", inner=name, a=0.5)
    j = rows(1)[0]
    j[2] = 0.0
    method.weights(j @ j.T)
    assert method.average[2].isnan()
    other = rows(2)[1]
    first = method.weights(other @ other.T)
    before = method.average[2].clone()
    assert before == first[2] * other[2].norm()
    w = method.weights(j @ j.T)
    assert w[2] == 0
    assert method.average[2] == before
    assert w.isfinite().all()
    all_zero = method.weights(torch.zeros(4, 4))
    assert (all_zero > 0).all()
    assert all_zero.isfinite().all()


def test_the_function():
    average = torch.tensor([0.2, float("nan"), 1.0], dtype=torch.float64)
    fresh = torch.tensor([0.6, 0.5, 0.0], dtype=torch.float64)
    after, w = cr_mogm(average, fresh, 0.75)
    torch.testing.assert_close(after, torch.tensor([0.3, 0.5, 0.75], dtype=torch.float64))
    assert torch.equal(after, w)
    norms = torch.tensor([2.0, 4.0, 0.0], dtype=torch.float64)
    after, w = cr_mogm(average, fresh, 0.75, norms=norms)
    torch.testing.assert_close(after, torch.tensor([0.45, 2.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(w, torch.tensor([0.225, 0.5, 0.0], dtype=torch.float64))


# Through the optimizer.


def optimizer(model, lr=0.1, kind=SGD, **options):
    names = ("inner", "a", "options")
    keywords = {k: options.pop(k) for k in names if k in options}
    method = gradbal.create("cr_mogm", **keywords)
    return MultiTaskOptimizer(kind(model.parameters(), lr=lr), method, **options)


def step(model, opt):
    opt.zero_grad()
    opt.backward(model.losses(model.batch()))
    opt.step()


@pytest.mark.parametrize("name", TRAINED)
def test_heads_are_as_the_method_inside_has_them(name):
    model = make("Plain")
    opt = optimizer(model, inner=fresh_method(name), a=0.8)
    own = gradbal.info(name).promises.heads == "own"
    for _ in range(3):
        gradients, _ = task_gradients(model, lambda twin: twin.losses(twin.batch()))
        step(model, opt)
        w = opt.weights
        wanted = {}
        for i, row in enumerate(gradients):
            for n, g in row.items():
                if "trunk" in n:
                    wanted[n] = wanted.get(n, 0) + w[i] * g
                elif own:
                    wanted[n] = g
                elif name != "nash_mtl":
                    wanted[n] = w[i] * g
        if name == "nash_mtl":
            heads = {n: g for row in gradients for n, g in row.items() if "heads" in n}
            h = opt.aggregator.head_weights(None, None)
            wanted |= {n: h[int(n.split(".")[1])] * g for n, g in heads.items()}
        assert_gradients(model, wanted, 1e-9)


def test_weights_of_heads_that_are_other_ones_have_an_average_too():
    jacobians = rows(5)
    n = [j.norm(dim=1) for j in jacobians]
    inside = gradbal.create("nash_mtl", max_norm=0.1)
    heads = []
    for j, norms in zip(jacobians, n, strict=True):
        g = j @ j.T
        heads.append(inside.head_weights(inside.weights(g), g) * norms)
    method = gradbal.create("cr_mogm", inner="nash_mtl", a=0.6, options={"max_norm": 0.1})
    for j, norms, wanted in zip(jacobians, n, averaged(heads, 0.6), strict=True):
        g = j @ j.T
        w = method.weights(g)
        torch.testing.assert_close(method.head_weights(w, g) * norms, wanted)
        assert (method.head_weights(w, g) > 2 * w).all()


@pytest.mark.parametrize(
    ("rates", "past"),
    [
        ([1.0, 0.5, 0.5, 0.125], [0, 0.5, 0.5, 0.875]),
        # Above the first one, as in a warm-up, there is no past; nor before there is a first one.
        ([0.5, 1.0, 0.25], [0, 0, 0.5]),
        ([0.0, 2.0, 1.0], [0, 0, 0.5]),
    ],
)
def test_the_schedule_of_the_learning_rate(rates, past):
    model, lr = make("Plain"), 0.01
    opt = optimizer(model, lr=lr, inner="mgda", a="lr")
    scheduler = LambdaLR(opt, lambda k: rates[min(k, len(rates) - 1)])
    inside, average = gradbal.create("mgda"), None
    for a in past:
        gradients, _ = task_gradients(model, lambda twin: twin.losses(twin.batch()))
        step(model, opt)
        trunk = ("trunk.0.weight", "trunk.0.bias")
        j = torch.stack([torch.cat([row[n].flatten() for n in trunk]) for row in gradients])
        fresh = inside.weights(j @ j.T)
        average = fresh if average is None else a * average + (1 - a) * fresh
        torch.testing.assert_close(opt.weights, average)
        scheduler.step()
    first = next(rate for rate in rates if rate)
    assert opt.aggregator.first_lr == pytest.approx(lr * first)


def test_a_schedule_without_a_learning_rate_is_an_error_that_changes_nothing():
    method = gradbal.create("cr_mogm", inner=fresh_method("pcgrad"), a="lr")
    before = copy.deepcopy(method.state_dict())
    with pytest.raises(ValueError, match=r'a="lr" needs the learning rate.*found None'):
        method.weights(torch.eye(3))
    assert_same(method.state_dict(), before)
    method.learning_rate = 0.1
    method.weights(torch.eye(3))


def test_match_sum_goes_by_the_gain_of_the_method_inside():
    model, twin = make("Plain"), make("Plain")
    one, other = optimizer(model, inner="mgda", match_sum=True), optimizer(twin, inner="mgda")
    one.backward(model.losses(model.batch()))
    other.backward(twin.losses(twin.batch()))
    torch.testing.assert_close(one.weights, 3 * other.weights)
    with pytest.raises(ValueError, match="match_sum must be False for 'cr_mogm'"):
        optimizer(model, inner="sum", match_sum=True)


@pytest.mark.parametrize("inner", ["mgda", "rlw"])
def test_a_task_that_sits_out_keeps_its_average(inner):
    model = make("Plain")
    opt = optimizer(model, inner=fresh_method(inner), nonfinite="drop", a=0.5)
    for spoil in (True, False, True):
        before = opt.aggregator.average.clone()
        losses = model.losses(model.batch())
        if spoil:
            losses[1] = losses[1] * float("nan")
        opt.zero_grad()
        opt.backward(losses)
        opt.step()
        average = opt.aggregator.average
        if len(before) == 0:
            assert average.isnan().tolist() == [False, True, False]
        elif spoil:
            assert average[1] == before[1]
            assert opt.weights[1] == 0
            assert torch.equal(opt.weights[[0, 2]], average[[0, 2]])
            assert not torch.equal(average[[0, 2]], before[[0, 2]])
        else:
            assert average.isfinite().all()


def test_tasks_are_named_to_a_method_that_has_to_know_them():
    inside = gradbal.create("config", a=[1.0, 5.0, 2.0])
    method = gradbal.create("cr_mogm", inner=inside)
    method.prepare(3, torch.zeros(()))
    j = rows(1, 3)[0][[0, 2]]
    wanted = inside.weights(j @ j.T, tasks=[0, 2])
    torch.testing.assert_close(method.weights(j @ j.T, tasks=[0, 2]), wanted)
    plain = gradbal.create("cr_mogm", inner="mgda")
    plain.prepare(3, torch.zeros(()))
    plain.weights(j @ j.T, tasks=[0, 2])


INNER = [
    ("pcgrad", {"reduction": "mean"}),
    ("gradvac", {"groups": "matrix", "beta": 0.3}),
    ("gradnorm", {"initial_loss": "epoch", "lr": 0.1}),
    ("nash_mtl", {"max_norm": 0.5}),
    ("rlw", {"distribution": "uniform"}),
]


@pytest.mark.parametrize("a", [0.6, "lr"])
@pytest.mark.parametrize(("name", "options"), INNER, ids=[n for n, _ in INNER])
def test_a_checkpoint_has_the_whole_state_of_the_method_inside(name, options, a):
    def run(model, opt, scheduler, start, stop):
        for k in range(start, stop):
            step(model, opt)
            scheduler.step()
            if k == 1:
                opt.end_epoch()

    def new(a, **options):
        model = make("Plain")
        inner = fresh_method(name, **options)
        opt = optimizer(model, lr=0.01, kind=Adam, inner=inner, a=a)
        return model, opt, LambdaLR(opt, lambda k: 0.9**k)

    whole = new(a, **options)
    run(*whole, 0, 7)
    early = new(a, **options)
    run(*early, 0, 3)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in early], file)
    file.seek(0)
    late = new(0.1)
    torch.manual_seed(99)
    for part, state in zip(late, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    assert late[1].aggregator.hyperparameters() == whole[1].aggregator.hyperparameters()
    run(*late, 3, 7)
    assert_same(snapshot(*late[:2]), snapshot(*whole[:2]))
    assert_same(late[1].aggregator.state_dict(), whole[1].aggregator.state_dict())


def test_a_checkpoint_with_another_method_inside_is_refused():
    state = gradbal.create("cr_mogm", inner="upgrad").state_dict()
    method = gradbal.create("cr_mogm", inner="mgda")
    method.weights(torch.eye(2))
    before = copy.deepcopy(method.state_dict())
    with pytest.raises(ValueError, match="a checkpoint of 'mgda' is required, found one of 'upgr"):
        method.load_state_dict(state)
    assert_same(method.state_dict(), before)


@pytest.mark.parametrize("name", INSIDE)
def test_its_hyperparameters_make_it_again(name):
    method = gradbal.create("cr_mogm", inner=fresh_method(name), a=0.25)
    keywords = method.hyperparameters()
    assert keywords["inner"] == name
    again = gradbal.create("cr_mogm", **keywords)
    assert repr(again) == repr(method)
    assert type(again.inner) is type(method.inner)


def test_reset_resets_the_method_inside_too():
    jacobians = rows(4)
    method = gradbal.create("cr_mogm", inner=fresh_method("gradvac", beta=0.5))
    first = [method.direction(j) for j in jacobians]
    method.reset()
    assert all(torch.equal(method.direction(j), d) for j, d in zip(jacobians, first, strict=True))
    method.reset()
    method.direction(torch.randn(2, 5))


def test_what_a_method_is_told_is_told_to_the_one_inside():
    class Listens(gradbal.GramianAggregator):
        """Keeps what it is told."""

        def __init__(self):
            self.heard = []

        def weights(self, gramian, losses=None):
            self.heard.append((losses, self.learning_rate))
            return gramian.new_ones(len(gramian))

        def prepare(self, n_tasks, like):
            self.heard.append(n_tasks)

        def update(self, losses):
            self.heard.append(losses)

        def end_epoch(self):
            self.heard.append("end")

        def reset(self):
            self.heard.append("reset")

    gradbal.register("listens")(Listens)
    try:
        inside = Listens()
        method = gradbal.create("cr_mogm", inner=inside)
        method.learning_rate = 0.25
        losses = torch.ones(2)
        method.weights(torch.eye(2), losses)
        method.end_epoch()
        method.update(losses)
        method.reset()
        assert inside.heard == [2, (losses, 0.25), "end", losses, "reset"]
    finally:
        gradbal.registry.unregister("listens")


@pytest.mark.parametrize("a", [0.0, 0.5])
def test_weights_by_column_group(a):
    model = make("Plain")
    inside = fresh_method("gradvac", groups="matrix", beta=0.5)
    opt = optimizer(model, inner=inside, a=a)
    plain = fresh_method("gradvac", groups=[20, 5], beta=0.5)
    wanted = []
    for _ in range(4):
        gradients, _ = task_gradients(model, lambda twin: twin.losses(twin.batch()))
        parts = [
            torch.stack([r[n].flatten() for r in gradients])
            for n in ("trunk.0.weight", "trunk.0.bias")
        ]
        wanted.append(plain.group_weights(torch.stack([p @ p.T for p in parts])))
        *_, w = averaged(wanted, a)
        step(model, opt)
        trunk = model.trunk[0]
        torch.testing.assert_close(trunk.weight.grad.flatten(), w[0] @ parts[0])
        torch.testing.assert_close(trunk.bias.grad, w[1] @ parts[1])
        own = gradients[1]["heads.1.bias"]
        torch.testing.assert_close(model.heads[1].bias.grad, own)


def test_the_layer_of_a_method_inside_is_probed():
    model = make("Plain")
    bias = model.trunk[0].bias
    opt = optimizer(model, inner=gradbal.create("gradnorm", layer=bias, lr=0.2), a=0.5)
    plain = gradbal.create("gradnorm", lr=0.2)
    wanted = []
    for _ in range(4):
        gradients, values = task_gradients(model, lambda twin: twin.losses(twin.batch()))
        j = torch.stack([row["trunk.0.bias"] for row in gradients])
        wanted.append(plain.weights(j @ j.T, values))
        step(model, opt)
        *_, w = averaged(wanted, 0.5)
        torch.testing.assert_close(opt.weights, w)
        d = sum(w[i] * row["trunk.0.weight"] for i, row in enumerate(gradients))
        torch.testing.assert_close(model.trunk[0].weight.grad, d)
    assert not torch.equal(opt.weights, torch.ones(3, dtype=torch.float64))


def test_around_itself():
    method = gradbal.create("cr_mogm", inner="cr_mogm", a=0.5, options={"a": 0.0, "inner": "mgda"})
    plain = gradbal.create("cr_mogm", a=0.5)
    for j in rows(4):
        torch.testing.assert_close(method.direction(j), plain.direction(j))
    assert method.state_dict()["state"]["inner"]["state"]["inner"]["name"] == "mgda"


def test_what_is_promised_is_what_is_left_of_the_promises_inside():
    mine = gradbal.create("cr_mogm", inner="nash_mtl").promises
    inside = gradbal.info("nash_mtl").promises
    assert (mine.heads, mine.degree, mine.min_tasks) == ("weighted", 0, inside.min_tasks)
    kept = (mine.non_conflicting, mine.row_scale_invariant, mine.zero_rows_inactive)
    assert not any(kept)
    assert mine.gain(gradbal.create("cr_mogm", inner="mean"), 3, 1.0) == 1.0
    assert not gradbal.create("cr_mogm", inner="pcgrad").promises.deterministic
    assert not gradbal.create("cr_mogm", inner="primary").promises.permutation_invariant


def test_non_conflict_is_not_inherited():
    method = gradbal.create("cr_mogm", inner="upgrad", a=0.9)
    worst = 0.0
    for j in rows(40):
        d = method.direction(j)
        worst = min(worst, float((j @ d / j.norm(dim=1) / d.norm()).min()))
    assert worst < -0.01


def test_another_number_of_tasks_is_an_error():
    method = gradbal.create("cr_mogm")
    method.weights(torch.eye(3))
    with pytest.raises(ValueError, match="`cr_mogm` has 3 tasks, found 2"):
        method.weights(torch.eye(2))
    with pytest.raises(ValueError, match="one entry for each of 3 tasks, found 2"):
        gradbal.create("cr_mogm", inner="upgrad", options={"pref": [1.0, 2.0]}).weights(
            torch.eye(3)
        )


class Unregistered(gradbal.GramianAggregator):
    """Ones."""

    def weights(self, gramian, losses=None):
        return gramian.new_ones(len(gramian))


class Picks(gradbal.JacobianAggregator):
    """The first row."""

    def direction(self, jacobian, losses=None):
        return jacobian[0]


@pytest.mark.parametrize(
    ("keywords", "error", "words"),
    [
        ({"a": -0.1}, ValueError, r"`a` must be in \[0, 1\], found -0.1"),
        ({"a": 1.1}, ValueError, r"`a` must be in \[0, 1\], found 1.1"),
        ({"a": "rate"}, ValueError, "`a` must be one of 'lr', found 'rate'"),
        ({"a": None}, TypeError, "`a` must be a number"),
        ({"inner": "mgd"}, ValueError, "unknown aggregator 'mgd'; did you mean `mgda`"),
        ({"inner": 3}, TypeError, "`inner` must be a name or an Aggregator, found int"),
        ({"inner": "uw"}, TypeError, "`inner` must not have learnable weights, found 'uw'"),
        ({"inner": Picks()}, TypeError, "weights from the Gramian or.* 'Picks', a jacobian method"),
        ({"inner": Unregistered()}, ValueError, "must be registered.*instance of Unregistered"),
        ({"inner": "mgda", "options": {"nrm": 1}}, TypeError, "'mgda' has no keyword `nrm`"),
        (
            {"inner": gradbal.create("mgda"), "options": {"norm": "l2"}},
            TypeError,
            "`options` go with the name of a method, found norm beside an instance",
        ),
    ],
    ids=str,
)
def test_bad_hyperparameters(keywords, error, words):
    with pytest.raises(error, match=words):
        gradbal.create("cr_mogm", **keywords)
