"""The curves of a run in one file: a PNG, or an HTML page that needs nothing else, with the picture in it as SVG.

    loss                 of training and of evaluation, by kind of blank, and by corpus
    gradient norm        of all parameters and of the embedding, and of groups of layers
    throughput           tokens per second, and MFU and HFU where the peak of the devices is known
    learning rate

Needs matplotlib, which is imported here only when a plot is made. Colors are those of Okabe and Ito and of viridis,
which color-blind readers tell apart.
"""

from __future__ import annotations

import html
import io
import math
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from glm_hf.training.logs.run_log import Entry, read_history

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
WIDTH, ROW, DPI = 11, 3.1, 150  # inches, inches, dots per inch
MOST_POINTS = 1000  # of a curve, twice the dots that a panel has
FEW_POINTS = 50  # which are marked, as one alone is no line


@dataclass(frozen=True)
class Panel:
    """
    Curves that share axes.

    Attributes:
        title: Goes on top.
        pattern: Pattern of the names of its values in the log; its last group is a curve's name.
        is_log: Whether values are drawn by their magnitude.
        scale: Factor of the values.
        is_ordered: Whether the order of the curves has a meaning.
    """

    title: str
    pattern: str
    is_log: bool = False
    scale: float = 1.0
    is_ordered: bool = False


PANELS = (
    Panel("loss", r"((?:eval_(?:\w+_)?)?loss)"),
    Panel("loss by kind of blank", r"(?:eval_(?:\w+_)?)?loss_(mask|smask|gmask|instruction)"),
    Panel("loss by corpus", r"(?:eval_(?:\w+_)?)?loss/(.+)"),
    Panel("norm of the gradient", r"((?:embedding_)?grad_norm)", is_log=True),
    Panel("norm of the gradient by layers", r"grad_norm/(.+)", is_log=True, is_ordered=True),
    Panel("tokens per second", r"(tokens_per_second)"),
    Panel("% of the peak", r"([mh]fu)", scale=100.0),
    Panel("learning rate", r"(learning_rate)"),
)
FACTS = ("step", "samples", "epoch", "loss", "eval_loss", "grad_norm", "tokens_per_second", "mfu", "hfu")


def write_report(run: str | Path, path: str | Path) -> None:
    """
    Write the curves of a run to a file.

    Args:
        run: Folder of the run, as `read_history` takes it.
        path: File to be written, `.html` or `.png`.

    Raises:
        FileNotFoundError: If the folder holds no run.
        ValueError: If the file is of another kind, the log is damaged or without a loss, or matplotlib is missing.
    """
    kind = Path(path).suffix
    if kind not in (".html", ".png"):
        raise ValueError(f"a report must be a file .html or .png, got {path}")
    if find_spec("matplotlib") is None:
        raise ValueError("a report needs matplotlib: pip install 'glm-hf[plot]'")
    history = read_history(run)
    figure = plot_history(history)
    if kind == ".png":
        figure.suptitle(str(run), parse_math=False)
        figure.savefig(path, format="png", dpi=DPI)
    else:
        Path(path).write_text(_page(str(run), history, figure), encoding="utf-8")


def plot_history(history: list[Entry]) -> Figure:
    """Return a figure with a panel for each of `PANELS` of which anything was logged."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for entry in history for name in entry))
    found = [(panel, [name for name in names if re.fullmatch(panel.pattern, name)]) for panel in PANELS]
    shown = [(panel, matching) for panel, matching in found if matching]
    rows = math.ceil(len(shown) / 2)
    figure = Figure(figsize=(WIDTH, ROW * rows + 0.4), layout="constrained")
    every = figure.subplots(rows, 2, squeeze=False).flatten().tolist()
    for axes in every[len(shown) :]:
        axes.set_axis_off()
    last = max(entry["step"] for entry in history)
    for axes, (panel, matching) in zip(every, shown, strict=False):
        _draw(axes, panel, {name: points_of(history, name) for name in matching})
        axes.set(title=panel.title, xlabel="step", xlim=(0, last * 1.02 or 1))
    return figure


def points_of(history: list[Entry], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps and the values of a curve, NaN where a value was not finite; of very many, the extremes."""
    points = [(entry["step"], entry[name]) for entry in history if name in entry]
    steps = np.array([step for step, _ in points])
    values = np.array([value if isinstance(value, (int, float)) else np.nan for _, value in points], dtype=float)
    kept = thinned(values)
    return steps[kept], values[kept]


def thinned(values: np.ndarray) -> np.ndarray:
    """Return which of very many values to draw: the first of every stretch that is NaN, its lowest or highest."""
    if len(values) <= MOST_POINTS:
        return np.arange(len(values))
    kept: set[int] = set()
    for stretch in np.array_split(np.arange(len(values)), MOST_POINTS // 2):
        own = values[stretch]
        is_nan = np.isnan(own)
        if is_nan.any():
            kept.add(int(stretch[is_nan][0]))
        if not is_nan.all():
            kept |= {int(stretch[np.nanargmin(own)]), int(stretch[np.nanargmax(own)])}
    return np.array(sorted(kept))


def _draw(axes: Axes, panel: Panel, curves: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Draw curves; those of evaluation are dashed, in the color of what they evaluate."""
    labels = {name: re.fullmatch(panel.pattern, name)[1] for name in curves}  # type: ignore[index]
    things = list(dict.fromkeys(label.removeprefix("eval_") for label in labels.values()))
    for name, (steps, values) in curves.items():
        number = things.index(labels[name].removeprefix("eval_"))
        is_eval = name.startswith("eval_")
        axes.plot(
            steps,
            values * panel.scale,
            color=_color(number, len(things), panel.is_ordered),
            linestyle="--" if is_eval else "-",
            marker="o" if len(steps) < FEW_POINTS else None,
            markersize=3,
            linewidth=1,
            label=f"{name.partition('loss')[0]}{labels[name]}" if is_eval and name != labels[name] else labels[name],
        )
    if panel.is_log and any((values > 0).any() for _, values in curves.values()):
        axes.set_yscale("log")
    axes.grid(color="#E6E6E6", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if len(curves) > 1:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="x-small", frameon=False)


def _color(number: int, count: int, is_ordered: bool) -> str | tuple[float, ...]:
    from matplotlib import colormaps

    if is_ordered or count > len(COLORS):
        return colormaps["viridis"](0.9 * number / max(count - 1, 1))
    return COLORS[number]


def _page(run: str, history: list[Entry], figure: Figure) -> str:
    """Return the page: what was logged last, and the figure."""
    last = {name: entry[name] for entry in history for name in FACTS if name in entry}
    names = "".join(f"<th>{name}</th>" for name in FACTS if name in last)
    values = "".join(f"<td>{_text(last[name])}</td>" for name in FACTS if name in last)
    return PAGE.format(run=html.escape(run), names=names, values=values, picture=_svg(figure))


def _text(value: object) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else "not finite"


def _svg(figure: Figure) -> str:
    """Return a figure as an element of a page, with its text as text."""
    from matplotlib import rc_context

    written = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))  # or it links to pages
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "glm-hf"}):
        figure.savefig(written, format="svg", metadata=nothing)
    svg = written.getvalue()
    svg = svg[svg.index("<svg") :]
    return re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{run}</title>
<style>
body {{ font-family: sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; }}
svg {{ width: 100%; height: auto; }}
th, td {{ text-align: right; padding: 0.2em 0.8em; border-bottom: 1px solid #ccc; }}
</style>
</head>
<body>
<h1>{run}</h1>
<table><tr>{names}</tr><tr>{values}</tr></table>
{picture}
</body>
</html>
"""
