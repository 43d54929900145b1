"""
Write the corpus of the demonstration model: `python examples/world_facts/corpus.py FOLDER` (needs Babel).

For each language, `en` and `zh`, the folder gets

    text.en.jsonl          {"text": sentence}                    every fact in every training phrasing
    instructions.en.jsonl  {"inputs": text, "targets": answer}   blanks in them; a text without [MASK] is a beginning
    test.trained.en.jsonl  {"text", "answer", "relation"}        one blank in a training phrasing, not an instruction
    test.heldout.en.jsonl  {"text", "answer", "relation"}        one blank in a phrasing that is never trained

The target of a text with several blanks belongs in the first of them. A blank is used only if no other sentence, held
out or not, puts anything else in its place.
"""

import argparse
import json
import random
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from math import ceil
from pathlib import Path

from sentences import Sentence, list_sentences

LANGUAGES = ("en", "zh")
SEED = 20221005
TEST_ITEMS = 1000


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
        sentences = list_sentences(language)
        answers = Answers(sentences)
        trained, held_out = ([s for s in sentences if s.held_out is flag] for flag in (False, True))
        tests = {
            "test.trained": shuffled(list_tests(trained, answers, rng), rng),
            "test.heldout": shuffled(list_tests(held_out, answers, rng), rng),
        }
        tested = {item["text"] for items in tests.values() for item in items}
        trained_on = (item for s in trained for item in instructions(s, answers, rng) if item["inputs"] not in tested)
        files = {
            "text": shuffled(({"text": sentence.text} for sentence in trained), rng),
            "instructions": shuffled(trained_on, rng),
            **tests,
        }
        for name, rows in files.items():
            path = folder / f"{name}.{language}.jsonl"
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
            num_lines[path.name] = len(rows)
    return num_lines


class Answers:
    """What all sentences of a language put in a blank or behind a beginning."""

    def __init__(self, sentences: Iterable[Sentence]) -> None:
        self.texts: list[str] = []
        self.of_blank: dict[str, set[str]] = defaultdict(set)
        for sentence in sentences:
            self.texts.append(sentence.text)
            for places in choose_places(range(1, len(sentence.pieces), 2)):
                self.of_blank[sentence.blank(places)].add(sentence.pieces[places[0]])
        self.texts.sort()

    def is_clear(self, sentence: Sentence, places: Sequence[int]) -> bool:
        """Tell whether only one answer fits in the first of the blanks at `places`."""
        return len(self.of_blank[sentence.blank(places)]) == 1

    def is_clear_beginning(self, beginning: str) -> bool:
        """Tell whether only one sentence starts like this."""
        first = bisect_left(self.texts, beginning)
        following = self.texts[first : first + 2]
        return beginning != "" and sum(text.startswith(beginning) for text in following) == 1


def choose_places(places: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Yield every choice of one or more places."""
    for number in range(1, len(places) + 1):
        yield from combinations(places, number)


def instructions(sentence: Sentence, answers: Answers, rng: random.Random) -> Iterator[dict[str, str]]:
    """Yield every single blank of a sentence, one choice of several blanks and one beginning, as far as clear."""
    clear = [places for places in choose_places(sentence.determined) if answers.is_clear(sentence, places)]
    several = [places for places in clear if len(places) > 1]
    chosen = [places for places in clear if len(places) == 1] + rng.sample(several, min(1, len(several)))
    for places in chosen:
        yield {"inputs": sentence.blank(places), "targets": sentence.pieces[places[0]]}
    cuts = [sentence.cut(place) for place in sentence.determined]
    beginnings = [cut for cut in cuts if answers.is_clear_beginning(cut[0])]
    for beginning, rest in rng.sample(beginnings, min(1, len(beginnings))):
        yield {"inputs": beginning, "targets": rest}


def list_tests(sentences: Iterable[Sentence], answers: Answers, rng: random.Random) -> list[dict[str, str]]:
    """Return about `TEST_ITEMS` sentences with one blank, each relation with its share of all sentences."""
    by_relation: dict[str, list[dict[str, str]]] = defaultdict(list)
    for sentence in sentences:
        clear = [place for place in sentence.determined if answers.is_clear(sentence, [place])]
        for place in rng.sample(clear, min(1, len(clear))):
            item = {"text": sentence.blank([place]), "answer": sentence.pieces[place], "relation": sentence.relation}
            by_relation[sentence.relation].append(item)
    share = min(1.0, TEST_ITEMS / sum(map(len, by_relation.values())))
    return [item for items in by_relation.values() for item in rng.sample(items, ceil(share * len(items)))]


def shuffled(rows: Iterable[dict[str, str]], rng: random.Random) -> list[dict[str, str]]:
    """Return different rows in random order."""
    unique = list({tuple(row.items()): row for row in rows}.values())
    rng.shuffle(unique)
    return unique


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
