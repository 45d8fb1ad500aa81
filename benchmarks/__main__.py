"""Entry point of `python -m benchmarks`."""

import importlib.util
import os
import sys

# The profiler, which memory is measured with, warns of every block that it has not seen before.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

for _package in ("typer", "rich", "matplotlib", "torchmetrics", "scipy", "jinja2"):
    if importlib.util.find_spec(_package) is None:
        sys.exit(f'python -m benchmarks needs {_package}: pip install "gradbal[bench]"')

from benchmarks.cli import app  # noqa: E402 - only now is it sure that it can be imported

if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
