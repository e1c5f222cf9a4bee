"""`fastnce doctor`, `fastnce build` and `fastnce bench`."""

from __future__ import annotations

import os
import sys

from fastnce.cli.parsing import no_arguments
from fastnce.errors import UserError


def doctor(args: list[str]) -> int:
    """Show what is installed, which backends run here, and what is missing."""
    from fastnce.doctor import report

    no_arguments("doctor", doctor.__doc__, args)
    print(report())
    return 0


def build(args: list[str]) -> int:
    """Compile the native library against the installed torch."""
    from fastnce.build import BuildError
    from fastnce.build import build as build_library

    no_arguments("build", build.__doc__, args)
    try:
        print(f"Native library: {build_library()}")
    except BuildError as error:
        raise UserError(str(error)) from error
    return 0


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
