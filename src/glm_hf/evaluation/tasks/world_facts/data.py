"""Facts that the demonstration model was trained on, in phrasings that it never saw, as data sets of the harness."""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict


def load_english(**_: Any) -> DatasetDict:
    """Return the English items."""
    return load("en")


def load_chinese(**_: Any) -> DatasetDict:
    """Return the Chinese items."""
    return load("zh")


def load(language: str) -> DatasetDict:
    """Return the items of a language: `text` with `[MASK]`, `choices`, `label` and `answer`."""
    lines = (Path(__file__).parent / f"heldout.{language}.jsonl").read_text(encoding="utf-8").splitlines()
    return DatasetDict({"test": Dataset.from_list([json.loads(line) for line in lines])})
