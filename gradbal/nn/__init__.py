"""Architectures of multi-task learning, each as its paper defines it, behind one constructor.

`Arch(tasks=["a", "b"], encoder=factory, heads={"a": ..., "b": ...})` gives a dict of outputs from
`forward(x)`, and the output of one task from `forward(x, task="a")`.
"""

import gradbal.nn.backbones as backbones
import gradbal.nn.losses as losses
from gradbal.nn._base import MultiTaskModel
from gradbal.nn.cgc import CGC
from gradbal.nn.cross_stitch import CrossStitch
from gradbal.nn.dselect_k import DSelectK
from gradbal.nn.hard_parameter_sharing import HardParameterSharing
from gradbal.nn.learning_to_branch import LearningToBranch
from gradbal.nn.mmoe import MMoE
from gradbal.nn.mtan import MTAN
from gradbal.nn.ple import PLE
from gradbal.nn.sparse_sharing import SparseSharing, find_masks

__all__ = [
    "CGC",
    "MTAN",
    "PLE",
    "CrossStitch",
    "DSelectK",
    "HardParameterSharing",
    "LearningToBranch",
    "MMoE",
    "MultiTaskModel",
    "SparseSharing",
    "backbones",
    "find_masks",
    "losses",
]
