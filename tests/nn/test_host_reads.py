"""A pass through a model waits for nothing on an accelerator, and moves nothing to or from it."""

import pytest
import torch

from benchmarks.accelerator import Accelerator
from tests.nn.models import MODELS, batch, losses, make


@pytest.mark.parametrize("name", MODELS)
def test_a_pass_leaves_the_host_alone(name):
    wanted = [l.detach() for l in losses(make(name), batch()).values()]
    with Accelerator() as device:
        model, x = device.put(make(name)), device.put(batch())
        for training in (True, False):
            model.train(training)
            with device.watched() as seen:
                found = losses(model, x)
                (sum(found.values()) + model.regularization_loss(x)).backward()
            assert not seen.waits
            assert not seen.up
            assert not seen.down
            if training:
                values = [device.look(l.detach()).clone() for l in found.values()]
    torch.testing.assert_close(values, wanted)
