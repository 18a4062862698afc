"""One question of a benchmark: what its file says, by column, and how the columns are read."""

import ast
import json
import math
import string
from collections.abc import Mapping
from typing import Any

from neo_jax.errors import InputError

Row = Mapping[
    str, Any
]  # by column in lower case, but for options A, B, C; nothing missing is in it

# What the official code, which reads tables with pandas, takes for an empty cell.
MISSING = frozenset(
    (
        *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND"),
        *("1.#QNAN", "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"),
    )
)


def is_missing(value: Any) -> bool:
    if isinstance(value, str):
        return value in MISSING
    return value is None or (isinstance(value, float) and math.isnan(value))


def make_row(cells: Mapping[str, Any]) -> dict[str, Any]:
    """The row of what a file holds."""

    def name(column: str) -> str:
        return column if column in string.ascii_uppercase else column.lower()

    return {name(column): cell for column, cell in cells.items() if not is_missing(cell)}


def need(row: Row, column: str) -> Any:
    """A cell that must be there."""
    if column not in row:
        raise InputError(f"no {column}")
    return row[column]


def text(row: Row, column: str) -> str:
    return str(need(row, column))


def right_answer(row: Row) -> str:
    """The right answer; as the official scorers get it, "nan" if the file has none."""
    return str(row.get("answer", "nan"))


def listed(value: Any) -> list[str]:
    """A list, the text of one, as Python or JSON writes it, or one text alone."""
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


def answer_of(row: Row, prediction: str | None) -> str:
    """A prediction as the official scorers get it: one that reads as empty is the text "nan"."""
    return "nan" if is_missing(prediction) else str(prediction)
