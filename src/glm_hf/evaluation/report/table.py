"""Tables of figures, as text."""

from collections.abc import Mapping, Sequence
from typing import Any

from glm_hf.evaluation.report.figures import figures_of
from glm_hf.evaluation.report.published import published_figure

MARKED = 1.0
"""Difference from what was published, in its unit, from which on it is marked."""


def result_table(result: Mapping[str, Any]) -> list[str]:
    """Return the lines of a table of all figures, with what was published where something was."""
    bits = (result.get("model") or {}).get("bits") or 16
    rows = [["task", "group", "metric", "max", "median", "average", "published", "difference"]]
    for figure in figures_of(result):
        published = published_figure(figure, bits)
        difference = "" if published is None else f"{figure.value - published:+.2f}"
        if published is not None and abs(figure.value - published) >= MARKED:
            difference += " *"
        error = "" if figure.error is None else f" ± {figure.error:.2f}"
        rows.append(
            [
                *(figure.task, figure.group, figure.metric, number(figure.greatest), number(figure.median)),
                *(number(figure.value) + error, number(published), difference),
            ]
        )
    used = [place for place in range(len(rows[0])) if place < 3 or any(row[place] for row in rows[1:])]
    lines = align([[row[place] for place in used] for row in rows], names=3)
    if any(row[-1].endswith("*") for row in rows):
        lines.append(f"* {MARKED} or more away from what was published of GLM-130B with {bits} bits a weight")
    return lines


def number(value: float | None) -> str:
    """Return a figure with as many digits as are looked at."""
    if value is None:
        return ""
    return f"{value:.3e}" if abs(value) >= 1e6 else f"{value:.3f}"


def align(rows: Sequence[Sequence[str]], names: int) -> list[str]:
    """Return rows as lines whose first columns stand on the left, and the others on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if place < names else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
