"""The error that is the user's to mend, and so is shown as one line without a traceback."""


class UserError(ValueError):
    """A mistake of the user's: the message says what is wrong, where, the value given and what to do.

    Every other `ValueError` is a bug of ours, and keeps its traceback.
    """
