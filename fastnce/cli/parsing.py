"""Shared by the commands: options from a function's signature, and each mistake in one line that names the nearest word."""

from __future__ import annotations

import contextlib
import inspect
import io
import pkgutil
import re
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

from fastnce.errors import UserError, known

Parsed = Callable[..., Any] | type


def run_with_options(
    command: str, function: Callable | dict[str, Callable], args: list[str]
) -> None:
    """Parses ``args`` after the signature of ``function`` (or of the one the first argument names), and calls it."""
    tyro, prog = import_tyro(), f"fastnce {command}"
    if isinstance(function, dict):
        if not args or args[0] in ("-h", "--help"):
            args = ["--help"]
            tyro.extras.subcommand_cli_from_dict(function, prog=prog, args=args)
        name = known(args[0], function, command)
        prog, function, args = f"{prog} {name}", function[name], args[1:]
    # What tyro calls only returns the values, so that what it prints is about parsing alone.
    signature, hints = _options(function, tyro)

    def values(**given: object) -> dict[str, object]:
        return given

    values.__doc__ = function.__doc__
    values.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
    values.__signature__ = signature  # type: ignore[attr-defined]
    required = [p.name for p in signature.parameters.values() if p.default is p.empty]
    function(**parse(values, hints, required, prog, args))


def with_options_of(*sources: Callable | str) -> Callable[[Callable], Callable]:
    """For a command that ends in ``**how``: also takes the optional arguments of other functions, and their help.

    Functions of packages that are slow to import are given by their dotted names. What the command has itself wins.
    """

    def marked(command: Callable) -> Callable:
        command.sources = sources  # type: ignore[attr-defined]
        return command

    return marked


def _options(command: Callable, tyro: ModuleType) -> tuple[inspect.Signature, dict[str, Any]]:
    """The options of a command, with their help where it is not the command's own, and their types."""
    import docstring_parser

    found: dict[str, inspect.Parameter] = {}
    types: dict[str, Any] = {}
    for source in (command, *getattr(command, "sources", ())):
        function = pkgutil.resolve_name(source) if isinstance(source, str) else source
        hints = typing.get_type_hints(function)
        told = {  # several may share a line
            name: p.description
            for p in docstring_parser.parse(function.__doc__).params
            for name in p.arg_name.split(", ")
        }
        for name, p in inspect.signature(function).parameters.items():
            if function is command and p.kind is not p.VAR_KEYWORD:
                found[name] = p.replace(annotation=hints[name], kind=p.KEYWORD_ONLY)
            elif p.default is not p.empty and name not in found:
                text = tyro.conf.arg(help=" ".join(told[name].split()))
                annotation = typing.Annotated[hints[name], text]
                found[name] = p.replace(annotation=annotation, kind=p.KEYWORD_ONLY)
            else:
                continue
            types[name] = hints[name]
    return inspect.Signature(list(found.values()), return_annotation=dict), types


def parse(
    target: Parsed,
    hints: dict[str, object],
    required: Sequence[str],
    prog: str,
    args: list[str],
    also: Sequence[str] = (),
    **options: object,
) -> Any:
    """The result of tyro for ``args`` for ``target``, whose options are ``hints``: their types by name.

    Numbers of a list may be joined by commas. A mistake is one line; ``also`` are options that the caller has read already.
    """
    names = set(hints) - {"return", "system"}
    if not {"-h", "--help"} & set(args):
        _check_names({*names, *also}, required, args)
    lists = {_dashed(name) for name in names if _holds_numbers(hints[name])}
    with _one_line(prog):
        return import_tyro().cli(target, prog=prog, args=_without_commas(args, lists), **options)


def import_tyro() -> ModuleType:
    """The option parser; raises `UserError` where it is not installed."""
    try:
        import tyro
    except ModuleNotFoundError as error:
        raise UserError(
            "this command needs the packages for training. Install them with: pip install 'fastnce[train]'"
        ) from error
    return tyro


def named_in(args: Sequence[str]) -> set[str]:
    """The names of the options in ``args``: ``num_patches`` of ``--num-patches 3``."""
    given = (arg.partition("=")[0] for arg in args if arg.startswith("--"))
    return {option.removeprefix("--").replace("-", "_") for option in given}


def no_arguments(command: str, text: str | None, args: list[str]) -> None:
    """For a command without options: shows `text` as its help, and rejects anything else."""
    if args in (["-h"], ["--help"]):
        print(f"usage: fastnce {command}\n\n{text}")
        raise SystemExit(0)
    if args:
        raise UserError(f"takes no arguments, got {' '.join(args)!r}.")


def _dashed(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _check_names(names: set[str], required: Sequence[str], args: Sequence[str]) -> None:
    options = {_dashed(name) for name in names}
    negated = {option.replace("--", "--no-", 1) for option in options}
    given = named_in(args)
    for option in map(_dashed, given):
        if option not in negated:
            known(option, options, "option")
    for name in required:
        if name not in given:
            raise UserError(f"{_dashed(name)} is missing. Give it as an option.")


def _holds_numbers(hint: object) -> bool:
    """Whether a type is, or may be, a list of numbers."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return any(_holds_numbers(choice) for choice in typing.get_args(hint))
    is_list = typing.get_origin(hint) in (tuple, Sequence)
    return is_list and typing.get_args(hint)[0] in (int, float)


def _without_commas(args: Sequence[str], lists: set[str]) -> list[str]:
    """``--nce-layers 0,4,8`` as ``--nce-layers 0 4 8``."""
    found, inside = [], False
    for arg in args:
        option, equals, value = arg.partition("=")
        if arg.startswith("--"):
            inside = option.replace("_", "-") in lists
            if not (inside and equals and "," in value):
                found.append(arg)
                continue
            found.append(option)
            arg = value
        found += [part for part in arg.split(",") if part] if inside else [arg]
    return found


@contextlib.contextmanager
def _one_line(prog: str) -> Iterator[None]:
    """Turns the frame that tyro draws around a mistake into an error of one line."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            yield
    except SystemExit as stop:
        text = re.sub(r"[╭╮╰╯│]|\x1b\[[0-9;]*m", "", printed.getvalue())
        # The first line is the title, and below the first rule is the help.
        message = re.split(r"─{10,}", re.sub(r"^ ?─.*─\s*\n", "", text.lstrip()))[0]
        if stop.code in (0, None) or not message.strip():
            raise
        raise UserError(f"{' '.join(message.split()).rstrip('.')}. See {prog} --help.") from None
