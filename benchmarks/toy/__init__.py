"""The two-objective toy of CAGrad, Nash-MTL and FAMO: `python -m benchmarks run toy`."""
