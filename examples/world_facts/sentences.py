"""Sentences and their blanks: a phrasing puts the slots of a fact into words.

`phrasings.en.tsv` and `phrasings.zh.tsv` hold relation, use (`train`, or `held out` for tests only) and text. A slot
`{capital*}` is determined: the rest of the sentence leaves one answer. A slot `{country}` is not: many countries use
the euro. `tables/sentences.tsv` holds sayings, whose words in braces are determined.
"""

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from facts import Fact, list_facts, read_table

HERE = Path(__file__).parent
MASK = "[MASK]"
SLOT = re.compile(r"\{(.+?)(\*?)\}")


@dataclass(frozen=True)
class Sentence:
    """A sentence in pieces: literal text at even places, what its slots hold at odd ones."""

    relation: str
    held_out: bool
    pieces: tuple[str, ...]
    determined: tuple[int, ...]
    """Places of the pieces that the rest of the sentence determines."""

    @property
    def text(self) -> str:
        """The whole sentence."""
        return "".join(self.pieces)

    def blank(self, places: Sequence[int]) -> str:
        """Return the sentence with `[MASK]` in the pieces at `places`."""
        return "".join(MASK if place in places else piece for place, piece in enumerate(self.pieces))

    def cut(self, place: int) -> tuple[str, str]:
        """Return the sentence up to the piece at `place` and the rest of it."""
        return "".join(self.pieces[:place]).rstrip(), "".join(self.pieces[place:])


def list_sentences(language: str) -> list[Sentence]:
    """Return every fact in every phrasing, and the sayings, each sentence once."""
    phrasings = read_phrasings(language)
    sentences = [
        put_into_words(fact, text, held_out, language)
        for fact in list_facts(language)
        for text, held_out in phrasings[fact.relation]
    ]
    sayings = (row["text"] for row in read_table("sentences") if row["language"] == language)
    unique = {sentence.text: sentence for sentence in [*sentences, *map(read_saying, sayings)]}
    return list(unique.values())


def read_phrasings(language: str) -> dict[str, list[tuple[str, bool]]]:
    """Return text of every phrasing and whether it is held out, by relation."""
    phrasings: dict[str, list[tuple[str, bool]]] = {}
    with (HERE / f"phrasings.{language}.tsv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            phrasings.setdefault(row["relation"], []).append((row["phrasing"], row["use"] == "held out"))
    return phrasings


def put_into_words(fact: Fact, phrasing: str, held_out: bool, language: str) -> Sentence:
    """Fill the slots of a phrasing; in English `a` becomes `an` before a vowel, and the first letter a capital."""
    literals_and_slots = SLOT.split(phrasing)  # literal, slot, star, literal, ...
    literals, names, stars = (literals_and_slots[start::3] for start in range(3))
    pieces, determined = [""] * (len(literals) + len(names)), []
    pieces[::2], pieces[1::2] = literals, [fact.slots[name] for name in names]
    for place in range(1, len(pieces), 2):
        if re.search(r"\b[Aa] $", pieces[place - 1]) and pieces[place][0] in "aeiou":
            pieces[place - 1] = pieces[place - 1].rstrip() + "n "
        if stars[place // 2]:
            determined.append(place)
    if language == "en":
        first = 0 if pieces[0] else 1
        pieces[first] = pieces[first][0].upper() + pieces[first][1:]
    return Sentence(fact.relation, held_out, tuple(pieces), tuple(determined))


def read_saying(text: str) -> Sentence:
    """Return a saying as a sentence, whose every slot is determined."""
    pieces = re.split(r"\{(.+?)\}", text)
    return Sentence("saying", False, tuple(pieces), tuple(range(1, len(pieces), 2)))
