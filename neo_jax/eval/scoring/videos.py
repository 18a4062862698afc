"""Scorers of the video benchmarks.

The first capital letter, and the rules of MVBench, MLVU and VideoMMMU.
"""

from neo_jax.errors import InputError
from neo_jax.eval.scoring.matching import (
    NO_ANSWER,
    REFUSED,
    first_letter,
    lettered,
    mentioned_option,
    option_letter,
)
from neo_jax.eval.scoring.metrics import Verdict
from neo_jax.eval.scoring.normalise import open_answers, text_or_number
from neo_jax.eval.tables.rows import Row, listed, need, options, right_answer


def score_letter(row: Row, answer: str, letters: str = "ABCD") -> Verdict:
    """The first capital letter; without any, the option whose text is in the answer."""
    letter = first_letter(answer, letters) or option_letter(answer, _options(row))
    return Verdict(float((letter or REFUSED) == right_answer(row)), letter)


def score_long_video(row: Row, answer: str) -> Verdict:
    """As `score_letter` with five options; the right one may be given by its number."""
    if "correct_choice" in row:
        try:
            row = {**row, "answer": chr(ord("A") + int(row["correct_choice"]))}
        except (TypeError, ValueError, OverflowError) as error:
            choice = row["correct_choice"]
            raise InputError(f"correct_choice {choice!r}: not the number of an option") from error
    return score_letter(row, answer, "ABCDE")


def _options(row: Row) -> dict[str, str]:
    """The options in the question's lines, as officially; else those of the row."""
    found = {}
    for letter, line in lettered(str(row.get("question", "")).split("\n")[1:]).items():
        _, mark, after = line.partition(f"{letter}.")
        if mark:
            found[letter] = after.strip(". \n")
    return found or options(row)


def _right_option(row: Row) -> tuple[str, dict[str, str]]:
    """The right letter, from the right answer's text or letter, and the options; "@": no option."""
    choices, answer = lettered(listed(need(row, "candidates"))), right_answer(row)
    for letter, choice in choices.items():
        if choice == answer:
            return letter, choices
    return answer if answer in choices else "@", choices


def score_mvbench(row: Row, answer: str) -> Verdict:
    """1 if the first word and the right "(letter)" contain one another, or the option matches."""
    if answer == NO_ANSWER:
        return Verdict(1.0, None, "no prediction, which counts as right")
    letter, choices = _right_option(row)
    target, word = f"({letter.lower()})", answer.lower().strip().split(" ")[0]
    parsed = option_letter(answer, choices)
    if word.replace(".", "") in target or target in word:
        is_text = any(sign.isalnum() for sign in word)
        fault = "" if is_text else "the first word is only signs, which are part of every option"
        return Verdict(1.0, letter, fault)
    return Verdict(float(parsed == letter), parsed)


def score_mlvu(row: Row, answer: str) -> Verdict:
    """1 if the right letter stands before the first ")", or alone, or the option matches."""
    letter, choices = _right_option(row)
    place = answer.find(")")
    # As officially: with the bracket in front, the text before it is empty.
    parsed = answer[place - 1 : place] if place >= 0 else answer
    if parsed != letter:
        parsed = option_letter(answer, choices)
    return Verdict(float(parsed == letter), parsed)


def score_video_mmmu(row: Row, answer: str) -> Verdict:
    """1 if the last option mentioned is right; 0 for open answers, as the official file has it."""
    answer, truth = answer.rpartition("Answer:")[2].strip(), right_answer(row)
    if row.get("question_type") == "multiple-choice":
        letter = mentioned_option(answer, lettered(listed(need(row, "options"))))
        return Verdict(float(letter == truth), letter)
    parsed = open_answers(answer)
    targets = [value for one in listed(truth) for value in text_or_number(one)]
    is_right = any(
        (isinstance(value, str) and any(isinstance(t, str) and t in value for t in targets))
        or (isinstance(value, float) and value in targets)
        for value in parsed
    )
    # The official scorer stores its list of candidates as text and then iterates over letters.
    fault = "a right open answer is lost in the official scorer's own file" if is_right else ""
    return Verdict(0.0, sorted(map(str, parsed)), fault)
