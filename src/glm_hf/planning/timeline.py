"""Plot when every stage of a pipeline computes: a PNG file with a row per stage.

Micro-batches bear their numbers where these fit. In a step of many they do not, so its beginning is drawn once more,
enlarged.

Needs matplotlib, which is imported here only when a plot is made. Colors are those of Okabe and Ito, which color-blind
readers tell apart.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from glm_hf.planning.schedule import PipelineRun

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORWARD, BACKWARD, WAITING = "#56B4E9", "#E69F00", "#E6E6E6"
WIDTH, ROW, DPI = 12, 0.32, 150  # inches, inches, dots per inch
BAR = 0.86  # of a row
DIGIT = 0.09  # inches


def plot_timeline(run: PipelineRun, path: str | Path, title: str) -> None:
    """
    Write the plot of a step to a PNG file.

    Args:
        run: Passes of a step, in seconds.
        path: File to be written.
        title: Goes on top, before the share of waiting.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    spans = [run.makespan] if _fits_numbers(run, run.makespan) else [run.makespan, _beginning(run)]
    height = (ROW * len(run.stages) + 0.7) * len(spans) + 0.9
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.suptitle(f"{title}: stages wait {run.bubble:.1%} of {run.makespan:.3g} s", parse_math=False)
    for axes, span in zip(figure.subplots(len(spans), squeeze=False).flatten(), spans, strict=True):
        _draw(axes, run, span)
    colors = {"forward": FORWARD, "backward": BACKWARD, "waiting": WAITING}
    patches = [Patch(color=color, label=label) for label, color in colors.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False)
    figure.savefig(path, format="png", dpi=DPI)


def _beginning(run: PipelineRun) -> float:
    """Return the time in which the first stage goes through as many micro-batches backward as there are stages."""
    backward = [one.end for one in run.stages[0] if not one.is_forward]
    return min(backward[min(len(run.stages), len(backward)) - 1], run.makespan)


def _fits_numbers(run: PipelineRun, span: float) -> bool:
    """Tell whether most passes are wide enough for their numbers where `span` is the width of the plot."""
    widths = sorted(one.end - one.start for passes in run.stages for one in passes)
    return widths[len(widths) // 2] / span * WIDTH > DIGIT * len(str(len(run.stages[0]) // 2))


def _draw(axes: Axes, run: PipelineRun, span: float) -> None:
    """Draw a row per stage, from the beginning of the step on."""
    for stage, passes in enumerate(run.stages):
        shown = [one for one in passes if one.start < span]
        axes.broken_barh([(0, span)], (stage - BAR / 2, BAR), facecolors=WAITING)
        axes.broken_barh(
            [(one.start, one.end - one.start) for one in shown],
            (stage - BAR / 2, BAR),
            facecolors=[FORWARD if one.is_forward else BACKWARD for one in shown],
            edgecolors="white",
            linewidth=0.6 if _fits_numbers(run, span) else 0,
            snap=False,
        )
        for one in shown:
            text = str(one.micro_batch)
            if one.end <= span and (one.end - one.start) / span * WIDTH > DIGIT * len(text):
                axes.text((one.start + one.end) / 2, stage, text, ha="center", va="center_baseline", fontsize=7)
    axes.set(xlim=(0, span), ylim=(len(run.stages) - 0.5, -0.5), xlabel="seconds", ylabel="stage")
    axes.set_yticks(range(len(run.stages)))
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    if span < run.makespan:
        axes.set_title(f"the first {span:.3g} s", loc="left", fontsize="medium")
