"""Exit codes, one-line errors and argument types that all commands share."""

import argparse
import os
import re
import sys
from collections.abc import Callable

from neo_jax.errors import InputError

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def run_command(name: str, command: Callable[[], int], on_interrupt: str = "interrupted") -> int:
    """Runs a command and returns its exit code: 2 for bad input, 130 for Ctrl-C.

    Args:
      name: begins the line of an error.
      command: imports its modules, parses the arguments and runs; errors of all three are caught.
      on_interrupt: the message after Ctrl-C.
    """
    try:
        code = command()
        sys.stdout.flush()  # here, where a reader that has gone is no error
        return code
    except InputError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: {on_interrupt}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of the output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def make_parser(prog: str, description: str | None, epilog: str = "") -> argparse.ArgumentParser:
    """A parser whose description and examples keep their lines; `%(prog)s` is the command."""
    return argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def non_negative_int(text: str) -> int:
    if int(text) < 0:
        raise ValueError(text)
    return int(text)


def positive_int(text: str) -> int:
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def byte_size(text: str) -> int:
    """'5GB' -> 5 * 10**9."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if not match or match[2].upper() not in _UNITS:
        raise argparse.ArgumentTypeError(f"{text!r}: give a size as in 5GB, 500MB or 2GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])
