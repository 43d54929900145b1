"""Documents and scores of LAMBADA and MMLU."""

from collections import defaultdict
from typing import Any

from datasets import DatasetDict, load_dataset

EXAMPLES = 5


def first_word(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Return whether the first word of an answer is the last one of the text."""
    return {"acc": float(results[0].strip().split(" ")[0] == doc["text"].rsplit(" ", 1)[1])}


def load_mmlu(**_: Any) -> DatasetDict:
    """Return the questions of MMLU as `text`, behind examples of their subject, and the number of the `answer`."""
    parts = load_dataset("cais/mmlu", "all")
    examples: dict[str, list[str]] = defaultdict(list)
    for doc in parts["dev"]:
        examples[doc["subject"]].append(question(doc, "ABCD"[doc["answer"]]))

    def lay_out(doc: dict[str, Any]) -> dict[str, str]:
        subject = doc["subject"].replace("_", " ")
        head = f"The following are multiple choice questions about {subject}."
        return {"text": "\n\n".join([head, *examples[doc["subject"]][:EXAMPLES], question(doc, "[MASK]")])}

    return DatasetDict({"test": parts["test"].map(lay_out)})


def question(doc: dict[str, Any], answer: str) -> str:
    """Return a question with its choices and an answer."""
    choices = (f"{letter}. {choice}" for letter, choice in zip("ABCD", doc["choices"], strict=True))
    return "\n".join([doc["question"].strip(), *choices, f"Answer: {answer}"])
