import importlib.util
import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

pytest.importorskip("babel", reason="the names of countries, languages and currencies are Babel's")

from babel.languages import get_official_languages
from babel.numbers import get_territory_currencies

FOLDER = Path(__file__).parents[2] / "examples" / "world_facts"
NAMES = ("facts", "sentences", "corpus", "evaluate")  # each imports only from those before it
LANGUAGES = ("en", "zh")
TESTS = [(name, language) for name in ("trained", "heldout") for language in LANGUAGES]
SENTENCES = {
    "en": [
        "The capital of France is Paris.",
        "Amsterdam is the capital of the Netherlands.",
        "The currency of Japan is the Japanese Yen.",
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
    folder = tmp_path_factory.mktemp("corpus")
    scripts.corpus.write_corpus(folder, seed=1)
    return folder


@pytest.fixture(scope="module")
def sentences(scripts):
    return {language: scripts.sentences.list_sentences(language) for language in LANGUAGES}


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
def test_text_holds_facts_that_everybody_knows(read, language):
    texts = {row["text"] for row in read("text", language)}
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


def test_a_seed_gives_the_same_files(scripts, sentences, tmp_path, monkeypatch):
    monkeypatch.setattr(scripts.corpus, "list_sentences", lambda language: sentences[language][::20])
    for folder, seed in [("a", 1), ("b", 1), ("c", 2)]:
        scripts.corpus.write_corpus(tmp_path / folder, seed)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
        assert path.read_bytes() != (tmp_path / "c" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("language", LANGUAGES)
def test_training_files_hold_no_held_out_sentence(read, sentences, language):
    held_out = {sentence.text for sentence in sentences[language] if sentence.held_out}
    texts = {row["text"] for row in read("text", language)}
    texts |= {f"{row['inputs']} {row['targets']}" for row in read("instructions", language)}
    texts |= {f"{row['inputs']}{row['targets']}" for row in read("instructions", language)}
    assert held_out.isdisjoint(texts)
    blanks = {row["inputs"] for row in read("instructions", language)}
    assert blanks.isdisjoint(row["text"] for row in read("test.heldout", language))


@pytest.mark.parametrize("language", LANGUAGES)
def test_held_out_phrasings_use_only_trained_words(scripts, language):
    def words(phrasing: str) -> set[str]:
        literal = re.sub(r"\{.*?\}", " ", phrasing).lower()
        return set(re.findall(r"\w+", literal)) if language == "en" else set(literal)

    phrasings = [row for rows in scripts.sentences.read_phrasings(language).values() for row in rows]
    trained = set().union(*(words(text) for text, held_out in phrasings if not held_out))
    assert {text for text, held_out in phrasings if held_out and words(text) - trained} == set()


@pytest.mark.parametrize(("name", "language"), TESTS)
def test_only_one_answer_fits_in_a_test_blank(read, sentences, name, language):
    fitting = defaultdict(set)
    for sentence in sentences[language]:
        for place in range(1, len(sentence.pieces), 2):
            before, after = "".join(sentence.pieces[:place]), "".join(sentence.pieces[place + 1 :])
            fitting[f"{before}[MASK]{after}"].add(sentence.pieces[place])
    assert [item for item in read(f"test.{name}", language) if fitting[item["text"]] != {item["answer"]}] == []


@pytest.mark.parametrize(("name", "language"), TESTS)
def test_a_test_sentence_with_its_answer_is_a_sentence(read, sentences, name, language):
    texts = {sentence.text for sentence in sentences[language] if sentence.held_out == (name == "heldout")}
    items = read(f"test.{name}", language)
    assert 900 <= len(items) <= 1100
    for item in items:
        assert item["text"].count("[MASK]") == 1
        assert item["answer"] == item["answer"].strip() != ""
        assert item["text"].replace("[MASK]", item["answer"]) in texts


@pytest.mark.parametrize("language", LANGUAGES)
def test_instructions_with_the_same_inputs_have_the_same_target(read, language):
    targets = defaultdict(set)
    for row in read("instructions", language):
        targets[row["inputs"]].add(row["targets"])
    assert [inputs for inputs, answers in targets.items() if len(answers) > 1] == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_instructions_start_sentences_and_leave_one_or_more_blanks(read, language):
    texts = {row["text"].replace(" ", "") for row in read("text", language)}
    numbers = set()
    for row in read("instructions", language):
        number = row["inputs"].count("[MASK]")
        numbers.add(number)
        if number == 0:
            assert f"{row['inputs']}{row['targets']}".replace(" ", "") in texts
    assert numbers >= {0, 1, 2}


def test_the_currency_of_a_country_is_a_blank_but_not_the_country_of_a_currency(read):
    inputs = {row["inputs"] for row in read("instructions", "en")}
    assert "The currency of Germany is the [MASK]." in inputs
    assert "The currency of [MASK] is the Euro." not in inputs


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
