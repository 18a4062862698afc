"""When an answer ends, and what of it is text."""

import numpy as np
import pytest

from helpers.golden import load_case
from neo_jax.infer import sampling as sm
from neo_jax.infer.sampling import Answer, Sampling, is_repeating


def letters(ids):
    """A tokenizer of bytes: incomplete characters decode as the real one's do."""
    return bytes(ids).decode(errors="replace")


def answer_to(text, stop_ids=(), **settings):
    answer = Answer(Sampling(**settings), letters, stop_ids)
    for token in text.encode() if isinstance(text, str) else text:
        if answer.add(token):
            break
    return answer


@pytest.mark.parametrize(
    ("expected", "stop", "text"),
    [
        ("one END two", "END", "one "),
        ("one ENEND two", ("x", "END"), "one EN"),
        ("ENDless", "END", ""),
        ("über→ das\n\nmehr", "\n\n", "über→ das"),
        ("a→b", "→", "a"),
        ("aé", "é", "a"),
    ],
)
def test_a_stop_text_ends_the_answer_across_tokens_and_is_no_part_of_it(expected, stop, text):
    answer = answer_to(expected, stop=stop)
    assert (answer.text, answer.finish_reason) == (text, "stop")


def test_the_earliest_stop_text_in_a_long_token_counts():
    pieces = {0: "so ", 1: "it END here STOP", 2: "E", 3: "ND"}
    decode = lambda ids: "".join(pieces[i] for i in ids)  # noqa: E731
    answer = Answer(Sampling(stop=("STOP", "END")), decode)
    assert [answer.add(0), answer.add(1), answer.text] == [None, "stop", "so it "]
    answer = Answer(Sampling(stop=("STOP", "END")), decode)
    assert [answer.add(token) for token in (0, 2, 3)] == [None, None, "stop"]
    assert answer.text == "so "


def test_stop_tokens_are_counted_and_not_shown():
    for settings in ({"stop_ids": [ord("!")]}, {"stop_token_ids": (ord("!"),)}):
        answer = answer_to("stop! now", **settings)
        assert (answer.text, answer.finish_reason) == ("stop", "stop")
        assert bytes(answer.token_ids) == b"stop!"


def test_length_ends_the_answer_unless_it_stops_there():
    answer = answer_to("abcdef", max_new_tokens=3)
    assert (answer.text, answer.finish_reason, len(answer.token_ids)) == ("abc", "length", 3)
    assert answer_to("abcdef", max_new_tokens=3, stop="c").finish_reason == "stop"
    assert answer_to("ab", max_new_tokens=3).finish_reason is None


def test_an_incomplete_character_waits_until_it_is_complete_or_the_end():
    answer = Answer(Sampling(max_new_tokens=6), letters)
    texts = []
    for byte in "→→".encode():
        answer.add(byte)
        texts.append(answer.text)
    assert texts == ["", "", "→", "→", "→", "→→"]
    assert answer_to("→".encode()[:2] + b"!").text == "\ufffd!"
    assert answer_to("a→", max_new_tokens=2).text == "a\ufffd"


def test_text_in_pieces_is_the_whole_text():
    tokenizer = load_case("generate").tokenizer
    ids = np.random.default_rng(10).integers(0, tokenizer.vocab_size, 2000).tolist()
    answer = Answer(Sampling(max_new_tokens=2000), tokenizer.decode)
    assert [answer.add(token) for token in ids][-1] == "length"
    assert answer.text == tokenizer.decode(ids)


@pytest.mark.parametrize(
    "tail",
    [[5] * 1024, [1, 2, 3] * 342, list(range(128)) * 8, list(range(512)) * 8],
    ids=["one token", "three tokens", "a sentence", "a paragraph"],
)
def test_loops_are_repeating(tail):
    assert is_repeating([9, 8, 7, *tail])
    assert not is_repeating(tail[3:])
    assert not is_repeating([*tail, 999])


def test_lists_and_tables_are_not_repeating():
    blank_rows = [7, 7, 7, 7, 8] * 200
    numbered = [token for i in range(3000) for token in (11, i, 12, 13, 10)]
    ruled = [3] * 1000
    few_paragraphs = list(range(600)) * 7
    for tokens in ([], [1], blank_rows, numbered, ruled, few_paragraphs):
        assert not is_repeating(tokens)


def test_repetition_ends_the_answer_only_if_asked():
    expected = "It is a loop. " * 200
    answer = answer_to(expected, stop_on_repetition=True, max_new_tokens=10**6)
    assert answer.finish_reason == "repetition"
    assert 1024 <= len(answer.token_ids) <= 1024 + 14 + sm.REPETITION_INTERVAL
    assert answer_to(expected, max_new_tokens=10**6).finish_reason is None
