"""The command line: ``fastnce COMMAND ...``, also ``python -m fastnce``. A command is a file of this package."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from fastnce.cli.ablate import ablate
from fastnce.cli.data import data
from fastnce.cli.evaluate import evaluate
from fastnce.cli.export import export
from fastnce.cli.features import features
from fastnce.cli.generate import generate
from fastnce.cli.parsing import nearest
from fastnce.cli.tools import bench, build, doctor
from fastnce.cli.train import train
from fastnce.cli.translate import translate
from fastnce.cli.visualize import visualize
from fastnce.errors import UserError

INTERRUPTED = 130

COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "translate": translate,
    "generate": generate,
    "features": features,
    "evaluate": evaluate,
    "export": export,
    "ablate": ablate,
    "visualize": visualize,
    "data": data,
    "bench": bench,
    "build": build,
    "doctor": doctor,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        0, or 2 after a mistake in the command, whose one line is on standard error; 130 after Ctrl-C.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(_help())
        return 0
    if args[0] == "--version":
        import fastnce

        print(f"fastnce {fastnce.__version__}")
        return 0
    name, rest = args[0], args[1:]
    if name not in COMMANDS:
        return _fail("fastnce", f"no command {name!r}. {nearest(name, COMMANDS)}")
    try:
        return COMMANDS[name](rest)
    except BrokenPipeError:  # such as `fastnce doctor | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except UserError as error:
        if os.environ.get("FASTNCE_DEBUG"):
            raise
        return _fail(f"fastnce {name}", str(error))
    except KeyboardInterrupt:
        print(f"\nfastnce {name}: interrupted", file=sys.stderr)
        return INTERRUPTED


def _help() -> str:
    lines = [
        "usage: fastnce COMMAND ...",
        "",
        "Fused exact contrastive losses, and CUT and ContraGAN on them.",
        "",
    ]
    lines += [f"  {name:10} {function.__doc__}" for name, function in COMMANDS.items()]
    lines += [
        "",
        "fastnce COMMAND --help shows a command's options. fastnce --version shows the version.",
    ]
    return "\n".join(lines)


def _fail(who: str, message: str) -> int:
    print(f"{who}: error: {message}", file=sys.stderr)
    return 2
