"""Plot an analysis of weights: PNG files that read the same for 2 and for 70 layers.

    distribution.png  density of the weights within 10 standard deviations, a panel per kind and a line per layer, as
                      figure 5 of the GLM-130B paper
    statistics.png    standard deviation, kurtosis and largest weight by layer, a line per kind
    error.png         error relative to the weights by layer, a panel per scheme and a line per kind

Needs matplotlib, which is imported here only when a plot is made. Colors are those of Okabe and Ito and of viridis,
which color-blind readers tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import Locator

    from glm_hf.conversion.analysis.results import Analysis, TensorAnalysis

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
PANEL = (4.2, 3.6)  # inches
DPI = 150


def plot_analysis(analysis: Analysis, folder: Path) -> None:
    """Write the three plots of an analysis, as `analyze_weights` returns it or analysis.json holds it, to `folder`."""
    figures = {
        "distribution.png": _plot_distribution(analysis),
        "statistics.png": _plot_statistics(analysis),
        "error.png": _plot_errors(analysis),
    }
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=DPI)


def _panels(count: int, title: str, analysis: Analysis) -> tuple[Figure, list[Axes]]:
    """Return a figure with `count` panels, all of one size."""
    from matplotlib.figure import Figure

    columns = 2 if count == 4 else min(count, 3)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows + 1), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for unused in axes[count:]:
        unused.set_axis_off()
    figure.suptitle(f"{title} of {'/'.join(Path(analysis['model']).parts[-2:])}", parse_math=False)
    return figure, axes[:count]


def _plot_distribution(analysis: Analysis) -> Figure:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    figure, panels = _panels(len(analysis["kinds"]), "Weights", analysis)
    linears = [axes for axes, kind in zip(panels, analysis["kinds"], strict=True) if "." in kind]
    for axes in linears[1:]:  # so that narrow ones look narrow
        axes.sharex(linears[0])
        axes.sharey(linears[0])
    last = max(tensor["layer"] or 0 for tensor in analysis["tensors"])
    colors = ScalarMappable(Normalize(0, max(last, 1)), ListedColormap(colormaps["viridis"](np.linspace(0, 0.9, 256))))
    for axes, kind in zip(panels, analysis["kinds"], strict=True):
        for tensor in analysis["tensors"]:
            if tensor["kind"] == kind and tensor["std"]:
                color = "black" if tensor["layer"] is None else colors.to_rgba(np.array(tensor["layer"]))
                axes.plot(
                    *_density(tensor, analysis["histogram_edges"]), color=color, linewidth=0.8, drawstyle="steps-mid"
                )
        axes.set(title=kind, xlabel="weight", ylabel="density")
        _use_log(axes)
    figure.colorbar(colors, ax=panels, label="layer", ticks=_integers())
    return figure


def _density(tensor: TensorAnalysis, edges: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Return the middles of the bins and the density in them, nan where there are no weights."""
    scaled = tensor["mean"] + np.array(edges) * tensor["std"]
    counts = np.array(tensor["histogram"][1:-1], dtype=float)
    counts[counts == 0] = np.nan  # cannot be drawn on a logarithmic axis
    return (scaled[:-1] + scaled[1:]) / 2, counts / tensor["num_weights"] / np.diff(scaled)


def _plot_statistics(analysis: Analysis) -> Figure:
    from matplotlib.ticker import LogFormatter

    figure, panels = _panels(3, "Spread of the weights", analysis)
    _plot_by_layer(panels[0], analysis, lambda tensor: tensor["std"])
    panels[0].set(ylabel="standard deviation", ylim=(0, None))
    _plot_by_layer(panels[1], analysis, lambda tensor: tensor["kurtosis"])
    panels[1].set(ylabel="kurtosis (normal distribution: 3)")
    _plot_by_layer(panels[2], analysis, _largest_in_std)
    panels[2].set(ylabel="largest magnitude / standard deviation")
    for axes in panels[1:]:
        _use_log(axes)
        axes.yaxis.set_major_formatter(LogFormatter())  # 20, not 2x10^1
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
    _add_legend(figure, panels[0])
    return figure


def _largest_in_std(tensor: TensorAnalysis) -> float | None:
    return max(tensor["max"], -tensor["min"]) / tensor["std"] if tensor["std"] else None


def _plot_errors(analysis: Analysis) -> Figure:
    """Plot the errors; schemes of the same bits have the same axis."""
    figure, panels = _panels(len(analysis["schemes"]), "Quantization error", analysis)
    for axes, (name, scheme) in zip(panels, analysis["schemes"].items(), strict=True):
        _plot_by_layer(axes, analysis, partial(_error_in_percent, scheme=name))
        unit = "row" if scheme["group_size"] is None else f"group of {scheme['group_size']}"
        axes.set(title=f"INT{scheme['bits']}, one scale per {unit}", ylabel="||W - Wq|| / ||W||  in %")
    for bits in {scheme["bits"] for scheme in analysis["schemes"].values()}:
        same = [
            axes for axes, scheme in zip(panels, analysis["schemes"].values(), strict=True) if scheme["bits"] == bits
        ]
        top = max(axes.get_ylim()[1] for axes in same)
        for axes in same:
            axes.set_ylim(0, top)
    _add_legend(figure, panels[0])
    return figure


def _error_in_percent(tensor: TensorAnalysis, scheme: str) -> float | None:
    error = tensor["quantization"].get(scheme)
    return None if error is None or error["relative_rms_error"] is None else 100 * error["relative_rms_error"]


def _plot_by_layer(axes: Axes, analysis: Analysis, value: Callable[[TensorAnalysis], float | None]) -> None:
    """Draw a line per kind over the layers, and a level one for what is in no layer; undefined values leave a gap."""
    for kind, color, marker in zip(analysis["kinds"], COLORS, MARKERS, strict=False):
        tensors = [tensor for tensor in analysis["tensors"] if tensor["kind"] == kind]
        values = [math.nan if (number := value(tensor)) is None else number for tensor in tensors]
        if tensors[0]["layer"] is None:
            axes.axhline(values[0], color="black", linestyle="--" if kind == "embed_tokens" else ":", label=kind)
        else:
            layers = [tensor["layer"] or 0 for tensor in tensors]
            axes.plot(layers, values, color=color, marker=marker, markersize=3, linewidth=1, label=kind)
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(_integers())
    axes.grid(alpha=0.3)


def _use_log(axes: Axes) -> None:
    """Make the axis of the values logarithmic, unless there are none, as when all weights are equal."""
    if any(np.isfinite(line.get_ydata()).any() for line in axes.lines):
        axes.set_yscale("log")


def _integers() -> Locator:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(integer=True, min_n_ticks=1)


def _add_legend(figure: Figure, axes: Axes) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
