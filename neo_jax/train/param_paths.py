"""Paths of parameters, and path rules: regular expressions that choose some of them.

A parameter's path is its keys joined by slashes, such as `post_llm/attention/q_hw_dnh`. A rule must
match all of a path.
"""

import difflib
import re
from collections.abc import Sequence

from flax import traverse_util

from neo_jax.errors import InputError


def matching(tree: dict, rules: Sequence[str]) -> list[str]:
    """The paths that any of the rules matches, in the order of the tree.

    Raises:
      InputError: for a rule that is no regular expression, or matches nothing.
    """
    known, found = all_paths(tree), set()
    for rule in rules:
        try:
            matched = {path for path in known if re.fullmatch(rule, path)}
        except re.error as error:
            raise InputError(f"path rule {rule!r}: not a regular expression: {error}") from error
        if not matched:
            near = difflib.get_close_matches(rule, known, 3, cutoff=0.3)
            raise InputError(
                f"path rule {rule!r} matches no parameter; there are, for example, "
                + ", ".join(near or known[:3])
            )
        found |= matched
    return [path for path in known if path in found]


def all_paths(tree: dict) -> list[str]:
    """The paths of all leaves of a tree."""
    return list(traverse_util.flatten_dict(tree, sep="/"))


def split_params(tree: dict, chosen_paths: Sequence[str]) -> tuple[dict, dict]:
    """The leaves at `chosen_paths` and all other leaves, as two trees; see `merge_params`."""
    flat, chosen = traverse_util.flatten_dict(tree, sep="/"), set(chosen_paths)

    def part(is_chosen: bool) -> dict:
        leaves = {path: leaf for path, leaf in flat.items() if (path in chosen) == is_chosen}
        return traverse_util.unflatten_dict(leaves, sep="/")

    return part(True), part(False)


def merge_params(a: dict, b: dict) -> dict:
    """One tree of two that share no leaf: the inverse of `split_params`."""
    flat = traverse_util.flatten_dict(a, sep="/") | traverse_util.flatten_dict(b, sep="/")
    return traverse_util.unflatten_dict(flat, sep="/")
