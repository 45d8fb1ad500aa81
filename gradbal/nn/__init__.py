"""Architectures of multi-task learning, each as its paper defines it, behind one constructor.

`Arch(tasks=["a", "b"], encoder=factory, heads={"a": ..., "b": ...})` gives a dict of outputs from
`forward(x)`, and the output of one task from `forward(x, task="a")`.
"""

from gradbal.nn._base import MultiTaskModel
from gradbal.nn.hard_parameter_sharing import HardParameterSharing
from gradbal.nn.learning_to_branch import LearningToBranch
from gradbal.nn.mtan import MTAN
from gradbal.nn.sparse_sharing import SparseSharing, find_masks

__all__ = [
    "MTAN",
    "HardParameterSharing",
    "LearningToBranch",
    "MultiTaskModel",
    "SparseSharing",
    "find_masks",
]
