"""The exception for a user's mistake."""


class UserError(Exception):
    """A mistake that the command line shows as one line, with exit code 2 and no traceback.

    The message names what was given, what was expected and how to put it right.
    """
