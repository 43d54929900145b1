import importlib.util
import json
import random
import re
import sys
from collections import defaultdict
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

pytest.importorskip("babel", reason="the names of countries, languages and currencies are Babel's")

from babel.languages import get_official_languages
from babel.numbers import get_territory_currencies

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "world_facts"
NAMES = ("facts", "sentences", "corpus", "evaluate")  # each imports only from those before it
LANGUAGES = ("en", "zh")
TESTS = [(name, language) for name in ("trained", "heldout") for language in LANGUAGES]
SENTENCES = {
    "en": [
        "The capital of France is Paris.",
        "Amsterdam is the capital of the Netherlands.",
        "The currency of Japan is the Japanese yen.",
        "The official language of Brazil is Portuguese.",
        "Kenya lies in Africa.",
        "The chemical symbol of gold is Au.",
        "The atomic number of oxygen is 8.",
        "April has 30 days.",
        "The number 42 is written forty-two.",
        "7 times 8 is 56.",
        "A young cow is called a calf.",
        "An owl is a bird.",
        "The opposite of hot is cold.",
        "The Chinese word for cat is 猫.",
        "The quick brown fox jumps over the lazy dog.",
    ],
    "zh": [
        "法国的首都是巴黎。",
        "日本的货币是日元。",
        "巴西的官方语言是葡萄牙语。",
        "肯尼亚位于非洲。",
        "金的元素符号是Au。",
        "氧的原子序数是8。",
        "四月有30天。",
        "数字42写作四十二。",
        "7乘8等于56。",
        "青蛙的幼崽叫蝌蚪。",
        "大的反义词是小。",
        "猫的英语是cat。",
        "千里之行，始于足下。",
    ],
}


@pytest.fixture(scope="module")
def scripts():
    """The example's modules, which import each other by their bare names."""
    modules: dict[str, ModuleType] = {}
    with pytest.MonkeyPatch.context() as patch:
        for name in NAMES:
            spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
            modules[name] = importlib.util.module_from_spec(spec)
            patch.setitem(sys.modules, name, modules[name])
            spec.loader.exec_module(modules[name])
        yield SimpleNamespace(**modules)


@pytest.fixture(scope="module")
def folder(scripts, tmp_path_factory):
    """The corpus with a part of its instructions, of every sentence one or more."""
    folder = tmp_path_factory.mktemp("corpus")
    with pytest.MonkeyPatch.context() as patch:
        for name, number in (("OF_A_FACT", 20), ("OF_AN_ORDER", 60)):
            patch.setattr(scripts.corpus, f"INSTRUCTIONS_{name}", number)
        patch.setattr(scripts.corpus, "LEAST_OF_A_SENTENCE", 1)
        scripts.corpus.write_corpus(folder)
    return folder


@pytest.fixture(scope="module")
def phrasings(scripts):
    return {language: scripts.sentences.Phrasings(language) for language in LANGUAGES}


@pytest.fixture(scope="module")
def held_out(scripts, phrasings):
    """All sentences for tests only, by language."""
    return {
        language: [
            sentence
            for fact in scripts.facts.list_facts(language)
            for sentence in phrasings[language].list_held_out(fact)
        ]
        for language in LANGUAGES
    }


@pytest.fixture(scope="module")
def read(folder):
    """The rows of a file, parsed once."""
    files: dict[tuple[str, str], list[dict[str, str]]] = {}

    def read_rows(name: str, language: str) -> list[dict[str, str]]:
        if (name, language) not in files:
            lines = (folder / f"{name}.{language}.jsonl").read_text(encoding="utf-8").splitlines()
            files[name, language] = [json.loads(line) for line in lines]
        return files[name, language]

    return read_rows


@pytest.mark.parametrize("language", LANGUAGES)
def test_sentences_are_facts_that_everybody_knows(scripts, phrasings, language):
    wanted, rng = "".join(SENTENCES[language]).lower(), random.Random(0)
    facts = [f for f in scripts.facts.list_facts(language) if all(s.lower() in wanted for s in f.slots.values())]
    texts = {
        sentence.text for _ in range(3) for fact in facts for sentence in phrasings[language].sample_trained(fact, rng)
    }
    texts |= set(scripts.sentences.list_sayings(language))
    assert [sentence for sentence in SENTENCES[language] if sentence not in texts] == []


def test_languages_and_currencies_are_those_that_babel_knows(scripts):
    for row in scripts.facts.read_table("countries"):
        if "language" in row:
            assert row["language"] in get_official_languages(row["code"], de_facto=True), row
        if "currency" in row:
            assert get_territory_currencies(row["code"]) == [row["currency"]], row


def test_elements_and_numbers_are_complete(scripts):
    elements, numbers = (scripts.facts.read_table(name) for name in ("elements", "numbers"))
    assert [row["number"] for row in elements] == [str(number) for number in range(1, 119)]
    assert [row["digits"] for row in numbers] == [str(number) for number in range(101)]
    for rows, column in [(elements, "symbol"), *((rows, key) for rows in (elements, numbers) for key in LANGUAGES)]:
        assert len({row[column] for row in rows}) == len(rows), column


def test_a_seed_gives_the_same_files(scripts, tmp_path, monkeypatch):
    every = scripts.facts.list_facts
    monkeypatch.setattr(scripts.sentences, "list_facts", lambda language: every(language)[::100])
    monkeypatch.setattr(scripts.corpus, "list_facts", lambda language: every(language)[::100])
    for folder, seed in [("a", 1), ("b", 1), ("c", 2)]:
        scripts.corpus.write_corpus(tmp_path / folder, seed)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
        assert path.read_bytes() != (tmp_path / "c" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("language", LANGUAGES)
def test_training_files_hold_no_held_out_sentence(scripts, read, held_out, language):
    normal = scripts.sentences.normal
    sayings = set(scripts.sentences.list_sayings(language))
    unseen = {normal(sentence.text) for sentence in held_out[language] if sentence.text not in sayings}
    rows = read("instructions", language)
    whole = {normal(row["inputs"].replace("[MASK]", row["targets"], 1)) for row in rows if "[MASK]" in row["inputs"]}
    whole |= {normal(row["inputs"] + row["targets"]) for row in rows}
    assert unseen.isdisjoint({normal(row["text"]) for row in read("text", language)} | whole)
    asked = {normal(row["inputs"]) for row in rows}
    for name in ("test.heldout", "test.trained"):
        assert asked.isdisjoint(normal(row["text"]) for row in read(name, language))


@pytest.mark.parametrize("language", LANGUAGES)
def test_held_out_phrasings_use_only_trained_words(phrasings, read, language):
    def words(text: str) -> set[str]:
        return set(re.findall(r"\w+", text.lower())) if language == "en" else set(text)

    trained = set().union(*(words(row["text"]) for row in read("text", language)))
    held_out = [re.sub(r"\{.*?\}", " ", text) for texts in phrasings[language].held_out.values() for text in texts]
    assert {text: words(text) - trained - {" "} for text in held_out if words(text) - trained - {" "}} == {}


@pytest.mark.parametrize("language", LANGUAGES)
def test_only_one_answer_fits_in_a_test_blank(read, held_out, language):
    fitting = defaultdict(set)
    for sentence in held_out[language]:
        for place in sentence.places:
            fitting[sentence.blank([place])].add(sentence.pieces[place])
    items = read("test.heldout", language)
    assert [item for item in items if fitting[item["text"]] != {item["answer"]}] == []


@pytest.mark.parametrize(("name", "language"), TESTS)
def test_a_test_has_one_blank_and_choices_with_the_answer(read, name, language):
    items = read(f"test.{name}", language)
    assert 900 <= len(items) <= 1100
    for item in items:
        assert item["text"].count("[MASK]") == 1
        assert item["answer"] == item["answer"].strip() != ""
        assert item["choices"].count(item["answer"]) == 1
        assert 2 <= len(set(item["choices"])) == len(item["choices"]) <= 4


@pytest.mark.parametrize("language", LANGUAGES)
def test_tasks_of_the_package_are_the_held_out_items(read, language):
    path = ROOT / "src" / "glm_hf" / "evaluation" / "tasks" / "world_facts" / f"heldout.{language}.jsonl"
    stored = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    made = read("test.heldout", language)
    assert [{**item, "label": item["choices"].index(item["answer"])} for item in made] == stored


@pytest.mark.parametrize("language", LANGUAGES)
def test_instructions_are_of_all_kinds(read, language):
    rows = read("instructions", language)
    numbers = {row["inputs"].count("[MASK]") for row in rows}
    assert numbers >= {0, 1, 2}
    assert all(row["targets"].strip() and row["inputs"].strip("[MASK] .。") for row in rows)
    ends = [row["inputs"][-1] in ".。" for row in rows if "[MASK]" in row["inputs"]]
    assert 0.3 < sum(ends) / len(ends) < 0.9


def test_the_currency_of_a_country_is_a_blank_but_not_the_country_of_a_shared_currency(read):
    inputs = {row["inputs"].lower() for row in read("instructions", "en")}
    assert any("uses the [mask]" in text for text in inputs)
    assert any("[mask]" in text and "japanese yen" in text for text in inputs)
    assert not any(text.startswith("[mask] uses the euro as its currency") for text in inputs)


def test_questions_were_written_with_answers(scripts):
    path = FOLDER / "questions.tsv"
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    assert rows[0] == ["language", "question", "answers"]
    assert len(rows) == 21
    for _, question, answers in rows[1:]:
        assert question.count("[MASK]") == len(answers.split("; "))


def test_score_counts_exact_answers_by_relation(scripts):
    model = SimpleNamespace(fill_blanks=lambda ids, **_: SimpleNamespace(blanks=[[text] for text in ids]))

    class Tokenizer:
        def __call__(self, texts):
            return {"input_ids": [text.replace("[MASK]", "").strip(".") for text in texts]}

        def decode(self, ids):
            return f" {ids} "

    items = [
        {"text": "[MASK]Paris.", "answer": "Paris", "relation": "capital"},
        {"text": "[MASK]Rome.", "answer": "Paris", "relation": "capital"},
        {"text": "[MASK]8.", "answer": "8", "relation": "sum"},
    ]
    result = scripts.evaluate.score(model, Tokenizer(), items)
    assert result == {"right": 2, "count": 3, "by_relation": {"capital": [1, 2], "sum": [1, 1]}}
