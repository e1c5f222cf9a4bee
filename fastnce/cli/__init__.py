"""The command line: ``fastnce COMMAND ...``, also ``python -m fastnce``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from fastnce.cli import data, runs
from fastnce.cli.parsing import run_with_options
from fastnce.cli.tools import bench, build, doctor, verify
from fastnce.cli.train import ablate, train
from fastnce.errors import UserError, known

INTERRUPTED = 130

# Functions whose signatures are the options, but for those that parse their arguments themselves.
COMMANDS: dict[str, Callable | dict[str, Callable]] = {
    "train": train,
    "translate": runs.translate,
    "generate": runs.generate,
    "edit": runs.edit,
    "features": runs.features,
    "invert": runs.invert,
    "bootstrap": runs.bootstrap,
    "evaluate": runs.evaluate,
    "export": runs.export,
    "ablate": ablate,
    "visualize": {
        "gallery": runs.gallery,
        "pca": runs.pca,
        "similarity": runs.similarity,
        "steps": runs.steps,
    },
    "data": {
        "digits": data.digits,
        "digits-photos": data.digits_photos,
        "photo-crops": data.photo_crops,
        "photos": data.photos,
        "posterised-photos": data.posterised_photos,
        "single-photos": data.single_photos,
        "texture-mosaics": data.texture_mosaics,
    },
    "bench": bench,
    "build": build,
    "doctor": doctor,
    "verify": verify,
}
_PARSE_THEMSELVES = (train, ablate, bench, build, doctor, verify)
_GROUPS = {
    "visualize": "Show what a model learnt: similarity maps, components of features, steps of an inversion, a run as a page.",
    "data": "Write one of the built-in data sets.",
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
    name, who = args[0], "fastnce"
    try:
        command, who = COMMANDS[known(name, COMMANDS, "command")], f"fastnce {name}"
        if command in _PARSE_THEMSELVES:
            return command(args[1:])
        # One class is a natural thing to ask for.
        rest = ["--classes" if arg == "--class" else arg for arg in args[1:]]
        run_with_options(name, command, rest)
        return 0
    except BrokenPipeError:  # such as `fastnce doctor | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except UserError as error:
        if os.environ.get("FASTNCE_DEBUG"):
            raise
        print(f"{who}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{who}: interrupted", file=sys.stderr)
        return INTERRUPTED


def _help() -> str:
    lines = [
        "usage: fastnce COMMAND ...",
        "",
        "Fused exact contrastive losses, and CUT and ContraGAN on them.",
        "",
    ]
    for name, command in COMMANDS.items():
        text = _GROUPS[name] if isinstance(command, dict) else command.__doc__.splitlines()[0]
        lines.append(f"  {name:10} {text}")
    lines += [
        "",
        "fastnce COMMAND --help shows a command's options. fastnce --version shows the version.",
    ]
    return "\n".join(lines)
