"""All benchmarks, by the name that `run` takes."""

from benchmarks.benchmark import Benchmark
from benchmarks.census import CENSUS, CENSUS_EDUCATION
from benchmarks.chemicals import CHEMICALS, CHEMICALS_11
from benchmarks.fashion import FASHION_AND_MNIST, MULTI_FASHION
from benchmarks.multimnist import MULTIMNIST
from benchmarks.sentiment import SENTIMENT
from benchmarks.yeast import YEAST

__all__ = ["BENCHMARKS"]

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
