"""Write a model folder as an ONNX graph, weight by weight, without loading the model.

The new folder holds `model.onnx` (the graph), `model.onnx.data` (its weights), and config.json, generation settings
and tokenizer as every model folder does.
"""

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from glm_hf.conversion.convert import converted, made_together
from glm_hf.conversion.formats.model_tensors import model_tensors
from glm_hf.conversion.formats.safetensors_reader import ModelFolder
from glm_hf.conversion.quantize import loaded_dtype, quantized_rows
from glm_hf.conversion.streaming.blocks import progress_bar
from glm_hf.folders.atomic import AtomicFolder, destination, require_space
from glm_hf.folders.finite import FiniteWeights
from glm_hf.folders.model_folder import write_json, write_model_files
from glm_hf.folders.validation import GRAPH_FILE, read_json
from glm_hf.onnx.configuration import GLMONNXConfig
from glm_hf.quantization.configuration import GLMQuantizationConfig

if TYPE_CHECKING:
    from glm_hf.onnx.weights import Weights

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
DTYPE_NAMES = {"fp32": "float32", "fp16": "float16"}
QUANTIZATIONS = {"int4": 4, "int8": 8}
OPSET = 24
"""The first with caches that are updated in place."""
QUANTIZED_HERE = "quantized_by_export"
"""Note in the graph of the quantization that its export has made, empty for none."""


def export_onnx(
    src: str | Path,
    dst: str | Path,
    *,
    dtype: str = "fp32",
    quantization: str | None = None,
    opset: int = OPSET,
    overwrite: bool = False,
) -> None:
    """
    Write the weights of a model folder as one ONNX graph, for contexts and single tokens alike.

    Memory holds a few blocks of rows, not a tensor. Codes of a quantized model are kept; tied weights are stored once.
    Once it is complete, the same call does nothing.

    Args:
        src: Folder of `GLMForBlankInfilling`, as the converter and `save_pretrained` write it, quantized or not.
        dst: Folder to create; may exist if it is empty.
        dtype: Dtype of everything that is not quantized, `"fp32"` or `"fp16"`.
        quantization: `"int4"` or `"int8"` to quantize the weights of the layers, as `quantize_checkpoint` does.
        opset: Version of the operators, at least 24.
        overwrite: Whether to replace a folder at `dst`, once the new one is complete.

    Raises:
        ModuleNotFoundError: If the package onnx is missing.
        FileNotFoundError: If `src` lacks a file.
        FileExistsError: If `dst` holds something else already.
        ValueError: If `src` is not such a model or is damaged, a weight is not finite or too large for the dtype, or a
            setting is not one of these.
        OSError: If the disk has too little space, or another process is writing to `dst`.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}")
    if quantization is not None and quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization must be one of {', '.join(QUANTIZATIONS)}, got {quantization}")
    onnx = require("onnx")
    newest = onnx.defs.onnx_opset_version()
    if not OPSET <= opset <= newest:
        raise ValueError(
            f"opset must be from {OPSET}, the first with caches that are updated in place, to {newest}, the newest of "
            f"onnx {onnx.__version__}, got {opset}"
        )
    source = ModelFolder(src)
    if quantization is not None and source.quantization is not None:
        raise ValueError(f"{src} is quantized to int{source.bits} already; leave out quantization, its codes are kept")

    from glm_hf.onnx.graph import build_graph
    from glm_hf.onnx.weights import FILE, Weights

    quantized_here = GLMQuantizationConfig(bits=QUANTIZATIONS[quantization]) if quantization is not None else None
    tensors = model_tensors(source.config, DTYPES[dtype], quantized_here or source.quantization)
    weights = Weights(tensors, DTYPES[dtype])
    graph = build_graph(source.config, weights, opset, {QUANTIZED_HERE: quantization or ""})
    settings = {"dtype": dtype, "quantization": quantization, "opset": opset}
    target = AtomicFolder(destination(dst), replaces=overwrite, origin={"plan": settings, "sources": source.sources})

    def write_small_files(folder: Path) -> None:
        fields = read_json(Path(src) / "config.json")
        fields.pop("quantization_config", None)
        write_model_files(folder, fields, source=Path(src))
        of_graph = {"model_type": GLMONNXConfig.model_type, "architectures": ["ORTGLMForBlankInfilling"]}
        fields = {**read_json(folder / "config.json"), **of_graph, "dtype": DTYPE_NAMES[dtype]}
        write_json(folder / "config.json", fields)
        onnx.save_model(graph, folder / GRAPH_FILE)

    if target.is_complete(write_small_files):
        return
    with target.writing() as folder:
        require_space(target.dst, weights.num_bytes)
        _write_weights(folder / FILE, weights, _rows(source, tensors, quantized_here))
        write_small_files(folder)


def _write_weights(path: Path, weights: "Weights", rows: Iterator[tuple[str, Tensor]]) -> None:
    """Write the rows of all weights where they belong."""
    with open(path, "wb") as file, progress_bar("Exporting", weights.num_bytes) as progress:
        file.truncate(weights.num_bytes)
        written: dict[str, int] = {}
        for stored_name, stored in rows:
            name, block = weights.stored(stored_name, stored)
            content = block.contiguous().view(torch.uint8).numpy().tobytes()
            file.seek(weights.places[name].offset + written.get(name, 0))
            file.write(content)
            written[name] = written.get(name, 0) + len(content)
            progress.update(len(content))


def _rows(
    source: ModelFolder, tensors: dict[str, Tensor], quantized_here: GLMQuantizationConfig | None
) -> Iterator[tuple[str, Tensor]]:
    """Yield what is to be stored in blocks of rows: (name of a tensor of the model, its next rows)."""
    finite = FiniteWeights(strict=True)
    if quantized_here is not None:
        units = made_together(model_tensors(source.config, loaded_dtype(source), quantized_here))
        rows = quantized_rows(source, units, finite)
    else:
        rows = ((name, block) for name in tensors for block in finite.watch(name, source.read(name)))
    for name, block in rows:
        yield from converted(name, iter([block]), block.dtype, {name: tensors[name]})


def require(package: str) -> ModuleType:
    """Return a package of the extra `onnx`; ModuleNotFoundError with what to install if it is missing."""
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ModuleNotFoundError(f"ONNX graphs need {package}: pip install 'glm-hf[onnx]'", name=package) from error
