"""A row of a dataset table: its cells by column, and functions that read them."""

import ast
import json
import math
import string
from collections.abc import Mapping
from typing import Any

from neo_jax.errors import InputError

# Cells by column. Names are in lower case but for the options A, B, C; empty cells are left out.
Row = Mapping[str, Any]

# The texts that pandas, with which the official code reads tables, takes for an empty cell.
MISSING = frozenset(
    (
        *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND"),
        *("1.#QNAN", "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"),
    )
)


def is_missing(value: Any) -> bool:
    """Whether pandas would read the cell as empty."""
    if isinstance(value, str):
        return value in MISSING
    return value is None or (isinstance(value, float) and math.isnan(value))


def make_row(cells: Mapping[str, Any]) -> dict[str, Any]:
    """A row from the cells of a file."""

    def name(column: str) -> str:
        return column if column in string.ascii_uppercase else column.lower()

    return {name(column): cell for column, cell in cells.items() if not is_missing(cell)}


def need(row: Row, column: str) -> Any:
    """A cell that must not be empty.

    Raises:
      InputError: if it is.
    """
    if column not in row:
        raise InputError(f"no {column}")
    return row[column]


def text(row: Row, column: str) -> str:
    """As `need`, as text."""
    return str(need(row, column))


def right_answer(row: Row) -> str:
    """The right answer as text; "nan" if there is none, as the official scorers read it."""
    return str(row.get("answer", "nan"))


def listed(value: Any) -> list[str]:
    """The texts of a list, of a list written in Python or JSON, or of a single value."""
    if isinstance(value, str) and value[:1] == "[" and value[-1:] == "]":
        for parse in (ast.literal_eval, json.loads):
            try:
                found = parse(value)
            except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                continue
            if isinstance(found, list):
                return [str(item) for item in found]
    return [str(item) for item in value] if isinstance(value, list | tuple) else [str(value)]


def columns_of_options(row: Row) -> dict[str, str]:
    """The options that have columns of their own: A, B, C and so on."""
    return {letter: str(row[letter]) for letter in string.ascii_uppercase if letter in row}


def options(row: Row) -> dict[str, str]:
    """The options by letter: from their columns, a list, or lines such as "A. left"."""
    if found := columns_of_options(row):
        return found
    if "options" in row:
        return dict(zip(string.ascii_uppercase, listed(row["options"]), strict=False))
    candidates = row.get("candidates", [])
    if not isinstance(candidates, str) or candidates[:1] == "[":
        return dict(zip(string.ascii_uppercase, listed(candidates), strict=False))
    lines = (line.strip() for line in candidates.split("\n"))
    return {
        line[0].upper(): line[2:].strip()
        for line in lines
        if len(line) > 2 and line[0].isalpha() and line[1] == "."
    }
