"""The networks of the benchmarks, one file each."""
