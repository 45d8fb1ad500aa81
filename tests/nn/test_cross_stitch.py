"""Cross-stitch networks: units, and what is left of them at their limits."""

import pytest
import torch
from torch import nn

from gradbal.nn import CrossStitch, HardParameterSharing
from tests.nn.models import IN, TASKS, WIDTH, heads, staged

x = torch.randn(6, IN, generator=torch.Generator().manual_seed(2))


def stitched(**options):
    return CrossStitch(TASKS, staged, heads(), **options)


def test_identity_units_leave_separate_networks():
    for options in ({}, {"per_channel": True, "channels": [WIDTH, WIDTH]}):
        model = stitched(init_self=1.0, init_other=0.0, **options).double()
        outputs = model(x.double())
        for key, task in zip(("a", "b", "c%2Ed"), TASKS, strict=True):
            z = x.double()
            for stage in model.encoders[key]:
                z = stage(z)
            # Kernels may add up in another order where a tensor begins elsewhere in memory.
            torch.testing.assert_close(outputs[task], model.heads[key](z), rtol=1e-12, atol=1e-15)


def test_one_task_is_hard_parameter_sharing():
    model = CrossStitch(["a"], staged, {"a": nn.Linear(WIDTH, 1)})
    encoder = nn.Sequential(*model.encoders["a"])
    plain = HardParameterSharing(["a"], lambda: encoder, {"a": model.heads["a"]})
    assert torch.equal(model(x)["a"], plain(x)["a"])
    assert model.stitch_parameters() == []


def test_units_mix_after_every_stage_but_the_last():
    model = stitched().double()
    units = model.stitch_parameters()
    assert [unit.shape for unit in units] == [(3, 3), (3, 3)]
    for unit in units:
        torch.testing.assert_close(unit.sum(1), torch.ones(3, dtype=torch.float64))
        assert unit.diagonal().allclose(torch.tensor(0.9, dtype=torch.float64))
    with torch.no_grad():
        for unit in units:
            unit.uniform_()
    streams = [x.double()] * 3
    for l in range(3):
        streams = [
            model.encoders[key][l](z) for key, z in zip(("a", "b", "c%2Ed"), streams, strict=True)
        ]
        if l < 2:
            streams = [sum(units[l][t, j] * streams[j] for j in range(3)) for t in range(3)]
    for found, want in zip(model.features(x.double()).values(), streams, strict=True):
        torch.testing.assert_close(found, want)


def test_units_per_channel_of_feature_maps():
    def encoder():
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 3), nn.Flatten())

    images = torch.randn(2, 1, 6, 6)
    one = CrossStitch(TASKS, encoder, heads(8), per_channel=True, example=images)
    assert [list(unit.shape) for unit in one.stitch_parameters()] == [[3, 3, 4], [3, 3, 2]]
    other = CrossStitch(TASKS, encoder, heads(8))
    # Equal coefficients for all channels are what one number for all of them is.
    with torch.no_grad():
        for unit, scalar in zip(one.units, other.units, strict=True):
            scalar.uniform_()
            unit.copy_(scalar.unsqueeze(2))
        other.load_state_dict(
            {k: v for k, v in one.state_dict().items() if "units" not in k}, False
        )
        one.units[1].zero_()[:, :, 1] = 1
        other.units[1].fill_(1)
        other_maps = other.features(images)["a"]
        maps = one.features(images)["a"]
    torch.testing.assert_close(maps[:, 4:], other_maps[:, 4:])
    assert maps[:, :4].abs().max() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": lambda: nn.Sequential(nn.Linear(IN, WIDTH))}, "two stages, found one"),
        ({"per_channel": True}, "`channels` or an `example`"),
        ({"per_channel": True, "channels": [3]}, "each of 2 stages before the last, found 1"),
        ({"channels": [3, 3]}, "must be None without per_channel"),
        ({"init_self": float("nan")}, "`init_self`"),
        (
            {"per_channel": True, "channels": [WIDTH, 3], "example": x},
            r"stage 1 must have outputs \[B, 3, ...\]",
        ),
        (
            {"encoder": lambda: nn.Sequential(nn.Linear(IN, 3), nn.Linear(4, 5)), "example": x},
            r"stage 1 of task 'a' must fit its input, found a tensor of shape \[6, 3\]",
        ),
        ({"encoder": lambda: nn.Sequential(nn.Tanh(), nn.Linear(IN, WIDTH))}, None),
    ],
)
def test_wrong_arguments(options, message):
    arguments = {"tasks": TASKS, "encoder": staged, "heads": heads()} | options
    if message is None:
        # A stage without parameters: the units are shared all the same.
        assert len(CrossStitch(**arguments).shared_parameters()) == 1
        return
    with pytest.raises(ValueError, match=message):
        CrossStitch(**arguments)


def test_stages_that_differ_between_tasks():
    widths = iter((5, 6, 5))

    def encoder():
        n = next(widths)
        return nn.Sequential(nn.Linear(IN, n), nn.Linear(n, WIDTH))

    with pytest.raises(ValueError, match=r"found \[6, 5\] for 'a' and \[6, 6\] for 'b'"):
        CrossStitch(TASKS, encoder, heads(), example=x)
    lengths = iter((1, 2, 3))

    def longer():
        return nn.Sequential(*(nn.Linear(IN, IN) for _ in range(next(lengths))))

    with pytest.raises(ValueError, match="as many stages at each call, found 1 and 3"):
        CrossStitch(TASKS, longer, heads())
