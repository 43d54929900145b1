"""The tokenizer's normalisation by a few replacements in the whole text, where all of its letters are simple ones.

A letter is simple if normalisation looks at it alone: it is a grapheme of its own wherever it stands, the charsmap
turns it into letters that stay as they are, and these neither join nor reorder their neighbours (NFC). So are the
letters of most texts; others take the tokenizer's own way, which maps every position of the text and is several times
as slow.
"""

import base64
import re
import unicodedata
from typing import Any

from tokenizers import normalizers

SPACE = "\u2581"
GRAPHEME_BREAK = "\U000e0fff"
BREAK = {"type": "Replace", "pattern": {"Regex": r"\Y"}, "content": GRAPHEME_BREAK}
UNBREAK = {"type": "Replace", "pattern": {"String": GRAPHEME_BREAK}, "content": ""}
COMPOSE = {"type": "NFC"}
DROP_BLANKS = {"type": "Replace", "pattern": {"Regex": r"\A +|(?<= ) +"}, "content": ""}
WRITE_BLANKS = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
DROP_LAST = {"type": "Replace", "pattern": {"Regex": rf"{SPACE}+\z"}, "content": ""}
PREFIX = {"type": "Prepend", "prepend": SPACE}

JOINING_CATEGORIES = {"Mn", "Mc", "Me", "Cf", "Cn", "Co", "Cs"}
JOINING = re.compile(
    "[\r\n\u0d4e\u0e33\u0eb3\u1100-\u11ff\ua960-\ua97f\ud7b0-\ud7ff\uff9e\uff9f\U0001f1e6-\U0001f1ff\U0001f3fb-\U0001f3ff]"
)
"""Letters of other categories that can be a grapheme together with a neighbour, or decompose and compose with it."""
LAST_LETTER = "\U0001ffff"


class FastNormalizer:
    """
    Normalizes texts of simple letters.

    Args:
        steps: The steps of the tokenizer's normalizer, as JSON.

    Raises:
        ValueError: If these are not the steps of `GLMTokenizer`.
    """

    def __init__(self, steps: list[dict[str, Any]]) -> None:
        left = list(steps)
        self.replaced: list[tuple[str, str]] = []
        while left and left[0]["type"] == "Replace" and left[0] != WRITE_BLANKS and "String" in left[0]["pattern"]:
            self.replaced.append((left[0]["pattern"]["String"], left.pop(0)["content"]))
        self.charsmap = None
        if len(left) > 2 and left[1]["type"] == "Precompiled" and (left[0], left[2]) == (BREAK, UNBREAK):
            self.charsmap = normalizers.Precompiled(base64.b64decode(left[1]["precompiled_charsmap"]))
            left = left[3:]
        left = left[1:] if left[:1] == [COMPOSE] else left
        self.drops_blanks = left[:1] == [DROP_BLANKS]
        self.has_prefix = left[-1:] == [PREFIX]
        expected = [*[DROP_BLANKS] * self.drops_blanks, WRITE_BLANKS, *[DROP_LAST] * self.drops_blanks]
        if left != [*expected, *[PREFIX] * self.has_prefix]:
            raise ValueError(f"the normalizer has other steps than {[step['type'] for step in expected]}")
        self.mapped: dict[str, str] = {}
        self.changed: set[str] = set()
        self.others: set[str] = set()

    def normalize(self, text: str) -> str | None:
        """Return what the tokenizer makes of a text before it looks for tokens, None if a letter is not simple."""
        for old, new in self.replaced:
            text = text.replace(old, new)
        letters = set(text)
        for letter in letters.difference(self.mapped, self.others):
            self._sort(letter)
        if letters & self.others:
            return None
        for letter in letters & self.changed:
            text = text.replace(letter, self.mapped[letter])
        if self.drops_blanks:
            text = re.sub(" {2,}", " ", text.lstrip(" "))
        text = text.replace(" ", SPACE)
        if self.drops_blanks:
            text = text.rstrip(SPACE)
        return SPACE + text if self.has_prefix and text else text

    def map_letters(self, letters: str) -> str | None:
        """Return what letters become behind the first replacements, None if one is not simple."""
        for letter in set(letters).difference(self.mapped, self.others):
            self._sort(letter)
        return None if self.others.intersection(letters) else "".join(self.mapped[letter] for letter in letters)

    def _sort(self, letter: str) -> None:
        """Put a letter to the simple ones or the others."""
        mapped = self._map(letter)
        is_simple = is_stable(letter) and all(is_stable(other) and self._map(other) == other for other in mapped)
        if not is_simple:
            self.others.add(letter)
            return
        self.mapped[letter] = mapped
        if mapped != letter:
            self.changed.add(letter)

    def _map(self, letter: str) -> str:
        return letter if self.charsmap is None else self.charsmap.normalize_str(letter)


def is_stable(letter: str) -> bool:
    """Tell whether a letter is a grapheme of its own wherever it stands, and NFC leaves its neighbours alone."""
    return (
        letter <= LAST_LETTER
        and unicodedata.category(letter) not in JOINING_CATEGORIES
        and not JOINING.match(letter)
        and unicodedata.is_normalized("NFC", letter)
    )
