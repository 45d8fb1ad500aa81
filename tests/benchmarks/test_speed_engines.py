"""`speed engines`: ratios, memory and targets that are known, and the command around them."""

import itertools
import json
import re
import sys

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from benchmarks.cli import app
from benchmarks.speed import contestants, engines
from benchmarks.speed.contestants import (
    AUTOGRAM,
    BARE,
    PLAIN,
    TORCHJD,
    Contestant,
    available_engines,
    contestant,
    opponents,
)
from benchmarks.speed.engines import GIB, Cell, Plan, Row, measure
from benchmarks.speed.models import MODELS, Heads
from benchmarks.speed.report import COLUMNS, targets

SHARED = 6 * 8 + 8


def _tiny(n_tasks):
    trunk = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
    return Heads(trunk, 8, n_tasks, lambda: torch.randn(4, 6))


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(MODELS, "tiny", _tiny)


def plan(**changes):
    return Plan(**{"models": ["tiny"], "task_counts": [2], "rounds": 1, **changes})


@pytest.mark.parametrize("name", MODELS)
def test_models_share_a_trunk_and_have_a_head_each(name):
    if name == "resnet18":
        pytest.importorskip("torchvision")
    model = MODELS[name](3)
    features, losses = model.features_and_losses(model.example())
    assert features.dim() == 2
    assert len(losses) == len(model.heads) == 3
    assert all(loss.dim() == 0 for loss in losses)


@pytest.mark.usefixtures("tiny")
def test_all_columns_of_all_contestants():
    threads = torch.get_num_threads()
    cells = [*measure(plan(task_counts=[5], threads=[1, 2]))]
    assert torch.get_num_threads() == threads
    assert [(c.n_tasks, c.threads) for c in cells] == [(5, 1), (5, 2)]
    for cell in cells:
        assert (cell.model, cell.n_shared, cell.rounds) == ("tiny", SHARED, 1)
        names = [row.name for row in cell.rows]
        assert names[:2] == [BARE, PLAIN]
        assert {*names[2:]} == {*available_engines("upgrad"), *opponents("upgrad", 5)[2:]}
        for row in cell.rows:
            assert not row.reason
            assert all(getattr(row, column) is not None for column in COLUMNS)
        assert cell.row(BARE).over_bare == cell.row(PLAIN).over_plain == 1
        assert cell.row(TORCHJD).over_torchjd == cell.row(cell.best).over_best == 1
        settings = [row for row in cell.rows if row.name.startswith(TORCHJD)]
        assert cell.best == min(settings, key=lambda row: row.over_bare).name
        # One copy to the host, of the Gramian; and one operator a loss at the very least.
        assert cell.row("loop").reads == 1
        assert cell.row("loop").engine == "loop"
        assert cell.row("loop").operators > cell.row(BARE).operators > cell.n_tasks


def test_opponents():
    assert opponents("moco", 5) == [BARE, PLAIN]
    five = opponents("upgrad", 5)
    assert {TORCHJD, AUTOGRAM, "TorchJD chunk=1", "TorchJD chunk=4"} < {*five}
    assert [name for name in five if name not in opponents("upgrad", 4)] == ["TorchJD chunk=4"]


@pytest.mark.parametrize("name", [*opponents("upgrad", 11)[2:], "loop"])
def test_contestants_give_gradients_of_the_same_losses(name):
    """UPGrad where no gradients conflict: the mean of the rows for the trunk."""
    model = _tiny(2)
    model.heads[1].load_state_dict(model.heads[0].state_dict())
    batch = model.example()

    def prepare():
        features = model.trunk(batch)
        outputs = [head(features) for head in model.heads]
        target = torch.arange(4)
        return features, [
            factor * nn.functional.cross_entropy(output, target)
            for factor, output in zip((1.0, 3.0), outputs, strict=True)
        ]

    trunk = list(model.trunk.parameters())
    rows = [torch.autograd.grad(loss, trunk, retain_graph=True) for loss in prepare()[1]]
    # One of them hooks the trunk: the losses come after it.
    made = contestant(name, model, "upgrad")
    made.call(*prepare())
    for p, *parts in zip(trunk, *rows, strict=True):
        # TorchJD regularises with 1e-4.
        torch.testing.assert_close(p.grad, sum(parts) / 2, rtol=1e-3, atol=1e-6)
    assert all(p.grad is not None for p in model.heads.parameters())


@pytest.mark.usefixtures("tiny")
def test_memory_is_what_is_taken_beyond_the_bare_passes(monkeypatch):
    """A floor that has a buffer of 3·T·P floats besides, kept from call to call, needs 3 of T·P."""

    def with_buffer(name, model, method):
        made = contestant(name, model, method)
        if name != "loop":
            return made
        bare, buffer = contestant(BARE, model, method), torch.empty(3, 2, SHARED)

        def call(features, losses):
            bare.call(features, losses)
            buffer.zero_()

        return Contestant(name, model, call)

    monkeypatch.setattr(engines, "contestant", with_buffer)
    (cell,) = measure(plan(engines=["loop"]))
    assert cell.row(BARE).memory == 0
    assert cell.row("loop").memory == pytest.approx(3, abs=1e-9)


@pytest.mark.usefixtures("tiny")
def test_ratios_are_medians_over_rounds_of_calls_alone(monkeypatch):
    """A clock that only the calls move, by an amount for each contestant and round."""
    now, calls = [0.0], dict.fromkeys(("loop", BARE, PLAIN), 0)
    durations = {"loop": (5, 1, 2, 2, 6), BARE: (1, 1, 1, 2, 2), PLAIN: (4, 4, 4, 4, 4)}

    def timed(name, model, method):
        made = contestant(name, model, method)
        if name not in durations:
            return made
        # Two warm-up rounds and a call before them.
        rounds = itertools.chain([0, 0, 0], durations[name], itertools.repeat(0))

        def call(features, losses):
            made.call(features, losses)
            now[0] += next(rounds)
            calls[name] += 1

        return Contestant(name, model, call)

    monkeypatch.setattr(engines, "contestant", timed)
    monkeypatch.setattr(engines, "_clock", lambda device: lambda: now[0])
    monkeypatch.setattr(engines, "opponents", lambda method, n_tasks: [BARE, PLAIN])
    (cell,) = measure(plan(engines=["loop"], rounds=5))
    assert cell.rounds == 5
    assert (cell.best, cell.row("loop").over_torchjd) == (None, None)
    # 5, 1, 2, 1, 3 and 1.25, 0.25, 0.5, 0.5, 1.5.
    assert (cell.row("loop").over_bare, cell.row("loop").over_plain) == (2, 0.5)
    assert len(set(calls.values())) == 1


@pytest.mark.usefixtures("tiny")
def test_no_more_rounds_are_begun_when_the_time_is_over():
    (cell,) = measure(plan(engines=["loop"], rounds=50, seconds=1e-9))
    assert cell.rounds == 3


@pytest.mark.usefixtures("tiny")
def test_what_does_not_work_is_left_out_with_its_reason(monkeypatch):
    def failing(name, model, method):
        if name == TORCHJD:
            raise RuntimeError("no batching rule\nand a stack")
        return contestant(name, model, method)

    monkeypatch.setattr(engines, "contestant", failing)
    (cell,) = measure(plan(engines=["loop"]))
    assert cell.row(TORCHJD) == Row(TORCHJD, reason="RuntimeError: no batching rule")
    assert cell.row("loop").over_torchjd is None
    assert cell.row("loop").over_best > 0
    # Without the floor there is nothing to say.
    monkeypatch.setattr(engines, "contestant", lambda *_: failing(TORCHJD, *_[1:]))
    with pytest.raises(RuntimeError, match="no batching rule"):
        next(measure(plan(engines=["loop"])))


@pytest.mark.usefixtures("tiny")
def test_what_would_need_too_much_memory_is_not_tried():
    small = plan(engines=["loop"], task_counts=[3], memory=1.0 / GIB)
    (cell,) = measure(small)
    assert cell.row("loop").reason.startswith("would need about 0.0 GiB, --memory is")
    assert cell.row("loop").over_bare is None
    assert cell.row(BARE).over_bare == 1


def test_engines_that_keep_buffers_share_a_group_as_far_as_memory_goes():
    def count(peak, held=0):
        return engines._Count(peak=peak, held=held)

    counts = {BARE: count(10), TORCHJD: count(50)}
    counts |= {name: count(45, 40) for name in "abc"}
    names = list("abc")
    assert list(engines._groups(counts, names, 170)) == [[BARE, TORCHJD, "a", "b", "c"]]
    assert list(engines._groups(counts, names, 169)) == [
        [BARE, TORCHJD, "a", "b"],
        [BARE, TORCHJD, "c"],
    ]
    # One alone has passed the test before.
    assert [group[2:] for group in engines._groups(counts, names, 1)] == [["a"], ["b"], ["c"]]
    assert list(engines._groups({BARE: count(10)}, [], 1)) == [[BARE]]


class Trying:
    """Names one engine after the other, from the nth call on the same."""

    def __init__(self, settles_at):
        self.calls, self.settles_at = 0, settles_at

    def backward(self, features, losses):
        self.calls += 1

    def diagnostics(self):
        return {"engine": f"{min(self.calls, self.settles_at)}"}


@pytest.mark.parametrize(
    ("name", "settles_at", "calls"),
    [("auto", 1, 8), ("auto", 4, 8), ("auto", 20, 24), ("auto", 99, 40), ("loop", 5, 1)],
)
def test_auto_is_warm_when_it_has_settled(name, settles_at, calls):
    trying, model = Trying(settles_at), _tiny(2)
    Contestant(name, model, trying.backward, trying).warm_up(model.example())
    assert trying.calls == calls


def test_engines_that_are_not_there_are_left_out(monkeypatch):
    monkeypatch.setattr(contestants, "ENGINES", ("auto", "loop", "sometime", "instance", "fussy"))

    def made(optimizer, method, jacobian):
        if jacobian == "sometime":
            raise NotImplementedError
        if jacobian == "fussy":
            raise ValueError("not for this method")

    monkeypatch.setattr(contestants, "MultiTaskOptimizer", made)
    assert available_engines("upgrad") == ["auto", "loop", "fussy"]


def cell(model, n_tasks, **rows):
    return Cell(model, n_tasks, 1, 100, 3, TORCHJD, [Row(n, **row) for n, row in rows.items()])


def test_targets():
    cells = [
        cell(
            "mlp",
            3,
            auto={"over_bare": 0.5, "over_best": 0.9, "over_torchjd": 0.3},
            loop={"over_bare": 1.2, "memory": 1.01},
        ),
        cell("conv", 11, auto={"over_bare": 2.0}, loop={"over_bare": 1.01, "memory": 1.2}),
        cell("transformer", 3, auto={"over_bare": 1.0}, loop={"over_bare": 1.05, "memory": 1.0}),
        # Neither counts.
        cell("lstm", 3, auto={"over_bare": 9.0}, loop={"over_bare": 9.0, "memory": 9.0}),
        cell("mlp", 40, auto={"over_bare": 9.0}, loop={"over_bare": 9.0, "memory": 9.0}),
    ]
    found = [(t.at_most, t.found and round(t.found, 9), t.cells) for t in targets(cells)]
    assert found == [
        (1.0, 1.0, (3, 6)),
        (0.75, 0.9, (1, 6)),
        (0.6, 0.3, (1, 6)),
        (1.06, 1.05, (2, 4)),
        (1.3, 1.2, (1, 2)),
        (1.1, 1.2, (3, 6)),
    ]
    assert all(target.found is None for target in targets([]))


def run(*arguments):
    return CliRunner().invoke(app, ["speed", "engines", *arguments])


@pytest.mark.usefixtures("tiny")
def test_the_command_prints_all_and_writes_it(tmp_path):
    path = tmp_path / "speed.json"
    words = ["--models", "tiny", "--tasks", "2,3", "--threads", "1", "--rounds", "1"]
    done = run(*words, "--engines", "loop", "--device", "cpu", "--out", str(path))
    assert done.exit_code == 0, done.output
    assert f"tiny, P = {SHARED} (CPU time)" in done.output
    for name in (BARE, PLAIN, "loop", *opponents("upgrad", 3)):
        assert len(re.findall(f"│ {name} +│", done.output)) == 2
    for heading, meaning in COLUMNS.values():
        assert heading in done.output
        assert f"{heading}: {meaning[:60]}" in done.output
    assert "…" not in done.output
    assert "geometric mean of mlp, conv, transformer" in done.output
    assert "Not measured on a GPU" in done.output
    written = json.loads(path.read_text(encoding="utf-8"))
    assert [c["n_tasks"] for c in written["cells"]] == [2, 3]
    assert written["plan"]["device"] == "cpu"
    assert written["environment"]["torch"] == torch.__version__
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.usefixtures("tiny")
def test_a_method_that_torchjd_lacks_has_no_such_columns():
    words = ["--models", "tiny", "--tasks", "2", "--threads", "1", "--rounds", "1"]
    done = run(*words, "--engines", "loop", "--method", "moco")
    assert done.exit_code == 0, done.output
    (line,) = [line for line in done.output.splitlines() if "│ loop " in line]
    assert line.count("–") == 2


def test_resnet18_without_torchvision(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    done = run("--models", "resnet18")
    assert done.exit_code == 1
    assert 'pip install "gradbal[vision]"' in done.output


@pytest.mark.usefixtures("tiny")
def test_a_folder_is_no_file(tmp_path):
    words = ["--models", "tiny", "--tasks", "2", "--threads", "1", "--rounds", "1"]
    done = run(*words, "--engines", "loop", "--out", str(tmp_path / "none" / "speed.json"))
    assert done.exit_code == 2
    assert "`--out` must be a file that can be written" in done.output
