"""The facts of the demonstration model: what the tables hold and what Babel's CLDR data name, language by language.

A table is a TSV file in `tables/` with a header; `-` says that there is nothing to tell. `countries.tsv` holds codes
only, CLDR's for continents and languages and ISO's for currencies; Babel translates them.
"""

import csv
from collections.abc import Iterator
from itertools import chain, pairwise, product
from pathlib import Path
from typing import NamedTuple

from babel import Locale

TABLES = Path(__file__).parent / "tables"
LOCALES = {"en": "en", "zh": "zh_Hans"}
NOTHING = "-"
LARGEST_TERM = 10


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
    return list(
        chain(
            country_facts(language),
            element_facts(language),
            calendar_facts(language),
            number_facts(language),
            animal_facts(language),
            word_facts(language),
            (Fact("translation", {"english": en, "chinese": zh}) for en, zh in translations().items()),
        )
    )


def country_facts(language: str) -> Iterator[Fact]:
    """Yield capitals, official languages, currencies and continents, and the profile of countries that have all."""
    locale = Locale.parse(LOCALES[language])
    for row in read_table("countries"):
        article = f"{row['article_en']} " if language == "en" and "article_en" in row else ""
        country = {"country": article + country_name(row["code"], language)}
        known = {"capital": row.get(f"capital_{language}")}
        known["language"] = row.get("language") and locale.languages[row["language"]]
        known["currency"] = row.get("currency") and plain_name(locale.currencies[row["currency"]])
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
    """Yield numbers, lengths and order of the months, and the order of the weekdays, both round the year's end."""
    rows = read_table("calendar")
    months, weekdays = ([row for row in rows if row["kind"] == kind] for kind in ("month", "weekday"))
    for number, row in enumerate(months, start=1):
        yield Fact("month_number", {"month": row[language], "number": str(number)})
        if "days" in row:
            yield Fact("month_days", {"month": row[language], "days": row["days"]})
    for month, following in pairwise([*months, months[0]]):
        yield Fact("month_order", {"month": month[language], "next": following[language]})
    for day, following in pairwise([*weekdays, weekdays[0]]):
        yield Fact("weekday_order", {"day": day[language], "next": following[language]})


def number_facts(language: str) -> Iterator[Fact]:
    """Yield words and order of the numbers from 0 to 100, and small sums and products."""
    rows = read_table("numbers")
    for row in rows:
        yield Fact("number_word", {"digits": row["digits"], "word": row[language]})
    for row, following in pairwise(rows):
        yield Fact("number_order", {"word": row[language], "next": following[language]})
    for a, b in product(range(1, LARGEST_TERM + 1), repeat=2):
        yield Fact("sum", {"a": str(a), "b": str(b), "total": str(a + b)})
        yield Fact("product", {"a": str(a), "b": str(b), "total": str(a * b)})


def animal_facts(language: str) -> Iterator[Fact]:
    """Yield classes, young and sounds of animals."""
    for row in read_table("animals"):
        for relation in ("class", "young", "sound"):
            if f"{relation}_{language}" in row:
                yield Fact(relation, {"animal": row[language], relation: row[f"{relation}_{language}"]})


def word_facts(language: str) -> Iterator[Fact]:
    """Yield opposites and the colours of things."""
    for row in read_table("opposites"):
        yield Fact("opposite", {"word": row[language], "opposite": row[f"opposite_{language}"]})
    for row in read_table("colours"):
        yield Fact("colour", {"thing": row[language], "colour": row[f"colour_{language}"]})


def translations() -> dict[str, str]:
    """Return the Chinese words for the English names of everything in the tables that has one clear name."""
    tables = (read_table(name) for name in ("elements", "calendar", "animals"))
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
