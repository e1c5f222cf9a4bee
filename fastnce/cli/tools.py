"""`fastnce doctor`, `fastnce build` and `fastnce bench`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from fastnce.cli.parsing import no_arguments
from fastnce.errors import UserError


def doctor(args: list[str]) -> int:
    """Show what is installed, which backends run here, and what is missing."""
    from fastnce.doctor import report

    no_arguments("doctor", doctor.__doc__, args)
    print(report())
    return 0


def build(args: list[str]) -> int:
    """Compile the native library and, where there is a GPU or with FASTNCE_CUDA=1, the CUDA library."""
    from fastnce.backends import build as building

    no_arguments("build", build.__doc__, args)
    try:
        print(f"Native library: {building.build()}")
        print(f"CUDA library: {_cuda_library()}")
    except building.BuildError as error:
        raise UserError(str(error)) from error
    return 0


def _cuda_library() -> Path | str:
    """The library, or why there is none: without a compiler that is no error, unless it was asked for."""
    from fastnce.backends import build as building

    reason = building.wanted(building.CUDA)
    if reason == "ok":
        try:
            return building.build(building.CUDA)
        except building.BuildError as error:
            if os.environ.get("FASTNCE_CUDA") == "1":
                raise
            reason = str(error)
    return f"not built: {reason}"


def bench(args: list[str]) -> int:
    """Time the ops against their rivals; needs a checkout of the repository."""
    sys.path.insert(0, os.getcwd())
    try:
        from benchmarks.__main__ import main as benchmarks_main
    except ModuleNotFoundError as error:
        raise UserError(
            "the benchmarks are not part of the installed package. Run this in a checkout of the repository."
        ) from error
    return benchmarks_main(args)
