"""The error for mistakes of the user, shown as one line without a traceback."""

from collections.abc import Sequence

MOST_LISTED = 6
"""How many names a message lists."""


class UserError(ValueError):
    """A mistake of the user. Its message is one line: what is wrong, where, the value given, what to do.

    Any other `ValueError` is a bug in this project, and keeps its traceback.
    """


def join_some(names: Sequence[str]) -> str:
    """Return `names` as a list for a message; of a long one the first few and how many more there are."""
    more = len(names) - MOST_LISTED
    # "and 1 more" is no shorter than the name.
    return ", ".join(names) if more <= 1 else f"{', '.join(names[:MOST_LISTED])} and {more} more"
