"""Mistakes that a user can mend: the command line prints them as one line, and every other error with its traceback."""


class InputError(ValueError):
    """A mistake in data, settings or arguments. The message says what was expected, what arrived, and what to do.

    Raise it where data, settings or arguments enter the package. Code that calls the package from Python can catch it
    as a ``ValueError``.
    """


class MissingFileError(InputError, FileNotFoundError):
    """A file that does not exist. The message names the file and the command that makes it."""
