# ruff: noqa: RUF001  (the official patterns know Chinese punctuation)
"""Answer extraction: the letter, number, or yes or no that a model's answer states.

Each function follows one official scorer, quirks included, because the published numbers depend on
them. `tests/golden/scores/extractors.json` records their results. None: nothing was found.
"""

import ast
import re
import string
from collections.abc import Callable, Mapping

from neo_jax.eval.tables.rows import is_missing

REFUSED = "Z"  # the letter of no option
NO_ANSWER = "nan"  # the official scorers' reading of an empty prediction

_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_TO_SPACES = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))


def prediction_text(prediction: str | None) -> str:
    """A prediction as the official scorers read it: "nan" if it reads as an empty cell."""
    return NO_ANSWER if is_missing(prediction) else str(prediction)


def option_letter(answer: str, options: Mapping[str, str]) -> str | None:
    """The letter of the option that an answer names, by letter near the end or else by text.

    Args:
      options: letters to texts.
    """
    return _named_letter(answer, options) or _quoted_option(answer, options)


def _named_letter(answer: str, options: Mapping[str, str]) -> str | None:
    if any(refusal in answer for refusal in _REFUSALS):
        return REFUSED
    words = answer.translate(_TO_SPACES).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1 and words.index(named[0]) > len(words) - 5:
        return named[0]
    return REFUSED if not named and REFUSED in words else None


def _quoted_option(answer: str, options: Mapping[str, str]) -> str | None:
    answer = answer.lower()
    if len(answer) > 2 * sum(map(len, options.values())):
        return None
    quoted = [letter for letter, text in options.items() if text.lower() in answer]
    return quoted[0] if len(quoted) == 1 else None


# The forms that the spatial benchmarks look for, the most reliable first.
_INVISIBLE = re.compile("[\u200b\u200c\u200d\ufeff]")
_OPEN, _CLOSE = r"[(\[{（【]?\s*", r"\s*[)\]}）】]?"
_TAGGED = re.compile(
    r"<\s*answer\b[^>]*>\s*([A-J])(?:\s*[.．:：)\]】、])?.*?<\s*/\s*answer\s*>", re.I | re.S
)
_BEFORE_TAG = [
    re.compile(rf"(?<![A-Za-z]){_OPEN}([A-F]){_CLOSE}\s*</\s*{tag}\s*>", re.I)
    for tag in ("answer", "think")
]
_HEADING = re.compile(r"^[*_>\-\s]*(?:option|选项)\s+[A-J]\s*[:：]", re.I)
_ALONE = re.compile(r"\s*[*_`>（）\[\]【】()]*\s*([A-Fa-f])\s*[*_`（）\[\]【】()]*\s*")
_LABEL = re.compile(r"\s*([A-F])\s*[.．:：)\]】、-]\s+", re.I)
_INLINE = re.compile(
    r"(?<![A-Za-z])[*_`（\[{(]*\s*([A-F])\s*[*_`）\]})]*(?=$|[\s.,:;!?)\]】》」』，。；、：）])"
)
_CONCLUDED = re.compile(
    r"(?:final\s*answer|the\s*answer\s*is|answer(?:\s*is)?|correct\s*answer|"
    r"答案|最终答案|结论|所以|因此|我选(?:择)?|选择|选)\s*[:：>＝=]?\s*"
    rf"{_OPEN}([A-F]){_CLOSE}(?:\b|[.)、。])",
    re.I,
)
_CAPITAL = re.compile(rf"(?<![A-Za-z]){_OPEN}([A-F]){_CLOSE}(?![A-Za-z])")
_TAIL, _TAIL_LINES = 800, 6  # characters, lines


def stated_letter(answer: str) -> str | None:
    """The letter, A to F, that a free-form answer concludes with; in an <answer> tag, A to J."""
    text = _INVISIBLE.sub("", answer.strip())
    tail = text[-_TAIL:]
    for pattern, where in ((_TAGGED, text), *((pattern, tail) for pattern in _BEFORE_TAG)):
        if found := pattern.search(where):
            return found[1].upper()
    for where in (_after_thinking(text), tail):
        if letter := _letter_of_lines(where.splitlines()[-_TAIL_LINES:]):
            return letter
    if found := _CONCLUDED.search(text):
        return found[1].upper()
    kept = "\n".join(line for line in text.splitlines() if not _HEADING.search(line))
    letters = set(_CAPITAL.findall(kept))
    return letters.pop() if len(letters) == 1 else None


def _letter_of_lines(lines: list[str]) -> str | None:
    for line in reversed([line.strip() for line in lines if line.strip()]):
        if _HEADING.search(line):
            continue
        if found := _ALONE.fullmatch(line) or _LABEL.match(line):
            return found[1].upper()
        letters = set(_INLINE.findall(line))
        if len(letters) == 1:
            return letters.pop()
    return None


def _after_thinking(text: str) -> str:
    """The text after the last </think>, or else after the last <think>, or else all of it."""
    for tag in (r"</\s*think\s*>", r"<\s*think\s*>"):
        if ends := [found.end() for found in re.finditer(tag, text, re.I)]:
            return text[ends[-1] :].strip()
    return text


_NUMBER = r"[-+]?(?:\d*\.\d+|\d+)(?:[eE][-+]?\d+)?"
_TAGGED_NUMBER = re.compile(
    rf"<\s*answer\b[^>]*>\s*({_NUMBER})(?:[^\d<][^<]*)?<\s*/\s*answer\s*>", re.I
)
NUMBERS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve"),
)
_NUMBER_WORD = re.compile(rf"\b({'|'.join(NUMBERS)})\b", re.I)


def stated_number(answer: str) -> float | None:
    """The number in an answer: the first of a list, else in words, else tagged, else the first."""
    if (stripped := answer.strip()).startswith("[") and stripped.endswith("]"):
        try:
            listed = ast.literal_eval(answer)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return None
        answer = str(listed[0]) if isinstance(listed, list) and listed else answer
    elif word := _NUMBER_WORD.search(answer):
        return float(NUMBERS.index(word[1].lower()))
    text = _INVISIBLE.sub("", answer.strip())
    found = (
        _TAGGED_NUMBER.search(text)
        or re.search(f"({_NUMBER})", _after_thinking(text))
        or re.search(f"({_NUMBER})", text)
    )
    return float(found[1]) if found else None


_PREFIXES = (
    *("The best answer is", "The correct answer is", "The answer is", "The answer"),
    *("Answer:", "Option:"),
)


def first_letter(answer: str, letters: str = "ABCD") -> str | None:
    """The first capital among `letters`, at any place, once phrases like "Answer:" are removed."""
    text = answer.strip()
    for prefix in _PREFIXES:
        text = text.replace(prefix, "")
    found = re.search(f"[{letters}]", text)
    return found[0] if found else None


def yes_or_no(answer: str) -> str:
    """ "Yes" or "No" if exactly one of them is a word of the answer, else "Unknown"."""
    words = without_punctuation(answer.lower()).split()
    named = [word for word in ("yes", "no") if word in words]
    return named[0].capitalize() if len(named) == 1 else "Unknown"


_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'


def without_punctuation(text: str) -> str:
    """As the VQA evaluation: marks beside a space are removed, others become spaces."""
    has_grouped_digits = re.search(r"\d,\d", text) is not None
    cleaned = text
    for mark in _PUNCTUATION:
        vanishes = mark + " " in text or " " + mark in text or has_grouped_digits
        cleaned = cleaned.replace(mark, "" if vanishes else " ")
    # Only the first 32: there the official code passes a flag where the count belongs.
    return re.sub(r"(?<!\d)\.(?!\d)", "", cleaned, count=32)


def mentioned_option(answer: str, options: Mapping[str, str]) -> str | None:
    """As MMMU's own evaluation: the last option named, by letter or else by text."""
    for mark in ",.!?;:'":
        answer = answer.strip(mark)
    answer = f" {answer} "
    found = _written(answer, options, "{}.") | _written(answer, options, "{}:")
    if found:
        # One period is enough to look for periods only.
        mark = "." if _written(answer, options, "{}.") else ":"
        return _last(found, lambda letter: answer.rfind(letter + mark))
    if found := _written(answer, options, "({})"):
        return _last(found, lambda letter: answer.rfind(f"({letter})"))
    if found := _written(answer, options, "{} "):
        return _last(found, lambda letter: answer.rfind(f" {letter} "))
    if len(answer.split()) > 5:
        lower = answer.lower()
        found = {k: None for k, text in options.items() if text.lower() in lower}
        return _last(found, lambda letter: lower.rfind(options[letter].lower()))
    return None


def _written(answer: str, options: Mapping[str, str], form: str) -> dict[str, None]:
    return {letter: None for letter in options if form.format(letter) in answer}


def _last(letters: Mapping[str, None], place: Callable[[str], int]) -> str | None:
    return max(letters, key=place, default=None)  # ties: the first


def lettered(texts: list[str]) -> dict[str, str]:
    """Texts by the letters A, B, C and so on."""
    return dict(zip(string.ascii_uppercase, texts, strict=False))
