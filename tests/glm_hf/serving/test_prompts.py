"""Texts as their tokens come, with bytes as tokens."""

import random

import pytest

from glm_hf.serving.prompts import BlankText, ends_in


def decode(ids: list[int]) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


def told(text: str, stops: list[str]) -> list[str]:
    """Return what is new after every byte of a text."""
    blank, ids = BlankText(decode, stops), list(text.encode())
    return [blank.add(token, False) for token in ids] + [blank.add(None, True)]


def test_characters_are_told_when_they_are_whole():
    assert told("a法b", []) == ["a", "", "", "法", "b", ""]


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one two three", [" three"], "one two"),
        ("one two three", ["wo", "two t"], "one t"),
        ("one two", ["two three"], "one two"),
        ("法国的首都", ["首都"], "法国的"),
        ("aaab", ["aab"], "a"),
    ],
)
def test_nothing_of_a_stop_text_is_told(text, stops, expected):
    parts = told(text, stops)
    assert "".join(parts) == expected
    for count in range(len(parts)):
        assert expected.startswith("".join(parts[:count]))


def test_random_texts_add_up():
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choice("ab 法国") for _ in range(rng.randrange(12)))
        stops = ["".join(rng.choice("ab 法") for _ in range(rng.randrange(1, 4))) for _ in range(rng.randrange(3))]
        places = [text.find(stop) for stop in stops if stop in text]
        stopped = ends_in(decode, stops)
        assert "".join(told(text, stops)) == (text[: min(places)] if places else text)
        assert (stopped is not None and stopped(list(text.encode()))) == bool(places)


def test_pieces_and_offsets_are_those_of_the_certain_text():
    blank = BlankText(decode, ["国"])
    for token in "a法国".encode():
        blank.add(token, False)
    assert [blank.pieces[step] for step, _ in blank.certain(0)][0] == "a"
    assert [offset for _, offset in blank.certain(0)][:2] == [0, 1]
    assert blank.instead(1, ord("z")) == "z"
