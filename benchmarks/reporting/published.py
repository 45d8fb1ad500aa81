"""Numbers of the papers, that stand beside ours in columns of their own."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["DELTA_M", "SOURCES", "STEP_TIMES", "STEP_TIMES_SOURCE", "Source", "order_of", "quote"]


class Source(NamedTuple):
    """A paper: its title with the venue, and where it is."""

    title: str
    link: str


SOURCES = {
    "caruana": Source(
        "Multitask Learning, Machine Learning 28, 1997",
        "https://doi.org/10.1023/A:1007379606734",
    ),
    "cagrad": Source(
        "Conflict-Averse Gradient Descent for Multi-task Learning, NeurIPS 2021",
        "https://arxiv.org/abs/2110.14048",
    ),
    "db_mtl": Source(
        "Dual-Balancing for Multi-Task Learning, 2023", "https://arxiv.org/abs/2308.12029"
    ),
    "fairgrad": Source(
        "Fair Resource Allocation in Multi-Task Learning, ICML 2024",
        "https://arxiv.org/abs/2402.15638",
    ),
    "famo": Source(
        "FAMO: Fast Adaptive Multitask Optimization, NeurIPS 2023",
        "https://arxiv.org/abs/2306.03792",
    ),
    "imtl_g": Source(
        "Towards Impartial Multi-task Learning, ICLR 2021",
        "https://openreview.net/forum?id=IMPnRXEWpvr",
    ),
    "kurin": Source(
        "In Defense of the Unitary Scalarization for Deep Multi-Task Learning, NeurIPS 2022",
        "https://arxiv.org/abs/2201.04122",
    ),
    "mgda": Source(
        "Multi-Task Learning as Multi-Objective Optimization, NeurIPS 2018",
        "https://arxiv.org/abs/1810.04650",
    ),
    "nash_mtl": Source(
        "Multi-Task Learning as a Bargaining Game, ICML 2022", "https://arxiv.org/abs/2202.01017"
    ),
    "aligned_mtl": Source(
        "Independent Component Alignment for Multi-Task Learning, CVPR 2023",
        "https://arxiv.org/abs/2305.19000",
    ),
    "pcgrad": Source(
        "Gradient Surgery for Multi-Task Learning, NeurIPS 2020",
        "https://arxiv.org/abs/2001.06782",
    ),
    "rlw": Source(
        "Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task Learning, "
        "TMLR 2022",
        "https://arxiv.org/abs/2111.10603",
    ),
    "upgrad": Source(
        "Jacobian Descent for Multi-Objective Optimization, 2024",
        "https://arxiv.org/abs/2406.16232",
    ),
    "uw": Source(
        "Multi-Task Learning Using Uncertainty to Weigh Losses, CVPR 2018",
        "https://arxiv.org/abs/1705.07115",
    ),
    "xin": Source(
        "Do Current Multi-Task Optimization Methods in Deep Learning Even Help?, NeurIPS 2022",
        "https://arxiv.org/abs/2209.11379",
    ),
}

_SETS = ("NYUv2", "Cityscapes", "QM9", "CelebA")

# In percent against single-task training, lower is better. Up to Nash-MTL from its paper (arXiv
# 2202.01017, tables 2, 3 and 6), FAMO and the CelebA column from FAMO's (arXiv 2306.03792, tables 1
# to 3, the two swapped columns of the third put right), the rest from NTKMTL's tables 1, 2, 6 and 7
# (arXiv 2510.18258), which quote the methods' own papers.
DELTA_M: dict[str, dict[str, float]] = {
    method: {name: v for name, v in zip(_SETS, values, strict=True) if v is not None}
    for method, values in {
        "mean": (5.59, 22.60, 177.6, 4.15),
        "rlw": (7.78, 24.38, 203.8, 1.46),
        "dwa": (3.57, 21.45, 175.3, 3.20),
        "uw": (4.05, 5.89, 108.0, 3.23),
        "mgda": (1.38, 44.14, 120.5, 14.85),
        "pcgrad": (3.97, 18.29, 125.7, 3.17),
        "graddrop": (3.58, 23.73, None, 3.29),
        "cagrad": (0.20, 11.64, 112.8, 2.48),
        "imtl_g": (-0.76, 11.10, 77.2, 0.84),
        "nash_mtl": (-4.04, 6.82, 62.0, 2.84),
        "famo": (-4.10, 8.13, 58.5, 1.21),
        "aligned_mtl": (-3.12, 5.27, None, None),
        "fairgrad": (-4.66, 5.18, 57.9, 0.37),
        "db_mtl": (-5.36, None, None, None),
    }.items()
}
"""By method and data set, the published Δm."""

STEP_TIMES: dict[str, tuple[float, float, float, float]] = {
    "famo": (1.18, 1.19, 1.13, 1.07),
    "cagrad": (1.61, 2.09, 3.33, 3.45),
    "imtl_g": (1.70, 2.10, 3.44, 3.05),
    "pcgrad": (1.50, 2.23, 3.96, 8.70),
    "mgda": (2.05, 2.32, 6.76, 5.28),
    "fairgrad": (2.06, 2.33, 6.50, 9.14),
    "nash_mtl": (2.07, 2.34, 6.58, 12.49),
}
"""By method, time an epoch over LS's on Cityscapes, NYUv2, QM9 and CelebA."""

STEP_TIMES_SOURCE = "bar chart of training times in LDC-MTL's repository (OptMN-Lab/LDC-MTL)"


def quote(better: str, worse: str) -> str:
    """The published Δm of two methods on the data sets that both have."""
    first, second = DELTA_M.get(better, {}), DELTA_M.get(worse, {})
    common = [name for name in _SETS if name in first and name in second]
    if not common:
        return ""
    pairs = ", ".join(f"{name} {first[name]:g} against {second[name]:g}" for name in common)
    return f"Δm {pairs}"


def order_of(name: str) -> dict[str, float]:
    """The published Δm of one data set, by method."""
    return {method: values[name] for method, values in DELTA_M.items() if name in values}
