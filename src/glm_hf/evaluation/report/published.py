"""Figures that were published of GLM-130B, by task, metric and precision.

Sources: GLM-130B (arXiv 2210.02414); the evaluation and quantization notes released with it.
"""

from dataclasses import dataclass

from glm_hf.evaluation.report.figures import Figure


@dataclass(frozen=True)
class Published:
    """What was published of a task."""

    metrics: tuple[str, ...]
    by_bits: dict[int, float]
    """By bits of a weight: 16, 8 and 4."""


PUBLISHED = {
    "mmlu": Published(("Accuracy", "acc"), {16: 44.751, 8: 44.709, 4: 44.801}),
    "lambada": Published(("Accuracy", "acc"), {16: 80.206, 8: 80.206, 4: 79.468}),
    "wikitext2": Published(("PPL", "word_perplexity"), {16: 10.901, 8: 10.904, 4: 11.167}),
    "wikitext103": Published(("PPL", "word_perplexity"), {16: 10.759, 8: 10.763, 4: 11.046}),
    "ptb": Published(("PPL", "word_perplexity"), {16: 18.964, 8: 18.994, 4: 19.535}),
}
WHOLE_GROUPS = {"mmlu": ("Overall", "(group)")}
"""Groups that the figure is of, where there are several."""


def published_figure(figure: Figure, bits: int) -> float | None:
    """Return what was published of a task in a precision, None if nothing was."""
    name = "".join(letter for letter in figure.task.lower() if letter.isalnum()).removeprefix("glm")
    known = PUBLISHED.get(name)
    if known is None or figure.metric not in known.metrics:
        return None
    if figure.group not in WHOLE_GROUPS.get(name, (figure.group,)) or figure.group in ("validation", "valid", "dev"):
        return None
    return known.by_bits[bits]
