"""Text normalisation before answers are compared, as in the VQA and MMMU evaluations."""

import re

from neo_jax.eval.scoring.matching import NUMBERS, without_punctuation

_ARTICLES = ("a", "an", "the")
_TO_DIGITS = {"none": "0", **{word: str(digit) for digit, word in enumerate(NUMBERS[:11])}}

# Each is recognised without its apostrophes.
_SIMPLE = (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's "
    "how'd how'll how's isn't it'd it'll ma'am might've mightn't must've mustn't needn't not've "
    "o'clock oughtn't shan't should've shouldn't somebody'll somebody's someone'd someone'll "
    "someone's something'd something'll that's there'd there're there's they'd they'll they're "
    "they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's "
    "where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd "
    "you'll you're you've"
)
# Each is recognised with one of its two apostrophes.
_DOUBLE = (
    "couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've "
    "someone'd've something'd've there'd've they'd've we'd've who'd've wouldn't've you'd've"
)
# Further entries of the official table.
_ODD = {
    **{"somebody'd": "somebodyd", "ow's'at": "'ow's'at", "'ows'at": "'ow's'at"},
    **{"'ow'sat": "'ow's'at", "yall'll": "y'all'll", "y'allll": "y'all'll"},
    **dict.fromkeys(("yall'd've", "y'alld've", "y'all'dve"), "y'all'd've"),
}


def _contractions() -> dict[str, str]:
    table = {word.replace("'", ""): word for word in _SIMPLE.split()}
    for word in _DOUBLE.split():
        first, second, third = word.split("'")
        table[f"{first}{second}'{third}"] = table[f"{first}'{second}{third}"] = word
    return table | _ODD


_CONTRACTIONS = _contractions()


def vqa_answer(text: str) -> str:
    """Lower case, without articles and punctuation, small numbers as digits."""
    text = without_punctuation(text.replace("\n", " ").replace("\t", " ").strip())
    words = (_TO_DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def one_line(text: str) -> str:
    """Lower case, with single spaces."""
    return " ".join(text.lower().split())


_NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)
_SIGNPOSTS = (
    *("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ", "are "),
    *("in total ", "total ", "identify ", "recognize ", "calculated as ", "counted as "),
    *("measured as ", "observed as ", "concluded as ", "found to be ", "equals "),
    *("determined to be ", "number of ", "value is ", "adds up to ", "have ", "has "),
)


def open_answers(answer: str) -> set[str | float]:
    """The candidate answers in a reply to an open question, as in MMMU: phrases and numbers."""
    answer = answer.strip().strip(".").lower()
    phrases = _conclusions(answer) or [answer]
    numbers = [n for phrase in phrases for pattern in _NUMBERS for n in re.findall(pattern, phrase)]
    return {value for text in (*phrases, *numbers) for value in text_or_number(text)}


def _conclusions(answer: str) -> list[str]:
    """For each line the shortest text that follows a signpost such as "is" or "total"."""
    lines = answer.split("\n")
    found = []
    for number, line in enumerate(lines, 1):
        signposts = (*_SIGNPOSTS, "=") if number == len(lines) else _SIGNPOSTS
        ends = [line.split(sign)[-1].strip() for sign in signposts if sign in line]
        # As officially: an empty text is replaced by the next one.
        shortest = ""
        for end in ends:
            if not shortest or len(end) < len(shortest):
                shortest = end
        if shortest and shortest not in (":", ",", ".", "!", "?", ";", "'"):
            found.append(shortest)
    return found


def text_or_number(text: str) -> list[str | float]:
    """A number to two decimals, or lower-case text; one character: with a space before or after."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]
