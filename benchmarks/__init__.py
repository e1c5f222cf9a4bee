"""Benchmarks of the fused ops against plain PyTorch and the published eager forms: ``python -m benchmarks --help``."""

import importlib.util
import sys

if importlib.util.find_spec("torch") is None:
    sys.exit(
        f"benchmarks: {sys.executable} has no torch. Use a Python that has: make gpu-report PYTHON=..."
    )
