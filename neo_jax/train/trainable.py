"""Path rules: which parameters something applies to, as patterns over the tree of parameters.

A parameter's path is its keys joined by slashes, such as `post_llm/attention/q_hw_dnh`; a pattern
is a regular expression that must match all of it.
"""

import difflib
import re
from collections.abc import Sequence

from flax import traverse_util

from neo_jax.errors import InputError


def matching(tree: dict, patterns: Sequence[str]) -> list[str]:
    """Paths of the leaves that any of the patterns matches.

    Raises:
      InputError: for a pattern that is no regular expression, or matches nothing.
    """
    known, found = paths(tree), set()
    for pattern in patterns:
        try:
            matched = {path for path in known if re.fullmatch(pattern, path)}
        except re.error as error:
            raise InputError(f"path rule {pattern!r}: not a regular expression: {error}") from error
        if not matched:
            near = difflib.get_close_matches(pattern, known, 3, cutoff=0.3)
            raise InputError(
                f"path rule {pattern!r} matches no parameter; there are, for example, "
                + ", ".join(near or known[:3])
            )
        found |= matched
    return [path for path in known if path in found]


def paths(tree: dict) -> list[str]:
    """Of all leaves."""
    return list(traverse_util.flatten_dict(tree, sep="/"))


def split(tree: dict, chosen_paths: Sequence[str]) -> tuple[dict, dict]:
    """The leaves at `chosen_paths` and the others, as two trees that `merge` joins again."""
    flat, chosen = traverse_util.flatten_dict(tree, sep="/"), set(chosen_paths)

    def part(is_chosen: bool) -> dict:
        leaves = {path: leaf for path, leaf in flat.items() if (path in chosen) == is_chosen}
        return traverse_util.unflatten_dict(leaves, sep="/")

    return part(True), part(False)


def merge(a: dict, b: dict) -> dict:
    """One tree of two that share no leaf."""
    flat = traverse_util.flatten_dict(a, sep="/") | traverse_util.flatten_dict(b, sep="/")
    return traverse_util.unflatten_dict(flat, sep="/")
