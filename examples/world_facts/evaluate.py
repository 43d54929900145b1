"""
Count the blanks of the test sets that a model fills exactly: `python examples/world_facts/evaluate.py MODEL CORPUS`.

`CORPUS` is a folder of `corpus.py`. Answers are generated greedily and compared as strings without surrounding blanks.
The questions of `questions.tsv`, which were written before any training, are right if all of their blanks are.
"""

import argparse
import csv
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from glm_hf import GLMForBlankInfilling, GLMQuantizationConfig, GLMTokenizer

QUESTIONS = Path(__file__).parent / "questions.tsv"
LANGUAGES = ("en", "zh")
TEST_SETS = ("trained", "heldout")
BATCH = 64
MAX_NEW_TOKENS = 16


def read_items(folder: Path, test_set: str, language: str, limit: int | None) -> list[dict[str, str]]:
    """Return the first `limit` items of a test set, all of them by default."""
    path = folder / f"test.{test_set}.{language}.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} must be a folder written by corpus.py, but there is no file {path}")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()][:limit]


def fill(model: GLMForBlankInfilling, tokenizer: GLMTokenizer, texts: list[str]) -> Iterator[list[str]]:
    """Yield what the model puts in the blanks of each text."""
    for start in range(0, len(texts), BATCH):
        ids = tokenizer(texts[start : start + BATCH])["input_ids"]
        filled = model.fill_blanks(ids, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        for blanks in filled.blanks:
            yield [tokenizer.decode(blank).strip() for blank in blanks]


def score(model: GLMForBlankInfilling, tokenizer: GLMTokenizer, items: list[dict[str, str]]) -> dict[str, Any]:
    """Return numbers of right answers and of items, overall and by relation."""
    by_relation: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    answers = fill(model, tokenizer, [item["text"] for item in items])
    for item, answer in zip(items, answers, strict=True):
        by_relation[item["relation"]][0] += answer == [item["answer"].strip()]
        by_relation[item["relation"]][1] += 1
    right, count = (sum(numbers) for numbers in zip(*by_relation.values(), strict=True))
    return {"right": right, "count": count, "by_relation": dict(sorted(by_relation.items()))}


def ask(model: GLMForBlankInfilling, tokenizer: GLMTokenizer) -> list[dict[str, Any]]:
    """Return the questions that were written before training, each with its answers and what the model says."""
    with QUESTIONS.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    said = fill(model, tokenizer, [row["question"] for row in rows])
    return [{**row, "said": "; ".join(blanks)} for row, blanks in zip(rows, said, strict=True)]


def evaluate(
    model: GLMForBlankInfilling, tokenizer: GLMTokenizer, folder: Path, limit: int | None = None
) -> dict[str, dict[str, Any]]:
    """Return the scores of every test set and language, `{"heldout.en": {"right", "count", "by_relation"}, ...}`."""
    asked = ask(model, tokenizer)
    right = sum(row["said"] == row["answers"] for row in asked)
    questions = {"right": right, "count": len(asked), "by_relation": {}}
    return {"questions": questions} | {
        f"{test_set}.{language}": score(model, tokenizer, read_items(folder, test_set, language, limit))
        for test_set in TEST_SETS
        for language in LANGUAGES
    }


def print_table(results: dict[str, dict[str, Any]], by_relation: bool) -> None:
    """Print exact matches in percent, a test set per column."""
    rows = {"all": [(result["right"], result["count"]) for result in results.values()]}
    if by_relation:
        for relation in sorted({relation for result in results.values() for relation in result["by_relation"]}):
            rows[relation] = [result["by_relation"].get(relation, (0, 0)) for result in results.values()]
    print(f"{'exact match':<16}" + "".join(f"{name:>26}" for name in results))
    for row, cells in rows.items():
        print(f"{row:<16}" + "".join(f"{show(*cell):>26}" for cell in cells))


def show(right: int, count: int) -> str:
    """Return a share as text."""
    return f"{right / count:.1%} ({right}/{count})" if count else "-"


def main() -> None:
    """Load the model, evaluate it and print the table."""
    parser = argparse.ArgumentParser(description="Evaluate a model on the facts of the demonstration model.")
    parser.add_argument("model", help="folder or name of a model and its tokenizer")
    parser.add_argument("corpus", type=Path, help="folder written by corpus.py")
    parser.add_argument("--bits", type=int, choices=(4, 8), help="quantize the weights while loading")
    parser.add_argument("--limit", type=int, help="items per test set")
    parser.add_argument("--by-relation", action="store_true", help="list every relation")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    arguments = parser.parse_args()
    options = {"quantization_config": GLMQuantizationConfig(bits=arguments.bits)} if arguments.bits else {}
    model = GLMForBlankInfilling.from_pretrained(arguments.model, **options)
    tokenizer = GLMTokenizer.from_pretrained(arguments.model)
    results = evaluate(model.eval(), tokenizer, arguments.corpus, arguments.limit)
    print_table(results, arguments.by_relation)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
