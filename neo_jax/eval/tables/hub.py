"""Adapters from the Hugging Face copies of benchmarks to the columns of the official TSVs.

`standard` renames columns and turns an answer's number into its letter; the others do more for one
kind of file. None of them changes a row that has the official columns already.
"""

import string
from typing import Any

from neo_jax.eval.tables.rows import listed

_NAMES = {
    "answers": "answer",
    "ground_truth": "answer",
    "choices": "options",
    "questionid": "index",
    "question_id": "index",
    "task": "category",
    "sub_task": "category",
    "subcategory": "l2-category",
}


def standard(row: dict[str, Any]) -> dict[str, Any]:
    """Official column names, one column for each option, and the right answer as a letter."""
    row = dict(row)
    for theirs, ours in _NAMES.items():
        if theirs in row and ours not in row:
            row[ours] = row[theirs]
    for place, letter in enumerate(string.ascii_uppercase):
        for name in (f"choice_{letter.lower()}", f"option{place}"):
            if name in row and letter not in row:
                row[letter] = row[name]
    return _with_letter(row)


def _with_letter(row: dict[str, Any]) -> dict[str, Any]:
    answer = row.get("answer")
    if isinstance(answer, str) and len(answer) == 3 and answer[0] + answer[2] == "()":
        return row | {"answer": answer[1]}
    choices = listed(row["options"]) if "options" in row else []
    is_number = isinstance(answer, int) or (isinstance(answer, str) and answer.isdecimal())
    if is_number and str(answer) not in choices and 0 <= int(answer) < len(choices):
        return row | {"answer": string.ascii_uppercase[int(answer)]}
    return row


def yes_no(row: dict[str, Any]) -> dict[str, Any]:
    """ "yes" becomes "Yes". HallusionBench: builds the index from its parts; 1 becomes "Yes"."""
    row = standard(row)
    if "set_id" in row and "figure_id" in row:
        parts = (row.get("category"), row.get("l2-category"), "x", row["set_id"], row["figure_id"])
        row["index"] = "_".join(map(str, (*parts, row.get("question_id", row.get("index")))))
        row["answer"] = {"1": "Yes", "0": "No"}.get(str(row.get("gt_answer")), row.get("answer"))
    answer = str(row.get("answer", "")).capitalize()
    return row | {"answer": answer} if answer in ("Yes", "No") else row


def mmmu(row: dict[str, Any]) -> dict[str, Any]:
    """Takes split and category from an id such as validation_Art_3."""
    row = standard(row)
    split, _, subject = str(row.get("id", "")).rpartition("_")[0].partition("_")
    if subject and "split" not in row:
        row |= {"split": split, "category": row.get("category", subject.replace("_", " "))}
    return row


def chartqa(row: dict[str, Any]) -> dict[str, Any]:
    """Takes the split from the type of the question."""
    row = standard(row)
    names = {"human_test": "test_human", "augmented_test": "test_augmented"}
    return row | {"split": names[row["type"]]} if row.get("type") in names else row


def ocrbench(row: dict[str, Any]) -> dict[str, Any]:
    """Takes the category from the type of the question."""
    row = standard(row)
    return {"category": row["question_type"], **row} if "question_type" in row else row


def video(row: dict[str, Any]) -> dict[str, Any]:
    """Puts the options, in whichever columns they are, into `candidates`."""
    row = standard(row)
    letters = [row[letter] for letter in string.ascii_uppercase if letter in row]
    if "candidates" not in row and (letters or "options" in row):
        row["candidates"] = letters or row["options"]
    return row
