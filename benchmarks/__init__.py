"""Published multi-task benchmarks for gradbal: `python -m benchmarks --help`."""
