"""The Jacobian routine: task gradients, their Gramian, their combination.

It never knows which method is in use, and makes no device-to-host synchronisation.
"""

from gradbal.jacobian.auto import Auto, Case, Rule
from gradbal.jacobian.compiled import gradients
from gradbal.jacobian.engines import (
    ENGINES,
    WITHOUT_ROWS,
    Engine,
    Found,
    GramianEngine,
    Kept,
    RowsEngine,
    finds_gramian,
    takes_rows,
)
from gradbal.jacobian.graph import (
    Absent,
    Reach,
    Root,
    RootsInTurn,
    check_dense,
    hooks_held_back,
    reach_of,
    reached_parameters,
    shared_indices,
    there,
    used_by_ddp,
)
from gradbal.jacobian.instance import FoundInstances, Instance
from gradbal.jacobian.layerwise import Layerwise
from gradbal.jacobian.loop import Loop, gradients_of
from gradbal.jacobian.products import (
    BLOCK,
    CHUNK,
    SMALL,
    combine,
    combine_few,
    cross_gramian,
    gramian,
    product_of_rows,
    upload,
    wants_exact,
)
from gradbal.jacobian.rows import Rows, deliver
from gradbal.jacobian.sketch import Sketch, Sketched
from gradbal.jacobian.sums import WeightedSum
from gradbal.jacobian.vmap import VMap

__all__ = [
    "BLOCK",
    "CHUNK",
    "ENGINES",
    "SMALL",
    "WITHOUT_ROWS",
    "Absent",
    "Auto",
    "Case",
    "Engine",
    "Found",
    "FoundInstances",
    "GramianEngine",
    "Instance",
    "Kept",
    "Layerwise",
    "Loop",
    "Reach",
    "Root",
    "RootsInTurn",
    "Rows",
    "RowsEngine",
    "Rule",
    "Sketch",
    "Sketched",
    "VMap",
    "WeightedSum",
    "check_dense",
    "combine",
    "combine_few",
    "cross_gramian",
    "deliver",
    "finds_gramian",
    "gradients",
    "gradients_of",
    "gramian",
    "hooks_held_back",
    "product_of_rows",
    "reach_of",
    "reached_parameters",
    "shared_indices",
    "takes_rows",
    "there",
    "upload",
    "used_by_ddp",
    "wants_exact",
]
