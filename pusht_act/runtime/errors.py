"""The error for mistakes of the user, shown as one line without a traceback."""

from collections.abc import Sequence

MOST_LISTED = 6
"""How many names a message lists."""
LONGEST = 2000
"""How many characters a message has."""


class UserError(ValueError):
    """A mistake of the user. Its message is one line: what is wrong, where, the value given, what to do.

    Any other `ValueError` is a bug in this project, and keeps its traceback.
    """


class DiskError(OSError):
    """A file cannot be written, for want of room or of permission. Its message is one line, as that of a UserError."""


def join_some(names: Sequence[str]) -> str:
    """Return `names` as a list for a message; of a long one the first few and how many more there are."""
    more = len(names) - MOST_LISTED
    # "and 1 more" is no shorter than the name.
    return ", ".join(names) if more <= 1 else f"{', '.join(names[:MOST_LISTED])} and {more} more"


def shorten(text: str) -> str:
    """Return `text` without its middle if it is longer than anybody reads: a value in it may be a file's whole text.

    Patterns that are looked for in it would take long, too.
    """
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} [...] {text[-LONGEST // 2 :]}"
