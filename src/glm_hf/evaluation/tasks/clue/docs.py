"""Documents and scores of CLUE."""

from typing import Any

from glm_hf.evaluation.original.metrics import exact_match, f1


def with_label(docs: Any) -> Any:
    """Return the documents on whose label the annotators agreed."""
    return docs.filter(lambda doc: doc["label"] >= 0)


def em_and_f1(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Return exact match and F1 of an answer, the best of all targets."""
    answer, targets = results[0].strip(), doc["answers"]["text"]
    return {"em": exact_match(answer, targets), "f1": f1(answer, targets)}
