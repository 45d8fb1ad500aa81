import torch

from gradbal import MultiTaskOptimizer
from gradbal.aggregators.mean import Mean


class Second(Mean):
    """Another scalarizer, by way of the mean."""

    def scalarize(self, losses):
        return losses[1]


def test_a_subclass_is_what_its_scalarize_says():
    x = torch.tensor([2.0, 3.0], requires_grad=True)
    for aggregator, expected in ((Mean(), [0.5, 0.5]), (Second(), [0.0, 1.0])):
        opt = MultiTaskOptimizer(torch.optim.SGD([x], lr=0.1), aggregator)
        opt.zero_grad()
        opt.backward([x[0], x[1]])
        assert x.grad.tolist() == expected
        assert opt.weights.tolist() == expected
