"""The exception for a user's mistake, and the words for a name that is not there."""

import difflib
from collections.abc import Collection


class UserError(Exception):
    """A mistake that the command line shows as one line, with exit code 2 and no traceback.

    The message names what was given, what was expected and how to put it right.
    """


def known(name: str, names: Collection[str], what: str) -> str:
    """`name` if it is one of `names`; else raises `UserError` that calls it a `what` and shows the nearest one."""
    if name in names:
        return name
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"Did you mean {close[0]!r}?" if close else f"Use one of: {', '.join(sorted(names))}."
    raise UserError(f"unknown {what} {name!r}. {hint}")
