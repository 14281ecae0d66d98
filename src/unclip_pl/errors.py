"""Mistakes that a user can mend: the command line prints them as one line, and anything else with its traceback."""


class InputError(ValueError):
    """Says what was expected, what arrived, and what to do about it.

    Raise it where data, settings or arguments enter the package. It is a ``ValueError``, so that code which calls the
    package from Python can catch it as one.
    """


class MissingFileError(InputError, FileNotFoundError):
    """Names a file that is not there, and the command that makes it."""
