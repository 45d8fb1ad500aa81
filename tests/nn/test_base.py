"""What every architecture takes from its base: names, heads, encoders, partition, progress."""

import pytest
import torch
from torch import nn

from gradbal.nn import HardParameterSharing
from gradbal.nn._names import module_key
from gradbal.nn._stages import stages_of
from tests.nn.models import IN, TASKS, WIDTH, encoder, heads


def hps(tasks=TASKS, encoder=encoder, heads=None, **options):
    if heads is None:
        heads = {task: nn.Linear(WIDTH, 1) for task in tasks}
    return HardParameterSharing(tasks, encoder, heads, **options)


def test_outputs_are_the_heads_of_the_encoders_output():
    model = hps()
    x = torch.randn(3, IN)
    z = model.encoder(x)
    outputs = model(x)
    assert list(outputs) == list(TASKS)
    for key, task in zip(["a", "b", "c%2Ed"], TASKS, strict=True):
        assert torch.equal(outputs[task], model.heads[key](z))
        assert torch.equal(model(x, task=task), outputs[task])
    assert torch.equal(model.features(x), z)
    assert list(model.from_features(z)) == list(TASKS)
    assert torch.equal(model.from_features(z, "b"), outputs["b"])


AWKWARD = [
    "a.b",
    "a%2Eb",
    "forward",
    "keys",
    "%66orward",
    "type",
    "training",
    "weird name/π",
    "a b",
]


def test_any_string_is_a_task():
    model = hps(AWKWARD)
    x = torch.randn(3, IN)
    assert list(model(x)) == AWKWARD
    assert len({module_key(task) for task in AWKWARD}) == len(AWKWARD)
    for task in AWKWARD:
        assert torch.equal(model(x, task), model(x)[task])
        assert {id(p) for p in model.task_parameters(task)} == {
            id(p) for p in model.heads[module_key(task)].parameters()
        }
    hps(AWKWARD).load_state_dict(model.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": []}, "at least one task"),
        ({"tasks": ["a", ""]}, "at least one task"),
        ({"tasks": ["a", "a"]}, "found 'a' twice"),
        ({"heads": {"a": nn.Linear(WIDTH, 1)}}, "found none for 'b', 'c.d'"),
        ({"heads": heads() | {"aa": nn.Linear(WIDTH, 1)}}, "found 'aa'; did you mean `a`"),
        ({"encoder": nn.Tanh}, "must have parameters that tasks share, found none"),
        (
            {"encoder": lambda: nn.Linear(IN, WIDTH + 1), "example": torch.zeros(2, IN)},
            r"the head of task 'a' must fit its input, found a tensor of shape \[2, 6\]",
        ),
        ({"example": torch.zeros(2, IN + 1)}, "the encoder must fit its input"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        hps(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": "ab"}, "sequence of names, found 'ab'"),
        ({"tasks": [1, 2]}, "must be strings, found 1"),
        ({"heads": [nn.Linear(WIDTH, 1)]}, "dict from task to module, found list"),
        ({"heads": heads() | {"a": torch.tanh}}, "must be modules, found .* for task 'a'"),
        ({"encoder": nn.Linear(IN, WIDTH)}, "found a module, Linear; pass e.g. lambda"),
        ({"encoder": 3}, "new module at each call, found 3"),
        ({"encoder": lambda: None}, "must return a module, found NoneType"),
    ],
)
def test_wrong_types(options, message):
    with pytest.raises(TypeError, match=message):
        hps(**options)


def test_unknown_tasks_are_named_with_what_is_close():
    model = hps(["income", "age"])
    for call in (model.task_parameters, lambda t: model(torch.zeros(2, IN), t)):
        with pytest.raises(ValueError, match="found 'incom'; did you mean `income`"):
            call("incom")


def test_a_module_given_to_two_tasks_is_shared():
    common = nn.Linear(WIDTH, 1)
    model = hps(heads={"a": common, "b": common, "c.d": nn.Linear(WIDTH, 1)})
    assert {id(p) for p in common.parameters()} <= {id(p) for p in model.shared_parameters()}
    assert model.task_parameters("a") == []
    assert len(model.task_parameters("c.d")) == 2


def test_a_weight_tied_to_the_encoder_is_shared():
    own = {task: nn.Linear(WIDTH, WIDTH, bias=False) for task in TASKS}
    first = nn.Linear(IN, WIDTH)
    second = nn.Linear(WIDTH, WIDTH)
    own["a"].weight = second.weight
    model = hps(encoder=lambda: nn.Sequential(first, second), heads=own)
    assert model.task_parameters("a") == []
    assert len(model.shared_parameters()) == 4


def test_an_example_leaves_no_trace():
    class Noise(nn.Module):
        def forward(self, x):
            return x + torch.randn_like(x)

    made = nn.Sequential(nn.BatchNorm1d(IN), nn.Dropout(), Noise(), nn.Linear(IN, WIDTH))
    made[1].eval()
    own, example = heads(), torch.randn(2, IN)
    state = torch.get_rng_state()
    model = hps(encoder=lambda: made, heads=own, example=example)
    assert torch.equal(torch.get_rng_state(), state)
    assert made[0].num_batches_tracked == 0
    assert model.training
    assert made[0].training
    assert not made[1].training


@pytest.mark.parametrize(
    "error", [torch.cuda.OutOfMemoryError("none left"), RuntimeError("CUDA error: unspecified")]
)
def test_errors_of_other_kinds_stay_what_they_are(error):
    class Broken(nn.Linear):
        def forward(self, x):
            raise error

    with pytest.raises(type(error)) as caught:
        hps(encoder=lambda: Broken(IN, WIDTH))(torch.zeros(2, IN))
    assert caught.value is error


@pytest.mark.parametrize(
    ("encoder", "x"),
    [
        (lambda: nn.Conv2d(1, 2, 3), torch.zeros(2, 3, 5, 5)),
        (lambda: nn.Linear(IN, 2), torch.zeros(2, IN, dtype=torch.float64)),
        (lambda: nn.BatchNorm1d(2), torch.zeros(2)),
        (lambda: nn.Embedding(2, 3), torch.tensor([2])),
    ],
)
def test_errors_about_inputs_name_the_module(encoder, x):
    with pytest.raises(
        ValueError, match="the encoder must fit its input, found a tensor"
    ) as caught:
        hps(encoder=encoder)(x)
    assert str(caught.value.__cause__) in str(caught.value)


def test_stages():
    stages = [nn.Linear(2, 2), nn.Tanh()]
    assert stages_of(nn.ModuleList(stages)) == stages
    assert stages_of(nn.Sequential(*stages)) == stages
    with pytest.raises(TypeError, match="of its stages, found Linear"):
        stages_of(stages[0])
    with pytest.raises(ValueError, match="at least one stage"):
        stages_of(nn.Sequential())


def test_progress_is_saved():
    model = hps()
    assert model.progress == 0
    model.set_progress(3, 4)
    assert model.progress == 0.75
    other = hps()
    other.load_state_dict(model.state_dict())
    assert other.progress == 0.75
    assert other.schedule.tolist() == [3, 4]
    # Steps beyond what half precision can count stay exact.
    other.half().set_progress(100_001, 100_002)
    assert other.schedule.tolist() == [100_001, 100_002]
    for step, total in ((1, 0), (-1, 2), (3, 2)):
        with pytest.raises(ValueError, match="must be"):
            model.set_progress(step, total)
    with pytest.raises(TypeError, match="`step` must be an integer"):
        model.set_progress(0.5, 1)


def test_no_regularization():
    found = hps().to(torch.bfloat16).regularization_loss()
    assert found.shape == ()
    assert found.dtype == torch.bfloat16
    assert found == 0
