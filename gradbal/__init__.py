"""gradbal balances the gradients of several losses: one call replaces `sum(losses).backward()`."""

import gradbal.aggregators as aggregators
import gradbal.nn as nn
import gradbal.registry as registry
from gradbal.aggregators.base import (
    Aggregator,
    BilevelAggregator,
    ClosureAggregator,
    DoubleSamplingAggregator,
    GramianAggregator,
    JacobianAggregator,
    Scalarizer,
)
from gradbal.distributed import DistributedError
from gradbal.optimizer import MultiTaskOptimizer, NonFiniteError
from gradbal.registry import Info, Promises, create, info, list_aggregators, register

__all__ = [
    "Aggregator",
    "BilevelAggregator",
    "ClosureAggregator",
    "DistributedError",
    "DoubleSamplingAggregator",
    "GramianAggregator",
    "Info",
    "JacobianAggregator",
    "MultiTaskOptimizer",
    "NonFiniteError",
    "Promises",
    "Scalarizer",
    "__version__",
    "aggregators",
    "create",
    "info",
    "list_aggregators",
    "nn",
    "register",
    "registry",
]

__version__ = "0.1.0"
