"""The error that a user can mend, apart from every other."""

from __future__ import annotations


class UserError(ValueError):
    """Something in the configuration, the data or the files that its user can mend.

    The message is one sentence: the key or file, the value found, and what to do.  Command-line
    tools print it alone and exit with 1 (``cli/launch.py``); every other exception is a bug and
    keeps its traceback.
    """
