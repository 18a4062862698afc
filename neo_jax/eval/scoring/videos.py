"""Questions about videos: the first capital letter, or the rules of MVBench, MLVU and VideoMMMU."""

from neo_jax.errors import InputError
from neo_jax.eval.scoring.matching import (
    REFUSED,
    first_letter,
    lettered,
    mentioned_option,
    option_letter,
)
from neo_jax.eval.scoring.normalise import open_answers, text_or_number
from neo_jax.eval.scoring.summary import Verdict
from neo_jax.eval.tables.rows import Row, listed, need, options, right_answer

NO_ANSWER = "nan"  # what an empty prediction is read as


def score_letter(row: Row, answer: str, letters: str = "ABCD") -> Verdict:
    """The first capital letter; without any, the option whose text is said."""
    said = first_letter(answer, letters) or option_letter(answer, _options(row))
    return Verdict(float((said or REFUSED) == right_answer(row)), said)


def score_long_video(row: Row, answer: str) -> Verdict:
    """As `score_letter` with five options; the right one may be given by its number."""
    if "correct_choice" in row:
        try:
            row = {**row, "answer": chr(ord("A") + int(row["correct_choice"]))}
        except (TypeError, ValueError, OverflowError) as error:
            said = row["correct_choice"]
            raise InputError(f"correct_choice {said!r}: not the number of an option") from error
    return score_letter(row, answer, "ABCDE")


def _options(row: Row) -> dict[str, str]:
    """Those in the question's lines, as officially; else the row's own."""
    found = {}
    for letter, line in lettered(str(row.get("question", "")).split("\n")[1:]).items():
        _, mark, after = line.partition(f"{letter}.")
        if mark:
            found[letter] = after.strip(". \n")
    return found or options(row)


def _right_option(row: Row) -> tuple[str, dict[str, str]]:
    """The letter of the right answer, given by its text or by its letter; "@" if no option is."""
    choices, answer = lettered(listed(need(row, "candidates"))), right_answer(row)
    for letter, choice in choices.items():
        if choice == answer:
            return letter, choices
    return answer if answer in choices else "@", choices


def score_mvbench(row: Row, answer: str) -> Verdict:
    """The first word has the right letter, or the other way round; or an option is matched."""
    if answer == NO_ANSWER:
        return Verdict(1.0, None, "no prediction, which counts as right")
    letter, choices = _right_option(row)
    wanted, word = f"({letter.lower()})", answer.lower().strip().split(" ")[0]
    said = option_letter(answer, choices)
    if word.replace(".", "") in wanted or wanted in word:
        is_sign = not any(sign.isalnum() for sign in word)
        fault = "the first word is only signs, which are part of every option" if is_sign else ""
        return Verdict(1.0, letter, fault)
    return Verdict(float(said == letter), said)


def score_mlvu(row: Row, answer: str) -> Verdict:
    """The letter before the first closing bracket, or alone; or an option is matched."""
    letter, choices = _right_option(row)
    place = answer.find(")")
    # As officially: with the bracket in front, nothing is left to look at.
    said = answer[place - 1 : place] if place >= 0 else answer
    if said != letter:
        said = option_letter(answer, choices)
    return Verdict(float(said == letter), said)


def score_video_mmmu(row: Row, answer: str) -> Verdict:
    """The last option mentioned. Open answers: what their file of scores makes of them, nothing."""
    answer, truth = answer.rpartition("Answer:")[2].strip(), right_answer(row)
    if row.get("question_type") == "multiple-choice":
        said = mentioned_option(answer, lettered(listed(need(row, "options"))))
        return Verdict(float(said == truth), said)
    said = open_answers(answer)
    wanted = [value for one in listed(truth) for value in text_or_number(one)]
    is_right = any(
        (isinstance(value, str) and any(isinstance(w, str) and w in value for w in wanted))
        or (isinstance(value, float) and value in wanted)
        for value in said
    )
    # The official scorer reads its list of meanings back as one text and goes through its letters.
    fault = "a right open answer is lost in the official scorer's own file" if is_right else ""
    return Verdict(0.0, sorted(map(str, said)), fault)
