"""The Jacobian routine: task gradients, their Gramian, their combination.

It never knows which method is in use, and makes no device-to-host synchronisation.
"""

from gradbal.jacobian.engines import (
    ENGINES,
    Engine,
    Found,
    GramianEngine,
    Kept,
    RowsEngine,
    make_engine,
)
from gradbal.jacobian.graph import (
    check_dense,
    hooks_held_back,
    reached_parameters,
    shared_indices,
)
from gradbal.jacobian.products import (
    BLOCK,
    CHUNK,
    SMALL,
    combine,
    cross_gramian,
    gramian,
    upload,
    wants_exact,
)
from gradbal.jacobian.rows import Rows

__all__ = [
    "BLOCK",
    "CHUNK",
    "ENGINES",
    "SMALL",
    "Engine",
    "Found",
    "GramianEngine",
    "Kept",
    "Rows",
    "RowsEngine",
    "check_dense",
    "combine",
    "cross_gramian",
    "gramian",
    "hooks_held_back",
    "make_engine",
    "reached_parameters",
    "shared_indices",
    "upload",
    "wants_exact",
]
