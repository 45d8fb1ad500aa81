"""All benchmarks, by the name that `run` takes."""

import difflib
import importlib

from benchmarks.benchmark import Benchmark
from benchmarks.census import CENSUS, CENSUS_EDUCATION
from benchmarks.chemicals import CHEMICALS, CHEMICALS_11
from benchmarks.errors import BadInput
from benchmarks.fashion import FASHION_AND_MNIST, MULTI_FASHION
from benchmarks.multimnist import MULTIMNIST
from benchmarks.sentiment import SENTIMENT
from benchmarks.yeast import YEAST

__all__ = ["BENCHMARKS", "find"]

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        MULTIMNIST,
        MULTI_FASHION,
        FASHION_AND_MNIST,
        CENSUS,
        CENSUS_EDUCATION,
        CHEMICALS,
        CHEMICALS_11,
        SENTIMENT,
        YEAST,
    )
}


def find(name: str) -> Benchmark:
    """The benchmark of that name; `package.module:ATTRIBUTE` is one of the user's own.

    Raises:
        BadInput: there is none.
    """
    module, colon, attribute = name.partition(":")
    if not colon:
        if name in BENCHMARKS:
            return BENCHMARKS[name]
        close = difflib.get_close_matches(name, BENCHMARKS, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(BENCHMARKS)}"
        raise BadInput(f"`NAME` must name what `list` shows, found {name!r}; {hint}")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise BadInput(
            f"`NAME` must be package.module:ATTRIBUTE, found {name!r}: {error}"
        ) from error
    if not isinstance(found, Benchmark):
        raise BadInput(f"`NAME` must be a benchmarks.benchmark.Benchmark, found {found!r}")
    return found
