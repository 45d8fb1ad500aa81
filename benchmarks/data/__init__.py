"""Where the benchmarks' data come from."""
