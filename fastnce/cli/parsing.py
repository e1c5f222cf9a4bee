"""What the commands share: options from a function's signature, and errors that name the nearest word."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from types import ModuleType

from fastnce.errors import UserError


def run_with_options(
    command: str, function: Callable | dict[str, Callable], args: list[str]
) -> None:
    """Parses ``args`` after the signature of ``function`` (or of the one the first argument names), and calls it."""
    tyro, prog = import_tyro(), f"fastnce {command}"
    if isinstance(function, dict):
        tyro.extras.subcommand_cli_from_dict(function, prog=prog, args=args)
    else:
        tyro.cli(function, prog=prog, args=args)


def import_tyro() -> ModuleType:
    """The option parser; raises `UserError` where it is not installed."""
    try:
        import tyro
    except ModuleNotFoundError as error:
        raise UserError(
            "this command needs the packages for training. Install them with: pip install 'fastnce[train]'"
        ) from error
    return tyro


def no_arguments(command: str, text: str | None, args: list[str]) -> None:
    """For a command without options: shows `text` as its help, and rejects anything else."""
    if args in (["-h"], ["--help"]):
        print(f"usage: fastnce {command}\n\n{text}")
        raise SystemExit(0)
    if args:
        raise UserError(f"takes no arguments, got {' '.join(args)!r}.")


def nearest(name: str, names: Sequence[str] | dict) -> str:
    """``Did you mean 'train'? Expected one of: ...``."""
    close = difflib.get_close_matches(name, names, n=1)
    guess = f"Did you mean {close[0]!r}? " if close else ""
    return f"{guess}Expected one of: {', '.join(names)}."
