"""The one exception for input that a user can mend."""


class InputError(ValueError):
    """Bad input. The message names the file, record or key and the way out.

    Command lines print it as a single line and exit with code 2.
    """
