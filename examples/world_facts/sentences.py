"""Sentences and their blanks: a phrasing puts the slots of a fact into words.

`phrasings.en.tsv` and `phrasings.zh.tsv` hold relation, use (`train`, or `held out` for tests only) and text:

    {capital}            a slot of the fact
    (city|town|)         one of several words, or none
    <currency|money>     one of several words, which may be a blank of its own

`tables/sentences.tsv` holds sayings, of which every word may be a blank.
"""

import csv
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from facts import Fact, list_facts, read_table

HERE = Path(__file__).parent
MASK = "[MASK]"
KEYWORD = ""
"""Name of the place of a keyword, which is no slot."""
CHOICE = re.compile(r"\(([^()]*)\)")
PLACE = re.compile(r"\{(\w+)\}|<([^<>]*)>")
ARTICLE = re.compile(r"\b[Aa] $")
BEFORE_VOWEL = re.compile(r"hour|(?!uni|eu|one\b|us)[aeiou]", re.IGNORECASE)
NEXT_SENTENCE = re.compile("([.?] )([a-z])")
ENDS = ".。"
SENTENCES_OF_A_FACT = {
    "sum": 24,
    "difference": 24,
    "product": 24,
    "quotient": 24,
    "sum_words": 24,
    "product_words": 24,
    "translation": 24,
}
MOST_SENTENCES_OF_A_FACT = 40


@dataclass(frozen=True)
class Sentence:
    """A sentence in pieces: literal text at even places, slots and keywords at odd ones."""

    relation: str
    held_out: bool
    pieces: tuple[str, ...]
    names: tuple[str, ...]
    """Names of the slots at the odd places, `KEYWORD` for keywords."""
    fact: tuple[str, ...] = ()
    """What the fact puts in its slots, with the relation in front."""
    starts_with_a_name: bool = True
    """Whether the first letter stays a capital inside a longer sentence."""

    @property
    def text(self) -> str:
        """The whole sentence."""
        return "".join(self.pieces)

    def name(self, place: int) -> str:
        """Return the name of the slot at `place`."""
        return self.names[place // 2]

    @property
    def places(self) -> list[int]:
        """Places of the slots."""
        return [place for place in range(1, len(self.pieces), 2) if self.name(place) != KEYWORD]

    @property
    def keywords(self) -> list[int]:
        """Places of the keywords."""
        return [place for place in range(1, len(self.pieces), 2) if self.name(place) == KEYWORD]

    def blank(self, places: Sequence[int]) -> str:
        """Return the sentence with `[MASK]` in the pieces at `places`."""
        return "".join(MASK if place in places else piece for place, piece in enumerate(self.pieces))

    def cut(self, place: int) -> tuple[str, str]:
        """Return the sentence up to the piece at `place` and the rest of it."""
        return "".join(self.pieces[:place]).rstrip(), "".join(self.pieces[place:])


class Phrasings:
    """All phrasings of a language, by relation."""

    def __init__(self, language: str) -> None:
        self.language = language
        self.trained: dict[str, list[str]] = {}
        self.held_out: dict[str, list[str]] = {}
        with (HERE / f"phrasings.{language}.tsv").open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
                kind = self.held_out if row["use"] == "held out" else self.trained
                kind.setdefault(row["relation"], []).append(row["phrasing"])

    def list_held_out(self, fact: Fact) -> Iterator[Sentence]:
        """Yield a fact in all phrasings that are for tests only."""
        for phrasing in self.held_out.get(fact.relation, ()):
            yield put_into_words(fact, phrasing, True, self.language)

    def sample_trained(self, fact: Fact, rng: random.Random) -> Iterator[Sentence]:
        """Yield a fact in different phrasings, every one once and others at random, with random words."""
        phrasings = self.trained[fact.relation]
        number = SENTENCES_OF_A_FACT.get(fact.relation, MOST_SENTENCES_OF_A_FACT)
        chosen = rng.sample(phrasings, min(number, len(phrasings)))
        chosen += rng.choices(phrasings, k=number - len(chosen))
        sentences = (put_into_words(fact, choose_words(text, rng), False, self.language) for text in chosen)
        yield from {sentence.text: sentence for sentence in sentences}.values()


def choose_words(phrasing: str, rng: random.Random) -> str:
    """Choose one of the words in every pair of round or angle brackets."""
    phrasing = CHOICE.sub(lambda found: rng.choice(found[1].split("|")), phrasing)
    return re.sub("<([^<>]*)>", lambda found: f"<{rng.choice(found[1].split('|'))}>", phrasing)


def put_into_words(fact: Fact, phrasing: str, held_out: bool, language: str) -> Sentence:
    """Fill the slots of a phrasing; in English `a` becomes `an` before a vowel, and first letters become capitals."""
    literals_slots_keywords = PLACE.split(phrasing)  # literal, slot, keyword, literal, ...
    literals, slots, keywords = (literals_slots_keywords[start::3] for start in range(3))
    pieces = [""] * (len(literals) + len(slots))
    pieces[::2] = literals
    pieces[1::2] = [fact.slots[slot] if slot else keyword for slot, keyword in zip(slots, keywords, strict=True)]
    starts_with_a_name = not (pieces[0] or slots[0] is None)
    if language == "en":
        for place in range(1, len(pieces), 2):
            if ARTICLE.search(pieces[place - 1]) and BEFORE_VOWEL.match(pieces[place]):
                pieces[place - 1] = pieces[place - 1].rstrip() + "n "
        before = ""
        for place, piece in enumerate(pieces):
            if piece and (not before or before.endswith((". ", "? "))):
                starts_with_a_name &= bool(before) or piece[0].isupper()
                piece = piece[0].upper() + piece[1:]
            pieces[place] = NEXT_SENTENCE.sub(lambda found: found[1] + found[2].upper(), piece)
            before += pieces[place]
    names = tuple(slot or KEYWORD for slot in slots)
    key = (fact.relation, *fact.slots.values())
    return Sentence(fact.relation, held_out, tuple(pieces), names, key, starts_with_a_name)


def list_sayings(language: str) -> list[str]:
    """Return the sayings and statements of a language."""
    return [row["text"] for row in read_table("sentences") if row["language"] == language]


def blanks_of_saying(saying: str, language: str) -> list[tuple[str, str]]:
    """Return a saying with a blank of one or two words, or of one to three Chinese characters, and what was there."""
    if language == "en":
        words = [found.span() for found in re.finditer(r"[\w'-]+", saying)]
        spans = [(words[i][0], words[j][1]) for i in range(len(words)) for j in (i, i + 1) if j < len(words)]
    else:
        spans = [(i, i + n) for n in (1, 2, 3) for i in range(len(saying) - n) if saying[i : i + n].isalnum()]
    words_left = ((start, end) for start, end in spans if normal(saying[:start] + saying[end:]))
    whole = ((start, end) for start, end in words_left if not set(saying[start:end]) & set(",.;:!?"))
    return [(saying[:start] + MASK + saying[end:], saying[start:end]) for start, end in whole]


def beginnings_of_saying(saying: str, language: str) -> list[tuple[str, str]]:
    """Return beginnings of a saying, of two words or Chinese characters and more, and the rest of it."""
    if language == "en":
        cuts = [found.start() for found in re.finditer(" ", saying)][1:]
        return [(saying[:cut], saying[cut + 1 :]) for cut in cuts]
    return [(saying[:cut], saying[cut:]) for cut in range(2, len(saying) - 2)]


def list_sentences(language: str, rng: random.Random) -> list[Sentence]:
    """Return every fact in its held-out phrasings and in a sample of the trained ones, each sentence once."""
    phrasings = Phrasings(language)
    facts = list_facts(language)
    held_out = {sentence.text: sentence for fact in facts for sentence in phrasings.list_held_out(fact)}
    trained = {sentence.text: sentence for fact in facts for sentence in phrasings.sample_trained(fact, rng)}
    known = {normal(text) for text in held_out}
    return [*held_out.values(), *(sentence for text, sentence in trained.items() if normal(text) not in known)]


def normal(text: str) -> str:
    """Return a text without what phrasings may vary: case, blanks and the end mark."""
    return "".join(text.lower().split()).rstrip(ENDS)
