"""SparseSharing: masks, exact pruning, rewinding, the search, and what is shared."""

import copy
import io

import pytest
import torch
from torch import nn

from gradbal.nn import HardParameterSharing, SparseSharing, find_masks
from tests.nn.models import IN, TASKS, WIDTH, Branches, batch, heads, losses


def encoder() -> nn.Module:
    return nn.Sequential(nn.Linear(IN, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, WIDTH))


def sparse(encoder=encoder, **options) -> SparseSharing:
    torch.manual_seed(7)
    return SparseSharing(TASKS, encoder, heads(), **options).double()


def left(model: SparseSharing, task: str) -> torch.Tensor:
    return torch.cat([mask.flatten() for mask in model.masks[task].values()])


def test_masks_of_ones_are_hard_parameter_sharing():
    model = sparse()
    torch.manual_seed(7)
    hps = HardParameterSharing(TASKS, encoder, heads()).double()
    hps.load_state_dict({k: v for k, v in model.state_dict().items() if k in hps.state_dict()})
    x = batch()
    for mode in (True, False):
        model.train(mode)
        hps.train(mode)
        found, expected = losses(model, x), losses(hps, x)
        for task in TASKS:
            torch.testing.assert_close(found[task], expected[task], rtol=1e-14, atol=0)
        parameters = dict(model.named_parameters())
        assert list(parameters) == [n for n, _ in hps.named_parameters()]
        gradients = torch.autograd.grad(sum(found.values()), list(parameters.values()))
        wanted = torch.autograd.grad(sum(expected.values()), list(hps.parameters()))
        for name, g, w in zip(parameters, gradients, wanted, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-14, msg=name)
    assert [*map(id, model.shared_parameters())] == [*map(id, model.encoder.parameters())]


def test_the_output_is_that_of_the_masked_network():
    model = sparse()
    model.prune("a", 0.4)
    x = batch()
    masked = masked_copy(model, "a")
    torch.testing.assert_close(model(x, task="a"), model.heads["a"](masked(x)))
    assert torch.equal(model(x, task="b"), model.heads["b"](model.encoder(x)))


def masked_copy(model: SparseSharing, task: str) -> nn.Module:
    """The encoder with zeros where the mask has them."""
    masked = copy.deepcopy(model.encoder)
    with torch.no_grad():
        for name, mask in model.masks[task].items():
            masked.get_parameter(name).mul_(mask)
    return masked


def test_gradients_are_those_of_the_masked_network_with_exact_zeros():
    model = sparse()
    for task, fraction in zip(TASKS, (0.1, 0.3, 0.6), strict=True):
        model.prune(task, fraction)
    found = losses(model, batch())
    for i, (task, masks) in enumerate(model.masks.items()):
        masked = masked_copy(model, task)
        y = model.heads[task.replace(".", "%2E")](masked(batch()))
        wanted = torch.autograd.grad((y - (-2.0) ** i).square().mean(), list(masked.parameters()))
        gradients = torch.autograd.grad(found[task], list(model.encoder.parameters()))
        for (name, _), g, w in zip(masked.named_parameters(), gradients, wanted, strict=True):
            mask = masks.get(name, torch.ones_like(w, dtype=torch.bool))
            assert not g[~mask].any(), name
            torch.testing.assert_close(g[mask], w[mask], rtol=1e-9, atol=1e-13, msg=name)
            assert bool(w[~mask].any()) == (not bool(mask.all())), name


def test_masks_stop_what_is_not_finite():
    model = sparse(Branches)
    weight = model.encoder.right.weight
    mask = torch.ones(WIDTH, IN, dtype=torch.bool)
    mask[1, 2] = False
    model.set_masks("a", {"right.weight": mask})
    with torch.no_grad():
        weight[1, 2] = torch.inf
    y = model(batch(), task="a")
    assert bool(y.isfinite().all())
    (g,) = torch.autograd.grad(y.sum() * torch.inf, weight)
    assert float(g[1, 2]) == 0
    assert not g[:, 0].isfinite().any()


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 0.99])
def test_fractions_are_exact_and_the_smallest_go(fraction):
    model = sparse()
    magnitude = torch.cat(
        [model.encoder.get_parameter(n).detach().abs().flatten() for n in model.masks["a"]]
    )
    total = n = IN * 8 + 8 * WIDTH
    before = left(model, "a")
    for _ in range(4):
        model.prune("a", fraction)
        after = left(model, "a")
        n -= round(fraction * n)
        assert int(after.sum()) == n
        assert model.sparsity("a") == pytest.approx(1 - n / total, abs=1e-15)
        assert not (after & ~before).any()
        gone = before & ~after
        if gone.any() and after.any():
            assert float(magnitude[gone].max()) <= float(magnitude[after].min())
        before = after
    assert bool(left(model, "b").all())


def test_equal_magnitudes_are_counted_exactly():
    model = sparse()
    with torch.no_grad():
        for p in model.encoder.parameters():
            p.fill_(-0.5)
    model.prune("b", 0.5)
    assert int(left(model, "b").sum()) == (IN * 8 + 8 * WIDTH) // 2


def _step(model: nn.Module, task: str | None = None) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        if task is None:
            sum(losses(model, batch()).values()).backward()
        else:
            (model(batch(), task=task) - 1).square().mean().backward()
        optimizer.step()


def test_rewinding_is_exact_and_masks_stay():
    model = sparse()
    before = copy.deepcopy(model.state_dict())
    model.prune("a", 0.5)
    masks = left(model, "a").clone()
    _step(model)
    changed = model.state_dict()
    assert not torch.equal(changed["encoder.0.weight"], before["encoder.0.weight"])
    assert not torch.equal(
        changed["task_buffers.a.1%2Erunning_mean"], before["task_buffers.a.1%2Erunning_mean"]
    )
    model.rewind()
    after = model.state_dict()
    for key in before:
        if not key.startswith(("task_masks", "_extra_state")):
            assert torch.equal(after[key], before[key]), key
    assert torch.equal(left(model, "a"), masks)
    _step(model)
    warm = copy.deepcopy(model.state_dict())
    model.remember()
    _step(model)
    model.rewind()
    assert torch.equal(model.state_dict()["encoder.0.weight"], warm["encoder.0.weight"])


def test_a_loaded_model_goes_back_to_the_same_state():
    model = sparse()
    initial = model.encoder[0].weight.detach().clone()
    model.prune("c.d", 0.5)
    _step(model)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    torch.manual_seed(50)
    other = SparseSharing(TASKS, encoder, heads()).double()
    other.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert torch.equal(left(other, "c.d"), left(model, "c.d"))
    assert torch.equal(other.eval()(batch())["a"], model.eval()(batch())["a"])
    other.rewind()
    assert torch.equal(other.encoder[0].weight, initial)
    wrong = SparseSharing(TASKS, Branches, heads())
    with pytest.raises(ValueError, match="that of a model like this one"):
        wrong.set_extra_state(model.get_extra_state())


def test_finding_masks():
    model = sparse()
    initial = copy.deepcopy(dict(model.named_parameters()))
    seen: list[tuple[str, float]] = []

    def train_one_task(m: SparseSharing, task: str) -> None:
        assert m is model
        for name, p in m.named_parameters():
            assert torch.equal(p, initial[name]), name
        seen.append((task, m.sparsity(task)))
        _step(m, task)

    found = find_masks(model, train_one_task, rounds=3, fraction=0.5)
    assert found == {task: [] for task in TASKS}
    total = IN * 8 + 8 * WIDTH
    sparsities = [0, 1 - 36 / total, 1 - 18 / total]
    assert [task for task, _ in seen] == [task for task in TASKS for _ in range(3)]
    assert [s for _, s in seen] == pytest.approx(sparsities * 3)
    assert all(int(left(model, task).sum()) == 9 for task in TASKS)
    for name, p in model.named_parameters():
        assert torch.equal(p, initial[name]), name
    assert not torch.equal(left(model, "a"), left(model, "c.d"))
    assert 0 <= model.overlap() < 1


def test_the_best_candidate_is_taken():
    model = sparse()
    masks: dict[tuple[str, int], torch.Tensor] = {}
    scores = {"a": [0.1, 0.9, 0.3, 0.2], "b": [3.0, 2.0, 1.0, 0.0], "c.d": [1.0, 1.0, 1.0, 1.0]}
    tried = dict.fromkeys(TASKS, 0)

    def evaluate(m: SparseSharing, task: str) -> float:
        i = tried[task]
        masks[task, i] = left(m, task).clone()
        tried[task] += 1
        return scores[task][i]

    found = find_masks(
        model, lambda m, task: _step(m, task), rounds=3, fraction=0.5, evaluate=evaluate
    )
    assert {task: [c.score for c in found[task]] for task in TASKS} == scores
    for task, best in (("a", 1), ("b", 0), ("c.d", 3)):
        assert torch.equal(left(model, task), masks[task, best])
        sparsities = [c.sparsity for c in found[task]]
        assert sparsities == sorted(sparsities)
        assert model.sparsity(task) == sparsities[best]
    with pytest.raises(ValueError, match="`evaluate` must return a number, found nan for 'a'"):
        find_masks(
            model, lambda m, t: None, rounds=1, fraction=0.5, evaluate=lambda m, t: float("nan")
        )


def test_pruned_networks_learn():
    """Joint training with masks lowers every task's loss, and leaves entries of no task alone."""
    model = sparse()
    find_masks(model, lambda m, task: _step(m, task), rounds=2, fraction=0.4)
    before = losses(model, batch())
    unused = ~torch.stack([left(model, task) for task in TASKS]).any(0)
    weights = [model.encoder.get_parameter(n) for n in model.masks["a"]]
    start = torch.cat([w.detach().flatten().clone() for w in weights])
    for _ in range(20):
        _step(model)
    after = losses(model, batch())
    assert all(bool(after[task] < before[task]) for task in TASKS)
    end = torch.cat([w.detach().flatten() for w in weights])
    assert bool(unused.any())
    assert torch.equal(start[unused], end[unused])


def test_what_is_shared():
    model = sparse(Branches)
    left, right = model.encoder.left.weight, model.encoder.right.weight
    nothing = torch.zeros(WIDTH, IN, dtype=torch.bool)
    for task in ("a", "c.d"):
        model.set_masks(task, {"right.weight": nothing})
    assert any(p is right for p in model.task_parameters("b"))
    assert not any(p is right for p in model.shared_parameters())
    assert torch.autograd.grad(model(batch(), "a").sum(), right, allow_unused=True) == (None,)
    copied = sparse(Branches)
    copied.load_state_dict(model.state_dict())
    assert any(p is copied.encoder.right.weight for p in copied.task_parameters("b"))
    # One entry each, and not the same one.
    one, others = nothing.clone(), ~nothing
    one[0, 0], others[0, 0] = True, False
    model.set_masks("a", {"right.weight": one})
    model.set_masks("b", {"right.weight": others})
    assert any(p is right for p in model.shared_parameters())
    for task in TASKS:
        model.set_masks(task, {"left.weight": nothing})
    shared = model.shared_parameters()
    assert any(p is left for p in shared)
    found = [p for part in (shared, *map(model.task_parameters, TASKS)) for p in part]
    assert sorted(map(id, found)) == sorted(map(id, model.parameters()))


def test_masks_are_set_all_or_none():
    model = sparse(Branches)
    good = torch.zeros(WIDTH, IN, dtype=torch.bool)
    for wrong, message in (
        (
            {"left.weight": good, "right.weight": good.T},
            r"bool of shape \[5, 4\], found .*\[4, 5\]",
        ),
        ({"left.weight": good, "right.weight": good.double()}, "found torch.float64 of shape"),
        ({"left.weight": good, "right.bias": good}, "a key of `masks` must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            model.set_masks("a", wrong)
        assert bool(left(model, "a").all())
    with pytest.raises(ValueError, match="found 'aa'"):
        model.set_masks("aa", {"left.weight": good})
    model.set_masks("a", {"left.weight": good})
    assert model.sparsity("a") == 0.5
    assert float(model.overlap()) == 0.5


def test_running_statistics_are_each_task_s_own():
    model = sparse()
    model.prune("a", 0.7)
    model.train()
    model(batch())
    state = model.state_dict()
    means = [state[f"task_buffers.{k}.1%2Erunning_mean"] for k in ("a", "b", "c%2Ed")]
    assert torch.equal(means[1], means[2])
    assert not torch.equal(means[0], means[1])
    counts = [int(state[f"task_buffers.{k}.1%2Enum_batches_tracked"]) for k in ("a", "b", "c%2Ed")]
    assert counts == [1, 1, 1]
    model(batch(), task="b")
    assert int(model.state_dict()["task_buffers.b.1%2Enum_batches_tracked"]) == 2


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU])
def test_recurrent_networks_are_masked(cell):
    """The paper's networks are recurrent; their layers keep weights in a list of their own."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = cell(1, WIDTH, batch_first=True)

        def forward(self, x):
            return self.cell(x[..., None])[0][:, -1]

    model = sparse(Recurrent)
    model.prune("a", 0.5)
    assert set(model.masks["a"]) == {"cell.weight_ih_l0", "cell.weight_hh_l0"}
    masked = masked_copy(model, "a")
    torch.testing.assert_close(model(batch(), "a"), model.heads["a"](masked(batch())))
    torch.testing.assert_close(model(batch(), "b"), model.heads["b"](model.encoder(batch())))
    model(batch(), "a").sum().backward()
    for name, mask in model.masks["a"].items():
        g = model.encoder.get_parameter(name).grad
        assert not g[~mask].any()
        assert bool(g[mask].all())


def test_lazy_modules_need_an_example():
    lazy = {task: nn.LazyLinear(2) for task in TASKS}
    with pytest.raises(ValueError, match="`example` must be given, a batch, where there are lazy"):
        SparseSharing(TASKS, encoder, lazy)
    model = SparseSharing(TASKS, lambda: nn.LazyLinear(5), lazy, example=torch.zeros(2, IN))
    assert model.masks["a"]["weight"].shape == (5, IN)
    before = copy.deepcopy(dict(model.named_parameters()))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    model.rewind()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_what_is_prunable():
    assert set(sparse().masks["a"]) == {"0.weight", "3.weight"}
    model = sparse(prunable=lambda name, p: name.startswith("3"))
    assert set(model.masks["a"]) == {"3.weight", "3.bias"}
    with pytest.raises(ValueError, match="`prunable` must hold for at least one parameter"):
        sparse(prunable=lambda name, p: False)


def test_wrong_arguments():
    model = sparse()
    for fraction in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"`fraction` must be in \(0, 1\)"):
            model.prune("a", fraction)
        with pytest.raises(ValueError, match=r"`fraction` must be in \(0, 1\)"):
            find_masks(model, lambda m, t: None, rounds=1, fraction=fraction)
    with pytest.raises(ValueError, match="found 'aa'"):
        model.prune("aa", 0.5)
    with pytest.raises(ValueError, match="found 'aa'"):
        model.sparsity("aa")
    with pytest.raises(ValueError, match=r"`rounds` must be in \[1, inf\), found 0"):
        find_masks(model, lambda m, t: None, rounds=0, fraction=0.5)
    with pytest.raises(ValueError, match="encoder with the mask of task 'a' must fit its input"):
        sparse(example=torch.zeros(2, IN + 1, dtype=torch.float32))
    assert bool(left(model, "a").all())
