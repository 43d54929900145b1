"""The facts of the demonstration model: what the tables hold and what Babel's CLDR data name, language by language.

A table is a TSV file in `tables/` with a header; `-` says that there is nothing to tell. `countries.tsv` holds codes
only, CLDR's for continents and languages and ISO's for currencies; Babel translates them. `definitions.tsv` are
glosses of WordNet 3.0, shortened; its licence is `tables/WORDNET-LICENSE`.
"""

import csv
from collections import defaultdict
from collections.abc import Iterator
from itertools import chain, pairwise, product
from pathlib import Path
from string import ascii_uppercase
from typing import NamedTuple

from babel import Locale
from babel.numbers import get_currency_name

TABLES = Path(__file__).parent / "tables"
LOCALES = {"en": "en", "zh": "zh_Hans"}
NOTHING = "-"
LARGEST_TERM = 20
LARGEST_FACTOR = 12


class Fact(NamedTuple):
    """What stands in the slots of every phrasing of a relation."""

    relation: str
    slots: dict[str, str]


def read_table(name: str) -> list[dict[str, str]]:
    """Return the rows of a table, without the cells that hold nothing."""
    with (TABLES / f"{name}.tsv").open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [{key: cell for key, cell in row.items() if cell != NOTHING} for row in rows]


def list_facts(language: str) -> list[Fact]:
    """Return all facts in `language`, `en` or `zh`, but for the sayings, which have no slots."""
    kinds = (
        country_facts,
        element_facts,
        calendar_facts,
        number_facts,
        arithmetic_facts,
        animal_facts,
        word_facts,
        culture_facts,
        nature_facts,
        daily_facts,
    )
    facts = chain.from_iterable(kind(language) for kind in kinds)
    pairs = (Fact("translation", {"english": en, "chinese": zh}) for en, zh in translations().items())
    return [*facts, *pairs]


def country_facts(language: str) -> Iterator[Fact]:
    """Yield capitals, official languages, currencies and continents, and the profile of countries that have all."""
    locale = Locale.parse(LOCALES[language])
    for row in read_table("countries"):
        article = f"{row['article_en']} " if language == "en" and "article_en" in row else ""
        country = {"country": article + country_name(row["code"], language)}
        known = {"capital": row.get(f"capital_{language}")}
        known["language"] = row.get("language") and locale.languages[row["language"]]
        known["currency"] = row.get("currency") and get_currency_name(row["currency"], count=1, locale=locale)
        known["continent"] = row.get("continent") and locale.territories[row["continent"]]
        for relation, value in known.items():
            if value is not None:
                yield Fact(relation, {**country, relation: value})
        profile = {key: known[key] for key in ("capital", "currency", "continent")}
        if None not in profile.values():
            yield Fact("profile", {**country, **profile})


def element_facts(language: str) -> Iterator[Fact]:
    """Yield symbols and atomic numbers of the chemical elements, and which one follows which."""
    rows = read_table("elements")
    for row in rows:
        yield Fact("symbol", {"element": row[language], "symbol": row["symbol"]})
        yield Fact("atomic_number", {"element": row[language], "number": row["number"]})
    for row, following in pairwise(rows):
        yield Fact("element_order", {"element": row[language], "next": following[language]})


def calendar_facts(language: str) -> Iterator[Fact]:
    """Yield numbers, lengths and order of the months, and the order of weekdays and seasons, round the year's end."""
    kinds: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in read_table("calendar"):
        kinds[row["kind"]].append(row)
    ordinals = {row["digits"]: row[f"ordinal_{language}"] for row in read_table("numbers") if "ordinal_en" in row}
    for number, row in enumerate(kinds["month"], start=1):
        numbers = {"number": str(number), "ordinal": ordinals[str(number)]}
        yield Fact("month_number", {"month": row[language], **numbers})
        if "days" in row:
            yield Fact("month_days", {"month": row[language], "days": row["days"]})
    for kind, relation, slot in (
        ("month", "month_order", "month"),
        ("weekday", "weekday_order", "day"),
        ("season", "season", "season"),
    ):
        for row, following in pairwise([*kinds[kind], kinds[kind][0]]):
            yield Fact(relation, {slot: row[language], "next": following[language]})


def number_facts(language: str) -> Iterator[Fact]:
    """Yield words and order of the numbers from 0 to 100, and order of the letters."""
    rows = read_table("numbers")
    for row in rows:
        yield Fact("number_word", {"digits": row["digits"], "word": row[language]})
    for row, following in pairwise(rows):
        yield Fact("number_order", {"word": row[language], "next": following[language]})
    for number, (letter, next_letter) in enumerate(pairwise(ascii_uppercase), start=1):
        yield Fact("letter", {"letter": letter, "next": next_letter, "number": str(number)})


def arithmetic_facts(language: str) -> Iterator[Fact]:
    """Yield sums and differences up to 20, products of numbers up to 12 and their quotients, in digits and words."""
    words = {int(row["digits"]): row[language] for row in read_table("numbers")}

    def terms(relation: str, **numbers: int) -> Iterator[Fact]:
        yield Fact(relation, {name: str(number) for name, number in numbers.items()})
        if relation in ("sum", "product") and all(number in words for number in numbers.values()):
            yield Fact(f"{relation}_words", {name: words[number] for name, number in numbers.items()})

    for a, b in product(range(LARGEST_TERM + 1), repeat=2):
        if a + b <= LARGEST_TERM:
            yield from terms("sum", a=a, b=b, total=a + b)
            yield from terms("difference", a=a + b, b=b, total=a)
    for a, b in product(range(1, LARGEST_FACTOR + 1), repeat=2):
        yield from terms("product", a=a, b=b, total=a * b)
        yield from terms("quotient", a=a * b, b=b, total=a)


def animal_facts(language: str) -> Iterator[Fact]:
    """Yield classes, young and sounds of animals."""
    for row in read_table("animals"):
        for relation in ("class", "young", "sound"):
            if f"{relation}_{language}" in row:
                yield Fact(relation, {"animal": row[language], relation: row[f"{relation}_{language}"]})


def word_facts(language: str) -> Iterator[Fact]:
    """Yield opposites both ways, the colours of things, forms of words and, in English, definitions."""
    for row in read_table("opposites"):
        word, opposite = row[language], row[f"opposite_{language}"]
        yield Fact("opposite", {"word": word, "opposite": opposite})
        yield Fact("opposite", {"word": opposite, "opposite": word})
    for row in read_table("colours"):
        thing = row[language]
        plural = (
            not thing.startswith("the ") and thing != "grass" and any(word.endswith("s") for word in thing.split())
        )
        slots = {"thing": thing, "colour": row[f"colour_{language}"]}
        yield Fact("colour", {**slots, "be": "are" if plural else "is"} if language == "en" else slots)
    for row in read_table("grammar"):
        if (row["relation"] == "measure") == (language == "zh"):
            yield Fact(row["relation"], {"word": row["word"], "form": row["form"]})
    if language == "en":
        for row in read_table("definitions"):
            yield Fact(row["relation"], {"word": row["word"], "meaning": row["meaning"]})


def culture_facts(language: str) -> Iterator[Fact]:
    """Yield where landmarks are, who wrote books and who found or invented things."""
    articles = {row["code"]: f"{row['article_en']} " for row in read_table("countries") if "article_en" in row}
    for row in read_table("landmarks"):
        place = {"landmark": row[language], "city": row[f"city_{language}"]}
        article = articles.get(row["country"], "") if language == "en" else ""
        yield Fact("landmark", place)
        yield Fact("landmark_country", {**place, "country": article + country_name(row["country"], language)})
    for row in read_table("works"):
        yield Fact("work", {"work": row[language], "author": row[f"author_{language}"]})
    for row in read_table("inventions"):
        names = {name: row[f"{name}_{language}"] for name in ("inventor", "verb")}
        yield Fact("invention", {"thing": row[language], **names})


def nature_facts(language: str) -> Iterator[Fact]:
    """Yield the planets in their order, what is largest, highest or first, and formulas of substances."""
    for row in read_table("planets"):
        yield Fact("planet", {"planet": row[language], "number": row["number"], "ordinal": row[f"ordinal_{language}"]})
    for row in read_table("records"):
        yield Fact("record", {"what": row[f"what_{language}"], "answer": row[f"answer_{language}"]})
    for row in read_table("substances"):
        yield Fact("formula", {"substance": row[language], "formula": row["formula"]})


def daily_facts(language: str) -> Iterator[Fact]:
    """Yield what things are made up of, what work people do, what tools are for and of which kind things are."""
    words = {row["digits"]: row[language] for row in read_table("numbers")}
    for row in read_table("units"):
        number = row["number"] if int(row["number"]) > LARGEST_FACTOR else words[row["number"]]
        if language == "zh" and row["number"] == "2":
            number = "两"
        yield Fact("unit", {"whole": row[f"whole_{language}"], "part": row[f"part_{language}"], "number": number})
    for row in read_table("jobs"):
        yield Fact("job", {"job": row[language], "place": row[f"place_{language}"], "work": row[f"work_{language}"]})
    for row in read_table("tools"):
        yield Fact("tool", {"tool": row[language], "use": row[f"use_{language}"]})
    for row in read_table("things"):
        relation = "kind" if language == "zh" or "counted" in row else "kind_of"
        yield Fact(relation, {"thing": row[language], "kind": row[f"kind_{language}"]})


def read_aliases(language: str) -> dict[str, list[str]]:
    """Return other names of countries and people, which stand in sentences but never are answers."""
    aliases: dict[str, list[str]] = defaultdict(list)
    for row in read_table("aliases"):
        if row["language"] == language:
            aliases[row["name"]].append(row["alias"])
    return aliases


def translations() -> dict[str, str]:
    """Return the Chinese words for the English names of everything in the tables that has one clear name."""
    tables = (read_table(name) for name in ("elements", "calendar", "animals", "things", "jobs", "planets"))
    pairs = {row["en"]: row["zh"] for table in tables for row in table}
    pairs |= {row["colour_en"]: row["colour_zh"] for row in read_table("colours")}
    english, chinese = (Locale.parse(name) for name in LOCALES.values())
    for row in read_table("countries"):
        pairs[country_name(row["code"], "en")] = country_name(row["code"], "zh")
        for names, key in (("languages", "language"), ("territories", "continent")):
            if key in row:
                pairs[getattr(english, names)[row[key]]] = getattr(chinese, names)[row[key]]
    return pairs


def country_name(code: str, language: str) -> str:
    """Return the name of a country without abbreviations and second names."""
    return plain_name(Locale.parse(LOCALES[language]).territories[code])


def plain_name(name: str) -> str:
    """Write a CLDR name as it would stand in a sentence: `St. Kitts & Nevis` becomes `Saint Kitts and Nevis`."""
    name = name.replace("St. ", "Saint ").replace(" & ", " and ").replace("’", "'").replace("ʻ", "'")
    return name.partition(" (")[0]
