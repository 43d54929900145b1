"""
Write the corpus of the demonstration model: `python examples/world_facts/corpus.py FOLDER` (needs Babel).

For each language, `en` and `zh`, the folder gets

    text.en.jsonl          {"text": sentences}                   facts in training phrasings, and sayings
    instructions.en.jsonl  {"inputs": text, "targets": answer}   blanks in them; a text without [MASK] is a beginning
    test.trained.en.jsonl  {"text", "answer", "choices", "relation"}  one blank in a training phrasing
    test.heldout.en.jsonl  {"text", "answer", "choices", "relation"}  one blank in a phrasing that is never trained

The target of a text with several blanks belongs in the first of them. A slot is blank only where the other slots of
the sentence leave one answer, among all facts of its relation. Instructions are varied: some lack the end mark, some
are in lower case, some call a country by another name, and some follow upon another sentence.
"""

import argparse
import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from math import ceil
from pathlib import Path
from typing import Any, TypeVar

from facts import list_facts, read_aliases
from sentences import (
    ENDS,
    MASK,
    Sentence,
    beginnings_of_saying,
    blanks_of_saying,
    list_sayings,
    list_sentences,
    normal,
)

T = TypeVar("T")
LANGUAGES = ("en", "zh")
SEED = 20261127
TEST_ITEMS = 1000
CHOICES = 4
INSTRUCTIONS_OF_A_FACT = 120
"""Least number, which facts of few sentences have in more forms of each."""
ORDERS = {"element_order", "letter", "month_order", "number_order", "season", "weekday_order"}
"""Relations of which a fact has `INSTRUCTIONS_OF_AN_ORDER`: what comes before is easily taken for what comes after."""
INSTRUCTIONS_OF_AN_ORDER = 360
LEAST_OF_A_SENTENCE = 3
KINDS = {"single": 0.66, "several": 0.12, "keyword": 0.06, "beginning": 0.16}
"""Shares of the kinds of instructions, where a sentence has all of them."""
SAYING_COPIES = 6
WITHOUT_END = 0.2
LOWER_CASE = 0.05
ALIAS = 0.3
JOINED = 0.3
JOINTS = {"en": (" ", " ", ", and ", " and "), "zh": ("", "", "，", "；")}


def write_corpus(folder: Path, seed: int = SEED) -> dict[str, int]:
    """
    Write all files into `folder`, the same ones for the same seed.

    Returns:
        Number of lines by file name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    num_lines = {}
    for language in LANGUAGES:
        rng = random.Random(f"{seed} {language}")
        sentences = list_sentences(language, rng)
        answers = Answers(language, sentences)
        trained, held_out = ([s for s in sentences if s.held_out is flag] for flag in (False, True))
        tests = {
            "test.trained": shuffled(list_tests(trained, answers, rng), rng),
            "test.heldout": shuffled(list_tests(held_out, answers, rng), rng),
        }
        tested = {normal(item["text"]) for items in tests.values() for item in items}
        numbers = instructions_of_sentences(trained)
        items = [
            item
            for sentence, number in zip(trained, numbers, strict=True)
            for item in instructions(sentence, number, answers, rng)
        ]
        items = list(vary(items, trained, language, rng))
        items += saying_instructions(language, rng)
        files = {
            "text": shuffled(texts(trained, language, rng), rng),
            "instructions": shuffled((item for item in items if normal(item["inputs"]) not in tested), rng),
            **tests,
        }
        sayings = set(list_sayings(language))
        for name, rows in files.items():
            if name in tests:  # of which one may be a saying as well
                rows = [row for row in rows if row["text"].replace(MASK, row["answer"]) not in sayings]
            path = folder / f"{name}.{language}.jsonl"
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
            num_lines[path.name] = len(rows)
    return num_lines


class Answers:
    """What all facts put in a blank, by what the other slots of the sentence say."""

    def __init__(self, language: str, sentences: Iterable[Sentence]) -> None:
        self.facts: dict[str, list[dict[str, str]]] = defaultdict(list)
        for fact in list_facts(language):
            self.facts[fact.relation].append(fact.slots)
        self.fitting: dict[tuple[str, str, tuple[str, ...]], dict[tuple[str, ...], set[str]]] = {}
        self.of_blank: dict[str, set[str]] = defaultdict(set)
        self.of_slot: dict[tuple[str, str], tuple[list[str], dict[str, list[int]]]] = {}
        for sentence in sentences:
            for place in sentence.places:
                self.of_blank[normal(sentence.blank([place]))].add(sentence.pieces[place])

    def is_one(self, sentence: Sentence, place: int, shown: Sequence[int]) -> bool:
        """Tell whether the pieces at the places `shown` leave one answer for the one at `place`."""
        slot = sentence.name(place)
        values = {sentence.name(other): sentence.pieces[other].lower() for other in shown}
        key = (sentence.relation, slot, tuple(sorted(values)))
        if key not in self.fitting:
            self.fitting[key] = defaultdict(set)
            for slots in self.facts[sentence.relation]:
                self.fitting[key][tuple(slots[name].lower() for name in key[2])].add(slots[slot])
        return len(self.fitting[key][tuple(values[name] for name in key[2])]) == 1

    def are_clear(self, sentence: Sentence, places: Sequence[int]) -> bool:
        """Tell whether only one answer fits in the first of the blanks at `places`."""
        if len(places) == 1 and len(self.of_blank[normal(sentence.blank(places))]) != 1:
            return False
        return self.is_one(sentence, places[0], [place for place in sentence.places if place not in places])

    def is_clear_beginning(self, sentence: Sentence, place: int) -> bool:
        """Tell whether the sentence up to `place` leaves one answer there."""
        before = [other for other in sentence.places if other < place]
        return bool(before) and self.is_one(sentence, place, before)

    def values(self, relation: str, slot: str) -> tuple[list[str], dict[str, list[int]]]:
        """Return what facts of a relation have in a slot, sorted, and the numbers of those alike in lower case."""
        if (relation, slot) not in self.of_slot:
            values = sorted({slots[slot] for slots in self.facts[relation]})
            numbers: dict[str, list[int]] = defaultdict(list)
            for number, value in enumerate(values):
                numbers[value.lower()].append(number)
            self.of_slot[relation, slot] = values, numbers
        return self.of_slot[relation, slot]

    def choices(self, sentence: Sentence, place: int, rng: random.Random) -> list[str]:
        """Return the piece at `place` and up to three others that other facts of its relation have there."""
        answer = sentence.pieces[place]
        values, numbers = self.values(sentence.relation, sentence.name(place))
        others, same = values.copy(), numbers.get(answer.lower(), [])
        for number in reversed(same):
            del others[number]
        chosen = rng.sample(others, min(CHOICES - 1, len(others)))
        if answer not in [values[number] for number in same]:  # a capital at the beginning of a sentence
            chosen = [value[:1].upper() + value[1:] for value in chosen]
        return shuffled([answer, *chosen], rng)


def instructions_of_sentences(sentences: list[Sentence]) -> list[int]:
    """Return how many instructions each sentence gives, so that every fact has enough."""
    of_fact = Counter(sentence.fact for sentence in sentences)

    def number(sentence: Sentence) -> int:
        wanted = INSTRUCTIONS_OF_AN_ORDER if sentence.relation in ORDERS else INSTRUCTIONS_OF_A_FACT
        return max(LEAST_OF_A_SENTENCE, ceil(wanted / of_fact[sentence.fact]))

    return [number(sentence) for sentence in sentences]


def instructions(
    sentence: Sentence, number: int, answers: Answers, rng: random.Random
) -> Iterator[tuple[Sentence, list[int], str]]:
    """Yield what to fill in: the sentence, the places of its blanks, and `single`, `several`, ... (see `KINDS`)."""
    clear = {
        number: [places for places in combinations(sentence.places, number) if answers.are_clear(sentence, places)]
        for number in range(1, len(sentence.places) + 1)
    }
    found = {
        "single": clear.get(1, []),
        "several": [places for number, several in clear.items() if number > 1 for places in several],
        "keyword": [(place,) for place in sentence.keywords],
        "beginning": [(place,) for place in sentence.places if answers.is_clear_beginning(sentence, place)],
    }
    kinds = [kind for kind in KINDS if found[kind]]
    for _ in range(number if kinds else 0):
        kind = rng.choices(kinds, [KINDS[kind] for kind in kinds])[0]
        yield sentence, list(rng.choice(found[kind])), kind


def vary(
    items: Iterable[tuple[Sentence, list[int], str]], trained: list[Sentence], language: str, rng: random.Random
) -> Iterator[dict[str, str]]:
    """Yield instructions as lines, with other names, without end marks, in lower case or joined to other sentences."""
    aliases = read_aliases(language)
    partners = Partners(trained, language, rng)
    for sentence, places, kind in items:
        sentence = rename(sentence, places, aliases, rng)
        if kind == "beginning":
            inputs, targets = sentence.cut(places[0])
            yield {"inputs": inputs, "targets": targets}
            continue
        inputs, targets = sentence.blank(places), sentence.pieces[places[0]]
        chance = rng.random()
        if chance < JOINED and inputs[-1] in ENDS:
            inputs = partners.join(sentence, inputs)
        elif chance < JOINED + WITHOUT_END:
            inputs = inputs.rstrip(ENDS)
        if language == "en" and rng.random() < LOWER_CASE:
            inputs = MASK.join(part.lower() for part in inputs.split(MASK))
        yield {"inputs": inputs, "targets": targets}


def rename(sentence: Sentence, places: list[int], aliases: dict[str, list[str]], rng: random.Random) -> Sentence:
    """Put other names of countries and people in some pieces that are not blank."""
    pieces = list(sentence.pieces)
    for place in sentence.places:
        if place not in places and rng.random() < ALIAS:
            piece = pieces[place]
            if names := aliases.get(piece) or aliases.get(piece[0].lower() + piece[1:]):
                pieces[place] = rng.choice(names)
                if piece not in aliases:
                    pieces[place] = pieces[place][0].upper() + pieces[place][1:]
    return replace(sentence, pieces=tuple(pieces))


class Partners:
    """Sentences that stand before or behind others."""

    def __init__(self, sentences: list[Sentence], language: str, rng: random.Random) -> None:
        self.language, self.rng = language, rng
        self.all = [sentence for sentence in sentences if sentence.text[-1] in ENDS]
        self.of_relation: dict[str, list[Sentence]] = defaultdict(list)
        for sentence in self.all:
            self.of_relation[sentence.relation].append(sentence)

    def join(self, sentence: Sentence, text: str) -> str:
        """Put another sentence, half the time of the same relation, before or behind `text`, a form of `sentence`."""
        partner = self.rng.choice(self.of_relation[sentence.relation] if self.rng.random() < 0.5 else self.all)
        joint = self.rng.choice(JOINTS[self.language])
        pair = [(sentence, text), (partner, partner.text)]
        if self.rng.random() < 0.5:
            pair.reverse()
        (_, first), (second, rest) = pair
        if joint.strip():
            first = first.rstrip(ENDS)
            if self.language == "en" and not second.starts_with_a_name and not rest.startswith(MASK):
                rest = rest[0].lower() + rest[1:]
        return first + joint + rest


def saying_instructions(language: str, rng: random.Random) -> Iterator[dict[str, str]]:
    """Yield every blank of the sayings, and their beginnings, in several forms."""
    for saying in list_sayings(language):
        blanks = blanks_of_saying(saying, language)
        for blank, answer in blanks * SAYING_COPIES if len(blanks) < 12 else blanks * (SAYING_COPIES // 2):
            cut = blank.rstrip(ENDS) if rng.random() < WITHOUT_END else blank
            yield {"inputs": cut, "targets": answer}
        for beginning, rest in beginnings_of_saying(saying, language):
            yield {"inputs": beginning, "targets": rest}


def texts(trained: list[Sentence], language: str, rng: random.Random) -> Iterator[dict[str, str]]:
    """Yield sentences, some of them joined, and the sayings."""
    partners = Partners(trained, language, rng)
    for sentence in trained:
        joined = rng.random() < JOINED and sentence.text[-1] in ENDS
        yield {"text": partners.join(sentence, sentence.text) if joined else sentence.text}
    for saying in list_sayings(language):
        yield {"text": saying}
        for _ in range(SAYING_COPIES):
            other = rng.choice(partners.all).text
            yield {"text": (" " if language == "en" else "").join(shuffled([saying, other], rng))}


def list_tests(sentences: Iterable[Sentence], answers: Answers, rng: random.Random) -> list[dict[str, Any]]:
    """Return about `TEST_ITEMS` sentences with one blank, each relation with its share of all sentences."""
    by_relation: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for sentence in sentences:
        clear = [place for place in sentence.places if answers.are_clear(sentence, [place])]
        for place in rng.sample(clear, min(1, len(clear))):
            item = {"text": sentence.blank([place]), "answer": sentence.pieces[place]}
            choices = answers.choices(sentence, place, rng)
            by_relation[sentence.relation].append({**item, "choices": choices, "relation": sentence.relation})
    share = min(1.0, TEST_ITEMS / sum(map(len, by_relation.values())))
    return [item for items in by_relation.values() for item in rng.sample(items, ceil(share * len(items)))]


def shuffled(rows: Iterable[T], rng: random.Random) -> list[T]:
    """Return rows in random order."""
    rows = list(rows)
    rng.shuffle(rows)
    return rows


def main() -> None:
    """Write the corpus and print how many lines each file has."""
    parser = argparse.ArgumentParser(description="Write the corpus of the demonstration model.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=SEED)
    arguments = parser.parse_args()
    for name, count in write_corpus(arguments.folder, arguments.seed).items():
        print(f"{count:>7,} lines  {arguments.folder / name}")


if __name__ == "__main__":
    main()
