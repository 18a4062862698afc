"""The exception for input that a user can fix."""


class InputError(ValueError):
    """Bad input. The message names the file, record or key, and what to do.

    Command lines print it as a single line and exit with code 2.
    """
