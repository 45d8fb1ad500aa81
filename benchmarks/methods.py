"""What the benchmarks compare unless the user says otherwise."""

__all__ = ["COMMON"]

COMMON = (
    "mean",
    "upgrad",
    "mgda",
    "pcgrad",
    "cagrad",
    "nash_mtl",
    "imtl_g",
    "aligned_mtl",
    "fairgrad",
    "uw",
    "dwa",
    "rlw",
    "famo",
    "db_mtl",
)
"""The methods that papers compare with most, and this library's own choice, UPGrad."""
