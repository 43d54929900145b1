"""Analyze the weights of a model folder: distribution and quantization error of every linear and embedding.

A narrow distribution is why GLM-130B keeps its scores in INT4: an outlier makes the step of its scale coarse for the
whole row. Source: GLM-130B (arXiv 2210.02414), section 2.5 and figure 5.
"""

import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import cast

from torch import Tensor
from tqdm import tqdm

from glm_hf.conversion.analysis.plots import plot_analysis
from glm_hf.conversion.analysis.results import Analysis, KindAnalysis, TensorAnalysis
from glm_hf.conversion.analysis.tensor import HISTOGRAM_EDGES, UNITS, Scheme, fits, measure
from glm_hf.conversion.formats.model_tensors import EMBEDDINGS, LINEARS
from glm_hf.conversion.formats.safetensors_reader import ModelFolder
from glm_hf.conversion.streaming.blocks import progress_bar, read_ahead
from glm_hf.folders.atomic import AtomicFolder, destination
from glm_hf.folders.validation import read_json

SCHEMA_VERSION = 1
logger = logging.getLogger(__name__)


def write_analysis(
    src: str | Path, dst: str | Path, *, group_sizes: Sequence[int] = (128,), overwrite: bool = False
) -> Analysis:
    """
    Write what `analyze_weights` finds to a folder: analysis.json and, if matplotlib is there, plots.

    Once the folder is complete, the same call only reads what it has found.

    Args:
        src: Folder of the model.
        dst: Folder to create; may exist if it is empty.
        group_sizes: Group sizes of the INT4 schemes, as `analyze_weights` takes them.
        overwrite: Whether to replace a folder at `dst`, once the new one is complete.

    Raises:
        FileExistsError: If `dst` holds something else already.
        FileNotFoundError, ValueError: As `analyze_weights`.
    """
    dst = destination(dst)
    source = _open(src)
    schemes = _schemes(group_sizes, source)
    has_plots = _has_matplotlib()
    origin = {"plan": {"schemes": list(schemes), "has_plots": has_plots, "model": str(src)}, "sources": source.sources}
    target = AtomicFolder(dst, replaces=overwrite, origin=origin)
    if target.is_complete():
        return cast(Analysis, read_json(dst / "analysis.json"))
    with target.writing() as folder:
        analysis = _analyze(source, str(src), schemes)
        text = json.dumps(analysis, indent=2, allow_nan=False) + "\n"
        (folder / "analysis.json").write_text(text, encoding="utf-8")
        if has_plots:
            plot_analysis(analysis, folder)
    return analysis


def analyze_weights(src: str | Path, *, group_sizes: Sequence[int] = (128,)) -> Analysis:
    """
    Measure the linears of all layers and the embeddings, block by block, without loading the model.

    Args:
        src: Folder of `GLMForBlankInfilling`, not quantized, as the converter and `save_pretrained` write it.
        group_sizes: Input features that share a scale, each for one more INT4 scheme besides INT8 and INT4 by rows. A
            tensor whose input features it does not divide is left out of that scheme.

    Raises:
        FileNotFoundError: If `src` lacks a file.
        ValueError: If `src` is not such a model, is quantized or damaged, a weight is not finite, in fp16 too, or a
            group size is odd or not positive.
    """
    source = _open(src)
    return _analyze(source, str(src), _schemes(group_sizes, source))


def describe_analysis(analysis: Analysis) -> str:
    """Return a table of the means per kind; columns of schemes are errors relative to the weights."""
    rows = [["mean over layers", "weights", "std", "kurtosis", "> 6 std", *analysis["schemes"]]]
    for kind, means in analysis["kinds"].items():
        kurtosis = "-" if means["kurtosis"] is None else f"{means['kurtosis']:.2f}"
        errors = ["-" if error is None else f"{error:.2%}" for error in means["relative_rms_error"].values()]
        rows.append([kind, f"{means['num_weights']:,}", f"{means['std']:.5f}", kurtosis])
        rows[-1] += [f"{means['share_beyond_6_std']:.1e}", *errors]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)


def _has_matplotlib() -> bool:
    """Tell whether plots can be made; if not, warn before the work begins rather than after it."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        logger.warning("matplotlib is not installed, so there will be no plots: pip install 'glm-hf[plot]'")
        return False
    return True


def _open(src: str | Path) -> ModelFolder:
    source = ModelFolder(src)
    if source.bits is not None:
        raise ValueError(f"{src} is quantized to int{source.bits} already; analyze the model that is not")
    return source


def _weights(source: ModelFolder) -> dict[str, Tensor]:
    """Return the matrices to analyze, on meta by name."""
    return {name: tensor for name, tensor in source.tensors.items() if name.endswith(LINEARS + EMBEDDINGS)}


def _schemes(group_sizes: Sequence[int], source: ModelFolder) -> dict[str, Scheme]:
    """Return all schemes by name, without groups that fit no tensor; ValueError if a group size is not even."""
    schemes = {f"int{bits}": Scheme(bits=bits, group_size=None) for bits in (8, 4)}
    widths = sorted({tensor.shape[1] for tensor in _weights(source).values()})
    for group_size in group_sizes:
        if group_size < 2 or group_size % 2:
            raise ValueError(f"group_size must be even and positive, got {group_size}")
        scheme = Scheme(bits=4, group_size=group_size)
        if any(fits(scheme, num_columns) for num_columns in widths):
            schemes[f"int4-g{group_size}"] = scheme
        else:
            logger.warning("groups of %d are left out: they divide no input features, %s", group_size, widths)
    return schemes


def _analyze(source: ModelFolder, model: str, schemes: dict[str, Scheme]) -> Analysis:
    weights = _weights(source)
    num_bytes = sum(tensor.nbytes for tensor in weights.values())
    with progress_bar("Analyzing", 2 * num_bytes) as progress:  # `measure` reads twice
        tensors = [_analyze_tensor(source, name, meta, schemes, progress) for name, meta in weights.items()]
    kinds: dict[str, list[TensorAnalysis]] = {}
    for tensor in tensors:
        kinds.setdefault(tensor["kind"], []).append(tensor)
    return Analysis(
        version=SCHEMA_VERSION,
        model=model,
        units=UNITS,
        schemes=schemes,
        histogram_edges=HISTOGRAM_EDGES,
        kinds={kind: _summarize(group, list(schemes)) for kind, group in kinds.items()},
        tensors=tensors,
    )


def _analyze_tensor(
    source: ModelFolder, name: str, meta: Tensor, schemes: dict[str, Scheme], progress: tqdm
) -> TensorAnalysis:
    def read() -> Iterator[Tensor]:
        with closing(read_ahead(source.read(name))) as blocks:
            for block in blocks:
                yield block
                progress.update(block.nbytes)

    try:
        statistics = measure(read, (meta.shape[0], meta.shape[1]), schemes)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    layer, kind = _place(name)
    dtype = str(meta.dtype).removeprefix("torch.")
    return TensorAnalysis(name=name, layer=layer, kind=kind, shape=list(meta.shape), dtype=dtype, **statistics)


def _place(name: str) -> tuple[int | None, str]:
    """Return layer and kind of a weight: (3, "attention.dense"), or (None, "embed_tokens")."""
    path = name.removeprefix("model.").removesuffix(".weight")
    match = re.fullmatch(r"layers\.(\d+)\.(.+)", path)
    return (int(match[1]), match[2]) if match else (None, path)


def _summarize(tensors: Sequence[TensorAnalysis], schemes: Sequence[str]) -> KindAnalysis:
    errors = {
        scheme: [
            tensor["quantization"][scheme]["relative_rms_error"]
            for tensor in tensors
            if scheme in tensor["quantization"]
        ]
        for scheme in schemes
    }
    return KindAnalysis(
        num_tensors=len(tensors),
        num_weights=sum(tensor["num_weights"] for tensor in tensors),
        std=sum(tensor["std"] for tensor in tensors) / len(tensors),
        kurtosis=_mean([tensor["kurtosis"] for tensor in tensors]),
        share_beyond_6_std=sum(tensor["share_beyond_6_std"] for tensor in tensors) / len(tensors),
        relative_rms_error={scheme: _mean(values) for scheme, values in errors.items()},
    )


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of the values that are defined."""
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None
