"""`fastnce doctor`, `fastnce verify`, `fastnce build` and `fastnce bench`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

from fastnce.cli.parsing import no_arguments
from fastnce.errors import UserError, known
from fastnce.files import atomic_path


def doctor(args: list[str]) -> int:
    """Show what is installed, which backends run here, and what is missing."""
    from fastnce.doctor import report

    no_arguments("doctor", doctor.__doc__, args)
    print(report())
    return 0


class _Parser(argparse.ArgumentParser):
    """Raises its errors. It needs no package for training."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message[0].lower()}{message[1:]}. See {self.prog} --help.")


def verify(args: list[str]) -> int:
    """Find out which GPU kernels are right and faster on this machine; those are then used by themselves."""
    from fastnce import verification
    from fastnce.backends import verdicts
    from fastnce.verification.device import NONE

    parser = _Parser(prog="fastnce verify", description=verify.__doc__, allow_abbrev=False)
    parser.add_argument(
        "--seconds",
        type=float,
        default=verification.SECONDS,
        help="stop after so long; the same command goes on with the rest (default: %(default).0f)",
    )
    parser.add_argument(
        "--backend", choices=verdicts.EARNING, help="verify this one alone (default: both)"
    )
    parser.add_argument(
        "--again", action="store_true", help="do everything anew, whatever is known already"
    )
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="write the report there, for a bug report"
    )
    options = [option for action in parser._actions for option in action.option_strings]
    for arg in args:
        if arg.startswith("--"):
            known(arg.partition("=")[0], options, "option")
    given = parser.parse_args(args)
    kinds = verification.kinds()
    if not kinds:
        print(f"fastnce verify: {NONE}. Only the kernels of GPUs are verified.", file=sys.stderr)
        return 1
    how = {"backend": given.backend, "seconds": given.seconds, "again": given.again}

    def report() -> str:
        return "\n".join(verification.verify(place, **how) for place in kinds)

    if given.report is None:
        print(report())
        return 0
    with atomic_path(given.report) as temporary:  # an error now, not after two minutes
        temporary.write_text(report(), encoding="utf-8")
    print(f"Written: {given.report}")
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
