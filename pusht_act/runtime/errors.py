"""The error for mistakes of the user, shown as one line without a traceback."""


class UserError(ValueError):
    """A mistake of the user. Its message is one line: what is wrong, where, the value given, what to do.

    Any other `ValueError` is a bug in this project, and keeps its traceback.
    """
