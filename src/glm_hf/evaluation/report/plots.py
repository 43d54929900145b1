"""A picture of figures: bars of groups, or a radar where there are many, of one result or of two.

Needs matplotlib, which is imported here only when a picture is drawn. Colours are those of Okabe and Ito, which
colour-blind readers tell apart.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glm_hf.evaluation.report.figures import Figure, figures_of

COLORS = ("#0072B2", "#D55E00")
FEWEST_SPOKES, MOST_SPOKES = 5, 24
"""Numbers of groups from which, and up to which, a radar reads well."""


def plot_results(results: Sequence[Mapping[str, Any]], labels: Sequence[str], path: Path) -> None:
    """
    Draw the shares of one result or two into a PNG.

    Args:
        results: As `evaluate` writes them.
        labels: Their names.
        path: File.

    Raises:
        ModuleNotFoundError: If matplotlib is missing.
        ValueError: If there is no share to draw.
    """
    try:
        from matplotlib.figure import Figure as Picture
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('a picture needs matplotlib: pip install "glm_hf[plot]"') from error
    drawn = [{name_of(each): each.value for each in figures_of(result) if each.is_share} for result in results]
    names = [name for name in drawn[0] if all(name in found for found in drawn)]
    if not names:
        raise ValueError("there is no share, such as an accuracy, to draw")
    is_radar = FEWEST_SPOKES <= len(names) <= MOST_SPOKES
    picture = Picture(figsize=(9, 8) if is_radar else (9, 1.2 + 0.32 * len(names) * len(drawn)), layout="constrained")
    if is_radar:
        axes: Any = picture.add_subplot(projection="polar")
        angles = [2 * math.pi * place / len(names) for place in range(len(names))]
        for found, label, color in zip(drawn, labels, COLORS, strict=False):
            values = [found[name] for name in names]
            axes.plot([*angles, angles[0]], [*values, values[0]], label=label, color=color, marker="o", markersize=3)
            axes.fill(angles, values, color=color, alpha=0.08)
        axes.set_xticks(angles, names, fontsize=8)
        axes.tick_params(axis="x", pad=2)
        for angle, text in zip(angles, axes.get_xticklabels(), strict=True):  # which begin, or end, at the circle
            text.set_horizontalalignment(
                "center" if abs(math.cos(angle)) < 0.1 else "left" if math.cos(angle) > 0 else "right"
            )
        axes.set_ylim(0, 100)
        axes.set_yticks(range(20, 101, 20))
        axes.tick_params(axis="y", labelsize=7, labelcolor="0.45")
        axes.set_rlabel_position(180 / len(names))
    else:
        axes = picture.add_subplot()
        height = 0.8 / len(drawn)
        for index, (found, label, color) in enumerate(zip(drawn, labels, COLORS, strict=False)):
            places = [place + (index - (len(drawn) - 1) / 2) * height for place in range(len(names))]
            bars = axes.barh(places, [found[name] for name in names], height * 0.92, label=label, color=color)
            axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.invert_yaxis()
        axes.set(xlim=(0, 108), xlabel="percent")
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, frameon=False)
    picture.savefig(path, dpi=150, format="png")


def name_of(figure: Figure) -> str:
    """Return what stands beside a bar or a spoke."""
    return " ".join(part for part in (figure.task, figure.group, figure.metric) if part and part != "(group)")
